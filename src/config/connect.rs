//! The options of an outgoing connection, each with its unit and default.

use std::fmt;
use std::net::SocketAddr;
use std::time::Duration;

use super::check::check_unix_name;
use super::SocketOptions;
use crate::addr::Addr;
use crate::error::{Error, Result};
use crate::proto::tls::ClientTls;
use crate::proto::{ConnConfig, Framing};

/// Options of one outgoing connection, for [`Control::connect`](crate::Control::connect).
///
/// Options for clients do not apply: access rules, source limits, accept rates, PROXY headers,
/// [`PendingLimits`](crate::PendingLimits). The cap, the memory limit and all budgets do.
///
/// ```
/// use std::time::Duration;
/// use portcullis::{Connect, Framing, Retry};
///
/// let mut connect = Connect::new(Framing::Line);
/// connect.connect_timeout = Duration::from_secs(2);
/// connect.retry = Some(Retry::new(5));
/// ```
#[derive(Clone)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(
    feature = "serde",
    serde(default = "Connect::packet2", deny_unknown_fields)
)]
#[must_use]
#[non_exhaustive]
pub struct Connect {
    #[cfg_attr(feature = "serde", serde(skip))]
    pub(crate) tls: Option<ClientTls>,
    /// How the stream is cut into frames.
    pub framing: Framing,
    /// Options of the connection: timeouts, limits, rates.
    pub conn: ConnConfig,
    /// Options of the socket. Those of listeners have no effect.
    pub socket: SocketOptions,
    /// Local address to connect from, of the same family as the peer's; port 0 lets the system
    /// choose one. Another port allows one concurrent connection to each peer, and sets
    /// SO_REUSEADDR. Not for Unix sockets. Defaults to the system's choice.
    pub bind: Option<SocketAddr>,
    /// Maximum time of one attempt to connect (the handshake of TCP, not of TLS); not zero. If the
    /// last attempt takes longer, the reason is
    /// [`ConnectTimeout`](crate::CloseReason::ConnectTimeout). Defaults to 10 s. With
    /// `Duration::MAX` the kernel gives up, on Linux after two minutes
    /// (`net.ipv4.tcp_syn_retries`).
    #[cfg_attr(feature = "serde", serde(with = "crate::seconds"))]
    pub connect_timeout: Duration,
    /// Further attempts after a failed one. An attempt fails if there is no TCP (or Unix)
    /// connection. A later failure, as of the TLS handshake, is no reason for another attempt. A
    /// connection that the peer resets as soon as it is established has opened: its input is
    /// delivered, and it ends as [`Reset`](crate::CloseReason::Reset). Defaults to no retry.
    pub retry: Option<Retry>,
}

impl Connect {
    /// Returns the defaults, for a stream that is cut into frames by `framing`: no TLS, one attempt
    /// of at most 10 s.
    pub fn new(framing: Framing) -> Self {
        Self {
            tls: None,
            framing,
            conn: ConnConfig::default(),
            socket: SocketOptions::default(),
            bind: None,
            connect_timeout: Duration::from_secs(10),
            retry: None,
        }
    }

    /// Changes options, within an expression.
    pub fn with(mut self, set: impl FnOnce(&mut Self)) -> Self {
        set(&mut self);
        self
    }

    /// Speaks TLS 1.2 and 1.3 as a client, with a server that has a certificate for `server_name`.
    /// A DNS name is sent (SNI, RFC 6066 section 3), an IP address is not.
    ///
    /// [`tls::client_config`](crate::tls::client_config) makes a configuration of root certificates
    /// in a file. Defaults to plain TCP; for STARTTLS keep that default, and see
    /// [`Conn::start_tls_client`](crate::Conn::start_tls_client).
    ///
    /// An invalid certificate, or one for another name, ends the connection as
    /// [`TlsHandshake`](crate::CloseReason::TlsHandshake), with the problem and the expected name
    /// in [`Closed::error`](crate::Closed::error). A server without TLS is
    /// [`NotTls`](crate::CloseReason::NotTls). ALPN, client certificates and resumption belong to
    /// the configuration. Early data (0-RTT) is never sent, because it can be replayed.
    #[cfg(feature = "tls")]
    pub fn tls(
        mut self,
        config: impl Into<std::sync::Arc<crate::proto::tls::ClientConfig>>,
        server_name: impl AsRef<str>,
    ) -> Self {
        self.tls = Some(ClientTls::new(config.into(), server_name.as_ref()));
        self
    }

    /// Finds values that cannot work for a socket that is connected.
    pub(crate) fn check_connected(&self) -> Result<()> {
        self.conn.check()?;
        self.framing.check(self.conn.max_frame)?;
        self.socket.check()?;
        match self.tls.as_ref().and_then(ClientTls::problem) {
            Some(problem) => Err(Error::option("tls", problem)),
            None => Ok(()),
        }
    }

    /// Finds values that cannot work, with this peer.
    pub(crate) fn check(&self, addr: &Addr) -> Result<()> {
        self.check_connected()?;
        if self.connect_timeout.is_zero() {
            return Err(Error::option(
                "connect_timeout",
                "zero would fail every attempt at once; use Duration::MAX for never",
            ));
        }
        if let Some(problem) = self.retry.as_ref().and_then(Retry::problem) {
            return Err(Error::option("retry", problem));
        }
        let Addr::Tcp(peer) = addr else {
            if self.bind.is_some() {
                return Err(Error::option(
                    "bind",
                    "a connection to a Unix socket has no local IP address",
                ));
            }
            let name = addr.as_unix();
            return name
                .map_or(Ok(()), check_unix_name)
                .map_err(|(_, problem)| Error::option("unix", problem));
        };
        match self.bind {
            Some(local) if local.is_ipv4() != peer.is_ipv4() => Err(Error::option(
                "bind",
                format!("{local} is of another family than {peer}: both are IPv4, or both IPv6"),
            )),
            _ => Ok(()),
        }
    }
}

