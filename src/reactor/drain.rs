//! Graceful shutdown: accept the backlog, close the listeners, notify every connection, enforce one
//! deadline.
//!
//! A client in a backlog that cannot be accepted at once waits: its listener stays open until a
//! connection ends and frees its slot, or until the deadline.
//!
//! A listener may close last (the observer's): it and its connections go on until those of the
//! others are gone, or shortly before the deadline.

use std::time::Duration;

use super::admission::Admission;
use super::connections::Connections;
use super::listener::Listener;
use super::listeners::Listeners;
use super::os::Os;
use crate::id::ConnId;
use crate::logs;
use crate::proto::Time;
use crate::reason::CloseReason;
use crate::stats::DrainReport;

/// Slots that are visited in one iteration, to notify or to force.
pub(super) const BATCH: u32 = 1024;

/// The least time for a handshake, if the grace is as long.
const MIN_HANDSHAKE_TIME: Duration = Duration::from_secs(1);

/// Without connections nothing frees a slot or a descriptor: a listener whose clients cannot be
/// accepted is given up after this time.
const GIVE_UP_AFTER: Duration = Duration::from_secs(1);

/// The most time before the deadline that the listeners that close last have for their end.
const LAST_TIME: Duration = Duration::from_secs(1);

#[derive(Debug, Default)]
pub(super) enum Drain {
    #[default]
    No,
    On(Plan),
    Done(DrainReport),
}

#[derive(Debug)]
pub(super) struct Plan {
    started: Time,
    deadline: Time,
    /// Time for a handshake, from the moment at which its connection is notified.
    handshake_time: Duration,
    /// Connections at the start.
    present: u64,
    accepted_before: u64,
    /// What has ended so far.
    report: DrainReport,
    /// Maximum number of clients that are still accepted: the sum of the backlogs, so that a flood
    /// of clients cannot keep the listeners open.
    max_accepts: usize,
    /// The first step was made.
    has_begun: bool,
    /// No client can be accepted at once: connections are notified, which frees slots for those
    /// that wait.
    notifies: bool,
    /// Slots before this one have been notified.
    notified: u32,
    /// Connections other than those of listeners that close last, at the last step.
    others: usize,
    /// When the listeners that close last do so, if others are left.
    last_at: Time,
    /// All listeners close now, and all connections are notified.
    is_last: bool,
    /// After the deadline: slots before this one have been forced.
    forced_through: u32,
}

impl Plan {
    /// When a handshake that is notified now has to be over.
    fn handshake_until(&self, now: Time) -> Time {
        self.deadline.min(now.after(self.handshake_time))
    }

    /// No connection is left whose end would free a slot.
    fn is_idle<S>(&self, conns: &Connections<S>) -> bool {
        match self.is_last {
            true => conns.is_empty(),
            false => self.others == 0,
        }
    }

    /// Counts the connections of listeners that do not close last. True if the others' turn comes.
    fn note_others<S, L>(
        &mut self,
        conns: &Connections<S>,
        listeners: &Listeners<L>,
        due: Option<Time>,
    ) -> bool {
        if self.is_last {
            return false;
        }
        let (mut watchers, mut is_open) = (0, false);
        for listener in listeners.iter() {
            match listener.options.closes_last {
                true => watchers += listener.connections,
                false => is_open |= listener.is_open(),
            }
        }
        self.others = conns.len().saturating_sub(watchers);
        self.is_last = self.others == 0 && !is_open || due.is_some_and(|due| self.last_at <= due);
        if self.is_last {
            self.notified = 0;
        }
        self.is_last
    }
}

impl Drain {
    /// When the next step is due without an event; `ZERO` for at once.
    pub(super) fn wake_at<S, L>(
        &self,
        conns: &Connections<S>,
        listeners: &Listeners<L>,
        now: Time,
    ) -> Time {
        let Some(plan) = self.plan() else {
            return Time::NEVER;
        };
        let is_due = !plan.has_begun || plan.notifies && plan.notified < conns.slots();
        if is_due || conns.is_empty() && listeners.open() == 0 {
            return Time::ZERO;
        }
        let next = match plan.is_last {
            true => plan.deadline,
            false => plan.last_at,
        };
        let give_up = plan.started.after(GIVE_UP_AFTER);
        if plan.is_idle(conns) && now < give_up {
            next.min(give_up)
        } else {
            next
        }
    }

