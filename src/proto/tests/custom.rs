//! A framing of one's own in a connection: well-behaved, misbehaving, and panicking.

use std::error::Error as _;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::{Arc, Mutex};

use super::*;
use crate::proto::framing::Codec;
use crate::proto::send_queue::Held;

type Decode = fn(&[u8]) -> Result<Decoded, FrameError>;

/// A framer that decodes by a function.
struct Scripted(Decode);

impl Framer for Scripted {
    fn decode(&mut self, input: &[u8]) -> Result<Decoded, FrameError> {
        (self.0)(input)
    }

    fn pack(&mut self, payload: &[&[u8]], out: &mut FrameBuf<'_>) -> Result<bool, FrameError> {
        out.put(b"left behind");
        match &payload.concat()[..] {
            b"refuse" => Err(FrameError::new("a word that is not said")),
            b"panic" => panic!("the framer's own fault"),
            _ => Ok(false),
        }
    }

    fn header(&mut self, _: usize, out: &mut FrameBuf<'_>) -> Result<(), FrameError> {
        out.put(b"<");
        Ok(())
    }

    fn trailer(&mut self, out: &mut FrameBuf<'_>) {
        out.put(b">");
    }
}

fn scripted(decode: Decode) -> Framing {
    Framing::custom(move || Scripted(decode))
}

/// Decodes `<...>`, and nothing else.
fn brackets(input: &[u8]) -> Result<Decoded, FrameError> {
    if input.first() != Some(&b'<') {
        return Err(FrameError::new("no bracket"));
    }
    Ok(match input.iter().position(|&byte| byte == b'>') {
        Some(end) => Decoded::Frame {
            payload: 1..end,
            consumed: end + 1,
        },
        None => Decoded::More,
    })
}

#[test]
fn frames_both_ways() {
    let mut rig = Rig::open_with(&scripted(brackets), limits(), echo);
    rig.receive("<one><><th");
    rig.receive("ree>");
    assert_eq!(rig.events(), ["one", "", "three"].map(frame));
    assert_eq!(rig.answers(), b"<one><><three>");
}

/// What it wants is joined first, and all that has come once that is not enough.
#[test]
fn a_framer_that_wants_more_than_its_frame() {
    fn greedy(input: &[u8]) -> Result<Decoded, FrameError> {
        Ok(match input.len() {
            ..10 => Decoded::Need(10),
            _ => Decoded::Frame {
                payload: 0..4,
                consumed: 4,
            },
        })
    }
    let wire: Vec<u8> = (0..30).collect();
    let frames: Vec<_> = wire.chunks(4).take(6).map(frame).collect();
    for split in 1..30 {
        let mut rig = Rig::open_with(&scripted(greedy), limits(), silent);
        rig.receive(&wire[..split]);
        rig.receive(&wire[split..]);
        assert_eq!(rig.events(), frames, "split at {split}");
        assert_eq!(rig.machine.buffered(), 6, "split at {split}");
    }
}

#[test]
fn its_error_is_the_cause() {
    let mut rig = Rig::open_with(&scripted(brackets), limits(), echo);
    rig.receive("<good>bad");
    assert_eq!(rig.answers(), b"<good>");
    rig.receive_fin();
    let closed = rig.machine.take_closed();
    assert_eq!(closed.reason, CloseReason::BadFrame);
    let error = closed.error.expect("the error");
    assert_eq!(error.to_string(), "no bracket");
    let refusal = error.downcast::<FrameError>().expect("the framer's");
    assert_eq!(refusal.get_ref().to_string(), "no bracket");
}

