//! Headers as proxies send them, and input that is almost one.

use super::v2::MAX_LENGTH;
use super::*;
use crate::addr::{Addr, UnixAddr};

type Ends = Option<(Addr, Addr)>;

fn tcp(source: &str, destination: &str) -> Ends {
    let addr = |text: &str| text.parse().expect("an address");
    Some((addr(source), addr(destination)))
}

#[track_caller]
fn header(input: &[u8]) -> (ProxyHeader, usize) {
    match front(input) {
        Front::Header(header, taken) => (*header, taken),
        other => panic!("{other:?}"),
    }
}

#[track_caller]
fn error(input: &[u8]) -> &'static str {
    match front(input) {
        Front::Bad(ProxyError(words)) => words,
        other => panic!("{:?}: {other:?}", String::from_utf8_lossy(input)),
    }
}

/// A version 2 header with this command, family and block.
fn v2(command: u8, family: u8, block: &[u8]) -> Vec<u8> {
    let length = u16::try_from(block.len()).expect("fits").to_be_bytes();
    [v2::SIGNATURE, &[command, family], &length, block].concat()
}

fn tlv(kind: u8, value: &[u8]) -> Vec<u8> {
    let length = u16::try_from(value.len()).expect("fits").to_be_bytes();
    [&[kind], &length[..], value].concat()
}

const IPV4: [u8; 12] = [192, 0, 2, 1, 198, 51, 100, 2, 0xC3, 0x50, 0x01, 0xBB];

fn ipv6() -> Vec<u8> {
    let from: core::net::Ipv6Addr = "2001:db8::1".parse().expect("an address");
    let to: core::net::Ipv6Addr = "2001:db8::2".parse().expect("an address");
    [&from.octets()[..], &to.octets(), &[0xC3, 0x50, 0x01, 0xBB]].concat()
}

/// Valid headers of every kind.
fn good() -> Vec<(Vec<u8>, Ends)> {
    let ssl = tlv(
        0x20,
        &[
            &[7, 0, 0, 0, 0][..],
            &tlv(0x22, b"device 7"),
            &tlv(0x21, b"TLSv1.3"),
        ]
        .concat(),
    );
    let tlvs = [
        tlv(1, b"h2"),
        tlv(2, b"example.org"),
        tlv(4, &[0; 9]),
        tlv(0xE0, b"?"),
        ssl,
    ]
    .concat();
    let unix = |from: &[u8], to: &[u8]| {
        let mut block = vec![0; 216];
        block[..from.len()].copy_from_slice(from);
        block[108..108 + to.len()].copy_from_slice(to);
        block
    };
    let v4 = tcp("192.0.2.1:50000", "198.51.100.2:443");
    let v6 = tcp("[2001:db8::1]:50000", "[2001:db8::2]:443");
    vec![
        (
            b"PROXY TCP4 192.0.2.1 198.51.100.2 50000 443\r\n".to_vec(),
            v4.clone(),
        ),
        (
            b"PROXY TCP6 2001:db8::1 2001:DB8::2 50000 443\r\n".to_vec(),
            v6.clone(),
        ),
        (
            b"PROXY TCP4 255.255.255.255 0.0.0.0 65535 0\r\n".to_vec(),
            tcp("255.255.255.255:65535", "0.0.0.0:0"),
        ),
        (b"PROXY UNKNOWN\r\n".to_vec(), None),
        // The longest possible line: 107 bytes with its end.
        (
            b"PROXY UNKNOWN ffff:f...f:ffff ffff:f...f:ffff 65535 65535 \
              ........................................ ....\r\n"
                .to_vec(),
            None,
        ),
        (v2(0x21, 0x11, &IPV4), v4.clone()),
        (v2(0x21, 0x21, &ipv6()), v6),
        (v2(0x21, 0x11, &[&IPV4[..], &tlvs].concat()), v4.clone()),
        (
            v2(0x21, 0x11, &[&IPV4[..], &tlv(0xEE, &[7; 4000])].concat()),
            v4,
        ),
        (v2(0x20, 0x00, &[]), None),
        // LOCAL with any block: it is skipped.
        (v2(0x20, 0x11, &IPV4), None),
        (v2(0x20, 0xFF, b"whatever"), None),
        (v2(0x21, 0x00, &tlv(2, b"example.org")), None),
        (
            v2(0x21, 0x31, &unix(b"", b"/run/web.sock")),
            Some((
                UnixAddr::unnamed().into(),
                "unix:/run/web.sock".parse().expect("a path"),
            )),
        ),
        (b"PROXY UNKNOWN \xFF is no text\r\n".to_vec(), None),
    ]
}

