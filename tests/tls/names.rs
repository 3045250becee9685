//! Each name that clients ask for has a configuration of its own: certificate, protocols, client certificates, sessions.
#![cfg(feature = "tls")]

use std::io::Read;
use std::net::SocketAddr;
use std::sync::Arc;

use kit::net::{connect, local, ping, Running};
use kit::tls::{
    alert, handshake_as, notify, read_to_goodbye, session_for, set_tls, spawn_recorder, the_end,
    ticketer, wire_of, Agreed, Authority, Seen, Site, TlsClient, VERSIONS,
};
use portcullis::tls::rustls::client::{
    ClientSessionMemoryCache, ClientSessionStore, Resumption, Tls12ClientSessionValue,
    Tls13ClientSessionValue,
};
use portcullis::tls::rustls::pki_types::ServerName;
use portcullis::tls::rustls::{version, ClientConfig, NamedGroup, ServerConfig};
use portcullis::tls::{ServerNames, TlsConfig};
use portcullis::{CloseReason, Config};

fn recorder(config: impl Into<TlsConfig>) -> Running<Seen> {
    spawn_recorder(Config::new(), local().name("it").tls(config))
}

#[track_caller]
fn agreed(server: &Running<Seen>) -> Vec<Agreed> {
    server.ask(|seen, _| seen.agreed.clone())
}

#[track_caller]
fn visit(addr: SocketAddr, config: &ClientConfig, name: &str) -> TlsClient {
    let mut client =
        handshake_as(addr, config, name).unwrap_or_else(|error| panic!("{name}: {error}"));
    ping(&mut client, b"hello");
    notify(&mut client);
    assert_eq!(read_to_goodbye(&mut client), b"");
    client
}

/// A configuration that speaks this protocol, so that a client can tell which it has got.
fn speaking(site: &Site, name: &str, protocol: &str) -> Arc<ServerConfig> {
    let mut config = site.server_for(name);
    config.alpn_protocols = vec![protocol.as_bytes().to_vec()];
    Arc::new(config)
}

fn client(
    site: &Site,
    version: &'static portcullis::tls::rustls::SupportedProtocolVersion,
) -> ClientConfig {
    let mut client = site.client(version);
    client.alpn_protocols = ["one", "wild", "deep", "rest"]
        .map(|name| name.as_bytes().to_vec())
        .into();
    client
}

fn names(site: &Site, names: ServerNames) -> ServerNames {
    names
        .name("one.test", speaking(site, "one.test", "one"))
        .and_then(|names| names.name("*.Wild.Test.", speaking(site, "*.wild.test", "wild")))
        .and_then(|names| names.name("deep.wild.test", speaking(site, "deep.wild.test", "deep")))
        .expect("good names")
}

#[test]
fn each_name_has_its_own() {
    let site = Site::new();
    for version in VERSIONS {
        let server = recorder(names(&site, ServerNames::only()));
        let client = client(&site, version);
        for (name, protocol) in [
            ("one.test", "one"),
            ("ONE.test", "one"),
            ("a.wild.test", "wild"),
            ("B.WILD.TEST", "wild"),
            ("deep.wild.test", "deep"),
        ] {
            // It verifies the certificate for that name.
            let tls = visit(server.addr(), &client, name);
            assert_eq!(
                tls.conn.alpn_protocol(),
                Some(protocol.as_bytes()),
                "{name}"
            );
            let seen = agreed(&server).pop().expect("it was open");
            assert_eq!(seen.server_name, Some(name.to_lowercase()));
        }
    }
}