    fn plan(&self) -> Option<&Plan> {
        match self {
            Self::On(plan) => Some(plan),
            Self::No | Self::Done(_) => None,
        }
    }

    /// For a client that comes while the server drains, of a listener that `closes_last` or not:
    /// when its handshake has to be over. `None` if it is not notified yet.
    pub(super) fn notified_until(&self, closes_last: bool, now: Time) -> Option<Time> {
        let plan = self.plan().filter(|plan| plan.is_last || !closes_last)?;
        Some(plan.handshake_until(now))
    }

    pub(super) fn is_on(&self) -> bool {
        !matches!(self, Self::No)
    }

    /// The result, once the drain is over.
    pub(super) fn report(&self) -> Option<DrainReport> {
        match self {
            Self::Done(report) => Some(*report),
            _ => None,
        }
    }

    /// Begins a drain, or shortens one. True if it begins. Of connections, `present` is the
    /// number now, and `accepted` that since the server began.
    pub(super) fn begin<L>(
        &mut self,
        listeners: &mut Listeners<L>,
        (present, accepted): (u64, u64),
        now: Time,
        grace: Duration,
    ) -> bool {
        let deadline = now.after(grace);
        let handshake_time = MIN_HANDSHAKE_TIME.max(grace / 4);
        let last_at = now.after(grace - LAST_TIME.min(grace / 4));
        match self {
            Self::No => {
                logs::info!(target: logs::SERVER, "draining {present} connections, at most {grace:?}");
                let (mut max_accepts, mut is_last) = (0_usize, true);
                for listener in listeners.iter_mut() {
                    listener.begin_drain();
                    is_last &= !listener.options.closes_last;
                    max_accepts = max_accepts.saturating_add(listener.options.max_backlog());
                }
                *self = Self::On(Plan {
                    started: now,
                    deadline,
                    handshake_time,
                    present,
                    accepted_before: accepted,
                    report: DrainReport::default(),
                    max_accepts,
                    has_begun: false,
                    notifies: false,
                    notified: 0,
                    others: usize::MAX,
                    last_at,
                    is_last,
                    forced_through: 0,
                });
                true
            }
            Self::On(plan) => {
                plan.deadline = plan.deadline.min(deadline);
                plan.last_at = plan.last_at.min(last_at);
                plan.handshake_time = plan.handshake_time.min(handshake_time);
                false
            }
            Self::Done(_) => false,
        }
    }

    /// Closes each listener whose backlog is empty, and at the end the others. `is_full` is whether
    /// a listener's clients wait for a slot, `due` the time up to which deadlines expire, if any do
    /// in this iteration.
    pub(super) fn close_listeners<S, O: Os<Stream = S>>(
        &mut self,
        os: &mut O,
        conns: &Connections<S>,
        listeners: &mut Listeners<O::Listener>,
        accepted: u64,
        (due, now): (Option<Time>, Time),
        (admission, is_full): (
            &mut Admission,
            impl Fn(&Admission, &Listener<O::Listener>) -> bool,
        ),
    ) {
        let Self::On(plan) = self else {
            return;
        };
        plan.has_begun = true;
        plan.note_others(conns, listeners, due);
        if listeners.open() == 0 {
            plan.notifies = true;
            return;
        }
        let accepted = usize::try_from(accepted - plan.accepted_before).unwrap_or(usize::MAX);
        let is_over = due.is_some_and(|due| plan.deadline <= due) || accepted > plan.max_accepts;
        // Other servers may free a slot of a shared cap.
        let is_shared = conns.shared_cap().is_some();
        let gives_up = plan.is_idle(conns) && plan.started.after(GIVE_UP_AFTER) <= now;
        let mut may_accept = false;
        let is_last = plan.is_last;
        let closes = |listener: &&mut Listener<O::Listener>| {
            listener.is_open() && (is_last || !listener.options.closes_last)
        };
        for listener in listeners.iter_mut().filter(closes) {
            // The descriptor of one that was closed may be for a client of the next.
            let fails = admission.fds.is_on() || listener.retry_at.is_armed();
            let waits = fails || is_full(admission, listener);
            if is_over || !listener.readable || (waits && !has_client(os, listener)) {
                if is_over && has_client(os, listener) {
                    plan.report.unserved += 1;
                }
                listener.close(os, &mut admission.fds);
            } else if waits && gives_up && (fails || !is_shared) {
                plan.report.unserved += 1;
                listener.close(os, &mut admission.fds);
            } else {
                may_accept |= !waits;
            }
        }
        plan.notifies |= !may_accept;
        if plan.note_others(conns, listeners, due) {
            // Their turn has come.
            plan.has_begun = false;
        }
    }

