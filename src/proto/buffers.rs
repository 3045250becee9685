//! Memory of a connection: spare buffers that the connections of a server share, and pending
//! output.

use std::hint::black_box;
use std::iter;

/// A larger buffer goes back to the allocator and is not kept.
const MAX_KEPT: usize = 512 * 1024;
/// Spare parts of each kind: enough for one iteration.
pub(super) const MAX_SPARE: usize = 64;
/// All spare buffers together.
const MAX_SPARE_BYTES: usize = 8 * 1024 * 1024;
/// A larger buffer is not kept with spare parts of TLS sessions: 64 × 16 KiB in all.
#[cfg(feature = "tls")]
const MAX_CIPHERTEXT: usize = 16 * 1024;
/// A buffer up to this size is small: kept apart, for bytes that stay beyond the turn.
const SMALL: usize = 1024;

/// Spare buffers, so that an idle connection owns none and a busy one allocates none.
#[derive(Default)]
pub(super) struct Buffers {
    large: Vec<Vec<u8>>,
    /// The capacity of them all.
    large_bytes: usize,
    small: Vec<Vec<u8>>,
    #[cfg(feature = "tls")]
    #[allow(clippy::vec_box)] // they stay in place while they change hands
    ciphertexts: Vec<Box<Ciphertext>>,
}

/// Exchanges what the allocator caches, from anywhere in its heap, for the same at lower addresses:
/// glibc keeps up to 7 allocations of each size up to 1 KiB, in each thread, and newer ones 16.
///
/// It costs some 0.3 ms a round, and 2 ms where the memory has just been returned. Without memory
/// for it, it ends early.
pub(super) fn lower_allocator_cache() {
    /// Each begins with more free places.
    const ROUNDS: usize = 3;
    // Others cache otherwise.
    if cfg!(target_env = "gnu") {
        (0..ROUNDS).try_for_each(|_| exchange_cached());
    }
}

/// An allocator prefers the smallest free place that fits, wherever it lies: a remainder at the end
/// of the heap too. So larger parts take such places first, the lowest of them make room, and the
/// new ones for the cache are parts that shrink where they lie.
fn exchange_cached() -> Option<()> {
    const CACHED: usize = 16;
    const SIZES: usize = 64;
    const LARGE_PART: usize = 64 * 1024;
    const LARGE_PARTS: usize = 256;
    const ROOM: usize = 64;
    const SMALL_PART: usize = 4 * 1024;
    const SMALL_PARTS: usize = CACHED * SIZES + 256;
    let sizes = || (0..CACHED * SIZES).map(|at| 24 + at % SIZES * 16);
    let cached = allocate(sizes())?;
    let mut large = allocate(iter::repeat_n(LARGE_PART, LARGE_PARTS))?;
    drop(large.drain(..ROOM));
    let mut small = allocate(iter::repeat_n(SMALL_PART, SMALL_PARTS))?;
    for (part, size) in small.iter_mut().zip(sizes()) {
        part.shrink_to(size);
    }
    // The first ones are cached. Behind a large one the allocator looks at the heap's end.
    for part in small.into_iter().chain(cached).chain(large) {
        drop(black_box(part));
    }
    Some(())
}

/// Allocates a part of each size. The lowest address comes first.
fn allocate(sizes: impl ExactSizeIterator<Item = usize>) -> Option<Vec<Vec<u8>>> {
    // Before its parts: a list that grows among them takes their places.
    let mut parts: Vec<Vec<u8>> = allocate_one(sizes.len())?;
    for size in sizes {
        parts.push(allocate_one(size)?);
    }
    parts.sort_unstable_by_key(|part| part.as_ptr().addr());
    Some(parts)
}

fn allocate_one<T>(capacity: usize) -> Option<Vec<T>> {
    let mut part = Vec::new();
    part.try_reserve_exact(capacity).ok()?;
    Some(part)
}

/// Moves a list that has grown in a storm to the lowest of several places of this capacity: a list
/// that shrinks stays where it is. A longer one is left.
pub(crate) fn lower<T>(list: &mut Vec<T>, capacity: usize) {
    const TRIED: usize = 64;
    let places = [(); TRIED].map(|()| allocate_one::<T>(capacity));
    let places = places.into_iter().flatten();
    let lowest = places.min_by_key(|place| place.as_ptr().addr());
    if let Some(mut lowest) = lowest.filter(|lowest| {
        let is_lower = lowest.as_ptr().addr() < list.as_ptr().addr();
        list.len() <= capacity && (is_lower || list.capacity() > capacity)
    }) {
        lowest.append(list);
        *list = lowest;
    }
}

