//! Detached connections: blocking streams for threads of their own.

mod socket;

use std::any::Any;
use std::fmt;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::OwnedFd;
use std::sync::{Arc, PoisonError, Weak};
use std::time::Duration;

use socket::{Direction, Limit, Stream};
pub(crate) use socket::{Socket, SystemCalls};

use crate::addr::Addr;
use crate::handle::Wake;
use crate::id::ConnId;
use crate::proto::{DetachedIo, EndLimits, Time};
use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::Mutex;

/// One read from the socket under TLS: a record and its header (RFC 8446 section 5.2).
const READ_SIZE: usize = 0x4000 + 256 + 5;

/// Ciphertext that one read takes without a byte of data: more of it is no peer that means to talk.
const MAX_WITHOUT_DATA: usize = 1024 * 1024;

/// The time between two questions whether the peer's system has all output.
const DELIVERY_POLL: Duration = Duration::from_millis(10);

/// A connection as a blocking stream: from [`Conn::detach`](crate::Conn::detach).
///
/// `Read` and `Write` are those of `std::net::TcpStream`, over TLS too. Received bytes that were
/// not delivered yet are read first; pending output is written by the first write or flush, and
/// before a read waits. The server counts the connection as its own until this value is dropped,
/// which ends the connection. Use [`Detached::finish`] for an orderly close.
pub struct Detached {
    socket: Arc<Socket>,
    detached_io: Box<DetachedIo>,
    calls: SystemCalls,
    peer: Addr,
    place: Box<Place>,
}

/// A connection's slot in its server, freed when this value is dropped. The server removes the
/// connection in its next iteration; a place under the cap of [`Shards`](crate::Shards) is free at
/// once.
#[derive(Debug)]
#[must_use = "dropping it gives the slot back"]
pub struct Place {
    id: ConnId,
    released: Arc<Released>,
    /// Of a cap that several servers share: free at once, whatever the server is doing.
    permit: Option<Box<dyn Permit>>,
}

/// A connection's share of a cap, given back on drop.
pub(crate) trait Permit: fmt::Debug + Send + Sync {
    fn into_any(self: Box<Self>) -> Box<dyn Any>;
}

/// Slots that were given back and that the server has not taken yet.
pub(crate) struct Released {
    ids: Mutex<Vec<ConnId>>,
    pending: AtomicBool,
    wake: Box<dyn Wake>,
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

impl Place {
    /// Gives the slot back, but not the permit.
    pub(crate) fn into_permit(mut self) -> Option<Box<dyn Permit>> {
        self.permit.take()
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
        drop(self.permit.take());
        if !self.released.pending.swap(true, Ordering::SeqCst) {
            // The mark stays for the next iteration, whatever starts that.
            let _ = self.released.wake.wake();
        }
    }
}

/// Writes everything that is pending. Fails if any output is lost.
fn flush(detached_io: &mut DetachedIo, limit: &mut Limit<'_>) -> io::Result<()> {
    flush_all(detached_io, limit)?;
    check_output(detached_io)
}

/// As [`flush`], within the time of the read. Output that is not written stays pending.
fn flush_before_read(
    detached_io: &mut DetachedIo,
    limit: &mut Limit<'_>,
    read_limit: &mut Limit<'_>,
) -> io::Result<()> {
    if !detached_io.transmit().is_empty() {
        limit.end_by(read_limit.end()?);
    }
    let outcome = flush(detached_io, limit);
    // The wait for input is no time of writing.
    limit.pause();
    outcome
}

/// Fails once TLS has failed: no data comes or goes any more.
fn check_session(detached_io: &DetachedIo) -> io::Result<()> {
    detached_io.cause_of_failure().map_or(Ok(()), |cause| {
        let words = format!("TLS has failed: {cause}");
        Err(io::Error::new(io::ErrorKind::InvalidData, words))
    })
}

fn check_output(detached_io: &DetachedIo) -> io::Result<()> {
    if detached_io.has_lost_output() {
        check_session(detached_io)?;
        let words = "TLS cannot encrypt more under its keys: the output since then is lost";
        return Err(io::Error::other(words));
    }
    Ok(())
}

/// Writes everything that can be written, close_notify behind worn out keys too.
fn flush_all(detached_io: &mut DetachedIo, limit: &mut Limit<'_>) -> io::Result<()> {
    loop {
        let bytes = detached_io.transmit();
        if bytes.is_empty() {
            return Ok(());
        }
        limit.next()?;
        match limit.socket.write(bytes) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => detached_io.sent(count),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

impl Detached {
    pub(crate) fn new(
        id: ConnId,
        (socket, calls): (Socket, SystemCalls),
        detached_io: DetachedIo,
        peer: Addr,
        released: &Arc<Released>,
        permit: Option<Box<dyn Permit>>,
    ) -> (Self, Weak<Socket>) {
        let socket = Arc::new(socket);
        let weak = Arc::downgrade(&socket);
        let released = Arc::clone(released);
        let place = Box::new(Place {
            id,
            released,
            permit,
        });
        let detached = Self {
            socket,
            detached_io: Box::new(detached_io),
            calls,
            peer,
            place,
        };
        (detached, weak)
    }

    /// Returns the socket, and what remains of the connection beside it.
    ///
    /// # Errors
    ///
    /// Words if nothing more can be read or written.
    pub(crate) fn into_parts(self) -> Result<(OwnedFd, DetachedIo, Box<Place>), &'static str> {
        let io = &self.detached_io;
        if self.socket.is_cut_off.load(Ordering::SeqCst) {
            return Err("the connection was killed");
        }
        if io.is_over() || io.has_lost_output() || io.cause_of_failure().is_some() {
            return Err("the TLS session is over");
        }
        let cloned = self.socket.try_clone();
        let socket = cloned.map_err(|_| "there is no free descriptor")?;
        self.socket.is_taken.store(true, Ordering::SeqCst);
        Ok((socket, *self.detached_io, self.place))
    }

    /// Returns the connection's id, valid until its slot is given back.
    pub fn id(&self) -> ConnId {
        self.place.id
    }

    /// Returns received bytes that were not delivered. They are read first; over TLS they are
    /// decrypted already.
    pub fn unread(&self) -> &[u8] {
        self.detached_io.unread()
    }

    /// Returns the result of the TLS handshake; `None` on a plain connection.
    #[cfg(feature = "tls")]
    pub fn tls(&self) -> Option<crate::tls::TlsInfo<'_>> {
        self.detached_io.tls()
    }

    /// Returns the TCP socket, for its options; `None` for a Unix socket. Over TLS its bytes are
    /// records: do not read or write here. The connection ends with this value for clones of the
    /// socket too; [`Detached::into_tcp`] returns one that lives on.
    pub fn as_tcp(&self) -> Option<&TcpStream> {
        match &self.socket.stream {
            Stream::Tcp(stream) => Some(stream),
            Stream::Unix(_) => None,
        }
    }

    /// Sets the maximum time of one read; `None`, the default, is no limit. After it the read fails
    /// with `WouldBlock`. Over TLS it is the time until a record with data is complete. Pending
    /// output, which is written first, takes part of this time; the remainder stays pending.
    ///
    /// # Errors
    ///
    /// The kernel's; `InvalidInput` for a timeout of zero
    /// (`std::net::TcpStream::set_read_timeout`).
    pub fn set_read_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.socket.set_read_timeout(timeout)
    }

