//! A fixed set of worlds holds every invariant, and the same seed is the same world.

use std::time::Duration;

use kit::campaign::Plan;
use portcullis::sim::{Call, ClientState, Fault, Faults, Op, Script, Scripted, Sim, Stage};
use portcullis::{
    CloseReason, Config, Context, Control, Framing, Handler, Listen, Message, Outcome,
};

fn play(seeds: std::ops::Range<u64>, tls: bool) {
    for seed in seeds {
        if let Err(failure) = Plan::draw(seed, tls).run(false) {
            panic!(
                "seed {seed} breaks: {}; replay: cargo run --release --bin simulate -- --replay {seed} --shrink{}",
                failure.what,
                if tls { "" } else { " --plain" }
            );
        }
    }
}

#[test]
fn plain_worlds_hold() {
    play(0..2000, false);
}

#[cfg(feature = "tls")]
#[test]
fn worlds_with_tls_hold() {
    play(0..400, true);
}

#[test]
fn the_same_seed_is_the_same_world() {
    for seed in 0..200 {
        let plan = Plan::draw(seed, true);
        let run = || {
            let report = plan.run(true).expect("holds");
            (report.hash, report.events, report.coverage, report.trace)
        };
        assert_eq!(run(), run(), "seed {seed}");
    }
}

struct Echo;

impl Handler for Echo {
    fn on_frame(&mut self, cx: &mut Context<'_>, frame: &[u8]) -> Outcome {
        cx.conn.send(frame)?;
        Ok(())
    }
}

fn echo(listen: Listen) -> (Sim, std::net::SocketAddr) {
    let mut sim = Sim::new(7, Config::new(), ());
    let addr = sim.listen(listen, |_: &mut (), _| Echo).expect("listen");
    (sim, addr)
}

fn listen() -> Listen {
    Listen::tcp("127.0.0.1:0", Framing::Line)
}

#[test]
fn a_day_passes_in_virtual_time() {
    let (mut sim, addr) =
        echo(listen().with(|listen| listen.conn.idle_timeout = Duration::from_secs(24 * 3600)));
    let client = sim.connect(addr).expect("connected");
    sim.send(client, b"hello\n");
    sim.advance(Duration::from_secs(24 * 3600 - 1));
    assert_eq!(
        (sim.received(client), sim.state(client)),
        (b"hello\n".to_vec(), ClientState::Connected)
    );
    let iterations = sim.stats().iterations;
    sim.advance(Duration::from_secs(2));
    assert_eq!(
        sim.stats().closed(CloseReason::IdleTimeout),
        0,
        "our FIN waits for the client's"
    );
    sim.finish(client);
    sim.settle();
    assert_eq!(sim.stats().closed(CloseReason::IdleTimeout), 1);
    assert!(
        sim.stats().iterations - iterations < 10,
        "an idle server does not wake up"
    );
}

#[test]
fn time_that_leaps_past_a_deadline_does_not_end_a_peer_that_has_sent() {
    let (mut sim, addr) =
        echo(listen().with(|listen| listen.conn.idle_timeout = Duration::from_secs(2)));
    let client = sim.connect(addr).expect("connected");
    sim.settle();
    // Like a process that was stopped: the data is there when it looks at its clock again.
    sim.send(client, b"still here\n");
    sim.leap(Duration::from_secs(3600));
    sim.advance(Duration::from_millis(1900));
    assert_eq!(sim.received(client), b"still here\n");
    assert_eq!(sim.state(client), ClientState::Connected);
    sim.advance(Duration::from_millis(200));
    assert_eq!(
        sim.state(client),
        ClientState::Finished,
        "silent since then"
    );
}

