//! A listener is where it says, under the options it was given, and stands or falls alone.

use std::io::{self, BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::sync::mpsc;
use std::time::Duration;

use kit::net::{
    await_end, connect, eventually, have, local, ping, recv2, send2, spawn, spawn_echo,
    ChildProcess, Echo, PATIENCE,
};
use portcullis::{
    AtCapacity, Config, Context, Error, Framing, Handler, Keepalive, Listen, ListenerId,
    ListenerState, Outcome, Peer, Refuse, Server, Service,
};

/// A server with no state.
fn server() -> Server {
    Server::new(Config::new()).expect("server")
}

fn echo(_app: &mut (), _peer: Peer) -> Echo {
    Echo
}

/// Sends every line back in capitals.
struct Shout;

impl<A> Handler<A> for Shout {
    fn on_frame(&mut self, cx: &mut Context<'_, A>, frame: &[u8]) -> Outcome {
        cx.conn.send(frame.to_ascii_uppercase())?;
        Ok(())
    }
}

#[test]
fn port_zero_shows_the_real_port() {
    for listen in [
        local(),
        Listen::tcp("[::1]:0", Framing::Packet2),
        Listen::tcp(("localhost", 0), Framing::Packet2),
    ] {
        let server = spawn_echo(Config::new(), listen);
        let addr = server.addr();
        assert_ne!(addr.port(), 0);
        assert_eq!(server.listeners[0].name, addr.to_string());
        ping(&mut connect(addr), b"hello");
    }
}

/// "listen returns only when listening" (issue): the kernel takes clients before the first turn.
#[test]
fn clients_can_connect_before_the_first_turn() {
    let mut server = server();
    let id = server.listen(local(), echo).expect("listen");
    let mut client = connect(kit::net::tcp(
        &server.control().listener(id).expect("there").addr,
    ));
    send2(&mut client, b"early");
    eventually("it is answered", || {
        server
            .poll_once(&mut (), Some(Duration::from_millis(10)))
            .expect("turn");
        server.control().stats().traffic.frames_out == 1
    });
    assert_eq!(recv2(&mut client), b"early");
}

/// The system's default differs; ours does not (`ipv6(7)`, bindv6only).
#[test]
fn an_ipv6_listener_takes_ipv4_only_if_told_to() {
    let peers = |only_v6: Option<bool>| {
        let (tell, told) = mpsc::channel();
        let server = spawn(move || {
            let mut server = server();
            let mut listen = Listen::tcp("[::]:0", Framing::Packet2);
            if let Some(on) = only_v6 {
                listen.socket.only_v6 = on;
            }
            let service = move |_: &mut (), peer: Peer| {
                tell.send(peer.addr).expect("the test waits");
                Echo
            };
            server.listen(listen, service).expect("listen");
            (server, ())
        });
        let port = server.addr().port();
        ping(
            &mut connect(SocketAddr::from(([0, 0, 0, 0, 0, 0, 0, 1], port))),
            b"six",
        );
        let six = told
            .recv_timeout(PATIENCE)
            .expect("a peer")
            .ip()
            .expect("TCP")
            .to_string();
        let four = TcpStream::connect(("127.0.0.1", port))
            .ok()
            .map(|mut client| {
                ping(&mut client, b"four");
                told.recv_timeout(PATIENCE)
                    .expect("a peer")
                    .ip()
                    .expect("TCP")
                    .to_string()
            });
        (six, four)
    };
    assert_eq!(peers(None), ("::1".into(), None));
    assert_eq!(peers(Some(true)), ("::1".into(), None));
    assert_eq!(
        peers(Some(false)),
        ("::1".into(), Some("::ffff:127.0.0.1".into()))
    );
}

#[test]
fn ipv4_and_ipv6_can_have_the_same_port() {
    let server = spawn(|| {
        let mut server = server();
        server.listen(local().name("four"), echo).expect("listen");
        let port = kit::net::tcp(&server.control().listener("four").expect("there").addr).port();
        let six = Listen::tcp(("::1", port), Framing::Packet2).name("six");
        server.listen(six, echo).expect("listen");
        (server, ())
    });
    for listener in &server.listeners {
        ping(&mut connect(kit::net::tcp(&listener.addr)), b"hello");
    }
}

#[test]
fn several_listeners_speak_different_protocols() {
    let server = spawn(|| {
        let mut server = server();
        server.listen(local(), echo).expect("listen");
        let lines = local()
            .name("lines")
            .with(|listen| listen.framing = Framing::Line);
        server.listen(lines, |_: &mut (), _| Shout).expect("listen");
        server
            .listen(
                local()
                    .name("four")
                    .with(|listen| listen.framing = Framing::Packet4),
                echo,
            )
            .expect("listen");
        (server, ())
    });
    let addr = |at: usize| kit::net::tcp(&server.listeners[at].addr);
    ping(&mut connect(addr(0)), b"packet");
    let mut lines = BufReader::new(connect(addr(1)));
    lines.get_mut().write_all(b"line\n").expect("send");
    let mut answer = String::new();
    lines.read_line(&mut answer).expect("an answer");
    assert_eq!(answer, "LINE\n");
    let mut four = connect(addr(2));
    four.write_all(b"\0\0\0\x03abc").expect("send");
    // A packet-4 header is an empty packet-2 frame and the length of the next.
    assert_eq!(
        (recv2(&mut four), recv2(&mut four)),
        (vec![], b"abc".to_vec())
    );
    let seen: Vec<_> =
        server.ask(|(), control| control.listeners().iter().map(|l| l.accepted).collect());
    assert_eq!(seen, [1, 1, 1]);
}

#[test]
fn a_taken_name_or_address_is_an_error_and_the_rest_runs_on() {
    let server = spawn(|| {
        let mut server = server();
        server.listen(local().name("games"), echo).expect("listen");
        let taken = kit::net::tcp(&server.control().listener("games").expect("there").addr);
        let error = server
            .listen(local().name("games"), echo)
            .expect_err("taken");
        assert!(
            matches!(&error, Error::NameTaken { name } if name == "games"),
            "{error:?}"
        );
        assert!(error.to_string().contains("\"games\""), "{error}");
        // The default name is a name like any other.
        let first = server.listen(local(), echo).expect("listen");
        let default = server.control().listener(first).expect("there").name;
        let error = server
            .listen(local().name(default), echo)
            .expect_err("taken");
        assert!(matches!(error, Error::NameTaken { .. }), "{error:?}");

        let error = server
            .listen(Listen::tcp(taken, Framing::Packet2), echo)
            .expect_err("taken");
        assert!(
            matches!(&error, Error::AddressInUse { addr } if *addr == taken),
            "{error:?}"
        );
        assert!(error.to_string().contains(&taken.to_string()), "{error}");
        assert_eq!(server.control().listeners().len(), 2);
        (server, ())
    });
    for listener in &server.listeners {
        ping(&mut connect(kit::net::tcp(&listener.addr)), b"untouched");
    }
}

#[test]
fn a_default_name_that_is_taken_leaves_no_port_behind() {
    let mut server = server();
    // The socket does not listen: it only reserves the number.
    let port = TcpListener::bind("127.0.0.1:0")
        .expect("bind")
        .local_addr()
        .expect("addr")
        .port();
    server
        .listen(local().name(format!("127.0.0.1:{port}")), echo)
        .expect("listen");
    let error = server
        .listen(Listen::tcp(("127.0.0.1", port), Framing::Packet2), echo)
        .expect_err("taken");
    assert!(matches!(error, Error::NameTaken { .. }), "{error:?}");
    TcpListener::bind(("127.0.0.1", port)).expect("the port is free");
}

/// One port on two addresses and in both families: each listener has a name of its own.
#[test]
fn one_port_on_several_addresses_needs_no_names() {
    let mut server = server();
    let id = server.listen(local(), echo).expect("listen");
    let port = server.control().listener(id).expect("open").addr.port();
    let port = port.expect("TCP");
    for host in ["127.0.0.2", "::1"] {
        server
            .listen(Listen::tcp((host, port), Framing::Packet2), echo)
            .unwrap_or_else(|error| panic!("{error}"));
    }
    let listeners = server.control().listeners();
    let names: Vec<_> = listeners.iter().map(|listener| &*listener.name).collect();
    let expected = [
        format!("127.0.0.1:{port}"),
        format!("127.0.0.2:{port}"),
        format!("[::1]:{port}"),
    ];
    assert_eq!(names, expected);
    for listener in &listeners {
        let found = server
            .control()
            .listener(&*listener.name)
            .expect("by its name");
        assert_eq!(found.id, listener.id);
    }
    // The same address twice is in use, by this server too.
    let error = server
        .listen(Listen::tcp(("127.0.0.1", port), Framing::Packet2), echo)
        .expect_err("in use");
    assert!(matches!(error, Error::AddressInUse { .. }), "{error:?}");
}

/// A port is never shared without a word.
#[test]
fn a_port_is_shared_only_if_all_ask_for_it() {
    let sharing = || {
        Listen::tcp("127.0.0.1:0", Framing::Packet2).with(|listen| listen.socket.reuse_port = true)
    };
    let one = spawn_echo(Config::new(), sharing());
    let addr = one.addr();
    let error = server()
        .listen(Listen::tcp(addr, Framing::Packet2), echo)
        .expect_err("not shared");
    assert!(matches!(error, Error::AddressInUse { .. }), "{error:?}");
    let other = spawn_echo(
        Config::new(),
        Listen::tcp(addr, Framing::Packet2).with(|listen| listen.socket.reuse_port = true),
    );
    let alone = spawn_echo(Config::new(), local());
    let error = server()
        .listen(
            Listen::tcp(alone.addr(), Framing::Packet2)
                .with(|listen| listen.socket.reuse_port = true),
            echo,
        )
        .expect_err("not shared");
    assert!(matches!(error, Error::AddressInUse { .. }), "{error:?}");

    let mut clients: Vec<_> = (0..100).map(|_| connect(addr)).collect();
    for client in &mut clients {
        ping(client, b"whoever");
    }
    drop(clients);
    let (one, other) = (one.finish().0.accepted, other.finish().0.accepted);
    assert_eq!(one + other, 100);
    #[cfg(target_os = "linux")] // elsewhere the last one gets all
    assert!(one > 0 && other > 0, "{one} and {other}");
}

#[test]
fn a_bad_address_says_what_was_given() {
    for given in [
        "nonsense",
        "127.0.0.1",
        "127.0.0.1:99999",
        "127.0.0.1:x",
        ":",
        "",
    ] {
        let error = server()
            .listen(Listen::tcp(given, Framing::Packet2), echo)
            .expect_err("no address");
        assert!(matches!(error, Error::Address { .. }), "{given}: {error:?}");
        assert!(error.to_string().contains(&format!("{given:?}")), "{error}");
    }
    // TEST-NET-1 (RFC 5737): an address without a host.
    let error = server()
        .listen(Listen::tcp("192.0.2.1:0", Framing::Packet2), echo)
        .expect_err("not ours");
    assert!(matches!(error, Error::Listen { .. }), "{error:?}");
    assert!(error.to_string().contains("192.0.2.1"), "{error}");
}

#[test]
fn a_bad_option_is_named() {
    let second = Duration::from_secs(1);
    let keepalive = |time, interval, retries| {
        local().with(|listen| {
            listen.socket.keepalive = Some(Keepalive {
                time,
                interval,
                retries,
            })
        })
    };
    let bad = [
        (
            "low_watermark",
            local().with(|listen| {
                listen.conn.low_watermark = 10;
                listen.conn.high_watermark = 10;
            }),
        ),
        (
            "output_limit",
            local().with(|listen| {
                listen.conn.low_watermark = 10;
                listen.conn.high_watermark = 20;
                listen.conn.output_limit = 19;
            }),
        ),
        (
            "max_frame",
            local().with(|listen| listen.conn.max_frame = Some(0)),
        ),
        (
            "handshake_timeout",
            local().with(|listen| listen.conn.handshake_timeout = Duration::ZERO),
        ),
        (
            "frame_timeout",
            local().with(|listen| listen.conn.frame_timeout = Duration::ZERO),
        ),
        (
            "idle_timeout",
            local().with(|listen| listen.conn.idle_timeout = Duration::ZERO),
        ),
        (
            "write_timeout",
            local().with(|listen| listen.conn.write_timeout = Duration::ZERO),
        ),
        (
            "at_capacity",
            local().with(|listen| {
                listen.at_capacity = AtCapacity::Refuse {
                    farewell: vec![0; 4097],
                };
            }),
        ),
        ("name", local().name("")),
        ("keepalive", keepalive(Duration::ZERO, second, 1)),
        (
            "keepalive",
            keepalive(Duration::from_millis(999), second, 1),
        ),
        ("keepalive", keepalive(Duration::MAX, second, 1)),
        ("keepalive", keepalive(second, Duration::ZERO, 1)),
        ("keepalive", keepalive(second, Duration::MAX, 1)),
        ("keepalive", keepalive(second, second, 0)),
        ("keepalive", keepalive(second, second, u32::MAX)),
        (
            "recv_buffer",
            local().with(|listen| listen.socket.recv_buffer = Some(usize::MAX)),
        ),
        (
            "send_buffer",
            local().with(|listen| listen.socket.send_buffer = Some(usize::MAX)),
        ),
    ];
    for (name, listen) in bad {
        let mut server = server();
        let error = server.listen(listen, echo).expect_err(name);
        assert!(
            matches!(error, Error::Option { option, .. } if option == name),
            "{name}: {error:?}"
        );
        assert!(error.to_string().contains(name), "{error}");
        assert!(server.control().listeners().is_empty());
    }
    let bad = [
        (
            "budgets.accepts",
            Config::new().with(|config| config.budgets.accepts = 0),
        ),
        (
            "budgets.handshakes",
            Config::new().with(|config| config.budgets.handshakes = 0),
        ),
        (
            "budgets.read_bytes",
            Config::new().with(|config| config.budgets.read_bytes = 0),
        ),
        (
            "budgets.commands",
            Config::new().with(|config| config.budgets.commands = 0),
        ),
        (
            "budgets.work",
            Config::new().with(|config| config.budgets.work = 0),
        ),
        (
            "queue_limits.commands",
            Config::new().with(|config| config.queue_limits.commands = 0),
        ),
        ("max_connections", Config::max_connections(usize::MAX)),
        (
            "emfile_backoff",
            Config::new().with(|config| config.emfile_backoff = Duration::ZERO),
        ),
        (
            "emfile_backoff",
            Config::new().with(|config| config.emfile_backoff = Duration::MAX),
        ),
    ];
    for (name, config) in bad {
        let error = Server::<()>::new(config).expect_err(name);
        assert!(
            matches!(error, Error::Option { option, .. } if option == name),
            "{name}: {error:?}"
        );
    }
}

/// The extremes that a socket takes must not be errors.
#[test]
fn the_limits_of_the_options_work() {
    let longest = Duration::from_secs(32_767);
    for listen in [
        local().with(|listen| {
            listen.socket.keepalive = Some(Keepalive {
                time: longest,
                interval: longest,
                retries: 127,
            })
        }),
        local().with(|listen| {
            listen.socket.keepalive = Some(Keepalive {
                time: Duration::from_secs(1),
                interval: Duration::from_secs(1),
                retries: 1,
            });
        }),
        local().with(|listen| {
            listen.socket.recv_buffer = Some(1);
            listen.socket.send_buffer = Some(1);
        }),
        local().with(|listen| listen.socket.backlog = u32::MAX),
        local().with(|listen| listen.socket.backlog = 0),
        local().with(|listen| {
            listen.conn.idle_timeout = Duration::MAX;
            listen.conn.frame_timeout = Duration::MAX;
            listen.conn.write_timeout = Duration::MAX;
            listen.conn.linger_timeout = Duration::MAX;
            listen.conn.linger_bytes = usize::MAX;
            listen.conn.max_frame = Some(usize::MAX);
        }),
    ] {
        let what = format!("{listen:?}");
        let server = spawn_echo(Config::new(), listen);
        let mut client = connect(server.addr());
        ping(&mut client, what.as_bytes());
    }
}

/// A std listener is blocking; left so, the accept loop would hold the whole server.
#[test]
fn a_blocking_listener_can_be_adopted() {
    let socket = TcpListener::bind("127.0.0.1:0").expect("bind");
    let addr = socket.local_addr().expect("addr");
    // Waits already when the socket is handed over.
    let mut early = connect(addr);
    let server = spawn(move || {
        let mut server = server();
        server
            .listen(Listen::adopted(socket, Framing::Packet2), echo)
            .expect("adopt");
        (server, ())
    });
    assert_eq!(server.addr(), addr);
    assert_eq!(server.listeners[0].name, addr.to_string());
    ping(&mut early, b"early");
    ping(&mut connect(addr), b"late");
    // A loop that is held in accept would not answer.
    assert_eq!(server.ask(|(), control| control.stats().accepted), 2);
}

#[test]
fn only_a_listening_socket_can_be_adopted() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
    let connected = connect(listener.local_addr().expect("addr"));
    let mut server = server();
    let error = server
        .listen(Listen::adopted(connected, Framing::Packet2), echo)
        .expect_err("no listener");
    assert!(matches!(error, Error::Os { .. }), "{error:?}");
    let udp = std::net::UdpSocket::bind("127.0.0.1:0").expect("bind");
    let error = server
        .listen(Listen::adopted(udp, Framing::Packet2), echo)
        .expect_err("no TCP");
    assert!(matches!(error, Error::Os { .. }), "{error:?}");
    assert!(server.control().listeners().is_empty());
}

