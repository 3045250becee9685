//! What a connection needs only while something is going on: an idle one in the clear has none of it, and is small.

use std::ops::{Deref, DerefMut};
use std::rc::Rc;
use std::time::Duration;

use super::deadline::Deadlines;
use super::send_buf::SendBuffer;
use super::state::Flags;
use super::throttle::Throttle;
use super::{Machine, Pool, ProxyHeader, Stopped, Time, Timer};
use crate::reason::Closed;

/// The part of a [`Machine`] that comes from the pool with input or output and goes back at the end of the turn.
pub(crate) struct Active {
    /// Undecoded input: an incomplete frame, or what waits while reading is paused.
    pub(super) recv_buf: Vec<u8>,
    /// How much of `held` is decoded already.
    pub(super) recv_pos: usize,
    /// What the handler sent; over TLS still to be encrypted.
    pub(super) send_buf: SendBuffer,
    pub(super) deadlines: Deadlines,
    /// How long reading was paused since the last input: the idle clock stood meanwhile.
    pub(super) stood: Duration,
    /// While reading is paused.
    pub(super) stopped: Option<Stopped>,
    pub(super) timers: Vec<Timer>,
    /// Deadlines and timers up to here have been expired_through.
    pub(super) expired_through: Time,
    pub(super) discarded: usize,
    /// What a proxy has said about whom it speaks for.
    pub(super) proxy: Option<Rc<ProxyHeader>>,
    pub(super) throttle: Option<Box<Throttle>>,
    /// Answers that are still to come: it does not close by itself before.
    pub(super) pending_replies: u32,
    pub(super) closed: Option<Closed>,
}

impl Active {
    /// Nothing is going on.
    const NONE: Self = Self {
        recv_buf: Vec::new(),
        recv_pos: 0,
        send_buf: SendBuffer::new(),
        deadlines: Deadlines::none(),
        stood: Duration::ZERO,
        stopped: None,
        timers: Vec::new(),
        expired_through: Time::ZERO,
        discarded: 0,
        proxy: None,
        throttle: None,
        pending_replies: 0,
        closed: None,
    };
    const NOTHING: &'static Self = &Self::NONE;

    /// Nothing waits in it, and no clock of it runs but the handler's timers.
    #[inline]
    fn is_idle(&self) -> bool {
        self.recv_buf.is_empty()
            && self.send_buf.is_empty()
            && !self.deadlines.next().is_armed()
            && self.stopped.is_none()
    }

    /// It is as good as none. What was expired_through is not missed: no timer is left, and the next one is set at a later time.
    #[inline]
    pub(super) fn is_over(&self) -> bool {
        self.is_idle()
            && self.timers.is_empty()
            && self.stood.is_zero()
            && self.throttle.is_none()
            && self.proxy.is_none()
            && self.closed.is_none()
            && self.pending_replies == 0
            && self.discarded == 0
    }
}

impl Default for Active {
    fn default() -> Self {
        Self::NONE
    }
}

impl Machine {
    /// Open, and nothing but frames to think of: no end in sight, no pause, no rate, no news for the handler.
    /// The one test that a message of an ordinary connection pays for all that.
    #[inline]
    pub(crate) fn only_frames(&self) -> bool {
        const ORDINARY: u32 = Flags::ADMITTED.0 | Flags::WAS_OPEN.0 | Flags::OUTGOING.0 | Flags::TIMED.0;
        self.flags.0 & !ORDINARY == 0
    }

    /// As at rest, in the clear, but that the handler is to be told `on_open` first.
    #[inline]
    pub(crate) fn is_newly_open(&self) -> bool {
        const ORDINARY: u32 = Flags::ADMITTED.0 | Flags::OUTGOING.0 | Flags::TIMED.0;
        self.flags.0 & !ORDINARY == Flags::OPENED_PENDING.0
            && self.tls.is_none()
            && self.active.as_ref().is_none_or(|active| active.is_idle())
    }

    /// It is told.
    pub(crate) fn mark_opened(&mut self) {
        self.flags.clear(Flags::OPENED_PENDING);
        self.flags.set(Flags::WAS_OPEN);
    }

    /// It is quiet, nothing waits in either direction, and it waits for nothing but the peer's next word: besides the handler's
    /// timers its one deadline is the idle timeout, which moves only later.
    #[inline]
    pub(crate) fn is_idle(&self) -> bool {
        self.only_frames()
            && self.active.as_ref().is_none_or(|active| active.is_idle())
            && self.tls.as_ref().is_none_or(|session| session.is_idle())
    }

    /// Something is going on, and there is memory for it in the pool.
    #[inline]
    pub(super) fn wake(&mut self, pool: &mut Pool) -> &mut Active {
        self.active.get_or_insert_with(|| pool.take_active())
    }
}

impl Deref for Machine {
    type Target = Active;

    #[inline]
    fn deref(&self) -> &Active {
        self.active.as_deref().unwrap_or(Active::NOTHING)
    }
}

impl DerefMut for Machine {
    #[inline]
    fn deref_mut(&mut self) -> &mut Active {
        self.active.get_or_insert_default()
    }
}
