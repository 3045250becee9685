//! What comes first on a connection behind a proxy, against a naive reader of PROXY headers: the same bytes, in any cuts,
//! must be the same header, the same frames behind it and the same end.
//!
//! Input: one byte of options, one for the framing, one for the longest frame, twelve for the cuts, then the stream. With the
//! lowest bit of the options the header may be left out; with the next the first checksum is made right, which no fuzzer
//! would guess.
#![no_main]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use kit::naive::{self, sun_path};
use kit::strings;
use libfuzzer_sys::fuzz_target;
use portcullis::sim::{Action, ConnModel, Input};
use portcullis::{AccessRules, Addr, CloseReason, Listen, ProxyHeader, ProxyProtocol};

const SIGNATURE: [u8; 12] = [13, 10, 13, 10, 0, 13, 10, 81, 85, 73, 84, 10];
/// The longest header of version 2.
const LONGEST: usize = 16_384;

fuzz_target!(|input: &[u8]| {
    let Some((&[options, framing, max], rest)) = input.split_first_chunk() else {
        return;
    };
    let Some((cuts, stream)) = rest.split_first_chunk() else {
        return;
    };
    let mut stream = stream.to_vec();
    if options & 2 != 0 {
        mend_checksum(&mut stream);
    }
    let case = Case {
        optional: options & 1 != 0,
        framing: framing % Action::FRAMINGS,
        max: naive::accepted_max(framing, usize::from(max) + 1),
        stream: &stream,
    };
    let expected = case.expected();
    case.check(&case.play(cuts), &expected);
    // All at once, and byte for byte.
    case.check(&case.play(&[u8::MAX; 12]), &expected);
    case.check(&case.play(&[0; 12]), &expected);
});

struct Case<'a> {
    optional: bool,
    framing: u8,
    max: usize,
    stream: &'a [u8],
}

/// What became of it.
#[derive(Debug)]
struct Outcome {
    header: Option<Header>,
    frames: Vec<Vec<u8>>,
    end: CloseReason,
    /// The bytes could be the beginning of a ClientHello: then no frame is delivered, and the end says so.
    may_be_tls: bool,
}

impl Case<'_> {
    fn expected(&self) -> Outcome {
        let (header, behind) = match naive_header(self.stream) {
            _ if self.stream.is_empty() => return Outcome::none(CloseReason::ClosedEarly),
            Found::Header(header, length) => (Some(header), &self.stream[length..]),
            Found::Nothing if self.optional => (None, self.stream),
            Found::Nothing | Found::Wrong | Found::Part => {
                return Outcome::none(CloseReason::BadProxyHeader)
            }
        };
        let (frames, end) = naive::whole(self.framing, self.max, behind);
        // Two bytes decide where a header announces too long a frame.
        let begun = matches!(behind, [0x16, 3, ..]) && end == CloseReason::FrameTooLarge;
        let hello = matches!(behind, [0x16, 3, 0..=4, ..]) || begun;
        let hello = hello && self.framing != 0;
        Outcome {
            header,
            may_be_tls: hello,
            frames,
            end,
        }
    }

    fn play(&self, cuts: &[u8; 12]) -> Outcome {
        let mode = if self.optional {
            ProxyProtocol::Optional
        } else {
            ProxyProtocol::Required
        };
        let mut listen = Listen::tcp("127.0.0.1:0", Action::framing(self.framing));
        listen.conn.max_frame = Some(self.max);
        listen.conn.handshake_timeout = Duration::MAX;
        listen.conn.idle_timeout = Duration::MAX;
        listen.conn.frame_timeout = Duration::MAX;
        listen.proxy_protocol = mode;
        listen.trusted_proxies = Some(AccessRules::allow_all());
        let mut model = ConnModel::new(&listen).expect("settings that work");
        let apply = |model: &mut ConnModel, input| model.apply(&input).expect("it holds");
        apply(&mut model, Input::OnFrame(Vec::new()));
        let mut rest = self.stream;
        let mut cuts = cuts.iter().cycle();
        while !rest.is_empty() {
            let (piece, behind) = rest.split_at(match *cuts.next().expect("a cycle") {
                u8::MAX => rest.len(),
                cut => rest.len().min(1 + usize::from(cut)),
            });
            apply(&mut model, Input::Bytes(piece.to_vec()));
            apply(&mut model, Input::Turn);
            rest = behind;
        }
        let (frames, end) = strings::finish(&mut model);
        assert!(!end.reset);
        Outcome {
            frames,
            header: model.proxy().map(Header::of),
            end: end.reason,
            may_be_tls: false,
        }
    }

    fn check(&self, found: &Outcome, expected: &Outcome) {
        assert_eq!(found.header, expected.header);
        let is_tls = expected.may_be_tls && found.end == CloseReason::UnexpectedTls;
        if is_tls {
            assert!(found.frames.is_empty(), "a hello is no frame: {found:?}");
        } else if self.framing == 0 {
            assert_eq!(found.frames.concat(), expected.frames.concat());
            assert!(found.frames.iter().all(|frame| !frame.is_empty()));
        } else {
            assert_eq!(found.frames, expected.frames);
        }
        assert!(
            found.end == expected.end || is_tls,
            "{found:?}, not {expected:?}"
        );
    }
}

