//! Outgoing connections: the same machine as those that come in, on real sockets.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener};
use std::os::unix::net::UnixListener;
use std::time::Duration;

use kit::net::{
    connect, current_stats, local, ping, read_to_end, recv2, reset, send2, spawn, spawn_echo, Echo,
    Place, Running, PATIENCE,
};
use kit::outgoing::{
    accepted, closed_addr, full_listener, half_closing_probe, probe, std_listener, with_conn,
    Heard, Told,
};
use portcullis::{
    Addr, CloseReason, Closed, Config, ConnId, Connect, Context, Error, Framing, Handler, Outcome,
    Retry, Server, State,
};

/// A server that listens nowhere.
fn client() -> Running {
    spawn(|| (Server::new(Config::new()).expect("server"), ()))
}

#[track_caller]
fn dial(server: &Running, addr: impl Into<Addr>, options: Connect) -> (ConnId, Heard) {
    let (probe, heard) = probe();
    let addr = addr.into();
    let id = server.ask(move |(), control| control.connect(addr, options, probe));
    (id.expect("it is begun"), heard)
}

/// Frames go to and fro, and the books are right.
#[test]
fn frames_go_both_ways() {
    let (listener, addr) = std_listener();
    let server = client();
    let (id, heard) = dial(&server, addr, Connect::new(Framing::Packet2));
    let mut peer = accepted(&listener);
    assert_eq!(heard.opened(), id);
    send2(&mut peer, b"hello");
    assert_eq!(heard.next(), Told::Frame(b"hello".to_vec()));
    server.handle.send(id, b"and you".to_vec()).expect("sent");
    assert_eq!(recv2(&mut peer), b"and you");
    let info = server.ask(|(), control| control.connections().remove(0));
    assert_eq!(
        (info.id, info.listener, info.state),
        (id, None, State::Open)
    );
    assert_eq!(info.peer, addr);
    assert_eq!(
        server.ask(move |(), control| with_conn(control, id, |conn| conn
            .local_addr()
            .expect("bound"))),
        peer.peer_addr().expect("connected")
    );
    drop(peer);
    assert_eq!(heard.next(), Told::Finished);
    assert_eq!(heard.next(), Told::Closed(CloseReason::Finished));
    heard.is_all();
    let stats = server.until("it is gone", |stats| stats.open == 0);
    assert_eq!((stats.accepted, stats.outgoing, stats.opened), (0, 1, 1));
    assert_eq!(
        (stats.closed(CloseReason::Finished), stats.closed_total()),
        (1, 1)
    );
}

#[test]
fn a_refusal_is_told_once_with_the_kernels_error() {
    let server = client();
    let (_, heard) = dial(&server, closed_addr(), Connect::new(Framing::Packet2));
    let (told, words) = heard.next_with_words();
    assert_eq!(
        told,
        Told::Failed(CloseReason::ConnectFailed, Some(libc::ECONNREFUSED))
    );
    assert!(
        words.starts_with("could not connect: Connection refused"),
        "{words}"
    );
    heard.is_all();
    let stats = server.until("it is gone", |stats| stats.open == 0);
    assert_eq!(
        (stats.outgoing, stats.opened, stats.closed_total()),
        (1, 0, 1)
    );
    let closes = server.ask(|(), control| control.recent_closes());
    assert_eq!(
        (closes[0].listener, closes[0].reason),
        (None, CloseReason::ConnectFailed)
    );
    assert!(
        closes[0].to_string().contains(" to 127.0.0.1:"),
        "{}",
        closes[0]
    );
}

/// What the kernel refuses at once is an error of the call: no slot, and the handler hears nothing.
#[test]
fn what_cannot_be_begun_is_an_error_at_once() {
    let server = client();
    let (handler, heard) = probe();
    // connect(2): a broadcast address, and no permission asked for (EACCES), or no route (ENETUNREACH).
    let broadcast = SocketAddr::from(([255, 255, 255, 255], 80));
    let outcome = server.ask(move |(), control| {
        control.connect(broadcast, Connect::new(Framing::Packet2), handler)
    });
    let Err(Error::Connect { addr, source }) = outcome else {
        panic!("{outcome:?}");
    };
    assert!(addr == broadcast && source.raw_os_error().is_some());
    heard.is_all();
    let place = Place::new();
    let path = place.path("nobody.sock");
    let (handler, heard) = probe();
    let outcome = server.ask(move |(), control| {
        control.connect(Addr::unix(path), Connect::new(Framing::Packet2), handler)
    });
    assert!(
        matches!(&outcome, Err(Error::Connect { source, .. }) if source.kind() == std::io::ErrorKind::NotFound),
        "{outcome:?}"
    );
    heard.is_all();
    assert_eq!(current_stats(&server.handle).outgoing, 0);
}

