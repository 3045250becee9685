//! An exact replay has the same events, in the same order, with the same reasons; and stops at the first that differs.

use std::time::Duration;

use kit::net::Place;
use portcullis::sim::{Call, Ending, Faults, Random, Replay, Sim, Tape};
use portcullis::{Config, Error, Framing, Listen, Payloads, Recording};

use crate::{config, listen, outcome, perform, recorded_world, replay, script, Journal, Talker};

fn record(place: &Place, seed: u64, payloads: Payloads, faults: Faults) -> (Tape, String) {
    let path = place.path(&format!("{seed}-{payloads:?}"));
    let recording = Recording::new(&path).with(|recording| recording.payloads = payloads);
    let mut sim =
        Sim::recorded(seed, config(), Journal::new(), recording).expect("a new recording");
    sim.set_faults(faults);
    let happened = perform(&mut sim, &script(seed, 120));
    drop(sim);
    (Tape::read(&path).expect("a recording"), happened)
}

#[test]
fn a_recorded_world_is_the_same_as_an_unrecorded_one() {
    let place = Place::new();
    for seed in 0..20 {
        let faults = || Faults::swarm(&mut Random::new(seed));
        let (_, recorded) = record(&place, seed, Payloads::Kept, faults());
        let mut sim = Sim::new(seed, config(), Journal::new());
        sim.set_faults(faults());
        assert_eq!(
            perform(&mut sim, &script(seed, 120)),
            recorded,
            "seed {seed}"
        );
    }
}

#[test]
fn a_replay_has_the_same_events_order_and_reasons() {
    let place = Place::new();
    for seed in 0..60 {
        let faults = match seed % 3 {
            0 => Faults::none(),
            1 => Faults::everything(20),
            _ => Faults::swarm(&mut Random::new(seed)),
        };
        let (tape, happened) = record(&place, seed, Payloads::Kept, faults);
        assert!(tape.is_whole() && tape.connections() > 0, "{tape:?}");
        assert_eq!(replay(tape, config(), listen()), happened, "seed {seed}");
    }
}

/// The clock stands and leaps in the simulator, as a real one does not.
#[test]
fn the_times_are_the_recorded_ones() {
    let place = Place::new();
    let path = place.path("times");
    let recording = Recording::new(&path).with(|recording| recording.payloads = Payloads::Kept);
    let mut sim = Sim::recorded(1, Config::new(), Vec::new(), recording).expect("a recording");
    struct Watch;
    impl portcullis::Handler<Vec<Duration>> for Watch {
        fn on_frame(
            &mut self,
            cx: &mut portcullis::Context<'_, Vec<Duration>>,
            _: &[u8],
        ) -> portcullis::Outcome {
            // The idle time and the age, as the clock of the server has them.
            let info = cx.conn.info().expect("it is open");
            cx.app.extend([info.age, info.idle]);
            Ok(())
        }
    }
    let addr = sim.listen(listen(), |_, _| Watch).expect("a port");
    let client = sim.connect(addr).expect("room");
    for millis in [0, 0, 1, 86_400_000, 3, 7_000_000_000, 0] {
        sim.send(client, b"now\n");
        sim.settle();
        sim.leap(Duration::from_millis(millis));
    }
    let times = sim.app().clone();
    drop(sim);
    let tape = Tape::read(&path).expect("a recording");
    assert_eq!(tape.span(), Duration::from_millis(7_086_400_004));
    let mut replay = Replay::new(tape, Config::new(), Vec::new()).expect("a whole tape");
    replay.listen(listen(), |_, _| Watch).expect("it listens");
    assert_eq!(replay.run(), Ok(Ending::Complete));
    assert_eq!(*replay.app(), times);
    assert!(times.len() >= 2);
}

