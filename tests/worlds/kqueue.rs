//! Each difference between kqueue and epoll: the server behaves alike on both.

use std::net::SocketAddr;
use std::time::Duration;

use portcullis::sim::{Answer, Call, ClientId, ClientState, Faults, Sim};
use portcullis::{
    CloseReason, Closed, Config, Connect, Context, Framing, Handler, Listen, Outcome,
};

/// The order of the two filters differs from seed to seed.
const SEEDS: std::ops::Range<u64> = 0..40;

const REMOTE: &str = "203.0.113.7:25";

#[derive(Default)]
struct App {
    lines: Vec<Vec<u8>>,
    closed: Vec<CloseReason>,
}

/// Echoes. "pause" pauses reading.
struct Echo;

impl Handler<App> for Echo {
    fn on_frame(&mut self, cx: &mut Context<'_, App>, line: &[u8]) -> Outcome {
        cx.app.lines.push(line.to_vec());
        if line == b"pause\n" {
            cx.conn.pause();
        }
        cx.conn.send(line)?;
        Ok(())
    }

    fn on_close(&mut self, cx: &mut Context<'_, App>, closed: &Closed) {
        cx.app.closed.push(closed.reason);
    }
}

fn world(seed: u64) -> (Sim<App>, SocketAddr) {
    let mut sim = Sim::new(seed, Config::new(), App::default());
    sim.use_kqueue();
    let listen = Listen::tcp("127.0.0.1:0", Framing::Line);
    let addr = sim.listen(listen, |_: &mut App, _| Echo).expect("listens");
    (sim, addr)
}

/// With a client that has been served.
fn served(seed: u64) -> (Sim<App>, ClientId) {
    let (mut sim, addr) = world(seed);
    let client = sim.connect(addr).expect("connected");
    sim.send(client, b"first\n");
    sim.settle();
    assert_eq!(sim.received(client), b"first\n");
    (sim, client)
}

/// As [`served`], and registered for writing, because its socket was full once.
fn served_full(seed: u64) -> (Sim<App>, ClientId) {
    let (mut sim, client) = served(seed);
    sim.set_send_buffer(client, 3);
    sim.send(client, b"second\n");
    sim.settle();
    assert_eq!(sim.received(client), b"second\n");
    sim.set_send_buffer(client, 64 * 1024);
    (sim, client)
}

/// EV_EOF comes with the data in front of it, and no event comes after that.
#[test]
fn data_and_the_end_in_one_event() {
    for seed in SEEDS {
        let (mut sim, client) = served(seed);
        sim.send(client, b"last\n");
        sim.finish(client);
        sim.settle();
        assert_eq!(sim.received(client), b"last\n");
        assert_eq!(sim.app().closed, [CloseReason::Finished]);
        assert_eq!(sim.state(client), ClientState::Finished);
    }
}

/// The same before the connection is accepted: the events of both filters come with registration.
#[test]
fn all_of_it_before_the_accept() {
    for seed in SEEDS {
        let (mut sim, addr) = world(seed);
        let client = sim.connect(addr).expect("connected");
        sim.send(client, b"one\ntwo\n");
        sim.finish(client);
        sim.settle();
        assert_eq!(sim.received(client), b"one\ntwo\n");
        assert_eq!(sim.app().closed, [CloseReason::Finished]);
    }
}

/// There is no HUP: EV_EOF with an error says it, behind data that is read first.
#[test]
fn a_reset_behind_data() {
    for seed in SEEDS {
        let (mut sim, client) = served(seed);
        sim.send(client, b"last\n");
        sim.reset(client);
        sim.settle();
        assert_eq!(sim.app().lines, [b"first\n".to_vec(), b"last\n".to_vec()]);
        assert_eq!(sim.app().closed, [CloseReason::Reset]);
    }
}

/// A paused connection learns of a reset without a HUP, too.
#[test]
fn a_paused_connection_learns_of_a_reset() {
    for seed in SEEDS {
        let (mut sim, client) = served(seed);
        sim.send(client, b"pause\n");
        sim.settle();
        sim.reset(client);
        sim.settle();
        assert_eq!(sim.app().closed, [CloseReason::Reset]);
    }
}

