//! Alarms: which value each watches, and when its callback is due.
//!
//! ```text
//! quiet  --value >= threshold, cooldown over-->        raised
//! raised --cooldown over, value still >= threshold-->  raised
//! raised --value < threshold-->                        quiet
//! ```
//!
//! Each arrow calls the callback. As in ranch (`ranch_conns_sup.erl`), with a notice when it is
//! over.

use super::core::Core;
use super::os::Os;
use super::panic_guard::PanicGuard;
use super::shared_cap::Bounds;
use std::mem;
use std::time::Duration;

use crate::alarm::{Alarm, AlarmInfo};
use crate::error::{Error, Result};
use crate::handler::AlarmCallback;
use crate::id::AlarmId;
use crate::proto::Time;

/// An alarm and its state.
struct Watched<A> {
    id: AlarmId,
    alarm: Alarm,
    cooldown: Duration,
    /// RLIMIT_NOFILE when the alarm was set.
    descriptors: Option<usize>,
    /// `None` while it runs.
    callback: Option<AlarmCallback<A>>,
    /// While it is raised: since when.
    raised_at: Option<Time>,
    last_fired: Option<Time>,
}

impl<A> Watched<A> {
    /// When the callback is due for this value.
    fn due(&self, value: usize, threshold: usize) -> Time {
        if value >= threshold {
            self.last_fired
                .map_or(Time::ZERO, |at| at.after(self.cooldown))
        } else if self.raised_at.is_some() {
            Time::ZERO
        } else {
            Time::NEVER
        }
    }

    fn threshold<O: Os>(&self, core: &Core<O>) -> usize {
        self.alarm
            .threshold(self.alarm.limit(&core.config, self.descriptors))
    }
}

/// All alarms of one server.
pub(super) struct Alarms<A> {
    all: Vec<Watched<A>>,
    next_id: u32,
}

impl<A> Default for Alarms<A> {
    fn default() -> Self {
        Self {
            all: Vec::new(),
            next_id: 0,
        }
    }
}

impl<A> Alarms<A> {
    pub(super) fn add<O: Os>(
        &mut self,
        core: &Core<O>,
        alarm: Alarm,
        cooldown: Duration,
        callback: AlarmCallback<A>,
    ) -> Result<AlarmId> {
        let descriptors = core.os.descriptor_limit();
        alarm.check(alarm.limit(&core.config, descriptors), cooldown)?;
        let id = AlarmId(self.next_id, core.conns.server());
        self.next_id = self.next_id.wrapping_add(1);
        self.all.push(Watched {
            id,
            alarm,
            cooldown,
            descriptors,
            callback: Some(callback),
            raised_at: None,
            last_fired: None,
        });
        Ok(id)
    }

    pub(super) fn set<O: Os>(
        &mut self,
        core: &Core<O>,
        id: AlarmId,
        alarm: Alarm,
        cooldown: Duration,
    ) -> Result<()> {
        let descriptors = core.os.descriptor_limit();
        alarm.check(alarm.limit(&core.config, descriptors), cooldown)?;
        let found = self.all.iter_mut().find(|watched| watched.id == id);
        let watched = found.ok_or(Error::NoAlarm { alarm: id })?;
        if mem::discriminant(&watched.alarm) != mem::discriminant(&alarm) {
            watched.raised_at = None;
            watched.last_fired = None;
        }
        watched.alarm = alarm;
        watched.cooldown = cooldown;
        watched.descriptors = descriptors;
        Ok(())
    }

    pub(super) fn remove(&mut self, guard: &mut PanicGuard, id: AlarmId) -> bool {
        let Some(at) = self.all.iter().position(|watched| watched.id == id) else {
            return false;
        };
        let watched = self.all.remove(at);
        guard.drop("an alarm's destructor", watched);
        true
    }

    pub(super) fn infos<O: Os>(&self, core: &Core<O>) -> Vec<AlarmInfo> {
        let now = core.os.now();
        let infos = self.all.iter().map(|watched| AlarmInfo {
            id: watched.id,
            alarm: watched.alarm,
            cooldown: watched.cooldown,
            raised: watched.raised_at.is_some(),
            value: value(core, watched.alarm),
            threshold: watched.threshold(core),
            since: watched
                .raised_at
                .map_or(Duration::ZERO, |raised| now.since(raised)),
        });
        infos.collect()
    }

    /// When the next callback is due, if no value changes until then.
    pub(super) fn due<O: Os>(&self, core: &Core<O>) -> Time {
        let due =
            |watched: &Watched<A>| watched.due(value(core, watched.alarm), watched.threshold(core));
        self.all.iter().map(due).fold(Time::NEVER, Time::min)
    }

    /// The ranges within which no alarm is due that watches all servers with the same cap. `None`
    /// without such an alarm.
    pub(super) fn bounds<O: Os>(&self, core: &Core<O>) -> Option<Bounds> {
        let mut bounds = Bounds {
            connections: (0, usize::MAX),
            descriptors: (0, usize::MAX),
        };
        let mut is_any = false;
        for watched in &self.all {
            let (least, most) = match watched.alarm {
                Alarm::Connections(_) => &mut bounds.connections,
                Alarm::Descriptors(_) => &mut bounds.descriptors,
                Alarm::Memory(_) | Alarm::FdExhaustion => continue,
            };
            is_any = true;
            let threshold = watched.threshold(core);
            if watched.raised_at.is_some() {
                *least = threshold.max(*least);
            } else if value(core, watched.alarm) < threshold {
                *most = threshold.min(*most);
            }
        }
        is_any.then_some(bounds)
    }

    pub(super) fn len(&self) -> usize {
        self.all.len()
    }

    /// The notice and the callback of the alarm at `at`, if it is due.
    pub(super) fn take_due<O: Os>(
        &mut self,
        core: &Core<O>,
        at: usize,
    ) -> Option<(AlarmInfo, AlarmCallback<A>)> {
        let watched = self.all.get_mut(at)?;
        let (value, threshold) = (value(core, watched.alarm), watched.threshold(core));
        let now = core.now;
        if watched.due(value, threshold) > now {
            return None;
        }
        let since = now.since(watched.raised_at.unwrap_or(now));
        let raised = value >= threshold;
        if raised {
            watched.raised_at.get_or_insert(now);
            watched.last_fired = Some(now);
        } else {
            watched.raised_at = None;
        }
        let notice = AlarmInfo {
            id: watched.id,
            alarm: watched.alarm,
            cooldown: watched.cooldown,
            raised,
            value,
            threshold,
            since,
        };
        Some((notice, watched.callback.take()?))
    }

    /// Returns a callback that has run, unless its alarm was removed meanwhile.
    pub(super) fn restore(
        &mut self,
        guard: &mut PanicGuard,
        id: AlarmId,
        callback: AlarmCallback<A>,
    ) {
        match self.all.iter_mut().find(|watched| watched.id == id) {
            Some(watched) => watched.callback = Some(callback),
            None => guard.drop("an alarm's destructor", callback),
        }
    }

    pub(super) fn clear(&mut self, guard: &mut PanicGuard) {
        for watched in mem::take(&mut self.all) {
            guard.drop("an alarm's destructor", watched);
        }
    }
}

fn value<O: Os>(core: &Core<O>, alarm: Alarm) -> usize {
    match alarm {
        Alarm::Connections(_) => core.conns.under_cap(),
        Alarm::Descriptors(_) => core.conns.shared_descriptors(core.open_descriptors()),
        Alarm::Memory(_) => core.memory.total(),
        Alarm::FdExhaustion => core.admission.fds.failures(),
    }
}
