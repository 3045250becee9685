//! TLS on an open connection: the end in both directions, faults, key updates, slow peers.

use rustls::AlertDescription;

use super::*;

/// The peer's close_notify first, then all answers, then ours.
#[test]
fn close_notify_from_the_peer() {
    for version in VERSIONS {
        let mut talk = Talk::open(version, Box::new(echo));
        talk.say(&packet2("last"));
        talk.client.send_close_notify();
        talk.exchange();
        assert_eq!(talk.rig.events(), [frame("last"), Seen::Finished]);
        assert_eq!(talk.heard(), packet2("last"));
        assert!(talk.goodbye);
        assert_eq!(talk.rig.finish(), CloseReason::Finished);
    }
}

#[test]
fn close_notify_from_us() {
    for version in VERSIONS {
        let mut talk = Talk::open(version, Box::new(echo));
        talk.rig.act(|turn| {
            turn.send(b"bye").expect("open");
            turn.close();
        });
        talk.exchange();
        assert_eq!(talk.heard(), packet2("bye"));
        assert!(talk.goodbye);
        assert!(talk.rig.fin);
        assert_eq!(talk.rig.finish(), CloseReason::Closed);
    }
}

/// RFC 8446 section 6.1 allows writing after the peer's close_notify; RFC 5246 section 7.2.1 does
/// not.
#[test]
fn half_close_depends_on_the_version() {
    let mut talk = Talk::open(&TLS13, Box::new(reticent));
    talk.client.send_close_notify();
    talk.exchange();
    assert!(talk.rig.is_open() && !talk.goodbye);
    talk.rig.act(|turn| turn.send(b"still here").expect("open"));
    talk.exchange();
    assert_eq!(talk.heard(), packet2("still here"));
    talk.rig.close();
    talk.exchange();
    assert!(talk.goodbye);
    assert_eq!(talk.rig.finish(), CloseReason::Finished);

    let mut talk = Talk::open(&TLS12, Box::new(reticent));
    talk.client.send_close_notify();
    talk.exchange();
    assert!(talk.goodbye);
    assert_eq!(talk.rig.events(), [Seen::Finished]);
    assert_eq!(talk.rig.finish(), CloseReason::Finished);
}

/// FIN without close_notify may be an attacker's.
#[test]
fn truncation_is_named() {
    for version in VERSIONS {
        let mut talk = Talk::open(version, Box::new(echo));
        talk.say(&packet2("whole"));
        talk.exchange();
        talk.rig.receive_fin();
        let answer = talk.rig.answers();
        talk.hear(&answer);
        assert_eq!(talk.heard(), packet2("whole"));
        assert!(talk.goodbye, "it gets our goodbye");
        assert_eq!(talk.rig.events(), [frame("whole"), Seen::Finished]);
        assert_eq!(talk.rig.ended(), CloseReason::TlsTruncated);

        // Inside a frame.
        let mut talk = Talk::open(version, Box::new(echo));
        talk.say(&packet2("part")[..3]);
        talk.exchange();
        talk.rig.receive_fin();
        assert_eq!(talk.rig.events(), []);
        assert_eq!(talk.rig.ended(), CloseReason::TlsTruncated);

        // Inside a record.
        let mut talk = Talk::open(version, Box::new(echo));
        talk.say(&packet2("cut"));
        let wire = talk.client_bytes();
        talk.rig.receive(&wire[..wire.len() - 1]);
        talk.rig.receive_fin();
        assert!(!talk.rig.events().contains(&frame("cut")));
        assert_eq!(talk.rig.ended(), CloseReason::TlsTruncated);
    }
}

/// close_notify inside a frame: the peer itself truncated the stream.
#[test]
fn close_notify_inside_a_frame_is_truncated() {
    let mut talk = Talk::open(&TLS13, Box::new(echo));
    talk.say(&packet2("part")[..3]);
    talk.client.send_close_notify();
    talk.exchange();
    assert_eq!(talk.rig.events(), []);
    assert_eq!(talk.rig.finish(), CloseReason::Truncated);
}

/// Bytes behind close_notify are ignored.
#[test]
fn bytes_after_close_notify_are_ignored() {
    let mut talk = Talk::open(&TLS13, Box::new(reticent));
    talk.client.send_close_notify();
    let mut wire = talk.client_bytes();
    wire.extend_from_slice(b"garbage");
    talk.rig.receive(wire);
    assert_eq!(talk.rig.events(), [Seen::Finished]);
    talk.rig.close();
    assert_eq!(talk.rig.finish(), CloseReason::Finished);
}

