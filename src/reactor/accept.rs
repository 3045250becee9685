//! Accepting clients: each is admitted, refused or dropped.

use std::io;
use std::time::Duration;

use super::close::finish_close;
use super::connections::Connection;
use super::core::Core;
use super::drive::{is_short_of_memory, Scratch};
use super::history::CloseRecord;
use super::incoming::Incoming;
use super::inner::Inner;
use super::listener::AcceptError;
use super::listeners;
use super::os::{Os, Socket as _, Token};
use super::panic_guard::catch;
use super::source_limits::Counted;
use super::user_code::drop_handler;
use crate::config::AtCapacity;
use crate::config::ProxyProtocol;
use crate::handler::{Handler, Refuse};
use crate::id::ConnId;
use crate::logs;
use crate::proto::{Machine, State, Traffic};
use crate::reason::{CloseReason, Closed};

/// How long servers with fewer connections go first, where several share a backlog.
const DEFER: Duration = Duration::from_millis(1);

/// One accept round over all listeners, beginning with another one each time.
pub(super) struct Round {
    first: usize,
    offset: usize,
    listeners: usize,
    /// Of the listener whose turn it is: `None` before its first accept.
    current: Option<Progress>,
}

struct Progress {
    accepts_left: usize,
    accepted: bool,
    /// The last client that the kernel lost.
    lost: Option<io::Error>,
}

enum Step {
    /// A connection was inserted: it has its first turn now.
    Admitted(ConnId),
    /// The client is dealt with; go on with the same listener.
    Next,
    /// No more from this listener in this round.
    Done,
}

impl Round {
    /// `None` if no listener can have a client.
    pub(super) fn begin<O: Os>(core: &mut Core<O>) -> Option<Self> {
        let first = core.listeners.begin_round()?;
        core.refresh();
        Some(Self {
            first,
            offset: 0,
            listeners: core.listeners.len(),
            current: None,
        })
    }

    /// Accepts until a connection is admitted, which has its first turn then, or the round is over.
    pub(super) fn next<A, O: Os>(
        &mut self,
        inner: &mut Inner<A, O>,
        app: &mut A,
        scratch: &mut Scratch,
    ) -> Option<ConnId> {
        while self.offset < self.listeners {
            let at = (self.first + self.offset) % self.listeners;
            if self.current.is_none() && !defer_accept(&mut inner.core, at) {
                self.current = Some(Progress {
                    accepts_left: inner.core.config.budgets.accepts,
                    accepted: false,
                    lost: None,
                });
            }
            let step = match &mut self.current {
                Some(progress) => accept_next(inner, app, scratch, at, progress),
                None => Step::Done,
            };
            match step {
                Step::Admitted(id) => return Some(id),
                Step::Next => {}
                Step::Done => {
                    self.offset += 1;
                    self.current = None;
                    inner.core.conns.unreserve();
                }
            }
        }
        None
    }
}

/// Other servers that accept from the same backlog have fewer connections: they go first, once for
/// a backlog that is not empty, and not for long, because they may be busy.
fn defer_accept<O: Os>(core: &mut Core<O>, at: usize) -> bool {
    if !core.conns.is_ahead() || core.drain.is_on() {
        return false;
    }
    let Some(listener) = core.listeners.get(at) else {
        return false;
    };
    let refusal = core
        .admission
        .refusal(&core.conns, listener, &core.config, core.now);
    if refusal.is_some() || !listener.may_accept() || listener.deferred {
        return false;
    }
    let until = core.now.after(DEFER);
    if let Some(listener) = core.listeners.get_mut(at) {
        listener.deferred = true;
        listener.retry_at = until;
    }
    true
}

fn accept_next<A, O: Os>(
    inner: &mut Inner<A, O>,
    app: &mut A,
    scratch: &mut Scratch,
    at: usize,
    progress: &mut Progress,
) -> Step {
    let core = &mut inner.core;
    if progress.accepts_left == 0 {
        end_budget(core, at, progress);
        return Step::Done;
    }
    progress.accepts_left -= 1;
    let Core {
        os,
        conns,
        listeners,
        admission,
        config,
        now,
        stats,
        ..
    } = core;
    let Some(listener) = listeners.get_mut(at) else {
        return Step::Done;
    };
    if !listener.may_accept() || admission.fds.is_on() {
        return Step::Done;
    }
    let refusal = admission.reserve(conns, listener, config, *now);
    if refusal.is_some() && listener.lets_wait() {
        return Step::Done;
    }
    let Some(socket) = &mut listener.socket else {
        listener.readable = false;
        return Step::Done;
    };
    match os.accept(socket) {
        Ok((stream, addr)) => {
            progress.accepted = true;
            listener.failing = false;
            listener.broken = false;
            listener.accepted += 1;
            stats.accepted += 1;
            let incoming = Incoming {
                addr,
                credentials: stream.credentials().ok(),
                proxy: None,
            };
            match handle_accepted(inner, app, scratch, at, stream, incoming, refusal) {
                Some(id) => Step::Admitted(id),
                None => Step::Next,
            }
        }
        Err(error) => handle_error(inner, app, at, error, progress),
    }
}

