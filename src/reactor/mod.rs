//! Many connections and the operating system. Never reads a payload byte.
//!
//! | part | owns |
//! |---|---|
//! | [`Reactor`] | one iteration, in order, and nothing else |
//! | `inner` | the core and the user's code: what a callback is lent |
//! | `core` | everything that runs without the user's code |
//! | `user_code` | handlers, services, alarms |
//! | `drive` | one connection's turn: the engine that the model checker runs too |
//! | `turn` | what that asks of the reactor |
//! | `connections` | slots, ids, the cap, run queues, timers, the buffer pool |
//! | `admission` | whether the next client may come in |
//! | `memory_budget`, `drain`, `outbound`, `detached_conns`, `history` | what their names say |
//!
//! A part takes its siblings as arguments. Only this file gives a connection its turn: accept,
//! commands and the drain queue it, or return it.

mod accept;
mod admission;
mod admit;
mod alarms;
mod app_timers;
mod attribution;
mod bans;
mod busy;
mod capacity;
pub(crate) mod clock;
mod close;
mod commands;
mod connect;
pub(crate) mod connection;
mod connections;
mod control;
mod core;
mod deferred;
pub(crate) mod detached_conns;
mod drain;
pub(crate) mod drive;
mod episodes;
mod event_backlog;
mod fd_exhaustion;
mod history;
mod incoming;
mod inner;
#[cfg(feature = "sim")]
mod invariants;
mod jobs;
mod listener;
mod listeners;
mod memory_budget;
mod memory_usage;
mod operate;
pub(crate) mod os;
pub(crate) mod os_mio;
mod outbound;
mod own_caps;
mod panic_guard;
mod pending;
mod refuse;
mod reserves;
pub(crate) mod shared_cap;
mod slots;
mod socket_file;
mod source_limits;
mod standing;
mod timers;
mod turn;
mod user_code;
mod visits;
mod watches;
mod work;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use self::core::Core;
use accept::Round;
use connection::HangUp;
use drive::{drive, Budget, Scratch};
use event_backlog::EventBacklog;
use inner::Inner;
use os::{Event, Named, Os};
use shared_cap::SharedCap;
use turn::Turn;
use user_code::UserCode;

use crate::config::Config;
use crate::config::Listen;
use crate::error::{Error, Result};
use crate::handle::{Handle, Published, Shared};
use crate::handler::Service;
use crate::id::{ConnId, ListenerId};
use crate::proto::{State, Time};

/// Connections whose timers expire in one iteration. The remainder keeps the poll from sleeping.
const TIMER_BUDGET: usize = 1024;
/// Urgent commands that pass others in one iteration. The remainder keeps the poll from sleeping.
const URGENT_BUDGET: usize = 1024;
/// For how long the loop goes on with commands before other work has its turn.
const COMMANDS_FOR: Duration = Duration::from_millis(20);
/// For how long an urgent command waits for those before it, once the loop has noticed it.
const URGENT_AFTER: Duration = Duration::from_millis(50);

/// Capacity for the events of an iteration. No list of the loop may grow behind buffers.
const EVENTS: usize = 1024;

/// All listeners and connections of one server.
pub(crate) struct Reactor<A, O: Os> {
    inner: Inner<A, O>,
    shared: Arc<Shared<A>>,
    scratch: Box<Scratch>,
    events: Vec<Event>,
    /// Connections whose timers have fired in this iteration.
    fired: Vec<ConnId>,
    backlog: EventBacklog,
    /// Commands are left over from the last iteration.
    commands_left: bool,
    /// Since when urgent commands are known to wait.
    urgent_since: Option<Time>,
}

impl<A, O: Os> Reactor<A, O> {
    pub(crate) fn new(os: O, config: Config) -> Result<Self> {
        config.check()?;
        let published = Arc::new(Published::new(config.queue_limits));
        let shared = Shared::new(os.waker(), Arc::clone(&published));
        let reactor = Self {
            inner: Inner {
                core: Core::new(os, config, published),
                user: UserCode::new(),
            },
            shared: Arc::new(shared),
            scratch: Box::new(Scratch::new()),
            events: Vec::with_capacity(EVENTS),
            fired: Vec::with_capacity(TIMER_BUDGET),
            backlog: EventBacklog::default(),
            commands_left: false,
            urgent_since: None,
        };
        reactor.inner.core.publish();
        Ok(reactor)
    }

