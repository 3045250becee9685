//! Idle connections on real sockets: their memory, the time to take them in, what they cost at rest with an idle timeout armed on
//! each, and what the few that speak notice of them.
//!
//!     cargo bench --bench idle                                   15,000 connections to one server
//!     cargo bench --bench idle -- --connections 19900            if the limit on descriptors (ulimit -n) is 20,000
//!     cargo bench --bench idle -- --processes 54 --connections 18600
//!                                                                a million: 54 servers share the port; minutes, 8 GiB
//!
//! Servers and clients are processes of their own: the limit on descriptors holds for each. Needs Linux.

#[path = "../common/mod.rs"]
mod common;

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use clap::Parser;
use common::load::{Load, Work};
use common::process::{end_with_parent, Process};
use common::{progress_of, Echo};
use portcullis::{Config, Framing, Listen, Server};
use socket2::{Domain, Socket, Type};

/// Connections that speak.
const ACTIVE: usize = 64;

#[derive(Parser)]
struct Options {
    /// Servers, which share a port, and as many processes of clients
    #[arg(long, default_value_t = 1)]
    processes: usize,
    /// Connections of each process of clients
    #[arg(long, default_value_t = 15_000)]
    connections: usize,
    /// Seconds over which the cost at rest is measured, and latencies
    #[arg(long, default_value_t = 5)]
    seconds: u64,
    /// Be a server: for the bench itself
    #[arg(long, hide = true)]
    serve: Option<SocketAddr>,
    /// Be clients: for the bench itself
    #[arg(long, hide = true)]
    connect: Option<SocketAddr>,
    /// Where the clients are: for the bench itself
    #[arg(long, hide = true, default_value = "127.0.0.1")]
    from: Ipv4Addr,
    /// Said by `cargo bench`
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() {
    let mut options = Options::parse();
    let descriptors = common::raise_descriptor_limit() as usize;
    if let Some(addr) = options.serve {
        end_with_parent();
        return serve(addr, descriptors.saturating_sub(50));
    }
    if let Some(addr) = options.connect {
        end_with_parent();
        return connect(addr, options.from, options.connections);
    }
    if !options.bench {
        // Under `cargo test` it shows that it works.
        (options.connections, options.seconds) = (200, 0);
    }
    measure(&options);
}

/// Serves until the process ends.
fn serve(addr: SocketAddr, most: usize) {
    let mut server = Server::new(Config::max_connections(most)).expect("a server");
    let listen = Listen::tcp(addr, Framing::Packet2)
        .name("echo")
        .with(|listen| {
            listen.socket.reuse_port = true;
            listen.conn.idle_timeout = Duration::from_secs(3_600);
        });
    server.listen(listen, |_app, _peer| Echo).expect("a port");
    println!("{}", server.control().listener("echo").expect("there").addr);
    server.run(&mut ()).expect("it runs");
}

/// Connections that a process of clients begins at once, before it says so.
const TOGETHER: usize = 200;

/// Connects, hears an echo on each, says so, and is silent until the process ends.
fn connect(addr: SocketAddr, from: Ipv4Addr, connections: usize) {
    const MESSAGE: &[u8] = b"\0\x05hello";
    // The address is this process's own, so nearly all ports are free; to have the kernel look for one takes longer with each
    // connection.
    let mut ports = 1_024..=u16::MAX;
    let mut begin = |_| {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
        socket.set_reuse_address(true).expect("an option");
        let bound = ports.find(|&port| socket.bind(&SocketAddr::from((from, port)).into()).is_ok());
        bound.expect("fewer than 60,000 connections from one address");
        socket.connect(&addr.into()).expect("it listens");
        let mut stream = TcpStream::from(socket);
        stream.write_all(MESSAGE).expect("it is there");
        stream
    };
    let mut streams = Vec::with_capacity(connections);
    while streams.len() < connections {
        let mut some: Vec<TcpStream> = (0..TOGETHER.min(connections - streams.len()))
            .map(&mut begin)
            .collect();
        for stream in &mut some {
            let mut echo = [0; MESSAGE.len()];
            stream.read_exact(&mut echo).expect("an echo");
            assert_eq!(echo, MESSAGE);
        }
        streams.append(&mut some);
        println!("connected");
    }
    loop {
        std::thread::park();
    }
}

fn measure(options: &Options) {
    let span = Duration::from_secs(options.seconds);
    let mut first = Process::start(&["--serve", "127.0.0.1:0"]);
    let addr: SocketAddr = first.line().parse().expect("an address");
    let mut servers = vec![first];
    servers.extend((1..options.processes).map(|_| Process::start(&["--serve", &addr.to_string()])));
    for server in servers.iter_mut().skip(1) {
        server.line();
    }
    let total = options.processes * options.connections;

    let mut active = Load::connect(addr, Work::new(ACTIVE, 1, 64));
    let messages = active.run(span.max(Duration::from_millis(20)));
    let (alone, alone_slow) = active.latencies();
    println!(
        "{ACTIVE} alone: {messages} messages, {alone:?} in the median, 99 % within {alone_slow:?}"
    );

    let before: u64 = servers.iter().map(Process::memory).sum();
    let begun = Instant::now();
    let mut clients: Vec<Process> = (0..options.processes)
        .map(|number| {
            let from = Ipv4Addr::new(127, 1, (number / 200) as u8, (number % 200) as u8 + 1);
            let (addr, connections) = (addr.to_string(), options.connections.to_string());
            let from = from.to_string();
            Process::start(&[
                "--connect",
                &addr,
                "--from",
                &from,
                "--connections",
                &connections,
            ])
        })
        .collect();
    let progress = progress_of(total, "connections");
    let mut left = options.connections;
    while left > 0 {
        let some = TOGETHER.min(left);
        for client in &mut clients {
            assert_eq!(client.line(), "connected");
            progress.inc(some as u64);
        }
        left -= some;
    }
    let took = begun.elapsed();
    progress.finish_and_clear();
    let memory: u64 = servers.iter().map(Process::memory).sum();
    println!(
        "{total} connections in {} servers, each echoed once, in {took:.1?}",
        options.processes
    );
    println!(
        "memory: {} bytes for each",
        memory.saturating_sub(before) / total as u64
    );

    let before: Duration = servers.iter().map(Process::cpu).sum();
    std::thread::sleep(span);
    let after: Duration = servers.iter().map(Process::cpu).sum();
    println!(
        "at rest: {:?} of processor time in {span:?}",
        after - before
    );

    let messages = active.run(span.max(Duration::from_millis(20)));
    let (among, among_slow) = active.latencies();
    println!(
        "{ACTIVE} among them: {messages} messages, {among:?} in the median, 99 % within {among_slow:?}: {:.2} and {:.2} of alone",
        among.as_secs_f64() / alone.as_secs_f64(),
        among_slow.as_secs_f64() / alone_slow.as_secs_f64(),
    );
}
