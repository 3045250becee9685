//! Over TLS frames arrive as they do over TCP: in every framing, of every size, in any pieces, in bounded memory.
#![cfg(feature = "tls")]

use std::io::Write;
use std::sync::Arc;
use std::time::Duration;

use kit::net::{
    await_end, eventually, local, packet2, ping, recv2, send2, spawn, spawn_echo, Echo,
};
use kit::tls::{
    encrypt, exchange, exchange_after, notify, read_to_goodbye, secure, spawn_recorder, wire_of,
    Site, VERSIONS,
};
use portcullis::tls::rustls::version;
use portcullis::{CloseReason, Config, ConnId, Context, Framing, Handler, Listen, Outcome, Server};

fn listen(site: &Site) -> Listen {
    local().tls(Arc::new(site.server()))
}

/// Not the same at any two places close to each other.
fn noise(length: usize) -> Vec<u8> {
    let mut state = 1u32;
    (0..length)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        })
        .collect()
}

/// Frames of these sizes with a header of `width` bytes.
fn packets(width: usize, sizes: &[usize]) -> Vec<u8> {
    let mut wire = Vec::new();
    for &size in sizes {
        wire.extend_from_slice(&(size as u64).to_be_bytes()[8 - width..]);
        wire.extend(noise(size));
    }
    wire
}

#[track_caller]
fn assert_same(answer: &[u8], expected: &[u8]) {
    assert_eq!(answer.len(), expected.len(), "as many bytes as were sent");
    assert!(answer == expected, "the same bytes");
}

#[test]
fn every_framing_echoes() {
    let site = Site::new();
    let lines = "hello\n\nworld\n".repeat(1000).into_bytes();
    let streams = [
        (Framing::Raw, noise(100_000)),
        (Framing::Packet1, packets(1, &[0, 1, 255, 0, 128])),
        (
            Framing::Packet2,
            packets(2, &[0, 1, 65_535, 16_384, 16_385, 0]),
        ),
        (Framing::Packet4, packets(4, &[0, 1, 65_536, 300_000, 0])),
        (Framing::Line, lines),
        (Framing::Delimited(0), b"one\0two\0\0".to_vec()),
    ];
    for version in VERSIONS {
        for (framing, stream) in &streams {
            let server = spawn_echo(
                Config::new(),
                listen(&site).with(|listen| listen.framing = framing.clone()),
            );
            let answer = exchange(secure(server.addr(), &site.client(version)), stream);
            assert_same(&answer, stream);
            assert_eq!(
                server.finish().0.closed(CloseReason::Finished),
                1,
                "{framing:?}"
            );
        }
    }
}

/// Several megabytes in flight both ways, which fit in no buffer; then half-close.
#[test]
fn megabytes_go_both_ways_at_once() {
    let site = Site::new();
    for version in VERSIONS {
        let server = spawn_echo(
            Config::new(),
            listen(&site).with(|listen| listen.framing = Framing::Packet4),
        );
        let stream = packets(4, &[1_000_000, 7, 3_000_000, 100_000, 1_500_000, 0]);
        let answer = exchange(secure(server.addr(), &site.client(version)), &stream);
        assert_same(&answer, &stream);
    }
}

/// Payloads that were given away, are shared or in parts are kept until they are encrypted.
#[test]
fn every_kind_of_payload_is_encrypted_in_order() {
    struct EveryKind;
    impl Handler for EveryKind {
        fn on_frame(&mut self, cx: &mut Context<'_>, frame: &[u8]) -> Outcome {
            let shared: Arc<[u8]> = frame.into();
            let (front, back) = frame.split_at(frame.len() / 3);
            cx.conn.send(frame)?;
            cx.conn.send(frame.to_vec())?;
            cx.conn.send(Arc::clone(&shared))?;
            cx.conn.send((front, back.to_vec()))?;
            cx.conn.send_with(|out| {
                out.put(front);
                out.put(back);
                Ok(())
            })?;
            cx.conn.send(shared)?;
            Ok(())
        }
    }
    let site = Site::new();
    let sizes = [0, 3, 5_000, 16_380, 16_384, 40_000, 300_000];
    for version in VERSIONS {
        let listen = listen(&site).with(|listen| {
            listen.framing = Framing::Packet4;
            listen.conn.output_limit = 16 * 1024 * 1024;
            listen.socket.send_buffer = Some(16 * 1024);
        });
        let server = spawn(move || {
            let mut server = Server::new(Config::new()).expect("server");
            let every_kind = |_: &mut (), _| EveryKind;
            server.listen(listen, every_kind).expect("listen");
            (server, ())
        });
        let client = secure(server.addr(), &site.client(version));
        let answer = exchange(client, &packets(4, &sizes));
        let expected = sizes.map(|size| packets(4, &[size; 6])).concat();
        assert_same(&answer, &expected);
    }
}

