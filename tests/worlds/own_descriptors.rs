//! Descriptors of the application: an adopted socket that is closed, not a stream or of another family is a typed error or
//! a defined close. A detached connection comes back, and watched descriptors are reported.

use std::cell::RefCell;
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::rc::Rc;
use std::time::Duration;

use kit::net::{reset, ReadSome};
use portcullis::sim::{Call, ClientId, ClientState, Faults, Random, Scripted, Sim};
use portcullis::{
    AccessRules, Close, CloseReason, Closed, Config, ConnId, Connect, Context, Control, Detached,
    Error, Framing, Handler, Interest, Listen, Outcome, ProxyProtocol, Retry,
};

#[derive(Default)]
struct App {
    opened: usize,
    closed: Vec<CloseReason>,
    detached: Rc<RefCell<Vec<Detached>>>,
    read: Vec<u8>,
}

/// Echoes. "out" detaches, "bye" closes.
struct Echo;

impl Handler<App> for Echo {
    fn on_open(&mut self, cx: &mut Context<'_, App>) -> Outcome {
        cx.app.opened += 1;
        Ok(())
    }

    fn on_frame(&mut self, cx: &mut Context<'_, App>, line: &[u8]) -> Outcome {
        match line {
            b"out\n" => {
                cx.conn.send("leaving\n")?;
                let detached = Rc::clone(&cx.app.detached);
                cx.conn
                    .detach(move |stream| detached.borrow_mut().push(stream))?;
            }
            b"bye\n" => return Err(Close::new()),
            line => cx.conn.send(line)?,
        }
        Ok(())
    }

    fn on_close(&mut self, cx: &mut Context<'_, App>, closed: &Closed) {
        cx.app.closed.push(closed.reason);
    }
}

fn lines() -> Connect {
    Connect::new(Framing::Line)
}

fn world(config: Config) -> (Sim<App>, SocketAddr) {
    let mut sim = Sim::new(3, config, App::default());
    let listen = Listen::tcp("127.0.0.1:0", Framing::Line);
    let addr = sim.listen(listen, |_: &mut App, _| Echo);
    (sim, addr.expect("a listener"))
}

fn pair() -> (UnixStream, UnixStream) {
    UnixStream::pair().expect("a pair")
}

/// A real client, and what a listener has accepted.
fn tcp_pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let client = kit::net::connect(listener.local_addr().expect("an address"));
    (client, listener.accept().expect("a client").0)
}

fn adopt(sim: &mut Sim<App>, socket: impl Into<OwnedFd>) -> Result<ConnId, Error> {
    sim.control().adopt(socket, lines(), Echo)
}

fn latest(sim: &Sim<App>) -> ClientId {
    *sim.adopted().last().expect("adopted")
}

#[track_caller]
fn served(sim: &mut Sim<App>, client: ClientId) {
    sim.send(client, b"hello\n");
    sim.settle();
    assert_eq!(sim.received(client), b"hello\n");
}

/// All connections end with their clients, and nothing is left.
#[track_caller]
fn ends(sim: &mut Sim<App>) {
    sim.control().drain(Duration::from_secs(10));
    sim.advance(Duration::from_secs(30));
    let stats = sim.stats();
    assert!(sim.drain_report().is_some(), "the drain is over");
    assert_eq!((stats.open, sim.descriptors(), stats.panics), (0, 0, 0));
    assert_eq!(stats.accepted + stats.outgoing, stats.closed_total());
}

