//! One listener: when it is registered, and what each accept error means.
//!
//! ```text
//! Listening --cap or pending limit reached, none to evict--> Full
//! Full --slot freed, or one to evict--> Listening
//! Listening --accept rate reached--> RateLimited --next token--> Listening
//! Listening --EMFILE ENFILE ENOBUFS ENOMEM--> OutOfFds --interval over, or fd closed--> Listening
//! Listening <--suspend/resume--> Suspended          any --close/drain--> Closed
//! ```
//!
//! In Full, RateLimited, OutOfFds and Suspended it is deregistered. [`Listener::registered`] is
//! what the kernel has confirmed, never what is wanted; the reactor makes one follow the other, and
//! retries by timer. A drain resumes a suspended listener, and closes it once its backlog is empty.

use std::io;
use std::net::IpAddr;
use std::rc::Rc;

use super::capacity::{Capacity, OptionalBucket};
use super::connections::Connections;
use super::fd_exhaustion::FdExhaustion;
use super::os::{Os, Token};
use super::pending::Unproven;
use super::source_limits::{Counted, Sources};
use super::standing::Queue;
use super::visits::{Noted, Sums};
use crate::access::Access;
use crate::addr::Addr;
use crate::config::AtCapacity;
use crate::config::{Listen, ProxyProtocol, SourceLimits};
use crate::id::{ListenerId, ListenerRef, Which};
use crate::listener_info::{ListenerInfo, ListenerState};
use crate::logs;
use crate::proto::{ConnConfig, Machine, Pool, SharedMeters, Time, Traffic};
use crate::reason::Closed;
use crate::stats::ClosedCounts;

/// A listener of one server, without its service.
pub(super) struct Listener<L> {
    pub(super) id: ListenerId,
    pub(super) name: Rc<str>,
    pub(super) addr: Addr,
    /// `None` once the port is closed.
    pub(super) socket: Option<L>,
    /// The key of its service.
    pub(super) service: usize,
    /// As given to `listen`, with later changes.
    pub(super) options: Listen,
    /// The part of the options that its connections share.
    pub(super) limits: Rc<ConnConfig>,
    /// The part of its rates that its connections share.
    pub(super) meters: SharedMeters,
    /// Of its accept rate.
    pub(super) bucket: OptionalBucket,
    pub(super) sources: Sources,
    pub(super) connections: usize,
    /// Number of free slots that are kept for its clients.
    pub(super) reserve: usize,
    /// Its candidates for eviction, while it has a limit of its own.
    pub(super) unproven: Option<Box<Unproven>>,
    /// At its own limit: when one of them can be evicted for the next client.
    pub(super) evicts_own_at: Time,
    pub(super) accepted: u64,
    /// Of all of its connections, as far as it was attributed to it.
    pub(super) traffic: Traffic,
    /// Of its connections that have ended.
    #[cfg(feature = "sim")]
    pub(super) ended_traffic: Traffic,
    pub(super) closed: ClosedCounts,
    pub(super) suspended: bool,
    /// The server drains: neither a suspension nor a rate holds back the clients in the backlog.
    pub(super) is_draining: bool,
    /// The kernel reports events of this socket.
    pub(super) registered: bool,
    /// Accept may find a client: an event came, the budget ended, or the listener was out of the
    /// poll.
    pub(super) readable: bool,
    /// Clients may have waited in the backlog for a while: each is checked for whether it is still
    /// there, until the backlog is empty.
    pub(super) has_waited: bool,
    /// After a failure: neither accept nor register before then.
    pub(super) retry_at: Time,
    /// Since when it has deferred to the servers that share its backlog, which is not empty.
    pub(super) deferred_since: Option<Time>,
    /// The failure was logged: not again before it has ended.
    pub(super) failing: bool,
    /// The last accept said that this is no listening socket.
    pub(super) broken: bool,
    /// The result of the last visit.
    pub(super) noted: Noted,
}

impl<L> Listener<L> {
    pub(super) fn new(
        id: ListenerId,
        name: String,
        addr: Addr,
        service: usize,
        listen: Listen,
        now: Time,
    ) -> Self {
        let mut meters = SharedMeters::default();
        meters.follow(listen.total_read_rate, listen.total_frame_rate, now);
        let unproven = listen.max_connections.map(|_| Box::default());
        Self {
            id,
            name: Rc::from(name),
            addr,
            socket: None,
            service,
            limits: Rc::new(listen.conn.clone()),
            options: listen,
            meters,
            bucket: OptionalBucket::default(),
            sources: Sources::default(),
            connections: 0,
            reserve: 0,
            unproven,
            evicts_own_at: Time::NEVER,
            accepted: 0,
            traffic: Traffic::default(),
            #[cfg(feature = "sim")]
            ended_traffic: Traffic::default(),
            closed: ClosedCounts::default(),
            suspended: false,
            is_draining: false,
            registered: false,
            readable: true,
            // An adopted socket may have a backlog.
            has_waited: true,
            retry_at: Time::NEVER,
            deferred_since: None,
            failing: false,
            broken: false,
            noted: Noted::default(),
        }
    }

