//! The invariants of every iteration, checked by the simulator.

use std::collections::{BTreeMap, HashMap};

use super::admission::max_pending;
use super::core::Core;
use super::drive::READ_SIZE;
use super::listener::Listener;
use super::os::Os;
use crate::id::{ConnId, ListenerId};
use crate::proto::{State, Traffic};

impl<O: Os> Core<O> {
    /// The name of a listener whose traffic is not that of its connections.
    fn misattributed(&self) -> Option<String> {
        let mut sums: HashMap<ListenerId, Traffic> = HashMap::new();
        for conn in self.conns.iter() {
            if let Some(listener) = conn.listener {
                let sum = sums.entry(listener).or_default();
                sum.add(&conn.machine.traffic());
            }
        }
        let is_wrong = |listener: &&Listener<O::Listener>| {
            let mut expected = listener.ended_traffic;
            expected.add(&sums.get(&listener.id).copied().unwrap_or_default());
            self.traffic_of(listener) != expected
        };
        let wrong = self.listeners.iter().find(is_wrong);
        wrong.map(|listener| listener.name.to_string())
    }

    /// The first invariant that does not hold, as text. `handlers` is their number.
    pub(crate) fn broken_invariant(&self, handlers: usize) -> Option<String> {
        let open = self.conns.len();
        if open > self.conns.cap().max(self.open_at_change) {
            return Some(format!(
                "{open} connections are open, the cap is {}",
                self.conns.cap()
            ));
        }
        let streams = self
            .conns
            .iter()
            .filter(|slot| slot.stream.is_some())
            .count();
        let detached = self
            .conns
            .iter()
            .filter(|slot| slot.machine.is_detached())
            .count();
        let admitted = self
            .conns
            .iter()
            .filter(|slot| slot.machine.was_admitted())
            .count();
        let without = self.without_socket();
        if streams + without + detached != open || handlers + detached != admitted {
            return Some(format!(
                "{open} slots, {admitted} of them admitted, {detached} detached and {without} \
                 between two attempts, hold {streams} sockets and {handlers} handlers"
            ));
        }
        if let Some(fault) = self.lost_attempt() {
            return Some(fault);
        }
        let counted: usize = self
            .listeners
            .iter()
            .map(|listener| listener.connections)
            .sum();
        let made = self
            .conns
            .iter()
            .filter(|slot| slot.listener.is_none())
            .count();
        if counted + made != open {
            return Some(format!(
                "listeners count {counted} connections, {made} are outgoing, {open} are open"
            ));
        }
        let wrong = self.listeners.iter().find(|listener| {
            listener.accepted != listener.connections as u64 + listener.closed.total()
        });
        if let Some(listener) = wrong {
            return Some(format!(
                "listener {}: {} accepted, {} open, {} closed",
                listener.name,
                listener.accepted,
                listener.connections,
                listener.closed.total()
            ));
        }
        let (reserved, of_all) = (self.conns.reserved(), self.listeners.reserved());
        if reserved != of_all {
            return Some(format!(
                "{reserved} slots are reserved, the listeners count {of_all}"
            ));
        }
        let closed = self.stats.closed_total();
        if self.stats.accepted + self.stats.outgoing != open as u64 + closed {
            return Some(format!(
                "{} accepted, {} outgoing, {open} open, {closed} closed",
                self.stats.accepted, self.stats.outgoing
            ));
        }
        let unopened = self
            .conns
            .iter()
            .filter(|slot| slot.standing.is_pending())
            .count();
        if unopened != self.admission.pending() {
            return Some(format!(
                "{} are counted as pending, {unopened} are",
                self.admission.pending()
            ));
        }
        let most = max_pending(&self.conns, &self.config).max(self.pending_at_change);
        if unopened > most {
            return Some(format!(
                "{unopened} connections are pending, the limit is {most}"
            ));
        }
        if !self.admission.pending_queue().is_compact(self.stats.peak) {
            return Some("more pending connections are remembered than there ever were".to_owned());
        }
        let first = self.conns.iter().filter(|slot| slot.standing.is_pending());
        let first = first.map(|slot| slot.accepted_at).min();
        // An upgrade is pending since it began.
        let upgrades = self
            .conns
            .iter()
            .any(|slot| slot.standing.is_pending() && slot.machine.was_open());
        if !upgrades && self.admission.pending_queue().oldest() != first {
            return Some(format!(
                "the oldest pending connection came at {first:?}, another is taken for it"
            ));
        }
        let mut shared = BTreeMap::new();
        let mut memory = 0;
        for slot in self.conns.iter() {
            memory += slot.machine.memory().own;
            slot.machine.each_shared(|payload| {
                shared.insert(payload.as_ptr(), payload.len());
            });
        }
        memory += shared.values().sum::<usize>();
        if memory != self.memory.total() {
            return Some(format!(
                "{} bytes are accounted for, {memory} are buffered",
                self.memory.total()
            ));
        }
        if self.memory.is_over() {
            return Some(format!("{memory} bytes are buffered, more than the limit"));
        }
        for slot in self.conns.iter().filter(|slot| slot.paused_for_memory) {
            if !self.memory.is_tight() || !self.memory.is_paused(slot.id) {
                return Some(format!(
                    "{}: nothing will make it read again",
                    slot.info(self.now)
                ));
            }
        }
        if self.history.closes_len() > self.config.recent_closes {
            return Some(format!(
                "{} closes are kept, too many",
                self.history.closes_len()
            ));
        }
        if self.conns.pool.sizes_in.count() != self.conns.pool.traffic.frames_in {
            return Some("not every frame has a size".to_owned());
        }
        if let Some(name) = self.misattributed() {
            return Some(format!(
                "the traffic of listener {name} is not that of its connections"
            ));
        }
        if self.conns.timers().len() > open {
            return Some(format!(
                "{} timers for {open} connections",
                self.conns.timers().len()
            ));
        }
        for slot in self.conns.iter() {
            let is_due = slot.machine.was_open() && self.deferred.has(slot.id);
            let is_held = self.deferred.holds(slot.id);
            if slot.machine.awaits_commands() != is_held || (is_due && !is_held) {
                return Some(format!(
                    "{}: held for commands: {is_held}, commands are due: {is_due}",
                    slot.info(self.now)
                ));
            }
        }
        if self.running.is_some() {
            return Some("a connection's turn is running between two iterations".to_owned());
        }
        let settled = self.listeners.were_visited(&self.capacity());
        if !settled && self.rest_until().is_none() {
            return Some("every iteration visits every listener".to_owned());
        }
        if let Some(name) = self.listeners.unnoticed() {
            return Some(format!("listener {name} has changed and is not visited"));
        }
        if self.listeners.rests_wrongly() {
            return Some("a visit to a listener is due, and none is made".to_owned());
        }
        if !self.listeners.add_up() {
            return Some("the sums over all listeners are wrong".to_owned());
        }
        let fault = self.miscounted_source().or_else(|| self.deaf_listener());
        if fault.is_some() {
            return fault;
        }
        for index in 0..self.conns.slots() {
            let slot = self.conns.by_index(index);
            let alive = slot
                .filter(|slot| !slot.machine.is_detached())
                .map_or(0, |slot| slot.id.generation());
            let said = self.conns.live_generation(index);
            if said != alive {
                return Some(format!(
                    "handles take {index}.{said} for alive, it is {index}.{alive}"
                ));
            }
        }
        for slot in self.conns.iter() {
            let fault = slot
                .machine
                .broken_invariant(READ_SIZE, slot.queued || slot.retry)
                .or_else(|| {
                    let deadline = slot.machine.deadline();
                    let unseen = !slot.queued && self.conns.timers().of(slot.id.index()) > deadline;
                    unseen.then(|| format!("no timer for its deadline at {deadline:?}"))
                })
                .or_else(|| {
                    let is_stuck = !slot.queued && slot.is_stuck();
                    is_stuck.then(|| "nothing leads to its next write".to_owned())
                });
            if let Some(fault) = fault {
                return Some(format!("{}: {fault}", slot.info(self.now)));
            }
        }
        None
    }

