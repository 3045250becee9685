//! A listening socket passes from one process to the next, and no client notices: none is refused, reset or left unanswered.
#![cfg(target_os = "linux")] // the process ids of others, and queues as Linux keeps them

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use kit::net::{
    connect, eventually, local, recv2, send2, spawn_echo, uninterrupted, ChildProcess, Place,
    PATIENCE,
};
use portcullis::{Config, Error, Framing, Listen, Server};

/// Where a client connects.
#[derive(Clone)]
enum Door {
    Tcp(std::net::SocketAddr),
    Unix(PathBuf),
}

trait Talk: Read + Write + Send {}
impl<T: Read + Write + Send> Talk for T {}

impl Door {
    fn connect(&self) -> io::Result<BufReader<Box<dyn Talk>>> {
        let stream: Box<dyn Talk> = match self {
            Self::Tcp(addr) => {
                let stream = TcpStream::connect_timeout(addr, PATIENCE)?;
                stream.set_read_timeout(Some(PATIENCE))?;
                stream.set_nodelay(true)?;
                Box::new(stream)
            }
            Self::Unix(path) => {
                let stream = UnixStream::connect(path)?;
                stream.set_read_timeout(Some(PATIENCE))?;
                Box::new(stream)
            }
        };
        Ok(BufReader::new(stream))
    }
}

/// One line there and back. Returns the process that has answered.
fn ask(client: &mut BufReader<Box<dyn Talk>>, line: &str) -> io::Result<u32> {
    client.get_mut().write_all(format!("{line}\n").as_bytes())?;
    let mut answer = String::new();
    client.read_line(&mut answer)?;
    let wrong = || {
        io::Error::new(
            io::ErrorKind::UnexpectedEof,
            format!("{line:?} is answered {answer:?}"),
        )
    };
    let (pid, echo) = answer.trim_end().split_once(' ').ok_or_else(wrong)?;
    if echo != line {
        return Err(wrong());
    }
    pid.parse().map_err(|_| wrong())
}

/// What a client that connects without end has seen.
#[derive(Default)]
struct Hammer {
    rounds: AtomicUsize,
    latest: AtomicU32,
    done: AtomicBool,
}

impl Hammer {
    /// Connects and asks until it is done. How often each process has answered, or what went wrong.
    fn swing(&self, door: &Door) -> io::Result<BTreeMap<u32, usize>> {
        let mut answers = BTreeMap::new();
        while !self.done.load(Ordering::SeqCst) {
            let round = self.rounds.load(Ordering::SeqCst);
            let mut client = door.connect()?;
            // Some take their time, so that they have connected to one process when the next takes over.
            if round % 3 == 0 {
                thread::park_timeout(Duration::from_micros(500));
            }
            let pid = ask(&mut client, &format!("line {round}"))?;
            *answers.entry(pid).or_default() += 1;
            self.latest.store(pid, Ordering::SeqCst);
            self.rounds.fetch_add(1, Ordering::SeqCst);
        }
        Ok(answers)
    }

    #[track_caller]
    fn answered_by_another_than(&self, pid: u32) -> u32 {
        let mut latest = pid;
        eventually("another process answers", || {
            let stopped = self.done.load(Ordering::SeqCst);
            assert!(!stopped, "the client goes on");
            latest = self.latest.load(Ordering::SeqCst);
            latest != pid
        });
        latest
    }

    /// So many more rounds.
    #[track_caller]
    fn goes_on(&self, rounds: usize) {
        let before = self.rounds.load(Ordering::SeqCst);
        eventually("the client goes on", || {
            self.rounds.load(Ordering::SeqCst) >= before + rounds
        });
    }
}

/// Ends a hammer whatever happens.
struct Rest<'a>(&'a [Hammer]);

impl Drop for Rest<'_> {
    fn drop(&mut self) {
        for hammer in self.0 {
            hammer.done.store(true, Ordering::SeqCst);
        }
    }
}

/// The example and all that it starts: one process group, which does not outlive a failed test.
struct Family {
    first: Option<ChildProcess>,
    group: u32,
}

impl Family {
    fn start(program: &Path, doors: &[String]) -> Self {
        let first = ChildProcess::start(Command::new(program).args(doors).process_group(0));
        let group = first.child.id();
        Self {
            first: Some(first),
            group,
        }
    }

    fn line(&self) -> String {
        self.first.as_ref().expect("started").line()
    }

    fn error_line(&self) -> String {
        self.first.as_ref().expect("started").error_line()
    }

    /// Waits until the last of them has ended, and returns the log of all.
    fn finish(mut self) -> String {
        let (status, _, log) = self.first.take().expect("started").finish();
        assert!(status.success(), "{log}");
        assert!(!log.contains("panicked"), "{log}");
        log
    }
}

