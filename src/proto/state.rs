//! The vocabulary of one connection: states, limits, facts, events.

use std::error::Error as StdError;
use std::fmt;
use std::time::Duration;

use super::framing::FrameError;
use super::rate::Rate;

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

/// How far a closing connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum ClosePhase {
    /// Not closing.
    None,
    /// Output still waits.
    Flush,
    /// FIN is due.
    Shutdown,
    /// FIN is sent; input is discarded until the peer's.
    Linger,
    Gone {
        reset: bool,
    },
}

macro_rules! flags {
    ($($(#[$doc:meta])* $name:ident = $bit:literal;)*) => {
        /// One bit per fact about a connection.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
        pub(super) struct Flags(pub(super) u32);

        impl Flags {
            $($(#[$doc])* pub(super) const $name: Self = Self(1 << $bit);)*

            #[inline]
            pub(super) fn has(self, flag: Self) -> bool {
                self.0 & flag.0 != 0
            }

            pub(super) fn set(&mut self, flag: Self) {
                self.0 |= flag.0;
            }

            pub(super) fn put(&mut self, flag: Self, on: bool) {
                if on {
                    self.set(flag);
                } else {
                    self.clear(flag);
                }
            }

            pub(super) fn clear(&mut self, flag: Self) {
                self.0 &= !flag.0;
            }

            pub(super) fn take(&mut self, flag: Self) -> bool {
                let had = self.has(flag);
                self.clear(flag);
                had
            }
        }
    };
}

flags! {
    /// TCP's end of stream was read.
    EOF = 0;
    /// The handler was told that the peer finished.
    FINISH_REPORTED = 1;
    /// The handler paused reading.
    PAUSED = 2;
    /// Output is above the high watermark, or has not come down to the low one yet.
    CONGESTED = 3;
    /// What is held may contain a whole frame: decoding stopped for another reason than "more".
    FRAMES_BUFFERED = 4;
    /// `on_open` is due.
    OPENED_PENDING = 5;
    /// `on_writable` is due.
    WRITABLE_PENDING = 6;
    /// `on_drain` is due.
    DRAIN_PENDING = 7;
    /// The server drains.
    DRAINING = 8;
    /// Close once everything that has arrived is answered.
    CLOSE_AFTER_INPUT = 9;
    /// A read since CLOSE_AFTER_INPUT found the kernel's buffer empty.
    READ_DRAINED = 10;
    /// The kernel refused a write for good: nothing more can be sent, but what arrived can be read.
    WRITE_FAILED = 11;
    /// The handler was told `on_open`.
    WAS_OPEN = 12;
    /// The service has accepted the peer.
    ADMITTED = 13;
    /// A PROXY header is to come, or may come, before anything else.
    AWAITS_HEADER = 14;
    /// Without a PROXY header nobody comes in.
    HEADER_REQUIRED = 15;
    /// Whom it is for is known: the service is to be asked.
    HEADER_PENDING = 16;
    /// Reading stands until the throttle says so.
    THROTTLED = 17;
    /// `on_secured` is due.
    SECURED_PENDING = 18;
    /// It leaves the loop at the end of its turn.
    DETACHING = 19;
    /// We have connected, or are to.
    OUTGOING = 20;
    /// The handler sends nothing more, and goes on reading: FIN is due once everything is flushed.
    FINISHING = 21;
    /// That FIN is sent.
    FIN_SENT = 22;
    /// It has left the loop: nothing here is about it any more.
    DETACHED = 23;
    /// Its state is not `Open`.
    UNOPEN = 24;
    /// A timer of the handler's runs.
    TIMED = 25;
    /// It has a throttle.
    RATED = 26;
    /// TLS brings nothing more: close_notify has come, or it has failed.
    TLS_OVER = 27;
    /// A timer is due, unless it was cancelled since.
    TIMER_PENDING = 28;
    /// Its clocks stood until now. Whoever looks at its deadlines may have come meanwhile, found none, and is to be told of them
    /// at the end of the turn.
    CLOCKS_RESUMED = 29;
}
