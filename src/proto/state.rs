//! The vocabulary of one connection: states, limits, facts, events.

use std::error::Error as StdError;
use std::fmt;

use super::framing::FrameError;
use crate::reason::Closed;

/// The state of a connection.
///
/// ```text
/// Accepting ---+--> Handshaking ----> Open ----> Closing ----> (gone: one CloseReason)
///              |        |  ^           |           ^
/// Connecting --+        |  +-start_tls-+           |
///              +--------+--------------------------+
/// ```
///
/// An accepted connection begins in the first row, an outgoing one
/// ([`Control::connect`](crate::Control::connect)) in the second.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum State {
    /// Accepted: the PROXY header, if one is expected, or the service's answer is awaited.
    Accepting,
    /// Outgoing: an attempt to connect is under way, or scheduled.
    Connecting,
    /// In a TLS handshake: of a TLS listener, of an outgoing connection over TLS, or after
    /// `Conn::start_tls`.
    Handshaking,
    /// Frames are exchanged.
    Open,
    /// Output is flushed, close_notify and FIN are sent, and the peer's FIN is awaited.
    Closing,
}

impl State {
    /// All states.
    #[cfg(any(test, feature = "sim"))]
    pub const ALL: &'static [Self] = &[
        Self::Accepting,
        Self::Connecting,
        Self::Handshaking,
        Self::Open,
        Self::Closing,
    ];

    /// Returns whether `next` may follow this state.
    #[cfg(feature = "sim")]
    pub const fn may_become(self, next: Self) -> bool {
        self.leads_to(next)
    }

    pub(crate) const fn leads_to(self, next: Self) -> bool {
        matches!(
            (self, next),
            (
                Self::Accepting | Self::Connecting,
                Self::Handshaking | Self::Open | Self::Closing
            ) | (Self::Handshaking, Self::Open | Self::Closing)
                | (Self::Open, Self::Handshaking | Self::Closing)
        )
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// Numbers of bytes and frames. Bytes are those on the wire: ciphertext over TLS.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Traffic {
    /// Bytes read from the peer.
    pub bytes_in: u64,
    /// Bytes that the kernel took for the peer.
    pub bytes_out: u64,
    /// Frames delivered to the handler.
    pub frames_in: u64,
    /// Frames accepted by `send`.
    pub frames_out: u64,
}

impl Traffic {
    pub(crate) fn add(&mut self, other: &Self) {
        self.bytes_in += other.bytes_in;
        self.bytes_out += other.bytes_out;
        self.frames_in += other.frames_in;
        self.frames_out += other.frames_out;
    }

    /// Returns what was counted after `before`.
    pub(crate) fn since(&self, before: &Self) -> Self {
        Self {
            bytes_in: self.bytes_in.saturating_sub(before.bytes_in),
            bytes_out: self.bytes_out.saturating_sub(before.bytes_out),
            frames_in: self.frames_in.saturating_sub(before.frames_in),
            frames_out: self.frames_out.saturating_sub(before.frames_out),
        }
    }
}

/// Why [`Conn::send`](crate::Conn::send) did not queue a frame. No part of it was queued.
#[derive(Debug)]
#[non_exhaustive]
pub enum SendError {
    /// The connection is closing or gone, or leaves the loop, or
    /// [`Conn::finish`](crate::Conn::finish) was called. Or an accepted connection is not open yet.
    Closed,
    /// The peer is too slow: its pending output has reached the output limit. Wait for
    /// [`Handler::on_writable`](crate::Handler::on_writable), or close.
    Full {
        /// Number of pending bytes.
        queued: usize,
        /// The connection's output limit.
        limit: usize,
    },
    /// The payload is longer than the framing's header can announce.
    FrameTooLarge {
        /// The payload's length.
        length: usize,
        /// The longest payload that can be sent.
        max: usize,
    },
    /// The framing refused the payload: the connection's [`Framer`](crate::Framer), or a fixed length
    /// or length field that the payload does not fit.
    Refused(FrameError),
}

impl fmt::Display for SendError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Closed => f.write_str("the connection is closing"),
            Self::Full { queued, limit } => {
                write!(
                    f,
                    "{queued} bytes wait already, the output limit is {limit}"
                )
            }
            Self::FrameTooLarge { length, max } => {
                write!(
                    f,
                    "a frame of {length} bytes cannot be sent, the framing's maximum is {max}"
                )
            }
            Self::Refused(error) => write!(f, "the framing refused the frame: {error}"),
        }
    }
}

impl StdError for SendError {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        match self {
            Self::Refused(error) => Some(error),
            _ => None,
        }
    }
}

/// The next event for the handler.
#[derive(Debug)]
pub(crate) enum Event<'a> {
    /// The PROXY header is complete, or there is none: ask the service, then call
    /// [`Machine::handle_admitted`](super::Machine::handle_admitted).
    Header,
    Opened,
    /// An upgrade's handshake is over.
    Secured,
    Frame(&'a [u8]),
    /// A frame that the framer has transformed. Its memory belongs to the pool.
    Unpacked(Vec<u8>),
    /// No frame can be made of the input: call the handler, then close with this reason.
    BadInput(Closed),
    /// The peer finished sending, at the end of a frame.
    Finished,
    /// Pending output fell from above the high watermark to the low one.
    Writable,
    /// What was sent before it was asked for has left to the kernel.
    Flushed,
    Timer(u8),
    Drain,
}

/// What the socket needs besides reading and writing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NextStep {
    /// Nothing.
    Wait,
    /// Everything is flushed: shut the writing half down, then call
    /// [`Machine::handle_shutdown`](super::Machine::handle_shutdown).
    Shutdown,
    /// The connection is over: close the socket, with RST if `reset`.
    Gone { reset: bool },
}
