//! Socket activation, with the example: sockets of both kinds that were passed on are served, and
//! only by the process that they were passed to.
#![cfg(target_os = "linux")] // as it is there: sd_listen_fds(3)

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Command;

use command_fds::{CommandFdExt, FdMapping};
use kit::net::{connect, example, ChildProcess, Place, PATIENCE};

/// The example with these sockets from descriptor 3 on, for the process `whom`: a number, or `$$`,
/// which is its own.
fn activate(sockets: Vec<OwnedFd>, whom: &str) -> ChildProcess {
    let mut command = Command::new("sh");
    // Only the process itself knows its id before it runs.
    command.args(["-c", &format!("export LISTEN_PID={whom}; exec \"$0\"")]);
    command.arg(example("activation"));
    command.env("LISTEN_FDS", sockets.len().to_string());
    let mappings = sockets.into_iter().zip(3..);
    let mappings = mappings.map(|(parent_fd, child_fd)| FdMapping {
        parent_fd,
        child_fd,
    });
    command
        .fd_mappings(mappings.collect())
        .expect("no number twice");
    ChildProcess::start(&mut command)
}

#[track_caller]
fn say(client: impl Read + Write, line: &str) {
    let mut client = BufReader::new(client);
    writeln!(client.get_mut(), "{line}").expect("send");
    let mut answer = String::new();
    client.read_line(&mut answer).expect("answer");
    assert_eq!(answer.trim_end(), line);
}

#[track_caller]
fn terminate(server: ChildProcess) {
    server.signal("TERM");
    let (status, _, log) = server.finish();
    assert!(status.success(), "{log}");
    assert!(!log.contains("panicked"), "{log}");
}

#[test]
fn sockets_of_both_kinds_are_taken_over() {
    let place = Place::new();
    let path = place.path("passed.sock");
    let tcp = TcpListener::bind("127.0.0.1:0").expect("bind");
    let addr = tcp.local_addr().expect("addr");
    let unix = UnixListener::bind(&path).expect("bind");
    // Clients that come before the server are the reason for socket activation.
    let early = connect(addr);
    let server = activate(vec![tcp.into(), unix.into()], "$$");
    assert_eq!(server.line(), format!("listening on {addr}"));
    assert_eq!(
        server.line(),
        format!("listening on unix:{}", path.display())
    );
    say(early, "early");
    say(connect(addr), "tcp");
    let client = UnixStream::connect(&path).expect("connect");
    client.set_read_timeout(Some(PATIENCE)).expect("timeout");
    say(client, "unix");
    terminate(server);
    // The file is whose socket it was.
    assert!(path.exists());
}

#[test]
fn without_any_it_has_a_port_of_its_own() {
    let server = ChildProcess::start(Command::new(example("activation")).env_remove("LISTEN_FDS"));
    say(connect(server.address()), "hello");
    terminate(server);
}

/// A process that inherits the environment of one that was activated has nothing of what was passed on.
#[test]
fn what_was_passed_to_another_process_is_not_touched() {
    let tcp = TcpListener::bind("127.0.0.1:0").expect("bind");
    let theirs = tcp.local_addr().expect("addr");
    let server = activate(vec![tcp.into()], "1");
    let addr = server.address();
    assert_ne!(addr, theirs);
    say(connect(addr), "hello");
    terminate(server);
}

#[test]
fn what_is_no_listening_socket_is_an_error() {
    let file = std::fs::File::open("/dev/null").expect("open");
    let datagram = std::net::UdpSocket::bind("127.0.0.1:0").expect("bind");
    let socket =
        socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).expect("socket");
    for wrong in [file.into(), datagram.into(), OwnedFd::from(socket)] {
        let server = activate(vec![wrong], "$$");
        let (status, _, log) = server.finish();
        assert_eq!(status.code(), Some(1), "{log}");
        assert!(
            log.starts_with("activation: ") && log.lines().count() == 1,
            "{log}"
        );
    }
}
