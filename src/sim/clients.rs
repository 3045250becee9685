//! The clients' side of the kernel in memory.

use std::net::{IpAddr, SocketAddr};

use super::addrs::client_addr;
use super::kernel::Kernel;
use super::socket::SimSocket;

/// The client's end of a simulated connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ClientId(pub(super) usize);

/// The state of a connection, as its client sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ClientState {
    /// Connected, perhaps still in the backlog.
    Connected,
    /// The server has finished sending, and the client has received everything. A client does not
    /// finish by itself. Without [`Sim::finish`](super::Sim::finish) the server lingers
    /// ([`ConnConfig::linger_timeout`](crate::ConnConfig::linger_timeout)) before it calls
    /// `on_close`.
    Finished,
    /// The connection was reset or has failed.
    Reset,
}

impl Kernel {
    /// Connects to a listener, from a host of its own choice; `None` without a listener there, or
    /// if its backlog is full.
    pub(super) fn connect(&mut self, addr: SocketAddr, from: Option<IpAddr>) -> Option<ClientId> {
        let index = self.sockets.len();
        let listener = self
            .listeners
            .iter_mut()
            .find(|listener| listener.open && listener.addr == addr)?;
        if listener.queue.len() >= listener.backlog.max(1) {
            return None;
        }
        listener.queue.push_back(index);
        listener.edge = true;
        let peer = client_addr(index, from);
        self.sockets.push(SimSocket::new(peer, listener.addr));
        Some(ClientId(index))
    }

    pub(super) fn client_send(&mut self, client: ClientId, bytes: &[u8]) {
        if let Some(socket) = self.live(client) {
            if !socket.client_finished {
                socket.underway.extend(bytes);
                socket.arrive();
            }
        }
    }

    pub(super) fn client_finish(&mut self, client: ClientId) {
        if let Some(socket) = self.live(client) {
            socket.client_finished = true;
            socket.arrive();
        }
    }

    pub(super) fn client_reset(&mut self, client: ClientId) {
        if let Some(socket) = self.live(client) {
            socket.client_gone = true;
            socket.die(libc::ECONNRESET);
        }
    }

    pub(super) fn client_state(&self, client: ClientId) -> ClientState {
        match self.sockets.get(client.0) {
            None => ClientState::Reset,
            Some(socket) if socket.server_reset || socket.error.is_some() => ClientState::Reset,
            Some(socket) if socket.server_finished && socket.sent.is_empty() => {
                ClientState::Finished
            }
            Some(_) => ClientState::Connected,
        }
    }

    /// The backlog is not empty, and no edge is due that will announce it.
    pub(super) fn has_missed_clients(&self, index: usize) -> bool {
        self.listeners.get(index).is_some_and(|listener| {
            listener.token.is_some() && !listener.edge && !listener.queue.is_empty()
        })
    }

    fn live(&mut self, client: ClientId) -> Option<&mut SimSocket> {
        self.sockets
            .get_mut(client.0)
            .filter(|socket| !socket.server_reset && socket.error.is_none())
    }
}
