//! The socket of a detached connection, and the time of one call on it.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use socket2::SockRef;

use crate::proto::Time;
use crate::sync::atomic::{AtomicBool, Ordering};

/// One write to a Unix socket: a longer one waits several times.
const MAX_UNIX_WRITE: usize = 16 * 1024;

/// What a blocking stream asks of the system beside its socket.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SystemCalls {
    pub(crate) now: fn() -> Time,
    /// A measure of the bytes that the peer's system has not got. True for a Unix socket.
    pub(crate) unsent: fn(BorrowedFd<'_>, bool) -> Option<usize>,
    /// Ends the connection as a close of the only descriptor does. True for a Unix socket.
    pub(crate) end: fn(BorrowedFd<'_>, bool),
}

#[derive(Debug)]
pub(crate) struct Socket {
    pub(super) stream: Stream,
    /// A read cannot show this once the peer has ended.
    pub(super) is_cut_off: AtomicBool,
    /// Its stream goes on under another descriptor.
    pub(super) is_taken: AtomicBool,
    /// See [`SystemCalls::end`].
    end: fn(BorrowedFd<'_>, bool),
    /// The process that has the connection. A forked child has a copy of the descriptor.
    process: u32,
}

#[derive(Debug)]
pub(super) enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Socket {
    /// A blocking socket.
    pub(crate) fn new(socket: OwnedFd, is_unix: bool, calls: SystemCalls) -> io::Result<Self> {
        SockRef::from(&socket).set_nonblocking(false)?;
        let stream = if is_unix {
            Stream::Unix(socket.into())
        } else {
            Stream::Tcp(socket.into())
        };
        Ok(Self {
            stream,
            is_cut_off: AtomicBool::new(false),
            is_taken: AtomicBool::new(false),
            end: calls.end,
            process: std::process::id(),
        })
    }

    /// Makes reads, writes and [`Detached::finish`] end, those of waiting threads too.
    pub(crate) fn cut_off(&self) -> io::Result<()> {
        self.is_cut_off.store(true, Ordering::SeqCst);
        self.shutdown(Shutdown::Both)
    }

    pub(super) fn try_clone(&self) -> io::Result<OwnedFd> {
        match &self.stream {
            Stream::Tcp(stream) => stream.as_fd().try_clone_to_owned(),
            Stream::Unix(stream) => stream.as_fd().try_clone_to_owned(),
        }
    }

    pub(super) fn shutdown(&self, how: Shutdown) -> io::Result<()> {
        match &self.stream {
            Stream::Tcp(stream) => stream.shutdown(how),
            Stream::Unix(stream) => stream.shutdown(how),
        }
    }

    pub(super) fn read_timeout(&self) -> io::Result<Option<Duration>> {
        match &self.stream {
            Stream::Tcp(stream) => stream.read_timeout(),
            Stream::Unix(stream) => stream.read_timeout(),
        }
    }

    pub(super) fn set_read_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        match &self.stream {
            Stream::Tcp(stream) => stream.set_read_timeout(timeout),
            Stream::Unix(stream) => stream.set_read_timeout(timeout),
        }
    }

    pub(super) fn write_timeout(&self) -> io::Result<Option<Duration>> {
        match &self.stream {
            Stream::Tcp(stream) => stream.write_timeout(),
            Stream::Unix(stream) => stream.write_timeout(),
        }
    }

    pub(super) fn set_write_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        match &self.stream {
            Stream::Tcp(stream) => stream.set_write_timeout(timeout),
            Stream::Unix(stream) => stream.set_write_timeout(timeout),
        }
    }

    pub(super) fn unsent(&self, calls: SystemCalls) -> Option<usize> {
        match &self.stream {
            Stream::Tcp(stream) => (calls.unsent)(stream.as_fd(), false),
            Stream::Unix(stream) => (calls.unsent)(stream.as_fd(), true),
        }
    }

    /// Takes the error of the connection. A read does not show a reset behind the peer's end.
    pub(super) fn take_error(&self) -> io::Result<()> {
        let error = match &self.stream {
            Stream::Tcp(stream) => stream.take_error()?,
            Stream::Unix(stream) => stream.take_error()?,
        };
        error.map_or(Ok(()), Err)
    }

    pub(super) fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        match &self.stream {
            Stream::Tcp(stream) => (&mut &*stream).read(buffer),
            Stream::Unix(stream) => (&mut &*stream).read(buffer),
        }
    }

    pub(super) fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        let bytes = match &self.stream {
            Stream::Tcp(_) => bytes,
            Stream::Unix(_) => bytes.get(..MAX_UNIX_WRITE).unwrap_or(bytes),
        };
        match &self.stream {
            Stream::Tcp(stream) => (&mut &*stream).write(bytes),
            #[cfg(not(target_vendor = "apple"))]
            Stream::Unix(stream) => {
                SockRef::from(stream).send_with_flags(bytes, libc::MSG_NOSIGNAL)
            }
            #[cfg(target_vendor = "apple")]
            Stream::Unix(stream) => (&mut &*stream).write(bytes),
        }
    }
}

