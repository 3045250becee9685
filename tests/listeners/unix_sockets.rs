//! Unix sockets: access, credentials, the socket file, and everything else as over TCP.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{mpsc, Arc, Barrier};
use std::thread;
use std::time::Duration;

use kit::net::{local, ping, read_to_end, recv2, send2, spawn, Echo, Place, Running, PATIENCE};
use portcullis::{
    try_accept, AccessRules, Addr, CloseReason, Closed, Config, Context, Credentials, Error,
    Framing, Handler, Listen, ListenerId, Outcome, Peer, Refuse, Server, Service, UnixAddr,
};

fn echo(_: &mut (), _: Peer) -> Echo {
    Echo
}

fn server() -> Server {
    Server::new(Config::new()).expect("server")
}

/// An echo server on this path.
fn serve(listen: Listen) -> Running {
    kit::net::spawn_echo(Config::new(), listen)
}

/// A connection whose reads and writes end after [`PATIENCE`].
#[track_caller]
fn connect(path: impl AsRef<Path>) -> UnixStream {
    bounded(UnixStream::connect(path).expect("connect"))
}

fn bounded(stream: UnixStream) -> UnixStream {
    stream.set_read_timeout(Some(PATIENCE)).expect("timeout");
    stream.set_write_timeout(Some(PATIENCE)).expect("timeout");
    stream
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).expect("there").permissions().mode() & 0o777
}

/// A socket's file without a process behind it, as one that was killed leaves it.
fn leave_stale(path: &Path) {
    drop(UnixListener::bind(path).expect("bind"));
    assert!(path.exists());
}

#[track_caller]
fn refused(listen: Listen) -> Error {
    server().listen(listen, echo).expect_err("it cannot listen")
}

/// tcp_local_echo (ranch): a local socket is a listener as any other.
#[test]
fn a_unix_socket_serves_and_says_where_it_is() {
    let place = Place::new();
    let path = place.path("echo.sock");
    struct Where(mpsc::Sender<[Addr; 3]>);
    impl Handler for Where {
        fn on_frame(&mut self, cx: &mut Context<'_>, frame: &[u8]) -> Outcome {
            cx.conn.send(frame)?;
            let info = cx.conn.info().expect("there");
            let told = [
                cx.conn.info().expect("it is there").peer,
                info.peer,
                cx.conn.local_addr()?,
            ];
            self.0.send(told).expect("the test waits");
            Ok(())
        }
    }
    let (tell, told) = mpsc::channel();
    let listen = Listen::unix(&path, Framing::Packet2);
    let server = spawn(move || {
        let mut server = server();
        let service = move |_: &mut (), _: Peer| Where(tell.clone());
        server.listen(listen, service).expect("listen");
        (server, ())
    });
    ping(&mut connect(&path), b"hello");
    let [peer, info, own] = told.recv_timeout(PATIENCE).expect("told");
    assert!(matches!(peer, Addr::Unix(_)));
    assert_eq!((&info, peer.ip(), peer.port()), (&peer, None, None));
    assert_eq!(unix(&own).as_pathname(), Some(&*path));

    let listener = &server.listeners[0];
    assert_eq!(listener.addr, own);
    assert_eq!(
        listener.addr.to_string(),
        format!("unix:{}", path.display())
    );
    assert_eq!(listener.name, listener.addr.to_string());
    assert!(server.handle.listener(&listener.name, PATIENCE).is_ok());
    // It has no port, zero no more than another.
    assert!(server.handle.listener(0, PATIENCE).is_err());
}

/// misc_multiple_ip_local_socket_opts (ranch): of several kinds of addresses each is taken for what it is.
#[test]
fn one_server_has_both_kinds_of_listeners() {
    let place = Place::new();
    let paths = [place.path("one"), place.path("two")];
    let listens = paths.clone().map(|path| Listen::unix(path, Framing::Line));
    let server = spawn(move || {
        let mut server = server();
        server.listen(local(), echo).expect("listen");
        for listen in listens {
            server
                .listen(
                    listen.with(|listen| {
                        listen.socket.nodelay = true;
                        listen.socket.reuse_port = true;
                    }),
                    echo,
                )
                .expect("listen");
        }
        (server, ())
    });
    ping(&mut kit::net::connect(server.addr()), b"tcp");
    for path in &paths {
        let mut client = connect(path);
        client.write_all(b"line\n").expect("send");
        let mut answer = [0; 5];
        client.read_exact(&mut answer).expect("answer");
        assert_eq!(&answer, b"line\n");
    }
    assert_eq!(server.ask(|(), control| control.stats().accepted), 3);
}

