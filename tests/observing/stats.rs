//! Every counter counts what its documentation says, and they add up.

use std::io::Write;
use std::net::{SocketAddr, TcpStream};
use std::sync::mpsc;
use std::time::Duration;

use kit::net::{
    await_end, connect, eventually, local, packet2, ping, read_to_end, recv2, send2, spawn,
    spawn_echo, Echo, Running, PATIENCE,
};
use portcullis::sim::Sim;
use portcullis::{
    try_accept, AtCapacity, Close, CloseReason, Closed, Config, ConnId, Context, Control, Handler,
    Message, Outcome, Peer, Refuse, Server, Service, Stats,
};

/// The calls of a [`Door`] about clients that were not admitted.
type Told = (Option<ConnId>, SocketAddr, String, CloseReason);

/// Refuses by turns: silently, with a farewell; lets the others in.
struct Door {
    refusals: Vec<Option<&'static str>>,
    told: mpsc::Sender<Told>,
}

impl Service for Door {
    fn accept(&mut self, (): &mut (), peer: Peer) -> Result<Box<dyn Handler>, Refuse> {
        assert!(peer.id.is_some() && kit::net::tcp(&peer.addr).ip().is_loopback());
        match self.refusals.pop() {
            None => Ok(Box::new(Echo)),
            Some(None) => Err(Refuse::silently()),
            Some(Some(words)) => Err(Refuse::with_farewell(words)),
        }
    }

    fn on_failed_accept(&mut self, (): &mut (), peer: &Peer, closed: &Closed) {
        let told = (
            peer.id,
            kit::net::tcp(&peer.addr),
            peer.listener_name.to_string(),
            closed.reason,
        );
        self.told.send(told).expect("the test waits");
    }
}

fn door(refusals: Vec<Option<&'static str>>) -> (Running, mpsc::Receiver<Told>) {
    let (tell, told) = mpsc::channel();
    let server = spawn(move || {
        let mut server = Server::new(Config::max_connections(1)).expect("server");
        let listen = local().name("door").with(|listen| {
            listen.at_capacity = AtCapacity::Refuse {
                farewell: Vec::new(),
            }
        });
        server
            .listen_with(
                listen,
                Door {
                    refusals,
                    told: tell,
                },
            )
            .expect("listen");
        (server, ())
    });
    (server, told)
}

fn next(told: &mpsc::Receiver<Told>) -> Told {
    told.recv_timeout(PATIENCE).expect("the service is told")
}

#[test]
fn a_new_server_has_counted_nothing() {
    let mut server: Server = Server::new(Config::max_connections(7)).expect("server");
    let stats = server.control().stats();
    let counters = [
        stats.accepted,
        stats.opened,
        stats.traffic.bytes_in,
        stats.traffic.bytes_out,
        stats.traffic.frames_in,
        stats.traffic.frames_out,
        stats.out_of_fds,
        stats.accept_errors,
        stats.undeliverable,
        stats.panics,
        stats.iterations,
        stats.closed_total(),
    ];
    assert_eq!(counters, [0; 12]);
    assert_eq!((stats.open, stats.peak, stats.max_connections), (0, 0, 7));
    assert_eq!(server.handle().stats(), stats);
    assert_eq!(kit::reasons(|reason| stats.closed(reason)), []);
}

#[test]
fn each_connection_is_counted_once() {
    let server = spawn_echo(Config::new(), local());
    let mut clients: Vec<_> = (0..5).map(|_| connect(server.addr())).collect();
    for client in &mut clients {
        ping(client, b"in");
    }
    let stats = server.until("five are in", |stats| stats.traffic.frames_out == 5);
    assert_eq!(
        (stats.accepted, stats.opened, stats.open, stats.peak),
        (5, 5, 5, 5)
    );
    clients.truncate(2);
    let stats = server.until("three have gone", |stats| stats.open == 2);
    assert_eq!(
        (stats.closed_total(), stats.closed(CloseReason::Finished)),
        (3, 3)
    );
    clients.push(connect(server.addr()));
    let stats = server.until("one more has come", |stats| stats.open == 3);
    assert_eq!((stats.accepted, stats.opened, stats.peak), (6, 6, 5));
    drop(clients);
    let stats = server.until("all have gone", |stats| stats.open == 0);
    let reasons = kit::reasons(|reason| stats.closed(reason));
    assert_eq!(reasons, [(CloseReason::Finished, 6)]);
}

