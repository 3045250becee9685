//! The real server on a simulated kernel, reproducible from one seed. Feature `sim`.
//!
//! [`Sim`] runs the same reactor and the same connection machine as [`Server`](crate::Server), on a
//! kernel in memory with a clock that you move. Use it to test your own
//! [`Handler`]: connect clients, send bytes, read the replies, let time pass,
//! inject [`Faults`]. After every iteration the server's own invariants are checked.
//!
//! A login protocol with a timeout, tested for a peer that stalls, in virtual time:
//!
//! ```
//! use std::time::Duration;
//! use portcullis::sim::{ClientState, Sim};
//! use portcullis::{Close, Config, Context, Framing, Handler, Listen, Outcome};
//!
//! #[derive(Default)]
//! struct Login { user: Option<String> }
//!
//! impl Handler for Login {
//!     fn on_open(&mut self, cx: &mut Context<'_>) -> Outcome {
//!         cx.conn.set_timer(0, Duration::from_secs(5));
//!         cx.conn.send(b"login: ")?;
//!         Ok(())
//!     }
//!     fn on_frame(&mut self, cx: &mut Context<'_>, line: &[u8]) -> Outcome {
//!         cx.conn.cancel_timer(0);
//!         let user = std::str::from_utf8(line)?.trim().to_owned();
//!         cx.conn.send(format!("hello {user}\n").as_bytes())?;
//!         self.user = Some(user);
//!         Ok(())
//!     }
//!     fn on_timer(&mut self, cx: &mut Context<'_>, _: u8) -> Outcome {
//!         cx.conn.send(b"too slow\n")?;
//!         Err(Close::new())
//!     }
//! }
//!
//! let mut sim = Sim::new(1, Config::new(), ());
//! let listen = Listen::tcp("127.0.0.1:0", Framing::Line);
//! let addr = sim.listen(listen, |_app, _peer| Login::default()).unwrap();
//!
//! let quick = sim.connect(addr).unwrap();
//! let stalls = sim.connect(addr).unwrap();
//! sim.send(quick, b"ada\n");
//! sim.send(stalls, b"bo"); // and no more
//! sim.advance(Duration::from_secs(4));
//! assert_eq!(sim.received(quick), b"login: hello ada\n");
//! assert_eq!(sim.received(stalls), b"login: ");
//!
//! sim.advance(Duration::from_secs(2));
//! assert_eq!(sim.received(stalls), b"too slow\n");
//! assert_eq!(sim.state(stalls), ClientState::Finished);
//! assert_eq!(sim.state(quick), ClientState::Connected);
//! ```

mod addrs;
mod answer;
mod bytes;
mod clients;
mod conn_model;
mod coverage;
mod descriptors;
mod faults;
mod input;
mod kernel;
mod os;
mod poll;
mod print;
mod random;
mod relay;
mod remotes;
#[cfg(feature = "record")]
mod replay;
mod script;
mod socket;
mod sockets;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::sync::atomic::Ordering;
use std::sync::Arc;
use std::time::Duration;

pub use answer::Answer;
pub use clients::{ClientId, ClientState};
pub use conn_model::ConnModel;
pub use coverage::{Coverage, Stage};
use coverage::{Notes, Recorder};
pub use faults::{Call, Fault, Faults, Scripted};
pub use input::{Action, Callback, End, Input};
use kernel::Kernel;
use os::SimOs;
pub use random::Random;
#[cfg(feature = "record")]
pub use replay::{Divergence, Ending, Replay, Tape};
pub use script::{shrink, Op, Script};
use socket::Dial;

use crate::config::Config;
use crate::config::Listen;
use crate::error::Result;
use crate::handle::Handle;
use crate::handler::{Control, ControlOps as _};
use crate::handler::{Handler, Peer, Service};
use crate::proto::Time;
#[cfg(test)]
use crate::reactor::shared_cap::SharedCap;
use crate::reactor::Reactor;
#[cfg(feature = "record")]
use crate::record::{Recording, RecordingOs};
use crate::stats::{DrainReport, Stats};

