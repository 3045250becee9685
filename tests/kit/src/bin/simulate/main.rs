//! Long campaigns in the simulator: seed after seed, each a world of its own.
//!
//!     cargo run --release --bin simulate -- --seeds 20000
//!
//! A seed that breaks is printed with the command that shrinks and replays it. At the end a table tells which faults met
//! connections at which stage, and what was never reached. With `--pairs` fixed scenarios are played instead, with each
//! two of their calls failing.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;
use portcullis::sim::Coverage;
use portcullis::CloseReason;

mod table;
use kit::campaign::{self, Plan};
use kit::failing::Scenario;
use kit::terminal::{say, Progress};

/// Plays worlds from seeds and reports the first that breaks.
#[derive(Debug, Parser)]
#[command(version, name = "simulate")]
struct Options {
    /// How many seeds
    #[arg(long, value_name = "N", default_value_t = 1000)]
    seeds: u64,

    /// The first seed
    #[arg(long, value_name = "SEED", default_value_t = 0)]
    from: u64,

    /// Play this one seed, with its trace
    #[arg(long, value_name = "SEED")]
    replay: Option<u64>,

    /// With --replay: shrink the world first if it breaks
    #[arg(long, requires = "replay")]
    shrink: bool,

    /// Leave TLS out: several times as many worlds per second
    #[arg(long)]
    plain: bool,

    /// Instead of seeds: play fixed scenarios with each call failing with each error, and with each two of them
    #[arg(long, conflicts_with_all = ["seeds", "from", "replay"])]
    pairs: bool,
}

fn main() -> ExitCode {
    let options = Options::parse();
    match options.replay {
        Some(seed) => replay(&options, seed),
        None if options.pairs => fail_in_pairs(&options),
        None => long_run(&options),
    }
}

fn fail_in_pairs(options: &Options) -> ExitCode {
    let is_wanted = |scenario: &&Scenario| !(options.plain && scenario.is_tls());
    let scenarios: Vec<_> = Scenario::ALL.iter().filter(is_wanted).collect();
    let progress = Progress::new(scenarios.len() as u64, "scenarios");
    for scenario in scenarios {
        let start = Instant::now();
        progress.note(&format!("{scenario:?}"));
        match scenario.play_all() {
            Ok((singles, pairs)) => progress.say(&format!(
                "{scenario:?}: {singles} single failures, {pairs} pairs, {:.1} s, no violation",
                start.elapsed().as_secs_f64()
            )),
            Err(what) => {
                drop(progress);
                say(&format!("breaks: {what}"));
                return ExitCode::FAILURE;
            }
        }
        progress.step();
    }
    ExitCode::SUCCESS
}

fn replay(options: &Options, seed: u64) -> ExitCode {
    let mut plan = Plan::draw(seed, !options.plain);
    if options.shrink && plan.run(false).is_err() {
        plan = plan.shrink();
    }
    say(&format!("{plan:#?}"));
    match plan.run(true) {
        Ok(report) => {
            report.trace.iter().for_each(|line| say(line));
            say(&format!(
                "seed {seed}: {} events, {} connections, hash {:016x}, no violation",
                report.events, report.connections, report.hash
            ));
            ExitCode::SUCCESS
        }
        Err(failure) => {
            failure.trace.iter().for_each(|line| say(line));
            say(&format!("seed {seed} breaks: {}", failure.what));
            ExitCode::FAILURE
        }
    }
}

fn long_run(options: &Options) -> ExitCode {
    let start = Instant::now();
    let mut shown = start;
    let mut totals = Totals::default();
    let progress = Progress::new(options.seeds, "seeds");
    for seed in options.from..options.from.saturating_add(options.seeds) {
        match Plan::draw(seed, !options.plain).run(false) {
            Ok(report) => totals.add(report),
            Err(failure) => {
                drop(progress);
                let plain = if options.plain { " --plain" } else { "" };
                say(&format!("seed {seed} breaks: {}", failure.what));
                say(&format!(
                    "replay: cargo run --release --bin simulate -- --replay {seed} --shrink{plain}"
                ));
                return ExitCode::FAILURE;
            }
        }
        progress.step();
        if progress.is_shown() {
            progress.note(&format!("{} events", totals.events));
        } else if shown.elapsed() > Duration::from_secs(5) {
            shown = Instant::now();
            say(&totals.progress(start.elapsed()));
        }
    }
    drop(progress);
    say(&totals.progress(start.elapsed()));
    say(&table::render(
        &totals.coverage,
        &totals.reasons,
        !options.plain,
    ));
    ExitCode::SUCCESS
}

#[derive(Default)]
struct Totals {
    seeds: u64,
    events: u64,
    iterations: u64,
    connections: u64,
    orders: u64,
    refused: u64,
    reasons: BTreeMap<CloseReason, u64>,
    coverage: Coverage,
}

impl Totals {
    fn add(&mut self, report: campaign::Report) {
        self.seeds += 1;
        self.events += report.events;
        self.iterations += report.iterations;
        self.connections += report.connections;
        self.orders += report.orders;
        self.refused += report.orders_refused;
        for (reason, count) in report.reasons {
            *self.reasons.entry(reason).or_default() += count;
        }
        self.coverage.add(&report.coverage);
    }

    fn progress(&self, took: Duration) -> String {
        let seconds = took.as_secs_f64().max(0.001);
        format!(
            "{} seeds ({:.0}/s), {} events ({:.0}/s), {} turns, {} connections, {} orders and {} refused, no violation",
            self.seeds,
            self.seeds as f64 / seconds,
            self.events,
            self.events as f64 / seconds,
            self.iterations,
            self.connections,
            self.orders,
            self.refused
        )
    }
}
