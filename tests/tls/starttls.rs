//! A handler upgrades its open connection to TLS, over real sockets: what it is told, what its peer gets, and how it ends.
#![cfg(feature = "tls")]

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use kit::net::{connect, local, read_to_end, spawn, ReadSome, Running, PATIENCE};
use kit::tls::{
    alert, handshake_over, notify, read_to_goodbye, session, wire_of, Site, TlsClient, NAME,
    VERSIONS,
};
use portcullis::tls::TlsConfig;
use portcullis::{
    CloseReason, Closed, Config, Context, Error, Framing, Handler, Listen, Message, Outcome,
    Server, State,
};

/// What the handlers share: what they upgrade to, and everything they were told.
struct App {
    tls: TlsConfig,
    told: Vec<String>,
}

/// Echoes lines; upgrades at "starttls".
struct Upgrades;

impl Handler<App> for Upgrades {
    fn on_open(&mut self, cx: &mut Context<'_, App>) -> Outcome {
        cx.app.told.push("open".to_owned());
        Ok(())
    }

    fn on_secured(&mut self, cx: &mut Context<'_, App>) -> Outcome {
        let name = cx
            .conn
            .tls()
            .and_then(portcullis::tls::TlsInfo::server_name)
            .unwrap_or("nobody");
        cx.app.told.push(format!("secured for {name}"));
        assert_eq!(cx.conn.state(), State::Open);
        Ok(())
    }

    fn on_frame(&mut self, cx: &mut Context<'_, App>, line: &[u8]) -> Outcome {
        cx.app
            .told
            .push(String::from_utf8_lossy(line).trim_end().to_owned());
        match line {
            b"starttls\n" => {
                cx.conn.send("ready\n")?;
                cx.conn.start_tls(cx.app.tls.clone())?;
                assert!(cx.conn.tls().is_none(), "nothing is agreed on yet");
                assert_eq!(cx.conn.state(), State::Handshaking);
                assert!(matches!(
                    cx.conn.start_tls(cx.app.tls.clone()),
                    Err(Error::ConnState(_))
                ));
            }
            b"starttls and say\n" => {
                cx.conn.send("ready\n")?;
                cx.conn.start_tls(cx.app.tls.clone())?;
                cx.conn.send("secret\n")?;
            }
            b"starttls and replace\n" => {
                cx.conn.send("ready\n")?;
                cx.conn.start_tls(cx.app.tls.clone())?;
                cx.conn.set_framing(&Framing::Packet2);
                cx.conn.replace_handler(kit::net::Echo);
            }
            line => cx.conn.send(line)?,
        }
        Ok(())
    }

    fn on_message(&mut self, cx: &mut Context<'_, App>, message: Message) -> Outcome {
        if let Ok(line) = message.downcast::<&str>() {
            cx.app.told.push(format!("message {line}"));
            cx.conn.send(*line)?;
        }
        Ok(())
    }

    fn on_close(&mut self, cx: &mut Context<'_, App>, closed: &Closed) {
        cx.app.told.push(format!("closed: {}", closed.reason));
    }
}

#[track_caller]
fn serve_with(tls: impl Into<TlsConfig>, listen: Listen) -> Running<App> {
    let tls = tls.into();
    spawn(move || {
        let mut server = Server::new(Config::new()).expect("server");
        server
            .listen(
                listen.with(|listen| listen.framing = Framing::Line),
                |_: &mut App, _| Upgrades,
            )
            .expect("listen");
        (
            server,
            App {
                tls,
                told: Vec::new(),
            },
        )
    })
}

#[track_caller]
fn serve(site: &Site) -> Running<App> {
    serve_with(site.server(), local())
}

#[track_caller]
fn told(server: &Running<App>) -> Vec<String> {
    server.ask(|app, _| app.told.clone())
}

#[track_caller]
fn ask(stream: &mut (impl Read + Write), line: &str, answer: &str) {
    stream.write_all(line.as_bytes()).expect("sent");
    hear(stream, answer);
}

#[track_caller]
fn hear(stream: &mut impl Read, answer: &str) {
    let mut heard = vec![0; answer.len()];
    stream.read_exact(&mut heard).expect("an answer");
    assert_eq!(String::from_utf8_lossy(&heard), answer);
}

/// A client that has asked for TLS and was told to go on.
#[track_caller]
fn ready(server: &Running<App>) -> TcpStream {
    let mut tcp = connect(server.addr());
    ask(&mut tcp, "hello\n", "hello\n");
    ask(&mut tcp, "starttls\n", "ready\n");
    tcp
}

