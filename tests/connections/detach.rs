//! A connection leaves the loop as a blocking stream: nothing is lost on the way, and its place is kept until it is dropped.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc::{channel, Receiver, Sender};
use std::thread;
use std::time::Duration;

use kit::net::{
    connect, current_stats, local, packet2, ping, read_to_end, recv2, send2, spawn, ReadSome,
    Running, PATIENCE,
};
use portcullis::{
    CloseReason, Closed, Config, Context, Detached, Error, Handler, Listen, Outcome, Server, State,
};

/// The receiver of the streams, and the handlers' calls.
struct App {
    streams: Sender<Detached>,
    closed: Vec<CloseReason>,
    refused: Vec<Error>,
}

/// Echoes until a line says "out".
struct Leaves;

impl Handler<App> for Leaves {
    fn on_frame(&mut self, cx: &mut Context<'_, App>, frame: &[u8]) -> Outcome {
        if frame != b"out" {
            cx.conn.send(frame)?;
            return Ok(());
        }
        cx.conn.send("last words")?;
        let streams = cx.app.streams.clone();
        cx.conn
            .detach(move |stream| streams.send(stream).expect("the test waits"))?;
        assert!(cx.conn.send("too late").is_err());
        if let Err(again) = cx.conn.detach(|_| unreachable!("it is detached already")) {
            cx.app.refused.push(again);
        }
        Ok(())
    }

    fn on_close(&mut self, cx: &mut Context<'_, App>, closed: &Closed) {
        cx.app.closed.push(closed.reason);
    }
}

fn server(config: Config, listen: Listen) -> (Running<App>, Receiver<Detached>) {
    server_of(config, listen, || Leaves)
}

fn server_of<H>(
    config: Config,
    listen: Listen,
    make: impl Fn() -> H + Send + 'static,
) -> (Running<App>, Receiver<Detached>)
where
    H: Handler<App> + 'static,
{
    let (streams, received) = channel();
    let server = spawn(move || {
        let mut server = Server::new(config).expect("server");
        server
            .listen(listen, move |_: &mut App, _| make())
            .expect("listen");
        let app = App {
            streams,
            closed: Vec::new(),
            refused: Vec::new(),
        };
        (server, app)
    });
    (server, received)
}

fn leave(
    server: &Running<App>,
    received: &Receiver<Detached>,
    behind: &[u8],
) -> (TcpStream, Detached) {
    let mut client = connect(server.addr());
    client
        .write_all(&[&packet2(b"out"), behind].concat())
        .expect("sent");
    assert_eq!(recv2(&mut client), b"last words");
    let stream = received.recv_timeout(PATIENCE).expect("a stream");
    stream.set_read_timeout(Some(PATIENCE)).expect("timeout");
    (client, stream)
}

#[test]
fn nothing_is_lost_on_the_way() {
    let (server, received) = server(Config::new(), local());
    // What stands behind the frame that made it leave is bytes, whatever they look like.
    let (mut client, mut stream) = leave(&server, &received, b"\0\x03one and more");
    let mut bytes = vec![0; 14];
    stream.read_exact(&mut bytes).expect("what was unread");
    assert_eq!(bytes, b"\0\x03one and more");
    client.write_all(b"blocking").expect("sent");
    let mut bytes = [0; 8];
    stream.read_exact(&mut bytes).expect("what came later");
    assert_eq!(&bytes, b"blocking");
    let large = vec![b'x'; 3_000_000];
    let expected = large.clone();
    let writer = thread::spawn(move || {
        stream.write_all(&large)?;
        stream.finish()
    });
    let mut answer = Vec::new();
    client.read_to_end(&mut answer).expect("an orderly end");
    assert!(answer == expected);
    drop(client);
    writer.join().expect("the writer").expect("all is written");
    let stats = server.until("the place is free", |stats| stats.open == 0);
    assert_eq!(stats.closed(CloseReason::Detached), 1);
    server.ask(|app, _| {
        assert_eq!(app.closed, [CloseReason::Detached], "told when it left");
        assert!(matches!(app.refused[..], [Error::ConnState(_)]));
    });
}

/// The cap counts those outside too.
#[test]
fn its_place_is_kept_until_it_is_dropped() {
    let (server, received) = server(Config::max_connections(1), local());
    let (_client, stream) = leave(&server, &received, b"");
    let mut waiting = connect(server.addr());
    send2(&mut waiting, b"hello");
    server.ask(|_, control| {
        let inside = control.connections();
        assert_eq!((inside.len(), inside[0].state), (1, State::Closing));
    });
    assert_eq!(current_stats(&server.handle).accepted, 1);
    drop(stream);
    assert_eq!(recv2(&mut waiting), b"hello");
}

#[test]
fn a_plain_stream_may_be_taken_whole() {
    let (server, received) = server(Config::new(), local());
    let (mut client, stream) = leave(&server, &received, b"unread");
    let (mut tcp, unread, place) = stream.into_tcp().expect("it is plain TCP");
    assert_eq!(unread, b"unread");
    client.write_all(b"more").expect("sent");
    let mut bytes = [0; 4];
    tcp.read_exact(&mut bytes).expect("more");
    drop(tcp);
    assert_eq!(read_to_end(&mut client), b"");
    assert_eq!(
        current_stats(&server.handle).open,
        1,
        "its place is not given back yet"
    );
    drop(place);
    server.until("now it is", |stats| stats.open == 0);
}

