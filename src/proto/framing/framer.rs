//! What the user chooses: a built-in framing, or one of their own.

use std::any::Any;
use std::error::Error as StdError;
use std::fmt;
use std::io::{self, Write};
use std::ops::Range;
use std::str::FromStr;
use std::sync::Arc;

use crate::error::Error;
use crate::escape::Escaped;

/// How a byte stream is cut into frames.
#[derive(Clone, Default)]
#[non_exhaustive]
pub enum Framing {
    /// No frames: the handler gets the bytes as they arrive, in pieces of any size, never empty.
    Raw,
    /// One length byte. Payloads of 0 to 255 bytes.
    Packet1,
    /// Two length bytes, big-endian. Payloads of 0 to 65,535 bytes.
    #[default]
    Packet2,
    /// Four length bytes, big-endian. Payloads up to the maximum, 8 MiB by default.
    Packet4,
    /// Lines up to and including `\n`. The delimiter stays in a received frame, and `send` does
    /// *not* add it.
    Line,
    /// As [`Framing::Line`], with another delimiter.
    Delimited(u8),
    /// Frames of this length, at least 1 byte, without a header. `send` refuses another length.
    Fixed(u32),
    /// A length in the header. Netty's `LengthFieldBasedFrameDecoder` and tokio's
    /// `length_delimited` have the same parameters.
    ///
    /// A frame has `offset + width + value + adjustment` bytes. A value that makes less than
    /// `offset + width` of it closes the connection as
    /// [`BadFrame`](crate::CloseReason::BadFrame). The maximum is 8 MiB by default.
    ///
    /// With an `offset` of 0 the payload is what follows the length, and `send` puts the length in
    /// front of it, as with packet-N. With bytes in front of the length, the payload is the whole
    /// frame in both directions; `send` refuses a frame whose length field is wrong.
    ///
    /// ```
    /// use portcullis::Framing;
    ///
    /// // MySQL: three bytes, and a sequence number that the length does not count.
    /// let mysql = Framing::LengthField { offset: 0, width: 3, little_endian: true, adjustment: 1 };
    /// // DNS over TCP, as packet-2.
    /// let dns = Framing::LengthField { offset: 0, width: 2, little_endian: false, adjustment: 0 };
    /// // TLV: a type of one byte, then a length that counts type, length and value.
    /// let tlv = Framing::LengthField { offset: 1, width: 2, little_endian: false, adjustment: -3 };
    /// # let _ = (mysql, dns, tlv);
    /// ```
    LengthField {
        /// Number of bytes in front of the length.
        offset: u8,
        /// Number of bytes of the length: 1, 2, 3, 4 or 8.
        width: u8,
        /// Whether the least significant byte comes first.
        little_endian: bool,
        /// Number of bytes behind the length that its value does not count. Negative where it
        /// counts the header, or a part of the header.
        adjustment: i16,
    },
    /// Your own framing, with a function that makes a [`Framer`] for each connection:
    /// [`Framing::custom`].
    Custom(Arc<MakeFramer>),
}

pub(super) type MakeFramer = dyn Fn() -> Box<dyn AnyFramer> + Send + Sync;

/// A framer whose type can be found out again.
pub trait AnyFramer: Framer {
    fn as_any(&mut self) -> &mut dyn Any;

    /// Appends a frame to `out`, in one call for each type: most leave out what they do not need.
    fn encode(&mut self, payload: &[u8], out: &mut Vec<u8>) -> Result<(), FrameError>;

    /// Puts header and trailer around the payload at the end of `out`, which begins at `start`.
    fn surround(&mut self, out: &mut Vec<u8>, start: usize) -> Result<(), FrameError>;
}

