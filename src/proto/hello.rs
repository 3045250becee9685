//! The first bytes of a TLS ClientHello (RFC 8446, sections 4.1.2 and 5.1), on a port without TLS.

/// True if the header of the record, and of the message in it, are there.
pub(super) fn begins(bytes: &[u8]) -> bool {
    matches!(bytes, [0x16, 0x03, 0x00..=0x04, _, _, 0x01, ..])
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
