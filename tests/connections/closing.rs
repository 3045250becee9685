//! A connection ends once, for one reason, and an orderly end loses nothing.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Duration;

use kit::net::{
    await_end, connect, eventually, local, packet2, ping, read_to_end, recv2, reset, send2,
    turns_until, ReadSome,
};
use kit::script::{connect_narrow, fill, spawn_script, usual, Call, Entry};
use portcullis::sim::Sim;
use portcullis::{
    Close, CloseReason, Closed, Config, ConnId, Context, Framing, Handler, Listen, Outcome, Server,
    State,
};

/// A long answer to every frame.
static ANSWER: [u8; 60_000] = [0x5A; 60_000];

/// The peer resets at every point of a connection's life.
#[test]
fn a_reset_in_every_state() {
    let listen = local().with(|listen| listen.socket.send_buffer = Some(16 * 1024));
    let (server, journal) = spawn_script(Config::new(), listen, |cx, call| match call {
        Call::Frame(b"flood") => {
            for _ in 0..16 {
                cx.conn.send(ANSWER)?;
            }
            Ok(())
        }
        Call::Frame(b"close") => {
            cx.conn.close();
            Ok(())
        }
        Call::Frame(b"close under output") => {
            for _ in 0..16 {
                cx.conn.send(ANSWER)?;
            }
            cx.conn.close();
            Ok(())
        }
        // Stays open to send on.
        Call::Finish => {
            cx.conn.set_timer(1, Duration::from_millis(1));
            Ok(())
        }
        Call::Timer(_) => {
            for _ in 0..16 {
                cx.conn.send(ANSWER)?;
            }
            Ok(())
        }
        call => usual(cx, call),
    });
    let addr = server.addr();
    let ended = |count: usize, reason: CloseReason| {
        assert_eq!(
            journal.until_closed(count).last(),
            Some(&reason),
            "number {count}"
        );
    };
    // Connected.
    reset(server.connect_open());
    ended(1, CloseReason::Reset);
    // In a header.
    let mut client = connect(addr);
    client.write_all(&[0]).expect("write");
    server.until("it arrives", |stats| stats.traffic.bytes_in == 1);
    reset(client);
    ended(2, CloseReason::Reset);
    // In a frame.
    let mut client = connect(addr);
    client.write_all(b"\x00\x09part").expect("write");
    server.until("it arrives", |stats| stats.traffic.bytes_in == 7);
    reset(client);
    ended(3, CloseReason::Reset);
    // Between two echoes.
    let mut client = connect(addr);
    ping(&mut client, b"echo");
    reset(client);
    ended(4, CloseReason::Reset);
    // With more output waiting than the kernel takes, and input unread behind it.
    let mut client = connect_narrow(addr);
    send2(&mut client, b"flood");
    for _ in 0..10 {
        send2(&mut client, b"flood");
    }
    eventually("output waits", || {
        server.ask(|(), control| {
            control
                .connections()
                .iter()
                .any(|info| info.queued > 128 * 1024)
        })
    });
    reset(client);
    ended(5, CloseReason::Reset);
    // Half-closed, with output on its way.
    let mut client = connect_narrow(addr);
    send2(&mut client, b"echo");
    client.shutdown(Shutdown::Write).expect("FIN");
    eventually("output waits", || {
        server.ask(|(), control| {
            control
                .connections()
                .iter()
                .any(|info| info.queued > 128 * 1024)
        })
    });
    reset(client);
    ended(6, CloseReason::Reset);
    // Closing, all flushed: the goodbye is complete, and the reason is its own.
    let mut client = connect(addr);
    send2(&mut client, b"close");
    assert_eq!(read_to_end(&mut client), b"");
    reset(client);
    ended(7, CloseReason::Closed);
    // Closing, with output that will never arrive: that is what must be reported.
    let mut client = connect_narrow(addr);
    send2(&mut client, b"close under output");
    eventually("it closes", || {
        server.ask(|(), control| {
            control
                .connections()
                .iter()
                .any(|info| info.state == State::Closing)
        })
    });
    reset(client);
    ended(8, CloseReason::Reset);
    journal.assert_whole_lives();
    let (stats, ()) = server.finish();
    assert_eq!(
        (stats.accepted, stats.closed_total(), stats.opened),
        (8, 8, 8)
    );
}

