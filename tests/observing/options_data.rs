//! Options as data: what is written can be read, and its names do not change.

use std::collections::BTreeSet;
use std::time::Duration;

use kit::net::Echo;
use portcullis::{
    AccessRules, AtCapacity, Config, Connect, Error, Framing, Keepalive, Listen, ProxyProtocol,
    Quota, Rate, Retry, Server,
};
use serde::de::DeserializeOwned;
use serde_json::{from_str, from_value, json, to_value, Value};

/// Every option has a value that is not its default.
fn config() -> Config {
    let mut config = Config::max_connections(7);
    config.pending_limits.connections = Quota::Count(3);
    config.pending_limits.grace = Duration::from_millis(1500);
    config.accept_rate = Some(Rate::per_second(5).burst(9));
    config.memory_limit = Some(1 << 20);
    config.budgets.accepts = 3;
    config.queue_limits.bytes = 4;
    config.emfile_backoff = Duration::from_millis(2);
    config.recent_closes = 1;
    config
}

fn listen() -> Listen {
    let framing = Framing::LengthField {
        offset: 1,
        width: 2,
        little_endian: true,
        adjustment: -3,
    };
    let mut listen = Listen::tcp("127.0.0.1:2222", framing).name("games");
    listen.conn.idle_timeout = Duration::MAX;
    listen.conn.max_frame = Some(10);
    listen.conn.read_rate = Some(Rate::per_second(7));
    listen.socket.keepalive = Some(Keepalive {
        time: Duration::from_secs(60),
        interval: Duration::from_secs(9),
        retries: 4,
    });
    listen.max_connections = Some(5);
    listen.reserved = 2;
    listen.at_capacity = AtCapacity::Refuse {
        farewell: b"full\n".to_vec(),
    };
    listen.evict_silent = false;
    let rules = AccessRules::deny_all().allow("10.0.0.0/8");
    listen.access_rules = rules.expect("a network");
    listen.proxy_protocol = ProxyProtocol::Optional;
    listen.trusted_proxies = Some(AccessRules::allow_all());
    listen.source_limits.connections = Some(2);
    listen.total_frame_rate = Some(Rate::per_second(1));
    listen
}

fn connect() -> Connect {
    let mut connect = Connect::new(Framing::Line);
    connect.connect_timeout = Duration::from_millis(250);
    connect.bind = Some(([127, 0, 0, 1], 0).into());
    connect.retry = Some(Retry::new(3).first_delay(Duration::from_millis(20)));
    connect
}

#[track_caller]
fn round_trip<T: serde::Serialize + DeserializeOwned + std::fmt::Debug>(value: &T) {
    let data = to_value(value).expect("it is data");
    let back: T = from_value(data.clone()).expect("it can be read");
    assert_eq!(format!("{back:?}"), format!("{value:?}"));
    assert_eq!(to_value(&back).expect("it is data"), data);
}

#[test]
fn what_is_written_can_be_read() {
    round_trip(&Config::new());
    round_trip(&config());
    round_trip(&listen());
    round_trip(&Listen::unix("/run/games.sock", Framing::Delimited(0)));
    round_trip(&Connect::new(Framing::Packet4));
    round_trip(&connect());
    let bytes = listen().with(|listen| {
        listen.at_capacity = AtCapacity::Refuse {
            farewell: vec![0xFF, 0],
        };
    });
    round_trip(&bytes);
}

/// The names of all fields, those of fields inside behind a dot.
fn names(value: &Value, within: &str, all: &mut BTreeSet<String>) {
    for (name, value) in value.as_object().into_iter().flatten() {
        let name = format!("{within}{name}");
        names(value, &format!("{name}."), all);
        all.insert(name);
    }
}

