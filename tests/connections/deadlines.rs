//! Every state ends in time, for its own reason, and a busy connection stays.

use std::io::Write;
use std::net::{Shutdown, SocketAddr};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use kit::net::{
    connect, eventually, hold, local, packet2, ping, read_to_end, recv2, send2, PATIENCE,
};
use kit::script::{connect_narrow, spawn_script, usual, Call, Entry, Journal, ScriptedHandler};
use portcullis::sim::{ClientId, ClientState, Sim};
use portcullis::{CloseReason, Config, ConnConfig, Context, Framing, Listen, Outcome, State};

/// Short, but much longer than a busy machine needs between two of our own steps.
const SHORT: Duration = Duration::from_millis(400);

/// Short too, for peers that do not send FIN.
const LINGER: Duration = Duration::from_millis(50);

fn brief() -> Listen {
    local().with(|listen| brief_conn(&mut listen.conn))
}

fn brief_conn(conn: &mut ConnConfig) {
    conn.linger_timeout = LINGER;
    conn.linger_bytes = 1024 * 1024;
}

fn timer_keys(journal: &kit::script::Journal) -> Vec<u8> {
    journal.pick(|entry| match entry {
        Entry::Timer(key) => Some(*key),
        _ => None,
    })
}

/// A simulated server whose connections each play a copy of `play`.
fn world<F>(config: Config, listen: Listen, play: F) -> (Sim, SocketAddr, Journal)
where
    F: FnMut(&mut Context<'_>, Call<'_>) -> Outcome + Clone + 'static,
{
    let journal = Journal::default();
    let notes = journal.clone();
    let mut sim = Sim::new(1, config, ());
    let accept = move |_: &mut (), _| ScriptedHandler::new(notes.noting(play.clone()));
    let addr = sim.listen(listen, accept).expect("listens");
    (sim, addr, journal)
}

fn come(sim: &mut Sim, addr: SocketAddr) -> ClientId {
    let client = sim.connect(addr).expect("it listens");
    sim.settle();
    client
}

/// Only bytes from the peer move the idle timeout: a silent client is closed, a busy one stays.
#[test]
fn the_silent_leave_and_the_busy_stay() {
    let listen = brief().with(|listen| listen.conn.idle_timeout = SHORT);
    let (mut sim, addr, journal) = world(Config::new(), listen, usual);
    let (busy, silent) = (come(&mut sim, addr), come(&mut sim, addr));
    sim.send(silent, &packet2(b"once"));
    for quarter in 1..=8 {
        sim.send(busy, &packet2(b"busy"));
        sim.advance(SHORT / 4);
        assert_eq!(sim.received(busy), packet2(b"busy"));
        let left = quarter >= 4;
        assert_eq!(sim.state(silent) == ClientState::Finished, left);
    }
    assert_eq!(journal.reasons(), [CloseReason::IdleTimeout]);
    assert_eq!(sim.received(silent), packet2(b"once"));
    assert_eq!(sim.state(busy), ClientState::Connected);
}

/// UBF: own sends are no sign of life of the peer.
#[test]
fn own_sends_do_not_move_the_idle_deadline() {
    let listen = brief().with(|listen| listen.conn.idle_timeout = SHORT);
    let (mut sim, addr, journal) = world(Config::new(), listen, |cx, call| match call {
        Call::Open | Call::Timer(_) => {
            cx.conn.send(b"are you there?")?;
            cx.conn.set_timer(1, SHORT / 8);
            Ok(())
        }
        call => usual(cx, call),
    });
    let silent = come(&mut sim, addr);
    sim.advance(SHORT + LINGER);
    assert_eq!(journal.reasons(), [CloseReason::IdleTimeout]);
    let heard = sim.received(silent).len();
    assert!(heard >= 7 * 16, "{heard} bytes: it was spoken to");
    assert!(timer_keys(&journal).len() >= 6);
}