#[test]
fn impossible_frames_close_the_connection() {
    let nonsense: [Decode; 5] = [
        |_| {
            Ok(Decoded::Frame {
                payload: 0..0,
                consumed: 0,
            })
        },
        |input| {
            Ok(Decoded::Frame {
                payload: 0..1,
                consumed: input.len() + 1,
            })
        },
        |input| {
            Ok(Decoded::Frame {
                payload: 0..input.len() + 1,
                consumed: input.len(),
            })
        },
        |_| {
            Ok(Decoded::Frame {
                payload: 2..3,
                consumed: 1,
            })
        },
        #[allow(clippy::reversed_empty_ranges)]
        |_| {
            Ok(Decoded::Frame {
                payload: 2..1,
                consumed: 3,
            })
        },
    ];
    for (at, decode) in nonsense.into_iter().enumerate() {
        let mut rig = Rig::open_with(&scripted(decode), limits(), echo);
        rig.receive("abcde");
        assert_eq!(rig.events(), [], "case {at}");
        assert_eq!(rig.finish(), CloseReason::BadFrame, "case {at}");
    }
}

#[test]
fn needs_are_accepted_up_to_the_maximum() {
    for need in [usize::MAX, 64 * 1024 + 17] {
        let framing = Framing::custom(move || Greedy(need));
        let mut rig = Rig::open_with(&framing, limits(), echo);
        rig.receive("a");
        assert_eq!(rig.finish(), CloseReason::FrameTooLarge);
    }
    // More than the input, less than the input, nothing: all equal "more".
    for need in [64 * 1024 + 16, 2, 1, 0] {
        let framing = Framing::custom(move || Greedy(need));
        let mut rig = Rig::open_with(&framing, limits(), echo);
        rig.receive("a");
        rig.receive("b");
        assert!(rig.is_open());
        rig.pass(secs(30));
        assert_eq!(rig.finish(), CloseReason::FrameTimeout);
    }
}

struct Greedy(usize);

impl Framer for Greedy {
    fn decode(&mut self, _: &[u8]) -> Result<Decoded, FrameError> {
        Ok(Decoded::Need(self.0))
    }
}

#[test]
fn always_more_is_bounded() {
    let small = ConnConfig {
        max_frame: Some(100),
        ..limits()
    };
    let mut rig = Rig::open_with(&scripted(|_| Ok(Decoded::More)), small, echo);
    for _ in 0..116 {
        rig.receive("a");
        assert!(rig.is_open());
    }
    rig.receive("a");
    assert_eq!(rig.finish(), CloseReason::FrameTooLarge);
}

#[test]
fn a_payload_above_the_maximum_is_too_large() {
    let small = ConnConfig {
        max_frame: Some(3),
        ..limits()
    };
    let mut rig = Rig::open_with(&scripted(brackets), small, echo);
    rig.receive("<abc><abcd>");
    assert_eq!(rig.events(), [frame("abc")]);
    assert_eq!(rig.finish(), CloseReason::FrameTooLarge);
}

/// Input that arrives at once is limited like input that arrives in pieces.
#[test]
fn the_envelope_is_bounded_however_it_is_cut() {
    // The payload is the last byte before '>', the rest is padding.
    let framing = scripted(|input| {
        Ok(match input.iter().position(|&byte| byte == b'>') {
            Some(end) => Decoded::Frame {
                payload: end - 1..end,
                consumed: end + 1,
            },
            None => Decoded::More,
        })
    });
    let wire = [vec![b'.'; 200], b"x>".to_vec()].concat();
    for piece in [1, 202] {
        let small = ConnConfig {
            max_frame: Some(10),
            ..limits()
        };
        let mut rig = Rig::open_with(&framing, small, echo);
        for bytes in wire.chunks(piece) {
            rig.receive(bytes);
        }
        assert_eq!(rig.events(), [], "in pieces of {piece}");
        assert_eq!(rig.finish(), CloseReason::FrameTooLarge);
    }
}

#[test]
fn a_refused_payload_queues_nothing() {
    let mut rig = Rig::open_with(&scripted(brackets), limits(), silent);
    rig.act(|turn| {
        turn.send(b"one").expect("good");
        match turn.send(b"refuse") {
            Err(SendError::Refused(error)) => {
                assert_eq!(error.to_string(), "a word that is not said")
            }
            other => panic!("{other:?}"),
        }
        turn.send(b"two").expect("good");
    });
    assert_eq!(rig.answers(), b"<one><two>");
    assert_eq!(rig.machine.traffic().frames_out, 2);
}

