//! What an operator changes and reads of a running server: options, counters, gauges. And its end.

use std::sync::Arc;
use std::time::Duration;

use super::admission::Admission;
use super::connection::Connection;
use super::core::Core;
use super::episodes::Cause;
use super::listener::Listener;
use super::os::{End, Os};
use super::pending::Unproven;
use super::shared_cap::{CapShare, SharedCap};
use super::standing::Queue;
use crate::config::{Config, Listen};
use crate::error::{Error, Result};
use crate::id::{ConnId, ListenerId, ListenerRef};
use crate::logs;
use crate::proto::{Time, Traffic};
use crate::reason::{CloseReason, Closed};
use crate::stats::Stats;

impl<O: Os> Core<O> {
    // Options.

    pub(super) fn share_cap(&mut self, cap: Arc<SharedCap>, index: usize) {
        let share = CapShare::new(cap, index, self.os.waker());
        self.conns.share(share);
    }

    /// Checks the options of a new listener.
    pub(super) fn check_listen(&self, listen: &Listen) -> Result<()> {
        if self.drain.is_on() {
            return Err(Error::Draining);
        }
        let name = listen.name.as_deref().filter(|name| !name.is_empty());
        listen.check().map_err(|error| match name {
            Some(name) => error.of_listener(name),
            None => error,
        })?;
        match &listen.name {
            Some(name) => self.listeners.check_name(name),
            None => Ok(()),
        }
    }

    pub(super) fn set_config(&mut self, config: Config) -> Result<()> {
        config.check()?;
        let now = self.refresh();
        self.published.set_limits(config.queue_limits);
        if config.max_connections != self.config.max_connections {
            self.conns.set_cap(config.max_connections);
            self.listeners.refill_reserves(&mut self.conns);
        }
        let memory_limit = config.memory_limit.unwrap_or(usize::MAX);
        self.memory.set_limit(&mut self.conns, memory_limit, now);
        self.history.set_limit(config.recent_closes);
        self.admission.follow(&config, now);
        self.config = config;
        #[cfg(feature = "sim")]
        {
            self.open_at_change = self.conns.len();
            self.pending_at_change = self.admission.pending();
        }
        Ok(())
    }

    pub(super) fn set_options(&mut self, which: &ListenerRef, mut options: Listen) -> Result<()> {
        let now = self.refresh();
        let listener = self.listeners.find_mut(which)?;
        let checked = options
            .check()
            .and_then(|()| listener.options.check_change(&options));
        checked.map_err(|error| error.of_listener(&listener.name))?;
        options.access_rules = options
            .access_rules
            .counting_on(&listener.options.access_rules);
        let id = listener.id;
        let (before, rates_changed) = listener.set_options(options, now);
        let reached_cap = listener.reached_cap();
        self.listeners.note_reserve(id, &mut self.conns);
        self.follow_own_limit(id);
        if reached_cap.is_none() {
            self.episodes.calm(&Cause::ListenerCap(id), now);
        } else if !self.episodes.is_on(&Cause::ListenerCap(id)) {
            self.watch_listener_cap(id);
        }
        if rates_changed {
            let id = Some(id);
            let ids: Vec<_> = self.conns.ids_of(id).collect();
            for id in ids {
                let mut retry = false;
                if let Some(conn) = self.conns.get_mut(id) {
                    conn.machine.recheck_rates(now);
                    retry = conn.retry;
                }
                self.conns.arm_deadline(id);
                if retry {
                    // Its timer was for the retry: its turn sets it again.
                    self.conns.wake(id);
                }
            }
        }
        // The last step: a destructor of the user's may panic.
        self.guard.drop("a listener's options", before);
        Ok(())
    }

    // Counters and gauges.

    pub(super) fn stats(&self) -> Stats {
        let mut stats = self.stats.clone();
        self.complete(&mut stats);
        stats
    }

    /// Fills in the counters that the parts keep.
    fn complete(&self, stats: &mut Stats) {
        stats.open = self.conns.len();
        stats.max_connections = self.conns.cap();
        stats.pending = self.admission.pending();
        stats.connecting = self.outbound.len();
        stats.memory = self.memory.total();
        stats.paused_for_memory = self.memory.paused();
        stats.panics = self.guard.count();
        stats.traffic = self.conns.pool.traffic;
    }