/// As they were on the wire: headers count as bytes, and empty frames as frames.
#[test]
fn bytes_and_frames_are_those_on_the_wire() {
    let server = spawn_echo(Config::new(), local());
    let mut client = connect(server.addr());
    for payload in [&b"hello"[..], b"", &[7; 1000]] {
        ping(&mut client, payload);
    }
    let stats = server.until("three frames", |stats| {
        stats.traffic.frames_out == 3 && stats.traffic.bytes_out == 1011
    });
    assert_eq!((stats.traffic.bytes_in, stats.traffic.frames_in), (1011, 3));
    // A piece of a frame is bytes, not a frame.
    client.write_all(&packet2(b"rest")[..3]).expect("send");
    server.until("a piece", |stats| {
        stats.traffic.bytes_in == 1014 && stats.traffic.frames_in == 3
    });
    client.write_all(b"est").expect("send");
    assert_eq!(recv2(&mut client), b"rest");
    server.until("the rest", |stats| {
        stats.traffic.bytes_in == 1017 && stats.traffic.frames_in == 4
    });
    // They stay when the connection goes.
    drop(client);
    let stats = server.until("it has gone", |stats| stats.open == 0);
    assert_eq!(
        (
            stats.traffic.bytes_in,
            stats.traffic.bytes_out,
            stats.traffic.frames_out
        ),
        (1017, 1017, 4)
    );
}

/// Ends as its first frame says.
struct Obedient;

impl Handler for Obedient {
    fn on_frame(&mut self, cx: &mut Context<'_>, frame: &[u8]) -> Outcome {
        match frame {
            b"close" => cx.conn.close(),
            b"abort" => cx.conn.abort(),
            b"new" => return Err(Close::new()),
            b"fail" => return Err(Close::because("asked to")),
            b"error" => cx.conn.send(vec![0; 70_000])?,
            b"panic" => panic!("asked to"),
            _ => {}
        }
        Ok(())
    }

    fn on_message(&mut self, _: &mut Context<'_>, _: Message) -> Outcome {
        panic!("told to")
    }
}

#[test]
fn each_end_has_its_reason() {
    let server = spawn(|| {
        let mut server = Server::new(Config::new()).expect("server");
        let listen = local().with(|listen| listen.conn.max_frame = Some(100));
        server
            .listen(listen, |_: &mut (), _| Obedient)
            .expect("listen");
        (server, ())
    });
    let ends: [(&[u8], CloseReason, u64); 8] = [
        (&packet2(b"close"), CloseReason::Closed, 1),
        (&packet2(b"new"), CloseReason::Closed, 2),
        (&packet2(b"abort"), CloseReason::Aborted, 1),
        (&packet2(b"fail"), CloseReason::Failed, 1),
        (&packet2(b"error"), CloseReason::Failed, 2),
        (&packet2(b"panic"), CloseReason::Panicked, 1),
        (&packet2(&[0; 101]), CloseReason::FrameTooLarge, 1),
        (&[0, 9, 1], CloseReason::Truncated, 1),
    ];
    for (bytes, reason, count) in ends {
        let mut client = connect(server.addr());
        client.write_all(bytes).expect("send");
        let _ = client.shutdown(std::net::Shutdown::Write);
        await_end(&mut client);
        let stats = server.until("it has ended", |stats| {
            stats.open == 0 && stats.closed(reason) == count
        });
        assert_eq!(stats.accepted, stats.closed_total());
    }
    let stats = server.handle.stats();
    assert_eq!(
        (stats.opened, stats.panics),
        (8, 1),
        "a handler's panic is counted, and is its connection's reason"
    );
    // From outside.
    let mut client = connect(server.addr());
    send2(&mut client, b"in");
    server.until("it is in", |stats| stats.open == 1);
    let id = server.ask(|(), control| control.connections()[0].id);
    server.handle.notify(id, ()).expect("notify");
    await_end(&mut client);
    drop(client);
    server.until("it has ended", |stats| {
        stats.closed(CloseReason::Panicked) == 2
    });
}

