//! A server fits into a program that has a loop of its own: bounded turns, a descriptor to wait on, no wake-ups without
//! work, and nothing demanded of the program's state.

use std::cell::{Cell, RefCell};
use std::io::Write;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use kit::net::{
    await_end, connect, descriptor_limit, local, packet2, ping, read_to_end, recv2, send2,
    spawn_echo, turns_until, uninterrupted, Echo, ReadSome, PATIENCE,
};
use mio::unix::SourceFd;
use portcullis::{Config, Context, Framing, Handler, Listen, Outcome, Peer, Server};

fn echo_server(config: Config, listen: Listen) -> (Server, SocketAddr) {
    let mut server = Server::new(config).expect("server");
    server.listen(listen, |_: &mut (), _| Echo).expect("listen");
    let addr = kit::net::tcp(&server.control().listeners()[0].addr);
    (server, addr)
}

/// One turn that does not wait.
fn turn<A>(server: &mut Server<A>, app: &mut A) {
    server.poll_once(app, Some(Duration::ZERO)).expect("a turn");
}

#[test]
fn a_game_serves_its_clients_between_two_frames() {
    let (mut server, addr) = echo_server(Config::new(), local());
    let player = thread::spawn(move || {
        let mut client = connect(addr);
        for move_made in 0..100_u32 {
            ping(&mut client, &move_made.to_be_bytes());
        }
    });
    let (mut ticks, begun) = (0_u64, Instant::now());
    while !player.is_finished() {
        assert!(begun.elapsed() < PATIENCE, "not served");
        turn(&mut server, &mut ());
        ticks += 1;
        // The rest of the game's frame.
        thread::yield_now();
    }
    player.join().expect("served");
    assert!(ticks >= 100 && server.control().stats().iterations == ticks);
}

#[test]
fn a_turn_accepts_no_more_than_its_budget_of_each_listener() {
    let (mut server, one) = echo_server(
        Config::new().with(|config| config.budgets.accepts = 4),
        local(),
    );
    server
        .listen(local(), |_: &mut (), _| Echo)
        .expect("listen");
    let other = kit::net::tcp(&server.control().listeners()[1].addr);
    let _clients: Vec<_> = (0..20)
        .map(|n| connect(if n < 10 { one } else { other }))
        .collect();
    for expected in [8, 16, 20] {
        turn(&mut server, &mut ());
        assert_eq!(server.control().stats().accepted, expected);
        if expected < 20 {
            assert_eq!(
                server.next_timeout(),
                Some(Duration::ZERO),
                "clients are left"
            );
        }
    }
}

/// Counts frames and their bytes.
struct Count;

impl Handler<(u64, u64)> for Count {
    fn on_frame(&mut self, cx: &mut Context<'_, (u64, u64)>, frame: &[u8]) -> Outcome {
        cx.app.0 += 1;
        cx.app.1 += frame.len() as u64;
        Ok(())
    }
}

/// A client that writes frames of `size` until it is told to stop or its connection ends.
fn flood(addr: SocketAddr, size: usize, done: &Arc<AtomicBool>) -> thread::JoinHandle<()> {
    let (mut client, done) = (connect(addr), Arc::clone(done));
    thread::spawn(move || {
        let many = packet2(&vec![b'x'; size]).repeat(1 << 20 >> size.ilog2());
        while !done.load(Ordering::Relaxed) && client.write_all(&many).is_ok() {}
    })
}

/// One read is 64 KiB, and the budget is rounded up to whole reads.
#[test]
fn a_turn_reads_no_more_than_its_budget_from_one_client() {
    const READ: u64 = 64 * 1024;
    for (budget, bound) in [(1, READ), (READ + 1, 2 * READ)] {
        let config = Config::new()
            .with(|config| config.budgets.read_bytes = usize::try_from(budget).expect("fits"));
        let mut server = Server::new(config).expect("server");
        server
            .listen(local(), |_: &mut (u64, u64), _| Count)
            .expect("listen");
        let addr = kit::net::tcp(&server.control().listeners()[0].addr);
        let done = Arc::new(AtomicBool::new(false));
        let flooder = flood(addr, 510, &done);
        let mut app = (0, 0);
        turns_until(&mut server, &mut app, |_, app| app.0 > 0);
        for _ in 0..200 {
            // So that every turn has an event and work left over, the dearest case.
            let (before, frames) = (server.control().stats().traffic.bytes_in, app.0);
            server.poll_once(&mut app, Some(PATIENCE)).expect("a turn");
            let read = server.control().stats().traffic.bytes_in - before;
            assert!(
                read <= bound,
                "{read} bytes in one turn, the budget is {budget}"
            );
            assert!(app.0 - frames <= bound / 512 + 1, "more frames than bytes");
        }
        done.store(true, Ordering::Relaxed);
        drop(server);
        flooder.join().expect("flooded");
    }
}

