//! The results of visits to listeners.

use std::ops::{AddAssign, SubAssign};

use super::capacity::Capacity;
use crate::proto::Time;

/// The result of the last visit to one listener, and whether another one is due.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Noted {
    pub(super) sums: Sums,
    /// It was in the poll and had no limit of its own: connections that begin and end change
    /// nothing.
    pub(super) is_indifferent: bool,
    /// It has changed since, and is among the changed listeners.
    pub(super) is_changed: bool,
    /// It had an event, and is among the ready listeners.
    pub(super) is_ready: bool,
}

impl Noted {
    /// The listener has changed. True if that is new.
    #[inline]
    pub(super) fn change(&mut self) -> bool {
        !std::mem::replace(&mut self.is_changed, true)
    }
}

/// The last visit to all listeners that have not changed since.
pub(super) struct Visited {
    /// The capacity at that visit.
    pub(super) capacity: Capacity,
    /// When a listener has to be visited again.
    pub(super) wake: Time,
    /// No limit of the server held back a client, and no listener had reached its own cap.
    pub(super) rests: bool,
}

/// The part of one listener in numbers of listeners, and the sums of all parts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Sums {
    pub(super) open: usize,
    /// Open ones that let clients wait in the backlog while no slot is free, and may accept then.
    pub(super) let_wait: usize,
    pub(super) registered: usize,
}

impl AddAssign for Sums {
    fn add_assign(&mut self, other: Self) {
        self.open += other.open;
        self.let_wait += other.let_wait;
        self.registered += other.registered;
    }
}

/// Of a part that was added before.
impl SubAssign for Sums {
    fn sub_assign(&mut self, other: Self) {
        self.open = self.open.saturating_sub(other.open);
        self.let_wait = self.let_wait.saturating_sub(other.let_wait);
        self.registered = self.registered.saturating_sub(other.registered);
    }
}

/// Number of listeners visited in loops that may be long. Counted in unit tests alone.
#[derive(Default)]
pub(super) struct VisitCount {
    #[cfg(test)]
    count: std::cell::Cell<usize>,
}

impl VisitCount {
    #[cfg(test)]
    pub(super) fn note(&self, visits: usize) {
        self.count.set(self.count.get() + visits);
    }

    #[cfg(not(test))]
    #[inline(always)]
    pub(super) fn note(&self, _: usize) {}

    #[cfg(all(test, feature = "sim"))]
    pub(super) fn get(&self) -> usize {
        self.count.get()
    }
}
