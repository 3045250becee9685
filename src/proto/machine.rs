//! One connection: its parts, and the one rule about what each of its states allows.
//!
//! The parts know nothing of this type: they get their siblings as arguments. Here stand the
//! connection's data and what can be asked of it; [`lifecycle`] moves it from state to state,
//! [`input`] and [`output`] carry bytes. Those three call this file, the last two call `lifecycle`.

mod input;
mod lifecycle;
mod output;

use std::rc::Rc;
use std::time::Duration;

use super::active::Active;
use super::allows::{Allows, Situation};
use super::buffers::Buffers;
use super::framing::{Codec, Framing};
use super::hello;
#[cfg(feature = "sim")]
use super::invariants::{self, Clocks};
use super::life::{Life, Phase};
use super::pool::Pool;
use super::proxy::ProxyHeader;
use super::rates::{SharedMeters, Throttle};
#[cfg(feature = "sim")]
use super::snapshot::Fingerprint;
use super::state::{State, Traffic};
use super::status::{Events, Status};
use super::time::Time;
#[cfg(feature = "tls")]
use super::tls::TlsInfo;
use super::tls::{Session, TlsConfig};
use super::{ConnConfig, Held};
use crate::reason::CloseReason;

/// The state machine of one connection.
///
/// Contains what an idle connection needs. All else is in [`Active`] and in the TLS session.
pub(crate) struct Machine {
    status: Status,
    limits: Rc<ConnConfig>,
    codec: Codec,
    tls: Option<Box<Session>>,
    last_input: Time,
    traffic: Traffic,
    active: Option<Box<Active>>,
}

impl Machine {
    /// A connection that was accepted; `tls` begins once the service has accepted the peer.
    pub(crate) fn new(
        framing: &Framing,
        limits: Rc<ConnConfig>,
        tls: Option<&TlsConfig>,
        now: Time,
        pool: &mut Pool,
    ) -> Self {
        let mut machine = Self::in_state(Life::accepted(), framing, limits, now);
        machine.tls = tls.map(|config| Box::new(Session::new(config)));
        let until = now.after(machine.limits.handshake_timeout);
        machine.wake(pool).0.deadlines.begin_handshake(until);
        machine
    }

    /// A connection that the server makes. It has a handler from the beginning.
    pub(crate) fn connecting(framing: &Framing, limits: Rc<ConnConfig>, now: Time) -> Self {
        let mut machine = Self::in_state(Life::connecting(), framing, limits, now);
        machine.set_throttle(Throttle::new(
            machine.limits.read_rate,
            machine.limits.frame_rate,
            &SharedMeters::default(),
        ));
        machine
    }

    fn in_state(life: Life, framing: &Framing, limits: Rc<ConnConfig>, now: Time) -> Self {
        Self {
            status: Status::new(life),
            codec: Codec::new(framing, limits.max_frame),
            tls: None,
            last_input: now,
            traffic: Traffic::default(),
            active: None,
            limits,
        }
    }

    // What a state allows.

    /// Decides whether bytes may be read from the socket, written to it, and queued for it.
    fn allows(&self) -> Allows {
        let situation = Situation {
            paused: self.is_paused(),
            may_discard: self.may_discard(),
            write_closed: self.write_closed(),
        };
        let allows = Allows::of(self.status, &situation);
        debug_assert!(
            !self.only_frames() || (allows.read && allows.write && allows.queue),
            "the shortcut allows what the table does not: {:?}",
            self.status
        );
        allows
    }

    /// True while input may be discarded.
    fn may_discard(&self) -> bool {
        self.parts().ending.discarded() <= self.limits.linger_bytes
    }

    /// True if the connection is open and has nothing to do but frames: no end, no pause, no rate,
    /// no pending event. The one test that a message of an ordinary connection costs.
    #[inline]
    pub(crate) fn only_frames(&self) -> bool {
        self.status.only_frames()
    }

