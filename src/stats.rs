//! Counters, and their snapshot.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::proto::Traffic;
use crate::reason::{CloseReason, Closed};

/// Labels of closes that are counted apart.
const MAX_LABELS: usize = 32;
/// The label of all further ones.
const OTHER_LABEL: &str = "other";

/// A server's counters since its start, at one moment. [`Control::stats`](crate::Control::stats)
/// reads them now, [`Handle::stats`](crate::Handle::stats) as of the end of each server's last
/// iteration.
///
/// `accepted + outgoing == open + closed_total()`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stats {
    /// Accepted sockets, including those that were refused at once.
    pub accepted: u64,
    /// Outgoing connections that got a slot, whatever the number of their attempts.
    pub outgoing: u64,
    /// Outgoing connections that are not connected yet
    /// ([`State::Connecting`](crate::State::Connecting)): an attempt is in progress, or scheduled.
    pub connecting: usize,
    /// Connections in a slot, in any state.
    pub open: usize,
    /// Maximum number of concurrent connections in a slot since the start.
    pub peak: usize,
    /// Pending connections among those in a slot: accepted ones in a TLS handshake, in an upgrade
    /// to TLS, or before their PROXY header.
    pub pending: usize,
    /// Bytes in the buffers of all connections, with their PROXY headers: the number that
    /// [`Config::memory_limit`](crate::Config::memory_limit) limits.
    pub memory: usize,
    /// Connections that are not read because memory is tight and their buffers exceed their share.
    pub paused_for_memory: usize,
    /// The cap on all connections together.
    pub max_connections: usize,
    /// Connections that reached [`State::Open`](crate::State::Open): their handlers' `on_open` was
    /// called.
    pub opened: u64,
    /// Bytes and frames of all connections, those that have ended included.
    pub traffic: Traffic,
    /// Times the process or the system ran out of descriptors or socket memory (EMFILE, ENFILE,
    /// ENOBUFS, ENOMEM): one per episode of any length.
    pub out_of_fds: u64,
    /// Connections that were gone before they could be accepted, and other transient accept errors.
    pub accept_errors: u64,
    /// Failed commands of a [`Handle`](crate::Handle): the connection was closing or gone, or did
    /// not take the frame, or the server was dropped before. Calls that wait for an answer are not
    /// counted: they return the error.
    pub undeliverable: u64,
    /// Panics of the user's code: handlers, services, framers, jobs, alarms, TLS callbacks, the
    /// logger, and destructors. A handler's panic is also its connection's reason,
    /// [`Panicked`](crate::CloseReason::Panicked).
    pub panics: u64,
    /// Iterations of the loop.
    pub iterations: u64,
    pub(crate) closed: ClosedCounts,
}

impl Stats {
    /// Returns the number of connections that ended for this reason. [`CloseReason::ALL`] lists the
    /// reasons.
    pub fn closed(&self, reason: CloseReason) -> u64 {
        self.closed.of(reason)
    }

