//! A bound on what verifying a peer's certificate chain costs.
//!
//! Verifiers search for a path: every certificate may be tried behind every other whose issuer has
//! its name. rustls-webpki gives up after 200,000 steps and 100 signatures, which takes seconds.

use std::error::Error as StdError;
use std::fmt;
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, OtherError, SignatureScheme,
};

/// rustls-webpki finds no longer path.
const MAX_INTERMEDIATES: usize = 6;
/// A path of six intermediates, and three detours for authorities that are signed crosswise.
const MAX_STEPS: usize = 10;
const MAX_CERTIFICATE: usize = 16 * 1024;
/// Post-quantum keys have 2,592 bytes at most (ML-DSA-87, FIPS 204).
const MAX_KEY: usize = 4096;
const MAX_RSA_BITS: usize = 4096;
/// Exponents are this one nearly always; a longer one makes a signature many times as expensive.
const MAX_RSA_EXPONENT: u64 = 65_537;
const MAX_EXTENSIONS: usize = 64;
/// Bytes of an extension that is a list which is read whole: key usages, distribution points.
const MAX_LIST: usize = 2048;
const MAX_NAMES: usize = 512;
/// Comparisons of a name with a name constraint, in all steps together.
const MAX_COMPARISONS: usize = 40_000;

/// A verifier that refuses certificate chains whose verification is expensive, before it calls the
/// verifier inside.
///
/// A certificate chain is at most 64 KiB, but a crafted one makes a verifier try thousands of
/// paths. That takes seconds for one handshake, in which no other connection is served. The
/// configurations of [`server_config_with_clients`](super::server_config_with_clients) and
/// [`client_config`](super::client_config) have this bound. Put it around the verifier of a
/// configuration that you build yourself:
///
/// ```
/// use std::sync::Arc;
/// use portcullis::tls::rustls::server::{VerifierBuilderError, WebPkiClientVerifier};
/// use portcullis::tls::rustls::server::danger::ClientCertVerifier;
/// use portcullis::tls::rustls::RootCertStore;
/// use portcullis::tls::BoundedVerifier;
///
/// # #[cfg(any(feature = "ring", feature = "aws-lc-rs"))]
/// fn verifier(
///     roots: Arc<RootCertStore>,
/// ) -> Result<Arc<dyn ClientCertVerifier>, VerifierBuilderError> {
///     let verifier = WebPkiClientVerifier::builder(roots).build()?;
///     Ok(Arc::new(BoundedVerifier::new(verifier)))
/// }
/// ```
///
/// A verifier for servers goes into `ClientConfig::dangerous().set_certificate_verifier`.
///
/// # What is refused
///
/// - More than 6 intermediate certificates; rustls-webpki uses no more.
/// - Intermediate certificates that fit together in too many ways: more than 10 steps of the
///   search. A chain without two certificates of one name needs one step for each certificate. The
///   other steps are for authorities that are signed crosswise.
/// - A certificate of more than 16 KiB, or with more than 64 extensions or 512 names, or with a
///   list of key usages or distribution points above 2 KiB.
/// - RSA keys of more than 4096 bits or with an exponent above 65,537; other keys above 4 KiB.
/// - More than 40,000 comparisons of names with name constraints, in all steps together.
///
/// The handshake then ends as [`TlsHandshake`](crate::CloseReason::TlsHandshake), with the bound in
/// its error. The worst chain within the bounds costs less than ten common ones. Your own roots and
/// revocation lists are not bounded: they are the same for each peer.
pub struct BoundedVerifier<V: ?Sized>(Arc<V>);

impl<V: ?Sized> BoundedVerifier<V> {
    /// Puts the bound around `verifier`: a [`ClientCertVerifier`], a [`ServerCertVerifier`], or a
    /// trait object of one of them.
    pub fn new(verifier: Arc<V>) -> Self {
        Self(verifier)
    }
}

impl<V: fmt::Debug + ?Sized> fmt::Debug for BoundedVerifier<V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("BoundedVerifier").field(&&*self.0).finish()
    }
}

