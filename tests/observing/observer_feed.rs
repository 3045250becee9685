//! The observer's events: one snapshot for all, many connections in many short jobs, nothing for a browser that does not
//! read, and names that the handbook lists. In virtual time.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use kit::net::Echo;
use portcullis::sim::{ClientId, ClientState, Sim};
use portcullis::{
    AccessRules, Alarm, Close, CloseReason, Config, Connect, Context, Framing, Handler, Listen,
    Observer, Outcome, ProxyProtocol, Quota,
};
use serde_json::Value;

const SECOND: Duration = Duration::from_secs(1);

/// Slots that one job visits.
const SLICE: usize = 256;

struct World {
    sim: Sim,
    echo: SocketAddr,
    page: SocketAddr,
}

fn world(config: Config, echo: Listen) -> World {
    let mut sim = Sim::new(5, config, ());
    let echo = sim.listen(echo, |_: &mut (), _| Echo).expect("listen");
    let observer = Observer::new();
    let listen = observer
        .listen("127.0.0.1:0")
        .expect("loopback")
        .name("observer");
    let page = sim.listen_with(listen, observer).expect("listen");
    World { sim, echo, page }
}

fn listen() -> Listen {
    Listen::tcp("127.0.0.1:0", Framing::Packet2).name("echo")
}

impl World {
    fn request(&mut self, target: &str) -> ClientId {
        let host = Ipv4Addr::LOCALHOST.into();
        let client = self.sim.connect_from(self.page, host).expect("a listener");
        let request = format!("GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n");
        self.sim.send(client, request.as_bytes());
        client
    }

    /// What a client got, as text.
    fn text(&mut self, client: ClientId) -> String {
        String::from_utf8(self.sim.received(client)).expect("UTF-8")
    }

    /// Steps until a client gets events, which have to be these.
    #[track_caller]
    fn until_events(&mut self, client: ClientId, expected: &[&str]) {
        for _ in 0..20 {
            self.sim.step();
            let events = self.events(client);
            if !events.is_empty() {
                return assert_eq!(names(&events), expected);
            }
        }
        panic!("no events");
    }

    /// The events that a client got, with their names.
    fn events(&mut self, client: ClientId) -> Vec<(String, Value)> {
        let text = self.text(client);
        let body = text
            .split_once("\r\n\r\n")
            .map_or(text.as_str(), |(_, body)| body);
        let events = body
            .split("\n\n")
            .filter(|event| event.starts_with("event: "));
        events
            .map(|event| {
                let (name, data) = event.split_once('\n').expect("two lines");
                let name = name.strip_prefix("event: ").expect("a name");
                let data = data.strip_prefix("data: ").expect("data");
                (name.to_owned(), serde_json::from_str(data).expect("JSON"))
            })
            .collect()
    }
}

fn names(events: &[(String, Value)]) -> Vec<&str> {
    events.iter().map(|(name, _)| name.as_str()).collect()
}

#[test]
fn one_snapshot_a_second_for_those_who_follow() {
    let mut world = world(Config::new(), listen());
    let client = world.request("/events");
    world.sim.settle();
    let first = world.events(client);
    assert_eq!(names(&first), ["history", "snapshot", "connections"]);
    assert_eq!(first[1].1["rates"], Value::Null);
    let echo = world.sim.connect(world.echo).expect("a listener");
    world.sim.send(echo, b"\0\x05hello");
    world.sim.advance(SECOND);
    let second = world.events(client);
    assert_eq!(names(&second), ["snapshot", "connections"]);
    let rates = &second[0].1["rates"];
    assert_eq!(
        (rates["accepted"].as_f64(), rates["interval"].as_f64()),
        (Some(1.0), Some(1.0))
    );
    assert_eq!(second[1].1["matching"], 2);
    // A minute of history for the next one, and the last snapshot again.
    world.sim.advance(100 * SECOND);
    assert_eq!(names(&world.events(client)).len(), 200);
    let late = world.request("/events?sort=age&order=asc");
    world.sim.settle();
    let events = world.events(late);
    assert_eq!(names(&events), ["history", "snapshot"]);
    assert_eq!(events[0].1["samples"].as_array().expect("a list").len(), 60);
    assert_eq!(events[0].1["sequence"], events[1].1["sequence"]);
    world.sim.advance(SECOND);
    let events = world.events(late);
    assert_eq!(names(&events), ["snapshot", "connections"]);
    assert_eq!(
        (&events[1].1["sort"], &events[1].1["order"]),
        (&"age".into(), &"asc".into())
    );
}

