//! The PROXY protocol on real sockets: rules, service and handler know the source that a trusted
//! proxy names.

use std::io::Write;
use std::net::{Shutdown, SocketAddr};
use std::rc::Rc;
use std::time::Duration;

use kit::net::{
    await_end, connect, local, packet2, ping, read_to_end, recv2, send2, spawn, Running, PATIENCE,
};
use portcullis::{
    AccessRules, CloseReason, Closed, Config, Context, Error, Framing, Handler, Listen, Outcome,
    Peer, ProxyHeader, ProxyProtocol, Refuse, Server, Service,
};

const V1: &[u8] = b"PROXY TCP4 192.0.2.1 198.51.100.2 50000 443\r\n";
/// The same, with ALPN, authority and a unique id.
const V2: &[u8] =
    b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x21\xC0\0\x02\x01\xC6\x33\x64\x02\xC3\x50\x01\xBB\
    \x01\0\x02h2\x02\0\x05a.tld\x05\0\x05id-77";
const LOCAL: &[u8] = b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0";

/// What handlers and service have heard.
#[derive(Default)]
struct Heard {
    accepted: Vec<String>,
    opened: Vec<String>,
    failed_accepts: Vec<(CloseReason, String)>,
}

/// Keeps the facts of its header.
struct Recorder {
    _header: Option<Rc<ProxyHeader>>,
}

impl Handler<Heard> for Recorder {
    fn on_open(&mut self, cx: &mut Context<'_, Heard>) -> Outcome {
        let source = cx.conn.source().to_string();
        let told = match cx.conn.proxy() {
            Some(header) => format!(
                "v{} {source} alpn {:?} authority {:?} id {:?}",
                header.version,
                header.tlvs.get(0x01).map(String::from_utf8_lossy),
                header.tlvs.get(0x02).map(String::from_utf8_lossy),
                header.tlvs.get(0x05).map(String::from_utf8_lossy),
            ),
            None => format!(
                "none {}",
                source == cx.conn.info().expect("it is there").peer.to_string()
            ),
        };
        assert_eq!(
            cx.conn.info().expect("it is there").source.to_string(),
            source
        );
        cx.app.opened.push(told);
        Ok(())
    }

    fn on_frame(&mut self, cx: &mut Context<'_, Heard>, frame: &[u8]) -> Outcome {
        cx.conn.send(frame)?;
        Ok(())
    }
}

struct Witnesses;

impl Service<Heard> for Witnesses {
    fn accept(&mut self, heard: &mut Heard, peer: Peer) -> Result<Box<dyn Handler<Heard>>, Refuse> {
        heard.accepted.push(peer.source().to_string());
        match peer.source().port() {
            Some(666) => Err(Refuse::with_farewell("not you")),
            Some(667) => panic!("not me (this panic belongs to the test)"),
            _ => Ok(Box::new(Recorder {
                _header: peer.proxy,
            })),
        }
    }

    fn on_failed_accept(&mut self, heard: &mut Heard, peer: &Peer, closed: &Closed) {
        heard
            .failed_accepts
            .push((closed.reason, peer.source().ip().expect("TCP").to_string()));
    }
}

fn required() -> Listen {
    local().with(|listen| {
        listen.proxy_protocol = ProxyProtocol::Required;
        listen.trusted_proxies = Some(
            AccessRules::deny_all()
                .allow("127.0.0.0/8")
                .expect("a network"),
        );
    })
}

fn server(listen: Listen) -> Running<Heard> {
    spawn(move || {
        let mut server = Server::new(Config::new()).expect("server");
        server.listen_with(listen, Witnesses).expect("listen");
        (server, Heard::default())
    })
}

