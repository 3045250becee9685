//! TLS 1.2 and 1.3 work, and what a handshake agreed on is visible to the handler.
#![cfg(feature = "tls")]

use std::io::{Read, Write};
use std::net::TcpListener;
use std::sync::Arc;
use std::time::Duration;

use kit::net::{
    connect, local, ping, read_to_end, recv2, send2, spawn, spawn_echo, ReadSome, Running,
};
use kit::tls::{
    agreed, encrypt, exchange, handshake, handshake_over, notify, read_to_goodbye, secure, session,
    spawn_recorder, the_end, visit, wire_of, Authority, Seen, Site, TlsClient, NAME, VERSIONS,
};
use portcullis::tls::rustls::server::{NoServerSessionStorage, ServerConnection};
use portcullis::tls::rustls::{version, ClientConfig, ServerConfig};
use portcullis::{CloseReason, Config, Context, Framing, Handler, Listen, Outcome, Quota, Server};

fn listen(config: ServerConfig) -> Listen {
    local().tls(Arc::new(config))
}

fn recorder(config: ServerConfig) -> Running<Seen> {
    spawn_recorder(Config::new(), listen(config))
}

#[test]
fn both_versions_are_spoken_and_visible() {
    let site = Site::new();
    for version in VERSIONS {
        let server = recorder(site.server());
        visit(server.addr(), &site.client(version));
        assert_eq!(agreed(&server, 1)[0].version, Some(version.version));
        let (stats, seen) = server.finish();
        assert_eq!(stats.closed(CloseReason::Finished), 1);
        assert_eq!(seen.closed, [(CloseReason::Finished, String::new())]);
    }
}

/// A plain listener beside a TLS one: `Conn::tls` tells them apart.
#[test]
fn a_plain_connection_has_no_tls() {
    struct Tell;
    impl Handler for Tell {
        fn on_frame(&mut self, cx: &mut Context<'_>, _frame: &[u8]) -> Outcome {
            let answer: &[u8] = if cx.conn.tls().is_some() {
                b"secret"
            } else {
                b"plain"
            };
            cx.conn.send(answer)?;
            Ok(())
        }
    }
    let site = Site::new();
    let secret = listen(site.server());
    let server = spawn(move || {
        let mut server = Server::new(Config::new()).expect("server");
        server
            .listen(local(), |_: &mut (), _| Tell)
            .expect("listen");
        server.listen(secret, |_: &mut (), _| Tell).expect("listen");
        (server, ())
    });
    let mut plain = connect(kit::net::tcp(&server.listeners[0].addr));
    send2(&mut plain, b"?");
    assert_eq!(recv2(&mut plain), b"plain");
    let mut secret = secure(
        kit::net::tcp(&server.listeners[1].addr),
        &site.client(&version::TLS13),
    );
    send2(&mut secret, b"?");
    assert_eq!(recv2(&mut secret), b"secret");
}

#[test]
fn the_name_asked_for_is_visible() {
    let site = Site::new();
    for version in VERSIONS {
        let server = recorder(site.server());
        visit(server.addr(), &site.client(version));
        let mut nameless = site.client(version);
        nameless.enable_sni = false;
        visit(server.addr(), &nameless);
        let names: Vec<_> = agreed(&server, 2)
            .into_iter()
            .map(|one| one.server_name)
            .collect();
        assert_eq!(names, [Some(NAME.to_owned()), None]);
    }
}

#[test]
fn alpn_is_agreed_by_the_servers_preference() {
    let site = Site::new();
    for version in VERSIONS {
        let mut config = site.server();
        config.alpn_protocols = vec![b"echo/2".to_vec(), b"echo/1".to_vec()];
        let server = recorder(config);
        let mut client = site.client(version);
        client.alpn_protocols = vec![b"other".to_vec(), b"echo/1".to_vec(), b"echo/2".to_vec()];
        let mut tls = secure(server.addr(), &client);
        assert_eq!(tls.conn.alpn_protocol(), Some(&b"echo/2"[..]));
        ping(&mut tls, b"hello");
        client.alpn_protocols.clear();
        visit(server.addr(), &client);
        let protocols: Vec<_> = agreed(&server, 2).into_iter().map(|one| one.alpn).collect();
        assert_eq!(protocols, [Some(b"echo/2".to_vec()), None]);
    }
}

