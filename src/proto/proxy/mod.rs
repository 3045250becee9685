//! The PROXY protocol, versions 1 and 2: the client behind a proxy (haproxy,
//! `doc/proxy-protocol.txt`).
//!
//! Strict: bytes that are not a header to the letter end the connection, and never count as "no
//! header".

mod error;
mod header;
mod tlv;
mod v1;
mod v2;

pub use error::ProxyError;
pub use header::ProxyHeader;
pub use tlv::{ProxySsl, ProxyTlvs};
#[cfg(feature = "sim")]
pub(super) use v2::MAX_LENGTH;

/// What stands at the front of a connection's bytes.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Front {
    /// A whole header, and its length.
    Header(Box<ProxyHeader>, usize),
    /// The beginning of a header, so far.
    More,
    /// No header, nor the beginning of one.
    Other,
    /// The beginning of a header that is wrong.
    Bad(ProxyError),
}

/// Looks for a header at the front of `input`; reads at most [`v2::MAX_LENGTH`] bytes.
pub(super) fn front(input: &[u8]) -> Front {
    let begins = |signature: &[u8]| {
        let common = input.len().min(signature.len());
        input.get(..common) == signature.get(..common)
    };
    let outcome = if begins(v1::SIGNATURE) {
        v1::parse(input)
    } else if begins(v2::SIGNATURE) {
        v2::parse(input)
    } else {
        return Front::Other;
    };
    match outcome {
        Ok(Some((header, taken))) => Front::Header(Box::new(header), taken),
        Ok(None) => Front::More,
        Err(error) => Front::Bad(error),
    }
}

#[cfg(test)]
mod tests;