    /// Sets the maximum time of one write or flush; `None`, the default, is no limit. After it the
    /// call fails with `WouldBlock`.
    ///
    /// # Errors
    ///
    /// As for [`Detached::set_read_timeout`].
    pub fn set_write_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.socket.set_write_timeout(timeout)
    }

    /// Writes pending output, and returns the plain `TcpStream`, received bytes that were not read,
    /// and the connection's slot.
    ///
    /// # Errors
    ///
    /// Returns this value over TLS, on a Unix socket, without a free descriptor, and if pending
    /// output cannot be written.
    pub fn into_tcp(mut self) -> Result<(TcpStream, Vec<u8>, Place), Self> {
        if self.detached_io.is_tls() || self.flush().is_err() {
            return Err(self);
        }
        let Some(Ok(stream)) = self.as_tcp().map(TcpStream::try_clone) else {
            return Err(self);
        };
        self.socket.is_taken.store(true, Ordering::SeqCst);
        let unread = self.detached_io.unread().to_vec();
        Ok((stream, unread, *self.place))
    }

    /// Closes in order: writes pending output, then close_notify over TLS, then FIN. Then waits for
    /// the peer's end, and discards input.
    ///
    /// The peer's system must take the output within the write timeout. The wait after that is
    /// bounded by the read timeout. Without such a timeout, those of the connection's options hold:
    /// [`ConnConfig::write_timeout`](crate::ConnConfig::write_timeout) and
    /// [`ConnConfig::linger_timeout`](crate::ConnConfig::linger_timeout).
    /// [`ConnConfig::linger_bytes`](crate::ConnConfig::linger_bytes) bounds the discarded input.
    ///
    /// # Errors
    ///
    /// The socket's error; `WouldBlock` after a timeout, `InvalidData` after too much input, or if
    /// output is lost because TLS has failed, `Other` if the keys of TLS are worn out and output
    /// is lost, `BrokenPipe` after [`Control::kill`](crate::Control::kill)
    /// before the peer's system has the output.
    pub fn finish(mut self) -> io::Result<()> {
        let Self {
            socket,
            detached_io,
            calls,
            ..
        } = &mut self;
        let limits = detached_io.end_limits();
        let write_timeout = socket.write_timeout()?.unwrap_or(limits.write_timeout);
        let deliver_until = (calls.now)().after(write_timeout);
        let mut limit = Limit::of(socket, *calls, Direction::Write).within(write_timeout);
        flush_all(detached_io, &mut limit)?;
        detached_io.finish();
        flush_all(detached_io, &mut limit)?;
        drop(limit);
        socket.shutdown(Shutdown::Write)?;
        linger(socket, *calls, limits, deliver_until)?;
        check_output(detached_io)
    }
}

