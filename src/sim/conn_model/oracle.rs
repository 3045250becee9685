//! What must hold for one connection, as seen from outside.

use std::collections::VecDeque;

use crate::proto::ConnConfig;
use crate::reason::CloseReason;
use crate::sim::input::{Callback, End};
use crate::sim::Violation;

/// What an oracle says of one step.
pub(super) type Checked = Result<(), Violation>;

pub(super) fn violation(words: &str) -> Violation {
    Violation(words.to_owned())
}

/// What was observed, as far as it restricts what may follow.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Oracle {
    /// The number of the framing. `None` over TLS and with a custom framer: the wire is not known.
    pub(super) framing: Option<u8>,
    opened: bool,
    /// No frame can be made of the input.
    bad_input: bool,
    finished: bool,
    drained: bool,
    pub(super) paused: bool,
    /// Pending output has reached the high watermark.
    congested: bool,
    writable_due: bool,
    /// The handler has nothing more to send.
    goodbye: bool,
    /// RST was asked for.
    pub(super) forced: bool,
    /// Bytes that `send` accepted and the kernel has not.
    owed: VecDeque<u8>,
    /// How many of them the handler is to be notified of.
    flush: Option<usize>,
    pub(super) end: Option<End>,
}

impl Oracle {
    pub(super) fn of(framing: Option<u8>) -> Self {
        Self {
            framing,
            ..Self::default()
        }
    }

    /// The handler is told something.
    pub(super) fn sees_event(&mut self, callback: &Callback) -> Checked {
        let wrong = match callback {
            Callback::Opened => std::mem::replace(&mut self.opened, true).then_some("opened twice"),
            _ if !self.opened => Some("told something before it was opened"),
            Callback::Frame(_) | Callback::BadInput(_) if self.bad_input => {
                Some("input behind what is no frame")
            }
            Callback::BadInput(_) if self.paused || self.finished || self.congested => {
                Some("input was refused that could not be delivered")
            }
            Callback::BadInput(CloseReason::FrameTooLarge | CloseReason::BadFrame) => {
                self.bad_input = true;
                None
            }
            Callback::BadInput(_) => Some("input was refused for no reason"),
            Callback::Frame(_) if self.paused => Some("a frame while it was paused"),
            Callback::Frame(_) if self.finished => Some("a frame after the end"),
            Callback::Frame(_) if self.congested => {
                Some("a frame while too much waits for the peer")
            }
            Callback::Finished => {
                std::mem::replace(&mut self.finished, true).then_some("finished twice")
            }
            Callback::Drain => {
                std::mem::replace(&mut self.drained, true).then_some("drained twice")
            }
            Callback::Flushed if self.framing.is_some() && self.flush.take() != Some(0) => {
                Some("flushed without a request, or with output in front of it")
            }
            Callback::Writable if !std::mem::take(&mut self.writable_due) => {
                Some("writable without having been full")
            }
            _ => None,
        };
        wrong.map_or(Ok(()), |words| Err(violation(words)))
    }

    /// A frame was taken, or refused because too much waits; so much waited before, and waits now.
    pub(super) fn sees_send(
        &mut self,
        limits: &ConnConfig,
        payload: &[u8],
        taken: bool,
        before: usize,
        now: usize,
    ) -> Checked {
        if taken && self.goodbye {
            return Err(violation("a frame was taken behind the end"));
        }
        match (taken, before >= limits.output_limit) {
            (true, true) => return Err(violation("a frame was taken over the output limit")),
            (false, false) => return Err(violation("full below the output limit")),
            (true, false) => {
                if let Some(framing) = self.framing {
                    self.owed.extend(on_the_wire(framing, payload));
                }
                self.congested |= now >= limits.high_watermark;
            }
            (false, true) => self.congested = true,
        }
        Ok(())
    }

    /// The handler is to be notified once everything has left.
    pub(super) fn sees_flush_request(&mut self) {
        self.flush = self.framing.map(|_| self.owed.len());
    }

    /// True if a notification is due.
    pub(super) fn is_flushed(&self) -> bool {
        self.flush == Some(0)
    }

    /// Nothing more is to be sent.
    pub(super) fn sees_goodbye(&mut self) {
        self.goodbye = true;
    }

    pub(super) fn has_said_goodbye(&self) -> bool {
        self.goodbye
    }

    /// The kernel took these bytes.
    pub(super) fn sees_sent(&mut self, bytes: &[u8]) -> Checked {
        if self.framing.is_none() {
            return Ok(());
        }
        for &byte in bytes {
            if self.owed.pop_front() != Some(byte) {
                return Err(violation("the peer gets bytes that were not sent"));
            }
            self.flush = self.flush.map(|ahead| ahead.saturating_sub(1));
        }
        Ok(())
    }

    /// So many bytes still wait for the peer of a connection that is open or not.
    pub(super) fn sees_room(&mut self, limits: &ConnConfig, queued: usize, open: bool) {
        if self.congested && queued <= limits.low_watermark {
            self.congested = false;
            self.writable_due = open;
        }
    }

    /// From now on the wire is not known.
    #[cfg(feature = "tls")]
    pub(super) fn sees_upgrade(&mut self) {
        self.framing = None;
        self.owed.clear();
        self.flush = None;
    }

    /// No more output can be sent, after a failure of TLS too: none is pending.
    pub(super) fn sees_write_closed(&mut self) {
        self.congested = false;
        self.forget_flush();
    }

    /// The kernel takes nothing more, ever.
    pub(super) fn sees_dead(&mut self) {
        self.owed.clear();
        self.congested = false;
        self.forget_flush();
    }

    /// A notification that is not due will never be; one that is may still come.
    fn forget_flush(&mut self) {
        self.flush = self.flush.filter(|&ahead| ahead == 0);
    }

    pub(super) fn sees_end(&mut self, end: End) -> Checked {
        self.end = Some(end);
        let by_peer = matches!(
            end.reason,
            CloseReason::Reset | CloseReason::TimedOut | CloseReason::Io
        );
        if end.reset && !self.forced {
            return Err(violation("RST without a reason for it"));
        }
        // What was sent to one that never opened is lost, and its handler is told so.
        if self.opened && !end.reset && !by_peer && !self.owed.is_empty() {
            return Err(Violation(format!(
                "it ended as {} and owes {} bytes",
                end.reason,
                self.owed.len()
            )));
        }
        Ok(())
    }
}

/// A frame as the peer must see it.
fn on_the_wire(framing: u8, payload: &[u8]) -> Vec<u8> {
    if framing == 8 {
        let length = (payload.len() as u64 - 1).to_le_bytes();
        return [length.get(..3).unwrap_or_default(), payload].concat();
    }
    let length = (payload.len() as u64).to_be_bytes();
    let width = match framing {
        1 => 1,
        2 => 2,
        3 => 4,
        _ => 0,
    };
    [length.get(8 - width..).unwrap_or_default(), payload].concat()
}
