//! The options of a listener, each with its unit and default.

pub(crate) mod check;
mod socket;

use std::fmt;
use std::io;
use std::net::ToSocketAddrs;
use std::path::Path;
use std::time::Duration;

pub use socket::Keepalive;
pub(crate) use socket::SocketOptions;

use crate::access::{AccessRules, Brief};
use crate::addr::{Addr, UnixAddr};
use crate::config::AtCapacity;
use crate::error::{Error, Result};
use crate::proto::{Framing, Limits, Rate, TlsConfig};

/// One listener: where, in which framing, under which limits.
///
/// Each option says when a change of it through
/// [`Control::reconfigure_listener`](crate::Control::reconfigure_listener) takes effect. *Live*: at once. *Next connection*: for
/// connections accepted from then on. *Next listen*: an open port cannot change it, and says so.
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
    pub(crate) addrs: std::result::Result<Vec<Addr>, (String, io::ErrorKind, String)>,
    pub(crate) name: Option<String>,
    pub(crate) framing: Framing,
    pub(crate) tls: Option<TlsConfig>,
    pub(crate) limits: Limits,
    pub(crate) max_connections: Option<usize>,
    pub(crate) at_capacity: AtCapacity,
    pub(crate) access: AccessRules,
    pub(crate) proxy: ProxyProtocol,
    pub(crate) trusted: Option<AccessRules>,
    pub(crate) accept_rate: Option<Rate>,
    pub(crate) sources: SourceLimits,
    pub(crate) socket: SocketOptions,
}

/// Whether peers begin with a header that says for whom they speak: the PROXY protocol, version 1 or 2 (haproxy,
/// `doc/proxy-protocol.txt`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ProxyProtocol {
    /// No header is looked for. One that comes is the client's first bytes, like any others.
    #[default]
    Off,
    /// Only trusted proxies may connect, and each must begin with a header. The rule for a port that proxies alone use.
    Required,
    /// Trusted proxies may begin with a header, anybody may connect without one. The specification advises against it, because
    /// who can reach the port as a trusted proxy may lie; and a client of a protocol in which the server speaks first waits
    /// for it until the handshake timeout if it comes from a trusted address.
    Optional,
}

/// Limits for each source of connections: an address, or the network that it is in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SourceLimits {
    pub(crate) rate: Option<Rate>,
    pub(crate) connections: Option<usize>,
    /// Bits of an IPv4 and of an IPv6 address that make a source.
    pub(crate) prefixes: (u8, u8),
}

impl Default for SourceLimits {
    fn default() -> Self {
        Self {
            rate: None,
            connections: None,
            prefixes: (32, 64),
        }
    }
}

impl Listen {
    /// Listens on a TCP address: `"127.0.0.1:2222"`, `("::1", 2222)`, a `SocketAddr`. Port 0 lets the system choose;
    /// ask [`Server::listeners`](crate::Server::listeners) for the real one. A name that resolves to
    /// several addresses takes the first that can be bound. A bad address is reported by `listen`.
    pub fn tcp(addr: impl ToSocketAddrs + fmt::Debug) -> Self {
        let addrs = match addr.to_socket_addrs() {
            Ok(found) => Ok(found.map(Addr::from).collect()),
            Err(error) => Err((format!("{addr:?}"), error.kind(), error.to_string())),
        };
        Self::with(addrs)
    }

    /// Listens on a Unix socket, at this path (`unix(7)`). Options of TCP mean nothing here.
    ///
    /// What is at the path already is removed if it is a socket that refuses connections: its server was killed. A
    /// socket that somebody serves is [`Error::AddressInUse`](crate::Error::AddressInUse), and any other file is an error too.
    /// The file is removed when the listener closes, if it is still the one that was made and was not handed over
    /// ([`Control::listener_socket`](crate::Control::listener_socket)).
    ///
    /// ```
    /// # use portcullis::{Framing, Listen};
    /// let listen = Listen::unix("/run/games.sock").mode(0o660).framing(Framing::Line);
    /// # let _ = listen;
    /// ```
    pub fn unix(path: impl AsRef<Path>) -> Self {
        Self::with(Ok(vec![UnixAddr::pathname(path.as_ref()).into()]))
    }

    /// Listens on a Unix socket with a name in Linux's abstract namespace, which has neither files nor permissions:
    /// whoever shares the network namespace can connect. See [`Conn::credentials`](crate::Conn::credentials).
    #[cfg(any(target_os = "linux", target_os = "android"))]
    pub fn unix_abstract(name: impl AsRef<[u8]>) -> Self {
        Self::with(Ok(vec![UnixAddr::abstract_name(name.as_ref()).into()]))
    }

    /// For a socket that is listening already: see [`Server::adopt`](crate::Server::adopt). Address and socket options
    /// are the socket's own; those set here are ignored.
    pub fn adopted() -> Self {
        Self::with(Ok(Vec::new()))
    }

