//! The table of connections: slots, ids, the cap, run queues, timers and the buffer pool.
//!
//! Nothing else schedules a connection: [`Connections::wake`] queues its next turn, and
//! [`Connections::arm`] sets the latest time for it.

use std::collections::VecDeque;
use std::sync::Arc;

use slab::Slab;

use super::connection::Connection;
use super::os::Token;
use super::shared_cap::CapShare;
use super::timers::Timers;
use crate::handle::Liveness;
use crate::id::{ConnId, ListenerId};
use crate::proto::{Pool, State, Time};

/// All connections of one server. Their number never exceeds the cap:
/// [`Connections::reserve`] comes before `accept`.
pub(super) struct Connections<S> {
    slab: Slab<Connection<S>>,
    /// The generation last used in each slot; never zero.
    generations: Vec<u32>,
    /// Ids in use, for handles on other threads.
    live: Arc<Liveness>,
    cap: usize,
    /// Set when several servers share the cap.
    share: Option<CapShare>,
    /// The next slot to be freed stays reserved for the next connection.
    keep_next: bool,
    ready: VecDeque<ConnId>,
    /// Handshakes with input: served in the order in which the input arrived.
    handshakes: VecDeque<ConnId>,
    timers: Timers,
    pub(super) pool: Pool,
}

impl<S> Connections<S> {
    /// With room for `slots` connections reserved.
    pub(super) fn new(cap: usize, slots: usize, live: Arc<Liveness>) -> Self {
        Self {
            slab: Slab::with_capacity(slots),
            generations: Vec::with_capacity(slots),
            live,
            cap,
            share: None,
            keep_next: false,
            ready: VecDeque::new(),
            handshakes: VecDeque::new(),
            timers: Timers::with_room_for(slots),
            pool: Pool::default(),
        }
    }

    // The cap.

    /// Makes the cap one that several servers share. Called before the first connection.
    pub(super) fn share(&mut self, share: CapShare) {
        debug_assert!(self.is_empty());
        self.share = Some(share);
    }

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

    pub(super) fn has_room(&self) -> bool {
        match &self.share {
            Some(share) => share.has_room(),
            None => self.slab.len() < self.cap,
        }
    }

    /// The cap is reached but not exceeded: one connection less makes room.
    pub(super) fn is_exhausted(&self) -> bool {
        match &self.share {
            Some(share) => share.is_exhausted(),
            None => self.slab.len() == self.cap,
        }
    }

    /// This server has clearly more connections than those that share the cap.
    pub(super) fn is_ahead(&self) -> bool {
        self.share.as_ref().is_some_and(CapShare::is_ahead)
    }

    /// Reserves a slot for the next connection: another server may have taken the slot that
    /// [`Connections::has_room`] reported.
    pub(super) fn reserve(&mut self) -> bool {
        match &mut self.share {
            Some(share) => share.reserve(),
            None => self.has_room(),
        }
    }

    /// Returns a reservation that was not used.
    pub(super) fn unreserve(&mut self) {
        self.keep_next = false;
        if let Some(share) = &mut self.share {
            share.unreserve();
        }
    }

    /// Reserves the slot of the next connection that is removed.
    pub(super) fn keep_next(&mut self) {
        self.keep_next = true;
    }

    /// The last look for room in an iteration: if there is none, the loop is woken when there is.
    pub(super) fn await_room(&self) -> bool {
        match &self.share {
            Some(share) => share.await_room(),
            None => self.has_room(),
        }
    }

    /// Lets the other servers have the slots that were freed and not reused.
    pub(super) fn offer_room(&mut self) {
        if let Some(share) = &mut self.share {
            share.offer();
        }
    }

    // The slots.

    pub(super) fn len(&self) -> usize {
        self.slab.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.slab.is_empty()
    }

    /// The id for the next connection. Never used twice: a peer that is refused keeps its id.
    pub(super) fn next_id(&mut self) -> ConnId {
        let index = self.slab.vacant_key();
        if self.generations.len() <= index {
            self.generations.resize(index + 1, 0);
        }
        let mut generation = 1;
        if let Some(latest) = self.generations.get_mut(index) {
            generation = if *latest < ConnId::MAX_GENERATION {
                *latest + 1
            } else {
                1
            };
            *latest = generation;
        }
        ConnId::new(self.live.server(), index as u32, generation)
    }

    /// Inserts a connection under the id that [`Connections::next_id`] returned last.
    #[inline(always)]
    pub(super) fn insert(&mut self, conn: Connection<S>) {
        let id = conn.id;
        debug_assert!(self.has_room(), "the cap is checked before accept");
        self.keep_next = false;
        if let Some(share) = &mut self.share {
            share.fill();
        }
        let index = self.slab.insert(conn);
        debug_assert_eq!(index, id.index() as usize);
        self.live.set(id, true);
    }

