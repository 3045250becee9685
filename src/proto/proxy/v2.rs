//! Version 2: binary (section 2.2).

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::error::ProxyError;
use super::header::{Ends, Parsed, ProxyHeader};
use super::tlv::ProxyTlvs;
use crate::addr::{Addr, UnixAddr};

pub(super) const SIGNATURE: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";
/// The length of signature, version and command, family and transport, and length.
const FIXED: usize = 16;
/// The longest header that is read: haproxy's own buffer.
pub(in crate::proto) const MAX_LENGTH: usize = 16 * 1024;

const LOCAL: u8 = 0x0;
const PROXY: u8 = 0x1;

pub(super) fn parse(input: &[u8]) -> Parsed {
    let Some(&[version_command, family_transport, high, low]) = input.get(SIGNATURE.len()..FIXED)
    else {
        return Ok(None);
    };
    if version_command >> 4 != 2 {
        return Err(ProxyError("a version other than 2"));
    }
    let command = version_command & 0xF;
    if command > PROXY {
        return Err(ProxyError("a command other than LOCAL and PROXY"));
    }
    let taken = FIXED + usize::from(u16::from_be_bytes([high, low]));
    if taken > MAX_LENGTH {
        return Err(ProxyError("more than 16 KiB"));
    }
    let Some(header) = input.get(..taken) else {
        return Ok(None);
    };
    let body = header.get(FIXED..).unwrap_or_default();
    if command == LOCAL {
        // "The receiver must accept this connection as valid and must use the real connection
        // endpoints and discard the protocol block".
        return Ok(Some((header_of(None, ProxyTlvs::default()), taken)));
    }
    let (ends, length) = ends(family_transport, body)?;
    let tlvs = ProxyTlvs::parse(header, FIXED + length)?;
    Ok(Some((header_of(ends, tlvs), taken)))
}

fn header_of(ends: Ends, tlvs: ProxyTlvs) -> ProxyHeader {
    let (source, destination) = ends.unzip();
    ProxyHeader {
        version: 2,
        source,
        destination,
        tlvs,
    }
}

/// Returns the two addresses, and their length.
fn ends(family_transport: u8, body: &[u8]) -> Result<(Ends, usize), ProxyError> {
    const SHORT: ProxyError = ProxyError("a block that is shorter than its addresses");
    match (family_transport >> 4, family_transport & 0xF) {
        (_, 3..) => Err(ProxyError("an unknown transport")),
        // Without a family or a transport the length of the addresses is unknown: there are none.
        (0, _) => Ok((None, 0)),
        (1..=3, 0) => Err(ProxyError("a family without a transport")),
        (1..=3, 2) => Err(ProxyError("datagrams on a stream")),
        (1, _) => {
            let (block, _) = body.split_first_chunk::<12>().ok_or(SHORT)?;
            let &[a, b, c, d, e, f, g, h, i, j, k, l] = block;
            let source = SocketAddr::new(
                IpAddr::V4(Ipv4Addr::new(a, b, c, d)),
                u16::from_be_bytes([i, j]),
            );
            let destination = SocketAddr::new(
                IpAddr::V4(Ipv4Addr::new(e, f, g, h)),
                u16::from_be_bytes([k, l]),
            );
            Ok((Some((source.into(), destination.into())), block.len()))
        }
        (2, _) => {
            let (from, rest) = body.split_first_chunk::<16>().ok_or(SHORT)?;
            let (to, rest) = rest.split_first_chunk::<16>().ok_or(SHORT)?;
            let (&[a, b, c, d], _) = rest.split_first_chunk::<4>().ok_or(SHORT)?;
            let source = SocketAddr::new(
                IpAddr::V6(Ipv6Addr::from(*from)),
                u16::from_be_bytes([a, b]),
            );
            let destination =
                SocketAddr::new(IpAddr::V6(Ipv6Addr::from(*to)), u16::from_be_bytes([c, d]));
            Ok((Some((source.into(), destination.into())), 36))
        }
        (3, _) => {
            let (from, rest) = body.split_first_chunk::<108>().ok_or(SHORT)?;
            let (to, _) = rest.split_first_chunk::<108>().ok_or(SHORT)?;
            let name = |field| Addr::from(UnixAddr::from_bytes(without_zeros(field)));
            Ok((Some((name(from), name(to))), 216))
        }
        _ => Err(ProxyError("an unknown address family")),
    }
}

/// Returns a path without trailing zeros. A leading zero is an abstract address (`unix(7)`).
fn without_zeros(field: &[u8; 108]) -> &[u8] {
    let last = field.iter().rposition(|&byte| byte != 0);
    let end = last.map_or(0, |last| last + 1);
    field.get(..end).unwrap_or_default()
}
