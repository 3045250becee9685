//! Invariants of the parts, which hold between two turns: checked by the simulator.

use super::active::Active;
use super::proxy;
use super::status::{Events, Status};
use super::tls::Session;

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
    let has_ended = |session: &Session| session.peer_closed() || session.has_failed();
    let due = parts.deadlines.has_due_timer();
    let facts = [
        (
            parts.send_buf.is_compact() && session.is_none_or(is_compact),
            "sent output takes more memory than pending output",
        ),
        (
            status.tls_ended == session.is_some_and(has_ended),
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
