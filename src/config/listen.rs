//! The options of a listener, each with its unit and default.

use std::fmt;
use std::io;
use std::net::ToSocketAddrs;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use super::SocketOptions;
use crate::access::{AccessRules, Brief};
use crate::addr::{Addr, UnixAddr};
use crate::error::{Error, Result};
use crate::proto::{ConnConfig, Framing, Rate, TlsConfig};

/// The addresses of a listener; or the given text, and why it names none.
pub(super) type Addrs = std::result::Result<Vec<Addr>, (String, io::ErrorKind, String)>;

/// Options of one listener: its address, its framing, its limits.
///
/// Each option says when a change of it through
/// [`Control::reconfigure_listener`](crate::Control::reconfigure_listener) takes effect. *Live*: at
/// once. *Next connection*: for connections accepted from then on. *Next listen*: an open port
/// cannot change it, and the change is an error.
///
/// ```
/// use std::time::Duration;
/// use portcullis::{AtCapacity, Framing, Listen};
///
/// let mut listen = Listen::tcp("127.0.0.1:0", Framing::Line).name("games");
/// listen.conn.max_frame = Some(512);
/// listen.conn.idle_timeout = Duration::from_secs(30);
/// listen.at_capacity = AtCapacity::Refuse { farewell: b"full, try later\n".to_vec() };
/// ```
#[derive(Clone)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(
    feature = "serde",
    serde(default = "Listen::nowhere", deny_unknown_fields)
)]
#[must_use]
#[non_exhaustive]
pub struct Listen {
    #[cfg_attr(feature = "serde", serde(with = "super::data::addrs"))]
    pub(crate) addrs: Addrs,
    /// The socket to take over, until then.
    #[cfg_attr(feature = "serde", serde(skip))]
    pub(crate) adopted: Option<Arc<OwnedFd>>,
    #[cfg_attr(feature = "serde", serde(skip))]
    pub(crate) tls: Option<TlsConfig>,
    pub(crate) name: Option<String>,
    /// A drain closes it behind all others, so that it shows the drain.
    #[cfg_attr(feature = "serde", serde(skip))]
    pub(crate) closes_last: bool,
    /// How the stream is cut into frames. *Next connection.*
    pub framing: Framing,
    /// Options of each connection: timeouts, limits, rates. *Next connection.*
    pub conn: ConnConfig,
    /// Options of the sockets. *Next listen.*
    pub socket: SocketOptions,
    /// Maximum number of connections of this listener, within the server's cap; `None` is no limit
    /// of its own. Lowering it closes no connection. Defaults to none. *Live.*
    #[doc(alias = "connection limit")]
    pub max_connections: Option<usize>,
    /// Number of slots that the server keeps free for this listener, out of its cap
    /// ([`Config::max_connections`](crate::Config::max_connections)): other connections get only
    /// the remainder. Its connections take these slots first. For the port of an operator, which
    /// must answer while the server is full.
    ///
    /// Slots that are taken already are reserved when they become free; no connection is closed for
    /// it. No more than [`Listen::max_connections`] are reserved. If they are all of the cap, other
    /// listeners get none. With [`Shards`](crate::Shards) each shard reserves as many. Turn
    /// [`Listen::evict_silent`] off, or silent connections of this listener are evicted for others
    /// all the same. Defaults to 0. *Live.*
    pub reserved: usize,
    /// Policy for clients that connect while a cap or an accept rate is reached. Defaults to
    /// [`AtCapacity::Wait`]. *Live.*
    pub at_capacity: AtCapacity,
    /// Whether a connection of this listener may be evicted at the cap before it has sent its first
    /// whole frame. Defaults to true.
    ///
    /// At the server's cap the oldest such connection is evicted for the next client of any
    /// listener ([`Evicted`](crate::CloseReason::Evicted)). At this listener's own limit
    /// ([`Listen::max_connections`]) it is the oldest of this listener. It must be older than
    /// [`PendingLimits::grace`](crate::PendingLimits::grace), and its peer must be the side that
    /// keeps the server waiting: it sends nothing, or does not read what it was sent first. A
    /// connection stays if its handler or a rate pauses it, or if the server owes it a reply
    /// ([`Conn::hold`](crate::Conn::hold)); after that it is among the youngest. So silent
    /// connections cannot keep others out until the idle timeout.
    ///
    /// Turn it off for protocols whose clients may be silent for longer than the grace: subscribers
    /// that only listen, people who answer a prompt. Then a client that has finished without a byte
    /// while it waited in the backlog is served too
    /// ([`ClosedEarly`](crate::CloseReason::ClosedEarly)). With
    /// [`Framing::Raw`](crate::Framing::Raw) the first byte is a frame. *Next connection*. A change
    /// also applies to connections in a handshake, and to all once the listener's own limit is
    /// first set.
    pub evict_silent: bool,
    /// Addresses that may connect. A denied peer takes no slot, begins no TLS, and reaches the
    /// service only as [`Service::on_failed_accept`](crate::Service::on_failed_accept).
    ///
    /// The reason is [`Denied`](crate::CloseReason::Denied). Rules that were there before a change
    /// keep their counts. Defaults to every address. *Live.*
    pub access_rules: AccessRules,
    /// Whether peers begin with a PROXY header. With [`ProxyProtocol::Required`] and
    /// [`ProxyProtocol::Optional`] name the proxies you trust: [`Listen::trusted_proxies`].
    ///
    /// The header comes before TLS, within the handshake timeout. One of more than 16 KiB, or one
    /// with any error, closes the connection as
    /// [`BadProxyHeader`](crate::CloseReason::BadProxyHeader). The service is called after the
    /// header, so that [`Peer::proxy`](crate::Peer::proxy) is known; source limits then apply to
    /// the header's source. A header without an internet address (UNKNOWN, LOCAL, UNSPEC, a Unix
    /// socket) makes the proxy's own address the source.
    ///
    /// [`Listen::access_rules`] are applied twice: to the proxy when it connects, and to the
    /// header's source. So an allow-list of clients must also allow the proxies. Defaults to
    /// [`ProxyProtocol::Off`]. *Next connection.*
    ///
    /// ```
    /// use portcullis::{AccessRules, Framing, Listen, ProxyProtocol};
    ///
    /// # fn main() -> portcullis::Result<()> {
    /// let mut listen = Listen::tcp("0.0.0.0:8080", Framing::Line);
    /// listen.proxy_protocol = ProxyProtocol::Required;
    /// listen.trusted_proxies = Some(AccessRules::deny_all().allow("10.0.0.0/8")?);
    /// # Ok(()) }
    /// ```
    pub proxy_protocol: ProxyProtocol,
    /// Addresses of TCP peers whose PROXY headers are believed. Other peers are closed as
    /// [`Denied`](crate::CloseReason::Denied) where a header is required; elsewhere their bytes are
    /// input.
    ///
    /// There is no default: `AccessRules::allow_all()` trusts every host that can reach the port. A
    /// peer on a Unix socket has no address and is trusted: the file's permissions decide. *Live.*
    pub trusted_proxies: Option<AccessRules>,
    /// Maximum number of connections accepted per second; `None` is no limit.
    ///
    /// Above it [`Listen::at_capacity`] decides: clients wait in the backlog, or are refused as
    /// [`RateLimited`](crate::CloseReason::RateLimited). A client that left while it waited
    /// ([`ClosedEarly`](crate::CloseReason::ClosedEarly)) does not count. Defaults to no limit.
    /// *Live.*
    #[doc(alias = "rate limit")]
    pub accept_rate: Option<Rate>,
    /// Limits for each source of connections. Defaults to none. *Live*, except for the prefixes.
    pub source_limits: SourceLimits,
    /// Maximum bytes per second read from all connections of this listener together, shared evenly
    /// among those with input; `None` is no limit. Otherwise like [`ConnConfig::read_rate`].
    /// Defaults to no limit. *Live* if there was such a rate before, else *next connection*.
    pub total_read_rate: Option<Rate>,
    /// Maximum frames per second delivered from all connections of this listener together.
    /// Otherwise like [`Listen::total_read_rate`].
    pub total_frame_rate: Option<Rate>,
}

