//! The options of one connection, each with its unit and default.

use std::time::Duration;

use super::rates::Rate;
use crate::error::{Error, Result};

/// Options of each connection of a listener ([`Listen::conn`](crate::Listen::conn)), or of an
/// outgoing one ([`Connect::conn`](crate::Connect::conn)).
///
/// The options of a listener are for connections accepted after a change (*next connection*). A
/// timeout of `Duration::MAX` is never.
///
/// ```
/// use std::time::Duration;
/// use portcullis::{Connect, ConnConfig, Listen};
///
/// let conn = ConnConfig::new().max_frame(512).idle_timeout(Duration::from_secs(30));
/// let listen = Listen::tcp("127.0.0.1:0").conn(conn.clone());
/// let connect = Connect::new().conn(conn.write_timeout(Duration::from_secs(5)));
/// assert_eq!(listen.conn.max_frame, connect.conn.max_frame);
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use]
#[non_exhaustive]
pub struct ConnConfig {
    /// See [`ConnConfig::max_frame`]; `None` is the framing's own maximum.
    pub max_frame: Option<usize>,
    /// See [`ConnConfig::handshake_timeout`].
    pub handshake_timeout: Duration,
    /// See [`ConnConfig::frame_timeout`].
    pub frame_timeout: Duration,
    /// See [`ConnConfig::idle_timeout`].
    pub idle_timeout: Duration,
    /// See [`ConnConfig::write_timeout`].
    pub write_timeout: Duration,
    /// See [`ConnConfig::min_rate`].
    pub min_rate: u32,
    /// See [`ConnConfig::linger`].
    pub linger_timeout: Duration,
    /// See [`ConnConfig::linger`].
    pub linger_bytes: usize,
    /// See [`ConnConfig::watermarks`].
    pub low_watermark: usize,
    /// See [`ConnConfig::watermarks`].
    pub high_watermark: usize,
    /// See [`ConnConfig::output_limit`].
    pub output_limit: usize,
    /// See [`ConnConfig::full_duplex`].
    pub full_duplex: bool,
    /// See [`ConnConfig::read_rate`].
    pub read_rate: Option<Rate>,
    /// See [`ConnConfig::frame_rate`].
    pub frame_rate: Option<Rate>,
}

impl Default for ConnConfig {
    fn default() -> Self {
        Self {
            max_frame: None,
            handshake_timeout: Duration::from_secs(10),
            frame_timeout: Duration::from_secs(30),
            idle_timeout: Duration::from_secs(120),
            write_timeout: Duration::from_secs(30),
            min_rate: 500,
            linger_timeout: Duration::from_secs(2),
            linger_bytes: 16 * 1024 * 1024,
            low_watermark: 32 * 1024,
            high_watermark: 128 * 1024,
            output_limit: 1024 * 1024,
            full_duplex: false,
            read_rate: None,
            frame_rate: None,
        }
    }
}

impl ConnConfig {
    /// The defaults.
    pub fn new() -> Self {
        Self::default()
    }

    /// Maximum length of a received payload, in bytes; a line counts its delimiter. A longer one
    /// closes the connection as soon as its header is read.
    ///
    /// Defaults to the header's own maximum for packet-1 and packet-2, 8 MiB for packet-4, 64 KiB
    /// for lines and custom framings. Raw has none. A packet's header cannot announce more than
    /// its own maximum, whatever is set here.
    pub fn max_frame(mut self, bytes: usize) -> Self {
        self.max_frame = Some(bytes);
        self
    }

    /// Maximum time from accepted or connected to open: for the PROXY header and the TLS handshake.
    /// A handshake that `Conn::start_tls` begins has the same time, from there. Defaults to 10 s.
    pub fn handshake_timeout(mut self, timeout: Duration) -> Self {
        self.handshake_timeout = timeout;
        self
    }

    /// Maximum time in which an incomplete frame makes no progress. Received bytes extend the time
    /// by [`ConnConfig::min_rate`]. So a short frame must be complete within it, and a long one must
    /// arrive at that rate. The time is paused while reading is paused. Defaults to 30 s.
    pub fn frame_timeout(mut self, timeout: Duration) -> Self {
        self.frame_timeout = timeout;
        self
    }

    /// Maximum time without a byte from the peer, once the connection is open. The time is paused
    /// while we do not read. Defaults to 120 s.
    pub fn idle_timeout(mut self, timeout: Duration) -> Self {
        self.idle_timeout = timeout;
        self
    }

    /// Maximum time in which the peer takes nothing of its pending output. Taken bytes extend the
    /// time by [`ConnConfig::min_rate`]. Defaults to 30 s.
    ///
    /// This also ends a client that writes all its requests before it reads an answer, if the
    /// answers exceed the high watermark and the kernel's buffers: see [`ConnConfig::full_duplex`].
    ///
    /// While the connection closes, output that only the kernel holds counts too, in the same time.
    /// So closing takes at most this timeout, the time of the output at the minimum rate, and the
    /// linger timeout ([`ConnConfig::linger`]).
    pub fn write_timeout(mut self, timeout: Duration) -> Self {
        self.write_timeout = timeout;
        self
    }

