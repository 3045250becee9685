//! The codec of one connection: frames out of received bytes. Bytes out of frames are in [`encode`].

mod encode;

use std::fmt;
use std::io::BufRead;
use std::ops::Range;

use super::framer::{Decoded, FrameError, Framer, Framing};

/// The largest payload that a packet-4 header may announce.
///
/// As in Erlang/OTP: header and payload fit in 31 bits.
const PACKET4_LIMIT: usize = 0x7FFF_FFFB;
/// The maximum payload of lines, custom framings and raw pieces, where none is set.
const DEFAULT_MAX: usize = 64 * 1024;
/// The length of packet-4's header.
const MAX_HEADER: usize = 4;

/// What the decoder found at the front of its input.
#[derive(Debug)]
pub(in crate::proto) enum Step {
    Frame {
        payload: Range<usize>,
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

/// The framing of one connection, and how much of an incomplete frame it has seen.
///
/// Part of each connection, so it is small: maxima fit in 32 bits.
pub(in crate::proto) enum Codec {
    BuiltIn(Cutter),
    Custom(Box<Custom>),
}

#[derive(Clone, Copy)]
pub(in crate::proto) struct Cutter {
    kind: Kind,
    /// Saturated: a longer frame is too large anyway.
    max: u32,
    /// For lines, how far the input was searched for the delimiter.
    seen: u32,
}

/// The user's framing.
pub(in crate::proto) struct Custom {
    pub(super) framer: Box<dyn Framer>,
    pub(super) max: usize,
    /// Shorter input contains no whole frame.
    pub(super) seen: usize,
}

#[derive(Clone, Copy)]
enum Kind {
    Raw,
    Packet(Width),
    Delimited(u8),
}

impl Kind {
    /// Returns the maximum payload where none is set; a line counts its delimiter.
    const fn default_max(self) -> usize {
        match self {
            Self::Packet(Width::Four) => 8 * 1024 * 1024,
            Self::Packet(width) => width.limit(),
            Self::Raw | Self::Delimited(_) => DEFAULT_MAX,
        }
    }
}

#[derive(Clone, Copy)]
enum Width {
    One,
    Two,
    Four,
}

impl Width {
    /// Returns the largest payload that the header can announce.
    const fn limit(self) -> usize {
        match self {
            Self::One => 0xFF,
            Self::Two => 0xFFFF,
            Self::Four => PACKET4_LIMIT,
        }
    }

    /// Returns the length in the header, and the bytes behind the header.
    #[inline]
    fn split(self, input: &[u8]) -> Option<(usize, &[u8])> {
        Some(match (self, input) {
            (Self::One, [a, behind @ ..]) => (usize::from(*a), behind),
            (Self::Two, [a, b, behind @ ..]) => (usize::from(u16::from_be_bytes([*a, *b])), behind),
            (Self::Four, [a, b, c, d, behind @ ..]) => {
                let length = usize::try_from(u32::from_be_bytes([*a, *b, *c, *d]));
                // Larger than any maximum: Erlang does not send it either.
                (
                    length
                        .ok()
                        .filter(|&length| length <= PACKET4_LIMIT)
                        .unwrap_or(usize::MAX),
                    behind,
                )
            }
            _ => return None,
        })
    }
}

impl Codec {
    /// `max`: the maximum payload; `None` is the framing's own.
    pub(in crate::proto) fn new(framing: &Framing, max: Option<usize>) -> Self {
        let kind = match framing {
            Framing::Raw => Kind::Raw,
            Framing::Packet1 => Kind::Packet(Width::One),
            Framing::Packet2 => Kind::Packet(Width::Two),
            Framing::Packet4 => Kind::Packet(Width::Four),
            Framing::Line => Kind::Delimited(b'\n'),
            Framing::Delimited(byte) => Kind::Delimited(*byte),
            Framing::Custom(make) => {
                let framer = make();
                return Self::Custom(Box::new(Custom {
                    framer,
                    max: max.unwrap_or(DEFAULT_MAX),
                    seen: 0,
                }));
            }
        };
        Self::BuiltIn(Cutter {
            kind,
            max: saturated(max.unwrap_or(kind.default_max())),
            seen: 0,
        })
    }

    /// Looks for one frame at the front of `input`.
    ///
    /// The input is that of the last call and possibly more, unless that call found a frame.
    #[inline]
    pub(in crate::proto) fn decode(&mut self, input: &[u8]) -> Step {
        match self {
            Self::BuiltIn(cutter) => cutter.decode(input),
            Self::Custom(custom) => custom.decode(input),
        }
    }

    /// Returns the payload of a whole frame at the front of `input`, and the bytes behind the
    /// frame.
    ///
    /// `None` if there is none, or if the framing is the user's: see [`Codec::decode`].
    #[inline]
    pub(in crate::proto) fn cut<'a>(&mut self, input: &'a [u8]) -> Option<(&'a [u8], &'a [u8])> {
        match self {
            Self::BuiltIn(cutter) => cutter.cut(input),
            Self::Custom(_) => None,
        }
    }

    /// True if it is the user's code, which may panic.
    #[inline]
    pub(in crate::proto) fn is_custom(&self) -> bool {
        matches!(self, Self::Custom(_))
    }

    /// True if every byte may begin a connection: its protocol is unknown.
    pub(in crate::proto) fn takes_any_bytes(&self) -> bool {
        self.is_custom() || !self.has_frames()
    }

    /// True if there are incomplete frames.
    pub(in crate::proto) fn has_frames(&self) -> bool {
        !matches!(
            self,
            Self::BuiltIn(Cutter {
                kind: Kind::Raw,
                ..
            })
        )
    }

    pub(in crate::proto) fn max(&self) -> usize {
        match self {
            Self::BuiltIn(cutter) => cutter.max as usize,
            Self::Custom(custom) => custom.max,
        }
    }

    /// Changes the maximum payload; `None` is the framing's own.
    pub(in crate::proto) fn set_max(&mut self, max: Option<usize>) {
        match self {
            Self::BuiltIn(cutter) => {
                cutter.max = saturated(max.unwrap_or(cutter.kind.default_max()));
                cutter.seen = 0;
            }
            Self::Custom(custom) => {
                custom.max = max.unwrap_or(DEFAULT_MAX);
                custom.seen = 0;
            }
        }
    }

    pub(super) fn seen(&self) -> usize {
        match self {
            Self::BuiltIn(cutter) => cutter.seen as usize,
            Self::Custom(custom) => custom.seen,
        }
    }

    /// Returns a copy, unless the framer is the user's.
    #[cfg(feature = "sim")]
    pub(in crate::proto) fn fork(&self) -> Option<Self> {
        match self {
            Self::BuiltIn(cutter) => Some(Self::BuiltIn(*cutter)),
            Self::Custom(_) => None,
        }
    }

    /// Returns the maximum, and how much of an incomplete frame was seen.
    #[cfg(feature = "sim")]
    pub(in crate::proto) fn memory(&self) -> (usize, usize) {
        (self.max(), self.seen())
    }
}

/// Returns the place of the first `byte`, by the standard library's fast search.
fn find(byte: u8, mut within: &[u8]) -> Option<usize> {
    let all = within;
    let until = within.skip_until(byte).ok()?;
    let last = until.checked_sub(1)?;
    (all.get(last) == Some(&byte)).then_some(last)
}

fn saturated(length: usize) -> u32 {
    u32::try_from(length).unwrap_or(u32::MAX)
}

impl Cutter {
    #[inline]
    fn decode(&mut self, input: &[u8]) -> Step {
        match self.cut(input) {
            // A payload ends with its frame.
            Some((payload, behind)) => {
                let consumed = input.len() - behind.len();
                Step::Frame {
                    payload: consumed - payload.len()..consumed,
                    consumed,
                }
            }
            None if self.is_too_large(input) => Step::TooLarge,
            None => Step::More,
        }
    }