/// Without a reply the attempt ends at its timeout.
#[cfg(target_os = "linux")]
#[test]
fn silence_is_a_timeout() {
    let full = full_listener();
    let server = client();
    let (_, heard) = dial(
        &server,
        full.addr,
        Connect::new(Framing::Packet2)
            .with(|connect| connect.connect_timeout = Duration::from_millis(100)),
    );
    assert_eq!(
        heard.next(),
        Told::Failed(CloseReason::ConnectTimeout, None)
    );
    heard.is_all();
}

#[test]
fn a_name_is_no_address() {
    let mut server: Server = Server::new(Config::new()).expect("server");
    for name in ["localhost:80", "example.org:443"] {
        let outcome = server
            .control()
            .connect(name, Connect::new(Framing::Packet2), Echo);
        let error = outcome.expect_err("a name");
        assert!(matches!(error, Error::ConnectAddress(_)));
        assert!(error.to_string().contains("resolve it first"), "{error}");
    }
    assert!(server
        .control()
        .connect("127.0.0.1", Connect::new(Framing::Packet2), Echo)
        .is_err());
}

#[test]
fn what_cannot_work_is_said_before_anything_is_done() {
    let mut server: Server = Server::new(Config::new()).expect("server");
    let v6: SocketAddr = "[::1]:0".parse().expect("an address");
    let wrong = [
        (
            "low_watermark",
            Connect::new(Framing::Packet2).with(|connect| {
                connect.conn.low_watermark = 2;
                connect.conn.high_watermark = 1;
            }),
        ),
        (
            "connect_timeout",
            Connect::new(Framing::Packet2).with(|connect| connect.connect_timeout = Duration::ZERO),
        ),
        (
            "idle_timeout",
            Connect::new(Framing::Packet2)
                .with(|connect| connect.conn.idle_timeout = Duration::ZERO),
        ),
        (
            "max_frame",
            Connect::new(Framing::Packet2).with(|connect| connect.conn.max_frame = Some(0)),
        ),
        (
            "send_buffer",
            Connect::new(Framing::Packet2)
                .with(|connect| connect.socket.send_buffer = Some(usize::MAX)),
        ),
        (
            "bind",
            Connect::new(Framing::Packet2).with(|connect| connect.bind = Some(v6)),
        ),
        (
            "retry",
            Connect::new(Framing::Packet2).with(|connect| connect.retry = Some(Retry::new(0))),
        ),
    ];
    for (name, options) in wrong {
        match server.control().connect("127.0.0.1:9", options, Echo) {
            Err(Error::Option { option, .. }) => assert_eq!(option, name),
            other => panic!("{name}: {other:?}"),
        }
    }
    let long = Addr::unix("x".repeat(200));
    assert!(matches!(
        server
            .control()
            .connect(long, Connect::new(Framing::Packet2), Echo),
        Err(Error::Option { option: "unix", .. })
    ));
    assert_eq!(server.control().stats().outgoing, 0);
}

#[test]
fn a_unix_socket_is_reached_by_its_path() {
    let place = Place::new();
    let path = place.path("server.sock");
    let listener = UnixListener::bind(&path).expect("bind");
    let server = client();
    let text = format!("unix:{}", path.display());
    let (handler, heard) = probe();
    let id = server
        .ask(move |(), control| control.connect(text, Connect::new(Framing::Line), handler))
        .expect("begun");
    let (mut peer, _) = listener.accept().expect("accept");
    peer.set_read_timeout(Some(PATIENCE)).expect("timeout");
    assert_eq!(heard.opened(), id);
    peer.write_all(b"hi\n").expect("sent");
    assert_eq!(heard.next(), Told::Frame(b"hi\n".to_vec()));
    drop(peer);
    assert_eq!(heard.next(), Told::Finished);
    assert_eq!(heard.next(), Told::Closed(CloseReason::Finished));
}

