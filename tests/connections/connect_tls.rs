//! TLS from the client's side: the server's name and certificate are what was wanted, or there is no connection.
#![cfg(feature = "tls")]

use std::io::{Read, Write};
use std::net::SocketAddr;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use kit::net::{have, local, reset, spawn, spawn_echo, ChildProcess, Echo, Running};
use kit::outgoing::{accepted, half_closing_probe, probe, std_listener, with_conn, Heard, Told};
#[cfg(any(feature = "ring", feature = "aws-lc-rs"))]
use kit::tls::provider;
use kit::tls::{self_signed, Authority, Folder, Site, NAME, VERSIONS};
#[cfg(any(feature = "ring", feature = "aws-lc-rs"))]
use portcullis::tls::client_config;
use portcullis::tls::rustls::client::{
    ClientSessionStore, Resumption, Tls12ClientSessionValue, Tls13ClientSessionValue,
};
use portcullis::tls::rustls::pki_types::ServerName;
use portcullis::tls::rustls::{
    version, ClientConfig, HandshakeKind, NamedGroup, ProtocolVersion, ServerConfig,
    ServerConnection,
};
use portcullis::{
    CloseReason, Config, ConnId, Connect, Context, Error, Framing, Handler, Listen, Outcome,
    Server, State,
};

fn client() -> Running {
    spawn(|| (Server::new(Config::new()).expect("server"), ()))
}

fn echo(listen: Listen) -> Running {
    spawn_echo(
        Config::new(),
        listen.with(|listen| listen.framing = Framing::Line),
    )
}

fn line(config: ClientConfig, name: &str) -> Connect {
    Connect::new(Framing::Line).tls(config, name)
}

#[track_caller]
fn dial(server: &Running, addr: SocketAddr, options: Connect) -> (ConnId, Heard) {
    let (probe, heard) = probe();
    let id = server.ask(move |(), control| control.connect(addr, options, probe));
    (id.expect("it is begun"), heard)
}

#[track_caller]
fn say(server: &Running, id: ConnId, line: &str) {
    server
        .handle
        .send(id, line.as_bytes().to_vec())
        .expect("sent");
}

/// Both versions, with what was agreed on.
#[test]
fn a_conversation_is_encrypted_and_the_server_is_verified() {
    let site = Site::new();
    for version in VERSIONS {
        let mut config = site.server();
        config.alpn_protocols = vec![b"two".to_vec(), b"one".to_vec()];
        let server = echo(local().tls(config));
        let client = client();
        let mut config = site.client(version);
        config.alpn_protocols = vec![b"one".to_vec()];
        let (id, heard) = dial(&client, server.addr(), line(config, NAME));
        assert_eq!(heard.opened(), id);
        say(&client, id, "hello\n");
        assert_eq!(heard.next(), Told::Frame(b"hello\n".to_vec()));
        client.ask(move |(), control| {
            with_conn(control, id, |conn| {
                let tls = conn.tls().expect("over TLS");
                assert_eq!(tls.protocol_version(), Some(version.version));
                assert_eq!(tls.server_name(), Some(NAME));
                assert_eq!(tls.alpn_protocol(), Some(&b"one"[..]));
                assert_eq!(tls.handshake_kind(), Some(HandshakeKind::Full));
                assert!(tls.config().is_none());
                assert_eq!(tls.peer_certificates().map(<[_]>::len), Some(2));
                conn.close();
            });
        });
        assert_eq!(heard.next(), Told::Closed(CloseReason::Closed));
        let stats = server.until("it is gone", |stats| stats.open == 0);
        assert_eq!(
            stats.closed(CloseReason::Finished),
            1,
            "close_notify was said"
        );
    }
}

/// A few megabytes, so that records and reads do not end together.
#[test]
fn much_goes_through_unchanged() {
    let site = Site::new();
    for version in VERSIONS {
        let server = spawn_echo(
            Config::new(),
            local()
                .tls(site.server())
                .with(|listen| listen.framing = Framing::Raw),
        );
        let client = client();
        let options = Connect::new(Framing::Raw)
            .tls(site.client(version), NAME)
            .with(|connect| connect.conn.output_limit = usize::MAX);
        let (id, heard) = dial(&client, server.addr(), options);
        heard.opened();
        let bytes: Vec<u8> = (0..3_000_000_u32)
            .map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8)
            .collect();
        let sent = bytes.clone();
        client.ask(move |(), control| {
            with_conn(control, id, |conn| conn.send(sent).expect("queued"))
        });
        assert!(heard.bytes(bytes.len()) == bytes);
    }
}

