//! Pending output: copied bytes, and between them payloads that were given away or are shared.

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, VecDeque};
use std::io::IoSlice;
use std::rc::Rc;
use std::sync::Arc;

use super::buffers::{Buffers, SendBuffer};
use super::payload::Chunk;

/// Pieces of output in one write: 32 shared payloads and what is between them.
pub(crate) const PIECES: usize = 64;

/// Shared payloads that connections of one server keep, each counted once.
#[derive(Debug, Default)]
pub(crate) struct SharedPayloads {
    /// Number of keepers, by the address of the bytes.
    keepers: RefCell<HashMap<usize, usize>>,
    bytes: Cell<usize>,
}

impl SharedPayloads {
    /// Returns the bytes of all payloads.
    #[inline]
    pub(crate) fn bytes(&self) -> usize {
        self.bytes.get()
    }

    fn add(&self, payload: &Arc<[u8]>) {
        let mut keepers = self.keepers.borrow_mut();
        let count = keepers.entry(address(payload)).or_default();
        *count += 1;
        if *count == 1 {
            self.bytes.set(self.bytes.get() + payload.len());
        }
    }

    fn remove(&self, payload: &Arc<[u8]>) {
        let mut keepers = self.keepers.borrow_mut();
        let Some(count) = keepers.get_mut(&address(payload)) else {
            return;
        };
        *count -= 1;
        if *count == 0 {
            keepers.remove(&address(payload));
            self.bytes.set(self.bytes.get() - payload.len());
            if keepers.is_empty() {
                // The table of a large broadcast.
                *keepers = HashMap::new();
            }
        }
    }
}

fn address(payload: &Arc<[u8]>) -> usize {
    Arc::as_ptr(payload).cast::<u8>() as usize
}

/// A shared payload that a connection keeps.
#[derive(Debug)]
struct Shared {
    bytes: Arc<[u8]>,
    all: Rc<SharedPayloads>,
}

impl Shared {
    fn new(bytes: Arc<[u8]>, all: &Rc<SharedPayloads>) -> Self {
        all.add(&bytes);
        let all = Rc::clone(all);
        Self { bytes, all }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.all.remove(&self.bytes);
    }
}

impl Clone for Shared {
    fn clone(&self) -> Self {
        Self::new(Arc::clone(&self.bytes), &self.all)
    }
}

#[derive(Clone, Debug)]
enum Body {
    Owned(Vec<u8>),
    Shared(Shared),
}

impl Body {
    fn bytes(&self) -> &[u8] {
        match self {
            Self::Owned(bytes) => bytes,
            Self::Shared(shared) => &shared.bytes,
        }
    }
}

/// A payload that is kept as it is.
#[derive(Clone, Debug)]
struct Kept {
    /// Number of copied bytes between the kept payload before and this one.
    before: usize,
    body: Body,
    /// How many bytes of the body are sent. Invariant: less than all.
    sent: usize,
}

impl Kept {
    fn pending(&self) -> &[u8] {
        self.body.bytes().get(self.sent..).unwrap_or_default()
    }

    /// Removes sent bytes, once they are the larger part: each byte is copied at most once more.
    fn compact(&mut self) {
        if let Body::Owned(bytes) = &mut self.body {
            if self.sent > bytes.len() / 2 {
                bytes.drain(..self.sent);
                bytes.shrink_to_fit();
                self.sent = 0;
            }
        }
    }
}

/// The kept payloads of a connection. There is at least one.
#[derive(Clone, Debug, Default)]
struct KeptPayloads {
    queue: VecDeque<Kept>,
    /// The sum of [`Kept::before`].
    before: usize,
    /// Number of their pending bytes.
    len: usize,
    /// The memory of the bodies that no other connection can have.
    owned: usize,
    /// The lengths of the bodies that others may have too.
    shared: usize,
}

impl KeptPayloads {
    /// Adds to the memory of all what `body` takes.
    fn charge(&mut self, body: &Body) {
        match body {
            Body::Owned(bytes) => self.owned += bytes.capacity(),
            Body::Shared(shared) => self.shared += shared.bytes.len(),
        }
    }

    fn discharge(&mut self, body: &Body) {
        match body {
            Body::Owned(bytes) => self.owned -= bytes.capacity(),
            Body::Shared(shared) => self.shared -= shared.bytes.len(),
        }
    }

    fn push(&mut self, before: usize, body: Body, sent: usize) {
        let mut kept = Kept { before, body, sent };
        // The socket may have taken most of it.
        kept.compact();
        self.charge(&kept.body);
        self.before += before;
        self.len += kept.pending().len();
        self.queue.push_back(kept);
    }

