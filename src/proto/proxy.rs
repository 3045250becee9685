//! The PROXY protocol, versions 1 and 2: whom a proxy in front of us speaks for (haproxy, `doc/proxy-protocol.txt`).
//!
//! Strict: what is not a header to the letter ends the connection, and is never taken for "no header".

mod tlv;
mod v1;
mod v2;

use core::net::SocketAddr;
use std::error::Error as StdError;
use std::fmt;

pub use tlv::{ProxySsl, ProxyTlvs};
#[cfg(feature = "sim")]
pub(super) use v2::MAX_LENGTH;

/// What a PROXY protocol header says. From [`Conn::proxy`](crate::Conn::proxy).
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ProxyHeader {
    /// 1 or 2.
    pub version: u8,
    /// Whom the proxy speaks for.
    pub origin: ProxyOrigin,
    /// What else the proxy knows: version 2 only.
    pub tlvs: ProxyTlvs,
}

/// Whom a proxy speaks for.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ProxyOrigin {
    /// For itself (version 2 LOCAL: a health check) or for somebody it cannot name (version 1 UNKNOWN, version 2 UNSPEC).
    /// The connection's own addresses hold.
    Unknown,
    /// For a client that came to it by TCP.
    Tcp {
        /// The client.
        source: SocketAddr,
        /// Where the client connected to.
        destination: SocketAddr,
    },
    /// For a client that came to it through a Unix socket (version 2).
    Unix {
        /// The client's path, without the zeros behind it; mostly empty.
        source: Vec<u8>,
        /// The path of the proxy's socket.
        destination: Vec<u8>,
    },
}

impl ProxyHeader {
    /// The client's address, if it has one that is an internet address.
    pub fn source(&self) -> Option<SocketAddr> {
        match self.origin {
            ProxyOrigin::Tcp { source, .. } => Some(source),
            ProxyOrigin::Unknown | ProxyOrigin::Unix { .. } => None,
        }
    }

    /// Where the client connected to, likewise.
    pub fn destination(&self) -> Option<SocketAddr> {
        match self.origin {
            ProxyOrigin::Tcp { destination, .. } => Some(destination),
            ProxyOrigin::Unknown | ProxyOrigin::Unix { .. } => None,
        }
    }
}

/// Why bytes are no PROXY header. The error behind [`CloseReason::BadProxyHeader`](crate::CloseReason::BadProxyHeader).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProxyError(&'static str);

impl ProxyError {
    pub(super) const MISSING: Self = Self("it begins with something else");
    pub(super) const CUT_OFF: Self = Self("the peer finished inside it");
}

impl fmt::Display for ProxyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "not a PROXY protocol header: {}", self.0)
    }
}

impl StdError for ProxyError {}

/// What is at the front of a connection's bytes.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Front {
    /// A whole header, and how many bytes it takes.
    Header(Box<ProxyHeader>, usize),
    /// So far it may be the beginning of one.
    More,
    /// No header, and none can come of it.
    Other,
    /// The beginning of a header that is wrong.
    Bad(ProxyError),
}

/// Looks for a header at the front of `input`. What it sees is at most [`v2::MAX_LENGTH`] bytes.
pub(super) fn front(input: &[u8]) -> Front {
    let begins = |signature: &[u8]| {
        let common = input.len().min(signature.len());
        input.get(..common) == signature.get(..common)
    };
    let outcome = if begins(v1::SIGNATURE) {
        v1::parse(input)
    } else if begins(v2::SIGNATURE) {
        v2::parse(input)
    } else {
        return Front::Other;
    };
    match outcome {
        Ok(Some((header, taken))) => Front::Header(Box::new(header), taken),
        Ok(None) => Front::More,
        Err(error) => Front::Bad(error),
    }
}

/// `None` while a header is not whole.
type Parsed = Result<Option<(ProxyHeader, usize)>, ProxyError>;

#[cfg(test)]
mod tests;