/// Returns the memory that `buffer` takes beyond the turn: see [`Buffers::shrink`].
#[inline]
pub(super) fn retained(buffer: &Vec<u8>) -> usize {
    buffer.capacity().min((buffer.len() * 2 + 1).max(SMALL))
}

impl Buffers {
    /// Buffers that can cross threads: see [`Buffers::into_large`].
    pub(super) fn of(large: Vec<Vec<u8>>) -> Self {
        Self {
            large_bytes: large.iter().map(Vec::capacity).sum(),
            large,
            ..Self::default()
        }
    }

    pub(super) fn into_large(self) -> Vec<Vec<u8>> {
        self.large
    }

    /// With the capacity that the lists ever need. An allocator returns the end of its heap alone,
    /// so a list must not grow behind the buffers of a storm.
    pub(super) fn with_lists() -> Self {
        Self {
            large: Vec::with_capacity(MAX_SPARE),
            large_bytes: 0,
            small: Vec::with_capacity(MAX_SPARE),
            #[cfg(feature = "tls")]
            ciphertexts: Vec::with_capacity(MAX_SPARE),
        }
    }

    /// Drops all spare parts.
    pub(super) fn clear(&mut self) {
        self.large.clear();
        self.large_bytes = 0;
        self.small.clear();
        #[cfg(feature = "tls")]
        self.ciphertexts.clear();
    }

    #[inline]
    pub(super) fn take(&mut self) -> Vec<u8> {
        match self.large.pop() {
            Some(buffer) => {
                self.large_bytes -= buffer.capacity();
                buffer
            }
            None => self.small.pop().unwrap_or_default(),
        }
    }

    #[inline]
    pub(super) fn give(&mut self, buffer: Vec<u8>) {
        if buffer.capacity() > 0 {
            self.keep(buffer);
        }
    }

    fn keep(&mut self, mut buffer: Vec<u8>) {
        let capacity = buffer.capacity();
        buffer.clear();
        if capacity <= SMALL {
            if self.small.len() < MAX_SPARE {
                self.small.push(buffer);
            }
        } else if capacity <= MAX_KEPT
            && self.large.len() < MAX_SPARE
            && self.large_bytes + capacity <= MAX_SPARE_BYTES
        {
            self.large_bytes += capacity;
            self.large.push(buffer);
        }
    }

    /// Shrinks a buffer whose bytes stay beyond the turn to twice their size, or to a small buffer.
    ///
    /// Spare buffers go from connection to connection, and one byte in each must not keep them all.
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

#[cfg(feature = "tls")]
impl Buffers {
    #[inline]
    pub(super) fn take_ciphertext(&mut self) -> Box<Ciphertext> {
        self.ciphertexts.pop().unwrap_or_default()
    }

    /// Takes back the parts of a session that is idle, or over.
    #[inline]
    pub(super) fn give_ciphertext(&mut self, mut ciphertext: Box<Ciphertext>) {
        if !ciphertext.is_empty() || ciphertext.send_buf.capacity() > MAX_CIPHERTEXT {
            ciphertext.send_buf.clear(self);
        }
        self.give(std::mem::take(&mut ciphertext.recv_buf));
        (ciphertext.clear, ciphertext.overhead, ciphertext.goodbye) = (0, 0, 0);
        if self.ciphertexts.len() < MAX_SPARE {
            self.ciphertexts.push(ciphertext);
        }
    }
}

/// The buffered ciphertext of one TLS session, in both directions: an idle one has none.
#[cfg(feature = "tls")]
pub(super) struct Ciphertext {
    /// Incomplete records, and the records of an incomplete handshake message.
    pub(super) recv_buf: Vec<u8>,
    /// Ciphertext pending for the kernel.
    pub(super) send_buf: SendBuffer,
    /// How many bytes at the front of `send_buf` are from before the upgrade, and in the clear.
    pub(super) clear: usize,
    /// How many bytes of `send_buf` are TLS's own: handshake, tickets, key updates.
    pub(super) overhead: usize,
    /// The length of our close_notify, which is the end of `send_buf` until it is sent.
    pub(super) goodbye: usize,
}

#[cfg(feature = "tls")]
impl Ciphertext {
    pub(super) const NONE: Self = Self {
        recv_buf: Vec::new(),
        send_buf: SendBuffer::new(),
        clear: 0,
        overhead: 0,
        goodbye: 0,
    };
    /// What an idle session has.
    pub(super) const IDLE: &'static Self = &Self::NONE;

