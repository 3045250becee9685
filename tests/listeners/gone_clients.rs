//! Clients that gave up while they waited in the backlog cost neither a handler nor a slot.

use std::net::{Shutdown, SocketAddr};
use std::time::Duration;

use kit::net::{connect, local, read_to_end, recv2, reset, send2, tcp, turns_until, Echo};
use portcullis::sim::{ClientId, Sim};
use portcullis::{
    CloseReason, Config, Context, Framing, Handler, Listen, Outcome, Peer, Refuse, Server, Service,
};

/// What the service and the handlers have seen.
#[derive(Default)]
struct Seen {
    asked: usize,
    gone: usize,
    opened: usize,
    byes: usize,
}

struct Greeter;

impl Service<Seen> for Greeter {
    fn accept(&mut self, seen: &mut Seen, _peer: Peer) -> Result<Box<dyn Handler<Seen>>, Refuse> {
        seen.asked += 1;
        Ok(Box::new(Self))
    }

    fn on_failed_accept(&mut self, seen: &mut Seen, _: &Peer, closed: &portcullis::Closed) {
        assert_eq!(closed.reason, CloseReason::ClosedEarly);
        seen.gone += 1;
    }
}

impl Handler<Seen> for Greeter {
    fn on_open(&mut self, cx: &mut Context<'_, Seen>) -> Outcome {
        cx.app.opened += 1;
        cx.conn.send(b"hello\n")?;
        Ok(())
    }

    fn on_frame(&mut self, cx: &mut Context<'_, Seen>, line: &[u8]) -> Outcome {
        cx.app.byes += usize::from(line == b"bye\n");
        cx.conn.send(line)?;
        Ok(())
    }
}

fn world(config: Config, listen: Listen) -> (Sim<Seen>, SocketAddr) {
    let mut sim = Sim::new(1, config, Seen::default());
    let addr = sim
        .listen_with(
            listen.with(|listen| listen.framing = Framing::Line),
            Greeter,
        )
        .expect("listen");
    (sim, addr)
}

fn plain() -> Listen {
    Listen::tcp("127.0.0.1:0", Framing::Packet2).name("it")
}

/// Of five clients in the backlog one has reset, one has finished, one has sent and finished, one
/// has sent and reset, and one waits.
fn five_clients(sim: &mut Sim<Seen>, addr: SocketAddr) -> [ClientId; 5] {
    let clients = [(); 5].map(|()| sim.connect(addr).expect("the backlog has room"));
    let [reset, finished, sent, sent_and_reset, _] = clients;
    sim.reset(reset);
    sim.finish(finished);
    sim.send(sent, b"bye\n");
    sim.finish(sent);
    sim.send(sent_and_reset, b"bye\n");
    sim.reset(sent_and_reset);
    clients
}

/// Two of the five are gone without a byte, and no handler is made for them.
#[track_caller]
fn assert_two_are_gone(sim: &mut Sim<Seen>, clients: [ClientId; 5]) {
    let stats = sim.stats();
    assert_eq!(stats.closed(CloseReason::ClosedEarly), 2);
    let [_, finished, sent, _, waiting] = clients;
    assert_eq!(sim.received(finished), b"");
    assert_eq!(sim.received(sent), b"hello\nbye\n");
    assert_eq!(sim.received(waiting), b"hello\n");
    let seen = sim.app();
    assert_eq!((seen.gone, seen.asked), (2, seen.opened));
    // The other three of the five were served, and the words of the one that reset were heard.
    assert_eq!(stats.accepted, 2 + seen.opened as u64);
    assert_eq!(seen.byes, 2);
    assert_eq!(stats.closed(CloseReason::Reset), 1);
}

/// At the cap of the server, and at that of the listener.
#[test]
fn after_a_wait_at_the_cap() {
    after_a_wait(Config::max_connections(1), plain());
    let listen = plain().with(|listen| listen.max_connections = Some(1));
    after_a_wait(Config::new(), listen);
}

#[track_caller]
fn after_a_wait(config: Config, listen: Listen) {
    let (mut sim, addr) = world(config, listen);
    let holder = sim.connect(addr).expect("it listens");
    sim.send(holder, b"mine\n");
    sim.settle();
    let clients = five_clients(&mut sim, addr);
    sim.settle();
    assert_eq!(sim.stats().accepted, 1);
    sim.finish(holder);
    sim.settle();
    assert_two_are_gone(&mut sim, clients);
}

#[test]
fn while_the_listener_was_suspended() {
    let (mut sim, addr) = world(Config::new(), plain());
    sim.settle();
    sim.control().suspend("it").expect("there");
    sim.settle();
    let clients = five_clients(&mut sim, addr);
    sim.settle();
    sim.control().resume("it").expect("there");
    sim.settle();
    assert_two_are_gone(&mut sim, clients);
}