    /// Publishes the counters to the handles on other threads.
    pub(super) fn publish(&self) {
        self.published.update(|stats| {
            stats.clone_from(&self.stats);
            self.complete(stats);
            debug_assert_eq!(
                stats.accepted + stats.outgoing,
                stats.open as u64 + stats.closed_total(),
                "accepted + outgoing = open + closed"
            );
        });
    }

    /// Publishes the last counters: nothing is open any more.
    pub(super) fn publish_end(&self) {
        self.published.update(|stats| {
            stats.clone_from(&self.stats);
            self.complete(stats);
            for conn in self.conns.iter() {
                let reason = match conn.machine.is_detached() {
                    true => CloseReason::Detached,
                    false => CloseReason::Killed,
                };
                stats.count_closed(&Closed::new(reason));
            }
            stats.open = 0;
            stats.pending = 0;
            stats.connecting = 0;
            stats.memory = 0;
            stats.paused_for_memory = 0;
        });
    }

    /// Publishes the panics of destructors that ran after the last statistics were published.
    pub(super) fn publish_panics(&self) {
        self.published
            .update(|stats| stats.panics = self.guard.count());
    }

    /// From here on the traffic is that of a connection of this listener.
    #[inline(always)]
    pub(super) fn attribute_to(&mut self, listener: Option<ListenerId>) {
        if !self.attribution.is_to(listener) {
            self.switch_to(listener);
        }
    }

    #[inline(never)]
    fn switch_to(&mut self, listener: Option<ListenerId>) {
        let traffic = &self.conns.pool.traffic;
        self.attribution.set(listener, &mut self.listeners, traffic);
    }

    /// As [`Core::attribute_to`] until [`Core::end_aside`]: something is sent to another connection
    /// than the running one.
    #[inline(never)]
    pub(super) fn begin_aside(&mut self, id: ConnId) {
        if let Some(listener) = self.conns.get(id).map(|conn| conn.listener) {
            self.attribution.note_aside();
            self.attribute_to(listener);
        }
    }

    /// It was sent: the traffic is the running connection's again.
    #[inline(never)]
    pub(super) fn end_aside(&mut self) {
        if let Some(listener) = self.attribution.take_aside() {
            self.attribute_to(listener);
        }
    }

    /// The traffic of all connections that this listener has and has had.
    pub(super) fn traffic_of(&self, listener: &Listener<O::Listener>) -> Traffic {
        self.attribution.of(listener, &self.conns.pool.traffic)
    }

    // Limits, and the drain.

    /// Notes whether the cap is reached, at the end of an iteration.
    pub(super) fn watch_cap(&mut self) {
        let is_full = !self.conns.has_room();
        if is_full && !self.was_full {
            let begins = self.conns.claim_cap_report() && self.episodes.note(Cause::Cap);
            if begins {
                logs::warning!(
                    target: logs::SERVER,
                    "all {} slots are taken (max_connections); new clients wait or are refused",
                    self.conns.cap()
                );
            }
        } else if !is_full && self.was_full {
            self.episodes.calm(&Cause::Cap, self.now);
        }
        self.was_full = is_full;
    }

    /// Notes that a listener has as many connections as it may.
    pub(super) fn watch_listener_cap(&mut self, id: ListenerId) {
        self.listeners.reach_own_cap(id);
        let Some(listener) = self.listeners.by_id(id) else {
            return;
        };
        let Some(max) = listener.reached_cap() else {
            return;
        };
        if self.episodes.note(Cause::ListenerCap(id)) {
            logs::warning!(
                target: logs::LISTENER,
                "listener {} on {} has all of its {max} connections (Listen::max_connections); \
                 new clients wait or are refused",
                listener.name,
                listener.addr
            );
        }
    }