    #[inline]
    pub(super) fn is_empty(&self) -> bool {
        self.recv_buf.is_empty() && self.send_buf.is_empty()
    }
}

#[cfg(feature = "tls")]
impl Default for Ciphertext {
    fn default() -> Self {
        Self::NONE
    }
}

/// Bytes pending for the kernel, in order.
///
/// Owns memory beyond the turn only while there are any: see [`SendBuffer::shrink`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct SendBuffer {
    bytes: Vec<u8>,
    /// How many of `bytes` are sent. Invariant: `sent < bytes.len()`, or both are zero.
    sent: usize,
}

impl SendBuffer {
    pub(super) const fn new() -> Self {
        Self {
            bytes: Vec::new(),
            sent: 0,
        }
    }

    #[cfg(feature = "tls")]
    pub(super) fn of(bytes: Vec<u8>) -> Self {
        Self { bytes, sent: 0 }
    }

    /// Returns where the next bytes are appended.
    #[inline]
    pub(super) fn tail(&mut self, buffers: &mut Buffers) -> &mut Vec<u8> {
        if self.bytes.capacity() == 0 {
            self.bytes = buffers.take();
        }
        &mut self.bytes
    }

    #[inline]
    pub(super) fn pending(&self) -> &[u8] {
        self.bytes.get(self.sent..).unwrap_or_default()
    }

    #[inline]
    pub(super) fn len(&self) -> usize {
        self.bytes.len() - self.sent
    }

    #[inline]
    pub(super) fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// True if sent bytes take no more memory than pending ones.
    #[cfg(feature = "sim")]
    pub(super) fn is_compact(&self) -> bool {
        self.sent <= self.len()
    }

    /// Removes the first `count` pending bytes.
    ///
    /// The remainder moves to the front only when it is the smaller half, so that a slow reader
    /// costs each byte at most one more copy.
    #[inline]
    pub(super) fn advance(&mut self, count: usize) {
        self.sent += count.min(self.len());
        if self.sent == self.bytes.len() {
            // More is likely to follow, in this turn or in the next connection's.
            self.bytes.clear();
            self.sent = 0;
        } else if self.sent > self.bytes.len() / 2 {
            self.bytes.drain(..self.sent);
            self.sent = 0;
        }
    }

    /// Returns the memory that it takes beyond the turn.
    #[inline]
    pub(super) fn memory(&self) -> usize {
        if self.is_empty() {
            0
        } else {
            retained(&self.bytes)
        }
    }

    /// Gives back memory that it does not need beyond the turn.
    #[inline]
    pub(super) fn shrink(&mut self, buffers: &mut Buffers) {
        if !self.is_empty() {
            buffers.shrink(&mut self.bytes);
        } else if self.capacity() > 0 {
            self.clear(buffers);
        }
    }

    #[inline]
    pub(super) fn capacity(&self) -> usize {
        self.bytes.capacity()
    }

    /// Drops the pending bytes and gives the memory back.
    pub(super) fn clear(&mut self, buffers: &mut Buffers) {
        buffers.give(std::mem::take(&mut self.bytes));
        self.sent = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spare_buffers_are_bounded_in_number_and_in_all() {
        for length in [SMALL, 64 * 1024, MAX_KEPT, MAX_KEPT + 1] {
            let mut buffers = Buffers::default();
            for _ in 0..2 * MAX_SPARE {
                buffers.give(Vec::with_capacity(length));
            }
            let mut kept = Vec::new();
            while let Some(buffer) = Some(buffers.take()).filter(|buffer| buffer.capacity() > 0) {
                kept.push(buffer);
            }
            let fits = if length > MAX_KEPT { 0 } else { MAX_SPARE };
            assert_eq!(kept.len(), fits.min(MAX_SPARE_BYTES / length), "{length}");
            assert_eq!(buffers.large_bytes, 0);
        }
    }

    #[test]
    fn bytes_leave_in_order_in_any_pieces() {
        let mut buffers = Buffers::default();
        let mut pending = SendBuffer::default();
        let bytes: Vec<u8> = (0..=255).cycle().take(10_000).collect();
        let mut seen = Vec::new();
        for (turn, chunk) in bytes.chunks(37).enumerate() {
            pending.tail(&mut buffers).extend_from_slice(chunk);
            let take = (turn * 31 % 50).min(pending.len());
            seen.extend_from_slice(&pending.pending()[..take]);
            pending.advance(take);
        }
        seen.extend_from_slice(pending.pending());
        pending.advance(usize::MAX);
        assert_eq!(seen, bytes);
        assert!(pending.is_empty());
        pending.shrink(&mut buffers);
        assert_eq!(
            pending.capacity(),
            0,
            "an empty buffer owns no memory beyond the turn"
        );
    }
}