/// The methods that both traits have: the verifier inside answers.
macro_rules! delegate {
    () => {
        fn verify_tls12_signature(
            &self,
            message: &[u8],
            cert: &CertificateDer<'_>,
            dss: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            self.0.verify_tls12_signature(message, cert, dss)
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            cert: &CertificateDer<'_>,
            dss: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            self.0.verify_tls13_signature(message, cert, dss)
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            self.0.supported_verify_schemes()
        }

        fn requires_raw_public_keys(&self) -> bool {
            self.0.requires_raw_public_keys()
        }
    };
}

impl<V: ClientCertVerifier + ?Sized> ClientCertVerifier for BoundedVerifier<V> {
    fn offer_client_auth(&self) -> bool {
        self.0.offer_client_auth()
    }

    fn client_auth_mandatory(&self) -> bool {
        self.0.client_auth_mandatory()
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.0.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        check(end_entity, intermediates, self.0.requires_raw_public_keys())?;
        self.0.verify_client_cert(end_entity, intermediates, now)
    }

    delegate!();
}

impl<V: ServerCertVerifier + ?Sized> ServerCertVerifier for BoundedVerifier<V> {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        check(end_entity, intermediates, self.0.requires_raw_public_keys())?;
        self.0
            .verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
    }

    delegate!();

    fn root_hint_subjects(&self) -> Option<&[DistinguishedName]> {
        self.0.root_hint_subjects()
    }
}

/// The bound that a chain exceeds.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Excess {
    Intermediates(usize),
    Steps,
    Certificate(usize),
    Key,
    RsaKey,
    Extensions,
    List,
    Names,
    Comparisons,
}

impl fmt::Display for Excess {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the peer's certificate chain is too expensive to verify: ")?;
        match self {
            Self::Intermediates(count) => write!(
                f,
                "{count} intermediate certificates, at most {MAX_INTERMEDIATES}"
            ),
            Self::Steps => write!(
                f,
                "its certificates fit together in too many ways, more than {MAX_STEPS} steps"
            ),
            Self::Certificate(bytes) => write!(
                f,
                "a certificate of {bytes} bytes, at most {MAX_CERTIFICATE}"
            ),
            Self::Key => write!(f, "a public key of more than {MAX_KEY} bytes"),
            Self::RsaKey => write!(
                f,
                "an RSA key of more than {MAX_RSA_BITS} bits, \
                 or with an exponent above {MAX_RSA_EXPONENT}"
            ),
            Self::Extensions => write!(f, "a certificate of more than {MAX_EXTENSIONS} extensions"),
            Self::List => write!(f, "a list in a certificate of more than {MAX_LIST} bytes"),
            Self::Names => write!(f, "a certificate of more than {MAX_NAMES} names"),
            Self::Comparisons => write!(
                f,
                "more than {MAX_COMPARISONS} comparisons of names with name constraints"
            ),
        }
    }
}

/// The same words: rustls prints the error of a verifier so.
impl fmt::Debug for Excess {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl StdError for Excess {}

/// Why a chain is refused before it is verified.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Refusal {
    /// The certificate is damaged.
    BadDer,
    TooMuch(Excess),
}

impl From<Excess> for Refusal {
    fn from(excess: Excess) -> Self {
        Self::TooMuch(excess)
    }
}

impl From<Refusal> for rustls::Error {
    fn from(refusal: Refusal) -> Self {
        Self::InvalidCertificate(match refusal {
            Refusal::BadDer => CertificateError::BadEncoding,
            Refusal::TooMuch(excess) => CertificateError::Other(OtherError(Arc::new(excess))),
        })
    }
}

/// Checks what a peer presents. With `raw_keys` that is a public key without a certificate (RFC
/// 7250).
fn check(
    end_entity: &[u8],
    intermediates: &[CertificateDer<'_>],
    raw_keys: bool,
) -> Result<(), Refusal> {
    if intermediates.len() > MAX_INTERMEDIATES {
        return Err(Excess::Intermediates(intermediates.len()).into());
    }
    if raw_keys {
        return check_key(Der(end_entity).read(SEQUENCE)?.0);
    }
    let end_entity = Outline::of(end_entity)?;
    let outlines = intermediates
        .iter()
        .map(|certificate| Outline::of(certificate))
        .collect::<Result<Vec<_>, _>>()?;
    let mut search = Search {
        intermediates: &outlines,
        steps: 0,
        comparisons: 0,
    };
    search.visit(&mut vec![&end_entity], 0)?;
    Ok(())
}

/// The search for paths as rustls-webpki makes it, if no signature were to stop it.
struct Search<'a> {
    intermediates: &'a [Outline<'a>],
    steps: usize,
    comparisons: usize,
}