    /// A connecting connection has an attempt, no other one has, and its timer is armed.
    fn lost_attempt(&self) -> Option<String> {
        for slot in self
            .conns
            .iter()
            .filter(|slot| slot.machine.is_connecting())
        {
            let attempt = self.outbound.contains(slot.id);
            let has_socket = slot.stream.is_some();
            if !attempt || !(has_socket || slot.machine.deadline().is_armed()) {
                return Some(format!("{}: it connects for ever", slot.info(self.now)));
            }
        }
        // A connection that was ended from outside keeps its attempt until its next turn.
        let ending = self.outbound.ids().filter(|&id| !self.is_connecting(id));
        let mut ending = ending.filter(|&id| self.conns.get(id).is_none_or(|slot| !slot.queued));
        ending
            .next()
            .map(|id| format!("{id} has an attempt and does not connect"))
    }

    /// Each listener counts its connections under the sources that they name.
    fn miscounted_source(&self) -> Option<String> {
        self.listeners.iter().find_map(|listener| {
            let slots = self
                .conns
                .iter()
                .filter(|slot| slot.listener == Some(listener.id));
            let counted =
                slots.filter_map(|slot| Some((slot.source().ip()?, slot.standing.counted())));
            let fault = listener
                .sources
                .miscount(counted, &listener.options.source_limits)?;
            Some(format!("listener {}: {fault}", listener.name))
        })
    }

