//! Slots that are kept free for the clients of one listener ([`Listen::reserved`]).

use super::capacity::Capacity;
use super::connections::Connections;
use super::listener::Listener;
use super::listeners::Listeners;
#[cfg(doc)]
use crate::config::Listen;
use crate::id::ListenerId;

impl<L> Listener<L> {
    /// It has slots of its own, or is to have some.
    pub(super) fn reserves(&self) -> bool {
        self.options.reserved > 0 || self.reserve > 0
    }

    /// A slot is free for its next client.
    pub(super) fn has_slot(&self, capacity: &Capacity) -> bool {
        self.reserve > 0 || capacity.has_slot
    }

    /// Takes a slot for its next client: a reserved one, if it has one.
    #[must_use = "no slot may be free"]
    pub(super) fn claim<S>(&mut self, conns: &mut Connections<S>) -> bool {
        if self.reserve > 0 && conns.claim_reserved() {
            self.reserve -= 1;
            return true;
        }
        conns.claim()
    }

    /// Number of free slots that it is to have beside its connections. One whose last callback runs
    /// has left its slot.
    fn wanted<S>(&self, conns: &Connections<S>) -> usize {
        if self.socket.is_none() {
            return 0;
        }
        let leaving = usize::from(conns.leaving_listener() == Some(self.id));
        let max = self.options.max_connections.unwrap_or(usize::MAX);
        let reserved = self.options.reserved.min(max);
        reserved.saturating_sub(self.connections.saturating_sub(leaving))
    }

    /// It has more free slots than it is to have, or the cap was lowered.
    fn has_excess<S>(&self, conns: &Connections<S>) -> bool {
        self.reserve > self.wanted(conns) || self.reserve > 0 && conns.exceeds_cap()
    }

    fn can_refill<S>(&self, conns: &Connections<S>) -> bool {
        self.has_excess(conns) || self.reserve < self.wanted(conns) && conns.has_room()
    }

    fn refill<S>(&mut self, conns: &mut Connections<S>) {
        {
            // A server that has seen room for a client finds it.
            let gate = conns.gate();
            let _locked = gate.as_ref().map(|shared_cap| shared_cap.lock());
            while self.reserve < self.wanted(conns) && conns.reserve() {
                self.reserve += 1;
            }
        }
        while self.has_excess(conns) {
            conns.unreserve();
            self.reserve -= 1;
        }
    }
}

impl<L> Listeners<L> {
    /// A listener is new, or its options have changed.
    pub(super) fn note_reserve<S>(&mut self, id: ListenerId, conns: &mut Connections<S>) {
        if self.by_id(id).is_some_and(Listener::reserves) {
            self.reserves.insert(id);
            self.refill_reserves(conns);
        }
    }

    /// Reserves slots that have become free, and gives back those that are not needed any more. Not
    /// while a client is being admitted, whose slot is neither free nor its listener's yet.
    #[inline]
    pub(super) fn refill_reserves<S>(&mut self, conns: &mut Connections<S>) {
        if !self.reserves.is_empty() && !conns.has_claim() {
            self.refill_all(conns);
        }
    }

    #[inline(never)]
    fn refill_all<S>(&mut self, conns: &mut Connections<S>) {
        let mut ids = std::mem::take(&mut self.reserves);
        ids.retain(|&id| {
            if self.by_id(id).is_some_and(|one| one.can_refill(conns)) {
                if let Some(listener) = self.by_id_mut(id) {
                    listener.refill(conns);
                }
            }
            self.by_id(id).is_some_and(Listener::reserves)
        });
        self.reserves = ids;
    }

    /// The sum of all reserves.
    #[cfg(feature = "sim")]
    pub(super) fn reserved(&self) -> usize {
        self.iter().map(|listener| listener.reserve).sum()
    }
}
