//! The observer's slots: connections that say nothing keep no operator out, and no stream ends for others. In virtual time.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use kit::net::{local, Echo};
use portcullis::sim::{ClientId, ClientState, Sim};
use portcullis::{CloseReason, Config, Observer};

const SECOND: Duration = Duration::from_secs(1);

/// Connections that the observer's listener has at most.
const MAX: usize = 16;

fn world(config: Config) -> (Sim<()>, SocketAddr, SocketAddr) {
    let mut sim = Sim::new(7, config, ());
    let echo = sim.listen(local(), |_: &mut (), _| Echo).expect("listen");
    let observer = Observer::new();
    let listen = observer.listen("127.0.0.1:0").expect("loopback");
    let page = sim.listen_with(listen, observer).expect("listen");
    (sim, echo, page)
}

fn silent(sim: &mut Sim<()>, page: SocketAddr) -> ClientId {
    let client = sim.connect_from(page, Ipv4Addr::LOCALHOST.into());
    let client = client.expect("a listener");
    sim.settle();
    client
}

fn ask(sim: &mut Sim<()>, page: SocketAddr, target: &str) -> ClientId {
    let client = sim.connect_from(page, Ipv4Addr::LOCALHOST.into());
    let client = client.expect("a listener");
    let request = format!("GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n");
    sim.send(client, request.as_bytes());
    sim.settle();
    client
}

fn status(sim: &mut Sim<()>, client: ClientId) -> String {
    let answer = String::from_utf8(sim.received(client)).expect("text");
    answer.lines().next().unwrap_or_default().to_owned()
}

const OK: &str = "HTTP/1.1 200 OK";

#[test]
fn silent_connections_make_room_the_oldest_first() {
    let (mut sim, _echo, page) = world(Config::new());
    let stream = ask(&mut sim, page, "/events");
    assert_eq!(status(&mut sim, stream), OK);
    let mut crowd: Vec<_> = (0..3 * MAX).map(|_| silent(&mut sim, page)).collect();
    // One slot is free in any case.
    assert_eq!(sim.stats().open, MAX - 1);
    let ended: Vec<_> = crowd
        .iter()
        .map(|&client| sim.state(client) != ClientState::Connected)
        .collect();
    assert!(ended.is_sorted_by(|one, other| one >= other), "{ended:?}");
    // At once, without any time.
    for target in ["/", "/healthz", "/tree.json"].into_iter().cycle().take(60) {
        let client = ask(&mut sim, page, target);
        assert_eq!(status(&mut sim, client), OK);
        crowd.push(silent(&mut sim, page));
        sim.finish(client);
    }
    sim.received(stream);
    sim.advance(SECOND);
    assert_eq!(sim.state(stream), ClientState::Connected);
    let events = String::from_utf8(sim.received(stream)).expect("text");
    assert!(events.starts_with("event: snapshot\n"), "{events:.100}");
    let stats = sim.stats();
    let labels: Vec<_> = stats.closed_labels(CloseReason::Aborted).collect();
    assert_eq!(labels[0].0, "made_room");
    assert_eq!(stats.panics, 0);
}

#[test]
fn reserved_slots_are_not_used_up_by_silence() {
    let (mut sim, echo, page) = world(Config::max_connections(10));
    let stream = ask(&mut sim, page, "/events");
    for _ in 0..20 {
        let client = sim.connect(echo).expect("the backlog has room");
        sim.send(client, b"\0\0");
    }
    sim.settle();
    // Six of others, the stream, and three slots for the observer.
    for _ in 0..10 {
        silent(&mut sim, page);
    }
    for _ in 0..10 {
        let client = ask(&mut sim, page, "/healthz");
        assert_eq!(status(&mut sim, client), OK);
        sim.finish(client);
        sim.settle();
    }
    assert_eq!(status(&mut sim, stream), OK);
    assert_eq!(sim.state(stream), ClientState::Connected);
}

/// A connection that was answered makes room in order, behind those without a request.
#[test]
fn an_answered_connection_makes_room_last() {
    let (mut sim, _echo, page) = world(Config::new());
    let answered = ask(&mut sim, page, "/healthz");
    for _ in 0..MAX {
        silent(&mut sim, page);
    }
    assert_eq!(sim.state(answered), ClientState::Connected);
    sim.advance(SECOND);
    // The last of these finds no silent one.
    let mut more: Vec<_> = (0..MAX - 1)
        .map(|_| ask(&mut sim, page, "/healthz"))
        .collect();
    assert_ne!(sim.state(answered), ClientState::Connected);
    // One that was answered just now ends in order, and may be slow to finish.
    for _ in 0..4 {
        more.push(ask(&mut sim, page, "/healthz"));
        sim.advance(SECOND / 2);
    }
    assert_eq!(sim.state(more[0]), ClientState::Finished);
    for client in more {
        assert_eq!(status(&mut sim, client), OK);
    }
}

#[test]
fn a_connection_without_a_request_ends_soon() {
    let (mut sim, _echo, page) = world(Config::new());
    let (quiet, begun) = (silent(&mut sim, page), silent(&mut sim, page));
    let answered = ask(&mut sim, page, "/healthz");
    sim.send(begun, b"GET");
    sim.advance(4 * SECOND);
    assert_eq!(sim.state(quiet), ClientState::Connected);
    sim.advance(2 * SECOND);
    assert_ne!(sim.state(quiet), ClientState::Connected);
    for client in [begun, answered] {
        assert_eq!(sim.state(client), ClientState::Connected);
    }
    let stats = sim.stats();
    let labels: Vec<_> = stats.closed_labels(CloseReason::Aborted).collect();
    assert_eq!(labels, [("silent", 1)]);
}

/// Streams do not end for others, so the last slot is none's.
#[test]
fn streams_leave_a_slot_for_requests() {
    let (mut sim, _echo, page) = world(Config::new());
    let streams: Vec<_> = (1..MAX).map(|_| ask(&mut sim, page, "/events")).collect();
    for &client in &streams {
        assert_eq!(status(&mut sim, client), OK);
    }
    for (target, expected) in [
        ("/events", "HTTP/1.1 503 Service Unavailable"),
        ("/", OK),
        ("/healthz", OK),
    ] {
        let client = ask(&mut sim, page, target);
        assert_eq!(status(&mut sim, client), expected);
        // It closes by itself.
        assert_eq!(sim.state(client), ClientState::Finished);
        sim.finish(client);
        sim.settle();
    }
    assert_eq!(sim.state(streams[0]), ClientState::Connected);
}