#[test]
fn the_framers_error_is_the_source_of_the_refusal() {
    let mut rig = Rig::open_with(&scripted(brackets), limits(), silent);
    let refused = rig.machine.send(b"refuse", rig.now, &mut rig.pool);
    let refused = refused.expect_err("a word that is not said");
    let source = refused.source().expect("the framer's error");
    assert!(source.is::<FrameError>(), "{source}");
    assert!(SendError::Closed.source().is_none());
}

/// Half a frame on the wire would make all later frames unreadable.
#[test]
fn a_panic_in_encode_leaves_no_half_frame() {
    let mut rig = Rig::open_with(&scripted(brackets), limits(), silent);
    rig.act(|turn| {
        turn.send(b"one").expect("good");
        let panic = catch_unwind(AssertUnwindSafe(|| turn.send(b"panic")));
        assert!(panic.is_err());
        turn.send(b"two").expect("good");
    });
    assert_eq!(rig.answers(), b"<one><two>");
}

/// A framer is made for each connection, and its state is not shared.
#[test]
fn one_framer_for_each_connection() {
    /// The length of each payload is the number of its frame.
    struct Growing(usize);
    impl Framer for Growing {
        fn decode(&mut self, input: &[u8]) -> Result<Decoded, FrameError> {
            if input.len() < self.0 {
                return Ok(Decoded::Need(self.0));
            }
            self.0 += 1;
            Ok(Decoded::Frame {
                payload: 0..self.0 - 1,
                consumed: self.0 - 1,
            })
        }
    }
    let framing = Framing::custom(|| Growing(1));
    for _ in 0..2 {
        let mut rig = Rig::open_with(&framing, limits(), silent);
        for byte in b"abbccc" {
            rig.receive([*byte]);
        }
        assert_eq!(rig.events(), ["a", "bb", "ccc"].map(frame));
    }
}

/// SLIP (RFC 1055): frames end with 0xC0, escaped by 0xDB.
struct Slip;

impl Framer for Slip {
    fn decode(&mut self, input: &[u8]) -> Result<Decoded, FrameError> {
        Ok(match input.iter().position(|&byte| byte == 0xC0) {
            Some(end) => Decoded::Packed {
                payload: 0..end,
                consumed: end + 1,
            },
            None => Decoded::More,
        })
    }

    fn unpack(&mut self, payload: &[u8], out: &mut FrameBuf<'_>) -> Result<(), FrameError> {
        let mut bytes = payload.iter();
        while let Some(&byte) = bytes.next() {
            out.put(&[match byte {
                0xDB => match bytes.next() {
                    Some(0xDC) => 0xC0,
                    Some(0xDD) => 0xDB,
                    _ => return Err(FrameError::new("a bad escape")),
                },
                byte => byte,
            }]);
        }
        Ok(())
    }

    fn pack(&mut self, payload: &[&[u8]], out: &mut FrameBuf<'_>) -> Result<bool, FrameError> {
        for byte in payload.concat() {
            match byte {
                0xC0 => out.put(&[0xDB, 0xDC]),
                0xDB => out.put(&[0xDB, 0xDD]),
                byte => out.put(&[byte]),
            }
        }
        Ok(true)
    }

    fn trailer(&mut self, out: &mut FrameBuf<'_>) {
        out.put(&[0xC0]);
    }
}

#[test]
fn a_transformed_frame_is_the_same_in_every_cut() {
    let payloads = [&b"plain"[..], b"", &[0xC0, 1, 0xDB], &[0xDB; 20]];
    let mut wire = Vec::new();
    for payload in payloads {
        let mut codec = Codec::new(&Framing::custom(|| Slip), None);
        codec.encode(payload, &mut wire).expect("it encodes");
    }
    for piece in 1..=wire.len() {
        let mut rig = Rig::open_with(&Framing::custom(|| Slip), limits(), echo);
        for bytes in wire.chunks(piece) {
            rig.receive(bytes);
        }
        assert_eq!(rig.events(), payloads.map(frame), "in pieces of {piece}");
        assert_eq!(rig.answers(), wire);
        assert!(rig.is_open());
        assert_eq!(rig.machine.memory(), Held::NOTHING, "no memory is kept");
    }
}