#[test]
fn no_common_protocol_ends_the_handshake_with_an_alert() {
    let site = Site::new();
    for version in VERSIONS {
        let mut config = site.server();
        config.alpn_protocols = vec![b"echo/1".to_vec()];
        let server = recorder(config);
        let mut client = site.client(version);
        client.alpn_protocols = vec![b"other".to_vec()];
        let error = handshake(server.addr(), &client).expect_err("nothing in common");
        assert!(
            error.to_string().contains("NoApplicationProtocol"),
            "{error}"
        );
        let (reason, cause) = the_end(&server);
        assert_eq!(reason, CloseReason::TlsHandshake, "{cause}");
    }
}

#[test]
fn a_client_certificate_is_demanded_and_visible() {
    let (site, clients) = (Site::new(), Authority::new("clients"));
    for version in VERSIONS {
        let server = recorder(site.server_for_clients_of(&clients, false));
        let alice = clients.client("alice");
        visit(server.addr(), &site.client_with(version, &alice));
        assert_eq!(agreed(&server, 1)[0].certificates, alice.chain);
    }
}

#[test]
fn a_client_certificate_can_be_optional() {
    let (site, clients) = (Site::new(), Authority::new("clients"));
    for version in VERSIONS {
        let server = recorder(site.server_for_clients_of(&clients, true));
        let alice = clients.client("alice");
        visit(server.addr(), &site.client(version));
        visit(server.addr(), &site.client_with(version, &alice));
        let chains: Vec<_> = agreed(&server, 2)
            .into_iter()
            .map(|one| one.certificates)
            .collect();
        assert_eq!(chains, [Vec::new(), alice.chain]);
    }
}

/// A TLS 1.3 client is done before its certificate is judged: the alert comes where it expects an answer.
#[track_caller]
fn refusal(outcome: std::io::Result<TlsClient>) -> String {
    let error = outcome.and_then(|mut client| client.read_some(&mut [0; 1]).map(|_| ()));
    error.expect_err("refused").to_string()
}

#[test]
fn a_client_without_the_right_certificate_is_refused_with_an_alert() {
    let (site, clients) = (Site::new(), Authority::new("clients"));
    let stranger = Authority::new("strangers").client("mallory");
    for version in VERSIONS {
        for (client, expected) in [
            (
                site.client(version),
                ["CertificateRequired", "HandshakeFailure"],
            ),
            (
                site.client_with(version, &stranger),
                ["UnknownCA", "UnknownCA"],
            ),
        ] {
            let server = recorder(site.server_for_clients_of(&clients, false));
            let refused = refusal(handshake(server.addr(), &client));
            assert!(
                expected.iter().any(|words| refused.contains(words)),
                "{refused}"
            );
            let (reason, cause) = the_end(&server);
            assert_eq!(reason, CloseReason::TlsHandshake, "{cause}");
            assert!(!cause.is_empty(), "the service is told how");
            assert_eq!(server.finish().0.opened, 0);
        }
    }
}

/// Tickets and session ids make the second handshake shorter. Tickets are sent even if no
/// application data follows.
#[test]
fn the_second_visit_resumes() {
    let site = Site::new();
    for version in VERSIONS {
        let server = recorder(site.server());
        // Its clones share the memory of past sessions.
        let client = site.client(version);
        visit(server.addr(), &client);
        visit(server.addr(), &client);
        let resumed: Vec<_> = agreed(&server, 2).iter().map(|one| one.resumed).collect();
        assert_eq!(resumed, [false, true], "{version:?}");
    }
}

/// With a verified client, the resumed connection shows the same certificate.
#[test]
fn a_resumed_client_keeps_its_certificate() {
    let (site, clients) = (Site::new(), Authority::new("clients"));
    for version in VERSIONS {
        let server = recorder(site.server_for_clients_of(&clients, false));
        let alice = clients.client("alice");
        let client = site.client_with(version, &alice);
        visit(server.addr(), &client);
        visit(server.addr(), &client);
        let second = &agreed(&server, 2)[1];
        assert_eq!((second.resumed, &second.certificates), (true, &alice.chain));
    }
}