/// A kill, and a drain at its deadline, end what a thread waits for.
#[test]
fn a_detached_connection_can_be_reached() {
    let (server, received) = server(Config::new(), local());
    let (_first, mut killed) = leave(&server, &received, b"");
    let id = killed.id();
    assert!(server.ask(move |_, control| control.kill(id)));
    assert_eq!(killed.read_some(&mut [0; 8]).expect("an end"), 0);
    drop(killed);
    server.until("its place is free", |stats| stats.open == 0);
    let (_second, mut late) = leave(&server, &received, b"");
    server
        .handle
        .drain(Duration::from_millis(50))
        .expect("it runs");
    assert_eq!(late.read_some(&mut [0; 8]).expect("an end"), 0);
    let (stats, _) = server.finish();
    assert_eq!((stats.open, stats.closed(CloseReason::DrainForced)), (0, 1));
    assert_eq!(stats.accepted, stats.closed_total());
    // Its slot is free already, and giving it back again is harmless.
    drop(late);
}

/// The loop has no part in it any more: what changes a connection has no effect.
#[test]
fn a_detached_connection_cannot_be_changed() {
    /// Its sender is gone once the handler is dropped.
    struct Successor(#[expect(dead_code)] Sender<()>);
    impl Handler<App> for Successor {
        fn on_frame(&mut self, _: &mut Context<'_, App>, _: &[u8]) -> Outcome {
            Ok(())
        }
    }
    let (server, received) = server(Config::max_connections(1), local());
    let (mut client, mut stream) = leave(&server, &received, b"");
    let (id, (kept, dropped)) = (stream.id(), channel());
    server.ask(move |_, control| {
        let mut conn = control.conn(id).expect("it has its slot");
        conn.replace_handler(Successor(kept));
        conn.set_timer(0, Duration::ZERO);
        conn.pause();
        conn.resume();
        assert!(conn.send("too late").is_err());
        conn.close();
        conn.abort();
    });
    let gone = dropped.recv_timeout(PATIENCE).expect_err("nothing is sent");
    assert_eq!(gone, std::sync::mpsc::RecvTimeoutError::Disconnected);
    assert_eq!(current_stats(&server.handle).open, 1);
    client.write_all(b"still").expect("sent");
    let mut bytes = [0; 5];
    stream.read_exact(&mut bytes).expect("it lives");
    assert_eq!(&bytes, b"still");
    drop(stream);
    let stats = server.until("its place is free", |stats| stats.open == 0);
    assert_eq!(stats.closed(CloseReason::Detached), 1);
}

/// A drain waits for those outside, and is over when the last is dropped.
#[test]
fn a_drain_waits_for_them() {
    let (server, received) = server(Config::new(), local());
    let (_client, stream) = leave(&server, &received, b"");
    server.handle.drain(PATIENCE).expect("it runs");
    let addr = server.addr();
    kit::net::eventually("the port is closed", || TcpStream::connect(addr).is_err());
    server.ask(|_, control| {
        assert!(control.drain_report().is_none(), "it is not over");
        assert_eq!(control.connections().len(), 1);
    });
    drop(stream);
    let (stats, _) = server.finish();
    assert_eq!((stats.open, stats.closed(CloseReason::Detached)), (0, 1));
}

/// One whose callback fails after it has asked to leave ends instead.
#[test]
fn an_error_in_the_same_callback_goes_first() {
    struct Fails;
    impl Handler<App> for Fails {
        fn on_frame(&mut self, cx: &mut Context<'_, App>, _: &[u8]) -> Outcome {
            let streams = cx.app.streams.clone();
            cx.conn.detach(move |stream| drop(streams.send(stream)))?;
            Err(portcullis::Close::because("changed my mind"))
        }
    }
    let (server, received) = server_of(Config::new(), local(), || Fails);
    let mut client = connect(server.addr());
    send2(&mut client, b"go");
    assert_eq!(read_to_end(&mut client), b"");
    drop(client);
    let stats = server.until("it has ended", |stats| stats.closed_total() == 1);
    assert_eq!(stats.closed(CloseReason::Failed), 1);
    assert!(received.try_recv().is_err());
}

/// From its call on the stream is not the loop's any more.
#[test]
fn what_the_handler_does_behind_it_changes_nothing() {
    struct Goes;
    impl Handler<App> for Goes {
        fn on_frame(&mut self, cx: &mut Context<'_, App>, _: &[u8]) -> Outcome {
            let streams = cx.app.streams.clone();
            cx.conn.detach(move |stream| drop(streams.send(stream)))?;
            cx.conn.finish();
            cx.conn.close_after_input();
            cx.conn.pause();
            cx.conn.set_timer(0, Duration::ZERO);
            #[cfg(feature = "tls")]
            {
                let config = std::sync::Arc::new(kit::tls::Site::new().server());
                let refused = cx.conn.start_tls(config).expect_err("it has left");
                cx.app.refused.push(refused);
            }
            Ok(())
        }
    }
    let (server, received) = server_of(Config::new(), local(), || Goes);
    let mut client = connect(server.addr());
    send2(&mut client, b"go");
    let mut stream = received.recv_timeout(PATIENCE).expect("a stream");
    stream.write_all(b"written").expect("no FIN was sent");
    drop(stream);
    assert_eq!(read_to_end(&mut client), b"written");
    server.ask(|app, _| {
        let is_refused = |error: &Error| matches!(error, Error::ConnState(_));
        assert!(app.refused.iter().all(is_refused));
    });
}

/// As std's own stream.
#[test]
fn a_stream_whose_linger_is_zero_is_reset() {
    let (server, received) = server(Config::new(), local());
    let (mut client, mut stream) = leave(&server, &received, b"");
    stream.write_all(b"half of it").expect("sent");
    let mut half = [0; 10];
    client.read_exact(&mut half).expect("sent");
    let socket = socket2::SockRef::from(stream.as_tcp().expect("TCP"));
    socket.set_linger(Some(Duration::ZERO)).expect("linger");
    drop(stream);
    let error = client.read_some(&mut half).expect_err("no end of a stream");
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
}

/// The server may be gone before the stream is.
#[test]
fn a_stream_outlives_its_server() {
    let (server, received) = server(Config::new(), local());
    let (mut client, mut stream) = leave(&server, &received, b"");
    server.handle.stop().expect("it runs");
    drop(server);
    client.write_all(b"hello").expect("sent");
    let mut bytes = [0; 5];
    stream.read_exact(&mut bytes).expect("it reads on");
    stream.write_all(&bytes).expect("and writes");
    client.read_exact(&mut bytes).expect("the echo");
    assert_eq!(&bytes, b"hello");
    drop(stream);
    client.shutdown(Shutdown::Write).expect("FIN");
    assert_eq!(read_to_end(&mut client), b"");
}

/// Others are served while a thread blocks.
#[test]
fn nobody_waits_for_it() {
    let (server, received) = server(Config::new(), local());
    let (_client, stream) = leave(&server, &received, b"");
    for _ in 0..50 {
        ping(&mut connect(server.addr()), b"hello");
    }
    drop(stream);
}

/// After TLS: a blocking stream that owns the session.
#[cfg(feature = "tls")]
#[test]
fn a_session_goes_along() {
    use kit::tls::{secure, Site, VERSIONS};

    let site = Site::new();
    let config = std::sync::Arc::new(site.server());
    let (server, received) = server(Config::new(), local().tls(config));
    for version in VERSIONS {
        let mut client = secure(server.addr(), &site.client(version));
        client
            .write_all(&[&packet2(b"out")[..], b"unread"].concat())
            .expect("sent");
        assert_eq!(recv2(&mut client), b"last words");
        let mut stream = received.recv_timeout(PATIENCE).expect("a stream");
        stream.set_read_timeout(Some(PATIENCE)).expect("timeout");
        assert_eq!(
            stream.tls().and_then(|tls| tls.protocol_version()),
            Some(version.version)
        );
        let echo = thread::spawn(move || -> std::io::Result<usize> {
            let mut unread = [0; 6];
            stream.read_exact(&mut unread)?;
            assert_eq!(&unread, b"unread");
            let mut all = vec![0; 200_000];
            stream.read_exact(&mut all)?;
            stream.write_all(&all)?;
            // close_notify from the peer is an end.
            let mut rest = Vec::new();
            let count = stream.read_to_end(&mut rest)?;
            stream.finish()?;
            Ok(count)
        });
        let large: Vec<u8> = (0..=255).cycle().take(200_000).collect();
        client.write_all(&large).expect("sent");
        let mut answer = vec![0; large.len()];
        client.read_exact(&mut answer).expect("the echo");
        assert!(answer == large);
        kit::tls::notify(&mut client);
        client.sock.shutdown(Shutdown::Write).expect("FIN");
        assert_eq!(kit::tls::read_to_goodbye(&mut client), b"");
        assert_eq!(echo.join().expect("the thread").expect("no error"), 0);
    }
    // FIN without close_notify is no end.
    let mut client = secure(server.addr(), &site.client(VERSIONS[1]));
    send2(&mut client, b"out");
    assert_eq!(recv2(&mut client), b"last words");
    let mut stream = received.recv_timeout(PATIENCE).expect("a stream");
    client.sock.shutdown(Shutdown::Write).expect("FIN");
    let error = stream
        .read_some(&mut [0; 8])
        .expect_err("it may have been cut");
    assert_eq!(error.kind(), std::io::ErrorKind::UnexpectedEof);
    assert!(stream.into_tcp().is_err(), "there is a session");
}

/// A client over TLS 1.3, and its connection that has left the loop.
#[cfg(feature = "tls")]
fn sent_out_over_tls() -> (Running<App>, kit::tls::TlsClient, Detached) {
    sent_out_with(|_| ())
}

/// As [`sent_out_over_tls`], of a client whose configuration is changed by `with`.
#[cfg(feature = "tls")]
fn sent_out_with(
    with: impl FnOnce(&mut portcullis::tls::rustls::ClientConfig),
) -> (Running<App>, kit::tls::TlsClient, Detached) {
    use kit::tls::{secure, Site, VERSIONS};

    let site = Site::new();
    let mut config = site.client(VERSIONS[1]);
    with(&mut config);
    let (server, received) = server(
        Config::new(),
        local().tls(std::sync::Arc::new(site.server())),
    );
    let mut client = secure(server.addr(), &config);
    send2(&mut client, b"out");
    assert_eq!(recv2(&mut client), b"last words");
    let stream = received.recv_timeout(PATIENCE).expect("a stream");
    stream.set_read_timeout(Some(PATIENCE)).expect("timeout");
    (server, client, stream)
}

/// What a write has taken goes out once, whatever stops it half-way.
#[cfg(feature = "tls")]
#[test]
fn a_write_that_times_out_says_nothing_twice() {
    let (_server, mut client, mut stream) = sent_out_over_tls();
    stream
        .set_write_timeout(Some(Duration::from_millis(20)))
        .expect("timeout");
    let (mut taken, mut number) = (Vec::new(), 0_u32);
    // The client does not read: at some write there is no room for the rest of a record.
    loop {
        let chunk: Vec<u8> = number
            .to_be_bytes()
            .into_iter()
            .cycle()
            .take(1000)
            .collect();
        match stream.write(&chunk) {
            Ok(count) => taken.extend_from_slice(&chunk[..count]),
            Err(error) => {
                assert!(matches!(
                    error.kind(),
                    std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut
                ));
                break;
            }
        }
        number += 1;
    }
    let reader = thread::spawn(move || {
        let mut all = Vec::new();
        client.read_to_end(&mut all).expect("close_notify");
        all
    });
    stream.set_write_timeout(Some(PATIENCE)).expect("timeout");
    stream.write_all(b"the end").expect("there is room again");
    taken.extend_from_slice(b"the end");
    stream.finish().expect("in order");
    assert!(reader.join().expect("the reader") == taken);
}

/// One whose socket was taken whole cannot be reached; that is said, and its place is still kept.
#[test]
fn a_kill_of_what_was_taken_whole_finds_no_connection() {
    let (server, received) = server(Config::new(), local());
    let (mut client, stream) = leave(&server, &received, b"");
    let id = stream.id();
    let (mut tcp, _, place) = stream.into_tcp().expect("it is plain TCP");
    assert!(!server.ask(move |_, control| control.kill(id)));
    client.write_all(b"alive").expect("sent");
    let mut bytes = [0; 5];
    tcp.read_exact(&mut bytes).expect("it is");
    assert_eq!(current_stats(&server.handle).open, 1);
    drop((tcp, place));
    server.until("its place is free", |stats| stats.open == 0);
}

/// A detached connection is among the last closes, with its traffic in the loop.
#[test]
fn it_is_remembered_like_any_other() {
    let (server, received) = server(Config::new(), local());
    let (_client, stream) = leave(&server, &received, b"");
    let id = stream.id();
    drop(stream);
    server.until("its place is free", |stats| stats.open == 0);
    server.ask(move |_, control| {
        let last = control.recent_closes().remove(0);
        assert_eq!(
            (last.id, last.reason, last.traffic.frames_in),
            (Some(id), CloseReason::Detached, 1)
        );
        assert_eq!(control.metrics().histograms.connection_age.count(), 1);
    });
}

/// Sends more than the kernel takes, and leaves.
struct Generous(usize);

#[cfg(feature = "tls")]
const GENEROSITY: usize = 200;

impl Handler<App> for Generous {
    fn on_frame(&mut self, cx: &mut Context<'_, App>, _: &[u8]) -> Outcome {
        for _ in 0..self.0 {
            cx.conn.send(vec![b'g'; 60_000])?;
        }
        let streams = cx.app.streams.clone();
        cx.conn
            .detach(move |stream| streams.send(stream).expect("the test waits"))?;
        Ok(())
    }
}

/// What the handler sent, and could not be written yet, goes out in front of the goodbye.
#[cfg(feature = "tls")]
#[test]
fn a_goodbye_comes_behind_all_that_was_sent() {
    use kit::tls::{secure, Site, VERSIONS};

    let site = Site::new();
    let listen = local()
        .tls(std::sync::Arc::new(site.server()))
        .with(|listen| listen.conn.output_limit = GENEROSITY * 60_002);
    let (server, received) = server_of(Config::new(), listen, || Generous(GENEROSITY));
    let mut client = secure(server.addr(), &site.client(VERSIONS[1]));
    send2(&mut client, b"more, please");
    let stream = received.recv_timeout(PATIENCE).expect("a stream");
    let end = thread::spawn(move || stream.finish());
    assert_eq!(
        kit::tls::read_to_goodbye(&mut client).len(),
        GENEROSITY * 60_002
    );
    drop(client);
    // Whether the peer says goodbye in turn is not what this is about.
    let _ = end.join().expect("the thread");
}

/// What came whole before a fault is read before the fault is told, and that is told once more than never.
#[cfg(feature = "tls")]
#[test]
fn a_fault_comes_behind_what_was_whole() {
    let (_server, mut client, mut stream) = sent_out_over_tls();
    stream.set_read_timeout(Some(PATIENCE)).expect("timeout");
    client.conn.writer().write_all(b"whole").expect("buffered");
    let mut wire = Vec::new();
    while client.conn.wants_write() {
        client.conn.write_tls(&mut wire).expect("into memory");
    }
    wire.extend_from_slice(&BROKEN_RECORD);
    client.sock.write_all(&wire).expect("sent");
    let mut bytes = [0; 8];
    assert_eq!(stream.read_some(&mut bytes).expect("what was whole"), 5);
    assert_eq!(&bytes[..5], b"whole");
    let error = stream.read_some(&mut bytes).expect_err("the fault");
    assert_eq!(error.kind(), std::io::ErrorKind::InvalidData);
}

/// A detached connection gets nothing through the handle, and the caller gets an error.
#[test]
fn the_handle_knows_that_it_has_left() {
    let (server, received) = server(Config::new(), local());
    let (_client, stream) = leave(&server, &received, b"");
    assert!(server.handle.send(stream.id(), "too late").is_err());
    drop(stream);
}

/// Finishes, and would leave.
struct Finishes;

impl Handler<App> for Finishes {
    fn on_frame(&mut self, cx: &mut Context<'_, App>, _: &[u8]) -> Outcome {
        cx.conn.finish();
        let refused = cx
            .conn
            .detach(|_| unreachable!("it has said that it sends nothing"));
        cx.app.refused.extend(refused.err());
        Ok(())
    }
}

/// A FIN that is due is the loop's to send.
#[test]
fn a_peer_that_has_finished_stays() {
    let (server, _received) = server_of(Config::new(), local(), || Finishes);
    let mut client = connect(server.addr());
    send2(&mut client, b"go");
    assert_eq!(read_to_end(&mut client), b"");
    drop(client);
    server.until("it has gone", |stats| stats.open == 0);
    server.ask(|app, _| assert!(matches!(app.refused[..], [Error::ConnState(_)])));
}

/// Sends bytes of `wire` one by one, far apart, until the connection fails or all are sent.
fn trickle(mut socket: TcpStream, wire: Vec<u8>) {
    thread::spawn(move || {
        for byte in wire {
            if socket.write_all(&[byte]).is_err() {
                return;
            }
            thread::park_timeout(Duration::from_millis(10));
        }
    });
}

/// Runs what must come back by itself.
#[track_caller]
fn in_time<T: Send + 'static>(run: impl FnOnce() -> T + Send + 'static) -> T {
    let (sender, result) = channel();
    thread::spawn(move || sender.send(run()));
    result.recv_timeout(PATIENCE).expect("it comes back")
}

