//! The observer shows a drain: its listener closes last, and its streams end behind all other connections. In virtual time.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use kit::net::{local, Echo};
use portcullis::sim::{ClientId, ClientState, Sim};
use portcullis::{Close, Config, Context, Handler, ListenerState, Observer, Outcome};

const SECOND: Duration = Duration::from_secs(1);
const GRACE: Duration = Duration::from_secs(20);

/// Does not end when the server drains, but when it is told to.
struct Stays;

impl Handler for Stays {
    fn on_frame(&mut self, cx: &mut Context<'_>, frame: &[u8]) -> Outcome {
        cx.conn.send(frame)?;
        match frame {
            b"end" => Err(Close::new()),
            _ => Ok(()),
        }
    }

    fn on_drain(&mut self, _cx: &mut Context<'_>) -> Outcome {
        Ok(())
    }
}

struct World {
    sim: Sim<()>,
    echo: SocketAddr,
    stays: SocketAddr,
    page: SocketAddr,
}

fn world() -> World {
    let mut sim = Sim::new(11, Config::new(), ());
    let echo = sim
        .listen(local().name("echo"), |_: &mut (), _| Echo)
        .expect("listen");
    let stays = sim
        .listen(local().name("stays"), |_: &mut (), _| Stays)
        .expect("listen");
    let observer = Observer::new();
    let listen = observer.listen("127.0.0.1:0").expect("loopback");
    let page = sim
        .listen_with(listen.name("observer"), observer)
        .expect("listen");
    World {
        sim,
        echo,
        stays,
        page,
    }
}

impl World {
    fn ask(&mut self, target: &str) -> ClientId {
        let client = self.sim.connect_from(self.page, Ipv4Addr::LOCALHOST.into());
        let client = client.expect("the observer listens");
        let request = format!("GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n");
        self.sim.send(client, request.as_bytes());
        self.sim.settle();
        client
    }

    fn text(&mut self, client: ClientId) -> String {
        String::from_utf8(self.sim.received(client)).expect("UTF-8")
    }

    /// The status of a health check over a connection of its own.
    fn health(&mut self) -> String {
        let client = self.ask("/healthz");
        let text = self.text(client);
        self.sim.finish(client);
        self.sim.settle();
        text.split(' ').nth(1).expect("a status").to_owned()
    }

    fn connect(&mut self, addr: SocketAddr) -> ClientId {
        let client = self.sim.connect(addr).expect("a listener");
        self.sim.send(client, b"\0\x02hi");
        self.sim.settle();
        client
    }
}

#[test]
fn health_checks_fail_while_others_are_drained() {
    let mut world = world();
    let (echo, stays) = (world.echo, world.stays);
    let (polite, busy) = (world.connect(echo), world.connect(stays));
    let stream = world.ask("/events");
    let kept = world.ask("/healthz");
    world.sim.advance(SECOND);
    assert_eq!(world.health(), "200");
    world.text(stream);
    world.text(kept);

    world.sim.control().drain(GRACE);
    world.sim.settle();
    assert_eq!(world.sim.state(polite), ClientState::Finished);
    world.sim.finish(polite);
    for _ in 0..5 {
        world.sim.advance(SECOND);
        assert_eq!(world.health(), "503");
        let events = world.text(stream);
        assert!(events.contains("\"draining\":true"), "{events:.200}");
    }
    let request = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n";
    world.sim.send(kept, request);
    world.sim.settle();
    assert!(world.text(kept).starts_with("HTTP/1.1 503 "));
    let states: Vec<_> = world.sim.control().tree(0).listeners;
    let states: Vec<_> = states.into_iter().map(|(info, _)| info.state).collect();
    assert_eq!(states, [ListenerState::Closed, ListenerState::Listening]);
    assert!(world.sim.connect(echo).is_none() && world.sim.connect(stays).is_none());

    // The last of the others ends, and the observer with it.
    world.sim.send(busy, b"\0\x03end");
    world.sim.finish(busy);
    world.sim.settle();
    for client in [stream, kept] {
        assert_eq!(world.sim.state(client), ClientState::Finished);
        world.sim.finish(client);
    }
    world.sim.settle();
    assert!(world.sim.connect(world.page).is_none());
    let report = world.sim.drain_report().expect("over");
    assert_eq!(
        (report.failed, report.forced, report.unserved),
        (0, 0, 0),
        "{report:?}"
    );
    assert_eq!(report.took, 5 * SECOND);
}

