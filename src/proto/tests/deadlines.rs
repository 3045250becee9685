//! Every deadline of every state, in virtual time: what arms it, what moves it, and what does not.

use super::*;

const NANO: Duration = Duration::from_nanos(1);

/// Checks that nothing happens a nanosecond before `span`, then lets the nanosecond pass.
#[track_caller]
fn just(rig: &mut Rig, span: Duration) {
    let state = rig.machine.state();
    rig.pass(span - NANO);
    assert!(rig.gone.is_none(), "too early");
    assert_eq!(rig.machine.state(), state, "too early");
    rig.pass(NANO);
}

#[test]
fn handshake_from_accept() {
    let mut rig = Rig::accepted(&Framing::Packet2, limits(), None, Box::new(echo));
    just(&mut rig, secs(10));
    assert_eq!(rig.ended(), CloseReason::HandshakeTimeout);
}

#[test]
fn an_open_connection_has_no_handshake_deadline() {
    let mut rig = Rig::open(echo);
    rig.pass(secs(11));
    assert!(rig.is_open());
}

/// A peer that sends single bytes gets the time of each for its frame, and no more.
#[test]
fn frame_from_its_first_byte() {
    let mut rig = Rig::open(echo);
    rig.pass(secs(50));
    rig.receive([0]);
    for byte in [200, 1, 2, 3] {
        rig.pass(secs(7));
        rig.receive([byte]);
    }
    just(&mut rig, secs(6));
    assert_eq!(rig.finish(), CloseReason::FrameTimeout);
}

/// A long frame has a whole timeout after each stall, if it arrives fast enough otherwise.
#[test]
fn a_frame_at_the_minimum_rate_is_never_late() {
    let mut rig = Rig::open(echo);
    rig.receive([1, 0]);
    for _ in 0..8 {
        rig.pass(secs(29));
        rig.receive([7; 29]);
    }
    // More than the whole timeout is not saved up.
    just(&mut rig, secs(30));
    assert_eq!(rig.finish(), CloseReason::FrameTimeout);
}

/// Bytes that arrive in a pause count once reading resumes.
#[test]
fn a_pause_loses_no_progress_of_the_frame() {
    let mut rig = Rig::open(|turn, event| {
        if matches!(event, Seen::Timer(_)) {
            turn.pause();
        }
        Ok(())
    });
    rig.receive([1, 0]);
    rig.act(|turn| turn.set_timer(1, secs(20)));
    rig.now = rig.now.after(secs(20));
    rig.inbox.push_back(Input::Bytes(vec![7; 5]));
    rig.expire();
    rig.pass(secs(1000));
    rig.resume();
    rig.turn();
    just(&mut rig, secs(15));
    assert_eq!(rig.finish(), CloseReason::FrameTimeout);
}

/// A turn that is used up by events of the handler leaves the clock of the incomplete frame.
#[test]
fn events_alone_do_not_extend_a_frame() {
    let mut rig = Rig::open(echo);
    rig.receive([0]);
    rig.pass(secs(20));
    rig.machine.postpone(false, rig.now);
    rig.turn();
    just(&mut rig, secs(10));
    assert_eq!(rig.finish(), CloseReason::FrameTimeout);
}

#[test]
fn a_frame_deadline_for_each_frame() {
    let mut rig = Rig::open(echo);
    rig.receive([0]);
    rig.pass(secs(20));
    // The rest of the first and the beginning of the second, which began now.
    rig.receive([1, b'a', 0]);
    assert_eq!(rig.events(), [frame("a")]);
    just(&mut rig, secs(30));
    assert_eq!(rig.finish(), CloseReason::FrameTimeout);
}

#[test]
fn no_frame_deadline_between_frames() {
    let mut rig = Rig::open(echo);
    rig.receive([0]);
    rig.receive([1, b'a']);
    rig.pass(secs(119));
    assert!(rig.is_open());
    let mut rig = Rig::open(echo);
    rig.receive([0]);
    rig.receive([1]);
    rig.receive([b'a', 0, 1, b'b']);
    rig.pass(secs(119));
    assert!(rig.is_open());
}

