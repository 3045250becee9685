//! The codec of one connection: frames out of received bytes. Bytes out of frames are in [`encode`].

mod encode;

use std::fmt;
use std::io::BufRead;
use std::ops::Range;
#[cfg(feature = "tls")]
use std::sync::Arc;

use super::super::buffers::Buffers;
#[cfg(feature = "tls")]
use super::framer::MakeFramer;
use super::framer::{AnyFramer, Framing};
use super::length_field::{Shape, Shaped};
use super::step::{EncodeError, Step, DEFAULT_MAX_LONG};
use crate::error::Result;

/// The largest payload that a packet-4 header may announce.
///
/// As in Erlang/OTP: header and payload fit in 31 bits.
const PACKET4_LIMIT: usize = 0x7FFF_FFFB;
/// The maximum payload of lines, custom framings and raw pieces, where none is set.
const DEFAULT_MAX: usize = 64 * 1024;
/// The length of packet-4's header.
const MAX_HEADER: usize = 4;

/// The framing of one connection, and how much of an incomplete frame it has seen.
///
/// Part of each connection, so it is small: maxima fit in 32 bits.
pub(in crate::proto) enum Codec {
    BuiltIn(Cutter),
    /// Fixed lengths and length fields.
    Shaped(Box<Shaped>),
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

/// What is at the front of the input of the user's framing.
pub(super) enum Found {
    Step(Step),
    /// A frame that the framer is to transform.
    Packed {
        payload: Range<usize>,
        consumed: usize,
    },
}

/// The user's framing.
pub(in crate::proto) struct Custom {
    #[cfg(feature = "tls")]
    pub(super) make: Arc<MakeFramer>,
    pub(super) framer: Box<dyn AnyFramer>,
    pub(super) max: usize,
    /// Shorter input contains no whole frame; at least 1.
    pub(super) seen: usize,
    /// What was found at the front of the input, unless it is a plain frame: the framer is not
    /// asked again.
    pub(super) found: Option<Found>,
    /// The framer runs: a panic is its own.
    pub(super) is_running: bool,
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
            Self::Packet(Width::Four) => DEFAULT_MAX_LONG,
            Self::Packet(width) => width.limit(),
            Self::Raw | Self::Delimited(_) => DEFAULT_MAX,
        }
    }

    /// True if the default maximum is a choice of this library's, and not of the frames' form.
    const fn has_chosen_max(self) -> bool {
        matches!(self, Self::Packet(Width::Four) | Self::Delimited(_))
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
        if let Some(shape) = Shape::of(framing) {
            return Self::Shaped(Box::new(Shaped::new(shape, max)));
        }
        let kind = match framing {
            Framing::Raw | Framing::Fixed(_) | Framing::LengthField { .. } => Kind::Raw,
            Framing::Packet1 => Kind::Packet(Width::One),
            Framing::Packet2 => Kind::Packet(Width::Two),
            Framing::Packet4 => Kind::Packet(Width::Four),
            Framing::Line => Kind::Delimited(b'\n'),
            Framing::Delimited(byte) => Kind::Delimited(*byte),
            Framing::Custom(make) => {
                let custom = Custom::new(make, max.unwrap_or(DEFAULT_MAX));
                return Self::Custom(Box::new(custom));
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
    pub(in crate::proto) fn decode(&mut self, input: &[u8], buffers: &mut Buffers) -> Step {
        match self {
            _ if input.is_empty() => Step::More,
            Self::BuiltIn(cutter) => cutter.decode(input),
            Self::Shaped(shaped) => shaped.decode(input),
            Self::Custom(custom) => custom.decode(input, buffers),
        }
    }

    /// Returns the payload of a whole frame at the front of `input`, and the bytes behind the
    /// frame.
    ///
    /// `None` if there is none, or if it is to be transformed: see [`Codec::decode`].
    #[inline]
    pub(in crate::proto) fn cut<'a>(&mut self, input: &'a [u8]) -> Option<(&'a [u8], &'a [u8])> {
        match self {
            Self::BuiltIn(cutter) => cutter.cut(input),
            Self::Shaped(shaped) => shaped.cut(input),
            Self::Custom(custom) => custom.cut(input),
        }
    }

    /// Returns how many bytes the frame that begins with `begun` lacks, if that is known. A framer
    /// may be wrong about it.
    pub(in crate::proto) fn missing(&self, begun: &[u8]) -> Option<usize> {
        let whole = match self {
            Self::BuiltIn(cutter) => cutter.whole(begun),
            Self::Shaped(shaped) => shaped.whole(begun),
            Self::Custom(custom) => Some(custom.seen).filter(|&seen| seen > begun.len() + 1),
        };
        whole?.checked_sub(begun.len())
    }

    /// Returns the framer, if it is of this type.
    pub(in crate::proto) fn framer<F: 'static>(&mut self) -> Option<&mut F> {
        match self {
            Self::BuiltIn(_) | Self::Shaped(_) => None,
            // Of the framer and not of its box, which is one too.
            Self::Custom(custom) => (*custom.framer).as_any().downcast_mut(),
        }
    }

    /// True if the framer has not returned from its last call: it has panicked.
    pub(in crate::proto) fn has_framer_panicked(&self) -> bool {
        matches!(self, Self::Custom(custom) if custom.is_running)
    }

    /// Returns the maximum payload that is not due to the form of the frames: it outlives the
    /// framing.
    pub(in crate::proto) fn chosen_max(&self) -> Option<usize> {
        match self {
            Self::BuiltIn(cutter) => {
                let max = cutter.max as usize;
                let is_chosen = cutter.kind.has_chosen_max() || max != cutter.kind.default_max();
                is_chosen.then_some(max)
            }
            Self::Shaped(shaped) => shaped.chosen_max(),
            Self::Custom(custom) => Some(custom.max),
        }
    }

    /// True if it is the user's code, which may panic.
    #[inline]
    pub(in crate::proto) fn is_custom(&self) -> bool {
        matches!(self, Self::Custom(_))
    }

    /// True if every byte may begin a connection: its protocol is unknown.
    pub(in crate::proto) fn takes_any_bytes(&self) -> bool {
        !matches!(self, Self::BuiltIn(_)) || !self.has_frames()
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
            Self::Shaped(shaped) => shaped.max(),
            Self::Custom(custom) => custom.max,
        }
    }

    /// Finds a maximum payload that no frame fits in.
    pub(in crate::proto) fn check_max(&self, max: Option<usize>) -> Result<()> {
        match self {
            Self::Shaped(shaped) => shaped.check_max(max),
            Self::BuiltIn(_) | Self::Custom(_) => Ok(()),
        }
    }

    /// Changes the maximum payload; `None` is the framing's own.
    pub(in crate::proto) fn set_max(&mut self, max: Option<usize>) {
        match self {
            Self::BuiltIn(cutter) => {
                cutter.max = saturated(max.unwrap_or(cutter.kind.default_max()));
                cutter.seen = 0;
            }
            Self::Shaped(shaped) => shaped.set_max(max),
            Self::Custom(custom) => {
                custom.max = max.unwrap_or(DEFAULT_MAX);
                custom.seen = 1;
                if matches!(custom.found, Some(Found::Step(Step::TooLarge))) {
                    custom.found = None;
                }
            }
        }
    }

    /// Returns the same framing for another stream of bytes, with a framer of its own.
    #[cfg(feature = "tls")]
    pub(in crate::proto) fn renewed(&self) -> Self {
        match self {
            Self::BuiltIn(cutter) => Self::BuiltIn(Cutter { seen: 0, ..*cutter }),
            Self::Shaped(shaped) => Self::Shaped(shaped.clone()),
            Self::Custom(custom) => {
                let custom = Custom::new(&custom.make, custom.max);
                Self::Custom(Box::new(custom))
            }
        }
    }

    pub(super) fn seen(&self) -> usize {
        match self {
            Self::BuiltIn(cutter) => cutter.seen as usize,
            Self::Shaped(_) => 0,
            Self::Custom(custom) => custom.seen,
        }
    }

    /// Returns a copy, unless the framer is the user's.
    #[cfg(feature = "sim")]
    pub(in crate::proto) fn fork(&self) -> Option<Self> {
        match self {
            Self::BuiltIn(cutter) => Some(Self::BuiltIn(*cutter)),
            Self::Shaped(shaped) => Some(Self::Shaped(shaped.clone())),
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

    /// Returns the length of the frame that begins with `begun`, if that is known.
    fn whole(&self, begun: &[u8]) -> Option<usize> {
        let Kind::Packet(width) = self.kind else {
            return None;
        };
        let (length, behind) = width.split(begun)?;
        (begun.len() - behind.len()).checked_add(length)
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

impl fmt::Debug for Codec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Codec")
            .field("max", &self.max())
            .field("seen", &self.seen())
            .finish_non_exhaustive()
    }
}
