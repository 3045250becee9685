//! The outcome of a handshake, for handlers.

use std::fmt;
use std::ops::Deref;
use std::sync::Arc;

use rustls::{CommonState, ServerConfig};

use super::session::Session;

/// The outcome of a TLS handshake, from [`Conn::tls`](crate::Conn::tls).
///
/// Dereferences to rustls' [`CommonState`]: `alpn_protocol`, `protocol_version`,
/// `negotiated_cipher_suite`, `handshake_kind`, and `peer_certificates`. The latter is the verified
/// chain of the peer, its own certificate first; after a resumed handshake the chain of the first
/// one. A client has none unless the configuration asks for one.
#[derive(Clone, Copy)]
pub struct TlsInfo<'a> {
    session: &'a Session,
    common: &'a CommonState,
}

impl<'a> TlsInfo<'a> {
    /// `None` before the ClientHello is read.
    pub(in crate::proto) fn of(session: &'a Session) -> Option<Self> {
        let common = session.common()?;
        Some(Self { session, common })
    }

    /// Returns the configuration that the handshake used; `None` on the client's side.
    ///
    /// Compare with `Arc::ptr_eq`, as with the new one of
    /// [`Control::set_tls`](crate::Control::set_tls). A configuration that allows early data is
    /// replaced by a copy without it.
    pub fn config(self) -> Option<&'a Arc<ServerConfig>> {
        self.session.config()
    }

    /// Returns the name that the client asked for (SNI), in lower case.
    ///
    /// On the client's side: the server's name or address, as given.
    pub fn server_name(self) -> Option<&'a str> {
        self.session.server_name()
    }
}

impl Deref for TlsInfo<'_> {
    type Target = CommonState;

    fn deref(&self) -> &CommonState {
        self.common
    }
}

impl fmt::Debug for TlsInfo<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsInfo")
            .field("version", &self.protocol_version())
            .field("cipher_suite", &self.negotiated_cipher_suite())
            .field("server_name", &self.server_name())
            .field("alpn", &self.alpn_protocol())
            .field(
                "peer_certificates",
                &self.peer_certificates().map(<[_]>::len),
            )
            .finish()
    }
}
