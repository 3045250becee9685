//! Taking clients in: the budget, the cap, the service's answer, and what happens when descriptors run out.

use std::io;
use std::net::IpAddr;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::rc::Rc;
use std::time::Duration;

use super::admission::Room;
use super::connections::Connection;
use super::listener::{AcceptError, Listener};
use super::os::{Os, Socket, Token};
use super::sources::Counted;
use super::turn::is_short_of_memory;
use super::view::CloseRecord;
use super::{report_panic, Reactor};
use crate::access::Access;
use crate::addr::{Addr, Credentials};
use crate::config::AtCapacity;
use crate::handler::{Handler, Peer, Refuse};
use crate::id::ConnId;
use crate::listen::ProxyProtocol;
use crate::logs;
use crate::proto::{ProxyHeader, State, Time, Traffic};
use crate::reason::{CloseReason, Closed};

/// How long others who share a queue and have fewer connections go first.
const ACCEPT_DEFERRAL: Duration = Duration::from_millis(1);

/// Who has connected.
#[derive(Clone, Debug)]
pub(super) struct Incoming {
    pub(super) addr: Addr,
    pub(super) credentials: Option<Credentials>,
    pub(super) proxy: Option<Rc<ProxyHeader>>,
}

impl Incoming {
    /// What the listener's service is told.
    pub(super) fn at<A, L>(self, listener: &Listener<A, L>, id: Option<ConnId>) -> Peer {
        Peer {
            id,
            addr: self.addr,
            credentials: self.credentials,
            listener: listener.id,
            listener_name: Rc::clone(&listener.name),
            proxy: self.proxy,
        }
    }
}

/// Out of descriptors or socket memory.
#[derive(Debug, Default)]
pub(super) struct FdExhaustion {
    /// All listeners are out of the poll until then.
    until: Option<Time>,
    /// From the first failure until the queue was seen empty and no accept failed for an interval: one warning, one count.
    episode: bool,
    /// The queue was seen empty: the episode is over then. At the very limit every client that comes after another
    /// has left makes accept fail again, and so does one listener's queue while another's is empty.
    over_at: Option<Time>,
    /// Accepts that failed in this episode.
    failures: u64,
}

impl FdExhaustion {
    pub(super) fn is_on(&self) -> bool {
        self.until.is_some()
    }

    pub(super) fn until(&self) -> Time {
        self.until.unwrap_or(Time::NEVER)
    }

    /// Accepts that failed in the episode that is not over.
    pub(super) fn failures(&self) -> usize {
        if self.episode {
            usize::try_from(self.failures).unwrap_or(usize::MAX)
        } else {
            0
        }
    }

    /// A descriptor was freed, or the interval is over.
    pub(super) fn end_pause(&mut self) {
        self.until = None;
    }

    /// When the episode will have been over for long enough to say so.
    pub(super) fn over_at(&self) -> Time {
        self.over_at.unwrap_or(Time::NEVER)
    }
}

impl<A, O: Os> Reactor<A, O> {
    /// One accept round over all listeners that may have clients, beginning with another one each time.
    pub(super) fn accept_round(&mut self, app: &mut A) {
        let count = self.listeners.len();
        if count == 0 || !self.listeners.iter().any(|listener| listener.readable) {
            return;
        }
        self.first_listener = (self.first_listener + 1) % count;
        self.catch_up();
        for offset in 0..count {
            self.accept_from(app, (self.first_listener + offset) % count);
            self.connections.unreserve();
        }
    }

