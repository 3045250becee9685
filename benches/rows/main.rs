//! What the other benches leave out, each beside a peer: fan-out, large chunks and framers of the
//! user's, ten thousand connections that speak once a second, the worst iteration, two threads, the
//! end of an outage, a drain, and the memory after a storm.
//!
//!     # Tables, and the chart in benches/rows.svg: some ten minutes.
//!     cargo bench --bench rows
//!     # One row, more often.
//!     cargo bench --bench rows -- --only fan-out --rounds 9
//!     # To see that it works.
//!     cargo bench --bench rows -- --rounds 1 --seconds 0.1 --connections 1000 --chart /tmp/r.svg
//!
//! Each server runs as a process of its own on one processor, the clients on another; only in
//! `shards` all share both. A server is started afresh in each round, and the servers take turns.
//! Needs Linux. Peers whose programs are absent are left out.

mod by_mio;
mod by_portcullis;
mod by_tokio;
mod churn;
#[path = "../common/mod.rs"]
mod common;
mod figure;
#[path = "../echo/foreign.rs"]
mod foreign;
mod recovery;
mod roles;
#[path = "../echo/servers/mod.rs"]
#[allow(dead_code)] // the rows use a part
mod servers;
mod turns;
mod work;

use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;
use common::chart::{self, Section};
use common::machine;
use common::process::{pin, pin_to};
use common::spread::grouped;
use figure::{Figure, Head, Sense, Values};
use indicatif::ProgressBar;
use roles::{Programs, Role, Running};

/// Number of the clients' processor.
const CLIENTS: usize = 1;
/// Descriptors that are not connections.
const RESERVED: usize = 300;
/// Crates whose versions the caption names.
const CRATES: [&str; 3] = ["mio", "tokio", "tokio-util"];

#[derive(Parser)]
pub struct Options {
    /// Rounds; the medians are shown
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Seconds of each measurement
    #[arg(long, default_value_t = 0.5)]
    seconds: f64,
    /// The row with this name alone
    #[arg(long, value_parser = ROWS.map(|row| row.name))]
    only: Option<String>,
    /// Connections of the large rows, as far as descriptors suffice
    #[arg(long, default_value_t = 10_000)]
    connections: usize,
    /// Where the chart goes; without it, `--only` draws none
    #[arg(long)]
    chart: Option<PathBuf>,
    /// Be one of the servers: for the bench itself
    #[arg(long, hide = true)]
    serve: Option<String>,
    /// Said by `cargo bench`
    #[arg(long, hide = true)]
    bench: bool,
    /// How long memory is watched after a storm.
    #[arg(skip = Duration::from_secs(5))]
    pause: Duration,
}

impl Options {
    fn span(&self) -> Duration {
        Duration::from_secs_f64(self.seconds)
    }

    fn subscribers(&self) -> [usize; 2] {
        [self.connections / 10, self.connections]
    }
}

/// A load, its servers and its figures.
struct Row {
    name: &'static str,
    heading: &'static str,
    /// Most rounds: fewer where each takes long and varies little.
    rounds: usize,
    /// The first is the reference.
    roles: &'static [Role],
    heads: fn(&Options) -> Vec<Head>,
    /// Returns a value for each figure.
    measure: fn(&Options, &mut Running, usize) -> Vec<f64>,
}

const FEW: usize = 3;
const MANY: usize = usize::MAX;

