//! What never becomes a TLS connection ends in time, with a named reason for the service and an alert for the peer.
#![cfg(feature = "tls")]

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use kit::net::{connect, local, ping, read_to_end, spawn, spawn_echo, ReadSome, Running, PATIENCE};
use kit::tls::{
    alert, handshake, provider, read_raw, secure, session, spawn_recorder, the_end, wire_of,
    Authority, Seen, Site, Witnesses, VERSIONS,
};
use portcullis::sim::Sim;
use portcullis::tls::rustls::crypto::CryptoProvider;
use portcullis::tls::rustls::{version, ClientConfig, ServerConfig};
use portcullis::{CloseReason, Config, Framing, Listen, Server};

const SOON: Duration = Duration::from_millis(200);

fn listen(site: &Site) -> Listen {
    local().tls(Arc::new(site.server()))
}

fn recorder(site: &Site) -> Running<Seen> {
    spawn_recorder(Config::new(), listen(site))
}

/// Two listeners: the first has no patience, the second has all of it, for clients that are to be served on a busy machine.
fn two_listeners(site: &Site, config: Config) -> (Running<Seen>, [SocketAddr; 2]) {
    let [short, long] = [SOON, PATIENCE]
        .map(|timeout| listen(site).with(|listen| listen.conn.handshake_timeout = timeout));
    let server = spawn(move || {
        let mut server = Server::new(config).expect("server");
        server.listen_with(short, Witnesses).expect("listen");
        server.listen_with(long, Witnesses).expect("listen");
        (server, Seen::default())
    });
    let addrs = [
        kit::net::tcp(&server.listeners[0].addr),
        kit::net::tcp(&server.listeners[1].addr),
    ];
    (server, addrs)
}

/// Sends these bytes and returns the connection.
#[track_caller]
fn talk(addr: SocketAddr, bytes: &[u8]) -> TcpStream {
    let mut tcp = connect(addr);
    tcp.write_all(bytes).expect("sent");
    tcp
}

/// A ClientHello that asks for this version at most and offers these suites, without extensions but the necessary.
fn hello(minor: u8, suites: &[u16]) -> Vec<u8> {
    fn block(width: usize, content: &[u8]) -> Vec<u8> {
        let mut bytes = (content.len() as u64).to_be_bytes()[8 - width..].to_vec();
        bytes.extend_from_slice(content);
        bytes
    }
    fn extension(kind: u16, content: &[u8]) -> Vec<u8> {
        [&kind.to_be_bytes()[..], &block(2, content)].concat()
    }
    let suites: Vec<u8> = suites
        .iter()
        .flat_map(|suite| suite.to_be_bytes())
        .collect();
    let extensions = [
        // Signatures: ECDSA and RSA-PSS with SHA-256. Groups: X25519. Points: uncompressed. Renegotiation: empty.
        extension(13, &block(2, &[4, 3, 8, 4])),
        extension(10, &block(2, &[0, 29])),
        extension(11, &block(1, &[0])),
        extension(23, &[]),
        extension(0xff01, &[0]),
    ]
    .concat();
    let body = [
        &[3, minor][..],
        &[7; 32],
        &block(1, &[]),
        &block(2, &suites),
        &block(1, &[0]),
        &block(2, &extensions),
    ]
    .concat();
    let message = [&[1][..], &block(3, &body)].concat();
    [&[22, 3, 1][..], &block(2, &message)].concat()
}

const ECDHE_ECDSA_AES128_GCM: u16 = 0xc02b;
const RSA_RC4_SHA: u16 = 0x0005;

/// The hand-made hello is one that is answered: otherwise its refusals would prove nothing.
#[test]
fn a_good_hello_is_answered() {
    let server = recorder(&Site::new());
    let mut tcp = talk(server.addr(), &hello(3, &[ECDHE_ECDSA_AES128_GCM]));
    let mut header = [0; 6];
    tcp.read_exact(&mut header).expect("an answer");
    assert_eq!((header[0], header[5]), (22, 2), "a ServerHello");
}

