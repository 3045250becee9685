//! Talking to a terminal that may have gone: `println!` and `eprintln!` would panic on a broken pipe.

use std::io::Write;

/// A line on standard output.
pub fn say(line: &str) {
    let _ = writeln!(std::io::stdout(), "{line}");
}

/// A line on standard error.
pub fn complain(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// The server's log, at level `info` unless RUST_LOG says otherwise. Write errors are ignored.
#[allow(dead_code)] // not every example logs
pub fn log_to_stderr() {
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("info")).init();
}