#[test]
fn nobody_follows_and_the_server_sleeps() {
    let mut world = world(Config::new(), listen());
    let client = world.request("/events");
    world.sim.advance(3 * SECOND);
    world.sim.finish(client);
    world.sim.advance(2 * SECOND);
    assert_eq!(world.sim.state(client), ClientState::Finished);
    let before = world.sim.stats();
    world.sim.advance(Duration::from_secs(3600));
    let after = world.sim.stats();
    assert!(
        after.iterations <= before.iterations + 2,
        "{before:?} {after:?}"
    );
    assert_eq!((after.open, after.memory), (0, 0));
    // It begins anew.
    let client = world.request("/events");
    world.sim.advance(SECOND);
    let events = world.events(client);
    assert_eq!(events[0].1["samples"], Value::Array(Vec::new()));
    assert_eq!(
        names(&events)[1..],
        ["snapshot", "connections", "snapshot", "connections"]
    );
    assert_eq!(events[1].1["rates"], Value::Null);
}

/// Skipped, and closed in the end; the other one gets everything.
#[test]
fn a_browser_that_does_not_read_holds_nothing() {
    let mut world = world(Config::new(), listen());
    for _ in 0..100 {
        world.sim.connect(world.echo).expect("a listener");
    }
    let (quick, slow) = (world.request("/events"), world.request("/events"));
    world.sim.settle();
    world.sim.set_reading(slow, false);
    world.sim.set_send_buffer(slow, 4096);
    world.sim.received(quick);
    let mut most = 0;
    for _ in 0..9 {
        world.sim.advance(SECOND);
        let events = world.events(quick);
        assert_eq!(names(&events), ["snapshot", "connections"]);
        most = most.max(world.sim.stats().memory);
    }
    // No more than one snapshot with its connections.
    let size = world.sim.stats().traffic.bytes_out as usize / 10;
    assert!(most > 0 && most < size, "{most} bytes, {size}");
    // It reads again, and goes on with the present.
    world.sim.set_reading(slow, true);
    world.sim.advance(2 * SECOND);
    let sequence = world.events(slow).last().expect("events").1.clone();
    assert_eq!(sequence["matching"], 102);
    // It does not any more.
    world.sim.set_reading(slow, false);
    world.sim.advance(60 * SECOND);
    let stats = world.sim.stats();
    assert_eq!(stats.closed(CloseReason::WriteTimeout), 1);
    assert_eq!((stats.open, stats.panics), (101, 0));
}

/// Each iteration visits a slice; the first of all come out, in both orders, with any filter.
#[test]
fn a_hundred_thousand_connections_are_sorted_in_slices() {
    const MANY: usize = 100_000;
    let config = Config::max_connections(MANY + 20).with(|config| {
        config.budgets.accepts = MANY;
        config.budgets.work = usize::MAX;
    });
    let backlog = |listen: &mut Listen| listen.socket.backlog = MANY as u32;
    let mut world = world(config, listen().with(backlog));
    let mut clients = Vec::new();
    for _ in 0..MANY {
        clients.push(world.sim.connect(world.echo).expect("the backlog has room"));
    }
    // Else all of them are looked at after each batch of events.
    world.sim.set_checks(false);
    world.sim.settle();
    // Some that differ.
    let talkers: Vec<_> = (0..150).map(|at| clients[at * 600 + 7]).collect();
    for (at, client) in (1..).zip(&talkers) {
        world.sim.send(*client, &kit::net::packet2(&vec![7; at]));
    }
    world.sim.settle();
    world.sim.advance(SECOND);
    world
        .sim
        .control()
        .reconfigure(|config| config.budgets = portcullis::Budgets::default())
        .expect("good");
    let by_traffic = world.request("/events?sort=traffic");
    let needle = world.sim.client_addr(talkers[5]).expect("an address");
    let filtered = world.request(&format!("/events?filter=OPEN+echo+:{}", needle.port()));
    let before = world.sim.stats().iterations;
    world.sim.settle();
    let iterations = world.sim.stats().iterations - before;
    let slices = (MANY + 2).div_ceil(SLICE) as u64;
    assert!(
        (slices..slices + 8).contains(&iterations),
        "{iterations} iterations, {slices} slices"
    );
    let events = world.events(by_traffic);
    let shown = &events[2].1;
    assert_eq!(shown["matching"], MANY + 2);
    let shown = shown["connections"].as_array().expect("a list");
    let sizes: Vec<u64> = shown
        .iter()
        .filter_map(|info| info["traffic"]["bytes_in"].as_u64())
        .collect();
    // A frame of `n` bytes is two longer on the wire; and the two browsers' requests.
    assert_eq!(sizes.len(), 100);
    let sizes: Vec<u64> = (0..100)
        .zip(sizes)
        .filter(|(at, _)| shown[*at]["listener"] == "L0")
        .map(|(_, size)| size)
        .collect();
    let expected: Vec<u64> = (0..sizes.len() as u64).map(|at| 152 - at).collect();
    assert_eq!(sizes, expected);
    // The second one came in the same round or waits for the next.
    world.sim.advance(SECOND);
    let found = world.events(filtered).pop().expect("events").1;
    let found = found["connections"].as_array().expect("a list").clone();
    assert!(!found.is_empty() && found.len() <= 2, "{found:?}");
    assert!(found.iter().any(|info| info["peer"] == needle.to_string()));
}

