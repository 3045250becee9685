//! One connection alone, between a kernel of a few fields and a handler of a few actions.
//!
//! The reactor's own engine drives it; only what needs a second connection is missing. Plain ones
//! can be copied and compared, so that a search can visit every state there is.

mod oracle;
mod socket;
mod turn;

use std::fmt;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::rc::Rc;
use std::time::Duration;

use oracle::{Checked, Oracle};
use socket::{ModelOs, Socket};

use super::input::{Action, Callback, End, Input};
use super::Violation;
use crate::addr::Addr;
use crate::config::Connect;
use crate::config::{Listen, ProxyProtocol};
use crate::error::Result;
use crate::id::{ConnId, ServerNumber};
use crate::proto::tls::ClientTls;
use crate::proto::{
    ConnConfig, Framing, Machine, Pool, ProxyHeader, SharedMeters, State, Time, TlsConfig,
};
use crate::reactor::connection::{Connection, HangUp};
use crate::reactor::drive::Budget;

/// The id of every modelled connection.
const ID: ConnId = ConnId::new(ServerNumber::NONE, 0, 1);
/// How long a handshake may take once the server drains.
const HANDSHAKE_GRACE: Duration = Duration::from_secs(1);

/// One connection, its peer, its kernel and its handler, moved by [`Input`] after [`Input`].
///
/// This tests the connection machine: the handler is a built-in one that does [`Action`]s. To test
/// your own, use [`Sim`](super::Sim).
///
/// After each input the invariants are checked, the order of the handler's calls, and the bytes
/// that the peer got.
///
/// ```
/// use portcullis::sim::{Action, ConnModel, Input, Callback};
/// use portcullis::{CloseReason, Framing, Listen};
///
/// let mut one = ConnModel::new(&Listen::tcp("127.0.0.1:0", Framing::Packet1)).unwrap();
/// for input in [
///     Input::OnFrame(vec![Action::Echo, Action::Pause]),
///     Input::Bytes(b"\x02ab\x02cd".to_vec()),
///     Input::Finish,
///     Input::Turn,
/// ] {
///     one.apply(&input).unwrap();
/// }
/// assert_eq!(one.take_callbacks(), [Callback::Opened, Callback::Frame(b"ab".to_vec())]);
/// assert_eq!(one.take_sent(), b"\x02ab");
/// ```
pub struct ConnModel {
    conn: Connection<Socket>,
    kernel: ModelOs,
    pool: Pool,
    plain: Vec<u8>,
    /// The time of the running turn.
    now: Time,
    limits: Rc<ConnConfig>,
    /// Work is left after a turn that no event will announce.
    again: bool,
    fault: Option<Violation>,
    script: Script,
    oracle: Oracle,
    callbacks: Vec<Callback>,
    sent: Vec<u8>,
    last_state: State,
    transitions: Vec<(State, State)>,
    /// The frame at which the handler upgrades it, and to what.
    upgrade: Option<(Vec<u8>, TlsConfig)>,
    /// With which it is to connect.
    client_tls: Option<ClientTls>,
}

/// What the handler does.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Script {
    on_frame: Vec<Action>,
    on_end: Vec<Action>,
}

impl ConnModel {
    /// Makes a connection that a listener with these options has accepted and its service has
    /// admitted. With a PROXY header the peer is a trusted proxy, and is admitted after the header.
    /// The handler echoes, and closes in order when the peer has finished or the server drains.
    ///
    /// # Errors
    ///
    /// Those of [`Server::listen`](crate::Server::listen) for settings that cannot work.
    ///
    /// # Panics
    ///
    /// If such a connection breaks a promise at once.
    #[track_caller]
    pub fn new(listen: &Listen) -> Result<Self> {
        let mut model = Self::accepted(listen)?;
        for input in [Input::Admit, Input::Turn] {
            if let Err(violation) = model.apply(&input) {
                panic!("{violation}");
            }
        }
        Ok(model)
    }

    /// Makes a connection as [`ConnModel::new`], before the service has answered: [`Input::Admit`]
    /// comes next.
    ///
    /// # Errors
    ///
    /// Those of [`Server::listen`](crate::Server::listen).
    pub fn accepted(listen: &Listen) -> Result<Self> {
        listen.check()?;
        let limits = Rc::new(listen.conn.clone());
        let (tls, mut pool) = (listen.tls.as_ref(), Pool::default());
        let mut machine = Machine::new(
            &listen.framing,
            Rc::clone(&limits),
            tls,
            Time::ZERO,
            &mut pool,
        );
        let mut meters = SharedMeters::default();
        meters.follow(listen.total_read_rate, listen.total_frame_rate, Time::ZERO);
        machine.set_rates(&meters);
        if listen.proxy_protocol != ProxyProtocol::Off {
            machine.await_header(listen.proxy_protocol == ProxyProtocol::Required);
        }
        Ok(Self::of(
            machine,
            limits,
            &listen.framing,
            listen.tls.is_some(),
        ))
    }