    /// Removes up to `count` bytes of the first payload, in front of which nothing is pending.
    /// Returns their number.
    fn advance(&mut self, count: usize) -> usize {
        let Some(mut first) = self.queue.pop_front() else {
            return 0;
        };
        let pending = first.pending().len();
        let taken = count.min(pending);
        self.len -= taken;
        self.discharge(&first.body);
        if taken < pending {
            first.sent += taken;
            first.compact();
            self.charge(&first.body);
            self.queue.push_front(first);
        }
        taken
    }
}

/// Bytes that a connection's buffers hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Held {
    /// Of this connection alone.
    pub(crate) own: usize,
    /// Of payloads that other connections may keep too.
    pub(crate) shared: usize,
}

impl Held {
    pub(crate) const NOTHING: Self = Self { own: 0, shared: 0 };

    /// Adds bytes of this connection alone.
    #[inline]
    pub(crate) fn plus(self, own: usize) -> Self {
        let own = self.own + own;
        Self { own, ..self }
    }

    /// Returns all, as if nothing were shared.
    #[inline]
    pub(crate) fn weight(self) -> usize {
        self.own + self.shared
    }
}

/// Frames from the handler that are pending; over TLS still to be encrypted.
#[derive(Clone, Debug, Default)]
pub(super) struct SendQueue {
    copied: SendBuffer,
    kept: Option<Box<KeptPayloads>>,
    /// Number of pending bytes in front of the mark: see [`SendQueue::mark`].
    marked: usize,
}

impl SendQueue {
    pub(super) const fn new() -> Self {
        Self {
            copied: SendBuffer::new(),
            kept: None,
            marked: 0,
        }
    }

    /// Marks the end of the pending bytes.
    pub(super) fn mark(&mut self) {
        self.marked = self.len();
    }

    /// Returns the number of pending bytes in front of the mark.
    pub(super) fn marked(&self) -> usize {
        self.marked
    }

    /// Returns where the next bytes are appended.
    #[inline]
    pub(super) fn tail(&mut self, buffers: &mut Buffers) -> &mut Vec<u8> {
        self.copied.tail(buffers)
    }

    #[inline]
    pub(super) fn len(&self) -> usize {
        self.copied_len() + self.kept_len()
    }

    /// Returns the number of pending bytes that were copied.
    #[inline]
    pub(super) fn copied_len(&self) -> usize {
        self.copied.len()
    }

    /// Returns the number of pending bytes of kept payloads.
    #[inline]
    pub(super) fn kept_len(&self) -> usize {
        self.kept.as_ref().map_or(0, |kept| kept.len)
    }

    #[inline]
    pub(super) fn is_empty(&self) -> bool {
        self.copied.is_empty() && self.kept.is_none()
    }

    /// Returns the pending bytes if they are in one piece: no payload is kept.
    #[inline]
    pub(super) fn whole(&self) -> Option<&[u8]> {
        self.kept.is_none().then(|| self.copied.pending())
    }

    /// Appends a chunk from its byte `skip` on, or keeps it if that are `min_kept` bytes or more.
    pub(super) fn append(
        &mut self,
        chunk: &mut Chunk<'_>,
        skip: usize,
        min_kept: usize,
        buffers: &mut Buffers,
        all: &Rc<SharedPayloads>,
    ) {
        let rest = chunk.len().saturating_sub(skip);
        if rest == 0 {
            return;
        }
        let is_long = rest >= min_kept;
        if is_long {
            chunk.shrink();
        }
        let body = match chunk {
            Chunk::Owned(bytes) if is_long => Body::Owned(std::mem::take(bytes)),
            Chunk::Shared(bytes) | Chunk::Counted(bytes) if is_long => {
                Body::Shared(Shared::new(Arc::clone(bytes), all))
            }
            chunk => {
                let rest = chunk.bytes().get(skip..).unwrap_or_default();
                return self.tail(buffers).extend_from_slice(rest);
            }
        };
        let copied = self.copied.len();
        let kept = self.kept.get_or_insert_default();
        let before = copied - kept.before;
        kept.push(before, body, skip);
    }

    /// Fills `pieces` with the first pending ones, in order; returns how many.
    pub(super) fn pieces<'a>(&'a self, pieces: &mut [IoSlice<'a>]) -> usize {
        let mut count = 0;
        for (place, piece) in pieces.iter_mut().zip(self.all_pieces()) {
            *place = IoSlice::new(piece);
            count += 1;
        }
        count
    }

    /// Returns the pending bytes in their pieces.
    pub(super) fn all_pieces(&self) -> impl Iterator<Item = &[u8]> {
        let mut copied = self.copied.pending();
        let queue = self.kept.iter().flat_map(|kept| &kept.queue);
        let last = copied
            .get(self.kept.as_ref().map_or(0, |kept| kept.before)..)
            .unwrap_or_default();
        let pairs = queue.flat_map(move |kept| {
            let (before, behind) = copied.split_at_checked(kept.before).unwrap_or_default();
            copied = behind;
            [before, kept.pending()]
        });
        pairs.chain([last]).filter(|piece| !piece.is_empty())
    }

