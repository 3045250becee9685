//! A listener's TLS changes under way: for new connections only, and never into none. Sessions are resumed, in each of the
//! ways there are, and never under another configuration.
#![cfg(all(feature = "tls", any(feature = "ring", feature = "aws-lc-rs")))]

use std::sync::Arc;

use kit::net::{connect, local, ping, read_to_end, turns_until, Running};
use kit::tls::{
    agreed, handshake, handshake_over, secure, session, set_tls, spawn_recorder, ticketer, visit,
    wire_of, Folder, Seen, Site, VERSIONS,
};
use portcullis::tls::rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert};
use portcullis::tls::rustls::sign::CertifiedKey;
use portcullis::tls::rustls::{version, ClientConfig, ServerConfig};
use portcullis::tls::server_config;
use portcullis::{
    try_accept, AccessRules, CloseReason, Config, Error, HandleError, Peer, ProxyProtocol, Refuse,
    Server,
};

fn recorder(config: impl Into<portcullis::tls::TlsConfig>) -> Running<Seen> {
    spawn_recorder(Config::new(), local().name("it").tls(config))
}

#[test]
fn new_handshakes_get_the_new_certificate_and_the_others_keep_theirs() {
    for version in VERSIONS {
        let (old, new) = (Site::new(), Site::new());
        let server = recorder(old.server());
        let mut open = secure(server.addr(), &old.client(version));
        ping(&mut open, b"open");
        // Accepted, and half of a ClientHello is there.
        use std::io::Write;
        let mut underway = connect(server.addr());
        let mut hello = session(&old.client(version));
        let wire = wire_of(&mut hello);
        underway.write_all(&wire[..wire.len() / 2]).expect("sent");
        server.until("it is accepted", |stats| stats.accepted == 2);

        set_tls(&server.handle, "it", new.server()).expect("a TLS listener");
        visit(server.addr(), &new.client(version));
        let error = handshake(server.addr(), &old.client(version))
            .expect_err("the old certificate is gone");
        assert!(
            error.to_string().contains("invalid peer certificate"),
            "{error}"
        );

        underway.write_all(&wire[wire.len() / 2..]).expect("sent");
        let mut late = handshake_over(underway, hello).expect("the old certificate");
        ping(&mut late, b"late");
        ping(&mut open, b"still open");
    }
}

/// Through the server itself, and which configuration a connection has.
#[test]
fn a_connection_tells_its_configuration() {
    let (first, second) = (Arc::new(Site::new().server()), Site::new());
    let server = recorder(Arc::clone(&first));
    let next = Arc::new(second.server());
    let set = Arc::clone(&next);
    server
        .ask(move |_, control| control.set_tls("it", set))
        .expect("a TLS listener");
    let mut client = secure(server.addr(), &second.client(&version::TLS13));
    ping(&mut client, b"hello");
    let has = server.ask(|_, control| {
        let id = control.connections()[0].id;
        let conn = control.conn(id).expect("there");
        Arc::clone(conn.tls().expect("TLS").config().expect("agreed"))
    });
    assert!(Arc::ptr_eq(&has, &next) && !Arc::ptr_eq(&has, &first));
}