    /// Accepts from one listener until its queue is empty, its budget is spent, or nobody may come in.
    pub(super) fn accept_from(&mut self, app: &mut A, at: usize) {
        if self.defer_accept(at) {
            return;
        }
        let (mut served, mut lost) = (false, None);
        for _ in 0..self.config.accept_budget {
            let Some(listener) = self.listeners.get(at) else {
                return;
            };
            if !listener.readable || listener.suspended || self.fd_exhaustion.is_on() || listener.retry_at.is_armed() {
                return;
            }
            let lets_wait = listener.lets_wait();
            let refusal = self.reserve(at);
            if refusal.is_some() && lets_wait {
                return;
            }
            let Some(listener) = self.listeners.get_mut(at) else {
                return;
            };
            let Some(socket) = &mut listener.socket else {
                listener.readable = false;
                return;
            };
            match self.os.accept(socket) {
                Ok((stream, addr)) => {
                    served = true;
                    listener.warned = false;
                    listener.broken = false;
                    listener.accepted += 1;
                    self.stats.accepted += 1;
                    self.receive(app, at, stream, addr, refusal);
                }
                Err(error) => match AcceptError::of(&error) {
                    AcceptError::Retry => {
                        self.stats.accept_errors += 1;
                        lost = Some(error);
                    }
                    AcceptError::Drained => {
                        listener.readable = false;
                        listener.broken = false;
                        listener.deferred = false;
                        if self.fd_exhaustion.episode && self.fd_exhaustion.over_at.is_none() {
                            self.fd_exhaustion.over_at = Some(self.now.after(self.config.emfile_backoff));
                        }
                        return;
                    }
                    AcceptError::OutOfFds => return self.handle_fd_exhaustion(&error),
                    AcceptError::Broken => return self.handle_broken(app, at, error),
                    AcceptError::Yield => return self.warn_and_back_off(at, "cannot accept from", &error),
                },
            }
        }
        // The budget is spent, more next turn; unless the kernel does nothing but lose clients.
        if let (Some(error), false) = (lost, served) {
            self.back_off(at);
            if let Some(listener) = self.listeners.get(at) {
                log::debug!(
                    target: logs::LISTENER,
                    "clients are lost in a row on listener {} on {}: {error}; trying again",
                    listener.name,
                    listener.addr
                );
            }
        }
    }

    /// Other servers that accept from the same queue have fewer connections: they go first. Once for a queue that is not
    /// empty, and not for long, because they may be busy.
    fn defer_accept(&mut self, at: usize) -> bool {
        if !self.connections.is_ahead() || self.drain.is_on() || self.refusal(at).is_some() {
            return false;
        }
        let until = self.now.after(ACCEPT_DEFERRAL);
        let Some(listener) = self.listeners.get_mut(at) else {
            return false;
        };
        if !listener.readable || listener.suspended || listener.retry_at.is_armed() || listener.deferred {
            return false;
        }
        listener.deferred = true;
        listener.retry_at = until;
        true
    }

    /// Somebody has come: in, or out again.
    fn receive(&mut self, app: &mut A, at: usize, mut stream: O::Stream, addr: Addr, refusal: Option<CloseReason>) {
        let ip = addr.ip();
        let Some(listener) = self.listeners.get_mut(at) else {
            return;
        };
        let options = &mut listener.options;
        let speaks_for_others = match (&mut options.trusted, options.proxy) {
            (Some(trusted), ProxyProtocol::Required | ProxyProtocol::Optional) => {
                ip.is_none_or(|ip| trusted.judge(ip) == Access::Allow)
            }
            _ => false,
        };
        let mut denied = ip.is_some_and(|ip| options.access.judge(ip) == Access::Deny);
        denied |= options.proxy == ProxyProtocol::Required && !speaks_for_others;
        // Only where something would be spent on it.
        let has_rates =
            self.config.accept_rate.is_some() || options.accept_rate.is_some() || options.sources.rate.is_some();
        let reason = if denied {
            Some(CloseReason::Denied)
        } else if has_rates && is_gone(&mut self.os, &mut stream) {
            Some(CloseReason::ClosedEarly)
        } else {
            refusal
        };
        let incoming = Incoming {
            addr,
            credentials: stream.credentials().ok(),
            proxy: None,
        };
        match reason {
            None => self.admit(app, at, stream, incoming, speaks_for_others),
            Some(reason @ (CloseReason::AtCapacity | CloseReason::RateLimited)) => {
                self.turn_away(app, at, stream, incoming, reason);
            }
            Some(reason) => {
                self.os.close(stream, false);
                self.report_failed_accept(app, at, None, incoming, Closed::new(reason));
            }
        }
    }

