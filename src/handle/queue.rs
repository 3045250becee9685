//! The queue of commands to one server's loop, and the facts that the loop publishes.

use std::collections::VecDeque;
use std::io;
use std::mem;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, ThreadId};
use std::time::Duration;

use super::liveness::Liveness;
use super::HandleError;
use crate::config::QueueLimits;
use crate::control::Control;
use crate::handler::Message;
use crate::id::ConnId;
use crate::logs;
use crate::stats::Stats;

/// Makes the loop's poll return, from any thread.
pub(crate) trait Wake: Send + Sync {
    fn wake(&self) -> io::Result<()>;
}

pub(super) type Job<A> = Box<dyn FnOnce(&mut A, &mut Control<'_, A>) + Send>;

pub(crate) enum Command<A> {
    Send(ConnId, Vec<u8>),
    Notify(ConnId, Message),
    Kill(ConnId),
    Post(Job<A>),
    /// A job whose caller waits for the answer.
    Call(Job<A>),
    Drain(Duration),
    Stop,
}

impl<A> Command<A> {
    /// Bytes of memory that it occupies, without what a job or message owns elsewhere.
    fn bytes(&self) -> usize {
        let owned = match self {
            Self::Send(_, frame) => frame.capacity(),
            Self::Notify(_, message) => size_of_val(&**message),
            Self::Post(job) | Self::Call(job) => size_of_val(&**job),
            Self::Kill(_) | Self::Drain(_) | Self::Stop => 0,
        };
        // The queue's buffer may be twice as large as what it holds.
        2 * size_of::<Self>() + owned
    }

    /// It may pass the commands before it.
    fn is_urgent(&self) -> bool {
        matches!(self, Self::Kill(_)) || self.ends()
    }

    /// Its caller is not told that it was dropped.
    pub(crate) fn is_silent(&self) -> bool {
        !matches!(self, Self::Call(_) | Self::Drain(_) | Self::Stop)
    }

    /// Ends the server at once.
    fn ends(&self) -> bool {
        match self {
            Self::Drain(grace) => grace.is_zero(),
            Self::Stop => true,
            _ => false,
        }
    }

    /// Returns a frame's spare capacity, if that is more than the frame.
    fn shrink(&mut self) {
        if let Self::Send(_, frame) = self {
            if frame.capacity() / 2 > frame.len() {
                frame.shrink_to_fit();
            }
        }
    }
}

/// State shared by the loop and all its handles.
pub(crate) struct Shared<A> {
    queue: Mutex<Queue<A>>,
    /// A wake-up was sent and not handled yet, so that a flood of commands costs one.
    pending: AtomicBool,
    /// Number of urgent commands in the queue.
    urgent: AtomicUsize,
    wake: Box<dyn Wake>,
    published: Arc<Published>,
    /// The loop's thread: a server cannot be sent to another.
    looping: ThreadId,
}

/// Facts that a server publishes to its handles, for every application type.
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
    /// A stop is queued. At most one, so that it needs no room and a flood cannot keep it out.
    stop: bool,
}

/// Commands for which the memory of an empty queue is kept.
const KEPT_COMMANDS: usize = 1024;

