//! Outgoing connections in the simulator: attempts that fail in every way, the time between them, and what happens meanwhile.

use std::time::Duration;

use portcullis::sim::{Answer, Call, ClientState, Faults, Sim};
use portcullis::{
    Addr, CloseReason, Closed, Config, ConnId, Connect, Context, Error, Framing, Handler, Listen,
    Outcome, Retry, State,
};

const REMOTE: &str = "203.0.113.7:7000";

type Log = Vec<(Duration, String)>;

/// Notes what it hears.
#[derive(Debug)]
struct Notes;

fn note(cx: &mut Context<'_, Log>, words: impl Into<String>) {
    let at = cx.conn.info().map_or(Duration::ZERO, |info| info.age);
    cx.app.push((at, words.into()));
}

impl Handler<Log> for Notes {
    fn on_open(&mut self, cx: &mut Context<'_, Log>) -> Outcome {
        note(cx, "open");
        Ok(())
    }

    fn on_frame(&mut self, cx: &mut Context<'_, Log>, frame: &[u8]) -> Outcome {
        note(cx, String::from_utf8_lossy(frame));
        cx.conn.send(frame)?;
        Ok(())
    }

    fn on_close(&mut self, cx: &mut Context<'_, Log>, closed: &Closed) {
        note(cx, format!("closed: {closed}"));
    }

    fn on_connect_failed(&mut self, cx: &mut Context<'_, Log>, closed: &Closed) {
        note(cx, format!("failed: {closed}"));
    }
}

fn world(seed: u64) -> Sim<Log> {
    Sim::new(seed, Config::new(), Log::new())
}

fn line() -> Connect {
    Connect::new(Framing::Line)
}

/// Without chance: 1 s, 2 s, 4 s, 8 s, 8 s ...
fn steady(attempts: u32) -> Retry {
    Retry::new(attempts)
        .first_delay(Duration::from_secs(1))
        .longest_delay(Duration::from_secs(8))
        .jitter(0)
}

fn dial(sim: &mut Sim<Log>, options: Connect) -> ConnId {
    sim.control()
        .connect(REMOTE, options, Notes)
        .expect("begun")
}

