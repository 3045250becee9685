//! A peer that is gone is noticed while its connection is paused or held, in every order of events.

use std::io::Write;
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use kit::net::{local, packet2, reset, PATIENCE};
use portcullis::sim::{Call, ClientId, Scripted, Sim};
use portcullis::{
    CloseReason, Config, ConnId, Context, Framing, Handler, Listen, Outcome, Server, Stats,
};

/// Pauses at "pause", holds at "hold", and records everything.
#[derive(Default)]
struct Log {
    id: Option<ConnId>,
    calls: Vec<String>,
}

struct Stalls;

impl Handler<Log> for Stalls {
    fn on_open(&mut self, cx: &mut Context<'_, Log>) -> Outcome {
        cx.app.id = Some(cx.conn.id());
        Ok(())
    }

    fn on_frame(&mut self, cx: &mut Context<'_, Log>, frame: &[u8]) -> Outcome {
        let words = String::from_utf8_lossy(frame).trim_end().to_owned();
        match &*words {
            "pause" => cx.conn.pause(),
            "hold" => cx.conn.hold(),
            _ => {}
        }
        cx.app.calls.push(words);
        Ok(())
    }

    fn on_finish(&mut self, cx: &mut Context<'_, Log>) -> Outcome {
        cx.app.calls.push("finish".to_owned());
        cx.conn.close_after_input();
        Ok(())
    }
}

/// The ways in which a peer goes, and the reason that each is.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Goes {
    Fin,
    Rst,
}

impl Goes {
    fn go(self, sim: &mut Sim<Log>, client: ClientId) {
        match self {
            Self::Fin => sim.finish(client),
            Self::Rst => sim.reset(client),
        }
    }

    fn reason(self) -> CloseReason {
        match self {
            Self::Fin => CloseReason::Finished,
            Self::Rst => CloseReason::Reset,
        }
    }
}

fn world() -> (Sim<Log>, SocketAddr) {
    let mut sim = Sim::new(3, Config::new(), Log::default());
    let listen = Listen::tcp("127.0.0.1:0", Framing::Line);
    let addr = sim.listen(listen, |_: &mut Log, _| Stalls).expect("listen");
    (sim, addr)
}

#[test]
fn a_paused_connection_notices_a_reset() {
    for in_one_event in [false, true] {
        let (mut sim, addr) = world();
        let client = sim.connect(addr).expect("connected");
        sim.send(client, b"pause\n");
        if !in_one_event {
            sim.settle();
        }
        sim.reset(client);
        sim.settle();
        assert_eq!(sim.stats().closed(CloseReason::Reset), 1, "{in_one_event}");
    }
}

/// A peer that has finished may wait for its answer, but not for ever; and it may be reset later.
#[test]
fn a_paused_connection_notices_its_peers_end() {
    for in_one_event in [false, true] {
        for resets in [false, true] {
            let (mut sim, addr) = world();
            let client = sim.connect(addr).expect("connected");
            sim.send(client, b"pause\n");
            if !in_one_event {
                sim.settle();
            }
            sim.finish(client);
            sim.advance(Duration::from_secs(119));
            assert_eq!(sim.app().calls, ["pause"], "the end waits for its turn");
            let reason = if resets {
                sim.reset(client);
                sim.settle();
                CloseReason::Reset
            } else {
                sim.advance(Duration::from_secs(2));
                CloseReason::IdleTimeout
            };
            assert_eq!(sim.stats().closed(reason), 1, "{in_one_event}");
        }
    }
}

/// A world in which a paused connection was reset, and the call that would tell fails so.
fn reset_behind_a_pause(errno: i32) -> Sim<Log> {
    let (mut sim, addr) = world();
    let client = sim.connect(addr).expect("connected");
    sim.send(client, b"pause\n");
    sim.finish(client);
    sim.settle();
    sim.add_fault(Scripted {
        call: Call::Write,
        after: 0,
        errno,
    });
    sim.reset(client);
    sim.advance(Duration::from_secs(1));
    sim
}

/// The call that would tell fails for a passing reason: it is made again.
#[test]
fn a_reset_is_noticed_although_a_call_failed_in_passing() {
    for errno in [libc::ENOBUFS, libc::ENOMEM, libc::EINTR] {
        let sim = reset_behind_a_pause(errno);
        assert_eq!(sim.stats().closed(CloseReason::Reset), 1, "errno {errno}");
    }
}

/// That call is a write of nothing, which needs no room: a system reports the error.
#[test]
fn a_reset_is_noticed_although_the_socket_is_full() {
    let sim = reset_behind_a_pause(libc::EAGAIN);
    assert_eq!(sim.stats().closed(CloseReason::Reset), 1);
}

