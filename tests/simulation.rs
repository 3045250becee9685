//! A fixed set of worlds holds every invariant, and the same seed is the same world.
#![cfg(feature = "sim")]

#[path = "../examples/support/campaign.rs"]
mod campaign;

use std::time::Duration;

use campaign::Plan;
use portcullis::sim::{Call, ClientState, Faults, Op, Script, Sim};
use portcullis::{CloseReason, Config, Context, Framing, Handler, Listen, Outcome};

/// Handlers panic as planned; the rest of the panics are worth reading.
fn quiet() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        let loud = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            if panic.payload().downcast_ref::<&str>() != Some(&"as planned") {
                loud(panic);
            }
        }));
    });
}

fn play(seeds: std::ops::Range<u64>, tls: bool) {
    quiet();
    for seed in seeds {
        if let Err(failure) = Plan::draw(seed, tls).run(false) {
            panic!(
                "seed {seed} breaks: {}; replay: cargo run --release --features sim --example simulate -- --replay {seed} --shrink{}",
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
    quiet();
    for seed in 0..200 {
        let plan = Plan::draw(seed, true);
        let run = || {
            let report = plan.run(true).expect("holds");
            (report.hash, report.events, report.trace)
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
    Listen::tcp("127.0.0.1:0").framing(Framing::Line)
}

#[test]
fn a_day_passes_in_virtual_time() {
    let (mut sim, addr) = echo(listen().idle_timeout(Duration::from_secs(24 * 3600)));
    let client = sim.connect(addr).expect("connected");
    sim.send(client, b"hello\n");
    sim.advance(Duration::from_secs(24 * 3600 - 1));
    assert_eq!(
        (sim.received(client), sim.state(client)),
        (b"hello\n".to_vec(), ClientState::Connected)
    );
    let turns = sim.stats().turns;
    sim.advance(Duration::from_secs(2));
    assert_eq!(
        sim.stats().closed(CloseReason::IdleTimeout),
        0,
        "our FIN waits for the client's"
    );
    sim.finish(client);
    sim.settle();
    assert_eq!(sim.stats().closed(CloseReason::IdleTimeout), 1);
    assert!(sim.stats().turns - turns < 10, "an idle server does not wake up");
}

#[test]
fn time_that_leaps_past_a_deadline_does_not_kill_who_has_spoken() {
    let (mut sim, addr) = echo(listen().idle_timeout(Duration::from_secs(2)));
    let client = sim.connect(addr).expect("connected");
    sim.settle();
    // Like a process that was stopped: the data is there when it looks at its clock again.
    sim.send(client, b"still here\n");
    sim.leap(Duration::from_secs(3600));
    sim.advance(Duration::from_millis(1900));
    assert_eq!(sim.received(client), b"still here\n");
    assert_eq!(sim.state(client), ClientState::Connected);
    sim.advance(Duration::from_millis(200));
    assert_eq!(sim.state(client), ClientState::Finished, "silent since then");
}

/// Each errno of each call, once, in the middle of a conversation: nobody else notices, and the books balance.
#[test]
fn every_call_fails_once_with_every_error_it_has() {
    for &call in Call::ALL {
        for &errno in call.errors() {
            for after in 0..6 {
                let (mut sim, addr) = echo(listen());
                let bystander = sim.connect(addr).expect("connected");
                sim.send(bystander, b"before\n");
                sim.settle();
                sim.set_faults(Faults::none().with(call, after, errno));
                let client = sim.connect(addr).expect("connected");
                sim.send(client, b"one\n");
                sim.settle();
                sim.send(client, b"two\n");
                sim.finish(client);
                sim.advance(Duration::from_secs(5));
                let case = format!("{call} {after} errno {errno}");
                sim.set_faults(Faults::none());
                let heard = sim.received(client);
                assert!(b"one\ntwo\n".starts_with(&heard), "{case}: {heard:?}");
                let third = sim.connect(addr).expect("connected");
                sim.send(third, b"after\n");
                sim.advance(Duration::from_secs(5));
                assert_eq!(sim.received(third), b"after\n", "{case}");
                assert_eq!(sim.received(bystander), b"before\n", "{case}");
                sim.control().drain(Duration::from_secs(1));
                sim.advance(Duration::from_secs(20));
                assert!(sim.drain_report().is_some(), "{case}");
                let stats = sim.stats();
                assert_eq!((stats.open, sim.descriptors()), (0, 0), "{case}");
                assert_eq!(stats.accepted, stats.closed_total(), "{case}");
            }
        }
    }
}

#[test]
fn starvation_ends_when_a_descriptor_is_free() {
    let (mut sim, addr) = echo(listen());
    sim.set_descriptor_limit(1 + 3);
    let clients: Vec<_> = (0..10).map(|_| sim.connect(addr).expect("connected")).collect();
    for &client in &clients {
        sim.send(client, b"hi\n");
    }
    sim.advance(Duration::from_secs(10));
    assert_eq!((sim.stats().open, sim.stats().starved), (3, 1));
    for &client in &clients {
        sim.settle();
        assert_eq!(sim.received(client), b"hi\n");
        sim.finish(client);
    }
    sim.settle();
    assert_eq!((sim.stats().open, sim.stats().starved), (0, 1));
}

/// The kernel announces room only when a good part of its buffer is free: who reads slowly makes progress all the same.
#[test]
fn a_slow_reader_is_no_stalled_one() {
    let (mut sim, addr) = echo(listen().write_timeout(Duration::from_secs(1)));
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
    assert_eq!((sim.state(client), heard.len()), (ClientState::Connected, 4000));
    // And who reads nothing is stalled.
    sim.advance(Duration::from_secs(3));
    assert_eq!(sim.stats().closed(CloseReason::WriteTimeout), 1);
}

/// A flood that fills every batch of events must not stop the clocks.
#[test]
fn full_batches_do_not_stop_the_clocks() {
    let (mut sim, addr) = echo(listen().idle_timeout(Duration::from_secs(1)));
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

/// Whoever comes later, and however many: handshakes are worked on in the order in which they have input.
#[cfg(feature = "tls")]
#[test]
fn a_flood_of_handshakes_does_not_starve_one() {
    use campaign::sim_tls;
    let mut sim = Sim::new(3, Config::new().handshake_budget(1), ());
    let listen = listen().tls(sim_tls::server_config());
    let addr = sim.listen(listen, |_: &mut (), _| Echo).expect("listen");
    let flood: Vec<_> = (0..20).map(|_| sim.connect(addr).expect("connected")).collect();
    for &dripping in &flood {
        // The head of a long record that never ends.
        sim.send(dripping, &[0x16, 3, 1, 0x3F, 0xFF]);
    }
    let client = sim.connect(addr).expect("connected");
    sim.settle();
    sim.send(client, &sim_tls::Client::new().encrypt(b""));
    for _ in 0..50 {
        for &dripping in &flood {
            sim.send(dripping, b"\x01");
        }
        sim.step();
    }
    assert!(!sim.received(client).is_empty(), "the server's hello");
}

/// The loop was held up past the deadline and then spent its budget on others: what came in time is read first.
#[cfg(feature = "tls")]
#[test]
fn a_handshake_is_not_timed_out_unread() {
    use campaign::sim_tls;
    for full_batches in [0, 1000] {
        let mut sim = Sim::new(3, Config::new().handshake_budget(3), ());
        let listen = listen()
            .tls(sim_tls::server_config())
            .handshake_timeout(Duration::from_secs(1));
        let addr = sim.listen(listen, |_: &mut (), _| Echo).expect("listen");
        let mut faults = Faults::none();
        faults.full_batches = full_batches;
        sim.set_faults(faults);
        let mut clients: Vec<_> = (0..40)
            .map(|_| (sim.connect(addr).expect("connected"), sim_tls::Client::new()))
            .collect();
        for (client, tls) in &mut clients {
            sim.send(*client, &tls.encrypt(b""));
        }
        for _ in 0..40 {
            sim.step();
        }
        for (client, tls) in &mut clients {
            let flight = tls.decrypt(&sim.received(*client), &mut Vec::new()).expect("a hello");
            sim.send(*client, &flight);
        }
        sim.leap(Duration::from_millis(1500));
        for _ in 0..40 {
            sim.step();
        }
        assert_eq!((sim.stats().opened, sim.stats().closed_total()), (40, 0));
    }
}

/// That it always has something to say keeps nobody in the handshake.
#[cfg(feature = "tls")]
#[test]
fn a_handshake_that_drips_is_timed_out() {
    use campaign::sim_tls;
    let mut sim = Sim::new(3, Config::new().handshake_budget(1), ());
    let listen = listen()
        .tls(sim_tls::server_config())
        .handshake_timeout(Duration::from_secs(1));
    let addr = sim.listen(listen, |_: &mut (), _| Echo).expect("listen");
    let flood: Vec<_> = (0..20).map(|_| sim.connect(addr).expect("connected")).collect();
    for &dripping in &flood {
        sim.send(dripping, &[0x16, 3, 1, 0x3F, 0xFF]);
    }
    sim.settle();
    sim.leap(Duration::from_millis(1500));
    for _ in 0..25 {
        for &dripping in &flood {
            sim.send(dripping, b"\x01");
        }
        sim.step();
    }
    assert_eq!(sim.stats().closed(CloseReason::HandshakeTimeout), 20);
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
        sim.control().close_listener(addr.port()).expect("it is there");
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