#[track_caller]
fn fails(options: Connect, addr: SocketAddr, reason: CloseReason, words: &[&str]) {
    let client = client();
    let (_, heard) = dial(&client, addr, options);
    let (told, said) = heard.next_with_words();
    assert_eq!(told, Told::Failed(reason, None), "{said}");
    for word in words {
        assert!(said.contains(word), "{said:?} does not say {word:?}");
    }
    heard.is_all();
    let stats = client.until("it is gone", |stats| stats.open == 0);
    assert_eq!(
        (stats.outgoing, stats.opened, stats.closed(reason)),
        (1, 0, 1)
    );
}

#[test]
fn another_name_or_another_authority_is_no_connection() {
    let site = Site::new();
    let server = echo(local().tls(site.server()));
    for version in VERSIONS {
        fails(
            line(site.client(version), "other.test"),
            server.addr(),
            CloseReason::TlsHandshake,
            &["not valid for name", "the server wanted was other.test"],
        );
        fails(
            line(site.client(version), "127.0.0.1"),
            server.addr(),
            CloseReason::TlsHandshake,
            &["not valid for name", "the server wanted was 127.0.0.1"],
        );
        fails(
            line(Site::new().client(version), NAME),
            server.addr(),
            CloseReason::TlsHandshake,
            &["invalid peer certificate", NAME],
        );
    }
    let stats = server.until("they are gone", |stats| {
        stats.open == 0 && stats.accepted == 6
    });
    assert_eq!(
        stats.closed(CloseReason::TlsHandshake),
        6,
        "each got our alert"
    );
}

#[test]
fn no_common_protocol_is_no_connection() {
    let site = Site::new();
    let mut config = site.server();
    config.alpn_protocols = vec![b"theirs".to_vec()];
    let server = echo(local().tls(config));
    let mut config = site.client(&version::TLS13);
    config.alpn_protocols = vec![b"ours".to_vec()];
    fails(
        line(config, NAME),
        server.addr(),
        CloseReason::TlsHandshake,
        &["NoApplicationProtocol", NAME],
    );
}

#[test]
fn a_server_without_tls_is_found_out() {
    let site = Site::new();
    let (listener, addr) = std_listener();
    let thread = std::thread::spawn(move || {
        let mut peer = accepted(&listener);
        peer.write_all(b"220 mail.test ESMTP ready\r\n")
            .expect("sent");
        let mut rest = Vec::new();
        let _ = peer.read_to_end(&mut rest);
    });
    fails(
        line(site.client(&version::TLS13), NAME),
        addr,
        CloseReason::NotTls,
        &[NAME],
    );
    thread.join().expect("served");
}

#[test]
fn a_server_that_goes_or_says_nothing_is_no_connection() {
    let site = Site::new();
    let (listener, addr) = std_listener();
    let thread = std::thread::spawn(move || {
        let read_hello = || {
            let mut peer = accepted(&listener);
            let mut hello = [0; 64];
            peer.read_exact(&mut hello).expect("a ClientHello");
            assert_eq!(hello[0], 22);
            peer
        };
        drop(read_hello().shutdown(std::net::Shutdown::Write));
        reset(read_hello());
        read_hello()
    });
    let options = || {
        line(site.client(&version::TLS13), NAME)
            .with(|connect| connect.conn.handshake_timeout = Duration::from_secs(20))
    };
    // What it has not read turns the first into a reset too, perhaps.
    let client = client();
    let (_, heard) = dial(&client, addr, options());
    assert!(matches!(
        heard.next(),
        Told::Failed(CloseReason::TlsHandshake | CloseReason::Reset, None)
    ));
    fails(options(), addr, CloseReason::Reset, &[]);
    fails(
        options().with(|connect| connect.conn.handshake_timeout = Duration::from_millis(50)),
        addr,
        CloseReason::HandshakeTimeout,
        &[],
    );
    drop(thread.join().expect("served"));
}