    /// A listener is paused until a time at which no timer wakes the loop.
    fn deaf_listener(&self) -> Option<String> {
        let (now, room) = (self.os.now(), self.capacity());
        let wake = self.wake_at(now);
        let waiting = self.listeners.iter().filter(|listener| {
            let out =
                listener.socket.is_some() && !listener.registered && !listener.retry_at.is_armed();
            out && !listener.suspended && !room.out_of_fds && listener.lets_wait()
        });
        let mut waiting = waiting.map(|listener| (listener, listener.admits_at(&room)));
        let (listener, until) =
            waiting.find(|(_, until)| until.is_armed() && wake > (*until).max(now))?;
        Some(format!(
            "listener {} may accept at {until:?}, the next wake-up is at {wake:?}",
            listener.name
        ))
    }

    #[cfg(test)]
    pub(crate) fn listener_visits(&self) -> usize {
        self.listeners.visits()
    }

    /// Sockets that the process has open.
    pub(crate) fn descriptors(&self) -> usize {
        let listening = self
            .listeners
            .iter()
            .filter(|listener| listener.socket.is_some());
        self.conns
            .iter()
            .filter(|slot| slot.stream.is_some())
            .count()
            + listening.count()
    }

    /// For each connection that waits for an event: its socket, and whether it waits to read or to
    /// write.
    pub(crate) fn waiting(&self) -> impl Iterator<Item = (ConnId, &O::Stream, bool, bool)> {
        self.conns
            .iter()
            .filter(|slot| !slot.queued && !slot.retry)
            .filter_map(|slot| {
                let stream = slot.stream.as_ref()?;
                // A connection that is paused for memory waits until others use less.
                let for_input = slot.machine.wants_read() && !slot.is_paused_for_memory();
                Some((slot.id, stream, for_input, slot.machine.sendable() > 0))
            })
    }

    /// Each connection's socket, and its state.
    pub(crate) fn sockets(&self) -> impl Iterator<Item = (&O::Stream, State)> {
        self.conns.iter().filter_map(|slot| {
            let stream = slot.stream.as_ref()?;
            Some((stream, slot.machine.state()))
        })
    }

    /// Listeners that could accept now and wait for an event.
    pub(crate) fn listening(&self) -> impl Iterator<Item = &O::Listener> {
        self.listeners
            .iter()
            .filter(|listener| listener.registered && !listener.retry_at.is_armed())
            .filter_map(|listener| listener.socket.as_ref())
    }
}