/// Policy for a client that connects while a cap is reached: the server's, the listener's, that of
/// pending connections, or an accept rate.
///
/// Both policies evict a connection first, if one can be evicted: see [`Listen::evict_silent`] and
/// [`PendingLimits`](crate::PendingLimits).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(
    feature = "serde",
    serde(rename_all = "snake_case", deny_unknown_fields)
)]
#[non_exhaustive]
pub enum AtCapacity {
    /// The client waits in the kernel's accept queue (the backlog) until it can be admitted. The
    /// listener leaves the poll meanwhile.
    #[default]
    Wait,
    /// The client is accepted, sent `farewell`, and closed at once: as
    /// [`AtCapacity`](crate::CloseReason::AtCapacity) or
    /// [`RateLimited`](crate::CloseReason::RateLimited). This takes one descriptor for a moment.
    /// The farewell is unframed and in the clear, also on a TLS listener. Bytes that the socket
    /// does not take at once are lost.
    Refuse {
        /// Bytes sent before the close, at most 4 KiB; none if empty.
        #[cfg_attr(feature = "serde", serde(with = "super::data::bytes"))]
        farewell: Vec<u8>,
    },
}

/// Whether peers begin with a header that names the client they forward: the PROXY protocol,
/// version 1 or 2 (haproxy, `doc/proxy-protocol.txt`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(
    feature = "serde",
    serde(rename_all = "snake_case", deny_unknown_fields)
)]
#[non_exhaustive]
pub enum ProxyProtocol {
    /// No header is expected. If a peer sends one, its bytes are input like any other.
    #[default]
    Off,
    /// Only trusted proxies may connect, and each must begin with a header. For a port that only
    /// proxies use.
    Required,
    /// Trusted proxies may begin with a header; other peers connect without one.
    ///
    /// The specification advises against it: a peer that can connect from a trusted address can
    /// forge its source. If the server speaks first, a client at a trusted address that sends
    /// nothing ends as [`HandshakeTimeout`](crate::CloseReason::HandshakeTimeout).
    Optional,
}

