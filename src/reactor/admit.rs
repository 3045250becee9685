//! Admitting an accepted client: its source's limits, its slot, its service's handler.

use std::io;

use super::close::finish_close;
use super::connection::Connection;
use super::core::Core;
use super::drive::Scratch;
use super::incoming::Incoming;
use super::inner::Inner;
use super::os::{End, Os, Token};
use super::refuse::{dismiss, report_failed, turn_away};
use super::source_limits::Counted;
use super::standing::Standing;
use super::user_code::drop_handler;
use crate::catch::catch;
use crate::config::ProxyProtocol;
use crate::handler::{Handler, Interest, Refuse};
use crate::id::ConnId;
use crate::proto::Machine;
use crate::reason::{CloseReason, Closed};

/// Gives the client a slot; asks the service first, unless a PROXY header is to come.
pub(super) fn admit<A, O: Os>(
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
        conns.unclaim();
        os.close(stream, End::Close);
        let id = conns.next_id();
        let closed = Closed::new(CloseReason::SourceLimited);
        report_failed(inner, app, at, Some(id), incoming, closed);
        return None;
    };
    // Not before: a client whose source has too many evicts none.
    evict_for(inner, app, at);
    let core = &mut inner.core;
    let is_full = core.listeners.get(at)?.reached_cap().is_some();
    if is_full || !core.conns.has_claim() && !claim_slot(core) {
        core.conns.unclaim();
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
    // The service may pass the id on.
    inner.core.conns.show(id);
    let (handler, mut machine) = match prepare(inner, app, at, id, &incoming, awaits_header) {
        Ok(prepared) => prepared,
        Err((Refuse { farewell }, reason)) => {
            inner.core.conns.hide(id);
            inner.core.conns.unclaim();
            uncount(&mut inner.core, at, ip, counted);
            match reason {
                CloseReason::Refused => dismiss(&mut inner.core, scratch, at, stream, &farewell),
                _ => inner.core.os.close(stream, End::Fin),
            }
            report_failed(inner, app, at, Some(id), incoming, Closed::new(reason));
            return None;
        }
    };
    let core = &mut inner.core;
    let token = Token::of_conn(id);
    let registered = core
        .os
        .register_stream(&mut stream, Interest::Readable, token);
    if let Err(error) = registered {
        core.conns.hide(id);
        core.conns.unclaim();
        uncount(core, at, ip, counted);
        core.os.close(stream, End::Fin);
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
    let (listener_id, is_full) = (listener.id, listener.reached_cap().is_some());
    if awaits_header {
        machine.await_header(listener.options.proxy_protocol == ProxyProtocol::Required);
    } else {
        machine.handle_admitted(now);
    }
    let closes_last = listener.options.closes_last;
    if let Some(until) = core.drain.notified_until(closes_last, now) {
        machine.drain(until);
    }
    let conn = Connection {
        stream: Some(stream),
        writable: true,
        standing: Standing::of(machine.state(), counted),
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
    if is_full {
        core.watch_listener_cap(listener_id);
    }
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
    let Some(listener) = core.listeners.get_mut(at) else {
        return Err((Refuse::silently(), CloseReason::Refused));
    };
    core.admission.spend(listener, &core.config, core.now);
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
    // The service may have blocked: the connection's timeouts count from now.
    core.now = core.os.now();
    let now = core.now;
    // The framing's maker is foreign code.
    match catch(|| listener.machine(now, &mut core.conns.pool)) {
        Ok(mut machine) => {
            if machine.has_framer() {
                // The maker may have blocked too.
                core.now = core.os.now();
                machine.extend_handshake(core.now.since(now));
            }
            Ok((handler, machine))
        }
        Err(panic) => {
            core.guard.report("a framing's maker", panic, None);
            if let Some(handler) = handler {
                drop_handler(&mut core.guard, handler);
            }
            Err(panicked)
        }
    }
}

/// At the cap, or if too many connections are pending: evicts the oldest for a client of this
/// listener.
fn evict_for<A, O: Os>(inner: &mut Inner<A, O>, app: &mut A, at: usize) {
    let core = &mut inner.core;
    let Core {
        admission,
        conns,
        listeners,
        config,
        now,
        ..
    } = core;
    let Some(listener) = listeners.get_mut(at) else {
        return;
    };
    listener.trim(conns);
    let candidate = admission.eviction_candidate(conns, listener, config, *now);
    let Some(id) = candidate else {
        return;
    };
    core.end(id, CloseReason::Evicted);
    let Some(reset) = core.next_step(id) else {
        return core.conns.wake(id);
    };
    if !core.conns.has_claim() {
        core.conns.keep_next();
    }
    finish_close(inner, app, id, reset);
}

/// Claims a slot for the client, if an eviction or another server has freed one.
fn claim_slot<O: Os>(core: &mut Core<O>) -> bool {
    let Core {
        conns, listeners, ..
    } = core;
    listeners.refill_reserves(conns);
    conns.prepare();
    let gate = conns.gate();
    let _locked = gate.as_ref().map(|shared_cap| shared_cap.lock());
    conns.claim()
}

fn uncount<O: Os>(core: &mut Core<O>, at: usize, ip: Option<std::net::IpAddr>, counted: Counted) {
    if let Some(listener) = core.listeners.get_mut(at) {
        listener.uncount_source(ip, counted, core.now);
    }
}

/// The PROXY header has come, or there is none: the client is known, and the service is asked.
pub(super) fn ask_service<A, O: Os>(inner: &mut Inner<A, O>, app: &mut A, id: ConnId) {
    let Inner { core, user } = inner;
    let Some((conn, pool)) = core.conns.parts(id) else {
        return;
    };
    let Some(listener) = conn.listener.and_then(|id| core.listeners.by_id_mut(id)) else {
        return;
    };
    let header = conn.machine.proxy().cloned();
    // A header without an address says nothing of the client: the proxy's own is judged and
    // counted.
    let source = conn.source().ip();
    let is_banned = core.admission.bans.contains(source, core.now);
    if header.is_some() && (is_banned || listener.denies(source)) {
        return conn.machine.end(Closed::new(CloseReason::Denied), pool);
    }
    match listener.count_source(source, core.now) {
        Some(counted) => conn.standing.set_counted(counted),
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
            .and_then(|stream| core.os.credentials(stream).ok()),
        proxy: header,
    };
    let peer = incoming.peer(listener, Some(id));
    let asked_at = core.os.now();
    let accepted = user.accept(listener.service, app, peer);
    conn.machine.drop_unshared_tlvs();
    // The service may have blocked: the connection's timeouts count from now.
    core.now = core.os.now();
    let now = core.now;
    conn.machine.extend_handshake(now.since(asked_at));
    let (farewell, reason) = match accepted {
        Ok(Ok(handler)) => {
            user.set_handler(id, Some(handler));
            return conn.machine.handle_admitted(now);
        }
        Ok(Err(Refuse { farewell })) => (farewell, CloseReason::Refused),
        Err(panic) => {
            core.guard.report("a service's accept", panic, None);
            (Vec::new(), CloseReason::Panicked)
        }
    };
    let tls = conn
        .machine
        .refuse(&farewell, Closed::new(reason), now, pool);
    core.guard.drop("a TLS configuration's destructor", tls);
}
