//! Token buckets: how much may pass in how much time, in one number per bucket.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use crate::error::Error;
use crate::proto::time::Time;

/// Number of units per second, and number of units at once.
///
/// A token bucket that is full at first: `burst` units may pass at once, and `per_second` more in
/// every second after. Both are at least 1; 0 is an error of the option. Exact: of a burst of five
/// the fifth is admitted and the sixth is not.
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
    /// Allows `units` per second, and `units` at once.
    #[must_use]
    pub fn per_second(units: u64) -> Self {
        Self {
            per_second: units,
            burst: units,
        }
    }

    /// Sets the number of units that may pass at once. Defaults to the number per second.
    #[must_use]
    pub fn burst(mut self, units: u64) -> Self {
        self.burst = units;
        self
    }

    fn read(text: &str) -> Option<Self> {
        let (rate, burst) = match text.split_once(" burst ") {
            Some((rate, burst)) => (rate, Some(burst.parse().ok()?)),
            None => (text, None),
        };
        let per_second = rate.strip_suffix("/s")?.parse().ok()?;
        Some(Self {
            per_second,
            burst: burst.unwrap_or(per_second),
        })
    }

    /// Returns the fault of a rate that admits nothing.
    pub(crate) fn problem(&self) -> Option<&'static str> {
        match self {
            Self { per_second: 0, .. } => {
                Some("0 per second would admit nothing for ever; use at least 1")
            }
            Self { burst: 0, .. } => {
                Some("a burst of 0 would admit nothing at all; use at least 1")
            }
            _ => None,
        }
    }

    /// Returns how many units are worth a wake-up: those of a small part of a second.
    pub(crate) fn part(&self) -> u64 {
        const PARTS: u64 = 32;
        (self.per_second / PARTS).clamp(1, self.burst.max(1))
    }

    /// Returns the time in which `units` may pass, rounded up: never faster than configured.
    fn time_for(&self, units: u64) -> Duration {
        let nanos =
            (u128::from(units) * 1_000_000_000).div_ceil(u128::from(self.per_second.max(1)));
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }
}

/// Prints `100/s`, or `100/s burst 20`.
impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/s", self.per_second)?;
        match self.burst == self.per_second {
            true => Ok(()),
            false => write!(f, " burst {}", self.burst),
        }
    }
}

/// Reads `100/s`, or `100/s burst 20`.
impl FromStr for Rate {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let unreadable = || {
            let problem = format!("{text:?} is no rate (as in 100/s or 100/s burst 20)");
            Error::option("rate", problem)
        };
        let rate = Self::read(text).ok_or_else(unreadable)?;
        match rate.problem() {
            Some(problem) => Err(Error::option("rate", problem)),
            None => Ok(rate),
        }
    }
}

/// A bucket, as the time at which it will be full (the generic cell rate algorithm, ITU-T I.371).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Bucket {
    full_at: Time,
}

impl Default for Bucket {
    /// A full bucket.
    fn default() -> Self {
        Self {
            full_at: Time::ZERO,
        }
    }
}

impl Bucket {
    /// Takes one unit if one is available.
    pub(crate) fn take(&mut self, rate: &Rate, now: Time) -> bool {
        let admits = self.ready_at(rate) <= now;
        if admits {
            self.charge(rate, 1, now);
        }
        admits
    }

    /// Takes `units`, available or not: they have passed already.
    pub(crate) fn charge(&mut self, rate: &Rate, units: u64, now: Time) {
        self.full_at = self.full_at.max(now).after(rate.time_for(units));
    }

    /// Returns the time from which at least one unit is available.
    pub(crate) fn ready_at(&self, rate: &Rate) -> Time {
        self.ready_for(rate, 1)
    }

    /// Returns the time from which `units` are available, if they ever are.
    fn ready_for(&self, rate: &Rate, units: u64) -> Time {
        let slack = rate.time_for(rate.burst.saturating_sub(units));
        Time::ZERO.after(self.full_at.since(Time::ZERO.after(slack)))
    }

    /// Returns the time from which units worth a wake-up are available.
    pub(crate) fn worth_asking_at(&self, rate: &Rate) -> Time {
        self.ready_for(rate, rate.part())
    }

    /// Gives back `units` that were charged and not used.
    pub(crate) fn give_back(&mut self, rate: &Rate, units: u64) {
        let full_at = self.full_at.since(Time::ZERO.after(rate.time_for(units)));
        self.full_at = Time::ZERO.after(full_at);
    }

    /// Follows a changed rate: the bucket is empty at most.
    ///
    /// In the time of the new rate the units spent under the old one may be a debt of hours.
    pub(crate) fn follow(&mut self, rate: &Rate, now: Time) {
        self.full_at = self.full_at.min(now.after(rate.time_for(rate.burst)));
    }