#[test]
fn the_refused_are_counted_and_their_service_hears_of_them() {
    let (server, told) = door(vec![Some("not you\n"), None]);
    for words in [&b""[..], b"not you\n"] {
        let mut client = connect(server.addr());
        let addr = client.local_addr().expect("addr");
        assert_eq!(read_to_end(&mut client), words);
        let (id, peer, name, reason) = next(&told);
        assert!(id.is_some());
        assert_eq!(
            (peer, name.as_str(), reason),
            (addr, "door", CloseReason::Refused)
        );
    }
    let mut client = connect(server.addr());
    ping(&mut client, b"in");
    let stats = server.until("all are counted", |stats| {
        stats.closed(CloseReason::Refused) == 2 && stats.traffic.frames_out == 1
    });
    // Accepted they were; a slot they had not.
    assert_eq!(
        (stats.accepted, stats.opened, stats.open, stats.peak),
        (3, 1, 1, 1)
    );
    assert_eq!(
        stats.traffic.bytes_out,
        8 + 4,
        "the farewell is on the wire too"
    );
}

/// A refusal is an orderly end even for a client that has written already: its unread bytes do not make it a reset.
#[test]
fn a_farewell_reaches_a_client_that_speaks_first() {
    let (server, told) = door(vec![Some("not you\n"); 10]);
    for _ in 0..10 {
        let held = kit::net::hold(&server.handle);
        let mut client = connect(server.addr());
        send2(&mut client, b"hello");
        drop(held);
        assert_eq!(read_to_end(&mut client), b"not you\n");
        assert_eq!(next(&told).3, CloseReason::Refused);
    }
}

#[test]
fn a_client_at_the_cap_has_no_id() {
    let (server, told) = door(Vec::new());
    let mut inside = connect(server.addr());
    ping(&mut inside, b"in");
    await_end(&mut connect(server.addr()));
    let (id, _, _, reason) = next(&told);
    assert_eq!((id, reason), (None, CloseReason::AtCapacity));
    let stats = server.until("it is counted", |stats| {
        stats.closed(CloseReason::AtCapacity) == 1
    });
    assert_eq!(
        (stats.accepted, stats.open, stats.peak, stats.opened),
        (2, 1, 1, 1)
    );
}

#[test]
fn a_closure_may_refuse() {
    let server = spawn(|| {
        let mut server = Server::new(Config::new()).expect("server");
        let service = try_accept(|left: &mut u32, _: Peer| match left.checked_sub(1) {
            Some(less) => {
                *left = less;
                Ok(Echo)
            }
            None => Err(Refuse::with_farewell("enough")),
        });
        server.listen_with(local(), service).expect("listen");
        (server, 2_u32)
    });
    let mut inside = [connect(server.addr()), connect(server.addr())];
    for client in &mut inside {
        ping(client, b"in");
    }
    assert_eq!(read_to_end(&mut connect(server.addr())), b"enough");
    drop(inside);
    let (stats, left) = server.finish();
    assert_eq!((stats.closed(CloseReason::Refused), left), (1, 0));
}

#[test]
fn a_service_that_panics_is_counted_and_asked_again() {
    struct Shaky(u32);
    impl Service for Shaky {
        fn accept(&mut self, (): &mut (), _: Peer) -> Result<Box<dyn Handler>, Refuse> {
            self.0 += 1;
            match self.0 {
                1 => panic!("accept"),
                2 => Err(Refuse::silently()),
                _ => Ok(Box::new(Echo)),
            }
        }
        fn on_failed_accept(&mut self, (): &mut (), _: &Peer, _: &Closed) {
            panic!("on_failed_accept");
        }
    }
    let server = spawn(|| {
        let mut server = Server::new(Config::new()).expect("server");
        server.listen_with(local(), Shaky(0)).expect("listen");
        (server, ())
    });
    await_end(&mut connect(server.addr()));
    await_end(&mut connect(server.addr()));
    ping(&mut connect(server.addr()), b"the third is served");
    let stats = server.until("all are counted", |stats| stats.panics == 3);
    assert_eq!(
        (
            stats.closed(CloseReason::Panicked),
            stats.closed(CloseReason::Refused)
        ),
        (1, 1)
    );
    assert_eq!((stats.accepted, stats.opened), (3, 1));
}

struct PanicsOnDrop;

impl Handler for PanicsOnDrop {
    fn on_frame(&mut self, _: &mut Context<'_>, _: &[u8]) -> Outcome {
        Ok(())
    }
}

impl Drop for PanicsOnDrop {
    fn drop(&mut self) {
        panic!("dropped");
    }
}

