//! The one thing that reaches all shards.

use std::fmt;
use std::sync::{mpsc, Arc};
use std::time::Duration;

use crate::config::Listen;
use crate::config::{Config, MAX_CONNECTIONS};
use crate::control::{Control, ListenerInfo, ListenerState};
use crate::error::{Error, Result as Outcome};
use crate::handle::{Handle, HandleError};
use crate::id::ListenerRef;
use crate::metrics::Metrics;
use crate::reactor::clock::Deadline;
use crate::reactor::shared_cap::SharedCap;
use crate::stats::Stats;

/// Reaches all shards from any thread: post work to each, ask all, change all, drain all.
///
/// `Clone`, `Send` and `Sync` whatever the application's state is. A [`ConnId`](crate::ConnId) is one server's: what concerns
/// one connection goes through the handle of its shard, [`ShardsHandle::shard`].
///
/// It is there once all shards run. Handlers that need it get it into their shard's state by a job:
///
/// ```
/// use portcullis::{ShardsHandle, SpawnedShards};
///
/// #[derive(Default)]
/// struct State { all: Option<ShardsHandle<State>> }
///
/// # fn introduce(shards: &SpawnedShards<State>) -> Result<(), portcullis::HandleError> {
/// let all = shards.handle.clone();
/// shards.handle.post_each(move |_shard, state, _control| state.all = Some(all.clone()))?;
/// # Ok(()) }
/// ```
///
/// What is asked of all is asked of those that still run. [`HandleError::ServerGone`] says that none does.
/// What changes all is no transaction: each shard does it in a turn of its own.
pub struct ShardsHandle<A = ()> {
    handles: Arc<[Handle<A>]>,
    shared_cap: Arc<SharedCap>,
}

impl<A> Clone for ShardsHandle<A> {
    fn clone(&self) -> Self {
        Self {
            handles: Arc::clone(&self.handles),
            shared_cap: Arc::clone(&self.shared_cap),
        }
    }
}

impl<A> ShardsHandle<A> {
    pub(super) fn new(handles: Vec<Handle<A>>, shared_cap: Arc<SharedCap>) -> Self {
        Self {
            handles: handles.into(),
            shared_cap,
        }
    }

    /// The handle of one shard, by its number: to send to its connections, to ask it alone.
    ///
    /// ```
    /// # use portcullis::{ConnId, HandleError, ShardsHandle};
    /// # fn tell(shards: &ShardsHandle, shard: usize, id: ConnId) -> Result<(), HandleError> {
    /// if let Some(handle) = shards.shard(shard) {
    ///     handle.send(id, "news")?;
    /// }
    /// # Ok(()) }
    /// ```
    pub fn shard(&self, shard: usize) -> Option<&Handle<A>> {
        self.handles.get(shard)
    }

    /// The handles of all shards, in the order of their numbers.
    pub fn shards(&self) -> &[Handle<A>] {
        &self.handles
    }

