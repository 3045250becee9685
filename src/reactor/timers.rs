//! Timers: one entry per connection, in a heap that knows the position of each entry.
//!
//! A connection's deadline often moves later, and that costs nothing here: the entry fires, the
//! reactor compares the deadline, and arms again. Only an earlier deadline moves the entry. Closed
//! connections leave nothing behind.

use std::collections::TryReserveError;

use crate::proto::Time;

/// A binary heap of times and slots, earliest first, with each slot's position. Two lists take less
/// memory than pairs.
#[derive(Debug, Default)]
pub(super) struct Timers {
    whens: Vec<Time>,
    /// The slot of each entry.
    slots: Vec<u32>,
    /// Position in the heap of each slot, or `NONE`.
    places: Vec<u32>,
}

const NONE: u32 = u32::MAX;

impl Timers {
    /// Requests memory for `slots` slots in all.
    pub(super) fn try_reserve(&mut self, slots: usize) -> Result<(), TryReserveError> {
        let more = |len: usize| slots.saturating_sub(len);
        self.whens.try_reserve_exact(more(self.whens.len()))?;
        self.slots.try_reserve_exact(more(self.slots.len()))?;
        self.places.try_reserve_exact(more(self.places.len()))
    }

    /// Arms the timer of `slot` for `when`, unless an earlier time is set.
    #[inline]
    pub(super) fn arm(&mut self, slot: u32, when: Time) {
        if !when.is_armed() {
            return;
        }
        let index = slot as usize;
        if self.places.len() <= index {
            self.places.resize(index + 1, NONE);
        }
        match self.place(slot) {
            None => {
                self.whens.push(when);
                self.slots.push(slot);
                self.sift_up(self.whens.len() - 1);
            }
            Some(place) => {
                if let Some(entry) = self.whens.get_mut(place).filter(|entry| when < **entry) {
                    *entry = when;
                    self.sift_up(place);
                }
            }
        }
    }

    pub(super) fn disarm(&mut self, slot: u32) {
        let Some(place) = self.place(slot) else {
            return;
        };
        self.note(slot, NONE);
        self.whens.swap_remove(place);
        self.slots.swap_remove(place);
        if place < self.whens.len() {
            self.sift_down(place);
            self.sift_up(place);
        }
    }

    #[inline]
    pub(super) fn next(&self) -> Time {
        self.time(0)
    }

    /// Removes and returns one slot whose time is `due`.
    #[inline]
    pub(super) fn pop(&mut self, due: Time) -> Option<u32> {
        let slot = *self.slots.first()?;
        if self.time(0) > due {
            return None;
        }
        self.disarm(slot);
        Some(slot)
    }

    /// The time at which this slot's timer fires.
    #[cfg(feature = "sim")]
    pub(super) fn of(&self, slot: u32) -> Time {
        self.place(slot)
            .map_or(Time::NEVER, |place| self.time(place))
    }

    #[cfg(any(test, feature = "sim"))]
    pub(super) fn len(&self) -> usize {
        self.whens.len()
    }

    #[inline]
    fn place(&self, slot: u32) -> Option<usize> {
        match self.places.get(slot as usize) {
            None | Some(&NONE) => None,
            Some(&place) => Some(place as usize),
        }
    }

    fn note(&mut self, slot: u32, place: u32) {
        if let Some(noted) = self.places.get_mut(slot as usize) {
            *noted = place;
        }
    }

    #[inline]
    fn time(&self, place: usize) -> Time {
        self.whens.get(place).copied().unwrap_or(Time::NEVER)
    }

    /// Moves the entry at `place` towards the root, and notes the positions of all entries that
    /// moved.
    fn sift_up(&mut self, mut place: usize) {
        while place > 0 {
            let parent = (place - 1) / 2;
            if self.time(parent) <= self.time(place) {
                break;
            }
            self.swap(place, parent);
            place = parent;
        }
        self.note_at(place);
    }

    fn sift_down(&mut self, mut place: usize) {
        loop {
            let left = 2 * place + 1;
            let child = if self.time(left + 1) < self.time(left) {
                left + 1
            } else {
                left
            };
            if child >= self.whens.len() || self.time(place) <= self.time(child) {
                break;
            }
            self.swap(place, child);
            place = child;
        }
        self.note_at(place);
    }

    fn swap(&mut self, one: usize, other: usize) {
        self.whens.swap(one, other);
        self.slots.swap(one, other);
        self.note_at(one);
    }

    fn note_at(&mut self, place: usize) {
        if let Some(&slot) = self.slots.get(place) {
            self.note(slot, place as u32);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;
    use std::time::Duration;

    fn at(millis: u64) -> Time {
        Time::from_start(Duration::from_millis(millis))
    }

    #[test]
    fn fires_in_order_whatever_was_armed_moved_and_cancelled() {
        let mut timers = Timers::default();
        let mut model: BTreeMap<u32, Time> = BTreeMap::new();
        let mut random = 12345u64;
        let mut next = |below: u64| {
            random = random
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            (random >> 33) % below
        };
        for _ in 0..20_000 {
            let slot = next(300) as u32;
            match next(4) {
                0 | 1 => {
                    let when = at(next(1000));
                    timers.arm(slot, when);
                    let entry = model.entry(slot).or_insert(when);
                    *entry = (*entry).min(when);
                }
                2 => {
                    timers.disarm(slot);
                    model.remove(&slot);
                }
                _ => {
                    let due = at(next(1000));
                    let earliest = model.values().min().copied();
                    assert_eq!(timers.next(), earliest.unwrap_or(Time::NEVER));
                    let fired = timers.pop(due);
                    assert_eq!(fired.is_some(), earliest.is_some_and(|when| when <= due));
                    if let Some(slot) = fired {
                        assert_eq!(model.remove(&slot), earliest);
                    }
                }
            }
            assert_eq!(timers.len(), model.len());
        }
    }

    #[test]
    fn a_hundred_thousand_armed_and_cancelled_leave_nothing() {
        let mut timers = Timers::default();
        for round in 0..100_000u32 {
            timers.arm(round % 7, at(u64::from(round)));
            timers.arm(round % 7, at(1));
            timers.disarm(round % 7);
        }
        assert_eq!(timers.len(), 0);
        assert_eq!(timers.next(), Time::NEVER);
    }

    #[test]
    fn never_is_not_armed() {
        let mut timers = Timers::default();
        timers.arm(3, Time::NEVER);
        assert_eq!(timers.len(), 0);
    }
}
