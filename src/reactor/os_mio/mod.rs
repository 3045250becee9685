//! The real system calls: mio for readiness, socket2 for options. The only folder that names mio.

mod delivery;
mod shared;
mod sockets;

use std::ffi::OsStr;
use std::fs;
use std::hash::{BuildHasher, RandomState};
use std::io::{self, IoSlice};
use std::net::{Shutdown, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::sync::atomic::Ordering;
use std::sync::Arc;
use std::time::Duration;

use mio::event::Source;
use mio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Waker};
#[cfg(any(target_os = "linux", target_os = "android"))]
use nix::sys::socket::{setsockopt, sockopt::IpBindAddressNoPort};
use socket2::{Domain, Protocol, SockAddr, SockRef, Type};

use shared::Asked;
pub(crate) use shared::SharedListenSockets;
pub(crate) use sockets::{adopt, Listener, Stream};

use super::clock::{self, Clock, LONGEST_SLEEP};
use super::os::{Connected, End, Event, Os, StreamOps, Token};
use super::socket_file::SocketFile;
use crate::addr::{Addr, UnixAddr};
use crate::config::SocketOptions;
use crate::detached::{self, SystemCalls};
use crate::handle::Wake;
use crate::handler::Interest as Watched;
use crate::proto::Time;

/// Events taken per iteration.
const BATCH: usize = 1024;

/// The calls of a detached connection.
pub(crate) const BLOCKING_CALLS: SystemCalls = SystemCalls {
    now: clock::now,
    unsent: delivery::unsent,
    end: sockets::end_as_set,
};

pub(crate) struct MioOs {
    poll: Poll,
    events: Events,
    waker: Arc<Waker>,
    clock: Clock,
    /// The process that created the poll. A forked child shares the poll with it (`epoll(7)`).
    process: u32,
    /// Sockets shared with other servers, and those opened so far.
    listen_sockets: Option<(Arc<SharedListenSockets>, Vec<Asked>)>,
}

impl MioOs {
    pub(crate) fn new() -> io::Result<Self> {
        let poll = Poll::new()?;
        let waker = Waker::new(poll.registry(), mio::Token(Token::WAKER.0))?;
        Ok(Self {
            poll,
            events: Events::with_capacity(BATCH),
            waker: Arc::new(waker),
            clock: Clock::new(),
            process: std::process::id(),
            listen_sockets: None,
        })
    }

    /// Shares listening sockets with other servers.
    pub(crate) fn share_listen_sockets(&mut self, listen_sockets: Arc<SharedListenSockets>) {
        self.listen_sockets = Some((listen_sockets, Vec::new()));
    }

    /// As `Registry::register`, which writes a log record first: the logger may panic.
    fn register(
        &self,
        source: &mut dyn Source,
        token: Token,
        interest: Interest,
    ) -> io::Result<()> {
        source.register(self.poll.registry(), mio::Token(token.0), interest)
    }

    /// As [`MioOs::register`].
    fn deregister(&self, source: &mut dyn Source) -> io::Result<()> {
        source.deregister(self.poll.registry())
    }

    /// True in a forked child: poll and sockets are its parent's.
    fn is_forked(&self) -> bool {
        std::process::id() != self.process
    }

    /// The poll's own descriptor: readable when there are events.
    pub(crate) fn as_fd(&self) -> BorrowedFd<'_> {
        self.poll.registry().as_fd()
    }
}

/// The process's soft limit of open descriptors (RLIMIT_NOFILE), where the system reports it
/// without unsafe code: on Linux.
pub(crate) fn descriptor_limit() -> Option<usize> {
    let limits = fs::read_to_string("/proc/self/limits").ok()?;
    let line = limits
        .lines()
        .find_map(|line| line.strip_prefix("Max open files"))?;
    line.split_whitespace().next()?.parse().ok()
}

struct MioWaker(Arc<Waker>);

impl Wake for MioWaker {
    fn wake(&self) -> io::Result<()> {
        self.0.wake()
    }
}

