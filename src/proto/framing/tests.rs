//! The decoder compared with a naive one and with Erlang's, and the encoder with both.

mod erlang;
mod length_field;

use super::*;
use crate::proto::buffers::Buffers;
use crate::sim::Random;

/// The end of decoding a whole stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// A remainder of this length, without a whole frame.
    Rest(usize),
    TooLarge,
}

/// The simplest decoder: all input is present, and no state is kept.
fn naive(framing: &Framing, max: usize, mut bytes: &[u8]) -> (Vec<Vec<u8>>, End) {
    let mut frames = Vec::new();
    loop {
        let width = match framing {
            Framing::Packet1 => 1,
            Framing::Packet2 => 2,
            Framing::Packet4 => 4,
            _ => 0,
        };
        let (start, end) = match framing {
            Framing::Raw => (0, bytes.len()),
            Framing::Line | Framing::Delimited(_) => {
                let delimiter = if let Framing::Delimited(byte) = framing {
                    *byte
                } else {
                    b'\n'
                };
                match bytes.iter().position(|byte| *byte == delimiter) {
                    Some(at) if at < max => (0, at + 1),
                    _ if bytes.len() > max => return (frames, End::TooLarge),
                    _ => return (frames, End::Rest(bytes.len())),
                }
            }
            _ if bytes.len() < width => return (frames, End::Rest(bytes.len())),
            _ => {
                let length = bytes[..width]
                    .iter()
                    .fold(0, |sum, byte| sum * 256 + usize::from(*byte));
                if length > max || length >= 0x7FFF_FFFC {
                    return (frames, End::TooLarge);
                }
                if bytes.len() < width + length {
                    return (frames, End::Rest(bytes.len()));
                }
                (width, width + length)
            }
        };
        if end == 0 {
            return (frames, End::Rest(0));
        }
        frames.push(bytes[start..end].to_vec());
        bytes = &bytes[end..];
    }
}

/// The decoder under test, piece by piece: as the machine does, it decodes the remainder again.
fn decode<'a>(
    framing: &Framing,
    max: usize,
    pieces: impl IntoIterator<Item = &'a [u8]>,
) -> (Vec<Vec<u8>>, End) {
    let mut codec = Codec::new(framing, Some(max));
    let mut rest = Vec::new();
    let mut frames = Vec::new();
    for piece in pieces {
        rest.extend_from_slice(piece);
        loop {
            match codec.decode(&rest, &mut Buffers::default()) {
                Step::Frame { payload, consumed } => {
                    assert!(consumed > 0, "progress");
                    frames.push(rest[payload].to_vec());
                    rest.drain(..consumed);
                }
                Step::More => break,
                Step::TooLarge => return (frames, End::TooLarge),
                Step::Bad(error) => panic!("{error}"),
                Step::Unpacked { .. } => panic!("no framer"),
            }
        }
    }
    (frames, End::Rest(rest.len()))
}

const ALL: [Framing; 5] = [
    Framing::Packet1,
    Framing::Packet2,
    Framing::Packet4,
    Framing::Line,
    Framing::Delimited(2),
];

/// Every string up to five bytes over the bytes that matter, in every possible cut.
#[test]
fn every_short_stream_in_every_cut() {
    const BYTES: [u8; 5] = [0, 1, 2, b'\n', 255];
    let longest: u32 = if cfg!(miri) { 2 } else { 5 };
    for framing in ALL {
        for length in 0..=longest {
            for number in 0..BYTES.len().pow(length) {
                let stream: Vec<u8> = (0..length)
                    .map(|place| BYTES[number / BYTES.len().pow(place) % BYTES.len()])
                    .collect();
                let expected = naive(&framing, 2, &stream);
                for cuts in 0..1_usize << length.saturating_sub(1) {
                    let mut pieces = Vec::new();
                    let mut from = 0;
                    for to in 1..=stream.len() {
                        if to == stream.len() || cuts & 1 << (to - 1) != 0 {
                            pieces.push(&stream[from..to]);
                            from = to;
                        }
                    }
                    let got = decode(&framing, 2, pieces.iter().copied());
                    assert_eq!(got, expected, "{framing:?} {pieces:?}");
                }
            }
        }
    }
}

