//! Worlds drawn from seeds: a server, clients, and everything that can go wrong between them.
//!
//! Each seed draws its own listeners, kinds of handlers, script and faults. The script is played
//! with faults. Then faults end, later clients are served, and everything must come to rest. After
//! every iteration the simulator checks the server's invariants. Handlers compare each frame with a
//! naive reader's of the client's bytes. Clients compare each byte with the handlers' output: a
//! prefix of it, and all of it after an orderly end.

use std::collections::BTreeMap;
use std::panic::AssertUnwindSafe;

use portcullis::sim::{shrink, Coverage, Faults};
use portcullis::CloseReason;

mod app;
mod bans;
mod descriptors;
mod header;
mod logger;
mod pace;
mod plan;
mod rates;
mod rules;
mod sim_client;
mod subject;
mod wire;
mod world;

use plan::Act;
pub use plan::Plan;
use rules::Rules;
use world::World;

/// What a world was like.
#[derive(Debug, Default)]
pub struct Report {
    pub events: u64,
    pub iterations: u64,
    pub hash: u64,
    pub connections: u64,
    pub reasons: BTreeMap<CloseReason, u64>,
    pub coverage: Coverage,
    pub orders: u64,
    pub orders_refused: u64,
    pub trace: Vec<String>,
}

/// A world that broke.
#[derive(Debug)]
pub struct Failure {
    pub what: String,
    pub trace: Vec<String>,
}

impl Plan {
    /// Plays it.
    pub fn run(&self, keep_trace: bool) -> Result<Report, Failure> {
        let mut world = World::new(self).map_err(|what| Failure {
            what,
            trace: Vec::new(),
        })?;
        if keep_trace {
            world.sim.keep_trace();
        }
        // Whatever foreign code does, its panics stay inside.
        let played = std::panic::catch_unwind(AssertUnwindSafe(|| world.play(self)));
        let outcome = played.unwrap_or_else(|_| Err("a panic has left the server".to_owned()));
        let trace = world.sim.take_trace();
        match outcome {
            Err(what) => Err(Failure { what, trace }),
            Ok(()) => {
                let stats = world.sim.stats();
                let orders = &world.sim.app().commands;
                Ok(Report {
                    events: world.sim.events(),
                    iterations: stats.iterations,
                    hash: world.sim.trace_hash(),
                    connections: stats.accepted + stats.outgoing,
                    reasons: crate::reasons(|reason| stats.closed(reason))
                        .into_iter()
                        .collect(),
                    orders: orders.taken(),
                    orders_refused: orders.refused,
                    coverage: world.sim.take_coverage(),
                    trace,
                })
            }
        }
    }

    /// The smallest world that can be found that still breaks: fewer kinds of faults, fewer things that happen,
    /// fewer frames at a time, and fewer listeners.
    pub fn shrink(&self) -> Self {
        let mut smallest = self.clone();
        let fails = |plan: &Self| plan.run(false).is_err();
        let quiet: [fn(&mut Faults); 10] = [
            |faults| faults.errors = 0,
            |faults| faults.short_reads = 0,
            |faults| faults.short_writes = 0,
            |faults| faults.spurious_events = 0,
            |faults| faults.late_events = 0,
            |faults| faults.reordered = 0,
            |faults| faults.duplicated = 0,
            |faults| faults.clock_leaps = 0,
            |faults| faults.full_batches = 0,
            |faults| faults.famines = 0,
        ];
        let epoll = Self {
            kqueue: false,
            ..smallest.clone()
        };
        if fails(&epoll) {
            smallest = epoll;
        }
        for silence in quiet {
            let mut quieter = smallest.clone();
            silence(&mut quieter.faults);
            if fails(&quieter) {
                smallest = quieter;
            }
        }
        for door in 0..smallest.setup.doors.len() {
            let mut freer = smallest.clone();
            let rules = &mut freer.setup.doors[door].rules;
            *rules = Rules::none(rules.proxy);
            if fails(&freer) {
                smallest = freer;
            }
        }
        smallest.script = shrink(&smallest.script, |script| {
            fails(&Self {
                script: script.to_vec(),
                ..smallest.clone()
            })
        });
        for at in 0..smallest.script.len() {
            let mut fewer = smallest.clone();
            while let Some(Act::Say {
                frames: frames @ 2..,
                ..
            }) = fewer.script.get_mut(at).map(|action| &mut action.act)
            {
                *frames -= 1;
                if !fails(&fewer) {
                    break;
                }
                smallest.script.clone_from(&fewer.script);
            }
        }
        while smallest.setup.doors.len() > 1 {
            let mut fewer = smallest.clone();
            fewer.setup.doors.pop();
            if !fails(&fewer) {
                break;
            }
            smallest = fewer;
        }
        smallest
    }
}
