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

/// One of kqueue's two filters of a socket. Each has events of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Filter {
    Read,
    Write,
}

/// Both directions of one connection.
pub(super) struct SimSocket {
    pub(super) peer: SocketAddr,
    pub(super) local: SocketAddr,
    /// The server has a descriptor for it.
    pub(super) held: bool,
    pub(super) token: Option<Token>,
    /// Room for output is reported.
    pub(super) write_interest: bool,
    /// Input, its end or an error, which no poll has reported yet.
    pub(super) input_edge: bool,
    /// Likewise for room for output.
    pub(super) room_edge: bool,
    /// Readiness is reported by kqueue.
    pub(super) kqueue: bool,
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
            write_interest: false,
            input_edge: false,
            room_edge: false,
            kqueue: false,
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

    /// Registers or reregisters it. epoll reports what is ready then, but nothing of an attempt to
    /// connect.
    pub(super) fn register(&mut self, token: Token, write_interest: bool) {
        self.token = Some(token);
        self.write_interest = write_interest;
        if !matches!(self.dial, Dial::Until(..)) {
            self.input_edge |= self.has_input();
            self.room_edge |= self.is_writable();
            self.wants_room |= write_interest && self.room() == 0;
        }
    }

    /// A poll reports room for output.
    pub(super) fn is_writable(&self) -> bool {
        self.write_interest && self.room() > 0
    }

    /// The event by which epoll reports all edges, which are past with that.
    pub(super) fn event(&mut self, token: Token) -> Event {
        (self.input_edge, self.room_edge) = (false, false);
        let closed = self.fin || self.error.is_some();
        Event {
            token,
            readable: !self.received.is_empty() || closed,
            writable: self.is_writable() || self.error.is_some(),
            closed,
        }
    }

    /// The event by which kqueue reports one filter's edge, as mio reads it; `None` without an
    /// edge, or if the filter's condition holds no longer (`kqueue(2)`).
    ///
    /// EV_EOF comes with the data in front of it, and with the error if there is one. Nothing else
    /// tells of a peer that has gone.
    pub(super) fn filter_event(&mut self, filter: Filter, token: Token) -> Option<Event> {
        let failed = self.error.is_some();
        let is_due = match filter {
            Filter::Read => std::mem::take(&mut self.input_edge) && self.has_input(),
            Filter::Write => std::mem::take(&mut self.room_edge) && self.wakes_writer(),
        };
        is_due.then_some(Event {
            token,
            readable: filter == Filter::Read || failed,
            writable: filter == Filter::Write || failed,
            closed: failed || (filter == Filter::Read && self.fin),
        })
    }

    /// The server sends FIN.
    pub(super) fn shut_down(&mut self) {
        self.server_finished = true;
        self.room_edge |= self.kqueue && self.wakes_writer();
    }

    /// The condition of kqueue's write filter. Our own shutdown is an EV_EOF of it.
    fn wakes_writer(&self) -> bool {
        let is_connected = !matches!(self.dial, Dial::Until(..));
        let has_room = is_connected && self.room() >= self.low_watermark();
        self.write_interest && (has_room || self.server_finished || self.error.is_some())
    }

    /// SO_SNDLOWAT of the BSDs.
    fn low_watermark(&self) -> usize {
        (self.send_buffer / 2).clamp(1, 2048)
    }

    /// Whether an edge is due.
    pub(super) fn has_edge(&self) -> bool {
        self.input_edge || self.room_edge
    }

    /// Whether the next poll reports it.
    pub(super) fn announces(&self) -> bool {
        self.has_edge() && self.token.is_some()
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
            self.input_edge = true;
        }
        if self.client_finished && self.underway.is_empty() && !self.fin {
            self.fin = true;
            self.input_edge = true;
        }
    }

    pub(super) fn reach(&mut self) {
        if self.reads {
            self.take(usize::MAX);
        }
        // Linux raises the edge when a third of the buffer is free again; half is as good.
        if self.wants_room && self.room() >= (self.send_buffer / 2).max(1) {
            self.wants_room = false;
            self.room_edge |= self.write_interest;
        }
    }

    /// The client reads sent bytes, up to a limit.
    pub(super) fn take(&mut self, bytes: usize) {
        let count = bytes.min(self.sent.len());
        pour(&mut self.sent, count, &mut self.inbox);
        // Each acknowledgement wakes kqueue's filter, also if no write was refused.
        self.room_edge |= self.kqueue && count > 0 && self.wakes_writer();
    }

    pub(super) fn die(&mut self, errno: i32) {
        self.error = Some(errno);
        self.lost += self.sent.len();
        self.sent.clear();
        (self.input_edge, self.room_edge) = (true, true);
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
