//! The end: in order or at once, its one reason, flushed, discarded and lost bytes, errors, drain.

use super::*;
use crate::reason::Close;

fn send_then_close(turn: &mut Turn<'_>) {
    turn.send(b"bye").expect("open");
    turn.close();
}

#[test]
fn close_flushes_then_fin_then_waits_for_the_peers() {
    let mut rig = Rig::open(echo);
    rig.room = 1;
    rig.act(send_then_close);
    assert!(!rig.fin, "FIN is behind the output");
    rig.drain_to_peer(100);
    assert_eq!(rig.answers(), packet2("bye"));
    assert!(rig.fin && rig.gone.is_none());
    rig.receive_fin();
    assert_eq!(rig.ended(), CloseReason::Closed);
}

#[test]
fn no_event_follows_close() {
    let mut rig = Rig::open(|turn, event| {
        if let Seen::Frame(_) = event {
            turn.close();
            turn.set_timer(1, secs(0));
            turn.pause();
            turn.resume();
            turn.machine.close_after_input();
            turn.machine.drain(turn.now);
            assert!(matches!(turn.send(b"late"), Err(SendError::Closed)));
        }
        Ok(())
    });
    rig.receive([packet2("one"), packet2("two")].concat());
    rig.receive(packet2("three"));
    rig.pass(secs(1));
    assert_eq!(rig.events(), [frame("one")]);
    assert_eq!(rig.answers(), [0; 0]);
    assert_eq!(rig.finish(), CloseReason::Closed);
}

#[test]
fn the_first_reason_stays() {
    let mut rig = Rig::open(echo);
    rig.close();
    let now = rig.now;
    rig.machine
        .close(Closed::new(CloseReason::Killed), now, &mut rig.pool);
    rig.inbox.push_back(Input::Error(libc::ECONNRESET));
    rig.turn();
    assert_eq!(rig.ended(), CloseReason::Closed, "nothing was lost");
}

#[test]
fn an_error_from_a_callback_is_the_reason_and_is_kept() {
    let mut rig = Rig::open(|_, event| match event {
        Seen::Frame(_) => Err(io::Error::other("disk full").into()),
        _ => Ok(()),
    });
    rig.receive(packet2("x"));
    rig.receive_fin();
    let closed = rig.machine.take_closed();
    assert_eq!(closed.to_string(), "handler failed: disk full");
}

#[test]
fn abort_resets_and_drops_pending_output() {
    let mut rig = Rig::open(|turn, event| {
        if let Seen::Frame(payload) = event {
            turn.send(payload)?;
            return Err(Close::abort());
        }
        Ok(())
    });
    rig.receive(packet2("x"));
    assert_eq!(rig.answers(), [0; 0]);
    assert_eq!(rig.was_reset(), CloseReason::Aborted);
}

/// Input after close is discarded, so that a peer that writes before it reads gets its answers.
#[test]
fn close_discards_up_to_the_linger_bytes() {
    let mut rig = Rig::open(echo);
    rig.room = 0;
    rig.act(send_then_close);
    rig.receive([0; 600]);
    assert!(rig.machine.wants_read());
    rig.drain_to_peer(100);
    rig.receive([0; 400]);
    assert!(rig.gone.is_none(), "1000 are allowed");
    rig.receive([0]);
    assert_eq!(rig.ended(), CloseReason::Closed);
    assert_eq!(rig.machine.traffic().bytes_in, 1001);
}

/// A flood while output is pending stops the reading, not the flushing.
#[test]
fn a_flood_does_not_cut_the_flush_short() {
    let mut rig = Rig::open(echo);
    rig.room = 0;
    rig.act(send_then_close);
    rig.receive([0; 1001]);
    assert!(!rig.machine.wants_read());
    rig.drain_to_peer(100);
    assert_eq!(rig.answers(), packet2("bye"));
    assert!(rig.fin);
    rig.pass(secs(2));
    assert_eq!(rig.ended(), CloseReason::Closed);
}

#[test]
fn shutdown_that_fails_is_the_end() {
    let mut rig = Rig::open(echo);
    let now = rig.now;
    rig.machine.close_by_handler(now, &mut rig.pool);
    rig.flush();
    assert_eq!(rig.machine.next_step(), NextStep::Shutdown);
    rig.machine.handle_shutdown(now, false);
    rig.turn();
    assert_eq!(rig.ended(), CloseReason::Closed);
}

