//! Admission control: the one decision whether the next client of a listener may come in.
//!
//! It rests on the cap, the listener's own limit, the accept rates, the pending connections (those
//! that have not opened yet), the silent ones (those that have not sent a frame yet) and on whether
//! descriptors ran out.

use super::bans::Bans;
use super::capacity::{Capacity, OptionalBucket};
use super::connection::Connection;
use super::connections::Connections;
use super::fd_exhaustion::FdExhaustion;
use super::listener::Listener;
use super::listeners::Listeners;
#[cfg(feature = "sim")]
use super::pending::Pending;
use super::pending::Unproven;
use super::standing::Queue;
use crate::config::Config;
use crate::id::ConnId;
use crate::proto::Time;
use crate::reason::CloseReason;

/// The server's side of admission.
#[derive(Default)]
pub(super) struct Admission {
    /// Of the server's accept rate.
    bucket: OptionalBucket,
    unproven: Unproven,
    pub(super) fds: FdExhaustion,
    pub(super) bans: Bans,
}

impl Admission {
    #[inline]
    pub(super) fn capacity<S>(
        &self,
        conns: &Connections<S>,
        config: &Config,
        now: Time,
    ) -> Capacity {
        let has_slot = conns.has_room();
        Capacity {
            has_slot,
            evicts_at: if has_slot {
                Time::NEVER
            } else {
                self.evicts_at(conns, config)
            },
            cap: conns.cap(),
            out_of_fds: self.fds.is_on(),
            // Most often none is pending, and the limit, at least 1, need not be computed.
            crowded_until: if self.unproven.pending.len() == 0 {
                None
            } else {
                self.crowded_until(conns, config, now)
            },
            limited_until: self.bucket.ready_at(config.accept_rate),
            now,
        }
    }

    /// True if [`Capacity::is_unrestricted`] is, without the other answers.
    #[inline]
    pub(super) fn is_unrestricted<S>(&self, conns: &Connections<S>, config: &Config) -> bool {
        conns.has_room()
            && self.unproven.pending.len() == 0
            && !self.fds.is_on()
            && config.accept_rate.is_none()
    }

    #[cold]
    fn evicts_at<S>(&self, conns: &Connections<S>, config: &Config) -> Time {
        match self.unproven(conns) {
            Some((since, _)) => since.after(config.pending_limits.grace),
            None => Time::NEVER,
        }
    }

    #[inline(never)]
    fn crowded_until<S>(&self, conns: &Connections<S>, config: &Config, now: Time) -> Option<Time> {
        self.is_crowded(conns, config).then(|| {
            let oldest = self.unproven.pending.oldest().unwrap_or(now);
            oldest.after(config.pending_limits.grace)
        })
    }

    /// Too many connections are pending.
    fn is_crowded<S>(&self, conns: &Connections<S>, config: &Config) -> bool {
        // Most often none is pending, and the limit, at least 1, need not be computed.
        let pending = self.unproven.pending.len();
        pending > 0 && pending >= max_pending(conns, config)
    }

    /// Returns why no client may come in through this listener now. If there is no reason, a slot
    /// is free for the next client, or a pending connection can be evicted for it.
    pub(super) fn refusal<S, L>(
        &self,
        conns: &Connections<S>,
        listener: &Listener<L>,
        config: &Config,
        now: Time,
    ) -> Option<CloseReason> {
        if self.is_unrestricted(conns, config) && !listener.has_limits() {
            return None;
        }
        self.refusal_at(conns, listener, config, &self.capacity(conns, config, now))
    }

    fn refusal_at<S, L>(
        &self,
        conns: &Connections<S>,
        listener: &Listener<L>,
        config: &Config,
        capacity: &Capacity,
    ) -> Option<CloseReason> {
        let at_own_cap = listener.reached_cap().is_some();
        let has_slot = listener.has_slot(capacity);
        let is_full = !(has_slot || capacity.evicts_at.is_armed())
            || at_own_cap && self.evicts_own_at(conns, listener, config) > capacity.now;
        if is_full {
            return Some(CloseReason::AtCapacity);
        }
        if listener.limited_until(capacity) > capacity.now {
            return Some(CloseReason::RateLimited);
        }
        if at_own_cap {
            // One of its own is evicted, whose slot the client gets.
            return None;
        }
        // The oldest may be evictable by age, but wait for this server and not for its peer.
        let crowded = capacity.crowded_until.is_some() && listener.options.opens_later();
        let refused = if crowded {
            self.pending_candidate(conns, config, capacity.now)
                .is_none()
        } else {
            !has_slot && capacity.evicts_at > capacity.now
        };
        refused.then_some(CloseReason::AtCapacity)
    }

    /// Before a client that may need the slot of another: what is known of those is up to date.
    #[inline]
    pub(super) fn trim_for<S, L>(
        &mut self,
        conns: &mut Connections<S>,
        listener: &mut Listener<L>,
    ) {
        if !conns.has_room() {
            self.trim(conns);
        }
        if listener.reached_cap().is_some() {
            listener.trim(conns);
        }
    }

    /// The connection to evict for a client of this listener: a pending one if too many are; at the
    /// cap the oldest that has not sent a frame, and at the listener's own the oldest of its own.
    pub(super) fn eviction_candidate<S, L>(
        &mut self,
        conns: &mut Connections<S>,
        listener: &Listener<L>,
        config: &Config,
        now: Time,
    ) -> Option<ConnId> {
        let needs_slot = !conns.has_claim() && !conns.has_room();
        let needs_none = !needs_slot && listener.reached_cap().is_none();
        if needs_none && self.unproven.pending.len() == 0 {
            return None;
        }
        self.trim(conns);
        let capacity = self.capacity(conns, config, now);
        if listener.reached_cap().is_some() {
            let (since, id) = self.unproven_of(conns, listener, config)?;
            (since.after(config.pending_limits.grace) <= now).then_some(id)
        } else if capacity.crowded_until.is_some() && listener.options.opens_later() {
            self.pending_candidate(conns, config, now)
        } else if needs_slot && capacity.evicts_at <= now {
            self.unproven(conns).map(|(_, id)| id)
        } else {
            // The client has a slot already.
            None
        }
    }