#[test]
fn a_server_without_memory_of_sessions_does_full_handshakes() {
    let site = Site::new();
    for version in VERSIONS {
        let mut config = site.server();
        config.session_storage = Arc::new(NoServerSessionStorage {});
        let server = recorder(config);
        let client = site.client(version);
        visit(server.addr(), &client);
        visit(server.addr(), &client);
        assert!(agreed(&server, 2).iter().all(|one| !one.resumed));
    }
}

/// Early data can be replayed, so none is taken, whatever the configuration says. The client hears that in time and
/// sends it again.
#[test]
fn early_data_is_neither_taken_nor_lost() {
    let site = Site::new();
    let mut config = site.server();
    config.max_early_data_size = 16 * 1024;
    let server = recorder(config.clone());
    let mut client = site.client(&version::TLS13);
    client.enable_early_data = true;
    // A ticket of our own does not invite any.
    visit(server.addr(), &client);
    assert!(session(&client).early_data().is_none());
    // One from another server of the same site, which shares its memory of sessions, does.
    ticket_from_elsewhere(config, &client);
    let mut session = session(&client);
    let early = kit::net::packet2(&[b'e'; 1000]);
    let written = session
        .early_data()
        .expect("invited")
        .write(&early)
        .expect("room");
    assert_eq!(written, early.len());
    let mut tls = handshake_over(connect(server.addr()), session).expect("the handshake");
    assert!(!tls.conn.is_early_data_accepted());
    tls.write_all(&early).expect("again");
    assert_eq!(recv2(&mut tls), [b'e'; 1000]);
    assert!(agreed(&server, 2)[1].resumed);
}

/// A visit to a server that is rustls itself.
fn ticket_from_elsewhere(config: ServerConfig, client: &ClientConfig) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
    let addr = listener.local_addr().expect("address");
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let (mut tcp, _) = listener.accept().expect("accept");
            let mut session = ServerConnection::new(Arc::new(config)).expect("session");
            let mut tls = portcullis::tls::rustls::Stream::new(&mut session, &mut tcp);
            tls.write_all(b"!").expect("handshake and data");
            let _ = tls.read_some(&mut [0; 1]);
        });
        let mut tls = secure(addr, client);
        // The ticket comes before the data.
        tls.read_exact(&mut [0; 1]).expect("data");
        notify(&mut tls);
    });
}

/// A ClientHello in one byte a segment, in records of a few bytes, or at once with what follows.
#[test]
fn a_client_hello_comes_in_any_pieces() {
    let site = Site::new();
    for version in VERSIONS {
        for fragment in [None, Some(32), Some(100)] {
            let server = recorder(site.server());
            let mut config = site.client(version);
            config.max_fragment_size = fragment;
            let mut session = session(&config);
            let mut tcp = connect(server.addr());
            for byte in wire_of(&mut session) {
                tcp.write_all(&[byte]).expect("a byte");
            }
            let mut client = handshake_over(tcp, session).expect("the handshake");
            ping(&mut client, b"whole");
        }
    }
}

/// A client certificate chain makes a long flight, here over hundreds of records, one byte a segment.
#[test]
fn a_long_handshake_message_comes_in_small_records() {
    let (site, clients) = (Site::new(), Authority::new("clients"));
    for version in VERSIONS {
        let server = recorder(site.server_for_clients_of(&clients, false));
        let alice = clients.client("alice");
        let mut config = site.client_with(version, &alice);
        config.max_fragment_size = Some(32);
        let mut session = session(&config);
        let mut tcp = connect(server.addr());
        while session.is_handshaking() || session.wants_write() {
            for byte in wire_of(&mut session) {
                tcp.write_all(&[byte]).expect("a byte");
            }
            if session.is_handshaking() {
                session.read_tls(&mut tcp).expect("the server's part");
                session.process_new_packets().expect("good records");
            }
        }
        let mut client = handshake_over(tcp, session).expect("the handshake");
        ping(&mut client, b"whole");
        assert_eq!(agreed(&server, 1)[0].certificates, alice.chain);
    }
}