/// "unix domain sockets with multiple listeners still fail cleanly" (thousand_island).
#[test]
fn a_path_that_is_served_is_taken_and_stays_so() {
    let place = Place::new();
    let path = place.path("taken.sock");
    let first = serve(Listen::unix(&path, Framing::Packet2));
    let error = refused(Listen::unix(&path, Framing::Packet2).name("second"));
    assert!(
        matches!(&error, Error::AddressInUse { addr } if *addr == first.listeners[0].addr),
        "{error}"
    );
    assert!(
        error.to_string().contains(path.to_str().expect("text")),
        "{error}"
    );
    ping(&mut connect(&path), b"untouched");

    // Nor is a server's that has no time: its backlog is full.
    let path = place.path("full.sock");
    let full =
        socket2::Socket::new(socket2::Domain::UNIX, socket2::Type::STREAM, None).expect("socket");
    full.bind(&socket2::SockAddr::unix(&path).expect("short"))
        .expect("bind");
    full.listen(0).expect("listen");
    let _waiting = connect(&path);
    let error = refused(Listen::unix(&path, Framing::Packet2));
    assert!(matches!(error, Error::AddressInUse { .. }), "{error}");
    assert!(path.exists());
}

/// Only a socket file that refuses connections is unlinked (ranch #320).
#[test]
fn a_stale_socket_is_replaced() {
    let place = Place::new();
    let path = place.path("stale.sock");
    leave_stale(&path);
    fs::set_permissions(&path, fs::Permissions::from_mode(0o777)).expect("mode");
    let _server = serve(
        Listen::unix(&path, Framing::Packet2).with(|listen| listen.socket.mode = Some(0o600)),
    );
    ping(&mut connect(&path), b"new");
    assert_eq!(mode(&path), 0o600);
}

/// Of several servers that start over a stale file at the same moment one gets it, and is reached.
#[test]
fn a_start_over_a_stale_socket_has_one_winner() {
    const SERVERS: usize = 6;
    let place = Place::new();
    for round in 0..200 {
        let path = place.path(&format!("race{round}.sock"));
        leave_stale(&path);
        let (together, over) = (Barrier::new(SERVERS), Barrier::new(SERVERS));
        let winners = thread::scope(|scope| {
            let start = || {
                let mut server = server();
                together.wait();
                let listened = server.listen(Listen::unix(&path, Framing::Packet2), echo);
                // None leaves before all have tried.
                over.wait();
                match listened {
                    Ok(_) => {
                        let _client = connect(&path);
                        true
                    }
                    Err(error) => {
                        assert!(error.to_string().contains("is in use"), "{error}");
                        false
                    }
                }
            };
            let starts: Vec<_> = (0..SERVERS).map(|_| scope.spawn(start)).collect();
            let results = starts
                .into_iter()
                .map(|start| start.join().expect("it ends"));
            results.filter(|&has_won| has_won).count()
        });
        assert_eq!(winners, 1, "round {round}");
    }
}

#[test]
fn what_is_no_socket_is_left_alone() {
    let place = Place::new();
    let (file, directory, link) = (
        place.path("file"),
        place.path("directory"),
        place.path("link"),
    );
    fs::write(&file, "precious").expect("write");
    fs::create_dir(&directory).expect("mkdir");
    let stale = place.path("stale.sock");
    leave_stale(&stale);
    std::os::unix::fs::symlink(&stale, &link).expect("link");
    for path in [&file, &directory, &link] {
        let error = refused(Listen::unix(path, Framing::Packet2));
        let kind = matches!(&error, Error::Listen { source, .. } if source.kind() == ErrorKind::AlreadyExists);
        assert!(kind, "{error}");
        assert!(
            error.to_string().contains(path.to_str().expect("text")),
            "{error}"
        );
        assert!(fs::symlink_metadata(path).is_ok());
    }
    assert_eq!(fs::read(&file).expect("read"), b"precious");
    assert!(stale.exists());
}