/// ranch: recv_v1_proxy_header_tcp, recv_v2_proxy_header_tcp, recv_v2_local_header_tcp, each with extra data.
/// esockd: t_ppv1_tcp4_connect, t_ppv1_unknown.
#[test]
fn the_handler_knows_its_client() {
    let server = server(required());
    for (header, told) in [
        (V1, "v1 192.0.2.1:50000 alpn None authority None id None"),
        (
            V2,
            "v2 192.0.2.1:50000 alpn Some(\"h2\") authority Some(\"a.tld\") id Some(\"id-77\")",
        ),
        (
            b"PROXY TCP6 2001:DB8::1 ::1 7 8\r\n",
            "v1 [2001:db8::1]:7 alpn None authority None id None",
        ),
    ] {
        let mut client = connect(server.addr());
        client
            .write_all(&[header, &packet2(b"hello")].concat())
            .expect("sent");
        assert_eq!(recv2(&mut client), b"hello");
        ping(&mut client, b"more");
        server.ask(move |heard, _| assert_eq!(heard.opened.pop().as_deref(), Some(told)));
    }
    for header in [
        LOCAL,
        b"PROXY UNKNOWN\r\n",
        b"PROXY UNKNOWN what ever it says\r\n",
    ] {
        let mut client = connect(server.addr());
        let own = client.local_addr().expect("an address").to_string();
        client.write_all(header).expect("sent");
        ping(&mut client, b"hello");
        server.ask(move |heard, _| {
            let told = heard.opened.pop().expect("it is open");
            assert!(told.contains(&own), "{told}: its own address holds");
        });
    }
}

/// The rules are asked about the proxy, whether it may come, and about the source. esockd asks about the proxy alone.
/// Access rules hold for the peer and for the source that its header names.
#[test]
fn rules_hold_for_the_source() {
    let rules = AccessRules::allow_all()
        .deny("192.0.2.0/24")
        .expect("a network");
    let server = server(required().with(|listen| listen.access_rules = rules));
    let mut client = connect(server.addr());
    client
        .write_all(&[V1, &packet2(b"hello")].concat())
        .expect("sent");
    await_end(&mut client);
    let mut other = connect(server.addr());
    other
        .write_all(b"PROXY TCP4 203.0.113.9 198.51.100.2 1 2\r\n")
        .expect("sent");
    ping(&mut other, b"hello");
    server.until("it is counted", |stats| {
        stats.closed(CloseReason::Denied) == 1
    });
    server.ask(|heard, _| {
        assert_eq!(
            heard.accepted,
            ["203.0.113.9:1"],
            "the service is not asked about the other"
        );
        assert_eq!(
            heard.failed_accepts,
            [(CloseReason::Denied, "192.0.2.1".to_owned())]
        );
    });
}

#[test]
fn only_trusted_proxies_may_come() {
    let nobody = AccessRules::deny_all()
        .allow("10.0.0.0/8")
        .expect("a network");
    let server = server(required().with(|listen| listen.trusted_proxies = Some(nobody)));
    let mut client = connect(server.addr());
    let _ = client.write_all(V1);
    await_end(&mut client);
    server.until("it is counted", |stats| {
        stats.closed(CloseReason::Denied) == 1
    });
    server.ask(|heard, _| assert!(heard.accepted.is_empty()));
}

/// Where a header is optional, one from an untrusted peer is data like any other.
#[test]
fn an_optional_header_is_believed_of_the_trusted_alone() {
    for (network, told) in [
        ("127.0.0.0/8", "v1 192.0.2.1:50000"),
        ("10.0.0.0/8", "none true"),
    ] {
        let trusted = AccessRules::deny_all().allow(network).expect("a network");
        let listen = local().with(|listen| {
            listen.framing = Framing::Line;
            listen.proxy_protocol = ProxyProtocol::Optional;
            listen.trusted_proxies = Some(trusted);
        });
        let server = server(listen);
        let mut client = connect(server.addr());
        client.write_all(V1).expect("sent");
        client.write_all(b"hello\n").expect("sent");
        client.shutdown(Shutdown::Write).expect("FIN");
        let answer = read_to_end(&mut client);
        let echoes_it = answer.starts_with(b"PROXY TCP4");
        assert_eq!(echoes_it, network == "10.0.0.0/8");
        assert!(answer.ends_with(b"hello\n"));
        server
            .ask(move |heard, _| assert!(heard.opened[0].starts_with(told), "{:?}", heard.opened));
        let mut plain = connect(server.addr());
        plain.write_all(b"no header\n").expect("sent");
        plain.shutdown(Shutdown::Write).expect("FIN");
        assert_eq!(read_to_end(&mut plain), b"no header\n");
    }
}

