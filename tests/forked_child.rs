//! A forked child that drops its copy of a server takes nothing from the parent. One process of its
//! own, because it forks.

#![cfg(any(target_os = "linux", target_os = "android"))]

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::panic::{catch_unwind, resume_unwind, AssertUnwindSafe};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use kit::net::{connect, tcp as tcp_addr, Place, ReadSome, PATIENCE};
use nix::sys::wait::{waitpid, WaitStatus};
use nix::unistd::{fork, ForkResult};
use portcullis::{
    AccessRules, Config, Connect, Context, Detached, Framing, Handler, Listen, Outcome, Peer,
    ProxyProtocol, Retry, Server,
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

/// An echo over TCP, and its address.
fn serving_tcp(config: Config, with: impl FnOnce(&mut Listen)) -> (Server, SocketAddr) {
    let mut server: Server = Server::new(config).expect("server");
    let listen = Listen::tcp("127.0.0.1:0", Framing::Line).with(with);
    let service = |_: &mut (), _: Peer| Echo;
    server.listen(listen, service).expect("listen");
    let addr = tcp_addr(&server.control().listeners()[0].addr);
    (server, addr)
}

/// Polls until `done`.
fn poll_until(server: &mut Server, done: impl Fn(&mut Server) -> bool) {
    for _ in 0..200 {
        if done(server) {
            return;
        }
        let timeout = Some(Duration::from_millis(50));
        server.poll_once(&mut (), timeout).expect("poll");
    }
    panic!("not done");
}

fn poll_until_open(server: &mut Server, count: u64) {
    poll_until(server, |server| {
        server.control().stats().open == count as usize
    });
}

/// Calls `run` while a forked child lives that never uses its copies. The child ends in any case.
fn beside_a_child<R>(run: impl FnOnce() -> R) -> R {
    let (mut ours, mut theirs) = UnixStream::pair().expect("a pair");
    // SAFETY: the child only waits for its parent and exits.
    match unsafe { fork() }.expect("fork") {
        ForkResult::Child => {
            drop(ours);
            let _ = theirs.set_read_timeout(Some(PATIENCE * 4));
            let _ = theirs.read_some(&mut [0]);
            std::process::exit(0);
        }
        ForkResult::Parent { child } => {
            let result = catch_unwind(AssertUnwindSafe(run));
            // Not by a close: children of other tests may have copies.
            let _ = ours.write_all(&[0]);
            waitpid(child, None).expect("wait");
            result.unwrap_or_else(|panic| resume_unwind(panic))
        }
    }
}

/// A client's next read.
fn read(client: &mut impl Read) -> Result<usize, ErrorKind> {
    client.read_some(&mut [0]).map_err(|error| error.kind())
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

/// Whether the server's descriptor is readable now.
fn has_events(server: &Server) -> bool {
    let mut poll = mio::Poll::new().expect("poll");
    let descriptor = server.as_fd().as_raw_fd();
    let mut source = mio::unix::SourceFd(&descriptor);
    let registered = poll
        .registry()
        .register(&mut source, mio::Token(0), mio::Interest::READABLE);
    registered.expect("register");
    let mut events = mio::Events::with_capacity(4);
    poll.poll(&mut events, Some(Duration::ZERO)).expect("poll");
    !events.is_empty()
}

/// The child waits for room in the socket's buffer, and its parent is not woken when there is.
#[test]
fn a_child_that_fills_a_connection_wakes_its_parent_for_nothing() {
    let (mut server, addr) = serving_tcp(Config::new(), |listen| {
        listen.framing = Framing::Raw;
        listen.conn.output_limit = usize::MAX;
        listen.socket.send_buffer = Some(64 * 1024);
    });
    let mut client = connect(addr);
    echoes(&mut server, &mut client, b"before the fork");
    let (mut ours, mut theirs) = UnixStream::pair().expect("a pair");
    // SAFETY: the child only sends, reports how much the kernel took, and exits.
    match unsafe { fork() }.expect("fork") {
        ForkResult::Child => {
            let id = server.control().connections()[0].id;
            let mut control = server.control();
            let sent = control
                .conn(id)
                .map(|mut conn| conn.send(vec![7; 16 << 20]).is_ok());
            let mut did = sent == Some(true);
            did &= server.poll_once(&mut (), Some(Duration::ZERO)).is_ok();
            let info = server.control().connections().remove(0);
            did &= info.queued > 0;
            let written = info.traffic.bytes_out - b"before the fork".len() as u64;
            did &= theirs.write_all(&written.to_be_bytes()).is_ok();
            std::process::exit(i32::from(!did));
        }
        ForkResult::Parent { child } => {
            let ended = waitpid(child, None).expect("wait");
            assert_eq!(ended, WaitStatus::Exited(child, 0));
        }
    }
    let mut written = [0; 8];
    ours.read_exact(&mut written).expect("a number");
    let written = u64::from_be_bytes(written);
    let taken = std::io::copy(&mut (&client).take(written), &mut std::io::sink());
    assert_eq!(taken.expect("what the child has sent"), written);
    assert!(!has_events(&server));
    echoes(&mut server, &mut client, b"after the fork");
}

/// Leaves the loop at the first line.
struct Leaves(Arc<Mutex<Vec<Detached>>>);

impl Handler for Leaves {
    fn on_frame(&mut self, cx: &mut Context<'_>, _: &[u8]) -> Outcome {
        let left = Arc::clone(&self.0);
        cx.conn
            .detach(move |stream| left.lock().expect("no panic").push(stream))?;
        Ok(())
    }
}

/// A server that detaches each connection, over TCP and a Unix socket.
fn detaching(path: &Path) -> (Server, SocketAddr, Arc<Mutex<Vec<Detached>>>) {
    let mut server: Server = Server::new(Config::new()).expect("server");
    let left = Arc::default();
    let tcp = Listen::tcp("127.0.0.1:0", Framing::Line).name("tcp");
    for listen in [tcp, Listen::unix(path, Framing::Line)] {
        let left = Arc::clone(&left);
        let service = move |_: &mut (), _: Peer| Leaves(Arc::clone(&left));
        server.listen(listen, service).expect("listen");
    }
    let addr = tcp_addr(&server.control().listener("tcp").expect("open").addr);
    (server, addr, left)
}

/// The stream of a client that has left the loop.
fn leave(
    server: &mut Server,
    left: &Mutex<Vec<Detached>>,
    client: &mut (impl Read + Write),
) -> Detached {
    client.write_all(b"leave\n").expect("send");
    poll_until(server, |_| !left.lock().expect("no panic").is_empty());
    left.lock().expect("no panic").pop().expect("detached")
}

/// As a server's own close: the child's copy keeps no connection from its end.
#[test]
fn a_dropped_stream_ends_a_connection_of_which_a_child_has_a_copy() {
    let folder = Place::new();
    let path = folder.path("detached.sock");
    let (mut server, addr, left) = detaching(&path);
    let (mut tcp, mut unread) = (connect(addr), connect(addr));
    let mut unix = UnixStream::connect(&path).expect("connect");
    unix.set_read_timeout(Some(PATIENCE)).expect("timeout");
    let streams = (
        leave(&mut server, &left, &mut tcp),
        leave(&mut server, &left, &mut unread),
        leave(&mut server, &left, &mut unix),
    );
    unread.write_all(b"never read\n").expect("send");
    let ends = beside_a_child(|| {
        drop(streams);
        [read(&mut tcp), read(&mut unread), read(&mut unix)]
    });
    assert_eq!(ends, [Ok(0), Err(ErrorKind::ConnectionReset), Ok(0)]);
}

/// The child's copies go with it, and its parent's connections stay.
#[test]
fn a_child_that_drops_its_streams_leaves_them_to_its_parent() {
    let folder = Place::new();
    let path = folder.path("kept.sock");
    let (mut server, addr, left) = detaching(&path);
    let mut tcp = connect(addr);
    let mut unix = UnixStream::connect(&path).expect("connect");
    unix.set_read_timeout(Some(PATIENCE)).expect("timeout");
    let mut streams = [
        leave(&mut server, &left, &mut tcp),
        leave(&mut server, &left, &mut unix),
    ];
    // SAFETY: the child only drops its copies and exits.
    match unsafe { fork() }.expect("fork") {
        ForkResult::Child => {
            drop(streams);
            std::process::exit(0);
        }
        ForkResult::Parent { child } => {
            let ended = waitpid(child, None).expect("wait");
            assert_eq!(ended, WaitStatus::Exited(child, 0));
        }
    }
    for stream in &mut streams {
        stream.write_all(b"still here\n").expect("a write");
    }
    let mut answer = [0; 11];
    tcp.read_exact(&mut answer).expect("an answer");
    unix.read_exact(&mut answer).expect("an answer");
    assert_eq!(&answer, b"still here\n");
    assert_eq!(server.control().stats().open, 2);
}

/// A kill ends the reads and writes of a detached connection, but not from a child.
#[test]
fn a_child_that_kills_a_detached_connection_leaves_it_to_its_parent() {
    let folder = Place::new();
    let (mut server, addr, left) = detaching(&folder.path("killed.sock"));
    let mut client = connect(addr);
    let mut stream = leave(&mut server, &left, &mut client);
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
    assert_eq!(client.read_some(&mut answer).expect("an end"), 0);
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
    let (reset, end) = beside_a_child(|| {
        let conns = server.control().connections();
        let killed = conns.iter().map(|conn| server.control().kill(conn.id));
        assert_eq!(killed.collect::<Vec<_>>(), [true, true]);
        let turn = server.poll_once(&mut (), Some(Duration::ZERO));
        turn.expect("poll");
        (read(&mut tcp), read(&mut unix))
    });
    assert_eq!(reset, Err(ErrorKind::ConnectionReset));
    assert_eq!(end, Ok(0));
}

/// The end of a connection without a FIN before it.
#[test]
fn a_handshake_timeout_ends_a_connection_of_which_a_child_has_a_copy() {
    let (mut server, addr) = serving_tcp(Config::new(), |listen| {
        listen.proxy_protocol = ProxyProtocol::Required;
        listen.trusted_proxies = Some(AccessRules::allow_all());
        listen.conn.handshake_timeout = Duration::from_millis(300);
    });
    let mut client = connect(addr);
    poll_until_open(&mut server, 1);
    let end = beside_a_child(|| {
        poll_until_open(&mut server, 0);
        read(&mut client)
    });
    assert_eq!(end, Ok(0));
}

/// A peer that sends on behind our FIN is answered with RST, and does not fill the child's copy.
#[test]
fn the_end_of_a_linger_ends_a_connection_of_which_a_child_has_a_copy() {
    struct Closes;

    impl Handler for Closes {
        fn on_frame(&mut self, cx: &mut Context<'_>, _: &[u8]) -> Outcome {
            cx.conn.close();
            Ok(())
        }
    }

    let mut server: Server = Server::new(Config::new()).expect("server");
    let listen = Listen::tcp("127.0.0.1:0", Framing::Line).with(|listen| {
        listen.conn.linger_timeout = Duration::from_millis(50);
    });
    let service = |_: &mut (), _: Peer| Closes;
    server.listen(listen, service).expect("listen");
    let addr = tcp_addr(&server.control().listeners()[0].addr);
    let mut client = connect(addr);
    poll_until_open(&mut server, 1);
    let failed = beside_a_child(|| {
        client.write_all(b"close\n").expect("send");
        poll_until_open(&mut server, 0);
        assert_eq!(read(&mut client), Ok(0));
        let timeout = Some(Duration::from_secs(5));
        client.set_write_timeout(timeout).expect("timeout");
        loop {
            if let Err(error) = client.write(&[0; 65536]) {
                return error.kind();
            }
        }
    });
    assert!(
        matches!(failed, ErrorKind::ConnectionReset | ErrorKind::BrokenPipe),
        "{failed:?}"
    );
}

#[test]
fn an_eviction_ends_a_connection_of_which_a_child_has_a_copy() {
    let mut config = Config::max_connections(1);
    config.pending_limits.grace = Duration::from_millis(100);
    let (mut server, addr) = serving_tcp(config, |_| {});
    let mut silent = connect(addr);
    poll_until_open(&mut server, 1);
    let end = beside_a_child(|| {
        let mut next = connect(addr);
        echoes(&mut server, &mut next, b"hello\n");
        read(&mut silent)
    });
    assert_eq!(end, Ok(0));
}

#[test]
fn a_dropped_server_ends_connections_of_which_a_child_has_a_copy() {
    let folder = Place::new();
    let path = folder.path("dropped.sock");
    let (mut server, addr) = serving(&path);
    let (mut tcp, mut unread) = (connect(addr), connect(addr));
    let mut unix = UnixStream::connect(&path).expect("connect");
    unix.set_read_timeout(Some(PATIENCE)).expect("timeout");
    echoes(&mut server, &mut tcp, b"before the fork\n");
    echoes(&mut server, &mut unread, b"before the fork\n");
    echoes(&mut server, &mut unix, b"before the fork\n");
    let (ends, refused) = beside_a_child(|| {
        unread.write_all(b"never read\n").expect("send");
        drop(server);
        let ends = [read(&mut tcp), read(&mut unread), read(&mut unix)];
        let refused = [
            TcpStream::connect(addr).map(drop),
            UnixStream::connect(&path).map(drop),
        ];
        (
            ends,
            refused.map(|result| result.map_err(|error| error.kind())),
        )
    });
    // As without a child.
    assert_eq!(ends, [Ok(0), Err(ErrorKind::ConnectionReset), Ok(0)]);
    assert_eq!(
        refused,
        [Err(ErrorKind::ConnectionRefused), Err(ErrorKind::NotFound)]
    );
}

/// The address is free again, and the clients in the backlog are not left to the child's copy.
#[test]
fn a_closed_listener_of_which_a_child_has_a_copy_refuses() {
    let folder = Place::new();
    let path = folder.path("closed.sock");
    let (mut server, addr) = serving(&path);
    beside_a_child(|| {
        let mut tcp = connect(addr);
        let mut unix = UnixStream::connect(&path).expect("connect");
        unix.set_read_timeout(Some(PATIENCE)).expect("timeout");
        server.control().close_listener("tcp").expect("open");
        server.control().close_listener("unix").expect("open");
        assert_eq!(read(&mut tcp), Err(ErrorKind::ConnectionReset));
        let end = read(&mut unix);
        assert!(
            matches!(end, Ok(0) | Err(ErrorKind::ConnectionReset)),
            "{end:?}"
        );
        let refused = TcpStream::connect(addr).map_err(|error| error.kind());
        assert_eq!(refused.map(drop), Err(ErrorKind::ConnectionRefused));
        let again = Listen::tcp(addr, Framing::Line);
        let service = |_: &mut (), _: Peer| Echo;
        server.listen(again, service).expect("the port is free");
        echoes(&mut server, &mut connect(addr), b"again\n");
    });
}

/// A drain serves the backlog first.
#[test]
fn a_drained_listener_of_which_a_child_has_a_copy_refuses() {
    let (mut server, addr) = serving_tcp(Config::new(), |_| {});
    beside_a_child(|| {
        let mut client = connect(addr);
        client.write_all(b"in the backlog\n").expect("send");
        server.control().drain(Duration::from_secs(5));
        poll_until(&mut server, |server| {
            server.control().listeners().is_empty()
        });
        let refused = TcpStream::connect(addr).map_err(|error| error.kind());
        assert_eq!(refused.map(drop), Err(ErrorKind::ConnectionRefused));
        let mut answer = [0; 15];
        for _ in 0..20 {
            let timeout = Some(Duration::from_millis(50));
            server.poll_once(&mut (), timeout).expect("poll");
        }
        client.read_exact(&mut answer).expect("an answer");
        assert_eq!(&answer, b"in the backlog\n");
    });
}

/// A listening socket that was handed out serves others too.
#[test]
fn a_closed_listener_that_was_handed_out_goes_on_listening() {
    let (mut server, addr) = serving_tcp(Config::new(), |_| {});
    let id = server.control().listeners()[0].id;
    let socket = server.control().listener_socket(id).expect("open");
    drop(server);
    let mut next: Server = Server::new(Config::new()).expect("server");
    let adopted = Listen::adopted(socket, Framing::Line);
    let service = |_: &mut (), _: Peer| Echo;
    next.listen(adopted, service).expect("listen");
    echoes(&mut next, &mut connect(addr), b"handed out\n");
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
