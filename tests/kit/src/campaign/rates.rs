//! No more are let in than a rate allows: a bucket of our own, looked at between turns.

use super::rules::Speed;

/// At least as much as the server's bucket can hold.
#[derive(Debug, Default)]
pub struct Meter {
    speed: Option<Speed>,
    /// In parts of a client, as many as a second has nanoseconds.
    level: u128,
    now: u128,
    /// Clients let in so far.
    count: u64,
}

const ONE: u128 = 1_000_000_000;

impl Meter {
    /// Starts anew with this rate, as if no client had come before.
    pub fn set(&mut self, speed: Option<Speed>) {
        self.speed = speed;
        self.level = speed.map_or(0, |(_, burst)| u128::from(burst) * ONE);
    }

    /// So many have been let in until now.
    pub fn check(&mut self, now: std::time::Duration, count: u64) -> Result<(), String> {
        let before = std::mem::replace(&mut self.now, now.as_nanos());
        let more = count.saturating_sub(std::mem::replace(&mut self.count, count));
        let Some((per_second, burst)) = self.speed else {
            return Ok(());
        };
        let there = self.level + (self.now - before) * u128::from(per_second);
        let left = there.checked_sub(u128::from(more) * ONE).ok_or_else(|| {
            format!("{more} more are let in at {now:?}, with {per_second} per second and {burst} at once")
        })?;
        self.level = left.min(u128::from(burst) * ONE);
        Ok(())
    }
}