#[test]
fn an_adopted_socket_is_served_as_any_other() {
    let (mut sim, _) = world(Config::new());
    let (ours, mut theirs) = pair();
    let over_unix = adopt(&mut sim, ours).expect("adopted");
    let (_client, accepted) = tcp_pair();
    let over_tcp = adopt(&mut sim, accepted).expect("adopted");
    // The descriptor itself is closed.
    assert_eq!(theirs.read_some(&mut [0; 1]).expect("the end"), 0);
    let adopted = sim.adopted();
    assert_eq!((adopted.len(), sim.descriptors()), (2, 3));
    for &client in &adopted {
        served(&mut sim, client);
    }
    let peer = |sim: &mut Sim<App>, id| {
        let info = sim.control().conn(id).and_then(|conn| conn.info());
        info.expect("open").peer.as_tcp()
    };
    assert_eq!(peer(&mut sim, over_unix), None);
    assert_eq!(sim.client_addr(adopted[0]), None);
    assert_eq!(peer(&mut sim, over_tcp), sim.client_addr(adopted[1]));
    assert!(peer(&mut sim, over_tcp).is_some());
    sim.finish(adopted[0]);
    sim.reset(adopted[1]);
    sim.settle();
    assert_eq!(sim.state(adopted[0]), ClientState::Finished);
    assert_eq!(
        sim.app().closed,
        [CloseReason::Finished, CloseReason::Reset]
    );
    assert_eq!((sim.stats().outgoing, sim.stats().accepted), (2, 0));
    ends(&mut sim);
}

#[test]
fn what_a_socket_has_received_comes_first() {
    let (mut sim, _) = world(Config::new());
    let (ours, mut theirs) = pair();
    theirs.write_all(b"ear").expect("sent");
    adopt(&mut sim, ours).expect("adopted");
    let client = latest(&sim);
    sim.send(client, b"ly\n");
    sim.settle();
    assert_eq!(sim.received(client), b"early\n");
    // As much as fits on the way.
    let (ours, mut theirs) = pair();
    let lines = [&[b'x'; 1000][..], b"\n"].concat().repeat(150);
    theirs.set_nonblocking(true).expect("non-blocking");
    let sent = theirs.write(&lines).expect("sent");
    adopt(&mut sim, ours).expect("adopted");
    let client = latest(&sim);
    sim.send(client, &lines[sent..]);
    sim.settle();
    assert_eq!(sim.received(client), lines);
    ends(&mut sim);
}

#[track_caller]
fn refused(sim: &mut Sim<App>, socket: impl Into<OwnedFd>, words: &str) {
    let error = adopt(sim, socket).expect_err("no connected stream");
    assert!(matches!(error, Error::Os { .. }), "{error:?}");
    assert!(error.to_string().contains(words), "{error}");
}

#[test]
fn what_is_no_connected_stream_is_a_typed_error() {
    let (mut sim, addr) = world(Config::new());
    let null = File::open("/dev/null").expect("there");
    refused(&mut sim, null, "adopting a connected socket");
    let (input, _output) = std::io::pipe().expect("a pipe");
    refused(&mut sim, input, "adopting a connected socket");
    let udp = UdpSocket::bind("127.0.0.1:0").expect("a port");
    refused(&mut sim, udp, "not a stream socket");
    let (datagram, _other) = UnixDatagram::pair().expect("a pair");
    refused(&mut sim, datagram, "not a stream socket");
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    refused(&mut sim, listener, "not connected");
    // One of another family, on a system that has one.
    #[cfg(target_os = "linux")]
    if let Ok(other) = socket2::Socket::new(libc::AF_VSOCK.into(), socket2::Type::STREAM, None) {
        refused(&mut sim, other, "neither TCP nor Unix");
    }
    // A connection that was reset meanwhile.
    let (client, accepted) = tcp_pair();
    reset(client);
    while accepted.peek(&mut [0; 1]).is_ok() {}
    refused(&mut sim, accepted, "adopting a connected socket");
    let stats = sim.stats();
    assert_eq!((stats.outgoing, stats.open, sim.descriptors()), (0, 0, 1));
    assert_eq!(sim.adopted(), []);
    let client = sim.connect(addr).expect("a listener");
    served(&mut sim, client);
}

#[test]
fn a_socket_whose_peer_has_closed_ends_as_finished() {
    let (mut sim, _) = world(Config::new());
    let (ours, theirs) = pair();
    drop(theirs);
    adopt(&mut sim, ours).expect("connected once");
    let (ours, mut theirs) = pair();
    theirs.write_all(b"last\nbye\n").expect("sent");
    drop(theirs);
    adopt(&mut sim, ours).expect("connected once");
    sim.settle();
    assert_eq!(sim.received(latest(&sim)), b"last\n");
    assert_eq!(
        sim.app().closed,
        [CloseReason::Finished, CloseReason::Closed]
    );
    ends(&mut sim);
}

