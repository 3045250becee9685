//! The observer's HTTP: what it serves, whom it refuses, and what is no request.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};

use base64::prelude::{Engine, BASE64_STANDARD};
use kit::exposition::Exposition;
use kit::net::{await_end, connect, local, ping, read_to_end, spawn, tcp, Echo, ReadSome, Running};
use portcullis::sim::{ClientState, Sim};
use portcullis::{
    CloseReason, Config, Decoded, Error, FrameError, Framer, Framing, Observer, Server,
};
use serde_json::Value;
use sha2::{Digest, Sha256};

const TOKEN: &str = "0123456789abcdef";

/// An echo server and its observer's address.
fn start(observer: fn() -> Observer) -> (Running, SocketAddr) {
    let server = spawn(move || {
        let mut server = Server::new(Config::new()).expect("server");
        server
            .listen(local(), |_: &mut (), _| Echo)
            .expect("listen");
        let observer = observer();
        let listen = observer.listen("127.0.0.1:0").expect("loopback");
        server.listen_with(listen, observer).expect("listen");
        (server, ())
    });
    let page = tcp(&server.listeners[1].addr);
    (server, page)
}

struct Answer {
    status: String,
    headers: Vec<String>,
    body: String,
}

impl Answer {
    fn header(&self, name: &str) -> Option<&str> {
        let prefix = format!("{name}: ");
        self.headers
            .iter()
            .find_map(|header| header.strip_prefix(&prefix))
    }
}

/// Reads one answer, up to the end of its content.
#[track_caller]
fn read_answer(stream: &mut TcpStream, has_body: bool) -> Answer {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte).expect("a head");
        head.extend_from_slice(&byte);
    }
    let head = String::from_utf8(head).expect("ASCII");
    let mut lines = head.trim_end().split("\r\n").map(str::to_owned);
    let mut answer = Answer {
        status: lines.next().expect("a status").replacen("HTTP/1.1 ", "", 1),
        headers: lines.collect(),
        body: String::new(),
    };
    let length = answer.header("Content-Length").expect("a length").parse();
    let length: u64 = if has_body {
        length.expect("a number")
    } else {
        0
    };
    let content = (&*stream).take(length).read_to_string(&mut answer.body);
    assert_eq!(content.expect("the content") as u64, length);
    answer
}

fn ask(page: SocketAddr, request: &str) -> Answer {
    let mut stream = connect(page);
    stream.write_all(request.as_bytes()).expect("sent");
    read_answer(&mut stream, !request.starts_with("HEAD"))
}

fn get(page: SocketAddr, target: &str) -> Answer {
    ask(
        page,
        &format!("GET {target} HTTP/1.1\r\nHost: {page}\r\n\r\n"),
    )
}

#[test]
fn each_path_has_its_answer() {
    let (server, page) = start(Observer::new);
    ping(&mut connect(server.addr()), b"hello");
    for (target, status, kind) in [
        ("/", "200 OK", "text/html; charset=utf-8"),
        ("/?x=y", "200 OK", "text/html; charset=utf-8"),
        ("/metrics", "200 OK", portcullis::Metrics::CONTENT_TYPE),
        (
            "/metrics?name[]=x",
            "200 OK",
            portcullis::Metrics::CONTENT_TYPE,
        ),
        ("/tree.json?limit=5", "200 OK", "application/json"),
        ("/healthz", "200 OK", "text/plain; charset=utf-8"),
        ("/kill", "404 Not Found", "text/plain; charset=utf-8"),
        ("/metrics/", "404 Not Found", "text/plain; charset=utf-8"),
        ("//", "404 Not Found", "text/plain; charset=utf-8"),
        (
            "/../tree.json",
            "404 Not Found",
            "text/plain; charset=utf-8",
        ),
    ] {
        let mut stream = connect(page);
        // HEAD has the same headers, and is followed by the answer to GET.
        for method in ["HEAD", "GET"] {
            let request = format!("{method} {target} HTTP/1.1\r\nHost: localhost\r\n\r\n");
            stream.write_all(request.as_bytes()).expect("sent");
        }
        let (head, full) = (
            read_answer(&mut stream, false),
            read_answer(&mut stream, true),
        );
        assert_eq!(
            (head.status.as_str(), full.status.as_str()),
            (status, status),
            "{target}"
        );
        for answer in [&head, &full] {
            assert_eq!(answer.header("Content-Type"), Some(kind));
            assert_eq!(answer.header("X-Content-Type-Options"), Some("nosniff"));
            assert_eq!(answer.header("Cache-Control"), Some("no-store"));
            assert_eq!(answer.header("Referrer-Policy"), Some("no-referrer"));
        }
    }
    assert_eq!(get(page, "/healthz").body, "ok\n");
    let seen = Exposition::read(&get(page, "/metrics").body);
    assert_eq!(
        seen.get(
            "portcullis_listener_accepted_total",
            &[("listener", &server.listeners[0].name)]
        ),
        1.0
    );
    let tree: Value = serde_json::from_str(&get(page, "/tree.json").body).expect("JSON");
    assert_eq!(tree["listeners"][0]["listener"]["accepted"], 1);
    let head = ask(page, "HEAD /tree.json?limit=0 HTTP/1.0\r\n\r\n");
    assert_eq!(head.header("Connection"), Some("close"));
    server.finish();
}

