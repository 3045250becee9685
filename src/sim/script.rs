//! Scripts for clients and the world: drawn from a seed, made by a fuzzer, or shrunk.

use std::net::SocketAddr;
use std::time::Duration;

use super::faults::{Call, Scripted};
use super::{ClientId, Sim, Violation};
use crate::id::ConnId;

/// One operation. Clients and connections are named by number, modulo their count.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Op {
    /// A client connects.
    Connect,
    /// A client sends bytes.
    Send {
        /// Which client.
        client: u16,
        /// The bytes.
        bytes: Vec<u8>,
    },
    /// A client finishes sending.
    Finish {
        /// Which client.
        client: u16,
    },
    /// A client resets its connection.
    Reset {
        /// Which client.
        client: u16,
    },
    /// A client starts or stops reading.
    Read {
        /// Which client.
        client: u16,
        /// Whether it reads.
        on: bool,
    },
    /// The server's send buffer for a client changes its size.
    SendBuffer {
        /// Which client.
        client: u16,
        /// Its new size in bytes.
        bytes: u16,
    },
    /// One iteration of the loop.
    Step,
    /// Time passes.
    Advance {
        /// The time.
        millis: u16,
    },
    /// One system call fails.
    Fail {
        /// Which call, by number.
        call: u8,
        /// Number of such calls before it.
        after: u8,
        /// Which of its errors, by number.
        error: u8,
    },
    /// Descriptors that the process may have open, beyond those it has open now; 255 is no limit.
    Descriptors {
        /// The number.
        more: u8,
    },
    /// A command from outside kills a connection.
    Kill {
        /// Which of the open ones.
        connection: u8,
    },
    /// Another thread sends a frame to a connection.
    Push {
        /// Which of the open ones.
        connection: u8,
        /// The frame.
        frame: Vec<u8>,
    },
    /// Another thread notifies a connection (with the message `()`).
    Notify {
        /// Which of the open ones.
        connection: u8,
    },
    /// The cap changes.
    Cap {
        /// The new one.
        connections: u8,
    },
    /// All listeners are suspended or resumed.
    Suspend {
        /// Whether they are suspended.
        on: bool,
    },
    /// The server drains.
    Drain {
        /// The grace period.
        millis: u16,
    },
}

/// A list of [`Op`]s.
///
/// A fuzzer makes scripts of its inputs. A fuzz target for a handler of your own is five lines:
///
/// ```text
/// fuzz_target!(|input: &[u8]| {
///     let mut sim = Sim::new(0, Config::new(), ());
///     let listen = Listen::tcp("127.0.0.1:0", Framing::Line); // as in your program
///     let addr = sim.listen(listen, |_app, _peer| MyHandler::default()).unwrap();
///     sim.play(addr, &Script::from_bytes(input));
/// });
/// ```
///
/// [`Script::to_bytes`] makes seeds for its corpus.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Script {
    /// The operations, in order.
    pub ops: Vec<Op>,
}

impl Op {
    fn bytes_mut(&mut self) -> Option<&mut Vec<u8>> {
        match self {
            Self::Send { bytes, .. } => Some(bytes),
            Self::Push { frame, .. } => Some(frame),
            _ => None,
        }
    }

    fn client_mut(&mut self) -> Option<&mut u16> {
        match self {
            Self::Send { client, .. }
            | Self::Finish { client }
            | Self::Reset { client }
            | Self::Read { client, .. }
            | Self::SendBuffer { client, .. } => Some(client),
            _ => None,
        }
    }
}

