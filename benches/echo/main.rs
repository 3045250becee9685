//! What an echoed message and an idle connection cost: portcullis beside servers that people write
//! by hand or with a framework.
//!
//!     # Tables, and the chart in benches/echo.svg: some seven minutes.
//!     cargo bench --bench echo
//!     # Half a minute, to see that it works.
//!     cargo bench --bench echo -- --rounds 2 --seconds 0.2 --idle 1000 --chart /tmp/echo.svg
//!     # This crate alone, with and without a recording.
//!     cargo bench -p portcullis-benches --features record --bench echo -- --recorded
//!
//! Each server runs as a process of its own on one processor, the clients on another. What is
//! compared is the processor time of the server per message, in the same round as the reference (a
//! loop on mio, written for this one job), so that neither the speed of the machine nor that of the
//! clients counts. All must return the same bytes. Needs Linux, where the kernel tells a process's
//! time to the nanosecond. The servers in other languages need `cc` and `erl`; where these are
//! absent they are left out.

mod caption;
#[path = "../common/mod.rs"]
mod common;
mod foreign;
mod results;
mod servers;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use common::chart;
use common::load::{Load, Work};
use common::process::{end_with_parent, pin, Process};
use common::site::client_config;
use common::spread::Spread;
use common::tls_stream::TlsStream;
use foreign::Foreign;
use indicatif::ProgressBar;
use portcullis::tls::rustls::ClientConfig;
use results::{panels, Cost, Memory, Row};
use servers::Kind;

/// Numbers of the processors.
const SERVER: usize = 0;
const CLIENTS: usize = 1;
/// Most rounds for memory, which varies little.
const MEMORY_ROUNDS: usize = 3;

#[derive(Parser)]
pub struct Options {
    /// Rounds; the medians are shown
    #[arg(long, default_value_t = 9)]
    rounds: usize,
    /// Seconds for each server in each row of each round
    #[arg(long, default_value_t = 0.8)]
    seconds: f64,
    /// Idle connections over which memory is measured, as far as descriptors suffice; a quarter of
    /// them over TLS
    #[arg(long, default_value_t = 10_000)]
    idle: usize,
    /// Where the chart goes
    #[arg(long, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/echo.svg"))]
    chart: PathBuf,
    /// Be one of the servers: for the bench itself
    #[arg(long, hide = true)]
    serve: Option<Kind>,
    /// Measure portcullis alone, with and without a recording (feature `record`)
    #[cfg(feature = "record")]
    #[arg(long)]
    recorded: bool,
    /// Said by `cargo bench`
    #[arg(long, hide = true)]
    bench: bool,
}

impl Options {
    fn memory_rounds(&self) -> usize {
        self.rounds.min(MEMORY_ROUNDS)
    }
}

/// The load of a table, and its servers.
struct Task {
    name: &'static str,
    kinds: &'static [Kind],
    work: Work,
}

impl Task {
    const fn plain(name: &'static str, work: Work) -> Self {
        let kinds = &Kind::PLAIN;
        Self { name, kinds, work }
    }

    const fn tls(name: &'static str, work: Work) -> Self {
        let kinds = &Kind::TLS;
        Self { name, kinds, work }
    }
}

const TASKS: [Task; 6] = [
    Task::plain("64 connections, 64 bytes", Work::new(64, 1, 64)),
    Task::plain("1,000 connections, 64 bytes", Work::new(1_000, 1, 64)),
    Task::plain(
        "64 connections, 64 bytes, 16 in flight",
        Work::new(64, 16, 64),
    ),
    Task::plain("64 connections, 4,096 bytes", Work::new(64, 1, 4_096)),
    Task::tls("64 connections, 64 bytes", Work::new(64, 1, 64)),
    Task::tls("64 connections, 4,096 bytes", Work::new(64, 1, 4_096)),
];

fn main() {
    let mut options = Options::parse();
    if let Some(kind) = options.serve {
        pin(SERVER);
        end_with_parent();
        return servers::serve(kind);
    }
    if !options.bench {
        // Under `cargo test` it shows that it works.
        (options.rounds, options.seconds, options.idle) = (1, 0.05, 200);
    }
    pin(CLIENTS);
    let descriptors = common::raise_descriptor_limit() as usize;
    options.idle = options.idle.min(descriptors.saturating_sub(300));
    let foreign = Foreign::compile(&[Kind::Epoll, Kind::Erlang]);
    #[cfg(feature = "record")]
    if options.recorded {
        let progress = common::progress(TASKS.len() * options.rounds);
        for task in TASKS.iter().filter(|task| task.kinds == Kind::PLAIN) {
            let kinds = [Kind::Portcullis, Kind::Recorded];
            measure(task, &kinds, &options, &foreign, &progress);
        }
        return progress.finish_and_clear();
    }
    let memory_rounds = options.memory_rounds();
    let progress = common::progress(TASKS.len() * options.rounds + 2 * memory_rounds);
    let rows: Vec<Row> = TASKS
        .iter()
        .map(|task| {
            let kinds = foreign.present_among(task.kinds);
            measure(task, &kinds, &options, &foreign, &progress)
        })
        .collect();
    let memory = [&Kind::PLAIN[..], &Kind::TLS].map(|kinds| {
        let kinds = foreign.present_among(kinds);
        let tls = kinds[0].is_tls();
        let connections = if tls { options.idle / 4 } else { options.idle };
        idle(&kinds, memory_rounds, connections, &foreign, &progress)
    });
    progress.finish_and_clear();
    if options.bench {
        let caption = caption::caption(&options, &rows, &foreign);
        chart::draw(&options.chart, &panels(&rows, &memory), &caption)
            .expect("the chart can be written");
        println!("\n{}", options.chart.display());
    }
}

