//! The sending side of the codec: bytes out of frames.

use super::{Codec, Custom, Cutter, EncodeError, Kind, Width, MAX_HEADER};
use crate::proto::buffers::Buffers;
use crate::proto::framing::{FrameBuf, FrameError};
use crate::proto::payload::{length, Chunk, MAX_PARTS};

impl Codec {
    /// Appends one frame to `out`, or leaves `out` as it was.
    #[inline(always)]
    pub(in crate::proto) fn encode(
        &mut self,
        payload: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<(), EncodeError> {
        match self {
            Self::BuiltIn(cutter) => cutter.encode(payload, out),
            Self::Shaped(shaped) => shaped.encode(payload, out),
            Self::Custom(custom) => custom.encode(payload, out),
        }
    }

    /// Makes what surrounds `payload`: appends header and trailer to `envelope`. Returns the length
    /// of the header. The user's framing may put other chunks into the payload's place.
    pub(in crate::proto) fn wrap(
        &mut self,
        payload: &mut [Chunk<'_>],
        envelope: &mut Vec<u8>,
        buffers: &mut Buffers,
    ) -> Result<usize, EncodeError> {
        match self {
            Self::BuiltIn(cutter) => cutter.put_header(length(payload), envelope)?,
            Self::Shaped(shaped) => shaped.wrap(payload, envelope)?,
            Self::Custom(custom) => return custom.wrap(payload, envelope, buffers),
        }
        Ok(envelope.len())
    }

    /// Appends one frame to `out`, whose payload `write` appends. Returns the payload's length.
    /// Leaves `out` as it was after an error or a panic.
    pub(in crate::proto) fn encode_with(
        &mut self,
        write: impl FnOnce(&mut FrameBuf<'_>) -> Result<(), FrameError>,
        out: &mut Vec<u8>,
        buffers: &mut Buffers,
    ) -> Result<usize, EncodeError> {
        let keep = out.len();
        let mut undo = Undo { out, keep };
        let space = match self {
            Self::BuiltIn(cutter) => cutter.header(),
            Self::Shaped(_) | Self::Custom(_) => 0,
        };
        let start = keep + space;
        undo.out.resize(start, 0);
        write(&mut FrameBuf::new(undo.out, usize::MAX)).map_err(EncodeError::Refused)?;
        let length = undo.out.len() - start;
        match self {
            Self::BuiltIn(cutter) => {
                let mut header = [0; MAX_HEADER];
                let header = cutter.header_of(length, &mut header)?;
                if let Some(space) = undo.out.get_mut(keep..start) {
                    space.copy_from_slice(header);
                }
            }
            Self::Shaped(shaped) => shaped.wrap_tail(undo.out, keep)?,
            Self::Custom(custom) => custom.wrap_tail(undo.out, keep, buffers)?,
        }
        undo.keep = undo.out.len();
        Ok(length)
    }
}

impl Cutter {
    #[inline(always)]
    fn encode(&mut self, payload: &[u8], out: &mut Vec<u8>) -> Result<(), EncodeError> {
        out.reserve(MAX_HEADER + payload.len());
        self.put_header(payload.len(), out)?;
        out.extend_from_slice(payload);
        Ok(())
    }

    /// Returns the length of a header.
    fn header(self) -> usize {
        match self.kind {
            Kind::Packet(Width::One) => 1,
            Kind::Packet(Width::Two) => 2,
            Kind::Packet(Width::Four) => 4,
            Kind::Raw | Kind::Delimited(_) => 0,
        }
    }

    /// Puts the header of a payload of `length` bytes into `header`.
    fn header_of(self, length: usize, header: &mut [u8; MAX_HEADER]) -> Result<&[u8], EncodeError> {
        let Kind::Packet(width) = self.kind else {
            return Ok(&[]);
        };
        let max = width.limit();
        if length > max {
            return Err(EncodeError::TooLarge { length, max });
        }
        // The length fits in the header.
        *header = (length as u32).to_be_bytes();
        Ok(header.get(MAX_HEADER - self.header()..).unwrap_or_default())
    }

    /// Appends the header of a payload of `length` bytes, unless the payload is too long.
    #[inline]
    fn put_header(self, length: usize, out: &mut Vec<u8>) -> Result<(), EncodeError> {
        let Kind::Packet(width) = self.kind else {
            return Ok(());
        };
        let max = width.limit();
        if length > max {
            return Err(EncodeError::TooLarge { length, max });
        }
        // The length fits in the header.
        match width {
            Width::One => out.push(length as u8),
            Width::Two => out.extend_from_slice(&(length as u16).to_be_bytes()),
            Width::Four => out.extend_from_slice(&(length as u32).to_be_bytes()),
        }
        Ok(())
    }
}

/// Removes what was appended before an error or a panic.
struct Undo<'a> {
    out: &'a mut Vec<u8>,
    keep: usize,
}

impl Drop for Undo<'_> {
    fn drop(&mut self) {
        self.out.truncate(self.keep);
    }
}

impl Custom {
    #[inline]
    fn encode(&mut self, payload: &[u8], out: &mut Vec<u8>) -> Result<(), EncodeError> {
        let keep = out.len();
        let mut undo = Undo { out, keep };
        let encoded = self.framer.encode(payload, undo.out);
        encoded.map_err(EncodeError::Refused)?;
        undo.keep = undo.out.len();
        Ok(())
    }

    fn pack(&mut self, payload: &[&[u8]], out: &mut Vec<u8>) -> Result<bool, EncodeError> {
        let packed = self
            .framer
            .pack(payload, &mut FrameBuf::new(out, usize::MAX));
        packed.map_err(EncodeError::Refused)
    }

    fn put_header(&mut self, length: usize, out: &mut Vec<u8>) -> Result<(), EncodeError> {
        let put = self
            .framer
            .header(length, &mut FrameBuf::new(out, usize::MAX));
        put.map_err(EncodeError::Refused)
    }

    /// Makes a frame of the payload at the end of `out`, which begins at `start`.
    fn wrap_tail(
        &mut self,
        out: &mut Vec<u8>,
        start: usize,
        buffers: &mut Buffers,
    ) -> Result<(), EncodeError> {
        let mut packed = buffers.take();
        let payload = out.get(start..).unwrap_or_default();
        if self.pack(&[payload], &mut packed)? {
            out.truncate(start);
            out.extend_from_slice(&packed);
        }
        buffers.give(packed);
        let framed = self.framer.surround(out, start);
        framed.map_err(EncodeError::Refused)
    }

    fn wrap(
        &mut self,
        payload: &mut [Chunk<'_>],
        envelope: &mut Vec<u8>,
        buffers: &mut Buffers,
    ) -> Result<usize, EncodeError> {
        let mut packed = buffers.take();
        let mut parts = [&[][..]; MAX_PARTS];
        for (part, chunk) in parts.iter_mut().zip(&*payload) {
            *part = chunk.bytes();
        }
        let parts = parts.get(..payload.len()).unwrap_or_default();
        if self.pack(parts, &mut packed)? {
            payload.fill_with(|| Chunk::Borrowed(&[]));
            if let Some(first) = payload.first_mut() {
                *first = Chunk::Owned(packed);
            }
        } else {
            buffers.give(packed);
        }
        self.put_header(length(payload), envelope)?;
        let header = envelope.len();
        self.framer
            .trailer(&mut FrameBuf::new(envelope, usize::MAX));
        Ok(header)
    }
}