#[test]
fn raw_has_no_frames_to_be_late_with() {
    let mut rig = Rig::open_with(&Framing::Raw, limits(), echo);
    rig.receive("a");
    rig.pass(secs(119));
    assert!(rig.is_open());
}

#[test]
fn idle_is_moved_by_bytes_from_the_peer() {
    let mut rig = Rig::open(echo);
    for _ in 0..5 {
        rig.pass(secs(119));
        rig.receive(packet2("x"));
    }
    just(&mut rig, secs(120));
    assert_eq!(rig.finish(), CloseReason::IdleTimeout);
}

#[test]
fn idle_is_not_moved_by_sends_and_timers() {
    let mut rig = Rig::open(silent);
    for _ in 0..11 {
        rig.pass(secs(10));
        rig.act(|turn| {
            turn.send(b"news").expect("open");
            turn.set_timer(1, secs(5));
        });
    }
    just(&mut rig, secs(10));
    assert_eq!(rig.finish(), CloseReason::IdleTimeout);
}

/// Output moves no clock of the peer's, not even above the watermark.
#[test]
fn idle_is_not_moved_by_sending_above_the_watermark() {
    let mut rig = Rig::open(silent);
    for _ in 0..11 {
        rig.pass(secs(10));
        rig.act(|turn| turn.send(&[7; 150]).expect("open"));
    }
    just(&mut rig, secs(10));
    assert_eq!(rig.finish(), CloseReason::IdleTimeout);
}

/// Nor the frame's: a slow sender gets no more time by pending output.
#[test]
fn the_frame_clock_is_not_moved_by_sending_above_the_watermark() {
    let mut rig = Rig::open(silent);
    rig.receive([0]);
    for _ in 0..29 {
        rig.pass(secs(1));
        rig.act(|turn| turn.send(&[7; 150]).expect("open"));
    }
    just(&mut rig, secs(1));
    assert_eq!(rig.finish(), CloseReason::FrameTimeout);
}

/// The peer's clocks are paused while the server does not read.
#[test]
fn a_pause_pauses_the_clocks() {
    let mut rig = Rig::open(silent);
    rig.receive([0]);
    rig.pass(secs(20));
    rig.pause();
    rig.pass(secs(1000));
    assert!(rig.is_open());
    rig.resume();
    rig.receive([1]);
    just(&mut rig, secs(11));
    assert_eq!(rig.finish(), CloseReason::FrameTimeout);

    let mut rig = Rig::open(silent);
    rig.pass(secs(100));
    rig.pause();
    rig.pass(secs(1000));
    assert!(rig.is_open());
    rig.resume();
    just(&mut rig, secs(20));
    assert_eq!(rig.finish(), CloseReason::IdleTimeout);
}

/// A peer that does not read has the write timeout instead.
#[test]
fn congestion_pauses_the_clocks() {
    let mut rig = Rig::open(silent);
    rig.pass(secs(100));
    rig.room = 0;
    rig.act(|turn| turn.send(&[7; 150]).expect("open"));
    for _ in 0..5 {
        rig.pass(secs(19));
        rig.drain_to_peer(20);
    }
    rig.drain_to_peer(1000);
    assert_eq!(rig.events(), [Seen::Writable]);
    just(&mut rig, secs(20));
    assert_eq!(rig.finish(), CloseReason::IdleTimeout);
}

/// The paused clock is that of the frame behind the pause, not of the one before.
#[test]
fn a_frame_that_begins_in_a_pause_has_all_its_time() {
    let mut rig = Rig::open(one_at_a_time);
    rig.receive([0]);
    rig.pass(secs(25));
    rig.receive([1, b'a', 0]);
    assert_eq!(rig.events(), [frame("a")]);
    rig.resume();
    just(&mut rig, secs(30));
    assert_eq!(rig.finish(), CloseReason::FrameTimeout);
}

/// A connection whose peer has finished is idle too: none lives for ever.
#[test]
fn idle_ends_a_half_closed_connection() {
    let mut rig = Rig::open(silent);
    rig.receive_fin();
    just(&mut rig, secs(120));
    assert_eq!(rig.ended(), CloseReason::IdleTimeout);
}

