//! The table of connections: slots, ids, the cap, run queues, timers and the buffer pool.
//!
//! Nothing else schedules a connection: [`Connections::wake`] queues its next turn, and
//! [`Connections::arm`] sets the latest time for it.

mod reserve;

use std::collections::{TryReserveError, VecDeque};
use std::sync::Arc;

use super::connection::Connection;
use super::os::Token;
use super::shared_cap::{Bounds, CapShare, SharedCap};
use super::slots::Slots;
use super::timers::Timers;
use crate::detached::Permit;
use crate::handle::Liveness;
use crate::id::{ConnId, ListenerId, ServerNumber};
use crate::logs;
use crate::proto::{lower, Pool, State, Time};

/// Slots for which memory is there from the start, if the cap allows them. Address space only: a
/// page becomes memory when it is used first.
const RESERVED: usize = 1 << 16;
/// Slots that are there in any case.
const MIN_SLOTS: usize = 64;

/// All connections of one server. Their number never exceeds the cap:
/// [`Connections::claim`] comes with `accept`.
pub(super) struct Connections<S> {
    slots: Slots<Connection<S>>,
    /// Ids in use, for handles on other threads.
    live: Arc<Liveness>,
    cap: usize,
    /// The number of connections beyond which the system grants no memory, until one is removed.
    granted: usize,
    /// A refusal was logged: the next one is not, until memory is granted again.
    is_refusal_logged: bool,
    /// Set when several servers share the cap.
    share: Option<CapShare>,
    /// Slots taken for connections that exist and are not inserted yet.
    claimed: usize,
    /// Free slots that are kept for the clients of single listeners.
    reserved: usize,
    /// The next slot to be freed is claimed.
    keep_next: bool,
    leaving: Option<Leaving>,
    last_sent: Option<ConnId>,
    ready: VecDeque<ConnId>,
    /// Handshakes with input: served in the order in which the input arrived.
    handshakes: VecDeque<ConnId>,
    timers: Timers,
    pub(super) pool: Pool,
}

/// Least capacity of a run queue.
const MIN_QUEUE: usize = 256;

/// A connection that has ended, while its last callback runs: it is in its slot, and no longer
/// counted.
#[derive(Clone, Copy, Debug)]
struct Leaving {
    id: ConnId,
    /// Its permit of the shared cap is for a connection that begins meanwhile.
    has_permit: bool,
}

/// A detached connection that comes back into a loop.
#[derive(Debug)]
pub(super) struct Returning {
    /// It had a slot of this server until now.
    pub(super) had_slot: bool,
    /// Its permit, if it comes from a server that shares its cap.
    pub(super) permit: Option<Box<dyn Permit>>,
}

impl<S> Connections<S> {
    pub(super) fn new(cap: usize, live: Arc<Liveness>) -> Self {
        let mut conns = Self {
            slots: Slots::new(),
            live,
            cap,
            granted: usize::MAX,
            is_refusal_logged: false,
            share: None,
            claimed: 0,
            reserved: 0,
            keep_next: false,
            leaving: None,
            last_sent: None,
            ready: VecDeque::with_capacity(MIN_QUEUE),
            handshakes: VecDeque::with_capacity(MIN_QUEUE),
            timers: Timers::default(),
            pool: Pool::default(),
        };
        // What is refused now is requested again when it is needed.
        if conns.request(cap.min(RESERVED)).is_err() {
            let _ = conns.request(cap.min(MIN_SLOTS));
        }
        conns
    }

    /// Drops spare memory, and moves what has grown. An allocator returns the end of its heap
    /// alone, so nothing of a storm may stay there.
    pub(super) fn release_spare(&mut self) {
        for queue in [&mut self.ready, &mut self.handshakes] {
            let mut list = Vec::from(std::mem::take(queue));
            lower(&mut list, MIN_QUEUE);
            *queue = list.into();
        }
        self.pool.release_spare();
    }

    // Memory for the slots. A large cap reserves nothing that the machine may not have: their
    // number doubles as they are needed, and where the system refuses it, there is no room.

    fn request(&mut self, slots: usize) -> Result<(), TryReserveError> {
        self.timers.try_reserve(slots)?;
        // The last one: where a slot is vacant, there is memory for all that belongs to it.
        self.slots.try_reserve(slots)
    }