    /// Takes all listeners out of the poll for an interval.
    pub(super) fn handle_fd_exhaustion(&mut self, error: &io::Error) {
        self.fd_exhaustion.until = Some(self.now.after(self.config.emfile_backoff));
        self.fd_exhaustion.over_at = None;
        self.fd_exhaustion.failures += 1;
        if !self.fd_exhaustion.episode {
            self.fd_exhaustion.episode = true;
            self.fd_exhaustion.failures = 1;
            self.stats.out_of_fds += 1;
            log::warn!(
                target: logs::FD_EXHAUSTION,
                "no new connections for now: {error}; {} are served, new clients wait in the backlog; raise the limit of \
                 open files (ulimit -n; fs.file-max for the system) or lower max_connections ({})",
                self.connections.len(),
                self.connections.cap()
            );
        }
        for listener in &mut self.listeners {
            listener.readable = true;
        }
    }

    pub(super) fn end_episode(&mut self) {
        self.fd_exhaustion.episode = false;
        self.fd_exhaustion.over_at = None;
        log::info!(
            target: logs::FD_EXHAUSTION,
            "accepting again; {} attempts failed for lack of descriptors or memory",
            self.fd_exhaustion.failures
        );
    }

    /// The socket says that it is no listener: give it one more chance, then let it go and tell its owner.
    fn handle_broken(&mut self, app: &mut A, at: usize, error: io::Error) {
        let Some(listener) = self.listeners.get_mut(at) else {
            return;
        };
        if !std::mem::replace(&mut listener.broken, true) {
            return self.warn_and_back_off(at, "cannot accept from", &error);
        }
        log::error!(
            target: logs::LISTENER,
            "listener {} on {} is lost and closed: {error}",
            listener.name,
            listener.addr
        );
        let id = listener.id;
        let told = catch_unwind(AssertUnwindSafe(|| listener.service.on_listener_lost(app, id, &error)));
        if let Err(panic) = told {
            self.stats.panics += 1;
            report_panic("a service's on_listener_lost", panic);
        }
        self.close_port(at);
    }

    /// Leaves a listener alone for an interval.
    fn back_off(&mut self, at: usize) {
        let retry_at = self.now.after(self.config.emfile_backoff);
        if let Some(listener) = self.listeners.get_mut(at) {
            listener.retry_at = retry_at;
        }
    }

    /// Leaves a listener alone for an interval, with one line in the log until it works again.
    pub(super) fn warn_and_back_off(&mut self, at: usize, what: &str, error: &io::Error) {
        self.back_off(at);
        if let Some(listener) = self.listeners.get_mut(at) {
            if !std::mem::replace(&mut listener.warned, true) {
                log::warn!(
                    target: logs::LISTENER,
                    "{what} listener {} on {}: {error}; trying again",
                    listener.name,
                    listener.addr
                );
            }
        }
    }

    /// The cap or the rate is reached and the listener's policy is to say so.
    fn turn_away(&mut self, app: &mut A, at: usize, stream: O::Stream, incoming: Incoming, reason: CloseReason) {
        let farewell = match self.listeners.get(at).map(|listener| &listener.options.at_capacity) {
            Some(AtCapacity::Refuse { farewell }) => farewell.clone(),
            _ => Vec::new(),
        };
        self.dismiss(stream, &farewell);
        self.report_failed_accept(app, at, None, incoming, Closed::new(reason));
    }

