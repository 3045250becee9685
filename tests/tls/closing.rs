//! A TLS connection ends as it should: close_notify before FIN, half-close, truncation and reset told apart.
#![cfg(feature = "tls")]

use std::io::Write;
use std::sync::{mpsc, Arc, Mutex};
use std::time::Duration;

use kit::net::{
    connect, current_stats, eventually, hold, local, packet2, ping, recv2, reset, send2, spawn,
    spawn_echo, ReadSome, Running, PATIENCE,
};
use kit::tls::{
    encrypt, exchange, exchange_after, fin, notify, read_to_goodbye, secure, session,
    spawn_recorder, the_end, wire_of, Recorder, Seen, Site, TlsClient, VERSIONS,
};
use portcullis::tls::rustls::{version, SupportedProtocolVersion};
use portcullis::{
    Close, CloseReason, Closed, Config, Context, Framing, Handler, Listen, Outcome, Server, State,
};

fn listen(site: &Site) -> Listen {
    local().tls(Arc::new(site.server()))
}

fn recorder(site: &Site) -> Running<Seen> {
    spawn_recorder(Config::new(), listen(site))
}

/// A server whose handlers are all `make()`.
#[track_caller]
fn serve<H: Handler + 'static>(listen: Listen, make: impl Fn() -> H + Send + 'static) -> Running {
    spawn(move || {
        let mut server = Server::new(Config::new()).expect("server");
        server
            .listen(listen, move |_: &mut (), _| make())
            .expect("listen");
        (server, ())
    })
}

/// Sends these bytes as they are, and waits until the server has read them.
#[track_caller]
fn send_wire<A: Send + 'static>(server: &Running<A>, client: &mut TlsClient, wire: &[u8]) {
    let before = current_stats(&server.handle).traffic.bytes_in;
    client.sock.write_all(wire).expect("sent");
    server.until("it has arrived", |stats| {
        stats.traffic.bytes_in >= before + wire.len() as u64
    });
}

/// A client whose handshake the server has read to its end.
#[track_caller]
fn settled<A: Send + 'static>(
    server: &Running<A>,
    site: &Site,
    version: &'static SupportedProtocolVersion,
) -> TlsClient {
    let opened = current_stats(&server.handle).opened;
    let client = secure(server.addr(), &site.client(version));
    server.until("it is open", |stats| stats.opened > opened);
    client
}

/// Answers, then ends as its first byte says.
struct AsTold;
impl Handler for AsTold {
    fn on_frame(&mut self, cx: &mut Context<'_>, frame: &[u8]) -> Outcome {
        cx.conn.send(frame)?;
        match frame.first() {
            Some(b'c') => cx.conn.close(),
            Some(b'r') => return Err(Close::new()),
            Some(b'e') => return Err(Close::because("no more")),
            Some(b'p') => panic!("as told"),
            Some(b'a') => cx.conn.abort(),
            _ => cx.conn.close_after_input(),
        }
        Ok(())
    }
}

#[test]
fn a_handlers_close_flushes_and_says_goodbye() {
    let site = Site::new();
    for version in VERSIONS {
        for (word, reason) in [
            ("close", CloseReason::Closed),
            ("return", CloseReason::Closed),
            ("error", CloseReason::Failed),
            ("panic", CloseReason::Panicked),
            ("input", CloseReason::Closed),
        ] {
            let server = serve(listen(&site), || AsTold);
            let mut client = secure(server.addr(), &site.client(version));
            send2(&mut client, word.as_bytes());
            assert_eq!(
                read_to_goodbye(&mut client),
                packet2(word.as_bytes()),
                "{word}"
            );
            drop(client);
            server.until("it ends", |stats| stats.closed(reason) == 1);
        }
    }
}

/// An abort is a reset by choice: no goodbye.
#[test]
fn an_abort_says_nothing() {
    let site = Site::new();
    for version in VERSIONS {
        let server = serve(listen(&site), || AsTold);
        let mut client = secure(server.addr(), &site.client(version));
        send2(&mut client, b"abort");
        let error = client.read_some(&mut [0; 1]).expect_err("a reset");
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
        server.until("it ends", |stats| stats.closed(CloseReason::Aborted) == 1);
    }
}