/// A peer that reads nothing is reset.
#[test]
fn write_stall_from_the_first_refusal() {
    let mut rig = Rig::open(echo);
    rig.room = 0;
    rig.pass(secs(5));
    rig.receive(packet2("x"));
    just(&mut rig, secs(20));
    assert_eq!(rig.was_reset(), CloseReason::WriteTimeout);
}

#[test]
fn write_stall_is_moved_only_by_progress() {
    let mut rig = Rig::open(echo);
    rig.room = 0;
    rig.receive(packet2("12345678"));
    rig.pass(secs(19));
    rig.drain_to_peer(4);
    rig.pass(secs(2));
    // More output, more input and a turn without a write are no progress.
    rig.receive(packet2("x"));
    rig.turn();
    rig.act(|turn| turn.send(b"more").expect("room"));
    just(&mut rig, secs(3));
    assert_eq!(rig.was_reset(), CloseReason::WriteTimeout);
}

/// A slow reader has a whole timeout after each stall, if it reads fast enough otherwise.
#[test]
fn output_at_the_minimum_rate_is_never_late() {
    let mut rig = Rig::open(echo);
    rig.room = 0;
    rig.receive(packet2([7; 150]));
    for _ in 0..7 {
        rig.pass(secs(19));
        rig.drain_to_peer(20);
    }
    just(&mut rig, secs(20));
    assert_eq!(rig.was_reset(), CloseReason::WriteTimeout);
}

/// A loop that did not look for long blames the peer for nothing: the kernel's buffer bounds what
/// can be taken meanwhile.
#[test]
fn progress_after_a_blocked_loop_counts_from_then() {
    let mut rig = Rig::open(echo);
    rig.room = 0;
    rig.receive(packet2("12345678"));
    rig.now = rig.now.after(secs(100));
    rig.drain_to_peer(3);
    just(&mut rig, secs(3));
    assert_eq!(rig.was_reset(), CloseReason::WriteTimeout);
}

/// A successful write of zero bytes is no progress.
#[test]
fn zero_bytes_are_no_progress() {
    let mut rig = Rig::open(echo);
    rig.room = 0;
    rig.receive(packet2("x"));
    rig.pass(secs(19));
    rig.machine.handle_sent(0, rig.now, &mut rig.pool);
    rig.pass(secs(1));
    assert_eq!(rig.was_reset(), CloseReason::WriteTimeout);
}

#[test]
fn no_write_deadline_when_all_is_sent() {
    let mut rig = Rig::open(echo);
    rig.room = 2;
    rig.receive(packet2("x"));
    rig.drain_to_peer(100);
    rig.pass(secs(119));
    assert!(rig.is_open());
}

/// Closing does not start the write timeout anew.
#[test]
fn write_stall_while_closing() {
    let mut rig = Rig::open(echo);
    rig.room = 0;
    rig.receive(packet2("x"));
    rig.pass(secs(15));
    rig.close();
    just(&mut rig, secs(5));
    assert_eq!(rig.was_reset(), CloseReason::WriteTimeout);
}

/// Nor does a trickle, which ends here as in every state.
#[test]
fn a_trickle_while_closing() {
    let mut rig = Rig::open(echo);
    rig.room = 0;
    rig.receive(packet2([7; 98]));
    rig.close();
    let mut took = secs(0);
    while rig.gone.is_none() {
        rig.pass(secs(2));
        took += secs(2);
        rig.drain_to_peer(1);
    }
    assert_eq!(took, secs(38));
    assert_eq!(rig.was_reset(), CloseReason::WriteTimeout);
}

#[test]
fn linger_from_fin() {
    let mut rig = Rig::open(echo);
    rig.close();
    rig.pass(secs(1));
    rig.receive("input moves nothing");
    just(&mut rig, secs(1));
    assert_eq!(rig.ended(), CloseReason::Closed);
}

