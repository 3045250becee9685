//! The facts in a PROXY header.

use core::net::SocketAddr;

use super::error::ProxyError;
use super::tlv::ProxyTlvs;
use crate::addr::Addr;

/// A PROXY protocol header, from [`Conn::proxy`](crate::Conn::proxy) or
/// [`Peer::proxy`](crate::Peer::proxy).
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ProxyHeader {
    /// The version of the protocol: 1 or 2.
    pub version: u8,
    /// The client's address.
    ///
    /// `None` for the proxy itself (version 2 LOCAL: a health check). Also for a client that the
    /// proxy cannot name (version 1 UNKNOWN, version 2 UNSPEC). Then, and for a client of a Unix
    /// socket (version 2), access rules and source limits apply to the proxy's own address.
    pub source: Option<Addr>,
    /// The address that the client connected to; `None` if `source` is `None`.
    pub destination: Option<Addr>,
    /// Further facts from the proxy: version 2 only, and not with LOCAL.
    pub tlvs: ProxyTlvs,
}

impl ProxyHeader {
    /// Returns the client's address, if it is an internet address.
    pub(crate) fn tcp_source(&self) -> Option<SocketAddr> {
        self.source.as_ref()?.as_tcp()
    }

    /// Returns the memory that a shared header takes.
    pub(in crate::proto) fn memory(&self) -> usize {
        // The counts of `Rc`.
        const COUNTS: usize = 2 * size_of::<usize>();
        let names = [&self.source, &self.destination];
        let names = names.into_iter().flatten().map(Addr::memory);
        COUNTS + size_of::<Self>() + self.tlvs.memory() + names.sum::<usize>()
    }
}

/// The source and the destination, if the header names them.
pub(super) type Ends = Option<(Addr, Addr)>;

/// `None` while a header is incomplete; else the header and its length.
pub(super) type Parsed = Result<Option<(ProxyHeader, usize)>, ProxyError>;
