//! Everything of a server that runs without the user's code, whatever the application's type.
//!
//! The parts are siblings: each has its own fields and takes the others as arguments.

use std::sync::Arc;

use super::admission::Admission;
use super::attribution::Attribution;
use super::busy::Busy;
use super::capacity::Capacity;
use super::connection::Connection;
use super::connections::Connections;
use super::deferred::{Deferred, ForConn};
use super::detached_conns::DetachedConns;
use super::drain::Drain;
use super::episodes::{Cause, Episodes};
use super::history::{CloseRecord, History};
use super::listeners::Listeners;
use super::memory_budget::MemoryBudget;
use super::os::Os;
use super::outbound::Outbound;
use super::panic_guard::PanicGuard;
use super::pending::Unproven;
use super::work::{self, Work};
use crate::catch::{catch, Panic};
use crate::config::Config;
use crate::handle::Published;
use crate::id::ConnId;
use crate::proto::{State, Time};
use crate::reason::{Close, CloseReason, Closed};
use crate::stats::Stats;

/// Bytes that an iteration's callbacks may write before their connections' turns end.
const EARLY_OUTPUT: u64 = 64 << 20;

pub(crate) struct Core<O: Os> {
    pub(super) os: O,
    /// The time of the running turn. Durations from user code count from [`Core::refresh`].
    pub(super) now: Time,
    pub(super) busy: Busy,
    pub(super) config: Config,
    pub(super) stats: Stats,
    pub(super) conns: Connections<O::Stream>,
    pub(super) listeners: Listeners<O::Listener>,
    pub(super) admission: Admission,
    pub(super) memory: MemoryBudget,
    pub(super) outbound: Outbound,
    pub(super) detached: DetachedConns,
    /// Commands of handles for connections that have not opened yet.
    pub(super) deferred: Deferred,
    pub(super) drain: Drain,
    pub(super) history: History,
    pub(super) guard: PanicGuard,
    pub(super) episodes: Episodes,
    pub(super) attribution: Attribution,
    /// No slot was free at the end of the last iteration.
    pub(super) was_full: bool,
    /// The connection whose turn is running: it is flushed when the turn ends.
    pub(super) running: Option<ConnId>,
    /// What this iteration has done and may still do.
    pub(super) work: Work,
    /// TLS handshakes that this iteration may still drive.
    pub(super) handshakes_left: usize,
    pub(super) stopped: bool,
    /// Callbacks write to sockets until this many bytes were written in all: a callback that sends
    /// for as long as its peer reads would never end.
    pub(super) early_output_until: u64,
    pub(super) published: Arc<Published>,
    /// Number of connections when the cap was last lowered: they may stay.
    #[cfg(feature = "sim")]
    pub(super) open_at_change: usize,
    /// The same of pending connections.
    #[cfg(feature = "sim")]
    pub(super) pending_at_change: usize,
}

impl<O: Os> Core<O> {
    pub(super) fn new(os: O, config: Config, published: Arc<Published>) -> Self {
        let conns = Connections::new(config.max_connections, Arc::clone(published.live()));
        Self {
            now: os.now(),
            busy: Busy::new(os.now()),
            memory: MemoryBudget::new(config.memory_limit, &conns.pool.shared),
            conns,
            history: History::new(config.recent_closes),
            detached: DetachedConns::new(os.waker()),
            stats: Stats::default(),
            listeners: Listeners::default(),
            admission: Admission::default(),
            outbound: Outbound::default(),
            deferred: Deferred::default(),
            drain: Drain::default(),
            guard: PanicGuard::default(),
            episodes: Episodes::default(),
            attribution: Attribution::default(),
            was_full: false,
            running: None,
            work: Work::default(),
            handshakes_left: 0,
            stopped: false,
            early_output_until: EARLY_OUTPUT,
            published,
            #[cfg(feature = "sim")]
            open_at_change: 0,
            #[cfg(feature = "sim")]
            pending_at_change: 0,
            os,
            config,
        }
    }

    /// Reads the clock, so that time spent in a blocking callback is not charged to connections.
    #[inline]
    pub(super) fn refresh(&mut self) -> Time {
        self.now = self.os.now();
        self.now
    }

    /// Until then no listener needs a visit, as the usual iteration finds with few comparisons: `None`
    /// if all of [`Core::capacity`] decides.
    #[inline]
    pub(super) fn rest_until(&self) -> Option<Time> {
        let until = self.listeners.rests_until()?;
        self.admission
            .is_unrestricted(&self.conns, &self.config)
            .then_some(until)
    }

