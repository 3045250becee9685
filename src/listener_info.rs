//! One listener at one moment: its state and its counts.

use std::fmt;

use crate::addr::Addr;
use crate::id::ListenerId;
use crate::proto::Traffic;
use crate::reason::CloseReason;
use crate::stats::ClosedCounts;

/// Whether a listener accepts clients at this moment, and why not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ListenerState {
    /// In the poll: clients are accepted, or refused
    /// ([`AtCapacity::Refuse`](crate::AtCapacity::Refuse)).
    Listening,
    /// The cap is reached, or the limit of pending connections; out of the poll until a client can
    /// be admitted. Only with [`AtCapacity::Wait`](crate::AtCapacity::Wait).
    Full,
    /// The accept rate is used up; out of the poll until there is another token. Only with
    /// [`AtCapacity::Wait`](crate::AtCapacity::Wait).
    RateLimited,
    /// Descriptors or socket memory ran out; out of the poll for
    /// [`Config::emfile_backoff`](crate::Config::emfile_backoff), or until the server closes a
    /// descriptor of its own.
    OutOfFds,
    /// Suspended; clients wait in the backlog.
    Suspended,
    /// The port is closed.
    Closed,
}

impl ListenerState {
    /// Every state.
    pub(crate) const ALL: &'static [Self] = &[
        Self::Listening,
        Self::Full,
        Self::RateLimited,
        Self::OutOfFds,
        Self::Suspended,
        Self::Closed,
    ];

    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Listening => "listening",
            Self::Full => "full",
            Self::RateLimited => "rate_limited",
            Self::OutOfFds => "out_of_fds",
            Self::Suspended => "suspended",
            Self::Closed => "closed",
        }
    }
}

/// In snake_case: the label in [`Metrics`](crate::Metrics).
impl fmt::Display for ListenerState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// One listener at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ListenerInfo {
    /// The id.
    pub id: ListenerId,
    /// The name.
    pub name: String,
    /// The address, with the real port.
    pub addr: Addr,
    /// Whether it accepts clients.
    pub state: ListenerState,
    /// Number of connections in a slot, in any state.
    pub connections: usize,
    /// Maximum number of connections: the smaller of its own limit and the server's cap.
    pub max_connections: usize,
    /// Number of accepted sockets, those that were refused included.
    pub accepted: u64,
    /// Bytes and frames of all its connections, those that have ended included. Never goes down.
    /// Those of one connection are in [`ConnInfo::traffic`](crate::ConnInfo::traffic).
    pub traffic: Traffic,
    pub(crate) closed: ClosedCounts,
}

impl ListenerInfo {
    /// Returns the number of its connections that ended for this reason, those that were refused
    /// included.
    ///
    /// `accepted` is the sum over all reasons and `connections`.
    pub fn closed(&self, reason: CloseReason) -> u64 {
        self.closed.of(reason)
    }

    /// Returns the labels of its connections, as
    /// [`Stats::closed_labels`](crate::Stats::closed_labels).
    pub fn closed_labels(
        &self,
        reason: CloseReason,
    ) -> impl Iterator<Item = (&'static str, u64)> + '_ {
        self.closed.labels(reason)
    }
}
