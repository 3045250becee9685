//! One limit holds for all that a server buffers: reading pauses on the largest holders, then they go.

use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use portcullis::sim::{ClientId, ClientState, Sim};
use portcullis::{
    AccessRules, CloseReason, Closed, Config, ConnId, Context, Error, Framing, Handler, Listen,
    Outcome, Peer, ProxyHeader, ProxyProtocol, Server,
};

struct Echo;

impl Handler for Echo {
    fn on_frame(&mut self, cx: &mut Context<'_>, frame: &[u8]) -> Outcome {
        cx.conn.send(frame)?;
        Ok(())
    }
}

const LIMIT: usize = 1024 * 1024;

fn world() -> (Sim, SocketAddr) {
    let mut sim = Sim::new(
        1,
        Config::max_connections(5000).with(|config| {
            config.memory_limit = Some(LIMIT);
            // One read in a turn.
            config.budgets.read_bytes = 64 * 1024;
        }),
        (),
    );
    let listen =
        Listen::tcp("127.0.0.1:0", Framing::Packet4).with(|listen| listen.socket.backlog = 5000);
    let addr = sim.listen(listen, |_: &mut (), _| Echo).expect("listen");
    (sim, addr)
}

/// A frame of 8 MiB is announced, and so much of it sent.
fn begin(sim: &mut Sim, client: ClientId, bytes: usize) {
    sim.send(
        client,
        &[&0x0080_0000_u32.to_be_bytes()[..], &vec![b'x'; bytes]].concat(),
    );
}

fn ping(sim: &mut Sim, addr: SocketAddr) {
    let client = sim.connect(addr).expect("it listens");
    sim.send(client, b"\0\0\0\x02hi");
    sim.settle();
    assert_eq!(sim.received(client), b"\0\0\0\x02hi");
    sim.finish(client);
    sim.settle();
}

fn buffered(sim: &mut Sim) -> usize {
    sim.control()
        .connections()
        .iter()
        .map(|info| info.buffered)
        .sum()
}

/// A thousand peers that each begin a frame of the largest size. The limit holds, small connections
/// are served, and frames that are late make room.
#[test]
fn hostile_peers_share_what_there_is() {
    let (mut sim, addr) = world();
    let clients: Vec<_> = (0..1000)
        .map(|_| sim.connect(addr).expect("it listens"))
        .collect();
    for client in &clients {
        begin(&mut sim, *client, 50_000);
    }
    sim.advance(Duration::from_secs(1));
    let held = buffered(&mut sim);
    assert!((LIMIT / 2..=LIMIT).contains(&held), "{held}");
    ping(&mut sim, addr);
    // The frame timeout of thirty seconds, from the last read: clocks run while nothing is read.
    sim.advance(Duration::from_secs(80));
    ping(&mut sim, addr);
    assert_eq!(sim.stats().open, 0);
    assert_eq!(buffered(&mut sim), 0);
}

/// A PROXY header of version 2 with one TLV.
fn header(kind: u8, length: usize) -> Vec<u8> {
    let block = 12 + 3 + length as u16;
    let mut bytes = b"\r\n\r\n\0\r\nQUIT\n\x21\x11".to_vec();
    bytes.extend(block.to_be_bytes());
    bytes.extend([192, 0, 2, 1, 192, 0, 2, 2, 0, 1, 0, 2, kind]);
    bytes.extend((length as u16).to_be_bytes());
    bytes.resize(bytes.len() + length, b'x');
    bytes
}

/// The facts of its PROXY header.
type Header = Option<Rc<ProxyHeader>>;

/// Keeps the facts of its header.
struct Keeper(Header);

impl Handler for Keeper {
    fn on_frame(&mut self, cx: &mut Context<'_>, _frame: &[u8]) -> Outcome {
        let tlvs = |header: &ProxyHeader| header.tlvs.iter().count();
        assert_eq!(cx.conn.proxy().map(tlvs), self.0.as_deref().map(tlvs));
        Ok(())
    }
}

/// Has seen the facts of its header, and does not keep them.
struct Forgetful;

impl Handler for Forgetful {
    fn on_frame(&mut self, cx: &mut Context<'_>, _frame: &[u8]) -> Outcome {
        let header = cx.conn.proxy().expect("a header");
        assert_eq!(header.tlvs.iter().count(), 0);
        assert_eq!(cx.conn.source().to_string(), "192.0.2.1:1");
        cx.conn.send(b"forgotten")?;
        Ok(())
    }
}

