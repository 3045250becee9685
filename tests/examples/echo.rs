//! The echo example does what its command line says, and says in one line what it cannot do.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use kit::net::{
    await_end, connect, eventually, example, ping, read_to_end, recv2, send2, ChildProcess,
    PATIENCE,
};

/// Runs an example to its end: status, standard output, standard error.
fn run(name: &str, arguments: &[&str]) -> (Option<i32>, String, String) {
    let (status, output, log) =
        ChildProcess::start(Command::new(example(name)).args(arguments)).finish();
    assert!(!log.contains("panicked"), "{log}");
    (status.code(), output, log)
}

/// Talks with the client example.
fn talk(addr: SocketAddr, arguments: &[&str]) -> (Option<i32>, String, String) {
    let addr = addr.to_string();
    let mut all = vec!["--connect", &addr];
    all.extend(arguments);
    run("echo_client", &all)
}

/// Ends it, and returns its last words.
fn terminate(server: ChildProcess, signal: &str) -> String {
    server.signal(signal);
    let (status, output, log) = server.finish();
    assert_eq!(status.code(), Some(0), "{log}");
    assert!(!log.contains("panicked"), "{log}");
    output
}

/// A client that sends and never reads, until the server takes no more from it.
fn stuck_client(addr: SocketAddr) -> TcpStream {
    let socket =
        socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).expect("socket");
    socket.set_recv_buffer_size(4096).expect("buffer");
    socket.connect(&addr.into()).expect("connect");
    let mut stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(PATIENCE)).expect("timeout");
    stream
        .set_write_timeout(Some(Duration::from_millis(300)))
        .expect("timeout");
    while stream.write_all(&kit::net::packet2(&[7; 60_000])).is_ok() {}
    stream
}

#[test]
fn help_shows_every_option_and_default() {
    let (status, output, log) = run("echo", &["--help"]);
    assert_eq!((status, log.as_str()), (Some(0), ""));
    for word in [
        "--listen",
        "127.0.0.1:2222",
        "--framing",
        "packet-1",
        "packet-2",
        "packet-4",
        "raw",
        "line",
        "--max-connections",
        "1024",
        "--max-packet",
        "--tls-cert",
        "--tls-key",
        "--tls-self-signed",
        "--idle-timeout",
        "120",
        "--handshake-timeout",
        "--grace",
        "--allow",
        "--deny",
        "--proxy-protocol",
        "--trusted-proxy",
        "--memory-limit",
        "10",
    ] {
        assert!(output.contains(word), "{word}: {output}");
    }
}

#[test]
fn by_default_it_speaks_packet_2() {
    let (server, addr) = ChildProcess::echo(&[]);
    let try_it = server.line();
    assert!(
        try_it.contains("echo_client") && try_it.contains(&addr.to_string()),
        "{try_it}"
    );
    ping(&mut connect(addr), b"hello");
    assert_eq!(
        talk(addr, &["hello", "world"]),
        (Some(0), "hello\nworld\n".into(), String::new())
    );
    let last = terminate(server, "TERM");
    assert!(
        last.starts_with(
            "2 accepted (at most 1 at once), 3 frames in, 3 frames out, 21 bytes in, 21 bytes out"
        ),
        "{last}"
    );
}

#[test]
fn every_framing_comes_back_from_the_client_example() {
    for framing in ["packet-1", "packet-2", "packet-4", "raw", "line"] {
        let (server, addr) = ChildProcess::echo(&["--framing", framing]);
        let (status, output, log) = talk(addr, &["--framing", framing, "hello", "world"]);
        assert_eq!(
            (status, output.as_str()),
            (Some(0), "hello\nworld\n"),
            "{framing}: {log}"
        );
        terminate(server, "TERM");
    }
}

#[test]
fn a_packet_over_the_maximum_ends_the_connection() {
    let (server, addr) = ChildProcess::echo(&["--max-packet", "5"]);
    let mut client = connect(addr);
    ping(&mut client, b"fives");
    send2(&mut client, b"sixsix");
    assert_eq!(read_to_end(&mut client), b"");
    drop(client);
    let last = terminate(server, "TERM");
    assert!(last.contains("1 frame too large"), "{last}");
}

