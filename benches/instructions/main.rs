//! A fixed amount of echoing, for counting instructions: a server and its clients in lock-step on one thread, so that every
//! run does the same. See `benches/README.md`.
//!
//!     instructions [--conns 64] [--window 1] [--size 64] [--rounds 100] [--framing packet-2|raw|line|custom|by-hand]
//!                  [--with tls|connects|handshakes|rates|memory-limit|timer|source-limits|recorded]

mod cut;
#[cfg(feature = "record")]
#[path = "../common/recorded.rs"]
mod recorded;
#[cfg(feature = "aws-lc-rs")]
#[path = "../common/site.rs"]
mod site;
#[cfg(feature = "aws-lc-rs")]
mod tls;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use portcullis::{Addr, Config, Context, Framing, Handler, Listen, Outcome, Rate, Server, Turn};

struct Echo {
    /// Sets a timer anew with each message.
    timer: bool,
    /// Cuts raw input into the frames of packet-2.
    by_hand: Option<cut::ByHand>,
}

impl Handler for Echo {
    fn on_frame(&mut self, cx: &mut Context<'_>, frame: &[u8]) -> Outcome {
        if self.timer {
            cx.conn.set_timer(0, Duration::from_secs(30));
        }
        if let Some(cutter) = &mut self.by_hand {
            return cutter.each(frame, |payload| {
                cx.conn.send(cut::header(payload)?)?;
                Ok(cx.conn.send(payload)?)
            });
        }
        cx.conn.send(frame)?;
        Ok(())
    }
}

/// What is counted: callgrind is told to collect only in here.
#[inline(never)]
fn measured_turn(server: &mut Server, timeout: Option<Duration>) -> Turn {
    server.poll_once(&mut (), timeout).expect("it polls")
}

struct Work {
    conns: usize,
    window: usize,
    size: usize,
    rounds: usize,
    framing: String,
    with: String,
}

fn options() -> Work {
    let mut work = Work {
        conns: 64,
        window: 1,
        size: 64,
        rounds: 100,
        framing: "packet-2".to_owned(),
        with: String::new(),
    };
    let mut words = std::env::args().skip(1);
    while let Some(name) = words.next() {
        // What `cargo bench` adds.
        if name == "--bench" {
            continue;
        }
        let value = words.next().expect("a value");
        let number = || value.parse().expect("a number");
        match name.as_str() {
            "--conns" => work.conns = number(),
            "--window" => work.window = number(),
            "--size" => work.size = number(),
            "--rounds" => work.rounds = number(),
            "--framing" => work.framing = value,
            "--with" => work.with = value,
            _ => panic!("{name} is no option"),
        }
    }
    work
}

fn message(work: &Work) -> (Framing, Vec<u8>) {
    let payload = vec![b'x'; work.size];
    match work.framing.as_str() {
        "raw" => (Framing::Raw, payload),
        "line" => (Framing::Line, [&payload[..], b"\n"].concat()),
        name @ ("packet-2" | "custom" | "by-hand") => {
            let header = u16::try_from(work.size).expect("it fits").to_be_bytes();
            let framing = match name {
                "packet-2" => Framing::Packet2,
                "custom" => Framing::custom(|| cut::Packet2),
                _ => Framing::Raw,
            };
            (framing, [&header[..], &payload].concat())
        }
        other => panic!("no framing is called {other}"),
    }
}

