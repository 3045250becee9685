//! Many connections and the operating system. Never looks at a payload byte.
//!
//! One [`Reactor::iterate`] is: read the clock, poll, give each connection with an event its turn, carry out commands,
//! work through the ready list, accept, judge what was due at the reading *before* the poll (and only if the poll's batch
//! was not full: more input may wait than we have seen), move a drain on, let each listener's registration follow its
//! state, and sound alarms. Deadlines are armed from a clock read at the beginning of each connection's turn.

mod accept;
mod admission;
mod alarms;
pub(crate) mod clock;
mod close;
mod commands;
mod connect;
mod connections;
mod control_ops;
mod deliver;
pub(crate) mod detached_conns;
mod drain;
#[cfg(feature = "sim")]
mod invariants;
mod listener;
mod memory;
pub(crate) mod os;
pub(crate) mod os_mio;
mod pending;
mod ports;
mod ready;
pub(crate) mod shared_cap;
pub(crate) mod shared_listen_sockets;
mod socket_file;
mod sources;
mod timers;
mod turn;
mod view;

use std::any::Any;
use std::collections::BTreeSet;
use std::io;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::Arc;
use std::time::Duration;

use accept::FdExhaustion;
use admission::OptionalBucket;
use alarms::AlarmEntry;
use connect::Attempts;
use connections::{Connection, Connections};
use detached_conns::DetachedConns;
use drain::Drain;
use listener::Listener;
use memory::MemoryUsage;
use os::{Event, Named, Os, Token};
use pending::Pending;
use ready::Ready;
use shared_cap::{CapShare, SharedCap};
use timers::Timers;
use view::Closes;

use crate::config::Config;
use crate::error::{Error, Result};
use crate::handle::Shared;
use crate::handler::Handler;
use crate::histogram::Histogram;
use crate::id::ConnId;
use crate::logs;
use crate::proto::{Pool, State, Time};
use crate::reason::{CloseReason, Closed};
use crate::stats::Stats;

/// One read. A connection's input is at most its maximum frame and one of these.
const READ_SIZE: usize = 64 * 1024;
/// Places of connections that are reserved at the start in any case, if the cap allows so many: see [`reservable`].
const RESERVED: usize = 1 << 16;
/// Turns given from the ready list in one turn of the loop.
const READY_BUDGET: usize = 1024;
/// Connections that are looked at in one turn because it is time. Who is left keeps the poll from sleeping.
const TIMER_BUDGET: usize = 1024;

/// Where reads go: one for all connections.
#[derive(Default)]
struct Scratch {
    wire: Vec<u8>,
    /// What TLS decrypts from `wire`.
    plain: Vec<u8>,
}

/// All listeners and connections of one server.
pub(crate) struct Reactor<A, O: Os> {
    os: O,
    config: Config,
    /// The turn's time.
    now: Time,
    events: Vec<Event>,
    connections: Connections,
    /// Each slot's socket and handler, apart from the slot so that all three can be had at once.
    streams: Vec<Option<O::Stream>>,
    handlers: Vec<Option<Box<dyn Handler<A>>>>,
    /// Whose turn it is.
    current: Option<ConnId>,
    ready: Ready,
    /// Those whose handshakes have input: served in the order in which they came, whoever comes meanwhile.
    handshake_queue: Ready,
    timers: Timers,
    /// Slots whose timers have fired in this turn.
    fired: Vec<u32>,
    pool: Pool,
    /// `None` while a connection has its turn.
    scratch: Option<Box<Scratch>>,
    handshakes_left: usize,
    listeners: Vec<Listener<A, O::Listener>>,
    next_listener: u32,
    /// Where the accept round begins.
    first_listener: usize,
    fd_exhaustion: FdExhaustion,
    /// Of the server's accept rate.
    bucket: OptionalBucket,
    pending: Pending,
    memory: MemoryUsage,
    /// Connections from which nothing is read because memory is tight.
    paused_for_memory: BTreeSet<ConnId>,
    /// Who is read from all the same, and since when.
    read_grant: Option<(ConnId, Time)>,
    detached_conns: DetachedConns,
    attempts: Attempts,
    drain: Drain,
    alarms: Vec<AlarmEntry<A>>,
    next_alarm: u32,
    closes: Closes,
    ages: Histogram,
    handshake_times: Histogram,
    stopped: bool,
    /// The last poll's batch was full: sockets may be ready that an outer, edge-triggered poll does not announce again.
    events_left: bool,
    /// In a run of full batches: what was due before the first of them, and how many more may come until every socket
    /// that was ready then has been told (the kernel tells them in turn).
    unjudged: Option<(Time, usize)>,
    /// Commands are left over from the last turn.
    commands_left: bool,
    stats: Stats,
    shared: Arc<Shared<A>>,
    /// How many connections were open when the cap was last lowered: they may stay.
    #[cfg(feature = "sim")]
    shrunk_from: usize,
    /// Likewise of those that are not open yet.
    #[cfg(feature = "sim")]
    crowded_from: usize,
}