    /// Returns the labels ([`Close::labelled`](crate::Close::labelled)) of connections that ended
    /// for this reason, each with their number. [`Stats::closed`] includes them.
    ///
    /// A server counts its first 32 labels, and all others as `other`.
    pub fn closed_labels(
        &self,
        reason: CloseReason,
    ) -> impl Iterator<Item = (&'static str, u64)> + '_ {
        self.closed.labels(reason)
    }

    /// Returns the number of connections that have ended.
    pub fn closed_total(&self) -> u64 {
        self.closed.total()
    }

    /// Adds the counters of another server. `max_connections` stays.
    pub(crate) fn add(&mut self, other: &Self) {
        let Self {
            accepted,
            outgoing,
            connecting,
            open,
            peak,
            pending,
            memory,
            paused_for_memory,
            max_connections: _,
            opened,
            traffic,
            out_of_fds,
            accept_errors,
            undeliverable,
            panics,
            iterations,
            closed,
        } = other;
        self.accepted += accepted;
        self.outgoing += outgoing;
        self.connecting += connecting;
        self.open += open;
        self.peak += peak;
        self.pending += pending;
        self.memory += memory;
        self.paused_for_memory += paused_for_memory;
        self.opened += opened;
        self.traffic.add(traffic);
        self.out_of_fds += out_of_fds;
        self.accept_errors += accept_errors;
        self.undeliverable += undeliverable;
        self.panics += panics;
        self.iterations += iterations;
        self.closed.add(closed);
    }

    pub(crate) fn count_closed(&mut self, closed: &Closed) {
        self.closed.count(closed);
    }

    /// Returns the number of connections that ended for this reason without a label.
    pub(crate) fn closed_unlabelled(&self, reason: CloseReason) -> u64 {
        self.closed.unlabelled(reason)
    }
}

/// A counter for each reason.
#[derive(Clone, Debug, PartialEq, Eq)]
struct ReasonCounts([u64; CloseReason::COUNT]);

impl Default for ReasonCounts {
    fn default() -> Self {
        Self([0; CloseReason::COUNT])
    }
}

impl ReasonCounts {
    fn of(&self, reason: CloseReason) -> u64 {
        self.0.get(reason.index()).copied().unwrap_or(0)
    }

    fn count(&mut self, reason: CloseReason) {
        if let Some(count) = self.0.get_mut(reason.index()) {
            *count += 1;
        }
    }

    fn add(&mut self, other: &Self) {
        for (sum, count) in self.0.iter_mut().zip(&other.0) {
            *sum += count;
        }
    }
}

/// The ends of connections, by reason and label.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct ClosedCounts {
    /// All, with a label or without.
    all: ReasonCounts,
    /// Those with a label. Shared with published statistics: a server publishes often, and labelled
    /// connections seldom end.
    labelled: Option<Arc<BTreeMap<&'static str, ReasonCounts>>>,
}

impl ClosedCounts {
    pub(crate) fn of(&self, reason: CloseReason) -> u64 {
        self.all.of(reason)
    }

    pub(crate) fn total(&self) -> u64 {
        self.all.0.iter().sum()
    }

    /// Returns the labels of this reason, each with its count.
    pub(crate) fn labels(
        &self,
        reason: CloseReason,
    ) -> impl Iterator<Item = (&'static str, u64)> + '_ {
        let labelled = self.labelled.iter().flat_map(|labelled| &**labelled);
        labelled
            .map(move |(label, counts)| (*label, counts.of(reason)))
            .filter(|&(_, count)| count > 0)
    }

    pub(crate) fn unlabelled(&self, reason: CloseReason) -> u64 {
        let labelled: u64 = self.labels(reason).map(|(_, count)| count).sum();
        self.of(reason).saturating_sub(labelled)
    }

    pub(crate) fn count(&mut self, closed: &Closed) {
        self.all.count(closed.reason);
        if let Some(label) = closed.label {
            self.count_label(label, closed.reason);
        }
    }

    #[cold]
    fn count_label(&mut self, label: &'static str, reason: CloseReason) {
        let labelled = Arc::make_mut(self.labelled.get_or_insert_default());
        let fits = labelled.len() < MAX_LABELS || labelled.contains_key(label);
        let label = if fits { label } else { OTHER_LABEL };
        labelled.entry(label).or_default().count(reason);
    }

    /// Adds the counts of another server or shard. The sum has the labels of both, so that a count
    /// never moves to another label.
    pub(crate) fn add(&mut self, other: &Self) {
        self.all.add(&other.all);
        let Some(labelled) = &other.labelled else {
            return;
        };
        let sums = Arc::make_mut(self.labelled.get_or_insert_default());
        for (label, counts) in labelled.iter() {
            sums.entry(label).or_default().add(counts);
        }
    }
}

/// The result of a drain: the ends of all connections that were present at its start or accepted
/// since.
///
/// If `failed`, `forced` and `unserved` are zero, each client that the loop served got everything,
/// or gets it from the kernel: for a client that had finished sending (FIN), the report does not
/// wait until its system has the output. The output of a detached connection's thread is not known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct DrainReport {
    /// Connections that ended in order: the handler or the peer closed, all output and FIN were
    /// sent, and the peer finished too. Also detached connections that their threads have dropped.
    pub ended: usize,
    /// Connections with another end. The reason is none of [`Finished`](CloseReason::Finished),
    /// [`Closed`](CloseReason::Closed) and [`Drained`](CloseReason::Drained); or the peer reset it;
    /// or its FIN did not come in time. Also clients that were refused, and outgoing connections
    /// that were not established yet.
    pub failed: usize,
    /// Connections that were reset at the deadline, or whose peers had not got all output by then
    /// ([`DrainForced`](CloseReason::DrainForced)).
    pub forced: usize,
    /// Listeners that were closed while clients waited in their backlogs. No slot became free for
    /// these before the deadline. Or a second into the drain the server had no connection and could
    /// not accept them. Or as many clients as fit into the backlogs had been accepted. The kernel
    /// resets the waiting clients, unless another process has the socket.
    pub unserved: usize,
    /// Duration of the drain.
    pub took: std::time::Duration,
}

