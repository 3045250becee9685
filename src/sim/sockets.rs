//! All connections of the simulated kernel, and for which of them something may be moving.

use std::collections::BTreeSet;
use std::ops::ControlFlow;

use super::socket::SimSocket;
use crate::reactor::os::Token;

/// Whoever was touched is stirred, until what is under way has moved as far as it goes and its edge is told. A poll looks at
/// the stirred alone, so that a world of a million quiet connections is as quick as one of ten.
#[derive(Default)]
pub(super) struct Sockets {
    all: Vec<SimSocket>,
    /// In the order of their numbers, which is that of events.
    stirred: BTreeSet<usize>,
    /// Whose event did not fit into the last batch.
    next: usize,
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
        self.stirred.insert(index);
        Some(socket)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &SimSocket> {
        self.all.iter()
    }

    pub(super) fn push(&mut self, socket: SimSocket) {
        self.all.push(socket);
    }

    /// The network: what is under way arrives as far as there is room; what was sent reaches clients that read.
    pub(super) fn move_bytes(&mut self) {
        let all = &mut self.all;
        self.stirred.retain(|&index| {
            let socket = all.get_mut(index);
            socket.is_some_and(|socket| {
                socket.arrive();
                socket.reach();
                socket.announces()
            })
        });
    }

    /// Asks about each whose edge no poll has reported yet, until it is told to stop; the next time it goes on from there.
    pub(super) fn for_announcing(&mut self, mut ask: impl FnMut(usize, &mut SimSocket, Token) -> ControlFlow<()>) {
        let first = std::mem::take(&mut self.next);
        let indices = self.stirred.range(first..).chain(self.stirred.range(..first));
        for &index in indices {
            let Some(socket) = self.all.get_mut(index) else {
                continue;
            };
            if let (Some(token), true) = (socket.token, socket.edge) {
                if ask(index, socket, token).is_break() {
                    self.next = index;
                    return;
                }
            }
        }
    }

    pub(super) fn has_news(&self) -> bool {
        let mut stirred = self.stirred.iter().filter_map(|&index| self.all.get(index));
        stirred.any(SimSocket::announces)
    }
}
