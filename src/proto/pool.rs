//! What the connections of one server share: spare memory, and the totals of their traffic.

use std::rc::Rc;

use super::active::Active;
use super::buffers::{lower_allocator_cache, Buffers, MAX_SPARE};
use super::send_queue::SharedPayloads;
use super::state::Traffic;
use crate::histogram::Histogram;

/// Spare memory and totals, lent to each connection for its turn.
pub(crate) struct Pool {
    pub(super) buffers: Buffers,
    /// Shared payloads that connections keep.
    pub(crate) shared: Rc<SharedPayloads>,
    #[allow(clippy::vec_box)] // they stay in place while they change hands
    active: Vec<Box<Active>>,
    /// The traffic of all connections of the server.
    pub(crate) traffic: Traffic,
    /// The sizes of the frames in it.
    pub(crate) sizes_in: Histogram,
    pub(crate) sizes_out: Histogram,
}

impl Default for Pool {
    fn default() -> Self {
        Self {
            buffers: Buffers::with_lists(),
            shared: Rc::default(),
            active: Vec::with_capacity(MAX_SPARE),
            traffic: Traffic::default(),
            sizes_in: Histogram::default(),
            sizes_out: Histogram::default(),
        }
    }
}

impl Pool {
    /// Drops all spare parts, so that the allocator can return the memory around them. Everything
    /// else that may be released must be before.
    pub(crate) fn release_spare(&mut self) {
        self.buffers.clear();
        self.active.clear();
        lower_allocator_cache();
    }

    #[inline]
    pub(crate) fn give(&mut self, buffer: Vec<u8>) {
        self.buffers.give(buffer);
    }

    #[inline]
    pub(super) fn take_active(&mut self) -> Box<Active> {
        self.active.pop().unwrap_or_default()
    }

    /// Takes back the parts of a connection that is idle again.
    #[inline]
    pub(super) fn give_active(&mut self, mut active: Box<Active>) {
        active.reset(&mut self.buffers);
        if self.active.len() < MAX_SPARE {
            self.active.push(active);
        }
    }
}
