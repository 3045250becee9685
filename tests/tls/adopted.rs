//! Connected sockets from outside, behind TLS: as the server or the client of a handshake, or with the session that a
//! detached connection has.
#![cfg(feature = "tls")]

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener};
use std::sync::{mpsc, Arc};

use kit::net::{connect, local, packet2, recv2, send2, spawn, ReadSome, Running, PATIENCE};
use kit::tls::{handshake_over, notify, read_to_goodbye, secure, session, Site, NAME};
use portcullis::tls::rustls::version::{TLS12, TLS13};
use portcullis::tls::rustls::ServerConfig;
use portcullis::{
    CloseReason, Closed, Config, Connect, Context, Detached, Error, Framing, Handler, Outcome,
    Server,
};

#[derive(Default)]
struct App {
    tls: Option<Arc<ServerConfig>>,
    streams: Option<mpsc::Sender<Detached>>,
    closed: Vec<CloseReason>,
}

/// Echoes; speaks TLS from its opening on if the application has a configuration. "out" detaches.
struct Echo {
    secures: bool,
}

impl Handler<App> for Echo {
    fn on_open(&mut self, cx: &mut Context<'_, App>) -> Outcome {
        if let Some(config) = cx.app.tls.clone().filter(|_| self.secures) {
            cx.conn.start_tls(config)?;
        }
        Ok(())
    }

    fn on_frame(&mut self, cx: &mut Context<'_, App>, frame: &[u8]) -> Outcome {
        if frame == b"out" {
            cx.conn.send("leaving")?;
            let streams = cx.app.streams.clone().expect("a receiver");
            cx.conn.detach(move |stream| drop(streams.send(stream)))?;
        } else {
            cx.conn.send(frame)?;
        }
        Ok(())
    }

    fn on_close(&mut self, cx: &mut Context<'_, App>, closed: &Closed) {
        cx.app.closed.push(closed.reason);
    }
}

fn packets() -> Connect {
    Connect::new(Framing::Packet2)
}

#[test]
fn an_adopted_socket_is_the_server_of_a_handshake() {
    let site = Site::new();
    for version in [&TLS12, &TLS13] {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let client = connect(listener.local_addr().expect("an address"));
        let (accepted, _) = listener.accept().expect("a client");
        let tls = Some(Arc::new(site.server()));
        let server = spawn(move || {
            let mut server = Server::new(Config::new()).expect("a server");
            let echo = Echo { secures: true };
            let adopted = server.control().adopt(accepted, packets(), echo);
            adopted.expect("room");
            (
                server,
                App {
                    tls,
                    ..App::default()
                },
            )
        });
        let mut client = handshake_over(client, session(&site.client(version))).expect("secure");
        send2(&mut client, b"hello");
        assert_eq!(recv2(&mut client), b"hello");
        notify(&mut client);
        assert_eq!(read_to_goodbye(&mut client), b"");
        server.until("its end", |stats| stats.closed(CloseReason::Finished) == 1);
    }
}

#[test]
fn an_adopted_socket_is_the_client_of_a_handshake() {
    let site = Site::new();
    let (config, tls) = (site.client(&TLS13), site.server());
    let behind = spawn(move || {
        let mut server = Server::new(Config::new()).expect("a server");
        let listen = local().tls(tls);
        let echo = |_: &mut App, _| Echo { secures: false };
        server.listen(listen, echo).expect("listen");
        (server, App::default())
    });
    /// Says hello, and passes the answer on.
    struct Asks(mpsc::Sender<Vec<u8>>);
    impl Handler<App> for Asks {
        fn on_open(&mut self, cx: &mut Context<'_, App>) -> Outcome {
            cx.conn.send("hello")?;
            Ok(())
        }
        fn on_frame(&mut self, cx: &mut Context<'_, App>, frame: &[u8]) -> Outcome {
            assert!(cx.conn.tls().is_some());
            self.0.send(frame.to_vec())?;
            Ok(())
        }
    }
    let (tell, told) = mpsc::channel();
    let socket = connect(behind.addr());
    let server = spawn(|| {
        (
            Server::new(Config::new()).expect("a server"),
            App::default(),
        )
    });
    let options = packets().tls(config, NAME);
    let adopted = server.ask(move |_, control| control.adopt(socket, options, Asks(tell)));
    adopted.expect("room");
    assert_eq!(told.recv_timeout(PATIENCE).as_deref(), Ok(&b"hello"[..]));
    // One whose other end speaks no TLS fails as an outgoing connection does.
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let mut other = connect(listener.local_addr().expect("an address"));
    other.write_all(b"220 no TLS here\r\n").expect("sent");
    let (accepted, _) = listener.accept().expect("a client");
    let options = packets().tls(site.client(&TLS13), NAME);
    let (tell, _told) = mpsc::channel();
    let adopted = server.ask(move |_, control| control.adopt(accepted, options, Asks(tell)));
    adopted.expect("room");
    server.until("it fails", |stats| stats.closed(CloseReason::NotTls) == 1);
}