fn handle_error<A, O: Os>(
    inner: &mut Inner<A, O>,
    app: &mut A,
    at: usize,
    error: io::Error,
    progress: &mut Progress,
) -> Step {
    let core = &mut inner.core;
    let retry_at = core.now.after(core.config.emfile_backoff);
    match AcceptError::of(&error) {
        AcceptError::Retry => {
            core.stats.accept_errors += 1;
            progress.lost = Some(error);
            return Step::Next;
        }
        AcceptError::Drained => {
            if let Some(listener) = core.listeners.get_mut(at) {
                listener.readable = false;
                listener.broken = false;
                listener.deferred = false;
            }
            core.admission.fds.handle_drained(retry_at);
        }
        AcceptError::OutOfFds => core.begin_fd_exhaustion(&error),
        AcceptError::Broken => handle_broken(inner, app, at, error),
        AcceptError::Yield => core
            .listeners
            .fail(at, retry_at, "cannot accept from", &error),
    }
    Step::Done
}

/// The budget is spent: more in the next iteration, unless the kernel only loses clients.
fn end_budget<O: Os>(core: &mut Core<O>, at: usize, progress: &mut Progress) {
    let (Some(error), false) = (progress.lost.take(), progress.accepted) else {
        return;
    };
    core.listeners
        .back_off(at, core.now.after(core.config.emfile_backoff));
    if let Some(listener) = core.listeners.get(at) {
        log::debug!(
            target: logs::LISTENER,
            "clients are lost in a row on listener {} on {}: {error}; trying again",
            listener.name,
            listener.addr
        );
    }
}

/// The socket reports that it is no listener: it has one more chance, then it is closed and its
/// service is told.
fn handle_broken<A, O: Os>(inner: &mut Inner<A, O>, app: &mut A, at: usize, error: io::Error) {
    let Inner { core, user } = inner;
    let retry_at = core.now.after(core.config.emfile_backoff);
    let Some(listener) = core.listeners.get_mut(at) else {
        return;
    };
    if !std::mem::replace(&mut listener.broken, true) {
        return core
            .listeners
            .fail(at, retry_at, "cannot accept from", &error);
    }
    log::error!(
        target: logs::LISTENER,
        "listener {} on {} is lost and closed: {error}",
        listener.name,
        listener.addr
    );
    user.listener_lost(&mut core.guard, listener.service, app, listener.id, &error);
    listeners::close(&mut core.os, listener);
}

/// Handles one accepted socket: admit, refuse or drop it. `refusal` is why no client may come in.
fn handle_accepted<A, O: Os>(
    inner: &mut Inner<A, O>,
    app: &mut A,
    scratch: &mut Scratch,
    at: usize,
    mut stream: O::Stream,
    incoming: Incoming,
    refusal: Option<CloseReason>,
) -> Option<ConnId> {
    let core = &mut inner.core;
    let listener = core.listeners.get_mut(at)?;
    let ip = incoming.addr.ip();
    let trusted = listener.trusts(ip);
    let mut denied = listener.denies(ip);
    denied |= listener.options.proxy_protocol == ProxyProtocol::Required && !trusted;
    // Where a rate would be charged for it, a client that has gone is recognised.
    let has_rates = core.config.accept_rate.is_some()
        || listener.options.accept_rate.is_some()
        || listener.options.source_limits.rate.is_some();
    let reason = if denied {
        Some(CloseReason::Denied)
    } else if has_rates && is_gone(&mut core.os, &mut stream) {
        Some(CloseReason::ClosedEarly)
    } else {
        refusal
    };
    match reason {
        None => return admit(inner, app, scratch, at, stream, incoming, trusted),
        Some(reason @ (CloseReason::AtCapacity | CloseReason::RateLimited)) => {
            turn_away(inner, app, scratch, at, stream, incoming, reason);
        }
        Some(reason) => {
            core.os.close(stream, false);
            report_failed(inner, app, at, None, incoming, Closed::new(reason));
        }
    }
    None
}

