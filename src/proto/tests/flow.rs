//! Watermarks, the hard limit, pause and resume, and a framing that changes on the way.

use std::io::Write;

use super::*;

fn frames(words: &[&str]) -> Vec<u8> {
    words.iter().flat_map(packet2).collect()
}

/// Reading stops before the next frame, and resumes at the low watermark.
#[test]
fn above_the_high_mark_no_frame_is_taken() {
    let mut rig = Rig::open(echo);
    rig.room = 0;
    let forty = [b'x'; 40];
    rig.receive(
        [
            packet2(forty),
            packet2(forty),
            packet2(forty),
            packet2("after"),
        ]
        .concat(),
    );
    assert_eq!(rig.events().len(), 3, "three answers reach the mark");
    assert_eq!(rig.machine.queued(), 3 * 42);
    assert!(!rig.machine.wants_read());
    // One byte above the low watermark: not yet.
    rig.drain_to_peer(3 * 42 - 11);
    assert_eq!(rig.events(), []);
    assert!(!rig.machine.wants_read());
    rig.drain_to_peer(1);
    assert_eq!(
        rig.events(),
        [Seen::Writable, frame("after")],
        "without another read"
    );
    assert!(rig.machine.wants_read());
    rig.drain_to_peer(usize::MAX / 2);
    assert_eq!(rig.events(), [], "writable is reported once");
    assert_eq!(rig.answers().len(), 3 * 42 + 7);
}

#[test]
fn below_the_high_mark_there_is_no_event() {
    let mut rig = Rig::open(echo);
    rig.room = 0;
    rig.receive(packet2([b'x'; 97]));
    assert!(rig.machine.wants_read(), "99 bytes wait");
    rig.drain_to_peer(1000);
    assert_eq!(rig.events(), [frame([b'x'; 97])]);
    rig.room = 0;
    rig.receive(packet2([b'x'; 98]));
    assert!(!rig.machine.wants_read(), "100 bytes are the mark");
}

#[test]
fn writable_follows_each_congestion() {
    let mut rig = Rig::open(silent);
    for _ in 0..3 {
        rig.room = 0;
        rig.act(|turn| turn.send(&[1; 150]).expect("room"));
        rig.drain_to_peer(1000);
        assert_eq!(rig.events(), [Seen::Writable]);
    }
}

/// At the hard limit `send` fails and queues nothing: at most the limit and one frame is pending.
#[test]
fn the_hard_limit() {
    let mut rig = Rig::open(silent);
    rig.room = 0;
    rig.act(|turn| {
        turn.send(&[1; 197]).expect("below the limit");
        turn.send(&[2; 1000]).expect("199 of 200: one frame more");
        let queued = turn.machine.queued();
        assert_eq!(queued, 199 + 1002);
        match turn.send(b"") {
            Err(SendError::Full {
                queued: waits,
                limit,
            }) => assert_eq!((waits, limit), (queued, 200)),
            other => panic!("{other:?}"),
        }
        assert_eq!(turn.machine.queued(), queued, "nothing was queued");
    });
    assert_eq!(rig.machine.traffic().frames_out, 2);
    rig.drain_to_peer(5000);
    assert_eq!(
        rig.answers(),
        [packet2([1; 197]), packet2([2; 1000])].concat()
    );
    rig.act(|turn| turn.send(b"again").expect("room again"));
}

/// A limit below the high watermark still leads to `on_writable`.
#[test]
fn full_below_the_high_mark_leads_to_writable() {
    let small = ConnConfig {
        output_limit: 5,
        ..limits()
    };
    let mut rig = Rig::open_with(&Framing::Packet2, small, silent);
    rig.room = 0;
    rig.act(|turn| {
        turn.send(b"hello").expect("empty");
        assert!(matches!(turn.send(b""), Err(SendError::Full { .. })));
    });
    rig.drain_to_peer(100);
    assert_eq!(rig.events(), [Seen::Writable]);
}

