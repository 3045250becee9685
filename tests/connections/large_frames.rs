//! A frame of 32 KiB or more is written without a copy, behind pending output. Every byte comes
//! once and in order, from every sender and to every slow reader.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::thread;
use std::time::Duration;

use kit::net::{connect, eventually, local, packet2, spawn};
use kit::script::connect_narrow;
use portcullis::sim::{Call, Sim};
use portcullis::{CloseReason, Config, ConnId, Context, Framing, Handler, Listen, Outcome, Server};

/// Larger than what two narrow kernels hold.
const LARGE: usize = 300_000;

/// Answers each request with a small frame, a large one, a small one and two large ones, told apart by their bytes.
struct Generous;

fn answers(framing: &Framing, request: u8) -> Vec<u8> {
    let mut wire = Vec::new();
    for (at, length) in [3, LARGE, 3, LARGE / 2, LARGE].into_iter().enumerate() {
        let payload = payload(request, at, length);
        match framing {
            Framing::Packet4 => wire.extend_from_slice(&(length as u32).to_be_bytes()),
            Framing::Packet2 => wire.extend_from_slice(&(length as u16).to_be_bytes()),
            _ => {}
        }
        wire.extend_from_slice(&payload);
    }
    wire
}

/// Bytes that tell where they are.
fn payload(request: u8, at: usize, length: usize) -> Vec<u8> {
    (0..length)
        .map(|place| {
            request.wrapping_mul(31)
                ^ (at as u8).wrapping_mul(57)
                ^ (place / 251) as u8
                ^ (place % 251) as u8
        })
        .collect()
}

impl Handler for Generous {
    fn on_frame(&mut self, cx: &mut Context<'_>, frame: &[u8]) -> Outcome {
        for (at, length) in [3, LARGE, 3, LARGE / 2, LARGE].into_iter().enumerate() {
            cx.conn.send(payload(frame[0], at, length))?;
        }
        Ok(())
    }
}

/// Reads `length` bytes, a few at a time.
fn read_slowly(stream: &mut TcpStream, length: usize) -> Vec<u8> {
    let mut all = vec![0; length];
    for piece in all.chunks_mut(7_001) {
        stream.read_exact(piece).expect("all of it comes");
    }
    all
}

fn roomy() -> Listen {
    local().with(|listen| {
        listen.socket.send_buffer = Some(16 * 1024);
        listen.conn.output_limit = 16 * 1024 * 1024;
        listen.conn.max_frame = Some(1024 * 1024);
    })
}

#[test]
fn in_order_between_small_ones_for_slow_readers() {
    for framing in [Framing::Raw, Framing::Packet4] {
        let listen = roomy().with(|listen| listen.framing = framing.clone());
        let server = spawn(move || {
            let mut server = Server::new(Config::new()).expect("server");
            server
                .listen(listen, |_: &mut (), _| Generous)
                .expect("listen");
            (server, ())
        });
        for narrow in [true, false] {
            let mut client = if narrow {
                connect_narrow(server.addr())
            } else {
                connect(server.addr())
            };
            for request in 1..4_u8 {
                match framing {
                    Framing::Raw => client.write_all(&[request]).expect("sent"),
                    _ => client.write_all(&[0, 0, 0, 1, request]).expect("sent"),
                }
                let expected = answers(&framing, request);
                let came = read_slowly(&mut client, expected.len());
                assert!(
                    came == expected,
                    "{framing:?}, request {request}, narrow: {narrow}"
                );
            }
        }
        let (stats, ()) = server.finish();
        assert_eq!(stats.traffic.frames_out, 2 * 3 * 5);
        assert_eq!(
            stats.traffic.bytes_out,
            2 * (1..4)
                .map(|request| answers(&framing, request).len() as u64)
                .sum::<u64>()
        );
    }
}