/// The last flight of the handshake, frames and close_notify in one segment: everything is answered.
#[test]
fn frames_and_goodbye_come_with_the_end_of_the_handshake() {
    let site = Site::new();
    for version in VERSIONS {
        let server = recorder(site.server());
        let mut session = session(&site.client(version));
        let mut tcp = connect(server.addr());
        if version.version == version::TLS12.version {
            // The server's Finished comes last: nothing can be sent with ours.
            let mut client = handshake_over(tcp, session).expect("the handshake");
            let mut wire = encrypt(&mut client.conn, &kit::net::packet2(b"hello"));
            client.conn.send_close_notify();
            wire.extend(wire_of(&mut client.conn));
            client.sock.write_all(&wire).expect("sent");
            assert_eq!(read_to_goodbye(&mut client), kit::net::packet2(b"hello"));
            continue;
        }
        tcp.write_all(&wire_of(&mut session)).expect("hello");
        while session.is_handshaking() {
            session.read_tls(&mut tcp).expect("the server's part");
            session.process_new_packets().expect("good records");
        }
        // Finished, two frames, close_notify.
        session
            .writer()
            .write_all(&kit::net::packet2(b"one"))
            .expect("room");
        session
            .writer()
            .write_all(&kit::net::packet2(b"two"))
            .expect("room");
        session.send_close_notify();
        tcp.write_all(&wire_of(&mut session)).expect("all of it");
        let mut client = handshake_over(tcp, session).expect("the handshake");
        assert_eq!(
            read_to_goodbye(&mut client),
            [kit::net::packet2(b"one"), kit::net::packet2(b"two")].concat()
        );
        drop(client);
        assert_eq!(the_end(&server).0, CloseReason::Finished);
    }
}

/// What a handler sends on open reaches a client that says nothing.
#[test]
fn a_banner_comes_without_asking() {
    struct Banner;
    impl Handler for Banner {
        fn on_open(&mut self, cx: &mut Context<'_>) -> Outcome {
            cx.conn.send(b"welcome\n")?;
            cx.conn.close();
            Ok(())
        }
        fn on_frame(&mut self, _cx: &mut Context<'_>, _frame: &[u8]) -> Outcome {
            Ok(())
        }
    }
    let site = Site::new();
    for version in VERSIONS {
        let listen = listen(site.server()).with(|listen| listen.framing = Framing::Line);
        let server = spawn(move || {
            let mut server = Server::new(Config::new()).expect("server");
            server
                .listen(listen, |_: &mut (), _| Banner)
                .expect("listen");
            (server, ())
        });
        let mut client = secure(server.addr(), &site.client(version));
        assert_eq!(read_to_goodbye(&mut client), b"welcome\n");
    }
}

/// All handshakes are served, and the open connection beside them too.
#[test]
fn three_hundred_handshakes_leave_the_open_connection_alive() {
    const CLIENTS: usize = 300;
    let site = Site::new();
    let server = spawn_echo(
        // None is evicted or late, however slow the machine is.
        Config::max_connections(CLIENTS + 1)
            .with(|config| config.pending_limits.connections = Quota::Count(CLIENTS + 1)),
        listen(site.server()).with(|listen| listen.conn.handshake_timeout = Duration::MAX),
    );
    let mut open = secure(server.addr(), &site.client(&version::TLS13));
    ping(&mut open, b"before");
    let mut clients: Vec<_> = (0..CLIENTS)
        .map(|number| {
            let mut session = session(&site.client(VERSIONS[number % 2]));
            let mut tcp = connect(server.addr());
            tcp.write_all(&wire_of(&mut session)).expect("hello");
            (tcp, session)
        })
        .collect();
    for (tcp, session) in &mut clients {
        ping(&mut open, b"during");
        let mut tls = portcullis::tls::rustls::Stream::new(session, tcp);
        ping(&mut tls, b"served");
    }
    ping(&mut open, b"after");
    drop((clients, open));
    let (stats, ()) = server.finish();
    assert_eq!(
        (stats.opened, stats.peak),
        (CLIENTS as u64 + 1, CLIENTS + 1)
    );
}

