//! The time of an iteration: its histogram, and the time in which callbacks keep the loop from its
//! sockets, which no peer is charged for.

use std::time::Duration;

use crate::histogram::Histogram;
use crate::id::ConnId;
use crate::proto::Time;

/// A turn in which a callback has worked.
const LONG_TURN: Duration = Duration::from_millis(5);

/// Time between two polls in which callbacks have worked: a client in the backlog may have given
/// up, and a peer's answer may have waited.
const LONG_ITERATION: Duration = Duration::from_millis(5);

pub(super) struct Busy {
    /// When the last poll returned.
    polled_at: Time,
    /// When the last long iteration began and ended.
    iteration: Option<(Time, Time)>,
    /// The connection whose turn began last, and when.
    turn: Option<(ConnId, Time)>,
    /// When that turn becomes a long one.
    long_from: Time,
    /// The durations of all iterations, without their polls.
    pub(super) iteration_times: Histogram,
}

impl Busy {
    pub(super) fn new(now: Time) -> Self {
        Self {
            polled_at: now,
            iteration: None,
            turn: None,
            long_from: Time::NEVER,
            iteration_times: Histogram::default(),
        }
    }

    /// The last turn, which has ended by `now`, was a long one.
    #[inline]
    pub(super) fn was_long(&self, now: Time) -> bool {
        now >= self.long_from
    }

    /// The connection that had the last turn, and when that began.
    pub(super) fn last_turn(&self) -> Option<(ConnId, Time)> {
        self.turn
    }

    #[inline]
    pub(super) fn begin_turn(&mut self, id: ConnId, now: Time) {
        self.turn = Some((id, now));
        self.long_from = now.after(LONG_TURN);
    }

    /// Counts the iteration that began when the last poll returned and ends at `now`.
    #[inline]
    pub(super) fn record_iteration(&mut self, now: Time) {
        self.iteration_times
            .record(now.micros_since(self.polled_at));
    }

    /// An iteration has ended with a poll that began at `polled` and returned at `now`. True if the
    /// iteration was a long one.
    pub(super) fn end_iteration(&mut self, polled: Time, now: Time) -> bool {
        self.long_from = Time::NEVER;
        let began = std::mem::replace(&mut self.polled_at, now);
        let is_long = polled >= began.after(LONG_ITERATION);
        if is_long {
            self.iteration = Some((began, polled));
        }
        is_long
    }

    /// Returns the time that is not charged to a peer with this deadline: all of the last long
    /// iteration, if the deadline passed in it.
    pub(super) fn excuses(&self, deadline: Time) -> Option<Duration> {
        let (began, ended) = self.iteration?;
        (began < deadline && deadline <= ended).then(|| ended.since(began))
    }
}