    /// A listener's own limit may have been set or removed: it has candidates while there is one.
    pub(super) fn follow_own_limit(&mut self, id: ListenerId) {
        let Self {
            conns,
            listeners,
            admission,
            ..
        } = self;
        let Some(listener) = listeners.by_id_mut(id) else {
            return;
        };
        if listener.options.max_connections.is_none() {
            listener.unproven = None;
        } else if listener.unproven.is_none() {
            let mut unproven = Box::<Unproven>::default();
            // One that was skipped joins after its turn.
            let theirs = conns.iter().filter(|conn| {
                conn.listener == Some(id) && !conn.standing.is_skipped_by(Queue::Listener)
            });
            let since = |conn: &Connection<_>| match conn.standing.is_pending() {
                true => admission.pending_since(conn),
                false => conn.accepted_at,
            };
            let mut theirs: Vec<_> = theirs
                .map(|conn| (since(conn), conn.id, conn.standing.is_pending()))
                .collect();
            theirs.sort_unstable();
            for (since, id, pending) in theirs {
                if pending {
                    unproven.pending.push(id, since, conns);
                } else if listener.options.evict_silent {
                    unproven.silent.push(id, conns);
                }
            }
            listener.unproven = Some(unproven);
        }
        if listener.reached_cap().is_some() {
            listeners.reach_own_cap(id);
        }
    }

    /// Moves a drain on: closes listeners, then notifies connections.
    pub(super) fn drain_step(&mut self, due: Option<Time>) {
        let Self {
            drain,
            os,
            listeners,
            admission,
            conns,
            config,
            stats,
            now,
            ..
        } = self;
        let is_full = |admission: &Admission, listener: &Listener<O::Listener>| {
            listener.lets_wait() && admission.refusal(conns, listener, config, *now).is_some()
        };
        let waits = (admission, is_full);
        drain.close_listeners(os, conns, listeners, stats.accepted, (due, *now), waits);
        drain.notify(conns, listeners, *now);
    }

    /// Ends the drain if nothing is left.
    pub(super) fn finish_drain(&mut self) {
        let accepted = self.stats.accepted;
        self.drain
            .finish(&self.conns, &self.listeners, accepted, self.now);
    }

    /// Begins a drain, or shortens one. `grace` counts from now.
    pub(super) fn begin_drain(&mut self, grace: Duration) -> bool {
        let now = self.refresh();
        let Stats {
            accepted, outgoing, ..
        } = self.stats;
        // That of a callback that begins a drain counts too: as it ends, or while one that is
        // evicted for it does.
        let present = (accepted + outgoing).saturating_sub(self.stats.closed_total())
            + u64::from(self.conns.has_leaving());
        let counts = (present, accepted);
        self.drain.begin(&mut self.listeners, counts, now, grace)
    }

    /// Number of sockets of listeners and connections.
    pub(super) fn open_descriptors(&self) -> usize {
        self.conns.len() - self.without_socket() + self.listeners.open()
    }

    /// Number of outgoing connections, established or not.
    pub(super) fn outgoing(&self) -> usize {
        let accepted: usize = self
            .listeners
            .iter()
            .map(|listener| listener.connections)
            .sum();
        self.conns.len().saturating_sub(accepted)
    }

    /// Outgoing connections that wait for their next attempt.
    pub(super) fn without_socket(&self) -> usize {
        self.outbound.without_socket()
    }

    /// The socket of a connection.
    pub(super) fn stream(&self, id: ConnId) -> std::io::Result<&O::Stream> {
        let stream = self.conns.get(id).and_then(|conn| conn.stream.as_ref());
        Ok(stream.ok_or(std::io::ErrorKind::NotConnected)?)
    }

    // The end.

    /// Closes every socket, once the server ends: before other servers have the slots.
    pub(super) fn close_all(&mut self) {
        for conn in self.conns.iter_mut() {
            if let Some(stream) = conn.stream.take() {
                self.os.close(stream, End::of(&conn.machine, false));
            }
        }
        for listener in self.listeners.iter_mut() {
            if let Some(socket) = listener.socket.take() {
                self.os.close_listener(socket);
            }
        }
        self.conns.hide_all();
    }

    /// Drops everything that may hold foreign code. A panic in one destructor stops no other.
    pub(super) fn clear(&mut self) {
        let ids: Vec<ConnId> = self.conns.iter().map(|conn| conn.id).collect();
        for id in ids {
            let conn = self.conns.remove(id);
            self.guard.drop("a framer's destructor", conn);
        }
        for listener in std::mem::take(&mut self.listeners).into_all() {
            self.guard.drop("a listener's options", listener);
        }
        for attempt in self.outbound.take_all() {
            self.guard.drop("a TLS configuration's destructor", attempt);
        }
        for command in self.deferred.take_all() {
            self.guard.drop("a message's destructor", command);
        }
        for receiver in self.detached.take_receivers() {
            self.guard
                .drop("the receiver of a detached connection", receiver);
        }
    }
}
