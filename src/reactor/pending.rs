//! Connections that are not open yet, oldest first: who gives way when there are too many of them.

use std::collections::VecDeque;

use super::connections::Connections;
use crate::id::ConnId;
use crate::proto::Time;

/// How many of the oldest are looked at for one who gives way: the others' input waits for us, which is not their fault.
const LOOK_AT: usize = 64;

/// In the order in which they were accepted.
#[derive(Debug, Default)]
pub(super) struct Pending {
    /// Some have opened or gone since; the first has not.
    queue: VecDeque<ConnId>,
    count: usize,
}

impl Pending {
    pub(super) fn len(&self) -> usize {
        self.count
    }

    pub(super) fn push(&mut self, id: ConnId, connections: &Connections) {
        self.count += 1;
        self.queue.push_back(id);
        if self.queue.len() > 2 * self.count + LOOK_AT {
            self.queue.retain(|&id| is_pending(connections, id));
        }
    }

    /// One of them has opened, or is going: its slot says so already.
    pub(super) fn leave(&mut self, connections: &Connections) {
        self.count = self.count.saturating_sub(1);
        while self.queue.front().is_some_and(|&id| !is_pending(connections, id)) {
            self.queue.pop_front();
        }
    }

    /// The oldest of those accepted until `accepted_until` for whose peers we wait.
    pub(super) fn eviction_candidate(&self, connections: &Connections, accepted_until: Time) -> Option<ConnId> {
        let mut oldest = self.queue.iter().take(LOOK_AT).filter_map(|&id| connections.get(id));
        oldest
            .find(|conn| conn.pending && !conn.queued && conn.accepted_at <= accepted_until)
            .map(|conn| conn.id)
    }

    /// Those who have opened or gone take no more room than those who have not ever took.
    #[cfg(feature = "sim")]
    pub(super) fn is_compact(&self, most: usize) -> bool {
        self.queue.len() <= 2 * most + LOOK_AT
    }

    /// When the oldest was accepted.
    pub(super) fn oldest(&self, connections: &Connections) -> Option<Time> {
        let conn = connections.get(*self.queue.front()?)?;
        Some(conn.accepted_at)
    }
}

fn is_pending(connections: &Connections, id: ConnId) -> bool {
    connections.get(id).is_some_and(|conn| conn.pending)
}