/// A peer that sends on after our end is heard for a time, whatever the pauses between its bytes.
#[test]
fn a_trickle_does_not_keep_finish() {
    let options = local().with(|listen| {
        listen.conn.linger_timeout = Duration::from_millis(50);
        listen.conn.linger_bytes = usize::MAX;
    });
    for timeout in [None, Some(Duration::from_millis(50))] {
        let (server, received) = server(Config::new(), options.clone());
        let (client, stream) = leave(&server, &received, b"");
        stream.set_read_timeout(timeout).expect("timeout");
        trickle(client.try_clone().expect("clone"), vec![b'x'; 1_000_000]);
        let error = in_time(|| stream.finish()).expect_err("the peer does not end");
        assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock);
    }
}

/// A flood is bounded by its bytes.
#[test]
fn a_flood_does_not_keep_finish() {
    let options = local().with(|listen| {
        listen.conn.linger_timeout = Duration::MAX;
        listen.conn.linger_bytes = 1_000_000;
    });
    let (server, received) = server(Config::new(), options);
    let (mut client, stream) = leave(&server, &received, b"");
    thread::spawn(move || while client.write_all(&[0; 10_000]).is_ok() {});
    let error = in_time(|| stream.finish()).expect_err("the peer does not end");
    assert_eq!(error.kind(), std::io::ErrorKind::InvalidData);
}

