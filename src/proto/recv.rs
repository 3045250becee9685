//! The receiving side of a connection: its pauses, its end, and the bytes that are buffered.

use std::ops::Range;

use super::buffers::{retained, Buffers};

/// From this length on a receive buffer grows by a quarter.
const LARGE: usize = 16 * 1024;
/// A buffer of this capacity is replaced when only a small tail of it is kept.
const MAX_TAIL_CAPACITY: usize = 64 * 1024;

/// The state of the receiving side. Buffered bytes are in the [`RecvBuffer`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Recv(u8);

impl Recv {
    /// TCP's end of stream was read.
    const EOF: u8 = 1;
    /// The handler was notified of the peer's end.
    const END_REPORTED: u8 = 2;
    /// The handler paused reading.
    const PAUSED: u8 = 4;
    /// A rate paused reading.
    const THROTTLED: u8 = 8;
    /// The buffered bytes may contain a whole frame: decoding stopped for another reason than
    /// "more".
    const FRAMES_BUFFERED: u8 = 16;
    /// The connection has a [`Throttle`](super::rates::Throttle).
    const HAS_RATES: u8 = 32;

    /// The kernel has reported RST already, and reports an end of stream from then on.
    const WAS_RESET: u8 = 64;
    /// No frame can be made of the input: the handler is notified, and the connection closes.
    const BAD_INPUT: u8 = 128;

    /// All flags, for the one test of [`Status::only_frames`](super::status::Status::only_frames).
    #[inline]
    pub(super) fn bits(self) -> u8 {
        self.0
    }

    #[inline]
    fn has(self, flag: u8) -> bool {
        self.0 & flag != 0
    }

    fn put(&mut self, flag: u8, on: bool) {
        if on {
            self.0 |= flag;
        } else {
            self.0 &= !flag;
        }
    }

    pub(super) fn expect_reset(&mut self) {
        self.0 |= Self::WAS_RESET;
    }

    pub(super) fn was_reset(self) -> bool {
        self.has(Self::WAS_RESET)
    }

    pub(super) fn set_bad_input(&mut self) {
        self.0 |= Self::BAD_INPUT;
    }

    pub(super) fn has_bad_input(self) -> bool {
        self.has(Self::BAD_INPUT)
    }

    pub(super) fn set_eof(&mut self) {
        self.0 |= Self::EOF;
    }

    pub(super) fn is_eof(self) -> bool {
        self.has(Self::EOF)
    }

    pub(super) fn set_end_reported(&mut self) {
        self.0 |= Self::END_REPORTED;
    }

    pub(super) fn is_end_reported(self) -> bool {
        self.has(Self::END_REPORTED)
    }

    pub(super) fn pause(&mut self) {
        self.0 |= Self::PAUSED;
    }

    /// Ends the handler's pause. True if there was one.
    pub(super) fn resume(&mut self) -> bool {
        let paused = self.is_paused_by_handler();
        self.put(Self::PAUSED, false);
        paused
    }

    pub(super) fn is_paused_by_handler(self) -> bool {
        self.has(Self::PAUSED)
    }

    pub(super) fn set_throttled(&mut self, on: bool) {
        self.put(Self::THROTTLED, on);
    }

    #[inline]
    pub(super) fn is_throttled(self) -> bool {
        self.has(Self::THROTTLED)
    }

    /// True while the handler or a rate pauses reading.
    #[inline]
    pub(super) fn is_paused(self) -> bool {
        self.has(Self::PAUSED | Self::THROTTLED)
    }

    pub(super) fn set_has_rates(&mut self, on: bool) {
        self.put(Self::HAS_RATES, on);
    }

    #[cfg(feature = "sim")]
    pub(super) fn has_rates(self) -> bool {
        self.has(Self::HAS_RATES)
    }

    /// Decodes what is buffered, without another read, when reading is not paused.
    pub(super) fn decode_buffered(&mut self, buffer: &RecvBuffer) {
        if !buffer.is_empty() {
            self.0 |= Self::FRAMES_BUFFERED;
        }
    }

