//! Others are killed, with all that waits for them.

use std::time::Duration;

use portcullis::sim::ClientState::{self, Reset};
use portcullis::CloseReason::{self, Aborted, Killed};
use portcullis::{ConnId, HandleError, Outcome};

use super::theatre::{behave, theatre, Call, Cx};

#[test]
fn kills_its_neighbour() {
    type Deed = fn(&mut Cx<'_>, ConnId) -> Outcome;
    let ways: [(Deed, CloseReason, ClientState); 4] = [
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
            |cx, other| Ok(cx.app.handle().post(move |_, control| assert!(control.kill(other)))?),
            Killed,
            Reset,
        ),
    ];
    for (deed, reason, state) in ways {
        let mut theatre = theatre(move |cx, call| {
            if let Call::Frame(b"kill\n") = call {
                deed(cx, cx.app.ids[1])?;
            }
            behave(cx, call)
        });
        let victim = theatre.enter();
        let killer = theatre.enter();
        theatre.serve(killer, "kill\n");
        assert_eq!((theatre.leave(victim), theatre.heard(victim)), (state, String::new()));
        theatre.ended(reason);
        theatre.serve(killer, "unharmed\n");
        theatre.leave(killer);
        theatre.end(0);
    }
}

/// Both have events in one batch, in either order: after its end nobody is told anything.
#[test]
fn kills_a_neighbour_that_has_input_waiting() {
    for (abort, reason, state) in [
        (true, Aborted, Reset),
        (false, CloseReason::Closed, ClientState::Finished),
    ] {
        for killer_first in [true, false] {
            let mut theatre = theatre(move |cx, call| {
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
            let (one, other) = (theatre.enter(), theatre.enter());
            let (killer, victim) = if killer_first { (one, other) } else { (other, one) };
            theatre.sim.send(killer, b"kill\n");
            theatre.sim.send(victim, b"waits\n");
            theatre.sim.settle();
            assert_eq!(theatre.heard(killer), "kill\n");
            let heard = match (killer_first, state) {
                (false, ClientState::Finished) => "waits\n",
                // A reset destroys what the client has not read.
                _ => "",
            };
            assert_eq!((theatre.leave(victim), theatre.heard(victim).as_str()), (state, heard));
            let frames = if killer_first { 1 } else { 2 };
            assert_eq!(theatre.sim.app().times("frame"), frames);
            let number = if killer_first { 2 } else { 1 };
            assert_eq!(theatre.sim.app().reasons, [(number, reason)]);
            theatre.serve(killer, "unharmed\n");
            theatre.leave(killer);
            theatre.end(0);
        }
    }
}

#[test]
fn kills_a_neighbour_whose_timer_is_due() {
    let mut theatre = theatre(|cx, call| match call {
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
    let victim = theatre.enter();
    let killer = theatre.enter();
    theatre.say(victim, "second\n");
    theatre.say(killer, "first\n");
    // Both are due in the same turn.
    theatre.sim.leap(Duration::from_secs(1));
    theatre.sim.settle();
    assert_eq!(theatre.sim.state(victim), Reset);
    assert_eq!(theatre.sim.app().times("timer"), 1);
    theatre.ended(Aborted);
    theatre.leave(killer);
    theatre.end(0);
}

/// What was on its way to it comes to nothing and is counted; who takes its place gets none of it.
#[test]
fn kills_a_neighbour_that_has_messages_waiting() {
    let mut theatre = theatre(|cx, call| {
        if let Call::Frame(b"kill\n") = call {
            let (handle, victim) = (cx.app.handle(), cx.app.ids[1]);
            handle.kill(victim)?;
            handle.notify(victim, ())?;
            handle.send(victim, "a frame\n")?;
        }
        behave(cx, call)
    });
    let victim = theatre.enter();
    let killer = theatre.enter();
    theatre.sim.send(killer, b"kill\n");
    let newcomer = theatre.enter();
    theatre.serve(newcomer, "new\n");
    assert_eq!(
        (theatre.sim.state(victim), theatre.heard(victim)),
        (Reset, String::new())
    );
    assert_eq!(
        (theatre.sim.stats().undeliverable, theatre.sim.app().times("message")),
        (2, 0)
    );
    theatre.ended(Killed);
    let handle = theatre.sim.handle();
    let gone = theatre.sim.app().ids[1];
    assert_eq!(handle.send(gone, "more\n"), Err(HandleError::NoConnection(gone)));
    assert_eq!(theatre.heard(killer), "kill\n");
    theatre.leave(killer);
    theatre.leave(newcomer);
    theatre.end(0);
}
