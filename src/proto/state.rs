//! The vocabulary of one connection: states, limits, facts, events.

use std::error::Error as StdError;
use std::fmt;
use std::time::Duration;

use super::framing::FrameError;
use super::rates::Rate;

/// Where a connection is in its life.
///
/// ```text
/// Accepting ---+--> Handshaking ----> Open ----> Closing ----> (gone: one CloseReason)
///              |        |  ^           |           ^
/// Connecting --+        |  +-start_tls-+           |
///              +--------+--------------------------+
/// ```
///
/// A connection that was accepted begins in the first row, one that the server makes
/// ([`Server::connect`](crate::Server::connect)) in the second.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum State {
    /// Accepted; the PROXY header has not come yet, where there is to be one, or the service has not answered.
    Accepting,
    /// An outgoing connection that is not there yet: an attempt is under way, or waits for its time.
    Connecting,
    /// In the TLS handshake: the first thing on a TLS listener and on an outgoing connection over TLS, or after
    /// `Conn::start_tls`.
    Handshaking,
    /// Frames flow.
    Open,
    /// Flushing, saying goodbye, waiting for the peer's end.
    Closing,
}

impl State {
    /// All of them.
    pub const ALL: &'static [Self] = &[
        Self::Accepting,
        Self::Connecting,
        Self::Handshaking,
        Self::Open,
        Self::Closing,
    ];

    /// The legal transitions, all of them.
    pub const fn may_become(self, next: Self) -> bool {
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

/// The limits of one listener's connections, or of an outgoing one. `Duration::MAX` is never.
#[derive(Clone, Debug)]
pub(crate) struct Limits {
    pub(crate) handshake_timeout: Duration,
    pub(crate) frame_timeout: Duration,
    pub(crate) idle_timeout: Duration,
    pub(crate) write_timeout: Duration,
    pub(crate) linger_timeout: Duration,
    pub(crate) linger_bytes: usize,
    pub(crate) high_watermark: usize,
    pub(crate) low_watermark: usize,
    pub(crate) output_limit: usize,
    /// Reading goes on above the high watermark.
    pub(crate) full_duplex: bool,
    /// `None`: the framing's own default.
    pub(crate) max_frame: Option<usize>,
    /// Bytes per second of each connection.
    pub(crate) read_rate: Option<Rate>,
    /// Frames per second of each connection.
    pub(crate) frame_rate: Option<Rate>,
    /// Bytes per second of all of them together.
    pub(crate) total_read_rate: Option<Rate>,
    /// Frames per second of all of them together.
    pub(crate) total_frame_rate: Option<Rate>,
}

/// Bytes and frames that one connection carried. Bytes are those on the wire, ciphertext over TLS.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Traffic {
    /// Bytes read from the peer.
    pub bytes_in: u64,
    /// Bytes that the kernel took for the peer.
    pub bytes_out: u64,
    /// Frames given to the handler.
    pub frames_in: u64,
    /// Frames accepted by `send`.
    pub frames_out: u64,
}

/// Why [`Conn::send`](crate::Conn::send) did not take a frame. Nothing of it was queued.
#[derive(Debug)]
#[non_exhaustive]
pub enum SendError {
    /// The connection is closing or gone, or [`Conn::finish`](crate::Conn::finish) was called; it takes no more.
    Closed,
    /// The peer is too slow: what waits for it has reached the output limit. Wait for
    /// [`Handler::on_writable`](crate::Handler::on_writable), or close.
    Full {
        /// Bytes that wait.
        queued: usize,
        /// The listener's output limit.
        limit: usize,
    },
    /// The payload is longer than the framing's header can say.
    FrameTooLarge {
        /// The payload's length.
        length: usize,
        /// The longest payload that can be sent.
        max: usize,
    },
    /// The connection's [`Framer`](crate::Framer) refused the payload.
    Refused(FrameError),
}

impl fmt::Display for SendError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Closed => f.write_str("the connection is closing"),
            Self::Full { queued, limit } => {
                write!(f, "{queued} bytes wait already, the output limit is {limit}")
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

/// What the handler is to be told next.
#[derive(Debug)]
pub(crate) enum Event<'a> {
    /// The PROXY header has come, or none will: ask the service, then [`Machine::handle_admitted`].
    Header,
    Opened,
    /// An upgrade's handshake is over.
    Secured,
    Frame(&'a [u8]),
    /// The peer finished sending, at the end of a frame.
    Finished,
    /// Output fell from above the high watermark to the low one.
    Writable,
    Timer(u8),
    Drain,
}

/// What the socket needs besides reading and writing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NextStep {
    /// Nothing.
    Wait,
    /// Everything is flushed: shut the writing half down, then [`Machine::handle_shutdown`].
    Shutdown,
    /// It is over: close the socket, with RST if `reset`.
    Gone { reset: bool },
}