#[cfg(not(feature = "record"))]
type WorldOs = SimOs;
#[cfg(feature = "record")]
type WorldOs = RecordingOs<SimOs>;

#[cfg(not(feature = "record"))]
fn unrecorded(os: SimOs) -> WorldOs {
    os
}

#[cfg(feature = "record")]
fn unrecorded(os: SimOs) -> WorldOs {
    RecordingOs::idle(os)
}

/// Iterations without an event and without time passing, after which the loop counts as spinning.
const SPIN: usize = 10_000;

/// An invariant of the server that did not hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation(String);

impl Violation {
    /// Makes a violation of your own, for [`Sim::try_play`].
    pub fn new(words: impl Into<String>) -> Self {
        Self(words.into())
    }
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Violation {}

/// A server in a simulated world.
///
/// Nothing runs until [`Sim::settle`] (no time passes), [`Sim::advance`] (time passes) or
/// [`Sim::step`] (one iteration). Clients send and receive bytes as on the wire, with headers:
/// nothing is framed for you.
///
/// Adopted sockets are simulated too ([`Sim::adopted`]). Two things are real. The stream of a
/// detached connection is one end of a socket pair, which gets the client's bytes and passes on its
/// own while the server runs. Calls that wait in it wait in real time. A descriptor that
/// [`Control::watch`] watches is ready when the system says so: make it ready on the test's thread,
/// and the same seed stays the same world.
///
/// A panic in a handler is caught here as it is in a server: its connection ends as
/// [`Panicked`](crate::CloseReason::Panicked) and the test goes on. A test that wants no panics
/// asserts that `sim.stats().panics` is 0.
///
/// Calls that run the server panic with the seed in the message if an invariant is broken. Those
/// named `try_...` return a [`Violation`] instead.
pub struct Sim<A = ()> {
    seed: u64,
    kernel: Rc<RefCell<Kernel>>,
    reactor: Reactor<A, WorldOs>,
    app: A,
    recorder: Option<Recorder>,
    checks: bool,
}

impl<A> Sim<A> {
    /// Makes a server without listeners, in a world without faults.
    ///
    /// # Panics
    ///
    /// If the configuration is one that [`Server::new`](crate::Server::new) would refuse.
    #[track_caller]
    pub fn new(seed: u64, config: Config, app: A) -> Self {
        match Self::try_new(seed, config, app) {
            Ok(sim) => sim,
            Err(error) => panic!("{error}"),
        }
    }

    /// Makes a server as [`Sim::new`], without the panic.
    ///
    /// # Errors
    ///
    /// The errors of [`Server::new`](crate::Server::new).
    pub fn try_new(seed: u64, config: Config, app: A) -> Result<Self> {
        Self::on(seed, config, app, |os| Ok(unrecorded(os)))
    }

    /// Makes a server as [`Sim::try_new`], and records the world as
    /// [`Server::recorded`](crate::Server::recorded) does.
    ///
    /// # Errors
    ///
    /// Those of [`Server::recorded`](crate::Server::recorded).
    #[cfg(feature = "record")]
    pub fn recorded(seed: u64, config: Config, app: A, recording: Recording) -> Result<Self> {
        config.check()?;
        Self::on(seed, config, app, |os| {
            RecordingOs::simulated(os, recording)
        })
    }

    fn on(
        seed: u64,
        config: Config,
        app: A,
        os: impl FnOnce(SimOs) -> Result<WorldOs>,
    ) -> Result<Self> {
        let kernel = Rc::new(RefCell::new(Kernel::new(seed)));
        let reactor = Reactor::new(os(SimOs(Rc::clone(&kernel)))?, config)?;
        Ok(Self {
            seed,
            kernel,
            reactor,
            app,
            recorder: None,
            checks: true,
        })
    }

    /// Opens a listener, and returns the address to connect to.
    ///
    /// # Errors
    ///
    /// The errors of [`Server::listen`](crate::Server::listen).
    pub fn listen<F, H>(&mut self, options: Listen, accept: F) -> Result<SocketAddr>
    where
        F: FnMut(&mut A, Peer) -> H + 'static,
        H: Handler<A> + 'static,
    {
        self.listen_with(options, accept)
    }

