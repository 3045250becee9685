//! Peers that connect and say nothing cannot keep others out: the oldest of too many pending connections gives way.

use std::net::SocketAddr;
use std::time::Duration;

use portcullis::sim::{ClientId, ClientState, Sim};
use portcullis::{
    AccessRules, AtCapacity, CloseReason, Closed, Config, Context, Error, Handler, Listen,
    ListenerState, Outcome, Peer, PendingLimits, ProxyProtocol, Quota, Refuse, Server, Service,
};

struct Echo;

impl Handler for Echo {
    fn on_frame(&mut self, cx: &mut Context<'_>, frame: &[u8]) -> Outcome {
        cx.conn.send(frame)?;
        Ok(())
    }
}

const HEADER: &[u8] = b"PROXY UNKNOWN\r\n";

/// Connections of this listener are not open before they have sent a header.
fn behind_a_proxy() -> Listen {
    Listen::tcp("127.0.0.1:0")
        .name("it")
        .proxy_protocol(ProxyProtocol::Required)
        .trusted_proxies(AccessRules::allow_all())
}

fn world(config: Config) -> (Sim, SocketAddr) {
    let mut sim = Sim::new(1, config, ());
    let addr = sim
        .listen(behind_a_proxy(), |_: &mut (), _| Echo)
        .expect("listen");
    (sim, addr)
}

fn connect(sim: &mut Sim, addr: SocketAddr, count: usize) -> Vec<ClientId> {
    let clients = (0..count)
        .map(|_| sim.connect(addr).expect("it listens"))
        .collect();
    sim.settle();
    clients
}

fn is_served(sim: &mut Sim, client: ClientId) -> bool {
    sim.send(client, HEADER);
    sim.send(client, b"\0\x02hi");
    sim.settle();
    sim.received(client) == b"\0\x02hi"
}

/// At most so many pending connections, each with this grace.
fn limited(connections: usize, grace: Duration) -> Config {
    Config::new().pending_limits(|pending| {
        pending.connections = Quota::Count(connections);
        pending.grace = grace;
    })
}

#[test]
fn the_oldest_gives_way_to_a_newcomer() {
    let (mut sim, addr) = world(Config::new().pending_limits(|pending| {
        pending.connections = Quota::Count(3);
        pending.grace = Duration::ZERO;
    }));
    let silent = connect(&mut sim, addr, 3);
    for (round, oldest) in silent.into_iter().enumerate() {
        let newcomer = sim.connect(addr).expect("it listens");
        sim.settle();
        assert_eq!(sim.state(oldest), ClientState::Finished, "the oldest");
        assert!(is_served(&mut sim, newcomer));
        // It has opened and counts no more: there is room again.
        connect(&mut sim, addr, 1);
        assert_eq!(sim.stats().closed(CloseReason::Evicted), round as u64 + 1);
    }
}

/// One that is young may be honest: the newcomer waits until the oldest has had its time.
#[test]
fn no_connection_is_evicted_within_its_grace() {
    let (mut sim, addr) = world(limited(2, Duration::from_secs(1)));
    let silent = connect(&mut sim, addr, 2);
    let newcomer = connect(&mut sim, addr, 1)[0];
    let iterations = sim.stats().iterations;
    sim.advance(Duration::from_millis(999));
    assert_eq!(sim.stats().accepted, 2);
    assert_eq!(
        sim.control().listener("it").expect("there").state,
        ListenerState::Full
    );
    assert!(sim.stats().iterations - iterations < 5, "it does not spin");
    sim.advance(Duration::from_millis(1));
    assert_eq!((sim.stats().accepted, sim.stats().open), (3, 2));
    assert_eq!(sim.state(silent[0]), ClientState::Finished);
    assert!(is_served(&mut sim, newcomer));
}

