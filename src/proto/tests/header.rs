//! A PROXY header comes before everything else, in any pieces, and takes nothing of what comes behind it.

use super::*;

const V1: &[u8] = b"PROXY TCP4 192.0.2.1 198.51.100.2 50000 443\r\n";
const V2: &[u8] = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0C\xC0\0\x02\x01\xC6\x33\x64\x02\xC3\x50\x01\xBB";
const LOCAL: &[u8] = b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0";

fn waiting(required: bool, limits: Limits) -> Rig {
    let mut rig = Rig::accepted(&Framing::Packet2, limits, None, Box::new(echo));
    rig.machine.await_header(required);
    rig.turn();
    assert_eq!(rig.machine.state(), State::Accepting);
    rig
}

fn source(rig: &Rig) -> Option<String> {
    Some(rig.machine.proxy()?.source()?.to_string())
}

/// ranch: recv_v1_proxy_header_tcp_extra_data, recv_v2_proxy_header_tcp_extra_data, recv_v2_local_header_tcp_extra_data.
/// esockd: t_recv_pp_partial. faults: trap 4, P2, P3.
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
        assert_eq!(rig.events(), [Seen::Header, Seen::Opened, frame("one"), frame("two")]);
    }
}

/// faults P1, P4: what is not a header is none, and nothing of it reaches the framing.
#[test]
fn where_one_is_required_nothing_else_will_do() {
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
fn where_it_is_optional_other_bytes_are_the_first() {
    let mut rig = waiting(false, limits());
    rig.receive(b"\0\x03one");
    assert_eq!(rig.events(), [Seen::Header, Seen::Opened, frame("one")]);
    assert!(rig.machine.proxy().is_none());
    // A header that is begun must be right.
    let mut rig = waiting(false, limits());
    rig.receive(b"PROXY TCP5 ");
    rig.receive(b"\r\n");
    assert_eq!(rig.events(), []);
    rig.receive_fin();
    assert_eq!(rig.ended(), CloseReason::BadProxyHeader);
}

/// esockd: t_ppv2_connect_first_marker_timeout, _header_timeout, _proxy_info_timeout: one cut for each part. faults P6.
#[test]
fn whoever_stops_before_its_end_has_until_the_handshake_timeout() {
    for sent in [0, 1, 5, 12, 13, 16, 20, 27] {
        let mut rig = waiting(true, limits());
        rig.receive(&V2[..sent]);
        rig.pass(secs(9));
        assert_eq!(rig.machine.state(), State::Accepting, "after {sent} bytes");
        rig.pass(secs(1));
        assert_eq!(rig.ended(), CloseReason::HandshakeTimeout);
    }
}

/// esockd: t_recv_socket_error. A health check that connects and goes is nobody's fault.
#[test]
fn a_peer_that_goes_first_has_closed_early() {
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
fn a_refusal_says_its_last_words_in_the_clear() {
    let mut rig = waiting(true, limits());
    rig.machine
        .refuse(b"no", Closed::new(CloseReason::Refused), rig.now, &mut rig.pool);
    rig.turn();
    assert_eq!(rig.answers(), b"no");
    rig.receive_fin();
    assert_eq!(rig.ended(), CloseReason::Refused);
}

/// What somebody else changes meanwhile holds from the first frame on, and a part of a header is none.
#[test]
fn framing_that_changes_before_the_header_is_whole_leaves_nothing_to_do() {
    for change in [
        (|rig: &mut Rig| rig.machine.set_framing(&Framing::Packet1)) as fn(&mut Rig),
        |rig| rig.machine.set_max_frame(3),
    ] {
        let mut rig = waiting(true, limits());
        rig.receive(&V1[..10]);
        change(&mut rig);
        assert!(!rig.machine.has_events());
        rig.receive(&V1[10..]);
        assert_eq!(rig.events(), [Seen::Header, Seen::Opened]);
        assert!(!rig.machine.has_events(), "it would have a turn for ever");
    }
}
