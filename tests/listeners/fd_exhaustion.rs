//! Out of descriptors, the process lives, idles, serves those inside, says so once, and takes the others in when there is room.
#![cfg(target_os = "linux")] // it looks into /proc

use std::io::ErrorKind;
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use kit::net::{
    await_end, connect, eventually, have, local, ping, recv2, send2, ChildProcess, Echo,
};
use portcullis::sim::{ClientId, Sim};
use portcullis::{Config, Context, Framing, Handler, Listen, Outcome, Server};

/// A program that may open only so many descriptors.
fn limited(descriptors: usize, program: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new("sh");
    command.args(["-c", "ulimit -n \"$1\"; shift; exec \"$@\"", "sh"]);
    command
        .arg(descriptors.to_string())
        .arg(program)
        .args(arguments);
    command
}

/// The echo example with so many descriptors, and how many of them are left for clients.
fn limited_echo(descriptors: usize) -> (ChildProcess, SocketAddr, usize) {
    let mut command = limited(
        descriptors,
        &kit::net::example("echo"),
        &["--listen", "127.0.0.1:0"],
    );
    let server = ChildProcess::start(&mut command);
    let addr = server.address();
    // Once it serves, all that it needs is open.
    let mut client = connect(addr);
    ping(&mut client, b"first");
    let base = taken(&server, descriptors) - 1;
    drop(client);
    eventually("the first client has gone", || {
        taken(&server, descriptors) == base
    });
    (server, addr, descriptors - base)
}

/// How many descriptors below the limit are open. What we inherited ourselves may lie above it.
fn taken(server: &ChildProcess, limit: usize) -> usize {
    let table = std::fs::read_dir(format!("/proc/{}/fd", server.child.id())).expect("proc");
    let numbers = table.map(|entry| {
        entry
            .expect("proc")
            .file_name()
            .to_string_lossy()
            .parse::<usize>()
    });
    numbers
        .filter(|number| number.as_ref().is_ok_and(|number| *number < limit))
        .count()
}

/// The share of one core that it takes over two seconds.
fn cpu_share(server: &ChildProcess) -> f64 {
    let before = server.cpu_seconds();
    // The time itself is the condition here.
    Command::new("sleep").arg("2").status().expect("sleep");
    (server.cpu_seconds() - before) / 2.0
}

/// Lines in the log that say that there is no room.
fn complaints(log: &str) -> usize {
    log.matches("no new connections for now").count()
}

/// Has an answer waiting.
fn is_answered(client: &TcpStream) -> bool {
    client.set_nonblocking(true).expect("nonblocking");
    let answered = match client.peek(&mut [0]) {
        Ok(count) => {
            assert!(count > 0, "the connection was closed");
            true
        }
        Err(error) if error.kind() == ErrorKind::WouldBlock => false,
        Err(error) => panic!("{error}"),
    };
    client.set_nonblocking(false).expect("blocking");
    answered
}

/// 200 clients and 64 descriptors.
#[test]
fn more_clients_than_descriptors() {
    const CLIENTS: usize = 200;
    let (server, addr, room) = limited_echo(64);
    let mut inside: Vec<_> = (0..CLIENTS).map(|_| connect(addr)).collect();
    for (at, client) in inside.iter_mut().enumerate() {
        send2(client, &at.to_be_bytes());
    }
    let waiting = inside.split_off(room);
    // Accepted in the order in which they came.
    for (at, client) in inside.iter_mut().enumerate() {
        assert_eq!(recv2(client), at.to_be_bytes());
    }
    let share = cpu_share(&server);
    assert!(share <= 0.05, "{share} of a core while out of descriptors");
    for client in &mut inside {
        ping(client, b"served while out of descriptors");
    }
    assert!(!waiting.iter().any(is_answered));
    assert_eq!(taken(&server, 64), 64);

    // As one leaves, the next comes in.
    for (at, mut client) in (room..).zip(waiting) {
        drop(inside.remove(0));
        assert_eq!(recv2(&mut client), at.to_be_bytes());
        inside.push(client);
    }
    drop(inside);
    eventually("all have gone", || taken(&server, 64) == 64 - room);
    server.signal("TERM");
    let (status, output, log) = server.finish();
    assert!(status.success(), "{status} {log}");
    assert!(
        output.contains(&format!("\n201 accepted (at most {room} at once)")),
        "{output}"
    );
    assert!(output.contains("closed: 201 peer finished\n"), "{output}");
    assert_eq!(complaints(&log), 1, "{log}");
    // It says what to do, and how it ended.
    assert!(log.contains("ulimit -n"), "{log}");
    assert!(log.matches("accepting again").count() <= 1, "{log}");
}

