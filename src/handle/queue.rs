//! The queue of commands to one server's loop, and the facts that the loop publishes.

use std::collections::VecDeque;
use std::io;
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

/// State shared by the loop and all its handles.
pub(crate) struct Shared<A> {
    queue: Mutex<Queue<A>>,
    /// A wake-up was sent and not handled yet, so that a flood of commands costs one.
    pending: AtomicBool,
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
    /// The grace of the queued drain: the shortest of all calls. At most one is queued, so that it
    /// needs no room and a flood cannot keep it out.
    drain: Option<Duration>,
    /// A stop is queued. At most one, likewise.
    stop: bool,
}

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
                drain: None,
                stop: false,
            }),
            pending: AtomicBool::new(false),
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

    /// Closes the queue. Returns the queued commands, to be dropped outside the lock: a job may own
    /// a handle.
    #[must_use]
    pub(crate) fn close(&self) -> VecDeque<Command<A>> {
        let mut queue = lock(&self.queue);
        queue.closed = true;
        queue.bytes = 0;
        std::mem::take(&mut queue.commands)
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

    pub(super) fn push(&self, command: Command<A>) -> Result<(), HandleError> {
        let refused = {
            let mut queue = lock(&self.queue);
            if queue.closed {
                Some((HandleError::ServerGone, command))
            } else {
                let refused = queue.append(command, &self.published).err();
                refused.map(|command| (HandleError::QueueFull, command))
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
    /// Returns the command if there is no room for it.
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
