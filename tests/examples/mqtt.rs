//! The MQTT broker, as the standard (MQTT 3.1.1) has it: byte by byte here, with the clients of other
//! projects in the modules below.

mod mosquitto;
mod paho;
mod raw;
mod sessions;

use raw::{
    connect_packet, field, packet, publish_packet, subscribe_packet, Broker, Raw, CLEAN, KEPT,
};

/// The broker ends the connection of this client, which does not finish.
#[track_caller]
fn is_refused(mut client: Raw, bytes: &[u8], why: &str) {
    eprintln!("{why}");
    client.send(bytes);
    client.await_end();
}

#[test]
fn a_violation_ends_the_connection_and_no_other() {
    let broker = Broker::start(&["--max-packet", "1000"]);
    let mut witness = broker.client("witness");
    witness.subscribe("#", 1);
    let connect = |flags, more: &[Vec<u8>]| connect_packet("id", flags, 0, more);
    let first: &[(&str, Vec<u8>)] = &[
        ("not MQTT", b"GET / HTTP/1.1\r\n\r\n".to_vec()),
        ("not CONNECT", vec![0xC0, 0]),
        (
            "another protocol",
            packet(0x10, &[field("AMQP"), vec![4, 2, 0, 0, 0, 0]].concat()),
        ),
        (
            "flags of CONNECT",
            [&[0x11], &connect(CLEAN, &[])[1..]].concat(),
        ),
        ("the reserved flag", connect(CLEAN | 1, &[])),
        ("QoS without a will", connect(CLEAN | 8, &[])),
        ("RETAIN without a will", connect(CLEAN | 32, &[])),
        (
            "a will with QoS 3",
            connect(CLEAN | 4 | 24, &[field("t"), field("p")]),
        ),
        (
            "a will with wildcards",
            connect(CLEAN | 4, &[field("t/#"), field("p")]),
        ),
        (
            "a will without a payload",
            connect(CLEAN | 4, &[field("t")]),
        ),
        (
            "a password without a user",
            connect(CLEAN | 64, &[field("word")]),
        ),
        ("more than announced", connect(CLEAN, &[field("t")])),
        ("a client that is not UTF-8", {
            let mut bytes = connect(CLEAN, &[]);
            *bytes.last_mut().expect("a byte") = 0xFF;
            bytes
        }),
        ("an endless length", vec![0x10, 0xFF, 0xFF, 0xFF, 0xFF, 1]),
        ("a long packet", vec![0x10, 0xFF, 0xFF, 0xFF, 0x7F]),
    ];
    for (why, bytes) in first {
        is_refused(broker.open(), bytes, why);
    }
    let later: &[(&str, Vec<u8>)] = &[
        ("a second CONNECT", connect(CLEAN, &[])),
        ("a packet of a server", vec![0xD0, 0]),
        ("type 0", vec![0, 0]),
        ("type 15", vec![0xF0, 0]),
        ("PUBREC of a message that was not sent", vec![0x50, 2, 0, 1]),
        ("flags of PINGREQ", vec![0xC1, 0]),
        ("PINGREQ with a body", vec![0xC0, 1, 0]),
        ("PUBLISH with QoS 3", publish_packet(6, "t", 1, b"")),
        ("DUP with QoS 0", publish_packet(8, "t", 0, b"")),
        ("identifier 0", publish_packet(2, "t", 0, b"")),
        ("no topic", publish_packet(0, "", 0, b"")),
        ("a topic with +", publish_packet(0, "a/+", 0, b"")),
        ("a topic with #", publish_packet(0, "#", 0, b"")),
        ("a topic with U+0000", publish_packet(0, "a\0", 0, b"")),
        (
            "a topic that is not UTF-8",
            packet(0x30, &field([0xC3, 0x28])),
        ),
        ("a surrogate", packet(0x30, &field([0xED, 0xA0, 0x80]))),
        ("a topic beyond the end", packet(0x30, &[0, 9, b't'])),
        ("a long PUBLISH", publish_packet(0, "t", 0, &[0; 1000])),
        ("PUBACK without an identifier", vec![0x40, 0]),
        ("PUBREL with flags 0", vec![0x60, 2, 0, 1]),
        ("SUBSCRIBE with flags 0", vec![0x80, 6, 0, 1, 0, 1, b't', 0]),
        ("SUBSCRIBE to nothing", subscribe_packet(1, &[])),
        (
            "SUBSCRIBE with identifier 0",
            subscribe_packet(0, &[("t", 0)]),
        ),
        ("SUBSCRIBE with QoS 3", subscribe_packet(1, &[("t", 3)])),
        ("an empty filter", subscribe_packet(1, &[("", 0)])),
        ("# in the middle", subscribe_packet(1, &[("a/#/b", 0)])),
        ("# in a level", subscribe_packet(1, &[("a#", 0)])),
        ("+ in a level", subscribe_packet(1, &[("a/b+", 0)])),
        ("UNSUBSCRIBE from nothing", vec![0xA2, 2, 0, 1]),
    ];
    for (why, bytes) in later {
        is_refused(broker.client("id"), bytes, why);
    }
    witness.ping();
    // A packet that ends early is none, whoever finishes.
    let mut client = broker.client("id");
    client.send(&publish_packet(0, "t", 0, b"payload")[..5]);
    client.finish();
    witness.ping();
    broker.finish("published");
}

