//! From the socket to the handler: what a read brought, what of it is told, what is held.

use std::io;
use std::ops::ControlFlow;
use std::time::Duration;

use super::closing::closed_by;
use super::framing::{Codec, Framing, Step};
use super::state::{ClosePhase, Event, Flags, State};
use super::{Machine, Pool, Stopped, Time, Timer};
use crate::reason::{CloseReason, Closed};

/// From here on what is held grows by a quarter.
const LARGE: usize = 16 * 1024;

/// Bytes on their way through the decoder: this turn's read, or what was held, or both joined.
pub(crate) struct InputCursor<'a> {
    fresh: &'a [u8],
    /// Used instead of `fresh` if it is not empty.
    joined: Vec<u8>,
    at: usize,
    /// A frame was completed, so what is left began later than what was held.
    advanced: bool,
}

impl<'a> InputCursor<'a> {
    #[inline]
    pub(crate) fn nothing() -> Self {
        Self::fresh(&[])
    }

    #[inline]
    fn fresh(fresh: &'a [u8]) -> Self {
        Self {
            fresh,
            joined: Vec::new(),
            at: 0,
            advanced: false,
        }
    }

    #[inline]
    fn bytes(&self) -> &[u8] {
        if self.joined.is_empty() {
            self.fresh
        } else {
            &self.joined
        }
    }

    /// Everything of a read that stood for itself was delivered.
    #[inline]
    pub(crate) fn is_used_up(&self) -> bool {
        self.at == self.fresh.len() && self.joined.capacity() == 0
    }

    /// What is not delivered yet.
    #[inline]
    pub(crate) fn rest(&self) -> &[u8] {
        self.bytes().get(self.at..).unwrap_or_default()
    }

    /// The next `count` bytes were delivered: whole frames, if it is any.
    #[inline]
    pub(crate) fn advance(&mut self, count: usize) {
        self.at += count;
        self.advanced |= count > 0;
    }
}