impl fmt::Debug for Connect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connect")
            .field("tls", &self.tls)
            .field("framing", &self.framing)
            .field("conn", &self.conn)
            .field("socket", &self.socket)
            .field("bind", &self.bind)
            .field("connect_timeout", &self.connect_timeout)
            .field("retry", &self.retry)
            .finish()
    }
}

/// Number of attempts to connect, and the delay between them. The delay doubles after each attempt,
/// up to a limit. A random part makes each delay shorter, so that clients of one failed server do
/// not return all at once.
///
/// ```
/// use std::time::Duration;
/// use portcullis::Retry;
///
/// // 200 ms, 400 ms, 800 ms, ... 30 s, each shorter by up to a half; for ever.
/// let retry = Retry::new(u32::MAX)
///     .first_delay(Duration::from_millis(200))
///     .longest_delay(Duration::from_secs(30));
/// # let _ = retry;
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(
    feature = "serde",
    serde(default = "Retry::forever", deny_unknown_fields)
)]
#[must_use]
pub struct Retry {
    attempts: u32,
    #[cfg_attr(feature = "serde", serde(with = "crate::seconds"))]
    first_delay: Duration,
    #[cfg_attr(feature = "serde", serde(with = "crate::seconds"))]
    longest_delay: Duration,
    jitter: u8,
}

impl Retry {
    /// Allows up to `attempts` attempts, the first included; at least 1. `u32::MAX` never gives up.
    pub fn new(attempts: u32) -> Self {
        Self {
            attempts,
            first_delay: Duration::from_millis(100),
            longest_delay: Duration::from_secs(10),
            jitter: 50,
        }
    }

    /// Sets the delay from the end of the first attempt to the second. Defaults to 100 ms; at least
    /// 1 ms.
    pub fn first_delay(mut self, delay: Duration) -> Self {
        self.first_delay = delay;
        self
    }

    /// Sets the maximum delay from the end of one attempt to the next. Defaults to 10 s; at least
    /// the first delay.
    pub fn longest_delay(mut self, delay: Duration) -> Self {
        self.longest_delay = delay;
        self
    }

    /// Sets the random part of each delay, in percent: 0 to 100. Defaults to 50. Processes that
    /// were forked from one another draw different numbers; the simulator draws from its seed.
    pub fn jitter(mut self, percent: u8) -> Self {
        self.jitter = percent;
        self
    }

    /// Returns the delay after this number of failed attempts; `None` after the last. `chance`
    /// is any number.
    pub(crate) fn delay(&self, failed: u32, chance: u64) -> Option<Duration> {
        if failed >= self.attempts && self.attempts < u32::MAX {
            return None;
        }
        let doubled = 2_u32.saturating_pow(failed.saturating_sub(1));
        let delay = self
            .first_delay
            .saturating_mul(doubled)
            .min(self.longest_delay);
        let less = u128::from(delay.as_secs()) * 1_000_000_000 + u128::from(delay.subsec_nanos());
        // At most a Duration's seconds in nanoseconds, a hundred times 2³², and below 2¹²⁸.
        let less = (less * u128::from(self.jitter) / 100 * u128::from(chance >> 32)) >> 32;
        let less = Duration::from_nanos(u64::try_from(less).unwrap_or(u64::MAX));
        Some(delay.saturating_sub(less).max(Duration::from_millis(1)))
    }

    fn problem(&self) -> Option<String> {
        if self.attempts == 0 {
            Some("0 attempts would never connect; use at least 1".to_owned())
        } else if self.first_delay < Duration::from_millis(1) {
            Some(
                "a first delay of less than a millisecond would spin; use at least 1 ms".to_owned(),
            )
        } else if self.longest_delay < self.first_delay {
            Some(format!(
                "the longest delay ({:?}) is below the first ({:?})",
                self.longest_delay, self.first_delay
            ))
        } else if self.jitter > 100 {
            Some("jitter is at most 100 percent".to_owned())
        } else {
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secs(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn delays_double_up_to_the_longest() {
        let retry = Retry::new(7)
            .first_delay(secs(1))
            .longest_delay(secs(10))
            .jitter(0);
        let delays: Vec<_> = (1..=7)
            .map(|failed| retry.delay(failed, u64::MAX))
            .collect();
        let seconds = [Some(1), Some(2), Some(4), Some(8), Some(10), Some(10), None];
        assert_eq!(delays, seconds.map(|seconds| seconds.map(secs)));
    }

    #[test]
    fn jitter_makes_a_delay_shorter_and_never_nothing() {
        let retry = Retry::new(2)
            .first_delay(secs(100))
            .longest_delay(secs(100))
            .jitter(25);
        assert_eq!(retry.delay(1, 0), Some(secs(100)));
        let most = retry.delay(1, u64::MAX).expect("one more");
        assert!(most >= secs(75) && most < secs(76), "{most:?}");
        assert_eq!(
            retry
                .clone()
                .jitter(100)
                .delay(1, u64::MAX)
                .map(|delay| delay < secs(1)),
            Some(true)
        );
        let long = Retry::new(u32::MAX)
            .first_delay(Duration::MAX)
            .longest_delay(Duration::MAX);
        for failed in [1, 2, u32::MAX] {
            for chance in [0, u64::MAX / 2, u64::MAX] {
                assert!(long.delay(failed, chance) >= Some(secs(1)));
            }
        }
    }
}
