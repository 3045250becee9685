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
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    sockets: Vec<SharedSocket>,
    /// A server has a socket that others may not have.
    has_own: bool,
}

/// Which socket a server asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Asked {
    /// Perhaps with port 0.
    addr: Addr,
    /// With port 0 each name is a port of its own, in whatever order a server listens.
    name: Option<String>,
}

struct SharedSocket {
    asked: Asked,
    socket: Listener,
    /// Number of servers that have it.
    servers: usize,
}

impl Asked {
    pub(super) fn new(addr: &Addr, name: Option<&str>) -> Self {
        let name = name.filter(|_| addr.port() == Some(0));
        Self {
            addr: addr.clone(),
            name: name.map(str::to_owned),
        }
    }
}

impl SharedListenSockets {
    /// The socket for the `nth` listener of a server that asks for the same. `bind` makes a new
    /// one. With [`SocketOptions::reuse_port`](crate::SocketOptions::reuse_port) each server has a
    /// socket and a queue of its own, on the address of the first.
    pub(super) fn open(
        &self,
        asked: &Asked,
        nth: usize,
        options: &SocketOptions,
        bind: impl Fn(&Addr) -> io::Result<Listener>,
    ) -> io::Result<Listener> {
        let mut state = self.lock();
        let State { sockets, has_own } = &mut *state;
        let mut same = sockets.iter_mut().filter(|shared| shared.asked == *asked);
        if let Some(shared) = same.nth(nth) {
            shared.servers += 1;
            return match (&asked.addr, options.reuse_port) {
                (Addr::Tcp(_), true) => {
                    *has_own = true;
                    bind(&shared.socket.local_addr()?)
                }
                _ => shared.socket.try_clone(),
            };
        }
        let socket = bind(&asked.addr)?;
        sockets.push(SharedSocket {
            asked: asked.clone(),
            socket: socket.try_clone()?,
            servers: 1,
        });
        Ok(socket)
    }

    /// A server listens on a socket that was not opened here.
    pub(super) fn adopted(&self) {
        self.lock().has_own = true;
    }

    /// All `servers` are there: from now on each socket is open as long as one of them has it. True
    /// if each server has every socket.
    pub(crate) fn forget(&self, servers: usize) -> bool {
        let state = std::mem::take(&mut *self.lock());
        let all_have = |shared: &SharedSocket| shared.servers == servers;
        !state.has_own && state.sockets.iter().all(all_have)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