/// A connection that never ends is forced, and the observer's end in order before.
#[test]
fn streams_end_in_order_shortly_before_the_deadline() {
    let mut world = world();
    let stays = world.stays;
    let busy = world.connect(stays);
    let stream = world.ask("/events");
    world.sim.control().drain(GRACE);
    world.sim.advance(GRACE - SECOND - SECOND / 10);
    assert_eq!(world.health(), "503");
    assert_eq!(world.sim.state(stream), ClientState::Connected);
    world.sim.advance(SECOND / 5);
    assert_eq!(world.sim.state(stream), ClientState::Finished);
    world.sim.finish(stream);
    world.sim.settle();
    assert!(world.sim.connect(world.page).is_none());
    assert_eq!(world.sim.state(busy), ClientState::Connected);
    world.sim.advance(SECOND);
    let report = world.sim.drain_report().expect("over");
    assert_eq!((report.failed, report.forced), (0, 1), "{report:?}");
    assert_eq!(report.took, GRACE);
}

/// No grace is no time for the observer either; nor is there a wait without other connections.
#[test]
fn a_drain_that_has_nothing_to_wait_for_ends_at_once() {
    for (grace, is_busy) in [(Duration::ZERO, true), (GRACE, false)] {
        let mut world = world();
        let stays = world.stays;
        if is_busy {
            world.connect(stays);
        }
        let answered = world.ask("/healthz");
        world.sim.control().drain(grace);
        world.sim.settle();
        world.sim.finish(answered);
        world.sim.settle();
        let report = world.sim.drain_report().expect("over");
        assert_eq!(report.took, Duration::ZERO, "{report:?}");
        assert_eq!(report.forced > 0, is_busy);
    }
}

/// Of a server with nothing but an observer, without any connection.
#[test]
fn an_observer_alone_is_drained() {
    let mut sim = Sim::new(11, Config::new(), ());
    let observer = Observer::new();
    let listen = observer.listen("127.0.0.1:0").expect("loopback");
    sim.listen_with(listen, observer).expect("listen");
    sim.settle();
    sim.control().drain(GRACE);
    sim.settle();
    let report = sim.drain_report().expect("over");
    assert_eq!((report.ended, report.took), (0, Duration::ZERO));
}

/// Clients that wait in another listener's backlog are served first.
#[test]
fn a_backlog_is_served_before_the_observer_closes() {
    let mut sim = Sim::new(11, Config::new(), ());
    let listen = local().with(|listen| listen.max_connections = Some(1));
    let stays = sim.listen(listen, |_: &mut (), _| Stays).expect("listen");
    let observer = Observer::new();
    let listen = observer.listen("127.0.0.1:0").expect("loopback");
    let page = sim.listen_with(listen, observer).expect("listen");
    let clients: Vec<_> = (0..3)
        .map(|_| {
            let client = sim.connect(stays).expect("the backlog has room");
            sim.send(client, b"\0\x02hi");
            sim.settle();
            client
        })
        .collect();
    sim.control().drain(GRACE);
    sim.advance(SECOND);
    for (at, &client) in clients.iter().enumerate() {
        assert_eq!(sim.received(client), b"\0\x02hi", "{at}");
        assert!(sim.connect_from(page, Ipv4Addr::LOCALHOST.into()).is_some());
        sim.send(client, b"\0\x03end");
        sim.finish(client);
        sim.advance(SECOND);
    }
    sim.advance(10 * SECOND);
    assert!(sim.connect(page).is_none());
    let report = sim.drain_report().expect("over");
    assert_eq!((report.forced, report.unserved), (0, 0), "{report:?}");
}
