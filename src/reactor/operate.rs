//! What an operator changes and reads of a running server: options, counters, gauges.

use super::core::Core;
use super::episodes::Cause;
use super::os::Os;
use crate::config::{Config, Listen};
use crate::error::{Error, Result};
use crate::id::ListenerRef;
use crate::reason::CloseReason;
use crate::stats::Stats;

impl<O: Os> Core<O> {
    // Options.

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

    // Options.

    pub(super) fn set_config(&mut self, config: Config) -> Result<()> {
        config.check()?;
        let now = self.refresh();
        self.published.set_limits(config.queue_limits);
        if config.max_connections != self.config.max_connections {
            self.conns.set_cap(config.max_connections);
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
        self.listeners.retry_unregistered();
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
        let (id, rates_changed) = (listener.id, listener.set_options(options, now));
        let reached_cap = listener.reached_cap();
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
        self.listeners.retry_unregistered();
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
        let traffic = &self.conns.pool.traffic;
        stats.bytes_in = traffic.bytes_in;
        stats.bytes_out = traffic.bytes_out;
        stats.frames_in = traffic.frames_in;
        stats.frames_out = traffic.frames_out;
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
                let is_detached = conn.machine.is_detached();
                stats.count_closed(if is_detached {
                    CloseReason::Detached
                } else {
                    CloseReason::Killed
                });
            }
            stats.open = 0;
            stats.pending = 0;
            stats.connecting = 0;
            stats.memory = 0;
            stats.paused_for_memory = 0;
        });
    }
}