    /// No listener needs a visit now.
    #[inline]
    pub(super) fn listeners_rest(&self) -> bool {
        self.rest_until().is_some_and(|until| until > self.now)
    }

    #[inline]
    pub(super) fn capacity(&self) -> Capacity {
        self.capacity_at(self.now)
    }

    #[inline]
    pub(super) fn capacity_at(&self, now: Time) -> Capacity {
        self.admission.capacity(&self.conns, &self.config, now)
    }

    /// When the loop has to run again without an event; `ZERO` for at once.
    pub(super) fn wake_at(&self, now: Time) -> Time {
        if self.conns.has_work() || self.detached.has_released() {
            return Time::ZERO;
        }
        self.conns
            .next_timer()
            .min(self.admission.fds.until())
            .min(self.admission.fds.over_at())
            .min(self.episodes.next_over())
            .min(self.memory.wake_at())
            .min(self.drain.wake_at(&self.conns, &self.listeners, now))
            .min(match self.rest_until() {
                Some(until) => until,
                None => self.listeners.wake_at(|| self.capacity_at(now)),
            })
    }

    /// Expires what has a deadline of its own, connections apart.
    pub(super) fn expire(&mut self, due: Time) {
        self.admission.fds.expire(due);
        self.memory.expire(&mut self.conns, due, self.now);
        self.expire_episodes(due);
        self.listeners.expire(due);
    }

    /// After a poll that began at `polled`: the time, the shared cap, the iteration's budgets.
    pub(super) fn begin_iteration(&mut self, polled: Time) {
        if self.busy.was_long(polled) {
            self.end_long_turn(polled);
        }
        let now = self.refresh();
        if self.busy.end_iteration(polled, now) {
            self.listeners.mark_waited();
        }
        self.conns.wake_up();
        self.conns.drop_claims();
        if let Some(cap) = self.conns.shared_cap() {
            // A server that shares it may have changed it.
            self.config.max_connections = cap;
        }
        self.work
            .begin(self.config.budgets.work, &self.conns.pool.traffic);
        self.handshakes_left = self.config.budgets.handshakes;
        self.early_output_until = self.conns.pool.traffic.bytes_out + EARLY_OUTPUT;
    }

    /// Begins another kind of work in this iteration.
    pub(super) fn begin_stage(&mut self) {
        self.work.begin_stage(&self.conns.pool.traffic);
    }

    /// The budget of this iteration allows another step.
    #[inline]
    pub(super) fn has_work_left(&self) -> bool {
        self.work.is_left(&self.conns.pool.traffic)
    }

    /// A turn begins now, right after the clock was read.
    #[inline]
    pub(super) fn begin_turn(&mut self, id: ConnId) {
        if self.busy.was_long(self.now) {
            self.end_long_turn(self.now);
        }
        self.busy.begin_turn(id, self.now);
        self.running = Some(id);
    }

    /// After a long turn the peer's idle time begins, if its input began the work: it may have waited
    /// for what a callback sent.
    #[cold]
    fn end_long_turn(&mut self, now: Time) {
        let Some((id, began)) = self.busy.last_turn() else {
            return;
        };
        if let Some(conn) = self.conns.get_mut(id) {
            conn.machine.note_work(began, now);
        }
    }

    /// After a turn for which the connection was queued: whether its deadlines have passed. Its
    /// timer may have fired while it waited, so it is armed again if not.
    pub(super) fn is_late_after_turn(&mut self, id: ConnId, due: Time) -> bool {
        let Some(conn) = self.conns.get(id) else {
            return false;
        };
        if conn.machine.is_detached() {
            return false;
        }
        if conn.machine.deadline() > due {
            self.conns.arm_deadline(id);
            return false;
        }
        // The budget for handshakes has kept its input from being read.
        let unread = conn.machine.state() == State::Handshaking && conn.queued && conn.can_read();
        !unread
    }

