//! One loop, from a thousand connections to four million: memory, and what each kind of work costs. The real reactor on the
//! simulated kernel, because no process here may have so many descriptors.
//!
//!     cargo bench --bench scale                      up to a million: half a minute, 1.5 GiB
//!     cargo bench --bench scale -- --most 4000000    three minutes, 6 GiB
//!
//! Times are per connection, or per iteration where stated. "Longest turn" is the longest time for
//! which another connection would have waited.

#[path = "common/mod.rs"]
mod common;

use std::alloc::System;
use std::time::{Duration, Instant};

use clap::Parser;
use common::progress_of;
use indicatif::ProgressBar;
use portcullis::sim::{ClientId, Sim};
use portcullis::{Config, Context, Framing, Handler, Listen, Outcome, Quota};
use stats_alloc::{Region, StatsAlloc, INSTRUMENTED_SYSTEM};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

/// Connections that speak beside those that are idle.
const ACTIVE: usize = 64;
const IDLE_TIMEOUT: Duration = Duration::from_secs(100);
const PAGE: usize = 1_000;
/// Clients that do something at once: the simulated kernel is to be busy with few at a time.
const CHUNK: usize = 1_000;
/// How often a row goes through its connections: it accepts them three times and ends them three
/// times, and it moves their deadlines.
const PHASES: usize = 7;

#[derive(Parser)]
struct Options {
    /// The most connections
    #[arg(long, default_value_t = 1_000_000)]
    most: usize,
    /// Said by `cargo bench`
    #[arg(long, hide = true)]
    bench: bool,
}

struct Echo;

impl Handler for Echo {
    fn on_frame(&mut self, cx: &mut Context<'_>, frame: &[u8]) -> Outcome {
        cx.conn.send(frame)?;
        Ok(())
    }
}

/// What is timed: all of it, and the longest turn in it.
#[derive(Default)]
struct Timed {
    total: Duration,
    longest: Duration,
}

impl Timed {
    /// Turns until `done`, and a few more than enough.
    fn until(&mut self, sim: &mut Sim, done: impl Fn(&Sim) -> bool) {
        while !done(sim) {
            let begun = Instant::now();
            sim.step();
            let took = begun.elapsed();
            self.total += took;
            self.longest = self.longest.max(took);
        }
    }

    fn each(&self, count: usize) -> f64 {
        self.total.as_nanos() as f64 / count as f64
    }

    fn longest(&self) -> f64 {
        self.longest.as_nanos() as f64 / 1_000.0
    }
}

fn main() {
    let mut options = Options::parse();
    if !options.bench {
        // Under `cargo test` it shows that it works.
        options.most = 1_000;
    }
    println!(
        "| connections | memory, bytes each | accept, ns each (longest turn, µs) | 64 messages beside them, ns each | turn at rest, ns \
         | page of {PAGE}, µs | deadline moved on, ns each (longest turn, µs) | timed out, ns each (longest turn, µs) \
         | reset by peers, ns each (longest turn, µs) | drained by force, ns each (longest turn, µs) |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|");
    let mut sizes = vec![1_000, 10_000, 100_000, 1_000_000, 4_000_000];
    sizes.retain(|&connections| connections <= options.most);
    let progress = progress_of(PHASES * sizes.iter().sum::<usize>(), "connections");
    for connections in sizes {
        row(connections, &progress);
    }
    progress.finish_and_clear();
}

