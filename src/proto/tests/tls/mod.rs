//! TLS on one connection, against rustls' own client in memory.

mod client;
mod clocks;
mod handshake;
mod keys;
mod stream;
mod upgrade;

use std::io::{Read, Write};
use std::sync::Arc;

use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::version::{TLS12, TLS13};
use rustls::{
    ClientConfig, ClientConnection, RootCertStore, ServerConfig, SupportedProtocolVersion,
};

use super::*;

const VERSIONS: [&SupportedProtocolVersion; 2] = [&TLS12, &TLS13];

pub(in crate::proto) fn provider() -> Arc<CryptoProvider> {
    #[cfg(feature = "ring")]
    return Arc::new(rustls::crypto::ring::default_provider());
    #[cfg(not(feature = "ring"))]
    return Arc::new(rustls::crypto::aws_lc_rs::default_provider());
}

/// A self-signed certificate and its key.
pub(in crate::proto) struct Identity {
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    roots: Arc<RootCertStore>,
}

impl Identity {
    /// For `localhost`.
    pub(in crate::proto) fn new() -> Self {
        Self::of("localhost")
    }

    pub(in crate::proto) fn of(name: &str) -> Self {
        let made = rcgen::generate_simple_self_signed([name.to_owned()]).expect("a certificate");
        let mut roots = RootCertStore::empty();
        roots.add(made.cert.der().clone()).expect("a root");
        Self {
            chain: vec![made.cert.der().clone()],
            key: PrivateKeyDer::try_from(made.signing_key.serialize_der()).expect("a key"),
            roots: Arc::new(roots),
        }
    }

    pub(in crate::proto) fn server(&self) -> ServerConfig {
        ServerConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_no_client_auth()
            .with_single_cert(self.chain.clone(), self.key.clone_key())
            .expect("server")
    }

    pub(in crate::proto) fn client(
        &self,
        version: &'static SupportedProtocolVersion,
    ) -> ClientConfig {
        ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[version])
            .expect("versions")
            .with_root_certificates(Arc::clone(&self.roots))
            .with_no_client_auth()
    }
}

/// A client and the connection on the server's side.
struct Talk {
    client: ClientConnection,
    rig: Rig,
    /// The client's bytes arrive in pieces of this size.
    cut: usize,
    /// Bytes that the client decrypted.
    heard: Vec<u8>,
    /// The client got close_notify.
    goodbye: bool,
}

impl Talk {
    fn with(
        server: ServerConfig,
        client: ClientConfig,
        limits: ConnConfig,
        script: Script,
    ) -> Self {
        let name = ServerName::try_from("localhost").expect("a name");
        let mut rig = Rig::accepted(
            &Framing::Packet2,
            limits,
            Some(&TlsConfig::from(server)),
            script,
        );
        rig.machine.handle_admitted(rig.now);
        assert_eq!(rig.machine.state(), State::Handshaking);
        Self {
            client: ClientConnection::new(Arc::new(client), name).expect("client"),
            rig,
            cut: usize::MAX,
            heard: Vec::new(),
            goodbye: false,
        }
    }

    fn new(version: &'static SupportedProtocolVersion, script: Script) -> Self {
        let identity = Identity::new();
        Self::with(
            identity.server(),
            identity.client(version),
            limits(),
            script,
        )
    }

    /// A connection after the handshake.
    fn open(version: &'static SupportedProtocolVersion, script: Script) -> Self {
        let mut talk = Self::new(version, script);
        talk.exchange();
        assert_eq!(talk.rig.events(), [Seen::Opened]);
        talk
    }

    /// Returns the client's pending ciphertext.
    fn client_bytes(&mut self) -> Vec<u8> {
        let mut wire = Vec::new();
        while self.client.wants_write() {
            self.client.write_tls(&mut wire).expect("into memory");
        }
        wire
    }

    fn say(&mut self, plain: &[u8]) {
        self.client.writer().write_all(plain).expect("buffered");
    }

    /// Exchanges bytes until no side has any left.
    fn exchange(&mut self) {
        for _ in 0..SPIN {
            let wire = self.client_bytes();
            for piece in wire.chunks(self.cut) {
                self.rig.receive(piece);
            }
            self.rig.turn();
            let answer = self.rig.answers();
            if wire.is_empty() && answer.is_empty() {
                return;
            }
            self.hear(&answer);
        }
        panic!("the exchange does not end");
    }

    fn hear(&mut self, mut wire: &[u8]) {
        while !wire.is_empty() {
            if self.client.read_tls(&mut wire).expect("from memory") == 0 {
                break;
            }
            let state = self
                .client
                .process_new_packets()
                .expect("the server speaks TLS");
            self.goodbye |= state.peer_has_closed();
            let mut plain = vec![0; state.plaintext_bytes_to_read()];
            self.client
                .reader()
                .read_exact(&mut plain)
                .expect("so many");
            self.heard.extend_from_slice(&plain);
        }
    }

    fn heard(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.heard)
    }
}

/// An echo that does not close by itself.
fn reticent(turn: &mut Turn<'_>, event: &Seen) -> Outcome {
    match event {
        Seen::Finished => Ok(()),
        event => echo(turn, event),
    }
}
