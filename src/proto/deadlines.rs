//! The clocks of one connection: its deadlines, its pauses and its handler's timers.
//!
//! Nothing is scheduled here. The reactor reads the first deadline and comes back then.

use std::time::Duration;

use super::state::State;
use super::time::Time;

/// A timeout that progress extends, at a minimum rate: for pending output and incomplete frames.
///
/// It is a bucket of time. Each byte adds its time at that rate, up to the whole timeout, so that
/// no pattern of bytes below the rate keeps the deadline away for ever.
#[derive(Clone, Copy)]
pub(super) struct Pace {
    pub(super) timeout: Duration,
    /// Bytes per second.
    pub(super) min_rate: u32,
}

impl Pace {
    /// Returns the deadline of what begins now.
    fn begin(self, now: Time) -> Time {
        now.after(self.timeout)
    }

    /// Returns how long no progress has been made, as of `deadline`.
    pub(super) fn behind(self, deadline: Time, now: Time) -> Duration {
        match deadline.is_armed() {
            true => self.begin(now).since(deadline),
            false => Duration::ZERO,
        }
    }

    /// Returns what becomes of `deadline` under the pace `next`: the peer is behind as before.
    fn convert(self, deadline: Time, next: Self, now: Time) -> Time {
        match deadline.is_armed() {
            true => now.after(next.timeout.saturating_sub(self.behind(deadline, now))),
            false => Time::NEVER,
        }
    }

    /// Returns the deadline that follows `deadline` after progress of `bytes`.
    ///
    /// It counts from now if that is later: the loop has not looked before.
    fn extend(self, deadline: Time, bytes: usize, now: Time) -> Time {
        let worth = self.worth(bytes as u64);
        deadline.max(now).after(worth).min(self.begin(now))
    }

    /// Returns the time in which so many bytes are enough.
    pub(super) fn worth(self, bytes: u64) -> Duration {
        let rate = u64::from(self.min_rate.max(1));
        Duration::from_secs(bytes / rate)
            + Duration::from_nanos(bytes % rate * 1_000_000_000 / rate)
    }
}

/// The deadlines and timers of one connection, all but the idle timeout's beginning.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Deadlines {
    /// Of the attempt to connect, the handshake or the linger: no state has two of them.
    phase: Time,
    /// More of the incomplete frame must have arrived by then.
    frame: Time,
    /// How many bytes of that frame have moved its deadline.
    frame_credit: usize,
    /// The peer must have taken more of the pending output by then.
    write: Time,
    /// Set while reading is paused.
    paused: Option<Paused>,
    /// How long reading was paused since the last input: the idle timeout excludes that time.
    paused_for: Duration,
    timers: Vec<Timer>,
    /// Timers up to here have expired.
    expired_through: Time,
}

/// So many timers are not counted as memory: they take less than the slot.
const FEW_TIMERS: usize = 4;

/// The peer's clocks while reading is paused.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Paused {
    since: Time,
    /// Where the frame's deadline was.
    frame: Time,
}

/// A timer of the handler's, under a key of its choice.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Timer {
    key: u8,
    at: Time,
}

impl Deadlines {
    pub(super) const fn none() -> Self {
        Self {
            phase: Time::NEVER,
            frame: Time::NEVER,
            frame_credit: 0,
            write: Time::NEVER,
            paused: None,
            paused_for: Duration::ZERO,
            timers: Vec::new(),
            expired_through: Time::ZERO,
        }
    }

    /// Returns the first deadline, the idle timeout's and the timers' excluded.
    #[inline]
    pub(super) fn first(&self) -> Time {
        self.phase.min(self.frame).min(self.write)
    }

    /// Returns the time of the handler's first timer.
    #[inline]
    pub(super) fn first_timer(&self) -> Time {
        self.timers
            .iter()
            .map(|timer| timer.at)
            .fold(Time::NEVER, Time::min)
    }

    /// True if no clock runs or is paused, but for a few timers of the handler's.
    #[inline]
    pub(super) fn is_idle(&self) -> bool {
        !self.first().is_armed() && self.paused.is_none() && !self.has_many_timers()
    }

