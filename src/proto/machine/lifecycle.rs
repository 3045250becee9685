//! From state to state: how a connection opens, goes behind TLS, leaves the loop, and ends by its
//! handler, its peer or its clocks.

use std::error::Error as StdError;
use std::time::Duration;

use super::Machine;
#[cfg(feature = "tls")]
use crate::proto::buffers::SendBuffer;
use crate::proto::close::is_for_full_output;
use crate::proto::deadlines::TimeLeft;
use crate::proto::detached_io::{DetachedIo, EndLimits};
use crate::proto::life::Phase;
use crate::proto::pool::Pool;
use crate::proto::state::{NextStep, State};
use crate::proto::status::Events;
use crate::proto::time::Time;
#[cfg(feature = "tls")]
use crate::proto::tls::TlsConfig;
use crate::proto::tls::{ClientTls, Session};
use crate::reason::{Close, CloseReason, Closed};

impl Machine {
    // Opening.

    /// Waits for a PROXY header before anything else.
    ///
    /// Unless it is `required`, other bytes begin a connection without one.
    pub(crate) fn await_header(&mut self, required: bool) {
        self.status.life.enter(if required {
            Phase::HeaderRequired
        } else {
            Phase::HeaderOptional
        });
    }

    /// User code has blocked for `span`: the handshake timeout excludes that time.
    pub(crate) fn extend_handshake(&mut self, span: Duration) {
        if let Some(active) = &mut self.active {
            active.deadlines.extend_phase(span);
        }
    }

    /// The service accepted the peer: TLS begins, or the connection is open.
    pub(crate) fn handle_admitted(&mut self, now: Time) {
        self.status.life.admit();
        if self.tls.is_some() {
            // Bytes behind the PROXY header are stashed in the receive buffer.
            return self.status.life.enter(Phase::Handshaking);
        }
        self.open(now);
        if let Some(active) = &mut self.active {
            self.status.recv.decode_buffered(&active.recv_buf);
            // They were read before the rates applied.
            if let Some(throttle) = &mut active.throttle {
                throttle.charge_bytes(active.recv_buf.len() as u64, now);
            }
        }
    }

    /// Sets when the present attempt to connect fails, or the next one begins.
    pub(crate) fn set_connect_deadline(&mut self, at: Time) {
        if self.is_connecting() {
            self.wake_unpooled().deadlines.arm_phase(at);
        }
    }

    /// The attempt succeeded: TLS begins if there is to be any, else the connection is open.
    pub(crate) fn handle_connected(&mut self, tls: Option<&ClientTls>, now: Time, pool: &mut Pool) {
        if !self.is_connecting() {
            return;
        }
        self.last_input = now;
        let Some(config) = tls else {
            return self.open(now);
        };
        match Session::client(config, Default::default(), &mut pool.buffers) {
            Ok(session) => self.begin_handshake(session, now, pool),
            Err(error) => self.end_without_handshake(error, pool),
        }
    }

    /// A detached connection comes back: it is open, with the bytes and the session that remain.
    pub(crate) fn handle_attached(&mut self, remains: DetachedIo, now: Time, pool: &mut Pool) {
        let (session, unread, unsent) = remains.into_parts();
        self.open(now);
        self.tls = session;
        let (active, buffers) = self.wake(pool);
        active.recv_buf.append(&unread, buffers);
        active.send_buf.tail(buffers).extend_from_slice(&unsent);
        if let Some(active) = &self.active {
            self.status.recv.decode_buffered(&active.recv_buf);
        }
    }

    fn open(&mut self, now: Time) {
        self.enter_open(now);
        self.last_input = now;
        self.status.events.set(Events::OPENED);
    }

    fn enter_open(&mut self, now: Time) {
        self.status.life.enter(Phase::Open);
        if let Some(active) = &mut self.active {
            active.deadlines.clear_phase();
        }
        // An outgoing connection may have been sent to before, and any may have been paused.
        self.pause_clocks(now);
    }

    // TLS.

