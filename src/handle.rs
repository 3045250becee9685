//! The one thing that crosses threads.

use std::collections::VecDeque;
use std::error::Error as StdError;
use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::mpsc;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{self, ThreadId};
use std::time::Duration;

use crate::config::Listen;
use crate::config::{Config, QueueLimits, MAX_CONNECTIONS};
use crate::control::{Control, ListenerInfo};
use crate::error::Error;
use crate::handler::Message;
use crate::id::{ConnId, ListenerRef};
use crate::logs;
use crate::metrics::Metrics;
use crate::recent::RecentClose;
use crate::stats::Stats;
use crate::tree::Tree;

/// Wakes the loop out of its poll, from any thread.
pub(crate) trait Wake: Send + Sync {
    fn wake(&self) -> io::Result<()>;
}

type Job<A> = Box<dyn FnOnce(&mut A, &mut Control<'_, A>) + Send>;

pub(crate) enum Command<A> {
    Send(ConnId, Vec<u8>),
    Notify(ConnId, Message),
    Kill(ConnId),
    Post(Job<A>),
    Drain(Duration),
    Stop,
}

impl<A> Command<A> {
    fn bytes(&self) -> usize {
        match self {
            Self::Send(_, frame) => frame.len(),
            _ => 0,
        }
    }
}

/// What the loop and all its handles share.
pub(crate) struct Shared<A> {
    queue: Mutex<Queue<A>>,
    /// A wake-up is on its way, so that a flood of commands costs one.
    pending: AtomicBool,
    wake: Box<dyn Wake>,
    published: Arc<Published>,
    /// The loop's thread for good: a server cannot be sent to another.
    looping: ThreadId,
}

/// What a server publishes to its handles, whatever its application's type.
pub(crate) struct Published {
    stats: Mutex<Stats>,
    live: Arc<Liveness>,
    queue_limit: AtomicUsize,
    queue_bytes: AtomicUsize,
}

impl Published {
    pub(crate) fn new(limits: QueueLimits) -> Self {
        Self {
            stats: Mutex::default(),
            live: Arc::default(),
            queue_limit: AtomicUsize::new(limits.commands),
            queue_bytes: AtomicUsize::new(limits.bytes),
        }
    }

    pub(crate) fn live(&self) -> &Arc<Liveness> {
        &self.live
    }

    pub(crate) fn update(&self, update: impl FnOnce(&mut Stats)) {
        update(&mut lock(&self.stats));
    }

    /// Changes the limits for commands that are queued from now on.
    pub(crate) fn set_limits(&self, limits: QueueLimits) {
        self.queue_limit.store(limits.commands, Ordering::Relaxed);
        self.queue_bytes.store(limits.bytes, Ordering::Relaxed);
    }
}

struct Queue<A> {
    commands: VecDeque<Command<A>>,
    bytes: usize,
    closed: bool,
    /// A drain waits among the commands, with this grace: the shortest asked for. One at most, so that it needs no room
    /// and a flood cannot keep it out.
    drain: Option<Duration>,
    /// A stop waits among the commands. Likewise.
    stop: bool,
}

/// A panic while a lock is held leaves nothing half done here: each critical section is one push, pop or copy.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<A> Shared<A> {
    pub(crate) fn new(wake: Box<dyn Wake>, published: Arc<Published>) -> Self {
        Self {
            queue: Mutex::new(Queue {
                commands: VecDeque::new(),
                bytes: 0,
                closed: false,
                drain: None,
                stop: false,
            }),
            pending: AtomicBool::new(false),
            wake,
            published,
            looping: thread::current().id(),
        }
    }

    /// Whether commands came since the last time this was asked. A push from now on wakes the loop again,
    /// so the queue must be looked at *after* this.
    pub(crate) fn take_pending(&self) -> bool {
        self.pending.load(Ordering::Relaxed) && self.pending.swap(false, Ordering::SeqCst)
    }

    pub(crate) fn take(&self) -> Option<Command<A>> {
        let mut queue = lock(&self.queue);
        let command = queue.commands.pop_front()?;
        queue.bytes -= command.bytes();
        Some(match command {
            Command::Drain(first) => Command::Drain(queue.drain.take().unwrap_or(first)),
            Command::Stop => {
                queue.stop = false;
                Command::Stop
            }
            other => other,
        })
    }

    /// Nothing is taken any more. What waits is given back, to be dropped outside the lock: a job may own a handle.
    #[must_use]
    pub(crate) fn close(&self) -> VecDeque<Command<A>> {
        let mut queue = lock(&self.queue);
        queue.closed = true;
        queue.bytes = 0;
        std::mem::take(&mut queue.commands)
    }

    fn is_closed(&self) -> bool {
        lock(&self.queue).closed
    }

    fn push(&self, command: Command<A>) -> Result<(), HandleError> {
        let refused = {
            let mut queue = lock(&self.queue);
            if queue.closed {
                Some((HandleError::ServerGone, command))
            } else {
                let refused = queue.append(command, &self.published).err();
                refused.map(|command| (HandleError::QueueFull, command))
            }
        };
        // Dropped outside the lock: a job or message may own a handle, and use it in its destructor.
        if let Some((error, _command)) = refused {
            return Err(error);
        }
        if !self.pending.swap(true, Ordering::SeqCst) {
            if let Err(error) = self.wake.wake() {
                // The command stays queued and marked for the next turn, whatever brings it about.
                log::warn!(target: logs::SERVER, "cannot wake the loop: {error}");
            }
        }
        Ok(())
    }
}