const ROWS: [Row; 8] = [
    Row {
        name: "fan-out",
        heading: "Fan-out: processor time of a message to one subscriber",
        rounds: FEW,
        roles: &roles::FAN_OUT,
        heads: |options| {
            let [few, many] = options.subscribers();
            let all = [few, many].into_iter().flat_map(|subscribers| {
                work::FAN_OUT_BYTES.map(|bytes| {
                    let (to, bytes) = (grouped(subscribers as f64), grouped(bytes as f64));
                    cost(format!("{bytes} bytes to {to} subscribers"))
                })
            });
            all.collect()
        },
        measure: work::fan_out,
    },
    Row {
        name: "bulk",
        heading: "Chunks, and framers of the user's: processor time of an echoed message",
        rounds: MANY,
        roles: &roles::BULK,
        heads: |_| {
            let chunks = work::CHUNKS.map(|bytes| {
                let kib = bytes >> 10;
                cost(format!("8 connections, {kib} KiB, 4 in flight"))
            });
            let small = [cost("64 connections, 64 bytes, 16 in flight".to_owned())];
            chunks.into_iter().chain(small).collect()
        },
        measure: work::bulk,
    },
    Row {
        name: "busy",
        heading: "All connections speak once a second",
        rounds: FEW,
        roles: &roles::BUSY,
        heads: |options| {
            let all = grouped(options.connections as f64);
            let slow = format!("{all} connections, latency of 99 %");
            vec![
                cost(format!("{all} connections, 64 bytes")),
                Head::new(slow, "ms", Sense::Amount),
            ]
        },
        measure: work::busy,
    },
    Row {
        name: "iteration",
        heading: "Processor time of an iteration, with 64 KiB of empty frames due from each peer",
        rounds: FEW,
        roles: &roles::ITERATION,
        heads: |options| {
            let peers = grouped((options.connections / 10) as f64);
            let of = ["median", "99 % within", "maximum"];
            of.map(|part| Head::new(format!("{peers} peers, {part}"), "ms", Sense::Amount))
                .into()
        },
        measure: work::iteration,
    },
    Row {
        name: "shards",
        heading: "Two threads on two processors, which the clients share",
        rounds: MANY,
        roles: &roles::SHARDS,
        heads: |_| {
            let connections = "connections with one echo, 64 at a time";
            vec![
                Head::new(
                    "64 connections, 64 bytes",
                    "messages per second",
                    Sense::Rate,
                ),
                Head::new(connections, "per second", Sense::Rate),
            ]
        },
        measure: work::shards,
    },
    Row {
        name: "recovery",
        heading: "500 clients wait, no descriptor is free",
        rounds: MANY,
        roles: &roles::RECOVERY,
        heads: |_| {
            let spent = "processor time in a second of the outage";
            vec![
                Head::new("limit raised, until all are served", "s", Sense::Amount),
                Head::new("others have left, until all are served", "s", Sense::Amount),
                Head::new(spent, "ms", Sense::Amount),
            ]
        },
        measure: recovery::measure,
    },
    Row {
        name: "drain",
        heading: "Drain of busy connections",
        rounds: MANY,
        roles: &roles::DRAIN,
        heads: |options| {
            let all = grouped(options.connections as f64);
            let reset = format!("clients of {all} that were reset");
            vec![
                Head::new(format!("{all} connections, to the end"), "s", Sense::Amount),
                Head::new(reset, "clients", Sense::Amount),
            ]
        },
        measure: work::drain,
    },
    Row {
        name: "storm",
        heading: "Memory in a storm of frames of 64 KiB, above that before",
        rounds: FEW,
        roles: &roles::STORM,
        heads: |options| {
            let all = grouped(options.connections as f64);
            let pause = options.pause.as_secs_f64();
            let back = format!("until within 8 MB ({pause}: not before)");
            vec![
                Head::new(format!("{all} connections, at most"), "MB", Sense::Amount),
                Head::new(format!("{} s after", pause / 5.0), "MB", Sense::Amount),
                Head::new(format!("{pause} s after"), "MB", Sense::Amount),
                Head::new(back, "s", Sense::Amount),
            ]
        },
        measure: work::storm,
    },
];

fn cost(title: String) -> Head {
    Head::new(title, "µs", Sense::Cost)
}