    /// Goes on behind TLS (STARTTLS), as the server of the handshake.
    ///
    /// Applies at once to what is sent, and to input once the running callback has returned. What
    /// was sent before goes out in the clear, in front of the handshake. Bytes behind the last
    /// frame begin the handshake or fail it, and are never a frame: they may be injected
    /// (CVE-2011-0411). Returns the rule of the frames before, which may be a framer of the user's.
    #[cfg(feature = "tls")]
    pub(crate) fn start_tls(
        &mut self,
        config: &TlsConfig,
        now: Time,
        pool: &mut Pool,
    ) -> crate::Result<impl Sized + use<>> {
        let codec = self.codec_behind_tls()?;
        let session = Session::behind(config, self.take_output());
        self.begin_handshake(session, now, pool);
        Ok(std::mem::replace(&mut self.codec, codec))
    }

    /// As [`Machine::start_tls`], as the client of the handshake.
    #[cfg(feature = "tls")]
    pub(crate) fn start_tls_client(
        &mut self,
        config: &ClientTls,
        now: Time,
        pool: &mut Pool,
    ) -> crate::Result<impl Sized + use<>> {
        let codec = self.codec_behind_tls()?;
        match Session::client(config, self.take_output(), &mut pool.buffers) {
            Ok(session) => self.begin_handshake(session, now, pool),
            Err(error) => self.end_without_handshake(error, pool),
        }
        Ok(std::mem::replace(&mut self.codec, codec))
    }

    /// Returns the rule of the frames behind a handshake: nothing that came in the clear counts.
    #[cfg(feature = "tls")]
    fn codec_behind_tls(&self) -> crate::Result<super::Codec> {
        if self.tls.is_some() {
            return Err(crate::Error::ConnState("the connection speaks TLS already"));
        }
        let recv = self.status.recv;
        let finished = recv.is_eof() || recv.is_end_reported() || self.status.send.is_finishing();
        if !self.status.life.stays_open() || finished || self.write_closed() {
            return Err(crate::Error::no_handshake());
        }
        Ok(self.codec.renewed())
    }

    #[cfg(feature = "tls")]
    fn take_output(&mut self) -> SendBuffer {
        self.wake_unpooled().send_buf.take()
    }

    fn begin_handshake(&mut self, session: Session, now: Time, pool: &mut Pool) {
        self.tls = Some(Box::new(session));
        self.status.life.enter(Phase::Handshaking);
        self.status.recv.clear_frames_buffered();
        let until = now.after(self.limits.handshake_timeout);
        self.wake(pool).0.deadlines.begin_handshake(until);
    }

    fn end_without_handshake(&mut self, error: Box<dyn StdError + Send + Sync>, pool: &mut Pool) {
        self.end(Closed::with(CloseReason::TlsHandshake, error), pool);
    }

    /// The handshake is over: the connection is open, or open again after `start_tls`.
    pub(super) fn end_handshake(&mut self, now: Time) {
        if !self.was_open() {
            return self.open(now);
        }
        self.enter_open(now);
        self.status.events.set(Events::SECURED);
        // More may have arrived behind the handshake.
        self.status.close.check_again();
    }

    pub(super) fn fail_handshake(&mut self, now: Time, pool: &mut Pool) {
        let reason = self.unless_not_tls(CloseReason::TlsHandshake);
        let Some(session) = &mut self.tls else {
            return self.close(Closed::new(CloseReason::Reset), now, pool);
        };
        let error = session
            .take_failure()
            .unwrap_or_else(|| "the peer closed the connection during the handshake".into());
        self.drop_output(pool);
        self.close(Closed::with(reason, error), now, pool);
    }

    /// Returns why a handshake failed: for `reason`, if the peer speaks TLS.
    fn unless_not_tls(&self, reason: CloseReason) -> CloseReason {
        match &self.tls {
            Some(session) if session.is_not_tls() => CloseReason::NotTls,
            _ => reason,
        }
    }

