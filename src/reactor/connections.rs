//! The slab: who is connected, under which id, and how many may be.

use slab::Slab;

use super::os::Token;
use super::shared_cap::CapShare;
use super::sources::Counted;
use crate::addr::{Addr, PackedAddr};
use crate::handler::ConnInfo;
use crate::id::{ConnId, ListenerId};
use crate::proto::{Machine, State, Time};

/// One connection's place.
pub(super) struct Connection {
    pub(super) id: ConnId,
    pub(super) machine: Machine,
    /// `None` for one that the server has made, or is to.
    pub(super) listener: Option<ListenerId>,
    pub(super) peer: PackedAddr,
    pub(super) accepted_at: Time,
    /// The kernel may have input, as far as we know.
    pub(super) readable: bool,
    /// The kernel may take output, as far as we know.
    pub(super) writable: bool,
    /// End of stream or an error is to come, or urgent bytes do: short reads are not the last. Sticky.
    pub(super) hang_up: bool,
    /// On the ready list.
    pub(super) queued: bool,
    /// The kernel was out of memory for this socket: try again when its timer fires.
    pub(super) retry: bool,
    /// Counted among the connections that are not open yet.
    pub(super) pending: bool,
    /// On the list of those from which nothing is read because memory is tight.
    pub(super) paused_for_memory: bool,
    pub(super) counted: Counted,
    /// What is left of the read budget in iteration `budget_iteration`: a connection may have several turns in one of the loop's.
    /// In whole frame costs.
    pub(super) budget: u16,
    /// The low bits of the iteration's number.
    pub(super) budget_iteration: u16,
}

/// All connections. Its length never passes the cap: [`Connections::reserve`] is asked before accept.
pub(super) struct Connections {
    slab: Slab<Connection>,
    /// The latest generation said for each slot; never zero for a connection.
    generations: Vec<u32>,
    cap: usize,
    /// The cap is one that other servers share.
    share: Option<CapShare>,
    /// The place of the next who goes is for who comes then.
    keeps: bool,
}

impl Connections {
    /// With room for `slots` from the start.
    pub(super) fn new(cap: usize, slots: usize) -> Self {
        Self {
            slab: Slab::with_capacity(slots),
            generations: Vec::with_capacity(slots),
            cap,
            share: None,
            keeps: false,
        }
    }

    /// From now on the cap is that of all who share it. While nobody is connected.
    pub(super) fn share(&mut self, share: CapShare) {
        debug_assert!(self.is_empty());
        self.share = Some(share);
    }

    pub(super) fn cap(&self) -> usize {
        self.shared_cap().unwrap_or(self.cap)
    }

    pub(super) fn shared_cap(&self) -> Option<usize> {
        self.share.as_ref().map(|share| share.shared_cap().cap())
    }

    pub(super) fn set_cap(&mut self, cap: usize) {
        match &self.share {
            Some(share) => share.shared_cap().set_cap(cap),
            None => self.cap = cap,
        }
    }

    /// This server's part of a limit that holds for all who share the cap.
    pub(super) fn part_of(&self, limit: usize) -> usize {
        self.share.as_ref().map_or(limit, |share| share.part_of(limit))
    }

    pub(super) fn len(&self) -> usize {
        self.slab.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.slab.is_empty()
    }

    pub(super) fn has_room(&self) -> bool {
        match &self.share {
            Some(share) => share.has_room(),
            None => self.slab.len() < self.cap,
        }
    }

    /// There would be room if one left.
    pub(super) fn is_exhausted(&self) -> bool {
        match &self.share {
            Some(share) => share.is_exhausted(),
            None => self.slab.len() == self.cap,
        }
    }

    /// Servers that share the cap have clearly fewer connections.
    pub(super) fn is_ahead(&self) -> bool {
        self.share.as_ref().is_some_and(CapShare::is_ahead)
    }

    /// Makes sure of a place for the next connection: what [`Connections::has_room`] has said may be another server's by now.
    pub(super) fn reserve(&mut self) -> bool {
        match &mut self.share {
            Some(share) => share.reserve(),
            None => self.has_room(),
        }
    }

