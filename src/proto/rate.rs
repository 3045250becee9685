//! How much may pass in how much time: one number per bucket.

use std::time::Duration;

use super::Time;

/// So much per second, and how much of it may come at once.
///
/// A token bucket that is full at first: `burst` may come at once, and `per_second` more in every second after. Exact:
/// of a burst of five the fifth is admitted and the sixth is not.
///
/// ```
/// use portcullis::Rate;
/// let rate = Rate::per_second(100).burst(20);
/// # let _ = rate;
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Rate {
    per_second: u64,
    burst: u64,
}

impl Rate {
    /// So much per second, and as much at once.
    #[must_use]
    pub fn per_second(units: u64) -> Self {
        Self {
            per_second: units,
            burst: units,
        }
    }

    /// The most at once. Defaults to what may come in a second.
    #[must_use]
    pub fn burst(mut self, units: u64) -> Self {
        self.burst = units;
        self
    }

    /// What is wrong with it, if something is.
    pub(crate) fn problem(&self) -> Option<&'static str> {
        match self {
            Self { per_second: 0, .. } => Some("0 per second would admit nothing for ever; use at least 1"),
            Self { burst: 0, .. } => Some("a burst of 0 would admit nothing at all; use at least 1"),
            _ => None,
        }
    }

    /// What is worth waiting for, so that it does not come in crumbs: a small part of a second.
    pub(crate) fn part(&self) -> u64 {
        const PARTS: u64 = 32;
        (self.per_second / PARTS).clamp(1, self.burst.max(1))
    }

    /// In how much time so much is allowed, rounded up: never faster than was said.
    fn time_for(&self, units: u64) -> Duration {
        let nanos = (u128::from(units) * 1_000_000_000).div_ceil(u128::from(self.per_second.max(1)));
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }
}

/// A bucket, as the time at which it will be full (the generic cell rate algorithm, ITU-T I.371).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Bucket {
    full_at: Time,
}

impl Default for Bucket {
    /// Full.
    fn default() -> Self {
        Self { full_at: Time::ZERO }
    }
}

impl Bucket {
    /// Takes one unit if there is one.
    pub(crate) fn take(&mut self, rate: &Rate, now: Time) -> bool {
        let admits = self.ready_at(rate) <= now;
        if admits {
            self.charge(rate, 1, now);
        }
        admits
    }

    /// Takes so much, whether it is there or not: what has come has come.
    pub(crate) fn charge(&mut self, rate: &Rate, units: u64, now: Time) {
        self.full_at = self.full_at.max(now).after(rate.time_for(units));
    }

    /// From when on there is at least one unit.
    pub(crate) fn ready_at(&self, rate: &Rate) -> Time {
        self.ready_for(rate, 1)
    }

    /// From when on so much is there, if it ever is.
    fn ready_for(&self, rate: &Rate, units: u64) -> Time {
        let slack = rate.time_for(rate.burst.saturating_sub(units));
        Time::ZERO.after(self.full_at.since(Time::ZERO.after(slack)))
    }

    /// When it is worth asking again, once it is empty.
    pub(crate) fn worth_asking_at(&self, rate: &Rate) -> Time {
        self.ready_for(rate, rate.part())
    }

    /// So much was charged and is not used.
    pub(crate) fn give_back(&mut self, rate: &Rate, units: u64) {
        self.full_at = Time::ZERO.after(self.full_at.since(Time::ZERO.after(rate.time_for(units))));
    }

    /// The rate is another one from now on. What was spent under the old one leaves it empty at the most: in the time of the
    /// new one it may be a debt of hours.
    pub(crate) fn follow(&mut self, rate: &Rate, now: Time) {
        self.full_at = self.full_at.min(now.after(rate.time_for(rate.burst)));
    }

    /// How much is there.
    pub(crate) fn available(&self, rate: &Rate, now: Time) -> u64 {
        if self.ready_at(rate) > now {
            return 0;
        }
        let slack = rate.time_for(rate.burst);
        let left = slack.saturating_sub(self.full_at.since(now));
        let units = left.as_nanos() * u128::from(rate.per_second) / 1_000_000_000;
        u64::try_from(units).unwrap_or(u64::MAX).clamp(1, rate.burst.max(1))
    }

    /// When what has been taken will have been there.
    pub(crate) fn settled_at(&self, rate: &Rate) -> Time {
        self.ready_for(rate, 0)
    }