    pub(crate) fn os(&self) -> &O {
        &self.inner.core.os
    }

    /// Shares the cap with other servers, of which this is number `index`. Before the first
    /// connection.
    pub(crate) fn share_cap(&mut self, cap: Arc<SharedCap>, index: usize) {
        self.inner.core.share_cap(cap, index);
    }

    /// A handle to this server.
    pub(crate) fn handle(&self) -> Handle<A> {
        self.inner.core.publish();
        Handle::new(Arc::clone(&self.shared))
    }

    /// What the server's owner can ask and change.
    pub(crate) fn ops(&self) -> &Inner<A, O> {
        &self.inner
    }

    /// As [`Reactor::ops`]; durations count from now.
    pub(crate) fn ops_mut(&mut self) -> &mut Inner<A, O> {
        self.inner.core.refresh();
        &mut self.inner
    }

    #[cfg(feature = "sim")]
    pub(crate) fn core(&self) -> &Core<O> {
        &self.inner.core
    }

    /// The id of the connection that has, or had, this token.
    #[cfg(all(feature = "sim", feature = "record"))]
    pub(crate) fn id_of(&self, token: os::Token) -> ConnId {
        token.conn_of(self.inner.core.conns.server())
    }

    /// The first invariant that does not hold, in words.
    #[cfg(feature = "sim")]
    pub(crate) fn broken_invariant(&self) -> Option<String> {
        self.inner
            .core
            .broken_invariant(self.inner.user.handlers_len())
    }

    /// Binds and listens: the first address that works.
    pub(crate) fn listen(
        &mut self,
        listen: Listen,
        service: Box<dyn Service<A>>,
    ) -> Result<ListenerId> {
        self.inner.listen(listen, service)
    }

    /// How long a poll may sleep: nothing is due before, and no event is needed to go on earlier.
    pub(crate) fn next_timeout(&self) -> Option<Duration> {
        self.sleep_from(self.now())
    }

    pub(crate) fn now(&self) -> Time {
        self.inner.core.os.now()
    }

    fn sleep_from(&self, now: Time) -> Option<Duration> {
        let Inner { core, user } = &self.inner;
        let has_jobs = core.deferred.is_due() || user.watches.has_ready();
        if self.backlog.full || self.commands_left || has_jobs {
            return Some(Duration::ZERO);
        }
        let own = user.alarms.due(core).min(user.timers.next());
        let wake = core.wake_at(now).min(own);
        wake.is_armed().then(|| wake.since(now))
    }

    /// One iteration: bounded work, whatever the peers do. Returns when it ended.
    ///
    /// Deadlines expire as of `due`, the clock reading *before* the poll, so that input which
    /// arrived in time is read first.
    pub(crate) fn iterate(
        &mut self,
        app: &mut A,
        due: Time,
        timeout: Option<Duration>,
    ) -> Result<Time> {
        // A panic may have left the last iteration in the middle of a turn.
        self.inner.core.running = None;
        self.poll(due, timeout)?;
        let core = &mut self.inner.core;
        core.begin_iteration(due);
        self.inner.user.begin_iteration();
        self.handle_events(app);
        jobs::run_watches(&mut self.inner, app);
        close::collect_released(&mut self.inner);
        self.run_commands(app);
        self.run_ready(app, due);
        // Behind open connections: a handshake costs as much as the frames of many of them.
        self.run_handshakes(app, due);
        self.accept(app);
        let connections = self.inner.core.conns.len();
        let due = self
            .backlog
            .expire_through(due, self.events.len(), connections);
        if let Some(due) = due {
            self.expire(app, due);
        }
        jobs::run_timers(&mut self.inner, app);
        if self.inner.core.drain.is_on() {
            self.drain(app, due);
        }
        self.inner.remove_closed_listeners();
        self.inner.core.watch_cap();
        jobs::run_alarms(&mut self.inner, app);
        let Inner { core, user } = &mut self.inner;
        if core.conns.is_shared() {
            let (descriptors, bounds) = (core.open_descriptors(), user.alarms.bounds(core));
            core.conns.watch(descriptors, bounds);
        }
        core.memory.release_spare(&mut core.conns, core.now);
        // Last: from here on another server may wake this one.
        core.reconcile_last();
        core.stats.iterations += 1;
        // Only handles read them; one that is made later finds them published.
        if Arc::strong_count(&self.shared) > 1 {
            core.publish();
        }
        let now = core.os.now();
        core.busy.record_iteration(now);
        Ok(now)
    }