impl Script {
    /// Returns the smallest script that can be found for which `fails` is still true, by leaving
    /// out clients, then ops, then bytes: see [`shrink`]. Pieces that a client sends in a row
    /// become one. Each try needs a world of its own.
    ///
    /// ```
    /// use portcullis::sim::{Op, Script, Sim, Violation};
    /// use portcullis::{CloseReason, Config, Context, Framing, Handler, Listen, Outcome};
    ///
    /// struct Fragile;
    /// impl Handler for Fragile {
    ///     fn on_frame(&mut self, _: &mut Context<'_>, frame: &[u8]) -> Outcome {
    ///         if frame.contains(&b'!') {
    ///             return Err(portcullis::Close::because("fragile"));
    ///         }
    ///         Ok(())
    ///     }
    /// }
    ///
    /// let fails = |script: &Script| {
    ///     let mut sim = Sim::new(0, Config::new(), ());
    ///     let listen = Listen::tcp("127.0.0.1:0", Framing::Line);
    ///     let addr = sim.listen(listen, |_: &mut (), _| Fragile).unwrap();
    ///     let unbroken = |sim: &mut Sim, _: &[_]| match sim.stats().closed(CloseReason::Failed) {
    ///         0 => Ok(()),
    ///         _ => Err(Violation::new("it broke")),
    ///     };
    ///     sim.try_play(addr, script, unbroken).is_err()
    /// };
    /// let send = |bytes: &[u8]| Op::Send { client: 0, bytes: bytes.to_vec() };
    /// let (finish, advance) = (Op::Finish { client: 0 }, Op::Advance { millis: 9000 });
    /// let sends = [Op::Connect, send(b"hello\n"), Op::Step, send(b"hey! you\n"), Op::Step];
    /// let long = Script { ops: sends.into_iter().chain([finish, advance]).collect() };
    /// assert!(fails(&long));
    /// let short = long.shrink(fails);
    /// assert_eq!(short.ops[..2], [Op::Connect, send(b"!\n")]);
    /// ```
    #[must_use]
    pub fn shrink(&self, mut fails: impl FnMut(&Self) -> bool) -> Self {
        let connects = self.ops.iter().filter(|op| **op == Op::Connect).count();
        let clients: Vec<usize> = (0..connects).collect();
        let needed = shrink(&clients, |some| fails(&self.only(some)));
        let mut some = self.only(&needed);
        // A number means another client where a connect was refused, or the caller has connected.
        if !fails(&some) {
            some.clone_from(self);
        }
        let ops = shrink(&some.ops, |ops| fails(&Self { ops: ops.to_vec() }));
        let mut smallest = Self { ops }.merged(&mut fails);
        for at in 0..smallest.ops.len() {
            let Some(bytes) = smallest.ops.get_mut(at).and_then(Op::bytes_mut).cloned() else {
                continue;
            };
            let with = |shorter: &[u8]| {
                let mut script = smallest.clone();
                if let Some(bytes) = script.ops.get_mut(at).and_then(Op::bytes_mut) {
                    *bytes = shorter.to_vec();
                }
                script
            };
            let lines: Vec<&[u8]> = bytes.split_inclusive(|byte| *byte == b'\n').collect();
            let bytes = match lines.len() {
                0 | 1 => bytes,
                _ => shrink(&lines, |lines| fails(&with(&lines.concat()))).concat(),
            };
            let bytes = shrink(&bytes, |shorter| fails(&with(shorter)));
            let shortest = shrink_runs(bytes, |shorter| fails(&with(shorter)));
            smallest = with(&shortest);
        }
        smallest
    }
}

impl Script {
    /// Makes one piece of the pieces that a client sends in a row, where that still fails.
    fn merged(mut self, fails: &mut impl FnMut(&Self) -> bool) -> Self {
        let mut at = 1;
        while at < self.ops.len() {
            let mut shorter = self.clone();
            let second = shorter.ops.remove(at);
            let first = shorter.ops.get_mut(at - 1);
            let joined = match (first, second) {
                (
                    Some(Op::Send { client, bytes }),
                    Op::Send {
                        client: other,
                        bytes: more,
                    },
                ) if *client == other => {
                    bytes.extend(more);
                    true
                }
                _ => false,
            };
            if joined && fails(&shorter) {
                self = shorter;
            } else {
                at += 1;
            }
        }
        self
    }

    /// Leaves out all clients but these, in ascending order of their connects.
    fn only(&self, clients: &[usize]) -> Self {
        let mut connected = 0;
        let mut ops = Vec::new();
        for op in &self.ops {
            let mut op = op.clone();
            if op == Op::Connect {
                connected += 1;
                if clients.binary_search(&(connected - 1)).is_err() {
                    continue;
                }
            } else if let Some(client) = op.client_mut() {
                let number = usize::from(*client) % connected.max(1);
                match clients.binary_search(&number) {
                    Ok(number) => *client = u16::try_from(number).unwrap_or(u16::MAX),
                    Err(_) => continue,
                }
            }
            ops.push(op);
        }
        Self { ops }
    }
}

