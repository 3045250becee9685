//! Clients that get no slot: the farewell, the count, and the service's notice.

use std::time::Duration;

use super::core::Core;
use super::drive::Scratch;
use super::history::CloseRecord;
use super::incoming::Incoming;
use super::inner::Inner;
use super::os::{End, Os};
use crate::config::AtCapacity;
use crate::id::ConnId;
use crate::logs;
use crate::proto::Traffic;
use crate::reason::{CloseReason, Closed};

/// The cap or the rate is reached, and the listener's policy is to tell the client.
pub(super) fn turn_away<A, O: Os>(
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
    dismiss(core, scratch, at, stream, &farewell);
    report_failed(inner, app, at, None, incoming, Closed::new(reason));
}

/// Sends a client that gets no slot its farewell. Best effort: nothing here can wait.
pub(super) fn dismiss<O: Os>(
    core: &mut Core<O>,
    scratch: &mut Scratch,
    at: usize,
    mut stream: O::Stream,
    farewell: &[u8],
) {
    let mut traffic = Traffic::default();
    if !farewell.is_empty() {
        let written = core.os.write(&mut stream, farewell);
        traffic.bytes_out = written.unwrap_or(0) as u64;
    }
    let _ = core.os.shutdown(&mut stream);
    // Unread input would turn the close into a reset and destroy the farewell.
    let read = core.os.read(&mut stream, &mut scratch.wire);
    traffic.bytes_in = read.unwrap_or(0) as u64;
    let listener = core.listeners.get(at).map(|listener| listener.id);
    core.attribute_to(listener);
    core.conns.pool.traffic.add(&traffic);
    #[cfg(feature = "sim")]
    if let Some(listener) = core.listeners.get_mut(at) {
        listener.ended_traffic.add(&traffic);
    }
    core.os.close(stream, End::Close);
}

/// Counts a connection that never got a slot, and tells its service.
pub(super) fn report_failed<A, O: Os>(
    inner: &mut Inner<A, O>,
    app: &mut A,
    at: usize,
    id: Option<ConnId>,
    incoming: Incoming,
    closed: Closed,
) {
    let Inner { core, user } = inner;
    core.stats.count_closed(&closed);
    core.drain.count(closed.reason, false);
    let Some(listener) = core.listeners.get_mut(at) else {
        return;
    };
    listener.closed.count(&closed);
    let (peer, name, reason) = (&incoming.addr, &listener.name, closed.reason.name());
    logs::debug!(
        target: logs::CONNECTION,
        { listener: name, peer: peer, reason: reason },
        "{peer} on {name}: {closed}"
    );
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
    // The service may have blocked: the next client's timeouts count from now.
    core.refresh();
}