#[test]
fn fd_exhaustion_ends_when_a_descriptor_is_free() {
    let (mut sim, addr) = echo(listen());
    sim.set_descriptor_limit(1 + 3);
    let clients: Vec<_> = (0..10)
        .map(|_| sim.connect(addr).expect("connected"))
        .collect();
    for &client in &clients {
        sim.send(client, b"hi\n");
    }
    sim.advance(Duration::from_secs(10));
    assert_eq!((sim.stats().open, sim.stats().out_of_fds), (3, 1));
    for &client in &clients {
        sim.settle();
        assert_eq!(sim.received(client), b"hi\n");
        sim.finish(client);
    }
    sim.settle();
    assert_eq!((sim.stats().open, sim.stats().out_of_fds), (0, 1));
}

/// The kernel announces room only when a good part of its buffer is free: a slow reader makes
/// progress all the same.
#[test]
fn a_slow_reader_is_no_stalled_one() {
    let (mut sim, addr) =
        echo(listen().with(|listen| listen.conn.write_timeout = Duration::from_secs(1)));
    let client = sim.connect(addr).expect("connected");
    sim.set_reading(client, false);
    sim.set_send_buffer(client, 10_000);
    let line = [vec![b'x'; 29_999], vec![b'\n']].concat();
    sim.send(client, &line);
    sim.settle();
    let mut heard = Vec::new();
    for _ in 0..8 {
        sim.advance(Duration::from_millis(600));
        sim.read(client, 500);
        heard.extend(sim.received(client));
    }
    assert_eq!(
        (sim.state(client), heard.len()),
        (ClientState::Connected, 4000)
    );
    // And a client that reads nothing is stalled.
    sim.advance(Duration::from_secs(3));
    assert_eq!(sim.stats().closed(CloseReason::WriteTimeout), 1);
}

/// The process is stopped between its poll and the rest of its iteration: bytes that arrived
/// meanwhile are read before deadlines expire.
#[test]
fn time_that_leaps_behind_a_poll_does_not_end_a_peer_that_has_sent() {
    let (mut sim, addr) =
        echo(listen().with(|listen| listen.conn.idle_timeout = Duration::from_secs(2)));
    let client = sim.connect(addr).expect("connected");
    sim.advance(Duration::from_secs(1));
    sim.send(client, b"in time\n");
    let mut faults = Faults::none();
    faults.late_events = 1000;
    sim.set_faults(faults);
    sim.leap_after_poll(Duration::from_secs(5));
    sim.step();
    sim.set_faults(Faults::none());
    sim.settle();
    assert_eq!(sim.received(client), b"in time\n");
    assert_eq!(sim.state(client), ClientState::Connected);
}

/// A second drain can bring the deadline forward, and never put it off.
#[test]
fn the_shortest_drain_holds() {
    for (spans, queued) in [
        ([5, 60], false),
        ([60, 5], false),
        ([5, 60], true),
        ([60, 5], true),
    ] {
        let (mut sim, addr) = echo(listen());
        let client = sim.connect(addr).expect("connected");
        sim.set_send_buffer(client, 1);
        sim.set_reading(client, false);
        sim.send(client, b"never read\n");
        sim.settle();
        for grace in spans.map(Duration::from_secs) {
            if queued {
                sim.handle().drain(grace).expect("it runs");
            } else {
                sim.control().drain(grace);
            }
        }
        sim.advance(Duration::from_secs(4));
        assert!(
            sim.drain_report().is_none(),
            "somebody is still owed something"
        );
        sim.advance(Duration::from_secs(2));
        assert_eq!(sim.drain_report().map(|report| report.forced), Some(1));
    }
}

/// An endless stream of clients keeps no port open: the drain accepts those that wait already, at
/// most a full backlog.
#[test]
fn a_flood_of_connects_does_not_hold_up_a_drain() {
    let (mut sim, addr) = echo(listen().with(|listen| listen.socket.backlog = 4));
    sim.control().drain(Duration::from_secs(60));
    let mut taken = 0;
    while sim.connect(addr).is_some() {
        taken += 1;
        sim.step();
        assert!(taken < 20, "the port is still open");
    }
    assert!((1..=6).contains(&taken), "{taken}");
}