#[test]
fn zero_length_frames_are_frames() {
    assert_eq!(
        decode(&Framing::Packet1, 10, [&[0, 0, 0][..]]).0,
        vec![b""; 3]
    );
    assert_eq!(
        decode(&Framing::Packet2, 10, [&[0, 0, 0][..]]),
        (vec![Vec::new()], End::Rest(1))
    );
    assert_eq!(decode(&Framing::Packet4, 10, [&[0; 8][..]]).0, vec![b""; 2]);
    assert_eq!(decode(&Framing::Line, 10, [&b"\n\n"[..]]).0, vec![b"\n"; 2]);
}

#[test]
fn a_packet_at_the_maximum_is_good_and_one_above_is_not() {
    for (framing, header) in [
        (Framing::Packet1, &[5_u8][..]),
        (Framing::Packet2, &[0, 5]),
        (Framing::Packet4, &[0, 0, 0, 5]),
    ] {
        let wire = [header, b"12345"].concat();
        assert_eq!(
            decode(&framing, 5, [&wire[..]]),
            (vec![b"12345".to_vec()], End::Rest(0))
        );
        // Refused by the header alone.
        assert_eq!(
            decode(&framing, 4, [header]),
            (vec![], End::TooLarge),
            "{framing:?}"
        );
    }
}

#[test]
fn a_line_counts_its_delimiter() {
    assert_eq!(decode(&Framing::Line, 5, [&b"abcd\n"[..]]).0, [b"abcd\n"]);
    assert_eq!(
        decode(&Framing::Line, 4, [&b"abcd\n"[..]]),
        (vec![], End::TooLarge)
    );
    assert_eq!(
        decode(&Framing::Line, 4, [&b"abcd"[..]]),
        (vec![], End::Rest(4))
    );
    assert_eq!(
        decode(&Framing::Line, 4, [&b"abcde"[..]]),
        (vec![], End::TooLarge)
    );
    assert_eq!(
        decode(&Framing::Line, 9, [&b"a\rb\r\n"[..]]).0,
        [b"a\rb\r\n"],
        "lone CR is no end"
    );
    assert_eq!(
        decode(&Framing::Delimited(0), 9, [&b"a\n\0b"[..]]),
        (vec![b"a\n\0".to_vec()], End::Rest(1))
    );
}

/// As in Erlang, header and payload fit in 31 bits, for every maximum.
#[test]
fn packet_4_has_a_limit_of_its_own() {
    let judge = |length: u32| decode(&Framing::Packet4, usize::MAX, [&length.to_be_bytes()[..]]).1;
    assert_eq!(judge(0x7FFF_FFFB), End::Rest(4));
    for length in [0x7FFF_FFFC, 0x8000_0000, 0xFFFF_FFFF] {
        assert_eq!(judge(length), End::TooLarge, "{length:#x}");
    }
}

#[test]
fn the_defaults_are_safe() {
    let defaults = [
        (Framing::Raw, 65_536),
        (Framing::Packet1, 255),
        (Framing::Packet2, 65_535),
        (Framing::Packet4, 8 * 1024 * 1024),
        (Framing::Line, 65_536),
        (Framing::Delimited(0), 65_536),
    ];
    for (framing, max) in defaults {
        assert_eq!(Codec::new(&framing, None).max(), max, "{framing:?}");
    }
}