/// Messages from other threads are no way around the budget.
#[test]
fn nor_when_commands_for_that_client_come_in_the_same_turn() {
    let mut server =
        Server::new(Config::new().with(|config| config.budgets.read_bytes = 1)).expect("server");
    server
        .listen(local(), |_: &mut (u64, u64), _| Count)
        .expect("listen");
    let addr = kit::net::tcp(&server.control().listeners()[0].addr);
    let done = Arc::new(AtomicBool::new(false));
    let flooder = flood(addr, 510, &done);
    let mut app = (0, 0);
    turns_until(&mut server, &mut app, |_, app| app.0 > 0);
    let (handle, id) = (server.handle(), server.control().connections()[0].id);
    for _ in 0..50 {
        for _ in 0..20 {
            handle.notify(id, ()).expect("notify");
        }
        let before = server.control().stats().traffic.bytes_in;
        turn(&mut server, &mut app);
        let read = server.control().stats().traffic.bytes_in - before;
        assert!(read <= 64 * 1024, "{read} bytes in one turn");
    }
    done.store(true, Ordering::Relaxed);
    drop(server);
    flooder.join().expect("flooded");
}

#[test]
fn what_is_left_over_is_due_at_once_and_then_nothing_is_due() {
    let never = local().with(|listen| {
        listen.conn.idle_timeout = Duration::MAX;
        listen.conn.frame_timeout = Duration::MAX;
        listen.conn.write_timeout = Duration::MAX;
    });
    let (mut server, addr) = echo_server(
        Config::new().with(|config| config.budgets.read_bytes = 1),
        never,
    );
    let mut client = connect(addr);
    // Some 400 KiB: several turns of one read each.
    for _ in 0..100 {
        send2(&mut client, &[7; 4096]);
    }
    turns_until(&mut server, &mut (), |server, ()| {
        server.control().stats().traffic.frames_in > 0
    });
    let begun = Instant::now();
    while server.control().stats().traffic.frames_in < 100 {
        assert!(begun.elapsed() < PATIENCE, "not all was read");
        let wait = server.next_timeout();
        assert!(matches!(wait, None | Some(Duration::ZERO)), "{wait:?}");
        server
            .poll_once(&mut (), wait.or(Some(PATIENCE)))
            .expect("a turn");
        // The echo passes the high watermark: the client has to take some.
        while recv_waiting(&mut client) {}
    }
    turns_until(&mut server, &mut (), |server, ()| {
        server.next_timeout().is_none()
    });
}

/// Takes what has come already; whether there was anything.
fn recv_waiting(client: &mut TcpStream) -> bool {
    client.set_nonblocking(true).expect("nonblocking");
    let got = client.read_some(&mut [0; 64 * 1024]);
    client.set_nonblocking(false).expect("blocking");
    matches!(got, Ok(count) if count > 0)
}

#[test]
fn an_idle_server_waits_for_its_next_deadline() {
    let idle = Duration::from_secs(1000);
    let (mut server, addr) = echo_server(
        Config::new(),
        local().with(|listen| listen.conn.idle_timeout = idle),
    );
    turns_until(&mut server, &mut (), |server, ()| {
        server.next_timeout().is_none()
    });
    let _client = connect(addr);
    turns_until(&mut server, &mut (), |server, ()| {
        server.control().stats().open == 1 && server.next_timeout() != Some(Duration::ZERO)
    });
    let wait = server.next_timeout().expect("the idle timeout");
    assert!(wait <= idle && wait > idle - PATIENCE, "{wait:?}");
}

#[test]
fn a_poll_ends_at_its_timeout_without_an_event() {
    let (mut server, _) = echo_server(Config::new(), local());
    for timeout in [0, 1, 20].map(Duration::from_millis) {
        let begun = Instant::now();
        server.poll_once(&mut (), Some(timeout)).expect("a turn");
        assert!(begun.elapsed() < PATIENCE);
    }
    // The longest that can be said, with something to do: it does not overflow.
    server.handle().wake().expect("wake");
    server
        .poll_once(&mut (), Some(Duration::MAX))
        .expect("a turn");
}

