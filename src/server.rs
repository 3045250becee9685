//! The server, which the user owns.

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{mpsc, Arc};
use std::thread;
use std::time::Duration;

use crate::config::{Config, Listen};
use crate::error::{Error, Result};
use crate::handle::Handle;
use crate::handler::{Control, ControlOps as _};
use crate::handler::{Handler, Peer, Service};
use crate::id::ListenerId;
use crate::listener_info::ListenerInfo;
use crate::logs;
use crate::proto::Time;
use crate::reactor::os_mio::SharedListenSockets;
use crate::reactor::os_mio::{descriptor_limit, MioOs};
use crate::reactor::shared_cap::SharedCap;
use crate::reactor::Reactor;
#[cfg(feature = "record")]
use crate::record::{Recording, RecordingOs};
use crate::stats::DrainReport;

/// Descriptors that the rest of a small program needs: standard streams, the poll, the waker,
/// listeners, logs.
const RESERVED_DESCRIPTORS: usize = 32;

#[cfg(not(feature = "record"))]
type ServerOs = MioOs;
#[cfg(feature = "record")]
type ServerOs = RecordingOs<MioOs>;

#[cfg(not(feature = "record"))]
fn unrecorded(os: MioOs) -> ServerOs {
    os
}

#[cfg(feature = "record")]
fn unrecorded(os: MioOs) -> ServerOs {
    RecordingOs::idle(os)
}

/// A TCP/TLS server on the thread that makes it: the type is not `Send`. [`Server::spawn`] runs a
/// server on a thread of its own.
///
/// `A` is your application's state. You own it and lend it for each iteration; it needs no trait
/// and no lifetime.
///
/// ```no_run
/// use portcullis::{Config, Context, Framing, Handler, Listen, Outcome, Server};
///
/// struct Echo;
/// impl Handler for Echo {
///     fn on_frame(&mut self, cx: &mut Context<'_>, frame: &[u8]) -> Outcome {
///         cx.conn.send(frame)?;
///         Ok(())
///     }
/// }
///
/// fn main() -> portcullis::Result<()> {
///     let mut server = Server::new(Config::max_connections(1024))?;
///     server.listen(Listen::tcp("127.0.0.1:2222", Framing::Packet2), |_app, _peer| Echo)?;
///     server.run(&mut ())
/// }
/// ```
///
/// Or inside your own loop, until it is stopped or drained:
///
/// ```
/// # use portcullis::{Config, Server, Turn};
/// # use std::time::Duration;
/// # fn main() -> portcullis::Result<()> {
/// # let mut app = ();
/// let mut server: Server = Server::new(Config::new())?;
/// # server.control().stop();
/// while server.poll_once(&mut app, Some(Duration::ZERO))? == Turn::Continue { // bounded work
///     // ... the rest of your frame
/// }
/// # Ok(()) }
/// ```
///
/// Dropping a server closes its ports and connections without calling any handler;
/// [`Control::drain`] ends it in order. Panics in the destructors of what it holds are caught and
/// logged.
pub struct Server<A = ()> {
    reactor: Reactor<A, ServerOs>,
}

impl<A> Server<A> {
    /// Makes a server without listeners. Warns in the log if the cap is more than the process's
    /// descriptors allow (on Linux).
    ///
    /// # Errors
    ///
    /// [`Error::Option`] for a value that cannot work, [`Error::Os`] if the kernel gives no poll.
    pub fn new(config: Config) -> Result<Self> {
        let os = MioOs::new().map_err(Error::os("making a poll"))?;
        Self::on(unrecorded(os), config)
    }

    /// Makes a server as [`Server::new`], and records what the system calls return to it. Feature
    /// `record`.
    ///
    /// The file is written on the server's thread, in blocks of 64 KiB, or once a second. If that
    /// fails, a warning is logged, the recording ends, and the server goes on.
    ///
    /// # Errors
    ///
    /// Those of [`Server::new`]; [`Error::Recording`] if the file exists or cannot be created.
    #[cfg(feature = "record")]
    pub fn recorded(config: Config, recording: Recording) -> Result<Self> {
        config.check()?;
        let os = MioOs::new().map_err(Error::os("making a poll"))?;
        Self::on(RecordingOs::new(os, recording)?, config)
    }

