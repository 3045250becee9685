//! The options of a listener, each with its unit and default.

use std::fmt;
use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::time::Duration;

use crate::access::AccessRules;
use crate::config::AtCapacity;
use crate::error::{Error, Result};
use crate::proto::{Framing, Limits, TlsConfig};

/// TCP keepalive (`tcp(7)`): finds peers that vanished without a FIN.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Keepalive {
    /// Idle time before the first probe (TCP_KEEPIDLE). Whole seconds, 1 to 32767.
    pub time: Duration,
    /// Time between probes (TCP_KEEPINTVL). Whole seconds, 1 to 32767.
    pub interval: Duration,
    /// Unanswered probes before the connection is given up (TCP_KEEPCNT), 1 to 127.
    pub retries: u32,
}

impl Keepalive {
    /// Probes after `time`, then every `interval`, and gives up after `retries` of them.
    pub fn new(time: Duration, interval: Duration, retries: u32) -> Self {
        Self {
            time,
            interval,
            retries,
        }
    }
}

/// One listener: where, in which framing, under which limits.
///
/// ```
/// use std::time::Duration;
/// use portcullis::{AtCapacity, Framing, Listen};
///
/// let listen = Listen::tcp("127.0.0.1:0")
///     .name("games")
///     .framing(Framing::Line)
///     .max_frame(512)
///     .idle_timeout(Duration::from_secs(30))
///     .at_capacity(AtCapacity::Refuse { farewell: b"full, try later\n".to_vec() });
/// # let _ = listen;
/// ```
#[derive(Clone)]
#[must_use]
pub struct Listen {
    pub(crate) addrs: std::result::Result<Vec<SocketAddr>, (String, io::ErrorKind, String)>,
    pub(crate) name: Option<String>,
    pub(crate) framing: Framing,
    pub(crate) tls: Option<TlsConfig>,
    pub(crate) limits: Limits,
    pub(crate) max_connections: Option<usize>,
    pub(crate) at_capacity: AtCapacity,
    pub(crate) access: AccessRules,
    pub(crate) socket: SocketOptions,
}

/// What is set on the listening socket; accepted sockets inherit what concerns them (`tcp(7)`, `socket(7)`).
#[derive(Clone, Debug)]
pub(crate) struct SocketOptions {
    pub(crate) backlog: u32,
    pub(crate) nodelay: bool,
    pub(crate) only_v6: bool,
    pub(crate) reuse_address: bool,
    pub(crate) reuse_port: bool,
    pub(crate) keepalive: Option<Keepalive>,
    pub(crate) recv_buffer: Option<usize>,
    pub(crate) send_buffer: Option<usize>,
}

impl SocketOptions {
    /// What the kernel would refuse without saying which option it means, or cut without a word.
    fn check(&self) -> Result<()> {
        if let Some(keepalive) = &self.keepalive {
            // The limits of Linux (`tcp(7)`, MAX_TCP_KEEPIDLE and its like).
            let seconds = 1..=32_767;
            let in_range = |time: Duration| seconds.contains(&time.as_secs());
            if !in_range(keepalive.time) || !in_range(keepalive.interval) || !(1..=127).contains(&keepalive.retries) {
                return Err(Error::option(
                    "keepalive",
                    format!(
                        "time ({:?}) and interval ({:?}) go from 1 s to 32767 s, retries ({}) from 1 to 127",
                        keepalive.time, keepalive.interval, keepalive.retries
                    ),
                ));
            }
        }
        for (option, bytes) in [("recv_buffer", self.recv_buffer), ("send_buffer", self.send_buffer)] {
            if bytes.is_some_and(|bytes| i32::try_from(bytes).is_err()) {
                return Err(Error::option(option, "a socket's buffer is smaller than 2 GiB"));
            }
        }
        Ok(())
    }
}

