//! The events: one snapshot a second for all browsers, made in many short jobs. Without a browser
//! nothing runs.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;

use super::data::{Connections, Sampler, Snapshot};
use super::ranking::{write_text, Query, Ranking};
use crate::handler::{ConnInfo, Control};
use crate::id::{ConnId, ListenerId};
use crate::proto::Time;

const PERIOD: Duration = Duration::from_secs(1);
/// The loop's time is not all taken by visits, however many connections there are.
const MIN_PAUSE: Duration = Duration::from_millis(250);
/// Slots that one job visits.
const SLICE: usize = 256;
/// Different queries at one time: each costs a comparison for each connection.
const MAX_QUERIES: usize = 8;
const MAX_LISTENERS: usize = 256;
const MAX_CLOSES: usize = 20;

/// The browsers that follow the events, and what they get.
pub(super) struct Feed {
    kill: bool,
    subscribers: Vec<(ConnId, Query)>,
    /// Whether a job is scheduled.
    is_running: bool,
    round: Round,
    sampler: Sampler,
    descriptor_limit: Option<usize>,
    /// The last snapshot, for a browser that comes before the next.
    last: Option<Arc<[u8]>>,
}

/// One walk over all connections.
struct Round {
    begun: Time,
    rankings: Vec<Ranking>,
    names: HashMap<ListenerId, String>,
    text: String,
}

pub(super) type SharedFeed = Rc<RefCell<Feed>>;

impl Feed {
    pub(super) fn new(kill: bool) -> Self {
        Self {
            kill,
            subscribers: Vec::new(),
            is_running: false,
            round: Round {
                begun: Time::ZERO,
                rankings: Vec::new(),
                names: HashMap::new(),
                text: String::new(),
            },
            sampler: Sampler::new(),
            descriptor_limit: None,
            last: None,
        }
    }

    /// True if this query would be one too many.
    pub(super) fn refuses(&self, query: &Query) -> bool {
        self.queries().all(|other| other != query) && self.queries().count() >= MAX_QUERIES
    }

    /// The different queries.
    fn queries(&self) -> impl Iterator<Item = &Query> {
        let all = self.subscribers.iter().enumerate();
        let distinct = all.filter(|(at, (_, query))| {
            let mut before = self.subscribers.iter().take(*at);
            before.all(|(_, other)| other != query)
        });
        distinct.map(|(_, (_, query))| query)
    }

    pub(super) fn unsubscribe(&mut self, id: ConnId) {
        self.subscribers.retain(|(subscriber, _)| *subscriber != id);
    }

    /// The events that a new browser gets at once: the last minute, and the last snapshot.
    fn first_events(&self) -> Vec<u8> {
        let mut events = b"retry: 1000\n\n".to_vec();
        write_event("history", &self.sampler.history, &mut events);
        events.extend_from_slice(self.last.as_deref().unwrap_or_default());
        events
    }

    fn begin_round<A>(&mut self, control: &mut Control<'_, A>) {
        self.round.begun = control.now();
        let is_there = |&(id, _): &(ConnId, Query)| control.conn(id).is_some();
        self.subscribers.retain(is_there);
        let listeners = control.tree(0).listeners.into_iter();
        let names = listeners.map(|(listener, _)| (listener.id, listener.name));
        self.round.names = names.collect();
        let queries: Vec<_> = self.queries().cloned().collect();
        self.round.rankings = queries.into_iter().map(Ranking::new).collect();
    }

    fn visit(&mut self, connections: &[ConnInfo]) {
        let Round {
            rankings,
            names,
            text,
            ..
        } = &mut self.round;
        for info in connections {
            write_text(info, names, text);
            for ranking in rankings.iter_mut() {
                ranking.visit(info, text);
            }
        }
    }

    fn snapshot<A>(&mut self, control: &mut Control<'_, A>) -> Arc<[u8]> {
        let tree = control.tree(0);
        let listeners_total = tree.listeners.len();
        let listeners = tree.listeners.into_iter().take(MAX_LISTENERS);
        let metrics = control.metrics();
        let shard = control.shard();
        let mut snapshot = Snapshot {
            sequence: 0,
            stats: tree.stats,
            shard: shard.map(|(number, _)| number),
            shards: shard.map_or(1, |(_, all)| all),
            draining: tree.draining,
            descriptors: tree.descriptors,
            descriptors_peak: 0,
            descriptor_limit: self.descriptor_limit,
            memory_peak: 0,
            memory_limit: metrics.memory_limit,
            outgoing: tree.outgoing,
            listeners: listeners.map(|(listener, _)| listener).collect(),
            listeners_total,
            histograms: metrics.histograms,
            alarms: metrics.alarms,
            recent_closes: control.last_closes(MAX_CLOSES),
            rates: None,
            kill: self.kill,
        };
        self.sampler.complete(&mut snapshot, control.now());
        let mut event = Vec::new();
        write_event("snapshot", &snapshot, &mut event);
        event.into()
    }

