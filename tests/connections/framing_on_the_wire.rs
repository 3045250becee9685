//! Frames on real sockets equal the bytes' frames in every cut, and bad bytes cost no other client
//! anything.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::thread;

use kit::net::{
    await_end, connect, hold, local, packet2, packet4, ping, read_to_end, recv2, send2, spawn_echo,
};
use kit::script::{spawn_script, usual, Call};
use portcullis::{CloseReason, Config, Framing, SendError, State};
use socket2::SockRef;

/// Writes from another thread, so that neither side waits for the other.
fn write_beside(stream: &TcpStream, wire: Vec<u8>) -> thread::JoinHandle<()> {
    let mut stream = stream.try_clone().expect("clone");
    thread::spawn(move || stream.write_all(&wire).expect("write"))
}

/// A frame may be cut anywhere, down to one byte a segment.
#[test]
fn a_byte_at_a_time() {
    for (framing, wire) in [
        (Framing::Packet1, b"\x05hello\x00\x02yo".to_vec()),
        (
            Framing::Packet2,
            b"\x00\x05hello\x00\x00\x00\x02yo".to_vec(),
        ),
        (
            Framing::Packet4,
            b"\x00\x00\x00\x05hello\x00\x00\x00\x00".to_vec(),
        ),
        (Framing::Line, b"hello\n\nyo\n".to_vec()),
        (Framing::Raw, b"hello".to_vec()),
    ] {
        let (server, journal) = spawn_script(
            Config::new(),
            local().with(|listen| listen.framing = framing.clone()),
            usual,
        );
        let mut client = connect(server.addr());
        let bytes = wire.len() as u64;
        for (sent, byte) in wire.iter().enumerate() {
            client.write_all(&[*byte]).expect("write");
            // Each byte is a segment and a read of its own.
            server.until("the byte arrives", |stats| {
                stats.traffic.bytes_in == sent as u64 + 1
            });
        }
        client.shutdown(Shutdown::Write).expect("FIN");
        assert_eq!(read_to_end(&mut client), wire, "{framing:?}");
        assert_eq!(journal.until_closed(1), [CloseReason::Finished]);
        assert_eq!(server.finish().0.traffic.bytes_in, bytes);
    }
}

/// All frames of one write are answered in order, and another client is served meanwhile.
#[test]
fn ten_thousand_frames_in_one_write_while_another_is_served() {
    let server = spawn_echo(Config::new(), local());
    let mut wire = Vec::new();
    for number in 0..10_000u32 {
        wire.extend(packet2(&number.to_be_bytes()));
    }
    let mut flood = connect(server.addr());
    let writer = write_beside(&flood, wire);
    let mut other = connect(server.addr());
    for number in 0..10_000u32 {
        if number % 1000 == 500 {
            ping(&mut other, b"between");
        }
        assert_eq!(recv2(&mut flood), number.to_be_bytes());
    }
    writer.join().expect("written");
    drop((flood, other));
    let (stats, ()) = server.finish();
    assert_eq!(
        (stats.traffic.frames_in, stats.traffic.frames_out),
        (10_010, 10_010)
    );
}

/// An empty frame is a message: Erlang delivers `<<>>`, and so does this server.
#[test]
fn empty_frames_are_frames() {
    let (server, journal) = spawn_script(Config::new(), local(), usual);
    let mut client = connect(server.addr());
    client.write_all(&[0; 2 * 5000]).expect("write");
    for _ in 0..5000 {
        assert_eq!(recv2(&mut client), b"");
    }
    ping(&mut client, b"not empty");
    assert_eq!(journal.count(&kit::script::Entry::Frame), 5001);
}

