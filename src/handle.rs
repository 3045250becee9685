//! The part of a server, or of all shards, that other threads reach.

mod answer;
mod error;
mod liveness;
mod merge;
mod queue;
mod route;

use std::fmt;
use std::sync::{mpsc, Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::config::Config;
use crate::handler::Control;
use crate::id::{ConnId, ListenerRef};
use crate::listener_info::ListenerInfo;
use crate::metrics::Metrics;
use crate::proto::{kept, Chunk, Payload};
use crate::stats::Stats;
use answer::answer_channel;
pub use answer::Answer;
pub use error::HandleError;
pub(crate) use liveness::Liveness;
pub(crate) use merge::add_listeners;
pub(crate) use queue::{Command, Published, Shared, Wake};

/// The cap that shards share.
pub(crate) trait CommonCap: fmt::Debug + Send + Sync {
    fn get(&self) -> usize;
    fn set(&self, connections: usize);
}

/// Reaches a server, or all [`Shards`](crate::Shards), from other threads: send, notify, kill, post
/// work, ask, change, drain.
///
/// `Clone`, `Send` and `Sync` for every application state. Only methods with a timeout, like
/// [`Handle::call`], wait for the loop. Commands from one thread are executed in their order, up to
/// [`Budgets::commands`](crate::Budgets::commands) per iteration. Frames and messages for a
/// connection that is not open yet are deferred, and later commands pass them.
///
/// [`Handle::kill`], [`Handle::stop`] and a [`Handle::drain`] without grace pass the commands
/// before them if these exceed a budget or take longer than 50 ms. Frames before a stop or drain
/// are sent first all the same.
///
/// A queued frame, message or kill that fails is counted in
/// [`Stats::undeliverable`](crate::Stats::undeliverable), as is each of them, or a job, that a
/// server leaves behind at its end. A job that panics is counted in
/// [`Stats::panics`](crate::Stats::panics).
///
/// [`Server::handle`](crate::Server::handle) returns a handle before the server runs. Handlers that
/// pass it to workers keep it in the application's state.
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
///
/// # Several shards
///
/// The handle of spawned shards reaches all shards that still run; [`HandleError::ServerGone`]
/// means that none does. A change is no transaction: each shard makes it in an iteration of its
/// own.
///
/// A [`ConnId`] names its shard, so frames, messages and kills find their connection. A job and a
/// call belong to one shard: for them take that shard's handle ([`Handle::shards`]). Otherwise they
/// are [`HandleError::ManyShards`].
///
/// ```
/// use portcullis::{Handle, Spawned};
///
/// #[derive(Default)]
/// struct State { all: Option<Handle<State>> }
///
/// # fn introduce(shards: &Spawned<State>) -> Result<(), portcullis::HandleError> {
/// let all = shards.handle.clone();
/// shards.handle.post_each(move |_shard, state, _control| state.all = Some(all.clone()))?;
/// # Ok(()) }
/// ```
pub struct Handle<A = ()> {
    /// At least one.
    shards: Arc<[Arc<Shared<A>>]>,
    common_cap: Option<Arc<dyn CommonCap>>,
}

impl<A> Clone for Handle<A> {
    fn clone(&self) -> Self {
        Self {
            shards: Arc::clone(&self.shards),
            common_cap: self.common_cap.clone(),
        }
    }
}

impl<A> Handle<A> {
    pub(crate) fn new(shared: Arc<Shared<A>>) -> Self {
        Self {
            shards: Arc::new([shared]),
            common_cap: None,
        }
    }

    /// Returns one handle for all shards, in the order of their numbers.
    pub(crate) fn of_shards(
        shards: impl IntoIterator<Item = Self>,
        common_cap: Arc<dyn CommonCap>,
    ) -> Self {
        let all = shards.into_iter().flat_map(|one| one.shards.to_vec());
        Self {
            shards: all.collect(),
            common_cap: Some(common_cap),
        }
    }

    /// Ignores commands that recordings have, but for [`Handle::repeat`].
    #[cfg(all(feature = "record", feature = "sim"))]
    pub(crate) fn set_replay(&self) {
        self.shards.iter().for_each(|server| server.set_replay());
    }

    /// Queues a command of a recording.
    #[cfg(all(feature = "record", feature = "sim"))]
    pub(crate) fn repeat(&self, command: Command<A>) {
        if let [server] = &*self.shards {
            server.repeat(command);
        }
    }

    // One connection.

    /// Queues one frame for a connection. A payload that is borrowed or in parts is copied; one
    /// that was given away or is shared is not. The loop frames it. Before the connection is open the
    /// frame waits until it is, and the defaults of
    /// [`Handler::on_finish`](crate::Handler::on_finish) and
    /// [`Handler::on_drain`](crate::Handler::on_drain) wait for the frame. While the connection
    /// closes the frame is undeliverable.
    ///
    /// A frame that the connection does not take counts as undeliverable, and ends the connection
    /// in order, so that the stream has no hole. The reason is
    /// [`SlowConsumer`](crate::CloseReason::SlowConsumer) for a slow peer,
    /// [`Failed`](crate::CloseReason::Failed) for a frame that is too long.
    ///
    /// # Errors
    ///
    /// [`HandleError::NoConnection`] if the connection has gone or left the loop, or is another
    /// server's; [`HandleError::QueueFull`], [`HandleError::ServerGone`].
    pub fn send(&self, id: ConnId, frame: impl Payload) -> Result<(), HandleError> {
        let server = self.live(id)?;
        server.push(Command::Send(id, frame.lend(kept)))
    }

    /// Queues one frame for each of these connections, as [`Handle::send`]. The payload is stored
    /// once, and counts once for [`QueueLimits::bytes`](crate::QueueLimits::bytes). Each connection
    /// counts as a command.
    ///
    /// Returns the number of connections for which it was queued. The others have gone or left the
    /// loop, or a queue was full.
    ///
    /// ```
    /// # use portcullis::{ConnId, Handle};
    /// fn announce(shards: &Handle, members: &[ConnId], words: String) {
    ///     let queued = shards.broadcast(members.iter().copied(), words);
    ///     println!("{queued} of {} members", members.len());
    /// }
    /// ```
    pub fn broadcast(&self, ids: impl IntoIterator<Item = ConnId>, frame: impl Payload) -> usize {
        frame.lend(|chunks| {
            let frame: Arc<[u8]> = kept(chunks).into();
            let (mut queued, mut charged) = (0, Vec::<&Shared<A>>::new());
            for id in ids {
                let Ok(server) = self.live(id) else {
                    continue;
                };
                // The first command in each shard's queue is charged with the bytes.
                let is_first = !charged.iter().any(|other| std::ptr::eq(*other, server));
                let frame = match is_first {
                    true => Chunk::Shared(Arc::clone(&frame)),
                    false => Chunk::Counted(Arc::clone(&frame)),
                };
                if server.push(Command::Send(id, frame)).is_ok() {
                    queued += 1;
                    charged.extend(is_first.then_some(server));
                }
            }
            queued
        })
    }

    /// Gives a connection's handler a message: [`Handler::on_message`](crate::Handler::on_message).
    /// Before the connection is open the message waits until it is; while it closes or leaves the
    /// loop the message is undeliverable.
    ///
    /// # Errors
    ///
    /// As for [`Handle::send`].
    pub fn notify(
        &self,
        id: ConnId,
        message: impl std::any::Any + Send,
    ) -> Result<(), HandleError> {
        self.live(id)?.push(Command::Notify(id, Box::new(message)))
    }

    /// Ends a connection at once with RST: see [`Control::kill`]. Refused only at twice
    /// [`QueueLimits::commands`](crate::QueueLimits::commands). A detached connection is killed by
    /// [`Control::kill`] alone, in a job of [`Handle::post`].
    ///
    /// # Errors
    ///
    /// As for [`Handle::send`].
    pub fn kill(&self, id: ConnId) -> Result<(), HandleError> {
        self.live(id)?.push(Command::Kill(id))
    }

    /// Returns whether a connection of this server, or of one of these shards, is in the loop at
    /// this moment. A detached one is not.
    pub fn is_live(&self, id: ConnId) -> bool {
        self.shards.iter().any(|server| server.is_live(id))
    }

    // One server, or one shard.

    /// Runs a job on the loop, with the application's state and the server's controls. A panic in
    /// it is caught, logged and counted.
    ///
    /// # Errors
    ///
    /// [`HandleError::QueueFull`], [`HandleError::ServerGone`], [`HandleError::ManyShards`].
    pub fn post(
        &self,
        job: impl FnOnce(&mut A, &mut Control<'_, A>) + Send + 'static,
    ) -> Result<(), HandleError> {
        self.one()?.push(Command::Post(Box::new(job)))
    }

    /// Runs a job on the loop and returns its result, after at most `timeout`. A later result is
    /// dropped: it is never taken for the answer to another call.
    ///
    /// # Errors
    ///
    /// [`HandleError::Timeout`]: no answer in time; the job may still run.
    /// [`HandleError::OwnThread`]: called on the loop's own thread, which would wait for itself;
    /// nothing was queued. [`HandleError::ServerGone`], also when the server ends meanwhile.
    /// [`HandleError::Panicked`]: the job did. [`HandleError::QueueFull`],
    /// [`HandleError::ManyShards`].
    pub fn call<R: Send + 'static>(
        &self,
        timeout: Duration,
        job: impl FnOnce(&mut A, &mut Control<'_, A>) -> R + Send + 'static,
    ) -> Result<R, HandleError> {
        let server = self.one()?;
        if server.is_on_own_thread() {
            return Err(HandleError::OwnThread);
        }
        self.ask(job).wait(timeout)
    }

    /// Runs a job on the loop, and returns its result as a future: [`Handle::call`] for async code,
    /// and for the loop's own thread, where nothing may wait. The job is queued at once, whether the
    /// future is polled or not.
    ///
    /// ```
    /// # use portcullis::{Handle, HandleError};
    /// async fn open(handle: &Handle) -> Result<usize, HandleError> {
    ///     handle.ask(|_app, control| control.connections().len()).await
    /// }
    /// ```
    ///
    /// # Errors
    ///
    /// The future's are those of [`Handle::call`], but for the timeout: use that of your runtime.
    pub fn ask<R: Send + 'static>(
        &self,
        job: impl FnOnce(&mut A, &mut Control<'_, A>) -> R + Send + 'static,
    ) -> Answer<R> {
        // Of this call alone: the answer cannot reach another.
        let (sender, answer) = answer_channel();
        let job = move |app: &mut A, control: &mut Control<'_, A>| {
            sender.answer_with(|| job(app, control));
        };
        let queued = self
            .one()
            .and_then(|server| server.push(Command::Call(Box::new(job))));
        queued.map_or_else(Answer::refused, |()| answer)
    }

    // One server, or all shards.

    /// Returns the handles of all shards, in the order of their numbers, to reach one alone. A
    /// single server is one shard.
    ///
    /// ```
    /// # use portcullis::{Handle, HandleError};
    /// # fn stop_one(shards: &Handle, shard: usize) -> Result<(), HandleError> {
    /// if let Some(handle) = shards.shards().nth(shard) {
    ///     handle.post(|_app, control| control.stop())?;
    /// }
    /// # Ok(()) }
    /// ```
    pub fn shards(&self) -> impl ExactSizeIterator<Item = Self> + '_ {
        self.shards.iter().map(|shard| Self::new(Arc::clone(shard)))
    }

    /// Runs a job on each shard, with the shard's number, state and controls. A panic in it is
    /// caught, logged and counted.
    ///
    /// # Errors
    ///
    /// [`HandleError::QueueFull`] if a shard's queue was full; the others run the job.
    /// [`HandleError::ServerGone`].
    pub fn post_each(
        &self,
        job: impl Fn(usize, &mut A, &mut Control<'_, A>) + Send + Sync + 'static,
    ) -> Result<(), HandleError> {
        self.push_each(job, Command::Post)
    }

    /// Runs a job on all shards at the same time, and returns their results after at most
    /// `timeout`. Each has the number of its shard, in ascending order. A shard that has ended
    /// gives none.
    ///
    /// # Errors
    ///
    /// [`HandleError::Timeout`]: not all have answered in time; jobs may still run.
    /// [`HandleError::OwnThread`]: called on the thread of a shard; nothing was queued.
    /// [`HandleError::Panicked`], [`HandleError::QueueFull`]: the job panicked or was not queued on
    /// one of them; the others have run it. [`HandleError::ServerGone`].
    pub fn call_each<R: Send + 'static>(
        &self,
        timeout: Duration,
        job: impl Fn(usize, &mut A, &mut Control<'_, A>) -> R + Send + Sync + 'static,
    ) -> Result<Vec<(usize, R)>, HandleError> {
        if self.shards.iter().any(|server| server.is_on_own_thread()) {
            return Err(HandleError::OwnThread);
        }
        let answers = Arc::new(Mutex::new(Vec::with_capacity(self.shards.len())));
        // Nothing is sent: it ends when no job is left, run or dropped.
        let (unfinished, finished) = mpsc::channel::<()>();
        let asked = {
            let answers = Arc::clone(&answers);
            let job = move |shard, app: &mut A, control: &mut Control<'_, A>| {
                let _unfinished = &unfinished;
                let answer = job(shard, app, control);
                let mut answers = answers.lock().unwrap_or_else(PoisonError::into_inner);
                answers.push((shard, answer));
            };
            self.push_each(job, Command::Call)
        };
        if let Err(mpsc::RecvTimeoutError::Timeout) = finished.recv_timeout(timeout) {
            return Err(HandleError::Timeout);
        }
        asked?;
        let mut answers = answers.lock().unwrap_or_else(PoisonError::into_inner);
        let mut answers = std::mem::take(&mut *answers);
        answers.sort_by_key(|&(shard, _)| shard);
        let has_answered = |shard| answers.iter().any(|&(other, _)| other == shard);
        let mut silent = (0..)
            .zip(self.shards.iter())
            .filter(|&(shard, _)| !has_answered(shard));
        if silent.any(|(_, server)| !server.is_closed()) {
            return Err(HandleError::Panicked);
        }
        if answers.is_empty() {
            return Err(HandleError::ServerGone);
        }
        Ok(answers)
    }

    /// Returns the counters at the end of the last iteration, without asking the loop.
    ///
    /// Of several shards the sum, where `max_connections` is the cap of all. `peak` is an upper
    /// bound on the highest number of concurrent connections: at most the cap, or one shard's own
    /// peak if that is higher.
    pub fn stats(&self) -> Stats {
        self.sum(self.shards.iter().map(|server| server.stats()))
    }

    /// Returns every counter and measurement: see [`Control::metrics`]. For the counters alone,
    /// [`Handle::stats`] does not ask the loop.
    ///
    /// Of several shards the sum. Listeners of one name are one. Alarms are left out, because each
    /// is a shard's own; so are the histograms and listeners of a shard that has ended.
    ///
    /// # Errors
    ///
    /// As for [`Handle::call_each`].
    pub fn metrics(&self, timeout: Duration) -> Result<Metrics, HandleError> {
        let answers = self.call_each(timeout, |_, _, control| control.metrics())?;
        let has_answered = |shard| answers.iter().any(|&(other, _)| other == shard);
        // The counters of an ended shard are not forgotten; its histograms are.
        let ended: Vec<_> = (0..)
            .zip(self.shards.iter())
            .filter(|&(shard, _)| !has_answered(shard))
            .map(|(_, server)| server.stats())
            .collect();
        let mut all = answers.into_iter().map(|(_, metrics)| metrics);
        let Some(mut sum) = all.next() else {
            return Err(HandleError::ServerGone);
        };
        if self.one().is_ok() {
            return Ok(sum);
        }
        sum.alarms.clear();
        let mut stats = vec![sum.stats.clone()];
        stats.extend(ended);
        for other in all {
            stats.push(other.stats);
            sum.histograms.add(&other.histograms);
            sum.descriptors += other.descriptors;
            sum.memory_limit = sum
                .memory_limit
                .zip(other.memory_limit)
                .map(|(one, other)| one.saturating_add(other));
            add_listeners(&mut sum.listeners, other.listeners, self.cap());
        }
        sum.stats = self.sum(stats);
        Ok(sum)
    }

    /// Returns all listeners. Of several shards, listeners of one name are one, which is listening
    /// if one of them is.
    ///
    /// # Errors
    ///
    /// As for [`Handle::call_each`].
    pub fn listeners(&self, timeout: Duration) -> Result<Vec<ListenerInfo>, HandleError> {
        let mut all = Vec::new();
        for (_, listeners) in self.call_each(timeout, |_, _, control| control.listeners())? {
            add_listeners(&mut all, listeners, self.cap());
        }
        Ok(all)
    }

    /// Returns one listener, by id, port or name: its state, its connections, its limit. An id is
    /// that of one shard's listener; port and name are those of all shards.
    ///
    /// # Errors
    ///
    /// [`HandleError::NoListener`] if there is none, as distinct from [`HandleError::Timeout`];
    /// otherwise as for [`Handle::call_each`].
    pub fn listener(
        &self,
        which: impl Into<ListenerRef>,
        timeout: Duration,
    ) -> Result<ListenerInfo, HandleError> {
        let which = which.into();
        let missing = HandleError::NoListener(which.clone());
        let answers = self.call_each(timeout, move |_, _, control| {
            control.listener(which.clone())
        })?;
        let mut found = Vec::new();
        for (_, answer) in answers {
            add_listeners(&mut found, answer.ok(), self.cap());
        }
        found.into_iter().next().ok_or(missing)
    }

    /// Changes the cap: see [`Config::max_connections`]. The change of one server is queued. That
    /// of several shards holds when this returns.
    ///
    /// # Errors
    ///
    /// [`HandleError::Refused`] for more than 16 million, with the cap unchanged; otherwise as for
    /// [`Handle::post_each`].
    pub fn set_max_connections(&self, connections: usize) -> Result<(), HandleError> {
        Config::max_connections(connections).check()?;
        if let Some(cap) = &self.common_cap {
            if self.shards.iter().all(|server| server.is_closed()) {
                return Err(HandleError::ServerGone);
            }
            cap.set(connections);
            return Ok(());
        }
        let change = move |_, _: &mut A, control: &mut Control<'_, A>| {
            // It was checked above.
            let _ = control.reconfigure(|config| config.max_connections = connections);
        };
        self.push_each(change, Command::Call)
    }

    /// Calls `change` with every shard's [`Control`], and waits until all have returned.
    ///
    /// ```
    /// # use portcullis::{Handle, HandleError};
    /// # fn change(handle: &Handle) -> Result<(), HandleError> {
    /// let second = std::time::Duration::from_secs(1);
    /// handle.change(second, |control| control.suspend("games"))?;
    /// handle.change(second, |control| control.reconfigure(|config| config.recent_closes = 9))?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`HandleError::NoListener`] if no shard has the listener. [`HandleError::Refused`] with the
    /// first other error of a shard; the others keep their changes. Otherwise as for
    /// [`Handle::call_each`].
    pub fn change(
        &self,
        timeout: Duration,
        change: impl Fn(&mut Control<'_, A>) -> crate::Result<()> + Send + Sync + 'static,
    ) -> Result<(), HandleError> {
        merge::agree(self.call_each(timeout, move |_, _, control| change(control))?)
    }

    /// Makes the poll of each loop return, for work of the loop's owner.
    ///
    /// # Errors
    ///
    /// [`HandleError::ServerGone`].
    pub fn wake(&self) -> Result<(), HandleError> {
        self.each(|_, server| server.wake())
    }

    /// Starts a drain, after the commands that are queued already: see [`Control::drain`]. Without
    /// grace a drain passes them, as described above.
    ///
    /// A full queue does not refuse this command. [`Spawned::join`](crate::Spawned::join) returns
    /// the report.
    ///
    /// # Errors
    ///
    /// [`HandleError::ServerGone`].
    #[doc(alias = "graceful shutdown")]
    pub fn drain(&self, grace: Duration) -> Result<(), HandleError> {
        self.each(|_, server| server.push(Command::Drain(grace)))
    }

    /// Ends [`Server::run`](crate::Server::run): see [`Control::stop`]. Passes the commands that
    /// are queued already, as described above; they stay queued. A full queue does not refuse this
    /// command.
    ///
    /// # Errors
    ///
    /// [`HandleError::ServerGone`].
    pub fn stop(&self) -> Result<(), HandleError> {
        self.each(|_, server| server.push(Command::Stop))
    }
}

impl<A> fmt::Debug for Handle<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = f.debug_struct("Handle");
        if let Some(cap) = &self.common_cap {
            shown.field("shards", &self.shards.len());
            shown.field("common_cap", cap);
        }
        shown.finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_handle_is_send_and_sync_for_every_state() {
        fn check<T: Send + Sync + Clone>() {}
        check::<Handle<std::rc::Rc<std::cell::RefCell<u8>>>>();
    }
}