/// How the one connection ended, as its handler was told.
#[track_caller]
fn the_end(server: &Running<App>) -> (CloseReason, Vec<String>) {
    let stats = server.until("it ends", |stats| stats.closed_total() == 1);
    assert_eq!(stats.opened, 1, "opened once");
    let reason = kit::reasons(|reason| stats.closed(reason))[0].0;
    let told = told(server);
    assert_eq!(
        told.last(),
        Some(&format!("closed: {reason}")),
        "on_close, once and last"
    );
    (reason, told)
}

#[test]
fn the_handler_is_told_in_order() {
    let site = Site::new();
    for version in VERSIONS {
        let server = serve(&site);
        let mut tls: TlsClient =
            handshake_over(ready(&server), session(&site.client(version))).expect("TLS");
        ask(&mut tls, "secret\n", "secret\n");
        notify(&mut tls);
        assert_eq!(read_to_goodbye(&mut tls), b"");
        drop(tls);
        let (_, told) = the_end(&server);
        let secured = format!("secured for {NAME}");
        assert_eq!(
            told,
            [
                "open",
                "hello",
                "starttls",
                &secured,
                "secret",
                "closed: peer finished"
            ]
        );
    }
}

/// In one segment with the command, or cut anywhere: the hello is not lost.
#[test]
fn a_client_need_not_wait() {
    let site = Site::new();
    for cut in [0, 3, 9, 10, 14, 100] {
        let server = serve(&site);
        let mut tcp = connect(server.addr());
        let mut hello = session(&site.client(VERSIONS[1]));
        let wire = [&b"starttls\n"[..], &wire_of(&mut hello)].concat();
        tcp.write_all(&wire[..cut]).expect("sent");
        if cut > 0 {
            server.until("it is read", |stats| stats.traffic.bytes_in == cut as u64);
        }
        tcp.write_all(&wire[cut..]).expect("sent");
        hear(&mut tcp, "ready\n");
        let mut tls = handshake_over(tcp, hello).expect("TLS");
        ask(&mut tls, "hello\n", "hello\n");
    }
}

/// CVE-2011-0411, and what else is no handshake.
#[test]
fn what_is_no_handshake_closes_and_is_no_line() {
    let site = Site::new();
    for (behind, reason) in [
        (&b"injected\n"[..], CloseReason::NotTls),
        (
            b"\x16\x03\x01\x00\x05\x01\x00\x00\x01\x00",
            CloseReason::TlsHandshake,
        ),
    ] {
        for together in [true, false] {
            let server = serve(&site);
            let mut tcp = connect(server.addr());
            if together {
                tcp.write_all(&[b"starttls\n", behind].concat())
                    .expect("sent");
                hear(&mut tcp, "ready\n");
            } else {
                ask(&mut tcp, "starttls\n", "ready\n");
                tcp.write_all(behind).expect("sent");
            }
            let description = alert(&mut tcp);
            assert!(description > 0, "an alert: {description}");
            drop(tcp);
            let (ended, told) = the_end(&server);
            assert_eq!(ended, reason);
            assert_eq!(told[..2], ["open", "starttls"]);
            assert_eq!(told.len(), 3, "{told:?}");
        }
    }
}

#[test]
fn a_client_that_leaves_or_says_nothing() {
    let site = Site::new();
    let server = serve(&site);
    let mut tcp = ready(&server);
    tcp.shutdown(Shutdown::Write).expect("FIN");
    assert_eq!(read_to_end(&mut tcp), b"");
    assert_eq!(the_end(&server).0, CloseReason::TlsHandshake);

    let server = serve_with(
        site.server(),
        local().with(|listen| listen.conn.handshake_timeout = Duration::from_millis(50)),
    );
    let mut tcp = ready(&server);
    assert_eq!(read_to_end(&mut tcp), b"");
    assert_eq!(the_end(&server).0, CloseReason::HandshakeTimeout);
}

/// Sent by the callback that upgrades, and by other threads during the handshake: behind TLS, in order.
#[test]
fn what_is_sent_in_the_handshake_is_behind_it() {
    let site = Site::new();
    for version in VERSIONS {
        let server = serve(&site);
        let mut tcp = connect(server.addr());
        ask(&mut tcp, "starttls and say\n", "ready\n");
        let id = server.ask(|_, control| control.connections()[0].id);
        server.handle.send(id, "from a thread\n").expect("sent");
        server.handle.notify(id, "noted\n").expect("sent");
        let queued = server.ask(|_, control| control.connections()[0].queued);
        assert_eq!(queued, "secret\nfrom a thread\nnoted\n".len());
        tcp.set_nonblocking(true).expect("a socket");
        let early = tcp.read_some(&mut [0]);
        assert!(early.is_err(), "nothing in the clear: {early:?}");
        tcp.set_nonblocking(false).expect("a socket");
        let mut tls = handshake_over(tcp, session(&site.client(version))).expect("TLS");
        hear(&mut tls, "secret\nfrom a thread\nnoted\n");
        assert_eq!(
            told(&server)[2],
            "message noted\n",
            "a message does not wait"
        );
    }
}