    fn pending_candidate<S>(
        &self,
        conns: &Connections<S>,
        config: &Config,
        now: Time,
    ) -> Option<ConnId> {
        let (since, id) = self.unproven.pending.candidate(conns)?;
        (since.after(config.pending_limits.grace) <= now).then_some(id)
    }

    /// True if a connection may be evicted for the next client. Other servers may fill the cap, so
    /// below it each connection counts whose first frame has not been noticed.
    pub(super) fn may_evict<S>(&self, conns: &Connections<S>) -> bool {
        match conns.has_room() {
            true => !self.unproven.is_empty(),
            false => self.unproven(conns).is_some(),
        }
    }

    /// At the cap: the oldest connection that has not sent a frame, pending or open.
    fn unproven<S>(&self, conns: &Connections<S>) -> Option<(Time, ConnId)> {
        if !conns.is_exhausted() {
            return None;
        }
        self.unproven.candidate(conns)
    }

    /// The oldest connection of a listener that has all of its own connections: it can be evicted for
    /// the listener's next client. Returns since when its peer keeps the server waiting.
    fn unproven_of<S, L>(
        &self,
        conns: &Connections<S>,
        listener: &Listener<L>,
        config: &Config,
    ) -> Option<(Time, ConnId)> {
        // With more of them than the limit, one that ends makes no room.
        if listener.options.max_connections != Some(listener.connections) {
            return None;
        }
        let unproven = listener.unproven.as_ref()?;
        if self.is_crowded(conns, config) && listener.options.opens_later() {
            unproven.pending.candidate(conns)
        } else {
            unproven.candidate(conns)
        }
    }

    /// When a connection of a listener that has all of its own can be evicted for the next client.
    pub(super) fn evicts_own_at<S, L>(
        &self,
        conns: &Connections<S>,
        listener: &Listener<L>,
        config: &Config,
    ) -> Time {
        self.unproven_of(conns, listener, config)
            .map_or(Time::NEVER, |(since, _)| {
                since.after(config.pending_limits.grace)
            })
    }

    /// Forgets connections that have sent a frame since they opened, or that wait for this server.
    pub(super) fn trim<S>(&mut self, conns: &mut Connections<S>) {
        self.unproven.silent.trim(conns, Queue::Server);
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
        self.unproven.pending.len()
    }

    /// Since when a pending connection is so: accept, or the beginning of an upgrade to TLS.
    pub(super) fn pending_since<S>(&self, conn: &Connection<S>) -> Time {
        let upgrade = self.unproven.pending.upgrade_began(conn.id);
        upgrade.unwrap_or(conn.accepted_at)
    }

    /// Adds a connection that is not open yet.
    pub(super) fn add_pending<S>(&mut self, conns: &Connections<S>, id: ConnId, since: Time) {
        self.unproven.pending.push(id, since, conns);
    }

    /// Adds a connection that has opened, and may be evicted until it has sent a frame.
    pub(super) fn add_silent<S>(&mut self, conns: &Connections<S>, id: ConnId) {
        self.unproven.silent.push(id, conns);
    }

    /// After its turn, a connection that was skipped may be evicted again.
    #[cold]
    pub(super) fn end_skip<S, L>(
        &mut self,
        conns: &mut Connections<S>,
        listeners: &mut Listeners<L>,
        id: ConnId,
    ) {
        let Some(conn) = conns.get_mut(id) else {
            return;
        };
        let (standing, listener) = (conn.standing, conn.listener);
        conn.standing.end_skip();
        if !conn.machine.is_silent() {
            return;
        }
        if standing.is_skipped_by(Queue::Server) {
            self.add_silent(conns, id);
        }
        if standing.is_skipped_by(Queue::Listener) {
            let listener = listener.and_then(|id| listeners.by_id_mut(id));
            if let Some(unproven) = listener.and_then(|listener| listener.unproven.as_mut()) {
                unproven.silent.push(id, conns);
            }
        }
    }

    /// An open connection is in a handshake again. Returns the oldest of too many pending ones.
    pub(super) fn begin_pending<S>(
        &mut self,
        conns: &mut Connections<S>,
        id: ConnId,
        config: &Config,
        now: Time,
    ) -> Option<ConnId> {
        let conn = conns
            .get_mut(id)
            .filter(|conn| !conn.standing.is_pending())?;
        conn.standing.set_pending(true);
        self.unproven.pending.push_again(id, now, conns);
        if self.unproven.pending.len() <= max_pending(conns, config) {
            return None;
        }
        self.pending_candidate(conns, config, now)
    }

    /// A connection has opened, or ended before. True if it was pending.
    pub(super) fn end_pending<S>(&mut self, conns: &mut Connections<S>, id: ConnId) -> bool {
        let conn = conns.get_mut(id);
        let was_pending = conn.is_some_and(|conn| {
            let was_pending = conn.standing.is_pending();
            conn.standing.set_pending(false);
            was_pending
        });
        if was_pending {
            self.unproven.pending.leave(id, conns);
        }
        was_pending
    }

    #[cfg(feature = "sim")]
    pub(super) fn pending_queue(&self) -> &Pending {
        &self.unproven.pending
    }
}

/// The maximum number of pending connections in this server.
pub(super) fn max_pending<S>(conns: &Connections<S>, config: &Config) -> usize {
    conns.part_of(config.max_pending()).max(1)
}
