//! The results of every codec.

use std::ops::Range;

use super::framer::FrameError;

/// The maximum payload of packet-4 and of length fields, where none is set.
pub(super) const DEFAULT_MAX_LONG: usize = 8 * 1024 * 1024;

/// What the decoder found at the front of its input.
#[derive(Debug)]
pub(in crate::proto) enum Step {
    Frame {
        payload: Range<usize>,
        consumed: usize,
    },
    /// A frame that the framer has transformed.
    Unpacked {
        payload: Vec<u8>,
        consumed: usize,
    },
    More,
    TooLarge,
    Bad(FrameError),
}

/// Why a frame cannot be encoded.
#[derive(Debug)]
pub(in crate::proto) enum EncodeError {
    TooLarge { length: usize, max: usize },
    Refused(FrameError),
}
