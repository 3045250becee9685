//! What can be seen of a server: its tree as data, page by page, and as a text; and what a connection tells of itself.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::time::Duration;

use kit::net::{connect, local, packet4, ping, spawn_echo, PATIENCE};
use portcullis::sim::{ClientId, Sim};
use portcullis::{AccessRules, AtCapacity, CloseReason};
use portcullis::{
    Config, ConnId, ConnInfo, Context, Framing, Handler, Listen, ListenerState, Outcome,
    ProxyProtocol, Rate, State, Tree,
};

/// Does what a frame says: echo, pause, a timer, a flood, close.
struct Obedient;

impl Handler for Obedient {
    fn on_frame(&mut self, cx: &mut Context<'_>, frame: &[u8]) -> Outcome {
        match frame {
            b"pause" => cx.conn.pause(),
            b"timer" => cx.conn.set_timer(1, Duration::from_secs(7)),
            b"flood" => cx.conn.send(vec![0; 300_000])?,
            b"close" => cx.conn.close(),
            other => cx.conn.send(other)?,
        }
        Ok(())
    }
}

fn seconds(count: u64) -> Option<Duration> {
    Some(Duration::from_secs(count))
}

struct World {
    sim: Sim,
    addr: SocketAddr,
}

impl World {
    fn new(config: Config, listen: Listen) -> Self {
        let mut sim = Sim::new(3, config, ());
        let addr = sim
            .listen(listen, |_: &mut (), _| Obedient)
            .expect("listen");
        Self { sim, addr }
    }

    fn connect(&mut self) -> ClientId {
        let client = self.sim.connect(self.addr).expect("a listener");
        self.sim.settle();
        client
    }

    fn send(&mut self, client: ClientId, frame: &[u8]) {
        self.sim.send(client, &packet4(frame));
        self.sim.settle();
    }

    fn info(&mut self, client: ClientId) -> ConnInfo {
        let peer = self.sim.client_addr(client).expect("it is known");
        let mut all = self.sim.control().connections().into_iter();
        all.find(|info| info.peer == peer).expect("it is there")
    }
}

fn listen() -> Listen {
    Listen::tcp("127.0.0.1:0", Framing::Packet4).name("games")
}

/// The time that is left of one deadline, while it runs.
fn time_left(info: &ConnInfo, name: &str) -> Option<Duration> {
    let mut all = info.time_left();
    all.find(|(known, _)| *known == name).map(|(_, left)| left)
}

/// Every deadline is told while its clock runs, as the time that is left; a clock that stands is not.
#[test]
fn a_connection_tells_when_its_deadlines_fall_due() {
    let mut world = World::new(Config::new(), listen());
    let client = world.connect();
    world.sim.advance(Duration::from_secs(20));
    let info = world.info(client);
    assert_eq!(
        (info.idle, time_left(&info, "idle timeout")),
        (Duration::from_secs(20), seconds(100))
    );
    assert_eq!(
        (
            time_left(&info, "handshake timeout"),
            time_left(&info, "frame timeout"),
            time_left(&info, "write timeout"),
            time_left(&info, "linger timeout")
        ),
        (None, None, None, None)
    );
    assert_eq!(
        (time_left(&info, "reading again"), time_left(&info, "timer")),
        (None, None)
    );
    assert!(!info.paused && !info.congested && !info.throttled && !info.paused_for_memory);

    // A frame that has begun, and a timer.
    world.send(client, b"timer");
    world.sim.send(client, &[0, 0]);
    world.sim.advance(Duration::from_secs(5));
    let info = world.info(client);
    assert_eq!(
        (
            time_left(&info, "frame timeout"),
            time_left(&info, "idle timeout"),
            time_left(&info, "timer")
        ),
        (seconds(25), seconds(115), seconds(2))
    );
    world.sim.send(client, &[0, 0]);
    world.sim.advance(Duration::from_secs(5));
    let info = world.info(client);
    assert_eq!(
        (time_left(&info, "frame timeout"), time_left(&info, "timer")),
        (None, None),
        "an empty frame, and the timer is over"
    );

    // Paused: the peer's clocks stand.
    world.send(client, b"pause");
    let info = world.info(client);
    assert!(info.paused && !info.congested);
    assert_eq!(
        (
            time_left(&info, "idle timeout"),
            time_left(&info, "frame timeout")
        ),
        (None, None)
    );

    // Its peer does not read: more than the send buffer waits.
    let slow = world.connect();
    world.sim.set_reading(slow, false);
    world.send(slow, b"flood");
    world.sim.advance(Duration::from_secs(10));
    let info = world.info(slow);
    assert!(info.congested && !info.paused && info.queued > 128 * 1024);
    assert_eq!(
        (
            time_left(&info, "write timeout"),
            time_left(&info, "idle timeout")
        ),
        (seconds(20), None)
    );
    // And closes: FIN is sent, the peer's is awaited.
    let polite = world.connect();
    world.send(polite, b"close");
    world.sim.advance(Duration::from_millis(500));
    let info = world.info(polite);
    assert_eq!(info.state, State::Closing);
    assert_eq!(
        time_left(&info, "linger timeout"),
        Some(Duration::from_millis(1500))
    );
    assert_eq!(
        (
            time_left(&info, "handshake timeout"),
            time_left(&info, "idle timeout")
        ),
        (None, None)
    );
}

