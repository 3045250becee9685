//! Time for which the loop has looked at no socket, because callbacks worked: no peer is to blame
//! for it.

use std::time::Duration;

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
    /// The connection that had the last turn.
    turn: Option<ConnId>,
    /// From then on that turn is a long one.
    long_from: Time,
}

impl Busy {
    pub(super) fn new(now: Time) -> Self {
        Self {
            polled_at: now,
            iteration: None,
            turn: None,
            long_from: Time::NEVER,
        }
    }

    /// The last turn, which has ended by `now`, was a long one.
    #[inline]
    pub(super) fn was_long(&self, now: Time) -> bool {
        now >= self.long_from
    }

    /// The connection that had the last turn.
    pub(super) fn last_turn(&self) -> Option<ConnId> {
        self.turn
    }

    #[inline]
    pub(super) fn begin_turn(&mut self, id: ConnId, now: Time) {
        self.turn = Some(id);
        self.long_from = now.after(LONG_TURN);
    }

    /// The iteration has ended with a poll that began at `polled` and has returned at `now`. True if
    /// it was a long one.
    pub(super) fn end_iteration(&mut self, polled: Time, now: Time) -> bool {
        self.long_from = Time::NEVER;
        let began = std::mem::replace(&mut self.polled_at, now);
        let is_long = polled >= began.after(LONG_ITERATION);
        if is_long {
            self.iteration = Some((began, polled));
        }
        is_long
    }

    /// How much of the time before this deadline of a peer's does not count: all of the last long
    /// iteration, if the deadline has passed in it.
    pub(super) fn excuses(&self, deadline: Time) -> Option<Duration> {
        let (began, ended) = self.iteration?;
        (began < deadline && deadline <= ended).then(|| ended.since(began))
    }
}
