//! What must hold after every turn, whatever happened in it. Checked by the simulator.

use super::os::Os;
use super::Reactor;
use crate::id::ConnId;
use crate::proto::{State, Time};

impl<A, O: Os> Reactor<A, O> {
    /// The first invariant that does not hold, in words.
    pub(crate) fn broken_invariant(&self) -> Option<String> {
        let open = self.connections.len();
        if open > self.connections.cap().max(self.shrunk_from) {
            return Some(format!(
                "{open} connections are open, the cap is {}",
                self.connections.cap()
            ));
        }
        let streams = self.streams.iter().flatten().count();
        let handlers = self.handlers.iter().flatten().count();
        let admitted = self
            .connections
            .iter()
            .filter(|conn| conn.machine.was_admitted())
            .count();
        let without = self.without_socket();
        if streams + without != open || handlers != admitted {
            return Some(format!(
                "{open} slots, {admitted} of them admitted and {without} between two attempts, hold {streams} sockets and {handlers} \
                 handlers"
            ));
        }
        if let Some(fault) = self.lost_attempt() {
            return Some(fault);
        }
        let counted: usize = self.listeners.iter().map(|listener| listener.connections).sum();
        let made = self.connections.iter().filter(|conn| conn.listener.is_none()).count();
        if counted + made != open {
            return Some(format!(
                "listeners count {counted} connections, {made} are outgoing, {open} are open"
            ));
        }
        let closed = self.stats.closed_total();
        if self.stats.accepted + self.stats.outgoing != open as u64 + closed {
            return Some(format!(
                "{} accepted, {} outgoing, {open} open, {closed} closed",
                self.stats.accepted, self.stats.outgoing
            ));
        }
        let pending = self.connections.iter().filter(|conn| conn.pending).count();
        if pending != self.pending.len() {
            return Some(format!("{} are counted as pending, {pending} are", self.pending.len()));
        }
        let most = self.pending_limit().max(self.crowded_from);
        if pending > most {
            return Some(format!("{pending} connections are not open yet, the most is {most}"));
        }
        if !self.pending.is_compact(self.stats.peak) {
            return Some("more pending connections are remembered than there ever were".to_owned());
        }
        let first = self.connections.iter().filter(|conn| conn.pending);
        let first = first.map(|conn| conn.accepted_at).min();
        if self.pending.oldest(&self.connections) != first {
            return Some(format!(
                "the oldest that is not open came at {first:?}, another is taken for it"
            ));
        }
        let memory: usize = self.connections.iter().map(|conn| conn.machine.memory()).sum();
        if memory != self.memory.total() {
            return Some(format!(
                "{} bytes are accounted for, {memory} are held",
                self.memory.total()
            ));
        }
        if self.memory.is_over() {
            return Some(format!("{memory} bytes are held, more than the limit"));
        }
        for conn in self.connections.iter().filter(|conn| conn.paused_for_memory) {
            if !self.memory.is_tight() || !self.paused_for_memory.contains(&conn.id) {
                return Some(format!("{}: nothing will make it read again", conn.info(self.now)));
            }
        }
        if self.closes.len() > self.config.recent_closes {
            return Some(format!("{} closes are kept, too many", self.closes.len()));
        }
        if self.pool.sizes_in.count() != self.pool.traffic.frames_in {
            return Some("not every frame has a size".to_owned());
        }
        if self.timers.len() > open {
            return Some(format!("{} timers for {open} connections", self.timers.len()));
        }
        if self.current.is_some() {
            return Some("somebody has the turn between two turns".to_owned());
        }
        let fault = self.miscounted_source().or_else(|| self.deaf_listener());
        if fault.is_some() {
            return fault;
        }
        for index in 0..self.connections.slots() {
            let alive = self.connections.by_index(index).map_or(0, |conn| conn.id.generation);
            let said = self.shared.live_generation(index);
            if said != alive {
                return Some(format!("handles take {index}.{said} for alive, it is {index}.{alive}"));
            }
        }
        for conn in self.connections.iter() {
            let fault = conn
                .machine
                .broken_invariant(super::READ_SIZE, conn.queued || conn.retry)
                .or_else(|| {
                    let deadline = conn.machine.deadline();
                    let unseen = !conn.queued && self.timers.of(conn.id.index) > deadline;
                    unseen.then(|| format!("no timer for its deadline at {deadline:?}"))
                });
            if let Some(fault) = fault {
                return Some(format!("{}: {fault}", conn.info(self.now)));
            }
        }
        None
    }