    /// True if all of this can be forgotten.
    ///
    /// `expired_through` can be: no timer is left, and the next one is set at a later time.
    #[inline]
    pub(super) fn is_over(&self) -> bool {
        self.timers.is_empty() && self.paused_for.is_zero()
    }

    /// Prepares for another connection, once [`Deadlines::is_over`].
    #[inline]
    pub(super) fn reset(&mut self) {
        self.expired_through = Time::ZERO;
    }

    // The deadline of the present state.

    pub(super) fn phase(&self) -> Time {
        self.phase
    }

    pub(super) fn arm_phase(&mut self, at: Time) {
        self.phase = at;
    }

    pub(super) fn extend_phase(&mut self, span: Duration) {
        self.phase = self.phase.after(span);
    }

    pub(super) fn clear_phase(&mut self) {
        self.phase = Time::NEVER;
    }

    /// Arms the handshake's deadline; the clocks of frames stop.
    pub(super) fn begin_handshake(&mut self, until: Time) {
        self.paused = None;
        self.frame = Time::NEVER;
        self.phase = until;
    }

    /// Takes the phase's deadline if it is due.
    pub(super) fn expire_phase(&mut self, due: Time) -> bool {
        let expired = self.phase <= due;
        if expired {
            self.phase = Time::NEVER;
        }
        expired
    }

    // The peer takes output.

    #[inline]
    pub(super) fn write(&self) -> Time {
        self.write
    }

    /// Arms the deadline of pending output, unless it is armed.
    pub(super) fn begin_write(&mut self, pace: Pace, now: Time) {
        if !self.write.is_armed() {
            self.write = pace.begin(now);
        }
    }

    /// The peer took `count` bytes, and output is still pending.
    pub(super) fn extend_write(&mut self, count: usize, pace: Pace, now: Time) {
        if count > 0 {
            self.write = pace.extend(self.write, count, now);
        }
    }

    /// The options have changed.
    pub(super) fn follow_write(&mut self, before: Pace, after: Pace, now: Time) {
        self.write = before.convert(self.write, after, now);
    }

    #[inline]
    pub(super) fn clear_write(&mut self) {
        self.write = Time::NEVER;
    }

    // The peer sends.

    #[inline]
    pub(super) fn frame(&self) -> Time {
        self.frame
    }

    /// No frame is incomplete: stops its clock, also while it is paused.
    #[inline]
    pub(super) fn clear_frame(&mut self) {
        match &mut self.paused {
            Some(paused) => paused.frame = Time::NEVER,
            None => self.frame = Time::NEVER,
        }
    }

    /// A frame has begun to arrive, with `received` bytes. Reading is not paused.
    pub(super) fn begin_frame(&mut self, received: usize, pace: Pace, now: Time) {
        self.frame = pace.begin(now);
        self.frame_credit = received;
    }

    /// For how long the peer has sent, or taken, less than these paces demand.
    pub(super) fn stalled_for(&self, read: Pace, write: Pace, now: Time) -> Duration {
        let (read, write) = (
            read.behind(self.frame(), now),
            write.behind(self.write(), now),
        );
        read.max(write)
    }

    /// Of an incomplete frame `received` bytes have arrived: its time begins, or is extended. It
    /// begins anew behind another frame (`advanced`).
    pub(super) fn count_frame(&mut self, received: usize, advanced: bool, pace: Pace, now: Time) {
        if advanced || !self.frame().is_armed() {
            self.begin_frame(received, pace, now);
        } else {
            self.extend_frame(received, pace, now);
        }
    }

    /// Of the same frame `received` bytes are there now. Reading is not paused.
    ///
    /// TLS records take more bytes than their content: only growth beyond the most counts.
    pub(super) fn extend_frame(&mut self, received: usize, pace: Pace, now: Time) {
        if let Some(count @ 1..) = received.checked_sub(self.frame_credit) {
            self.frame = pace.extend(self.frame, count, now);
            self.frame_credit = received;
        }
    }

    /// The options have changed.
    pub(super) fn follow_frame(&mut self, before: Pace, after: Pace, now: Time) {
        match &mut self.paused {
            Some(paused) => paused.frame = before.convert(paused.frame, after, paused.since),
            None => self.frame = before.convert(self.frame, after, now),
        }
    }