#[test]
fn the_cap_of_the_command_line_holds() {
    let (server, addr) = ChildProcess::echo(&["--max-connections", "1"]);
    let mut first = connect(addr);
    ping(&mut first, b"first");
    let mut second = connect(addr);
    send2(&mut second, b"second");
    ping(&mut first, b"first");
    drop(first);
    assert_eq!(recv2(&mut second), b"second");
    drop(second);
    let last = terminate(server, "TERM");
    assert!(last.contains("2 accepted (at most 1 at once)"), "{last}");
}

/// The first match decides, in the order of the command line; with --allow alone no other client is
/// served.
#[test]
fn allow_and_deny_are_taken_in_order() {
    for (arguments, served) in [
        (
            &["--deny", "127.0.0.0/8", "--allow", "127.0.0.1"][..],
            false,
        ),
        (&["--allow", "127.0.0.1", "--deny", "127.0.0.0/8"], true),
        (&["--allow", "::1"], false),
        (
            &["--allow=10.0.0.0/8", "--allow=127.0.0.1", "--allow=::1"],
            true,
        ),
        (&["--deny", "10.0.0.0/8"], true),
        (&["--deny", "all"], false),
    ] {
        let (server, addr) = ChildProcess::echo(arguments);
        let mut client = connect(addr);
        if served {
            ping(&mut client, b"served");
        } else {
            assert_eq!(read_to_end(&mut client), b"", "{arguments:?}");
        }
        drop(client);
        let words = terminate(server, "TERM");
        assert_eq!(
            words.contains("1 denied by access rules"),
            !served,
            "{words}"
        );
    }
}

#[test]
fn a_proxy_header_is_required_and_believed_of_trusted_proxies() {
    for (arguments, warns, end) in [
        (&["--proxy-protocol"][..], true, None),
        (
            &["--proxy-protocol", "--trusted-proxy", "127.0.0.0/8"],
            false,
            None,
        ),
        (
            &[
                "--proxy-protocol",
                "--trusted-proxy=10.0.0.0/8",
                "--trusted-proxy=::1",
            ],
            false,
            Some("1 denied by access rules"),
        ),
        (
            &["--proxy-protocol", "--deny", "192.0.2.0/24"],
            true,
            Some("1 denied by access rules"),
        ),
    ] {
        let (server, addr) = ChildProcess::echo(arguments);
        let mut client = connect(addr);
        // A denied client may be disconnected before it has written.
        let _ = client.write_all(b"PROXY TCP4 192.0.2.1 198.51.100.2 50000 443\r\n");
        match end {
            None => {
                ping(&mut client, b"served");
                client.shutdown(std::net::Shutdown::Write).expect("FIN");
                assert_eq!(read_to_end(&mut client), b"");
            }
            Some(_) => await_end(&mut client),
        }
        drop(client);
        server.signal("TERM");
        let (status, words, warnings) = server.finish();
        assert!(status.success());
        assert_eq!(warnings.contains("--trusted-proxy"), warns, "{warnings}");
        assert!(words.contains(end.unwrap_or("1 peer finished")), "{words}");
    }
    let (server, addr) = ChildProcess::echo(&["--proxy-protocol"]);
    let mut client = connect(addr);
    send2(&mut client, b"no header");
    assert_eq!(read_to_end(&mut client), b"");
    drop(client);
    let words = terminate(server, "TERM");
    assert!(words.contains("1 bad PROXY header"), "{words}");
}

#[test]
fn a_silent_client_is_closed_at_the_idle_timeout() {
    let (server, addr) = ChildProcess::echo(&["--idle-timeout", "1"]);
    let mut client = connect(addr);
    ping(&mut client, b"hello");
    assert_eq!(read_to_end(&mut client), b"");
    drop(client);
    let last = terminate(server, "TERM");
    assert!(last.contains("1 idle timeout"), "{last}");
}

/// esockd: t_ulimit, which lowers the cap instead.
#[cfg(target_os = "linux")]
#[test]
fn a_cap_above_the_descriptor_limit_is_a_warning() {
    for (cap, warns) in [("1000", true), ("20", false)] {
        let mut command = Command::new("sh");
        command.args(["-c", "ulimit -n 64; exec \"$@\"", "sh"]);
        command.arg(example("echo"));
        let server = ChildProcess::start(command.args([
            "--listen",
            "127.0.0.1:0",
            "--max-connections",
            cap,
        ]));
        server.address();
        server.signal("TERM");
        let (status, _, log) = server.finish();
        assert!(status.success());
        let warning = "max_connections is 1000, but this process may open only 64 descriptors: raise the limit";
        assert_eq!(log.contains(warning), warns, "{log}");
    }
}

