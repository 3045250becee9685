//! Configurations from PEM files.

use std::error::Error as StdError;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{NoClientAuth, WebPkiClientVerifier};
use rustls::{ClientConfig, RootCertStore, ServerConfig};

use super::chain::BoundedVerifier;
use super::pem_sections::sections;
use super::sessions::{ClientSessions, ServerSessions};
use crate::error::Error;
use crate::escape::Escaped;

/// Why a certificate chain and key make no configuration: a file and its fault, with the line where
/// it has one.
#[derive(Debug)]
struct PemError {
    file: PathBuf,
    fault: String,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

impl PemError {
    fn new(file: &Path, fault: impl Into<String>) -> Self {
        Self {
            file: file.to_owned(),
            fault: fault.into(),
            source: None,
        }
    }

    fn because(mut self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }
}

impl fmt::Display for PemError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", Escaped::new(self.file.display()), self.fault)?;
        match &self.source {
            Some(source) => write!(f, ": {}", Escaped::new(source)),
            None => Ok(()),
        }
    }
}

impl StdError for PemError {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.source
            .as_deref()
            .map(|source| source as &(dyn StdError + 'static))
    }
}

impl From<PemError> for Error {
    fn from(error: PemError) -> Self {
        Self::other(error)
    }
}

/// Makes a TLS 1.2 and 1.3 configuration from a certificate chain and its private key, both PEM
/// files.
///
/// The server's own certificate is the first of the chain. Uses the process's installed default
/// provider, or that of the feature `ring` or `aws-lc-rs`. For ALPN change the result:
/// `Arc::make_mut(&mut config).alpn_protocols = vec![b"mqtt".to_vec()]`. For client certificates
/// there is [`server_config_with_clients`], for several names [`ServerNames`](super::ServerNames).
/// For anything else build a [`rustls::ServerConfig`] yourself.
///
/// Call this before [`Control::set_tls`](crate::Control::set_tls) with new files: after an error
/// here the old configuration stays.
///
/// # Resumption
///
/// Clients that return need no full handshake. The configuration keeps the last sessions in memory:
/// for TLS 1.2, and for the two tickets that each TLS 1.3 handshake sends. They take at most 1 MiB,
/// which is some 3,000 without client certificates. A session contains its client's whole chain,
/// and is not kept above 16 KiB. rustls's own storage counts 256 sessions instead, up to 16 MiB. To
/// let clients keep the sessions, set a ticketer; to switch resumption off, set no storage and no
/// tickets:
///
/// ```
/// use std::sync::Arc;
/// use portcullis::tls::rustls::server::NoServerSessionStorage;
/// use portcullis::tls::rustls::ServerConfig;
///
/// fn without_resumption(config: &mut ServerConfig) {
///     config.session_storage = Arc::new(NoServerSessionStorage {});
///     config.send_tls13_tickets = 0;
/// }
/// # #[cfg(feature = "aws-lc-rs")]
/// fn with_tickets(config: &mut ServerConfig) -> Result<(), portcullis::tls::rustls::Error> {
///     // Keys for this process, changed every six hours, of the configuration's provider.
///     config.ticketer = portcullis::tls::rustls::crypto::aws_lc_rs::Ticketer::new()?;
///     Ok(())
/// }
/// ```
///
/// Never share one storage or ticketer between configurations that demand different client
/// certificates. A session of one is resumed under the other without another demand.
///
/// # Errors
///
/// [`Error::Other`], which names the file and the fault: a file that cannot be read or contains no
/// certificate or key, or a key of another certificate. A damaged section is an error with its
/// line, and never skipped. So the chain has as many certificates as the file has BEGIN lines of
/// certificates. Sections of other known kinds, such as keys, may stand in the same file; of
/// several keys the first is used.
///
/// ```no_run
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let config = portcullis::tls::server_config("chain.pem", "key.pem")?;
/// let listen = portcullis::Listen::tcp("0.0.0.0:8883", portcullis::Framing::Line).tls(config);
/// # let _ = listen; Ok(()) }
/// ```
pub fn server_config(
    chain: impl AsRef<Path>,
    key: impl AsRef<Path>,
) -> Result<Arc<ServerConfig>, Error> {
    let (chain, key) = (chain.as_ref(), key.as_ref());
    Ok(build(chain, key, &provider(key)?, Arc::new(NoClientAuth))?)
}

/// Treatment of clients that present no certificate.
///
/// A client whose certificate cannot be verified is refused in any case.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ClientAuth {
    /// The handshake fails.
    Required,
    /// The client is served;
    /// `peer_certificates` of its [`TlsInfo`](super::TlsInfo) is `None`.
    Optional,
}

