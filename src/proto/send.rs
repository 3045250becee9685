//! The sending side of a connection: backpressure, its end, and what became of it.

use super::framing::{Codec, EncodeError};
use super::state::SendError;

/// The state of the sending side. Pending output is in the
/// [`SendBuffer`](super::buffers::SendBuffer).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Send(u8);

impl Send {
    /// Pending output is above the high watermark, or not yet down to the low one.
    const CONGESTED: u8 = 1;
    /// The kernel refused a write for good: nothing can be sent, but received bytes can be read.
    const WRITE_FAILED: u8 = 2;
    /// The handler sends no more and goes on reading: FIN is due once everything is flushed.
    const FINISHING: u8 = 4;
    /// That FIN is sent.
    const FIN_SENT: u8 = 8;

    /// All flags, for the one test of [`Status::only_frames`](super::status::Status::only_frames).
    #[inline]
    pub(super) fn bits(self) -> u8 {
        self.0
    }

    pub(super) fn congest(&mut self) {
        self.0 |= Self::CONGESTED;
    }

    pub(super) fn relieve(&mut self) {
        self.0 &= !Self::CONGESTED;
    }

    #[inline]
    pub(super) fn is_congested(self) -> bool {
        self.0 & Self::CONGESTED != 0
    }

    /// A write failed for good: nothing is pending any more.
    pub(super) fn fail(&mut self) {
        self.0 |= Self::WRITE_FAILED;
        self.relieve();
    }

    pub(super) fn has_failed(self) -> bool {
        self.0 & Self::WRITE_FAILED != 0
    }

    pub(super) fn finish(&mut self) {
        self.0 |= Self::FINISHING;
    }

    pub(super) fn is_finishing(self) -> bool {
        self.0 & Self::FINISHING != 0
    }

    pub(super) fn set_fin_sent(&mut self) {
        self.0 |= Self::FIN_SENT;
    }

    pub(super) fn has_sent_fin(self) -> bool {
        self.0 & Self::FIN_SENT != 0
    }
}

/// Appends one frame with `payload` to `out`, or leaves `out` as it was.
#[inline(always)]
pub(super) fn append_frame(
    codec: &mut Codec,
    payload: &[u8],
    out: &mut Vec<u8>,
) -> Result<(), SendError> {
    codec
        .encode(payload, out)
        .map_err(|error| error_of(error, payload))
}

#[cold]
fn error_of(error: EncodeError, payload: &[u8]) -> SendError {
    match error {
        EncodeError::TooLarge { max } => SendError::FrameTooLarge {
            length: payload.len(),
            max,
        },
        EncodeError::Refused(error) => SendError::Refused(error),
    }
}
