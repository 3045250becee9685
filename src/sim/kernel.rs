//! A kernel in memory: listeners with backlogs, sockets with buffers, descriptors with a limit, and readiness that is
//! told once, at the edges that Linux gives and no others.

use std::collections::VecDeque;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use super::faults::{Call, Faults};
use super::random::Random;
use crate::proto::Time;
use crate::reactor::os::{Event, Token};

/// The client's end of a simulated connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ClientId(pub(super) usize);

/// How a connection stands, as its client sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ClientState {
    /// Connected, perhaps still in the backlog.
    Connected,
    /// The server has finished sending, and everything it sent has been received.
    Finished,
    /// The connection was reset.
    Reset,
}

pub(super) struct Kernel {
    pub(super) now: Time,
    /// A poll may sleep until here, then it returns.
    pub(super) horizon: Time,
    pub(super) random: Random,
    pub(super) faults: Faults,
    /// Descriptors that the process may have open.
    pub(super) fd_limit: usize,
    pub(super) fds: usize,
    /// Descriptors have run out for the whole system until then.
    famine_until: Time,
    pub(super) listeners: Vec<SimListener>,
    pub(super) sockets: Vec<SimSocket>,
    pub(super) trace: Trace,
    /// Events handed out.
    pub(super) delivered: u64,
    /// Whether the last poll had nothing to report.
    pub(super) was_idle: bool,
    /// Which errors were given, for the coverage table.
    pub(super) struck: Vec<(Call, i32, Option<ClientId>)>,
}

pub(super) struct SimListener {
    pub(super) addr: SocketAddr,
    pub(super) backlog: usize,
    pub(super) queue: VecDeque<usize>,
    pub(super) token: Option<Token>,
    pub(super) open: bool,
    edge: bool,
}

/// Both directions of one connection.
pub(super) struct SimSocket {
    pub(super) peer: SocketAddr,
    pub(super) local: SocketAddr,
    /// The server holds a descriptor for it.
    pub(super) held: bool,
    token: Option<Token>,
    /// An edge that no poll has reported yet.
    edge: bool,
    /// Sent by the client, not in the server's kernel yet.
    underway: VecDeque<u8>,
    /// In the server's receive buffer.
    pub(super) received: VecDeque<u8>,
    receive_buffer: usize,
    /// The client has sent FIN; it arrives behind what is under way.
    client_finished: bool,
    /// FIN is in the receive buffer.
    fin: bool,
    /// The connection is dead, and reads give this error once the receive buffer is empty.
    error: Option<i32>,
    /// Taken from the server, not read by the client yet.
    sent: VecDeque<u8>,
    pub(super) send_buffer: usize,
    /// A write was refused or cut: an edge is due when there is room.
    wants_room: bool,
    server_finished: bool,
    server_reset: bool,
    client_gone: bool,
    /// What the client has read.
    pub(super) inbox: Vec<u8>,
    /// The client reads what comes.
    pub(super) reads: bool,
}

/// What happened, as a hash always and as text if asked for.
#[derive(Debug)]
pub(super) struct Trace {
    hash: u64,
    pub(super) text: Option<Vec<String>>,
}

impl Trace {
    fn new() -> Self {
        Self {
            hash: 0xCBF2_9CE4_8422_2325,
            text: None,
        }
    }

    pub(super) fn hash(&self) -> u64 {
        self.hash
    }

    /// One line; the text is made only if somebody reads it.
    pub(super) fn line(&mut self, parts: [u64; 4], text: impl FnOnce() -> String) {
        for part in parts {
            // FNV-1a over words: order matters, and that is all that is asked of it.
            self.hash = (self.hash ^ part).wrapping_mul(0x0000_0100_0000_01B3).rotate_left(17);
        }
        if let Some(lines) = &mut self.text {
            lines.push(text());
        }
    }
}

impl Kernel {
    pub(super) fn new(seed: u64) -> Self {
        Self {
            now: Time::ZERO,
            horizon: Time::ZERO,
            random: Random::new(seed),
            faults: Faults::none(),
            fd_limit: usize::MAX,
            fds: 0,
            famine_until: Time::ZERO,
            listeners: Vec::new(),
            sockets: Vec::new(),
            trace: Trace::new(),
            delivered: 0,
            was_idle: false,
            struck: Vec::new(),
        }
    }