/// Makes a configuration as [`server_config`] that demands client certificates which lead to one in
/// the PEM file `roots`.
///
/// The verified chain is in `peer_certificates` of its [`TlsInfo`](super::TlsInfo), after a resumed
/// handshake too. Only the issuer is verified: decide by the certificate what *this* client may do.
/// A chain that is expensive to verify is refused, with the bounds of [`BoundedVerifier`]. For
/// revocation lists build a [`rustls::ServerConfig`] yourself.
///
/// # Errors
///
/// As for [`server_config`], also for `roots` without a certificate or with an invalid one. Whether
/// a root may sign others is not checked.
///
/// ```no_run
/// use portcullis::tls::{server_config_with_clients, ClientAuth};
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let clients = ClientAuth::Required;
/// let config = server_config_with_clients("chain.pem", "key.pem", "clients-ca.pem", clients)?;
/// let listen = portcullis::Listen::tcp("0.0.0.0:8883", portcullis::Framing::Line).tls(config);
/// # let _ = listen; Ok(()) }
/// ```
pub fn server_config_with_clients(
    chain: impl AsRef<Path>,
    key: impl AsRef<Path>,
    roots: impl AsRef<Path>,
    clients: ClientAuth,
) -> Result<Arc<ServerConfig>, Error> {
    let (chain, key, roots) = (chain.as_ref(), key.as_ref(), roots.as_ref());
    let provider = provider(key)?;
    let store = root_store(roots, "holds a certificate that cannot vouch for clients")?;
    let verifier =
        WebPkiClientVerifier::builder_with_provider(Arc::new(store), Arc::clone(&provider));
    let verifier = match clients {
        ClientAuth::Required => verifier,
        ClientAuth::Optional => verifier.allow_unauthenticated(),
    };
    let verifier = verifier.build().map_err(|error| {
        PemError::new(roots, "cannot be used to verify clients").because(error.to_string())
    })?;
    Ok(build(
        chain,
        key,
        &provider,
        Arc::new(BoundedVerifier::new(verifier)),
    )?)
}

/// Makes a TLS 1.2 and 1.3 configuration for outgoing connections
/// ([`Connect::tls`](crate::Connect::tls)).
///
/// Servers are accepted whose certificates lead to one in the PEM file `roots`. This library
/// contains no certificates; the system's are often in a file such as
/// `/etc/ssl/certs/ca-certificates.crt`.
///
/// The provider is that of [`server_config`]. A chain that is expensive to verify is refused, with
/// the bounds of [`BoundedVerifier`]. The configuration keeps the last 64 sessions for resumption,
/// at most 4 of one server. Common ones take some 5 KB each, the largest that a server can cause
/// 128 KiB. For ALPN or a certificate of your own change the result. For roots in memory
/// (`RootCertStore`) build a [`rustls::ClientConfig`] yourself.
///
/// # Errors
///
/// [`Error::Other`], which names the file and the fault: the file cannot be read, or contains no
/// certificate or an invalid one. Whether a root may sign others is not checked.
///
/// ```no_run
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let config = portcullis::tls::client_config("ca.pem")?;
/// let connect = portcullis::Connect::new(portcullis::Framing::Line).tls(config, "backend.example.org");
/// # let _ = connect; Ok(()) }
/// ```
pub fn client_config(roots: impl AsRef<Path>) -> Result<Arc<ClientConfig>, Error> {
    let roots = roots.as_ref();
    let store = root_store(roots, "holds a certificate that cannot vouch for servers")?;
    let provider = provider(roots)?;
    let verifier =
        WebPkiServerVerifier::builder_with_provider(Arc::new(store), Arc::clone(&provider))
            .build()
            .map_err(|error| {
                PemError::new(roots, "cannot be used to verify servers").because(error.to_string())
            })?;
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| {
            PemError::new(roots, "cannot be used with this TLS provider").because(error)
        })?
        // "Dangerous" is any verifier but rustls' own, even one around it.
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(BoundedVerifier::new(verifier)))
        .with_no_client_auth();
    config.resumption = Resumption::store(Arc::new(ClientSessions::default()));
    Ok(Arc::new(config))
}