/// A narrow client over TCP that has read the last words, and its stream.
fn narrow(received: &Receiver<Detached>, server: &Running<App>) -> (TcpStream, Detached) {
    let mut client = kit::script::connect_narrow(server.addr());
    send2(&mut client, b"out");
    assert_eq!(recv2(&mut client), b"last words");
    let stream = received.recv_timeout(PATIENCE).expect("a stream");
    (client, stream)
}

fn with_large_send_buffer() -> Listen {
    local().with(|listen| listen.socket.send_buffer = Some(1024 * 1024))
}

/// As [`narrow`], over a Unix socket.
fn over_unix(received: &Receiver<Detached>, path: &Path) -> (UnixStream, Detached) {
    let mut client = UnixStream::connect(path).expect("connect");
    client.set_read_timeout(Some(PATIENCE)).expect("timeout");
    send2(&mut client, b"out");
    assert_eq!(recv2(&mut client), b"last words");
    let stream = received.recv_timeout(PATIENCE).expect("a stream");
    (client, stream)
}

/// The time to wait for the peer's end begins once the peer's system has everything.
#[test]
fn finish_waits_for_what_the_kernel_still_holds() {
    const LENGTH: usize = 100_000;
    let (server, received) = server(Config::new(), with_large_send_buffer());
    let (mut client, mut stream) = narrow(&received, &server);
    stream
        .set_read_timeout(Some(Duration::from_millis(50)))
        .expect("timeout");
    stream.write_all(&[7; LENGTH]).expect("the kernel has room");
    let (sender, finished) = channel();
    thread::spawn(move || sender.send(stream.finish()));
    // Longer than the time to wait, if nothing were owed.
    assert!(finished.recv_timeout(Duration::from_millis(200)).is_err());
    let mut part = [0; LENGTH / 25];
    for _ in 0..25 {
        client.write_all(b"ping").expect("it is not closed");
        client.read_exact(&mut part).expect("the answer");
    }
    assert_eq!(read_to_end(&mut client), b"");
    drop(client);
    let _ = finished.recv_timeout(PATIENCE).expect("it comes back");
}

