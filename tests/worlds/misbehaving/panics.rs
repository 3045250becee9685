//! Panics in every callback, in services and in destructors.

use std::rc::Rc;
use std::time::Duration;

use portcullis::sim::{ClientId, ClientState};
use portcullis::CloseReason::{self, Finished, Panicked, Refused};
use portcullis::Config;

use super::harness::{behave, harness, harness_of, lines, Call, Harness, Part, Welcome};
use kit::planned::blow;
use kit::script::ScriptedHandler;

/// A panic in a callback ends that connection, frees its slot, and the next turn works.
#[test]
fn panics_in_each_callback() {
    type Provoke = fn(&mut Harness, ClientId);
    let cases: [(&str, Provoke, &str, &[&str]); 7] = [
        ("open", |_, _| {}, "", &["open", "close"]),
        (
            "frame",
            |harness, client| harness.say(client, "one\nblow\nnever\n"),
            "one\n",
            &["open", "frame", "frame", "close"],
        ),
        (
            "finish",
            |harness, client| {
                harness.say(client, "one\n");
                harness.leave(client);
            },
            "one\n",
            &["open", "frame", "finish", "close"],
        ),
        (
            "writable",
            |harness, client| {
                harness.sim.set_reading(client, false);
                harness.sim.set_send_buffer(client, 1);
                harness.say(client, "a flood\n");
                harness.sim.set_reading(client, true);
                harness.sim.settle();
            },
            "a flood\n",
            &["open", "frame", "writable", "close"],
        ),
        (
            "timer",
            |harness, client| {
                harness.say(client, "timer\n");
                harness.sim.advance(Duration::from_secs(1));
            },
            "timer\n",
            &["open", "frame", "timer", "close"],
        ),
        (
            "message",
            |harness, _| {
                let id = harness.sim.app().ids[1];
                harness.sim.handle().notify(id, ()).expect("alive");
                harness.sim.settle();
            },
            "",
            &["open", "message", "close"],
        ),
        (
            "close",
            |harness, client| harness.say(client, "bye\n"),
            "bye\n",
            &["open", "frame", "close"],
        ),
    ];
    for (callback, provoke, heard, told) in cases {
        let listen = lines().with(|listen| {
            listen.conn.low_watermark = 1;
            listen.conn.high_watermark = 8;
        });
        let mut harness = harness_of(Config::new(), listen, Welcome::Accept, move |cx, call| {
            let frame = if let Call::Frame(frame) = call {
                frame
            } else {
                b"blow\n"
            };
            if call.name() == callback && frame == b"blow\n" {
                blow();
            }
            match frame {
                b"timer\n" => cx.conn.set_timer(0, Duration::from_millis(1)),
                b"bye\n" => {
                    cx.conn.send(frame)?;
                    cx.conn.close();
                    return Ok(());
                }
                _ => {}
            }
            behave(cx, call)
        });
        let client = harness.enter();
        provoke(&mut harness, client);
        assert_eq!(harness.leave(client), ClientState::Finished, "{callback}");
        assert_eq!(harness.heard(client), heard, "{callback}");
        assert_eq!(harness.sim.app().told, told, "{callback}");
        // One in on_close comes too late to be a reason.
        harness.ended(if callback == "close" {
            CloseReason::Closed
        } else {
            Panicked
        });
        harness.end(1);
    }
}

#[test]
fn panics_in_on_drain() {
    let mut harness = harness(|cx, call| match call {
        Call::Drain => blow(),
        call => behave(cx, call),
    });
    let client = harness.enter();
    harness.sim.send(client, b"one\n");
    harness.sim.control().drain(Duration::from_secs(5));
    harness.sim.settle();
    assert_eq!(
        harness.heard(client),
        "one\n",
        "it was read before the drain was told"
    );
    for client in [client, harness.bystander] {
        assert_eq!(harness.leave(client), ClientState::Finished);
    }
    assert_eq!(
        harness.sim.app().reasons,
        [(1, Panicked), (0, CloseReason::Drained)]
    );
    let report = harness.sim.drain_report().expect("the drain goes on");
    assert_eq!((report.ended, report.failed, report.forced), (1, 1, 0));
    assert_eq!(harness.sim.descriptors(), 0);
}

#[test]
fn a_service_panics() {
    let mut harness = harness_of(Config::new(), lines(), Welcome::Panic, behave);
    let client = harness.enter();
    assert_eq!(
        (harness.sim.state(client), harness.heard(client)),
        (ClientState::Finished, String::new())
    );
    assert_eq!(harness.sim.app().failed_accepts, [Panicked]);
    let stats = harness.end(1);
    assert_eq!(
        (stats.closed(Panicked), stats.accepted, stats.opened),
        (1, 3, 2)
    );
}

#[test]
fn a_service_panics_when_it_hears_of_the_refused() {
    let mut harness = harness_of(Config::new(), lines(), Welcome::RefuseAndPanic, behave);
    let client = harness.enter();
    assert_eq!(harness.sim.state(client), ClientState::Finished);
    assert_eq!(harness.heard(client), "not you\n");
    assert_eq!(harness.sim.app().failed_accepts, [Refused]);
    let stats = harness.end(1);
    assert_eq!((stats.closed(Refused), stats.closed(Panicked)), (1, 0));
}

#[test]
fn a_destructor_panics() {
    let ends: [(&str, &str, CloseReason); 3] = [
        ("one\n", "one\n", Finished),
        ("replace\n", "replace\n", Finished),
        ("blow\n", "", Panicked),
    ];
    for (words, heard, reason) in ends {
        let mut harness = harness_of(Config::new(), lines(), Welcome::PanicOnDrop, |cx, call| {
            match call {
                Call::Frame(b"replace\n") => {
                    let successor = Part {
                        number: 1,
                        play: Rc::new(behave),
                        _panic_on_drop: None,
                    };
                    cx.conn
                        .replace_handler(ScriptedHandler::successor(successor));
                }
                Call::Frame(b"blow\n") => blow(),
                _ => {}
            }
            behave(cx, call)
        });
        let client = harness.enter();
        harness.say(client, words);
        assert_eq!(harness.leave(client), ClientState::Finished);
        assert_eq!(harness.heard(client), heard);
        harness.ended(reason);
        // The destructor's, and the handler's own.
        harness.end(1 + u64::from(reason == Panicked));
    }
}
