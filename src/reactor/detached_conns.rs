//! Connections that have left the loop as blocking streams, and whose slots stay taken.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Weak};

use super::os::Os;
use crate::detached::{Detached, Released, Socket};
use crate::handle::Wake;
use crate::id::ConnId;

/// Receives a detached connection. Foreign code.
pub(crate) type Receiver = Box<dyn FnOnce(Detached)>;

pub(super) struct DetachedConns {
    /// Connections that leave at the end of their turn.
    leaving: BTreeMap<ConnId, Receiver>,
    /// The sockets of those that have left, while they are open.
    detached: BTreeMap<ConnId, Weak<Socket>>,
    released: Arc<Released>,
    /// Connections whose streams were dropped, and whose slots are not free yet.
    to_free: VecDeque<ConnId>,
}

impl DetachedConns {
    pub(super) fn new(wake: Box<dyn Wake>) -> Self {
        Self {
            leaving: BTreeMap::new(),
            detached: BTreeMap::new(),
            released: Arc::new(Released::new(wake)),
            to_free: VecDeque::new(),
        }
    }

    pub(super) fn begin(&mut self, id: ConnId, receiver: Receiver) {
        self.leaving.insert(id, receiver);
    }

    /// The connection ends, or is about to be handed over.
    #[must_use = "its destructor is foreign code"]
    pub(super) fn take_receiver(&mut self, id: ConnId) -> Option<Receiver> {
        self.leaving.remove(&id)
    }

    /// All receivers, once the server ends.
    #[must_use = "their destructors are foreign code"]
    pub(super) fn take_receivers(&mut self) -> Vec<Receiver> {
        std::mem::take(&mut self.leaving).into_values().collect()
    }

    /// Where the streams report that they were dropped.
    pub(super) fn released(&self) -> &Arc<Released> {
        &self.released
    }

    pub(super) fn insert(&mut self, id: ConnId, socket: Weak<Socket>) {
        self.detached.insert(id, socket);
    }

    pub(super) fn remove(&mut self, id: ConnId) {
        self.detached.remove(&id);
    }

    /// Takes over the connections whose streams were dropped since the last call.
    pub(super) fn collect_released(&mut self) {
        let released = self.released.take();
        if !released.is_empty() {
            self.to_free.extend(released);
        }
    }

    /// The next connection whose slot is to be freed.
    pub(super) fn next_released(&mut self) -> Option<ConnId> {
        self.to_free.pop_front()
    }

    /// Slots wait to be freed.
    pub(super) fn has_released(&self) -> bool {
        !self.to_free.is_empty()
    }

    /// Makes the reads and writes of a detached stream end. False if its socket was taken whole, or
    /// is closed.
    pub(super) fn cut_off(&self, id: ConnId, os: &impl Os) -> bool {
        let socket = self.detached.get(&id).and_then(Weak::upgrade);
        socket.map(|socket| os.cut_off(&socket)).is_some()
    }
}