    /// Returns the pending bytes, in one piece.
    pub(super) fn to_vec(&self) -> Vec<u8> {
        let mut all = Vec::with_capacity(self.len());
        for piece in self.all_pieces() {
            all.extend_from_slice(piece);
        }
        all
    }

    /// Removes the first `count` pending bytes.
    #[inline]
    pub(super) fn advance(&mut self, count: usize) {
        self.marked = self.marked.saturating_sub(count);
        if self.kept.is_none() {
            self.copied.advance(count);
        } else {
            self.advance_kept(count);
        }
    }

    #[inline(never)]
    fn advance_kept(&mut self, mut count: usize) {
        while let Some(kept) = &mut self.kept {
            let Some(first) = kept.queue.front_mut() else {
                break;
            };
            let copied = count.min(first.before);
            first.before -= copied;
            kept.before -= copied;
            self.copied.advance(copied);
            count -= copied;
            if count == 0 {
                return;
            }
            count -= kept.advance(count);
            if kept.queue.is_empty() {
                break;
            }
        }
        self.kept = None;
        self.copied.advance(count);
    }

    /// Returns the memory that it takes beyond the turn.
    #[inline]
    pub(super) fn memory(&self) -> Held {
        let own = self.copied.memory();
        match &self.kept {
            None => Held { own, shared: 0 },
            Some(kept) => Held {
                own: own + kept.owned + kept.queue.capacity() * size_of::<Kept>(),
                shared: kept.shared,
            },
        }
    }

    /// Gives back memory that it does not need beyond the turn.
    #[inline]
    pub(super) fn shrink(&mut self, buffers: &mut Buffers) {
        self.copied.shrink(buffers);
    }

    #[inline]
    pub(super) fn capacity(&self) -> usize {
        self.copied.capacity()
    }

    /// Drops the pending bytes and gives the memory back.
    pub(super) fn clear(&mut self, buffers: &mut Buffers) {
        self.copied.clear(buffers);
        self.kept = None;
        self.marked = 0;
    }

    /// Takes the pending bytes, in one piece.
    #[cfg(feature = "tls")]
    pub(super) fn take(&mut self) -> SendBuffer {
        let all = std::mem::take(self);
        match all.kept {
            Some(_) => SendBuffer::of(all.to_vec()),
            None => all.copied,
        }
    }

    /// True if sent bytes take no more memory than pending ones.
    #[cfg(feature = "sim")]
    pub(super) fn is_compact(&self) -> bool {
        self.copied.is_compact()
    }

    /// Calls `see` for each shared payload.
    #[cfg(feature = "sim")]
    pub(super) fn each_shared(&self, mut see: impl FnMut(&Arc<[u8]>)) {
        for kept in self.kept.iter().flat_map(|kept| &kept.queue) {
            if let Body::Shared(shared) = &kept.body {
                see(&shared.bytes);
            }
        }
    }
}

/// Returns the first bytes of `pieces` in two pieces. Short pieces are joined in `joint`, up to
/// `joint_len` bytes.
#[cfg(any(test, feature = "tls"))]
pub(super) fn first_two<'a: 'j, 'j>(
    pieces: impl Iterator<Item = &'a [u8]>,
    joint: &'j mut Vec<u8>,
    joint_len: usize,
) -> [&'j [u8]; 2] {
    for mut piece in pieces {
        if joint.is_empty() && piece.len() >= joint_len {
            return [piece, &[]];
        }
        let room = joint_len.saturating_sub(joint.len());
        let (front, behind) = piece.split_at_checked(room).unwrap_or((piece, &[]));
        joint.extend_from_slice(front);
        piece = behind;
        if joint.len() >= joint_len {
            return [joint, piece];
        }
    }
    [joint, &[]]
}

#[cfg(all(test, feature = "sim"))]
mod tests {
    use super::*;
    use crate::sim::Random;

    /// The memory of payloads that were given away: as it is charged, and as it is.
    fn charged(queue: &SendQueue) -> usize {
        queue.kept.as_ref().map_or(0, |kept| kept.owned)
    }

    fn held(queue: &SendQueue) -> usize {
        let kept = queue.kept.iter().flat_map(|kept| &kept.queue);
        kept.map(|kept| match &kept.body {
            Body::Owned(bytes) => bytes.capacity(),
            Body::Shared(_) => 0,
        })
        .sum()
    }

