//! Sessions that were agreed on before, for handshakes that resume them: bounded in bytes.
//!
//! A session keeps the peer's whole certificate chain, of up to 64 KiB that the peer chooses, so
//! that a bound on their number alone bounds little.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustls::client::{ClientSessionStore, Tls12ClientSessionValue, Tls13ClientSessionValue};
use rustls::pki_types::ServerName;
use rustls::server::StoresServerSessions;
use rustls::NamedGroup;

/// Bytes of all sessions of a server's configuration.
const MAX_BYTES: usize = 1 << 20;
/// Bytes of one session. A larger one is not stored: its client does a full handshake each time.
const MAX_SESSION: usize = 16 * 1024;
/// What a session takes beside its own bytes: two keys, and its entries in two tables.
const OVERHEAD: usize = 200;

/// The sessions of a server's configuration, the latest ones.
#[derive(Default)]
pub(super) struct ServerSessions(Mutex<Sessions>);

#[derive(Default)]
struct Sessions {
    /// With the number of each.
    by_id: HashMap<Vec<u8>, (u64, Vec<u8>)>,
    /// Their ids, in the order in which they came.
    order: BTreeMap<u64, Vec<u8>>,
    next: u64,
    bytes: usize,
}

impl Sessions {
    fn put(&mut self, id: Vec<u8>, session: Vec<u8>) -> bool {
        let size = size(&id, &session);
        if size > MAX_SESSION {
            return false;
        }
        self.take(&id);
        while self.bytes + size > MAX_BYTES {
            let Some((_, oldest)) = self.order.pop_first() else {
                break;
            };
            self.take(&oldest);
        }
        let number = self.next;
        self.next += 1;
        self.bytes += size;
        self.order.insert(number, id.clone());
        self.by_id.insert(id, (number, session));
        true
    }

    fn take(&mut self, id: &[u8]) -> Option<Vec<u8>> {
        let (number, session) = self.by_id.remove(id)?;
        self.order.remove(&number);
        self.bytes -= size(id, &session);
        Some(session)
    }
}

fn size(id: &[u8], session: &[u8]) -> usize {
    2 * id.len() + session.len() + OVERHEAD
}

impl ServerSessions {
    fn lock(&self) -> MutexGuard<'_, Sessions> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl StoresServerSessions for ServerSessions {
    fn put(&self, id: Vec<u8>, mut session: Vec<u8>) -> bool {
        session.shrink_to_fit();
        self.lock().put(id, session)
    }

    fn get(&self, id: &[u8]) -> Option<Vec<u8>> {
        let sessions = self.lock();
        let (_, session) = sessions.by_id.get(id)?;
        Some(session.clone())
    }

    fn take(&self, id: &[u8]) -> Option<Vec<u8>> {
        self.lock().take(id)
    }

    fn can_cache(&self) -> bool {
        true
    }
}

impl fmt::Debug for ServerSessions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sessions = self.lock();
        f.debug_struct("ServerSessions")
            .field("sessions", &sessions.by_id.len())
            .field("bytes", &sessions.bytes)
            .finish()
    }
}

/// Sessions of a client's configuration. rustls does not say how large they are: a server may make
/// each of them 128 KiB, a ticket and its certificate chain.
const MAX_CLIENT_SESSIONS: usize = 64;
/// Of them with one server: more than it sends after one handshake, as a rule.
const MAX_OF_SERVER: usize = 4;
/// Servers whose key exchange is remembered.
const MAX_HINTS: usize = 256;

/// The sessions of a client's configuration, the latest ones.
#[derive(Default)]
pub(super) struct ClientSessions(Mutex<Remembered>);

