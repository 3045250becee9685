//! The facts in a PROXY header.

use core::net::SocketAddr;

use super::error::ProxyError;
use super::tlv::ProxyTlvs;

/// A PROXY protocol header. From [`Conn::proxy`](crate::Conn::proxy).
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ProxyHeader {
    /// 1 or 2.
    pub version: u8,
    /// The origin of the connection to the proxy.
    pub origin: ProxyOrigin,
    /// Further facts from the proxy: version 2 only.
    pub tlvs: ProxyTlvs,
}

/// The origin of the connection that a proxy forwards.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ProxyOrigin {
    /// The proxy itself (version 2 LOCAL: a health check), or a peer that it cannot name (version 1
    /// UNKNOWN, version 2 UNSPEC). The addresses of the connection itself apply: rules and limits
    /// judge and count the proxy.
    Unknown,
    /// A client that connected to the proxy by TCP.
    Tcp {
        /// The client's address.
        source: SocketAddr,
        /// The address that the client connected to.
        destination: SocketAddr,
    },
    /// A client that connected to the proxy through a Unix socket (version 2). Rules and limits
    /// judge and count the proxy.
    Unix {
        /// The client's path, without trailing zeros; mostly empty.
        source: Vec<u8>,
        /// The path of the proxy's socket.
        destination: Vec<u8>,
    },
}

impl ProxyHeader {
    /// Returns the client's address, if it is an internet address.
    pub(crate) fn source(&self) -> Option<SocketAddr> {
        match self.origin {
            ProxyOrigin::Tcp { source, .. } => Some(source),
            ProxyOrigin::Unknown | ProxyOrigin::Unix { .. } => None,
        }
    }

    /// Returns the memory that a shared header takes.
    pub(in crate::proto) fn memory(&self) -> usize {
        // The counts of `Rc`.
        const COUNTS: usize = 2 * size_of::<usize>();
        let paths = match &self.origin {
            ProxyOrigin::Unix {
                source,
                destination,
            } => source.capacity() + destination.capacity(),
            ProxyOrigin::Unknown | ProxyOrigin::Tcp { .. } => 0,
        };
        COUNTS + size_of::<Self>() + self.tlvs.memory() + paths
    }
}

/// `None` while a header is incomplete; else the header and its length.
pub(super) type Parsed = Result<Option<(ProxyHeader, usize)>, ProxyError>;
