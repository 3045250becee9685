//! Real servers with clients of every kind: what the kernel did replays, to the counters.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::thread;
use std::time::Duration;

use kit::net::{connect, reset, spawn, Place, ReadSome};
use portcullis::sim::{Random, Tape};
use portcullis::{CloseReason, Config, Payloads, Recording, Server};

use crate::{listen, outcome, replay, Journal, Talker};

fn client(addr: std::net::SocketAddr, seed: u64) {
    let mut random = Random::new(seed);
    let mut stream = connect(addr);
    for _ in 0..random.between(0, 6) {
        // The server may have ended the connection.
        let _ = match random.below(5) {
            0 => stream.write_all(b"in two pie"),
            1 => stream.write_all(b"ces\none\ntwo\n"),
            // More than the kernel takes while nothing is read.
            2 => stream.write_all(&b"much\n".repeat(5)),
            3 => stream
                .write_all(b"answer\n")
                .and_then(|()| stream.read_some(&mut [0; 5000]).map(drop)),
            _ => stream.write_all(b"hello\n"),
        };
    }
    match random.below(4) {
        0 => reset(stream),
        1 => drop(stream),
        2 => {
            let _ = stream.write_all(b"\nbye\n");
            let _ = stream.read_to_end(&mut Vec::new());
        }
        _ => {
            let _ = stream.shutdown(Shutdown::Write);
            let _ = stream.read_to_end(&mut Vec::new());
        }
    }
}

#[test]
fn whatever_clients_do_replays() {
    let place = Place::new();
    let config = || {
        Config::max_connections(6).with(|config| {
            config.memory_limit = Some(8 << 20);
        })
    };
    let listen = || {
        listen().with(|listen| {
            listen.socket.send_buffer = Some(8 * 1024);
            listen.conn.write_timeout = Duration::from_millis(800);
            listen.conn.linger_timeout = Duration::from_millis(300);
        })
    };
    let recording = Recording::new(place.path("server.rec")).with(|recording| {
        recording.payloads = Payloads::Kept;
        recording.max_bytes = 1 << 30;
    });
    let running = spawn(move || {
        let mut server = Server::recorded(config(), recording).expect("a recording");
        server
            .listen(listen(), |_: &mut Journal, _| Talker::default())
            .expect("a port");
        (server, Journal::new())
    });
    let addr = running.addr();
    thread::scope(|scope| {
        for thread in 0..8 {
            scope.spawn(move || (0..10).for_each(|number| client(addr, thread * 100 + number)));
        }
    });
    running
        .handle
        .drain(Duration::from_secs(1))
        .expect("queued");
    running.until("all have ended", |stats| stats.open == 0);
    let (stats, journal) = running.finish();
    assert!(stats.closed(CloseReason::Reset) > 0, "{stats:?}");

    let tape = Tape::read(place.path("server.rec")).expect("a recording");
    assert!(
        tape.lines().any(|line| line.contains("were taken")),
        "short writes"
    );
    assert_eq!(replay(tape, config(), listen()), outcome(&stats, &journal));
}
