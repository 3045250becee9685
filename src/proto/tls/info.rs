//! What a handshake agreed on, for handlers to see.

use std::fmt;
use std::sync::Arc;

use rustls::pki_types::CertificateDer;
use rustls::{CipherSuite, CommonState, HandshakeKind, ProtocolVersion, ServerConfig};

use super::Session;

/// What the TLS handshake agreed on. From [`Conn::tls`](crate::Conn::tls).
#[derive(Clone, Copy)]
pub struct TlsInfo<'a>(pub(super) &'a Session);

impl<'a> TlsInfo<'a> {
    fn common(self) -> Option<&'a CommonState> {
        self.0.common()
    }

    /// The configuration that the handshake used: which of several names' it was, or whether
    /// [`Control::set_tls`](crate::Control::set_tls) has come after it (`Arc::ptr_eq` with the new one). One that allows early
    /// data is a copy of yours, without it. `None` where we are the client.
    pub fn config(self) -> Option<&'a Arc<ServerConfig>> {
        self.0.config.as_ref()
    }

    /// The name the client asked for (SNI), lower case; where we are the client, the server's name or address that its
    /// certificate is for.
    pub fn server_name(self) -> Option<&'a str> {
        self.0.server_name.as_deref()
    }

    /// The protocol agreed on by ALPN.
    pub fn alpn(self) -> Option<&'a [u8]> {
        self.common()?.alpn_protocol()
    }

    /// The client's certificate chain as it was verified, its own first; after a resumed handshake the one of the first. Empty
    /// unless the configuration asks for one.
    pub fn client_certificates(self) -> &'a [CertificateDer<'static>] {
        if self.0.is_client() {
            return &[];
        }
        self.peer_certificates()
    }

    /// The peer's certificate chain as it was verified, its own first: the server's where we are the client, else as
    /// [`TlsInfo::client_certificates`].
    pub fn peer_certificates(self) -> &'a [CertificateDer<'static>] {
        self.common()
            .and_then(CommonState::peer_certificates)
            .unwrap_or_default()
    }

    /// TLS 1.2 or 1.3.
    pub fn version(self) -> Option<ProtocolVersion> {
        self.common()?.protocol_version()
    }

    /// The cipher suite.
    pub fn cipher_suite(self) -> Option<CipherSuite> {
        Some(self.common()?.negotiated_cipher_suite()?.suite())
    }

    /// Full or resumed.
    pub fn handshake_kind(self) -> Option<HandshakeKind> {
        self.common()?.handshake_kind()
    }
}

impl fmt::Debug for TlsInfo<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsInfo")
            .field("version", &self.version())
            .field("cipher_suite", &self.cipher_suite())
            .field("server_name", &self.server_name())
            .field("alpn", &self.alpn())
            .field("client_certificates", &self.client_certificates().len())
            .finish()
    }
}