impl<F: Framer + 'static> AnyFramer for F {
    fn as_any(&mut self) -> &mut dyn Any {
        self
    }

    fn encode(&mut self, payload: &[u8], out: &mut Vec<u8>) -> Result<(), FrameError> {
        let start = out.len();
        if self.pack(&[payload], &mut FrameBuf::new(out, usize::MAX))? {
            return self.surround(out, start);
        }
        out.truncate(start);
        self.header(payload.len(), &mut FrameBuf::new(out, usize::MAX))?;
        out.extend_from_slice(payload);
        self.trailer(&mut FrameBuf::new(out, usize::MAX));
        Ok(())
    }

    fn surround(&mut self, out: &mut Vec<u8>, start: usize) -> Result<(), FrameError> {
        let end = out.len();
        self.header(end - start, &mut FrameBuf::new(out, usize::MAX))?;
        let header = out.len() - end;
        if let Some(frame) = out.get_mut(start..) {
            frame.rotate_right(header);
        }
        self.trailer(&mut FrameBuf::new(out, usize::MAX));
        Ok(())
    }
}

impl Framing {
    /// Frames by your own rule: `make` is called once per connection, and for each
    /// [`Conn::set_framing`](crate::Conn::set_framing).
    ///
    /// ```
    /// use std::io::Write;
    /// use portcullis::{Decoded, FrameError, FrameBuf, Framer, Framing};
    ///
    /// /// Netstrings: `5:hello,`.
    /// struct Netstring;
    /// impl Framer for Netstring {
    ///     fn decode(&mut self, input: &[u8]) -> Result<Decoded, FrameError> {
    ///         let Some(colon) = input.iter().take(9).position(|&b| b == b':') else {
    ///             return if input.len() >= 9 {
    ///                 Err(FrameError::new("no length"))
    ///             } else {
    ///                 Ok(Decoded::More)
    ///             };
    ///         };
    ///         let length: usize = std::str::from_utf8(&input[..colon])
    ///             .ok().and_then(|digits| digits.parse().ok())
    ///             .ok_or_else(|| FrameError::new("bad length"))?;
    ///         let payload = colon + 1..colon + 1 + length;
    ///         match input.get(payload.end) {
    ///             None => Ok(Decoded::Need(payload.end + 1)),
    ///             Some(b',') => Ok(Decoded::Frame { consumed: payload.end + 1, payload }),
    ///             Some(_) => Err(FrameError::new("no comma")),
    ///         }
    ///     }
    ///     fn header(&mut self, length: usize, out: &mut FrameBuf<'_>) -> Result<(), FrameError> {
    ///         write!(out, "{length}:").map_err(FrameError::new)
    ///     }
    ///     fn trailer(&mut self, out: &mut FrameBuf<'_>) {
    ///         out.put(b",");
    ///     }
    /// }
    /// let framing = Framing::custom(|| Netstring);
    /// # let _ = framing;
    /// ```
    pub fn custom<F, M>(make: M) -> Self
    where
        F: Framer + 'static,
        M: Fn() -> F + Send + Sync + 'static,
    {
        Self::Custom(Arc::new(move || Box::new(make())))
    }
}

impl fmt::Debug for Framing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Raw => f.write_str("raw"),
            Self::Packet1 => f.write_str("packet-1"),
            Self::Packet2 => f.write_str("packet-2"),
            Self::Packet4 => f.write_str("packet-4"),
            Self::Line => f.write_str("line"),
            Self::Delimited(byte) => write!(f, "delimited by {byte:#04x}"),
            Self::Fixed(length) => write!(f, "fixed {length}"),
            Self::LengthField {
                offset,
                width,
                little_endian,
                adjustment,
            } => {
                let order = if *little_endian { "le" } else { "be" };
                write!(f, "length-field {offset} {width} {order} {adjustment}")
            }
            Self::Custom(_) => f.write_str("custom"),
        }
    }
}

/// Reads a built-in framing by its name: `raw`, `packet-1`, `packet-2`, `packet-4`, `line`,
/// `delimited by 0x00` with the byte in hexadecimal, `fixed 16`, or `length-field 0 2 be 0` with
/// offset, width, byte order (`be` or `le`) and adjustment.
impl FromStr for Framing {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        Ok(match name {
            "raw" => Self::Raw,
            "packet-1" => Self::Packet1,
            "packet-2" => Self::Packet2,
            "packet-4" => Self::Packet4,
            "line" => Self::Line,
            _ => {
                let framing = parse(name).filter(|framing| framing.check(None).is_ok());
                framing.ok_or_else(|| {
                    let names = "raw, packet-1, packet-2, packet-4, line, delimited by 0x00, \
                                 fixed 16, length-field 0 2 be 0";
                    Error::option("framing", format!("{name:?} is none of {names}"))
                })?
            }
        })
    }
}

