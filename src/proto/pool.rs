//! What the connections of one server share: spare buffers, and the count of what they carried.

use super::active::Active;
use super::{Time, Traffic};
use crate::histogram::Histogram;

/// A buffer that grew past this is given back to the allocator, not to the pool.
const KEEP_CAPACITY: usize = 128 * 1024;
/// Spare buffers kept: enough for the connections of one turn, bounded in all by 64 × 128 KiB.
const KEEP_BUFFERS: usize = 64;

/// A buffer up to this size is small: kept apart, for what stays long.
const SMALL: usize = 1024;
/// An send_buf keeps a buffer up to this size while it is in the pool: 64 × 16 KiB in all.
const KEEP_OUTBOX: usize = 16 * 1024;

/// Spare buffers, so that an idle connection owns none and a busy one allocates none.
#[derive(Default)]
pub(crate) struct Pool {
    spare: Vec<Vec<u8>>,
    small: Vec<Vec<u8>>,
    #[allow(clippy::vec_box)] // they stay where they are while they change hands
    active: Vec<Box<Active>>,
    /// What all connections of the server have carried.
    pub(crate) traffic: Traffic,
    /// The sizes of those frames.
    pub(crate) sizes_in: Histogram,
    pub(crate) sizes_out: Histogram,
}

/// Memory that a buffer takes beyond the turn: see [`Pool::shrink`].
#[inline]
pub(super) fn retained(buffer: &Vec<u8>) -> usize {
    buffer.capacity().min((buffer.len() * 2 + 1).max(SMALL))
}

impl Pool {
    #[inline]
    pub(crate) fn take(&mut self) -> Vec<u8> {
        self.spare.pop().or_else(|| self.small.pop()).unwrap_or_default()
    }

    #[inline]
    pub(crate) fn give(&mut self, buffer: Vec<u8>) {
        if buffer.capacity() > 0 {
            self.keep(buffer);
        }
    }

    fn keep(&mut self, mut buffer: Vec<u8>) {
        let capacity = buffer.capacity();
        let shelf = if capacity > SMALL {
            &mut self.spare
        } else {
            &mut self.small
        };
        if capacity <= KEEP_CAPACITY && shelf.len() < KEEP_BUFFERS {
            buffer.clear();
            shelf.push(buffer);
        }
    }

    /// One that is to cross threads leaves as its buffers alone.
    pub(super) fn of(spare: Vec<Vec<u8>>) -> Self {
        Self {
            spare,
            ..Self::default()
        }
    }

    pub(super) fn into_buffers(self) -> Vec<Vec<u8>> {
        self.spare
    }

    #[inline]
    pub(super) fn take_active(&mut self) -> Box<Active> {
        self.active.pop().unwrap_or_default()
    }

    /// Of a connection in which nothing goes on.
    #[inline]
    pub(super) fn give_active(&mut self, mut active: Box<Active>) {
        active.expired_through = Time::ZERO;
        active.recv_pos = 0;
        if active.send_buf.capacity() > KEEP_OUTBOX {
            active.send_buf.clear(self);
        }
        if self.active.len() < KEEP_BUFFERS {
            self.active.push(active);
        }
    }

    /// What stays in a buffer beyond the turn takes no more than twice its size, or a small buffer: spare ones go from hand
    /// to hand, and one byte in each must not keep them all.
    #[inline]
    pub(super) fn shrink(&mut self, buffer: &mut Vec<u8>) {
        if buffer.capacity() > SMALL {
            self.reallocate(buffer);
        }
    }

    fn reallocate(&mut self, buffer: &mut Vec<u8>) {
        let length = buffer.len();
        if buffer.capacity() / 2 <= length {
            return;
        }
        let mut fit = if length <= SMALL {
            self.small.pop().unwrap_or_default()
        } else {
            Vec::new()
        };
        fit.reserve_exact(length);
        fit.extend_from_slice(buffer);
        self.give(std::mem::replace(buffer, fit));
    }
}
