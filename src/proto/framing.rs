//! Where one frame ends and the next begins: raw, packet-1, packet-2, packet-4, line, and your own.
//!
//! The built-in framings mean exactly what Erlang's `{packet, N}` and `{packet, line}` mean
//! (`erlang:decode_packet/3`), except that every one has a maximum and that a frame too long to send
//! is an error instead of a wrapped length.

use std::error::Error as StdError;
use std::fmt;
use std::io::BufRead;
use std::ops::Range;
use std::sync::Arc;

/// The largest payload a packet-4 header may announce, as in Erlang/OTP: header and payload fit in 31 bits.
const PACKET4_LIMIT: usize = 0x7FFF_FFFB;
/// Of packet-4.
const MAX_HEADER: usize = 4;

/// How a byte stream is cut into frames.
#[derive(Clone, Default)]
#[non_exhaustive]
pub enum Framing {
    /// No frames: the handler gets the bytes as they come, in pieces of any size, never empty.
    Raw,
    /// One length byte. Payloads of 0 to 255 bytes.
    Packet1,
    /// Two length bytes, big-endian. Payloads of 0 to 65 535 bytes.
    #[default]
    Packet2,
    /// Four length bytes, big-endian. Payloads up to the maximum, 8 MiB by default.
    Packet4,
    /// Lines up to and including `\n`. The delimiter stays in the frame and is *not* added by `send`.
    Line,
    /// As [`Framing::Line`], with another delimiter.
    Delimited(u8),
    /// Your own: see [`Framing::custom`].
    Custom(FramerFactory),
}

/// Makes a [`Framer`] for each connection; built by [`Framing::custom`].
#[derive(Clone)]
pub struct FramerFactory(Arc<dyn Fn() -> Box<dyn Framer> + Send + Sync>);

impl Framing {
    /// Your own framing: `make` is called once per connection.
    ///
    /// ```
    /// use portcullis::{Decoded, FrameError, FrameBuf, Framer, Framing};
    ///
    /// /// Netstrings: `5:hello,`.
    /// struct Netstring;
    /// impl Framer for Netstring {
    ///     fn decode(&mut self, input: &[u8]) -> Result<Decoded, FrameError> {
    ///         let Some(colon) = input.iter().take(9).position(|&b| b == b':') else {
    ///             return if input.len() >= 9 { Err(FrameError::new("no length")) } else { Ok(Decoded::More) };
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
    ///     fn encode(&mut self, payload: &[u8], out: &mut FrameBuf<'_>) -> Result<(), FrameError> {
    ///         out.put(format!("{}:", payload.len()).as_bytes());
    ///         out.put(payload);
    ///         out.put(b",");
    ///         Ok(())
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
        Self::Custom(FramerFactory(Arc::new(move || Box::new(make()))))
    }

    /// The maximum payload where the listener sets none: 8 MiB for packet-4, what the header can
    /// say for packet-1 and packet-2, 64 KiB for the others (lines count their delimiter).
    pub(crate) fn default_max(&self) -> usize {
        match self {
            Self::Packet1 => 0xFF,
            Self::Packet2 => 0xFFFF,
            Self::Packet4 => 8 * 1024 * 1024,
            Self::Raw | Self::Line | Self::Delimited(_) | Self::Custom(_) => 64 * 1024,
        }
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
            Self::Custom(_) => f.write_str("custom"),
        }
    }
}

impl fmt::Debug for FramerFactory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("FramerFactory")
    }
}

/// What [`Framer::decode`] found at the front of the input.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decoded {
    /// A whole frame. `payload` is its range in the input, `consumed` what header, payload and trailer take together.
    ///
    /// A frame that consumes nothing, or that lies outside the input, closes the connection as
    /// [`BadFrame`](crate::CloseReason::BadFrame).
    Frame {
        /// The bytes the handler gets, as a range of the input.
        payload: Range<usize>,
        /// How many bytes of the input the frame takes, at least 1.
        consumed: usize,
    },
    /// Not a whole frame yet; ask again when more bytes are there.
    More,
    /// Not a whole frame yet; ask again when the input is at least this long.
    Need(usize),
}