#[test]
fn an_error_of_the_transformation_is_one_of_the_framer() {
    let mut rig = Rig::open_with(&Framing::custom(|| Slip), limits(), echo);
    rig.receive(b"good\xC0\xDBx\xC0");
    assert_eq!(rig.answers(), b"good\xC0");
    rig.receive_fin();
    let closed = rig.machine.take_closed();
    assert_eq!(closed.reason, CloseReason::BadFrame);
    assert_eq!(closed.error.expect("it").to_string(), "a bad escape");
}

/// A decompressor that makes much of little, and does not look whether there is room.
struct Bomb(usize);

impl Framer for Bomb {
    fn decode(&mut self, _: &[u8]) -> Result<Decoded, FrameError> {
        Ok(Decoded::Packed {
            payload: 0..1,
            consumed: 1,
        })
    }

    fn unpack(&mut self, payload: &[u8], out: &mut FrameBuf<'_>) -> Result<(), FrameError> {
        assert_eq!(out.room(), 1000);
        for _ in 0..self.0 {
            out.put(&payload.repeat(100));
        }
        // It is too large, whatever the framer says.
        match self.0 {
            ..=20 => Ok(()),
            _ => Err(FrameError::new("no room")),
        }
    }
}

#[test]
fn a_transformed_frame_is_bounded_by_the_maximum() {
    for (times, good) in [
        (0, true),
        (10, true),
        (11, false),
        (20, false),
        (crate::testing::rounds(100_000), false),
    ] {
        let small = ConnConfig {
            max_frame: Some(1000),
            ..limits()
        };
        let mut rig = Rig::open_with(&Framing::custom(move || Bomb(times)), small, silent);
        rig.receive("x");
        if good {
            assert_eq!(rig.events(), [frame(vec![b'x'; times * 100])]);
            assert!(rig.is_open());
        } else {
            assert_eq!(rig.events(), []);
            assert_eq!(rig.finish(), CloseReason::FrameTooLarge);
        }
    }
}

/// After an error the framer is not asked again, whatever the handler does.
#[test]
fn a_framer_errs_once() {
    struct Once(bool);
    impl Framer for Once {
        fn decode(&mut self, _: &[u8]) -> Result<Decoded, FrameError> {
            assert!(!std::mem::replace(&mut self.0, true), "it is asked again");
            Err(FrameError::new("once"))
        }
    }
    let mut told = 0;
    let mut rig = Rig::open_with(
        &Framing::custom(|| Once(false)),
        limits(),
        move |turn, event| {
            if let Seen::BadInput(reason) = event {
                assert_eq!(*reason, CloseReason::BadFrame);
                told += 1;
                assert_eq!(told, 1);
                turn.pause();
                turn.resume();
                turn.send(b"sorry")?;
            }
            Ok(())
        },
    );
    rig.receive("abc");
    rig.receive("more");
    assert_eq!(rig.answers(), b"sorry");
    assert_eq!(rig.events(), []);
    assert_eq!(rig.finish(), CloseReason::BadFrame);
}

/// Last words go out in order, behind the answers before them, for every kind of bad input.
#[test]
fn last_words_come_before_the_close() {
    let small = || ConnConfig {
        max_frame: Some(4),
        ..limits()
    };
    let field = Framing::LengthField {
        offset: 1,
        width: 1,
        little_endian: false,
        adjustment: -2,
    };
    use CloseReason::{BadFrame, FrameTooLarge};
    let cases: [(Framing, &[u8], &[u8], CloseReason); 6] = [
        (Framing::Line, b"ab\ntoo long", b"ab\nbye", FrameTooLarge),
        (
            Framing::Packet1,
            b"\x02ab\x05",
            b"\x02ab\x03bye",
            FrameTooLarge,
        ),
        (Framing::Fixed(5), b"a", b"", FrameTooLarge),
        (field.clone(), b"t\x04abt\x05", b"t\x04ab", FrameTooLarge),
        (field, b"t\x04abt\x01", b"t\x04ab", BadFrame),
        (scripted(brackets), b"<ab>no", b"<ab><bye>", BadFrame),
    ];
    for (framing, said, heard, reason) in cases {
        let mut rig = Rig::open_with(&framing, small(), |turn, event| {
            if let Seen::BadInput(_) = event {
                // Not every framing can say it.
                let _ = turn.send(b"bye");
                return Ok(());
            }
            echo(turn, event)
        });
        rig.receive(said);
        assert_eq!(rig.answers(), heard, "{framing:?}");
        assert!(rig.fin, "{framing:?}");
        rig.receive("ignored");
        assert_eq!(rig.finish(), reason, "{framing:?}");
    }
}