fn mio_interest(interest: Watched) -> Interest {
    match interest {
        Watched::Readable => Interest::READABLE,
        Watched::Writable => Interest::WRITABLE,
        Watched::Both => Interest::READABLE | Interest::WRITABLE,
    }
}

/// The interest in a connection's stream.
fn stream_interest(interest: Watched) -> Interest {
    let interest = mio_interest(interest);
    // Reports urgent bytes where the system can; edge-triggered, so it cannot spin.
    #[cfg(any(target_os = "linux", target_os = "android"))]
    let interest = interest | Interest::PRIORITY;
    interest
}

fn listen_tcp(addr: SocketAddr, options: &SocketOptions) -> io::Result<TcpListener> {
    let socket =
        socket2::Socket::new(Domain::for_address(addr), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_nonblocking(true)?;
    if addr.is_ipv6() {
        socket.set_only_v6(options.only_v6)?;
    }
    socket.set_reuse_address(options.reuse_address)?;
    if options.reuse_port {
        socket.set_reuse_port(true)?;
    }
    // Before listen: accepted sockets inherit these, and the SYN-ACK announces the receive window
    // (`tcp(7)`).
    sockets::set_tcp_options(&SockRef::from(&socket), options)?;
    socket.bind(&addr.into())?;
    socket.listen(backlog(options))?;
    Ok(TcpListener::from_std(socket.into()))
}

fn connect_tcp(
    addr: SocketAddr,
    bind: Option<SocketAddr>,
    options: &SocketOptions,
) -> io::Result<(TcpStream, bool)> {
    let socket =
        socket2::Socket::new(Domain::for_address(addr), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_nonblocking(true)?;
    // Before connect: the SYN announces the receive window.
    sockets::set_tcp_options(&SockRef::from(&socket), options)?;
    if let Some(local) = bind {
        // TIME_WAIT of an earlier connection must not occupy a chosen local port.
        socket.set_reuse_address(local.port() != 0)?;
        // A port is chosen at connect, where only this peer's pairs of ports count (`ip(7)`).
        #[cfg(any(target_os = "linux", target_os = "android"))]
        if local.port() == 0 {
            setsockopt(&socket, IpBindAddressNoPort, &true)?;
        }
        socket.bind(&local.into())?;
    }
    let connected = begin_connect(&socket, &addr.into())?;
    Ok((TcpStream::from_std(socket.into()), connected))
}

fn connect_unix(name: &UnixAddr, options: &SocketOptions) -> io::Result<(UnixStream, bool)> {
    let socket = socket2::Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    if let Some(bytes) = options.send_buffer {
        socket.set_send_buffer_size(bytes)?;
    }
    let addr = match (name.as_pathname(), name.as_abstract_name()) {
        (Some(path), _) => SockAddr::unix(path)?,
        (None, Some(name)) => abstract_address(name)?,
        (None, None) => return Err(io::ErrorKind::InvalidInput.into()),
    };
    let connected = begin_connect(&socket, &addr)?;
    Ok((
        UnixStream::from_std(OwnedFd::from(socket).into()),
        connected,
    ))
}

fn begin_connect(socket: &socket2::Socket, addr: &SockAddr) -> io::Result<bool> {
    let known = SockRef::from(socket);
    sockets::no_sigpipe(&known, addr.is_unix(), sockets::set_nosigpipe)?;
    match socket.connect(addr) {
        Ok(()) => Ok(true),
        // `connect(2)`: an interrupted connect goes on.
        Err(error) if matches!(error.raw_os_error(), Some(libc::EINPROGRESS | libc::EINTR)) => {
            Ok(false)
        }
        Err(error) => Err(error),
    }
}

/// The address in socket2's form.
fn abstract_address(name: &[u8]) -> io::Result<SockAddr> {
    SockAddr::unix(OsStr::from_bytes(&[&[0], name].concat()))
}

/// Fails if the socket is not connected to a peer. A connect to a free port of the range for local
/// ports may get that very port. Then the socket connects to itself (RFC 9293 section 3.5,
/// simultaneous open).
fn has_peer(stream: &Stream) -> io::Result<()> {
    match stream {
        Stream::Tcp(stream) if stream.peer_addr()? == stream.local_addr()? => {
            Err(io::Error::from_raw_os_error(libc::ECONNREFUSED))
        }
        Stream::Tcp(_) => Ok(()),
        Stream::Unix(stream) => SockRef::from(stream).peer_addr().map(drop),
    }
}

fn listen_unix(name: &UnixAddr, options: &SocketOptions) -> io::Result<Listener> {
    let socket = socket2::Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    let file = match (name.as_pathname(), name.as_abstract_name()) {
        (Some(path), _) => Some(Arc::new(SocketFile::listen(
            &socket,
            path,
            options.mode,
            backlog(options),
        )?)),
        (None, Some(name)) => {
            socket.bind(&abstract_address(name)?)?;
            socket.listen(backlog(options))?;
            None
        }
        (None, None) => return Err(io::ErrorKind::InvalidInput.into()),
    };
    Ok(Listener {
        file,
        send_buffer: options.send_buffer,
        ..Listener::unix(UnixListener::from_std(OwnedFd::from(socket).into()))
    })
}

fn backlog(options: &SocketOptions) -> i32 {
    i32::try_from(options.backlog).unwrap_or(i32::MAX)
}

/// mio's own accept panics on the longest name of a client, which has no zero at its end
/// (`unix(7)`, "Bugs").
impl StreamOps for MioOs {
    type Stream = Stream;

    #[inline]
    fn now(&self) -> Time {
        self.clock.now()
    }

    #[inline]
    fn read(&mut self, stream: &mut Stream, buffer: &mut [u8]) -> io::Result<usize> {
        stream.read(buffer)
    }

    #[inline]
    fn write(&mut self, stream: &mut Stream, bytes: &[u8]) -> io::Result<usize> {
        stream.write(bytes)
    }

    fn write_pieces(&mut self, stream: &mut Stream, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        match pieces {
            [piece] => stream.write(piece),
            pieces => stream.write_pieces(pieces),
        }
    }

    fn unsent(&mut self, stream: &mut Stream) -> Option<usize> {
        match stream {
            Stream::Tcp(stream) => delivery::unsent(stream.as_fd(), false),
            Stream::Unix(stream) => delivery::unsent(stream.as_fd(), true),
        }
    }

    fn has_taken(&mut self, stream: &mut Stream, written: u64) -> Option<bool> {
        match stream {
            Stream::Tcp(stream) => {
                delivery::acknowledged(stream.as_fd()).map(|bytes| bytes >= written)
            }
            Stream::Unix(_) => None,
        }
    }

    fn reregister_stream(&mut self, stream: &mut Stream, token: Token) -> io::Result<()> {
        // A forked child would change its parent's registration.
        if self.is_forked() {
            return Ok(());
        }
        let interest = stream_interest(Watched::Both);
        let (registry, token) = (self.poll.registry(), mio::Token(token.0));
        stream.source().reregister(registry, token, interest)
    }

    fn shutdown(&mut self, stream: &mut Stream) -> io::Result<()> {
        match stream {
            // The connection itself would end, for its parent too.
            _ if self.is_forked() => Ok(()),
            Stream::Tcp(stream) => stream.shutdown(Shutdown::Write),
            Stream::Unix(stream) => stream.shutdown(Shutdown::Write),
        }
    }
}

impl Os for MioOs {
    type Listener = Listener;

    fn descriptor_limit(&self) -> Option<usize> {
        descriptor_limit()
    }

    fn poll(&mut self, events: &mut Vec<Event>, timeout: Option<Duration>) -> io::Result<bool> {
        // mio rounds up to whole milliseconds.
        let timeout = Some(timeout.unwrap_or(LONGEST_SLEEP).min(LONGEST_SLEEP));
        self.poll.poll(&mut self.events, timeout)?;
        events.extend(self.events.iter().map(|event| {
            // A read ends in front of an urgent byte, so data may follow a short read.
            let closed = event.is_read_closed() || event.is_error() || event.is_priority();
            Event {
                token: Token(event.token().0),
                readable: event.is_readable() || closed,
                writable: event.is_writable() || event.is_write_closed() || event.is_error(),
                closed,
            }
        }));
        Ok(events.len() >= BATCH)
    }

    fn waker(&self) -> Box<dyn Wake> {
        Box::new(MioWaker(Arc::clone(&self.waker)))
    }

    fn listen(
        &mut self,
        addr: &Addr,
        name: Option<&str>,
        options: &SocketOptions,
    ) -> io::Result<Listener> {
        let bind = |addr: &Addr| match addr {
            Addr::Tcp(addr) => listen_tcp(*addr, options).map(Listener::tcp),
            Addr::Unix(name) => listen_unix(name, options),
        };
        let Some((listen_sockets, opened)) = &mut self.listen_sockets else {
            return bind(addr);
        };
        let asked = Asked::new(addr, name);
        let nth = opened.iter().filter(|other| **other == asked).count();
        let socket = listen_sockets.open(&asked, nth, options, bind)?;
        opened.push(asked);
        Ok(socket)
    }

    fn adopt_listener(&mut self, socket: OwnedFd) -> io::Result<Listener> {
        let known = SockRef::from(&socket);
        if known.r#type()? != Type::STREAM {
            return Err(sockets::wrong("the socket is not a stream socket"));
        }
        // Where the system cannot report it, the first accept fails.
        #[cfg(any(target_os = "linux", target_os = "android", target_os = "freebsd"))]
        if !known.is_listener()? {
            return Err(sockets::wrong("the socket is not listening"));
        }
        let domain = known.local_addr()?.domain();
        if let Some((listen_sockets, _)) = &self.listen_sockets {
            listen_sockets.adopted();
        }
        known.set_nonblocking(true)?;
        known.set_cloexec(true)?;
        let listener = match domain {
            Domain::IPV4 | Domain::IPV6 => Listener::tcp(TcpListener::from_std(socket.into())),
            Domain::UNIX => Listener::unix(UnixListener::from_std(socket.into())),
            _ => return Err(sockets::wrong("the socket is neither TCP nor Unix")),
        };
        listener.is_foreign.store(true, Ordering::Relaxed);
        Ok(listener)
    }

    fn share_listener(&mut self, listener: &mut Listener) -> io::Result<OwnedFd> {
        let shared = listener.as_fd().try_clone_to_owned()?;
        listener.is_foreign.store(true, Ordering::Relaxed);
        if let Some(file) = &listener.file {
            file.hand_out();
        }
        Ok(shared)
    }

    fn listener_addr(&self, listener: &Listener) -> io::Result<Addr> {
        listener.local_addr()
    }

    fn register_listener(&mut self, listener: &mut Listener, token: Token) -> io::Result<()> {
        self.register(listener.source(), token, Interest::READABLE)
    }

    fn deregister_listener(&mut self, listener: &mut Listener) -> io::Result<()> {
        // A forked child would take the listener out of its parent's poll.
        if self.is_forked() {
            return Ok(());
        }
        self.deregister(listener.source())
    }

    fn close_listener(&mut self, listener: Listener) {
        let may_end = !self.is_forked();
        listener.close(may_end);
    }

    fn accept(&mut self, listener: &mut Listener) -> io::Result<(Stream, Addr)> {
        listener.accept()
    }

    fn has_client(&mut self, listener: &mut Listener) -> bool {
        listener.has_client()
    }

    fn connect(
        &mut self,
        addr: &Addr,
        bind: Option<SocketAddr>,
        options: &SocketOptions,
    ) -> io::Result<(Stream, bool)> {
        match addr {
            Addr::Tcp(addr) => {
                let (stream, connected) = connect_tcp(*addr, bind, options)?;
                Ok((Stream::Tcp(stream), connected))
            }
            Addr::Unix(name) => {
                let (stream, connected) = connect_unix(name, options)?;
                Ok((Stream::Unix(stream), connected))
            }
        }
    }

    fn adopt_stream(
        &mut self,
        socket: OwnedFd,
        options: &SocketOptions,
    ) -> io::Result<(Stream, Addr)> {
        adopt(socket, options)
    }

    fn connected(&mut self, stream: &mut Stream) -> io::Result<Connected> {
        match has_peer(stream) {
            Ok(()) => return Ok(Connected::Yes),
            // EINVAL on Apple's systems, once the connection is over (`getpeername(2)`).
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    Some(libc::ENOTCONN | libc::EINPROGRESS | libc::EINVAL)
                ) => {}
            Err(error) => return Err(error),
        }
        // Without a peer the attempt goes on, or has failed, or the connection is over already. A
        // look at the input tells them apart, and leaves the input and an error behind it for
        // reads.
        match self.peek(stream) {
            Ok(_) => Ok(Connected::Yes),
            Err(error) => match error.raw_os_error() {
                Some(libc::EAGAIN | libc::EINTR) => Ok(Connected::NotYet),
                // An attempt that meets RST fails with ECONNREFUSED. These are from an established
                // connection (RFC 9293 section 3.10.7.3).
                Some(libc::ECONNRESET | libc::EPIPE) => Ok(Connected::Reset),
                _ => Err(error),
            },
        }
    }

    fn random(&mut self) -> u64 {
        // New keys for each one, but the same in processes that were forked from one another: the
        // process and the time tell them apart.
        RandomState::new().hash_one((std::process::id(), self.now()))
    }

    fn register_stream(
        &mut self,
        stream: &mut Stream,
        interest: Watched,
        token: Token,
    ) -> io::Result<()> {
        self.register(stream.source(), token, stream_interest(interest))
    }

    fn watch(
        &mut self,
        descriptor: BorrowedFd<'_>,
        interest: Watched,
        token: Token,
    ) -> io::Result<()> {
        let fd = descriptor.as_raw_fd();
        let mut source = SourceFd(&fd);
        self.register(&mut source, token, mio_interest(interest))
    }

    fn unwatch(&mut self, descriptor: RawFd) {
        // A forked child would take the descriptor out of its parent's poll.
        if !self.is_forked() {
            // A descriptor that was closed has left the poll by that.
            let _ = self.deregister(&mut SourceFd(&descriptor));
        }
    }

    fn peek(&mut self, stream: &mut Stream) -> io::Result<usize> {
        stream.peek()
    }

    fn release(&mut self, mut stream: Stream) -> io::Result<(OwnedFd, SystemCalls)> {
        // A forked child would take the stream out of its parent's poll.
        if !self.is_forked() {
            self.deregister(stream.source())?;
        }
        let socket = match stream {
            Stream::Tcp(stream) => stream.into(),
            Stream::Unix(stream) => stream.into(),
        };
        Ok((socket, BLOCKING_CALLS))
    }

    fn cut_off(&self, socket: &detached::Socket) {
        // The connection itself would end, for its parent too.
        if !self.is_forked() {
            let _ = socket.cut_off();
        }
    }

    fn close(&mut self, stream: Stream, end: End) {
        // A forked child may have a copy, with which a close alone ends nothing; and the child's
        // own close must not end its parent's connection.
        if end != End::Close && !self.is_forked() {
            let reset = end == End::Reset;
            match &stream {
                Stream::Tcp(stream) => sockets::end(stream.as_fd(), false, reset),
                Stream::Unix(stream) => sockets::end(stream.as_fd(), true, reset),
            }
        }
        drop(stream);
    }
}

#[cfg(test)]
mod tests;