fn row(connections: usize, progress: &ProgressBar) {
    let crowd = || crowd(connections, progress);
    let (mut sim, clients, memory, accept) = crowd();
    let message = b"\0\x40................................................................";
    let mut active = Timed::default();
    for _ in 0..100 {
        let before = sim.stats().traffic.frames_in;
        for &client in clients.iter().step_by(connections / ACTIVE).take(ACTIVE) {
            sim.send(client, message);
        }
        active.until(&mut sim, |sim| {
            sim.stats().traffic.frames_in == before + ACTIVE as u64
        });
    }
    let mut rest = Timed::default();
    for _ in 0..1_000 {
        let begun = Instant::now();
        sim.step();
        rest.total += begun.elapsed();
    }
    let page = enumerate(&mut sim, connections);
    // All have spoken since their timer was set, so each fires, is looked at, and set again.
    sim.leap(IDLE_TIMEOUT / 2);
    sim.settle();
    for some in clients.chunks(CHUNK) {
        for &client in some {
            sim.send(client, message);
        }
        sim.settle();
        for &client in some {
            sim.received(client);
        }
    }
    sim.leap(IDLE_TIMEOUT / 2 + Duration::from_secs(1));
    let mut moved = Timed::default();
    moved.until(&mut sim, |sim| !busy(sim));
    progress.inc(connections as u64);
    sim.leap(IDLE_TIMEOUT);
    let mut expired = Timed::default();
    expired.until(&mut sim, |sim| sim.stats().open == 0);
    progress.inc(connections as u64);
    drop(sim);

    let (mut sim, clients, ..) = crowd();
    let mut reset = Timed::default();
    for (number, some) in clients.chunks(CHUNK).enumerate() {
        for &client in some {
            sim.reset(client);
        }
        let left = connections - number * CHUNK - some.len();
        reset.until(&mut sim, |sim| sim.stats().open == left);
        progress.inc(some.len() as u64);
    }
    drop(sim);

    let (mut sim, ..) = crowd();
    sim.control().drain(Duration::from_secs(1));
    let mut drained = Timed::default();
    drained.until(&mut sim, |sim| !busy(sim));
    sim.leap(Duration::from_secs(2));
    drained.until(&mut sim, |sim| sim.drain_report().is_some());
    progress.inc(connections as u64);

    let both = |timed: &Timed| format!("{:.0} ({:.0})", timed.each(connections), timed.longest());
    let line = format!(
        "| {connections} | {memory:.0} | {} | {:.0} | {:.0} | {page:.0} | {} | {} | {} | {} |",
        both(&accept),
        active.each(100 * ACTIVE),
        rest.each(1_000),
        both(&moved),
        both(&expired),
        both(&reset),
        both(&drained),
    );
    progress.suspend(|| println!("{line}"));
}

fn busy(sim: &Sim) -> bool {
    sim.next_timeout() == Some(Duration::ZERO)
}

/// All connections are open and at rest. Memory is the server's, per connection: its reservation at
/// the start, and its allocations while it accepts them.
fn crowd(connections: usize, progress: &ProgressBar) -> (Sim, Vec<ClientId>, f64, Timed) {
    const BACKLOG: usize = 1_024;
    let config = Config::max_connections(connections)
        .with(|config| config.pending_limits.connections = Quota::Count(connections));
    let region = Region::new(ALLOCATOR);
    let mut sim = Sim::new(1, config, ());
    let mut memory = grown(&region);
    sim.set_checks(false);
    let listen = Listen::tcp("127.0.0.1:0", Framing::Packet2).with(|listen| {
        listen.socket.backlog = BACKLOG as u32;
        listen.conn.idle_timeout = IDLE_TIMEOUT;
        listen.conn.linger_timeout = Duration::ZERO;
        listen.conn.linger_bytes = 0;
    });
    let addr = sim.listen(listen, |_app, _peer| Echo).expect("a listener");
    let mut clients = Vec::with_capacity(connections);
    let mut accept = Timed::default();
    while clients.len() < connections {
        let some = BACKLOG.min(connections - clients.len());
        clients.extend((0..some).filter_map(|_| sim.connect(addr)));
        let region = Region::new(ALLOCATOR);
        accept.until(&mut sim, |sim| {
            !busy(sim) && sim.stats().open == clients.len()
        });
        memory += grown(&region);
        progress.inc(some as u64);
    }
    (sim, clients, memory as f64 / connections as f64, accept)
}

fn grown(region: &Region<'_, System>) -> isize {
    let change = region.change();
    change.bytes_allocated as isize - change.bytes_deallocated as isize
}

/// Microseconds for a page of all that there are; the mean over all pages.
fn enumerate(sim: &mut Sim, connections: usize) -> f64 {
    let begun = Instant::now();
    let (mut pages, mut seen, mut from) = (0, 0, Some(0));
    while let Some(slot) = from {
        let (page, next) = sim.control().connections_page(slot, PAGE);
        (pages, seen, from) = (pages + 1, seen + page.len(), next);
    }
    assert_eq!(seen, connections, "each once");
    begun.elapsed().as_nanos() as f64 / 1_000.0 / f64::from(pages)
}
