//! A framer that misbehaves, and input that it refuses: a defined end, behind last words.

use portcullis::sim::ClientState;
use portcullis::CloseReason::{self, BadFrame, FrameTooLarge, Panicked};
use portcullis::{Config, Decoded, FrameBuf, FrameError, Framer, Framing, Listen};

use super::harness::{behave, harness_of, lines, Call, Harness, Welcome};
use kit::planned::blow;

/// The maximum frame.
const MAX: usize = 64;

/// Lines; the first byte of a line says how the framer misbehaves.
#[derive(Default)]
struct Odd {
    calls: usize,
    has_failed: bool,
}

impl Framer for Odd {
    fn decode(&mut self, input: &[u8]) -> Result<Decoded, FrameError> {
        assert!(!self.has_failed, "it is asked again after its error");
        self.calls += 1;
        let Some(end) = input.iter().position(|&byte| byte == b'\n') else {
            return Ok(Decoded::More);
        };
        let (payload, consumed) = (0..end + 1, end + 1);
        Ok(match input[0] {
            b'A' => Decoded::Frame {
                payload: 0..input.len() + 1,
                consumed,
            },
            b'B' => Decoded::Packed {
                payload,
                consumed: input.len() + 1,
            },
            b'C' => Decoded::Packed {
                payload,
                consumed: 0,
            },
            b'D' => Decoded::Need(usize::MAX),
            b'E' => {
                self.has_failed = true;
                return Err(FrameError::new("refused"));
            }
            b'F' => blow(),
            b'e' | b'f' | b'~' => Decoded::Packed { payload, consumed },
            _ => Decoded::Frame { payload, consumed },
        })
    }

    fn unpack(&mut self, payload: &[u8], out: &mut FrameBuf<'_>) -> Result<(), FrameError> {
        match payload[0] {
            b'e' => {
                self.has_failed = true;
                return Err(FrameError::new("refused later"));
            }
            b'f' => blow(),
            _ => {}
        }
        // As a decompressor without an end of its own does.
        while out.room() > 0 {
            out.put(b"endless ");
        }
        Ok(())
    }
}

fn odd() -> Listen {
    lines().with(|listen| {
        listen.framing = Framing::custom(Odd::default);
        listen.conn.max_frame = Some(MAX);
    })
}

/// Last words, with the reason and the cause.
fn explaining(listen: Listen) -> Harness {
    harness_of(Config::new(), listen, Welcome::Accept, |cx, call| {
        if let Call::BadInput(closed) = call {
            let cause = closed.error.as_ref().map(ToString::to_string);
            let cause = cause.unwrap_or_default();
            cx.conn.send(format!("-{} {cause}", closed.reason))?;
            return Ok(());
        }
        behave(cx, call)
    })
}

#[test]
fn a_framer_that_misbehaves_ends_its_own_connection() {
    let outside = "the framer reported a frame that is empty or outside its input";
    let cases: [(&str, CloseReason, String); 8] = [
        ("A", BadFrame, format!("-bad frame {outside}")),
        ("B", BadFrame, format!("-bad frame {outside}")),
        ("C", BadFrame, format!("-bad frame {outside}")),
        ("D", FrameTooLarge, "-frame too large ".to_owned()),
        ("E", BadFrame, "-bad frame refused".to_owned()),
        ("e", BadFrame, "-bad frame refused later".to_owned()),
        ("F", Panicked, String::new()),
        ("f", Panicked, String::new()),
    ];
    for (odd_one, reason, words) in cases {
        // In one piece, after another frame, and in two.
        for said in [
            vec![format!("{odd_one}\nnever\n")],
            vec![format!("good\n{odd_one}\n{odd_one}\nnever\n")],
            vec![
                "good\n".to_owned(),
                format!("{odd_one}x"),
                "yz\n".to_owned(),
            ],
        ] {
            let mut harness = explaining(odd());
            let client = harness.enter();
            for piece in &said {
                harness.say(client, piece);
            }
            assert_eq!(harness.leave(client), ClientState::Finished);
            let good = if said[0].starts_with("good") {
                "good\n"
            } else {
                ""
            };
            assert_eq!(harness.heard(client), format!("{good}{words}"), "{said:?}");
            harness.ended(reason);
            let told = usize::from(reason != Panicked);
            assert_eq!(harness.sim.app().times("bad input"), told);
            harness.end(1 - told as u64);
        }
    }
}

#[test]
fn a_transformation_without_end_fills_one_frame() {
    let mut harness = explaining(odd());
    let client = harness.enter();
    harness.say(client, "~\n~\n");
    assert_eq!(harness.heard(client), "endless ".repeat(2 * MAX / 8));
    harness.leave(client);
    harness.ended(CloseReason::Finished);
    harness.end(0);
}

/// RFC 5321: "500 Line too long". It goes out behind the answers before it.
#[test]
fn an_overlong_line_is_answered() {
    let listen = lines().with(|listen| listen.conn.max_frame = Some(MAX));
    let mut harness = explaining(listen);
    let client = harness.enter();
    let long = "x".repeat(MAX + 1);
    harness.say(client, &format!("one\ntwo\n{long}\nthree\n"));
    assert_eq!(harness.heard(client), "one\ntwo\n-frame too large ");
    assert_eq!(harness.leave(client), ClientState::Finished);
    harness.ended(FrameTooLarge);
    harness.end(0);
}

/// A panic in the callback is counted; the reason is still the input's.
#[test]
fn a_panic_in_on_bad_input_is_counted() {
    let mut harness = harness_of(Config::new(), odd(), Welcome::Accept, |cx, call| {
        if let Call::BadInput(_) = call {
            blow();
        }
        behave(cx, call)
    });
    let client = harness.enter();
    harness.say(client, "good\nE\n");
    assert_eq!(harness.heard(client), "good\n");
    harness.leave(client);
    harness.ended(BadFrame);
    harness.end(1);
}
