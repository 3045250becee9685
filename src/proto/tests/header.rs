//! A PROXY header comes first, in any pieces, and takes none of the bytes behind it.

use super::*;

const V1: &[u8] = b"PROXY TCP4 192.0.2.1 198.51.100.2 50000 443\r\n";
const V2: &[u8] =
    b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0C\xC0\0\x02\x01\xC6\x33\x64\x02\xC3\x50\x01\xBB";
const LOCAL: &[u8] = b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0";

fn waiting(required: bool, limits: ConnConfig) -> Rig {
    let mut rig = Rig::accepted(&Framing::Packet2, limits, None, Box::new(echo));
    rig.machine.await_header(required);
    rig.turn();
    assert_eq!(rig.machine.state(), State::Accepting);
    rig
}

fn source(rig: &Rig) -> Option<String> {
    Some(rig.machine.proxy()?.tcp_source()?.to_string())
}

#[test]
fn every_cut_makes_the_same_header_and_the_same_frames() {
    for (header, from) in [
        (V1, Some("192.0.2.1:50000")),
        (V2, Some("192.0.2.1:50000")),
        (LOCAL, None),
        (b"PROXY UNKNOWN\r\n", None),
    ] {
        let bytes = [header, b"\0\x03one\0\x03two"].concat();
        for cut in 0..=bytes.len() {
            let (head, tail) = bytes.split_at(cut);
            let mut rig = waiting(true, limits());
            for piece in [head, tail] {
                if !piece.is_empty() {
                    rig.receive(piece);
                }
            }
            assert_eq!(
                rig.events(),
                [Seen::Header, Seen::Opened, frame("one"), frame("two")],
                "cut at {cut}"
            );
            assert_eq!(source(&rig).as_deref(), from);
            assert_eq!(rig.answers(), b"\0\x03one\0\x03two");
            assert_eq!(rig.machine.buffered(), 0);
        }
        let mut rig = waiting(true, limits());
        for byte in &bytes {
            rig.receive([*byte]);
        }
        assert_eq!(
            rig.events(),
            [Seen::Header, Seen::Opened, frame("one"), frame("two")]
        );
    }
}

/// Bytes that are no header never reach the framing.
#[test]
fn a_required_header_cannot_be_left_out() {
    for (input, words) in [
        (&b"\0\x03one"[..], "something else"),
        (b"PROXX ", "something else"),
        (b"PROXY TCP4 192.0.2.1\r\n", "two addresses"),
        (b"\r\n\r\n\0\r\nQUIT\n\x31\x11\0\x0C", "version"),
    ] {
        let mut rig = waiting(true, limits());
        rig.receive(input);
        assert_eq!(rig.events(), []);
        assert!(rig.answers().is_empty());
        assert!(rig.fin, "an orderly end");
        rig.receive_fin();
        assert_eq!(rig.gone, Some(false));
        let closed = rig.machine.take_closed();
        assert_eq!(closed.reason, CloseReason::BadProxyHeader);
        assert!(closed.to_string().contains(words), "{closed}");
    }
}

#[test]
fn without_an_optional_header_all_bytes_are_frames() {
    let mut rig = waiting(false, limits());
    rig.receive(b"\0\x03one");
    assert_eq!(rig.events(), [Seen::Header, Seen::Opened, frame("one")]);
    assert!(rig.machine.proxy().is_none());
    // A header that has begun must be valid.
    let mut rig = waiting(false, limits());
    rig.receive(b"PROXY TCP5 ");
    rig.receive(b"\r\n");
    assert_eq!(rig.events(), []);
    rig.receive_fin();
    assert_eq!(rig.ended(), CloseReason::BadProxyHeader);
}

/// The handshake timeout includes the header, wherever the peer stops.
#[test]
fn an_incomplete_header_ends_at_the_handshake_timeout() {
    for sent in [0, 1, 5, 12, 13, 16, 20, 27] {
        let mut rig = waiting(true, limits());
        rig.receive(&V2[..sent]);
        rig.pass(secs(9));
        assert_eq!(rig.machine.state(), State::Accepting, "after {sent} bytes");
        rig.pass(secs(1));
        assert_eq!(rig.ended(), CloseReason::HandshakeTimeout);
    }
}

/// A health check that connects and closes is no fault.
#[test]
fn a_peer_that_closes_first_has_closed_early() {
    let mut rig = waiting(true, limits());
    rig.receive_fin();
    assert_eq!(rig.ended(), CloseReason::ClosedEarly);
    let mut rig = waiting(true, limits());
    rig.receive(&V1[..10]);
    rig.receive_fin();
    assert_eq!(rig.ended(), CloseReason::BadProxyHeader);
    let mut rig = waiting(true, limits());
    rig.inbox.push_back(Input::Error(libc::ECONNRESET));
    rig.turn();
    assert_eq!(rig.ended(), CloseReason::Reset);
}

#[test]
fn a_refusal_sends_its_farewell_in_the_clear() {
    let mut rig = waiting(true, limits());
    let refused = Closed::new(CloseReason::Refused);
    let _ = rig.machine.refuse(b"no", refused, rig.now, &mut rig.pool);
    rig.turn();
    assert_eq!(rig.answers(), b"no");
    rig.receive_fin();
    assert_eq!(rig.ended(), CloseReason::Refused);
}

/// A changed framing applies from the first frame on, and part of a header is no frame.
#[test]
fn framing_that_changes_inside_the_header_causes_no_turn() {
    let mut rig = waiting(true, limits());
    rig.receive(&V1[..10]);
    rig.machine.set_framing(&Framing::Packet1);
    assert!(!rig.machine.has_events());
    rig.receive(&V1[10..]);
    assert_eq!(rig.events(), [Seen::Header, Seen::Opened]);
    assert!(!rig.machine.has_events(), "it would have a turn for ever");
}