/// A flood that fills every batch of events must not stop the clocks.
#[test]
fn full_batches_do_not_stop_the_clocks() {
    let (mut sim, addr) =
        echo(listen().with(|listen| listen.conn.idle_timeout = Duration::from_secs(1)));
    let client = sim.connect(addr).expect("connected");
    sim.settle();
    let mut faults = Faults::none();
    faults.full_batches = 1000;
    sim.set_faults(faults);
    sim.leap(Duration::from_secs(5));
    for _ in 0..10 {
        sim.step();
    }
    assert_eq!(sim.state(client), ClientState::Finished);
}

/// For any number of later clients, handshakes are worked on in the order in which they have input.
#[cfg(feature = "tls")]
#[test]
fn a_flood_of_handshakes_does_not_starve_one() {
    use kit::sim_tls;
    let mut sim = Sim::new(
        3,
        Config::new().with(|config| config.budgets.handshakes = 1),
        (),
    );
    let listen = listen().tls(sim_tls::server_config());
    let addr = sim.listen(listen, |_: &mut (), _| Echo).expect("listen");
    // Events come in the order in which clients have connected: one speaks before the flood does, one behind it.
    let first = sim.connect(addr).expect("connected");
    let flood: Vec<_> = (0..20)
        .map(|_| sim.connect(addr).expect("connected"))
        .collect();
    for &dripping in &flood {
        // The head of a long record that never ends.
        sim.send(dripping, &[0x16, 3, 1, 0x3F, 0xFF]);
    }
    let last = sim.connect(addr).expect("connected");
    sim.settle();
    for client in [first, last] {
        sim.send(client, &sim_tls::Client::new().encrypt(b""));
    }
    for _ in 0..50 {
        for &dripping in &flood {
            sim.send(dripping, b"\x01");
        }
        sim.step();
    }
    for client in [first, last] {
        assert!(!sim.received(client).is_empty(), "the server's hello");
    }
}

/// A connection with unread input is not evicted, however old it is; one that has sent nothing is.
#[cfg(feature = "tls")]
#[test]
fn a_connection_with_unread_input_is_not_evicted() {
    use kit::sim_tls;
    use portcullis::Quota;
    let config = Config::new().with(|config| {
        config.budgets.handshakes = 1;
        config.pending_limits.connections = Quota::Count(3);
        config.pending_limits.grace = Duration::ZERO;
    });
    let mut sim = Sim::new(3, config, ());
    let listen = listen().tls(sim_tls::server_config());
    let addr = sim.listen(listen, |_: &mut (), _| Echo).expect("listen");
    let old = sim.connect(addr).expect("connected");
    let mut tls = sim_tls::Client::new();
    sim.send(old, &tls.encrypt(b""));
    sim.settle();
    let answer = sim.received(old);
    let finished = tls.decrypt(&answer, &mut Vec::new()).expect("a hello");
    let others = [(); 2].map(|()| sim.connect(addr).expect("connected"));
    sim.settle();
    for client in others {
        sim.send(client, &sim_tls::Client::new().encrypt(b""));
    }
    // One of them has its turn, the other is left over, and the oldest comes behind that.
    sim.step();
    sim.send(old, &finished);
    sim.connect(addr).expect("connected");
    sim.step();
    assert_eq!(sim.stats().closed(CloseReason::Evicted), 1);
    sim.settle();
    assert_eq!(
        (sim.stats().opened, sim.state(old)),
        (1, ClientState::Connected)
    );
}

