//! The facts behind the addresses of version 2: type, length, value (section 2.2).

use super::error::ProxyError;

const CRC32C: u8 = 0x03;
const NOOP: u8 = 0x04;
const UNIQUE_ID: u8 = 0x05;
const SSL: u8 = 0x20;

/// "The maximum length of a unique ID is 128 bytes".
const MAX_ID: usize = 128;

/// The facts that a proxy reports besides addresses.
///
/// Checked with the header: lengths fit, and the checksum is right if there is one. Padding
/// (`PP2_TYPE_NOOP`) is left out. The TLVs are dropped after
/// [`Service::accept`](crate::Service::accept), unless the service keeps
/// [`Peer::proxy`](crate::Peer::proxy). Then they live as long as the connection, and count in
/// [`Stats::memory`](crate::Stats::memory).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ProxyTlvs(Vec<u8>);

impl ProxyTlvs {
    /// Parses the TLVs of `header` from `start` to its end.
    pub(super) fn parse(header: &[u8], start: usize) -> Result<Self, ProxyError> {
        let given = header.get(start..).unwrap_or_default();
        let padding = Split(given).filter_map(Result::ok);
        let padding = padding.filter(|(kind, _)| *kind == NOOP);
        let padding: usize = padding.map(|(_, value)| 3 + value.len()).sum();
        let mut kept = Vec::with_capacity(given.len() - padding);
        let mut at = start;
        let mut sums = 0;
        for item in Split(given) {
            let (kind, value) = item?;
            let end = at + 3 + value.len();
            if kind != NOOP {
                kept.extend_from_slice(header.get(at..end).unwrap_or_default());
            }
            match kind {
                CRC32C => {
                    let sum = value
                        .try_into()
                        .map_err(|_| ProxyError("a checksum that is not of four bytes"))?;
                    let zeroed = end - value.len()..end;
                    sums += 1;
                    if sums > 1 || u32::from_be_bytes(sum) != crc32c(header, &zeroed) {
                        return Err(ProxyError("a wrong checksum"));
                    }
                }
                UNIQUE_ID if value.len() > MAX_ID => {
                    return Err(ProxyError("a unique id of more than 128 bytes"))
                }
                SSL => drop(ProxySsl::parse(value)?),
                _ => {}
            }
            at = end;
        }
        Ok(Self(kept))
    }

    /// Returns the memory that it takes beside its own size.
    pub(super) fn memory(&self) -> usize {
        self.0.capacity()
    }

    /// Returns the type and value of every TLV in order, padding (`PP2_TYPE_NOOP`) excluded.
    pub fn iter(&self) -> impl Iterator<Item = (u8, &[u8])> {
        Split(&self.0).filter_map(Result::ok)
    }

    /// Returns the first value of type `kind` (section 2.2 of the specification), for example:
    ///
    /// | type | value |
    /// |---|---|
    /// | 0x01 | the application protocol that client and proxy negotiated (ALPN) |
    /// | 0x02 | the host name that the client asked for (SNI, "authority"): UTF-8 |
    /// | 0x05 | the proxy's name for the connection (unique id), at most 128 bytes |
    /// | 0x30 | the proxy's name of the network namespace: US-ASCII |
    ///
    /// For the client's TLS see [`ProxyTlvs::ssl`].
    pub fn get(&self, kind: u8) -> Option<&[u8]> {
        self.iter()
            .find(|(found, _)| *found == kind)
            .map(|(_, value)| value)
    }

    /// Returns the facts about the client's TLS, which the proxy has terminated; `None` if the
    /// proxy reports none.
    pub fn ssl(&self) -> Option<ProxySsl<'_>> {
        ProxySsl::parse(self.get(SSL)?).ok()
    }
}

/// The TLS between a client and the proxy, as the proxy reports it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProxySsl<'a> {
    client: u8,
    verify: u32,
    rest: &'a [u8],
}

