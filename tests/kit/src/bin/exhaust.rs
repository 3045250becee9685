//! Everything that can happen to one connection, in worlds small enough to try it all.
//!
//!     cargo run --release --bin exhaust
//!
//! Three searches: every state of a plain connection, breadth-first, for each framing and kind of handler; every short string
//! in every cut; every schedule behind TLS, as long as there is time. What breaks is printed with the shortest way to it.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::{Parser, ValueEnum};

use kit::terminal::{complain, say, Progress};
use kit::{closure, strings};

/// Tries everything that can happen to one connection.
#[derive(Debug, Parser)]
#[command(version, name = "exhaust")]
struct Options {
    /// One search alone
    #[arg(long, value_enum, value_name = "SEARCH")]
    only: Option<Search>,

    /// The longest string
    #[arg(long, value_name = "BYTES", default_value_t = 8)]
    length: usize,

    /// How long to try schedules behind TLS, from each beginning and with each version
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    seconds: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Search {
    /// Every state of a plain connection, with a turn after whatever happens
    States,
    /// Every state of one plain connection, with whatever can pile up between two turns: minutes, and gigabytes
    Piles,
    /// Every short string in every cut
    Strings,
    /// Every schedule behind TLS
    Tls,
}

fn main() -> ExitCode {
    let options = Options::parse();
    let wanted = |search| {
        options
            .only
            .map_or(search != Search::Piles, |only| only == search)
    };
    let outcome = (|| {
        if wanted(Search::States) {
            states(closure::settings(false).into_iter().collect())?;
        }
        if wanted(Search::Piles) {
            states(closure::settings(true).into_iter().take(1).collect())?;
        }
        if wanted(Search::Strings) {
            all_strings(options.length)?;
        }
        if wanted(Search::Tls) {
            tls(Duration::from_secs(options.seconds))?;
        }
        Ok::<(), String>(())
    })();
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(what) => {
            complain(&what);
            ExitCode::FAILURE
        }
    }
}

fn states(settings: Vec<closure::Setting>) -> Result<(), String> {
    let start = Instant::now();
    let mut all = closure::Findings::default();
    let mut count = 0;
    let progress = Progress::new(settings.len() as u64, "worlds");
    for setting in settings {
        let found = closure::close(&setting)?;
        progress.say(&format!(
            "{:?}{}, on a frame {:?}, at the end {:?}: {} states, {} moves, none farther than {}",
            portcullis::sim::Action::framing(setting.framing),
            if setting.proxied {
                " behind a proxy"
            } else {
                ""
            },
            setting.on_frame,
            setting.on_end,
            found.states,
            found.moves,
            found.depth
        ));
        all.add(found);
        count += 1;
        progress.step();
    }
    drop(progress);
    say(&format!(
        "{count} worlds closed: {} states, {} moves, {:.0} s; changes of state {:?}; reasons {:?}",
        all.states,
        all.moves,
        start.elapsed().as_secs_f64(),
        all.changes,
        all.reasons
    ));
    Ok(())
}

fn all_strings(length: usize) -> Result<(), String> {
    let framings = portcullis::sim::Action::FRAMINGS;
    let progress = Progress::new(framings.into(), "framings");
    for framing in 0..framings {
        let start = Instant::now();
        let played = strings::play(framing, length)?;
        progress.step();
        progress.say(&format!(
            "{:?}: {played} strings in all their cuts, up to {length} bytes, {:.0} s",
            portcullis::sim::Action::framing(framing),
            start.elapsed().as_secs_f64()
        ));
    }
    Ok(())
}

#[cfg(feature = "tls")]
fn tls(time: Duration) -> Result<(), String> {
    use kit::schedules::{self, Start, Version};
    let versions = [Version::Tls12, Version::Tls13].into_iter();
    let starts = [Start::Connected, Start::Upgrade, Start::Open];
    let (begun, progress) = (Instant::now(), Progress::new(6 * time.as_secs(), "seconds"));
    for (version, begin) in versions.flat_map(|version| starts.map(|start| (version, start))) {
        let start = Instant::now();
        for length in 1.. {
            let is_over = || {
                progress.set(begun.elapsed().as_secs());
                start.elapsed() > time
            };
            let found = schedules::play(version, begin, length, is_over)?;
            progress.say(&format!(
                "{version:?}, {begin:?}: {} {} schedules of {length} moves, {:.0} s; changes of state {:?}; reasons {:?}",
                if found.all { "all" } else { "the first" },
                found.schedules,
                start.elapsed().as_secs_f64(),
                found.changes,
                found.reasons
            ));
            if start.elapsed() > time {
                break;
            }
        }
    }
    Ok(())
}

#[cfg(not(feature = "tls"))]
fn tls(_: Duration) -> Result<(), String> {
    say("built without TLS");
    Ok(())
}