/// Whole headers in every cut; the bytes behind them are untouched.
#[test]
fn good_headers_in_every_cut() {
    for (bytes, origin) in good() {
        for cut in 0..bytes.len() {
            assert_eq!(
                front(&bytes[..cut]),
                Front::More,
                "{:?}",
                String::from_utf8_lossy(&bytes[..cut])
            );
        }
        for behind in [&b""[..], b"\x16\x03\x01", b"PROXY "] {
            let (found, taken) = header(&[&bytes[..], behind].concat());
            let ends = found.source.zip(found.destination);
            assert_eq!((ends, taken), (origin.clone(), bytes.len()));
        }
    }
}

#[test]
fn facts_about_tls_are_read() {
    let (bytes, _) = &good()[7];
    let (found, _) = header(bytes);
    let tlvs = &found.tlvs;
    assert_eq!(
        (tlvs.get(0x01), tlvs.get(0x02)),
        (Some(&b"h2"[..]), Some(&b"example.org"[..]))
    );
    assert_eq!(
        (tlvs.get(0xE0), tlvs.get(0x05), tlvs.get(0x30)),
        (Some(&b"?"[..]), None, None)
    );
    assert_eq!(
        tlvs.iter().map(|(kind, _)| kind).collect::<Vec<_>>(),
        [1, 2, 0xE0, 0x20],
        "padding is left out"
    );
    let ssl = tlvs.ssl().expect("a TLS part");
    assert!(ssl.is_tls() && ssl.has_certificate() && ssl.is_verified());
    assert_eq!(
        (ssl.get(0x22), ssl.get(0x21), ssl.get(0x23)),
        (Some("device 7"), Some("TLSv1.3"), None)
    );
    let unverified = v2(
        0x21,
        0x11,
        &[&IPV4[..], &tlv(0x20, &[7, 0, 0, 0, 1])].concat(),
    );
    let ssl = header(&unverified).0;
    assert!(!ssl.tlvs.ssl().expect("a TLS part").is_verified());
}

/// Padding leaves nothing behind, wherever it stands; the rest is kept and its memory known.
#[test]
fn padding_is_not_kept() {
    let facts = [tlv(2, b"example.org"), tlv(0xE0, &[7; 100])].concat();
    let pad = tlv(4, &[0; 5000]);
    let padded = [&IPV4[..], &pad, &facts[..14], &pad, &facts[14..], &pad].concat();
    let (padded, _) = header(&v2(0x21, 0x11, &padded));
    let (plain, _) = header(&v2(0x21, 0x11, &[&IPV4[..], &facts].concat()));
    assert_eq!(padded, plain);
    let (bare, _) = header(&v2(0x21, 0x11, &IPV4));
    assert_eq!(padded.memory(), bare.memory() + facts.len());
}