    /// TLS failed: what was decrypted before is delivered, and no answer to it can be encrypted.
    ///
    /// The failure is the reason from now on, whatever a handler makes of a `send` that fails.
    pub(super) fn fail_tls(&mut self, pool: &mut Pool) {
        self.drop_output(pool);
        self.status.send.relieve();
        let error = self.tls.as_mut().and_then(|session| session.take_failure());
        let ending = &mut self.wake(pool).0.ending;
        if let (Some(error), false) = (error, ending.has_reason()) {
            ending.set_reason(Closed::with(CloseReason::Tls, error));
        }
    }

    /// True if FIN came without close_notify.
    pub(super) fn is_tls_truncated(&self) -> bool {
        self.tls
            .as_ref()
            .is_some_and(|session| !session.peer_closed())
    }

    // Leaving the loop.

    /// Stops events and output: the socket leaves the loop at the end of the turn.
    ///
    /// False if it cannot: the connection is not open, or leaves already.
    pub(crate) fn begin_detach(&mut self) -> bool {
        let is_finishing = self.status.send.is_finishing();
        let possible = self.status.life.stays_open() && !is_finishing && !self.write_closed();
        if possible {
            self.status.life.detach();
        }
        possible
    }

    /// Ends the connection's part in the loop.
    pub(crate) fn detach(&mut self, pool: &mut Pool) -> DetachedIo {
        let tls = self.tls.take();
        self.status.tls_ended = false;
        let parts = self.parts();
        let remains = DetachedIo::new(
            EndLimits::of(&self.limits),
            tls,
            parts.recv_buf.pending(),
            parts.send_buf.to_vec(),
        );
        self.drop_output(pool);
        self.enter_closing(Phase::Detached, pool);
        let (active, _) = self.wake(pool);
        active.deadlines.stop();
        active.ending.set_reason(Closed::new(CloseReason::Detached));
        remains
    }

    // What the handler wants.

    /// Sends FIN once everything is flushed, and goes on reading.
    pub(crate) fn finish(&mut self) {
        if self.status.life.is_served() {
            self.status.send.finish();
        }
    }

    /// Closes once all received input is answered.
    pub(crate) fn close_after_input(&mut self) {
        if self.status.life.is_served() {
            self.status.close.request();
        }
    }

    /// Does not close by itself before another call of [`Machine::end_reply`].
    pub(crate) fn await_reply(&mut self) {
        self.wake_unpooled().ending.await_reply();
    }

    /// A reply was sent, or will never be.
    pub(crate) fn end_reply(&mut self) {
        if let Some(active) = &mut self.active {
            active.ending.end_reply();
        }
        self.check_replies();
    }

    /// Deferred commands are still to be carried out: as a pending reply, which
    /// [`Machine::end_reply`] does not end.
    pub(crate) fn await_commands(&mut self, pool: &mut Pool) {
        self.wake(pool).0.ending.set_awaits_commands(true);
    }

    /// Those commands were carried out.
    pub(crate) fn end_commands(&mut self) {
        if let Some(active) = &mut self.active {
            active.ending.set_awaits_commands(false);
        }
        self.check_replies();
    }

    fn check_replies(&mut self) {
        if !self.parts().ending.has_pending_replies() {
            self.status.close.end_hold(self.status.recv.is_eof());
        }
    }

    // The clocks.

    /// Sets timer `key` to `at`, or cancels it with [`Time::NEVER`].
    pub(crate) fn set_timer(&mut self, key: u8, at: Time) {
        if at.is_armed() && self.is_established() {
            self.wake_unpooled().deadlines.set_timer(key, at);
        } else if let Some(active) = &mut self.active {
            active.deadlines.cancel_timer(key);
        }
    }

    pub(crate) fn time_left(&self, now: Time) -> TimeLeft {
        let (state, throttle) = (self.state(), self.throttled_until());
        (self.parts().deadlines).time_left(state, self.idle_deadline(), throttle, now)
    }