/// Without FIN, and by a kernel that had not sent everything: the peer's end was not the close.
#[test]
fn shutdown_that_fails_over_unsent_output_is_a_reset() {
    for (unsent, reason) in [
        (Some(5), CloseReason::Reset),
        (Some(0), CloseReason::Closed),
        (None, CloseReason::Closed),
    ] {
        let mut rig = Rig::open(echo);
        let now = rig.now;
        rig.machine.close_by_handler(now, &mut rig.pool);
        rig.flush();
        rig.machine.handle_delivery(unsent, now);
        rig.machine.handle_shutdown(now, false);
        rig.turn();
        assert_eq!(rig.ended(), reason, "{unsent:?}");
    }
}

#[test]
fn socket_errors_have_their_reasons() {
    let table = [
        (libc::ECONNRESET, CloseReason::Reset),
        (libc::EPIPE, CloseReason::Reset),
        (libc::ECONNABORTED, CloseReason::Reset),
        (libc::ENOTCONN, CloseReason::Reset),
        (libc::ETIMEDOUT, CloseReason::TimedOut),
        (libc::EHOSTUNREACH, CloseReason::Unreachable),
        (libc::ENETUNREACH, CloseReason::Unreachable),
        (libc::ENETDOWN, CloseReason::Unreachable),
        (libc::EIO, CloseReason::Io),
    ];
    for (errno, reason) in table {
        let mut rig = Rig::open(echo);
        rig.inbox.push_back(Input::Error(errno));
        rig.turn();
        assert_eq!(rig.ended(), reason, "read {errno}");

        let mut rig = Rig::open(echo);
        rig.write_error = Some(errno);
        rig.receive(packet2("x"));
        assert_eq!(rig.ended(), reason, "write {errno}");
    }
}

#[test]
fn an_unknown_socket_error_is_kept() {
    let mut rig = Rig::open(echo);
    rig.inbox.push_back(Input::Error(libc::EIO));
    rig.turn();
    let error = rig.machine.take_closed().error.expect("the error");
    let error = error.downcast_ref::<io::Error>().expect("of the system");
    assert_eq!(error.raw_os_error(), Some(libc::EIO));
}

/// A reset by the peer is the reason in every state.
#[test]
fn reset_in_every_state() {
    let reset = |rig: &mut Rig| {
        rig.inbox.push_back(Input::Error(libc::ECONNRESET));
        rig.turn();
    };
    let mut rig = Rig::open(echo);
    rig.receive([0]);
    reset(&mut rig);
    assert_eq!(rig.ended(), CloseReason::Reset, "in a header");

    let mut rig = Rig::open(echo);
    rig.room = 0;
    rig.receive(packet2("x"));
    reset(&mut rig);
    assert_eq!(rig.ended(), CloseReason::Reset, "with output");

    let mut rig = Rig::open(echo);
    rig.room = 0;
    rig.act(send_then_close);
    reset(&mut rig);
    assert_eq!(
        rig.ended(),
        CloseReason::Reset,
        "closing, and what it was promised is lost"
    );

    let mut rig = Rig::open(echo);
    rig.close();
    reset(&mut rig);
    assert_eq!(
        rig.ended(),
        CloseReason::Closed,
        "closing, with nothing lost"
    );
}

/// "Finished" promises that the peer got every answer: it is not the reason when one was lost.
#[test]
fn lost_output_is_the_reason() {
    let half_closed = || {
        let mut rig = Rig::open(echo);
        rig.room = 0;
        rig.receive(packet2("question"));
        rig.receive_fin();
        assert_eq!(rig.machine.state(), State::Closing);
        rig
    };
    let mut rig = half_closed();
    rig.write_error = Some(libc::EPIPE);
    rig.turn();
    assert_eq!(rig.ended(), CloseReason::Reset, "a write that fails");

    let mut rig = half_closed();
    rig.pass(secs(20));
    assert_eq!(
        rig.was_reset(),
        CloseReason::WriteTimeout,
        "a peer that does not read"
    );

    let mut rig = half_closed();
    rig.machine
        .end(Closed::new(CloseReason::Killed), &mut rig.pool);
    rig.turn();
    assert_eq!(rig.ended(), CloseReason::Killed, "a kill");

    let mut rig = half_closed();
    rig.machine
        .reset(Closed::new(CloseReason::DrainForced), &mut rig.pool);
    rig.turn();
    assert_eq!(
        rig.was_reset(),
        CloseReason::DrainForced,
        "the drain's deadline"
    );
}