/// All frames of one write are answered, in order.
#[test]
fn ten_thousand_frames_in_one_write() {
    let site = Site::new();
    for version in VERSIONS {
        let server = spawn_echo(Config::new(), listen(&site));
        let mut other = secure(server.addr(), &site.client(version));
        let stream: Vec<u8> = (0..10_000u32)
            .flat_map(|number| packet2(&number.to_be_bytes()))
            .collect();
        let answer = exchange_after(
            secure(server.addr(), &site.client(version)),
            &stream,
            || {
                ping(&mut other, b"beside");
            },
        );
        assert_same(&answer, &stream);
        drop(other);
        let (stats, ()) = server.finish();
        assert_eq!(
            (stats.traffic.frames_in, stats.traffic.frames_out),
            (10_001, 10_001)
        );
    }
}

/// A record may be cut anywhere, down to one byte a segment.
#[test]
fn one_byte_a_segment() {
    let site = Site::new();
    for version in VERSIONS {
        let server = spawn_echo(Config::new(), listen(&site));
        let mut client = secure(server.addr(), &site.client(version));
        let frames = packets(2, &[5, 0, 300]);
        for byte in encrypt(&mut client.conn, &frames) {
            client.sock.write_all(&[byte]).expect("a byte");
        }
        notify(&mut client);
        assert_same(&read_to_goodbye(&mut client), &frames);
    }
}

/// A frame in a hundred records, and a hundred frames in one.
#[test]
fn records_and_frames_need_not_agree() {
    let site = Site::new();
    for version in VERSIONS {
        let server = spawn_echo(Config::new(), listen(&site));
        let mut client = secure(server.addr(), &site.client(version));
        let frame = packet2(&noise(3000));
        for piece in frame.chunks(30) {
            client.write_all(piece).expect("a record");
            client.flush().expect("sent");
        }
        assert_same(&recv2(&mut client), &frame[2..]);
        client
            .write_all(&packet2(b"tiny").repeat(100))
            .expect("one record");
        client.flush().expect("sent");
        for _ in 0..100 {
            assert_eq!(recv2(&mut client), b"tiny");
        }
    }
}

/// A client that does not read is not read from, and nothing is lost. Memory is at most the high
/// watermark, one read (64 KiB, answered whole), and what is encrypted ahead of the kernel.
#[test]
fn a_slow_reader_is_bounded_and_gets_everything_later() {
    const HIGH: usize = 128 * 1024;
    const READ: usize = 64 * 1024;
    const ENCRYPTED: usize = 66 * 1024;
    let site = Site::new();
    for version in VERSIONS {
        // Small enough that a few megabytes do not fit in the kernel.
        let server = spawn_echo(
            Config::new(),
            listen(&site).with(|listen| {
                listen.socket.send_buffer = Some(64 * 1024);
                listen.socket.recv_buffer = Some(64 * 1024);
            }),
        );
        let client = secure(server.addr(), &site.client(version));
        let stream = packets(2, &[60_000; 200]);
        let answer = exchange_after(client, &stream, || {
            let mut read = 0;
            let mut quiet = 0;
            // Until nothing has moved for a while.
            eventually("the server stops reading", || {
                let conn = server.ask(|(), control| control.connections().remove(0));
                assert!(
                    conn.buffered <= HIGH + 2 * READ + ENCRYPTED,
                    "{} bytes are held for one connection",
                    conn.buffered
                );
                quiet = if conn.traffic.bytes_in == read {
                    quiet + 1
                } else {
                    0
                };
                read = conn.traffic.bytes_in;
                conn.queued >= HIGH && quiet >= 50
            });
            assert!(
                server.handle.stats().traffic.bytes_in < 12_000_000,
                "it did not read on"
            );
        });
        assert_same(&answer, &stream);
        server.finish();
    }
}

