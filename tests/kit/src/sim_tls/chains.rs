//! Chains of client certificates for the simulator, some of them expensive to verify, and a verifier
//! that counts the steps.

use std::cell::Cell;
use std::error::Error;
use std::fmt;
use std::sync::Arc;

use portcullis::tls::rustls::client::danger::HandshakeSignatureValid;
use portcullis::tls::rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer, UnixTime};
use portcullis::tls::rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use portcullis::tls::rustls::{self, DigitallySignedStruct, DistinguishedName, SignatureScheme};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};

use crate::tls::provider;

/// What a client shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Chain {
    Nothing,
    /// A certificate below two authorities.
    Honest,
    /// Six authorities of one name: each may have signed each other.
    Tangled,
    /// More authorities than a verifier uses.
    Long,
}

impl Chain {
    pub const ALL: [Self; 4] = [Self::Nothing, Self::Honest, Self::Tangled, Self::Long];

    /// The authorities' names, from the lowest.
    fn names(self) -> &'static [&'static str] {
        match self {
            Self::Nothing => &[],
            Self::Honest => &["one", "two"],
            Self::Tangled => &["one"; 6],
            Self::Long => &["1", "2", "3", "4", "5", "6", "7", "8"],
        }
    }
}

/// A certificate, with the names that a search for paths compares.
struct Link {
    der: CertificateDer<'static>,
    subject: &'static str,
    issuer: &'static str,
}

/// A chain from the client's certificate upwards, and its key.
pub struct Shown {
    links: Vec<Link>,
    key: Vec<u8>,
}

impl Shown {
    pub fn new(chain: Chain) -> Result<Self, Box<dyn Error>> {
        let names = chain.names();
        let mut links = Vec::new();
        let mut above = names.last().copied().unwrap_or("none");
        let (params, key) = parts(above, 100, true)?;
        let mut issuer = Issuer::new(params, key);
        for (at, &name) in names.iter().enumerate().rev() {
            let (params, key) = parts(name, at as u64 + 2, true)?;
            links.push(Link {
                der: params.signed_by(&key, &issuer)?.der().clone(),
                subject: name,
                issuer: above,
            });
            (issuer, above) = (Issuer::new(params, key), name);
        }
        let (params, key) = parts("client", 1, false)?;
        links.push(Link {
            der: params.signed_by(&key, &issuer)?.der().clone(),
            subject: "client",
            issuer: above,
        });
        links.reverse();
        let key = key.serialize_der();
        Ok(Self { links, key })
    }

    pub fn certificates(&self) -> Vec<CertificateDer<'static>> {
        self.links.iter().map(|link| link.der.clone()).collect()
    }

    pub fn key(&self) -> PrivatePkcs8KeyDer<'static> {
        PrivatePkcs8KeyDer::from(self.key.clone())
    }

    /// Steps of a search that tries each authority of the right name that is not in the path.
    fn steps(&self, path: &mut Vec<usize>) -> usize {
        let issuer = path.last().map(|&last| self.links[last].issuer);
        let mut steps = 1;
        for next in 1..self.links.len() {
            if Some(self.links[next].subject) == issuer && !path.contains(&next) {
                path.push(next);
                steps += self.steps(path);
                path.pop();
            }
        }
        steps
    }
}

/// With lengths that are the same in each run.
fn parts(
    name: &str,
    serial: u64,
    signs: bool,
) -> Result<(CertificateParams, KeyPair), Box<dyn Error>> {
    let key = KeyPair::generate_for(&rcgen::PKCS_ED25519)?;
    let mut params = CertificateParams::new([])?;
    params.serial_number = Some(rcgen::SerialNumber::from(serial));
    params.distinguished_name.push(DnType::CommonName, name);
    if signs {
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    }
    Ok((params, key))
}

thread_local! {
    /// The most steps that one chain has cost on this thread, since that was last taken.
    static MOST_STEPS: Cell<usize> = const { Cell::new(0) };
}

/// Returns the most steps that one chain has cost on this thread since the last call.
pub fn take_most_steps() -> usize {
    MOST_STEPS.take()
}

/// Accepts every chain, and counts the steps of a search for its path instead of making them.
pub struct CountingVerifier(pub Vec<Arc<Shown>>);

impl fmt::Debug for CountingVerifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("CountingVerifier")
    }
}

impl ClientCertVerifier for CountingVerifier {
    fn client_auth_mandatory(&self) -> bool {
        false
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let is_first = |shown: &&Arc<Shown>| shown.links[0].der == *end_entity;
        let shown = self.0.iter().find(is_first);
        let steps = shown.map_or(usize::MAX, |shown| shown.steps(&mut vec![0]));
        MOST_STEPS.set(MOST_STEPS.get().max(steps));
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = provider().signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, cert, dss, &algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = provider().signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, cert, dss, &algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        let algorithms = provider().signature_verification_algorithms;
        algorithms.supported_schemes()
    }
}
