//! Alarms: at the end of a turn, who watches what, and who is called.
//!
//! ```text
//!          value >= threshold, cooldown over: Raised
//! quiet -----------------------------------------------> raised --cooldown over, still >= threshold: StillRaised--+
//!   ^                                                      | ^                                                    |
//!   +-----------------value < threshold: Cleared-----------+ +----------------------------------------------------+
//! ```
//!
//! As ranch's (`ranch_conns_sup.erl`), and with a word when it is over.

use std::panic::{catch_unwind, AssertUnwindSafe};

use super::os::Os;
use super::{report_panic, Reactor};
use crate::alarm::{Alarm, AlarmId, AlarmInfo, AlarmKind, AlarmNotice, AlarmState};
use crate::control::{AlarmCallback, Control};
use crate::error::{Error, Result};
use crate::proto::Time;

/// An alarm and where it stands.
pub(super) struct AlarmEntry<A> {
    id: AlarmId,
    alarm: Alarm,
    /// RLIMIT_NOFILE when it was set.
    descriptors: Option<usize>,
    /// `None` while it runs.
    callback: Option<AlarmCallback<A>>,
    /// While it is raised: since when.
    raised_at: Option<Time>,
    /// When it last said that it is.
    last_fired: Option<Time>,
}

impl<A> AlarmEntry<A> {
    /// When it has something to say about this value.
    fn due(&self, value: usize, threshold: usize) -> Time {
        if value >= threshold {
            self.last_fired.map_or(Time::ZERO, |at| at.after(self.alarm.cooldown))
        } else if self.raised_at.is_some() {
            Time::ZERO
        } else {
            Time::NEVER
        }
    }
}

impl<A, O: Os> Reactor<A, O> {
    pub(super) fn add_alarm(&mut self, alarm: Alarm, callback: AlarmCallback<A>) -> Result<AlarmId> {
        let descriptors = self.os.descriptor_limit();
        alarm.check(alarm.limit(&self.config, descriptors))?;
        let id = AlarmId(self.next_alarm);
        self.next_alarm = self.next_alarm.wrapping_add(1);
        self.alarms.push(AlarmEntry {
            id,
            alarm,
            descriptors,
            callback: Some(callback),
            raised_at: None,
            last_fired: None,
        });
        Ok(id)
    }

    pub(super) fn set_alarm(&mut self, id: AlarmId, alarm: Alarm) -> Result<()> {
        let descriptors = self.os.descriptor_limit();
        alarm.check(alarm.limit(&self.config, descriptors))?;
        let found = self.alarms.iter_mut().find(|entry| entry.id == id);
        let entry = found.ok_or(Error::NoAlarm { alarm: id })?;
        if entry.alarm.kind != alarm.kind {
            entry.raised_at = None;
            entry.last_fired = None;
        }
        entry.alarm = alarm;
        entry.descriptors = descriptors;
        Ok(())
    }

    pub(super) fn remove_alarm(&mut self, id: AlarmId) -> bool {
        let Some(at) = self.alarms.iter().position(|entry| entry.id == id) else {
            return false;
        };
        let entry = self.alarms.remove(at);
        self.discard("an alarm's destructor", entry);
        true
    }

    pub(super) fn alarms(&self) -> Vec<AlarmInfo> {
        let infos = self.alarms.iter().map(|entry| AlarmInfo {
            id: entry.id,
            alarm: entry.alarm,
            raised: entry.raised_at.is_some(),
            value: self.level(entry.alarm.kind),
            threshold: self.threshold(entry),
        });
        infos.collect()
    }

    /// When an alarm has something to say, if nothing changes until then.
    pub(super) fn alarm_due(&self) -> Time {
        self.alarms
            .iter()
            .map(|entry| entry.due(self.level(entry.alarm.kind), self.threshold(entry)))
            .fold(Time::NEVER, Time::min)
    }

    /// Calls whoever is to be called. At the end of a turn; each at most once.
    pub(super) fn sound_alarms(&mut self, app: &mut A) {
        if self.alarms.is_empty() {
            return;
        }
        self.catch_up();
        // A callback may add and remove alarms: who is missed over that is due in the next turn.
        for at in 0..self.alarms.len() {
            let Some(entry) = self.alarms.get(at) else {
                return;
            };
            let (value, threshold) = (self.level(entry.alarm.kind), self.threshold(entry));
            if entry.due(value, threshold) <= self.now {
                self.sound(app, at, value, threshold);
            }
        }
    }

    fn sound(&mut self, app: &mut A, at: usize, value: usize, threshold: usize) {
        let now = self.now;
        let Some(entry) = self.alarms.get_mut(at) else {
            return;
        };
        let since = now.since(entry.raised_at.unwrap_or(now));
        let state = if value < threshold {
            entry.raised_at = None;
            AlarmState::Cleared
        } else if entry.raised_at.is_some() {
            AlarmState::StillRaised
        } else {
            entry.raised_at = Some(now);
            AlarmState::Raised
        };
        if state != AlarmState::Cleared {
            entry.last_fired = Some(now);
        }
        let id = entry.id;
        let notice = AlarmNotice {
            id,
            kind: entry.alarm.kind,
            state,
            value,
            threshold,
            since,
        };
        // Out of its place while it runs, so that it can have the server.
        let Some(mut callback) = entry.callback.take() else {
            return;
        };
        let told = catch_unwind(AssertUnwindSafe(|| callback(app, &mut Control::new(self), &notice)));
        if let Err(panic) = told {
            self.stats.panics += 1;
            report_panic("an alarm's callback", panic);
        }
        match self.alarms.iter_mut().find(|entry| entry.id == id) {
            Some(entry) => entry.callback = Some(callback),
            // It has removed itself.
            None => self.discard("an alarm's destructor", callback),
        }
    }

    fn level(&self, kind: AlarmKind) -> usize {
        match kind {
            AlarmKind::Connections => self.connections.len(),
            AlarmKind::Descriptors => self.open_descriptors(),
            AlarmKind::Memory => self.memory.total(),
            AlarmKind::FdExhaustion => self.fd_exhaustion.failures(),
        }
    }

    fn threshold(&self, entry: &AlarmEntry<A>) -> usize {
        entry
            .alarm
            .threshold(entry.alarm.limit(&self.config, entry.descriptors))
    }
}