/// Reads the name of a framing with parameters.
fn parse(name: &str) -> Option<Framing> {
    if let Some(byte) = name.strip_prefix("delimited by 0x") {
        return u8::from_str_radix(byte, 16).ok().map(Framing::Delimited);
    }
    if let Some(length) = name.strip_prefix("fixed ") {
        return length.parse().ok().map(Framing::Fixed);
    }
    let mut words = name.strip_prefix("length-field ")?.split(' ');
    let framing = Framing::LengthField {
        offset: words.next()?.parse().ok()?,
        width: words.next()?.parse().ok()?,
        little_endian: match words.next()? {
            "le" => true,
            "be" => false,
            _ => return None,
        },
        adjustment: words.next()?.parse().ok()?,
    };
    words.next().is_none().then_some(framing)
}

/// The result of [`Framer::decode`]: the front of the input.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decoded {
    /// A whole frame. `consumed` is the length of its header, payload and trailer together.
    ///
    /// A frame that consumes nothing, or that is outside the input, closes the connection as
    /// [`BadFrame`](crate::CloseReason::BadFrame). Bytes between two frames, such as the fill of
    /// HDLC, are a frame with an empty payload, which the handler ignores.
    Frame {
        /// The bytes that the handler gets, as a range of the input.
        payload: Range<usize>,
        /// Number of bytes of the input that the frame takes, at least 1.
        consumed: usize,
    },
    /// A whole frame whose payload is yet to be transformed: [`Framer::unpack`] makes what the
    /// handler gets of it. The rules of [`Decoded::Frame`] apply.
    ///
    /// The maximum frame limits the result, and with 16 bytes more it limits `consumed`. So where
    /// escapes make frames longer (SLIP: up to twice), set
    /// [`ConnConfig::max_frame`](crate::ConnConfig::max_frame) to the longest escaped frame, and
    /// check the length of the result in [`Framer::unpack`].
    Packed {
        /// The bytes that [`Framer::unpack`] gets, as a range of the input.
        payload: Range<usize>,
        /// Number of bytes of the input that the frame takes, at least 1.
        consumed: usize,
    },
    /// No whole frame yet: call again when more bytes have arrived.
    More,
    /// No whole frame yet: call again when the input is at least this long.
    Need(usize),
}

/// A framing of your own: a frame and its length, *more*, or an error.
///
/// Each connection has its own value, which may keep state. It can keep what it has parsed of a
/// frame, too: [`Conn::framer`](crate::Conn::framer) lends it to the handler. The input always
/// begins at a frame's first byte, and may hold many frames. After [`Decoded::More`] and
/// [`Decoded::Need`] it begins with the same bytes again, so that a framer may note how far it has
/// scanned. It is at most the maximum frame
/// ([`ConnConfig::max_frame`](crate::ConnConfig::max_frame)), 16 bytes for header and trailer, and
/// one read of 64 KiB. Over TLS a record of 16 KiB comes on top. Bytes that were received under a
/// larger maximum, of another framing too, may be more. A payload above the maximum, or a frame
/// above the maximum and 16 bytes, closes the connection as
/// [`FrameTooLarge`](crate::CloseReason::FrameTooLarge).
pub trait Framer {
    /// Looks for one frame at the front of `input`, which is never empty.
    ///
    /// # Errors
    ///
    /// An error closes the connection as [`BadFrame`](crate::CloseReason::BadFrame), after a call of
    /// [`Handler::on_bad_input`](crate::Handler::on_bad_input); frames before it are delivered. The
    /// framer gets no more input.
    fn decode(&mut self, input: &[u8]) -> Result<Decoded, FrameError>;