#[test]
fn handler_and_framing_may_change_with_it() {
    let site = Site::new();
    let server = serve(&site);
    let mut tcp = connect(server.addr());
    ask(&mut tcp, "starttls and replace\n", "ready\n");
    let mut tls = handshake_over(tcp, session(&site.client(VERSIONS[1]))).expect("TLS");
    kit::net::ping(&mut tls, b"packet-2");
}

/// Between two turns, from outside: the peer that speaks first is then the server.
#[test]
fn another_connection_may_upgrade_it() {
    let site = Site::new();
    let server = serve(&site);
    let mut tcp = connect(server.addr());
    ask(&mut tcp, "hello\n", "hello\n");
    server.ask(|app, control| {
        let id = control.connections()[0].id;
        let mut conn = control.conn(id).expect("there");
        conn.send("now\n").expect("taken");
        conn.start_tls(app.tls.clone()).expect("open");
    });
    hear(&mut tcp, "now\n");
    let mut tls = handshake_over(tcp, session(&site.client(VERSIONS[1]))).expect("TLS");
    ask(&mut tls, "hello\n", "hello\n");
}

/// One that goes on is waited for, and what its client has said is answered; one that does not is cut short.
#[test]
fn a_drain_in_the_handshake() {
    let site = Site::new();
    for goes_on in [true, false] {
        let server = serve(&site);
        let tcp = ready(&server);
        server.handle.drain(PATIENCE).expect("it runs");
        server.ask(|_, control| assert!(control.drain_report().is_none()));
        if goes_on {
            let mut tls = handshake_over(tcp, session(&site.client(VERSIONS[1]))).expect("TLS");
            assert_eq!(read_to_goodbye(&mut tls), b"");
            drop(tls);
            let (stats, _) = server.finish();
            assert_eq!(stats.closed(CloseReason::Drained), 1);
        } else {
            let (stats, _) = server.finish();
            assert_eq!(stats.closed(CloseReason::HandshakeTimeout), 1);
        }
    }
}

/// A configuration by name holds here as on a listener, and a panic in it ends this connection alone, with `on_close`.
#[test]
fn a_choice_may_refuse_or_panic() {
    let site = Site::new();
    for (panics, reason) in [
        (false, CloseReason::TlsHandshake),
        (true, CloseReason::Panicked),
    ] {
        let server = serve_with(
            TlsConfig::choose(move |_| {
                assert!(!panics, "as planned");
                None
            }),
            local(),
        );
        let tcp = ready(&server);
        handshake_over(tcp, session(&site.client(VERSIONS[1]))).expect_err("refused");
        assert_eq!(the_end(&server).0, reason);
        let mut other = connect(server.addr());
        ask(&mut other, "unharmed\n", "unharmed\n");
    }
}

/// Many at once on a budget of one handshake an iteration: open connections are served in between,
/// and all handshakes complete.
#[test]
fn upgrades_keep_to_the_handshake_budget() {
    let site = Site::new();
    let tls = Arc::new(site.server());
    let server = spawn(move || {
        let mut server = Server::new(Config::new().with(|config| config.budgets.handshakes = 1))
            .expect("server");
        server
            .listen(
                local().with(|listen| listen.framing = Framing::Line),
                |_: &mut App, _| Upgrades,
            )
            .expect("listen");
        (
            server,
            App {
                tls: tls.into(),
                told: Vec::new(),
            },
        )
    });
    let mut waiting: Vec<_> = (0..20)
        .map(|_| {
            let mut tcp = connect(server.addr());
            let mut hello = session(&site.client(VERSIONS[1]));
            let wire = [&b"starttls\n"[..], &wire_of(&mut hello)].concat();
            tcp.write_all(&wire).expect("sent");
            (tcp, hello)
        })
        .collect();
    let mut plain = connect(server.addr());
    ask(&mut plain, "plain\n", "plain\n");
    for (mut tcp, hello) in waiting.drain(..) {
        hear(&mut tcp, "ready\n");
        let mut tls = handshake_over(tcp, hello).expect("TLS");
        ask(&mut tls, "secret\n", "secret\n");
    }
}