    /// Runs a job on each shard, with the shard's number, state and controls. A panic in it is caught, logged and counted.
    ///
    /// # Errors
    ///
    /// [`HandleError::QueueFull`] if one could not take it; the others have. [`HandleError::ServerGone`].
    pub fn post_each(
        &self,
        job: impl Fn(usize, &mut A, &mut Control<'_, A>) + Send + Sync + 'static,
    ) -> Result<(), HandleError> {
        let job = Arc::new(job);
        self.each(|shard, handle| {
            let job = Arc::clone(&job);
            handle.post(move |app, control| job(shard, app, control))
        })
    }

    /// Runs a job on each shard, all at the same time, and waits for what they return, at most `timeout`: each answer with the
    /// number of its shard, in their order. A shard that has ended gives none.
    ///
    /// # Errors
    ///
    /// [`HandleError::Timeout`]: not all have answered in time, and jobs may still run. [`HandleError::OwnThread`]: asked on a thread
    /// of the shards; nothing was queued. [`HandleError::Panicked`], [`HandleError::QueueFull`]: the job did or could not be taken
    /// on one of them; the others have done it. [`HandleError::ServerGone`].
    pub fn call_each<R: Send + 'static>(
        &self,
        timeout: Duration,
        job: impl Fn(usize, &mut A, &mut Control<'_, A>) -> R + Send + Sync + 'static,
    ) -> Result<Vec<(usize, R)>, HandleError> {
        if self.handles.iter().any(Handle::is_on_own_thread) {
            return Err(HandleError::OwnThread);
        }
        let deadline = Deadline::after(timeout);
        let (answer, answered) = mpsc::channel();
        let job = Arc::new(job);
        let asked = self.each(|shard, handle| {
            let (job, answer) = (Arc::clone(&job), answer.clone());
            handle.post(move |app, control| {
                // Nobody listens any more if this fails: the asker timed out.
                let _ = answer.send((shard, job(shard, app, control)));
            })
        });
        drop(answer);
        let mut answers = Vec::with_capacity(self.handles.len());
        loop {
            match answered.recv_timeout(deadline.left()) {
                Ok(one) => answers.push(one),
                Err(mpsc::RecvTimeoutError::Timeout) => return Err(HandleError::Timeout),
                // All have answered that are going to.
                Err(mpsc::RecvTimeoutError::Disconnected) => break,
            }
        }
        asked?;
        answers.sort_by_key(|&(shard, _)| shard);
        let has_answered = |shard| answers.iter().any(|&(other, _)| other == shard);
        let mut silent = (0..)
            .zip(self.handles.iter())
            .filter(|&(shard, _)| !has_answered(shard));
        if silent.any(|(_, handle)| !handle.is_closed()) {
            return Err(HandleError::Panicked);
        }
        if answers.is_empty() {
            return Err(HandleError::ServerGone);
        }
        Ok(answers)
    }

    /// The counters of all together, each shard's at the end of its own last turn, without asking them. `max_connections` is the cap of
    /// all; `peak` is no less than the most at one time, and no more than the cap or what one shard alone has had.
    pub fn stats(&self) -> Stats {
        self.sum(self.handles.iter().map(Handle::stats))
    }

    /// Everything that is counted and measured, of all together; listeners of one name are one, and the alarms, each a shard's own, are
    /// left out. For one shard: [`ShardsHandle::shard`] and [`Handle::metrics`].
    ///
    /// # Errors
    ///
    /// As for [`ShardsHandle::call_each`].
    pub fn metrics(&self, timeout: Duration) -> Result<Metrics, HandleError> {
        let answers = self.call_each(timeout, |_, _, control| control.metrics())?;
        let mut all = answers.into_iter().map(|(_, metrics)| metrics);
        let Some(mut sum) = all.next() else {
            return Err(HandleError::ServerGone);
        };
        sum.alarms.clear();
        let mut stats = vec![sum.stats.clone()];
        for other in all {
            stats.push(other.stats);
            sum.histograms.add(&other.histograms);
            sum.descriptors += other.descriptors;
            sum.memory_limit = sum
                .memory_limit
                .zip(other.memory_limit)
                .map(|(one, other)| one.saturating_add(other));
            add_listeners(&mut sum.listeners, other.listeners, self.max_connections());
        }
        sum.stats = self.sum(stats);
        Ok(sum)
    }

    /// All listeners; those of one name are one, which listens if one of them does.
    ///
    /// # Errors
    ///
    /// As for [`ShardsHandle::call_each`].
    pub fn listeners(&self, timeout: Duration) -> Result<Vec<ListenerInfo>, HandleError> {
        let mut all = Vec::new();
        for (_, listeners) in self.call_each(timeout, |_, _, control| control.listeners())? {
            add_listeners(&mut all, listeners, self.max_connections());
        }
        Ok(all)
    }

    /// The cap on all shards together.
    pub fn max_connections(&self) -> usize {
        self.shared_cap.cap()
    }

    /// Changes the cap on all shards together, at once: when this returns, nobody more comes in beyond it. Else as
    /// [`Control::set_max_connections`], which does the same on any shard.
    ///
    /// # Errors
    ///
    /// [`HandleError::Refused`] for more than 16 million; the cap is as it was.
    pub fn set_max_connections(&self, connections: usize) -> Result<(), HandleError> {
        Config::new().max_connections(connections).check()?;
        debug_assert!(connections <= MAX_CONNECTIONS);
        self.shared_cap.set_cap(connections);
        Ok(())
    }

    /// Changes options of every shard and waits until that is done: see [`Control::reconfigure`].
    ///
    /// # Errors
    ///
    /// [`HandleError::Refused`] for a value that cannot work; else as for [`ShardsHandle::call_each`].
    pub fn reconfigure(
        &self,
        timeout: Duration,
        change: impl Fn(Config) -> Config + Send + Sync + 'static,
    ) -> Result<(), HandleError> {
        agree(self.call_each(timeout, move |_, _, control| control.reconfigure(&change))?)
    }

    /// Changes options of a listener on every shard that has it and waits until that is done: see
    /// [`Control::reconfigure_listener`].
    ///
    /// # Errors
    ///
    /// [`HandleError::NoListener`] if no shard has it; [`HandleError::Refused`] for a value that cannot work or that an open port cannot
    /// change; else as for [`ShardsHandle::call_each`].
    pub fn reconfigure_listener(
        &self,
        which: impl Into<ListenerRef>,
        timeout: Duration,
        change: impl Fn(Listen) -> Listen + Send + Sync + 'static,
    ) -> Result<(), HandleError> {
        let which = which.into();
        let job = move |_, _: &mut A, control: &mut Control<'_, A>| {
            control.reconfigure_listener(which.clone(), &change)
        };
        agree(self.call_each(timeout, job)?)
    }