    /// A connection's timer has fired. True if the connection has a turn now.
    pub(super) fn expire_connection(&mut self, id: ConnId, due: Time) -> bool {
        let listener = self.conns.get(id).and_then(|conn| conn.listener);
        let traffic = &self.conns.pool.traffic;
        self.attribution.set(listener, &mut self.listeners, traffic);
        let Some((conn, pool)) = self.conns.parts(id) else {
            return false;
        };
        let machine = &mut conn.machine;
        if machine.will_open() || machine.is_upgrading() {
            if let Some(span) = self.busy.excuses(machine.deadline()) {
                if conn.standing.excuse() {
                    machine.extend_handshake(span);
                }
            }
        }
        conn.expire(&mut self.os, pool, &mut self.now, due);
        if conn.machine.is_idle() {
            // Its turn arms no timer.
            self.conns.arm_deadline(id);
        }
        self.account(id);
        true
    }

    // Connections.

    /// A connection opens: counts it, and its handshake time if it had one.
    ///
    /// `queued`: the number of commands from handles so far, if some of them are not carried out.
    pub(super) fn handle_opened(&mut self, id: ConnId, queued: Option<u64>) {
        self.stats.opened += 1;
        if self.deferred.open(id, queued) {
            // The defaults of `on_finish` and `on_drain` wait: a handle may have accepted frames.
            if let Some((conn, pool)) = self.conns.parts(id) {
                conn.machine.await_commands(pool);
            }
        }
        if let Some(conn) = self.conns.get(id).filter(|conn| conn.standing.is_pending()) {
            self.history
                .handshake_times
                .record_time(self.now.since(conn.accepted_at));
            self.end_pending(id);
            self.add_silent(id);
        }
    }

    #[inline(always)]
    pub(super) fn insert(&mut self, conn: Connection<O::Stream>) {
        let (id, pending, since) = (conn.id, conn.standing.is_pending(), conn.accepted_at);
        self.conns.insert(conn);
        if pending {
            self.admission.add_pending(&self.conns, id, since);
            self.with_unproven(id, |unproven, conns| {
                unproven.pending.push(id, since, conns)
            });
        } else {
            self.add_silent(id);
        }
        self.stats.peak = self.stats.peak.max(self.conns.len());
    }

    /// A connection is open, and may be evicted at the cap until it has sent a frame.
    fn add_silent(&mut self, id: ConnId) {
        let listener = self.conns.get(id).and_then(|conn| conn.listener);
        let listener = listener.and_then(|id| self.listeners.by_id_mut(id));
        if let Some(listener) = listener.filter(|listener| listener.options.evict_silent) {
            self.admission.add_silent(&self.conns, id);
            if let Some(unproven) = &mut listener.unproven {
                unproven.silent.push(id, &self.conns);
            }
        }
    }

    /// Lets `f` change the candidates of a connection's listener, if that has a limit of its own.
    fn with_unproven(
        &mut self,
        id: ConnId,
        f: impl FnOnce(&mut Unproven, &Connections<O::Stream>),
    ) {
        let listener = self.conns.get(id).and_then(|conn| conn.listener);
        let listener = listener.and_then(|id| self.listeners.by_id_mut(id));
        if let Some(unproven) = listener.and_then(|listener| listener.unproven.as_mut()) {
            f(unproven, &self.conns);
        }
    }

    /// A connection has opened or ended: it is pending no more.
    pub(super) fn end_pending(&mut self, id: ConnId) -> bool {
        let was_pending = self.admission.end_pending(&mut self.conns, id);
        if was_pending {
            self.with_unproven(id, |unproven, conns| unproven.pending.leave(id, conns));
        }
        was_pending
    }

    /// An accepted connection is in a handshake again: it is pending.
    ///
    /// If too many are, the oldest is evicted, and ends in its own turn.
    #[cold]
    pub(super) fn begin_pending(&mut self, id: ConnId) {
        let since = self.now;
        let is_open = self
            .conns
            .get(id)
            .is_some_and(|conn| !conn.standing.is_pending());
        let Self {
            admission,
            conns,
            config,
            now,
            ..
        } = self;
        if let Some(oldest) = admission.begin_pending(conns, id, config, *now) {
            self.end(oldest, CloseReason::Evicted);
            self.conns.wake(oldest);
        }
        if is_open {
            self.with_unproven(id, |unproven, conns| {
                unproven.pending.push_again(id, since, conns);
            });
        }
        #[cfg(feature = "sim")]
        {
            self.pending_at_change = self.pending_at_change.max(self.admission.pending());
        }
    }

    #[inline]
    pub(super) fn is_running(&self, id: ConnId) -> bool {
        self.running.map_or(0, ConnId::bits) == id.bits()
    }