/// Nothing; half a hello; a whole one and then nothing. Such clients take all slots, and the
/// deadline frees these for a client in the backlog.
#[test]
fn silence_is_ended_and_frees_its_place() {
    let site = Site::new();
    let (server, [short, long]) = two_listeners(&site, Config::max_connections(3));
    let whole = wire_of(&mut session(&site.client(&version::TLS13)));
    let mut silent = [&[][..], &whole[..whole.len() / 2], &whole].map(|bytes| talk(short, bytes));
    server.until("the places are taken", |stats| stats.open == 3);
    let mut waiting = secure(long, &site.client(&version::TLS13));
    ping(&mut waiting, b"at last");
    for tcp in &mut silent {
        let (_, end) = read_raw(tcp);
        assert!(end.is_none(), "{end:?}");
    }
    let stats = server.until("they are gone", |stats| stats.open == 1);
    assert_eq!(
        (stats.closed(CloseReason::HandshakeTimeout), stats.peak),
        (3, 3)
    );
    let failed_accepts = server.ask(|seen, _| seen.failed_accepts.clone());
    assert_eq!(
        failed_accepts,
        vec![(CloseReason::HandshakeTimeout, String::new()); 3]
    );
}

/// The deadline counts from accept, so a byte now and then does not extend it.
#[test]
fn dripping_buys_no_time() {
    let site = Site::new();
    let (server, [short, long]) = two_listeners(&site, Config::new());
    let mut other = secure(long, &site.client(&version::TLS13));
    let mut tcp = connect(short);
    tcp.set_read_timeout(Some(Duration::from_millis(10)))
        .expect("timeout");
    // A hello that would take hours at this pace.
    let mut ended = false;
    for byte in [
        &[22, 3, 1, 0x40, 0, 1, 0, 0x3f, 0xfc, 3, 3][..],
        &[0; 16_000],
    ]
    .concat()
    {
        if tcp.write_all(&[byte]).is_err() {
            ended = true;
            break;
        }
        match tcp.read_some(&mut [0; 1]) {
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            _ => {
                ended = true;
                break;
            }
        }
    }
    assert!(ended, "the drip went on to its end");
    ping(&mut other, b"served");
    let stats = server.until("it is counted", |stats| stats.closed_total() == 1);
    assert_eq!(stats.closed(CloseReason::HandshakeTimeout), 1);
}

/// The handshake's deadline is over with the handshake.
#[test]
fn an_open_connection_has_no_handshake_deadline() {
    let site = Site::new();
    let server = spawn_recorder(
        Config::new(),
        listen(&site).with(|listen| listen.conn.handshake_timeout = 5 * SOON),
    );
    let mut open = secure(server.addr(), &site.client(&version::TLS13));
    let _silent = connect(server.addr());
    server.until("the silent one is gone", |stats| {
        stats.closed(CloseReason::HandshakeTimeout) == 1
    });
    ping(&mut open, b"still here");
}

/// An alert if rustls has one, then FIN. A reset would destroy the alert.
#[test]
fn plaintext_on_a_tls_port_is_named() {
    let site = Site::new();
    for first in [
        &b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"[..],
        b"\x00\x05hello\x00\x05again",
        &[0; 100],
        b"EHLO somebody\r\n",
    ] {
        let server = recorder(&site);
        let mut tcp = talk(server.addr(), first);
        let (bytes, end) = read_raw(&mut tcp);
        assert!(end.is_none(), "{end:?}");
        // An alert in the clear, which also tells a human with telnet that something is there; or nothing.
        assert!(bytes.is_empty() || bytes[0] == 21, "{bytes:?}");
        drop(tcp);
        assert_eq!(the_end(&server).0, CloseReason::NotTls, "{first:?}");
        assert_eq!(server.finish().1.failed_accepts.len(), 1);
    }
}