impl<'a> Search<'a> {
    /// Visits the end of `path`, whose names are compared with constraints `comparisons` times.
    /// Recursion is as deep as the intermediates are many.
    fn visit(&mut self, path: &mut Vec<&'a Outline<'a>>, comparisons: usize) -> Result<(), Excess> {
        self.steps += 1;
        if self.steps > MAX_STEPS {
            return Err(Excess::Steps);
        }
        self.comparisons = self.comparisons.saturating_add(comparisons);
        if self.comparisons > MAX_COMPARISONS {
            return Err(Excess::Comparisons);
        }
        let Some(issuer) = path.last().map(|last| last.issuer) else {
            return Ok(());
        };
        let intermediates = self.intermediates;
        for next in intermediates.iter().filter(|next| next.subject == issuer) {
            // RFC 4158 section 5.2: no path leads through one key twice.
            let is_loop = path
                .iter()
                .any(|prev| prev.subject == next.subject && prev.key == next.key);
            if is_loop {
                continue;
            }
            let names = path.iter().map(|below| below.names).sum::<usize>();
            path.push(next);
            self.visit(path, comparisons + names * next.constraints)?;
            path.pop();
        }
        Ok(())
    }
}

/// What the search for a path depends on.
#[derive(Debug, Default)]
struct Outline<'a> {
    issuer: &'a [u8],
    subject: &'a [u8],
    key: &'a [u8],
    /// Names that are compared with the constraints of certificates above: the subject, and all
    /// alternative names.
    names: usize,
    constraints: usize,
}

const INTEGER: u8 = 0x02;
const BIT_STRING: u8 = 0x03;
const OCTET_STRING: u8 = 0x04;
const OID: u8 = 0x06;
const SEQUENCE: u8 = 0x30;
const VERSION: u8 = 0xa0;
const EXTENSIONS: u8 = 0xa3;

/// id-ce (RFC 5280 section 4.2.1): 2.5.29.
const STANDARD: [u8; 2] = [0x55, 0x1d];
const SUBJECT_ALT_NAME: u8 = 17;
const NAME_CONSTRAINTS: u8 = 30;
const CRL_DISTRIBUTION_POINTS: u8 = 31;
const EXTENDED_KEY_USAGE: u8 = 37;

/// pkcs-1 (RFC 8017 appendix C): rsaEncryption is 1, id-RSASSA-PSS is 10.
const PKCS_1: [u8; 8] = [0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01];

impl<'a> Outline<'a> {
    /// RFC 5280 section 4.1.
    fn of(certificate: &'a [u8]) -> Result<Self, Refusal> {
        if certificate.len() > MAX_CERTIFICATE {
            return Err(Excess::Certificate(certificate.len()).into());
        }
        let mut signed = Der(certificate).read(SEQUENCE)?;
        let mut body = signed.read(SEQUENCE)?;
        if body.peek() == Some(VERSION) {
            body.read(VERSION)?;
        }
        body.read(INTEGER)?; // the serial number
        body.read(SEQUENCE)?; // the signature's algorithm
        let issuer = body.read(SEQUENCE)?.0;
        body.read(SEQUENCE)?; // the validity
        let subject = body.read(SEQUENCE)?.0;
        let key = body.read(SEQUENCE)?.0;
        check_key(key)?;
        let mut outline = Self {
            issuer,
            subject,
            key,
            names: 1,
            constraints: 0,
        };
        while let Some((tag, content)) = body.next()? {
            if tag == EXTENSIONS {
                outline.read_extensions(Der(content).read(SEQUENCE)?)?;
            }
        }
        Ok(outline)
    }

