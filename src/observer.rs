//! The observer: a page that shows a running server in a browser, served by that server itself.

mod data;
mod feed;
mod guard;
mod http;
mod ranking;
mod session;
mod waiting;

use std::cell::RefCell;
use std::fmt;
use std::net::ToSocketAddrs;
use std::rc::Rc;
use std::time::Duration;

use crate::addr::Addr;
use crate::config::Listen;
use crate::error::{Error, Result};
use crate::handler::{Handler, Peer, Refuse, Service};
use crate::proto::Framing;
use feed::Feed;
use guard::MIN_TOKEN;
use session::{Session, Shared};
use waiting::Waiting;

/// A page that shows the running server in a browser, from the same loop: the server, its listeners
/// and its connections as a tree, rates, close reasons, histograms, alarms. Feature `observer`.
///
/// ```no_run
/// use portcullis::{Config, Context, Framing, Handler, Listen, Observer, Outcome, Server};
/// # struct Echo;
/// # impl Handler for Echo {
/// #     fn on_frame(&mut self, cx: &mut Context<'_>, frame: &[u8]) -> Outcome {
/// #         cx.conn.send(frame)?;
/// #         Ok(())
/// #     }
/// # }
///
/// # fn main() -> portcullis::Result<()> {
/// let mut server: Server = Server::new(Config::max_connections(10_000))?;
/// server.listen(Listen::tcp("127.0.0.1:2222", Framing::Packet2), |_app, _peer| Echo)?;
/// let observer = Observer::new();
/// server.listen_with(observer.listen("127.0.0.1:9222")?, observer)?;
/// server.run(&mut ())
/// # }
/// ```
///
/// Then open <http://127.0.0.1:9222/>. Other programs read `/metrics` (Prometheus), `/tree.json`,
/// `/events` (server-sent events, one snapshot a second) and `/healthz`. The handbook has all names
/// ([`manual::observer`](crate::manual::observer)).
///
/// It is read-only, unless [`Observer::allow_kill`] is called. It serves loopback alone, unless
/// [`Observer::allow_remote`] is called. It answers only requests for hosts that it knows
/// ([`Observer::allow_host`]), so that no web site can read it through a local browser.
///
/// Without a browser that follows the events, it does nothing. With one, it visits all connections
/// once a second, at most 256 slots in one iteration of the loop. A browser that does not read
/// skips snapshots.
///
/// In [`Shards`](crate::Shards) each shard needs an observer, which shows that shard alone; the
/// page names it. Give each shard's listener a port of its own, so that page, `/metrics` and
/// `/tree.json` are always those of the same shard. The sums over all shards are in
/// [`Handle::metrics`](crate::Handle::metrics).
///
/// ```no_run
/// # use portcullis::{Config, Observer, Server, Shards};
/// # fn main() -> portcullis::Result<()> {
/// let shards = Shards::new(Config::new()).spawn(|shard, server: &mut Server| {
///     let observer = Observer::new();
///     let options = observer.listen(("127.0.0.1", 9222 + shard as u16))?;
///     server.listen_with(options, observer)?;
///     Ok(())
/// })?;
/// # Ok(()) }
/// ```
#[must_use]
pub struct Observer {
    hosts: Vec<String>,
    token: Option<String>,
    is_remote: bool,
    shared: Option<Rc<Shared>>,
}

impl Observer {
    /// Makes an observer that is read-only, for loopback.
    #[allow(clippy::new_without_default)] // as `Close::new`: a beginning, not a default
    pub fn new() -> Self {
        Self {
            hosts: Vec::new(),
            token: None,
            is_remote: false,
            shared: None,
        }
    }