    /// Expires every deadline up to `due`.
    pub(crate) fn handle_timeout(&mut self, due: Time, now: Time, pool: &mut Pool) {
        let mut phase_expired = false;
        if let Some(active) = &mut self.active {
            if active.deadlines.expire_timers(due) {
                self.status.events.set(Events::TIMER);
            }
            phase_expired = active.deadlines.expire_phase(due);
        }
        if phase_expired {
            self.expire_phase(pool);
        }
        if self.is_write_overdue(due) {
            self.expire_write(pool);
        }
        if self.throttled_until() <= due {
            self.status.recv.set_throttled(false);
            self.resume_clocks(now);
        }
        if self.is_frame_overdue(due) {
            let begun = self.parts().recv_buf.pending();
            let reason = self.reason_for(begun, CloseReason::FrameTimeout);
            self.close(Closed::new(reason), now, pool);
        } else if self.idle_deadline() <= due {
            self.close(Closed::new(CloseReason::IdleTimeout), now, pool);
        }
    }

    fn expire_write(&mut self, pool: &mut Pool) {
        if self.status.life.phase() == Phase::Linger && !self.has_unsent_in_kernel() {
            return self.status.life.enter(Phase::Gone);
        }
        self.reset(Closed::new(CloseReason::WriteTimeout), pool);
    }

    fn expire_phase(&mut self, pool: &mut Pool) {
        match self.state() {
            State::Accepting | State::Handshaking => {
                let reason = self.unless_not_tls(CloseReason::HandshakeTimeout);
                self.end(Closed::new(reason), pool);
            }
            // The reactor decides about an attempt that takes too long.
            State::Connecting | State::Open => {}
            State::Closing => self.status.life.enter(Phase::Gone),
        }
    }

    // The end.

    /// The server drains: notifies the handler, and cuts a handshake short.
    pub(crate) fn drain(&mut self, handshake_until: Time) {
        self.status.life.drain();
        match self.state() {
            State::Accepting | State::Handshaking => {
                let deadlines = &mut self.wake_unpooled().deadlines;
                deadlines.arm_phase(deadlines.phase().min(handshake_until));
                self.status.events.set(Events::DRAIN);
            }
            State::Open => self.status.events.set(Events::DRAIN),
            // The reactor gives up attempts to connect.
            State::Connecting | State::Closing => {}
        }
    }

    /// Closes with last bytes in the clear: the service, or an access rule, refuses the peer.
    /// Returns the TLS session that does not begin.
    #[must_use = "the destructor of a TLS configuration is foreign code"]
    pub(crate) fn refuse(
        &mut self,
        farewell: &[u8],
        closed: Closed,
        now: Time,
        pool: &mut Pool,
    ) -> impl Sized + use<> {
        let tls = self.tls.take();
        if !farewell.is_empty() {
            let (active, buffers) = self.wake(pool);
            active.send_buf.tail(buffers).extend_from_slice(farewell);
        }
        self.close(closed, now, pool);
        tls
    }

    /// Closes in order, as the handler wants.
    pub(crate) fn close_by_handler(&mut self, now: Time, pool: &mut Pool) {
        self.close(Closed::new(self.orderly_reason()), now, pool);
    }

    /// Returns the reason of a close that the handler asks for without an error.
    fn orderly_reason(&self) -> CloseReason {
        if self.status.recv.is_end_reported() {
            match self.is_tls_truncated() {
                true => CloseReason::TlsTruncated,
                false => CloseReason::Finished,
            }
        } else if self.is_draining() {
            CloseReason::Drained
        } else {
            CloseReason::Closed
        }
    }

    /// Ends as the [`Close`] of a callback demands.
    pub(crate) fn close_as(&mut self, mut close: Close, now: Time, pool: &mut Pool) {
        // The error may be that of another connection's output.
        if is_for_full_output(&close) && self.unsent_app_bytes() >= self.limits.output_limit {
            close.closed.reason = CloseReason::SlowConsumer;
        }
        if close.abort {
            return self.reset(close.closed, pool);
        }
        if close.closed.reason == CloseReason::Closed {
            close.closed.reason = self.orderly_reason();
        }
        self.close(close.closed, now, pool);
    }