/// The loop was held up past the deadline and then spent its budget on others: what came in time is read first.
#[cfg(feature = "tls")]
#[test]
fn a_handshake_is_not_timed_out_unread() {
    use kit::sim_tls;
    for full_batches in [0, 1000] {
        let mut sim = Sim::new(
            3,
            Config::new().with(|config| config.budgets.handshakes = 3),
            (),
        );
        let listen = listen()
            .tls(sim_tls::server_config())
            .with(|listen| listen.conn.handshake_timeout = Duration::from_secs(1));
        let addr = sim.listen(listen, |_: &mut (), _| Echo).expect("listen");
        let mut faults = Faults::none();
        faults.full_batches = full_batches;
        sim.set_faults(faults);
        let mut clients: Vec<_> = (0..40)
            .map(|_| {
                (
                    sim.connect(addr).expect("connected"),
                    sim_tls::Client::new(),
                )
            })
            .collect();
        for (client, tls) in &mut clients {
            sim.send(*client, &tls.encrypt(b""));
        }
        for _ in 0..40 {
            sim.step();
        }
        for (client, tls) in &mut clients {
            let flight = tls
                .decrypt(&sim.received(*client), &mut Vec::new())
                .expect("a hello");
            sim.send(*client, &flight);
        }
        sim.leap(Duration::from_millis(1500));
        for _ in 0..40 {
            sim.step();
        }
        assert_eq!((sim.stats().opened, sim.stats().closed_total()), (40, 0));
    }
}

/// Constant input does not keep a connection in the handshake.
#[cfg(feature = "tls")]
#[test]
fn a_handshake_that_drips_is_timed_out() {
    use kit::sim_tls;
    let mut sim = Sim::new(
        3,
        Config::new().with(|config| config.budgets.handshakes = 1),
        (),
    );
    let listen = listen()
        .tls(sim_tls::server_config())
        .with(|listen| listen.conn.handshake_timeout = Duration::from_secs(1));
    let addr = sim.listen(listen, |_: &mut (), _| Echo).expect("listen");
    let flood: Vec<_> = (0..20)
        .map(|_| sim.connect(addr).expect("connected"))
        .collect();
    for &dripping in &flood {
        sim.send(dripping, &[0x16, 3, 1, 0x3F, 0xFF]);
    }
    sim.settle();
    // In the first leap the server has read no socket: the rest of the timeout follows.
    for timed_out in [0, 20] {
        sim.leap(Duration::from_millis(1500));
        for _ in 0..25 {
            for &dripping in &flood {
                sim.send(dripping, b"\x01");
            }
            sim.step();
        }
        let stats = sim.stats();
        assert_eq!(stats.closed(CloseReason::HandshakeTimeout), timed_out);
    }
}

/// Its peer has said close_notify and is reset: a write tells so, and there is nothing more to read.
#[cfg(feature = "tls")]
#[test]
fn a_peer_that_resets_after_its_close_notify_is_noticed_by_a_write() {
    use kit::sim_tls;
    /// Has something to say long after its peer has finished.
    struct Late;
    impl Handler for Late {
        fn on_frame(&mut self, _: &mut Context<'_>, _: &[u8]) -> Outcome {
            Ok(())
        }
        fn on_finish(&mut self, cx: &mut Context<'_>) -> Outcome {
            cx.conn.set_timer(0, Duration::from_secs(1));
            Ok(())
        }
        fn on_timer(&mut self, cx: &mut Context<'_>, _: u8) -> Outcome {
            cx.conn.send(b"late\n")?;
            Ok(())
        }
    }
    let mut sim = Sim::new(3, Config::new(), ());
    // One line is enough to stop its clocks.
    let listen = listen().tls(sim_tls::server_config()).with(|listen| {
        listen.conn.low_watermark = 1;
        listen.conn.high_watermark = 2;
    });
    let addr = sim.listen(listen, |_: &mut (), _| Late).expect("listen");
    let (client, mut tls) = (
        sim.connect(addr).expect("connected"),
        sim_tls::Client::new(),
    );
    sim.send(client, &tls.encrypt(b""));
    sim.settle();
    let flight = tls
        .decrypt(&sim.received(client), &mut Vec::new())
        .expect("a hello");
    sim.send(client, &flight);
    sim.settle();
    sim.send(client, &tls.close_notify());
    sim.settle();
    sim.reset(client);
    sim.advance(Duration::from_secs(2));
    assert_eq!(
        (sim.stats().closed(CloseReason::Reset), sim.stats().open),
        (1, 0)
    );
}