    /// True if something asked `run` to end since the last call.
    pub(crate) fn take_stopped(&mut self) -> bool {
        std::mem::take(&mut self.inner.core.stopped)
    }

    fn poll(&mut self, due: Time, timeout: Option<Duration>) -> Result<()> {
        let sleep = match (timeout, self.sleep_from(due)) {
            (Some(asked), Some(ours)) => Some(asked.min(ours)),
            (asked, ours) => asked.or(ours),
        };
        self.events.clear();
        self.backlog.full = match self.inner.core.os.poll(&mut self.events, sleep) {
            Ok(full) => full,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => false,
            Err(error) => {
                return Err(Error::Os {
                    doing: "waiting for events",
                    source: error,
                });
            }
        };
        Ok(())
    }

    /// Marks the sockets of all events. Their connections have their turns at once, unless others
    /// have waited for longer or the budget is spent.
    fn handle_events(&mut self, app: &mut A) {
        let in_turn = self.inner.core.conns.ready_len() == 0;
        let (mut is_fresh, mut had_turns) = (true, None);
        for at in 0..self.events.len() {
            let Some(&event) = self.events.get(at) else {
                break;
            };
            match event.token.named() {
                Named::Waker => {}
                Named::Listener => self.inner.core.listeners.handle_event(event.token),
                Named::Watch(slot) => self.inner.user.watches.handle_event(slot, event.token),
                Named::Slot(index) => {
                    let conns = &mut self.inner.core.conns;
                    // An event for a connection that was removed since finds none.
                    let Some(conn) = conns.by_token(index, event.token) else {
                        continue;
                    };
                    if !event.readable && !event.closed && conn.writable {
                        // Room for output, as was known: kqueue reports it after each acknowledgement.
                        continue;
                    }
                    conn.readable |= event.readable;
                    conn.writable |= event.writable;
                    if event.closed {
                        conn.hang_up = HangUp::New;
                    }
                    let id = conn.id;
                    if conn.machine.state() == State::Handshaking {
                        conns.wake_in_order(id);
                    } else if in_turn && self.inner.core.has_work_left() {
                        // For the first of them the clock was read after the poll.
                        if !std::mem::replace(&mut is_fresh, false) {
                            self.inner.core.refresh();
                        }
                        self.turn(app, id);
                    } else {
                        let conns = &mut self.inner.core.conns;
                        had_turns.get_or_insert(conns.ready_len());
                        conns.wake(id);
                    }
                }
            }
        }
        if let (true, Some(first)) = (in_turn, had_turns) {
            // Those that were queued again in their turns come after those that had none.
            self.inner.core.conns.move_behind(first);
        }
    }