    /// Who connects has an attempt, nobody else has one, and it will be looked at again.
    fn lost_attempt(&self) -> Option<String> {
        for conn in self.connections.iter().filter(|conn| conn.machine.is_connecting()) {
            let attempt = self.attempts.get(&conn.id);
            let has_socket = self.streams.get(conn.id.index as usize).is_some_and(Option::is_some);
            if attempt.is_none() || !(has_socket || conn.machine.deadline().is_armed()) {
                return Some(format!("{}: it connects for ever", conn.info(self.now)));
            }
        }
        // One that was ended from outside keeps its attempt until its next turn.
        let ending = self.attempts.keys().filter(|&&id| !self.is_connecting(id));
        let mut ending = ending.filter(|&&id| self.connections.get(id).is_none_or(|conn| !conn.queued));
        ending
            .next()
            .map(|id| format!("{id} has an attempt and does not connect"))
    }

    /// Each listener counts its connections under their sources as they say that they are counted.
    fn miscounted_source(&self) -> Option<String> {
        self.listeners.iter().find_map(|listener| {
            let slots = self
                .connections
                .iter()
                .filter(|conn| conn.listener == Some(listener.id));
            let counted = slots.filter_map(|conn| Some((conn.source().ip()?, conn.counted)));
            let fault = listener.sources.miscount(counted, &listener.options.sources)?;
            Some(format!("listener {}: {fault}", listener.name))
        })
    }

    /// A listener is out of the poll for a time, and nothing will wake the loop when that is over.
    fn deaf_listener(&self) -> Option<String> {
        let (now, room) = (self.os.now(), self.room());
        let wake = self.next_timeout().map_or(Time::NEVER, |timeout| now.after(timeout));
        let waiting = self.listeners.iter().filter(|listener| {
            let out = listener.socket.is_some() && !listener.registered && !listener.retry_at.is_armed();
            out && !listener.suspended && !room.out_of_fds && listener.lets_wait()
        });
        let mut waiting = waiting.map(|listener| (listener, listener.admits_at(&room)));
        let (listener, until) = waiting.find(|(_, until)| until.is_armed() && wake > (*until).max(now))?;
        Some(format!(
            "listener {} may accept at {until:?}, the next wake-up is at {wake:?}",
            listener.name
        ))
    }

    /// Sockets that the process holds.
    pub(crate) fn descriptors(&self) -> usize {
        let listening = self.listeners.iter().filter(|listener| listener.socket.is_some());
        self.streams.iter().flatten().count() + listening.count()
    }

    /// For each connection that waits for an event: its socket, whether it waits for input, whether for room.
    pub(crate) fn waiting(&self) -> impl Iterator<Item = (ConnId, &O::Stream, bool, bool)> {
        self.connections
            .iter()
            .filter(|conn| !conn.queued && !conn.retry)
            .filter_map(|conn| {
                let stream = self.streams.get(conn.id.index as usize)?.as_ref()?;
                // Who is paused for memory waits for others to hold less.
                let for_input = conn.machine.wants_read() && !conn.is_paused_for_memory();
                Some((conn.id, stream, for_input, conn.machine.sendable() > 0))
            })
    }

    /// An attempt to connect is under way.
    pub(crate) fn is_dialing(&self, id: ConnId) -> bool {
        self.is_connecting(id)
    }

    /// Each connection's socket, and where it is in its life.
    pub(crate) fn sockets(&self) -> impl Iterator<Item = (&O::Stream, State)> {
        self.connections.iter().filter_map(|conn| {
            let stream = self.streams.get(conn.id.index as usize)?.as_ref()?;
            Some((stream, conn.machine.state()))
        })
    }

    /// The listeners that could accept now and wait for an event to do so.
    pub(crate) fn listening(&self) -> impl Iterator<Item = &O::Listener> {
        self.listeners
            .iter()
            .filter(|listener| listener.registered && !listener.retry_at.is_armed())
            .filter_map(|listener| listener.socket.as_ref())
    }
}
