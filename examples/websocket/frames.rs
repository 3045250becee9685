//! The frames of section 5: cut out of the stream, unmasked, and written.

use std::error::Error;
use std::fmt;

use portcullis::{Decoded, FrameBuf, FrameError, Framer};

/// Maximum payload of a control frame.
const MAX_CONTROL: u64 = 125;
const FIN: u8 = 0x80;
const MASK: u8 = 0x80;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Opcode {
    Continuation = 0,
    Text = 1,
    Binary = 2,
    Close = 8,
    Ping = 9,
    Pong = 10,
}

impl Opcode {
    fn of(bits: u8) -> Option<Self> {
        Some(match bits {
            0 => Self::Continuation,
            1 => Self::Text,
            2 => Self::Binary,
            8 => Self::Close,
            9 => Self::Ping,
            10 => Self::Pong,
            _ => return None,
        })
    }

    fn is_control(self) -> bool {
        self as u8 & 8 != 0
    }
}

/// What the standard forbids, with the status code of the close.
#[derive(Debug)]
pub struct Violation {
    pub code: u16,
    words: &'static str,
}

impl Violation {
    pub const fn protocol(words: &'static str) -> Self {
        Self { code: 1002, words }
    }

    pub const NOT_UTF8: Self = Self {
        code: 1007,
        words: "not UTF-8",
    };

    pub const TOO_BIG: Self = Self {
        code: 1009,
        words: "the message is too big",
    };
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.words)
    }
}

impl Error for Violation {}

/// The header of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    pub opcode: Opcode,
    /// The last frame of its message.
    pub fin: bool,
}

/// Cuts frames, and remembers the header of the last one.
#[derive(Default)]
pub struct Frames {
    pub header: Option<Header>,
    mask: [u8; 4],
    /// A message has begun and not ended.
    in_message: bool,
}

impl Frames {
    /// Checks the first two bytes, before the frame is whole.
    fn check(&self, first: u8, second: u8) -> Result<Header, Violation> {
        let Some(opcode) = Opcode::of(first & 0x0F) else {
            return Err(Violation::protocol("a reserved opcode"));
        };
        let header = Header {
            opcode,
            fin: first & FIN != 0,
        };
        let is_control = opcode.is_control();
        if first & 0x70 != 0 {
            Err(Violation::protocol("a reserved bit, without an extension"))
        } else if second & MASK == 0 {
            Err(Violation::protocol("a client must mask its frames"))
        } else if is_control && (!header.fin || u64::from(second & !MASK) > MAX_CONTROL) {
            Err(Violation::protocol("a long or fragmented control frame"))
        } else if !is_control && (opcode == Opcode::Continuation) != self.in_message {
            Err(Violation::protocol("a fragment out of order"))
        } else {
            Ok(header)
        }
    }
}

impl Framer for Frames {
    fn decode(&mut self, input: &[u8]) -> Result<Decoded, FrameError> {
        let [first, second, rest @ ..] = input else {
            return Ok(Decoded::More);
        };
        let header = self.check(*first, *second).map_err(FrameError::new)?;
        let (length, width) = match (second & !MASK, rest) {
            (126, [a, b, ..]) => (u64::from(u16::from_be_bytes([*a, *b])), 2),
            (126, _) => return Ok(Decoded::More),
            (127, rest) => match rest.first_chunk() {
                Some(length) => (u64::from_be_bytes(*length), 8),
                None => return Ok(Decoded::More),
            },
            (length, _) => (u64::from(length), 0),
        };
        if (width == 2 && length < 126) || (width == 8 && length <= 0xFFFF) {
            let words = "a length that is not in its shortest form";
            return Err(FrameError::new(Violation::protocol(words)));
        }
        let begin = 2 + width + self.mask.len();
        // Longer than any maximum.
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        let end = begin.saturating_add(length);
        if input.len() < end {
            return Ok(Decoded::Need(end));
        }
        if let Some(mask) = input.get(2 + width..).and_then(<[u8]>::first_chunk) {
            self.mask = *mask;
        }
        if !header.opcode.is_control() {
            self.in_message = !header.fin;
        }
        self.header = Some(header);
        Ok(Decoded::Packed {
            payload: begin..end,
            consumed: end,
        })
    }

    fn unpack(&mut self, payload: &[u8], out: &mut FrameBuf<'_>) -> Result<(), FrameError> {
        // A multiple of the mask's length.
        let mut plain = [0; 512];
        for piece in payload.chunks(plain.len()) {
            let mask = self.mask.iter().cycle();
            for ((plain, masked), mask) in plain.iter_mut().zip(piece).zip(mask) {
                *plain = masked ^ mask;
            }
            out.put(plain.get(..piece.len()).unwrap_or_default());
        }
        Ok(())
    }
}

/// Makes a frame of the server's: whole, and not masked.
pub fn frame(opcode: Opcode, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![FIN | opcode as u8];
    match payload.len() {
        length @ 0..=125 => frame.push(length as u8),
        length @ 126..=0xFFFF => {
            frame.push(126);
            frame.extend_from_slice(&(length as u16).to_be_bytes());
        }
        length => {
            frame.push(127);
            frame.extend_from_slice(&(length as u64).to_be_bytes());
        }
    }
    frame.extend_from_slice(payload);
    frame
}