/// The cap or the rate is reached, and the listener's policy is to tell the client.
fn turn_away<A, O: Os>(
    inner: &mut Inner<A, O>,
    app: &mut A,
    scratch: &mut Scratch,
    at: usize,
    stream: O::Stream,
    incoming: Incoming,
    reason: CloseReason,
) {
    let core = &mut inner.core;
    let farewell = match core
        .listeners
        .get(at)
        .map(|listener| &listener.options.at_capacity)
    {
        Some(AtCapacity::Refuse { farewell }) => farewell.clone(),
        _ => Vec::new(),
    };
    dismiss(core, scratch, stream, &farewell);
    report_failed(inner, app, at, None, incoming, Closed::new(reason));
}

/// Gives the client a slot; asks the service first, unless a PROXY header is to come.
fn admit<A, O: Os>(
    inner: &mut Inner<A, O>,
    app: &mut A,
    scratch: &mut Scratch,
    at: usize,
    mut stream: O::Stream,
    incoming: Incoming,
    awaits_header: bool,
) -> Option<ConnId> {
    let Core {
        os,
        conns,
        listeners,
        now,
        ..
    } = &mut inner.core;
    let ip = incoming.addr.ip().filter(|_| !awaits_header);
    let Some(counted) = listeners.get_mut(at)?.count_source(ip, *now) else {
        os.close(stream, false);
        let id = conns.next_id();
        let closed = Closed::new(CloseReason::SourceLimited);
        report_failed(inner, app, at, Some(id), incoming, closed);
        return None;
    };
    // Not before: a client whose source has too many evicts none.
    evict_for(inner, app, at);
    if !inner.core.conns.reserve() {
        uncount(&mut inner.core, at, ip, counted);
        turn_away(
            inner,
            app,
            scratch,
            at,
            stream,
            incoming,
            CloseReason::AtCapacity,
        );
        return None;
    }
    let id = inner.core.conns.next_id();
    let (handler, mut machine) = match prepare(inner, app, at, id, &incoming, awaits_header) {
        Ok(prepared) => prepared,
        Err((Refuse { farewell }, reason)) => {
            uncount(&mut inner.core, at, ip, counted);
            match reason {
                CloseReason::Refused => dismiss(&mut inner.core, scratch, stream, &farewell),
                _ => inner.core.os.close(stream, false),
            }
            report_failed(inner, app, at, Some(id), incoming, Closed::new(reason));
            return None;
        }
    };
    let core = &mut inner.core;
    if let Err(error) = core.os.register_stream(&mut stream, Token::of_conn(id)) {
        uncount(core, at, ip, counted);
        core.os.close(stream, false);
        if let Some(handler) = handler {
            drop_handler(&mut core.guard, handler);
        }
        core.guard.drop("a framer's destructor", machine);
        let closed = Closed::with(CloseReason::Unregistered, error);
        report_failed(inner, app, at, Some(id), incoming, closed);
        let no_memory = io::Error::from_raw_os_error(libc::ENOMEM);
        inner.core.begin_fd_exhaustion(&no_memory);
        return None;
    }
    let now = core.now;
    let listener = core.listeners.get_mut(at)?;
    listener.connections += 1;
    if awaits_header {
        machine.await_header(listener.options.proxy_protocol == ProxyProtocol::Required);
    } else {
        machine.handle_admitted(now);
    }
    if let Some(until) = core.drain.handshake_until() {
        machine.drain(until);
    }
    let conn = Connection {
        stream: Some(stream),
        writable: true,
        pending: machine.state() != State::Open,
        counted,
        ..Connection::new(
            id,
            Some(listener.id),
            incoming.addr,
            machine,
            now,
            core.stats.iterations,
        )
    };
    core.insert(conn);
    inner.user.set_handler(id, handler);
    Some(id)
}

type Prepared<A> = (Option<Box<dyn Handler<A>>>, Machine);

/// Makes the machine and, unless a PROXY header is to come, asks the service for a handler.
fn prepare<A, O: Os>(
    inner: &mut Inner<A, O>,
    app: &mut A,
    at: usize,
    id: ConnId,
    incoming: &Incoming,
    awaits_header: bool,
) -> Result<Prepared<A>, (Refuse, CloseReason)> {
    let Inner { core, user } = inner;
    let panicked = (Refuse::silently(), CloseReason::Panicked);
    let now = core.now;
    let Some(listener) = core.listeners.get_mut(at) else {
        return Err((Refuse::silently(), CloseReason::Refused));
    };
    core.admission.spend(listener, &core.config, now);
    let mut handler = None;
    if !awaits_header {
        let peer = incoming.clone().peer(listener, Some(id));
        match user.accept(listener.service, app, peer) {
            Ok(Ok(accepted)) => handler = Some(accepted),
            Ok(Err(refuse)) => return Err((refuse, CloseReason::Refused)),
            Err(panic) => {
                core.guard.report("a service's accept", panic, None);
                return Err(panicked);
            }
        }
    }
    // The framing's maker is foreign code.
    match catch(|| listener.machine(now, &mut core.conns.pool)) {
        Ok(machine) => Ok((handler, machine)),
        Err(panic) => {
            core.guard.report("a framing's maker", panic, None);
            if let Some(handler) = handler {
                drop_handler(&mut core.guard, handler);
            }
            Err(panicked)
        }
    }
}