    /// Another connection's callback, or a command, has changed this one: gives it a turn.
    #[inline]
    pub(super) fn touch(&mut self, id: ConnId) {
        // The running connection is flushed and accounted for when its turn ends.
        if !self.is_running(id) {
            self.conns.wake(id);
            self.account(id);
        }
    }

    /// Accounts for the memory that a connection's buffers hold now.
    #[inline]
    pub(super) fn account(&mut self, id: ConnId) {
        self.memory.measure(&mut self.conns, id, self.now);
    }

    pub(super) fn is_detached(&self, id: ConnId) -> bool {
        self.conns
            .get(id)
            .is_some_and(|conn| conn.machine.is_detached())
    }

    /// Ends a connection at once, without flushing.
    pub(super) fn end(&mut self, id: ConnId, reason: CloseReason) {
        if let Some((conn, pool)) = self.conns.parts(id) {
            conn.machine.end(Closed::new(reason), pool);
        }
        // Its turn, in which it is removed, may have to wait.
        self.account(id);
    }

    /// A callback closes its connection.
    #[cold]
    pub(super) fn close_as(&mut self, id: ConnId, close: Close) {
        // The callback may have blocked.
        let now = self.refresh();
        let Some((conn, pool)) = self.conns.parts(id) else {
            return self.guard.drop("an error's destructor", close);
        };
        // An error that comes too late is dropped, and its destructor is foreign code.
        if let Err(panic) = catch(|| conn.machine.close_as(close, now, pool)) {
            self.close_in_panic(id, "an error's destructor", panic);
        }
    }

    /// Closes a connection whose own code panicked.
    #[cold]
    pub(super) fn close_in_panic(&mut self, id: ConnId, source: &str, panic: Panic) {
        self.report_panic(id, source, panic);
        let now = self.refresh();
        if let Some((conn, pool)) = self.conns.parts(id) {
            conn.machine
                .close(Closed::new(CloseReason::Panicked), now, pool);
        }
    }

    /// Shuts down the write side if that is due. `Some(reset)` once the connection is over.
    pub(super) fn next_step(&mut self, id: ConnId) -> Option<bool> {
        let conn = self.conns.get_mut(id)?;
        conn.next_step(&mut self.os, &mut self.now)
    }

    /// A connection has ended: it counts as closed while its last callback runs.
    pub(super) fn begin_leaving(&mut self, id: ConnId, closed: &Closed) {
        if let Some(panic) = closed.panic() {
            self.report_panic(id, "a TLS cipher", panic.clone());
        }
        self.end_attempt(id);
        self.conns.begin_leaving(id);
        self.stats.count_closed(closed);
    }

    fn end_attempt(&mut self, id: ConnId) {
        if let Some(attempt) = self.outbound.remove(id) {
            self.episodes.calm_backend(&attempt.addr, self.now);
            self.guard.drop("a TLS configuration's destructor", attempt);
        }
    }

    /// Counts a command that did not reach its connection.
    pub(super) fn drop_undelivered(&mut self, command: ForConn) {
        self.stats.undeliverable += u64::from(command.is_counted());
        self.guard.drop("a message's destructor", command);
    }

    /// Removes a connection: counts and records it, and lets waiting clients have its slot.
    pub(super) fn remove(&mut self, id: ConnId, closed: &Closed) {
        self.memory.forget(&mut self.conns, id, self.now);
        if self.deferred.has(id) {
            for command in self.deferred.remove(id) {
                self.drop_undelivered(command);
            }
        }
        let Some(mut conn) = self.conns.remove(id) else {
            return;
        };
        let record = CloseRecord {
            id: Some(id),
            listener: conn.listener,
            peer: conn.peer(),
            source: conn.source(),
            age: self.now.since(conn.accepted_at),
            traffic: conn.machine.traffic(),
        };
        let detached = conn.machine.is_detached();
        let (source, traffic, listener) = (record.source.ip(), record.traffic, conn.listener);
        let counted = conn.standing.counted();
        let is_confirmed = conn.machine.is_end_confirmed();
        conn.machine.recycle(&mut self.conns.pool);
        if conn.machine.has_framer() || conn.machine.has_tls() {
            self.guard.drop("a framer's destructor", conn);
        }
        self.work.charge(work::CLOSE);
        if !self.conns.is_leaving(id) {
            self.stats.count_closed(closed);
        }
        self.drain.count(closed.reason, is_confirmed);
        self.history.ages.record_time(record.age);
        self.history
            .record_close(&mut self.guard, record, closed, self.now);
        if let Some(listener) = listener.and_then(|id| self.listeners.by_id_mut(id)) {
            listener.count_closed(closed, &traffic);
            listener.uncount_source(source, counted, self.now);
            listener.connections = listener.connections.saturating_sub(1);
            if listener.reached_cap().is_none() {
                self.episodes
                    .calm(&Cause::ListenerCap(listener.id), self.now);
            }
        }
        // The permit of a detached connection is given back with its stream.
        if !detached {
            self.conns.free();
        }
        self.free_descriptor();
    }