/// The filters' events come in different polls, in any order.
#[test]
fn filters_in_different_polls() {
    for seed in SEEDS {
        let (mut sim, addr) = world(seed);
        let mut faults = Faults::none();
        faults.late_events = 500;
        sim.set_faults(faults);
        let client = sim.connect(addr).expect("connected");
        sim.set_send_buffer(client, 100);
        for _ in 0..20 {
            sim.send(client, &[&[b'x'; 60][..], b"\n"].concat());
            sim.settle();
        }
        sim.finish(client);
        sim.settle();
        assert_eq!(sim.received(client).len(), 20 * 61);
        assert_eq!(sim.app().closed, [CloseReason::Finished]);
    }
}

/// Each acknowledgement is an event, also when there was room all the time.
#[test]
fn acknowledgements_are_events() {
    for seed in SEEDS {
        let (mut sim, client) = served_full(seed);
        sim.set_reading(client, false);
        sim.send(client, b"third\n");
        sim.settle();
        let events = sim.events();
        sim.read(client, 3);
        sim.read(client, 100);
        sim.settle();
        assert!(sim.events() > events, "the filter was woken");
        assert_eq!(sim.received(client), b"third\n");
        assert_eq!(sim.app().closed, []);
    }
}

/// A full send buffer: room is announced, and all output is delivered.
#[test]
fn output_waits_for_the_write_filter() {
    for seed in SEEDS {
        let (mut sim, client) = served(seed);
        sim.set_send_buffer(client, 10);
        sim.set_reading(client, false);
        sim.send(client, b"0123456789abcdefghij\n");
        sim.settle();
        for _ in 0..21 {
            sim.read(client, 1);
            sim.settle();
        }
        assert_eq!(sim.received(client), b"0123456789abcdefghij\n");
    }
}

/// Our own shutdown is an EV_EOF of the write filter: no end of the input, and the loop does not
/// spin while the connection lingers.
#[test]
fn our_own_shutdown_is_not_the_peers_end() {
    for seed in SEEDS {
        let (mut sim, client) = served_full(seed);
        sim.control().drain(Duration::from_secs(60));
        sim.settle();
        assert_eq!(sim.state(client), ClientState::Finished);
        assert_eq!(sim.app().closed, [], "it lingers");
        let iterations = sim.stats().iterations;
        sim.advance(Duration::from_millis(500));
        assert!(sim.stats().iterations < iterations + 5);
        sim.finish(client);
        sim.settle();
        assert_eq!(sim.app().closed, [CloseReason::Drained]);
    }
}

/// Connects to a remote server that answers so, and waits for the result.
fn dialed(seed: u64, answer: Answer) -> Sim<App> {
    let (mut sim, _) = world(seed);
    sim.remote(REMOTE, answer);
    let connect = Connect::new(Framing::Line);
    let started = sim.control().connect(REMOTE, connect, Echo);
    started.expect("begun");
    sim.advance(Duration::from_secs(2));
    sim
}

/// Both filters report the failure, and it counts once.
#[test]
fn a_failed_connect_is_reported_twice() {
    for answer in [
        Answer::Refuse,
        Answer::FailAfter(Duration::from_secs(1), libc::EHOSTUNREACH),
    ] {
        for seed in SEEDS {
            let sim = dialed(seed, answer);
            assert_eq!(sim.stats().closed(CloseReason::ConnectFailed), 1);
            assert_eq!((sim.stats().open, sim.descriptors()), (0, 1));
        }
    }
}

/// A new connection has an event of the write filter alone.
#[test]
fn a_connect_that_succeeds() {
    for seed in SEEDS {
        let mut sim = dialed(seed, Answer::AcceptAfter(Duration::from_secs(1)));
        let server = sim.dialed(REMOTE)[0];
        sim.send(server, b"hello\n");
        sim.settle();
        assert_eq!(sim.received(server), b"hello\n");
    }
}

/// Registration is idempotent there: its errors do not show what a failed deregistration has left.
/// The server retries that, and knows what is registered.
#[test]
fn a_listener_is_registered_again() {
    for seed in SEEDS {
        let (mut sim, addr) = world(seed);
        sim.set_faults(Faults::none().with(Call::DeregisterListener, 0, libc::ENOMEM));
        let id = sim.control().listeners()[0].id;
        for _ in 0..3 {
            sim.control().suspend(id).expect("suspended");
            let client = sim.connect(addr).expect("in the backlog");
            sim.send(client, b"hello\n");
            sim.settle();
            assert_eq!(sim.received(client), b"", "nothing is accepted");
            sim.control().resume(id).expect("resumed");
            // After a failure the next attempt is by timer.
            sim.advance(Duration::from_secs(1));
            assert_eq!(sim.received(client), b"hello\n");
        }
    }
}