#[test]
fn a_missing_directory_is_named() {
    let place = Place::new();
    let error = refused(Listen::unix(place.path("no/such.sock"), Framing::Packet2));
    assert!(
        error.to_string().contains("its directory must exist"),
        "{error}"
    );
}

#[test]
fn names_that_cannot_be_are_refused_with_the_reason() {
    let place = Place::new();
    let long = |bytes: usize| {
        let room = bytes - place.path("").as_os_str().len();
        place.path(&"x".repeat(room))
    };
    for (listen, words) in [
        (
            Listen::unix(long(108), Framing::Packet2),
            "108 bytes, and the system takes at most 107",
        ),
        (Listen::unix("", Framing::Packet2), "at least one byte"),
        (Listen::unix("a\0b", Framing::Packet2), "zero byte"),
        (
            Listen::unix("a", Framing::Packet2).with(|listen| listen.socket.mode = Some(0o1777)),
            "0o777",
        ),
    ] {
        let error = refused(listen);
        assert!(matches!(error, Error::Option { .. }), "{error}");
        assert!(
            cfg!(not(target_os = "linux")) || error.to_string().contains(words),
            "{error}"
        );
    }
    if cfg!(target_os = "linux") {
        let _server = serve(Listen::unix(long(107), Framing::Packet2));
        ping(&mut connect(long(107)), b"just");
    }
}

/// Every client finds the permissions in force, from the first moment on.
#[test]
fn permissions_are_set_before_a_client_can_connect() {
    const ROUNDS: usize = 2000;
    let place = Place::new();
    let round = Arc::new(AtomicUsize::new(0));
    // A path for each round, so that a connected client checks the file that it has connected to.
    let path = |round: usize| place.path(&round.to_string());
    thread::scope(|scope| {
        let watcher = scope.spawn(|| {
            let mut seen = 0;
            loop {
                let now = round.load(Ordering::Relaxed);
                if now == ROUNDS {
                    return seen;
                }
                if UnixStream::connect(path(now)).is_ok() {
                    // It may be gone.
                    let found = fs::metadata(path(now));
                    if let Ok(found) = found {
                        assert_eq!(found.permissions().mode() & 0o777, 0o606);
                    }
                    seen += 1;
                }
            }
        });
        for now in 0..ROUNDS {
            round.store(now, Ordering::Relaxed);
            let mut server = server();
            server
                .listen(
                    Listen::unix(path(now), Framing::Packet2)
                        .with(|listen| listen.socket.mode = Some(0o606)),
                    echo,
                )
                .expect("listen");
            assert_eq!(mode(&path(now)), 0o606);
        }
        round.store(ROUNDS, Ordering::Relaxed);
        assert!(watcher.join().expect("always in force") > 0);
    });
}

#[test]
fn the_file_goes_with_its_listener() {
    let place = Place::new();
    let paths = [
        place.path("closed"),
        place.path("dropped"),
        place.path("drained"),
        place.path("name"),
    ];
    let mut server = server();
    let id = server
        .listen(Listen::unix(&paths[0], Framing::Packet2), echo)
        .expect("listen");
    server
        .listen(
            Listen::unix(&paths[1], Framing::Packet2).name("taken"),
            echo,
        )
        .expect("listen");
    server.control().close_listener(id).expect("there");
    assert!(!paths[0].exists() && paths[1].exists());
    drop(server);
    assert!(!paths[1].exists());

    let draining = serve(Listen::unix(&paths[2], Framing::Packet2));
    ping(&mut connect(&paths[2]), b"there");
    draining.finish();
    assert!(!paths[2].exists());
}

