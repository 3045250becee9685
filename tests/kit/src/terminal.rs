//! Lines on a terminal that may have gone: `println!` and `eprintln!` would panic on a broken pipe.

use std::io::Write;

/// Writes a line to standard output.
pub fn say(line: &str) {
    let _ = writeln!(std::io::stdout(), "{line}");
}

/// Writes a line to standard error.
pub fn complain(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}