    /// Whether there is memory for one connection more. If not, that is so until a slot is free.
    /// Before [`SharedCap::lock`]: the refusal is logged, which is foreign code.
    pub(super) fn has_memory(&mut self) -> bool {
        let next = self.slots.vacant_key() as u32;
        let is_known = self.slots.has_used() || self.live.try_reserve(next).is_ok();
        if self.slots.has_vacant() && is_known {
            return true;
        }
        let slots = self.slots.len();
        // One more, while a connection leaves.
        let most = self.cap().saturating_add(1);
        let doubled = slots.saturating_mul(2).min(most).max(MIN_SLOTS);
        // A connection that comes back counts although the cap may be lower.
        let doubled = doubled.max(slots.saturating_add(1));
        let few = slots.saturating_add(MIN_SLOTS);
        let granted = self.request(doubled).or_else(|_| self.request(few));
        match granted.and_then(|()| self.live.try_reserve(next)) {
            Ok(()) => {
                self.is_refusal_logged = false;
                true
            }
            Err(error) => {
                self.granted = slots;
                if !std::mem::replace(&mut self.is_refusal_logged, true) {
                    logs::warning!(
                        target: logs::SERVER,
                        "no memory for more than {slots} connections, as if that were the cap: \
                         {error}"
                    );
                }
                false
            }
        }
    }

    // The cap.

    /// Makes the cap one that several servers share. Called before the first connection.
    pub(super) fn share(&mut self, share: CapShare) {
        debug_assert!(self.is_empty());
        self.share = Some(share);
    }

    #[inline]
    pub(super) fn cap(&self) -> usize {
        self.shared_cap().unwrap_or(self.cap)
    }

    pub(super) fn shared_cap(&self) -> Option<usize> {
        self.share.as_ref().map(CapShare::cap)
    }

    pub(super) fn set_cap(&mut self, cap: usize) {
        match &self.share {
            Some(share) => share.set_cap(cap),
            None => self.cap = cap,
        }
    }

    /// This server's part of a limit that holds for all servers with the same cap.
    pub(super) fn part_of(&self, limit: usize) -> usize {
        self.share
            .as_ref()
            .map_or(limit, |share| share.part_of(limit))
    }

    #[inline]
    pub(super) fn has_room(&self) -> bool {
        self.taken() < self.granted
            && match &self.share {
                Some(share) => share.has_room() || self.has_leaving_permit(),
                None => self.taken() < self.cap,
            }
    }

    /// The number of this server among those that share the cap, and their number.
    #[cfg(feature = "observer")]
    pub(super) fn shard(&self) -> Option<(usize, usize)> {
        self.share.as_ref().map(CapShare::number)
    }

    /// The cap is reached but not exceeded: one connection less makes room.
    #[inline]
    pub(super) fn is_exhausted(&self) -> bool {
        match &self.share {
            _ if self.len() + self.reserved >= self.granted => true,
            Some(share) => share.is_exhausted(),
            None => self.taken() == self.cap,
        }
    }

    /// This server has clearly more connections than those that share the cap.
    pub(super) fn is_ahead(&self) -> bool {
        self.share.as_ref().is_some_and(CapShare::is_ahead)
    }

    /// Publishes to the servers that share the cap whether this one may have a connection that it
    /// can evict.
    pub(super) fn set_may_evict(&self, may_evict: bool) {
        if let Some(share) = &self.share {
            share.set_may_evict(may_evict);
        }
    }

    /// The cap is reached, and another server may evict a connection for the next client.
    pub(super) fn may_others_evict(&self) -> bool {
        let share = self.share.as_ref().filter(|share| !share.has_room());
        share.is_some_and(CapShare::may_others_evict)
    }

    /// Requests memory for the next connection, if a slot is free: if the system grants none, no
    /// slot is free.
    pub(super) fn prepare(&mut self) {
        if self.has_room() || self.reserved > 0 {
            self.has_memory();
        }
    }

    /// Several servers share the cap.
    #[inline]
    pub(super) fn is_shared(&self) -> bool {
        self.share.is_some()
    }

    /// For [`SharedCap::lock`], while a client or an outgoing connection may come to be.
    pub(super) fn gate(&self) -> Option<Arc<SharedCap>> {
        self.share
            .as_ref()
            .map(|share| Arc::clone(share.shared_cap()))
    }

    /// Number of connections under the cap: those of all servers that share it.
    pub(super) fn under_cap(&self) -> usize {
        self.share.as_ref().map_or(self.len(), CapShare::taken)
    }

    /// Takes a slot for a connection that will be inserted. False if none is free. Where servers
    /// share the cap this is under [`SharedCap::lock`].
    #[must_use = "another server may have the last slot"]
    pub(super) fn claim(&mut self) -> bool {
        let has_room = self.has_room() && self.has_memory();
        let claimed = match &mut self.share {
            Some(share) => has_room && (share.take() || self.pass_leaving_permit(true)),
            None => has_room,
        };
        self.claimed += usize::from(claimed);
        claimed
    }

