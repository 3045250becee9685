//! Visits larger worlds than the tests do.
//!
//!     cargo run --release -p portcullis-model --bin prove
//!
//! For each setting: the number of states, and each property. A property that does not hold comes
//! with the shortest way to it.

use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::time::Instant;

use model::events::{visit, Timer};
use model::fairness::Reachable;
use model::{code, liveness, Setting};
use stateright::{Expectation, Model};

/// How often the progress is printed: once for so many states.
const STEP: usize = 50_000;

fn main() -> ExitCode {
    let mut all = true;
    for setting in Setting::LARGE {
        all &= prove(&setting);
    }
    for setting in Setting::PLAYED_LONGER
        .iter()
        .filter(|setting| setting.can_be_played())
    {
        all &= compare(setting);
    }
    ExitCode::from(u8::from(!all))
}

fn prove(setting: &Setting) -> bool {
    let began = Instant::now();
    let shows = std::io::stderr().is_terminal();
    let reachable = Reachable::explore(setting, |visited, known| {
        if shows && visited % STEP == 0 {
            eprint!("\r{}: {visited} of {known} states so far", setting.name);
            let _ = std::io::stderr().flush();
        }
    });
    if shows {
        eprint!("\r\x1b[K");
    }
    let (states, steps) = (reachable.graph.node_count(), reachable.graph.edge_count());
    println!("{}: {states} states, {steps} steps", setting.name);
    let mut all = true;
    let mut say = |name: &str, broken: Option<String>| match broken {
        Some(way) => {
            all = false;
            println!("  BROKEN  {name}: {way}");
        }
        None => println!("  holds   {name}"),
    };
    for property in setting.properties() {
        let mut states = reachable.graph.node_indices();
        let holds = |state| (property.condition)(setting, &reachable.graph[state]);
        let broken = match property.expectation {
            Expectation::Sometimes => (!states.any(holds)).then(|| "never".to_owned()),
            _ => states
                .find(|state| !holds(*state))
                .map(|state| format!("{:?}", reachable.way_to(state))),
        };
        say(property.name, broken);
    }
    for property in &liveness::PROPERTIES {
        say(
            property.name,
            property
                .broken(setting, &reachable)
                .map(|run| run.to_string()),
        );
    }
    say(
        "the loop does not spin",
        liveness::spins(&reachable).map(|run| run.to_string()),
    );
    println!("  {:.1} s", began.elapsed().as_secs_f64());
    all
}

/// Plays each step between two worlds that wait, in the simulator.
fn compare(setting: &Setting) -> bool {
    let mut all = true;
    for timer in Timer::ALL {
        let began = Instant::now();
        let ways = visit(setting, timer, true).ways;
        let mut wrong = ways
            .iter()
            .filter_map(|way| code::play(setting, timer, way).err());
        // The others may follow from the first one.
        if let Some(what) = wrong.next() {
            all = false;
            println!("  DIFFERS {what}");
        }
        let seconds = began.elapsed().as_secs_f64();
        println!(
            "{}, {timer:?}: {} steps played, {seconds:.1} s",
            setting.name,
            ways.len()
        );
    }
    all
}