/// A framing of your own: the three answers of UBF's codecs, *done and rest*, *more*, or an error.
///
/// One value per connection, so it may keep state. The input always begins at a frame's first byte
/// and never grows beyond the listener's maximum frame (its own header included, with 16 bytes to spare):
/// what is longer closes the connection as [`FrameTooLarge`](crate::CloseReason::FrameTooLarge).
pub trait Framer {
    /// Looks for one frame at the front of `input`, which is never empty.
    ///
    /// # Errors
    ///
    /// The connection closes as [`BadFrame`](crate::CloseReason::BadFrame) with this error; frames before it were delivered.
    fn decode(&mut self, input: &[u8]) -> Result<Decoded, FrameError>;

    /// Appends one frame with this payload to `out`. Nothing of it is sent if this returns an error.
    ///
    /// # Errors
    ///
    /// Reaches the caller of `send`.
    fn encode(&mut self, payload: &[u8], out: &mut FrameBuf<'_>) -> Result<(), FrameError>;
}

/// Where [`Framer::encode`] puts its bytes: append only.
#[derive(Debug)]
pub struct FrameBuf<'a>(&'a mut Vec<u8>);

impl FrameBuf<'_> {
    /// Appends `bytes`.
    pub fn put(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }
}

/// Why a [`Framer`] refuses bytes.
#[derive(Debug)]
#[must_use]
pub struct FrameError(Box<dyn StdError + Send + Sync>);

impl FrameError {
    /// An error with these words, or with this error as its cause.
    pub fn new(cause: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        Self(cause.into())
    }

    /// The cause, to be told from others: `error.get_ref().downcast_ref::<BadChecksum>()`. As that of
    /// [`BadFrame`](crate::CloseReason::BadFrame) a `FrameError` is the [`Closed::error`](crate::Closed::error).
    pub fn get_ref(&self) -> &(dyn StdError + Send + Sync + 'static) {
        &*self.0
    }
}

impl fmt::Display for FrameError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl StdError for FrameError {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.0.source()
    }
}

/// What the decoder makes of the front of its input.
#[derive(Debug)]
pub(super) enum Step {
    Frame { payload: Range<usize>, consumed: usize },
    More,
    TooLarge,
    Bad(FrameError),
}

/// Why a frame cannot be encoded.
#[derive(Debug)]
pub(super) enum EncodeError {
    TooLarge { max: usize },
    Refused(FrameError),
}

/// The framing of one connection, with what it remembers between two looks at an incomplete frame. One is held for each
/// connection, so it is small: what a frame's length is compared with fits in 32 bits.
pub(super) enum Codec {
    BuiltIn(Cutter),
    Custom(Box<Custom>),
}

#[derive(Clone, Copy)]
pub(super) struct Cutter {
    kind: Kind,
    /// Saturated: a longer frame is too large anyway.
    max: u32,
    /// For lines, how far the delimiter was looked for.
    seen: u32,
}

/// The user's.
pub(super) struct Custom {
    framer: Box<dyn Framer>,
    max: usize,
    /// Input shorter than this holds no whole frame.
    seen: usize,
}

#[derive(Clone, Copy)]
enum Kind {
    Raw,
    Packet(Width),
    Delimited(u8),
}

#[derive(Clone, Copy)]
enum Width {
    One,
    Two,
    Four,
}

impl Width {
    /// The largest payload that the header can announce.
    const fn limit(self) -> usize {
        match self {
            Self::One => 0xFF,
            Self::Two => 0xFFFF,
            Self::Four => PACKET4_LIMIT,
        }
    }

    /// The length that the header says, and what is behind the header.
    #[inline]
    fn split(self, input: &[u8]) -> Option<(usize, &[u8])> {
        Some(match (self, input) {
            (Self::One, [a, behind @ ..]) => (usize::from(*a), behind),
            (Self::Two, [a, b, behind @ ..]) => (usize::from(u16::from_be_bytes([*a, *b])), behind),
            (Self::Four, [a, b, c, d, behind @ ..]) => {
                let length = usize::try_from(u32::from_be_bytes([*a, *b, *c, *d]));
                // What Erlang does not send is larger than any maximum.
                (
                    length
                        .ok()
                        .filter(|&length| length <= PACKET4_LIMIT)
                        .unwrap_or(usize::MAX),
                    behind,
                )
            }
            _ => return None,
        })
    }
}