#[test]
fn a_handler_that_answers_otherwise_is_found() {
    let place = Place::new();
    let path = place.path("changed");
    let recording = Recording::new(&path).with(|recording| recording.payloads = Payloads::Kept);
    let (mut sim, addr) = recorded_world(recording);
    let clients = [sim.connect(addr), sim.connect(addr)].map(|client| client.expect("room"));
    for client in clients {
        sim.send(client, b"first\n");
        sim.settle();
        sim.advance(Duration::from_millis(250));
        sim.send(client, b"the second line\n");
        sim.settle();
    }
    drop(sim);

    let differing = |payloads: &str, handler: fn() -> Talker| {
        let tape = Tape::read(place.path(payloads)).expect("a recording");
        let mut replay = Replay::new(tape, config(), Journal::new()).expect("a whole tape");
        replay
            .listen(listen(), move |_, _| handler())
            .expect("it listens");
        let divergence = replay.run().expect_err("it differs");
        // From then on nothing happens.
        assert_eq!(replay.step(), Err(divergence.clone()));
        let lines = replay.app().len();
        assert!(replay.step().is_err());
        assert_eq!(replay.app().len(), lines);
        (divergence, replay.now())
    };
    let (divergence, now) = differing("changed", || Talker {
        lines: 0,
        changed: Some(2),
    });
    assert_eq!(divergence.connection, Some(0));
    assert_eq!((divergence.at, now), (now, Duration::from_millis(250)));
    assert_eq!(
        divergence.recorded,
        "write of 16 bytes, connection 0: b\"the second line\\n\""
    );
    assert_eq!(
        divergence.replayed,
        "write of 15 bytes: b\"something else\\n\""
    );
    assert!(divergence.to_string().contains("byte"), "{divergence}");

    // The line at that number is the recorded call.
    let tape = Tape::read(&path).expect("a recording");
    let line = format!("{} 0.250000 {}", divergence.record, divergence.recorded);
    assert!(tape.lines().any(|each| each == line), "{line}");
}

/// The same kernel calls, and another reason.
#[test]
fn another_reason_is_found() {
    struct Ends(bool);
    impl portcullis::Handler for Ends {
        fn on_frame(&mut self, _: &mut portcullis::Context<'_>, _: &[u8]) -> portcullis::Outcome {
            match self.0 {
                true => Err(portcullis::Close::new()),
                false => Err(portcullis::Close::because("no")),
            }
        }
    }
    let place = Place::new();
    let path = place.path("reason");
    let mut sim = Sim::recorded(1, Config::new(), (), Recording::new(&path)).expect("a recording");
    let addr = sim
        .listen(listen(), |_: &mut (), _| Ends(true))
        .expect("a port");
    let client = sim.connect(addr).expect("room");
    sim.send(client, b"x\n");
    sim.settle();
    sim.finish(client);
    sim.settle();
    drop(sim);
    for (same, found) in [(true, None), (false, Some("end of a connection: failed"))] {
        let tape = Tape::read(&path).expect("a recording");
        let tape = tape.filled(|_, _, buffer| buffer.copy_from_slice(b"x\n"));
        let mut replay = Replay::new(tape, Config::new(), ()).expect("a whole tape");
        replay
            .listen(listen(), move |_: &mut (), _| Ends(same))
            .expect("it listens");
        let differs = replay.run().err();
        assert_eq!(differs.as_ref().map(|differs| &*differs.replayed), found);
        assert_eq!(
            differs.map(|differs| differs.recorded),
            found.map(|_| "end of a connection: closed".to_owned())
        );
    }
}

#[test]
fn without_payloads_sizes_and_times_replay() {
    let place = Place::new();
    for payloads in [Payloads::Dropped, Payloads::Hashed] {
        let path = place.path(&format!("{payloads:?}"));
        let recording = Recording::new(&path).with(|recording| recording.payloads = payloads);
        let (mut sim, addr) = recorded_world(recording);
        let client = sim.connect(addr).expect("room");
        for line in ["hello\n", "he", "llo\n"] {
            sim.send(client, line.as_bytes());
            sim.settle();
            sim.advance(Duration::from_millis(300));
        }
        drop(sim);
        let bytes = std::fs::read(&path).expect("a file");
        let has = |text: &[u8]| bytes.windows(text.len()).any(|window| window == text);
        assert!(!has(b"hello") && !has(b"still"));

        let read = || Tape::read(&path).expect("a recording");
        let refused = Replay::new(read(), config(), Journal::new()).map(drop);
        assert!(refused
            .expect_err("no payloads")
            .to_string()
            .contains("Tape::filled"));
        assert!(read().script(|_, _| true).is_err());

        let given = |text: &'static [u8; 12]| {
            let tape = read().filled(move |connection, at, buffer| {
                assert_eq!(connection, 0);
                let at = usize::try_from(at).expect("small");
                buffer.copy_from_slice(&text[at..at + buffer.len()]);
            });
            let mut replay = Replay::new(tape, config(), Journal::new()).expect("a whole tape");
            replay
                .listen(listen(), |_, _| Talker::default())
                .expect("it listens");
            replay.run()
        };
        assert_eq!(given(b"hello\nhello\n"), Ok(Ending::Complete));
        // Other input of the same sizes.
        let other = given(b"hallo\nhollo\n");
        match payloads {
            Payloads::Dropped => assert_eq!(other, Ok(Ending::Complete)),
            _ => assert_eq!(
                other.expect_err("another hash").replayed,
                "input that is not the recorded one: b\"hallo\\n\""
            ),
        }
        // The wrong framing: no line ends where one did.
        let unframed = given(b"xxxxxxxxxxxx").expect_err("no line");
        assert_eq!(unframed.connection, Some(0), "{unframed}");
    }
}