/// With a full descriptor table `accept` fails even with an empty backlog.
#[test]
fn a_full_table_and_an_empty_backlog_is_not_logged() {
    let (server, addr, room) = limited_echo(64);
    let mut inside: Vec<_> = (0..room).map(|_| connect(addr)).collect();
    for client in &mut inside {
        ping(client, b"in");
    }
    let share = cpu_share(&server);
    assert!(share <= 0.05, "{share} of a core with a full table");
    // At the limit clients come and go: none is refused, and the log must not report each.
    for _ in 0..50 {
        drop(inside.remove(0));
        eventually("it has gone", || taken(&server, 64) == 63);
        let mut next = connect(addr);
        ping(&mut next, b"next");
        inside.push(next);
    }
    for client in &mut inside {
        ping(client, b"still in");
    }
    drop(inside);
    server.signal("TERM");
    let (status, output, log) = server.finish();
    assert!(status.success(), "{status} {log}");
    assert!(
        output.contains(&format!("\n{} accepted ", room + 51)),
        "{output}"
    );
    assert_eq!(complaints(&log), 1, "{log}");
    assert!(log.matches("accepting again").count() <= 1, "{log}");
}

/// Another part of the program, or an operator, changes the limit.
#[test]
fn the_limit_falls_below_the_open_count_and_rises_again() {
    if !have("prlimit", "--version") {
        return;
    }
    let (server, addr) = ChildProcess::echo(&[]);
    let set_limit = |soft: &str| {
        let limit = format!("--nofile={soft}:");
        let id = server.child.id().to_string();
        let status = Command::new("prlimit")
            .args(["--pid", &id, &limit])
            .status();
        assert!(status.expect("prlimit").success());
    };
    let mut inside: Vec<_> = (0..30).map(|_| connect(addr)).collect();
    for client in &mut inside {
        ping(client, b"in");
    }
    set_limit("20");
    let mut waiting: Vec<_> = (0..10).map(|_| connect(addr)).collect();
    for client in &mut waiting {
        send2(client, b"waiting");
    }
    // Some leave, and still there is no room.
    drop(inside.split_off(25));
    for client in &mut inside {
        ping(client, b"served under the limit");
    }
    let share = cpu_share(&server);
    assert!(share <= 0.05, "{share} of a core while out of descriptors");
    assert!(!waiting.iter().any(is_answered));
    set_limit("100");
    for client in &mut waiting {
        assert_eq!(recv2(client), b"waiting");
    }
    ping(&mut connect(addr), b"newcomer");
    drop((inside, waiting));
    server.signal("TERM");
    let (status, output, log) = server.finish();
    assert!(status.success(), "{status} {log}");
    assert!(output.contains("\n41 accepted "), "{output}");
    assert_eq!(complaints(&log), 1, "{log}");
}

/// A later lack is a new one, and is told again.
#[test]
fn every_episode_is_told() {
    let (server, addr, room) = limited_echo(64);
    for _ in 0..2 {
        let mut clients: Vec<_> = (0..room + 5).map(|_| connect(addr)).collect();
        let waiting = clients.split_off(room);
        for client in &mut clients {
            ping(client, b"in");
        }
        drop(clients);
        for mut client in waiting {
            ping(&mut client, b"in at last");
        }
        eventually("all have gone", || taken(&server, 64) == 64 - room);
        // Longer than the interval: the episode is over.
        Command::new("sleep").arg("1").status().expect("sleep");
    }
    server.signal("TERM");
    let (status, _, log) = server.finish();
    assert!(status.success(), "{status} {log}");
    assert_eq!(complaints(&log), 2, "{log}");
    assert_eq!(log.matches("accepting again").count(), 2, "{log}");
}

