//! Graceful shutdown: accept the backlog, close the listeners, notify every connection, enforce one
//! deadline.

use std::time::Duration;

use super::connections::Connections;
use super::listener::Listener;
use super::listeners::Listeners;
use crate::id::ConnId;
use crate::logs;
use crate::proto::Time;
use crate::stats::DrainReport;

/// Slots that are visited in one iteration, to notify or to force.
const BATCH: u32 = 1024;

/// How long a handshake may still take once the server drains.
const HANDSHAKE_GRACE: Duration = Duration::from_secs(1);

#[derive(Debug, Default)]
pub(super) enum Drain {
    #[default]
    No,
    /// Accepting the backlogs, then closing the listeners.
    Listeners(Plan),
    /// Waiting for the connections to end.
    Connections(Plan),
    Done(DrainReport),
}

#[derive(Debug)]
pub(super) struct Plan {
    started: Time,
    deadline: Time,
    /// Connections at the start.
    present: usize,
    accepted_before: u64,
    forced: usize,
    /// Maximum number of clients that are still accepted: the sum of the backlogs, so that a flood
    /// of clients cannot keep the listeners open.
    max_accepts: usize,
    /// Slots before this one have been notified.
    notified: u32,
    /// After the deadline: slots before this one have been forced.
    forced_through: u32,
}

impl Drain {
    pub(super) fn deadline(&self) -> Time {
        match self {
            Self::Listeners(plan) | Self::Connections(plan) => plan.deadline,
            Self::No | Self::Done(_) => Time::NEVER,
        }
    }

    /// While the server drains: when handshakes have to be over.
    pub(super) fn handshake_until(&self) -> Option<Time> {
        match self {
            Self::Listeners(plan) | Self::Connections(plan) => {
                Some(plan.deadline.min(plan.started.after(HANDSHAKE_GRACE)))
            }
            Self::No | Self::Done(_) => None,
        }
    }

    pub(super) fn is_on(&self) -> bool {
        !matches!(self, Self::No)
    }

    /// The next step needs no event.
    pub(super) fn has_work<S>(&self, conns: &Connections<S>) -> bool {
        match self {
            Self::Listeners(_) => true,
            Self::Connections(plan) => conns.is_empty() || plan.notified < conns.slots(),
            Self::No | Self::Done(_) => false,
        }
    }

    /// The result, once the drain is over.
    pub(super) fn report(&self) -> Option<DrainReport> {
        match self {
            Self::Done(report) => Some(*report),
            _ => None,
        }
    }

    /// Begins a drain, or shortens one. True if it begins.
    pub(super) fn begin<S, L>(
        &mut self,
        conns: &Connections<S>,
        listeners: &mut Listeners<L>,
        accepted: u64,
        now: Time,
        grace: Duration,
    ) -> bool {
        let deadline = now.after(grace);
        match self {
            Self::No => {
                logs::info!(target: logs::SERVER, "draining {} connections, at most {grace:?}", conns.len());
                let mut max_accepts = 0;
                for listener in listeners.iter_mut() {
                    listener.readable = true;
                    listener.retry_at = Time::NEVER;
                    max_accepts += listener.options.socket.backlog as usize;
                }
                *self = Self::Listeners(Plan {
                    started: now,
                    deadline,
                    present: conns.len(),
                    accepted_before: accepted,
                    forced: 0,
                    max_accepts,
                    notified: 0,
                    forced_through: 0,
                });
                true
            }
            Self::Listeners(plan) | Self::Connections(plan) => {
                plan.deadline = plan.deadline.min(deadline);
                false
            }
            Self::Done(_) => false,
        }
    }

    /// Calls `close` for each listener whose backlog is empty, or that has `refused` its clients.
    /// `due` is the time up to which deadlines expire, if any do in this iteration.
    pub(super) fn close_listeners<L>(
        &mut self,
        listeners: &mut Listeners<L>,
        accepted: u64,
        due: Option<Time>,
        refused: impl Fn(&Listener<L>) -> bool,
        mut close: impl FnMut(&mut Listener<L>),
    ) {
        let Self::Listeners(plan) = self else {
            return;
        };
        let late = due.is_some_and(|due| plan.deadline <= due);
        let accepted = usize::try_from(accepted - plan.accepted_before).unwrap_or(usize::MAX);
        let spent = late || accepted > plan.max_accepts;
        for listener in listeners.iter_mut() {
            if spent || !listener.may_accept() || refused(listener) {
                close(listener);
            }
        }
        if listeners.open() == 0 {
            if let Self::Listeners(plan) = std::mem::take(self) {
                *self = Self::Connections(plan);
            }
        }
    }

    /// Notifies the next connections. Each reads again: it does not rely on a "would block" from
    /// before the drain.
    pub(super) fn notify<S>(&mut self, conns: &mut Connections<S>, now: Time) {
        let until = self.handshake_until().unwrap_or(now);
        let Self::Connections(plan) = self else {
            return;
        };
        let first = plan.notified;
        plan.notified = first.saturating_add(BATCH).min(conns.slots());
        for index in first..plan.notified {
            let Some(conn) = conns.by_index_mut(index) else {
                continue;
            };
            if !conn.machine.is_draining() {
                conn.machine.drain(until);
            }
            conn.readable = true;
            let id = conn.id;
            conns.arm_deadline(id);
            conns.wake(id);
        }
    }

    /// After the deadline: the next connections to be forced. Each counts with
    /// [`Drain::count_forced`] if it was owed something.
    pub(super) fn next_late<S>(
        &mut self,
        conns: &Connections<S>,
        due: Option<Time>,
    ) -> Vec<ConnId> {
        match self {
            Self::Connections(plan) if due.is_some_and(|due| plan.deadline <= due) => {
                let first = plan.forced_through % conns.slots().max(1);
                plan.forced_through = first.saturating_add(BATCH).min(conns.slots());
                let late = first..plan.forced_through;
                late.filter_map(|index| conns.by_index(index).map(|conn| conn.id))
                    .collect()
            }
            _ => Vec::new(),
        }
    }

    pub(super) fn count_forced(&mut self) {
        if let Self::Connections(plan) = self {
            plan.forced += 1;
        }
    }

    /// Ends the drain once no connection is left.
    pub(super) fn finish<S>(&mut self, conns: &Connections<S>, accepted: u64, now: Time) {
        let Self::Connections(plan) = self else {
            return;
        };
        if !conns.is_empty() {
            return;
        }
        let accepted = usize::try_from(accepted - plan.accepted_before).unwrap_or(usize::MAX);
        let report = DrainReport {
            ended: (plan.present + accepted).saturating_sub(plan.forced),
            forced: plan.forced,
            took: now.since(plan.started),
        };
        logs::info!(
            target: logs::SERVER,
            "drained: {} ended by themselves, {} were forced",
            report.ended,
            report.forced
        );
        *self = Self::Done(report);
    }
}
