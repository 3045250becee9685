//! The one table of what each state of a connection allows.

use super::life::Phase;
use super::status::Status;

/// Whether bytes may be read from the socket, written to it, and queued for it.
///
/// | state | read | write | queue |
/// |---|---|---|---|
/// | Accepting | while a PROXY header is to come | no | no |
/// | Connecting | no | no | yes |
/// | Handshaking | yes, stashed bytes first | TLS's own | if it was open or is outgoing |
/// | Open | unless paused, frames are buffered, or the input is over | until our FIN | yes |
/// | Closing, to flush | to discard, up to `linger_bytes` | yes | no |
/// | Closing, to linger | to discard, up to `linger_bytes` | no | no |
/// | Closing, else | no | no | no |
///
/// Before a connection is open, and during a handshake, queued frames are kept. Nothing is read
/// after FIN or a failure of TLS. Nothing is queued by a handler that has finished or detached, nor
/// for a peer that can receive nothing more.
///
/// Most connections are in one of a few situations for which a cheaper test of the machine suffices:
///
/// | test | situation | allowed |
/// |---|---|---|
/// | `only_frames` | Open, and no part has more to do | read, write, queue |
/// | `is_idle` | the same, and no byte is buffered | the same |
/// | `is_newly_open` | idle in the clear, but for `on_open` | the same |
pub(super) struct Allows {
    pub(super) read: bool,
    pub(super) write: bool,
    pub(super) queue: bool,
}

/// What decides beside the status.
pub(super) struct Situation {
    /// No frame may be delivered.
    pub(super) paused: bool,
    /// Less than `linger_bytes` were discarded.
    pub(super) may_discard: bool,
    /// The peer can receive nothing more.
    pub(super) write_closed: bool,
}

impl Allows {
    pub(super) fn of(status: Status, situation: &Situation) -> Self {
        let (life, recv, send) = (status.life, status.recv, status.send);
        let may_discard = situation.may_discard;
        let (read, write, queue) = match life.phase() {
            Phase::HeaderRequired | Phase::HeaderOptional => (true, false, false),
            Phase::HeaderDone | Phase::Admitting => (false, false, false),
            Phase::Connecting => (false, false, true),
            Phase::Handshaking => (true, true, life.is_served()),
            Phase::Open => (
                !situation.paused && !recv.has_frames_buffered() && !status.tls_ended,
                !send.has_sent_fin(),
                true,
            ),
            // A peer that writes before it reads gets its answers, and the close is no reset.
            Phase::Flush => (may_discard, true, false),
            Phase::Linger => (may_discard, false, false),
            Phase::Shutdown | Phase::Gone | Phase::Reset | Phase::Detached => (false, false, false),
        };
        let finished = send.is_finishing() || life.is_detaching() || situation.write_closed;
        Self {
            read: read && !recv.is_eof(),
            write,
            queue: queue && !finished,
        }
    }
}
