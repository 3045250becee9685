//! Processor time of a loop's iterations.

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use nix::time::{clock_gettime, ClockId};

use crate::common::process::commands;

/// The iterations since the last report.
#[derive(Clone, Default)]
pub struct Turns(Arc<Mutex<Vec<Duration>>>);

impl Turns {
    /// At each command of the parent, prints the median, the 99th percentile and the maximum in
    /// nanoseconds, and starts again.
    pub fn reporting() -> Self {
        let turns = Self::default();
        let reported = turns.clone();
        commands(move |_| {
            let mut all = std::mem::take(&mut *reported.lock());
            all.sort_unstable();
            let at = |part: f64| {
                let index = (part * all.len().saturating_sub(1) as f64).round() as usize;
                all.get(index).copied().unwrap_or_default().as_nanos()
            };
            println!("{} {} {}", at(0.5), at(0.99), at(1.0));
        });
        turns
    }

    pub fn note(&self, time: Duration) {
        self.lock().push(time);
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Duration>> {
        self.0.lock().expect("no panic")
    }
}

/// Of this thread.
pub fn processor_time() -> Duration {
    let clock = ClockId::CLOCK_THREAD_CPUTIME_ID;
    clock_gettime(clock).expect("a clock").into()
}
