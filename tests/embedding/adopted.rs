//! Connected sockets from outside: of a socketpair, of another process, or of a connection that was detached.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream, UdpSocket};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::sync::mpsc;
use std::thread;

use kit::net::{
    connect, local, packet2, ping, read_to_end, recv2, send2, spawn, turns_until, ReadSome,
    Running, PATIENCE,
};
use portcullis::{
    Addr, Close, CloseReason, Closed, Config, ConnId, Connect, Context, Control, Detached, Error,
    Framing, Handler, Message, Outcome, Server,
};

#[derive(Default)]
struct App {
    opened: Vec<ConnId>,
    closed: Vec<CloseReason>,
    failed: Vec<CloseReason>,
    streams: Option<mpsc::Sender<Detached>>,
}

/// Echoes. "out" detaches, "bye" closes.
struct Echo;

impl Handler<App> for Echo {
    fn on_open(&mut self, cx: &mut Context<'_, App>) -> Outcome {
        cx.app.opened.push(cx.conn.id());
        Ok(())
    }

    fn on_frame(&mut self, cx: &mut Context<'_, App>, frame: &[u8]) -> Outcome {
        match frame {
            b"out" => {
                cx.conn.send("leaving")?;
                let streams = cx.app.streams.clone().expect("a receiver");
                cx.conn.detach(move |stream| drop(streams.send(stream)))?;
            }
            b"bye" => return Err(Close::new()),
            frame => cx.conn.send(frame)?,
        }
        Ok(())
    }

    fn on_close(&mut self, cx: &mut Context<'_, App>, closed: &Closed) {
        cx.app.closed.push(closed.reason);
    }

    fn on_connect_failed(&mut self, cx: &mut Context<'_, App>, closed: &Closed) {
        cx.app.failed.push(closed.reason);
    }
}

fn packets() -> Connect {
    Connect::new(Framing::Packet2)
}

fn own(config: Config) -> Server<App> {
    Server::new(config).expect("a server")
}

/// A server without a listener that serves `socket` on its own thread.
fn serving(socket: impl Into<OwnedFd>) -> (Running<App>, ConnId) {
    let socket = socket.into();
    let server = spawn(|| (own(Config::new()), App::default()));
    let id = server.ask(move |_, control| control.adopt(socket, packets(), Echo));
    (server, id.expect("adopted"))
}

#[test]
fn a_socketpair_is_served() {
    let (ours, mut theirs) = UnixStream::pair().expect("a pair");
    let (server, id) = serving(ours);
    ping(&mut theirs, b"hello");
    server.ask(move |app, control| {
        assert_eq!(app.opened, [id]);
        let infos = control.connections();
        assert_eq!((infos.len(), infos[0].listener), (1, None));
        assert!(control.tree(9).to_string().contains("outgoing"));
    });
    theirs.shutdown(Shutdown::Write).expect("finished");
    assert_eq!(read_to_end(&mut theirs), b"");
    let stats = server.until("its end", |stats| stats.open == 0);
    assert_eq!((stats.outgoing, stats.accepted), (1, 0));
    assert_eq!(stats.closed(CloseReason::Finished), 1);
}

/// As inetd's "nowait" does: accepted by another.
#[test]
fn a_connection_that_another_has_accepted_is_served() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let mut client = connect(listener.local_addr().expect("an address"));
    // Sent before there was a server.
    send2(&mut client, b"early");
    let (accepted, addr) = listener.accept().expect("a client");
    let (server, id) = serving(accepted);
    assert_eq!(recv2(&mut client), b"early");
    ping(&mut client, &vec![7; 60_000]);
    server.ask(move |_, control| {
        let info = control.conn(id).and_then(|conn| conn.info());
        assert_eq!(info.expect("open").peer, Addr::from(addr));
    });
    // A kill ends it for the peer although this process has a copy.
    assert!(server.ask(move |_, control| control.kill(id)));
    let end = client.read_some(&mut [0; 1]).map_err(|error| error.kind());
    assert_eq!(end, Err(std::io::ErrorKind::ConnectionReset));
}

#[test]
fn a_half_closed_connection_gets_its_answers() {
    let (ours, mut theirs) = UnixStream::pair().expect("a pair");
    theirs.write_all(&packet2(b"last")).expect("sent");
    theirs.shutdown(Shutdown::Write).expect("finished");
    let (server, _) = serving(ours);
    assert_eq!(recv2(&mut theirs), b"last");
    assert_eq!(read_to_end(&mut theirs), b"");
    server.until("its end", |stats| stats.open == 0);
}

#[test]
fn a_socket_whose_peer_has_gone_ends_at_once() {
    let (ours, theirs) = UnixStream::pair().expect("a pair");
    drop(theirs);
    let (server, id) = serving(ours);
    server.until("its end", |stats| stats.outgoing == 1 && stats.open == 0);
    server.ask(move |app, _| assert_eq!((&*app.opened, app.closed.len()), (&[id][..], 1)));
}