    /// As [`Connections::claim`], for a connection that comes back, where
    /// [`Connections::has_memory`]. A connection that had a slot here, or brings its permit, counts
    /// as before: the cap is not checked.
    #[must_use = "the system may grant no memory"]
    pub(super) fn claim_again(&mut self, returning: &mut Returning) -> bool {
        if self.taken() >= self.granted {
            return false;
        }
        let is_counted = match &mut self.share {
            Some(share) => share.attach(&mut returning.permit),
            None => returning.had_slot,
        };
        if is_counted {
            self.claimed += 1;
            return true;
        }
        self.claim()
    }

    pub(super) fn has_claim(&self) -> bool {
        self.claimed > 0
    }

    /// The connection will not be inserted: its slot is free, and offered to other servers.
    pub(super) fn unclaim(&mut self) {
        if self.claimed == 0 {
            return;
        }
        self.claimed -= 1;
        if self.pass_leaving_permit(false) {
            return;
        }
        if let Some(share) = &mut self.share {
            share.give_back();
            share.offer();
        }
    }

    /// The last callback of an ended connection is about to run. Its slot is free for a connection
    /// that begins in the callback, unless a client is to have it.
    pub(super) fn begin_leaving(&mut self, id: ConnId) {
        let is_kept = std::mem::take(&mut self.keep_next);
        self.claimed += usize::from(is_kept);
        self.leaving = Some(Leaving {
            id,
            has_permit: !is_kept,
        });
    }

    pub(super) fn is_leaving(&self, id: ConnId) -> bool {
        self.leaving.is_some_and(|leaving| leaving.id == id)
    }

    /// A connection has ended, and its last callback runs.
    pub(super) fn has_leaving(&self) -> bool {
        self.leaving.is_some()
    }

    fn has_leaving_permit(&self) -> bool {
        self.leaving.is_some_and(|leaving| leaving.has_permit)
    }

    /// Passes `on` the permit of the connection that leaves, or gives it back. False if there is none
    /// to be passed.
    fn pass_leaving_permit(&mut self, on: bool) -> bool {
        let leaving = self.leaving.as_mut();
        let passes = leaving.filter(|leaving| leaving.has_permit == on);
        passes.map(|leaving| leaving.has_permit = !on).is_some()
    }

    /// No connection is being admitted: a panic may have left a claim.
    pub(super) fn drop_claims(&mut self) {
        self.leaving = None;
        self.keep_next = false;
        while self.claimed > 0 {
            self.unclaim();
        }
    }

    /// Claims the slot of the next connection that is removed.
    pub(super) fn keep_next(&mut self) {
        self.keep_next = true;
    }

    /// The last look for room in an iteration: if there is none, the loop is woken when there is.
    #[inline]
    pub(super) fn await_room(&self) -> bool {
        match &self.share {
            // A slot of this server is awaited, not a permit.
            Some(_) if self.len() + self.reserved >= self.granted => false,
            Some(share) => share.await_room(),
            None => self.has_room(),
        }
    }

    /// The poll has returned.
    pub(super) fn wake_up(&self) {
        if let Some(share) = &self.share {
            share.wake_up();
        }
    }

    /// Before foreign code runs: lets a waiting server have a slot that is free.
    #[inline]
    pub(super) fn offer_room(&self) {
        if let Some(share) = &self.share {
            share.offer();
        }
    }

    /// True if this server reports that the cap is reached: of the servers that share it, one does.
    pub(super) fn claim_cap_report(&mut self) -> bool {
        self.share.as_mut().is_none_or(CapShare::claim_report)
    }

    /// The report is over: another server may report the next time.
    pub(super) fn release_cap_report(&mut self) {
        if let Some(share) = &mut self.share {
            share.release_report();
        }
    }

    /// At the end of an iteration that has found room. The server `listens` if all its listeners
    /// are in the poll.
    #[inline]
    pub(super) fn rest(&self, listens: impl Fn() -> bool) {
        if let Some(share) = &self.share {
            share.rest(listens());
        }
    }

    /// Number of descriptors of all servers that share the cap. This one has `own` of them.
    pub(super) fn shared_descriptors(&self, own: usize) -> usize {
        self.share
            .as_ref()
            .map_or(own, |share| share.descriptors(own))
    }

