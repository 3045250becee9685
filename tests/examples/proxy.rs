//! The proxy example: nothing lost, nothing piled up, and every end carried through.
#![cfg(all(feature = "tls", any(feature = "ring", feature = "aws-lc-rs")))]

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::sync::mpsc;
use std::thread;

use kit::net::{
    connect, example, local, read_to_end, reset, spawn_echo, ChildProcess, ReadSome, PATIENCE,
};
use kit::outgoing::{accepted, closed_addr, std_listener};
use kit::tls::{read_to_goodbye, secure, Folder, Site, NAME};
use portcullis::tls::rustls::version;
use portcullis::{Config, Framing};

const MEGABYTE: usize = 1024 * 1024;
const MUCH: usize = 50 * MEGABYTE;

fn start(to: SocketAddr, more: &[&str]) -> (ChildProcess, SocketAddr) {
    let mut command = Command::new(example("proxy"));
    command
        .args(["--listen", "127.0.0.1:0", "--to", &to.to_string()])
        .args(more);
    let child = ChildProcess::start(&mut command);
    let addr = child.address();
    (child, addr)
}

/// Ends it by SIGTERM; nothing panicked.
#[track_caller]
fn terminate(proxy: ChildProcess) {
    proxy.signal("TERM");
    let (status, _, log) = proxy.finish();
    assert!(status.success() && !log.contains("panicked"), "{log}");
}

/// Bytes without a pattern that a lost or doubled piece could hide in.
struct Stream(u64);

impl Stream {
    fn fill(&mut self, buffer: &mut [u8]) {
        for byte in buffer {
            self.0 = self
                .0
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            *byte = (self.0 >> 56) as u8;
        }
    }
}

#[track_caller]
fn say_much(mut to: impl Write, seed: u64, count: usize) {
    let (mut stream, mut piece) = (Stream(seed), vec![0; 64 * 1024]);
    for _ in 0..count / piece.len() {
        stream.fill(&mut piece);
        to.write_all(&piece).expect("sent");
    }
}

#[track_caller]
fn hear_much(mut from: impl Read, seed: u64, count: usize) {
    let (mut stream, mut piece) = (Stream(seed), vec![0; 64 * 1024]);
    let mut expected = piece.clone();
    for at in 0..count / piece.len() {
        from.read_exact(&mut piece).expect("received");
        stream.fill(&mut expected);
        assert!(piece == expected, "other bytes after {} MB", at / 16);
    }
}

/// Both directions at once, each to its end, through half-close.
#[test]
fn fifty_megabytes_go_each_way_and_each_end_is_carried_through() {
    let (listener, back) = std_listener();
    let (proxy, addr) = start(back, &[]);
    let client = connect(addr);
    let server = accepted(&listener);
    thread::scope(|scope| {
        for (end, said, heard) in [(&client, 1, 2), (&server, 2, 1)] {
            scope.spawn(move || {
                say_much(end, said, MUCH);
                end.shutdown(Shutdown::Write).expect("shutdown");
            });
            scope.spawn(move || {
                let mut from = end;
                hear_much(from, heard, MUCH);
                assert_eq!(read_to_end(&mut from), b"");
            });
        }
    });
    terminate(proxy);
}

/// One direction stands still: the proxy holds little, and the other direction goes on.
#[cfg(target_os = "linux")]
#[test]
fn a_slow_reader_costs_little_and_delays_no_other_client() {
    // Beside what the pair may hold, the spare buffers that a server keeps for all of them.
    const BOUND: usize = (4 + 8) * MEGABYTE;
    let (listener, back) = std_listener();
    let (proxy, addr) = start(back, &[]);
    let client = connect(addr);
    let server = accepted(&listener);
    let before = proxy.peak_memory();
    let (stuck, is_stuck) = mpsc::channel();
    thread::scope(|scope| {
        let to = &client;
        scope.spawn(move || {
            // The server does not read: this stops when all buffers on the way are full.
            say_much(to, 3, 4 * MEGABYTE);
            stuck.send(()).expect("the test waits");
            say_much(to, 4, MUCH);
        });
        // Meanwhile the other direction carries everything.
        scope.spawn(|| say_much(&server, 5, MUCH));
        hear_much(&client, 5, MUCH);
        let grown = proxy.peak_memory().saturating_sub(before);
        assert!(grown < BOUND, "{grown} bytes for one pair");
        hear_much(&server, 3, 4 * MEGABYTE);
        is_stuck.recv_timeout(PATIENCE).expect("it goes on");
        hear_much(&server, 4, MUCH);
    });
    let grown = proxy.peak_memory().saturating_sub(before);
    assert!(grown < BOUND, "{grown} bytes for one pair");
    terminate(proxy);
}

/// Question, end, answer, end: the question's end is not the answer's.
#[test]
fn a_finished_side_still_hears_the_other() {
    let (listener, back) = std_listener();
    let (proxy, addr) = start(back, &[]);
    for client_first in [true, false] {
        let mut client = connect(addr);
        let mut server = accepted(&listener);
        let (one, other) = if client_first {
            (&mut client, &mut server)
        } else {
            (&mut server, &mut client)
        };
        one.write_all(b"question").expect("sent");
        one.shutdown(Shutdown::Write).expect("shutdown");
        assert_eq!(read_to_end(other), b"question");
        other.write_all(b"answer").expect("sent");
        other.shutdown(Shutdown::Write).expect("shutdown");
        assert_eq!(read_to_end(one), b"answer");
    }
    terminate(proxy);
}

