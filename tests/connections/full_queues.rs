//! The socket is written before a frame is refused: a peer whose socket has room is never slow.

use std::time::Duration;

use portcullis::sim::{ClientId, Sim};
use portcullis::{
    CloseReason, Config, ConnId, Context, Framing, Handler, Listen, Outcome, SendError,
};

const FRAMES: usize = 2000;
const FRAME: [u8; 1000] = [7; 1000];

#[derive(Default)]
struct App {
    reader: Option<ConnId>,
    refused: usize,
}

/// Sends many frames to itself, to another connection, or to itself until it is refused.
struct Sender;

impl Handler<App> for Sender {
    fn on_open(&mut self, cx: &mut Context<'_, App>) -> Outcome {
        cx.app.reader.get_or_insert(cx.conn.id());
        Ok(())
    }

    fn on_frame(&mut self, cx: &mut Context<'_, App>, frame: &[u8]) -> Outcome {
        match frame {
            b"answer" => (0..FRAMES).try_for_each(|_| cx.conn.send(FRAME))?,
            b"publish" => {
                let reader = cx.app.reader.and_then(|id| cx.conn.peer(id));
                if let Some(mut reader) = reader {
                    let sent = (0..FRAMES).filter(|_| reader.send(FRAME).is_ok()).count();
                    cx.app.refused += FRAMES - sent;
                }
            }
            _ => while !matches!(cx.conn.send(FRAME), Err(SendError::Full { .. })) {},
        }
        Ok(())
    }
}

fn world(buffer: usize) -> (Sim<App>, [ClientId; 2]) {
    let mut sim = Sim::new(1, Config::new(), App::default());
    let listen = Listen::tcp("127.0.0.1:0", Framing::Packet2);
    let service = |_: &mut App, _: portcullis::Peer| Sender;
    let addr = sim.listen(listen, service).expect("listen");
    let clients = [(); 2].map(|()| {
        let client = sim.connect(addr).expect("connect");
        sim.set_send_buffer(client, buffer);
        sim.step();
        client
    });
    sim.settle();
    (sim, clients)
}

fn say(sim: &mut Sim<App>, client: ClientId, word: &[u8]) {
    let mut wire = (word.len() as u16).to_be_bytes().to_vec();
    wire.extend_from_slice(word);
    sim.send(client, &wire);
}

/// More than the output limit of 1 MiB, while the kernel has room for all of it.
#[test]
fn one_callback_may_send_what_the_socket_takes() {
    let (mut sim, [client, _]) = world(4 << 20);
    say(&mut sim, client, b"answer");
    sim.advance(Duration::from_millis(100));
    assert_eq!(sim.received(client).len(), FRAMES * (FRAME.len() + 2));
    assert_eq!(sim.stats().closed(CloseReason::Failed), 0);
}

#[test]
fn many_senders_to_one_fast_reader_are_not_refused() {
    let (mut sim, [reader, publisher]) = world(4 << 20);
    say(&mut sim, publisher, b"publish");
    sim.advance(Duration::from_millis(100));
    assert_eq!(sim.app().refused, 0);
    assert_eq!(sim.received(reader).len(), FRAMES * (FRAME.len() + 2));
}

/// Once the kernel takes no more, the queue is bounded by the output limit and one frame.
#[test]
fn a_full_socket_refuses_at_the_output_limit() {
    let (mut sim, [client, _]) = world(10_000);
    sim.set_reading(client, false);
    say(&mut sim, client, b"flood");
    sim.settle();
    let queued = sim.control().connections()[0].queued;
    let limit = 1 << 20;
    assert!((limit..limit + 1002).contains(&queued), "{queued}");
}

/// What a handle has accepted has no hole: the stream ends where a frame finds the queue full.
#[test]
fn a_slow_consumer_of_a_handle_is_closed_with_a_reason_of_its_own() {
    let (mut sim, [client, _]) = world(10_000);
    sim.set_reading(client, false);
    let id = sim.control().connections()[0].id;
    for number in 0..FRAMES as u32 {
        let mut frame = FRAME.to_vec();
        frame[..4].copy_from_slice(&number.to_be_bytes());
        sim.handle().send(id, frame).expect("queued");
    }
    sim.settle();
    sim.set_reading(client, true);
    sim.advance(Duration::from_secs(5));
    let received = sim.received(client);
    let numbers = received
        .chunks(FRAME.len() + 2)
        .map(|frame| u32::from_be_bytes([frame[2], frame[3], frame[4], frame[5]]));
    assert!(numbers.eq(0..(received.len() / (FRAME.len() + 2)) as u32));
    assert!(received.len() > 1 << 20, "{}", received.len());
    let stats = sim.stats();
    assert_eq!(stats.closed(CloseReason::SlowConsumer), 1);
    assert!(stats.undeliverable > 0);
}

/// A handler that returns the error of `send` has the same reason.
#[test]
fn a_handler_that_gives_up_on_a_slow_consumer_says_so() {
    let (mut sim, [client, _]) = world(10_000);
    sim.set_reading(client, false);
    say(&mut sim, client, b"answer");
    sim.settle();
    sim.set_reading(client, true);
    sim.advance(Duration::from_secs(5));
    assert_eq!(sim.stats().closed(CloseReason::SlowConsumer), 1);
    assert!(sim.received(client).len() > 1 << 20);
}

