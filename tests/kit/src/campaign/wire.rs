//! The framings once more, as simply as they can be said: what the server must make of a stream, and put on it.

use std::ops::Range;

use portcullis::{Decoded, FrameBuf, FrameError, Framer, Framing};

/// What a stream is cut into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wire {
    Raw,
    Packet1,
    Packet2,
    Packet4,
    Line,
    /// Ended by the letter `e`, which occurs in texts too.
    Letter,
    /// Two bytes each.
    Pairs,
    /// A length of three bytes, the least first, and another byte that it does not count.
    Little,
    /// A byte, and a length of two bytes that counts all of the frame. It is a part of the payload.
    Whole,
    /// A framer of our own.
    Five,
    /// A framer of our own that transforms: a length, and the letters that it is added to.
    Shifted,
}

impl Wire {
    pub const ALL: [Self; 11] = [
        Self::Raw,
        Self::Packet1,
        Self::Packet2,
        Self::Packet4,
        Self::Line,
        Self::Letter,
        Self::Pairs,
        Self::Little,
        Self::Whole,
        Self::Five,
        Self::Shifted,
    ];

    pub fn framing(self) -> Framing {
        match self {
            Self::Raw => Framing::Raw,
            Self::Packet1 => Framing::Packet1,
            Self::Packet2 => Framing::Packet2,
            Self::Packet4 => Framing::Packet4,
            Self::Line => Framing::Line,
            Self::Letter => Framing::Delimited(b'e'),
            Self::Pairs => Framing::Fixed(2),
            Self::Little => Framing::LengthField {
                offset: 0,
                width: 3,
                little_endian: true,
                adjustment: 1,
            },
            Self::Whole => Framing::LengthField {
                offset: 1,
                width: 2,
                little_endian: false,
                adjustment: -3,
            },
            Self::Five => Framing::custom(|| Five),
            Self::Shifted => Framing::custom(|| Shifted),
        }
    }

    /// What a `send` of this puts on the wire.
    pub fn encode(self, payload: &[u8]) -> Vec<u8> {
        let length = (payload.len() as u32).to_be_bytes();
        let header: &[u8] = match self {
            Self::Packet1 => &length[3..],
            Self::Packet2 => &length[2..],
            Self::Packet4 => &length,
            Self::Little => {
                let [_, a, b, c] = (payload.len() as u32).wrapping_sub(1).to_be_bytes();
                return [&[c, b, a], payload].concat();
            }
            Self::Shifted => {
                return [&[payload.len() as u8], &*shifted(payload, payload.len())].concat()
            }
            Self::Raw | Self::Line | Self::Letter | Self::Five | Self::Pairs | Self::Whole => &[],
        };
        [header, payload].concat()
    }

    /// What a client says to send about this much in one frame.
    pub fn utter(self, payload: &[u8]) -> Vec<u8> {
        match self {
            Self::Line => [payload, b"\n"].concat(),
            Self::Letter => [payload, b"e"].concat(),
            Self::Five => b"fiver".to_vec(),
            Self::Pairs => b"ab".to_vec(),
            Self::Whole => {
                let length = (payload.len() as u16 + 3).to_be_bytes();
                [b"w", &length[..], payload].concat()
            }
            Self::Little if payload.is_empty() => self.encode(b"x"),
            packets => packets.encode(payload),
        }
    }

    /// The first frame of `input`: its payload, and how much of the input it takes. `None` if there is none, or the
    /// stream is broken. A raw one is whatever the server took, here `raw` bytes.
    pub fn cut(self, input: &[u8], max: usize, raw: usize) -> Option<(Range<usize>, usize)> {
        let packet = |header: usize| {
            let length = input
                .get(..header)?
                .iter()
                .fold(0, |sum, &byte| sum << 8 | usize::from(byte));
            let end = header + length;
            (length <= max && end <= input.len()).then_some((header..end, end))
        };
        let delimited = |delimiter: u8| {
            let end = input.iter().take(max).position(|&byte| byte == delimiter)? + 1;
            Some((0..end, end))
        };
        match self {
            Self::Raw => (raw > 0 && raw <= input.len()).then_some((0..raw, raw)),
            Self::Packet1 => packet(1),
            Self::Packet2 => packet(2),
            Self::Packet4 => packet(4),
            Self::Line => delimited(b'\n'),
            Self::Letter => delimited(b'e'),
            Self::Pairs => (max >= 2 && input.len() >= 2).then_some((0..2, 2)),
            Self::Little => {
                let &[a, b, c, ..] = input else { return None };
                let length = u32::from_be_bytes([0, c, b, a]) as usize + 1;
                let end = 3 + length;
                (length <= max && end <= input.len()).then_some((3..end, end))
            }
            Self::Whole => {
                let &[_, a, b, ..] = input else { return None };
                let end = usize::from(u16::from_be_bytes([a, b]));
                (end >= 3 && end <= max && end <= input.len()).then_some((0..end, end))
            }
            Self::Five => (input.len() >= 5 && input[0] != b'!').then_some((1..3, 5)),
            Self::Shifted => packet(1),
        }
    }

    /// What the handler gets of this payload.
    pub fn unpack(self, payload: &[u8]) -> Vec<u8> {
        match self {
            Self::Shifted => shifted(payload, 256 - payload.len() % 256),
            _ => payload.to_vec(),
        }
    }

    /// Every byte may begin a connection.
    pub fn takes_any_bytes(self) -> bool {
        !matches!(
            self,
            Self::Packet1 | Self::Packet2 | Self::Packet4 | Self::Line | Self::Letter
        )
    }
}

/// Five bytes a frame, asked for in every way. One that begins with `!` is refused.
struct Five;

impl Framer for Five {
    fn decode(&mut self, input: &[u8]) -> Result<Decoded, FrameError> {
        match input {
            [b'!', ..] => Err(FrameError::new("as planned")),
            input => Ok(match input.len() {
                0..=2 => Decoded::More,
                3..=4 => Decoded::Need(5),
                _ => Decoded::Frame {
                    payload: 1..3,
                    consumed: 5,
                },
            }),
        }
    }

    fn header(&mut self, length: usize, _: &mut FrameBuf<'_>) -> Result<(), FrameError> {
        match length {
            0 => Err(FrameError::new("empty")),
            _ => Ok(()),
        }
    }
}

/// A length of one byte, which is added to each letter.
struct Shifted;

fn shifted(letters: &[u8], by: usize) -> Vec<u8> {
    letters
        .iter()
        .map(|letter| letter.wrapping_add(by as u8))
        .collect()
}

impl Framer for Shifted {
    fn decode(&mut self, input: &[u8]) -> Result<Decoded, FrameError> {
        let end = 1 + usize::from(input[0]);
        Ok(match input.len() {
            got if got < end => Decoded::Need(end),
            _ => Decoded::Packed {
                payload: 1..end,
                consumed: end,
            },
        })
    }

    fn unpack(&mut self, payload: &[u8], out: &mut FrameBuf<'_>) -> Result<(), FrameError> {
        for letter in payload {
            out.put(&[letter.wrapping_sub(payload.len() as u8)]);
        }
        Ok(())
    }

    fn pack(&mut self, payload: &[&[u8]], out: &mut FrameBuf<'_>) -> Result<bool, FrameError> {
        let payload = payload.concat();
        out.put(&shifted(&payload, payload.len()));
        Ok(true)
    }

    fn header(&mut self, length: usize, out: &mut FrameBuf<'_>) -> Result<(), FrameError> {
        out.put(&[u8::try_from(length).map_err(FrameError::new)?]);
        Ok(())
    }
}