/// An end that comes before the connection behind is there is carried through all the same.
#[test]
fn a_client_that_has_said_all_at_once_is_answered() {
    let (listener, back) = std_listener();
    let (proxy, addr) = start(back, &[]);
    let mut client = connect(addr);
    client.write_all(b"all of it").expect("sent");
    client.shutdown(Shutdown::Write).expect("shutdown");
    let mut server = accepted(&listener);
    assert_eq!(read_to_end(&mut server), b"all of it");
    server.write_all(b"thanks").expect("sent");
    drop(server);
    assert_eq!(read_to_end(&mut client), b"thanks");
    terminate(proxy);
}

#[track_caller]
fn is_reset(stream: &mut TcpStream) {
    let error = stream
        .read_to_end(&mut Vec::new())
        .expect_err("no orderly end");
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset, "{error}");
}

#[test]
fn no_server_behind_is_a_reset_for_the_client() {
    let (proxy, addr) = start(closed_addr(), &[]);
    for _ in 0..10 {
        // The reset may be there before `connect` returns.
        match TcpStream::connect_timeout(&addr, PATIENCE) {
            Ok(mut client) => {
                client.set_read_timeout(Some(PATIENCE)).expect("timeout");
                is_reset(&mut client);
            }
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::ConnectionReset, "{error}"),
        }
    }
    terminate(proxy);
}

/// Dead in the middle, on either side: what stands between the other and a false end is a reset.
#[test]
fn a_reset_is_carried_through() {
    let (listener, back) = std_listener();
    let (proxy, addr) = start(back, &[]);
    for client_dies in [true, false] {
        let mut client = connect(addr);
        client.write_all(b"hello").expect("sent");
        let mut server = accepted(&listener);
        server.read_exact(&mut [0; 5]).expect("hello");
        server.write_all(b"the first half of").expect("sent");
        client.read_exact(&mut [0; 17]).expect("half an answer");
        let (dies, mut other) = if client_dies {
            (client, server)
        } else {
            (server, client)
        };
        reset(dies);
        is_reset(&mut other);
    }
    terminate(proxy);
}

/// TLS in front and behind, with the right name and the wrong one.
#[test]
fn tls_ends_at_the_proxy_and_begins_again() {
    let (site, folder) = (Site::new(), Folder::new());
    let chain = folder.file("chain.pem", &site.identity.chain_pem);
    let key = folder.file("key.pem", &site.identity.key_pem);
    let ca = folder.file("ca.pem", site.authority.certificate.pem());
    let backend = spawn_echo(
        Config::new(),
        local().tls(site.server()).with(|listen| {
            listen.framing = Framing::Raw;
            listen.conn.full_duplex = false;
        }),
    );
    let path = |path: &std::path::Path| path.to_str().expect("text").to_owned();
    let (chain, key, ca) = (path(&chain), path(&key), path(&ca));
    let with = |name: &str| {
        let more = [
            "--tls-cert",
            &chain,
            "--tls-key",
            &key,
            "--ca",
            &ca,
            "--tls-to",
            name,
        ];
        start(backend.addr(), &more)
    };
    let (proxy, addr) = with(NAME);
    let mut client = secure(addr, &site.client(&version::TLS13));
    let mut stream = Stream(9);
    let mut piece = vec![0; 256 * 1024];
    for _ in 0..8 {
        stream.fill(&mut piece);
        client.write_all(&piece).expect("sent");
        let mut back = vec![0; piece.len()];
        client.read_exact(&mut back).expect("received");
        assert!(back == piece);
    }
    // close_notify goes through to the echo, and its own comes back.
    kit::tls::notify(&mut client);
    assert_eq!(read_to_goodbye(&mut client), b"");
    terminate(proxy);
    let (proxy, addr) = with("other.test");
    let mut client = secure(addr, &site.client(&version::TLS13));
    let error = client
        .read_some(&mut [0])
        .expect_err("the server behind is somebody else");
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset, "{error}");
    terminate(proxy);
}

/// Two hundred pairs, each with its own bytes.
#[test]
fn two_hundred_at_once_get_their_own() {
    const CLIENTS: u64 = 200;
    let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
    let back = listener.local_addr().expect("bound");
    let (proxy, addr) = start(back, &[]);
    let served = thread::spawn(move || {
        for _ in 0..CLIENTS {
            let mut server = accepted(&listener);
            thread::spawn(move || {
                let mut bytes = Vec::new();
                server.read_to_end(&mut bytes).expect("an orderly end");
                server.write_all(&bytes).expect("sent");
            });
        }
    });
    let clients: Vec<_> = (0..CLIENTS)
        .map(|seed| {
            let client = connect(addr);
            say_much(&client, seed, 64 * 1024);
            client
        })
        .collect();
    for client in &clients {
        client.shutdown(Shutdown::Write).expect("shutdown");
    }
    for (seed, client) in clients.iter().enumerate() {
        let mut from = client;
        hear_much(from, seed as u64, 64 * 1024);
        assert_eq!(read_to_end(&mut from), b"");
    }
    served.join().expect("all came");
    terminate(proxy);
}
