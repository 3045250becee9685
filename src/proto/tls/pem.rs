//! Configurations from PEM files.

use std::error::Error as StdError;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{NoClientAuth, WebPkiClientVerifier};
use rustls::{ClientConfig, RootCertStore, ServerConfig};

use super::chain::BoundedVerifier;
use crate::error::Error;
use crate::escape::Escaped;

/// Why a certificate chain and key make no configuration: a file and its fault.
#[derive(Debug)]
pub struct PemError {
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

    /// Reports no contents of the file: a key without line breaks is a single line.
    fn parsing(file: &Path, what: &str, error: pem::Error) -> Self {
        let fault = match error {
            pem::Error::Io(error) => return Self::new(file, "cannot be read").because(error),
            pem::Error::NoItemsFound => format!("holds no {what} in PEM form"),
            pem::Error::MissingSectionEnd { .. } => {
                "is cut off, or has lost its line breaks: a PEM section has no END line".to_owned()
            }
            pem::Error::Base64Decode(_) => {
                "is damaged: a PEM section is not valid base64".to_owned()
            }
            _ => format!("is not a valid PEM file with a {what}"),
        };
        Self::new(file, fault)
    }

    /// Reports an encrypted key, which the parser takes for none or for a damaged one.
    fn parsing_key(file: &Path, error: pem::Error) -> Self {
        const MARK: &[u8] = b"ENCRYPTED";
        if fs::read(file).is_ok_and(|bytes| bytes.windows(MARK.len()).any(|window| window == MARK))
        {
            return Self::new(
                file,
                "holds an encrypted private key: \
                 decrypt it first (openssl pkey -in FILE -out DECRYPTED)",
            );
        }
        Self::parsing(file, "private key", error)
    }

