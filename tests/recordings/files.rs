//! The file: private, of fixed size, never in the server's way.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::PermissionsExt as _;
use std::time::Duration;

use kit::net::{connect, eventually, spawn, Echo, Place};
use portcullis::sim::{Ending, Replay, Sim, Tape};
use portcullis::{Config, Error, Framing, Listen, Payloads, Recording, Server};

use crate::{config, listen, recorded_world, Journal, Talker};

#[test]
fn the_file_is_private_and_overwrites_nothing() {
    let place = Place::new();
    let path = place.path("server.rec");
    let make = || Server::<()>::recorded(Config::new(), Recording::new(&path));
    let server = make().expect("a new file");
    let mode = fs::metadata(&path)
        .expect("it is there")
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
    drop(server);
    let error = make().map(drop).expect_err("the file exists");
    let Error::Recording {
        path: named,
        source,
    } = &error
    else {
        panic!("{error}");
    };
    assert_eq!((named, source.kind()), (&path, ErrorKind::AlreadyExists));
    assert!(error.to_string().contains("overwrites no file"), "{error}");

    let nowhere = Recording::new(place.path("none").join("server.rec"));
    let error = Server::<()>::recorded(Config::new(), nowhere).map(drop);
    assert!(matches!(
        error,
        Err(Error::Recording { source, .. }) if source.kind() == ErrorKind::NotFound
    ));
    // Nothing is created for a server that is not made.
    let other = place.path("other");
    let tiny = Recording::new(&other).with(|recording| recording.max_bytes = 1000);
    let error = Server::<()>::recorded(Config::new(), tiny).map(drop);
    assert!(matches!(
        error,
        Err(Error::Option {
            option: "max_bytes",
            ..
        })
    ));
    let zero = Config::new().with(|config| config.budgets.work = 0);
    let error = Server::<()>::recorded(zero, Recording::new(&other)).map(drop);
    assert!(matches!(error, Err(Error::Option { .. })));
    assert!(!other.exists());

    for (file, is) in [
        ("/dev/null", "too short"),
        ("/proc/self/status", "too short"),
    ] {
        let error = Tape::read(file).map(drop).expect_err("no recording");
        assert!(error.to_string().contains(is), "{error}");
    }
    let text = place.path("text");
    fs::write(&text, "x".repeat(500)).expect("written");
    let error = Tape::read(&text).map(drop).expect_err("no recording");
    assert!(error.to_string().contains("not a recording"), "{error}");
    assert!(error.to_string().contains("text"), "{error}");
}

/// The oldest part is overwritten: no exact replay, but a script of the connections that began since.
#[test]
fn a_full_file_keeps_the_newest_part() {
    let place = Place::new();
    let path = place.path("ring");
    let max = 300_000;
    let recording = Recording::new(&path).with(|recording| {
        recording.payloads = Payloads::Kept;
        recording.max_bytes = max;
    });
    let (mut sim, addr) = recorded_world(recording);
    // One connection from the beginning on, and one for each round.
    let first = sim.connect(addr).expect("room");
    let mut sent = Vec::new();
    for round in 0..2000 {
        let client = sim.connect(addr).expect("room");
        let line = format!("round {round}, {}\n", "x".repeat(100 + round % 700));
        sim.send(client, line.as_bytes());
        sim.send(first, line.as_bytes());
        sim.settle();
        sim.reset(client);
        sim.settle();
        sent.push(line);
    }
    drop(sim);
    let length = fs::metadata(&path).expect("it is there").len();
    assert!(length <= max && length > max - 70_000, "{length}");
    let mut tape = Tape::read(&path).expect("a recording");
    assert_eq!((tape.is_whole(), tape.ending()), (false, Ending::Complete));
    // The first one, and perhaps one in whose middle the kept part begins.
    assert!((1..=2).contains(&tape.skipped()), "{tape:?}");
    let kept = usize::try_from(tape.connections()).expect("small");
    assert!((50..1000).contains(&kept), "{tape:?}");
    let script = tape.script(|_, _| true).expect("payloads are kept");
    let mut again = Sim::new(1, config(), Journal::new());
    let addr = again
        .listen(listen(), |_, _| Talker::default())
        .expect("a port");
    again.play(addr, &script);
    let last = sent.split_off(sent.len() - kept);
    let lines: Vec<String> = again
        .app()
        .iter()
        .filter_map(|line| {
            line.split_once(" line ")
                .map(|(_, line)| line.replace("\\n", "\n"))
        })
        .collect();
    assert_eq!(lines, last);
    let refused = Replay::new(tape, config(), Journal::new()).map(drop);
    let error = refused.expect_err("the oldest part is missing");
    assert!(error.to_string().contains("overwritten"), "{error}");
}

/// Records that go on over many blocks, in files of every small size.
#[test]
fn large_payloads_wrap_around() {
    let place = Place::new();
    for blocks in 4..12 {
        let path = place.path(&blocks.to_string());
        let recording = Recording::new(&path).with(|recording| {
            recording.payloads = Payloads::Kept;
            recording.max_bytes = 64 + blocks * 65_536;
        });
        let (mut sim, addr) = recorded_world(recording);
        for _ in 0..5 {
            let client = sim.connect(addr).expect("room");
            sim.set_send_buffer(client, 60_000);
            sim.send(client, b"much\nbye\n");
            sim.advance(Duration::from_secs(1));
            sim.finish(client);
            sim.advance(Duration::from_secs(1));
        }
        drop(sim);
        let mut tape = Tape::read(&path).expect("a recording");
        assert_eq!(tape.ending(), Ending::Complete, "{blocks} blocks");
        assert!(!tape.is_whole() || tape.connections() == 5);
        assert!(tape.connections() > 0 && tape.script(|_, _| true).is_ok());
        assert!(tape
            .lines()
            .last()
            .expect("a line")
            .contains("end of the recording"));
    }
}

/// The last records are in the file although the server sleeps: a process that is killed has lost little.
#[test]
fn a_sleeping_server_has_written_its_file() {
    let place = Place::new();
    let path = place.path("asleep");
    let recording = Recording::new(&path).with(|recording| recording.payloads = Payloads::Kept);
    let running = spawn(move || {
        let mut server = Server::recorded(Config::new(), recording).expect("a recording");
        let listen = Listen::tcp("127.0.0.1:0", Framing::Line);
        server.listen(listen, |_: &mut (), _| Echo).expect("a port");
        (server, ())
    });
    let mut client = connect(running.addr());
    client.write_all(b"hello\n").expect("sent");
    client.read_exact(&mut [0; 6]).expect("the echo");
    eventually("the file has the line", || {
        let tape = Tape::read(&path).expect("a recording");
        let has_line = tape.lines().any(|line| line.contains("b\"hello\\n\""));
        has_line && tape.ending() == Ending::Unfinished
    });
    drop(client);
    running.finish();
    assert_eq!(
        Tape::read(&path).expect("a recording").ending(),
        Ending::Complete
    );
}