/// A Unix socket's backlog is full: `connect` says EAGAIN, and nothing would announce that there is room (`unix(7)`).
#[cfg(target_os = "linux")]
#[test]
fn a_full_unix_socket_is_tried_again() {
    let place = Place::new();
    let path = place.path("full.sock");
    let listener =
        socket2::Socket::new(socket2::Domain::UNIX, socket2::Type::STREAM, None).expect("socket");
    let addr = socket2::SockAddr::unix(&path).expect("a path");
    listener.bind(&addr).expect("bind");
    listener.listen(0).expect("listen");
    let server = client();
    let (_, first) = dial(&server, Addr::unix(&path), Connect::new(Framing::Packet2));
    first.opened();
    let (handler, _) = probe();
    let to = Addr::unix(&path);
    let outcome =
        server.ask(move |(), control| control.connect(to, Connect::new(Framing::Packet2), handler));
    let error = outcome.expect_err("the backlog is full").to_string();
    assert!(error.contains("its backlog is full"), "{error}");
    let retry = Retry::new(u32::MAX)
        .first_delay(Duration::from_millis(1))
        .longest_delay(Duration::from_millis(10));
    let (_, second) = dial(
        &server,
        Addr::unix(&path),
        Connect::new(Framing::Packet2).with(|connect| connect.retry = Some(retry)),
    );
    server.until("it waits for its time", |stats| stats.connecting == 1);
    let _one = listener.accept().expect("accept");
    second.opened();
}

/// No server listens at first.
#[test]
fn a_server_that_starts_late_is_found() {
    let addr = closed_addr();
    let server = client();
    let retry = Retry::new(u32::MAX)
        .first_delay(Duration::from_millis(1))
        .longest_delay(Duration::from_millis(10));
    let (id, heard) = dial(
        &server,
        addr,
        Connect::new(Framing::Packet2).with(|connect| connect.retry = Some(retry)),
    );
    server.until("it has failed once", |stats| {
        stats.iterations > 5 && stats.connecting == 1
    });
    let listener = TcpListener::bind(addr).expect("the port is still free");
    let _peer = accepted(&listener);
    assert_eq!(heard.opened(), id);
}

/// One that the server has made can leave it as well.
#[test]
fn an_outgoing_connection_can_be_detached() {
    struct Leaves(std::sync::mpsc::Sender<portcullis::Detached>);
    impl Handler for Leaves {
        fn on_open(&mut self, cx: &mut Context<'_>) -> Outcome {
            let to = self.0.clone();
            cx.conn.send("bye")?;
            cx.conn
                .detach(move |stream| to.send(stream).expect("the test waits"))?;
            Ok(())
        }
        fn on_frame(&mut self, _: &mut Context<'_>, _: &[u8]) -> Outcome {
            Ok(())
        }
    }
    let (listener, addr) = std_listener();
    let server = client();
    let (to, from) = std::sync::mpsc::channel();
    let begun = server
        .ask(move |(), control| control.connect(addr, Connect::new(Framing::Packet2), Leaves(to)));
    begun.expect("begun");
    let mut peer = accepted(&listener);
    let mut stream = from.recv_timeout(PATIENCE).expect("it leaves");
    stream.write_all(b"raw").expect("sent");
    assert_eq!(recv2(&mut peer), b"bye");
    let mut raw = [0; 3];
    peer.read_exact(&mut raw).expect("raw bytes");
    assert_eq!((&raw, current_stats(&server.handle).open), (b"raw", 1));
    drop(stream);
    let stats = server.until("its place is free", |stats| stats.open == 0);
    assert_eq!(
        (stats.outgoing, stats.closed(CloseReason::Detached)),
        (1, 1)
    );
}

/// Outgoing connections have their places under the cap, and clients wait for them.
#[test]
fn the_cap_counts_outgoing_connections() {
    let (listener, addr) = std_listener();
    let server = spawn_echo(Config::max_connections(2), local());
    let (first, heard) = dial(&server, addr, Connect::new(Framing::Packet2));
    let (_, other) = dial(&server, addr, Connect::new(Framing::Packet2));
    let (handler, _) = probe();
    let outcome = server
        .ask(move |(), control| control.connect(addr, Connect::new(Framing::Packet2), handler));
    assert!(
        matches!(outcome, Err(Error::AtCapacity { max_connections: 2 })),
        "{outcome:?}"
    );
    heard.opened();
    other.opened();
    let mut waits = connect(server.addr());
    send2(&mut waits, b"hello");
    let tree = server.ask(|(), control| control.tree(10).to_string());
    assert!(tree.contains("outgoing: 2 connections"), "{tree}");
    assert!(tree.contains(&format!("{first} to {addr}: Open")), "{tree}");
    assert_eq!(current_stats(&server.handle).accepted, 0);
    server.handle.kill(first).expect("alive");
    assert_eq!(heard.next(), Told::Closed(CloseReason::Killed));
    assert_eq!(recv2(&mut waits), b"hello", "there is a place now");
    drop(listener);
}