#[test]
fn a_name_that_no_certificate_can_have_is_said_at_once() {
    let site = Site::new();
    let mut server: Server = Server::new(Config::new()).expect("server");
    for name in ["", "server.test:443", "a b", "*.test", "bücher.example"] {
        let options = line(site.client(&version::TLS13), name);
        match server.control().connect("127.0.0.1:9", options, Echo) {
            Err(Error::Option { option, problem }) => {
                assert!(
                    option == "tls" && problem.contains("is no name"),
                    "{problem}"
                );
            }
            other => panic!("{name:?}: {other:?}"),
        }
    }
}

/// What is sent before the handshake waits for it, and never goes in the clear.
#[test]
fn what_is_sent_early_is_encrypted() {
    let site = Site::new();
    let (listener, addr) = std_listener();
    let client = client();
    let (handler, heard) = half_closing_probe();
    let options = line(site.client(&version::TLS13), NAME);
    client.ask(move |(), control| {
        let id = control.connect(addr, options, handler).expect("begun");
        with_conn(control, id, |conn| {
            conn.send("secret\n").expect("queued");
            conn.finish();
        });
    });
    let mut peer = accepted(&listener);
    let mut hello = vec![0; 128];
    peer.read_exact(&mut hello).expect("a ClientHello");
    let info = client.ask(|(), control| control.connections().remove(0));
    assert_eq!((info.state, info.listener), (State::Handshaking, None));
    peer.shutdown(std::net::Shutdown::Write).expect("shutdown");
    let _ = peer.read_to_end(&mut hello);
    assert!(!hello.windows(6).any(|window| window == b"secret"));
    assert!(matches!(
        heard.next(),
        Told::Failed(CloseReason::TlsHandshake, None)
    ));
}

/// Half-close over TLS 1.3, both ways: close_notify is said, and reading goes on.
#[test]
fn one_direction_ends_before_the_other() {
    struct AnswersAtTheEnd(Vec<u8>);
    impl Handler for AnswersAtTheEnd {
        fn on_frame(&mut self, _: &mut Context<'_>, frame: &[u8]) -> Outcome {
            self.0.extend_from_slice(frame);
            Ok(())
        }
        fn on_finish(&mut self, cx: &mut Context<'_>) -> Outcome {
            cx.conn.send(&self.0)?;
            cx.conn.finish();
            Ok(())
        }
    }
    let site = Site::new();
    let server = spawn({
        let listen = local()
            .tls(site.server())
            .with(|listen| listen.framing = Framing::Line);
        move || {
            let mut server = Server::new(Config::new()).expect("server");
            server
                .listen(listen, |_: &mut (), _| AnswersAtTheEnd(Vec::new()))
                .expect("listen");
            (server, ())
        }
    });
    let client = client();
    let (handler, heard) = half_closing_probe();
    let (options, addr) = (line(site.client(&version::TLS13), NAME), server.addr());
    client.ask(move |(), control| {
        let id = control.connect(addr, options, handler).expect("begun");
        with_conn(control, id, |conn| {
            conn.send("one\n").expect("queued");
            conn.send("two\n").expect("queued");
            conn.finish();
        });
    });
    heard.opened();
    assert_eq!(heard.bytes(8), b"one\ntwo\n");
    assert_eq!(heard.next(), Told::Finished);
    assert_eq!(heard.next(), Told::Closed(CloseReason::Finished));
    let stats = server.until("it is gone", |stats| stats.open == 0);
    assert_eq!(stats.closed(CloseReason::Finished), 1);
}

/// Two connections with one configuration: the second handshake is resumed.
#[track_caller]
fn resumes(server: ServerConfig, config: &Arc<ClientConfig>) {
    let server = echo(local().tls(server));
    let client = client();
    let mut kinds = Vec::new();
    for _ in 0..2 {
        let options = Connect::new(Framing::Line).tls(Arc::clone(config), NAME);
        let (id, heard) = dial(&client, server.addr(), options);
        heard.opened();
        // Tickets come before the answer.
        say(&client, id, "x\n");
        heard.bytes(2);
        kinds.push(client.ask(move |(), control| {
            with_conn(control, id, |conn| {
                conn.tls().and_then(|tls| tls.handshake_kind())
            })
        }));
    }
    assert_eq!(
        kinds,
        [Some(HandshakeKind::Full), Some(HandshakeKind::Resumed)]
    );
}

#[test]
fn sessions_are_resumed() {
    let site = Site::new();
    for version in VERSIONS {
        resumes(site.server(), &Arc::new(site.client(version)));
    }
}