/// What the program does between two iterations, it does again.
#[test]
fn changes_between_iterations_are_the_programs() {
    let place = Place::new();
    let path = place.path("suspended");
    let recording = Recording::new(&path).with(|recording| recording.payloads = Payloads::Kept);
    let (mut sim, addr) = recorded_world(recording);
    let first = sim.connect(addr).expect("room");
    sim.step();
    sim.step();
    let listener = sim.control().listeners()[0].id;
    sim.control().suspend(listener).expect("it is there");
    sim.connect(addr).expect("room");
    sim.send(first, b"bye\n");
    for _ in 0..5 {
        sim.step();
    }
    let happened = outcome(&sim.stats(), sim.app());
    drop(sim);

    let start = || {
        let tape = Tape::read(&path).expect("a recording");
        let mut replay = Replay::new(tape, config(), Journal::new()).expect("a whole tape");
        replay
            .listen(listen(), |_, _| Talker::default())
            .expect("it listens");
        replay
    };
    let mut replay = start();
    let divergence = replay.run().expect_err("nothing was suspended");
    assert_eq!(divergence.recorded, "deregistration of a listener 0");

    let mut replay = start();
    assert_eq!((replay.step(), replay.step()), (Ok(true), Ok(true)));
    let listener = replay.control().listeners()[0].id;
    replay.control().suspend(listener).expect("it is there");
    assert_eq!(replay.run(), Ok(Ending::Complete));
    assert_eq!(outcome(&replay.stats(), replay.app()), happened);
}

#[test]
fn another_set_of_listeners_is_found() {
    let place = Place::new();
    let (tape, _) = record(&place, 3, Payloads::Kept, Faults::none());
    let mut replay = Replay::new(tape, config(), Journal::new()).expect("a whole tape");
    replay
        .listen(listen(), |_, _| Talker::default())
        .expect("it listens");
    let other = Listen::tcp("127.0.0.1:0", Framing::Raw);
    let error = replay
        .listen(other, |_, _| Talker::default())
        .expect_err("the recorded server had one");
    assert!(error.to_string().contains("replayed: listen"), "{error}");
}

#[cfg(feature = "tls")]
#[test]
fn tls_is_refused_in_words() {
    let place = Place::new();
    let (tape, _) = record(&place, 4, Payloads::Kept, Faults::none());
    let mut replay = Replay::new(tape, config(), Journal::new()).expect("a whole tape");
    let listen = listen().tls(kit::tls::Site::new().server());
    let error = replay
        .listen(listen, |_, _| Talker::default())
        .expect_err("no TLS");
    assert!(error.to_string().contains("random keys"), "{error}");
}

#[test]
fn errors_name_the_file() {
    let place = Place::new();
    let path = place.path("4-Dropped");
    let (mut tape, _) = record(&place, 4, Payloads::Dropped, Faults::none());
    let script = tape.script(|_, _| true).map(drop);
    let (again, _) = record(&place, 5, Payloads::Kept, Faults::none());
    let mut replay = Replay::new(again, config(), Journal::new()).expect("a whole tape");
    let listens = |replay: &mut Replay<Journal>| {
        let listens = replay.listen(listen(), |_, _| Talker::default());
        listens.map(drop)
    };
    listens(&mut replay).expect("it listens");
    let second = listens(&mut replay);
    let whole = Replay::new(tape, config(), Journal::new()).map(drop);
    for (error, path) in [
        (script, &path),
        (whole, &path),
        (second, &place.path("5-Kept")),
    ] {
        let Err(Error::Recording { path: named, .. }) = &error else {
            panic!("{error:?}");
        };
        assert_eq!(named, path);
    }
}

#[test]
fn failing_calls_fail_again() {
    let place = Place::new();
    for (seed, errno) in [(100, libc::EMFILE), (101, libc::ECONNABORTED)] {
        let faults = Faults::none().with(Call::Accept, 0, errno);
        let (tape, happened) = record(&place, seed, Payloads::Kept, faults);
        let text = std::io::Error::from_raw_os_error(errno).to_string();
        assert!(tape.lines().any(|line| line.contains(&text)), "{text}");
        assert_eq!(replay(tape, config(), listen()), happened);
    }
}