impl Codec {
    pub(super) fn new(framing: &Framing, max: usize) -> Self {
        let kind = match framing {
            Framing::Raw => Kind::Raw,
            Framing::Packet1 => Kind::Packet(Width::One),
            Framing::Packet2 => Kind::Packet(Width::Two),
            Framing::Packet4 => Kind::Packet(Width::Four),
            Framing::Line => Kind::Delimited(b'\n'),
            Framing::Delimited(byte) => Kind::Delimited(*byte),
            Framing::Custom(factory) => {
                let framer = (factory.0)();
                return Self::Custom(Box::new(Custom { framer, max, seen: 0 }));
            }
        };
        Self::BuiltIn(Cutter {
            kind,
            max: saturated(max),
            seen: 0,
        })
    }

    /// Looks for one frame at the front of `input`, which is what the last call saw and possibly more,
    /// unless that call found a frame.
    #[inline]
    pub(super) fn decode(&mut self, input: &[u8]) -> Step {
        match self {
            Self::BuiltIn(cutter) => cutter.decode(input),
            Self::Custom(custom) => custom.decode(input),
        }
    }

    /// Takes one whole frame from the front of `input`: its payload, and what is behind it. None if there is none, or if the
    /// framing is the user's: [`Codec::decode`] says what there is.
    #[inline]
    pub(super) fn cut<'a>(&mut self, input: &'a [u8]) -> Option<(&'a [u8], &'a [u8])> {
        match self {
            Self::BuiltIn(cutter) => cutter.cut(input),
            Self::Custom(_) => None,
        }
    }

    /// Appends one frame to `out`, or leaves it as it was.
    #[inline]
    pub(super) fn encode(&mut self, payload: &[u8], out: &mut Vec<u8>) -> Result<(), EncodeError> {
        match self {
            Self::BuiltIn(cutter) => cutter.encode(payload, out),
            Self::Custom(custom) => custom.encode(payload, out),
        }
    }

    /// Puts what stands in front of a payload of this length into `out`. False if it cannot be sent, or if the framing is the
    /// user's: [`Codec::encode`] says why.
    pub(super) fn put_header(&self, length: usize, out: &mut Vec<u8>) -> bool {
        match self {
            Self::BuiltIn(cutter) => cutter.put_header(length, out).is_ok(),
            Self::Custom(_) => false,
        }
    }

    /// It is the user's code, which may panic.
    #[inline]
    pub(super) fn is_custom(&self) -> bool {
        matches!(self, Self::Custom(_))
    }

    /// Whether bytes can wait here for the rest of their frame.
    pub(super) fn has_frames(&self) -> bool {
        !matches!(self, Self::BuiltIn(Cutter { kind: Kind::Raw, .. }))
    }

    pub(super) fn max(&self) -> usize {
        match self {
            Self::BuiltIn(cutter) => cutter.max as usize,
            Self::Custom(custom) => custom.max,
        }
    }

    pub(super) fn set_max(&mut self, max: usize) {
        match self {
            Self::BuiltIn(cutter) => (cutter.max, cutter.seen) = (saturated(max), 0),
            Self::Custom(custom) => (custom.max, custom.seen) = (max, 0),
        }
    }

    fn seen(&self) -> usize {
        match self {
            Self::BuiltIn(cutter) => cutter.seen as usize,
            Self::Custom(custom) => custom.seen,
        }
    }

    /// A copy, unless the framer is the user's.
    #[cfg(feature = "sim")]
    pub(super) fn fork(&self) -> Option<Self> {
        match self {
            Self::BuiltIn(cutter) => Some(Self::BuiltIn(*cutter)),
            Self::Custom(_) => None,
        }
    }

    /// What it remembers besides its kind: the maximum, and how far it has seen.
    #[cfg(feature = "sim")]
    pub(super) fn memory(&self) -> (usize, usize) {
        (self.max(), self.seen())
    }
}

/// The place of the first `byte`. What the standard library has to find one fast is inside of this.
fn find(byte: u8, mut within: &[u8]) -> Option<usize> {
    let all = within;
    let until = within.skip_until(byte).ok()?;
    let last = until.checked_sub(1)?;
    (all.get(last) == Some(&byte)).then_some(last)
}

fn saturated(length: usize) -> u32 {
    u32::try_from(length).unwrap_or(u32::MAX)
}

impl Cutter {
    #[inline]
    fn decode(&mut self, input: &[u8]) -> Step {
        match self.cut(input) {
            // A payload ends where its frame does.
            Some((payload, behind)) => {
                let consumed = input.len() - behind.len();
                Step::Frame {
                    payload: consumed - payload.len()..consumed,
                    consumed,
                }
            }
            None if self.is_too_large(input) => Step::TooLarge,
            None => Step::More,
        }
    }