#[test]
fn flushing_has_no_linger_deadline() {
    let mut rig = Rig::open(echo);
    rig.room = 0;
    rig.receive(packet2([7; 98]));
    rig.close();
    for _ in 0..9 {
        rig.pass(secs(9));
        rig.drain_to_peer(10);
    }
    assert!(rig.gone.is_none());
    rig.drain_to_peer(10);
    assert!(rig.fin);
    just(&mut rig, secs(2));
    assert_eq!(rig.ended(), CloseReason::Closed);
}

#[test]
fn never_is_never() {
    let mut rig = Rig::accepted(&Framing::Packet2, no_limits(), None, Box::new(silent));
    assert_eq!(rig.machine.deadline(), Time::NEVER);
    rig.machine.handle_admitted(rig.now);
    rig.turn();
    rig.receive([0]);
    rig.room = 0;
    rig.act(|turn| {
        turn.send(b"x").expect("open");
        turn.set_timer(1, Duration::MAX);
    });
    assert_eq!(rig.machine.deadline(), Time::NEVER);
    rig.pass(secs(u64::MAX / 2_000_000_000));
    assert!(rig.is_open());
    rig.drain_to_peer(usize::MAX);
    rig.close();
    assert!(rig.fin);
    assert_eq!(rig.machine.deadline(), Time::NEVER);
    rig.pass(secs(1_000_000));
    assert!(rig.gone.is_none());
    assert_eq!(rig.finish(), CloseReason::Closed);
}

/// ConnConfig of zero expire at once, without a spin.
#[test]
fn zero_is_at_once() {
    let zero = ConnConfig {
        handshake_timeout: Duration::ZERO,
        frame_timeout: Duration::ZERO,
        idle_timeout: Duration::ZERO,
        write_timeout: Duration::ZERO,
        linger_timeout: Duration::ZERO,
        ..limits()
    };
    let mut rig = Rig::accepted(&Framing::Packet2, zero.clone(), None, Box::new(echo));
    rig.expire();
    assert_eq!(rig.ended(), CloseReason::HandshakeTimeout);
    let mut rig = Rig::open_with(&Framing::Packet2, zero, echo);
    rig.room = 0;
    rig.receive([packet2("x"), vec![0]].concat());
    rig.expire();
    assert_eq!(rig.was_reset(), CloseReason::WriteTimeout);
}

/// A clock that leaps far past every deadline ends the connection once, and nothing overflows.
#[test]
fn deadlines_long_past() {
    let mut rig = Rig::open(echo);
    rig.receive([0]);
    rig.act(|turn| turn.set_timer(3, secs(1)));
    rig.now = Time::from_start(secs(u64::MAX / 1_000_000_000));
    rig.expire();
    assert_eq!(rig.events(), [], "a closing connection has no timers");
    assert_eq!(rig.finish(), CloseReason::FrameTimeout);
}

/// Only deadlines up to `due` expire, though `now` is later.
#[test]
fn later_deadlines_wait_for_the_next_call() {
    let mut rig = Rig::open(echo);
    rig.act(|turn| turn.set_timer(1, secs(5)));
    let due = rig.now.after(secs(4));
    rig.now = rig.now.after(secs(1000));
    rig.machine.handle_timeout(due, rig.now, &mut rig.pool);
    rig.turn();
    assert!(rig.is_open());
    assert_eq!(rig.events(), []);
    rig.receive(packet2("read first"));
    rig.machine.handle_timeout(rig.now, rig.now, &mut rig.pool);
    rig.turn();
    assert_eq!(rig.events(), [frame("read first"), Seen::Timer(1)]);
    assert!(rig.is_open());
}

#[test]
fn timers_fire_in_the_order_of_their_times() {
    let mut rig = Rig::open(silent);
    rig.act(|turn| {
        for (key, after) in [(1, 30), (2, 10), (3, 20), (4, 10)] {
            turn.set_timer(key, secs(after));
        }
        turn.machine.set_timer(4, Time::NEVER);
        turn.set_timer(1, secs(15));
        turn.machine.set_timer(99, Time::NEVER);
    });
    // All are overdue at the first call.
    rig.now = rig.now.after(secs(40));
    rig.expire();
    assert_eq!(
        rig.events(),
        [Seen::Timer(2), Seen::Timer(1), Seen::Timer(3)]
    );
    rig.pass(secs(40));
    assert_eq!(rig.events(), [], "once each");
}