/// RFC 6066 section 3: unrecognized_name (112). RFC 8446 section 9.2: missing_extension (109).
#[test]
fn an_unknown_name_is_refused_with_an_alert() {
    let site = Site::new();
    for version in VERSIONS {
        for (name, description, words) in [
            (
                "two.test",
                112,
                "no configuration for the name \"two.test\"",
            ),
            ("wild.test", 112, "wild.test"),
            ("a.b.wild.test", 112, "a.b.wild.test"),
            ("test", 112, "test"),
            ("127.0.0.1", 109, "asks for no name"),
        ] {
            let server = recorder(names(&site, ServerNames::only()));
            let mut tcp = connect(server.addr());
            use std::io::Write;
            tcp.write_all(&wire_of(&mut session_for(&client(&site, version), name)))
                .expect("sent");
            assert_eq!(alert(&mut tcp), description, "{name}");
            drop(tcp);
            let (reason, cause) = the_end(&server);
            assert_eq!(reason, CloseReason::TlsHandshake);
            assert!(cause.contains(words), "{cause}");
        }
    }
}

#[test]
fn a_default_is_for_all_other_names() {
    let site = Site::new();
    for version in VERSIONS {
        let rest = speaking(&site, "127.0.0.1", "rest");
        let server = recorder(names(&site, ServerNames::or(rest)));
        let client = client(&site, version);
        for (name, protocol) in [("127.0.0.1", "rest"), ("one.test", "one")] {
            let tls = visit(server.addr(), &client, name);
            assert_eq!(
                tls.conn.alpn_protocol(),
                Some(protocol.as_bytes()),
                "{name}"
            );
        }
        let error = handshake_as(server.addr(), &client, "wild.test")
            .expect_err("the default's certificate");
        assert!(error.to_string().contains("not valid for name"), "{error}");
    }
}

#[test]
fn what_is_no_name_is_an_error_that_says_so() {
    let config = Arc::new(Site::new().server());
    let add = |names: ServerNames, name: &str| names.name(name, Arc::clone(&config));
    let long = format!("{}.test", "x".repeat(64));
    for (name, fault) in [
        ("", "is no DNS name"),
        ("*.", "is no DNS name"),
        ("a..test", "is no DNS name"),
        (".test", "is no DNS name"),
        ("-a.test", "is no DNS name"),
        ("a b.test", "is no DNS name"),
        ("one.test:443", "is no DNS name"),
        (&long, "is no DNS name"),
        ("1.2.3.4", "is an address"),
        ("::1", "is an address"),
        ("*.1.2.3.4", "is an address"),
        ("b\u{fc}cher.test", "xn--"),
        ("*", "a wildcard in a place"),
        ("a.*.test", "a wildcard in a place"),
        ("a*.test", "a wildcard in a place"),
        ("*.*.test", "a wildcard in a place"),
    ] {
        let error = add(ServerNames::only(), name).expect_err(name);
        let words = error.to_string();
        assert!(
            words.contains(&format!("{name:?}")) && words.contains(fault),
            "{words}"
        );
    }
    for (first, again) in [("one.test", "ONE.test."), ("*.one.test", "*.One.Test")] {
        let error = add(ServerNames::only(), first).and_then(|names| add(names, again));
        let error = error.expect_err("twice").to_string();
        assert!(
            error.contains(again) && error.contains("given twice"),
            "{error}"
        );
    }
    let _ = add(ServerNames::only(), "*.one.test")
        .and_then(|names| add(names, "one.test"))
        .and_then(|names| add(names, "a.one.test"))
        .and_then(|names| add(names, "xn--bcher-kva.test"))
        .expect("four names");
}

#[test]
fn a_closure_chooses_by_what_the_hello_says() {
    let site = Site::new();
    for version in VERSIONS {
        let (one, rest) = (
            speaking(&site, "one.test", "one"),
            speaking(&site, "one.test", "rest"),
        );
        let server = recorder(TlsConfig::choose(move |hello| {
            let wanted = hello.alpn()?.next()?;
            match wanted {
                b"one" => Some(Arc::clone(&one)),
                b"rest" => Some(Arc::clone(&rest)),
                _ => None,
            }
        }));
        for wanted in ["one", "rest"] {
            let mut client = site.client(version);
            client.alpn_protocols = vec![wanted.into()];
            let tls = visit(server.addr(), &client, "one.test");
            assert_eq!(tls.conn.alpn_protocol(), Some(wanted.as_bytes()));
        }
        let error =
            handshake_as(server.addr(), &site.client(version), "one.test").expect_err("refused");
        assert!(error.to_string().contains("UnrecognisedName"), "{error}");
    }
}