impl Machine {
    /// Bytes were read. `plain` is scratch space for what TLS decrypts.
    #[inline(always)]
    pub(crate) fn handle_input<'a>(
        &mut self,
        now: Time,
        wire: &'a mut [u8],
        plain: &'a mut Vec<u8>,
        pool: &mut Pool,
    ) -> InputCursor<'a> {
        self.traffic.bytes_in += wire.len() as u64;
        pool.traffic.bytes_in += wire.len() as u64;
        self.last_input = now;
        if let Some(active) = &mut self.active {
            active.stood = Duration::ZERO;
        }
        if !self.only_frames() && !self.takes_input(wire, now, pool) {
            return InputCursor::nothing();
        }
        if self.tls.is_none() {
            return self.begin_input(wire);
        }
        self.decrypt(now, wire, plain, pool);
        self.begin_input(plain)
    }

    /// What has come is frames, or is to be decrypted, and not something else.
    #[inline(never)]
    fn takes_input(&mut self, wire: &[u8], now: Time, pool: &mut Pool) -> bool {
        if self.state == State::Closing {
            self.discarded = self.discarded.saturating_add(wire.len());
            if self.close_phase == ClosePhase::Linger && self.discarded > self.limits.linger_bytes {
                self.close_phase = ClosePhase::Gone { reset: false };
            }
            return false;
        }
        if self.state == State::Accepting {
            self.recv_buf.extend_from_slice(wire);
            self.look_for_header(now, pool);
            return false;
        }
        if self.state == State::Open {
            self.charge(wire.len(), now);
        }
        true
    }

    /// Takes ciphertext, and leaves in `plain` what it says.
    pub(super) fn decrypt(&mut self, now: Time, wire: &mut [u8], plain: &mut Vec<u8>, pool: &mut Pool) {
        plain.clear();
        let Some(session) = &mut self.tls else {
            return;
        };
        session.receive(wire, plain, pool);
        let (open, failed) = (!session.is_handshaking(), session.has_failed());
        if failed || session.peer_closed() {
            self.flags.set(Flags::TLS_OVER);
        }
        match (self.state, open) {
            (State::Handshaking, true) if self.was_open() => self.secured(now),
            (State::Handshaking, true) => self.open(now),
            (State::Handshaking, false) if failed => self.fail_handshake(now, pool),
            _ => {}
        }
        if self.state == State::Open && failed {
            self.fail_tls(pool);
        }
    }

    /// Puts what is held in front of `fresh`.
    #[inline]
    pub(super) fn begin_input<'a>(&mut self, fresh: &'a [u8]) -> InputCursor<'a> {
        if self.recv_buf.is_empty() {
            InputCursor::fresh(fresh)
        } else {
            self.join(fresh)
        }
    }

    #[inline(never)]
    fn join(&mut self, fresh: &[u8]) -> InputCursor<'static> {
        self.flags.clear(Flags::FRAMES_BUFFERED);
        let mut joined = std::mem::take(&mut self.recv_buf);
        let length = joined.len();
        if length > LARGE && joined.capacity() - length < fresh.len() {
            // Doubling would hold twice what has come.
            joined.reserve_exact(fresh.len() + length / 4);
        }
        joined.extend_from_slice(fresh);
        InputCursor {
            fresh: &[],
            joined,
            at: std::mem::take(&mut self.recv_pos),
            advanced: false,
        }
    }

    /// What waits to be decoded without a read, or only events that wait.
    pub(crate) fn begin_buffered(&mut self) -> InputCursor<'static> {
        if self.flags.has(Flags::FRAMES_BUFFERED) && !self.is_paused() {
            self.begin_input(&[])
        } else {
            InputCursor::nothing()
        }
    }

    /// The peer's FIN was read.
    pub(crate) fn handle_eof(&mut self, now: Time, pool: &mut Pool) {
        self.flags.set(Flags::EOF);
        match self.state {
            State::Accepting => self.fail_header(now, pool),
            State::Handshaking => self.fail_handshake(now, pool),
            State::Connecting => {}
            State::Open => self.flags.set(Flags::READ_DRAINED),
            State::Closing if self.close_phase == ClosePhase::Linger => {
                self.close_phase = ClosePhase::Gone { reset: false };
            }
            State::Closing => {}
        }
    }

    /// A read found the kernel's buffer empty.
    pub(crate) fn handle_blocked(&mut self, pool: &mut Pool) {
        if self.flags.has(Flags::WRITE_FAILED) {
            self.end(Closed::new(CloseReason::Reset), pool);
        } else if self.flags.has(Flags::CLOSE_AFTER_INPUT) {
            self.flags.set(Flags::READ_DRAINED);
        }
    }

    /// A read failed for good.
    pub(crate) fn handle_read_error(&mut self, error: io::Error, pool: &mut Pool) {
        self.flags.set(Flags::EOF);
        self.end(closed_by(error), pool);
    }

    /// The next thing to tell the handler, taking frames from `staged`.
    pub(crate) fn next_event<'s>(
        &mut self,
        staged: &'s mut InputCursor<'_>,
        now: Time,
        pool: &mut Pool,
    ) -> Option<Event<'s>> {
        if !self.only_frames() {
            if let ControlFlow::Break(news) = self.pending_event() {
                return news;
            }
            if !staged.rest().is_empty() && !self.may_deliver(now) {
                return None;
            }
        }
        let step = match staged.rest() {
            [] => Step::More,
            rest => self.codec.decode(rest),
        };
        match step {
            Step::Frame { payload, consumed } => {
                if self.throttle.is_some() {
                    self.charge_frame(now);
                }
                self.count_frame(payload.len(), pool);
                let frame = staged.at + payload.start..staged.at + payload.end;
                staged.advance(consumed);
                return Some(Event::Frame(staged.bytes().get(frame).unwrap_or_default()));
            }
            Step::More => {}
            Step::TooLarge => {
                let reason = self.classify_stream(staged.rest(), CloseReason::FrameTooLarge);
                self.close(Closed::new(reason), now, pool);
                return None;
            }
            Step::Bad(error) => {
                let reason = self.classify_stream(staged.rest(), CloseReason::BadFrame);
                self.close(Closed::with(reason, error), now, pool);
                return None;
            }
        }
        if self.only_frames() {
            return None;
        }
        if self.flags.has(Flags::FRAMES_BUFFERED) {
            // A callback of this turn resumed: what is held is staged first, before its end is expired_through.
            return None;
        }
        self.finish_input(staged.rest(), now, pool);
        if self.state == State::Open && self.is_input_over() && !self.flags.has(Flags::FINISH_REPORTED) {
            self.flags.set(Flags::FINISH_REPORTED);
            return Some(Event::Finished);
        }
        None
    }

    /// The next frame of `staged`, and what is behind it, if there is nothing but frames to think of: else
    /// [`Machine::next_event`] knows what is next.
    #[inline]
    pub(crate) fn next_frame<'s>(&mut self, staged: &'s [u8], pool: &mut Pool) -> Option<(&'s [u8], &'s [u8])> {
        if !self.only_frames() {
            return None;
        }
        let (payload, behind) = self.codec.cut(staged)?;
        self.count_frame(payload.len(), pool);
        Some((payload, behind))
    }

    #[inline]
    fn count_frame(&mut self, length: usize, pool: &mut Pool) {
        self.traffic.frames_in += 1;
        pool.traffic.frames_in += 1;
        pool.sizes_in.record(length as u64);
    }

    /// What comes before frames, or instead of them.
    fn pending_event(&mut self) -> ControlFlow<Option<Event<'static>>> {
        let event = if self.state == State::Accepting && self.flags.take(Flags::HEADER_PENDING) {
            Event::Header
        } else if !self.is_established() {
            return ControlFlow::Break(None);
        } else if self.flags.has(Flags::OPENED_PENDING) {
            self.mark_opened();
            Event::Opened
        } else if self.flags.take(Flags::SECURED_PENDING) {
            Event::Secured
        } else if let Some(key) = self.take_due_timer() {
            Event::Timer(key)
        } else if self.flags.take(Flags::DRAIN_PENDING) {
            Event::Drain
        } else if self.flags.take(Flags::WRITABLE_PENDING) {
            Event::Writable
        } else if self.is_paused() || self.state != State::Open {
            return ControlFlow::Break(None);
        } else {
            return ControlFlow::Continue(());
        };
        ControlFlow::Break(Some(event))
    }

    /// No whole frame is left, only `rest`: closes if nothing more can come.
    pub(super) fn finish_input(&mut self, rest: &[u8], now: Time, pool: &mut Pool) {
        let begun = if rest.is_empty() {
            self.recv_buf.get(self.recv_pos..).unwrap_or_default()
        } else {
            rest
        };
        let between_frames = begun.is_empty();
        let truncated = self.classify_stream(begun, CloseReason::Truncated);
        if self.has_failed() {
            self.close(Closed::new(CloseReason::Tls), now, pool);
        } else if self.flags.has(Flags::WRITE_FAILED) && self.is_input_over() {
            self.end(Closed::new(CloseReason::Reset), pool);
        } else if self.flags.has(Flags::FINISH_REPORTED) {
            if self.closes_when_finished() {
                self.close_by_handler(now, pool);
            }
        } else if self.is_input_over() && !between_frames {
            let reason = if self.is_cut_off() {
                CloseReason::TlsTruncated
            } else {
                truncated
            };
            self.close(Closed::new(reason), now, pool);
        } else if self.closes_when_answered() && self.flags.has(Flags::READ_DRAINED) && between_frames {
            self.close_by_handler(now, pool);
        }
    }

    pub(super) fn take_due_timer(&mut self) -> Option<u8> {
        if !self.flags.has(Flags::TIMER_PENDING) {
            return None;
        }
        let due = |timer: &Timer| timer.at <= self.expired_through;
        let first = self.timers.iter().enumerate().min_by_key(|(_, timer)| timer.at);
        let Some((index, _)) = first.filter(|(_, timer)| due(timer)) else {
            self.flags.clear(Flags::TIMER_PENDING);
            return None;
        };
        let key = self.timers.remove(index).key;
        self.flags.put(Flags::TIMED, !self.timers.is_empty());
        Some(key)
    }

    /// Keeps what the decoder left.
    #[inline]
    pub(crate) fn end_input(&mut self, staged: InputCursor<'_>, now: Time, pool: &mut Pool) {
        let begun = self.tls.as_ref().is_some_and(|session| session.has_begun());
        if staged.is_used_up() && self.only_frames() && self.recv_buf.is_empty() && !begun {
            if self.deadlines.frame.is_armed() {
                self.set_frame_clock(Time::NEVER);
            }
            return;
        }
        self.wake(pool);
        if let (State::Handshaking, rest @ [_, ..], Some(session)) = (self.state, staged.rest(), &mut self.tls) {
            session.stash(rest, pool);
        }
        let InputCursor {
            fresh,
            joined,
            at,
            advanced,
        } = staged;
        if joined.is_empty() {
            let rest = fresh.get(at..).unwrap_or_default();
            if self.state == State::Open && !rest.is_empty() {
                self.recv_buf = pool.take();
                self.recv_buf.extend_from_slice(rest);
            }
        } else if self.state == State::Open && at < joined.len() {
            self.keep_tail(joined, at, pool);
        } else {
            pool.give(joined);
        }
        if self.is_paused() && !self.recv_buf.is_empty() {
            self.flags.set(Flags::FRAMES_BUFFERED);
        }
        if self.state != State::Open || !self.has_begun() {
            self.set_frame_clock(Time::NEVER);
        } else if self.is_paused() {
            if advanced {
                self.set_frame_clock(Time::NEVER);
            }
        } else if advanced || !self.deadlines.frame.is_armed() {
            self.set_frame_clock(now.after(self.limits.frame_timeout));
        }
    }

    /// What is held is for the next turn. It is we who keep it waiting: no clock runs against the peer meanwhile, and it is idle from
    /// now on.
    pub(crate) fn postpone(&mut self, now: Time) {
        if !self.recv_buf.is_empty() {
            self.flags.set(Flags::FRAMES_BUFFERED);
            self.set_frame_clock(Time::NEVER);
            self.last_input = now;
            self.stood = Duration::ZERO;
        }
    }

    /// Part of a frame has come, or part of a record, which is the beginning of whatever comes in it.
    pub(super) fn has_begun(&self) -> bool {
        (self.codec.has_frames() && !self.recv_buf.is_empty())
            || self.tls.as_ref().is_some_and(|session| session.has_begun())
    }

    /// The clock of the frame that has begun, running or stopped.
    pub(super) fn set_frame_clock(&mut self, frame: Time) {
        match &mut self.stopped {
            Some(stopped) => stopped.frame = frame,
            None => self.deadlines.frame = frame,
        }
    }

    /// Keeps the tail of a joined buffer, without copying it for each frame taken from its front and
    /// without keeping a large buffer for a small tail.
    pub(super) fn keep_tail(&mut self, mut joined: Vec<u8>, at: usize, pool: &mut Pool) {
        let rest = joined.len() - at;
        if at < rest {
            self.recv_pos = at;
            self.recv_buf = joined;
        } else if joined.capacity() > 64 * 1024 && rest < joined.capacity() / 4 {
            self.recv_buf = pool.take();
            self.recv_buf.extend_from_slice(joined.get(at..).unwrap_or_default());
            pool.give(joined);
        } else {
            joined.drain(..at);
            self.recv_buf = joined;
        }
    }

    pub(crate) fn pause(&mut self, now: Time) {
        if self.takes_output() && !self.write_closed() {
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
    pub(super) fn stop_input_clocks(&mut self, now: Time) {
        if self.stopped.is_none() && self.state == State::Open {
            self.stopped = Some(Stopped {
                at: now,
                frame: std::mem::replace(&mut self.deadlines.frame, Time::NEVER),
            });
        }
    }

    /// Reading goes on, and so do the peer's clocks where they stood: our own sending moves them no further.
    pub(super) fn restart_input_clocks(&mut self, now: Time) {
        if self.state == State::Open && !self.is_paused() {
            if let Some(stopped) = self.stopped.take() {
                let stood = now.since(stopped.at);
                self.deadlines.frame = stopped.frame.after(stood);
                self.stood = self.stood.saturating_add(stood);
                self.flags.set(Flags::CLOCKS_RESUMED);
            }
            if !self.recv_buf.is_empty() {
                self.flags.set(Flags::FRAMES_BUFFERED);
            }
        }
    }

    /// Cuts what is undecoded, and all that follows, by another rule.
    pub(crate) fn set_framing(&mut self, framing: &Framing) {
        let max = self.limits.max_frame.unwrap_or(framing.default_max());
        self.codec = Codec::new(framing, max);
        self.decode_again();
    }

    pub(crate) fn set_max_frame(&mut self, max: usize) {
        self.codec.set_max(max);
        self.decode_again();
    }

    /// What is held may be whole now. Before the connection is open it is the beginning of a PROXY header, and no frame.
    fn decode_again(&mut self) {
        if self.state == State::Open && !self.recv_buf.is_empty() {
            self.flags.set(Flags::FRAMES_BUFFERED);
        }
    }

    /// Whether a read is welcome now.
    pub(crate) fn wants_read(&self) -> bool {
        match self.state {
            _ if self.flags.has(Flags::EOF) => false,
            State::Accepting => self.flags.has(Flags::AWAITS_HEADER),
            State::Connecting => false,
            State::Handshaking => self.recv_buf.is_empty(),
            State::Open => {
                !self.is_paused()
                    && !self.flags.has(Flags::FRAMES_BUFFERED)
                    && !self.is_input_over()
                    && !self.has_failed()
            }
            // What still arrives is discarded, so that a peer that writes before it reads gets its answers,
            // and so that closing does not reset what it has not read.
            State::Closing => {
                matches!(self.close_phase, ClosePhase::Flush | ClosePhase::Linger)
                    && self.discarded <= self.limits.linger_bytes
            }
        }
    }

    /// The peer has finished and the handler goes on: what another event may announce is that the peer is gone for good.
    pub(crate) fn wants_error(&self) -> bool {
        // Behind our own FIN a write fails in any case.
        let asks = self.flags.has(Flags::EOF) && !self.flags.has(Flags::FIN_SENT);
        self.state == State::Open && asks && !self.is_paused()
    }

    /// A short read does not count as empty: only a fresh WouldBlock does.
    #[inline]
    pub(crate) fn wants_fresh_blocked(&self) -> bool {
        self.flags.has(Flags::WRITE_FAILED)
            || (self.flags.has(Flags::CLOSE_AFTER_INPUT) && !self.flags.has(Flags::READ_DRAINED))
    }

    /// Something can be told to the handler, or decided, without a read.
    #[inline]
    pub(crate) fn has_events(&self) -> bool {
        !self.only_frames() && self.finds_events()
    }

    fn finds_events(&self) -> bool {
        const TELL: u32 =
            Flags::OPENED_PENDING.0 | Flags::SECURED_PENDING.0 | Flags::WRITABLE_PENDING.0 | Flags::DRAIN_PENDING.0;
        if self.state == State::Accepting {
            return self.flags.has(Flags::HEADER_PENDING);
        }
        if !self.is_established() {
            return false;
        }
        if self.flags.0 & TELL != 0 || self.timers.iter().any(|timer| timer.at <= self.expired_through) {
            return true;
        }
        if self.is_paused() || self.state != State::Open {
            return false;
        }
        self.flags.has(Flags::FRAMES_BUFFERED)
            || self.has_failed()
            || (self.is_input_over() && !self.flags.has(Flags::FINISH_REPORTED))
            || (self.flags.has(Flags::FINISH_REPORTED) && self.closes_when_finished())
            || (self.closes_when_answered() && self.flags.has(Flags::READ_DRAINED) && self.recv_buf.is_empty())
    }

    /// Not taking frames: the handler's wish, or output waits above the watermark, or it came too fast.
    #[inline]
    pub(super) fn is_paused(&self) -> bool {
        const PAUSES: u32 = Flags::PAUSED.0 | Flags::THROTTLED.0 | Flags::DETACHING.0;
        self.flags.0 & PAUSES != 0 || (self.flags.has(Flags::CONGESTED) && !self.limits.full_duplex)
    }

    /// How many bytes a read may bring now. None if it came too fast: then it is throttled for a while.
    #[inline]
    pub(crate) fn read_allowance(&mut self, now: Time) -> usize {
        if self.throttle.is_none() || self.state != State::Open {
            return usize::MAX;
        }
        match self
            .throttle
            .as_mut()
            .map_or(Ok(u64::MAX), |throttle| throttle.bytes(now))
        {
            Ok(bytes) => usize::try_from(bytes).unwrap_or(usize::MAX),
            Err(until) => {
                self.wait_until(until, now);
                0
            }
        }
    }

    fn may_deliver(&mut self, now: Time) -> bool {
        match self.throttle.as_mut().map_or(Ok(()), |throttle| throttle.frame(now)) {
            Ok(()) => true,
            Err(until) => {
                self.wait_until(until, now);
                false
            }
        }
    }

    /// Throttles it. Its own clocks stand meanwhile: it is we who do not read.
    fn wait_until(&mut self, until: Time, now: Time) {
        self.flags.set(Flags::THROTTLED);
        self.stop_input_clocks(now);
        if let Some(throttle) = &mut self.throttle {
            throttle.until = until;
        }
    }

    /// Once the peer has finished and the handler knows it, the connection closes whatever the handler does.
    fn closes_when_finished(&self) -> bool {
        self.closes_when_answered()
            || self.flags.has(Flags::FINISHING)
            || self.tls.as_ref().is_some_and(|session| session.closes_both_ways())
    }

    /// It closes once what has come is answered, and no answer is still to come from elsewhere.
    fn closes_when_answered(&self) -> bool {
        self.flags.has(Flags::CLOSE_AFTER_INPUT) && self.pending_replies == 0
    }

    pub(super) fn is_input_over(&self) -> bool {
        self.flags.has(Flags::EOF) || self.tls.as_ref().is_some_and(|session| session.peer_closed())
    }

    /// `reason`, unless the stream never made a frame because it is a TLS ClientHello (RFC 8446 section 5.1).
    pub(super) fn classify_stream(&self, begun: &[u8], reason: CloseReason) -> CloseReason {
        match begun {
            [0x16, 0x03, 0x00..=0x04, _, _, 0x01, ..] if self.tls.is_none() && self.traffic.frames_in == 0 => {
                CloseReason::UnexpectedTls
            }
            _ => reason,
        }
    }
}
