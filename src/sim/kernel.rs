//! A kernel in memory: listeners with backlogs, sockets with buffers, descriptors with a limit, and
//! readiness that is told once, at the edges that Linux gives and no others.

use std::collections::{BTreeMap, VecDeque};
use std::io::{self, IoSlice, Read};
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::Arc;
use std::time::Duration;

use super::answer::Answer;
use super::coverage::Notes;
use super::descriptors::Descriptors;
use super::faults::{Call, Fault, Faults};
use super::random::Random;
use super::socket::Dial;
use super::sockets::Sockets;
use crate::addr::Addr;
use crate::config::SocketOptions;
use crate::handler::Interest;
use crate::proto::Time;
use crate::reactor::os::{Token, LARGE_FRAME};

pub(super) struct Kernel {
    pub(super) now: Time,
    /// Nanoseconds that callbacks have worked since the clock was read.
    pub(super) worked: Arc<AtomicU64>,
    /// A poll may sleep until here, then it returns.
    pub(super) horizon: Time,
    pub(super) random: Random,
    pub(super) faults: Faults,
    /// By how much the clock leaps when the next poll returns.
    pub(super) leap_after_poll: Duration,
    /// Descriptors that the process may have open.
    pub(super) fd_limit: usize,
    /// See [`StreamOps::large_frame`](crate::reactor::os::StreamOps::large_frame).
    pub(super) large_frame: usize,
    pub(super) fds: usize,
    /// Descriptors have run out for the whole system until then.
    pub(super) famine_until: Time,
    pub(super) listeners: Vec<SimListener>,
    pub(super) sockets: Sockets,
    /// What becomes of connections to these.
    pub(super) answers: BTreeMap<Addr, Answer>,
    /// Sockets whose attempt to connect is not over, oldest first.
    pub(super) dialing: Vec<usize>,
    /// Both ends of connections of the server with itself.
    pub(super) joined: Vec<usize>,
    pub(super) descriptors: Descriptors,
    /// The waker was written to.
    pub(super) woken: Arc<AtomicBool>,
    /// Rung with it: other threads of a model wake this server.
    #[cfg(all(test, loom))]
    pub(super) bell: Arc<crate::sync::models::Bell>,
    pub(super) trace: Trace,
    /// Events handed out.
    pub(super) delivered: u64,
    /// Whether the last poll had nothing to report.
    pub(super) was_idle: bool,
    /// How often each call was made, by its number.
    calls: [u64; Call::ALL.len()],
    /// Faults and their sockets since the last iteration, if they are recorded.
    pub(super) notes: Option<Notes>,
}

pub(super) struct SimListener {
    pub(super) addr: SocketAddr,
    pub(super) backlog: usize,
    pub(super) queue: VecDeque<usize>,
    pub(super) token: Option<Token>,
    pub(super) open: bool,
    pub(super) edge: bool,
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

    /// Appends a line; the text is made only if the trace keeps texts.
    pub(super) fn line(&mut self, parts: [u64; 4], text: impl FnOnce() -> String) {
        for part in parts {
            // FNV-1a over words: order matters, and that is all that is asked of it.
            self.hash = (self.hash ^ part)
                .wrapping_mul(0x0000_0100_0000_01B3)
                .rotate_left(17);
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
            worked: Arc::default(),
            horizon: Time::ZERO,
            random: Random::new(seed),
            faults: Faults::none(),
            leap_after_poll: Duration::ZERO,
            fd_limit: usize::MAX,
            large_frame: LARGE_FRAME,
            fds: 0,
            famine_until: Time::ZERO,
            listeners: Vec::new(),
            sockets: Sockets::default(),
            answers: BTreeMap::new(),
            dialing: Vec::new(),
            joined: Vec::new(),
            descriptors: Descriptors::default(),
            woken: Arc::default(),
            #[cfg(all(test, loom))]
            bell: Arc::default(),
            trace: Trace::new(),
            delivered: 0,
            was_idle: false,
            calls: [0; Call::ALL.len()],
            notes: None,
        }
    }

    // --- the server's side: called through `SimOs` ---

    /// Reads the clock.
    pub(super) fn clock(&mut self) -> Time {
        let worked = self.worked.load(Ordering::SeqCst);
        if worked > 0 {
            self.worked.fetch_sub(worked, Ordering::SeqCst);
            self.now = self.now.after(Duration::from_nanos(worked));
        }
        self.now
    }

    /// How often a call was made.
    pub(super) fn calls(&self, call: Call) -> u64 {
        self.calls.get(call as usize).copied().unwrap_or(0)
    }

    pub(super) fn strike(&mut self, call: Call, socket: Option<usize>) -> Option<i32> {
        if let Some(count) = self.calls.get_mut(call as usize) {
            *count += 1;
        }
        let errno = self.faults.strike(call, &mut self.random)?;
        note(&mut self.notes, Fault::Error(call, errno), socket);
        self.trace.line([3, call as u64, errno as u64, 0], || {
            format!("  {call}: errno {errno}")
        });
        Some(errno)
    }