impl Drop for Family {
    fn drop(&mut self) {
        if self.first.is_some() {
            signal("KILL", &format!("-{}", self.group));
        }
    }
}

fn signal(name: &str, whom: &str) {
    let status = Command::new("kill")
        .args([&format!("-{name}"), "--", whom])
        .status();
    assert!(status.expect("kill").success(), "kill -{name} {whom}");
}

#[test]
fn no_client_is_refused_and_no_answer_is_lost() {
    const HAND_OVERS: usize = 6;
    let place = Place::new();
    let path = place.path("handover.sock");
    let family = Family::start(
        &kit::net::example("handover"),
        &["127.0.0.1:0".to_owned(), format!("unix:{}", path.display())],
    );
    let first = family.group;
    let line = family.line();
    let addr = line.split(' ').nth(2).and_then(|addr| addr.parse().ok());
    let doors = [
        Door::Tcp(addr.unwrap_or_else(|| panic!("{line}"))),
        Door::Unix(path.clone()),
    ];
    assert_eq!(
        family.line(),
        format!("listening on unix:{} as {first}", path.display())
    );

    let hammers = [Hammer::default(), Hammer::default()];
    let (answers, last) = thread::scope(|scope| {
        let _rest = Rest(&hammers);
        let threads: Vec<_> = hammers
            .iter()
            .zip(&doors)
            .map(|(hammer, door)| {
                scope.spawn(move || {
                    let outcome = hammer.swing(door);
                    hammer.done.store(true, Ordering::SeqCst);
                    outcome
                })
            })
            .collect();
        let mut pid = first;
        for hammer in &hammers {
            hammer.goes_on(50);
        }
        for _ in 0..HAND_OVERS {
            // They have connected to the old one, which does not send them away. The one before that may not have closed its
            // listeners yet.
            let connect_to_old = |door: &Door| {
                let mut client = door.connect().expect("connect");
                eventually("the latest answers", || {
                    let answered = ask(&mut client, "before").expect("answer") == pid;
                    if !answered {
                        client = door.connect().expect("connect");
                    }
                    answered
                });
                client
            };
            let mut early: Vec<_> = doors.iter().map(connect_to_old).collect();
            signal("USR2", &pid.to_string());
            let next = hammers[0].answered_by_another_than(pid);
            assert_eq!(hammers[1].answered_by_another_than(pid), next);
            for hammer in &hammers {
                hammer.goes_on(50);
            }
            for client in &mut early {
                assert_eq!(ask(client, "after").expect("answer"), pid);
            }
            pid = next;
        }
        for hammer in &hammers {
            hammer.done.store(true, Ordering::SeqCst);
        }
        let answers: Vec<_> = threads
            .into_iter()
            .map(|thread| thread.join().expect("no panic"))
            .collect();
        (answers, pid)
    });
    for answers in answers {
        let answers = answers.expect("every connect and every line is answered");
        assert_eq!(answers.len(), HAND_OVERS + 1, "{answers:?}");
    }
    signal("TERM", &last.to_string());
    let log = family.finish();
    assert_eq!(
        log.matches("0 were forced").count(),
        HAND_OVERS + 1,
        "{log}"
    );
    // Its maker has handed it on, and the last one does not know whose it is. It is stale, and no obstacle.
    assert_eq!(
        doors[1].connect().err().map(|error| error.kind()),
        Some(io::ErrorKind::ConnectionRefused)
    );
    drop(spawn_echo(
        Config::new(),
        Listen::unix(&path, Framing::Packet2),
    ));
}

/// A new version that does not start costs no client anything, and the next one is tried like the
/// first.
#[test]
fn a_failed_hand_over_leaves_the_old_process_serving() {
    let place = Place::new();
    let program = place.path("program");
    let install = |what: &Path| {
        let _ = fs::remove_file(&program);
        std::os::unix::fs::symlink(what, &program).expect("link");
    };
    install(&kit::net::example("handover"));
    let path = place.path("failed.sock");
    let family = Family::start(&program, &[format!("unix:{}", path.display())]);
    let old = family.group;
    family.line();
    let door = Door::Unix(path);
    let mut inside = door.connect().expect("connect");
    assert_eq!(ask(&mut inside, "before").expect("answer"), old);

    // It ends at once; it cannot even be started.
    for what in ["/bin/true", "/nowhere"] {
        install(Path::new(what));
        signal("USR2", &old.to_string());
        loop {
            let line = family.error_line();
            if line.starts_with("handover: ") {
                assert!(line.ends_with("going on"), "{line}");
                break;
            }
        }
        assert_eq!(ask(&mut inside, "inside").expect("answer"), old);
        assert_eq!(
            ask(&mut door.connect().expect("connect"), "new").expect("answer"),
            old
        );
    }

    install(&kit::net::example("handover"));
    signal("USR2", &old.to_string());
    family.line();
    let mut new = old;
    eventually("the new one answers", || {
        new = ask(&mut door.connect().expect("connect"), "new").expect("answer");
        new != old
    });
    drop(inside);
    signal("TERM", &new.to_string());
    family.finish();
}