    /// Transforms the payload of a [`Decoded::Packed`] frame and appends it to `out`: unmasks,
    /// unescapes, decompresses. The default appends the payload as it is.
    ///
    /// `out` has room for the maximum frame. More than that closes the connection as
    /// [`FrameTooLarge`](crate::CloseReason::FrameTooLarge); [`FrameBuf::room`] says how much is
    /// left, so that a decompressor can stop.
    ///
    /// # Errors
    ///
    /// As those of [`Framer::decode`].
    fn unpack(&mut self, payload: &[u8], out: &mut FrameBuf<'_>) -> Result<(), FrameError> {
        out.put(payload);
        Ok(())
    }

    /// Transforms the payload of a frame that is sent: compresses, masks or escapes it. Appends the
    /// result to `out` and returns true; the result then takes the payload's place. By default, and
    /// wherever it returns false, the payload goes out as it is, and a large one without a copy.
    ///
    /// `payload` is in the parts in which it was sent ([`Payload`](crate::Payload)), one to four.
    ///
    /// # Errors
    ///
    /// As for [`Framer::header`].
    fn pack(&mut self, _payload: &[&[u8]], _out: &mut FrameBuf<'_>) -> Result<bool, FrameError> {
        Ok(false)
    }

    /// Appends the header of a frame that is sent, whose payload has `length` bytes behind
    /// [`Framer::pack`]. By default there is none.
    ///
    /// # Errors
    ///
    /// An error reaches the caller of `send`, as [`SendError::Refused`](crate::SendError::Refused),
    /// and nothing of the frame is sent.
    fn header(&mut self, _length: usize, _out: &mut FrameBuf<'_>) -> Result<(), FrameError> {
        Ok(())
    }

    /// Appends what follows the payload of the frame whose header was the last. By default there is
    /// nothing.
    fn trailer(&mut self, _out: &mut FrameBuf<'_>) {}
}

/// Bytes of a frame, append only: for a [`Framer`], and for
/// [`Conn::send_with`](crate::Conn::send_with).
#[derive(Debug)]
pub struct FrameBuf<'a> {
    pub(super) bytes: &'a mut Vec<u8>,
    /// The most that `bytes` may have; 0 once there was more.
    end: usize,
}

impl<'a> FrameBuf<'a> {
    /// `room`: how many bytes can be appended, at least 1.
    pub(in crate::proto) fn new(bytes: &'a mut Vec<u8>, room: usize) -> Self {
        let end = bytes.len().saturating_add(room);
        Self { bytes, end }
    }

    /// Appends `bytes`. Bytes for which there is no room are dropped, and the frame is too large.
    #[inline]
    pub fn put(&mut self, bytes: &[u8]) {
        if bytes.len() <= self.room() && self.end > 0 {
            self.bytes.extend_from_slice(bytes);
        } else {
            self.end = 0;
        }
    }

    /// Returns how many bytes can still be appended: up to the maximum frame in
    /// [`Framer::unpack`], without a limit where a frame is sent.
    #[inline]
    pub fn room(&self) -> usize {
        self.end.saturating_sub(self.bytes.len())
    }

    /// True if more was appended than there was room for.
    pub(super) fn is_over(&self) -> bool {
        self.end == 0
    }
}

/// Never fails.
impl Write for FrameBuf<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.put(bytes);
        Ok(bytes.len())
    }

    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.put(bytes);
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Why a [`Framer`] refuses bytes.
#[derive(Debug)]
#[must_use]
pub struct FrameError(Box<dyn StdError + Send + Sync>);

impl FrameError {
    /// Makes an error from a text, or from the error that caused it.
    pub fn new(cause: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        Self(cause.into())
    }

    /// Returns the cause: `error.get_ref().downcast_ref::<BadChecksum>()`.
    ///
    /// A `FrameError` is the [`Closed::error`](crate::Closed::error) of a connection that closed as
    /// [`BadFrame`](crate::CloseReason::BadFrame).
    pub fn get_ref(&self) -> &(dyn StdError + Send + Sync + 'static) {
        &*self.0
    }
}

/// The text of the cause, with control characters escaped: it may contain bytes of the peer.
impl fmt::Display for FrameError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Escaped::new(&self.0).fmt(f)
    }
}

impl StdError for FrameError {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.0.source()
    }
}