    /// Publishes to the servers that share the cap that this one has `descriptors`, and lets them
    /// wake the loop once a number is out of `bounds`.
    pub(super) fn watch(&mut self, descriptors: usize, bounds: Option<Bounds>) {
        if let Some(share) = &mut self.share {
            share.publish_descriptors(descriptors);
            share.watch(bounds);
        }
    }

    // The slots.

    pub(super) fn len(&self) -> usize {
        self.slots.len() - usize::from(self.leaving.is_some())
    }

    /// Number of slots that no other connection can have.
    fn taken(&self) -> usize {
        self.len() + self.claimed + self.reserved
    }

    pub(super) fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// The server that all ids name.
    pub(super) fn server(&self) -> ServerNumber {
        self.live.server()
    }

    /// The id for the next connection. Never used twice: a peer that is refused keeps its id.
    pub(super) fn next_id(&mut self) -> ConnId {
        let index = self.slots.vacant_key() as u32;
        let generation = self.slots.next_generation(ConnId::MAX_GENERATION);
        ConnId::new(self.server(), index, generation)
    }

    /// Inserts a connection under the id that [`Connections::next_id`] returned last. Handles find
    /// it once it is shown.
    #[inline(always)]
    pub(super) fn insert(&mut self, conn: Connection<S>) {
        let id = conn.id;
        debug_assert!(
            self.has_claim() || self.has_room(),
            "the cap is checked before accept"
        );
        if self.claimed > 0 {
            self.claimed -= 1;
        } else if let Some(share) = &mut self.share {
            share.take_anyway();
        }
        let index = self.slots.insert(conn);
        debug_assert_eq!(index, id.index() as usize);
    }

    /// Takes the connection out of its slot, with everything that would give it another turn. Its
    /// id was hidden before. [`Connections::free`] is due afterwards.
    pub(super) fn remove(&mut self, id: ConnId) -> Option<Connection<S>> {
        self.get(id)?;
        self.timers.disarm(id.index());
        self.granted = usize::MAX;
        self.slots.remove(id.index() as usize, id.generation())
    }

    /// Lets another connection have the slot of one that was removed.
    pub(super) fn free(&mut self) {
        let leaving = self.leaving.take();
        let has_permit = leaving.is_none_or(|leaving| leaving.has_permit);
        if std::mem::take(&mut self.keep_next) {
            self.claimed += 1;
        } else if let (Some(share), true) = (&mut self.share, has_permit) {
            share.give_back();
        }
    }

    /// The permit of a connection that leaves the loop, and will not be given back here.
    pub(super) fn detach_permit(&mut self) -> Option<Box<dyn Permit>> {
        self.share.as_mut().map(CapShare::detach)
    }

    /// Handles find the id, also before its connection is inserted.
    pub(super) fn show(&self, id: ConnId) {
        self.live.set(id, true);
    }

    /// Handles on other threads no longer find the connection.
    pub(super) fn hide(&self, id: ConnId) {
        self.live.set(id, false);
    }

    pub(super) fn hide_all(&self) {
        for conn in self.iter() {
            self.live.set(conn.id, false);
        }
    }

    #[inline]
    pub(super) fn get(&self, id: ConnId) -> Option<&Connection<S>> {
        let conn = self.slots.get(id.index() as usize)?;
        (conn.id == id).then_some(conn)
    }

    #[inline]
    pub(super) fn get_mut(&mut self, id: ConnId) -> Option<&mut Connection<S>> {
        let conn = self.slots.get_mut(id.index() as usize)?;
        (conn.id == id).then_some(conn)
    }

    /// The connection together with the buffer pool.
    #[inline]
    pub(super) fn parts(&mut self, id: ConnId) -> Option<(&mut Connection<S>, &mut Pool)> {
        let conn = self.slots.get_mut(id.index() as usize)?;
        (conn.id == id).then_some((conn, &mut self.pool))
    }

    /// As [`Connections::parts`], to send: foreign code may panic meanwhile.
    #[inline]
    pub(super) fn parts_to_send(&mut self, id: ConnId) -> Option<(&mut Connection<S>, &mut Pool)> {
        self.last_sent = Some(id);
        self.parts(id)
    }

    /// The last connection that something was sent to, once.
    pub(super) fn take_last_sent(&mut self) -> Option<ConnId> {
        self.last_sent.take()
    }

    /// The connection in this slot now.
    #[inline]
    pub(super) fn by_index(&self, index: u32) -> Option<&Connection<S>> {
        self.slots.get(index as usize)
    }

    pub(super) fn by_index_mut(&mut self, index: u32) -> Option<&mut Connection<S>> {
        self.slots.get_mut(index as usize)
    }

