//! Frames of a fixed length, and frames whose length is a field of their header.

use std::cmp::Ordering;

use super::framer::{FrameError, Framing};
use super::step::{EncodeError, Step, DEFAULT_MAX_LONG};
use crate::error::{Error, Result};
use crate::proto::payload::{length, Chunk};

/// The place and meaning of a length in a frame's header: see
/// [`Framing::LengthField`](super::Framing::LengthField).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct LengthField {
    offset: u8,
    width: u8,
    little_endian: bool,
    adjustment: i16,
}

/// The extent of the frame at the front of the input.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Extent {
    /// Number of bytes of the whole frame.
    Length(usize),
    /// The length field has not arrived.
    More,
    /// The length field announces a frame that ends inside its header, or has a width that does
    /// not exist.
    Bad,
}

impl LengthField {
    fn has_width(self) -> bool {
        matches!(self.width, 1..=4 | 8)
    }

    fn header(self) -> usize {
        usize::from(self.offset) + usize::from(self.width)
    }

    /// Returns where the payload begins: with the frame, if bytes in front of the length field
    /// would be lost otherwise.
    fn payload_start(self) -> usize {
        match self.offset {
            0 => usize::from(self.width),
            _ => 0,
        }
    }

    /// Returns the extent of the frame at the front of `input`.
    fn extent(self, input: &[u8]) -> Extent {
        let header = self.header();
        if !self.has_width() {
            return Extent::Bad;
        }
        let Some(field) = input.get(usize::from(self.offset)..header) else {
            return Extent::More;
        };
        let append = |value: u64, &byte: &u8| value << 8 | u64::from(byte);
        let value = match self.little_endian {
            true => field.iter().rev().fold(0, append),
            false => field.iter().fold(0, append),
        };
        let total = i128::from(value) + i128::from(self.adjustment) + header as i128;
        if total < header as i128 {
            return Extent::Bad;
        }
        // Longer than any maximum.
        Extent::Length(usize::try_from(total).unwrap_or(usize::MAX))
    }

    /// Returns the largest value of the field.
    fn limit(self) -> u64 {
        match self.width {
            width @ 0..8 => (1 << (u32::from(width) * 8)) - 1,
            _ => u64::MAX,
        }
    }

    /// Appends the header of a payload of `length` bytes, where the field is all of the header.
    fn put_header(self, length: usize, out: &mut Vec<u8>) -> Result<(), EncodeError> {
        if self.offset > 0 || !self.has_width() {
            return Err(refused(
                "the header of this framing is not that of a length alone",
            ));
        }
        let value = length as i128 - i128::from(self.adjustment);
        let limit = i128::from(self.limit());
        if value < 0 {
            return Err(refused(
                "the payload is shorter than the adjustment of its length",
            ));
        }
        if value > limit {
            let max = limit + i128::from(self.adjustment);
            let max = usize::try_from(max.max(0)).unwrap_or(usize::MAX);
            return Err(EncodeError::TooLarge { length, max });
        }
        let width = usize::from(self.width);
        // The value fits in the field.
        let value = value as u64;
        match self.little_endian {
            true => out.extend_from_slice(value.to_le_bytes().get(..width).unwrap_or_default()),
            false => {
                out.extend_from_slice(value.to_be_bytes().get(8 - width..).unwrap_or_default())
            }
        }
        Ok(())
    }

    /// Checks that a frame is as long as its header announces, which is in `front`.
    fn check_whole(self, front: &[u8], frame: usize) -> Result<(), EncodeError> {
        match self.extent(front) {
            Extent::Length(length) if length == frame => Ok(()),
            _ => Err(refused(
                "the length field does not announce the length of the frame",
            )),
        }
    }
}

/// What makes the extent of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shape {
    Fixed(u32),
    Field(LengthField),
}

impl Shape {
    /// The shape of the frames of this framing, if it has one.
    pub(super) fn of(framing: &Framing) -> Option<Self> {
        match *framing {
            Framing::Fixed(length) => Some(Self::Fixed(length)),
            Framing::LengthField {
                offset,
                width,
                little_endian,
                adjustment,
            } => Some(Self::Field(LengthField {
                offset,
                width,
                little_endian,
                adjustment,
            })),
            _ => None,
        }
    }

    /// Finds parameters that no frame can have.
    pub(super) fn check(self) -> Result<()> {
        let problem = match self {
            Self::Fixed(0) => "a fixed length of 0 makes no frames; use at least 1".to_owned(),
            Self::Field(field) if !field.has_width() => {
                let width = field.width;
                format!("a length field has 1, 2, 3, 4 or 8 bytes, not {width}")
            }
            _ => return Ok(()),
        };
        Err(Error::option("framing", problem))
    }

    /// Finds a maximum payload that no frame fits in.
    fn check_max(self, max: Option<usize>) -> Result<()> {
        match (self, max) {
            (Self::Fixed(length), Some(max)) if max < length as usize => {
                let problem = format!("no frame of the fixed length {length} fits in {max} bytes");
                Err(Error::option("max_frame", problem))
            }
            _ => Ok(()),
        }
    }

    /// Returns the maximum payload where none is set.
    fn default_max(self) -> usize {
        match self {
            Self::Fixed(length) => length as usize,
            Self::Field(_) => DEFAULT_MAX_LONG,
        }
    }
}