    /// Carries out commands in their order, within the budget. One that is queued meanwhile waits
    /// for the next iteration.
    ///
    /// Urgent commands that are not reached within the budget, or soon, pass the others.
    fn run_commands(&mut self, app: &mut A) {
        let is_due = self.inner.core.deferred.is_due();
        if !self.shared.take_pending() && !self.commands_left && !is_due {
            return;
        }
        let started = self.inner.core.refresh();
        self.inner.core.begin_stage();
        let left = self.inner.core.config.budgets.commands;
        // One that is deferred meanwhile waits for the next iteration.
        for _ in 0..self.inner.core.deferred.count().clamp(1, left.max(1)) {
            let has_work_left = self.inner.core.has_work_left();
            if !has_work_left || !commands::carry_out_deferred(&mut self.inner, app) {
                break;
            }
        }
        // Handlers that give each other messages keep no handle waiting.
        self.inner.core.begin_stage();
        let queued = self.shared.len();
        let mut passes = queued > left;
        for _ in 0..queued.min(left) {
            if !self.inner.core.has_work_left() {
                passes = true;
                break;
            }
            let Some(command) = self.shared.take() else {
                break;
            };
            commands::carry_out(&mut self.inner, app, command);
            if self.shared.has_urgent() {
                let now = self.inner.core.refresh();
                if now.since(*self.urgent_since.get_or_insert(now)) >= URGENT_AFTER {
                    passes = true;
                    break;
                }
            } else if self.inner.core.now.since(started) >= COMMANDS_FOR {
                // As of the begin of that command.
                break;
            }
        }
        if passes && self.shared.has_urgent() {
            self.run_urgent_commands(app);
        }
        if !self.shared.has_urgent() {
            self.urgent_since = None;
        }
        self.commands_left = self.shared.len() > 0;
        // In a stage of its own: commands that use up theirs keep no connection from its end.
        self.inner.core.begin_stage();
        let inner = &mut self.inner;
        if inner.core.deferred.holds_some() {
            let done = inner.core.os.carried_out(self.shared.taken());
            while inner.core.has_work_left() && commands::release_next(inner, done) {}
        }
    }

    /// Carries out urgent commands, which pass those before them, within a budget of their own.
    fn run_urgent_commands(&mut self, app: &mut A) {
        self.inner.core.begin_stage();
        for _ in 0..URGENT_BUDGET {
            if !self.inner.core.has_work_left() {
                return;
            }
            let Some(command) = self.shared.take_urgent() else {
                return;
            };
            commands::carry_out(&mut self.inner, app, command);
        }
    }

    /// Gives handshakes with input their turns, in the order in which the input arrived. One that
    /// is queued meanwhile waits for the next iteration, as in [`Reactor::run_ready`].
    fn run_handshakes(&mut self, app: &mut A, due: Time) {
        let queued = self.inner.core.conns.handshakes_len();
        if queued == 0 {
            return;
        }
        self.inner.core.begin_stage();
        for _ in 0..queued {
            let core = &mut self.inner.core;
            if core.handshakes_left == 0 || !core.has_work_left() {
                return;
            }
            match core.conns.next_handshake() {
                Some(id) => self.turn_from_queue(app, id, due),
                None => return,
            }
        }
    }

    /// Gives the connections in the run queue their turns, the longest wait first.
    fn run_ready(&mut self, app: &mut A, due: Time) {
        let queued = self.inner.core.conns.ready_len();
        if queued == 0 {
            return;
        }
        self.inner.core.begin_stage();
        for _ in 0..queued {
            let core = &mut self.inner.core;
            if !core.has_work_left() {
                return;
            }
            match core.conns.next_ready() {
                Some(id) => self.turn_from_queue(app, id, due),
                None => return,
            }
        }
    }

    /// A turn for which the connection has waited, and then its deadlines, which have waited too.
    fn turn_from_queue(&mut self, app: &mut A, id: ConnId, due: Time) {
        self.inner.core.refresh();
        self.turn(app, id);
        if self.inner.core.is_late_after_turn(id, due) {
            self.expire_one(app, id, due);
        }
    }

    fn accept(&mut self, app: &mut A) {
        let Some(mut round) = Round::begin(&mut self.inner.core) else {
            return;
        };
        self.inner.core.begin_stage();
        while let Some(id) = round.next(&mut self.inner, app, &mut self.scratch) {
            self.turn(app, id);
            // Its callbacks may have worked: rates and ages count until the next accept.
            self.inner.core.refresh();
        }
        self.inner.core.listeners.end_round();
    }