/// Too many connections are pending: evicts the oldest for a client of this listener.
fn evict_for<A, O: Os>(inner: &mut Inner<A, O>, app: &mut A, at: usize) {
    let core = &mut inner.core;
    let Some(listener) = core.listeners.get(at) else {
        return;
    };
    let candidate =
        core.admission
            .eviction_candidate(&core.conns, listener, &core.config, core.now);
    let Some(id) = candidate else {
        return;
    };
    core.end(id, CloseReason::Evicted);
    core.conns.keep_next();
    match core.next_step(id) {
        Some(reset) => finish_close(inner, app, id, reset),
        None => core.conns.wake(id),
    }
}

fn uncount<O: Os>(core: &mut Core<O>, at: usize, ip: Option<std::net::IpAddr>, counted: Counted) {
    if let Some(listener) = core.listeners.get_mut(at) {
        listener.uncount_source(ip, counted, core.now);
    }
}

/// The PROXY header has come, or there is none: the client is known, and the service is asked.
pub(super) fn ask_service<A, O: Os>(inner: &mut Inner<A, O>, app: &mut A, id: ConnId) {
    let Inner { core, user } = inner;
    let now = core.now;
    let Some((conn, pool)) = core.conns.parts(id) else {
        return;
    };
    let Some(listener) = conn.listener.and_then(|id| core.listeners.by_id_mut(id)) else {
        return;
    };
    let header = conn.machine.proxy().cloned();
    let source = match &header {
        Some(header) => header.source().map(|source| source.ip()),
        None => conn.peer().ip(),
    };
    if header.is_some() && listener.denies(source) {
        return conn.machine.end(Closed::new(CloseReason::Denied), pool);
    }
    match listener.count_source(source, now) {
        Some(counted) => conn.counted = counted,
        None => {
            return conn
                .machine
                .end(Closed::new(CloseReason::SourceLimited), pool)
        }
    }
    let incoming = Incoming {
        addr: conn.peer(),
        credentials: conn
            .stream
            .as_ref()
            .and_then(|stream| stream.credentials().ok()),
        proxy: header,
    };
    let peer = incoming.peer(listener, Some(id));
    match user.accept(listener.service, app, peer) {
        Ok(Ok(handler)) => {
            user.set_handler(id, Some(handler));
            conn.machine.handle_admitted(now);
        }
        Ok(Err(Refuse { farewell })) => {
            conn.machine
                .refuse(&farewell, Closed::new(CloseReason::Refused), now, pool);
        }
        Err(panic) => {
            conn.machine
                .refuse(&[], Closed::new(CloseReason::Panicked), now, pool);
            core.guard.report("a service's accept", panic, None);
        }
    }
}

/// Sends a client that gets no slot its farewell. Best effort: nothing here can wait.
fn dismiss<O: Os>(
    core: &mut Core<O>,
    scratch: &mut Scratch,
    mut stream: O::Stream,
    farewell: &[u8],
) {
    let traffic = &mut core.conns.pool.traffic;
    if !farewell.is_empty() {
        let written = core.os.write(&mut stream, farewell);
        traffic.bytes_out += written.unwrap_or(0) as u64;
    }
    let _ = core.os.shutdown(&mut stream);
    // Unread input would turn the close into a reset and destroy the farewell.
    let read = core.os.read(&mut stream, &mut scratch.wire);
    traffic.bytes_in += read.unwrap_or(0) as u64;
    core.os.close(stream, false);
}

/// Counts a connection that never got a slot, and tells its service.
fn report_failed<A, O: Os>(
    inner: &mut Inner<A, O>,
    app: &mut A,
    at: usize,
    id: Option<ConnId>,
    incoming: Incoming,
    closed: Closed,
) {
    let Inner { core, user } = inner;
    core.stats.count_closed(closed.reason);
    let Some(listener) = core.listeners.get(at) else {
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
    let (service, peer) = (listener.service, incoming.peer(listener, id));
    user.failed_accept(&mut core.guard, service, app, &peer, &closed);
    core.history
        .record_close(&mut core.guard, record, &closed, core.now);
}

/// The client has reset the connection, or finished without a byte, while it was in the backlog.
fn is_gone<O: Os>(os: &mut O, stream: &mut O::Stream) -> bool {
    match os.peek(stream) {
        Ok(count) => count == 0,
        Err(error) => {
            let passing = matches!(
                error.kind(),
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
            );
            !passing && !is_short_of_memory(&error)
        }
    }
}