/// Returns the shortest list that can be found, by leaving items out, for which `fails` is still
/// true.
///
/// Leaves out runs of half the length, then a quarter, down to single items, again and again until
/// nothing helps (delta debugging, Zeller 1999). `fails(items)` should be true.
pub fn shrink<T: Clone>(items: &[T], mut fails: impl FnMut(&[T]) -> bool) -> Vec<T> {
    let mut smallest = items.to_vec();
    let mut run = smallest.len().div_ceil(2);
    while run > 0 {
        let mut at = 0;
        let mut helped = false;
        while at < smallest.len() {
            let mut shorter = smallest.clone();
            shorter.drain(at..(at + run).min(smallest.len()));
            if fails(&shorter) {
                smallest = shorter;
                helped = true;
            } else {
                at += run;
            }
        }
        if !helped || run > 1 {
            run /= 2;
        }
    }
    smallest
}

/// Leaves out runs of a few bytes wherever they begin: words and small frames.
fn shrink_runs(mut bytes: Vec<u8>, mut fails: impl FnMut(&[u8]) -> bool) -> Vec<u8> {
    const MAX_RUN: usize = 16;
    const MAX_BYTES: usize = 512;
    if bytes.len() > MAX_BYTES {
        return bytes;
    }
    for run in (2..=MAX_RUN).rev() {
        let mut at = 0;
        while at + run <= bytes.len() {
            let mut shorter = bytes.clone();
            shorter.drain(at..at + run);
            if fails(&shorter) {
                bytes = shorter;
            } else {
                at += 1;
            }
        }
    }
    bytes
}

impl<A> Sim<A> {
    /// Plays a script against one listener and then lets an hour pass, so that every deadline
    /// fires. Returns the clients, in the order in which they connected.
    ///
    /// # Panics
    ///
    /// If an invariant is broken, with the seed.
    #[track_caller]
    pub fn play(&mut self, addr: SocketAddr, script: &Script) -> Vec<ClientId> {
        let played = self
            .try_play(addr, script, |_, _| Ok(()))
            .and_then(|clients| {
                self.try_advance(Duration::from_secs(3600))
                    .map(|()| clients)
            });
        match played {
            Ok(clients) => clients,
            Err(violation) => panic!("{violation} (seed {})", self.seed()),
        }
    }

    /// Plays a script, and calls `after` with the clients after each op. Unlike [`Sim::play`] it
    /// lets no time pass at the end: [`Sim::try_advance`] does.
    ///
    /// # Errors
    ///
    /// The first invariant that is broken, or the first error of `after`.
    pub fn try_play(
        &mut self,
        addr: SocketAddr,
        script: &Script,
        mut after: impl FnMut(&mut Self, &[ClientId]) -> Result<(), Violation>,
    ) -> Result<Vec<ClientId>, Violation> {
        let mut clients = Vec::new();
        for op in &script.ops {
            match op {
                Op::Connect => clients.extend(self.connect(addr)),
                op => self.try_perform(addr, &clients, op)?,
            }
            after(self, &clients)?;
        }
        Ok(clients)
    }