fn detaching(site: &Site) -> (Running<App>, mpsc::Receiver<Detached>) {
    let (streams, received) = mpsc::channel();
    let tls = site.server();
    let server = spawn(move || {
        let mut server = Server::new(Config::max_connections(1)).expect("a server");
        let echo = |_: &mut App, _| Echo { secures: false };
        server.listen(local().tls(tls), echo).expect("listen");
        let streams = Some(streams);
        (
            server,
            App {
                streams,
                ..App::default()
            },
        )
    });
    (server, received)
}

/// With its session: the client notices nothing.
#[test]
fn a_detached_connection_comes_back_with_its_session() {
    let site = Site::new();
    for version in [&TLS12, &TLS13] {
        let (server, received) = detaching(&site);
        let mut client = secure(server.addr(), &site.client(version));
        for _ in 0..3 {
            let behind = packet2(b"behind");
            let sent = [packet2(b"out"), b"secret".to_vec(), behind].concat();
            client.write_all(&sent).expect("sent");
            assert_eq!(recv2(&mut client), b"leaving");
            let mut stream = received.recv_timeout(PATIENCE).expect("a stream");
            let mut secret = [0; 6];
            stream.read_exact(&mut secret).expect("unread");
            assert_eq!(&secret, b"secret");
            stream.write_all(&packet2(b"welcome")).expect("written");
            let attached = server
                .ask(move |_, control| control.attach(stream, packets(), Echo { secures: false }));
            attached.expect("it has a slot");
            for expected in [&b"welcome"[..], b"behind"] {
                assert_eq!(recv2(&mut client), expected);
            }
            let large = vec![9; 60_000];
            send2(&mut client, &large);
            assert!(recv2(&mut client) == large);
        }
        notify(&mut client);
        assert_eq!(read_to_goodbye(&mut client), b"");
        server.until("its end", |stats| stats.closed(CloseReason::Finished) == 1);
    }
}

#[test]
fn a_session_that_is_over_does_not_come_back() {
    let site = Site::new();
    for fails in [false, true] {
        let (server, received) = detaching(&site);
        let mut client = secure(server.addr(), &site.client(&TLS13));
        send2(&mut client, b"out");
        assert_eq!(recv2(&mut client), b"leaving");
        let mut stream = received.recv_timeout(PATIENCE).expect("a stream");
        if fails {
            client.sock.write_all(&[23, 3, 3, 0, 20]).expect("sent");
            client.sock.write_all(&[0; 20]).expect("sent");
            stream.read_some(&mut [0; 1]).expect_err("a broken record");
        } else {
            notify(&mut client);
            client.sock.shutdown(Shutdown::Write).expect("finished");
            assert_eq!(stream.read_some(&mut [0; 1]).expect("the end"), 0);
        }
        let attached = server
            .ask(move |_, control| control.attach(stream, packets(), Echo { secures: false }));
        assert!(matches!(attached, Err(Error::ConnState(_))), "{attached:?}");
        server.until("its end", |stats| stats.open == 0);
    }
}

#[test]
fn one_session_is_enough() {
    let site = Site::new();
    let (server, received) = detaching(&site);
    let mut client = secure(server.addr(), &site.client(&TLS13));
    send2(&mut client, b"out");
    assert_eq!(recv2(&mut client), b"leaving");
    let stream = received.recv_timeout(PATIENCE).expect("a stream");
    let options = packets().tls(site.client(&TLS13), NAME);
    let attached =
        server.ask(move |_, control| control.attach(stream, options, Echo { secures: false }));
    assert!(
        matches!(attached, Err(Error::Option { .. })),
        "{attached:?}"
    );
}
