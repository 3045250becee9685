//! Real descriptors of the application: adopted sockets, detached connections, and watched
//! descriptors.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use super::addrs::{client_addr, local_addr, tcp_part};
use super::relay::{read_available, Relay};
use super::socket::{Dial, SimSocket};
use super::sockets::Sockets;
use crate::addr::Addr;
use crate::config::SocketOptions;
use crate::handler::Interest;
use crate::reactor::os::{Event, Os as _, Token};
use crate::reactor::os_mio::{self, MioOs};

/// The detached connections and the watched descriptors of one world.
#[derive(Default)]
pub(super) struct Descriptors {
    /// Detached connections, by the number of their streams' sockets.
    detached: BTreeMap<u64, usize>,
    /// Those whose bytes are to be moved.
    relays: Vec<Relay>,
    /// Knows the watched descriptors, if there are any.
    watcher: Option<MioOs>,
    /// Their events that no poll has reported yet.
    pub(super) events: Vec<Event>,
}

impl Descriptors {
    /// Takes over a connected socket, and returns its number. That of a detached connection is this
    /// connection again.
    pub(super) fn adopt(
        &mut self,
        sockets: &mut Sockets,
        socket: OwnedFd,
        options: &SocketOptions,
    ) -> io::Result<usize> {
        let (socket, inode) = identify(socket)?;
        let detached = self.detached.remove(&inode);
        let stream = UnixStream::from(socket.try_clone()?);
        let (_checked, peer) = os_mio::adopt(socket, options)?;
        match detached {
            Some(index) => self.resume(sockets, index, &stream),
            None => insert_adopted(sockets, peer, &stream),
        }
    }

    /// Takes a connection out of the loop. Returns the socket of its stream.
    pub(super) fn release(&mut self, sockets: &mut Sockets, index: usize) -> io::Result<OwnedFd> {
        let (stream, end) = UnixStream::pair()?;
        end.set_nonblocking(true)?;
        let (stream, inode) = identify(stream.into())?;
        let socket = sockets.get_mut(index).filter(|socket| socket.held);
        let socket = socket.ok_or(io::ErrorKind::NotFound)?;
        (socket.held, socket.token) = (false, None);
        self.detached.insert(inode, index);
        self.relays.push(Relay { index, end });
        self.relay(sockets);
        Ok(stream)
    }

    /// The stream of a detached connection comes back, with the bytes that it has not read.
    fn resume(
        &mut self,
        sockets: &mut Sockets,
        index: usize,
        stream: &UnixStream,
    ) -> io::Result<usize> {
        self.relay(sockets);
        let relay = self.relays.iter().position(|relay| relay.index == index);
        let relay = relay.map(|at| self.relays.swap_remove(at));
        let socket = sockets.get_mut(index).ok_or(io::ErrorKind::NotFound)?;
        if let Some(errno) = socket.error {
            return Err(io::Error::from_raw_os_error(errno));
        }
        let mut bytes = Vec::new();
        read_available(stream, &mut bytes)?;
        bytes.extend(&socket.received);
        socket.received = bytes.into();
        if let Some(relay) = relay {
            let mut bytes = Vec::new();
            socket.server_finished |= read_available(&relay.end, &mut bytes)?;
            socket.sent.extend(bytes);
        }
        socket.held = true;
        Ok(index)
    }

    /// Moves bytes between the streams of detached connections and their clients.
    pub(super) fn relay(&mut self, sockets: &mut Sockets) {
        let detached = &mut self.detached;
        self.relays.retain_mut(|relay| {
            let socket = sockets.get_mut(relay.index);
            let is_closed = socket
                .as_ref()
                .is_none_or(|socket| socket.server_finished || socket.server_reset);
            if is_closed {
                // Its stream does not come back.
                detached.retain(|_, index| *index != relay.index);
            }
            socket.is_some_and(|socket| relay.carry(socket))
        });
    }

    /// Watches a real descriptor, whose readiness is the real one.
    pub(super) fn watch(
        &mut self,
        descriptor: BorrowedFd<'_>,
        interest: Interest,
        token: Token,
    ) -> io::Result<()> {
        let watcher = match &mut self.watcher {
            Some(watcher) => watcher,
            None => self.watcher.insert(MioOs::new()?),
        };
        watcher.watch(descriptor, interest, token)
    }

    pub(super) fn unwatch(&mut self, descriptor: RawFd) {
        if let Some(watcher) = &mut self.watcher {
            watcher.unwatch(descriptor);
        }
    }

    /// Asks the system for events of watched descriptors.
    pub(super) fn ask_watcher(&mut self) {
        if let Some(watcher) = &mut self.watcher {
            // After an error the events come with the next poll.
            let _ = watcher.poll(&mut self.events, Some(Duration::ZERO));
        }
    }
}

fn insert_adopted(sockets: &mut Sockets, peer: Addr, stream: &UnixStream) -> io::Result<usize> {
    let index = sockets.len();
    let mut received = Vec::new();
    let has_ended = read_available(stream, &mut received)?;
    let to = Some(peer).filter(|peer| peer.as_unix().is_some());
    let peer = to.as_ref().map_or(client_addr(index, None), tcp_part);
    let mut socket = SimSocket::new(peer, local_addr(index));
    (socket.held, socket.dial, socket.to) = (true, Dial::Adopted, to);
    (socket.underway, socket.client_finished) = (received.into(), has_ended);
    socket.arrive();
    sockets.push(socket);
    Ok(index)
}

/// Returns the number that tells a socket from all others.
fn identify(socket: OwnedFd) -> io::Result<(OwnedFd, u64)> {
    let file = File::from(socket);
    let inode = file.metadata()?.ino();
    Ok((file.into(), inode))
}