#[cfg(target_os = "linux")]
#[test]
fn one_that_connects_can_be_killed_and_closed() {
    let full = full_listener();
    let server = client();
    let (id, heard) = dial(&server, full.addr, Connect::new(Framing::Packet2));
    server.handle.kill(id).expect("it is there");
    assert_eq!(heard.next(), Told::Failed(CloseReason::Killed, None));
    heard.is_all();
    let (id, heard) = dial(&server, full.addr, Connect::new(Framing::Packet2));
    let state = server.ask(move |(), control| {
        let state = control.connections()[0].state;
        with_conn(control, id, |conn| conn.close());
        state
    });
    assert_eq!(state, State::Connecting);
    assert_eq!(heard.next(), Told::Failed(CloseReason::Closed, None));
    heard.is_all();
    server.until("both are gone", |stats| {
        stats.open == 0 && stats.outgoing == 2
    });
}

/// A drain ends attempts at once, and refuses new ones.
#[cfg(target_os = "linux")]
#[test]
fn a_drain_does_not_wait_for_what_connects() {
    let full = full_listener();
    let mut server: Server = Server::new(Config::new()).expect("server");
    let (handler, heard) = probe();
    server
        .control()
        .connect(
            full.addr,
            Connect::new(Framing::Packet2).with(|connect| connect.connect_timeout = Duration::MAX),
            handler,
        )
        .expect("begun");
    server.control().drain(Duration::MAX);
    assert!(matches!(
        server
            .control()
            .connect(full.addr, Connect::new(Framing::Packet2), Echo),
        Err(Error::Draining)
    ));
    server.run(&mut ()).expect("run");
    assert_eq!(heard.next(), Told::Failed(CloseReason::Drained, None));
    let report = server.control().drain_report().expect("it is over");
    assert_eq!((report.ended, report.failed, report.forced), (0, 1, 0));
}

/// Without a listener a TCP socket may connect to itself.
#[cfg(target_os = "linux")]
#[test]
fn to_oneself_is_refused() {
    let server = client();
    let oneself = closed_addr();
    let (_, heard) = dial(
        &server,
        oneself,
        Connect::new(Framing::Packet2).with(|connect| connect.bind = Some(oneself)),
    );
    assert_eq!(
        heard.next(),
        Told::Failed(CloseReason::ConnectFailed, Some(libc::ECONNREFUSED))
    );
    heard.is_all();
}

#[test]
fn the_local_address_is_as_wished() {
    let (listener, addr) = std_listener();
    let from = closed_addr();
    let server = client();
    let (_, heard) = dial(
        &server,
        addr,
        Connect::new(Framing::Packet2).with(|connect| connect.bind = Some(from)),
    );
    let peer = accepted(&listener);
    heard.opened();
    assert_eq!(peer.peer_addr().expect("connected"), from);
}

/// Both ends in one slab.
#[test]
fn a_server_can_connect_to_itself() {
    let server = spawn_echo(Config::new(), local());
    let (id, heard) = dial(&server, server.addr(), Connect::new(Framing::Packet2));
    heard.opened();
    server.handle.send(id, b"echo".to_vec()).expect("sent");
    assert_eq!(heard.next(), Told::Frame(b"echo".to_vec()));
    let stats = current_stats(&server.handle);
    assert_eq!((stats.accepted, stats.outgoing, stats.open), (1, 1, 2));
    server.ask(move |(), control| with_conn(control, id, |conn| conn.close()));
    assert_eq!(heard.next(), Told::Closed(CloseReason::Closed));
    server.until("both are gone", |stats| stats.open == 0);
    let (stats, ()) = server.finish();
    assert_eq!(stats.closed_total(), 2);
}