/// Good records, then garbage: the frames are delivered, and the peer gets the alert. TLS is the
/// reason even if the handler fails to answer.
#[test]
fn garbage_after_good_records() {
    let scripts: [fn() -> Script; 2] = [|| Box::new(echo), || Box::new(silent)];
    for version in VERSIONS {
        for script in scripts {
            let mut talk = Talk::open(version, script());
            talk.say(&packet2("good"));
            let mut wire = talk.client_bytes();
            wire.extend_from_slice(&[23, 3, 3, 0, 40]);
            wire.extend_from_slice(&[0xAA; 40]);
            talk.rig.receive(wire);
            assert_eq!(talk.rig.events(), [frame("good")]);
            let alert = talk.rig.answers();
            talk.client.read_tls(&mut alert.as_slice()).expect("memory");
            match talk.client.process_new_packets() {
                Err(rustls::Error::AlertReceived(AlertDescription::BadRecordMac)) => {}
                other => panic!("{other:?}"),
            }
            assert!(talk.rig.fin);
            // A session that has failed is not driven again.
            talk.rig
                .receive([&[23, 3, 3, 0, 40][..], &[0xBB; 40]].concat());
            assert_eq!((talk.rig.events(), talk.rig.answers()), (vec![], vec![]));
            talk.rig.receive_fin();
            let closed = talk.rig.machine.take_closed();
            assert_eq!(closed.reason, CloseReason::Tls, "{closed}");
            assert!(closed.error.expect("an error").is::<rustls::Error>());
        }
    }
}

/// The same in the read that ends the handshake: the connection opened, and TLS failed then.
#[test]
fn garbage_right_behind_the_handshake() {
    for together in [true, false] {
        let mut talk = Talk::new(&TLS13, Box::new(silent));
        let hello = talk.client_bytes();
        talk.rig.receive(hello);
        let answer = talk.rig.answers();
        talk.hear(&answer);
        talk.say(&packet2("good"));
        let good = talk.client_bytes();
        let garbage = [&[23, 3, 3, 0, 40][..], &[0xAA; 40]].concat();
        if together {
            talk.rig.receive([good, garbage].concat());
        } else {
            talk.rig.receive(good);
            talk.rig.receive(garbage);
        }
        assert_eq!(talk.rig.events(), [Seen::Opened, frame("good")]);
        assert_eq!(talk.rig.finish(), CloseReason::Tls);
    }
}

#[test]
fn a_key_update_is_answered() {
    let mut talk = Talk::open(&TLS13, Box::new(echo));
    for round in 0..3_u8 {
        talk.client.refresh_traffic_keys().expect("open");
        talk.say(&packet2([round]));
        talk.exchange();
        assert_eq!(talk.heard(), packet2([round]));
        // Ours is sent with the answer; from then on both directions use new keys.
        talk.say(&packet2("after"));
        talk.exchange();
        assert_eq!(talk.heard(), packet2("after"));
    }
}

/// The update and the record behind it arrive in single bytes.
#[test]
fn a_key_update_one_byte_at_a_time() {
    let mut talk = Talk::open(&TLS13, Box::new(echo));
    talk.cut = 1;
    talk.client.refresh_traffic_keys().expect("open");
    talk.say(&packet2("new keys"));
    talk.exchange();
    assert_eq!(talk.heard(), packet2("new keys"));
}

/// Large payloads both ways, through a kernel that takes few bytes at once.
#[test]
fn large_payloads_in_tiny_writes() {
    for version in VERSIONS {
        let identity = Identity::new();
        let limits = ConnConfig {
            output_limit: 1 << 20,
            ..limits()
        };
        let mut talk = Talk::with(
            identity.server(),
            identity.client(version),
            limits,
            Box::new(echo),
        );
        talk.client.set_buffer_limit(None);
        talk.exchange();
        talk.rig.piece = 61;
        talk.cut = 5000;
        let frames: Vec<Vec<u8>> = (0..6_u8)
            .map(|n| packet2(vec![n; 65_000 - usize::from(n)]))
            .collect();
        for frame in &frames {
            talk.say(frame);
        }
        talk.exchange();
        assert!(
            talk.heard() == frames.concat(),
            "every byte, once, in order"
        );
        assert_eq!(talk.rig.machine.buffered(), 0);
    }
}

