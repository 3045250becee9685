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
    /// A framer of our own.
    Five,
}

impl Wire {
    pub const ALL: [Self; 7] = [
        Self::Raw,
        Self::Packet1,
        Self::Packet2,
        Self::Packet4,
        Self::Line,
        Self::Letter,
        Self::Five,
    ];

    pub fn framing(self) -> Framing {
        match self {
            Self::Raw => Framing::Raw,
            Self::Packet1 => Framing::Packet1,
            Self::Packet2 => Framing::Packet2,
            Self::Packet4 => Framing::Packet4,
            Self::Line => Framing::Line,
            Self::Letter => Framing::Delimited(b'e'),
            Self::Five => Framing::custom(|| Five),
        }
    }

    /// What a `send` of this puts on the wire.
    pub fn encode(self, payload: &[u8]) -> Vec<u8> {
        let length = (payload.len() as u32).to_be_bytes();
        let header: &[u8] = match self {
            Self::Packet1 => &length[3..],
            Self::Packet2 => &length[2..],
            Self::Packet4 => &length,
            Self::Raw | Self::Line | Self::Letter | Self::Five => &[],
        };
        [header, payload].concat()
    }

    /// What a client says to send about this much in one frame.
    pub fn utter(self, payload: &[u8]) -> Vec<u8> {
        match self {
            Self::Line => [payload, b"\n"].concat(),
            Self::Letter => [payload, b"e"].concat(),
            Self::Five => b"fiver".to_vec(),
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
            Self::Five => (input.len() >= 5 && input[0] != b'!').then_some((1..3, 5)),
        }
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
