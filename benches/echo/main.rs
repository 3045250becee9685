//! What an echoed message costs: portcullis beside servers that people write by hand or with a framework.
//!
//!     cargo bench --bench echo                      a table, and the chart in benches/echo.svg
//!     cargo bench --bench echo -- --rounds 9 --seconds 2
//!
//! Each server runs as a process of its own on one processor, the clients on another. What is compared is the processor time
//! of the server per message, in the same round as the reference (a loop on mio, written for this one job), so that neither
//! the speed of the machine nor that of the clients counts. All must return the same bytes. Needs Linux, where the kernel
//! tells a process's time to the nanosecond.

mod chart;
mod load;
mod servers;

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use clap::Parser;
use load::{Load, Work};
use nix::sys::resource::{getrlimit, setrlimit, Resource};
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
    #[arg(long, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/echo.svg"))]
    chart: PathBuf,
    /// Be one of the servers: for the bench itself
    #[arg(long, hide = true)]
    serve: Option<Kind>,
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

/// A server in a process of its own, until it is dropped.
struct Running {
    child: Child,
    addr: SocketAddr,
}

impl Running {
    fn start(kind: Kind) -> Self {
        let me = std::env::current_exe().expect("a program");
        let mut child = Command::new(me)
            .args(["--serve", &format!("{kind:?}").to_lowercase()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("a process");
        let mut line = String::new();
        let out = child.stdout.take().expect("piped");
        BufReader::new(out).read_line(&mut line).expect("a line");
        let addr = line.trim().parse().expect("the address where it listens");
        Self { child, addr }
    }

    /// Processor time so far, of all its threads.
    fn cpu(&self) -> Duration {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.child.id())).expect("Linux's /proc");
        let times = tasks.flatten().filter_map(|task| {
            let line = std::fs::read_to_string(task.path().join("schedstat")).ok()?;
            line.split(' ').next()?.parse::<u64>().ok()
        });
        Duration::from_nanos(times.sum())
    }

    /// Bytes that are its own: not those of the program and its libraries.
    fn memory(&self) -> u64 {
        let rollup = std::fs::read_to_string(format!("/proc/{}/smaps_rollup", self.child.id())).expect("Linux's /proc");
        let line = rollup.lines().find(|line| line.starts_with("Private_Dirty:"));
        let kib = line.and_then(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok());
        kib.expect("a number") * 1024
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Processor number `wanted`, if there is one: servers on the first, clients on the second.
#[cfg(target_os = "linux")]
fn pin(wanted: usize) {
    use nix::sched::{sched_setaffinity, CpuSet};
    use nix::unistd::Pid;

    let mut processors = CpuSet::new();
    if processors.set(wanted).is_ok() {
        let _ = sched_setaffinity(Pid::from_raw(0), &processors);
    }
}

#[cfg(not(target_os = "linux"))]
fn pin(_: usize) {}

fn main() {
    let mut options = Options::parse();
    if let Some(kind) = options.serve {
        pin(0);
        return servers::serve(kind);
    }
    if !options.bench {
        // Under `cargo test` it shows that it works.
        (options.rounds, options.seconds) = (1, 0.05);
    }
    pin(1);
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
    let mut charts = Vec::new();
    for row in &ROWS {
        let ratios = measure(row, &options);
        charts.push((row.name, ratios));
    }
    let idle = idle();
    if options.bench {
        chart::draw(&options.chart, &charts, &idle).expect("the chart can be written");
        println!("\n{}", options.chart.display());
    }
}

/// One row: the table is printed, the ratios are returned.
fn measure(row: &Row, options: &Options) -> Vec<(Kind, f64)> {
    println!("\n{}\n", row.name);
    println!("| server | processor time per message | messages per second | as cheap as mio by hand |");
    println!("|---|---|---|---|");
    let mut costs = vec![Vec::new(); Kind::ALL.len()];
    let mut rates = vec![Vec::new(); Kind::ALL.len()];
    let servers: Vec<Running> = Kind::ALL.iter().map(|&kind| Running::start(kind)).collect();
    let mut loads: Vec<Load> = servers
        .iter()
        .map(|server| Load::connect(server.addr, row.work))
        .collect();
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
    }
    let reference = costs[0].clone();
    let table = Kind::ALL.iter().zip(costs).zip(rates).map(|((&kind, costs), rates)| {
        let ratios = reference.iter().zip(&costs).map(|(one, cost)| one / cost).collect();
        let ratio = median(ratios);
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
        let server = Running::start(kind);
        // What the first ones cost is not theirs.
        let mut first = Load::connect(server.addr, Work::new(100, 1, 64));
        first.run(Duration::from_millis(50));
        let before = server.memory();
        let mut load = Load::connect(server.addr, Work::new(IDLE, 1, 64));
        load.run(Duration::ZERO);
        let bytes = server.memory().saturating_sub(before) as f64 / IDLE as f64;
        println!("| {} | {bytes:.0} |", kind.name());
        (kind, bytes)
    });
    table.collect()
}