#[test]
fn connack_says_why_a_client_is_refused() {
    let folder = kit::net::Place::new();
    let users = folder.path("users");
    std::fs::write(&users, "ada:secret:word\nbob:\n").expect("a file");
    let users = users.to_str().expect("text");
    let broker = Broker::start(&["--max-sessions", "1", "--users", users]);
    let refused = |bytes: &[u8], code: u8| {
        let mut client = broker.open();
        client.send(bytes);
        client.expect(&[0x20, 2, 0, code]);
        client.await_end();
    };
    let as_user =
        |user: &str, word: &str| connect_packet("id", CLEAN | 0xC0, 0, &[field(user), field(word)]);
    let version = |name: &str, level| {
        packet(
            0x10,
            &[field(name), vec![level, 2, 0, 0], field("id")].concat(),
        )
    };
    refused(&version("MQIsdp", 3), 1);
    refused(&version("MQTT", 5), 1);
    refused(&as_user("ada", "guess"), 4);
    refused(&as_user("eve", ""), 4);
    refused(&connect_packet("id", CLEAN | 0x80, 0, &[field("ada")]), 4);
    refused(&connect_packet("id", CLEAN, 0, &[]), 5);
    let mut ada = broker.open();
    ada.send(&as_user("ada", "secret:word"));
    ada.expect(&[0x20, 2, 0, 0]);
    let login = [field("bob"), field("")];
    refused(&connect_packet("other", CLEAN | 0xC0, 0, &login), 3);
    refused(&connect_packet("", KEPT | 0xC0, 0, &login), 2);
    refused(
        &connect_packet(&"x".repeat(1025), CLEAN | 0xC0, 0, &login),
        2,
    );
    ada.disconnect();
    let mut nameless = broker.open();
    nameless.send(&connect_packet("", CLEAN | 0xC0, 0, &login));
    nameless.expect(&[0x20, 2, 0, 0]);
    nameless.ping();
    broker.finish("published");
}

/// Section 4.7, its examples among them.
#[test]
fn filters_match_topics() {
    let broker = Broker::start(&[]);
    let topics = [
        "sport",
        "sport/",
        "sport/tennis",
        "sport/tennis/player1",
        "sport/tennis/player1/ranking",
        "/",
        "/finance",
        "$SYS",
        "$SYS/monitor/clients",
        "accueil",
    ];
    let expected: &[(&str, &[&str])] = &[
        (
            "#",
            &[
                "sport",
                "sport/",
                "sport/tennis",
                "sport/tennis/player1",
                "sport/tennis/player1/ranking",
                "/",
                "/finance",
                "accueil",
            ],
        ),
        ("+", &["sport", "accueil"]),
        ("+/+", &["sport/", "sport/tennis", "/", "/finance"]),
        ("/+", &["/", "/finance"]),
        (
            "sport/#",
            &[
                "sport",
                "sport/",
                "sport/tennis",
                "sport/tennis/player1",
                "sport/tennis/player1/ranking",
            ],
        ),
        ("sport/+", &["sport/", "sport/tennis"]),
        ("sport/tennis/+", &["sport/tennis/player1"]),
        (
            "+/tennis/#",
            &[
                "sport/tennis",
                "sport/tennis/player1",
                "sport/tennis/player1/ranking",
            ],
        ),
        ("+/monitor/#", &[]),
        ("$SYS/#", &["$SYS", "$SYS/monitor/clients"]),
        ("$SYS/monitor/+", &["$SYS/monitor/clients"]),
        ("Accueil", &[]),
        ("sport", &["sport"]),
    ];
    let mut publisher = broker.client("publisher");
    for topic in topics {
        publisher.publish(topic, "kept", true);
    }
    for (filter, expected) in expected {
        let mut client = broker.client("subscriber");
        client.subscribe(filter, 0);
        // Those that are retained, and the live ones.
        let mut retained: Vec<_> = expected.iter().map(|_| client.message().topic).collect();
        client.ping();
        retained.sort_unstable();
        let mut sorted = expected.to_vec();
        sorted.sort_unstable();
        assert_eq!(retained, sorted, "retained: {filter}");
        for topic in topics {
            publisher.publish(topic, "live", false);
        }
        let live: Vec<_> = expected.iter().map(|_| client.message().topic).collect();
        client.ping();
        assert_eq!(live, *expected, "live: {filter}");
        client.send(&packet(0xA2, &[vec![0, 5], field(filter)].concat()));
        client.expect(&[0xB0, 2, 0, 5]);
        publisher.publish(expected.first().unwrap_or(&"sport"), "unheard", false);
        client.ping();
    }
    broker.finish("published");
}

