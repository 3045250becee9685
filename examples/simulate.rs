//! Long campaigns in the simulator: seed after seed, each a world of its own.
//!
//!     cargo run --release --features sim --example simulate -- --seeds 10000
//!
//! A seed that breaks is shrunk and printed with the command that replays it.

use std::collections::{BTreeMap, BTreeSet};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;
use portcullis::sim::Call;

#[path = "support/campaign.rs"]
mod campaign;
#[path = "support/terminal.rs"]
mod terminal;
use campaign::Plan;
use terminal::say;

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
}

fn main() -> ExitCode {
    let options = Options::parse();
    // Handlers panic as planned by the thousand.
    std::panic::set_hook(Box::new(|panic| {
        if panic.payload().downcast_ref::<&str>() != Some(&"as planned") {
            terminal::complain(&format!("{panic}"));
        }
    }));
    match options.replay {
        Some(seed) => replay(&options, seed),
        None => long_run(&options),
    }
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
    for seed in options.from..options.from.saturating_add(options.seeds) {
        match Plan::draw(seed, !options.plain).run(false) {
            Ok(report) => totals.add(report),
            Err(failure) => {
                let plain = if options.plain { " --plain" } else { "" };
                say(&format!("seed {seed} breaks: {}", failure.what));
                say(&format!(
                    "replay: cargo run --release --features sim --example simulate -- --replay {seed} --shrink{plain}"
                ));
                return ExitCode::FAILURE;
            }
        }
        if shown.elapsed() > Duration::from_secs(5) {
            shown = Instant::now();
            say(&totals.progress(start.elapsed()));
        }
    }
    say(&totals.progress(start.elapsed()));
    say(&totals.table());
    ExitCode::SUCCESS
}

#[derive(Default)]
struct Totals {
    seeds: u64,
    events: u64,
    turns: u64,
    connections: u64,
    reasons: BTreeMap<&'static str, u64>,
    cells: BTreeSet<(String, Call, i32)>,
}

impl Totals {
    fn add(&mut self, report: campaign::Report) {
        self.seeds += 1;
        self.events += report.events;
        self.turns += report.turns;
        self.connections += report.connections;
        for (reason, count) in report.reasons {
            *self.reasons.entry(reason.as_str()).or_default() += count;
        }
        self.cells.extend(report.cells);
    }

    fn progress(&self, took: Duration) -> String {
        let seconds = took.as_secs_f64().max(0.001);
        format!(
            "{} seeds ({:.0}/s), {} events ({:.0}/s), {} turns, {} connections, no violation",
            self.seeds,
            self.seeds as f64 / seconds,
            self.events,
            self.events as f64 / seconds,
            self.turns,
            self.connections
        )
    }

    /// States × faults: which error hit which call in which state, and what was never reached.
    fn table(&self) -> String {
        let mut text = String::from("how connections ended:\n");
        for (reason, count) in &self.reasons {
            text.push_str(&format!("  {count:>10}  {reason}\n"));
        }
        text.push_str("which errors hit which call, by the state of its connection before the turn:\n");
        for &call in Call::ALL {
            let states: &[&str] = match call {
                Call::Read | Call::Write | Call::Shutdown => &["Handshaking", "Open", "Closing"],
                Call::Register => &["new"],
                _ => &["-"],
            };
            for &state in states {
                let (hit, missed): (Vec<i32>, Vec<i32>) = call
                    .errors()
                    .iter()
                    .partition(|&&errno| self.cells.contains(&(state.to_owned(), call, errno)));
                let gap = if missed.is_empty() {
                    String::new()
                } else {
                    format!(", never errno {missed:?}")
                };
                text.push_str(&format!(
                    "  {call:<20?} {state:<12} {} of {}{gap}\n",
                    hit.len(),
                    call.errors().len()
                ));
            }
        }
        text
    }
}