fn main() {
    let work = options();
    let (framing, message) = message(&work);
    let batch = message.repeat(work.window);
    let mut config = Config::max_connections(work.conns + 1);
    let mut listen = Listen::tcp("127.0.0.1:0", framing).with(|listen| {
        listen.conn.idle_timeout = Duration::from_secs(300);
        listen.conn.max_frame = Some(1024 * 1024);
    });
    // None of them is ever reached.
    let much = Rate::per_second(1_000_000_000);
    match work.with.as_str() {
        "rates" => {
            listen.conn.read_rate = Some(much);
            listen.conn.frame_rate = Some(much);
        }
        "memory-limit" => config = config.with(|config| config.memory_limit = Some(1 << 30)),
        "source-limits" => {
            listen = listen.with(|listen| {
                listen.source_limits.connections = Some(1_000_000);
                listen.source_limits.rate = Some(much);
            })
        }
        "timer" | "tls" | "connects" | "handshakes" | "recorded" | "" => {}
        other => panic!("nothing is called {other}"),
    }
    let dial = dialer(&work.with, &mut listen);
    let timer = work.with == "timer";
    let is_by_hand = work.framing == "by-hand";
    // Raw pieces are whole windows: every read finds all that was written.
    let frames = if is_by_hand { 1 } else { work.window };
    let mut server = server(config, &work.with);
    let id = server
        .listen(listen, move |_app, _peer| Echo {
            timer,
            by_hand: is_by_hand.then(cut::ByHand::default),
        })
        .expect("a port");
    let addr = server.control().listener(id).expect("it listens").addr;
    let mut turns = 0;
    let mut echo = vec![0; batch.len()];
    if matches!(&*work.with, "connects" | "handshakes") {
        for round in 0..work.rounds as u64 {
            let mut turn = || {
                measured_turn(&mut server, Some(Duration::ZERO));
                turns += 1;
            };
            let mut client = dial(&addr, &mut turn);
            client.write_all(&batch).expect("sent");
            turn();
            client.read_exact(&mut echo).expect("the echo");
            drop(client);
            while server.control().stats().closed_total() == round {
                measured_turn(&mut server, None);
                turns += 1;
            }
        }
        // As below: the script that counts looks for it.
        return println!("{} messages in {turns} turns", work.rounds);
    }
    let mut clients: Vec<_> = (0..work.conns)
        .map(|_| {
            dial(&addr, &mut || {
                server
                    .poll_once(&mut (), Some(Duration::ZERO))
                    .expect("it polls");
            })
        })
        .collect();
    while server.control().stats().opened < work.conns as u64 {
        server.poll_once(&mut (), None).expect("it polls");
    }
    let first = server.control().stats().traffic.frames_in;
    for round in 0..work.rounds {
        for client in &mut clients {
            client.write_all(&batch).expect("sent");
        }
        let all = first + ((round + 1) * work.conns * frames) as u64;
        while server.control().stats().traffic.frames_in < all {
            measured_turn(&mut server, None);
            turns += 1;
        }
        for client in &mut clients {
            client.read_exact(&mut echo).expect("the echo");
            assert!(echo == batch, "what was sent comes back");
        }
    }
    println!(
        "{} messages in {turns} turns",
        work.conns * work.window * work.rounds
    );
}

fn server(config: Config, with: &str) -> Server {
    #[cfg(feature = "record")]
    if with == "recorded" {
        return recorded::server(config);
    }
    assert!(with != "recorded", "built without recordings");
    Server::new(config).expect("a server")
}

trait Client: Read + Write {}
impl<C: Read + Write> Client for C {}

/// Connects, and gives the server turns until both know of each other.
type Dial = Box<dyn Fn(&Addr, &mut dyn FnMut()) -> Box<dyn Client>>;

fn dial(addr: &Addr) -> TcpStream {
    let stream = TcpStream::connect(addr).expect("connected");
    stream.set_nodelay(true).expect("nodelay");
    stream
}

fn dial_plain(addr: &Addr, turn: &mut dyn FnMut()) -> Box<dyn Client> {
    let stream = dial(addr);
    turn();
    Box::new(stream)
}

#[cfg(feature = "aws-lc-rs")]
fn dialer(with: &str, listen: &mut Listen) -> Dial {
    if !matches!(with, "tls" | "handshakes") {
        return Box::new(dial_plain);
    }
    let site = site::Site::new();
    let config = site::client_config(site.certificate);
    *listen = listen.clone().tls(site.server);
    Box::new(move |addr, turn| {
        let mut client = tls::Client::new(std::sync::Arc::clone(&config), dial(addr));
        while !client.shake_hands() {
            turn();
        }
        turn();
        Box::new(client)
    })
}

#[cfg(not(feature = "aws-lc-rs"))]
fn dialer(with: &str, _: &mut Listen) -> Dial {
    assert!(!matches!(with, "tls" | "handshakes"), "built without TLS");
    Box::new(dial_plain)
}
