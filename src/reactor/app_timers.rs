//! The application's own timers: jobs that the loop runs at their times.

use std::collections::BTreeMap;

use crate::handler::LocalJob;
use crate::id::{ServerNumber, TimerId};
use crate::proto::Time;

/// Jobs by time, and among those of one time in the order of the calls.
pub(super) struct AppTimers<A> {
    jobs: BTreeMap<(Time, u64), LocalJob<A>>,
    /// The time of the first one.
    next: Time,
    /// Number of timers that were ever set.
    set: u64,
}

impl<A> Default for AppTimers<A> {
    fn default() -> Self {
        Self {
            jobs: BTreeMap::new(),
            next: Time::NEVER,
            set: 0,
        }
    }
}

impl<A> AppTimers<A> {
    pub(super) fn set(&mut self, server: ServerNumber, at: Time, job: LocalJob<A>) -> TimerId {
        let number = self.set;
        self.set += 1;
        self.jobs.insert((at, number), job);
        self.next = self.next.min(at);
        TimerId { at, number, server }
    }

    /// Returns the job that is not run any more, if the timer is still set.
    #[must_use = "a job's destructor is foreign code"]
    pub(super) fn cancel(&mut self, server: ServerNumber, id: TimerId) -> Option<LocalJob<A>> {
        let own = id.server == server;
        let job = own.then(|| self.jobs.remove(&(id.at, id.number)))?;
        self.find_next();
        job
    }

    fn find_next(&mut self) {
        let first = self.jobs.first_key_value();
        self.next = first.map_or(Time::NEVER, |(&(at, _), _)| at);
    }

    /// When the next job is due.
    #[inline]
    pub(super) fn next(&self) -> Time {
        self.next
    }

    /// Number of timers that were ever set, for [`AppTimers::take_due`].
    pub(super) fn count(&self) -> u64 {
        self.set
    }

    /// Takes the next job that is due, if it belongs to one of the first `count` timers: a timer
    /// that is set meanwhile waits for the next iteration.
    pub(super) fn take_due(&mut self, now: Time, count: u64) -> Option<LocalJob<A>> {
        let first = self.jobs.first_entry()?;
        let &(at, number) = first.key();
        if at > now || number >= count {
            return None;
        }
        let job = first.remove();
        self.find_next();
        Some(job)
    }

    /// All jobs, once the server ends.
    #[must_use = "a job's destructor is foreign code"]
    pub(super) fn take_all(&mut self) -> impl Iterator<Item = LocalJob<A>> + use<A> {
        self.next = Time::NEVER;
        std::mem::take(&mut self.jobs).into_values()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn at(millis: u64) -> Time {
        Time::from_start(Duration::from_millis(millis))
    }

    fn due(timers: &mut AppTimers<()>, now: Time) -> bool {
        let count = timers.count();
        timers.take_due(now, count).is_some()
    }

    #[test]
    fn jobs_are_due_in_the_order_of_their_times_and_calls() {
        let mut timers = AppTimers::<()>::default();
        let server = ServerNumber::NONE;
        assert_eq!(timers.next(), Time::NEVER);
        let late = timers.set(server, at(20), Box::new(|_, _| ()));
        timers.set(server, at(10), Box::new(|_, _| ()));
        let twin = timers.set(server, at(10), Box::new(|_, _| ()));
        assert_eq!(timers.next(), at(10));
        assert!(!due(&mut timers, at(9)));
        assert!(due(&mut timers, at(10)));
        assert!(timers.cancel(server, twin).is_some() && timers.cancel(server, twin).is_none());
        assert!(!due(&mut timers, at(19)));
        assert_eq!(timers.next(), at(20));
        assert!(due(&mut timers, at(30)));
        assert!(timers.cancel(server, late).is_none());
    }

    #[test]
    fn a_timer_that_is_set_meanwhile_waits() {
        let mut timers = AppTimers::<()>::default();
        timers.set(ServerNumber::NONE, at(10), Box::new(|_, _| ()));
        let count = timers.count();
        timers.set(ServerNumber::NONE, at(10), Box::new(|_, _| ()));
        assert!(timers.take_due(at(10), count).is_some());
        assert!(timers.take_due(at(10), count).is_none());
        assert!(due(&mut timers, at(10)));
    }

    #[test]
    fn another_server_s_id_cancels_nothing() {
        let mut timers = AppTimers::<()>::default();
        let server = ServerNumber::next();
        let id = timers.set(server, at(1), Box::new(|_, _| ()));
        assert!(timers.cancel(ServerNumber::next(), id).is_none());
        assert!(timers.cancel(server, id).is_some());
    }
}