    /// Gives the peer a slot; asks the service first, unless a PROXY header is to come.
    fn admit(&mut self, app: &mut A, at: usize, mut stream: O::Stream, incoming: Incoming, awaits_header: bool) {
        let now = self.now;
        let Some(listener) = self.listeners.get_mut(at) else {
            return;
        };
        let ip = incoming.addr.ip();
        let mut counted = Counted::No;
        if let (Some(ip), false) = (ip, awaits_header) {
            let limits = &listener.options.sources;
            match listener.sources.admit(ip, limits, now) {
                Some(way) => counted = way,
                None => {
                    self.os.close(stream, false);
                    let id = self.connections.next_id();
                    return self.report_failed_accept(
                        app,
                        at,
                        Some(id),
                        incoming,
                        Closed::new(CloseReason::SourceLimited),
                    );
                }
            }
        }
        // Not for one whose source has too many already.
        self.evict_oldest_pending(app, at);
        if !self.connections.reserve() {
            self.uncount(at, ip, counted);
            return self.turn_away(app, at, stream, incoming, CloseReason::AtCapacity);
        }
        let id = self.connections.next_id();
        let Some(listener) = self.listeners.get_mut(at) else {
            return;
        };
        listener.bucket.spend(listener.options.accept_rate, now);
        self.bucket.spend(self.config.accept_rate, now);
        let peer = incoming.clone().at(listener, Some(id));
        let pool = &mut self.pool;
        // The service, and the framing's maker, are the user's code.
        let answer = catch_unwind(AssertUnwindSafe(|| {
            let handler = if awaits_header {
                None
            } else {
                Some(listener.service.accept(app, peer)?)
            };
            Ok((handler, listener.machine(now, pool)))
        }));
        let (handler, mut machine) = match answer {
            Ok(Ok(admitted)) => admitted,
            Ok(Err(Refuse { farewell })) => {
                self.uncount(at, ip, counted);
                self.dismiss(stream, &farewell);
                return self.report_failed_accept(app, at, Some(id), incoming, Closed::new(CloseReason::Refused));
            }
            Err(panic) => {
                self.stats.panics += 1;
                report_panic("a service's accept", panic);
                self.uncount(at, ip, counted);
                self.os.close(stream, false);
                return self.report_failed_accept(app, at, Some(id), incoming, Closed::new(CloseReason::Panicked));
            }
        };
        if let Err(error) = self.os.register_stream(&mut stream, Token::of_conn(id)) {
            self.uncount(at, ip, counted);
            self.os.close(stream, false);
            if let Some(handler) = handler {
                self.drop_handler(handler);
            }
            self.discard("a framer's destructor", machine);
            self.report_failed_accept(
                app,
                at,
                Some(id),
                incoming,
                Closed::with(CloseReason::Unregistered, error),
            );
            return self.handle_fd_exhaustion(&io::Error::from_raw_os_error(libc::ENOMEM));
        }
        let Some(listener) = self.listeners.get_mut(at) else {
            return;
        };
        listener.connections += 1;
        if awaits_header {
            machine.await_header(listener.options.proxy == ProxyProtocol::Required);
        } else {
            machine.handle_admitted(now, &mut self.pool);
        }
        if let Some(until) = self.drain.handshake_until() {
            machine.drain(until);
        }
        let conn = Connection {
            writable: true,
            pending: machine.state() != State::Open,
            counted,
            ..Connection::new(
                id,
                Some(listener.id),
                incoming.addr,
                machine,
                now,
                self.stats.iterations,
            )
        };
        self.move_in(conn, Some(stream), handler);
        self.turn(app, id);
    }

    /// The connection is not to be, or has gone: its source has one less.
    pub(super) fn uncount(&mut self, at: usize, source: Option<IpAddr>, counted: Counted) {
        if let (Some(listener), Some(source)) = (self.listeners.get_mut(at), source) {
            let limits = &listener.options.sources;
            listener.sources.leave(source, limits, counted, self.now);
        }
    }

