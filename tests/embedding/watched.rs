//! Descriptors of the application in the loop: datagrams, pipes, other loops.

use std::cell::Cell;
use std::fs::File;
use std::io::{ErrorKind, Write};
use std::net::UdpSocket;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::sync::mpsc;
use std::time::Duration;

use kit::net::{connect, local, ping, spawn, turns_until, Echo, ReadSome, PATIENCE};
use portcullis::{
    Config, Connect, Context, Control, Error, Framing, Handler, Interest, Outcome, Server, WatchId,
};

/// Texts that were read.
type Seen = Vec<String>;

fn server() -> Server<Seen> {
    Server::new(Config::new()).expect("a server")
}

fn pair() -> (UnixStream, UnixStream) {
    let (ours, theirs) = UnixStream::pair().expect("a pair");
    ours.set_nonblocking(true).expect("non-blocking");
    (ours, theirs)
}

/// Reads until nothing is there.
fn read_all(seen: &mut Seen, _: &mut Control<'_, Seen>, input: &mut UnixStream) {
    let mut bytes = [0; 64];
    loop {
        match input.read_some(&mut bytes) {
            Ok(0) => return seen.push("end".to_owned()),
            Ok(count) => seen.push(String::from_utf8_lossy(&bytes[..count]).into_owned()),
            Err(error) if error.kind() == ErrorKind::WouldBlock => return,
            Err(error) => panic!("{error}"),
        }
    }
}

#[track_caller]
fn until(server: &mut Server<Seen>, seen: &mut Seen, wanted: &[&str]) {
    turns_until(server, seen, |_, seen| seen.len() >= wanted.len());
    assert_eq!(*seen, wanted);
}

/// Beside TCP clients, in one loop.
#[test]
fn datagrams_are_answered() {
    let (tell, told) = mpsc::channel();
    let server = spawn(move || {
        let mut server = Server::new(Config::new()).expect("a server");
        server
            .listen(local(), |_: &mut (), _| Echo)
            .expect("listen");
        let udp = UdpSocket::bind("127.0.0.1:0").expect("a port");
        udp.set_nonblocking(true).expect("non-blocking");
        tell.send(udp.local_addr().expect("an address"))
            .expect("the test waits");
        let watched = server
            .control()
            .watch(udp, Interest::Readable, |(), _, udp| {
                let mut datagram = [0; 100];
                while let Ok((length, from)) = udp.recv_from(&mut datagram) {
                    let _ = udp.send_to(&datagram[..length], from);
                }
            });
        watched.expect("watched");
        (server, ())
    });
    let addr = told.recv_timeout(PATIENCE).expect("an address");
    let client = UdpSocket::bind("127.0.0.1:0").expect("a port");
    client.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    let mut tcp = connect(server.addr());
    for text in [&b"one"[..], b"two", b"three"] {
        client.send_to(text, addr).expect("sent");
        let mut answer = [0; 100];
        let length = client.recv(&mut answer).expect("an answer");
        assert_eq!(&answer[..length], text);
        ping(&mut tcp, text);
    }
}

#[test]
fn input_and_its_end_are_reported() {
    let (mut server, mut seen) = (server(), Seen::new());
    let (ours, mut theirs) = pair();
    // What is there before counts too.
    theirs.write_all(b"early").expect("sent");
    let watched = server.control().watch(ours, Interest::Readable, read_all);
    let id = watched.expect("watched");
    until(&mut server, &mut seen, &["early"]);
    theirs.write_all(b"later").expect("sent");
    until(&mut server, &mut seen, &["early", "later"]);
    drop(theirs);
    until(&mut server, &mut seen, &["early", "later", "end"]);
    assert!(server.control().unwatch(id) && !server.control().unwatch(id));
}

/// What is not read is not reported again: with edges, more has to happen.
#[test]
fn room_for_output_is_reported() {
    let (mut server, mut seen) = (server(), Seen::new());
    let (ours, mut theirs) = pair();
    let watched = server
        .control()
        .watch(ours, Interest::Writable, |seen: &mut Seen, _, ours| {
            while ours.write(&[0; 4096]).is_ok() {}
            seen.push("full".to_owned());
        });
    watched.expect("watched");
    until(&mut server, &mut seen, &["full"]);
    let mut bytes = vec![0; 1 << 20];
    theirs.set_nonblocking(true).expect("non-blocking");
    while theirs.read_some(&mut bytes).is_ok() {}
    until(&mut server, &mut seen, &["full", "full"]);
}