    pub(super) fn accept(&mut self, listener: usize) -> io::Result<(usize, SocketAddr)> {
        // Linux takes a descriptor before it looks at the queue.
        if self.fds >= self.fd_limit {
            return Err(io::Error::from_raw_os_error(libc::EMFILE));
        }
        if self.now < self.famine_until {
            return Err(io::Error::from_raw_os_error(libc::ENFILE));
        }
        let strike = self.strike(Call::Accept, None);
        let Some(listening) = self
            .listeners
            .get_mut(listener)
            .filter(|listening| listening.open)
        else {
            return Err(io::Error::from_raw_os_error(libc::EBADF));
        };
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
                // Spurious: another process took it, or it comes later, with an edge of its own.
                listening.edge = !listening.queue.is_empty();
                return Err(io::Error::from_raw_os_error(errno));
            }
            Some(errno) => return Err(io::Error::from_raw_os_error(errno)),
            None => {}
        }
        let Some(index) = listening.queue.pop_front() else {
            return Err(io::ErrorKind::WouldBlock.into());
        };
        let socket = self
            .sockets
            .get_mut(index)
            .ok_or(io::ErrorKind::WouldBlock)?;
        socket.held = true;
        self.fds += 1;
        let peer = socket.peer;
        if let Some(notes) = &mut self.notes {
            notes.begun.push(index);
        }
        self.trace.line([4, index as u64, 0, 0], || {
            format!("  accept: client {index}")
        });
        Ok((index, peer))
    }

    pub(super) fn read(&mut self, index: usize, buffer: &mut [u8]) -> io::Result<usize> {
        let strike = self.strike(Call::Read, Some(index));
        let short = self.random.chance(self.faults.short_reads);
        let cut = if short {
            self.random.between(1, 16)
        } else {
            usize::MAX
        };
        let Some(socket) = self.sockets.get_mut(index).filter(|socket| socket.held) else {
            return Err(io::Error::from_raw_os_error(libc::EBADF));
        };
        match strike {
            Some(errno @ (libc::EINTR | libc::ENOMEM)) => {
                return Err(io::Error::from_raw_os_error(errno))
            }
            Some(errno @ libc::EAGAIN) => {
                socket.input_edge |= socket.has_input();
                return Err(io::Error::from_raw_os_error(errno));
            }
            Some(errno) => socket.die(errno),
            None => {}
        }
        let count = socket.received.len().min(buffer.len()).min(cut);
        if count > 0 {
            let is_cut = count < socket.received.len().min(buffer.len());
            if is_cut {
                note(&mut self.notes, Fault::ShortRead, Some(index));
            }
            if let Some(filled) = buffer.get_mut(..count) {
                let _ = socket.received.read_exact(filled);
            }
            socket.arrive();
            // What a cut has left has arrived behind it: that is a new edge. An end that was there
            // already is none.
            socket.input_edge |= is_cut;
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

    pub(super) fn peek(&mut self, index: usize) -> io::Result<usize> {
        let strike = self.strike(Call::Read, Some(index));
        let Some(socket) = self.sockets.get_mut(index).filter(|socket| socket.held) else {
            return Err(io::Error::from_raw_os_error(libc::EBADF));
        };
        match strike {
            Some(errno @ (libc::EINTR | libc::ENOMEM | libc::EAGAIN)) => {
                Err(io::Error::from_raw_os_error(errno))
            }
            Some(errno) => {
                socket.die(errno);
                Err(io::Error::from_raw_os_error(errno))
            }
            None if !socket.received.is_empty() => Ok(1),
            None => match socket.error {
                Some(errno) => Err(io::Error::from_raw_os_error(errno)),
                None if socket.fin => Ok(0),
                None => Err(io::ErrorKind::WouldBlock.into()),
            },
        }
    }

    pub(super) fn write(&mut self, index: usize, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        let length: usize = pieces.iter().map(|piece| piece.len()).sum();
        let strike = self.strike(Call::Write, Some(index));
        let short = self.random.chance(self.faults.short_writes);
        let cut = if short {
            self.random.between(1, 16)
        } else {
            usize::MAX
        };
        let Some(socket) = self.sockets.get_mut(index).filter(|socket| socket.held) else {
            return Err(io::Error::from_raw_os_error(libc::EBADF));
        };
        match strike {
            Some(errno @ (libc::EINTR | libc::ENOMEM | libc::ENOBUFS)) => {
                return Err(io::Error::from_raw_os_error(errno));
            }
            // Nothing needs no room: only an error is reported.
            Some(libc::EAGAIN) if length == 0 => {}
            Some(errno @ libc::EAGAIN) => {
                socket.wants_room = true;
                socket.room_edge |= socket.is_writable();
                return Err(io::Error::from_raw_os_error(errno));
            }
            Some(errno) => socket.die(errno),
            None => {}
        }
        if socket.error.is_some() || socket.server_finished || socket.client_gone {
            let errno = socket.error.unwrap_or(libc::EPIPE);
            return Err(io::Error::from_raw_os_error(errno));
        }
        if length == 0 {
            return Ok(0);
        }
        let count = socket.room().min(length).min(cut);
        if count < length {
            socket.wants_room = true;
        }
        if count == 0 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        if count < socket.room().min(length) {
            note(&mut self.notes, Fault::ShortWrite, Some(index));
        }
        let mut left = count;
        for piece in pieces {
            let taken = piece.get(..left.min(piece.len())).unwrap_or_default();
            socket.sent.extend(taken);
            left -= taken.len();
        }
        if short && count < length {
            // There is room again at once, and the edge says so.
            socket.room_edge |= socket.is_writable();
        }
        self.trace.line([6, index as u64, count as u64, 0], || {
            format!("  write: client {index}, {count} bytes")
        });
        Ok(count)
    }

    pub(super) fn unsent(&self, index: usize) -> Option<usize> {
        self.sockets.get(index).map(|socket| socket.sent.len())
    }

    pub(super) fn has_taken(&self, index: usize) -> Option<bool> {
        let socket = self.sockets.get(index)?;
        Some(socket.lost == 0 && socket.sent.is_empty())
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
        socket.shut_down();
        self.trace.line([7, index as u64, 0, 0], || {
            format!("  shutdown: client {index}")
        });
        Ok(())
    }

    pub(super) fn close(&mut self, index: usize, reset: bool) {
        let Some(socket) = self.sockets.get_mut(index).filter(|socket| socket.held) else {
            return;
        };
        socket.held = false;
        socket.token = None;
        if let Dial::Until(..) = socket.dial {
            socket.client_gone = true;
        }
        // tcp(7): closing with unread input resets the connection and destroys what the peer has
        // not read.
        if reset || !socket.received.is_empty() {
            socket.server_reset = true;
            socket.sent.clear();
        } else if socket.error.is_none() {
            socket.server_finished = true;
        }
        self.fds = self.fds.saturating_sub(1);
        self.trace.line([8, index as u64, u64::from(reset), 0], || {
            format!(
                "  close: client {index}{}",
                if reset { " with RST" } else { "" }
            )
        });
    }

    /// Takes over a connected socket of the application, and returns its number.
    pub(super) fn adopt(&mut self, socket: OwnedFd, options: &SocketOptions) -> io::Result<usize> {
        let index = self.descriptors.adopt(&mut self.sockets, socket, options)?;
        self.fds += 1;
        if let Some(notes) = &mut self.notes {
            notes.begun.push(index);
        }
        self.trace.line([10, index as u64, 0, 0], || {
            format!("  adopt: client {index}")
        });
        Ok(index)
    }

    /// Takes a connection out of the loop. Returns the socket of its stream.
    pub(super) fn release(&mut self, index: usize) -> io::Result<OwnedFd> {
        let stream = self.descriptors.release(&mut self.sockets, index)?;
        self.fds = self.fds.saturating_sub(1);
        self.trace.line([11, index as u64, 0, 0], || {
            format!("  detach: client {index}")
        });
        Ok(stream)
    }

    pub(super) fn register(
        &mut self,
        index: usize,
        interest: Interest,
        token: Token,
    ) -> io::Result<()> {
        if let Some(errno) = self.strike(Call::Register, Some(index)) {
            return Err(io::Error::from_raw_os_error(errno));
        }
        let Some(socket) = self.sockets.get_mut(index) else {
            return Err(io::Error::from_raw_os_error(libc::EBADF));
        };
        if socket.token.is_some() {
            return Err(io::Error::from_raw_os_error(libc::EEXIST));
        }
        (socket.input_edge, socket.room_edge) = (false, false);
        socket.register(token, interest != Interest::Readable);
        Ok(())
    }

    pub(super) fn reregister(&mut self, index: usize, token: Token) -> io::Result<()> {
        if let Some(errno) = self.strike(Call::Reregister, Some(index)) {
            return Err(io::Error::from_raw_os_error(errno));
        }
        match self.sockets.get_mut(index) {
            Some(socket) if socket.token == Some(token) => socket.register(token, true),
            _ => return Err(io::Error::from_raw_os_error(libc::ENOENT)),
        }
        self.trace.line([12, index as u64, 0, 0], || {
            format!("  reregister: client {index}")
        });
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
        // kqueue forgives both: EV_ADD replaces, and mio ignores ENOENT.
        let forgives = self.sockets.kqueue;
        match self.listeners.get_mut(index) {
            Some(listener) if listener.token.is_some() && !forgives => {
                Err(io::Error::from_raw_os_error(libc::EEXIST))
            }
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
        let forgives = self.sockets.kqueue;
        match self.listeners.get_mut(index) {
            Some(listener) if listener.token.is_none() && !forgives => {
                Err(io::Error::from_raw_os_error(libc::ENOENT))
            }
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
}

/// Not a method: its callers hold a part of the kernel.
pub(super) fn note(notes: &mut Option<Notes>, fault: Fault, socket: Option<usize>) {
    if let Some(notes) = notes {
        notes.struck.push((fault, socket));
    }
}