    /// True if the connection waits for the peer's next byte and nothing else.
    ///
    /// Besides the handler's timers its one deadline is the idle timeout, which moves only later.
    #[inline]
    pub(crate) fn is_idle(&self) -> bool {
        self.only_frames()
            && self.active.as_ref().is_none_or(|active| active.is_idle())
            && self.tls.as_ref().is_none_or(|session| session.is_idle())
    }

    /// True if the connection is idle and in the clear, but that `on_open` is pending.
    #[inline]
    pub(crate) fn is_newly_open(&self) -> bool {
        self.status.only_opened()
            && self.tls.is_none()
            && self.active.as_ref().is_none_or(|active| active.is_idle())
    }

    /// True if a read from the socket is allowed now, or [`Machine::handle_stash`] in its place.
    pub(crate) fn wants_read(&self) -> bool {
        self.allows().read
    }

    #[inline(never)]
    fn can_queue(&self) -> bool {
        self.allows().queue
    }

    // The parts.

    /// Returns the large halves of the parts, or those of an idle connection.
    #[inline]
    pub(super) fn parts(&self) -> &Active {
        self.active.as_deref().unwrap_or(Active::IDLE)
    }

    /// Takes the large halves of the parts from the pool, unless the connection has them.
    ///
    /// With the buffers for them.
    #[inline]
    fn wake<'p>(&mut self, pool: &'p mut Pool) -> (&mut Active, &'p mut Buffers) {
        let active = self.active.get_or_insert_with(|| pool.take_active());
        (active, &mut pool.buffers)
    }

    /// As [`Machine::wake`], where no pool is at hand: allocates for an idle connection.
    fn wake_unpooled(&mut self) -> &mut Active {
        self.active.get_or_insert_default()
    }

    /// Sets the rates of reading: the connection's own, and the `shared` ones of its listener.
    pub(crate) fn set_rates(&mut self, shared: &SharedMeters) {
        let (bytes, frames) = (self.limits.read_rate, self.limits.frame_rate);
        self.set_throttle(Throttle::new(bytes, frames, shared));
    }

    fn set_throttle(&mut self, throttle: Option<Box<Throttle>>) {
        self.status.recv.set_has_rates(throttle.is_some());
        if throttle.is_some() {
            self.wake_unpooled().throttle = throttle;
        } else if let Some(active) = &mut self.active {
            active.throttle = None;
        }
    }

    /// Checks the rates anew, after a shared one has changed.
    pub(crate) fn recheck_rates(&mut self, now: Time) {
        if let Some(throttle) = self.throttle() {
            throttle.recheck_rates(now);
        }
    }

    fn throttle(&mut self) -> Option<&mut Throttle> {
        self.active.as_mut()?.throttle.as_deref_mut()
    }

    /// Gives back memory that the connection does not need beyond the turn.
    #[inline(always)]
    pub(crate) fn shrink(&mut self, pool: &mut Pool) {
        self.status.deadlines_moved = false;
        if let Some(active) = self.active.take_if(|active| active.is_over()) {
            pool.give_active(active);
        } else if let Some(active) = &mut self.active {
            active.shrink(&mut pool.buffers);
        }
        if let Some(session) = &mut self.tls {
            session.shrink(&mut pool.buffers);
        }
    }

    /// Returns the memory that the connection's buffers, PROXY header and peer's certificates take
    /// beyond the turn.
    #[inline]
    pub(crate) fn memory(&self) -> Held {
        let parts = self.parts();
        let (buffers, chain) = self.tls.as_deref().map_or((0, 0), Session::memory);
        let kept = match &parts.proxy {
            // They stay for `on_close`, which ends the connection in its next turn. Of a detached
            // one the addresses stay, with the slot.
            _ if self.status.life.is_gone() || self.is_detached() => 0,
            Some(header) => header.memory() + chain,
            None => chain,
        };
        parts.memory().plus(buffers + kept)
    }

    /// Returns the bytes that are buffered in either direction.
    pub(crate) fn buffered(&self) -> usize {
        let parts = self.parts();
        let tls = self.tls.as_ref().map_or(0, |session| session.buffered());
        parts.send_buf.len() + parts.recv_buf.len() + tls
    }

    /// Returns the bytes that are pending for the peer.
    #[inline]
    pub(crate) fn queued(&self) -> usize {
        let tls = self
            .tls
            .as_ref()
            .map_or(0, |session| session.pending().len());
        self.parts().send_buf.len() + tls
    }

    /// Returns the pending bytes that the handler has sent: those of TLS itself are excluded.
    #[inline]
    pub(crate) fn unsent_app_bytes(&self) -> usize {
        let overhead = self.tls.as_deref().map_or(0, Session::tls_overhead);
        self.queued() - overhead
    }

    // The state.

    pub(crate) fn config(&self) -> &ConnConfig {
        &self.limits
    }

    #[inline]
    pub(crate) fn state(&self) -> State {
        self.status.life.state()
    }

    /// True if a message reaches the handler: the connection has opened, and neither closes nor
    /// leaves the loop.
    pub(crate) fn takes_messages(&self) -> bool {
        self.is_established() && self.was_open() && !self.is_detaching()
    }

    /// True if the connection has not opened yet, and does not close.
    pub(crate) fn will_open(&self) -> bool {
        !self.was_open() && self.state() != State::Closing
    }

    /// True if deferred commands are still to be carried out.
    pub(crate) fn awaits_commands(&self) -> bool {
        self.parts().ending.awaits_commands()
    }

    /// True if `on_open` was called, so that `on_close` is due.
    pub(crate) fn was_open(&self) -> bool {
        self.status.life.was_open()
    }

    /// True while a connection that has opened is in a handshake (`start_tls`).
    #[inline]
    pub(crate) fn is_upgrading(&self) -> bool {
        self.state() == State::Handshaking && self.was_open()
    }

    /// True if no whole frame has come since the connection was made, and one still may.
    pub(crate) fn is_silent(&self) -> bool {
        self.traffic.frames_in == 0 && !self.status.life.is_closing()
    }

    /// True if the connection has opened, and nothing but the peer keeps its first frame from
    /// the handler. A peer that does not read a long greeting does so too.
    pub(crate) fn awaits_first_frame(&self) -> bool {
        self.is_silent()
            && self.status.life.is_open()
            && self.was_open()
            && !self.status.recv.is_paused()
            && (self.is_congested() || !self.status.recv.has_frames_buffered())
            && !self.parts().ending.has_pending_replies()
    }

    /// True if the service has accepted the peer, so that there is a handler.
    pub(crate) fn was_admitted(&self) -> bool {
        self.status.life.was_admitted()
    }

    /// True if the handler can be notified: frames are exchanged, or `start_tls` is under way.
    pub(crate) fn is_established(&self) -> bool {
        self.status.life.is_established()
    }

    pub(crate) fn is_draining(&self) -> bool {
        self.status.life.is_draining()
    }

    pub(crate) fn is_outgoing(&self) -> bool {
        self.status.life.is_outgoing()
    }

    pub(crate) fn is_connecting(&self) -> bool {
        self.state() == State::Connecting
    }

    /// True if the connection leaves the loop at the end of its turn.
    #[inline]
    pub(crate) fn is_detaching(&self) -> bool {
        self.status.life.is_detaching()
    }

    /// True if the socket has left the loop; its slot is kept.
    #[inline]
    pub(crate) fn is_detached(&self) -> bool {
        self.status.life.phase() == Phase::Detached
    }

    /// True if the framer is the user's code, which may panic.
    #[inline]
    pub(crate) fn has_framer(&self) -> bool {
        self.codec.is_custom()
    }

    /// True if a call of the framer has not returned, because it panicked.
    pub(crate) fn has_framer_panicked(&self) -> bool {
        self.codec.has_framer_panicked()
    }

    /// True if the connection speaks TLS, or will: its configuration may contain the user's code.
    #[inline]
    pub(crate) fn has_tls(&self) -> bool {
        self.tls.is_some()
    }

    #[cfg(feature = "tls")]
    pub(crate) fn tls(&self) -> Option<TlsInfo<'_>> {
        let session = self
            .tls
            .as_deref()
            .filter(|session| !session.is_handshaking());
        session.and_then(TlsInfo::of)
    }

    pub(crate) fn proxy(&self) -> Option<&Rc<ProxyHeader>> {
        self.parts().proxy.as_ref()
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

    /// True while the handler's pause keeps the connection from reading.
    pub(crate) fn is_paused_by_handler(&self) -> bool {
        self.status.life.is_open() && self.status.recv.is_paused_by_handler()
    }

    /// True while pending output keeps the connection from reading.
    pub(crate) fn is_congested(&self) -> bool {
        self.status.life.is_open() && self.status.send.is_congested()
    }

    /// True while a rate keeps the connection from reading.
    pub(crate) fn is_throttled(&self) -> bool {
        self.status.life.is_open() && self.status.recv.is_throttled()
    }

    /// True while pending output has not come down to the low watermark, in every state.
    pub(crate) fn is_above_watermark(&self) -> bool {
        self.status.send.is_congested()
    }

    /// True if no frame may be delivered now, for a reason of this side's.
    #[inline]
    fn is_paused(&self) -> bool {
        self.status.is_paused(self.limits.full_duplex)
    }

    /// True if the peer can receive nothing more.
    pub(crate) fn write_closed(&self) -> bool {
        self.status.send.has_failed() || self.has_tls_failed()
    }

    /// True if nothing more can arrive: FIN was read, or close_notify.
    pub(crate) fn is_input_over(&self) -> bool {
        let notified = || {
            self.tls
                .as_ref()
                .is_some_and(|session| session.peer_closed())
        };
        self.status.recv.is_eof() || notified()
    }

    /// True if nothing more can arrive, be delivered or be sent before the handler does something:
    /// the idle timeout runs, also while the handler has paused.
    fn waits_for_handler(&self) -> bool {
        self.is_input_over() && self.parts().recv_buf.is_empty() && !self.status.send.is_congested()
    }

    /// True if bytes that arrived before a handshake are to be handled before any read.
    pub(crate) fn has_stash(&self) -> bool {
        self.state() == State::Handshaking && !self.parts().recv_buf.is_empty()
    }

    /// True until the keys are agreed on: nothing can be encrypted.
    fn is_tls_handshaking(&self) -> bool {
        self.tls.as_deref().is_some_and(Session::is_handshaking)
    }

    /// True if TLS failed: nothing more can be decrypted or encrypted.
    fn has_tls_failed(&self) -> bool {
        self.tls.as_deref().is_some_and(Session::has_failed)
    }

    /// True if part of a frame has arrived, or part of a record, which contains part of a frame.
    fn has_begun(&self) -> bool {
        (self.codec.has_frames() && !self.parts().recv_buf.is_empty()) || self.begun_record() > 0
    }

    /// Returns how much of a frame has arrived, with the incomplete record.
    fn begun_bytes(&self) -> usize {
        self.parts().recv_buf.len() + self.begun_record()
    }

    /// Returns how much of an incomplete record has arrived.
    #[inline]
    fn begun_record(&self) -> usize {
        self.tls.as_ref().map_or(0, |session| session.begun_bytes())
    }

    /// True if the connection closes once the input is answered, and nothing holds it.
    fn closes_when_answered(&self) -> bool {
        let held = || self.parts().ending.has_pending_replies() || self.status.is_held_for_flush();
        self.status.close.is_requested() && !held()
    }

    /// True if the connection closes by itself once the handler was notified of the peer's end.
    fn closes_when_finished(&self) -> bool {
        let ends_at_once = || {
            self.tls
                .as_ref()
                .is_some_and(|session| session.closes_both_ways())
        };
        self.closes_when_answered()
            || self.status.send.is_finishing()
            || (!self.parts().ending.awaits_commands() && ends_at_once())
    }

    /// True if something can be delivered to the handler, or decided, without a read.
    #[inline]
    pub(crate) fn has_events(&self) -> bool {
        !self.only_frames() && self.finds_events()
    }

    fn finds_events(&self) -> bool {
        let Status {
            life,
            events,
            recv,
            close,
            ..
        } = self.status;
        if !life.is_established() {
            return life.phase() == Phase::HeaderDone;
        }
        if events.any_but_timer() || self.parts().deadlines.has_due_timer() {
            return true;
        }
        if !life.is_open() || self.is_paused() {
            return false;
        }
        recv.has_frames_buffered()
            || self.has_tls_failed()
            || (self.is_input_over() && !recv.is_end_reported())
            || (recv.is_end_reported() && self.closes_when_finished())
            || (self.closes_when_answered()
                && close.is_read_drained()
                && self.parts().recv_buf.is_empty())
    }

    /// Returns `reason`, unless the stream never made a frame because it is a TLS ClientHello.
    fn reason_for(&self, begun: &[u8], reason: CloseReason) -> CloseReason {
        let is_first = self.tls.is_none() && self.traffic.frames_in == 0;
        if is_first && hello::explains(begun, reason) {
            CloseReason::UnexpectedTls
        } else {
            reason
        }
    }

    // The clocks.

    /// Returns when the connection must have a turn, if nothing happens before.
    #[inline]
    pub(crate) fn deadline(&self) -> Time {
        let Some(active) = &self.active else {
            return self.idle_deadline();
        };
        let deadlines = &active.deadlines;
        let first = deadlines.first().or_never().min(deadlines.first_timer());
        first.min(self.idle_deadline()).min(self.throttled_until())
    }

    /// Returns when the idle timeout expires.
    #[inline]
    fn idle_deadline(&self) -> Time {
        if self.status.life.is_open() && !self.status.recv.has_frames_buffered() {
            let timeout = self.limits.idle_timeout;
            self.parts().deadlines.idle(self.last_input, timeout)
        } else {
            Time::NEVER
        }
    }

    /// Returns when the rates allow reading again.
    #[inline]
    fn throttled_until(&self) -> Time {
        match &self.parts().throttle {
            Some(throttle) if self.is_throttled() => throttle.until(),
            _ => Time::NEVER,
        }
    }

    /// True if the write timeout is over at `due`, unless the kernel has taken bytes since.
    #[inline]
    pub(crate) fn is_write_overdue(&self, due: Time) -> bool {
        self.parts().deadlines.write() <= due
    }

    /// True if more of the incomplete frame must have arrived by `due`.
    ///
    /// Buffered bytes that the next turn decodes may be the rest of it.
    pub(crate) fn is_frame_overdue(&self, due: Time) -> bool {
        let is_due = self.parts().deadlines.frame() <= due;
        let decodes = self.status.recv.has_frames_buffered() && !self.is_paused();
        self.status.life.is_open() && is_due && !decodes
    }

    /// Extends the deadlines of input by `span`, up to their whole timeouts: it is the server that
    /// has not read.
    pub(crate) fn extend_input_deadlines(&mut self, span: Duration, now: Time) {
        let pace = self.limits.frame_pace();
        if let Some(active) = &mut self.active {
            active
                .deadlines
                .extend_input(span, pace, self.last_input, now);
        }
    }

    /// True if a timer of the handler's is set: the first deadline may have come nearer.
    #[inline]
    pub(crate) fn is_timed(&self) -> bool {
        self.active
            .as_ref()
            .is_some_and(|active| active.deadlines.has_timers())
    }

    /// Pauses the peer's clocks, if reading is paused.
    fn pause_clocks(&mut self, now: Time) {
        if self.status.life.is_open() && self.is_paused() && !self.waits_for_handler() {
            self.wake_unpooled().deadlines.pause(now);
        }
    }

    /// Resumes the peer's clocks where they were, unless reading is still paused.
    ///
    /// Our own sending moves them no further.
    fn resume_clocks(&mut self, now: Time) {
        if !self.status.life.is_open() || self.is_paused() {
            return;
        }
        if let Some(active) = &mut self.active {
            self.status.deadlines_moved |= active.deadlines.resume(self.last_input, now);
            self.status.recv.decode_buffered(&active.recv_buf);
        }
        // Part of a record is buffered elsewhere, and nothing decodes it before more arrives.
        let (record, pace) = (self.begun_record(), self.limits.frame_pace());
        let runs = self.parts().deadlines.frame().is_armed();
        if record > 0 && !runs && !self.is_input_over() {
            let deadlines = &mut self.wake_unpooled().deadlines;
            deadlines.begin_frame(record, pace, now);
            self.status.deadlines_moved = true;
        }
    }

    /// Pauses reading until the peer has taken enough of the pending output.
    fn congest(&mut self, now: Time) {
        self.status.send.congest();
        // Room that was made and is used up again is not announced.
        self.status.events.clear(Events::WRITABLE);
        self.pause_clocks(now);
    }
}

