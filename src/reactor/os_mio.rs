//! The real system calls: mio for readiness, socket2 for options. The only file that names mio.

use std::fs;
use std::io::{self, Read, Write};
use std::mem::MaybeUninit;
use std::net::{Shutdown, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use mio::net::{TcpListener, TcpStream};
use mio::{Events, Interest, Poll, Waker};
use socket2::{Domain, Protocol, SockRef, TcpKeepalive, Type};

use super::os::{Event, Os, Socket, Token};
use crate::handle::Wake;
use crate::listen::SocketOptions;
use crate::proto::Time;

/// Events taken per turn.
const BATCH: usize = 1024;
/// mio rounds up to whole milliseconds; very long sleeps are cut, which costs a wake-up a day.
const LONGEST_SLEEP: Duration = Duration::from_secs(24 * 60 * 60);

pub(crate) struct MioOs {
    poll: Poll,
    events: Events,
    waker: std::sync::Arc<Waker>,
    start: Instant,
}

impl MioOs {
    pub(crate) fn new() -> io::Result<Self> {
        let poll = Poll::new()?;
        let waker = Waker::new(poll.registry(), mio::Token(Token::WAKER.0))?;
        Ok(Self {
            poll,
            events: Events::with_capacity(BATCH),
            waker: std::sync::Arc::new(waker),
            start: Instant::now(),
        })
    }

    /// The poll's own descriptor: readable when there are events.
    pub(crate) fn as_fd(&self) -> BorrowedFd<'_> {
        self.poll.registry().as_fd()
    }
}

/// The process's soft limit of open descriptors (RLIMIT_NOFILE), where the system says it without unsafe code: on Linux.
pub(crate) fn descriptor_limit() -> Option<usize> {
    let limits = fs::read_to_string("/proc/self/limits").ok()?;
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"))?;
    line.split_whitespace().next()?.parse().ok()
}

struct MioWaker(std::sync::Arc<Waker>);

impl Wake for MioWaker {
    fn wake(&self) -> io::Result<()> {
        self.0.wake()
    }
}

impl Socket for TcpStream {
    fn local_addr(&self) -> io::Result<SocketAddr> {
        Self::local_addr(self)
    }
}

impl Os for MioOs {
    type Listener = TcpListener;
    type Stream = TcpStream;

    fn descriptor_limit(&self) -> Option<usize> {
        descriptor_limit()
    }

    fn now(&self) -> Time {
        Time::from_start(Instant::now().saturating_duration_since(self.start))
    }

    fn poll(&mut self, events: &mut Vec<Event>, timeout: Option<Duration>) -> io::Result<bool> {
        let timeout = Some(timeout.unwrap_or(LONGEST_SLEEP).min(LONGEST_SLEEP));
        self.poll.poll(&mut self.events, timeout)?;
        events.extend(self.events.iter().map(|event| {
            // A read ends in front of an urgent byte, so that more may stand behind a short one.
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
        Box::new(MioWaker(std::sync::Arc::clone(&self.waker)))
    }

    fn listen(&mut self, addr: SocketAddr, options: &SocketOptions) -> io::Result<TcpListener> {
        let socket = socket2::Socket::new(Domain::for_address(addr), Type::STREAM, Some(Protocol::TCP))?;
        socket.set_nonblocking(true)?;
        if addr.is_ipv6() {
            socket.set_only_v6(options.only_v6)?;
        }
        socket.set_reuse_address(options.reuse_address)?;
        if options.reuse_port {
            socket.set_reuse_port(true)?;
        }
        // Before listen: accepted sockets inherit these, and the receive window is announced in the SYN-ACK (tcp(7)).
        if let Some(bytes) = options.recv_buffer {
            socket.set_recv_buffer_size(bytes)?;
        }
        if let Some(bytes) = options.send_buffer {
            socket.set_send_buffer_size(bytes)?;
        }
        socket.set_tcp_nodelay(options.nodelay)?;
        if let Some(keepalive) = options.keepalive {
            let params = TcpKeepalive::new()
                .with_time(keepalive.time)
                .with_interval(keepalive.interval)
                .with_retries(keepalive.retries);
            socket.set_tcp_keepalive(&params)?;
        }
        socket.bind(&addr.into())?;
        socket.listen(i32::try_from(options.backlog).unwrap_or(i32::MAX))?;
        Ok(TcpListener::from_std(socket.into()))
    }

    fn adopt(&mut self, listener: std::net::TcpListener) -> io::Result<TcpListener> {
        // Where the system cannot be asked, the first accept finds out.
        #[cfg(any(target_os = "linux", target_os = "android", target_os = "freebsd"))]
        if !SockRef::from(&listener).is_listener()? {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "the socket is not listening",
            ));
        }
        listener.set_nonblocking(true)?;
        SockRef::from(&listener).set_cloexec(true)?;
        Ok(TcpListener::from_std(listener))
    }

    fn listener_addr(&self, listener: &TcpListener) -> io::Result<SocketAddr> {
        listener.local_addr()
    }

    fn register_listener(&mut self, listener: &mut TcpListener, token: Token) -> io::Result<()> {
        self.poll
            .registry()
            .register(listener, mio::Token(token.0), Interest::READABLE)
    }

    fn deregister_listener(&mut self, listener: &mut TcpListener) -> io::Result<()> {
        self.poll.registry().deregister(listener)
    }

    fn close_listener(&mut self, listener: TcpListener) {
        drop(listener);
    }

    fn accept(&mut self, listener: &mut TcpListener) -> io::Result<(TcpStream, SocketAddr)> {
        let (stream, peer) = listener.accept()?;
        #[cfg(target_vendor = "apple")]
        SockRef::from(&stream).set_nosigpipe(true)?;
        Ok((stream, peer))
    }

    fn register_stream(&mut self, stream: &mut TcpStream, token: Token) -> io::Result<()> {
        let interest = Interest::READABLE | Interest::WRITABLE;
        // Told of urgent bytes where the system can; an edge, so it cannot spin.
        #[cfg(any(target_os = "linux", target_os = "android"))]
        let interest = interest | Interest::PRIORITY;
        self.poll.registry().register(stream, mio::Token(token.0), interest)
    }

    fn read(&mut self, stream: &mut TcpStream, buffer: &mut [u8]) -> io::Result<usize> {
        stream.read(buffer)
    }

    fn peek(&mut self, stream: &mut TcpStream) -> io::Result<usize> {
        SockRef::from(&*stream).peek(&mut [MaybeUninit::uninit()])
    }

    fn write(&mut self, stream: &mut TcpStream, bytes: &[u8]) -> io::Result<usize> {
        // std sends with MSG_NOSIGNAL; its vectored write would not.
        stream.write(bytes)
    }

    fn shutdown(&mut self, stream: &mut TcpStream) -> io::Result<()> {
        stream.shutdown(Shutdown::Write)
    }

    fn close(&mut self, stream: TcpStream, reset: bool) {
        if reset {
            // Fails only for a socket that is dead already.
            let _ = SockRef::from(&stream).set_linger(Some(Duration::ZERO));
        }
        drop(stream);
    }
}