/// A poll of the program's own, edge-triggered as mio's is, with the server's descriptor in it.
struct Outer {
    poll: mio::Poll,
    events: mio::Events,
}

impl Outer {
    fn around<A>(server: &Server<A>) -> Self {
        let poll = mio::Poll::new().expect("poll");
        let fd = server.as_fd().as_raw_fd();
        poll.registry()
            .register(&mut SourceFd(&fd), mio::Token(0), mio::Interest::READABLE)
            .expect("register");
        Self {
            poll,
            events: mio::Events::with_capacity(16),
        }
    }

    /// One turn of the outer loop, as [`Server::next_timeout`] says to do it. False if nothing at all came in time.
    fn turn<A>(&mut self, server: &mut Server<A>, app: &mut A) -> bool {
        let wait = server.next_timeout();
        let patience = Some(wait.unwrap_or(PATIENCE).min(PATIENCE));
        uninterrupted(|| self.poll.poll(&mut self.events, patience)).expect("poll");
        let woken = !self.events.is_empty() || wait.is_some_and(|wait| wait < PATIENCE);
        turn(server, app);
        woken
    }
}

#[test]
fn twenty_thousand_messages_through_another_poll_and_no_wake_up_is_lost() {
    const CLIENTS: u32 = 4;
    const EACH: u32 = 5_000;
    let never = local().with(|listen| listen.conn.idle_timeout = Duration::MAX);
    let (mut server, addr) = echo_server(Config::new(), never);
    let mut outer = Outer::around(&server);
    let clients = thread::spawn(move || {
        // One message at a time, so that a lost wake-up hangs its client.
        let clients: Vec<_> = (0..CLIENTS)
            .map(|_| {
                thread::spawn(move || {
                    let mut client = connect(addr);
                    for number in 0..EACH {
                        ping(&mut client, &number.to_be_bytes());
                    }
                })
            })
            .collect();
        for client in clients {
            client.join().expect("served");
        }
    });
    while server.control().stats().closed_total() < u64::from(CLIENTS) {
        assert!(
            outer.turn(&mut server, &mut ()),
            "a wake-up is lost: {server:?}"
        );
    }
    clients.join().expect("all served");
    assert_eq!(
        server.control().stats().traffic.frames_in,
        u64::from(CLIENTS * EACH)
    );
}

#[test]
fn commands_wake_the_outer_poll_too() {
    let (mut server, _) = echo_server(Config::new(), local());
    let mut server_app = ();
    let mut outer = Outer::around(&server);
    turns_until(&mut server, &mut server_app, |server, ()| {
        server.next_timeout().is_none()
    });
    let handle = server.handle();
    let asker = thread::spawn(move || {
        for number in 0..2_000_u32 {
            assert_eq!(handle.call(PATIENCE, move |(), _| number), Ok(number));
        }
    });
    while !asker.is_finished() {
        // The last iteration may find the caller gone: nothing wakes it for that, and it has
        // nothing left to do.
        if !outer.turn_within(&mut server, Duration::from_millis(100)) {
            assert_eq!(server.next_timeout(), None);
        }
    }
    asker.join().expect("answered");
}

impl Outer {
    /// As [`Outer::turn`], with a bound on the wait, and no turn of the server without an event.
    fn turn_within(&mut self, server: &mut Server, most: Duration) -> bool {
        let wait = server.next_timeout().unwrap_or(most).min(most);
        uninterrupted(|| self.poll.poll(&mut self.events, Some(wait))).expect("poll");
        let woken = !self.events.is_empty() || wait < most;
        if woken {
            turn(server, &mut ());
        }
        woken
    }
}