/// A listener's token comes again after many others; its events are not taken for another's.
#[test]
fn listeners_are_told_apart_after_a_long_life() {
    let (mut sim, first) = echo(listen());
    for round in 0..65_534 {
        if round % 64 == 0 {
            // Closed ones are forgotten at the end of a turn.
            sim.step();
        }
        let addr = sim.listen(listen(), |_: &mut (), _| Echo).expect("listen");
        sim.control()
            .close_listener(addr.port())
            .expect("it is there");
    }
    let second = sim.listen(listen(), |_: &mut (), _| Echo).expect("listen");
    sim.settle();
    for addr in [first, second] {
        let client = sim.connect(addr).expect("connected");
        sim.send(client, b"hello\n");
        sim.settle();
        assert_eq!(sim.received(client), b"hello\n");
    }
}

/// It would be a descriptor lost for each try.
#[test]
fn a_listener_that_cannot_be_registered_leaves_nothing() {
    let (mut sim, addr) = echo(listen());
    sim.add_fault(Scripted {
        call: Call::RegisterListener,
        after: 0,
        errno: libc::ENOMEM,
    });
    let again = || Listen::tcp(("127.0.0.1", addr.port() + 1), Framing::Line);
    assert!(sim.listen(again(), |_: &mut (), _| Echo).is_err());
    sim.settle();
    assert_eq!(sim.descriptors(), 1);
    assert!(
        sim.listen(again(), |_: &mut (), _| Echo).is_ok(),
        "the port is free"
    );
}

#[test]
fn a_command_wakes_the_loop() {
    let (mut sim, addr) = echo(listen());
    sim.connect(addr).expect("connected");
    sim.settle();
    sim.handle().drain(Duration::from_secs(1)).expect("asked");
    sim.advance(Duration::from_secs(60));
    let report = sim.drain_report().expect("over");
    assert!(report.took < Duration::from_secs(10), "{report:?}");
}

/// Faults are counted by the stage that they hit: a campaign's table consists of that.
#[test]
fn a_world_tells_what_it_has_shown() {
    let (mut sim, addr) = echo(listen());
    sim.keep_coverage();
    let client = sim.connect(addr).expect("connected");
    sim.settle();
    sim.set_faults(Faults::none().with(Call::Read, 0, libc::EINTR));
    sim.send(client, b"hello\n");
    sim.settle();
    sim.finish(client);
    sim.settle();
    assert_eq!(
        (
            sim.calls(Call::Accept),
            sim.calls(Call::Register),
            sim.calls(Call::Shutdown)
        ),
        (2, 1, 0)
    );
    let coverage = sim.take_coverage();
    let faults: Vec<_> = coverage.faults.into_iter().collect();
    assert_eq!(
        faults,
        [((Fault::Error(Call::Read, libc::EINTR), Stage::Open), 1)]
    );
    let moves: Vec<_> = coverage.moves.into_iter().collect();
    assert_eq!(
        moves,
        [
            ((Stage::New, Stage::Open), 1),
            ((Stage::Open, Stage::Gone), 1)
        ]
    );
}

#[test]
fn a_script_made_by_a_fuzzer_is_played() {
    let (mut sim, addr) = echo(listen());
    let ops = vec![
        Op::Connect,
        Op::Send {
            client: 0,
            bytes: b"a\nb\n".to_vec(),
        },
        Op::Step,
        Op::Finish { client: 0 },
    ];
    let clients = sim.play(addr, &Script { ops });
    assert_eq!(sim.received(clients[0]), b"a\nb\n");
    assert_eq!(sim.state(clients[0]), ClientState::Finished);
}

/// Frames that wait in the server's memory are announced by no event: a turn for each is no spinning.
#[test]
fn turns_without_events_are_no_spinning_while_frames_come() {
    let mut sim = Sim::new(
        7,
        Config::new().with(|config| config.budgets.read_bytes = 1),
        (),
    );
    let listen = listen().with(|listen| {
        listen.conn.low_watermark = 0;
        listen.conn.high_watermark = 1;
    });
    let addr = sim.listen(listen, |_: &mut (), _| Echo).expect("listen");
    let client = sim.connect(addr).expect("connected");
    let lines = vec![b'\n'; 30_000];
    sim.send(client, &lines);
    sim.settle();
    assert_eq!(sim.received(client), lines);
}

