//! What other threads told a real server through handles is told again: frames, kills, drains.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::time::Duration;

use kit::net::{connect, spawn, Place};
use portcullis::sim::{Ending, Replay, Tape};
use portcullis::{CloseReason, Config, Payloads, Recording, Server};

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
