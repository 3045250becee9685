//! Echo on every core: one port, one cap, one handle. Each shard counts for itself, without a lock.
//!
//!     cargo run --release --example shards -- 127.0.0.1:7000 4

use std::error::Error;
use std::time::Duration;

use portcullis::{Config, Context, Framing, Handler, Listen, Outcome, Shards};

#[path = "support/terminal.rs"]
mod terminal;

/// One shard's own state.
struct Tally {
    shard: usize,
    echoes: u64,
}

impl Drop for Tally {
    fn drop(&mut self) {
        terminal::say(&format!("shard {}: {} echoes", self.shard, self.echoes));
    }
}

struct Echo;

impl Handler<Tally> for Echo {
    fn on_frame(&mut self, cx: &mut Context<'_, Tally>, frame: &[u8]) -> Outcome {
        cx.app.echoes += 1;
        cx.conn.send(frame)?;
        Ok(())
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let addr = arguments
        .next()
        .unwrap_or_else(|| "127.0.0.1:7000".to_owned());
    terminal::log_to_stderr();

    let mut shards = Shards::new(Config::max_connections(10_000));
    if let Some(threads) = arguments.next() {
        shards = shards.threads(threads.parse()?);
    }
    let running = shards.spawn(move |shard, server| {
        server.listen(
            Listen::tcp(addr.as_str(), Framing::Packet2),
            |_app, _peer| Echo,
        )?;
        Ok(Tally { shard, echoes: 0 })
    })?;

    let handle = running.handle.clone();
    terminal::on_signal(move || {
        // It fails only if all shards are gone already.
        let _ = handle.drain(Duration::from_secs(10));
    })?;
    let count = running.handle.shards().len();
    terminal::say(&format!(
        "listening on {} ({count} shards)",
        running.listeners[0].addr
    ));

    let handle = running.handle.clone();
    let report = running.join()?;
    for (shard, handle) in handle.shards().enumerate() {
        terminal::say(&format!(
            "shard {shard}: {} connections",
            handle.stats().accepted
        ));
    }
    let stats = handle.stats();
    terminal::say(&format!(
        "all: {} connections, {} echoes",
        stats.accepted, stats.traffic.frames_in
    ));
    if let Some(report) = report {
        terminal::say(&format!(
            "drained in {:.1?}: {} connections ended in order, {} otherwise, {} were forced",
            report.took, report.ended, report.failed, report.forced
        ));
    }
    Ok(())
}
