//! Client certificates, required and optional, with a configuration from PEM files; clients with
//! none or a wrong one, and the handler's view.
#![cfg(all(feature = "tls", any(feature = "ring", feature = "aws-lc-rs")))]

use std::io::{self, Read};
use std::path::PathBuf;
use std::sync::Arc;

use kit::net::{local, ping, Running};
use kit::tls::{
    handshake, notify, read_to_goodbye, secure, spawn_recorder, the_end, Agreed, Authority, Folder,
    Seen, Site, VERSIONS,
};
use portcullis::tls::rustls::ClientConfig;
use portcullis::tls::{server_config_with_clients, ClientAuth};
use portcullis::{CloseReason, Config};

/// The files, and the issuer of each.
struct Desk {
    folder: Folder,
    site: Site,
    clients: Authority,
    chain: PathBuf,
    key: PathBuf,
    roots: PathBuf,
}

impl Desk {
    fn new() -> Self {
        let (folder, site, clients) = (Folder::new(), Site::new(), Authority::new("clients"));
        Self {
            chain: folder.file("chain.pem", &site.identity.chain_pem),
            key: folder.file("key.pem", &site.identity.key_pem),
            roots: folder.file("roots.pem", clients.certificate.pem()),
            folder,
            site,
            clients,
        }
    }

    #[track_caller]
    fn serve(&self, clients: ClientAuth) -> Running<Seen> {
        let config = server_config_with_clients(&self.chain, &self.key, &self.roots, clients);
        spawn_recorder(Config::new(), local().tls(config.expect("a configuration")))
    }

    /// The fault that is found in `roots`, which must be named.
    #[track_caller]
    fn refused(&self, roots: &PathBuf) -> String {
        let error = server_config_with_clients(&self.chain, &self.key, roots, ClientAuth::Required);
        let error = error.expect_err("it cannot be used");
        let words = error.to_string();
        assert!(words.starts_with(&roots.display().to_string()), "{words}");
        words
    }
}

/// Over TLS 1.3 the client's half of the handshake is over before the server has judged it: the alert comes with the first read.
#[track_caller]
fn refusal(server: &Running<Seen>, client: &ClientConfig) -> io::Error {
    let outcome = handshake(server.addr(), client).and_then(|mut tls| tls.read_exact(&mut [0]));
    outcome.expect_err("refused")
}

#[track_caller]
fn visit(server: &Running<Seen>, client: &ClientConfig) {
    let mut tls = secure(server.addr(), client);
    ping(&mut tls, b"hello");
    notify(&mut tls);
    assert_eq!(read_to_goodbye(&mut tls), b"");
}

fn agreed(server: &Running<Seen>) -> Vec<Agreed> {
    server.ask(|seen, _| seen.agreed.clone())
}

#[test]
fn a_chain_that_leads_to_a_root_is_shown() {
    let desk = Desk::new();
    let alice = desk.clients.client("alice");
    for version in VERSIONS {
        for clients in [ClientAuth::Required, ClientAuth::Optional] {
            let server = desk.serve(clients);
            let client = desk.site.client_with(version, &alice);
            visit(&server, &client);
            visit(&server, &client);
            let seen = agreed(&server);
            assert_eq!((seen[0].resumed, seen[1].resumed), (false, true));
            assert!(
                seen.iter().all(|one| one.certificates == alice.chain),
                "{version:?} {clients:?}"
            );
        }
    }
}

#[test]
fn no_certificate_will_do_only_where_it_is_optional() {
    let desk = Desk::new();
    for version in VERSIONS {
        let anonymous = desk.site.client(version);
        let server = desk.serve(ClientAuth::Optional);
        visit(&server, &anonymous);
        visit(&server, &anonymous);
        let seen = agreed(&server);
        assert!(seen[1].resumed && seen.iter().all(|one| one.certificates.is_empty()));
        let server = desk.serve(ClientAuth::Required);
        let error = refusal(&server, &anonymous).to_string();
        assert!(
            error.contains("CertificateRequired") || error.contains("HandshakeFailure"),
            "{error}"
        );
        let (reason, cause) = the_end(&server);
        assert_eq!(reason, CloseReason::TlsHandshake);
        assert!(cause.contains("no certificates"), "{cause}");
    }
}