#[test]
fn a_framing_is_read_by_its_name() {
    for name in [
        "raw",
        "packet-1",
        "packet-2",
        "packet-4",
        "line",
        "delimited by 0x00",
        "delimited by 0x7c",
        "fixed 1",
        "fixed 4294967295",
        "length-field 0 2 be 0",
        "length-field 255 8 le -32768",
    ] {
        let framing: Framing = name.parse().expect("a framing");
        assert_eq!(format!("{framing:?}"), name);
    }
    for name in [
        "",
        "packet-3",
        "custom",
        "delimited by 0x100",
        "Raw",
        "\u{1b}",
        "fixed 0",
        "fixed",
        "length-field 0 5 be 0",
        "length-field 0 2 be",
        "length-field 0 2 xe 0",
        "length-field 0 2 be 0 0",
    ] {
        let error = name.parse::<Framing>().expect_err("none").to_string();
        let names = "raw, packet-1, packet-2, packet-4, line, delimited by 0x00, fixed 16, \
                     length-field 0 2 be 0";
        let expected = format!("option framing: {name:?} is none of {names}");
        assert_eq!(error, expected);
    }
}

/// A long line in many pieces is searched once, not from its beginning for each piece.
#[test]
fn a_line_is_searched_once() {
    let mut codec = Codec::new(&Framing::Line, Some(usize::MAX));
    let mut line = vec![b'x'; 1000];
    assert!(matches!(
        codec.decode(&line, &mut Buffers::default()),
        Step::More
    ));
    assert_eq!(codec.seen(), 1000);
    line.extend_from_slice(b"y\nz");
    match codec.decode(&line, &mut Buffers::default()) {
        Step::Frame { payload, consumed } => assert_eq!((payload, consumed), (0..1002, 1002)),
        other => panic!("{other:?}"),
    }
    assert_eq!(codec.seen(), 0, "the next line begins anew");
}

/// A framer that needs a number of bytes is not called before they have arrived.
#[test]
fn a_need_delays_the_next_call() {
    use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
    use std::sync::Arc;

    struct Counting(Arc<AtomicUsize>);
    impl Framer for Counting {
        fn decode(&mut self, input: &[u8]) -> Result<Decoded, FrameError> {
            self.0.fetch_add(1, Relaxed);
            Ok(match input.len() {
                ..100 => Decoded::Need(100),
                _ => Decoded::Frame {
                    payload: 0..100,
                    consumed: 100,
                },
            })
        }
    }
    let asked = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&asked);
    let framing = Framing::custom(move || Counting(Arc::clone(&counter)));
    let mut codec = Codec::new(&framing, Some(1000));
    for length in 0..100 {
        assert!(matches!(
            codec.decode(&vec![0; length], &mut Buffers::default()),
            Step::More
        ));
    }
    assert_eq!(asked.load(Relaxed), 1);
    assert_eq!(codec.seen(), 100, "what it needs");
    assert!(matches!(
        codec.decode(&[0; 100], &mut Buffers::default()),
        Step::Frame { .. }
    ));
    assert!(matches!(
        codec.decode(&[0; 1], &mut Buffers::default()),
        Step::More
    ));
    assert_eq!(asked.load(Relaxed), 3, "the next frame is asked for anew");
}

/// The result for the old maximum is not kept for the new one.
#[test]
fn a_frame_that_was_too_large_fits_a_larger_maximum() {
    struct Whole;
    impl Framer for Whole {
        fn decode(&mut self, input: &[u8]) -> Result<Decoded, FrameError> {
            Ok(Decoded::Frame {
                payload: 0..input.len(),
                consumed: input.len(),
            })
        }
    }
    let mut codec = Codec::new(&Framing::custom(|| Whole), Some(10));
    assert!(codec.cut(&[7; 50]).is_none());
    codec.set_max(Some(50));
    match codec.decode(&[7; 50], &mut Buffers::default()) {
        Step::Frame { payload, consumed } => assert_eq!((payload, consumed), (0..50, 50)),
        other => panic!("{other:?}"),
    }
}

/// Nothing is searched in them, so that nothing is remembered of an incomplete one.
#[test]
fn frames_of_a_known_length_remember_no_search() {
    for length in 0..8 {
        let mut codec = Codec::new(&Framing::Fixed(8), None);
        let step = codec.decode(&vec![7; length], &mut Buffers::default());
        assert!(matches!(step, Step::More));
        assert_eq!(codec.seen(), 0);
    }
}