impl<'a> ProxySsl<'a> {
    fn parse(value: &'a [u8]) -> Result<Self, ProxyError> {
        let &[client, a, b, c, d, ref rest @ ..] = value else {
            return Err(ProxyError("a TLS part of less than five bytes"));
        };
        for item in Split(rest) {
            item?;
        }
        Ok(Self {
            client,
            verify: u32::from_be_bytes([a, b, c, d]),
            rest,
        })
    }

    /// True if the client connected by TLS (`PP2_CLIENT_SSL`).
    pub fn is_tls(self) -> bool {
        self.client & 0x01 != 0
    }

    /// True if the client presented a certificate, on this connection or earlier in the session
    /// (`PP2_CLIENT_CERT_CONN`, `_SESS`).
    pub fn has_certificate(self) -> bool {
        self.client & 0x06 != 0
    }

    /// True if the client presented a certificate and the proxy verified it.
    pub fn is_verified(self) -> bool {
        self.has_certificate() && self.verify == 0
    }

    /// Returns the text of type `kind` (section 2.2.5 of the specification); `None` if it is
    /// missing or no UTF-8:
    ///
    /// | type | text |
    /// |---|---|
    /// | 0x21 | the version, as in "TLSv1.3" |
    /// | 0x22 | the common name in the client's certificate |
    /// | 0x23 | the cipher, as in "ECDHE-RSA-AES128-GCM-SHA256" |
    /// | 0x24 | the signature algorithm of the proxy's certificate, as in "SHA256" |
    /// | 0x25 | the key algorithm of the proxy's certificate, as in "RSA2048" |
    pub fn get(self, kind: u8) -> Option<&'a str> {
        let mut items = Split(self.rest).filter_map(Result::ok);
        let (_, value) = items.find(|(found, _)| *found == kind)?;
        std::str::from_utf8(value).ok()
    }
}

/// Iterates over TLVs until the end, or until the remainder is too short.
struct Split<'a>(&'a [u8]);

impl<'a> Iterator for Split<'a> {
    type Item = Result<(u8, &'a [u8]), ProxyError>;

    fn next(&mut self) -> Option<Self::Item> {
        let (&kind, rest) = self.0.split_first()?;
        let parts = rest.split_first_chunk::<2>().and_then(|(length, rest)| {
            rest.split_at_checked(usize::from(u16::from_be_bytes(*length)))
        });
        let Some((value, rest)) = parts else {
            self.0 = &[];
            return Some(Err(ProxyError("a TLV that ends behind the header")));
        };
        self.0 = rest;
        Some(Ok((kind, value)))
    }
}

/// Returns the Castagnoli CRC (RFC 3720, appendix B.4) of `bytes`, those in `zeroed` taken as zero.
fn crc32c(bytes: &[u8], zeroed: &std::ops::Range<usize>) -> u32 {
    !bytes.iter().enumerate().fold(u32::MAX, |sum, (at, &byte)| {
        let byte = if zeroed.contains(&at) { 0 } else { byte };
        (0..8).fold(sum ^ u32::from(byte), |sum, _| {
            (sum >> 1) ^ if sum & 1 == 1 { 0x82F6_3B78 } else { 0 }
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 3720, appendix B.4: the test vectors.
    #[test]
    fn the_checksum_is_castagnolis() {
        let rising: Vec<u8> = (0..32).collect();
        let falling: Vec<u8> = (0..32).rev().collect();
        for (bytes, sum) in [
            (&[0; 32][..], 0x8A91_36AA),
            (&[0xFF; 32], 0x62A8_AB43),
            (&rising, 0x46DD_794E),
            (&falling, 0x113F_DB5C),
            (b"123456789", 0xE306_9283),
        ] {
            assert_eq!(crc32c(bytes, &(0..0)), sum);
        }
        assert_eq!(crc32c(&[0xFF; 32], &(0..32)), crc32c(&[0; 32], &(0..0)));
    }
}