/// More than the kernel takes at once, sent and closed on open: all of it comes before the goodbye.
#[test]
fn what_was_sent_before_the_close_arrives_at_a_slow_reader() {
    const SIZE: usize = 3_000_000;
    struct Gift;
    impl Handler for Gift {
        fn on_open(&mut self, cx: &mut Context<'_>) -> Outcome {
            cx.conn.send(vec![7; SIZE])?;
            cx.conn.close();
            Ok(())
        }
        fn on_frame(&mut self, _cx: &mut Context<'_>, _frame: &[u8]) -> Outcome {
            Ok(())
        }
    }
    let site = Site::new();
    for version in VERSIONS {
        let server = serve(
            listen(&site).with(|listen| {
                listen.framing = Framing::Raw;
                listen.socket.send_buffer = Some(256 * 1024);
            }),
            || Gift,
        );
        let mut client = secure(server.addr(), &site.client(version));
        eventually("the rest waits for the reader", || {
            server.ask(|(), control| {
                let conns = control.connections();
                conns
                    .iter()
                    .any(|conn| conn.state == State::Closing && conn.queued > 0)
            })
        });
        let gift = read_to_goodbye(&mut client);
        assert!(gift.len() == SIZE && gift.iter().all(|&byte| byte == 7));
    }
}

#[test]
fn an_idle_peer_is_told_goodbye() {
    let site = Site::new();
    for version in VERSIONS {
        let server = spawn_recorder(
            Config::new(),
            listen(&site).with(|listen| listen.conn.idle_timeout = Duration::from_millis(100)),
        );
        let mut client = secure(server.addr(), &site.client(version));
        assert_eq!(read_to_goodbye(&mut client), b"");
        drop(client);
        assert_eq!(the_end(&server), (CloseReason::IdleTimeout, String::new()));
    }
}

/// The frame timeout runs over TLS too, whether whole records come or not.
#[test]
fn an_unfinished_frame_is_told_goodbye() {
    let site = Site::new();
    for version in VERSIONS {
        let server = spawn_recorder(
            Config::new(),
            listen(&site).with(|listen| listen.conn.frame_timeout = Duration::from_millis(100)),
        );
        let mut client = secure(server.addr(), &site.client(version));
        client.write_all(&[0, 9, b'h']).expect("begun");
        client.flush().expect("sent");
        assert_eq!(read_to_goodbye(&mut client), b"");
        drop(client);
        assert_eq!(the_end(&server).0, CloseReason::FrameTimeout);
    }
}

/// A peer that does not read is not waited for: reset, since it would not take a goodbye either.
#[test]
fn a_peer_that_never_reads_is_reset() {
    let site = Site::new();
    for version in VERSIONS {
        let listen = listen(&site).with(|listen| {
            listen.framing = Framing::Raw;
            listen.socket.send_buffer = Some(32 * 1024);
            listen.conn.write_timeout = Duration::from_millis(200);
        });
        let server = spawn_recorder(Config::new(), listen);
        let client = settled(&server, &site, version);
        std::thread::scope(|scope| {
            let mut sock = client.sock.try_clone().expect("a second descriptor");
            let mut conn = client.conn;
            // Ends with the reset.
            scope.spawn(move || while sock.write_all(&encrypt(&mut conn, &[1; 16_000])).is_ok() {});
            assert_eq!(the_end(&server).0, CloseReason::WriteTimeout);
        });
    }
}

/// Bytes in the kernel's buffer are answered before close_notify.
#[test]
fn a_drain_answers_what_arrived_and_says_goodbye() {
    let site = Site::new();
    for version in VERSIONS {
        let server = recorder(&site);
        let mut client = settled(&server, &site, version);
        let frames: Vec<u8> = (0..2000u32)
            .flat_map(|number| packet2(&number.to_be_bytes()))
            .collect();
        let wire = encrypt(&mut client.conn, &frames);
        // While a job holds the loop, everything arrives, and the drain is the next command.
        let held = hold(&server.handle);
        client.sock.write_all(&wire).expect("sent");
        server
            .handle
            .drain(Duration::from_secs(600))
            .expect("drain");
        drop(held);
        assert!(
            read_to_goodbye(&mut client) == frames,
            "every frame is answered"
        );
        drop(client);
        assert_eq!(
            server.finish().1.closed,
            [(CloseReason::Drained, String::new())]
        );
    }
}

