//! One connection, sans-IO: bytes and `now` go in, events and bytes come out. No fd, no clock, no system call.
//!
//! The reactor calls, for each turn of a connection:
//!
//! 1. [`Machine::handle_input`], [`Machine::handle_eof`], [`Machine::handle_blocked`] or
//!    [`Machine::handle_read_error`] with what a read brought; or [`Machine::stage_held`] for what waits already;
//! 2. [`Machine::next_event`] until it is `None`, calling the handler for each, then [`Machine::settle`];
//! 3. [`Machine::transmit`] and [`Machine::handle_sent`] until nothing waits or the kernel takes no more;
//! 4. [`Machine::next_step`] for what else the socket needs, and [`Machine::deadline`] for when to come back
//!    ([`Machine::handle_timeout`]).

mod deadline;
mod framing;
mod outbox;
mod pool;
#[cfg_attr(not(feature = "tls"), path = "no_tls.rs")]
pub(crate) mod tls;

use std::error::Error as StdError;
use std::fmt;
use std::io;
use std::rc::Rc;
use std::time::Duration;

use crate::reason::{Close, CloseReason, Closed};
use deadline::Deadlines;
pub(crate) use deadline::Time;
use framing::{Codec, EncodeError, Step};
pub use framing::{Decoded, FrameBuf, FrameError, Framer, FramerFactory, Framing};
use outbox::Outbox;
pub(crate) use pool::Pool;
pub(crate) use tls::TlsConfig;

/// Where a connection is in its life.
///
/// ```text
/// Accepting ----> Handshaking ----> Open ----> Closing ----> (gone: one CloseReason)
///     |                |                          ^
///     +----------------+--------------------------+
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum State {
    /// Accepted; the service has not answered yet.
    Accepting,
    /// In the TLS handshake.
    Handshaking,
    /// Frames flow.
    Open,
    /// Flushing, saying goodbye, waiting for the peer's end.
    Closing,
}

impl State {
    /// The legal transitions, all of them.
    const fn may_become(self, next: Self) -> bool {
        matches!(
            (self, next),
            (Self::Accepting, Self::Handshaking | Self::Open | Self::Closing)
                | (Self::Handshaking, Self::Open | Self::Closing)
                | (Self::Open, Self::Closing)
        )
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// The limits of one listener's connections. `Duration::MAX` is never.
#[derive(Clone, Debug)]
pub(crate) struct Limits {
    pub(crate) handshake_timeout: Duration,
    pub(crate) frame_timeout: Duration,
    pub(crate) idle_timeout: Duration,
    pub(crate) write_timeout: Duration,
    pub(crate) linger_timeout: Duration,
    pub(crate) linger_bytes: usize,
    pub(crate) high_watermark: usize,
    pub(crate) low_watermark: usize,
    pub(crate) output_limit: usize,
    /// `None`: the framing's own default.
    pub(crate) max_frame: Option<usize>,
}

/// Bytes and frames that one connection carried. Bytes are those on the wire, ciphertext over TLS.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Traffic {
    /// Bytes read from the peer.
    pub bytes_in: u64,
    /// Bytes that the kernel took for the peer.
    pub bytes_out: u64,
    /// Frames given to the handler.
    pub frames_in: u64,
    /// Frames accepted by `send`.
    pub frames_out: u64,
}

/// Why [`Conn::send`](crate::Conn::send) did not take a frame. Nothing of it was queued.
#[derive(Debug)]
#[non_exhaustive]
pub enum SendError {
    /// The connection is closing or gone; it takes no more.
    Closed,
    /// The peer is too slow: what waits for it has reached the output limit. Wait for
    /// [`Handler::on_writable`](crate::Handler::on_writable), or close.
    Full {
        /// Bytes that wait.
        queued: usize,
        /// The listener's output limit.
        limit: usize,
    },
    /// The payload is longer than the framing's header can say.
    FrameTooLarge {
        /// The payload's length.
        length: usize,
        /// The longest payload that can be sent.
        max: usize,
    },
    /// The connection's [`Framer`] refused the payload.
    Refused(FrameError),
}

impl fmt::Display for SendError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Closed => f.write_str("the connection is closing"),
            Self::Full { queued, limit } => {
                write!(f, "{queued} bytes wait already, the output limit is {limit}")
            }
            Self::FrameTooLarge { length, max } => {
                write!(
                    f,
                    "a frame of {length} bytes cannot be sent, the framing's maximum is {max}"
                )
            }
            Self::Refused(error) => write!(f, "the framing refused the frame: {error}"),
        }
    }
}

impl StdError for SendError {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        match self {
            Self::Refused(error) => Some(error),
            _ => None,
        }
    }
}

/// What the handler is to be told next.
#[derive(Debug)]
pub(crate) enum Event<'a> {
    Opened,
    Frame(&'a [u8]),
    /// The peer finished sending, at the end of a frame.
    Finished,
    /// Output fell from above the high watermark to the low one.
    Writable,
    Timer(u8),
    Drain,
}

/// What the socket needs besides reading and writing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NextStep {
    /// Nothing.
    Wait,
    /// Everything is flushed: shut the writing half down, then [`Machine::handle_shutdown`].
    Shutdown,
    /// It is over: close the socket, with RST if `reset`.
    Gone { reset: bool },
}