/// What is sent before the connection is open goes out first, and so does the end.
#[test]
fn what_is_sent_before_it_is_open_goes_out_when_it_is() {
    let (listener, addr) = std_listener();
    let server = client();
    let (handler, heard) = half_closing_probe();
    let id = server.ask(move |(), control| {
        let id = control
            .connect(addr, Connect::new(Framing::Packet2), handler)
            .expect("begun");
        with_conn(control, id, |conn| {
            assert_eq!(conn.state(), State::Connecting);
            conn.send("first").expect("queued");
            conn.send("second").expect("queued");
            conn.finish();
            assert!(conn.send("too late").is_err());
        });
        id
    });
    let mut peer = accepted(&listener);
    assert_eq!(recv2(&mut peer), b"first");
    assert_eq!(recv2(&mut peer), b"second");
    assert_eq!(read_to_end(&mut peer), b"");
    // It goes on reading.
    send2(&mut peer, b"answer");
    assert_eq!(heard.opened(), id);
    assert_eq!(heard.next(), Told::Frame(b"answer".to_vec()));
    drop(peer);
    assert_eq!(heard.next(), Told::Finished);
    assert_eq!(heard.next(), Told::Closed(CloseReason::Finished));
}

/// Half-close, from the side of a server: it finishes, and closes when the peer has too.
#[test]
fn a_finished_end_goes_on_reading() {
    struct Brief;
    impl Handler for Brief {
        fn on_frame(&mut self, cx: &mut Context<'_>, frame: &[u8]) -> Outcome {
            if frame == b"finish" {
                cx.conn.send("bye")?;
                cx.conn.finish();
            }
            Ok(())
        }
    }
    let server = spawn(|| {
        let mut server = Server::new(Config::new()).expect("server");
        server
            .listen(local(), |_: &mut (), _| Brief)
            .expect("listen");
        (server, ())
    });
    let mut client = connect(server.addr());
    send2(&mut client, b"finish");
    assert_eq!(recv2(&mut client), b"bye");
    assert_eq!(read_to_end(&mut client), b"");
    for _ in 0..3 {
        send2(&mut client, b"and more");
    }
    server.until("all is read", |stats| {
        stats.traffic.frames_in == 4 && stats.open == 1
    });
    client.shutdown(Shutdown::Write).expect("shutdown");
    let stats = server.until("it is over", |stats| stats.open == 0);
    assert_eq!(stats.closed(CloseReason::Finished), 1);
}