    fn with(addrs: std::result::Result<Vec<Addr>, (String, io::ErrorKind, String)>) -> Self {
        Self {
            addrs,
            name: None,
            framing: Framing::default(),
            tls: None,
            limits: default_limits(),
            max_connections: None,
            at_capacity: AtCapacity::default(),
            access: AccessRules::default(),
            proxy: ProxyProtocol::Off,
            trusted: None,
            accept_rate: None,
            sources: SourceLimits::default(),
            socket: SocketOptions::default(),
        }
    }

    /// The listener's name, unique in its server. Defaults to `portcullis_PORT` with the real port, and to
    /// `portcullis_FILE` with the name of a Unix socket's file. *Next listen.*
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// How the stream is cut into frames. Defaults to [`Framing::Packet2`]. *Next connection.*
    pub fn framing(mut self, framing: Framing) -> Self {
        self.framing = framing;
        self
    }

    /// The longest payload accepted, in bytes; a line counts its delimiter. A longer one closes the connection on its
    /// header alone. Defaults to what the header can say for packet-1 and packet-2, 8 MiB for packet-4, 64 KiB for
    /// lines and custom framings. Raw has none, and a packet's header cannot say more than it can. *Next connection.*
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
    /// ([`Stats::closed`](crate::Stats::closed)) and told to [`Service::on_failed_accept`](crate::Service::on_failed_accept).
    ///
    /// Early data (0-RTT) is never taken, whatever `max_early_data_size` says, because it can be replayed: clients
    /// send it again after the handshake. *Next connection.*
    #[cfg(feature = "tls")]
    pub fn tls(mut self, config: impl Into<TlsConfig>) -> Self {
        self.tls = Some(config.into());
        self
    }

    /// The most connections of this listener, within the server's cap; `None` is no limit of its own. Defaults to none. *Live.*
    pub fn max_connections(mut self, connections: impl Into<Option<usize>>) -> Self {
        self.max_connections = connections.into();
        self
    }

    /// What becomes of clients that come when the cap is reached. Defaults to [`AtCapacity::Wait`]. *Live.*
    pub fn at_capacity(mut self, policy: AtCapacity) -> Self {
        self.at_capacity = policy;
        self
    }

    /// Who may connect, by address. Checked before anything is spent on a peer: no slot, no TLS, no call of the service but
    /// [`Service::on_failed_accept`](crate::Service::on_failed_accept). Who is denied is closed as
    /// [`Denied`](crate::CloseReason::Denied). Defaults to everybody. *Live*:
    /// [`Control::set_access_rules`](crate::Control::set_access_rules).
    pub fn access_rules(mut self, rules: AccessRules) -> Self {
        self.access = rules;
        self
    }

    /// Whether peers begin with a PROXY header. With [`ProxyProtocol::Required`] and [`ProxyProtocol::Optional`] say whom you
    /// trust: [`Listen::trusted_proxies`]. The header comes before TLS, within the handshake timeout; one of more than 16 KiB,
    /// or one that is not right to the letter, closes the connection as
    /// [`BadProxyHeader`](crate::CloseReason::BadProxyHeader). The service is asked when the header has come, so that
    /// [`Peer::proxy`](crate::Peer::proxy) is known; source limits are then asked about the header's source.
    /// [`Listen::access_rules`] are asked twice: about the proxy when it connects, and about the header's source. An allow-list
    /// of clients has to allow the proxies too. Defaults to [`ProxyProtocol::Off`]. *Next connection.*
    ///
    /// ```
    /// use portcullis::{AccessRules, Listen, ProxyProtocol};
    ///
    /// # fn main() -> portcullis::Result<()> {
    /// let listen = Listen::tcp("0.0.0.0:8080")
    ///     .proxy_protocol(ProxyProtocol::Required)
    ///     .trusted_proxies(AccessRules::deny_all().allow("10.0.0.0/8")?);
    /// # let _ = listen; Ok(()) }
    /// ```
    pub fn proxy_protocol(mut self, mode: ProxyProtocol) -> Self {
        self.proxy = mode;
        self
    }

    /// Who may speak for others, by the address of the TCP peer. What anybody else says in a header is not believed: where one
    /// is required they are closed as [`Denied`](crate::CloseReason::Denied), else no header is looked for. No default:
    /// `AccessRules::allow_all()` trusts everybody who can reach the port. Who comes through a Unix socket has no address and is
    /// trusted: the file's permissions decide. *Live.*
    pub fn trusted_proxies(mut self, proxies: AccessRules) -> Self {
        self.trusted = Some(proxies);
        self
    }