/// After the peer's close_notify all frames are answered, as TLS 1.3 permits; over TLS 1.2 too.
#[test]
fn a_peers_goodbye_is_answered_after_all_echoes() {
    let site = Site::new();
    for version in VERSIONS {
        let server = recorder(&site);
        let frames = packet2(&[5; 30_000]).repeat(100);
        let client = secure(server.addr(), &site.client(version));
        assert!(
            exchange(client, &frames) == frames,
            "every frame is answered"
        );
        assert_eq!(the_end(&server), (CloseReason::Finished, String::new()));
    }
}

/// The goodbye has been read while the answers still wait above the watermark: they come, then ours.
#[test]
fn a_peers_goodbye_does_not_cost_it_the_answers_it_reads_late() {
    let site = Site::new();
    for version in VERSIONS {
        let server = spawn_recorder(
            Config::new(),
            listen(&site).with(|listen| {
                listen.socket.send_buffer = Some(16 * 1024);
                listen.conn.low_watermark = 1024;
                listen.conn.high_watermark = 2048;
            }),
        );
        let frames = packet2(&[5; 60_000]).repeat(30);
        let client = secure(server.addr(), &site.client(version));
        let answer = exchange_after(client, &frames, || {
            eventually("answers wait", || {
                server.ask(|_, control| control.connections()[0].queued > 2048)
            });
        });
        assert!(
            answer == frames,
            "{} of {} bytes",
            answer.len(),
            frames.len()
        );
        assert_eq!(the_end(&server), (CloseReason::Finished, String::new()));
    }
}

/// Whether a handler that does not close may go on after the peer's goodbye.
#[test]
fn after_the_peers_goodbye_tls_1_3_goes_on_and_1_2_closes() {
    struct Late;
    impl Handler for Late {
        fn on_frame(&mut self, cx: &mut Context<'_>, frame: &[u8]) -> Outcome {
            cx.conn.send(frame)?;
            Ok(())
        }
        fn on_finish(&mut self, cx: &mut Context<'_>) -> Outcome {
            cx.conn.set_timer(1, Duration::from_millis(10));
            Ok(())
        }
        fn on_timer(&mut self, cx: &mut Context<'_>, _key: u8) -> Outcome {
            cx.conn.send(b"late")?;
            cx.conn.close();
            Ok(())
        }
    }
    let site = Site::new();
    for version in VERSIONS {
        let server = serve(listen(&site), || Late);
        let mut client = secure(server.addr(), &site.client(version));
        send2(&mut client, b"early");
        notify(&mut client);
        let late = if version.version == version::TLS13.version {
            packet2(b"late")
        } else {
            Vec::new()
        };
        assert_eq!(
            read_to_goodbye(&mut client),
            [packet2(b"early"), late].concat()
        );
        drop(client);
        server.until("it ends", |stats| stats.closed(CloseReason::Finished) == 1);
    }
}

/// Data and goodbye, cut anywhere into two segments: one answer, one goodbye, one reason.
#[test]
fn data_and_goodbye_are_cut_anywhere() {
    let site = Site::new();
    for version in VERSIONS {
        let server = recorder(&site);
        let mut cut = 0;
        loop {
            let mut client = settled(&server, &site, version);
            let mut wire = encrypt(&mut client.conn, &packet2(b"hi"));
            client.conn.send_close_notify();
            wire.extend(wire_of(&mut client.conn));
            send_wire(&server, &mut client, &wire[..cut]);
            client.sock.write_all(&wire[cut..]).expect("the rest");
            assert_eq!(read_to_goodbye(&mut client), packet2(b"hi"), "cut at {cut}");
            cut += 1;
            if cut > wire.len() {
                break;
            }
        }
        let (stats, _) = server.finish();
        assert_eq!(stats.closed(CloseReason::Finished), stats.accepted);
    }
}