    /// Changes its options. Returns those of before, and whether a rate that its connections share
    /// has changed.
    pub(super) fn set_options(&mut self, options: Listen, now: Time) -> (Listen, bool) {
        self.limits = Rc::new(options.conn.clone());
        self.bucket.follow(options.accept_rate, now);
        self.sources.follow(&options.source_limits, now);
        logs::info!(target: logs::LISTENER, "listener {}: its options have changed", self.name);
        logs::debug!(target: logs::LISTENER, "listener {}: {options:?}", self.name);
        let before = std::mem::replace(&mut self.options, options);
        let options = &self.options;
        let (bytes, frames) = (options.total_read_rate, options.total_frame_rate);
        (before, self.meters.follow(bytes, frames, now))
    }

    /// As [`Admission::trim`](super::admission::Admission::trim), of its own candidates.
    pub(super) fn trim<S>(&mut self, conns: &mut Connections<S>) {
        if let Some(unproven) = &mut self.unproven {
            unproven.silent.trim(conns, Queue::Listener);
        }
    }

    /// A connection of this listener has ended.
    pub(super) fn count_closed(&mut self, closed: &Closed, _traffic: &Traffic) {
        self.closed.count(closed);
        #[cfg(feature = "sim")]
        self.ended_traffic.add(_traffic);
    }

    pub(super) fn is_open(&self) -> bool {
        self.socket.is_some()
    }

    /// Closed, and without connections.
    pub(super) fn is_over(&self) -> bool {
        !self.is_open() && self.connections == 0
    }

    /// The server drains: accepts the backlog.
    pub(super) fn begin_drain(&mut self) {
        self.is_draining = true;
        self.suspended = false;
        self.readable = true;
        self.has_waited = true;
        self.retry_at = Time::NEVER;
    }

    /// Suspends or resumes it. A drain accepts the backlog all the same.
    pub(super) fn set_suspended(&mut self, suspended: bool) {
        self.suspended = suspended && !self.is_draining;
        self.readable |= !self.suspended;
    }

    /// It has limits of its own that may hold back a client.
    pub(super) fn has_limits(&self) -> bool {
        let options = &self.options;
        options.max_connections.is_some() || options.accept_rate.is_some() || self.reserves()
    }

    /// The limit of this listener alone.
    fn max_connections(&self) -> usize {
        self.options.max_connections.unwrap_or(usize::MAX)
    }

    /// Its maximum number of connections, if it has them.
    pub(super) fn reached_cap(&self) -> Option<usize> {
        self.options
            .max_connections
            .filter(|&max| self.connections >= max)
    }

    /// Clients that find it full wait in the backlog.
    pub(super) fn lets_wait(&self) -> bool {
        self.options.at_capacity == AtCapacity::Wait
    }

    /// Neither suspended nor waiting after a failure, and accept may find a client.
    pub(super) fn may_accept(&self) -> bool {
        self.readable && !self.suspended && !self.retry_at.is_armed()
    }

    /// A client that has finished without a byte can get nothing from it: none of its clients is
    /// served in silence.
    pub(super) fn wants_input(&self) -> bool {
        self.options.evict_silent || self.options.opens_later()
    }

    /// The cap of the server or of this listener is reached, and no eviction will make room.
    fn is_full(&self, capacity: &Capacity) -> bool {
        let may_have_slot = self.has_slot(capacity) || capacity.evicts_at.is_armed();
        !may_have_slot || self.reached_cap().is_some() && !self.evicts_own_at.is_armed()
    }

    /// When a connection can be evicted for the next client, if one must be.
    fn evicts_at(&self, capacity: &Capacity) -> Time {
        if self.reached_cap().is_some() {
            return self.evicts_own_at;
        }
        let crowded_until = capacity
            .crowded_until
            .filter(|_| self.options.opens_later());
        match crowded_until {
            Some(until) => until,
            None if self.has_slot(capacity) => Time::ZERO,
            None => capacity.evicts_at,
        }
    }

    /// No connection can be evicted yet for one of this listener.
    fn is_crowded(&self, capacity: &Capacity) -> bool {
        self.evicts_at(capacity) > capacity.now
    }

    /// When its rate and the server's admit the next client.
    pub(super) fn limited_until(&self, capacity: &Capacity) -> Time {
        if self.is_draining {
            return Time::ZERO;
        }
        self.bucket
            .ready_at(self.options.accept_rate)
            .max(capacity.limited_until)
    }

