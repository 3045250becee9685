//! Rates delay the peer; they lose no bytes and expire none of its timeouts.

use super::*;

fn at_most(read_rate: Option<Rate>, frame_rate: Option<Rate>) -> Rig {
    let limits = ConnConfig {
        read_rate,
        frame_rate,
        idle_timeout: secs(5),
        frame_timeout: secs(5),
        high_watermark: usize::MAX,
        output_limit: usize::MAX,
        ..limits()
    };
    let mut rig = Rig::accepted(&Framing::Packet2, limits, None, Box::new(echo));
    rig.machine.set_rates(&SharedMeters::default());
    rig.machine.handle_admitted(rig.now);
    rig.turn();
    rig.events();
    rig
}

fn frames(count: usize) -> Vec<u8> {
    b"\0\x02ab".repeat(count)
}

/// A burst of five admits five frames, then one each tenth of a second.
#[test]
fn frames_arrive_at_the_rate() {
    let mut rig = at_most(None, Some(Rate::per_second(10).burst(5)));
    rig.receive(frames(12));
    assert_eq!(rig.events().len(), 5);
    rig.pass(Duration::from_millis(99));
    assert_eq!(rig.events().len(), 0);
    rig.pass(Duration::from_millis(1));
    assert_eq!(rig.events().len(), 1);
    rig.pass(Duration::from_millis(250));
    assert_eq!(rig.events().len(), 2);
    rig.pass(secs(2));
    assert_eq!(rig.events().len(), 4);
    assert_eq!(rig.answers(), frames(12), "nothing is lost");
    // The bucket is full again.
    rig.receive(frames(6));
    assert_eq!(rig.events().len(), 5);
}

#[test]
fn bytes_are_read_at_the_rate() {
    let mut rig = at_most(Some(Rate::per_second(100).burst(40)), None);
    rig.receive(frames(100));
    assert_eq!(rig.machine.traffic().bytes_in, 40);
    for second in 1..=3 {
        rig.pass(secs(1));
        // In pieces of one 32nd of a second.
        let read = rig.machine.traffic().bytes_in;
        assert!(
            (36 + second * 100..=40 + second * 100).contains(&read),
            "{read}"
        );
    }
    rig.pass(secs(1));
    assert_eq!(rig.answers(), frames(100), "nothing is lost");
}

/// The peer's clocks are paused while a rate pauses reading.
#[test]
fn a_throttled_peer_is_not_late() {
    let mut rig = at_most(None, Some(Rate::per_second(1).burst(1)));
    rig.receive([&frames(20)[..], b"\0\x02a"].concat());
    rig.pass(secs(19));
    assert!(rig.is_open());
    assert_eq!(rig.events().len(), 20);
    // Now the frame has five seconds, from the time when reading resumed.
    rig.pass(secs(1));
    rig.pass(Duration::from_millis(3990));
    assert!(rig.is_open());
    rig.pass(secs(2));
    rig.receive_fin();
    assert_eq!(rig.ended(), CloseReason::FrameTimeout);
}

#[test]
fn a_pause_and_a_throttle_do_not_undo_each_other() {
    let mut rig = at_most(None, Some(Rate::per_second(1).burst(1)));
    rig.receive(frames(3));
    assert_eq!(rig.events().len(), 1);
    rig.pause();
    rig.pass(secs(10));
    assert_eq!(rig.events().len(), 0, "paused");
    rig.resume();
    assert_eq!(rig.events().len(), 1);
    rig.pause();
    rig.resume();
    assert_eq!(rig.events().len(), 0, "throttled");
    rig.pass(secs(1));
    assert_eq!(rig.events().len(), 1);
}

/// The end is reported behind the frames before it.
#[test]
fn the_end_waits_behind_the_frames() {
    let mut rig = at_most(None, Some(Rate::per_second(1).burst(1)));
    rig.inbox.push_back(Input::Bytes(frames(3)));
    rig.inbox.push_back(Input::Fin);
    rig.turn();
    rig.pass(secs(1));
    assert_eq!(rig.events(), [frame("ab"), frame("ab")]);
    rig.pass(secs(1));
    assert_eq!(rig.events(), [frame("ab"), Seen::Finished]);
    assert_eq!(rig.answers(), frames(3));
    assert_eq!(rig.ended(), CloseReason::Finished);
}

/// Closing ignores rates, and a drain is reported at once.
#[test]
fn closing_is_not_throttled() {
    let mut rig = at_most(
        Some(Rate::per_second(1).burst(1)),
        Some(Rate::per_second(1).burst(1)),
    );
    rig.receive(frames(3));
    rig.machine.drain(rig.now);
    rig.turn();
    assert!(rig.events().contains(&Seen::Drain));
    rig.close();
    rig.receive_fin();
    assert_eq!(rig.ended(), CloseReason::Drained);
}
