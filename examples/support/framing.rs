//! The framings by their names on the command line; used by server and client.

use clap::ValueEnum;

/// A framing's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum FramingName {
    /// One length byte
    #[value(name = "packet-1")]
    Packet1,
    /// Two length bytes
    #[value(name = "packet-2")]
    Packet2,
    /// Four length bytes
    #[value(name = "packet-4")]
    Packet4,
    /// No framing
    Raw,
    /// Lines
    Line,
}

#[allow(dead_code)] // the server and the client each use their half
impl FramingName {
    pub fn framing(self) -> portcullis::Framing {
        use portcullis::Framing;
        match self {
            Self::Packet1 => Framing::Packet1,
            Self::Packet2 => Framing::Packet2,
            Self::Packet4 => Framing::Packet4,
            Self::Raw => Framing::Raw,
            Self::Line => Framing::Line,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Packet1 => "packet-1",
            Self::Packet2 => "packet-2",
            Self::Packet4 => "packet-4",
            Self::Raw => "raw",
            Self::Line => "line",
        }
    }

    /// Bytes of the length header.
    pub fn header(self) -> usize {
        match self {
            Self::Packet1 => 1,
            Self::Packet2 => 2,
            Self::Packet4 => 4,
            Self::Raw | Self::Line => 0,
        }
    }
}

/// The cryptography that this was built with.
#[cfg(feature = "tls")]
pub fn provider() -> std::sync::Arc<portcullis::tls::rustls::crypto::CryptoProvider> {
    use portcullis::tls::rustls::crypto;
    if let Some(installed) = crypto::CryptoProvider::get_default() {
        return std::sync::Arc::clone(installed);
    }
    #[cfg(feature = "aws-lc-rs")]
    return std::sync::Arc::new(crypto::aws_lc_rs::default_provider());
    #[cfg(all(feature = "ring", not(feature = "aws-lc-rs")))]
    return std::sync::Arc::new(crypto::ring::default_provider());
    #[cfg(not(any(feature = "ring", feature = "aws-lc-rs")))]
    panic!("built with the feature `tls` but without `ring` or `aws-lc-rs`");
}
