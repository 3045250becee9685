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

mod active;
mod closing;
mod connecting;
mod deadline;
mod detached_io;
mod framing;
mod header;
mod input;
mod outbox;
mod output;
mod pool;
mod proxy;
mod rate;
#[cfg(feature = "sim")]
mod snapshot;
mod state;
mod throttle;
#[cfg_attr(not(feature = "tls"), path = "no_tls.rs")]
pub(crate) mod tls;
mod upgrade;
mod view;

use std::rc::Rc;
use std::time::Duration;

use crate::reason::{CloseReason, Closed};
use active::Active;
use deadline::Deadlines;
pub(crate) use deadline::Time;
pub(crate) use detached_io::DetachedIo;
use framing::Codec;
pub use framing::{Decoded, FrameBuf, FrameError, Framer, FramerFactory, Framing};
pub(crate) use input::Staged;
pub(crate) use pool::Pool;
pub use proxy::{ProxyError, ProxyHeader, ProxyOrigin, ProxySsl, ProxyTlvs};
pub(crate) use rate::Bucket;
pub use rate::Rate;
#[cfg(feature = "sim")]
pub(crate) use snapshot::Fingerprint;
pub(crate) use state::{Event, Limits, NextStep};
use state::{Farewell, Flags};
pub use state::{SendError, State, Traffic};
pub(crate) use throttle::SharedMeters;
use throttle::Throttle;
pub(crate) use tls::TlsConfig;
#[cfg(feature = "tls")]
pub use upgrade::StartTlsError;
pub use view::TimeLeft;

/// A handler's timer: a key of its own choice and when it is due.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Timer {
    key: u8,
    at: Time,
}

/// The peer's clocks, stopped: since when, and where the frame's stood.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Stopped {
    at: Time,
    frame: Time,
}

/// The state machine of one connection: what an idle one needs. All else is [`Active`], which it derefs to.
pub(crate) struct Machine {
    state: State,
    farewell: Farewell,
    flags: Flags,
    limits: Rc<Limits>,
    codec: Codec,
    tls: Option<Box<tls::Session>>,
    last_input: Time,
    traffic: Traffic,
    active: Option<Box<Active>>,
}

impl Machine {
    pub(crate) fn new(
        framing: &Framing,
        limits: Rc<Limits>,
        tls: Option<&TlsConfig>,
        now: Time,
        pool: &mut Pool,
    ) -> Self {
        let mut machine = Self::blank(State::Accepting, framing, limits, now);
        machine.tls = tls.map(|config| Box::new(tls::Session::new(config)));
        let handshake_end = now.after(machine.limits.handshake_timeout);
        machine.wake(pool).deadlines.stage = handshake_end;
        machine
    }

    fn blank(state: State, framing: &Framing, limits: Rc<Limits>, now: Time) -> Self {
        let max = limits.max_frame.unwrap_or(framing.default_max());
        Self {
            state,
            farewell: Farewell::None,
            flags: Flags::UNOPEN,
            codec: Codec::new(framing, max),
            tls: None,
            last_input: now,
            traffic: Traffic::default(),
            active: None,
            limits,
        }
    }

    /// Reads no faster than its limits say, and those that its listener's connections share.
    pub(crate) fn throttle(&mut self, shared: &SharedMeters) {
        self.set_throttle(Throttle::new(&self.limits, shared));
    }

    fn set_throttle(&mut self, throttle: Option<Box<Throttle>>) {
        self.flags.put(Flags::RATED, throttle.is_some());
        if throttle.is_some() || self.active.is_some() {
            self.throttle = throttle;
        }
    }

    /// A rate that it shares has changed: who waits asks again.
    pub(crate) fn ask_again(&mut self, now: Time) {
        if let Some(throttle) = &mut self.throttle {
            throttle.ask_again(now);
        }
    }

    /// The service accepted the peer.
    pub(crate) fn handle_admitted(&mut self, now: Time, pool: &mut Pool) {
        self.flags.set(Flags::ADMITTED);
        let active = self.active.get_or_insert_default();
        if let Some(session) = &mut self.tls {
            // What stood behind the PROXY header.
            if !active.held.is_empty() {
                session.set_aside(&active.held, pool);
                pool.give(std::mem::take(&mut active.held));
            }
            self.enter(State::Handshaking);
        } else {
            self.open(now);
            if !self.held.is_empty() {
                self.flags.set(Flags::HELD_FRAMES);
            }
            // What stood behind the PROXY header was read unasked.
            let active = self.active.get_or_insert_default();
            if let Some(throttle) = &mut active.throttle {
                throttle.charge_bytes(active.held.len() as u64, now);
            }
        }
    }