#[test]
fn a_connection_tells_what_keeps_it_from_reading() {
    // The rate.
    let mut world = World::new(
        Config::new(),
        listen().with(|listen| listen.conn.frame_rate = Some(Rate::per_second(1).burst(1))),
    );
    let client = world.connect();
    world.send(client, b"one");
    world.send(client, b"two");
    let info = world.info(client);
    assert!(info.throttled);
    assert_eq!(
        (
            time_left(&info, "reading again"),
            time_left(&info, "idle timeout")
        ),
        (seconds(1), None)
    );
    world.sim.advance(Duration::from_secs(1));
    assert!(!world.info(client).throttled);

    // Memory: frames that are begun take more than three quarters of the limit, and only one is read from on.
    let mut world = World::new(
        Config::new().with(|config| config.memory_limit = Some(1_200_000)),
        listen().with(|listen| listen.conn.max_frame = Some(2 << 20)),
    );
    let clients = [world.connect(), world.connect(), world.connect()];
    for client in clients {
        world.sim.send(client, &900_000_u32.to_be_bytes());
        world.sim.send(client, &vec![1; 450_000]);
    }
    world.sim.settle();
    let infos = clients.map(|client| world.info(client));
    assert!(
        infos.iter().any(|info| info.paused_for_memory)
            && infos.iter().any(|info| !info.paused_for_memory),
        "{infos:?}"
    );

    // A PROXY header that has not come: the handshake's clock.
    let behind = listen().with(|listen| {
        listen.proxy_protocol = ProxyProtocol::Required;
        listen.trusted_proxies = Some(AccessRules::allow_all());
    });
    let mut world = World::new(Config::new(), behind);
    let client = world.connect();
    world.sim.advance(Duration::from_secs(3));
    let info = world.info(client);
    assert_eq!(
        (info.state, time_left(&info, "handshake timeout")),
        (State::Accepting, seconds(7))
    );
    assert_eq!(world.sim.stats().pending, 1);
    world
        .sim
        .send(client, b"PROXY TCP4 203.0.113.9 192.0.2.1 4711 25\r\n");
    world.sim.settle();
    let tree = world.sim.control().tree(9).to_string();
    assert!(
        tree.contains(" for 203.0.113.9:4711: Open, age 3.0s"),
        "{tree}"
    );
    assert_eq!(world.sim.stats().pending, 0);
}