/// What it chooses takes no early data either.
#[test]
fn no_choice_takes_early_data() {
    let site = Site::new();
    let [one, other] = ["one.test", "other.test"].map(|name| {
        let mut config = site.server_for(name);
        config.max_early_data_size = 1000;
        Arc::new(config)
    });
    let chosen = Arc::clone(&one);
    let by_name = ServerNames::or(other)
        .name("one.test", Arc::clone(&one))
        .expect("a name");
    for (config, name) in [
        (
            TlsConfig::choose(move |_| Some(Arc::clone(&chosen))),
            "one.test",
        ),
        (by_name.clone().into(), "one.test"),
        (by_name.into(), "other.test"),
        (TlsConfig::from(one), "one.test"),
    ] {
        let server = recorder(config);
        let client = site.client(&version::TLS13);
        let mut tls = handshake_as(server.addr(), &client, name).expect("a handshake");
        ping(&mut tls, b"hello");
        let early = server.ask(|_, control| {
            let id = control.connections()[0].id;
            let conn = control.conn(id).expect("there");
            let config = conn
                .tls()
                .and_then(portcullis::tls::TlsInfo::config)
                .cloned();
            config.map(|config| config.max_early_data_size)
        });
        assert_eq!(early, Some(0));
    }
}

/// In the closure, and in what rustls calls for a configuration: that connection ends, the others do not notice.
#[test]
fn a_panic_ends_its_own_connection() {
    use portcullis::tls::rustls::server::{ClientHello, ResolvesServerCert};
    use portcullis::tls::rustls::sign::CertifiedKey;

    #[derive(Debug)]
    struct Bomb;
    impl ResolvesServerCert for Bomb {
        fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
            panic!("as planned")
        }
    }

    let site = Site::new();
    for version in VERSIONS {
        let one = speaking(&site, "one.test", "one");
        let mut bomb = ServerConfig::clone(&one);
        bomb.cert_resolver = Arc::new(Bomb);
        let bomb = Arc::new(bomb);
        let server = recorder(TlsConfig::choose(move |hello| match hello.server_name() {
            Some("one.test") => Some(Arc::clone(&one)),
            Some("bomb.test") => Some(Arc::clone(&bomb)),
            _ => panic!("as planned"),
        }));
        let client = client(&site, version);
        let mut tls = handshake_as(server.addr(), &client, "one.test").expect("a handshake");
        for name in ["two.test", "bomb.test"] {
            handshake_as(server.addr(), &client, name).expect_err("nobody answers");
        }
        ping(&mut tls, b"unharmed");
        let stats = server.until("they are counted", |stats| stats.closed_total() == 2);
        assert_eq!(stats.closed(CloseReason::Panicked), 2);
        let failed_accepts = server.ask(|seen, _| seen.failed_accepts.len());
        assert_eq!(failed_accepts, 2, "the service hears of them");
    }
}

/// A client that offers the session of one name under every other.
#[derive(Debug)]
struct Careless(ClientSessionMemoryCache);

impl Careless {
    fn key() -> ServerName<'static> {
        ServerName::try_from("any.test").expect("a name")
    }
}

impl ClientSessionStore for Careless {
    fn set_kx_hint(&self, _: ServerName<'static>, group: NamedGroup) {
        self.0.set_kx_hint(Self::key(), group);
    }

    fn kx_hint(&self, _: &ServerName<'_>) -> Option<NamedGroup> {
        self.0.kx_hint(&Self::key())
    }

    fn set_tls12_session(&self, _: ServerName<'static>, value: Tls12ClientSessionValue) {
        self.0.set_tls12_session(Self::key(), value);
    }