#[derive(Default)]
struct Remembered {
    /// The oldest first.
    sessions: VecDeque<(ServerName<'static>, Session)>,
    hints: VecDeque<(ServerName<'static>, NamedGroup)>,
}

enum Session {
    Tls12(Tls12ClientSessionValue),
    Tls13(Tls13ClientSessionValue),
}

impl Remembered {
    fn add(&mut self, server: ServerName<'static>, session: Session) {
        let same = self.sessions.iter().filter(|(name, _)| *name == server);
        if same.count() >= MAX_OF_SERVER {
            let oldest = self.sessions.iter().position(|(name, _)| *name == server);
            oldest.and_then(|at| self.sessions.remove(at));
        }
        if self.sessions.len() >= MAX_CLIENT_SESSIONS {
            self.sessions.pop_front();
        }
        self.sessions.push_back((server, session));
    }

    fn remove_tls12(&mut self, server: &ServerName<'_>) {
        self.sessions
            .retain(|(name, session)| name != server || !matches!(session, Session::Tls12(_)));
    }
}

impl ClientSessions {
    fn lock(&self) -> MutexGuard<'_, Remembered> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ClientSessionStore for ClientSessions {
    fn set_kx_hint(&self, server: ServerName<'static>, group: NamedGroup) {
        let hints = &mut self.lock().hints;
        hints.retain(|(name, _)| *name != server);
        if hints.len() >= MAX_HINTS {
            hints.pop_front();
        }
        hints.push_back((server, group));
    }

    fn kx_hint(&self, server: &ServerName<'_>) -> Option<NamedGroup> {
        let remembered = self.lock();
        let mut hints = remembered.hints.iter();
        let (_, group) = hints.find(|(name, _)| name == server)?;
        Some(*group)
    }

    fn set_tls12_session(&self, server: ServerName<'static>, session: Tls12ClientSessionValue) {
        let mut remembered = self.lock();
        remembered.remove_tls12(&server);
        remembered.add(server, Session::Tls12(session));
    }

    fn tls12_session(&self, server: &ServerName<'_>) -> Option<Tls12ClientSessionValue> {
        let remembered = self.lock();
        let mut sessions = remembered.sessions.iter();
        sessions.find_map(|(name, session)| match session {
            Session::Tls12(session) if name == server => Some(session.clone()),
            _ => None,
        })
    }

    fn remove_tls12_session(&self, server: &ServerName<'static>) {
        self.lock().remove_tls12(server);
    }

    fn insert_tls13_ticket(&self, server: ServerName<'static>, session: Tls13ClientSessionValue) {
        self.lock().add(server, Session::Tls13(session));
    }

    fn take_tls13_ticket(&self, server: &ServerName<'static>) -> Option<Tls13ClientSessionValue> {
        let mut remembered = self.lock();
        let latest = remembered
            .sessions
            .iter()
            .rposition(|(name, session)| name == server && matches!(session, Session::Tls13(_)))?;
        match remembered.sessions.remove(latest) {
            Some((_, Session::Tls13(session))) => Some(session),
            _ => None,
        }
    }
}

impl fmt::Debug for ClientSessions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let remembered = self.lock();
        f.debug_struct("ClientSessions")
            .field("sessions", &remembered.sessions.len())
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(number: usize) -> Vec<u8> {
        let mut id = vec![0; 32];
        id[..8].copy_from_slice(&number.to_be_bytes());
        id
    }

    /// Large sessions, as with whole certificate chains, take the place of others, up to a limit.
    #[test]
    fn sessions_of_a_server_are_bounded_in_bytes() {
        let store = ServerSessions::default();
        for number in 0..10_000 {
            assert!(store.put(id(number), vec![7; 100]));
        }
        let count = store.lock().by_id.len();
        assert!(count > 2000, "{count} common sessions");
        assert!(store.lock().bytes <= MAX_BYTES);
        assert_eq!(store.get(&id(0)), None, "the oldest made room");
        assert_eq!(store.get(&id(9_999)), Some(vec![7; 100]));
        for number in 10_000..20_000 {
            assert!(store.put(id(number), vec![7; MAX_SESSION - 1000]));
        }
        let count = store.lock().by_id.len();
        assert!((60..80).contains(&count), "{count} large ones");
        assert!(!store.put(id(20_000), vec![7; MAX_SESSION]), "too large");
        assert_eq!(store.get(&id(20_000)), None);
        for number in 0..20_000 {
            assert_eq!(store.take(&id(number)).is_some(), number >= 20_000 - count);
        }
        let sessions = store.lock();
        assert!(sessions.by_id.is_empty() && sessions.order.is_empty());
        assert_eq!(sessions.bytes, 0);
    }

    #[test]
    fn a_session_is_replaced_and_taken_once() {
        let store = ServerSessions::default();
        assert!(store.put(id(1), vec![1; 1000]) && store.put(id(1), vec![2; 10]));
        assert_eq!(store.get(&id(1)), Some(vec![2; 10]));
        assert_eq!(store.take(&id(1)), Some(vec![2; 10]));
        assert_eq!(store.take(&id(1)), None);
        assert_eq!(store.lock().bytes, 0);
    }

    /// A client may connect to any number of servers, each of which may send many tickets.
    #[test]
    fn hints_of_a_client_are_bounded_in_number() {
        let store = ClientSessions::default();
        let name = |number| ServerName::try_from(format!("s{number}.example")).expect("a name");
        for number in 0..=MAX_HINTS {
            store.set_kx_hint(name(number), NamedGroup::X25519);
        }
        assert_eq!(store.kx_hint(&name(0)), None, "the oldest made room");
        assert_eq!(store.kx_hint(&name(1)), Some(NamedGroup::X25519));
        store.set_kx_hint(name(1), NamedGroup::secp256r1);
        assert_eq!(store.kx_hint(&name(1)), Some(NamedGroup::secp256r1));
        assert_eq!(store.lock().hints.len(), MAX_HINTS);
    }

    /// Sessions are secrets.
    #[test]
    fn sessions_are_shown_by_number_alone() {
        let server = ServerSessions::default();
        assert!(server.put(id(1), vec![7; 10]));
        let shown = format!("{server:?} {:?}", ClientSessions::default());
        assert!(shown.contains("sessions: 1, bytes: "), "{shown}");
        assert!(shown.contains("ClientSessions { sessions: 0 }"), "{shown}");
        assert!(!shown.contains('['), "{shown}");
    }

    /// Tickets come from whole handshakes alone.
    #[cfg(all(feature = "sim", any(feature = "ring", feature = "aws-lc-rs")))]
    mod tickets {
        use std::sync::Arc;

        use rustls::client::Resumption;
        use rustls::version::TLS13;
        use rustls::{ClientConfig, ClientConnection, Connection, ServerConfig, ServerConnection};

        use super::*;
        use crate::proto::tests::tls::Identity;

        /// A server with many names, a client, and the sessions of the client.
        struct Pair {
            server: ServerConfig,
            client: Arc<ClientConfig>,
            sessions: Arc<ClientSessions>,
        }

        impl Pair {
            fn new() -> Self {
                let identity = Identity::of("*.server.test");
                let mut client = identity.client(&TLS13);
                let sessions = Arc::new(ClientSessions::default());
                client.resumption = Resumption::store(sessions.clone());
                Self {
                    server: identity.server(),
                    client: Arc::new(client),
                    sessions,
                }
            }

            fn name(number: usize) -> ServerName<'static> {
                ServerName::try_from(format!("s{number}.server.test")).expect("a name")
            }

            /// A handshake after which the server sends tickets, which all have this mark.
            fn shake(&self, number: usize, tickets: usize, mark: u32) {
                let mut server = self.server.clone();
                server.send_tls13_tickets = tickets;
                server.max_early_data_size = mark;
                let client = ClientConnection::new(Arc::clone(&self.client), Self::name(number));
                let server = ServerConnection::new(Arc::new(server));
                let mut sides: [Connection; 2] = [
                    client.expect("a client").into(),
                    server.expect("a server").into(),
                ];
                while sides.iter().any(|side| side.wants_write()) {
                    for (from, to) in [(0, 1), (1, 0)] {
                        let mut wire = Vec::new();
                        while sides[from].wants_write() {
                            sides[from].write_tls(&mut wire).expect("into memory");
                        }
                        let mut wire = &wire[..];
                        while !wire.is_empty() {
                            sides[to].read_tls(&mut wire).expect("from memory");
                            sides[to].process_new_packets().expect("good TLS");
                        }
                    }
                }
            }

            /// Takes all tickets of a server, the latest first, and returns their marks.
            fn take(&self, number: usize) -> Vec<u32> {
                let name = Self::name(number);
                let next = || self.sessions.take_tls13_ticket(&name);
                let marks = std::iter::from_fn(next).map(|ticket| ticket.max_early_data_size());
                marks.collect()
            }
        }

        #[test]
        fn of_one_server_the_latest_four_are_kept() {
            let pair = Pair::new();
            pair.shake(0, 1, 5);
            pair.shake(1, 2, 6);
            pair.shake(1, 3, 7);
            assert_eq!(pair.take(1), [7, 7, 7, 6], "one of two was tried");
            pair.shake(1, 3, 7);
            pair.shake(1, 6, 8);
            assert_eq!(pair.take(1), [8; 4]);
            assert_eq!(pair.take(0), [5], "that of another server stays");
        }

        #[test]
        fn of_all_servers_the_latest_sixty_four_are_kept() {
            let pair = Pair::new();
            for number in 0..=MAX_CLIENT_SESSIONS {
                pair.shake(number, 1, 9);
            }
            assert_eq!(pair.sessions.lock().sessions.len(), MAX_CLIENT_SESSIONS);
            assert_eq!(pair.take(0), [0; 0], "the oldest made room");
            for number in 1..=MAX_CLIENT_SESSIONS {
                assert_eq!(pair.take(number), [9]);
            }
        }
    }
}
