//! The reactor's interface to the operating system. The real one is `os_mio`.

use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::os::fd::{BorrowedFd, OwnedFd, RawFd};
use std::time::Duration;

use crate::addr::{Addr, Credentials};
use crate::config::SocketOptions;
use crate::detached::{self, SystemCalls};
use crate::handle::Wake;
use crate::handler::Interest;
#[cfg(all(feature = "sim", feature = "record"))]
use crate::id::ServerNumber;
use crate::id::{ConnId, ListenerId};
use crate::proto::{Machine, Time};
use crate::reason::CloseReason;

/// Names the owner of an event, small enough for `epoll_data` on 32 bits too: 24 bits of slot, the
/// rest generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Token(pub(crate) usize);

const INDEX_BITS: u32 = 24;
const INDEX_MASK: usize = (1 << INDEX_BITS) - 1;
/// Slots from here on are listeners, and those before them watched descriptors; `MAX_CONNECTIONS`
/// stays below.
const FIRST_LISTENER: usize = INDEX_MASK + 1 - LISTENERS;
const LISTENERS: usize = 1 << 16;
const FIRST_WATCH: usize = FIRST_LISTENER - Token::WATCHES;

/// The owner that a token names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Named {
    /// The connection in this slot, if its own token is the same.
    Slot(u32),
    /// The watched descriptor in this slot, if its own token is the same.
    Watch(usize),
    /// The listener with this token.
    Listener,
    /// The waker.
    Waker,
}

impl Token {
    pub(crate) const WAKER: Self = Self(usize::MAX);
    /// Listeners whose tokens differ. The last one is the waker's.
    pub(super) const LISTENERS: u32 = LISTENERS as u32 - 1;

    #[inline]
    pub(crate) fn of_conn(id: ConnId) -> Self {
        Self((id.generation() as usize) << INDEX_BITS | id.index() as usize)
    }

    /// The connection with this token, in its server.
    #[cfg(all(feature = "sim", feature = "record"))]
    pub(super) fn conn_of(self, server: ServerNumber) -> ConnId {
        let generation = (self.0 >> INDEX_BITS) as u32 & ConnId::MAX_GENERATION;
        ConnId::new(server, (self.0 & INDEX_MASK) as u32, generation)
    }

    /// Descriptors of the application that can be watched.
    pub(super) const WATCHES: usize = 1 << 12;

    /// The token of the descriptor in this slot, which was the server's `number`th; `None` for a
    /// slot too many.
    pub(super) fn of_watch(slot: usize, number: u64) -> Option<Self> {
        let index = FIRST_WATCH + slot;
        (slot < Self::WATCHES).then_some(Self((number as usize) << INDEX_BITS | index))
    }

    pub(crate) fn of_listener(id: ListenerId) -> Self {
        Self(FIRST_LISTENER + (id.number() % Self::LISTENERS) as usize)
    }

    #[inline]
    pub(crate) fn named(self) -> Named {
        match self.0 & INDEX_MASK {
            index if index < FIRST_WATCH => Named::Slot(index as u32),
            index if index < FIRST_LISTENER => Named::Watch(index - FIRST_WATCH),
            _ if self == Self::WAKER => Named::Waker,
            _ => Named::Listener,
        }
    }
}

/// A hint that a socket may be ready. May be spurious, stale, or for a slot's former connection.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Event {
    pub(crate) token: Token,
    pub(crate) readable: bool,
    pub(crate) writable: bool,
    /// The peer's end, an error, or data behind an urgent byte follows: a short read is not the
    /// last.
    pub(crate) closed: bool,
}

/// The state of an attempt to connect that has not failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Connected {
    /// The attempt goes on.
    NotYet,
    /// It succeeded. Reads give what the peer has sent since, then its end or its reset.
    Yes,
    /// It succeeded, and the peer has sent nothing but RST. Only this answer reports the reset.
    Reset,
}

/// How a socket is closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// The descriptor alone: no other process can have a copy, or the peer waits for nothing.
    Close,
    /// As a close of the only descriptor: with FIN, or RST if input is unread.
    Fin,
    /// With RST, if the transport has one.
    Reset,
}

impl End {
    /// The end of a connection that is over.
    #[inline]
    pub(super) fn of(machine: &Machine, reset: bool) -> Self {
        match reset {
            true => Self::Reset,
            false if machine.needs_no_end() => Self::Close,
            false => Self::Fin,
        }
    }
}

