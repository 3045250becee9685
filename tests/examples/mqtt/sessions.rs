//! What the broker keeps of a client, for how long, and up to which limit.

use std::thread;

use super::is_refused;
use super::raw::{
    connect_packet, field, publish_packet, subscribe_packet, Broker, Raw, CLEAN, KEPT,
};

/// In flight at most two. They are sent again with DUP, with the same identifiers and in the same
/// order; then comes the queue, from which none is lost up to its limit.
#[test]
fn a_kept_session_gets_its_messages_later() {
    let broker = Broker::start(&["--max-in-flight", "2", "--max-queued", "5"]);
    let (mut client, was_kept) = broker.kept_client("client");
    assert!(!was_kept);
    client.subscribe("t", 1);
    let mut publisher = broker.client("publisher");
    for number in 1..=4 {
        publisher.publish("t", &number.to_string(), false);
    }
    let [first, second] = [client.message(), client.message()];
    assert_eq!([first.flags, second.flags], [2, 2]);
    client.ping();
    client.acknowledge(first.id);
    let third = client.message();
    assert_eq!(third.payload, b"3");
    client.ping();
    client.disconnect();
    publisher.send(&publish_packet(0, "t", 0, b"not kept"));
    for number in 5..=8 {
        publisher.publish("t", &number.to_string(), false);
    }
    let (mut client, was_kept) = broker.kept_client("client");
    assert!(was_kept);
    let again = [client.message(), client.message()];
    assert_eq!([again[0].flags, again[1].flags], [10, 10]);
    assert_eq!([again[0].id, again[1].id], [second.id, third.id]);
    client.ping();
    client.acknowledge(second.id);
    client.acknowledge(third.id);
    assert_eq!(
        [client.payload(), client.payload(), client.payload()],
        ["4", "5", "6"]
    );
    client.ping();
    client.disconnect();
    // A clean session ends the kept one.
    broker.client("client").disconnect();
    let (mut client, was_kept) = broker.kept_client("client");
    assert!(!was_kept);
    publisher.publish("t", "not subscribed", false);
    client.ping();
    assert_eq!(broker.finish("overflowed"), 2);
}

/// The earlier connection ends, its will is published, and the later one has the session.
#[test]
fn a_second_connection_takes_the_session_over() {
    let broker = Broker::start(&[]);
    let mut witness = broker.client("witness");
    witness.subscribe("will", 1);
    let mut earlier = broker.open();
    let will = [field("will"), field("taken over")];
    earlier.send(&connect_packet("client", KEPT | 4, 0, &will));
    earlier.expect(&[0x20, 2, 0, 0]);
    earlier.subscribe("t", 1);
    witness.publish("t", "for both", false);
    let before = earlier.message();
    let (mut later, was_kept) = broker.kept_client("client");
    assert!(was_kept);
    earlier.await_end();
    assert_eq!(witness.payload(), "taken over");
    let again = later.message();
    assert_eq!((again.flags, again.id), (10, before.id));
    later.acknowledge(again.id);
    // The end of the earlier connection changes nothing.
    witness.publish("t", "for the later", false);
    assert_eq!(later.payload(), "for the later");
    broker.finish("published");
}

#[test]
fn a_will_is_published_unless_the_client_says_goodbye() {
    let broker = Broker::start(&[]);
    let mut witness = broker.client("witness");
    witness.subscribe("will/#", 1);
    let with_will = |id: &str, flags: u8, keep_alive: u16| {
        let mut client = broker.open();
        let will = [field(format!("will/{id}")), field(id)];
        client.send(&connect_packet(id, CLEAN | 4 | flags, keep_alive, &will));
        client.expect(&[0x20, 2, 0, 0]);
        client
    };
    with_will("polite", 8, 0).disconnect();
    drop(with_will("finishes", 8, 0));
    assert_eq!(witness.payload(), "finishes");
    with_will("resets", 16, 0).reset();
    let message = witness.message();
    assert_eq!((message.flags, &message.payload[..]), (2, &b"resets"[..]));
    witness.acknowledge(message.id);
    is_refused(with_will("offends", 0, 0), &[0xC1, 0], "a violation");
    assert_eq!(witness.payload(), "offends");
    // A second without a packet; the one that pings is not silent.
    let silent = with_will("silent", 32, 1);
    assert_eq!(witness.payload(), "silent");
    drop(silent);
    let mut late = broker.client("late");
    late.subscribe("will/#", 1);
    assert_eq!(late.message().flags, 1, "a will can be retained");
    witness.ping();
    broker.finish("published");
}

#[test]
fn what_a_client_can_make_the_broker_keep_has_limits() {
    let limits = [
        "--max-subscriptions",
        "2",
        "--max-levels",
        "3",
        "--max-sessions",
        "3",
    ];
    let broker = Broker::start(&limits);
    let (mut client, _) = broker.kept_client("oldest");
    let long = "x".repeat(1025);
    client.send(&subscribe_packet(
        1,
        &[
            ("a", 0),
            ("a/b/c/d", 0),
            (&long, 0),
            ("b", 0),
            ("c", 0),
            ("a", 1),
        ],
    ));
    client.expect(&[0x90, 8, 0, 1, 0, 0x80, 0x80, 0, 0x80, 1]);
    client.disconnect();
    broker.kept_client("older").0.disconnect();
    let mut present = broker.client("present");
    // The session whose client has been away for longest gives way.
    let (mut newcomer, was_kept) = broker.kept_client("newcomer");
    assert!(!was_kept);
    let (older, was_kept) = broker.kept_client("older");
    assert!(was_kept);
    let mut refused = broker.open();
    refused.send(&connect_packet("oldest", KEPT, 0, &[]));
    refused.expect(&[0x20, 2, 0, 3]);
    present.ping();
    newcomer.ping();
    drop(older);
    broker.finish("published");
}