fn root_store(roots: &Path, fault: &str) -> Result<RootCertStore, PemError> {
    let mut store = RootCertStore::empty();
    for (certificate, line) in certificates(roots)? {
        store.add(certificate).map_err(|error| {
            PemError::new(roots, format!("{fault}, in line {line}")).because(error.to_string())
        })?;
    }
    Ok(store)
}

fn read(file: &Path) -> Result<Vec<u8>, PemError> {
    fs::read(file).map_err(|error| PemError::new(file, "cannot be read").because(error))
}

/// Reads the certificates in a file, at least one, each with the number of its line: as many as
/// there are BEGIN lines of certificates.
fn certificates(file: &Path) -> Result<Vec<(CertificateDer<'static>, usize)>, PemError> {
    let bytes = read(file)?;
    let fault = |fault: String| PemError::new(file, fault);
    let mut certificates = Vec::new();
    for section in sections(&bytes).map_err(fault)? {
        let line = section.line;
        match section.label {
            // The second is an old name, which OpenSSL reads too.
            b"CERTIFICATE" | b"X509 CERTIFICATE" => {}
            label if is_other_kind(label) => continue,
            b"TRUSTED CERTIFICATE" => {
                return Err(fault(format!(
                    "has, in line {line}, a certificate with OpenSSL's trust settings, which are \
                     not read: convert it (openssl x509 -in FILE -out PLAIN)"
                )));
            }
            _ => {
                return Err(fault(format!(
                    "has, in line {line}, a PEM section that is no certificate of a known kind"
                )));
            }
        }
        let certificate = CertificateDer::from_pem_slice(&section.to_pem("CERTIFICATE"))
            .map_err(|_| fault(not_base64(line)))?;
        if !is_one_sequence(&certificate) {
            return Err(fault(format!(
                "has, in line {line}, a certificate that is not valid"
            )));
        }
        certificates.push((certificate, line));
    }
    if certificates.is_empty() {
        return Err(fault("holds no certificate in PEM form".to_owned()));
    }
    Ok(certificates)
}

/// Reads the first private key in a file, as OpenSSL does.
fn private_key(file: &Path) -> Result<PrivateKeyDer<'static>, PemError> {
    let bytes = read(file)?;
    let fault = |fault: String| PemError::new(file, fault);
    let sections = sections(&bytes).map_err(fault)?;
    let mut keys = sections.iter();
    let Some(section) = keys.find(|section| section.label.ends_with(b"PRIVATE KEY")) else {
        return Err(fault("holds no private key in PEM form".to_owned()));
    };
    let line = section.line;
    let label = match section.label {
        b"ENCRYPTED PRIVATE KEY" => None,
        // The old form, of RFC 1421.
        _ if section.contains(b"ENCRYPTED") => None,
        b"PRIVATE KEY" => Some("PRIVATE KEY"),
        b"RSA PRIVATE KEY" => Some("RSA PRIVATE KEY"),
        b"EC PRIVATE KEY" => Some("EC PRIVATE KEY"),
        _ => {
            return Err(fault(format!(
                "has, in line {line}, a private key in a form that cannot be used: convert it to \
                 PKCS #8 (openssl pkey -in FILE -out PKCS8)"
            )));
        }
    };
    let Some(label) = label else {
        return Err(fault(format!(
            "holds, in line {line}, an encrypted private key: \
             decrypt it first (openssl pkey -in FILE -out DECRYPTED)"
        )));
    };
    PrivateKeyDer::from_pem_slice(&section.to_pem(label)).map_err(|_| fault(not_base64(line)))
}