#[test]
fn a_refused_socket_is_closed() {
    let (mut sim, addr) = world(Config::max_connections(1));
    let (ours, _theirs) = pair();
    let zero = lines().with(|options| options.conn.max_frame = Some(0));
    let error = sim.control().adopt(ours, zero, Echo);
    assert!(matches!(error, Err(Error::Option { .. })), "{error:?}");
    assert_eq!(sim.adopted(), []);

    sim.add_fault(Scripted {
        call: Call::Register,
        after: 0,
        errno: libc::ENOSPC,
    });
    let error = adopt(&mut sim, pair().0);
    assert!(matches!(error, Err(Error::Os { .. })), "{error:?}");

    let client = sim.connect(addr).expect("a listener");
    served(&mut sim, client);
    let error = adopt(&mut sim, tcp_pair().1);
    assert!(
        matches!(error, Err(Error::AtCapacity { max_connections: 1 })),
        "{error:?}"
    );
    sim.control().drain(Duration::from_secs(10));
    let error = adopt(&mut sim, pair().0);
    assert!(matches!(error, Err(Error::Draining)), "{error:?}");
    for client in sim.adopted() {
        assert_eq!(sim.state(client), ClientState::Finished);
    }
    assert_eq!(sim.adopted().len(), 2);
    sim.finish(client);
    ends(&mut sim);
    assert_eq!(sim.stats().outgoing, 0);
}

#[test]
fn adopted_sockets_meet_every_fault() {
    for seed in 0..300 {
        let mut sim = Sim::new(seed, Config::new(), App::default());
        let mut random = Random::new(seed);
        sim.set_faults(Faults::swarm(&mut random));
        for _ in 0..5 {
            // It may not be possible to register one.
            let _ = adopt(&mut sim, pair().0);
            for client in sim.adopted() {
                sim.send(client, b"hello\n");
            }
            sim.advance(Duration::from_millis(100));
        }
        sim.set_faults(Faults::none());
        for client in sim.adopted() {
            sim.finish(client);
        }
        sim.advance(Duration::from_secs(200));
        for client in sim.adopted() {
            let received = sim.received(client);
            assert!(b"hello\n".repeat(5).starts_with(&received), "seed {seed}");
            assert_ne!(sim.state(client), ClientState::Connected, "seed {seed}");
        }
        ends(&mut sim);
    }
}

fn detach(sim: &mut Sim<App>, client: ClientId, behind: &[u8]) -> Detached {
    sim.send(client, &[b"out\n", behind].concat());
    sim.settle();
    assert_eq!(sim.received(client), b"leaving\n");
    sim.app().detached.borrow_mut().pop().expect("a stream")
}

/// The slot that it had is its own again: the server is full.
#[test]
fn a_detached_connection_comes_back() {
    let (mut sim, addr) = world(Config::max_connections(1));
    let client = sim.connect(addr).expect("a listener");
    let known = sim.client_addr(client);
    for round in 0..3 {
        let mut stream = detach(&mut sim, client, b"secret behind\n");
        assert_eq!((sim.stats().open, sim.descriptors()), (1, 1));
        let mut secret = [0; 7];
        stream.read_exact(&mut secret).expect("unread");
        assert_eq!(&secret, b"secret ");
        stream.write_all(b"welcome\n").expect("written");
        sim.send(client, b"and more\n");
        if round > 0 {
            sim.settle();
            assert_eq!(sim.received(client), b"welcome\n");
        }
        if round > 1 {
            let mut more = [0; 11];
            stream.read_exact(&mut more).expect("they have come");
            assert_eq!(&more, b"behind\nand ");
        }
        let id = sim.control().attach(stream, lines(), Echo).expect("room");
        sim.settle();
        let rest: &[u8] = match round {
            0 => b"welcome\nbehind\nand more\n",
            1 => b"behind\nand more\n",
            _ => b"more\n",
        };
        assert_eq!(sim.received(client), rest, "round {round}");
        let info = sim.control().conn(id).and_then(|conn| conn.info());
        assert_eq!(info.expect("open").peer.as_tcp(), known);
        served(&mut sim, client);
    }
    assert_eq!(sim.adopted(), [], "it is the connection that it was");
    sim.send(client, b"bye\n");
    sim.finish(client);
    ends(&mut sim);
    assert_eq!(sim.stats().closed(CloseReason::Detached), 3);
    assert_eq!(sim.stats().closed(CloseReason::Closed), 1);
    assert_eq!((sim.stats().accepted, sim.stats().outgoing), (1, 3));
}