/// Invalid lines are errors, and never "no header".
#[test]
fn lines_that_are_almost_headers() {
    for line in [
        "proxy TCP4 192.0.2.1 198.51.100.2 1 2\r\n",
        "PROXYTCP4 192.0.2.1 198.51.100.2 1 2\r\n",
        "GET / HTTP/1.0\r\n",
        "\u{16}\u{3}\u{1}",
        " PROXY TCP4 192.0.2.1 198.51.100.2 1 2\r\n",
    ] {
        assert_eq!(front(line.as_bytes()), Front::Other, "{line:?}");
    }
    for line in [
        "PROXY tcp4 192.0.2.1 198.51.100.2 1 2\r\n",
        "PROXY TCP5 192.0.2.1 198.51.100.2 1 2\r\n",
        "PROXY UDP4 192.0.2.1 198.51.100.2 1 2\r\n",
        "PROXY \r\n",
        "PROXY TCP4\r\n",
        "PROXY TCP4 192.0.2.1 198.51.100.2 1\r\n",
        "PROXY TCP4 192.0.2.1 198.51.100.2 1 2 3\r\n",
        "PROXY TCP4 192.0.2.1 198.51.100.2 1 2 \r\n",
        "PROXY  TCP4 192.0.2.1 198.51.100.2 1 2\r\n",
        "PROXY TCP4 192.0.2.1  198.51.100.2 1 2\r\n",
        "PROXY TCP4\t192.0.2.1 198.51.100.2 1 2\r\n",
        "PROXY TCP4 192.0.2.1 198.51.100.2 1 2\n",
        "PROXY TCP4 192.0.2.1 198.51.100.2 1\r2\r\n",
        "PROXY TCP4 192.0.2.1 198.51.100.2 1 65536\r\n",
        "PROXY TCP4 192.0.2.1 198.51.100.2 1 02\r\n",
        "PROXY TCP4 192.0.2.1 198.51.100.2 1 00\r\n",
        "PROXY TCP4 192.0.2.1 198.51.100.2 +1 2\r\n",
        "PROXY TCP4 192.0.2.1 198.51.100.2 -1 2\r\n",
        "PROXY TCP4 192.0.2.1 198.51.100.2 1 0x2\r\n",
        "PROXY TCP4 192.0.2.01 198.51.100.2 1 2\r\n",
        "PROXY TCP4 192.0.2 198.51.100.2 1 2\r\n",
        "PROXY TCP4 192.0.2.256 198.51.100.2 1 2\r\n",
        "PROXY TCP4 2001:db8::1 2001:db8::2 1 2\r\n",
        "PROXY TCP6 192.0.2.1 198.51.100.2 1 2\r\n",
        "PROXY TCP6 fe80::1%eth0 2001:db8::2 1 2\r\n",
        "PROXY TCP6 [2001:db8::1] 2001:db8::2 1 2\r\n",
        "PROXY TCP4 192.0.2.1\0 198.51.100.2 1 2\r\n",
        "PROXY TCP4 192.0.2.1 198.51.100.2 1 \u{661}\r\n",
    ] {
        error(line.as_bytes());
    }
    error(b"PROXY TCP4 \xFF 198.51.100.2 1 2\r\n");
    // One byte too long, and a line without an end.
    let long = |length: usize| [&b"PROXY UNKNOWN "[..], &vec![b'.'; length - 16], b"\r\n"].concat();
    assert_eq!(header(&long(107)).1, 107);
    assert_eq!(error(&long(108)), "no end of line in 107 bytes");
    assert_eq!(front(&long(400)[..106]), Front::More);
    assert_eq!(error(&long(400)[..107]), "no end of line in 107 bytes");
}