/// Buffers are owned only while something is incomplete or unsent.
#[test]
fn an_idle_connection_holds_nothing() {
    let site = Site::new();
    for version in VERSIONS {
        let server = spawn_echo(Config::new(), listen(&site));
        let mut client = secure(server.addr(), &site.client(version));
        ping(&mut client, &noise(60_000));
        server.until("the answer has gone", |stats| {
            stats.traffic.bytes_out > 60_000
        });
        let conn = server.ask(|(), control| control.connections().remove(0));
        assert_eq!((conn.buffered, conn.queued), (0, 0));
        // Half a record: that, and no more.
        let wire = encrypt(&mut client.conn, &packet2(&noise(1000)));
        client.sock.write_all(&wire[..500]).expect("half");
        eventually("it has arrived", || {
            server.ask(|(), control| control.connections()[0].buffered) == 500
        });
        client.sock.write_all(&wire[500..]).expect("the rest");
        assert_same(&recv2(&mut client), &noise(1000));
        assert_eq!(
            server.ask(|(), control| control.connections()[0].buffered),
            0
        );
    }
}

/// Decrypted bytes are delivered without another event of the socket.
#[test]
fn a_paused_handler_loses_nothing_that_was_decrypted() {
    /// Takes one frame, rests, takes the next.
    struct Slow;
    impl Handler for Slow {
        fn on_frame(&mut self, cx: &mut Context<'_>, frame: &[u8]) -> Outcome {
            cx.conn.send(frame)?;
            cx.conn.pause();
            cx.conn.set_timer(0, Duration::from_millis(1));
            Ok(())
        }
        fn on_timer(&mut self, cx: &mut Context<'_>, _key: u8) -> Outcome {
            cx.conn.resume();
            Ok(())
        }
    }
    let site = Site::new();
    for version in VERSIONS {
        let listen = listen(&site);
        let server = spawn(move || {
            let mut server = Server::new(Config::new()).expect("server");
            server.listen(listen, |_: &mut (), _| Slow).expect("listen");
            (server, ())
        });
        let mut client = secure(server.addr(), &site.client(version));
        let frames: Vec<u8> = (0..50u8).flat_map(|number| packet2(&[number])).collect();
        let mut wire = encrypt(&mut client.conn, &frames);
        client.conn.send_close_notify();
        wire.extend(wire_of(&mut client.conn));
        client.sock.write_all(&wire).expect("one segment");
        assert_same(&read_to_goodbye(&mut client), &frames);
    }
}

/// One record, two framings.
#[test]
fn the_framing_changes_inside_a_record() {
    struct Header;
    impl Handler for Header {
        fn on_frame(&mut self, cx: &mut Context<'_>, frame: &[u8]) -> Outcome {
            cx.conn.send(frame)?;
            cx.conn.set_framing(&Framing::Packet1);
            Ok(())
        }
    }
    let site = Site::new();
    let listen = listen(&site).with(|listen| listen.framing = Framing::Line);
    let server = spawn(move || {
        let mut server = Server::new(Config::new()).expect("server");
        server
            .listen(listen, |_: &mut (), _| Header)
            .expect("listen");
        (server, ())
    });
    let mut client = secure(server.addr(), &site.client(&version::TLS13));
    client.write_all(b"line\n\x02ab\x01c").expect("one record");
    notify(&mut client);
    assert_eq!(read_to_goodbye(&mut client), b"line\n\x02ab\x01c");
}

