//! Clients come in whatever crowd, at whatever moment, and each is served or counted.
#![cfg(target_os = "linux")] // it looks into /proc

use std::fs;
use std::net::{SocketAddr, TcpStream};
use std::process::Command;
use std::time::Duration;

use kit::net::{connect, descriptor_limit, eventually, ping, recv2, send2, ChildProcess, PATIENCE};
use socket2::{Domain, Socket, Type};

/// Stops a child as the terminal or a debugger would, and returns once it stands still.
fn freeze(child: &ChildProcess) {
    child.signal("STOP");
    eventually("it stands still", || {
        let stat = fs::read_to_string(format!("/proc/{}/stat", child.child.id())).expect("proc");
        stat.rsplit(") ")
            .next()
            .is_some_and(|rest| rest.starts_with('T'))
    });
}

/// Starts to connect and does not wait for it; a write does (`connect(2)`, `send(2)`).
fn begin_to_connect(addr: SocketAddr) -> TcpStream {
    let socket = Socket::new(Domain::for_address(addr), Type::STREAM, None).expect("socket");
    socket.set_nonblocking(true).expect("nonblocking");
    if let Err(error) = socket.connect(&addr.into()) {
        assert_eq!(error.raw_os_error(), Some(libc::EINPROGRESS), "{error}");
    }
    socket.set_nonblocking(false).expect("blocking");
    let stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(PATIENCE)).expect("timeout");
    stream.set_write_timeout(Some(PATIENCE)).expect("timeout");
    stream
}

/// A client that has been served, and the descriptors that the server had without it: all that it needs is open by now.
fn first_client(server: &ChildProcess, addr: SocketAddr) -> (TcpStream, usize) {
    let mut client = connect(addr);
    ping(&mut client, b"first");
    (client, server.descriptors() - 1)
}

/// The accept budget keeps the open connections served while the others come.
#[test]
fn ten_thousand_at_once() {
    const WANTED: usize = 10_000;
    // The server and the other tests of this process need some too.
    let possible = descriptor_limit().saturating_sub(4_000);
    let count = WANTED.min(possible);
    if count < WANTED {
        assert!(
            std::env::var_os("CI").is_none(),
            "CI needs ulimit -n {}",
            WANTED + 4_000
        );
        eprintln!(
            "SKIPPED in part: {count} connections instead of {WANTED}, for want of descriptors (ulimit -n {})",
            WANTED + 4_000
        );
    }
    let (server, addr) = ChildProcess::echo(&["--max-connections", "11000"]);
    let (mut inside, descriptors) = first_client(&server, addr);
    let mut clients = Vec::with_capacity(count);
    for at in 1..count {
        clients.push(begin_to_connect(addr));
        if at % 1000 == 0 {
            ping(&mut inside, b"still in");
        }
    }
    for (at, client) in clients.iter_mut().enumerate() {
        send2(client, &at.to_be_bytes());
    }
    for (at, client) in clients.iter_mut().enumerate() {
        assert_eq!(recv2(client), at.to_be_bytes());
    }
    assert_eq!(server.descriptors(), descriptors + count);
    ping(&mut inside, b"at last");
    drop((clients, inside));
    eventually("all descriptors are back", || {
        server.descriptors() == descriptors
    });
    server.signal("TERM");
    let (status, output, log) = server.finish();
    assert!(status.success(), "{status} {log}");
    let all = format!("{count} accepted (at most {count} at once)");
    assert!(output.contains(&all), "{output}");
    assert!(
        output.contains(&format!("closed: {count} peer finished")),
        "{output}"
    );
}

