//! Listening sockets that several servers have in common: the first to listen on an address opens it, the others follow.

use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::os_mio::Listener;
use crate::addr::Addr;
use crate::config::SocketOptions;

/// The sockets that were opened, until all servers are there.
#[derive(Default)]
pub(crate) struct SharedListenSockets {
    listen_sockets: Mutex<Vec<SharedSocket>>,
}

struct SharedSocket {
    /// As it was asked for, perhaps with port 0.
    asked: Addr,
    socket: Listener,
}

impl SharedListenSockets {
    /// The socket for the listener that a server has opened as its `nth` on this address: with port 0 there may be several.
    /// `bind` makes a new one. With [`SocketOptions::reuse_port`](crate::SocketOptions::reuse_port) each server has a socket, and so a
    /// queue, of its own on the address of the first.
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

    /// All servers are there: each socket is from now on as long open as one of them holds it.
    pub(crate) fn forget(&self) {
        self.lock().clear();
    }

    fn lock(&self) -> MutexGuard<'_, Vec<SharedSocket>> {
        self.listen_sockets
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}