/// More sockets are ready than one poll takes: the outer poll, edge-triggered, does not announce the rest again.
#[test]
fn more_events_than_a_batch_are_left_over_work() {
    const CLIENTS: usize = 1_200;
    if descriptor_limit() < 2 * CLIENTS + 200 {
        assert!(
            std::env::var_os("CI").is_none(),
            "CI needs ulimit -n {}",
            2 * CLIENTS + 200
        );
        eprintln!(
            "SKIPPED: too few descriptors (ulimit -n {})",
            2 * CLIENTS + 200
        );
        return;
    }
    let config = Config::max_connections(CLIENTS);
    let (mut server, addr) = echo_server(
        config,
        local().with(|listen| listen.conn.idle_timeout = Duration::MAX),
    );
    let mut clients = Vec::new();
    for wave in 0..3 {
        for _ in 0..CLIENTS / 3 {
            clients.push(connect(addr));
        }
        turns_until(&mut server, &mut (), |server, ()| {
            server.control().stats().open == CLIENTS / 3 * (wave + 1)
        });
    }
    turns_until(&mut server, &mut (), |server, ()| {
        server.next_timeout().is_none()
    });
    let mut outer = Outer::around(&server);
    for client in &mut clients {
        send2(client, b"now");
    }
    while server.control().stats().traffic.frames_in < CLIENTS as u64 {
        assert!(
            outer.turn(&mut server, &mut ()),
            "a wake-up is lost: {server:?}"
        );
    }
    for client in &mut clients {
        assert_eq!(recv2(client), b"now");
    }
}

/// Without events there is no work. The quiet is as long as another server's 200 round trips.
#[test]
fn two_hundred_idle_connections_do_not_wake_the_loop() {
    let idle = spawn_echo(Config::new(), local());
    let mut clients: Vec<_> = (0..200).map(|_| connect(idle.addr())).collect();
    for client in &mut clients {
        ping(client, b"here");
    }
    idle.ask(|(), _| ());
    idle.until("the last turn is over", |stats| {
        stats.traffic.frames_in == 200
    });
    let busy = spawn_echo(Config::new(), local());
    let mut other = connect(busy.addr());
    // The turn that follows an echo may still be under way: let it end first.
    ping(&mut other, b"first");
    let before = idle.handle.stats().iterations;
    for round in 0..200_u32 {
        ping(&mut other, &round.to_be_bytes());
    }
    let after = idle.handle.stats().iterations;
    assert!(
        after - before <= 1,
        "{} turns without a reason",
        after - before
    );
}

/// Neither Send nor 'static: the state borrows a local, and shares with it through an Rc.
struct World<'a> {
    name: &'a str,
    log: Rc<RefCell<Vec<String>>>,
    visits: &'a Cell<u32>,
}

struct Visitor;

impl Handler<World<'_>> for Visitor {
    fn on_frame(&mut self, cx: &mut Context<'_, World<'_>>, frame: &[u8]) -> Outcome {
        let line = format!("{}: {}", cx.app.name, String::from_utf8_lossy(frame));
        cx.app.visits.set(cx.app.visits.get() + 1);
        cx.conn.send(line.as_bytes())?;
        cx.app.log.borrow_mut().push(line);
        Ok(())
    }
}

#[test]
fn the_state_may_borrow_and_share() {
    let (name, visits, log) = (String::from("world"), Cell::new(0), Rc::default());
    let mut world = World {
        name: &name,
        log: Rc::clone(&log),
        visits: &visits,
    };
    let mut server = Server::new(Config::new()).expect("server");
    server
        .listen(local(), |world: &mut World<'_>, _: Peer| {
            world.visits.set(world.visits.get() + 10);
            Visitor
        })
        .expect("listen");
    let mut client = connect(kit::net::tcp(&server.control().listeners()[0].addr));
    send2(&mut client, b"hello");
    turns_until(&mut server, &mut world, |_, world| world.visits.get() == 11);
    assert_eq!(recv2(&mut client), b"world: hello");
    assert_eq!(*log.borrow(), ["world: hello"]);
    assert!(server.control().stats().open == 1 && server.next_timeout().is_some());
}

#[test]
fn the_state_may_be_a_reference() {
    struct Note;
    impl<'a> Handler<&'a RefCell<Vec<u8>>> for Note {
        fn on_frame(
            &mut self,
            cx: &mut Context<'_, &'a RefCell<Vec<u8>>>,
            frame: &[u8],
        ) -> Outcome {
            cx.app.borrow_mut().extend_from_slice(frame);
            Ok(())
        }
    }
    let noted = RefCell::new(Vec::new());
    let mut server = Server::new(Config::new()).expect("server");
    server
        .listen(local(), |_: &mut &RefCell<Vec<u8>>, _| Note)
        .expect("listen");
    let mut client = connect(kit::net::tcp(&server.control().listeners()[0].addr));
    send2(&mut client, b"noted");
    turns_until(&mut server, &mut &noted, |_, noted| {
        !noted.borrow().is_empty()
    });
    assert_eq!(*noted.borrow(), b"noted");
}

