//! The application's code that belongs to no connection: callbacks of descriptors, timers and
//! alarms that are due.

use super::inner::Inner;
use super::os::Os;
use crate::catch::catch;
use crate::handler::Control;

/// Calls the callbacks of descriptors that had an event. Of one that has another meanwhile it is
/// called again in the next iteration.
#[inline]
pub(super) fn run_watches<A, O: Os>(inner: &mut Inner<A, O>, app: &mut A) {
    if inner.user.watches.has_ready() {
        run_ready_watches(inner, app);
    }
}

#[cold]
fn run_ready_watches<A, O: Os>(inner: &mut Inner<A, O>, app: &mut A) {
    inner.core.begin_stage();
    for _ in 0..inner.user.watches.ready_len() {
        if !inner.core.has_work_left() {
            return;
        }
        let Some((id, mut watched)) = inner.user.watches.take_ready() else {
            return;
        };
        inner.run_job(app, "a descriptor's callback", |app, control| {
            watched.call(app, control);
        });
        let Inner { core, user } = inner;
        let removed = user.watches.restore(id, watched);
        let ended = removed.as_ref();
        if let Some(descriptor) = ended.and_then(|one| user.watches.take_ended(id, one)) {
            core.os.unwatch(descriptor);
        }
        core.guard.drop("a descriptor's callback", removed);
    }
}

/// Runs the application's jobs whose times have come. One that is set meanwhile waits for the next
/// iteration.
#[inline]
pub(super) fn run_timers<A, O: Os>(inner: &mut Inner<A, O>, app: &mut A) {
    if inner.user.timers.next() <= inner.core.now {
        run_due_timers(inner, app);
    }
}

#[cold]
fn run_due_timers<A, O: Os>(inner: &mut Inner<A, O>, app: &mut A) {
    let (due, count) = (inner.core.now, inner.user.timers.count());
    inner.core.begin_stage();
    while inner.core.has_work_left() {
        let Some(job) = inner.user.timers.take_due(due, count) else {
            return;
        };
        inner.run_job(app, "an application's timer", job);
    }
}

/// Calls the alarms that are due, each at most once.
pub(super) fn run_alarms<A, O: Os>(inner: &mut Inner<A, O>, app: &mut A) {
    // A callback may add and remove alarms: one that is missed is due in the next iteration.
    for at in 0..inner.user.alarms.len() {
        inner.core.refresh();
        inner.core.conns.offer_room();
        let Inner { core, user } = inner;
        let Some((notice, mut callback)) = user.alarms.take_due(core, at) else {
            continue;
        };
        let called = catch(|| callback(app, &mut Control::new(inner), &notice));
        let Inner { core, user } = inner;
        if let Err(panic) = called {
            core.guard.report("an alarm's callback", panic, None);
        }
        user.alarms.restore(&mut core.guard, notice.id, callback);
        inner.touch_last_sent();
    }
}