impl<A, O: Os> Reactor<A, O> {
    pub(crate) fn new(os: O, config: Config) -> Result<Self> {
        config.check()?;
        let shared = Shared::new(os.waker(), config.queue_limit, config.queue_bytes);
        let detached_conns = DetachedConns::new(os.waker());
        let slots = reservable::<O>(config.max_connections);
        let mut reactor = Self {
            now: os.now(),
            os,
            events: Vec::new(),
            connections: Connections::new(config.max_connections, slots),
            streams: Vec::with_capacity(slots),
            handlers: Vec::with_capacity(slots),
            current: None,
            ready: Ready::default(),
            handshake_queue: Ready::default(),
            timers: Timers::with_room_for(slots),
            fired: Vec::new(),
            pool: Pool::default(),
            scratch: Some(Box::new(Scratch {
                wire: vec![0; READ_SIZE],
                plain: Vec::new(),
            })),
            handshakes_left: 0,
            listeners: Vec::new(),
            next_listener: 0,
            first_listener: 0,
            fd_exhaustion: FdExhaustion::default(),
            bucket: OptionalBucket::default(),
            pending: Pending::default(),
            memory: MemoryUsage::new(config.memory_limit),
            paused_for_memory: BTreeSet::new(),
            read_grant: None,
            detached_conns,
            attempts: Attempts::new(),
            drain: Drain::default(),
            alarms: Vec::new(),
            next_alarm: 0,
            closes: Closes::new(config.recent_closes),
            ages: Histogram::default(),
            handshake_times: Histogram::default(),
            stopped: false,
            events_left: false,
            unjudged: None,
            commands_left: false,
            stats: Stats::default(),
            shared: Arc::new(shared),
            #[cfg(feature = "sim")]
            shrunk_from: 0,
            #[cfg(feature = "sim")]
            crowded_from: 0,
            config,
        };
        reactor.publish();
        Ok(reactor)
    }

    pub(crate) fn os(&self) -> &O {
        &self.os
    }

    /// Shares its cap with other servers, of which it is number `index`. Before anybody is connected.
    pub(crate) fn share_cap(&mut self, shared_cap: Arc<SharedCap>, index: usize) {
        let share = CapShare::new(shared_cap, index, self.os.waker());
        self.connections.share(share);
    }

    pub(crate) fn shared(&self) -> &Arc<Shared<A>> {
        &self.shared
    }

    /// How long a poll may sleep: nothing is due before, and no event is needed to go on earlier.
    pub(crate) fn next_timeout(&self) -> Option<Duration> {
        self.sleep_from(self.os.now())
    }

    fn sleep_from(&self, now: Time) -> Option<Duration> {
        if self.events_left
            || self.commands_left
            || !self.ready.is_empty()
            || !self.handshake_queue.is_empty()
            || self.drain.can_go_on(&self.connections)
        {
            return Some(Duration::ZERO);
        }
        let mut wake = self
            .timers
            .next()
            .min(self.fd_exhaustion.until())
            .min(self.fd_exhaustion.over_at())
            .min(self.read_grant_until())
            .min(self.drain.deadline())
            .min(self.alarm_due());
        for listener in &self.listeners {
            wake = wake.min(listener.retry_at).min(self.accepts_at(listener, now));
        }
        wake.is_armed().then(|| wake.since(now))
    }