/// The policy allows the page's own script and style, and nothing else; the page names nothing outside.
#[test]
fn the_page_is_whole_and_its_policy_fits() {
    let (server, page) = start(|| Observer::new().allow_kill(TOKEN));
    let answer = get(page, "/");
    let policy = answer.header("Content-Security-Policy").expect("a policy");
    for (tag, directive) in [("script", "script-src"), ("style", "style-src")] {
        let (_, rest) = answer
            .body
            .split_once(&format!("<{tag}>"))
            .expect("it begins");
        let (text, rest) = rest.split_once(&format!("</{tag}>")).expect("it ends");
        assert!(!rest.contains(&format!("<{tag}")), "one {tag}");
        let hash = BASE64_STANDARD.encode(Sha256::digest(text.as_bytes()));
        let file = format!("src/observer/{tag}.sha256");
        assert!(
            policy.contains(&format!("{directive} 'sha256-{hash}';")),
            "{file} has to be {hash}"
        );
    }
    assert!(policy.starts_with("default-src 'none'; ") && !policy.contains("unsafe"));
    // Namespaces are no addresses.
    let text = answer.body.replace("http://www.w3.org/", "");
    for outside in [
        "http:",
        "https:",
        " src=",
        "@import",
        "url(",
        "innerHTML",
        " style=",
        TOKEN,
    ] {
        assert!(!text.contains(outside), "{outside}");
    }
    server.finish();
}

/// Reads up to the end of the first events, with the head.
#[track_caller]
fn read_events(stream: &mut TcpStream) -> String {
    let mut text = Vec::new();
    while !text.ends_with(b"\n\n") || !text.windows(17).any(|part| part == b"event: connection") {
        let mut piece = [0; 4096];
        let length = stream.read_some(&mut piece).expect("events");
        assert!(length > 0);
        text.extend_from_slice(&piece[..length]);
    }
    String::from_utf8(text).expect("UTF-8")
}

#[test]
fn the_head_of_the_events_comes_alone() {
    let (server, page) = start(Observer::new);
    let mut stream = connect(page);
    let request = b"HEAD /events HTTP/1.1\r\nHost: localhost\r\n\r\n";
    stream.write_all(request).expect("sent");
    let answer = String::from_utf8(read_to_end(&mut stream)).expect("ASCII");
    let begin = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n";
    assert!(answer.starts_with(begin), "{answer}");
    assert_eq!(answer.find("\r\n\r\n"), Some(answer.len() - 4), "{answer}");
    drop(stream);
    server.finish();
}

/// The stream of events has one head: an answer would be read as an event.
#[test]
fn behind_the_events_there_is_no_answer() {
    let (server, page) = start(Observer::new);
    for behind in [
        "GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n",
        "hello\n\n",
    ] {
        let mut stream = connect(page);
        let request = b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n";
        stream.write_all(request).expect("sent");
        let mut text = read_events(&mut stream);
        stream.write_all(behind.as_bytes()).expect("sent");
        stream.shutdown(Shutdown::Write).expect("finish");
        let _ = stream.read_to_string(&mut text);
        assert_eq!(text.matches("HTTP/1.1").count(), 1, "{text}");
    }
    let (stats, ()) = server.finish();
    assert_eq!(stats.panics, 0);
}

