//! What the parts cost, each by itself: decoders, the connection plain and over TLS, the loop. On the simulated kernel, so that
//! no system call is in the figures; what they have in common is the copying through its buffers.
//!
//!     cargo bench --bench parts

use std::io::IsTerminal;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use criterion::{criterion_group, criterion_main, BenchmarkId, Criterion, Throughput};
use portcullis::sim::{ClientId, Sim};
use portcullis::{Config, Context, Framing, Handler, Listen, Outcome, Quota};

/// Number of benchmarks: decoders, the loop, plain and TLS, at rest.
const BENCHMARKS: usize = 5 + 3 + TLS_BENCHMARKS + 2;
const TLS_BENCHMARKS: usize = if cfg!(feature = "aws-lc-rs") { 6 } else { 0 };

/// Looks at every frame and says nothing.
struct Sink;

impl Handler for Sink {
    fn on_frame(&mut self, _: &mut Context<'_>, frame: &[u8]) -> Outcome {
        std::hint::black_box(frame);
        Ok(())
    }
}

struct Echo;

impl Handler for Echo {
    fn on_frame(&mut self, cx: &mut Context<'_>, frame: &[u8]) -> Outcome {
        cx.conn.send(frame)?;
        Ok(())
    }
}

fn world(connections: usize, mut listen: Listen, echo: bool) -> (Sim, SocketAddr, Vec<ClientId>) {
    let config = Config::max_connections(connections)
        .with(|config| config.pending_limits.connections = Quota::Count(connections));
    let mut sim = Sim::new(1, config, ());
    sim.set_checks(false);
    listen.socket.backlog = 1024;
    let addr = if echo {
        sim.listen(listen, |_app, _peer| Echo)
    } else {
        sim.listen(listen, |_app, _peer| Sink)
    };
    let addr = addr.expect("a listener");
    let mut clients = Vec::new();
    while clients.len() < connections {
        match sim.connect(addr) {
            Some(client) => clients.push(client),
            None => sim.settle(),
        }
    }
    sim.settle();
    (sim, addr, clients)
}

/// Times the server alone: what `prepare` does before each round is not counted.
fn timed<W>(
    rounds: u64,
    world: &mut W,
    prepare: impl Fn(&mut W),
    run: impl Fn(&mut W),
) -> Duration {
    let mut total = Duration::ZERO;
    for _ in 0..rounds {
        prepare(world);
        let begun = Instant::now();
        run(world);
        total += begun.elapsed();
    }
    total
}

/// A benchmark begins: n of N and the time left, on a terminal alone, above what criterion shows in
/// place.
fn begin() {
    static BEGUN: AtomicUsize = AtomicUsize::new(0);
    static START: OnceLock<Instant> = OnceLock::new();
    let done = BEGUN.fetch_add(1, Ordering::Relaxed);
    let took = START.get_or_init(Instant::now).elapsed();
    if !std::io::stderr().is_terminal() {
        return;
    }
    let left = match done {
        0 => String::new(),
        done => {
            let each = took / done as u32;
            let left = each * BENCHMARKS.saturating_sub(done) as u32;
            format!(
                ", {:.1} s each, {:.0} s left",
                each.as_secs_f64(),
                left.as_secs_f64()
            )
        }
    };
    eprintln!("benchmark {} of {BENCHMARKS}{left}", done + 1);
}

fn frame(framing: &Framing, payload: usize) -> Vec<u8> {
    let mut frame = match framing {
        Framing::Packet1 => vec![payload as u8],
        Framing::Packet2 => (payload as u16).to_be_bytes().to_vec(),
        Framing::Packet4 => (payload as u32).to_be_bytes().to_vec(),
        _ => Vec::new(),
    };
    frame.resize(frame.len() + payload, b'x');
    if matches!(framing, Framing::Line) {
        frame.push(b'\n');
    }
    frame
}

/// Frames of 64 bytes, as many as fit into one read.
fn decoders(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("decode 64-byte frames");
    let framings = [
        ("raw", Framing::Raw),
        ("packet-1", Framing::Packet1),
        ("packet-2", Framing::Packet2),
        ("packet-4", Framing::Packet4),
        ("line", Framing::Line),
    ];
    for (name, framing) in framings {
        let bytes = frame(&framing, 64);
        let batch = bytes.repeat(60_000 / bytes.len());
        let (mut sim, _, clients) = world(1, Listen::tcp("127.0.0.1:0", framing), false);
        group.throughput(Throughput::Bytes(batch.len() as u64));
        begin();
        group.bench_function(name, |bencher| {
            bencher.iter_custom(|rounds| {
                timed(
                    rounds,
                    &mut sim,
                    |sim| sim.send(clients[0], &batch),
                    |sim| sim.settle(),
                )
            });
        });
    }
    group.finish();
}

