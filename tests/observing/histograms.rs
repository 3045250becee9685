//! Ages, handshake times and frame sizes are counted where they occur, each once.

use std::net::SocketAddr;
use std::time::Duration;

use kit::net::packet4;
use portcullis::sim::Sim;
use portcullis::{
    AccessRules, AtCapacity, Config, Context, Framing, Handler, Histogram, Histograms, Listen,
    Outcome, ProxyProtocol,
};

/// Answers with as many bytes as a frame's first byte says.
struct Sized;

impl Handler for Sized {
    fn on_frame(&mut self, cx: &mut Context<'_>, frame: &[u8]) -> Outcome {
        let length = frame.first().map_or(0, |&length| usize::from(length));
        cx.conn.send(vec![0; length])?;
        Ok(())
    }
}

fn world(config: Config, listen: Listen) -> (Sim, SocketAddr) {
    let mut sim = Sim::new(5, config, ());
    let addr = sim.listen(listen, |_: &mut (), _| Sized).expect("listen");
    (sim, addr)
}

fn listen() -> Listen {
    Listen::tcp("127.0.0.1:0", Framing::Packet4)
}

/// The buckets that hold something.
fn filled(histogram: &Histogram) -> Vec<(u64, u64)> {
    let bounded = histogram
        .buckets()
        .map(|(bound, count)| (bound.expect("not that large"), count));
    bounded.take(60).filter(|&(_, count)| count > 0).collect()
}

fn look(sim: &mut Sim) -> Histograms {
    sim.control().metrics().histograms
}

#[test]
fn frames_are_counted_by_the_size_of_their_payload() {
    let (mut sim, addr) = world(Config::new(), listen());
    let client = sim.connect(addr).expect("a listener");
    for (size, answer) in [
        (1, 0),
        (2, 2),
        (3, 3),
        (64, 64),
        (65, 65),
        (5000, 200),
        (0, 0),
    ] {
        sim.send(client, &packet4(&vec![answer; size]));
    }
    // Not whole yet, then too long: no frame is none.
    sim.send(client, &packet4(&[9; 100])[..50]);
    sim.settle();
    let seen = look(&mut sim);
    let sizes = [(2, 3), (4, 1), (64, 1), (128, 1), (8192, 1)];
    assert_eq!(filled(&seen.frame_size_in), sizes);
    assert_eq!(
        (seen.frame_size_in.count(), seen.frame_size_in.sum()),
        (7, 5135)
    );
    let answers = [(2, 3), (4, 1), (64, 1), (128, 1), (256, 1)];
    assert_eq!(filled(&seen.frame_size_out), answers);
    assert_eq!(
        (seen.frame_size_out.count(), seen.frame_size_out.sum()),
        (7, 334)
    );
    assert_eq!(seen.frame_size_in.quantile(0.5), 4);
    let stats = sim.stats();
    assert_eq!((stats.traffic.frames_in, stats.traffic.frames_out), (7, 7));
}

#[test]
fn ages_are_those_of_all_that_had_a_slot() {
    let config = Config::max_connections(2);
    let (mut sim, addr) = world(
        config,
        listen().with(|listen| {
            listen.at_capacity = AtCapacity::Refuse {
                farewell: Vec::new(),
            }
        }),
    );
    let clients = [sim.connect(addr), sim.connect(addr)].map(|client| client.expect("a listener"));
    sim.settle();
    let refused = sim.connect(addr);
    sim.settle();
    assert!(refused.is_some());
    sim.advance(Duration::from_secs(1));
    sim.reset(clients[0]);
    sim.advance(Duration::from_secs(59));
    sim.finish(clients[1]);
    sim.settle();
    let ages = look(&mut sim).connection_age;
    // In microseconds: up to 2^20 and up to 2^26.
    assert_eq!(filled(&ages), [(1 << 20, 1), (1 << 26, 1)]);
    assert_eq!(ages.sum(), 61_000_000);
    assert_eq!((sim.stats().accepted, sim.stats().closed_total()), (3, 3));
}

/// With a PROXY header, from accept to open. A plain connection is open at once and has no such
/// time; neither has one that never opens.
#[test]
fn handshakes_are_timed_where_there_are_any() {
    let behind = listen().with(|listen| {
        listen.proxy_protocol = ProxyProtocol::Required;
        listen.trusted_proxies = Some(AccessRules::allow_all());
    });
    let (mut sim, addr) = world(Config::new(), behind);
    let plain = sim.listen(listen(), |_: &mut (), _| Sized).expect("listen");
    let clients = [sim.connect(addr), sim.connect(addr)].map(|client| client.expect("a listener"));
    sim.connect(plain).expect("a listener");
    sim.advance(Duration::from_secs(3));
    assert_eq!(look(&mut sim).handshake_time.count(), 0);
    sim.send(clients[0], b"PROXY UNKNOWN\r\n");
    sim.advance(Duration::from_secs(60));
    let times = look(&mut sim).handshake_time;
    assert_eq!((times.count(), times.sum()), (1, 3_000_000));
    assert_eq!(sim.stats().opened, 2);
}

/// From the return of a poll to the end of the iteration: neither the poll nor the time between two
/// iterations counts.
#[test]
fn iterations_are_timed_without_their_polls() {
    let (mut sim, addr) = world(Config::new(), listen());
    let client = sim.connect(addr).expect("a listener");
    sim.advance(Duration::from_secs(100));
    sim.leap(Duration::from_secs(100));
    sim.leap_after_poll(Duration::from_secs(100));
    sim.settle();
    let work = sim.work();
    let posted = sim.handle().post(move |_, _| work(Duration::from_secs(1)));
    assert!(posted.is_ok());
    sim.send(client, &packet4(&[0]));
    sim.settle();
    let times = look(&mut sim).iteration_time;
    assert_eq!(
        (times.count(), times.sum()),
        (sim.stats().iterations, 1_000_000)
    );
    assert_eq!(times.quantile(1.0), 1 << 20);
}

#[cfg(feature = "tls")]
#[test]
fn a_tls_handshake_is_timed() {
    use std::sync::Arc;

    use kit::net::{local, ping, spawn_echo, PATIENCE};
    use kit::tls::{secure, Site, VERSIONS};

    let site = Site::new();
    let server = spawn_echo(Config::new(), local().tls(Arc::new(site.server())));
    let mut client = secure(server.addr(), &site.client(VERSIONS[0]));
    ping(&mut client, b"hello");
    let seen = server.ask(|(), control| control.metrics().histograms);
    assert_eq!(seen.handshake_time.count(), 1);
    assert!(
        seen.handshake_time.sum() > 0 && seen.handshake_time.sum() < PATIENCE.as_micros() as u64
    );
    assert_eq!(
        (seen.frame_size_in.sum(), seen.frame_size_out.sum()),
        (5, 5)
    );
    drop(client);
    server.finish();
}