/// Above it nothing is kept, and all is delivered that need not wait.
#[test]
fn messages_that_are_kept_share_a_limit() {
    let broker = Broker::start(&["--max-stored", "20000"]);
    let (mut away, _) = broker.kept_client("away");
    away.subscribe("t", 1);
    away.disconnect();
    let mut client = broker.client("client");
    client.subscribe("t", 1);
    let payload = "x".repeat(1000);
    for _ in 0..50 {
        client.send(&publish_packet(3, "t", 7, payload.as_bytes()));
        assert_eq!(client.payload(), payload);
        client.expect(&[0x40, 2, 0, 7]);
    }
    client.publish("u", &payload, true);
    client.subscribe("u", 1);
    client.ping();
    let (mut back, _) = broker.kept_client("away");
    for _ in 0..15 {
        assert_eq!(back.payload(), payload);
    }
    assert!(broker.finish("overflowed") > 20);
}

/// However often a client asks for them.
#[test]
fn retained_messages_are_not_queued_above_that_limit() {
    let broker = Broker::start(&["--max-stored", "50000"]);
    let (mut client, _) = broker.kept_client("client");
    client.subscribe("#", 0);
    client.disconnect();
    let mut publisher = broker.client("publisher");
    let payload = "x".repeat(1000);
    for topic in 0..100 {
        publisher.publish(&topic.to_string(), &payload, true);
    }
    let (mut client, _) = broker.kept_client("client");
    let retained = |client: &mut Raw, qos| {
        client.subscribe("#", qos);
        client.send(&[0xC0, 0]);
        let packets = std::iter::from_fn(|| Some(client.packet().0));
        packets.take_while(|&first| first != 0xD0).count()
    };
    // None of them is acknowledged.
    let [some, none, nor_later] = [1; 3].map(|qos| retained(&mut client, qos));
    assert!((1..20).contains(&some), "{some}");
    assert_eq!([none, nor_later], [0, 0]);
    (1..=some as u16).for_each(|id| client.acknowledge(id));
    // With QoS 0 they need not wait.
    assert!((40..60).contains(&retained(&mut client, 0)));
    assert!(broker.finish("unretained") > 40);
}

/// The queue of a session that has been long is not kept so.
#[cfg(target_os = "linux")]
#[test]
fn a_queue_that_was_long_gives_its_memory_back() {
    const MESSAGES: u16 = 10_000;
    let broker = Broker::start(&[]);
    let mut publisher = broker.client("publisher");
    let messages = (1..=MESSAGES).map(|id| publish_packet(3, &id.to_string(), id, b"x"));
    publisher.send(&messages.collect::<Vec<_>>().concat());
    (1..=MESSAGES).for_each(|_| drop(publisher.packet()));
    let serve_all = |number: usize| {
        let (mut client, _) = broker.kept_client(&number.to_string());
        client.subscribe("#", 1);
        for _ in 0..MESSAGES {
            let id = client.message().id;
            client.acknowledge(id);
        }
        client.disconnect();
    };
    serve_all(0);
    let before = broker.peak_memory();
    (1..30).for_each(serve_all);
    let grown = broker.peak_memory().saturating_sub(before);
    assert!(grown < 5_000_000, "{grown} bytes");
    broker.finish("published");
}

/// Neither it nor its messages delay another subscriber; with QoS 1 it gets all of them in the end.
#[test]
fn a_slow_subscriber_misses_messages_with_qos_0_alone() {
    const MESSAGES: usize = 400;
    let broker = Broker::start(&[]);
    let mut slow = [broker.client("slow 0"), broker.client("slow 1")];
    for (qos, client) in (0..).zip(&mut slow) {
        client.subscribe("t", qos);
    }
    let mut quick = broker.client("quick");
    quick.subscribe("t", 0);
    let mut publisher = broker.client("publisher");
    let filler = "x".repeat(60_000);
    for number in 0..MESSAGES {
        publisher.publish("t", &format!("{number} {filler}"), false);
        assert!(quick.payload().starts_with(&format!("{number} ")));
    }
    publisher.publish("t", "last", false);
    let [mut at_most_once, mut at_least_once] = slow;
    for number in 0..MESSAGES {
        let payload = at_least_once.payload();
        assert!(payload.starts_with(&format!("{number} ")), "{number}");
    }
    assert_eq!(at_least_once.payload(), "last");
    // In order too, up to where its output was congested.
    let reader = thread::spawn(move || {
        let mut seen = 0;
        while at_most_once.payload().starts_with(&format!("{seen} ")) {
            seen += 1;
        }
        seen
    });
    // It is served again once it reads.
    while !reader.is_finished() {
        publisher.publish("t", "last", false);
        quick.payload();
    }
    let seen = reader.join().expect("messages");
    assert!((1..MESSAGES).contains(&seen), "{seen} of {MESSAGES}");
    assert!(broker.finish("congested") as usize >= MESSAGES - seen);
}
