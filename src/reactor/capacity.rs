//! The state of the whole server that decides, with the listener's own, whether a client may come
//! in.

use crate::proto::{Bucket, Rate, Time};

/// What admission depends on beside the listener, at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Capacity {
    /// A slot is free.
    pub(super) has_slot: bool,
    /// If no slot is free: the time from which a connection can be evicted for the next client.
    pub(super) evicts_at: Time,
    pub(super) cap: usize,
    /// Descriptors or socket memory ran out.
    pub(super) out_of_fds: bool,
    /// Too many connections are pending, and none can be evicted before then.
    pub(super) crowded_until: Option<Time>,
    /// The server's own rate admits no client before then.
    pub(super) limited_until: Time,
    pub(super) now: Time,
}

impl Capacity {
    /// True if nothing of the server's holds back a client.
    pub(super) fn is_unrestricted(&self) -> bool {
        self.has_slot
            && self.crowded_until.is_none()
            && !self.out_of_fds
            && self.limited_until == Time::ZERO
    }

    /// True if every listener has the same state under both, as long as no time passes. A past
    /// time may have moved: clients that come or are evicted move it.
    #[inline]
    pub(super) fn is_same(&self, other: &Self) -> bool {
        let Self {
            has_slot,
            evicts_at,
            cap,
            out_of_fds,
            crowded_until,
            limited_until,
            now,
        } = *self;
        let is_past = |time, later| time <= now && later <= other.now;
        let is_same = |time, later| time == later || is_past(time, later);
        let is_as_crowded = match (crowded_until, other.crowded_until) {
            (Some(time), Some(later)) => is_same(time, later),
            (None, None) => true,
            _ => false,
        };
        is_as_crowded
            && is_same(evicts_at, other.evicts_at)
            && is_same(limited_until, other.limited_until)
            && (has_slot, cap, out_of_fds) == (other.has_slot, other.cap, other.out_of_fds)
    }
}

/// The bucket of a rate that may not be set.
#[derive(Debug, Default)]
pub(super) struct OptionalBucket(Bucket);

impl OptionalBucket {
    /// When the next token is there.
    #[inline]
    pub(super) fn ready_at(&self, rate: Option<Rate>) -> Time {
        rate.map_or(Time::ZERO, |rate| self.0.ready_at(&rate))
    }

    /// Adapts to a rate that may have changed.
    pub(super) fn follow(&mut self, rate: Option<Rate>, now: Time) {
        if let Some(rate) = rate {
            self.0.follow(&rate, now);
        }
    }

    pub(super) fn spend(&mut self, rate: Option<Rate>, now: Time) {
        if let Some(rate) = rate {
            self.0.charge(&rate, 1, now);
        }
    }
}