    /// Changes the TLS of a listener on every shard that has it: see [`Control::set_tls`].
    ///
    /// # Errors
    ///
    /// As for [`ShardsHandle::reconfigure_listener`].
    #[cfg(feature = "tls")]
    pub fn set_tls(
        &self,
        which: impl Into<ListenerRef>,
        timeout: Duration,
        config: impl Into<crate::tls::TlsConfig>,
    ) -> Result<(), HandleError> {
        let config = config.into();
        self.reconfigure_listener(which, timeout, move |listen| listen.tls(config.clone()))
    }

    /// Takes a listener out of the poll on every shard that has it, and waits until that is done: see [`Control::suspend`].
    ///
    /// # Errors
    ///
    /// [`HandleError::NoListener`] if no shard has it; else as for [`ShardsHandle::call_each`].
    pub fn suspend(
        &self,
        which: impl Into<ListenerRef>,
        timeout: Duration,
    ) -> Result<(), HandleError> {
        let which = which.into();
        agree(self.call_each(timeout, move |_, _, control| control.suspend(which.clone()))?)
    }

    /// Accepts again, on every shard that has the listener: see [`Control::resume`].
    ///
    /// # Errors
    ///
    /// As for [`ShardsHandle::suspend`].
    pub fn resume(
        &self,
        which: impl Into<ListenerRef>,
        timeout: Duration,
    ) -> Result<(), HandleError> {
        let which = which.into();
        agree(self.call_each(timeout, move |_, _, control| control.resume(which.clone()))?)
    }

    /// Closes a listener's port on every shard that has it: see [`Control::close_listener`].
    ///
    /// # Errors
    ///
    /// As for [`ShardsHandle::suspend`].
    pub fn close_listener(
        &self,
        which: impl Into<ListenerRef>,
        timeout: Duration,
    ) -> Result<(), HandleError> {
        let which = which.into();
        agree(self.call_each(timeout, move |_, _, control| {
            control.close_listener(which.clone())
        })?)
    }

    /// Starts a drain of every shard: see [`Handle::drain`]. [`SpawnedShards::join`](crate::SpawnedShards::join) says how it went.
    ///
    /// # Errors
    ///
    /// [`HandleError::ServerGone`].
    pub fn drain(&self, grace: Duration) -> Result<(), HandleError> {
        self.each(|_, handle| handle.drain(grace))
    }