#[test]
fn in_a_drain() {
    let (mut sim, addr) = world(Config::new(), plain());
    sim.settle();
    let clients = five_clients(&mut sim, addr);
    sim.control().drain(Duration::from_secs(1));
    sim.settle();
    assert_two_are_gone(&mut sim, clients);
}

#[test]
fn while_a_callback_blocked() {
    let (mut sim, addr) = world(Config::new(), plain());
    sim.settle();
    let work = sim.work();
    let job = move |_: &mut Seen, _: &mut portcullis::Control<'_, Seen>| {
        work(Duration::from_millis(5));
    };
    sim.handle().post(job).expect("it runs");
    sim.step();
    let clients = five_clients(&mut sim, addr);
    sim.settle();
    assert_two_are_gone(&mut sim, clients);
}

/// No connection is evicted for a client that is gone.
#[test]
fn for_a_client_that_is_gone_none_is_evicted() {
    let (mut sim, addr) = world(Config::max_connections(1), plain());
    let silent = sim.connect(addr).expect("it listens");
    sim.settle();
    sim.leap(Duration::from_secs(2));
    sim.settle();
    for gone in 0..3 {
        let client = sim.connect(addr).expect("the backlog has room");
        if gone == 0 {
            sim.finish(client);
        } else {
            sim.reset(client);
        }
        sim.settle();
    }
    let stats = sim.stats();
    assert_eq!(stats.closed(CloseReason::ClosedEarly), 3);
    assert_eq!(stats.closed(CloseReason::Evicted), 0);
    sim.send(silent, b"mine\n");
    sim.settle();
    assert_eq!(sim.received(silent), b"hello\nmine\n");
}

/// A client that only listens may say so at once: with FIN.
#[test]
fn where_clients_may_be_silent_only_a_reset_counts() {
    let (mut sim, addr) = world(
        Config::new(),
        plain().with(|listen| listen.evict_silent = false),
    );
    let clients = five_clients(&mut sim, addr);
    sim.settle();
    assert_eq!(sim.stats().closed(CloseReason::ClosedEarly), 1);
    assert_eq!((sim.app().gone, sim.app().opened), (1, 4));
    let [_, finished, ..] = clients;
    assert_eq!(sim.received(finished), b"hello\n");
}

/// The same with sockets: the clients came and went before the first turn of the loop. One of them has left a request behind.
#[test]
fn before_the_loop_runs() {
    let mut server: Server = Server::new(Config::new()).expect("server");
    let id = server.listen(local(), |_, _| Echo).expect("listen");
    let addr = tcp(&server.control().listener(id).expect("there").addr);
    let waits = connect(addr);
    for at in 0..20 {
        let client = connect(addr);
        if at % 2 == 0 {
            reset(client);
        }
    }
    let mut asks = connect(addr);
    send2(&mut asks, b"and bye");
    asks.shutdown(Shutdown::Write).expect("FIN");
    turns_until(&mut server, &mut (), |server, ()| {
        let stats = server.control().stats();
        stats.accepted + stats.accept_errors >= 22 && stats.open == 1
    });
    let stats = server.control().stats();
    // The kernel itself may forget a connection that was reset.
    let gone = stats.closed(CloseReason::ClosedEarly) + stats.accept_errors;
    assert_eq!((stats.opened, gone), (2, 20), "{stats:?}");
    assert_eq!(stats.closed(CloseReason::Finished), 1, "{stats:?}");
    assert_eq!(recv2(&mut asks), b"and bye");
    assert_eq!(read_to_end(&mut asks), b"");
    drop(waits);
}

/// On a Unix socket too.
#[test]
fn of_a_unix_socket() {
    let folder = kit::net::Place::new();
    let path = folder.path("gone.sock");
    let mut server = Server::new(Config::new()).expect("server");
    let listen = Listen::unix(&path, Framing::Line).name("unix");
    server.listen_with(listen, Greeter).expect("listen");
    let mut seen = Seen::default();
    server.control().suspend("unix").expect("it is open");
    let gone = std::os::unix::net::UnixStream::connect(&path).expect("connect");
    let stays = std::os::unix::net::UnixStream::connect(&path).expect("connect");
    drop(gone);
    server.control().resume("unix").expect("it is open");
    for _ in 0..5 {
        let turn = server.poll_once(&mut seen, Some(Duration::from_millis(20)));
        turn.expect("poll");
    }
    assert_eq!((seen.gone, seen.opened), (1, 1));
    drop(stays);
}