/// Gives itself a message for each frame.
struct Noting;

impl Handler<Vec<String>> for Noting {
    fn on_frame(&mut self, cx: &mut Context<'_, Vec<String>>, _: &[u8]) -> Outcome {
        cx.conn.notify(())?;
        Ok(())
    }

    fn on_message(&mut self, cx: &mut Context<'_, Vec<String>>, _: Message) -> Outcome {
        cx.app.push("message".to_owned());
        Ok(())
    }

    fn on_close(&mut self, cx: &mut Context<'_, Vec<String>>, closed: &Closed) {
        cx.app.push(closed.to_string());
    }
}

/// A Unix peer that has closed looks like one that is gone, and has ended in order all the same.
#[test]
fn messages_come_before_the_end_of_a_peer_that_has_closed() {
    let (ours, mut theirs) = UnixStream::pair().expect("a pair");
    theirs.write_all(&packet2(b"last")).expect("sent");
    drop(theirs);
    let mut server = Server::new(Config::new()).expect("a server");
    let adopted = server.control().adopt(ours, packets(), Noting);
    assert!(adopted.is_ok());
    let mut seen = Vec::new();
    turns_until(&mut server, &mut seen, |_, seen| seen.len() == 2);
    assert_eq!(seen, ["message", "peer finished"]);
    assert_eq!(server.control().stats().undeliverable, 0);
}

#[track_caller]
fn refused(control: &mut Control<'_, App>, socket: impl Into<OwnedFd>, words: &str) {
    let error = control.adopt(socket, packets(), Echo);
    let error = error.expect_err("no connected stream");
    assert!(matches!(error, Error::Os { .. }), "{error:?}");
    assert!(error.to_string().contains(words), "{error}");
}

#[test]
fn what_is_no_connected_stream_is_refused() {
    let mut server = own(Config::new());
    let mut control = server.control();
    refused(
        &mut control,
        File::open("/dev/null").expect("there"),
        "adopting a connected socket",
    );
    let udp = UdpSocket::bind("127.0.0.1:0").expect("a port");
    udp.connect(udp.local_addr().expect("an address"))
        .expect("connected");
    refused(&mut control, udp, "not a stream socket");
    let (datagram, _other) = UnixDatagram::pair().expect("a pair");
    refused(&mut control, datagram, "not a stream socket");
    refused(
        &mut control,
        TcpListener::bind("127.0.0.1:0").expect("a port"),
        "not connected",
    );
    let unconnected = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None);
    refused(
        &mut control,
        unconnected.expect("a socket"),
        "not connected",
    );
    // One of another family, on a system that has one.
    #[cfg(target_os = "linux")]
    if let Ok(other) = socket2::Socket::new(libc::AF_VSOCK.into(), socket2::Type::STREAM, None) {
        refused(&mut control, other, "neither TCP nor Unix");
    }
    // A connection that was reset meanwhile.
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let client = connect(listener.local_addr().expect("an address"));
    let (accepted, _) = listener.accept().expect("a client");
    kit::net::reset(client);
    let mut byte = [0; 1];
    while accepted.peek(&mut byte).is_ok() {}
    refused(&mut control, accepted, "adopting a connected socket");
    let stats = server.control().stats();
    assert_eq!(
        (stats.outgoing, stats.open),
        (0, 0),
        "nothing is left of them"
    );
}

#[test]
fn limits_and_options_hold() {
    let mut server = own(Config::max_connections(1));
    let pair = || UnixStream::pair().expect("a pair");
    let (ours, mut theirs) = pair();
    let zero = packets().with(|options| options.conn.max_frame = Some(0));
    let error = server
        .control()
        .adopt(ours, zero, Echo)
        .expect_err("an option");
    assert!(matches!(error, Error::Option { .. }), "{error:?}");
    assert_eq!(read_to_end(&mut theirs), b"", "it is closed");

    let (ours, first) = pair();
    server.control().adopt(ours, packets(), Echo).expect("room");
    let (ours, mut theirs) = pair();
    let error = server
        .control()
        .adopt(ours, packets(), Echo)
        .expect_err("full");
    assert!(
        matches!(error, Error::AtCapacity { max_connections: 1 }),
        "{error:?}"
    );
    assert_eq!(read_to_end(&mut theirs), b"", "it is closed");

    drop(first);
    server.control().drain(PATIENCE);
    let (ours, _theirs) = pair();
    let error = server
        .control()
        .adopt(ours, packets(), Echo)
        .expect_err("draining");
    assert!(matches!(error, Error::Draining), "{error:?}");
    let mut app = App::default();
    turns_until(&mut server, &mut app, |server, _| {
        server.control().drain_report().is_some()
    });
    assert_eq!(
        server.control().drain_report().map(|report| report.ended),
        Some(1)
    );
}

