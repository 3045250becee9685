//! A drain serves the clients that wait in a backlog, whatever holds them back when it begins: a
//! cap, a rate, a suspension, a lack of descriptors.

use std::io::{Read, Write};
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use kit::net::{connect, local, ping, read_to_end, recv2, send2, spawn_echo, Echo, Place, Running};
use portcullis::sim::{ClientId, ClientState, Sim};
use portcullis::{
    AtCapacity, CloseReason, Config, Context, DrainReport, Framing, Handler, Listen, ListenerState,
    Outcome, Rate, SourceLimits,
};

/// Longer than every client needs.
const GRACE: Duration = Duration::from_secs(20);

/// A world with `inside` clients that are served, and ten with a request in the backlog.
struct Waiting {
    sim: Sim,
    addr: SocketAddr,
    inside: Vec<ClientId>,
    waiting: Vec<ClientId>,
}

fn waiting(config: Config, listen: Listen, inside: usize, hold: impl FnOnce(&mut Sim)) -> Waiting {
    let mut sim = Sim::new(1, config, ());
    let listen = listen.name("it");
    let addr = sim.listen(listen, |_: &mut (), _| Echo).expect("listens");
    let inside = ask(&mut sim, addr, inside);
    sim.settle();
    for &client in &inside {
        assert_eq!(sim.received(client), b"\0\x01x");
    }
    hold(&mut sim);
    let waiting = ask(&mut sim, addr, 10);
    sim.settle();
    assert_eq!(sim.stats().accepted, inside.len() as u64, "they wait");
    Waiting {
        sim,
        addr,
        inside,
        waiting,
    }
}

fn ask(sim: &mut Sim, addr: SocketAddr, clients: usize) -> Vec<ClientId> {
    let clients = (0..clients).map(|_| {
        let client = sim.connect(addr).expect("a listener");
        sim.send(client, b"\0\x01x");
        client
    });
    clients.collect()
}

impl Waiting {
    /// Drains while every client closes once it has read FIN.
    fn drain(&mut self) -> DrainReport {
        self.sim.control().drain(GRACE);
        for _ in 0..100 {
            self.sim.advance(Duration::from_millis(100));
            for &client in self.inside.iter().chain(&self.waiting) {
                if self.sim.state(client) == ClientState::Finished {
                    self.sim.finish(client);
                }
            }
            self.sim.settle();
            if let Some(report) = self.sim.drain_report() {
                return report;
            }
        }
        panic!("it is not over: {:?}", self.sim.control().tree(100));
    }

    #[track_caller]
    fn assert_all_are_served(mut self) {
        let report = self.drain();
        for client in self.waiting {
            assert_eq!(self.sim.received(client), b"\0\x01x");
        }
        let all = self.inside.len() + 10;
        let numbers = (report.ended, report.failed, report.forced, report.unserved);
        assert_eq!(numbers, (all, 0, 0, 0));
        assert!(report.took < GRACE);
        assert!(self.sim.connect(self.addr).is_none(), "the port is closed");
    }
}

#[test]
fn at_the_cap() {
    for cap in [1, 3] {
        waiting(Config::max_connections(cap), local(), cap, |_| {}).assert_all_are_served();
    }
}

#[test]
fn at_the_listeners_cap() {
    waiting(
        Config::new(),
        local().with(|listen| listen.max_connections = Some(2)),
        2,
        |_| {},
    )
    .assert_all_are_served();
}

#[test]
fn over_a_rate() {
    let rate = Rate::per_second(1).burst(1);
    waiting(
        Config::new(),
        local().with(|listen| listen.accept_rate = Some(rate)),
        1,
        |_| {},
    )
    .assert_all_are_served();
    waiting(
        Config::new().with(|config| config.accept_rate = Some(rate)),
        local(),
        1,
        |_| {},
    )
    .assert_all_are_served();
}

/// A rate of the source closes its clients when they are accepted: during a drain it does not.
#[test]
fn over_the_rate_of_their_source() {
    let limits = |limits: &mut SourceLimits| limits.rate = Some(Rate::per_second(1).burst(1));
    let suspend = |sim: &mut Sim| sim.control().suspend("it").expect("open");
    waiting(
        Config::new(),
        local().with(|listen| limits(&mut listen.source_limits)),
        1,
        suspend,
    )
    .assert_all_are_served();
}