/// ranch: misc_info. The whole text, as a person reads it.
#[test]
fn the_tree_as_text() {
    let mut world = World::new(
        Config::max_connections(2000),
        listen().with(|listen| listen.max_connections = Some(1500)),
    );
    let clients: Vec<_> = (0..1003).map(|_| world.sim.connect(world.addr)).collect();
    world.sim.settle();
    let second = Listen::tcp("127.0.0.1:0", Framing::Packet2).name("admin \"x\"");
    let admin = world
        .sim
        .listen(second, |_: &mut (), _| Obedient)
        .expect("listen");
    world.sim.advance(Duration::from_secs(2));
    world.send(clients[0].expect("connected"), b"timer");
    world
        .sim
        .control()
        .suspend("admin \"x\"")
        .expect("it is there");
    let peer = |client: usize| {
        world
            .sim
            .client_addr(clients[client].expect("connected"))
            .expect("known")
    };
    let (first, last) = (peer(0), peer(1));
    let text = world.sim.control().tree(2).to_string();
    let expected = format!(
        "server: 1,003 of 2,000 connections, 0 of them not open yet, 0 bytes buffered, 1,005 descriptors\n  \
         L0 \"games\" on {}: Listening, 1,003 of 1,500 connections, 1003 accepted\n    \
         0.1 from {first}: Open, age 2.0s, silent for 0.0ns, 9 bytes and 1 frames in, 0 bytes and 0 frames out, \
         idle timeout in 120.0s, timer in 7.0s\n    \
         1.1 from {last}: Open, age 2.0s, silent for 2.0s, 0 bytes and 0 frames in, 0 bytes and 0 frames out, \
         idle timeout in 118.0s\n    \
         ... and 1,001 more\n  \
         L1 \"admin \\\"x\\\"\" on {admin}: Suspended, 0 of 2,000 connections, 0 accepted",
        world.addr
    );
    assert_eq!(text, expected);
    // A closed listener stays as long as it has connections.
    world
        .sim
        .control()
        .close_listener("games")
        .expect("it is there");
    world.sim.control().drain(Duration::from_secs(9));
    let tree = world.sim.control().tree(0);
    assert_eq!(tree.listeners[0].0.state, ListenerState::Closed);
    assert!(
        tree.draining
            && tree
                .to_string()
                .starts_with("server (draining): 1,003 of 2,000")
    );
    assert!(tree.to_string().contains("\n    ... and 1,003 more\n"));
}

const MANY: usize = 100_000;

/// So many connections, all there at once.
fn crowd(count: usize) -> World {
    let config = Config::max_connections(count + 1).with(|config| {
        config.budgets.accepts = count;
        config.budgets.work = usize::MAX;
    });
    let mut world = World::new(
        config,
        listen().with(|listen| listen.socket.backlog = count as u32),
    );
    for _ in 0..count {
        world.sim.connect(world.addr).expect("the backlog has room");
    }
    // Else all of them are looked at after each batch of events.
    world.sim.set_checks(false);
    world.sim.settle();
    world.sim.set_checks(true);
    world.sim.step();
    assert_eq!(world.sim.stats().open, count);
    world
}

/// A page costs a number of visited slots, full or empty. All pages together show every connection
/// once.
#[test]
fn pages_are_bounded_and_show_each_connection_once() {
    let mut world = crowd(MANY);
    let walk = |world: &mut World, limit: usize| {
        let (mut seen, mut pages, mut from) = (Vec::<ConnId>::new(), 0, Some(0));
        while let Some(slot) = from {
            let (page, next) = world.sim.control().connections_page(slot, limit);
            assert!(page.len() <= limit.max(1));
            seen.extend(page.iter().map(|info| info.id));
            pages += 1;
            from = next;
        }
        (seen, pages)
    };
    let (seen, pages) = walk(&mut world, 1000);
    assert_eq!((seen.len(), pages), (MANY, MANY / 1000));
    assert_eq!(seen.iter().collect::<HashSet<_>>().len(), MANY);
    assert_eq!(walk(&mut world, MANY * 2).1, 1);
    assert_eq!(walk(&mut world, usize::MAX).0, seen);

    // A smaller crowd, of which all but three leave: their slots are passed over at the same cost,
    // and no connection is missed.
    const FEW: usize = 5000;
    let mut world = crowd(FEW);
    let (seen, _) = walk(&mut world, usize::MAX);
    let left = [seen[0], seen[3000], seen[FEW - 1]];
    for id in seen.iter().filter(|id| !left.contains(id)) {
        world.sim.control().kill(*id);
    }
    world.sim.settle();
    let (seen, pages) = walk(&mut world, 1000);
    assert_eq!((seen.as_slice(), pages), (left.as_slice(), FEW / 1000));
    // A limit of nothing gets on all the same.
    let (page, next) = world.sim.control().connections_page(0, 0);
    assert!(page.len() == 1 && next.is_some());
}