/// A signal while clients are idle sends FIN to all and ends with status 0.
#[test]
fn either_signal_drains_and_ends_with_the_counters() {
    for signal in ["TERM", "INT"] {
        let (server, addr) = ChildProcess::echo(&[]);
        let mut clients: Vec<_> = (0..3).map(|_| connect(addr)).collect();
        for client in &mut clients {
            ping(client, b"hello");
        }
        server.signal(signal);
        for client in &mut clients {
            assert_eq!(read_to_end(client), b"", "an orderly end");
        }
        drop(clients);
        let (status, output, log) = server.finish();
        assert_eq!(status.code(), Some(0), "{log}");
        assert!(
            output.contains("3 accepted (at most 3 at once)"),
            "{output}"
        );
        assert!(output.contains("closed: 3 drained\n"), "{output}");
        assert!(
            output.contains("3 connections ended in order, 0 otherwise, 0 were forced"),
            "{output}"
        );
    }
}

/// Frames that were sent before the signal are answered.
#[test]
fn a_drain_answers_what_is_on_its_way() {
    let (server, addr) = ChildProcess::echo(&[]);
    let mut client = connect(addr);
    ping(&mut client, b"in");
    for _ in 0..1000 {
        send2(&mut client, &[7; 100]);
    }
    server.signal("TERM");
    for _ in 0..1000 {
        assert_eq!(recv2(&mut client), [7; 100]);
    }
    assert_eq!(read_to_end(&mut client), b"");
    drop(client);
    let (status, output, _) = server.finish();
    assert_eq!(status.code(), Some(0));
    assert!(
        output.contains("1001 frames in, 1001 frames out"),
        "{output}"
    );
}

/// A client that is stuck is ended at the deadline, neither before it nor long after it.
#[test]
fn a_stuck_client_is_forced_when_the_grace_is_over() {
    let (server, addr) = ChildProcess::echo(&["--grace", "1"]);
    let mut honest = connect(addr);
    ping(&mut honest, b"hello");
    let mut stuck = stuck_client(addr);
    server.signal("TERM");
    assert_eq!(read_to_end(&mut honest), b"");
    drop(honest);
    let (status, output, log) = server.finish();
    assert_eq!(status.code(), Some(0), "{log}");
    assert!(
        output.contains("1 connections ended in order, 0 otherwise, 1 were forced"),
        "{output}"
    );
    assert!(output.contains("1 forced by drain deadline"), "{output}");
    await_end(&mut stuck);
}

/// The second signal does not wait for the drain.
#[test]
fn a_second_signal_aborts_at_once() {
    for (first, second) in [("TERM", "TERM"), ("INT", "TERM"), ("TERM", "INT")] {
        // The grace is longer than any test waits.
        let (server, addr) = ChildProcess::echo(&["--grace", "3600"]);
        let _stuck = stuck_client(addr);
        server.signal(first);
        eventually("the port is closed", || TcpStream::connect(addr).is_err());
        server.signal(second);
        let (status, _, log) = server.finish();
        assert_eq!(status.code(), Some(1), "{log}");
        assert!(!log.contains("panicked"), "{log}");
    }
}

/// A wrong command line gives a message and a status other than 0.
#[test]
fn bad_options_are_status_2_and_named() {
    let bad: [&[&str]; 18] = [
        &["--framing", "packet-3"],
        &["--max-connections", "many"],
        &["--max-connections=-1"],
        &["--max-packet", "1e9"],
        &["--max-packet", "0"],
        &["--idle-timeout", "soon"],
        &["--idle-timeout", "nan"],
        &["--idle-timeout", "inf"],
        &["--handshake-timeout=-1"],
        &["--grace", "1e40"],
        &["--tls-cert", "chain.pem"],
        &["--tls-key", "key.pem"],
        &["--deny", "10.0.0.0/33"],
        &["--allow", "localhost"],
        &["--trusted-proxy=10.0.0.0/33", "--proxy-protocol"],
        &["--trusted-proxy=10.0.0.0/8"],
        &["--nonsense"],
        &["--listen"],
    ];
    for arguments in bad {
        let (status, output, log) = run("echo", arguments);
        assert_eq!(
            (status, output.as_str()),
            (Some(2), ""),
            "{arguments:?}: {log}"
        );
        let option = arguments[0].split('=').next().expect("an option");
        let first = log.lines().next().unwrap_or_default();
        let missing = first.contains("required arguments were not provided");
        let name = option.trim_start_matches('-');
        assert!(first.contains(name) || missing, "{arguments:?}: {log}");
    }
}

