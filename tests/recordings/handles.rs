//! What other threads told a real server through handles is told again: frames, kills, drains.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::time::Duration;

use kit::net::{connect, spawn, Place};
use portcullis::sim::{Ending, Replay, Sim, Tape};
use portcullis::{
    CloseReason, Config, Context, Handle, HandleError, Handler, Outcome, Payloads, Recording,
    Server,
};

use crate::{listen, outcome, Journal, Talker};

fn recording(place: &Place, payloads: Payloads) -> Recording {
    Recording::new(place.path("server.rec")).with(|recording| recording.payloads = payloads)
}

fn replayed(tape: Tape) -> Replay<Journal> {
    let mut replay = Replay::new(tape, Config::new(), Journal::new()).expect("a whole tape");
    replay
        .listen(listen(), |_, _| Talker::default())
        .expect("it listens");
    replay
}

#[test]
fn frames_kills_and_drains_of_handles_replay() {
    for payloads in [Payloads::Kept, Payloads::Dropped] {
        let place = Place::new();
        let recording = recording(&place, payloads);
        let running = spawn(move || {
            let mut server = Server::recorded(Config::new(), recording).expect("a recording");
            server
                .listen(listen(), |_: &mut Journal, _| Talker::default())
                .expect("a port");
            (server, Journal::new())
        });
        let mut clients: Vec<_> = (0..8).map(|_| running.connect_open()).collect();
        let ids: Vec<_> = running
            .ask(|_, control| control.connections())
            .iter()
            .map(|info| info.id)
            .collect();
        assert_eq!(ids.len(), 8);
        for round in 0..20_u8 {
            for (client, id) in clients.iter_mut().zip(&ids) {
                let frame = format!("from a thread {round}\n");
                running.handle.send(*id, frame.clone()).expect("queued");
                client.write_all(b"hello\n").expect("sent");
                let mut both = vec![0; frame.len() + 6];
                client.read_exact(&mut both).expect("both");
            }
        }
        running.handle.kill(ids[3]).expect("queued");
        running.until("it is killed", |stats| {
            stats.closed(CloseReason::Killed) == 1
        });
        clients[0].shutdown(Shutdown::Write).expect("finished");
        running
            .handle
            .drain(Duration::from_millis(20))
            .expect("queued");
        running.until("it is drained", |stats| stats.closed_total() == 8);
        let (stats, journal) = running.finish();

        let mut tape = Tape::read(place.path("server.rec")).expect("a recording");
        if payloads == Payloads::Dropped {
            tape = tape.filled(|_, before, buffer| {
                let line = b"hello\n".iter().cycle().skip((before % 6) as usize);
                buffer
                    .iter_mut()
                    .zip(line)
                    .for_each(|(to, byte)| *to = *byte);
            });
        }
        let mut replay = replayed(tape);
        match replay.run() {
            Ok(ending) => assert_eq!(ending, Ending::Complete),
            Err(divergence) => panic!("{divergence}"),
        }
        assert_eq!(
            outcome(&replay.stats(), replay.app()),
            outcome(&stats, &journal)
        );
    }
}

/// What a handler or a worker does through its handle is in the file, and is not done again by the replay's.
#[test]
fn the_programs_own_commands_come_from_the_file() {
    #[derive(Default)]
    struct State {
        handle: Option<Handle<Self>>,
    }
    struct Worker;
    impl Handler<State> for Worker {
        fn on_frame(&mut self, cx: &mut Context<'_, State>, line: &[u8]) -> Outcome {
            let (handle, id) = (cx.app.handle.as_ref().expect("it is set"), cx.conn.id());
            match line.trim_ascii_end() {
                b"kill twice" => {
                    handle.kill(id)?;
                    handle.kill(id)?;
                }
                b"drain" => handle.drain(Duration::from_secs(1))?,
                line => handle.send(id, line.to_vec())?,
            }
            Ok(())
        }
    }
    let place = Place::new();
    let recording = recording(&place, Payloads::Kept);
    let sim = Sim::recorded(1, Config::new(), State::default(), recording);
    let mut sim = sim.expect("a recording");
    sim.app_mut().handle = Some(sim.handle());
    let addr = sim.listen(listen(), |_, _| Worker).expect("a port");
    let clients = [sim.connect(addr), sim.connect(addr)].map(|client| client.expect("room"));
    for line in ["hello\n", "kill twice\n"] {
        sim.send(clients[0], line.as_bytes());
        sim.settle();
    }
    sim.send(clients[1], b"drain\n");
    // Both are accepted in the drain. The second opens while the command that the first one's frame
    // causes is queued, and ends behind that command.
    let first = sim.connect(addr).expect("room");
    sim.send(first, b"hello\n");
    sim.connect(addr).expect("room");
    sim.settle();
    let stats = sim.stats();
    assert_eq!((stats.traffic.frames_out, stats.undeliverable), (1, 2));
    drop(sim);
    let tape = Tape::read(place.path("server.rec")).expect("a recording");
    let replay = Replay::new(tape, Config::new(), State::default());
    let mut replay = replay.expect("a whole tape");
    replay.app_mut().handle = Some(replay.handle());
    replay.listen(listen(), |_, _| Worker).expect("it listens");
    assert_eq!(replay.run(), Ok(Ending::Complete));
    assert_eq!(format!("{:?}", replay.stats()), format!("{stats:?}"));
    let handle = replay.handle();
    drop(replay);
    assert_eq!(handle.drain(Duration::ZERO), Err(HandleError::ServerGone));
}

/// A job is a closure: what it does is unknown, and the divergence says so.
#[test]
fn a_divergence_after_a_job_names_it() {
    let place = Place::new();
    let recording = recording(&place, Payloads::Kept);
    let running = spawn(move || {
        let mut server = Server::recorded(Config::new(), recording).expect("a recording");
        server
            .listen(listen(), |_: &mut Journal, _| Talker::default())
            .expect("a port");
        (server, Journal::new())
    });
    let client = running.connect_open();
    running.ask(|_, control| {
        let id = control.connections()[0].id;
        control.kill(id);
    });
    running.until("it is killed", |stats| stats.closed_total() == 1);
    drop(client);
    drop(connect(running.addr()));
    running.finish();
    let tape = Tape::read(place.path("server.rec")).expect("a recording");
    let divergence = replayed(tape).run().expect_err("nothing was killed");
    assert!(divergence.recorded.starts_with("close"), "{divergence}");
    assert!(
        divergence.to_string().contains("jobs and messages"),
        "{divergence}"
    );
}
