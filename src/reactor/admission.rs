//! Admission control: the one decision whether the next client of a listener may come in.
//!
//! It rests on the cap, the listener's own limit, the accept rates, the pending connections (those
//! that have not opened yet) and on whether descriptors ran out.

use super::bans::Bans;
use super::capacity::{Capacity, OptionalBucket};
use super::connections::Connections;
use super::fd_exhaustion::FdExhaustion;
use super::listener::Listener;
use super::pending::Pending;
use crate::config::Config;
use crate::id::ConnId;
use crate::proto::Time;
use crate::reason::CloseReason;

/// The server's side of admission.
#[derive(Default)]
pub(super) struct Admission {
    /// Of the server's accept rate.
    bucket: OptionalBucket,
    pending: Pending,
    pub(super) fds: FdExhaustion,
    pub(super) bans: Bans,
}

impl Admission {
    pub(super) fn capacity<S>(
        &self,
        conns: &Connections<S>,
        config: &Config,
        now: Time,
    ) -> Capacity {
        // Most often none is pending, and the limit, at least 1, need not be computed.
        let crowded = self.pending.len() > 0 && self.pending.len() >= max_pending(conns, config);
        let crowded_until = crowded.then(|| {
            let oldest = self.pending.oldest(conns).unwrap_or(now);
            oldest.after(config.pending_limits.grace)
        });
        Capacity {
            has_slot: conns.has_room(),
            may_evict: crowded && conns.is_exhausted(),
            cap: conns.cap(),
            out_of_fds: self.fds.is_on(),
            crowded_until,
            limited_until: self.bucket.ready_at(config.accept_rate),
            now,
        }
    }

    /// Returns why no client may come in through this listener now. If there is no reason, a slot
    /// is reserved for the next client, or a pending connection can be evicted for it.
    pub(super) fn reserve<S, L>(
        &self,
        conns: &mut Connections<S>,
        listener: &Listener<L>,
        config: &Config,
        now: Time,
    ) -> Option<CloseReason> {
        loop {
            let capacity = self.capacity(conns, config, now);
            let refusal = self.refusal_at(conns, listener, config, &capacity);
            // Another server with the same cap may have been faster.
            if refusal.is_some() || !capacity.has_slot || conns.reserve() {
                return refusal;
            }
        }
    }

    /// As [`Admission::reserve`], without a reservation.
    pub(super) fn refusal<S, L>(
        &self,
        conns: &Connections<S>,
        listener: &Listener<L>,
        config: &Config,
        now: Time,
    ) -> Option<CloseReason> {
        self.refusal_at(conns, listener, config, &self.capacity(conns, config, now))
    }

    fn refusal_at<S, L>(
        &self,
        conns: &Connections<S>,
        listener: &Listener<L>,
        config: &Config,
        capacity: &Capacity,
    ) -> Option<CloseReason> {
        if listener.is_full(capacity) {
            return Some(CloseReason::AtCapacity);
        }
        if listener.limited_until(capacity) > capacity.now {
            return Some(CloseReason::RateLimited);
        }
        let crowded = capacity.crowded_until.is_some() && listener.options.opens_later();
        // The oldest may be evictable by age, but wait for this server and not for its peer.
        let refused = crowded && self.candidate(conns, config, capacity.now).is_none();
        refused.then_some(CloseReason::AtCapacity)
    }

    /// The pending connection to evict for a client of this listener, if too many are pending.
    pub(super) fn eviction_candidate<S, L>(
        &self,
        conns: &Connections<S>,
        listener: &Listener<L>,
        config: &Config,
        now: Time,
    ) -> Option<ConnId> {
        let crowded = listener.options.opens_later()
            && self.capacity(conns, config, now).crowded_until.is_some();
        crowded
            .then(|| self.candidate(conns, config, now))
            .flatten()
    }

    fn candidate<S>(&self, conns: &Connections<S>, config: &Config, now: Time) -> Option<ConnId> {
        let grace = config.pending_limits.grace;
        // No connection is older than the server.
        if now < Time::ZERO.after(grace) {
            return None;
        }
        let accepted_by = Time::ZERO.after(now.since(Time::ZERO.after(grace)));
        self.pending.eviction_candidate(conns, accepted_by)
    }

    /// A client was admitted: spends a token of each rate.
    pub(super) fn spend<L>(&mut self, listener: &mut Listener<L>, config: &Config, now: Time) {
        listener.bucket.spend(listener.options.accept_rate, now);
        self.bucket.spend(config.accept_rate, now);
    }

    /// The server's accept rate may have changed.
    pub(super) fn follow(&mut self, config: &Config, now: Time) {
        self.bucket.follow(config.accept_rate, now);
    }

    pub(super) fn pending(&self) -> usize {
        self.pending.len()
    }

    /// Counts a connection that has just been inserted, if it is pending.
    pub(super) fn add_pending<S>(&mut self, conns: &Connections<S>, id: ConnId) {
        if conns.get(id).is_some_and(|conn| conn.pending) {
            self.pending.push(id, conns);
        }
    }

    /// A connection has opened, or ended before. True if it was pending.
    pub(super) fn end_pending<S>(&mut self, conns: &mut Connections<S>, id: ConnId) -> bool {
        let was_pending = conns
            .get_mut(id)
            .is_some_and(|conn| std::mem::take(&mut conn.pending));
        if was_pending {
            self.pending.leave(conns);
        }
        was_pending
    }

    #[cfg(feature = "sim")]
    pub(super) fn pending_queue(&self) -> &Pending {
        &self.pending
    }
}

/// The maximum number of pending connections in this server.
pub(super) fn max_pending<S>(conns: &Connections<S>, config: &Config) -> usize {
    conns.part_of(config.max_pending()).max(1)
}