/// An echo service that passes on what it hears of its listener's end.
struct Recorder(mpsc::Sender<(ListenerId, String)>);

impl Service<()> for Recorder {
    fn accept(&mut self, _app: &mut (), _peer: Peer) -> Result<Box<dyn Handler<()>>, Refuse> {
        Ok(Box::new(Echo))
    }

    fn on_listener_lost(&mut self, _app: &mut (), listener: ListenerId, error: &io::Error) {
        self.0
            .send((listener, error.to_string()))
            .expect("the test waits");
    }
}

/// The process that passed the socket on still has it too, and may shut it down.
#[test]
fn a_listener_that_is_shut_down_elsewhere_is_closed_and_reported() {
    let socket = TcpListener::bind("127.0.0.1:0").expect("bind");
    let shared = socket2::Socket::from(socket.try_clone().expect("clone"));
    let (tell, told) = mpsc::channel();
    let server = spawn(move || {
        let mut server = server();
        let listen = Listen::adopted(socket, Framing::Packet2).name("shared");
        server.listen_with(listen, Recorder(tell)).expect("adopt");
        server.listen(local(), echo).expect("listen");
        (server, ())
    });
    let mut inside = connect(server.addr());
    ping(&mut inside, b"in");
    shared.shutdown(std::net::Shutdown::Both).expect("shutdown");
    let (id, error) = told.recv_timeout(PATIENCE).expect("it is told");
    assert_eq!(id, server.listeners[0].id);
    assert!(!error.is_empty());
    ping(&mut inside, b"lives on");
    ping(
        &mut connect(kit::net::tcp(&server.listeners[1].addr)),
        b"untouched",
    );
    assert_eq!(server.ask(|(), control| control.listeners().len()), 1);
    assert!(told.try_recv().is_err(), "told once");
}

