//! What the simulator and tests ask of all listeners.

use super::Listeners;
#[cfg(feature = "sim")]
use super::{Capacity, Listener, Noted, Sums};

impl<L> Listeners<L> {
    /// No listener has changed since all were visited, for this capacity.
    #[cfg(feature = "sim")]
    pub(in crate::reactor) fn were_visited(&self, capacity: &Capacity) -> bool {
        self.settled_until(|| *capacity).is_some()
    }

    /// A visit is due, and [`Listeners::rests_until`] says that none is.
    #[cfg(feature = "sim")]
    pub(in crate::reactor) fn rests_wrongly(&self) -> bool {
        let visited = self.visited.as_ref();
        let rests = visited.is_some_and(|visited| visited.rests && self.is_unchanged());
        self.rests_until().is_some() && !rests
    }

    /// The name of a listener that has changed unnoticed.
    #[cfg(feature = "sim")]
    pub(in crate::reactor) fn unnoticed(&self) -> Option<&str> {
        self.visited.as_ref()?;
        let is_stale = |listener: &&Listener<L>| {
            let Noted {
                sums,
                is_indifferent,
                is_changed,
                ..
            } = listener.noted;
            let unlimited = listener.registered && !listener.has_limits();
            !is_changed && (sums != listener.sums() || is_indifferent && !unlimited)
        };
        self.all
            .iter()
            .find(is_stale)
            .map(|listener| &*listener.name)
    }

    /// The sums are those of what was noted of each listener.
    #[cfg(feature = "sim")]
    pub(in crate::reactor) fn add_up(&self) -> bool {
        let mut sums = Sums::default();
        self.all.iter().for_each(|one| sums += one.noted.sums);
        sums == self.sums
    }

    #[cfg(all(test, feature = "sim"))]
    pub(in crate::reactor) fn visits(&self) -> usize {
        self.visits.get()
    }
}
