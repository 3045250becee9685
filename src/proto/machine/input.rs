//! From the socket to the handler: received bytes become events, and the remainder is buffered.

use std::io;
use std::ops::ControlFlow;
use std::time::Duration;

use super::Machine;
use crate::proto::close::closed_by;
use crate::proto::framing::Step;
use crate::proto::hello;
use crate::proto::life::Phase;
use crate::proto::pool::Pool;
use crate::proto::proxy::{self, Front, ProxyError};
use crate::proto::recv::InputCursor;
use crate::proto::state::{Event, State, Traffic};
use crate::proto::status::Events;
use crate::proto::time::Time;
use crate::proto::tls::Session;
use crate::reason::{CloseReason, Closed};

impl Machine {
    // What a read returned.

    /// Handles bytes that were read. `plain` is scratch space for what TLS decrypts.
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
            active.deadlines.note_input();
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

    /// True if the bytes are frames or records; else they are handled here.
    #[inline(never)]
    fn takes_input(&mut self, wire: &[u8], now: Time, pool: &mut Pool) -> bool {
        match self.status.life.phase() {
            Phase::Open => {
                if let Some(throttle) = self.throttle() {
                    throttle.charge_bytes(wire.len() as u64, now);
                }
                true
            }
            Phase::Handshaking | Phase::Connecting => true,
            Phase::HeaderRequired | Phase::HeaderOptional => {
                let (active, buffers) = self.wake(pool);
                active.recv_buf.append(wire, buffers);
                self.look_for_header(now, pool);
                false
            }
            phase => {
                let (active, _) = self.wake(pool);
                active.ending.discard(wire.len());
                if phase == Phase::Linger {
                    self.handle_linger_input(now);
                }
                false
            }
        }
    }

    fn look_for_header(&mut self, now: Time, pool: &mut Pool) {
        match proxy::front(self.parts().recv_buf.pending()) {
            Front::Header(header, length) => {
                let active = self.wake_unpooled();
                active.recv_buf.consume(length, &mut pool.buffers);
                active.proxy = Some(header.into());
                self.status.life.enter(Phase::HeaderDone);
            }
            Front::More => {}
            Front::Other if self.status.life.phase() == Phase::HeaderRequired => {
                self.close_for_header(ProxyError::MISSING, now, pool);
            }
            Front::Other => self.status.life.enter(Phase::HeaderDone),
            Front::Bad(error) => self.close_for_header(error, now, pool),
        }
    }

    fn close_for_header(&mut self, error: ProxyError, now: Time, pool: &mut Pool) {
        self.close(Closed::with(CloseReason::BadProxyHeader, error), now, pool);
    }

    /// Decrypts `wire` into `plain`.
    fn decrypt(&mut self, now: Time, wire: &mut [u8], plain: &mut Vec<u8>, pool: &mut Pool) {
        plain.clear();
        let Some(session) = &mut self.tls else {
            return;
        };
        session.receive(wire, plain, &mut pool.buffers);
        let (agreed, failed) = (!session.is_handshaking(), session.has_failed());
        if session.has_ended() {
            self.status.tls_ended = true;
        }
        match (self.state(), agreed) {
            (State::Handshaking, true) => self.end_handshake(now),
            (State::Handshaking, false) if failed => self.fail_handshake(now, pool),
            _ => {}
        }
        if self.status.life.is_open() && failed {
            self.fail_tls(pool);
            self.resume_clocks(now);
        }
    }

