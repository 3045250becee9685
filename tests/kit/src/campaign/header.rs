//! What clients say before everything else: PROXY headers of every kind, good and bad, and what they mean.

use std::net::{IpAddr, SocketAddr};

use portcullis::sim::Random;
use portcullis::{Addr, ProxyHeader};

use crate::naive::sun_path;

/// Networks and hosts of the campaign. Some are the same host in two forms.
pub const HOSTS: [&str; 8] = [
    "10.0.0.1",
    "10.0.0.2",
    "10.0.1.7",
    "192.0.2.77",
    "::ffff:10.0.0.1",
    "2001:db8::5",
    "2001:db8::6",
    "2001:db8:0:1::6",
];

pub fn host(random: &mut Random) -> IpAddr {
    let host = random.pick(&HOSTS).expect("there are some");
    host.parse().expect("an address")
}

/// What a client begins with.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Opening {
    pub bytes: Vec<u8>,
    /// What the bytes mean; `None` if they are no header.
    pub says: Option<Says>,
}

/// What a header says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Says {
    version: u8,
    origin: Origin,
    tlvs: Vec<(u8, Vec<u8>)>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Origin {
    Unknown,
    Tcp(SocketAddr, SocketAddr),
    Unix(Vec<u8>, Vec<u8>),
}

impl Says {
    /// The source that the proxy names.
    pub fn source(&self) -> Option<IpAddr> {
        match self.origin {
            Origin::Tcp(source, _) => Some(source.ip()),
            Origin::Unknown | Origin::Unix(..) => None,
        }
    }

    /// The server has understood it.
    pub fn is(&self, header: &ProxyHeader) -> bool {
        let origin = match (&header.source, &header.destination) {
            (None, None) => Origin::Unknown,
            (Some(Addr::Tcp(source)), Some(Addr::Tcp(destination))) => {
                Origin::Tcp(*source, *destination)
            }
            (Some(source), Some(destination)) => {
                Origin::Unix(sun_path(source), sun_path(destination))
            }
            _ => return false,
        };
        let tlvs = header
            .tlvs
            .iter()
            .map(|(kind, value)| (kind, value.to_vec()));
        self.version == header.version
            && self.origin == origin
            && tlvs.eq(self.tlvs.iter().cloned())
    }
}

impl Opening {
    /// A header that names this source, or one of any kind; sometimes bytes that are no header.
    pub fn draw(random: &mut Random) -> Self {
        let mut opening = match random.below(10) {
            0..=3 => v1(random),
            _ => v2(random, None),
        };
        if random.chance(120) {
            opening.spoil(random);
        }
        opening
    }

    /// A good one, for a client of this host.
    pub fn of(source: IpAddr, random: &mut Random) -> Self {
        v2(random, Some(source))
    }

    /// What comes is no header any more.
    fn spoil(&mut self, random: &mut Random) {
        self.says = None;
        let last = self.bytes.len() - 1;
        match (random.below(3), self.bytes[0]) {
            // Of version 1: another family, and no carriage return.
            (0, b'P') => self.bytes[6] = b'X',
            (_, b'P') => self.bytes[last - 1] = b' ',
            // Of version 2: another version, another command, or an unknown family without a
            // command to ignore it.
            (0, _) => self.bytes[12] = 0x31,
            (1, _) => self.bytes[12] = 0x22,
            _ => self.bytes[12..14].copy_from_slice(&[0x21, 0xF1]),
        }
    }
}

fn v1(random: &mut Random) -> Opening {
    let (line, origin) = if random.chance(200) {
        let words = ["PROXY UNKNOWN", "PROXY UNKNOWN whatever they say 1 2"];
        (words[random.below(2)].to_owned(), Origin::Unknown)
    } else {
        let (source, destination) = two(host(random), random);
        let family = if source.is_ipv4() { "TCP4" } else { "TCP6" };
        let line = format!(
            "PROXY {family} {} {} {} {}",
            source.ip(),
            destination.ip(),
            source.port(),
            destination.port()
        );
        (line, Origin::Tcp(source, destination))
    };
    Opening {
        bytes: format!("{line}\r\n").into_bytes(),
        says: Some(Says {
            version: 1,
            origin,
            tlvs: Vec::new(),
        }),
    }
}