/// A drain without descriptors ends every connection, and does not hang.
#[test]
fn it_can_be_drained_while_out_of_fds() {
    let (server, addr, room) = limited_echo(64);
    let mut inside: Vec<_> = (0..room).map(|_| connect(addr)).collect();
    for client in &mut inside {
        ping(client, b"in");
    }
    let mut waiting = connect(addr);
    server.signal("TERM");
    for client in &mut inside {
        await_end(client);
    }
    // In the backlog and beyond help: reset by the kernel, or served in a place that came free.
    drop(inside);
    await_end(&mut waiting);
    let (status, _, log) = server.finish();
    assert!(status.success(), "{status} {log}");
}

/// Set for the child that [`child_server`] is.
const CHILD: &str = "PORTCULLIS_TEST_CHILD";

/// What the child's clients may ask for.
#[derive(Default)]
struct Child {
    /// The state of each listener and the count of episodes, as of the last turn.
    report: String,
    stop: bool,
}

struct Report;

impl Handler<Child> for Report {
    fn on_frame(&mut self, cx: &mut Context<'_, Child>, frame: &[u8]) -> Outcome {
        cx.app.stop |= frame == b"stop";
        cx.conn.send(cx.app.report.as_bytes())?;
        Ok(())
    }
}

/// Not a test: the server of the next one, in a process of its own.
#[test]
fn child_server() {
    if std::env::var_os(CHILD).is_none() {
        return;
    }
    // Longer than any test waits: it is a closed descriptor that ends the pause, not the clock.
    let config = Config::new().with(|config| config.emfile_backoff = Duration::from_secs(3600));
    let mut server = Server::new(config).expect("server");
    for _ in 0..2 {
        server
            .listen(local(), |_: &mut Child, _| Report)
            .expect("listen");
    }
    // The test runner writes before us on the same line.
    let addrs: Vec<_> = server
        .control()
        .listeners()
        .iter()
        .map(|l| l.addr.to_string())
        .collect();
    println!("\nserving {}", addrs.join(" "));
    let mut app = Child::default();
    while !app.stop {
        server.poll_once(&mut app, None).expect("turn");
        let states: Vec<_> = server
            .control()
            .listeners()
            .iter()
            .map(|l| format!("{:?}", l.state))
            .collect();
        app.report = format!(
            "{} {}",
            states.join(" "),
            server.control().stats().out_of_fds
        );
    }
}

/// The child, and where it listens.
fn two_listeners(limit: usize) -> (ChildProcess, [SocketAddr; 2]) {
    let this = std::env::current_exe().expect("the test's own path");
    let mut command = limited(
        limit,
        &this,
        &["--exact", "fd_exhaustion::child_server", "--nocapture"],
    );
    let server = ChildProcess::start(command.env(CHILD, "yes"));
    loop {
        if let Some(addrs) = server.line().strip_prefix("serving ") {
            let addrs: Vec<_> = addrs
                .split(' ')
                .map(|addr| addr.parse().expect("address"))
                .collect();
            return (server, addrs.try_into().expect("two"));
        }
    }
}

/// Moves a client that has an answer from `waiting` to `inside`.
fn move_in(waiting: &mut Vec<TcpStream>, inside: &mut Vec<TcpStream>) {
    let (served, rest): (Vec<_>, _) = std::mem::take(waiting).into_iter().partition(is_answered);
    *waiting = rest;
    for mut client in served {
        recv2(&mut client);
        inside.push(client);
    }
}

/// What the child says of itself.
fn report(client: &mut TcpStream) -> String {
    send2(client, b"report");
    String::from_utf8(recv2(client)).expect("text")
}

/// Descriptors belong to the process, so both listeners pause, and both resume.
#[test]
fn two_listeners_run_out_of_fds_and_recover_together() {
    const LIMIT: usize = 48;
    let (server, addrs) = two_listeners(LIMIT);
    let (mut waiting, mut inside): (Vec<_>, _) = (
        (0..100).map(|at| connect(addrs[at % 2])).collect(),
        Vec::new(),
    );
    for client in &mut waiting {
        send2(client, b"report");
    }
    eventually("both are out of descriptors", || {
        move_in(&mut waiting, &mut inside);
        let out_of_fds = |client| report(client) == "OutOfFds OutOfFds 1";
        taken(&server, LIMIT) == LIMIT && inside.first_mut().is_some_and(out_of_fds)
    });
    let share = cpu_share(&server);
    assert!(share <= 0.05, "{share} of a core while out of descriptors");
    // One client after the other leaves, and another connects: neither listener forgets its
    // clients.
    while !waiting.is_empty() {
        assert!(!inside.is_empty(), "{} are left waiting", waiting.len());
        drop(inside.remove(0));
        let left = waiting.len();
        eventually("somebody comes in", || {
            move_in(&mut waiting, &mut inside);
            waiting.len() < left
        });
    }
    let mut last = inside.pop().expect("somebody");
    assert!(report(&mut last).ends_with(" 1"), "one episode");
    send2(&mut last, b"stop");
    drop(inside);
    let (status, output, _) = server.finish();
    assert!(status.success(), "{status} {output}");
}

