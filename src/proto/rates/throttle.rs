//! The rates of one connection: its own, and those that the connections of its listener share.

use std::cell::Cell;
use std::rc::Rc;

use super::bucket::{Bucket, Rate};
use crate::proto::time::Time;

/// Bytes that a connection reserves of a shared rate at once, when it has waited for its turn.
const MAX_RESERVED: u64 = 16 * 1024;

/// The meters that the connections of one listener share.
#[derive(Clone, Debug, Default)]
pub(crate) struct SharedMeters {
    bytes: Option<Rc<SharedMeter>>,
    frames: Option<Rc<SharedMeter>>,
}

#[derive(Debug)]
struct SharedMeter {
    /// `None` once the rate was removed.
    rate: Cell<Option<Rate>>,
    bucket: Cell<Bucket>,
}

impl SharedMeters {
    /// Follows the listener's rates for bytes and frames.
    ///
    /// Connections that share a meter see the change. True if there is one: they must check their
    /// rates anew.
    pub(crate) fn follow(&mut self, bytes: Option<Rate>, frames: Option<Rate>, now: Time) -> bool {
        let mut changed = false;
        for (meter, rate) in [(&mut self.bytes, bytes), (&mut self.frames, frames)] {
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
pub(in crate::proto) struct Throttle {
    bytes: Meter,
    frames: Meter,
    /// Nothing is read and delivered before, while a rate pauses the connection.
    until: Time,
}

impl Throttle {
    /// Meters of a connection's own rates and the shared ones; `None` if nothing is limited.
    pub(in crate::proto) fn new(
        bytes: Option<Rate>,
        frames: Option<Rate>,
        shared: &SharedMeters,
    ) -> Option<Box<Self>> {
        let limited = bytes.is_some()
            || frames.is_some()
            || shared.bytes.is_some()
            || shared.frames.is_some();
        limited.then(|| {
            Box::new(Self {
                bytes: Meter::new(bytes, shared.bytes.clone(), MAX_RESERVED),
                frames: Meter::new(frames, shared.frames.clone(), 1),
                until: Time::NEVER,
            })
        })
    }

    /// Follows the connection's own rates. What was used up stays used up.
    pub(in crate::proto) fn follow(
        &mut self,
        bytes: Option<Rate>,
        frames: Option<Rate>,
        now: Time,
    ) {
        self.bytes.follow(bytes, now);
        self.frames.follow(frames, now);
        self.recheck_rates(now);
    }

    /// Returns how many bytes may be read now, or when to ask again.
    pub(in crate::proto) fn bytes(&mut self, now: Time) -> Result<u64, Time> {
        self.bytes.available(now)
    }

    pub(in crate::proto) fn charge_bytes(&mut self, count: u64, now: Time) {
        self.bytes.charge(count, now);
    }

    /// Returns whether a frame may be delivered now, or when to ask again.
    pub(in crate::proto) fn frame(&mut self, now: Time) -> Result<(), Time> {
        self.frames.available(now).map(drop)
    }

    pub(in crate::proto) fn charge_frame(&mut self, now: Time) {
        self.frames.charge(1, now);
    }

    pub(in crate::proto) fn pause_until(&mut self, until: Time) {
        self.until = until;
    }

    #[inline]
    pub(in crate::proto) fn until(&self) -> Time {
        self.until
    }

    /// Asks again at `now`: a shared rate has changed, and units reserved under the old one are
    /// void.
    pub(in crate::proto) fn recheck_rates(&mut self, now: Time) {
        self.bytes.reserved = 0;
        self.frames.reserved = 0;
        self.until = self.until.min(now);
    }
}

#[derive(Debug)]
struct Meter {
    own: Option<(Rate, Bucket)>,
    shared: Option<Rc<SharedMeter>>,
    /// Units taken from the shared bucket and not used yet.
    reserved: u64,
    max_reserved: u64,
}

impl Meter {
    fn new(own: Option<Rate>, shared: Option<Rc<SharedMeter>>, max_reserved: u64) -> Self {
        Self {
            own: own.map(|rate| (rate, Bucket::default())),
            shared,
            reserved: 0,
            max_reserved,
        }
    }

    fn follow(&mut self, rate: Option<Rate>, now: Time) {
        // The shared rate is as before: what is reserved of it is not lost.
        self.give_back();
        let bucket = self.own.take().map(|(_, bucket)| bucket);
        self.own = rate.map(|rate| {
            let mut bucket = bucket.unwrap_or_default();
            bucket.follow(&rate, now);
            (rate, bucket)
        });
    }

    /// Returns how many units may pass now, at least one; else when to ask again.
    ///
    /// A meter that finds the shared bucket empty reserves units of the future, and asks again when
    /// they are available. So connections pass in the order in which they asked, and one unit does
    /// not wake them all.
    fn available(&mut self, now: Time) -> Result<u64, Time> {
        let own = match &self.own {
            Some((rate, bucket)) => match bucket.available(rate, now) {
                0 => return Err(bucket.worth_asking_at(rate)),
                units => units,
            },
            None => u64::MAX,
        };
        let shared = self.shared.as_ref();
        let Some((shared, rate)) = shared.and_then(|shared| Some((shared, shared.rate.get()?)))
        else {
            return Ok(own);
        };
        if self.reserved > 0 {
            return Ok(own.min(self.reserved));
        }
        match shared.bucket.get().available(&rate, now) {
            0 => {
                self.reserved = self.max_reserved.min(rate.part());
                shared.change(|bucket| bucket.charge(&rate, self.reserved, now));
                Err(shared.bucket.get().settled_at(&rate))
            }
            units => Ok(own.min(units)),
        }
    }

    /// Gives reserved units back to the shared bucket.
    fn give_back(&mut self) {
        let reserved = std::mem::take(&mut self.reserved);
        if let (Some(shared), 1..) = (&self.shared, reserved) {
            if let Some(rate) = shared.rate.get() {
                shared.change(|bucket| bucket.give_back(&rate, reserved));
            }
        }
    }

    fn charge(&mut self, units: u64, now: Time) {
        if let Some((rate, bucket)) = &mut self.own {
            bucket.charge(rate, units, now);
        }
        let reserved = units.min(self.reserved);
        self.reserved -= reserved;
        if let (Some(shared), true) = (&self.shared, units > reserved) {
            if let Some(rate) = shared.rate.get() {
                shared.change(|bucket| bucket.charge(&rate, units - reserved, now));
            }
        }
    }
}

impl Drop for Meter {
    /// Connections that come and go must not spend reserved units.
    fn drop(&mut self) {
        self.give_back();
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

    /// Ten connections that always want more get the same for ten seconds, together the rate.
    #[test]
    fn a_shared_rate_is_shared_fairly() {
        let mut meters = meters(Rate::per_second(100).burst(5), 10);
        let (mut until, mut got) = ([Time::ZERO; 10], [0_u64; 10]);
        for now in (0..10_000).map(at) {
            for (place, meter) in meters.iter_mut().enumerate() {
                while until[place] <= now {
                    match meter.available(now) {
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
        assert!(
            got.iter().all(|&count| (95..=106).contains(&count)),
            "{got:?}"
        );
    }

    /// No unit is reserved twice, and reserved units are used first.
    #[test]
    fn reserved_units_are_available_in_time() {
        let mut meters = meters(Rate::per_second(10).burst(1), 3);
        meters[0].charge(1, at(0));
        let when: Vec<_> = meters
            .iter_mut()
            .map(|meter| meter.available(at(0)).expect_err("it is empty"))
            .collect();
        assert_eq!(when, [at(100), at(200), at(300)]);
        for (meter, when) in meters.iter_mut().zip(when) {
            assert_eq!(meter.available(when), Ok(1));
            meter.charge(1, when);
            assert_eq!(meter.reserved, 0);
        }
    }

    /// A connection that reserves units and ends has spent none.
    #[test]
    fn unused_reserved_units_are_given_back() {
        let mut meters = meters(Rate::per_second(10).burst(1), 100);
        meters[0].charge(1, at(0));
        for meter in meters.iter_mut().skip(1) {
            assert!(meter.available(at(0)).is_err(), "it is empty");
        }
        meters.truncate(2);
        meters.swap_remove(1);
        assert_eq!(meters[0].available(at(100)), Ok(1));
    }

    /// A handler that changes its connection's own rate again and again spends nothing of the
    /// shared one.
    #[test]
    fn a_change_of_its_own_rate_spends_no_shared_units() {
        let mut meters = meters(Rate::per_second(10).burst(1), 2);
        meters[0].charge(1, at(0));
        for burst in 1..100 {
            assert_eq!(meters[0].available(at(0)), Err(at(100)));
            meters[0].follow(Some(Rate::per_second(1000).burst(burst)), at(0));
        }
        meters[0].follow(None, at(0));
        assert_eq!(meters[1].available(at(100)), Ok(1));
    }

    #[test]
    fn both_rates_hold() {
        let shared = SharedMeter {
            rate: Cell::new(Some(Rate::per_second(1000).burst(7))),
            bucket: Cell::default(),
        };
        let mut meter = Meter::new(
            Some(Rate::per_second(10).burst(9)),
            Some(Rc::new(shared)),
            4,
        );
        assert_eq!(meter.available(at(0)), Ok(7));
        meter.charge(7, at(0));
        // The shared bucket is empty: four units are reserved, and available in 4 ms.
        assert_eq!(meter.available(at(0)), Err(at(4)));
        assert_eq!(
            meter.available(at(4)),
            Ok(2),
            "of its own nine two are left"
        );
        meter.charge(2, at(4));
        assert_eq!(meter.available(at(4)), Err(at(100)));
        assert_eq!(meter.reserved, 2);
    }
}