/// Connections that come and go between two pages do not move the others.
#[test]
fn a_page_is_not_moved_by_connections_that_come_and_go() {
    let mut world = World::new(Config::new(), listen());
    for _ in 0..30 {
        world.connect();
    }
    let all: Vec<_> = world
        .sim
        .control()
        .connections()
        .iter()
        .map(|info| info.id)
        .collect();
    let (_, next) = world.sim.control().connections_page(0, 10);
    for id in &all[3..15] {
        world.sim.control().kill(*id);
    }
    world.connect();
    let (rest, _) = world
        .sim
        .control()
        .connections_page(next.expect("more"), 1000);
    let rest: Vec<_> = rest.iter().map(|info| info.id).collect();
    assert_eq!(
        rest.iter()
            .filter(|id| all.contains(id))
            .copied()
            .collect::<Vec<_>>(),
        all[15..]
    );
}

/// The text stays short, and drawing it looks at a bounded number of slots: it may miss a listener's only connection behind a
/// hundred thousand others, and says that it is there.
#[test]
fn the_tree_of_many_is_short() {
    let mut world = crowd(MANY);
    let admin = world.sim.listen(
        Listen::tcp("127.0.0.1:0", Framing::Packet2).name("admin"),
        |_: &mut (), _| Obedient,
    );
    world
        .sim
        .connect(admin.expect("listen"))
        .expect("the backlog has room");
    world.sim.settle();
    let tree = world.sim.control().tree(100);
    let shown = |tree: &Tree| {
        tree.listeners
            .iter()
            .map(|(_, connections)| connections.len())
            .collect::<Vec<_>>()
    };
    assert_eq!((tree.stats.open, shown(&tree)), (MANY + 1, vec![100, 0]));
    let text = tree.to_string();
    assert!(text.contains("\n    ... and 99,900 more\n"), "{text}");
    assert!(
        text.ends_with("1 of 100,001 connections, 1 accepted\n    ... and 1 more"),
        "{text}"
    );
    assert!(text.len() < 30_000, "{} bytes", text.len());
    // With few connections none is missed.
    let mut world = World::new(Config::new(), listen());
    for _ in 0..1000 {
        world.connect();
    }
    let admin = world.sim.listen(
        Listen::tcp("127.0.0.1:0", Framing::Packet2),
        |_: &mut (), _| Obedient,
    );
    world
        .sim
        .connect(admin.expect("listen"))
        .expect("the backlog has room");
    world.sim.settle();
    assert_eq!(shown(&world.sim.control().tree(3)), [3, 1]);
}

/// From another thread, of a real server.
#[test]
fn a_handle_shows_the_tree() {
    let server = spawn_echo(
        Config::new(),
        local().name("echo").with(|listen| {
            listen.at_capacity = AtCapacity::Refuse {
                farewell: Vec::new(),
            }
        }),
    );
    let mut client = connect(server.addr());
    ping(&mut client, b"hello");
    let tree = server
        .handle
        .call(PATIENCE, |(), control| control.tree(5))
        .expect("the loop answers");
    let info = &tree.listeners[0].1[0];
    assert_eq!(info.peer, client.local_addr().expect("an address"));
    assert!(time_left(info, "idle timeout")
        .is_some_and(|left| left <= Duration::from_secs(120) && left > Duration::from_secs(60)));
    assert!(tree.to_string().contains(": Open, age "), "{tree}");
    server.handle.kill(info.id).expect("it is alive");
    let closes = server
        .handle
        .call(PATIENCE, |(), control| control.recent_closes())
        .expect("the loop answers");
    // Killed before the question was asked, and gone at the end of that turn.
    assert!(closes.iter().all(|close| close.id == Some(info.id)));
    server.until("it has gone", |stats| stats.open == 0);
    let closes = server
        .handle
        .call(PATIENCE, |(), control| control.recent_closes())
        .expect("the loop answers");
    assert_eq!((closes.len(), closes[0].reason), (1, CloseReason::Killed));
    let metrics = server.handle.metrics(PATIENCE).expect("the loop answers");
    assert_eq!(metrics.stats.closed(CloseReason::Killed), 1);
    assert_eq!(metrics.histograms.connection_age.count(), 1);
    server.finish();
}