/// The notice is for services that want it.
#[test]
fn a_listener_that_is_shut_down_elsewhere_is_closed_without_a_notice_too() {
    let socket = TcpListener::bind("127.0.0.1:0").expect("bind");
    let shared = socket2::Socket::from(socket.try_clone().expect("clone"));
    let server = spawn(move || {
        let mut server = server();
        let listen = Listen::adopted(socket, Framing::Packet2).name("shared");
        server.listen(listen, echo).expect("adopt");
        server.listen(local(), echo).expect("listen");
        (server, ())
    });
    let mut inside = connect(server.addr());
    ping(&mut inside, b"in");
    shared.shutdown(std::net::Shutdown::Both).expect("shutdown");
    eventually("it is closed", || {
        server.ask(|(), control| control.listener("shared").is_err())
    });
    ping(&mut inside, b"lives on");
    let other = kit::net::tcp(&server.listeners[1].addr);
    ping(&mut connect(other), b"untouched");
}

#[test]
fn a_suspended_listener_lets_clients_wait() {
    let server = spawn_echo(Config::new(), local().name("door"));
    let mut inside = connect(server.addr());
    ping(&mut inside, b"in");
    server
        .ask(|(), control| {
            control.suspend("door")?;
            control.suspend("door")
        })
        .expect("suspended");
    let mut waiting: Vec<_> = (0..10).map(|_| connect(server.addr())).collect();
    for client in &mut waiting {
        send2(client, b"waiting");
    }
    ping(&mut inside, b"lives on");
    let door = server.ask(|(), control| control.listener("door").expect("there"));
    assert_eq!((door.state, door.accepted), (ListenerState::Suspended, 1));
    server
        .ask(|(), control| {
            control.resume("door")?;
            control.resume("door")
        })
        .expect("resumed");
    for client in &mut waiting {
        assert_eq!(recv2(client), b"waiting");
    }
    drop((inside, waiting));
    assert_eq!(server.finish().0.accepted, 11);
}

