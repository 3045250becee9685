//! Connections whose peers have proved nothing yet, oldest first: the candidates for eviction.
//!
//! Pending ones are in a handshake or before their PROXY header. Silent ones are open, and have not
//! sent a whole frame.

use std::collections::{HashMap, VecDeque};

use super::connection::Connection;
use super::connections::Connections;
use super::standing::Queue;
use crate::id::ConnId;
use crate::proto::Time;

/// Number of the oldest connections that are searched for a candidate. A connection whose input
/// waits for this server is none.
const CANDIDATES: usize = 64;

/// Connections whose peers have proved nothing yet: of a server, or of a listener with a limit of its
/// own.
#[derive(Debug, Default)]
pub(super) struct Unproven {
    pub(super) pending: Pending,
    pub(super) silent: Silent,
}

impl Unproven {
    pub(super) fn is_empty(&self) -> bool {
        self.pending.len() == 0 && self.silent.queue.is_empty()
    }

    /// The oldest connection whose peer keeps the server waiting, and since when it does.
    pub(super) fn candidate<S>(&self, conns: &Connections<S>) -> Option<(Time, ConnId)> {
        let (pending, silent) = (self.pending.candidate(conns), self.silent.candidate(conns));
        pending
            .into_iter()
            .chain(silent)
            .min_by_key(|&(since, _)| since)
    }
}

/// Pending connections in the order in which they became so: by accept, or by an upgrade to TLS.
#[derive(Debug, Default)]
pub(super) struct Pending {
    /// Some of these have opened or ended since; the first one has not.
    queue: VecDeque<(ConnId, Time)>,
    /// Since when those are pending that were so before: their former entries may be queued still.
    again: HashMap<ConnId, Time>,
    count: usize,
}

impl Pending {
    pub(super) fn len(&self) -> usize {
        self.count
    }

    /// Adds a connection that is pending since `since`: its entry in the table says so already.
    pub(super) fn push<S>(&mut self, id: ConnId, since: Time, conns: &Connections<S>) {
        self.count += 1;
        self.queue.push_back((id, since));
        if self.queue.len() > 2 * self.count + CANDIDATES {
            let Self { queue, again, .. } = self;
            queue.retain(|entry| is_pending(conns, again, entry));
        }
    }

    /// Adds a connection that may have been pending before.
    pub(super) fn push_again<S>(&mut self, id: ConnId, since: Time, conns: &Connections<S>) {
        self.again.insert(id, since);
        self.push(id, since, conns);
        self.trim(conns);
    }

    /// When the upgrade began for which a connection is pending anew.
    pub(super) fn upgrade_began(&self, id: ConnId) -> Option<Time> {
        self.again.get(&id).copied()
    }

    /// One connection is not pending any more: its entry in the table says so already.
    pub(super) fn leave<S>(&mut self, id: ConnId, conns: &Connections<S>) {
        self.again.remove(&id);
        self.count = self.count.saturating_sub(1);
        self.trim(conns);
    }

    fn trim<S>(&mut self, conns: &Connections<S>) {
        while let Some(entry) = self.queue.front() {
            if is_pending(conns, &self.again, entry) {
                break;
            }
            self.queue.pop_front();
        }
    }

    /// The oldest connection whose peer keeps the server waiting, and since when it is pending.
    pub(super) fn candidate<S>(&self, conns: &Connections<S>) -> Option<(Time, ConnId)> {
        let mut oldest = self.queue.iter().take(CANDIDATES);
        let waits = |id| conns.get(id).is_some_and(|conn| !conn.queued);
        let &(id, since) =
            oldest.find(|&&entry| is_pending(conns, &self.again, &entry) && waits(entry.0))?;
        Some((since, id))
    }

    /// The queue is no longer than `peak` pending connections justify.
    #[cfg(feature = "sim")]
    pub(super) fn is_compact(&self, peak: usize) -> bool {
        self.queue.len() <= 2 * peak + CANDIDATES
    }

    /// Since when the oldest is pending.
    pub(super) fn oldest(&self) -> Option<Time> {
        self.queue.front().map(|&(_, since)| since)
    }
}

/// False if the entry is stale: its connection has opened or ended, or has a newer entry.
fn is_pending<S>(
    conns: &Connections<S>,
    again: &HashMap<ConnId, Time>,
    &(id, since): &(ConnId, Time),
) -> bool {
    let is_newest = || again.get(&id).is_none_or(|&newest| newest == since);
    conns.get(id).is_some_and(|conn| conn.standing.is_pending()) && is_newest()
}

