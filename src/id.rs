//! Names of connections and listeners.

use std::fmt;
use std::num::{NonZeroU32, NonZeroU64};
use std::str::FromStr;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::proto::Time;

/// Names one connection of one server. Not reused in practice: see *Reuse*.
///
/// A slot is reused with another id. So a late kill, message or timer for a closed connection has
/// no effect on the slot's next connection. In another server of this process, be it another shard
/// or a later server, the id names no connection.
///
/// `Display` prints the slot and how many connections it has had, as in `7.3`. It leaves out the
/// server, so that a simulated world has the same trace in each process. `{:#}` prints the server's
/// number too, as in `7.3.1`: the form that [`FromStr`] reads.
///
/// ```
/// # use std::os::unix::net::UnixStream;
/// # use portcullis::{Config, Connect, ConnId, Context, Framing, Handler, Outcome, Server};
/// # struct Quiet;
/// # impl Handler for Quiet {
/// #     fn on_frame(&mut self, _: &mut Context<'_>, _: &[u8]) -> Outcome { Ok(()) }
/// # }
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let mut server: Server = Server::new(Config::new())?;
/// # let (ours, _theirs) = UnixStream::pair()?;
/// # let id = server.control().adopt(ours, Connect::new(Framing::Line), Quiet)?;
/// let text = format!("{id:#}");
/// assert_eq!(text.parse::<ConnId>()?, id);
/// # Ok(()) }
/// ```
///
/// # Reuse
///
/// An id has 8 bytes: 24 bits of slot, 30 bits of generation, 10 bits of server. It is reused after
/// 2³⁰ connections in one slot, or by every 1,024th server that the process creates, for the
/// same slot and generation.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ConnId(NonZeroU64);

const SERVER_BITS: u32 = 10;
const GENERATION_BITS: u32 = 30;
const INDEX_BITS: u32 = 24;

impl ConnId {
    /// The last generation before the first one, which is 1.
    pub(crate) const MAX_GENERATION: u32 = (1 << GENERATION_BITS) - 1;

    /// `index` is below 2²⁴, because [`MAX_CONNECTIONS`](crate::config::MAX_CONNECTIONS) is.
    #[inline]
    pub(crate) const fn new(server: ServerNumber, index: u32, generation: u32) -> Self {
        debug_assert!(index < 1 << INDEX_BITS && generation <= Self::MAX_GENERATION);
        let (index, generation) = (index as u64, generation as u64);
        let high = index << (GENERATION_BITS + SERVER_BITS);
        match NonZeroU64::new(high | generation << SERVER_BITS | server.0 as u64) {
            Some(bits) => Self(bits),
            // A generation is never zero.
            None => Self(NonZeroU64::MIN),
        }
    }

    #[inline]
    pub(crate) const fn index(self) -> u32 {
        (self.bits() >> (GENERATION_BITS + SERVER_BITS)) as u32
    }

    #[inline]
    pub(crate) const fn generation(self) -> u32 {
        (self.bits() >> SERVER_BITS) as u32 & Self::MAX_GENERATION
    }

    pub(crate) const fn server(self) -> ServerNumber {
        ServerNumber(self.bits() as u16 & ServerNumber::MASK)
    }

    /// Never zero.
    #[inline]
    pub(crate) const fn bits(self) -> u64 {
        self.0.get()
    }
}

impl fmt::Display for ConnId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.index(), self.generation())?;
        match f.alternate() {
            true => write!(f, ".{}", self.server().0),
            false => Ok(()),
        }
    }
}

/// Reads the form of `{:#}`: slot, generation and server, as in `7.3.1`.
impl FromStr for ConnId {
    type Err = crate::Error;