/// A changed name breaks the files of users.
#[test]
fn the_names_are_stable() {
    let conn = "frame_rate frame_timeout full_duplex handshake_timeout high_watermark idle_timeout \
                linger_bytes linger_timeout low_watermark max_frame min_rate output_limit read_rate \
                write_timeout";
    let socket = "backlog keepalive mode nodelay only_v6 recv_buffer reuse_address reuse_port \
                  send_buffer";
    let keepalive = "interval retries time";
    let both = [("conn", conn), ("socket", socket)];
    let cases = [
        (
            to_value(config()),
            "accept_rate budgets emfile_backoff max_connections memory_limit pending_limits \
             queue_limits recent_closes",
            vec![
                ("budgets", "accepts commands handshakes read_bytes work"),
                ("pending_limits", "connections grace"),
                ("pending_limits.connections", "count"),
                ("queue_limits", "bytes commands"),
            ],
        ),
        (
            to_value(listen()),
            "accept_rate access_rules addrs at_capacity conn evict_silent framing max_connections \
             name proxy_protocol reserved socket source_limits total_frame_rate total_read_rate \
             trusted_proxies",
            [
                &both[..],
                &[
                    ("at_capacity", "refuse"),
                    ("at_capacity.refuse", "farewell"),
                    ("socket.keepalive", keepalive),
                    ("source_limits", "connections prefixes rate"),
                ],
            ]
            .concat(),
        ),
        (
            to_value(connect()),
            "bind conn connect_timeout framing retry socket",
            [
                &both[..],
                &[("retry", "attempts first_delay jitter longest_delay")],
            ]
            .concat(),
        ),
    ];
    for (value, top, inner) in cases {
        let mut found = BTreeSet::new();
        names(&value.expect("data"), "", &mut found);
        let words = |within: String, names: &str| {
            let names = names.split_whitespace();
            names
                .map(|name| format!("{within}{name}"))
                .collect::<Vec<_>>()
        };
        let mut expected: BTreeSet<_> = words(String::new(), top).into_iter().collect();
        for (within, names) in inner {
            expected.extend(words(format!("{within}."), names));
        }
        assert_eq!(found, expected);
    }
}

#[test]
fn what_is_left_out_has_its_default() {
    let config: Config = from_str(r#"{ "max_connections": 5 }"#).expect("options");
    assert_eq!(config, Config::max_connections(5));
    let listen: Listen =
        from_str(r#"{ "addrs": ["[::1]:80"], "framing": "line" }"#).expect("options");
    let expected = Listen::tcp("[::1]:80", Framing::Line);
    assert_eq!(format!("{listen:?}"), format!("{expected:?}"));
    let listen: Listen = from_str("{}").expect("options");
    let mut server: Server = Server::new(Config::new()).expect("a server");
    let listened = server.listen(listen, |_: &mut (), _| Echo);
    assert!(matches!(listened, Err(Error::Address { .. })));
    let never = json!({ "addrs": ["[::1]:80"], "conn": { "idle_timeout": null } });
    let listen: Listen = from_value(never).expect("options");
    assert_eq!(listen.conn.idle_timeout, Duration::MAX);
    let retry: Retry = from_str(r#"{ "attempts": 4 }"#).expect("options");
    assert_eq!(retry, Retry::new(4));
}

#[test]
fn what_cannot_be_read_says_why() {
    let error = |text: &str| {
        from_str::<Listen>(text)
            .map(|_| ())
            .expect_err(text)
            .to_string()
    };
    for (text, words) in [
        (r#"{ "addrs": ["example.com:80"] }"#, "example.com"),
        (
            r#"{ "addrs": ["[::1]:80"], "max_conections": 5 }"#,
            "unknown field `max_conections`",
        ),
        (
            r#"{ "addrs": ["[::1]:80"], "framing": "packet-3" }"#,
            "packet-3",
        ),
        (
            r#"{ "addrs": ["[::1]:80"], "framing": "custom" }"#,
            "custom",
        ),
        (
            r#"{ "addrs": ["[::1]:80"], "accept_rate": "fast" }"#,
            "no rate",
        ),
        (
            r#"{ "addrs": ["[::1]:80"], "access_rules": "allow 10.0.0.0/8" }"#,
            "the last rule",
        ),
        (
            r#"{ "addrs": ["[::1]:80"], "conn": { "idle_timeout": -1 } }"#,
            "negative",
        ),
        (
            r#"{ "addrs": ["[::1]:80"], "conn": { "idle_timeout": 1e300 } }"#,
            "too big",
        ),
    ] {
        let error = error(text);
        assert!(error.contains(words), "{text}: {error}");
    }
}