    /// When the next client may come in, if no connection has to end first: now, later, or never.
    pub(super) fn admits_at(&self, capacity: &Capacity) -> Time {
        if !self.lets_wait() {
            return capacity.now;
        }
        if self.is_full(capacity) {
            return Time::NEVER;
        }
        self.limited_until(capacity).max(self.evicts_at(capacity))
    }

    /// When to accept without an event: a client waits, and only time is in its way.
    pub(super) fn accepts_at(&self, capacity: &Capacity) -> Time {
        if self.is_open() && self.may_accept() && !capacity.out_of_fds {
            self.admits_at(capacity)
        } else {
            Time::NEVER
        }
    }

    /// Its part in the sums over all listeners.
    pub(super) fn sums(&self) -> Sums {
        let lets_wait = self.is_open() && !self.suspended && self.lets_wait();
        Sums {
            open: self.is_open().into(),
            let_wait: lets_wait.into(),
            registered: self.registered.into(),
        }
    }

    /// When to visit it without an event, if it does not change before.
    pub(super) fn wake_at(&self, capacity: &Capacity) -> Time {
        self.retry_at.min(self.accepts_at(capacity))
    }

    /// Leaves it alone until `retry_at`.
    pub(super) fn back_off(&mut self, retry_at: Time) {
        self.retry_at = retry_at;
        self.has_waited = true;
    }

    /// As [`Listener::back_off`], with one line in the log until it works again.
    pub(super) fn fail(&mut self, retry_at: Time, what: &str, error: &io::Error) {
        self.back_off(retry_at);
        if !std::mem::replace(&mut self.failing, true) {
            logs::warning!(
                target: logs::LISTENER,
                "{what} listener {} on {}: {error}; trying again",
                self.name,
                self.addr
            );
        }
    }

    /// Ends its waiting if its retry time has come.
    pub(super) fn expire(&mut self, due: Time) {
        if self.retry_at <= due {
            self.retry_at = Time::NEVER;
            self.readable = true;
        }
    }

    /// Closes its socket, which frees a descriptor. Its connections live on.
    pub(super) fn close<O: Os<Listener = L>>(&mut self, os: &mut O, fds: &mut FdExhaustion) {
        let Some(mut socket) = self.socket.take() else {
            return;
        };
        if std::mem::take(&mut self.registered) {
            // Closing removes it from the poll too, unless another process holds the socket.
            if let Err(error) = os.deregister_listener(&mut socket) {
                logs::debug!(target: logs::LISTENER, "cannot deregister listener {}: {error}", self.name);
            }
        }
        os.close_listener(socket);
        fds.end_pause();
        self.readable = false;
        self.retry_at = Time::NEVER;
        logs::info!(target: logs::LISTENER, "listener {} on {} is closed", self.name, self.addr);
    }

    /// Makes its registration follow its state. A failure is retried at `retry_at`.
    pub(super) fn reconcile<O: Os<Listener = L>>(
        &mut self,
        os: &mut O,
        capacity: &Capacity,
        retry_at: Time,
    ) {
        let wanted = self.state(capacity) == ListenerState::Listening;
        // No event announces the clients that come while it is out of the poll.
        self.readable |= !wanted && self.is_open();
        self.has_waited |= !wanted;
        if wanted == self.registered || self.retry_at.is_armed() {
            return;
        }
        let Some(socket) = &mut self.socket else {
            return;
        };
        let (what, outcome) = if wanted {
            let token = Token::of_listener(self.id);
            ("cannot register", os.register_listener(socket, token))
        } else {
            ("cannot deregister", os.deregister_listener(socket))
        };
        match outcome {
            Ok(()) => {
                self.registered = wanted;
                // A client may have come since the last accept: do not rely on the edge.
                self.readable |= wanted;
            }
            Err(error) => self.fail(retry_at, what, &error),
        }
    }

    /// Whether the peer at this address sends PROXY headers that are believed.
    pub(super) fn trusts(&mut self, ip: Option<IpAddr>) -> bool {
        match (
            &mut self.options.trusted_proxies,
            self.options.proxy_protocol,
        ) {
            (Some(trusted), ProxyProtocol::Required | ProxyProtocol::Optional) => {
                ip.is_none_or(|ip| trusted.check_and_count(ip) == Access::Allow)
            }
            _ => false,
        }
    }

    /// Whether its access rules deny the client at this address.
    pub(super) fn denies(&mut self, ip: Option<IpAddr>) -> bool {
        ip.is_some_and(|ip| self.options.access_rules.check_and_count(ip) == Access::Deny)
    }

    /// Counts a connection under its source. `None` if the source has too many or is too fast.
    pub(super) fn count_source(&mut self, ip: Option<IpAddr>, now: Time) -> Option<Counted> {
        match ip {
            Some(ip) if self.is_draining => {
                let limits = SourceLimits {
                    rate: None,
                    ..self.options.source_limits
                };
                self.sources.admit(ip, &limits, now)
            }
            Some(ip) => self.sources.admit(ip, &self.options.source_limits, now),
            None => Some(Counted::No),
        }
    }

