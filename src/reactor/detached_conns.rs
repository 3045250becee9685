//! Connections that have left the loop as blocking streams, and whose places are kept for them.

use std::collections::BTreeMap;
use std::net::Shutdown;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::{Arc, Weak};

use super::os::Os;
use super::{report_panic, Reactor};
use crate::detached::{Detached, Released, Socket};
use crate::handle::Wake;
use crate::id::ConnId;
use crate::logs;
use crate::reason::{CloseReason, Closed};

/// What becomes of a connection that leaves.
pub(crate) type Receiver = Box<dyn FnOnce(Detached)>;

pub(super) struct DetachedConns {
    /// Who has asked to leave, and whom it goes to.
    pub(super) leaving: BTreeMap<ConnId, Receiver>,
    /// The sockets of detached connections, as long as they are open.
    detached: BTreeMap<ConnId, Weak<Socket>>,
    released: Arc<Released>,
}

impl DetachedConns {
    pub(super) fn new(wake: Box<dyn Wake>) -> Self {
        Self {
            leaving: BTreeMap::new(),
            detached: BTreeMap::new(),
            released: Arc::new(Released::new(wake)),
        }
    }
}

impl<A, O: Os> Reactor<A, O> {
    /// At the end of its turn: takes the connection out of the loop and gives it to whom the handler said.
    pub(super) fn hand_over(&mut self, app: &mut A, id: ConnId) {
        let index = id.index as usize;
        let Some(conn) = self.connections.get_mut(id) else {
            return;
        };
        let Some(stream) = self.streams.get_mut(index).and_then(Option::take) else {
            return;
        };
        let addresses = (conn.peer(), conn.source());
        let is_unix = addresses.0.as_tcp().is_none();
        let detached_io = conn.machine.detach(&mut self.pool);
        conn.paused_for_memory = false;
        self.paused_for_memory.remove(&id);
        self.end_read_grant(id);
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
        let socket = match socket {
            Ok(socket) => socket,
            Err(error) => {
                log::debug!(target: logs::CONNECTION, "{}: {error}", self.describe(id));
                self.cancel_detach(id);
                return self.remove(id, &closed);
            }
        };
        let (detached, socket) = Detached::new(id, socket, detached_io, addresses, &self.detached_conns.released);
        self.detached_conns.detached.insert(id, socket);
        let received = catch_unwind(AssertUnwindSafe(|| match self.detached_conns.leaving.remove(&id) {
            Some(receiver) => receiver(detached),
            None => drop(detached),
        }));
        if let Err(panic) = received {
            self.stats.panics += 1;
            report_panic("the receiver of a detached connection", panic);
        }
    }

    /// It ends instead of leaving.
    pub(super) fn cancel_detach(&mut self, id: ConnId) {
        if let Some(receiver) = self.detached_conns.leaving.remove(&id) {
            self.discard("the receiver of a detached connection", receiver);
        }
    }

    /// Frees the places that were given back.
    pub(super) fn collect_released(&mut self) {
        for id in self.detached_conns.released.take() {
            self.take_back(id, CloseReason::Detached);
        }
    }

    /// Frees the place of a detached connection, if it is not free already: after a drain's deadline it is nobody's any more.
    pub(super) fn take_back(&mut self, id: ConnId, reason: CloseReason) {
        self.detached_conns.detached.remove(&id);
        if self.is_detached(id) {
            self.remove(id, &Closed::new(reason));
        }
    }

    pub(super) fn is_detached(&self, id: ConnId) -> bool {
        self.connections.get(id).is_some_and(|conn| conn.machine.is_detached())
    }

    /// Makes reads and writes of a detached connection end. False if its socket was taken whole, or is closed.
    pub(super) fn cut_off(&self, id: ConnId) -> bool {
        let socket = self.detached_conns.detached.get(&id).and_then(Weak::upgrade);
        // It fails if the peer has gone: then there is nothing to end.
        socket.map(|socket| socket.shutdown(Shutdown::Both)).is_some()
    }
}