/// A client and where it went, of one family.
fn two(source: IpAddr, random: &mut Random) -> (SocketAddr, SocketAddr) {
    let destination: &str = if source.is_ipv4() {
        "198.51.100.2"
    } else {
        "2001:db8:f::2"
    };
    let destination = destination.parse().expect("an address");
    let port = [0, 1, 50_000, u16::MAX][random.below(4)];
    (
        SocketAddr::new(source, port),
        SocketAddr::new(destination, 443),
    )
}

fn v2(random: &mut Random, source: Option<IpAddr>) -> Opening {
    let kind = if source.is_some() {
        9
    } else {
        random.below(10)
    };
    let source = source.unwrap_or_else(|| host(random));
    // LOCAL, with any family; UNSPEC; Unix; else TCP.
    let (command, family, block, origin) = match kind {
        0 => (
            0x20,
            [0, 0x11, 0xFF][random.below(3)],
            vec![7; random.below(20)],
            Origin::Unknown,
        ),
        1 => (0x21, random.below(3) as u8, Vec::new(), Origin::Unknown),
        2 => {
            let mut block = vec![0; 216];
            block[..5].copy_from_slice(b"/here");
            block[108..112].copy_from_slice(b"\0abs");
            (
                0x21,
                0x31,
                block,
                Origin::Unix(b"/here".to_vec(), b"\0abs".to_vec()),
            )
        }
        _ => {
            let (source, destination) = two(source, random);
            let (family, mut block) = match (source.ip(), destination.ip()) {
                (IpAddr::V4(from), IpAddr::V4(to)) => (0x11, [from.octets(), to.octets()].concat()),
                (IpAddr::V6(from), IpAddr::V6(to)) => (0x21, [from.octets(), to.octets()].concat()),
                _ => unreachable!("two of one family"),
            };
            block.extend(source.port().to_be_bytes());
            block.extend(destination.port().to_be_bytes());
            (0x21, family, block, Origin::Tcp(source, destination))
        }
    };
    let mut bytes = b"\r\n\r\n\0\r\nQUIT\n".to_vec();
    bytes.extend([command, family, 0, 0]);
    bytes.extend(block);
    let mut tlvs = Vec::new();
    if command == 0x21 {
        add_tlvs(&mut bytes, &mut tlvs, random);
    }
    let length = (bytes.len() - 16) as u16;
    bytes[14..16].copy_from_slice(&length.to_be_bytes());
    if let Some(&mut (3, ref mut sum)) = tlvs.last_mut() {
        let at = bytes.len() - 4;
        *sum = checksum(&bytes).to_be_bytes().to_vec();
        bytes[at..].copy_from_slice(sum);
    }
    Opening {
        bytes,
        says: Some(Says {
            version: 2,
            origin,
            tlvs,
        }),
    }
}

/// Some TLVs, among them some that say nothing; the checksum, still zero, is the last.
fn add_tlvs(bytes: &mut Vec<u8>, tlvs: &mut Vec<(u8, Vec<u8>)>, random: &mut Random) {
    let mut add = |kind: u8, value: Vec<u8>| {
        bytes.push(kind);
        bytes.extend((value.len() as u16).to_be_bytes());
        bytes.extend(&value);
        // Padding is not told.
        if kind != 4 {
            tlvs.push((kind, value));
        }
    };
    for _ in 0..random.below(4) {
        match random.below(6) {
            0 => add(1, b"h2".to_vec()),
            1 => add(2, b"example.com".to_vec()),
            2 => add(4, vec![0; random.below(40)]),
            3 => add(5, vec![0x55; random.between(1, 128)]),
            4 => add(0x20, b"\x01\0\0\0\0\x21\0\x07TLSv1.3".to_vec()),
            _ => add(0xE0 + random.below(16) as u8, vec![1; random.below(300)]),
        }
    }
    if random.chance(400) {
        add(3, vec![0; 4]);
    }
}

/// CRC-32C (RFC 3720, appendix B.4), bit by bit.
fn checksum(bytes: &[u8]) -> u32 {
    let mut sum = u32::MAX;
    for byte in bytes {
        for bit in 0..8 {
            let odd = (sum ^ u32::from(byte >> bit)) & 1;
            sum = (sum >> 1) ^ (odd * 0x82F6_3B78);
        }
    }
    !sum
}
