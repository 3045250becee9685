//! Slots that are kept free for the clients of one listener: how many there are.

use super::Connections;
use crate::id::ListenerId;

impl<S> Connections<S> {
    /// The cap was lowered, and more slots are taken.
    pub(in crate::reactor) fn exceeds_cap(&self) -> bool {
        match &self.share {
            Some(share) => share.taken() > share.cap(),
            None => self.taken() > self.cap,
        }
    }

    /// Keeps a free slot for the clients of one listener. False if none is free.
    pub(in crate::reactor) fn reserve(&mut self) -> bool {
        let has_room = self.has_room();
        let reserved = match &mut self.share {
            Some(share) => has_room && (share.take() || self.pass_leaving_permit(true)),
            None => has_room,
        };
        self.reserved += usize::from(reserved);
        reserved
    }

    /// The listener of the connection whose last callback runs.
    pub(in crate::reactor) fn leaving_listener(&self) -> Option<ListenerId> {
        let leaving = self.leaving?;
        self.get(leaving.id)?.listener
    }

    /// Gives a reserved slot back.
    pub(in crate::reactor) fn unreserve(&mut self) {
        self.reserved = self.reserved.saturating_sub(1);
        if let Some(share) = &mut self.share {
            share.give_back();
            share.offer();
        }
    }

    /// As [`Connections::claim`], of a slot that is reserved for the client.
    #[must_use = "the system may grant no memory"]
    pub(in crate::reactor) fn claim_reserved(&mut self) -> bool {
        if self.reserved == 0 || self.exceeds_cap() || !self.has_memory() {
            return false;
        }
        self.reserved -= 1;
        self.claimed += 1;
        true
    }

    #[cfg(feature = "sim")]
    pub(in crate::reactor) fn reserved(&self) -> usize {
        self.reserved
    }
}
