//! How fast a connection may bring bytes and frames: its own rates, and those of all connections of its listener together.

use std::cell::Cell;
use std::rc::Rc;

use super::rate::{Bucket, Rate};
use super::{Limits, Machine, Time};

/// The most bytes that a connection takes at once from a rate that it shares, when it has waited for its turn.
const BYTES_AT_ONCE: u64 = 16 * 1024;

/// What the connections of one listener share.
#[derive(Clone, Debug, Default)]
pub(crate) struct SharedMeters {
    bytes: Option<Rc<SharedMeter>>,
    frames: Option<Rc<SharedMeter>>,
}

#[derive(Debug)]
struct SharedMeter {
    /// `None` once there was one and is none any more.
    rate: Cell<Option<Rate>>,
    bucket: Cell<Bucket>,
}

impl SharedMeters {
    /// Follows the listener's options: connections that share a meter see a change of its rate. True if there is one: who
    /// waits is to ask again.
    pub(crate) fn follow(&mut self, limits: &Limits, now: Time) -> bool {
        let mut changed = false;
        for (meter, rate) in [
            (&mut self.bytes, limits.total_read_rate),
            (&mut self.frames, limits.total_frame_rate),
        ] {
            match (&meter, rate) {
                (Some(meter), rate) => changed |= meter.follow(rate, now),
                (None, None) => {}
                (None, rate) => {
                    *meter = Some(Rc::new(SharedMeter {
                        rate: Cell::new(rate),
                        bucket: Cell::default(),
                    }));
                }
            }
        }
        changed
    }
}

impl SharedMeter {
    fn follow(&self, rate: Option<Rate>, now: Time) -> bool {
        let changed = self.rate.replace(rate) != rate;
        if let (Some(rate), true) = (rate, changed) {
            self.change(|bucket| bucket.follow(&rate, now));
        }
        changed
    }

    fn change(&self, change: impl FnOnce(&mut Bucket)) {
        let mut bucket = self.bucket.get();
        change(&mut bucket);
        self.bucket.set(bucket);
    }
}

/// The rates of one connection.
#[derive(Debug)]
pub(super) struct Throttle {
    bytes: Meter,
    frames: Meter,
    /// Nothing is read and delivered before, while the connection is throttled.
    pub(super) until: Time,
}

impl Throttle {
    /// `None` where nothing is limited.
    pub(super) fn new(limits: &Limits, shared: &SharedMeters) -> Option<Box<Self>> {
        let limited = limits.read_rate.is_some()
            || limits.frame_rate.is_some()
            || shared.bytes.is_some()
            || shared.frames.is_some();
        limited.then(|| {
            Box::new(Self {
                bytes: Meter::new(limits.read_rate, shared.bytes.clone(), BYTES_AT_ONCE),
                frames: Meter::new(limits.frame_rate, shared.frames.clone(), 1),
                until: Time::NEVER,
            })
        })
    }

    /// How many bytes may be read now.
    pub(super) fn bytes(&mut self, now: Time) -> Result<u64, Time> {
        self.bytes.ask(now)
    }

    pub(super) fn charge_bytes(&mut self, count: u64, now: Time) {
        self.bytes.charge(count, now);
    }

    /// Whether a frame may be delivered now.
    pub(super) fn frame(&mut self, now: Time) -> Result<(), Time> {
        self.frames.ask(now).map(drop)
    }

    pub(super) fn charge_frame(&mut self, now: Time) {
        self.frames.charge(1, now);
    }

    /// A rate that it shares is another: what was booked under the old one is void.
    pub(super) fn recheck_rates(&mut self, now: Time) {
        self.bytes.credit = 0;
        self.frames.credit = 0;
        self.until = self.until.min(now);
    }
}

impl Machine {
    #[cold]
    pub(super) fn charge(&mut self, bytes: usize, now: Time) {
        if let Some(throttle) = &mut self.throttle {
            throttle.charge_bytes(bytes as u64, now);
        }
    }

    #[cold]
    pub(super) fn charge_frame(&mut self, now: Time) {
        if let Some(throttle) = &mut self.throttle {
            throttle.charge_frame(now);
        }
    }
}

#[derive(Debug)]
struct Meter {
    own: Option<(Rate, Bucket)>,
    shared: Option<Rc<SharedMeter>>,
    /// Taken from the shared bucket already.
    credit: u64,
    at_once: u64,
}

impl Meter {
    fn new(own: Option<Rate>, shared: Option<Rc<SharedMeter>>, at_once: u64) -> Self {
        Self {
            own: own.map(|rate| (rate, Bucket::default())),
            shared,
            credit: 0,
            at_once,
        }
    }