/// A large frame is encrypted where its payload is: only what does not fit at once is queued.
#[test]
fn a_large_frame_is_encrypted_past_the_queue() {
    for version in VERSIONS {
        let identity = Identity::new();
        let limits = ConnConfig {
            output_limit: 1 << 20,
            ..limits()
        };
        let (server, client) = (identity.server(), identity.client(version));
        let mut talk = Talk::with(server, client, limits, Box::new(echo));
        talk.exchange();
        let payload: Vec<u8> = (0..65_535).map(|at| (at % 251) as u8).collect();
        for kind in [
            vec![Chunk::Borrowed(&payload)],
            vec![
                Chunk::Borrowed(&payload[..3]),
                Chunk::Owned(payload[3..].to_vec()),
            ],
        ] {
            let (mut chunks, rig) = (kind, &mut talk.rig);
            let frame = rig.machine.frame(&mut chunks, 8, rig.now, &mut rig.pool);
            let mut frame = frame.expect("it may be so long");
            frame.taken += rig.machine.encrypt_frame(&frame, rig.now, &mut rig.pool);
            let more = rig.machine.encrypt_frame(&frame, rig.now, &mut rig.pool);
            assert_eq!(more, 0, "ciphertext is pending");
            rig.machine.queue_frame(frame, rig.now, &mut rig.pool);
            assert_eq!(rig.machine.parts().send_buf.len(), 1, "the last byte");
            rig.act(|turn| turn.send(b"behind").expect("room"));
            talk.exchange();
            let expected = [packet2(&payload), packet2("behind")].concat();
            assert!(talk.heard() == expected, "every byte, once, in order");
        }
    }
}

/// TLS 1.2 closes once the end is reported (RFC 5246 section 7.2.1), also if the handler pauses
/// there and is resumed from elsewhere.
#[test]
fn a_pause_in_on_finish_does_not_keep_tls_1_2_open() {
    let script = |turn: &mut Turn<'_>, event: &Seen| {
        if *event == Seen::Finished {
            turn.pause();
        }
        Ok(())
    };
    let mut talk = Talk::open(&TLS12, Box::new(script));
    talk.client.send_close_notify();
    talk.exchange();
    assert_eq!(talk.rig.events(), [Seen::Finished]);
    talk.rig.resume();
    talk.exchange();
    assert!(talk.goodbye);
    assert_eq!(talk.rig.finish(), CloseReason::Finished);
}

/// Session tickets are pending when the connection opens: they do not count as the handler's
/// output.
#[test]
fn tickets_do_not_fill_the_output() {
    for version in VERSIONS {
        let identity = Identity::new();
        let limits = ConnConfig {
            low_watermark: 10,
            high_watermark: 60,
            output_limit: 60,
            ..limits()
        };
        let script = |turn: &mut Turn<'_>, event: &Seen| match event {
            Seen::Opened => Ok(turn.send(b"welcome")?),
            event => echo(turn, event),
        };
        let mut talk = Talk::with(
            identity.server(),
            identity.client(version),
            limits,
            Box::new(script),
        );
        talk.say(&packet2("first"));
        talk.exchange();
        assert_eq!(
            talk.rig.events(),
            [Seen::Opened, frame("first")],
            "no peer was slow"
        );
        assert_eq!(
            talk.heard(),
            [packet2("welcome"), packet2("first")].concat()
        );
    }
}

/// The bytes that encryption adds congest no connection when an option changes other than the
/// watermarks.
#[test]
fn a_change_of_options_fills_no_output() {
    let limits = ConnConfig {
        low_watermark: 10,
        high_watermark: 60,
        output_limit: 60,
        ..limits()
    };
    let identity = Identity::new();
    let (server, client) = (identity.server(), identity.client(&TLS13));
    let mut talk = Talk::with(server, client, limits, Box::new(echo));
    talk.exchange();
    // A record is begun.
    talk.rig.room = 1;
    talk.say(&packet2([7; 50]));
    let bytes = talk.client_bytes();
    talk.rig.receive(&bytes);
    assert!(talk.rig.machine.unsent_app_bytes() > 60, "encrypted");
    let now = talk.rig.now;
    let changed = (talk.rig.machine).reconfigure(|conn| conn.max_frame = Some(55), now);
    changed.expect("an open connection, and a good value");
    assert!(!talk.rig.machine.is_congested());
    talk.rig.drain_to_peer(1000);
    assert_eq!(talk.rig.events(), [Seen::Opened, frame([7; 50])]);
}

/// A client that reads nothing: pending output stays bounded, and all of it arrives in the end.
#[test]
fn a_slow_reader_over_tls() {
    let mut talk = Talk::open(&TLS13, Box::new(echo));
    talk.rig.room = 0;
    let wire: Vec<u8> = (0..50_u8).flat_map(|n| packet2([n; 60])).collect();
    talk.say(&wire);
    let bytes = talk.client_bytes();
    for piece in bytes.chunks(1000) {
        talk.rig.receive(piece);
        assert!(talk.rig.machine.queued() <= 200 + 62 + 64);
    }
    assert!(!talk.rig.machine.wants_read());
    for _ in 0..10_000 {
        talk.rig.drain_to_peer(10);
    }
    talk.exchange();
    assert_eq!(talk.heard(), wire);
}