impl Framing {
    /// Finds values that no connection can work with. `max`: the maximum payload, if one is set.
    pub(crate) fn check(&self, max: Option<usize>) -> Result<()> {
        let Some(shape) = Shape::of(self) else {
            return Ok(());
        };
        shape.check_max(max)?;
        shape.check()
    }
}

/// The codec of frames with a shape.
#[derive(Clone)]
pub(in crate::proto) struct Shaped {
    shape: Shape,
    max: usize,
}

impl Shaped {
    pub(super) fn new(shape: Shape, max: Option<usize>) -> Self {
        let max = max.unwrap_or_else(|| shape.default_max());
        Self { shape, max }
    }

    pub(super) fn max(&self) -> usize {
        self.max
    }

    pub(super) fn check_max(&self, max: Option<usize>) -> Result<()> {
        self.shape.check_max(max)
    }

    pub(super) fn set_max(&mut self, max: Option<usize>) {
        *self = Self::new(self.shape, max);
    }

    /// See [`Codec::chosen_max`](super::Codec::chosen_max).
    pub(super) fn chosen_max(&self) -> Option<usize> {
        let is_form = matches!(self.shape, Shape::Fixed(_)) && self.max == self.shape.default_max();
        (!is_form).then_some(self.max)
    }

    /// Returns where the payload of the frame at the front of `input` begins, and the frame's
    /// length.
    fn extent(&self, input: &[u8]) -> (usize, Extent) {
        match self.shape {
            Shape::Fixed(0) => (0, Extent::Bad),
            Shape::Fixed(_) if input.is_empty() => (0, Extent::More),
            Shape::Fixed(length) => (0, Extent::Length(length as usize)),
            Shape::Field(field) => (field.payload_start(), field.extent(input)),
        }
    }

    pub(super) fn decode(&self, input: &[u8]) -> Step {
        match self.extent(input) {
            (_, Extent::More) => Step::More,
            (_, Extent::Bad) => {
                Step::Bad(FrameError::new("the length announces less than the header"))
            }
            (start, Extent::Length(length)) if length - start > self.max => Step::TooLarge,
            (_, Extent::Length(length)) if length > input.len() => Step::More,
            (start, Extent::Length(consumed)) => Step::Frame {
                payload: start..consumed,
                consumed,
            },
        }
    }

    /// Returns the length of the frame that begins with `begun`, if that is known.
    pub(super) fn whole(&self, begun: &[u8]) -> Option<usize> {
        match self.extent(begun) {
            (_, Extent::Length(length)) => Some(length),
            (_, Extent::More | Extent::Bad) => None,
        }
    }

    #[inline(never)]
    pub(super) fn cut<'a>(&self, input: &'a [u8]) -> Option<(&'a [u8], &'a [u8])> {
        match self.decode(input) {
            Step::Frame { payload, consumed } => {
                Some((input.get(payload)?, input.get(consumed..)?))
            }
            _ => None,
        }
    }

    #[inline(never)]
    pub(super) fn encode(&self, payload: &[u8], out: &mut Vec<u8>) -> Result<(), EncodeError> {
        match self.shape {
            Shape::Field(field) if field.offset > 0 => field.check_whole(payload, payload.len())?,
            _ => self.put_header(payload.len(), out)?,
        }
        out.extend_from_slice(payload);
        Ok(())
    }

    /// Appends the header of a payload in pieces to `envelope`.
    pub(super) fn wrap(
        &self,
        payload: &[Chunk<'_>],
        envelope: &mut Vec<u8>,
    ) -> Result<(), EncodeError> {
        let length = length(payload);
        let Shape::Field(field) = self.shape else {
            return self.put_header(length, envelope);
        };
        match (field.offset, payload) {
            (0, _) => self.put_header(length, envelope),
            (_, [whole]) => field.check_whole(whole.bytes(), length),
            (_, pieces) => {
                let bytes = pieces.iter().flat_map(Chunk::bytes).copied();
                let front: Vec<u8> = bytes.take(field.header()).collect();
                field.check_whole(&front, length)
            }
        }
    }

    /// Makes a frame of the payload at the end of `out`, which begins at `start`.
    pub(super) fn wrap_tail(&self, out: &mut Vec<u8>, start: usize) -> Result<(), EncodeError> {
        let end = out.len();
        let payload = [Chunk::Borrowed(out.get(start..).unwrap_or_default())];
        let mut header = Vec::new();
        self.wrap(&payload, &mut header)?;
        out.extend_from_slice(&header);
        if let Some(frame) = out.get_mut(start..) {
            frame.rotate_right(header.len());
        }
        debug_assert_eq!(out.len(), end + header.len());
        Ok(())
    }

    #[inline(never)]
    pub(super) fn put_header(&self, length: usize, out: &mut Vec<u8>) -> Result<(), EncodeError> {
        match self.shape {
            Shape::Field(field) => field.put_header(length, out),
            Shape::Fixed(fixed) => match length.cmp(&(fixed as usize)) {
                Ordering::Equal => Ok(()),
                Ordering::Greater => Err(EncodeError::TooLarge {
                    length,
                    max: fixed as usize,
                }),
                Ordering::Less => Err(refused(
                    "the payload is shorter than the fixed length of a frame",
                )),
            },
        }
    }
}

fn refused(words: &'static str) -> EncodeError {
    EncodeError::Refused(FrameError::new(words))
}