    /// Opens a listener as [`Sim::listen`], with a service.
    ///
    /// # Errors
    ///
    /// Those of [`Server::listen`](crate::Server::listen).
    pub fn listen_with(
        &mut self,
        options: Listen,
        service: impl Service<A> + 'static,
    ) -> Result<SocketAddr> {
        let id = self.reactor.listen(options, Box::new(service))?;
        let addr = self.reactor.ops().listener(&id.into())?.addr;
        // The simulated kernel has no other kind.
        Ok(addr
            .as_tcp()
            .unwrap_or_else(|| SocketAddr::from(([0, 0, 0, 0], 0))))
    }

    /// As [`Reactor::share_cap`].
    #[cfg(test)]
    pub(crate) fn share_cap(&mut self, cap: Arc<SharedCap>, index: usize) {
        self.reactor.share_cap(cap, index);
    }

    /// Runs the server as a thread of a model, like `Server::run`. No time passes: the poll sleeps
    /// until another thread wakes it. Ends after a stop or drain, or once `is_over`.
    #[cfg(all(test, loom))]
    pub(crate) fn run_in_model(&mut self, is_over: impl Fn(&Self) -> bool) {
        let bell = Arc::clone(&self.kernel.borrow().bell);
        while !self.reactor.take_stopped() && self.drain_report().is_none() && !is_over(self) {
            let sleeps = self.next_timeout() != Some(Duration::ZERO);
            if sleeps && !self.kernel.borrow_mut().has_news() {
                bell.wait();
            }
            self.step();
        }
    }

    #[cfg(test)]
    pub(crate) fn listener_visits(&self) -> usize {
        self.reactor.core().listener_visits()
    }

    // --- clients ---

    /// Connects a client. `None` without a listener at this address, or if its backlog is full.
    pub fn connect(&mut self, addr: SocketAddr) -> Option<ClientId> {
        self.kernel.borrow_mut().connect(addr, None)
    }

    /// Connects a client from this host: for access rules, trusted proxies and limits on sources.
    /// The port is the simulator's choice ([`Sim::client_addr`]).
    pub fn connect_from(&mut self, addr: SocketAddr, host: IpAddr) -> Option<ClientId> {
        self.kernel.borrow_mut().connect(addr, Some(host))
    }

    /// Sends bytes as a client; without effect after [`Sim::finish`] or [`Sim::reset`]. The bytes
    /// arrive as the receive buffer has room.
    pub fn send(&mut self, client: ClientId, bytes: &[u8]) {
        self.kernel.borrow_mut().client_send(client, bytes);
    }

    /// Finishes sending as a client (FIN, behind its data).
    pub fn finish(&mut self, client: ClientId) {
        self.kernel.borrow_mut().client_finish(client);
    }

    /// Resets a client's connection.
    pub fn reset(&mut self, client: ClientId) {
        self.kernel.borrow_mut().client_reset(client);
    }

    /// Sets whether a client reads the server's output, as at first. Otherwise the server's send
    /// buffer fills up.
    pub fn set_reading(&mut self, client: ClientId, reads: bool) {
        if let Some(socket) = self.kernel.borrow_mut().sockets.get_mut(client.0) {
            socket.reads = reads;
        }
    }

    /// Reads up to `bytes` as a client that does not read by itself ([`Sim::set_reading`]).
    pub fn read(&mut self, client: ClientId, bytes: usize) {
        if let Some(socket) = self.kernel.borrow_mut().sockets.get_mut(client.0) {
            socket.take(bytes);
        }
    }

    /// Sets the size of the server's send buffer for a client, in bytes. Defaults to 64 KiB.
    pub fn set_send_buffer(&mut self, client: ClientId, bytes: usize) {
        if let Some(socket) = self.kernel.borrow_mut().sockets.get_mut(client.0) {
            socket.resize(bytes);
        }
    }

    /// Returns the bytes that a client has read since the last call.
    pub fn received(&mut self, client: ClientId) -> Vec<u8> {
        let mut kernel = self.kernel.borrow_mut();
        let socket = kernel.sockets.get_mut(client.0);
        socket
            .map(|socket| std::mem::take(&mut socket.inbox))
            .unwrap_or_default()
    }

