//! The slab: who is connected, under which id, and how many may be.

use slab::Slab;

use super::os::Token;
use super::sources::Counted;
use crate::addr::{Addr, PackedAddr};
use crate::handler::ConnInfo;
use crate::id::{ConnId, ListenerId};
use crate::proto::{Machine, State, Time};

/// One connection's place.
pub(super) struct Slot {
    pub(super) id: ConnId,
    pub(super) machine: Machine,
    pub(super) listener: ListenerId,
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
    pub(super) unopened: bool,
    /// On the list of those from which nothing is read because memory is tight.
    pub(super) squeezed: bool,
    pub(super) counted: Counted,
    /// What is left of the read budget in the loop's turn `budget_turn`: a connection may have several turns in one of the loop's.
    /// In whole frame costs.
    pub(super) budget: u16,
    /// The low bits of the turn's number.
    pub(super) budget_turn: u16,
}

/// All connections. Its length never passes the cap: [`Roster::has_room`] is asked before accept.
pub(super) struct Roster {
    slab: Slab<Slot>,
    /// The latest generation said for each slot; never zero for a tenant.
    generations: Vec<u32>,
    cap: usize,
}

impl Roster {
    /// With room for `places` from the start.
    pub(super) fn new(cap: usize, places: usize) -> Self {
        Self {
            slab: Slab::with_capacity(places),
            generations: Vec::with_capacity(places),
            cap,
        }
    }

    pub(super) fn cap(&self) -> usize {
        self.cap
    }

    pub(super) fn set_cap(&mut self, cap: usize) {
        self.cap = cap;
    }

    pub(super) fn len(&self) -> usize {
        self.slab.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.slab.is_empty()
    }

    pub(super) fn has_room(&self) -> bool {
        self.slab.len() < self.cap
    }

    /// The id for the next tenant. Never said twice: a peer that is refused under it keeps it.
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

    /// Moves a tenant in, under the id that [`Roster::next_id`] has just said.
    pub(super) fn insert(&mut self, slot: Slot) {
        let index = slot.id.index as usize;
        debug_assert!(self.has_room(), "the cap is checked before accept");
        let place = self.slab.insert(slot);
        debug_assert_eq!(place, index);
    }

    pub(super) fn remove(&mut self, id: ConnId) -> Option<Slot> {
        self.get(id)?;
        self.slab.try_remove(id.index as usize)
    }

    #[inline]
    pub(super) fn get(&self, id: ConnId) -> Option<&Slot> {
        let slot = self.slab.get(id.index as usize)?;
        (slot.id.generation == id.generation).then_some(slot)
    }

    #[inline]
    pub(super) fn get_mut(&mut self, id: ConnId) -> Option<&mut Slot> {
        let slot = self.slab.get_mut(id.index as usize)?;
        (slot.id.generation == id.generation).then_some(slot)
    }

    /// The tenant of a slot, whoever it is now.
    #[inline]
    pub(super) fn tenant(&self, index: u32) -> Option<&Slot> {
        self.slab.get(index as usize)
    }

    /// The tenant that an event is for, unless it has gone.
    #[inline]
    pub(super) fn addressee(&mut self, index: u32, token: Token) -> Option<&mut Slot> {
        self.slab
            .get_mut(index as usize)
            .filter(|slot| Token::of_conn(slot.id) == token)
    }

    /// Slots that have ever had a tenant.
    pub(super) fn slots(&self) -> u32 {
        self.generations.len() as u32
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Slot> {
        self.slab.iter().map(|(_, slot)| slot)
    }

    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Slot> {
        self.slab.iter_mut().map(|(_, slot)| slot)
    }
}

impl Slot {
    /// A read is welcome and may bring something. Who waits for a fresh "would block" asks the kernel in any case: an
    /// edge that was used up before announces nothing more.
    #[inline]
    pub(super) fn can_read(&self) -> bool {
        if self.machine.is_quiet() {
            return self.readable && !self.squeezed;
        }
        let asks = self.machine.wants_fresh_blocked() && !self.retry;
        (self.readable || asks || self.machine.has_set_aside()) && !self.is_squeezed() && self.machine.wants_read()
    }

    /// Nothing is read because memory is tight.
    #[inline]
    pub(super) fn is_squeezed(&self) -> bool {
        self.squeezed && self.machine.state() == State::Open
    }

    /// Its handshake should have been over at `due`.
    pub(super) fn is_shaking_since(&self, due: Time) -> bool {
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
            squeezed: self.is_squeezed(),
            time_left: self.machine.time_left(now),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;

    use super::*;
    use crate::listen::Listen;

    fn slot(id: ConnId) -> Slot {
        let listen = Listen::tcp("127.0.0.1:0");
        let machine = Machine::new(&listen.framing, Rc::new(listen.limits.clone()), None, Time::ZERO);
        Slot {
            id,
            machine,
            listener: ListenerId(0),
            peer: Addr::unspecified().into(),
            accepted_at: Time::ZERO,
            readable: false,
            writable: false,
            hang_up: false,
            queued: false,
            retry: false,
            unopened: false,
            squeezed: false,
            counted: Counted::No,
            budget: 0,
            budget_turn: 0,
        }
    }

    /// DESIGN.md, invariant 7: what is for a slot's former tenant finds nobody.
    #[test]
    fn a_slot_has_one_tenant_at_a_time() {
        let mut roster = Roster::new(1, 0);
        let first = roster.next_id();
        roster.insert(slot(first));
        assert!(!roster.has_room());
        assert!(roster.addressee(first.index, Token::of_conn(first)).is_some());
        roster.remove(first).expect("it is there");
        let second = roster.next_id();
        roster.insert(slot(second));
        assert_eq!((second.index, roster.len()), (first.index, 1), "the slot is used again");
        assert_ne!(second, first);
        assert!(roster.addressee(first.index, Token::of_conn(first)).is_none());
        assert!(roster.get(first).is_none() && roster.get_mut(first).is_none() && roster.remove(first).is_none());
        assert!(roster.addressee(second.index, Token::of_conn(second)).is_some());
    }

    /// What each idle connection costs, whatever else does.
    #[test]
    #[cfg(target_pointer_width = "64")]
    fn a_slot_is_small() {
        assert_eq!(size_of::<Option<Slot>>(), size_of::<Slot>(), "the slab needs no more");
        assert!(size_of::<Slot>() <= 144, "{}", size_of::<Slot>());
    }

    #[test]
    fn generations_come_round_without_zero() {
        let mut roster = Roster::new(1, 0);
        roster.generations = vec![u32::MAX];
        assert_eq!(roster.next_id().generation, 1);
    }
}