    /// Random chunks of every kind, taken in random pieces.
    #[test]
    fn every_kind_leaves_in_order_in_any_pieces() {
        for seed in 0..crate::testing::rounds(200) as u64 {
            let mut random = Random::new(seed);
            let (mut buffers, all) = (Buffers::default(), Rc::new(SharedPayloads::default()));
            let mut queue = SendQueue::default();
            let (mut expected, mut seen, mut next) = (Vec::new(), Vec::new(), 0_u8);
            let common: Arc<[u8]> = (0..50).collect();
            for _ in 0..60 {
                let bytes: Vec<u8> = (0..random.below(40))
                    .map(|_| {
                        next = next.wrapping_add(1);
                        next
                    })
                    .collect();
                let mut chunk = match random.below(4) {
                    0 => Chunk::Borrowed(&bytes),
                    1 => Chunk::Owned(bytes.clone()),
                    2 => Chunk::Shared(bytes.clone().into()),
                    _ => Chunk::Shared(Arc::clone(&common)),
                };
                let skip = random.below(3).min(chunk.len());
                expected.extend_from_slice(&chunk.bytes()[skip..]);
                queue.append(&mut chunk, skip, 8, &mut buffers, &all);
                assert_eq!(seen.len() + queue.len(), expected.len(), "seed {seed}");
                assert_eq!(charged(&queue), held(&queue), "seed {seed}");
                let take = random.below(60).min(queue.len());
                let pending = queue.to_vec();
                assert_eq!(pending, expected[seen.len()..], "seed {seed}");
                let mut joint = Vec::new();
                let two = first_two(queue.all_pieces(), &mut joint, 16).concat();
                assert_eq!(two, pending[..two.len()], "seed {seed}");
                assert_eq!(two.is_empty(), pending.is_empty(), "seed {seed}");
                seen.extend_from_slice(&pending[..take]);
                queue.advance(take);
                assert_eq!(charged(&queue), held(&queue), "seed {seed}");
                assert_eq!(queue.is_empty(), queue.to_vec().is_empty(), "seed {seed}");
                if random.below(4) == 0 {
                    queue.shrink(&mut buffers);
                }
            }
            let rest = queue.to_vec();
            queue.advance(usize::MAX);
            seen.extend_from_slice(&rest);
            assert_eq!(seen, expected, "seed {seed}");
            assert!(queue.is_empty() && all.bytes() == 0, "seed {seed}");
            queue.shrink(&mut buffers);
            assert_eq!(queue.memory(), Held::default(), "seed {seed}");
        }
    }

    #[test]
    fn a_shared_payload_counts_once() {
        let (mut buffers, all) = (Buffers::default(), Rc::new(SharedPayloads::default()));
        let payload: Arc<[u8]> = vec![1; 5000].into();
        let mut queues: Vec<_> = (0..10).map(|_| SendQueue::default()).collect();
        for queue in &mut queues {
            for _ in 0..2 {
                let mut chunk = Chunk::Shared(Arc::clone(&payload));
                queue.append(&mut chunk, 0, 4096, &mut buffers, &all);
            }
            assert_eq!(queue.memory().shared, 10_000);
        }
        assert_eq!(all.bytes(), 5000);
        let copy = queues[3].clone();
        queues.truncate(1);
        assert_eq!(all.bytes(), 5000);
        queues[0].advance(5000);
        assert_eq!((all.bytes(), queues[0].memory().shared), (5000, 5000));
        queues[0].advance(5000);
        drop(copy);
        assert_eq!((all.bytes(), Arc::strong_count(&payload)), (0, 1));
    }

    #[test]
    fn a_payload_that_was_given_away_is_not_copied_and_gives_sent_bytes_back() {
        let (mut buffers, all) = (Buffers::default(), Rc::new(SharedPayloads::default()));
        let mut queue = SendQueue::default();
        let mut payload = Vec::with_capacity(1 << 20);
        payload.extend_from_slice(&[7; 100_000]);
        queue.append(&mut Chunk::Owned(payload), 0, 4096, &mut buffers, &all);
        assert!(queue.memory().own < 101_000, "spare capacity goes back");
        queue.advance(60_000);
        assert!(queue.memory().own < 61_000, "sent bytes go back");
        assert_eq!(queue.to_vec(), [7; 40_000]);
    }

    /// The kernel has taken a part of it before it is queued.
    #[test]
    fn the_taken_part_of_a_payload_that_was_given_away_goes_back_at_once() {
        let all = Rc::new(SharedPayloads::default());
        for (taken, least, most) in [
            (40_000, 100_000, 101_000),
            (60_000, 40_000, 41_000),
            (95_000, 5_000, 6_000),
        ] {
            let (mut buffers, mut queue) = (Buffers::default(), SendQueue::default());
            let payload = vec![7; 100_000];
            queue.append(&mut Chunk::Owned(payload), taken, 4096, &mut buffers, &all);
            assert_eq!(charged(&queue), held(&queue));
            let own = queue.memory().own;
            assert!((least..most).contains(&own), "{own} after {taken}");
            assert_eq!(queue.to_vec(), vec![7; 100_000 - taken]);
        }
    }
}