/// Nor are messages and frames from our own threads.
#[test]
fn messages_do_not_move_the_idle_deadline() {
    let listen = brief().with(|listen| listen.conn.idle_timeout = SHORT);
    let (mut sim, addr, journal) = world(Config::new(), listen, usual);
    come(&mut sim, addr);
    let (handle, id) = (sim.handle(), sim.control().connections()[0].id);
    for _ in 0..7 {
        sim.advance(SHORT / 8);
        handle.notify(id, "news").expect("alive");
        handle.send(id, "news").expect("alive");
    }
    sim.advance(SHORT / 8 + LINGER);
    assert_eq!(journal.reasons(), [CloseReason::IdleTimeout]);
    assert_eq!(journal.count(&Entry::Message), 7);
}

/// The frame timeout counts from the frame's first byte, however many follow below the minimum rate.
#[test]
fn a_frame_begun_must_be_finished() {
    for framing in [Framing::Packet4, Framing::Line] {
        let listen = brief().with(|listen| {
            listen.framing = framing.clone();
            listen.conn.frame_timeout = SHORT;
            listen.conn.min_rate = 1_000_000;
        });
        let (mut sim, addr, journal) = world(Config::new(), listen, usual);
        let slow = come(&mut sim, addr);
        sim.send(slow, b"\x00\x10\x00\x00");
        // A byte now and then, as a slow-loris does.
        for _ in 0..8 {
            assert_eq!(journal.reasons(), [], "{framing:?}");
            sim.advance(SHORT / 8);
            sim.send(slow, b".");
        }
        sim.advance(SHORT / 8 + LINGER);
        let reasons = journal.reasons();
        assert_eq!(reasons, [CloseReason::FrameTimeout], "{framing:?}");
    }
}

/// Whole frames restart the clock: only an unfinished one is late.
#[test]
fn finished_frames_are_never_late() {
    let listen = brief().with(|listen| listen.conn.frame_timeout = SHORT);
    let (mut sim, addr, journal) = world(Config::new(), listen, usual);
    let steady = come(&mut sim, addr);
    // Always in the middle of a frame, and each one in time.
    sim.send(steady, b"\x00");
    for _ in 0..12 {
        sim.advance(SHORT / 4);
        sim.send(steady, b"\x02ab\x00");
        sim.settle();
        assert_eq!(sim.received(steady), packet2(b"ab"));
    }
    assert_eq!(journal.reasons(), []);
    sim.advance(SHORT + LINGER + Duration::from_millis(1));
    assert_eq!(journal.reasons(), [CloseReason::FrameTimeout]);
}

#[cfg(feature = "tls")]
#[test]
fn a_handshake_must_be_finished() {
    let config = std::sync::Arc::new(kit::tls::Site::new().server());
    let listen = brief()
        .tls(config)
        .with(|listen| listen.conn.handshake_timeout = SHORT);
    let server = kit::tls::spawn_recorder(Config::new(), listen);
    // Nothing; and the beginning of a ClientHello, then a byte now and then.
    let mut mute = connect(server.addr());
    let mut slow = connect(server.addr());
    slow.write_all(&[0x16, 3, 1, 2, 0, 1, 0, 1, 0xFC, 3, 3])
        .expect("write");
    eventually("both end", || {
        let _ = slow.write_all(&[0]);
        server.handle.stats().closed_total() == 2
    });
    kit::net::await_end(&mut mute);
    let stats = server.handle.stats();
    assert_eq!(
        (stats.closed(CloseReason::HandshakeTimeout), stats.opened),
        (2, 0)
    );
}

/// The peer is owed bytes that it never takes. What is reported is that, also when we were closing already.
#[test]
fn what_is_owed_must_be_taken() {
    let listen = brief().with(|listen| {
        listen.conn.write_timeout = SHORT;
        listen.socket.send_buffer = Some(16 * 1024);
    });
    let (server, journal) = spawn_script(Config::new(), listen, |cx, call| match call {
        Call::Frame(how) => {
            for _ in 0..10 {
                cx.conn.send([1; 60_000])?;
            }
            if how == b"close" {
                cx.conn.close();
            }
            Ok(())
        }
        call => usual(cx, call),
    });
    for (before, how) in [&b"stay"[..], b"close"].into_iter().enumerate() {
        let mut stuck = connect_narrow(server.addr());
        send2(&mut stuck, how);
        let reasons = journal.until_closed(before + 1);
        assert_eq!(reasons[before..], [CloseReason::WriteTimeout]);
    }
}

