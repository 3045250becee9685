//! How a connection ends: the request to close after input, and the reason.

use std::error::Error as StdError;
use std::io;

use super::life::Phase;
use super::state::SendError;
use crate::reason::{Close, CloseReason, Closed};

/// The request to close once all received input is answered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct CloseAfterInput(u8);

impl CloseAfterInput {
    const REQUESTED: u8 = 1;
    /// A read since then found the kernel's buffer empty.
    const READ_DRAINED: u8 = 2;

    /// All flags, for the one test of [`Status::only_frames`](super::status::Status::only_frames).
    #[inline]
    pub(super) fn bits(self) -> u8 {
        self.0
    }

    pub(super) fn request(&mut self) {
        if !self.is_requested() {
            self.0 = Self::REQUESTED;
        }
    }

    #[inline]
    pub(super) fn is_requested(self) -> bool {
        self.0 & Self::REQUESTED != 0
    }

    /// A read found the kernel's buffer empty.
    pub(super) fn read_blocked(&mut self) {
        if self.is_requested() {
            self.0 |= Self::READ_DRAINED;
        }
    }

    /// The peer's FIN was read: nothing follows.
    pub(super) fn read_ended(&mut self) {
        self.0 |= Self::READ_DRAINED;
    }

    /// Forgets that the kernel's buffer was empty: more may have arrived since.
    pub(super) fn check_again(&mut self) {
        self.0 &= !Self::READ_DRAINED;
    }

    /// The close has waited for a reply or for output: more may have arrived meanwhile.
    pub(super) fn end_hold(&mut self, is_eof: bool) {
        if !is_eof {
            self.check_again();
        }
    }

    /// True if a read must find the kernel's buffer empty first.
    #[inline]
    pub(super) fn needs_read(self) -> bool {
        self.0 == Self::REQUESTED
    }

    /// True if everything that arrived before the request was read.
    pub(super) fn is_read_drained(self) -> bool {
        self.0 & Self::READ_DRAINED != 0
    }
}

/// Whether the peer's system has all output of a connection that closes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Delivery {
    /// The kernel was not asked yet.
    Unknown,
    /// Not all of it: the kernel still holds some, by its last answer a measure of this size.
    Unsent(usize),
    /// All of it, or there was none.
    Done,
    /// This system cannot tell.
    Unsupported,
}

impl Delivery {
    /// Takes the kernel's answer. `queued`: output is pending that the kernel has not got yet.
    /// Returns how many bytes the peer has taken since the last answer.
    pub(super) fn note(&mut self, unsent: Option<usize>, queued: bool) -> usize {
        let before = match *self {
            Self::Unsent(before) if before != usize::MAX => Some(before),
            _ => None,
        };
        *self = match unsent {
            _ if queued && *self == Self::Unknown => Self::Unsent(usize::MAX),
            None => Self::Unsupported,
            Some(0) => Self::Done,
            Some(now) => Self::Unsent(before.map_or(now, |before| now.min(before))),
        };
        match (before, *self) {
            (Some(before), Self::Unsent(now)) => before - now,
            _ => 0,
        }
    }

    pub(super) fn has_unsent(self) -> bool {
        matches!(self, Self::Unsent(_))
    }

    /// True if output may be lost with the socket.
    ///
    /// A kernel that was not asked may hold some under our own `reset`. Under the peer's, the peer
    /// knows what it is without.
    pub(super) fn may_lose(self, reset: bool) -> bool {
        self.has_unsent() || (reset && self == Self::Unknown)
    }

    /// True if the kernel must be asked in this phase.
    pub(super) fn is_wanted(self, phase: Phase) -> bool {
        match phase {
            Phase::Flush | Phase::Linger => self == Self::Unknown,
            Phase::Shutdown => self == Self::Unknown || self.has_unsent(),
            _ => false,
        }
    }
}

/// What a connection accumulates on its way to the end.
#[derive(Debug)]
pub(super) struct Ending {
    /// Why it ends: the first reason stays.
    reason: Option<Closed>,
    /// Input discarded while closing.
    discarded: usize,
    /// Replies promised by the handler: the connection does not close by itself before they are
    /// sent.
    pending_replies: u32,
    /// Deferred commands are not carried out yet: they count as a pending reply, which the handler
    /// cannot end.
    awaits_commands: bool,
    /// The last of those commands is a close: no frame is delivered before it.
    closes_behind: bool,
    pub(super) delivery: Delivery,
}

