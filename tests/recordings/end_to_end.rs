//! From a server under load to a test of a few lines: recorded, replayed, reduced, printed.

use std::io::{Read, Write};
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::process::Command;
use std::thread;

use kit::net::{connect, spawn, Place};
use kit::recorded::{listen, play, try_play, Mean};
use portcullis::sim::{Ending, Random, Replay, Tape};
use portcullis::{CloseReason, Config, Payloads, Recording, Server};

/// The test that is printed at the end, compiled.
mod printed {
    use super::play;

    include!("printed.rs");

    pub(super) fn run() {
        it_means_nothing();
    }
}

const PRINTED: &str = include_str!("printed.rs");

/// What one client sends. Only number 77 calls `mean` right after a `clear`.
fn session(number: u64) -> Vec<Vec<u8>> {
    let mut random = Random::new(number);
    let mut pieces = vec![b"add 5\n".to_vec()];
    for _ in 0..random.between(5, 30) {
        let commands: &[u8] = match random.below(6) {
            0 => b"clear\nadd 5\n",
            1 => b"clear\nadd 5\nmean\n",
            2 => b"mean\n",
            _ => b"add 5\n",
        };
        pieces.push(commands.to_vec());
    }
    if number == 77 {
        pieces.extend([b"cle".to_vec(), b"ar\nmean\n".to_vec()]);
    }
    pieces
}

#[test]
fn a_bug_under_load_becomes_a_test() {
    let place = Place::new();
    let path = place.path("server.rec");
    let recording = Recording::new(&path).with(|recording| recording.payloads = Payloads::Kept);
    let running = spawn(move || {
        let mut server = Server::recorded(Config::new(), recording).expect("a recording");
        server
            .listen(listen(), |_: &mut (), _| Mean::buggy())
            .expect("a port");
        (server, ())
    });
    let addr = running.addr();
    thread::scope(|scope| {
        for thread in 0..4 {
            scope.spawn(move || {
                for number in 0..50 {
                    let mut client = connect(addr);
                    for piece in session(thread * 50 + number) {
                        if client.write_all(&piece).is_err() {
                            break;
                        }
                    }
                    let _ = client.shutdown(std::net::Shutdown::Write);
                    let _ = client.read_to_end(&mut Vec::new());
                }
            });
        }
    });
    let stats = running.until("all have ended", |stats| stats.closed_total() == 200);
    assert_eq!(stats.closed(CloseReason::Panicked), 1);
    let (stats, ()) = running.finish();

    // The same again, with the bug: the same counts of everything, and the same reasons.
    let mut tape = Tape::read(&path).expect("a recording");
    assert_eq!((tape.connections(), tape.ending()), (200, Ending::Complete));
    let script = tape.script(|_, _| true).expect("payloads are kept");
    let mut replay = Replay::new(tape, Config::new(), ()).expect("a whole tape");
    replay
        .listen(listen(), |_: &mut (), _| Mean::buggy())
        .expect("it listens");
    assert_eq!(replay.run(), Ok(Ending::Complete));
    assert_eq!(replay.stats().closed(CloseReason::Panicked), 1);
    assert_eq!(format!("{:?}", replay.stats()), format!("{stats:?}"));

    // Without it: the panic is where the replay differs.
    let tape = Tape::read(&path).expect("a recording");
    let mut replay = Replay::new(tape, Config::new(), ()).expect("a whole tape");
    replay
        .listen(listen(), |_: &mut (), _| Mean::mended())
        .expect("it listens");
    let divergence = replay.run().expect_err("it differs");
    assert_eq!(replay.stats().panics, 0);
    assert!(divergence.replayed.contains("none"), "{divergence}");

    // Reduced and printed.
    assert!(try_play(&script).is_err());
    let smallest = script.shrink(|script| try_play(script).is_err());
    let text = smallest.to_test("it_means_nothing", "play(&script);");
    assert_eq!(text.strip_prefix("#[test]\n"), Some(PRINTED), "{text}");

    // The program does the same.
    let program = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_replay"));
        let output = command
            .arg(&path)
            .args(arguments)
            .output()
            .expect("it runs");
        (
            output.status.success(),
            String::from_utf8_lossy(&output.stdout).into_owned(),
        )
    };
    let (is_played, said) = program(&["--handler", "mean"]);
    assert!(
        is_played && said.contains("1 connections ended: handler panicked"),
        "{said}"
    );
    let (is_played, said) = program(&["--handler", "mended"]);
    assert!(
        !is_played && said.contains("the replay differs at record"),
        "{said}"
    );
    let (is_reduced, said) = program(&["--handler", "mean", "--reduce"]);
    let body = PRINTED.split_once('\n').map_or("", |(_, body)| body);
    assert!(is_reduced && said.ends_with(body), "{said}");

    // The printed test fails.
    let failed = catch_unwind(AssertUnwindSafe(printed::run));
    let message = failed.expect_err("it fails");
    assert_eq!(
        message.downcast_ref::<String>().map(|text| &**text),
        Some("the handler panicked")
    );
}
