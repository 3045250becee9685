//! Listening and connected sockets, TCP and Unix.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::time::Duration;

use mio::event::Source;
use mio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
#[cfg(any(target_os = "linux", target_os = "android"))]
use nix::sys::socket::{connect, setsockopt, SockaddrIn};
use nix::sys::socket::{recv, send, MsgFlags};
use socket2::{Domain, SockAddr, SockRef, TcpKeepalive, Type};

use crate::addr::{Addr, Credentials, UnixAddr};
use crate::config::SocketOptions;
use crate::reactor::os::Socket;
use crate::reactor::socket_file::SocketFile;

/// A listening socket. Its file is dropped, and removed, before the socket.
pub(crate) struct Listener {
    pub(super) file: Option<Arc<SocketFile>>,
    pub(super) socket: ListenSocket,
    /// The size of each accepted Unix socket's send buffer, which is not inherited.
    pub(super) send_buffer: Option<usize>,
    /// Another process may use the same socket, or has made it: its flags and options are not
    /// known. Shared by all clones.
    pub(super) is_foreign: Arc<AtomicBool>,
}

pub(super) enum ListenSocket {
    Tcp(TcpListener),
    Unix(UnixListener),
}

/// A connected socket.
pub(crate) enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Listener {
    pub(super) fn tcp(socket: TcpListener) -> Self {
        Self::new(ListenSocket::Tcp(socket))
    }

    pub(super) fn unix(socket: UnixListener) -> Self {
        Self::new(ListenSocket::Unix(socket))
    }

    fn new(socket: ListenSocket) -> Self {
        Self {
            file: None,
            socket,
            send_buffer: None,
            is_foreign: Arc::default(),
        }
    }

    pub(super) fn source(&mut self) -> &mut dyn Source {
        match &mut self.socket {
            ListenSocket::Tcp(socket) => socket,
            ListenSocket::Unix(socket) => socket,
        }
    }

    pub(super) fn local_addr(&self) -> io::Result<Addr> {
        match &self.socket {
            ListenSocket::Tcp(socket) => Ok(socket.local_addr()?.into()),
            ListenSocket::Unix(socket) => Ok(socket.local_addr()?.into()),
        }
    }

    /// The same socket and queue under another descriptor, for another poll. The last one removes a
    /// Unix socket's file.
    pub(super) fn try_clone(&self) -> io::Result<Self> {
        let descriptor = self.as_fd().try_clone_to_owned()?;
        let socket = match &self.socket {
            ListenSocket::Tcp(_) => ListenSocket::Tcp(TcpListener::from_std(descriptor.into())),
            ListenSocket::Unix(_) => ListenSocket::Unix(UnixListener::from_std(descriptor.into())),
        };
        Ok(Self {
            file: self.file.clone(),
            socket,
            send_buffer: self.send_buffer,
            is_foreign: Arc::clone(&self.is_foreign),
        })
    }

    /// Closes the socket. Unless `end`, as in a forked child, other copies listen on.
    pub(super) fn close(self, end: bool) {
        let Self {
            file,
            socket,
            is_foreign,
            ..
        } = self;
        drop(file);
        // A forked child may have a copy, from which nothing would ever accept. Only the last clone
        // may end the socket, and only if it was neither adopted nor handed out.
        let is_last = Arc::into_inner(is_foreign);
        if end && is_last.is_some_and(|is_foreign| !is_foreign.into_inner()) {
            socket.end();
        }
    }

    /// Accepts one client. O_NONBLOCK belongs to the socket and not to the descriptor, so another
    /// process can clear it (`fcntl(2)`). If it does so right before the accept, and no client
    /// waits, this blocks until one connects. SO_RCVTIMEO would bound that, but the connections of
    /// the other process would inherit it.
    pub(super) fn accept(&self) -> io::Result<(Stream, Addr)> {
        self.accept_with(|stream| self.set_options(stream))
    }

    fn accept_with(
        &self,
        set_options: impl FnOnce(&Stream) -> io::Result<()>,
    ) -> io::Result<(Stream, Addr)> {
        if self.is_foreign.load(Ordering::Relaxed) {
            SockRef::from(self).set_nonblocking(true)?;
        }
        let (stream, peer) = match &self.socket {
            ListenSocket::Tcp(socket) => {
                let (stream, peer) = socket.accept()?;
                (Stream::Tcp(stream), peer.into())
            }
            ListenSocket::Unix(socket) => accept_unix(socket)?,
        };
        set_options(&stream).map_err(lost)?;
        Ok((stream, peer))
    }

    /// Whether a client waits in the backlog. A socket that cannot be asked has one.
    #[cfg(any(
        target_os = "linux",
        target_os = "android",
        target_os = "freebsd",
        target_os = "dragonfly",
        target_vendor = "apple"
    ))]
    pub(super) fn has_client(&self) -> bool {
        use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
        let mut asked = [PollFd::new(self.as_fd(), PollFlags::POLLIN)];
        poll(&mut asked, PollTimeout::ZERO) != Ok(0)
    }

    #[cfg(not(any(
        target_os = "linux",
        target_os = "android",
        target_os = "freebsd",
        target_os = "dragonfly",
        target_vendor = "apple"
    )))]
    pub(super) fn has_client(&self) -> bool {
        true
    }

    /// Sets the options of an accepted socket that are not inherited, and resets those that are.
    fn set_options(&self, stream: &Stream) -> io::Result<()> {
        let socket = match stream {
            Stream::Tcp(stream) => SockRef::from(stream),
            Stream::Unix(stream) => SockRef::from(stream),
        };
        if let Some(bytes) = self.send_buffer {
            socket.set_send_buffer_size(bytes)?;
        }
        if self.is_foreign.load(Ordering::Relaxed) {
            reset_inherited(&socket)?;
        }
        no_sigpipe(&socket, matches!(stream, Stream::Unix(_)), set_nosigpipe)
    }
}

