//! Work left over that no event will announce.
//!
//! Edge-triggered readiness is told once. Whoever stops before the kernel says "would block", for a budget, a pause or
//! because another connection asked something of it, is on this list, and the poll does not sleep while it is not empty.

use std::collections::VecDeque;

use crate::id::ConnId;

/// Connections that want a turn, each at most once (the slot knows), first come first served.
#[derive(Debug, Default)]
pub(super) struct Ready {
    queue: VecDeque<ConnId>,
}

impl Ready {
    /// Appends `id` unless `queued` says that it is on the list already.
    #[inline]
    pub(super) fn push(&mut self, id: ConnId, queued: &mut bool) {
        if !std::mem::replace(queued, true) {
            self.queue.push_back(id);
        }
    }

    /// The next id. It may have gone meanwhile; the caller clears the mark in its slot.
    pub(super) fn pop(&mut self) -> Option<ConnId> {
        self.queue.pop_front()
    }

    #[inline]
    pub(super) fn len(&self) -> usize {
        self.queue.len()
    }

    #[inline]
    pub(super) fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }
}
