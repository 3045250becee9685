//! How simulated addresses answer the server's attempts to connect.

use std::time::Duration;

/// The result of an attempt to connect to an address: [`Sim::remote`](super::Sim::remote).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Answer {
    /// Connected as soon as the server registers the socket, or at once for a Unix socket.
    Accept,
    /// Connected after this time.
    AcceptAfter(Duration),
    /// Refused (ECONNREFUSED). The default of every address.
    Refuse,
    /// Failed after this time, with this errno.
    FailAfter(Duration, i32),
    /// No reply.
    Silence,
}
