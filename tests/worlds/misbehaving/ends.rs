//! Ways to end oneself, and what comes after.

use std::time::Duration;

use portcullis::sim::ClientState::{self, Reset};
use portcullis::CloseReason::{self, Aborted, Failed, Finished, Killed, Panicked};
use portcullis::{Close, Outcome};

use super::harness::{behave, harness, Call, Cx};
use kit::planned::blow;

#[test]
fn sends_from_on_close() {
    let mut harness = harness(|cx, call| match call {
        Call::Close(_) => {
            let own = cx.conn.send(b"to myself\n");
            cx.conn.resume();
            cx.conn.set_timer(0, Duration::ZERO);
            cx.app.results.push(format!("{own:?}"));
            let bystander = cx.app.ids[0];
            cx.conn
                .peer(bystander)
                .expect("there")
                .send(b"farewell\n")?;
            Ok(())
        }
        call => behave(cx, call),
    });
    let client = harness.enter();
    harness.say(client, "one\n");
    assert_eq!(harness.leave(client), ClientState::Finished);
    assert_eq!(harness.heard(client), "one\n");
    assert_eq!(harness.heard(harness.bystander), "farewell\n");
    assert_eq!(harness.sim.app().results, ["Err(Closed)"]);
    assert_eq!(harness.sim.app().told, ["open", "frame", "finish", "close"]);
    harness.ended(Finished);
    harness.end(0);
}

/// Every way to end oneself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Close,
    CloseTwice,
    CloseThenAbort,
    CloseThenError,
    CloseThenPanic,
    Abort,
    AbortThenClose,
    ReturnClose,
    ReturnAbort,
    ReturnCause,
    ReturnError,
    Panic,
    CloseAfterInput,
    PostClose,
    PostAbort,
    PostKill,
    Kill,
}

const ENDED: ClientState = ClientState::Finished;
const REFUSED: Option<&str> = Some("Err(Closed)");
const TAKEN: Option<&str> = Some("Ok(())");

impl Way {
    /// The reason, how the client stands then, and what became of a send after it, if there can be one.
    const ALL: [(Self, CloseReason, ClientState, Option<&'static str>); 17] = [
        (Self::Close, CloseReason::Closed, ENDED, REFUSED),
        (Self::CloseTwice, CloseReason::Closed, ENDED, REFUSED),
        // What was promised is lost: that is what there is to report.
        (Self::CloseThenAbort, Aborted, Reset, REFUSED),
        (Self::CloseThenError, CloseReason::Closed, ENDED, REFUSED),
        (Self::CloseThenPanic, CloseReason::Closed, ENDED, REFUSED),
        (Self::Abort, Aborted, Reset, REFUSED),
        (Self::AbortThenClose, Aborted, Reset, REFUSED),
        (Self::ReturnClose, CloseReason::Closed, ENDED, None),
        (Self::ReturnAbort, Aborted, Reset, None),
        (Self::ReturnCause, Failed, ENDED, None),
        (Self::ReturnError, Failed, ENDED, None),
        (Self::Panic, Panicked, ENDED, None),
        (Self::CloseAfterInput, CloseReason::Closed, ENDED, TAKEN),
        (Self::PostClose, CloseReason::Closed, ENDED, TAKEN),
        (Self::PostAbort, Aborted, Reset, TAKEN),
        (Self::PostKill, Killed, Reset, TAKEN),
        (Self::Kill, Killed, Reset, TAKEN),
    ];

    fn go(self, cx: &mut Cx<'_>) -> Outcome {
        let (id, handle) = (cx.conn.id(), cx.app.handle());
        match self {
            Self::Close | Self::CloseThenError | Self::CloseThenPanic => cx.conn.close(),
            Self::CloseTwice => {
                cx.conn.close();
                cx.conn.close();
            }
            Self::CloseThenAbort => {
                cx.conn.close();
                cx.conn.abort();
            }
            Self::Abort => cx.conn.abort(),
            Self::AbortThenClose => {
                cx.conn.abort();
                cx.conn.close();
            }
            Self::ReturnClose => return Err(Close::new()),
            Self::ReturnAbort => return Err(Close::abort()),
            Self::ReturnCause => return Err(Close::because("had enough")),
            Self::ReturnError => drop("no number".parse::<u8>()?),
            Self::Panic => blow(),
            Self::CloseAfterInput => cx.conn.close_after_input(),
            Self::PostClose => {
                handle.post(move |_, control| control.conn(id).expect("there").close())?
            }
            Self::PostAbort => {
                handle.post(move |_, control| control.conn(id).expect("there").abort())?
            }
            Self::PostKill => handle.post(move |_, control| assert!(control.kill(id)))?,
            Self::Kill => handle.kill(id)?,
        }
        let late = cx.conn.send(b"late\n");
        cx.app.results.push(format!("{late:?}"));
        match self {
            Self::CloseThenError => Err(Close::because("too late")),
            Self::CloseThenPanic => blow(),
            _ => Ok(()),
        }
    }
}

#[test]
fn kills_itself_in_every_way() {
    for (way, reason, state, late) in Way::ALL {
        for place in ["open", "frame"] {
            let what = format!("{way:?} from on_{place}");
            let mut harness = harness(move |cx, call| {
                let first = cx.app.times("frame") < 2;
                if call.name() == place && first {
                    cx.conn.send(b"last words\n")?;
                    return way.go(cx);
                }
                behave(cx, call)
            });
            let client = harness.enter();
            if place == "frame" {
                harness.say(client, "end\nmore\n");
            }
            assert_eq!(harness.leave(client), state, "{what}");
            // A reset destroys what the client has not read.
            let goes_on = late == TAKEN;
            let heard = match (state, goes_on, place) {
                // Commands from on_open wait for the next turn.
                (Reset, true, "open") => "last words\nlate\n",
                (Reset, ..) => "",
                (_, true, "frame") => "last words\nlate\nmore\n",
                (_, true, _) => "last words\nlate\n",
                (_, false, _) => "last words\n",
            };
            assert_eq!(harness.heard(client), heard, "{what}");
            assert_eq!(harness.sim.app().results, Vec::from_iter(late), "{what}");
            let frames = match (place, goes_on) {
                ("open", _) => 0,
                (_, false) => 1,
                (_, true) => 2,
            };
            assert_eq!(harness.sim.app().times("frame"), frames, "{what}");
            harness.ended(reason);
            harness.end(u64::from(matches!(way, Way::Panic | Way::CloseThenPanic)));
        }
    }
}

/// The first reason stays when nothing was lost, though the end is not the one that was begun.
#[test]
fn closes_with_nothing_to_say_and_aborts() {
    let mut harness = harness(|cx, call| match call {
        Call::Frame(_) => {
            cx.conn.close();
            cx.conn.abort();
            Ok(())
        }
        call => behave(cx, call),
    });
    let client = harness.enter();
    harness.say(client, "end\n");
    assert_eq!(harness.sim.state(client), Reset);
    harness.ended(CloseReason::Closed);
    harness.end(0);
}