    #[inline]
    pub(super) fn has_frames_buffered(self) -> bool {
        self.has(Self::FRAMES_BUFFERED)
    }

    pub(super) fn clear_frames_buffered(&mut self) {
        self.put(Self::FRAMES_BUFFERED, false);
    }
}

/// Received bytes that are kept beyond a turn: an incomplete frame, frames behind a pause, an
/// incomplete PROXY header, or bytes for a handshake that is about to begin.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct RecvBuffer {
    bytes: Vec<u8>,
    /// How many of `bytes` are decoded.
    pos: usize,
}

impl RecvBuffer {
    pub(super) const fn new() -> Self {
        Self {
            bytes: Vec::new(),
            pos: 0,
        }
    }

    #[inline]
    pub(super) fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    #[inline]
    pub(super) fn pending(&self) -> &[u8] {
        self.bytes.get(self.pos..).unwrap_or_default()
    }

    pub(super) fn len(&self) -> usize {
        self.bytes.len() - self.pos
    }

    /// Returns the memory that it takes beyond the turn.
    #[inline]
    pub(super) fn memory(&self) -> usize {
        retained(&self.bytes)
    }

    #[inline]
    pub(super) fn shrink(&mut self, buffers: &mut Buffers) {
        buffers.shrink(&mut self.bytes);
    }

    /// Prepares for another connection, once it is empty.
    #[inline]
    pub(super) fn reset(&mut self) {
        self.pos = 0;
    }

    pub(super) fn clear(&mut self, buffers: &mut Buffers) {
        self.pos = 0;
        buffers.give(std::mem::take(&mut self.bytes));
    }

    /// Keeps bytes behind the ones that are buffered. For no bytes it takes no memory.
    pub(super) fn append(&mut self, bytes: &[u8], buffers: &mut Buffers) {
        if bytes.is_empty() {
            return;
        }
        if self.bytes.capacity() == 0 {
            self.bytes = buffers.take();
        }
        self.bytes.extend_from_slice(bytes);
    }

    /// Removes the first `count` bytes.
    pub(super) fn consume(&mut self, count: usize, buffers: &mut Buffers) {
        self.bytes.drain(..count.min(self.bytes.len()));
        if self.bytes.is_empty() {
            self.clear(buffers);
        }
    }

    /// Takes all bytes that are not decoded.
    pub(super) fn take(&mut self) -> Vec<u8> {
        let mut bytes = std::mem::take(&mut self.bytes);
        bytes.drain(..std::mem::take(&mut self.pos).min(bytes.len()));
        bytes
    }

    /// Puts the buffered bytes in front of `fresh`, for the decoder. Of a frame that is known to
    /// lack `missing` bytes no more than those are copied.
    pub(super) fn join<'a>(&mut self, fresh: &'a [u8], missing: Option<usize>) -> InputCursor<'a> {
        let mut joined = std::mem::take(&mut self.bytes);
        let (front, fresh) = fresh
            .split_at_checked(missing.unwrap_or(fresh.len()))
            .unwrap_or((fresh, &[]));
        let length = joined.len();
        if length > LARGE && joined.capacity() - length < front.len() {
            // Doubling would allocate twice the received bytes.
            let more = front.len() + length / 4;
            joined.reserve_exact(missing.map_or(more, |missing| missing.min(more)));
        }
        joined.extend_from_slice(front);
        let begin = std::mem::take(&mut self.pos);
        InputCursor {
            fresh,
            joined,
            at: begin,
            begin,
        }
    }

    /// Keeps the bytes that the decoder left.
    pub(super) fn keep(&mut self, cursor: InputCursor<'_>, buffers: &mut Buffers) {
        let InputCursor {
            fresh,
            mut joined,
            at,
            ..
        } = cursor;
        match at.checked_sub(joined.len()) {
            Some(at) => {
                buffers.give(joined);
                self.append(fresh.get(at..).unwrap_or_default(), buffers);
            }
            None => {
                joined.extend_from_slice(fresh);
                self.keep_tail(joined, at, buffers);
            }
        }
    }

    /// Keeps the tail of a joined buffer.
    ///
    /// Does not copy it for each frame taken from its front, and does not keep a large buffer for a
    /// small tail.
    fn keep_tail(&mut self, mut joined: Vec<u8>, at: usize, buffers: &mut Buffers) {
        let rest = joined.len() - at;
        if at < rest {
            self.pos = at;
            self.bytes = joined;
        } else if joined.capacity() > MAX_TAIL_CAPACITY && rest < joined.capacity() / 4 {
            self.append(joined.get(at..).unwrap_or_default(), buffers);
            buffers.give(joined);
        } else {
            joined.drain(..at);
            self.bytes = joined;
        }
    }

    /// The first invariant that does not hold.
    #[cfg(feature = "sim")]
    pub(super) fn broken_invariant(&self, max: usize) -> Option<String> {
        let length = self.len();
        if length > max {
            return Some(format!(
                "{length} bytes of input are buffered, the maximum is {max}"
            ));
        }
        if self.is_empty() && self.bytes.capacity() > 0 {
            return Some("an empty receive buffer owns memory".to_owned());
        }
        (self.pos > length)
            .then(|| "decoded input takes more memory than buffered input".to_owned())
    }

    #[cfg(all(test, feature = "sim"))]
    pub(super) fn raw(&self) -> (&Vec<u8>, usize) {
        (&self.bytes, self.pos)
    }
}

