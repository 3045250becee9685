//! The end of a connection: its socket, its last callback, its slot, and who may come now.

use std::net::IpAddr;
use std::panic::{catch_unwind, AssertUnwindSafe};

use super::accept::Caller;
use super::os::{Os, Socket};
use super::sources::Counted;
use super::view::Ended;
use super::{last_words, report_panic, Reactor};
use crate::id::{ConnId, ListenerId};
use crate::logs;
use crate::proto::NextStep;
use crate::reason::Closed;

impl<A, O: Os> Reactor<A, O> {
    /// Shuts down or tells to close: `Some(reset)` when the connection is over.
    pub(super) fn next_step(&mut self, id: ConnId) -> Option<bool> {
        let slot = self.roster.get_mut(id)?;
        if slot.machine.next_step() == NextStep::Shutdown {
            let stream = self.streams.get_mut(id.index as usize)?.as_mut()?;
            let sent = self.os.shutdown(stream).is_ok();
            slot.machine.handle_shutdown(self.now, sent);
        }
        match slot.machine.next_step() {
            NextStep::Gone { reset } => Some(reset),
            NextStep::Wait | NextStep::Shutdown => None,
        }
    }

    /// Ends a connection: the socket first, then the last callback, then the slot.
    pub(super) fn reap(&mut self, app: &mut A, id: ConnId, reset: bool) {
        let index = id.index as usize;
        let was_open = self.roster.get(id).is_some_and(|slot| slot.machine.was_open());
        let mut credentials = None;
        if let Some(stream) = self.streams.get_mut(index).and_then(Option::take) {
            if !was_open {
                credentials = stream.credentials().ok();
            }
            self.os.close(stream, reset);
        }
        self.shared.set_live(id, false);
        self.stay(id);
        let Some(slot) = self.roster.get_mut(id) else {
            return;
        };
        let closed = slot.machine.take_closed();
        let (listener, is_outgoing) = (slot.listener, slot.machine.is_outgoing());
        if log::log_enabled!(target: logs::CONNECTION, log::Level::Debug) {
            // The words of a user's error are the user's code.
            let words = catch_unwind(AssertUnwindSafe(|| closed.to_string()));
            let words = words.unwrap_or_else(last_words);
            log::debug!(target: logs::CONNECTION, "{}: {words}", slot.info(self.now));
        }
        // For the service, if its handler has not heard of it.
        let caller = (!was_open).then(|| Caller {
            addr: slot.peer(),
            credentials,
            proxy: slot.machine.proxy().cloned(),
        });
        self.leave_unopened(id);
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
        self.vacate(id, &closed);
        if let (Some(caller), Some(listener)) = (caller, listener) {
            self.tell_unopened(app, listener, id, caller, &closed);
        }
        self.discard("an error's destructor", closed);
    }

    /// The last of a connection: it is counted, remembered, and its slot is free.
    pub(super) fn vacate(&mut self, id: ConnId, closed: &Closed) {
        self.timers.disarm(id.index);
        self.note_memory(id.index, 0);
        self.squeezed.remove(&id);
        self.end_favour(id);
        if let Some(attempt) = self.attempts.remove(&id) {
            self.discard("a TLS configuration's destructor", attempt);
        }
        let Some(mut slot) = self.roster.remove(id) else {
            return;
        };
        let who = Ended {
            id: Some(id),
            listener: slot.listener,
            peer: slot.peer(),
            source: slot.source(),
            age: self.now.since(slot.accepted_at),
            traffic: slot.machine.traffic(),
        };
        let (source, counted) = (who.source.ip(), slot.counted);
        let listener = slot.listener;
        slot.machine.recycle(&mut self.pool);
        self.discard("a framer's destructor", slot);
        self.stats.count_closed(closed.reason);
        self.ages.record_time(who.age);
        self.note_close(who, closed);
        self.make_room(listener, source, counted);
    }

    /// Tells the service about a connection that had a slot and never opened.
    fn tell_unopened(&mut self, app: &mut A, listener: ListenerId, id: ConnId, caller: Caller, closed: &Closed) {
        let Some(listener) = self.listeners.iter_mut().find(|found| found.id == listener) else {
            return;
        };
        let peer = caller.at(listener, Some(id));
        let told = catch_unwind(AssertUnwindSafe(|| {
            listener.service.on_unopened(app, &peer, closed);
        }));
        if let Err(panic) = told {
            self.stats.panics += 1;
            report_panic("a service's on_unopened", panic);
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
        self.starvation.end_pause();
        self.look_for_clients();
    }
}
