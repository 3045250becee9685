//! The queue of commands to one server's loop, and the facts that the loop publishes.

use std::any::Any;
use std::collections::VecDeque;
use std::io;
use std::mem;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use super::liveness::Liveness;
use super::HandleError;
use crate::config::QueueLimits;
use crate::handler::Control;
use crate::id::ConnId;
use crate::logs;
use crate::proto::Chunk;
use crate::stats::Stats;
use crate::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use crate::sync::{current, Mutex, MutexGuard, ThreadId};

/// Makes the loop's poll return, from any thread.
pub(crate) trait Wake: Send + Sync {
    fn wake(&self) -> io::Result<()>;
}

pub(super) type Job<A> = Box<dyn FnOnce(&mut A, &mut Control<'_, A>) + Send>;

pub(crate) enum Command<A> {
    Send(ConnId, Chunk<'static>),
    Notify(ConnId, Box<dyn Any + Send>),
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
            Self::Send(_, frame) => frame.memory(),
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

    /// A recording has it.
    #[cfg(all(feature = "record", feature = "sim"))]
    fn is_recorded(&self) -> bool {
        matches!(self, Self::Send(..) | Self::Kill(_) | Self::Drain(_))
    }

    /// Returns a frame's spare capacity, if that is more than the frame.
    fn shrink(&mut self) {
        if let Self::Send(_, frame) = self {
            frame.shrink();
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
    /// Recorded commands come from the recording alone: what the program's threads did is in it.
    #[cfg(all(feature = "record", feature = "sim"))]
    is_replay: AtomicBool,
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
    /// Commands that the end of the server passes. They are older than `commands`.
    passed: VecDeque<Command<A>>,
    /// All other commands but kills.
    commands: VecDeque<Command<A>>,
    /// Kills, each with the value of `queued` at that time.
    kills: VecDeque<(u64, ConnId)>,
    /// Number of commands that were ever in `commands`.
    queued: u64,
    /// Number of `commands` that end the server at once.
    ends: usize,
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

/// Takes the first entry. A queue that was long returns its memory when it is empty.
fn pop<T>(queue: &mut VecDeque<T>) -> Option<T> {
    let first = queue.pop_front()?;
    if queue.is_empty() && queue.capacity() > KEPT_COMMANDS {
        queue.shrink_to(KEPT_COMMANDS);
    }
    Some(first)
}

impl<A> Shared<A> {
    pub(crate) fn new(wake: Box<dyn Wake>, published: Arc<Published>) -> Self {
        Self {
            queue: Mutex::new(Queue {
                passed: VecDeque::new(),
                commands: VecDeque::new(),
                kills: VecDeque::new(),
                queued: 0,
                ends: 0,
                bytes: 0,
                closed: false,
                stop: false,
            }),
            pending: AtomicBool::new(false),
            urgent: AtomicUsize::new(0),
            wake,
            published,
            looping: current().id(),
            #[cfg(all(feature = "record", feature = "sim"))]
            is_replay: AtomicBool::new(false),
        }
    }

    /// Whether commands were queued since the last call. A push from now on wakes the loop again,
    /// so the queue must be read *after* this.
    pub(crate) fn take_pending(&self) -> bool {
        self.pending.load(Ordering::Relaxed) && self.pending.swap(false, Ordering::SeqCst)
    }

    /// Number of queued commands.
    pub(crate) fn len(&self) -> usize {
        lock(&self.queue).len()
    }

    /// Number of commands that were ever queued, without kills; `None` if all are taken.
    pub(crate) fn queued(&self) -> Option<u64> {
        let queue = lock(&self.queue);
        let has_some = !queue.commands.is_empty() || !queue.passed.is_empty();
        has_some.then_some(queue.queued)
    }

    /// Number of commands that were taken before all others, as counted by [`Shared::queued`].
    /// Zero while commands are passed by others.
    pub(crate) fn taken(&self) -> u64 {
        let queue = lock(&self.queue);
        match queue.passed.is_empty() {
            true => queue.queued - queue.commands.len() as u64,
            false => 0,
        }
    }

    /// Whether an urgent command is queued: a kill, a stop, or a drain without grace.
    pub(crate) fn has_urgent(&self) -> bool {
        self.urgent.load(Ordering::Relaxed) > 0
    }

    /// Takes the next command in order.
    pub(crate) fn take(&self) -> Option<Command<A>> {
        self.take_by(Queue::take)
    }

    /// Takes the next urgent command, past those before it. Frames that were sent before the end of
    /// the server come before it, in their order.
    pub(crate) fn take_urgent(&self) -> Option<Command<A>> {
        self.take_by(Queue::take_urgent)
    }

    fn take_by(&self, next: fn(&mut Queue<A>) -> Option<Command<A>>) -> Option<Command<A>> {
        let mut queue = lock(&self.queue);
        let command = next(&mut queue)?;
        queue.forget(&command);
        self.urgent
            .fetch_sub(usize::from(command.is_urgent()), Ordering::Relaxed);
        Some(command)
    }

    /// Closes the queue. Returns the queued commands, to be dropped outside the lock: a job may own
    /// a handle.
    #[must_use]
    pub(crate) fn close(&self) -> VecDeque<Command<A>> {
        let mut queue = lock(&self.queue);
        queue.closed = true;
        queue.bytes = 0;
        let mut all = mem::take(&mut queue.passed);
        all.append(&mut queue.commands);
        let kills = mem::take(&mut queue.kills).into_iter();
        all.extend(kills.map(|(_, id)| Command::Kill(id)));
        all
    }

    pub(super) fn is_closed(&self) -> bool {
        lock(&self.queue).closed
    }

    /// A blocking call on this thread would wait for itself.
    pub(super) fn is_on_own_thread(&self) -> bool {
        self.looping == current().id() && !self.is_closed()
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
        #[cfg(all(feature = "record", feature = "sim"))]
        if self.is_replay.load(Ordering::Relaxed) && command.is_recorded() && !self.is_closed() {
            return Ok(());
        }
        self.append(command)
    }

    /// Queues a command of a recording.
    #[cfg(all(feature = "record", feature = "sim"))]
    pub(super) fn repeat(&self, command: Command<A>) {
        // Refused by a queue that is full or closed.
        let _ = self.append(command);
    }

    /// Ignores commands that recordings have, but for [`Shared::repeat`].
    #[cfg(all(feature = "record", feature = "sim"))]
    pub(super) fn set_replay(&self) {
        self.is_replay.store(true, Ordering::Relaxed);
    }

    fn append(&self, mut command: Command<A>) -> Result<(), HandleError> {
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
    fn len(&self) -> usize {
        self.passed.len() + self.commands.len() + self.kills.len()
    }

    fn take(&mut self) -> Option<Command<A>> {
        if self.is_kill_next() {
            return self.take_kill();
        }
        match pop(&mut self.passed) {
            Some(command) => Some(command),
            None => self.take_command(),
        }
    }

    /// Each command is passed once, so that the cost per command is constant (amortised).
    fn take_urgent(&mut self) -> Option<Command<A>> {
        while self.ends > 0 && !self.is_kill_next() {
            let command = self.take_command()?;
            if command.ends() || matches!(command, Command::Send(..)) {
                return Some(command);
            }
            self.passed.push_back(command);
        }
        self.take_kill()
    }

    /// No frame was sent, and no end ordered, before the next kill.
    fn is_kill_next(&self) -> bool {
        let taken = self.queued - self.commands.len() as u64;
        let next = self.kills.front();
        next.is_some_and(|&(before, _)| before <= taken)
    }

    fn take_kill(&mut self) -> Option<Command<A>> {
        let (_, id) = pop(&mut self.kills)?;
        Some(Command::Kill(id))
    }

    fn take_command(&mut self) -> Option<Command<A>> {
        let command = pop(&mut self.commands)?;
        self.ends -= usize::from(command.ends());
        Some(command)
    }

    /// True if the queue has an urgent command more. Returns the command if there is no room for
    /// it.
    fn append(&mut self, command: Command<A>, limits: &Published) -> Result<bool, Command<A>> {
        let limit = limits.queue_limit.load(Ordering::Relaxed);
        let bytes = command.bytes();
        let limit_bytes = limits.queue_bytes.load(Ordering::Relaxed);
        let fits = |limit| self.bytes == 0 || self.bytes.saturating_add(bytes) <= limit;
        let has_room = match &command {
            Command::Drain(_) | Command::Stop => true,
            // A caller that waits, or wants an end, is not kept out by commands that do neither.
            Command::Kill(_) => self.len() < limit.saturating_mul(2),
            Command::Call(_) => {
                self.len() < limit.saturating_mul(2) && fits(limit_bytes.saturating_mul(2))
            }
            Command::Send(..) | Command::Notify(..) | Command::Post(_) => {
                self.len() < limit && fits(limit_bytes)
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
                let is_urgent = last.is_zero() && !was_urgent;
                self.ends += usize::from(is_urgent);
                return Ok(is_urgent);
            }
            _ => {}
        }
        self.bytes = self.bytes.saturating_add(bytes);
        if let Command::Kill(id) = command {
            self.kills.push_back((self.queued, id));
            return Ok(true);
        }
        let is_urgent = command.ends();
        self.ends += usize::from(is_urgent);
        self.queued += 1;
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

#[cfg(all(test, loom))]
mod models;

#[cfg(test)]
mod tests {
    use super::*;

    struct NoWake;

    impl Wake for NoWake {
        fn wake(&self) -> io::Result<()> {
            Ok(())
        }
    }

    fn id(index: u32) -> ConnId {
        ConnId::new(crate::id::ServerNumber::NONE, index, 1)
    }

    fn post() -> Command<()> {
        Command::Post(Box::new(|_, _| ()))
    }

    fn send(index: u32) -> Command<()> {
        Command::Send(id(index), Chunk::Borrowed(&[]))
    }

    fn queue(commands: Vec<Command<()>>) -> Shared<()> {
        let published = Arc::new(Published::new(QueueLimits::default()));
        let shared = Shared::new(Box::new(NoWake), published);
        for command in commands {
            shared.push(command).expect("room");
        }
        shared
    }

    fn word(command: Command<()>) -> String {
        match command {
            Command::Send(id, _) => format!("send {}", id.index()),
            Command::Kill(id) => format!("kill {}", id.index()),
            Command::Post(_) => "post".to_owned(),
            Command::Drain(_) => "drain".to_owned(),
            Command::Stop => "stop".to_owned(),
            Command::Notify(..) | Command::Call(_) => "other".to_owned(),
        }
    }

    fn words(next: impl Fn() -> Option<Command<()>>) -> Vec<String> {
        std::iter::from_fn(next).map(word).collect()
    }

    fn mixed() -> Shared<()> {
        queue(vec![
            post(),
            send(1),
            Command::Kill(id(2)),
            Command::Drain(Duration::from_secs(1)),
            send(3),
            Command::Stop,
            send(4),
            Command::Kill(id(5)),
        ])
    }

    #[test]
    fn commands_are_taken_in_order() {
        let shared = mixed();
        assert_eq!(shared.len(), 8);
        assert_eq!((shared.queued(), shared.taken()), (Some(6), 0));
        let all = words(|| shared.take());
        assert_eq!((shared.queued(), shared.taken()), (None, 6));
        let expected = [
            "post", "send 1", "kill 2", "drain", "send 3", "stop", "send 4", "kill 5",
        ];
        assert_eq!(all, expected);
        assert!(!shared.has_urgent() && shared.len() == 0);
    }

    #[test]
    fn the_end_passes_with_the_frames_before_it() {
        let shared = mixed();
        let urgent = words(|| shared.take_urgent());
        assert_eq!(urgent, ["send 1", "kill 2", "send 3", "stop", "kill 5"]);
        assert!(!shared.has_urgent());
        assert_eq!((shared.queued(), shared.taken()), (Some(6), 0));
        shared.push(post()).expect("room");
        assert_eq!(words(|| shared.take()), ["post", "drain", "send 4", "post"]);
        assert_eq!(lock(&shared.queue).bytes, 0);
    }

    #[test]
    fn kills_pass_all_others() {
        let shared = queue(vec![post(), send(1), Command::Kill(id(2)), send(3)]);
        shared.push(Command::Kill(id(4))).expect("room");
        assert_eq!(words(|| shared.take_urgent()), ["kill 2", "kill 4"]);
        assert_eq!(words(|| shared.take()), ["post", "send 1", "send 3"]);
    }

    #[test]
    fn a_drain_that_is_shortened_to_nothing_is_urgent() {
        let shared = queue(vec![
            post(),
            Command::Drain(Duration::from_secs(1)),
            Command::Drain(Duration::ZERO),
        ]);
        assert!(shared.has_urgent());
        assert_eq!(words(|| shared.take_urgent()), ["drain"]);
        assert_eq!((shared.has_urgent(), shared.len()), (false, 1));
        assert_eq!(shared.close().len(), 1);
    }
}