    /// Returns a client's address, which is its connection's peer address; `None` for the peer of a
    /// Unix socket.
    pub fn client_addr(&self, client: ClientId) -> Option<SocketAddr> {
        let peer = self.kernel.borrow().sockets.get(client.0)?.peer;
        Some(peer).filter(|peer| peer.port() > 0)
    }

    /// Returns the state of a connection, as its client sees it.
    pub fn state(&self, client: ClientId) -> ClientState {
        self.kernel.borrow().client_state(client)
    }

    // --- the world ---

    /// Sets the faults from now on.
    pub fn set_faults(&mut self, faults: Faults) {
        self.kernel.borrow_mut().faults = faults;
    }

    /// Adds one failure by script to the faults.
    pub fn add_fault(&mut self, scripted: Scripted) {
        self.kernel.borrow_mut().faults.script.push_back(scripted);
    }

    /// Reports readiness as kqueue does on macOS and the BSDs (`kqueue(2)`), and not as epoll on
    /// Linux.
    ///
    /// Input and room for output have events of their own, in any order and perhaps in different
    /// polls. The end of the input comes with the data in front of it, and with the error if there
    /// is one. No other event tells of a peer that has gone. If a connection is registered for
    /// writing, each acknowledgement of output causes an event, and so does the server's own
    /// shutdown. It is no error to register a listener twice.
    pub fn use_kqueue(&mut self) {
        self.kernel.borrow_mut().sockets.use_kqueue();
    }

    /// Returns the number of descriptors that the server has open.
    pub fn descriptors(&self) -> usize {
        self.kernel.borrow().fds
    }

    /// Sets the number of descriptors that the process may have open, listeners included, as
    /// RLIMIT_NOFILE. `usize::MAX`, the initial value, is no limit. Out of descriptors, the server
    /// waits for [`Config::emfile_backoff`](crate::Config::emfile_backoff), or until one is free.
    pub fn set_descriptor_limit(&mut self, descriptors: usize) {
        self.kernel.borrow_mut().fd_limit = descriptors;
    }

    /// Sets the size from which a frame is written by itself, without a copy. Defaults to 32 KiB,
    /// as over sockets.
    pub fn set_large_frame(&mut self, bytes: usize) {
        self.kernel.borrow_mut().large_frame = bytes;
    }

    /// Returns the time since the world began.
    pub fn now(&self) -> Duration {
        self.kernel.borrow_mut().clock().since(Time::ZERO)
    }

    /// Moves the clock ahead while nothing runs, as when the process is stopped (SIGSTOP, a
    /// debugger). All deadlines passed meanwhile expire at once.
    pub fn leap(&mut self, span: Duration) {
        let mut kernel = self.kernel.borrow_mut();
        kernel.now = kernel.clock().after(span);
    }

    /// Moves the clock as [`Sim::leap`], at the moment when the next poll returns. That poll does
    /// not report events of the meantime.
    pub fn leap_after_poll(&mut self, span: Duration) {
        self.kernel.borrow_mut().leap_after_poll = span;
    }

    /// Returns a function that lets time pass inside a callback, a service or a job, as work that
    /// blocks does. Nothing else runs meanwhile.
    ///
    /// ```
    /// use std::time::Duration;
    /// use portcullis::sim::Sim;
    /// use portcullis::Config;
    ///
    /// let mut sim = Sim::new(1, Config::new(), ());
    /// let work = sim.work();
    /// let _ = sim.handle().post(move |_, _| work(Duration::from_secs(1)));
    /// sim.settle();
    /// assert_eq!(sim.now(), Duration::from_secs(1));
    /// ```
    pub fn work(&self) -> impl Fn(Duration) + Clone + Send + 'static + use<A> {
        let worked = Arc::clone(&self.kernel.borrow().worked);
        move |span| {
            let nanos = u64::try_from(span.as_nanos()).unwrap_or(u64::MAX);
            worked.fetch_add(nanos, Ordering::SeqCst);
        }
    }