    /// Executes one operation. The client of an [`Op::Connect`] is not returned.
    ///
    /// # Errors
    ///
    /// The first invariant that is broken.
    pub fn try_perform(
        &mut self,
        addr: SocketAddr,
        clients: &[ClientId],
        op: &Op,
    ) -> Result<(), Violation> {
        match op {
            Op::Connect => {
                self.connect(addr);
            }
            Op::Send { client, bytes } => {
                if let Some(client) = one_of(clients, usize::from(*client)) {
                    self.send(client, bytes);
                }
            }
            Op::Finish { client } => {
                if let Some(client) = one_of(clients, usize::from(*client)) {
                    self.finish(client);
                }
            }
            Op::Reset { client } => {
                if let Some(client) = one_of(clients, usize::from(*client)) {
                    self.reset(client);
                }
            }
            Op::Read { client, on } => {
                if let Some(client) = one_of(clients, usize::from(*client)) {
                    self.set_reading(client, *on);
                }
            }
            Op::SendBuffer { client, bytes } => {
                if let Some(client) = one_of(clients, usize::from(*client)) {
                    self.set_send_buffer(client, usize::from(*bytes));
                }
            }
            Op::Step => self.try_step()?,
            Op::Advance { millis } => {
                self.try_advance(Duration::from_millis(u64::from(*millis)))?
            }
            Op::Fail { call, after, error } => {
                if let Some(call) = one_of(Call::ALL, usize::from(*call)) {
                    if let Some(errno) = one_of(call.errors(), usize::from(*error)) {
                        let after = usize::from(*after);
                        self.add_fault(Scripted { call, after, errno });
                    }
                }
            }
            Op::Descriptors { more: u8::MAX } => self.set_descriptor_limit(usize::MAX),
            Op::Descriptors { more } => {
                self.set_descriptor_limit(self.descriptors() + usize::from(*more))
            }
            Op::Kill { connection } => {
                if let Some(id) = self.connection(*connection) {
                    self.control().kill(id);
                }
            }
            Op::Push { connection, frame } => {
                if let Some(id) = self.connection(*connection) {
                    // Refused when the queue is full, which is a valid result too.
                    let _ = self.handle().send(id, frame.clone());
                }
            }
            Op::Notify { connection } => {
                if let Some(id) = self.connection(*connection) {
                    let _ = self.handle().notify(id, ());
                }
            }
            Op::Cap { connections } => {
                // A u8 is never above the limit.
                let _ = self
                    .control()
                    .reconfigure(|config| config.max_connections = usize::from(*connections));
            }
            Op::Suspend { on } => {
                for listener in self.control().listeners() {
                    let mut control = self.control();
                    // The connection exists: nothing has run since it was listed.
                    let _ = if *on {
                        control.suspend(listener.id)
                    } else {
                        control.resume(listener.id)
                    };
                }
            }
            Op::Drain { millis } => self
                .control()
                .drain(Duration::from_millis(u64::from(*millis))),
        }
        Ok(())
    }

    fn connection(&mut self, number: u8) -> Option<ConnId> {
        let ids: Vec<ConnId> = self
            .control()
            .connections()
            .iter()
            .map(|info| info.id)
            .collect();
        one_of(&ids, usize::from(number))
    }
}

fn one_of<T: Copy>(choices: &[T], number: usize) -> Option<T> {
    choices.get(number % choices.len().max(1)).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shrinking_keeps_what_fails_and_nothing_else() {
        let mut ops = vec![Op::Step; 100];
        ops[17] = Op::Connect;
        ops[71] = Op::Finish { client: 3 };
        let fails = |script: &Script| {
            let connect = script.ops.iter().position(|op| *op == Op::Connect);
            let finish = script
                .ops
                .iter()
                .position(|op| matches!(op, Op::Finish { .. }));
            matches!((connect, finish), (Some(first), Some(second)) if first < second)
        };
        let smallest = Script { ops }.shrink(fails);
        assert_eq!(smallest.ops, [Op::Connect, Op::Finish { client: 0 }]);
    }

    /// Numbers of clients may mean those that the caller has connected.
    #[test]
    fn a_shrunk_script_fails_whatever_its_clients_are() {
        let send = Op::Send {
            client: 0,
            bytes: b"x".to_vec(),
        };
        let ops = vec![Op::Step, send.clone(), Op::Step];
        let smallest = Script { ops }.shrink(|script| script.ops.contains(&send));
        assert_eq!(smallest.ops, [send]);
    }

    #[test]
    fn shrinking_leaves_out_whole_clients_and_joins_pieces() {
        let send = |client, bytes: &[u8]| Op::Send {
            client,
            bytes: bytes.to_vec(),
        };
        let mut ops = vec![Op::Connect; 300];
        for client in 0..300 {
            ops.extend([
                send(client, b"hello "),
                Op::Step,
                send(client, b"you"),
                Op::Step,
            ]);
        }
        ops.push(send(299, b"!"));
        // The last client says so at the end, in any pieces.
        let fails = |script: &Script| {
            let clients = script.ops.iter().filter(|op| **op == Op::Connect).count();
            let mut said = Vec::new();
            for op in &script.ops {
                if let Op::Send { client, bytes } = op {
                    if usize::from(*client) + 1 == clients {
                        said.extend(bytes);
                    }
                }
            }
            said.ends_with(b"ou!")
        };
        let smallest = Script { ops }.shrink(fails);
        assert_eq!(smallest.ops, [Op::Connect, send(0, b"ou!")]);
    }
}