/// Runs `finish` on a thread of its own.
fn finishing(stream: Detached) -> Receiver<std::io::Result<()>> {
    let (sender, finished) = channel();
    thread::spawn(move || sender.send(stream.finish()));
    finished
}

/// Fails if `finish` returns within a time that is enough for it.
#[track_caller]
fn still_waits(finished: &Receiver<std::io::Result<()>>) {
    let early = finished.recv_timeout(Duration::from_millis(100));
    assert!(early.is_err(), "{early:?}");
}

/// The wait for the peer's end is the read timeout or the linger timeout after slow output too.
#[test]
fn finish_waits_for_the_peers_end_after_slow_output() {
    const LENGTH: usize = 100_000;
    let listen = with_large_send_buffer().with(|listen| listen.conn.linger_timeout = PATIENCE);
    let (server, received) = server(Config::new(), listen);
    for timeout in [None, Some(PATIENCE)] {
        let (mut client, mut stream) = narrow(&received, &server);
        stream.set_read_timeout(timeout).expect("timeout");
        stream.write_all(&[7; LENGTH]).expect("the kernel has room");
        let finished = finishing(stream);
        // More than both kernels hold: `finish` waits for the delivery, and discards this.
        client.write_all(&vec![0; 12_000_000]).expect("discarded");
        assert_eq!(read_to_end(&mut client).len(), LENGTH);
        still_waits(&finished);
        drop(client);
        let finished = finished.recv_timeout(PATIENCE).expect("it comes back");
        finished.expect("the peer has ended in time");
    }
}

