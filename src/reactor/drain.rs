//! Ending in order: who waits already comes in, the ports close, everybody is told, and one deadline holds for all.

use std::time::Duration;

use super::connections::Connections;
use super::os::Os;
use super::Reactor;
use crate::logs;
use crate::proto::Time;
use crate::reason::CloseReason;
use crate::stats::DrainReport;

/// Connections that are told of a drain, or forced to end, in one turn.
const BATCH: u32 = 1024;

/// How long a handshake may still take once the server drains.
const HANDSHAKE_GRACE: Duration = Duration::from_secs(1);

#[derive(Debug, Default)]
pub(super) enum Drain {
    #[default]
    No,
    /// Accepting who waits in the backlogs, then closing the ports.
    Ports(Plan),
    /// Waiting for the connections to end.
    Connections(Plan),
    Done(DrainReport),
}

#[derive(Debug)]
pub(super) struct Plan {
    started: Time,
    deadline: Time,
    /// Connections to see off: those there at the start and those accepted since.
    present: usize,
    accepted_before: u64,
    forced: usize,
    /// Accept calls left: the backlogs' sizes, so that a flood of connects cannot keep the ports open.
    accepts_left: usize,
    /// Slots before this one have been told.
    told: u32,
    /// Once the deadline is over: slots before this one are empty.
    emptied: u32,
}

impl Drain {
    pub(super) fn deadline(&self) -> Time {
        match self {
            Self::Ports(plan) | Self::Connections(plan) => plan.deadline,
            Self::No | Self::Done(_) => Time::NEVER,
        }
    }

    /// While the server drains: when handshakes must be over.
    pub(super) fn handshake_until(&self) -> Option<Time> {
        match self {
            Self::Ports(plan) | Self::Connections(plan) => Some(plan.deadline.min(plan.started.after(HANDSHAKE_GRACE))),
            Self::No | Self::Done(_) => None,
        }
    }

    pub(super) fn is_on(&self) -> bool {
        !matches!(self, Self::No)
    }

    /// The next step needs no event.
    pub(super) fn can_go_on(&self, connections: &Connections) -> bool {
        match self {
            Self::Ports(_) => true,
            Self::Connections(plan) => connections.is_empty() || plan.told < connections.slots(),
            Self::No | Self::Done(_) => false,
        }
    }

    /// How it went, once it is over.
    pub(super) fn report(&self) -> Option<DrainReport> {
        match self {
            Self::Done(report) => Some(*report),
            _ => None,
        }
    }
}

impl<A, O: Os> Reactor<A, O> {
    pub(super) fn begin_drain(&mut self, grace: Duration) {
        let deadline = self.now.after(grace);
        match &mut self.drain {
            Drain::No => {
                log::info!(target: logs::SERVER, "draining {} connections, at most {grace:?}", self.connections.len());
                for listener in &mut self.listeners {
                    listener.readable = true;
                    listener.retry_at = Time::NEVER;
                }
                self.give_up_attempts();
                self.drain = Drain::Ports(Plan {
                    started: self.now,
                    deadline,
                    present: self.connections.len(),
                    accepted_before: self.stats.accepted,
                    forced: 0,
                    accepts_left: self
                        .listeners
                        .iter()
                        .map(|listener| listener.options.socket.backlog as usize)
                        .sum(),
                    told: 0,
                    emptied: 0,
                });
            }
            Drain::Ports(plan) | Drain::Connections(plan) => plan.deadline = plan.deadline.min(deadline),
            Drain::Done(_) => {}
        }
    }

    /// Moves the drain on. `due` is the time up to which deadlines may be judged, if this turn judges any.
    pub(super) fn drain_step(&mut self, app: &mut A, due: Option<Time>) {
        if matches!(self.drain, Drain::Ports(_)) {
            self.close_drained_ports(due);
            if self.listeners.iter().all(|listener| listener.socket.is_none()) {
                if let Drain::Ports(plan) = std::mem::take(&mut self.drain) {
                    self.drain = Drain::Connections(plan);
                }
            }
        }
        self.tell_drain();
        let late = due.is_some_and(|due| self.drain.deadline() <= due);
        if late && matches!(self.drain, Drain::Connections(_)) {
            let count = self.force_next(app);
            if let Drain::Connections(plan) = &mut self.drain {
                plan.forced += count;
            }
        }
        if let (Drain::Connections(plan), true) = (&self.drain, self.connections.is_empty()) {
            let accepted = usize::try_from(self.stats.accepted - plan.accepted_before).unwrap_or(usize::MAX);
            let report = DrainReport {
                ended: (plan.present + accepted).saturating_sub(plan.forced),
                forced: plan.forced,
                took: self.now.since(plan.started),
            };
            log::info!(
                target: logs::SERVER,
                "drained: {} ended by themselves, {} were forced",
                report.ended,
                report.forced
            );
            self.drain = Drain::Done(report);
        }
    }

    /// Closes each port whose queue is empty, or cannot be emptied.
    fn close_drained_ports(&mut self, due: Option<Time>) {
        let Drain::Ports(plan) = &mut self.drain else {
            return;
        };
        let late = due.is_some_and(|due| plan.deadline <= due);
        let accepted = usize::try_from(self.stats.accepted - plan.accepted_before).unwrap_or(usize::MAX);
        let spent = late || accepted > plan.accepts_left;
        for at in 0..self.listeners.len() {
            let hindered = self.fd_exhaustion.is_on() || self.refusal(at).is_some();
            let Some(listener) = self.listeners.get(at) else {
                continue;
            };
            let emptied = !listener.readable || listener.suspended || listener.retry_at.is_armed();
            if emptied || spent || hindered {
                self.close_port(at);
            }
        }
    }

    /// Tells the next connections. What "nothing left to read" meant before is not believed.
    fn tell_drain(&mut self) {
        let until = self.drain.handshake_until().unwrap_or(self.now);
        let Drain::Connections(plan) = &mut self.drain else {
            return;
        };
        let first = plan.told;
        plan.told = first.saturating_add(BATCH).min(self.connections.slots());
        for index in first..plan.told {
            let Some(conn) = self.connections.by_index_mut(index) else {
                continue;
            };
            if !conn.machine.is_draining() {
                conn.machine.drain(until);
            }
            conn.readable = true;
            self.timers.arm(index, conn.machine.deadline());
            self.ready.push(conn.id, &mut conn.queued);
        }
    }

    /// The grace period is over: resets the next of those who are still owed something, and says how many that were.
    fn force_next(&mut self, app: &mut A) -> usize {
        let Drain::Connections(plan) = &mut self.drain else {
            return 0;
        };
        let first = plan.emptied % self.connections.slots().max(1);
        plan.emptied = first.saturating_add(BATCH).min(self.connections.slots());
        let mut forced = 0;
        for index in first..plan.emptied {
            let Some(id) = self.connections.by_index(index).map(|conn| conn.id) else {
                continue;
            };
            if self.is_detached(id) {
                self.cut_off(id);
                forced += 1;
                self.take_back(id, CloseReason::DrainForced);
                continue;
            }
            if let Some(conn) = self.connections.get_mut(id) {
                forced += usize::from(!conn.machine.cut_short(&mut self.pool));
            }
            self.turn(app, id);
        }
        forced
    }
}