impl<A> Queue<A> {
    /// Gives the command back if there is no room for it.
    fn append(&mut self, command: Command<A>, limits: &Published) -> Result<(), Command<A>> {
        let bytes = command.bytes();
        let limit = limits.queue_limit.load(Ordering::Relaxed);
        let limit_bytes = limits.queue_bytes.load(Ordering::Relaxed);
        let waits_already = match &command {
            Command::Drain(grace) => {
                let shortest = self.drain.map_or(*grace, |other| other.min(*grace));
                self.drain.replace(shortest).is_some()
            }
            Command::Stop => std::mem::replace(&mut self.stop, true),
            _ if self.commands.len() >= limit
                || (self.bytes > 0 && self.bytes + bytes > limit_bytes) =>
            {
                return Err(command);
            }
            _ => false,
        };
        if waits_already {
            return Ok(());
        }
        self.bytes += bytes;
        self.commands.push_back(command);
        Ok(())
    }
}

/// Which ids are alive, for every thread to read: the generation of each slot, zero when it is free.
///
/// In chunks, so that it grows without moving what others read: of `FIRST` slots, of twice as many, and so on up to `LARGEST`,
/// which is filled in no time that anybody notices.
pub(crate) struct Liveness {
    chunks: [OnceLock<Box<[AtomicU32]>>; CHUNKS],
}

const FIRST: usize = 64;
const LARGEST: usize = 1 << 16;
/// Chunks that are smaller than the next one.
const GROWING: usize = (LARGEST / FIRST).ilog2() as usize + 1;
const CHUNKS: usize = GROWING + MAX_CONNECTIONS / LARGEST;

impl Default for Liveness {
    fn default() -> Self {
        Self {
            chunks: [const { OnceLock::new() }; CHUNKS],
        }
    }
}

impl Liveness {
    /// The chunk of a slot, the chunk's size, and the place in it.
    fn place(index: u32) -> (usize, usize, usize) {
        let shifted = index as usize + FIRST;
        if let Some(beyond) = shifted.checked_sub(2 * LARGEST) {
            return (GROWING + beyond / LARGEST, LARGEST, beyond % LARGEST);
        }
        let chunk = (shifted / FIRST).ilog2() as usize;
        let size = FIRST << chunk;
        (chunk, size, shifted - size)
    }

    pub(crate) fn set(&self, id: ConnId, live: bool) {
        let (chunk, size, at) = Self::place(id.index);
        let Some(chunk) = self.chunks.get(chunk) else {
            return;
        };
        let slots = chunk.get_or_init(|| (0..size).map(|_| AtomicU32::new(0)).collect());
        if let Some(slot) = slots.get(at) {
            slot.store(if live { id.generation } else { 0 }, Ordering::Release);
        }
    }

    fn is_live(&self, id: ConnId) -> bool {
        self.of(id.index)
            .is_some_and(|generation| generation == id.generation)
    }

    /// The generation that is alive in a slot; 0 for none. `None` if the slot was never used.
    pub(crate) fn of(&self, index: u32) -> Option<u32> {
        let (chunk, _, at) = Self::place(index);
        let slot = self.chunks.get(chunk)?.get()?.get(at)?;
        Some(slot.load(Ordering::Acquire))
    }
}