/// Shows nothing of the contents: they may be a key.
fn not_base64(line: usize) -> String {
    format!("is damaged: the PEM section of line {line} is not valid base64")
}

/// True for sections that may stand beside certificates.
fn is_other_kind(label: &[u8]) -> bool {
    let ends = [
        &b"PRIVATE KEY"[..],
        b"PUBLIC KEY",
        b"PARAMETERS",
        b"CERTIFICATE REQUEST",
        b"X509 CRL",
        b"ECHCONFIG",
    ];
    ends.iter().any(|end| label.ends_with(end))
}

/// True if `der` is one sequence (X.690, section 8.9) and nothing else: no certificate that is cut
/// off or has something behind it.
fn is_one_sequence(der: &[u8]) -> bool {
    const SEQUENCE: u8 = 0x30;
    let (length, behind) = match der {
        [SEQUENCE, length @ 0..=0x7F, behind @ ..] => (usize::from(*length), behind),
        [SEQUENCE, 0x81, a, behind @ ..] => (usize::from(*a), behind),
        [SEQUENCE, 0x82, a, b, behind @ ..] => (usize::from(u16::from_be_bytes([*a, *b])), behind),
        [SEQUENCE, 0x83, a, b, c, behind @ ..] => {
            (u32::from_be_bytes([0, *a, *b, *c]) as usize, behind)
        }
        _ => return false,
    };
    behind.len() == length
}

fn build(
    chain_file: &Path,
    key_file: &Path,
    provider: &Arc<CryptoProvider>,
    verifier: Arc<dyn ClientCertVerifier>,
) -> Result<Arc<ServerConfig>, PemError> {
    let chain = certificates(chain_file)?.into_iter();
    let chain = chain.map(|(certificate, _)| certificate).collect();
    let key = private_key(key_file)?;
    ServerConfig::builder_with_provider(Arc::clone(provider))
        .with_safe_default_protocol_versions()
        .map_err(|error| {
            PemError::new(key_file, "cannot be used with this TLS provider").because(error)
        })?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key)
        .map(|mut config| {
            config.session_storage = Arc::new(ServerSessions::default());
            Arc::new(config)
        })
        .map_err(|error| match error {
            rustls::Error::InconsistentKeys(_) => PemError::new(
                key_file,
                format!(
                    "does not belong to the first certificate in {}",
                    chain_file.display()
                ),
            ),
            rustls::Error::InvalidCertificate(error) => {
                PemError::new(chain_file, "begins with a certificate that is not valid")
                    .because(error.to_string())
            }
            rustls::Error::General(words) => {
                PemError::new(key_file, "holds no key that can be used").because(words)
            }
            error => PemError::new(key_file, "holds no key that can be used").because(error),
        })
}

/// Returns the provider installed for the process, or that of this crate's features.
#[allow(unused_variables)] // the error names the file
fn provider(key_file: &Path) -> Result<Arc<CryptoProvider>, PemError> {
    if let Some(installed) = CryptoProvider::get_default() {
        return Ok(Arc::clone(installed));
    }
    #[cfg(feature = "aws-lc-rs")]
    return Ok(Arc::new(rustls::crypto::aws_lc_rs::default_provider()));
    #[cfg(all(feature = "ring", not(feature = "aws-lc-rs")))]
    return Ok(Arc::new(rustls::crypto::ring::default_provider()));
    #[cfg(not(any(feature = "ring", feature = "aws-lc-rs")))]
    Err(PemError::new(
        key_file,
        "cannot be used: no TLS provider; \
         enable the feature `ring` or `aws-lc-rs`, or install a default provider",
    ))
}