/// The queue is the socket's, not the process's: closing one end of it loses no waiting client.
#[test]
fn a_client_in_the_queue_is_served_by_the_successor() {
    let place = Place::new();
    let path = place.path("queue.sock");
    let old = {
        let listens = [
            local().name("tcp"),
            Listen::unix(&path, Framing::Packet2).name("unix"),
        ];
        kit::net::spawn(move || {
            let mut server = Server::new(Config::new()).expect("server");
            for listen in listens {
                server
                    .listen(listen, |_: &mut (), _| kit::net::Echo)
                    .expect("listen");
            }
            (server, ())
        })
    };
    let addr = old.addr();
    // In one job: nothing is accepted while these connect.
    let (sockets, mut tcp, mut unix) = old.ask({
        let path = path.clone();
        move |(), control| {
            let tcp: Vec<_> = (0..20).map(|_| connect(addr)).collect();
            let unix: Vec<_> = (0..20)
                .map(|_| UnixStream::connect(&path).expect("connect"))
                .collect();
            let sockets = ["tcp", "unix"].map(|name| {
                let socket = control.listener_socket(name).expect("a descriptor");
                control.close_listener(name).expect("there");
                socket
            });
            control.drain(Duration::from_secs(10));
            (sockets, tcp, unix)
        }
    });
    let (stats, ()) = old.finish();
    assert_eq!(stats.accepted, 0);
    assert!(path.exists());

    let new = kit::net::spawn(move || {
        let mut server = Server::new(Config::new()).expect("server");
        for (socket, name) in sockets.into_iter().zip(["tcp", "unix"]) {
            server
                .listen(
                    Listen::adopted(socket, Framing::Packet2).name(name),
                    |_: &mut (), _| kit::net::Echo,
                )
                .expect("adopt");
        }
        (server, ())
    });
    for (at, client) in tcp.iter_mut().enumerate() {
        send2(client, &[at as u8]);
        assert_eq!(recv2(client), [at as u8]);
    }
    for (at, client) in unix.iter_mut().enumerate() {
        client.set_read_timeout(Some(PATIENCE)).expect("timeout");
        send2(client, &[at as u8]);
        assert_eq!(recv2(client), [at as u8]);
    }
    new.until("all have been taken over", |stats| stats.accepted == 40);
}

#[test]
fn a_descriptor_that_is_handed_out_is_closed_by_exec() {
    let server = spawn_echo(Config::new(), local());
    let name = server.listeners[0].name.clone();
    let socket: OwnedFd = server.ask(move |(), control| {
        control
            .listener_socket(name.as_str())
            .expect("a descriptor")
    });
    // exec closes it, unless the program says otherwise.
    let flags = fs::read_to_string(format!("/proc/self/fdinfo/{}", socket.as_raw_fd()));
    let flags = flags.expect("proc");
    let octal = flags
        .lines()
        .find_map(|line| line.strip_prefix("flags:"))
        .expect("flags");
    let octal = u32::from_str_radix(octal.trim(), 8).expect("octal");
    // O_CLOEXEC
    assert_ne!(octal & 0o2_000_000, 0, "{flags}");
    let error = server.ask(|(), control| {
        control
            .listener_socket("nobody")
            .expect_err("no such listener")
    });
    assert!(matches!(error, Error::NoListener { .. }), "{error}");
}

/// A poll forgets a socket with its last descriptor only: one that was handed out must be taken out of it.
#[test]
fn a_listener_that_was_handed_over_wakes_the_old_server_no_more() {
    let mut server: Server = Server::new(Config::new()).expect("server");
    let id = server
        .listen(local(), |_: &mut (), _| kit::net::Echo)
        .expect("listen");
    let addr = kit::net::tcp(&server.control().listener(id).expect("there").addr);
    let socket = server.control().listener_socket(id).expect("a descriptor");
    server.control().close_listener(id).expect("there");
    server
        .poll_once(&mut (), Some(Duration::ZERO))
        .expect("poll");
    let _client = connect(addr);

    let mut outer = mio::Poll::new().expect("poll");
    let mut events = mio::Events::with_capacity(1);
    let fd = server.as_fd().as_raw_fd();
    let mut source = mio::unix::SourceFd(&fd);
    let register = outer
        .registry()
        .register(&mut source, mio::Token(0), mio::Interest::READABLE);
    register.expect("register");
    let wait = Some(Duration::from_millis(200));
    uninterrupted(|| outer.poll(&mut events, wait)).expect("poll");
    assert!(events.is_empty());
    drop(socket);
}