/// As over TCP, over a Unix socket.
#[test]
fn finish_over_a_unix_socket_waits_for_the_peers_end() {
    const LENGTH: usize = 60_000;
    let folder = kit::net::Place::new();
    let path = folder.path("finish.sock");
    let listen = Listen::unix(&path, portcullis::Framing::Packet2)
        .with(|listen| listen.conn.linger_timeout = PATIENCE);
    let (_server, received) = server(Config::new(), listen);
    for timeout in [None, Some(PATIENCE)] {
        let (mut client, mut stream) = over_unix(&received, path.as_ref());
        stream.set_read_timeout(timeout).expect("timeout");
        stream.write_all(&[7; LENGTH]).expect("the kernel has room");
        let finished = finishing(stream);
        client.write_all(&vec![0; 1_000_000]).expect("discarded");
        assert_eq!(read_to_end(&mut client).len(), LENGTH);
        still_waits(&finished);
        drop(client);
        let finished = finished.recv_timeout(PATIENCE).expect("it comes back");
        finished.expect("the peer has ended in time");
    }
}

/// A narrow client that has ended its output and reads nothing of what is sent.
fn half_closed(received: &Receiver<Detached>, server: &Running<App>) -> (TcpStream, Detached) {
    let (client, mut stream) = narrow(received, server);
    client.shutdown(Shutdown::Write).expect("FIN");
    assert_eq!(stream.read_some(&mut [0]).expect("an end"), 0);
    stream
        .write_all(&[7; 100_000])
        .expect("the kernel has room");
    (client, stream)
}

/// The peer's end does not mean that the peer takes the output.
#[test]
fn finish_waits_until_a_half_closed_peer_has_all_output() {
    let (server, received) = server(Config::new(), with_large_send_buffer());
    let (mut client, stream) = half_closed(&received, &server);
    stream.set_write_timeout(Some(PATIENCE)).expect("timeout");
    let finished = finishing(stream);
    still_waits(&finished);
    assert_eq!(read_to_end(&mut client).len(), 100_000);
    let finished = finished.recv_timeout(PATIENCE).expect("it comes back");
    finished.expect("the peer has everything");

    let (_client, stream) = half_closed(&received, &server);
    let short = Some(Duration::from_millis(50));
    stream.set_write_timeout(short).expect("timeout");
    let error = in_time(|| stream.finish()).expect_err("the peer takes nothing");
    assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock);
}

/// As over TCP, over a Unix socket.
#[test]
fn finish_waits_until_a_half_closed_unix_peer_has_all_output() {
    const LENGTH: usize = 60_000;
    let folder = kit::net::Place::new();
    let path = folder.path("half.sock");
    let listen = Listen::unix(&path, portcullis::Framing::Packet2);
    let (_server, received) = server(Config::new(), listen);
    let half_closed = || {
        let (client, mut stream) = over_unix(&received, path.as_ref());
        client.shutdown(Shutdown::Write).expect("an end");
        stream.write_all(&[7; LENGTH]).expect("the kernel has room");
        (client, stream)
    };
    let (mut client, stream) = half_closed();
    let finished = finishing(stream);
    still_waits(&finished);
    assert_eq!(read_to_end(&mut client).len(), LENGTH);
    let finished = finished.recv_timeout(PATIENCE).expect("it comes back");
    finished.expect("the peer has everything");

    let (_client, stream) = half_closed();
    let short = Some(Duration::from_millis(50));
    stream.set_write_timeout(short).expect("timeout");
    let error = in_time(|| stream.finish()).expect_err("the peer takes nothing");
    assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock);

    let (client, stream) = half_closed();
    let finished = finishing(stream);
    still_waits(&finished);
    // What was not read is lost: the kernel resets.
    drop(client);
    let finished = finished.recv_timeout(PATIENCE).expect("it comes back");
    let error = finished.expect_err("the output is lost");
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
}

/// A reset is an error behind the peer's end too, where a read shows none.
#[test]
fn a_reset_behind_the_peers_end_is_an_error_of_finish() {
    use std::io::ErrorKind::{ConnectionReset, NotConnected};

    let (server, received) = server(Config::new(), with_large_send_buffer());
    let (client, stream) = half_closed(&received, &server);
    let finished = finishing(stream);
    still_waits(&finished);
    kit::net::reset(client);
    let finished = finished.recv_timeout(PATIENCE).expect("it comes back");
    let kind = finished.expect_err("the output is lost").kind();
    // The second if `finish` has begun behind the reset.
    assert!(matches!(kind, ConnectionReset | NotConnected), "{kind}");
}