#[test]
fn two_servers_live_in_one_thread() {
    let (mut one, first) = echo_server(Config::new(), local());
    let (mut two, second) = echo_server(Config::new(), local());
    let (mut a, mut b) = (connect(first), connect(second));
    send2(&mut a, b"a");
    send2(&mut b, b"b");
    turns_until(&mut one, &mut (), |one, ()| {
        one.control().stats().traffic.frames_out == 1
    });
    turns_until(&mut two, &mut (), |two, ()| {
        two.control().stats().traffic.frames_out == 1
    });
    assert_eq!((recv2(&mut a), recv2(&mut b)), (b"a".into(), b"b".into()));
    // One ends, the other does not.
    drop(one);
    await_end(&mut a);
    send2(&mut b, b"b again");
    turns_until(&mut two, &mut (), |two, ()| {
        two.control().stats().traffic.frames_out == 2
    });
    assert_eq!(recv2(&mut b), b"b again");
}

#[test]
fn a_dropped_server_closes_its_ports_and_connections() {
    struct Watched(Rc<Cell<u32>>);
    impl Drop for Watched {
        fn drop(&mut self) {
            self.0.set(self.0.get() + 1);
        }
    }
    impl Handler for Watched {
        fn on_frame(&mut self, _: &mut Context<'_>, _: &[u8]) -> Outcome {
            Ok(())
        }
        fn on_close(&mut self, _: &mut Context<'_>, _: &portcullis::Closed) {
            panic!("no handler is called");
        }
    }
    let dropped = Rc::new(Cell::new(0));
    let handlers = Rc::clone(&dropped);
    let mut server = Server::new(Config::new()).expect("server");
    server
        .listen(local(), move |_: &mut (), _| Watched(Rc::clone(&handlers)))
        .expect("listen");
    let addr = kit::net::tcp(&server.control().listeners()[0].addr);
    let mut clients = [connect(addr), connect(addr)];
    turns_until(&mut server, &mut (), |server, ()| {
        server.control().stats().open == 2
    });
    drop(server);
    for client in &mut clients {
        assert_eq!(read_to_end(client), b"", "FIN: nothing was unread");
    }
    assert_eq!(dropped.get(), 2);
    TcpStream::connect_timeout(&addr, PATIENCE).expect_err("the port is closed");
}

/// A program's own struct, with the state beside the server.
struct Game {
    server: Server<Vec<String>>,
    players: Vec<String>,
}

impl Game {
    fn tick(&mut self) -> portcullis::Result<portcullis::Turn> {
        self.server
            .poll_once(&mut self.players, Some(Duration::ZERO))
    }
}

/// Several protocols behind one listener.
fn protocol(chosen: &str) -> Box<dyn Handler<Vec<String>>> {
    struct Loud;
    impl Handler<Vec<String>> for Loud {
        fn on_frame(&mut self, cx: &mut Context<'_, Vec<String>>, frame: &[u8]) -> Outcome {
            cx.app.push(String::from_utf8(frame.to_ascii_uppercase())?);
            Ok(())
        }
    }
    match chosen {
        "loud" => Box::new(Loud),
        _ => Box::new(Echo),
    }
}

#[test]
fn a_server_is_a_field_and_its_handlers_are_chosen_at_run_time() {
    let mut server = Server::new(Config::new()).expect("server");
    let listen = local().with(|listen| listen.framing = Framing::Line);
    server
        .listen(listen, |players: &mut Vec<String>, _| {
            protocol(if players.is_empty() { "loud" } else { "echo" })
        })
        .expect("listen");
    let mut game = Game {
        server,
        players: Vec::new(),
    };
    let addr = kit::net::tcp(&game.server.control().listeners()[0].addr);
    let begun = Instant::now();
    let mut first = connect(addr);
    first.write_all(b"hello\n").expect("send");
    while game.players.is_empty() {
        assert!(begun.elapsed() < PATIENCE);
        game.tick().expect("a turn");
    }
    assert!(game.players[0].starts_with("HELLO"));
    let mut second = connect(addr);
    second.write_all(b"echo\n").expect("send");
    while game.server.control().stats().traffic.frames_out == 0 {
        assert!(begun.elapsed() < PATIENCE);
        game.tick().expect("a turn");
    }
    drop(game);
    assert_eq!(read_to_end(&mut second), b"echo\n");
}