    #[inline]
    fn cut<'a>(&mut self, input: &'a [u8]) -> Option<(&'a [u8], &'a [u8])> {
        let max = self.max as usize;
        match self.kind {
            Kind::Packet(width) => {
                let (length, behind) = width.split(input)?;
                if length > max {
                    return None;
                }
                behind.split_at_checked(length)
            }
            Kind::Raw if input.is_empty() => None,
            Kind::Raw => Some((input, &[])),
            Kind::Delimited(byte) => {
                let seen = self.seen as usize;
                let window = input.get(seen..input.len().min(max)).unwrap_or_default();
                match find(byte, window) {
                    Some(at) => {
                        self.seen = 0;
                        input.split_at_checked(seen + at + 1)
                    }
                    None => {
                        self.seen = saturated(input.len());
                        None
                    }
                }
            }
        }
    }

    /// What begins with this, and is no whole frame, will never be one.
    #[cold]
    fn is_too_large(&self, input: &[u8]) -> bool {
        let max = self.max as usize;
        match self.kind {
            Kind::Packet(width) => width.split(input).is_some_and(|(length, _)| length > max),
            Kind::Raw => false,
            Kind::Delimited(_) => input.len() > max,
        }
    }

    #[inline]
    fn encode(&mut self, payload: &[u8], out: &mut Vec<u8>) -> Result<(), EncodeError> {
        out.reserve(MAX_HEADER + payload.len());
        self.put_header(payload.len(), out)?;
        out.extend_from_slice(payload);
        Ok(())
    }

    /// What stands in front of a payload of this length; nothing if it is too long.
    #[inline]
    fn put_header(self, length: usize, out: &mut Vec<u8>) -> Result<(), EncodeError> {
        let Kind::Packet(width) = self.kind else {
            return Ok(());
        };
        let max = width.limit();
        if length > max {
            return Err(EncodeError::TooLarge { max });
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

impl Custom {
    fn decode(&mut self, input: &[u8]) -> Step {
        if input.is_empty() || input.len() < self.seen {
            return Step::More;
        }
        let step = Self::ask(self.framer.as_mut(), input, self.max, &mut self.seen);
        if matches!(step, Step::Frame { .. }) {
            self.seen = 0;
        }
        step
    }

    fn ask(framer: &mut dyn Framer, input: &[u8], max: usize, seen: &mut usize) -> Step {
        /// Room for the header and trailer of a frame whose payload is at its maximum.
        const ENVELOPE: usize = 16;
        let most = max.saturating_add(ENVELOPE);
        match framer.decode(input) {
            Ok(Decoded::Frame { payload, consumed }) => {
                let inside = payload.start <= payload.end && payload.end <= consumed && consumed <= input.len();
                if consumed == 0 || !inside {
                    Step::Bad(FrameError::new(
                        "the framer reported a frame that is empty or outside its input",
                    ))
                } else if payload.len() > max || consumed > most {
                    // In pieces it would have been too long before it was whole.
                    Step::TooLarge
                } else {
                    Step::Frame { payload, consumed }
                }
            }
            Ok(Decoded::Need(total)) if total > most => Step::TooLarge,
            Ok(Decoded::More | Decoded::Need(_)) if input.len() > most => Step::TooLarge,
            Ok(Decoded::Need(total)) => {
                *seen = total;
                Step::More
            }
            Ok(Decoded::More) => Step::More,
            Err(error) => Step::Bad(error),
        }
    }

    fn encode(&mut self, payload: &[u8], out: &mut Vec<u8>) -> Result<(), EncodeError> {
        /// Takes back what a framer put before it failed or panicked.
        struct Undo<'a> {
            out: &'a mut Vec<u8>,
            keep: usize,
        }
        impl Drop for Undo<'_> {
            fn drop(&mut self) {
                self.out.truncate(self.keep);
            }
        }
        let keep = out.len();
        let mut undo = Undo { out, keep };
        self.framer
            .encode(payload, &mut FrameBuf(undo.out))
            .map_err(EncodeError::Refused)?;
        undo.keep = undo.out.len();
        Ok(())
    }
}

impl fmt::Debug for Codec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Codec")
            .field("max", &self.max())
            .field("seen", &self.seen())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