/// Output that was written before the connection came back is lost with it, and the reason says so.
#[test]
fn output_from_before_is_not_forgotten() {
    let (mut sim, addr) = world(Config::new());
    let client = sim.connect(addr).expect("a listener");
    sim.set_reading(client, false);
    sim.send(client, b"out\n");
    sim.settle();
    let stream = sim.app().detached.borrow_mut().pop().expect("a stream");
    let options = lines().with(|connect| {
        connect.conn.idle_timeout = Duration::from_secs(1);
        connect.conn.write_timeout = Duration::from_secs(5);
    });
    let attached = sim.control().attach(stream, options, Echo);
    attached.expect("room");
    sim.advance(Duration::from_secs(60));
    assert_eq!(sim.received(client), b"");
    let expected = [CloseReason::Detached, CloseReason::WriteTimeout];
    assert_eq!(sim.app().closed, expected);
}

#[test]
fn a_detached_connection_is_a_blocking_stream() {
    let (mut sim, addr) = world(Config::new());
    // Dropped: in order, or with a reset if input is unread.
    for (unread, state) in [(false, ClientState::Finished), (true, ClientState::Reset)] {
        let client = sim.connect(addr).expect("a listener");
        let mut stream = detach(&mut sim, client, b"");
        sim.send(client, b"all of it");
        sim.finish(client);
        sim.settle();
        stream.write_all(b"thanks").expect("written");
        if !unread {
            let mut all = Vec::new();
            stream.read_to_end(&mut all).expect("the end comes");
            assert_eq!(all, b"all of it");
        }
        drop(stream);
        sim.settle();
        assert_eq!(sim.state(client), state);
        assert_eq!(sim.received(client), b"thanks");
    }
    // Closed in order, behind the peer's end.
    let client = sim.connect(addr).expect("a listener");
    let mut stream = detach(&mut sim, client, b"");
    sim.finish(client);
    sim.settle();
    stream.write_all(b"goodbye").expect("written");
    stream.finish().expect("in order");
    sim.settle();
    assert_eq!(sim.received(client), b"goodbye");
    assert_eq!(sim.state(client), ClientState::Finished);
    // More than fits into the buffers.
    let client = sim.connect(addr).expect("a listener");
    sim.set_reading(client, false);
    sim.set_send_buffer(client, 1000);
    let mut stream = detach_unread(&mut sim, client);
    stream.write_all(&[7; 50_000]).expect("written");
    drop(stream);
    sim.settle();
    sim.set_reading(client, true);
    sim.settle();
    assert_eq!(sim.received(client).len(), 50_000 + b"leaving\n".len());
    assert_eq!(sim.state(client), ClientState::Finished);
    ends(&mut sim);
}

/// As [`detach`], of a client that does not read.
fn detach_unread(sim: &mut Sim<App>, client: ClientId) -> Detached {
    sim.send(client, b"out\n");
    sim.settle();
    sim.app().detached.borrow_mut().pop().expect("a stream")
}

