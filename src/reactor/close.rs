//! The end of a connection: its socket, its last callback, its slot; and connections that leave the
//! loop as blocking streams.

use super::core::Core;
use super::drain;
use super::incoming::Incoming;
use super::inner::Inner;
use super::os::{End, Os};
use super::work;
use crate::catch::catch;
use crate::detached::{Detached, Socket};
use crate::id::ConnId;
use crate::logs;
use crate::reason::{CloseReason, Closed};

/// Ends a connection: the socket first, then the last callback, then the slot.
pub(super) fn finish_close<A, O: Os>(
    inner: &mut Inner<A, O>,
    app: &mut A,
    id: ConnId,
    reset: bool,
) {
    let core = &mut inner.core;
    if core.running.is_none() {
        // Outside of a turn: another connection's last callback may have blocked.
        core.refresh();
    }
    core.conns.offer_room();
    let Some(conn) = core.conns.get_mut(id) else {
        return;
    };
    let was_open = conn.machine.was_open();
    let mut credentials = None;
    if let Some(stream) = conn.stream.take() {
        if !was_open {
            credentials = core.os.credentials(&stream).ok();
        }
        core.os.close(stream, End::of(&conn.machine, reset));
        core.outbound.lose_socket(id);
    }
    let closed = conn.machine.take_closed();
    core.os.note_end(closed.reason);
    let (listener, is_outgoing) = (conn.listener, conn.machine.is_outgoing());
    // For the service, if the handler has not been told.
    let incoming = (!was_open).then(|| Incoming {
        addr: conn.peer(),
        credentials,
        proxy: conn.machine.proxy().cloned(),
    });
    core.conns.hide(id);
    if let Some(receiver) = core.detached.take_receiver(id) {
        core.guard
            .drop("the receiver of a detached connection", receiver);
    }
    log_close(inner, id, &closed);
    inner.core.end_pending(id);
    inner.core.begin_leaving(id, &closed);
    if was_open {
        inner.call(app, id, |handler, cx| {
            handler.on_close(cx, &closed);
            Ok(())
        });
    } else if is_outgoing {
        inner.call(app, id, |handler, cx| {
            handler.on_connect_failed(cx, &closed);
            Ok(())
        });
    }
    let Inner { core, user } = inner;
    user.drop_handler(&mut core.guard, id);
    core.remove(id, &closed);
    if let (Some(incoming), Some(listener)) = (incoming, listener) {
        if let Some(listener) = core.listeners.by_id(listener) {
            core.conns.offer_room();
            let (service, peer) = (listener.service, incoming.peer(listener, Some(id)));
            user.failed_accept(&mut core.guard, service, app, &peer, &closed);
        }
    }
    if closed.error.is_some() {
        core.conns.offer_room();
        core.guard.drop("an error's destructor", closed);
    }
}

fn log_close<A, O: Os>(inner: &mut Inner<A, O>, id: ConnId, closed: &Closed) {
    if !logs::is_enabled(logs::CONNECTION, log::Level::Debug) {
        return;
    }
    let core = &mut inner.core;
    // The text of a user's error is foreign code.
    let text = catch(|| closed.to_string()).unwrap_or_else(|panic| {
        let text = panic.to_string();
        core.guard.report("an error's text", panic, None);
        text
    });
    if let Some(conn) = core.conns.get(id) {
        let info = conn.info(core.now);
        let (listener, reason) = (core.listeners.name_of(conn.listener), closed.reason.name());
        logs::debug!(
            target: logs::CONNECTION,
            { conn: id, listener: listener, peer: info.peer, reason: reason },
            "{info}: {text}"
        );
    }
}

/// At the end of its turn: takes a detaching connection out of the loop and gives it to the
/// receiver that its handler named.
pub(super) fn hand_over<A, O: Os>(inner: &mut Inner<A, O>, app: &mut A, id: ConnId) {
    let core = &mut inner.core;
    let Some((conn, pool)) = core.conns.parts(id) else {
        return;
    };
    let Some(stream) = conn.stream.take() else {
        return;
    };
    let peer = conn.peer();
    let is_unix = peer.as_tcp().is_none();
    let remains = conn.machine.detach(pool);
    core.memory.forget(&mut core.conns, id, core.now);
    core.conns.disarm(id);
    core.conns.hide(id);
    let socket = core
        .os
        .release(stream)
        .and_then(|(socket, calls)| Ok((Socket::new(socket, is_unix, calls)?, calls)));
    let closed = Closed::new(CloseReason::Detached);
    inner.call(app, id, |handler, cx| {
        handler.on_close(cx, &closed);
        Ok(())
    });
    let Inner { core, user } = inner;
    user.drop_handler(&mut core.guard, id);
    if let Some(conn) = core.conns.get_mut(id) {
        conn.machine.drop_unshared_tlvs();
    }
    let receiver = core.detached.take_receiver(id);
    let socket = match socket {
        Ok(socket) => socket,
        Err(error) => {
            logs::debug!(target: logs::CONNECTION, "{}: {error}", core.describe(id));
            core.guard
                .drop("the receiver of a detached connection", receiver);
            core.remove(id, &closed);
            return core.conns.free();
        }
    };
    let permit = core.conns.detach_permit();
    let released = core.detached.released();
    let (detached, socket) = Detached::new(id, socket, remains, peer, released, permit);
    core.detached.insert(id, socket);
    core.guard
        .call("the receiver of a detached connection", || match receiver {
            Some(receiver) => receiver(detached),
            None => drop(detached),
        });
}

/// Frees the slots of detached connections whose streams were dropped.
pub(super) fn collect_released<A, O: Os>(inner: &mut Inner<A, O>) {
    inner.core.detached.collect_released();
    if !inner.core.detached.has_released() {
        return;
    }
    inner.core.begin_stage();
    while inner.core.has_work_left() {
        let Some(id) = inner.core.detached.next_released() else {
            return;
        };
        remove_detached(inner, id, CloseReason::Detached);
    }
}

/// Frees the slot of a detached connection, unless it is free already.
pub(super) fn remove_detached<A, O: Os>(inner: &mut Inner<A, O>, id: ConnId, reason: CloseReason) {
    let core = &mut inner.core;
    core.detached.remove(id);
    if core.is_detached(id) {
        core.remove(id, &Closed::new(reason));
    }
}

/// After a drain's deadline: ends the next connections.
pub(super) fn force_late<A, O: Os>(
    inner: &mut Inner<A, O>,
    app: &mut A,
    due: Option<crate::proto::Time>,
) {
    let mut slots = drain::BATCH;
    while inner.core.has_work_left() {
        let core = &mut inner.core;
        let Some(id) = core.drain.next_late(&core.conns, due, &mut slots) else {
            return;
        };
        core.work.charge(work::STEP);
        if core.is_detached(id) {
            core.detached.cut_off(id, &core.os);
            remove_detached(inner, id, CloseReason::DrainForced);
            continue;
        }
        let Core { conns, os, now, .. } = core;
        let Some((conn, pool)) = conns.parts(id) else {
            continue;
        };
        if conn.machine.has_unsent_in_kernel() {
            conn.ask_delivery(os, *now);
        }
        conn.machine.cut_short(pool);
        match core.next_step(id) {
            Some(reset) => finish_close(inner, app, id, reset),
            None => core.conns.wake(id),
        }
    }
}