/// Sets SO_NOSIGPIPE where the system has it: writes there have no MSG_NOSIGNAL.
///
/// On a Unix socket it may fail: with EINVAL once the peer has closed its end, whose input is still
/// to be read. That is no reason to lose the connection. Rust programs ignore SIGPIPE all the same.
pub(super) fn no_sigpipe(
    socket: &SockRef<'_>,
    is_unix: bool,
    set: impl FnOnce(&SockRef<'_>) -> io::Result<()>,
) -> io::Result<()> {
    match set(socket) {
        Err(_) if is_unix => Ok(()),
        outcome => outcome,
    }
}

#[cfg(target_vendor = "apple")]
pub(super) fn set_nosigpipe(socket: &SockRef<'_>) -> io::Result<()> {
    socket.set_nosigpipe(true)
}

#[cfg(not(target_vendor = "apple"))]
pub(super) fn set_nosigpipe(_socket: &SockRef<'_>) -> io::Result<()> {
    Ok(())
}

/// Options of every connection.
pub(super) fn set_tcp_options(socket: &SockRef<'_>, options: &SocketOptions) -> io::Result<()> {
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
    Ok(())
}

/// Takes over a connected socket, with the peer's address.
pub(crate) fn adopt(socket: OwnedFd, options: &SocketOptions) -> io::Result<(Stream, Addr)> {
    adopt_with(socket, options, set_nosigpipe)
}

fn adopt_with(
    socket: OwnedFd,
    options: &SocketOptions,
    set_nosigpipe: impl FnOnce(&SockRef<'_>) -> io::Result<()>,
) -> io::Result<(Stream, Addr)> {
    let known = SockRef::from(&socket);
    if known.r#type()? != Type::STREAM {
        return Err(wrong("the socket is not a stream socket"));
    }
    // Its error first: that of a connection which has failed meanwhile.
    known.take_error()?.map_or(Ok(()), Err)?;
    let is_unix = match known.local_addr()?.domain() {
        Domain::IPV4 | Domain::IPV6 => false,
        Domain::UNIX => true,
        _ => return Err(wrong("the socket is neither TCP nor Unix")),
    };
    let peer = known.peer_addr()?;
    known.set_nonblocking(true)?;
    known.set_cloexec(true)?;
    reset_inherited(&known)?;
    no_sigpipe(&known, is_unix, set_nosigpipe)?;
    if is_unix {
        if let Some(bytes) = options.send_buffer {
            known.set_send_buffer_size(bytes)?;
        }
        let name = unix_name(&peer).into();
        return Ok((Stream::Unix(UnixStream::from_std(socket.into())), name));
    }
    set_tcp_options(&known, options)?;
    let addr = peer.as_socket().ok_or(io::ErrorKind::InvalidInput)?;
    let stream = TcpStream::from_std(socket.into());
    Ok((Stream::Tcp(stream), addr.into()))
}

/// The error of a socket that cannot be adopted.
pub(super) fn wrong(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, what)
}