#[test]
fn what_cannot_be_served_is_status_1_and_one_line() {
    for (arguments, word) in [
        (["--listen", "nonsense"], "nonsense"),
        (["--listen", "127.0.0.1"], "127.0.0.1"),
        (["--listen", "192.0.2.1:0"], "192.0.2.1:0"),
        (["--max-connections", "99999999999"], "max_connections"),
    ] {
        // Never the default port, which may be in use.
        let mut all = arguments.to_vec();
        if arguments[0] != "--listen" {
            all.extend(["--listen", "127.0.0.1:0"]);
        }
        if arguments[0] != "--max-connections" {
            // A small cap, so that there is nothing to warn of.
            all.extend(["--max-connections", "10"]);
        }
        let (status, output, log) = run("echo", &all);
        assert_eq!(
            (status, output.as_str()),
            (Some(1), ""),
            "{arguments:?}: {log}"
        );
        assert_eq!(log.lines().count(), 1, "{log}");
        assert!(log.starts_with("echo: ") && log.contains(word), "{log}");
    }
}

#[test]
fn the_client_says_in_one_line_what_went_wrong() {
    // The port of a server that has gone.
    let nobody = {
        let (server, addr) = ChildProcess::echo(&[]);
        ping(&mut connect(addr), b"hello");
        terminate(server, "TERM");
        addr
    };
    let (status, output, log) = talk(nobody, &["hello"]);
    assert_eq!(
        (status, output.as_str(), log.lines().count()),
        (Some(1), "", 1),
        "{log}"
    );
    assert!(log.contains(&nobody.to_string()), "{log}");
    let (status, ..) = talk(nobody, &[]);
    assert_eq!(status, Some(2), "nothing to send");

    let (server, addr) = ChildProcess::echo(&["--max-packet", "3"]);
    let (status, output, log) = talk(addr, &["hello"]);
    assert_eq!(
        (status, output.as_str(), log.lines().count()),
        (Some(1), "", 1),
        "{log}"
    );
    terminate(server, "TERM");
    let (server, addr) = ChildProcess::echo(&["--framing", "packet-1"]);
    assert_eq!(talk(addr, &["--framing", "packet-1", "hello"]).0, Some(0));
    let (status, output, log) = talk(addr, &["--framing", "packet-1", &"x".repeat(256)]);
    assert_eq!(
        (status, output.as_str(), log.lines().count()),
        (Some(1), "", 1),
        "{log}"
    );
    terminate(server, "TERM");
}

/// A daemon may close the standard streams, and the disk may be full: logging never ends the
/// server.
#[cfg(target_os = "linux")] // /dev/full, /proc
#[test]
fn closed_standard_streams_do_not_kill_it() {
    let echo = example("echo");
    let start = |redirect: &str, level: &str| {
        let mut command = Command::new("sh");
        command
            .arg("-c")
            .arg(format!("exec \"$0\" --listen 127.0.0.1:0 {redirect}"));
        ChildProcess::start(command.arg(&echo).env("RUST_LOG", level))
    };
    for redirect in ["2>&-", "2>/dev/full", "<&- 2>&-"] {
        let server = start(redirect, "trace");
        let addr = server.address();
        ping(&mut connect(addr), b"hello");
        let last = terminate(server, "TERM");
        assert!(last.contains("1 accepted"), "{redirect}: {last}");
    }
    for redirect in [">&-", ">/dev/full"] {
        let server = start(redirect, "info");
        // Its output does not tell the address.
        let mut addr = None;
        let tables = format!("/proc/{}/net/tcp", server.child.id());
        eventually("it listens", || {
            addr = listening(&server, &tables);
            addr.is_some()
        });
        ping(&mut connect(addr.expect("listening")), b"hello");
        server.signal("TERM");
        let (status, _, log) = server.finish();
        assert_eq!(status.code(), Some(0), "{redirect}: {log}");
        assert!(!log.contains("panicked"), "{log}");
    }
}