/// Connects to `App`'s server wherever it is called.
struct Restless(&'static str);

#[derive(Default)]
struct App {
    to: Option<SocketAddr>,
    probes: Vec<kit::outgoing::Probe>,
    outcomes: Vec<String>,
}

impl Restless {
    fn go(&self, place: &str, cx: &mut Context<'_, App>) {
        if place != self.0 {
            return;
        }
        let (to, probe) = (
            cx.app.to.expect("known"),
            cx.app.probes.pop().expect("one is left"),
        );
        let outcome = cx
            .conn
            .control()
            .connect(to, Connect::new(Framing::Packet2), probe);
        let outcome = match outcome {
            Ok(id) => {
                let mut peer = cx.conn.peer(id).expect("it can be reached at once");
                peer.send(place).expect("queued");
                format!("{:?}", peer.state())
            }
            Err(error) => error.to_string(),
        };
        cx.app.outcomes.push(outcome);
    }
}

impl Handler<App> for Restless {
    fn on_open(&mut self, cx: &mut Context<'_, App>) -> Outcome {
        self.go("open", cx);
        cx.conn.set_timer(0, Duration::ZERO);
        Ok(())
    }

    fn on_frame(&mut self, cx: &mut Context<'_, App>, _: &[u8]) -> Outcome {
        self.go("frame", cx);
        Ok(())
    }

    fn on_timer(&mut self, cx: &mut Context<'_, App>, _: u8) -> Outcome {
        self.go("timer", cx);
        Ok(())
    }

    fn on_finish(&mut self, cx: &mut Context<'_, App>) -> Outcome {
        self.go("finish", cx);
        cx.conn.close();
        Ok(())
    }

    fn on_drain(&mut self, cx: &mut Context<'_, App>) -> Outcome {
        self.go("drain", cx);
        cx.conn.close();
        Ok(())
    }

    fn on_close(&mut self, cx: &mut Context<'_, App>, _: &Closed) {
        self.go("close", cx);
    }

    fn on_connect_failed(&mut self, cx: &mut Context<'_, App>, _: &Closed) {
        self.go("failed", cx);
    }
}

/// From every callback, while the caller has the turn.
#[test]
fn every_callback_can_connect() {
    for place in [
        "open", "frame", "timer", "finish", "close", "failed", "drain",
    ] {
        let (listener, to) = std_listener();
        let (probe, heard) = probe();
        let server = spawn(move || {
            let mut server = Server::new(Config::new()).expect("server");
            server
                .listen(local(), move |_: &mut App, _| Restless(place))
                .expect("listen");
            let app = App {
                to: Some(to),
                probes: vec![probe],
                ..App::default()
            };
            (server, app)
        });
        let mut client = None;
        if place == "failed" {
            let closed = closed_addr();
            let begun = server.ask(move |_, control| {
                control.connect(closed, Connect::new(Framing::Packet2), Restless("failed"))
            });
            begun.expect("begun");
        } else {
            let client = client.insert(connect(server.addr()));
            send2(client, b"x");
            if ["finish", "close"].contains(&place) {
                client.shutdown(Shutdown::Write).expect("shutdown");
            }
            if place == "drain" {
                server.until("it is there", |stats| stats.traffic.frames_in == 1);
                let (_, app) = server.finish();
                assert!(app.outcomes[0].contains("drains"), "{:?}", app.outcomes);
                continue;
            }
        }
        heard.opened();
        let mut peer = accepted(&listener);
        assert_eq!(recv2(&mut peer), place.as_bytes());
        let outcomes = server.ask(|app, _| app.outcomes.clone());
        assert_eq!(outcomes, ["Connecting"], "{place}");
    }
}

/// A connection of a pool, which is replaced when it has ended.
struct Member;

#[derive(Default)]
struct Pool {
    to: Option<SocketAddr>,
    outcomes: Vec<Result<(), String>>,
}

impl Member {
    fn replace(cx: &mut Context<'_, Pool>) {
        let Some(to) = cx.app.to else {
            return;
        };
        let outcome = cx
            .conn
            .control()
            .connect(to, Connect::new(Framing::Packet2), Member);
        let outcome = outcome.map_err(|error| error.to_string());
        cx.app.outcomes.push(outcome.map(|_| ()));
    }
}

impl Handler<Pool> for Member {
    fn on_frame(&mut self, cx: &mut Context<'_, Pool>, frame: &[u8]) -> Outcome {
        cx.conn.send(frame)?;
        Ok(())
    }

    fn on_close(&mut self, cx: &mut Context<'_, Pool>, _: &Closed) {
        Self::replace(cx);
    }

    fn on_connect_failed(&mut self, cx: &mut Context<'_, Pool>, _: &Closed) {
        Self::replace(cx);
    }
}

/// The slot of a connection that has ended is free in its last callback, for a connection that
/// begins there: before a client of the backlog, and never for two.
#[test]
fn a_full_pool_connects_anew_from_its_last_callbacks() {
    const CAP: usize = 5;
    let (listener, to) = std_listener();
    let server = spawn(move || {
        let config = Config::max_connections(CAP);
        let mut server = Server::new(config).expect("server");
        let clients = server.listen(local(), |_: &mut Pool, _| Member);
        clients.expect("listen");
        let to = Some(to);
        let pool = Pool {
            to,
            ..Pool::default()
        };
        (server, pool)
    });
    let begin = move |control: &mut portcullis::Control<'_, Pool>, to| {
        control
            .connect(to, Connect::new(Framing::Packet2), Member)
            .expect("begun")
    };
    server.ask(move |_, control| {
        for _ in 1..CAP {
            begin(control, to);
        }
        begin(control, closed_addr());
    });
    let peers: Vec<_> = (0..CAP).map(|_| accepted(&listener)).collect();
    let mut waits = connect(server.addr());
    send2(&mut waits, b"hello");
    drop(peers);
    let peers: Vec<_> = (0..CAP).map(|_| accepted(&listener)).collect();
    let outcomes = server.ask(|pool, _| {
        pool.to = None;
        pool.outcomes.clone()
    });
    assert_eq!(outcomes, vec![Ok(()); CAP + 1]);
    let stats = current_stats(&server.handle);
    assert_eq!((stats.peak, stats.accepted), (CAP, 0));
    drop(peers);
    assert_eq!(recv2(&mut waits), b"hello", "a slot is free now");
}

