//! The echo server: every frame comes back. The tutorial of this crate; its options are in `support/options.rs`.
//!
//!     cargo run --release --example echo -- --help

use std::error::Error;
use std::process::ExitCode;
use std::sync::atomic::Ordering;
use std::time::Duration;

use portcullis::{CloseReason, Config, Context, Handler, Listen, Outcome, Server, Stats};

#[path = "support/options.rs"]
mod options;
#[path = "support/terminal.rs"]
mod terminal;

/// One connection. It has no state; a real protocol would keep its own here.
struct Echo;

impl Handler for Echo {
    fn on_frame(&mut self, cx: &mut Context<'_>, frame: &[u8]) -> Outcome {
        cx.conn.send(frame)?;
        Ok(())
    }
}

fn main() -> ExitCode {
    let options = options::parse();
    terminal::log_to_stderr();
    terminal::exit_code("echo", serve(&options))
}

fn serve(options: &options::Options) -> Result<(), Box<dyn Error>> {
    let mut listen = Listen::tcp(options.listen.as_str(), options.framing.framing());
    listen.access_rules = options.access.clone();
    listen.conn.idle_timeout = options::or_never(options.idle_timeout);
    listen.conn.handshake_timeout = options::or_never(options.handshake_timeout);
    listen.conn.max_frame = options.max_packet;
    listen = options.add_tls(options.add_proxy(listen))?;

    let mut config = Config::max_connections(options.max_connections);
    config.memory_limit = options.memory_limit;
    let observer = options.observer()?;
    if let Some((listen, _)) = &observer {
        // On top of the clients.
        config.max_connections = config.max_connections.saturating_add(listen.reserved);
    }
    let mut server = Server::new(config)?;
    let id = server.listen(listen, |_app, _peer| Echo)?;
    let addr = server.control().listener(id)?.addr;
    let observer = match observer {
        Some((listen, observer)) => Some(server.listen_with(listen, observer)?),
        None => None,
    };
    // Before the address is printed: its reader may send a signal at once.
    let signalled = terminal::note_signals()?;
    terminal::say(&format!("listening on {addr} ({})", options.framing.name()));
    terminal::say(&format!("try:  {}", options.try_it(&addr)));
    if let Some(id) = observer {
        let addr = server.control().listener(id)?.addr;
        terminal::say(&format!("observer on http://{addr}/"));
    }

    // A signal interrupts the poll. One that comes between the question and the poll is seen within the second.
    while !signalled.load(Ordering::Relaxed) {
        server.poll_once(&mut (), Some(Duration::from_secs(1)))?;
    }
    server.control().drain(options.grace);
    server.run(&mut ())?;

    terminal::say(&summary(&server.control().stats()));
    if let Some(report) = server.control().drain_report() {
        terminal::say(&format!(
            "drained in {:.1?}: {} connections ended in order, {} otherwise, {} were forced",
            report.took, report.ended, report.failed, report.forced
        ));
    }
    Ok(())
}

fn summary(stats: &Stats) -> String {
    let reasons: Vec<String> = CloseReason::ALL
        .iter()
        .map(|&reason| (reason, stats.closed(reason)))
        .filter(|&(_, count)| count > 0)
        .map(|(reason, count)| format!("{count} {reason}"))
        .collect();
    format!(
        "{} accepted (at most {} at once), {} frames in, {} frames out, {} bytes in, {} bytes out; closed: {}",
        stats.accepted,
        stats.peak,
        stats.traffic.frames_in,
        stats.traffic.frames_out,
        stats.traffic.bytes_in,
        stats.traffic.bytes_out,
        if reasons.is_empty() {
            "none".to_owned()
        } else {
            reasons.join(", ")
        }
    )
}
