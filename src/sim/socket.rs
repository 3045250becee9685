//! One simulated connection: its buffers in both directions, and its due edges.

use std::collections::VecDeque;
use std::net::SocketAddr;

use crate::addr::Addr;
use crate::proto::Time;
use crate::reactor::os::{Event, Token};

/// The connection's progress.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Dial {
    /// Accepted.
    No,
    /// An attempt that succeeds at this time, or fails with this errno.
    Until(Time, Option<i32>),
    Done,
    /// Connected by the application.
    Adopted,
}

/// Both directions of one connection.
pub(super) struct SimSocket {
    pub(super) peer: SocketAddr,
    pub(super) local: SocketAddr,
    /// The server has a descriptor for it.
    pub(super) held: bool,
    pub(super) token: Option<Token>,
    /// An edge that no poll has reported yet.
    pub(super) edge: bool,
    /// Sent by the client, and not in the server's kernel yet.
    pub(super) underway: VecDeque<u8>,
    /// In the server's receive buffer.
    pub(super) received: VecDeque<u8>,
    pub(super) receive_buffer: usize,
    /// The client has sent FIN; it arrives behind earlier data.
    pub(super) client_finished: bool,
    /// FIN is in the receive buffer.
    pub(super) fin: bool,
    /// The connection has failed, and reads give this error once the receive buffer is empty.
    pub(super) error: Option<i32>,
    /// Written by the server, and not read by the client yet.
    pub(super) sent: VecDeque<u8>,
    /// The number of such bytes when the connection failed.
    pub(super) lost: usize,
    pub(super) send_buffer: usize,
    /// A write was refused or cut: an edge is due when there is room.
    pub(super) wants_room: bool,
    pub(super) server_finished: bool,
    pub(super) server_reset: bool,
    pub(super) client_gone: bool,
    /// Bytes that the client has read.
    pub(super) inbox: Vec<u8>,
    /// The client reads incoming bytes.
    pub(super) reads: bool,
    pub(super) dial: Dial,
    /// The target of an outgoing connection, and the peer of an adopted Unix socket.
    pub(super) to: Option<Addr>,
    /// The other end belongs to the server too.
    pub(super) joined: Option<usize>,
}

impl SimSocket {
    /// Connected, with empty buffers.
    pub(super) fn new(peer: SocketAddr, local: SocketAddr) -> Self {
        Self {
            peer,
            local,
            held: false,
            token: None,
            edge: false,
            underway: VecDeque::new(),
            received: VecDeque::new(),
            receive_buffer: 64 * 1024,
            client_finished: false,
            fin: false,
            error: None,
            sent: VecDeque::new(),
            lost: 0,
            send_buffer: 64 * 1024,
            wants_room: false,
            server_finished: false,
            server_reset: false,
            client_gone: false,
            inbox: Vec::new(),
            reads: true,
            dial: Dial::No,
            to: None,
            joined: None,
        }
    }

    pub(super) fn event(&self, token: Token) -> Event {
        let closed = self.fin || self.error.is_some();
        Event {
            token,
            readable: !self.received.is_empty() || closed,
            writable: self.room() > 0 || self.error.is_some(),
            closed,
        }
    }

    /// Whether an edge is due.
    pub(super) fn has_edge(&self) -> bool {
        self.edge
    }

    /// Whether the next poll reports it.
    pub(super) fn announces(&self) -> bool {
        self.edge && self.token.is_some()
    }

    /// Whether a read would return something: bytes, the end, or an error.
    pub(super) fn has_input(&self) -> bool {
        !self.received.is_empty() || self.fin || self.error.is_some()
    }

    pub(super) fn room(&self) -> usize {
        self.send_buffer.saturating_sub(self.sent.len())
    }

    /// Changes the size. If that removes room which an edge has announced, another edge becomes
    /// due.
    pub(super) fn resize(&mut self, send_buffer: usize) {
        self.send_buffer = send_buffer.max(1);
        self.wants_room |= self.room() == 0;
    }

    pub(super) fn arrive(&mut self) {
        let room = self.receive_buffer.saturating_sub(self.received.len());
        let count = room.min(self.underway.len());
        if count > 0 {
            pour(&mut self.underway, count, &mut self.received);
            self.edge = true;
        }
        if self.client_finished && self.underway.is_empty() && !self.fin {
            self.fin = true;
            self.edge = true;
        }
    }

    pub(super) fn reach(&mut self) {
        if self.reads {
            self.take(usize::MAX);
        }
        // Linux raises the edge when a third of the buffer is free again; half is as good.
        if self.wants_room && self.room() >= (self.send_buffer / 2).max(1) {
            self.wants_room = false;
            self.edge = true;
        }
    }

    /// The client reads sent bytes, up to a limit.
    pub(super) fn take(&mut self, bytes: usize) {
        let count = bytes.min(self.sent.len());
        pour(&mut self.sent, count, &mut self.inbox);
    }

    pub(super) fn die(&mut self, errno: i32) {
        self.error = Some(errno);
        self.lost += self.sent.len();
        self.sent.clear();
        self.edge = true;
    }
}

/// Moves the first `count` bytes, by the slice.
fn pour(from: &mut VecDeque<u8>, count: usize, to: &mut impl for<'a> Extend<&'a u8>) {
    let (front, back) = from.as_slices();
    let first = count.min(front.len());
    to.extend(front.get(..first).unwrap_or_default());
    to.extend(back.get(..count - first).unwrap_or_default());
    from.drain(..count.min(from.len()));
}