    fn read_extensions(&mut self, mut extensions: Der<'a>) -> Result<(), Refusal> {
        let mut count = 0;
        while !extensions.0.is_empty() {
            count += 1;
            if count > MAX_EXTENSIONS {
                return Err(Excess::Extensions.into());
            }
            let mut extension = extensions.read(SEQUENCE)?;
            let id = extension.read(OID)?.0;
            let Some(&[id]) = id.strip_prefix(&STANDARD) else {
                continue;
            };
            let value = loop {
                match extension.next()? {
                    Some((OCTET_STRING, value)) => break value,
                    Some(_) => {} // whether it is critical
                    None => return Err(Refusal::BadDer),
                }
            };
            match id {
                SUBJECT_ALT_NAME => {
                    self.names += Der(value).read(SEQUENCE)?.count();
                    if self.names > MAX_NAMES {
                        return Err(Excess::Names.into());
                    }
                }
                NAME_CONSTRAINTS => {
                    let mut lists = Der(value).read(SEQUENCE)?;
                    while let Some((_, list)) = lists.next()? {
                        self.constraints += Der(list).count();
                    }
                }
                CRL_DISTRIBUTION_POINTS | EXTENDED_KEY_USAGE if value.len() > MAX_LIST => {
                    return Err(Excess::List.into());
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// Checks the content of a SubjectPublicKeyInfo (RFC 5280 section 4.1).
fn check_key(key: &[u8]) -> Result<(), Refusal> {
    if key.len() > MAX_KEY {
        return Err(Excess::Key.into());
    }
    let mut info = Der(key);
    let algorithm = info.read(SEQUENCE)?.read(OID)?.0;
    if !matches!(algorithm.strip_prefix(&PKCS_1), Some([1 | 10])) {
        return Ok(());
    }
    // A first byte counts the unused bits, of which there are none.
    let Some((0, key)) = info.read(BIT_STRING)?.0.split_first() else {
        return Err(Refusal::BadDer);
    };
    let mut key = Der(key).read(SEQUENCE)?;
    let (modulus, exponent) = (key.read_number()?, key.read_number()?);
    let is_long = exponent.len() > size_of::<u64>();
    let exponent = exponent
        .iter()
        .fold(0, |value, &byte| value << 8 | u64::from(byte));
    if modulus.len() > MAX_RSA_BITS / 8 || is_long || exponent > MAX_RSA_EXPONENT {
        return Err(Excess::RsaKey.into());
    }
    Ok(())
}

/// The rest of a DER encoding (X.690).
#[derive(Clone, Copy)]
struct Der<'a>(&'a [u8]);

impl<'a> Der<'a> {
    fn peek(self) -> Option<u8> {
        self.0.first().copied()
    }

    /// Takes the next element, its tag and content; `None` at the end.
    fn next(&mut self) -> Result<Option<(u8, &'a [u8])>, Refusal> {
        let &[tag, length, ref rest @ ..] = self.0 else {
            return if self.0.is_empty() {
                Ok(None)
            } else {
                Err(Refusal::BadDer)
            };
        };
        let (length, rest) = match length {
            0..=0x7f => (usize::from(length), rest),
            0x81..=0x84 => {
                let (length, rest) = rest
                    .split_at_checked(usize::from(length & 0x7f))
                    .ok_or(Refusal::BadDer)?;
                let length = length
                    .iter()
                    .fold(0, |value, &byte| value << 8 | usize::from(byte));
                (length, rest)
            }
            _ => return Err(Refusal::BadDer),
        };
        let (content, rest) = rest.split_at_checked(length).ok_or(Refusal::BadDer)?;
        self.0 = rest;
        Ok(Some((tag, content)))
    }

    fn read(&mut self, tag: u8) -> Result<Self, Refusal> {
        match self.next()? {
            Some((found, content)) if found == tag => Ok(Self(content)),
            _ => Err(Refusal::BadDer),
        }
    }

    /// Takes a number, without leading zeros.
    fn read_number(&mut self) -> Result<&'a [u8], Refusal> {
        let number = self.read(INTEGER)?.0;
        let zeros = number.iter().take_while(|&&byte| byte == 0).count();
        Ok(number.get(zeros..).unwrap_or_default())
    }

    /// The number of elements; those behind a damaged one are never read.
    fn count(mut self) -> usize {
        let mut count = 0;
        while let Ok(Some(_)) = self.next() {
            count += 1;
        }
        count
    }
}

#[cfg(all(test, any(feature = "ring", feature = "aws-lc-rs")))]
mod tests;
