//! What can be seen of the whole: pages, the tree, the last closes, the metrics.

use std::collections::{HashMap, VecDeque};
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::time::Duration;

use super::os::Os;
use super::{last_words, Reactor};
use crate::addr::Addr;
use crate::control::ControlOps;
use crate::id::{ConnId, ListenerId};
use crate::metrics::Metrics;
use crate::proto::{Time, Traffic};
use crate::reason::Closed;
use crate::recent::{bounded_words, RecentClose};
use crate::tree::{Branch, Cursor, Page, Tree};

/// Slots that a tree looks at in any case, and for each connection that it may show.
const TREE_SLOTS: usize = 4096;
const SLOTS_PER_LEAF: usize = 16;

/// The last closes, oldest first.
#[derive(Debug, Default)]
pub(super) struct Closes {
    ring: VecDeque<(Time, RecentClose)>,
    most: usize,
}

impl Closes {
    pub(super) fn new(most: usize) -> Self {
        let ring = VecDeque::new();
        Self { ring, most }
    }

    pub(super) fn set_most(&mut self, most: usize) {
        if most < self.most {
            self.ring.drain(..self.ring.len().saturating_sub(most));
            self.ring.shrink_to(most);
        }
        self.most = most;
    }

    #[cfg(feature = "sim")]
    pub(super) fn len(&self) -> usize {
        self.ring.len()
    }

    fn push(&mut self, at: Time, close: RecentClose) {
        if self.ring.len() >= self.most {
            self.ring.pop_front();
        }
        self.ring.push_back((at, close));
    }
}

/// Who has ended.
pub(super) struct CloseRecord {
    pub(super) id: Option<ConnId>,
    pub(super) listener: Option<ListenerId>,
    pub(super) peer: Addr,
    pub(super) source: Addr,
    pub(super) age: Duration,
    pub(super) traffic: Traffic,
}

impl<A, O: Os> Reactor<A, O> {
    /// Keeps a close in mind. Allocates nothing once there are as many as are kept, but for the words of an error.
    pub(super) fn note_close(&mut self, record: CloseRecord, closed: &Closed) {
        if self.closes.most == 0 {
            return;
        }
        // The words of a user's error are the user's code.
        let error = closed.error.as_ref().map(|error| {
            catch_unwind(AssertUnwindSafe(|| bounded_words(error)))
                .unwrap_or_else(|panic| bounded_words(&last_words(panic)))
        });
        let CloseRecord {
            id,
            listener,
            peer,
            source,
            age,
            traffic,
        } = record;
        let close = RecentClose {
            id,
            listener,
            peer,
            source,
            reason: closed.reason,
            error,
            age,
            traffic,
            ago: Duration::ZERO,
        };
        self.closes.push(self.now, close);
    }

    pub(super) fn closes(&self) -> Vec<RecentClose> {
        let latest_first = self.closes.ring.iter().rev();
        latest_first
            .map(|(at, close)| RecentClose {
                ago: self.now.since(*at),
                ..close.clone()
            })
            .collect()
    }

    pub(super) fn page(&self, from: Cursor, limit: usize) -> Page {
        let slots = self.connections.slots();
        let limit = u32::try_from(limit.max(1)).unwrap_or(u32::MAX);
        let end = from.0.saturating_add(limit).min(slots);
        let looked_at = (from.0..end).filter_map(|index| self.connections.by_index(index));
        let most = (end.saturating_sub(from.0) as usize).min(self.connections.len());
        let mut connections = Vec::with_capacity(most);
        connections.extend(looked_at.map(|conn| conn.info(self.now)));
        Page {
            connections,
            next: (end < slots).then_some(Cursor(end)),
        }
    }

    pub(super) fn tree(&self, limit: usize) -> Tree {
        let room = self.room();
        let mut listeners: Vec<_> = self
            .listeners
            .iter()
            .map(|listener| Branch {
                listener: listener.info(&room),
                connections: Vec::new(),
            })
            .collect();
        let places: HashMap<ListenerId, usize> = self.listeners.iter().map(|listener| listener.id).zip(0..).collect();
        let wanted = |branch: &Branch| branch.listener.connections.min(limit);
        let outgoing = self.outgoing();
        let mut outgoing_left = outgoing.min(limit);
        let mut made = Vec::new();
        let mut missing: usize = listeners.iter().map(wanted).sum::<usize>() + outgoing_left;
        let most = missing.saturating_mul(SLOTS_PER_LEAF).saturating_add(TREE_SLOTS);
        for conn in (0..self.connections.slots())
            .take(most)
            .filter_map(|index| self.connections.by_index(index))
        {
            if missing == 0 {
                break;
            }
            let Some(listener) = conn.listener else {
                if outgoing_left > 0 {
                    made.push(conn.info(self.now));
                    outgoing_left -= 1;
                    missing -= 1;
                }
                continue;
            };
            let branch = places.get(&listener).and_then(|&at| listeners.get_mut(at));
            if let Some(branch) = branch.filter(|branch| branch.connections.len() < limit) {
                branch.connections.push(conn.info(self.now));
                missing -= 1;
            }
        }
        Tree {
            connections: self.connections.len(),
            max_connections: self.connections.cap(),
            pending: self.pending.len(),
            memory: self.memory.total(),
            descriptors: self.open_descriptors(),
            draining: self.drain.is_on(),
            listeners,
            outgoing,
            outgoing_connections: made,
        }
    }

    pub(super) fn measure(&self) -> Metrics {
        let limit = self.config.memory_limit;
        Metrics {
            stats: self.stats(),
            histograms: self.histograms(),
            listeners: self.listeners(),
            alarms: self.alarms(),
            descriptors: self.open_descriptors(),
            memory_limit: (limit < usize::MAX).then_some(limit),
        }
    }

    /// Sockets of listeners and connections.
    pub(super) fn open_descriptors(&self) -> usize {
        let listening = self.listeners.iter().filter(|listener| listener.socket.is_some());
        self.connections.len() - self.without_socket() + listening.count()
    }

    /// Connections that the server has made, or is to.
    pub(super) fn outgoing(&self) -> usize {
        let accepted: usize = self.listeners.iter().map(|listener| listener.connections).sum();
        self.connections.len().saturating_sub(accepted)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reason::CloseReason;

    fn close(ago: u64) -> RecentClose {
        let nobody = Addr::from(std::net::SocketAddr::from(([127, 0, 0, 1], 1)));
        RecentClose {
            id: None,
            listener: Some(ListenerId::nth(0)),
            peer: nobody.clone(),
            source: nobody,
            reason: CloseReason::Reset,
            error: None,
            age: Duration::from_secs(ago),
            traffic: Traffic::default(),
            ago: Duration::ZERO,
        }
    }

    /// Bounded, and without an allocation once it is full.
    #[test]
    fn the_ring_keeps_its_memory() {
        let mut closes = Closes::new(100);
        for at in 0..100 {
            closes.push(Time::ZERO, close(at));
        }
        let capacity = closes.ring.capacity();
        for at in 100..100_000 {
            closes.push(Time::ZERO, close(at));
        }
        assert_eq!((closes.ring.len(), closes.ring.capacity()), (100, capacity));
        // The latest stay when it shrinks.
        closes.set_most(3);
        assert!(closes.ring.capacity() < 100);
        let kept: Vec<_> = closes.ring.iter().map(|(_, close)| close.age.as_secs()).collect();
        assert_eq!(kept, [99_997, 99_998, 99_999]);
    }
}