    fn of(machine: Machine, limits: Rc<ConnConfig>, framing: &Framing, is_tls: bool) -> Self {
        let framing = match framing {
            _ if is_tls => None,
            Framing::Custom(_) => None,
            framing => {
                (0..Action::FRAMINGS).find(|&number| same(framing, &Action::framing(number)))
            }
        };
        Self {
            conn: Connection {
                stream: Some(Socket::new()),
                writable: true,
                ..Connection::new(ID, None, Addr::unspecified(), machine, Time::ZERO, 0)
            },
            kernel: ModelOs::at(Time::ZERO),
            pool: Pool::default(),
            plain: Vec::new(),
            now: Time::ZERO,
            limits,
            again: false,
            fault: None,
            script: Script {
                on_frame: vec![Action::Echo],
                on_end: vec![Action::CloseAfterInput],
            },
            oracle: Oracle::of(framing),
            callbacks: Vec::new(),
            sent: Vec::new(),
            last_state: State::Accepting,
            transitions: Vec::new(),
            upgrade: None,
            client_tls: None,
        }
    }

    /// Makes an outgoing connection before it is established: [`Input::Admit`] establishes it.
    ///
    /// # Errors
    ///
    /// Those of [`Control::connect`](crate::Control::connect) for options that cannot work.
    pub fn connecting(connect: &Connect) -> Result<Self> {
        connect.check(&Addr::unspecified())?;
        let limits = Rc::new(connect.conn.clone());
        let machine = Machine::connecting(&connect.framing, Rc::clone(&limits), Time::ZERO);
        let is_tls = connect.tls.is_some();
        let mut model = Self::of(machine, limits, &connect.framing, is_tls);
        model.client_tls.clone_from(&connect.tls);
        model.last_state = State::Connecting;
        Ok(model)
    }

    /// Applies one input; without effect after the connection's end.
    ///
    /// # Errors
    ///
    /// The first broken promise.
    pub fn apply(&mut self, input: &Input) -> Checked {
        if self.oracle.end.is_some() {
            return Ok(());
        }
        let (conn, now) = (&mut self.conn, self.kernel.now);
        let Some(socket) = &mut conn.stream else {
            return Ok(());
        };
        match input {
            Input::Admit => {
                let machine = &mut conn.machine;
                if machine.state() == State::Accepting && !machine.awaits_header() {
                    machine.handle_admitted(now);
                }
                machine.handle_connected(self.client_tls.as_ref(), now, &mut self.pool);
            }
            Input::Bytes(bytes) => conn.readable |= socket.arrive(bytes),
            Input::Finish => {
                if socket.finish() {
                    (conn.readable, conn.hang_up) = (true, HangUp::New);
                }
            }
            Input::Reset => {
                socket.reset();
                (conn.readable, conn.writable, conn.hang_up) = (true, true, HangUp::New);
            }
            Input::BreakPipe => socket.break_pipe(),
            Input::OutOfMemory => socket.run_out_of_memory(),
            Input::Room(bytes) => conn.writable |= socket.make_room(*bytes),
            Input::Spurious => (conn.readable, conn.writable) = (true, true),
            Input::Turn => self.run_turns()?,
            Input::Step => self.run_turn(&mut Budget {
                bytes: 1,
                frames: 1,
            })?,
            Input::Pass { millis } => {
                self.kernel.now = now.after(Duration::from_millis(u64::from(*millis)));
            }
            Input::ExpireDue => self.expire_due()?,
            Input::Expire => {
                let deadline = self.next_timer();
                if deadline.is_armed() {
                    self.kernel.now = now.max(deadline);
                    self.expire_due()?;
                }
            }
            Input::OnFrame(actions) => self.script.on_frame.clone_from(actions),
            Input::OnEnd(actions) => self.script.on_end.clone_from(actions),
            Input::Act(action) => {
                self.perform(*action, &[])?;
            }
            Input::Drain => {
                if !conn.machine.is_draining() {
                    conn.machine.drain(now.after(HANDSHAKE_GRACE));
                    conn.readable = true;
                }
            }
            Input::CutShort => {
                if conn.machine.is_draining() {
                    self.oracle.forced |= !conn.machine.cut_short(&mut self.pool);
                    self.run_turns()?;
                }
            }
        }
        self.now = self.kernel.now;
        self.note_state()
    }