/// The error of another connection's output says nothing of the peer whose handler returns it.
#[test]
fn only_the_connection_whose_output_is_full_is_a_slow_consumer() {
    struct Relays;
    impl Handler<App> for Relays {
        fn on_open(&mut self, cx: &mut Context<'_, App>) -> Outcome {
            cx.app.reader.get_or_insert(cx.conn.id());
            Ok(())
        }

        fn on_frame(&mut self, cx: &mut Context<'_, App>, frame: &[u8]) -> Outcome {
            let reader = cx.app.reader.and_then(|id| cx.conn.peer(id));
            if let Some(mut reader) = reader {
                reader.send(frame)?;
            }
            Ok(())
        }
    }

    let mut sim = Sim::new(1, Config::new(), App::default());
    let listen = Listen::tcp("127.0.0.1:0", Framing::Packet2);
    let addr = sim.listen(listen, |_: &mut App, _| Relays).expect("listen");
    let reader = sim.connect(addr).expect("connect");
    sim.set_reading(reader, false);
    sim.settle();
    let sender = sim.connect(addr).expect("connect");
    for _ in 0..40 {
        say(&mut sim, sender, &[0; 60_000]);
        sim.settle();
    }
    // The linger timeout.
    sim.advance(Duration::from_secs(3));
    let stats = sim.stats();
    assert_eq!(stats.closed(CloseReason::SlowConsumer), 0);
    assert_eq!(stats.closed(CloseReason::Failed), 1);
    assert_eq!(stats.open, 1, "the reader is still there");
}

/// Sends until the connection is congested, to a peer that reads as fast as the server writes.
#[test]
fn a_callback_that_sends_while_there_is_room_ends() {
    struct Endless;
    impl Handler for Endless {
        fn on_frame(&mut self, cx: &mut Context<'_>, _: &[u8]) -> Outcome {
            while !cx.conn.is_congested() {
                cx.conn.send([7; 60_000])?;
            }
            Ok(())
        }
    }
    let mut sim = Sim::new(1, Config::new(), ());
    let listen = Listen::tcp("127.0.0.1:0", Framing::Packet2);
    let addr = sim
        .listen(listen, |_: &mut (), _: portcullis::Peer| Endless)
        .expect("listen");
    let client = sim.connect(addr).expect("connect");
    sim.set_send_buffer(client, usize::MAX / 2);
    sim.send(client, b"\0\x01x");
    sim.settle();
    assert!(sim.stats().traffic.bytes_out >= 64 << 20);
}

/// Over TLS the same: records are encrypted and written before a frame is refused.
#[cfg(feature = "tls")]
#[test]
fn over_tls_the_socket_is_written_first_too() {
    use kit::sim_tls;
    let mut sim = Sim::new(1, Config::new(), App::default());
    let listen = Listen::tcp("127.0.0.1:0", Framing::Packet2).tls(sim_tls::server_config());
    let service = |_: &mut App, _: portcullis::Peer| Sender;
    let addr = sim.listen(listen, service).expect("listen");
    let mut clients = [(); 2].map(|()| {
        let client = sim.connect(addr).expect("connect");
        sim.set_send_buffer(client, 4 << 20);
        let mut tls = sim_tls::Client::new();
        sim.send(client, &tls.encrypt(b""));
        sim.settle();
        let mut plain = Vec::new();
        let flight = tls.decrypt(&sim.received(client), &mut plain);
        sim.send(client, &flight.expect("a handshake"));
        sim.settle();
        (client, tls)
    });
    for word in [&b"\0\x06answer"[..], b"\0\x07publish"] {
        for (client, tls) in &mut clients {
            let wire = tls.encrypt(word);
            sim.send(*client, &wire);
        }
        sim.advance(Duration::from_millis(100));
    }
    let sent = clients.map(|(client, mut tls)| {
        let mut plain = Vec::new();
        let wire = sim.received(client);
        tls.decrypt(&wire, &mut plain).expect("records");
        plain.len() / (FRAME.len() + 2)
    });
    assert_eq!((sim.app().refused, sent), (0, [3 * FRAMES, FRAMES]));
}

/// Frames of another thread, from an iteration to the next.
#[test]
fn a_handle_may_send_what_the_socket_takes() {
    let (mut sim, [client, _]) = world(4 << 20);
    let id = sim.app().reader.expect("it is open");
    for _ in 0..FRAMES {
        sim.handle().send(id, FRAME).expect("room in the queue");
    }
    sim.advance(Duration::from_millis(100));
    assert_eq!(sim.received(client).len(), FRAMES * (FRAME.len() + 2));
    assert_eq!(sim.stats().undeliverable, 0);
}

/// A short write says that the buffer was full then; before a frame is refused the socket is asked
/// again.
#[test]
fn a_peer_that_has_read_since_the_last_write_is_not_slow() {
    let (mut sim, [client, _]) = world(FRAME.len());
    sim.set_reading(client, false);
    let id = sim.app().reader.expect("open");
    let send = |sim: &mut Sim<App>| {
        let mut control = sim.control();
        control.conn(id).expect("open").send(FRAME)
    };
    let taken = (0..FRAMES).take_while(|_| send(&mut sim).is_ok()).count();
    assert!(taken < FRAMES, "the output limit is never reached");
    sim.set_send_buffer(client, 4 << 20);
    sim.set_reading(client, true);
    for _ in 0..FRAMES {
        send(&mut sim).expect("the socket has room");
    }
}