impl Drop for Socket {
    /// A forked child may have a copy, with which a close alone ends nothing; and the child's own
    /// drop must not end its parent's connection.
    fn drop(&mut self) {
        if self.is_taken.load(Ordering::SeqCst) || std::process::id() != self.process {
            return;
        }
        match &self.stream {
            Stream::Tcp(stream) => (self.end)(stream.as_fd(), false),
            Stream::Unix(stream) => (self.end)(stream.as_fd(), true),
        }
    }
}

#[derive(Clone, Copy)]
pub(super) enum Direction {
    Read,
    Write,
}

/// The time of one call that may need several system calls: the socket's timeout bounds each of
/// them alone, so that a trickle would extend the whole for ever.
pub(super) struct Limit<'a> {
    pub(super) socket: &'a Socket,
    calls: SystemCalls,
    direction: Direction,
    /// `None` before a system call: what was done since the last takes none of the time.
    since: Option<Time>,
    /// The time taken before [`Limit::pause`].
    spent: Duration,
    /// No longer than this, whatever the timeout.
    until: Option<Time>,
    /// The time of the whole call instead of the socket's timeout.
    time: Option<Duration>,
    /// The socket's timeout, once it is known: it holds again at the end.
    timeout: Option<Option<Duration>>,
    narrowed: bool,
}

impl<'a> Limit<'a> {
    pub(super) fn of(socket: &'a Socket, calls: SystemCalls, direction: Direction) -> Self {
        Self {
            socket,
            calls,
            direction,
            since: None,
            spent: Duration::ZERO,
            until: None,
            time: None,
            timeout: None,
            narrowed: false,
        }
    }

    /// Of this time from now on, instead of the socket's timeout.
    pub(super) fn within(mut self, time: Duration) -> Self {
        (self.since, self.time) = (Some((self.calls.now)()), Some(time));
        self
    }

    /// No longer than until then, whatever the timeout. `None` is no such limit.
    pub(super) fn end_by(&mut self, until: Option<Time>) {
        self.until = until;
    }

    /// Before each system call: the first has the socket's timeout, the others what is left of it.
    pub(super) fn next(&mut self) -> io::Result<()> {
        let now = (self.calls.now)();
        let is_first = self.since.is_none() && self.spent.is_zero();
        let since = *self.since.get_or_insert(now);
        if is_first && self.until.is_none() {
            return Ok(());
        }
        let whole = self.whole()?;
        let spent = self.spent.saturating_add(now.since(since));
        let left = whole.map(|whole| whole.saturating_sub(spent));
        let left_until = self.until.map(|until| until.since(now));
        let Some(left) = left.into_iter().chain(left_until).min() else {
            return Ok(());
        };
        if left.is_zero() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        self.narrowed = true;
        self.set(Some(left))
    }

    /// What follows takes none of the time, until the next system call.
    pub(super) fn pause(&mut self) {
        if let Some(since) = self.since.take() {
            let spent = (self.calls.now)().since(since);
            self.spent = self.spent.saturating_add(spent);
        }
    }

    /// The end of the time, which begins now if it has not begun; `None` without a limit.
    pub(super) fn end(&mut self) -> io::Result<Option<Time>> {
        let since = *self.since.get_or_insert_with(self.calls.now);
        Ok(self.whole()?.map(|whole| since.after(whole)))
    }

    fn whole(&mut self) -> io::Result<Option<Duration>> {
        let timeout = match self.timeout {
            Some(timeout) => timeout,
            None => *self.timeout.insert(match self.direction {
                Direction::Read => self.socket.read_timeout()?,
                Direction::Write => self.socket.write_timeout()?,
            }),
        };
        Ok(self.time.or(timeout))
    }

    fn set(&self, timeout: Option<Duration>) -> io::Result<()> {
        match self.direction {
            Direction::Read => self.socket.set_read_timeout(timeout),
            Direction::Write => self.socket.set_write_timeout(timeout),
        }
    }
}

impl Drop for Limit<'_> {
    fn drop(&mut self) {
        if let (true, Some(timeout)) = (self.narrowed, self.timeout) {
            // It was accepted before.
            let _ = self.set(timeout);
        }
    }
}
