use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use rcgen::{
    BasicConstraints, CertificateParams, DnType, GeneralSubtree, IsCa, Issuer, KeyPair,
    NameConstraints,
};
use rustls::client::WebPkiServerVerifier;
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms};
use rustls::pki_types::{AlgorithmIdentifier, InvalidSignature, SignatureVerificationAlgorithm};
use rustls::server::WebPkiClientVerifier;
use rustls::RootCertStore;

use super::*;

/// Counts the signatures that it verifies.
#[derive(Debug)]
struct Counting {
    inner: &'static dyn SignatureVerificationAlgorithm,
    count: Arc<AtomicUsize>,
}

impl SignatureVerificationAlgorithm for Counting {
    fn verify_signature(
        &self,
        key: &[u8],
        message: &[u8],
        signature: &[u8],
    ) -> Result<(), InvalidSignature> {
        self.count.fetch_add(1, Ordering::Relaxed);
        self.inner.verify_signature(key, message, signature)
    }

    fn public_key_alg_id(&self) -> AlgorithmIdentifier {
        self.inner.public_key_alg_id()
    }

    fn signature_alg_id(&self) -> AlgorithmIdentifier {
        self.inner.signature_alg_id()
    }
}

/// A provider whose verified signatures are counted.
fn counting() -> (Arc<CryptoProvider>, Arc<AtomicUsize>) {
    #[cfg(feature = "ring")]
    let mut provider = rustls::crypto::ring::default_provider();
    #[cfg(not(feature = "ring"))]
    let mut provider = rustls::crypto::aws_lc_rs::default_provider();
    let count = Arc::new(AtomicUsize::new(0));
    let algorithms = provider.signature_verification_algorithms;
    let all: Vec<&'static dyn SignatureVerificationAlgorithm> = algorithms
        .all
        .iter()
        .map(|&inner| {
            let count = Arc::clone(&count);
            &*Box::leak(Box::new(Counting { inner, count }))
                as &'static dyn SignatureVerificationAlgorithm
        })
        .collect();
    provider.signature_verification_algorithms = WebPkiSupportedAlgorithms {
        all: Vec::leak(all),
        mapping: algorithms.mapping,
    };
    (Arc::new(provider), count)
}

/// A name with a key: it may issue certificates, genuine ones and others.
struct Party {
    params: CertificateParams,
    issuer: Issuer<'static, KeyPair>,
}

impl Party {
    fn new(name: &str) -> Self {
        Self::with_params(params(name, true))
    }

    fn with_params(params: CertificateParams) -> Self {
        let key = KeyPair::generate().expect("a key");
        Self {
            issuer: Issuer::new(params.clone(), key),
            params,
        }
    }

    fn certify(&self, subject: &Self) -> CertificateDer<'static> {
        let made = subject.params.signed_by(subject.issuer.key(), &self.issuer);
        made.expect("a certificate").der().clone()
    }

    /// The certificate of an end entity.
    fn issue(&self, names: usize) -> CertificateDer<'static> {
        let mut params = params("end", false);
        let names = (0..names).map(|name| {
            let name = format!("n{name}.test");
            rcgen::SanType::DnsName(name.try_into().expect("a name"))
        });
        params.subject_alt_names.extend(names);
        self.certify(&Self::with_params(params))
    }
}

fn params(name: &str, may_sign: bool) -> CertificateParams {
    let mut params = CertificateParams::new(vec!["server.test".to_owned()]).expect("a name");
    params.distinguished_name.push(DnType::CommonName, name);
    if may_sign {
        params.subject_alt_names.clear();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    }
    params
}

/// Verifiers of both sides with one root, and the signatures that they have verified.
struct Desk {
    root: Party,
    client: BoundedVerifier<dyn ClientCertVerifier>,
    server: BoundedVerifier<WebPkiServerVerifier>,
    count: Arc<AtomicUsize>,
}