/// What the handler does in `on_bad_input` does not hide why the connection ends.
#[test]
fn the_reason_of_bad_input_stays() {
    type Act = fn(&mut Turn<'_>) -> Outcome;
    let acts: [Act; 6] = [
        |_| Ok(()),
        |turn| {
            turn.close();
            assert!(matches!(turn.send(b"late"), Err(SendError::Closed)));
            Ok(())
        },
        |turn| {
            turn.machine.close_after_input();
            turn.set_timer(1, secs(1));
            Ok(())
        },
        |_| Err(crate::reason::Close::because("another reason")),
        |turn| {
            turn.machine.set_framing(&Framing::Raw);
            Ok(())
        },
        |_| Err(crate::reason::Close::abort()),
    ];
    for (number, act) in acts.into_iter().enumerate() {
        let mut rig = Rig::open_with(&scripted(brackets), limits(), move |turn, event| {
            if let Seen::BadInput(_) = event {
                return act(turn);
            }
            echo(turn, event)
        });
        rig.receive("no");
        assert_eq!(rig.events(), [], "case {number}");
        rig.receive_fin();
        let closed = rig.machine.take_closed();
        assert_eq!(closed.reason, CloseReason::BadFrame, "case {number}");
        let error = closed.error.expect("the framer's").to_string();
        assert_eq!(error, "no bracket", "case {number}");
        assert_eq!(rig.gone, Some(number == 5));
    }
}

/// Without last words to lose, and with.
#[test]
fn a_reset_that_loses_last_words_is_the_reason() {
    let mut rig = Rig::open_with(&scripted(brackets), limits(), |turn, event| {
        if let Seen::BadInput(_) = event {
            turn.send(b"bye")?;
            return Err(crate::reason::Close::abort());
        }
        Ok(())
    });
    rig.receive("no");
    assert_eq!(rig.gone, Some(true));
    assert_eq!(rig.machine.take_closed().reason, CloseReason::Aborted);
}

/// A handler reads what its framer has parsed of the frame at hand.
#[test]
fn a_handler_is_lent_its_own_framer() {
    #[derive(Default)]
    struct Words(Vec<std::ops::Range<usize>>);
    impl Framer for Words {
        fn decode(&mut self, input: &[u8]) -> Result<Decoded, FrameError> {
            let Some(end) = input.iter().position(|&byte| byte == b'\n') else {
                return Ok(Decoded::More);
            };
            self.0.clear();
            let mut from = 0;
            for (at, byte) in input[..=end].iter().enumerate() {
                if matches!(byte, b' ' | b'\n') {
                    self.0.push(from..at);
                    from = at + 1;
                }
            }
            Ok(Decoded::Frame {
                payload: 0..end,
                consumed: end + 1,
            })
        }
    }
    let mut rig = Rig::open_with(&Framing::custom(Words::default), limits(), |turn, event| {
        if let Seen::Frame(line) = event {
            assert!(turn.machine.framer::<Slip>().is_none(), "of another type");
            let words = turn.machine.framer::<Words>().expect("its own");
            let last = words.0.last().expect("a word").clone();
            let last = line[last].to_vec();
            turn.send(&last)?;
        }
        Ok(())
    });
    rig.receive("set key value\nget key\nha");
    rig.receive("lf a line\n");
    assert_eq!(rig.answers(), b"valuekeyline");
    let mut plain = Rig::open(silent);
    plain.act(|turn| assert!(turn.machine.framer::<Words>().is_none()));
}

/// The maximum in force stays; one that is only the form of the frames does not.
#[test]
fn set_framing_keeps_the_maximum() {
    let mut machine = Rig::open_with(&Framing::Line, limits(), silent);
    let field = Framing::LengthField {
        offset: 0,
        width: 4,
        little_endian: true,
        adjustment: 0,
    };
    let mut set = |framing: &Framing| {
        machine.machine.set_framing(framing);
        machine.machine.max_frame()
    };
    const LINE: usize = 64 * 1024;
    for framing in [
        Framing::Packet4,
        Framing::Packet1,
        field.clone(),
        Framing::Line,
    ] {
        assert_eq!(set(&framing), LINE, "{framing:?}");
    }
    let changes = |limits: &mut ConnConfig| limits.max_frame = Some(77);
    machine
        .machine
        .reconfigure(changes, Time::ZERO)
        .expect("it is open");
    assert_eq!(machine.machine.max_frame(), 77);
    machine.machine.set_framing(&scripted(brackets));
    assert_eq!(machine.machine.max_frame(), 77);
    for form in [
        Framing::Raw,
        Framing::Packet1,
        Framing::Packet2,
        Framing::Fixed(3),
    ] {
        let mut other = Rig::open_with(&form, limits(), silent);
        other.machine.set_framing(&field);
        assert_eq!(other.machine.max_frame(), 8 * 1024 * 1024);
    }
}

/// Last words that the socket refuses are lost, and the reason says so.
#[test]
fn last_words_that_are_lost_are_the_reason() {
    let mut rig = Rig::open_with(&scripted(brackets), limits(), |turn, event| {
        if let Seen::BadInput(_) = event {
            turn.send(b"bye")?;
            // As a large frame is: written within the callback.
            let error = io::Error::from_raw_os_error(libc::EPIPE);
            turn.machine
                .handle_write_error(error, false, turn.now, turn.pool);
            assert!(matches!(turn.send(b"more"), Err(SendError::Closed)));
        }
        Ok(())
    });
    rig.receive("no");
    let closed = rig.machine.take_closed();
    assert_eq!(closed.reason, CloseReason::Reset);
    assert_eq!(
        closed.error.expect("the framer's").to_string(),
        "no bracket"
    );
}

/// Notes the addresses of the parts that it could pack.
struct Noting(Arc<Mutex<Vec<usize>>>);

impl Framer for Noting {
    fn decode(&mut self, _: &[u8]) -> Result<Decoded, FrameError> {
        Ok(Decoded::More)
    }

    fn pack(&mut self, payload: &[&[u8]], _: &mut FrameBuf<'_>) -> Result<bool, FrameError> {
        let addresses = payload.iter().map(|part| part.as_ptr() as usize);
        self.0.lock().expect("no panic").extend(addresses);
        Ok(false)
    }
}

/// So a long part costs no copy.
#[test]
fn a_framer_is_lent_the_parts_where_they_are() {
    let noted = Arc::new(Mutex::new(Vec::new()));
    let framing = Framing::custom({
        let noted = Arc::clone(&noted);
        move || Noting(Arc::clone(&noted))
    });
    let mut rig = Rig::open_with(&framing, limits(), silent);
    let (head, body) = (b"head", Arc::<[u8]>::from([7; 100]));
    let mut parts = [Chunk::Borrowed(head), Chunk::Shared(Arc::clone(&body))];
    let frame = rig.machine.frame(&mut parts, 8, rig.now, &mut rig.pool);
    frame.expect("room");
    let addresses = [head.as_ptr() as usize, body.as_ptr() as usize];
    assert_eq!(*noted.lock().expect("no panic"), addresses);
}

/// The simulator cannot copy the state of the user's code.
#[test]
fn a_connection_with_a_framer_is_not_copied() {
    let mut rig = Rig::open_with(&scripted(brackets), limits(), silent);
    assert!(rig.machine.fork().is_none());
    rig.machine.set_framing(&Framing::Line);
    assert!(rig.machine.fork().is_some());
}
