//! One connection in virtual time: a peer and a kernel made of vectors around a [`Machine`].

mod closing;
mod custom;
mod cuts;
mod deadlines;
mod flow;
mod header;
mod life;
mod memory;
mod options;
mod replies;
mod throttle;
#[cfg(any(feature = "ring", feature = "aws-lc-rs"))]
pub(super) mod tls;

use std::collections::VecDeque;
use std::io;
use std::rc::Rc;
use std::time::Duration;

use super::framing::Codec;
use super::*;
use crate::reason::{CloseReason, Closed, Outcome};

/// More events or steps than any test has: an endless loop fails.
const SPIN: usize = 300_000;

/// An event of the handler's.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Seen {
    Header,
    Opened,
    Secured,
    Frame(Vec<u8>),
    BadInput(CloseReason),
    Finished,
    Writable,
    Flushed,
    Timer(u8),
    Drain,
}

impl From<Event<'_>> for Seen {
    fn from(event: Event<'_>) -> Self {
        match event {
            Event::Header => Self::Header,
            Event::Opened => Self::Opened,
            Event::Secured => Self::Secured,
            Event::Frame(frame) => Self::Frame(frame.to_vec()),
            Event::Unpacked(frame) => Self::Frame(frame),
            Event::BadInput(closed) => Self::BadInput(closed.reason),
            Event::Finished => Self::Finished,
            Event::Writable => Self::Writable,
            Event::Flushed => Self::Flushed,
            Event::Timer(key) => Self::Timer(key),
            Event::Drain => Self::Drain,
        }
    }
}

fn frame(payload: impl AsRef<[u8]>) -> Seen {
    Seen::Frame(payload.as_ref().to_vec())
}

/// The next result of a read.
#[derive(Debug)]
enum Input {
    Bytes(Vec<u8>),
    Fin,
    Error(i32),
}

/// A connection during a callback.
struct Turn<'a> {
    machine: &'a mut Machine,
    pool: &'a mut Pool,
    now: Time,
}

impl Turn<'_> {
    fn send(&mut self, payload: &[u8]) -> Result<(), SendError> {
        self.machine.send(payload, self.now, self.pool)
    }

    fn close(&mut self) {
        self.machine.close_by_handler(self.now, self.pool);
    }

    fn pause(&mut self) {
        self.machine.pause(self.now);
    }

    fn resume(&mut self) {
        self.machine.resume(self.now);
    }

    fn set_timer(&mut self, key: u8, after: Duration) {
        self.machine.set_timer(key, self.now.after(after));
    }
}