/// One message on each of the connections, echoed.
fn reactor(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("echo 64 bytes on each of");
    let bytes = frame(&Framing::Packet2, 64);
    for connections in [1, 64, 1_000] {
        let (sim, _, clients) = world(
            connections,
            Listen::tcp("127.0.0.1:0", Framing::Packet2),
            true,
        );
        let mut world = (sim, clients);
        group.throughput(Throughput::Elements(connections as u64));
        let id = BenchmarkId::from_parameter(format!("{connections} connections"));
        begin();
        group.bench_function(id, |bencher| {
            bencher.iter_custom(|rounds| {
                let prepare = |(sim, clients): &mut (Sim, Vec<ClientId>)| {
                    for &client in clients.iter() {
                        sim.received(client);
                        sim.send(client, &bytes);
                    }
                };
                timed(rounds, &mut world, prepare, |(sim, _)| sim.settle())
            });
        });
    }
    group.finish();
}

/// A turn in which nothing happens, among connections that are idle and have a deadline each.
fn at_rest(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("a turn beside idle connections");
    for connections in [1_000, 1_000_000] {
        let (mut sim, _, _) = world(
            connections,
            Listen::tcp("127.0.0.1:0", Framing::Packet2),
            false,
        );
        begin();
        group.bench_function(BenchmarkId::from_parameter(connections), |bencher| {
            bencher.iter(|| sim.step());
        });
    }
    group.finish();
}

#[cfg(feature = "aws-lc-rs")]
mod tls {
    use std::io::Write;
    use std::sync::Arc;

    use portcullis::tls::rustls::crypto::aws_lc_rs::default_provider;
    use portcullis::tls::rustls::pki_types::PrivatePkcs8KeyDer;
    use portcullis::tls::rustls::{
        version, ClientConfig, ClientConnection, RootCertStore, ServerConfig,
    };

    use super::*;

    struct Client {
        sim: Sim,
        id: ClientId,
        tls: ClientConnection,
    }

    impl Client {
        /// Carries what has come to the client, and what it says back.
        fn exchange(&mut self) {
            let came = self.sim.received(self.id);
            let mut came = came.as_slice();
            while !came.is_empty() {
                self.tls.read_tls(&mut came).expect("in memory");
                let read = self
                    .tls
                    .process_new_packets()
                    .expect("TLS")
                    .plaintext_bytes_to_read();
                std::io::copy(
                    &mut std::io::Read::take(self.tls.reader(), read as u64),
                    &mut std::io::sink(),
                )
                .expect("in memory");
            }
            self.speak();
        }

        fn speak(&mut self) {
            let mut bytes = Vec::new();
            while self.tls.wants_write() {
                self.tls.write_tls(&mut bytes).expect("in memory");
            }
            self.sim.send(self.id, &bytes);
        }
    }

    fn connected(listen: Listen) -> Client {
        let site =
            rcgen::generate_simple_self_signed(["localhost".to_owned()]).expect("a certificate");
        let certificate = site.cert.der().clone();
        let key = PrivatePkcs8KeyDer::from(site.signing_key.serialize_der());
        let provider = Arc::new(default_provider());
        let server = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[&version::TLS13])
            .expect("a version")
            .with_no_client_auth()
            .with_single_cert(vec![certificate.clone()], key.into())
            .expect("a certificate");
        let mut roots = RootCertStore::empty();
        roots.add(certificate).expect("a certificate");
        let client = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&version::TLS13])
            .expect("a version")
            .with_root_certificates(roots)
            .with_no_client_auth();
        let (sim, _, clients) = world(1, listen.tls(Arc::new(server)), true);
        let tls = ClientConnection::new(Arc::new(client), "localhost".try_into().expect("a name"))
            .expect("a client");
        let mut client = Client {
            sim,
            id: clients[0],
            tls,
        };
        client.speak();
        while client.sim.stats().opened == 0 {
            client.sim.settle();
            client.exchange();
        }
        client
    }

    /// The same bytes echoed, plain and encrypted. Only the server is timed.
    pub(super) fn machine(criterion: &mut Criterion) {
        let mut group = criterion.benchmark_group("echo 16 KiB as");
        for payload in [64, 4_096, 16_000] {
            let bytes = frame(&Framing::Packet2, payload);
            let batch = bytes.repeat(16_384 / bytes.len());
            group.throughput(Throughput::Bytes(batch.len() as u64));
            let listen = || Listen::tcp("127.0.0.1:0", Framing::Packet2);
            let (mut sim, _, clients) = world(1, listen(), true);
            begin();
            group.bench_function(BenchmarkId::new("plain, frames of", payload), |bencher| {
                let prepare = |sim: &mut Sim| {
                    sim.received(clients[0]);
                    sim.send(clients[0], &batch);
                };
                bencher.iter_custom(|rounds| timed(rounds, &mut sim, prepare, |sim| sim.settle()));
            });
            let mut client = connected(listen());
            begin();
            group.bench_function(BenchmarkId::new("TLS 1.3, frames of", payload), |bencher| {
                let prepare = |client: &mut Client| {
                    client.exchange();
                    client.tls.writer().write_all(&batch).expect("in memory");
                    client.speak();
                };
                bencher.iter_custom(|rounds| {
                    timed(rounds, &mut client, prepare, |client| client.sim.settle())
                });
            });
        }
        group.finish();
    }
}

#[cfg(not(feature = "aws-lc-rs"))]
mod tls {
    pub(super) fn machine(_: &mut super::Criterion) {}
}

criterion_group!(benches, decoders, reactor, tls::machine, at_rest);
criterion_main!(benches);
