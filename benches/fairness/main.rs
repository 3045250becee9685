//! What a hundred clients that ping once in ten milliseconds notice of one that sends as fast as it can, and of a storm of TLS
//! handshakes: their latencies beside those of a quiet server.
//!
//!     cargo bench --bench fairness
//!
//! The server has one processor. The clients have the other, and the pinging ones have priority
//! there. Needs Linux.

#[path = "../common/mod.rs"]
mod common;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::{Parser, ValueEnum};
use common::process::{end_with_parent, pin, Process};
use common::Echo;
use mio::{Events, Interest, Poll, Token};
use portcullis::tls::rustls::pki_types::pem::PemObject;
use portcullis::tls::rustls::pki_types::CertificateDer;
use portcullis::tls::rustls::{ClientConnection, StreamOwned};
use portcullis::{Config, Framing, Listen, Server};

const CLIENTS: usize = 100;
const INTERVAL: Duration = Duration::from_millis(10);
const PATIENCE: Duration = Duration::from_secs(10);
const PING: &[u8] = b"\0\x05hello";

#[derive(Parser)]
struct Options {
    /// Seconds of each measurement
    #[arg(long, default_value_t = 5.0)]
    seconds: f64,
    /// Rounds; the medians are shown
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Be the server: for the bench itself
    #[arg(long, hide = true)]
    serve: bool,
    /// Be a nuisance: for the bench itself
    #[arg(long, hide = true, requires_all = ["addr", "certificate"])]
    annoy: Option<Nuisance>,
    /// Which role: for the bench itself
    #[arg(long, hide = true)]
    addr: Option<SocketAddr>,
    /// What it trusts: for the bench itself
    #[arg(long, hide = true)]
    certificate: Option<PathBuf>,
    /// Said by `cargo bench`
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Nuisance {
    /// Sends frames as fast as it can, and reads what comes back.
    Flood,
    /// Connects, shakes hands, and goes.
    Handshakes,
}

fn main() {
    let mut options = Options::parse();
    if options.serve {
        pin(0);
        end_with_parent();
        return serve();
    }
    pin(1);
    if let (Some(nuisance), Some(addr), Some(certificate)) =
        (options.annoy, options.addr, &options.certificate)
    {
        end_with_parent();
        return match nuisance {
            Nuisance::Flood => flood(addr),
            Nuisance::Handshakes => handshakes(addr, certificate),
        };
    }
    if !options.bench {
        // Under `cargo test` it shows that it works.
        (options.seconds, options.rounds) = (0.1, 1);
    }
    measure(&options);
}

/// Serves plain and TLS until the process ends.
fn serve() {
    let site = rcgen::generate_simple_self_signed(["localhost".to_owned()]).expect("a certificate");
    let chain =
        std::env::temp_dir().join(format!("portcullis-fairness-{}.pem", std::process::id()));
    let key = chain.with_extension("key");
    std::fs::write(&chain, site.cert.pem()).expect("a file");
    std::fs::write(&key, site.signing_key.serialize_pem()).expect("a file");
    let tls = portcullis::tls::server_config(&chain, &key).expect("a certificate");
    std::fs::remove_file(&key).expect("it is there");
    let mut server = Server::new(Config::max_connections(4_000)).expect("a server");
    let listen = |name| Listen::tcp("127.0.0.1:0", Framing::Packet2).name(name);
    server
        .listen(listen("plain"), |_app, _peer| Echo)
        .expect("a port");
    server
        .listen(listen("tls").tls(tls), |_app, _peer| Echo)
        .expect("a port");
    println!(
        "{}",
        server.control().listener("plain").expect("there").addr
    );
    println!("{}", server.control().listener("tls").expect("there").addr);
    println!("{}", chain.display());
    server.run(&mut ()).expect("it runs");
}

fn flood(addr: SocketAddr) {
    let mut writer = TcpStream::connect(addr).expect("it listens");
    let mut reader = writer.try_clone().expect("a socket");
    std::thread::spawn(move || {
        let mut echoed = vec![0; 256 * 1024];
        while reader.read(&mut echoed).is_ok_and(|count| count > 0) {}
    });
    println!("begun");
    let batch = PING.repeat(10_000);
    while writer.write_all(&batch).is_ok() {}
}

fn handshakes(addr: SocketAddr, certificate: &PathBuf) {
    let certificate = CertificateDer::from_pem_file(certificate).expect("a certificate");
    let config = common::site::client_config(certificate);
    println!("begun");
    let begun = Instant::now();
    let mut told = begun;
    for count in 1_u32.. {
        let name = "localhost".try_into().expect("a name");
        let session = ClientConnection::new(Arc::clone(&config), name).expect("a client");
        let socket = TcpStream::connect(addr).expect("it listens");
        socket.set_nodelay(true).expect("a socket");
        let mut stream = StreamOwned::new(session, socket);
        stream.write_all(PING).expect("it is there");
        stream.read_exact(&mut [0; PING.len()]).expect("an echo");
        if told.elapsed() > Duration::from_millis(100) {
            told = Instant::now();
            println!("{:.0}", f64::from(count) / begun.elapsed().as_secs_f64());
        }
    }
}

fn measure(options: &Options) {
    let mut server = Process::start(&["--serve"]);
    let (plain, tls, certificate) = (server.line(), server.line(), server.line());
    let mut pings = Pings::connect(plain.parse().expect("an address"));
    let span = Duration::from_secs_f64(options.seconds);
    pings.run(span / 10);
    println!(
        "| {CLIENTS} clients, a ping each in {INTERVAL:?} | median | 99 % within | of quiet |"
    );
    println!("|---|---|---|---|");
    let (mut rows, mut rates) = (vec![Vec::new(); 3], Vec::new());
    let progress = common::progress(options.rounds);
    for _ in 0..options.rounds {
        let quiet = pings.run(span);
        rows[0].push((quiet, 1.0));
        for (row, nuisance, addr) in [(1, "flood", &plain), (2, "handshakes", &tls)] {
            let arguments = [
                "--annoy",
                nuisance,
                "--addr",
                addr,
                "--certificate",
                &certificate,
            ];
            let mut annoying = Process::start_nicely(&arguments);
            assert_eq!(annoying.line(), "begun");
            let annoyed = pings.run(span);
            rows[row].push((annoyed, annoyed.1.as_secs_f64() / quiet.1.as_secs_f64()));
            if row == 2 {
                rates.push(annoying.line().parse().expect("a number"));
            }
        }
        progress.inc(1);
    }
    progress.finish_and_clear();
    for (name, row) in ["quiet", "beside a flood", "beside TLS handshakes"]
        .iter()
        .zip(rows)
    {
        let middle =
            |of: fn(&((Duration, Duration), f64)) -> f64| common::median(row.iter().map(of));
        let typical = middle(|row| row.0 .0.as_secs_f64() * 1e6);
        let slow = middle(|row| row.0 .1.as_secs_f64() * 1e6);
        println!(
            "| {name} | {typical:.0} µs | {slow:.0} µs | {:.1} |",
            middle(|row| row.1)
        );
    }
    println!("\n{:.0} handshakes a second", common::median(rates));
    let _ = std::fs::remove_file(certificate);
}

/// The pinging clients, evenly spread over the interval.
struct Pings {
    poll: Poll,
    streams: Vec<mio::net::TcpStream>,
}

impl Pings {
    fn connect(addr: SocketAddr) -> Self {
        let poll = Poll::new().expect("a poll");
        let connect = |at| {
            let stream = TcpStream::connect(addr).expect("it listens");
            stream.set_nodelay(true).expect("a socket");
            stream.set_nonblocking(true).expect("a socket");
            let mut stream = mio::net::TcpStream::from_std(stream);
            let registry = poll.registry();
            registry
                .register(&mut stream, Token(at), Interest::READABLE)
                .expect("a poll");
            stream
        };
        let streams = (0..CLIENTS).map(connect).collect();
        Self { poll, streams }
    }