/// The loop's own calls do not block though the other owner of the socket wants its calls to.
#[test]
fn the_other_owner_may_make_it_blocking() {
    let (ours, mut theirs) = UnixStream::pair().expect("a pair");
    let other = ours.try_clone().expect("a copy");
    let (_server, _) = serving(ours);
    other.set_nonblocking(false).expect("blocking");
    for size in [1, 16 * 1024, 60_000] {
        ping(&mut theirs, &vec![1; size]);
    }
}

fn detaching() -> (Running<App>, mpsc::Receiver<Detached>) {
    let (streams, received) = mpsc::channel();
    let server = spawn(move || {
        let mut server = own(Config::max_connections(1));
        server
            .listen(local(), |_: &mut App, _| Echo)
            .expect("listen");
        let app = App {
            streams: Some(streams),
            ..App::default()
        };
        (server, app)
    });
    (server, received)
}

fn attach(server: &Running<App>, stream: Detached) -> Result<ConnId, Error> {
    server.ask(move |_, control| control.attach(stream, packets(), Echo))
}

/// The slot that it had is its own again: the server is full.
#[test]
fn a_detached_connection_comes_back() {
    let (server, received) = detaching();
    let mut client = connect(server.addr());
    for round in 0..3 {
        client
            .write_all(&[packet2(b"out"), b"secret".to_vec(), packet2(b"behind")].concat())
            .expect("sent");
        assert_eq!(recv2(&mut client), b"leaving");
        let mut stream = received.recv_timeout(PATIENCE).expect("a stream");
        let old = stream.id();
        // Authentication that blocks: of what is unread it takes a part.
        let mut secret = [0; 6];
        stream.read_exact(&mut secret).expect("unread");
        assert_eq!(&secret, b"secret");
        stream.write_all(&packet2(b"welcome")).expect("written");
        let id = attach(&server, stream).expect("it has a slot");
        assert_ne!(id, old);
        assert_eq!(recv2(&mut client), b"welcome");
        assert_eq!(recv2(&mut client), b"behind", "round {round}");
        ping(&mut client, b"again");
    }
    send2(&mut client, b"bye");
    assert_eq!(read_to_end(&mut client), b"");
    drop(client);
    let stats = server.until("its end", |stats| stats.open == 0);
    assert_eq!(stats.closed(CloseReason::Detached), 3);
    assert_eq!(stats.closed(CloseReason::Closed), 1);
    assert_eq!((stats.accepted, stats.outgoing), (1, 3));
}

/// Told to leave from outside, with no iteration after that.
#[test]
fn a_connection_that_has_not_left_when_its_server_goes_is_closed() {
    let (streams, received) = mpsc::channel();
    let (ours, mut theirs) = UnixStream::pair().expect("a pair");
    let (mut server, mut app) = (own(Config::new()), App::default());
    let id = server.control().adopt(ours, packets(), Echo);
    let id = id.expect("adopted");
    turns_until(&mut server, &mut app, |_, app| app.opened == [id]);
    let mut control = server.control();
    let mut conn = control.conn(id).expect("it is open");
    let detached = conn.detach(move |stream| drop(streams.send(stream)));
    detached.expect("it leaves");
    drop(server);
    let error = received.try_recv().err();
    assert_eq!(error, Some(mpsc::TryRecvError::Disconnected));
    assert_eq!(read_to_end(&mut theirs), b"");
}

#[test]
fn a_detached_connection_moves_to_another_server() {
    let (server, received) = detaching();
    let other = spawn(|| (own(Config::new()), App::default()));
    let mut client = connect(server.addr());
    send2(&mut client, b"out");
    assert_eq!(recv2(&mut client), b"leaving");
    let stream = received.recv_timeout(PATIENCE).expect("a stream");
    attach(&other, stream).expect("room");
    ping(&mut client, b"from the other one");
    server.until("the slot is free", |stats| stats.open == 0);
    // One that it accepts in the place.
    let mut next = connect(server.addr());
    ping(&mut next, b"next");
}

#[test]
fn one_that_was_killed_does_not_come_back() {
    let (server, received) = detaching();
    let mut client = connect(server.addr());
    send2(&mut client, b"out");
    assert_eq!(recv2(&mut client), b"leaving");
    let stream = received.recv_timeout(PATIENCE).expect("a stream");
    let id = stream.id();
    assert!(server.ask(move |_, control| control.kill(id)));
    let error = attach(&server, stream).expect_err("it was killed");
    assert!(matches!(error, Error::ConnState(_)), "{error:?}");
    assert_eq!(read_to_end(&mut client), b"");
    server.until("the slot is free", |stats| stats.open == 0);
}

