//! The sending side of a connection: backpressure, its end, and what became of it.

use std::iter;
use std::rc::Rc;

use super::buffers::Buffers;
use super::framing::{Codec, EncodeError};
use super::payload::{self, Chunk, MAX_PARTS};
use super::send_queue::{SendQueue, SharedPayloads};
use super::state::SendError;

/// The state of the sending side. Pending output is in the
/// [`SendQueue`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Send(u8);

impl Send {
    /// Pending output is above the high watermark, or not yet down to the low one.
    const CONGESTED: u8 = 1;
    /// The kernel refused a write for good: nothing can be sent, but received bytes can be read.
    const WRITE_FAILED: u8 = 2;
    /// The handler sends no more and goes on reading: FIN is due once everything is flushed.
    const FINISHING: u8 = 4;
    /// That FIN is sent.
    const FIN_SENT: u8 = 8;
    /// The handler is to be notified once the marked output has left.
    const FLUSH_AWAITED: u8 = 16;

    /// All flags, for the one test of [`Status::only_frames`](super::status::Status::only_frames).
    #[inline]
    pub(super) fn bits(self) -> u8 {
        self.0
    }

    pub(super) fn congest(&mut self) {
        self.0 |= Self::CONGESTED;
    }

    pub(super) fn relieve(&mut self) {
        self.0 &= !Self::CONGESTED;
    }

    #[inline]
    pub(super) fn is_congested(self) -> bool {
        self.0 & Self::CONGESTED != 0
    }

    /// A write failed for good: nothing is pending any more.
    pub(super) fn fail(&mut self) {
        self.0 |= Self::WRITE_FAILED;
        self.relieve();
    }

    pub(super) fn has_failed(self) -> bool {
        self.0 & Self::WRITE_FAILED != 0
    }

    pub(super) fn finish(&mut self) {
        self.0 |= Self::FINISHING;
    }

    pub(super) fn is_finishing(self) -> bool {
        self.0 & Self::FINISHING != 0
    }

    pub(super) fn set_fin_sent(&mut self) {
        self.0 |= Self::FIN_SENT;
    }

    pub(super) fn await_flush(&mut self) {
        self.0 |= Self::FLUSH_AWAITED;
    }

    pub(super) fn end_flush(&mut self) {
        self.0 &= !Self::FLUSH_AWAITED;
    }

    pub(super) fn awaits_flush(self) -> bool {
        self.0 & Self::FLUSH_AWAITED != 0
    }

    pub(super) fn has_sent_fin(self) -> bool {
        self.0 & Self::FIN_SENT != 0
    }
}

/// Pieces of a frame, at most: header, payload, trailer.
pub(crate) const FRAME_PIECES: usize = MAX_PARTS + 2;

/// A frame that goes out in more than one piece, or past the queue.
#[derive(Debug)]
pub(crate) struct Frame<'a, 'c> {
    payload: &'a mut [Chunk<'c>],
    /// Header, then trailer: a spare buffer.
    envelope: Vec<u8>,
    /// The length of the header.
    header: usize,
    /// The length of the payload that the handler has sent.
    pub(super) length: usize,
    /// Bytes at its front that are written, or encrypted.
    pub(crate) taken: usize,
    /// A longer chunk is kept as it is, if it was given away or is shared.
    min_kept: usize,
}

impl<'a, 'c> Frame<'a, 'c> {
    pub(super) fn new(
        codec: &mut Codec,
        payload: &'a mut [Chunk<'c>],
        min_kept: usize,
        buffers: &mut Buffers,
    ) -> Result<Self, SendError> {
        let (mut envelope, length) = (buffers.take(), payload::length(payload));
        let header = codec.wrap(payload, &mut envelope, buffers)?;
        Ok(Self {
            payload,
            envelope,
            header,
            length,
            taken: 0,
            min_kept,
        })
    }

    /// Returns the remainder in its pieces: at most [`FRAME_PIECES`].
    pub(crate) fn pieces(&self) -> impl Iterator<Item = &[u8]> + use<'_> {
        let (header, trailer) = self
            .envelope
            .split_at_checked(self.header)
            .unwrap_or_default();
        let chunks = self.payload.iter().map(Chunk::bytes);
        let all = iter::once(header).chain(chunks).chain([trailer]);
        let mut skip = self.taken;
        all.filter_map(move |piece| {
            let taken = skip.min(piece.len());
            skip -= taken;
            piece.get(taken..).filter(|piece| !piece.is_empty())
        })
    }

    /// Appends the remainder to a queue.
    pub(super) fn queue(
        self,
        queue: &mut SendQueue,
        buffers: &mut Buffers,
        all: &Rc<SharedPayloads>,
    ) {
        let Self {
            payload,
            envelope,
            header,
            taken: mut skip,
            min_kept,
            ..
        } = self;
        let (header, trailer) = envelope.split_at_checked(header).unwrap_or_default();
        let mut append = |chunk: &mut Chunk<'_>| {
            let part = skip.min(chunk.len());
            skip -= part;
            queue.append(chunk, part, min_kept, buffers, all);
        };
        append(&mut Chunk::Borrowed(header));
        payload.iter_mut().for_each(&mut append);
        append(&mut Chunk::Borrowed(trailer));
        buffers.give(envelope);
    }
}

impl From<EncodeError> for SendError {
    #[cold]
    fn from(error: EncodeError) -> Self {
        match error {
            EncodeError::TooLarge { length, max } => Self::FrameTooLarge { length, max },
            EncodeError::Refused(error) => Self::Refused(error),
        }
    }
}