/// Input that waits for its turn is not late, however long the turns before it take: the server
/// delays it.
#[test]
fn frames_that_wait_for_their_turn_run_into_no_deadline() {
    let second = Duration::from_secs(1);
    // One frame in a turn.
    let mut sim = Sim::new(
        7,
        Config::new().with(|config| {
            config.budgets.read_bytes = 64;
            config.max_connections = 3_000;
        }),
        (),
    );
    sim.set_descriptor_limit(4_000);
    let listen = listen().with(|listen| {
        listen.conn.idle_timeout = second;
        listen.conn.frame_timeout = second;
    });
    let addr = sim.listen(listen, |_: &mut (), _| Echo).expect("listen");
    // More than have their turns in one turn of the loop.
    let mut clients = Vec::new();
    while clients.len() < 3_000 {
        clients.extend((0..50).map(|_| sim.connect(addr).expect("connected")));
        sim.settle();
    }
    let lines = b"a line\n".repeat(10);
    for &client in &clients {
        // The last one is not whole: that is late, once it is its turn.
        sim.send(client, &[&lines[..], b"half"].concat());
    }
    for _ in 0..200 {
        sim.leap_after_poll(5 * second);
        sim.step();
    }
    sim.advance(10 * second);
    for client in clients {
        assert_eq!(sim.received(client), lines);
    }
    let late = sim.stats().closed(CloseReason::FrameTimeout)
        + sim.stats().closed(CloseReason::IdleTimeout);
    assert_eq!(late, 3_000);
}

/// As on Linux: a server that takes a short read for the last one would wait for the end for ever.
#[test]
fn bytes_and_the_end_behind_them_are_one_event() {
    struct Stays;
    impl Handler for Stays {
        fn on_frame(&mut self, _: &mut Context<'_>, _: &[u8]) -> Outcome {
            Ok(())
        }
        fn on_finish(&mut self, cx: &mut Context<'_>) -> Outcome {
            cx.conn.send(b"the end\n")?;
            Ok(())
        }
    }
    let mut sim = Sim::new(7, Config::new(), ());
    let addr = sim.listen(listen(), |_: &mut (), _| Stays).expect("listen");
    let client = sim.connect(addr).expect("connected");
    sim.settle();
    let before = sim.events();
    sim.send(client, b"hello\n");
    sim.finish(client);
    sim.settle();
    assert_eq!(
        (sim.events() - before, sim.received(client)),
        (1, b"the end\n".to_vec())
    );
}

/// While it is paused it has no deadline, and its timer may come and go; once resumed it may be
/// idle as long as all others.
#[test]
fn a_long_pause_leaves_an_idle_deadline_behind() {
    struct Waits;
    impl Handler for Waits {
        fn on_frame(&mut self, cx: &mut Context<'_>, line: &[u8]) -> Outcome {
            cx.conn.send(line)?;
            if line == b"wait\n" {
                cx.conn.pause();
            }
            Ok(())
        }
        fn on_message(&mut self, cx: &mut Context<'_>, _: Message) -> Outcome {
            cx.conn.resume();
            Ok(())
        }
    }
    let idle = Duration::from_secs(10);
    // Paused long before its timer comes, and in the same moment.
    for (by_itself, early) in [(true, true), (false, true), (true, false), (false, false)] {
        let mut sim = Sim::new(7, Config::new(), ());
        let options = listen().with(|listen| {
            listen.conn.idle_timeout = idle;
            listen.conn.linger_timeout = Duration::ZERO;
            listen.conn.linger_bytes = 1024;
        });
        let addr = sim.listen(options, |_: &mut (), _| Waits).expect("listen");
        let client = sim.connect(addr).expect("connected");
        sim.send(client, if early { b"wait\n" } else { b"said\n" });
        sim.settle();
        let id = sim.control().connections()[0].id;
        if early {
            sim.advance(2 * idle);
        } else {
            sim.leap(idle);
            let pause = move |(): &mut (), control: &mut Control<'_, ()>| {
                control.conn(id).expect("it is open").pause()
            };
            sim.handle().post(pause).expect("it runs");
            sim.settle();
        }
        sim.send(client, b"go on\n");
        sim.settle();
        if by_itself {
            sim.handle().notify(id, ()).expect("it runs");
        } else {
            sim.control().conn(id).expect("it is open").resume();
        }
        sim.settle();
        assert!(sim.received(client).ends_with(b"go on\n"));
        sim.advance(2 * idle);
        assert_eq!(sim.stats().closed(CloseReason::IdleTimeout), 1);
    }
}