/// What a PROXY header leaves behind lives as long as its connection: padding is dropped, so are
/// facts that the service does not keep, and the rest is counted and limited.
#[test]
fn proxy_headers_are_counted() {
    const CLIENTS: usize = 500;
    fn world<H: Handler + 'static>(handler: fn(Header) -> H) -> (Sim, SocketAddr) {
        let mut sim = Sim::new(
            1,
            Config::new().with(|config| config.memory_limit = Some(LIMIT)),
            (),
        );
        let listen = Listen::tcp("127.0.0.1:0", Framing::Packet2).with(|listen| {
            listen.proxy_protocol = ProxyProtocol::Required;
            listen.trusted_proxies = Some(AccessRules::allow_all());
        });
        let accept = move |_: &mut (), peer: Peer| {
            let header = peer.proxy.as_ref().expect("a header");
            let facts = header
                .tlvs
                .iter()
                .filter(|(_, value)| value.len() == 16_000);
            assert_eq!(facts.count(), usize::from(header.tlvs.get(0xE0).is_some()));
            handler(peer.proxy)
        };
        let addr = sim.listen(listen, accept).expect("listen");
        (sim, addr)
    }
    let come = |sim: &mut Sim, addr, header: &[u8]| {
        for _ in 0..CLIENTS {
            let client = sim.connect(addr).expect("it listens");
            sim.send(client, header);
            sim.settle();
        }
    };
    for kind in [4, 0xE0] {
        let (mut sim, addr) = world(|_| Forgetful);
        come(&mut sim, addr, &header(kind, 16_000));
        let memory = sim.stats().memory;
        assert_eq!(sim.stats().open, CLIENTS);
        assert!((CLIENTS * 50..CLIENTS * 500).contains(&memory), "{memory}");
        let client = sim.connect(addr).expect("it listens");
        sim.send(client, &[&header(kind, 16_000)[..], b"\0\x02hi"].concat());
        sim.settle();
        assert_eq!(sim.received(client), b"\0\x09forgotten");
    }

    let (mut sim, addr) = world(Keeper);
    come(&mut sim, addr, &header(4, 16_000));
    let memory = sim.stats().memory;
    assert!((CLIENTS * 50..CLIENTS * 500).contains(&memory), "{memory}");

    let (mut sim, addr) = world(Keeper);
    come(&mut sim, addr, &header(0xE0, 16_000));
    let stats = sim.stats();
    let open = LIMIT / 16_000;
    assert!((open / 2..=open).contains(&stats.open), "{stats:?}");
    assert!(
        (stats.open * 16_000..=LIMIT).contains(&stats.memory),
        "{stats:?}"
    );
    assert_eq!(
        stats.closed(CloseReason::OverMemory),
        (CLIENTS - stats.open) as u64
    );
    sim.control().drain(Duration::ZERO);
    sim.advance(Duration::from_secs(10));
    assert_eq!(sim.stats().memory, 0);
}

/// A connection that is closed for the limit counts nothing from there on, its header included:
/// nothing else has to be closed for it. The simulator compares the account with the buffers after
/// each iteration.
#[test]
fn a_closed_connection_counts_nothing_while_its_turn_waits() {
    // One read in each iteration, so that the limit is passed at the end of a turn.
    let config = Config::new().with(|config| config.memory_limit = Some(LIMIT));
    let mut sim = Sim::new(1, config.with(|config| config.budgets.read_bytes = 1), ());
    let listen = Listen::tcp("127.0.0.1:0", Framing::Packet4).with(|listen| {
        listen.proxy_protocol = ProxyProtocol::Required;
        listen.trusted_proxies = Some(AccessRules::allow_all());
        listen.conn.high_watermark = 2 * LIMIT;
        listen.conn.output_limit = 2 * LIMIT;
    });
    let addr = sim.listen(listen, |_: &mut (), _| Echo).expect("listen");
    let client = sim.connect(addr).expect("it listens");
    sim.set_reading(client, false);
    sim.set_send_buffer(client, 1);
    sim.send(client, &header(0xE0, 1000));
    let payload = LIMIT / 5 * 3;
    for _ in 0..2 {
        sim.send(client, &(payload as u32).to_be_bytes());
        sim.send(client, &vec![b'y'; payload]);
        sim.settle();
    }
    let stats = sim.stats();
    assert_eq!(stats.closed(CloseReason::OverMemory), 1, "{stats:?}");
    assert_eq!(stats.memory, 0);
}

