//! A frame can be borrowed, given away, shared, in parts or written in place: the peer gets the
//! same bytes. What is shared is stored once, and counts once for the memory limit.

use std::io::{Read, Write};
use std::net::SocketAddr;
use std::sync::Arc;

use kit::net::{connect, local, packet2, packet4, spawn};
use kit::script::connect_narrow;
use portcullis::sim::{ClientId, Sim};
use portcullis::{
    CloseReason, Config, Conn, ConnId, Context, Decoded, FrameBuf, FrameError, Framer, Framing,
    Handler, Listen, Outcome, SendError, Server,
};

/// Remembers who is there, and answers nothing.
struct Member;

impl Handler<Vec<ConnId>> for Member {
    fn on_open(&mut self, cx: &mut Context<'_, Vec<ConnId>>) -> Outcome {
        let id = cx.conn.id();
        cx.app.push(id);
        Ok(())
    }

    fn on_frame(&mut self, _: &mut Context<'_, Vec<ConnId>>, _: &[u8]) -> Outcome {
        Ok(())
    }
}

/// A world with `count` members that do not read.
fn members(count: usize, limit: Option<usize>) -> (Sim<Vec<ConnId>>, SocketAddr, Vec<ClientId>) {
    let config = Config::max_connections(2000).with(|config| config.memory_limit = limit);
    let mut sim = Sim::new(1, config, Vec::new());
    let listen = Listen::tcp("127.0.0.1:0", Framing::Packet2).with(|listen| {
        listen.socket.backlog = 2000;
        listen.conn.output_limit = 16 * 1024 * 1024;
    });
    let addr = sim.listen(listen, |_: &mut Vec<ConnId>, _| Member);
    let addr = addr.expect("listen");
    let join = |sim: &mut Sim<Vec<ConnId>>| {
        let client = sim.connect(addr).expect("it listens");
        sim.set_reading(client, false);
        sim.set_send_buffer(client, 1);
        client
    };
    let clients = (0..count).map(|_| join(&mut sim)).collect();
    sim.settle();
    assert_eq!(sim.app().len(), count);
    (sim, addr, clients)
}

