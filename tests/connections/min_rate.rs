//! A peer that is slower than the minimum rate runs out of time in either direction, and no faster one does.

use std::io::{Read, Write};
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use kit::net::{eventually, local, packet2, Place, ReadSome, Running, PATIENCE};
use kit::script::{connect_narrow, spawn_script, usual, Call, Journal};
use portcullis::sim::{ClientId, ClientState, Sim};
use portcullis::{
    CloseReason, Config, Context, Decoded, Error, FrameError, Framer, Framing, Handler, Listen,
    Outcome, Server,
};

const SECOND: Duration = Duration::from_secs(1);
/// One frame.
const UPLOAD: usize = 8_000_000;

/// Answers each frame with so many bytes, and obeys a few commands.
struct Download(usize);

impl Handler for Download {
    fn on_frame(&mut self, cx: &mut Context<'_>, frame: &[u8]) -> Outcome {
        let mut left = self.0;
        while left > 0 {
            let part = left.min(16_000);
            cx.conn.send(vec![b'x'; part])?;
            left -= part;
        }
        match frame {
            b"close\n" => cx.conn.close(),
            b"pause\n" => cx.conn.pause(),
            _ => {}
        }
        Ok(())
    }
}

fn world(listen: Listen, answer: usize) -> (Sim, SocketAddr) {
    let mut sim = Sim::new(1, Config::new(), ());
    let addr = sim
        .listen(listen, move |_: &mut (), _| Download(answer))
        .expect("listen");
    (sim, addr)
}

fn listen(framing: Framing) -> Listen {
    Listen::tcp("127.0.0.1:0", framing).with(|listen| {
        listen.conn.max_frame = Some(UPLOAD + 1);
        listen.conn.output_limit = 1 << 20;
    })
}

/// Ends its frames with a bar, and knows how many bytes have none.
#[derive(Default)]
struct Barred(usize);

impl Framer for Barred {
    fn decode(&mut self, bytes: &[u8]) -> Result<Decoded, FrameError> {
        let fresh = bytes.get(self.0..).unwrap_or_default();
        if !fresh.contains(&b'|') {
            self.0 = bytes.len();
            return Ok(Decoded::More);
        }
        self.0 = 0;
        let at = bytes.iter().take_while(|&&byte| byte != b'|').count();
        Ok(Decoded::Frame {
            payload: 0..at,
            consumed: at + 1,
        })
    }
}