#[test]
fn a_listener_can_be_suspended_before_it_has_run() {
    let mut server = server();
    let id = server.listen(local(), echo).expect("listen");
    let addr = kit::net::tcp(&server.control().listener(id).expect("there").addr);
    server.control().suspend(id).expect("there");
    let mut client = connect(addr);
    send2(&mut client, b"hello");
    for _ in 0..10 {
        server
            .poll_once(&mut (), Some(Duration::ZERO))
            .expect("turn");
    }
    // Nothing to do for it, and nothing that would make an outer loop spin.
    assert_eq!(
        (server.control().stats().accepted, server.next_timeout()),
        (0, None)
    );
    server.control().resume(id).expect("there");
    eventually("it is answered", || {
        server
            .poll_once(&mut (), Some(Duration::from_millis(10)))
            .expect("turn");
        server.control().stats().traffic.frames_out == 1
    });
    assert_eq!(recv2(&mut client), b"hello");
}

#[test]
fn a_closed_listener_frees_its_port_and_name_and_keeps_its_connections() {
    let mut server = server();
    server.listen(local().name("door"), echo).expect("listen");
    server.listen(local().name("other"), echo).expect("listen");
    let (door, other) = (
        kit::net::tcp(&server.control().listeners()[0].addr),
        kit::net::tcp(&server.control().listeners()[1].addr),
    );
    let turn = |server: &mut Server| {
        server
            .poll_once(&mut (), Some(Duration::from_millis(10)))
            .expect("turn")
    };
    let inside = connect(door);
    eventually("it is in", || {
        turn(&mut server);
        server.control().stats().open == 1
    });
    let mut waiting = connect(door);
    server.control().close_listener("door").expect("there");
    await_end(&mut waiting);
    assert!(TcpStream::connect(door).is_err(), "the port is closed");
    let gone = server.control().close_listener("door").expect_err("gone");
    assert!(matches!(gone, Error::NoListener { .. }), "{gone:?}");

    // The same name and port again, although a connection of the former lives.
    server
        .listen(Listen::tcp(door, Framing::Packet2).name("door"), echo)
        .expect("listen");
    let mut clients = [
        inside.try_clone().expect("clone"),
        connect(door),
        connect(other),
    ];
    for client in &mut clients {
        send2(client, b"served");
    }
    eventually("all are answered", || {
        turn(&mut server);
        server.control().stats().traffic.frames_out == 3
    });
    for client in &mut clients {
        assert_eq!(recv2(client), b"served");
    }
    assert_eq!(
        server
            .control()
            .listener("door")
            .expect("there")
            .connections,
        1
    );
    drop(clients);
    inside.shutdown(std::net::Shutdown::Both).expect("shutdown");
    eventually("all are gone", || {
        turn(&mut server);
        server.control().stats().open == 0
    });
    assert_eq!(server.control().listeners().len(), 2);
}

