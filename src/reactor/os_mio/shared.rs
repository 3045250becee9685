//! Listening sockets that several servers share: the first to listen on an address opens it, the
//! others follow.

use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::sockets::Listener;
use crate::addr::Addr;
use crate::config::SocketOptions;

/// The opened sockets, until all servers are there.
#[derive(Default)]
pub(crate) struct SharedListenSockets {
    listen_sockets: Mutex<Vec<SharedSocket>>,
}

struct SharedSocket {
    /// The requested address, perhaps with port 0.
    asked: Addr,
    socket: Listener,
}

impl SharedListenSockets {
    /// The socket for the `nth` listener of a server on this address: with port 0 there may be
    /// several. `bind` makes a new one. With [`SocketOptions::reuse_port`](crate::SocketOptions::reuse_port) each
    /// server has a socket and a queue of its own, on the address of the first.
    pub(super) fn open(
        &self,
        asked: &Addr,
        nth: usize,
        options: &SocketOptions,
        bind: impl Fn(&Addr) -> io::Result<Listener>,
    ) -> io::Result<Listener> {
        let mut listen_sockets = self.lock();
        if let Some(shared) = listen_sockets
            .iter()
            .filter(|shared| shared.asked == *asked)
            .nth(nth)
        {
            return match (asked, options.reuse_port) {
                (Addr::Tcp(_), true) => bind(&shared.socket.local_addr()?),
                _ => shared.socket.try_clone(),
            };
        }
        let socket = bind(asked)?;
        listen_sockets.push(SharedSocket {
            asked: asked.clone(),
            socket: socket.try_clone()?,
        });
        Ok(socket)
    }

    /// All servers are there: from now on each socket is open as long as one of them has it.
    pub(crate) fn forget(&self) {
        self.lock().clear();
    }

    fn lock(&self) -> MutexGuard<'_, Vec<SharedSocket>> {
        self.listen_sockets
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}