type Script = Box<dyn FnMut(&mut Turn<'_>, &Seen) -> Outcome>;

/// Sends frames back and closes when the peer finishes, as the default handler does.
fn echo(turn: &mut Turn<'_>, event: &Seen) -> Outcome {
    match event {
        Seen::Frame(payload) => turn.send(payload)?,
        Seen::Finished => turn.close(),
        Seen::Drain => turn.machine.close_after_input(),
        _ => {}
    }
    Ok(())
}

/// Does nothing.
fn silent(_: &mut Turn<'_>, _: &Seen) -> Outcome {
    Ok(())
}

/// Takes one frame, then pauses, as Erlang's `{active, once}`.
fn one_at_a_time(turn: &mut Turn<'_>, event: &Seen) -> Outcome {
    if matches!(event, Seen::Frame(_)) {
        turn.pause();
    }
    Ok(())
}

/// One connection with its peer and its kernel, driven as the reactor drives it.
struct Rig {
    machine: Machine,
    pool: Pool,
    now: Time,
    script: Script,
    /// The handler's events, in order.
    seen: Vec<Seen>,
    inbox: VecDeque<Input>,
    /// How many bytes the kernel still takes, and how many at once.
    room: usize,
    piece: usize,
    /// The errno of the next write.
    write_error: Option<i32>,
    /// Bytes that the kernel took for the peer.
    sent: Vec<u8>,
    /// FIN was sent.
    fin: bool,
    /// The socket is closed, with RST or without.
    gone: Option<bool>,
}

fn secs(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn limits() -> ConnConfig {
    ConnConfig {
        handshake_timeout: secs(10),
        frame_timeout: secs(30),
        idle_timeout: secs(120),
        write_timeout: secs(20),
        // A byte is worth a second.
        min_rate: 1,
        linger_timeout: secs(2),
        linger_bytes: 1000,
        high_watermark: 100,
        low_watermark: 10,
        output_limit: 200,
        full_duplex: false,
        max_frame: None,
        read_rate: None,
        frame_rate: None,
    }
}

/// All clocks off.
fn no_limits() -> ConnConfig {
    ConnConfig {
        handshake_timeout: Duration::MAX,
        frame_timeout: Duration::MAX,
        idle_timeout: Duration::MAX,
        write_timeout: Duration::MAX,
        min_rate: 500,
        linger_timeout: Duration::MAX,
        linger_bytes: usize::MAX,
        high_watermark: usize::MAX,
        low_watermark: usize::MAX,
        output_limit: usize::MAX,
        full_duplex: false,
        max_frame: None,
        read_rate: None,
        frame_rate: None,
    }
}

impl Rig {
    /// A connection that is accepted and not yet admitted.
    fn accepted(
        framing: &Framing,
        limits: ConnConfig,
        tls: Option<&TlsConfig>,
        script: Script,
    ) -> Self {
        let mut pool = Pool::default();
        Self {
            machine: Machine::new(framing, Rc::new(limits), tls, Time::ZERO, &mut pool),
            pool,
            now: Time::ZERO,
            script,
            seen: Vec::new(),
            inbox: VecDeque::new(),
            room: usize::MAX,
            piece: usize::MAX,
            write_error: None,
            sent: Vec::new(),
            fin: false,
            gone: None,
        }
    }

    /// A connection that is open, after `on_open`.
    fn open_with(
        framing: &Framing,
        limits: ConnConfig,
        script: impl FnMut(&mut Turn<'_>, &Seen) -> Outcome + 'static,
    ) -> Self {
        let mut rig = Self::accepted(framing, limits, None, Box::new(script));
        rig.machine.handle_admitted(rig.now);
        rig.turn();
        assert_eq!(rig.events(), [Seen::Opened]);
        rig
    }

    /// An open connection with packet-2 and the usual limits.
    fn open(script: impl FnMut(&mut Turn<'_>, &Seen) -> Outcome + 'static) -> Self {
        Self::open_with(&Framing::Packet2, limits(), script)
    }

    /// Receives bytes, in one piece.
    fn receive(&mut self, bytes: impl AsRef<[u8]>) {
        self.inbox.push_back(Input::Bytes(bytes.as_ref().to_vec()));
        self.turn();
    }

    fn receive_fin(&mut self) {
        self.inbox.push_back(Input::Fin);
        self.turn();
    }

    /// Gives the connection turns until there is nothing left to do.
    fn turn(&mut self) {
        for _ in 0..SPIN {
            if self.gone.is_some() {
                return;
            }
            let progress = self.read();
            self.flush();
            self.step();
            if !progress && !self.machine.has_events() {
                return self.machine.shrink(&mut self.pool);
            }
        }
        panic!("the turn does not end");
    }

    /// Reads once. True if another turn is due at once.
    fn read(&mut self) -> bool {
        if self.machine.has_events() {
            let staged = self.machine.begin_buffered();
            self.deliver(staged);
            return true;
        }
        if !self.machine.wants_read() {
            return false;
        }
        let room = self.machine.read_allowance(self.now);
        if room == 0 {
            return false;
        }
        let mut wire;
        let mut plain = Vec::new();
        if self.machine.has_stash() {
            let staged = self
                .machine
                .handle_stash(self.now, &mut plain, &mut self.pool);
            self.deliver(staged);
            return true;
        }
        let (staged, progress) = match self.inbox.pop_front() {
            Some(Input::Bytes(bytes)) => {
                wire = bytes;
                let rest = wire.split_off(wire.len().min(room));
                if !rest.is_empty() {
                    self.inbox.push_front(Input::Bytes(rest));
                }
                let staged =
                    self.machine
                        .handle_input(self.now, &mut wire, &mut plain, &mut self.pool);
                (staged, true)
            }
            Some(Input::Fin) => {
                self.machine.handle_eof(self.now, &mut self.pool);
                (InputCursor::nothing(), true)
            }
            Some(Input::Error(errno)) => {
                let error = io::Error::from_raw_os_error(errno);
                self.machine.handle_read_error(error, &mut self.pool);
                (InputCursor::nothing(), true)
            }
            None => {
                let fresh = self.machine.wants_fresh_blocked();
                self.machine.handle_blocked(&mut self.pool);
                (InputCursor::nothing(), fresh)
            }
        };
        self.deliver(staged);
        progress
    }

    fn deliver(&mut self, mut staged: InputCursor<'_>) {
        for _ in 0..SPIN {
            let Some(event) = self
                .machine
                .next_event(&mut staged, self.now, &mut self.pool)
            else {
                return self.machine.end_input(staged, self.now, &mut self.pool);
            };
            if let Event::BadInput(closed) = event {
                // Not recorded: the end tells it.
                let event = Seen::BadInput(closed.reason);
                self.run(|script, turn| script(turn, &event));
                self.machine.end_bad_input(closed, self.now, &mut self.pool);
                continue;
            }
            let event = Seen::from(event);
            if event == Seen::Header {
                self.seen.push(event);
                self.machine.handle_admitted(self.now);
                continue;
            }
            self.run(|script, turn| script(turn, &event));
            self.seen.push(event);
        }
        panic!("events without end");
    }

    /// Runs the handler outside a read: a message, or another connection's callback.
    fn act(&mut self, act: impl FnOnce(&mut Turn<'_>)) {
        self.run(|_, turn| {
            act(turn);
            Ok(())
        });
        self.turn();
    }

    fn close(&mut self) {
        self.machine.close_by_handler(self.now, &mut self.pool);
        self.turn();
    }

    fn pause(&mut self) {
        self.machine.pause(self.now);
        self.turn();
    }

    fn resume(&mut self) {
        self.machine.resume(self.now);
        self.turn();
    }

    fn run(&mut self, callback: impl FnOnce(&mut Script, &mut Turn<'_>) -> Outcome) {
        let mut turn = Turn {
            machine: &mut self.machine,
            pool: &mut self.pool,
            now: self.now,
        };
        if let Err(close) = callback(&mut self.script, &mut turn) {
            self.machine.close_as(close, self.now, &mut self.pool);
        }
    }

    fn flush(&mut self) {
        loop {
            let whole = self.machine.transmit(self.now, &mut self.pool);
            let bytes = match whole.map(<[u8]>::to_vec) {
                Some(bytes) if bytes.is_empty() => return,
                Some(bytes) => bytes,
                None => {
                    let mut pieces = [io::IoSlice::new(&[]); PIECES];
                    let count = self.machine.pieces(&mut pieces);
                    pieces[..count]
                        .iter()
                        .flat_map(|piece| piece.to_vec())
                        .collect()
                }
            };
            if let Some(errno) = self.write_error {
                let error = io::Error::from_raw_os_error(errno);
                return self
                    .machine
                    .handle_write_error(error, false, self.now, &mut self.pool);
            }
            let count = bytes.len().min(self.room).min(self.piece);
            if count == 0 {
                return self.machine.handle_unsent(self.now);
            }
            self.sent.extend_from_slice(&bytes[..count]);
            self.room -= count;
            self.machine.handle_sent(count, self.now, &mut self.pool);
        }
    }

    fn step(&mut self) {
        if self.machine.next_step() == NextStep::Shutdown {
            assert!(!self.fin, "one FIN is enough");
            self.fin = true;
            self.machine.handle_shutdown(self.now, true);
        }
        match self.machine.next_step() {
            NextStep::Gone { reset } => self.gone = Some(reset),
            NextStep::Wait => {}
            NextStep::Shutdown => panic!("FIN is sent already"),
        }
    }

    /// Lets the kernel take `count` bytes more.
    fn drain_to_peer(&mut self, count: usize) {
        self.room += count;
        self.turn();
    }

    /// Advances the clock; deadlines on the way expire at their times.
    fn pass(&mut self, span: Duration) {
        let end = self.now.after(span);
        for _ in 0..SPIN {
            let deadline = self.machine.deadline();
            if self.gone.is_some() || deadline > end {
                self.now = end;
                return;
            }
            self.now = self.now.max(deadline);
            self.expire();
        }
        panic!("a deadline that stays due");
    }

    /// Expires deadlines up to now.
    fn expire(&mut self) {
        self.machine
            .handle_timeout(self.now, self.now, &mut self.pool);
        self.turn();
    }

    /// Returns the handler's events since the last call.
    fn events(&mut self) -> Vec<Seen> {
        std::mem::take(&mut self.seen)
    }

    /// Returns the bytes for the peer since the last call.
    fn answers(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.sent)
    }

    #[track_caller]
    fn is_open(&self) -> bool {
        self.gone.is_none() && self.machine.state() == State::Open
    }

    /// Returns why the socket was closed, without RST.
    #[track_caller]
    fn ended(&mut self) -> CloseReason {
        assert_eq!(self.gone, Some(false), "closed in order");
        self.machine.take_closed().reason
    }

    /// Returns why the socket was reset.
    #[track_caller]
    fn was_reset(&mut self) -> CloseReason {
        assert_eq!(self.gone, Some(true), "reset");
        self.machine.take_closed().reason
    }

    /// Lets the peer finish too, and returns the reason of the orderly end.
    #[track_caller]
    fn finish(&mut self) -> CloseReason {
        assert!(self.fin, "FIN is sent");
        assert_eq!(self.machine.state(), State::Closing);
        if self.gone.is_none() {
            self.receive_fin();
        }
        self.ended()
    }
}

/// Returns a packet-2 frame as on the wire.
fn packet2(payload: impl AsRef<[u8]>) -> Vec<u8> {
    let payload = payload.as_ref();
    let mut wire = u16::try_from(payload.len())
        .expect("fits")
        .to_be_bytes()
        .to_vec();
    wire.extend_from_slice(payload);
    wire
}