#[cfg(target_os = "linux")]
mod linux {
    use super::*;

    /// What `ss` says about the server's end of a connection.
    fn far_end(client: &TcpStream) -> String {
        let ours = client.local_addr().expect("addr").port();
        let theirs = client.peer_addr().expect("addr").port();
        let output = Command::new("ss")
            .args(["-tnoimH", "sport", "=", &format!(":{theirs}"), "and"])
            .args(["dport", "=", &format!(":{ours}")])
            .output()
            .expect("ss");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Accepted sockets are not configured: they inherit the listening socket's options (`tcp(7)`).
    #[test]
    fn connections_inherit_keepalive_and_buffer_sizes() {
        if !have("ss", "-V") {
            return;
        }
        let plain = spawn_echo(Config::new(), local());
        let mut client = connect(plain.addr());
        ping(&mut client, b"plain");
        let seen = far_end(&client);
        assert!(
            seen.contains("skmem:") && !seen.contains("timer:(keepalive"),
            "{seen}"
        );

        let keepalive = Keepalive {
            time: Duration::from_secs(30_000),
            interval: Duration::from_secs(7),
            retries: 3,
        };
        let listen = local().with(|listen| {
            listen.socket.keepalive = Some(keepalive);
            listen.socket.recv_buffer = Some(50_000);
            listen.socket.send_buffer = Some(60_000);
        });
        let tuned = spawn_echo(Config::new(), listen);
        let mut client = connect(tuned.addr());
        ping(&mut client, b"tuned");
        let seen = far_end(&client);
        // The kernel doubles what it is asked for (`socket(7)`).
        assert!(
            seen.contains(",rb100000,") && seen.contains(",tb120000,"),
            "{seen}"
        );
        // Once our answer is acknowledged, the keepalive timer is the one that runs.
        let mut seen = String::new();
        eventually("the keepalive timer runs", || {
            seen = far_end(&client);
            seen.contains("timer:(keepalive,")
        });
        assert!(
            seen.contains("(keepalive,499min") || seen.contains("(keepalive,500min"),
            "{seen}"
        );
    }

    /// A number that `ss` reports, 0 if it does not.
    fn figure(seen: &str, name: &str) -> u32 {
        let word = seen
            .split_whitespace()
            .find_map(|word| word.strip_prefix(name));
        word.map_or(0, |figure| figure.parse().expect("a number"))
    }

    /// The segments in which ten small writes reach a client that acknowledges late.
    fn segments(nodelay: Option<bool>) -> u32 {
        let listen = match nodelay {
            Some(on) => local().with(|listen| listen.socket.nodelay = on),
            None => local(),
        };
        let server = spawn_echo(Config::new(), listen);
        let mut client = connect(server.addr());
        // After some conversation its kernel saves acknowledgements for its answers.
        for _ in 0..20 {
            ping(&mut client, b"x");
        }
        let before = far_end(&client);
        for at in 1..=10 {
            let sent = server.ask(|(), control| {
                let id = control.connections()[0].id;
                control.conn(id).expect("there").send(b"x")
            });
            sent.expect("sent");
            server.until("it is written", |stats| {
                stats.traffic.bytes_out == 3 * (20 + at)
            });
        }
        let mut seen = String::new();
        eventually("all is acknowledged", || {
            seen = far_end(&client);
            figure(&seen, "bytes_acked:") == 3 * 30
        });
        figure(&seen, "data_segs_out:") - figure(&before, "data_segs_out:")
    }

    /// With Nagle's algorithm small writes wait for the acknowledgement of earlier ones, and leave together.
    #[test]
    fn connections_inherit_nodelay() {
        if !have("ss", "-V") {
            return;
        }
        // More when the kernel probes for a lost tail.
        assert!(segments(None) >= 10, "on by default");
        assert!(segments(Some(true)) >= 10);
        // Between two of our writes a busy machine may find the time for an acknowledgement.
        eventually("writes are joined", || segments(Some(false)) < 10);
    }
}

/// The end that closes first keeps the address in TIME_WAIT for a minute.
#[test]
fn a_restart_finds_its_port_in_time_wait() {
    let first = spawn_echo(Config::new(), local());
    let addr = first.addr();
    let mut clients: Vec<_> = (0..5).map(|_| connect(addr)).collect();
    for client in &mut clients {
        ping(client, b"before");
    }
    // We stay until the server has said goodbye: it is the one that closes first.
    let ended = std::thread::spawn(|| first.finish());
    for client in &mut clients {
        await_end(client);
    }
    drop(clients);
    ended.join().expect("an orderly end");
    // It is in TIME_WAIT indeed: without address reuse the bind fails.
    let strict = server().listen(
        Listen::tcp(addr, Framing::Packet2).with(|listen| listen.socket.reuse_address = false),
        echo,
    );
    assert!(
        matches!(strict, Err(Error::AddressInUse { .. })),
        "{strict:?}"
    );
    let second = spawn_echo(Config::new(), Listen::tcp(addr, Framing::Packet2));
    ping(&mut connect(addr), b"after");
    drop(second);
}

/// After kill -9 with clients connected.
#[test]
fn a_killed_server_restarts_at_once() {
    let (first, addr) = ChildProcess::echo(&[]);
    let mut clients: Vec<_> = (0..5).map(|_| connect(addr)).collect();
    for client in &mut clients {
        ping(client, b"before");
    }
    first.signal("KILL");
    first.finish();
    let mut command = Command::new(kit::net::example("echo"));
    command.args(["--listen", &addr.to_string()]);
    let second = ChildProcess::start(&mut command);
    assert_eq!(second.address(), addr);
    ping(&mut connect(addr), b"after");
    for client in &mut clients {
        await_end(client);
    }
}