#[test]
fn the_service_may_refuse_with_a_word() {
    let server = server(required());
    let mut client = connect(server.addr());
    client
        .write_all(b"PROXY TCP4 192.0.2.1 198.51.100.2 666 443\r\n")
        .expect("sent");
    assert_eq!(read_to_end(&mut client), b"not you");
    drop(client);
    let stats = server.until("it is counted", |stats| stats.closed_total() == 1);
    assert_eq!(stats.closed(CloseReason::Refused), 1);
}

#[test]
fn a_service_that_panics_ends_that_connection_alone() {
    let server = server(required());
    let mut client = connect(server.addr());
    client
        .write_all(b"PROXY TCP4 192.0.2.1 198.51.100.2 667 443\r\n")
        .expect("sent");
    await_end(&mut client);
    drop(client);
    let stats = server.until("it is counted", |stats| stats.closed_total() == 1);
    assert_eq!((stats.closed(CloseReason::Panicked), stats.panics), (1, 1));
    let mut other = connect(server.addr());
    other.write_all(V1).expect("sent");
    ping(&mut other, b"unharmed");
}

/// There is no guess, and no fallback to a connection without a header.
#[test]
fn what_is_no_header_is_refused() {
    let server = server(required());
    for (count, bytes) in [
        &b"\0\x05hello"[..],
        b"\x16\x03\x01\0\xC8\x01",
        b"proxy tcp4",
        b"GET / HTTP/1.1\r\n",
    ]
    .into_iter()
    .enumerate()
    {
        let mut client = connect(server.addr());
        client.write_all(bytes).expect("sent");
        assert_eq!(read_to_end(&mut client), b"");
        drop(client);
        server.until("it is counted", |stats| {
            stats.closed(CloseReason::BadProxyHeader) == count as u64 + 1
        });
    }
    server.ask(|heard, _| assert!(heard.accepted.is_empty() && heard.opened.is_empty()));
}

/// A missing header takes no longer than the handshake timeout, and a drain shortens that.
#[test]
fn a_client_without_a_header_has_no_handler_and_no_long_life() {
    let listen =
        required().with(|listen| listen.conn.handshake_timeout = Duration::from_millis(200));
    let late = server(listen);
    let mut client = connect(late.addr());
    client.write_all(&V1[..20]).expect("sent");
    assert_eq!(read_to_end(&mut client), b"");
    drop(client);
    late.until("it is counted", |stats| {
        stats.closed(CloseReason::HandshakeTimeout) == 1
    });

    let draining = server(required());
    let mut client = connect(draining.addr());
    client.write_all(&V1[..20]).expect("sent");
    draining.until("it is in", |stats| stats.open == 1);
    draining.handle.drain(PATIENCE).expect("it runs");
    assert_eq!(read_to_end(&mut client), b"");
    let (stats, heard) = draining.finish();
    assert_eq!(stats.closed(CloseReason::HandshakeTimeout), 1);
    assert!(heard.accepted.is_empty());
}

/// One that waits for its header is served to the end if it comes while the server drains.
#[test]
fn a_header_that_comes_during_a_drain_is_in_time() {
    let server = server(required());
    let mut client = connect(server.addr());
    client.write_all(&V1[..20]).expect("sent");
    server.until("it is in", |stats| stats.open == 1);
    server.handle.drain(PATIENCE).expect("it runs");
    client.write_all(&V1[20..]).expect("sent");
    send2(&mut client, b"hello");
    let answer = read_to_end(&mut client);
    // The drain may be told before the frame has come: then it is closed in order without an answer.
    assert!(
        answer == packet2(b"hello") || answer.is_empty(),
        "{answer:?}"
    );
    let (stats, _) = server.finish();
    assert_eq!(
        stats.closed(CloseReason::Drained) + stats.closed(CloseReason::HandshakeTimeout),
        1
    );
}