    /// Notifies the next connections. Each reads again: it does not rely on a "would block" from
    /// before the drain.
    pub(super) fn notify<S, L>(
        &mut self,
        conns: &mut Connections<S>,
        listeners: &Listeners<L>,
        now: Time,
    ) {
        let Self::On(plan) = self else {
            return;
        };
        if !plan.notifies {
            return;
        }
        let until = plan.handshake_until(now);
        let first = plan.notified;
        plan.notified = first.saturating_add(BATCH).min(conns.slots());
        for index in first..plan.notified {
            let Some(conn) = conns.by_index_mut(index) else {
                continue;
            };
            let listener = || conn.listener.and_then(|id| listeners.by_id(id));
            if !plan.is_last && listener().is_some_and(|one| one.options.closes_last) {
                continue;
            }
            if !conn.machine.is_draining() {
                conn.machine.drain(until);
            }
            conn.readable = true;
            let id = conn.id;
            conns.arm_deadline(id);
            conns.wake(id);
        }
    }

    /// After the deadline: the next connection to be forced, if there is one in the next `slots`
    /// slots.
    pub(super) fn next_late<S>(
        &mut self,
        conns: &Connections<S>,
        due: Option<Time>,
        slots: &mut u32,
    ) -> Option<ConnId> {
        let Self::On(plan) = self else {
            return None;
        };
        if due.is_none_or(|due| plan.deadline > due) {
            return None;
        }
        while *slots > 0 && !conns.is_empty() {
            *slots -= 1;
            let index = plan.forced_through % conns.slots().max(1);
            plan.forced_through = index + 1;
            if let Some(conn) = conns.by_index(index) {
                return Some(conn.id);
            }
        }
        None
    }

    /// Counts an end. `is_confirmed` if the peer has finished after all output and our FIN.
    pub(super) fn count(&mut self, reason: CloseReason, is_confirmed: bool) {
        let Self::On(Plan { report, .. }) = self else {
            return;
        };
        match reason {
            CloseReason::DrainForced => report.forced += 1,
            // The thread that had it has dropped it.
            CloseReason::Detached => report.ended += 1,
            CloseReason::Finished | CloseReason::Closed | CloseReason::Drained if is_confirmed => {
                report.ended += 1;
            }
            _ => report.failed += 1,
        }
    }

    /// Ends the drain once no connection and no listener is left.
    pub(super) fn finish<S, L>(
        &mut self,
        conns: &Connections<S>,
        listeners: &Listeners<L>,
        accepted: u64,
        now: Time,
    ) {
        let Self::On(plan) = self else {
            return;
        };
        if !plan.has_begun || !conns.is_empty() || listeners.open() > 0 {
            return;
        }
        let report = DrainReport {
            took: now.since(plan.started),
            ..plan.report
        };
        debug_assert_eq!(
            (report.ended + report.failed + report.forced) as u64,
            plan.present + accepted - plan.accepted_before,
            "each connection is counted once"
        );
        logs::info!(
            target: logs::SERVER,
            "drained: {} ended in order, {} otherwise, {} were forced; clients left in {} backlogs",
            report.ended,
            report.failed,
            report.forced,
            report.unserved
        );
        *self = Self::Done(report);
    }
}

/// Whether a client waits in the backlog.
fn has_client<O: Os>(os: &mut O, listener: &mut Listener<O::Listener>) -> bool {
    let socket = listener.socket.as_mut();
    socket.is_some_and(|socket| os.has_client(socket))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Clients of a listener that closes last are served until it is its turn.
    #[test]
    fn a_newcomer_is_notified_with_the_others_of_its_listener() {
        let now = Time::ZERO.after(Duration::from_secs(7));
        let mut drain = Drain::default();
        let notified = |drain: &Drain| [false, true].map(|last| drain.notified_until(last, now));
        assert_eq!(notified(&drain), [None, None], "no drain");
        let mut listeners = Listeners::<()>::default();
        assert!(drain.begin(&mut listeners, (0, 0), now, Duration::from_secs(20)));
        let until = Some(now.after(Duration::from_secs(5)));
        assert_eq!(notified(&drain), [until, until], "none closes last");
        if let Drain::On(plan) = &mut drain {
            plan.is_last = false;
        }
        assert_eq!(notified(&drain), [until, None]);
    }
}