    /// The next connection is not to come.
    pub(super) fn unreserve(&mut self) {
        self.keeps = false;
        if let Some(share) = &mut self.share {
            share.unreserve();
        }
    }

    /// Whoever goes next leaves its place to the next connection.
    pub(super) fn keep_place(&mut self) {
        self.keeps = true;
    }

    /// The last look for room in a turn: if there is none, the loop is woken when there is some.
    pub(super) fn await_room(&self) -> bool {
        match &self.share {
            Some(share) => share.await_room(),
            None => self.has_room(),
        }
    }

    /// At the end of a turn: others may have what was given back and not taken again.
    pub(super) fn offer_room(&mut self) {
        if let Some(share) = &mut self.share {
            share.offer();
        }
    }

    /// The id for the next connection. Never said twice: a peer that is refused under it keeps it.
    pub(super) fn next_id(&mut self) -> ConnId {
        let index = self.slab.vacant_key();
        if self.generations.len() <= index {
            self.generations.resize(index + 1, 0);
        }
        let mut generation = 1;
        if let Some(latest) = self.generations.get_mut(index) {
            generation = latest.wrapping_add(1).max(1);
            *latest = generation;
        }
        ConnId {
            index: index as u32,
            generation,
        }
    }

    /// Moves a connection in, under the id that [`Connections::next_id`] has just said.
    pub(super) fn insert(&mut self, conn: Connection) {
        let index = conn.id.index as usize;
        debug_assert!(self.has_room(), "the cap is checked before accept");
        self.keeps = false;
        if let Some(share) = &mut self.share {
            share.move_in();
        }
        let place = self.slab.insert(conn);
        debug_assert_eq!(place, index);
    }

    pub(super) fn remove(&mut self, id: ConnId) -> Option<Connection> {
        self.get(id)?;
        let keep = std::mem::take(&mut self.keeps);
        if let Some(share) = &mut self.share {
            share.move_out(keep);
        }
        self.slab.try_remove(id.index as usize)
    }

    #[inline]
    pub(super) fn get(&self, id: ConnId) -> Option<&Connection> {
        let conn = self.slab.get(id.index as usize)?;
        (conn.id.generation == id.generation).then_some(conn)
    }

    #[inline]
    pub(super) fn get_mut(&mut self, id: ConnId) -> Option<&mut Connection> {
        let conn = self.slab.get_mut(id.index as usize)?;
        (conn.id.generation == id.generation).then_some(conn)
    }

    /// The connection of a slot, whoever it is now.
    #[inline]
    pub(super) fn by_index(&self, index: u32) -> Option<&Connection> {
        self.slab.get(index as usize)
    }

    pub(super) fn by_index_mut(&mut self, index: u32) -> Option<&mut Connection> {
        self.slab.get_mut(index as usize)
    }

    /// The connection that an event is for, unless it has gone.
    #[inline]
    pub(super) fn addressee(&mut self, index: u32, token: Token) -> Option<&mut Connection> {
        self.slab
            .get_mut(index as usize)
            .filter(|conn| Token::of_conn(conn.id) == token)
    }

    /// Slots that have ever had a connection.
    pub(super) fn slots(&self) -> u32 {
        self.generations.len() as u32
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Connection> {
        self.slab.iter().map(|(_, conn)| conn)
    }

    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Connection> {
        self.slab.iter_mut().map(|(_, conn)| conn)
    }
}

impl Connection {
    /// Of a connection that begins now, in the loop's iteration `iteration`: nothing is known of its socket, and it has its whole budget.
    pub(super) fn new(
        id: ConnId,
        listener: Option<ListenerId>,
        peer: Addr,
        machine: Machine,
        now: Time,
        iteration: u64,
    ) -> Self {
        Self {
            id,
            machine,
            listener,
            peer: peer.into(),
            accepted_at: now,
            readable: false,
            writable: false,
            hang_up: false,
            queued: false,
            retry: false,
            pending: false,
            paused_for_memory: false,
            counted: Counted::No,
            budget: 0,
            budget_iteration: (iteration as u16).wrapping_sub(1),
        }
    }

