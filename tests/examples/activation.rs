//! Socket activation, with the example: sockets of all kinds and families that were passed on are
//! served, by the names that they were given, and only by the process that they were passed to.
#![cfg(target_os = "linux")] // as it is there: sd_listen_fds(3)

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Command;

use command_fds::{CommandFdExt, FdMapping};
use kit::net::{connect, eventually, example, ChildProcess, Place, PATIENCE};

/// The example with these sockets from descriptor 3 on, for the process `whom`: a number, or `$$`,
/// which is its own.
fn activate(sockets: Vec<OwnedFd>, whom: &str) -> ChildProcess {
    activate_named("activation", sockets, whom, None)
}

/// This example, with these sockets and this text in `LISTEN_FDNAMES`.
fn activate_named(
    program: &str,
    sockets: Vec<OwnedFd>,
    whom: &str,
    names: Option<&str>,
) -> ChildProcess {
    let mut command = Command::new("sh");
    command.env_remove("LISTEN_FDNAMES");
    command.envs(names.map(|names| ("LISTEN_FDNAMES", names)));
    // Only the process itself knows its id before it runs.
    command.args(["-c", &format!("export LISTEN_PID={whom}; exec \"$0\"")]);
    command.arg(example(program));
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

/// Listening sockets of both families with one port.
fn both_families() -> (Vec<OwnedFd>, [SocketAddr; 2]) {
    loop {
        let v4 = TcpListener::bind("127.0.0.1:0").expect("bind");
        let addr = v4.local_addr().expect("addr");
        let v6 = match TcpListener::bind(("::1", addr.port())) {
            Ok(v6) => v6,
            // Another process has the port in this family.
            Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => continue,
            Err(error) => panic!("no socket on ::1: {error}"),
        };
        let addrs = [addr, v6.local_addr().expect("addr")];
        return (vec![v4.into(), v6.into()], addrs);
    }
}

/// Starts the example with sockets of both families. Returns its log.
#[track_caller]
fn serve_both_families(names: Option<&str>) -> (String, [SocketAddr; 2]) {
    let (sockets, addrs) = both_families();
    let server = activate_named("activation", sockets, "$$", names);
    for addr in addrs {
        assert_eq!(server.line(), format!("listening on {addr}"));
    }
    for addr in addrs {
        say(connect(addr), "hello");
    }
    server.signal("TERM");
    let (status, _, log) = server.finish();
    assert!(status.success() && !log.contains("panicked"), "{log}");
    (log, addrs)
}

#[test]
fn one_port_in_two_families_is_served() {
    let (log, addrs) = serve_both_families(None);
    for addr in addrs {
        assert!(log.contains(&format!("listener {addr} on {addr}")), "{log}");
    }
}

#[test]
fn sockets_have_the_names_that_the_manager_gives_them() {
    let (log, [v4, v6]) = serve_both_families(Some("web:web6"));
    assert!(log.contains(&format!("listener web on {v4}")), "{log}");
    assert!(log.contains(&format!("listener web6 on {v6}")), "{log}");
}

/// systemd gives the sockets of one unit one name; a name may also be missing.
#[test]
fn a_name_that_is_no_name_of_one_socket_is_the_address() {
    for names in ["echo.socket:echo.socket", ":", ""] {
        let (log, addrs) = serve_both_families(Some(names));
        for addr in addrs {
            assert!(log.contains(&format!("listener {addr} on {addr}")), "{log}");
        }
    }
    let (log, [v4, v6]) = serve_both_families(Some(":web6"));
    assert!(log.contains(&format!("listener {v4} on {v4}")), "{log}");
    assert!(log.contains(&format!("listener web6 on {v6}")), "{log}");
}

/// Otherwise a socket would have the name of another.
#[test]
fn names_that_do_not_fit_the_sockets_are_an_error() {
    for names in ["web", "web:web6:admin"] {
        let (sockets, _) = both_families();
        let server = activate_named("activation", sockets, "$$", Some(names));
        let (status, _, log) = server.finish();
        assert_eq!(status.code(), Some(1), "{log}");
        assert!(log.contains("LISTEN_FDNAMES"), "{log}");
    }
}

/// The names go on to the next process.
#[test]
fn a_successor_has_sockets_with_the_same_names() {
    let (sockets, addrs) = both_families();
    let server = activate_named("handover", sockets, "$$", Some("web:"));
    let first = server.child.id();
    for addr in addrs {
        assert_eq!(server.line(), format!("listening on {addr} as {first}"));
    }
    server.signal("USR2");
    let mut successor = String::new();
    for addr in addrs {
        let line = server.line();
        let (listening, pid) = line.split_once(" as ").expect("a process");
        assert_eq!(listening, format!("listening on {addr}"));
        assert_ne!(pid, first.to_string());
        successor = pid.to_owned();
    }
    // Until the first process has closed its copies, either may answer.
    let answer = |addr| {
        let mut client = BufReader::new(connect(addr));
        writeln!(client.get_mut(), "hello").expect("send");
        let mut answer = String::new();
        client.read_line(&mut answer).expect("answer");
        answer
    };
    for addr in addrs {
        let expected = format!("{successor} hello\n");
        eventually("the successor answers", || answer(addr) == expected);
    }
    let status = Command::new("kill").args(["-TERM", &successor]).status();
    assert!(status.expect("kill").success());
    let (status, _, log) = server.finish();
    assert!(status.success() && !log.contains("panicked"), "{log}");
    let [v4, v6] = addrs;
    let named = log.matches(&format!("listener web on {v4}\n")).count();
    assert_eq!(named, 2, "{log}");
    let unnamed = log.matches(&format!("listener {v6} on {v6}\n")).count();
    assert_eq!(unnamed, 2, "{log}");
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