    pub(super) fn move_in(
        &mut self,
        conn: Connection,
        stream: Option<O::Stream>,
        handler: Option<Box<dyn Handler<A>>>,
    ) {
        let id = conn.id;
        let pending = conn.pending;
        self.connections.insert(conn);
        if pending {
            self.pending.push(id, &self.connections);
        }
        let index = id.index as usize;
        if self.streams.len() <= index {
            self.streams.resize_with(index + 1, || None);
            self.handlers.resize_with(index + 1, || None);
        }
        if let Some(place) = self.streams.get_mut(index) {
            *place = stream;
        }
        if let Some(place) = self.handlers.get_mut(index) {
            *place = handler;
        }
        self.shared.set_live(id, true);
        self.stats.peak = self.stats.peak.max(self.connections.len());
    }

    /// Last words for somebody who gets no slot. Best effort: nothing here can wait.
    fn dismiss(&mut self, mut stream: O::Stream, farewell: &[u8]) {
        if !farewell.is_empty() {
            let written = self.os.write(&mut stream, farewell);
            self.pool.traffic.bytes_out += written.unwrap_or(0) as u64;
        }
        let _ = self.os.shutdown(&mut stream);
        // What has arrived already would turn the close into a reset and destroy the farewell.
        let scratch = self.scratch.as_mut().map(|scratch| &mut scratch.wire[..]);
        let read = self.os.read(&mut stream, scratch.unwrap_or_default());
        self.pool.traffic.bytes_in += read.unwrap_or(0) as u64;
        self.os.close(stream, false);
    }

    /// Counts a connection that never got a slot, and tells its service.
    fn report_failed_accept(&mut self, app: &mut A, at: usize, id: Option<ConnId>, incoming: Incoming, closed: Closed) {
        self.stats.count_closed(closed.reason);
        let Some(listener) = self.listeners.get_mut(at) else {
            return;
        };
        log::debug!(target: logs::CONNECTION, "{} on {}: {closed}", incoming.addr, listener.name);
        let record = CloseRecord {
            id,
            listener: Some(listener.id),
            peer: incoming.addr.clone(),
            source: incoming.addr.clone(),
            age: Duration::ZERO,
            traffic: Traffic::default(),
        };
        let peer = incoming.at(listener, id);
        let told = catch_unwind(AssertUnwindSafe(|| {
            listener.service.on_failed_accept(app, &peer, &closed);
        }));
        if let Err(panic) = told {
            self.stats.panics += 1;
            report_panic("a service's on_failed_accept", panic);
        }
        self.note_close(record, &closed);
    }

    /// Makes each listener's registration follow its state.
    pub(super) fn reconcile(&mut self) {
        let room = Room {
            has_slot: self.connections.await_room(),
            ..self.room()
        };
        for at in 0..self.listeners.len() {
            let Some(listener) = self.listeners.get_mut(at) else {
                return;
            };
            let state = listener.state(&room);
            let wanted = state == crate::control::ListenerState::Listening;
            // No event announces who comes while it is out of the poll.
            listener.readable |= !wanted && listener.socket.is_some();
            if wanted == listener.registered || listener.retry_at.is_armed() {
                continue;
            }
            let Some(socket) = &mut listener.socket else {
                continue;
            };
            let outcome = if wanted {
                self.os.register_listener(socket, Token::of_listener(listener.id))
            } else {
                self.os.deregister_listener(socket)
            };
            match outcome {
                Ok(()) => {
                    listener.registered = wanted;
                    // Somebody may have come between the last accept and now: do not trust the edge.
                    listener.readable |= wanted;
                }
                Err(error) => {
                    let what = if wanted { "cannot register" } else { "cannot deregister" };
                    self.warn_and_back_off(at, what, &error);
                }
            }
        }
    }
}

/// It has been reset, or has finished without a word, while it waited in the backlog.
fn is_gone<O: Os>(os: &mut O, stream: &mut O::Stream) -> bool {
    match os.peek(stream) {
        Ok(count) => count == 0,
        Err(error) => {
            let passing = matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted);
            !passing && !is_short_of_memory(&error)
        }
    }
}