    /// A read is welcome and may bring something. Who waits for a fresh "would block" asks the kernel in any case: an
    /// edge that was used up before announces nothing more.
    #[inline]
    pub(super) fn can_read(&self) -> bool {
        if self.machine.is_quiet() {
            return self.readable && !self.paused_for_memory;
        }
        let asks = self.machine.wants_fresh_blocked() && !self.retry;
        (self.readable || asks || self.machine.has_set_aside())
            && !self.is_paused_for_memory()
            && self.machine.wants_read()
    }

    /// Something has come for a connection that has nothing to do but to answer it, and after a short read nothing more is there.
    #[inline]
    pub(super) fn is_at_rest(&self) -> bool {
        self.readable
            && self.writable
            && !self.hang_up
            && !self.paused_for_memory
            && !self.retry
            && self.machine.is_at_rest()
    }

    /// Nothing is read because memory is tight.
    #[inline]
    pub(super) fn is_paused_for_memory(&self) -> bool {
        self.paused_for_memory && self.machine.state() == State::Open
    }

    /// Its handshake should have been over at `due`.
    pub(super) fn is_handshake_overdue(&self, due: Time) -> bool {
        self.machine.state() == State::Handshaking && self.machine.deadline() <= due
    }

    pub(super) fn peer(&self) -> Addr {
        self.peer.unpacked()
    }

    /// Where it comes from: the address behind a proxy, if one was told.
    pub(super) fn source(&self) -> Addr {
        let told = self.machine.proxy().and_then(|header| header.source());
        told.map_or_else(|| self.peer(), Addr::from)
    }

    pub(super) fn info(&self, now: Time) -> ConnInfo {
        ConnInfo {
            id: self.id,
            listener: self.listener,
            peer: self.peer(),
            source: self.source(),
            state: self.machine.state(),
            age: now.since(self.accepted_at),
            idle: now.since(self.machine.last_input()),
            traffic: self.machine.traffic(),
            queued: self.machine.queued(),
            buffered: self.machine.buffered(),
            paused: self.machine.is_paused_by_handler(),
            congested: self.machine.is_congested(),
            throttled: self.machine.is_throttled(),
            paused_for_memory: self.is_paused_for_memory(),
            time_left: self.machine.time_left(now),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;

    use super::*;
    use crate::listen::Listen;
    use crate::proto::Pool;

    fn conn(id: ConnId) -> Connection {
        let listen = Listen::tcp("127.0.0.1:0");
        let limits = Rc::new(listen.limits.clone());
        let machine = Machine::new(&listen.framing, limits, None, Time::ZERO, &mut Pool::default());
        Connection::new(
            id,
            Some(ListenerId::nth(0)),
            Addr::unspecified(),
            machine,
            Time::ZERO,
            0,
        )
    }

    /// DESIGN.md, invariant 7: what is for a slot's former connection finds nobody.
    #[test]
    fn a_slot_has_one_connection_at_a_time() {
        let mut connections = Connections::new(1, 0);
        let first = connections.next_id();
        connections.insert(conn(first));
        assert!(!connections.has_room());
        assert!(connections.addressee(first.index, Token::of_conn(first)).is_some());
        connections.remove(first).expect("it is there");
        let second = connections.next_id();
        connections.insert(conn(second));
        assert_eq!(
            (second.index, connections.len()),
            (first.index, 1),
            "the slot is used again"
        );
        assert_ne!(second, first);
        assert!(connections.addressee(first.index, Token::of_conn(first)).is_none());
        assert!(
            connections.get(first).is_none()
                && connections.get_mut(first).is_none()
                && connections.remove(first).is_none()
        );
        assert!(connections.addressee(second.index, Token::of_conn(second)).is_some());
    }

    /// What each idle connection costs, whatever else does.
    #[test]
    #[cfg(target_pointer_width = "64")]
    fn a_connection_is_small() {
        assert_eq!(
            size_of::<Option<Connection>>(),
            size_of::<Connection>(),
            "the slab needs no more"
        );
        assert!(size_of::<Connection>() <= 144, "{}", size_of::<Connection>());
    }

    #[test]
    fn generations_come_round_without_zero() {
        let mut connections = Connections::new(1, 0);
        connections.generations = vec![u32::MAX];
        assert_eq!(connections.next_id().generation, 1);
    }
}
