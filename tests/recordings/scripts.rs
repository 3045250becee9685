//! What clients sent becomes a script, in pieces as they were read and at the recorded times.

use std::time::Duration;

use kit::net::Place;
use portcullis::sim::{Op, Sim, Tape};
use portcullis::{Payloads, Recording};

use crate::{config, listen, Journal, Talker};

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

#[test]
fn printed_tests_have_every_kind_of_op() {
    let script = portcullis::sim::Script {
        ops: vec![
            Op::Connect,
            send(0, b"a\"\n\xFF"),
            Op::Read {
                client: 0,
                on: false,
            },
            Op::Push {
                connection: 0,
                frame: b"frame".to_vec(),
            },
            Op::Advance { millis: 5 },
            Op::Suspend { on: true },
        ],
    };
    let expected = r#"#[test]
fn it_fails() {
    use portcullis::sim::{Op, Script};

    let script = Script {
        ops: vec![
            Op::Connect,
            Op::Send {
                client: 0,
                bytes: b"a\"\n\xff".to_vec(),
            },
            Op::Read {
                client: 0,
                on: false,
            },
            Op::Push {
                connection: 0,
                frame: b"frame".to_vec(),
            },
            Op::Advance { millis: 5 },
            Op::Suspend { on: true },
        ],
    };
    play(&script);
    panic!("it played");
}
"#;
    let text = script.to_test("it_fails", "play(&script);\npanic!(\"it played\");");
    assert_eq!(text, expected);
}