#[test]
fn too_long_to_encode_appends_nothing() {
    for (framing, limit) in [(Framing::Packet1, 255), (Framing::Packet2, 65_535)] {
        let mut codec = Codec::new(&framing, Some(10));
        let mut out = b"before".to_vec();
        match codec.encode(&vec![0; limit + 1], &mut out) {
            Err(EncodeError::TooLarge { length, max }) => {
                assert_eq!((length, max), (limit + 1, limit));
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(out, b"before");
        codec
            .encode(&vec![0; limit], &mut out)
            .expect("the maximum is for input");
        assert_eq!(out.len(), 6 + framing_width(&framing) + limit);
    }
}

fn framing_width(framing: &Framing) -> usize {
    match framing {
        Framing::Packet1 => 1,
        Framing::Packet2 => 2,
        Framing::Packet4 => 4,
        _ => 0,
    }
}

#[test]
fn encoded_as_erlang_does() {
    let encoded = |framing: &Framing, payload: &[u8]| {
        let mut out = Vec::new();
        Codec::new(framing, Some(1000))
            .encode(payload, &mut out)
            .expect("fits");
        out
    };
    assert_eq!(encoded(&Framing::Packet1, b"ab"), b"\x02ab");
    assert_eq!(encoded(&Framing::Packet2, b"ab"), b"\0\x02ab");
    assert_eq!(encoded(&Framing::Packet4, b"ab"), b"\0\0\0\x02ab");
    assert_eq!(encoded(&Framing::Packet2, b""), b"\0\0");
    assert_eq!(encoded(&Framing::Line, b"ab"), b"ab", "no newline is added");
    assert_eq!(encoded(&Framing::Raw, b"ab"), b"ab");
    assert_eq!(
        encoded(&Framing::Packet2, &[7; 258])[..2],
        [1, 2],
        "big-endian"
    );
}

#[test]
fn any_stream_in_any_pieces() {
    for seed in 0..crate::testing::rounds(1000) as u64 {
        let mut random = Random::new(seed);
        let framing = ALL[random.below(ALL.len())].clone();
        let max = random.below(300);
        let length = random.below(600);
        let byte = |random: &mut Random| match random.below(5) {
            0..=2 => random.below(5) as u8,
            3 => b'\n',
            _ => random.below(256) as u8,
        };
        let stream: Vec<u8> = (0..length).map(|_| byte(&mut random)).collect();
        let expected = naive(&framing, max, &stream);
        let mut pieces = Vec::new();
        let mut rest = stream.as_slice();
        while !rest.is_empty() {
            let (piece, after) = rest.split_at(random.between(1, 99).min(rest.len()));
            pieces.push(piece);
            rest = after;
        }
        assert_eq!(decode(&framing, max, pieces), expected, "seed {seed}");
        assert_eq!(
            decode(&framing, max, stream.chunks(1)),
            expected,
            "seed {seed}"
        );
    }
}

#[test]
fn what_is_encoded_is_decoded() {
    for seed in 0..crate::testing::rounds(1000) as u64 {
        let mut random = Random::new(seed);
        let framing =
            [Framing::Packet1, Framing::Packet2, Framing::Packet4][random.below(3)].clone();
        let mut payloads = Vec::new();
        for _ in 0..random.below(20) {
            let length = random.below(256);
            payloads.push(
                (0..length)
                    .map(|_| random.below(256) as u8)
                    .collect::<Vec<u8>>(),
            );
        }
        let mut codec = Codec::new(&framing, Some(255));
        let mut wire = Vec::new();
        for payload in &payloads {
            codec.encode(payload, &mut wire).expect("fits");
        }
        let decoded = decode(&framing, 255, wire.chunks(random.between(1, 1999)));
        assert_eq!(decoded, (payloads, End::Rest(0)), "seed {seed}");
    }
}