/// After a write that fails all received bytes are read and delivered, then the connection ends.
#[test]
fn after_a_write_error_the_rest_is_read() {
    for end in [Some(Input::Fin), Some(Input::Error(libc::ECONNRESET)), None] {
        let mut rig = Rig::open(|turn, event| {
            if let Seen::Frame(payload) = event {
                // The second fails: the peer can receive nothing.
                let _ = turn.send(payload);
            }
            Ok(())
        });
        rig.write_error = Some(libc::EPIPE);
        rig.inbox.push_back(Input::Bytes(packet2("one")));
        rig.inbox.push_back(Input::Bytes(packet2("two")));
        rig.inbox
            .push_back(Input::Bytes([packet2("three"), vec![0]].concat()));
        rig.inbox.extend(end);
        rig.turn();
        assert_eq!(rig.events(), ["one", "two", "three"].map(frame));
        assert_eq!(rig.ended(), CloseReason::Reset);
    }
}

/// As above with an echo: its `send` fails, and the first reason stays.
#[test]
fn an_error_that_follows_from_a_write_error_is_not_the_reason() {
    let mut rig = Rig::open(echo);
    rig.write_error = Some(libc::ETIMEDOUT);
    rig.receive(packet2("one"));
    rig.receive(packet2("two"));
    assert_eq!(rig.ended(), CloseReason::TimedOut);
}

/// Congested, then the write fails: the frames behind the pause are delivered.
#[test]
fn a_write_error_ends_congestion() {
    let mut rig = Rig::open(|turn, event| {
        if let Seen::Frame(_) = event {
            let _ = turn.send(&[0; 150]);
        }
        Ok(())
    });
    rig.room = 0;
    rig.receive([packet2("one"), packet2("two")].concat());
    assert_eq!(rig.events(), [frame("one")]);
    rig.write_error = Some(libc::EPIPE);
    rig.turn();
    assert_eq!(rig.events(), [frame("two")]);
    assert_eq!(rig.ended(), CloseReason::Reset);
}

/// Congested in the middle of a frame, then the write fails: the frame's timeout runs on, although nothing is read yet.
#[test]
fn a_write_error_ends_the_pause_of_the_clocks() {
    let mut rig = Rig::open(echo);
    rig.room = 0;
    rig.receive([0]);
    let sent = rig.machine.send(&[0; 150], rig.now, &mut rig.pool);
    assert!(sent.is_ok() && rig.machine.is_congested());
    let error = io::Error::from_raw_os_error(libc::EPIPE);
    rig.machine
        .handle_write_error(error, false, rig.now, &mut rig.pool);
    assert!(rig.machine.deadline().is_armed());
    let broken = rig.machine.broken_invariant(1_000, true);
    assert_eq!(broken, None);
}

/// Only an empty kernel buffer that is seen after the request counts.
#[test]
fn drain_answers_what_has_arrived() {
    let mut rig = Rig::open(echo);
    rig.receive(packet2("before"));
    rig.machine.drain(rig.now);
    assert!(rig.machine.has_events());
    rig.inbox.push_back(Input::Bytes(packet2("in the kernel")));
    rig.turn();
    assert_eq!(
        rig.events(),
        [frame("before"), Seen::Drain, frame("in the kernel")]
    );
    assert_eq!(
        rig.answers(),
        [packet2("before"), packet2("in the kernel")].concat()
    );
    assert_eq!(rig.finish(), CloseReason::Drained);
}

#[test]
fn drain_waits_for_the_rest_of_a_frame() {
    let mut rig = Rig::open(echo);
    rig.receive(&packet2("frame")[..4]);
    rig.machine.drain(rig.now);
    rig.turn();
    assert!(rig.is_open());
    rig.receive(&packet2("frame")[4..]);
    assert_eq!(rig.answers(), packet2("frame"));
    assert_eq!(rig.finish(), CloseReason::Drained);
}