/// After our FIN the peer has the linger's time for its own.
#[test]
fn a_peer_that_does_not_finish_after_our_fin_is_let_go() {
    let listen = local().with(|listen| {
        listen.conn.linger_timeout = SHORT;
        listen.conn.linger_bytes = 1024;
    });
    let (server, journal) = spawn_script(Config::new(), listen, |cx, call| match call {
        Call::Frame(_) => {
            cx.conn.close();
            Ok(())
        }
        call => usual(cx, call),
    });
    let mut client = connect(server.addr());
    send2(&mut client, b"bye");
    assert_eq!(read_to_end(&mut client), b"");
    let states = server.ask(|(), control| {
        control
            .connections()
            .iter()
            .map(|info| info.state)
            .collect::<Vec<_>>()
    });
    assert!(
        states.iter().all(|state| *state == State::Closing),
        "{states:?}"
    );
    // The client keeps its side open all the time.
    assert_eq!(journal.until_closed(1), [CloseReason::Closed]);
}

#[test]
fn timers_fire_in_order_move_and_are_cancelled() {
    let ms = Duration::from_millis;
    let mut fours = 0;
    let (server, journal) = spawn_script(Config::new(), brief(), move |cx, call| match call {
        Call::Frame(_) => {
            cx.conn.set_timer(5, ms(250));
            cx.conn.set_timer(1, ms(50));
            cx.conn.set_timer(4, ms(200));
            cx.conn.set_timer(2, ms(20));
            cx.conn.set_timer(9, ms(30));
            cx.conn.set_timer(0, Duration::MAX);
            cx.conn.cancel_timer(9);
            cx.conn.cancel_timer(8);
            // Moved behind key 1.
            cx.conn.set_timer(2, ms(100));
            Ok(())
        }
        // Moved from inside another's call, behind key 5.
        Call::Timer(1) => {
            cx.conn.set_timer(4, ms(400));
            Ok(())
        }
        // Set anew by itself, to now.
        Call::Timer(4) if fours < 2 => {
            fours += 1;
            cx.conn.set_timer(4, Duration::ZERO);
            Ok(())
        }
        Call::Timer(4) => {
            cx.conn.set_timer(6, ms(1));
            cx.conn.close();
            cx.conn.set_timer(7, ms(1));
            Ok(())
        }
        call => usual(cx, call),
    });
    let mut client = connect(server.addr());
    send2(&mut client, b"go");
    assert_eq!(read_to_end(&mut client), b"");
    drop(client);
    journal.until_closed(1);
    assert_eq!(timer_keys(&journal), [1, 2, 5, 4, 4, 4]);
}

/// A timer of a connection that has gone never fires, least of all for the slot's next connection.
#[test]
fn a_timer_dies_with_its_connection() {
    let cap = Config::max_connections(1);
    let (mut sim, addr, journal) = world(cap, brief(), |cx, call| match call {
        Call::Frame(b"set") => {
            cx.conn.set_timer(7, Duration::from_millis(100));
            Ok(())
        }
        Call::Frame(b"wait") => {
            cx.conn.set_timer(8, Duration::from_millis(300));
            Ok(())
        }
        call => usual(cx, call),
    });
    let first = come(&mut sim, addr);
    sim.send(first, &packet2(b"set"));
    sim.advance(Duration::from_millis(50));
    sim.finish(first);
    sim.settle();
    assert_eq!(journal.reasons(), [CloseReason::Finished]);
    let second = come(&mut sim, addr);
    sim.send(second, &packet2(b"wait"));
    sim.advance(Duration::from_millis(299));
    assert_eq!(timer_keys(&journal), [0_u8; 0]);
    sim.advance(Duration::from_secs(1));
    assert_eq!(timer_keys(&journal), [8]);
}

