//! The small half of every part of a connection: one word, so that one comparison tests them all.

use super::close::CloseAfterInput;
use super::life::{Life, Phase};
use super::recv::Recv;
use super::send::Send;

/// The facts of an idle connection, each in the part that owns it.
///
/// All are zero in an open connection that exchanges frames and nothing else, but for the flags of
/// its past ([`Life::ORDINARY`]), which are the lowest bits of the word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C, align(8))]
pub(super) struct Status {
    pub(super) life: Life,
    pub(super) events: Events,
    pub(super) recv: Recv,
    pub(super) send: Send,
    pub(super) close: CloseAfterInput,
    /// The first deadline may have come nearer in this turn: the reactor must read it at the end,
    /// whether it has done so meanwhile or not.
    pub(super) deadlines_moved: bool,
    /// TLS delivers no more: close_notify has come, or the session has failed.
    pub(super) tls_ended: bool,
}

impl Status {
    pub(super) fn new(life: Life) -> Self {
        Self {
            life,
            events: Events::default(),
            recv: Recv::default(),
            send: Send::default(),
            close: CloseAfterInput::default(),
            deadlines_moved: false,
            tls_ended: false,
        }
    }

    #[inline]
    fn word(self) -> u64 {
        let [flags, phase] = self.life.bits();
        u64::from_le_bytes([
            flags,
            phase,
            self.events.bits(),
            self.recv.bits(),
            self.send.bits(),
            self.close.bits(),
            u8::from(self.deadlines_moved),
            u8::from(self.tls_ended),
        ])
    }

    /// True if the connection is open and exchanges frames, and no part has anything else to do.
    #[inline]
    pub(super) fn only_frames(self) -> bool {
        self.word() <= u64::from(Life::ORDINARY)
    }

    /// True if the handler is to be notified that output has left, or is about to be.
    pub(super) fn is_held_for_flush(self) -> bool {
        let waits = self.send.awaits_flush() && !self.send.has_failed();
        waits || self.events.has(Events::FLUSHED)
    }

    /// As [`Status::only_frames`], but that `on_open` is pending.
    #[inline]
    pub(super) fn only_opened(mut self) -> bool {
        self.events.take(Events::OPENED) && self.only_frames()
    }

    /// True if the connection closes, or will as soon as the handler has answered bad input: its
    /// reason is known, unless output is lost.
    pub(super) fn is_ending(self) -> bool {
        self.life.is_closing() || self.recv.has_bad_input()
    }

    /// Returns the phase of a closing connection once FIN is sent.
    pub(super) fn phase_after_fin(self) -> Phase {
        if self.recv.is_eof() {
            Phase::Gone
        } else {
            Phase::Linger
        }
    }

    /// True while no frame may be delivered, for a reason of this side's.
    #[inline]
    pub(super) fn is_paused(self, full_duplex: bool) -> bool {
        self.recv.is_paused()
            || self.life.is_detaching()
            || (self.send.is_congested() && !full_duplex)
    }
}

/// The events that are pending for the handler, frames and the peer's end excluded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Events(u8);

/// One of [`Events`].
#[derive(Clone, Copy)]
pub(super) struct Pending(u8);

impl Events {
    pub(super) const OPENED: Pending = Pending(1);
    /// An upgrade's handshake is over.
    pub(super) const SECURED: Pending = Pending(2);
    /// A timer is due, unless it was cancelled since.
    pub(super) const TIMER: Pending = Pending(4);
    pub(super) const DRAIN: Pending = Pending(8);
    pub(super) const WRITABLE: Pending = Pending(16);
    pub(super) const FLUSHED: Pending = Pending(32);

    #[inline]
    fn bits(self) -> u8 {
        self.0
    }

    pub(super) fn set(&mut self, event: Pending) {
        self.0 |= event.0;
    }

    pub(super) fn clear(&mut self, event: Pending) {
        self.0 &= !event.0;
    }

    #[inline]
    pub(super) fn take(&mut self, event: Pending) -> bool {
        let pending = self.has(event);
        self.clear(event);
        pending
    }

    #[inline]
    pub(super) fn has(self, event: Pending) -> bool {
        self.0 & event.0 != 0
    }

    /// True if events are pending, and all of them are about output.
    pub(super) fn only_output(self) -> bool {
        self.0 != 0 && self.0 & !(Self::WRITABLE.0 | Self::FLUSHED.0) == 0
    }

    /// True if an event is pending, timers excluded.
    pub(super) fn any_but_timer(self) -> bool {
        self.0 & !Self::TIMER.0 != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_status_is_one_word() {
        assert_eq!(size_of::<Status>(), 8);
    }
}
