//! What waits to be sent: bytes in order, taken from the front as the kernel takes them.

use super::pool::{retained, Pool};

/// Bytes waiting for the kernel. Owns memory beyond the turn only while it is not empty: see [`SendBuffer::shrink`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct SendBuffer {
    buffer: Vec<u8>,
    /// How much of `buffer` is gone already. Invariant: `sent < buffer.len()`, or both are zero.
    sent: usize,
}

impl SendBuffer {
    pub(super) const fn new() -> Self {
        Self {
            buffer: Vec::new(),
            sent: 0,
        }
    }

    /// Where the next bytes are appended.
    #[inline]
    pub(super) fn tail(&mut self, pool: &mut Pool) -> &mut Vec<u8> {
        if self.buffer.capacity() == 0 {
            self.buffer = pool.take();
        }
        &mut self.buffer
    }

    #[inline]
    pub(super) fn waiting(&self) -> &[u8] {
        self.buffer.get(self.sent..).unwrap_or_default()
    }

    #[inline]
    pub(super) fn len(&self) -> usize {
        self.buffer.len() - self.sent
    }

    /// What has gone takes no more memory than what waits.
    #[cfg(feature = "sim")]
    pub(super) fn is_compact(&self) -> bool {
        self.sent <= self.len()
    }

    #[inline]
    pub(super) fn is_empty(&self) -> bool {
        self.buffer.is_empty()
    }

    /// The first `count` waiting bytes have gone.
    ///
    /// What is left moves to the front only when it is the smaller half, so that a slow reader
    /// costs each byte at most one more copy.
    #[inline]
    pub(super) fn advance(&mut self, count: usize) {
        self.sent += count.min(self.len());
        if self.sent == self.buffer.len() {
            // More is most likely to come, in this turn or in that of the next connection.
            self.buffer.clear();
            self.sent = 0;
        } else if self.sent > self.buffer.len() / 2 {
            self.buffer.drain(..self.sent);
            self.sent = 0;
        }
    }

    /// Memory that it takes beyond the turn.
    #[inline]
    pub(super) fn retained(&self) -> usize {
        if self.is_empty() {
            0
        } else {
            retained(&self.buffer)
        }
    }

    /// At the end of a turn: gives back what it does not need.
    #[inline]
    pub(super) fn shrink(&mut self, pool: &mut Pool) {
        if !self.is_empty() {
            pool.shrink(&mut self.buffer);
        } else if self.capacity() > 0 {
            self.clear(pool);
        }
    }

    #[inline]
    pub(super) fn capacity(&self) -> usize {
        self.buffer.capacity()
    }

    pub(super) fn clear(&mut self, pool: &mut Pool) {
        pool.give(std::mem::take(&mut self.buffer));
        self.sent = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_leave_in_order_whatever_the_pieces() {
        let mut pool = Pool::default();
        let mut send_buf = SendBuffer::default();
        let bytes: Vec<u8> = (0..=255).cycle().take(10_000).collect();
        let mut seen = Vec::new();
        for (turn, chunk) in bytes.chunks(37).enumerate() {
            send_buf.tail(&mut pool).extend_from_slice(chunk);
            let take = (turn * 31 % 50).min(send_buf.len());
            seen.extend_from_slice(&send_buf.waiting()[..take]);
            send_buf.advance(take);
        }
        seen.extend_from_slice(send_buf.waiting());
        send_buf.advance(usize::MAX);
        assert_eq!(seen, bytes);
        assert!(send_buf.is_empty());
        send_buf.shrink(&mut pool);
        assert_eq!(
            send_buf.capacity(),
            0,
            "beyond the turn an empty send_buf owns no memory"
        );
    }
}
