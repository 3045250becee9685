//! Packet-2 once more, as a framer of the user's and cut by hand out of raw input: what the seam costs.

use std::num::TryFromIntError;

use portcullis::{Close, Decoded, FrameBuf, FrameError, Framer, Outcome};

/// A length of two bytes.
const HEADER: usize = 2;

/// Returns the length of the frame at the front of `input`, once its header has come.
fn length(input: &[u8]) -> Option<usize> {
    let header = *input.first_chunk::<HEADER>()?;
    Some(HEADER + usize::from(u16::from_be_bytes(header)))
}

/// Returns the header of a frame.
pub fn header(payload: &[u8]) -> Result<[u8; HEADER], TryFromIntError> {
    Ok(u16::try_from(payload.len())?.to_be_bytes())
}

pub struct Packet2;

impl Framer for Packet2 {
    fn decode(&mut self, input: &[u8]) -> Result<Decoded, FrameError> {
        Ok(match length(input) {
            Some(end) if end <= input.len() => Decoded::Frame {
                payload: HEADER..end,
                consumed: end,
            },
            Some(end) => Decoded::Need(end),
            None => Decoded::More,
        })
    }

    fn header(&mut self, length: usize, out: &mut FrameBuf<'_>) -> Result<(), FrameError> {
        let length = u16::try_from(length).map_err(FrameError::new)?;
        out.put(&length.to_be_bytes());
        Ok(())
    }
}

/// The remainder of the input behind its last whole frame.
#[derive(Default)]
pub struct ByHand(Vec<u8>);

impl ByHand {
    /// Calls `answer` with the payload of each whole frame.
    pub fn each(
        &mut self,
        input: &[u8],
        mut answer: impl FnMut(&[u8]) -> Result<(), Close>,
    ) -> Outcome {
        let joined;
        let mut rest = input;
        if !self.0.is_empty() {
            self.0.extend_from_slice(input);
            joined = std::mem::take(&mut self.0);
            rest = &joined;
        }
        while let Some((frame, behind)) = length(rest).and_then(|end| rest.split_at_checked(end)) {
            answer(frame.get(HEADER..).unwrap_or_default())?;
            rest = behind;
        }
        self.0.extend_from_slice(rest);
        Ok(())
    }
}