/// A client that has sent 150,000 bytes of a frame, and the whole frame.
fn half_a_large_frame(sim: &mut Sim, addr: SocketAddr) -> (ClientId, Vec<u8>) {
    let large = sim.connect(addr).expect("it listens");
    let payload = 300_000_usize;
    let frame = [&(payload as u32).to_be_bytes()[..], &vec![b'y'; payload]].concat();
    sim.send(large, &frame[..150_000]);
    sim.settle();
    (large, frame)
}

/// Twenty clients with as much of a frame as makes memory tight.
#[track_caller]
fn hogs(sim: &mut Sim, addr: SocketAddr) -> Vec<ClientId> {
    let hogs: Vec<_> = (0..20)
        .map(|_| sim.connect(addr).expect("it listens"))
        .collect();
    for hog in &hogs {
        begin(sim, *hog, 32_000);
    }
    sim.settle();
    assert!(buffered(sim) > LIMIT / 4 * 3, "tight");
    hogs
}

/// One that holds more than its share is not read from, until there is room again; nothing of it is lost.
#[test]
fn a_large_frame_waits_while_memory_is_tight() {
    let (mut sim, addr) = world();
    let (large, frame) = half_a_large_frame(&mut sim, addr);
    let hogs = hogs(&mut sim, addr);
    // One of them is read all the same: this one, and it uses up the reserve.
    sim.send(hogs[0], &[b'x'; 150_000]);
    sim.settle();
    sim.send(large, &frame[150_000..]);
    sim.settle();
    assert!(sim.received(large).is_empty(), "not yet");
    assert!(sim.stats().paused_for_memory >= 1);
    sim.advance(Duration::from_millis(999));
    assert!(sim.received(large).is_empty(), "not yet");
    sim.advance(Duration::from_millis(10));
    assert!(sim.received(large) == frame);
    assert_eq!(sim.state(hogs[0]), ClientState::Reset, "it has stalled");
    assert_eq!(sim.stats().closed_total(), 1);
}

/// A connection that has read all that its peer has sent passes on the read grant at once.
#[test]
fn a_read_grant_ends_when_its_socket_is_dry() {
    let (mut sim, addr) = world();
    let (large, frame) = half_a_large_frame(&mut sim, addr);
    let hogs = hogs(&mut sim, addr);
    let before = sim.now();
    sim.send(hogs[0], &[b'x'; 32_000]);
    sim.send(large, &frame[150_000..]);
    sim.settle();
    assert!(sim.received(large) == frame);
    assert_eq!(sim.now(), before);
    assert_eq!(sim.stats().closed_total(), 0);
}

/// Output counts too. Output to peers that do not read is the handler's doing. Reading less does
/// not help, so the connections with the largest buffers are closed.
#[test]
fn the_largest_buffers_go_first() {
    let (mut sim, addr) = world();
    let mut clients = Vec::new();
    for _ in 0..40 {
        let client = sim.connect(addr).expect("it listens");
        sim.set_reading(client, false);
        sim.set_send_buffer(client, 0);
        clients.push(client);
    }
    sim.settle();
    let ids: Vec<_> = sim
        .control()
        .connections()
        .iter()
        .map(|info| info.id)
        .collect();
    for (place, id) in ids.iter().enumerate() {
        let size = if place < 4 { 100_000 } else { 20_000 };
        if let Some(mut conn) = sim.control().conn(*id) {
            conn.send(vec![b'z'; size]).expect("there is room");
        }
    }
    sim.settle();
    assert!(buffered(&mut sim) <= LIMIT);
    let closed = sim.stats().closed(CloseReason::OverMemory);
    assert!((1..=4).contains(&closed), "{closed}");
    for client in &clients[4..] {
        assert_eq!(
            sim.state(*client),
            ClientState::Connected,
            "the small ones stay"
        );
    }
    sim.step();
    assert_eq!(sim.stats().open as u64, 40 - closed);
}