/// A kill ends the wait for a delivery, whether or not the peer is read.
#[test]
fn a_kill_ends_a_finish_that_does_not_read() {
    let listen = with_large_send_buffer().with(|listen| {
        listen.conn.write_timeout = Duration::MAX;
        listen.conn.linger_bytes = 0;
    });
    let (server, received) = server(Config::new(), listen);
    let (mut flooding, mut stream) = narrow(&received, &server);
    stream
        .write_all(&[7; 100_000])
        .expect("the kernel has room");
    flooding.write_all(b"too much").expect("sent");
    for (_client, stream) in [(flooding, stream), half_closed(&received, &server)] {
        let id = stream.id();
        let finished = finishing(stream);
        still_waits(&finished);
        assert!(server.ask(move |_, control| control.kill(id)));
        let finished = finished.recv_timeout(PATIENCE).expect("it comes back");
        let error = finished.expect_err("the peer has not got the output");
        assert_eq!(error.kind(), std::io::ErrorKind::BrokenPipe);
    }
}

/// The read timeout is the time of one read, not of each byte of a record; and nothing is lost.
#[cfg(feature = "tls")]
#[test]
fn a_trickled_record_does_not_keep_a_read() {
    let (_server, mut client, mut stream) = sent_out_over_tls();
    let wire = kit::tls::encrypt(&mut client.conn, &[b'x'; 300]);
    let timeout = Some(Duration::from_millis(100));
    stream.set_read_timeout(timeout).expect("timeout");
    trickle(client.sock.try_clone().expect("clone"), wire);
    let (stream, error) = in_time(move || {
        let error = stream
            .read_some(&mut [0; 300])
            .expect_err("it is not complete");
        (stream, error)
    });
    assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock);
    let mut stream = stream;
    let socket = stream.as_tcp().expect("TCP");
    assert_eq!(socket.read_timeout().expect("an option"), timeout);
    stream.set_read_timeout(None).expect("timeout");
    let all = in_time(move || {
        let mut all = [0; 300];
        stream.read_exact(&mut all).map(|()| all)
    });
    assert_eq!(all.expect("the whole record"), [b'x'; 300]);
}

/// Sends more than the kernel takes, and leaves.
fn with_pending_output(frames: usize) -> Listen {
    local().with(|listen| {
        listen.socket.send_buffer = Some(16 * 1024);
        listen.conn.output_limit = frames * 60_002;
    })
}

/// Output that the peer does not take does not extend a read, and stays pending.
#[test]
fn pending_output_does_not_keep_a_read() {
    const FRAMES: usize = 30;
    let listen = with_pending_output(FRAMES);
    let (server, received) = server_of(Config::new(), listen, || Generous(FRAMES));
    let mut client = kit::script::connect_narrow(server.addr());
    send2(&mut client, b"more, please");
    let mut stream = received.recv_timeout(PATIENCE).expect("a stream");
    let timeout = Some(Duration::from_millis(100));
    for write_timeout in [None, Some(PATIENCE)] {
        stream.set_read_timeout(timeout).expect("timeout");
        stream.set_write_timeout(write_timeout).expect("timeout");
        let (returned, error) = in_time(move || {
            let error = stream.read_some(&mut [0]).expect_err("there is no input");
            (stream, error)
        });
        assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock);
        stream = returned;
        let socket = stream.as_tcp().expect("TCP");
        assert_eq!(socket.read_timeout().expect("an option"), timeout);
        assert_eq!(socket.write_timeout().expect("an option"), write_timeout);
    }
    let finished = finishing(stream);
    assert_eq!(read_to_end(&mut client).len(), FRAMES * 60_002);
    drop(client);
    let _ = finished.recv_timeout(PATIENCE).expect("it comes back");
}

/// A record that was not encrypted.
#[cfg(feature = "tls")]
const BROKEN_RECORD: [u8; 25] = {
    let mut record = [0; 25];
    [record[0], record[1], record[2], record[4]] = [23, 3, 3, 20];
    record
};

/// The wait for input takes nothing of the time of an alert behind earlier output.
#[cfg(feature = "tls")]
#[test]
fn an_alert_is_sent_long_after_earlier_output() {
    use kit::tls::{secure, Site, VERSIONS};
    use portcullis::tls::rustls::Error::AlertReceived;

    const FRAMES: usize = 5;
    let site = Site::new();
    let listen = with_pending_output(FRAMES).tls(std::sync::Arc::new(site.server()));
    let (server, received) = server_of(Config::new(), listen, || Generous(FRAMES));
    let mut client = secure(server.addr(), &site.client(VERSIONS[1]));
    send2(&mut client, b"more, please");
    let mut stream = received.recv_timeout(PATIENCE).expect("a stream");
    let timeout = Duration::from_secs(1);
    stream.set_write_timeout(Some(timeout)).expect("timeout");
    let (sender, failed) = channel();
    thread::spawn(move || {
        let outcome = stream.read_some(&mut [0]);
        sender.send((stream, outcome))
    });
    client
        .read_exact(&mut vec![0; FRAMES * 60_002])
        .expect("the earlier output");
    let early = failed.recv_timeout(timeout);
    assert!(early.is_err(), "the read waits for input");
    client.sock.write_all(&BROKEN_RECORD).expect("sent");
    let (_stream, outcome) = failed.recv_timeout(PATIENCE).expect("it comes back");
    let error = outcome.expect_err("a failure");
    assert_eq!(error.kind(), std::io::ErrorKind::InvalidData);
    let error = client.read_some(&mut [0]).expect_err("an alert");
    let inner = error.get_ref().and_then(|error| error.downcast_ref());
    assert!(matches!(inner, Some(AlertReceived(_))), "{error}");
}