/// The largest frame of each framing arrives whole.
#[test]
fn the_largest_frame_of_each_framing_is_whole() {
    let pattern = |length: usize| (0..length).map(|at| (at % 251) as u8).collect::<Vec<u8>>();
    let line = |length: usize| {
        let mut line = pattern(length);
        line.iter_mut()
            .filter(|byte| **byte == b'\n')
            .for_each(|byte| *byte = b' ');
        line[length - 1] = b'\n';
        line
    };
    for (framing, wire) in [
        (Framing::Packet1, [vec![255], pattern(255)].concat()),
        (Framing::Packet2, packet2(&pattern(65_535))),
        (Framing::Packet4, packet4(&pattern(8 * 1024 * 1024))),
        (Framing::Line, line(64 * 1024)),
    ] {
        let server = spawn_echo(
            Config::new(),
            local().with(|listen| listen.framing = framing.clone()),
        );
        let mut client = connect(server.addr());
        let writer = write_beside(&client, wire.clone());
        let mut echo = vec![0; wire.len()];
        client.read_exact(&mut echo).expect("the echo");
        assert!(echo == wire, "{framing:?}");
        writer.join().expect("written");
        // One frame in, one frame out: it came as a whole.
        let stats = server.ask(|(), control| control.stats());
        assert_eq!(
            (stats.traffic.frames_in, stats.traffic.frames_out),
            (1, 1),
            "{framing:?}"
        );
    }
}

/// A length above the maximum is refused on the header alone, and the bytes that follow are not
/// kept.
#[test]
fn a_lying_header_costs_no_memory() {
    for length in [
        0xFFFF_FFFF_u32,
        0x8000_0000,
        0x7FFF_FFFF,
        8 * 1024 * 1024 + 1,
    ] {
        let (server, journal) = spawn_script(
            Config::new(),
            local().with(|listen| listen.framing = Framing::Packet4),
            usual,
        );
        let mut client = connect(server.addr());
        client.write_all(&length.to_be_bytes()).expect("write");
        // Nothing of the payload was needed for the verdict; the client hears of it by FIN.
        assert_eq!(read_to_end(&mut client), b"");
        let info = server.ask(|(), control| control.connections());
        assert!(info.iter().all(|info| info.buffered == 0), "{info:?}");
        drop(client);
        assert_eq!(
            journal.until_closed(1),
            [CloseReason::FrameTooLarge],
            "{length:#x}"
        );
    }
}

/// A length within the maximum takes memory only for received bytes.
#[test]
fn a_large_promise_holds_only_what_came() {
    let server = spawn_echo(
        Config::new(),
        local().with(|listen| listen.framing = Framing::Packet4),
    );
    let mut client = connect(server.addr());
    client
        .write_all(&(8u32 * 1024 * 1024).to_be_bytes())
        .expect("write");
    client.write_all(b"four").expect("write");
    server.until("it arrives", |stats| stats.traffic.bytes_in == 8);
    let info = server.ask(|(), control| control.connections());
    assert_eq!(info[0].buffered, 8);
    assert_eq!(info[0].state, State::Open);
}

/// A line without an end is refused at the maximum.
#[test]
fn a_line_without_end_ends_at_the_maximum() {
    let listen = local().with(|listen| {
        listen.framing = Framing::Line;
        listen.conn.max_frame = Some(1000);
    });
    let (server, journal) = spawn_script(Config::new(), listen, usual);
    let mut honest = connect(server.addr());
    let mut client = connect(server.addr());
    client.write_all(b"short\n").expect("write");
    client.write_all(&[b'x'; 1000]).expect("write");
    server.until("it is there", |stats| stats.traffic.bytes_in == 1006);
    assert_eq!(
        journal.reasons(),
        [],
        "a thousand bytes may still become a line"
    );
    client.write_all(b"x").expect("write");
    assert_eq!(read_to_end(&mut client), b"short\n");
    drop(client);
    assert_eq!(journal.until_closed(1), [CloseReason::FrameTooLarge]);
    // The longest line, its delimiter counted.
    let mut line = [b'y'; 1000];
    line[999] = b'\n';
    honest.write_all(&line).expect("write");
    let mut echo = [0; 1000];
    honest.read_exact(&mut echo).expect("the echo");
    assert_eq!(echo, line);
}

