//! The WebSocket example, with a client of another library, on raw sockets, and in a browser.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, Command, Stdio};

use kit::net::{connect, example, have, read_to_end, ChildProcess, ReadSome, Uninterrupted};
use tungstenite::protocol::frame::coding::{CloseCode, Data, OpCode};
use tungstenite::protocol::frame::{CloseFrame, Frame};
use tungstenite::{Error, Message, WebSocket};

type Client = WebSocket<Uninterrupted<TcpStream>>;

fn start(options: &[&str]) -> (ChildProcess, SocketAddr) {
    let mut command = Command::new(example("websocket"));
    command.args(["--listen", "127.0.0.1:0"]).args(options);
    let child = ChildProcess::start(&mut command);
    let addr = child.address();
    (child, addr)
}

/// Ends the server in order. No handler has panicked.
fn terminate(server: ChildProcess) {
    server.signal("TERM");
    let (status, _, log) = server.finish();
    assert!(status.success() && !log.contains("panicked"), "{log}");
}

fn enter(addr: SocketAddr, path: &str) -> Client {
    let url = format!("ws://{addr}{path}");
    let (client, response) =
        tungstenite::client(url, Uninterrupted(connect(addr))).expect("a handshake");
    assert_eq!(response.status(), 101);
    client
}

fn text(words: &str) -> Message {
    Message::text(words)
}

