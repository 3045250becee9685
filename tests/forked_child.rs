//! A forked child that drops its copy of a server takes nothing from the parent. One process of its
//! own, because it forks.

#![cfg(any(target_os = "linux", target_os = "android"))]

use std::io::{Read, Write};
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use kit::net::{connect, tcp as tcp_addr, Place, PATIENCE};
use nix::sys::wait::{waitpid, WaitStatus};
use nix::unistd::{fork, ForkResult};
use portcullis::{
    Config, Connect, Context, Detached, Framing, Handler, Listen, Outcome, Peer, Retry, Server,
};

struct Echo;

impl Handler for Echo {
    fn on_frame(&mut self, cx: &mut Context<'_>, frame: &[u8]) -> Outcome {
        cx.conn.send(frame)?;
        Ok(())
    }
}

/// An echo over TCP, at the returned address, and over a Unix socket.
fn serving(path: &Path) -> (Server, SocketAddr) {
    let mut server: Server = Server::new(Config::new()).expect("server");
    let service = |_: &mut (), _: Peer| Echo;
    let tcp = Listen::tcp("127.0.0.1:0", Framing::Line).name("tcp");
    server.listen(tcp, service).expect("listen");
    let unix = Listen::unix(path, Framing::Line).name("unix");
    server.listen(unix, service).expect("listen");
    let addr = tcp_addr(&server.control().listener("tcp").expect("open").addr);
    (server, addr)
}

fn echoes(server: &mut Server, client: &mut (impl Read + Write), line: &[u8]) {
    client.write_all(line).expect("send");
    for _ in 0..20 {
        let timeout = Some(Duration::from_millis(50));
        server.poll_once(&mut (), timeout).expect("poll");
    }
    let mut answer = vec![0; line.len()];
    client.read_exact(&mut answer).expect("an answer");
    assert_eq!(answer, line);
}

#[test]
fn a_child_that_drops_the_server_takes_nothing_from_its_parent() {
    let folder = Place::new();
    let path = folder.path("parent.sock");
    let (mut server, addr) = serving(&path);
    let (mut killed, mut closed) = (connect(addr), connect(addr));
    echoes(&mut server, &mut killed, b"before the fork\n");
    echoes(&mut server, &mut closed, b"before the fork\n");
    // SAFETY: the child only closes what the server has, drops it and exits.
    match unsafe { fork() }.expect("fork") {
        ForkResult::Child => {
            let mut did = server.control().close_listener("tcp").is_ok();
            let conns = server.control().connections();
            did &= server.control().kill(conns[0].id);
            let mut control = server.control();
            did &= control
                .conn(conns[1].id)
                .map(|mut conn| conn.close())
                .is_some();
            did &= server.poll_once(&mut (), Some(Duration::ZERO)).is_ok();
            drop(server);
            std::process::exit(i32::from(!did));
        }
        ForkResult::Parent { child } => {
            let ended = waitpid(child, None).expect("wait");
            assert_eq!(ended, WaitStatus::Exited(child, 0));
        }
    }
    echoes(&mut server, &mut killed, b"one that the child killed\n");
    echoes(&mut server, &mut closed, b"one that the child closed\n");
    echoes(&mut server, &mut connect(addr), b"a new connection\n");
    let mut unix = UnixStream::connect(&path).expect("the file is there");
    echoes(&mut server, &mut unix, b"over the Unix socket\n");
}

/// A kill ends the reads and writes of a detached connection, but not from a child.
#[test]
fn a_child_that_kills_a_detached_connection_leaves_it_to_its_parent() {
    struct Leaves(Arc<Mutex<Option<Detached>>>);

    impl Handler for Leaves {
        fn on_frame(&mut self, cx: &mut Context<'_>, _: &[u8]) -> Outcome {
            let left = Arc::clone(&self.0);
            cx.conn.detach(move |stream| {
                left.lock().expect("no panic").replace(stream);
            })?;
            Ok(())
        }
    }

    let left = Arc::new(Mutex::new(None));
    let mut server: Server = Server::new(Config::new()).expect("server");
    let leaves = Arc::clone(&left);
    let service = move |_: &mut (), _: Peer| Leaves(Arc::clone(&leaves));
    server
        .listen(Listen::tcp("127.0.0.1:0", Framing::Line), service)
        .expect("listen");
    let addr = tcp_addr(&server.control().listeners()[0].addr);
    let mut client = connect(addr);
    client.write_all(b"leave\n").expect("send");
    for _ in 0..20 {
        let timeout = Some(Duration::from_millis(50));
        server.poll_once(&mut (), timeout).expect("poll");
    }
    let mut stream = left.lock().expect("no panic").take().expect("detached");
    let id = stream.id();
    // SAFETY: the child only kills and exits.
    match unsafe { fork() }.expect("fork") {
        ForkResult::Child => {
            let killed = server.control().kill(id);
            std::process::exit(i32::from(!killed));
        }
        ForkResult::Parent { child } => {
            let ended = waitpid(child, None).expect("wait");
            assert_eq!(ended, WaitStatus::Exited(child, 0));
        }
    }
    stream.write_all(b"still here\n").expect("a write");
    let mut answer = [0; 11];
    client.read_exact(&mut answer).expect("an answer");
    assert_eq!(&answer, b"still here\n");
    assert!(server.control().kill(id));
    assert_eq!(client.read(&mut answer).expect("an end"), 0);
}