/// Limits for each source of connections: an address, or the network that contains it.
///
/// A connection above a limit is closed as [`SourceLimited`](crate::CloseReason::SourceLimited).
/// Behind a trusted proxy the header's source counts. Without an internet address in the header, as
/// in a health check, the proxy's own address counts. A peer of a Unix socket that names no
/// internet address has no source, and no limit. At most 65,536 sources are counted apart; further
/// ones share one rate and one limit.
///
/// ```
/// use portcullis::{Framing, Listen, Rate};
/// let mut listen = Listen::tcp("127.0.0.1:0", Framing::Line);
/// listen.source_limits.connections = Some(8);
/// listen.source_limits.rate = Some(Rate::per_second(2).burst(10));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default, deny_unknown_fields))]
#[non_exhaustive]
pub struct SourceLimits {
    /// Maximum number of connections per second; `None` is no limit. Defaults to no limit. *Live.*
    pub rate: Option<Rate>,
    /// Maximum number of concurrent connections, at least 1; `None` is no limit. Connections
    /// accepted before the first limit was set are not counted. Defaults to no limit. *Live.*
    pub connections: Option<usize>,
    /// Number of leading bits of an IPv4 and of an IPv6 address that make a source: 1 to 32, and 1
    /// to 128. Defaults to 32 and 64, because a household or a host has 2⁶⁴ IPv6 addresses. *Next
    /// listen.*
    pub prefixes: (u8, u8),
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
    /// Listens on a TCP address: `"127.0.0.1:2222"`, `("::1", 2222)`, a `SocketAddr`.
    ///
    /// Port 0 lets the system choose; [`Control::listener`](crate::Control::listener) returns the
    /// real one. A host name is looked up by this call, which may block. Of several addresses the
    /// first that can be bound is used. An invalid address is an error of `listen`.
    pub fn tcp(addr: impl ToSocketAddrs + fmt::Debug, framing: Framing) -> Self {
        let addrs = match addr.to_socket_addrs() {
            Ok(found) => Ok(found.map(Addr::from).collect()),
            Err(error) => Err((format!("{addr:?}"), error.kind(), error.to_string())),
        };
        Self::new(addrs, framing)
    }