/// No call waits for more from a peer whose session has failed, and each names the cause.
#[cfg(feature = "tls")]
#[test]
fn a_session_that_has_failed_stays_failed() {
    let (_server, mut client, mut stream) = sent_out_over_tls();
    stream.set_read_timeout(None).expect("timeout");
    client.sock.write_all(&BROKEN_RECORD).expect("sent");
    let errors = in_time(move || {
        let mut errors = vec![stream.read_some(&mut [0]).expect_err("the failure")];
        for _ in 0..2 {
            errors.push(stream.read_some(&mut [0]).expect_err("it has failed"));
            errors.push(stream.write(b"too late").expect_err("it has failed"));
        }
        errors
    });
    let cause = errors[0].to_string();
    for error in errors {
        assert_eq!(error.kind(), std::io::ErrorKind::InvalidData);
        assert!(error.to_string().contains(&cause), "{error}");
    }
}

/// It is there before a read, which takes it.
#[test]
fn unread_input_can_be_seen_before_it_is_read() {
    let (server, received) = server(Config::new(), local());
    let (_client, mut stream) = leave(&server, &received, b"unread");
    assert_eq!(stream.unread(), b"unread");
    stream.read_exact(&mut [0; 2]).expect("a part");
    assert_eq!(stream.unread(), b"read");
    stream.read_exact(&mut [0; 4]).expect("the rest");
    assert_eq!(stream.unread(), b"");
}

/// It comes back whole, and is read and written as before.
#[test]
fn a_unix_stream_is_no_tcp_stream() {
    let folder = kit::net::Place::new();
    let path = folder.path("unix.sock");
    let listen = Listen::unix(&path, portcullis::Framing::Packet2);
    let (_server, received) = server(Config::new(), listen);
    let (mut client, stream) = over_unix(&received, path.as_ref());
    assert!(stream.as_tcp().is_none());
    let mut stream = stream.into_tcp().expect_err("it is not TCP");
    stream.write_all(b"still").expect("sent");
    let mut bytes = [0; 5];
    client.read_exact(&mut bytes).expect("it lives");
    assert_eq!(&bytes, b"still");
}

/// As std's own stream.
#[cfg(feature = "tls")]
#[test]
fn a_read_without_room_does_not_wait_for_a_record() {
    let (_server, mut client, mut stream) = sent_out_over_tls();
    assert_eq!(stream.read_some(&mut []).expect("no wait"), 0);
    client.write_all(b"hello").expect("sent");
    let mut bytes = [0; 5];
    stream.read_exact(&mut bytes).expect("what came later");
    assert_eq!(&bytes, b"hello");
}

/// The peer has all output, and resets instead of its end.
#[test]
fn a_reset_instead_of_the_peers_end_is_an_error_of_finish() {
    let listen = local().with(|listen| listen.conn.linger_timeout = PATIENCE);
    let (server, received) = server(Config::new(), listen);
    let (mut client, stream) = leave(&server, &received, b"");
    let finished = finishing(stream);
    assert_eq!(read_to_end(&mut client), b"");
    still_waits(&finished);
    kit::net::reset(client);
    let finished = finished.recv_timeout(PATIENCE).expect("it comes back");
    let error = finished.expect_err("no end of a stream");
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
}

/// Records without data: `count` of full length, all padding, and warnings between that rustls
/// ignores.
#[cfg(feature = "tls")]
fn records_without_data(
    session: portcullis::tls::rustls::ClientConnection,
    count: usize,
) -> Vec<u8> {
    use portcullis::tls::rustls::crypto::cipher::{OutboundChunks, OutboundPlainMessage};
    use portcullis::tls::rustls::{
        ConnectionTrafficSecrets as Secrets, ContentType, ProtocolVersion, SupportedCipherSuite,
    };

    const USER_CANCELED: [u8; 2] = [1, 90];
    let Some(SupportedCipherSuite::Tls13(suite)) = session.negotiated_cipher_suite() else {
        panic!("not TLS 1.3");
    };
    let (next, secrets) = session.dangerous_extract_secrets().expect("allowed").tx;
    let (Secrets::Aes128Gcm { key, iv }
    | Secrets::Aes256Gcm { key, iv }
    | Secrets::Chacha20Poly1305 { key, iv }) = secrets
    else {
        panic!("another cipher");
    };
    let mut encrypter = suite.aead_alg.encrypter(key, iv);
    // The content type, behind no content. The encrypter adds one more zero.
    let mut padded = vec![0; 16 * 1024];
    padded[0] = 23;
    let mut wire = Vec::new();
    for number in 0..next + count as u64 {
        // rustls takes 32 such records in a row.
        let (typ, payload) = match number % 30 {
            0 => (ContentType::Alert, &USER_CANCELED[..]),
            _ => (ContentType::Unknown(0), &padded[..]),
        };
        let record = OutboundPlainMessage {
            typ,
            version: ProtocolVersion::TLSv1_2,
            payload: OutboundChunks::Single(payload),
        };
        let record = encrypter.encrypt(record, number).expect("encrypted");
        // A provider may take numbers in order only.
        if number >= next {
            wire.extend(record.encode());
        }
    }
    wire
}

/// A peer cannot keep a thread in one read by records that make no progress.
#[cfg(feature = "tls")]
#[test]
fn a_flood_of_records_without_data_does_not_keep_a_read() {
    let (_server, client, mut stream) =
        sent_out_with(|config| config.enable_secret_extraction = true);
    let wire = records_without_data(client.conn, 100);
    let mut socket = client.sock;
    // The stream reads no more after its failure.
    thread::spawn(move || drop(socket.write_all(&wire)));
    let error = in_time(move || stream.read_some(&mut [0])).expect_err("no data");
    assert_eq!(error.kind(), std::io::ErrorKind::InvalidData);
    assert!(error.to_string().contains("without data"), "{error}");
}
