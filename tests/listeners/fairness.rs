//! No connection starves: a client that floods and a flood of clients leave the others served.

use std::io::Write;
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Instant;

use kit::net::{connect, local, packet2, ping, recv2, send2, spawn, spawn_echo, Running, PATIENCE};
use portcullis::sim::{ClientId, Sim};
use portcullis::{AtCapacity, CloseReason, Config, Context, Framing, Handler, Outcome, Server};

const CLIENTS: usize = 50;
const ROUNDS: u32 = 20;

/// Answers what begins with `?`, and swallows the rest.
struct Answer;

impl Handler for Answer {
    fn on_frame(&mut self, cx: &mut Context<'_>, frame: &[u8]) -> Outcome {
        if frame.starts_with(b"?") {
            cx.conn.send(frame)?;
        }
        Ok(())
    }
}

fn answering(config: Config) -> Running {
    spawn(|| {
        let mut server = Server::new(config).expect("server");
        server
            .listen(local(), |_: &mut (), _| Answer)
            .expect("listen");
        (server, ())
    })
}

/// A client that sends `bytes` over and over, until it is told to stop; tells how often.
struct Flood {
    done: Arc<AtomicBool>,
    thread: JoinHandle<u64>,
}

impl Flood {
    fn of(addr: SocketAddr, bytes: Vec<u8>) -> Self {
        let done = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&done);
        let thread = thread::spawn(move || {
            let mut client = connect(addr);
            let mut count = 0;
            while !told.load(Ordering::Relaxed) {
                client.write_all(&bytes).expect("the server reads");
                count += 1;
            }
            count
        });
        Self { done, thread }
    }

    fn stop(self) -> u64 {
        self.done.store(true, Ordering::Relaxed);
        self.thread.join().expect("flooded")
    }
}

/// Every question of a round is answered before the next round begins.
fn all_are_answered(clients: &mut [TcpStream]) {
    for round in 0..ROUNDS {
        let question = [b"?", &round.to_be_bytes()[..]].concat();
        for client in &mut *clients {
            send2(client, &question);
        }
        for client in &mut *clients {
            assert_eq!(recv2(client), question);
        }
    }
}

#[test]
fn fifty_are_answered_beside_one_that_floods() {
    let server = answering(Config::new());
    let mut clients: Vec<_> = (0..CLIENTS).map(|_| connect(server.addr())).collect();
    // Small frames, which are the dearest by the byte.
    let flood = Flood::of(server.addr(), packet2(b"flood").repeat(10_000));
    server.until("it floods", |stats| stats.traffic.frames_in > 10_000);
    let before = server.handle.stats().traffic.frames_in;
    all_are_answered(&mut clients);
    // The flood went on meanwhile: it was answered beside it, not after it.
    server.until("and goes on", |stats| {
        stats.traffic.frames_in > before + CLIENTS as u64 * u64::from(ROUNDS) + 10_000
    });
    assert!(flood.stop() > 0);
}

/// An empty frame costs two bytes and a call.
#[test]
fn empty_frames_are_no_way_around_the_budget() {
    let server = answering(Config::new());
    let mut clients: Vec<_> = (0..CLIENTS).map(|_| connect(server.addr())).collect();
    let flood = Flood::of(server.addr(), vec![0; 100_000]);
    server.until("it floods", |stats| stats.traffic.frames_in > 10_000);
    all_are_answered(&mut clients);
    assert!(flood.stop() > 0);
}

/// Answers questions and counts the answers.
struct Tally;

impl Handler<u64> for Tally {
    fn on_frame(&mut self, cx: &mut Context<'_, u64>, frame: &[u8]) -> Outcome {
        if frame.starts_with(b"?") {
            *cx.app += 1;
            cx.conn.send(frame)?;
        }
        Ok(())
    }
}