/// For the simulator: invariants and copies.
#[cfg(feature = "sim")]
impl Machine {
    /// True if a PROXY header is to come, or has come and the service is to be asked.
    pub(crate) fn awaits_header(&self) -> bool {
        self.state() == State::Accepting && self.status.life.phase() != Phase::Admitting
    }

    /// True if the handler has paused reading, in every state.
    pub(crate) fn has_paused(&self) -> bool {
        self.status.recv.is_paused_by_handler()
    }

    /// Returns the first invariant that does not hold between two turns. `queued`: the connection
    /// has another turn soon, whatever its deadlines.
    pub(crate) fn broken_invariant(&self, read_size: usize, queued: bool) -> Option<String> {
        let session = self.tls.as_deref();
        let limits = (self.codec.max(), read_size);
        let reads = self.wants_read();
        let broken = invariants::broken(self.status, self.parts(), session, limits, reads);
        if broken.is_some() || queued {
            return broken;
        }
        if self.has_events() {
            return Some("events are pending and no turn will deliver them".to_owned());
        }
        if self.status.life.is_gone() {
            return Some("the connection is over and its socket open".to_owned());
        }
        let facts = Clocks {
            idle: self.idle_deadline(),
            throttled_until: self.is_throttled().then(|| self.throttled_until()),
            is_paused: self.is_paused(),
            has_output: self.queued() > 0,
            has_begun: self.has_begun() && !self.is_input_over(),
        };
        let deadlines = &self.parts().deadlines;
        let missing = facts.lack_deadline(self.status.life.phase(), &self.limits, deadlines);
        missing.then(|| format!("no deadline is armed: {deadlines:?}"))
    }

    /// Returns a copy without the error behind its end.
    ///
    /// `None` over TLS, with a framer of the user's and with rates: those cannot be copied.
    pub(crate) fn fork(&self) -> Option<Self> {
        if self.tls.is_some() || self.status.recv.has_rates() {
            return None;
        }
        Some(Self {
            status: self.status,
            limits: Rc::clone(&self.limits),
            codec: self.codec.fork()?,
            tls: None,
            last_input: self.last_input,
            traffic: self.traffic,
            active: self.active.as_ref().map(|active| Box::new(active.fork())),
        })
    }

    /// Returns an equal value for two plain connections whose futures are equal.
    pub(crate) fn fingerprint(&self, now: Time) -> Fingerprint {
        let (limits, has_idle) = (&self.limits, self.idle_deadline().is_armed());
        let made_frames = self.traffic.frames_in > 0;
        let codec = (self.codec.memory(), limits.max_frame);
        let clocks = (now, self.last_input, limits.idle_timeout, has_idle);
        Fingerprint::of(self.status, codec, self.parts(), clocks, made_frames)
    }
}