/// A connected socket, with the queries of handlers.
pub(crate) trait Socket {
    fn local_addr(&self) -> io::Result<Addr>;

    /// Credentials of the peer's process, where the system reports them: on a Unix socket.
    fn credentials(&self) -> io::Result<Credentials>;

    fn fd(&self) -> io::Result<BorrowedFd<'_>>;
}

/// See [`StreamOps::large_frame`].
pub(crate) const LARGE_FRAME: usize = 32 * 1024;

/// The clock and the system calls of one connection's turn. None of them blocks.
pub(crate) trait StreamOps {
    type Stream;

    /// The size from which a frame is written by itself, because a copy would cost more. Smaller
    /// only in simulations.
    #[inline]
    fn large_frame(&self) -> usize {
        LARGE_FRAME
    }

    /// Monotonic time since the creation of `self`.
    fn now(&self) -> Time;

    fn read(&mut self, stream: &mut Self::Stream, buffer: &mut [u8]) -> io::Result<usize>;

    /// Never raises SIGPIPE.
    fn write(&mut self, stream: &mut Self::Stream, bytes: &[u8]) -> io::Result<usize>;

    /// Writes the pieces in order, in one call.
    fn write_pieces(
        &mut self,
        stream: &mut Self::Stream,
        pieces: &[IoSlice<'_>],
    ) -> io::Result<usize> {
        let pieces: Vec<&[u8]> = pieces.iter().map(|piece| &**piece).collect();
        self.write(stream, &pieces.concat())
    }

    /// Returns a measure of the bytes that the kernel has taken and the peer's system has not: zero
    /// if there are none, less than before if the peer has taken some. `None` where the system
    /// cannot tell.
    fn unsent(&mut self, stream: &mut Self::Stream) -> Option<usize>;

    /// Whether the peer's system has acknowledged all of the `written` bytes, also after a reset.
    /// `None` where the system does not count that.
    fn has_taken(&mut self, _stream: &mut Self::Stream, _written: u64) -> Option<bool> {
        None
    }

    /// Registers a stream for writing too, from now on. The next poll reports what is ready then,
    /// input included.
    fn reregister_stream(&mut self, stream: &mut Self::Stream, token: Token) -> io::Result<()>;

    /// Shuts down the write side.
    fn shutdown(&mut self, stream: &mut Self::Stream) -> io::Result<()>;
}

/// A command of a handle, as far as it can be written down.
#[cfg_attr(not(feature = "record"), allow(dead_code))] // recordings alone look at it
#[derive(Clone, Copy, Debug)]
pub(crate) enum Noted<'a> {
    Drain(Duration),
    Kill(ConnId),
    Send(ConnId, &'a [u8]),
    /// A job or a message.
    Opaque,
}

/// The other system calls of a server. Only [`Os::poll`] blocks.
pub(crate) trait Os: StreamOps<Stream: Socket> {
    type Listener;

    /// Number of descriptors that this process may have open, where the system reports it.
    fn descriptor_limit(&self) -> Option<usize>;

    /// Waits for events, at most `timeout`, and appends them. True if more may be pending.
    fn poll(&mut self, events: &mut Vec<Event>, timeout: Option<Duration>) -> io::Result<bool>;

    fn waker(&self) -> Box<dyn Wake>;

    /// Opens a listening socket. With port 0, servers that share sockets share one of a `name`.
    fn listen(
        &mut self,
        addr: &Addr,
        name: Option<&str>,
        options: &SocketOptions,
    ) -> io::Result<Self::Listener>;

    /// Adopts an existing listening socket, if it is one.
    fn adopt_listener(&mut self, socket: OwnedFd) -> io::Result<Self::Listener>;

    /// Another descriptor of the socket, for another process, which then owns the socket's file.
    fn share_listener(&mut self, listener: &mut Self::Listener) -> io::Result<OwnedFd>;

    fn listener_addr(&self, listener: &Self::Listener) -> io::Result<Addr>;

    fn register_listener(&mut self, listener: &mut Self::Listener, token: Token) -> io::Result<()>;

    fn deregister_listener(&mut self, listener: &mut Self::Listener) -> io::Result<()>;

    fn close_listener(&mut self, listener: Self::Listener);

    fn accept(&mut self, listener: &mut Self::Listener) -> io::Result<(Self::Stream, Addr)>;

    /// Whether a client waits in the backlog. True if the system cannot say.
    fn has_client(&mut self, listener: &mut Self::Listener) -> bool;