/// A peer that half-closed and then resets is gone, although nothing is sent or read any more.
#[test]
fn a_reset_after_the_finish_is_noticed() {
    let (server, journal) = spawn_script(Config::new(), local(), |cx, call| match call {
        Call::Finish => Ok(()),
        call => usual(cx, call),
    });
    let mut client = connect(server.addr());
    ping(&mut client, b"hello");
    client.shutdown(Shutdown::Write).expect("FIN");
    eventually("it has finished", || journal.count(&Entry::Finish) == 1);
    reset(client);
    assert_eq!(journal.until_closed(1), [CloseReason::Reset]);
}

/// A connection that is reset in the backlog is dropped and counted.
#[test]
fn a_reset_in_the_accept_queue() {
    let (server, journal) = spawn_script(Config::new(), local(), usual);
    let still = kit::net::hold(&server.handle);
    for _ in 0..50 {
        reset(connect(server.addr()));
    }
    drop(still);
    let mut client = connect(server.addr());
    ping(&mut client, b"served");
    drop(client);
    server.until("all are gone", |stats| {
        stats.open == 0 && stats.closed(CloseReason::Finished) == 1
    });
    journal.assert_whole_lives();
    let (stats, ()) = server.finish();
    assert_eq!(stats.accepted, stats.closed_total());
}

/// A client that half-closes after sending gets every echo, then FIN.
#[test]
fn half_close_gets_every_echo() {
    let (server, journal) = spawn_script(Config::new(), local(), usual);
    let mut client = connect(server.addr());
    let mut wire = Vec::new();
    for number in 0..500u32 {
        wire.extend(packet2(&number.to_be_bytes()));
    }
    client.write_all(&wire).expect("write");
    client.shutdown(Shutdown::Write).expect("FIN");
    assert_eq!(read_to_end(&mut client), wire);
    assert_eq!(journal.until_closed(1), [CloseReason::Finished]);
    journal.assert_whole_lives();
}

/// The FIN comes behind answers that fit into no buffer, and the client begins to read late. With
/// less data the kernel's buffers would hide a lost answer.
#[test]
fn answers_that_fit_in_no_buffer_come_behind_a_fin() {
    const FRAMES: usize = 300;
    let (server, journal) = spawn_script(Config::new(), local(), |cx, call| match call {
        Call::Frame(_) => {
            cx.conn.send(ANSWER)?;
            Ok(())
        }
        call => usual(cx, call),
    });
    let mut client = connect_narrow(server.addr());
    for _ in 0..FRAMES {
        send2(&mut client, b"?");
    }
    client.shutdown(Shutdown::Write).expect("FIN");
    eventually("output waits", || {
        server.ask(|(), control| control.connections().iter().any(|info| info.queued > 0))
    });
    let mut received = 0;
    while received < FRAMES {
        assert!(recv2(&mut client) == ANSWER);
        received += 1;
    }
    assert_eq!(read_to_end(&mut client), b"");
    assert_eq!(journal.until_closed(1), [CloseReason::Finished]);
}

/// A handler that does not close at the peer's FIN may still send.
#[test]
fn a_handler_may_go_on_after_the_peer_finished() {
    let (server, journal) = spawn_script(Config::new(), local(), |cx, call| match call {
        Call::Finish => {
            cx.conn.set_timer(1, Duration::from_millis(5));
            Ok(())
        }
        Call::Timer(key) if key < 4 => {
            cx.conn.send([key])?;
            cx.conn.set_timer(key + 1, Duration::from_millis(5));
            Ok(())
        }
        Call::Timer(_) => {
            cx.conn.close();
            Ok(())
        }
        call => usual(cx, call),
    });
    let mut client = server.connect_open();
    client.shutdown(Shutdown::Write).expect("FIN");
    assert_eq!(
        read_to_end(&mut client),
        b"\x00\x01\x01\x00\x01\x02\x00\x01\x03"
    );
    assert_eq!(journal.until_closed(1), [CloseReason::Finished]);
    assert_eq!(journal.count(&Entry::Finish), 1);
}