impl Outcome {
    fn none(end: CloseReason) -> Self {
        Self {
            header: None,
            frames: Vec::new(),
            end,
            may_be_tls: false,
        }
    }
}

// --- a reader of headers that has everything at once ---

#[derive(Debug, PartialEq, Eq)]
struct Header {
    version: u8,
    addresses: Addresses,
    /// All but padding.
    tlvs: Vec<(u8, Vec<u8>)>,
}

#[derive(Debug, PartialEq, Eq)]
enum Addresses {
    None,
    Tcp(SocketAddr, SocketAddr),
    Unix(Vec<u8>, Vec<u8>),
}

enum Found {
    Header(Header, usize),
    /// It may become one.
    Part,
    Wrong,
    /// Something else.
    Nothing,
}

impl Header {
    fn of(header: &ProxyHeader) -> Self {
        Self {
            version: header.version,
            addresses: match (&header.source, &header.destination) {
                (None, None) => Addresses::None,
                (Some(Addr::Tcp(source)), Some(Addr::Tcp(destination))) => {
                    Addresses::Tcp(*source, *destination)
                }
                (Some(source), Some(destination)) => {
                    Addresses::Unix(sun_path(source), sun_path(destination))
                }
                other => panic!("one end: {other:?}"),
            },
            tlvs: header
                .tlvs
                .iter()
                .map(|(kind, value)| (kind, value.to_vec()))
                .collect(),
        }
    }
}

fn naive_header(bytes: &[u8]) -> Found {
    let agrees = |signature: &[u8]| bytes.iter().zip(signature).all(|(one, other)| one == other);
    if agrees(b"PROXY ") {
        return line(bytes);
    }
    if !agrees(&SIGNATURE) {
        return Found::Nothing;
    }
    let Some(&version) = bytes.get(12).filter(|_| bytes.len() >= 16) else {
        return Found::Part;
    };
    let whole = 16 + usize::from(bytes[14]) * 256 + usize::from(bytes[15]);
    if !matches!(version, 0x20 | 0x21) || whole > LONGEST {
        return Found::Wrong;
    }
    if bytes.len() < whole {
        return Found::Part;
    }
    match block(&bytes[..whole]) {
        Some(header) => Found::Header(header, whole),
        None => Found::Wrong,
    }
}

/// Version 1.
fn line(bytes: &[u8]) -> Found {
    let Some(end) = bytes.iter().take(107).position(|&byte| byte == 10) else {
        return if bytes.len() < 107 {
            Found::Part
        } else {
            Found::Wrong
        };
    };
    if bytes[end - 1] != 13 {
        return Found::Wrong;
    }
    let mut words = bytes[6..end - 1].split(|&byte| byte == 32);
    let addresses = match (words.next(), &words.collect::<Vec<_>>()[..]) {
        (Some(b"UNKNOWN"), _) => Some(Addresses::None),
        (Some(b"TCP4"), [from, to, one, other]) => pair(ipv4, from, to, one, other),
        (Some(b"TCP6"), [from, to, one, other]) => pair(ipv6, from, to, one, other),
        _ => None,
    };
    match addresses {
        Some(addresses) => {
            let header = Header {
                version: 1,
                addresses,
                tlvs: Vec::new(),
            };
            Found::Header(header, end + 1)
        }
        None => Found::Wrong,
    }
}

