//! A server under a memory limit stays under it as a process, whatever thousands of hostile peers send.
#![cfg(target_os = "linux")]

use std::fs;
use std::io::Write;
use std::net::TcpStream;

use kit::net::{connect, ChildProcess};

const MIB: usize = 1024 * 1024;
const LIMIT: usize = 48 * MIB;
const PEERS: usize = 2000;

/// The most that the process has ever had in memory, in bytes (VmHWM, `proc_pid_status(5)`).
fn peak(process: u32) -> usize {
    let status = fs::read_to_string(format!("/proc/{process}/status")).expect("it runs");
    let line = status
        .lines()
        .find(|line| line.starts_with("VmHWM"))
        .expect("Linux says it");
    let kib = line.split_whitespace().nth(1).expect("a number");
    kib.parse::<usize>().expect("a number") * 1024
}

fn ping(stream: &mut TcpStream) {
    use std::io::Read;
    stream.write_all(b"\0\0\0\x05hello").expect("sent");
    let mut answer = [0; 9];
    stream.read_exact(&mut answer).expect("the echo");
    assert_eq!(&answer, b"\0\0\0\x05hello");
}

/// Each announces a frame of 8 MiB and sends of it what the server takes, round after round: without a limit that would be
/// all of it.
#[test]
fn hostile_peers_do_not_get_more_than_there_is() {
    let (limit, peers) = (LIMIT.to_string(), (PEERS + 10).to_string());
    let options = [
        "--framing",
        "packet-4",
        "--memory-limit",
        &limit,
        "--max-connections",
        &peers,
    ];
    let (server, addr) = ChildProcess::echo(&options);
    let before = peak(server.process());
    let mut honest = connect(addr);
    ping(&mut honest);
    let mut hostile: Vec<TcpStream> = (0..PEERS)
        .map(|_| {
            let mut stream = connect(addr);
            stream
                .write_all(&0x0080_0000_u32.to_be_bytes())
                .expect("sent");
            stream.set_nonblocking(true).expect("nonblocking");
            stream
        })
        .collect();
    let chunk = vec![b'x'; 16 * 1024];
    let mut sent = 0;
    for _ in 0..16 {
        for stream in &mut hostile {
            // Full, or closed by the server: both are as it should be.
            sent += stream.write(&chunk).unwrap_or(0);
        }
        ping(&mut honest);
        ping(&mut connect(addr));
    }
    let grown = peak(server.process()) - before;
    assert!(sent > 3 * LIMIT, "{sent} bytes are no attack");
    // A connection's own memory besides its buffers, the shared read buffer, the pool's spare
    // buffers.
    let besides = PEERS * 1024 + 16 * MIB;
    assert!(grown < LIMIT + besides, "{} MiB", grown / MIB);
    assert!(grown > LIMIT / 4, "{} MiB: nothing was held", grown / MIB);
    ping(&mut honest);
}