/// Reaches a server from other threads: send, notify, kill, post work, ask, drain.
///
/// `Clone`, `Send` and `Sync` whatever the application's state is. Nothing here waits for the loop but what takes a timeout, as
/// [`Handle::call`]. Commands are carried out in the order in which one thread gives them, at most
/// [`Budgets::commands`](crate::Budgets::commands) per iteration.
///
/// Handlers that give it to workers find it in the application's state: [`Server::handle`](crate::Server::handle) has it before
/// the server runs.
///
/// ```no_run
/// # use portcullis::{Config, Server};
/// # fn main() -> portcullis::Result<()> {
/// let mut server: Server = Server::new(Config::new())?;
/// let handle = server.handle();
/// std::thread::spawn(move || {
///     // ... on SIGTERM:
///     let _ = handle.drain(std::time::Duration::from_secs(10));
/// });
/// server.run(&mut ())
/// # }
/// ```
pub struct Handle<A = ()> {
    shared: Arc<Shared<A>>,
}

impl<A> Clone for Handle<A> {
    fn clone(&self) -> Self {
        Self {
            shared: Arc::clone(&self.shared),
        }
    }
}

impl<A> Handle<A> {
    pub(crate) fn new(shared: Arc<Shared<A>>) -> Self {
        Self { shared }
    }

    /// Queues one frame for a connection. It is framed on the loop; what the loop finds wrong with it then
    /// (too long, peer too slow) is logged at debug level and counted as undeliverable.
    ///
    /// # Errors
    ///
    /// [`HandleError::NoConnection`] if it has gone already, [`HandleError::QueueFull`], [`HandleError::ServerGone`].
    pub fn send(&self, id: ConnId, frame: impl Into<Vec<u8>>) -> Result<(), HandleError> {
        self.check_live(id)?;
        self.shared.push(Command::Send(id, frame.into()))
    }

    /// Gives a connection's handler a message: [`Handler::on_message`](crate::Handler::on_message).
    ///
    /// # Errors
    ///
    /// As for [`Handle::send`].
    pub fn notify(
        &self,
        id: ConnId,
        message: impl std::any::Any + Send,
    ) -> Result<(), HandleError> {
        self.check_live(id)?;
        self.shared.push(Command::Notify(id, Box::new(message)))
    }

    /// Ends a connection at once with RST. [`CloseReason::Killed`](crate::CloseReason::Killed).
    ///
    /// # Errors
    ///
    /// As for [`Handle::send`].
    pub fn kill(&self, id: ConnId) -> Result<(), HandleError> {
        self.check_live(id)?;
        self.shared.push(Command::Kill(id))
    }