    fn tls12_session(&self, _: &ServerName<'_>) -> Option<Tls12ClientSessionValue> {
        self.0.tls12_session(&Self::key())
    }

    fn remove_tls12_session(&self, _: &ServerName<'static>) {
        self.0.remove_tls12_session(&Self::key());
    }

    fn insert_tls13_ticket(&self, _: ServerName<'static>, value: Tls13ClientSessionValue) {
        self.0.insert_tls13_ticket(Self::key(), value);
    }

    fn take_tls13_ticket(&self, _: &ServerName<'static>) -> Option<Tls13ClientSessionValue> {
        self.0.take_tls13_ticket(&Self::key())
    }
}

/// The session of a name that asks for nothing is worth nothing where a certificate is demanded, even if both share what
/// sessions are kept in.
#[test]
fn a_session_of_one_name_does_not_open_another() {
    let (site, clients) = (Site::new(), Authority::new("clients"));
    for version in VERSIONS {
        for shared in [false, true] {
            let mut open = site.server_for("open.test");
            let mut secret = site.server_for_clients_of(&clients, false);
            if shared {
                open.ticketer = ticketer();
                secret.ticketer = Arc::clone(&open.ticketer);
                secret.session_storage = Arc::clone(&open.session_storage);
            }
            let names = ServerNames::only()
                .name("open.test", Arc::new(open))
                .and_then(|names| names.name(kit::tls::NAME, Arc::new(secret)))
                .expect("good names");
            let server = recorder(names);
            let mut client = site.client(version);
            client.resumption =
                Resumption::store(Arc::new(Careless(ClientSessionMemoryCache::new(8))));
            visit(server.addr(), &client, "open.test");
            visit(server.addr(), &client, "open.test");
            assert!(agreed(&server)[1].resumed, "the client does keep sessions");
            let outcome = handshake_as(server.addr(), &client, kit::tls::NAME);
            let outcome = outcome.and_then(|mut tls| tls.read_exact(&mut [0]));
            outcome.expect_err("it is asked for a certificate");
            let stats = server.until("it is refused", |stats| stats.closed_total() == 3);
            assert_eq!(
                stats.closed(CloseReason::TlsHandshake),
                1,
                "{version:?}, shared {shared}"
            );
            let failed_accepts = server.ask(|seen, _| seen.failed_accepts[0].1.clone());
            assert!(
                failed_accepts.contains("no certificates"),
                "{failed_accepts}"
            );
        }
    }
}

#[test]
fn names_change_under_way() {
    let site = Site::new();
    let server = recorder(speaking(&site, "one.test", "one"));
    let client = client(&site, &version::TLS13);
    visit(server.addr(), &client, "one.test");
    set_tls(&server.handle, "it", names(&site, ServerNames::only())).expect("a TLS listener");
    visit(server.addr(), &client, "deep.wild.test");
    handshake_as(server.addr(), &client, "gone.test").expect_err("it is not there");
}

/// Neither certificates nor names appear in a log.
#[test]
fn a_configuration_is_shown_by_the_number_of_its_names() {
    let config = Arc::new(Site::new().server());
    let add = |names: ServerNames| {
        names
            .name("one.test", Arc::clone(&config))
            .and_then(|names| names.name("*.test", Arc::clone(&config)))
            .expect("good names")
    };
    let names = add(ServerNames::only());
    assert_eq!(format!("{names:?}"), "2 names and no default");
    for (tls, expected) in [
        (TlsConfig::from(Arc::clone(&config)), "one configuration"),
        (TlsConfig::from(names), "2 names and no default"),
        (
            TlsConfig::from(add(ServerNames::or(Arc::clone(&config)))),
            "2 names and a default",
        ),
        (TlsConfig::choose(|_| None), "chosen by a closure"),
    ] {
        assert_eq!(format!("{tls:?}"), expected);
    }
}