    /// Returns the options of a listener for this observer, at a TCP address. It has at most 16
    /// connections, and tight timeouts for slow requests and silence. Four slots of the server's
    /// cap are its own ([`Listen::reserved`]), so that it answers while the server is full. When
    /// all slots are taken, the connection that has waited longest for a request makes room;
    /// streams of events stay. You may change the options, except for the framing.
    ///
    /// A drain closes this listener last: `/healthz` answers `503` until the connections of all
    /// other listeners have ended.
    ///
    /// Over TLS: [`Listen::tls`] of the result. At a Unix socket, whose file's permissions say who
    /// may connect: make a listener there, and take over the options.
    ///
    /// ```no_run
    /// # use portcullis::{Config, Listen, Observer, Server};
    /// # fn main() -> portcullis::Result<()> {
    /// # let mut server: Server = Server::new(Config::new())?;
    /// let observer = Observer::new();
    /// let options = observer.listen("127.0.0.1:0")?;
    /// let mut listen = Listen::unix("/run/games/observer.sock", options.framing);
    /// (listen.conn, listen.reserved) = (options.conn, options.reserved);
    /// listen.max_connections = options.max_connections;
    /// listen.evict_silent = options.evict_silent;
    /// listen.socket.mode = Some(0o600);
    /// server.listen_with(listen, observer)?;
    /// # Ok(()) }
    /// ```
    ///
    /// Then `curl --unix-socket /run/games/observer.sock http://localhost/metrics` reads it.
    ///
    /// # Errors
    ///
    /// [`Error::Address`]: no address. [`Error::Option`]: an address that is not loopback, without
    /// [`Observer::allow_remote`], or a token that is too short.
    pub fn listen(&self, addr: impl ToSocketAddrs + fmt::Debug) -> Result<Listen> {
        if self
            .token
            .as_ref()
            .is_some_and(|token| token.len() < MIN_TOKEN)
        {
            let problem = format!("the token is too short; use at least {MIN_TOKEN} bytes");
            return Err(Error::option("allow_kill", problem));
        }
        let is_visible = |token: &String| token.bytes().all(|byte| byte.is_ascii_graphic());
        if !self.token.as_ref().is_none_or(is_visible) {
            let problem = "a token has visible ASCII characters only, without blanks";
            return Err(Error::option("allow_kill", problem));
        }
        if let Some(name) = self.hosts.iter().find(|name| !guard::is_name(name)) {
            let problem = format!("{name:?} is no name of a host without a port");
            return Err(Error::option("allow_host", problem));
        }
        let mut listen = Listen::tcp(addr, Framing::custom(http::Requests::default));
        let remote = listen.resolved()?.iter().find(|addr| !is_loopback(addr));
        if let Some(addr) = remote.filter(|_| !self.is_remote) {
            let problem = format!(
                "{addr} can be reached from other hosts; use 127.0.0.1, or call allow_remote"
            );
            return Err(Error::option("observer", problem));
        }
        listen.closes_last = true;
        listen.max_connections = Some(16);
        // One for the events, and those that a browser opens to fetch a page.
        listen.reserved = 4;
        listen.conn.max_frame = Some(http::MAX_HEAD + http::MAX_BODY + 2);
        listen.conn.frame_timeout = Duration::from_secs(10);
        listen.conn.idle_timeout = Duration::from_secs(15);
        // Its own slots are no others', however silent a browser is that connects ahead of time.
        listen.evict_silent = false;
        listen.socket.send_buffer = Some(64 * 1024);
        listen.conn.write_timeout = Duration::from_secs(10);
        // Its slots are few.
        listen.conn.linger_timeout = Duration::from_millis(500);
        listen.conn.output_limit = listen.conn.high_watermark;
        Ok(listen)
    }

    /// Allows one more name in the `Host` of a request, without a port: the name of a proxy, or of
    /// this host. `localhost`, loopback addresses and the address of the connection itself are
    /// always allowed.
    pub fn allow_host(mut self, name: impl Into<String>) -> Self {
        self.hosts.push(name.into());
        self
    }

    /// Allows requests with this token to kill connections, as
    /// [`Control::kill`](crate::Control::kill). The token has at least 16 bytes; choose one that
    /// cannot be guessed.
    ///
    /// The page does not know the token, and asks for it. Or it takes the token from the fragment
    /// of its URL, `http://127.0.0.1:9222/#token=...`, which browsers do not send. Each kill also
    /// needs the page's own `Origin`.
    pub fn allow_kill(mut self, token: impl Into<String>) -> Self {
        self.token = Some(token.into());
        self
    }

    /// Serves other hosts too: on an address that is not loopback, and peers that are not. Each
    /// peer that can connect sees the addresses of all clients. Use a firewall, or
    /// [`Listen::access_rules`].
    pub fn allow_remote(mut self) -> Self {
        self.is_remote = true;
        self
    }
}

fn is_loopback(addr: &Addr) -> bool {
    // The file of a Unix socket has permissions.
    addr.ip().is_none_or(|ip| ip.to_canonical().is_loopback())
}

impl<A> Service<A> for Observer {
    fn accept(&mut self, _app: &mut A, peer: Peer) -> Result<Box<dyn Handler<A>>, Refuse> {
        let is_local = is_loopback(&peer.addr) && is_loopback(&peer.source());
        if !self.is_remote && !is_local {
            return Err(Refuse::silently());
        }
        let shared = self.shared.get_or_insert_with(|| {
            Rc::new(Shared {
                hosts: self.hosts.clone(),
                token: self.token.clone(),
                feed: Rc::new(RefCell::new(Feed::new(self.token.is_some()))),
                waiting: RefCell::new(Waiting::default()),
            })
        });
        Ok(Box::new(Session::new(Rc::clone(shared), peer.listener)))
    }
}

/// Without the token.
impl fmt::Debug for Observer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Observer")
            .field("hosts", &self.hosts)
            .field("kill", &self.token.is_some())
            .field("remote", &self.is_remote)
            .finish_non_exhaustive()
    }
}
