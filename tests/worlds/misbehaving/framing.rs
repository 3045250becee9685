//! The framing changes under what has arrived.

use portcullis::sim::ClientState;
use portcullis::CloseReason::{self, FrameTooLarge, Truncated};
use portcullis::{Config, Framing};

use super::harness::{behave, harness_of, lines, Call, Welcome};

/// What is left of the same read is cut by the new rule, however the stream is cut.
#[test]
fn changes_framing_inside_on_frame() {
    let packets = "go\n\0\x03abc\0\0\0\x02\n\n";
    let cases: [(Framing, &str, &str, CloseReason); 6] = [
        (Framing::Packet2, packets, packets, CloseReason::Finished),
        (
            Framing::Delimited(b'.'),
            "go\na.b\n.",
            "go\na.b\n.",
            CloseReason::Finished,
        ),
        (
            Framing::Raw,
            "go\nno frames",
            "go\nno frames",
            CloseReason::Finished,
        ),
        (
            Framing::Line,
            "go\ngo\n\n",
            "go\ngo\n\n",
            CloseReason::Finished,
        ),
        // By the new rule it is too long, or cut; by the old one it was neither.
        (
            Framing::Packet1,
            "go\n\x01a\x0Fno\n",
            "go\n\x01a",
            FrameTooLarge,
        ),
        (Framing::Packet4, "go\n\0\0\0\x04no\n", "go\n", Truncated),
    ];
    for (after, said, heard, reason) in cases {
        for cut in 0..=said.len() {
            let after = after.clone();
            let listen = lines().with(|listen| listen.conn.max_frame = Some("still here\n".len()));
            let mut harness =
                harness_of(Config::new(), listen, Welcome::Accept, move |cx, call| {
                    if let Call::Frame(b"go\n") = call {
                        behave(cx, call)?;
                        cx.conn.set_framing(&after);
                        return Ok(());
                    }
                    behave(cx, call)
                });
            let client = harness.enter();
            harness.say(client, &said[..cut]);
            harness.say(client, &said[cut..]);
            assert_eq!(harness.leave(client), ClientState::Finished);
            assert_eq!(harness.heard(client), heard, "{said:?} cut at {cut}");
            harness.ended(reason);
            harness.end(0);
        }
    }
}