/// Spare buffers go from hand to hand: one byte in each must not keep a large one.
#[test]
fn one_byte_does_not_keep_a_large_buffer() {
    let (mut sim, addr) = world();
    let mut clients: Vec<_> = (0..400)
        .map(|_| sim.connect(addr).expect("it listens"))
        .collect();
    for _ in 0..3 {
        for client in &clients {
            let frame = [&60_000_u32.to_be_bytes()[..], &[b'x'; 60_000], &[0]].concat();
            sim.send(*client, &frame);
            sim.settle();
            assert_eq!(sim.received(*client).len(), 60_004);
        }
        // Each holds one byte now: the beginning of an empty frame.
        for client in &clients {
            sim.send(*client, &[0, 0, 0]);
        }
        sim.settle();
        for client in &clients {
            assert_eq!(sim.received(*client), [0; 4]);
        }
    }
    assert_eq!(sim.stats().closed_total(), 0, "none was over the limit");
    for client in clients.drain(..) {
        sim.finish(client);
    }
    sim.settle();
    assert_eq!(sim.stats().open, 0);
}

/// Number of frames of 256 KiB that are echoed within two seconds to a client that sends them in four
/// parts, beside so many peers that begin large frames, stall, and come again when they are closed.
/// Those that trickle send a byte every tenth of a second.
fn echoed_beside(stalling: usize, trickle: bool, frame_timeout: Duration) -> usize {
    const FRAME: usize = 256 * 1024;
    const STEP: Duration = Duration::from_millis(10);
    let config = Config::max_connections(2000).with(|config| config.memory_limit = Some(8 * LIMIT));
    let mut sim = Sim::new(1, config, ());
    let listen = Listen::tcp("127.0.0.1:0", Framing::Packet4).with(|listen| {
        listen.socket.backlog = 2000;
        listen.conn.frame_timeout = frame_timeout;
    });
    let addr = sim.listen(listen, |_: &mut (), _| Echo).expect("listen");
    let stall = |sim: &mut Sim| {
        let peer = sim.connect(addr).expect("it listens");
        begin(sim, peer, 25_000);
        peer
    };
    let mut peers: Vec<_> = (0..stalling).map(|_| stall(&mut sim)).collect();

    sim.advance(STEP);
    let honest = sim.connect(addr).expect("it listens");
    let frame = [&(FRAME as u32).to_be_bytes()[..], &vec![b'h'; FRAME]].concat();
    let mut parts = frame.chunks(FRAME.div_ceil(4) + 1).cycle();
    let (mut sent, mut received, mut echoed) = (0, 0, 0);
    for step in 0..200 {
        if sent < frame.len() {
            let part = parts.next().expect("it has parts");
            sent += part.len();
            sim.send(honest, part);
        }
        for peer in peers.iter_mut().filter(|_| step % 10 == 0) {
            if sim.state(*peer) != ClientState::Connected {
                *peer = stall(&mut sim);
            } else if trickle {
                sim.send(*peer, &[0]);
            }
        }
        sim.advance(STEP);
        received += sim.received(honest).len();
        if received == frame.len() {
            (sent, received, echoed) = (0, 0, echoed + 1);
        }
    }
    assert_eq!(sim.state(honest), ClientState::Connected);
    echoed
}

/// Memory goes to connections that make progress, also where a frame may take for ever.
#[test]
fn stalling_peers_leave_honest_large_frames_a_quarter_of_their_rate() {
    for frame_timeout in [Duration::from_secs(30), Duration::MAX] {
        let quiet = echoed_beside(0, false, frame_timeout);
        assert!(quiet >= 50, "{quiet}");
        for trickle in [false, true] {
            let beside = echoed_beside(400, trickle, frame_timeout);
            assert!(
                beside >= quiet / 4,
                "{beside} of {quiet}, trickle {trickle}, timeout {frame_timeout:?}"
            );
        }
    }
}

