//! The outcome of a handshake, for handlers.

use std::fmt;
use std::sync::Arc;

use rustls::pki_types::CertificateDer;
use rustls::{CipherSuite, CommonState, HandshakeKind, ProtocolVersion, ServerConfig};

use super::session::Session;

/// The outcome of a TLS handshake. From [`Conn::tls`](crate::Conn::tls).
#[derive(Clone, Copy)]
pub struct TlsInfo<'a>(&'a Session);

impl<'a> TlsInfo<'a> {
    pub(in crate::proto) fn of(session: &'a Session) -> Self {
        Self(session)
    }

    fn common(self) -> Option<&'a CommonState> {
        self.0.common()
    }

    /// Returns the configuration that the handshake used; `None` on the client's side.
    ///
    /// Compare with `Arc::ptr_eq`: with those of several names, or with a new one of
    /// [`Control::set_tls`](crate::Control::set_tls). A configuration that allows early data is
    /// replaced by a copy without it.
    pub fn config(self) -> Option<&'a Arc<ServerConfig>> {
        self.0.config()
    }

    /// Returns the name that the client asked for (SNI), in lower case.
    ///
    /// On the client's side: the server's name or address that its certificate is for.
    pub fn server_name(self) -> Option<&'a str> {
        self.0.server_name()
    }

    /// Returns the protocol negotiated by ALPN.
    pub fn alpn(self) -> Option<&'a [u8]> {
        self.common()?.alpn_protocol()
    }

    /// Returns the verified certificate chain of the peer, its own certificate first.
    ///
    /// After a resumed handshake: the chain of the first one. A client's is empty unless the
    /// configuration asks for one.
    pub fn peer_certificates(self) -> &'a [CertificateDer<'static>] {
        self.common()
            .and_then(CommonState::peer_certificates)
            .unwrap_or_default()
    }

    /// Returns the version: TLS 1.2 or 1.3.
    pub fn version(self) -> Option<ProtocolVersion> {
        self.common()?.protocol_version()
    }

    /// Returns the cipher suite.
    pub fn cipher_suite(self) -> Option<CipherSuite> {
        Some(self.common()?.negotiated_cipher_suite()?.suite())
    }

    /// Returns whether the handshake was full or resumed.
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
            .field("peer_certificates", &self.peer_certificates().len())
            .finish()
    }
}
