//! Alarms: at the end of a turn, who watches what, and who is called.
//!
//! ```text
//!            value >= mark, cooldown over: Raised
//! quiet -----------------------------------------------> raised --cooldown over, still >= mark: StillRaised--+
//!   ^                                                      | ^                                               |
//!   +--------------------value < mark: Cleared-------------+ +-----------------------------------------------+
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
pub(super) struct Watch<A> {
    id: AlarmId,
    alarm: Alarm,
    /// RLIMIT_NOFILE when it was set.
    descriptors: Option<usize>,
    /// `None` while it runs.
    callback: Option<AlarmCallback<A>>,
    /// While it is raised: since when.
    raised_at: Option<Time>,
    /// When it last said that it is.
    spoke_at: Option<Time>,
}

impl<A> Watch<A> {
    /// When it has something to say about this value.
    fn due(&self, value: usize, mark: usize) -> Time {
        if value >= mark {
            self.spoke_at.map_or(Time::ZERO, |at| at.after(self.alarm.cooldown))
        } else if self.raised_at.is_some() {
            Time::ZERO
        } else {
            Time::NEVER
        }
    }
}

impl<A, O: Os> Reactor<A, O> {
    pub(super) fn watch(&mut self, alarm: Alarm, callback: AlarmCallback<A>) -> Result<AlarmId> {
        let descriptors = self.os.descriptor_limit();
        alarm.check(alarm.limit(&self.config, descriptors))?;
        let id = AlarmId(self.next_alarm);
        self.next_alarm = self.next_alarm.wrapping_add(1);
        self.alarms.push(Watch {
            id,
            alarm,
            descriptors,
            callback: Some(callback),
            raised_at: None,
            spoke_at: None,
        });
        Ok(id)
    }

    pub(super) fn change_watch(&mut self, id: AlarmId, alarm: Alarm) -> Result<()> {
        let descriptors = self.os.descriptor_limit();
        alarm.check(alarm.limit(&self.config, descriptors))?;
        let found = self.alarms.iter_mut().find(|watch| watch.id == id);
        let watch = found.ok_or(Error::NoAlarm { alarm: id })?;
        if watch.alarm.kind != alarm.kind {
            watch.raised_at = None;
            watch.spoke_at = None;
        }
        watch.alarm = alarm;
        watch.descriptors = descriptors;
        Ok(())
    }

    pub(super) fn unwatch(&mut self, id: AlarmId) -> bool {
        let Some(at) = self.alarms.iter().position(|watch| watch.id == id) else {
            return false;
        };
        let watch = self.alarms.remove(at);
        self.discard("an alarm's destructor", watch);
        true
    }

    pub(super) fn watches(&self) -> Vec<AlarmInfo> {
        let infos = self.alarms.iter().map(|watch| AlarmInfo {
            id: watch.id,
            alarm: watch.alarm,
            raised: watch.raised_at.is_some(),
            value: self.level(watch.alarm.kind),
            threshold: self.mark(watch),
        });
        infos.collect()
    }

    /// When an alarm has something to say, if nothing changes until then.
    pub(super) fn alarm_due(&self) -> Time {
        self.alarms
            .iter()
            .map(|watch| watch.due(self.level(watch.alarm.kind), self.mark(watch)))
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
            let Some(watch) = self.alarms.get(at) else {
                return;
            };
            let (value, threshold) = (self.level(watch.alarm.kind), self.mark(watch));
            if watch.due(value, threshold) <= self.now {
                self.sound(app, at, value, threshold);
            }
        }
    }

    fn sound(&mut self, app: &mut A, at: usize, value: usize, threshold: usize) {
        let now = self.now;
        let Some(watch) = self.alarms.get_mut(at) else {
            return;
        };
        let since = now.since(watch.raised_at.unwrap_or(now));
        let state = if value < threshold {
            watch.raised_at = None;
            AlarmState::Cleared
        } else if watch.raised_at.is_some() {
            AlarmState::StillRaised
        } else {
            watch.raised_at = Some(now);
            AlarmState::Raised
        };
        if state != AlarmState::Cleared {
            watch.spoke_at = Some(now);
        }
        let id = watch.id;
        let notice = AlarmNotice {
            id,
            kind: watch.alarm.kind,
            state,
            value,
            threshold,
            since,
        };
        // Out of its place while it runs, so that it can have the server.
        let Some(mut callback) = watch.callback.take() else {
            return;
        };
        let told = catch_unwind(AssertUnwindSafe(|| callback(app, &mut Control::new(self), &notice)));
        if let Err(panic) = told {
            self.stats.panics += 1;
            report_panic("an alarm's callback", panic);
        }
        match self.alarms.iter_mut().find(|watch| watch.id == id) {
            Some(watch) => watch.callback = Some(callback),
            // It has removed itself.
            None => self.discard("an alarm's destructor", callback),
        }
    }

    fn level(&self, kind: AlarmKind) -> usize {
        match kind {
            AlarmKind::Connections => self.roster.len(),
            AlarmKind::Descriptors => self.open_descriptors(),
            AlarmKind::Memory => self.memory.total(),
            AlarmKind::Starvation => self.starvation.failures(),
        }
    }

    fn mark(&self, watch: &Watch<A>) -> usize {
        watch.alarm.mark(watch.alarm.limit(&self.config, watch.descriptors))
    }
}