#[test]
fn blocks_that_are_almost_headers() {
    let with_tlvs = |tlvs: &[u8]| v2(0x21, 0x11, &[&IPV4[..], tlvs].concat());
    for (bytes, words) in [
        (v2(0x11, 0x11, &IPV4), "a version other than 2"),
        (v2(0x31, 0x11, &IPV4), "a version other than 2"),
        (
            v2(0x22, 0x11, &IPV4),
            "a command other than LOCAL and PROXY",
        ),
        (v2(0x21, 0x41, &IPV4), "an unknown address family"),
        (v2(0x21, 0x13, &IPV4), "an unknown transport"),
        (v2(0x21, 0x03, &IPV4), "an unknown transport"),
        (v2(0x21, 0x10, &IPV4), "a family without a transport"),
        (v2(0x21, 0x12, &IPV4), "datagrams on a stream"),
        (v2(0x21, 0x22, &ipv6()), "datagrams on a stream"),
        (
            v2(0x21, 0x11, &IPV4[..11]),
            "a block that is shorter than its addresses",
        ),
        (
            v2(0x21, 0x21, &ipv6()[..35]),
            "a block that is shorter than its addresses",
        ),
        (
            v2(0x21, 0x31, &[0; 215]),
            "a block that is shorter than its addresses",
        ),
        (with_tlvs(&[1]), "a TLV that ends behind the header"),
        (with_tlvs(&[1, 0]), "a TLV that ends behind the header"),
        (with_tlvs(&[1, 0, 1]), "a TLV that ends behind the header"),
        (
            with_tlvs(&tlv(5, &[0; 129])),
            "a unique id of more than 128 bytes",
        ),
        (
            with_tlvs(&tlv(3, &[0; 3])),
            "a checksum that is not of four bytes",
        ),
        (with_tlvs(&tlv(3, &[1, 2, 3, 4])), "a wrong checksum"),
        (
            with_tlvs(&tlv(0x20, &[0; 4])),
            "a TLS part of less than five bytes",
        ),
        (
            with_tlvs(&tlv(0x20, &[0, 0, 0, 0, 0, 0x22, 0, 1])),
            "a TLV that ends behind the header",
        ),
    ] {
        assert_eq!(error(&bytes), words);
    }
    // Refused by its length, before the block arrives.
    let mut long = v2(0x21, 0x11, &vec![0; MAX_LENGTH - 16 + 1]);
    assert_eq!(error(&long[..16]), "more than 16 KiB");
    long = v2(
        0x21,
        0x11,
        &[&IPV4[..], &tlv(0xEE, &vec![0; MAX_LENGTH - 16 - 12 - 3])].concat(),
    );
    assert_eq!(header(&long).1, MAX_LENGTH);
    // A signature with another byte is no header, and no beginning of one.
    for at in 0..v2::SIGNATURE.len() {
        let mut bytes = v2(0x21, 0x11, &IPV4);
        bytes[at] ^= 0x20;
        assert_eq!(front(&bytes), Front::Other);
    }
}

/// The checksum covers the whole header, its own four bytes as zeros, wherever it is.
#[test]
fn a_checksum_is_checked() {
    let before = tlv(2, b"example.org");
    let block = [&IPV4[..], &before, &tlv(3, &[0; 4]), &tlv(4, &[0; 5])].concat();
    let mut bytes = v2(0x21, 0x11, &block);
    let place = 16 + IPV4.len() + before.len() + 3;
    // By an independent implementation: bit by bit, over the header with zeros.
    let mut sum = u32::MAX;
    for byte in &bytes {
        for bit in 0..8 {
            let carry = (sum ^ u32::from(byte >> bit)) & 1;
            sum = (sum >> 1) ^ (carry * 0x82F6_3B78);
        }
    }
    bytes[place..place + 4].copy_from_slice(&(!sum).to_be_bytes());
    header(&bytes);
    // All bytes but the checksum's type: without a checksum none is checked.
    for at in (16..bytes.len()).filter(|&at| at != place - 3) {
        for bit in 0..8 {
            let mut changed = bytes.clone();
            changed[at] ^= 1 << bit;
            assert!(
                matches!(front(&changed), Front::Bad(_)),
                "bit {bit} of byte {at}"
            );
        }
    }
}

/// Any change of one byte gives a result, whose length is within the input.
#[test]
fn every_change_of_one_byte_has_a_result() {
    for (bytes, _) in good() {
        for at in 0..bytes.len().min(150) {
            for value in 0..=255 {
                let mut changed = bytes.clone();
                changed[at] = value;
                if let Front::Header(_, taken) = front(&changed) {
                    assert!(taken <= changed.len());
                }
            }
        }
    }
}