/// Also where no certificate is required: a wrong one is a false claim.
#[test]
fn a_wrong_certificate_is_refused_in_any_case() {
    let desk = Desk::new();
    let stranger = Authority::new("strangers").client("alice");
    let late = desk.clients.client_until("alice", 2020);
    for version in VERSIONS {
        for clients in [ClientAuth::Required, ClientAuth::Optional] {
            for (identity, alert, fault) in [
                (&stranger, "UnknownCA", "UnknownIssuer"),
                (&late, "CertificateExpired", "expired"),
            ] {
                let server = desk.serve(clients);
                let error = refusal(&server, &desk.site.client_with(version, identity)).to_string();
                assert!(error.contains(alert), "{error}");
                let (reason, cause) = the_end(&server);
                assert_eq!(reason, CloseReason::TlsHandshake);
                assert!(cause.contains(fault), "{cause}");
            }
        }
    }
}

#[test]
fn several_roots_may_share_a_file() {
    let mut desk = Desk::new();
    let others = Authority::new("others");
    let both = format!(
        "{}{}",
        desk.clients.certificate.pem(),
        others.certificate.pem()
    );
    desk.roots = desk.folder.file("both.pem", both);
    let server = desk.serve(ClientAuth::Required);
    visit(
        &server,
        &desk
            .site
            .client_with(VERSIONS[1], &desk.clients.client("alice")),
    );
    visit(
        &server,
        &desk.site.client_with(VERSIONS[0], &others.client("bob")),
    );
}

#[test]
fn roots_that_cannot_be_used_are_named() {
    let desk = Desk::new();
    let missing = desk.folder.path().join("missing.pem");
    assert!(desk.refused(&missing).contains("No such file"));
    let empty = desk.folder.file("empty.pem", "");
    assert!(desk.refused(&empty).contains("no certificate in PEM form"));
    // An empty sequence: whole, and no certificate.
    let rubbish = "-----BEGIN CERTIFICATE-----\nMAA=\n-----END CERTIFICATE-----\n";
    let rubbish = desk.folder.file("rubbish.pem", rubbish);
    assert!(desk.refused(&rubbish).contains("cannot vouch for clients"));
    // Chain and key are looked at as ever.
    let key = desk.folder.file("other.pem", &Site::new().identity.key_pem);
    let error = server_config_with_clients(&desk.chain, &key, &desk.roots, ClientAuth::Optional);
    let error = error.expect_err("they do not belong together");
    let words = error.to_string();
    assert!(words.starts_with(&key.display().to_string()), "{words}");
}

/// A crafted chain makes path building expensive: it is refused before that, on both sides, by the configurations of our own
/// functions.
#[test]
fn an_expensive_chain_is_refused() {
    let desk = Desk::new();
    let mut client = desk.clients.client("mallory");
    let ways: Vec<_> = (0..5).map(|_| Authority::new("clients")).collect();
    let ways = ways.iter().map(|way| way.certificate.der().clone());
    client.chain.extend(ways);
    for version in VERSIONS {
        for clients in [ClientAuth::Required, ClientAuth::Optional] {
            let server = desk.serve(clients);
            refusal(&server, &desk.site.client_with(version, &client));
            let (reason, cause) = the_end(&server);
            assert_eq!(reason, CloseReason::TlsHandshake);
            assert!(cause.contains("too many ways"), "{cause}");
            // The server goes on.
            visit(
                &server,
                &desk
                    .site
                    .client_with(version, &desk.clients.client("alice")),
            );
        }
    }
    let long = (0..7).map(|n| Authority::new(&format!("ca{n}")));
    client.chain.truncate(1);
    client
        .chain
        .extend(long.map(|way| way.certificate.der().clone()));
    let server = desk.serve(ClientAuth::Required);
    refusal(&server, &desk.site.client_with(VERSIONS[1], &client));
    let (_, cause) = the_end(&server);
    assert!(
        cause.contains("7 intermediate certificates, at most 6"),
        "{cause}"
    );
}

/// A session contains its client's chain, which the client chooses: the configuration keeps a megabyte of them.
#[test]
fn stored_sessions_are_bounded_in_bytes() {
    let desk = Desk::new();
    let clients = ClientAuth::Required;
    let config = server_config_with_clients(&desk.chain, &desk.key, &desk.roots, clients);
    let sessions = Arc::clone(&config.expect("a configuration").session_storage);
    assert!(!sessions.put(vec![1; 32], vec![0; 60_000]), "too large");
    let id = |number: u32| number.to_be_bytes().repeat(8);
    for number in 0..1000 {
        assert!(sessions.put(id(number), vec![0; 15_000]));
    }
    let stored = (0..1000).filter_map(|number| sessions.get(&id(number)));
    let stored: usize = stored.map(|session| session.len()).sum();
    assert!((900_000..=1 << 20).contains(&stored), "{stored} bytes");
}
