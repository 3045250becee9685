//! What tells two connections apart: for the exhaustive search of the simulator.

use std::time::Duration;

use super::active::Active;
use super::close::Delivery;
use super::deadlines::Deadlines;
use super::status::Status;
use super::time::Time;
use crate::reason::CloseReason;

/// Everything that the future of a plain connection depends on, with times as distances from now.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Fingerprint {
    status: Status,
    /// The maximum frame, and how far the decoder has seen.
    codec: (usize, usize),
    /// The maximum frame of the options, which the next framing may have.
    max_frame: Option<usize>,
    received: Vec<u8>,
    pending: Vec<u8>,
    /// How many of them the handler is to be notified of.
    marked: usize,
    deadlines: Deadlines,
    idle: Time,
    ending: (Option<CloseReason>, usize, u32, bool, Delivery),
    /// Whether a frame was received: a stream that never made one may be TLS.
    made_frames: bool,
}

impl Fingerprint {
    /// `clocks`: now, the time of the last input, the idle timeout, and whether it runs.
    pub(super) fn of(
        status: Status,
        (codec, max_frame): ((usize, usize), Option<usize>),
        parts: &Active,
        clocks: (Time, Time, Duration, bool),
        made_frames: bool,
    ) -> Self {
        let (now, last_input, timeout, has_idle) = clocks;
        let (deadlines, idle) = parts.deadlines.ahead_of(now, last_input, timeout);
        let runs = has_idle || (status.life.is_open() && deadlines.is_paused());
        Self {
            status,
            codec,
            max_frame,
            received: parts.recv_buf.pending().to_vec(),
            pending: parts.send_buf.to_vec(),
            marked: parts.send_buf.marked(),
            deadlines,
            idle: if runs { idle } else { Time::NEVER },
            ending: parts.ending.fingerprint(),
            made_frames,
        }
    }
}
