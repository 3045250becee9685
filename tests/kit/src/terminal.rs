//! Lines on a terminal that may have gone: `println!` and `eprintln!` would panic on a broken pipe.

use std::io::Write;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

/// Writes a line to standard output.
pub fn say(line: &str) {
    let _ = writeln!(std::io::stdout(), "{line}");
}

/// Writes a line to standard error.
pub fn complain(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// The progress of long work, in place on a terminal: n of N, the rate, the time left. Elsewhere
/// nothing is shown.
pub struct Progress(ProgressBar);

impl Progress {
    /// Shows the progress of `total` pieces of work, at first none.
    pub fn new(total: u64, unit: &'static str) -> Self {
        let line = format!("{{pos}} of {{len}} {unit}, {{per_sec}}, {{eta}} left{{msg}}");
        // A template that is wrong shows the library's own.
        let style = ProgressStyle::with_template(&line);
        let style = style.unwrap_or_else(|_| ProgressStyle::default_bar());
        let bar = ProgressBar::new(total).with_style(style);
        bar.enable_steady_tick(Duration::from_secs(1));
        Self(bar)
    }

    /// True on a terminal.
    pub fn is_shown(&self) -> bool {
        !self.0.is_hidden()
    }

    /// One more piece is done.
    pub fn step(&self) {
        self.0.inc(1);
    }

    /// So many pieces are done.
    pub fn set(&self, done: u64) {
        self.0.set_position(done);
    }

    /// Shows a few words behind the numbers.
    pub fn note(&self, words: &str) {
        self.0.set_message(format!("; {words}"));
    }

    /// Writes a line to standard output, above the progress.
    pub fn say(&self, line: &str) {
        self.0.suspend(|| say(line));
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