    /// One of the server's descriptors was closed.
    pub(super) fn free_descriptor(&mut self) {
        self.admission.fds.end_pause();
    }

    /// Descriptors or memory ran out in accept or registration: all listeners leave the poll.
    pub(super) fn begin_fd_exhaustion(&mut self, error: &std::io::Error) {
        let until = self.now.after(self.config.emfile_backoff);
        let (open, cap) = (self.conns.len(), self.conns.cap());
        self.stats.out_of_fds += u64::from(self.admission.fds.begin(until, error, open, cap));
        self.listeners.mark_all_readable();
    }

    // Listeners.

    fn expire_episodes(&mut self, due: Time) {
        if self.episodes.next_over() > due {
            return;
        }
        let listeners = &self.listeners;
        self.episodes.expire(due, |id| match listeners.by_id(id) {
            Some(listener) => format!("listener {} on {}", listener.name, listener.addr),
            None => "a listener that is closed".to_owned(),
        });
        if !self.episodes.is_on(&Cause::Cap) {
            self.conns.release_cap_report();
        }
    }

    /// Makes each listener's registration follow its state.
    pub(super) fn reconcile(&mut self) {
        self.listeners.refill_reserves(&mut self.conns);
        let capacity = self.capacity();
        self.reconcile_with(&capacity);
    }

    /// As [`Core::reconcile`], at the end of an iteration: no foreign code runs before the poll. If
    /// no slot is free, another server that shares the cap wakes this one when one is.
    #[inline]
    pub(super) fn reconcile_last(&mut self) {
        if self.conns.is_shared() || !self.listeners_rest() {
            self.reconcile_all();
        }
    }

    #[inline(never)]
    fn reconcile_all(&mut self) {
        self.listeners.refill_reserves(&mut self.conns);
        if !self.conns.has_room() {
            self.admission.trim(&mut self.conns);
        }
        if self.conns.is_shared() {
            let may_evict = self.admission.may_evict(&self.conns);
            self.conns.set_may_evict(may_evict);
        }
        let has_slot = match self.listeners.let_wait() {
            true => self.conns.await_room(),
            false => self.conns.has_room(),
        };
        let capacity = Capacity {
            has_slot,
            ..self.capacity()
        };
        self.reconcile_with(&capacity);
        if has_slot {
            self.conns.rest(|| self.listeners.are_all_registered());
        } else {
            self.conns.offer_room();
        }
    }

    #[inline]
    fn reconcile_with(&mut self, capacity: &Capacity) {
        let (admission, config) = (&self.admission, &self.config);
        let crowded = capacity.crowded_until.is_some();
        let rule = (crowded, config.pending_limits.grace);
        let at = |conns: &_, listener: &_| admission.evicts_own_at(conns, listener, config);
        self.listeners.update_own(&mut self.conns, rule, at);
        if self.listeners.is_settled(capacity.now, || *capacity) {
            return;
        }
        let retry_at = self.now.after(self.config.emfile_backoff);
        self.listeners.reconcile(&mut self.os, capacity, retry_at);
    }

    // Reports.

    /// Counts and logs a panic in a connection's own code.
    pub(super) fn report_panic(&mut self, id: ConnId, source: &str, panic: Panic) {
        let conn = self.describe(id);
        self.guard.report(source, panic, Some(&conn));
    }

    /// A connection as reports name it: listener, id, peer, state, age and traffic.
    pub(super) fn describe(&self, id: ConnId) -> String {
        let Some(info) = self.conns.get(id).map(|conn| conn.info(self.now)) else {
            return format!("connection {id}");
        };
        match info.listener.and_then(|id| self.listeners.by_id(id)) {
            Some(listener) => format!("listener {}, {info}", listener.name),
            None => info.to_string(),
        }
    }
}