/// Forty honest peers, each with a frame of a good part of the limit: they are served one after the other.
#[test]
fn large_frames_are_finished_one_after_the_other() {
    let mut sim = Sim::new(
        1,
        Config::new().with(|config| config.memory_limit = Some(8 * LIMIT)),
        (),
    );
    let listen = Listen::tcp("127.0.0.1:0", Framing::Packet4).with(|listen| {
        listen.conn.output_limit = 4 * LIMIT;
        listen.conn.frame_timeout = Duration::from_secs(60);
    });
    let addr = sim.listen(listen, |_: &mut (), _| Echo).expect("listen");
    let payload = 700_000_usize;
    let frame = [&(payload as u32).to_be_bytes()[..], &vec![b'y'; payload]].concat();
    let clients: Vec<_> = (0..40)
        .map(|_| sim.connect(addr).expect("it listens"))
        .collect();
    for client in &clients {
        sim.send(*client, &frame[..300_000]);
    }
    sim.settle();
    assert!(
        sim.stats().paused_for_memory > 20,
        "{}",
        sim.stats().paused_for_memory
    );
    for client in &clients {
        sim.send(*client, &frame[300_000..]);
    }
    sim.advance(Duration::from_secs(50));
    for client in clients {
        assert!(sim.received(client) == frame, "served: {:?}", sim.stats());
    }
    assert_eq!(sim.stats().paused_for_memory, 0);
}

/// A connection that has the read grant and sends nothing has it for a second only. A connection
/// that could not be read does not time out.
#[test]
fn a_grant_that_is_not_used_is_lost() {
    let mut sim = Sim::new(
        1,
        Config::new().with(|config| config.memory_limit = Some(8 * LIMIT)),
        (),
    );
    let listen = Listen::tcp("127.0.0.1:0", Framing::Packet4);
    let addr = sim.listen(listen, |_: &mut (), _| Echo).expect("listen");
    let clients: Vec<_> = (0..40)
        .map(|_| sim.connect(addr).expect("it listens"))
        .collect();
    for client in &clients {
        begin(&mut sim, *client, 300_000);
    }
    sim.settle();
    // All but one wait, and it says nothing: the next ones have more to say.
    for client in &clients {
        sim.send(*client, b"more");
    }
    sim.advance(Duration::from_secs(29));
    let iterations = sim.stats().iterations;
    assert!(iterations < 5000, "it does not spin: {iterations}");
    assert!(sim.stats().memory > 8 * LIMIT / 8 * 5, "what fits is held");
    assert_eq!(sim.stats().closed(CloseReason::FrameTimeout), 0);
    sim.advance(Duration::from_secs(40));
    let (over, late) = (
        sim.stats().closed(CloseReason::OverMemory),
        sim.stats().closed(CloseReason::FrameTimeout),
    );
    assert!(over > 0, "{over} and {late}");
    assert_eq!(over + late, 40);
}

#[test]
fn the_limit_is_live() {
    let (mut sim, addr) = world();
    let client = sim.connect(addr).expect("it listens");
    begin(&mut sim, client, 600_000);
    sim.settle();
    assert_eq!(sim.state(client), ClientState::Connected);
    sim.control()
        .reconfigure(|config| config.memory_limit = Some(300_000))
        .expect("a good limit");
    sim.settle();
    assert_eq!(sim.state(client), ClientState::Reset);
    assert_eq!(sim.stats().closed(CloseReason::OverMemory), 1);
}

#[test]
fn the_limit_can_be_taken_away() {
    let (mut sim, addr) = world();
    sim.control()
        .reconfigure(|config| config.memory_limit = None)
        .expect("no limit");
    assert_eq!(sim.control().metrics().memory_limit, None);
    for _ in 0..6 {
        let client = sim.connect(addr).expect("it listens");
        begin(&mut sim, client, 600_000);
    }
    sim.settle();
    assert_eq!(sim.stats().open, 6);
}

/// As many go as it takes, and no more.
#[test]
fn a_lower_limit_ends_several() {
    let (mut sim, addr) = world();
    for _ in 0..6 {
        let client = sim.connect(addr).expect("it listens");
        begin(&mut sim, client, 100_000);
    }
    sim.settle();
    assert_eq!(sim.stats().open, 6);
    sim.control()
        .reconfigure(|config| config.memory_limit = Some(256 * 1024))
        .expect("a good limit");
    sim.settle();
    let left = sim.stats().open;
    assert!((1..=2).contains(&left), "{left}");
    assert_eq!(sim.stats().closed(CloseReason::OverMemory), 6 - left as u64);
}