    fn on(os: ServerOs, config: Config) -> Result<Self> {
        let cap = config.max_connections;
        let reactor = Reactor::new(os, config)?;
        warn_of_descriptors(cap);
        Ok(Self { reactor })
    }

    /// One of several servers with one cap and the same listening sockets. Warns of nothing.
    pub(crate) fn sharing(config: Config, common: &Common, index: usize) -> Result<Self> {
        let mut os = MioOs::new().map_err(Error::os("making a poll"))?;
        os.share_listen_sockets(Arc::clone(&common.listen_sockets));
        let mut reactor = Reactor::new(unrecorded(os), config)?;
        reactor.share_cap(Arc::clone(&common.shared_cap), index);
        Ok(Self { reactor })
    }

    /// Opens a listener; `accept` makes a handler for each client.
    ///
    /// When this returns, clients can connect; they are served once the server runs. For a service
    /// that refuses peers or handles failed connections see [`Server::listen_with`].
    ///
    /// # Errors
    ///
    /// [`Error::AddressInUse`], [`Error::Listen`], [`Error::Address`], [`Error::NameTaken`],
    /// [`Error::Option`], [`Error::Draining`], [`Error::Os`]. The rest of the server is unchanged.
    pub fn listen<F, H>(&mut self, options: Listen, accept: F) -> Result<ListenerId>
    where
        F: FnMut(&mut A, Peer) -> H + 'static,
        H: Handler<A> + 'static,
    {
        self.listen_with(options, accept)
    }

    /// Opens a listener with a [`Service`]. Otherwise like [`Server::listen`].
    ///
    /// ```
    /// # use portcullis::{try_accept, Config, Context, Framing, Handler, Listen, Outcome, Refuse, Server};
    /// # struct Echo;
    /// # impl Handler<u32> for Echo {
    /// #     fn on_frame(&mut self, cx: &mut Context<'_, u32>, frame: &[u8]) -> Outcome {
    /// #         cx.conn.send(frame)?;
    /// #         Ok(())
    /// #     }
    /// # }
    /// # fn main() -> portcullis::Result<()> {
    /// let mut server = Server::new(Config::new())?;
    /// let first_ten = try_accept(|left: &mut u32, _peer| {
    ///     *left = left.checked_sub(1).ok_or(Refuse::silently())?;
    ///     Ok(Echo)
    /// });
    /// server.listen_with(Listen::tcp("127.0.0.1:0", Framing::Line), first_ten)?;
    /// # server.control().stop();
    /// server.run(&mut 10)
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// Those of [`Server::listen`].
    pub fn listen_with(
        &mut self,
        options: Listen,
        service: impl Service<A> + 'static,
    ) -> Result<ListenerId> {
        self.reactor.listen(options, Box::new(service))
    }

    /// Serves until a drain is over or [`Control::stop`] is called.
    ///
    /// # Errors
    ///
    /// [`Error::Os`] if the poll fails, which no peer can cause.
    pub fn run(&mut self, app: &mut A) -> Result<()> {
        if self.reactor.take_stopped() || self.reactor.ops().drain_report().is_some() {
            return Ok(());
        }
        let mut now = self.reactor.now();
        loop {
            let (turn, ended) = self.iterate(app, now, None)?;
            if turn != Turn::Continue {
                return Ok(());
            }
            // The next iteration begins when this one ends: one clock reading for both.
            now = ended;
        }
    }