    fn from_str(text: &str) -> crate::Result<Self> {
        let mut parts = text.split('.');
        let mut next = |max: u32| {
            let digits = parts.next()?;
            // The one way in which each number is printed.
            let is_plain = digits == "0" || !digits.starts_with(['0', '+']);
            let number = digits.parse().ok().filter(|number| *number <= max);
            number.filter(|_| is_plain)
        };
        let (index, generation) = (next((1 << INDEX_BITS) - 1), next(Self::MAX_GENERATION));
        let generation = generation.filter(|generation| *generation > 0);
        let server = next(u32::from(ServerNumber::MASK));
        match (index, generation, server, parts.next()) {
            (Some(index), Some(generation), Some(server), None) => {
                Ok(Self::new(ServerNumber(server as u16), index, generation))
            }
            _ => {
                let problem =
                    format!("{text:?} is no id (slot, generation and server, as in 7.3.1)");
                Err(crate::Error::option("id", problem))
            }
        }
    }
}

impl fmt::Debug for ConnId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ConnId({self} of server {})", self.server().0)
    }
}

/// Tells the servers of this process apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct ServerNumber(u16);

impl ServerNumber {
    const MASK: u16 = (1 << SERVER_BITS) - 1;
    /// That of a modelled connection, which has no server.
    #[cfg(any(test, feature = "sim"))]
    pub(crate) const NONE: Self = Self(0);

    /// The number of the next server.
    pub(crate) fn next() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        Self(NEXT.fetch_add(1, Ordering::Relaxed) as u16 & Self::MASK)
    }
}

/// Names one listener of one server. Not reused in practice: after 4 million listeners, and never
/// while the listener or a connection of it is there.
///
/// In another server, be it another shard, the id names no listener.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ListenerId(NonZeroU32);

impl ListenerId {
    const NUMBERS: u32 = (1 << (u32::BITS - SERVER_BITS)) - 1;

    /// The id of the server's listener `number`; the numbers repeat.
    pub(crate) fn new(server: ServerNumber, number: u32) -> Self {
        let number = number % Self::NUMBERS + 1;
        let bits = number << SERVER_BITS | u32::from(server.0);
        // Not zero, because `number` is not.
        Self(NonZeroU32::MIN.saturating_add(bits - 1))
    }

    pub(crate) fn number(self) -> u32 {
        (self.0.get() >> SERVER_BITS) - 1
    }

    fn server(self) -> ServerNumber {
        ServerNumber(self.0.get() as u16 & ServerNumber::MASK)
    }
}

impl fmt::Debug for ListenerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ListenerId({self} of server {})", self.server().0)
    }
}

impl fmt::Display for ListenerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "L{}", self.number())
    }
}

/// Names a listener in a query or command: by id, by port, or by name.
///
/// ```
/// use portcullis::ListenerRef;
/// let by_port: ListenerRef = 2222.into();
/// let by_name: ListenerRef = "127.0.0.1:2222".into();
/// assert_ne!(by_port, by_name);
/// ```
///
/// A port is the real local one: with several listeners on one port (IPv4 and IPv6), the first.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ListenerRef(pub(crate) Which);

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Which {
    Id(ListenerId),
    Port(u16),
    Name(String),
}

impl fmt::Display for ListenerRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Which::Id(id) => id.fmt(f),
            Which::Port(port) => write!(f, "port {port}"),
            Which::Name(name) => write!(f, "{name:?}"),
        }
    }
}

impl From<ListenerId> for ListenerRef {
    fn from(id: ListenerId) -> Self {
        Self(Which::Id(id))
    }
}

impl From<u16> for ListenerRef {
    fn from(port: u16) -> Self {
        Self(Which::Port(port))
    }
}

impl From<&str> for ListenerRef {
    fn from(name: &str) -> Self {
        Self(Which::Name(name.to_owned()))
    }
}

impl From<&String> for ListenerRef {
    fn from(name: &String) -> Self {
        Self(Which::Name(name.clone()))
    }
}

impl From<String> for ListenerRef {
    fn from(name: String) -> Self {
        Self(Which::Name(name))
    }
}

/// Names one alarm of one server. Reused by that server after 2³² alarms.
///
/// In another server, be it another shard, the id names no alarm.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct AlarmId(pub(crate) u32, pub(crate) ServerNumber);