/// Resets what a socket inherits from a listener that another process has made or may change, as
/// far as it changes what calls do.
fn reset_inherited(socket: &SockRef<'_>) -> io::Result<()> {
    // With it, close would block (`socket(7)`).
    reset(socket.set_linger(None))?;
    // These are of blocking calls: those of a detached connection.
    reset(socket.set_read_timeout(None))?;
    reset(socket.set_write_timeout(None))?;
    // Else urgent bytes would be part of the stream.
    reset(socket.set_out_of_band_inline(false))?;
    #[cfg(any(target_os = "linux", target_os = "android"))]
    {
        // With more, the poll reports no input until so many bytes are there.
        reset(setsockopt(&**socket, RcvLowat, &1).map_err(io::Error::from))?;
        // With it, output waits for a full segment.
        reset(socket.set_tcp_cork(false))?;
    }
    Ok(())
}

/// A type of socket without the option has nothing to reset: MPTCP has no SO_OOBINLINE, and a Unix
/// socket no TCP_CORK.
fn reset(outcome: io::Result<()>) -> io::Result<()> {
    match outcome {
        Err(error)
            if matches!(
                error.raw_os_error(),
                Some(libc::EOPNOTSUPP | libc::ENOPROTOOPT)
            ) =>
        {
            Ok(())
        }
        outcome => outcome,
    }
}

#[cfg(any(target_os = "linux", target_os = "android"))]
#[derive(Clone, Copy)]
struct RcvLowat;

#[cfg(any(target_os = "linux", target_os = "android"))]
nix::setsockopt_impl!(
    RcvLowat,
    libc::SOL_SOCKET,
    libc::SO_RCVLOWAT,
    libc::c_int,
    nix::sys::socket::sockopt::SetStruct<'_, libc::c_int>
);

/// Ends a TCP connection with RST, whatever process has a copy of the socket (`connect(2)`,
/// AF_UNSPEC).
#[cfg(any(target_os = "linux", target_os = "android"))]
fn disconnect(stream: BorrowedFd<'_>) -> io::Result<()> {
    let nowhere = SockaddrIn::from(libc::sockaddr_in {
        sin_family: libc::AF_UNSPEC as libc::sa_family_t,
        sin_port: 0,
        sin_addr: libc::in_addr { s_addr: 0 },
        sin_zero: [0; 8],
    });
    Ok(connect(stream.as_raw_fd(), &nowhere)?)
}

/// Ends a connection as a close of its only descriptor does, whatever process has a copy of the
/// socket. TCP ends with RST if it is to `reset`, or if input is unread.
///
/// These calls fail only for a socket that has failed already.
pub(super) fn end(socket: BorrowedFd<'_>, is_unix: bool, reset: bool) {
    let socket_ref = SockRef::from(&socket);
    if is_unix || !(reset || has_input(&socket_ref)) {
        // In both directions: then TCP answers further input with RST (`tcp(7)`). A Unix socket has
        // none: its peer sees the end, or ECONNRESET if it had sent unread data.
        let _ = socket_ref.shutdown(Shutdown::Both);
        return;
    }
    if reset {
        let _ = socket_ref.set_linger(Some(Duration::ZERO));
    }
    #[cfg(any(target_os = "linux", target_os = "android"))]
    let _ = disconnect(socket);
}

/// As [`end`], with RST if SO_LINGER demands it (`socket(7)`).
pub(super) fn end_as_set(socket: BorrowedFd<'_>, is_unix: bool) {
    let linger = SockRef::from(&socket).linger();
    let reset = linger.is_ok_and(|linger| linger == Some(Duration::ZERO));
    end(socket, is_unix, reset);
}

/// Input is unread. The socket may be a blocking one.
fn has_input(socket: &SockRef<'_>) -> bool {
    let mut byte = [MaybeUninit::uninit()];
    let peeked = socket.recv_with_flags(&mut byte, libc::MSG_PEEK | libc::MSG_DONTWAIT);
    matches!(peeked, Ok(1..))
}