/// A listen that fails after its socket was made leaves nothing behind.
#[test]
fn no_file_is_left_by_a_listen_that_fails() {
    let place = Place::new();
    let mut server = server();
    server
        .listen(
            local().name(format!("unix:{}", place.path("late").display())),
            echo,
        )
        .expect("listen");
    let error = server
        .listen(Listen::unix(place.path("late"), Framing::Packet2), echo)
        .expect_err("the default name is taken");
    assert!(matches!(error, Error::NameTaken { .. }), "{error}");
    assert!(!place.path("late").exists());
}

/// One file name in several directories, and names that only their bytes tell apart: each listener
/// has a name of its own, without control characters.
#[test]
fn one_file_name_in_several_places_needs_no_names() {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;

    let (one, other) = (Place::new(), Place::new());
    let mut server = server();
    let names = [
        &b"a.sock"[..],
        b"\xff",
        b"\xfe",
        b"\\xfe",
        b"a\nb\x1b",
        b"a\\nb",
    ];
    for place in [&one, &other] {
        let folder = place.path("");
        for name in names {
            let path = folder.join(OsStr::from_bytes(name));
            server
                .listen(Listen::unix(&path, Framing::Packet2), echo)
                .unwrap_or_else(|error| panic!("{path:?}: {error}"));
        }
    }
    let listeners = server.control().listeners();
    let distinct: std::collections::BTreeSet<_> =
        listeners.iter().map(|listener| &*listener.name).collect();
    assert_eq!(distinct.len(), 12);
    assert!(distinct.iter().all(|name| !name.contains(char::is_control)));
}

#[test]
fn the_file_of_a_successor_is_not_removed() {
    let place = Place::new();
    let path = place.path("succeeded.sock");
    let old = serve(Listen::unix(&path, Framing::Packet2));
    let mut inside = connect(&path);
    ping(&mut inside, b"old");
    fs::remove_file(&path).expect("an administrator's hand");
    let _new = serve(Listen::unix(&path, Framing::Packet2));
    drop(inside);
    old.finish();
    ping(&mut connect(&path), b"new");
}

#[cfg(target_os = "linux")]
#[test]
fn an_abstract_name_has_no_file() {
    use std::os::linux::net::SocketAddrExt;
    let name = format!("portcullis-{}", std::process::id());
    let server = serve(Listen::unix_abstract(&name, Framing::Packet2));
    let listener = &server.listeners[0];
    assert_eq!(
        unix(&listener.addr).as_abstract_name(),
        Some(name.as_bytes())
    );
    assert_eq!(listener.addr.to_string(), format!("unix:@{name}"));
    assert_eq!(listener.name, format!("unix:@{name}"));
    let addr = std::os::unix::net::SocketAddr::from_abstract_name(&name).expect("a name");
    ping(
        &mut bounded(UnixStream::connect_addr(&addr).expect("connect")),
        b"hello",
    );

    let error = refused(Listen::unix_abstract(&name, Framing::Packet2));
    assert!(matches!(error, Error::AddressInUse { .. }), "{error}");
    for listen in [
        Listen::unix_abstract("x", Framing::Packet2)
            .with(|listen| listen.socket.mode = Some(0o600)),
        Listen::unix_abstract("", Framing::Packet2),
        Listen::unix_abstract([7; 108], Framing::Packet2),
    ] {
        let error = refused(listen);
        assert!(matches!(error, Error::Option { .. }), "{error}");
    }
}

/// The own user, from `proc(5)`: files there belong to the process's effective user.
#[cfg(target_os = "linux")]
fn ourselves() -> (u32, u32, Option<u32>) {
    let own = fs::metadata("/proc/self").expect("proc");
    (own.uid(), own.gid(), Some(std::process::id()))
}