    // --- the server's side: called through `SimOs` ---

    pub(super) fn poll(&mut self, events: &mut Vec<Event>, timeout: Option<Duration>) -> io::Result<bool> {
        self.was_idle = false;
        if self.random.chance(self.faults.clock_leaps) {
            let leap = Duration::from_millis(self.random.below(60_000) as u64);
            self.now = self.now.after(leap);
            self.trace.line([1, leap.as_millis() as u64, 0, 0], || {
                format!("the clock leaps by {leap:?}")
            });
        }
        if self.random.chance(self.faults.famines) {
            self.famine_until = self.now.after(Duration::from_millis(self.random.below(3_000) as u64));
        }
        if let Some(errno) = self.strike(Call::Poll, None) {
            return Err(io::Error::from_raw_os_error(errno));
        }
        self.move_bytes();
        self.collect(events);
        if events.is_empty() {
            self.sleep(timeout);
            self.move_bytes();
            self.collect(events);
        }
        self.spoil(events);
        self.was_idle = events.is_empty();
        self.delivered += events.len() as u64;
        let full = self.random.chance(self.faults.full_batches);
        let (count, now) = (events.len(), self.now);
        self.trace.line([2, count as u64, u64::from(full), 0], || {
            format!("{now:?} poll: {count} events")
        });
        Ok(full)
    }

    fn sleep(&mut self, timeout: Option<Duration>) {
        let until = timeout.map_or(Time::NEVER, |timeout| self.now.after(timeout));
        self.now = self.now.max(until.min(self.horizon));
    }

    /// The network: what is under way arrives as far as there is room; what was sent reaches clients that read.
    fn move_bytes(&mut self) {
        for socket in &mut self.sockets {
            socket.arrive();
            socket.reach();
        }
    }

    fn collect(&mut self, events: &mut Vec<Event>) {
        for listener in &mut self.listeners {
            let Some(token) = listener.token else { continue };
            if listener.edge && !(self.random.chance(self.faults.late_events)) {
                listener.edge = false;
                events.push(Event {
                    token,
                    readable: true,
                    writable: false,
                    closed: false,
                });
            }
        }
        for socket in &mut self.sockets {
            let Some(token) = socket.token else { continue };
            if socket.edge && !(self.random.chance(self.faults.late_events)) {
                socket.edge = false;
                events.push(socket.event(token));
            }
        }
    }

    /// Events nobody should rely on.
    fn spoil(&mut self, events: &mut Vec<Event>) {
        if self.random.chance(self.faults.spurious_events) {
            let socket = self.random.below(self.sockets.len());
            let token = match self.sockets.get(socket).and_then(|socket| socket.token) {
                Some(token) => token,
                None => Token(self.random.below(1 << 26)),
            };
            let bits = self.random.bits();
            events.push(Event {
                token,
                readable: bits & 1 != 0,
                writable: bits & 2 != 0,
                closed: bits & 4 != 0,
            });
        }
        if self.random.chance(self.faults.duplicated) {
            let again = events.clone();
            events.extend(again);
        }
        if self.random.chance(self.faults.reordered) {
            for at in (1..events.len()).rev() {
                let other = self.random.below(at + 1);
                events.swap(at, other);
            }
        }
    }

    fn strike(&mut self, call: Call, socket: Option<usize>) -> Option<i32> {
        let errno = self.faults.strike(call, &mut self.random)?;
        self.struck.push((call, errno, socket.map(ClientId)));
        self.trace
            .line([3, call as u64, errno as u64, 0], || format!("  {call}: errno {errno}"));
        Some(errno)
    }

