//! Where one frame ends and the next begins: raw, packet-1, packet-2, packet-4, line, and your own.
//!
//! The built-in framings mean exactly what Erlang's `{packet, N}` and `{packet, line}` mean
//! (`erlang:decode_packet/3`), except that every one has a maximum and that a frame too long to
//! send is an error instead of a wrapped length.

mod codec;
mod framer;

pub(super) use codec::{Codec, EncodeError, Step};
pub use framer::{Decoded, FrameBuf, FrameError, Framer, Framing};

#[cfg(test)]
mod tests;