fn pair(
    address: fn(&[u8]) -> Option<IpAddr>,
    from: &[u8],
    to: &[u8],
    one: &[u8],
    other: &[u8],
) -> Option<Addresses> {
    let (one, other) = (decimal(one, 65_535)?, decimal(other, 65_535)?);
    let from = SocketAddr::new(address(from)?, one as u16);
    Some(Addresses::Tcp(
        from,
        SocketAddr::new(address(to)?, other as u16),
    ))
}

/// As people write numbers: no sign, no zero in front.
fn decimal(word: &[u8], most: u32) -> Option<u32> {
    let value = word.iter().try_fold(0, |value: u32, &digit| {
        let digit = char::from(digit).to_digit(10)?;
        value.checked_mul(10)?.checked_add(digit)
    })?;
    (value <= most && value.to_string().as_bytes() == word).then_some(value)
}

fn ipv4(word: &[u8]) -> Option<IpAddr> {
    let numbers: Vec<u8> = word
        .split(|&byte| byte == b'.')
        .map(|word| decimal(word, 255).map(|number| number as u8))
        .collect::<Option<_>>()?;
    Some(Ipv4Addr::from(<[u8; 4]>::try_from(numbers).ok()?).into())
}

/// RFC 4291, section 2.2.
fn ipv6(word: &[u8]) -> Option<IpAddr> {
    let gap = word.windows(2).position(|two| two == b"::");
    let groups = match gap {
        None => groups(word, true)?,
        Some(gap) => {
            let (head, tail) = (&word[..gap], &word[gap + 2..]);
            let head = if head.is_empty() {
                Vec::new()
            } else {
                groups(head, false)?
            };
            let tail = if tail.is_empty() {
                Vec::new()
            } else {
                groups(tail, true)?
            };
            // A gap stands for at least one group.
            let missing = 8_usize
                .checked_sub(head.len() + tail.len())
                .filter(|&missing| missing > 0)?;
            [head, vec![0; missing], tail].concat()
        }
    };
    Some(Ipv6Addr::from(<[u16; 8]>::try_from(groups).ok()?).into())
}

/// Groups of up to four hexadecimal digits; the last two may be an address of IPv4.
fn groups(word: &[u8], at_the_end: bool) -> Option<Vec<u16>> {
    let parts: Vec<&[u8]> = word.split(|&byte| byte == b':').collect();
    let mut groups = Vec::new();
    for (at, part) in parts.iter().enumerate() {
        if at_the_end && at + 1 == parts.len() && part.contains(&b'.') {
            let Some(IpAddr::V4(address)) = ipv4(part) else {
                return None;
            };
            let [a, b, c, d] = address.octets();
            groups.extend([u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d])]);
            continue;
        }
        if part.is_empty() || part.len() > 4 {
            return None;
        }
        let group = part.iter().try_fold(0, |group, &digit| {
            let digit = char::from(digit).to_digit(16)?;
            Some(group << 4 | digit as u16)
        });
        groups.push(group?);
    }
    Some(groups)
}