/// Two frames, cut off by FIN at every byte. Whole frames are answered in every case. Only the
/// peer's close_notify makes it an orderly end.
#[test]
fn a_fin_without_goodbye_is_a_truncation() {
    let site = Site::new();
    for version in VERSIONS {
        let server = recorder(&site);
        let mut cut = 0;
        loop {
            let mut client = settled(&server, &site, version);
            let one = encrypt(&mut client.conn, &packet2(b"one"));
            let two = encrypt(&mut client.conn, &packet2(b"two"));
            client.conn.send_close_notify();
            let wire = [one.clone(), two.clone(), wire_of(&mut client.conn)].concat();
            client.sock.write_all(&wire[..cut]).expect("sent");
            fin(&client);
            let mut expected = Vec::new();
            if cut >= one.len() {
                expected.extend(packet2(b"one"));
            }
            if cut >= one.len() + two.len() {
                expected.extend(packet2(b"two"));
            }
            assert_eq!(read_to_goodbye(&mut client), expected, "cut at {cut}");
            let last = cut == wire.len();
            let ends = cut + 1;
            server.until("it ends", |stats| stats.closed_total() == ends as u64);
            let (reason, _) = server.ask(|seen, _| seen.closed.last().cloned().expect("reported"));
            let wanted = if last {
                CloseReason::Finished
            } else {
                CloseReason::TlsTruncated
            };
            assert_eq!(reason, wanted, "cut at {cut} of {}", wire.len());
            if last {
                break;
            }
            cut += 1;
        }
    }
}

/// An end inside a frame. With close_notify the peer itself cut it; without it anything on the way
/// may have.
#[test]
fn an_end_inside_a_frame_is_told_by_its_goodbye() {
    let site = Site::new();
    for version in VERSIONS {
        for (goodbye, reason) in [
            (true, CloseReason::Truncated),
            (false, CloseReason::TlsTruncated),
        ] {
            let server = recorder(&site);
            let mut client = secure(server.addr(), &site.client(version));
            client
                .write_all(&[packet2(b"whole"), vec![0, 9, b'p', b'a']].concat())
                .expect("one and a half");
            client.flush().expect("sent");
            if goodbye {
                notify(&mut client);
            } else {
                fin(&client);
            }
            assert_eq!(read_to_goodbye(&mut client), packet2(b"whole"));
            drop(client);
            assert_eq!(the_end(&server).0, reason);
        }
    }
}

/// A reset in each state of the handshake, and after.
#[test]
fn a_reset_is_a_reset() {
    let site = Site::new();
    for version in VERSIONS {
        for cut in [0, 1, 40, usize::MAX] {
            let server = recorder(&site);
            let mut tcp = connect(server.addr());
            let hello = wire_of(&mut session(&site.client(version)));
            tcp.write_all(&hello[..cut.min(hello.len())]).expect("sent");
            server.until("it is in", |stats| {
                stats.open == 1 && stats.traffic.bytes_in >= cut.min(hello.len()) as u64
            });
            reset(tcp);
            assert_eq!(the_end(&server).0, CloseReason::Reset, "after {cut} bytes");
            assert_eq!(server.finish().1.failed_accepts.len(), 1);
        }
        let server = recorder(&site);
        let mut client = secure(server.addr(), &site.client(version));
        ping(&mut client, b"hello");
        reset(client.sock);
        assert_eq!(the_end(&server).0, CloseReason::Reset);
        assert_eq!(server.finish().1.closed.len(), 1);
    }
}

/// A record that was changed on its way: what came before it is answered, the alert arrives, then FIN.
#[test]
fn a_forged_record_ends_the_connection_with_an_alert() {
    let site = Site::new();
    for version in VERSIONS {
        let server = recorder(&site);
        let mut client = secure(server.addr(), &site.client(version));
        ping(&mut client, b"good");
        let mut wire = encrypt(&mut client.conn, &packet2(b"bad"));
        let last = wire.len() - 1;
        wire[last] ^= 1;
        client.sock.write_all(&wire).expect("sent");
        let error = client.read_some(&mut [0; 1]).expect_err("an alert");
        assert!(error.to_string().contains("BadRecordMac"), "{error}");
        assert_eq!(client.sock.read_some(&mut [0; 1]).expect("no reset"), 0);
        drop(client);
        let (reason, cause) = the_end(&server);
        assert_eq!(reason, CloseReason::Tls);
        assert!(!cause.is_empty(), "the handler is told how");
    }
}