/// One that stays for ever costs no memory for later connections that open meanwhile: an invariant
/// of the simulator.
#[test]
fn a_connection_that_has_opened_is_forgotten() {
    let (mut sim, addr) = world(limited(2, Duration::MAX));
    let silent = connect(&mut sim, addr, 1)[0];
    for _ in 0..300 {
        let client = sim.connect(addr).expect("it listens");
        assert!(is_served(&mut sim, client));
        sim.reset(client);
        sim.settle();
    }
    assert!(
        is_served(&mut sim, silent),
        "there is no handshake timeout yet"
    );
}

/// As soon as one opens, or goes, the next comes in.
#[test]
fn a_connection_that_opens_makes_room_at_once() {
    let (mut sim, addr) = world(limited(1, PendingLimits::default().grace));
    let clients = connect(&mut sim, addr, 3);
    assert_eq!(sim.stats().accepted, 1);
    assert!(is_served(&mut sim, clients[0]));
    assert_eq!(sim.stats().accepted, 2);
    sim.reset(clients[1]);
    sim.settle();
    assert_eq!(sim.stats().accepted, 3);
    assert!(is_served(&mut sim, clients[2]));
}

/// A listener whose connections are open at once is not concerned.
#[test]
fn plain_connections_do_not_wait_for_them() {
    let (mut sim, addr) =
        world(Config::new().pending_limits(|pending| pending.connections = Quota::Count(1)));
    let plain = sim
        .listen(Listen::tcp("127.0.0.1:0"), |_: &mut (), _| Echo)
        .expect("listen");
    connect(&mut sim, addr, 5);
    let client = sim.connect(plain).expect("it listens");
    sim.send(client, b"\0\x02hi");
    sim.settle();
    assert_eq!(sim.received(client), b"\0\x02hi");
    assert_eq!(sim.stats().accepted, 2);
}

#[test]
fn a_listener_that_refuses_does_not_let_clients_wait() {
    let mut sim = Sim::new(1, limited(1, PendingLimits::default().grace), ());
    let listen = behind_a_proxy().at_capacity(AtCapacity::Refuse {
        farewell: b"full".to_vec(),
    });
    let addr = sim.listen(listen, |_: &mut (), _| Echo).expect("listen");
    let clients = connect(&mut sim, addr, 2);
    assert_eq!(sim.received(clients[1]), b"full");
    assert_eq!(sim.stats().closed(CloseReason::AtCapacity), 1);
    sim.advance(Duration::from_secs(1));
    let late = connect(&mut sim, addr, 1)[0];
    assert!(is_served(&mut sim, late));
    assert_eq!(sim.stats().closed(CloseReason::Evicted), 1);
}

#[derive(Default)]
struct Heard(Vec<CloseReason>);

struct Listens;

impl Handler<Heard> for Listens {
    fn on_frame(&mut self, _: &mut Context<'_, Heard>, _: &[u8]) -> Outcome {
        Ok(())
    }
}

impl Service<Heard> for Listens {
    fn accept(&mut self, _: &mut Heard, _: Peer) -> Result<Box<dyn Handler<Heard>>, Refuse> {
        Ok(Box::new(Self))
    }

    fn on_failed_accept(&mut self, heard: &mut Heard, _: &Peer, closed: &Closed) {
        heard.0.push(closed.reason);
    }
}

/// A slow loris with as many connections as it likes: honest clients are served all the time, each within a second.
#[test]
fn a_slow_loris_keeps_no_client_out() {
    let mut sim = Sim::new(1, Config::new().max_connections(100), Heard::default());
    let addr = sim.listen_with(behind_a_proxy(), Listens).expect("listen");
    for _ in 0..20 {
        for _ in 0..200 {
            // Those that find the backlog full are not even that far.
            let _ = sim.connect(addr);
        }
        let honest = sim.connect(addr);
        if let Some(honest) = honest {
            sim.send(honest, HEADER);
        }
        sim.advance(Duration::from_secs(5));
    }
    let opened = sim.stats().opened;
    assert!(opened >= 4, "{opened} of the honest were served");
    assert!(sim.stats().open - sim.stats().opened as usize <= 50);
    let evicted = sim.stats().closed(CloseReason::Evicted);
    assert!(evicted > 100);
    let told = sim
        .app()
        .0
        .iter()
        .filter(|&&reason| reason == CloseReason::Evicted);
    assert_eq!(told.count() as u64, evicted, "the service hears of each");
}