/// Version 2, from its first byte to its last.
fn block(header: &[u8]) -> Option<Header> {
    let local = header[12] == 0x20;
    let (family, transport) = (header[13] / 16, header[13] % 16);
    let field = |from: usize, length: usize| header.get(from..from + length);
    let port = |at: usize| Some(u16::from_be_bytes(field(at, 2)?.try_into().ok()?));
    let (addresses, tlvs) = match (family, transport) {
        _ if local => (Addresses::None, header.len()),
        (0, 0..=2) => (Addresses::None, 16),
        (1, 1) => {
            let address = |at| Some(IpAddr::from(<[u8; 4]>::try_from(field(at, 4)?).ok()?));
            let from = SocketAddr::new(address(16)?, port(24)?);
            (
                Addresses::Tcp(from, SocketAddr::new(address(20)?, port(26)?)),
                28,
            )
        }
        (2, 1) => {
            let address = |at| Some(IpAddr::from(<[u8; 16]>::try_from(field(at, 16)?).ok()?));
            let from = SocketAddr::new(address(16)?, port(48)?);
            (
                Addresses::Tcp(from, SocketAddr::new(address(32)?, port(50)?)),
                52,
            )
        }
        (3, 1) => {
            let path = |at| {
                let mut path = field(at, 108)?.to_vec();
                while path.last() == Some(&0) {
                    path.pop();
                }
                Some(path)
            };
            (Addresses::Unix(path(16)?, path(124)?), 232)
        }
        _ => return None,
    };
    let found = tlvs_of(&header[tlvs..])?;
    let mut checksums = found.iter().filter(|tlv| tlv.kind == 3);
    if let Some(checksum) = checksums.next() {
        let at = tlvs + checksum.at;
        let mut zeroed = header.to_vec();
        zeroed.get_mut(at..at + 4)?.fill(0);
        if checksum.value.len() != 4
            || checksums.next().is_some()
            || checksum.value != crc32c(&zeroed).to_be_bytes()
        {
            return None;
        }
    }
    for tlv in &found {
        let is_good = match tlv.kind {
            5 => tlv.value.len() <= 128,
            0x20 => tlv
                .value
                .get(5..)
                .is_some_and(|inside| tlvs_of(inside).is_some()),
            _ => true,
        };
        if !is_good {
            return None;
        }
    }
    Some(Header {
        version: 2,
        addresses,
        tlvs: found
            .into_iter()
            .filter(|tlv| tlv.kind != 4)
            .map(|tlv| (tlv.kind, tlv.value.to_vec()))
            .collect(),
    })
}

struct Tlv<'a> {
    kind: u8,
    value: &'a [u8],
    /// Where the value begins.
    at: usize,
}

fn tlvs_of(bytes: &[u8]) -> Option<Vec<Tlv<'_>>> {
    let mut all = Vec::new();
    let mut at = 0;
    while at < bytes.len() {
        let length = usize::from(*bytes.get(at + 1)?) << 8 | usize::from(*bytes.get(at + 2)?);
        all.push(Tlv {
            kind: bytes[at],
            value: bytes.get(at + 3..at + 3 + length)?,
            at: at + 3,
        });
        at += 3 + length;
    }
    Some(all)
}

/// RFC 3720, appendix B.4, by the table.
fn crc32c(bytes: &[u8]) -> u32 {
    let table: Vec<u32> = (0..256)
        .map(|byte| {
            (0..8).fold(byte, |sum, _| {
                if sum % 2 == 1 {
                    sum / 2 ^ 0x82F6_3B78
                } else {
                    sum / 2
                }
            })
        })
        .collect();
    !bytes.iter().fold(u32::MAX, |sum, &byte| {
        table[usize::from(sum.to_le_bytes()[0] ^ byte)] ^ sum >> 8
    })
}

/// Puts the right sum where a header of version 2 has one.
fn mend_checksum(stream: &mut [u8]) {
    if stream.len() < 16 || stream[..12] != SIGNATURE {
        return;
    }
    let length = 16 + usize::from(stream[14]) * 256 + usize::from(stream[15]);
    let tlvs = match stream[13] {
        0x00 => 16,
        0x11 => 28,
        0x21 => 52,
        0x31 => 232,
        _ => return,
    };
    let Some(header) = stream
        .get_mut(..length)
        .filter(|header| header.len() >= tlvs)
    else {
        return;
    };
    let found = tlvs_of(&header[tlvs..]).unwrap_or_default();
    let sum = found
        .iter()
        .find(|tlv| tlv.kind == 3 && tlv.value.len() == 4);
    if let Some(at) = sum.map(|tlv| tlvs + tlv.at) {
        header[at..at + 4].fill(0);
        let sum = crc32c(header).to_be_bytes();
        header[at..at + 4].copy_from_slice(&sum);
    }
}