#[test]
fn a_timer_can_be_moved_later_and_cancelled() {
    let mut rig = Rig::open(silent);
    rig.act(|turn| turn.set_timer(1, secs(10)));
    rig.pass(secs(9));
    rig.act(|turn| turn.set_timer(1, secs(10)));
    rig.pass(secs(9));
    assert_eq!(rig.events(), []);
    rig.pass(secs(1));
    assert_eq!(rig.events(), [Seen::Timer(1)]);
    rig.act(|turn| turn.set_timer(1, secs(1)));
    rig.act(|turn| turn.machine.set_timer(1, Time::NEVER));
    rig.pass(secs(10));
    assert_eq!(rig.events(), []);
}

/// A timer that is set to "now" in its own callback fires once per call.
#[test]
fn a_timer_of_zero_does_not_spin() {
    let mut rig = Rig::open(|turn, event| {
        if let Seen::Timer(key) = event {
            turn.set_timer(*key, Duration::ZERO);
        }
        Ok(())
    });
    rig.now = rig.now.after(secs(1));
    rig.act(|turn| turn.set_timer(1, Duration::ZERO));
    rig.expire();
    assert!(rig.events().len() <= 1, "one call, one timer");
    for _ in 0..3 {
        rig.now = rig.now.after(secs(1));
        rig.expire();
        assert_eq!(rig.events(), [Seen::Timer(1)]);
    }
}

/// A pause holds frames back, and no timers.
#[test]
fn timers_fire_while_paused() {
    let mut rig = Rig::open(silent);
    rig.act(|turn| {
        turn.pause();
        turn.set_timer(1, secs(3));
    });
    rig.receive(packet2("waits"));
    rig.pass(secs(3));
    assert_eq!(rig.events(), [Seen::Timer(1)]);
}

/// A drain shortens the handshake's deadline, and never extends it.
#[test]
fn a_drain_shortens_the_handshake() {
    for (until, at) in [(3, 3), (60, 10)] {
        let mut rig = Rig::accepted(&Framing::Packet2, limits(), None, Box::new(echo));
        rig.machine.drain(rig.now.after(secs(until)));
        just(&mut rig, secs(at));
        assert_eq!(rig.ended(), CloseReason::HandshakeTimeout);
    }
}

/// A pause begins, then frames that were buffered before are delivered: that counts as input, and
/// only what follows of the pause extends the idle timeout. The reactor relies on it: input moves
/// the deadline only later.
#[test]
fn a_pause_from_before_the_last_input_counts_from_the_input() {
    let mut rig = Rig::open(one_at_a_time);
    rig.receive([packet2("one"), packet2("two")].concat());
    rig.pass(secs(10));
    rig.machine.postpone(true, rig.now);
    rig.pass(secs(5));
    rig.resume();
    rig.resume();
    let expected = Time::ZERO.after(secs(10 + 120 + 5));
    assert_eq!(rig.machine.deadline(), expected);
}

/// While the server reads nothing for lack of memory, late bytes may be in the kernel.
#[test]
fn late_input_gets_its_whole_time_once_more() {
    for (has_begun, timeout) in [(true, 30), (false, 120)] {
        for early in [0, 1] {
            let mut rig = Rig::open(silent);
            rig.act(|turn| turn.set_timer(1, secs(1000)));
            if has_begun {
                rig.receive([0]);
            }
            rig.now = rig.now.after(secs(timeout - early));
            rig.machine.extend_late_input(rig.now, rig.now);
            rig.expire();
            assert!(rig.is_open(), "{timeout}");
            let left = rig.machine.time_left(rig.now);
            let left = if has_begun { left.frame } else { left.idle };
            let expected = if early == 0 { timeout } else { early };
            assert_eq!(left, Some(secs(expected)), "only late deadlines move");
        }
    }
}