/// Of overlapping subscriptions the highest QoS counts (section 3.3.5), and a message has no higher
/// one than its publisher gave it.
#[test]
fn each_message_comes_once_with_its_qos() {
    let broker = Broker::start(&[]);
    let mut client = broker.client("client");
    client.send(&subscribe_packet(
        1,
        &[("a/#", 0), ("a/+", 2), ("a/b", 0), ("b", 0)],
    ));
    client.expect(&[0x90, 6, 0, 1, 0, 1, 0, 0]);
    client.send(&publish_packet(1, "a/b", 0, b"zero"));
    let message = client.message();
    assert_eq!((message.flags, message.id), (0, 0));
    client.send(&publish_packet(2, "a/b", 5, b"one"));
    let message = client.message();
    assert_eq!((message.flags, message.id), (2, 1));
    client.expect(&[0x40, 2, 0, 5]);
    client.send(&publish_packet(2, "b", 5, b"one"));
    assert_eq!(client.message().flags, 0);
    client.expect(&[0x40, 2, 0, 5]);
    client.ping();
    broker.finish("published");
}

#[test]
fn a_message_with_qos_2_is_published_once() {
    let broker = Broker::start(&["--max-unreleased", "2"]);
    let mut subscriber = broker.client("subscriber");
    subscriber.subscribe("#", 2);
    let (mut client, _) = broker.kept_client("client");
    for again in [0, 8] {
        client.send(&publish_packet(4 | again, "t", 3, b"first"));
        client.expect(&[0x50, 2, 0, 3]);
    }
    drop(client);
    let (mut client, was_kept) = broker.kept_client("client");
    assert!(was_kept);
    client.send(&publish_packet(4 | 8, "t", 3, b"first"));
    client.expect(&[0x50, 2, 0, 3]);
    for _ in 0..2 {
        client.send(&[0x62, 2, 0, 3]);
        client.expect(&[0x70, 2, 0, 3]);
    }
    client.send(&publish_packet(4, "t", 3, b"second"));
    client.expect(&[0x50, 2, 0, 3]);
    assert_eq!(
        [subscriber.payload(), subscriber.payload()],
        ["first", "second"]
    );
    client.send(&publish_packet(4, "t", 4, b"third"));
    client.expect(&[0x50, 2, 0, 4]);
    is_refused(
        client,
        &publish_packet(4, "t", 5, b"too many"),
        "unreleased",
    );
    assert_eq!(subscriber.payload(), "third");
    subscriber.ping();
    broker.finish("published");
}

#[test]
fn retained_messages_are_replaced_and_removed() {
    let broker = Broker::start(&["--max-retained", "2"]);
    let mut publisher = broker.client("publisher");
    publisher.subscribe("a", 0);
    for (topic, payload) in [
        ("a", "1"),
        ("b", "1"),
        ("a", "2"),
        ("c", "too many"),
        ("b", ""),
    ] {
        publisher.send(&publish_packet(1, topic, 0, payload.as_bytes()));
    }
    // Live, it is not said to be retained.
    assert_eq!(publisher.message().flags, 0);
    assert_eq!(publisher.message().flags, 0);
    publisher.publish("d", "with QoS 1", true);
    let mut client = broker.client("client");
    client.subscribe("#", 1);
    let messages = [client.message(), client.message()];
    let seen = messages.map(|message| (message.flags, message.payload));
    assert_eq!(seen, [(1, b"2".to_vec()), (3, b"with QoS 1".to_vec())]);
    client.ping();
    // They come again with each SUBSCRIBE (section 3.8.4).
    client.subscribe("a", 0);
    assert_eq!(client.payload(), "2");
    client.ping();
    assert_eq!(broker.finish("unretained"), 1);
}

/// However slowly it comes.
#[test]
fn a_client_without_connect_is_closed_in_time() {
    let broker = Broker::start(&["--connect-timeout", "1"]);
    let mut client = broker.client("client");
    broker.open().await_end();
    let user = field("u".repeat(60_000));
    let bytes = connect_packet("slow", CLEAN | 0x80, 0, &[user]);
    let sent = broker.open().trickle(&bytes);
    assert!(sent < 500, "{sent} bytes");
    // It counts for CONNECT alone.
    client.ping();
    broker.finish("published");
}

/// One client has subscribed to every way of writing a topic with wildcards.
#[test]
fn messages_that_are_much_work_leave_others_their_turns() {
    const LEVELS: usize = 8;
    let broker = Broker::start(&["--max-subscriptions", "300"]);
    let mut subscriber = broker.client("subscriber");
    for number in 0..1 << LEVELS {
        let level = |at| if number >> at & 1 == 0 { "+" } else { "a" };
        let filter: Vec<_> = (0..LEVELS).map(level).collect();
        subscriber.subscribe(&filter.join("/"), 0);
    }
    subscriber.subscribe("other", 0);
    let [mut client, mut other] = ["client", "other"].map(|id| broker.client(id));
    let topic = ["a"; LEVELS].join("/");
    let messages = publish_packet(0, &topic, 0, b"").repeat(1000);
    broker.stopped(|| {
        client.send(&messages);
        other.send(&publish_packet(0, "other", 0, b""));
    });
    let before = (0..1000).take_while(|_| subscriber.message().topic == topic);
    let before = before.count();
    assert!(before < 500, "{before} messages before another's");
    client.ping();
    broker.finish("published");
}