    /// When this listener may take in somebody who waits already, as far as we know.
    fn accepts_at(&self, listener: &Listener<A, O::Listener>, now: Time) -> Time {
        let asleep = listener.socket.is_none() || listener.suspended || listener.retry_at.is_armed();
        if !listener.readable || asleep || self.fd_exhaustion.is_on() {
            return Time::NEVER;
        }
        listener.admits_at(&self.room_at(now))
    }

    /// One turn: bounded work, whatever the peers do.
    pub(crate) fn iterate(&mut self, app: &mut A, timeout: Option<Duration>) -> Result<()> {
        let due = self.os.now();
        let sleep = match (timeout, self.sleep_from(due)) {
            (Some(asked), Some(ours)) => Some(asked.min(ours)),
            (asked, ours) => asked.or(ours),
        };
        let mut events = std::mem::take(&mut self.events);
        events.clear();
        let full = match self.os.poll(&mut events, sleep) {
            Ok(full) => full,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => false,
            Err(error) => {
                self.events = events;
                return Err(Error::Os {
                    doing: "waiting for events",
                    source: error,
                });
            }
        };
        self.events_left = full;
        self.now = self.os.now();
        if let Some(cap) = self.connections.shared_cap() {
            // Whoever shares it may have changed it.
            self.config.max_connections = cap;
        }
        self.handshakes_left = self.config.handshake_budget;
        for event in &events {
            self.handle_event(app, *event);
        }
        self.events = events;
        self.collect_released();
        self.run_commands(app);
        self.run_ready(app, due);
        self.accept_round(app);
        let due = self.judgeable(due, full, self.events.len());
        if let Some(due) = due {
            self.expire(app, due);
        }
        if self.drain.is_on() {
            self.drain_step(app, due);
        }
        self.forget_closed_listeners();
        self.reconcile();
        self.sound_alarms(app);
        // Last: whatever was taken and given back in this turn is for the others now.
        self.connections.offer_room();
        self.stats.iterations += 1;
        self.publish();
        Ok(())
    }

    /// Whether somebody asked `run` to end, once.
    pub(crate) fn take_stopped(&mut self) -> bool {
        std::mem::take(&mut self.stopped)
    }

    /// What is done next counts from now, however long what was done before has taken: a handler, a service or a job
    /// that blocks must not cost others their time.
    pub(crate) fn catch_up(&mut self) {
        self.now = self.os.now();
    }

    fn handle_event(&mut self, app: &mut A, event: Event) {
        match event.token.named() {
            Named::Waker => {}
            Named::Listener => {
                // Tokens repeat after many listens: an accept that finds nobody costs little.
                for listener in &mut self.listeners {
                    listener.readable |= Token::of_listener(listener.id) == event.token;
                }
            }
            Named::Slot(index) => {
                // An event for a slot's former connection finds nobody.
                if let Some(conn) = self.connections.addressee(index, event.token) {
                    if !event.readable && !event.closed && conn.writable {
                        // Room for output, as was known: an edge that comes with every registration.
                        return;
                    }
                    conn.readable |= event.readable;
                    conn.writable |= event.writable;
                    conn.hang_up |= event.closed;
                    let id = conn.id;
                    if conn.machine.state() == State::Handshaking {
                        self.handshake_queue.push(id, &mut conn.queued);
                    } else {
                        self.turn(app, id);
                    }
                }
            }
        }
    }