/// esockd's `set_max_connections` made a TLS listener a plain one. Here nothing does, and nothing makes TLS of a plain one.
#[test]
fn a_port_keeps_speaking_what_it_speaks() {
    let site = Site::new();
    let mut server: Server = Server::new(Config::new()).expect("server");
    let echo = |_: &mut (), _| kit::net::Echo;
    server.listen(local().name("plain"), echo).expect("listen");
    server
        .listen(local().name("secure").tls(site.server()), echo)
        .expect("listen");
    let attempts = [
        server.control().set_tls("plain", site.server()),
        server.control().reconfigure_listener("plain", |listen| {
            *listen = listen.clone().tls(site.server())
        }),
        server
            .control()
            .reconfigure_listener("secure", |listen| *listen = local().name("secure")),
    ];
    for outcome in attempts {
        match outcome {
            Err(Error::Option {
                option: "tls",
                problem,
            }) => assert!(problem.contains("listen again"), "{problem}"),
            other => panic!("{other:?}"),
        }
    }
    server
        .control()
        .set_tls("secure", site.server())
        .expect("TLS before and after");
    match server.control().set_tls("nobody", site.server()) {
        Err(Error::NoListener { .. }) => {}
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_handle_tells_that_a_listener_is_plain() {
    let server = kit::net::spawn_echo(Config::new(), local().name("it"));
    match set_tls(&server.handle, "it", Site::new().server()) {
        Err(HandleError::Refused(words)) => assert!(words.contains("tls"), "{words}"),
        other => panic!("{other:?}"),
    }
    ping(&mut connect(server.addr()), b"unharmed");
}

/// A file that cannot be read changes nothing, and the error names it.
#[test]
fn the_old_certificate_stays_if_the_new_one_is_broken() {
    let (folder, old, new) = (Folder::new(), Site::new(), Site::new());
    let server = recorder(old.server());
    let chain = folder.file("chain.pem", &new.identity.chain_pem);
    let key = folder.file("key.pem", &old.identity.key_pem);
    let reload = || -> Result<(), Box<dyn std::error::Error>> {
        Ok(set_tls(&server.handle, "it", server_config(&chain, &key)?)?)
    };
    let error = reload()
        .expect_err("they do not belong together")
        .to_string();
    assert!(error.contains("key.pem does not belong"), "{error}");
    visit(server.addr(), &old.client(&version::TLS13));
    folder.file("key.pem", &new.identity.key_pem);
    reload().expect("now they do");
    visit(server.addr(), &new.client(&version::TLS13));
}

/// Two visits of one client; whether each was resumed.
#[track_caller]
fn two_visits(config: &ServerConfig, client: &ClientConfig) -> [bool; 2] {
    let server = recorder(config.clone());
    visit(server.addr(), client);
    visit(server.addr(), client);
    let agreed = agreed(&server, 2);
    [agreed[0].resumed, agreed[1].resumed]
}

#[test]
fn a_ticketer_needs_no_memory() {
    let site = Site::new();
    for version in VERSIONS {
        let mut config = site.server();
        config.session_storage = Arc::new(NoServerSessionStorage {});
        assert_eq!(two_visits(&config, &site.client(version)), [false, false]);
        config.ticketer = ticketer();
        assert_eq!(two_visits(&config, &site.client(version)), [false, true]);
    }
}

/// Two servers of one site, as behind a balancer, share the ticketer: a session of the one is resumed by the other.
#[test]
fn tickets_are_good_wherever_the_ticketer_is() {
    let site = Site::new();
    for version in VERSIONS {
        let mut config = site.server();
        config.ticketer = ticketer();
        let (one, other) = (recorder(config.clone()), recorder(config));
        let client = site.client(version);
        visit(one.addr(), &client);
        visit(other.addr(), &client);
        assert!(agreed(&other, 1)[0].resumed);
    }
}

/// As `tls::server_config` documents it.
#[test]
fn resumption_can_be_switched_off() {
    let site = Site::new();
    for version in VERSIONS {
        let mut config = site.server();
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        assert_eq!(two_visits(&config, &site.client(version)), [false, false]);
    }
}

/// The ticket of an old configuration is no error: the handshake is a full one, with whatever the new one demands.
#[test]
fn an_old_session_leads_to_a_full_handshake() {
    for version in VERSIONS {
        for stateless in [false, true] {
            let site = Site::new();
            let config = || {
                let mut config = site.server();
                if stateless {
                    config.ticketer = ticketer();
                }
                config
            };
            let server = recorder(config());
            let client = site.client(version);
            visit(server.addr(), &client);
            set_tls(&server.handle, "it", config()).expect("a TLS listener");
            visit(server.addr(), &client);
            visit(server.addr(), &client);
            let resumed: Vec<bool> = agreed(&server, 3).iter().map(|one| one.resumed).collect();
            assert_eq!(
                resumed,
                [false, false, true],
                "{version:?}, stateless {stateless}"
            );
        }
    }
}

/// A client that was let in without a certificate is asked for one when that becomes the rule.
#[test]
fn an_old_session_does_not_get_around_a_new_demand() {
    let (site, clients) = (Site::new(), kit::tls::Authority::new("clients"));
    for version in VERSIONS {
        let server = recorder(site.server());
        let client = site.client(version);
        visit(server.addr(), &client);
        set_tls(
            &server.handle,
            "it",
            site.server_for_clients_of(&clients, false),
        )
        .expect("a TLS listener");
        let refused = handshake(server.addr(), &client).and_then(|mut tls| {
            use std::io::Read;
            tls.read_exact(&mut [0])
        });
        assert!(refused.is_err(), "no certificate, no connection");
        server.until("it is refused", |stats| {
            stats.closed(portcullis::CloseReason::TlsHandshake) == 1
        });
    }
}

/// A configuration that was replaced may live in a connection alone, which is refused before its
/// handshake: its destructor is foreign code.
#[test]
fn a_configuration_may_panic_with_a_refused_connection() {
    #[derive(Debug)]
    struct Bomb;
    impl ResolvesServerCert for Bomb {
        fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
            None
        }
    }
    impl Drop for Bomb {
        fn drop(&mut self) {
            kit::planned::blow();
        }
    }

    let site = Site::new();
    let mut old = site.server();
    old.cert_resolver = Arc::new(Bomb);
    let mut server = Server::new(Config::new()).expect("server");
    let listen = local().name("it").tls(old).with(|listen| {
        listen.proxy_protocol = ProxyProtocol::Required;
        listen.trusted_proxies = Some(AccessRules::allow_all());
    });
    let refuses = |_: &mut (), _: Peer| Err::<kit::net::Echo, _>(Refuse::silently());
    server
        .listen_with(listen, try_accept(refuses))
        .expect("listen");
    let addr = kit::net::tcp(&server.control().listeners()[0].addr);
    let mut client = connect(addr);
    turns_until(&mut server, &mut (), |server, ()| {
        server.control().stats().open == 1
    });
    let new = site.server();
    server.control().set_tls("it", new).expect("a TLS listener");
    let header = b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n";
    std::io::Write::write_all(&mut client, header).expect("sent");
    turns_until(&mut server, &mut (), |server, ()| {
        server.control().stats().panics == 1
    });
    assert_eq!(read_to_end(&mut client), b"");
    drop(client);
    turns_until(&mut server, &mut (), |server, ()| {
        server.control().stats().open == 0
    });
    assert_eq!(server.control().stats().closed(CloseReason::Refused), 1);
}
