//! The last closes are kept, so many and no more, with what there was to say about each.

use std::fmt;
use std::net::SocketAddr;
use std::time::Duration;

use portcullis::sim::{ClientId, Sim};
use portcullis::{
    AccessRules, AtCapacity, Close, CloseReason, Config, Context, Framing, Handler, Listen,
    Outcome, ProxyProtocol,
};

struct Echo;

impl Handler for Echo {
    fn on_frame(&mut self, cx: &mut Context<'_>, frame: &[u8]) -> Outcome {
        match frame {
            b"fail" => return Err(Close::because("no such user")),
            b"long" => return Err(Close::because("x".repeat(100_000))),
            b"rude" => return Err(Close::from(Rude)),
            other => cx.conn.send(other)?,
        }
        Ok(())
    }
}

/// An error that panics when it is asked what it is.
#[derive(Debug)]
struct Rude;

impl fmt::Display for Rude {
    fn fmt(&self, _: &mut fmt::Formatter<'_>) -> fmt::Result {
        kit::planned::blow()
    }
}

impl std::error::Error for Rude {}

fn listen() -> Listen {
    Listen::tcp("127.0.0.1:0", Framing::Packet1)
}

fn world(config: Config, listen: Listen) -> (Sim, SocketAddr) {
    let mut sim = Sim::new(11, config, ());
    let addr = sim.listen(listen, |_: &mut (), _| Echo).expect("listen");
    (sim, addr)
}

fn connect(sim: &mut Sim, addr: SocketAddr) -> ClientId {
    let client = sim.connect(addr).expect("a listener");
    sim.settle();
    client
}

#[test]
fn each_close_is_kept_with_its_particulars() {
    let (mut sim, addr) = world(Config::new(), listen());
    let client = connect(&mut sim, addr);
    let peer = sim.client_addr(client).expect("known");
    let id = sim.control().connections()[0].id;
    let listener = sim.control().listeners()[0].id;
    sim.send(client, b"\x05hello");
    sim.advance(Duration::from_secs(10));
    sim.send(client, b"\x04fail");
    sim.finish(client);
    sim.settle();
    sim.advance(Duration::from_secs(3));
    let closes = sim.control().recent_closes();
    let [close] = &closes[..] else {
        panic!("one, not {closes:?}");
    };
    assert_eq!((close.id, close.listener), (Some(id), Some(listener)));
    assert!(close.peer == peer && close.source == peer);
    assert_eq!(
        (close.reason, close.error.as_deref()),
        (CloseReason::Failed, Some("no such user"))
    );
    assert_eq!(
        (close.age, close.ago),
        (Duration::from_secs(10), Duration::from_secs(3))
    );
    let traffic = close.traffic;
    assert_eq!((traffic.bytes_in, traffic.frames_in), (11, 2));
    assert_eq!((traffic.bytes_out, traffic.frames_out), (6, 1));
    assert_eq!(
        close.to_string(),
        format!(
            "3.0s ago: 0.1 of L0 from {peer} after 10.0s, 11 bytes and 2 frames in, 6 bytes and 1 frames out: \
             handler failed: no such user"
        )
    );
}

/// The words of an error are bounded, and its panic is caught.
#[test]
fn an_error_may_say_anything() {
    let (mut sim, addr) = world(Config::new(), listen());
    for word in ["\x04long", "\x04rude"] {
        let client = connect(&mut sim, addr);
        sim.send(client, word.as_bytes());
        sim.finish(client);
        sim.settle();
    }
    let errors: Vec<_> = sim
        .control()
        .recent_closes()
        .into_iter()
        .map(|close| close.error)
        .collect();
    assert_eq!(errors[0].as_deref(), Some("as planned"));
    let cut = "x".repeat(253) + "...";
    assert_eq!(errors[1].as_deref(), Some(&*cut));
    assert_eq!(sim.stats().closed(CloseReason::Failed), 2);
}

/// Clients that never got a slot too, and behind a proxy the client itself.
#[test]
fn a_refused_client_is_listed_too() {
    let (mut sim, addr) = world(
        Config::max_connections(1),
        listen().with(|listen| {
            listen.at_capacity = AtCapacity::Refuse {
                farewell: Vec::new(),
            }
        }),
    );
    connect(&mut sim, addr);
    let refused = connect(&mut sim, addr);
    let close = &sim.control().recent_closes()[0];
    assert_eq!((close.id, close.reason), (None, CloseReason::AtCapacity));
    assert_eq!(close.peer.as_tcp(), sim.client_addr(refused));
    assert_eq!((close.age, close.traffic.bytes_in), (Duration::ZERO, 0));

    let behind = listen().with(|listen| {
        listen.proxy_protocol = ProxyProtocol::Required;
        listen.trusted_proxies = Some(AccessRules::allow_all());
    });
    let (mut sim, addr) = world(Config::new(), behind);
    let client = connect(&mut sim, addr);
    sim.send(client, b"PROXY TCP4 203.0.113.9 192.0.2.1 4711 25\r\n");
    sim.finish(client);
    sim.settle();
    let bad = connect(&mut sim, addr);
    sim.send(bad, b"GET / HTTP/1.1\r\n\r\n");
    sim.finish(bad);
    sim.settle();
    let closes = sim.control().recent_closes();
    assert_eq!(
        closes[1].source,
        "203.0.113.9:4711"
            .parse::<SocketAddr>()
            .expect("an address")
    );
    assert_eq!(closes[1].peer.as_tcp(), sim.client_addr(client));
    assert_eq!(closes[0].reason, CloseReason::BadProxyHeader);
    assert!(closes[0].error.is_some());
}

/// The latest first; live, down to none and up again.
#[test]
fn so_many_are_kept_and_no_more() {
    let (mut sim, addr) = world(
        Config::new().with(|config| config.recent_closes = 10),
        listen(),
    );
    let visit = |sim: &mut Sim, count: usize| {
        for _ in 0..count {
            let client = connect(sim, addr);
            sim.reset(client);
            sim.advance(Duration::from_secs(1));
        }
        let closes = sim.control().recent_closes();
        closes
            .iter()
            .map(|close| close.ago.as_secs())
            .collect::<Vec<_>>()
    };
    assert_eq!(visit(&mut sim, 3), [1, 2, 3]);
    assert_eq!(visit(&mut sim, 40), (1..=10).collect::<Vec<_>>());
    sim.control()
        .reconfigure(|config| config.recent_closes = 4)
        .expect("fewer");
    assert_eq!(visit(&mut sim, 0), [1, 2, 3, 4]);
    sim.control()
        .reconfigure(|config| config.recent_closes = 0)
        .expect("none");
    assert_eq!(visit(&mut sim, 5), Vec::<u64>::new());
    sim.control()
        .reconfigure(|config| config.recent_closes = 6)
        .expect("some");
    assert_eq!(visit(&mut sim, 2), [1, 2]);
    let refused = sim
        .control()
        .reconfigure(|config| config.recent_closes = 70_000);
    assert_eq!(
        refused.expect_err("too many").to_string(),
        "option recent_closes: 70000 is more than the 65536 that are kept at most"
    );
    // By default a few hundred.
    let (mut sim, addr) = world(Config::new(), listen());
    for _ in 0..300 {
        let client = connect(&mut sim, addr);
        sim.reset(client);
        sim.settle();
    }
    assert_eq!(sim.control().recent_closes().len(), 256);
    assert_eq!(sim.stats().closed_total(), 300);
}