impl Desk {
    fn new() -> Self {
        let root = Party::new("root");
        let mut roots = RootCertStore::empty();
        roots.add(root.certify(&root)).expect("a root");
        let roots = Arc::new(roots);
        let (provider, count) = counting();
        let client =
            WebPkiClientVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(&provider));
        let server = WebPkiServerVerifier::builder_with_provider(roots, provider);
        Self {
            root,
            client: BoundedVerifier::new(client.build().expect("a verifier")),
            server: BoundedVerifier::new(server.build().expect("a verifier")),
            count,
        }
    }

    /// Verifies a chain as a client's and as a server's. Returns the errors, which are equal, and
    /// the signatures that one of them took.
    fn verify(
        &self,
        end: &CertificateDer<'_>,
        chain: &[CertificateDer<'_>],
    ) -> (Result<(), rustls::Error>, usize) {
        let now = UnixTime::since_unix_epoch(Duration::from_secs(1_800_000_000));
        self.count.store(0, Ordering::Relaxed);
        let client = self.client.verify_client_cert(end, chain, now).map(|_| ());
        let count = self.count.swap(0, Ordering::Relaxed);
        let name = ServerName::try_from("server.test").expect("a name");
        let server = self
            .server
            .verify_server_cert(end, chain, &name, &[], now)
            .map(|_| ());
        assert_eq!(format!("{client:?}"), format!("{server:?}"));
        assert_eq!(self.count.load(Ordering::Relaxed), count);
        (client, count)
    }

    #[track_caller]
    fn refuse(&self, end: &CertificateDer<'_>, chain: &[CertificateDer<'_>], words: &str) {
        let (outcome, count) = self.verify(end, chain);
        let error = outcome.expect_err("refused").to_string();
        assert!(
            error.contains("too expensive") && error.contains(words),
            "{error}"
        );
        assert_eq!(count, 0, "before anything is verified");
    }
}

#[test]
fn common_chains_are_verified() {
    let desk = Desk::new();
    let (first, second) = (Party::new("first"), Party::new("second"));
    let one = [desk.root.certify(&first)];
    assert_eq!(desk.verify(&first.issue(1), &one), (Ok(()), 2));
    let two = [
        first.certify(&second),
        desk.root.certify(&first),
        desk.root.certify(&desk.root),
    ];
    assert_eq!(desk.verify(&second.issue(100), &two), (Ok(()), 3));
    assert_eq!(desk.verify(&desk.root.issue(1), &[]), (Ok(()), 1));
    // The longest path that rustls-webpki finds.
    let parties: Vec<_> = (0..6).map(|n| Party::new(&format!("ca{n}"))).collect();
    let mut chain = vec![desk.root.certify(&parties[0])];
    chain.extend(parties.windows(2).map(|pair| pair[0].certify(&pair[1])));
    assert_eq!(desk.verify(&parties[5].issue(1), &chain), (Ok(()), 7));
}

/// An authority that is signed by itself and by two others, and its root sent along.
#[test]
fn authorities_may_be_signed_crosswise() {
    let desk = Desk::new();
    let (other, cross, low) = (Party::new("other"), Party::new("cross"), Party::new("low"));
    let chain = [
        cross.certify(&low),
        cross.certify(&cross),
        other.certify(&cross),
        desk.root.certify(&cross),
        desk.root.certify(&desk.root),
        other.certify(&other),
    ];
    let (outcome, count) = desk.verify(&low.issue(1), &chain);
    assert_eq!(outcome, Ok(()));
    assert!(count <= 6, "{count}");
}

/// Certificates of one name, each of which may have signed every other.
#[test]
fn certificates_that_fit_in_many_ways_are_refused() {
    let desk = Desk::new();
    let ways = |name: &str, count: usize| -> Vec<_> {
        let parties: Vec<_> = (0..count).map(|_| Party::new(name)).collect();
        parties.iter().map(|party| party.certify(party)).collect()
    };
    for name in ["A", "root"] {
        let end = Party::new(name).issue(1);
        desk.refuse(&end, &ways(name, 7), "7 intermediate certificates");
        desk.refuse(&end, &ways(name, 100), "100 intermediate certificates");
        for count in 3..=6 {
            desk.refuse(&end, &ways(name, count), "too many ways");
        }
        let (outcome, count) = desk.verify(&end, &ways(name, 2));
        assert!(outcome.is_err() && count <= 20, "{count}");
    }
    // Copies of one certificate lead nowhere, but are searched.
    let (first, second) = (Party::new("first"), Party::new("second"));
    let copies = [
        vec![desk.root.certify(&first); 3],
        vec![first.certify(&second); 3],
    ];
    desk.refuse(
        &Party::new("second").issue(1),
        &copies.concat(),
        "too many ways",
    );
}