    /// Reverses [`Listener::count_source`].
    pub(super) fn uncount_source(&mut self, ip: Option<IpAddr>, counted: Counted, now: Time) {
        if let Some(ip) = ip {
            self.sources
                .leave(ip, &self.options.source_limits, counted, now);
        }
    }

    /// The machine of a new connection of this listener.
    #[inline]
    pub(super) fn machine(&self, now: Time, pool: &mut Pool) -> Machine {
        let (framing, tls) = (&self.options.framing, self.options.tls.as_ref());
        let mut machine = Machine::new(framing, Rc::clone(&self.limits), tls, now, pool);
        machine.set_rates(&self.meters);
        machine
    }

    pub(super) fn state(&self, capacity: &Capacity) -> ListenerState {
        if self.socket.is_none() {
            ListenerState::Closed
        } else if self.suspended {
            ListenerState::Suspended
        } else if capacity.out_of_fds {
            ListenerState::OutOfFds
        } else if self.lets_wait() && (self.is_full(capacity) || self.is_crowded(capacity)) {
            ListenerState::Full
        } else if self.lets_wait() && self.limited_until(capacity) > capacity.now {
            ListenerState::RateLimited
        } else {
            ListenerState::Listening
        }
    }

    /// `traffic` is that of all of its connections.
    pub(super) fn info(&self, capacity: &Capacity, traffic: Traffic) -> ListenerInfo {
        ListenerInfo {
            id: self.id,
            name: self.name.to_string(),
            addr: self.addr.clone(),
            state: self.state(capacity),
            connections: self.connections,
            max_connections: self.max_connections().min(capacity.cap),
            accepted: self.accepted,
            traffic,
            closed: self.closed.clone(),
        }
    }

    pub(super) fn matches(&self, which: &ListenerRef) -> bool {
        match &which.0 {
            Which::Id(id) => self.id == *id,
            Which::Port(port) => self.addr.port() == Some(*port),
            Which::Name(name) => *self.name == **name,
        }
    }
}

/// What an accept error means. Total: any errno not named here is [`AcceptError::Yield`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum AcceptError {
    /// The backlog is empty.
    Drained,
    /// This one client is lost; go on with the next (`accept(2)`: "treat them like EAGAIN by
    /// retrying").
    Retry,
    /// Out of descriptors or socket memory: every listener of the process is concerned.
    OutOfFds,
    /// The listening socket is none (any more): it was shut down elsewhere.
    Broken,
    /// Anything else: end this turn's accepting, keep the listener.
    Yield,
}

impl AcceptError {
    pub(super) fn of(error: &io::Error) -> Self {
        match error.raw_os_error() {
            // Not the kernel's: an address family we cannot read.
            None if error.kind() == io::ErrorKind::WouldBlock => Self::Drained,
            None => Self::Retry,
            Some(libc::EAGAIN) => Self::Drained,
            Some(
                libc::ECONNABORTED
                | libc::EINTR
                | libc::ECONNRESET
                | libc::EPROTO
                | libc::ETIMEDOUT
                | libc::ENETDOWN
                | libc::ENOPROTOOPT
                | libc::EHOSTDOWN
                | libc::EHOSTUNREACH
                | libc::EOPNOTSUPP
                | libc::ENETUNREACH,
            ) => Self::Retry,
            #[cfg(any(target_os = "linux", target_os = "android"))]
            Some(libc::ENONET) => Self::Retry,
            Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM) => Self::OutOfFds,
            Some(libc::EINVAL | libc::EBADF | libc::ENOTSOCK) => Self::Broken,
            Some(_) => Self::Yield,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_errno_has_a_class() {
        let class = |errno| AcceptError::of(&io::Error::from_raw_os_error(errno));
        for errno in 0..4096 {
            let _ = class(errno);
        }
        assert_eq!(class(libc::EAGAIN), AcceptError::Drained);
        for errno in [
            libc::ECONNABORTED,
            libc::EINTR,
            libc::EPROTO,
            libc::ENETDOWN,
            libc::EHOSTUNREACH,
        ] {
            assert_eq!(class(errno), AcceptError::Retry);
        }
        for errno in [libc::EMFILE, libc::ENFILE, libc::ENOBUFS, libc::ENOMEM] {
            assert_eq!(class(errno), AcceptError::OutOfFds);
        }
        for errno in [libc::EINVAL, libc::EBADF, libc::ENOTSOCK] {
            assert_eq!(class(errno), AcceptError::Broken);
        }
        for errno in [libc::EPERM, libc::EIO, 4000] {
            assert_eq!(class(errno), AcceptError::Yield);
        }
    }
}