    /// Runs a server on a thread of its own. `build` makes it there, with its listeners and the
    /// application's state, which need not be `Send`. An error of `build` (also your own, with
    /// [`Error::other`]) is returned here, before anything runs. At the end the server is dropped
    /// before the state.
    ///
    /// ```
    /// # use portcullis::{Config, Context, Framing, Handler, Listen, Outcome, Server};
    /// # struct Echo;
    /// # impl Handler for Echo {
    /// #     fn on_frame(&mut self, cx: &mut Context<'_>, frame: &[u8]) -> Outcome {
    /// #         cx.conn.send(frame)?;
    /// #         Ok(())
    /// #     }
    /// # }
    /// # fn main() -> portcullis::Result<()> {
    /// let spawned = Server::spawn(|| {
    ///     let mut server = Server::new(Config::new())?;
    ///     server.listen(Listen::tcp("127.0.0.1:0", Framing::Line), |_app, _peer| Echo)?;
    ///     Ok((server, ()))
    /// })?;
    /// println!("listening on {}", spawned.listeners[0].addr);
    /// spawned.handle.drain(std::time::Duration::from_secs(5))?;
    /// let report = spawned.join()?.expect("it was drained");
    /// assert_eq!(report.forced, 0);
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// Those of `build`; [`Error::Os`] if the system starts no thread.
    ///
    /// # Panics
    ///
    /// If `build` does, with the same panic.
    pub fn spawn<F>(build: F) -> Result<Spawned<A>>
    where
        F: FnOnce() -> Result<(Self, A)> + Send + 'static,
        A: 'static,
    {
        let (tell, told) = mpsc::sync_channel(1);
        let run = move || {
            // Dropped in reverse: clients, and callers of handles, do not wait for the state's
            // destructor.
            let (mut app, mut server) = match build() {
                Ok((server, app)) => (app, server),
                Err(error) => {
                    // The spawning thread waits for this.
                    let _ = tell.send(Err(error));
                    return Ok(None);
                }
            };
            let _ = tell.send(Ok((server.handle(), server.control().listeners())));
            server.run(&mut app)?;
            Ok(server.control().drain_report())
        };
        let thread = thread::Builder::new()
            .name("portcullis".to_owned())
            .spawn(run)
            .map_err(Error::os("starting a thread"))?;
        match told.recv() {
            Ok(Ok((handle, listeners))) => Ok(Spawned {
                handle,
                listeners,
                threads: vec![thread],
            }),
            Ok(Err(error)) => Err(error),
            // Nothing was sent: `build` has panicked.
            Err(_) => match thread.join() {
                Err(panic) => std::panic::resume_unwind(panic),
                Ok(outcome) => Err(outcome.err().unwrap_or(Error::Draining)),
            },
        }
    }

    /// Runs one iteration: waits for events up to `timeout` (`None`: until there is work), then
    /// does a bounded amount of work. The remainder is done in the next iteration, and
    /// [`Server::next_timeout`] is zero until then.
    ///
    /// Frames sent from outside a callback, through [`Server::control`], are written in the next
    /// iteration at the latest: send before you poll.
    ///
    /// # Errors
    ///
    /// [`Error::Os`] if the poll fails, which no peer can cause.
    pub fn poll_once(&mut self, app: &mut A, timeout: Option<Duration>) -> Result<Turn> {
        let now = self.reactor.now();
        self.iterate(app, now, timeout).map(|(turn, _)| turn)
    }

    /// Runs one iteration that begins at `now`. Returns when it ended.
    fn iterate(
        &mut self,
        app: &mut A,
        now: Time,
        timeout: Option<Duration>,
    ) -> Result<(Turn, Time)> {
        let over = self.reactor.ops().drain_report().is_some();
        // Once a drain is over there is no event to wait for.
        let timeout = if over { Some(Duration::ZERO) } else { timeout };
        let ended = self.reactor.iterate(app, now, timeout)?;
        let turn = if self.reactor.take_stopped() {
            Turn::Stopped
        } else if self.reactor.ops().drain_report().is_some() {
            Turn::Drained
        } else {
            Turn::Continue
        };
        Ok((turn, ended))
    }

    /// Returns the time until the next iteration is due while the descriptor ([`AsFd`]) is not
    /// readable; `None` is never.
    ///
    /// Call this after each iteration. A program that nests the server in its own poll waits on the
    /// descriptor for at most this time. Then it calls [`Server::poll_once`] with a timeout of
    /// zero.
    pub fn next_timeout(&self) -> Option<Duration> {
        self.reactor.next_timeout()
    }

    /// Returns a handle, for other threads.
    pub fn handle(&self) -> Handle<A> {
        self.reactor.handle()
    }

    /// Returns the controls: queries and changes between two iterations.
    pub fn control(&mut self) -> Control<'_, A> {
        Control::new(self.reactor.ops_mut())
    }
}

/// Warns in the log if the cap is more than the process's descriptors allow.
pub(crate) fn warn_of_descriptors(cap: usize) {
    if let Some(limit) =
        descriptor_limit().filter(|limit| cap.saturating_add(RESERVED_DESCRIPTORS) > *limit)
    {
        logs::warning!(
            target: logs::SERVER,
            "max_connections is {cap}, but this process may open only {limit} descriptors: raise the \
             limit (ulimit -n, LimitNOFILE=) to {} or lower max_connections",
            cap.saturating_add(RESERVED_DESCRIPTORS)
        );
    }
}

