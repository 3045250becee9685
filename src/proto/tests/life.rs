//! Each state, each transition, and the end of the stream in each state.

use super::*;

#[test]
fn the_legal_transitions_are_these_and_no_others() {
    use State::{Accepting, Closing, Handshaking, Open};
    let legal = [
        (Accepting, Handshaking),
        (Accepting, Open),
        (Accepting, Closing),
        (Handshaking, Open),
        (Handshaking, Closing),
        (Open, Handshaking),
        (Open, Closing),
    ];
    let all = [Accepting, Handshaking, Open, Closing];
    for from in all {
        for to in all {
            assert_eq!(
                from.leads_to(to),
                legal.contains(&(from, to)),
                "{from} -> {to}"
            );
        }
    }
}

#[test]
fn accepted_then_open_then_closing_then_gone() {
    let mut rig = Rig::accepted(&Framing::Packet2, limits(), None, Box::new(echo));
    assert_eq!(rig.machine.state(), State::Accepting);
    assert!(
        !rig.machine.wants_read(),
        "the service has not answered yet"
    );
    assert!(!rig.machine.was_open());
    rig.machine.handle_admitted(rig.now);
    assert_eq!(rig.machine.state(), State::Open);
    rig.turn();
    assert!(rig.machine.was_open());
    rig.receive(packet2("hello"));
    assert_eq!(rig.events(), [Seen::Opened, frame("hello")]);
    assert_eq!(rig.answers(), packet2("hello"));
    rig.close();
    assert_eq!(rig.machine.state(), State::Closing);
    assert_eq!(rig.finish(), CloseReason::Closed);
}

#[test]
fn refused_before_it_is_open() {
    let mut rig = Rig::accepted(&Framing::Packet2, limits(), None, Box::new(echo));
    rig.machine
        .close(Closed::new(CloseReason::Refused), rig.now, &mut rig.pool);
    assert_eq!(rig.machine.state(), State::Closing);
    rig.turn();
    assert_eq!(rig.finish(), CloseReason::Refused);
    assert_eq!(rig.events(), []);
    assert!(!rig.machine.was_open(), "on_close is not due");
}

/// The socket fails before the service answers.
#[test]
fn lost_before_it_is_open() {
    let mut rig = Rig::accepted(&Framing::Packet2, limits(), None, Box::new(echo));
    rig.machine.handle_eof(rig.now, &mut rig.pool);
    rig.turn();
    assert_eq!(rig.ended(), CloseReason::ClosedEarly);
    assert_eq!(rig.events(), []);
}

/// Killed between admission and `on_open`: it never opened for the handler.
#[test]
fn ended_before_on_open() {
    let mut rig = Rig::accepted(&Framing::Packet2, limits(), None, Box::new(echo));
    rig.machine.handle_admitted(rig.now);
    rig.machine
        .end(Closed::new(CloseReason::Killed), &mut rig.pool);
    rig.turn();
    assert_eq!(rig.ended(), CloseReason::Killed);
    assert_eq!(rig.events(), []);
    assert!(!rig.machine.was_open());
}

#[test]
fn the_end_between_frames_is_finished() {
    let mut rig = Rig::open(echo);
    rig.receive(packet2("last"));
    rig.receive_fin();
    assert_eq!(rig.events(), [frame("last"), Seen::Finished]);
    assert_eq!(rig.answers(), packet2("last"));
    assert_eq!(rig.ended(), CloseReason::Finished);
}

#[test]
fn the_end_at_once_is_finished() {
    let mut rig = Rig::open(echo);
    rig.receive_fin();
    assert_eq!(rig.events(), [Seen::Finished]);
    assert_eq!(rig.ended(), CloseReason::Finished);
}

/// The frames before are answered, the incomplete one is dropped, and the reason reports it.
#[test]
fn the_end_inside_a_frame_is_truncated() {
    for cut in [1, 2, 4] {
        let mut rig = Rig::open(echo);
        rig.receive([packet2("whole"), packet2("part")[..cut].to_vec()].concat());
        rig.receive_fin();
        assert_eq!(rig.events(), [frame("whole")], "on_finish is not called");
        assert_eq!(rig.answers(), packet2("whole"));
        assert_eq!(rig.ended(), CloseReason::Truncated);
    }
}

/// A last line without its end is no line, as in Erlang; here the reason reports it.
#[test]
fn an_unterminated_last_line_is_truncated() {
    let mut rig = Rig::open_with(&Framing::Line, limits(), echo);
    rig.receive("one\ntwo");
    rig.receive_fin();
    assert_eq!(rig.events(), [frame("one\n")]);
    assert_eq!(rig.ended(), CloseReason::Truncated);
}

#[test]
fn raw_bytes_are_never_truncated() {
    let mut rig = Rig::open_with(&Framing::Raw, limits(), echo);
    rig.receive("any");
    rig.receive_fin();
    assert_eq!(rig.events(), [frame("any"), Seen::Finished]);
    assert_eq!(rig.ended(), CloseReason::Finished);
}

/// A peer that has finished can be answered for as long as the handler wants.
#[test]
fn half_closed_peers_are_answered() {
    let mut rig = Rig::open(silent);
    rig.receive(packet2("question"));
    rig.receive_fin();
    assert_eq!(rig.events(), [frame("question"), Seen::Finished]);
    assert!(rig.is_open());
    assert!(!rig.machine.wants_read(), "there is nothing more to read");
    for word in ["one", "two"] {
        rig.act(|turn| turn.send(word.as_bytes()).expect("open"));
        assert_eq!(rig.answers(), packet2(word));
    }
    rig.close();
    assert_eq!(rig.ended(), CloseReason::Finished);
}

