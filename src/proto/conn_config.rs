//! The options of one connection, each with its unit and default.

use std::time::Duration;

use super::deadlines::Pace;
use super::rates::Rate;
use super::time::FOREVER;
use crate::error::{Error, Result};

/// Options of each connection of a listener ([`Listen::conn`](crate::Listen::conn)), or of an
/// outgoing one ([`Connect::conn`](crate::Connect::conn)).
///
/// A listener's changed options apply to connections accepted from then on (*next connection*).
/// [`Conn::reconfigure`](crate::Conn::reconfigure) changes those of one open connection. A timeout
/// of `Duration::MAX` never expires; zero is an error, except for [`ConnConfig::linger_timeout`].
///
/// ```
/// use std::time::Duration;
/// use portcullis::{Connect, Framing, Listen};
///
/// let mut listen = Listen::tcp("127.0.0.1:0", Framing::Line);
/// listen.conn.max_frame = Some(512);
/// listen.conn.idle_timeout = Duration::from_secs(30);
/// let mut connect = Connect::new(Framing::Line);
/// connect.conn = listen.conn.clone();
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default, deny_unknown_fields))]
#[non_exhaustive]
pub struct ConnConfig {
    /// Maximum length of a received payload, in bytes, at least 1; a line counts its delimiter. A
    /// longer payload closes the connection as soon as its header is read, after a call of
    /// [`Handler::on_bad_input`](crate::Handler::on_bad_input). `None` is the framing's own maximum.
    ///
    /// Defaults to `None`: the header's own maximum for packet-1 and packet-2, the length of fixed
    /// frames, 8 MiB for packet-4 and length fields, 64 KiB for lines and custom framings. Raw has
    /// none. A packet's header cannot announce more than its own limit, whatever is set here.
    pub max_frame: Option<usize>,
    /// Maximum time from accepted or connected to open: for the PROXY header and the TLS handshake
    /// together. A handshake that `Conn::start_tls` begins has the same time, from the call on. If
    /// callbacks keep the server from its sockets for 5 ms or longer when the time ends, that time
    /// is added, once in each connection. Defaults to 10 s.
    #[cfg_attr(feature = "serde", serde(with = "crate::seconds"))]
    pub handshake_timeout: Duration,
    /// Maximum time in which an incomplete frame makes no progress. Received bytes extend the time
    /// by [`ConnConfig::min_rate`]. So a short frame must be complete within the timeout, and a
    /// long one must arrive at that rate. The time is paused while reading is paused. Defaults to
    /// 30 s.
    #[cfg_attr(feature = "serde", serde(with = "crate::seconds"))]
    pub frame_timeout: Duration,
    /// Maximum time without a byte from the peer, once the connection is open. The time is paused
    /// while reading is paused. It starts anew when callbacks end that input, or the opening, began
    /// and that worked for 5 ms or longer: the peer may have waited for their output. Defaults to
    /// 120 s.
    #[cfg_attr(feature = "serde", serde(with = "crate::seconds"))]
    pub idle_timeout: Duration,
    /// Maximum time in which the peer takes nothing of its pending output. Taken bytes extend the
    /// time by [`ConnConfig::min_rate`]. Defaults to 30 s.
    ///
    /// This also ends a client that writes all its requests before it reads, if the answers exceed
    /// the high watermark and the kernel's buffers. See [`ConnConfig::full_duplex`].
    ///
    /// While the connection closes, unsent output in the kernel's buffer counts too. So closing
    /// takes at most this timeout, the time of the output at the minimum rate, and twice
    /// [`ConnConfig::linger_timeout`].
    #[doc(alias = "slow consumer")]
    #[cfg_attr(feature = "serde", serde(with = "crate::seconds"))]
    pub write_timeout: Duration,
    /// Minimum rate of progress, in bytes per second: of pending output that the peer takes, and of
    /// an incomplete frame that it sends. Defaults to 500 (Apache's `mod_reqtimeout` has the same),
    /// at least 1.
    ///
    /// [`ConnConfig::write_timeout`] and [`ConnConfig::frame_timeout`] are how far a peer may fall
    /// behind. Each byte adds its time at this rate to the remaining time, up to the timeout. So a
    /// stall may take a whole timeout. A slower peer runs out of time, however it spreads its
    /// bytes: at 29 bytes per second after 32 s, with the defaults.
    pub min_rate: u32,
    /// Maximum time for which input is discarded after our FIN until the peer's FIN. Without this
    /// wait a close with unread input would reset the connection, and the peer would lose output.
    /// Defaults to 2 s.
    ///
    /// The time counts once the peer's system has all output. Until then the write timeout counts,
    /// and a peer that takes nothing ends as [`WriteTimeout`](crate::CloseReason::WriteTimeout).
    /// The server queries the kernel's unsent bytes once per timeout, so up to twice the time may
    /// pass. Only Linux and Apple's systems report them; elsewhere each input of the peer restarts
    /// the timeout, within the write timeout. Zero: the socket is closed right behind FIN, and a
    /// loss of output is not noticed.
    #[cfg_attr(feature = "serde", serde(with = "crate::seconds"))]
    pub linger_timeout: Duration,
    /// Maximum number of input bytes that are discarded while the connection closes. Above it
    /// nothing more is read, and the linger ends once the peer's system has all output. Defaults to
    /// 16 MiB.
    pub linger_bytes: usize,
    /// Number of bytes of pending output at which paused reading resumes. Defaults to 32 KiB; must
    /// be below [`ConnConfig::high_watermark`].
    pub low_watermark: usize,
    /// Number of bytes of pending output at which reading pauses: backpressure. Defaults to
    /// 128 KiB.
    ///
    /// So a client must read answers while it writes requests. If it writes a long pipeline first,
    /// both sides wait for each other: see [`ConnConfig::full_duplex`].
    #[doc(alias = "backpressure")]
    pub high_watermark: usize,
    /// Number of bytes of pending output at which `send` fails. A frame sent below the limit is
    /// queued whole. Output sent before an outgoing connection is open is queued too, and counts.
    /// Defaults to 1 MiB; at least the high watermark.
    #[doc(alias = "backpressure")]
    #[doc(alias = "slow consumer")]
    pub output_limit: usize,
    /// Keeps reading while output is pending above the high watermark. Defaults to false.
    ///
    /// Two kinds of programs need it:
    ///
    /// - Programs whose output does not answer the input. In a proxy, for example, the two
    ///   directions must not wait for each other. Check
    ///   [`Conn::is_congested`](crate::Conn::is_congested) before you send more.
    /// - Programs whose clients write all their requests before they read the first answer (a
    ///   pipeline). Otherwise both sides wait for each other at the high watermark, until the
    ///   connection ends as [`WriteTimeout`](crate::CloseReason::WriteTimeout).
    ///   [`ConnConfig::output_limit`] must then hold all answers of a pipeline. And
    ///   [`ConnConfig::write_timeout`] must be longer than a client takes to write a pipeline:
    ///   meanwhile the client reads nothing. A client that reads a little meanwhile must read at
    ///   [`ConnConfig::min_rate`].
    #[doc(alias = "pipelining")]
    pub full_duplex: bool,
    /// Maximum bytes per second read, as on the wire; `None` is no limit. Above it reading pauses:
    /// nothing is lost, TCP slows the peer down, and the idle and frame timeouts are paused. A reset
    /// by the peer is noticed once the input before it has been read. Defaults to no limit.
    #[doc(alias = "rate limit")]
    pub read_rate: Option<Rate>,
    /// Maximum frames per second delivered; `None` is no limit. Otherwise like
    /// [`ConnConfig::read_rate`]. With [`Framing::Raw`](crate::Framing::Raw) each piece counts.
    #[doc(alias = "rate limit")]
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
    /// The clock of an incomplete frame.
    pub(super) fn frame_pace(&self) -> Pace {
        Pace {
            timeout: self.frame_timeout.min(FOREVER),
            min_rate: self.min_rate,
        }
    }

    /// The clock of pending output.
    pub(super) fn write_pace(&self) -> Pace {
        Pace {
            timeout: self.write_timeout.min(FOREVER),
            min_rate: self.min_rate,
        }
    }

    /// Finds values that no connection can work with.
    pub(crate) fn check(&self) -> Result<()> {
        if self.low_watermark >= self.high_watermark {
            return Err(Error::option(
                "low_watermark",
                format!(
                    "{} must be below the high watermark ({})",
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
