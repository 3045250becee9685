//! Talking to a terminal that may have gone: `println!` and `eprintln!` would panic on a broken pipe.

use std::io::Write;

/// A line on standard output.
pub fn say(line: &str) {
    let _ = writeln!(std::io::stdout(), "{line}");
}

/// A line on standard error.
#[allow(dead_code)] // not every example complains
pub fn complain(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// The end of a program: an error goes to standard error, behind the program's name.
#[allow(dead_code)] // likewise
pub fn exit_code(
    program: &str,
    result: Result<(), Box<dyn std::error::Error>>,
) -> std::process::ExitCode {
    match result {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            complain(&format!("{program}: {error}"));
            std::process::ExitCode::FAILURE
        }
    }
}

/// The server's log, at level `info` unless RUST_LOG says otherwise. Write errors are ignored.
#[allow(dead_code)] // likewise
pub fn log_to_stderr() {
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("info")).init();
}

/// The first SIGTERM or SIGINT sets what is returned and interrupts the poll, the second ends the process.
///
/// For a program with no thread but the server's: with a second one the C library makes every system call dearer, for its
/// cancellation points (`pthreads(7)`).
#[allow(dead_code)] // likewise
pub fn note_signals() -> std::io::Result<std::sync::Arc<std::sync::atomic::AtomicBool>> {
    use signal_hook::consts::{SIGINT, SIGTERM};
    let (noted, again) = (std::sync::Arc::default(), std::sync::Arc::default());
    for signal in [SIGTERM, SIGINT] {
        // They are done in this order: the first is noted from here on, and ends nothing.
        signal_hook::flag::register(signal, std::sync::Arc::clone(&noted))?;
        signal_hook::flag::register_conditional_shutdown(signal, 1, std::sync::Arc::clone(&again))?;
        signal_hook::flag::register(signal, std::sync::Arc::clone(&again))?;
    }
    Ok(noted)
}

/// The first SIGTERM or SIGINT drains, the second ends the process.
#[allow(dead_code)] // likewise
pub fn drain_on_signal<A: 'static>(
    handle: portcullis::Handle<A>,
    grace: std::time::Duration,
) -> std::io::Result<()> {
    on_signal(move || {
        // It fails only if the server is gone already.
        let _ = handle.drain(grace);
    })
}

/// The first SIGTERM or SIGINT does this, the second ends the process.
#[allow(dead_code)] // likewise
pub fn on_signal(act: impl FnOnce() + Send + 'static) -> std::io::Result<()> {
    use signal_hook::consts::{SIGINT, SIGTERM};
    let mut signals = signal_hook::iterator::Signals::new([SIGTERM, SIGINT])?;
    std::thread::spawn(move || {
        let mut signals = signals.forever();
        signals.next();
        act();
        signals.next();
        std::process::exit(1);
    });
    Ok(())
}