/// Whole frames before the FIN are answered, the part is dropped, and `on_finish` is not called.
#[test]
fn a_fin_inside_a_frame() {
    for part in [&b"\x00"[..], b"\x00\x05", b"\x00\x05hell"] {
        let (server, journal) = spawn_script(Config::new(), local(), usual);
        let mut client = connect(server.addr());
        let mut wire = Vec::new();
        for number in 0..100u32 {
            wire.extend(packet2(&number.to_be_bytes()));
        }
        client.write_all(&wire).expect("write");
        client.write_all(part).expect("write");
        client.shutdown(Shutdown::Write).expect("FIN");
        assert_eq!(read_to_end(&mut client), wire);
        assert_eq!(journal.until_closed(1), [CloseReason::Truncated]);
        assert_eq!(journal.count(&Entry::Finish), 0);
    }
}

/// traps "lingering close": the peer reads slowly and keeps sending, which a plain close answers with RST.
#[test]
fn an_orderly_close_reaches_a_slow_reader_that_keeps_sending() {
    const FRAMES: usize = 40;
    let (server, journal) = spawn_script(
        Config::new(),
        local().with(|listen| {
            listen.conn.output_limit = 8 * 1024 * 1024;
            listen.socket.recv_buffer = Some(16 * 1024);
        }),
        |cx, call| match call {
            Call::Frame(b"all of it") => {
                for _ in 0..FRAMES {
                    cx.conn.send(ANSWER)?;
                }
                cx.conn.close();
                Ok(())
            }
            call => usual(cx, call),
        },
    );
    let mut client = connect_narrow(server.addr());
    send2(&mut client, b"all of it");
    eventually("it closes", || {
        server.ask(|(), control| {
            control
                .connections()
                .iter()
                .any(|info| info.state == State::Closing)
        })
    });
    for _ in 0..FRAMES {
        // The bytes are discarded, but they must not destroy the server's output.
        client.write_all(&[1; 250_000]).expect("still open");
        assert!(recv2(&mut client) == ANSWER);
    }
    assert_eq!(read_to_end(&mut client), b"");
    drop(client);
    assert_eq!(journal.until_closed(1), [CloseReason::Closed]);
    // Bytes after the close were read, and not delivered.
    assert_eq!(journal.count(&Entry::Frame), 1);
}

/// The kernel has the whole answer at once, the peer reads it bit by bit and goes on writing. The
/// linger timeout does not run meanwhile: a close would make RST of the peer's next byte.
#[test]
fn the_linger_begins_once_the_peer_has_everything() {
    const LENGTH: usize = 100_000;
    const STEPS: usize = 25;
    struct Answers;
    impl Handler for Answers {
        fn on_frame(&mut self, cx: &mut Context<'_>, _: &[u8]) -> Outcome {
            cx.conn.send([7; LENGTH])?;
            cx.conn.close();
            Ok(())
        }
    }
    fn talk(server: &mut Server, mut client: impl Read + Write) {
        client.write_all(b"get\n").expect("write");
        turns_until(server, &mut (), |server, ()| {
            server.control().stats().traffic.bytes_out >= LENGTH as u64
        });
        let mut part = [0; LENGTH / STEPS];
        for _ in 0..STEPS {
            client.write_all(b"ping\n").expect("it is not closed");
            client.read_exact(&mut part).expect("the answer");
            // The ping, and a look at the kernel's bytes.
            for _ in 0..2 {
                server
                    .poll_once(&mut (), Some(Duration::from_secs(1)))
                    .expect("poll");
            }
        }
        assert_eq!(client.read_some(&mut part).expect("the end"), 0);
        drop(client);
        turns_until(server, &mut (), |server, ()| {
            server.control().stats().closed_total() > 0
        });
        assert_eq!(server.control().stats().closed(CloseReason::Closed), 1);
    }
    let options = |listen: &mut Listen| {
        listen.framing = Framing::Line;
        listen.socket.send_buffer = Some(1024 * 1024);
        listen.conn.linger_timeout = Duration::from_millis(10);
    };
    let mut server = Server::new(Config::new()).expect("server");
    let listener = server
        .listen(local().with(options), |_: &mut (), _| Answers)
        .expect("listen");
    let addr = server
        .control()
        .listener(listener)
        .expect("it is there")
        .addr;
    talk(&mut server, connect_narrow(addr.as_tcp().expect("TCP")));

    let name = format!("portcullis-linger-{}", std::process::id());
    let path = std::env::temp_dir().join(name);
    let mut server = Server::new(Config::new()).expect("server");
    server
        .listen(
            Listen::unix(&path, Framing::Line).with(options),
            |_: &mut (), _| Answers,
        )
        .expect("listen");
    talk(&mut server, UnixStream::connect(&path).expect("connect"));
}

