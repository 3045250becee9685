//! How a connection ends: in order, at once, or with RST; and the one reason.

use std::error::Error as StdError;
use std::io;

use super::deadline::Deadlines;
use super::state::{ClosePhase, Flags, NextStep, State};
use super::{Machine, Pool, Time};
use crate::reason::{Close, CloseReason, Closed};

impl Machine {
    /// FIN is sent, or could not be because the connection is gone already.
    pub(crate) fn handle_shutdown(&mut self, now: Time, sent: bool) {
        if self.close_phase == ClosePhase::Shutdown {
            if sent && !self.flags.has(Flags::EOF) {
                self.close_phase = ClosePhase::Linger;
                self.deadlines.stage = now.after(self.limits.linger_timeout);
            } else {
                self.close_phase = ClosePhase::Gone { reset: false };
            }
        } else if self.is_fin_due() {
            // One that could not be sent is of a connection that is gone, which a read will tell.
            self.flags.set(Flags::FIN_SENT);
        }
    }

    /// Sends FIN once everything is flushed, and goes on reading.
    pub(crate) fn finish(&mut self) {
        if self.takes_output() {
            self.flags.set(Flags::FINISHING);
        }
    }

    /// Everything is flushed, and the handler has nothing more to send.
    pub(super) fn is_fin_due(&self) -> bool {
        self.state == State::Open
            && self.flags.has(Flags::FINISHING)
            && !self.flags.has(Flags::FIN_SENT)
            && !self.write_closed()
            && self.queued() == 0
            && self.tls.as_ref().is_none_or(|session| session.has_said_goodbye())
    }

    /// Nothing can be written any more, because we have said so.
    pub(crate) fn has_sent_fin(&self) -> bool {
        self.flags.has(Flags::FIN_SENT)
    }

    /// Closes in order once everything that has arrived is answered.
    pub(crate) fn close_after_input(&mut self) {
        if self.takes_output() && !self.flags.has(Flags::CLOSE_AFTER_INPUT) {
            self.flags.set(Flags::CLOSE_AFTER_INPUT);
            self.flags.clear(Flags::READ_DRAINED);
        }
    }

    /// An answer is still to come.
    pub(crate) fn await_reply(&mut self) {
        self.pending_replies = self.pending_replies.saturating_add(1);
    }

    /// It has come, or will not.
    pub(crate) fn end_reply(&mut self) {
        self.pending_replies = self.pending_replies.saturating_sub(1);
        if self.pending_replies == 0 && !self.flags.has(Flags::EOF) {
            // What "nothing left to read" meant before says nothing of what has come since.
            self.flags.clear(Flags::READ_DRAINED);
        }
    }

    /// The server drains: tells the handler if there is one to tell, and cuts a handshake short.
    pub(crate) fn drain(&mut self, handshake_until: Time) {
        self.flags.set(Flags::DRAINING);
        match self.state {
            State::Accepting | State::Handshaking => {
                self.deadlines.stage = self.deadlines.stage.min(handshake_until);
                self.flags.set(Flags::DRAIN_PENDING);
            }
            State::Open => self.flags.set(Flags::DRAIN_PENDING),
            // Nobody connects to anybody any more: it is given up.
            State::Connecting | State::Closing => {}
        }
    }