/// Its handler is the user's code.
#[test]
fn a_panic_in_on_connect_failed_harms_no_connection() {
    struct Touchy;
    impl Handler for Touchy {
        fn on_frame(&mut self, _: &mut Context<'_>, _: &[u8]) -> Outcome {
            Ok(())
        }
        fn on_connect_failed(&mut self, _: &mut Context<'_>, _: &Closed) {
            panic!("as planned");
        }
    }
    let server = spawn_echo(Config::new(), local());
    let closed = closed_addr();
    server
        .ask(move |(), control| control.connect(closed, Connect::new(Framing::Packet2), Touchy))
        .expect("begun");
    let stats = server.until("it is gone", |stats| stats.closed_total() == 1);
    assert_eq!(stats.closed(CloseReason::ConnectFailed), 1);
    ping(&mut connect(server.addr()), b"still here");
}

/// The peer resets while its greeting waits: read first, then told.
#[test]
fn the_last_words_of_a_peer_are_heard() {
    let (listener, addr) = std_listener();
    let server = client();
    let (_, heard) = dial(&server, addr, Connect::new(Framing::Line));
    let mut peer = accepted(&listener);
    peer.write_all(b"too many connections\n").expect("sent");
    drop(peer);
    heard.opened();
    assert_eq!(
        heard.next(),
        Told::Frame(b"too many connections\n".to_vec())
    );
    assert_eq!(heard.next(), Told::Finished);
}

/// Above the high watermark reading goes on only where that was asked for.
#[test]
fn full_duplex_reads_while_it_cannot_write() {
    for full_duplex in [true, false] {
        let (listener, addr) = std_listener();
        let server = client();
        let options = Connect::new(Framing::Raw).with(|connect| {
            connect.conn.output_limit = 64 * 1024 * 1024;
            connect.conn.full_duplex = full_duplex;
        });
        let (id, heard) = dial(&server, addr, options);
        let mut peer = accepted(&listener);
        heard.opened();
        let congested = server.ask(move |(), control| {
            with_conn(control, id, |conn| {
                conn.send(vec![7; 16 * 1024 * 1024]).expect("queued");
                conn.is_congested()
            })
        });
        assert!(congested);
        peer.write_all(b"hello").expect("sent");
        if full_duplex {
            assert_eq!(heard.bytes(5), b"hello");
        }
        let mut rest = vec![0; 16 * 1024 * 1024];
        peer.read_exact(&mut rest).expect("all of it");
        if !full_duplex {
            assert_eq!(heard.bytes(5), b"hello", "once it has written");
        }
        assert!(rest.iter().all(|&byte| byte == 7));
    }
}

/// The listener of the test may be in any state: connections come and go by the hundred, and nothing is left.
#[test]
fn hundreds_leave_nothing_behind() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
    let addr = listener.local_addr().expect("bound");
    let server = spawn(|| {
        (
            Server::new(Config::max_connections(300)).expect("server"),
            (),
        )
    });
    let mut heard = Vec::new();
    let mut peers = Vec::new();
    for _ in 0..200 {
        heard.push(dial(&server, addr, Connect::new(Framing::Packet2)).1);
        peers.push(accepted(&listener));
    }
    for heard in &heard {
        heard.opened();
    }
    drop(peers);
    drop(listener);
    for heard in heard {
        assert_eq!(heard.next(), Told::Finished);
        assert_eq!(heard.next(), Told::Closed(CloseReason::Finished));
        heard.is_all();
    }
    let (stats, ()) = server.finish();
    assert_eq!(
        (stats.outgoing, stats.open, stats.closed_total()),
        (200, 0, 200)
    );
}