/// The peer writes everything before it reads anything, and we close in the middle of it.
#[test]
fn a_close_does_not_block_a_peer_that_writes_first() {
    let (server, journal) = spawn_script(Config::new(), local(), |cx, call| match call {
        Call::Frame(_) => {
            cx.conn.send(b"enough")?;
            Err(Close::new())
        }
        call => usual(cx, call),
    });
    let mut client = connect(server.addr());
    let mut writer = client.try_clone().expect("clone");
    let writing = thread::spawn(move || writer.write_all(&vec![0; 8 * 1024 * 1024]));
    writing.join().expect("joined").expect("all written");
    assert_eq!(read_to_end(&mut client), packet2(b"enough"));
    drop(client);
    assert_eq!(journal.until_closed(1), [CloseReason::Closed]);
}

/// More than the linger's bytes: the patience with a peer that never ends is bounded.
#[test]
fn lingering_is_bounded_in_bytes() {
    let listen = local().with(|listen| {
        listen.conn.linger_timeout = Duration::MAX;
        listen.conn.linger_bytes = 100_000;
    });
    let (server, journal) = spawn_script(Config::new(), listen, |cx, call| match call {
        Call::Frame(_) => Err(Close::new()),
        call => usual(cx, call),
    });
    let mut client = connect(server.addr());
    send2(&mut client, b"bye");
    assert_eq!(read_to_end(&mut client), b"");
    let refused = (0..10_000).find_map(|_| client.write_all(&[0; 10_000]).err());
    let refused = refused.expect("a hundred megabytes are too many").kind();
    assert!(
        matches!(refused, ErrorKind::ConnectionReset | ErrorKind::BrokenPipe),
        "{refused}"
    );
    assert_eq!(journal.until_closed(1), [CloseReason::Closed]);
}

#[test]
fn an_abort_is_a_reset() {
    let (server, journal) = spawn_script(Config::new(), local(), |cx, call| match call {
        Call::Frame(b"conn") => {
            cx.conn.send(b"lost")?;
            cx.conn.abort();
            // It is over for the handler too.
            assert!(cx.conn.send(b"more").is_err());
            Ok(())
        }
        Call::Frame(b"close") => Err(Close::abort()),
        call => usual(cx, call),
    });
    for how in [&b"conn"[..], b"close"] {
        let mut client = connect(server.addr());
        send2(&mut client, how);
        let error = client.read_some(&mut [0; 16]).expect_err("RST");
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    }
    assert_eq!(journal.until_closed(2), [CloseReason::Aborted; 2]);
}

#[test]
fn a_kill_by_id_ends_one_and_leaves_the_others() {
    let (server, journal) = spawn_script(Config::new(), local(), usual);
    let mut clients: Vec<_> = (0..3).map(|_| connect(server.addr())).collect();
    for client in &mut clients {
        ping(client, b"hello");
    }
    let local_addr = clients[1].local_addr().expect("addr");
    let id = server.ask(move |(), control| {
        control
            .connections()
            .iter()
            .find(|info| info.peer == local_addr)
            .map(|info| info.id)
    });
    let id = id.expect("it is there");
    server.handle.kill(id).expect("alive");
    assert_eq!(
        clients[1].read_some(&mut [0; 16]).expect_err("RST").kind(),
        ErrorKind::ConnectionReset
    );
    assert_eq!(journal.until_closed(1), [CloseReason::Killed]);
    ping(&mut clients[0], b"still here");
    ping(&mut clients[2], b"still here");
    eventually("the id is dead", || !server.handle.is_live(id));
    assert!(
        server.handle.kill(id).is_err(),
        "never the next tenant of its place"
    );
}