/// A server in a process of its own.
struct Running {
    process: Process,
    addr: SocketAddr,
    /// Configuration of clients that trust its certificate.
    tls: Option<Arc<ClientConfig>>,
}

impl Running {
    fn start(kind: Kind, foreign: &Foreign) -> Self {
        let mut process = match foreign.command(kind) {
            Some(mut command) => Process::start_other(&mut command, SERVER),
            None => Process::start(&["--serve", &format!("{kind:?}").to_lowercase()]),
        };
        let addr = process.line().parse().expect("an address");
        let tls = kind.is_tls().then(|| {
            let digits = process.line();
            let byte = |at| u8::from_str_radix(&digits[at..at + 2], 16).expect("a certificate");
            let certificate: Vec<u8> = (0..digits.len()).step_by(2).map(byte).collect();
            client_config(certificate.into())
        });
        Self { process, addr, tls }
    }

    fn load(&self, work: Work) -> Load {
        match &self.tls {
            None => Load::connect(self.addr, work),
            Some(config) => Load::over(work, || {
                Box::new(TlsStream::connect(self.addr, config).expect("an open connection"))
            }),
        }
    }
}

/// Measures the processor time of a message, and prints the table.
fn measure(
    task: &Task,
    kinds: &[Kind],
    options: &Options,
    foreign: &Foreign,
    progress: &ProgressBar,
) -> Row {
    let mut costs = vec![Vec::new(); kinds.len()];
    let mut rates = vec![Vec::new(); kinds.len()];
    let (servers, mut loads): (Vec<_>, Vec<_>) = kinds
        .iter()
        .map(|&kind| {
            let server = Running::start(kind, foreign);
            let load = server.load(task.work);
            (server.process, load)
        })
        .unzip();
    for round in 0..options.rounds {
        for turn in 0..servers.len() {
            let at = (turn + round) % servers.len();
            loads[at].run(Duration::from_secs_f64(options.seconds / 10.0));
            let before = servers[at].cpu();
            let span = Duration::from_secs_f64(options.seconds);
            let messages = loads[at].run(span);
            let cost = (servers[at].cpu() - before).as_secs_f64() / messages as f64;
            costs[at].push(cost * 1e6);
            rates[at].push(messages as f64 / span.as_secs_f64());
        }
        progress.inc(1);
    }
    let reference = &costs[0];
    let costs = kinds
        .iter()
        .zip(&costs)
        .zip(rates)
        .map(|((&kind, costs), rates)| Cost {
            kind,
            ratio: Spread::of(reference.iter().zip(costs).map(|(one, cost)| one / cost)),
            microseconds: common::median(costs.iter().copied()),
            rate: common::median(rates),
        });
    let row = Row {
        name: task.name,
        tls: kinds[0].is_tls(),
        costs: costs.collect(),
    };
    progress.suspend(|| row.print());
    row
}

/// Measures the memory of an idle connection that has exchanged a message, and prints the table.
fn idle(
    kinds: &[Kind],
    rounds: usize,
    connections: usize,
    foreign: &Foreign,
    progress: &ProgressBar,
) -> Memory {
    let mut bytes = vec![Vec::new(); kinds.len()];
    for _ in 0..rounds {
        for (&kind, bytes) in kinds.iter().zip(&mut bytes) {
            let server = Running::start(kind, foreign);
            // The first connections pay for what all share.
            let mut first = server.load(Work::new(100, 1, 64));
            first.run(Duration::from_millis(50));
            let before = server.process.memory();
            let _load = server.load(Work::new(connections, 1, 64));
            let more = server.process.memory().saturating_sub(before);
            bytes.push(more as f64 / connections as f64);
        }
        progress.inc(1);
    }
    let memory = Memory {
        tls: kinds[0].is_tls(),
        connections,
        bytes: kinds
            .iter()
            .zip(bytes)
            .map(|(&kind, bytes)| (kind, Spread::of(bytes)))
            .collect(),
    };
    progress.suspend(|| memory.print());
    memory
}