    /// The most connections accepted per second; `None` is no limit. Over it [`Listen::at_capacity`] decides: clients wait in
    /// the backlog, or are refused as [`RateLimited`](crate::CloseReason::RateLimited). Nothing is counted for a client that
    /// has gone again while it waited ([`ClosedEarly`](crate::CloseReason::ClosedEarly)). Defaults to no limit. *Live.*
    pub fn accept_rate(mut self, rate: impl Into<Option<Rate>>) -> Self {
        self.accept_rate = rate.into();
        self
    }

    /// The most connections per second of one source; `None` is no limit. Who comes faster is closed as
    /// [`SourceLimited`](crate::CloseReason::SourceLimited). Behind a trusted proxy the header's source counts. At most 65 536
    /// sources are told apart; while there are more at one time, the others share one rate and one limit. Defaults to no limit.
    /// *Live.*
    pub fn source_rate(mut self, rate: impl Into<Option<Rate>>) -> Self {
        self.sources.rate = rate.into();
        self
    }

    /// The most connections of one source at one time; `None` is no limit. Else as [`Listen::source_rate`], but that
    /// connections which are there when the first limit is set are not counted. *Live.*
    pub fn source_connections(mut self, connections: impl Into<Option<usize>>) -> Self {
        self.sources.connections = connections.into();
        self
    }

    /// What one source is: addresses that have so many first bits in common. Defaults to 32 bits of an IPv4 address and 64 of
    /// an IPv6 address, because a household or a host has 2⁶⁴ of those. *Next listen.*
    pub fn source_prefixes(mut self, ipv4: u8, ipv6: u8) -> Self {
        self.sources.prefixes = (ipv4, ipv6);
        self
    }

    /// Bytes per second read from each connection, on the wire; `None` is no limit. Above it reading pauses: nothing is lost,
    /// the peer is slowed down by TCP, and its idle and frame clocks stand. Defaults to no limit. *Next connection.*
    pub fn read_rate(mut self, rate: impl Into<Option<Rate>>) -> Self {
        self.limits.read_rate = rate.into();
        self
    }

    /// Frames per second delivered of each connection; `None` is no limit. Else as [`Listen::read_rate`]. With
    /// [`Framing::Raw`] each piece counts. *Next connection.*
    pub fn frame_rate(mut self, rate: impl Into<Option<Rate>>) -> Self {
        self.limits.frame_rate = rate.into();
        self
    }

    /// Bytes per second read from all connections of this listener together, shared evenly among those that have something
    /// to say; `None` is no limit. Else as [`Listen::read_rate`]. *Live* where there was such a rate before, else *next connection*.
    pub fn total_read_rate(mut self, rate: impl Into<Option<Rate>>) -> Self {
        self.limits.total_read_rate = rate.into();
        self
    }

    /// Frames per second delivered of all connections of this listener together. Else as [`Listen::total_read_rate`].
    /// *Live where there was such a rate before, else next connection.*
    pub fn total_frame_rate(mut self, rate: impl Into<Option<Rate>>) -> Self {
        self.limits.total_frame_rate = rate.into();
        self
    }

    /// From accept to open: PROXY header and TLS handshake must be done by then. It is also the time for a handshake that
    /// `Conn::start_tls` begins, from there. Defaults to 10 s; `Duration::MAX` is never.
    /// *Next connection.*
    pub fn handshake_timeout(mut self, timeout: Duration) -> Self {
        self.limits.handshake_timeout = timeout;
        self
    }

    /// From the first byte of a frame to its last. Defaults to 30 s; `Duration::MAX` is never. *Next connection.*
    pub fn frame_timeout(mut self, timeout: Duration) -> Self {
        self.limits.frame_timeout = timeout;
        self
    }

    /// The longest silence of the peer. Only bytes from the peer count, and the clock stands while we do not read.
    /// Defaults to 120 s; `Duration::MAX` is never. *Next connection.*
    pub fn idle_timeout(mut self, timeout: Duration) -> Self {
        self.limits.idle_timeout = timeout;
        self
    }

    /// The longest time in which the peer takes no byte of what waits for it. Defaults to 30 s; `Duration::MAX` is never.
    /// *Next connection.*
    pub fn write_timeout(mut self, timeout: Duration) -> Self {
        self.limits.write_timeout = timeout;
        self
    }

    /// How long, and how many bytes, input is discarded after our FIN while we wait for the peer's, so that closing
    /// does not reset the connection under bytes the peer has not read yet. Defaults to 2 s and 16 MiB.
    /// *Next connection.*
    pub fn linger(mut self, timeout: Duration, bytes: usize) -> Self {
        self.limits.linger_timeout = timeout;
        self.limits.linger_bytes = bytes;
        self
    }

    /// Reading from a connection stops when `high` bytes wait for its peer and goes on at `low`.
    /// Defaults to 32 KiB and 128 KiB. `low` must be below `high`. *Next connection.*
    pub fn watermarks(mut self, low: usize, high: usize) -> Self {
        self.limits.low_watermark = low;
        self.limits.high_watermark = high;
        self
    }