/// Where a process listens, from its table of sockets.
#[cfg(target_os = "linux")]
fn listening(server: &ChildProcess, table: &str) -> Option<SocketAddr> {
    let inodes: Vec<String> = std::fs::read_dir(format!("/proc/{}/fd", server.child.id()))
        .ok()?
        .filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok())
        .filter_map(|link| {
            Some(
                link.to_str()?
                    .strip_prefix("socket:[")?
                    .strip_suffix(']')?
                    .to_owned(),
            )
        })
        .collect();
    std::fs::read_to_string(table)
        .ok()?
        .lines()
        .find_map(|line| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            // Local address, state (0A is LISTEN) and inode (`proc(5)`).
            if *fields.get(3)? != "0A"
                || !inodes
                    .iter()
                    .any(|inode| fields.get(9) == Some(&inode.as_str()))
            {
                return None;
            }
            let port = u16::from_str_radix(fields.get(1)?.rsplit(':').next()?, 16).ok()?;
            Some(SocketAddr::from(([127, 0, 0, 1], port)))
        })
}

/// `echo | head -2`, and a log whose reader has gone: logging never ends the server.
#[test]
fn a_broken_pipe_does_not_kill_it() {
    let mut child = Command::new(example("echo"))
        .args(["--listen", "127.0.0.1:0"])
        .env("RUST_LOG", "trace")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("start");
    drop(child.stderr.take());
    let mut output = child.stdout.take().expect("piped");
    let mut first = Vec::new();
    while !first.ends_with(b"\n") {
        let mut byte = [0];
        output.read_exact(&mut byte).expect("its first line");
        first.extend(byte);
    }
    drop(output);
    let first = String::from_utf8(first).expect("text");
    let addr = first
        .strip_prefix("listening on ")
        .and_then(|rest| rest.split(' ').next());
    ping(
        &mut connect(addr.expect("an address").parse().expect("an address")),
        b"hello",
    );
    let status = Command::new("kill").arg(child.id().to_string()).status();
    assert!(status.expect("kill").success());
    let mut status = None;
    eventually("it ends", || {
        status = child.try_wait().expect("wait");
        status.is_some()
    });
    assert_eq!(status.and_then(|status| status.code()), Some(0));
}

/// A program that the host starts inherits no descriptor.
#[cfg(target_os = "linux")] // /proc
#[test]
fn every_descriptor_is_close_on_exec() {
    let (server, addr) = ChildProcess::echo(&[]);
    let mut clients: Vec<_> = (0..3).map(|_| connect(addr)).collect();
    for client in &mut clients {
        ping(client, b"in");
    }
    let directory = PathBuf::from(format!("/proc/{}", server.child.id()));
    let mut ours = 0;
    for entry in std::fs::read_dir(directory.join("fd")).expect("proc") {
        let number = entry.expect("proc").file_name();
        let target = std::fs::read_link(directory.join("fd").join(&number)).expect("proc");
        let target = target.to_string_lossy().into_owned();
        // The standard streams, and what it has inherited itself.
        if !target.starts_with("socket:") && !target.starts_with("anon_inode:") {
            continue;
        }
        ours += 1;
        let info = std::fs::read_to_string(directory.join("fdinfo").join(&number)).expect("proc");
        let flags = info
            .lines()
            .find_map(|line| line.strip_prefix("flags:"))
            .expect("flags");
        let flags = u32::from_str_radix(flags.trim(), 8).expect("octal");
        assert_ne!(flags & 0o2_000_000, 0, "{target} has flags {flags:o}");
    }
    // The poll, its waker, the listener, the clients.
    assert!(ours >= 6, "{ours}");
}

#[cfg(feature = "tls")]
mod tls {
    use std::path::Path;

    use super::*;

    /// A directory that goes with the test.
    struct Scratch(PathBuf);

    impl Scratch {
        fn new(name: &str) -> Self {
            let path =
                std::env::temp_dir().join(format!("portcullis-echo-{}-{name}", std::process::id()));
            std::fs::create_dir_all(&path).expect("a directory");
            Self(path)
        }