    pub(super) fn accept(&mut self, listener: usize) -> io::Result<(usize, SocketAddr)> {
        let strike = self.strike(Call::Accept, None);
        let Some(listening) = self.listeners.get_mut(listener).filter(|listening| listening.open) else {
            return Err(io::Error::from_raw_os_error(libc::EBADF));
        };
        // Linux takes a descriptor before it looks at the queue.
        if self.fds >= self.fd_limit {
            return Err(io::Error::from_raw_os_error(libc::EMFILE));
        }
        if self.now < self.famine_until {
            return Err(io::Error::from_raw_os_error(libc::ENFILE));
        }
        match strike {
            Some(errno @ libc::ECONNABORTED) => {
                if let Some(lost) = listening.queue.pop_front() {
                    if let Some(socket) = self.sockets.get_mut(lost) {
                        socket.server_reset = true;
                    }
                }
                return Err(io::Error::from_raw_os_error(errno));
            }
            Some(errno @ libc::EAGAIN) => {
                // Spurious: somebody else took it, or it comes a moment later, with an edge of its own.
                listening.edge = !listening.queue.is_empty();
                return Err(io::Error::from_raw_os_error(errno));
            }
            Some(errno) => return Err(io::Error::from_raw_os_error(errno)),
            None => {}
        }
        let Some(index) = listening.queue.pop_front() else {
            return Err(io::ErrorKind::WouldBlock.into());
        };
        let socket = self.sockets.get_mut(index).ok_or(io::ErrorKind::WouldBlock)?;
        socket.held = true;
        self.fds += 1;
        let peer = socket.peer;
        self.trace
            .line([4, index as u64, 0, 0], || format!("  accept: client {index}"));
        Ok((index, peer))
    }

    pub(super) fn read(&mut self, index: usize, buffer: &mut [u8]) -> io::Result<usize> {
        let strike = self.strike(Call::Read, Some(index));
        let short = self.random.chance(self.faults.short_reads);
        let cut = if short { self.random.between(1, 16) } else { usize::MAX };
        let Some(socket) = self.sockets.get_mut(index).filter(|socket| socket.held) else {
            return Err(io::Error::from_raw_os_error(libc::EBADF));
        };
        match strike {
            Some(errno @ (libc::EINTR | libc::ENOMEM)) => return Err(io::Error::from_raw_os_error(errno)),
            Some(errno @ libc::EAGAIN) => {
                socket.edge = socket.has_input();
                return Err(io::Error::from_raw_os_error(errno));
            }
            Some(errno) => socket.die(errno),
            None => {}
        }
        let count = socket.received.len().min(buffer.len()).min(cut);
        if count > 0 {
            for (to, from) in buffer.iter_mut().zip(socket.received.drain(..count)) {
                *to = from;
            }
            socket.arrive();
            // What is left after a short read has arrived behind it: that is a new edge.
            socket.edge |= socket.has_input() && count < buffer.len();
            self.trace.line([5, index as u64, count as u64, 0], || {
                format!("  read: client {index}, {count} bytes")
            });
            return Ok(count);
        }
        if let Some(errno) = socket.error {
            return Err(io::Error::from_raw_os_error(errno));
        }
        if socket.fin {
            self.trace.line([5, index as u64, 0, 1], || {
                format!("  read: client {index}, end of stream")
            });
            return Ok(0);
        }
        Err(io::ErrorKind::WouldBlock.into())
    }

    pub(super) fn write(&mut self, index: usize, bytes: &[u8]) -> io::Result<usize> {
        let strike = self.strike(Call::Write, Some(index));
        let short = self.random.chance(self.faults.short_writes);
        let cut = if short { self.random.between(1, 16) } else { usize::MAX };
        let Some(socket) = self.sockets.get_mut(index).filter(|socket| socket.held) else {
            return Err(io::Error::from_raw_os_error(libc::EBADF));
        };
        match strike {
            Some(errno @ (libc::EINTR | libc::ENOMEM | libc::ENOBUFS)) => {
                return Err(io::Error::from_raw_os_error(errno));
            }
            Some(errno @ libc::EAGAIN) => {
                socket.wants_room = true;
                socket.edge |= socket.room() > 0;
                return Err(io::Error::from_raw_os_error(errno));
            }
            Some(errno) => socket.die(errno),
            None => {}
        }
        if socket.error.is_some() || socket.server_finished || socket.client_gone {
            let errno = socket.error.unwrap_or(libc::EPIPE);
            return Err(io::Error::from_raw_os_error(errno));
        }
        let count = socket.room().min(bytes.len()).min(cut);
        if count < bytes.len() {
            socket.wants_room = true;
        }
        if count == 0 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        socket.sent.extend(bytes.iter().take(count));
        if short && count < bytes.len() {
            // There is room again at once, and the edge says so.
            socket.edge |= socket.room() > 0;
        }
        self.trace.line([6, index as u64, count as u64, 0], || {
            format!("  write: client {index}, {count} bytes")
        });
        Ok(count)
    }