    /// Listens on a Unix socket, at this path (`unix(7)`). Options of TCP have no effect.
    ///
    /// A socket file that refuses connections is removed first: its server was killed. A socket in
    /// use is [`Error::AddressInUse`](crate::Error::AddressInUse), and any other file is an error
    /// too. The file is removed when the listener closes, unless it was replaced or handed over
    /// ([`Control::listener_socket`](crate::Control::listener_socket)).
    ///
    /// Of several servers that start at the same moment one gets the path. For that each locks the
    /// folder while it starts (`flock(2)`; Linux, Android, FreeBSD, DragonFly, Apple's systems). If
    /// another process keeps the folder locked, `listen` blocks for a second and goes on without
    /// the lock.
    ///
    /// ```
    /// # use portcullis::{Framing, Listen};
    /// let mut listen = Listen::unix("/run/games.sock", Framing::Line);
    /// listen.socket.mode = Some(0o660);
    /// ```
    pub fn unix(path: impl AsRef<Path>, framing: Framing) -> Self {
        Self::at(vec![UnixAddr::pathname(path.as_ref()).into()], framing)
    }

    /// Listens on a Unix socket with a name in Linux's abstract namespace, which has neither files
    /// nor permissions. Every process in the network namespace can connect: see
    /// [`Conn::credentials`](crate::Conn::credentials).
    #[cfg(any(target_os = "linux", target_os = "android"))]
    pub fn unix_abstract(name: impl AsRef<[u8]>, framing: Framing) -> Self {
        Self::at(vec![UnixAddr::abstract_name(name.as_ref()).into()], framing)
    }

    /// Takes over a socket that is listening already, TCP or Unix: inherited, or handed over by
    /// systemd or by another server
    /// ([`Control::listener_socket`](crate::Control::listener_socket)).
    ///
    /// Address and socket options stay as they are; [`Listen::socket`] has no effect. The socket is
    /// made non-blocking and close-on-exec. Another process that has the socket too must leave it
    /// non-blocking ([`Control::listener_socket`](crate::Control::listener_socket)). The file of a
    /// Unix socket belongs to its maker, and stays when the listener closes. A socket that is not
    /// usable is an error of `listen` ([`Error::Os`](crate::Error::Os)).
    ///
    /// ```
    /// # use portcullis::{Config, Context, Framing, Handler, Listen, Outcome, Server};
    /// # struct Echo;
    /// # impl Handler for Echo {
    /// #     fn on_frame(&mut self, cx: &mut Context<'_>, frame: &[u8]) -> Outcome {
    /// #         cx.conn.send(frame)?;
    /// #         Ok(())
    /// #     }
    /// # }
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let socket = std::net::TcpListener::bind("127.0.0.1:0")?;
    /// let mut server: Server = Server::new(Config::new())?;
    /// server.listen(Listen::adopted(socket, Framing::Line), |_app, _peer| Echo)?;
    /// # Ok(()) }
    /// ```
    pub fn adopted(socket: impl Into<OwnedFd>, framing: Framing) -> Self {
        let mut listen = Self::at(Vec::new(), framing);
        listen.adopted = Some(Arc::new(socket.into()));
        listen
    }

    pub(super) fn at(addrs: Vec<Addr>, framing: Framing) -> Self {
        Self::new(Ok(addrs), framing)
    }

