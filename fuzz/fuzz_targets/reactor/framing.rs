//! The framings of a world: the built-in ones, and one whose framer fails in every way.

use kit::planned::blow;
use portcullis::{Decoded, FrameBuf, FrameError, Framer, Framing};

pub fn framing(number: u8) -> Framing {
    match number % 9 {
        0 => Framing::Raw,
        1 => Framing::Packet1,
        2 => Framing::Packet2,
        3 => Framing::Packet4,
        4 => Framing::Line,
        5 => Framing::Delimited(0),
        6 => Framing::Fixed(3),
        7 => Framing::LengthField {
            offset: 1,
            width: 2,
            little_endian: true,
            adjustment: -3,
        },
        _ => Framing::custom(|| Brittle),
    }
}

/// Frames of three bytes, the first of which may be its undoing. Nothing is sent as it is.
struct Brittle;

impl Framer for Brittle {
    fn decode(&mut self, input: &[u8]) -> Result<Decoded, FrameError> {
        match input {
            [] | [_] => Ok(Decoded::More),
            [0xFF, ..] => blow(),
            [0xFE, ..] => Err(FrameError::new("as planned")),
            // Outside the input, and nothing consumed: both are its own fault.
            [0xFD, ..] => Ok(Decoded::Frame {
                payload: 0..input.len() + 1,
                consumed: 3,
            }),
            [0xFC, ..] => Ok(Decoded::Frame {
                payload: 0..1,
                consumed: 0,
            }),
            [_, _] => Ok(Decoded::Need(3)),
            [0xFB | 0xFA | 0xF9, ..] => Ok(Decoded::Packed {
                payload: 0..3,
                consumed: 3,
            }),
            _ => Ok(Decoded::Frame {
                payload: 1..3,
                consumed: 3,
            }),
        }
    }

    /// Fails in every way, or fills all the room.
    fn unpack(&mut self, payload: &[u8], out: &mut FrameBuf<'_>) -> Result<(), FrameError> {
        match payload {
            [0xFB, ..] => blow(),
            [0xFA, ..] => return Err(FrameError::new("as planned")),
            _ => {}
        }
        while out.room() > 0 {
            out.put(&payload[1..]);
            if payload[2] == 0 {
                break;
            }
        }
        Ok(())
    }

    fn pack(&mut self, payload: &[&[u8]], out: &mut FrameBuf<'_>) -> Result<bool, FrameError> {
        let payload = payload.concat();
        out.put(&payload);
        match &payload[..] {
            [0xFF, ..] => blow(),
            [0xFE, ..] => Err(FrameError::new("as planned")),
            payload => Ok(payload.len() % 2 == 0),
        }
    }

    fn header(&mut self, _: usize, out: &mut FrameBuf<'_>) -> Result<(), FrameError> {
        out.put(b"<");
        Ok(())
    }
}