/// An error of an accepted socket is not the listener's: this one client is lost.
fn lost(_: io::Error) -> io::Error {
    io::ErrorKind::ConnectionAborted.into()
}

fn accept_unix(listener: &UnixListener) -> io::Result<(Stream, Addr)> {
    let listener = SockRef::from(listener);
    #[cfg(any(target_os = "linux", target_os = "android"))]
    let (socket, peer) = listener.accept4(libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC)?;
    // Without options: one that cannot be set is not the listener's error.
    #[cfg(not(any(target_os = "linux", target_os = "android")))]
    let (socket, peer) = listener.accept_raw()?;
    #[cfg(not(any(target_os = "linux", target_os = "android")))]
    socket
        .set_cloexec(true)
        .and_then(|()| socket.set_nonblocking(true))
        .map_err(lost)?;
    let stream = UnixStream::from_std(OwnedFd::from(socket).into());
    Ok((Stream::Unix(stream), unix_name(&peer).into()))
}

fn unix_name(addr: &SockAddr) -> UnixAddr {
    match (addr.as_pathname(), addr.as_abstract_namespace()) {
        (Some(path), _) => UnixAddr::pathname(path),
        (None, Some(name)) => UnixAddr::abstract_name(name),
        (None, None) => UnixAddr::unnamed(),
    }
}

impl ListenSocket {
    /// Stops listening, whatever process has a copy: resets the backlog and refuses new clients.
    /// Only Linux can: elsewhere the close of the last copy does.
    fn end(&self) {
        let has_ended = SockRef::from(self).shutdown(Shutdown::Both).is_ok();
        // The backlog of a Unix socket outlives the call, which lets in no more.
        if cfg!(any(target_os = "linux", target_os = "android")) && has_ended {
            if let Self::Unix(socket) = self {
                while accept_unix(socket).is_ok() {}
            }
        }
    }
}

impl AsFd for ListenSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(socket) => socket.as_fd(),
            Self::Unix(socket) => socket.as_fd(),
        }
    }
}

impl Stream {
    pub(super) fn source(&mut self) -> &mut dyn Source {
        match self {
            Self::Tcp(stream) => stream,
            Self::Unix(stream) => stream,
        }
    }

    /// Receives what is there, as each call here: another process that has a copy of the socket can
    /// clear its O_NONBLOCK (`fcntl(2)`).
    #[inline]
    pub(super) fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        Ok(recv(self.raw(), buffer, MsgFlags::MSG_DONTWAIT)?)
    }

    /// Number of readable bytes, at most one, which are not read.
    pub(super) fn peek(&self) -> io::Result<usize> {
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        Ok(recv(self.raw(), &mut [0], flags)?)
    }

    #[inline]
    pub(super) fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        Ok(send(self.raw(), bytes, SEND)?)
    }

    pub(super) fn write_pieces(&self, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        let flags = SEND.bits();
        match self {
            Self::Tcp(stream) => SockRef::from(stream).send_vectored_with_flags(pieces, flags),
            Self::Unix(stream) => SockRef::from(stream).send_vectored_with_flags(pieces, flags),
        }
    }

    #[inline]
    fn raw(&self) -> RawFd {
        match self {
            Self::Tcp(stream) => stream.as_raw_fd(),
            Self::Unix(stream) => stream.as_raw_fd(),
        }
    }
}

/// An error in place of SIGPIPE, for which Darwin has an option of the socket.
#[cfg(not(target_vendor = "apple"))]
const SEND: MsgFlags = MsgFlags::MSG_DONTWAIT.union(MsgFlags::MSG_NOSIGNAL);
#[cfg(target_vendor = "apple")]
const SEND: MsgFlags = MsgFlags::MSG_DONTWAIT;

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Socket for Stream {
    fn local_addr(&self) -> io::Result<Addr> {
        match self {
            Self::Tcp(stream) => Ok(stream.local_addr()?.into()),
            Self::Unix(stream) => Ok(stream.local_addr()?.into()),
        }
    }

    fn credentials(&self) -> io::Result<Credentials> {
        match self {
            Self::Tcp(_) => Err(io::ErrorKind::Unsupported.into()),
            Self::Unix(stream) => credentials(stream),
        }
    }

    fn fd(&self) -> io::Result<BorrowedFd<'_>> {
        match self {
            Self::Tcp(stream) => Ok(stream.as_fd()),
            Self::Unix(stream) => Ok(stream.as_fd()),
        }
    }
}