/// Too short for rustls to judge: the first byte tells, when the deadline or the peer's end comes.
#[test]
fn a_short_word_of_plaintext_is_named_too() {
    let site = Site::new();
    for finish in [false, true] {
        let server = spawn_recorder(
            Config::new(),
            listen(&site).with(|listen| listen.conn.handshake_timeout = SOON),
        );
        let mut tcp = talk(server.addr(), b"hi");
        if finish {
            tcp.shutdown(Shutdown::Write).expect("FIN");
        }
        let (_, end) = read_raw(&mut tcp);
        assert!(end.is_none(), "{end:?}");
        drop(tcp);
        assert_eq!(the_end(&server).0, CloseReason::NotTls);
    }
}

/// The alert arrives although megabytes of what we will never read are behind it.
#[test]
fn an_upload_in_plaintext_gets_its_alert() {
    let site = Site::new();
    let server = recorder(&site);
    let tcp = connect(server.addr());
    let (mut reading, mut writing) = (tcp.try_clone().expect("a second descriptor"), tcp);
    std::thread::scope(|scope| {
        scope.spawn(move || {
            writing
                .write_all(&b"PUT / HTTP/1.1\r\n".repeat(500_000))
                .expect("taken and discarded");
            writing.shutdown(Shutdown::Write).expect("FIN");
        });
        let (bytes, end) = read_raw(&mut reading);
        assert!(end.is_none(), "{end:?}");
        assert_eq!(bytes.first(), Some(&21), "an alert");
    });
    assert_eq!(the_end(&server).0, CloseReason::NotTls);
}

/// Bytes that look like TLS and are no hello are answered with an alert and FIN.
#[test]
fn tls_that_is_no_hello_gets_an_alert() {
    let site = Site::new();
    let sslv2 = [
        // Length with the high bit, CLIENT-HELLO, version 3.1, 3 bytes of suites, no session, 16 bytes of challenge.
        &[0x80, 28, 1, 3, 1, 0, 3, 0, 0, 0, 16, 1, 0, 0x80][..],
        &[9; 16],
    ]
    .concat();
    let streams = [
        ("SSLv2", sslv2),
        (
            "application data first",
            [&[23, 3, 3, 0, 20][..], &[1; 20]].concat(),
        ),
        ("change cipher spec first", vec![20, 3, 3, 0, 1, 1]),
        (
            "another handshake message",
            vec![22, 3, 3, 0, 4, 2, 0, 0, 0],
        ),
        ("heartbeat", vec![24, 3, 3, 0, 3, 1, 0, 0]),
        (
            "a record that is too long",
            vec![22, 3, 3, 0xff, 0xff, 1, 0, 0, 0],
        ),
        ("an empty record", vec![22, 3, 3, 0, 0]),
        (
            "a hello that lies about its length",
            vec![22, 3, 3, 0, 5, 1, 0, 0, 1, 0],
        ),
        (
            "a hello of 16 MiB",
            vec![22, 3, 3, 0, 4, 1, 0xff, 0xff, 0xff],
        ),
    ];
    for (what, stream) in streams {
        let server = recorder(&site);
        let mut tcp = talk(server.addr(), &stream);
        tcp.shutdown(Shutdown::Write).expect("FIN");
        let (bytes, end) = read_raw(&mut tcp);
        assert!(end.is_none(), "{what}: {end:?}");
        // A hello that may still be continued gets none: its end is the peer's own.
        assert!(bytes.is_empty() || bytes[0] == 21, "{what}: {bytes:?}");
        drop(tcp);
        let (reason, cause) = the_end(&server);
        assert_eq!(reason, CloseReason::TlsHandshake, "{what}");
        assert!(!cause.is_empty(), "{what}: the service is told how");
    }
}

/// A peer's own alert is the cause that is told.
#[test]
fn a_client_that_does_not_trust_us_is_named() {
    let site = Site::new();
    let elsewhere = Site::of(Authority::new("another authority"));
    for version in VERSIONS {
        let server = recorder(&site);
        let error =
            handshake(server.addr(), &elsewhere.client(version)).expect_err("unknown issuer");
        assert!(error.to_string().contains("UnknownIssuer"), "{error}");
        let (reason, cause) = the_end(&server);
        assert_eq!(reason, CloseReason::TlsHandshake);
        assert!(cause.contains("UnknownCA"), "{cause}");
    }
}