#[test]
fn requests_are_answered_in_order_and_events_come_last() {
    let (server, page) = start(Observer::new);
    let mut stream = connect(page);
    let targets = ["/healthz", "/nothing", "/metrics", "/healthz"];
    let request = |target: &str| format!("GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n");
    let all: String = targets
        .into_iter()
        .chain(["/events", "/healthz"])
        .map(request)
        .collect();
    stream.write_all(all.as_bytes()).expect("sent");
    for status in ["200 OK", "404 Not Found", "200 OK", "200 OK"] {
        assert_eq!(read_answer(&mut stream, true).status, status);
    }
    let text = read_events(&mut stream);
    assert!(text.starts_with(
        "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n"
    ));
    assert_eq!(text.matches("HTTP/1.1").count(), 1, "{text}");
    // The client's end is the end.
    stream.shutdown(Shutdown::Write).expect("finish");
    read_to_end(&mut stream);
    server.finish();
}

#[test]
fn a_host_that_is_not_its_own_is_refused() {
    let (server, page) = start(|| Observer::new().allow_host("stats.example"));
    for (host, status) in [
        ("localhost", "200 OK"),
        ("stats.example:80", "200 OK"),
        ("evil.example", "421 Misdirected Request"),
        ("10.1.2.3", "421 Misdirected Request"),
    ] {
        for target in [
            "/",
            "/events",
            "/metrics",
            "/tree.json",
            "/healthz",
            "/kill",
        ] {
            let answer = ask(
                page,
                &format!("HEAD {target} HTTP/1.1\r\nHost: {host}\r\n\r\n")
                    .replace("HEAD /events", "GET /nothing"),
            );
            let expected = match target {
                "/kill" | "/events" if status == "200 OK" => "404 Not Found",
                _ => status,
            };
            assert_eq!(answer.status, expected, "{target} of {host}");
        }
        // The host of a whole URL counts.
        let request = format!("GET http://{host}/healthz HTTP/1.1\r\nHost: localhost\r\n\r\n");
        assert_eq!(ask(page, &request).status, status);
    }
    assert_eq!(ask(page, "GET /healthz HTTP/1.0\r\n\r\n").status, "200 OK");
    server.finish();
}

#[test]
fn a_kill_needs_token_and_origin() {
    let (server, page) = start(|| Observer::new().allow_kill(TOKEN));
    let (mut victim, mut other) = (connect(server.addr()), connect(server.addr()));
    ping(&mut victim, b"victim");
    ping(&mut other, b"other");
    let tree: Value = serde_json::from_str(&get(page, "/tree.json").body).expect("JSON");
    let id = tree["listeners"][0]["connections"][0]["id"]
        .as_str()
        .expect("an id")
        .to_owned();
    let kill = |origin: &str, token: &str, id: &str| {
        format!(
            "POST /kill HTTP/1.1\r\nHost: {page}\r\n{origin}Authorization: Bearer {token}\r\n\
             Content-Length: {}\r\n\r\n{id}",
            id.len()
        )
    };
    let own = format!("Origin: http://{page}\r\n");
    for (request, status) in [
        (kill("", TOKEN, &id), "403 Forbidden"),
        (
            kill("Origin: http://evil.example\r\n", TOKEN, &id),
            "403 Forbidden",
        ),
        (kill("Origin: null\r\n", TOKEN, &id), "403 Forbidden"),
        (kill(&own, "0123456789abcdeF", &id), "403 Forbidden"),
        (kill(&own, "", &id), "403 Forbidden"),
        (
            kill(&own, TOKEN, &id).replacen("Authorization", "X", 1),
            "403 Forbidden",
        ),
        (kill(&own, TOKEN, "x"), "400 Bad Request"),
        (kill(&own, TOKEN, ""), "400 Bad Request"),
        (kill(&own, TOKEN, "9999.1.0"), "404 Not Found"),
        (
            kill(&own, TOKEN, &id).replacen("POST", "GET", 1),
            "400 Bad Request",
        ),
        (
            format!("GET /kill HTTP/1.1\r\nHost: {page}\r\n\r\n"),
            "405 Method Not Allowed",
        ),
        (
            format!("POST / HTTP/1.1\r\nHost: {page}\r\n\r\n"),
            "405 Method Not Allowed",
        ),
    ] {
        let answer = ask(page, &request);
        assert_eq!(answer.status, status, "{request}");
        if status.starts_with("405") {
            let allowed = if request.contains("/kill") {
                "POST"
            } else {
                "GET, HEAD"
            };
            assert_eq!(answer.header("Allow"), Some(allowed));
        }
    }
    ping(&mut victim, b"it lives");
    // Byte for byte.
    let mut stream = connect(page);
    for byte in kill(&own, TOKEN, &id).as_bytes() {
        stream.write_all(&[*byte]).expect("sent");
    }
    assert_eq!(read_answer(&mut stream, true).status, "200 OK");
    await_end(&mut victim);
    server.until("it is counted", |stats| {
        stats.closed(CloseReason::Killed) == 1
    });
    assert_eq!(ask(page, &kill(&own, TOKEN, &id)).status, "404 Not Found");
    ping(&mut other, b"it lives");
    server.finish();
}