/// A timeout of `Duration::MAX` never expires, and arithmetic with it saturates.
#[test]
fn never_is_never_and_needs_no_clock() {
    let listen = brief().with(|listen| {
        listen.conn.idle_timeout = Duration::MAX;
        listen.conn.frame_timeout = Duration::MAX;
        listen.conn.write_timeout = Duration::MAX;
        listen.conn.handshake_timeout = Duration::MAX;
    });
    let (server, _journal) = spawn_script(Config::new(), listen, usual);
    let mut client = connect(server.addr());
    ping(&mut client, b"hello");
    client.write_all(b"\x00").expect("half a header");
    server.until("it is there", |stats| stats.traffic.bytes_in == 8);
    let iterations = server.handle.stats().iterations;
    client.write_all(b"\x01x").expect("the rest");
    assert_eq!(recv2(&mut client), b"x");
    assert!(
        server.handle.stats().iterations - iterations < 20,
        "the loop is busy with nothing"
    );
    client.shutdown(Shutdown::Write).expect("FIN");
    assert_eq!(read_to_end(&mut client), b"");
}

/// A handler that blocks delays the others, and pauses their timeouts. Bytes that arrived while it
/// blocked count from when they are read.
#[test]
fn a_blocking_handler_does_not_make_others_idle() {
    let idle = Duration::from_secs(2);
    let (block, blocked) = mpsc::channel::<()>();
    let (tell, told) = mpsc::channel();
    let blocked = std::sync::Arc::new(std::sync::Mutex::new(blocked));
    let (server, journal) = spawn_script(
        Config::new(),
        brief().with(|listen| listen.conn.idle_timeout = idle),
        move |cx, call| match call {
            Call::Frame(b"block") => {
                let _ = tell.send(());
                let _ = blocked
                    .lock()
                    .expect("only one blocks")
                    .recv_timeout(PATIENCE);
                Ok(())
            }
            call => usual(cx, call),
        },
    );
    let mut blocker = connect(server.addr());
    let mut other = connect(server.addr());
    ping(&mut blocker, b"hello");
    ping(&mut other, b"hello");
    // Both are in the same batch of events, the blocker first.
    let still = hold(&server.handle);
    send2(&mut blocker, b"block");
    send2(&mut other, b"one");
    drop(still);
    told.recv_timeout(PATIENCE).expect("it blocks");
    let start = Instant::now();
    eventually("longer than the idle timeout", || {
        start.elapsed() > idle + idle / 4
    });
    send2(&mut other, b"two");
    drop(block);
    assert_eq!(recv2(&mut other), b"one");
    assert_eq!(recv2(&mut other), b"two");
    // A few turns, in which deadlines are judged.
    for _ in 0..10 {
        server.ask(|(), _| ());
    }
    assert!(
        !journal.reasons().contains(&CloseReason::IdleTimeout),
        "{:?}",
        journal.all()
    );
    ping(&mut other, b"three");
}

/// The same for connections accepted in the iteration in which a handler blocked: their timeouts
/// count from accept.
#[test]
fn a_connection_accepted_after_a_blocking_job_has_its_whole_timeout() {
    let idle = Duration::from_secs(2);
    let (server, journal) = spawn_script(
        Config::new(),
        brief().with(|listen| listen.conn.idle_timeout = idle),
        usual,
    );
    let mut blocked_out = {
        let still = hold(&server.handle);
        let client = connect(server.addr());
        let start = Instant::now();
        eventually("longer than the idle timeout", || {
            start.elapsed() > idle + idle / 4
        });
        drop(still);
        client
    };
    server.until("it is accepted", |stats| stats.opened == 1);
    for _ in 0..10 {
        server.ask(|(), _| ());
    }
    ping(&mut blocked_out, b"hello");
    assert_eq!(journal.reasons(), []);
}