#[test]
fn the_trusted_proxies_must_be_named() {
    let mut server: Server = Server::new(Config::new()).expect("server");
    for mode in [ProxyProtocol::Required, ProxyProtocol::Optional] {
        let refused = server.listen(
            local().with(|listen| listen.proxy_protocol = mode),
            |_: &mut (), _| kit::net::Echo,
        );
        match refused {
            Err(Error::Option { option, problem }) => {
                assert!(
                    option == "trusted_proxies" && problem.contains("allow_all"),
                    "{problem}"
                );
            }
            other => panic!("{other:?}"),
        }
    }
}

/// The header comes before TLS, with the ClientHello in the same segment: no byte is lost between.
/// ranch: recv_v1|v2_proxy_header_ssl, _extra_data.
#[cfg(feature = "tls")]
#[test]
fn tls_begins_right_behind_it() {
    use kit::tls::{exchange, handshake_over, session, wire_of, Site};
    use portcullis::tls::rustls::version;

    let site = Site::new();
    let config = std::sync::Arc::new(site.server());
    let server = server(required().tls(config));
    for version in [&version::TLS12, &version::TLS13] {
        let client_config = site.client(version);
        for header in [V1, V2, LOCAL] {
            // All in one segment, and cut in the hello.
            let mut tls = session(&client_config);
            let bytes = [header, &wire_of(&mut tls)].concat();
            for cut in [
                bytes.len(),
                header.len() + 3,
                header.len(),
                header.len() - 1,
            ] {
                let mut tls = session(&client_config);
                let bytes = [header, &wire_of(&mut tls)].concat();
                let mut tcp = connect(server.addr());
                let (head, tail) = bytes.split_at(cut.min(bytes.len()));
                tcp.write_all(head).expect("sent");
                server.until("it is in", |stats| stats.open == 1);
                tcp.write_all(tail).expect("sent");
                let client = handshake_over(tcp, tls).expect("a handshake");
                assert_eq!(exchange(client, &packet2(b"hello")), packet2(b"hello"));
                server.until("it is over", |stats| stats.open == 0);
            }
        }
    }
    let stats = server.handle.stats();
    assert_eq!(stats.closed(CloseReason::Finished), 24, "{stats:?}");
    // Without the header TLS is refused.
    let mut tls = session(&site.client(&version::TLS13));
    let mut tcp = connect(server.addr());
    tcp.write_all(&wire_of(&mut tls)).expect("sent");
    await_end(&mut tcp);
    server.until("it is counted", |stats| {
        stats.closed(CloseReason::BadProxyHeader) == 1
    });
}

/// A client that is refused behind a proxy gets the farewell in the clear, like every refusal
/// before TLS.
#[cfg(feature = "tls")]
#[test]
fn a_refusal_before_tls_is_in_the_clear() {
    let server = server(required().tls(std::sync::Arc::new(kit::tls::Site::new().server())));
    let mut client = connect(server.addr());
    client
        .write_all(b"PROXY TCP4 192.0.2.1 198.51.100.2 666 443\r\n")
        .expect("sent");
    assert_eq!(read_to_end(&mut client), b"not you");
    client.shutdown(Shutdown::Both).expect("still a socket");
    server.until("it is counted", |stats| {
        stats.closed(CloseReason::Refused) == 1
    });
}

/// A frame for a connection that waits for its header is sent once it is open.
#[test]
fn no_client_can_talk_to_it_before() {
    let server = server(required());
    let mut client = connect(server.addr());
    server.until("it is in", |stats| stats.open == 1);
    let id = server.ask(|_, control| control.connections()[0].id);
    server.handle.notify(id, "hello").expect("it is alive");
    server.handle.send(id, "hello").expect("it is alive");
    let queued = server.ask(|_, control| control.connections()[0].queued);
    assert_eq!(queued, 0, "it is not admitted yet");
    client.write_all(V1).expect("sent");
    assert_eq!(recv2(&mut client), b"hello");
    ping(&mut client, b"now");
    assert_eq!(server.ask(|_, control| control.stats().undeliverable), 0);
    let _: SocketAddr = client.local_addr().expect("an address");
}
