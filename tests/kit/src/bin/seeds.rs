//! Writes the seeds and dictionaries of `kit::seeds` for the fuzzers.
//!
//!     cargo run --bin seeds

use std::fs;
use std::io;
use std::path::Path;
use std::process::ExitCode;

use kit::seeds;
use kit::terminal::say;

fn main() -> ExitCode {
    let folder = Path::new(kit::ROOT).join("fuzz");
    match write(&folder) {
        Ok(count) => {
            say(&format!("{count} files in {}", folder.display()));
            ExitCode::SUCCESS
        }
        Err(error) => {
            say(&format!("{}: {error}", folder.display()));
            ExitCode::FAILURE
        }
    }
}

fn write(folder: &Path) -> io::Result<usize> {
    let files = [seeds::seeds(), seeds::dictionaries()].concat();
    for (path, content) in &files {
        fs::write(folder.join(path), content)?;
    }
    Ok(files.len())
}
