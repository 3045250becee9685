//! Invariants of the parts, which hold between two turns: checked by the simulator.

use std::time::Duration;

use super::active::Active;
use super::deadlines::Deadlines;
use super::life::Phase;
use super::proxy;
use super::status::{Events, Status};
use super::time::Time;
use super::tls::Session;
use super::ConnConfig;

/// Returns the first invariant that does not hold.
///
/// `limits`: the maximum frame, and the size of one read. `reads`: the next read is allowed.
pub(super) fn broken(
    status: Status,
    parts: &Active,
    session: Option<&Session>,
    limits: (usize, usize),
    reads: bool,
) -> Option<String> {
    /// A frame's header and trailer.
    const ENVELOPE: usize = 16;
    /// RFC 8446 section 5.2: 2^14 + 256 and the header.
    const RECORD: usize = 0x4000 + 256 + 5;
    let record = if session.is_some() { RECORD } else { 0 };
    let (max_frame, read_size) = limits;
    // A PROXY header comes before frames.
    let max_frame = max_frame.max(proxy::MAX_LENGTH);
    let max = max_frame.saturating_add(ENVELOPE + read_size + record);
    // Bytes that the former framing let in stay until they are decoded. No read follows before.
    let max = if reads { max } else { usize::MAX };
    if let Some(fault) = parts.recv_buf.broken_invariant(max) {
        return Some(fault);
    }
    let is_compact = |session: &Session| session.is_compact();
    let due = parts.deadlines.has_due_timer();
    let facts = [
        (
            parts.send_buf.is_compact() && session.is_none_or(is_compact),
            "sent output takes more memory than pending output",
        ),
        (
            status.tls_ended == session.is_some_and(Session::has_ended),
            "TLS has ended, or has not, and the flag says otherwise",
        ),
        (
            status.recv.has_rates() == parts.throttle.is_some(),
            "there are rates, or none, and the flag says otherwise",
        ),
        (
            !due || status.events.has(Events::TIMER),
            "a timer is due and not pending",
        ),
    ];
    let fault = facts.into_iter().find(|(holds, _)| !holds);
    fault.map(|(_, fault)| fault.to_owned())
}

/// What decides which clock must run.
pub(super) struct Clocks {
    pub(super) idle: Time,
    /// Until when a rate pauses reading, if one does.
    pub(super) throttled_until: Option<Time>,
    pub(super) is_paused: bool,
    pub(super) has_output: bool,
    /// A frame is incomplete, and more may come.
    pub(super) has_begun: bool,
}

impl Clocks {
    /// True if the state's deadline is not armed.
    pub(super) fn lack_deadline(
        &self,
        phase: Phase,
        limits: &ConnConfig,
        deadlines: &Deadlines,
    ) -> bool {
        // The clock ends after 584 years: a deadline beyond half of that may be unarmed.
        let never = |span: Duration| !Time::from_start(span.saturating_mul(2)).is_armed();
        let lacks = |deadline: Time, span: Duration| !deadline.is_armed() && !never(span);
        match phase {
            Phase::Gone | Phase::Reset | Phase::Detached => false,
            // The reactor checks it.
            Phase::Connecting => false,
            Phase::Linger => lacks(deadlines.phase(), limits.linger_timeout),
            Phase::Flush | Phase::Shutdown => lacks(deadlines.write(), limits.write_timeout),
            Phase::Open if self.has_output && !deadlines.write().is_armed() => true,
            Phase::Open if self.throttled_until.is_some() => {
                self.throttled_until.is_some_and(|until| !until.is_armed())
            }
            Phase::Open if self.is_paused => false,
            Phase::Open if self.has_begun && !deadlines.frame().is_armed() => true,
            Phase::Open => lacks(self.idle, limits.idle_timeout),
            _ => lacks(deadlines.phase(), limits.handshake_timeout),
        }
    }
}