#[test]
fn an_end_in_the_handshake_is_named() {
    let site = Site::new();
    let whole = wire_of(&mut session(&site.client(&version::TLS13)));
    for cut in [0, 1, whole.len() / 2, whole.len()] {
        let server = recorder(&site);
        let mut tcp = talk(server.addr(), &whole[..cut]);
        // One that finishes in the backlog has not begun a handshake.
        server.until("it is accepted", |stats| stats.accepted == 1);
        tcp.shutdown(Shutdown::Write).expect("FIN");
        let (_, end) = read_raw(&mut tcp);
        assert!(end.is_none(), "{end:?}");
        drop(tcp);
        let (reason, cause) = the_end(&server);
        assert_eq!(reason, CloseReason::TlsHandshake, "cut at {cut}");
        assert!(
            cause.contains("closed the connection during the handshake"),
            "{cause}"
        );
    }
}

/// Alert protocol_version (70).
#[test]
fn old_versions_are_refused_with_an_alert() {
    for minor in [0, 1, 2] {
        let server = recorder(&Site::new());
        let mut tcp = talk(server.addr(), &hello(minor, &[ECDHE_ECDSA_AES128_GCM]));
        assert_eq!(alert(&mut tcp), 70, "version 3.{minor}");
        drop(tcp);
        assert_eq!(the_end(&server).0, CloseReason::TlsHandshake);
    }
}

/// Alert handshake_failure (40).
#[test]
fn no_common_suite_is_refused_with_an_alert() {
    let server = recorder(&Site::new());
    let mut tcp = talk(server.addr(), &hello(3, &[RSA_RC4_SHA]));
    assert_eq!(alert(&mut tcp), 40);
    drop(tcp);
    let (reason, cause) = the_end(&server);
    assert_eq!(reason, CloseReason::TlsHandshake);
    assert!(cause.contains("CipherSuite"), "{cause}");
}

/// The same between two whole implementations.
#[test]
fn one_suite_each_and_not_the_same() {
    fn only(at: usize) -> Arc<CryptoProvider> {
        let mut provider = CryptoProvider::clone(&provider());
        provider
            .cipher_suites
            .retain(|suite| suite.version().version == version::TLS13.version);
        provider.cipher_suites = vec![provider.cipher_suites[at]];
        Arc::new(provider)
    }
    let site = Site::new();
    let config = ServerConfig::builder_with_provider(only(0))
        .with_protocol_versions(&[&version::TLS13])
        .expect("versions")
        .with_no_client_auth()
        .with_single_cert(site.identity.chain.clone(), site.identity.key())
        .expect("certificate and key");
    let client = ClientConfig::builder_with_provider(only(1))
        .with_protocol_versions(&[&version::TLS13])
        .expect("versions")
        .with_root_certificates(site.authority.roots())
        .with_no_client_auth();
    let server = spawn_recorder(Config::new(), local().tls(Arc::new(config)));
    let error = handshake(server.addr(), &client).expect_err("nothing in common");
    assert!(error.to_string().contains("HandshakeFailure"), "{error}");
    assert_eq!(the_end(&server).0, CloseReason::TlsHandshake);
}

/// A server that speaks 1.3 alone, and a client of yesterday.
#[test]
fn a_version_the_configuration_excludes_is_refused() {
    let site = Site::new();
    let config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&version::TLS13])
        .expect("versions")
        .with_no_client_auth()
        .with_single_cert(site.identity.chain.clone(), site.identity.key())
        .expect("certificate and key");
    let server = spawn_recorder(Config::new(), local().tls(Arc::new(config)));
    let error = handshake(server.addr(), &site.client(&version::TLS12)).expect_err("too old");
    assert!(error.to_string().contains("ProtocolVersion"), "{error}");
    assert_eq!(the_end(&server).0, CloseReason::TlsHandshake);
}

