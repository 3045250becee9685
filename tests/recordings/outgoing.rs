//! Outgoing connections replay with their failures and retries; a detached connection ends a replay.

use std::net::SocketAddr;
use std::time::Duration;

use kit::net::Place;
use portcullis::sim::{Answer, Ending, Replay, Sim, Tape};
use portcullis::{
    Closed, Config, Connect, Context, Framing, Handler, Outcome, Payloads, Recording, Retry,
};

use crate::{listen, outcome, Journal, Talker};

/// Calls another server when it gets a line, and reports that server's end.
struct Caller(SocketAddr);

impl Handler<Journal> for Caller {
    fn on_frame(&mut self, cx: &mut Context<'_, Journal>, _: &[u8]) -> Outcome {
        let options = Connect::new(Framing::Line).with(|connect| {
            connect.retry = Some(Retry::new(5));
        });
        cx.conn.control().connect(self.0, options, Called)?;
        Ok(())
    }
}

struct Called;

impl Handler<Journal> for Called {
    fn on_open(&mut self, cx: &mut Context<'_, Journal>) -> Outcome {
        cx.conn.send("hello\n")?;
        Ok(())
    }

    fn on_frame(&mut self, cx: &mut Context<'_, Journal>, line: &[u8]) -> Outcome {
        cx.app.push(format!("got {}", line.escape_ascii()));
        Ok(())
    }

    fn on_close(&mut self, cx: &mut Context<'_, Journal>, closed: &Closed) {
        cx.app.push(format!("lost: {closed}"));
    }

    fn on_connect_failed(&mut self, cx: &mut Context<'_, Journal>, closed: &Closed) {
        cx.app.push(format!("failed: {closed}"));
    }
}

#[test]
fn attempts_and_their_retries_replay() {
    let place = Place::new();
    let to = "192.0.2.7:80".parse().expect("an address");
    let answers = [
        Answer::Accept,
        Answer::AcceptAfter(Duration::from_millis(30)),
        Answer::FailAfter(Duration::from_millis(20), libc::EHOSTUNREACH),
        Answer::Refuse,
    ];
    for (seed, answer) in (1..).zip(answers) {
        let path = place.path(&seed.to_string());
        let recording = Recording::new(&path).with(|recording| recording.payloads = Payloads::Kept);
        let mut sim =
            Sim::recorded(seed, Config::new(), Journal::new(), recording).expect("a recording");
        sim.remote(to, answer);
        let addr = sim
            .listen(listen(), move |_, _| Caller(to))
            .expect("a port");
        let client = sim.connect(addr).expect("room");
        sim.send(client, b"go\n");
        sim.advance(Duration::from_secs(1));
        // One that is reachable later.
        sim.remote(to, Answer::Accept);
        sim.advance(Duration::from_secs(30));
        let happened = outcome(&sim.stats(), sim.app());
        drop(sim);
        let mut tape = Tape::read(&path).expect("a recording");
        assert!(tape.connections() >= 2, "{tape:?}");
        // The other server is no client.
        let script = tape.script(|_, _| true).expect("kept");
        let connects = script
            .ops
            .iter()
            .filter(|op| format!("{op:?}") == "Connect");
        assert_eq!(connects.count(), 1);
        let mut replay = Replay::new(tape, Config::new(), Journal::new()).expect("a whole tape");
        replay
            .listen(listen(), move |_, _| Caller(to))
            .expect("it listens");
        assert_eq!(replay.run(), Ok(Ending::Complete));
        assert_eq!(outcome(&replay.stats(), replay.app()), happened);
    }
}

#[test]
fn a_detached_connection_ends_a_replay() {
    struct Detaching;
    impl Handler<Journal> for Detaching {
        fn on_frame(&mut self, cx: &mut Context<'_, Journal>, _: &[u8]) -> Outcome {
            cx.conn.detach(drop)?;
            Ok(())
        }
    }
    let place = Place::new();
    let path = place.path("detached");
    let recording = Recording::new(&path).with(|recording| recording.payloads = Payloads::Kept);
    let mut sim = Sim::recorded(1, Config::new(), Journal::new(), recording).expect("a recording");
    let addr = sim.listen(listen(), |_, _| Detaching).expect("a port");
    let client = sim.connect(addr).expect("room");
    sim.send(client, b"go\n");
    sim.settle();
    drop(sim);
    let tape = Tape::read(&path).expect("a recording");
    let mut replay = Replay::new(tape, Config::new(), Journal::new()).expect("a whole tape");
    replay
        .listen(listen(), |_, _| Detaching)
        .expect("it listens");
    let divergence = replay.run().expect_err("it is detached");
    assert_eq!(divergence.recorded, "detach, connection 0");
    assert!(
        divergence
            .to_string()
            .contains("detached connection's thread"),
        "{divergence}"
    );

    // One that differs before is found before.
    let tape = Tape::read(&path).expect("a recording");
    let mut replay = Replay::new(tape, Config::new(), Journal::new()).expect("a whole tape");
    replay
        .listen(listen(), |_, _| Talker::default())
        .expect("it listens");
    let divergence = replay.run().expect_err("it answers");
    assert!(divergence.hint.is_none(), "{divergence}");
}