#[test]
fn a_callback_ends_its_own_watch() {
    let (mut server, mut seen) = (server(), Seen::new());
    let (ours, mut theirs) = pair();
    let own: Rc<Cell<Option<WatchId>>> = Rc::default();
    let known = Rc::clone(&own);
    let once = move |seen: &mut Seen, control: &mut Control<'_, Seen>, _: &mut UnixStream| {
        seen.push("once".to_owned());
        let id = known.take().expect("it is called once");
        assert!(control.unwatch(id) && !control.unwatch(id));
    };
    let id = server
        .control()
        .watch(ours, Interest::Both, once)
        .expect("watched");
    own.set(Some(id));
    until(&mut server, &mut seen, &["once"]);
    // The descriptor was dropped with it.
    assert_eq!(theirs.read_some(&mut [0; 1]).expect("the end"), 0);
}

#[test]
fn a_panic_ends_no_watch() {
    let (mut server, mut seen) = (server(), Seen::new());
    let (ours, mut theirs) = pair();
    let panics = |seen: &mut Seen, control: &mut Control<'_, Seen>, ours: &mut UnixStream| {
        read_all(seen, control, ours);
        if seen.len() == 1 {
            std::panic::resume_unwind(Box::new("planned"));
        }
    };
    let watched = server.control().watch(ours, Interest::Readable, panics);
    watched.expect("watched");
    theirs.write_all(b"one").expect("sent");
    until(&mut server, &mut seen, &["one"]);
    theirs.write_all(b"two").expect("sent");
    until(&mut server, &mut seen, &["one", "two"]);
    assert_eq!(server.control().stats().panics, 1);
}

#[test]
fn what_cannot_be_watched_is_refused() {
    let mut server = server();
    let file = File::open(std::env::current_exe().expect("a program")).expect("there");
    let refused = server
        .control()
        .watch(file, Interest::Readable, |_, _, _| ());
    let error = refused.expect_err("a regular file");
    assert!(matches!(error, Error::Os { .. }), "{error:?}");
    assert!(
        error.to_string().contains("watching a descriptor"),
        "{error}"
    );
    // The same descriptor twice.
    #[derive(Clone)]
    struct Shared(Rc<UnixStream>);
    impl AsFd for Shared {
        fn as_fd(&self) -> BorrowedFd<'_> {
            self.0.as_fd()
        }
    }
    let (ours, _theirs) = pair();
    let shared = Shared(Rc::new(ours));
    let first = server
        .control()
        .watch(shared.clone(), Interest::Readable, |_, _, _| ());
    let again = server
        .control()
        .watch(shared.clone(), Interest::Readable, |_, _, _| ());
    assert!(matches!(again, Err(Error::Os { .. })), "{again:?}");
    // And once more when it is free.
    assert!(server.control().unwatch(first.expect("watched")));
    let again = server
        .control()
        .watch(shared, Interest::Readable, |_, _, _| ());
    assert!(again.is_ok(), "{again:?}");
}

/// As a connection's, and with the loop idle meanwhile.
#[test]
fn an_event_wakes_a_sleeping_loop() {
    let (mut server, mut seen) = (server(), Seen::new());
    let (ours, mut theirs) = pair();
    let watched = server.control().watch(ours, Interest::Readable, read_all);
    watched.expect("watched");
    server
        .poll_once(&mut seen, Some(Duration::ZERO))
        .expect("a turn");
    assert_eq!(server.next_timeout(), None, "nothing is due");
    let writes = std::thread::spawn(move || theirs.write_all(b"hello").map(|()| theirs));
    turns_until(&mut server, &mut seen, |_, seen| !seen.is_empty());
    assert_eq!(seen, ["hello"]);
    writes.join().expect("it wrote").expect("sent");
}

#[test]
fn a_server_that_is_dropped_drops_the_descriptors() {
    let mut server = server();
    let (ours, mut theirs) = pair();
    let watched = server.control().watch(ours, Interest::Readable, read_all);
    let id = watched.expect("watched");
    let mut other = self::server();
    assert!(!other.control().unwatch(id), "of another server");
    drop(server);
    assert_eq!(theirs.read_some(&mut [0; 1]).expect("the end"), 0);
}