/// One answer, and the end: nothing behind it is taken for a request.
#[test]
fn what_is_no_request_ends_the_connection() {
    let (server, page) = start(|| Observer::new().allow_kill(TOKEN));
    let host = format!("Host: {page}\r\n");
    let smuggled = format!("GET /healthz HTTP/1.1\r\n{host}\r\n");
    for (request, status) in [
        (format!("POST /kill HTTP/1.1\r\n{host}Content-Length: 0\r\nContent-Length: {}\r\n\r\n{smuggled}", smuggled.len()), "400"),
        (format!("POST /kill HTTP/1.1\r\n{host}Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n{smuggled}"), "501"),
        (format!("POST /kill HTTP/1.1\r\n{host}Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n{smuggled}"), "501"),
        (format!("POST /kill HTTP/1.1\r\n{host}Transfer-Encoding: identity\r\n\r\n{smuggled}"), "501"),
        (format!("POST /kill HTTP/1.1\r\n{host}Transfer-Encoding:\tchunked\r\n\r\n{smuggled}"), "501"),
        (format!("POST /kill HTTP/1.1\r\n{host}X: y\nTransfer-Encoding: chunked\r\n\r\n{smuggled}"), "400"),
        (format!("POST /kill HTTP/1.1\r\n{host}Content-Length: 9999\r\n\r\n{smuggled}"), "413"),
        (format!("GET /healthz HTTP/1.1\r\n{host}Content-Length: {}\r\n\r\n{smuggled}", smuggled.len()), "400"),
        (format!("GET /healthz HTTP/1.1\r\n{host}Host: evil.example\r\n\r\n{smuggled}"), "400"),
        (format!("GET /healthz HTTP/1.1\r\n\r\n{smuggled}"), "400"),
        (format!("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n{smuggled}"), "505"),
        (format!("DELETE / HTTP/1.1\r\n{host}Content-Length: 1\r\n\r\nx{smuggled}"), "405"),
        (format!("GET /{} HTTP/1.1\r\n{host}\r\n{smuggled}", "a".repeat(9000)), "431"),
        (format!("GET / HTTP/1.1\r\n{host}X: {}", "a".repeat(200_000)), "431"),
        (format!("GET / HTTP/1.1\r\n{host}{}\r\n{smuggled}", "X: y\r\n".repeat(100)), "431"),
        (format!("hello\r\n\r\n{smuggled}"), "400"),
    ] {
        let mut stream = connect(page);
        // It may have closed in the middle.
        let _ = stream.write_all(request.as_bytes());
        let _ = stream.shutdown(Shutdown::Write);
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        let answer = String::from_utf8_lossy(&answer);
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{request:.200}: {answer}");
        assert_eq!(answer.matches("HTTP/1.1 ").count(), 1, "{request:.200}: {answer}");
        assert!(answer.contains("\r\nConnection: close\r\n"));
        assert_eq!(answer.contains("\r\nAllow: "), status == "405");
    }
    // TLS gets no answer.
    let mut stream = connect(page);
    stream
        .write_all(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\n")
        .expect("sent");
    await_end(&mut stream);
    // Content that looks like a request is content.
    let origin = format!("Origin: http://{page}\r\nAuthorization: Bearer {TOKEN}\r\n");
    let request = format!(
        "POST /kill HTTP/1.1\r\n{host}{origin}Content-Length: {}\r\n\r\n{smuggled}",
        smuggled.len()
    );
    let mut stream = connect(page);
    stream.write_all(request.as_bytes()).expect("sent");
    stream.shutdown(Shutdown::Write).expect("finish");
    let answer = String::from_utf8(read_to_end(&mut stream)).expect("text");
    assert!(answer.starts_with("HTTP/1.1 400 ") && answer.matches("HTTP/1.1 ").count() == 1);
    assert_eq!(get(page, "/healthz").status, "200 OK");
    let (stats, ()) = server.finish();
    assert_eq!(
        (stats.closed(CloseReason::UnexpectedTls), stats.panics),
        (1, 0)
    );
}

/// A request that drips, and a connection without one, end by their timeouts. In virtual time.
#[test]
fn slow_requests_and_silence_end() {
    use std::time::Duration;
    let mut sim = Sim::new(7, Config::new(), ());
    let observer = Observer::new();
    let listen = observer.listen("127.0.0.1:0").expect("loopback");
    let page = sim.listen_with(listen, observer).expect("listen");
    let slow = sim
        .connect_from(page, [127, 0, 0, 1].into())
        .expect("a listener");
    let silent = sim
        .connect_from(page, [127, 0, 0, 1].into())
        .expect("a listener");
    let idle = sim
        .connect_from(page, [127, 0, 0, 1].into())
        .expect("a listener");
    sim.send(slow, b"GET / HTTP/1.1\r\nHost: localhost\r\n");
    sim.send(idle, b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n");
    for _ in 0..10 {
        sim.advance(Duration::from_secs(1));
        sim.send(slow, b"X: y\r\n");
    }
    sim.advance(Duration::from_secs(1));
    assert_eq!(sim.state(slow), ClientState::Finished);
    assert_eq!(sim.state(idle), ClientState::Connected);
    sim.advance(Duration::from_secs(60));
    assert_eq!(sim.state(silent), ClientState::Reset);
    assert_eq!(sim.state(idle), ClientState::Finished);
    sim.advance(Duration::from_secs(10));
    let stats = sim.stats();
    let ends = [
        CloseReason::FrameTimeout,
        CloseReason::IdleTimeout,
        CloseReason::Aborted,
    ];
    assert_eq!(ends.map(|reason| stats.closed(reason)), [1, 1, 1]);
    assert_eq!(sim.stats().panics, 0);
}

#[test]
fn other_hosts_and_short_tokens_need_a_decision() {
    let refused = |observer: Observer, addr: &str| match observer.listen(addr) {
        Err(Error::Option { option, .. }) => option,
        other => panic!("{other:?}"),
    };
    for addr in ["0.0.0.0:0", "[::]:0", "10.1.2.3:9222"] {
        assert_eq!(refused(Observer::new(), addr), "observer");
        assert!(Observer::new().allow_remote().listen(addr).is_ok());
    }
    for addr in [
        "127.0.0.1:0",
        "127.1.2.3:0",
        "[::1]:0",
        "[::ffff:127.0.0.1]:0",
    ] {
        assert!(Observer::new().listen(addr).is_ok(), "{addr}");
    }
    for token in ["short", "0123456789abcde ", "0123456789abcdef\r\n"] {
        let observer = Observer::new().allow_kill(token);
        assert_eq!(refused(observer, "127.0.0.1:0"), "allow_kill");
    }
    for host in ["stats.example:9222", "", "stats example"] {
        let observer = Observer::new().allow_host(host);
        assert_eq!(refused(observer, "127.0.0.1:0"), "allow_host");
    }
    for host in ["stats.example", "[2001:db8::1]"] {
        let observer = Observer::new().allow_host(host);
        assert!(observer.listen("127.0.0.1:0").is_ok(), "{host}");
    }
    assert!(matches!(
        Observer::new().listen("nonsense"),
        Err(Error::Address { .. })
    ));
    let shown = format!("{:?}", Observer::new().allow_kill(TOKEN));
    assert!(!shown.contains(TOKEN), "{shown}");
}

/// Its slots are its own.
#[test]
fn it_answers_while_the_server_is_full() {
    let mut sim = Sim::new(7, Config::max_connections(10), ());
    let echo = sim.listen(local(), |_: &mut (), _| Echo).expect("listen");
    let observer = Observer::new();
    let listen = observer.listen("127.0.0.1:0").expect("loopback");
    let page = sim.listen_with(listen, observer).expect("listen");
    for _ in 0..20 {
        let client = sim.connect(echo).expect("the backlog has room");
        sim.send(client, b"\0\0");
    }
    sim.settle();
    assert_eq!(sim.stats().open, 6);
    for _ in 0..4 {
        let client = sim.connect_from(page, [127, 0, 0, 1].into());
        let client = client.expect("a listener");
        sim.send(client, b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n");
        sim.settle();
        assert!(sim.received(client).starts_with(b"HTTP/1.1 200 OK\r\n"));
    }
    assert_eq!(sim.stats().open, 10);
}

/// A listener that was made by other means does not open it to other hosts.
#[test]
fn peers_of_other_hosts_are_refused() {
    let mut sim = Sim::new(7, Config::new(), ());
    let options = Observer::new().allow_remote().listen("127.0.0.1:0");
    let page = sim
        .listen_with(options.expect("good"), Observer::new())
        .expect("listen");
    let other = [10, 1, 2, 3].into();
    sim.connect_from(page, other).expect("a listener");
    sim.settle();
    assert_eq!(sim.stats().closed(CloseReason::Refused), 1);
}

/// An answer is for what the observer's own framing refuses, or what is too large.
#[test]
fn a_framer_of_ones_own_refuses_without_an_answer() {
    struct Refuses;
    impl Framer for Refuses {
        fn decode(&mut self, _: &[u8]) -> Result<Decoded, FrameError> {
            Err(FrameError::new("nothing is good"))
        }
    }
    let mut sim = Sim::new(7, Config::new(), ());
    let observer = Observer::new();
    let listen = observer.listen("127.0.0.1:0").expect("loopback");
    let listen = listen.with(|listen| listen.framing = Framing::custom(|| Refuses));
    let page = sim.listen_with(listen, observer).expect("listen");
    let client = sim.connect_from(page, [127, 0, 0, 1].into());
    let client = client.expect("a listener");
    sim.send(client, b"GET / HTTP/1.1\r\n\r\n");
    sim.settle();
    assert_eq!(sim.received(client), b"");
    assert_eq!(sim.state(client), ClientState::Finished);
    sim.finish(client);
    sim.settle();
    assert_eq!(sim.stats().closed(CloseReason::BadFrame), 1);
}

/// Its options were changed although its framing should not be.
#[test]
fn a_listener_with_another_framing_refuses_what_it_cannot_read() {
    let mut sim = Sim::new(7, Config::new(), ());
    let observer = Observer::new();
    let listen = observer.listen("127.0.0.1:0").expect("loopback");
    let listen = listen.with(|listen| {
        listen.framing = Framing::Line;
        listen.conn.max_frame = Some(100);
    });
    let page = sim.listen_with(listen, observer).expect("listen");
    for (sent, status) in [
        ("GET / HTTP/1.1\r\n".to_owned(), "400 Bad Request"),
        ("a".repeat(200), "431 Request Header Fields Too Large"),
    ] {
        let client = sim.connect_from(page, [127, 0, 0, 1].into());
        let client = client.expect("a listener");
        sim.send(client, sent.as_bytes());
        sim.settle();
        let answer = String::from_utf8(sim.received(client)).expect("ASCII");
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status}\r\n")),
            "{answer}"
        );
        assert!(answer.contains("\r\nConnection: close\r\n"), "{answer}");
        assert_eq!(sim.state(client), ClientState::Finished);
    }
}
