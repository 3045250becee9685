//! What the server does on this system, processor and C library, in lines that are the same on all of them.
//!
//!     cargo run --bin platform
//!
//! A server on real sockets echoes frames with headers of 1, 2 and 4 bytes and is drained. Then worlds from seeds are played in
//! the simulator. The last line is a hash over all their traces.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::ExitCode;

use clap::Parser;
use kit::campaign::Plan;
use kit::net::{connect, read_to_end, spawn, tcp, Echo, Place, PATIENCE};
use kit::terminal::say;
use portcullis::{CloseReason, Config, Framing, Listen, Server};

/// Prints what the server and the simulator do on this machine.
#[derive(Debug, Parser)]
#[command(version, name = "platform")]
struct Options {
    /// How many worlds
    #[arg(long, value_name = "N", default_value_t = 40)]
    seeds: u64,
}

/// A framing, and the bytes of its header.
const FRAMINGS: [(Framing, usize); 3] = [
    (Framing::Packet1, 1),
    (Framing::Packet2, 2),
    (Framing::Packet4, 4),
];

fn main() -> ExitCode {
    let options = Options::parse();
    echo();
    match hash(options.seeds) {
        Ok(hash) => {
            say(&format!("{} worlds, hash {hash:016x}", options.seeds));
            ExitCode::SUCCESS
        }
        Err(what) => {
            say(&what);
            ExitCode::FAILURE
        }
    }
}

/// Echoes over each transport with each framing, then drains.
fn echo() {
    let place = Place::new();
    let file = place.path("socket");
    let unix = file.clone();
    let running = spawn(move || {
        let mut server = Server::new(Config::new()).expect("a server");
        for (framing, _) in FRAMINGS {
            let listen = Listen::tcp("127.0.0.1:0", framing);
            server.listen(listen, |_, _| Echo).expect("listens");
        }
        let listen = Listen::unix(&unix, Framing::Packet4);
        server.listen(listen, |_, _| Echo).expect("listens");
        (server, ())
    });

    let mut clients = Vec::new();
    for (listener, (framing, header)) in running.listeners.iter().zip(FRAMINGS) {
        let mut client = connect(tcp(&listener.addr));
        exchange(&mut client, header);
        say(&format!("{framing:?}: echoed"));
        clients.push(client);
    }
    let mut local = UnixStream::connect(&file).expect("connects");
    local.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    exchange(&mut local, 4);
    say(&format!(
        "{:?} over a Unix socket: echoed",
        Framing::Packet4
    ));

    running.handle.drain(PATIENCE).expect("the server runs");
    for mut client in clients {
        assert_eq!(read_to_end(&mut client), b"", "nothing but the end");
    }
    assert_eq!(read_to_end(&mut local), b"", "nothing but the end");
    drop(local);
    let (stats, ()) = running.finish();
    assert!(!file.exists(), "the socket's file is removed");
    assert_eq!(stats.open, 0);
    say(&format!(
        "drained: {} accepted, {} frames in, {} out, {} closed by the drain",
        stats.accepted,
        stats.traffic.frames_in,
        stats.traffic.frames_out,
        stats.closed(CloseReason::Drained)
    ));
}

/// Sends frames of several sizes up to the largest, or beyond 16 bits, and reads them back.
fn exchange(stream: &mut (impl Read + Write), header: usize) {
    let largest = [0xFF, 0xFFFF, 0x1_0001][header / 2];
    for size in [0, 1, 255, 256, 4097, largest] {
        if size > largest {
            continue;
        }
        let length = u32::try_from(size).expect("fits").to_be_bytes();
        let mut frame = length[4 - header..].to_vec();
        frame.extend((0..size).map(|at| (at % 251) as u8));
        stream.write_all(&frame).expect("writes");
        let mut answer = vec![0; frame.len()];
        stream.read_exact(&mut answer).expect("reads");
        assert!(answer == frame, "{size} bytes come back as they were");
    }
}

/// One hash over the traces of these worlds, with TLS left out.
fn hash(seeds: u64) -> Result<u64, String> {
    (0..seeds).try_fold(0, |hash: u64, seed| {
        let report = Plan::draw(seed, false).run(false);
        let report = report.map_err(|failure| format!("seed {seed} breaks: {}", failure.what))?;
        Ok(hash.rotate_left(7) ^ report.hash)
    })
}