    fn run_ready(&mut self, app: &mut A, due: Time) {
        for _ in 0..self.handshake_queue.len() {
            if self.handshakes_left == 0 {
                break;
            }
            let Some(id) = self.handshake_queue.pop() else {
                break;
            };
            let Some(conn) = self.connections.get_mut(id) else {
                continue;
            };
            conn.queued = false;
            let had_input = conn.can_read();
            self.turn(app, id);
            // Its deadline waited for this turn, and waits for no other.
            let late = self
                .connections
                .get_mut(id)
                .filter(|conn| had_input && conn.is_handshake_overdue(due));
            if let Some(conn) = late {
                conn.machine.handle_timeout(due, self.now, &mut self.pool);
                self.turn(app, id);
            }
        }
        // Only those who are on the list now: who comes on meanwhile waits for the next turn.
        for _ in 0..self.ready.len().min(READY_BUDGET) {
            let Some(id) = self.ready.pop() else {
                return;
            };
            if let Some(conn) = self.connections.get_mut(id) {
                conn.queued = false;
                self.turn(app, id);
            }
        }
    }

    /// Up to when deadlines may be judged after this poll. A flood that fills every batch must not stop the clocks.
    fn judgeable(&mut self, due: Time, full: bool, batch: usize) -> Option<Time> {
        if !full {
            self.unjudged = None;
            return Some(due);
        }
        let all = self.connections.len() / batch.max(1) + 1;
        let (since, left) = self.unjudged.get_or_insert((due, all));
        if *left > 0 {
            *left -= 1;
            return None;
        }
        let since = *since;
        self.unjudged = None;
        Some(since)
    }

    /// Judges what was due before the poll; what the poll brought has been read since.
    fn expire(&mut self, app: &mut A, due: Time) {
        if self.fd_exhaustion.until() <= due {
            self.fd_exhaustion.end_pause();
        }
        if self.fd_exhaustion.over_at() <= due {
            self.end_episode();
        }
        if self.read_grant_until() <= due {
            self.grant_next();
        }
        for listener in &mut self.listeners {
            if listener.retry_at <= due {
                listener.retry_at = Time::NEVER;
                listener.readable = true;
            }
        }
        if self.timers.next() > due {
            return;
        }
        // Each once: who has spent its budget and is due again is so in the next turn.
        let mut fired = std::mem::take(&mut self.fired);
        while fired.len() < TIMER_BUDGET {
            let Some(index) = self.timers.pop(due) else {
                break;
            };
            fired.push(index);
        }
        for index in fired.drain(..) {
            let Some(id) = self.connections.by_index(index).map(|conn| conn.id) else {
                continue;
            };
            if self.is_connecting(id) {
                self.expire_attempt(id, due);
                self.turn(app, id);
                continue;
            }
            if let Some(conn) = self.connections.get_mut(id) {
                if conn.queued && conn.can_read() && conn.is_handshake_overdue(due) {
                    // What it sent in time is here, and only the budget has kept us from reading it.
                    continue;
                }
                if conn.machine.is_unsent_since(due) && !conn.writable {
                    // The kernel announces room only when a good part of its buffer is free: a slow reader may have taken
                    // bytes all the time. A write says whether it has.
                    conn.writable = true;
                    self.catch_up();
                    self.flush(id);
                    self.account(id);
                }
            }
            if let Some(conn) = self.connections.get_mut(id) {
                if std::mem::take(&mut conn.retry) {
                    conn.readable = true;
                    conn.writable = true;
                }
                if conn.is_paused_for_memory() && conn.machine.is_frame_late(due) {
                    // It is we who have not read the rest of it.
                    let closed = Closed::new(CloseReason::OverMemory);
                    conn.machine.close(closed, self.now, &mut self.pool);
                } else if conn.machine.deadline() <= due {
                    conn.machine.handle_timeout(due, self.now, &mut self.pool);
                } else if conn.machine.is_at_rest() {
                    // Its turn arms nothing.
                    self.timers.arm(index, conn.machine.deadline());
                }
                self.turn(app, id);
            }
        }
        self.fired = fired;
    }

    /// There may be room now: tries every listener that is out of the poll, without waiting for an event.
    fn look_for_clients(&mut self) {
        for listener in &mut self.listeners {
            listener.readable |= !listener.registered && listener.socket.is_some();
        }
    }