/// Open connections in the order in which they opened, from which no whole frame has come.
///
/// A frame costs nothing here: its connection leaves the queue at the next [`Silent::trim`] or
/// [`Silent::push`].
#[derive(Debug, Default)]
pub(super) struct Silent {
    queue: VecDeque<ConnId>,
    /// The length at which all that have spoken or ended are removed.
    compact_at: usize,
}

impl Silent {
    pub(super) fn push<S>(&mut self, id: ConnId, conns: &Connections<S>) {
        if self.queue.len() >= self.compact_at.max(CANDIDATES) {
            self.queue.retain(|&id| is_silent(conns, id));
            self.compact_at = 2 * self.queue.len();
            self.queue.shrink_to(self.compact_at.max(CANDIDATES));
        }
        self.queue.push_back(id);
    }

    /// Removes connections from the front, where candidates are searched, that have spoken or
    /// ended, or whose peers wait for this server. The latter are marked as skipped. The first
    /// [`CANDIDATES`] that remain wait for their peers, or have their turns soon.
    ///
    /// Each connection is removed once after it was added, so that the cost per connection is
    /// constant (amortised), however many have spoken since the last call.
    pub(super) fn trim<S>(&mut self, conns: &mut Connections<S>, which: Queue) {
        let mut at = 0;
        while at < CANDIDATES {
            let Some(&id) = self.queue.get(at) else {
                return;
            };
            match conns.get_mut(id).filter(|conn| conn.machine.is_silent()) {
                Some(conn) if conn.queued || waits_for_peer(conn) => at += 1,
                conn => {
                    if let Some(conn) = conn {
                        conn.standing.skip(which);
                    }
                    self.queue.remove(at);
                }
            }
        }
    }

    /// The oldest connection whose peer keeps the server waiting, and when it was accepted.
    pub(super) fn candidate<S>(&self, conns: &Connections<S>) -> Option<(Time, ConnId)> {
        let oldest = self.queue.iter().take(CANDIDATES);
        let mut oldest = oldest.filter_map(|&id| conns.get(id));
        let conn = oldest.find(|conn| waits_for_peer(conn))?;
        Some((conn.accepted_at, conn.id))
    }
}

fn is_silent<S>(conns: &Connections<S>, id: ConnId) -> bool {
    conns.get(id).is_some_and(|conn| conn.machine.is_silent())
}

/// Everything that the kernel has is read, and the first frame is incomplete.
fn waits_for_peer<S>(conn: &Connection<S>) -> bool {
    // Behind the end of its input nothing is read, so that an event leaves it readable.
    let is_read = !conn.readable || conn.machine.is_congested() || conn.machine.is_input_over();
    !conn.queued
        && is_read
        && !conn.retry
        && !conn.paused_for_memory
        && conn.machine.awaits_first_frame()
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;

    use super::*;
    use crate::addr::Addr;
    use crate::config::Listen;
    use crate::id::ServerNumber;
    use crate::proto::{Event, InputCursor, Machine, Pool};
    use crate::Framing;

    /// A connection that is open, and of whose socket nothing is known.
    fn open() -> Connection<()> {
        let limits = Rc::new(Listen::tcp("127.0.0.1:0", Framing::Line).conn);
        let (now, mut pool) = (Time::ZERO, Pool::default());
        let mut machine = Machine::new(&Framing::Line, limits, None, now, &mut pool);
        machine.handle_admitted(now);
        let mut nothing = InputCursor::nothing();
        let event = machine.next_event(&mut nothing, now, &mut pool);
        assert!(matches!(event, Some(Event::Opened)));
        let id = ConnId::new(ServerNumber::NONE, 0, 1);
        Connection::new(id, None, Addr::unspecified(), machine, now, 0)
    }

    #[test]
    fn a_connection_that_the_server_keeps_waiting_waits_for_no_peer() {
        type Change = fn(&mut Connection<()>);
        let changes: [Change; 4] = [
            |conn| conn.queued = true,
            |conn| conn.readable = true,
            |conn| conn.retry = true,
            |conn| conn.paused_for_memory = true,
        ];
        assert!(waits_for_peer(&open()));
        for (at, change) in changes.into_iter().enumerate() {
            let mut conn = open();
            change(&mut conn);
            assert!(!waits_for_peer(&conn), "change {at}");
        }
    }
}