/// A connection that only listens gets what another one's handler sends it, without an event of its own.
#[test]
fn a_handler_sends_to_another_connection() {
    #[derive(Default)]
    struct Room(Vec<ConnId>);
    struct Member;
    impl Handler<Room> for Member {
        fn on_open(&mut self, cx: &mut Context<'_, Room>) -> Outcome {
            cx.app.0.push(cx.conn.id());
            Ok(())
        }
        fn on_frame(&mut self, cx: &mut Context<'_, Room>, frame: &[u8]) -> Outcome {
            for &id in &cx.app.0 {
                if let Some(mut peer) = cx.conn.peer(id) {
                    peer.send(frame)?;
                }
            }
            Ok(())
        }
    }
    let site = Site::new();
    let listen = listen(&site);
    let server = spawn(move || {
        let mut server = Server::new(Config::new()).expect("server");
        server
            .listen(listen, |_: &mut Room, _| Member)
            .expect("listen");
        (server, Room::default())
    });
    let mut members: Vec<_> = VERSIONS
        .iter()
        .map(|version| secure(server.addr(), &site.client(version)))
        .collect();
    server.until("both are in", |stats| stats.opened == 2);
    send2(&mut members[0], b"to all");
    for member in &mut members {
        assert_eq!(recv2(member), b"to all");
    }
    let id = server.ask(|room, _| room.0[1]);
    server.handle.send(id, *b"from outside").expect("live");
    assert_eq!(recv2(&mut members[1]), b"from outside");
}

/// The server's own keys change too, as the client asks.
#[test]
fn keys_change_between_frames() {
    let site = Site::new();
    let server = spawn_echo(Config::new(), listen(&site));
    let mut client = secure(server.addr(), &site.client(&version::TLS13));
    for round in 0..100u8 {
        client.conn.refresh_traffic_keys().expect("TLS 1.3");
        ping(&mut client, &[round; 100]);
    }
    // Asked for while an answer waits: the change goes out with the goodbye.
    client.conn.refresh_traffic_keys().expect("TLS 1.3");
    notify(&mut client);
    assert_eq!(read_to_goodbye(&mut client), b"");
}

#[test]
fn keys_change_under_load() {
    let site = Site::new();
    let server = spawn_echo(
        Config::new(),
        listen(&site).with(|listen| listen.framing = Framing::Raw),
    );
    let mut client = secure(server.addr(), &site.client(&version::TLS13));
    let (mut wire, mut plain) = (Vec::new(), Vec::new());
    for piece in noise(100_000).chunks(1000) {
        client.conn.refresh_traffic_keys().expect("TLS 1.3");
        wire.extend(encrypt(&mut client.conn, piece));
        plain.extend_from_slice(piece);
    }
    client.conn.send_close_notify();
    wire.extend(wire_of(&mut client.conn));
    client.sock.write_all(&wire).expect("sent");
    assert_same(&read_to_goodbye(&mut client), &plain);
}

/// A flood of key updates without data ends that connection, and no other.
#[test]
fn a_flood_of_key_updates_is_ended() {
    let site = Site::new();
    let server = spawn_recorder(Config::new(), listen(&site));
    let mut other = secure(server.addr(), &site.client(&version::TLS13));
    let mut client = secure(server.addr(), &site.client(&version::TLS13));
    for _ in 0..1000 {
        client.conn.refresh_traffic_keys().expect("TLS 1.3");
    }
    client
        .sock
        .write_all(&wire_of(&mut client.conn))
        .expect("sent");
    // rustls has no alert for this.
    await_end(&mut client);
    drop(client);
    ping(&mut other, b"alive");
    let stats = server.until("it is closed", |stats| stats.open == 1);
    assert_eq!(stats.closed(CloseReason::Tls), 1);
}

/// Budgets: one connection that floods leaves turns to the others.
#[test]
fn a_flood_leaves_turns_to_others() {
    let site = Site::new();
    let listen = listen(&site);
    let server = spawn(move || {
        let mut server = Server::new(Config::new()).expect("server");
        server.listen(listen, |_: &mut (), _| Echo).expect("listen");
        (server, ())
    });
    let mut other = secure(server.addr(), &site.client(&version::TLS13));
    let stream = packets(2, &[1000; 3000]);
    let flood = secure(server.addr(), &site.client(&version::TLS13));
    std::thread::scope(|scope| {
        let flood = scope.spawn(|| exchange(flood, &stream));
        while !flood.is_finished() {
            ping(&mut other, b"beside");
        }
        assert_same(&flood.join().expect("no panic"), &stream);
    });
}