/// Good frames and a forged record in one segment: the handler gets the frames, though it cannot answer any more.
/// The reason is the forgery, whether the handler gives up over that or goes on.
#[test]
fn frames_before_a_forged_record_are_delivered() {
    struct Deaf;
    impl Handler<Seen> for Deaf {
        fn on_frame(&mut self, cx: &mut Context<'_, Seen>, frame: &[u8]) -> Outcome {
            // No peer reads it.
            let _ = cx.conn.send(frame);
            Ok(())
        }
        fn on_close(&mut self, cx: &mut Context<'_, Seen>, closed: &Closed) {
            Recorder.on_close(cx, closed);
        }
    }
    let site = Site::new();
    for version in VERSIONS {
        let (one, other) = (listen(&site), listen(&site));
        let server = spawn(move || {
            let mut server = Server::new(Config::new()).expect("server");
            server.listen(one, |_: &mut Seen, _| Deaf).expect("listen");
            server
                .listen(other, |_: &mut Seen, _| Recorder)
                .expect("listen");
            (server, Seen::default())
        });
        for (at, frames) in [(0, 3), (1, 4)] {
            let mut client = secure(
                kit::net::tcp(&server.listeners[at].addr),
                &site.client(version),
            );
            let mut wire = encrypt(&mut client.conn, &packet2(b"good").repeat(3));
            wire.extend_from_slice(&[0x17, 3, 3, 0, 32]);
            wire.extend_from_slice(&[0; 32]);
            client.sock.write_all(&wire).expect("sent");
            kit::net::await_end(&mut client);
            drop(client);
            let stats = server.until("it ends", |stats| {
                stats.closed(CloseReason::Tls) == at as u64 + 1
            });
            assert_eq!(stats.traffic.frames_in, frames);
        }
        let (_, seen) = server.finish();
        assert!(
            seen.closed.iter().all(|(_, cause)| !cause.is_empty()),
            "{seen:?}"
        );
    }
}

/// What is still on its way when we close is discarded, so that no reset destroys the last answer and the goodbye.
#[test]
fn input_after_our_close_does_not_destroy_the_goodbye() {
    let site = Site::new();
    for version in VERSIONS {
        let server = serve(listen(&site), || AsTold);
        let mut client = settled(&server, &site, version);
        let mut wire = encrypt(&mut client.conn, &packet2(b"close"));
        wire.extend(encrypt(&mut client.conn, &packet2(&[0; 60_000]).repeat(10)));
        client.sock.write_all(&wire).expect("sent");
        assert_eq!(read_to_goodbye(&mut client), packet2(b"close"));
        let more = encrypt(&mut client.conn, &[0; 100_000]);
        client.sock.write_all(&more).expect("taken and discarded");
        drop(client);
        server.until("it ends", |stats| stats.closed(CloseReason::Closed) == 1);
    }
}

/// An echo server beside many that vanish: nothing is left of them.
#[test]
fn clients_that_vanish_leave_nothing_behind() {
    let site = Site::new();
    let server = spawn_echo(Config::new(), listen(&site));
    for number in 0..60 {
        let mut client = secure(server.addr(), &site.client(VERSIONS[number % 2]));
        if number % 3 > 0 {
            send2(&mut client, b"hello");
            assert_eq!(recv2(&mut client), b"hello");
        }
        match number % 4 {
            0 => reset(client.sock),
            1 => notify(&mut client),
            _ => {}
        }
    }
    server.until("all have gone", |stats| {
        stats.open == 0 && stats.accepted == 60 && stats.closed_total() == 60
    });
}

/// A client says close_notify and closes with its tickets unread, on either side of the handshake:
/// close_notify and RST are there before the server looks.
#[test]
fn close_notify_and_rst_in_one_event_are_a_good_end() {
    for version in VERSIONS {
        let site = Site::new();
        let server = recorder(&site);
        let mut client = settled(&server, &site, version);
        let held = hold(&server.handle);
        client.conn.send_close_notify();
        let wire = wire_of(&mut client.conn);
        client.sock.write_all(&wire).expect("sent");
        reset(client.sock);
        drop(held);
        assert_eq!(the_end(&server).0, CloseReason::Finished, "{version:?}");
    }
}

