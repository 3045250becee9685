//! The clock: the only module that reads it.

use std::time::Duration;
#[cfg(not(any(target_os = "linux", target_os = "android")))]
use std::time::Instant;

use crate::proto::Time;

/// Limit on the length of a sleep, which costs a wake-up a day.
pub(super) const LONGEST_SLEEP: Duration = Duration::from_secs(24 * 60 * 60);

/// A server's clock. It starts when it is made and never goes back.
pub(super) struct Clock {
    start: u64,
}

impl Clock {
    pub(super) fn new() -> Self {
        Self { start: monotonic() }
    }

    #[inline]
    pub(super) fn now(&self) -> Time {
        Time::from_nanos(monotonic().saturating_sub(self.start))
    }
}

/// The time without a server's clock, for code outside of its loop.
pub(super) fn now() -> Time {
    Time::from_nanos(monotonic())
}

/// The time of [`Instant`] as one number. A connection's turn costs a reading, and subtracting two
/// pairs of `Instant` takes longer than the reading.
///
/// The one call of nix's function: so the compiler takes that in, and no result goes through memory.
#[cfg(any(target_os = "linux", target_os = "android"))]
#[inline(never)]
fn monotonic() -> u64 {
    use nix::time::{clock_gettime, ClockId};
    // Without a clock (`clock_gettime(2)` has no other error here) time would stand still.
    clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(0, |now| {
        // Seconds since the system started: neither negative nor large.
        let seconds = now.tv_sec() as u64;
        seconds.wrapping_mul(1_000_000_000) + now.tv_nsec() as u64
    })
}

#[cfg(not(any(target_os = "linux", target_os = "android")))]
fn monotonic() -> u64 {
    use std::sync::OnceLock;
    static EPOCH: OnceLock<Instant> = OnceLock::new();
    let elapsed = EPOCH.get_or_init(Instant::now).elapsed();
    u64::try_from(elapsed.as_nanos()).unwrap_or(u64::MAX)
}
