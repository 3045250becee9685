//! What the observer sends once a second. The names are stable: `src/manual/observer.md`.

use std::collections::VecDeque;
use std::time::Duration;

use crate::alarm::AlarmInfo;
use crate::handler::ConnInfo;
use crate::histogram::Histograms;
use crate::listener_info::ListenerInfo;
use crate::proto::Time;
use crate::recent::RecentClose;
use crate::serialize::fields;
use crate::stats::Stats;

/// Seconds of rates that are kept.
const HISTORY: usize = 60;

/// The whole server but its connections.
pub(super) struct Snapshot {
    /// The number of this snapshot, since the first browser came.
    pub(super) sequence: u64,
    pub(super) stats: Stats,
    /// The number of this shard, from 0; `None` without shards.
    pub(super) shard: Option<usize>,
    /// The number of shards.
    pub(super) shards: usize,
    pub(super) draining: bool,
    pub(super) descriptors: usize,
    /// The greatest number of descriptors in a snapshot.
    pub(super) descriptors_peak: usize,
    pub(super) descriptor_limit: Option<usize>,
    /// The greatest number of buffered bytes in a snapshot.
    pub(super) memory_peak: usize,
    pub(super) memory_limit: Option<usize>,
    pub(super) outgoing: usize,
    /// The first listeners.
    pub(super) listeners: Vec<ListenerInfo>,
    /// The number of all listeners.
    pub(super) listeners_total: usize,
    pub(super) histograms: Histograms,
    pub(super) alarms: Vec<AlarmInfo>,
    pub(super) recent_closes: Vec<RecentClose>,
    /// `None` in the first snapshot, which has none to compare with.
    pub(super) rates: Option<Rates>,
    /// Whether connections can be killed.
    pub(super) kill: bool,
}

fields!(Snapshot {
    sequence,
    stats,
    shard,
    shards,
    draining,
    descriptors,
    descriptors_peak,
    descriptor_limit,
    memory_peak,
    memory_limit,
    outgoing,
    listeners,
    listeners_total,
    histograms,
    alarms,
    recent_closes,
    rates,
    kill,
});

/// What happened between two snapshots, each per second.
#[derive(Clone, Debug)]
pub(super) struct Rates {
    accepted: f64,
    outgoing: f64,
    closed: f64,
    bytes_in: f64,
    bytes_out: f64,
    frames_in: f64,
    frames_out: f64,
    iterations: f64,
    /// Connections in a slot at the end.
    open: usize,
    /// Buffered bytes at the end.
    memory: usize,
    /// The time between the two.
    interval: Duration,
}

fields!(Rates {
    accepted, outgoing, closed, bytes_in, bytes_out, frames_in, frames_out, iterations, open,
    memory,
} seconds { interval });

impl Rates {
    fn between(before: &Stats, now: &Stats, interval: Duration) -> Self {
        let seconds = interval.as_secs_f64().max(0.001);
        let rate = |before: u64, now: u64| now.saturating_sub(before) as f64 / seconds;
        let (from, to) = (&before.traffic, &now.traffic);
        Self {
            accepted: rate(before.accepted, now.accepted),
            outgoing: rate(before.outgoing, now.outgoing),
            closed: rate(before.closed_total(), now.closed_total()),
            bytes_in: rate(from.bytes_in, to.bytes_in),
            bytes_out: rate(from.bytes_out, to.bytes_out),
            frames_in: rate(from.frames_in, to.frames_in),
            frames_out: rate(from.frames_out, to.frames_out),
            iterations: rate(before.iterations, now.iterations),
            open: now.open,
            memory: now.memory,
            interval,
        }
    }
}

/// The rates of the last minute.
pub(super) struct History {
    /// The number of the last snapshot, to which the last of them belongs.
    pub(super) sequence: u64,
    pub(super) samples: VecDeque<Rates>,
}

fields!(History { sequence, samples });

/// The connections that a query shows.
pub(super) struct Connections {
    pub(super) sort: &'static str,
    pub(super) order: &'static str,
    pub(super) filter: String,
    /// Number of connections that match the filter.
    pub(super) matching: usize,
    /// The first of these, in order.
    pub(super) connections: Vec<ConnInfo>,
}

fields!(Connections {
    sort,
    order,
    filter,
    matching,
    connections
});

/// Compares each snapshot with the one before.
pub(super) struct Sampler {
    before: Option<(Time, Stats)>,
    pub(super) history: History,
    descriptors_peak: usize,
    memory_peak: usize,
}

impl Sampler {
    pub(super) fn new() -> Self {
        let samples = VecDeque::with_capacity(HISTORY);
        Self {
            before: None,
            history: History {
                sequence: 0,
                samples,
            },
            descriptors_peak: 0,
            memory_peak: 0,
        }
    }

    /// Forgets the last snapshot: the time until the next one is not a second.
    pub(super) fn pause(&mut self) {
        self.before = None;
        self.history.samples.clear();
    }

    /// Adds number, peaks and rates to a snapshot.
    pub(super) fn complete(&mut self, snapshot: &mut Snapshot, now: Time) {
        self.history.sequence += 1;
        snapshot.sequence = self.history.sequence;
        self.descriptors_peak = self.descriptors_peak.max(snapshot.descriptors);
        snapshot.descriptors_peak = self.descriptors_peak;
        self.memory_peak = self.memory_peak.max(snapshot.stats.memory);
        snapshot.memory_peak = self.memory_peak;
        if let Some((at, before)) = &self.before {
            let rates = Rates::between(before, &snapshot.stats, now.since(*at));
            if self.history.samples.len() >= HISTORY {
                self.history.samples.pop_front();
            }
            self.history.samples.push_back(rates.clone());
            snapshot.rates = Some(rates);
        }
        self.before = Some((now, snapshot.stats.clone()));
    }
}