#[cfg(any(target_os = "linux", target_os = "android"))]
fn credentials(stream: &UnixStream) -> io::Result<Credentials> {
    use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
    let found = getsockopt(stream, PeerCredentials)?;
    Ok(Credentials {
        uid: found.uid(),
        gid: found.gid(),
        pid: u32::try_from(found.pid()).ok().filter(|&pid| pid != 0),
    })
}

#[cfg(any(
    target_os = "freebsd",
    target_os = "dragonfly",
    target_vendor = "apple"
))]
fn credentials(stream: &UnixStream) -> io::Result<Credentials> {
    use nix::sys::socket::{getsockopt, sockopt::LocalPeerCred};
    let found = getsockopt(stream, LocalPeerCred)?;
    Ok(Credentials {
        uid: found.uid(),
        gid: *found.groups().first().ok_or(io::ErrorKind::InvalidData)?,
        pid: None,
    })
}

#[cfg(not(any(
    target_os = "linux",
    target_os = "android",
    target_os = "freebsd",
    target_os = "dragonfly",
    target_vendor = "apple"
)))]
fn credentials(_stream: &UnixStream) -> io::Result<Credentials> {
    Err(io::ErrorKind::Unsupported.into())
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream as StdUnixStream;

    use super::*;
    use crate::reactor::listener::AcceptError;

    /// As on Apple's systems, where SO_NOSIGPIPE gives EINVAL once a Unix socket's peer has gone.
    #[test]
    fn a_unix_socket_without_nosigpipe_is_served() {
        use std::io::Write as _;

        let fails = |_: &SockRef<'_>| Err(io::Error::from_raw_os_error(libc::EINVAL));
        let options = SocketOptions::default();

        let (ours, mut theirs) = StdUnixStream::pair().expect("a pair");
        theirs.write_all(b"last words").expect("written");
        drop(theirs);
        let (stream, _) = adopt_with(ours.into(), &options, fails).expect("adopted");
        let mut buffer = [0; 32];
        assert_eq!(stream.read(&mut buffer).expect("input"), 10);
        assert_eq!(stream.read(&mut buffer).expect("the end"), 0);

        // Of TCP it is the error of one connection.
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let addr = listener.local_addr().expect("an address");
        let client = std::net::TcpStream::connect(addr).expect("it listens");
        let error = adopt_with(client.into(), &options, fails).err();
        assert_eq!(
            error.and_then(|error| error.raw_os_error()),
            Some(libc::EINVAL)
        );
    }

    /// Whatever the error: the next client is accepted.
    #[test]
    fn an_option_that_cannot_be_set_loses_one_client() {
        let path = std::env::temp_dir().join(format!("portcullis-options-{}", std::process::id()));
        let _ = std::fs::remove_file(&path);
        let tcp = TcpListener::bind(([127, 0, 0, 1], 0).into()).expect("bind");
        let tcp_addr = tcp.local_addr().expect("an address");
        let unix = UnixListener::bind(&path).expect("bind");
        let connects: [(Listener, Box<dyn Fn() -> OwnedFd>); 2] = [
            (
                Listener::tcp(tcp),
                Box::new(|| {
                    std::net::TcpStream::connect(tcp_addr)
                        .expect("connect")
                        .into()
                }),
            ),
            (
                Listener::unix(unix),
                Box::new(|| StdUnixStream::connect(&path).expect("connect").into()),
            ),
        ];
        for (listener, connect) in &connects {
            for errno in [libc::EINVAL, libc::EBADF, libc::ENOTSOCK, libc::EMFILE] {
                let _lost = connect();
                let fails = |_: &Stream| Err(io::Error::from_raw_os_error(errno));
                let error = listener.accept_with(fails).err().expect("refused");
                assert_eq!(AcceptError::of(&error), AcceptError::Retry, "{errno}");
            }
            let _client = connect();
            assert!(listener.accept().is_ok());
        }
        std::fs::remove_file(&path).expect("removed");
    }
}
