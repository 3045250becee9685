//! Detached connections: blocking streams for threads of their own.

use std::error::Error as StdError;
use std::fmt;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use socket2::SockRef;

use crate::addr::Addr;
use crate::handle::Wake;
use crate::id::ConnId;
use crate::proto::DetachedIo;

/// One read from the socket under TLS: a record and its header (RFC 8446 section 5.2).
const READ_SIZE: usize = 0x4000 + 256 + 5;

/// A connection as a blocking stream: from [`Conn::detach`](crate::Conn::detach).
///
/// `Read` and `Write` are those of `std::net::TcpStream`, over TLS too; received bytes that were
/// not delivered yet are read first. The server counts the connection as its own until this value
/// is dropped, which closes it. Use [`Detached::finish`] for an orderly close.
pub struct Detached {
    socket: Arc<Socket>,
    detached_io: Box<DetachedIo>,
    peer: Addr,
    source: Addr,
    place: Place,
}

/// A connection's slot in its server. Dropping this value frees the slot.
#[derive(Debug)]
#[must_use = "the place is free as soon as this is dropped"]
pub struct Place {
    id: ConnId,
    released: Arc<Released>,
}

/// Slots that were given back and that the server has not taken yet.
pub(crate) struct Released {
    ids: Mutex<Vec<ConnId>>,
    pending: AtomicBool,
    wake: Box<dyn Wake>,
}

#[derive(Debug)]
pub(crate) enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Released {
    pub(crate) fn new(wake: Box<dyn Wake>) -> Self {
        Self {
            ids: Mutex::default(),
            pending: AtomicBool::new(false),
            wake,
        }
    }

    /// Takes the ids that arrived since the last call: at most one for each connection.
    pub(crate) fn take(&self) -> Vec<ConnId> {
        if !self.pending.load(Ordering::Relaxed) || !self.pending.swap(false, Ordering::SeqCst) {
            return Vec::new();
        }
        std::mem::take(&mut *self.ids.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl fmt::Debug for Released {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Released").finish_non_exhaustive()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut ids = self
            .released
            .ids
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        ids.push(self.id);
        drop(ids);
        if !self.released.pending.swap(true, Ordering::SeqCst) {
            // The mark stays for the next iteration, whatever starts that.
            let _ = self.released.wake.wake();
        }
    }
}

impl Socket {
    /// A blocking socket.
    pub(crate) fn new(socket: OwnedFd, is_unix: bool) -> io::Result<Self> {
        SockRef::from(&socket).set_nonblocking(false)?;
        Ok(if is_unix {
            Self::Unix(socket.into())
        } else {
            Self::Tcp(socket.into())
        })
    }

    /// Wakes threads that read or write.
    pub(crate) fn shutdown(&self, how: Shutdown) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => stream.shutdown(how),
            Self::Unix(stream) => stream.shutdown(how),
        }
    }

    fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => (&mut &*stream).read(buffer),
            Self::Unix(stream) => (&mut &*stream).read(buffer),
        }
    }

    fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => (&mut &*stream).write(bytes),
            #[cfg(not(target_vendor = "apple"))]
            Self::Unix(stream) => SockRef::from(stream).send_with_flags(bytes, libc::MSG_NOSIGNAL),
            #[cfg(target_vendor = "apple")]
            Self::Unix(stream) => (&mut &*stream).write(bytes),
        }
    }
}

impl Detached {
    pub(crate) fn new(
        id: ConnId,
        socket: Socket,
        detached_io: DetachedIo,
        (peer, source): (Addr, Addr),
        released: &Arc<Released>,
    ) -> (Self, Weak<Socket>) {
        let socket = Arc::new(socket);
        let weak = Arc::downgrade(&socket);
        let released = Arc::clone(released);
        let place = Place { id, released };
        let detached = Self {
            socket,
            detached_io: Box::new(detached_io),
            peer,
            source,
            place,
        };
        (detached, weak)
    }

    /// The connection's id, valid until its slot is given back.
    pub fn id(&self) -> ConnId {
        self.place.id
    }

    /// The address of the peer at the other end.
    pub fn peer_addr(&self) -> &Addr {
        &self.peer
    }

    /// The client's address: the one behind a trusted proxy if its header named one, else the
    /// peer's.
    pub fn source(&self) -> &Addr {
        &self.source
    }

    /// Received bytes that were not delivered. They are read first; over TLS they are decrypted
    /// already.
    pub fn unread(&self) -> &[u8] {
        self.detached_io.unread()
    }