/// As the connection was there before, the cap does not refuse it: not even one that was lowered.
#[test]
fn a_detached_connection_comes_back_under_a_lower_cap() {
    let (server, received) = detaching();
    let change = |cap| move |config: &mut Config| config.max_connections = cap;
    server.ask(move |_, control| control.reconfigure(change(2)).expect("raised"));
    let mut clients = [connect(server.addr()), connect(server.addr())];
    for client in &mut clients {
        ping(client, b"in");
    }
    send2(&mut clients[0], b"out");
    assert_eq!(recv2(&mut clients[0]), b"leaving");
    let stream = received.recv_timeout(PATIENCE).expect("a stream");
    server.ask(move |_, control| control.reconfigure(change(1)).expect("lowered"));
    attach(&server, stream).expect("it was there");
    for client in &mut clients {
        ping(client, b"both are served");
    }
    // One that is new has to wait until both have ended.
    let mut waits = connect(server.addr());
    send2(&mut waits, b"in");
    server.ask(|_, control| assert_eq!(control.stats().open, 2));
    drop(clients);
    assert_eq!(recv2(&mut waits), b"in");
}

/// Its last callback begins a connection in its own slot, and takes a detached one back.
struct Parting(Option<(TcpStream, Detached)>);

impl Handler<App> for Parting {
    fn on_frame(&mut self, cx: &mut Context<'_, App>, _: &[u8]) -> Outcome {
        cx.conn.abort();
        Ok(())
    }

    fn on_close(&mut self, cx: &mut Context<'_, App>, _: &Closed) {
        if let Some((socket, stream)) = self.0.take() {
            let mut control = cx.conn.control();
            control.adopt(socket, packets(), Echo).expect("a free slot");
            control
                .attach(stream, packets(), Echo)
                .expect("its own slot");
            assert_eq!(control.stats().open, 2);
        }
    }
}

#[test]
fn a_detached_connection_comes_back_while_another_one_ends() {
    let (server, received) = detaching();
    server.ask(move |_, control| {
        let change = |config: &mut Config| config.max_connections = 2;
        control.reconfigure(change).expect("raised");
    });
    let mut client = connect(server.addr());
    send2(&mut client, b"out");
    assert_eq!(recv2(&mut client), b"leaving");
    let stream = received.recv_timeout(PATIENCE).expect("a stream");
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let mut other = connect(listener.local_addr().expect("an address"));
    let (accepted, _) = listener.accept().expect("a client");
    let (ours, mut theirs) = UnixStream::pair().expect("a pair");
    server
        .ask(move |_, control| control.adopt(ours, packets(), Parting(Some((accepted, stream)))))
        .expect("a free slot");
    send2(&mut theirs, b"bye");
    ping(&mut client, b"back");
    ping(&mut other, b"new");
    let stats = server.handle.stats();
    assert_eq!((stats.open, stats.panics), (2, 0));
}

/// A stream that is attached from many threads' jobs while the server is drained harms nothing.
#[test]
fn an_attach_during_a_drain_is_refused() {
    let (server, received) = detaching();
    let mut client = connect(server.addr());
    send2(&mut client, b"out");
    assert_eq!(recv2(&mut client), b"leaving");
    let stream = received.recv_timeout(PATIENCE).expect("a stream");
    let error = server.ask(move |_, control| {
        control.drain(PATIENCE);
        control.attach(stream, packets(), Echo)
    });
    assert!(matches!(error, Err(Error::Draining)), "{error:?}");
    assert_eq!(read_to_end(&mut client), b"");
    drop(client);
    let waits = thread::spawn(move || server.finish());
    let (stats, _) = waits.join().expect("it ended");
    assert_eq!(stats.closed(CloseReason::Detached), 1);
}

/// A callback adopts too: a login that opens a second channel.
struct Adopts(Option<TcpStream>);

impl Handler<App> for Adopts {
    fn on_frame(&mut self, cx: &mut Context<'_, App>, _: &[u8]) -> Outcome {
        if let Some(socket) = self.0.take() {
            cx.conn.control().adopt(socket, packets(), Echo)?;
        }
        Ok(())
    }
}

#[test]
fn a_callback_adopts_a_socket() {
    let (ours, mut theirs) = UnixStream::pair().expect("a pair");
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let mut client = connect(listener.local_addr().expect("an address"));
    let (accepted, _) = listener.accept().expect("a client");
    let server = spawn(|| (own(Config::new()), App::default()));
    let adopts = move |_: &mut App, control: &mut Control<'_, App>| {
        control.adopt(ours, packets(), Adopts(Some(accepted)))
    };
    server.ask(adopts).expect("room");
    send2(&mut theirs, b"go");
    ping(&mut client, b"adopted");
}