/// A kill of what is closing, with answers on their way, is a kill; after the last byte it is only an end.
#[test]
fn a_kill_while_closing() {
    let listen = local().with(|listen| listen.socket.send_buffer = Some(16 * 1024));
    let (server, journal) = spawn_script(Config::new(), listen, |cx, call| match call {
        Call::Frame(_) => {
            for _ in 0..16 {
                cx.conn.send(ANSWER)?;
            }
            Err(Close::new())
        }
        call => usual(cx, call),
    });
    let mut client = connect_narrow(server.addr());
    send2(&mut client, b"?");
    eventually("it closes", || {
        server.ask(|(), control| {
            control
                .connections()
                .iter()
                .any(|info| info.state == State::Closing)
        })
    });
    assert!(server.ask(|(), control| {
        let id = control.connections()[0].id;
        control.kill(id)
    }));
    assert_eq!(journal.until_closed(1), [CloseReason::Killed]);
    await_end(&mut client);
}

/// Answers what has come and then closes: [`portcullis::Conn::close_after_input`], from each place it can be called.
#[test]
fn close_after_input_answers_what_has_come_and_ends() {
    let (server, journal) = spawn_script(Config::new(), local(), |cx, call| match call {
        Call::Frame(b"frame") => {
            cx.conn.close_after_input();
            cx.conn.send(b"frame")?;
            Ok(())
        }
        Call::Frame(b"timer") => {
            cx.conn.set_timer(0, Duration::from_millis(20));
            Ok(())
        }
        Call::Timer(_) | Call::Message(_) => {
            cx.conn.close_after_input();
            Ok(())
        }
        call => usual(cx, call),
    });
    // From on_frame: the frames behind it are answered too.
    let mut client = connect(server.addr());
    let wire = [packet2(b"frame"), packet2(b"one"), packet2(b"two")].concat();
    client.write_all(&wire).expect("write");
    assert_eq!(read_to_end(&mut client), wire);
    drop(client);
    // From on_timer, when the last read was long ago.
    let mut client = connect(server.addr());
    send2(&mut client, b"timer");
    assert_eq!(read_to_end(&mut client), b"");
    drop(client);
    // From on_message, and from a job.
    let mut client = connect(server.addr());
    ping(&mut client, b"hello");
    let id = server.ask(|(), control| control.connections()[0].id);
    server.handle.notify(id, ()).expect("alive");
    assert_eq!(read_to_end(&mut client), b"");
    drop(client);
    eventually("it has gone", || !server.handle.is_live(id));
    let mut client = connect(server.addr());
    ping(&mut client, b"hello");
    server.ask(|(), control| {
        let id = control.connections()[0].id;
        control.conn(id).expect("there").close_after_input();
    });
    assert_eq!(read_to_end(&mut client), b"");
    drop(client);
    assert_eq!(journal.until_closed(4), [CloseReason::Closed; 4]);
}

/// One life each, whatever ends it.
#[test]
fn every_end_has_one_reason_and_one_goodbye() {
    let listen = local().with(|listen| {
        listen.framing = Framing::Packet2;
        listen.conn.max_frame = Some(100);
        listen.conn.linger_timeout = Duration::from_millis(50);
        listen.conn.linger_bytes = 1024 * 1024;
    });
    let (server, journal) = spawn_script(Config::new(), listen, |cx, call| match call {
        Call::Frame(b"close") => Err(Close::new()),
        Call::Frame(b"abort") => Err(Close::abort()),
        Call::Frame(b"fail") => Err(Close::because("no")),
        Call::Frame(b"panic") => panic!("as asked"),
        Call::Frame(b"twice") => {
            cx.conn.close();
            cx.conn.close();
            cx.conn.abort();
            Err(Close::because("too late"))
        }
        call => usual(cx, call),
    });
    let addr = server.addr();
    let mut expected = Vec::new();
    for (frame, reason) in [
        (&b"close"[..], CloseReason::Closed),
        (b"abort", CloseReason::Aborted),
        (b"fail", CloseReason::Failed),
        (b"panic", CloseReason::Panicked),
        (b"twice", CloseReason::Closed),
    ] {
        let mut client = connect(addr);
        send2(&mut client, frame);
        await_end(&mut client);
        drop(client);
        expected.push(reason);
        assert_eq!(journal.until_closed(expected.len()), expected);
    }
    for (wire, reason) in [
        (&b"\x00\x01x"[..], CloseReason::Finished),
        (b"\x00\x05x", CloseReason::Truncated),
        (b"\xFF\xFF", CloseReason::FrameTooLarge),
    ] {
        let mut client = connect(addr);
        client.write_all(wire).expect("write");
        client.shutdown(Shutdown::Write).expect("FIN");
        await_end(&mut client);
        expected.push(reason);
        assert_eq!(journal.until_closed(expected.len()), expected);
    }
    journal.assert_whole_lives();
    let (stats, ()) = server.finish();
    for reason in CloseReason::ALL {
        let count = expected
            .iter()
            .filter(|expected| *expected == reason)
            .count();
        assert_eq!(stats.closed(*reason), count as u64, "{reason}");
    }
}

