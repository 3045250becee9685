//! How simulated addresses answer the server's attempts to connect.

use std::time::Duration;

/// The result of an attempt to connect to an address: [`Sim::remote`](super::Sim::remote).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Answer {
    /// Connected, as soon as the server registers the socket (at once, through a Unix socket).
    Accept,
    /// The same after a while.
    AcceptAfter(Duration),
    /// Refused (ECONNREFUSED). The default of every address.
    Refuse,
    /// The connection fails after a while, with this errno.
    FailAfter(Duration, i32),
    /// No reply ever.
    Silence,
}