    /// The median and the 99th percentile of all answers.
    fn run(&mut self, span: Duration) -> (Duration, Duration) {
        let begun = Instant::now();
        let mut events = Events::with_capacity(CLIENTS);
        let mut asked = [None; CLIENTS];
        let (mut number, mut latencies) = (0, Vec::new());
        loop {
            let due = begun + INTERVAL * number / CLIENTS as u32;
            let over = begun.elapsed() >= span;
            if over && asked.iter().all(Option::is_none) {
                break;
            }
            let now = Instant::now();
            if !over && now >= due {
                let at = number as usize % CLIENTS;
                if asked[at].is_none() {
                    asked[at] = Some(now);
                    self.streams[at].write_all(PING).expect("it is there");
                }
                number += 1;
                continue;
            }
            let patience = if over { PATIENCE } else { due - now };
            self.poll.poll(&mut events, Some(patience)).expect("a poll");
            assert!(!over || !events.is_empty(), "the server does not answer");
            for event in &events {
                let at = event.token().0;
                let mut answer = [0; 64];
                match self.streams[at].read(&mut answer) {
                    Ok(count) => assert_eq!(&answer[..count], PING),
                    Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => continue,
                    Err(error) => panic!("the server let a client go: {error}"),
                }
                latencies.extend(asked[at].take().map(|asked| asked.elapsed()));
            }
        }
        latencies.sort_unstable();
        let at = |per_cent: usize| {
            latencies
                .get(latencies.len() * per_cent / 100)
                .copied()
                .unwrap_or_default()
        };
        (at(50), at(99))
    }
}
