//! A framing of one's own in a connection: well-behaved, misbehaving, and panicking.

use std::panic::{catch_unwind, AssertUnwindSafe};

use super::*;

type Decode = fn(&[u8]) -> Result<Decoded, FrameError>;

/// A framer that decodes by a function.
struct Scripted(Decode);

impl Framer for Scripted {
    fn decode(&mut self, input: &[u8]) -> Result<Decoded, FrameError> {
        (self.0)(input)
    }

    fn pack(&mut self, payload: &[u8], out: &mut FrameBuf<'_>) -> Result<bool, FrameError> {
        out.put(b"left behind");
        match payload {
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
