//! Options change under way: those that are named, all or none, and nothing else with them.

use std::time::Duration;

use kit::net::{connect, local, ping, read_to_end, spawn_echo, PATIENCE};
use portcullis::{
    AtCapacity, CloseReason, Config, Error, Framing, HandleError, Keepalive, Listen, Server,
};

type Change = fn(&mut Listen);

/// A server that was never run, with one listener.
fn idle() -> Server {
    let mut server = Server::new(Config::new()).expect("server");
    let listen = local()
        .name("it")
        .with(|listen| listen.max_connections = Some(7));
    server
        .listen(listen, |_: &mut (), _| kit::net::Echo)
        .expect("listen");
    server
}

#[test]
fn a_change_is_for_later_connections() {
    let server = spawn_echo(Config::new(), local().name("it"));
    let mut early = connect(server.addr());
    ping(&mut early, b"early");
    server
        .handle
        .change(PATIENCE, |control| {
            control.reconfigure_listener("it", |listen| listen.conn.max_frame = Some(4))
        })
        .expect("a good value");
    let mut late = connect(server.addr());
    ping(&mut late, b"late");
    kit::net::send2(&mut late, b"longer");
    assert_eq!(read_to_end(&mut late), b"");
    ping(&mut early, b"those inside keep what they had");
    let stats = server.until("it is counted", |stats| stats.closed_total() == 1);
    assert_eq!(stats.closed(CloseReason::FrameTooLarge), 1);
}

/// The listener's limit and its policy hold from the next accept on.
#[test]
fn limits_are_live() {
    let server = spawn_echo(Config::new(), local().name("it"));
    let mut first = connect(server.addr());
    ping(&mut first, b"in");
    let full = AtCapacity::Refuse {
        farewell: b"full".to_vec(),
    };
    server
        .handle
        .change(PATIENCE, move |control| {
            control.reconfigure_listener("it", |listen| {
                listen.max_connections = Some(1);
                listen.at_capacity = full.clone();
            })
        })
        .expect("good values");
    assert_eq!(read_to_end(&mut connect(server.addr())), b"full");
    server
        .handle
        .change(PATIENCE, |control| {
            control.reconfigure(|config| config.max_connections = 0)
        })
        .expect("a good value");
    server.until("it is published", |stats| stats.max_connections == 0);
    ping(&mut first, b"still in");
    server
        .handle
        .change(PATIENCE, |control| {
            control.reconfigure_listener("it", |listen| listen.at_capacity = AtCapacity::Wait)
        })
        .expect("a good value");
    let mut waiting = connect(server.addr());
    server
        .handle
        .change(PATIENCE, |control| {
            control.reconfigure(|config| config.max_connections = 2)
        })
        .expect("a good value");
    drop(first);
    ping(&mut waiting, b"at last");
    // Its own limit is taken away, and the server's is the only one.
    server
        .handle
        .change(PATIENCE, |control| {
            control.reconfigure_listener("it", |listen| listen.max_connections = None)
        })
        .expect("no limit");
    ping(&mut connect(server.addr()), b"beside it");
}

#[test]
fn a_bad_value_changes_nothing() {
    let mut server = idle();
    let before = server.control().listener("it").expect("there");
    let changes: [(&str, Change); 5] = [
        ("low_watermark", |listen| {
            listen.max_connections = Some(1);
            listen.conn.low_watermark = 10;
            listen.conn.high_watermark = 5;
        }),
        ("max_frame", |listen| {
            listen.max_connections = Some(1);
            listen.conn.max_frame = Some(0);
        }),
        ("idle_timeout", |listen| {
            listen.max_connections = Some(1);
            listen.conn.idle_timeout = Duration::ZERO;
        }),
        ("output_limit", |listen| {
            listen.max_connections = Some(1);
            listen.conn.output_limit = 1;
        }),
        ("name", |listen| *listen = listen.clone().name("")),
    ];
    for (option, change) in changes {
        match server.control().reconfigure_listener("it", change) {
            Err(Error::Option { option: named, .. }) => assert_eq!(named, option),
            other => panic!("{option}: {other:?}"),
        }
        assert_eq!(
            server.control().listener("it").expect("there"),
            before,
            "{option}"
        );
    }
    let changed = server.control().reconfigure(|config| {
        config.max_connections = 3;
        config.budgets.accepts = 0;
    });
    assert!(
        matches!(
            changed,
            Err(Error::Option {
                option: "budgets.accepts",
                ..
            })
        ),
        "{changed:?}"
    );
    assert_eq!(server.control().stats().max_connections, 1024);
}