impl DrainReport {
    /// The result of two servers that drained at the same time.
    pub(crate) fn and(self, other: Self) -> Self {
        Self {
            ended: self.ended + other.ended,
            failed: self.failed + other.failed,
            forced: self.forced + other.forced,
            unserved: self.unserved + other.unserved,
            took: self.took.max(other.took),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reason::Close;

    fn closed(label: &'static str) -> Closed {
        Close::because("a cause").labelled(label).closed
    }

    /// Labels that are made at run time, as a program should not.
    fn label(number: usize) -> &'static str {
        format!("label_{number:02}").leak()
    }

    #[test]
    fn further_labels_count_as_one() {
        let mut counts = ClosedCounts::default();
        for number in 0..100 {
            counts.count(&closed(label(number)));
        }
        counts.count(&closed(label(7)));
        counts.count(&Closed::new(CloseReason::Failed));
        counts.count(&closed(""));
        counts.count(&Close::new().labelled(label(8)).closed);
        counts.count(&Close::new().labelled(label(99)).closed);
        let mut expected: Vec<_> = (0..MAX_LABELS).map(|number| (label(number), 1)).collect();
        expected[7].1 = 2;
        expected.push((OTHER_LABEL, 100 - MAX_LABELS as u64));
        let failed: Vec<_> = counts.labels(CloseReason::Failed).collect();
        assert_eq!(failed, expected);
        assert_eq!(counts.unlabelled(CloseReason::Failed), 2);
        assert_eq!(counts.of(CloseReason::Failed), 103);
        let closed: Vec<_> = counts.labels(CloseReason::Closed).collect();
        assert_eq!(closed, [(label(8), 1), (OTHER_LABEL, 1)]);
        assert_eq!(counts.total(), 105);
    }

    #[test]
    fn a_sum_has_the_labels_of_both() {
        let [mut one, mut other] = [ClosedCounts::default(), ClosedCounts::default()];
        for number in 0..MAX_LABELS {
            one.count(&closed(label(number)));
            other.count(&closed(label(number + MAX_LABELS / 2)));
        }
        let before = one.clone();
        let mut sum = ClosedCounts::default();
        sum.add(&one);
        sum.add(&other);
        assert_eq!(one, before);
        let expected = |number| if (16..32).contains(&number) { 2 } else { 1 };
        let expected: Vec<_> = (0..48)
            .map(|number| (label(number), expected(number)))
            .collect();
        let failed: Vec<_> = sum.labels(CloseReason::Failed).collect();
        assert_eq!((failed, sum.total()), (expected, 64));
    }
}