/// Of two listeners one has a crowd in its backlog, the other an empty one, which does not end the
/// episode.
#[test]
fn a_listener_without_clients_does_not_end_the_episode() {
    const LIMIT: usize = 48;
    let (server, [_, busy]) = two_listeners(LIMIT);
    let (mut waiting, mut inside): (Vec<_>, _) =
        ((0..100).map(|_| connect(busy)).collect(), Vec::new());
    for client in &mut waiting {
        send2(client, b"report");
    }
    eventually("the table is full", || {
        move_in(&mut waiting, &mut inside);
        taken(&server, LIMIT) == LIMIT && !inside.is_empty()
    });
    while !waiting.is_empty() {
        drop(inside.remove(0));
        let left = waiting.len();
        eventually("somebody comes in", || {
            move_in(&mut waiting, &mut inside);
            waiting.len() < left
        });
    }
    let report = report(&mut inside[0]);
    assert!(report.ends_with(" 1"), "{report}");
}

/// A server with two listeners and a client that waits at the first: no descriptor is left for the
/// client, for an hour.
struct Exhausted {
    sim: Sim,
    client: ClientId,
}

impl Exhausted {
    fn new() -> Self {
        let config = Config::new().with(|config| config.emfile_backoff = Duration::from_secs(3600));
        let mut sim = Sim::new(1, config, ());
        let [first, _] = ["first", "second"].map(|name| {
            sim.listen(local().name(name), |_: &mut (), _| Echo)
                .expect("listens")
        });
        sim.set_descriptor_limit(sim.descriptors());
        let client = sim.connect(first).expect("a listener");
        sim.send(client, b"\0\x01x");
        sim.advance(Duration::from_secs(10));
        assert_eq!(sim.stats().accepted, 0);
        Self { sim, client }
    }

    /// A descriptor was closed: the client is served before any time passes.
    #[track_caller]
    fn assert_served(mut self) {
        self.sim.settle();
        assert_eq!(self.sim.received(self.client), b"\0\x01x");
    }
}

#[test]
fn a_closed_listener_frees_a_descriptor() {
    let mut world = Exhausted::new();
    world.sim.control().close_listener("second").expect("open");
    world.assert_served();
}

#[test]
fn a_drain_that_closes_a_listener_frees_a_descriptor() {
    let mut world = Exhausted::new();
    world.sim.control().drain(Duration::from_secs(3600));
    world.assert_served();
}

/// A socket that the server refuses to adopt is closed.
#[test]
fn a_socket_that_is_not_adopted_frees_a_descriptor() {
    let mut world = Exhausted::new();
    let socket = UdpSocket::bind("127.0.0.1:0").expect("a socket");
    let listen = Listen::adopted(socket, Framing::Packet2);
    // The descriptor is the host's, which the simulated kernel does not count.
    world.sim.set_descriptor_limit(3);
    let refused = world.sim.listen(listen, |_: &mut (), _| Echo);
    assert!(refused.is_err());
    world.assert_served();
}

/// Silent connections that would make room at the cap stay: the server is not full.
#[test]
fn no_connection_is_evicted_for_a_descriptor() {
    let mut sim = Sim::new(1, Config::new(), ());
    let addr = sim.listen(local(), |_: &mut (), _| Echo).expect("listens");
    let silent: Vec<ClientId> = (0..5)
        .map(|_| sim.connect(addr).expect("a listener"))
        .collect();
    sim.settle();
    sim.set_descriptor_limit(sim.descriptors());
    let client = sim.connect(addr).expect("a listener");
    sim.send(client, b"\0\x01x");
    sim.advance(Duration::from_secs(30));
    let stats = sim.stats();
    assert_eq!((stats.open, stats.closed_total()), (5, 0));
    sim.finish(silent[0]);
    sim.settle();
    assert_eq!(sim.received(client), b"\0\x01x");
}
