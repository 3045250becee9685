//! The end of a connection: its socket, its last callback, its slot, and who may come now.

use std::net::IpAddr;
use std::panic::{catch_unwind, AssertUnwindSafe};

use super::accept::Incoming;
use super::os::{Os, Socket};
use super::sources::Counted;
use super::view::CloseRecord;
use super::{last_words, report_panic, Reactor};
use crate::id::{ConnId, ListenerId};
use crate::logs;
use crate::proto::NextStep;
use crate::reason::Closed;

impl<A, O: Os> Reactor<A, O> {
    /// Shuts down or tells to close: `Some(reset)` when the connection is over.
    pub(super) fn next_step(&mut self, id: ConnId) -> Option<bool> {
        let conn = self.connections.get_mut(id)?;
        if conn.machine.next_step() == NextStep::Shutdown {
            let stream = self.streams.get_mut(id.index as usize)?.as_mut()?;
            let sent = self.os.shutdown(stream).is_ok();
            conn.machine.handle_shutdown(self.now, sent);
        }
        match conn.machine.next_step() {
            NextStep::Gone { reset } => Some(reset),
            NextStep::Wait | NextStep::Shutdown => None,
        }
    }

    /// Ends a connection: the socket first, then the last callback, then the slot.
    pub(super) fn finish_close(&mut self, app: &mut A, id: ConnId, reset: bool) {
        let index = id.index as usize;
        let was_open = self.connections.get(id).is_some_and(|conn| conn.machine.was_open());
        let mut credentials = None;
        if let Some(stream) = self.streams.get_mut(index).and_then(Option::take) {
            if !was_open {
                credentials = stream.credentials().ok();
            }
            self.os.close(stream, reset);
        }
        self.shared.set_live(id, false);
        self.cancel_detach(id);
        let Some(conn) = self.connections.get_mut(id) else {
            return;
        };
        let closed = conn.machine.take_closed();
        let (listener, is_outgoing) = (conn.listener, conn.machine.is_outgoing());
        if log::log_enabled!(target: logs::CONNECTION, log::Level::Debug) {
            // The words of a user's error are the user's code.
            let words = catch_unwind(AssertUnwindSafe(|| closed.to_string()));
            let words = words.unwrap_or_else(last_words);
            log::debug!(target: logs::CONNECTION, "{}: {words}", conn.info(self.now));
        }
        // For the service, if its handler has not heard of it.
        let incoming = (!was_open).then(|| Incoming {
            addr: conn.peer(),
            credentials,
            proxy: conn.machine.proxy().cloned(),
        });
        self.leave_pending(id);
        if was_open {
            self.call(app, id, |handler, cx| {
                handler.on_close(cx, &closed);
                Ok(())
            });
        } else if is_outgoing {
            self.call(app, id, |handler, cx| {
                handler.on_connect_failed(cx, &closed);
                Ok(())
            });
        }
        if let Some(handler) = self.handlers.get_mut(index).and_then(Option::take) {
            self.drop_handler(handler);
        }
        self.remove(id, &closed);
        if let (Some(incoming), Some(listener)) = (incoming, listener) {
            self.notify_failed_accept(app, listener, id, incoming, &closed);
        }
        self.discard("an error's destructor", closed);
    }

    /// The last of a connection: it is counted, remembered, and its slot is free.
    pub(super) fn remove(&mut self, id: ConnId, closed: &Closed) {
        self.timers.disarm(id.index);
        self.note_memory(id.index, 0);
        self.paused_for_memory.remove(&id);
        self.end_read_grant(id);
        if let Some(attempt) = self.attempts.remove(&id) {
            self.discard("a TLS configuration's destructor", attempt);
        }
        let Some(conn) = self.connections.remove(id) else {
            return;
        };
        let record = CloseRecord {
            id: Some(id),
            listener: conn.listener,
            peer: conn.peer(),
            source: conn.source(),
            age: self.now.since(conn.accepted_at),
            traffic: conn.machine.traffic(),
        };
        let (source, counted) = (record.source.ip(), conn.counted);
        let listener = conn.listener;
        self.discard("a framer's destructor", conn);
        self.stats.count_closed(closed.reason);
        self.ages.record_time(record.age);
        self.note_close(record, closed);
        self.make_room(listener, source, counted);
    }

    /// Tells the service about a connection that had a slot and never opened.
    fn notify_failed_accept(
        &mut self,
        app: &mut A,
        listener: ListenerId,
        id: ConnId,
        incoming: Incoming,
        closed: &Closed,
    ) {
        let Some(listener) = self.listeners.iter_mut().find(|found| found.id == listener) else {
            return;
        };
        let peer = incoming.at(listener, Some(id));
        let told = catch_unwind(AssertUnwindSafe(|| {
            listener.service.on_failed_accept(app, &peer, closed);
        }));
        if let Err(panic) = told {
            self.stats.panics += 1;
            report_panic("a service's on_failed_accept", panic);
        }
    }

    /// A slot and a descriptor are free: whoever waited for either may come.
    fn make_room(&mut self, freed: Option<ListenerId>, source: Option<IpAddr>, counted: Counted) {
        if let Some(at) = self.listeners.iter().position(|listener| Some(listener.id) == freed) {
            self.uncount(at, source, counted);
            if let Some(listener) = self.listeners.get_mut(at) {
                listener.connections = listener.connections.saturating_sub(1);
            }
        }
        self.free_descriptor();
    }

    /// A descriptor is free: who waits for one may come.
    pub(super) fn free_descriptor(&mut self) {
        self.fd_exhaustion.end_pause();
        self.look_for_clients();
    }
}