/// The work of one client's write is spread over several turns, and the other clients have theirs
/// in between.
#[test]
fn ten_thousand_frames_in_one_write_do_not_keep_the_others_waiting() {
    let mut server =
        Server::new(Config::new().with(|config| config.budgets.read_bytes = 1)).expect("server");
    server
        .listen(local(), |_: &mut u64, _| Tally)
        .expect("listen");
    let addr = kit::net::tcp(&server.control().listeners()[0].addr);
    let (mut writer, mut other) = (connect(addr), connect(addr));
    let writing = thread::spawn(move || {
        // 4 MB, of which each turn takes one read of 64 KiB: some 160 frames.
        writer
            .write_all(&packet2(&[b'x'; 398]).repeat(10_000))
            .expect("send");
    });
    let (mut asked, mut answered, begun) = (0, 0, Instant::now());
    while server.control().stats().traffic.frames_in - answered < 10_000 {
        send2(&mut other, b"?now");
        asked += 1;
        while answered < asked {
            assert!(begun.elapsed() < PATIENCE, "no answer");
            let before = server.control().stats().traffic.frames_in;
            server
                .poll_once(&mut answered, Some(PATIENCE))
                .expect("a turn");
            let taken = server.control().stats().traffic.frames_in - before;
            assert!(taken <= 170, "{taken} frames in one turn");
        }
        assert_eq!(recv2(&mut other), b"?now");
    }
    writing.join().expect("all were taken");
    // As a rule one in each of the sixty turns that it takes at least.
    assert!(answered > 10, "{answered} answers beside it");
}

/// One read may bring many thousands: no turn takes more of them than the budget says, and none is lost.
#[test]
fn a_read_full_of_empty_frames_is_told_in_several_turns() {
    const MOST: u64 = 64 * 1024 / 64;
    let mut server = Server::new(Config::new()).expect("server");
    server
        .listen(local(), |_: &mut u64, _| Tally)
        .expect("listen");
    let mut client = connect(kit::net::tcp(&server.control().listeners()[0].addr));
    let mut wire = packet2(b"").repeat(20_000);
    wire.extend_from_slice(&packet2(b"?all"));
    client.write_all(&wire).expect("send");
    let (mut answered, begun) = (0, Instant::now());
    while answered == 0 {
        assert!(begun.elapsed() < PATIENCE, "no answer");
        let before = server.control().stats().traffic.frames_in;
        server
            .poll_once(&mut answered, Some(PATIENCE))
            .expect("a turn");
        let taken = server.control().stats().traffic.frames_in - before;
        assert!(taken <= MOST, "{taken} frames in one turn");
    }
    assert_eq!(recv2(&mut client), b"?all");
    assert_eq!(server.control().stats().traffic.frames_in, 20_001);
}

/// A client that does not read its answers is paused, however much it sends.
#[test]
fn one_that_does_not_read_its_answers_stops_no_other() {
    let listen = local().with(|listen| {
        listen.framing = Framing::Packet2;
        listen.socket.send_buffer = Some(16 * 1024);
    });
    let server = spawn_echo(Config::new(), listen);
    let mut clients: Vec<_> = (0..CLIENTS).map(|_| connect(server.addr())).collect();
    let addr = server.addr();
    let deaf = thread::spawn(move || {
        let mut client = connect(addr);
        client.set_nonblocking(true).expect("nonblocking");
        let frame = packet2(&[7; 1000]);
        // Until the kernel takes no more, which is when the server has stopped reading; bounded all the same.
        let mut refused = 0;
        for _ in 0..1_000_000 {
            match client.write(&frame) {
                Ok(_) => refused = 0,
                Err(_) if refused > 100 => break,
                Err(_) => {
                    refused += 1;
                    thread::park_timeout(std::time::Duration::from_millis(1));
                }
            }
        }
        client
    });
    all_are_answered(&mut clients);
    let client = deaf.join().expect("flooded");
    all_are_answered(&mut clients);
    drop(client);
}