/// To others, and from outside of their turns.
#[test]
fn to_another_connection() {
    struct Crier;
    impl Handler<Vec<ConnId>> for Crier {
        fn on_open(&mut self, cx: &mut Context<'_, Vec<ConnId>>) -> Outcome {
            let id = cx.conn.id();
            cx.app.push(id);
            Ok(())
        }

        fn on_frame(&mut self, cx: &mut Context<'_, Vec<ConnId>>, frame: &[u8]) -> Outcome {
            for &id in cx.app.iter() {
                if let Some(mut other) = cx.conn.peer(id) {
                    other.send(frame)?;
                }
            }
            Ok(())
        }
    }
    let listen = roomy().with(|listen| listen.framing = Framing::Packet2);
    let server = spawn(move || {
        let mut server = Server::new(Config::new()).expect("server");
        server
            .listen(listen, |_: &mut Vec<ConnId>, _| Crier)
            .expect("listen");
        (server, Vec::new())
    });
    let addr = server.addr();
    let mut listeners: Vec<TcpStream> = (0..3).map(|_| connect_narrow(addr)).collect();
    eventually("all are there", || server.handle.stats().opened == 3);
    let large = payload(9, 9, 60_000);
    let mut speaker = connect(addr);
    let mut wire = Vec::new();
    for small in 0..10_u8 {
        wire.extend(packet2(&[small]));
        wire.extend(packet2(&large));
    }
    let written = wire.clone();
    // The speaker hears itself too, so it must read while it speaks.
    let mut mouth = speaker.try_clone().expect("a clone");
    let speaking = thread::spawn(move || mouth.write_all(&written).expect("sent"));
    assert!(read_slowly(&mut speaker, wire.len()) == wire);
    for listener in &mut listeners {
        assert!(
            read_slowly(listener, wire.len()) == wire,
            "each hears all of it"
        );
    }
    speaking.join().expect("spoken");
    server.finish();
}

/// A write that fails inside of `send` ends the connection as one at the end of the turn does, with its own reason.
#[test]
fn to_one_that_has_gone() {
    struct Late;
    impl Handler for Late {
        fn on_frame(&mut self, cx: &mut Context<'_>, _: &[u8]) -> Outcome {
            // Until the kernel reports an empty backlog, and then some more.
            for _ in 0..200 {
                cx.conn.send(vec![7; 64 * 1024])?;
            }
            Ok(())
        }
    }
    let mut listen = roomy().with(|listen| listen.framing = Framing::Raw);
    listen.conn.linger_timeout = Duration::from_secs(1);
    listen.conn.linger_bytes = 1024;
    let server = spawn(move || {
        let mut server = Server::new(Config::new()).expect("server");
        server.listen(listen, |_: &mut (), _| Late).expect("listen");
        (server, ())
    });
    for _ in 0..20 {
        let mut client = connect(server.addr());
        client.write_all(b"go").expect("sent");
        let mut first = [0; 1000];
        client.read_exact(&mut first).expect("it begins");
        // With unread bytes: a reset.
        drop(client);
    }
    eventually("all have ended", || server.handle.stats().open == 0);
    let (stats, ()) = server.finish();
    assert_eq!(stats.closed(CloseReason::Reset), 20);
}

/// The simulator writes as sockets do: smaller frames of one callback go out together, those of
/// 32 KiB each by itself.
#[test]
fn the_simulator_has_the_same_sizes() {
    struct Four;
    impl Handler for Four {
        fn on_frame(&mut self, cx: &mut Context<'_>, frame: &[u8]) -> Outcome {
            let length = std::str::from_utf8(frame)?.trim_end().parse()?;
            for _ in 0..4 {
                cx.conn.send(vec![b'x'; length])?;
            }
            Ok(())
        }
    }
    let mut sim = Sim::new(1, Config::new(), ());
    let listen = local().with(|listen| {
        listen.framing = Framing::Line;
        listen.conn.low_watermark = 1024;
        listen.conn.high_watermark = 1024 * 1024;
    });
    let addr = sim.listen(listen, |_: &mut (), _| Four).expect("listen");
    let client = sim.connect(addr).expect("a listener");
    sim.set_send_buffer(client, 1024 * 1024);
    let mut writes = |length: usize| {
        let before = sim.calls(Call::Write);
        sim.send(client, format!("{length}\n").as_bytes());
        sim.settle();
        assert_eq!(sim.received(client).len(), 4 * length);
        sim.calls(Call::Write) - before
    };
    assert_eq!(writes(1_000), 1);
    assert_eq!(writes(32 * 1024 - 1), 1);
    assert_eq!(writes(32 * 1024), 4);
    sim.set_large_frame(100);
    sim.send(client, b"1000\n");
    let before = sim.calls(Call::Write);
    sim.settle();
    assert_eq!(sim.calls(Call::Write) - before, 4);
}
