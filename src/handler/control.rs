//! Queries and changes of a running server.

use std::fmt;
use std::os::fd::OwnedFd;
use std::time::Duration;

use super::{broadcast, Broadcast, Conn, ConnInfo, ConnOps, Handler, Interest, Watched};
use crate::access::{parse, Prefix};
use crate::addr::{Addr, AddrError};
use crate::alarm::{Alarm, AlarmInfo};
use crate::config::Config;
use crate::config::Connect;
use crate::config::Listen;
use crate::error::{Error, Result};
use crate::histogram::Histograms;
use crate::id::{AlarmId, ConnId, ListenerRef, TimerId, WatchId};
use crate::listener_info::ListenerInfo;
use crate::metrics::Metrics;
use crate::proto::Payload;
#[cfg(feature = "observer")]
use crate::proto::Time;
use crate::recent::RecentClose;
use crate::stats::{DrainReport, Stats};
use crate::tree::Tree;

/// The callback of an alarm.
pub(crate) type AlarmCallback<A> = Box<dyn FnMut(&mut A, &mut Control<'_, A>, &AlarmInfo)>;

/// A job on the loop's own thread.
pub(crate) type LocalJob<A> = Box<dyn FnOnce(&mut A, &mut Control<'_, A>)>;

/// The reactor's side of [`Control`].
pub(crate) trait ControlOps<A>: ConnOps<A> {
    fn listeners(&self) -> Vec<ListenerInfo>;
    fn listener(&self, which: &ListenerRef) -> Result<ListenerInfo>;
    fn connections(&self) -> Vec<ConnInfo>;
    fn connections_page(&self, from: usize, limit: usize) -> (Vec<ConnInfo>, Option<usize>);
    fn tree(&self, limit: usize) -> Tree;
    fn recent_closes(&self, limit: usize) -> Vec<RecentClose>;
    fn histograms(&self) -> Histograms;
    fn metrics(&self) -> Metrics;
    /// RLIMIT_NOFILE, where the system reports it.
    #[cfg(feature = "observer")]
    fn descriptor_limit(&self) -> Option<usize>;
    /// The number of this shard, and that of all shards.
    #[cfg(feature = "observer")]
    fn shard(&self) -> Option<(usize, usize)>;
    fn add_alarm(
        &mut self,
        alarm: Alarm,
        cooldown: Duration,
        callback: AlarmCallback<A>,
    ) -> Result<AlarmId>;
    fn set_alarm(&mut self, id: AlarmId, alarm: Alarm, cooldown: Duration) -> Result<()>;
    fn remove_alarm(&mut self, id: AlarmId) -> bool;
    fn alarms(&self) -> Vec<AlarmInfo>;
    fn set_timer(&mut self, after: Duration, job: LocalJob<A>) -> TimerId;
    fn cancel_timer(&mut self, id: TimerId) -> bool;
    fn watch(&mut self, interest: Interest, watched: Box<dyn Watched<A>>) -> Result<WatchId>;
    fn unwatch(&mut self, id: WatchId) -> bool;
    fn kill(&mut self, id: ConnId) -> bool;
    fn config(&self) -> &Config;
    fn set_config(&mut self, config: Config) -> Result<()>;
    fn options(&self, which: &ListenerRef) -> Result<&Listen>;
    fn set_options(&mut self, which: &ListenerRef, options: Listen) -> Result<()>;
    fn ban(&mut self, network: Prefix, duration: Duration);
    fn unban(&mut self, network: Prefix) -> bool;
    fn set_suspended(&mut self, which: &ListenerRef, suspended: bool) -> Result<()>;
    fn close_listener(&mut self, which: &ListenerRef) -> Result<()>;
    fn listener_socket(&mut self, which: &ListenerRef) -> Result<OwnedFd>;
    fn stats(&self) -> Stats;
    fn drain(&mut self, grace: Duration);
    fn drain_report(&self) -> Option<DrainReport>;
    fn stop(&mut self);
}

/// Queries and changes of a server: from [`Server::control`](crate::Server::control) between two
/// iterations, in a callback from [`Conn::control`], or lent to a job of
/// [`Handle::post`](crate::Handle::post) or to the callback of an [`Alarm`].
pub struct Control<'a, A = ()> {
    pub(super) ops: &'a mut (dyn ControlOps<A> + 'a),
}