    /// Judges every deadline that was due at `due`.
    pub(crate) fn handle_timeout(&mut self, due: Time, now: Time, pool: &mut Pool) {
        self.judged = self.judged.max(due);
        if self.timers.iter().any(|timer| timer.at <= self.judged) {
            self.flags.set(Flags::TELL_TIMER);
        }
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
                // What becomes of an attempt that takes too long is not decided here.
                State::Connecting | State::Open => {}
                State::Closing => self.farewell = Farewell::Gone { reset: false },
            }
        }
        if self.deadlines.write <= due {
            self.deadlines.write = Time::NEVER;
            self.reset(Closed::new(CloseReason::WriteTimeout), pool);
        }
        if self.throttled_until() <= due {
            self.flags.clear(Flags::THROTTLED);
            self.restart_input_clocks(now);
        }
        if self.state == State::Open {
            if self.deadlines.frame <= due {
                let begun = self.held.get(self.held_at..).unwrap_or_default();
                let reason = self.judge_stream(begun, CloseReason::FrameTimeout);
                self.close(Closed::new(reason), now, pool);
            } else if self.idle() <= due {
                self.close(Closed::new(CloseReason::IdleTimeout), now, pool);
            }
        }
    }

    /// Sets timer `key` to `at`, or cancels it with [`Time::NEVER`].
    ///
    /// Never due in the turn that sets it, so that a timer which sets itself again to "now" cannot spin.
    pub(crate) fn set_timer(&mut self, key: u8, at: Time) {
        if self.flags.has(Flags::TIMED) {
            self.timers.retain(|timer| timer.key != key);
        }
        if at.is_armed() && self.is_established() {
            let at = at.max(self.judged.after(Duration::from_nanos(1)));
            self.timers.push(Timer { key, at });
        }
        self.flags.put(Flags::TIMED, !self.timers.is_empty());
    }

    /// A timer of the handler's runs: its deadline may have come nearer.
    #[inline]
    pub(crate) fn is_timed(&self) -> bool {
        self.flags.has(Flags::TIMED)
    }

    /// The frame that it has begun should have been whole at `due`.
    pub(crate) fn is_frame_late(&self, due: Time) -> bool {
        self.state == State::Open && self.deadlines.frame <= due
    }

    #[inline]
    pub(crate) fn deadline(&self) -> Time {
        let Some(active) = &self.active else {
            return self.idle();
        };
        let first = active.deadlines.next().min(self.idle()).min(self.throttled_until());
        active.timers.iter().map(|timer| timer.at).fold(first, Time::min)
    }

    #[inline]
    pub(crate) fn state(&self) -> State {
        self.state
    }

    /// `on_open` was called, so `on_close` is due.
    pub(crate) fn was_open(&self) -> bool {
        self.flags.has(Flags::WAS_OPEN)
    }

    /// The service has accepted the peer, so there is a handler.
    pub(crate) fn was_admitted(&self) -> bool {
        self.flags.has(Flags::ADMITTED)
    }

    pub(crate) fn is_draining(&self) -> bool {
        self.flags.has(Flags::DRAINING)
    }

    /// Bytes held for this connection in either direction.
    pub(crate) fn buffered(&self) -> usize {
        self.outbox.len() + self.held.len() - self.held_at + self.tls.as_ref().map_or(0, |session| session.buffered())
    }

    /// Its framer is the user's code, and may panic.
    #[inline]
    pub(crate) fn has_framer(&self) -> bool {
        self.codec.is_custom()
    }

    /// It speaks TLS, or will: a TLS configuration may hold the user's code.
    #[inline]
    pub(crate) fn has_tls(&self) -> bool {
        self.tls.is_some()
    }

    /// Memory that its buffers take beyond the turn.
    #[inline]
    pub(crate) fn memory(&self) -> usize {
        let tls = self.tls.as_ref().map_or(0, |session| session.memory());
        pool::lasting(&self.held) + self.outbox.lasting() + tls
    }

    /// At the end of a turn: gives back what its buffers do not need.
    #[inline(always)]
    pub(crate) fn slim(&mut self, pool: &mut Pool) {
        self.flags.clear(Flags::STOOD);
        if let Some(active) = self.active.take_if(|active| active.is_over()) {
            // Nothing goes on.
            pool.give_active(active);
        } else if let Some(active) = &mut self.active {
            pool.slim(&mut active.held);
            active.outbox.slim(pool);
        }
        if let Some(session) = &mut self.tls {
            session.slim(pool);
        }
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
        let session = self.tls.as_ref().filter(|session| !session.is_handshaking());
        session.map(|session| session.info())
    }

    /// The first of this connection's invariants that does not hold between two turns. `queued` says that it is to have
    /// another turn soon, whatever its deadlines.
    #[cfg(feature = "sim")]
    pub(crate) fn broken_invariant(&self, read_size: usize, queued: bool) -> Option<String> {
        const ENVELOPE: usize = 16;
        /// RFC 8446 section 5.2: 2^14 + 256 and the header.
        const RECORD: usize = 0x4000 + 256 + 5;
        let held = self.held.len() - self.held_at;
        // A PROXY header comes before frames.
        let most = self
            .codec
            .max()
            .max(proxy::LONGEST)
            .saturating_add(ENVELOPE + read_size + if self.tls.is_some() { RECORD } else { 0 });
        if held > most {
            return Some(format!("{held} bytes of input are held, the most is {most}"));
        }
        if self.held.is_empty() && self.held.capacity() > 0 {
            return Some("it holds memory for no input".to_owned());
        }
        for (flag, fact) in [
            (Flags::UNOPEN, self.state != State::Open),
            (Flags::TIMED, !self.timers.is_empty()),
            (Flags::RATED, self.throttle.is_some()),
        ] {
            if self.flags.has(flag) != fact {
                return Some(format!(
                    "a flag says otherwise than what it stands for: {:?}",
                    self.flags
                ));
            }
        }
        if !self.flags.has(Flags::TELL_TIMER) && self.timers.iter().any(|timer| timer.at <= self.judged) {
            return Some("a timer is due and no flag says so".to_owned());
        }
        let over = |session: &tls::Session| session.peer_closed() || session.has_failed();
        if self.flags.has(Flags::TLS_OVER) != self.tls.as_deref().is_some_and(over) {
            return Some("TLS is over, or is not, and the flag says otherwise".to_owned());
        }
        let compact = self.outbox.is_compact() && self.held_at <= held;
        if !compact || self.tls.as_ref().is_some_and(|session| !session.is_compact()) {
            return Some("more memory is held for what has gone than for what waits".to_owned());
        }
        if queued {
            return None;
        }
        if self.has_events() {
            return Some("events wait that nobody will ask for".to_owned());
        }
        // The clock ends after 584 years: what is due after half of that may never be.
        let never = |span: Duration| !Time::from_start(span.saturating_mul(2)).is_armed();
        let unarmed = |deadline: Time| !deadline.is_armed();
        let missing = match (self.state, self.farewell) {
            (_, Farewell::Gone { .. }) => return Some("it is gone and still here".to_owned()),
            (State::Accepting | State::Handshaking, _) => {
                unarmed(self.deadlines.stage) && !never(self.limits.handshake_timeout)
            }
            // The reactor looks at these.
            (State::Connecting, _) => false,
            (State::Closing, Farewell::Linger) => unarmed(self.deadlines.stage) && !never(self.limits.linger_timeout),
            (State::Closing, _) => unarmed(self.deadlines.write) && !never(self.limits.write_timeout),
            (State::Open, _) if self.queued() > 0 && unarmed(self.deadlines.write) => !never(self.limits.write_timeout),
            (State::Open, _) if self.flags.has(Flags::THROTTLED) => unarmed(self.throttled_until()),
            (State::Open, _) if self.is_paused() => false,
            (State::Open, _) if self.has_begun() && unarmed(self.deadlines.frame) => !never(self.limits.frame_timeout),
            (State::Open, _) => unarmed(self.idle()) && !never(self.limits.idle_timeout),
        };
        missing.then(|| format!("no deadline is armed: {:?}", self.deadlines))
    }

    /// When the peer must have said something, by its own clock.
    #[inline]
    fn idle(&self) -> Time {
        if self.state == State::Open && self.stopped.is_none() && !self.flags.has(Flags::HELD_FRAMES) {
            self.idle_end()
        } else {
            Time::NEVER
        }
    }

    /// The same with a clock that stands from now on.
    #[inline]
    fn idle_end(&self) -> Time {
        self.last_input.after(self.limits.idle_timeout).after(self.stood)
    }

    /// When the throttle lets reading go on.
    #[inline]
    fn throttled_until(&self) -> Time {
        match &self.throttle {
            Some(throttle) if self.flags.has(Flags::THROTTLED) && self.state == State::Open => throttle.until,
            _ => Time::NEVER,
        }
    }

    /// The keys are not agreed on yet: nothing can be encrypted.
    fn is_handshaking(&self) -> bool {
        self.tls.as_ref().is_some_and(|session| session.is_handshaking())
    }

    /// TLS failed: nothing more can be decrypted, or encrypted.
    fn has_failed(&self) -> bool {
        self.tls.as_ref().is_some_and(|session| session.has_failed())
    }

    fn open(&mut self, now: Time) {
        self.enter(State::Open);
        self.deadlines.stage = Time::NEVER;
        self.last_input = now;
        if self.is_paused() {
            // An outgoing connection may have been sent to before.
            self.stop_input_clocks(now);
        }
        self.flags.set(Flags::TELL_OPENED);
    }

    fn enter(&mut self, next: State) {
        debug_assert!(self.state.may_become(next), "{} cannot become {next}", self.state);
        self.state = next;
        self.flags.put(Flags::UNOPEN, next != State::Open);
    }
}

#[cfg(test)]
mod tests;