#[test]
fn a_frame_too_long_to_send_queues_nothing() {
    let mut rig = Rig::open_with(&Framing::Packet1, limits(), silent);
    rig.act(|turn| {
        match turn.send(&[0; 256]) {
            Err(SendError::FrameTooLarge { length, max }) => assert_eq!((length, max), (256, 255)),
            other => panic!("{other:?}"),
        }
        assert_eq!(turn.machine.queued(), 0);
    });
    assert!(rig.is_open());
    assert_eq!(rig.answers(), [0; 0]);
    assert_eq!(rig.machine.traffic().frames_out, 0);
}

/// Each resume delivers the next buffered frame, without a read.
#[test]
fn one_frame_for_each_resume() {
    let mut rig = Rig::open(one_at_a_time);
    rig.receive(frames(&["one", "two", "", "four"]));
    assert_eq!(rig.events(), [frame("one")]);
    for word in ["two", "", "four"] {
        assert!(!rig.machine.wants_read());
        rig.resume();
        assert_eq!(rig.events(), [frame(word)]);
    }
    rig.receive(frames(&["five"]));
    assert_eq!(rig.events(), [], "paused: it stays in the kernel");
    rig.resume();
    assert_eq!(rig.events(), [frame("five")]);
}

#[test]
fn a_frame_cut_in_two_while_one_at_a_time() {
    let mut rig = Rig::open(one_at_a_time);
    rig.receive([frames(&["one"]), packet2("two")[..3].to_vec()].concat());
    assert_eq!(rig.events(), [frame("one")]);
    rig.resume();
    assert_eq!(rig.events(), []);
    rig.receive(&packet2("two")[3..]);
    assert_eq!(rig.events(), [frame("two")]);
}

/// A resume from another callback than `on_frame`: buffered frames are delivered once.
#[test]
fn resumed_by_a_timer() {
    let mut rig = Rig::open(|turn, event| {
        match event {
            Seen::Frame(_) => {
                turn.pause();
                turn.set_timer(1, secs(1));
            }
            Seen::Timer(_) => turn.resume(),
            _ => {}
        }
        Ok(())
    });
    rig.receive(frames(&["one", "two", "three"]));
    rig.receive_fin();
    assert_eq!(rig.events(), [frame("one")]);
    rig.pass(secs(1));
    assert_eq!(rig.events(), [Seen::Timer(1), frame("two")]);
    rig.pass(secs(1));
    assert_eq!(rig.events(), [Seen::Timer(1), frame("three")]);
    rig.pass(secs(1));
    assert_eq!(rig.events(), [Seen::Timer(1), Seen::Finished]);
}

#[test]
fn paused_in_on_open() {
    let mut rig = Rig::accepted(
        &Framing::Packet2,
        limits(),
        None,
        Box::new(|turn: &mut Turn<'_>, event: &Seen| {
            if *event == Seen::Opened {
                turn.pause();
            }
            Ok(())
        }),
    );
    rig.machine.handle_admitted(rig.now);
    rig.receive(frames(&["waits"]));
    assert_eq!(rig.events(), [Seen::Opened]);
    rig.resume();
    assert_eq!(rig.events(), [frame("waits")]);
}

#[test]
fn both_the_handler_and_the_watermark_must_agree() {
    let mut rig = Rig::open(silent);
    rig.room = 0;
    rig.act(|turn| {
        turn.pause();
        turn.send(&[0; 150]).expect("room");
    });
    rig.receive(packet2("x"));
    rig.resume();
    assert_eq!(rig.events(), [], "still congested");
    rig.pause();
    rig.drain_to_peer(1000);
    assert_eq!(rig.events(), [Seen::Writable], "still paused");
    rig.resume();
    assert_eq!(rig.events(), [frame("x")]);
}

/// From `on_frame`: the bytes behind the frame are decoded anew.
#[test]
fn set_framing_recuts_later_input() {
    let mut rig = Rig::open_with(&Framing::Line, limits(), |turn, event| {
        match event {
            Seen::Frame(line) if line == b"packet\n" => {
                drop(turn.machine.set_framing(&Framing::Packet2))
            }
            Seen::Frame(line) if line == b"line" => drop(turn.machine.set_framing(&Framing::Line)),
            _ => {}
        }
        Ok(())
    });
    rig.receive(
        [
            b"hello\npacket\n".to_vec(),
            packet2("a\nb"),
            packet2("line"),
            b"end\n".to_vec(),
        ]
        .concat(),
    );
    let expected = ["hello\n", "packet\n", "a\nb", "line", "end\n"].map(frame);
    assert_eq!(rig.events(), expected);
    assert_eq!(
        rig.machine.max_frame(),
        64 * 1024,
        "the new framing's default"
    );
}