#[test]
fn a_detached_connection_that_has_ended_does_not_come_back() {
    let (mut sim, addr) = world(Config::new());
    let client = sim.connect(addr).expect("a listener");
    let mut stream = detach(&mut sim, client, b"");
    let id = stream.id();
    assert!(sim.control().kill(id));
    assert_eq!(stream.read_some(&mut [0; 1]).expect("it is cut off"), 0);
    let error = sim.control().attach(stream, lines(), Echo);
    assert!(matches!(error, Err(Error::ConnState(_))), "{error:?}");
    sim.settle();
    assert_eq!(sim.state(client), ClientState::Finished);

    let client = sim.connect(addr).expect("a listener");
    let mut stream = detach(&mut sim, client, b"");
    sim.reset(client);
    sim.settle();
    assert_eq!(stream.read_some(&mut [0; 1]).unwrap_or_default(), 0);
    assert!(stream.write_all(b"lost").is_err());
    let error = sim.control().attach(stream, lines(), Echo);
    assert!(matches!(error, Err(Error::Os { .. })), "{error:?}");

    // The drain does not wait for it beyond its deadline.
    let client = sim.connect(addr).expect("a listener");
    let stream = detach(&mut sim, client, b"");
    sim.control().drain(Duration::from_secs(5));
    let error = sim.control().attach(stream, lines(), Echo);
    assert!(matches!(error, Err(Error::Draining)), "{error:?}");
    ends(&mut sim);
    assert_eq!(sim.state(client), ClientState::Finished);
}

#[test]
fn a_drain_ends_a_detached_connection_at_its_deadline() {
    let (mut sim, addr) = world(Config::new());
    let client = sim.connect(addr).expect("a listener");
    let mut stream = detach(&mut sim, client, b"");
    sim.control().drain(Duration::from_secs(5));
    sim.advance(Duration::from_secs(4));
    assert_eq!(sim.stats().open, 1);
    sim.advance(Duration::from_secs(2));
    assert_eq!(sim.stats().closed(CloseReason::DrainForced), 1);
    assert_eq!(stream.read_some(&mut [0; 1]).expect("it is cut off"), 0);
    ends(&mut sim);
}

/// The addresses stay with its slot, and are no memory of its buffers.
#[test]
fn a_connection_behind_a_proxy_is_detached() {
    let mut sim = Sim::new(3, Config::new(), App::default());
    let listen = Listen::tcp("127.0.0.1:0", Framing::Line).with(|listen| {
        listen.proxy_protocol = ProxyProtocol::Required;
        listen.trusted_proxies = Some(AccessRules::allow_all());
    });
    let addr = sim.listen(listen, |_: &mut App, _| Echo).expect("listen");
    let client = sim.connect(addr).expect("a listener");
    sim.send(client, b"PROXY TCP4 192.0.2.7 192.0.2.8 1 2\r\n");
    let stream = detach(&mut sim, client, b"behind\n");
    let infos = sim.control().connections();
    assert_eq!(infos[0].source.to_string(), "192.0.2.7:1");
    assert_eq!(sim.stats().memory, 0);
    sim.control().attach(stream, lines(), Echo).expect("room");
    sim.settle();
    assert_eq!(sim.received(client), b"behind\n");
    sim.finish(client);
    ends(&mut sim);
}

/// They are accounted for at once, before its first turn.
#[test]
fn what_a_connection_brings_back_is_accounted_for() {
    let (mut sim, addr) = world(Config::new());
    let client = sim.connect(addr).expect("a listener");
    let stream = detach(&mut sim, client, b"incomplete");
    assert_eq!(sim.stats().memory, 0);
    sim.control().attach(stream, lines(), Echo).expect("room");
    assert!(sim.stats().memory >= b"incomplete".len());
    sim.finish(client);
    ends(&mut sim);
    assert_eq!(sim.stats().memory, 0);
}

/// With nothing to read or to write it owns no buffer, as any connection.
#[test]
fn an_idle_connection_that_has_come_back_owns_no_buffer() {
    let (mut sim, addr) = world(Config::new());
    let client = sim.connect(addr).expect("a listener");
    let stream = detach(&mut sim, client, b"");
    // Its buffers can be had again.
    let other = sim.connect(addr).expect("a listener");
    sim.send(other, b"incomplete");
    sim.settle();
    sim.finish(other);
    sim.settle();
    let id = sim.control().attach(stream, lines(), Echo).expect("room");
    sim.settle();
    assert_eq!(sim.stats().memory, 0);
    sim.control().conn(id).expect("open").close();
    sim.settle();
    sim.finish(client);
    ends(&mut sim);
}