    /// Expires what was due before the poll; the input that the poll announced has been read since.
    fn expire(&mut self, app: &mut A, due: Time) {
        let core = &mut self.inner.core;
        core.expire(due);
        if core.conns.next_timer() > due {
            return;
        }
        core.begin_stage();
        // Each connection once: one that is due again is so in the next iteration.
        self.fired.clear();
        while self.fired.len() < TIMER_BUDGET {
            match core.conns.pop_due(due) {
                Some(id) => self.fired.push(id),
                None => break,
            }
        }
        for at in 0..self.fired.len() {
            let Some(&id) = self.fired.get(at) else {
                return;
            };
            let core = &mut self.inner.core;
            if let Some(conn) = core.conns.get_mut(id).filter(|conn| conn.queued) {
                // It has waited for this server: its turn comes first, and expires it. Its timer is
                // gone, and that may have been the one of a retry.
                conn.end_retry();
            } else if core.has_work_left() {
                core.work.charge(work::STEP);
                self.expire_one(app, id, due);
            } else {
                core.conns.arm_by(id, due);
            }
        }
    }

    /// Expires a connection's deadlines as of `due`.
    fn expire_one(&mut self, app: &mut A, id: ConnId, due: Time) {
        let core = &mut self.inner.core;
        core.refresh();
        if core.is_connecting(id) {
            core.expire_attempt(id, due);
            self.turn(app, id);
        } else if core.expire_connection(id, due) {
            self.turn(app, id);
        }
    }

    fn drain(&mut self, app: &mut A, due: Option<Time>) {
        self.inner.core.begin_stage();
        self.inner.core.drain_step(due);
        close::force_late(&mut self.inner, app, due);
        self.inner.core.finish_drain();
    }

    /// Gives a connection its turn, right after the clock was read. Never called from inside a
    /// callback.
    fn turn(&mut self, app: &mut A, id: ConnId) {
        let core = &mut self.inner.core;
        debug_assert!(core.running.is_none(), "iterations do not nest");
        let iteration = core.stats.iterations as u16;
        let Some(conn) = core
            .conns
            .get(id)
            .filter(|conn| !conn.machine.is_detached())
        else {
            return;
        };
        let listener = conn.listener;
        // A number from long ago that happens to match costs one small budget, and no more.
        let bytes = if conn.budget_iteration == iteration {
            usize::from(conn.budget) * drive::FRAME_COST
        } else {
            core.config.budgets.read_bytes
        };
        let mut budget = Budget::new(bytes);
        core.work.charge(work::TURN);
        core.attribute_to(listener);
        core.begin_turn(id);
        core.conns.offer_room();
        let mut turn = Turn {
            inner: &mut self.inner,
            app,
            shared: &self.shared,
            id,
        };
        drive(&mut turn, &mut self.scratch, &mut budget);
        let core = &mut self.inner.core;
        core.running = None;
        if let Some(conn) = core.conns.get_mut(id) {
            conn.budget_iteration = iteration;
            conn.budget = u16::try_from(budget.bytes / drive::FRAME_COST).unwrap_or(u16::MAX);
            if conn.machine.is_detaching() {
                close::hand_over(&mut self.inner, app, id);
            } else if conn.standing.is_skipped() {
                core.admission
                    .end_skip(&mut core.conns, &mut core.listeners, id);
            }
            let Core {
                listeners, conns, ..
            } = &mut self.inner.core;
            if listeners.has_own_caps() {
                listeners.note_turn(conns.get(id).and_then(|conn| conn.listener));
            }
        }
    }
}

impl<A, O: Os> Drop for Reactor<A, O> {
    fn drop(&mut self) {
        let Inner { core, user } = &mut self.inner;
        core.close_all();
        // All of these are foreign code: a panic in one must not stop the others, or meet another
        // panic and abort.
        let commands = self.shared.close();
        core.stats.undeliverable += commands.iter().filter(|one| one.is_silent()).count() as u64;
        core.stats.undeliverable += core.deferred.len() as u64;
        core.publish_end();
        for command in commands {
            core.guard.drop("a command's destructor", command);
        }
        user.clear(&mut core.guard);
        core.clear();
        core.publish_panics();
    }
}