/// What it asks for was not looked for in the round that has begun.
#[test]
fn a_browser_that_comes_during_a_round_gets_its_connections_in_the_next() {
    let mut world = world(Config::max_connections(20 * SLICE), listen());
    for _ in 0..12 {
        for _ in 0..SLICE / 2 {
            world.sim.connect(world.echo).expect("the backlog has room");
        }
        world.sim.settle();
    }
    let first = world.request("/events");
    world.until_events(first, &["history"]);
    let late = world.request("/events?sort=age");
    world.until_events(late, &["history"]);
    assert_eq!(world.text(first), "", "the round goes on");
    world.sim.settle();
    assert_eq!(names(&world.events(first)), ["snapshot", "connections"]);
    assert_eq!(names(&world.events(late)), ["snapshot"]);
    world.sim.advance(SECOND);
    let events = world.events(late);
    assert_eq!(names(&events), ["snapshot", "connections"]);
    assert_eq!(events[1].1["sort"], "age");
}

/// Behind a proxy.
#[test]
fn a_filter_finds_a_client_by_the_address_behind_its_proxy() {
    let behind_proxy = listen().with(|listen| {
        listen.proxy_protocol = ProxyProtocol::Required;
        listen.trusted_proxies = Some(AccessRules::allow_all());
    });
    let mut world = world(Config::new(), behind_proxy);
    for last in [7, 8] {
        let client = world.sim.connect(world.echo).expect("a listener");
        let header = format!("PROXY TCP4 203.0.113.{last} 198.51.100.2 50000 2\r\n");
        world.sim.send(client, header.as_bytes());
    }
    world.sim.settle();
    let browser = world.request("/events?filter=203.0.113.7");
    world.sim.settle();
    let found = world.events(browser).pop().expect("events").1;
    assert_eq!(found["matching"], 1);
    assert_eq!(found["connections"][0]["source"], "203.0.113.7:50000");
}

#[test]
fn different_queries_are_limited_and_bad_ones_refused() {
    let config = Config::max_connections(100);
    let mut world = world(config, listen());
    for at in 0..8 {
        let client = world.request(&format!("/events?filter=word{at}"));
        world.sim.settle();
        assert!(world.text(client).starts_with("HTTP/1.1 200 OK\r\n"));
    }
    for (target, status) in [
        ("/events?filter=more", "503"),
        ("/events?filter=word3&x=y", "200"),
        ("/events?sort=name", "400"),
        ("/events?order=up", "400"),
        ("/events?filter=a+b+c+d+e", "400"),
        (&format!("/events?filter={}", "a".repeat(257)), "400"),
        ("/tree.json?limit=101", "400"),
        ("/tree.json?limit=-1", "400"),
    ] {
        let client = world.request(target);
        world.sim.settle();
        let text = world.text(client);
        assert!(
            text.starts_with(&format!("HTTP/1.1 {status} ")),
            "{target}: {text}"
        );
    }
}

#[test]
fn a_drain_ends_the_events_in_order() {
    let mut world = world(Config::new(), listen());
    let client = world.request("/events");
    world.sim.advance(SECOND);
    world.sim.control().drain(10 * SECOND);
    world.sim.settle();
    assert_eq!(world.sim.state(client), ClientState::Finished);
    world.sim.finish(client);
    world.sim.advance(SECOND);
    let report = world.sim.drain_report().expect("over");
    assert_eq!((report.ended, report.failed, report.forced), (1, 0, 0));
}

/// Ends with a label.
struct Labelled;

impl Handler for Labelled {
    fn on_frame(&mut self, cx: &mut Context<'_>, frame: &[u8]) -> Outcome {
        match frame {
            b"end" => Err(Close::because("a <script>").labelled("by_request")),
            _ => Ok(cx.conn.send(frame)?),
        }
    }
}

