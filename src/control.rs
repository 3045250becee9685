//! What can be asked of a running server between two callbacks.

use std::fmt;
use std::os::fd::OwnedFd;
use std::time::Duration;

use crate::access::AccessRules;
use crate::addr::{Addr, AddrError};
use crate::alarm::{Alarm, AlarmId, AlarmInfo, AlarmNotice};
use crate::config::Config;
use crate::config::Connect;
use crate::config::Listen;
use crate::error::Result;
use crate::handler::{connect, Conn, ConnInfo, ConnOps, Handler};
use crate::histogram::Histograms;
use crate::id::{ConnId, ListenerId, ListenerRef};
use crate::metrics::Metrics;
use crate::recent::RecentClose;
use crate::stats::{DrainReport, Stats};
use crate::tree::{Cursor, Page, Tree};

/// Why a listener takes clients, or takes none, now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ListenerState {
    /// It is in the poll and accepts.
    Listening,
    /// The cap is reached, or that on connections which are not open yet; it is out of the poll until a place is free.
    Full,
    /// The accept rate is reached; it is out of the poll until there is another token.
    RateLimited,
    /// Descriptors or socket memory ran out; it is out of the poll for the interval, or until one of ours closes.
    OutOfFds,
    /// It was suspended; clients wait in its backlog.
    Suspended,
    /// Its port is closed.
    Closed,
}

impl ListenerState {
    /// All of them.
    pub const ALL: &'static [Self] = &[
        Self::Listening,
        Self::Full,
        Self::RateLimited,
        Self::OutOfFds,
        Self::Suspended,
        Self::Closed,
    ];

    /// Its name.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Listening => "Listening",
            Self::Full => "Full",
            Self::RateLimited => "RateLimited",
            Self::OutOfFds => "OutOfFds",
            Self::Suspended => "Suspended",
            Self::Closed => "Closed",
        }
    }
}

/// One listener at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ListenerInfo {
    /// Its id.
    pub id: ListenerId,
    /// Its name.
    pub name: String,
    /// Where it listens, with the real port.
    pub addr: Addr,
    /// Whether it takes clients.
    pub state: ListenerState,
    /// Its connections now, in any state.
    pub connections: usize,
    /// The most it may have: its own limit or the server's cap, whichever is smaller.
    pub max_connections: usize,
    /// Connections it has accepted.
    pub accepted: u64,
}

/// Whom an alarm calls.
pub(crate) type AlarmCallback<A> = Box<dyn FnMut(&mut A, &mut Control<'_, A>, &AlarmNotice)>;

/// What the reactor lets be asked of it.
pub(crate) trait ControlOps<A>: ConnOps<A> {
    fn listeners(&self) -> Vec<ListenerInfo>;
    fn listener(&self, which: &ListenerRef) -> Result<ListenerInfo>;
    fn connections(&self) -> Vec<ConnInfo>;
    fn connections_page(&self, from: Cursor, limit: usize) -> Page;
    fn tree(&self, limit: usize) -> Tree;
    fn recent_closes(&self) -> Vec<RecentClose>;
    fn histograms(&self) -> Histograms;
    fn metrics(&self) -> Metrics;
    fn add_alarm(&mut self, alarm: Alarm, callback: AlarmCallback<A>) -> Result<AlarmId>;
    fn set_alarm(&mut self, id: AlarmId, alarm: Alarm) -> Result<()>;
    fn remove_alarm(&mut self, id: AlarmId) -> bool;
    fn alarms(&self) -> Vec<AlarmInfo>;
    fn kill(&mut self, id: ConnId) -> bool;
    fn config(&self) -> &Config;
    fn set_config(&mut self, config: Config) -> Result<()>;
    fn options(&self, which: &ListenerRef) -> Result<&Listen>;
    fn set_options(&mut self, which: &ListenerRef, options: Listen) -> Result<()>;
    fn set_suspended(&mut self, which: &ListenerRef, suspended: bool) -> Result<()>;
    fn close_listener(&mut self, which: &ListenerRef) -> Result<()>;
    fn listener_socket(&mut self, which: &ListenerRef) -> Result<OwnedFd>;
    fn stats(&self) -> Stats;
    fn drain(&mut self, grace: Duration);
    fn drain_report(&self) -> Option<DrainReport>;
    fn stop(&mut self);
}

/// A server between two turns: from [`Server::control`](crate::Server::control), or lent to a job that was sent with
/// [`Handle::post`](crate::Handle::post).
pub struct Control<'a, A = ()> {
    ops: &'a mut (dyn ControlOps<A> + 'a),
}