    /// When the reactor's timer would fire.
    fn next_timer(&self) -> Time {
        let deadline = self.conn.machine.deadline();
        if self.conn.retry {
            deadline.min(self.kernel.now)
        } else {
            deadline
        }
    }

    /// Makes the handler do [`Conn::start_tls`](crate::Conn::start_tls), and nothing else, at the
    /// first frame with this payload.
    #[cfg(feature = "tls")]
    pub fn upgrade_at(&mut self, payload: &[u8], config: impl Into<TlsConfig>) {
        self.upgrade = Some((payload.to_vec(), config.into()));
    }

    /// Returns a copy without recorded calls and bytes. `None` over TLS, with a custom framer and
    /// with rates.
    #[must_use]
    pub fn fork(&self) -> Option<Self> {
        Some(Self {
            conn: self.fork_conn()?,
            kernel: ModelOs::at(self.kernel.now),
            pool: Pool::default(),
            plain: Vec::new(),
            now: self.now,
            limits: Rc::clone(&self.limits),
            again: self.again,
            fault: None,
            script: self.script.clone(),
            oracle: self.oracle.clone(),
            callbacks: Vec::new(),
            sent: Vec::new(),
            last_state: self.last_state,
            transitions: Vec::new(),
            upgrade: self.upgrade.clone(),
            client_tls: self.client_tls.clone(),
        })
    }

    fn fork_conn(&self) -> Option<Connection<Socket>> {
        let conn = &self.conn;
        let machine = conn.machine.fork()?;
        Some(Connection {
            stream: conn.stream.clone(),
            readable: conn.readable,
            writable: conn.writable,
            write_interest: conn.write_interest,
            hang_up: conn.hang_up,
            retry: conn.retry,
            ..Connection::new(ID, None, Addr::unspecified(), machine, Time::ZERO, 0)
        })
    }

    /// Returns a hash of all that the future of a plain connection with a built-in framing depends
    /// on. Of some millions of states two share one with a chance of one in a million.
    pub fn state_hash(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        self.conn
            .machine
            .fingerprint(self.kernel.now)
            .hash(&mut hasher);
        self.conn.stream.hash(&mut hasher);
        // Whether it is registered for writing, the socket tells.
        let Connection {
            readable,
            writable,
            hang_up,
            retry,
            ..
        } = &self.conn;
        (readable, writable, hang_up, retry).hash(&mut hasher);
        self.script.hash(&mut hasher);
        self.oracle.hash(&mut hasher);
        hasher.finish()
    }

    /// Returns the end, once there is one; not while the connection lingers for the peer's FIN.
    pub fn end(&self) -> Option<End> {
        self.oracle.end
    }

    /// Returns the state; after the end, the last one.
    pub fn state(&self) -> State {
        self.conn.machine.state()
    }

    /// Takes the handler's calls since the last call.
    pub fn take_callbacks(&mut self) -> Vec<Callback> {
        std::mem::take(&mut self.callbacks)
    }

    /// Takes the bytes that the peer received since the last call.
    pub fn take_sent(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.sent)
    }

    /// Returns the PROXY header, once it has arrived.
    pub fn proxy(&self) -> Option<&ProxyHeader> {
        self.conn.machine.proxy().map(Rc::as_ref)
    }

    /// Takes the changes of state since the last call.
    pub fn take_transitions(&mut self) -> Vec<(State, State)> {
        std::mem::take(&mut self.transitions)
    }

    /// Returns the number of received bytes that were not read.
    pub fn unread(&self) -> usize {
        self.conn
            .stream
            .as_ref()
            .map_or(0, |socket| socket.inbox.len())
    }

    /// True if the handler has paused it and no output is pending: it may stay so for ever.
    pub fn is_at_rest(&self) -> bool {
        self.oracle.paused && self.conn.machine.queued() == 0
    }

    /// True if a deadline is armed.
    pub fn has_deadline(&self) -> bool {
        self.next_timer().is_armed()
    }
}

impl fmt::Debug for ConnModel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConnModel")
            .field("now", &self.now)
            .field("state", &self.conn.machine.state())
            .field("socket", &self.conn.stream)
            .field("script", &self.script)
            .field("oracle", &self.oracle)
            .finish_non_exhaustive()
    }
}

fn same(one: &Framing, other: &Framing) -> bool {
    match (one, other) {
        (Framing::LengthField { offset: one, .. }, Framing::LengthField { offset: other, .. }) => {
            one == other
        }
        _ => std::mem::discriminant(one) == std::mem::discriminant(other),
    }
}
