//! Connections that have left the loop as blocking streams, and whose places are kept for them.

use std::net::Shutdown;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::{Arc, Weak};

use super::os::Os;
use super::{report_panic, Reactor};
use crate::detached::{Detached, Socket};
use crate::id::ConnId;
use crate::reason::{CloseReason, Closed};

/// What becomes of a connection that leaves.
pub(crate) type Receiver = Box<dyn FnOnce(Detached)>;

/// The sockets of those outside, as long as they are open.
#[derive(Debug)]
pub(super) struct Lent {
    id: ConnId,
    socket: Weak<Socket>,
}

impl<A, O: Os> Reactor<A, O> {
    /// At the end of its turn: takes the connection out of the loop and gives it to whom the handler said.
    pub(super) fn hand_over(&mut self, app: &mut A, id: ConnId) {
        let index = id.index as usize;
        let at = self.detaching.iter().position(|(wanted, _)| *wanted == id);
        let Some((_, receiver)) = at.map(|at| self.detaching.swap_remove(at)) else {
            return;
        };
        let Some(slot) = self.roster.get_mut(id) else {
            return;
        };
        let Some(stream) = self.streams.get_mut(index).and_then(Option::take) else {
            return;
        };
        let addresses = (slot.peer.clone(), slot.source());
        let is_unix = slot.peer.as_tcp().is_none();
        let remains = slot.machine.detach(&mut self.pool);
        slot.lent = true;
        self.timers.disarm(id.index);
        self.note_memory(id.index, 0);
        self.shared.set_live(id, false);
        let socket = self.os.release(stream).and_then(|socket| Socket::new(socket, is_unix));
        let closed = Closed::new(CloseReason::Detached);
        self.call(app, id, |handler, cx| {
            handler.on_close(cx, &closed);
            Ok(())
        });
        if let Some(handler) = self.handlers.get_mut(index).and_then(Option::take) {
            self.drop_handler(handler);
        }
        match socket {
            Ok(socket) => {
                let (detached, socket) = Detached::new(id, socket, remains, addresses, &self.returns);
                self.lent.push(Lent { id, socket });
                if let Err(panic) = catch_unwind(AssertUnwindSafe(|| receiver(detached))) {
                    self.stats.panics += 1;
                    report_panic("the receiver of a detached connection", panic);
                }
            }
            Err(error) => {
                log::debug!(target: crate::logs::CONNECTION, "{}: {error}", self.particulars(id));
                self.discard("the receiver of a detached connection", receiver);
                self.take_back(id, CloseReason::Detached);
            }
        }
    }

    /// It has ended instead of leaving.
    pub(super) fn forget_detaching(&mut self, id: ConnId) {
        if let Some(at) = self.detaching.iter().position(|(wanted, _)| *wanted == id) {
            let (_, receiver) = self.detaching.swap_remove(at);
            self.discard("the receiver of a detached connection", receiver);
        }
    }

    /// Frees the places that were given back.
    pub(super) fn take_returns(&mut self) {
        for id in self.returns.take() {
            self.take_back(id, CloseReason::Detached);
        }
    }

    pub(super) fn take_back(&mut self, id: ConnId, reason: CloseReason) {
        self.lent.retain(|lent| lent.id != id);
        // After the drain's deadline its place is nobody's any more.
        let Some(slot) = self.roster.get(id).filter(|slot| slot.lent) else {
            return;
        };
        let (listener, source, counted) = (slot.listener, slot.source().ip(), slot.counted);
        self.stats.count_closed(reason);
        let slot = self.roster.remove(id);
        self.discard("a framer's destructor", slot);
        self.make_room(listener, source, counted);
    }

    /// Makes reads and writes of one outside end. False if there is none of this id.
    pub(super) fn cut_off(&self, id: ConnId) -> bool {
        let lent = self.lent.iter().find(|lent| lent.id == id);
        let socket: Option<Arc<Socket>> = lent.and_then(|lent| lent.socket.upgrade());
        // It fails if the peer has gone: then there is nothing to end.
        socket.map(|socket| socket.shutdown(Shutdown::Both)).is_some()
    }
}