#[test]
fn of_a_suspended_listener() {
    let suspend = |sim: &mut Sim| sim.control().suspend("it").expect("open");
    waiting(Config::new(), local(), 2, suspend).assert_all_are_served();
    // Of one that is suspended later, too.
    let mut world = waiting(Config::max_connections(1), local(), 1, |_| {});
    world.sim.control().drain(GRACE);
    world.sim.control().suspend("it").expect("open");
    world.assert_all_are_served();
}

#[test]
fn without_descriptors() {
    let exhaust = |sim: &mut Sim| {
        let descriptors = sim.descriptors();
        sim.set_descriptor_limit(descriptors);
    };
    waiting(Config::new(), local(), 3, exhaust).assert_all_are_served();
}

/// Nothing waits: the port of a full server is closed at once, so that a new client can go elsewhere.
#[test]
fn a_full_server_without_a_backlog_closes_its_port_at_once() {
    let mut sim = Sim::new(1, Config::max_connections(1), ());
    let addr = sim.listen(local(), |_: &mut (), _| Stays).expect("listens");
    sim.connect(addr).expect("a listener");
    sim.settle();
    sim.control().drain(GRACE);
    sim.settle();
    assert!(sim.connect(addr).is_none(), "the port is closed");
    assert_eq!(sim.stats().open, 1);
    sim.advance(GRACE);
    let report = sim.drain_report().expect("over");
    assert_eq!((report.forced, report.unserved), (1, 0));
}

/// Its connections do not end before the deadline.
struct Stays;

impl Handler for Stays {
    fn on_frame(&mut self, cx: &mut Context<'_>, frame: &[u8]) -> Outcome {
        cx.conn.send(frame)?;
        Ok(())
    }
    fn on_drain(&mut self, _: &mut Context<'_>) -> Outcome {
        Ok(())
    }
}

/// No slot is freed before the deadline: then the port closes, and the report says so. Until then
/// the loop sleeps.
#[test]
fn clients_that_are_not_served_by_the_deadline_are_reported() {
    let mut sim = Sim::new(1, Config::max_connections(1), ());
    let listen = local().with(|listen| listen.evict_silent = false);
    let addr = sim.listen(listen, |_: &mut (), _| Stays).expect("listens");
    sim.connect(addr).expect("a listener");
    sim.settle();
    let outside = sim.connect(addr).expect("a listener");
    sim.settle();
    sim.control().drain(GRACE);
    let before = sim.stats().iterations;
    sim.advance(GRACE - Duration::from_millis(1));
    assert!(sim.stats().iterations - before < 20, "it sleeps");
    let listeners = sim.control().listeners();
    assert_eq!(listeners[0].state, ListenerState::Full);
    assert!(sim.drain_report().is_none());
    sim.advance(Duration::from_millis(2));
    let report = sim.drain_report().expect("over");
    let numbers = (report.ended, report.failed, report.forced, report.unserved);
    assert_eq!(numbers, (0, 0, 1, 1));
    assert_eq!(sim.state(outside), ClientState::Reset);
}

/// Where a listener refuses clients at the cap, those in the backlog get their farewell.
#[test]
fn where_the_full_server_refuses_they_are_refused_in_order() {
    let listen = local().with(|listen| {
        listen.at_capacity = AtCapacity::Refuse {
            farewell: b"full\n".to_vec(),
        }
    });
    let mut sim = Sim::new(1, Config::max_connections(1), ());
    let addr = sim.listen(listen, |_: &mut (), _| Echo).expect("listens");
    let inside = sim.connect(addr).expect("a listener");
    sim.settle();
    let outside: Vec<_> = (0..5).map(|_| sim.connect(addr).expect("open")).collect();
    sim.control().drain(GRACE);
    sim.settle();
    for client in outside {
        assert_eq!(sim.received(client), b"full\n");
        assert_eq!(sim.state(client), ClientState::Finished);
    }
    sim.finish(inside);
    sim.settle();
    let report = sim.drain_report().expect("over");
    let numbers = (report.ended, report.failed, report.forced, report.unserved);
    assert_eq!(numbers, (1, 5, 0, 0));
    assert_eq!(sim.stats().closed(CloseReason::AtCapacity), 5);
}

