//! What the connections of one server share: spare memory, and the totals of their traffic.

use std::rc::Rc;

use super::active::Active;
use super::buffers::Buffers;
use super::send_queue::SharedPayloads;
use super::state::Traffic;
use crate::histogram::Histogram;

/// Spare [`Active`] parts: enough for one iteration.
const MAX_SPARE: usize = 64;

/// Spare memory and totals, lent to each connection for its turn.
#[derive(Default)]
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

impl Pool {
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
