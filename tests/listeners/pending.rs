//! Peers that connect and say nothing cannot keep others out: the oldest of too many pending connections gives way.

use std::net::SocketAddr;
use std::time::Duration;

use portcullis::sim::{Answer, Call, ClientId, ClientState, Scripted, Sim};
use portcullis::{
    AccessRules, AtCapacity, CloseReason, Closed, Config, Connect, Context, Error, Framing,
    Handler, Listen, ListenerState, Outcome, Peer, PendingLimits, ProxyProtocol, Quota, Refuse,
    Server, Service,
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
    Listen::tcp("127.0.0.1:0", Framing::Packet2)
        .name("it")
        .with(|listen| {
            listen.proxy_protocol = ProxyProtocol::Required;
            listen.trusted_proxies = Some(AccessRules::allow_all());
        })
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
    Config::new().with(|config| {
        config.pending_limits.connections = Quota::Count(connections);
        config.pending_limits.grace = grace;
    })
}

#[test]
fn the_oldest_gives_way_to_a_newcomer() {
    let (mut sim, addr) = world(Config::new().with(|config| {
        config.pending_limits.connections = Quota::Count(3);
        config.pending_limits.grace = Duration::ZERO;
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
        world(Config::new().with(|config| config.pending_limits.connections = Quota::Count(1)));
    let plain = sim
        .listen(
            Listen::tcp("127.0.0.1:0", Framing::Packet2),
            |_: &mut (), _| Echo,
        )
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
    let listen = behind_a_proxy().with(|listen| {
        listen.at_capacity = AtCapacity::Refuse {
            farewell: b"full".to_vec(),
        }
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

    fn on_close(&mut self, cx: &mut Context<'_, Heard>, closed: &Closed) {
        cx.app.0.push(closed.reason);
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
    let mut sim = Sim::new(1, Config::max_connections(100), Heard::default());
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
        Config::max_connections(60).with(|config| config.pending_limits.grace = Duration::MAX),
    );
    connect(&mut sim, addr, 100);
    assert_eq!(sim.stats().open, 30);
    sim.control()
        .reconfigure(|config| config.max_connections = 80)
        .expect("good");
    sim.settle();
    assert_eq!(sim.stats().open, 40);
    sim.control()
        .reconfigure(|config| config.pending_limits.connections = Quota::Percent(100))
        .expect("good");
    sim.settle();
    assert_eq!(sim.stats().open, 80);
}

#[test]
fn a_limit_that_cannot_work_is_named() {
    for quota in [Quota::Count(0), Quota::Percent(0), Quota::Percent(101)] {
        let server: Result<Server, Error> =
            Server::new(Config::new().with(|config| config.pending_limits.connections = quota));
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
        let (mut sim, addr) = world(Config::max_connections(cap));
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
        sim.control()
            .reconfigure(|config| config.max_connections = cap - 1)
            .expect("good");
        connect(&mut sim, addr, 1);
        sim.advance(Duration::from_secs(3));
        assert_eq!(sim.stats().closed(CloseReason::Evicted), 1);
    }
}

/// No connection is evicted for a new one that is not admitted anyway.
#[test]
fn no_connection_is_evicted_for_one_whose_source_has_too_many() {
    let mut sim = Sim::new(1, limited(2, PendingLimits::default().grace), ());
    let listen = Listen::tcp("127.0.0.1:0", Framing::Packet2).with(|listen| {
        listen.proxy_protocol = ProxyProtocol::Optional;
        listen.trusted_proxies = Some(
            AccessRules::deny_all()
                .allow("10.0.0.0/8")
                .expect("a network"),
        );
        listen.source_limits.connections = Some(1);
    });
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

/// A client that takes the last free slot needs no other one's.
#[test]
fn no_connection_is_evicted_while_a_slot_is_free() {
    let mut sim = Sim::new(1, Config::max_connections(4), Heard::default());
    let addr = sim.listen_with(plain(), Listens).expect("listen");
    for clients in 1..=4 {
        sim.connect(addr).expect("it listens");
        sim.advance(Duration::from_secs(2));
        assert_eq!(sim.stats().open, clients);
    }
    assert_eq!(sim.stats().closed_total(), 0);
}

/// Silent peers of a plain listener are open, and keep no client out all the same.
#[test]
fn silent_peers_of_a_plain_listener_make_room_at_the_cap() {
    let mut sim = Sim::new(1, Config::max_connections(4), Heard::default());
    let addr = sim.listen_with(plain(), Listens).expect("listen");
    let silent: Vec<_> = (0..4)
        .map(|_| sim.connect(addr).expect("it listens"))
        .collect();
    sim.settle();
    // The beginning of a frame is none.
    sim.send(silent[0], b"\0\x05hel");
    let newcomer = sim.connect(addr).expect("it listens");
    let iterations = sim.stats().iterations;
    sim.advance(Duration::from_millis(999));
    assert_eq!((sim.stats().accepted, sim.stats().closed_total()), (4, 0));
    assert_eq!(
        sim.control().listener("plain").expect("there").state,
        ListenerState::Full
    );
    assert!(sim.stats().iterations - iterations < 8, "it does not spin");
    sim.advance(Duration::from_millis(1));
    assert_eq!(sim.state(silent[0]), ClientState::Finished, "the oldest");
    assert_eq!((sim.stats().accepted, sim.stats().open), (5, 4));
    sim.send(newcomer, b"\0\x02hi");
    sim.settle();
    assert_eq!(sim.stats().traffic.frames_in, 1);
    assert_eq!(
        sim.app().0,
        [CloseReason::Evicted],
        "its handler hears of it"
    );
}

/// A listener whose connections are open at once.
fn plain() -> Listen {
    Listen::tcp("127.0.0.1:0", Framing::Packet2).name("plain")
}

/// A full server whose clients, `spoken` of them, have sent a frame; and the next client, a minute later.
fn full_of(listen: Listen, spoken: usize) -> (Sim, SocketAddr, Vec<ClientId>, ClientId) {
    let mut sim = Sim::new(1, Config::max_connections(4), ());
    let addr = sim.listen(listen, |_: &mut (), _| Echo).expect("listen");
    let clients = connect(&mut sim, addr, 4);
    for &client in clients.iter().take(spoken) {
        sim.send(client, b"\0\x02hi");
    }
    let newcomer = connect(&mut sim, addr, 1)[0];
    sim.advance(Duration::from_secs(60));
    (sim, addr, clients, newcomer)
}

#[test]
fn a_connection_that_has_sent_a_frame_is_never_evicted() {
    for spoken in 0..=4 {
        let (mut sim, addr, clients, _) = full_of(plain(), spoken);
        connect(&mut sim, addr, 10);
        sim.advance(Duration::from_secs(30));
        let gone = clients
            .iter()
            .map(|&client| sim.state(client) != ClientState::Connected);
        let gone: Vec<bool> = gone.collect();
        let expected: Vec<bool> = (0..4).map(|at| at >= spoken).collect();
        assert_eq!(gone, expected);
        let evicted = sim.stats().closed(CloseReason::Evicted);
        assert_eq!(evicted > 0, spoken < 4);
        assert_eq!(sim.stats().closed_total(), evicted);
    }
}

/// A frame in the first byte, where there are no others.
#[test]
fn a_raw_byte_is_a_frame() {
    let (sim, _, clients, _) = full_of(plain().with(|listen| listen.framing = Framing::Raw), 4);
    assert_eq!(sim.stats().closed_total(), 0);
    assert_eq!(sim.state(clients[0]), ClientState::Connected);
}

#[test]
fn a_listener_of_subscribers_keeps_its_silent_connections() {
    let (mut sim, addr, _, _) = full_of(plain().with(|listen| listen.evict_silent = false), 0);
    assert_eq!((sim.stats().accepted, sim.stats().closed_total()), (4, 0));
    let info = sim.control().listener(addr.port()).expect("there");
    assert_eq!(info.state, ListenerState::Full);
}

#[test]
fn a_listener_that_refuses_evicts_first() {
    let refuses = plain().with(|listen| {
        listen.at_capacity = AtCapacity::Refuse {
            farewell: Vec::new(),
        }
    });
    let (mut sim, addr, clients, newcomer) = full_of(refuses, 0);
    assert_eq!(sim.state(newcomer), ClientState::Finished, "all were young");
    let late = connect(&mut sim, addr, 1)[0];
    assert_eq!(sim.state(late), ClientState::Connected);
    assert_eq!(sim.state(clients[0]), ClientState::Finished);
}

/// A listener with four silent connections, which are all that it may have, beside another one with
/// older ones; and its next client.
fn own_limit(listen: Listen) -> (Sim, SocketAddr, Vec<ClientId>, ClientId) {
    let mut sim = Sim::new(1, Config::new(), ());
    let other = Listen::tcp("127.0.0.1:0", Framing::Packet2).name("other");
    let other = sim.listen(other, |_: &mut (), _| Echo).expect("listen");
    let addr = sim.listen(listen, |_: &mut (), _| Echo).expect("listen");
    connect(&mut sim, other, 100);
    let silent = connect(&mut sim, addr, 4);
    let newcomer = connect(&mut sim, addr, 1)[0];
    (sim, addr, silent, newcomer)
}

/// The oldest connection of the listener makes room, and none of another listener.
#[test]
fn silent_peers_make_room_at_the_limit_of_their_listener() {
    for listen in [plain(), behind_a_proxy()] {
        let (mut sim, addr, silent, newcomer) =
            own_limit(listen.with(|listen| listen.max_connections = Some(4)));
        let iterations = sim.stats().iterations;
        sim.advance(Duration::from_millis(999));
        assert_eq!(sim.stats().accepted, 104);
        let state = |sim: &mut Sim| sim.control().listener(addr.port()).expect("there").state;
        assert_eq!(state(&mut sim), ListenerState::Full);
        sim.advance(Duration::from_millis(1));
        let stats = sim.stats();
        assert!(stats.iterations - iterations < 8, "it does not spin");
        assert_eq!((stats.accepted, stats.open), (105, 104));
        assert_eq!(stats.closed(CloseReason::Evicted), 1);
        assert_ne!(sim.state(silent[0]), ClientState::Connected, "the oldest");
        assert_eq!(sim.state(newcomer), ClientState::Connected);
        // The next ones are served without a wait, while there are old ones.
        let more = connect(&mut sim, addr, 3);
        let gone = silent
            .iter()
            .filter(|&&client| sim.state(client) != ClientState::Connected);
        assert_eq!(gone.count(), 4);
        assert_eq!(sim.stats().open, 104);
        let iterations = sim.stats().iterations;
        sim.advance(Duration::from_secs(5));
        assert!(sim.stats().iterations - iterations < 8, "it does not spin");
        for client in more {
            assert_eq!(sim.state(client), ClientState::Connected);
        }
    }
}

#[test]
fn at_the_limit_of_a_listener_connections_that_have_sent_a_frame_stay() {
    let (mut sim, addr, clients, _) =
        own_limit(plain().with(|listen| listen.max_connections = Some(4)));
    for &client in &clients {
        sim.send(client, b"\0\x02hi");
    }
    sim.advance(Duration::from_secs(30));
    assert_eq!(sim.stats().closed_total(), 0);
    let info = sim.control().listener(addr.port()).expect("there");
    assert_eq!(
        (info.state, info.connections),
        (ListenerState::Full, 4),
        "clients wait"
    );
    let subscribers = plain().with(|listen| {
        listen.max_connections = Some(4);
        listen.evict_silent = false;
    });
    let (mut sim, ..) = own_limit(subscribers);
    sim.advance(Duration::from_secs(30));
    assert_eq!(sim.stats().closed_total(), 0);
}

#[test]
fn a_listener_that_refuses_evicts_at_its_own_limit_first() {
    let refuses = plain().with(|listen| {
        listen.max_connections = Some(4);
        listen.at_capacity = AtCapacity::Refuse {
            farewell: Vec::new(),
        };
    });
    let (mut sim, addr, clients, newcomer) = own_limit(refuses);
    assert_eq!(sim.state(newcomer), ClientState::Finished, "all were young");
    sim.advance(Duration::from_secs(1));
    let late = connect(&mut sim, addr, 1)[0];
    assert_eq!(sim.state(late), ClientState::Connected);
    assert_ne!(sim.state(clients[0]), ClientState::Connected);
}

/// With too many pending ones, a pending one of the same listener makes room for both reasons.
#[test]
fn at_both_limits_a_pending_connection_is_evicted() {
    let mut sim = Sim::new(1, limited(3, Duration::from_secs(1)), ());
    let listen = behind_a_proxy().with(|listen| listen.max_connections = Some(4));
    let addr = sim.listen(listen, |_: &mut (), _| Echo).expect("listen");
    let silent = connect(&mut sim, addr, 1)[0];
    sim.send(silent, HEADER);
    sim.advance(Duration::from_millis(1));
    let pending = connect(&mut sim, addr, 3);
    sim.advance(Duration::from_secs(2));
    let late = connect(&mut sim, addr, 1)[0];
    assert!(is_served(&mut sim, late));
    assert_ne!(sim.state(pending[0]), ClientState::Connected);
    assert_eq!(sim.state(silent), ClientState::Connected);
    // Then the silent one is the oldest.
    connect(&mut sim, addr, 1);
    assert_ne!(sim.state(silent), ClientState::Connected);
    assert_eq!(sim.stats().closed(CloseReason::Evicted), 2);
}

/// A limit that is set later applies to the connections that are there.
#[test]
fn a_limit_that_is_set_live_evicts_too() {
    for listen in [plain(), behind_a_proxy()] {
        let (mut sim, addr, clients, newcomer) = own_limit(listen);
        let all = [&clients[..], &[newcomer]].concat();
        let limit = |sim: &mut Sim, limit: Option<usize>| {
            let mut control = sim.control();
            let change = |listen: &mut Listen| listen.max_connections = limit;
            control
                .reconfigure_listener(addr.port(), change)
                .expect("changed");
        };
        limit(&mut sim, Some(5));
        sim.settle();
        sim.advance(Duration::from_secs(2));
        connect(&mut sim, addr, 2);
        let gone = |sim: &Sim| {
            let gone = all
                .iter()
                .map(|&client| sim.state(client) != ClientState::Connected);
            gone.filter(|&gone| gone).count()
        };
        assert_eq!(gone(&sim), 2);
        // Over the limit one that ends makes no room.
        limit(&mut sim, Some(3));
        sim.advance(Duration::from_secs(2));
        connect(&mut sim, addr, 2);
        assert_eq!(gone(&sim), 2);
        limit(&mut sim, None);
        sim.advance(Duration::from_secs(2));
        let stats = sim.stats();
        assert_eq!((gone(&sim), stats.open), (2, 107));
    }
}

/// Waits for this server: it is not read, or owed a reply.
enum Waits {
    Paused,
    Held,
}

impl Handler for Waits {
    fn on_open(&mut self, cx: &mut Context<'_>) -> Outcome {
        match self {
            Self::Paused => cx.conn.pause(),
            Self::Held => cx.conn.hold(),
        }
        Ok(())
    }

    fn on_frame(&mut self, cx: &mut Context<'_>, frame: &[u8]) -> Outcome {
        cx.conn.send(frame)?;
        Ok(())
    }
}

/// That is no fault of the peer's; and outgoing connections are this server's own.
#[test]
fn a_connection_that_waits_for_the_server_is_not_evicted() {
    let mut sim = Sim::new(1, Config::max_connections(3), ());
    let mut kinds = [Waits::Paused, Waits::Held].into_iter();
    let addr = sim
        .listen(plain(), move |_: &mut (), _| {
            kinds.next().unwrap_or(Waits::Held)
        })
        .expect("listen");
    let remote = SocketAddr::from(([203, 0, 113, 1], 80));
    sim.remote(remote, Answer::Accept);
    sim.control()
        .connect(remote, Connect::new(Framing::Packet2), Echo)
        .expect("it connects");
    let clients = connect(&mut sim, addr, 2);
    let newcomer = connect(&mut sim, addr, 1)[0];
    sim.advance(Duration::from_secs(60));
    assert_eq!(sim.stats().closed_total(), 0);
    for info in sim.control().connections() {
        if let (true, Some(mut conn)) = (info.paused, sim.control().conn(info.id)) {
            conn.resume();
        }
    }
    sim.advance(Duration::from_secs(2));
    assert_eq!(sim.stats().closed(CloseReason::Evicted), 1);
    assert_eq!(sim.state(clients[0]), ClientState::Finished);
    assert_eq!(sim.state(newcomer), ClientState::Connected);
}

/// Keeps a connection whose peer has finished, and has more to say than the kernel accepts.
struct Talks;

impl Handler for Talks {
    fn on_frame(&mut self, _: &mut Context<'_>, _: &[u8]) -> Outcome {
        Ok(())
    }

    fn on_finish(&mut self, cx: &mut Context<'_>) -> Outcome {
        cx.conn.send([0; 1000])?;
        Ok(())
    }
}

/// Output that it does not read is no reason to keep it: the peer keeps the server waiting.
#[test]
fn a_connection_that_has_finished_without_a_frame_is_evicted() {
    for reads in [true, false] {
        let mut sim = Sim::new(1, Config::max_connections(1), ());
        let addr = sim.listen(plain(), |_: &mut (), _| Talks).expect("listen");
        let silent = connect(&mut sim, addr, 1)[0];
        sim.set_send_buffer(silent, 16);
        sim.set_reading(silent, reads);
        sim.finish(silent);
        sim.advance(Duration::from_secs(2));
        let newcomer = connect(&mut sim, addr, 1)[0];
        assert_eq!(sim.stats().closed(CloseReason::Evicted), 1, "{reads}");
        assert_eq!(sim.state(newcomer), ClientState::Connected);
    }
}

/// However many older connections wait for this server, the silent ones behind them make room: at
/// the server's cap, and at a listener's own.
#[test]
fn connections_that_wait_for_the_server_hide_no_silent_one() {
    for own in [false, true] {
        let listen = plain().with(|listen| listen.max_connections = own.then_some(310));
        let config = Config::max_connections(if own { 400 } else { 310 });
        let mut sim = Sim::new(1, config, ());
        let mut made = 0;
        let addr = sim
            .listen(listen, move |_: &mut (), _| {
                made += 1;
                // The first 300 wait for the server.
                match made {
                    1..=300 if made % 2 == 0 => Late::Waits(Waits::Held),
                    1..=300 => Late::Waits(Waits::Paused),
                    _ => Late::Echoes,
                }
            })
            .expect("listen");
        let clients = connect(&mut sim, addr, 310);
        let newcomer = connect(&mut sim, addr, 1)[0];
        sim.advance(Duration::from_secs(2));
        assert_eq!(sim.state(clients[300]), ClientState::Finished);
        sim.send(newcomer, b"\0\x02hi");
        sim.settle();
        assert_eq!(sim.received(newcomer), b"\0\x02hi");
        // Those that wait for their peers again can make room again, each once.
        let conns = sim.control().connections();
        for info in conns.iter().filter(|info| info.paused) {
            if let Some(mut conn) = sim.control().conn(info.id) {
                conn.resume();
            }
        }
        sim.settle();
        let more = connect(&mut sim, addr, 9 + 150 + 1);
        sim.advance(Duration::from_secs(2));
        let evicted = sim.stats().closed(CloseReason::Evicted);
        assert_eq!(evicted, 1 + 9 + 150 + 1, "the last gives way to none");
        assert_eq!(sim.state(more[1]), ClientState::Connected);
    }
}

/// A handler that waits, or one that echoes.
enum Late {
    Waits(Waits),
    Echoes,
}

impl Handler for Late {
    fn on_open(&mut self, cx: &mut Context<'_>) -> Outcome {
        match self {
            Self::Waits(waits) => waits.on_open(cx),
            Self::Echoes => Ok(()),
        }
    }

    fn on_frame(&mut self, cx: &mut Context<'_>, frame: &[u8]) -> Outcome {
        Echo.on_frame(cx, frame)
    }
}

/// A peer that neither speaks nor reads what it was greeted with keeps the server waiting.
#[test]
fn a_silent_peer_that_does_not_read_makes_room() {
    struct Greets;

    impl Handler for Greets {
        fn on_open(&mut self, cx: &mut Context<'_>) -> Outcome {
            for _ in 0..100 {
                cx.conn.send([0; 5_000])?;
            }
            Ok(())
        }

        fn on_frame(&mut self, _: &mut Context<'_>, _: &[u8]) -> Outcome {
            Ok(())
        }
    }

    // What it sends is not read before it has read.
    for says in [&b""[..], b"\0", b"\0\x02hi"] {
        let mut sim = Sim::new(1, Config::max_connections(2), ());
        let addr = sim.listen(plain(), |_: &mut (), _| Greets).expect("listen");
        let clients = [(); 2].map(|()| {
            let client = sim.connect(addr).expect("it listens");
            sim.set_reading(client, false);
            client
        });
        sim.settle();
        for &client in &clients {
            sim.send(client, says);
        }
        sim.settle();
        let conns = sim.control().connections();
        assert_eq!(conns.iter().filter(|info| info.congested).count(), 2);
        let newcomer = connect(&mut sim, addr, 1)[0];
        sim.advance(Duration::from_secs(2));
        assert_eq!(sim.stats().closed(CloseReason::Evicted), 1);
        for &client in &clients {
            sim.set_reading(client, true);
        }
        sim.settle();
        assert_ne!(sim.state(clients[0]), ClientState::Connected);
        assert_eq!(sim.state(clients[1]), ClientState::Connected);
        assert_eq!(sim.state(newcomer), ClientState::Connected);
    }
}

/// Those that have spoken hide no silent one from a client that would be refused, even if they speak just before it comes,
/// or if it comes right after the last that had room.
#[test]
fn a_refusal_is_preceded_by_a_search() {
    for own in [false, true] {
        for at_once in [false, true] {
            let listen = plain().with(|listen| {
                listen.max_connections = own.then_some(70);
                listen.at_capacity = AtCapacity::Refuse {
                    farewell: Vec::new(),
                };
            });
            let cap = if own { 1000 } else { 70 };
            let mut sim = Sim::new(1, Config::max_connections(cap), ());
            let addr = sim.listen(listen, |_: &mut (), _| Echo).expect("listen");
            let clients = connect(&mut sim, addr, if at_once { 70 } else { 69 });
            sim.advance(Duration::from_secs(5));
            for &client in &clients[..64] {
                sim.send(client, b"\0\x02hi");
            }
            if !at_once {
                sim.advance(Duration::from_secs(5));
                sim.connect(addr).expect("it listens");
            }
            let newcomer = sim.connect(addr).expect("it listens");
            sim.send(newcomer, b"\0\x02hi");
            sim.settle();
            assert_eq!(sim.received(newcomer), b"\0\x02hi");
            assert_eq!(sim.stats().closed(CloseReason::Evicted), 1);
        }
    }
}

/// A slow loris in the clear, as [`a_slow_loris_keeps_no_client_out`].
#[test]
fn a_slow_loris_in_the_clear_keeps_no_client_out() {
    let mut sim = Sim::new(1, Config::max_connections(100), ());
    let addr = sim.listen(plain(), |_: &mut (), _| Echo).expect("listen");
    let mut served = 0;
    for _ in 0..20 {
        for _ in 0..200 {
            // Those that find the backlog full are not even that far.
            let _ = sim.connect(addr);
        }
        let honest = sim.connect(addr);
        if let Some(honest) = honest {
            sim.send(honest, b"\0\x02hi");
        }
        sim.advance(Duration::from_secs(5));
        served += u32::from(honest.is_some_and(|honest| sim.received(honest) == b"\0\x02hi"));
    }
    assert!(served >= 4, "{served} of the honest were served");
    assert_eq!(sim.stats().peak, 100);
}

#[cfg(feature = "tls")]
mod upgrades {
    use super::*;

    /// The first frame is the command to upgrade.
    struct StartTls;

    impl Handler for StartTls {
        fn on_frame(&mut self, cx: &mut Context<'_>, frame: &[u8]) -> Outcome {
            if frame == b"tls" {
                cx.conn.start_tls(kit::sim_tls::server_config())?;
            } else {
                cx.conn.send(frame)?;
            }
            Ok(())
        }
    }

    fn upgrading(config: Config, count: usize) -> (Sim, SocketAddr, Vec<ClientId>) {
        let mut sim = Sim::new(1, config, ());
        let addr = sim
            .listen(plain(), |_: &mut (), _| StartTls)
            .expect("listen");
        let clients = connect(&mut sim, addr, count);
        // Long after accept: the grace is the handshake's.
        sim.advance(Duration::from_secs(8));
        for &client in &clients {
            sim.send(client, b"\0\x03tls");
            sim.settle();
        }
        (sim, addr, clients)
    }

    #[test]
    fn an_upgrade_is_pending_until_it_is_done() {
        let (mut sim, _, clients) = upgrading(Config::new(), 1);
        assert_eq!((sim.stats().pending, sim.stats().open), (1, 1));
        kit::sim_tls::Client::new().shake(&mut sim, clients[0]);
        assert_eq!((sim.stats().pending, sim.stats().open), (0, 1));
    }

    #[test]
    fn an_upgrade_that_stalls_makes_room_at_the_cap() {
        let (mut sim, addr, clients) = upgrading(Config::max_connections(2), 2);
        let newcomer = connect(&mut sim, addr, 1)[0];
        sim.advance(Duration::from_millis(999));
        assert_eq!(sim.stats().closed_total(), 0);
        sim.advance(Duration::from_millis(1));
        assert_eq!(sim.stats().closed(CloseReason::Evicted), 1);
        assert_eq!(sim.state(clients[0]), ClientState::Finished);
        sim.send(newcomer, b"\0\x02hi");
        sim.settle();
        assert_eq!(sim.received(newcomer), b"\0\x02hi");
    }

    #[test]
    fn too_many_upgrades_evict_the_oldest() {
        let (sim, _, clients) = upgrading(limited(2, Duration::ZERO), 5);
        assert_eq!(sim.stats().pending, 2);
        assert_eq!(sim.stats().closed(CloseReason::Evicted), 3);
        assert_eq!(sim.state(clients[2]), ClientState::Finished);
        assert_eq!(sim.state(clients[3]), ClientState::Connected);
    }

    /// A client of a TLS listener is open after its handshake, and silent.
    #[test]
    fn a_silent_client_behind_tls_makes_room_at_the_cap() {
        let mut sim = Sim::new(1, Config::max_connections(1), ());
        let listen = plain().tls(kit::sim_tls::server_config());
        let addr = sim.listen(listen, |_: &mut (), _| Echo).expect("listen");
        let silent = connect(&mut sim, addr, 1)[0];
        kit::sim_tls::Client::new().shake(&mut sim, silent);
        assert_eq!((sim.stats().opened, sim.stats().pending), (1, 0));
        connect(&mut sim, addr, 1);
        sim.advance(Duration::from_secs(1));
        assert_eq!(sim.stats().closed(CloseReason::Evicted), 1);
        assert_eq!(sim.state(silent), ClientState::Finished);
    }
}

/// Tries to connect in its last callback: one attempt fails at once, the others find what is free.
struct Connects;

impl Handler<Vec<bool>> for Connects {
    fn on_frame(&mut self, _: &mut Context<'_, Vec<bool>>, _: &[u8]) -> Outcome {
        Ok(())
    }

    fn on_close(&mut self, cx: &mut Context<'_, Vec<bool>>, _: &Closed) {
        for _ in 0..3 {
            let connected = cx.conn.control().connect(
                "203.0.113.7:25",
                Connect::new(Framing::Packet2),
                Connects,
            );
            cx.app.push(connected.is_ok());
        }
    }
}

/// The client for which a connection is evicted keeps its slot, whatever the last callback tries.
#[test]
fn a_failed_connect_takes_no_slot_from_a_newcomer() {
    let mut sim = Sim::new(1, Config::max_connections(2), Vec::new());
    sim.remote("203.0.113.7:25", Answer::Silence);
    let listen = plain().with(|listen| listen.max_connections = Some(1));
    let addr = sim
        .listen(listen, |_: &mut Vec<bool>, _| Connects)
        .expect("listen");
    sim.connect(addr).expect("it listens");
    sim.advance(Duration::from_secs(2));
    sim.add_fault(Scripted {
        call: Call::Connect,
        after: 0,
        errno: libc::ENETUNREACH,
    });
    let newcomer = sim.connect(addr).expect("it listens");
    sim.settle();
    assert_eq!(sim.stats().closed(CloseReason::Evicted), 1);
    assert_eq!(sim.app()[..], [false, true, false]);
    assert_eq!(sim.state(newcomer), ClientState::Connected);
    assert_eq!(sim.stats().open, 2);
}

/// Echoes, and is paused from the start if so told.
struct MayPause(bool);

impl Handler for MayPause {
    fn on_open(&mut self, cx: &mut Context<'_>) -> Outcome {
        if self.0 {
            cx.conn.pause();
        }
        Ok(())
    }

    fn on_frame(&mut self, cx: &mut Context<'_>, frame: &[u8]) -> Outcome {
        cx.conn.send(frame)?;
        Ok(())
    }
}

/// However many have sent a frame since they opened, one that has not is found behind them at once,
/// and behind an older one that waits for this server.
#[test]
fn a_silent_connection_is_found_behind_a_crowd_that_has_spoken() {
    const ALL: usize = 1000;
    for (cap, limit) in [(ALL, None), (ALL + 9, Some(ALL))] {
        let mut sim = Sim::new(1, Config::max_connections(cap), ());
        let listen = plain().with(|listen| {
            listen.max_connections = limit;
            listen.socket.backlog = 2000;
        });
        let mut count = 0;
        let service = move |_: &mut (), _| {
            count += 1;
            MayPause(count == 1)
        };
        let addr = sim.listen(listen, service).expect("listen");
        let clients = connect(&mut sim, addr, ALL);
        for &client in &clients[1..ALL - 1] {
            sim.send(client, b"\0\x02hi");
        }
        sim.settle();
        sim.advance(Duration::from_secs(2));
        let newcomer = connect(&mut sim, addr, 1)[0];
        assert_ne!(sim.state(clients[ALL - 1]), ClientState::Connected);
        sim.send(newcomer, b"\0\x02hi");
        sim.settle();
        assert_eq!(sim.received(newcomer), b"\0\x02hi");
    }
}

/// A limit that is set during a handshake after STARTTLS: the grace counts from its beginning.
#[cfg(feature = "tls")]
#[test]
fn a_limit_that_is_set_live_knows_when_an_upgrade_began() {
    use std::sync::Arc;
    struct Upgrades;
    impl Handler for Upgrades {
        fn on_frame(&mut self, cx: &mut Context<'_>, _: &[u8]) -> Outcome {
            let config: Arc<_> = kit::sim_tls::server_config();
            cx.conn.start_tls(config)?;
            Ok(())
        }
    }
    let mut sim = Sim::new(1, Config::new(), ());
    let addr = sim
        .listen(plain(), |_: &mut (), _| Upgrades)
        .expect("listen");
    let upgrading = connect(&mut sim, addr, 1)[0];
    sim.advance(Duration::from_secs(10));
    sim.send(upgrading, b"\0\x01x");
    sim.settle();
    sim.control()
        .reconfigure_listener(addr.port(), |listen| listen.max_connections = Some(1))
        .expect("changed");
    connect(&mut sim, addr, 1);
    sim.advance(Duration::from_millis(999));
    assert_eq!(sim.stats().closed(CloseReason::Evicted), 0);
    sim.advance(Duration::from_millis(1));
    assert_eq!(sim.stats().closed(CloseReason::Evicted), 1);
}