    /// Closes in order: the handler has said all it wants.
    pub(crate) fn close_by_handler(&mut self, now: Time, pool: &mut Pool) {
        let reason = if self.flags.has(Flags::FINISH_REPORTED) {
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
    pub(crate) fn close(&mut self, mut closed: Closed, now: Time, pool: &mut Pool) {
        if self.state == State::Closing {
            return;
        }
        if self.flags.has(Flags::WRITE_FAILED) || self.is_connecting() {
            return self.end(closed, pool);
        }
        if self.is_handshaking() && !self.send_buf.is_empty() {
            // It was sent for a handshake to encrypt that will not be over, and never goes in the clear.
            self.send_buf.clear(pool);
            closed.reason = CloseReason::TlsHandshake;
            let words = "closed during the handshake: what was sent since it began is lost";
            closed.error.get_or_insert_with(|| words.into());
        }
        self.close_phase = ClosePhase::Flush;
        self.enter_closing(pool);
        if self.flags.has(Flags::FIN_SENT) {
            // All is said: what is left is to wait for the peer's end.
            let ended = self.flags.has(Flags::EOF);
            self.close_phase = if ended {
                ClosePhase::Gone { reset: false }
            } else {
                ClosePhase::Linger
            };
            self.deadlines.stage = now.after(self.limits.linger_timeout);
        }
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
        let ended = self.close_phase == ClosePhase::Linger;
        if ended {
            self.close_phase = ClosePhase::Gone { reset: false };
        } else {
            self.reset(Closed::new(CloseReason::DrainForced), pool);
        }
        ended
    }

    pub(super) fn leave(&mut self, closed: Closed, reset: bool, pool: &mut Pool) {
        if matches!(self.close_phase, ClosePhase::Gone { .. }) {
            return;
        }
        // What was promised to the peer is lost now: that is the reason to report. An alert for a failed handshake is
        // no promise.
        let lost = self.state == State::Closing && self.was_open() && self.unsent_app_bytes() > 0;
        self.close_phase = ClosePhase::Gone { reset };
        self.enter_closing(pool);
        self.deadlines = Deadlines::none();
        self.send_buf.clear(pool);
        if let Some(session) = &mut self.tls {
            session.clear(pool);
        }
        match &mut self.closed {
            // The error stays, if the handler had one: it is the user's, and not to be dropped in the middle of this.
            Some(known) if lost => {
                known.reason = closed.reason;
                if known.error.is_none() {
                    known.error = closed.error;
                }
            }
            _ => self.note_closed(closed),
        }
    }

    /// The first reason stays. Last in whatever it is called from: the other is dropped, and may hold a user's error.
    pub(super) fn note_closed(&mut self, closed: Closed) {
        if self.closed.is_none() {
            self.closed = Some(closed);
        }
    }

    pub(super) fn enter_closing(&mut self, pool: &mut Pool) {
        if self.state != State::Closing {
            self.enter(State::Closing);
        }
        let write = self.deadlines.write;
        self.deadlines = Deadlines::none();
        self.deadlines.write = write;
        self.timers = Vec::new();
        self.flags.clear(Flags::TIMED);
        self.flags.clear(Flags::TIMER_PENDING);
        self.recv_pos = 0;
        pool.give(std::mem::take(&mut self.recv_buf));
    }

    #[inline]
    pub(crate) fn next_step(&self) -> NextStep {
        match self.close_phase {
            ClosePhase::None if self.is_fin_due() => NextStep::Shutdown,
            ClosePhase::None | ClosePhase::Flush | ClosePhase::Linger => NextStep::Wait,
            ClosePhase::Shutdown => NextStep::Shutdown,
            ClosePhase::Gone { reset } => NextStep::Gone { reset },
        }
    }

    /// Why it ended, for the one report.
    pub(crate) fn take_closed(&mut self) -> Closed {
        self.closed.take().unwrap_or_else(|| Closed::new(CloseReason::Closed))
    }

    /// FIN came without close_notify.
    pub(super) fn is_cut_off(&self) -> bool {
        self.tls.as_ref().is_some_and(|session| !session.peer_closed())
    }

    /// What was decrypted before the fault is delivered first; no answer to it can be encrypted. The fault is the
    /// reason already, whatever a handler makes of a `send` that fails.
    pub(super) fn fail_tls(&mut self, pool: &mut Pool) {
        self.send_buf.clear(pool);
        self.flags.clear(Flags::CONGESTED);
        let error = self.tls.as_mut().and_then(|session| session.take_failure());
        if let (Some(error), None) = (error, &self.closed) {
            self.closed = Some(Closed::with(CloseReason::Tls, error as Box<dyn StdError>));
        }
    }

    pub(super) fn fail_handshake(&mut self, now: Time, pool: &mut Pool) {
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
        self.send_buf.clear(pool);
        self.close(Closed::with(reason, error as Box<dyn StdError>), now, pool);
    }
}

/// The reason behind a socket error.
pub(super) fn closed_by(error: io::Error) -> Closed {
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
