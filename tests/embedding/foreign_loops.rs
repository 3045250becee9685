//! A server's descriptor in other event loops, `polling`'s and `calloop`'s, in all their modes: a
//! million events each, without a lost wake-up.

use std::io::{Read, Write};
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use calloop::generic::Generic;
use calloop::{EventLoop, Interest, Mode, PostAction};
use kit::net::{connect, local, packet2, Echo, PATIENCE};
use polling::{Event, Events, PollMode, Poller};
use portcullis::{Config, Server};

const CLIENTS: u64 = 4;
/// Frames in one write: each write is a wake-up, and the next comes when all of its echoes are there.
const BATCH: u64 = 40;
/// One frame echoed is an event.
const EVENTS: u64 = 1_000_000;

/// An echo server without deadlines, so that a lost wake-up is a stall; and clients that each send their share.
fn serve(events: u64) -> (Server, JoinHandle<()>) {
    let mut server = Server::new(Config::new()).expect("server");
    let listen = local().with(|listen| {
        listen.conn.idle_timeout = Duration::MAX;
        listen.conn.frame_timeout = Duration::MAX;
        listen.conn.write_timeout = Duration::MAX;
    });
    server.listen(listen, |_: &mut (), _| Echo).expect("listen");
    let addr = kit::net::tcp(&server.control().listeners()[0].addr);
    let clients = thread::spawn(move || {
        let clients: Vec<_> = (0..CLIENTS)
            .map(|client| thread::spawn(move || talk(addr, client, events / CLIENTS / BATCH)))
            .collect();
        for client in clients {
            client.join().expect("served");
        }
    });
    (server, clients)
}

fn talk(addr: SocketAddr, client: u64, batches: u64) {
    let mut stream = connect(addr);
    let mut echo = Vec::new();
    for batch in 0..batches {
        let frame = packet2(&(client << 32 | batch).to_be_bytes());
        let wire = frame.repeat(usize::try_from(BATCH).expect("small"));
        stream.write_all(&wire).expect("sent");
        echo.resize(wire.len(), 0);
        // Bounded by the patience of the stream.
        stream
            .read_exact(&mut echo)
            .expect("the echoes of this batch");
        assert!(echo == wire, "batch {batch} of client {client}");
    }
}

fn is_over(server: &mut Server) -> bool {
    server.control().stats().closed_total() == CLIENTS
}

/// How long the loop may sleep.
fn wait(server: &Server) -> Duration {
    server.next_timeout().unwrap_or(PATIENCE).min(PATIENCE)
}

/// One turn, for a reason: an event, or work that was left over. Without one a wake-up is lost.
fn turn(server: &mut Server, event: bool, waited: Duration) {
    assert!(event || waited < PATIENCE, "a wake-up is lost: {server:?}");
    server
        .poll_once(&mut (), Some(Duration::ZERO))
        .expect("a turn");
}

fn descriptor(server: &Server) -> OwnedFd {
    server.as_fd().try_clone_to_owned().expect("a descriptor")
}

/// What it comes to: that the events were there, and that they woke the loop often.
fn check(server: &mut Server, clients: JoinHandle<()>, events: u64, woken: u64) {
    clients.join().expect("all served");
    assert_eq!(server.control().stats().traffic.frames_in, events);
    // Clients that are ready at the same time share a wake-up.
    assert!(
        woken > events / BATCH / CLIENTS / 4,
        "{woken} wake-ups are too few to lose one"
    );
}

fn in_polling(mode: PollMode, events: u64) {
    let (mut server, clients) = serve(events);
    let (poller, fd) = (Poller::new().expect("poller"), descriptor(&server));
    // SAFETY: `delete` below comes before the descriptor is closed.
    unsafe { poller.add_with_mode(&fd, Event::readable(7), mode) }.expect("added");
    let (mut ready, mut woken) = (Events::new(), 0);
    while !is_over(&mut server) {
        let waited = wait(&server);
        ready.clear();
        poller.wait(&mut ready, Some(waited)).expect("wait");
        woken += ready.len() as u64;
        if !ready.is_empty() && matches!(mode, PollMode::Oneshot | PollMode::EdgeOneshot) {
            // Before the turn: what comes while it lasts is announced then.
            poller
                .modify_with_mode(&fd, Event::readable(7), mode)
                .expect("armed");
        }
        turn(&mut server, !ready.is_empty(), waited);
    }
    poller.delete(&fd).expect("deleted");
    check(&mut server, clients, events, woken);
}

fn in_calloop(mode: Mode, events: u64) {
    struct Nested {
        server: Server,
        events: u64,
    }
    let (server, clients) = serve(events);
    let mut event_loop: EventLoop<'_, Nested> = EventLoop::try_new().expect("loop");
    let source = Generic::new(descriptor(&server), Interest::READ, mode);
    let token = event_loop
        .handle()
        .insert_source(source, |_, _, nested| {
            nested.events += 1;
            Ok(PostAction::Continue)
        })
        .expect("inserted");
    let mut nested = Nested { server, events: 0 };
    while !is_over(&mut nested.server) {
        let (waited, before) = (wait(&nested.server), nested.events);
        event_loop.dispatch(waited, &mut nested).expect("dispatch");
        let event = nested.events > before;
        if event && matches!(mode, Mode::OneShot) {
            event_loop.handle().update(&token).expect("armed");
        }
        turn(&mut nested.server, event, waited);
    }
    let woken = nested.events;
    check(&mut nested.server, clients, events, woken);
}

#[test]
fn a_million_events_in_polling_level_triggered() {
    in_polling(PollMode::Level, EVENTS);
}

#[test]
fn a_million_events_in_polling_edge_triggered() {
    in_polling(PollMode::Edge, EVENTS);
}

/// The mode of `Poller::add`.
#[test]
fn a_million_events_in_polling_one_shot() {
    in_polling(PollMode::Oneshot, EVENTS);
}

/// Not every system has both at once.
#[test]
fn polling_edge_triggered_and_one_shot() {
    if cfg!(any(
        target_os = "linux",
        target_os = "macos",
        target_os = "freebsd"
    )) {
        in_polling(PollMode::EdgeOneshot, EVENTS / 10);
    }
}

#[test]
fn a_million_events_in_calloop_level_triggered() {
    in_calloop(Mode::Level, EVENTS);
}

#[test]
fn a_million_events_in_calloop_edge_triggered() {
    in_calloop(Mode::Edge, EVENTS);
}

#[test]
fn a_million_events_in_calloop_one_shot() {
    in_calloop(Mode::OneShot, EVENTS);
}
