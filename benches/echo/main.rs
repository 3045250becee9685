//! What an echoed message costs: portcullis beside servers that people write by hand or with a framework.
//!
//!     cargo bench --bench echo                      a table, and the chart in benches/echo.svg
//!     cargo bench --bench echo -- --rounds 9 --seconds 2
//!     cargo bench -p portcullis-benches --features record --bench echo -- --recorded   portcullis, and while it is recorded
//!
//! Each server runs as a process of its own on one processor, the clients on another. What is compared is the processor time
//! of the server per message, in the same round as the reference (a loop on mio, written for this one job), so that neither
//! the speed of the machine nor that of the clients counts. All must return the same bytes. Needs Linux, where the kernel
//! tells a process's time to the nanosecond.

mod chart;
#[path = "../common/mod.rs"]
mod common;
mod servers;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;
use common::load::{Load, Work};
use common::median;
use common::process::{end_with_parent, pin, Process};
use indicatif::ProgressBar;
use servers::Kind;

/// Idle connections over which memory is measured; their descriptors fit into 4,096.
const IDLE: usize = 2_000;

#[derive(Parser)]
struct Options {
    /// Rounds; the medians are shown
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Seconds for each server in each row of each round
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
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

/// One row of the table.
struct Row {
    name: &'static str,
    work: Work,
}

const ROWS: [Row; 4] = [
    Row {
        name: "64 connections, 64 bytes",
        work: Work::new(64, 1, 64),
    },
    Row {
        name: "1,000 connections, 64 bytes",
        work: Work::new(1_000, 1, 64),
    },
    Row {
        name: "64 connections, 64 bytes, 16 in flight",
        work: Work::new(64, 16, 64),
    },
    Row {
        name: "64 connections, 4,096 bytes",
        work: Work::new(64, 1, 4_096),
    },
];

fn main() {
    let mut options = Options::parse();
    if let Some(kind) = options.serve {
        pin(0);
        end_with_parent();
        return servers::serve(kind);
    }
    if !options.bench {
        // Under `cargo test` it shows that it works.
        (options.rounds, options.seconds) = (1, 0.05);
    }
    pin(1);
    common::raise_descriptor_limit();
    let mut charts = Vec::new();
    let progress = common::progress(ROWS.len() * options.rounds);
    #[cfg(feature = "record")]
    if options.recorded {
        for row in &ROWS {
            let kinds = [Kind::Portcullis, Kind::Recorded];
            measure(row, &kinds, &options, &progress);
        }
        return progress.finish_and_clear();
    }
    for row in &ROWS {
        let ratios = measure(row, &Kind::ALL, &options, &progress);
        charts.push((row.name, ratios));
    }
    progress.finish_and_clear();
    let idle = idle();
    if options.bench {
        chart::draw(&options.chart, &charts, &idle).expect("the chart can be written");
        println!("\n{}", options.chart.display());
    }
}

/// A server in a process of its own, and where it listens.
fn start(kind: Kind) -> (Process, SocketAddr) {
    let mut server = Process::start(&["--serve", &format!("{kind:?}").to_lowercase()]);
    let addr = server.line().parse().expect("an address");
    (server, addr)
}

/// One row: the table is printed, the ratios are returned.
fn measure(
    row: &Row,
    kinds: &[Kind],
    options: &Options,
    progress: &ProgressBar,
) -> Vec<(Kind, f64)> {
    let mut costs = vec![Vec::new(); kinds.len()];
    let mut rates = vec![Vec::new(); kinds.len()];
    let (servers, mut loads): (Vec<_>, Vec<_>) = kinds
        .iter()
        .map(|&kind| {
            let (server, addr) = start(kind);
            (server, Load::connect(addr, row.work))
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
    progress.suspend(|| report(row, kinds, costs, rates))
}

/// Prints the table of one row, and returns the ratios.
fn report(
    row: &Row,
    kinds: &[Kind],
    costs: Vec<Vec<f64>>,
    rates: Vec<Vec<f64>>,
) -> Vec<(Kind, f64)> {
    println!("\n{}\n", row.name);
    println!(
        "| server | processor time per message | messages per second | as cheap as {} |",
        kinds[0].name()
    );
    println!("|---|---|---|---|");
    let reference = costs[0].clone();
    let table = kinds
        .iter()
        .zip(costs)
        .zip(rates)
        .map(|((&kind, costs), rates)| {
            let ratio = median(reference.iter().zip(&costs).map(|(one, cost)| one / cost));
            println!(
                "| {} | {:.2} µs | {:.0} | {ratio:.2} |",
                kind.name(),
                median(costs),
                median(rates)
            );
            (kind, ratio)
        });
    table.collect()
}

/// Memory per idle connection that has exchanged a message.
fn idle() -> Vec<(Kind, f64)> {
    println!("\n{IDLE} idle connections\n\n| server | bytes per connection |\n|---|---|");
    let table = Kind::ALL.iter().map(|&kind| {
        let (server, addr) = start(kind);
        // What the first ones cost is not theirs.
        let mut first = Load::connect(addr, Work::new(100, 1, 64));
        first.run(Duration::from_millis(50));
        let before = server.memory();
        let mut load = Load::connect(addr, Work::new(IDLE, 1, 64));
        load.run(Duration::ZERO);
        let bytes = server.memory().saturating_sub(before) as f64 / IDLE as f64;
        println!("| {} | {bytes:.0} |", kind.name());
        (kind, bytes)
    });
    table.collect()
}