    /// Fills in the counters that others keep.
    fn complete(&self, stats: &mut Stats) {
        stats.open = self.connections.len();
        stats.max_connections = self.connections.cap();
        stats.pending = self.pending.len();
        stats.connecting = self.attempts.len();
        stats.memory = self.memory.total();
        stats.paused_for_memory = self.paused_for_memory.len();
        stats.bytes_in = self.pool.traffic.bytes_in;
        stats.bytes_out = self.pool.traffic.bytes_out;
        stats.frames_in = self.pool.traffic.frames_in;
        stats.frames_out = self.pool.traffic.frames_out;
    }

    fn publish(&mut self) {
        self.shared.publish(|stats| {
            stats.clone_from(&self.stats);
            self.complete(stats);
            debug_assert_eq!(
                stats.accepted + stats.outgoing,
                stats.open as u64 + stats.closed_total(),
                "accepted + outgoing = open + closed"
            );
        });
    }
}

impl<A, O: Os> Drop for Reactor<A, O> {
    fn drop(&mut self) {
        let ids: Vec<ConnId> = self.connections.iter().map(|conn| conn.id).collect();
        for &id in &ids {
            self.shared.set_live(id, false);
        }
        // All of these are the user's code: a panic in one must not keep the others, or meet another and abort.
        for command in self.shared.close() {
            self.discard("a command's destructor", command);
        }
        for handler in std::mem::take(&mut self.handlers).into_iter().flatten() {
            self.drop_handler(handler);
        }
        // Before others who share the cap have their places.
        self.streams.clear();
        for id in ids {
            let conn = self.connections.remove(id);
            self.discard("a framer's destructor", conn);
        }
        for listener in std::mem::take(&mut self.listeners) {
            self.discard("a service's destructor", listener);
        }
        for attempt in std::mem::take(&mut self.attempts).into_values() {
            self.discard("a TLS configuration's destructor", attempt);
        }
        for receiver in std::mem::take(&mut self.detached_conns.leaving).into_values() {
            self.discard("the receiver of a detached connection", receiver);
        }
        for alarm in std::mem::take(&mut self.alarms) {
            self.discard("an alarm's destructor", alarm);
        }
    }
}

/// How many places to reserve at the start: all that the cap allows, if the system grants the address space. It is no memory before
/// it is used; and a list that doubled on the way would be copied whole in one turn, and leave its former self behind.
fn reservable<O: Os>(cap: usize) -> usize {
    let place = size_of::<Connection>() + size_of::<Option<O::Stream>>() + size_of::<Option<Box<dyn Handler<()>>>>();
    if cap <= RESERVED
        || Vec::<u8>::new()
            .try_reserve_exact(cap.saturating_mul(2 * place))
            .is_ok()
    {
        cap
    } else {
        RESERVED
    }
}

/// Logs a panic outside any connection.
fn report_panic(whose: &str, panic: Box<dyn Any + Send>) {
    log::error!(target: logs::PANIC, "{whose} panicked: {}", last_words(panic));
}

/// What a panic said. Dropping it is made sure not to be the next one.
fn last_words(panic: Box<dyn Any + Send>) -> String {
    let words = panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("(not text)")
        .to_owned();
    if let Err(again) = catch_unwind(AssertUnwindSafe(|| drop(panic))) {
        std::mem::forget(again);
    }
    words
}

#[cfg(test)]
mod tests {
    use super::os_mio::MioOs;
    use super::*;

    /// What the system does not grant is asked for later, piece by piece.
    #[test]
    fn a_cap_beyond_all_memory_reserves_little() {
        assert_eq!(reservable::<MioOs>(0), 0);
        assert_eq!(reservable::<MioOs>(RESERVED), RESERVED);
        assert_eq!(reservable::<MioOs>(usize::MAX), RESERVED);
        assert_eq!(reservable::<MioOs>(1 << 50), RESERVED);
    }
}
