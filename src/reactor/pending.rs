//! Connections that have not opened yet, oldest first: the candidates for eviction.

use std::collections::VecDeque;

use super::connections::Connections;
use crate::id::ConnId;
use crate::proto::Time;

/// Number of the oldest connections that are searched for a candidate. A connection whose input
/// waits for this server is none.
const CANDIDATES: usize = 64;

/// Pending connections in the order in which they were accepted.
#[derive(Debug, Default)]
pub(super) struct Pending {
    /// Some of these have opened or ended since; the first one has not.
    queue: VecDeque<ConnId>,
    count: usize,
}

impl Pending {
    pub(super) fn len(&self) -> usize {
        self.count
    }

    pub(super) fn push<S>(&mut self, id: ConnId, conns: &Connections<S>) {
        self.count += 1;
        self.queue.push_back(id);
        if self.queue.len() > 2 * self.count + CANDIDATES {
            self.queue.retain(|&id| is_pending(conns, id));
        }
    }

    /// One connection is not pending any more: its entry in the table says so already.
    pub(super) fn leave<S>(&mut self, conns: &Connections<S>) {
        self.count = self.count.saturating_sub(1);
        while self.queue.front().is_some_and(|&id| !is_pending(conns, id)) {
            self.queue.pop_front();
        }
    }

    /// The oldest connection accepted by `accepted_by` whose peer keeps the server waiting.
    pub(super) fn eviction_candidate<S>(
        &self,
        conns: &Connections<S>,
        accepted_by: Time,
    ) -> Option<ConnId> {
        let mut oldest = self
            .queue
            .iter()
            .take(CANDIDATES)
            .filter_map(|&id| conns.get(id));
        oldest
            .find(|conn| conn.pending && !conn.queued && conn.accepted_at <= accepted_by)
            .map(|conn| conn.id)
    }

    /// The queue is no longer than `peak` pending connections justify.
    #[cfg(feature = "sim")]
    pub(super) fn is_compact(&self, peak: usize) -> bool {
        self.queue.len() <= 2 * peak + CANDIDATES
    }

    /// When the oldest was accepted.
    pub(super) fn oldest<S>(&self, conns: &Connections<S>) -> Option<Time> {
        let conn = conns.get(*self.queue.front()?)?;
        Some(conn.accepted_at)
    }
}

fn is_pending<S>(conns: &Connections<S>, id: ConnId) -> bool {
    conns.get(id).is_some_and(|conn| conn.pending)
}