/// The default is half the cap, and it follows the cap.
#[test]
fn the_share_follows_the_cap() {
    let (mut sim, addr) = world(
        Config::new()
            .max_connections(60)
            .pending_limits(|pending| pending.grace = Duration::MAX),
    );
    connect(&mut sim, addr, 100);
    assert_eq!(sim.stats().open, 30);
    sim.control().set_max_connections(80).expect("good");
    sim.settle();
    assert_eq!(sim.stats().open, 40);
    sim.control()
        .reconfigure(|config| {
            config.pending_limits(|pending| pending.connections = Quota::Percent(100))
        })
        .expect("good");
    sim.settle();
    assert_eq!(sim.stats().open, 80);
}

#[test]
fn a_limit_that_cannot_work_is_named() {
    for quota in [Quota::Count(0), Quota::Percent(0), Quota::Percent(101)] {
        let server: Result<Server, Error> =
            Server::new(Config::new().pending_limits(|pending| pending.connections = quota));
        assert!(
            matches!(
                &server,
                Err(Error::Option {
                    option: "pending_limits.connections",
                    ..
                })
            ),
            "{server:?}"
        );
    }
}

/// With every slot taken as well: by silent peers alone where the cap is small, or by the permitted
/// number of them and by open connections.
#[test]
fn silent_peers_at_the_cap_keep_no_client_out() {
    for (cap, open) in [(10, 0), (1, 0), (100, 50)] {
        let (mut sim, addr) = world(Config::new().max_connections(cap));
        for client in connect(&mut sim, addr, open) {
            sim.send(client, HEADER);
        }
        sim.settle();
        connect(&mut sim, addr, cap - open);
        assert_eq!(sim.stats().open, cap);
        let newcomer = connect(&mut sim, addr, 1)[0];
        let iterations = sim.stats().iterations;
        sim.advance(Duration::from_millis(999));
        assert_eq!(sim.stats().closed_total(), 0);
        assert!(sim.stats().iterations - iterations < 5, "it does not spin");
        sim.advance(Duration::from_millis(1));
        assert_eq!(sim.stats().closed(CloseReason::Evicted), 1);
        assert!(is_served(&mut sim, newcomer), "cap {cap}");
        assert_eq!(sim.stats().peak, cap, "and the cap is the cap");
        // Above a cap that was lowered no connection is evicted for another.
        sim.control().set_max_connections(cap - 1).expect("good");
        connect(&mut sim, addr, 1);
        sim.advance(Duration::from_secs(3));
        assert_eq!(sim.stats().closed(CloseReason::Evicted), 1);
    }
}

/// No connection is evicted for a new one that is not admitted anyway.
#[test]
fn no_connection_is_evicted_for_one_whose_source_has_too_many() {
    let mut sim = Sim::new(1, limited(2, PendingLimits::default().grace), ());
    let listen = Listen::tcp("127.0.0.1:0")
        .proxy_protocol(ProxyProtocol::Optional)
        .trusted_proxies(
            AccessRules::deny_all()
                .allow("10.0.0.0/8")
                .expect("a network"),
        )
        .source_limits(|limits| limits.connections = Some(1));
    let addr = sim.listen(listen, |_: &mut (), _| Echo).expect("listen");
    let guest = std::net::IpAddr::from([192, 0, 2, 1]);
    sim.connect_from(addr, guest).expect("it listens");
    connect(&mut sim, addr, 2);
    sim.advance(Duration::from_secs(2));
    assert_eq!((sim.stats().open, sim.stats().pending), (3, 2));
    sim.connect_from(addr, guest).expect("it listens");
    sim.settle();
    assert_eq!(sim.stats().closed(CloseReason::SourceLimited), 1);
    assert_eq!(sim.stats().closed(CloseReason::Evicted), 0);
}