    /// Frees the slot and everything that would give the connection another turn. Its id was hidden
    /// before.
    pub(super) fn remove(&mut self, id: ConnId) -> Option<Connection<S>> {
        self.get(id)?;
        self.timers.disarm(id.index());
        let keep = std::mem::take(&mut self.keep_next);
        if let Some(share) = &mut self.share {
            share.vacate(keep);
        }
        self.slab.try_remove(id.index() as usize)
    }

    /// Handles find the id, before its connection is inserted.
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
        let conn = self.slab.get(id.index() as usize)?;
        (conn.id == id).then_some(conn)
    }

    #[inline]
    pub(super) fn get_mut(&mut self, id: ConnId) -> Option<&mut Connection<S>> {
        let conn = self.slab.get_mut(id.index() as usize)?;
        (conn.id == id).then_some(conn)
    }

    /// The connection together with the buffer pool.
    #[inline]
    pub(super) fn parts(&mut self, id: ConnId) -> Option<(&mut Connection<S>, &mut Pool)> {
        let conn = self.slab.get_mut(id.index() as usize)?;
        (conn.id == id).then_some((conn, &mut self.pool))
    }

    /// The connection in this slot now.
    #[inline]
    pub(super) fn by_index(&self, index: u32) -> Option<&Connection<S>> {
        self.slab.get(index as usize)
    }

    pub(super) fn by_index_mut(&mut self, index: u32) -> Option<&mut Connection<S>> {
        self.slab.get_mut(index as usize)
    }

    /// The connection that an event is for, unless it was removed since.
    #[inline]
    pub(super) fn by_token(&mut self, index: u32, token: Token) -> Option<&mut Connection<S>> {
        self.slab
            .get_mut(index as usize)
            .filter(|conn| Token::of_conn(conn.id) == token)
    }

    /// Number of slots that were ever used.
    pub(super) fn slots(&self) -> u32 {
        self.generations.len() as u32
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Connection<S>> {
        self.slab.iter().map(|(_, conn)| conn)
    }

    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Connection<S>> {
        self.slab.iter_mut().map(|(_, conn)| conn)
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
        if let Some(conn) = self.slab.get_mut(id.index() as usize) {
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
mod tests {
    use std::num::NonZeroU64;
    use std::rc::Rc;

    use super::*;
    use crate::addr::Addr;
    use crate::config::Listen;
    use crate::proto::Machine;

    fn connection(id: ConnId) -> Connection<NonZeroU64> {
        let listen = Listen::tcp("127.0.0.1:0");
        let limits = Rc::new(listen.conn.clone());
        let machine = Machine::new(
            &listen.framing,
            limits,
            None,
            Time::ZERO,
            &mut Pool::default(),
        );
        let listener = Some(ListenerId::nth(0));
        Connection::new(id, listener, Addr::unspecified(), machine, Time::ZERO, 0)
    }

    fn table(cap: usize) -> Connections<NonZeroU64> {
        Connections::new(cap, 0, Arc::default())
    }

    #[test]
    fn a_stale_id_finds_nothing() {
        let mut conns = table(1);
        let first = conns.next_id();
        conns.insert(connection(first));
        assert!(!conns.has_room());
        assert!(conns
            .by_token(first.index(), Token::of_conn(first))
            .is_some());
        conns.remove(first).expect("it is there");
        let second = conns.next_id();
        conns.insert(connection(second));
        assert_eq!(
            (second.index(), conns.len()),
            (first.index(), 1),
            "the slot is reused"
        );
        assert_ne!(second, first);
        assert!(conns
            .by_token(first.index(), Token::of_conn(first))
            .is_none());
        assert!(conns.get(first).is_none() && conns.get_mut(first).is_none());
        assert!(conns.parts(first).is_none() && conns.remove(first).is_none());
        assert!(conns
            .by_token(second.index(), Token::of_conn(second))
            .is_some());
    }

    #[test]
    fn a_connection_is_queued_once_and_a_stale_id_never() {
        let mut conns = table(1);
        let first = conns.next_id();
        conns.insert(connection(first));
        conns.wake(first);
        conns.wake(first);
        assert_eq!(
            (conns.next_ready(), conns.next_ready()),
            (Some(first), None)
        );
        conns.remove(first);
        conns.wake(first);
        assert!(!conns.has_work());
    }

    #[test]
    fn a_removed_connection_has_no_timer() {
        let mut conns = table(1);
        let id = conns.next_id();
        conns.insert(connection(id));
        conns.arm(id, Time::ZERO);
        conns.remove(id);
        assert_eq!(conns.pop_due(Time::ZERO), None);
    }

    /// The size that every idle connection costs, with a socket of 8 bytes.
    #[test]
    #[cfg(target_pointer_width = "64")]
    fn a_connection_is_small() {
        let size = size_of::<Connection<NonZeroU64>>();
        assert_eq!(
            size_of::<Option<Connection<NonZeroU64>>>(),
            size,
            "the slab needs no more"
        );
        assert!(size <= 152, "{size}");
    }

    #[test]
    fn generations_wrap_without_zero() {
        let mut conns = table(1);
        conns.generations = vec![ConnId::MAX_GENERATION];
        assert_eq!(conns.next_id().generation(), 1);
    }
}
