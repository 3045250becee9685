//! The addresses of the simulated server and of its clients.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use crate::addr::Addr;

/// The simulated server's own host, and its first port for outgoing connections.
const HERE: [u8; 4] = [192, 0, 2, 1];
const FIRST_PORT: usize = 20_000;
const PORTS: usize = 40_000;

/// Clients have addresses from 10.0.0.0:10000 on, and ports below 60000.
const FIRST_CLIENT_HOST: u32 = u32::from_be_bytes([10, 0, 0, 0]);
const FIRST_CLIENT_PORT: usize = 10_000;
const CLIENT_PORTS: usize = 50_000;

/// A client's address, on this host or on one of the simulator's choice.
pub(super) fn client_addr(index: usize, host: Option<IpAddr>) -> SocketAddr {
    let own = || Ipv4Addr::from(FIRST_CLIENT_HOST + (index / CLIENT_PORTS) as u32).into();
    SocketAddr::new(
        host.unwrap_or_else(own),
        (FIRST_CLIENT_PORT + index % CLIENT_PORTS) as u16,
    )
}

/// The server's own address in an outgoing or adopted connection.
pub(super) fn local_addr(index: usize) -> SocketAddr {
    SocketAddr::from((HERE, (FIRST_PORT + index % PORTS) as u16))
}

/// The address of a TCP peer. A Unix peer has none, and no port.
pub(super) fn tcp_part(addr: &Addr) -> SocketAddr {
    addr.as_tcp()
        .unwrap_or_else(|| SocketAddr::from(([0, 0, 0, 0], 0)))
}
