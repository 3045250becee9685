//! Frames by the user's own rule: what a [`Framer`](super::Framer) returns is checked here.

use std::ops::Range;
use std::sync::Arc;

use super::super::buffers::Buffers;
use super::codec::{Custom, Found};
use super::framer::{Decoded, FrameBuf, FrameError, MakeFramer};
use super::step::Step;

impl Custom {
    pub(super) fn new(make: &Arc<MakeFramer>, max: usize) -> Self {
        Self {
            #[cfg(feature = "tls")]
            make: Arc::clone(make),
            framer: make(),
            max,
            seen: 1,
            found: None,
            is_running: false,
        }
    }

    pub(super) fn decode(&mut self, input: &[u8], buffers: &mut Buffers) -> Step {
        let found = match self.found.take() {
            Some(found) => found,
            None => self.find(input),
        };
        match found {
            Found::Packed { payload, consumed } => {
                let payload = input.get(payload).unwrap_or_default();
                self.unpack(payload, consumed, buffers)
            }
            Found::Step(step) => step,
        }
    }

    /// As [`Codec::cut`](super::Codec::cut). Other results are kept for [`Custom::decode`].
    #[inline(never)]
    pub(super) fn cut<'a>(&mut self, input: &'a [u8]) -> Option<(&'a [u8], &'a [u8])> {
        if input.len() < self.seen || self.found.is_some() {
            return None;
        }
        let decoded = self.decode_front(input);
        if let Ok(Decoded::Frame { payload, consumed }) = &decoded {
            if let Some(cut) = self.check(payload.clone(), *consumed, input) {
                return Some(cut);
            }
        }
        match self.check_decoded(decoded, input) {
            Found::Step(Step::More) => {}
            other => self.found = Some(other),
        }
        None
    }

    fn find(&mut self, input: &[u8]) -> Found {
        if input.len() < self.seen {
            return Found::Step(Step::More);
        }
        let decoded = self.decode_front(input);
        self.check_decoded(decoded, input)
    }

    /// Lets the framer decode the front of `input`.
    #[inline]
    fn decode_front(&mut self, input: &[u8]) -> Result<Decoded, FrameError> {
        self.is_running = true;
        self.seen = 1;
        let decoded = self.framer.decode(input);
        self.is_running = false;
        decoded
    }

    /// Returns the payload of such a frame and the bytes behind the frame, if it can be one.
    #[inline]
    fn check<'a>(
        &self,
        payload: Range<usize>,
        consumed: usize,
        input: &'a [u8],
    ) -> Option<(&'a [u8], &'a [u8])> {
        // Received in pieces it would have been too long before it was whole.
        if consumed == 0 || consumed > self.limit() || payload.len() > self.max {
            return None;
        }
        let (frame, behind) = input.split_at_checked(consumed)?;
        Some((frame.get(payload)?, behind))
    }

    #[cold]
    fn check_decoded(&mut self, decoded: Result<Decoded, FrameError>, input: &[u8]) -> Found {
        let limit = self.limit();
        let (payload, consumed, is_packed) = match decoded {
            Ok(Decoded::Frame { payload, consumed }) => (payload, consumed, false),
            Ok(Decoded::Packed { payload, consumed }) => (payload, consumed, true),
            Ok(Decoded::Need(total)) if total > limit => return Found::Step(Step::TooLarge),
            Ok(Decoded::More | Decoded::Need(_)) if input.len() > limit => {
                return Found::Step(Step::TooLarge)
            }
            Ok(Decoded::Need(total)) => {
                self.seen = total.max(input.len() + 1);
                return Found::Step(Step::More);
            }
            Ok(Decoded::More) => {
                self.seen = input.len() + 1;
                return Found::Step(Step::More);
            }
            Err(error) => return Found::Step(Step::Bad(error)),
        };
        let whole = input.get(..consumed);
        if consumed == 0 || whole.and_then(|whole| whole.get(payload.clone())).is_none() {
            let words = "the framer reported a frame that is empty or outside its input";
            return Found::Step(Step::Bad(FrameError::new(words)));
        }
        if consumed > limit || (payload.len() > self.max && !is_packed) {
            return Found::Step(Step::TooLarge);
        }
        match is_packed {
            true => Found::Packed { payload, consumed },
            false => Found::Step(Step::Frame { payload, consumed }),
        }
    }

    /// Returns the most input that an incomplete frame may take.
    #[inline]
    fn limit(&self) -> usize {
        /// Room for the header and trailer of a frame with the maximum payload.
        const ENVELOPE: usize = 16;
        self.max.saturating_add(ENVELOPE)
    }

    #[inline(never)]
    fn unpack(&mut self, payload: &[u8], consumed: usize, buffers: &mut Buffers) -> Step {
        let mut unpacked = buffers.take();
        let mut out = FrameBuf::new(&mut unpacked, self.max);
        let result = self.framer.unpack(payload, &mut out);
        let failure = match result {
            // It may be the answer to a full buffer.
            _ if out.is_over() => Step::TooLarge,
            Err(error) => Step::Bad(error),
            Ok(()) => {
                return Step::Unpacked {
                    payload: unpacked,
                    consumed,
                }
            }
        };
        buffers.give(unpacked);
        failure
    }
}