/// A higher limit resumes paused connections without another event.
#[test]
fn a_higher_limit_makes_room_at_once() {
    let (mut sim, addr) = world();
    let (large, frame) = half_a_large_frame(&mut sim, addr);
    let mut granted = large;
    for _ in 0..20 {
        let hog = sim.connect(addr).expect("it listens");
        begin(&mut sim, hog, 32_000);
        granted = hog;
    }
    sim.settle();
    sim.send(granted, &[b'x'; 150_000]);
    sim.settle();
    sim.send(large, &frame[150_000..]);
    sim.settle();
    assert_eq!(sim.received(large), b"", "not yet");
    sim.control()
        .reconfigure(|config| config.memory_limit = Some(4 * LIMIT))
        .expect("a good limit");
    sim.settle();
    assert!(sim.received(large) == frame);
}

#[test]
fn a_limit_below_a_few_reads_is_refused() {
    let server: Result<Server, Error> =
        Server::new(Config::new().with(|config| config.memory_limit = Some(1000)));
    match server {
        Err(Error::Option { option, problem }) => {
            assert!(
                option == "memory_limit" && problem.contains("at least"),
                "{problem}"
            );
        }
        other => panic!("{other:?}"),
    }
}

/// Many small buffers are much together: the limit holds below a kilobyte each too.
#[test]
fn a_crowd_of_small_holders_is_bounded_too() {
    const SMALL_LIMIT: usize = 256 * 1024;
    let config =
        Config::max_connections(1000).with(|config| config.memory_limit = Some(SMALL_LIMIT));
    let mut sim = Sim::new(1, config, ());
    let listen =
        Listen::tcp("127.0.0.1:0", Framing::Packet4).with(|listen| listen.socket.backlog = 1000);
    let addr = sim.listen(listen, |_: &mut (), _| Echo).expect("listen");
    for _ in 0..1000 {
        let client = sim.connect(addr).expect("it listens");
        begin(&mut sim, client, 800);
    }
    sim.advance(Duration::from_secs(1));
    let stats = sim.stats();
    assert!(
        (SMALL_LIMIT / 2..=SMALL_LIMIT).contains(&stats.memory),
        "{}",
        stats.memory
    );
    assert_eq!(stats.closed(CloseReason::OverMemory), stats.closed_total());
}

/// Whose output has gone holds nothing any more: it is read from again, however tight memory is for others.
#[test]
fn a_connection_within_its_share_is_read_again() {
    let (mut sim, addr) = world();
    let slow = sim.connect(addr).expect("it listens");
    sim.set_reading(slow, false);
    sim.set_send_buffer(slow, 0);
    sim.settle();
    let id = sim.control().connections()[0].id;
    let sent = sim
        .control()
        .conn(id)
        .expect("it is there")
        .send(vec![b'x'; 60_000]);
    sent.expect("there is room");
    let mut granted = slow;
    for _ in 0..20 {
        let hog = sim.connect(addr).expect("it listens");
        begin(&mut sim, hog, 42_000);
        granted = hog;
    }
    sim.settle();
    // Another one is read beyond its share, and uses up the reserve.
    sim.send(granted, &[b'x'; 100_000]);
    sim.settle();
    sim.send(slow, b"\0\0\0\x02hi");
    sim.settle();
    let paused_for_memory = |sim: &mut Sim| sim.control().connections()[0].paused_for_memory;
    assert!(
        paused_for_memory(&mut sim),
        "memory is tight and it holds more than its share"
    );
    for _ in 0..100 {
        // Several times: nothing is left of it.
        sim.set_send_buffer(slow, 1_000_000);
        sim.set_reading(slow, true);
        sim.settle();
        assert!(sim.received(slow).ends_with(b"\0\0\0\x02hi"));
        assert!(!paused_for_memory(&mut sim));
        sim.set_reading(slow, false);
        sim.set_send_buffer(slow, 0);
        let sent = sim
            .control()
            .conn(id)
            .expect("it is there")
            .send(vec![b'x'; 60_000]);
        sent.expect("there is room");
        sim.send(slow, b"\0\0\0\x02hi");
        sim.settle();
        assert!(paused_for_memory(&mut sim));
    }
    assert!(buffered(&mut sim) > LIMIT / 4 * 3, "tight all the time");
}

/// Says goodbye at the first frame, and counts what comes behind it.
struct Hears;