/// Congested at the drain: all pending output is sent, then FIN.
#[test]
fn drain_with_a_slow_reader() {
    let mut rig = Rig::open(echo);
    rig.room = 0;
    let big = packet2([b'x'; 120]);
    rig.receive([big.clone(), big.clone()].concat());
    rig.inbox.push_back(Input::Bytes(big.clone()));
    rig.machine.drain(rig.now);
    rig.turn();
    for _ in 0..500 {
        rig.drain_to_peer(1);
    }
    assert_eq!(rig.answers(), big.repeat(3));
    assert_eq!(rig.finish(), CloseReason::Drained);
}

#[test]
fn drain_of_a_peer_that_has_finished() {
    let mut rig = Rig::open(|turn, event| match event {
        Seen::Finished => Ok(()),
        event => echo(turn, event),
    });
    rig.receive_fin();
    assert!(rig.is_open());
    rig.machine.drain(rig.now);
    rig.turn();
    assert_eq!(rig.events(), [Seen::Finished, Seen::Drain]);
    assert_eq!(rig.ended(), CloseReason::Finished);
}

/// Drained while accepted: the connection opens, is notified, and its input is answered.
#[test]
fn drain_before_it_is_open() {
    let mut rig = Rig::accepted(&Framing::Packet2, limits(), None, Box::new(echo));
    rig.machine.drain(rig.now.after(secs(1)));
    rig.machine.handle_admitted(rig.now);
    rig.receive(packet2("x"));
    assert_eq!(rig.events(), [Seen::Opened, Seen::Drain, frame("x")]);
    assert_eq!(rig.answers(), packet2("x"));
    assert_eq!(rig.finish(), CloseReason::Drained);
}

#[test]
fn a_handler_may_close_after_input_without_a_drain() {
    let mut rig = Rig::open(|turn, event| {
        if let Seen::Frame(_) = event {
            turn.machine.close_after_input();
        }
        echo(turn, event)
    });
    rig.receive([packet2("one"), packet2("two")].concat());
    assert_eq!(rig.answers(), [packet2("one"), packet2("two")].concat());
    assert_eq!(rig.finish(), CloseReason::Closed);
}

/// Paused at the request to close after input: the input waits, and so does the end.
#[test]
fn close_after_input_waits_for_resume() {
    let mut rig = Rig::open(one_at_a_time);
    rig.receive([packet2("one"), packet2("two")].concat());
    rig.act(|turn| turn.machine.close_after_input());
    assert!(rig.is_open());
    rig.resume();
    assert!(rig.is_open());
    rig.resume();
    assert_eq!(rig.events(), [frame("one"), frame("two")]);
    assert_eq!(rig.finish(), CloseReason::Closed);
}

/// A connection that lingers: it sent its output and FIN, and closed for `Closed`.
fn lingering() -> Rig {
    let mut rig = Rig::open(echo);
    rig.act(send_then_close);
    assert!(rig.fin && rig.gone.is_none());
    rig
}

/// Closed and aborted in one callback, before the kernel was asked: what it was given before may be
/// lost with the rest.
#[test]
fn an_abort_behind_a_close_is_the_reason() {
    for (has_sent, reason) in [(true, CloseReason::Aborted), (false, CloseReason::Closed)] {
        let mut rig = Rig::open(echo);
        if has_sent {
            rig.receive(packet2("hello"));
        }
        rig.machine.close_by_handler(rig.now, &mut rig.pool);
        rig.machine
            .reset(Closed::new(CloseReason::Aborted), &mut rig.pool);
        rig.turn();
        assert_eq!(rig.was_reset(), reason, "{has_sent}");
    }
}

/// Killed, or by the peer, it is reset: what the kernel has not sent is lost, and that is the reason.
#[test]
fn a_reset_loses_what_the_kernel_has_not_sent() {
    for (unsent, is_lost) in [(Some(5), true), (Some(0), false), (None, false)] {
        for by_peer in [false, true] {
            let mut rig = lingering();
            rig.machine.handle_delivery(unsent, rig.now);
            let reset = if by_peer {
                rig.inbox.push_back(Input::Error(libc::ECONNRESET));
                rig.turn();
                CloseReason::Reset
            } else {
                let killed = Closed::new(CloseReason::Killed);
                rig.machine.reset(killed, &mut rig.pool);
                CloseReason::Killed
            };
            let reason = if is_lost { reset } else { CloseReason::Closed };
            assert_eq!(rig.machine.take_closed().reason, reason, "{unsent:?}");
        }
    }
}

