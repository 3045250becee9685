//! What the connections of one server share: spare buffers, and the count of what they carried.

use super::Traffic;

/// A buffer that grew past this is given back to the allocator, not to the pool.
const KEEP_CAPACITY: usize = 128 * 1024;
/// Spare buffers kept: enough for the connections of one turn, bounded in all by 64 × 128 KiB.
const KEEP_BUFFERS: usize = 64;

/// Spare buffers, so that an idle connection owns none and a busy one allocates none.
#[derive(Debug, Default)]
pub(crate) struct Pool {
    spare: Vec<Vec<u8>>,
    /// What all connections of the server have carried.
    pub(crate) traffic: Traffic,
}

impl Pool {
    pub(crate) fn take(&mut self) -> Vec<u8> {
        self.spare.pop().unwrap_or_default()
    }

    pub(crate) fn give(&mut self, mut buffer: Vec<u8>) {
        let capacity = buffer.capacity();
        if capacity > 0 && capacity <= KEEP_CAPACITY && self.spare.len() < KEEP_BUFFERS {
            buffer.clear();
            self.spare.push(buffer);
        }
    }
}