    fn new(addrs: Addrs, framing: Framing) -> Self {
        Self {
            addrs,
            adopted: None,
            tls: None,
            name: None,
            closes_last: false,
            framing,
            conn: ConnConfig::default(),
            socket: SocketOptions::default(),
            max_connections: None,
            reserved: 0,
            at_capacity: AtCapacity::default(),
            evict_silent: true,
            access_rules: AccessRules::default(),
            proxy_protocol: ProxyProtocol::Off,
            trusted_proxies: None,
            accept_rate: None,
            source_limits: SourceLimits::default(),
            total_read_rate: None,
            total_frame_rate: None,
        }
    }

    /// Changes options, within an expression.
    pub fn with(mut self, set: impl FnOnce(&mut Self)) -> Self {
        set(&mut self);
        self
    }

    /// Sets the listener's name: unique in its server, not empty, without control characters.
    /// Defaults to the full address with the real port, as in `127.0.0.1:2222`, `[::1]:2222` or
    /// `unix:/run/games.sock`. *Next listen.*
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// Speaks TLS 1.2 and 1.3 with this configuration, or chooses one for each client: an
    /// `Arc<ServerConfig>`, [`ServerNames`](crate::tls::ServerNames) or
    /// [`TlsConfig::choose`](crate::tls::TlsConfig::choose). Defaults to plain TCP; for STARTTLS
    /// keep that default, and see [`Conn::start_tls`](crate::Conn::start_tls).
    ///
    /// A failed handshake is logged at debug level, counted
    /// ([`Stats::closed`](crate::Stats::closed)) and reported to
    /// [`Service::on_failed_accept`](crate::Service::on_failed_accept).
    ///
    /// Early data (0-RTT) is never taken, whatever `max_early_data_size` says, because it can be
    /// replayed: clients send it again after the handshake. *Next connection*, by
    /// [`Control::set_tls`](crate::Control::set_tls). A plain listener cannot begin TLS.
    #[cfg(feature = "tls")]
    pub fn tls(mut self, config: impl Into<TlsConfig>) -> Self {
        self.tls = Some(config.into());
        self
    }

    /// Whether connections of this listener have a state before they are open.
    pub(crate) fn opens_later(&self) -> bool {
        self.tls.is_some() || self.proxy_protocol != ProxyProtocol::Off
    }

    /// Returns the option that gave the address.
    pub(super) fn addr_option(&self) -> &'static str {
        let addr = self.addrs.as_ref().ok().and_then(|addrs| addrs.first());
        match addr.and_then(Addr::as_unix) {
            Some(name) if name.as_abstract_name().is_some() => "unix_abstract",
            Some(_) => "unix",
            None => "tcp",
        }
    }

    /// Maximum number of clients in the backlog, as far as is known.
    pub(crate) fn max_backlog(&self) -> usize {
        /// Linux's default of `net.core.somaxconn`, for a socket that was adopted.
        const SYSTEM: usize = 4096;
        if self.addrs.as_ref().is_ok_and(Vec::is_empty) {
            SYSTEM
        } else {
            usize::try_from(self.socket.backlog).unwrap_or(usize::MAX)
        }
    }

    /// Returns the addresses to try, in order.
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

impl fmt::Debug for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Listen")
            .field("addrs", &self.addrs)
            .field("tls", &self.tls)
            .field("name", &self.name)
            .field("framing", &self.framing)
            .field("conn", &self.conn)
            .field("socket", &self.socket)
            .field("max_connections", &self.max_connections)
            .field("reserved", &self.reserved)
            .field("at_capacity", &self.at_capacity)
            .field("evict_silent", &self.evict_silent)
            .field("access_rules", &Brief(&self.access_rules))
            .field("proxy_protocol", &self.proxy_protocol)
            .field("trusted_proxies", &self.trusted_proxies.as_ref().map(Brief))
            .field("accept_rate", &self.accept_rate)
            .field("source_limits", &self.source_limits)
            .field("total_read_rate", &self.total_read_rate)
            .field("total_frame_rate", &self.total_frame_rate)
            .finish()
    }
}