/// The configuration from a file keeps few sessions, and those of each version.
#[cfg(any(feature = "ring", feature = "aws-lc-rs"))]
#[test]
fn sessions_of_a_configuration_from_a_file_are_resumed() {
    let (site, folder) = (Site::new(), Folder::new());
    let roots = folder.file("ca.pem", site.authority.certificate.pem());
    for version in VERSIONS {
        let server = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[version])
            .expect("versions")
            .with_no_client_auth()
            .with_single_cert(site.identity.chain.clone(), site.identity.key())
            .expect("certificate and key");
        resumes(server, &client_config(&roots).expect("roots"));
    }
}

/// A certificate of our own, for a server that wants one.
#[test]
fn a_client_certificate_is_shown() {
    let (site, clients) = (Site::new(), Authority::new("clients"));
    let server = echo(local().tls(site.server_for_clients_of(&clients, false)));
    let client = client();
    let config = site.client_with(&version::TLS13, &clients.client("us"));
    let (id, heard) = dial(&client, server.addr(), line(config, NAME));
    heard.opened();
    say(&client, id, "hello\n");
    assert_eq!(heard.next(), Told::Frame(b"hello\n".to_vec()));
}

/// Roots from a file.
#[cfg(any(feature = "ring", feature = "aws-lc-rs"))]
#[test]
fn roots_come_from_a_file() {
    let (site, folder) = (Site::new(), Folder::new());
    let roots = folder.file("ca.pem", site.authority.certificate.pem());
    let server = echo(local().tls(site.server()));
    let config = client_config(&roots).expect("roots");
    let client = client();
    let (_, heard) = dial(
        &client,
        server.addr(),
        Connect::new(Framing::Line).tls(config, NAME),
    );
    heard.opened();
    let empty = folder.file("empty.pem", "");
    let error = client_config(&empty)
        .expect_err("no certificate")
        .to_string();
    assert!(
        error.contains("empty.pem") && error.contains("holds no certificate"),
        "{error}"
    );
    let error = client_config(folder.path().join("none.pem"))
        .expect_err("no file")
        .to_string();
    assert!(error.contains("cannot be read"), "{error}");
}

/// A server's crafted chain makes path building expensive: it is refused before that.
#[cfg(any(feature = "ring", feature = "aws-lc-rs"))]
#[test]
fn an_expensive_chain_of_a_server_is_refused() {
    let (mut site, folder) = (Site::new(), Folder::new());
    let roots = folder.file("ca.pem", site.authority.certificate.pem());
    site.identity.chain.truncate(1);
    let ways = (0..7).map(|n| Authority::new(&format!("ca{n}")));
    let ways = ways.map(|way| way.certificate.der().clone());
    site.identity.chain.extend(ways);
    let config = client_config(&roots).expect("roots");
    let server = echo(local().tls(site.server()));
    fails(
        Connect::new(Framing::Line).tls(config, NAME),
        server.addr(),
        CloseReason::TlsHandshake,
        &["7 intermediate certificates, at most 6", NAME],
    );
}

const STARTTLS: &[u8] = b"starttls\n";

/// Upgrades when the peer has agreed.
struct Upgrades(Arc<ClientConfig>, kit::outgoing::Probe);

impl Handler for Upgrades {
    fn on_open(&mut self, cx: &mut Context<'_>) -> Outcome {
        cx.conn.send(STARTTLS)?;
        Ok(())
    }
    fn on_frame(&mut self, cx: &mut Context<'_>, frame: &[u8]) -> Outcome {
        if frame == b"go\n" {
            cx.conn.start_tls_client(Arc::clone(&self.0), NAME)?;
            cx.conn.send("hello\n")?;
        }
        self.1.on_frame(cx, frame)
    }
    fn on_secured(&mut self, cx: &mut Context<'_>) -> Outcome {
        self.1.on_secured(cx)
    }
    fn on_close(&mut self, cx: &mut Context<'_>, closed: &portcullis::Closed) {
        self.1.on_close(cx, closed);
    }
}

