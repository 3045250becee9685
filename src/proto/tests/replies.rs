//! Pending replies: a connection does not close by itself before they are sent.

use super::*;

/// Answers each frame later.
fn later(turn: &mut Turn<'_>, event: &Seen) -> Outcome {
    match event {
        Seen::Frame(_) => turn.machine.await_reply(),
        Seen::Finished | Seen::Drain => turn.machine.close_after_input(),
        _ => {}
    }
    Ok(())
}

fn answer(rig: &mut Rig, payload: &str) {
    rig.act(|turn| {
        turn.machine
            .send(payload.as_bytes(), turn.now, turn.pool)
            .expect("it is open");
        turn.machine.end_reply();
    });
}

#[test]
fn a_peer_that_has_finished_gets_its_answers() {
    let mut rig = Rig::open(later);
    rig.receive([packet2("one"), packet2("two")].concat());
    rig.receive_fin();
    assert_eq!(rig.events(), [frame("one"), frame("two"), Seen::Finished]);
    answer(&mut rig, "1");
    assert!(rig.is_open());
    answer(&mut rig, "2");
    assert_eq!(rig.answers(), [packet2("1"), packet2("2")].concat());
    assert_eq!(rig.ended(), CloseReason::Finished);
}

#[test]
fn a_drain_waits_for_replies_and_serves_new_frames() {
    let mut rig = Rig::open(later);
    rig.receive(packet2("one"));
    rig.machine.drain(rig.now);
    rig.turn();
    assert!(rig.is_open());
    rig.receive(packet2("two"));
    answer(&mut rig, "1");
    assert!(rig.is_open());
    // A third is in the kernel when the last reply is sent: it is read first.
    rig.inbox.push_back(Input::Bytes(packet2("three")));
    answer(&mut rig, "2");
    assert!(rig.is_open());
    answer(&mut rig, "3");
    assert_eq!(
        rig.answers(),
        [packet2("1"), packet2("2"), packet2("3")].concat()
    );
    assert_eq!(rig.finish(), CloseReason::Drained);
}

#[test]
fn pending_replies_do_not_stop_the_idle_timeout() {
    let mut rig = Rig::open(later);
    rig.receive(packet2("one"));
    rig.receive_fin();
    rig.pass(secs(200));
    assert_eq!(rig.ended(), CloseReason::IdleTimeout);
}

#[test]
fn extra_calls_are_ignored() {
    let mut rig = Rig::open(echo);
    rig.machine.end_reply();
    rig.receive(packet2("one"));
    rig.receive_fin();
    assert_eq!(rig.answers(), packet2("one"));
    assert_eq!(rig.ended(), CloseReason::Finished);
}

/// It does not close before it is resumed: until then a reset is noticed.
#[test]
fn a_paused_connection_whose_peer_has_finished_notices_a_reset() {
    let mut rig = Rig::open(|turn: &mut Turn<'_>, event: &Seen| {
        if *event == Seen::Finished {
            turn.machine.close_after_input();
            turn.machine.pause(turn.now);
        }
        Ok(())
    });
    rig.receive_fin();
    assert!(rig.is_open() && rig.machine.wants_error());
    rig.act(|turn| turn.machine.resume(turn.now));
    assert_eq!(rig.ended(), CloseReason::Finished);
}
