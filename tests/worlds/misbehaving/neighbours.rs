//! Others are killed, with all that waits for them.

use std::time::Duration;

use portcullis::sim::ClientState::{self, Reset};
use portcullis::CloseReason::{self, Aborted, Killed};
use portcullis::{ConnId, HandleError, Outcome};

use super::harness::{behave, harness, Call, Cx};

#[test]
fn kills_its_neighbour() {
    type Action = fn(&mut Cx<'_>, ConnId) -> Outcome;
    let ways: [(Action, CloseReason, ClientState); 4] = [
        (
            |cx, other| {
                cx.conn.peer(other).expect("there").close();
                Ok(())
            },
            CloseReason::Closed,
            ClientState::Finished,
        ),
        (
            |cx, other| {
                cx.conn.peer(other).expect("there").abort();
                Ok(())
            },
            Aborted,
            Reset,
        ),
        (|cx, other| Ok(cx.app.handle().kill(other)?), Killed, Reset),
        (
            |cx, other| {
                Ok(cx
                    .app
                    .handle()
                    .post(move |_, control| assert!(control.kill(other)))?)
            },
            Killed,
            Reset,
        ),
    ];
    for (action, reason, state) in ways {
        let mut harness = harness(move |cx, call| {
            if let Call::Frame(b"kill\n") = call {
                action(cx, cx.app.ids[1])?;
            }
            behave(cx, call)
        });
        let victim = harness.enter();
        let killer = harness.enter();
        harness.serve(killer, "kill\n");
        assert_eq!(
            (harness.leave(victim), harness.heard(victim)),
            (state, String::new())
        );
        harness.ended(reason);
        harness.serve(killer, "unharmed\n");
        harness.leave(killer);
        harness.end(0);
    }
}

/// Both have events in one batch, in either order: after its end a connection gets no call.
#[test]
fn kills_a_neighbour_that_has_input_waiting() {
    for (abort, reason, state) in [
        (true, Aborted, Reset),
        (false, CloseReason::Closed, ClientState::Finished),
    ] {
        for killer_first in [true, false] {
            let mut harness = harness(move |cx, call| {
                if let Call::Frame(b"kill\n") = call {
                    let victim = cx.app.ids[if killer_first { 2 } else { 1 }];
                    let mut victim = cx.conn.peer(victim).expect("there");
                    if abort {
                        victim.abort();
                    } else {
                        victim.close();
                    }
                }
                behave(cx, call)
            });
            let (one, other) = (harness.enter(), harness.enter());
            let (killer, victim) = if killer_first {
                (one, other)
            } else {
                (other, one)
            };
            harness.sim.send(killer, b"kill\n");
            harness.sim.send(victim, b"waits\n");
            harness.sim.settle();
            assert_eq!(harness.heard(killer), "kill\n");
            let heard = match (killer_first, state) {
                (false, ClientState::Finished) => "waits\n",
                // A reset destroys what the client has not read.
                _ => "",
            };
            assert_eq!(
                (harness.leave(victim), harness.heard(victim).as_str()),
                (state, heard)
            );
            let frames = if killer_first { 1 } else { 2 };
            assert_eq!(harness.sim.app().times("frame"), frames);
            let number = if killer_first { 2 } else { 1 };
            assert_eq!(harness.sim.app().reasons, [(number, reason)]);
            harness.serve(killer, "unharmed\n");
            harness.leave(killer);
            harness.end(0);
        }
    }
}

#[test]
fn kills_a_neighbour_whose_timer_is_due() {
    let mut harness = harness(|cx, call| match call {
        Call::Frame(b"first\n") => {
            cx.conn.set_timer(0, Duration::from_millis(5));
            Ok(())
        }
        Call::Frame(b"second\n") => {
            cx.conn.set_timer(0, Duration::from_millis(6));
            Ok(())
        }
        Call::Timer(_) => {
            let victim = cx.app.ids[1];
            cx.conn.peer(victim).expect("there").abort();
            Ok(())
        }
        call => behave(cx, call),
    });
    let victim = harness.enter();
    let killer = harness.enter();
    harness.say(victim, "second\n");
    harness.say(killer, "first\n");
    // Both are due in the same turn.
    harness.sim.leap(Duration::from_secs(1));
    harness.sim.settle();
    assert_eq!(harness.sim.state(victim), Reset);
    assert_eq!(harness.sim.app().times("timer"), 1);
    harness.ended(Aborted);
    harness.leave(killer);
    harness.end(0);
}

/// A command in flight to it fails and is counted; the slot's next connection gets none of it.
#[test]
fn kills_a_neighbour_that_has_messages_waiting() {
    let mut harness = harness(|cx, call| {
        if let Call::Frame(b"kill\n") = call {
            let (handle, victim) = (cx.app.handle(), cx.app.ids[1]);
            handle.kill(victim)?;
            handle.notify(victim, ())?;
            handle.send(victim, "a frame\n")?;
        }
        behave(cx, call)
    });
    let victim = harness.enter();
    let killer = harness.enter();
    harness.sim.send(killer, b"kill\n");
    let newcomer = harness.enter();
    harness.serve(newcomer, "new\n");
    assert_eq!(
        (harness.sim.state(victim), harness.heard(victim)),
        (Reset, String::new())
    );
    assert_eq!(
        (
            harness.sim.stats().undeliverable,
            harness.sim.app().times("message")
        ),
        (2, 0)
    );
    harness.ended(Killed);
    let handle = harness.sim.handle();
    let gone = harness.sim.app().ids[1];
    assert_eq!(
        handle.send(gone, "more\n"),
        Err(HandleError::NoConnection(gone))
    );
    assert_eq!(harness.heard(killer), "kill\n");
    harness.leave(killer);
    harness.leave(newcomer);
    harness.end(0);
}