/// Genuine authorities whose paths all fail at their very end: the most signatures for one chain.
#[test]
fn the_worst_chain_costs_less_than_ten_common_ones() {
    let desk = Desk::new();
    let common = {
        let first = Party::new("first");
        let (outcome, count) = desk.verify(&first.issue(1), &[desk.root.certify(&first)]);
        assert_eq!(outcome, Ok(()));
        count + 1 // the handshake's own signature
    };
    let mut worst = 0;
    // Layers of authorities, each of which signs all of the next layer.
    for layers in [
        vec![6],
        vec![1, 5],
        vec![1, 1, 4],
        vec![1, 1, 3],
        vec![1, 1, 1, 3],
        vec![1, 1, 2, 2],
        vec![1, 2, 3],
        vec![2, 2, 2],
        vec![1, 1, 1, 1, 2],
        vec![1, 1, 1, 1, 1, 1],
    ] {
        let mut chain = Vec::new();
        let mut above: Vec<Party> = Vec::new();
        for (depth, &width) in layers.iter().enumerate() {
            let layer: Vec<_> = (0..width)
                .map(|_| Party::new(&format!("L{depth}")))
                .collect();
            for party in &layer {
                let signer = above.first().unwrap_or(&desk.root);
                chain.push(signer.certify(party));
            }
            above = layer;
        }
        let fake = Party::new(&format!("L{}", layers.len() - 1));
        let (outcome, count) = desk.verify(&fake.issue(1), &chain);
        assert!(outcome.is_err());
        worst = worst.max(count);
    }
    assert!(worst > common, "the layers are searched");
    assert!(
        worst <= 10 * common,
        "{worst} signatures, {common} are common"
    );
}

#[test]
fn names_and_their_constraints_are_bounded() {
    let desk = Desk::new();
    desk.refuse(&desk.root.issue(600), &[], "names");
    let narrow = |constraints: usize| {
        let mut params = params("narrow", true);
        let names = (0..constraints).map(|n| GeneralSubtree::DnsName(format!("c{n}.test")));
        params.name_constraints = Some(NameConstraints {
            permitted_subtrees: vec![GeneralSubtree::DnsName("test".to_owned())],
            excluded_subtrees: names.collect(),
        });
        Party::with_params(params)
    };
    let few = narrow(50);
    let (outcome, _) = desk.verify(&few.issue(100), &[desk.root.certify(&few)]);
    assert_eq!(outcome, Ok(()));
    let many = narrow(500);
    desk.refuse(&many.issue(100), &[desk.root.certify(&many)], "comparisons");
}

#[test]
fn large_certificates_and_lists_are_refused() {
    let desk = Desk::new();
    let with = |extensions: Vec<(&[u64], usize)>| {
        let mut params = params("end", false);
        for (id, length) in extensions {
            let mut list = vec![0x30, 0x82];
            list.extend(u16::try_from(length).expect("a length").to_be_bytes());
            list.resize(list.len() + length, 5);
            let extension = rcgen::CustomExtension::from_oid_content(id, list);
            params.custom_extensions.push(extension);
        }
        desk.root.certify(&Party::with_params(params))
    };
    const OTHER: &[u64] = &[1, 3, 6, 1, 4, 1, 99_999, 1];
    assert_eq!(desk.verify(&with(vec![(OTHER, 10_000)]), &[]), (Ok(()), 1));
    desk.refuse(&with(vec![(OTHER, 17_000)]), &[], "bytes, at most 16384");
    desk.refuse(&with(vec![(&[2, 5, 29, 37], 3_000)]), &[], "a list");
    desk.refuse(&with(vec![(&[2, 5, 29, 31], 3_000)]), &[], "a list");
    desk.refuse(&with(vec![(OTHER, 1); 65]), &[], "extensions");
    let large = with(vec![(OTHER, 17_000)]);
    desk.refuse(&desk.root.issue(1), &[large], "bytes, at most 16384");
}

/// An element of DER with two bytes of length.
fn der(tag: u8, content: &[u8]) -> Vec<u8> {
    let length = u16::try_from(content.len()).expect("short").to_be_bytes();
    [&[tag, 0x82], &length[..], content].concat()
}