impl Handler<Vec<usize>> for Hears {
    fn on_frame(&mut self, cx: &mut Context<'_, Vec<usize>>, frame: &[u8]) -> Outcome {
        cx.app.push(frame.len());
        cx.conn.finish();
        Ok(())
    }
}

/// A peer that has finished and still reads waits for memory like any other: a pause is no sign
/// that its peer has gone.
#[test]
fn a_finished_end_waits_too() {
    let config = Config::max_connections(5000).with(|config| config.memory_limit = Some(LIMIT));
    let mut sim = Sim::new(1, config, Vec::new());
    let listen =
        Listen::tcp("127.0.0.1:0", Framing::Packet4).with(|listen| listen.socket.backlog = 5000);
    let addr = sim
        .listen(listen, |_: &mut Vec<usize>, _| Hears)
        .expect("listen");
    let large = sim.connect(addr).expect("it listens");
    let frame = [&300_000_u32.to_be_bytes()[..], &vec![b'y'; 300_000]].concat();
    sim.send(large, b"\0\0\0\x03bye");
    sim.settle();
    sim.send(large, &frame[..150_000]);
    sim.settle();
    let hogs: Vec<_> = (0..20)
        .map(|_| sim.connect(addr).expect("it listens"))
        .collect();
    for hog in &hogs {
        sim.send(
            *hog,
            &[&0x0080_0000_u32.to_be_bytes()[..], &[b'x'; 32_000]].concat(),
        );
    }
    sim.settle();
    sim.send(hogs[0], &[b'x'; 150_000]);
    sim.settle();
    sim.send(large, &frame[150_000..]);
    sim.settle();
    assert!(sim.stats().paused_for_memory >= 1, "it waits");
    sim.advance(Duration::from_secs(5));
    assert_eq!(sim.app(), &[3, 300_000], "{:?}", sim.stats());
}

/// Takes what the test sends to it.
struct Taker;

impl Handler<Vec<(ConnId, CloseReason)>> for Taker {
    fn on_frame(&mut self, _: &mut Context<'_, Vec<(ConnId, CloseReason)>>, _: &[u8]) -> Outcome {
        Ok(())
    }

    fn on_close(&mut self, cx: &mut Context<'_, Vec<(ConnId, CloseReason)>>, closed: &Closed) {
        let id = cx.conn.id();
        cx.app.push((id, closed.reason));
    }
}

/// Above the limit, many that have stalled for long go before one that is hundreds of times larger
/// and has just begun.
#[test]
fn a_long_stall_outweighs_a_much_larger_buffer() {
    const MIB: usize = 1024 * 1024;
    let config = Config::new().with(|config| config.memory_limit = Some(32 * MIB));
    let mut sim = Sim::new(1, config, Vec::new());
    let listen = Listen::tcp("127.0.0.1:0", Framing::Packet4).with(|listen| {
        listen.conn.max_frame = Some(16 * MIB);
        listen.conn.output_limit = 64 * MIB;
        listen.conn.frame_timeout = Duration::from_secs(1000);
    });
    let addr = sim
        .listen(listen, |_: &mut Vec<_>, _| Taker)
        .expect("listen");
    let reader = sim.connect(addr).expect("it listens");
    sim.set_reading(reader, false);
    sim.set_send_buffer(reader, 1);
    sim.settle();
    for _ in 0..240 {
        let client = sim.connect(addr).expect("it listens");
        sim.send(client, &[&[0, 0x80, 0, 0][..], &[b'x'; 30 * 1024]].concat());
        sim.settle();
    }
    sim.advance(Duration::from_secs(20));
    let honest = sim.connect(addr).expect("it listens");
    sim.send(honest, &[0, 0xf0, 0, 0]);
    for _ in 0..12 {
        sim.send(honest, &[b'x'; MIB]);
        sim.settle();
    }
    let ids: Vec<_> = sim
        .control()
        .connections()
        .iter()
        .map(|conn| conn.id)
        .collect();
    while sim.app().is_empty() {
        let mut control = sim.control();
        let mut conn = control.conn(ids[0]).expect("open");
        conn.send(vec![b'x'; 100 * 1024]).expect("room");
        sim.settle();
    }
    let (first, last) = (ids[0], ids[241]);
    for &(id, reason) in sim.app() {
        assert_eq!(reason, CloseReason::OverMemory);
        assert!(id != first && id != last, "{id}");
    }
}