    /// Starts to connect; true if it is connected already. Otherwise an event says when to call
    /// [`Os::connected`].
    fn connect(
        &mut self,
        addr: &Addr,
        bind: Option<SocketAddr>,
        options: &SocketOptions,
    ) -> io::Result<(Self::Stream, bool)>;

    /// Takes over a connected stream socket of TCP or Unix. Returns the peer's address too.
    fn adopt_stream(
        &mut self,
        socket: OwnedFd,
        options: &SocketOptions,
    ) -> io::Result<(Self::Stream, Addr)>;

    /// Returns the state of an attempt to connect, or why it failed.
    fn connected(&mut self, stream: &mut Self::Stream) -> io::Result<Connected>;

    /// A random number.
    fn random(&mut self) -> u64;

    /// Registers a new stream, edge-triggered: for reading, or for both if it may not be writable
    /// yet.
    fn register_stream(
        &mut self,
        stream: &mut Self::Stream,
        interest: Interest,
        token: Token,
    ) -> io::Result<()>;

    /// Watches a descriptor of the application, edge-triggered, until [`Os::unwatch`].
    fn watch(
        &mut self,
        descriptor: BorrowedFd<'_>,
        interest: Interest,
        token: Token,
    ) -> io::Result<()>;

    /// Ends that. The descriptor may be closed already.
    fn unwatch(&mut self, descriptor: RawFd);

    /// Number of readable bytes, at most one, without reading them; 0 at the end.
    fn peek(&mut self, stream: &mut Self::Stream) -> io::Result<usize>;

    /// Takes a stream out of the poll and returns its socket, with the calls that it needs.
    fn release(&mut self, stream: Self::Stream) -> io::Result<(OwnedFd, SystemCalls)>;

    /// Makes the reads and writes of a released socket end. It fails if the peer has gone: then
    /// there is nothing to end.
    fn cut_off(&self, socket: &detached::Socket) {
        let _ = socket.cut_off();
    }

    /// As [`Socket::local_addr`].
    fn local_addr(&self, stream: &Self::Stream) -> io::Result<Addr> {
        stream.local_addr()
    }

    /// As [`Socket::credentials`].
    fn credentials(&self, stream: &Self::Stream) -> io::Result<Credentials> {
        stream.credentials()
    }

    /// As [`Socket::fd`].
    fn fd<'a>(&self, stream: &'a Self::Stream) -> io::Result<BorrowedFd<'a>> {
        stream.fd()
    }

    /// Closes a stream, and sends what `end` says.
    fn close(&mut self, stream: Self::Stream, end: End);

    /// A connection has ended for this reason: for recordings.
    fn note_end(&mut self, _reason: CloseReason) {}

    /// A connection opens. Returns the number of commands of handles so far, if some of them are
    /// not carried out: `queued`, or that of a recording.
    #[inline]
    fn queued(&mut self, queued: Option<u64>) -> Option<u64> {
        queued
    }

    /// A connection waits for commands of handles. Returns how many are carried out: `done`, or as
    /// many as in a recording.
    fn carried_out(&mut self, done: u64) -> u64 {
        done
    }

    /// A command of a handle is carried out now: for recordings.
    fn note_command(&mut self, _command: Noted<'_>) {}
}

/// The kernel has no memory for this call at the moment.
pub(super) fn is_short_of_memory(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOBUFS | libc::ENOMEM))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::MAX_CONNECTIONS;
    use crate::id::ServerNumber;

    #[test]
    fn tokens_name_one_kind_each() {
        let conn = |index, generation| ConnId::new(ServerNumber::NONE, index, generation);
        let last = MAX_CONNECTIONS as u32 - 1;
        assert_eq!(
            Token::of_conn(conn(last, ConnId::MAX_GENERATION)).named(),
            Named::Slot(last)
        );
        assert_eq!(Token::of_conn(conn(0, 1)).named(), Named::Slot(0));
        assert_ne!(Token::of_conn(conn(7, 1)), Token::of_conn(conn(7, 2)));
        for id in [0, 1, 65_534, 65_535, u32::MAX] {
            assert_eq!(
                Token::of_listener(ListenerId::new(ServerNumber::NONE, id)).named(),
                Named::Listener
            );
        }
        for slot in [0, Token::WATCHES - 1] {
            let token = Token::of_watch(slot, u64::MAX);
            assert_eq!(token.map(Token::named), Some(Named::Watch(slot)));
        }
        assert_eq!(Token::of_watch(Token::WATCHES, 0), None);
        assert_eq!(Token::WAKER.named(), Named::Waker);
    }
}