impl Listen {
    /// Listens on a TCP address: `"127.0.0.1:2222"`, `("::1", 2222)`, a `SocketAddr`. Port 0 lets the system choose;
    /// ask [`Server::listeners`](crate::Server::listeners) for the real one. A name that resolves to
    /// several addresses takes the first that can be bound. A bad address is reported by `listen`.
    pub fn tcp(addr: impl ToSocketAddrs + fmt::Debug) -> Self {
        let addrs = match addr.to_socket_addrs() {
            Ok(found) => Ok(found.collect()),
            Err(error) => Err((format!("{addr:?}"), error.kind(), error.to_string())),
        };
        Self::with(addrs)
    }

    /// For a socket that is listening already: see [`Server::adopt`](crate::Server::adopt). Address and socket options
    /// are the socket's own; those set here are ignored.
    pub fn adopted() -> Self {
        Self::with(Ok(Vec::new()))
    }

    fn with(addrs: std::result::Result<Vec<SocketAddr>, (String, io::ErrorKind, String)>) -> Self {
        Self {
            addrs,
            name: None,
            framing: Framing::default(),
            tls: None,
            limits: Limits {
                handshake_timeout: Duration::from_secs(10),
                frame_timeout: Duration::from_secs(30),
                idle_timeout: Duration::from_secs(120),
                write_timeout: Duration::from_secs(30),
                linger_timeout: Duration::from_secs(2),
                linger_bytes: 16 * 1024 * 1024,
                high_watermark: 128 * 1024,
                low_watermark: 32 * 1024,
                output_limit: 1024 * 1024,
                max_frame: None,
            },
            max_connections: None,
            at_capacity: AtCapacity::default(),
            access: AccessRules::default(),
            socket: SocketOptions {
                backlog: 1024,
                nodelay: true,
                only_v6: true,
                reuse_address: true,
                reuse_port: false,
                keepalive: None,
                recv_buffer: None,
                send_buffer: None,
            },
        }
    }

    /// The listener's name, unique in its server. Defaults to `portcullis_PORT` with the real port.
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// How the stream is cut into frames. Defaults to [`Framing::Packet2`].
    pub fn framing(mut self, framing: Framing) -> Self {
        self.framing = framing;
        self
    }

    /// The longest payload accepted, in bytes; a line counts its delimiter. A longer one closes the connection on its
    /// header alone. Defaults to what the header can say for packet-1 and packet-2, 8 MiB for packet-4, 64 KiB for
    /// lines and custom framings. Raw has none, and a packet's header cannot say more than it can.
    pub fn max_frame(mut self, bytes: usize) -> Self {
        self.limits.max_frame = Some(bytes);
        self
    }

    /// Speaks TLS 1.2 and 1.3 with this configuration, or chooses one for each client: an `Arc<ServerConfig>`,
    /// [`ServerNames`](crate::tls::ServerNames) or [`TlsConfig::choose`](crate::tls::TlsConfig::choose). Defaults to plain TCP; for
    /// STARTTLS leave it so, and see [`Conn::start_tls`](crate::Conn::start_tls). *Live*:
    /// [`Control::set_tls`](crate::Control::set_tls), for a listener that speaks TLS already.
    ///
    /// A handshake that fails is the peer's business: it is logged at debug level, counted
    /// ([`Stats::closed`](crate::Stats::closed)) and told to [`Service::on_unopened`](crate::Service::on_unopened).
    ///
    /// Early data (0-RTT) is never taken, whatever `max_early_data_size` says, because it can be replayed: clients
    /// send it again after the handshake.
    #[cfg(feature = "tls")]
    pub fn tls(mut self, config: impl Into<TlsConfig>) -> Self {
        self.tls = Some(config.into());
        self
    }

    /// The most connections of this listener, within the server's cap. Defaults to no limit of its own.
    pub fn max_connections(mut self, connections: usize) -> Self {
        self.max_connections = Some(connections);
        self
    }

    /// What becomes of clients that come when the cap is reached. Defaults to [`AtCapacity::Wait`].
    pub fn at_capacity(mut self, policy: AtCapacity) -> Self {
        self.at_capacity = policy;
        self
    }