/// From outside, with part of a frame buffered: it is decoded anew at once.
#[test]
fn set_framing_recuts_buffered_input() {
    let mut rig = Rig::open_with(&Framing::Line, limits(), silent);
    rig.receive(packet2("held"));
    assert_eq!(rig.events(), []);
    rig.act(|turn| drop(turn.machine.set_framing(&Framing::Packet2)));
    assert_eq!(rig.events(), [frame("held")]);
    // And from a timer, which precedes the frames.
    let mut rig = Rig::open_with(&Framing::Line, limits(), |turn, event| {
        if let Seen::Timer(_) = event {
            turn.machine.set_framing(&Framing::Packet2);
        }
        Ok(())
    });
    rig.act(|turn| turn.set_timer(1, secs(1)));
    rig.receive(packet2("held"));
    rig.pass(secs(1));
    assert_eq!(rig.events(), [Seen::Timer(1), frame("held")]);
}

#[test]
fn set_framing_while_paused() {
    let mut rig = Rig::open_with(&Framing::Line, limits(), one_at_a_time);
    rig.receive([b"first\n".to_vec(), packet2("sec\nond"), b"tail".to_vec()].concat());
    assert_eq!(rig.events(), [frame("first\n")]);
    rig.act(|turn| drop(turn.machine.set_framing(&Framing::Packet2)));
    assert_eq!(rig.events(), [], "paused is paused");
    rig.resume();
    assert_eq!(rig.events(), [frame("sec\nond")]);
    rig.act(|turn| drop(turn.machine.set_framing(&Framing::Raw)));
    rig.resume();
    assert_eq!(rig.events(), [frame("tail")]);
}

/// A pause keeps bytes that are more than the new framing would let in. None is dropped, and no
/// read adds to them before they are decoded.
#[test]
fn set_framing_keeps_what_the_former_framing_let_in() {
    let behind = crate::testing::rounds(50_000);
    let mut rig = Rig::open_with(&Framing::Packet4, no_limits(), |turn, event| {
        if *event == frame([b'x'; 30_000]) {
            turn.machine.set_framing(&Framing::Packet1);
            turn.pause();
        }
        Ok(())
    });
    rig.receive(
        [
            &30_000_u32.to_be_bytes()[..],
            &[b'x'; 30_000],
            &vec![0; behind],
        ]
        .concat(),
    );
    assert_eq!(rig.events().len(), 1);
    assert!(!rig.machine.wants_read());
    assert_eq!(rig.machine.broken_invariant(1_000, true), None);
    rig.resume();
    assert_eq!(rig.events(), vec![frame(""); behind]);
    assert!(rig.machine.wants_read());
    assert_eq!(rig.machine.broken_invariant(1_000, true), None);
}

/// Answers before the change are in the old framing, those after in the new one.
#[test]
fn set_framing_applies_both_ways() {
    let mut rig = Rig::open_with(&Framing::Packet1, limits(), |turn, event| {
        if let Seen::Frame(_) = event {
            turn.send(b"old")?;
            turn.machine.set_framing(&Framing::Packet4);
            turn.send(b"new")?;
        }
        Ok(())
    });
    rig.receive([1, b'x']);
    assert_eq!(rig.answers(), b"\x03old\0\0\0\x03new");
}

/// Buffered input may be too long for the new framing.
#[test]
fn set_framing_limits_buffered_input() {
    let small = ConnConfig {
        max_frame: Some(4),
        ..limits()
    };
    let mut rig = Rig::open_with(&Framing::Packet2, small, silent);
    rig.receive([0]);
    rig.act(|turn| drop(turn.machine.set_framing(&Framing::Line)));
    assert!(rig.is_open());
    rig.receive("abcd");
    assert_eq!(
        rig.finish(),
        CloseReason::FrameTooLarge,
        "the listener's maximum stays"
    );
}

