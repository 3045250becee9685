//! Plants bugs in a copy of the repository, and expects the campaign to find each of them.
//!
//!     cargo run --bin plant
//!
//! The copy, and what is built of it, stays in `target/planted`. A few seconds to a minute for each bug.

use std::error::Error;
use std::fs;
use std::path::Path;
use std::process::{Command, ExitCode};

use clap::Parser;
use kit::planted_bugs::{Bug, BUGS};
use kit::terminal::{say, Progress};
use kit::ROOT;

/// Plants bugs in a copy of the repository and runs the campaign there.
#[derive(Debug, Parser)]
#[command(version, name = "plant")]
struct Options {
    /// How many seeds may be needed to find a bug
    #[arg(long, value_name = "N", default_value_t = 10_000)]
    seeds: u64,

    /// Only the kinds that contain this text
    #[arg(long, value_name = "TEXT", default_value = "")]
    kind: String,
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            say(&format!("{error}"));
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<bool, Box<dyn Error>> {
    let root = Path::new(ROOT);
    let copy = root.join("target/planted");
    fs::create_dir_all(&copy)?;
    for part in [
        "Cargo.toml",
        "Cargo.lock",
        "src",
        "tests",
        "benches",
        "examples",
    ] {
        copy_all(&root.join(part), &copy.join(part))?;
    }
    let mut all_found = true;
    let is_wanted = |bug: &&Bug| bug.kind.contains(&options.kind);
    let bugs: Vec<_> = BUGS.iter().filter(is_wanted).collect();
    let progress = Progress::new(bugs.len() as u64, "bugs");
    for bug in bugs {
        progress.note(bug.kind);
        let file = copy.join(bug.file);
        let text = fs::read_to_string(&file)?;
        fs::write(&file, text.replacen(bug.line, bug.planted, 1))?;
        let found = play(&copy, bug, options.seeds);
        fs::write(&file, text)?;
        let report = found?;
        let is_found = report.contains(bug.found);
        all_found &= is_found;
        let verdict = if is_found { "found" } else { "NOT FOUND" };
        let last = report.lines().next().unwrap_or("no world breaks");
        progress.step();
        progress.say(&format!("{}: {verdict}: {last}", bug.kind));
    }
    Ok(all_found)
}

/// Files that are the same keep their times, so that nothing is built again for them.
fn copy_all(from: &Path, to: &Path) -> Result<(), Box<dyn Error>> {
    if from.is_dir() {
        fs::create_dir_all(to)?;
        for entry in fs::read_dir(from)? {
            let name = entry?.file_name();
            copy_all(&from.join(&name), &to.join(&name))?;
        }
    } else if fs::read(from)? != fs::read(to).unwrap_or_default() {
        fs::copy(from, to)?;
    }
    Ok(())
}

/// Builds the copy and plays worlds. Returns what breaks.
fn play(copy: &Path, bug: &Bug, seeds: u64) -> Result<String, Box<dyn Error>> {
    let mut cargo = Command::new("cargo");
    cargo.args([
        "build",
        "--quiet",
        "--bin",
        "simulate",
        "--target-dir",
        "target",
    ]);
    let built = cargo.current_dir(copy).output()?;
    if !built.status.success() {
        let errors = String::from_utf8_lossy(&built.stderr).into_owned();
        return Err(format!("{}: it does not compile: {errors}", bug.kind).into());
    }
    let mut simulate = Command::new(copy.join("target/debug/simulate"));
    simulate.args(["--seeds", &seeds.to_string()]);
    if !bug.tls {
        simulate.arg("--plain");
    }
    let played = simulate.output()?;
    let report = String::from_utf8_lossy(&played.stdout).into_owned();
    let breaks = report.lines().filter(|line| line.contains(" breaks: "));
    Ok(breaks.collect::<Vec<_>>().join("\n"))
}