#[cfg(target_os = "linux")]
#[test]
fn a_peer_s_credentials_are_known() {
    struct Who(mpsc::Sender<std::io::Result<Credentials>>);
    impl Handler for Who {
        fn on_frame(&mut self, cx: &mut Context<'_>, frame: &[u8]) -> Outcome {
            self.0.send(cx.conn.credentials()).expect("the test waits");
            cx.conn.send(frame)?;
            Ok(())
        }
    }
    let place = Place::new();
    let path = place.path("who.sock");
    let (tell, told) = mpsc::channel();
    let (tell_peer, told_peer) = mpsc::channel();
    let listens = [Listen::unix(&path, Framing::Packet2), local().name("tcp")];
    let server = spawn(move || {
        let mut server = server();
        for listen in listens {
            let (tell, tell_peer) = (tell.clone(), tell_peer.clone());
            let service = move |_: &mut (), peer: Peer| {
                tell_peer.send(peer.credentials).expect("the test waits");
                Who(tell.clone())
            };
            server.listen(listen, service).expect("listen");
        }
        (server, ())
    });
    ping(&mut connect(&path), b"who am I");
    let found = told
        .recv_timeout(PATIENCE)
        .expect("told")
        .expect("credentials");
    assert_eq!((found.uid, found.gid, found.pid), ourselves());
    assert_eq!(told_peer.recv_timeout(PATIENCE).expect("told"), Some(found));

    let tcp = kit::net::tcp(&server.listeners[1].addr);
    ping(&mut kit::net::connect(tcp), b"who am I");
    let error = told
        .recv_timeout(PATIENCE)
        .expect("told")
        .expect_err("TCP has none");
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert_eq!(told_peer.recv_timeout(PATIENCE).expect("told"), None);
}

/// A service that admits one user, and notes the refused ones.
#[cfg(target_os = "linux")]
#[test]
fn a_service_can_refuse_by_credentials() {
    struct Only {
        uid: u32,
        tell: mpsc::Sender<(CloseReason, Option<Credentials>)>,
    }
    impl Service for Only {
        fn accept(&mut self, (): &mut (), peer: Peer) -> Result<Box<dyn Handler>, Refuse> {
            match peer.credentials {
                Some(credentials) if credentials.uid == self.uid => Ok(Box::new(Echo)),
                _ => Err(Refuse::with_farewell("not you\n")),
            }
        }
        fn on_failed_accept(&mut self, (): &mut (), peer: &Peer, closed: &Closed) {
            self.tell
                .send((closed.reason, peer.credentials))
                .expect("the test waits");
        }
        fn on_listener_lost(&mut self, (): &mut (), _: ListenerId, error: &std::io::Error) {
            panic!("{error}");
        }
    }
    let place = Place::new();
    let (ours, theirs) = (place.path("ours"), place.path("theirs"));
    let uid = ourselves().0;
    let (tell, told) = mpsc::channel();
    let listens = [
        (Listen::unix(&ours, Framing::Packet2), uid),
        (Listen::unix(&theirs, Framing::Packet2), uid + 1),
    ];
    let _server = spawn(move || {
        let mut server = server();
        for (listen, uid) in listens {
            let tell = tell.clone();
            server
                .listen_with(listen, Only { uid, tell })
                .expect("listen");
        }
        (server, ())
    });
    ping(&mut connect(&ours), b"welcome");
    assert_eq!(read_to_end(&mut connect(&theirs)), b"not you\n");
    let (reason, credentials) = told.recv_timeout(PATIENCE).expect("told");
    assert_eq!(
        (reason, credentials.map(|found| found.uid)),
        (CloseReason::Refused, Some(uid))
    );
}

#[test]
fn access_rules_are_for_ip_addresses() {
    let place = Place::new();
    let path = place.path("denied.sock");
    let server = serve(
        Listen::unix(&path, Framing::Packet2)
            .with(|listen| listen.access_rules = AccessRules::deny_all()),
    );
    ping(&mut connect(&path), b"in");
    assert_eq!(
        server.ask(|(), control| control.stats().closed(CloseReason::Denied)),
        0
    );
}

