//! The clock: the only room that reads it.

use std::time::Duration;
#[cfg(not(any(target_os = "linux", target_os = "android")))]
use std::time::Instant;

use crate::proto::Time;

/// Very long sleeps are cut, which costs a wake-up a day.
pub(super) const LONGEST_SLEEP: Duration = Duration::from_secs(24 * 60 * 60);

/// A server's clock. It begins when it is made and never goes back.
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

/// What `std::time::Instant` reads, as one number: a connection's turn costs a reading, and two of `Instant`'s two numbers take longer to
/// subtract than to read.
#[cfg(any(target_os = "linux", target_os = "android"))]
#[inline]
fn monotonic() -> u64 {
    use nix::time::{clock_gettime, ClockId};
    // Without a clock (`clock_gettime(2)` knows no other error here) time would stand.
    clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(0, |now| {
        let seconds = u64::try_from(now.tv_sec()).unwrap_or(0);
        seconds.saturating_mul(1_000_000_000) + now.tv_nsec() as u64
    })
}

#[cfg(not(any(target_os = "linux", target_os = "android")))]
fn monotonic() -> u64 {
    use std::sync::OnceLock;
    static EPOCH: OnceLock<Instant> = OnceLock::new();
    let elapsed = EPOCH.get_or_init(Instant::now).elapsed();
    u64::try_from(elapsed.as_nanos()).unwrap_or(u64::MAX)
}