/// First FIN, then RST; and a pause that begins from outside when both are known.
#[test]
fn a_reset_behind_the_end_is_noticed_while_the_answer_is_held() {
    for frames in [&b"hold\n"[..], b"hold\npause\n"] {
        let (mut sim, addr) = world();
        let client = sim.connect(addr).expect("connected");
        sim.send(client, frames);
        sim.finish(client);
        sim.settle();
        assert_eq!(sim.stats().open, 1, "the answer is to come");
        sim.reset(client);
        sim.settle();
        assert_eq!(sim.stats().closed(CloseReason::Reset), 1);
    }
}

/// The idle timeout bounds how long an answer may be held for a peer that has finished, also if
/// the connection was paused meanwhile.
#[test]
fn a_held_answer_to_a_finished_peer_keeps_no_place_for_ever() {
    let (mut sim, addr) = world();
    let client = sim.connect(addr).expect("connected");
    sim.send(client, b"hold\npause\n");
    sim.settle();
    sim.advance(Duration::from_secs(1000));
    assert_eq!(sim.stats().open, 1, "a pause pauses the idle timeout");
    sim.finish(client);
    sim.settle();
    assert_eq!(sim.stats().open, 1);
    sim.advance(Duration::from_secs(121));
    assert_eq!(sim.stats().closed(CloseReason::IdleTimeout), 1);
}

/// What arrived before the end waits for the handler, and is not lost.
#[test]
fn a_pause_keeps_what_arrived_before_the_end() {
    for goes in [Goes::Fin, Goes::Rst] {
        for apart in [false, true] {
            let (mut sim, addr) = world();
            let client = sim.connect(addr).expect("connected");
            sim.send(client, b"pause\n");
            if apart {
                sim.settle();
            }
            sim.send(client, b"last words\n");
            goes.go(&mut sim, client);
            sim.settle();
            assert_eq!(sim.app().calls, ["pause"], "{goes:?}, apart: {apart}");
            let id = sim.app().id.expect("it was open");
            sim.control().conn(id).expect("it is kept").resume();
            sim.settle();
            assert_eq!(sim.app().calls[1], "last words");
            assert_eq!(sim.stats().closed(goes.reason()), 1);
        }
    }
}

/// Polls until the connection is gone.
fn run_dry(server: &mut Server<Log>, log: &mut Log) -> Stats {
    for _ in 0..10_000 {
        server
            .poll_once(log, Some(Duration::from_millis(1)))
            .expect("poll");
        let stats = server.control().stats();
        if stats.accepted > 0 && stats.open == 0 {
            return stats;
        }
    }
    panic!("it is kept");
}

/// A Unix peer that closes can receive nothing more, which one event tells together with its last
/// request.
#[test]
fn a_unix_peer_that_closes_is_noticed() {
    let path = std::env::temp_dir().join(format!("portcullis-gone-{}", std::process::id()));
    for words in ["hold", "pause"] {
        for in_one_event in [false, true] {
            let mut server = Server::new(Config::new()).expect("server");
            server
                .listen(Listen::unix(&path, Framing::Packet2), |_: &mut Log, _| {
                    Stalls
                })
                .expect("listen");
            let mut log = Log::default();
            let mut client = UnixStream::connect(&path).expect("connect");
            client.write_all(&packet2(words.as_bytes())).expect("sent");
            while !in_one_event && log.calls.is_empty() {
                server.poll_once(&mut log, Some(PATIENCE)).expect("poll");
            }
            drop(client);
            let stats = run_dry(&mut server, &mut log);
            assert_eq!(
                stats.closed(CloseReason::Reset),
                1,
                "{words}, {in_one_event}"
            );
        }
    }
}

#[test]
fn a_tcp_peer_that_goes_is_noticed() {
    let idle = Duration::from_millis(20);
    for in_one_event in [false, true] {
        for resets in [false, true] {
            let mut server = Server::new(Config::new()).expect("server");
            let listen = local().with(|listen| listen.conn.idle_timeout = idle);
            let listener = server
                .listen(listen, |_: &mut Log, _| Stalls)
                .expect("listen");
            let addr = server.control().listener(listener).expect("there").addr;
            let mut log = Log::default();
            let mut client = kit::net::connect(addr.as_tcp().expect("TCP"));
            client.write_all(&packet2(b"pause")).expect("sent");
            while !in_one_event && log.calls.is_empty() {
                server.poll_once(&mut log, Some(PATIENCE)).expect("poll");
            }
            let reason = if resets {
                reset(client);
                CloseReason::Reset
            } else {
                drop(client);
                CloseReason::IdleTimeout
            };
            let stats = run_dry(&mut server, &mut log);
            assert_eq!(stats.closed(reason), 1, "{in_one_event}");
        }
    }
}