/// A handshake message may have 64 KiB, and is buffered in pieces; a longer one is refused on its
/// header.
#[test]
fn a_huge_hello_is_held_within_bounds() {
    const CLIENTS: usize = 20;
    let site = Site::new();
    let server = spawn_recorder(Config::new(), listen(&site));
    // A hello of 0xf000 bytes, in records of 16 KiB, without its last byte.
    let mut stream = Vec::new();
    let message = [&[1, 0, 0xf0, 0, 3, 3][..], &[0; 0xeffe]].concat();
    for piece in message[..message.len() - 1].chunks(16_384) {
        stream.extend_from_slice(&[22, 3, 1]);
        stream.extend_from_slice(&(piece.len() as u16).to_be_bytes());
        stream.extend_from_slice(piece);
    }
    let clients: Vec<_> = (0..CLIENTS).map(|_| talk(server.addr(), &stream)).collect();
    let total = (CLIENTS * stream.len()) as u64;
    server.until("all of it has been read", |stats| {
        stats.traffic.bytes_in >= total
    });
    let held: Vec<usize> = server.ask(|_, control| {
        control
            .connections()
            .iter()
            .map(|conn| conn.buffered)
            .collect()
    });
    assert_eq!(held.len(), CLIENTS, "nobody is refused yet");
    assert!(
        held.iter().all(|&bytes| bytes <= 0x1_0000 + 0x4800),
        "{held:?}"
    );
    let mut other = secure(server.addr(), &site.client(&version::TLS13));
    ping(&mut other, b"beside");
    for mut tcp in clients {
        tcp.write_all(&[22, 3, 1, 0, 1, 0]).expect("the last byte");
        let (bytes, end) = read_raw(&mut tcp);
        assert!(
            end.is_none() && bytes.first() == Some(&21),
            "{end:?} {bytes:?}"
        );
    }
    drop(other);
    server.finish();
}

/// A TLS client at a plain listener. What it sends is no frame; the name tells the operator what to correct.
#[test]
fn tls_on_a_plain_port_is_named() {
    let site = Site::new();
    let hello = wire_of(&mut session(&site.client(&version::TLS13)));
    for framing in [
        Framing::Packet1,
        Framing::Packet2,
        Framing::Packet4,
        Framing::Line,
        Framing::Delimited(0),
    ] {
        // To packet-2 it begins a frame of 5.6 KB that never ends; to packet-4 one that is too large. The others find
        // frames in it, which are not delivered: the echo sends nothing.
        let server = spawn_echo(
            Config::new(),
            local().with(|listen| {
                listen.framing = framing.clone();
                listen.conn.frame_timeout = SOON;
            }),
        );
        let mut tcp = talk(server.addr(), &hello);
        assert_eq!(read_to_end(&mut tcp), b"");
        drop(tcp);
        let stats = server.until("it ends", |stats| stats.closed_total() == 1);
        assert_eq!(stats.closed(CloseReason::UnexpectedTls), 1, "{framing:?}");
    }
    // And when the client does not wait so long.
    let server = spawn_echo(Config::new(), local());
    let mut tcp = talk(server.addr(), &hello);
    tcp.shutdown(Shutdown::Write).expect("FIN");
    assert_eq!(read_to_end(&mut tcp), b"");
    server.until("it ends", |stats| {
        stats.closed(CloseReason::UnexpectedTls) == 1
    });
}

/// In two segments, of which the first ends in the header of the record, and with framings for which
/// that header announces too long a frame.
#[test]
fn tls_on_a_plain_port_is_named_by_the_header_of_its_record() {
    let site = Site::new();
    let hello = wire_of(&mut session(&site.client(&version::TLS13)));
    for (framing, max_frame, cut) in [
        (Framing::Packet4, None, 4),
        (Framing::Packet4, None, 5),
        (Framing::Packet2, Some(512), 2),
        (Framing::Packet2, Some(512), 5),
    ] {
        let mut sim = Sim::new(1, Config::new(), ());
        let listen = local().with(|listen| {
            listen.framing = framing.clone();
            listen.conn.max_frame = max_frame;
        });
        let addr = sim.listen(listen, |_: &mut (), _| kit::net::Echo);
        let client = sim.connect(addr.expect("listen")).expect("it listens");
        sim.send(client, &hello[..cut]);
        sim.settle();
        sim.send(client, &hello[cut..]);
        sim.finish(client);
        sim.advance(Duration::from_secs(40));
        let stats = sim.stats();
        assert_eq!(
            stats.closed(CloseReason::UnexpectedTls),
            1,
            "{framing:?} {cut}"
        );
    }
    // Another frame that is too long.
    let mut sim = Sim::new(1, Config::new(), ());
    let listen = local().with(|listen| listen.framing = Framing::Packet4);
    let addr = sim.listen(listen, |_: &mut (), _| kit::net::Echo);
    let client = sim.connect(addr.expect("listen")).expect("it listens");
    sim.send(client, b"\x16\x04\0\0");
    sim.finish(client);
    sim.settle();
    assert_eq!(sim.stats().closed(CloseReason::FrameTooLarge), 1);
}