    pub(super) fn shutdown(&mut self, index: usize) -> io::Result<()> {
        if let Some(errno) = self.strike(Call::Shutdown, Some(index)) {
            if let Some(socket) = self.sockets.get_mut(index) {
                socket.die(libc::ECONNRESET);
            }
            return Err(io::Error::from_raw_os_error(errno));
        }
        let Some(socket) = self.sockets.get_mut(index).filter(|socket| socket.held) else {
            return Err(io::Error::from_raw_os_error(libc::EBADF));
        };
        if socket.error.is_some() {
            return Err(io::Error::from_raw_os_error(libc::ENOTCONN));
        }
        socket.server_finished = true;
        self.trace
            .line([7, index as u64, 0, 0], || format!("  shutdown: client {index}"));
        Ok(())
    }

    pub(super) fn close(&mut self, index: usize, reset: bool) {
        let Some(socket) = self.sockets.get_mut(index).filter(|socket| socket.held) else {
            return;
        };
        socket.held = false;
        socket.token = None;
        // tcp(7): closing with unread input resets the connection and destroys what the peer has not read.
        if reset || !socket.received.is_empty() {
            socket.server_reset = true;
            socket.sent.clear();
        } else if socket.error.is_none() {
            socket.server_finished = true;
        }
        self.fds = self.fds.saturating_sub(1);
        self.trace.line([8, index as u64, u64::from(reset), 0], || {
            format!("  close: client {index}{}", if reset { " with RST" } else { "" })
        });
    }

    pub(super) fn register(&mut self, index: usize, token: Token) -> io::Result<()> {
        if let Some(errno) = self.strike(Call::Register, Some(index)) {
            return Err(io::Error::from_raw_os_error(errno));
        }
        if let Some(socket) = self.sockets.get_mut(index) {
            socket.token = Some(token);
            // epoll reports what is ready at registration: at least that it is writable.
            socket.edge = true;
        }
        Ok(())
    }

    pub(super) fn listen(&mut self, addr: SocketAddr, backlog: usize) -> io::Result<usize> {
        if self.fds >= self.fd_limit {
            return Err(io::Error::from_raw_os_error(libc::EMFILE));
        }
        let place = self.listeners.iter().position(|listener| !listener.open);
        let place = place.unwrap_or(self.listeners.len());
        let port = match addr.port() {
            0 => u16::try_from(40_000 + place).map_err(|_| io::ErrorKind::AddrInUse)?,
            port => port,
        };
        let addr = SocketAddr::new(addr.ip(), port);
        if self
            .listeners
            .iter()
            .any(|listener| listener.open && listener.addr == addr)
        {
            return Err(io::Error::from_raw_os_error(libc::EADDRINUSE));
        }
        self.fds += 1;
        let listener = SimListener {
            addr,
            backlog,
            queue: VecDeque::new(),
            token: None,
            open: true,
            edge: false,
        };
        match self.listeners.get_mut(place) {
            Some(closed) => *closed = listener,
            None => self.listeners.push(listener),
        }
        Ok(place)
    }

    pub(super) fn register_listener(&mut self, index: usize, token: Token) -> io::Result<()> {
        if let Some(errno) = self.strike(Call::RegisterListener, None) {
            return Err(io::Error::from_raw_os_error(errno));
        }
        match self.listeners.get_mut(index) {
            Some(listener) if listener.token.is_some() => Err(io::Error::from_raw_os_error(libc::EEXIST)),
            Some(listener) => {
                listener.token = Some(token);
                listener.edge = !listener.queue.is_empty();
                Ok(())
            }
            None => Err(io::Error::from_raw_os_error(libc::EBADF)),
        }
    }