/// Every name in the data, and no other, is in the handbook's tables.
#[test]
fn every_name_is_written_down() {
    let mut world = world(
        Config::new().with(|config| config.memory_limit = Some(1 << 20)),
        listen(),
    );
    let labelled = world
        .sim
        .listen(listen().name("labelled"), |_: &mut (), _| Labelled)
        .expect("listen");
    let alarm = Alarm::Connections(Quota::Count(3));
    world
        .sim
        .control()
        .on_alarm(alarm, SECOND, |_, _, _| {})
        .expect("good");
    let idle = world.sim.connect(world.echo).expect("a listener");
    world.sim.send(idle, b"\0\x01x");
    let ends = world.sim.connect(labelled).expect("a listener");
    world.sim.send(ends, b"\0\x03end");
    let options = Connect::new(Framing::Packet2);
    let outgoing = world.sim.control().connect(world.echo, options, Echo);
    outgoing.expect("it begins");
    let socket = world.sim.connect(labelled).expect("a listener");
    world.sim.settle();
    let client = world.request("/events");
    world.sim.advance(5 * SECOND);
    let events = world.events(client);
    let tree = world.request("/tree.json");
    world.sim.settle();
    let tree = world.text(tree);
    let (_, tree) = tree.split_once("\r\n\r\n").expect("a body");
    let tree: Value = serde_json::from_str(tree).expect("JSON");
    world.sim.reset(socket);

    let mut seen = BTreeSet::new();
    for (name, data) in events
        .iter()
        .map(|(name, data)| (name.as_str(), data))
        .chain([("tree", &tree)])
    {
        collect(name, data, &mut seen);
    }
    let written = written();
    let missing: Vec<_> = seen.difference(&written).collect();
    assert!(missing.is_empty(), "not in the handbook: {missing:?}");
    let unknown: Vec<_> = written.difference(&seen).collect();
    assert!(unknown.is_empty(), "in the handbook only: {unknown:?}");
}

/// Parts whose names are reasons, labels and deadlines.
const MAPS: [&str; 4] = [
    ".closed",
    ".closed_labels",
    ".closed_labels.*",
    ".time_left",
];

/// Where a part of the data has a table of its own.
fn table_of(path: &str) -> Option<&'static str> {
    let ends = |end: &str| path.ends_with(end);
    let of_tree = path.starts_with("tree ");
    Some(match path {
        _ if ends(" stats") => "Counters",
        _ if ends("traffic") => "Traffic",
        "history samples[]" => "snapshot rates",
        "snapshot listeners[]" => "Listeners",
        _ if of_tree && ends("[].listener") => "Listeners",
        _ if ends("connections[]") => "Connections",
        _ if path.starts_with("snapshot histograms.") => "Histograms",
        _ => return None,
    })
}

fn is(path: &str, map: &str) -> bool {
    path.replace(' ', ".").ends_with(map) && !path.starts_with("snapshot rates")
}

/// Adds the paths of all names below `value`, each under the title of its table.
fn collect(path: &str, value: &Value, seen: &mut BTreeSet<String>) {
    let path = table_of(path).unwrap_or(path);
    let below = |name: &str| match path.contains(' ') {
        true => format!("{path}.{name}"),
        false => format!("{path} {name}"),
    };
    match value {
        Value::Object(fields) => {
            for (name, value) in fields {
                let is_key = MAPS.iter().any(|map| is(path, map));
                let path = below(if is_key { "*" } else { name });
                if !value.is_array() && !MAPS.iter().any(|map| is(&path, map)) {
                    seen.insert(path.clone());
                }
                collect(&path, value, seen);
            }
        }
        // The pairs of a histogram have no names.
        Value::Array(elements) => {
            let path = format!("{path}[]");
            seen.insert(path.clone());
            for element in elements.iter().filter(|element| element.is_object()) {
                collect(&path, element, seen);
            }
        }
        _ => {}
    }
}

/// The names in the first columns of the tables, each under the title of its table.
fn written() -> BTreeSet<String> {
    let page =
        std::fs::read_to_string(format!("{}/src/manual/observer.md", kit::ROOT)).expect("readable");
    let (_, page) = page.split_once("# The data").expect("the section");
    let mut title = "";
    let mut written = BTreeSet::new();
    for line in page.lines() {
        if let Some(text) = line.strip_prefix("## ") {
            title = text
                .strip_prefix("Event ")
                .unwrap_or(text)
                .trim_matches('`');
            title = if title == "/tree.json" { "tree" } else { title };
        }
        let Some(cell) = line
            .strip_prefix("| `")
            .and_then(|line| line.split(" |").next())
        else {
            continue;
        };
        for name in cell.split(", ").filter(|_| !title.is_empty()) {
            let name = name.trim_matches('`');
            written.insert(format!("{title} {name}"));
        }
    }
    written
}

/// Without other connections a drain ends at once; a request that has come is still answered.
#[test]
fn a_request_during_a_drain_is_told_so() {
    let mut world = world(Config::new(), listen());
    let host = Ipv4Addr::LOCALHOST.into();
    let client = world.sim.connect_from(world.page, host);
    let client = client.expect("a listener");
    world.sim.settle();
    world.sim.control().drain(10 * SECOND);
    let request = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n";
    world.sim.send(client, request);
    world.sim.settle();
    let answer = world.text(client);
    assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
    assert!(answer.ends_with("\r\n\r\ndraining\n"), "{answer}");
    assert!(world.sim.connect_from(world.page, host).is_none());
}
