//! Rates are exact, in virtual time: what comes too fast waits or is refused, and nothing is lost.

use std::net::SocketAddr;
use std::time::Duration;

use portcullis::sim::{Call, ClientId, ClientState, Scripted, Sim};
use portcullis::{
    AccessRules, AtCapacity, CloseReason, Config, Context, Error, Framing, Handler, Listen,
    ListenerState, Outcome, ProxyProtocol, Rate, Server,
};

struct Echo;

impl Handler for Echo {
    fn on_frame(&mut self, cx: &mut Context<'_>, frame: &[u8]) -> Outcome {
        cx.conn.send(frame)?;
        Ok(())
    }
}

fn world(config: Config, listen: Listen) -> (Sim, SocketAddr) {
    let mut sim = Sim::new(1, config, ());
    let addr = sim.listen(listen, |_: &mut (), _| Echo).expect("listen");
    (sim, addr)
}

fn local() -> Listen {
    Listen::tcp("127.0.0.1:0", Framing::Packet2).name("it")
}

fn connect(sim: &mut Sim, addr: SocketAddr, count: usize) -> Vec<ClientId> {
    (0..count)
        .map(|_| sim.connect(addr).expect("it listens"))
        .collect()
}

fn millis(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

/// A capacity of five admits five (esockd: four), then one each tenth of a second; waiting clients
/// lose nothing.
#[test]
fn the_listeners_rate_lets_clients_wait() {
    let (mut sim, addr) = world(
        Config::new(),
        local().with(|listen| listen.accept_rate = Some(Rate::per_second(10).burst(5))),
    );
    let clients = connect(&mut sim, addr, 20);
    for client in &clients {
        sim.send(*client, b"\0\x02hi");
    }
    sim.settle();
    assert_eq!(sim.stats().accepted, 5);
    assert_eq!(
        sim.control().listener("it").expect("there").state,
        ListenerState::RateLimited
    );
    let iterations = sim.stats().iterations;
    sim.advance(millis(99));
    assert_eq!(sim.stats().accepted, 5);
    assert!(sim.stats().iterations - iterations <= 2, "it does not spin");
    sim.advance(millis(1));
    assert_eq!(sim.stats().accepted, 6);
    sim.advance(millis(1000));
    assert_eq!(sim.stats().accepted, 16);
    sim.advance(millis(1000));
    assert_eq!(sim.stats().accepted, 20);
    for client in clients {
        assert_eq!(sim.received(client), b"\0\x02hi");
    }
    assert_eq!(
        sim.control().listener("it").expect("there").state,
        ListenerState::Listening
    );
}

/// Saved up without clients, and never more than the burst. emqx #18355.
#[test]
fn a_quiet_time_is_worth_one_burst() {
    let (mut sim, addr) = world(
        Config::new(),
        local().with(|listen| listen.accept_rate = Some(Rate::per_second(1).burst(3))),
    );
    sim.advance(Duration::from_secs(3600));
    connect(&mut sim, addr, 9);
    sim.settle();
    assert_eq!(sim.stats().accepted, 3);
}

#[test]
fn over_the_rate_clients_can_be_refused_with_a_word() {
    let listen = local().with(|listen| {
        listen.accept_rate = Some(Rate::per_second(1).burst(2));
        listen.at_capacity = AtCapacity::Refuse {
            farewell: b"slowly".to_vec(),
        };
    });
    let (mut sim, addr) = world(Config::new(), listen);
    let clients = connect(&mut sim, addr, 5);
    sim.settle();
    assert_eq!((sim.stats().accepted, sim.stats().open), (5, 2));
    assert_eq!(sim.stats().closed(CloseReason::RateLimited), 3);
    assert_eq!(sim.received(clients[4]), b"slowly");
    sim.advance(millis(1000));
    let late = connect(&mut sim, addr, 1);
    sim.settle();
    assert_eq!(sim.state(late[0]), ClientState::Connected);
    assert_eq!(sim.stats().open, 3);
}

/// The server's rate is over all listeners; each listener's own holds besides.
#[test]
fn both_rates_hold() {
    let mut sim = Sim::new(
        1,
        Config::new().with(|config| config.accept_rate = Some(Rate::per_second(10).burst(4))),
        (),
    );
    let slow = sim
        .listen(
            local().with(|listen| listen.accept_rate = Some(Rate::per_second(1).burst(1))),
            |_: &mut (), _| Echo,
        )
        .expect("listen");
    let other = sim
        .listen(local().name("other"), |_: &mut (), _| Echo)
        .expect("listen");
    connect(&mut sim, slow, 3);
    sim.settle();
    connect(&mut sim, other, 9);
    sim.settle();
    let accepted =
        |sim: &mut Sim, name: &str| sim.control().listener(name).expect("there").accepted;
    assert_eq!((accepted(&mut sim, "it"), sim.stats().accepted), (1, 4));
    sim.advance(millis(1000));
    assert_eq!(
        (accepted(&mut sim, "it"), accepted(&mut sim, "other")),
        (2, 9)
    );
    sim.advance(millis(1000));
    assert_eq!(
        (accepted(&mut sim, "it"), accepted(&mut sim, "other")),
        (3, 9)
    );
}

/// A listener that was out of the poll because others had spent the server's tokens comes back by itself, whatever becomes of
/// those others.
#[test]
fn a_client_above_the_rate_is_served_later() {
    let mut sim = Sim::new(
        1,
        Config::new().with(|config| config.accept_rate = Some(Rate::per_second(1).burst(1))),
        (),
    );
    let busy = sim.listen(local(), |_: &mut (), _| Echo).expect("listen");
    let quiet = sim
        .listen(local().name("quiet"), |_: &mut (), _| Echo)
        .expect("listen");
    sim.settle();
    connect(&mut sim, busy, 1);
    sim.settle();
    sim.control().close_listener("it").expect("there");
    let client = connect(&mut sim, quiet, 1)[0];
    sim.send(client, b"\0\x02hi");
    sim.advance(millis(999));
    assert_eq!(sim.stats().accepted, 1);
    sim.advance(millis(1));
    assert_eq!(sim.received(client), b"\0\x02hi");
    let iterations = sim.stats().iterations;
    sim.advance(Duration::from_secs(60));
    assert!(sim.stats().iterations - iterations <= 4, "it does not spin");
}

/// emqx #14145, esockd PR #227: a backlog of clients that have given up costs no token and no time.
#[test]
fn no_token_is_spent_on_the_dead() {
    let (mut sim, addr) = world(
        Config::new(),
        local().with(|listen| listen.accept_rate = Some(Rate::per_second(1).burst(1))),
    );
    let clients = connect(&mut sim, addr, 50);
    sim.settle();
    assert_eq!(sim.stats().open, 1);
    for (place, client) in clients[1..48].iter().enumerate() {
        if place % 2 == 0 {
            sim.reset(*client);
        } else {
            sim.finish(*client);
        }
    }
    sim.advance(millis(1000));
    assert_eq!(sim.stats().closed(CloseReason::ClosedEarly), 47);
    assert_eq!(sim.stats().open, 2, "one token, for one who lives");
    assert_eq!(sim.state(clients[48]), ClientState::Connected);
    sim.advance(millis(1000));
    assert_eq!(sim.stats().open, 3);
}

/// A client that has sent its request and finished is alive.
#[test]
fn a_peer_that_has_sent_something_is_not_dead() {
    let (mut sim, addr) = world(
        Config::new(),
        local().with(|listen| listen.accept_rate = Some(Rate::per_second(1).burst(1))),
    );
    let client = sim.connect(addr).expect("it listens");
    sim.send(client, b"\0\x02hi");
    sim.finish(client);
    sim.settle();
    assert_eq!(sim.received(client), b"\0\x02hi");
    assert_eq!(sim.stats().closed(CloseReason::Finished), 1);
}

/// esockd: t_update_options_limiter, and its `set_max_conn_rate`.
#[test]
fn rates_are_live() {
    let (mut sim, addr) = world(
        Config::new(),
        local().with(|listen| listen.accept_rate = Some(Rate::per_second(1).burst(1))),
    );
    connect(&mut sim, addr, 30);
    sim.settle();
    assert_eq!(sim.stats().accepted, 1);
    sim.control()
        .reconfigure_listener("it", |listen| {
            listen.accept_rate = Some(Rate::per_second(1).burst(10))
        })
        .expect("a good rate");
    sim.settle();
    assert_eq!(sim.stats().accepted, 10, "what was spent is spent");
    sim.control()
        .reconfigure_listener("it", |listen| listen.accept_rate = None)
        .expect("none");
    sim.settle();
    assert_eq!(sim.stats().accepted, 30);
}

/// A drain does not wait for tokens.
#[test]
fn a_drain_does_not_wait_for_the_rate() {
    let (mut sim, addr) = world(
        Config::new(),
        local().with(|listen| listen.accept_rate = Some(Rate::per_second(1).burst(1))),
    );
    connect(&mut sim, addr, 5);
    sim.settle();
    sim.control().drain(Duration::from_secs(60));
    sim.advance(Duration::from_secs(5));
    let report = sim.drain_report().expect("it is over");
    // All were accepted, and none has sent its FIN within the linger timeout.
    assert_eq!((report.ended, report.failed, report.forced), (0, 5, 0));
}

fn header(source: &str) -> Vec<u8> {
    format!("PROXY TCP4 {source} 198.51.100.2 50000 443\r\n").into_bytes()
}

fn behind_a_proxy() -> Listen {
    local().with(|listen| {
        listen.proxy_protocol = ProxyProtocol::Required;
        listen.trusted_proxies = Some(AccessRules::allow_all());
    })
}

/// Two connections of a source at one time, three at once and then one each second.
fn limited_sources() -> Listen {
    behind_a_proxy().with(|listen| {
        listen.source_limits.connections = Some(2);
        listen.source_limits.rate = Some(Rate::per_second(1).burst(3));
        listen.conn.linger_timeout = Duration::ZERO;
        listen.conn.linger_bytes = 0;
    })
}

/// Only the rate limits a source from here on.
#[track_caller]
fn allow_many_of_a_source(sim: &mut Sim) {
    sim.control()
        .reconfigure_listener("it", |listen| {
            listen.source_limits.connections = Some(100);
        })
        .expect("good");
}

/// A client with this PROXY header, and whether it is served.
#[track_caller]
fn come(sim: &mut Sim, addr: SocketAddr, header: &[u8]) -> (ClientId, bool) {
    let client = sim.connect(addr).expect("it listens");
    sim.send(client, header);
    sim.settle();
    (client, sim.state(client) == ClientState::Connected)
}

/// Behind a proxy the header's source counts.
#[test]
fn each_source_has_a_limit() {
    let (mut sim, addr) = world(Config::new(), limited_sources());
    let come = |sim: &mut Sim, source: &str| come(sim, addr, &header(source));
    let (first, inside) = come(&mut sim, "192.0.2.1");
    assert!(inside);
    assert!(come(&mut sim, "192.0.2.1").1);
    assert!(!come(&mut sim, "192.0.2.1").1, "two at one time");
    assert!(come(&mut sim, "192.0.2.2").1, "another source");
    assert_eq!(sim.stats().closed(CloseReason::SourceLimited), 1);
    sim.finish(first);
    sim.settle();
    assert!(come(&mut sim, "192.0.2.1").1, "the third token");
    let open = sim.stats().open;
    allow_many_of_a_source(&mut sim);
    assert!(!come(&mut sim, "192.0.2.1").1, "too fast");
    sim.advance(millis(1000));
    assert!(come(&mut sim, "192.0.2.1").1);
    assert_eq!(sim.stats().open, open + 1);
}

/// A header without an internet address: LOCAL, UNSPEC and Unix of version 2, UNKNOWN of version 1.
fn headers_without_an_address() -> [(&'static str, Vec<u8>); 4] {
    let v2 = |command_and_family: &[u8], block: &[u8]| {
        let length = (block.len() as u16).to_be_bytes();
        [b"\r\n\r\n\0\r\nQUIT\n", command_and_family, &length, block].concat()
    };
    [
        ("UNKNOWN", b"PROXY UNKNOWN\r\n".to_vec()),
        ("LOCAL", v2(b"\x20\x11", &[9; 12])),
        ("UNSPEC", v2(b"\x21\x00", b"")),
        ("Unix", v2(b"\x21\x31", &[b'p'; 216])),
    ]
}

/// It is no way around the limits: the proxy's own address is counted, with its number and its rate.
#[test]
fn a_header_without_an_address_counts_as_the_proxys() {
    for (kind, header) in headers_without_an_address() {
        let (mut sim, addr) = world(Config::new(), limited_sources());
        let come = |sim: &mut Sim| come(sim, addr, &header);
        let (first, inside) = come(&mut sim);
        assert!(inside && come(&mut sim).1, "{kind}");
        assert!(!come(&mut sim).1, "{kind}: the third is one too many");
        sim.finish(first);
        sim.settle();
        assert!(come(&mut sim).1, "{kind}: its place is free again");
        allow_many_of_a_source(&mut sim);
        assert!(!come(&mut sim).1, "{kind}: too fast");
        assert_eq!(sim.stats().closed(CloseReason::SourceLimited), 2, "{kind}");
    }
}

/// Rules that change before the header comes hold for the proxy's own address too.
#[test]
fn a_header_without_an_address_is_judged_as_the_proxys() {
    for (kind, header) in headers_without_an_address() {
        let (mut sim, addr) = world(Config::new(), behind_a_proxy());
        let client = sim.connect(addr).expect("it listens");
        sim.settle();
        sim.control()
            .reconfigure_listener("it", |listen| listen.access_rules = AccessRules::deny_all())
            .expect("good");
        sim.send(client, &header);
        sim.settle();
        assert_eq!(sim.stats().closed(CloseReason::Denied), 1, "{kind}");
    }
}

/// Nothing is delivered faster than was said, over all connections of a listener, and each has its turn.
#[test]
fn connections_share_what_their_listener_may_read() {
    let listen =
        local().with(|listen| listen.total_frame_rate = Some(Rate::per_second(100).burst(10)));
    let (mut sim, addr) = world(Config::new(), listen);
    let clients = connect(&mut sim, addr, 10);
    for client in &clients {
        sim.send(*client, &b"\0\x01x".repeat(1000));
    }
    sim.advance(Duration::from_secs(10));
    let counts: Vec<_> = clients
        .iter()
        .map(|&client| sim.received(client).len() / 3)
        .collect();
    let all: usize = counts.iter().sum();
    assert!((990..=1010).contains(&all), "{counts:?}");
    assert!(
        counts.iter().all(|&count| (90..=115).contains(&count)),
        "{counts:?}"
    );
    sim.advance(Duration::from_secs(100));
    let rest: usize = clients
        .iter()
        .map(|&client| sim.received(client).len() / 3)
        .sum();
    assert_eq!(all + rest, 10_000, "nothing is lost");
}

/// *Live* where there was such a rate before: open connections are read faster, and then without a
/// limit.
#[test]
fn what_connections_share_changes_under_way() {
    let (mut sim, addr) = world(
        Config::new(),
        local().with(|listen| listen.total_frame_rate = Some(Rate::per_second(10).burst(10))),
    );
    let clients = connect(&mut sim, addr, 5);
    for client in &clients {
        sim.send(*client, &b"\0\x01x".repeat(10_000));
    }
    let frames = |sim: &mut Sim| -> usize {
        sim.advance(Duration::from_secs(10));
        clients
            .iter()
            .map(|&client| sim.received(client).len() / 3)
            .sum()
    };
    assert!((100..=120).contains(&frames(&mut sim)));
    let set = |sim: &mut Sim, rate: Option<Rate>| {
        let mut control = sim.control();
        let set = control.reconfigure_listener("it", |listen| listen.total_frame_rate = rate);
        set.expect("a good rate");
    };
    set(&mut sim, Some(Rate::per_second(500).burst(10)));
    let fast = frames(&mut sim);
    // What was booked at the rate of before is waited for.
    assert!((4000..=5100).contains(&fast), "{fast}");
    set(&mut sim, None);
    let rest = frames(&mut sim);
    assert!(rest > 44_000, "{rest}");
}

/// The kernel had no memory for a write, which is tried again soon.
#[test]
fn a_change_of_a_rate_delays_no_write_that_is_tried_again() {
    let rate = |listen: &mut Listen, bytes| listen.total_read_rate = Some(Rate::per_second(bytes));
    let (mut sim, addr) = world(
        Config::new(),
        local().with(|listen| rate(listen, 1_000_000)),
    );
    let client = sim.connect(addr).expect("it listens");
    sim.send(client, b"\0\x05first");
    sim.settle();
    assert_eq!(sim.received(client), b"\0\x05first");
    sim.add_fault(Scripted {
        call: Call::Write,
        after: 0,
        errno: libc::ENOBUFS,
    });
    sim.send(client, b"\0\x06second");
    sim.settle();
    assert_eq!(sim.received(client), b"");
    let changed = sim
        .control()
        .reconfigure_listener("it", |listen| rate(listen, 2_000_000));
    changed.expect("a good rate");
    sim.advance(millis(20));
    assert_eq!(sim.received(client), b"\0\x06second");
}

#[test]
fn a_connection_reads_no_faster_than_its_rate() {
    let (mut sim, addr) = world(
        Config::new(),
        local().with(|listen| listen.conn.read_rate = Some(Rate::per_second(1000).burst(500))),
    );
    let client = sim.connect(addr).expect("it listens");
    sim.send(client, &b"\0\x08abcdefgh".repeat(1000));
    sim.settle();
    assert_eq!(sim.stats().traffic.bytes_in, 500);
    for second in 1..=9 {
        let iterations = sim.stats().iterations;
        sim.advance(millis(1000));
        let read = sim.stats().traffic.bytes_in;
        assert!(
            (460 + second * 1000..=500 + second * 1000).contains(&read),
            "{read}"
        );
        assert!(
            sim.stats().iterations - iterations < 100,
            "it is not read in crumbs"
        );
    }
    sim.advance(millis(2000));
    assert_eq!(sim.received(client).len(), 10_000);
}

#[test]
fn a_rate_that_cannot_work_is_named() {
    let none = Rate::per_second(0);
    let no_burst = Rate::per_second(1).burst(0);
    type Change = fn(Listen, Rate) -> Listen;
    let options: [(&str, Change); 6] = [
        ("accept_rate", |listen, rate| {
            listen.with(|listen| listen.accept_rate = Some(rate))
        }),
        ("source_limits.rate", |listen, rate| {
            listen.with(|listen| listen.source_limits.rate = Some(rate))
        }),
        ("read_rate", |listen, rate| {
            listen.with(|listen| listen.conn.read_rate = Some(rate))
        }),
        ("frame_rate", |listen, rate| {
            listen.with(|listen| listen.conn.frame_rate = Some(rate))
        }),
        ("total_read_rate", |listen, rate| {
            listen.with(|listen| listen.total_read_rate = Some(rate))
        }),
        ("total_frame_rate", |listen, rate| {
            listen.with(|listen| listen.total_frame_rate = Some(rate))
        }),
    ];
    let mut server: Server = Server::new(Config::new()).expect("server");
    for (name, set) in options {
        for rate in [none, no_burst] {
            match server.listen(set(local(), rate), |_: &mut (), _| Echo) {
                Err(Error::Option { option, problem }) => {
                    assert!(
                        option == name && problem.contains("at least 1"),
                        "{option}: {problem}"
                    );
                }
                other => panic!("{name}: {other:?}"),
            }
        }
    }
    let bad: Result<Server, Error> =
        Server::new(Config::new().with(|config| config.accept_rate = Some(none)));
    assert!(matches!(
        bad,
        Err(Error::Option {
            option: "accept_rate",
            ..
        })
    ));
    for (option, listen) in [
        (
            "source_limits.connections",
            local().with(|listen| listen.source_limits.connections = Some(0)),
        ),
        (
            "source_limits.prefixes",
            local().with(|listen| listen.source_limits.prefixes = (33, 64)),
        ),
        (
            "source_limits.prefixes",
            local().with(|listen| listen.source_limits.prefixes = (32, 0)),
        ),
    ] {
        let refused = server.listen(listen, |_: &mut (), _| Echo);
        assert!(
            matches!(&refused, Err(Error::Option { option: named, .. }) if *named == option),
            "{refused:?}"
        );
    }
}

/// What was spent under a slow rate is not owed under a faster one: a listener that may accept a thousand per second does not
/// stand for the minutes that the old rate would have taken.
#[test]
fn a_faster_rate_is_faster_at_once() {
    let (slow, fast) = (Rate::per_second(1).burst(100), Rate::per_second(1000));
    let (mut sim, addr) = world(
        Config::new().with(|config| config.accept_rate = Some(slow)),
        local().with(|listen| {
            listen.accept_rate = Some(slow);
            listen.source_limits.rate = Some(slow);
        }),
    );
    connect(&mut sim, addr, 101);
    sim.settle();
    assert_eq!(sim.stats().accepted, 100);
    sim.control()
        .reconfigure(|config| config.accept_rate = Some(fast))
        .expect("good");
    sim.control()
        .reconfigure_listener("it", |listen| {
            listen.accept_rate = Some(fast);
            listen.source_limits.rate = Some(fast);
        })
        .expect("good");
    sim.advance(millis(1));
    assert_eq!((sim.stats().accepted, sim.stats().open), (101, 101));
    connect(&mut sim, addr, 99);
    sim.advance(millis(99));
    assert_eq!(
        (sim.stats().accepted, sim.stats().open),
        (200, 200),
        "and no faster"
    );
}

/// The same for a shared rate, and for connections that wait already.
#[test]
fn a_connection_that_waits_for_a_shared_rate_follows_a_faster_one() {
    let none: Option<Rate> = None;
    for next in [Some(Rate::per_second(1_000_000)), none] {
        for frames in [false, true] {
            let set = |listen: &mut Listen, rate: Option<Rate>| {
                if frames {
                    listen.total_frame_rate = rate;
                } else {
                    listen.total_read_rate = rate;
                }
            };
            let (mut sim, addr) = world(
                Config::new(),
                local().with(|listen| set(listen, Some(Rate::per_second(1).burst(1)))),
            );
            let clients = connect(&mut sim, addr, 20);
            for client in &clients {
                sim.send(*client, &b"\0\x02hi".repeat(50));
            }
            sim.advance(millis(100));
            sim.control()
                .reconfigure_listener("it", |listen| set(listen, next))
                .expect("good");
            // Sixteen kilobytes for each in turn.
            sim.advance(millis(400));
            for client in &clients {
                assert_eq!(sim.received(*client).len(), 200, "{next:?}");
            }
        }
    }
}

/// A client that sends a byte and leaves gives its remaining share back: the others do not wait for
/// it.
#[test]
fn connections_that_come_and_go_do_not_spend_a_shared_rate() {
    let (mut sim, addr) = world(
        Config::new(),
        local().with(|listen| listen.total_read_rate = Some(Rate::per_second(100_000))),
    );
    let greedy = connect(&mut sim, addr, 1)[0];
    sim.send(greedy, &b"\0\x02hi".repeat(30_000));
    sim.settle();
    for client in connect(&mut sim, addr, 500) {
        sim.send(client, b"\0");
        sim.settle();
        sim.reset(client);
    }
    let honest = connect(&mut sim, addr, 1)[0];
    sim.send(honest, b"\0\x02hi");
    // A thirty-second of a second for each earlier client.
    sim.advance(Duration::from_secs(17));
    assert_eq!(sim.received(honest), b"\0\x02hi");
    let late = connect(&mut sim, addr, 1)[0];
    sim.reset(greedy);
    sim.advance(millis(100));
    sim.send(late, b"\0\x02hi");
    sim.advance(millis(200));
    assert_eq!(sim.received(late), b"\0\x02hi", "nothing is left of them");
}

/// What comes in one piece with the PROXY header is read with it, and paid for afterwards.
#[test]
fn what_stands_behind_a_header_counts() {
    let (mut sim, addr) = world(
        Config::new(),
        behind_a_proxy().with(|listen| listen.conn.read_rate = Some(Rate::per_second(1000))),
    );
    let client = connect(&mut sim, addr, 1)[0];
    sim.send(
        client,
        &[b"PROXY UNKNOWN\r\n", &b"\0\x02hi".repeat(5000)[..]].concat(),
    );
    sim.settle();
    assert_eq!(sim.received(client).len(), 20_000);
    sim.send(client, b"\0\x02hi");
    sim.advance(Duration::from_secs(19));
    assert_eq!(sim.received(client), b"");
    sim.advance(Duration::from_secs(1));
    assert_eq!(sim.received(client), b"\0\x02hi");
}