    /// It is full, as if nobody had ever taken anything.
    pub(crate) fn is_full(&self, now: Time) -> bool {
        self.full_at <= now
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sim::Random;

    fn at(millis: u64) -> Time {
        Time::from_start(Duration::from_millis(millis))
    }

    /// How many of `count` are admitted at this time.
    fn admitted(bucket: &mut Bucket, rate: &Rate, now: Time, count: usize) -> usize {
        (0..count).filter(|_| bucket.take(rate, now)).count()
    }

    /// emqx #18355: a capacity of five admits five.
    #[test]
    fn the_burst_is_exact() {
        for burst in [1, 2, 5, 1000] {
            let rate = Rate::per_second(10).burst(burst);
            let mut bucket = Bucket::default();
            for now in [0, 7_000_000] {
                assert_eq!(
                    admitted(&mut bucket, &rate, at(now), 2000),
                    burst as usize,
                    "burst {burst} at {now} ms"
                );
            }
        }
    }

    #[test]
    fn then_one_comes_each_interval() {
        let rate = Rate::per_second(10).burst(3);
        let mut bucket = Bucket::default();
        assert_eq!(admitted(&mut bucket, &rate, at(1000), 9), 3);
        assert_eq!(bucket.ready_at(&rate), at(1100));
        assert_eq!(admitted(&mut bucket, &rate, at(1099), 9), 0);
        assert_eq!(admitted(&mut bucket, &rate, at(1100), 9), 1);
        assert_eq!(admitted(&mut bucket, &rate, at(1350), 9), 2);
        // Saved up, and never more than the burst.
        assert_eq!(admitted(&mut bucket, &rate, at(100_000), 9), 3);
    }

    /// What is there and when there is something are two views of one number.
    #[test]
    fn there_is_something_exactly_when_it_is_ready() {
        for rate in [
            Rate::per_second(3).burst(5),
            Rate::per_second(7).burst(1),
            Rate::per_second(1_000_000).burst(100),
        ] {
            let mut bucket = Bucket::default();
            for now in (0..4000).map(at) {
                assert_eq!(
                    bucket.available(&rate, now) > 0,
                    bucket.ready_at(&rate) <= now,
                    "{rate:?}"
                );
                if bucket.take(&rate, now) {
                    bucket.charge(&rate, bucket.available(&rate, now) / 2, now);
                }
            }
        }
    }

    /// A third of a second is not a whole number of nanoseconds: the next comes after it, never before.
    #[test]
    fn parts_of_a_nanosecond_are_waited_for() {
        let rate = Rate::per_second(3).burst(1);
        let mut bucket = Bucket::default();
        assert!(bucket.take(&rate, at(0)));
        assert_eq!(
            bucket.ready_at(&rate),
            Time::from_start(Duration::from_nanos(333_333_334))
        );
    }

    /// A frame that is larger than the burst passes, and is paid for afterwards.
    #[test]
    fn a_debt_is_waited_for() {
        let rate = Rate::per_second(1000).burst(10);
        let mut bucket = Bucket::default();
        bucket.charge(&rate, 500, at(1000));
        // 10 were there, 490 are owed, and one unit must be there again.
        assert_eq!(bucket.ready_at(&rate), at(1000 + 491));
        assert!(!bucket.is_full(at(1499)) && bucket.is_full(at(1500)));
    }

    /// esockd: t_check_bignum.
    #[test]
    fn the_largest_numbers_do_not_wrap() {
        for rate in [
            Rate::per_second(u64::MAX),
            Rate::per_second(1).burst(u64::MAX),
            Rate::per_second(u64::MAX).burst(1),
        ] {
            let mut bucket = Bucket::default();
            assert!(bucket.take(&rate, at(5)));
            bucket.charge(&rate, u64::MAX, at(5));
            let _ = bucket.ready_at(&rate);
        }
        assert!(Rate::per_second(0).problem().is_some() && Rate::per_second(1).burst(0).problem().is_some());
    }

    /// In no stretch of time does more pass than the burst and what the rate allows for it.
    #[test]
    fn never_more_than_was_said() {
        for seed in 0..256 {
            let mut random = Random::new(seed);
            let (per_second, burst) = (random.between(1, 4999) as u64, random.between(1, 49) as u64);
            let rate = Rate::per_second(per_second).burst(burst);
            let mut bucket = Bucket::default();
            let (mut now, mut all) = (0, Vec::new());
            for _ in 0..random.between(1, 59) {
                now += random.below(300) as u64;
                let count = random.between(1, 19);
                all.push((now, admitted(&mut bucket, &rate, at(now), count) as u64));
            }
            for from in 0..all.len() {
                let mut sum = 0;
                for &(until, count) in &all[from..] {
                    sum += count;
                    let span = until - all[from].0;
                    let most = burst + span * per_second / 1000;
                    assert!(sum <= most, "seed {seed}: {sum} in {span} ms");
                }
            }
        }
    }
}