/// FIN arrives while the answers do not fit into the kernel's buffer.
#[test]
fn half_close_waits_for_a_slow_reader() {
    let mut rig = Rig::open(echo);
    rig.room = 0;
    rig.receive([packet2("one"), packet2("two")].concat());
    rig.receive_fin();
    assert!(rig.gone.is_none() && !rig.fin);
    for _ in 0..packet2("one").len() * 2 {
        rig.drain_to_peer(1);
    }
    assert_eq!(rig.answers(), [packet2("one"), packet2("two")].concat());
    assert_eq!(rig.ended(), CloseReason::Finished);
}

#[test]
fn finished_is_reported_once() {
    let mut rig = Rig::open(silent);
    rig.receive_fin();
    for _ in 0..3 {
        rig.turn();
        rig.pause();
        rig.resume();
    }
    assert_eq!(rig.events(), [Seen::Finished]);
}

/// RFC 8446 section 5.1: content type 22, version 3.x, then a handshake of type 1.
const CLIENT_HELLO: [u8; 11] = [0x16, 3, 1, 2, 0, 1, 0, 1, 0xFC, 3, 3];

#[test]
fn a_client_hello_on_a_plain_port_is_named() {
    // Announces a frame of 5635 bytes: ended by FIN, by the deadline, or at once by the maximum.
    let mut rig = Rig::open(echo);
    rig.receive(CLIENT_HELLO);
    rig.receive_fin();
    assert_eq!(rig.ended(), CloseReason::UnexpectedTls);

    let mut rig = Rig::open(echo);
    rig.receive(CLIENT_HELLO);
    rig.pass(secs(30));
    assert_eq!(rig.finish(), CloseReason::UnexpectedTls);

    for framing in [Framing::Packet2, Framing::Packet4, Framing::Line] {
        let small = ConnConfig {
            max_frame: Some(8),
            ..limits()
        };
        let mut rig = Rig::open_with(&framing, small, echo);
        rig.receive(CLIENT_HELLO);
        assert_eq!(rig.finish(), CloseReason::UnexpectedTls, "{framing:?}");
    }
}

/// A hello contains frames by chance: of 22 bytes for packet-1, and wherever a delimiter stands,
/// even in the record's length. None is delivered, in whatever pieces the hello comes.
#[test]
fn no_frame_of_a_client_hello_is_delivered() {
    let body = [&[0, 1, 0x0A, 3, 3][..], &[b'\n'; 600]].concat();
    for length in [0x0200_u16, 0x020A, 0x0A02] {
        let hello = [&[0x16, 3, 1][..], &length.to_be_bytes(), &[1], &body].concat();
        for framing in [
            Framing::Packet1,
            Framing::Packet2,
            Framing::Line,
            Framing::Delimited(0),
            Framing::Delimited(1),
            Framing::Delimited(2),
            Framing::Delimited(0xFF),
        ] {
            // Whole, in Miri.
            let pieces = [hello.len(), 1, 2, 3, 5, 6, 7, 11];
            for piece in pieces.into_iter().take(if cfg!(miri) { 1 } else { 8 }) {
                let mut rig = Rig::open_with(&framing, limits(), echo);
                for piece in hello.chunks(piece) {
                    rig.receive(piece);
                }
                rig.receive_fin();
                assert_eq!(rig.ended(), CloseReason::UnexpectedTls, "{framing:?}");
                assert_eq!(rig.pool.traffic.frames_in, 0, "{framing:?}");
            }
        }
    }
}

/// A binary protocol may begin in the same way.
#[test]
fn every_byte_is_input_for_raw() {
    let mut rig = Rig::open_with(&Framing::Raw, limits(), echo);
    rig.receive(CLIENT_HELLO);
    assert_eq!(rig.pool.traffic.frames_in, 1);
    // A packet-1 of 22 bytes, and a line, that are no hello.
    for (framing, bytes) in [
        (
            Framing::Packet1,
            [&[0x16, 3, 1, 2, 0, 2][..], &[0; 17]].concat(),
        ),
        (
            Framing::Packet1,
            [&[0x16, 3, 1, 2, 0, 1][..], &[9; 17]].concat(),
        ),
        (Framing::Packet1, [&[0x16, 3, 5][..], &[0; 20]].concat()),
        (Framing::Line, b"\x16\x03 line\n".to_vec()),
    ] {
        let mut rig = Rig::open_with(&framing, limits(), echo);
        rig.receive(bytes);
        assert_eq!(rig.pool.traffic.frames_in, 1, "{framing:?}");
    }
}

#[test]
fn after_a_frame_it_is_no_client_hello() {
    let mut rig = Rig::open(echo);
    rig.receive(packet2("frames are spoken here"));
    rig.receive(CLIENT_HELLO);
    rig.receive_fin();
    assert_eq!(rig.ended(), CloseReason::Truncated);
}

#[test]
fn traffic_is_counted_on_the_wire() {
    let mut rig = Rig::open(echo);
    rig.receive([packet2("ab"), packet2(""), packet2("c")[..2].to_vec()].concat());
    let expected = Traffic {
        bytes_in: 8,
        bytes_out: 6,
        frames_in: 2,
        frames_out: 2,
    };
    assert_eq!(rig.machine.traffic(), expected);
    assert_eq!(
        rig.pool.traffic, expected,
        "and for all connections together"
    );
}
