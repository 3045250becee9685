//! The bytes of a detached connection, between its client and its stream.

use std::io::{self, Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use super::socket::SimSocket;

/// A detached connection. Its stream is one end of a real socket pair.
pub(super) struct Relay {
    /// The number of the simulated socket.
    pub(super) index: usize,
    /// The simulator's end.
    pub(super) end: UnixStream,
}

impl Relay {
    /// Moves bytes in both directions. False if there is no more to move.
    pub(super) fn carry(&mut self, socket: &mut SimSocket) -> bool {
        if socket.error.is_some() || !self.carry_output(socket) || !self.carry_input(socket) {
            // Reads of the stream end, and writes fail.
            let _ = self.end.shutdown(Shutdown::Both);
            return false;
        }
        !(socket.fin && socket.server_finished)
    }

    /// From the client to the stream. False if the stream is closed.
    fn carry_input(&mut self, socket: &mut SimSocket) -> bool {
        socket.arrive();
        while !socket.received.is_empty() {
            let (bytes, _) = socket.received.as_slices();
            let count = match self.end.write(bytes) {
                Ok(count) => count.min(bytes.len()),
                Err(error) if is_for_later(&error) => return true,
                Err(_) => return false,
            };
            socket.received.drain(..count);
            socket.arrive();
        }
        if socket.fin {
            let _ = self.end.shutdown(Shutdown::Write);
        }
        true
    }

    /// From the stream to the client. False if the stream was closed with unread input.
    fn carry_output(&mut self, socket: &mut SimSocket) -> bool {
        let mut buffer = [0; 4096];
        loop {
            socket.reach();
            let room = socket.room().min(buffer.len());
            let Some(buffer) = buffer.get_mut(..room).filter(|buffer| !buffer.is_empty()) else {
                return true;
            };
            match self.end.read(buffer) {
                Ok(0) => {
                    socket.server_finished = true;
                    return true;
                }
                Ok(count) => socket.sent.extend(buffer.get(..count).unwrap_or_default()),
                Err(error) if is_for_later(&error) => return true,
                Err(_) => {
                    socket.server_reset = true;
                    socket.sent.clear();
                    return false;
                }
            }
        }
    }
}

fn is_for_later(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
    )
}

/// More than the receive buffer of a socket has.
const MAX_AVAILABLE: u64 = 16 * 1024 * 1024;

/// Reads the bytes that a socket has received. True if its end is behind them.
pub(super) fn read_available(stream: &UnixStream, bytes: &mut Vec<u8>) -> io::Result<bool> {
    stream.set_nonblocking(true)?;
    match stream.take(MAX_AVAILABLE).read_to_end(bytes) {
        Ok(_) => Ok((bytes.len() as u64) < MAX_AVAILABLE),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
        Err(error) => Err(error),
    }
}