/// Two delimiters are the first bytes of a hello: what comes alone is a frame.
#[test]
fn a_delimiter_that_begins_a_hello_ends_a_frame() {
    for (delimiter, alone) in [(0x16, &[0x16][..]), (0x03, &[0x16, 3])] {
        for is_alone in [true, false] {
            let mut sim = Sim::new(1, Config::new(), ());
            let framing = Framing::Delimited(delimiter);
            let listen = local().with(|listen| listen.framing = framing);
            let addr = sim.listen(listen, |_: &mut (), _| kit::net::Echo);
            let client = sim.connect(addr.expect("listen")).expect("it listens");
            if is_alone {
                sim.send(client, alone);
                sim.settle();
                assert_eq!(sim.received(client), alone);
            } else {
                sim.send(client, &[0x16, 3, 1, 2, 0, 1, 0]);
                sim.finish(client);
                sim.settle();
                assert_eq!(sim.stats().closed(CloseReason::UnexpectedTls), 1);
            }
        }
    }
}

/// Noise on a TLS port, with a valid header or none. Nothing panics, no client is reset, the honest
/// client beside it is served, and each is counted once.
#[test]
fn noise_ends_in_order() {
    let site = Site::new();
    let (server, [short, long]) = two_listeners(&site, Config::new());
    let mut honest = secure(long, &site.client(&version::TLS13));
    let mut state = 7u64;
    let mut random = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as u8
    };
    let whole = wire_of(&mut session(&site.client(&version::TLS13)));
    for round in 0..60usize {
        let mut stream: Vec<u8> = match round % 3 {
            0 => (0..200).map(|_| random()).collect(),
            1 => [&[22, 3, 1, 0, 100, 1, 0, 0, 96][..], &[0; 96]].concat(),
            // A real hello with a few bytes changed.
            _ => whole.clone(),
        };
        for _ in 0..3 {
            let at = usize::from(random()) * stream.len() / 256;
            stream[at] = random();
        }
        let mut tcp = talk(short, &stream);
        tcp.shutdown(Shutdown::Write).expect("FIN");
        let (_, end) = read_raw(&mut tcp);
        assert!(end.is_none(), "round {round}: {end:?}");
        ping(&mut honest, b"beside");
    }
    let stats = server.until("all are counted", |stats| stats.closed_total() == 60);
    assert_eq!(
        stats.closed(CloseReason::TlsHandshake) + stats.closed(CloseReason::NotTls),
        60
    );
    assert_eq!(server.ask(|seen, _| seen.failed_accepts.len()), 60);
}

/// A client that is refused before TLS, or by the service, costs no handshake and no handler call.
#[test]
fn a_service_refuses_before_the_handshake() {
    let site = Site::new();
    let listen = listen(&site);
    let server = spawn(move || {
        let mut server = Server::new(Config::new()).expect("server");
        let service = portcullis::try_accept(|_: &mut (), _| -> Result<kit::net::Echo, _> {
            Err(portcullis::Refuse::with_farewell(*b"closed on Sundays\n"))
        });
        server.listen_with(listen, service).expect("listen");
        (server, ())
    });
    assert_eq!(
        read_to_end(&mut connect(server.addr())),
        b"closed on Sundays\n"
    );
    server.until("it is counted", |stats| {
        stats.closed(CloseReason::Refused) == 1
    });
}
