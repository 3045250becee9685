//! Where one frame ends and the next begins: raw, packet-1, packet-2, packet-4, line, fixed, a length
//! field, and your own.
//!
//! The first five mean exactly what Erlang's `{packet, N}` and `{packet, line}` mean
//! (`erlang:decode_packet/3`), except that every one has a maximum and that a frame too long to
//! send is an error instead of a wrapped length.

mod codec;
mod custom;
mod framer;
mod length_field;
mod step;

pub(super) use codec::Codec;
pub use framer::{Decoded, FrameBuf, FrameError, Framer, Framing};
pub(super) use step::{EncodeError, Step};

#[cfg(all(test, feature = "sim"))]
mod tests;
