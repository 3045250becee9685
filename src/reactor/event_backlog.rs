//! Full batches of events, and how long deadlines wait for them.

use crate::proto::Time;

/// What a full batch of events means for deadlines.
#[derive(Debug, Default)]
pub(super) struct EventBacklog {
    /// The last batch was full: sockets may be ready that an outer, edge-triggered poll does not
    /// announce again.
    pub(super) full: bool,
    /// In a run of full batches: what was due before the first of them, and how many more may come
    /// until every socket that was ready then has been reported. The kernel reports them in turn.
    postponed: Option<(Time, usize)>,
}

impl EventBacklog {
    /// The time up to which deadlines may expire after this poll: not before the input that arrived
    /// in time has been read. A flood that fills every batch does not stop the clocks.
    pub(super) fn expire_through(
        &mut self,
        due: Time,
        batch: usize,
        connections: usize,
    ) -> Option<Time> {
        if !self.full {
            self.postponed = None;
            return Some(due);
        }
        let all = connections / batch.max(1) + 1;
        let (since, left) = self.postponed.get_or_insert((due, all));
        if *left > 0 {
            *left -= 1;
            return None;
        }
        let since = *since;
        self.postponed = None;
        Some(since)
    }
}