#[test]
fn open_connections_are_served_in_a_flood_of_connects() {
    for policy in [
        AtCapacity::Wait,
        AtCapacity::Refuse {
            farewell: Vec::new(),
        },
    ] {
        let server = spawn_echo(
            Config::max_connections(CLIENTS + 10).with(|config| config.budgets.accepts = 8),
            local().with(|listen| listen.at_capacity = policy),
        );
        let mut clients: Vec<_> = (0..CLIENTS).map(|_| connect(server.addr())).collect();
        for client in &mut clients {
            ping(client, b"in");
        }
        let addr = server.addr();
        let done = Arc::new(AtomicBool::new(false));
        let floods: Vec<_> = (0..2)
            .map(|_| {
                let done = Arc::clone(&done);
                thread::spawn(move || {
                    let mut count = 0_u64;
                    // Bounded: each leaves a port in TIME_WAIT.
                    while !done.load(Ordering::Relaxed) && count < 5_000 {
                        drop(TcpStream::connect_timeout(&addr, PATIENCE));
                        count += 1;
                    }
                    count
                })
            })
            .collect();
        server.until("they come", |stats| stats.accepted > CLIENTS as u64 + 10);
        all_are_answered(&mut clients);
        done.store(true, Ordering::Relaxed);
        let connects: u64 = floods
            .into_iter()
            .map(|flood| flood.join().expect("flooded"))
            .sum();
        assert!(connects > 0);
        drop(clients);
        let (stats, ()) = server.finish();
        assert!(stats.peak <= CLIENTS + 10);
        assert_eq!(stats.accepted, stats.closed_total());
        let others = stats.closed(CloseReason::Panicked) + stats.closed(CloseReason::Io);
        assert_eq!(others, 0);
    }
}

/// A listener whose clients come without end leaves the other listener its turn.
#[test]
fn a_flood_on_one_listener_leaves_the_other_open() {
    let server = spawn(|| {
        let mut server =
            Server::new(Config::new().with(|config| config.budgets.accepts = 1)).expect("server");
        server
            .listen(local(), |_: &mut (), _| Answer)
            .expect("listen");
        server
            .listen(local(), |_: &mut (), _| Answer)
            .expect("listen");
        (server, ())
    });
    let [flooded, quiet] = [
        kit::net::tcp(&server.listeners[0].addr),
        kit::net::tcp(&server.listeners[1].addr),
    ];
    let done = Arc::new(AtomicBool::new(false));
    let told = Arc::clone(&done);
    let flood = thread::spawn(move || {
        for _ in 0..5_000 {
            if told.load(Ordering::Relaxed) {
                return;
            }
            drop(TcpStream::connect_timeout(&flooded, PATIENCE));
        }
    });
    server.until("they come", |stats| stats.accepted > 10);
    for _ in 0..50 {
        ping(&mut connect(quiet), b"?");
    }
    done.store(true, Ordering::Relaxed);
    flood.join().expect("flooded");
}

/// Listeners whose clients wait at the cap have the slots in turn, wherever they stand among others.
#[test]
fn listeners_share_freed_slots() {
    let mut sim = Sim::new(1, Config::max_connections(1), ());
    let mut open = || {
        let listen = local().with(|listen| listen.evict_silent = false);
        sim.listen(listen, |_: &mut (), _| Answer).expect("listen")
    };
    let addrs: Vec<SocketAddr> = (0..20).map(|_| open()).collect();
    let mut waiting: [Vec<ClientId>; 2] = Default::default();
    let mut served = [0_u32; 2];
    for _ in 0..100 {
        for (clients, &addr) in waiting.iter_mut().zip(&addrs) {
            while clients.len() < 3 {
                let client = sim.connect(addr).expect("it listens");
                sim.send(client, b"\0\x02?!");
                clients.push(client);
            }
        }
        sim.settle();
        for (clients, served) in waiting.iter_mut().zip(&mut served) {
            clients.retain(|&client| {
                let is_served = !sim.received(client).is_empty();
                if is_served {
                    *served += 1;
                    sim.reset(client);
                }
                !is_served
            });
        }
    }
    assert!(served[0].abs_diff(served[1]) <= 2, "{served:?}");
}
