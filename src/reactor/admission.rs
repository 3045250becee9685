//! Who may come in now: the cap, the rates, and those who are not open yet.

use std::panic::{catch_unwind, AssertUnwindSafe};

use super::accept::Incoming;
use super::os::{Os, Socket};
use super::{report_panic, Reactor};
use crate::access::Access;
use crate::handler::Refuse;
use crate::id::ConnId;
use crate::proto::{Bucket, Rate, Time};
use crate::reason::{CloseReason, Closed};

/// What keeps listeners from accepting, all of them or some.
#[derive(Clone, Copy, Debug)]
pub(super) struct Room {
    /// A slot is free.
    pub(super) has_slot: bool,
    /// None is, and one who gives way frees one.
    pub(super) may_swap: bool,
    pub(super) cap: usize,
    /// Descriptors or memory ran out.
    pub(super) out_of_fds: bool,
    /// Too many are not open yet, and none of them gives way before then.
    pub(super) crowded_until: Option<Time>,
    /// The server's own rate admits nobody before then.
    pub(super) limited_until: Time,
    pub(super) now: Time,
}

/// The bucket of a rate that may not be set.
#[derive(Debug, Default)]
pub(super) struct OptionalBucket(Bucket);

impl OptionalBucket {
    /// From when on somebody may pass.
    pub(super) fn ready_at(&self, rate: Option<Rate>) -> Time {
        rate.map_or(Time::ZERO, |rate| self.0.ready_at(&rate))
    }

    /// The rate may be another one from now on.
    pub(super) fn follow(&mut self, rate: Option<Rate>, now: Time) {
        if let Some(rate) = rate {
            self.0.follow(&rate, now);
        }
    }

    /// Somebody has passed.
    pub(super) fn spend(&mut self, rate: Option<Rate>, now: Time) {
        if let Some(rate) = rate {
            self.0.charge(&rate, 1, now);
        }
    }
}

impl<A, O: Os> Reactor<A, O> {
    pub(super) fn room(&self) -> Room {
        self.room_at(self.now)
    }

    pub(super) fn room_at(&self, now: Time) -> Room {
        // Most often nobody is, and the limit, at least one, need not be worked out.
        let crowded = self.pending.len() > 0 && self.pending.len() >= self.pending_limit();
        let crowded_until = if crowded {
            let oldest = self.pending.oldest(&self.connections).unwrap_or(now);
            Some(oldest.after(self.config.pending_grace))
        } else {
            None
        };
        Room {
            has_slot: self.connections.has_room(),
            may_swap: crowded && self.connections.is_exhausted(),
            cap: self.connections.cap(),
            out_of_fds: self.fd_exhaustion.is_on(),
            crowded_until,
            limited_until: self.bucket.ready_at(self.config.accept_rate),
            now,
        }
    }

    /// The most that may be pending here.
    pub(super) fn pending_limit(&self) -> usize {
        self.connections.part_of(self.config.pending_limit()).max(1)
    }

    /// Why nobody may come in through this listener now. If nothing is why, there is a place for who comes: one is
    /// reserved, or somebody gives way.
    pub(super) fn reserve(&mut self, at: usize) -> Option<CloseReason> {
        loop {
            let room = self.room();
            let refusal = self.refusal_in(at, &room);
            // Another server that shares the cap may have been faster.
            if refusal.is_some() || !room.has_slot || self.connections.reserve() {
                return refusal;
            }
        }
    }

    /// As [`Reactor::reserve`], at this moment.
    pub(super) fn refusal(&self, at: usize) -> Option<CloseReason> {
        self.refusal_in(at, &self.room())
    }

    fn refusal_in(&self, at: usize, room: &Room) -> Option<CloseReason> {
        let listener = self.listeners.get(at)?;
        if listener.is_full(room) {
            return Some(CloseReason::AtCapacity);
        }
        if listener.limited_until(room) > self.now {
            return Some(CloseReason::RateLimited);
        }
        let crowded = room.crowded_until.is_some() && listener.options.opens_later();
        // Somebody may be ripe, and yet it is we who have kept it waiting.
        (crowded && self.eviction_candidate().is_none()).then_some(CloseReason::AtCapacity)
    }

    fn eviction_candidate(&self) -> Option<ConnId> {
        let grace = self.config.pending_grace;
        let accepted_until = Time::ZERO.after(self.now.since(Time::ZERO.after(grace)));
        // Nobody is ripe before the server is as old as its patience.
        let any = self.now >= Time::ZERO.after(grace);
        any.then(|| self.pending.eviction_candidate(&self.connections, accepted_until))
            .flatten()
    }

    /// Too many are not open yet: the oldest gives way to a newcomer of this listener.
    pub(super) fn evict_oldest_pending(&mut self, app: &mut A, at: usize) {
        let opens_later = self
            .listeners
            .get(at)
            .is_some_and(|listener| listener.options.opens_later());
        if !opens_later || self.room().crowded_until.is_none() {
            return;
        }
        if let Some(id) = self.eviction_candidate() {
            if let Some(conn) = self.connections.get_mut(id) {
                conn.machine.end(Closed::new(CloseReason::Evicted), &mut self.pool);
                self.connections.keep_place();
            }
            self.turn(app, id);
        }
    }

    /// The PROXY header has come, or none will: whom it is for is known, and the service is asked. In a connection's turn.
    pub(super) fn ask_service(&mut self, app: &mut A, id: ConnId) {
        let Some(conn) = self.connections.get_mut(id) else {
            return;
        };
        let (now, machine) = (self.now, &mut conn.machine);
        let Some(listener) = self
            .listeners
            .iter_mut()
            .find(|listener| Some(listener.id) == conn.listener)
        else {
            return;
        };
        let header = machine.proxy().cloned();
        let source = match &header {
            Some(header) => header.source().map(|source| source.ip()),
            None => conn.peer.unpacked().ip(),
        };
        if let Some(source) = source {
            if header.is_some() && listener.options.access.judge(source) == Access::Deny {
                return machine.end(Closed::new(CloseReason::Denied), &mut self.pool);
            }
            match listener.sources.admit(source, &listener.options.sources, now) {
                Some(counted) => conn.counted = counted,
                None => return machine.end(Closed::new(CloseReason::SourceLimited), &mut self.pool),
            }
        }
        let stream = self.streams.get(id.index as usize).and_then(Option::as_ref);
        let incoming = Incoming {
            addr: conn.peer.unpacked(),
            credentials: stream.and_then(|stream| stream.credentials().ok()),
            proxy: header,
        };
        let peer = incoming.at(listener, Some(id));
        let answer = catch_unwind(AssertUnwindSafe(|| listener.service.accept(app, peer)));
        match answer {
            Ok(Ok(handler)) => {
                if let Some(place) = self.handlers.get_mut(id.index as usize) {
                    *place = Some(handler);
                }
                machine.handle_admitted(now, &mut self.pool);
            }
            Ok(Err(Refuse { farewell })) => {
                machine.refuse(&farewell, Closed::new(CloseReason::Refused), now, &mut self.pool);
            }
            Err(panic) => {
                machine.refuse(&[], Closed::new(CloseReason::Panicked), now, &mut self.pool);
                self.stats.panics += 1;
                report_panic("a service's accept", panic);
            }
        }
    }

    /// A connection has opened, or gone before it did: somebody else may come.
    pub(super) fn leave_pending(&mut self, id: ConnId) {
        let Some(conn) = self.connections.get_mut(id) else {
            return;
        };
        if std::mem::take(&mut conn.pending) {
            self.pending.leave(&self.connections);
            self.look_for_clients();
        }
    }
}