/// Ignores poison: each critical section here is one push, pop or copy, and a panic leaves none
/// half done.
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
                stop: false,
            }),
            pending: AtomicBool::new(false),
            urgent: AtomicUsize::new(0),
            wake,
            published,
            looping: thread::current().id(),
        }
    }

    /// Whether commands were queued since the last call. A push from now on wakes the loop again,
    /// so the queue must be read *after* this.
    pub(crate) fn take_pending(&self) -> bool {
        self.pending.load(Ordering::Relaxed) && self.pending.swap(false, Ordering::SeqCst)
    }

    /// Number of queued commands.
    pub(crate) fn len(&self) -> usize {
        lock(&self.queue).commands.len()
    }

    /// Whether an urgent command is queued: a kill, a stop, or a drain without grace.
    pub(crate) fn has_urgent(&self) -> bool {
        self.urgent.load(Ordering::Relaxed) > 0
    }

    pub(crate) fn take(&self) -> Option<Command<A>> {
        let mut queue = lock(&self.queue);
        let command = queue.commands.pop_front()?;
        queue.forget(&command);
        self.urgent
            .fetch_sub(usize::from(command.is_urgent()), Ordering::Relaxed);
        if queue.commands.is_empty() && queue.commands.capacity() > KEPT_COMMANDS {
            queue.commands.shrink_to(KEPT_COMMANDS);
        }
        Some(command)
    }

    /// Takes the urgent commands, past those before them; of the kills no more than `max_kills`.
    /// Frames that were sent before the end of the server go with them, in their order.
    pub(crate) fn take_urgent(&self, max_kills: usize) -> Vec<Command<A>> {
        let mut queue = lock(&self.queue);
        let end = queue.commands.iter().rposition(Command::ends);
        let (mut taken, mut kills, mut urgent) = (Vec::new(), 0, 0);
        for (at, command) in mem::take(&mut queue.commands).into_iter().enumerate() {
            let passes = match &command {
                Command::Send(..) => end.is_some_and(|end| at < end),
                Command::Kill(_) => kills < max_kills,
                _ => command.ends(),
            };
            if passes {
                kills += usize::from(matches!(command, Command::Kill(_)));
                urgent += usize::from(command.is_urgent());
                queue.forget(&command);
                taken.push(command);
            } else {
                queue.commands.push_back(command);
            }
        }
        self.urgent.fetch_sub(urgent, Ordering::Relaxed);
        taken
    }

    /// Closes the queue. Returns the queued commands, to be dropped outside the lock: a job may own
    /// a handle.
    #[must_use]
    pub(crate) fn close(&self) -> VecDeque<Command<A>> {
        let mut queue = lock(&self.queue);
        queue.closed = true;
        queue.bytes = 0;
        mem::take(&mut queue.commands)
    }

    pub(super) fn is_closed(&self) -> bool {
        lock(&self.queue).closed
    }

    /// A blocking call on this thread would wait for itself.
    pub(super) fn is_on_own_thread(&self) -> bool {
        self.looping == thread::current().id() && !self.is_closed()
    }

    /// True if this server gave the id.
    pub(super) fn owns(&self, id: ConnId) -> bool {
        self.published.live.server() == id.server()
    }

    pub(super) fn is_live(&self, id: ConnId) -> bool {
        self.published.live.is_live(id)
    }

    pub(super) fn stats(&self) -> Stats {
        lock(&self.published.stats).clone()
    }

    pub(super) fn wake(&self) -> Result<(), HandleError> {
        if self.is_closed() {
            return Err(HandleError::ServerGone);
        }
        self.wake.wake().map_err(|_| HandleError::ServerGone)
    }

    pub(super) fn push(&self, mut command: Command<A>) -> Result<(), HandleError> {
        command.shrink();
        let refused = {
            let mut queue = lock(&self.queue);
            if queue.closed {
                Some((HandleError::ServerGone, command))
            } else {
                match queue.append(command, &self.published) {
                    Ok(is_urgent) => {
                        self.urgent
                            .fetch_add(usize::from(is_urgent), Ordering::Relaxed);
                        None
                    }
                    Err(command) => Some((HandleError::QueueFull, command)),
                }
            }
        };
        // Dropped outside the lock: a job or message may own a handle, and use it in its
        // destructor.
        if let Some((error, _command)) = refused {
            return Err(error);
        }
        if !self.pending.swap(true, Ordering::SeqCst) {
            if let Err(error) = self.wake.wake() {
                // The command stays queued and marked for the next iteration.
                logs::warning!(target: logs::SERVER, "cannot wake the loop: {error}");
            }
        }
        Ok(())
    }
}

impl<A> Queue<A> {
    /// True if the queue has an urgent command more. Returns the command if there is no room for
    /// it.
    fn append(&mut self, command: Command<A>, limits: &Published) -> Result<bool, Command<A>> {
        let limit = limits.queue_limit.load(Ordering::Relaxed);
        let bytes = command.bytes();
        let has_room = match &command {
            Command::Drain(_) | Command::Stop => true,
            // A caller that waits, or wants an end, is not kept out by commands that do neither.
            Command::Kill(_) | Command::Call(_) => self.commands.len() < limit.saturating_mul(2),
            Command::Send(..) | Command::Notify(..) | Command::Post(_) => {
                let limit_bytes = limits.queue_bytes.load(Ordering::Relaxed);
                let fits = self.bytes == 0 || self.bytes.saturating_add(bytes) <= limit_bytes;
                self.commands.len() < limit && fits
            }
        };
        if !has_room {
            return Err(command);
        }
        match (&command, self.commands.back_mut()) {
            (Command::Stop, _) if mem::replace(&mut self.stop, true) => return Ok(false),
            // No command stands between the two: the shorter grace counts.
            (Command::Drain(grace), Some(Command::Drain(last))) => {
                let was_urgent = last.is_zero();
                *last = (*last).min(*grace);
                return Ok(last.is_zero() && !was_urgent);
            }
            _ => {}
        }
        let is_urgent = command.is_urgent();
        self.bytes = self.bytes.saturating_add(bytes);
        self.commands.push_back(command);
        Ok(is_urgent)
    }

    /// A command leaves the queue.
    fn forget(&mut self, command: &Command<A>) {
        self.bytes = self.bytes.saturating_sub(command.bytes());
        if matches!(command, Command::Stop) {
            self.stop = false;
        }
    }
}