    /// Closes in order: flush, close_notify, FIN, linger. The first reason stays.
    pub(crate) fn close(&mut self, mut closed: Closed, now: Time, pool: &mut Pool) {
        if self.status.life.is_closing() {
            return;
        }
        if self.status.send.has_failed() || self.is_connecting() {
            return self.end(closed, pool);
        }
        if self.is_tls_handshaking() && !self.parts().send_buf.is_empty() {
            // It waits for a handshake that will not end, and is never sent in the clear.
            self.drop_output(pool);
            closed.reason = CloseReason::TlsHandshake;
            let words = "closed during the handshake: what was sent since it began is lost";
            closed.error.get_or_insert_with(|| words.into());
        }
        self.enter_closing(Phase::Flush, pool);
        let fin_sent = self.status.send.has_sent_fin();
        if fin_sent {
            // Nothing can be flushed behind it.
            if let Some(session) = &mut self.tls {
                session.silence(&mut pool.buffers);
            }
        }
        let has_output = self.queued() > 0;
        let pace = self.limits.write_pace();
        let linger_until = now.after(self.limits.linger_timeout);
        let active = self.active.get_or_insert_with(|| pool.take_active());
        if has_output {
            active.deadlines.begin_write(pace, now);
        }
        if fin_sent {
            active.deadlines.arm_phase(linger_until);
            self.status.life.enter(self.status.phase_after_fin());
        }
        active.ending.set_reason(closed);
    }

    /// Ends at once; pending output is lost. `closed` is the reason, unless one is known.
    pub(crate) fn end(&mut self, closed: Closed, pool: &mut Pool) {
        self.leave(Phase::Gone, closed, false, pool);
    }

    /// Ends with the socket, which has failed: the kernel drops its output too.
    pub(super) fn fail(&mut self, closed: Closed, pool: &mut Pool) {
        self.leave(Phase::Gone, closed, true, pool);
    }

    /// Ends at once with RST, which makes the kernel drop its output too.
    pub(crate) fn reset(&mut self, closed: Closed, pool: &mut Pool) {
        self.leave(Phase::Reset, closed, true, pool);
    }

    /// Ends at the drain's deadline.
    ///
    /// True if the peer has all output and our FIN: an orderly end. False: the connection is reset,
    /// or the kernel alone goes on sending.
    pub(crate) fn cut_short(&mut self, pool: &mut Pool) -> bool {
        let closed = || Closed::new(CloseReason::DrainForced);
        if self.status.life.phase() != Phase::Linger {
            self.reset(closed(), pool);
            return false;
        }
        let owed = self.has_unsent_in_kernel();
        if owed {
            self.wake(pool).0.ending.set_loss(closed());
        }
        self.status.life.enter(Phase::Gone);
        !owed
    }

    /// True if the peer's system has not got all output of the handler, as far as is known.
    pub(crate) fn has_unsent_in_kernel(&self) -> bool {
        self.parts().ending.delivery.has_unsent()
    }

    /// Sets the clocks of the linger, after the peer's system took `taken` bytes.
    pub(super) fn begin_linger(&mut self, now: Time, taken: usize) {
        let (pace, timeout) = (self.limits.write_pace(), self.limits.linger_timeout);
        let may_discard = self.may_discard();
        let active = self.wake_unpooled();
        let has_delivered = active.begin_linger(taken, pace, timeout, now);
        if has_delivered && !may_discard {
            self.status.life.enter(Phase::Gone);
        }
    }

    /// Handles input while lingering.
    pub(super) fn handle_linger_input(&mut self, now: Time) {
        let (until, may_discard) = (now.after(self.limits.linger_timeout), self.may_discard());
        if !self.wake_unpooled().handle_linger_input(until, may_discard) {
            self.status.life.enter(Phase::Gone);
        }
    }