/// The cap and the listening sockets that servers share.
pub(crate) struct Common {
    pub(crate) shared_cap: Arc<SharedCap>,
    pub(crate) listen_sockets: Arc<SharedListenSockets>,
}

/// A running server on a thread of its own ([`Server::spawn`]), or running shards
/// ([`Shards::spawn`](crate::Shards::spawn)).
#[must_use]
#[non_exhaustive]
pub struct Spawned<A = ()> {
    /// Reaches the server, or all shards.
    pub handle: Handle<A>,
    /// The listeners at the start, with their real ports. Of several shards, listeners of one name
    /// are one.
    pub listeners: Vec<ListenerInfo>,
    pub(crate) threads: Vec<Thread>,
}

/// The thread of one server.
pub(crate) type Thread = thread::JoinHandle<Result<Option<DrainReport>>>;

impl<A> Spawned<A> {
    /// Waits until every server has ended: drained, or stopped through a handle. Returns the
    /// report of the drain, of all together, if all of them were drained.
    ///
    /// # Errors
    ///
    /// The first error of [`Server::run`]. A shard that fails leaves its clients to the others,
    /// which go on.
    ///
    /// # Panics
    ///
    /// If a server's thread did, once all threads have ended. A handler's panic is not the cause,
    /// because it is caught.
    pub fn join(self) -> Result<Option<DrainReport>> {
        let mut outcome: Result<Option<DrainReport>> = Ok(None);
        let mut panicked = None;
        let mut undrained = false;
        for thread in self.threads {
            match thread.join() {
                Err(panic) => panicked = panicked.or(Some(panic)),
                Ok(Err(error)) => outcome = outcome.and(Err(error)),
                Ok(Ok(None)) => undrained = true,
                Ok(Ok(Some(report))) => {
                    if let Ok(so_far) = &mut outcome {
                        *so_far = Some(so_far.map_or(report, |so_far| so_far.and(report)));
                    }
                }
            }
        }
        if let Some(panic) = panicked {
            std::panic::resume_unwind(panic);
        }
        outcome.map(|report| report.filter(|_| !undrained))
    }

    /// Returns whether every thread has ended.
    pub fn is_finished(&self) -> bool {
        self.threads.iter().all(thread::JoinHandle::is_finished)
    }
}

impl<A> fmt::Debug for Spawned<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Spawned")
            .field("listeners", &self.listeners)
            .finish_non_exhaustive()
    }
}

/// Result of [`Server::poll_once`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Turn {
    /// The server goes on.
    Continue,
    /// [`Control::stop`] or [`Handle::stop`] was called. Reported once: nothing is closed, and the
    /// server can go on.
    Stopped,
    /// A drain is over: there are no connections and no listeners.
    Drained,
}

/// The poll's descriptor: readable when there are events. For nesting in another loop, with
/// [`Server::next_timeout`].
impl<A> AsFd for Server<A> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.reactor.os().as_fd()
    }
}

impl<A> fmt::Debug for Server<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ops = self.reactor.ops();
        f.debug_struct("Server")
            .field("listeners", &ops.listeners())
            .field("stats", &ops.stats())
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catch::tests::PanicOnDrop;

    /// The server was dropped before: its panics are caught, and those of the state are not.
    #[test]
    fn a_panic_of_the_states_destructor_is_that_of_join() {
        let spawned = Server::spawn(|| Ok((Server::new(Config::new())?, PanicOnDrop)));
        let spawned = spawned.expect("it starts");
        assert!(format!("{spawned:?}").contains("listeners: []"));
        spawned.handle.stop().expect("it runs");
        let joined = crate::catch::catch(|| spawned.join().map(drop));
        let panic = joined.expect_err("the thread panicked");
        assert_eq!(panic.to_string(), "in a destructor");
    }

    #[test]
    fn a_server_is_shown_with_its_listeners_and_counters() {
        let server: Server = Server::new(Config::max_connections(7)).expect("a poll");
        let shown = format!("{server:?}");
        assert!(
            shown.starts_with("Server { listeners: [], stats: "),
            "{shown}"
        );
        assert!(shown.contains("max_connections: 7"), "{shown}");
    }
}