/// Good frames, then a bad one: the answers are sent, then the connection ends.
#[test]
fn the_answers_to_good_frames_arrive_before_the_end() {
    let small = ConnConfig {
        max_frame: Some(4),
        ..limits()
    };
    let mut rig = Rig::open_with(&Framing::Packet2, small, echo);
    rig.receive([frames(&["good", ""]), vec![0, 5]].concat());
    assert_eq!(rig.answers(), frames(&["good", ""]));
    assert_eq!(rig.finish(), CloseReason::FrameTooLarge);
}

#[test]
fn many_frames_in_one_read() {
    let mut rig = Rig::open_with(&Framing::Packet1, no_limits(), echo);
    let count = crate::testing::rounds(20_000);
    rig.receive(vec![0; count]);
    assert_eq!(rig.events(), vec![frame(""); count]);
    assert_eq!(rig.answers(), vec![0; count]);
}

/// Netstrings, as a framing of the user's.
struct Netstring;

impl Framer for Netstring {
    fn decode(&mut self, _: &[u8]) -> Result<Decoded, FrameError> {
        Ok(Decoded::More)
    }

    fn header(&mut self, length: usize, out: &mut FrameBuf<'_>) -> Result<(), FrameError> {
        match length {
            1000.. => Err(FrameError::new("too long")),
            length => write!(out, "{length}:").map_err(FrameError::new),
        }
    }

    fn trailer(&mut self, out: &mut FrameBuf<'_>) {
        out.put(b",");
    }
}

/// As [`Netstring`], and each byte is inverted.
struct Inverted(Netstring);

impl Framer for Inverted {
    fn decode(&mut self, _: &[u8]) -> Result<Decoded, FrameError> {
        Ok(Decoded::More)
    }

    fn pack(&mut self, payload: &[&[u8]], out: &mut FrameBuf<'_>) -> Result<bool, FrameError> {
        for byte in payload.concat() {
            out.put(&[!byte]);
        }
        Ok(true)
    }

    fn header(&mut self, length: usize, out: &mut FrameBuf<'_>) -> Result<(), FrameError> {
        self.0.header(length, out)
    }

    fn trailer(&mut self, out: &mut FrameBuf<'_>) {
        self.0.trailer(out);
    }
}

fn framings() -> [Framing; 7] {
    [
        Framing::Raw,
        Framing::Packet1,
        Framing::Packet2,
        Framing::Packet4,
        Framing::Line,
        Framing::custom(|| Netstring),
        Framing::custom(|| Inverted(Netstring)),
    ]
}

fn encoded(framing: &Framing, payload: &[u8]) -> Vec<u8> {
    let mut wire = Vec::new();
    Codec::new(framing, Some(100))
        .encode(payload, &mut wire)
        .expect("short");
    wire
}

/// Each kind of payload, and parts of one. The bytes are 0, 1, 2 and so on.
const KINDS: usize = 4;

fn of_kind(kind: usize, payload: &[u8]) -> Vec<Chunk<'_>> {
    let (front, back) = payload.split_at(payload.len() / 3);
    match kind {
        0 => vec![Chunk::Borrowed(payload)],
        1 => vec![Chunk::Owned(payload.to_vec())],
        2 => vec![Chunk::Shared(payload.into())],
        _ => vec![
            Chunk::Borrowed(&front[..2]),
            Chunk::Shared(front[2..].into()),
            Chunk::Borrowed(&[]),
            Chunk::Owned(back.to_vec()),
        ],
    }
}