    /// Sends what was found to all browsers that have taken the last events.
    fn publish<A>(&mut self, control: &mut Control<'_, A>) {
        let snapshot = self.snapshot(control);
        let mut shown: Vec<(Query, Arc<[u8]>)> = Vec::new();
        for ranking in &mut self.round.rankings {
            let query = ranking.query.clone();
            let data = Connections {
                sort: query.sort.name(),
                order: if query.ascending { "asc" } else { "desc" },
                filter: query.filter.clone(),
                matching: ranking.matching,
                connections: ranking.take(),
            };
            let mut event = Vec::new();
            write_event("connections", &data, &mut event);
            shown.push((query, event.into()));
        }
        for (id, query) in &self.subscribers {
            let Some(mut conn) = control.conn(*id).filter(|conn| conn.queued() == 0) else {
                continue;
            };
            // Without one it came during this round. An error: the connection ends.
            let _ = match shown.iter().find(|(other, _)| other == query) {
                Some((_, shown)) => conn.send((Arc::clone(&snapshot), Arc::clone(shown))),
                None => conn.send(Arc::clone(&snapshot)),
            };
        }
        self.last = Some(snapshot);
    }
}

/// Adds a browser, and sends it `head` with the first events.
pub(super) fn subscribe<A>(
    feed: &SharedFeed,
    control: &mut Control<'_, A>,
    id: ConnId,
    query: Query,
    head: String,
) {
    let mut locked = feed.borrow_mut();
    if let Some(mut conn) = control.conn(id) {
        // An error: the connection ends.
        let _ = conn.send((head, locked.first_events()));
    }
    locked.subscribers.push((id, query));
    if !locked.is_running {
        locked.is_running = true;
        locked.descriptor_limit = control.descriptor_limit();
        schedule_round(feed, control, Duration::ZERO);
    }
}

fn schedule_round<A>(feed: &SharedFeed, control: &mut Control<'_, A>, after: Duration) {
    let feed = Rc::clone(feed);
    control.set_timer(after, move |_app, control| {
        {
            let mut feed = feed.borrow_mut();
            if feed.subscribers.is_empty() {
                feed.is_running = false;
                feed.last = None;
                feed.sampler.pause();
                return;
            }
            feed.begin_round(control);
        }
        visit_slice(&feed, control, 0);
    });
}

/// Visits the connections in some slots, and schedules the next slots.
fn visit_slice<A>(feed: &SharedFeed, control: &mut Control<'_, A>, from: usize) {
    let (connections, next) = control.connections_page(from, SLICE);
    feed.borrow_mut().visit(&connections);
    if let Some(next) = next {
        let feed = Rc::clone(feed);
        control.set_timer(Duration::ZERO, move |_app, control| {
            visit_slice(&feed, control, next);
        });
        return;
    }
    feed.borrow_mut().publish(control);
    let took = control.now().since(feed.borrow().round.begun);
    let pause = PERIOD.saturating_sub(took).max(MIN_PAUSE);
    schedule_round(feed, control, pause);
}

/// Appends a server-sent event. JSON has no line feed.
fn write_event(name: &str, data: &impl Serialize, out: &mut Vec<u8>) {
    let start = out.len();
    out.extend_from_slice(format!("event: {name}\ndata: ").as_bytes());
    match serde_json::to_writer(&mut *out, data) {
        Ok(()) => out.extend_from_slice(b"\n\n"),
        // No type here has a value that is no JSON.
        Err(_) => out.truncate(start),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Fails to be serialized, behind its beginning.
    struct Broken;

    impl Serialize for Broken {
        fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
            let _begun = serializer.serialize_seq(None)?;
            Err(serde::ser::Error::custom("broken"))
        }
    }

    #[test]
    fn an_event_that_is_no_json_leaves_no_part_in_the_stream() {
        let mut out = Vec::new();
        write_event("one", &1, &mut out);
        write_event("broken", &Broken, &mut out);
        write_event("two", &2, &mut out);
        let expected = "event: one\ndata: 1\n\nevent: two\ndata: 2\n\n";
        assert_eq!(String::from_utf8_lossy(&out), expected);
    }
}