/// The smallest budget, one handshake an iteration: slower, and no client is forgotten.
#[test]
fn a_handshake_budget_of_one_forgets_no_client() {
    let site = Site::new();
    let server = spawn_echo(
        Config::new().with(|config| config.budgets.handshakes = 1),
        listen(site.server()),
    );
    std::thread::scope(|scope| {
        for number in 0..20 {
            let (config, addr) = (site.client(VERSIONS[number % 2]), server.addr());
            scope.spawn(move || ping(&mut secure(addr, &config), b"mine"));
        }
    });
    assert_eq!(server.finish().0.opened, 20);
}

/// The cap's farewell is in the clear, as documented: a refused client costs no handshake.
#[test]
fn the_refused_cost_no_handshake() {
    let site = Site::new();
    let refuse = portcullis::AtCapacity::Refuse {
        farewell: b"full".to_vec(),
    };
    let server = spawn_echo(
        Config::max_connections(1),
        listen(site.server()).with(|listen| listen.at_capacity = refuse),
    );
    let mut inside = secure(server.addr(), &site.client(&version::TLS13));
    ping(&mut inside, b"in");
    assert_eq!(read_to_end(&mut connect(server.addr())), b"full");
    ping(&mut inside, b"in");
}

/// Small records both ways, by the server's own configuration.
#[test]
fn the_servers_records_can_be_small() {
    let site = Site::new();
    for version in VERSIONS {
        let mut config = site.server();
        config.max_fragment_size = Some(64);
        let listen = listen(config).with(|listen| listen.framing = Framing::Raw);
        let server = spawn_echo(Config::new(), listen);
        let bytes: Vec<u8> = (0..=255).cycle().take(300_000).collect();
        let answer = exchange(secure(server.addr(), &site.client(version)), &bytes);
        assert!(
            answer == bytes,
            "{} of {} bytes, or others",
            answer.len(),
            bytes.len()
        );
    }
}

/// A grace of a second is not spent on waiting: open connections end, and handshakes are dropped.
#[test]
fn a_drain_does_not_wait_for_handshakes() {
    let site = Site::new();
    let server = recorder(site.server());
    let mut open = secure(server.addr(), &site.client(&version::TLS13));
    ping(&mut open, b"open");
    let silent: Vec<_> = (0..20).map(|_| connect(server.addr())).collect();
    let mut half = connect(server.addr());
    let hello = wire_of(&mut session(&site.client(&version::TLS13)));
    half.write_all(&hello[..hello.len() / 2])
        .expect("half a hello");
    server.until("all are in", |stats| stats.open == 22);
    server
        .handle
        .drain(Duration::from_secs(600))
        .expect("drain");
    assert_eq!(read_to_goodbye(&mut open), b"");
    drop(open);
    // A drain that waited would take ten minutes.
    let (stats, seen) = server.finish();
    assert_eq!(stats.closed(CloseReason::HandshakeTimeout), 21);
    assert_eq!(seen.failed_accepts.len(), 21, "each is reported");
    assert_eq!(seen.closed, [(CloseReason::Drained, String::new())]);
    drop((silent, half));
}

/// A connection that completes its handshake after the drain began is closed in order.
#[test]
fn a_handshake_during_a_drain_ends_in_order() {
    let site = Site::new();
    for version in VERSIONS {
        let server = recorder(site.server());
        let mut session = session(&site.client(version));
        let tcp = connect(server.addr());
        server.until("it is in", |stats| stats.open == 1);
        server
            .handle
            .drain(Duration::from_secs(600))
            .expect("drain");
        server.ask(|_, control| assert!(control.drain_report().is_none()));
        send2(&mut session.writer(), b"late");
        let mut client = handshake_over(tcp, session).expect("the handshake");
        let answer = read_to_goodbye(&mut client);
        assert!(
            answer.is_empty() || answer == kit::net::packet2(b"late"),
            "{answer:?}"
        );
        drop(client);
        assert_eq!(
            server.finish().1.closed,
            [(CloseReason::Drained, String::new())]
        );
    }
}
