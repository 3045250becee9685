//! Options that change on an open connection apply at once, and forgive nothing.

use super::*;

impl Rig {
    #[track_caller]
    fn reconfigure(&mut self, change: impl FnOnce(&mut ConnConfig)) {
        let changed = self.machine.reconfigure(change, self.now);
        changed.expect("an open connection, and good values");
        self.turn();
    }
}

/// As an MQTT broker sets a client's keepalive.
#[test]
fn an_idle_timeout_counts_from_the_last_input() {
    let mut rig = Rig::open(echo);
    rig.pass(secs(20));
    rig.receive(packet2("hi"));
    rig.pass(secs(10));
    rig.reconfigure(|conn| conn.idle_timeout = secs(15));
    rig.pass(secs(4));
    assert!(rig.is_open());
    rig.pass(secs(1));
    assert_eq!(rig.finish(), CloseReason::IdleTimeout);

    let mut rig = Rig::open(echo);
    rig.pass(secs(100));
    rig.reconfigure(|conn| conn.idle_timeout = Duration::MAX);
    rig.pass(secs(100_000));
    assert!(rig.is_open());
    rig.reconfigure(|conn| conn.idle_timeout = secs(10));
    rig.pass(Duration::ZERO);
    assert_eq!(rig.finish(), CloseReason::IdleTimeout, "it is over already");
}

#[test]
fn a_frame_that_has_begun_keeps_what_has_passed() {
    for (timeout, left) in [(15, 5), (10, 0), (40, 30)] {
        let mut rig = Rig::open(echo);
        rig.receive([0]);
        rig.pass(secs(10));
        rig.reconfigure(|conn| conn.frame_timeout = secs(timeout));
        if left > 0 {
            rig.pass(secs(left - 1));
            assert!(rig.is_open(), "{timeout}");
            rig.pass(secs(1));
        } else {
            rig.pass(Duration::ZERO);
        }
        assert_eq!(rig.finish(), CloseReason::FrameTimeout, "{timeout}");
    }
}

/// The clock stands still in a pause, whatever it becomes meanwhile.
#[test]
fn a_frame_keeps_what_has_passed_over_a_pause() {
    let mut rig = Rig::open(echo);
    rig.receive([0]);
    rig.pass(secs(10));
    rig.pause();
    rig.pass(secs(1000));
    rig.reconfigure(|conn| conn.frame_timeout = secs(15));
    rig.pass(secs(1000));
    rig.resume();
    rig.pass(secs(4));
    assert!(rig.is_open());
    rig.pass(secs(1));
    assert_eq!(rig.finish(), CloseReason::FrameTimeout);
}

/// Its clock has run all along.
#[test]
fn a_first_timeout_counts_what_has_passed() {
    let patient = ConnConfig {
        frame_timeout: Duration::MAX,
        idle_timeout: Duration::MAX,
        ..limits()
    };
    for (timeout, is_over) in [(1000, true), (1001, false)] {
        let mut rig = Rig::open_with(&Framing::Packet2, patient.clone(), echo);
        rig.receive([0]);
        rig.pass(secs(1000));
        rig.reconfigure(|conn| conn.frame_timeout = secs(timeout));
        rig.pass(Duration::ZERO);
        assert_eq!(!rig.is_open(), is_over);
    }
}

#[test]
fn pending_output_keeps_what_has_passed() {
    let mut rig = Rig::open(echo);
    rig.room = 0;
    rig.receive(packet2("hello"));
    rig.pass(secs(12));
    rig.reconfigure(|conn| conn.write_timeout = secs(15));
    rig.pass(secs(2));
    assert!(rig.is_open());
    rig.pass(secs(1));
    assert_eq!(rig.was_reset(), CloseReason::WriteTimeout);
}

#[test]
fn watermarks_pause_and_resume_at_once() {
    let mut rig = Rig::open(echo);
    rig.room = 0;
    rig.receive(packet2([7; 50]));
    rig.events();
    rig.reconfigure(|conn| conn.high_watermark = 50);
    assert!(rig.machine.is_congested());
    rig.receive(packet2("waits"));
    assert_eq!(rig.events(), []);
    rig.reconfigure(|conn| conn.high_watermark = 100);
    assert!(rig.machine.is_congested(), "until the low watermark");
    rig.reconfigure(|conn| conn.low_watermark = 60);
    assert!(!rig.machine.is_congested());
    assert_eq!(rig.events(), [Seen::Writable, frame("waits")]);
}