#[test]
fn large_keys_are_refused() {
    let rsa = |kind: u8, bits: usize, exponent: &[u8]| {
        let modulus = [vec![0], vec![0xc5; bits / 8]].concat();
        let key = [der(INTEGER, &modulus), der(INTEGER, exponent)].concat();
        let key = [vec![0], der(SEQUENCE, &key)].concat();
        let algorithm = der(OID, &[&PKCS_1[..], &[kind]].concat());
        [der(SEQUENCE, &algorithm), der(BIT_STRING, &key)].concat()
    };
    let refused = Err(Refusal::TooMuch(Excess::RsaKey));
    for kind in [1, 10] {
        for (bits, exponent, outcome) in [
            (2048, &[1, 0, 1][..], Ok(())),
            (4096, &[1, 0, 1], Ok(())),
            (4096, &[3], Ok(())),
            (4104, &[1, 0, 1], refused),
            (16_384, &[1, 0, 1], refused),
            (2048, &[1, 0, 3], refused),
            (2048, &[0, 0x80, 0, 0, 0], refused),
            (2048, &[0x7f; 200], refused),
        ] {
            assert_eq!(
                check_key(&rsa(kind, bits, exponent)),
                outcome,
                "{bits} {exponent:?}"
            );
        }
    }
    let long = [
        der(SEQUENCE, &der(OID, &[0x2a])),
        der(BIT_STRING, &[0; 5000]),
    ]
    .concat();
    assert_eq!(check_key(&long), Err(Refusal::TooMuch(Excess::Key)));
    let raw = der(SEQUENCE, &rsa(1, 8192, &[1, 0, 1]));
    let refusal = check(&raw, &[], true).expect_err("8192 bits");
    let words = rustls::Error::from(refusal).to_string();
    assert!(
        words.contains("an RSA key of more than 4096 bits"),
        "{words}"
    );
    let raw = der(SEQUENCE, &rsa(1, 2048, &[1, 0, 1]));
    assert_eq!(check(&raw, &[], true), Ok(()));
}

#[test]
fn a_large_key_is_named_in_the_error() {
    let raw = der(SEQUENCE, &[0; 5000]);
    let refused = check(&raw, &[], true).expect_err("it is large");
    let words = rustls::Error::from(refused).to_string();
    assert!(
        words.contains("a public key of more than 4096 bytes"),
        "{words}"
    );
}

/// A key has whole bytes (RFC 8017 appendix A.1.1).
#[test]
fn rsa_keys_with_unused_bits_are_refused() {
    let number = [der(INTEGER, &[0xc5; 256]), der(INTEGER, &[3])].concat();
    let key = der(SEQUENCE, &number);
    let algorithm = der(SEQUENCE, &der(OID, &[&PKCS_1[..], &[1]].concat()));
    for (first, outcome) in [
        (&[0][..], Ok(())),
        (&[1], Err(Refusal::BadDer)),
        (&[7], Err(Refusal::BadDer)),
    ] {
        let bits = der(BIT_STRING, &[first, &key].concat());
        assert_eq!(check_key(&[&algorithm[..], &bits].concat()), outcome);
    }
    let empty = [algorithm, der(BIT_STRING, &[])].concat();
    assert_eq!(check_key(&empty), Err(Refusal::BadDer));
}

#[test]
fn a_bounded_verifier_is_shown_with_the_one_inside() {
    let desk = Desk::new();
    let inside = format!("{:?}", desk.server.0);
    assert!(inside.contains("WebPkiServerVerifier"), "{inside}");
    assert_eq!(
        format!("{:?}", desk.server),
        format!("BoundedVerifier({inside})")
    );
}

/// Whatever bytes come: no panic, and what is cut off is refused.
#[test]
fn damaged_certificates_are_refused() {
    let desk = Desk::new();
    let end = desk.root.issue(3);
    assert_eq!(check(&end, &[], false), Ok(()));
    for length in 0..end.len() {
        assert_eq!(check(&end[..length], &[], false), Err(Refusal::BadDer));
    }
    for at in 0..end.len() {
        for byte in [0, 0x1f, 0x30, 0x80, 0x84, 0xa3, 0xff] {
            let mut bytes = end.to_vec();
            bytes[at] = byte;
            let _ = check(&bytes, &[bytes.clone().into(), end.clone()], false);
        }
    }
    let (outcome, _) = desk.verify(&end, &[vec![0x30, 3, 1].into()]);
    assert_eq!(outcome, Err(CertificateError::BadEncoding.into()));
}