/// Waits until the peer's system has all output, and for the peer's end then. Discards input.
fn linger(
    socket: &Socket,
    calls: SystemCalls,
    limits: EndLimits,
    deliver_until: Time,
) -> io::Result<()> {
    // `None` once the peer has sent too much: it is not read any more.
    let mut room = Some(limits.linger_bytes);
    let mut has_ended = false;
    while socket.unsent(calls).is_some_and(|unsent| unsent > 0) {
        if (calls.now)() >= deliver_until {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        if socket.is_cut_off.load(Ordering::SeqCst) {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        if has_ended || room.is_none() {
            // A read would not wait.
            std::thread::sleep(DELIVERY_POLL);
        } else {
            has_ended = discard(socket, calls, &mut room, DELIVERY_POLL)?;
        }
    }
    // After a reset nothing is unsent either.
    socket.take_error()?;
    if has_ended {
        return Ok(());
    }
    let timeout = socket.read_timeout()?.unwrap_or(limits.linger_timeout);
    if timeout.is_zero() || discard(socket, calls, &mut room, timeout)? {
        return Ok(());
    }
    Err(match room {
        Some(_) => io::ErrorKind::WouldBlock.into(),
        None => {
            let words = "the peer goes on sending behind the end";
            io::Error::new(io::ErrorKind::InvalidData, words)
        }
    })
}

/// Discards input for `time`, or until `room` is used up. True at the peer's end.
fn discard(
    socket: &Socket,
    calls: SystemCalls,
    room: &mut Option<usize>,
    time: Duration,
) -> io::Result<bool> {
    let mut limit = Limit::of(socket, calls, Direction::Read).within(time);
    let mut buffer = [0; 4096];
    while let Some(left) = *room {
        match limit.next().and_then(|()| socket.read(&mut buffer)) {
            Ok(0) => return Ok(true),
            Ok(count) => *room = left.checked_sub(count),
            Err(error) => match error.kind() {
                io::ErrorKind::Interrupted => {}
                io::ErrorKind::WouldBlock => break,
                _ => return Err(error),
            },
        }
    }
    Ok(false)
}

impl Read for Detached {
    /// 0 is the peer's end. Over TLS an end without close_notify is `UnexpectedEof`: an attacker
    /// may have cut the data before it. After a failure of TLS, `InvalidData`, each later read and
    /// write fails with its cause.
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let Self {
            socket,
            detached_io,
            calls,
            ..
        } = self;
        let mut read_limit = Limit::of(socket, *calls, Direction::Read);
        let mut write_limit = Limit::of(socket, *calls, Direction::Write);
        let mut without_data = 0;
        while detached_io.unread().is_empty() {
            if buffer.is_empty() {
                return Ok(0);
            }
            if let Some(failure) = detached_io.take_failure() {
                // The alert for the peer.
                let _ = flush_before_read(detached_io, &mut write_limit, &mut read_limit);
                return Err(io::Error::new(io::ErrorKind::InvalidData, failure));
            }
            check_session(detached_io)?;
            if detached_io.is_over() {
                return Ok(0);
            }
            // Replies of TLS itself, and earlier output.
            flush_before_read(detached_io, &mut write_limit, &mut read_limit)?;
            if !detached_io.is_tls() {
                read_limit.next()?;
                return socket.read(buffer);
            }
            if without_data > MAX_WITHOUT_DATA {
                let words = "the peer sends records without data";
                return Err(io::Error::new(io::ErrorKind::InvalidData, words));
            }
            read_limit.next()?;
            let mut wire = [0; READ_SIZE];
            let count = socket.read(&mut wire)?;
            if count == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            without_data += count;
            detached_io.receive(wire.get_mut(..count).unwrap_or_default());
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
        let Self {
            socket,
            detached_io,
            calls,
            ..
        } = self;
        let mut limit = Limit::of(socket, *calls, Direction::Write);
        let flushed = flush(detached_io, &mut limit);
        check_session(detached_io)?;
        flushed?;
        if !detached_io.is_tls() {
            limit.next()?;
            return socket.write(bytes);
        }
        // One record at a time, as `TcpStream` takes what fits. From here on the bytes are
        // accepted: an error would make the caller send them twice. A lasting error comes back at
        // the next write.
        let taken = bytes.get(..0x4000).unwrap_or(bytes);
        detached_io.send(taken);
        let _ = flush(detached_io, &mut limit);
        Ok(taken.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        let Self {
            socket,
            detached_io,
            calls,
            ..
        } = self;
        flush(
            detached_io,
            &mut Limit::of(socket, *calls, Direction::Write),
        )
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

#[cfg(all(test, loom))]
mod models;
#[cfg(test)]
mod tests;