    /// Runs one iteration of the loop. It sleeps for at most the remainder of [`Sim::advance`];
    /// alone, it does not sleep.
    ///
    /// # Panics
    ///
    /// Where [`Sim::try_step`] returns an error.
    #[track_caller]
    pub fn step(&mut self) {
        if let Err(violation) = self.try_step() {
            panic!("{violation} (seed {})", self.seed);
        }
    }

    /// Runs one iteration as [`Sim::step`], without the panic.
    ///
    /// # Errors
    ///
    /// The first invariant that is broken after the iteration.
    pub fn try_step(&mut self) -> std::result::Result<(), Violation> {
        let now = self.reactor.now();
        self.reactor
            .iterate(&mut self.app, now, None)
            .map_err(|error| Violation(error.to_string()))?;
        if !self.checks {
            return Ok(());
        }
        if let Some(fault) = self.reactor.broken_invariant() {
            return Err(Violation(fault));
        }
        let (held, open) = (self.reactor.core().descriptors(), self.kernel.borrow().fds);
        if held != open {
            return Err(Violation(format!(
                "{held} descriptors are held, {open} are open"
            )));
        }
        self.record()
            .map_or(Ok(()), |illegal| Err(Violation(illegal)))
    }

    /// Follows the connections through this iteration, if coverage is kept. Returns a change that
    /// is not permitted.
    fn record(&mut self) -> Option<String> {
        let recorder = self.recorder.as_mut()?;
        let mut kernel = self.kernel.borrow_mut();
        let stages = self.reactor.core().sockets();
        let stages: BTreeMap<usize, Stage> = stages
            .map(|(stream, state)| (stream.index, Stage::of(state)))
            .collect();
        let notes = kernel.notes.replace(Notes::default()).unwrap_or_default();
        recorder.record(notes, stages)
    }

    /// Returns the time for which the server would sleep now: zero while work is left. As
    /// [`Server::next_timeout`](crate::Server::next_timeout).
    pub fn next_timeout(&self) -> Option<Duration> {
        self.reactor.next_timeout()
    }

    /// Runs iterations until no work is left, without time passing.
    ///
    /// # Panics
    ///
    /// As [`Sim::advance`].
    #[track_caller]
    pub fn settle(&mut self) {
        self.advance(Duration::ZERO);
    }

    /// Runs iterations until `span` has passed and no work is left. An idle day takes milliseconds.
    ///
    /// # Panics
    ///
    /// Where [`Sim::try_advance`] returns an error.
    #[track_caller]
    pub fn advance(&mut self, span: Duration) {
        if let Err(violation) = self.try_advance(span) {
            panic!("{violation} (seed {})", self.seed);
        }
    }

    /// Runs iterations as [`Sim::advance`], without the panic.
    ///
    /// # Errors
    ///
    /// The first invariant that is broken after an iteration. Also a loop that spins, and a missed
    /// event for which a connection still waits at the end.
    pub fn try_advance(&mut self, span: Duration) -> std::result::Result<(), Violation> {
        let until = self.kernel.borrow_mut().clock().after(span);
        self.kernel.borrow_mut().horizon = until;
        let (mut idle, mut done) = (0, None);
        loop {
            let before = self.kernel.borrow().now;
            self.try_step()?;
            let (now, was_idle) = {
                let kernel = self.kernel.borrow();
                (kernel.now, kernel.was_idle)
            };
            let rests = was_idle && self.reactor.next_timeout() != Some(Duration::ZERO);
            // The iteration itself may have caused an event: an accept, a write.
            if rests && now >= until && !self.kernel.borrow_mut().has_news() {
                break;
            }
            idle = if was_idle && now == before {
                idle + 1
            } else {
                0
            };
            if idle > SPIN {
                // Buffered frames have no event, and are work.
                let stats = self.reactor.ops().stats();
                if done.replace(stats.traffic.frames_in) == Some(stats.traffic.frames_in) {
                    return Err(Violation(format!("the loop spins at {now:?}")));
                }
                idle = 0;
            }
        }
        let missed = if self.checks {
            self.missed_event()
        } else {
            None
        };
        missed.map_or(Ok(()), |missed| Err(Violation(missed)))
    }