    /// Runs a job on the loop, with the application's state and the server's controls. A panic in it is caught,
    /// logged and counted.
    ///
    /// # Errors
    ///
    /// [`HandleError::QueueFull`], [`HandleError::ServerGone`].
    pub fn post(
        &self,
        job: impl FnOnce(&mut A, &mut Control<'_, A>) + Send + 'static,
    ) -> Result<(), HandleError> {
        self.shared.push(Command::Post(Box::new(job)))
    }

    /// Runs a job on the loop and waits for what it returns, at most `timeout`. An answer that comes too late
    /// is dropped: it is never taken for the answer to another question.
    ///
    /// # Errors
    ///
    /// [`HandleError::Timeout`]: no answer in time, the job may still run. [`HandleError::OwnThread`]: asked on the
    /// loop's own thread, which would wait for itself; nothing was queued. [`HandleError::ServerGone`], also when the
    /// server goes while we wait. [`HandleError::Panicked`]: the job did. [`HandleError::QueueFull`].
    pub fn call<R: Send + 'static>(
        &self,
        timeout: Duration,
        job: impl FnOnce(&mut A, &mut Control<'_, A>) -> R + Send + 'static,
    ) -> Result<R, HandleError> {
        if self.is_on_own_thread() {
            return Err(HandleError::OwnThread);
        }
        // Of this question alone: the answer cannot reach another.
        let (answer, answered) = mpsc::sync_channel(1);
        self.post(move |app, control| {
            // Nobody listens any more if this fails: the asker timed out.
            let _ = answer.send(job(app, control));
        })?;
        answered.recv_timeout(timeout).map_err(|error| match error {
            mpsc::RecvTimeoutError::Timeout => HandleError::Timeout,
            mpsc::RecvTimeoutError::Disconnected if self.shared.is_closed() => {
                HandleError::ServerGone
            }
            mpsc::RecvTimeoutError::Disconnected => HandleError::Panicked,
        })
    }

    /// Asks about one listener, by id, port or name: its state, its connections, its limit.
    ///
    /// # Errors
    ///
    /// [`HandleError::NoListener`] if there is none, as distinct from [`HandleError::Timeout`]; else as for [`Handle::call`].
    pub fn listener(
        &self,
        which: impl Into<ListenerRef>,
        timeout: Duration,
    ) -> Result<ListenerInfo, HandleError> {
        let which = which.into();
        self.call(timeout, move |_, control| control.listener(which))?
            .map_err(HandleError::from)
    }

    /// The supervision tree, with at most `limit` connections of each listener: see [`Control::tree`].
    ///
    /// # Errors
    ///
    /// As for [`Handle::call`].
    pub fn tree(&self, limit: usize, timeout: Duration) -> Result<Tree, HandleError> {
        self.call(timeout, move |_, control| control.tree(limit))
    }

    /// The last closes, the latest first: see [`Control::recent_closes`].
    ///
    /// # Errors
    ///
    /// As for [`Handle::call`].
    pub fn recent_closes(&self, timeout: Duration) -> Result<Vec<RecentClose>, HandleError> {
        self.call(timeout, |_, control| control.recent_closes())
    }

    /// Everything that is counted and measured: see [`Control::metrics`]. For the counters alone there is [`Handle::stats`],
    /// which does not ask the loop.
    ///
    /// # Errors
    ///
    /// As for [`Handle::call`].
    pub fn metrics(&self, timeout: Duration) -> Result<Metrics, HandleError> {
        self.call(timeout, |_, control| control.metrics())
    }

    /// Changes options of the server and waits until that is done: see [`Control::reconfigure`].
    ///
    /// # Errors
    ///
    /// [`HandleError::Refused`] for a value that cannot work, with everything as it was; else as for [`Handle::call`].
    pub fn reconfigure(
        &self,
        timeout: Duration,
        change: impl FnOnce(Config) -> Config + Send + 'static,
    ) -> Result<(), HandleError> {
        self.call(timeout, move |_, control| control.reconfigure(change))?
            .map_err(HandleError::from)
    }

    /// Changes options of a listener and waits until that is done: see [`Control::reconfigure_listener`].
    ///
    /// # Errors
    ///
    /// [`HandleError::NoListener`]; [`HandleError::Refused`] for a value that cannot work or that an open port cannot change, with
    /// everything as it was; else as for [`Handle::call`].
    pub fn reconfigure_listener(
        &self,
        which: impl Into<ListenerRef>,
        timeout: Duration,
        change: impl FnOnce(Listen) -> Listen + Send + 'static,
    ) -> Result<(), HandleError> {
        let which = which.into();
        self.call(timeout, move |_, control| {
            control.reconfigure_listener(which, change)
        })?
        .map_err(HandleError::from)
    }

    /// Changes the TLS of a listener and waits until that is done: see [`Control::set_tls`].
    ///
    /// # Errors
    ///
    /// [`HandleError::NoListener`]; [`HandleError::Refused`] for a plain listener; else as for [`Handle::call`].
    #[cfg(feature = "tls")]
    pub fn set_tls(
        &self,
        which: impl Into<ListenerRef>,
        timeout: Duration,
        config: impl Into<crate::tls::TlsConfig>,
    ) -> Result<(), HandleError> {
        let config = config.into();
        self.reconfigure_listener(which, timeout, move |listen| listen.tls(config))
    }

    /// A blocking question would wait for itself.
    pub(crate) fn is_on_own_thread(&self) -> bool {
        self.shared.looping == thread::current().id() && !self.is_closed()
    }

    /// The server is gone for good.
    pub(crate) fn is_closed(&self) -> bool {
        self.shared.is_closed()
    }

    /// Whether a connection is alive at this moment.
    pub fn is_live(&self, id: ConnId) -> bool {
        self.shared.published.live.is_live(id)
    }

    /// The counters at the end of the last turn, without asking the loop.
    pub fn stats(&self) -> Stats {
        lock(&self.shared.published.stats).clone()
    }

    /// Makes the loop's poll return, for whatever the loop's owner has to do.
    ///
    /// # Errors
    ///
    /// [`HandleError::ServerGone`].
    pub fn wake(&self) -> Result<(), HandleError> {
        if self.shared.is_closed() {
            return Err(HandleError::ServerGone);
        }
        self.shared.wake.wake().map_err(|_| HandleError::ServerGone)
    }

    /// Starts a drain, after the commands that wait already: see [`Control::drain`]. Never refused for their number, so
    /// that a flood does not keep it out. One that waits has the shortest grace that was asked for.
    ///
    /// # Errors
    ///
    /// [`HandleError::ServerGone`].
    pub fn drain(&self, grace: Duration) -> Result<(), HandleError> {
        self.shared.push(Command::Drain(grace))
    }

    /// Ends [`Server::run`](crate::Server::run), after the commands that wait already: see [`Control::stop`]. Never refused
    /// for their number.
    ///
    /// # Errors
    ///
    /// [`HandleError::ServerGone`].
    pub fn stop(&self) -> Result<(), HandleError> {
        self.shared.push(Command::Stop)
    }

    fn check_live(&self, id: ConnId) -> Result<(), HandleError> {
        if self.shared.is_closed() {
            Err(HandleError::ServerGone)
        } else if self.is_live(id) {
            Ok(())
        } else {
            Err(HandleError::NoConnection(id))
        }
    }
}

impl<A> fmt::Debug for Handle<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Handle").finish_non_exhaustive()
    }
}