    /// Brings the frame's deadline nearer, as far as now.
    pub(super) fn shorten_frame(&mut self, span: Duration, now: Time) {
        if self.frame.is_armed() {
            self.frame = now.after(self.frame.since(now).saturating_sub(span));
        }
    }

    /// Extends the deadlines of input by `span`, each up to its whole timeout from now.
    pub(super) fn extend_input(&mut self, span: Duration, pace: Pace, last_input: Time, now: Time) {
        if self.frame.is_armed() {
            self.frame = self.frame.after(span).min(pace.begin(now)).max(self.frame);
        }
        let most = now.since(last_input).max(self.paused_for);
        self.paused_for = self.paused_for.saturating_add(span).min(most);
    }

    /// Returns when the idle timeout expires.
    #[inline]
    pub(super) fn idle(&self, last_input: Time, timeout: Duration) -> Time {
        if self.paused.is_some() {
            Time::NEVER
        } else {
            self.idle_unpaused(last_input, timeout)
        }
    }

    /// As [`Deadlines::idle`], if reading resumed at the time of the pause.
    #[inline]
    fn idle_unpaused(&self, last_input: Time, timeout: Duration) -> Time {
        last_input.after(timeout).after(self.paused_for)
    }

    /// Starts the idle timeout anew.
    #[inline]
    pub(super) fn note_input(&mut self) {
        self.paused_for = Duration::ZERO;
    }

    /// Pauses the peer's clocks: it cannot be late while the server does not read.
    pub(super) fn pause(&mut self, now: Time) {
        if self.paused.is_none() {
            self.paused = Some(Paused {
                since: now,
                frame: std::mem::replace(&mut self.frame, Time::NEVER),
            });
        }
    }

    /// Resumes the peer's clocks where they were. True if they were paused.
    ///
    /// The pause may have begun before the `last_input`: delivering buffered frames counts as one.
    pub(super) fn resume(&mut self, last_input: Time, now: Time) -> bool {
        let Some(paused) = self.paused.take() else {
            return false;
        };
        let span = now.since(paused.since);
        self.frame = paused.frame.after(span);
        let most = now.since(last_input);
        self.paused_for = self.paused_for.saturating_add(span).min(most);
        true
    }

    // The end.

    /// Keeps the write timeout alone: the connection closes.
    pub(super) fn begin_closing(&mut self) {
        *self = Self {
            write: self.write,
            expired_through: self.expired_through,
            ..Self::none()
        };
    }

    /// Stops every clock: the connection is over.
    pub(super) fn stop(&mut self) {
        self.begin_closing();
        self.write = Time::NEVER;
    }

    // The handler's timers.

    /// True if the timers count as memory, and keep the connection from being idle.
    #[inline]
    fn has_many_timers(&self) -> bool {
        self.timers.capacity() > FEW_TIMERS
    }

    /// Returns the memory of many timers.
    #[inline]
    pub(super) fn memory(&self) -> usize {
        match self.has_many_timers() {
            true => self.timers.capacity() * size_of::<Timer>(),
            false => 0,
        }
    }

    pub(super) fn has_timers(&self) -> bool {
        !self.timers.is_empty()
    }

    /// Expires the timers up to `due`. True if there are any.
    pub(super) fn expire_timers(&mut self, due: Time) -> bool {
        self.expired_through = self.expired_through.max(due);
        self.has_due_timer()
    }

    pub(super) fn has_due_timer(&self) -> bool {
        self.timers
            .iter()
            .any(|timer| timer.at <= self.expired_through)
    }

    /// Sets timer `key`.
    ///
    /// Never due in the turn that sets it, so that a timer which is set to "now" in its own
    /// callback cannot spin.
    pub(super) fn set_timer(&mut self, key: u8, at: Time) {
        self.cancel_timer(key);
        let at = at.max(self.expired_through.after(Duration::from_nanos(1)));
        self.timers.push(Timer { key, at });
    }

    pub(super) fn cancel_timer(&mut self, key: u8) {
        self.timers.retain(|timer| timer.key != key);
        self.shrink_timers();
    }