    #[inline]
    fn cut<'a>(&mut self, input: &'a [u8]) -> Option<(&'a [u8], &'a [u8])> {
        let max = self.max as usize;
        match self.kind {
            Kind::Packet(width) => {
                let (length, behind) = width.split(input)?;
                if length > max {
                    return None;
                }
                behind.split_at_checked(length)
            }
            Kind::Raw if input.is_empty() => None,
            Kind::Raw => Some((input, &[])),
            Kind::Delimited(byte) => {
                let seen = self.seen as usize;
                let window = input.get(seen..input.len().min(max)).unwrap_or_default();
                match find(byte, window) {
                    Some(at) => {
                        self.seen = 0;
                        input.split_at_checked(seen + at + 1)
                    }
                    None => {
                        self.seen = saturated(input.len());
                        None
                    }
                }
            }
        }
    }

    /// True if `input`, which is no whole frame, can never become one.
    #[cold]
    fn is_too_large(&self, input: &[u8]) -> bool {
        let max = self.max as usize;
        match self.kind {
            Kind::Packet(width) => width.split(input).is_some_and(|(length, _)| length > max),
            Kind::Raw => false,
            Kind::Delimited(_) => input.len() > max,
        }
    }
}

impl Custom {
    fn decode(&mut self, input: &[u8]) -> Step {
        if input.is_empty() || input.len() < self.seen {
            return Step::More;
        }
        let step = Self::call(self.framer.as_mut(), input, self.max, &mut self.seen);
        if matches!(step, Step::Frame { .. }) {
            self.seen = 0;
        }
        step
    }

    fn call(framer: &mut dyn Framer, input: &[u8], max: usize, seen: &mut usize) -> Step {
        /// Room for the header and trailer of a frame with the maximum payload.
        const ENVELOPE: usize = 16;
        let limit = max.saturating_add(ENVELOPE);
        match framer.decode(input) {
            Ok(Decoded::Frame { payload, consumed }) => {
                let inside = payload.start <= payload.end
                    && payload.end <= consumed
                    && consumed <= input.len();
                if consumed == 0 || !inside {
                    Step::Bad(FrameError::new(
                        "the framer reported a frame that is empty or outside its input",
                    ))
                } else if payload.len() > max || consumed > limit {
                    // Received in pieces it would have been too long before it was whole.
                    Step::TooLarge
                } else {
                    Step::Frame { payload, consumed }
                }
            }
            Ok(Decoded::Need(total)) if total > limit => Step::TooLarge,
            Ok(Decoded::More | Decoded::Need(_)) if input.len() > limit => Step::TooLarge,
            Ok(Decoded::Need(total)) => {
                *seen = total;
                Step::More
            }
            Ok(Decoded::More) => Step::More,
            Err(error) => Step::Bad(error),
        }
    }
}

impl fmt::Debug for Codec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Codec")
            .field("max", &self.max())
            .field("seen", &self.seen())
            .finish_non_exhaustive()
    }
}