/// A callback replaces its descriptor. The number of the former one may be a connection's since.
#[test]
fn the_end_of_a_watch_harms_no_other_descriptor() {
    let (mut server, mut seen) = (server(), Seen::new());
    let (ours, mut theirs) = pair();
    let (next, _peer) = pair();
    let mut replacement = Some(next);
    let replaces = move |seen: &mut Seen, _: &mut Control<'_, Seen>, ours: &mut UnixStream| {
        if let Some(next) = replacement.take() {
            *ours = next;
            seen.push("replaced".to_owned());
        }
    };
    let watched = server.control().watch(ours, Interest::Readable, replaces);
    theirs.write_all(b"one").expect("sent");
    until(&mut server, &mut seen, &["replaced"]);
    // One of these has the former number.
    let adopt = |server: &mut Server<Seen>| {
        let (socket, client) = pair();
        let options = Connect::new(Framing::Line);
        let adopted = server.control().adopt(socket, options, Says);
        adopted.expect("adopted");
        client
    };
    let mut clients: Vec<_> = (0..8).map(|_| adopt(&mut server)).collect();
    turns_until(&mut server, &mut seen, |_, seen| seen.len() == 9);
    assert!(server.control().unwatch(watched.expect("watched")));
    for client in &mut clients {
        client.write_all(b"hello\n").expect("sent");
    }
    turns_until(&mut server, &mut seen, |_, seen| seen.len() == 17);
}

/// The same, all of it within the callback.
#[test]
fn a_watch_that_ends_in_its_callback_harms_no_other_descriptor() {
    let (mut server, mut seen) = (server(), Seen::new());
    let (ours, mut theirs) = pair();
    let (next, _peer) = pair();
    let (clients, adopted) = mpsc::channel();
    let own: Rc<Cell<Option<WatchId>>> = Rc::default();
    let (known, mut replacement) = (Rc::clone(&own), Some(next));
    let replaces = move |_: &mut Seen, control: &mut Control<'_, Seen>, ours: &mut UnixStream| {
        *ours = replacement.take().expect("it is called once");
        for _ in 0..8 {
            let (socket, client) = pair();
            let options = Connect::new(Framing::Line);
            control.adopt(socket, options, Says).expect("adopted");
            clients.send(client).expect("the test waits");
        }
        assert!(control.unwatch(known.take().expect("known")));
    };
    let watched = server.control().watch(ours, Interest::Readable, replaces);
    own.set(watched.ok());
    theirs.write_all(b"one").expect("sent");
    turns_until(&mut server, &mut seen, |_, seen| seen.len() == 8);
    let clients: Vec<_> = adopted.try_iter().collect();
    for mut client in &clients {
        client.write_all(b"hello\n").expect("sent");
    }
    turns_until(&mut server, &mut seen, |_, seen| seen.len() == 16);
}

/// Notes that it opened, and its frames.
struct Says;

impl Handler<Seen> for Says {
    fn on_open(&mut self, cx: &mut Context<'_, Seen>) -> Outcome {
        cx.app.push("opened".to_owned());
        Ok(())
    }

    fn on_frame(&mut self, cx: &mut Context<'_, Seen>, _: &[u8]) -> Outcome {
        cx.app.push("frame".to_owned());
        Ok(())
    }
}

/// The smallest budget is enough for one callback.
#[test]
fn callbacks_beyond_the_work_of_an_iteration_wait_for_the_next() {
    let config = Config::new().with(|config| config.budgets.work = 1);
    let mut server: Server<Seen> = Server::new(config).expect("a server");
    let mut seen = Seen::new();
    let peers = [(); 3].map(|()| {
        let (ours, theirs) = pair();
        let watched = server.control().watch(ours, Interest::Readable, read_all);
        watched.expect("watched");
        theirs
    });
    for mut peer in &peers {
        peer.write_all(b"x").expect("sent");
    }
    let mut before = 0;
    turns_until(&mut server, &mut seen, |_, seen| {
        let called = seen.len() - std::mem::replace(&mut before, seen.len());
        assert!(called <= 1, "{called} in one iteration");
        seen.len() == 3
    });
}