    fn leave(&mut self, phase: Phase, closed: Closed, kernel_drops: bool, pool: &mut Pool) {
        // A socket that has left the loop keeps its slot until its stream is dropped.
        if self.status.life.is_gone() || self.is_detached() {
            return;
        }
        // Promised output that is lost is the reason to report. The alert of a failed handshake is
        // no promise.
        let delivery = self.parts().ending.delivery;
        let may_lose = delivery.may_lose(phase == Phase::Reset && self.traffic.bytes_out > 0);
        let drops_output = self.unsent_app_bytes() > 0 || (kernel_drops && may_lose);
        let lost = self.status.is_ending() && self.was_open() && drops_output;
        self.enter_closing(phase, pool);
        self.drop_output(pool);
        if let Some(session) = &mut self.tls {
            session.clear(&mut pool.buffers);
        }
        let (active, _) = self.wake(pool);
        active.deadlines.stop();
        active.ending.lose(closed, lost);
    }

    fn enter_closing(&mut self, phase: Phase, pool: &mut Pool) {
        self.status.life.enter(phase);
        self.status.events.clear(Events::TIMER);
        if let Some(active) = &mut self.active {
            active.deadlines.begin_closing();
            active.recv_buf.clear(&mut pool.buffers);
        }
    }

    pub(super) fn drop_output(&mut self, pool: &mut Pool) {
        if let Some(active) = &mut self.active {
            active.send_buf.clear(&mut pool.buffers);
        }
    }

    /// Returns what the socket needs besides reading and writing.
    #[inline]
    pub(crate) fn next_step(&self) -> NextStep {
        match self.status.life.phase() {
            Phase::Shutdown => NextStep::Shutdown,
            Phase::Open if self.is_fin_due() => NextStep::Shutdown,
            Phase::Gone => NextStep::Gone { reset: false },
            Phase::Reset => NextStep::Gone { reset: true },
            _ => NextStep::Wait,
        }
    }

    /// True if the handler has finished and everything is flushed, close_notify included.
    fn is_fin_due(&self) -> bool {
        let send = self.status.send;
        self.status.life.is_open()
            && send.is_finishing()
            && !send.has_sent_fin()
            && !self.write_closed()
            && self.queued() == 0
            && (self.tls.as_deref()).is_none_or(Session::has_said_goodbye)
    }

    /// Handles our FIN; it could not be `sent` if the connection is gone already.
    pub(crate) fn handle_shutdown(&mut self, now: Time, sent: bool) {
        if self.status.life.phase() != Phase::Shutdown {
            if self.is_fin_due() {
                // If it was not sent, a read reports why.
                self.status.send.set_fin_sent();
            }
        } else if sent && !self.status.recv.is_eof() {
            self.status.life.enter(Phase::Linger);
            self.begin_linger(now, 0);
        } else {
            if !sent {
                self.status.send.fail();
                if self.has_unsent_in_kernel() {
                    let closed = Closed::new(CloseReason::Reset);
                    self.wake_unpooled().ending.set_loss(closed);
                }
            }
            self.status.life.enter(Phase::Gone);
        }
    }

    /// True if the peer has all output: it finished, and no call failed.
    ///
    /// Whether all output was sent is a matter of the reason.
    pub(crate) fn is_end_confirmed(&self) -> bool {
        self.status.recv.is_eof() && !self.status.send.has_failed()
    }

    /// Returns why the connection ended, for the one report.
    pub(crate) fn take_closed(&mut self) -> Closed {
        let reason = self
            .active
            .as_mut()
            .and_then(|active| active.ending.take_reason());
        reason.unwrap_or_else(|| Closed::new(CloseReason::Closed))
    }

    /// Gives all memory back: the connection is over, and its reason is taken.
    pub(crate) fn recycle(&mut self, pool: &mut Pool) {
        if let Some(mut active) = self.active.take() {
            active.clear(&mut pool.buffers);
            pool.give_active(active);
        }
    }
}