    fn shrink_timers(&mut self) {
        if self.timers.is_empty() && self.has_many_timers() {
            self.timers = Vec::new();
        }
    }

    /// Removes the first of the timers that are due.
    pub(super) fn take_due_timer(&mut self) -> Option<u8> {
        let due = |timer: &Timer| timer.at <= self.expired_through;
        let first = self
            .timers
            .iter()
            .enumerate()
            .min_by_key(|(_, timer)| timer.at);
        let (index, _) = first.filter(|(_, timer)| due(timer))?;
        let key = self.timers.remove(index).key;
        self.shrink_timers();
        Some(key)
    }

    /// Returns the time left of each deadline, with the idle timeout's and a rate's.
    pub(super) fn time_left(
        &self,
        state: State,
        idle: Time,
        throttle: Time,
        now: Time,
    ) -> TimeLeft {
        let left = |deadline: Time| {
            let is_armed = deadline.or_never().is_armed();
            is_armed.then(|| deadline.since(now))
        };
        let (mut connect, mut handshake, mut linger) = (None, None, None);
        *match state {
            State::Connecting => &mut connect,
            State::Closing => &mut linger,
            State::Accepting | State::Handshaking | State::Open => &mut handshake,
        } = left(self.phase());
        TimeLeft {
            connect,
            handshake,
            frame: left(self.frame()),
            idle: left(idle),
            write: left(self.write()),
            linger,
            throttle: left(throttle),
            timer: left(self.first_timer()),
        }
    }

    #[cfg(feature = "sim")]
    pub(super) fn is_paused(&self) -> bool {
        self.paused.is_some()
    }

    /// Returns the same with times as distances from `now`, for comparison; with the idle timeout.
    #[cfg(feature = "sim")]
    pub(super) fn ahead_of(&self, now: Time, last_input: Time, timeout: Duration) -> (Self, Time) {
        let idle = self.idle_unpaused(last_input, timeout);
        // Paused clocks move with the present: only their distance from the pause's begin counts.
        let (paused, idle) = match &self.paused {
            Some(paused) => (
                Some(Paused {
                    since: Time::ZERO,
                    frame: paused.frame.ahead_of(paused.since),
                }),
                idle.ahead_of(paused.since),
            ),
            None => (None, idle.ahead_of(now)),
        };
        let timers = self.timers.iter().map(|timer| Timer {
            key: timer.key,
            at: timer.at.ahead_of(now),
        });
        let has_frame = self.frame.is_armed()
            || paused
                .as_ref()
                .is_some_and(|paused| paused.frame.is_armed());
        let deadlines = Self {
            phase: self.phase.ahead_of(now),
            frame: self.frame.ahead_of(now),
            frame_credit: if has_frame { self.frame_credit } else { 0 },
            write: self.write.ahead_of(now),
            paused,
            // Part of the idle timeout.
            paused_for: Duration::ZERO,
            timers: timers.collect(),
            // In the past only whether a due timer has expired matters, and none stays behind.
            expired_through: self.expired_through.ahead_of(now),
        };
        (deadlines, idle)
    }
}

/// The time left until each of a connection's deadlines; zero if it expires in the next turn.
///
/// `None` for a clock that does not run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TimeLeft {
    /// Until the present attempt to connect fails, or until the next one begins.
    connect: Option<Duration>,
    pub(super) handshake: Option<Duration>,
    pub(super) frame: Option<Duration>,
    pub(super) idle: Option<Duration>,
    write: Option<Duration>,
    linger: Option<Duration>,
    throttle: Option<Duration>,
    /// Until the first of the handler's timers.
    timer: Option<Duration>,
}

impl TimeLeft {
    /// Returns the clocks that run.
    pub(crate) fn iter(self) -> impl Iterator<Item = (&'static str, Duration)> {
        [
            ("connect timeout", self.connect),
            ("handshake timeout", self.handshake),
            ("frame timeout", self.frame),
            ("idle timeout", self.idle),
            ("write timeout", self.write),
            ("linger timeout", self.linger),
            ("reading again", self.throttle),
            ("timer", self.timer),
        ]
        .into_iter()
        .filter_map(|(name, left)| Some((name, left?)))
    }
}