/// What the handler was told is what the peer gave, and nothing after the end.
#[test]
fn no_frame_comes_after_close() {
    let (server, journal) = spawn_script(Config::new(), local(), |cx, call| match call {
        Call::Frame(b"stop") => {
            cx.conn.close();
            Ok(())
        }
        call => usual(cx, call),
    });
    let mut client = connect(server.addr());
    let wire = [
        packet2(b"one"),
        packet2(b"stop"),
        packet2(b"three"),
        packet2(b"four"),
    ]
    .concat();
    assert_eq!(fill(&mut client, &wire), wire.len());
    assert_eq!(read_to_end(&mut client), packet2(b"one"));
    drop(client);
    assert_eq!(journal.until_closed(1), [CloseReason::Closed]);
    assert_eq!(journal.count(&Entry::Frame), 2);
}

/// One handler ends another's connection: the cause reaches that one's `on_close` and the records,
/// and what it has sent before arrives.
#[test]
fn a_neighbour_ends_a_connection_with_a_cause() {
    #[derive(Default)]
    struct App {
        first: Option<ConnId>,
        told: Vec<String>,
    }
    struct Session;
    impl Handler<App> for Session {
        fn on_open(&mut self, cx: &mut Context<'_, App>) -> Outcome {
            let Some(older) = cx.app.first else {
                cx.app.first = Some(cx.conn.id());
                return Ok(());
            };
            if let Some(mut older) = cx.conn.peer(older) {
                older.send(b"bye")?;
                older.end(Close::because("taken over"));
                older.end(Close::because("too late"));
            }
            Ok(())
        }
        fn on_frame(&mut self, _: &mut Context<'_, App>, _: &[u8]) -> Outcome {
            Ok(())
        }
        fn on_close(&mut self, cx: &mut Context<'_, App>, closed: &Closed) {
            cx.app.told.push(closed.to_string());
        }
    }
    let mut sim = Sim::new(1, Config::new(), App::default());
    let addr = sim
        .listen(local(), |_: &mut App, _| Session)
        .expect("listen");
    let older = sim.connect(addr).expect("a listener");
    sim.settle();
    sim.connect(addr).expect("a listener");
    sim.settle();
    assert_eq!(sim.received(older), packet2(b"bye"));
    sim.finish(older);
    sim.settle();
    assert_eq!(sim.app().told, ["handler failed: taken over"]);
    let recent = sim.control().recent_closes();
    assert_eq!(recent[0].reason, CloseReason::Failed);
    assert_eq!(recent[0].error.as_deref(), Some("taken over"));
    assert_eq!(sim.stats().closed(CloseReason::Failed), 1);
}

/// A peer that has taken everything and then resets has lost nothing, however long ago the kernel's
/// last answer was.
#[test]
fn a_reset_behind_the_last_byte_is_no_loss() {
    for (takes_all, reason) in [(true, CloseReason::Closed), (false, CloseReason::Reset)] {
        let mut sim = Sim::new(1, Config::new(), ());
        let listen = local().with(|listen| listen.framing = Framing::Raw);
        let addr = sim.listen(listen, |_: &mut (), _| Gives).expect("listen");
        let client = sim.connect(addr).expect("it listens");
        sim.set_reading(client, false);
        sim.settle();
        assert_eq!(sim.control().connections()[0].state, State::Closing);
        sim.read(client, if takes_all { ANSWER.len() } else { 10 });
        sim.reset(client);
        sim.settle();
        assert_eq!(sim.stats().closed(reason), 1);
    }

    struct Gives;
    impl Handler for Gives {
        fn on_open(&mut self, cx: &mut Context<'_>) -> Outcome {
            cx.conn.send(ANSWER)?;
            cx.conn.close();
            Ok(())
        }
        fn on_frame(&mut self, _: &mut Context<'_>, _: &[u8]) -> Outcome {
            Ok(())
        }
    }
}
