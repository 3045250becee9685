//! Counters, and their snapshot.

use crate::proto::Traffic;
use crate::reason::CloseReason;

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
    closed: ClosedCounts,
}

impl Stats {
    /// Returns the number of connections that ended for this reason. [`CloseReason::ALL`] lists the
    /// reasons.
    pub fn closed(&self, reason: CloseReason) -> u64 {
        self.closed.of(reason)
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

    pub(crate) fn count_closed(&mut self, reason: CloseReason) {
        self.closed.count(reason);
    }
}

/// A counter for each reason.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ClosedCounts([u64; CloseReason::COUNT]);

impl Default for ClosedCounts {
    fn default() -> Self {
        Self([0; CloseReason::COUNT])
    }
}

impl ClosedCounts {
    pub(crate) fn of(&self, reason: CloseReason) -> u64 {
        self.0.get(reason.index()).copied().unwrap_or(0)
    }

    pub(crate) fn total(&self) -> u64 {
        self.0.iter().sum()
    }

    pub(crate) fn by_reason(&self) -> impl Iterator<Item = (CloseReason, u64)> + '_ {
        CloseReason::ALL
            .iter()
            .map(|&reason| (reason, self.of(reason)))
            .filter(|&(_, count)| count > 0)
    }

    pub(crate) fn count(&mut self, reason: CloseReason) {
        if let Some(count) = self.0.get_mut(reason.index()) {
            *count += 1;
        }
    }

    pub(crate) fn add(&mut self, other: &Self) {
        for (sum, count) in self.0.iter_mut().zip(&other.0) {
            *sum += count;
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
