//! What connections have held comes back to the system, seen from outside: the private memory of the echo example's process.
#![cfg(target_os = "linux")]

use std::fs;
use std::io::{Read, Write};
#[cfg(feature = "tls")]
use std::net::SocketAddr;

use kit::net::{connect, eventually, packet2, ping, ChildProcess};
#[cfg(feature = "tls")]
use kit::tls::{secure, Folder, Site};
#[cfg(feature = "tls")]
use portcullis::tls::rustls::version::TLS13;

const MIB: usize = 1024 * 1024;
const AT_ONCE: usize = 250;

/// What is the process's alone, in bytes (`proc_pid_smaps(5)`).
fn private(process: u32) -> usize {
    let smaps = fs::read_to_string(format!("/proc/{process}/smaps_rollup")).expect("it runs");
    let of = |name: &str| -> usize {
        let line = smaps
            .lines()
            .find(|line| line.starts_with(name))
            .expect("Linux says it");
        let kib = line.split_whitespace().nth(1).expect("a number");
        kib.parse::<usize>().expect("a number") * 1024
    };
    // Without the program's own pages: they are private or not as other tests come and go, and
    // dirty until the system has written what the linker made.
    of("Anonymous:")
}

/// Ten thousand of them, with small messages and some large ones.
#[test]
fn after_ten_thousand_connections_it_is_as_before() {
    let (server, addr) = ChildProcess::echo(&["--max-connections", "1000"]);
    let large = packet2(&[b'x'; 60_000]);
    let wave = |large_ones: usize| {
        let mut clients: Vec<_> = (0..AT_ONCE).map(|_| connect(addr)).collect();
        for client in &mut clients {
            ping(client, &[b'x'; 64]);
        }
        for client in &mut clients[..large_ones] {
            client.write_all(&large).expect("sent");
        }
        let mut answer = vec![0; large.len()];
        for client in &mut clients[..large_ones] {
            client.read_exact(&mut answer).expect("the echo");
        }
        assert!(answer == large || large_ones == 0);
    };
    wave(0);
    let before = private(server.process());
    for _ in 0..40 {
        wave(50);
    }
    // A last round trip: earlier connections are gone.
    ping(&mut connect(addr), b"done");
    let after = private(server.process());
    assert!(
        after < before + 8 * MIB,
        "{} MiB, {} MiB before",
        after / MIB,
        before / MIB
    );
}

/// An allocator returns the end of its heap alone, so nothing that stays may lie behind the frames.
/// The server is as before while some clients have sent a part of a frame.
fn all_hold_a_large_frame<C: Read + Write>(server: &ChildProcess, client: impl Fn() -> C) {
    const SLOW: usize = 5;
    let large = packet2(&[b'x'; 60_000]);
    let (last, most) = large.split_last().expect("not empty");
    let mut clients: Vec<_> = (0..SLOW + AT_ONCE).map(|_| client()).collect();
    for client in &mut clients {
        ping(client, &[b'x'; 64]);
    }
    let (slow, clients) = clients.split_at_mut(SLOW);
    for client in slow {
        client.write_all(&large[..2000]).expect("sent");
    }
    // They have been read as well: they came first.
    ping(&mut clients[0], &[b'x'; 64]);
    let before = private(server.process());
    let mut answer = vec![0; large.len()];
    // The frames are completed in three orders.
    for step in [1, 97, AT_ONCE - 1] {
        for client in &mut *clients {
            client.write_all(most).expect("sent");
        }
        eventually("all frames are incomplete", || {
            private(server.process()) > before + AT_ONCE * most.len()
        });
        for at in 0..AT_ONCE {
            let client = &mut clients[at * step % AT_ONCE];
            client.write_all(&[*last]).expect("sent");
            client.read_exact(&mut answer).expect("the echo");
            assert!(answer == large);
        }
        // The last echo leaves before its iteration ends.
        ping(&mut clients[0], &[b'x'; 64]);
        eventually("it is as before", || {
            private(server.process()) < before + 8 * MIB
        });
    }
}

#[test]
fn after_large_frames_on_all_connections_at_once_it_is_as_before() {
    let (server, addr) = ChildProcess::echo(&["--max-connections", "1000"]);
    all_hold_a_large_frame(&server, || connect(addr));
}

#[cfg(feature = "tls")]
#[test]
fn after_large_frames_on_all_tls_connections_at_once_it_is_as_before() {
    let site = Site::new();
    let (server, addr) = tls_echo(&site);
    let client = site.client(&TLS13);
    all_hold_a_large_frame(&server, || secure(addr, &client));
}

/// The echo example behind TLS. It has read its files.
#[cfg(feature = "tls")]
fn tls_echo(site: &Site) -> (ChildProcess, SocketAddr) {
    let folder = Folder::new();
    let chain = folder.file("chain.pem", &site.identity.chain_pem);
    let key = folder.file("key.pem", &site.identity.key_pem);
    let files = [chain.to_str().expect("text"), key.to_str().expect("text")];
    let options = ["--tls-cert", files[0], "--tls-key", files[1]];
    ChildProcess::echo(&[&options[..], &["--max-connections", "1000"]].concat())
}

/// TLS 1.3 with a real client, with its tickets, and with all that C holds of the keys.
#[cfg(feature = "tls")]
#[test]
fn an_idle_connection_behind_tls_costs_4000_bytes() {
    const FEW: usize = 200;
    const MANY: usize = 700;
    /// Two sessions that can be resumed come with each connection, until 1 MiB of them are stored.
    const SESSIONS: usize = 512;
    /// The heap grows by pages, and its last hole may be anywhere.
    const NOISE: usize = 64 * 1024;
    let site = Site::new();
    let (server, addr) = tls_echo(&site);
    let client = site.client(&TLS13);
    let mut clients = Vec::new();
    let mut held = |connections| {
        while clients.len() < connections {
            let mut client = secure(addr, &client);
            ping(&mut client, &[b'x'; 64]);
            clients.push(client);
        }
        private(server.process())
    };
    let few = held(FEW);
    let each = (held(MANY) - few) / (MANY - FEW);
    println!("{each} bytes for each connection");
    assert!(
        (1000..4000 + SESSIONS + NOISE / (MANY - FEW)).contains(&each),
        "{each} bytes for each connection"
    );
}