/// A child that was forked while they were open has a copy of each connection: the parent's kill
/// ends them for their peers all the same.
#[test]
fn a_kill_ends_a_connection_of_which_a_child_has_a_copy() {
    let folder = Place::new();
    let path = folder.path("killed.sock");
    let (mut server, addr) = serving(&path);
    let mut tcp = connect(addr);
    let mut unix = UnixStream::connect(&path).expect("connect");
    unix.set_read_timeout(Some(PATIENCE)).expect("timeout");
    echoes(&mut server, &mut tcp, b"before the fork\n");
    echoes(&mut server, &mut unix, b"before the fork\n");
    let (ours, mut theirs) = UnixStream::pair().expect("a pair");
    // SAFETY: the child only waits for its parent and exits.
    match unsafe { fork() }.expect("fork") {
        ForkResult::Child => {
            drop(ours);
            let _ = theirs.read(&mut [0]);
            std::process::exit(0);
        }
        ForkResult::Parent { child } => {
            drop(theirs);
            let ids: Vec<_> = server
                .control()
                .connections()
                .iter()
                .map(|conn| conn.id)
                .collect();
            let killed: Vec<bool> = ids.iter().map(|&id| server.control().kill(id)).collect();
            assert_eq!(killed, [true, true]);
            let turn = server.poll_once(&mut (), Some(Duration::ZERO));
            turn.expect("poll");
            let reset = tcp.read(&mut [0]).map_err(|error| error.kind());
            let end = unix.read(&mut [0]).map_err(|error| error.kind());
            // The child ends, whatever was read.
            drop(ours);
            waitpid(child, None).expect("wait");
            assert_eq!(reset, Err(std::io::ErrorKind::ConnectionReset));
            assert_eq!(end, Ok(0));
        }
    }
}

/// Processes that were forked from one another, which have lost the same server, do not come back in step.
#[test]
fn forked_processes_retry_at_different_times() {
    // A server that has drawn numbers before the fork.
    drop(Server::<()>::new(Config::new()).expect("server"));
    let closed = {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        listener.local_addr().expect("its address")
    };
    let delay = move || -> u64 {
        let mut server: Server = Server::new(Config::new()).expect("server");
        let first = Duration::from_secs(80_000);
        let retry = Retry::new(2)
            .first_delay(first)
            .longest_delay(first)
            .jitter(100);
        // Short: until its timer fires, the loop sleeps no longer than for this attempt.
        let options = Connect::new(Framing::Packet2).with(|connect| {
            connect.retry = Some(retry);
            connect.connect_timeout = Duration::from_millis(100);
        });
        let mut control = server.control();
        control.connect(closed, options, Echo).expect("an attempt");
        for _ in 0..200 {
            let timeout = server.next_timeout().unwrap_or(first);
            // Nearly always the retry is hours away.
            if timeout > Duration::from_secs(60) {
                return timeout.as_secs();
            }
            server
                .poll_once(&mut (), Some(Duration::from_millis(50)))
                .expect("poll");
        }
        0
    };
    let delays: Vec<u64> = (0..4)
        .map(|_| {
            let (mut ours, mut theirs) = UnixStream::pair().expect("a pair");
            // SAFETY: the child only runs a server of its own and exits.
            match unsafe { fork() }.expect("fork") {
                ForkResult::Child => {
                    let sent = theirs.write_all(&delay().to_be_bytes());
                    std::process::exit(i32::from(sent.is_err()));
                }
                ForkResult::Parent { child } => {
                    let mut delay = [0; 8];
                    ours.set_read_timeout(Some(Duration::from_secs(60)))
                        .expect("timeout");
                    ours.read_exact(&mut delay).expect("a delay");
                    let ended = waitpid(child, None).expect("wait");
                    assert_eq!(ended, WaitStatus::Exited(child, 0));
                    u64::from_be_bytes(delay)
                }
            }
        })
        .collect();
    // Equal but for the time that passes in between, they would be seconds apart. By chance, once in thousands, two are.
    let apart = |(one, other): (&u64, &u64)| one.abs_diff(*other) > 2;
    let pairs = delays.iter().zip(delays.iter().skip(1));
    assert!(pairs.filter(|&pair| apart(pair)).count() >= 2, "{delays:?}");
}