fn send_all(
    sim: &mut Sim<Vec<ConnId>>,
    send: impl Fn(&mut Conn<'_, Vec<ConnId>>) -> Result<(), SendError>,
) {
    for id in sim.app().clone() {
        let mut control = sim.control();
        let mut conn = control.conn(id).expect("it is there");
        send(&mut conn).expect("room");
    }
    sim.settle();
}

const LENGTH: usize = 65_000;

fn noise(length: usize) -> Vec<u8> {
    (0..length).map(|at| (at / 251 + at % 251) as u8).collect()
}

#[test]
fn a_thousand_slow_readers_hold_one_copy() {
    let (mut sim, _, clients) = members(1000, Some(1024 * 1024));
    let payload: Arc<[u8]> = noise(LENGTH).into();
    send_all(&mut sim, |conn| conn.send(Arc::clone(&payload)));
    let memory = sim.stats().memory;
    assert!(
        (LENGTH..LENGTH + 1000 * 300).contains(&memory),
        "{memory} bytes"
    );
    assert_eq!(Arc::strong_count(&payload), 1001);
    let expected = packet2(&payload);
    for client in clients {
        sim.set_send_buffer(client, 100_000);
        sim.set_reading(client, true);
        sim.settle();
        assert!(sim.received(client) == expected);
    }
    assert_eq!((sim.stats().memory, sim.stats().open), (0, 1000));
    assert_eq!(Arc::strong_count(&payload), 1);
}

/// The limit holds with shared payloads too: where they exceed it, their holders are closed.
#[test]
fn shared_payloads_are_limited() {
    let limit = 256 * 1024;
    let (mut sim, _, _) = members(20, Some(limit));
    for _ in 0..3 {
        let payload: Arc<[u8]> = noise(LENGTH).into();
        send_all(&mut sim, |conn| conn.send(Arc::clone(&payload)));
        assert!(sim.stats().memory <= limit);
    }
    assert_eq!(sim.stats().open, 20);
    for id in sim.app().clone() {
        let payload: Arc<[u8]> = noise(LENGTH).into();
        if let Some(mut conn) = sim.control().conn(id) {
            conn.send(payload).expect("room");
        }
        sim.settle();
        assert!(sim.stats().memory <= limit);
    }
    let closed = sim.stats().closed(CloseReason::OverMemory);
    assert!((15..20).contains(&closed), "{closed} were closed");
}

/// Without a copy of each: what was given away is kept as it is.
#[test]
fn a_payload_that_was_given_away_is_kept() {
    let (mut sim, _, clients) = members(1, None);
    send_all(&mut sim, |conn| conn.send(noise(LENGTH)));
    let memory = sim.stats().memory;
    assert!((LENGTH..LENGTH + 300).contains(&memory), "{memory} bytes");
    sim.set_send_buffer(clients[0], 1000);
    sim.set_reading(clients[0], true);
    sim.settle();
    assert!(sim.received(clients[0]) == packet2(&noise(LENGTH)));
}

/// A header that holds the length in decimal, a mask, a trailer.
struct Masked;

impl Framer for Masked {
    fn decode(&mut self, input: &[u8]) -> Result<Decoded, FrameError> {
        Ok(Decoded::Frame {
            payload: 0..input.len(),
            consumed: input.len(),
        })
    }

    fn pack(&mut self, payload: &[u8], out: &mut FrameBuf<'_>) -> Result<bool, FrameError> {
        for byte in payload {
            out.put(&[byte ^ 0x55]);
        }
        Ok(payload.len() % 2 == 0)
    }

    fn header(&mut self, length: usize, out: &mut FrameBuf<'_>) -> Result<(), FrameError> {
        write!(out, "{length}:").map_err(FrameError::new)
    }

    fn trailer(&mut self, out: &mut FrameBuf<'_>) {
        out.put(b",");
    }
}

fn wire(framing: &Framing, payload: &[u8]) -> Vec<u8> {
    match framing {
        Framing::Packet4 => packet4(payload),
        Framing::Custom(_) => {
            let mask = if payload.len() % 2 == 0 { 0x55 } else { 0 };
            let masked = payload.iter().map(|byte| byte ^ mask).collect();
            let header = format!("{}:", payload.len()).into_bytes();
            [header, masked, b",".to_vec()].concat()
        }
        _ => payload.to_vec(),
    }
}

/// Sends the same bytes in every way.
struct EveryWay(Vec<usize>);

impl Handler for EveryWay {
    fn on_frame(&mut self, cx: &mut Context<'_>, _: &[u8]) -> Outcome {
        for &length in &self.0 {
            let bytes = noise(length);
            let (front, back) = bytes.split_at(length / 3);
            let shared: Arc<[u8]> = bytes.clone().into();
            cx.conn.send(&bytes)?;
            cx.conn.send(bytes.clone())?;
            cx.conn.send(bytes.clone().into_boxed_slice())?;
            cx.conn.send(Arc::clone(&shared))?;
            cx.conn.send((front, back))?;
            cx.conn.send((front.to_vec(), Arc::<[u8]>::from(back)))?;
            cx.conn
                .send((shared, "", Vec::new(), [0_u8; 0].as_slice()))?;
            cx.conn.send_with(|out| {
                out.put(front);
                out.write_all(back).map_err(FrameError::new)
            })?;
            let refused = cx.conn.send_with(|out| {
                out.put(b"half");
                Err(FrameError::new("as planned"))
            });
            assert!(matches!(refused, Err(SendError::Refused(_))));
        }
        Ok(())
    }
}

const WAYS: usize = 8;

#[test]
fn every_way_of_sending_gives_the_same_bytes() {
    let lengths = [0, 1, 300, 5_000, 40_000, 40_001, 200_000];
    for framing in [Framing::Raw, Framing::Packet4, Framing::custom(|| Masked)] {
        let listen = local().with(|listen| {
            listen.framing = framing.clone();
            listen.socket.send_buffer = Some(16 * 1024);
            listen.conn.output_limit = 16 * 1024 * 1024;
        });
        let server = spawn(move || {
            let mut server = Server::new(Config::new()).expect("server");
            let every_way = move |_: &mut (), _| EveryWay(lengths.to_vec());
            server.listen(listen, every_way).expect("listen");
            (server, ())
        });
        let mut expected = Vec::new();
        for length in lengths {
            let frame = wire(&framing, &noise(length));
            (0..WAYS).for_each(|_| expected.extend_from_slice(&frame));
        }
        for narrow in [true, false] {
            let mut client = match narrow {
                true => connect_narrow(server.addr()),
                false => connect(server.addr()),
            };
            client.write_all(b"\0\0\0\x01x").expect("sent");
            let mut all = vec![0; expected.len()];
            for piece in all.chunks_mut(7_001) {
                client.read_exact(piece).expect("all of it comes");
            }
            assert!(all == expected, "{framing:?}, narrow: {narrow}");
        }
        let (stats, ()) = server.finish();
        assert_eq!(stats.traffic.bytes_out, 2 * expected.len() as u64);
        let frames = 2 * WAYS * lengths.len();
        assert_eq!(stats.traffic.frames_out, frames as u64);
    }
}

/// From another thread too, with one copy at most.
#[test]
fn a_handle_sends_every_kind() {
    let listen = local().with(|listen| listen.framing = Framing::Packet2);
    let server = spawn(move || {
        let mut server = Server::new(Config::new()).expect("server");
        let member = |_: &mut Vec<ConnId>, _| Member;
        server.listen(listen, member).expect("listen");
        (server, Vec::new())
    });
    let mut client = server.connect_open();
    let id = server.ask(|ids: &mut Vec<ConnId>, _| ids[0]);
    let shared: Arc<[u8]> = noise(50_000).into();
    server.handle.send(id, "text").expect("room");
    server.handle.send(id, noise(40_000)).expect("room");
    server.handle.send(id, Arc::clone(&shared)).expect("room");
    server.handle.send(id, ("in ", vec![b'2'])).expect("room");
    let payloads = [
        b"text".to_vec(),
        noise(40_000),
        shared.to_vec(),
        b"in 2".to_vec(),
    ];
    let expected: Vec<u8> = payloads.iter().flat_map(|one| packet2(one)).collect();
    let mut all = vec![0; expected.len()];
    client.read_exact(&mut all).expect("all of it comes");
    assert!(all == expected);
    server.finish();
}