#[test]
fn full_duplex_reads_on_above_the_watermark() {
    let mut rig = Rig::open(echo);
    rig.room = 0;
    rig.receive(packet2([7; 98]));
    rig.events();
    rig.receive(packet2("waits"));
    assert_eq!(rig.events(), []);
    rig.reconfigure(|conn| conn.full_duplex = true);
    assert_eq!(rig.events(), [frame("waits")]);
    rig.reconfigure(|conn| conn.full_duplex = false);
    rig.receive(packet2("waits too"));
    assert_eq!(rig.events(), []);
    rig.drain_to_peer(1000);
    assert_eq!(rig.events(), [Seen::Writable, frame("waits too")]);
}

/// A rate that a handler sets anew for each frame is no new burst each time.
#[test]
fn a_rate_keeps_what_was_used_up() {
    let mut rig = Rig::open(echo);
    let rate = |burst| Some(Rate::per_second(1).burst(burst));
    rig.reconfigure(|conn| conn.frame_rate = rate(2));
    rig.receive(packet2("").repeat(5));
    assert_eq!(rig.events().len(), 2);
    rig.reconfigure(|conn| conn.frame_rate = rate(3));
    assert!(rig.events().len() <= 1);
    rig.reconfigure(|conn| conn.idle_timeout = secs(50));
    assert_eq!(rig.events().len(), 0);
    rig.reconfigure(|conn| conn.frame_rate = None);
    rig.pass(Duration::ZERO);
    assert!(rig.answers().len() == 10, "nothing is lost");
    assert!(!rig.machine.is_throttled());
}

#[test]
fn a_maximum_frame_stays_over_a_change_of_framing() {
    let mut rig = Rig::open(|turn, event| match event {
        Seen::Frame(_) => Ok(turn.send(b"ok")?),
        _ => Ok(()),
    });
    assert_eq!(rig.machine.max_frame(), 0xFFFF);
    rig.reconfigure(|conn| conn.max_frame = Some(4));
    rig.act(|turn| drop(turn.machine.set_framing(&Framing::Line)));
    assert_eq!(rig.machine.max_frame(), 4);
    rig.receive("abc\n");
    assert_eq!(rig.events(), [frame("abc\n")]);
    rig.reconfigure(|conn| conn.max_frame = None);
    assert_eq!(rig.machine.max_frame(), 64 * 1024, "the framing's own");
    rig.reconfigure(|conn| conn.max_frame = Some(2));
    rig.receive("abc");
    assert_eq!(rig.finish(), CloseReason::FrameTooLarge);
}

#[test]
fn bad_values_change_nothing() {
    let mut rig = Rig::open(echo);
    let before = rig.machine.config().clone();
    let changed = rig.machine.reconfigure(
        |conn| (conn.idle_timeout, conn.max_frame) = (secs(1), Some(0)),
        rig.now,
    );
    assert!(matches!(
        changed,
        Err(crate::Error::Option {
            option: "max_frame",
            ..
        })
    ));
    assert_eq!(*rig.machine.config(), before);
    rig.pass(secs(100));
    assert!(rig.is_open());
}

#[test]
fn a_maximum_below_a_fixed_length_is_refused() {
    let limits = ConnConfig {
        max_frame: None,
        ..limits()
    };
    let mut rig = Rig::open_with(&Framing::Fixed(4), limits, echo);
    for (max, is_good) in [(3, false), (4, true), (5, true), (1, false)] {
        let changed = rig
            .machine
            .reconfigure(|conn| conn.max_frame = Some(max), rig.now);
        assert_eq!(changed.is_ok(), is_good, "{max}");
        rig.receive(b"abcd");
        assert_eq!(rig.answers(), b"abcd", "{max}");
    }
}

/// The framing changes in a callback, which gets no error: the connection ends at the next input.
#[test]
fn a_fixed_length_above_the_maximum_ends_as_too_large() {
    let limits = ConnConfig {
        max_frame: Some(3),
        ..limits()
    };
    let mut rig = Rig::open_with(&Framing::Line, limits, echo);
    rig.act(|turn| drop(turn.machine.set_framing(&Framing::Fixed(4))));
    rig.receive(b"abcd");
    assert_eq!(rig.answers(), b"");
    assert_eq!(rig.finish(), CloseReason::FrameTooLarge);
}

#[test]
fn only_an_open_connection_changes_its_options() {
    let refuses = |rig: &mut Rig| {
        let changed = rig.machine.reconfigure(|_| (), rig.now);
        matches!(changed, Err(crate::Error::ConnState(_)))
    };
    let mut rig = Rig::accepted(&Framing::Packet2, limits(), None, Box::new(echo));
    assert!(refuses(&mut rig));
    let mut rig = Rig::open(echo);
    rig.close();
    assert!(refuses(&mut rig));
}