        fn file(&self, name: &str, content: &str) -> String {
            let path = self.0.join(name);
            std::fs::write(&path, content).expect("write");
            path.to_string_lossy().into_owned()
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    /// A certificate for localhost and its key, in PEM.
    fn made() -> (String, String) {
        let names = ["localhost".to_owned(), "127.0.0.1".to_owned()];
        let made = rcgen::generate_simple_self_signed(names).expect("a certificate");
        (made.cert.pem(), made.signing_key.serialize_pem())
    }

    #[test]
    fn it_serves_tls_with_a_certificate_of_its_own() {
        let (server, addr) = ChildProcess::echo(&["--tls-self-signed"]);
        assert!(server.line().contains("--tls --insecure"));
        let (status, output, log) = talk(addr, &["--tls", "--insecure", "hello", "world"]);
        assert_eq!(
            (status, output.as_str()),
            (Some(0), "hello\nworld\n"),
            "{log}"
        );
        // Plaintext is told so, and counted.
        let (status, _, log) = talk(addr, &["hello"]);
        assert_eq!((status, log.lines().count()), (Some(1), 1), "{log}");
        let last = terminate(server, "TERM");
        assert!(last.contains("1 plaintext on a TLS port"), "{last}");
    }

    #[test]
    fn it_serves_tls_with_a_certificate_from_files() {
        let scratch = Scratch::new("good");
        let (chain, key) = made();
        let (chain, key) = (
            scratch.file("chain.pem", &chain),
            scratch.file("key.pem", &key),
        );
        for framing in ["packet-2", "line"] {
            let options = [
                "--framing",
                framing,
                "--tls-cert",
                &chain,
                "--tls-key",
                &key,
            ];
            let (server, addr) = ChildProcess::echo(&options);
            let (status, output, log) = talk(
                addr,
                &["--framing", framing, "--tls", "--ca", &chain, "hello"],
            );
            assert_eq!((status, output.as_str()), (Some(0), "hello\n"), "{log}");
            // Another's certificate is not trusted.
            let other = scratch.file("other.pem", &made().0);
            let (status, _, log) = talk(
                addr,
                &["--framing", framing, "--tls", "--ca", &other, "hello"],
            );
            assert_eq!((status, log.lines().count()), (Some(1), 1), "{log}");
            terminate(server, "TERM");
        }
    }

    #[test]
    fn a_client_that_never_shakes_hands_is_closed() {
        let (server, addr) = ChildProcess::echo(&["--tls-self-signed", "--handshake-timeout", "1"]);
        let mut client = connect(addr);
        await_end(&mut client);
        drop(client);
        let last = terminate(server, "TERM");
        assert!(last.contains("1 handshake timeout"), "{last}");
    }

    /// A missing, empty, damaged or mismatched certificate or key is refused at the start.
    #[test]
    fn a_bad_certificate_or_key_is_named() {
        let scratch = Scratch::new("bad");
        let (chain, key) = made();
        let (good_chain, good_key) = (
            scratch.file("good chain.pem", &chain),
            scratch.file("good key.pem", &key),
        );
        let missing = scratch.0.join("missing.pem").to_string_lossy().into_owned();
        let directory = scratch.0.to_string_lossy().into_owned();
        let empty = scratch.file("empty.pem", "");
        let rubbish = scratch.file("rubbish.pem", "this is no PEM file\n");
        let broken = "-----BEGIN CERTIFICATE-----\n!!!\n-----END CERTIFICATE-----\n";
        let broken = scratch.file("broken.pem", broken);
        let hollow = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
        let hollow = scratch.file("hollow.pem", hollow);
        let hollow_key = "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n";
        let hollow_key = scratch.file("hollow key.pem", hollow_key);
        let other_key = scratch.file("other key.pem", &made().1);
        let cut = scratch.file("cut.pem", &chain[..chain.len() / 2]);
        for (chain, key, named) in [
            (&missing, &good_key, &missing),
            (&directory, &good_key, &directory),
            (&empty, &good_key, &empty),
            (&rubbish, &good_key, &rubbish),
            (&broken, &good_key, &broken),
            (&hollow, &good_key, &hollow),
            (&cut, &good_key, &cut),
            // A key where the chain should be, and the other way round.
            (&good_key, &good_key, &good_key),
            (&good_chain, &good_chain, &good_chain),
            (&good_chain, &missing, &missing),
            (&good_chain, &directory, &directory),
            (&good_chain, &empty, &empty),
            (&good_chain, &rubbish, &rubbish),
            (&good_chain, &hollow_key, &hollow_key),
            (&good_chain, &other_key, &other_key),
        ] {
            let options = ["--listen", "127.0.0.1:0", "--max-connections", "10"];
            let (status, output, log) = run(
                "echo",
                &[&options[..], &["--tls-cert", chain, "--tls-key", key]].concat(),
            );
            let case = format!("{chain} and {key}: {log}");
            assert_eq!((status, output.as_str()), (Some(1), ""), "{case}");
            assert_eq!(log.lines().count(), 1, "{case}");
            assert!(
                log.starts_with("echo: ") && log.contains(named.as_str()),
                "{case}"
            );
            assert!(
                Path::new(named).exists() || log.contains("No such file"),
                "{case}"
            );
        }
    }
}