const LONG_ANSWER: usize = 40_000;

struct Answers {
    closes: bool,
}

impl Handler for Answers {
    fn on_frame(&mut self, cx: &mut Context<'_>, _: &[u8]) -> Outcome {
        cx.conn.send(vec![b'a'; LONG_ANSWER])?;
        if self.closes {
            cx.conn.close();
        }
        Ok(())
    }
}

/// A client that reads only when it is told to, and an answer that the kernel has whole.
fn answered(closes: bool) -> (Sim, portcullis::sim::ClientId) {
    let mut sim = Sim::new(7, Config::new(), ());
    let addr = sim
        .listen(listen(), move |_: &mut (), _| Answers { closes })
        .expect("listen");
    let client = sim.connect(addr).expect("connected");
    sim.set_reading(client, false);
    sim.send(client, b"get\n");
    sim.settle();
    assert_eq!(sim.stats().traffic.bytes_out, LONG_ANSWER as u64);
    (sim, client)
}

/// While the peer takes what the kernel holds, no linger time runs: a close would answer the
/// peer's next byte with RST, and the remainder would be lost.
#[test]
fn a_peer_that_reads_slowly_and_talks_meanwhile_gets_all_of_it() {
    let (mut sim, client) = answered(true);
    for _ in 0..20 {
        sim.advance(Duration::from_millis(1900));
        sim.read(client, LONG_ANSWER / 20);
        sim.send(client, b"ping\n");
        sim.settle();
    }
    assert_eq!(sim.received(client).len(), LONG_ANSWER);
    assert_eq!(sim.state(client), ClientState::Finished);
    assert_eq!(
        sim.stats().closed_total(),
        0,
        "it lingers for the peer's FIN"
    );
    sim.advance(Duration::from_secs(5));
    assert_eq!(sim.stats().closed(CloseReason::Closed), 1);
}

/// The write timeout counts for the kernel's bytes as for the server's, and is the reason.
#[test]
fn a_peer_that_takes_nothing_of_what_the_kernel_holds_is_a_write_timeout() {
    let (mut sim, client) = answered(true);
    sim.advance(Duration::from_secs(29));
    assert_eq!(sim.stats().closed_total(), 0);
    sim.advance(Duration::from_secs(2));
    assert_eq!(sim.stats().closed(CloseReason::WriteTimeout), 1);
    assert_eq!(sim.state(client), ClientState::Reset);
}

/// A drain waits for such a peer until its deadline, and its report tells whether the peer has all.
#[test]
fn a_drain_lingers_until_its_deadline_while_the_peer_reads() {
    for (rounds, (ended, forced), reason) in [
        (20, (1, 0), CloseReason::Drained),
        (10, (0, 1), CloseReason::DrainForced),
    ] {
        let (mut sim, client) = answered(false);
        sim.control().drain(Duration::from_secs(30));
        for _ in 0..rounds {
            sim.advance(Duration::from_secs(1));
            sim.read(client, LONG_ANSWER / 20);
            sim.send(client, b"ping\n");
        }
        if forced == 0 {
            sim.finish(client);
        }
        sim.advance(Duration::from_secs(31));
        let report = sim.drain_report().expect("it is over");
        assert_eq!((report.ended, report.forced), (ended, forced));
        assert_eq!(sim.stats().closed(reason), 1, "{rounds}");
    }
}