/// What belongs to the socket waits for the next `listen`, and says so.
#[test]
fn an_open_port_keeps_its_socket() {
    let mut server = idle();
    let changes: [(&str, Change); 10] = [
        ("tcp", |listen| {
            *listen = Listen::tcp("127.0.0.1:1", Framing::Packet2).name("it")
        }),
        ("name", |listen| *listen = listen.clone().name("another")),
        ("backlog", |listen| listen.socket.backlog = 5),
        ("nodelay", |listen| listen.socket.nodelay = false),
        ("only_v6", |listen| listen.socket.only_v6 = false),
        ("reuse_address", |listen| {
            listen.socket.reuse_address = false
        }),
        ("reuse_port", |listen| listen.socket.reuse_port = true),
        ("keepalive", |listen| {
            listen.socket.keepalive = Some(Keepalive {
                time: Duration::from_secs(9),
                interval: Duration::from_secs(9),
                retries: 9,
            });
        }),
        ("recv_buffer", |listen| {
            listen.socket.recv_buffer = Some(4096)
        }),
        ("send_buffer", |listen| {
            listen.socket.send_buffer = Some(4096)
        }),
    ];
    for (option, change) in changes {
        match server.control().reconfigure_listener("it", change) {
            Err(Error::Option {
                option: named,
                problem,
            }) => {
                assert_eq!(named, option);
                assert!(problem.contains("listen again"), "{problem}");
            }
            other => panic!("{option}: {other:?}"),
        }
    }
    assert_eq!(
        server
            .control()
            .listener("it")
            .expect("there")
            .max_connections,
        7
    );
}

/// The error names the option that was used: the address of a Unix listener is no option `tcp`.
#[test]
fn a_changed_address_is_named_by_its_kind() {
    let place = kit::net::Place::new();
    let (path, other) = (place.path("one"), place.path("two"));
    let mut server = idle();
    server
        .listen(
            Listen::unix(&path, Framing::Packet2).name("unix"),
            |_: &mut (), _| kit::net::Echo,
        )
        .expect("listen");
    for (which, listen, option) in [
        (
            "unix",
            Listen::unix(&other, Framing::Packet2).name("unix"),
            "unix",
        ),
        (
            "unix",
            Listen::tcp("127.0.0.1:1", Framing::Packet2).name("unix"),
            "tcp",
        ),
        (
            "it",
            Listen::unix(&other, Framing::Packet2).name("it"),
            "unix",
        ),
        #[cfg(target_os = "linux")]
        (
            "it",
            Listen::unix_abstract("it", Framing::Packet2).name("it"),
            "unix_abstract",
        ),
    ] {
        let changed = server
            .control()
            .reconfigure_listener(which, |options| *options = listen.clone());
        match changed {
            Err(Error::Option { option: named, .. }) => assert_eq!(named, option),
            other => panic!("{option}: {other:?}"),
        }
    }
}

#[test]
fn a_handle_tells_what_was_wrong() {
    let server = spawn_echo(Config::new(), local());
    let gone = server.handle.change(PATIENCE, |control| {
        control.reconfigure_listener("nobody", |_| ())
    });
    assert!(matches!(gone, Err(HandleError::NoListener(_))), "{gone:?}");
    let bad = server.handle.change(PATIENCE, |control| {
        control.reconfigure(|config| config.budgets.read_bytes = 0)
    });
    match bad {
        Err(HandleError::Refused(words)) => {
            assert!(words.contains("budgets.read_bytes"), "{words}")
        }
        other => panic!("{other:?}"),
    }
    ping(&mut connect(server.addr()), b"unharmed");
}

/// esockd's `set_max_connections` made a TLS listener a plain one: what is not named stays.
#[cfg(feature = "tls")]
#[test]
fn a_limit_does_not_strip_tls() {
    let config = std::sync::Arc::new(kit::tls::Site::new().server());
    let server = spawn_echo(Config::new(), local().name("it").tls(config));
    server
        .handle
        .change(PATIENCE, |control| {
            control.reconfigure_listener("it", |listen| listen.max_connections = Some(5))
        })
        .expect("a good value");
    let mut plain = connect(server.addr());
    kit::net::send2(&mut plain, b"plain");
    let _ = read_to_end(&mut plain);
    server.until("it is counted", |stats| {
        stats.closed(CloseReason::NotTls) == 1
    });
}
