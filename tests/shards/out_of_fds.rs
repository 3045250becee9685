//! Descriptors run out for the whole process at once: every shard lives, idles, and takes clients in again when there is room.
#![cfg(target_os = "linux")] // it looks into /proc

use std::io::{ErrorKind, Read};
use std::net::TcpStream;
use std::process::Command;

use kit::net::{connect, eventually, example, ping, recv2, send2, ChildProcess};

/// The frame that waits, if one does.
fn is_answered(client: &TcpStream) -> bool {
    client.set_nonblocking(true).expect("non-blocking");
    let answer = client.peek(&mut [0; 4]);
    client.set_nonblocking(false).expect("blocking");
    match answer {
        Ok(count) => count > 0,
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::WouldBlock);
            false
        }
    }
}

#[test]
fn every_shard_comes_back_when_descriptors_do() {
    let mut command = Command::new("sh");
    command.args(["-c", "ulimit -n 64; exec \"$@\"", "sh"]);
    let server = ChildProcess::start(command.arg(example("shards")).args(["127.0.0.1:0", "3"]));
    let addr = server.address();
    for _ in 0..3 {
        // More than there is room for: the rest waits in the backlog.
        let mut clients: Vec<_> = (0..100).map(|_| connect(addr)).collect();
        for client in &mut clients {
            send2(client, b"hello");
        }
        let served =
            |clients: &[TcpStream]| clients.iter().filter(|client| is_answered(client)).count();
        eventually("as many as fit are served", || served(&clients) >= 30);
        assert!(served(&clients) < 64);
        let before = server.cpu_seconds();
        // The time itself is the condition here.
        Command::new("sleep").arg("2").status().expect("sleep");
        let share = (server.cpu_seconds() - before) / 2.0;
        assert!(share < 0.1, "out of descriptors it takes {share} of a core");
        // Open connections end, one after the other, and each frees a slot for a waiting client.
        while !clients.is_empty() {
            let mut inside = None;
            eventually("somebody is served", || {
                inside = clients.iter().position(is_answered);
                inside.is_some()
            });
            let mut client = clients.swap_remove(inside.expect("found"));
            assert_eq!(recv2(&mut client), b"hello");
        }
    }
    // All of them take clients again.
    let mut clients: Vec<_> = (0..30).map(|_| connect(addr)).collect();
    for client in &mut clients {
        ping(client, b"again");
    }
    server.signal("TERM");
    for client in &mut clients {
        let mut rest = Vec::new();
        client.read_to_end(&mut rest).expect("in order");
    }
    let (status, words, log) = server.finish();
    assert!(status.success() && !log.contains("panicked"), "{log}");
    assert!(words.contains("all: 330 connections"), "{words}");
    assert!(
        log.matches("no new connections for now").count() <= 9,
        "once for each shard and episode: {log}"
    );
}