/// One that was adopted, and one that the server has connected.
#[test]
fn every_kind_of_connection_can_be_detached() {
    let (mut sim, own) = world(Config::new());
    adopt(&mut sim, pair().0).expect("adopted");
    let adopted = latest(&sim);
    sim.remote("203.0.113.7:25", portcullis::sim::Answer::Accept);
    let options = lines().with(|options| options.retry = Some(Retry::new(2)));
    let connected = sim.control().connect("203.0.113.7:25", options, Echo);
    connected.expect("connects");
    sim.settle();
    let dialed = sim.dialed("203.0.113.7:25")[0];
    for client in [adopted, dialed] {
        let stream = detach(&mut sim, client, b"behind\n");
        sim.control().attach(stream, lines(), Echo).expect("room");
        sim.settle();
        assert_eq!(sim.received(client), b"behind\n");
        served(&mut sim, client);
        sim.finish(client);
    }
    // Of the server with itself.
    struct Asks;
    impl Handler<App> for Asks {
        fn on_open(&mut self, cx: &mut Context<'_, App>) -> Outcome {
            cx.conn.send("out\n")?;
            Ok(())
        }
        fn on_frame(&mut self, cx: &mut Context<'_, App>, line: &[u8]) -> Outcome {
            cx.app.read.extend(line);
            Ok(())
        }
    }
    sim.control().connect(own, lines(), Asks).expect("connects");
    sim.settle();
    let mut stream = sim.app().detached.borrow_mut().pop().expect("a stream");
    stream.write_all(b"from outside\n").expect("written");
    sim.settle();
    assert_eq!(sim.app().read, b"leaving\nfrom outside\n");
    sim.control().attach(stream, lines(), Echo).expect("room");
    ends(&mut sim);
}

/// Keeps what is read.
fn read_all(app: &mut App, input: &mut UnixStream) {
    let mut bytes = [0; 64];
    loop {
        match input.read_some(&mut bytes) {
            Ok(0) => return app.read.push(b'!'),
            Ok(count) => app.read.extend(&bytes[..count]),
            Err(error) if error.kind() == ErrorKind::WouldBlock => return,
            Err(error) => panic!("{error}"),
        }
    }
}

/// The edges are the system's own.
#[test]
fn a_watched_descriptor_is_reported_at_its_edges() {
    let mut sim = Sim::new(1, Config::new(), App::default());
    let (ours, mut theirs) = pair();
    ours.set_nonblocking(true).expect("non-blocking");
    theirs.write_all(b"early").expect("sent");
    let calls = Rc::new(RefCell::new(0));
    let counted = Rc::clone(&calls);
    let watched = sim
        .control()
        .watch(ours, Interest::Readable, move |app: &mut App, _, ours| {
            *counted.borrow_mut() += 1;
            // The first time it reads nothing: that is no new edge.
            if *counted.borrow() > 1 {
                read_all(app, ours);
            }
        });
    let id = watched.expect("watched");
    sim.settle();
    sim.advance(Duration::from_secs(60));
    assert_eq!((*calls.borrow(), sim.app().read.len()), (1, 0));
    theirs.write_all(b" and late").expect("sent");
    sim.settle();
    assert_eq!(
        (*calls.borrow(), &*sim.app().read),
        (2, &b"early and late"[..])
    );
    drop(theirs);
    sim.settle();
    assert_eq!(sim.app().read.last(), Some(&b'!'));
    assert!(sim.control().unwatch(id) && !sim.control().unwatch(id));
    assert_eq!(sim.stats().panics, 0);
}