#[test]
fn a_destructor_that_panics_is_counted() {
    let server = spawn(|| {
        let mut server = Server::new(Config::new()).expect("server");
        server
            .listen(local(), |_: &mut (), _| PanicsOnDrop)
            .expect("listen");
        (server, ())
    });
    drop(server.connect_open());
    let stats = server.until("it has gone", |stats| stats.closed_total() == 1);
    assert_eq!((stats.panics, stats.closed(CloseReason::Finished)), (1, 1));
}

/// The handles learn of them too, after the server's last iteration.
#[test]
fn panics_of_destructors_at_the_end_are_counted() {
    let mut sim = Sim::new(1, Config::new(), ());
    let addr = sim
        .listen(local(), |_: &mut (), _| PanicsOnDrop)
        .expect("listen");
    sim.connect(addr).expect("connect");
    sim.settle();
    let handle = sim.handle();
    let owned = PanicsOnDrop;
    let job = move |_: &mut (), _: &mut Control<'_>| {
        let _owned = &owned;
    };
    handle.post(job).expect("the queue has room");
    drop(sim);
    assert_eq!(
        (handle.stats().undeliverable, handle.stats().panics),
        (1, 2)
    );
}

/// A service is the user's code to its end.
#[test]
fn so_is_a_services() {
    struct Fragile;
    impl Service for Fragile {
        fn accept(&mut self, (): &mut (), _: Peer) -> Result<Box<dyn Handler>, Refuse> {
            Ok(Box::new(Echo))
        }
    }
    impl Drop for Fragile {
        fn drop(&mut self) {
            panic!("dropped");
        }
    }
    let server = spawn(|| {
        let mut server = Server::new(Config::new()).expect("server");
        server
            .listen(local(), |_: &mut (), _| Echo)
            .expect("listen");
        server
            .listen_with(local().name("fragile"), Fragile)
            .expect("listen");
        (server, ())
    });
    server
        .ask(|(), control| control.close_listener("fragile"))
        .expect("closed");
    ping(&mut connect(server.addr()), b"the loop goes on");
    server.until("it is counted", |stats| stats.panics == 1);
}

#[test]
fn undeliverable_is_what_the_loop_could_not_do() {
    let server = spawn_echo(Config::new(), local());
    let enter = || {
        let mut client = connect(server.addr());
        ping(&mut client, b"in");
        let id = server.ask(|(), control| control.connections()[0].id);
        (client, id)
    };
    // Longer than packet-2 can say: the stream ends there.
    let (mut client, id) = enter();
    server.handle.send(id, vec![0; 70_000]).expect("queued");
    await_end(&mut client);
    drop(client);
    let stats = server.until("it has ended", |stats| stats.open == 0);
    assert_eq!(
        (stats.undeliverable, stats.closed(CloseReason::Failed)),
        (1, 1)
    );
    let (_client, id) = enter();
    let held = kit::net::hold(&server.handle);
    server.handle.kill(id).expect("live");
    for _ in 0..2 {
        server.handle.send(id, "late").expect("live");
    }
    drop(held);
    let stats = server.until("three came to nothing", |stats| stats.undeliverable == 3);
    assert_eq!(
        (stats.traffic.frames_out, stats.closed(CloseReason::Killed)),
        (2, 1)
    );
}

#[test]
fn iterations_are_counted_one_by_one() {
    let mut server: Server = Server::new(Config::new()).expect("server");
    for iterations in 1..=3 {
        server
            .poll_once(&mut (), Some(Duration::ZERO))
            .expect("a turn");
        assert_eq!(
            (
                server.control().stats().iterations,
                server.handle().stats().iterations
            ),
            (iterations, iterations)
        );
    }
}

#[test]
fn the_peak_is_of_one_moment() {
    let server = spawn_echo(Config::new(), local());
    for gone in 1..=5 {
        ping(&mut connect(server.addr()), b"one at a time");
        server.until("it has gone", |stats| stats.closed_total() == gone);
    }
    assert_eq!(server.handle.stats().peak, 1);
}

