//! The clocks of frames behind TLS: an incomplete record is an incomplete frame.

use super::*;

/// A record that is never complete is a frame that is never complete.
#[test]
fn an_unfinished_record_is_late_as_a_frame_is() {
    let mut talk = Talk::open(&TLS13, Box::new(echo));
    talk.say(&packet2([7; 100]));
    let wire = talk.client_bytes();
    let mut bytes = wire.iter();
    // Each byte is worth a second.
    for _ in 0..16 {
        talk.rig.receive([*bytes.next().expect("more")]);
        talk.rig.pass(secs(3));
    }
    assert_eq!(talk.rig.machine.state(), State::Closing);
    let answer = talk.rig.answers();
    talk.hear(&answer);
    assert!(talk.goodbye);
    talk.rig.pass(secs(2));
    assert_eq!(talk.rig.ended(), CloseReason::FrameTimeout);
}

/// A complete record stops the frame's clock.
#[test]
fn a_record_finished_in_time() {
    let mut talk = Talk::open(&TLS13, Box::new(echo));
    talk.say(&packet2("in time"));
    let wire = talk.client_bytes();
    talk.rig.receive(&wire[..10]);
    talk.rig.pass(secs(29));
    talk.rig.receive(&wire[10..]);
    assert_eq!(talk.rig.events(), [frame("in time")]);
    talk.rig.pass(secs(119));
    assert!(talk.rig.is_open());
}

/// Frames that a rate keeps back are buffered, with nothing to follow them: no clock runs.
#[test]
fn frames_behind_a_rate_are_not_late_after_close_notify() {
    let identity = Identity::new();
    let limits = ConnConfig {
        frame_rate: Some(Rate::per_second(1).burst(1)),
        idle_timeout: Duration::from_millis(500),
        ..limits()
    };
    let client = identity.client(&TLS13);
    let mut talk = Talk::with(identity.server(), client, limits, Box::new(reticent));
    talk.rig.machine.set_rates(&SharedMeters::default());
    talk.exchange();
    for word in ["one", "two", "three"] {
        talk.say(&packet2(word));
    }
    talk.client.send_close_notify();
    talk.exchange();
    talk.rig.pass(secs(1));
    talk.rig.pass(secs(1));
    let expected = [
        Seen::Opened,
        frame("one"),
        frame("two"),
        frame("three"),
        Seen::Finished,
    ];
    assert_eq!(talk.rig.events(), expected);
    // The idle timeout excludes the time in which the rate kept them back.
    let left = talk.rig.machine.time_left(talk.rig.now);
    assert!(left.idle > Some(Duration::ZERO), "{left:?}");
}

/// The handler pauses at a frame behind which a record has begun to arrive: its clock runs from the
/// resumption on.
#[test]
fn an_unfinished_record_behind_a_pause_is_late() {
    let mut talk = Talk::open(&TLS13, Box::new(one_at_a_time));
    talk.say(&packet2("whole"));
    let mut wire = talk.client_bytes();
    talk.say(&packet2("cut"));
    let cut = talk.client_bytes();
    wire.extend_from_slice(&cut[..cut.len() - 1]);
    talk.rig.receive(wire);
    assert_eq!(talk.rig.events(), [frame("whole")]);
    talk.rig.pass(secs(1000));
    // No turn reads before more arrives.
    talk.rig.machine.resume(talk.rig.now);
    let left = talk.rig.machine.time_left(talk.rig.now);
    assert_eq!(left.frame, Some(secs(30)));
}

/// FIN inside a record, while the handler has paused: nothing can complete the record, so that only
/// the idle timeout runs.
#[test]
fn an_unfinished_record_is_not_late_once_nothing_follows() {
    let mut talk = Talk::open(&TLS13, Box::new(echo));
    talk.say(&packet2("cut"));
    let wire = talk.client_bytes();
    talk.rig.receive(&wire[..wire.len() - 1]);
    talk.rig.act(|turn| {
        turn.pause();
    });
    talk.rig
        .machine
        .handle_eof(talk.rig.now, &mut talk.rig.pool);
    talk.rig.deliver(InputCursor::nothing());
    let left = talk.rig.machine.time_left(talk.rig.now);
    assert_eq!(left.frame, None);
    talk.rig.pass(secs(31));
    assert!(talk.rig.is_open(), "the frame timeout is 30 s");
    talk.rig.act(|turn| {
        turn.resume();
    });
    let closed = talk.rig.machine.take_closed();
    assert_eq!(closed.reason, CloseReason::TlsTruncated);
}