    /// Handles bytes that arrived before a handshake, as if they had been read now.
    pub(crate) fn handle_stash<'a>(
        &mut self,
        now: Time,
        plain: &'a mut Vec<u8>,
        pool: &mut Pool,
    ) -> InputCursor<'a> {
        let mut wire = match &mut self.active {
            Some(active) => active.recv_buf.take(),
            None => Vec::new(),
        };
        self.decrypt(now, &mut wire, plain, pool);
        pool.give(wire);
        self.begin_input(plain)
    }

    /// The peer has sent RST behind nothing, and the kernel will report it as an end of stream.
    pub(crate) fn expect_reset(&mut self) {
        self.status.recv.expect_reset();
    }

    /// Handles the peer's FIN.
    pub(crate) fn handle_eof(&mut self, now: Time, pool: &mut Pool) {
        if self.status.recv.was_reset() {
            return self.handle_read_error(io::Error::from_raw_os_error(libc::ECONNRESET), pool);
        }
        self.status.recv.set_eof();
        match self.state() {
            State::Accepting if self.parts().recv_buf.is_empty() => {
                self.close(Closed::new(CloseReason::ClosedEarly), now, pool);
            }
            State::Accepting => self.close_for_header(ProxyError::CUT_OFF, now, pool),
            State::Handshaking => self.fail_handshake(now, pool),
            State::Connecting => {}
            State::Open => self.status.close.read_ended(),
            State::Closing if self.status.life.phase() == Phase::Linger => {
                self.status.life.enter(Phase::Gone);
            }
            State::Closing => {}
        }
    }

    /// Handles a read that found the kernel's buffer empty.
    pub(crate) fn handle_blocked(&mut self, pool: &mut Pool) {
        if self.status.send.has_failed() {
            self.end(Closed::new(CloseReason::Reset), pool);
        } else {
            self.status.close.read_blocked();
        }
    }

    /// Handles a read that failed for good.
    pub(crate) fn handle_read_error(&mut self, error: io::Error, pool: &mut Pool) {
        self.status.recv.set_eof();
        self.fail(closed_by(error), pool);
        self.status.send.fail();
    }

    // From bytes to events.

    /// Puts the buffered bytes in front of `fresh`.
    #[inline(always)]
    fn begin_input<'a>(&mut self, fresh: &'a [u8]) -> InputCursor<'a> {
        match &mut self.active {
            Some(active) if !active.recv_buf.is_empty() => {
                self.status.recv.clear_frames_buffered();
                let missing = self.codec.missing(active.recv_buf.pending());
                active.recv_buf.join(fresh, missing)
            }
            _ => InputCursor::fresh(fresh),
        }
    }

    /// Begins with the bytes that can be decoded without a read; empty if only events are pending.
    pub(crate) fn begin_buffered(&mut self) -> InputCursor<'static> {
        if self.status.recv.has_frames_buffered() && !self.is_paused() {
            self.begin_input(&[])
        } else {
            InputCursor::nothing()
        }
    }

    /// Returns the next event for the handler, taking frames from `cursor`.
    pub(crate) fn next_event<'s>(
        &mut self,
        cursor: &'s mut InputCursor<'_>,
        now: Time,
        pool: &mut Pool,
    ) -> Option<Event<'s>> {
        if !self.only_frames() {
            if let ControlFlow::Break(event) = self.pending_event() {
                return event;
            }
            if !cursor.rest().is_empty() && !self.may_deliver(now) {
                return None;
            }
        }
        let mut step = self.codec.decode(cursor.rest(), &mut pool.buffers);
        if matches!(step, Step::More) && cursor.join_rest() {
            step = self.codec.decode(cursor.rest(), &mut pool.buffers);
        }
        let bad = match step {
            Step::Frame { .. } if self.begins_as_hello(cursor.rest()) => {
                self.close(Closed::new(CloseReason::UnexpectedTls), now, pool);
                return None;
            }
            Step::Frame { payload, consumed } => {
                self.charge_frame(payload.len(), now, pool);
                return Some(Event::Frame(cursor.take_frame(payload, consumed)));
            }
            Step::Unpacked { payload, consumed } => {
                self.charge_frame(payload.len(), now, pool);
                cursor.advance(consumed);
                return Some(Event::Unpacked(payload));
            }
            Step::More => None,
            Step::TooLarge => Some(Closed::new(CloseReason::FrameTooLarge)),
            Step::Bad(error) => Some(Closed::with(CloseReason::BadFrame, error)),
        };
        if let Some(closed) = bad {
            return self.refuse_input(cursor.rest(), closed, now, pool);
        }
        // If a callback of this turn resumed, the buffered bytes are decoded before the end is.
        if self.only_frames() || self.status.recv.has_frames_buffered() {
            return None;
        }
        self.finish_input(cursor.rest(), now, pool);
        let recv = &mut self.status.recv;
        if self.status.life.is_open() && !recv.is_end_reported() && self.is_input_over() {
            self.status.recv.set_end_reported();
            return Some(Event::Finished);
        }
        None
    }

    /// Lets the handler answer input of which no frame can be made, before it closes the
    /// connection. There is no answer to TLS.
    #[cold]
    fn refuse_input(
        &mut self,
        begun: &[u8],
        mut closed: Closed,
        now: Time,
        pool: &mut Pool,
    ) -> Option<Event<'static>> {
        closed.reason = self.reason_for(begun, closed.reason);
        if closed.reason == CloseReason::UnexpectedTls {
            self.close(closed, now, pool);
            return None;
        }
        self.status.recv.set_bad_input();
        // It stays the reason, whatever the handler does.
        let known = Closed::new(closed.reason);
        self.wake(pool).0.ending.set_reason(known);
        Some(Event::BadInput(closed))
    }

    /// The handler has answered such input: closes, unless the handler has.
    pub(crate) fn end_bad_input(&mut self, closed: Closed, now: Time, pool: &mut Pool) {
        self.close(Closed::new(closed.reason), now, pool);
        if let (Some(error), Some(active)) = (closed.error, &mut self.active) {
            active.ending.add_error(error);
        }
    }

    /// Returns the next frame of `bytes` and the bytes behind it, if there are only frames to
    /// deliver.
    ///
    /// Else [`Machine::next_event`] returns what is next.
    #[inline]
    pub(crate) fn next_frame<'s>(
        &mut self,
        bytes: &'s [u8],
        pool: &mut Pool,
    ) -> Option<(&'s [u8], &'s [u8])> {
        if !self.only_frames() || self.begins_as_hello(bytes) {
            return None;
        }
        let (payload, behind) = self.codec.cut(bytes)?;
        self.count_frame(payload.len(), pool);
        Some((payload, behind))
    }

    fn charge_frame(&mut self, length: usize, now: Time, pool: &mut Pool) {
        if let Some(throttle) = self.throttle() {
            throttle.charge_frame(now);
        }
        self.count_frame(length, pool);
    }

    #[inline]
    fn count_frame(&mut self, length: usize, pool: &mut Pool) {
        self.traffic.frames_in += 1;
        pool.traffic.frames_in += 1;
        pool.sizes_in.record(length as u64);
    }

    /// Takes the next pending event; breaks with none if no frame may follow.
    fn pending_event(&mut self) -> ControlFlow<Option<Event<'static>>> {
        let events = &mut self.status.events;
        let event = if self.status.life.phase() == Phase::HeaderDone {
            self.status.life.enter(Phase::Admitting);
            Event::Header
        } else if !self.status.life.is_established() {
            return ControlFlow::Break(None);
        } else if events.has(Events::OPENED) {
            self.mark_opened();
            Event::Opened
        } else if events.take(Events::SECURED) {
            Event::Secured
        } else if let Some(key) = self.take_due_timer() {
            Event::Timer(key)
        } else if self.status.events.take(Events::DRAIN) {
            Event::Drain
        } else if self.status.events.take(Events::WRITABLE) {
            Event::Writable
        } else if self.status.events.take(Events::FLUSHED) {
            self.status.close.end_hold(self.status.recv.is_eof());
            Event::Flushed
        } else if !self.status.life.is_open() || self.is_paused() {
            return ControlFlow::Break(None);
        } else {
            return ControlFlow::Continue(());
        };
        ControlFlow::Break(Some(event))
    }

    /// Takes the pending event `Opened`.
    pub(crate) fn mark_opened(&mut self) {
        self.status.events.clear(Events::OPENED);
        self.status.life.set_opened();
    }

    fn take_due_timer(&mut self) -> Option<u8> {
        if !self.status.events.has(Events::TIMER) {
            return None;
        }
        let active = self.active.as_mut();
        let due = active.and_then(|active| active.deadlines.take_due_timer());
        if due.is_none() {
            self.status.events.clear(Events::TIMER);
        }
        due
    }

    /// Closes if no whole frame is left, only `rest`, and nothing more can arrive.
    fn finish_input(&mut self, rest: &[u8], now: Time, pool: &mut Pool) {
        let begun = match rest.is_empty() {
            true => self.parts().recv_buf.pending(),
            false => rest,
        };
        let between_frames = begun.is_empty();
        let truncated = self.reason_for(begun, CloseReason::Truncated);
        let is_over = self.is_input_over();
        if self.has_tls_failed() {
            self.close(Closed::new(CloseReason::Tls), now, pool);
        } else if self.status.send.has_failed() && is_over && !self.ends_in_order() {
            self.end(Closed::new(CloseReason::Reset), pool);
        } else if self.status.recv.is_end_reported() {
            if self.closes_when_finished() {
                self.close_by_handler(now, pool);
            }
        } else if is_over && !between_frames {
            let reason = if self.is_tls_truncated() {
                CloseReason::TlsTruncated
            } else {
                truncated
            };
            self.close(Closed::new(reason), now, pool);
        } else if between_frames
            && self.status.close.is_read_drained()
            && self.closes_when_answered()
        {
            self.close_by_handler(now, pool);
        }
    }

    /// True if the peer has said close_notify, and no output is known to be lost.
    fn ends_in_order(&self) -> bool {
        let session = self.tls.as_deref();
        session.is_some_and(Session::peer_closed) && !self.parts().ending.has_reason()
    }

    /// Buffers what the decoder left.
    #[inline]
    pub(crate) fn end_input(&mut self, cursor: InputCursor<'_>, now: Time, pool: &mut Pool) {
        let is_whole = self.begun_record() == 0 && self.parts().recv_buf.is_empty();
        if cursor.is_used_up() && self.only_frames() && is_whole {
            if let Some(active) = &mut self.active {
                active.deadlines.clear_frame();
            }
            return;
        }
        self.keep_input(cursor, now, pool);
        if !self.status.life.is_open() {
            return;
        }
        if !self.waits_for_handler() {
            // A pause of this turn could not tell whether bytes would be left to deliver.
            return self.pause_clocks(now);
        }
        if let Some(active) = &mut self.active {
            // Nothing can complete what has begun.
            active.deadlines.clear_frame();
            self.status.deadlines_moved |= active.deadlines.resume(self.last_input, now);
        }
    }

    fn keep_input(&mut self, cursor: InputCursor<'_>, now: Time, pool: &mut Pool) {
        let advanced = cursor.has_advanced();
        let (is_open, is_paused) = (self.status.life.is_open(), self.is_paused());
        let active = self.active.get_or_insert_with(|| pool.take_active());
        if is_open || self.status.life.state() == State::Handshaking {
            active.recv_buf.keep(cursor, &mut pool.buffers);
        } else {
            cursor.discard(&mut pool.buffers);
        }
        if is_open && is_paused {
            self.status.recv.decode_buffered(&active.recv_buf);
        }
        let has_begun = is_open && self.has_begun();
        let (pace, received) = (self.limits.frame_pace(), self.begun_bytes());
        let deadlines = &mut self.wake(pool).0.deadlines;
        if !has_begun || (is_paused && advanced) {
            deadlines.clear_frame();
        } else if !is_paused {
            // Else the bytes count once reading resumes.
            deadlines.count_frame(received, advanced, pace, now);
        }
    }

    /// Leaves the buffered frames to the next turn.
    ///
    /// It is the server that keeps the peer waiting. After a frame (`advanced`) no clock runs
    /// meanwhile, and the idle timeout starts anew. Else the clock of the frame that has begun goes
    /// on: events of the handler alone do not extend it.
    pub(crate) fn postpone(&mut self, advanced: bool, now: Time) {
        if !self.status.life.is_open() {
            return;
        }
        match &mut self.active {
            Some(active) if !active.recv_buf.is_empty() => {
                self.status.recv.decode_buffered(&active.recv_buf);
                if advanced {
                    active.deadlines.clear_frame();
                    active.deadlines.note_input();
                    self.last_input = now;
                }
            }
            _ => {}
        }
    }

    // What the reactor asks.

    /// True if the next event of the socket can only announce that the peer is gone for good: the
    /// peer has finished, all its frames are delivered, and the handler goes on.
    pub(crate) fn wants_error(&self) -> bool {
        // Behind our own FIN a write fails in any case.
        let asks = self.is_input_over() && !self.status.send.has_sent_fin();
        let closes = self.status.recv.is_end_reported() && self.closes_when_finished();
        let ends = closes && !self.is_paused();
        let goes_on = !ends && !self.parts().ending.awaits_commands();
        self.status.life.is_open() && asks && goes_on && self.parts().recv_buf.is_empty()
    }

    /// True if a paused connection may be read to find the peer's end: nothing waits to be
    /// delivered.
    pub(crate) fn may_look_for_end(&self) -> bool {
        let recv = self.status.recv;
        self.status.life.is_open()
            && recv.is_paused_by_handler()
            && !recv.is_throttled()
            && !self.status.life.is_detaching()
            && !self.status.tls_ended
            && !recv.is_eof()
            && self.parts().recv_buf.is_empty()
    }

    /// True if the handler is to be notified of its output and of nothing else. The socket is read
    /// before: a handler that answers with more output would leave its peer unread for ever.
    pub(crate) fn reports_only_output(&self) -> bool {
        let status = self.status;
        status.life.is_open() && status.events.only_output() && !status.recv.has_frames_buffered()
    }

    /// True if only a fresh "would block" proves that the kernel's buffer is empty, not a short
    /// read.
    #[inline]
    pub(crate) fn wants_fresh_blocked(&self) -> bool {
        !self.only_frames() && (self.status.send.has_failed() || self.status.close.needs_read())
    }

    /// Returns how many bytes may be read now: none if they came too fast, which pauses reading.
    #[inline]
    pub(crate) fn read_allowance(&mut self, now: Time) -> usize {
        if !self.status.life.is_open() {
            return usize::MAX;
        }
        let Some(throttle) = self.throttle() else {
            return usize::MAX;
        };
        match throttle.bytes(now) {
            Ok(bytes) => usize::try_from(bytes).unwrap_or(usize::MAX),
            Err(until) => {
                self.throttle_until(until, now);
                0
            }
        }
    }

    fn may_deliver(&mut self, now: Time) -> bool {
        let Some(Err(until)) = self.throttle().map(|throttle| throttle.frame(now)) else {
            return true;
        };
        self.throttle_until(until, now);
        false
    }

    /// Pauses reading, and the peer's clocks, until `until`.
    fn throttle_until(&mut self, until: Time, now: Time) {
        self.status.recv.set_throttled(true);
        self.pause_clocks(now);
        if let Some(throttle) = self.throttle() {
            throttle.pause_until(until);
        }
    }

    // What is known of the peer.

    /// Drops the TLVs of the PROXY header, unless the header is kept elsewhere too.
    pub(crate) fn drop_unshared_tlvs(&mut self) {
        if let Some(active) = &mut self.active {
            active.drop_unshared_tlvs();
        }
    }

    /// True if `bytes`, in which the first frame is whole, begin a TLS ClientHello: the frame is
    /// none, although the framing found one. Only for the built-in framings with frames.
    #[inline]
    fn begins_as_hello(&self, bytes: &[u8]) -> bool {
        self.traffic.frames_in == 0 && bytes.first() == Some(&0x16) && self.is_hello(bytes)
    }

    #[cold]
    fn is_hello(&self, bytes: &[u8]) -> bool {
        hello::may_begin(bytes) && self.tls.is_none() && !self.codec.takes_any_bytes()
    }

    /// As [`Machine::extend_input_deadlines`], if one of them is over at `due`.
    pub(crate) fn extend_late_input(&mut self, due: Time, now: Time) {
        let (frame, idle) = (self.parts().deadlines.frame(), self.idle_deadline());
        let (first, timeout) = match frame < idle {
            true => (frame, self.limits.frame_timeout),
            false => (idle, self.limits.idle_timeout),
        };
        if first <= due {
            self.extend_input_deadlines(now.since(first).saturating_add(timeout), now);
        }
    }

    /// Everything is read that the peer sent during a pause of `span`, behind the traffic `before`:
    /// that time counts for the frame that is still incomplete, less what those bytes are worth.
    /// Returns their number.
    pub(crate) fn count_pause(&mut self, span: Duration, before: Traffic, now: Time) -> usize {
        let count = self.traffic.bytes_in.saturating_sub(before.bytes_in);
        let late = span.saturating_sub(self.limits.frame_pace().worth(count));
        if self.traffic.frames_in == before.frames_in {
            if let Some(active) = &mut self.active {
                active.deadlines.shorten_frame(late, now);
            }
        }
        usize::try_from(count).unwrap_or(usize::MAX)
    }

    /// For how long the peer has sent too little of the incomplete frame that is buffered, or taken
    /// too little of the pending output. Zero if neither is there, or the server does not read.
    pub(crate) fn stalled_for(&self, now: Time) -> Duration {
        let (read, write) = (self.limits.frame_pace(), self.limits.write_pace());
        self.parts().deadlines.stalled_for(read, write, now)
    }
}