    /// Ends every shard's [`Server::run`](crate::Server::run): see [`Handle::stop`].
    ///
    /// # Errors
    ///
    /// [`HandleError::ServerGone`].
    pub fn stop(&self) -> Result<(), HandleError> {
        self.each(|_, handle| handle.stop())
    }

    /// Does something with all of them, whatever comes of it with one. The first failure; that some have gone is none.
    fn each(
        &self,
        mut act: impl FnMut(usize, &Handle<A>) -> Result<(), HandleError>,
    ) -> Result<(), HandleError> {
        let mut failure = Some(HandleError::ServerGone);
        for (shard, handle) in self.handles.iter().enumerate() {
            match (act(shard, handle), &failure) {
                (Ok(()), Some(HandleError::ServerGone)) => failure = None,
                (Err(HandleError::ServerGone), _) | (Ok(()), _) => {}
                (Err(error), None | Some(HandleError::ServerGone)) => failure = Some(error),
                (Err(_), Some(_)) => {}
            }
        }
        failure.map_or(Ok(()), Err)
    }

    fn sum(&self, all: impl IntoIterator<Item = Stats>) -> Stats {
        let mut sum = Stats::default();
        let mut largest = 0;
        for stats in all {
            largest = largest.max(stats.peak);
            sum.add(&stats);
        }
        sum.max_connections = self.max_connections();
        sum.peak = sum.peak.min(sum.max_connections.max(largest));
        sum
    }
}

/// Who does not have the listener has nothing to say, unless nobody has it.
fn agree(answers: Vec<(usize, Outcome<()>)>) -> Result<(), HandleError> {
    let mut verdict = Err(HandleError::ServerGone);
    for (_, answer) in answers {
        match (answer, &verdict) {
            (Ok(()), Err(HandleError::ServerGone | HandleError::NoListener(_))) => verdict = Ok(()),
            (Ok(()), _) | (Err(Error::NoListener { .. }), Ok(())) => {}
            (Err(error), Ok(()) | Err(HandleError::ServerGone | HandleError::NoListener(_))) => {
                verdict = Err(error.into());
            }
            (Err(_), Err(_)) => {}
        }
    }
    verdict
}

/// Adds one shard's listeners to those of the others, by name.
pub(super) fn add_listeners(all: &mut Vec<ListenerInfo>, more: Vec<ListenerInfo>, cap: usize) {
    for listener in more {
        let Some(same) = all.iter_mut().find(|other| other.name == listener.name) else {
            all.push(listener);
            continue;
        };
        same.connections += listener.connections;
        same.accepted += listener.accepted;
        same.max_connections = same
            .max_connections
            .saturating_add(listener.max_connections)
            .min(cap);
        if listener.state == ListenerState::Listening {
            same.state = listener.state;
        }
    }
}

impl<A> fmt::Debug for ShardsHandle<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ShardsHandle")
            .field("shards", &self.handles.len())
            .field("shared_cap", &self.shared_cap)
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_handle_is_send_and_sync_for_every_state() {
        fn check<T: Send + Sync + Clone>() {}
        check::<ShardsHandle<std::rc::Rc<std::cell::RefCell<u8>>>>();
    }

    #[test]
    fn who_has_no_such_listener_has_nothing_to_say() {
        let none = || Error::NoListener { listener: 7.into() };
        let wrong = || Error::option("a", "b");
        let verdict = |answers: Vec<Outcome<()>>| agree(answers.into_iter().enumerate().collect());
        assert_eq!(verdict(vec![Ok(()), Err(none())]), Ok(()));
        assert_eq!(verdict(vec![Err(none()), Ok(())]), Ok(()));
        assert_eq!(
            verdict(vec![Err(none())]),
            Err(HandleError::NoListener(7.into()))
        );
        assert_eq!(verdict(vec![]), Err(HandleError::ServerGone));
        for answers in [
            vec![Err(wrong()), Ok(())],
            vec![Ok(()), Err(wrong())],
            vec![Err(none()), Err(wrong()), Ok(())],
        ] {
            assert!(matches!(verdict(answers), Err(HandleError::Refused(_))));
        }
    }
}
