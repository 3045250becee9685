//! What clients sent becomes a script, in pieces as they were read and at the recorded times.

use std::time::Duration;

use kit::net::Place;
use portcullis::sim::{Op, Script, Sim, Tape};
use portcullis::{Payloads, Recording};

use crate::{config, listen, recorded_world, Journal, Talker};

fn send(client: u16, bytes: &[u8]) -> Op {
    Op::Send {
        client,
        bytes: bytes.to_vec(),
    }
}

#[test]
fn a_script_has_the_clients_pieces_ends_and_times() {
    let place = Place::new();
    let path = place.path("clients");
    let recording = Recording::new(&path).with(|recording| recording.payloads = Payloads::Kept);
    let mut sim = Sim::recorded(1, config(), Journal::new(), recording).expect("a recording");
    let addrs = [0, 1].map(|_| {
        sim.listen(listen(), |_, _| Talker::default())
            .expect("a port")
    });
    let [first, second, other] =
        [addrs[0], addrs[0], addrs[1]].map(|addr| sim.connect(addr).expect("room"));
    sim.settle();
    sim.send(second, b"one\ntwo\nth");
    sim.send(other, b"elsewhere\n");
    sim.settle();
    sim.advance(Duration::from_millis(20_000));
    sim.send(second, b"ree\n");
    sim.finish(second);
    sim.reset(first);
    sim.settle();
    drop(sim);

    let mut tape = Tape::read(&path).expect("a recording");
    assert_eq!((tape.connections(), tape.skipped()), (3, 0));
    let script = tape.script(|listener, _| listener == 0).expect("kept");
    let without_steps: Vec<Op> = script
        .ops
        .iter()
        .filter(|op| **op != Op::Step)
        .cloned()
        .collect();
    let advance = |millis| Op::Advance { millis };
    assert_eq!(
        without_steps,
        [
            Op::Connect,
            Op::Connect,
            send(1, b"one\ntwo\nth"),
            advance(20_000),
            Op::Reset { client: 0 },
            send(1, b"ree\n"),
            Op::Finish { client: 1 },
        ]
    );
    let elsewhere = tape.script(|listener, _| listener == 1).expect("kept");
    assert!(elsewhere.ops.contains(&send(0, b"elsewhere\n")));
    let one = tape.script(|_, connection| connection == 1).expect("kept");
    assert_eq!(one.ops.iter().filter(|op| **op == Op::Connect).count(), 1);
}

/// Time takes memory in a script, and a record of 16 bytes can say that centuries have passed.
#[test]
fn a_script_of_many_years_is_refused() {
    let place = Place::new();
    let path = place.path("years");
    let recording = Recording::new(&path).with(|recording| recording.payloads = Payloads::Kept);
    let (mut sim, addr) = recorded_world(recording);
    sim.leap(Duration::from_secs(11 * 366 * 86_400));
    sim.connect(addr).expect("room");
    sim.settle();
    drop(sim);
    let mut tape = Tape::read(&path).expect("a recording");
    let length = tape.script(|_, _| true).map(|script| script.ops.len());
    let error = length.expect_err("too long").to_string();
    assert!(error.contains("ten years"), "{error}");
    // Nothing that is left out counts.
    assert_eq!(tape.script(|_, _| false).expect("kept").ops, []);
}

/// A test with every kind of op, as it is printed.
mod every_op {
    use super::print;

    include!("every_op.rs");
}

fn print(script: &Script) -> String {
    script.to_test(
        "a_printed_test_prints_itself",
        "let text = print(&script);\nassert_eq!(text, include_str!(\"every_op.rs\"));",
    )
}
