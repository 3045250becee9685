//! Frames by the user's own rule: what a [`Framer`](super::Framer) returns is checked here.

use std::ops::Range;

use super::super::buffers::Buffers;
use super::codec::{Custom, Found};
use super::framer::{AnyFramer, Decoded, FrameBuf, FrameError};
use super::step::Step;

impl Custom {
    pub(super) fn new(framer: Box<dyn AnyFramer>, max: usize) -> Self {
        Self {
            framer,
            max,
            seen: 0,
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
        if self.found.is_some() {
            return None;
        }
        match self.find(input) {
            Found::Step(Step::Frame { payload, consumed }) => {
                Some((input.get(payload)?, input.get(consumed..)?))
            }
            Found::Step(Step::More) => None,
            other => {
                self.found = Some(other);
                None
            }
        }
    }

    /// Asks the framer for the front of `input`.
    #[inline]
    fn find(&mut self, input: &[u8]) -> Found {
        if input.is_empty() || input.len() < self.seen {
            return Found::Step(Step::More);
        }
        self.is_running = true;
        let decoded = self.framer.decode(input);
        self.is_running = false;
        let limit = self.limit();
        Found::Step(match decoded {
            Ok(Decoded::Frame { payload, consumed }) => {
                match self.check(&payload, consumed, input) {
                    None if payload.len() > self.max => Step::TooLarge,
                    None => Step::Frame { payload, consumed },
                    Some(failure) => failure,
                }
            }
            Ok(Decoded::Packed { payload, consumed }) => {
                match self.check(&payload, consumed, input) {
                    None => return Found::Packed { payload, consumed },
                    Some(failure) => failure,
                }
            }
            Ok(Decoded::Need(total)) if total > limit => Step::TooLarge,
            Ok(Decoded::More | Decoded::Need(_)) if input.len() > limit => Step::TooLarge,
            Ok(Decoded::Need(total)) => {
                self.seen = total.max(input.len() + 1);
                Step::More
            }
            Ok(Decoded::More) => {
                self.seen = input.len() + 1;
                Step::More
            }
            Err(error) => Step::Bad(error),
        })
    }

    /// Returns the most input that an incomplete frame may take.
    #[inline]
    fn limit(&self) -> usize {
        /// Room for the header and trailer of a frame with the maximum payload.
        const ENVELOPE: usize = 16;
        self.max.saturating_add(ENVELOPE)
    }

    /// Returns why these cannot be the limits of a frame in `input`.
    #[inline]
    fn check(&mut self, payload: &Range<usize>, consumed: usize, input: &[u8]) -> Option<Step> {
        let inside =
            payload.start <= payload.end && payload.end <= consumed && consumed <= input.len();
        self.seen = 0;
        if consumed == 0 || !inside {
            return Some(Step::Bad(FrameError::new(
                "the framer reported a frame that is empty or outside its input",
            )));
        }
        // Received in pieces it would have been too long before it was whole.
        (consumed > self.limit()).then_some(Step::TooLarge)
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