/// An end without RST leaves the rest to the kernel.
#[test]
fn an_end_without_reset_loses_nothing() {
    let mut rig = lingering();
    rig.machine.handle_delivery(Some(5), rig.now);
    rig.machine
        .end(Closed::new(CloseReason::Killed), &mut rig.pool);
    assert_eq!(rig.machine.take_closed().reason, CloseReason::Closed);
}

/// The write timeout goes on while the peer's system takes nothing from the kernel.
#[test]
fn the_write_timeout_ends_a_peer_that_leaves_output_in_the_kernel() {
    let mut rig = lingering();
    for _ in 0..20 {
        assert!(rig.gone.is_none());
        rig.machine.handle_delivery(Some(5), rig.now);
        rig.pass(secs(1));
    }
    assert_eq!(rig.gone, Some(true));
    assert_eq!(rig.machine.take_closed().reason, CloseReason::WriteTimeout);
}

/// The linger timeout counts from the time when the peer's system has everything.
#[test]
fn the_linger_begins_once_the_kernel_has_sent_everything() {
    let mut rig = lingering();
    for unsent in [9, 5, 1, 0] {
        rig.machine.handle_delivery(Some(unsent), rig.now);
        rig.pass(Duration::from_millis(1500));
        assert!(rig.gone.is_none(), "{unsent}");
    }
    rig.pass(Duration::from_millis(500));
    assert_eq!(rig.gone, Some(false));
    assert_eq!(rig.ended(), CloseReason::Closed);
}

/// Behind the peer's FIN a connection ends once everything is written, whatever the kernel has.
#[test]
fn the_kernel_is_asked_only_if_something_depends_on_it() {
    for (finished, pending) in [(false, false), (false, true), (true, false), (true, true)] {
        let mut rig = Rig::open(|turn, event| match event {
            Seen::Finished => Ok(()),
            event => echo(turn, event),
        });
        if pending {
            rig.room = 0;
            rig.receive(packet2("x"));
        }
        if finished {
            rig.receive_fin();
        }
        rig.machine.close_by_handler(rig.now, &mut rig.pool);
        assert_eq!(rig.machine.wants_delivery(), pending || !finished);
    }
}

/// Where the kernel does not count unsent bytes, each input proves that the peer lives.
#[test]
fn input_prolongs_the_linger_where_the_kernel_cannot_tell() {
    let mut rig = lingering();
    rig.machine.handle_delivery(None, rig.now);
    for _ in 0..5 {
        rig.pass(Duration::from_millis(1500));
        rig.receive([0]);
        assert!(rig.gone.is_none(), "{:?}", rig.now);
    }
    rig.pass(Duration::from_millis(1999));
    assert!(rig.gone.is_none());
    rig.pass(Duration::from_millis(1));
    assert_eq!(rig.ended(), CloseReason::Closed);
}

/// Not for ever: nothing is known to be lost, so that it ends in order.
#[test]
fn input_prolongs_the_linger_up_to_the_write_timeout() {
    let mut rig = lingering();
    rig.machine.handle_delivery(None, rig.now);
    for _ in 0..19 {
        rig.pass(secs(1));
        rig.receive([0]);
        assert!(rig.gone.is_none(), "{:?}", rig.now);
    }
    rig.pass(secs(1));
    assert_eq!(rig.ended(), CloseReason::Closed);
}

/// A flood stops the reading. The end waits for the output that the kernel still has.
#[test]
fn a_flood_while_lingering_does_not_cut_off_unsent_output() {
    let mut rig = lingering();
    rig.machine.handle_delivery(Some(5), rig.now);
    rig.receive([0; 1001]);
    assert!(rig.gone.is_none() && !rig.machine.wants_read());
    rig.machine.handle_delivery(Some(0), rig.now);
    rig.turn();
    assert_eq!(rig.ended(), CloseReason::Closed);
}