    /// Returns the file that has the fault.
    pub fn file(&self) -> &Path {
        &self.file
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
/// Clients that return need no full handshake. The configuration keeps the last 256 sessions in
/// memory, for TLS 1.2 and for the two tickets that each TLS 1.3 handshake sends. To let clients
/// keep the sessions instead, set a ticketer; to switch resumption off, set no storage and no
/// tickets:
///
/// ```
/// use std::sync::Arc;
/// use portcullis::tls::rustls::server::NoServerSessionStorage;
/// use portcullis::tls::ServerConfig;
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
/// A file that cannot be read or contains no certificate or key, or a key of another certificate:
/// [`PemError`] names the file and the fault.
///
/// ```no_run
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let config = portcullis::tls::server_config("chain.pem", "key.pem")?;
/// let listen = portcullis::Listen::tcp("0.0.0.0:8883").tls(config);
/// # let _ = listen; Ok(()) }
/// ```
pub fn server_config(
    chain: impl AsRef<Path>,
    key: impl AsRef<Path>,
) -> Result<Arc<ServerConfig>, PemError> {
    let (chain, key) = (chain.as_ref(), key.as_ref());
    build(chain, key, &provider(key)?, Arc::new(NoClientAuth))
}

/// What happens to a client that presents no certificate.
///
/// A client whose certificate cannot be verified is refused in any case.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ClientAuth {
    /// The handshake fails.
    Required,
    /// The client is served;
    /// [`TlsInfo::client_certificates`](super::TlsInfo::client_certificates) is empty.
    Optional,
}

/// As [`server_config`], and demands client certificates that lead to one in the PEM file `roots`.
///
/// The verified chain is in [`TlsInfo::client_certificates`](super::TlsInfo::client_certificates),
/// after a resumed handshake too. Only the issuer is verified: decide by the certificate what
/// *this* client may do. A chain that is expensive to verify is refused, with the bounds of
/// [`BoundedVerifier`]. For revocation lists build a [`rustls::ServerConfig`] yourself.
///
/// # Errors
///
/// As for [`server_config`], and for roots without a certificate that can sign others.
///
/// ```no_run
/// use portcullis::tls::{server_config_with_clients, ClientAuth};
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let clients = ClientAuth::Required;
/// let config = server_config_with_clients("chain.pem", "key.pem", "clients-ca.pem", clients)?;
/// let listen = portcullis::Listen::tcp("0.0.0.0:8883").tls(config);
/// # let _ = listen; Ok(()) }
/// ```
pub fn server_config_with_clients(
    chain: impl AsRef<Path>,
    key: impl AsRef<Path>,
    roots: impl AsRef<Path>,
    clients: ClientAuth,
) -> Result<Arc<ServerConfig>, PemError> {
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
    build(
        chain,
        key,
        &provider,
        Arc::new(BoundedVerifier::new(verifier)),
    )
}

/// Makes a TLS 1.2 and 1.3 configuration for outgoing connections
/// ([`Connect::tls`](crate::Connect::tls)).
///
/// It accepts servers whose certificates lead to one in the PEM file `roots`. This library contains
/// no certificates; the system's are often in a file such as `/etc/ssl/certs/ca-certificates.crt`.
///
/// The provider is that of [`server_config`]. A chain that is expensive to verify is refused, with
/// the bounds of [`BoundedVerifier`]. For ALPN or a certificate of your own change the result. For
/// roots in memory (`RootCertStore`) build a [`rustls::ClientConfig`] yourself.
///
/// # Errors
///
/// A file that cannot be read, or contains no certificate that can sign others: [`PemError`] names
/// the file and the fault.
///
/// ```no_run
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let config = portcullis::tls::client_config("ca.pem")?;
/// let connect = portcullis::Connect::new().tls(config, "backend.example.org");
/// # let _ = connect; Ok(()) }
/// ```
pub fn client_config(roots: impl AsRef<Path>) -> Result<Arc<ClientConfig>, PemError> {
    let roots = roots.as_ref();
    let store = root_store(roots, "holds a certificate that cannot vouch for servers")?;
    let provider = provider(roots)?;
    let verifier =
        WebPkiServerVerifier::builder_with_provider(Arc::new(store), Arc::clone(&provider))
            .build()
            .map_err(|error| {
                PemError::new(roots, "cannot be used to verify servers").because(error.to_string())
            })?;
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| {
            PemError::new(roots, "cannot be used with this TLS provider").because(error)
        })?
        // "Dangerous" is any verifier but rustls' own, even one around it.
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(BoundedVerifier::new(verifier)))
        .with_no_client_auth();
    Ok(Arc::new(config))
}

fn root_store(roots: &Path, fault: &str) -> Result<RootCertStore, PemError> {
    let mut store = RootCertStore::empty();
    for certificate in certificates(roots)? {
        store
            .add(certificate)
            .map_err(|error| PemError::new(roots, fault).because(error.to_string()))?;
    }
    Ok(store)
}

/// Reads the certificates in a file, at least one.
fn certificates(file: &Path) -> Result<Vec<CertificateDer<'static>>, PemError> {
    let certificates = CertificateDer::pem_file_iter(file)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|error| PemError::parsing(file, "certificate", error))?;
    if certificates.is_empty() {
        return Err(PemError::parsing(
            file,
            "certificate",
            pem::Error::NoItemsFound,
        ));
    }
    Ok(certificates)
}

fn build(
    chain_file: &Path,
    key_file: &Path,
    provider: &Arc<CryptoProvider>,
    verifier: Arc<dyn ClientCertVerifier>,
) -> Result<Arc<ServerConfig>, PemError> {
    let chain = certificates(chain_file)?;
    let key = PrivateKeyDer::from_pem_file(key_file)
        .map_err(|error| PemError::parsing_key(key_file, error))?;
    ServerConfig::builder_with_provider(Arc::clone(provider))
        .with_safe_default_protocol_versions()
        .map_err(|error| {
            PemError::new(key_file, "cannot be used with this TLS provider").because(error)
        })?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key)
        .map(Arc::new)
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
