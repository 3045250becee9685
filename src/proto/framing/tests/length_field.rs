//! Fixed frames and length fields, against arithmetic on whole streams.

use super::*;
use crate::proto::buffers::Buffers;
use crate::proto::payload::Chunk;

/// What the rule in [`Framing::LengthField`] makes of the front of `bytes`, in words of 128 bits:
/// the extent of a frame, or a step without one.
fn naive_extent(field: (u8, u8, bool, i16), bytes: &[u8]) -> Result<i128, &'static str> {
    let (offset, width, little_endian, adjustment) = field;
    let header = usize::from(offset) + usize::from(width);
    let Some(digits) = bytes.get(usize::from(offset)..header) else {
        return Err("more");
    };
    let mut digits = digits.to_vec();
    if little_endian {
        digits.reverse();
    }
    let value = digits
        .iter()
        .fold(0, |sum, &digit| sum * 256 + i128::from(digit));
    let total = value + i128::from(adjustment) + header as i128;
    if total < header as i128 {
        return Err("bad");
    }
    Ok(total)
}

#[test]
fn every_length_field_is_as_arithmetic_has_it() {
    let mut random = Random::new(5);
    for _ in 0..if cfg!(miri) { 200 } else { 200_000 } {
        let field = (
            [0, 0, 1, 2, 7][random.below(5)],
            [1, 2, 3, 4, 8][random.below(5)],
            random.chance(500),
            [0, 1, -1, -2, -4, 3, -300, i16::MAX, i16::MIN][random.below(9)],
        );
        let (offset, width, little_endian, adjustment) = field;
        let max = random.below(40);
        let bytes: Vec<u8> = (0..random.below(60))
            .map(|_| [0, 0, 0, 1, 4, 9, 255][random.below(7)])
            .collect();
        let framing = Framing::LengthField {
            offset,
            width,
            little_endian,
            adjustment,
        };
        let mut codec = Codec::new(&framing, Some(max));
        let start = if offset == 0 { usize::from(width) } else { 0 };
        let step = codec.decode(&bytes, &mut Buffers::default());
        match (naive_extent(field, &bytes), step) {
            (Err("more"), Step::More) | (Err("bad"), Step::Bad(_)) => {}
            (Ok(total), Step::TooLarge) => assert!(total - start as i128 > max as i128),
            (Ok(total), Step::More) => {
                assert!(total > bytes.len() as i128 && total - start as i128 <= max as i128);
            }
            (Ok(total), Step::Frame { payload, consumed }) => {
                assert_eq!(consumed as i128, total);
                assert_eq!(payload, start..consumed);
                assert!(payload.len() <= max);
                // What was received can be sent, and is the same on the wire.
                let mut out = b"before".to_vec();
                codec.encode(&bytes[payload], &mut out).expect("a frame");
                assert_eq!(out[6..], bytes[..consumed], "{framing:?}");
            }
            other => panic!("{framing:?}, at most {max}, {bytes:?}: {other:?}"),
        }
    }
}

/// A payload that a header can announce comes back; another is refused, and nothing is appended.
#[test]
fn what_a_length_field_cannot_announce_is_refused() {
    for (width, adjustment, good, bad) in [
        (1, 0, 0..256, 256..300),
        (1, 5, 5..261, 0..5),
        (1, -5, 0..251, 251..300),
        (2, 0, 65_000..65_536, 65_536..65_540),
        (8, 0, 0..300, 0..0),
    ] {
        let framing = Framing::LengthField {
            offset: 0,
            width,
            little_endian: true,
            adjustment,
        };
        let mut codec = Codec::new(&framing, None);
        for length in good {
            let (mut out, payload) = (Vec::new(), vec![7; length]);
            codec.encode(&payload, &mut out).expect("it fits");
            match codec.decode(&out, &mut Buffers::default()) {
                Step::Frame { payload, consumed } => {
                    assert_eq!((payload.len(), consumed), (length, out.len()));
                }
                other => panic!("{framing:?} {length}: {other:?}"),
            }
        }
        for length in bad {
            let mut out = b"before".to_vec();
            let refused = codec.encode(&vec![7; length], &mut out);
            assert!(refused.is_err(), "{framing:?} {length}");
            assert_eq!(out, b"before");
        }
    }
}

