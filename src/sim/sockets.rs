//! All connections of the simulated kernel, with those that have changed.

use std::collections::BTreeSet;
use std::ops::ControlFlow;

use super::socket::SimSocket;
use crate::reactor::os::Token;

/// A poll visits only connections that changed since the last one, and those with due edges. So a
/// world of a million quiet connections is as fast as one of ten.
#[derive(Default)]
pub(super) struct Sockets {
    all: Vec<SimSocket>,
    /// Connections with bytes to move, perhaps.
    touched: Vec<usize>,
    /// Connections with an edge that no poll has reported yet, or that had one, in the order of
    /// reports.
    announcing: BTreeSet<usize>,
    /// The connection whose event did not fit into the last batch.
    next: usize,
    /// Readiness is reported by kqueue.
    pub(super) kqueue: bool,
}

impl Sockets {
    pub(super) fn len(&self) -> usize {
        self.all.len()
    }

    pub(super) fn get(&self, index: usize) -> Option<&SimSocket> {
        self.all.get(index)
    }

    pub(super) fn get_mut(&mut self, index: usize) -> Option<&mut SimSocket> {
        let socket = self.all.get_mut(index)?;
        if self.touched.last() != Some(&index) {
            self.touched.push(index);
        }
        Some(socket)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &SimSocket> {
        self.all.iter()
    }

    pub(super) fn push(&mut self, mut socket: SimSocket) {
        socket.kqueue = self.kqueue;
        self.all.push(socket);
    }

    pub(super) fn use_kqueue(&mut self) {
        self.kqueue = true;
        for socket in &mut self.all {
            socket.kqueue = true;
        }
    }

    /// Moves bytes: data in flight arrives as far as there is room, and clients that read get the
    /// server's output.
    pub(super) fn move_bytes(&mut self) {
        for index in self.touched.drain(..) {
            if let Some(socket) = self.all.get_mut(index) {
                socket.arrive();
                socket.reach();
                if socket.announces() {
                    self.announcing.insert(index);
                }
            }
        }
    }

    /// Visits each connection with due edges, until told to stop; the next call continues from
    /// there.
    pub(super) fn for_announcing(
        &mut self,
        mut ask: impl FnMut(usize, &mut SimSocket, Token) -> ControlFlow<()>,
    ) {
        let first = std::mem::take(&mut self.next);
        let indices = self
            .announcing
            .range(first..)
            .chain(self.announcing.range(..first));
        let (mut told, mut stopped) = (Vec::new(), None);
        for &index in indices {
            let Some(socket) = self.all.get_mut(index) else {
                continue;
            };
            if let (Some(token), true) = (socket.token, socket.has_edge()) {
                if ask(index, socket, token).is_break() {
                    stopped = Some(index);
                    break;
                }
            }
            if !socket.announces() {
                told.push(index);
            }
        }
        self.next = stopped.unwrap_or(0);
        for index in told {
            self.announcing.remove(&index);
        }
    }

    pub(super) fn has_news(&self) -> bool {
        let mut announcing = self
            .announcing
            .iter()
            .filter_map(|&index| self.all.get(index));
        announcing.any(SimSocket::announces)
    }
}
