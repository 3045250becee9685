//! What the clients of a recording sent, as a script for the simulator.

use std::collections::BTreeMap;
use std::io;
use std::time::Duration;

use super::records::{bytes_of, error, Answer, Io, Kept, What};
use super::tape::{Tape, MAX_MADE};
use crate::error::Result;
use crate::record::format::Call;
use crate::record::values::Values;
use crate::sim::{Op, Script};

const MILLISECOND: u64 = 1_000_000;
/// A script has an op for each minute. Ten years are some 5 million.
const MAX_SPAN: Duration = Duration::from_secs(10 * 366 * 24 * 3600);

/// The script so far.
#[derive(Default)]
struct Made {
    ops: Vec<Op>,
    /// When the recording begins.
    start: u64,
    /// Up to when time has passed.
    time: u64,
    /// Number of bytes that may yet be made.
    room: usize,
    clients: BTreeMap<u32, Client>,
    count: usize,
}

struct Client {
    number: u16,
    /// Bytes that it has sent.
    sent: u64,
    /// It has finished or reset its connection.
    is_over: bool,
}

impl Made {
    /// Lets the time pass up to an operation, which has its iteration then.
    fn push(&mut self, time: u64, op: Op) -> Result<(), &'static str> {
        if u128::from(time.saturating_sub(self.start)) > MAX_SPAN.as_nanos() {
            return Err("a script lasts at most ten years");
        }
        let mut millis = time.saturating_sub(self.time) / MILLISECOND;
        self.time += millis * MILLISECOND;
        while millis > 0 {
            let part = u16::try_from(millis).unwrap_or(u16::MAX);
            self.ops.push(Op::Advance { millis: part });
            millis -= u64::from(part);
        }
        self.ops.push(op);
        self.ops.push(Op::Step);
        Ok(())
    }

    fn finish(
        &mut self,
        time: u64,
        stream: u32,
        end: impl FnOnce(u16) -> Op,
    ) -> Result<(), &'static str> {
        match self.clients.get_mut(&stream) {
            Some(client) if !client.is_over => {
                client.is_over = true;
                let op = end(client.number);
                self.push(time, op)
            }
            _ => Ok(()),
        }
    }
}

impl Tape {
    /// Returns what clients did as a script: they connect, send what was read from them, finish and
    /// reset, in the recorded order and at the recorded times, in whole milliseconds. Each read
    /// has an iteration of its own, so that the handler gets the same pieces.
    ///
    /// `takes` chooses connections: it gets the listener's number, in the order in which they were
    /// opened, and the connection's. A script is played against one listener. Connections that
    /// began before the part that is left are skipped ([`Tape::skipped`]); so are outgoing and
    /// adopted ones.
    ///
    /// A script does not repeat how slowly a client read, or which calls failed otherwise. An exact
    /// replay does ([`Replay`](super::Replay)).
    ///
    /// [`Script::shrink`] reduces the script to what a failure needs, and [`Script::to_test`]
    /// prints it.
    ///
    /// # Errors
    ///
    /// [`Error::Recording`](crate::Error::Recording) if the payloads are not in the file
    /// ([`Tape::filled`] provides them), or for more than 65,536 connections, ten years, or 256 MiB
    /// of provided payloads.
    pub fn script(&mut self, takes: impl FnMut(u32, u32) -> bool) -> Result<Script> {
        self.check_input()?;
        let ops = self.ops(takes).map_err(|problem| self.refused(problem))?;
        Ok(Script { ops })
    }

    fn ops(&mut self, mut takes: impl FnMut(u32, u32) -> bool) -> Result<Vec<Op>, &'static str> {
        let mut made = Made {
            start: self.start_time(),
            time: self.start_time(),
            room: MAX_MADE,
            ..Made::default()
        };
        let (mut at, mut time) = (0, self.start_time());
        while let Some(record) = self.record(at) {
            at = record.end;
            match record.what {
                What::Clock(_, clock) => time = clock.from(time),
                What::Call(Call::Accept, listener, Ok(answer)) => {
                    let Some(stream) = born(answer).filter(|stream| takes(listener, *stream))
                    else {
                        continue;
                    };
                    let number = u16::try_from(made.count).map_err(|_| {
                        "a script has at most 65,536 clients: choose some of the connections"
                    })?;
                    made.count += 1;
                    let client = Client {
                        number,
                        sent: 0,
                        is_over: false,
                    };
                    made.clients.insert(stream, client);
                    made.push(time, Op::Connect)?;
                }
                What::Io(io) if !io.is_write && io.taken == 0 => {
                    made.finish(time, io.stream, |client| Op::Finish { client })?;
                }
                What::Io(io) if !io.is_write => {
                    let Some(client) = made.clients.get_mut(&io.stream) else {
                        continue;
                    };
                    let (stream, length, kept) = (io.stream, io.taken, kept(&io));
                    let (number, before) = (client.number, client.sent);
                    client.sent += length as u64;
                    let bytes = match kept {
                        Some(bytes) => bytes,
                        None => {
                            // A record of eight bytes can announce 4 GiB.
                            let left = made.room.checked_sub(length);
                            made.room = left.ok_or(
                                "a script has at most 256 MiB of provided payloads: choose some \
                                 of the connections",
                            )?;
                            self.made_input(stream, before, length)
                        }
                    };
                    let client = number;
                    made.push(time, Op::Send { client, bytes })?;
                }
                What::Call(Call::Read | Call::Write | Call::Peek, stream, Err(code))
                    if is_final(&error(code)) =>
                {
                    made.finish(time, stream, |client| Op::Reset { client })?;
                }
                // Its number may be another connection's from here on.
                What::Call(Call::Close, stream, _) => {
                    made.clients.remove(&stream);
                }
                _ => {}
            }
        }
        Ok(made.ops)
    }

    /// Bytes of a read that the file does not hold.
    fn made_input(&mut self, connection: u32, before: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.fill(connection, before, &mut bytes);
        bytes
    }
}

fn born(answer: Answer<'_>) -> Option<u32> {
    Values(&answer.bytes()).number()
}

fn kept(io: &Io<'_>) -> Option<Vec<u8>> {
    match io.payload {
        Kept::Bytes(words) => Some(bytes_of(words, io.taken)),
        Kept::Hash(_) | Kept::Nothing => None,
    }
}

/// The peer is gone, or the network is.
fn is_final(error: &io::Error) -> bool {
    let passing = [libc::EAGAIN, libc::EINTR, libc::ENOMEM, libc::ENOBUFS];
    error
        .raw_os_error()
        .is_some_and(|errno| !passing.contains(&errno))
}
