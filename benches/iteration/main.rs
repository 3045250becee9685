//! How long one call of `poll_once` takes when everything is due at once: the median, the 99th percentile and the maximum over
//! all calls until the work is done.
//!
//!     cargo bench --bench iteration
//!
//! The server and its clients are on one thread: only the calls are measured, in processor time, so
//! that other programs do not count.

#[path = "../common/mod.rs"]
mod common;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use clap::Parser;
use common::{raise_descriptor_limit, Echo};
use nix::time::{clock_gettime, ClockId};
use portcullis::{Config, Context, Framing, Handler, Listen, Outcome, Server};

#[derive(Parser)]
struct Options {
    /// Number of peers
    #[arg(long, default_value_t = 1000)]
    peers: usize,
    /// Rounds of each load
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Said by `cargo bench`
    #[arg(long, hide = true)]
    bench: bool,
}

/// Sets a timer for each frame, all for the same time.
struct Timed;

impl Handler for Timed {
    fn on_frame(&mut self, cx: &mut Context<'_>, _: &[u8]) -> Outcome {
        cx.conn.set_timer(0, Duration::from_millis(50));
        Ok(())
    }

    fn on_timer(&mut self, cx: &mut Context<'_>, _: u8) -> Outcome {
        cx.conn.send(b"due")?;
        Ok(())
    }
}

fn main() {
    let mut options = Options::parse();
    raise_descriptor_limit();
    if !options.bench {
        // Under `cargo test` it shows that it works.
        (options.peers, options.rounds) = (20, 1);
    }
    println!(
        "{:<28} {:>10} {:>10} {:>10} {:>8}",
        "load", "p50", "p99", "max", "calls"
    );
    let progress = common::progress(5 * options.rounds);
    let frame = |length: u16| {
        let mut frame = length.to_be_bytes().to_vec();
        frame.resize(2 + usize::from(length), 7);
        frame
    };
    for (name, unit, bytes) in [
        ("64 KiB of empty frames", frame(0), 64 << 10),
        ("64 KiB of 1 KiB frames", frame(1024), 64 << 10),
        ("one frame of 64 KiB", frame(65_000), 65_002),
        ("one frame of 5 bytes", frame(5), 7),
    ] {
        let wire = unit.repeat(bytes / unit.len());
        let mut calls = Vec::new();
        for _ in 0..options.rounds {
            let (mut server, addr) = server(|| Echo);
            let mut clients = connect(&mut server, addr, options.peers, &mut Vec::new());
            for client in &mut clients {
                client.write_all(&wire).expect("room in the kernel");
            }
            let all = (wire.len() * options.peers) as u64;
            measure(&mut server, &mut calls, |server| {
                server.control().stats().traffic.bytes_in == all
            });
            progress.inc(1);
        }
        progress.suspend(|| report(name, calls));
    }
    let (mut accepts, mut timers, mut closes) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..options.rounds {
        let (mut server, addr) = server(|| Timed);
        let mut clients = connect(&mut server, addr, options.peers, &mut accepts);
        for client in &mut clients {
            client.write_all(&frame(0)).expect("room in the kernel");
        }
        measure(&mut server, &mut Vec::new(), |server| {
            server.control().stats().traffic.frames_in == options.peers as u64
        });
        std::thread::sleep(Duration::from_millis(60));
        measure(&mut server, &mut timers, |server| {
            server.control().stats().traffic.frames_out == options.peers as u64
        });
        for client in &mut clients {
            client.read_exact(&mut [0; 5]).expect("an answer");
        }
        server.control().drain(Duration::ZERO);
        measure(&mut server, &mut closes, |server| {
            server.control().stats().open == 0
        });
        progress.inc(1);
    }
    progress.finish_and_clear();
    report("clients that connect", accepts);
    report("timers for the same time", timers);
    report("a drain without grace", closes);
}

fn server<H: Handler + 'static>(handler: fn() -> H) -> (Server, SocketAddr) {
    let mut server = Server::new(Config::max_connections(1 << 16)).expect("a server");
    let listen =
        Listen::tcp("127.0.0.1:0", Framing::Packet2).with(|listen| listen.socket.backlog = 4096);
    let id = server
        .listen(listen, move |_app, _peer| handler())
        .expect("a port");
    let addr = server.control().listener(id).expect("it is there").addr;
    (server, addr.as_tcp().expect("a TCP port"))
}

/// Connects in groups that fit into the backlog.
fn connect(
    server: &mut Server,
    addr: SocketAddr,
    count: usize,
    calls: &mut Vec<Duration>,
) -> Vec<TcpStream> {
    let mut clients = Vec::new();
    while clients.len() < count {
        for _ in 0..1000.min(count - clients.len()) {
            clients.push(TcpStream::connect(addr).expect("room in the backlog"));
        }
        let open = clients.len();
        measure(server, calls, |server| {
            server.control().stats().open == open
        });
    }
    clients
}

/// Calls `poll_once` until `done`.
fn measure(server: &mut Server, calls: &mut Vec<Duration>, done: impl Fn(&mut Server) -> bool) {
    let begun = Instant::now();
    while !done(server) || server.next_timeout() == Some(Duration::ZERO) {
        let start = processor_time();
        server
            .poll_once(&mut (), Some(Duration::ZERO))
            .expect("it runs");
        calls.push(processor_time() - start);
        assert!(begun.elapsed() < Duration::from_secs(60), "it has an end");
    }
}

/// Of this thread.
fn processor_time() -> Duration {
    let clock = ClockId::CLOCK_THREAD_CPUTIME_ID;
    clock_gettime(clock).expect("a clock").into()
}

fn report(name: &str, mut calls: Vec<Duration>) {
    calls.sort();
    let at = |part: f64| {
        let last = calls.len().saturating_sub(1);
        let index = (part * last as f64).round() as usize;
        let call = calls.get(index).copied().unwrap_or_default();
        format!("{:.2} ms", call.as_secs_f64() * 1e3)
    };
    println!(
        "{name:<28} {:>10} {:>10} {:>10} {:>8}",
        at(0.5),
        at(0.99),
        at(1.0),
        calls.len()
    );
}