impl<'a, A> Control<'a, A> {
    pub(crate) fn new(ops: &'a mut (dyn ControlOps<A> + 'a)) -> Self {
        Self { ops }
    }

    /// Returns a connection, to send to it, change it or close it; `None` if `id` names none any
    /// more.
    pub fn conn(&mut self, id: ConnId) -> Option<Conn<'_, A>>
    where
        A: 'a,
    {
        Conn::find(&mut *self.ops, id)
    }

    /// Sends one frame to each of these connections: see [`Conn::broadcast`].
    pub fn broadcast(
        &mut self,
        ids: impl IntoIterator<Item = ConnId>,
        frame: impl Payload,
    ) -> Broadcast {
        broadcast(&mut *self.ops, ids, frame)
    }

    /// Begins an outgoing connection.
    ///
    /// From here on the connection has a slot and an id, under the cap, and is
    /// [`State::Connecting`](crate::State::Connecting). When it is open, [`Handler::on_open`] is
    /// called; if it fails, [`Handler::on_connect_failed`]. Output queued meanwhile is sent when it
    /// is open.
    ///
    /// `addr` is a `SocketAddr`, an [`Addr`], or a text: `"10.0.0.7:2222"`, `"[::1]:2222"`,
    /// `"unix:/run/games.sock"`. **A host name is no address**, because a lookup blocks. Resolve it
    /// before, on another thread if necessary (`std::net::ToSocketAddrs`, then
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
    /// let options = Connect::new(Framing::Line);
    /// let id = server.control().connect("127.0.0.1:2222", options, Client)?;
    /// # let _ = id; Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// - [`Error::ConnectAddress`](crate::Error::ConnectAddress).
    /// - [`Error::Option`](crate::Error::Option) for a value that cannot work.
    /// - [`Error::AtCapacity`](crate::Error::AtCapacity). In `on_close` and `on_connect_failed` the
    ///   slot of the ended connection is free already, so that a full pool can replace it; not if
    ///   the connection was evicted for a client, or detached.
    /// - [`Error::Draining`](crate::Error::Draining).
    /// - [`Error::ConnState`](crate::Error::ConnState) if the maker of the framing panicked.
    /// - [`Error::Connect`](crate::Error::Connect) if the kernel refuses at once: no descriptor, no
    ///   route, no listener on a Unix socket. With [`Connect::retry`] this is a failed attempt
    ///   instead.
    ///
    /// After an error the handler is dropped, and nothing else has changed.
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
        let addr = addr
            .try_into()
            .map_err(|error| Error::ConnectAddress(AddrError::from(error)))?;
        self.ops.connect(addr, options, Box::new(handler))
    }

    /// Returns all listeners that have not been closed, oldest first.
    pub fn listeners(&self) -> Vec<ListenerInfo> {
        self.ops.listeners()
    }

    /// Returns one listener, by id, port or name: `server.control().listener("games")?.addr`.
    ///
    /// # Errors
    ///
    /// [`Error::NoListener`](crate::Error::NoListener).
    pub fn listener(&self, which: impl Into<ListenerRef>) -> Result<ListenerInfo> {
        self.ops.listener(&which.into())
    }

    /// Returns all connections, in the order of their slots. For many connections see
    /// [`Control::connections_page`].
    pub fn connections(&self) -> Vec<ConnInfo> {
        self.ops.connections()
    }

    /// Returns the connections in `limit` slots (at least 1) from the slot `from` on, and the slot
    /// to continue from; `None` at the end. So a page has bounded cost and length. A connection
    /// that stays open is on exactly one page, even if others open and close meanwhile. An empty
    /// slot counts too, so that a page may be empty although more follow.
    ///
    /// ```
    /// # use portcullis::{Config, Server};
    /// # fn main() -> portcullis::Result<()> {
    /// # let mut server: Server = Server::new(Config::new())?;
    /// let mut from = Some(0);
    /// while let Some(slot) = from {
    ///     let (connections, next) = server.control().connections_page(slot, 1000);
    ///     for connection in connections {
    ///         println!("{connection}");
    ///     }
    ///     from = next; // and perhaps an iteration of the loop
    /// }
    /// # Ok(()) }
    /// ```
    pub fn connections_page(&self, from: usize, limit: usize) -> (Vec<ConnInfo>, Option<usize>) {
        self.ops.connections_page(from, limit)
    }

    /// Returns the supervision tree, with at most `limit` connections of each listener and `limit`
    /// outgoing ones. [`Display`](fmt::Display) draws it. The search visits at most 4096 slots, and
    /// 16 more for each connection that may be shown.
    pub fn tree(&self, limit: usize) -> Tree {
        self.ops.tree(limit)
    }

    /// Returns the last closes, the latest first, up to [`Config::recent_closes`].
    pub fn recent_closes(&self) -> Vec<RecentClose> {
        self.ops.recent_closes(usize::MAX)
    }

    /// Returns the last closes, up to `limit`, the latest first.
    #[cfg(feature = "observer")]
    pub(crate) fn last_closes(&self, limit: usize) -> Vec<RecentClose> {
        self.ops.recent_closes(limit)
    }

    /// Returns RLIMIT_NOFILE, where the system reports it.
    #[cfg(feature = "observer")]
    pub(crate) fn descriptor_limit(&self) -> Option<usize> {
        self.ops.descriptor_limit()
    }

    /// Returns the number of this shard, from 0, and that of all shards; `None` without shards.
    #[cfg(feature = "observer")]
    pub(crate) fn shard(&self) -> Option<(usize, usize)> {
        self.ops.shard()
    }

    /// Reads the clock.
    #[cfg(feature = "observer")]
    pub(crate) fn now(&mut self) -> Time {
        self.ops.now()
    }

    /// Returns every counter and measurement. [`Display`](fmt::Display) prints the text for
    /// Prometheus.
    pub fn metrics(&self) -> Metrics {
        self.ops.metrics()
    }

    /// Sets an alarm. `callback` is called at the end of an iteration, never from inside another
    /// callback:
    ///
    /// - when the value reaches the threshold,
    /// - after each `cooldown` while it stays there,
    /// - when it is below again: then [`AlarmInfo::raised`] is false.
    ///
    /// Within a cooldown the alarm is not raised again, so that a value around the threshold costs
    /// two calls per cooldown. A cooldown is at least 1 ms; with `Duration::MAX` the alarm is
    /// raised once. A peak within one iteration is not seen. A panic of `callback` is caught,
    /// logged and counted; the alarm stays.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use portcullis::{Alarm, Config, Quota, Server};
    /// # fn main() -> portcullis::Result<()> {
    /// # let mut server: Server = Server::new(Config::new())?;
    /// let crowd = Alarm::Connections(Quota::Percent(90));
    /// let cooldown = Duration::from_secs(60);
    /// server.control().on_alarm(crowd, cooldown, |_app, _control, notice| eprintln!("{notice}"))?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::Option`](crate::Error::Option) for a threshold that is always or never reached, and
    /// for a shorter cooldown.
    pub fn on_alarm(
        &mut self,
        alarm: Alarm,
        cooldown: Duration,
        callback: impl FnMut(&mut A, &mut Control<'_, A>, &AlarmInfo) + 'static,
    ) -> Result<AlarmId> {
        self.ops.add_alarm(alarm, cooldown, Box::new(callback))
    }

    /// Changes an alarm. The time since its last call counts under the new cooldown too, unless
    /// another value is watched from now on.
    ///
    /// # Errors
    ///
    /// [`Error::NoAlarm`](crate::Error::NoAlarm); [`Error::Option`](crate::Error::Option), with the
    /// alarm unchanged.
    pub fn set_alarm(&mut self, id: AlarmId, alarm: Alarm, cooldown: Duration) -> Result<()> {
        self.ops.set_alarm(id, alarm, cooldown)
    }

    /// Removes an alarm, without another call of its callback. False if `id` names none any more.
    pub fn remove_alarm(&mut self, id: AlarmId) -> bool {
        self.ops.remove_alarm(id)
    }

    /// Returns all alarms, oldest first.
    pub fn alarms(&self) -> Vec<AlarmInfo> {
        self.ops.alarms()
    }

    /// Ends one connection at once with RST, as [`Killed`](crate::CloseReason::Killed), and logs a
    /// report. Output that was sent before is written as far as the kernel takes it. False if `id`
    /// names no connection any more.
    ///
    /// A [`Detached`](crate::Detached) stream is cut off instead: its reads and writes end, its
    /// slot stays taken until it is dropped, and its reason is
    /// [`Detached`](crate::CloseReason::Detached). False after
    /// [`Detached::into_tcp`](crate::Detached::into_tcp).
    pub fn kill(&mut self, id: ConnId) -> bool {
        self.ops.kill(id)
    }

    /// Returns the options of the server.
    ///
    /// ```
    /// # use portcullis::{Config, Server};
    /// # fn main() -> portcullis::Result<()> {
    /// let config = Config::max_connections(100);
    /// let mut server: Server = Server::new(config.clone())?;
    /// assert_eq!(server.control().config(), &config);
    /// # Ok(()) }
    /// ```
    pub fn config(&self) -> &Config {
        self.ops.config()
    }

    /// Returns the options of a listener. Its access rules have their counts
    /// ([`AccessRule::hits`](crate::AccessRule::hits)).
    ///
    /// # Errors
    ///
    /// [`Error::NoListener`](crate::Error::NoListener).
    pub fn options(&self, which: impl Into<ListenerRef>) -> Result<&Listen> {
        self.ops.options(&which.into())
    }

    /// Changes options of the server: all that `change` sets, or none after an error.
    ///
    /// ```
    /// # use portcullis::{Config, Server};
    /// # fn main() -> portcullis::Result<()> {
    /// let mut server: Server = Server::new(Config::new())?;
    /// server.control().reconfigure(|config| config.max_connections = 20_000)?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::Option`](crate::Error::Option) for a value that cannot work, with all options
    /// unchanged.
    pub fn reconfigure(&mut self, change: impl FnOnce(&mut Config)) -> Result<()> {
        let mut config = self.ops.config().clone();
        change(&mut config);
        self.ops.set_config(config)
    }

    /// Changes options of a listener: all that `change` sets, or none after an error. The others
    /// stay, TLS too. Each option of [`Listen`] says when a change takes effect; open connections
    /// keep their options.
    ///
    /// ```
    /// # use portcullis::{Config, Context, Framing, Handler, Listen, Outcome, Server};
    /// # use std::time::Duration;
    /// # struct Echo;
    /// # impl Handler for Echo {
    /// #     fn on_frame(&mut self, cx: &mut Context<'_>, frame: &[u8]) -> Outcome {
    /// #         cx.conn.send(frame)?;
    /// #         Ok(())
    /// #     }
    /// # }
    /// # fn main() -> portcullis::Result<()> {
    /// # let mut server = Server::new(Config::new())?;
    /// server.listen(Listen::tcp("127.0.0.1:0", Framing::Line).name("games"), |_app, _peer| Echo)?;
    /// server.control().reconfigure_listener("games", |listen| {
    ///     listen.conn.idle_timeout = Duration::from_secs(30);
    ///     listen.max_connections = Some(500);
    /// })?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::NoListener`](crate::Error::NoListener). [`Error::Option`](crate::Error::Option) for
    /// a value that cannot work, or an option that an open port cannot change. These are address,
    /// name, socket options, source prefixes, and whether the listener speaks TLS. All options are
    /// unchanged then.
    pub fn reconfigure_listener(
        &mut self,
        which: impl Into<ListenerRef>,
        change: impl FnOnce(&mut Listen),
    ) -> Result<()> {
        let which = which.into();
        let mut options = self.ops.options(&which)?.clone();
        change(&mut options);
        self.ops.set_options(&which, options)
    }

    /// Changes the TLS of a listener, for connections accepted from now on. Connections in the
    /// handshake and open ones keep theirs ([`TlsInfo::config`](crate::tls::TlsInfo::config)).
    ///
    /// A session of the old configuration is not resumed under the new one, unless both share a
    /// storage or a ticketer. Its client does a full handshake. Load the new files first:
    /// [`tls::server_config`](crate::tls::server_config) fails before anything is changed.
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
    /// [`Error::NoListener`](crate::Error::NoListener); [`Error::Option`](crate::Error::Option) for
    /// a plain listener. Its connections may upgrade: see [`Conn::start_tls`].
    #[doc(alias = "certificate renewal")]
    #[cfg(feature = "tls")]
    pub fn set_tls(
        &mut self,
        which: impl Into<ListenerRef>,
        config: impl Into<crate::tls::TlsConfig>,
    ) -> Result<()> {
        self.reconfigure_listener(which, |listen| listen.tls = Some(config.into()))
    }

    /// Denies a network for a time, from this call on: an address, a network as in `10.0.0.0/8`, or
    /// `all`. A second ban of the same network replaces the first; one without end is
    /// `Duration::MAX`.
    ///
    /// A ban comes before the [`AccessRules`](crate::AccessRules) of every listener and counts as
    /// [`Denied`](crate::CloseReason::Denied). It applies to the TCP peer and to the client that a
    /// PROXY header names. Connections that are open stay: see [`Control::kill`]. A ban takes O(log
    /// n). Its check looks up each prefix length in use, at most 33 of IPv4 and 129 of IPv6. At
    /// most 65,536 networks are banned (some 10 MB); one more replaces the ban that would end
    /// first.
    ///
    /// From a callback or another thread: [`Handle::post`](crate::Handle::post), or
    /// [`Handle::post_each`](crate::Handle::post_each) for all shards.
    ///
    /// ```
    /// # use std::time::Duration;
    /// fn misbehaves(handle: &portcullis::Handle, peer: std::net::IpAddr) {
    ///     let _ = handle.post(move |_, control| {
    ///         let banned = control.ban(&peer.to_string(), Duration::from_secs(600));
    ///         banned.expect("an address is a network");
    ///     }); // an error: the server has ended
    /// }
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::Option`](crate::Error::Option) if `network` is none of these.
    pub fn ban(&mut self, network: &str, duration: Duration) -> Result<()> {
        for network in parse("ban", network)? {
            self.ops.ban(Prefix::of_network(network), duration);
        }
        Ok(())
    }

    /// Ends a ban of exactly this network. Returns whether it was banned.
    ///
    /// # Errors
    ///
    /// As for [`Control::ban`].
    pub fn unban(&mut self, network: &str) -> Result<bool> {
        let mut was_banned = false;
        for network in parse("unban", network)? {
            was_banned |= self.ops.unban(Prefix::of_network(network));
        }
        Ok(was_banned)
    }

    /// Suspends a listener: takes it out of the poll. Its connections stay open, new clients wait
    /// in its backlog. Extra calls are ignored. A drain ends the suspension, and accepts the
    /// backlog.
    ///
    /// # Errors
    ///
    /// [`Error::NoListener`](crate::Error::NoListener).
    pub fn suspend(&mut self, which: impl Into<ListenerRef>) -> Result<()> {
        self.ops.set_suspended(&which.into(), true)
    }

    /// Resumes a listener after [`Control::suspend`]. Extra calls are ignored.
    ///
    /// # Errors
    ///
    /// [`Error::NoListener`](crate::Error::NoListener).
    pub fn resume(&mut self, which: impl Into<ListenerRef>) -> Result<()> {
        self.ops.set_suspended(&which.into(), false)
    }

    /// Closes a listener's port. The kernel resets the clients in its backlog, unless another
    /// process has the socket too ([`Control::listener_socket`]). Its connections stay open.
    ///
    /// # Errors
    ///
    /// [`Error::NoListener`](crate::Error::NoListener).
    pub fn close_listener(&mut self, which: impl Into<ListenerRef>) -> Result<()> {
        self.ops.close_listener(&which.into())
    }

    /// Returns another descriptor of a listener's socket, close-on-exec, to hand the listener over
    /// to another process without refusing a client. Both processes share one backlog, and each
    /// client is accepted by one of them.
    ///
    /// In this order:
    ///
    /// 1. Give the descriptor to the new process: as file 3 with `LISTEN_FDS=1` in its environment,
    ///    or over a Unix socket (SCM_RIGHTS). A listener's name that is not its address goes into
    ///    `LISTEN_FDNAMES`. The new process calls [`Listen::adopted`](crate::Listen::adopted),
    ///    runs, and reports that.
    /// 2. [`Control::close_listener`]. The backlog stays, for the new process.
    /// 3. [`Control::drain`]. A client that was accepted here and has not sent its request yet is
    ///    answered only if [`Handler::on_drain`] waits for it. The default closes once the received
    ///    input is answered.
    ///
    /// O_NONBLOCK belongs to the socket, and so to both processes (`fcntl(2)`). This server sets it
    /// before each accept. The other process must not clear it: an accept here may then block the
    /// loop until the next client connects. To wait for a client, the other process polls.
    ///
    /// A drain without the second step accepts the backlog first. The file of a Unix socket is left
    /// to the new process, and is not removed from here on. `examples/handover.rs` does all of
    /// this.
    ///
    /// # Errors
    ///
    /// [`Error::NoListener`](crate::Error::NoListener), or [`Error::Os`](crate::Error::Os) if no
    /// descriptor is left.
    pub fn listener_socket(&mut self, which: impl Into<ListenerRef>) -> Result<OwnedFd> {
        self.ops.listener_socket(&which.into())
    }

    /// Returns the counters.
    pub fn stats(&self) -> Stats {
        self.ops.stats()
    }

    /// Starts a graceful shutdown: accepts the backlog, closes the ports, notifies every handler
    /// ([`Handler::on_drain`](crate::Handler::on_drain)), and resets the remaining connections
    /// after `grace`. Outgoing connections that are not established end at once, as
    /// [`Drained`](crate::CloseReason::Drained). One deadline holds for all; a second call can only
    /// shorten it.
    ///
    /// Rates and suspensions hold back no client in the backlog. If a cap or a lack of descriptors
    /// does, the port stays open until the backlog is empty, at most until the deadline. A
    /// handshake may take a quarter of `grace`, or a second if that is longer.
    #[doc(alias = "graceful shutdown")]
    pub fn drain(&mut self, grace: Duration) {
        self.ops.drain(grace);
    }

    /// Returns the report of the drain, once it is over.
    pub fn drain_report(&self) -> Option<DrainReport> {
        self.ops.drain_report()
    }

    /// Ends [`Server::run`](crate::Server::run) after this iteration; nothing is closed.
    pub fn stop(&mut self) {
        self.ops.stop();
    }
}

impl<A> fmt::Debug for Control<'_, A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Control").finish_non_exhaustive()
    }
}