    /// Minimum rate of progress, in bytes per second: of pending output that the peer takes, and of
    /// an incomplete frame that it sends. Defaults to 500 (Apache's `mod_reqtimeout` has the same),
    /// at least 1.
    ///
    /// [`ConnConfig::write_timeout`] and [`ConnConfig::frame_timeout`] are how far a peer may fall
    /// behind. Each byte makes up for its time at this rate, and no more than the timeout is left.
    /// So a stall may take a whole timeout. A slower peer runs out of time, however it spreads its
    /// bytes: at 29 bytes per second after 32 s, with the defaults.
    pub fn min_rate(mut self, bytes_per_second: u32) -> Self {
        self.min_rate = bytes_per_second;
        self
    }

    /// Maximum time, and number of bytes, for which input is discarded after our FIN until the
    /// peer's FIN. Without this a close would reset the connection under bytes that the peer has
    /// not read yet. Defaults to 2 s and 16 MiB.
    ///
    /// The time counts once the peer's system has all output. Until then the write timeout counts,
    /// and a peer that takes nothing ends as [`WriteTimeout`](crate::CloseReason::WriteTimeout).
    /// The kernel is asked for its unsent bytes once per `timeout`, so up to twice the time may
    /// pass. On systems that cannot tell (neither Linux nor Apple's) each input of the peer starts
    /// `timeout` anew, within the write timeout. Zero: the socket is closed right behind FIN.
    pub fn linger(mut self, timeout: Duration, bytes: usize) -> Self {
        self.linger_timeout = timeout;
        self.linger_bytes = bytes;
        self
    }

    /// Pauses reading at `high` bytes of pending output, and resumes it at `low`: backpressure.
    /// Defaults to 32 KiB (`low`) and 128 KiB (`high`). `low` must be below `high`.
    ///
    /// So a client must read answers while it writes requests. One that writes a long pipeline
    /// first waits for this side, which waits for it: see [`ConnConfig::full_duplex`].
    pub fn watermarks(mut self, low: usize, high: usize) -> Self {
        self.low_watermark = low;
        self.high_watermark = high;
        self
    }

    /// Number of bytes of pending output at which `send` fails. A frame begun below the limit is
    /// queued whole; output sent before the connection is open is queued too, and counts.
    /// Defaults to 1 MiB; at least the high watermark.
    pub fn output_limit(mut self, bytes: usize) -> Self {
        self.output_limit = bytes;
        self
    }

    /// Keeps reading while output is pending above the high watermark. Defaults to false.
    ///
    /// Two kinds of programs need it:
    ///
    /// - Output is no answer to the input. In a proxy, for example, the two directions must not
    ///   wait for each other. Check [`Conn::is_congested`](crate::Conn::is_congested) before you
    ///   send more.
    /// - Clients write all their requests before they read the first answer (a pipeline). Without
    ///   it both sides wait for each other at the high watermark, until the connection ends as
    ///   [`WriteTimeout`](crate::CloseReason::WriteTimeout). Then
    ///   [`ConnConfig::output_limit`] must hold all answers of a pipeline: one more fails.
    #[doc(alias = "pipelining")]
    pub fn full_duplex(mut self, on: bool) -> Self {
        self.full_duplex = on;
        self
    }

    /// Maximum bytes per second read, on the wire; `None` is no limit. Above it reading pauses:
    /// nothing is lost, TCP slows the peer down, and its idle and frame timeouts are paused.
    /// Defaults to no limit.
    pub fn read_rate(mut self, rate: impl Into<Option<Rate>>) -> Self {
        self.read_rate = rate.into();
        self
    }

    /// Maximum frames per second delivered; `None` is no limit. Otherwise like
    /// [`ConnConfig::read_rate`]. With [`Framing::Raw`](crate::Framing::Raw) each piece counts.
    pub fn frame_rate(mut self, rate: impl Into<Option<Rate>>) -> Self {
        self.frame_rate = rate.into();
        self
    }

    /// Finds values that no connection can work with.
    pub(crate) fn check(&self) -> Result<()> {
        if self.low_watermark >= self.high_watermark {
            return Err(Error::option(
                "watermarks",
                format!(
                    "low ({}) must be below high ({})",
                    self.low_watermark, self.high_watermark
                ),
            ));
        }
        if self.output_limit < self.high_watermark {
            return Err(Error::option(
                "output_limit",
                format!(
                    "{} is below the high watermark ({}), where reading stops; use at least that",
                    self.output_limit, self.high_watermark
                ),
            ));
        }
        if self.max_frame == Some(0) {
            return Err(Error::option(
                "max_frame",
                "0 admits no frame; use at least 1",
            ));
        }
        let timeouts = [
            ("handshake_timeout", self.handshake_timeout),
            ("frame_timeout", self.frame_timeout),
            ("idle_timeout", self.idle_timeout),
            ("write_timeout", self.write_timeout),
        ];
        for (option, timeout) in timeouts {
            if timeout.is_zero() {
                return Err(Error::option(
                    option,
                    "zero would close every connection at once; use Duration::MAX for never",
                ));
            }
        }
        if self.min_rate == 0 {
            return Err(Error::option(
                "min_rate",
                "0 is no rate; use at least 1, or timeouts of Duration::MAX for never",
            ));
        }
        check_rates(&[
            ("read_rate", self.read_rate),
            ("frame_rate", self.frame_rate),
        ])
    }
}

pub(crate) fn check_rates(rates: &[(&'static str, Option<Rate>)]) -> Result<()> {
    for (option, rate) in rates {
        if let Some(problem) = rate.and_then(|rate| rate.problem()) {
            return Err(Error::option(option, problem));
        }
    }
    Ok(())
}
