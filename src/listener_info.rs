//! One listener at one moment: its state and its counts.

use crate::addr::Addr;
use crate::id::ListenerId;

/// Whether a listener accepts clients at this moment, and why not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ListenerState {
    /// In the poll and accepting.
    Listening,
    /// The cap is reached, or the limit of pending connections; out of the poll until a slot is
    /// free.
    Full,
    /// The accept rate is reached; out of the poll until there is another token.
    RateLimited,
    /// Descriptors or socket memory ran out; out of the poll for the interval, or until one of our
    /// descriptors closes.
    OutOfFds,
    /// Suspended; clients wait in the backlog.
    Suspended,
    /// The port is closed.
    Closed,
}

impl ListenerState {
    /// Every state.
    pub const ALL: &'static [Self] = &[
        Self::Listening,
        Self::Full,
        Self::RateLimited,
        Self::OutOfFds,
        Self::Suspended,
        Self::Closed,
    ];

    /// Returns the state's name.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Listening => "Listening",
            Self::Full => "Full",
            Self::RateLimited => "RateLimited",
            Self::OutOfFds => "OutOfFds",
            Self::Suspended => "Suspended",
            Self::Closed => "Closed",
        }
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
    /// Number of open connections, in every state.
    pub connections: usize,
    /// Maximum number of connections: the smaller of its own limit and the server's cap.
    pub max_connections: usize,
    /// Number of accepted connections.
    pub accepted: u64,
}