    pub(super) fn deregister_listener(&mut self, index: usize) -> io::Result<()> {
        if let Some(errno) = self.strike(Call::DeregisterListener, None) {
            return Err(io::Error::from_raw_os_error(errno));
        }
        match self.listeners.get_mut(index) {
            Some(listener) if listener.token.is_none() => Err(io::Error::from_raw_os_error(libc::ENOENT)),
            Some(listener) => {
                listener.token = None;
                listener.edge = false;
                Ok(())
            }
            None => Err(io::Error::from_raw_os_error(libc::EBADF)),
        }
    }

    pub(super) fn close_listener(&mut self, index: usize) {
        let Some(listener) = self.listeners.get_mut(index) else {
            return;
        };
        listener.open = false;
        listener.token = None;
        self.fds = self.fds.saturating_sub(1);
        for waiting in std::mem::take(&mut listener.queue) {
            if let Some(socket) = self.sockets.get_mut(waiting) {
                socket.server_reset = true;
            }
        }
    }

    // --- the clients' side ---

    /// Connects to a listener; `None` if nobody listens there or its backlog is full.
    pub(super) fn connect(&mut self, addr: SocketAddr) -> Option<ClientId> {
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
        let host = u32::from(Ipv4Addr::new(10, 0, 0, 0)) + (index as u32 / 50_000);
        let peer = SocketAddr::new(IpAddr::from(Ipv4Addr::from(host)), 10_000 + (index % 50_000) as u16);
        self.sockets.push(SimSocket {
            peer,
            local: listener.addr,
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
            send_buffer: 64 * 1024,
            wants_room: false,
            server_finished: false,
            server_reset: false,
            client_gone: false,
            inbox: Vec::new(),
            reads: true,
        });
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
            Some(socket) if socket.server_finished && socket.sent.is_empty() => ClientState::Finished,
            Some(_) => ClientState::Connected,
        }
    }

    /// Clients wait, and no edge is under way that will say so.
    pub(super) fn has_missed_clients(&self, index: usize) -> bool {
        self.listeners
            .get(index)
            .is_some_and(|listener| listener.token.is_some() && !listener.edge && !listener.queue.is_empty())
    }

    fn live(&mut self, client: ClientId) -> Option<&mut SimSocket> {
        self.sockets
            .get_mut(client.0)
            .filter(|socket| !socket.server_reset && socket.error.is_none())
    }
}

impl SimSocket {
    fn event(&self, token: Token) -> Event {
        let closed = self.fin || self.error.is_some();
        Event {
            token,
            readable: !self.received.is_empty() || closed,
            writable: self.room() > 0 || self.error.is_some(),
            closed,
        }
    }

    /// An edge is under way.
    pub(super) fn has_edge(&self) -> bool {
        self.edge
    }

    /// A read would bring something: bytes, the end, or an error.
    pub(super) fn has_input(&self) -> bool {
        !self.received.is_empty() || self.fin || self.error.is_some()
    }

    pub(super) fn room(&self) -> usize {
        self.send_buffer.saturating_sub(self.sent.len())
    }

    /// An edge that announced room which is gone by this is due again.
    pub(super) fn resize(&mut self, send_buffer: usize) {
        self.send_buffer = send_buffer.max(1);
        self.wants_room |= self.room() == 0;
    }

    fn arrive(&mut self) {
        let room = self.receive_buffer.saturating_sub(self.received.len());
        let count = room.min(self.underway.len());
        if count > 0 {
            self.received.extend(self.underway.drain(..count));
            self.edge = true;
        }
        if self.client_finished && self.underway.is_empty() && !self.fin {
            self.fin = true;
            self.edge = true;
        }
    }

    fn reach(&mut self) {
        if self.reads {
            self.take(usize::MAX);
        }
        // Linux raises the edge when a third of the buffer is free again; half is as good.
        if self.wants_room && self.room() >= (self.send_buffer / 2).max(1) {
            self.wants_room = false;
            self.edge = true;
        }
    }

    /// The client reads what has been sent, at most so much.
    pub(super) fn take(&mut self, bytes: usize) {
        let count = bytes.min(self.sent.len());
        self.inbox.extend(self.sent.drain(..count));
    }

    fn die(&mut self, errno: i32) {
        self.error = Some(errno);
        self.sent.clear();
        self.edge = true;
    }
}