/// Bytes on their way through the decoder: the buffered bytes, joined with what completes their
/// frame, and the remainder of this turn's read.
pub(crate) struct InputCursor<'a> {
    joined: Vec<u8>,
    /// What follows `joined`.
    fresh: &'a [u8],
    /// Counts from the beginning of `joined`.
    at: usize,
    /// Where `at` began: if it has moved, a frame was completed, and the remainder began later than
    /// the buffered bytes.
    begin: usize,
}

impl<'a> InputCursor<'a> {
    #[inline]
    pub(crate) fn nothing() -> Self {
        Self::fresh(&[])
    }

    #[inline]
    pub(super) fn fresh(fresh: &'a [u8]) -> Self {
        Self {
            joined: Vec::new(),
            fresh,
            at: 0,
            begin: 0,
        }
    }

    /// True if a read that was not joined to buffered bytes is delivered.
    #[inline]
    pub(crate) fn is_used_up(&self) -> bool {
        self.at == self.fresh.len() && self.joined.capacity() == 0
    }

    /// Returns bytes that are not delivered: none if all are. A frame may need those behind them:
    /// see [`InputCursor::join_rest`].
    #[inline]
    pub(crate) fn rest(&self) -> &[u8] {
        self.from(self.at)
    }

    #[inline]
    fn from(&self, at: usize) -> &[u8] {
        let rest = match at.checked_sub(self.joined.len()) {
            Some(at) => self.fresh.get(at..),
            None => self.joined.get(at..),
        };
        rest.unwrap_or_default()
    }

    /// Joins all that is not delivered. False if it was: [`InputCursor::rest`] has returned it.
    #[cold]
    pub(super) fn join_rest(&mut self) -> bool {
        let joins = self.at < self.joined.len() && !self.fresh.is_empty();
        if joins {
            self.joined
                .extend_from_slice(std::mem::take(&mut self.fresh));
        }
        joins
    }

    /// Skips the next `count` bytes, which were delivered: whole frames, if any.
    #[inline]
    pub(crate) fn advance(&mut self, count: usize) {
        self.at += count;
    }

    /// Skips a frame of `consumed` bytes and returns its payload.
    pub(super) fn take_frame(&mut self, payload: Range<usize>, consumed: usize) -> &[u8] {
        let frame = self.at;
        self.advance(consumed);
        self.from(frame).get(payload).unwrap_or_default()
    }

    /// True if a frame was delivered from it.
    #[inline]
    pub(crate) fn has_advanced(&self) -> bool {
        self.at > self.begin
    }

    /// Drops the bytes that are not delivered.
    pub(super) fn discard(self, buffers: &mut Buffers) {
        buffers.give(self.joined);
    }
}