    /// Returns how many units are available.
    pub(crate) fn available(&self, rate: &Rate, now: Time) -> u64 {
        if self.ready_at(rate) > now {
            return 0;
        }
        let slack = rate.time_for(rate.burst);
        let left = slack.saturating_sub(self.full_at.since(now));
        let units = left.as_nanos() * u128::from(rate.per_second) / 1_000_000_000;
        u64::try_from(units)
            .unwrap_or(u64::MAX)
            .clamp(1, rate.burst.max(1))
    }

    /// Returns the time at which the units taken so far are covered.
    pub(crate) fn settled_at(&self, rate: &Rate) -> Time {
        self.ready_for(rate, 0)
    }

    /// True if the bucket is as full as one that was never used.
    pub(crate) fn is_full(&self, now: Time) -> bool {
        self.full_at <= now
    }
}

#[cfg(all(test, feature = "sim"))]
mod tests {
    use super::*;
    use crate::sim::Random;

    fn at(millis: u64) -> Time {
        Time::from_start(Duration::from_millis(millis))
    }

    /// Returns how many of `count` units are admitted at `now`.
    fn admitted(bucket: &mut Bucket, rate: &Rate, now: Time, count: usize) -> usize {
        (0..count).filter(|_| bucket.take(rate, now)).count()
    }

    /// A burst of five admits exactly five, as was wrong in EMQX (issue 18355).
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
    fn a_printed_rate_is_read_again() {
        for (text, rate) in [
            ("100/s", Rate::per_second(100)),
            ("100/s burst 20", Rate::per_second(100).burst(20)),
        ] {
            assert_eq!(text.parse::<Rate>().expect("a rate"), rate);
            assert_eq!(rate.to_string(), text);
        }
        for text in [
            "",
            "100",
            "/s",
            "-1/s",
            "100/s burst",
            "100/s burst x",
            "1e3/s",
        ] {
            let error = text.parse::<Rate>().expect_err("no rate").to_string();
            let problem = "is no rate (as in 100/s or 100/s burst 20)";
            assert_eq!(error, format!("option rate: {text:?} {problem}"));
        }
        for text in ["0/s", "1/s burst 0"] {
            let error = text
                .parse::<Rate>()
                .expect_err("nothing passes")
                .to_string();
            assert!(error.contains("use at least 1"), "{error}");
        }
    }

    #[test]
    fn then_one_passes_each_interval() {
        let rate = Rate::per_second(10).burst(3);
        let mut bucket = Bucket::default();
        assert_eq!(admitted(&mut bucket, &rate, at(1000), 9), 3);
        assert_eq!(bucket.ready_at(&rate), at(1100));
        assert_eq!(admitted(&mut bucket, &rate, at(1099), 9), 0);
        assert_eq!(admitted(&mut bucket, &rate, at(1100), 9), 1);
        assert_eq!(admitted(&mut bucket, &rate, at(1350), 9), 2);
        // The bucket fills up to the burst and no further.
        assert_eq!(admitted(&mut bucket, &rate, at(100_000), 9), 3);
    }

    /// Units are available exactly from the time that `ready_at` returns.
    #[test]
    fn units_are_available_exactly_when_ready() {
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

    /// A third of a second is no whole number of nanoseconds: the next unit comes after it.
    #[test]
    fn parts_of_a_nanosecond_are_rounded_up() {
        let rate = Rate::per_second(3).burst(1);
        let mut bucket = Bucket::default();
        assert!(bucket.take(&rate, at(0)));
        assert_eq!(
            bucket.ready_at(&rate),
            Time::from_start(Duration::from_nanos(333_333_334))
        );
    }

    /// A frame that is larger than the burst passes, and the next one waits for it.
    #[test]
    fn a_debt_delays_the_next_unit() {
        let rate = Rate::per_second(1000).burst(10);
        let mut bucket = Bucket::default();
        bucket.charge(&rate, 500, at(1000));
        // 10 were available, 490 are missing, and one must be available again.
        assert_eq!(bucket.ready_at(&rate), at(1000 + 491));
        assert!(!bucket.is_full(at(1499)) && bucket.is_full(at(1500)));
    }

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
        assert!(
            Rate::per_second(0).problem().is_some()
                && Rate::per_second(1).burst(0).problem().is_some()
        );
    }

    /// In any span of time at most the burst passes, and what the rate allows for the span.
    #[test]
    fn never_more_than_configured() {
        for seed in 0..256 {
            let mut random = Random::new(seed);
            let (per_second, burst) =
                (random.between(1, 4999) as u64, random.between(1, 49) as u64);
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