/// Why a [`Handle`] could not do what was asked.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum HandleError {
    /// The connection has gone.
    NoConnection(ConnId),
    /// There is no such listener (any more).
    NoListener(ListenerRef),
    /// Too many commands wait; try again later.
    QueueFull,
    /// The server is gone for good.
    ServerGone,
    /// No answer within the timeout.
    Timeout,
    /// The job panicked on the loop, which goes on.
    Panicked,
    /// The server refused it: what [`Error`] said.
    Refused(String),
    /// A blocking question on the loop's own thread would wait for itself. Use [`Server::control`](crate::Server::control), or post a job.
    OwnThread,
}

impl fmt::Display for HandleError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoConnection(id) => write!(f, "connection {id} has gone"),
            Self::NoListener(which) => write!(f, "there is no listener {which}"),
            Self::QueueFull => f.write_str("the server's command queue is full; try again later"),
            Self::ServerGone => f.write_str("the server is gone"),
            Self::Timeout => f.write_str("no answer from the server within the timeout"),
            Self::Panicked => f.write_str("the job panicked"),
            Self::Refused(words) => f.write_str(words),
            Self::OwnThread => {
                f.write_str("a blocking question on the server's own thread would wait for itself")
            }
        }
    }
}

impl StdError for HandleError {}

impl From<HandleError> for Error {
    fn from(error: HandleError) -> Self {
        Self::other(error)
    }
}

impl From<Error> for HandleError {
    fn from(error: Error) -> Self {
        match error {
            Error::NoListener { listener } => Self::NoListener(listener),
            error => Self::Refused(error.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_slot_has_its_own_place() {
        let mut seen = std::collections::HashSet::new();
        for index in 0..5 * LARGEST as u32 {
            let (chunk, size, at) = Liveness::place(index);
            assert!(chunk < CHUNKS && at < size && size == (FIRST << chunk.min(32)).min(LARGEST));
            assert!(seen.insert((chunk, at)), "slot {index} shares a place");
        }
        let (chunk, size, at) = Liveness::place(MAX_CONNECTIONS as u32 - 1);
        assert!(chunk < CHUNKS && at < size, "the last id has a place");
    }

    #[test]
    fn an_id_is_live_until_its_slot_has_another_tenant() {
        let live = Liveness::default();
        let first = ConnId {
            index: 77,
            generation: 1,
        };
        let second = ConnId {
            index: 77,
            generation: 2,
        };
        assert!(!live.is_live(first));
        live.set(first, true);
        assert!(live.is_live(first) && !live.is_live(second));
        live.set(first, false);
        assert!(!live.is_live(first));
        live.set(second, true);
        assert!(!live.is_live(first) && live.is_live(second));
    }

    #[test]
    fn a_handle_is_send_and_sync_for_every_state() {
        fn check<T: Send + Sync + Clone>() {}
        check::<Handle<std::rc::Rc<std::cell::RefCell<u8>>>>();
    }
}