    /// `send` fails while this many bytes wait for the peer; a frame that is begun below the limit is taken whole.
    /// Defaults to 1 MiB; at least the high watermark. *Next connection.*
    pub fn output_limit(mut self, bytes: usize) -> Self {
        self.limits.output_limit = bytes;
        self
    }

    /// Whether reading goes on although [`Listen::watermarks`] says that enough waits for the peer: for what is no answer to what
    /// is read, as in a proxy, where the two directions must not wait for each other. Then look at
    /// [`Conn::is_congested`](crate::Conn::is_congested) before you send more. Defaults to false. *Next connection.*
    pub fn full_duplex(mut self, on: bool) -> Self {
        self.limits.full_duplex = on;
        self
    }

    /// Connections that the kernel keeps waiting for accept. Defaults to 1024. The kernel caps it silently
    /// (`net.core.somaxconn` on Linux, 4096 since 5.4), see `listen(2)`. *Next listen.*
    pub fn backlog(mut self, connections: u32) -> Self {
        self.socket.backlog = connections;
        self
    }

    /// The permissions of a Unix socket's file, as in `0o660`: who may write to it may connect, on Linux. In force before
    /// anybody can connect. Defaults to what the process's umask leaves. *Next listen.*
    pub fn mode(mut self, mode: u32) -> Self {
        self.socket.mode = Some(mode);
        self
    }

    /// TCP_NODELAY: send small frames at once. Defaults to true. *Next listen.*
    pub fn nodelay(mut self, on: bool) -> Self {
        self.socket.nodelay = on;
        self
    }

    /// IPV6_V6ONLY: an IPv6 listener takes no IPv4 clients. Set explicitly, whatever the system's default. Defaults to true;
    /// with false, IPv4 peers show as `::ffff:a.b.c.d`. *Next listen.*
    pub fn only_v6(mut self, on: bool) -> Self {
        self.socket.only_v6 = on;
        self
    }

    /// SO_REUSEADDR: a restarted server binds although old connections are in TIME_WAIT. Defaults to true.
    /// *Next listen.*
    pub fn reuse_address(mut self, on: bool) -> Self {
        self.socket.reuse_address = on;
        self
    }

    /// SO_REUSEPORT: several sockets share the port, and on Linux the kernel spreads clients over them by a hash of their addresses,
    /// also over those that nobody accepts from at the moment. In [`Shards`](crate::Shards): a queue for each shard instead of one for
    /// all. Defaults to false. *Next listen.*
    pub fn reuse_port(mut self, on: bool) -> Self {
        self.socket.reuse_port = on;
        self
    }

    /// SO_KEEPALIVE with these times. Defaults to off. *Next listen.*
    pub fn keepalive(mut self, keepalive: Keepalive) -> Self {
        self.socket.keepalive = Some(keepalive);
        self
    }

    /// SO_RCVBUF of each connection, in bytes. Defaults to the system's automatic size. Not for Unix sockets: what waits
    /// there is in the sender's buffer. *Next listen.*
    pub fn recv_buffer(mut self, bytes: usize) -> Self {
        self.socket.recv_buffer = Some(bytes);
        self
    }

    /// SO_SNDBUF of each connection, in bytes. Defaults to the system's automatic size. *Next listen.*
    pub fn send_buffer(mut self, bytes: usize) -> Self {
        self.socket.send_buffer = Some(bytes);
        self
    }

    /// Whether connections of this listener have a life before they are open.
    pub(crate) fn opens_later(&self) -> bool {
        self.tls.is_some() || self.proxy != ProxyProtocol::Off
    }

    /// The addresses to try, in order.
    pub(crate) fn resolved(&self) -> Result<&[Addr]> {
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

/// Those of every connection, whoever made it.
pub(crate) fn default_limits() -> Limits {
    Limits {
        handshake_timeout: Duration::from_secs(10),
        frame_timeout: Duration::from_secs(30),
        idle_timeout: Duration::from_secs(120),
        write_timeout: Duration::from_secs(30),
        linger_timeout: Duration::from_secs(2),
        linger_bytes: 16 * 1024 * 1024,
        high_watermark: 128 * 1024,
        low_watermark: 32 * 1024,
        output_limit: 1024 * 1024,
        full_duplex: false,
        max_frame: None,
        read_rate: None,
        frame_rate: None,
        total_read_rate: None,
        total_frame_rate: None,
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
            .field("access", &Brief(&self.access))
            .field("proxy", &self.proxy)
            .field("trusted", &self.trusted.as_ref().map(Brief))
            .field("accept_rate", &self.accept_rate)
            .field("sources", &self.sources)
            .field("socket", &self.socket)
            .finish()
    }
}