/// The session tickets cannot be written any more, and that loses nothing: all frames are delivered,
/// and the handler is notified of the end. An answer that cannot be written is a loss.
#[test]
fn frames_close_notify_and_rst_before_the_tickets_are_a_good_end() {
    type Gate = (mpsc::Sender<()>, Arc<Mutex<mpsc::Receiver<()>>>);

    /// `on_open` waits for the test.
    struct OpensLate {
        gate: Gate,
        answers: bool,
        told: mpsc::Sender<String>,
        frames: usize,
    }

    impl Handler for OpensLate {
        fn on_open(&mut self, _: &mut Context<'_>) -> Outcome {
            let _ = self.gate.0.send(());
            let go = self.gate.1.lock().expect("no panic");
            let _ = go.recv_timeout(PATIENCE);
            Ok(())
        }
        fn on_frame(&mut self, cx: &mut Context<'_>, frame: &[u8]) -> Outcome {
            self.frames += 1;
            if self.answers {
                // Whatever became of it.
                let _ = cx.conn.send(frame);
            }
            Ok(())
        }
        fn on_finish(&mut self, cx: &mut Context<'_>) -> Outcome {
            let _ = self.told.send("finish".to_owned());
            cx.conn.close();
            Ok(())
        }
        fn on_close(&mut self, _: &mut Context<'_>, closed: &Closed) {
            let told = format!("{} frames, {:?}", self.frames, closed.reason);
            let _ = self.told.send(told);
        }
    }

    for (answers, expected) in [
        (false, &["finish", "20 frames, Finished"][..]),
        (true, &["20 frames, Reset"]),
    ] {
        let site = Site::new();
        let (go, going) = mpsc::channel();
        let (enter, entered) = mpsc::channel();
        let (tell, told) = mpsc::channel();
        let going = Arc::new(Mutex::new(going));
        let server = serve(listen(&site), move || OpensLate {
            gate: (enter.clone(), Arc::clone(&going)),
            answers,
            told: tell.clone(),
            frames: 0,
        });
        let mut client = secure(server.addr(), &site.client(&version::TLS13));
        entered.recv_timeout(PATIENCE).expect("it is opening");
        let mut wire = Vec::new();
        for _ in 0..20 {
            wire.extend(encrypt(&mut client.conn, &packet2(b"upload")));
        }
        client.conn.send_close_notify();
        wire.extend(wire_of(&mut client.conn));
        client.sock.write_all(&wire).expect("sent");
        reset(client.sock);
        go.send(()).expect("it waits");
        server.until("it is gone", |stats| stats.closed_total() == 1);
        let told: Vec<String> = told.try_iter().collect();
        assert_eq!(told, expected);
    }
}

/// A paused connection learns that its peer is gone, although close_notify is in front of the end.
#[test]
fn a_paused_connection_notices_the_end_behind_close_notify() {
    struct Pauses;
    impl Handler for Pauses {
        fn on_frame(&mut self, cx: &mut Context<'_>, _: &[u8]) -> Outcome {
            cx.conn.send(b"paused")?;
            cx.conn.pause();
            Ok(())
        }
    }
    let idle = Duration::from_secs(1);
    for version in VERSIONS {
        for resets in [false, true] {
            let site = Site::new();
            let listen = listen(&site).with(|listen| listen.conn.idle_timeout = idle);
            let server = serve(listen, || Pauses);
            let mut client = secure(server.addr(), &site.client(version));
            send2(&mut client, b"pause");
            assert_eq!(recv2(&mut client), b"paused");
            notify(&mut client);
            if resets {
                reset(client.sock);
            } else {
                drop(client);
            }
            let stats = server.until("it is gone", |stats| stats.open == 0);
            let ends = stats.closed(CloseReason::IdleTimeout) + stats.closed(CloseReason::Reset);
            assert_eq!(ends, 1, "{version:?}");
        }
    }
}