/// The sum of all reasons is the total, whatever happened.
#[test]
fn the_reasons_add_up_after_a_drain() {
    let server = spawn_echo(Config::new(), local());
    let mut clients: Vec<TcpStream> = (0..10).map(|_| connect(server.addr())).collect();
    for client in &mut clients {
        ping(client, b"in");
    }
    clients.truncate(7);
    server.until("three have gone", |stats| stats.open == 7);
    let ends = std::thread::spawn(move || {
        for client in &mut clients {
            assert_eq!(read_to_end(client), b"");
        }
    });
    let (stats, ()): (Stats, ()) = server.finish();
    eventually("all ended", || ends.is_finished());
    ends.join().expect("in order");
    assert_eq!(
        (
            stats.closed(CloseReason::Finished),
            stats.closed(CloseReason::Drained)
        ),
        (3, 7)
    );
    let reasons = CloseReason::ALL.iter();
    let sum: u64 = reasons.map(|&reason| stats.closed(reason)).sum();
    assert_eq!((sum, stats.accepted, stats.open), (10, 10, 0));
}

/// Each listener counts its own reasons and its own traffic.
#[test]
fn listeners_count_apart_and_add_up() {
    use portcullis::sim::Sim;
    let mut sim = Sim::new(1, Config::new(), ());
    let mut addrs = Vec::new();
    for name in ["one", "two"] {
        let farewell = AtCapacity::Refuse {
            farewell: b"full".to_vec(),
        };
        let listen = local().name(name).with(|listen| {
            listen.max_connections = Some(2);
            listen.at_capacity = farewell;
        });
        addrs.push(sim.listen(listen, |_: &mut (), _| Echo).expect("listens"));
    }
    // At the first: one finishes, one resets, one is refused. At the second: one stays open.
    let [finishes, resets, refused] = [0; 3].map(|_| {
        let client = sim.connect(addrs[0]).expect("a listener");
        sim.send(client, b"\0\x05hello");
        sim.settle();
        client
    });
    let stays = sim.connect(addrs[1]).expect("a listener");
    sim.send(stays, b"\0\x02hi");
    sim.finish(finishes);
    sim.reset(resets);
    sim.settle();
    assert_eq!(sim.received(refused), b"full");
    let stats = sim.stats();
    let metrics = sim.control().metrics();
    let [one, two] = &metrics.listeners[..] else {
        panic!("two listeners");
    };
    let reasons = kit::reasons(|reason| one.closed(reason));
    assert_eq!(
        reasons,
        [
            (CloseReason::Finished, 1),
            (CloseReason::Reset, 1),
            (CloseReason::AtCapacity, 1)
        ]
    );
    assert_eq!((one.accepted, one.connections), (3, 0));
    assert_eq!((two.accepted, two.connections), (1, 1));
    assert_eq!(kit::reasons(|reason| two.closed(reason)), []);
    for &reason in CloseReason::ALL {
        assert_eq!(
            one.closed(reason) + two.closed(reason),
            stats.closed(reason)
        );
    }
    // The refused client's request was read, and its farewell written.
    assert_eq!((one.traffic.bytes_in, one.traffic.bytes_out), (21, 18));
    assert_eq!((one.traffic.frames_in, one.traffic.frames_out), (2, 2));
    assert_eq!((two.traffic.bytes_in, two.traffic.frames_in), (4, 1));
    assert_eq!(
        one.traffic.bytes_in + two.traffic.bytes_in,
        stats.traffic.bytes_in
    );
    let text = metrics.to_string();
    for line in [
        "portcullis_listener_closed_total{listener=\"one\",reason=\"finished\"} 1",
        "portcullis_listener_closed_total{listener=\"one\",reason=\"at_capacity\"} 1",
        "portcullis_listener_bytes_out_total{listener=\"one\"} 18",
        "portcullis_listener_frames_in_total{listener=\"two\"} 1",
        "portcullis_closed_total{reason=\"slow_consumer\"} 0",
    ] {
        assert!(
            text.contains(&format!("{line}\n")),
            "{line} is not in {text}"
        );
    }
}

/// Nothing is published while there is no handle.
#[test]
fn a_handle_that_is_made_late_finds_what_was_counted_before() {
    let mut sim = portcullis::sim::Sim::new(1, Config::new(), ());
    let addr = sim.listen(local(), |(): &mut (), _| Echo).expect("listen");
    let early = sim.handle();
    drop(early);
    for _ in 0..3 {
        sim.connect(addr).expect("it listens");
        sim.settle();
    }
    let late = sim.handle();
    assert_eq!(late.stats(), sim.stats());
    assert_eq!((late.stats().accepted, late.stats().open), (3, 3));
    sim.connect(addr).expect("it listens");
    sim.settle();
    assert_eq!(late.stats(), sim.stats());
}