/// A name without a zero at its end is one byte longer than others can be, and it may have bytes that no log should.
#[test]
fn a_client_can_have_any_name() {
    if !kit::net::have("python3", "--version") {
        return;
    }
    let place = Place::new();
    let path = place.path("s");
    let (tell, told) = mpsc::channel();
    let listen = Listen::unix(&path, Framing::Packet2);
    let server = spawn(move || {
        let mut server = server();
        let service = move |_: &mut (), peer: Peer| {
            tell.send(peer.addr).expect("the test waits");
            Echo
        };
        server.listen(listen, service).expect("listen");
        (server, ())
    });
    let client = "
import ctypes, os, socket, struct, sys
libc = ctypes.CDLL(None)
client = socket.socket(socket.AF_UNIX)
name = struct.pack('=H', socket.AF_UNIX) + eval(sys.argv[1])
os.chdir(sys.argv[2])
assert libc.bind(client.fileno(), name, len(name)) == 0
client.connect('s')
client.sendall(bytes((0, 2)) + b'hi')
assert client.recv(4) == bytes((0, 2)) + b'hi'
";
    for (name, shown) in [
        ("b'n'*108", format!("unix:{}", "n".repeat(108))),
        ("b'a\\nb'", "unix:a\\nb".to_owned()),
        ("b'\\0any\\x1b[2J'", "unix:@any\\u{1b}[2J".to_owned()),
        ("b'\\0' + b'n'*107", format!("unix:@{}", "n".repeat(107))),
        ("b''", "unix:@".to_owned()),
    ] {
        let mut command = std::process::Command::new("python3");
        let status = command
            .args(["-c", client, name])
            .arg(place.path(""))
            .status()
            .expect("python3");
        assert!(status.success(), "{name}");
        let addr = told.recv_timeout(PATIENCE).expect("a peer").to_string();
        assert!(addr.starts_with(&shown), "{addr}");
    }
    ping(&mut connect(&path), b"still here");
    assert_eq!(server.ask(|(), control| control.stats().panics), 0);
}

/// One that answers at the end what it has heard.
struct Last(Vec<u8>);

impl Handler for Last {
    fn on_frame(&mut self, _: &mut Context<'_>, frame: &[u8]) -> Outcome {
        self.0.extend_from_slice(frame);
        Ok(())
    }

    fn on_finish(&mut self, cx: &mut Context<'_>) -> Outcome {
        cx.conn.send(&self.0)?;
        cx.conn.close();
        Ok(())
    }
}

#[test]
fn half_closing_is_as_over_tcp() {
    let place = Place::new();
    let path = place.path("half.sock");
    let listen = Listen::unix(&path, Framing::Raw);
    let server = spawn(move || {
        let mut server = server();
        server
            .listen(listen, |_: &mut (), _| Last(Vec::new()))
            .expect("listen");
        (server, ())
    });
    let mut client = connect(&path);
    client.write_all(b"all I have to say").expect("send");
    client.shutdown(Shutdown::Write).expect("half");
    assert_eq!(read_to_end(&mut client), b"all I have to say");
    drop(client);
    let stats = server.until("it is gone", |stats| stats.open == 0 && stats.accepted == 1);
    assert_eq!(stats.closed(CloseReason::Finished), 1, "{stats:?}");
}

#[test]
fn ends_have_the_same_reasons() {
    struct Rude;
    impl Handler for Rude {
        fn on_frame(&mut self, cx: &mut Context<'_>, _: &[u8]) -> Outcome {
            cx.conn.abort();
            Ok(())
        }
    }
    let place = Place::new();
    let (path, rude) = (place.path("ends.sock"), place.path("rude.sock"));
    let listens = (
        Listen::unix(&path, Framing::Packet2),
        Listen::unix(&rude, Framing::Packet2),
    );
    let server = spawn(move || {
        let mut server = server();
        server.listen(listens.0, echo).expect("listen");
        server
            .listen(listens.1, |_: &mut (), _| Rude)
            .expect("listen");
        (server, ())
    });
    let mut cut = connect(&path);
    cut.write_all(&[0, 9, b'x']).expect("send");
    drop(cut);
    server.until("one is cut", |stats| {
        stats.closed(CloseReason::Truncated) == 1
    });
    let mut aborted = connect(&rude);
    send2(&mut aborted, b"go");
    kit::net::await_end(&mut aborted);
    server.until("one is aborted", |stats| {
        stats.closed(CloseReason::Aborted) == 1
    });
    let mut killed = connect(&path);
    ping(&mut killed, b"there");
    server.ask(|(), control| {
        let id = control.connections()[0].id;
        assert!(control.kill(id));
    });
    kit::net::await_end(&mut killed);
    server.until("one is killed", |stats| {
        stats.closed(CloseReason::Killed) == 1
    });
    // One that leaves answers unread: its end is a reset.
    let mut gone = connect(&path);
    send2(&mut gone, b"unread");
    server.until("it is answered", |stats| stats.traffic.frames_out == 2);
    drop(gone);
    server.until("all have gone", |stats| stats.open == 0);
}