/// A handler that has blocked before it connects takes nothing from the attempt's time.
#[test]
fn time_lost_before_is_not_the_attempts() {
    const TIME: Duration = Duration::from_secs(3);
    let full = full_listener();
    let addr = full.addr;
    let mut server: Server = Server::new(Config::new()).expect("server");
    let (probe, heard) = probe();
    let job = move |(): &mut (), control: &mut portcullis::Control<'_, ()>| {
        let begun = std::time::Instant::now();
        while begun.elapsed() <= TIME {
            std::thread::park_timeout(TIME);
        }
        let options = Connect::new(Framing::Packet2).with(|connect| connect.connect_timeout = TIME);
        control.connect(addr, options, probe).expect("begun");
    };
    server.handle().post(job).expect("posted");
    for _ in 0..3 {
        server
            .poll_once(&mut (), Some(Duration::ZERO))
            .expect("a turn");
    }
    assert_eq!(heard.so_far(), []);
    assert_eq!(server.control().stats().connecting, 1);
    // It is not for ever either.
    while server.control().stats().connecting > 0 {
        server.poll_once(&mut (), Some(PATIENCE)).expect("a turn");
    }
    assert_eq!(
        heard.next(),
        Told::Failed(CloseReason::ConnectTimeout, None)
    );
}

/// The peer's bytes and its end may be there before the first event: one event reports all three.
#[test]
fn words_and_an_end_may_come_with_the_connection() {
    let (listener, addr) = std_listener();
    let mut server: Server = Server::new(Config::new()).expect("server");
    let (probe, heard) = probe();
    let id = server
        .control()
        .connect(addr, Connect::new(Framing::Packet2), probe)
        .expect("begun");
    let mut peer = accepted(&listener);
    send2(&mut peer, b"that is all");
    drop(peer);
    for _ in 0..10 {
        server
            .poll_once(&mut (), Some(Duration::ZERO))
            .expect("a turn");
    }
    let all = [
        Told::Opened(id),
        Told::Frame(b"that is all".to_vec()),
        Told::Finished,
        Told::Closed(CloseReason::Finished),
    ];
    assert_eq!(heard.so_far(), all);
}

/// The connection is established, used and reset before the loop looks: it opens, what was sent
/// before RST is delivered, and no attempt is repeated. As on the accepting side.
#[test]
fn a_reset_before_the_first_event_is_no_failed_attempt() {
    for (words, finishes) in [(&b""[..], false), (b"moved", false), (b"moved", true)] {
        let (listener, addr) = std_listener();
        let mut server: Server = Server::new(Config::new()).expect("server");
        let (probe, heard) = probe();
        let options =
            Connect::new(Framing::Packet2).with(|connect| connect.retry = Some(Retry::new(5)));
        let id = server
            .control()
            .connect(addr, options, probe)
            .expect("begun");
        let mut peer = accepted(&listener);
        if !words.is_empty() {
            send2(&mut peer, words);
        }
        if finishes {
            peer.shutdown(Shutdown::Write).expect("FIN");
        }
        reset(peer);
        while server.control().stats().open > 0 {
            server.poll_once(&mut (), Some(PATIENCE)).expect("a turn");
        }
        let mut all = vec![Told::Opened(id)];
        if !words.is_empty() {
            all.push(Told::Frame(words.to_vec()));
        }
        if finishes {
            all.push(Told::Finished);
        }
        all.push(Told::Closed(if finishes {
            CloseReason::Finished
        } else {
            CloseReason::Reset
        }));
        assert_eq!(heard.so_far(), all);
    }
}

/// The same while the handler writes first: its failed write loses no input.
#[test]
fn a_handler_that_writes_first_hears_what_came_before_the_reset() {
    struct Greets(std::sync::mpsc::Sender<Vec<u8>>);
    impl Handler for Greets {
        fn on_open(&mut self, cx: &mut Context<'_>) -> Outcome {
            cx.conn.send(b"hello")?;
            Ok(())
        }
        fn on_frame(&mut self, _: &mut Context<'_>, frame: &[u8]) -> Outcome {
            let _ = self.0.send(frame.to_vec());
            Ok(())
        }
    }
    let (listener, addr) = std_listener();
    let mut server: Server = Server::new(Config::new()).expect("server");
    let (sender, frames) = std::sync::mpsc::channel();
    server
        .control()
        .connect(addr, Connect::new(Framing::Packet2), Greets(sender))
        .expect("begun");
    let mut peer = accepted(&listener);
    send2(&mut peer, b"moved");
    reset(peer);
    while server.control().stats().open > 0 {
        server.poll_once(&mut (), Some(PATIENCE)).expect("a turn");
    }
    assert_eq!(frames.try_iter().collect::<Vec<_>>(), [b"moved".to_vec()]);
    assert_eq!(server.control().stats().closed(CloseReason::Reset), 1);
}
