//! A frame can be borrowed, given away, shared, in parts or written in place: the peer gets the
//! same bytes. What is shared is stored once, and counts once for the memory limit.

use std::io::{Read, Write};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use kit::net::{connect, local, packet2, packet4, spawn};
use kit::script::connect_narrow;
use portcullis::sim::{ClientId, Sim};
use portcullis::{
    CloseReason, Closed, Config, Conn, ConnId, Context, Decoded, FrameBuf, FrameError, Framer,
    Framing, Handler, Listen, Outcome, SendError, Server,
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

    fn pack(&mut self, payload: &[&[u8]], out: &mut FrameBuf<'_>) -> Result<bool, FrameError> {
        let payload = payload.concat();
        for byte in &payload {
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

/// Gone connections are skipped, slow ones are named; the others get the frame, each in its own
/// framing.
#[test]
fn a_broadcast_tells_what_became_of_it() {
    let (mut sim, _, clients) = members(4, None);
    let ids = sim.app().clone();
    let full = |conn: &mut Conn<'_, Vec<ConnId>>| -> Outcome {
        conn.reconfigure(|options| {
            options.output_limit = 1000;
            options.high_watermark = 1000;
            options.low_watermark = 500;
        })?;
        conn.send([1; 2000])?;
        Ok(())
    };
    full(&mut sim.control().conn(ids[1]).expect("open")).expect("room");
    sim.control().conn(ids[2]).expect("open").close();
    sim.reset(clients[3]);
    sim.settle();
    let said = sim.control().broadcast(ids.iter().copied(), "hello");
    assert_eq!((said.sent, said.gone), (1, 2));
    assert_eq!(said.refused.len(), 1);
    assert_eq!(said.refused[0].0, ids[1]);
    assert!(matches!(said.refused[0].1, SendError::Full { .. }));
    sim.set_reading(clients[0], true);
    sim.settle();
    assert_eq!(sim.received(clients[0]), packet2(b"hello"));
    // One whose frame would be too long is named too.
    let said = sim.control().broadcast([ids[0]], vec![0; 0x1_0000]);
    assert!(matches!(
        said.refused[..],
        [(_, SendError::FrameTooLarge { .. })]
    ));
}

/// Whatever kind of payload it is, it is stored once.
#[test]
fn a_broadcast_is_stored_once() {
    for kind in 0..3 {
        let (mut sim, _, clients) = members(100, Some(1024 * 1024));
        let ids = sim.app().clone();
        let (payload, mut control) = (noise(LENGTH), sim.control());
        let said = match kind {
            0 => control.broadcast(ids, &payload),
            1 => control.broadcast(ids, payload.clone()),
            _ => control.broadcast(ids, payload.split_at(7)),
        };
        assert_eq!((said.sent, said.gone, said.refused.len()), (100, 0, 0));
        sim.settle();
        let memory = sim.stats().memory;
        assert!(memory < LENGTH + 100 * 300, "{memory} bytes");
        for client in clients {
            sim.set_send_buffer(client, 100_000);
            sim.set_reading(client, true);
            sim.settle();
            assert!(sim.received(client) == packet2(&payload));
        }
        assert_eq!(sim.stats().memory, 0);
    }
}

/// From another thread: each frame is a command, the payload counts once for the queue's limit.
#[test]
fn a_handle_broadcasts() {
    let (mut sim, _, clients) = members(100, Some(1024 * 1024));
    let changed = sim
        .control()
        .reconfigure(|config| config.queue_limits.bytes = 2 * LENGTH);
    changed.expect("good options");
    let mut ids = sim.app().clone();
    sim.reset(clients[99]);
    sim.settle();
    let handle = sim.handle();
    assert_eq!(handle.broadcast(ids.clone(), noise(LENGTH)), 99);
    sim.settle();
    assert!(sim.stats().memory < LENGTH + 100 * 300);
    sim.set_send_buffer(clients[50], 100_000);
    sim.set_reading(clients[50], true);
    sim.settle();
    assert!(sim.received(clients[50]) == packet2(&noise(LENGTH)));
    // A full queue: the number says so.
    ids.truncate(1);
    assert_eq!(handle.broadcast(ids.repeat(3), noise(2 * LENGTH)), 1);
    assert_eq!(sim.stats().undeliverable, 0);
}

/// A job writes a frame to a connection and panics: no part of it is sent, and what the buffer took
/// is accounted for and given back, without another event of that connection.
#[test]
fn a_panic_while_a_frame_is_written_leaves_nothing() {
    let (mut sim, _, clients) = members(1, None);
    send_all(&mut sim, |conn| conn.send([b'x'; 1000]));
    let (id, before) = (sim.app()[0], sim.stats().memory);
    let job = move |_: &mut Vec<ConnId>, control: &mut portcullis::Control<'_, Vec<ConnId>>| {
        let mut conn = control.conn(id).expect("it is there");
        let _ = conn.send_with(|out| {
            out.put(&[b'y'; LENGTH]);
            std::panic::resume_unwind(Box::new("planned"))
        });
    };
    sim.control().set_timer(std::time::Duration::ZERO, job);
    sim.settle();
    assert_eq!(sim.stats().panics, 1);
    assert!(sim.stats().memory <= before + 1000, "{before}");
    sim.set_send_buffer(clients[0], 100_000);
    sim.set_reading(clients[0], true);
    sim.settle();
    assert_eq!(sim.received(clients[0]), packet2(&[b'x'; 1000]));
}

/// Notes when it is notified, with the number of bytes that have left.
#[derive(Default)]
struct Notified(Vec<(char, u64)>);

struct Sender;

impl Handler<Notified> for Sender {
    fn on_frame(&mut self, cx: &mut Context<'_, Notified>, frame: &[u8]) -> Outcome {
        for &byte in frame {
            match byte {
                b'.' => cx.conn.notify_flushed(),
                b'!' => cx.conn.finish(),
                b'x' => cx.conn.close(),
                byte => cx.conn.send([byte; 1000])?,
            }
        }
        Ok(())
    }

    fn on_flushed(&mut self, cx: &mut Context<'_, Notified>) -> Outcome {
        let out = cx.conn.info().map_or(0, |info| info.traffic.bytes_out);
        cx.app.0.push(('f', out));
        Ok(())
    }

    fn on_close(&mut self, cx: &mut Context<'_, Notified>, _: &portcullis::Closed) {
        cx.app.0.push(('c', 0));
    }
}

/// Asks for the notice, and has no callback for it.
struct Unnotified;

impl Handler for Unnotified {
    fn on_frame(&mut self, cx: &mut Context<'_>, frame: &[u8]) -> Outcome {
        cx.conn.send(frame)?;
        cx.conn.notify_flushed();
        Ok(())
    }
}

#[test]
fn a_notice_without_a_callback_changes_nothing() {
    let mut sim = Sim::new(1, Config::new(), ());
    let listen = Listen::tcp("127.0.0.1:0", Framing::Packet2);
    let addr = sim.listen(listen, |_: &mut (), _| Unnotified);
    let client = sim.connect(addr.expect("listen")).expect("it listens");
    for word in [&b"one"[..], b"two"] {
        sim.send(client, &packet2(word));
        sim.settle();
        assert_eq!(sim.received(client), packet2(word));
    }
    assert_eq!((sim.stats().open, sim.stats().panics), (1, 0));
}

#[test]
fn a_handler_is_notified_once_its_output_has_left() {
    let notified = |words: &str, buffer: usize| {
        let mut sim = Sim::new(1, Config::new(), Notified::default());
        let listen = Listen::tcp("127.0.0.1:0", Framing::Raw);
        let addr = sim.listen(listen, |_: &mut Notified, _| Sender);
        let client = sim.connect(addr.expect("listen")).expect("it listens");
        sim.set_reading(client, false);
        sim.set_send_buffer(client, buffer);
        sim.settle();
        sim.send(client, words.as_bytes());
        sim.settle();
        let early = sim.app().0.len();
        sim.set_reading(client, true);
        sim.settle();
        (early, sim.app().0.clone())
    };
    // At once where nothing is pending, and once for several requests.
    assert_eq!(notified(".", 1), (1, vec![('f', 0)]));
    assert_eq!(notified("ab..", 100_000), (1, vec![('f', 2000)]));
    // Not before the last byte; what was sent behind the request does not count.
    let (early, late) = notified("ab.cd", 500);
    assert_eq!((early, late.len()), (0, 1));
    assert!((2000..2500).contains(&late[0].1), "{late:?}");
    // The last request counts.
    let (early, late) = notified("a.b.", 500);
    assert_eq!((early, late), (0, vec![('f', 2000)]));
    // With a half-close too, but not once the connection closes.
    assert_eq!(notified("ab.!", 500), (0, vec![('f', 2000)]));
    assert_eq!(notified("ab.x", 500).0, 0);
    assert!(notified("ab.x", 500).1.iter().all(|&(call, _)| call == 'c'));
}

/// Sends this number of pieces, each when the last one has left. If it `pauses`, it closes then.
struct Pieces {
    left: usize,
    size: usize,
    pauses: bool,
}

impl Pieces {
    fn send_next(&mut self, cx: &mut Context<'_, Vec<CloseReason>>) -> Outcome {
        if self.left == 0 {
            if self.pauses {
                cx.conn.close();
            }
            return Ok(());
        }
        self.left -= 1;
        cx.conn.send(vec![b'x'; self.size])?;
        cx.conn.notify_flushed();
        Ok(())
    }
}

impl Handler<Vec<CloseReason>> for Pieces {
    fn on_frame(&mut self, cx: &mut Context<'_, Vec<CloseReason>>, _: &[u8]) -> Outcome {
        if self.pauses {
            cx.conn.pause();
        }
        self.send_next(cx)
    }

    fn on_flushed(&mut self, cx: &mut Context<'_, Vec<CloseReason>>) -> Outcome {
        self.send_next(cx)
    }

    fn on_close(&mut self, cx: &mut Context<'_, Vec<CloseReason>>, closed: &Closed) {
        cx.app.push(closed.reason);
    }
}

/// A server that answers in pieces, and a client.
fn answers_in_pieces(left: usize, size: usize, pauses: bool) -> (Sim<Vec<CloseReason>>, ClientId) {
    let mut sim = Sim::new(1, Config::new(), Vec::new());
    let listen = Listen::tcp("127.0.0.1:0", Framing::Raw);
    let addr = sim.listen(listen, move |_: &mut Vec<CloseReason>, _| Pieces {
        left,
        size,
        pauses,
    });
    let client = sim.connect(addr.expect("listen")).expect("it listens");
    (sim, client)
}

/// Neither a client that has finished sending nor a drain cuts it off.
#[test]
fn an_answer_in_pieces_is_whole_before_the_connection_closes_by_itself() {
    for (drains, buffer) in [(false, 300), (true, 300), (false, 100_000), (true, 100_000)] {
        let (mut sim, client) = answers_in_pieces(5, 1000, false);
        sim.set_send_buffer(client, buffer);
        sim.settle();
        sim.send(client, b"go");
        if drains {
            sim.step();
            sim.control().drain(Duration::from_secs(10));
        } else {
            sim.finish(client);
        }
        sim.advance(Duration::from_secs(1));
        assert_eq!(sim.received(client).len(), 5000, "{drains} {buffer}");
        let reason = match drains {
            true => CloseReason::Drained,
            false => CloseReason::Finished,
        };
        sim.finish(client);
        sim.advance(Duration::from_secs(1));
        assert_eq!(*sim.app(), [reason]);
    }
}

/// Sends without end: a piece whenever the last one has left, or whenever there is room.
struct Source;

impl Source {
    fn send_piece(cx: &mut Context<'_, usize>) -> Outcome {
        cx.conn.send([7; 1000])?;
        cx.conn.notify_flushed();
        Ok(())
    }

    fn fill(cx: &mut Context<'_, usize>) -> Outcome {
        while !cx.conn.is_congested() {
            cx.conn.send([7; 1000])?;
        }
        Ok(())
    }
}

impl Handler<usize> for Source {
    fn on_frame(&mut self, cx: &mut Context<'_, usize>, word: &[u8]) -> Outcome {
        *cx.app += 1;
        match word {
            b"pieces" => Self::send_piece(cx),
            b"fill" => Self::fill(cx),
            _ => Ok(()),
        }
    }

    fn on_flushed(&mut self, cx: &mut Context<'_, usize>) -> Outcome {
        Self::send_piece(cx)
    }

    fn on_writable(&mut self, cx: &mut Context<'_, usize>) -> Outcome {
        Self::fill(cx)
    }
}

/// The socket takes everything at once, so that there is always more to send.
#[test]
fn an_endless_answer_to_a_fast_reader_does_not_leave_it_unread() {
    for word in ["pieces", "fill"] {
        let mut sim = Sim::new(1, Config::new(), 0);
        let listen = Listen::tcp("127.0.0.1:0", Framing::Packet2).with(|listen| {
            listen.conn.full_duplex = true;
            listen.conn.high_watermark = 4000;
            listen.conn.low_watermark = 1000;
        });
        let addr = sim.listen(listen, |_: &mut usize, _| Source);
        let client = sim.connect(addr.expect("listen")).expect("it listens");
        sim.set_send_buffer(client, 100_000_000);
        sim.send(client, &packet2(word.as_bytes()));
        for round in 2..10 {
            (0..5).for_each(|_| sim.step());
            assert!(!sim.received(client).is_empty());
            sim.send(client, &packet2(b"word"));
            (0..5).for_each(|_| sim.step());
            assert_eq!(*sim.app(), round, "{word}");
        }
    }
}

/// Its pieces are below the high watermark: nothing but the pause keeps the idle timeout away.
#[test]
fn a_slow_download_is_not_idle_while_it_is_paused() {
    let (mut sim, client) = answers_in_pieces(20, 64 * 1024, true);
    sim.set_reading(client, false);
    sim.set_send_buffer(client, 5000);
    sim.send(client, b"go");
    let mut received = 0;
    // Some 260 s, where the idle timeout is 120 s.
    while sim.app().is_empty() {
        sim.read(client, 5000);
        sim.advance(Duration::from_secs(1));
        received += sim.received(client).len();
    }
    assert_eq!(*sim.app(), [CloseReason::Closed]);
    assert_eq!(received, 20 * 64 * 1024);
}