/// The backlog holds 1024; the kernel drops the other SYNs, and the clients send them again after a
/// second.
#[test]
fn a_backlog_that_overflows_loses_no_client() {
    const CLIENTS: usize = 2_500;
    if descriptor_limit() < CLIENTS + 500 {
        assert!(
            std::env::var_os("CI").is_none(),
            "CI needs ulimit -n {}",
            CLIENTS + 500
        );
        eprintln!("SKIPPED: too few descriptors (ulimit -n {})", CLIENTS + 500);
        return;
    }
    let (server, addr) = ChildProcess::echo(&["--max-connections", "3000"]);
    let (first, descriptors) = first_client(&server, addr);
    freeze(&server);
    let mut clients: Vec<_> = (1..CLIENTS).map(|_| begin_to_connect(addr)).collect();
    let stuck = clients
        .iter()
        .filter(|client| client.peer_addr().is_err())
        .count();
    assert!(stuck > 0, "the backlog overflowed");
    server.signal("CONT");
    for client in &mut clients {
        send2(client, b"patient");
    }
    for client in &mut clients {
        assert_eq!(recv2(client), b"patient");
    }
    drop((first, clients));
    eventually("all descriptors are back", || {
        server.descriptors() == descriptors
    });
    server.signal("TERM");
    let (status, output, log) = server.finish();
    assert!(status.success(), "{status} {log}");
    assert!(output.contains("\n2500 accepted "), "{output}");
}

/// Connections that were reset before the accept leave no descriptor and no error.
#[test]
fn a_flood_of_connect_and_reset_is_counted_and_forgotten() {
    let (server, addr) = ChildProcess::echo(&[]);
    let (mut inside, descriptors) = first_client(&server, addr);
    for _ in 0..4 {
        freeze(&server);
        for at in 0..200 {
            let mut client = connect(addr);
            if at % 2 == 0 {
                send2(&mut client, b"some of them speak");
            }
            Socket::from(client)
                .set_linger(Some(Duration::ZERO))
                .expect("linger");
        }
        server.signal("CONT");
        ping(&mut inside, b"meanwhile");
        ping(&mut connect(addr), b"a newcomer");
    }
    drop(inside);
    eventually("all descriptors are back", || {
        server.descriptors() == descriptors
    });
    server.signal("TERM");
    let (status, output, log) = server.finish();
    assert!(status.success(), "{status} {log}");
    assert!(output.contains("\n805 accepted "), "{output}");
    // Each frame is answered, and those that are gone without one may not be served at all.
    assert!(output.contains(" 409 frames in"), "{output}");
    assert!(output.contains("closed: 5 peer finished, "), "{output}");
    let count = |reason: &str| {
        let before = output
            .split(reason)
            .next()
            .filter(|before| *before != output);
        let number = before.and_then(|before| before.rsplit(' ').next());
        number.map_or(0, |number| number.parse::<usize>().expect("a number"))
    };
    let (reset, gone) = (count(" reset by peer"), count(" gone before"));
    assert!(reset >= 400 && reset + gone == 800, "{output}");
    assert!(!log.contains("WARN") && !log.contains("ERROR"), "{log}");
}

/// The error names the address.
#[test]
fn a_busy_port_is_one_clear_line_and_status_1() {
    let (_owner, addr) = ChildProcess::echo(&[]);
    let addr = addr.to_string();
    let mut command = Command::new(kit::net::example("echo"));
    // A small cap, so that there is nothing to warn of.
    command.args(["--listen", &addr, "--max-connections", "10"]);
    let (status, output, log) = ChildProcess::start(&mut command).finish();
    assert_eq!(status.code(), Some(1));
    assert_eq!((output.as_str(), log.lines().count()), ("", 1), "{log}");
    assert!(log.contains(&addr) && log.contains("in use"), "{log}");
}

/// Bytes that arrived while the process stood still are read before timeouts expire.
#[test]
fn standing_still_is_not_the_clients_silence() {
    let (server, addr) = ChildProcess::echo(&["--idle-timeout", "2"]);
    let mut clients: Vec<_> = (0..20).map(|_| connect(addr)).collect();
    for client in &mut clients {
        ping(client, b"before");
    }
    freeze(&server);
    for client in &mut clients {
        send2(client, b"meanwhile");
    }
    // The time itself is the condition here: longer than the limit.
    Command::new("sleep").arg("3").status().expect("sleep");
    server.signal("CONT");
    for client in &mut clients {
        assert_eq!(recv2(client), b"meanwhile");
    }
    server.signal("TERM");
    drop(clients);
    let (status, output, log) = server.finish();
    assert!(status.success(), "{status} {log}");
    assert!(!output.contains("idle timeout"), "{output}");
}