impl Ending {
    pub(super) const fn none() -> Self {
        Self {
            reason: None,
            discarded: 0,
            pending_replies: 0,
            awaits_commands: false,
            closes_behind: false,
            delivery: Delivery::Unknown,
        }
    }

    #[inline]
    pub(super) fn is_none(&self) -> bool {
        self.reason.is_none()
            && !self.has_pending_replies()
            && !self.closes_behind
            && self.discarded == 0
    }

    /// Records why the connection ends, unless a reason is known.
    ///
    /// The last statement of its callers: a second reason is dropped here, and its error may be the
    /// user's.
    pub(super) fn set_reason(&mut self, closed: Closed) {
        if self.reason.is_none() {
            self.reason = Some(closed);
        }
    }

    /// Output is lost. A connection that was `ending` ends for that instead.
    pub(super) fn lose(&mut self, closed: Closed, ending: bool) {
        if ending {
            self.set_loss(closed);
        } else {
            self.set_reason(closed);
        }
    }

    pub(super) fn has_reason(&self) -> bool {
        self.reason.is_some()
    }

    /// Replaces the reason because promised output is lost.
    ///
    /// An error that is known stays, and the label: the error is the user's, whose destructor must
    /// not run here.
    pub(super) fn set_loss(&mut self, closed: Closed) {
        match &mut self.reason {
            Some(known) => {
                known.reason = closed.reason;
                if known.error.is_none() {
                    known.error = closed.error;
                }
            }
            none => *none = Some(closed),
        }
    }

    /// Adds the cause to the reason, unless it has one.
    pub(super) fn add_error(&mut self, error: Box<dyn StdError + Send + Sync>) {
        if let Some(Closed {
            error: none @ None, ..
        }) = &mut self.reason
        {
            *none = Some(error);
        }
    }

    pub(super) fn take_reason(&mut self) -> Option<Closed> {
        self.reason.take()
    }

    pub(super) fn discard(&mut self, count: usize) {
        self.discarded = self.discarded.saturating_add(count);
    }

    pub(super) fn discarded(&self) -> usize {
        self.discarded
    }

    pub(super) fn await_reply(&mut self) {
        self.pending_replies = self.pending_replies.saturating_add(1);
    }

    pub(super) fn end_reply(&mut self) {
        self.pending_replies = self.pending_replies.saturating_sub(1);
    }

    pub(super) fn set_awaits_commands(&mut self, awaits: bool) {
        self.awaits_commands = awaits;
    }

    pub(super) fn set_closes_behind(&mut self) {
        self.closes_behind = true;
    }

    pub(super) fn closes_behind(&self) -> bool {
        self.closes_behind
    }

    pub(super) fn awaits_commands(&self) -> bool {
        self.awaits_commands
    }

    pub(super) fn has_pending_replies(&self) -> bool {
        self.pending_replies > 0 || self.awaits_commands
    }

    /// A copy without the error, which cannot be copied.
    #[cfg(feature = "sim")]
    pub(super) fn fork(&self) -> Self {
        Self {
            reason: self.reason.as_ref().map(|closed| Closed {
                error: None,
                ..*closed
            }),
            ..*self
        }
    }

    #[cfg(feature = "sim")]
    pub(super) fn fingerprint(&self) -> (Option<CloseReason>, usize, u32, [bool; 2], Delivery) {
        let reason = self.reason.as_ref().map(|closed| closed.reason);
        let replies = self.pending_replies;
        (
            reason,
            self.discarded,
            replies,
            [self.awaits_commands, self.closes_behind],
            self.delivery,
        )
    }
}

/// True if the error behind `close` is that of a frame that found pending output at the limit.
pub(super) fn is_for_full_output(close: &Close) -> bool {
    let error = close.closed.error.as_deref();
    let error = error.and_then(|error| error.downcast_ref());
    matches!(error, Some(SendError::Full { .. }))
}

/// Returns the reason behind a socket error.
pub(super) fn closed_by(error: io::Error) -> Closed {
    let reason = match error.raw_os_error() {
        Some(libc::ECONNRESET | libc::EPIPE | libc::ECONNABORTED | libc::ENOTCONN) => {
            CloseReason::Reset
        }
        Some(libc::ETIMEDOUT) => CloseReason::TimedOut,
        Some(libc::EHOSTUNREACH | libc::ENETUNREACH | libc::ENETDOWN | libc::EHOSTDOWN) => {
            CloseReason::Unreachable
        }
        _ => CloseReason::Io,
    };
    match reason {
        CloseReason::Io => Closed::with(reason, error),
        _ => Closed::new(reason),
    }
}
