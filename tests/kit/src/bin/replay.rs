//! Plays a recording on the simulator, with one of the services here.
//!
//!     cargo run --release --bin replay -- server.rec                       what is in it
//!     cargo run --release --bin replay -- server.rec --list                each record
//!     cargo run --release --bin replay -- server.rec --handler echo        the same server again
//!     cargo run --release --bin replay -- server.rec --handler mean --reduce
//!
//! The last one reduces what the clients sent to what makes the handler panic, and prints that as a test. For a handler of
//! your own these are the three calls at the end of this file: see the section *Recordings* of the handbook's page `testing`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, ValueEnum};
use kit::net::Echo;
use kit::recorded::{try_play_with, Mean};
use kit::terminal::say;
use portcullis::sim::{Replay, Script, Tape};
use portcullis::{Config, Framing, Handler, Listen};

/// Plays a recording of a server with one listener and the default configuration.
#[derive(Debug, Parser)]
#[command(version, name = "replay")]
struct Options {
    /// The recording
    file: PathBuf,

    /// Print each record but readings of the clock
    #[arg(long)]
    list: bool,

    /// Play it with this handler
    #[arg(long)]
    handler: Option<Kind>,

    /// The recorded listener's framing (raw, line, packet-2, ...)
    #[arg(long, default_value = "line")]
    framing: Framing,

    /// What clients sent, again and again, if the file has no payloads
    #[arg(long, value_name = "TEXT")]
    input: Option<String>,

    /// Reduce the clients' input to what makes the handler panic, and print a test
    #[arg(long, requires = "handler")]
    reduce: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Kind {
    /// Sends every frame back
    Echo,
    /// The mean of numbers, with a bug
    Mean,
    /// The same without the bug
    Mended,
}

impl Kind {
    fn handler(self) -> Box<dyn Handler> {
        match self {
            Self::Echo => Box::new(Echo),
            Self::Mean => Box::new(Mean::buggy()),
            Self::Mended => Box::new(Mean::mended()),
        }
    }
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(&error.to_string());
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<(), Box<dyn std::error::Error>> {
    let mut tape = Tape::read(&options.file)?;
    if let Some(text) = options.input.clone().filter(|text| !text.is_empty()) {
        tape = tape.filled(move |_, before, buffer| {
            let bytes = text.bytes().cycle();
            let from = usize::try_from(before).unwrap_or(0) % text.len();
            buffer
                .iter_mut()
                .zip(bytes.skip(from))
                .for_each(|(to, byte)| *to = byte);
        });
    }
    say(&format!(
        "{:?} payloads, {} connections, {} began before, {:.3} s, {}: {}",
        tape.payloads(),
        tape.connections(),
        tape.skipped(),
        tape.span().as_secs_f64(),
        if tape.is_whole() {
            "from the start on"
        } else {
            "the oldest part was overwritten"
        },
        tape.ending()
    ));
    if options.list {
        tape.lines().for_each(|line| say(&line));
    }
    let Some(kind) = options.handler else {
        return Ok(());
    };
    let listen = Listen::tcp("127.0.0.1:0", options.framing.clone());
    if options.reduce {
        let script = tape.script(|_, _| true)?;
        let fails = |script: &Script| {
            try_play_with(script, listen.clone(), move || kind.handler()).is_err()
        };
        if !fails(&script) {
            return Err("what the clients sent makes no handler panic".into());
        }
        let test = script.shrink(fails).to_test("it_panics", "play(&script);");
        say(test.trim_end());
        return Ok(());
    }
    let mut replay = Replay::new(tape, Config::new(), ())?;
    replay.listen(listen, move |_: &mut (), _| kind.handler())?;
    let ending = replay.run()?;
    say(&format!("played {} records: {ending}", replay.records()));
    let stats = replay.stats();
    for (reason, count) in kit::reasons(|reason| stats.closed(reason)) {
        say(&format!("{count} connections ended: {reason}"));
    }
    Ok(())
}