/// Else it would kill a process that does not ignore SIGPIPE, as C programs do not. (std's own write raised it for long.)
#[test]
fn a_write_to_a_closed_peer_raises_no_signal() {
    struct Talks;
    impl Handler for Talks {
        fn on_open(&mut self, cx: &mut Context<'_>) -> Outcome {
            cx.conn.set_timer(0, Duration::ZERO);
            Ok(())
        }
        fn on_frame(&mut self, _: &mut Context<'_>, _: &[u8]) -> Outcome {
            Ok(())
        }
        fn on_finish(&mut self, _: &mut Context<'_>) -> Outcome {
            Ok(())
        }
        fn on_timer(&mut self, cx: &mut Context<'_>, key: u8) -> Outcome {
            cx.conn.send("still there?")?;
            cx.conn.set_timer(key, Duration::from_millis(1));
            Ok(())
        }
    }
    let raised = Arc::new(AtomicBool::new(false));
    signal_hook::flag::register(signal_hook::consts::SIGPIPE, Arc::clone(&raised))
        .expect("a handler");
    let place = Place::new();
    let path = place.path("pipe.sock");
    let listen = Listen::unix(&path, Framing::Packet2);
    let server = spawn(move || {
        let mut server = server();
        server
            .listen(listen, |_: &mut (), _| Talks)
            .expect("listen");
        (server, ())
    });
    let clients: Vec<_> = (0..20).map(|_| connect(&path)).collect();
    server.until("all are open", |stats| stats.opened == 20);
    drop(clients);
    let stats = server.until("they are found out", |stats| stats.open == 0);
    assert_eq!(stats.closed(CloseReason::Reset), 20, "{stats:?}");
    assert!(!raised.load(Ordering::SeqCst));
}

#[test]
fn a_slow_reader_gets_everything_in_order() {
    let place = Place::new();
    let path = place.path("slow.sock");
    let server = serve(
        Listen::unix(&path, Framing::Raw).with(|listen| listen.socket.send_buffer = Some(4096)),
    );
    let mut client = connect(&path);
    let sent: Vec<u8> = (0..2_000_000_u32).map(|n| (n / 7) as u8).collect();
    let writer = thread::spawn({
        let (mut client, sent) = (client.try_clone().expect("clone"), sent.clone());
        move || {
            client.write_all(&sent).expect("send");
            client.shutdown(Shutdown::Write).expect("half");
        }
    });
    // The server stops reading, and the writer stands.
    let stats = server.until("it is full", |stats| stats.traffic.bytes_in > 100_000);
    // The default would have taken all of it.
    assert!(
        stats.traffic.bytes_out < 50_000,
        "the small buffer is in force: {stats:?}"
    );
    assert_eq!(read_to_end(&mut client), sent);
    writer.join().expect("written");
}

#[test]
fn a_server_that_finds_it_full_waits() {
    let place = Place::new();
    let path = place.path("full.sock");
    let server = serve(
        Listen::unix(&path, Framing::Packet2).with(|listen| listen.max_connections = Some(1)),
    );
    let mut first = connect(&path);
    ping(&mut first, b"first");
    let mut second = connect(&path);
    send2(&mut second, b"second");
    server.ask(|(), control| assert_eq!(control.stats().accepted, 1));
    drop(first);
    assert_eq!(recv2(&mut second), b"second");
}

#[test]
fn a_service_may_refuse() {
    let place = Place::new();
    let path = place.path("refused.sock");
    let listen = Listen::unix(&path, Framing::Packet2);
    let _server = spawn(move || {
        let mut server = server();
        let nobody = try_accept(|_: &mut (), _| Err::<Echo, _>(Refuse::with_farewell("no")));
        server.listen_with(listen, nobody).expect("listen");
        (server, ())
    });
    assert_eq!(read_to_end(&mut connect(&path)), b"no");
}