/// Good frames are answered, and a megabyte of garbage behind the bad header does not destroy the
/// answers by a reset.
#[test]
fn good_frames_before_a_bad_one_are_answered() {
    for garbage in [0, 1024 * 1024] {
        let (server, journal) = spawn_script(
            Config::new(),
            local().with(|listen| listen.conn.max_frame = Some(1000)),
            usual,
        );
        let mut wire = Vec::new();
        for number in 0..1000u32 {
            wire.extend(packet2(&[number as u8; 500]));
        }
        let good = wire.clone();
        wire.extend_from_slice(&[0xFF; 2]);
        wire.resize(wire.len() + garbage, 0xAA);
        let mut client = connect(server.addr());
        let writer = write_beside(&client, wire);
        // The writer is done before the reader begins, so that answers and garbage pass each other.
        writer.join().expect("written");
        assert!(
            read_to_end(&mut client) == good,
            "every good echo, then the orderly end"
        );
        drop(client);
        assert_eq!(journal.until_closed(1), [CloseReason::FrameTooLarge]);
    }
}

/// Random garbage ends its own connection, and honest clients get the right echoes.
#[test]
fn garbage_among_honest_clients() {
    let (server, journal) = spawn_script(
        Config::new(),
        local().with(|listen| listen.conn.max_frame = Some(300)),
        usual,
    );
    let mut honest: Vec<_> = (0..5).map(|_| connect(server.addr())).collect();
    let mut random = 0x2545_F491_4F6C_DD1D_u64;
    let mut next = move || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random
    };
    for round in 0..40u8 {
        let mut vandal = connect(server.addr());
        let noise: Vec<u8> = (0..=next() % 5000).map(|_| next() as u8).collect();
        // It may have been thrown out before it is through.
        let _ = vandal.write_all(&noise);
        for client in &mut honest {
            ping(client, &[round; 200]);
        }
        let _ = vandal.shutdown(Shutdown::Write);
        await_end(&mut vandal);
    }
    drop(honest);
    server.until("all are gone", |stats| stats.open == 0);
    let reasons = journal.until_closed(45);
    assert!(
        reasons.iter().all(|reason| matches!(
            reason,
            CloseReason::Finished | CloseReason::FrameTooLarge | CloseReason::Truncated
        )),
        "{reasons:?}"
    );
    journal.assert_whole_lives();
}

/// An urgent byte is not part of the stream. Bytes behind it are read, although the kernel ends a
/// read in front of it.
#[test]
fn an_urgent_byte_is_skipped_and_hides_nothing() {
    let server = spawn_echo(Config::new(), local());
    let mut client = connect(server.addr());
    ping(&mut client, b"before");
    let still = hold(&server.handle);
    send2(&mut client, b"one");
    SockRef::from(&client)
        .send_out_of_band(b"!")
        .expect("urgent");
    send2(&mut client, b"two");
    drop(still);
    assert_eq!(recv2(&mut client), b"one");
    assert_eq!(recv2(&mut client), b"two");
    // Also at a quiet moment, and several of them.
    for round in 0..10u8 {
        SockRef::from(&client)
            .send_out_of_band(b"!")
            .expect("urgent");
        ping(&mut client, &[round]);
    }
    let iterations = server.ask(|(), control| control.stats().iterations);
    let later = server.ask(|(), control| control.stats().iterations);
    assert!(
        later - iterations < 100,
        "the urgent byte keeps the loop awake"
    );
}

/// The handler gets an error, and nothing of the frame is sent.
#[test]
fn a_frame_too_long_for_its_header_is_an_error() {
    let (server, journal) = spawn_script(
        Config::new(),
        local().with(|listen| listen.framing = Framing::Packet1),
        |cx, call| {
            if let Call::Frame(_) = call {
                cx.conn.send(b"before")?;
                match cx.conn.send([0; 256]) {
                    Err(SendError::FrameTooLarge {
                        length: 256,
                        max: 255,
                    }) => {}
                    other => panic!("{other:?}"),
                }
                cx.conn.send([7; 255])?;
                return Ok(());
            }
            usual(cx, call)
        },
    );
    let mut client = connect(server.addr());
    client.write_all(b"\x01?").expect("write");
    client.shutdown(Shutdown::Write).expect("FIN");
    let mut expected = b"\x06before\xFF".to_vec();
    expected.extend([7; 255]);
    assert_eq!(read_to_end(&mut client), expected);
    assert_eq!(journal.until_closed(1), [CloseReason::Finished]);
}
