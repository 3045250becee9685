//! A certificate of its own, and the TLS configurations of both sides.

use std::sync::Arc;

use portcullis::tls::rustls::client::Resumption;
use portcullis::tls::rustls::crypto::aws_lc_rs::default_provider;
use portcullis::tls::rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use portcullis::tls::rustls::{ClientConfig, RootCertStore, ServerConfig};

/// The server's side.
pub struct Site {
    pub certificate: CertificateDer<'static>,
    pub server: Arc<ServerConfig>,
}

impl Site {
    pub fn new() -> Self {
        let site =
            rcgen::generate_simple_self_signed(["localhost".to_owned()]).expect("a certificate");
        let certificate = site.cert.der().clone();
        let key = PrivatePkcs8KeyDer::from(site.signing_key.serialize_der());
        let server = ServerConfig::builder_with_provider(Arc::new(default_provider()))
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_no_client_auth()
            .with_single_cert(vec![certificate.clone()], key.into())
            .expect("a certificate");
        Self {
            certificate,
            server: Arc::new(server),
        }
    }
}

/// A client that trusts this certificate alone, and makes a full handshake each time.
pub fn client_config(certificate: CertificateDer<'static>) -> Arc<ClientConfig> {
    let mut roots = RootCertStore::empty();
    roots.add(certificate).expect("a root");
    let mut client = ClientConfig::builder_with_provider(Arc::new(default_provider()))
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_root_certificates(roots)
        .with_no_client_auth();
    client.resumption = Resumption::disabled();
    Arc::new(client)
}