    /// How much may pass now, at least one; else when to ask again.
    ///
    /// Who finds the shared bucket empty books its part of what will come and asks again when that is there: connections
    /// get their turns in the order in which they asked, and are not all woken for one token.
    fn ask(&mut self, now: Time) -> Result<u64, Time> {
        let own = match &self.own {
            Some((rate, bucket)) => match bucket.available(rate, now) {
                0 => return Err(bucket.worth_asking_at(rate)),
                units => units,
            },
            None => u64::MAX,
        };
        let Some((shared, rate)) = self
            .shared
            .as_ref()
            .and_then(|shared| Some((shared, shared.rate.get()?)))
        else {
            return Ok(own);
        };
        if self.credit > 0 {
            return Ok(own.min(self.credit));
        }
        match shared.bucket.get().available(&rate, now) {
            0 => {
                self.credit = self.at_once.min(rate.part());
                shared.change(|bucket| bucket.charge(&rate, self.credit, now));
                Err(shared.bucket.get().settled_at(&rate))
            }
            units => Ok(own.min(units)),
        }
    }

    fn charge(&mut self, units: u64, now: Time) {
        if let Some((rate, bucket)) = &mut self.own {
            bucket.charge(rate, units, now);
        }
        let booked = units.min(self.credit);
        self.credit -= booked;
        if let (Some(shared), true) = (&self.shared, units > booked) {
            if let Some(rate) = shared.rate.get() {
                shared.change(|bucket| bucket.charge(&rate, units - booked, now));
            }
        }
    }
}

impl Drop for Meter {
    /// What is booked and not used is there for the others: who comes and goes must not spend it.
    fn drop(&mut self) {
        if let (Some(shared), 1..) = (&self.shared, self.credit) {
            if let Some(rate) = shared.rate.get() {
                shared.change(|bucket| bucket.give_back(&rate, self.credit));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn at(millis: u64) -> Time {
        Time::from_start(Duration::from_millis(millis))
    }

    fn meters(rate: Rate, count: usize) -> Vec<Meter> {
        let shared = Rc::new(SharedMeter {
            rate: Cell::new(Some(rate)),
            bucket: Cell::default(),
        });
        (0..count)
            .map(|_| Meter::new(None, Some(Rc::clone(&shared)), 1))
            .collect()
    }

    /// Ten connections that always want more, for ten seconds: each gets the same, and all together what was said.
    #[test]
    fn what_is_shared_is_shared_fairly() {
        let mut meters = meters(Rate::per_second(100).burst(5), 10);
        let (mut until, mut got) = ([Time::ZERO; 10], [0_u64; 10]);
        for now in (0..10_000).map(at) {
            for (place, meter) in meters.iter_mut().enumerate() {
                while until[place] <= now {
                    match meter.ask(now) {
                        Ok(_) => {
                            meter.charge(1, now);
                            got[place] += 1;
                        }
                        Err(later) => until[place] = later,
                    }
                }
            }
        }
        let all: u64 = got.iter().sum();
        assert!((990..=1005).contains(&all), "{got:?}");
        assert!(got.iter().all(|&count| (95..=106).contains(&count)), "{got:?}");
    }

    /// Nothing is booked twice, and what was booked is used first.
    #[test]
    fn what_was_booked_is_there_when_it_was_said() {
        let mut meters = meters(Rate::per_second(10).burst(1), 3);
        meters[0].charge(1, at(0));
        let when: Vec<_> = meters
            .iter_mut()
            .map(|meter| meter.ask(at(0)).expect_err("it is empty"))
            .collect();
        assert_eq!(when, [at(100), at(200), at(300)]);
        for (meter, when) in meters.iter_mut().zip(when) {
            assert_eq!(meter.ask(when), Ok(1));
            meter.charge(1, when);
            assert_eq!(meter.credit, 0);
        }
    }

    /// Who comes, books and goes has spent nothing.
    #[test]
    fn what_was_booked_and_not_used_is_given_back() {
        let mut meters = meters(Rate::per_second(10).burst(1), 100);
        meters[0].charge(1, at(0));
        for meter in meters.iter_mut().skip(1) {
            assert!(meter.ask(at(0)).is_err(), "it is empty");
        }
        meters.truncate(2);
        meters.swap_remove(1);
        assert_eq!(meters[0].ask(at(100)), Ok(1));
    }

    #[test]
    fn both_rates_hold() {
        let shared = SharedMeter {
            rate: Cell::new(Some(Rate::per_second(1000).burst(7))),
            bucket: Cell::default(),
        };
        let mut meter = Meter::new(Some(Rate::per_second(10).burst(9)), Some(Rc::new(shared)), 4);
        assert_eq!(meter.ask(at(0)), Ok(7));
        meter.charge(7, at(0));
        // The shared one is empty: four are booked, and are there in 4 ms.
        assert_eq!(meter.ask(at(0)), Err(at(4)));
        assert_eq!(meter.ask(at(4)), Ok(2), "of its own nine two are left");
        meter.charge(2, at(4));
        assert_eq!(meter.ask(at(4)), Err(at(100)));
        assert_eq!(meter.credit, 2);
    }
}