/// The code with which the server closes, after what was said in frames of the test's own.
#[track_caller]
fn refused(client: &mut Client) -> u16 {
    loop {
        match client.read() {
            Ok(Message::Close(Some(close))) => return close.code.into(),
            Ok(Message::Ping(_)) => {}
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn messages_of_every_size_come_back() {
    let (server, addr) = start(&[]);
    let mut client = enter(addr, "/");
    for length in [0, 1, 5, 125, 126, 127, 511, 512, 513, 4096, 65_535, 65_536] {
        let bytes: Vec<u8> = (0..length).map(|at| (at * 7 % 251) as u8).collect();
        client.send(Message::binary(bytes.clone())).expect("sent");
        assert_eq!(client.read().expect("an echo").into_data(), bytes);
    }
    client.send(text("grüße")).expect("sent");
    assert_eq!(client.read().expect("an echo"), text("grüße"));
    // Many at once: each is a frame of its own.
    for number in 0..1000 {
        client.write(text(&number.to_string())).expect("buffered");
    }
    client.flush().expect("sent");
    for number in 0..1000 {
        assert_eq!(client.read().expect("an echo"), text(&number.to_string()));
    }
    client.close(None).expect("sent");
    assert!(matches!(client.read(), Ok(Message::Close(None))));
    assert!(matches!(client.read(), Err(Error::ConnectionClosed)));
    terminate(server);
}

#[test]
fn fragments_pings_and_closes() {
    let (server, addr) = start(&[]);
    let mut client = enter(addr, "/");
    let part = |words: &str, data, fin| {
        Message::Frame(Frame::message(
            words.as_bytes().to_vec(),
            OpCode::Data(data),
            fin,
        ))
    };
    client.send(part("one ", Data::Text, false)).expect("sent");
    // A ping between two fragments.
    client.send(Message::Ping("ping".into())).expect("sent");
    client
        .send(part("two ", Data::Continue, false))
        .expect("sent");
    client
        .send(part("three", Data::Continue, true))
        .expect("sent");
    assert_eq!(client.read().expect("a pong"), Message::Pong("ping".into()));
    assert_eq!(client.read().expect("an echo"), text("one two three"));
    let close = CloseFrame {
        code: CloseCode::Library(3001),
        reason: "enough".into(),
    };
    client.close(Some(close)).expect("sent");
    match client.read() {
        Ok(Message::Close(Some(close))) => assert_eq!(u16::from(close.code), 3001),
        other => panic!("{other:?}"),
    }
    terminate(server);
}

/// What breaks the protocol is answered with the code of the rule, before the close.
#[test]
fn last_words_name_the_rule() {
    let (server, addr) = start(&["--max-message", "1000"]);
    let long = [&b"\x82\xFE\x03\xE9mask"[..], &[0; 1001]].concat();
    let cases: [(&[u8], u16); 14] = [
        (b"\x81\x01x", 1002),                      // not masked
        (b"\xC1\x80mask", 1002),                   // a reserved bit
        (b"\x83\x80mask", 1002),                   // a reserved opcode
        (b"\x09\x80mask", 1002),                   // a ping in fragments
        (b"\x89\xFE\x00\x7Emask", 1002),           // a long ping
        (b"\x80\x80mask", 1002),                   // nothing to continue
        (b"\x01\x80mask\x81\x80mask", 1002),       // a message within a message
        (b"\x82\xFE\x00\x05mask", 1002),           // a length in a long form
        (b"\x82\xFF\0\0\0\0\0\0\0\x05mask", 1002), // and in the longest
        (b"\x81\x82\0\0\0\0\xC3\x28", 1007),       // not UTF-8
        (b"\x88\x81\0\0\0\0\x03", 1002),           // half a code
        (b"\x88\x82\0\0\0\0\x03\xED", 1002),       // 1005 is never sent
        (b"\x82\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFFmask", 1009),
        (&long, 1009),
    ];
    for (wire, code) in cases {
        // In one piece, behind a message, and byte for byte.
        for (before, piece) in [("", wire.len()), ("hello", wire.len()), ("", 1)] {
            let mut client = enter(addr, "/");
            if !before.is_empty() {
                client.write(text(before)).expect("buffered");
                client.flush().expect("sent");
            }
            for bytes in wire.chunks(piece) {
                // It may have closed in the middle.
                let _ = client.get_mut().write_all(bytes);
            }
            if !before.is_empty() {
                assert_eq!(client.read().expect("the echo comes first"), text(before));
            }
            assert_eq!(refused(&mut client), code, "{wire:x?} in pieces of {piece}");
        }
    }
    // A message that is too long only as a whole.
    let mut client = enter(addr, "/");
    let part = Frame::message(vec![0; 400], OpCode::Data(Data::Binary), false);
    client.send(Message::Frame(part)).expect("sent");
    for _ in 0..2 {
        let part = Frame::message(vec![0; 400], OpCode::Data(Data::Continue), false);
        client.send(Message::Frame(part)).expect("sent");
    }
    assert_eq!(refused(&mut client), 1009);
    terminate(server);
}

/// Whatever the client does then.
#[test]
fn nothing_follows_a_close_frame() {
    let wrong: [&[u8]; 3] = [
        b"\x81\x01x",                // not masked
        b"\x88\x82\0\0\0\0\x03\xED", // a code that is never sent
        b"\x88\x81\0\0\0\0\x03",     // half a code
    ];
    for bytes in wrong {
        let (server, addr) = start(&[]);
        let mut client = enter(addr, "/chat");
        let stream = client.get_mut();
        server.signal("TERM");
        let mut close = [0; 4];
        stream.read_exact(&mut close).expect("a close frame");
        assert_eq!(close, [0x88, 2, 0x03, 0xE9], "1001, going away");
        stream.write_all(bytes).expect("sent");
        assert_eq!(read_to_end(stream), b"");
        let (status, _, log) = server.finish();
        assert!(status.success() && !log.contains("panicked"), "{log}");
    }
}

#[test]
fn the_room_hears_everything_in_order() {
    let (server, addr) = start(&[]);
    let mut clients: Vec<Client> = (0..5).map(|_| enter(addr, "/chat")).collect();
    let mut outside = enter(addr, "/");
    for number in 0..50_usize {
        let words = text(&format!("message {number}"));
        clients[number % 5].send(words.clone()).expect("sent");
        for client in &mut clients {
            assert_eq!(client.read().expect("the message"), words);
        }
    }
    outside.send(text("alone")).expect("sent");
    assert_eq!(
        outside.read().expect("the echo, first of all"),
        text("alone")
    );
    clients.pop().expect("one").close(None).expect("sent");
    clients[0].send(text("after")).expect("sent");
    assert_eq!(clients[1].read().expect("the message"), text("after"));
    server.signal("TERM");
    // 1001: going away. tungstenite answers, and the server closes.
    assert_eq!(refused(&mut clients[1]), 1001);
    for mut client in clients.into_iter().chain([outside]) {
        while client.read().is_ok() {}
    }
    let (status, _, log) = server.finish();
    assert!(status.success() && !log.contains("panicked"), "{log}");
}

#[test]
fn requests_that_are_no_handshake() {
    let (server, addr) = start(&[]);
    let good =
        "GET / HTTP/1.1\r\nHost: x\r\nUpgrade: WebSocket\r\nConnection: keep-alive, Upgrade\r\n\
                Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";
    let ask = |request: &str| {
        let mut client = connect(addr);
        client.write_all(request.as_bytes()).expect("sent");
        String::from_utf8(read_to_end(&mut client)).expect("text")
    };
    let long = format!("GET / HTTP/1.1\r\nX: {}", "x".repeat(9000));
    for (request, status) in [
        ("GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_owned(), "200 OK"),
        (good.replace("GET", "POST"), "400 Bad Request"),
        (good.replace("GET /", "GET /x"), "404 Not Found"),
        (good.replace("1.1", "1.0"), "400 Bad Request"),
        (good.replace("Host", "Most"), "400 Bad Request"),
        (good.replace(": 13", ": 12"), "426 Upgrade Required"),
        (good.replace("b25jZQ", "b25j"), "400 Bad Request"),
        ("no request\r\n\r\n".to_owned(), "400 Bad Request"),
        (long, "431 Request Header Fields Too Large"),
    ] {
        let answer = ask(&request);
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status}\r\n")),
            "{request:?}: {answer}"
        );
    }
    // The key and the answer of RFC 6455 section 1.3. A frame stands right behind the request.
    let mut client = connect(addr);
    let request = [good.as_bytes(), b"\x81\x82\0\0\0\0hi"].concat();
    client.write_all(&request).expect("sent");
    let mut answer = Vec::new();
    while !answer.ends_with(b"\x81\x02hi") {
        let mut piece = [0; 1024];
        let length = client.read_some(&mut piece).expect("an answer");
        assert!(length > 0, "{answer:?}");
        answer.extend_from_slice(&piece[..length]);
    }
    let answer = String::from_utf8_lossy(&answer);
    assert!(
        answer.contains("Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n"),
        "{answer}"
    );
    drop(client);
    terminate(server);
}

/// A browser opens the page, enters the room and says what stands behind the `#`. It answers the
/// server's ping and its close.
#[test]
fn a_browser_is_served() {
    if !have("chromium", "--version") {
        return;
    }
    let (server, addr) = start(&[]);
    let mut member = enter(addr, "/chat");
    let profile = std::env::temp_dir().join(format!("portcullis-chromium-{}", std::process::id()));
    let mut browser = Command::new("chromium");
    browser
        // Without a sandbox it runs as root too, in a container.
        .args([
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
        ])
        .arg("--remote-debugging-port=0")
        .arg(format!("--user-data-dir={}", profile.display()))
        .arg(format!("http://{addr}/#hello%20from%20a%20browser"))
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let browser = Killed(browser.spawn().expect("it starts"));
    assert_eq!(
        member.read().expect("the browser"),
        text("hello from a browser")
    );
    member.close(None).expect("sent");
    while member.read().is_ok() {}
    // It drains: the browser answers the close frame.
    server.signal("TERM");
    let (status, _, log) = server.finish();
    assert!(status.success() && !log.contains("panicked"), "{log}");
    assert!(log.contains("0 were forced"), "the browser answers: {log}");
    drop(browser);
    let _ = std::fs::remove_dir_all(profile);
}

/// Ends with the test, however that ends.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
