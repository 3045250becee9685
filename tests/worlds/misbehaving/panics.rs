//! Panics in every callback, in services and in destructors.

use std::rc::Rc;
use std::time::Duration;

use portcullis::sim::{ClientId, ClientState};
use portcullis::CloseReason::{self, Finished, Panicked, Refused};
use portcullis::Config;

use super::theatre::{behave, lines, theatre, theatre_of, Call, Part, Theatre, Welcome};
use kit::planned::blow;
use kit::script::ScriptedHandler;

/// faults C15
#[test]
fn panics_in_each_callback() {
    type Provoke = fn(&mut Theatre, ClientId);
    let cases: [(&str, Provoke, &str, &[&str]); 7] = [
        ("open", |_, _| {}, "", &["open", "close"]),
        (
            "frame",
            |theatre, client| theatre.say(client, "one\nblow\nnever\n"),
            "one\n",
            &["open", "frame", "frame", "close"],
        ),
        (
            "finish",
            |theatre, client| {
                theatre.say(client, "one\n");
                theatre.leave(client);
            },
            "one\n",
            &["open", "frame", "finish", "close"],
        ),
        (
            "writable",
            |theatre, client| {
                theatre.sim.set_reading(client, false);
                theatre.sim.set_send_buffer(client, 1);
                theatre.say(client, "a flood\n");
                theatre.sim.set_reading(client, true);
                theatre.sim.settle();
            },
            "a flood\n",
            &["open", "frame", "writable", "close"],
        ),
        (
            "timer",
            |theatre, client| {
                theatre.say(client, "timer\n");
                theatre.sim.advance(Duration::from_secs(1));
            },
            "timer\n",
            &["open", "frame", "timer", "close"],
        ),
        (
            "message",
            |theatre, _| {
                let id = theatre.sim.app().ids[1];
                theatre.sim.handle().notify(id, ()).expect("alive");
                theatre.sim.settle();
            },
            "",
            &["open", "message", "close"],
        ),
        (
            "close",
            |theatre, client| theatre.say(client, "bye\n"),
            "bye\n",
            &["open", "frame", "close"],
        ),
    ];
    for (callback, provoke, heard, told) in cases {
        let listen = lines().watermarks(1, 8);
        let mut theatre = theatre_of(Config::new(), listen, Welcome::Accept, move |cx, call| {
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
        let client = theatre.enter();
        provoke(&mut theatre, client);
        assert_eq!(theatre.leave(client), ClientState::Finished, "{callback}");
        assert_eq!(theatre.heard(client), heard, "{callback}");
        assert_eq!(theatre.sim.app().told, told, "{callback}");
        // One in on_close comes too late to be a reason.
        theatre.ended(if callback == "close" {
            CloseReason::Closed
        } else {
            Panicked
        });
        theatre.end(0);
    }
}

#[test]
fn panics_in_on_drain() {
    let mut theatre = theatre(|cx, call| match call {
        Call::Drain => blow(),
        call => behave(cx, call),
    });
    let client = theatre.enter();
    theatre.sim.send(client, b"one\n");
    theatre.sim.control().drain(Duration::from_secs(5));
    theatre.sim.settle();
    assert_eq!(theatre.heard(client), "one\n", "it was read before the drain was told");
    for client in [client, theatre.bystander] {
        assert_eq!(theatre.leave(client), ClientState::Finished);
    }
    assert_eq!(theatre.sim.app().reasons, [(1, Panicked), (0, CloseReason::Drained)]);
    let report = theatre.sim.drain_report().expect("the drain goes on");
    assert_eq!((report.ended, report.forced, theatre.sim.descriptors()), (2, 0, 0));
}

#[test]
fn a_service_panics() {
    let mut theatre = theatre_of(Config::new(), lines(), Welcome::Panic, behave);
    let client = theatre.enter();
    assert_eq!(
        (theatre.sim.state(client), theatre.heard(client)),
        (ClientState::Finished, String::new())
    );
    assert_eq!(theatre.sim.app().unopened, [Panicked]);
    let stats = theatre.end(1);
    assert_eq!((stats.closed(Panicked), stats.accepted, stats.opened), (1, 3, 2));
}

#[test]
fn a_service_panics_when_it_hears_of_the_refused() {
    let mut theatre = theatre_of(Config::new(), lines(), Welcome::RefuseAndPanic, behave);
    let client = theatre.enter();
    assert_eq!(theatre.sim.state(client), ClientState::Finished);
    assert_eq!(theatre.heard(client), "not you\n");
    assert_eq!(theatre.sim.app().unopened, [Refused]);
    let stats = theatre.end(1);
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
        let mut theatre = theatre_of(Config::new(), lines(), Welcome::Fuse, |cx, call| {
            match call {
                Call::Frame(b"replace\n") => {
                    let successor = Part {
                        number: 1,
                        play: Rc::new(behave),
                        _fuse: None,
                    };
                    cx.conn.replace_handler(ScriptedHandler::successor(successor));
                }
                Call::Frame(b"blow\n") => blow(),
                _ => {}
            }
            behave(cx, call)
        });
        let client = theatre.enter();
        theatre.say(client, words);
        assert_eq!(theatre.leave(client), ClientState::Finished);
        assert_eq!(theatre.heard(client), heard);
        theatre.ended(reason);
        theatre.end(1);
    }
}