/// A drain that has no end reports soon that it leaves the one client in the backlog unserved.
#[track_caller]
fn gives_up(sim: &mut Sim, addr: SocketAddr) {
    let client = sim.connect(addr).expect("a listener");
    sim.settle();
    sim.control().drain(Duration::MAX);
    assert!(sim.drain_report().is_none(), "it tries first");
    sim.advance(Duration::from_secs(2));
    let report = sim.drain_report().expect("over");
    assert_eq!((report.unserved, sim.stats().accepted), (1, 0));
    assert_eq!(sim.state(client), ClientState::Reset);
    assert!(sim.connect(addr).is_none(), "the port is closed");
}

/// Descriptors that never come back do not hold up a drain whose connections have ended.
#[test]
fn a_listener_that_only_fails_does_not_hold_up_the_drain() {
    let config = Config::new().with(|config| config.emfile_backoff = Duration::from_secs(3600));
    let mut sim = Sim::new(1, config, ());
    let addr = sim.listen(local(), |_: &mut (), _| Echo).expect("listens");
    sim.set_descriptor_limit(sim.descriptors());
    gives_up(&mut sim, addr);
}

/// Nor does a cap of zero: no connection will free a slot.
#[test]
fn a_cap_of_zero_does_not_hold_up_the_drain() {
    for (config, listen) in [
        (Config::max_connections(0), local()),
        (
            Config::new(),
            local().with(|listen| listen.max_connections = Some(0)),
        ),
    ] {
        let mut sim = Sim::new(1, config, ());
        let addr = sim.listen(listen, |_: &mut (), _| Echo).expect("listens");
        gives_up(&mut sim, addr);
    }
}

/// A client may take a quarter of the grace for its handshake, from when it is accepted.
#[test]
fn a_handshake_has_a_quarter_of_the_grace() {
    let listen = local().with(|listen| listen.proxy_protocol = portcullis::ProxyProtocol::Required);
    let trusts =
        listen.with(|listen| listen.trusted_proxies = Some(portcullis::AccessRules::allow_all()));
    let mut sim = Sim::new(1, Config::new(), ());
    let addr = sim.listen(trusts, |_: &mut (), _| Echo).expect("listens");
    let (quick, slow) = (sim.connect(addr).unwrap(), sim.connect(addr).unwrap());
    sim.settle();
    sim.control().drain(Duration::from_secs(20));
    sim.advance(Duration::from_millis(4900));
    sim.send(
        quick,
        b"PROXY TCP4 192.0.2.1 198.51.100.2 50000 443\r\n\0\x01x",
    );
    sim.advance(Duration::from_millis(200));
    assert_eq!(sim.received(quick), b"\0\x01x");
    assert_eq!(sim.state(slow), ClientState::Finished);
    sim.finish(quick);
    sim.settle();
    let report = sim.drain_report().expect("over");
    assert_eq!((report.ended, report.failed, report.forced), (1, 1, 0));
    assert_eq!(sim.stats().closed(CloseReason::HandshakeTimeout), 1);
}

/// The same over sockets, TCP and Unix.
#[test]
fn over_sockets() {
    let place = Place::new();
    for listen in [
        local(),
        Listen::unix(place.path("socket"), Framing::Packet2),
    ] {
        let server = spawn_echo(Config::max_connections(2), listen);
        let addr = server.listeners[0].addr.clone();
        match addr.as_tcp() {
            Some(addr) => serve_waiting(server, || connect(addr)),
            None => serve_waiting(server, || {
                UnixStream::connect(place.path("socket")).expect("connect")
            }),
        }
    }
}

fn serve_waiting<S: Read + Write>(server: Running, connect: impl Fn() -> S) {
    let mut inside: Vec<_> = (0..2).map(|_| connect()).collect();
    for client in &mut inside {
        ping(client, b"inside");
    }
    let mut waiting: Vec<_> = (0..10).map(|_| connect()).collect();
    for client in &mut waiting {
        send2(client, b"waits");
    }
    server.handle.drain(GRACE).expect("it runs");
    drop(inside);
    for mut client in waiting {
        assert_eq!(recv2(&mut client), b"waits");
        assert_eq!(read_to_end(&mut client), b"");
    }
}
