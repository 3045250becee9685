//! The decoder against a naive one: the same bytes, in any cuts, must be the same frames and the same end.
#![no_main]

use std::time::Duration;

use kit::{naive, strings};
use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use portcullis::sim::{Action, ConnModel, End, Input};
use portcullis::{CloseReason, Decoded, FrameBuf, FrameError, Framer, Framing, Listen};

#[derive(Arbitrary, Debug)]
struct Case<'a> {
    framing: u8,
    max: u8,
    cuts: [u8; 12],
    bytes: &'a [u8],
}

/// Packet-1 as a user would write it, asking for more in every way. It may hand a frame over at once, or transform it first.
struct Counted {
    asks: bool,
    packs: bool,
}

impl Framer for Counted {
    fn decode(&mut self, input: &[u8]) -> Result<Decoded, FrameError> {
        let Some(&length) = input.first() else {
            return Ok(Decoded::More);
        };
        let end = 1 + usize::from(length);
        self.asks = !self.asks;
        Ok(match input.len() {
            got if got >= end && self.packs => Decoded::Packed {
                payload: 1..end,
                consumed: end,
            },
            got if got >= end => Decoded::Frame {
                payload: 1..end,
                consumed: end,
            },
            _ if self.asks => Decoded::Need(end),
            _ => Decoded::More,
        })
    }

    /// As it is, in pieces.
    fn unpack(&mut self, payload: &[u8], out: &mut FrameBuf<'_>) -> Result<(), FrameError> {
        for piece in payload.chunks(1 + payload.len() / 3) {
            assert!(out.room() >= piece.len());
            out.put(piece);
        }
        Ok(())
    }

    fn header(&mut self, length: usize, out: &mut FrameBuf<'_>) -> Result<(), FrameError> {
        out.put(&[u8::try_from(length).map_err(FrameError::new)?]);
        Ok(())
    }
}

fuzz_target!(|case: Case| {
    let number = case.framing % (Action::FRAMINGS + 2);
    let custom = |packs| Framing::custom(move || Counted { asks: false, packs });
    let (kind, framing, max) = match number {
        // Its frames may take 16 bytes more than the maximum before they are too large: here none can be.
        Action::FRAMINGS => (1, custom(false), 255),
        10.. => (1, custom(true), 255),
        number => (
            number,
            Action::framing(number),
            naive::accepted_max(number, usize::from(case.max.max(1))),
        ),
    };
    let (expected, end) = naive::whole(kind, max, case.bytes);
    // Within its first six bytes a hello is recognised when a frame ends there, which depends on the cuts.
    // Two bytes decide where a header announces too long a frame.
    let begun = matches!(case.bytes, [0x16, 3, ..]) && end == CloseReason::FrameTooLarge;
    let is_tls = (begun || matches!(case.bytes, [0x16, 3, 0..=4, ..])) && kind != 0;
    let (frames, last) = decode(framing, max, &case);
    if is_tls && last.reason == CloseReason::UnexpectedTls {
        assert!(frames.is_empty(), "a hello is no frame: {frames:?}");
    } else if kind == 0 {
        assert_eq!(frames.concat(), expected.concat());
        assert!(frames.iter().all(|frame| !frame.is_empty()));
    } else {
        assert_eq!(frames, expected);
    }
    // How much of a hello has come when the frame fails depends on the cuts.
    assert!(
        last.reason == end || (is_tls && last.reason == CloseReason::UnexpectedTls),
        "{last:?}, not {end:?}"
    );
    assert!(!last.reset);
});

fn decode(framing: Framing, max: usize, case: &Case<'_>) -> (Vec<Vec<u8>>, End) {
    let listen = Listen::tcp("127.0.0.1:0", framing).with(|listen| {
        listen.conn.max_frame = Some(max);
        listen.conn.idle_timeout = Duration::MAX;
        listen.conn.frame_timeout = Duration::MAX;
    });
    let mut model = ConnModel::new(&listen).expect("settings that work");
    let apply = |model: &mut ConnModel, input| model.apply(&input).expect("it holds");
    apply(&mut model, Input::OnFrame(Vec::new()));
    let mut rest = case.bytes;
    let mut cuts = case.cuts.iter().cycle();
    while !rest.is_empty() {
        let (piece, behind) = rest.split_at(
            rest.len()
                .min(1 + usize::from(*cuts.next().expect("a cycle"))),
        );
        apply(&mut model, Input::Bytes(piece.to_vec()));
        apply(&mut model, Input::Turn);
        rest = behind;
    }
    strings::finish(&mut model)
}