impl<'a, A> Control<'a, A> {
    pub(crate) fn new(ops: &'a mut (dyn ControlOps<A> + 'a)) -> Self {
        Self { ops }
    }

    /// One connection, to send to it, change it or close it; `None` if it has gone.
    pub fn conn(&mut self, id: ConnId) -> Option<Conn<'_, A>>
    where
        A: 'a,
    {
        let ops: &mut dyn ConnOps<A> = &mut *self.ops;
        Conn::find(ops, id)
    }

    /// Makes an outgoing connection. It has a slot and an id from here on, under the cap, and is
    /// [`State::Connecting`](crate::State::Connecting) until it is there; `handler` hears `on_open` then, or
    /// [`Handler::on_connect_failed`] when it has come to nothing. What is sent to it meanwhile goes out when it is open.
    ///
    /// `addr` is a `SocketAddr`, an [`Addr`], or a text: `"10.0.0.7:2222"`, `"[::1]:2222"`, `"unix:/run/games.sock"`. **The name of a
    /// host is none**: looking it up blocks, so that is the caller's, on another thread if need be (`std::net::ToSocketAddrs`, then
    /// [`Handle::post`](crate::Handle::post)).
    ///
    /// ```
    /// # use portcullis::{Config, Connect, Context, Framing, Handler, Outcome, Server};
    /// # struct Client;
    /// # impl Handler for Client {
    /// #     fn on_frame(&mut self, _: &mut Context<'_>, _: &[u8]) -> Outcome { Ok(()) }
    /// # }
    /// # fn main() -> portcullis::Result<()> {
    /// # let mut server: Server = Server::new(Config::new())?;
    /// let id = server.control().connect("127.0.0.1:2222", Connect::new().framing(Framing::Line), Client)?;
    /// # let _ = id; Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::ConnectAddress`](crate::Error::ConnectAddress); [`Error::Option`](crate::Error::Option) for a value that cannot work;
    /// [`Error::AtCapacity`](crate::Error::AtCapacity), also in `on_close` and `on_connect_failed` at the cap, because the connection that
    /// ends has its place until they return; [`Error::Draining`](crate::Error::Draining);
    /// [`Error::Connect`](crate::Error::Connect) if the kernel says no at once (no descriptor, no route, nobody at a Unix socket), which
    /// with [`Connect::retry`] is a failed attempt instead. Nothing has begun, and the handler is dropped.
    pub fn connect<T>(
        &mut self,
        addr: T,
        options: Connect,
        handler: impl Handler<A> + 'static,
    ) -> Result<ConnId>
    where
        A: 'a,
        T: TryInto<Addr>,
        AddrError: From<T::Error>,
    {
        let ops: &mut dyn ConnOps<A> = &mut *self.ops;
        connect(ops, addr, options, handler)
    }

    /// All listeners that have not been closed, oldest first.
    pub fn listeners(&self) -> Vec<ListenerInfo> {
        self.ops.listeners()
    }

    /// One listener, by id, port or name.
    ///
    /// # Errors
    ///
    /// [`Error::NoListener`](crate::Error::NoListener).
    pub fn listener(&self, which: impl Into<ListenerRef>) -> Result<ListenerInfo> {
        self.ops.listener(&which.into())
    }

    /// All connections, in the order of their slots. With many of them rather [`Control::connections_page`].
    pub fn connections(&self) -> Vec<ConnInfo> {
        self.ops.connections()
    }

    /// Some of the connections, in the order of their slots: `limit` slots are looked at, so a page costs no more and has at most
    /// so many. A connection that is there all the time is on exactly one page, whoever comes and goes meanwhile.
    ///
    /// ```
    /// # use portcullis::{Config, Cursor, Server};
    /// # fn main() -> portcullis::Result<()> {
    /// # let mut server: Server = Server::new(Config::new())?;
    /// let mut from = Some(Cursor::default());
    /// while let Some(cursor) = from {
    ///     let page = server.control().connections_page(cursor, 1000);
    ///     for connection in &page.connections {
    ///         println!("{connection}");
    ///     }
    ///     from = page.next; // and perhaps a turn of the loop
    /// }
    /// # Ok(()) }
    /// ```
    pub fn connections_page(&self, from: Cursor, limit: usize) -> Page {
        self.ops.connections_page(from, limit)
    }

    /// The supervision tree, with at most `limit` connections of each listener; [`Display`](fmt::Display) draws it. At most 16 slots
    /// are looked at for each that may be shown, and 4096, however many connections there are.
    pub fn tree(&self, limit: usize) -> Tree {
        self.ops.tree(limit)
    }

    /// The last closes, the latest first: [`Config::recent_closes`] of them at most.
    pub fn recent_closes(&self) -> Vec<RecentClose> {
        self.ops.recent_closes()
    }

    /// How ages, handshake times and frame sizes are spread.
    pub fn histograms(&self) -> Histograms {
        self.ops.histograms()
    }

    /// Everything that is counted and measured; its [`Display`](fmt::Display) is for Prometheus.
    pub fn metrics(&self) -> Metrics {
        self.ops.metrics()
    }

    /// Sets an alarm. `callback` is called at the end of a turn, never from inside another callback: when the value is at or above the
    /// threshold ([`AlarmState::Raised`](crate::AlarmState::Raised)), after each cooldown while it still is
    /// ([`AlarmState::StillRaised`](crate::AlarmState::StillRaised)), and when it is below again
    /// ([`AlarmState::Cleared`](crate::AlarmState::Cleared)). Within a cooldown it is not raised again, so that a value which
    /// goes to and fro around the threshold costs two calls for each. What comes and goes within one turn is not seen.
    ///
    /// A panic in it is caught, logged and counted; the alarm stays.
    ///
    /// ```
    /// # use portcullis::{Alarm, AlarmNotice, Config, Control, Quota, Server};
    /// # fn main() -> portcullis::Result<()> {
    /// # let mut server: Server = Server::new(Config::new())?;
    /// server.control().on_alarm(
    ///     Alarm::connections(Quota::Percent(90)),
    ///     |_app: &mut (), _control: &mut Control<'_>, notice: &AlarmNotice| eprintln!("{notice}"),
    /// )?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::Option`](crate::Error::Option) for a threshold that is always or never reached.
    pub fn on_alarm(
        &mut self,
        alarm: Alarm,
        callback: impl FnMut(&mut A, &mut Control<'_, A>, &AlarmNotice) + 'static,
    ) -> Result<AlarmId> {
        self.ops.add_alarm(alarm, Box::new(callback))
    }

    /// Changes an alarm. The time since it has spoken last counts under the new cooldown too; one that watches something else from now
    /// on starts anew.
    ///
    /// # Errors
    ///
    /// [`Error::NoAlarm`](crate::Error::NoAlarm); [`Error::Option`](crate::Error::Option), with the alarm as it was.
    pub fn set_alarm(&mut self, id: AlarmId, alarm: Alarm) -> Result<()> {
        self.ops.set_alarm(id, alarm)
    }

    /// Forgets an alarm, without another word from it. False if it has gone already.
    pub fn remove_alarm(&mut self, id: AlarmId) -> bool {
        self.ops.remove_alarm(id)
    }

    /// All alarms, oldest first.
    pub fn alarms(&self) -> Vec<AlarmInfo> {
        self.ops.alarms()
    }

    /// Ends one connection at once with RST, and logs a report. [`CloseReason::Killed`](crate::CloseReason::Killed).
    /// False if it has gone already.
    pub fn kill(&mut self, id: ConnId) -> bool {
        self.ops.kill(id)
    }

    /// Changes the cap. Lowered below what is open, the open ones stay and no new ones come; raised, waiting
    /// clients are accepted at once. 0 admits nobody. In one of several [`Shards`](crate::Shards) it changes the cap of all.
    ///
    /// # Errors
    ///
    /// [`Error::Option`](crate::Error::Option) for more than 16 million; the cap is as it was.
    pub fn set_max_connections(&mut self, connections: usize) -> Result<()> {
        self.reconfigure(|config| config.max_connections(connections))
    }

    /// Changes options of the server: all of those that `change` changes, or none. Each option of [`Config`] says when a
    /// change takes effect.
    ///
    /// ```
    /// # use portcullis::{Config, Server};
    /// # fn main() -> portcullis::Result<()> {
    /// let mut server: Server = Server::new(Config::new())?;
    /// server.control().reconfigure(|config| config.max_connections(20_000).recent_closes(1024))?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::Option`](crate::Error::Option) for a value that cannot work; everything is as it was.
    pub fn reconfigure(&mut self, change: impl FnOnce(Config) -> Config) -> Result<()> {
        let config = change(self.ops.config().clone());
        self.ops.set_config(config)
    }

    /// Changes options of a listener: all of those that `change` changes, or none. What it does not name stays, TLS too.
    /// Each option of [`Listen`] says when a change takes effect; connections that are there keep what they were made with.
    ///
    /// ```
    /// # use portcullis::{Config, Context, Handler, Listen, Outcome, Server};
    /// # use std::time::Duration;
    /// # struct Echo;
    /// # impl Handler for Echo {
    /// #     fn on_frame(&mut self, cx: &mut Context<'_>, frame: &[u8]) -> Outcome { cx.conn.send(frame)?; Ok(()) }
    /// # }
    /// # fn main() -> portcullis::Result<()> {
    /// # let mut server = Server::new(Config::new())?;
    /// server.listen(Listen::tcp("127.0.0.1:0").name("games"), |_app, _peer| Echo)?;
    /// server.control().reconfigure_listener("games", |listen| {
    ///     listen.max_connections(500).idle_timeout(Duration::from_secs(30))
    /// })?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::NoListener`](crate::Error::NoListener); [`Error::Option`](crate::Error::Option) for a value that cannot work
    /// and for an option that an open port cannot change (its address, its name, its socket's options, whether it speaks TLS).
    /// Everything is as it was.
    pub fn reconfigure_listener(
        &mut self,
        which: impl Into<ListenerRef>,
        change: impl FnOnce(Listen) -> Listen,
    ) -> Result<()> {
        let which = which.into();
        let options = change(self.ops.options(&which)?.clone());
        self.ops.set_options(&which, options)
    }

    /// Changes the TLS of a listener, for the connections that are accepted from now on. Those in the handshake and open ones
    /// keep theirs; [`TlsInfo::config`](crate::tls::TlsInfo::config) tells which. A session of the old configuration is not
    /// resumed under the new one, unless both share a storage or a ticketer: its client does a full handshake.
    ///
    /// Read the new files before: [`tls::server_config`](crate::tls::server_config) fails before anything is changed.
    ///
    /// ```no_run
    /// # fn reload(mut server: portcullis::Server) -> Result<(), Box<dyn std::error::Error>> {
    /// let config = portcullis::tls::server_config("chain.pem", "key.pem")?; // or the old one stays
    /// server.control().set_tls("secure", config)?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::NoListener`](crate::Error::NoListener); [`Error::Option`](crate::Error::Option) for a plain listener, which does not
    /// become a TLS one by this. Its connections may: see [`Conn::start_tls`].
    #[cfg(feature = "tls")]
    pub fn set_tls(
        &mut self,
        which: impl Into<ListenerRef>,
        config: impl Into<crate::tls::TlsConfig>,
    ) -> Result<()> {
        self.reconfigure_listener(which, |listen| listen.tls(config))
    }

    /// Takes a listener out of the poll. Its connections live on, new clients wait in its backlog. Again is no error.
    ///
    /// # Errors
    ///
    /// [`Error::NoListener`](crate::Error::NoListener).
    pub fn suspend(&mut self, which: impl Into<ListenerRef>) -> Result<()> {
        self.ops.set_suspended(&which.into(), true)
    }

    /// Accepts again after [`Control::suspend`], those who waited first. Again is no error.
    ///
    /// # Errors
    ///
    /// [`Error::NoListener`](crate::Error::NoListener).
    pub fn resume(&mut self, which: impl Into<ListenerRef>) -> Result<()> {
        self.ops.set_suspended(&which.into(), false)
    }

    /// Closes a listener's port. Clients that wait in its backlog are reset by the kernel, unless another process has the
    /// socket too ([`Control::listener_socket`]); its connections live on.
    ///
    /// # Errors
    ///
    /// [`Error::NoListener`](crate::Error::NoListener).
    pub fn close_listener(&mut self, which: impl Into<ListenerRef>) -> Result<()> {
        self.ops.close_listener(&which.into())
    }

    /// Another descriptor of a listener's socket, close-on-exec, for another process: to hand the listener over without
    /// refusing a single client. Both have one queue of clients, and each client is accepted by one of them.
    ///
    /// In this order:
    ///
    /// 1. Give the descriptor to the new process: as file 3 with `LISTEN_FDS=1` in its environment, or over a Unix socket
    ///    (SCM_RIGHTS). It calls [`Server::adopt`](crate::Server::adopt), runs, and says that it does.
    /// 2. [`Control::close_listener`]. The queue stays as it is, for the new process.
    /// 3. [`Control::drain`]. A client that was accepted here and has not asked yet is answered only if
    ///    [`Handler::on_drain`](crate::Handler::on_drain) leaves it the time: the default closes once what has arrived is answered.
    ///
    /// A drain without the second step accepts whoever waits, as always, and begins to send them away. The file of a Unix
    /// socket is left to the new process, and is not removed from here on. `examples/handover.rs` does all of this.
    ///
    /// # Errors
    ///
    /// [`Error::NoListener`](crate::Error::NoListener), or [`Error::Os`](crate::Error::Os) if there is no descriptor left.
    pub fn listener_socket(&mut self, which: impl Into<ListenerRef>) -> Result<OwnedFd> {
        self.ops.listener_socket(&which.into())
    }

    /// A listener's access rules, each with the number of peers it has decided about.
    ///
    /// # Errors
    ///
    /// [`Error::NoListener`](crate::Error::NoListener).
    pub fn access_rules(&self, which: impl Into<ListenerRef>) -> Result<AccessRules> {
        Ok(self.ops.options(&which.into())?.access_rules.clone())
    }

    /// Replaces a listener's access rules: for whoever is accepted from now on, not for those inside. Rules that were there
    /// keep their counts.
    ///
    /// # Errors
    ///
    /// [`Error::NoListener`](crate::Error::NoListener).
    pub fn set_access_rules(
        &mut self,
        which: impl Into<ListenerRef>,
        rules: AccessRules,
    ) -> Result<()> {
        self.reconfigure_listener(which, |listen| listen.access_rules(rules))
    }

    /// The counters.
    pub fn stats(&self) -> Stats {
        self.ops.stats()
    }

    /// Ends in order: accepts who waits already, closes the ports, tells each handler
    /// ([`Handler::on_drain`](crate::Handler::on_drain)), and resets whoever is left after `grace`. One deadline for all;
    /// a second call can only bring it forward.
    pub fn drain(&mut self, grace: Duration) {
        self.ops.drain(grace);
    }

    /// How the drain went, once it is over.
    pub fn drain_report(&self) -> Option<DrainReport> {
        self.ops.drain_report()
    }

    /// Ends [`Server::run`](crate::Server::run) after this turn and leaves everything as it is.
    pub fn stop(&mut self) {
        self.ops.stop();
    }
}

impl<A> fmt::Debug for Control<'_, A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Control").finish_non_exhaustive()
    }
}
