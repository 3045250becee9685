//! Version 1: one line of text (section 2.1).

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::error::ProxyError;
use super::header::{Ends, Parsed, ProxyHeader};
use super::tlv::ProxyTlvs;

pub(super) const SIGNATURE: &[u8] = b"PROXY ";
const UNKNOWN: &[u8] = b"PROXY UNKNOWN";
const UNKNOWN_MORE: &[u8] = b"PROXY UNKNOWN ";
/// "the receiver may wait for the CRLF or up to 107 characters" (section 2.1).
const MAX_LENGTH: usize = 107;

pub(super) fn parse(input: &[u8]) -> Parsed {
    let window = input.get(..MAX_LENGTH).unwrap_or(input);
    let Some(end) = window.iter().position(|&byte| byte == b'\n') else {
        return if window.len() == MAX_LENGTH {
            Err(ProxyError("no end of line in 107 bytes"))
        } else {
            Ok(None)
        };
    };
    let line = window.get(..end).unwrap_or_default();
    let Some(line) = line.strip_suffix(b"\r") else {
        return Err(ProxyError("a line feed without a carriage return"));
    };
    // "the receiver must ignore anything presented before the CRLF is found".
    let ends = if line == UNKNOWN || line.starts_with(UNKNOWN_MORE) {
        None
    } else {
        ends(std::str::from_utf8(line).map_err(|_| ProxyError("bytes that are no text"))?)?
    };
    let (source, destination) = ends.unzip();
    let header = ProxyHeader {
        version: 1,
        source,
        destination,
        tlvs: ProxyTlvs::default(),
    };
    Ok(Some((header, end + 1)))
}

fn ends(line: &str) -> Result<Ends, ProxyError> {
    let mut words = line.split(' ').skip(1);
    let family = words.next().unwrap_or_default();
    let [Some(source), Some(destination), Some(from), Some(to), None] =
        [(); 5].map(|()| words.next())
    else {
        return Err(ProxyError("not two addresses and two ports"));
    };
    let address = match family {
        "TCP4" => ipv4,
        "TCP6" => ipv6,
        _ => return Err(ProxyError("a family other than TCP4, TCP6 and UNKNOWN")),
    };
    let source = SocketAddr::new(address(source)?, port(from)?);
    let destination = SocketAddr::new(address(destination)?, port(to)?);
    Ok(Some((source.into(), destination.into())))
}

/// Parses four decimal numbers without leading zeros, as the standard library does.
fn ipv4(word: &str) -> Result<IpAddr, ProxyError> {
    word.parse::<Ipv4Addr>()
        .map(IpAddr::V4)
        .map_err(|_| ProxyError("a bad IPv4 address"))
}

/// Parses an address without brackets and zone.
fn ipv6(word: &str) -> Result<IpAddr, ProxyError> {
    word.parse::<Ipv6Addr>()
        .map(IpAddr::V6)
        .map_err(|_| ProxyError("a bad IPv6 address"))
}

/// Parses digits without a leading zero.
fn port(word: &str) -> Result<u16, ProxyError> {
    let plain =
        word.bytes().all(|byte| byte.is_ascii_digit()) && (word == "0" || !word.starts_with('0'));
    word.parse()
        .ok()
        .filter(|_| plain)
        .ok_or(ProxyError("a bad port"))
}