    /// Checks the world at rest: nothing waits for an event that the kernel has reported already.
    fn missed_event(&self) -> Option<String> {
        let kernel = self.kernel.borrow();
        for (id, stream, for_input, for_room) in self.reactor.core().waiting() {
            let Some(socket) = kernel.sockets.get(stream.index) else {
                continue;
            };
            if socket.has_edge() {
                continue;
            }
            if self.reactor.core().is_connecting(id)
                && (socket.error.is_some() || socket.dial == Dial::Done)
            {
                return Some(format!("connection {id} waits for an attempt that is over"));
            }
            if for_input && socket.has_input() {
                return Some(format!("connection {id} waits for input that is there"));
            }
            if for_room && socket.room() > 0 && socket.room() >= socket.send_buffer / 2 {
                return Some(format!("connection {id} waits for room that is there"));
            }
        }
        for listener in self.reactor.core().listening() {
            if kernel.has_missed_clients(listener.index) {
                return Some("a listener waits for clients that are there".to_owned());
            }
        }
        None
    }

    // --- the server ---

    /// Returns the server's queries and changes between two iterations.
    pub fn control(&mut self) -> Control<'_, A> {
        Control::new(self.reactor.ops_mut())
    }

    /// Returns a handle. On this thread its calls that wait fail as
    /// [`HandleError::OwnThread`](crate::HandleError::OwnThread), because nothing runs meanwhile.
    pub fn handle(&self) -> Handle<A> {
        self.reactor.handle()
    }

    /// Returns the counters.
    pub fn stats(&self) -> Stats {
        self.reactor.ops().stats()
    }

    /// Returns the result of a drain, once it is over.
    pub fn drain_report(&self) -> Option<DrainReport> {
        self.reactor.ops().drain_report()
    }

    /// Returns the application's state.
    pub fn app(&self) -> &A {
        &self.app
    }

    /// Returns the application's state, to change it.
    pub fn app_mut(&mut self) -> &mut A {
        &mut self.app
    }

    /// Returns the seed of this world.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// Sets whether the invariants are checked after each iteration. Defaults to true; switch it
    /// off to measure the speed of a world with a million connections. Coverage is not recorded
    /// then.
    pub fn set_checks(&mut self, on: bool) {
        self.checks = on;
    }

    // --- what happened ---

    /// Returns the number of events that the kernel has reported so far.
    pub fn events(&self) -> u64 {
        self.kernel.borrow().delivered
    }

    /// Returns a hash over all events: the same for the same seed and the same calls.
    pub fn trace_hash(&self) -> u64 {
        self.kernel.borrow().trace.hash()
    }

    /// Keeps a readable trace from now on.
    pub fn keep_trace(&mut self) {
        self.kernel.borrow_mut().trace.text = Some(Vec::new());
    }

    /// Returns the trace since the last call, with a line per relevant call. Empty without
    /// [`Sim::keep_trace`].
    pub fn take_trace(&mut self) -> Vec<String> {
        let mut kernel = self.kernel.borrow_mut();
        kernel
            .trace
            .text
            .as_mut()
            .map(std::mem::take)
            .unwrap_or_default()
    }

    /// Returns the number of times that the server has made a call.
    pub fn calls(&self, call: Call) -> u64 {
        self.kernel.borrow().calls(call)
    }

    /// Records from now on which faults hit connections at which stage, and checks each change of
    /// stage.
    pub fn keep_coverage(&mut self) {
        self.recorder = Some(Recorder::default());
        self.kernel.borrow_mut().notes = Some(Notes::default());
    }

    /// Returns the records since the last call. Empty without [`Sim::keep_coverage`].
    pub fn take_coverage(&mut self) -> Coverage {
        let recorder = self.recorder.as_mut();
        recorder
            .map(|recorder| std::mem::take(&mut recorder.coverage))
            .unwrap_or_default()
    }
}

impl<A: fmt::Debug> fmt::Debug for Sim<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sim")
            .field("seed", &self.seed)
            .field("now", &self.now())
            .field("stats", &self.stats())
            .field("app", &self.app)
            .finish()
    }
}
