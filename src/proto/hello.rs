//! The first bytes of a TLS ClientHello (RFC 8446, sections 4.1.2 and 5.1), on a port without TLS.

use crate::reason::CloseReason;

/// True if `bytes`, of which no frame could be made for this reason, begin with the headers of a
/// record and of the ClientHello in it.
///
/// A header that announces too long a frame may have been received before the rest of them.
pub(super) fn explains(bytes: &[u8], reason: CloseReason) -> bool {
    match (bytes, reason) {
        ([0x16, 0x03], CloseReason::FrameTooLarge) => true,
        (_, CloseReason::FrameTooLarge) => may_begin(bytes),
        _ => matches!(bytes, [0x16, 0x03, 0x00..=0x04, _, _, 0x01, ..]),
    }
}

/// True if `bytes` can be the beginning of a ClientHello.
///
/// Three bytes suffice, for a line may end within the first six.
pub(super) fn may_begin(bytes: &[u8]) -> bool {
    let bytes = bytes.get(..11).unwrap_or(bytes);
    match bytes {
        [0x16, 0x03, 0x00..=0x04, rest @ ..] => match rest {
            [_, _, 0x01, _, _, _, version @ ..] => match version {
                [0x03, 0x00..=0x04] | [0x03] | [] => true,
                [..] => false,
            },
            [_, _, kind, ..] => *kind == 0x01,
            [..] => true,
        },
        [..] => false,
    }
}
