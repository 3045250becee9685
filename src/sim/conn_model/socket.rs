//! The kernel of one connection: a few fields for each call of its turn.

use std::io;

use crate::proto::Time;
use crate::reactor::os::{StreamOps, Token};

/// One end of a connection.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Socket {
    /// Received bytes that were not read.
    pub(super) inbox: Vec<u8>,
    fin: bool,
    reset: bool,
    broken: bool,
    /// Bytes that the kernel still accepts; `u16::MAX` is any number.
    room: u16,
    pub(super) fin_sent: bool,
    /// The next read or write finds no memory.
    no_memory: bool,
    /// The next registration finds none.
    no_memory_to_register: bool,
    /// Room is announced.
    write_interest: bool,
}

impl Socket {
    pub(super) fn new() -> Self {
        Self {
            inbox: Vec::new(),
            fin: false,
            reset: false,
            broken: false,
            room: u16::MAX,
            fin_sent: false,
            no_memory: false,
            no_memory_to_register: false,
            write_interest: false,
        }
    }

    /// Receives bytes from the peer. False if none can arrive any more.
    pub(super) fn arrive(&mut self, bytes: &[u8]) -> bool {
        let arrives = !self.fin && !self.reset && !bytes.is_empty();
        if arrives {
            self.inbox.extend_from_slice(bytes);
        }
        arrives
    }

    /// Receives FIN. False after a reset.
    pub(super) fn finish(&mut self) -> bool {
        self.fin |= !self.reset;
        !self.reset
    }

    pub(super) fn reset(&mut self) {
        self.reset = true;
        self.broken = false;
        self.room = u16::MAX;
    }

    pub(super) fn break_pipe(&mut self) {
        self.broken = !self.reset;
    }

    pub(super) fn run_out_of_memory(&mut self) {
        self.no_memory = true;
        self.no_memory_to_register = !self.write_interest;
    }

    /// Sets how many bytes the kernel accepts. True if that is announced.
    pub(super) fn make_room(&mut self, bytes: u16) -> bool {
        if self.reset {
            return false;
        }
        self.room = bytes;
        bytes > 0 && self.write_interest
    }

    pub(super) fn write_error(&self) -> Option<i32> {
        match (self.reset, self.broken) {
            (true, _) => Some(libc::ECONNRESET),
            (_, true) => Some(libc::EPIPE),
            _ => None,
        }
    }
}

/// The clock, and what the calls have shown since the model last looked.
pub(crate) struct ModelOs {
    pub(super) now: Time,
    /// Bytes that the kernel accepted.
    pub(super) accepted: Vec<u8>,
    /// A write has failed for good.
    pub(super) write_failed: bool,
    /// A registration has found room: the next poll reports it.
    pub(super) rearmed: bool,
    /// A call that no turn may make.
    pub(super) fault: Option<&'static str>,
}

impl ModelOs {
    pub(super) fn at(now: Time) -> Self {
        Self {
            now,
            accepted: Vec::new(),
            write_failed: false,
            rearmed: false,
            fault: None,
        }
    }
}

fn errno(errno: i32) -> io::Error {
    io::Error::from_raw_os_error(errno)
}

impl StreamOps for ModelOs {
    type Stream = Socket;

    /// Small enough for the model's frames to be of both kinds.
    fn large_frame(&self) -> usize {
        128
    }

    fn now(&self) -> Time {
        self.now
    }

    fn read(&mut self, socket: &mut Socket, buffer: &mut [u8]) -> io::Result<usize> {
        if std::mem::take(&mut socket.no_memory) {
            return Err(errno(libc::ENOBUFS));
        }
        let count = socket.inbox.len().min(buffer.len());
        for (to, from) in buffer.iter_mut().zip(socket.inbox.drain(..count)) {
            *to = from;
        }
        match (count, socket.reset, socket.fin) {
            (1.., ..) => Ok(count),
            (_, true, _) => Err(errno(libc::ECONNRESET)),
            (_, _, true) => Ok(0),
            _ => Err(errno(libc::EAGAIN)),
        }
    }

    fn write(&mut self, socket: &mut Socket, bytes: &[u8]) -> io::Result<usize> {
        if let Some(error) = socket.write_error() {
            self.write_failed |= !bytes.is_empty();
            return Err(errno(error));
        }
        if socket.fin_sent {
            if !bytes.is_empty() {
                self.fault.get_or_insert("it writes behind its FIN");
            }
            return Err(errno(libc::EPIPE));
        }
        if bytes.is_empty() {
            return Ok(0);
        }
        if std::mem::take(&mut socket.no_memory) {
            return Err(errno(libc::ENOBUFS));
        }
        let count = match socket.room {
            0 => return Err(errno(libc::EAGAIN)),
            u16::MAX => bytes.len(),
            room => {
                let count = u16::try_from(bytes.len()).unwrap_or(u16::MAX).min(room);
                socket.room -= count;
                usize::from(count)
            }
        };
        self.accepted
            .extend_from_slice(bytes.get(..count).unwrap_or_default());
        Ok(count)
    }

    /// The peer gets at once what the kernel accepts.
    fn unsent(&mut self, _: &mut Socket) -> Option<usize> {
        Some(0)
    }

    fn reregister_stream(&mut self, socket: &mut Socket, _: Token) -> io::Result<()> {
        if socket.write_interest {
            self.fault.get_or_insert("a second registration for room");
        }
        if std::mem::take(&mut socket.no_memory_to_register) {
            return Err(errno(libc::ENOMEM));
        }
        socket.write_interest = true;
        self.rearmed = socket.room > 0;
        Ok(())
    }

    fn shutdown(&mut self, socket: &mut Socket) -> io::Result<()> {
        if std::mem::replace(&mut socket.fin_sent, true) {
            self.fault.get_or_insert("a second FIN");
        }
        if socket.reset {
            Err(errno(libc::ENOTCONN))
        } else {
            Ok(())
        }
    }
}