/// STARTTLS from the client's side. Bytes that an attacker puts behind the server's answer fail the
/// handshake.
#[test]
fn an_open_connection_is_upgraded() {
    struct Agrees(Arc<portcullis::tls::rustls::ServerConfig>, &'static str);
    impl Handler for Agrees {
        fn on_frame(&mut self, cx: &mut Context<'_>, frame: &[u8]) -> Outcome {
            if frame == STARTTLS {
                cx.conn.send(self.1)?;
                cx.conn.start_tls(Arc::clone(&self.0))?;
            } else {
                cx.conn.send(frame)?;
            }
            Ok(())
        }
    }
    let site = Site::new();
    for (answer, good) in [("go\n", true), ("go\ninjected\n", false)] {
        let config = Arc::new(site.server());
        let server = spawn(move || {
            let mut server = Server::new(Config::new()).expect("server");
            let listen = local().with(|listen| listen.framing = Framing::Line);
            server
                .listen(listen, move |_: &mut (), _| {
                    Agrees(Arc::clone(&config), answer)
                })
                .expect("listen");
            (server, ())
        });
        let client = client();
        let (probe, heard) = probe();
        let handler = Upgrades(Arc::new(site.client(&version::TLS13)), probe);
        let addr = server.addr();
        let begun = client
            .ask(move |(), control| control.connect(addr, Connect::new(Framing::Line), handler));
        begun.expect("begun");
        assert_eq!(heard.next(), Told::Frame(b"go\n".to_vec()));
        if good {
            assert_eq!(heard.next(), Told::Secured);
            assert_eq!(heard.next(), Told::Frame(b"hello\n".to_vec()));
        } else {
            assert!(matches!(
                heard.next(),
                Told::Closed(CloseReason::NotTls | CloseReason::TlsHandshake)
            ));
        }
    }
}

/// Another implementation at the other end.
#[test]
fn openssl_serves_us() {
    if !have("openssl", "version") {
        return;
    }
    let (site, folder) = (Site::new(), Folder::new());
    let identity = site.authority.server();
    folder.file("server.pem", &identity.chain_pem);
    folder.file("server.key", &identity.key_pem);
    for (option, expected) in [
        ("-tls1_2", ProtocolVersion::TLSv1_2),
        ("-tls1_3", ProtocolVersion::TLSv1_3),
    ] {
        let mut command = Command::new("openssl");
        command
            .current_dir(folder.path())
            // Each line comes back with its letters in reverse order.
            .args([
                "s_server",
                "-accept",
                "127.0.0.1:0",
                "-cert",
                "server.pem",
                "-key",
                "server.key",
            ])
            .args(["-rev", option])
            .stdin(Stdio::null());
        let server = ChildProcess::start(&mut command);
        let addr = loop {
            let line = server.line();
            if let Some(addr) = line.strip_prefix("ACCEPT ") {
                break addr.parse().expect("an address");
            }
        };
        let client = client();
        let version = if expected == ProtocolVersion::TLSv1_2 {
            &version::TLS12
        } else {
            &version::TLS13
        };
        let (id, heard) = dial(&client, addr, line(site.client(version), NAME));
        heard.opened();
        say(&client, id, "hello\n");
        assert_eq!(heard.next(), Told::Frame(b"olleh\n".to_vec()));
        let agreed = client.ask(move |(), control| {
            with_conn(control, id, |conn| {
                conn.tls().and_then(|tls| tls.protocol_version())
            })
        });
        assert_eq!(agreed, Some(expected));
        client.ask(move |(), control| with_conn(control, id, |conn| conn.close()));
        assert_eq!(heard.next(), Told::Closed(CloseReason::Closed));
    }
}

/// A certificate that vouches for itself is not enough, unless it is among the roots.
#[test]
fn a_self_signed_server_is_known_or_not() {
    let identity = self_signed(&[NAME]);
    let config = portcullis::tls::rustls::ServerConfig::builder_with_provider(kit::tls::provider())
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_no_client_auth()
        .with_single_cert(identity.chain.clone(), identity.key())
        .expect("a certificate");
    let server = echo(local().tls(config));
    fails(
        line(Site::new().client(&version::TLS13), NAME),
        server.addr(),
        CloseReason::TlsHandshake,
        &["invalid peer certificate"],
    );
}

/// Panics when it is dropped.
#[derive(Debug)]
struct Spiteful;

impl portcullis::tls::rustls::KeyLog for Spiteful {
    fn log(&self, _: &str, _: &[u8], _: &[u8]) {}
}

impl Drop for Spiteful {
    fn drop(&mut self) {
        panic!("a destructor");
    }
}

/// What cannot be begun is an error, and takes no place, whatever the configuration's destructor does.
#[test]
fn a_panic_in_a_configurations_destructor_harms_no_client() {
    let site = Site::new();
    let mut server: Server = Server::new(Config::max_connections(1)).expect("server");
    let mut config = site.client(VERSIONS[1]);
    config.key_log = Arc::new(Spiteful);
    // No address of ours (RFC 5737): it fails at once.
    let options = line(config, "localhost")
        .with(|connect| connect.bind = Some("192.0.2.1:0".parse().expect("an address")));
    let refused = server.control().connect("127.0.0.1:9", options, probe().0);
    assert!(matches!(refused, Err(Error::Connect { .. })), "{refused:?}");
    let stats = server.control().stats();
    assert_eq!((stats.open, stats.outgoing, stats.panics), (0, 0, 1));
    let (listener, addr) = std_listener();
    server
        .control()
        .connect(addr, Connect::new(Framing::Packet2), probe().0)
        .expect("the place is free");
    drop(listener);
}

/// Panics when it is asked for a session, or only when it is to keep one.
#[derive(Debug)]
struct BrokenStore {
    is_asked: bool,
}

impl ClientSessionStore for BrokenStore {
    fn set_kx_hint(&self, _: ServerName<'static>, _: NamedGroup) {}

    fn kx_hint(&self, _: &ServerName<'_>) -> Option<NamedGroup> {
        assert!(!self.is_asked, "a session store");
        None
    }

    fn set_tls12_session(&self, _: ServerName<'static>, _: Tls12ClientSessionValue) {}

    fn tls12_session(&self, _: &ServerName<'_>) -> Option<Tls12ClientSessionValue> {
        None
    }

    fn remove_tls12_session(&self, _: &ServerName<'static>) {}

    fn insert_tls13_ticket(&self, _: ServerName<'static>, _: Tls13ClientSessionValue) {
        panic!("a session store");
    }

    fn take_tls13_ticket(&self, _: &ServerName<'static>) -> Option<Tls13ClientSessionValue> {
        None
    }
}

#[test]
fn a_configuration_that_panics_when_it_is_connected_ends_its_attempt_alone() {
    let site = Site::new();
    let server = echo(local().tls(site.server()));
    let client = client();
    let (id, bystander) = dial(&client, server.addr(), line(site.client(VERSIONS[1]), NAME));
    bystander.opened();
    let mut config = site.client(VERSIONS[1]);
    config.resumption = Resumption::store(Arc::new(BrokenStore { is_asked: true }));
    let (_, heard) = dial(&client, server.addr(), line(config, NAME));
    assert_eq!(heard.next(), Told::Failed(CloseReason::Panicked, None));
    heard.is_all();
    let stats = client.until("its place is free", |stats| stats.closed_total() == 1);
    assert_eq!((stats.open, stats.panics), (1, 1));
    say(&client, id, "hello\n");
    assert_eq!(bystander.next(), Told::Frame(b"hello\n".to_vec()));
}

/// Tickets come once the handshake is over: here to a connection that is idle already.
#[test]
fn a_configuration_that_panics_long_after_the_handshake_ends_its_connection() {
    let site = Site::new();
    let (listener, addr) = std_listener();
    let client = client();
    let mut config = site.client(&version::TLS13);
    config.resumption = Resumption::store(Arc::new(BrokenStore { is_asked: false }));
    let (_, heard) = dial(&client, addr, line(config, NAME));
    let mut peer = accepted(&listener);
    let mut session = ServerConnection::new(Arc::new(site.server())).expect("a server");
    while session.is_handshaking() {
        while session.wants_write() {
            session.write_tls(&mut peer).expect("sent");
        }
        assert!(session.read_tls(&mut peer).expect("received") > 0);
        session.process_new_packets().expect("a handshake");
    }
    heard.opened();
    // Its turn is over.
    client.ask(|(), _| ());
    assert!(session.wants_write(), "tickets");
    while session.wants_write() {
        session.write_tls(&mut peer).expect("sent");
    }
    assert_eq!(heard.next(), Told::Closed(CloseReason::Panicked));
    heard.is_all();
    let stats = client.until("its place is free", |stats| stats.open == 0);
    assert_eq!(stats.panics, 1);
}