/// With bytes in front of the length the header is the sender's, and checked.
#[test]
fn a_whole_frame_must_announce_its_length() {
    let framing = Framing::LengthField {
        offset: 1,
        width: 1,
        little_endian: false,
        adjustment: 0,
    };
    let mut codec = Codec::new(&framing, None);
    for (frame, good) in [
        (&b"t\x02ab"[..], true),
        (b"t\0", true),
        (b"t\x01ab", false),
        (b"t\x03ab", false),
        (b"t", false),
        (b"", false),
    ] {
        let mut out = Vec::new();
        assert_eq!(codec.encode(frame, &mut out).is_ok(), good, "{frame:?}");
        assert_eq!(out, if good { frame } else { b"" });
        for cut in 0..=frame.len() {
            let (one, other) = frame.split_at(cut);
            let mut pieces = [one, other].map(Chunk::Borrowed);
            let (mut envelope, mut buffers) = (Vec::new(), Buffers::default());
            let wrapped = codec.wrap(&mut pieces, &mut envelope, &mut buffers);
            assert_eq!(wrapped.is_ok(), good, "{frame:?} cut at {cut}");
            assert_eq!(envelope, b"");
        }
        let mut out = b"before".to_vec();
        let written = codec.encode_with(
            |out| {
                out.put(frame);
                Ok(())
            },
            &mut out,
            &mut Buffers::default(),
        );
        assert_eq!(written.is_ok(), good, "{frame:?}");
        let kept: &[u8] = if good { frame } else { b"" };
        assert_eq!(out, [b"before", kept].concat());
    }
}

#[test]
fn a_fixed_frame_has_its_length() {
    let mut codec = Codec::new(&Framing::Fixed(3), None);
    assert_eq!(codec.max(), 3);
    for length in [0, 1, 2, 4, 100] {
        let mut out = Vec::new();
        match codec.encode(&vec![b'x'; length], &mut out) {
            Err(EncodeError::TooLarge { max: 3, .. }) => assert!(length > 3),
            Err(EncodeError::Refused(_)) => assert!(length < 3),
            other => panic!("{other:?}"),
        }
        assert_eq!(out, [0; 0]);
    }
    let mut out = Vec::new();
    codec.encode(b"abc", &mut out).expect("three bytes");
    assert_eq!(out, b"abc");
    let cut = decode(&Framing::Fixed(3), 3, [&b"abcde"[..], b"fg"]);
    assert_eq!(cut, (vec![b"abc".to_vec(), b"def".to_vec()], End::Rest(1)));
    assert_eq!(decode(&Framing::Fixed(3), 2, [&b"a"[..]]).1, End::TooLarge);
}

/// Parameters that a listener refuses, set on an open connection, are a defined error too.
#[test]
fn parameters_that_cannot_work() {
    let field = |width| Framing::LengthField {
        offset: 0,
        width,
        little_endian: false,
        adjustment: 0,
    };
    for framing in [
        Framing::Fixed(0),
        field(0),
        field(5),
        field(7),
        field(9),
        field(255),
    ] {
        assert!(framing.check(None).is_err(), "{framing:?}");
        let mut codec = Codec::new(&framing, None);
        let step = codec.decode(b"abcdefghijklmnop", &mut Buffers::default());
        assert!(matches!(step, Step::Bad(_)), "{framing:?}: {step:?}");
        assert!(codec.encode(b"x", &mut Vec::new()).is_err());
    }
    for width in [1, 2, 3, 4, 8] {
        assert!(field(width).check(None).is_ok());
    }
    // A maximum that no frame fits.
    for (max, fits) in [(2, false), (3, true), (4, true)] {
        assert_eq!(Framing::Fixed(3).check(Some(max)).is_ok(), fits, "{max}");
    }
}