/// Also when a callback makes the next descriptor ready, and however late events are.
#[test]
fn no_event_of_a_watched_descriptor_is_lost() {
    for seed in 0..50 {
        let mut sim = Sim::new(seed, Config::new(), App::default());
        let mut faults = Faults::everything(300);
        faults.errors = 0;
        sim.set_faults(faults);
        let mut first = None;
        for _ in 0..5 {
            let (ours, theirs) = pair();
            ours.set_nonblocking(true).expect("non-blocking");
            let mut next: Option<UnixStream> = first.replace(theirs);
            let callback = move |app: &mut App, _: &mut Control<'_, App>, ours: &mut UnixStream| {
                read_all(app, ours);
                if let Some(mut next) = next.take() {
                    next.write_all(b"x").expect("sent");
                }
            };
            let watched = sim.control().watch(ours, Interest::Readable, callback);
            watched.expect("watched");
        }
        let mut first = first.expect("the latest");
        first.write_all(b"x").expect("sent");
        sim.settle();
        // A byte and the end of each, but the end of the first.
        assert_eq!(sim.app().read.len(), 9, "seed {seed}");
        drop(first);
        sim.settle();
        assert_eq!(sim.app().read.len(), 10, "seed {seed}");
        assert_eq!(sim.stats().panics, 0);
    }
}

#[test]
fn what_cannot_be_watched_is_a_typed_error() {
    let mut sim = Sim::new(1, Config::new(), ());
    let file = File::open(std::env::current_exe().expect("a program")).expect("there");
    let error = sim.control().watch(file, Interest::Readable, |(), _, _| ());
    assert!(matches!(error, Err(Error::Os { .. })), "{error:?}");
    // The same descriptor twice.
    #[derive(Clone)]
    struct Shared(Rc<UnixStream>);
    impl AsFd for Shared {
        fn as_fd(&self) -> BorrowedFd<'_> {
            self.0.as_fd()
        }
    }
    let (ours, mut theirs) = pair();
    let shared = Shared(Rc::new(ours));
    let watch = |sim: &mut Sim, shared: &Shared| {
        let control = &mut sim.control();
        control.watch(shared.clone(), Interest::Both, |(), _, _| ())
    };
    let id = watch(&mut sim, &shared).expect("watched");
    let again = watch(&mut sim, &shared);
    assert!(matches!(again, Err(Error::Os { .. })), "{again:?}");
    assert!(sim.control().unwatch(id));
    sim.set_faults(Faults::none().with(Call::Register, 0, libc::ENOSPC));
    let full = watch(&mut sim, &shared);
    assert!(matches!(full, Err(Error::Os { .. })), "{full:?}");
    watch(&mut sim, &shared).expect("free again");
    drop(shared);
    drop(sim);
    assert_eq!(theirs.read_some(&mut [0; 1]).expect("the end"), 0);
}

/// The peer's close_notify is read before the connection is detached, in the same turn.
#[cfg(feature = "tls")]
#[test]
fn a_connection_whose_peer_has_said_close_notify_is_detached() {
    use kit::sim_tls;
    let mut sim = Sim::new(3, Config::new(), App::default());
    let listen = Listen::tcp("127.0.0.1:0", Framing::Line).tls(sim_tls::server_config());
    let addr = sim.listen(listen, |_: &mut App, _| Echo).expect("listen");
    let client = sim.connect(addr).expect("room");
    let mut tls = sim_tls::Client::new();
    sim.send(client, &tls.encrypt(b""));
    sim.settle();
    let hello = sim.received(client);
    let flight = tls.decrypt(&hello, &mut Vec::new()).expect("a hello");
    let last_words = [flight, tls.encrypt(b"out\n"), tls.close_notify()].concat();
    sim.send(client, &last_words);
    sim.settle();
    let stream = sim.app().detached.borrow_mut().pop().expect("a stream");
    let error = sim.control().attach(stream, lines(), Echo);
    assert!(matches!(error, Err(Error::ConnState(_))), "{error:?}");
    sim.settle();
    let mut said = Vec::new();
    tls.decrypt(&sim.received(client), &mut said).expect("TLS");
    assert_eq!(said, b"leaving\n");
    assert_eq!(sim.app().closed, [CloseReason::Detached]);
}