impl fmt::Display for AlarmId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "A{}", self.0)
    }
}

/// Names one timer of the application ([`Control::set_timer`](crate::Control::set_timer)). Never
/// reused by its server. In another server, be it another shard, the id names no timer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TimerId {
    pub(crate) at: Time,
    pub(crate) number: u64,
    pub(crate) server: ServerNumber,
}

impl fmt::Display for TimerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "T{}", self.number)
    }
}

/// Names one watched descriptor ([`Control::watch`](crate::Control::watch)). Never reused by its
/// server. In another server, be it another shard, the id names none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct WatchId {
    pub(crate) slot: usize,
    pub(crate) number: u64,
    pub(crate) server: ServerNumber,
}

impl fmt::Display for WatchId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "W{}", self.number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::MAX_CONNECTIONS;

    #[test]
    fn an_id_keeps_its_parts() {
        let last = MAX_CONNECTIONS as u32;
        for server in [0, 1, ServerNumber::MASK].map(ServerNumber) {
            for index in [0, 1, last] {
                for generation in [1, 2, ConnId::MAX_GENERATION] {
                    let id = ConnId::new(server, index, generation);
                    let parts = (id.server(), id.index(), id.generation());
                    assert_eq!(parts, (server, index, generation));
                    assert_eq!(id.to_string(), format!("{index}.{generation}"));
                    assert_eq!(format!("{id:#}").parse().ok(), Some(id));
                }
            }
        }
        assert_eq!(size_of::<ConnId>(), 8);
    }

    #[test]
    fn only_a_whole_id_is_read() {
        for text in [
            "",
            "7",
            "7.3",
            "7.3.1.0",
            "7.3.",
            ".3.1",
            "7.3.x",
            "-7.3.1",
            "+7.3.1",
            "07.3.1",
            " 7.3.1",
            "16777216.1.1",
            "1.1073741824.1",
            "1.1.1024",
            "99999999999.1.1",
        ] {
            assert!(text.parse::<ConnId>().is_err(), "{text:?}");
        }
        let id = "16777215.1073741823.1023".parse::<ConnId>().ok();
        let parts = id.map(|id| (id.index(), id.generation()));
        assert_eq!(parts, Some((0xff_ffff, 0x3fff_ffff)));
    }

    #[test]
    fn the_id_of_a_listener_keeps_its_parts() {
        let last = ListenerId::NUMBERS - 1;
        for server in [0, 1, ServerNumber::MASK].map(ServerNumber) {
            for (number, kept) in [(0, 0), (1, 1), (last, last), (last + 1, 0)] {
                let id = ListenerId::new(server, number);
                assert_eq!((id.server(), id.number()), (server, kept));
            }
        }
        assert_eq!(size_of::<Option<ListenerId>>(), 4);
    }

    #[test]
    fn servers_have_numbers_of_their_own() {
        assert_ne!(ServerNumber::next(), ServerNumber::next());
    }

    /// `Display` is short, for one server; `Debug` tells servers apart.
    #[test]
    fn an_id_is_a_word() {
        let server = ServerNumber(5);
        let (conn, listener) = (ConnId::new(server, 7, 3), ListenerId::new(server, 2));
        assert_eq!(conn.to_string(), "7.3");
        assert_eq!(format!("{conn:?}"), "ConnId(7.3 of server 5)");
        assert_eq!(listener.to_string(), "L2");
        assert_eq!(format!("{listener:?}"), "ListenerId(L2 of server 5)");
        let refs: [ListenerRef; 3] = [listener.into(), 80.into(), "a".into()];
        assert_eq!(
            refs.map(|listener| listener.to_string()),
            ["L2", "port 80", "\"a\""]
        );
        let (at, number) = (Time::ZERO, 4);
        assert_eq!(AlarmId(4, server).to_string(), "A4");
        assert_eq!(TimerId { at, number, server }.to_string(), "T4");
        let watch = WatchId {
            slot: 1,
            number,
            server,
        };
        assert_eq!(watch.to_string(), "W4");
    }
}