/// Frames and close_notify in one read, taken one at a time: the end does not drop a frame.
#[test]
fn one_at_a_time_with_the_end_in_the_same_read() {
    let script = |turn: &mut Turn<'_>, event: &Seen| {
        match event {
            Seen::Frame(_) => {
                turn.pause();
                turn.set_timer(1, secs(1));
            }
            Seen::Timer(_) => turn.resume(),
            Seen::Finished => turn.close(),
            _ => {}
        }
        Ok(())
    };
    for version in VERSIONS {
        let mut talk = Talk::open(version, Box::new(script));
        talk.say(&[packet2("one"), packet2("two"), packet2("three")].concat());
        talk.client.send_close_notify();
        talk.exchange();
        for _ in 0..3 {
            talk.rig.pass(secs(1));
        }
        let mut event = talk.rig.events();
        event.retain(|event| *event != Seen::Timer(1));
        assert_eq!(
            event,
            [frame("one"), frame("two"), frame("three"), Seen::Finished]
        );
        assert_eq!(talk.rig.finish(), CloseReason::Finished);
    }
}

#[test]
fn drain_over_tls() {
    let mut talk = Talk::open(&TLS13, Box::new(echo));
    talk.say(&packet2("in the kernel"));
    let wire = talk.client_bytes();
    talk.rig.machine.drain(talk.rig.now);
    talk.rig.receive(wire);
    let answer = talk.rig.answers();
    talk.hear(&answer);
    assert_eq!(talk.heard(), packet2("in the kernel"));
    assert!(talk.goodbye);
    assert_eq!(talk.rig.finish(), CloseReason::Drained);
}

/// As in the clear: all received bytes are delivered, also a record that had begun before the write
/// failed.
#[test]
fn after_a_write_error_the_rest_is_read() {
    for version in VERSIONS {
        let deaf = |turn: &mut Turn<'_>, event: &Seen| {
            if let Seen::Frame(payload) = event {
                let _ = turn.send(payload);
            }
            Ok(())
        };
        let mut talk = Talk::open(version, Box::new(deaf));
        talk.say(&packet2("one"));
        let mut wire = talk.client_bytes();
        let begun = wire.len() + 7;
        talk.say(&packet2("two"));
        wire.extend(talk.client_bytes());
        talk.rig.write_error = Some(libc::EPIPE);
        let (read, rest) = wire.split_at(begun);
        talk.rig.inbox.push_back(Input::Bytes(read.to_vec()));
        talk.rig.inbox.push_back(Input::Bytes(rest.to_vec()));
        talk.rig.turn();
        assert_eq!(talk.rig.events(), ["one", "two"].map(frame));
        assert_eq!(talk.rig.ended(), CloseReason::Reset);
    }
}

/// A client that has left its tickets unread sends RST behind its close_notify. It has said that it
/// finished, and nothing but our close_notify is lost.
#[test]
fn a_reset_behind_the_peers_close_notify_is_a_good_end() {
    for version in VERSIONS {
        for noticed_by_read in [false, true] {
            let mut talk = Talk::open(version, Box::new(echo));
            talk.client.send_close_notify();
            let wire = talk.client_bytes();
            if noticed_by_read {
                talk.rig.room = 0;
            } else {
                talk.rig.write_error = Some(libc::ECONNRESET);
            }
            talk.rig.inbox.push_back(Input::Bytes(wire));
            talk.rig.inbox.push_back(Input::Error(libc::ECONNRESET));
            talk.rig.turn();
            assert_eq!(talk.rig.events(), [Seen::Finished]);
            assert_eq!(talk.rig.ended(), CloseReason::Finished);
        }
    }
}

/// The same with an answer pending: it is lost, and that is the reason.
#[test]
fn a_reset_under_an_answer_is_a_reset() {
    for version in VERSIONS {
        let mut talk = Talk::open(version, Box::new(echo));
        talk.say(&packet2("answer me"));
        talk.client.send_close_notify();
        let wire = talk.client_bytes();
        talk.rig.room = 0;
        talk.rig.inbox.push_back(Input::Bytes(wire));
        talk.rig.inbox.push_back(Input::Error(libc::ECONNRESET));
        talk.rig.turn();
        assert_eq!(talk.rig.ended(), CloseReason::Reset);
    }
}

/// An end of ours that a reset meets keeps its reason, if only our close_notify is lost.
#[test]
fn a_reset_under_our_close_notify_loses_nothing() {
    for version in VERSIONS {
        let mut talk = Talk::open(version, Box::new(reticent));
        talk.rig.room = 0;
        talk.rig.pass(secs(120));
        talk.rig.inbox.push_back(Input::Error(libc::ECONNRESET));
        talk.rig.turn();
        assert_eq!(talk.rig.ended(), CloseReason::IdleTimeout);
    }
}