fn secs(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// What was heard, with the seconds at which it was.
fn heard(sim: &Sim<Log>) -> Vec<(u64, &str)> {
    sim.app()
        .iter()
        .map(|(at, words)| (at.as_secs(), words.as_str()))
        .collect()
}

const REFUSED: &str = "failed: could not connect: Connection refused (os error 111)";

#[test]
fn attempts_are_made_at_their_times_and_told_once() {
    let mut sim = world(1);
    sim.remote(REMOTE, Answer::Refuse);
    dial(
        &mut sim,
        line().with(|connect| connect.retry = Some(steady(6))),
    );
    for (at, attempts) in [(0, 1), (1, 2), (3, 3), (7, 4), (15, 5)] {
        let now = sim.now();
        sim.advance(secs(at).saturating_sub(now));
        assert_eq!(sim.calls(Call::Connect), attempts, "at {at} s");
        assert_eq!(heard(&sim), []);
        assert_eq!(
            sim.descriptors(),
            0,
            "between two attempts there is no socket"
        );
        assert_eq!((sim.stats().open, sim.stats().connecting), (1, 1));
    }
    sim.advance(secs(8));
    assert_eq!(heard(&sim), [(23, REFUSED)]);
    sim.advance(secs(3600));
    assert_eq!(sim.calls(Call::Connect), 6);
    let stats = sim.stats();
    assert_eq!((stats.open, stats.outgoing, stats.connecting), (0, 1, 0));
    assert_eq!(stats.closed(CloseReason::ConnectFailed), 1);
}

#[test]
fn without_retry_there_is_one_attempt() {
    let mut sim = world(1);
    dial(&mut sim, line());
    sim.advance(secs(3600));
    assert_eq!(sim.calls(Call::Connect), 1);
    assert_eq!(heard(&sim), [(0, REFUSED)]);
}

/// It keeps its id from attempt to attempt; what was sent meanwhile goes out in the end.
#[test]
fn it_connects_when_a_server_listens_at_last() {
    let mut sim = world(1);
    let id = dial(
        &mut sim,
        line().with(|connect| connect.retry = Some(steady(u32::MAX))),
    );
    sim.advance(secs(2));
    let mut control = sim.control();
    control
        .conn(id)
        .expect("it waits")
        .send("early\n")
        .expect("queued");
    let info = control.connections().remove(0);
    assert_eq!(
        (info.id, info.state, info.queued),
        (id, State::Connecting, 6)
    );
    assert_eq!(
        info.time_left().next(),
        Some(("connect timeout", secs(1))),
        "the third comes at 3 s"
    );
    sim.remote(REMOTE, Answer::AcceptAfter(Duration::from_millis(300)));
    sim.advance(secs(2));
    assert_eq!(heard(&sim), [(3, "open")]);
    let dialed = sim.dialed(REMOTE);
    assert_eq!(dialed.len(), 1);
    assert_eq!(sim.received(dialed[0]), b"early\n");
    sim.send(dialed[0], b"hello\n");
    sim.settle();
    assert_eq!(sim.received(dialed[0]), b"hello\n");
    sim.finish(dialed[0]);
    sim.advance(secs(1));
    assert_eq!(sim.state(dialed[0]), ClientState::Finished);
    assert_eq!(heard(&sim)[2], (4, "closed: peer finished"));
}

/// Each attempt has its own time, and the pauses count from its end.
#[test]
fn silence_is_given_up_attempt_by_attempt() {
    let mut sim = world(1);
    sim.remote(REMOTE, Answer::Silence);
    dial(
        &mut sim,
        line().with(|connect| {
            connect.connect_timeout = secs(5);
            connect.retry = Some(steady(3));
        }),
    );
    sim.advance(secs(4));
    let info = sim.control().connections().remove(0);
    assert_eq!(info.time_left().next(), Some(("connect timeout", secs(1))));
    assert_eq!(sim.descriptors(), 1);
    sim.advance(secs(100));
    // 5 s, 1 s, 5 s, 2 s, 5 s.
    assert_eq!(heard(&sim), [(18, "failed: connect timeout")]);
    assert_eq!(sim.calls(Call::Connect), 3);
}

/// A late error of the kernel and an immediate one have the same effect when a retry is allowed.
#[test]
fn every_error_is_an_attempt_that_failed() {
    for &errno in Call::Connect.errors() {
        let mut sim = world(7);
        sim.remote(REMOTE, Answer::Accept);
        sim.set_faults(Faults::none().with(Call::Connect, 0, errno));
        dial(
            &mut sim,
            line().with(|connect| connect.retry = Some(steady(2))),
        );
        sim.advance(secs(1));
        sim.advance(secs(2));
        assert_eq!(heard(&sim).len(), 1, "errno {errno}");
        assert_eq!(heard(&sim)[0].1, "open", "errno {errno}");
        assert_eq!(sim.calls(Call::Connect), 2);
    }
}

#[test]
fn without_retry_what_the_kernel_says_at_once_is_an_error_of_the_call() {
    for errno in [libc::EMFILE, libc::ENFILE, libc::ENOBUFS, libc::ENETUNREACH] {
        let mut sim = world(7);
        sim.set_faults(Faults::none().with(Call::Connect, 0, errno));
        match sim.control().connect(REMOTE, line(), Notes) {
            Err(Error::Connect { source, .. }) => assert_eq!(source.raw_os_error(), Some(errno)),
            other => panic!("{other:?}"),
        }
        sim.advance(secs(60));
        assert_eq!(
            (heard(&sim), sim.stats().outgoing, sim.descriptors()),
            (vec![], 0, 0)
        );
    }
}

#[test]
fn a_socket_that_cannot_be_registered_is_an_attempt_that_failed() {
    let mut sim = world(7);
    sim.remote(REMOTE, Answer::Accept);
    sim.set_faults(Faults::none().with(Call::Register, 0, libc::ENOSPC));
    dial(
        &mut sim,
        line().with(|connect| connect.retry = Some(steady(2))),
    );
    assert_eq!(sim.descriptors(), 0);
    sim.advance(secs(1));
    assert_eq!(heard(&sim), [(1, "open")]);
}

/// A limit of descriptors: those that are free again are used.
#[test]
fn no_descriptor_is_an_attempt_that_failed() {
    let mut sim = world(7);
    sim.remote(REMOTE, Answer::Accept);
    sim.set_descriptor_limit(1);
    let first = dial(&mut sim, line());
    sim.settle();
    dial(
        &mut sim,
        line().with(|connect| connect.retry = Some(steady(10))),
    );
    sim.advance(secs(6));
    assert_eq!(heard(&sim), [(0, "open")]);
    sim.control().kill(first);
    sim.advance(secs(1));
    assert_eq!(heard(&sim)[1..], [(6, "closed: killed"), (7, "open")]);
}

/// An attempt that is given up gives its descriptor back: a client that waits for one comes in at once.
#[test]
fn the_descriptor_of_an_attempt_is_free_for_a_client() {
    let config = Config::new().with(|config| config.emfile_backoff = secs(60));
    let mut sim = Sim::new(1, config, Log::new());
    sim.remote(REMOTE, Answer::Silence);
    let listen = Listen::tcp("127.0.0.1:0", Framing::Line);
    let addr = sim.listen(listen, |_: &mut Log, _| Notes).expect("listen");
    sim.settle();
    sim.set_descriptor_limit(sim.descriptors() + 1);
    dial(
        &mut sim,
        line().with(|connect| {
            connect.connect_timeout = secs(1);
            connect.retry = Some(steady(2).first_delay(secs(8)));
        }),
    );
    let client = sim.connect(addr).expect("it listens");
    sim.send(client, b"hello\n");
    sim.settle();
    assert_eq!(sim.received(client), b"", "there is no descriptor");
    sim.advance(secs(2));
    assert_eq!(sim.received(client), b"hello\n");
}

#[test]
fn one_that_waits_for_its_next_attempt_can_be_killed() {
    let mut sim = world(1);
    let id = dial(
        &mut sim,
        line().with(|connect| connect.retry = Some(steady(10))),
    );
    sim.advance(secs(2));
    assert!(sim.control().kill(id));
    sim.advance(secs(3600));
    assert_eq!(heard(&sim), [(2, "failed: killed")]);
    assert_eq!(sim.calls(Call::Connect), 2);
    assert!(!sim.control().kill(id), "it has gone");
}

#[test]
fn a_drain_makes_no_further_attempt() {
    for answer in [Answer::Refuse, Answer::Silence] {
        let mut sim = world(1);
        sim.remote(REMOTE, answer);
        dial(
            &mut sim,
            line().with(|connect| connect.retry = Some(steady(10))),
        );
        sim.advance(secs(2));
        sim.control().drain(secs(1000));
        sim.settle();
        assert_eq!(heard(&sim), [(2, "failed: drained")]);
        let report = sim.drain_report().expect("over at once");
        assert_eq!((report.ended, report.failed, report.forced), (0, 1, 0));
        assert!(matches!(
            sim.control().connect(REMOTE, line(), Notes),
            Err(Error::Draining)
        ));
    }
}

/// The pauses are shorter by chance, and the seed is the chance.
#[test]
fn chance_is_the_seeds() {
    let times = |seed| {
        let mut sim = world(seed);
        let retry = Retry::new(u32::MAX)
            .first_delay(secs(1))
            .longest_delay(secs(1))
            .jitter(50);
        dial(&mut sim, line().with(|connect| connect.retry = Some(retry)));
        let mut times = Vec::new();
        let mut attempts = 0;
        while times.len() < 10 {
            sim.advance(Duration::from_millis(1));
            if sim.calls(Call::Connect) > attempts {
                attempts = sim.calls(Call::Connect);
                times.push(sim.now().as_millis());
            }
        }
        times
    };
    let one = times(1);
    assert_eq!(one, times(1));
    assert_ne!(one, times(2));
    for pair in one.windows(2) {
        assert!((500..=1001).contains(&(pair[1] - pair[0])), "{one:?}");
    }
}

/// A connection that has come about and is lost is not made again: that is the handler's to decide.
#[test]
fn what_was_open_is_not_made_again() {
    let mut sim = world(1);
    sim.remote(REMOTE, Answer::Accept);
    dial(
        &mut sim,
        line().with(|connect| connect.retry = Some(steady(10))),
    );
    sim.settle();
    let peer = sim.dialed(REMOTE)[0];
    sim.reset(peer);
    sim.advance(secs(100));
    assert_eq!(heard(&sim), [(0, "open"), (0, "closed: reset by peer")]);
    assert_eq!(sim.calls(Call::Connect), 1);
}

/// A handler that retries by itself, from the callback.
#[test]
fn a_failure_can_be_answered_with_another_connection() {
    struct Stubborn;
    impl Handler<Log> for Stubborn {
        fn on_frame(&mut self, _: &mut Context<'_, Log>, _: &[u8]) -> Outcome {
            Ok(())
        }
        fn on_connect_failed(&mut self, cx: &mut Context<'_, Log>, _: &Closed) {
            let other = "unix:/run/other.sock";
            let outcome = cx.conn.control().connect(other, line(), Notes);
            note(cx, format!("{}", outcome.is_ok()));
        }
    }
    let mut sim = world(1);
    sim.remote(Addr::unix("/run/other.sock"), Answer::Accept);
    sim.control()
        .connect(REMOTE, line(), Stubborn)
        .expect("begun");
    sim.settle();
    assert_eq!(heard(&sim), [(0, "true"), (0, "open")]);
    assert_eq!(sim.dialed("unix:/run/other.sock").len(), 1);
}

/// At the cap its own place is not free yet in its last callback, and is afterwards.
#[test]
fn the_place_of_one_that_failed_is_free_again() {
    let mut sim = Sim::new(1, Config::max_connections(1), Log::new());
    dial(&mut sim, line());
    assert!(matches!(
        sim.control().connect(REMOTE, line(), Notes),
        Err(Error::AtCapacity { max_connections: 1 })
    ));
    sim.settle();
    dial(&mut sim, line());
    sim.settle();
    assert_eq!(heard(&sim), [(0, REFUSED), (0, REFUSED)]);
}

/// Both ends in one slab, in virtual time.
#[test]
fn the_simulated_server_can_connect_to_itself() {
    let mut sim = world(3);
    let addr = sim
        .listen(
            Listen::tcp("127.0.0.1:0", Framing::Line),
            |_: &mut Log, _| Notes,
        )
        .expect("listen");
    let id = sim.control().connect(addr, line(), Notes).expect("begun");
    sim.settle();
    sim.control()
        .conn(id)
        .expect("open")
        .send("once\n")
        .expect("queued");
    sim.step();
    sim.control().conn(id).expect("open").close();
    sim.advance(secs(10));
    let words: Vec<_> = sim.app().iter().map(|(_, words)| words.as_str()).collect();
    assert_eq!(words[..3], ["open", "open", "once\n"], "{words:?}");
    let stats = sim.stats();
    assert_eq!(
        (
            stats.accepted,
            stats.outgoing,
            stats.open,
            stats.closed_total()
        ),
        (1, 1, 0, 2)
    );
}

/// Whatever the kernel does, each is told one end, and the invariants hold after every turn.
#[test]
fn hostile_kernels_bring_no_connection_out_of_its_course() {
    for seed in 0..300 {
        let mut sim = world(seed);
        let answers = [
            Answer::Accept,
            Answer::AcceptAfter(Duration::from_millis(seed * 7)),
            Answer::Refuse,
            Answer::FailAfter(secs(1), libc::ECONNRESET),
            Answer::Silence,
        ];
        sim.set_faults(Faults::everything(100));
        let mut begun = 0;
        for round in 0..40 {
            sim.remote(REMOTE, answers[(seed as usize + round) % answers.len()]);
            let retry = (round % 3 > 0).then(|| Retry::new(round as u32 % 5 + 1));
            begun += u64::from(
                sim.control()
                    .connect(REMOTE, line().with(|connect| connect.retry = retry), Notes)
                    .is_ok(),
            );
            for peer in sim.dialed(REMOTE) {
                sim.send(peer, b"hello\n");
                if round % 5 == 0 {
                    sim.finish(peer);
                }
            }
            if let Some(info) = sim
                .control()
                .connections()
                .first()
                .filter(|_| round % 11 == 0)
            {
                let id = info.id;
                sim.control().kill(id);
            }
            sim.advance(Duration::from_millis(round as u64 * 50));
        }
        sim.advance(secs(3600));
        let stats = sim.stats();
        assert_eq!(
            (stats.outgoing, stats.open, stats.closed_total()),
            (begun, 0, begun),
            "seed {seed}"
        );
        let count = |what: &str| {
            sim.app()
                .iter()
                .filter(|(_, words)| words.starts_with(what))
                .count() as u64
        };
        assert_eq!(count("open"), stats.opened);
        assert_eq!(
            (count("closed"), count("failed")),
            (stats.opened, begun - stats.opened),
            "seed {seed}"
        );
        assert_eq!(sim.descriptors(), 0);
    }
}

/// The peer's silence begins when it could have said something.
#[test]
fn no_connection_is_idle_before_it_is_connected() {
    let mut sim = world(1);
    sim.remote(REMOTE, Answer::AcceptAfter(secs(5)));
    let id = dial(&mut sim, line());
    sim.advance(secs(7));
    let info = sim
        .control()
        .conn(id)
        .and_then(|conn| conn.info())
        .expect("it is open");
    assert_eq!(
        (info.age, info.idle, info.state),
        (secs(7), secs(2), State::Open)
    );
}

/// The slot of the connection that ends is free in its last callback: at the cap too another one may
/// begin there.
#[test]
fn at_the_cap_another_may_begin_in_the_last_callback() {
    struct Again;
    impl Handler<Vec<String>> for Again {
        fn on_frame(&mut self, _: &mut Context<'_, Vec<String>>, _: &[u8]) -> Outcome {
            Ok(())
        }

        fn on_connect_failed(&mut self, cx: &mut Context<'_, Vec<String>>, _: &Closed) {
            if cx.app.len() == 3 {
                return;
            }
            let outcome =
                cx.conn
                    .control()
                    .connect("203.0.113.7:25", Connect::new(Framing::Packet2), Again);
            cx.app
                .push(outcome.map_or_else(|error| error.to_string(), |id| id.to_string()));
        }
    }
    let mut sim = Sim::new(1, Config::max_connections(1), Vec::new());
    sim.remote("203.0.113.7:25", Answer::Refuse);
    let begun = sim
        .control()
        .connect("203.0.113.7:25", Connect::new(Framing::Packet2), Again);
    begun.expect("a place");
    sim.settle();
    let refused = |outcome: &String| outcome.contains("max_connections");
    assert!(!sim.app().iter().any(refused), "{:?}", sim.app());
    let stats = sim.stats();
    assert_eq!((stats.outgoing, stats.open, stats.peak), (4, 0, 1));
}