    /// Who may connect, by address. Checked before anything is spent on a peer: no slot, no TLS, no call of the service but
    /// [`Service::on_unopened`](crate::Service::on_unopened). Who is denied is closed as
    /// [`Denied`](crate::CloseReason::Denied). Defaults to everybody. *Live*:
    /// [`Control::set_access_rules`](crate::Control::set_access_rules).
    pub fn access_rules(mut self, rules: AccessRules) -> Self {
        self.access = rules;
        self
    }

    /// From accept to open: the TLS handshake must be done by then. It is also the time for one that
    /// [`Conn::start_tls`](crate::Conn::start_tls) begins, from there. Defaults to 10 s; `Duration::MAX` is never.
    pub fn handshake_timeout(mut self, timeout: Duration) -> Self {
        self.limits.handshake_timeout = timeout;
        self
    }

    /// From the first byte of a frame to its last. Defaults to 30 s; `Duration::MAX` is never.
    pub fn frame_timeout(mut self, timeout: Duration) -> Self {
        self.limits.frame_timeout = timeout;
        self
    }

    /// The longest silence of the peer. Only bytes from the peer count, and the clock stands while we do not read.
    /// Defaults to 120 s; `Duration::MAX` is never.
    pub fn idle_timeout(mut self, timeout: Duration) -> Self {
        self.limits.idle_timeout = timeout;
        self
    }

    /// The longest time in which the peer takes no byte of what waits for it. Defaults to 30 s; `Duration::MAX` is never.
    pub fn write_timeout(mut self, timeout: Duration) -> Self {
        self.limits.write_timeout = timeout;
        self
    }

    /// How long, and how many bytes, input is discarded after our FIN while we wait for the peer's, so that closing
    /// does not reset the connection under bytes the peer has not read yet. Defaults to 2 s and 16 MiB.
    pub fn linger(mut self, timeout: Duration, bytes: usize) -> Self {
        self.limits.linger_timeout = timeout;
        self.limits.linger_bytes = bytes;
        self
    }

    /// Reading from a connection stops when `high` bytes wait for its peer and goes on at `low`.
    /// Defaults to 32 KiB and 128 KiB. `low` must be below `high`.
    pub fn watermarks(mut self, low: usize, high: usize) -> Self {
        self.limits.low_watermark = low;
        self.limits.high_watermark = high;
        self
    }

    /// `send` fails while this many bytes wait for the peer; a frame that is begun below the limit is taken whole.
    /// Defaults to 1 MiB; at least the high watermark.
    pub fn output_limit(mut self, bytes: usize) -> Self {
        self.limits.output_limit = bytes;
        self
    }

    /// Connections that the kernel keeps waiting for accept. Defaults to 1024. The kernel caps it silently
    /// (`net.core.somaxconn` on Linux, 4096 since 5.4), see `listen(2)`.
    pub fn backlog(mut self, connections: u32) -> Self {
        self.socket.backlog = connections;
        self
    }

    /// TCP_NODELAY: send small frames at once. Defaults to true.
    pub fn nodelay(mut self, on: bool) -> Self {
        self.socket.nodelay = on;
        self
    }

    /// IPV6_V6ONLY: an IPv6 listener takes no IPv4 clients. Set explicitly, whatever the system's default. Defaults to true;
    /// with false, IPv4 peers show as `::ffff:a.b.c.d`.
    pub fn only_v6(mut self, on: bool) -> Self {
        self.socket.only_v6 = on;
        self
    }

    /// SO_REUSEADDR: a restarted server binds although old connections are in TIME_WAIT. Defaults to true.
    pub fn reuse_address(mut self, on: bool) -> Self {
        self.socket.reuse_address = on;
        self
    }

    /// SO_REUSEPORT: several sockets share the port, and on Linux the kernel spreads clients over them. Defaults to false.
    pub fn reuse_port(mut self, on: bool) -> Self {
        self.socket.reuse_port = on;
        self
    }

    /// SO_KEEPALIVE with these times. Defaults to off.
    pub fn keepalive(mut self, keepalive: Keepalive) -> Self {
        self.socket.keepalive = Some(keepalive);
        self
    }

    /// SO_RCVBUF of each connection, in bytes. Defaults to the system's automatic size.
    pub fn recv_buffer(mut self, bytes: usize) -> Self {
        self.socket.recv_buffer = Some(bytes);
        self
    }