/// Each framing with what begins a frame of [`UPLOAD`] zeros, and what ends it.
fn framings() -> [(Framing, Vec<u8>, &'static [u8]); 4] {
    let length = (UPLOAD as u32).to_be_bytes();
    [
        (Framing::Packet4, length.to_vec(), b""),
        (Framing::Line, Vec::new(), b"\n"),
        (Framing::Delimited(b';'), Vec::new(), b";"),
        (Framing::custom(Barred::default), Vec::new(), b"|"),
    ]
}

/// A TLS client of the simulator, once the handshake is done.
#[cfg(feature = "tls")]
struct TlsClient {
    id: ClientId,
    tls: kit::sim_tls::Client,
    heard: Vec<u8>,
}

#[cfg(feature = "tls")]
impl TlsClient {
    fn connect(sim: &mut Sim, addr: SocketAddr, mut tls: kit::sim_tls::Client) -> Self {
        let id = sim.connect(addr).expect("it listens");
        let hello = tls.encrypt(b"");
        sim.send(id, &hello);
        let mut client = Self {
            id,
            tls,
            heard: Vec::new(),
        };
        client.hear(sim);
        client
    }

    fn hear(&mut self, sim: &mut Sim) {
        for _ in 0..5 {
            sim.settle();
            let wire = sim.received(self.id);
            let reply = self.tls.decrypt(&wire, &mut self.heard).expect("TLS");
            sim.send(self.id, &reply);
        }
    }
}

fn only_end(sim: &mut Sim) -> Option<CloseReason> {
    let closes = sim.control().recent_closes();
    assert!(closes.len() <= 1, "{closes:?}");
    closes.first().map(|close| close.reason)
}

/// A frame of 8 MB at 100 kB/s takes 80 s, and each stall on the way may take nearly the whole timeout.
#[test]
fn a_steady_upload_is_taken() {
    for (framing, begin, end) in framings() {
        let (mut sim, addr) = world(listen(framing.clone()), 2);
        let client = sim.connect(addr).expect("it listens");
        sim.send(client, &begin);
        for part in 0..80 {
            sim.send(client, &[0; UPLOAD / 80]);
            sim.advance(if part % 20 == 0 { 29 * SECOND } else { SECOND });
        }
        sim.send(client, end);
        sim.settle();
        let answer = sim.received(client);
        assert!(
            answer.ends_with(b"xx"),
            "{framing:?}: {:?}",
            only_end(&mut sim)
        );
    }
}

#[test]
#[cfg(feature = "tls")]
fn a_steady_upload_is_taken_over_tls() {
    use kit::sim_tls::{server_config, Client};
    for tls in [Client::new(), Client::tls12()] {
        let (mut sim, addr) = world(listen(Framing::Packet4).tls(server_config()), 2);
        let mut client = TlsClient::connect(&mut sim, addr, tls);
        let mut wire = client.tls.encrypt(&(UPLOAD as u32).to_be_bytes());
        wire.extend(client.tls.encrypt(&[0; UPLOAD]));
        for part in wire.chunks(100_000) {
            sim.send(client.id, part);
            sim.advance(SECOND);
        }
        client.hear(&mut sim);
        assert_eq!(client.heard, b"\0\0\0\x02xx", "{:?}", only_end(&mut sim));
    }
}

/// One byte every ten seconds buys next to no time, in no framing.
#[test]
fn a_byte_now_and_then_is_no_progress() {
    for (framing, begin, _) in framings() {
        let (mut sim, addr) = world(listen(framing.clone()), 2);
        let client = sim.connect(addr).expect("it listens");
        sim.send(client, &begin);
        for _ in 0..3 {
            sim.send(client, b"0");
            sim.advance(10 * SECOND);
        }
        // Some milliseconds for the few bytes, then FIN; the client does not finish.
        sim.advance(SECOND);
        assert_eq!(sim.state(client), ClientState::Finished, "{framing:?}");
        sim.advance(2 * SECOND);
        assert_eq!(
            only_end(&mut sim),
            Some(CloseReason::FrameTimeout),
            "{framing:?}"
        );
    }
}

/// Nor do records of a byte each, or the bytes of one long record.
#[test]
#[cfg(feature = "tls")]
fn a_record_now_and_then_is_no_progress() {
    use kit::sim_tls::{server_config, Client};
    for whole_records in [true, false] {
        for tls in [Client::new(), Client::tls12()] {
            let (mut sim, addr) = world(listen(Framing::Packet4).tls(server_config()), 2);
            let mut client = TlsClient::connect(&mut sim, addr, tls);
            let begin = client.tls.encrypt(&(UPLOAD as u32).to_be_bytes());
            sim.send(client.id, &begin);
            let mut drops: Vec<Vec<u8>> = if whole_records {
                (0..40).map(|_| client.tls.encrypt(b"0")).collect()
            } else {
                let record = client.tls.encrypt(&[0; 1000]);
                record.chunks(1).map(<[u8]>::to_vec).collect()
            };
            for part in drops.drain(..40) {
                sim.send(client.id, &part);
                sim.advance(SECOND);
            }
            assert_eq!(only_end(&mut sim), Some(CloseReason::FrameTimeout));
        }
    }
}

/// While the handler does not read, the frame is not late; what is in the kernel by then counts.
#[test]
fn a_pause_costs_a_slow_frame_no_time() {
    let (mut sim, addr) = world(listen(Framing::Line), 0);
    let client = sim.connect(addr).expect("it listens");
    sim.send(client, b"pause\n0123");
    sim.advance(1000 * SECOND);
    let id = sim.control().connections()[0].id;
    sim.control().conn(id).expect("open").resume();
    sim.advance(29 * SECOND);
    assert_eq!(sim.state(client), ClientState::Connected);
    sim.advance(4 * SECOND);
    assert_eq!(only_end(&mut sim), Some(CloseReason::FrameTimeout));
}

/// A client that asks for 600 kB, reads nothing by itself, and whose kernel takes little.
fn asks(sim: &mut Sim, addr: SocketAddr, words: &[u8]) -> ClientId {
    let client = sim.connect(addr).expect("it listens");
    sim.set_reading(client, false);
    sim.set_send_buffer(client, 16 * 1024);
    sim.send(client, words);
    sim.settle();
    client
}

/// Reads `bytes` every ten seconds until the connection ends; returns how long that takes.
fn sip(sim: &mut Sim, client: ClientId, bytes: usize) -> (Duration, usize) {
    let (begin, mut heard) = (sim.now(), 0);
    for _ in 0..1000 {
        sim.advance(10 * SECOND);
        sim.read(client, bytes);
        heard += sim.received(client).len();
        if only_end(sim).is_some() {
            break;
        }
    }
    (sim.now() - begin, heard)
}

/// A client that reads 29 bytes a second runs into the write timeout.
#[track_caller]
fn ends_a_sipper(sim: &mut Sim, client: ClientId, what: &str) {
    let (took, heard) = sip(sim, client, 290);
    assert_eq!(only_end(sim), Some(CloseReason::WriteTimeout), "{what}");
    assert!(
        (30 * SECOND..=40 * SECOND).contains(&took),
        "{what} {took:?}"
    );
    assert!(heard < 2000, "{what}: {heard} bytes");
}

/// 29 bytes a second: open, closing, and open with reading paused by the handler.
#[test]
fn a_reader_that_sips_is_ended() {
    for words in ["go\n", "close\n", "pause\n"] {
        let (mut sim, addr) = world(listen(Framing::Line), 600_000);
        let client = asks(&mut sim, addr, words.as_bytes());
        ends_a_sipper(&mut sim, client, words);
    }
}

/// As [`a_reader_that_sips_is_ended`], with all output in the kernel when the connection closes.
#[test]
fn a_reader_that_sips_from_the_kernel_is_ended() {
    let (mut sim, addr) = world(listen(Framing::Line), 60_000);
    let client = sim.connect(addr).expect("it listens");
    sim.set_reading(client, false);
    sim.send(client, b"close\n");
    ends_a_sipper(&mut sim, client, "from the kernel");
    // At 2 kB a second it gets everything.
    let (mut sim, addr) = world(listen(Framing::Line), 60_000);
    let client = sim.connect(addr).expect("it listens");
    sim.set_reading(client, false);
    sim.send(client, b"close\n");
    let (_, heard) = sip(&mut sim, client, 20_000);
    assert_eq!(
        (only_end(&mut sim), heard),
        (Some(CloseReason::Closed), 60_000)
    );
}

/// As [`a_reader_that_sips_is_ended`], while the server drains and has an hour for it.
#[test]
fn a_reader_that_sips_delays_no_drain() {
    let (mut sim, addr) = world(listen(Framing::Line), 600_000);
    let client = asks(&mut sim, addr, b"go\n");
    sim.control().drain(3600 * SECOND);
    ends_a_sipper(&mut sim, client, "in a drain");
}

#[test]
#[cfg(feature = "tls")]
fn a_reader_that_sips_is_ended_over_tls() {
    use kit::sim_tls::{server_config, Client};
    for words in ["go\n", "close\n"] {
        for tls in [Client::new(), Client::tls12()] {
            let (mut sim, addr) = world(listen(Framing::Line).tls(server_config()), 600_000);
            let mut client = TlsClient::connect(&mut sim, addr, tls);
            sim.set_reading(client.id, false);
            sim.set_send_buffer(client.id, 16 * 1024);
            let wire = client.tls.encrypt(words.as_bytes());
            sim.send(client.id, &wire);
            ends_a_sipper(&mut sim, client.id, words);
        }
    }
}

/// 2 kB a second, as over a slow radio link, is enough for as long as it takes: here five minutes.
#[test]
fn a_slow_reader_gets_everything() {
    for words in ["go\n", "close\n", "pause\n"] {
        let (mut sim, addr) = world(listen(Framing::Line), 600_000);
        let client = asks(&mut sim, addr, words.as_bytes());
        let mut heard = 0;
        while heard < 600_000 {
            sim.advance(10 * SECOND);
            sim.read(client, 20_000);
            let more = sim.received(client).len();
            assert!(more > 0, "{words}: {heard} {:?}", only_end(&mut sim));
            heard += more;
        }
        sim.settle();
        assert_eq!(heard, 600_000);
        let end = only_end(&mut sim);
        assert!(end.is_none_or(|end| end == CloseReason::Closed), "{end:?}");
    }
}

/// A stall as long as the timeout is for every peer: a rate is over time.
#[test]
fn a_fast_reader_may_stall() {
    let (mut sim, addr) = world(listen(Framing::Line), 600_000);
    let client = asks(&mut sim, addr, b"go\n");
    for _ in 0..5 {
        sim.advance(29 * SECOND);
        sim.read(client, 16_000);
        sim.settle();
    }
    assert_eq!(only_end(&mut sim), None);
    sim.advance(30 * SECOND);
    assert_eq!(only_end(&mut sim), Some(CloseReason::WriteTimeout));
}

/// The kernel's buffers are small, and a byte within the timeout would be enough without the rate.
fn strict(listen: Listen) -> Listen {
    listen.with(|listen| {
        listen.conn.write_timeout = Duration::from_millis(500);
        listen.conn.min_rate = 100_000_000;
        listen.conn.output_limit = 4 << 20;
        listen.conn.idle_timeout = Duration::MAX;
        listen.socket.send_buffer = Some(16 * 1024);
    })
}

/// Answers with 2.4 MB, and perhaps closes behind that.
fn answers_much(cx: &mut Context<'_, ()>, call: Call<'_>) -> Outcome {
    match call {
        Call::Frame(words) => {
            for _ in 0..40 {
                cx.conn.send([b'x'; 60_000])?;
            }
            if words == b"close" {
                cx.conn.close();
            }
            Ok(())
        }
        call => usual(cx, call),
    }
}

/// The client reads a few bytes in each iteration of the loop, and its connection ends all the same.
fn reads_a_trickle(
    mut client: impl Read + Write,
    words: &[u8],
    server: &Running,
    journal: &Journal,
) {
    client.write_all(&packet2(words)).expect("asked");
    eventually("it ends", || {
        // It may have ended meanwhile.
        let _ = client.read_some(&mut [0; 7]);
        server.ask(|(), _| ());
        !journal.reasons().is_empty()
    });
    assert_eq!(journal.reasons(), [CloseReason::WriteTimeout]);
}

#[test]
fn a_trickle_over_tcp() {
    for words in ["go", "close"] {
        let (server, journal) = spawn_script(Config::new(), strict(local()), answers_much);
        let client = connect_narrow(server.addr());
        reads_a_trickle(client, words.as_bytes(), &server, &journal);
    }
}

#[test]
fn a_trickle_over_a_unix_socket() {
    for words in ["go", "close"] {
        let place = Place::new();
        let listen = strict(Listen::unix(place.path("socket"), Framing::Packet2));
        let (server, journal) = spawn_script(Config::new(), listen, answers_much);
        let client = UnixStream::connect(place.path("socket")).expect("it listens");
        client.set_read_timeout(Some(PATIENCE)).expect("timeout");
        reads_a_trickle(client, words.as_bytes(), &server, &journal);
    }
}

#[test]
fn a_rate_of_zero_is_named() {
    let mut server: Server = Server::new(Config::new()).expect("server");
    let refused = server.listen(
        local().with(|listen| listen.conn.min_rate = 0),
        |_: &mut (), _| Download(0),
    );
    assert!(
        matches!(
            refused,
            Err(Error::Option {
                option: "min_rate",
                ..
            })
        ),
        "{refused:?}"
    );
}