    /// The result of the TLS handshake. `None` on a plain connection.
    #[cfg(feature = "tls")]
    pub fn tls(&self) -> Option<crate::tls::TlsInfo<'_>> {
        self.detached_io.tls()
    }

    /// The TCP socket, for its options and timeouts; `None` for a Unix socket. Over TLS its bytes
    /// are records: do not read or write here.
    pub fn as_tcp(&self) -> Option<&TcpStream> {
        match &*self.socket {
            Socket::Tcp(stream) => Some(stream),
            Socket::Unix(_) => None,
        }
    }

    /// Sets the limit on the time of one read; `None`, the default, is no limit. After it reads
    /// fail with `WouldBlock`.
    ///
    /// # Errors
    ///
    /// The kernel's. A timeout of zero is refused (`std::net::TcpStream::set_read_timeout`).
    pub fn set_read_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        match &*self.socket {
            Socket::Tcp(stream) => stream.set_read_timeout(timeout),
            Socket::Unix(stream) => stream.set_read_timeout(timeout),
        }
    }

    /// Sets the limit on the time of one write; `None`, the default, is no limit.
    ///
    /// # Errors
    ///
    /// As for [`Detached::set_read_timeout`].
    pub fn set_write_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        match &*self.socket {
            Socket::Tcp(stream) => stream.set_write_timeout(timeout),
            Socket::Unix(stream) => stream.set_write_timeout(timeout),
        }
    }

    /// Returns the plain `TcpStream`, received bytes that were not read, and the connection's slot.
    /// Pending output is written first.
    ///
    /// # Errors
    ///
    /// Returns itself over TLS, on a Unix socket, and if pending output cannot be written.
    pub fn into_tcp(mut self) -> Result<(TcpStream, Vec<u8>, Place), Self> {
        if self.detached_io.is_tls() || self.flush().is_err() {
            return Err(self);
        }
        let Some(Ok(stream)) = self.as_tcp().map(TcpStream::try_clone) else {
            return Err(self);
        };
        let unread = self.detached_io.unread().to_vec();
        Ok((stream, unread, self.place))
    }

    /// Closes in order: writes pending output, then close_notify over TLS, then FIN. Waits for the
    /// peer's end, and discards input before that.
    ///
    /// # Errors
    ///
    /// The socket's error. [`Detached::set_read_timeout`] bounds the wait.
    pub fn finish(mut self) -> io::Result<()> {
        // Nothing can be encrypted after close_notify.
        self.flush()?;
        self.detached_io.finish();
        self.flush()?;
        self.socket.shutdown(Shutdown::Write)?;
        let mut buffer = [0; 4096];
        loop {
            match self.socket.read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

impl Read for Detached {
    /// 0 is the peer's end. Over TLS an end without close_notify is `UnexpectedEof`: an attacker
    /// may have cut the data before it.
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.detached_io.unread().is_empty() {
            if buffer.is_empty() {
                return Ok(0);
            }
            if let Some(failure) = self.detached_io.take_failure() {
                // The alert for the peer.
                let _ = self.flush();
                return Err(io::Error::new(io::ErrorKind::InvalidData, failure));
            }
            if self.detached_io.is_over() {
                return Ok(0);
            }
            if !self.detached_io.is_tls() {
                self.flush()?;
                return self.socket.read(buffer);
            }
            // Replies of TLS itself, and earlier output.
            self.flush()?;
            let mut wire = [0; READ_SIZE];
            let count = self.socket.read(&mut wire)?;
            if count == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            self.detached_io
                .receive(wire.get_mut(..count).unwrap_or_default());
        }
        let unread = self.detached_io.unread();
        let count = unread.len().min(buffer.len());
        for (to, from) in buffer.iter_mut().zip(unread) {
            *to = *from;
        }
        self.detached_io.consume(count);
        Ok(count)
    }
}

impl Write for Detached {
    /// Over TLS accepted bytes may be unsent when this returns: [`Write::flush`] and the next write
    /// send them.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.flush()?;
        if !self.detached_io.is_tls() {
            return self.socket.write(bytes);
        }
        // One record at a time, as `TcpStream` takes what fits. From here on the bytes are
        // accepted: an error would make the caller send them twice. A lasting error comes back at
        // the next write.
        let taken = bytes.get(..0x4000).unwrap_or(bytes);
        self.detached_io.send(taken);
        let _ = self.flush();
        Ok(taken.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        loop {
            let bytes = self.detached_io.transmit().map_err(io::Error::other)?;
            if bytes.is_empty() {
                return Ok(());
            }
            match self.socket.write(bytes) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => self.detached_io.sent(count),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

impl fmt::Debug for Detached {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Detached")
            .field("id", &self.id())
            .field("peer", &self.peer)
            .field("tls", &self.detached_io.is_tls())
            .field("unread", &self.unread().len())
            .finish_non_exhaustive()
    }
}

/// Why [`Conn::detach`](crate::Conn::detach) did nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DetachError {
    /// The connection is detached already, closing, gone, or not open yet.
    NotOpen,
    /// The simulator has no sockets for a thread.
    Simulated,
}

impl fmt::Display for DetachError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotOpen => "the connection is detached already, closing, or not open yet",
            Self::Simulated => "a simulated connection cannot be detached",
        })
    }
}

impl StdError for DetachError {}