    /// SO_SNDBUF of each connection, in bytes. Defaults to the system's automatic size.
    pub fn send_buffer(mut self, bytes: usize) -> Self {
        self.socket.send_buffer = Some(bytes);
        self
    }

    pub(crate) fn check(&self) -> Result<()> {
        let limits = &self.limits;
        if limits.low_watermark >= limits.high_watermark {
            return Err(Error::option(
                "watermarks",
                format!(
                    "low ({}) must be below high ({})",
                    limits.low_watermark, limits.high_watermark
                ),
            ));
        }
        if limits.output_limit < limits.high_watermark {
            return Err(Error::option(
                "output_limit",
                format!(
                    "{} is below the high watermark ({}), where reading stops; use at least that",
                    limits.output_limit, limits.high_watermark
                ),
            ));
        }
        if limits.max_frame == Some(0) {
            return Err(Error::option("max_frame", "0 admits no frame; use at least 1"));
        }
        let timeouts = [
            ("handshake_timeout", limits.handshake_timeout),
            ("frame_timeout", limits.frame_timeout),
            ("idle_timeout", limits.idle_timeout),
            ("write_timeout", limits.write_timeout),
        ];
        for (option, timeout) in timeouts {
            if timeout.is_zero() {
                return Err(Error::option(
                    option,
                    "zero would close every connection at once; use Duration::MAX for never",
                ));
            }
        }
        if let AtCapacity::Refuse { farewell } = &self.at_capacity {
            if farewell.len() > 4096 {
                return Err(Error::option("at_capacity", "a farewell has at most 4096 bytes"));
            }
        }
        if self.name.as_deref() == Some("") {
            return Err(Error::option("name", "a name has at least one character"));
        }
        self.socket.check()
    }

    /// Whether a port that is open with these options can go on with `next`, which differs in none that belong to the socket.
    pub(crate) fn check_change(&self, next: &Self) -> Result<()> {
        let (socket, wanted) = (&self.socket, &next.socket);
        let changed = [
            ("tcp", self.addrs != next.addrs),
            ("name", self.name != next.name),
            // Clients of the one find nobody to talk to in the other, and nobody is to lose TLS by an oversight.
            ("tls", self.tls.is_some() != next.tls.is_some()),
            ("backlog", socket.backlog != wanted.backlog),
            ("nodelay", socket.nodelay != wanted.nodelay),
            ("only_v6", socket.only_v6 != wanted.only_v6),
            ("reuse_address", socket.reuse_address != wanted.reuse_address),
            ("reuse_port", socket.reuse_port != wanted.reuse_port),
            ("keepalive", socket.keepalive != wanted.keepalive),
            ("recv_buffer", socket.recv_buffer != wanted.recv_buffer),
            ("send_buffer", socket.send_buffer != wanted.send_buffer),
        ];
        match changed.into_iter().find(|(_, changed)| *changed) {
            Some((option, _)) => Err(Error::option(
                option,
                "an open port cannot change it: close the listener and listen again",
            )),
            None => Ok(()),
        }
    }

    /// The addresses to try, in order.
    pub(crate) fn resolved(&self) -> Result<&[SocketAddr]> {
        match &self.addrs {
            Ok(addrs) if addrs.is_empty() => Err(Error::Address {
                given: "the listener".to_owned(),
                source: io::Error::new(io::ErrorKind::InvalidInput, "no address given"),
            }),
            Ok(addrs) => Ok(addrs),
            Err((given, kind, text)) => Err(Error::Address {
                given: given.clone(),
                source: io::Error::new(*kind, text.clone()),
            }),
        }
    }
}

impl fmt::Debug for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Listen")
            .field("addrs", &self.addrs)
            .field("name", &self.name)
            .field("framing", &self.framing)
            .field("tls", &self.tls)
            .field("limits", &self.limits)
            .field("max_connections", &self.max_connections)
            .field("at_capacity", &self.at_capacity)
            .field("socket", &self.socket)
            .finish()
    }
}