    /// The connection that an event is for, unless it was removed since.
    #[inline]
    pub(super) fn by_token(&mut self, index: u32, token: Token) -> Option<&mut Connection<S>> {
        self.slots
            .get_mut(index as usize)
            .filter(|conn| Token::of_conn(conn.id) == token)
    }

    /// Number of slots that were ever used.
    pub(super) fn slots(&self) -> u32 {
        self.slots.used() as u32
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Connection<S>> {
        self.slots.iter()
    }

    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Connection<S>> {
        self.slots.iter_mut()
    }

    /// The connections of one listener; `None` for outgoing ones.
    pub(super) fn ids_of(&self, listener: Option<ListenerId>) -> impl Iterator<Item = ConnId> + '_ {
        self.iter()
            .filter(move |conn| conn.listener == listener)
            .map(|conn| conn.id)
    }

    // The run queues: work that no event will announce. Edge-triggered readiness is reported once,
    // so a connection that stops before "would block" is queued, and the poll does not sleep.

    /// Queues another turn, once.
    #[inline]
    pub(super) fn wake(&mut self, id: ConnId) {
        if let Some(conn) = self.slots.get_mut(id.index() as usize) {
            if conn.id == id && !std::mem::replace(&mut conn.queued, true) {
                self.ready.push_back(id);
            }
        }
    }

    /// As [`Connections::wake`]; a handshake waits among the handshakes.
    pub(super) fn wake_in_order(&mut self, id: ConnId) {
        let Some(conn) = self.get_mut(id) else {
            return;
        };
        if std::mem::replace(&mut conn.queued, true) {
            return;
        }
        if conn.machine.state() == State::Handshaking {
            self.handshakes.push_back(id);
        } else {
            self.ready.push_back(id);
        }
    }

    pub(super) fn ready_len(&self) -> usize {
        self.ready.len()
    }

    /// The first `count` of the run queue go to its end.
    pub(super) fn move_behind(&mut self, count: usize) {
        self.ready.rotate_left(count.min(self.ready.len()));
    }

    pub(super) fn handshakes_len(&self) -> usize {
        self.handshakes.len()
    }

    pub(super) fn has_work(&self) -> bool {
        !self.ready.is_empty() || !self.handshakes.is_empty()
    }

    /// The next connection to have a turn; its id may be stale.
    pub(super) fn next_ready(&mut self) -> Option<ConnId> {
        let id = self.ready.pop_front()?;
        self.unqueue(id);
        Some(id)
    }

    /// The next handshake to have a turn; its id may be stale.
    pub(super) fn next_handshake(&mut self) -> Option<ConnId> {
        let id = self.handshakes.pop_front()?;
        self.unqueue(id);
        Some(id)
    }

    fn unqueue(&mut self, id: ConnId) {
        if let Some(conn) = self.get_mut(id) {
            conn.queued = false;
        }
    }

    // The timers.

    /// Gives the connection a turn at `at` at the latest.
    #[inline]
    pub(super) fn arm(&mut self, id: ConnId, at: Time) {
        self.timers.arm(id.index(), at);
    }

    /// As [`Connections::arm`], at the connection's own deadline.
    #[inline]
    pub(super) fn arm_deadline(&mut self, id: ConnId) {
        if let Some(deadline) = self.get(id).map(|conn| conn.machine.deadline()) {
            self.timers.arm(id.index(), deadline);
        }
    }

    /// As [`Connections::arm_deadline`], at `at` at the latest.
    pub(super) fn arm_by(&mut self, id: ConnId, at: Time) {
        if let Some(deadline) = self.get(id).map(|conn| conn.machine.deadline()) {
            self.timers.arm(id.index(), deadline.min(at));
        }
    }

    pub(super) fn disarm(&mut self, id: ConnId) {
        self.timers.disarm(id.index());
    }

    /// When the first timer fires.
    #[inline]
    pub(super) fn next_timer(&self) -> Time {
        self.timers.next()
    }

    /// A connection whose timer has fired by `due`.
    pub(super) fn pop_due(&mut self, due: Time) -> Option<ConnId> {
        while let Some(index) = self.timers.pop(due) {
            if let Some(conn) = self.by_index(index) {
                return Some(conn.id);
            }
        }
        None
    }

    #[cfg(feature = "sim")]
    pub(super) fn timers(&self) -> &Timers {
        &self.timers
    }

    #[cfg(feature = "sim")]
    pub(super) fn live_generation(&self, index: u32) -> u32 {
        self.live.of(index).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests;