/// How far a closing connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Farewell {
    /// Not closing.
    None,
    /// Output still waits.
    Flush,
    /// FIN is due.
    Shutdown,
    /// FIN is sent; input is discarded until the peer's.
    Linger,
    Gone {
        reset: bool,
    },
}

macro_rules! flags {
    ($($(#[$doc:meta])* $name:ident = $bit:literal;)*) => {
        /// One bit per fact about a connection.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
        struct Flags(u16);

        impl Flags {
            $($(#[$doc])* const $name: Self = Self(1 << $bit);)*

            fn has(self, flag: Self) -> bool {
                self.0 & flag.0 != 0
            }

            fn set(&mut self, flag: Self) {
                self.0 |= flag.0;
            }

            fn clear(&mut self, flag: Self) {
                self.0 &= !flag.0;
            }

            fn take(&mut self, flag: Self) -> bool {
                let had = self.has(flag);
                self.clear(flag);
                had
            }
        }
    };
}

flags! {
    /// TCP's end of stream was read.
    EOF = 0;
    /// The handler was told that the peer finished.
    FINISH_TOLD = 1;
    /// The handler paused reading.
    PAUSED = 2;
    /// Output is above the high watermark, or has not come down to the low one yet.
    CONGESTED = 3;
    /// What is held may contain a whole frame: decoding stopped for another reason than "more".
    HELD_FRAMES = 4;
    /// `on_open` is due.
    TELL_OPENED = 5;
    /// `on_writable` is due.
    TELL_WRITABLE = 6;
    /// `on_drain` is due.
    TELL_DRAIN = 7;
    /// The server drains.
    DRAINING = 8;
    /// Close once everything that has arrived is answered.
    CLOSE_AFTER_INPUT = 9;
    /// A read since CLOSE_AFTER_INPUT found the kernel's buffer empty.
    DRY = 10;
    /// The kernel refused a write for good: nothing more can be sent, but what arrived can be read.
    WRITE_DEAD = 11;
    /// The handler was told `on_open`.
    WAS_OPEN = 12;
}

/// Bytes on their way through the decoder: this turn's read, or what was held, or both joined.
pub(crate) struct Staged<'a> {
    fresh: &'a [u8],
    /// Used instead of `fresh` if it is not empty.
    joined: Vec<u8>,
    at: usize,
    /// A frame was completed, so what is left began later than what was held.
    advanced: bool,
}

impl<'a> Staged<'a> {
    pub(crate) fn nothing() -> Self {
        Self::fresh(&[])
    }

    fn fresh(fresh: &'a [u8]) -> Self {
        Self {
            fresh,
            joined: Vec::new(),
            at: 0,
            advanced: false,
        }
    }

    fn bytes(&self) -> &[u8] {
        if self.joined.is_empty() {
            self.fresh
        } else {
            &self.joined
        }
    }

    fn rest(&self) -> &[u8] {
        self.bytes().get(self.at..).unwrap_or_default()
    }
}

/// A handler's timer: a key of its own choice and when it is due.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Timer {
    key: u8,
    at: Time,
}

/// The peer's clocks, stopped: since when, and where they stood.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Stopped {
    at: Time,
    frame: Time,
    idle: Time,
}

/// The state machine of one connection.
pub(crate) struct Machine {
    state: State,
    farewell: Farewell,
    flags: Flags,
    limits: Rc<Limits>,
    codec: Codec,
    tls: Option<Box<tls::Session>>,
    /// Undecoded input: an incomplete frame, or what waits while reading is paused.
    held: Vec<u8>,
    /// How much of `held` is decoded already.
    held_at: usize,
    /// What the handler sent; over TLS still to be encrypted.
    outbox: Outbox,
    deadlines: Deadlines,
    /// While reading is paused.
    stopped: Option<Stopped>,
    timers: Vec<Timer>,
    /// Deadlines and timers up to here have been judged.
    judged: Time,
    last_input: Time,
    discarded: usize,
    traffic: Traffic,
    closed: Option<Closed>,
}

impl Machine {
    pub(crate) fn new(framing: &Framing, limits: Rc<Limits>, tls: Option<&TlsConfig>, now: Time) -> Self {
        let max = limits.max_frame.unwrap_or(framing.default_max());
        let mut deadlines = Deadlines::none();
        deadlines.stage = now.after(limits.handshake_timeout);
        Self {
            state: State::Accepting,
            farewell: Farewell::None,
            flags: Flags::default(),
            codec: Codec::new(framing, max),
            tls: tls.map(|config| Box::new(tls::Session::new(config))),
            held: Vec::new(),
            held_at: 0,
            outbox: Outbox::default(),
            deadlines,
            stopped: None,
            timers: Vec::new(),
            judged: Time::ZERO,
            last_input: now,
            discarded: 0,
            traffic: Traffic::default(),
            closed: None,
            limits,
        }
    }

    // --- what the socket brought ---

    /// The service accepted the peer.
    pub(crate) fn handle_admitted(&mut self, now: Time) {
        if self.tls.is_some() {
            self.enter(State::Handshaking);
        } else {
            self.open(now);
        }
    }

    /// Bytes were read. `plain` is scratch space for what TLS decrypts.
    pub(crate) fn handle_input<'a>(
        &mut self,
        now: Time,
        wire: &'a mut [u8],
        plain: &'a mut Vec<u8>,
        pool: &mut Pool,
    ) -> Staged<'a> {
        self.traffic.bytes_in += wire.len() as u64;
        pool.traffic.bytes_in += wire.len() as u64;
        self.last_input = now;
        if self.state == State::Closing {
            self.discarded = self.discarded.saturating_add(wire.len());
            if self.farewell == Farewell::Linger && self.discarded > self.limits.linger_bytes {
                self.farewell = Farewell::Gone { reset: false };
            }
            return Staged::nothing();
        }
        if self.deadlines.idle.is_armed() {
            self.deadlines.idle = now.after(self.limits.idle_timeout);
        }
        let fresh: &'a [u8] = match &mut self.tls {
            None => wire,
            Some(session) => {
                plain.clear();
                session.receive(wire, plain, pool);
                let (open, failed) = (!session.is_handshaking(), session.has_failed());
                match (self.state, open) {
                    (State::Handshaking, true) => self.open(now),
                    (State::Handshaking, false) if failed => self.fail_handshake(now, pool),
                    _ => {}
                }
                if self.state == State::Open && failed {
                    self.fail_tls(pool);
                }
                plain
            }
        };
        self.stage(fresh)
    }

    /// Puts what is held in front of `fresh`.
    fn stage<'a>(&mut self, fresh: &'a [u8]) -> Staged<'a> {
        if self.held.is_empty() {
            return Staged::fresh(fresh);
        }
        self.flags.clear(Flags::HELD_FRAMES);
        let mut joined = std::mem::take(&mut self.held);
        joined.extend_from_slice(fresh);
        Staged {
            fresh: &[],
            joined,
            at: std::mem::take(&mut self.held_at),
            advanced: false,
        }
    }

    /// What waits to be decoded without a read, or only events that wait.
    pub(crate) fn stage_held(&mut self) -> Staged<'static> {
        if self.flags.has(Flags::HELD_FRAMES) && !self.is_paused() {
            self.stage(&[])
        } else {
            Staged::nothing()
        }
    }

    /// The peer's FIN was read.
    pub(crate) fn handle_eof(&mut self, now: Time, pool: &mut Pool) {
        self.flags.set(Flags::EOF);
        match self.state {
            State::Accepting | State::Handshaking => {
                self.fail_handshake(now, pool);
            }
            State::Open => self.flags.set(Flags::DRY),
            State::Closing if self.farewell == Farewell::Linger => {
                self.farewell = Farewell::Gone { reset: false };
            }
            State::Closing => {}
        }
    }

    /// A read found the kernel's buffer empty.
    pub(crate) fn handle_blocked(&mut self, pool: &mut Pool) {
        if self.flags.has(Flags::WRITE_DEAD) {
            self.end(Closed::new(CloseReason::Reset), pool);
        } else if self.flags.has(Flags::CLOSE_AFTER_INPUT) {
            self.flags.set(Flags::DRY);
        }
    }

    /// A read failed for good.
    pub(crate) fn handle_read_error(&mut self, error: io::Error, pool: &mut Pool) {
        self.flags.set(Flags::EOF);
        self.end(closed_by(error), pool);
    }

    /// A write failed for good. Reading goes on to the end first: the peer's last words may be there already.
    pub(crate) fn handle_write_error(&mut self, error: io::Error, pool: &mut Pool) {
        if self.state != State::Open || self.flags.has(Flags::PAUSED) || self.flags.has(Flags::EOF) {
            return self.end(closed_by(error), pool);
        }
        self.outbox.clear(pool);
        if let Some(session) = &mut self.tls {
            session.clear(pool);
        }
        self.deadlines.write = Time::NEVER;
        self.flags.set(Flags::WRITE_DEAD);
        self.flags.clear(Flags::CONGESTED);
        if self.closed.is_none() {
            self.closed = Some(closed_by(error));
        }
    }

    /// The kernel took `count` bytes of what [`Machine::transmit`] showed.
    pub(crate) fn handle_sent(&mut self, count: usize, now: Time, pool: &mut Pool) {
        self.traffic.bytes_out += count as u64;
        pool.traffic.bytes_out += count as u64;
        match &mut self.tls {
            Some(session) => session.advance(count, pool),
            None => self.outbox.advance(count, pool),
        }
        if self.queued() == 0 {
            self.deadlines.write = Time::NEVER;
        } else if count > 0 {
            self.deadlines.write = now.after(self.limits.write_timeout);
        }
        if self.flags.has(Flags::CONGESTED) && self.queued() <= self.limits.low_watermark {
            self.flags.clear(Flags::CONGESTED);
            if self.state == State::Open {
                self.flags.set(Flags::TELL_WRITABLE);
                self.restart_input_clocks(now);
            }
        }
    }

    /// The kernel takes no more for now: the clock of the peer that does not read starts.
    pub(crate) fn handle_unsent(&mut self, now: Time) {
        if self.queued() > 0 && !self.deadlines.write.is_armed() {
            self.deadlines.write = now.after(self.limits.write_timeout);
        }
    }

    /// FIN is sent, or could not be because the connection is gone already.
    pub(crate) fn handle_shutdown(&mut self, now: Time, sent: bool) {
        if self.farewell == Farewell::Shutdown {
            if sent && !self.flags.has(Flags::EOF) {
                self.farewell = Farewell::Linger;
                self.deadlines.stage = now.after(self.limits.linger_timeout);
            } else {
                self.farewell = Farewell::Gone { reset: false };
            }
        }
    }

    /// Judges every deadline that was due at `due`.
    pub(crate) fn handle_timeout(&mut self, due: Time, now: Time, pool: &mut Pool) {
        self.judged = self.judged.max(due);
        if self.deadlines.stage <= due {
            self.deadlines.stage = Time::NEVER;
            match self.state {
                State::Accepting | State::Handshaking => {
                    let not_tls = self.tls.as_ref().is_some_and(|session| session.is_not_tls());
                    self.end(
                        Closed::new(if not_tls {
                            CloseReason::NotTls
                        } else {
                            CloseReason::HandshakeTimeout
                        }),
                        pool,
                    );
                }
                State::Open => {}
                State::Closing => self.farewell = Farewell::Gone { reset: false },
            }
        }
        if self.deadlines.write <= due {
            self.deadlines.write = Time::NEVER;
            self.reset(Closed::new(CloseReason::WriteTimeout), pool);
        }
        if self.state == State::Open {
            if self.deadlines.frame <= due {
                let begun = self.held.get(self.held_at..).unwrap_or_default();
                let reason = self.judge_stream(begun, CloseReason::FrameTimeout);
                self.close(Closed::new(reason), now, pool);
            } else if self.deadlines.idle <= due {
                self.close(Closed::new(CloseReason::IdleTimeout), now, pool);
            }
        }
    }

    // --- what the handler is told ---

    /// The next thing to tell the handler, taking frames from `staged`.
    pub(crate) fn next_event<'s>(
        &mut self,
        staged: &'s mut Staged<'_>,
        now: Time,
        pool: &mut Pool,
    ) -> Option<Event<'s>> {
        if self.state != State::Open {
            return None;
        }
        if self.flags.take(Flags::TELL_OPENED) {
            self.flags.set(Flags::WAS_OPEN);
            return Some(Event::Opened);
        }
        if let Some(key) = self.take_due_timer() {
            return Some(Event::Timer(key));
        }
        if self.flags.take(Flags::TELL_DRAIN) {
            return Some(Event::Drain);
        }
        if self.flags.take(Flags::TELL_WRITABLE) {
            return Some(Event::Writable);
        }
        if self.is_paused() {
            return None;
        }
        let step = match staged.rest() {
            [] => Step::More,
            rest => self.codec.decode(rest),
        };
        match step {
            Step::Frame { payload, consumed } => {
                let start = staged.at;
                staged.at += consumed;
                staged.advanced = true;
                self.traffic.frames_in += 1;
                pool.traffic.frames_in += 1;
                let frame = staged.bytes().get(start + payload.start..start + payload.end);
                return Some(Event::Frame(frame.unwrap_or_default()));
            }
            Step::More => {}
            Step::TooLarge => {
                let reason = self.judge_stream(staged.rest(), CloseReason::FrameTooLarge);
                self.close(Closed::new(reason), now, pool);
                return None;
            }
            Step::Bad(error) => {
                let reason = self.judge_stream(staged.rest(), CloseReason::BadFrame);
                self.close(Closed::with(reason, error), now, pool);
                return None;
            }
        }
        if self.flags.has(Flags::HELD_FRAMES) {
            // A callback of this turn resumed: what is held is staged first, before its end is judged.
            return None;
        }
        self.finish_input(staged.rest(), now, pool);
        if self.state == State::Open && self.is_input_over() && !self.flags.has(Flags::FINISH_TOLD) {
            self.flags.set(Flags::FINISH_TOLD);
            return Some(Event::Finished);
        }
        None
    }

    /// No whole frame is left, only `rest`: closes if nothing more can come.
    fn finish_input(&mut self, rest: &[u8], now: Time, pool: &mut Pool) {
        let begun = if rest.is_empty() {
            self.held.get(self.held_at..).unwrap_or_default()
        } else {
            rest
        };
        let between_frames = begun.is_empty();
        let truncated = self.judge_stream(begun, CloseReason::Truncated);
        if self.has_failed() {
            self.close(Closed::new(CloseReason::Tls), now, pool);
        } else if self.flags.has(Flags::WRITE_DEAD) && self.flags.has(Flags::EOF) {
            self.end(Closed::new(CloseReason::Reset), pool);
        } else if self.flags.has(Flags::FINISH_TOLD) {
            if self.flags.has(Flags::CLOSE_AFTER_INPUT)
                || self.tls.as_ref().is_some_and(|session| session.closes_both_ways())
            {
                self.close_by_handler(now, pool);
            }
        } else if self.is_input_over() && !between_frames {
            let reason = if self.is_cut_off() {
                CloseReason::TlsTruncated
            } else {
                truncated
            };
            self.close(Closed::new(reason), now, pool);
        } else if self.flags.has(Flags::CLOSE_AFTER_INPUT) && self.flags.has(Flags::DRY) && between_frames {
            self.close_by_handler(now, pool);
        }
    }

    fn take_due_timer(&mut self) -> Option<u8> {
        let (index, timer) = self.timers.iter().enumerate().min_by_key(|(_, timer)| timer.at)?;
        if timer.at > self.judged {
            return None;
        }
        Some(self.timers.remove(index).key)
    }

    /// Keeps what the decoder left.
    pub(crate) fn settle(&mut self, staged: Staged<'_>, now: Time, pool: &mut Pool) {
        let Staged {
            fresh,
            joined,
            at,
            advanced,
        } = staged;
        if joined.is_empty() {
            let rest = fresh.get(at..).unwrap_or_default();
            if self.state == State::Open && !rest.is_empty() {
                self.held = pool.take();
                self.held.extend_from_slice(rest);
            }
        } else if self.state == State::Open && at < joined.len() {
            self.hold(joined, at, pool);
        } else {
            pool.give(joined);
        }
        if self.is_paused() && !self.held.is_empty() {
            self.flags.set(Flags::HELD_FRAMES);
        }
        // A record that is not whole yet is the beginning of whatever comes in it.
        let begun = (self.codec.has_frames() && !self.held.is_empty())
            || self.tls.as_ref().is_some_and(|session| session.has_begun());
        if self.state != State::Open || !begun {
            self.set_frame_clock(Time::NEVER);
        } else if self.is_paused() {
            if advanced {
                self.set_frame_clock(Time::NEVER);
            }
        } else if advanced || !self.deadlines.frame.is_armed() {
            self.set_frame_clock(now.after(self.limits.frame_timeout));
        }
    }

    /// The clock of the frame that has begun, running or stopped.
    fn set_frame_clock(&mut self, frame: Time) {
        match &mut self.stopped {
            Some(stopped) => stopped.frame = frame,
            None => self.deadlines.frame = frame,
        }
    }

    /// Keeps the tail of a joined buffer, without copying it for each frame taken from its front and
    /// without keeping a large buffer for a small tail.
    fn hold(&mut self, mut joined: Vec<u8>, at: usize, pool: &mut Pool) {
        let rest = joined.len() - at;
        if at < rest {
            self.held_at = at;
            self.held = joined;
        } else if joined.capacity() > 64 * 1024 && rest < joined.capacity() / 4 {
            self.held = pool.take();
            self.held.extend_from_slice(joined.get(at..).unwrap_or_default());
            pool.give(joined);
        } else {
            joined.drain(..at);
            self.held = joined;
        }
    }

    // --- what the handler asks for ---

    /// Queues one frame.
    pub(crate) fn send(&mut self, payload: &[u8], now: Time, pool: &mut Pool) -> Result<(), SendError> {
        if self.state != State::Open || self.is_deaf() {
            return Err(SendError::Closed);
        }
        let queued = self.queued();
        if queued >= self.limits.output_limit {
            self.congest(now);
            return Err(SendError::Full {
                queued,
                limit: self.limits.output_limit,
            });
        }
        self.codec
            .encode(payload, self.outbox.tail(pool))
            .map_err(|error| match error {
                EncodeError::TooLarge { max } => SendError::FrameTooLarge {
                    length: payload.len(),
                    max,
                },
                EncodeError::Refused(error) => SendError::Refused(error),
            })?;
        self.traffic.frames_out += 1;
        pool.traffic.frames_out += 1;
        if self.queued() >= self.limits.high_watermark {
            self.congest(now);
        }
        Ok(())
    }

    /// Stops reading until the peer has taken enough. Its own clocks stand meanwhile, all but the write timeout.
    fn congest(&mut self, now: Time) {
        self.flags.set(Flags::CONGESTED);
        self.stop_input_clocks(now);
    }

    pub(crate) fn pause(&mut self, now: Time) {
        if self.state == State::Open && !self.is_deaf() {
            self.flags.set(Flags::PAUSED);
            self.stop_input_clocks(now);
        }
    }

    pub(crate) fn resume(&mut self, now: Time) {
        if self.flags.take(Flags::PAUSED) {
            self.restart_input_clocks(now);
        }
    }

    /// The peer is kept waiting by us: that time is not held against it.
    fn stop_input_clocks(&mut self, now: Time) {
        if self.stopped.is_none() {
            self.stopped = Some(Stopped {
                at: now,
                frame: std::mem::replace(&mut self.deadlines.frame, Time::NEVER),
                idle: std::mem::replace(&mut self.deadlines.idle, Time::NEVER),
            });
        }
    }

    /// Reading goes on, and so do the peer's clocks where they stood: our own sending moves them no further.
    fn restart_input_clocks(&mut self, now: Time) {
        if self.state == State::Open && !self.is_paused() {
            if let Some(stopped) = self.stopped.take() {
                let stood = now.since(stopped.at);
                self.deadlines.frame = stopped.frame.after(stood);
                self.deadlines.idle = stopped.idle.after(stood);
            }
            if !self.held.is_empty() {
                self.flags.set(Flags::HELD_FRAMES);
            }
        }
    }

    /// Cuts what is undecoded, and all that follows, by another rule.
    pub(crate) fn set_framing(&mut self, framing: &Framing) {
        let max = self.limits.max_frame.unwrap_or(framing.default_max());
        self.codec = Codec::new(framing, max);
        if !self.held.is_empty() {
            self.flags.set(Flags::HELD_FRAMES);
        }
    }

    pub(crate) fn set_max_frame(&mut self, max: usize) {
        self.codec.set_max(max);
        if !self.held.is_empty() {
            self.flags.set(Flags::HELD_FRAMES);
        }
    }

    /// Sets timer `key` to `at`, or cancels it with [`Time::NEVER`].
    ///
    /// Never due in the turn that sets it, so that a timer which sets itself again to "now" cannot spin.
    pub(crate) fn set_timer(&mut self, key: u8, at: Time) {
        self.timers.retain(|timer| timer.key != key);
        if at.is_armed() && self.state == State::Open {
            let at = at.max(self.judged.after(Duration::from_nanos(1)));
            self.timers.push(Timer { key, at });
        }
    }

    /// Closes in order once everything that has arrived is answered.
    pub(crate) fn close_after_input(&mut self) {
        if self.state == State::Open && !self.flags.has(Flags::CLOSE_AFTER_INPUT) {
            self.flags.set(Flags::CLOSE_AFTER_INPUT);
            self.flags.clear(Flags::DRY);
        }
    }

    /// The server drains: tells the handler if there is one to tell, and cuts a handshake short.
    pub(crate) fn drain(&mut self, handshake_until: Time) {
        self.flags.set(Flags::DRAINING);
        match self.state {
            State::Accepting | State::Handshaking => {
                self.deadlines.stage = self.deadlines.stage.min(handshake_until);
                self.flags.set(Flags::TELL_DRAIN);
            }
            State::Open => self.flags.set(Flags::TELL_DRAIN),
            State::Closing => {}
        }
    }

    /// Closes in order: the handler has said all it wants.
    pub(crate) fn close_by_handler(&mut self, now: Time, pool: &mut Pool) {
        let reason = if self.flags.has(Flags::FINISH_TOLD) {
            if self.is_cut_off() {
                CloseReason::TlsTruncated
            } else {
                CloseReason::Finished
            }
        } else if self.flags.has(Flags::DRAINING) {
            CloseReason::Drained
        } else {
            CloseReason::Closed
        };
        self.close(Closed::new(reason), now, pool);
    }

    /// Ends as a callback's [`Close`] says.
    pub(crate) fn close_as(&mut self, close: Close, now: Time, pool: &mut Pool) {
        if close.abort {
            self.reset(close.closed, pool);
        } else if close.closed.reason == CloseReason::Closed {
            self.close_by_handler(now, pool);
        } else {
            self.close(close.closed, now, pool);
        }
    }

    /// Closes in order: flush, close_notify, FIN, linger. The first reason stays.
    pub(crate) fn close(&mut self, closed: Closed, now: Time, pool: &mut Pool) {
        if self.state == State::Closing {
            return;
        }
        if self.flags.has(Flags::WRITE_DEAD) {
            return self.end(closed, pool);
        }
        self.farewell = Farewell::Flush;
        self.enter_closing(pool);
        if self.queued() > 0 && !self.deadlines.write.is_armed() {
            self.deadlines.write = now.after(self.limits.write_timeout);
        }
        self.note_closed(closed);
    }

    /// Ends at once; what waits is lost. `closed` tells why, unless a reason is known already.
    pub(crate) fn end(&mut self, closed: Closed, pool: &mut Pool) {
        self.leave(closed, false, pool);
    }

    /// Ends at once with RST.
    pub(crate) fn reset(&mut self, closed: Closed, pool: &mut Pool) {
        self.leave(closed, true, pool);
    }

    /// The drain's deadline is over. Who has had everything and our FIN has ended in order; else false, and it is reset.
    pub(crate) fn cut_short(&mut self, pool: &mut Pool) -> bool {
        let ended = self.farewell == Farewell::Linger;
        if ended {
            self.farewell = Farewell::Gone { reset: false };
        } else {
            self.reset(Closed::new(CloseReason::DrainForced), pool);
        }
        ended
    }

    fn leave(&mut self, closed: Closed, reset: bool, pool: &mut Pool) {
        if matches!(self.farewell, Farewell::Gone { .. }) {
            return;
        }
        // What was promised to the peer is lost now: that is the reason to report. An alert for a failed handshake is
        // no promise.
        let lost = self.state == State::Closing && self.was_open() && self.queued() > 0;
        self.farewell = Farewell::Gone { reset };
        self.enter_closing(pool);
        self.deadlines = Deadlines::none();
        self.outbox.clear(pool);
        if let Some(session) = &mut self.tls {
            session.clear(pool);
        }
        if lost {
            self.closed = Some(closed);
        } else {
            self.note_closed(closed);
        }
    }

    /// The first reason stays. Last in whatever it is called from: the other is dropped, and may hold a user's error.
    fn note_closed(&mut self, closed: Closed) {
        if self.closed.is_none() {
            self.closed = Some(closed);
        }
    }

    fn enter_closing(&mut self, pool: &mut Pool) {
        if self.state != State::Closing {
            self.enter(State::Closing);
        }
        let write = self.deadlines.write;
        self.deadlines = Deadlines::none();
        self.deadlines.write = write;
        self.timers = Vec::new();
        self.held_at = 0;
        pool.give(std::mem::take(&mut self.held));
    }

    // --- what the reactor does next ---

    /// Bytes to write now, encrypting as late as this.
    pub(crate) fn transmit(&mut self, pool: &mut Pool) -> &[u8] {
        let finished = matches!(self.farewell, Farewell::Gone { .. }) || self.is_deaf();
        if let (Some(session), false) = (&mut self.tls, finished) {
            let outcome = session.encrypt(self.outbox.waiting(), pool);
            match outcome {
                Ok(taken) => self.outbox.advance(taken, pool),
                Err(error) => self.end(Closed::with(CloseReason::Tls, error), pool),
            }
        }
        if let (Farewell::Flush, true) = (self.farewell, self.outbox.is_empty()) {
            if let Some(session) = &mut self.tls {
                // Nothing can be done about a goodbye that cannot be said: FIN follows.
                let _ = session.close_notify(pool);
            }
            if self.queued() == 0 {
                self.deadlines.write = Time::NEVER;
                self.farewell = if self.flags.has(Flags::EOF) {
                    Farewell::Gone { reset: false }
                } else {
                    Farewell::Shutdown
                };
            }
        }
        match &self.tls {
            Some(session) => session.waiting(),
            None => self.outbox.waiting(),
        }
    }

    pub(crate) fn next_step(&self) -> NextStep {
        match self.farewell {
            Farewell::None | Farewell::Flush | Farewell::Linger => NextStep::Wait,
            Farewell::Shutdown => NextStep::Shutdown,
            Farewell::Gone { reset } => NextStep::Gone { reset },
        }
    }

    /// Whether a read is welcome now.
    pub(crate) fn wants_read(&self) -> bool {
        match self.state {
            _ if self.flags.has(Flags::EOF) => false,
            State::Accepting => false,
            State::Handshaking => true,
            State::Open => {
                !self.is_paused() && !self.flags.has(Flags::HELD_FRAMES) && !self.is_input_over() && !self.has_failed()
            }
            // What still arrives is discarded, so that a peer that writes before it reads gets its answers,
            // and so that closing does not reset what it has not read.
            State::Closing => {
                matches!(self.farewell, Farewell::Flush | Farewell::Linger)
                    && self.discarded <= self.limits.linger_bytes
            }
        }
    }

    /// The peer has finished and the handler goes on: what another event may announce is that the peer is gone for good.
    pub(crate) fn wants_error(&self) -> bool {
        self.state == State::Open && self.flags.has(Flags::EOF) && !self.is_paused()
    }

    /// A short read does not count as empty: only a fresh WouldBlock does.
    pub(crate) fn wants_fresh_blocked(&self) -> bool {
        self.flags.has(Flags::WRITE_DEAD) || (self.flags.has(Flags::CLOSE_AFTER_INPUT) && !self.flags.has(Flags::DRY))
    }

    /// Something can be told to the handler, or decided, without a read.
    pub(crate) fn has_events(&self) -> bool {
        const TELL: u16 = Flags::TELL_OPENED.0 | Flags::TELL_WRITABLE.0 | Flags::TELL_DRAIN.0;
        if self.state != State::Open {
            return false;
        }
        if self.flags.0 & TELL != 0 || self.timers.iter().any(|timer| timer.at <= self.judged) {
            return true;
        }
        if self.is_paused() {
            return false;
        }
        self.flags.has(Flags::HELD_FRAMES)
            || self.has_failed()
            || (self.is_input_over() && !self.flags.has(Flags::FINISH_TOLD))
            || (self.flags.has(Flags::CLOSE_AFTER_INPUT)
                && (self.flags.has(Flags::FINISH_TOLD) || (self.flags.has(Flags::DRY) && self.held.is_empty())))
    }

    pub(crate) fn deadline(&self) -> Time {
        self.timers
            .iter()
            .map(|timer| timer.at)
            .fold(self.deadlines.next(), Time::min)
    }

    // --- what can be asked ---

    pub(crate) fn state(&self) -> State {
        self.state
    }

    /// `on_open` was called, so `on_close` is due.
    pub(crate) fn was_open(&self) -> bool {
        self.flags.has(Flags::WAS_OPEN)
    }

    pub(crate) fn is_draining(&self) -> bool {
        self.flags.has(Flags::DRAINING)
    }

    /// Bytes that wait for the peer.
    pub(crate) fn queued(&self) -> usize {
        self.outbox.len() + self.tls.as_ref().map_or(0, |session| session.waiting().len())
    }

    /// Bytes held for this connection in either direction.
    pub(crate) fn buffered(&self) -> usize {
        self.outbox.len() + self.held.len() - self.held_at + self.tls.as_ref().map_or(0, |session| session.buffered())
    }

    pub(crate) fn traffic(&self) -> Traffic {
        self.traffic
    }

    pub(crate) fn last_input(&self) -> Time {
        self.last_input
    }

    pub(crate) fn max_frame(&self) -> usize {
        self.codec.max()
    }

    #[cfg(feature = "tls")]
    pub(crate) fn tls(&self) -> Option<tls::TlsInfo<'_>> {
        self.tls.as_ref().map(|session| session.info())
    }

    /// The first of this connection's invariants that does not hold between two turns. `queued` says that it is to have
    /// another turn soon, whatever its deadlines.
    #[cfg(feature = "sim")]
    pub(crate) fn broken_invariant(&self, read_size: usize, queued: bool) -> Option<String> {
        const ENVELOPE: usize = 16;
        let held = self.held.len() - self.held_at;
        let most = self.codec.max().saturating_add(ENVELOPE + read_size);
        if held > most {
            return Some(format!("{held} bytes of input are held, the most is {most}"));
        }
        if self.held.is_empty() && self.held.capacity() > 0 {
            return Some("it holds memory for no input".to_owned());
        }
        if queued {
            return None;
        }
        if self.has_events() {
            return Some("events wait that nobody will ask for".to_owned());
        }
        let never = |span: Duration| span == Duration::MAX;
        let unarmed = |deadline: Time| !deadline.is_armed();
        let missing = match (self.state, self.farewell) {
            (_, Farewell::Gone { .. }) => return Some("it is gone and still here".to_owned()),
            (State::Accepting | State::Handshaking, _) => {
                unarmed(self.deadlines.stage) && !never(self.limits.handshake_timeout)
            }
            (State::Closing, Farewell::Linger) => unarmed(self.deadlines.stage) && !never(self.limits.linger_timeout),
            (State::Closing, _) => unarmed(self.deadlines.write) && !never(self.limits.write_timeout),
            (State::Open, _) if self.queued() > 0 && unarmed(self.deadlines.write) => !never(self.limits.write_timeout),
            (State::Open, _) if self.is_paused() => false,
            (State::Open, _) if held > 0 && self.codec.has_frames() && unarmed(self.deadlines.frame) => {
                !never(self.limits.frame_timeout)
            }
            (State::Open, _) => unarmed(self.deadlines.idle) && !never(self.limits.idle_timeout),
        };
        missing.then(|| format!("no deadline is armed: {:?}", self.deadlines))
    }

    /// Why it ended, for the one report.
    pub(crate) fn take_closed(&mut self) -> Closed {
        self.closed.take().unwrap_or_else(|| Closed::new(CloseReason::Closed))
    }

    /// Not taking frames: the handler's wish, or output waits above the watermark.
    fn is_paused(&self) -> bool {
        self.flags.has(Flags::PAUSED) || self.flags.has(Flags::CONGESTED)
    }

    fn is_input_over(&self) -> bool {
        self.flags.has(Flags::EOF) || self.tls.as_ref().is_some_and(|session| session.peer_closed())
    }

    /// FIN came without close_notify.
    fn is_cut_off(&self) -> bool {
        self.tls.as_ref().is_some_and(|session| !session.peer_closed())
    }

    /// TLS failed: nothing more can be decrypted, or encrypted.
    fn has_failed(&self) -> bool {
        self.tls.as_ref().is_some_and(|session| session.has_failed())
    }

    /// The peer can be told nothing more.
    fn is_deaf(&self) -> bool {
        self.flags.has(Flags::WRITE_DEAD) || self.has_failed()
    }

    /// `reason`, unless the stream never made a frame because it is a TLS ClientHello (RFC 8446 section 5.1).
    fn judge_stream(&self, begun: &[u8], reason: CloseReason) -> CloseReason {
        match begun {
            [0x16, 0x03, 0x00..=0x04, _, _, 0x01, ..] if self.tls.is_none() && self.traffic.frames_in == 0 => {
                CloseReason::UnexpectedTls
            }
            _ => reason,
        }
    }

    fn open(&mut self, now: Time) {
        self.enter(State::Open);
        self.deadlines.stage = Time::NEVER;
        self.deadlines.idle = now.after(self.limits.idle_timeout);
        self.flags.set(Flags::TELL_OPENED);
    }

    /// What was decrypted before the fault is delivered first; no answer to it can be encrypted. The fault is the
    /// reason already, whatever a handler makes of a `send` that fails.
    fn fail_tls(&mut self, pool: &mut Pool) {
        self.outbox.clear(pool);
        self.flags.clear(Flags::CONGESTED);
        let error = self.tls.as_mut().and_then(|session| session.take_failure());
        if let (Some(error), None) = (error, &self.closed) {
            self.closed = Some(Closed::with(CloseReason::Tls, error));
        }
    }

    fn fail_handshake(&mut self, now: Time, pool: &mut Pool) {
        let Some(session) = &mut self.tls else {
            return self.close(Closed::new(CloseReason::Reset), now, pool);
        };
        let reason = if session.is_not_tls() {
            CloseReason::NotTls
        } else {
            CloseReason::TlsHandshake
        };
        let error = session
            .take_failure()
            .unwrap_or_else(|| "the peer closed the connection during the handshake".into());
        self.close(Closed::with(reason, error), now, pool);
    }

    fn enter(&mut self, next: State) {
        debug_assert!(self.state.may_become(next), "{} cannot become {next}", self.state);
        self.state = next;
    }
}

/// The reason behind a socket error.
fn closed_by(error: io::Error) -> Closed {
    let reason = match error.raw_os_error() {
        Some(libc::ECONNRESET | libc::EPIPE | libc::ECONNABORTED | libc::ENOTCONN) => CloseReason::Reset,
        Some(libc::ETIMEDOUT) => CloseReason::TimedOut,
        Some(libc::EHOSTUNREACH | libc::ENETUNREACH | libc::ENETDOWN | libc::EHOSTDOWN) => CloseReason::Unreachable,
        _ => CloseReason::Io,
    };
    match reason {
        CloseReason::Io => Closed::with(reason, error),
        _ => Closed::new(reason),
    }
}

#[cfg(test)]
mod tests;