fn main() {
    let mut options = Options::parse();
    let descriptors = common::raise_descriptor_limit() as usize;
    if let Some(id) = &options.serve {
        return roles::be(id);
    }
    if !options.bench {
        // Under `cargo test` it shows that it works.
        (options.rounds, options.seconds, options.connections) = (1, 0.01, 100);
        options.pause = Duration::from_millis(50);
    }
    let possible = descriptors.saturating_sub(RESERVED);
    if options.connections > possible {
        eprintln!("FEWER CONNECTIONS: {possible}, for the limit on descriptors is {descriptors}");
        options.connections = possible;
    }
    let programs = Programs::find();
    let is_chosen = |row: &&Row| options.only.as_ref().is_none_or(|only| only == row.name);
    let rows: Vec<&Row> = ROWS.iter().filter(is_chosen).collect();
    let runs = rows.iter().map(|row| {
        let present = row.roles.iter().filter(|role| programs.has(role));
        present.count() * row.rounds.min(options.rounds)
    });
    let progress = common::progress_of(runs.sum(), "runs");
    let sections: Vec<Section> = rows
        .iter()
        .map(|row| {
            let figures = measure(row, &options, &programs, &progress);
            progress.suspend(|| {
                println!("\n# {}", row.heading);
                figures.iter().for_each(Figure::print);
            });
            Section {
                heading: row.heading.to_owned(),
                groups: figures.iter().map(Figure::group).collect(),
            }
        })
        .collect();
    progress.finish_and_clear();
    let whole = concat!(env!("CARGO_MANIFEST_DIR"), "/rows.svg");
    let chart = match options.only {
        None => options.chart.clone().or(Some(whole.into())),
        Some(_) => options.chart.clone(),
    };
    if let Some(path) = chart.filter(|_| options.bench) {
        let caption = caption(&options, &programs);
        chart::draw(&path, &sections, &caption).expect("the chart can be written");
        println!("\n{}", path.display());
    }
}

/// Measures all servers of a row, in turns.
fn measure(
    row: &Row,
    options: &Options,
    programs: &Programs,
    progress: &ProgressBar,
) -> Vec<Figure> {
    match row.name {
        "shards" => pin_to([0, 1]),
        _ => pin(CLIENTS),
    }
    let present = row.roles.iter().filter(|role| programs.has(role));
    let roles: Vec<&Role> = present.collect();
    let start = |head| {
        let values = Vec::new();
        let server = |role: &&Role| Values {
            name: role.name,
            values: values.clone(),
        };
        let servers = roles.iter().map(server).collect();
        Figure { head, servers }
    };
    let mut figures: Vec<Figure> = (row.heads)(options).into_iter().map(start).collect();
    for round in 0..row.rounds.min(options.rounds) {
        for turn in 0..roles.len() {
            let at = (turn + round) % roles.len();
            let mut server = Running::start(roles[at], programs);
            let values = (row.measure)(options, &mut server, round);
            for (figure, value) in figures.iter_mut().zip(values) {
                figure.servers[at].values.push(value);
            }
            progress.inc(1);
        }
    }
    figures
}

/// The paragraphs below the chart.
fn caption(options: &Options, programs: &Programs) -> Vec<String> {
    let mut paragraphs = vec![
        format!(
            "Each server is a process of its own on one processor, the clients run on another; in \
             the row with two threads all share both. A server is started afresh in each of {} \
             rounds ({} in the rows with thousands of connections, but for the drain), in which \
             the servers take turns. A bar is the median, its whisker spans all \
             rounds. Where a bar is a ratio, it was taken within a round, against the first \
             server. TCP_NODELAY is set everywhere. Every echoed byte is checked; of a fan-out the \
             number of received bytes.",
            options.rounds,
            options.rounds.min(FEW),
        ),
        format!(
            "Measurements of {} s; connections that all speak: five times that. Processor time is \
             that of all threads of the server, user and system; of an iteration that of its \
             thread. With tokio an iteration is the time until a task that yields is called again. \
             mosquitto speaks MQTT with QoS 0, the others a length of four bytes.",
            options.seconds
        ),
        format!(
            "{}. {}.",
            machine::machine(),
            machine::programs(&CRATES, &programs.versions())
        ),
    ];
    let roles = ROWS.iter().flat_map(|row| row.roles);
    let absent = roles.filter(|role| !programs.has(role));
    let mut absent: Vec<&str> = absent.map(|role| role.name).collect();
    absent.dedup();
    if !absent.is_empty() {
        paragraphs.push(format!("Left out here: {}.", absent.join(", ")));
    }
    paragraphs
}