/// A large frame is written without a copy: each byte leaves once and in order, wherever the kernel
/// cuts it.
#[test]
fn a_frame_written_through_is_cut_anywhere() {
    let payload: Vec<u8> = (0..60).collect();
    for framing in framings() {
        let whole = encoded(&framing, &payload);
        let cuts = (0..=whole.len()).step_by(if cfg!(miri) { 20 } else { 1 });
        for (kind, count) in (0..KINDS).flat_map(|kind| cuts.clone().map(move |at| (kind, at))) {
            let mut rig = Rig::open_with(&framing, limits(), silent);
            let mut chunks = of_kind(kind, &payload);
            assert!(rig.machine.can_write_through());
            let frame = rig.machine.frame(&mut chunks, 8, rig.now, &mut rig.pool);
            let mut frame = frame.expect("short");
            let in_pieces = |frame: &Frame<'_, '_>| frame.pieces().collect::<Vec<_>>().concat();
            assert!(frame.pieces().count() <= FRAME_PIECES);
            assert_eq!(in_pieces(&frame), whole, "{framing:?}");
            rig.sent.extend_from_slice(&whole[..count]);
            rig.machine.count_written(count, &mut rig.pool);
            frame.taken += count;
            assert_eq!(in_pieces(&frame), whole[count..], "{framing:?}");
            rig.machine.queue_frame(frame, rig.now, &mut rig.pool);
            assert_eq!(rig.machine.queued(), whole.len() - count);
            assert_eq!(
                rig.machine.can_write_through(),
                count == whole.len(),
                "in order"
            );
            rig.act(|turn| turn.send(b"behind").expect("room"));
            let expected = [whole.clone(), encoded(&framing, b"behind")].concat();
            assert_eq!(rig.answers(), expected, "{framing:?} at {count}");
            let traffic = rig.machine.traffic();
            assert_eq!(
                (traffic.frames_out, traffic.bytes_out),
                (2, expected.len() as u64)
            );
            assert_eq!(rig.pool.shared.bytes(), 0);
        }
    }
}

/// Not behind pending output and not in a closing connection; and a full kernel congests.
#[test]
fn a_frame_is_written_through_only_in_order() {
    let mut rig = Rig::open(silent);
    let too_long = &mut [Chunk::Borrowed(&[0; 0x1_0000])];
    let refused = rig.machine.frame(too_long, 8, rig.now, &mut rig.pool);
    assert!(
        matches!(
            refused,
            Err(SendError::FrameTooLarge {
                length: 0x1_0000,
                max: 0xFFFF
            })
        ),
        "too long for its header"
    );
    assert!(rig.machine.can_write_through());
    rig.room = 0;
    let payload = &mut [Chunk::Borrowed(&[1; 200])];
    let frame = rig.machine.frame(payload, 8, rig.now, &mut rig.pool);
    let frame = frame.expect("open");
    rig.machine.queue_frame(frame, rig.now, &mut rig.pool);
    assert!(rig.machine.is_congested() && !rig.machine.wants_read());
    rig.drain_to_peer(1000);
    assert_eq!(rig.events(), [Seen::Writable]);
    rig.close();
    assert!(!rig.machine.can_write_through());
}

/// A frame is written in place, behind pending output; after an error or a panic nothing is left.
#[test]
fn a_frame_is_written_in_place() {
    for framing in framings() {
        let mut rig = Rig::open_with(&framing, limits(), silent);
        rig.room = 0;
        let write = |rig: &mut Rig, write: &dyn Fn(&mut FrameBuf<'_>) -> Result<(), FrameError>| {
            rig.machine.send_with(write, rig.now, &mut rig.pool)
        };
        let mut sent = Vec::new();
        for words in ["one", "", "three"] {
            let length = write(&mut rig, &|out| {
                write!(out, "{words}").map_err(FrameError::new)
            });
            assert_eq!(length.expect("room"), words.len());
            sent.extend(encoded(&framing, words.as_bytes()));
            let refused = write(&mut rig, &|out| {
                out.put(b"half");
                Err(FrameError::new("as planned"))
            });
            assert!(matches!(refused, Err(SendError::Refused(_))));
            let panicked = crate::catch::catch(|| {
                write(&mut rig, &|out| {
                    out.put(b"half");
                    panic!("as planned")
                })
            });
            assert!(panicked.is_err());
            assert_eq!(rig.machine.queued(), sent.len(), "{framing:?}");
        }
        if let Framing::Packet1 = framing {
            let refused = write(&mut rig, &|out| {
                out.put(&[0; 256]);
                Ok(())
            });
            assert!(matches!(
                refused,
                Err(SendError::FrameTooLarge {
                    length: 256,
                    max: 255
                })
            ));
        }
        rig.room = usize::MAX;
        rig.act(|_| ());
        assert_eq!(rig.answers(), sent, "{framing:?}");
        assert_eq!(rig.machine.traffic().frames_out, 3);
    }
}