#[test]
fn a_unix_listener_can_be_adopted_and_its_file_stays() {
    let place = Place::new();
    let path = place.path("adopted.sock");
    let socket = UnixListener::bind(&path).expect("bind");
    let mut early = connect(&path);
    let server = spawn(move || {
        let mut server = server();
        server
            .listen(Listen::adopted(socket, Framing::Packet2), echo)
            .expect("adopt");
        (server, ())
    });
    assert_eq!(server.listeners[0].name, format!("unix:{}", path.display()));
    ping(&mut early, b"early");
    ping(&mut connect(&path), b"late");
    server.finish();
    assert!(path.exists());
}

#[test]
fn only_a_listening_stream_socket_can_be_adopted() {
    let place = Place::new();
    let path = place.path("connected.sock");
    let _listener = UnixListener::bind(&path).expect("bind");
    let datagram =
        std::os::unix::net::UnixDatagram::bind(place.path("datagram.sock")).expect("bind");
    let udp = std::net::UdpSocket::bind("127.0.0.1:0").expect("bind");
    let file = fs::File::open("/dev/null").expect("open");
    let mut server = server();
    for fd in [
        connect(&path).into(),
        datagram.into(),
        udp.into(),
        std::os::fd::OwnedFd::from(file),
    ] {
        let error = server
            .listen(Listen::adopted(fd, Framing::Packet2), echo)
            .expect_err("no listener");
        assert!(matches!(error, Error::Os { .. }), "{error}");
    }
    assert!(server.control().listeners().is_empty());
}

/// Urgent bytes exist here too since Linux 5.15: a read ends in front of one, and what stands behind it is not forgotten.
#[cfg(target_os = "linux")]
#[test]
fn an_urgent_byte_does_not_stop_the_rest() {
    let place = Place::new();
    let path = place.path("urgent.sock");
    let listen = Listen::unix(&path, Framing::Raw);
    let _server = spawn(move || {
        let mut server = server();
        server
            .listen(listen, |_: &mut (), _| Last(Vec::new()))
            .expect("listen");
        (server, ())
    });
    let mut client = connect(&path);
    client.write_all(b"before").expect("send");
    if socket2::SockRef::from(&client)
        .send_out_of_band(b"!")
        .is_err()
    {
        return;
    }
    client.write_all(b"behind").expect("send");
    client.shutdown(Shutdown::Write).expect("half");
    let heard = String::from_utf8(read_to_end(&mut client)).expect("text");
    assert_eq!(heard.replace('!', ""), "beforebehind");
}

/// Out of descriptors, waiting clients are served when others leave, and it is logged once, as over
/// TCP (`tests/listeners/fd_exhaustion.rs`).
#[cfg(target_os = "linux")]
#[test]
fn out_of_descriptors_clients_wait() {
    let place = Place::new();
    let path = place.path("starved.sock");
    let mut command = std::process::Command::new("sh");
    command.args(["-c", "ulimit -n 24; exec \"$@\"", "sh"]);
    command
        .arg(kit::net::example("handover"))
        .arg(format!("unix:{}", path.display()));
    let server = kit::net::ChildProcess::start(&mut command);
    server.line();
    let mut clients: Vec<_> = (0..60).map(|_| connect(&path)).collect();
    for (at, client) in clients.iter_mut().enumerate() {
        client
            .write_all(format!("{at}\n").as_bytes())
            .expect("send");
    }
    for (at, mut client) in clients.into_iter().enumerate() {
        let expected = format!("{} {at}\n", server.child.id());
        let mut answer = vec![0; expected.len()];
        client.read_exact(&mut answer).expect("answer");
        assert_eq!(answer, expected.as_bytes());
    }
    server.signal("TERM");
    let (_, _, log) = server.finish();
    assert_eq!(
        log.matches("no new connections for now").count(),
        1,
        "{log}"
    );
}

fn unix(addr: &Addr) -> &UnixAddr {
    match addr {
        Addr::Unix(name) => name,
        other => panic!("{other} is not a Unix socket's"),
    }
}
