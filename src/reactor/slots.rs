//! Slots for entries that come and go: an index names an entry until it is removed.
//!
//! As the crate `slab`, but room for more is requested, and may be refused; and a slot knows its
//! generation.

use std::collections::TryReserveError;

/// Entries by index. A freed slot is the next to be used.
#[derive(Debug)]
pub(super) struct Slots<T> {
    entries: Vec<Entry<T>>,
    /// The slot of the next entry: the last one freed, or the one behind all.
    next: usize,
    len: usize,
    /// Slots beyond this number are refused, as by a system without memory.
    #[cfg(test)]
    pub(super) granted: usize,
}

#[derive(Debug)]
enum Entry<T> {
    Vacant {
        /// The slot that was freed before it.
        next: u32,
        /// The last one; zero for none.
        generation: u32,
    },
    Occupied(T),
}

impl<T> Entry<T> {
    #[inline]
    fn get(&self) -> Option<&T> {
        match self {
            Self::Occupied(entry) => Some(entry),
            Self::Vacant { .. } => None,
        }
    }

    #[inline]
    fn get_mut(&mut self) -> Option<&mut T> {
        match self {
            Self::Occupied(entry) => Some(entry),
            Self::Vacant { .. } => None,
        }
    }
}

impl<T> Slots<T> {
    pub(super) fn new() -> Self {
        Self {
            entries: Vec::new(),
            next: 0,
            len: 0,
            #[cfg(test)]
            granted: usize::MAX,
        }
    }

    /// Bytes of memory for one slot.
    #[cfg(test)]
    pub(super) const SLOT_SIZE: usize = size_of::<Entry<T>>();

    /// Number of slots for which there is memory.
    #[cfg(test)]
    pub(super) fn capacity(&self) -> usize {
        self.entries.capacity()
    }

    /// Requests memory for `slots` slots in all.
    pub(super) fn try_reserve(&mut self, slots: usize) -> Result<(), TryReserveError> {
        #[cfg(test)]
        let slots = if slots > self.granted {
            usize::MAX
        } else {
            slots
        };
        self.entries
            .try_reserve_exact(slots.saturating_sub(self.entries.len()))
    }

    /// Whether the next entry needs no memory.
    #[inline]
    pub(super) fn has_vacant(&self) -> bool {
        self.len < self.entries.capacity()
    }

    #[inline]
    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Number of slots that were ever used.
    pub(super) fn used(&self) -> usize {
        self.entries.len()
    }

    /// Whether the next entry goes to a slot that was used before.
    #[inline]
    pub(super) fn has_used(&self) -> bool {
        self.next < self.entries.len()
    }

    /// The index that [`Slots::insert`] returns next.
    #[inline]
    pub(super) fn vacant_key(&self) -> usize {
        self.next
    }

    /// Begins the next generation of the slot of the next entry: one more than the last, and 1
    /// behind `max`.
    #[inline]
    pub(super) fn next_generation(&mut self, max: u32) -> u32 {
        if !self.has_used() {
            self.entries.push(Entry::Vacant {
                next: self.next as u32 + 1,
                generation: 0,
            });
        }
        let Some(Entry::Vacant { generation, .. }) = self.entries.get_mut(self.next) else {
            // It cannot be: see `insert`.
            return 1;
        };
        *generation = if *generation < max {
            *generation + 1
        } else {
            1
        };
        *generation
    }

    #[inline(always)]
    pub(super) fn insert(&mut self, entry: T) -> usize {
        let index = self.next;
        self.len += 1;
        match self.entries.get_mut(index) {
            Some(slot) => {
                self.next = match *slot {
                    Entry::Vacant { next, .. } => next as usize,
                    // It cannot be: `next` is a slot that was freed.
                    Entry::Occupied(_) => index,
                };
                *slot = Entry::Occupied(entry);
            }
            None => {
                self.entries.push(Entry::Occupied(entry));
                self.next = index + 1;
            }
        }
        index
    }

    /// Frees a slot. `generation` is its last one; 0 where they are not counted.
    #[inline]
    pub(super) fn remove(&mut self, index: usize, generation: u32) -> Option<T> {
        let slot = self.entries.get_mut(index)?;
        slot.get()?;
        let vacant = Entry::Vacant {
            next: self.next as u32,
            generation,
        };
        match std::mem::replace(slot, vacant) {
            Entry::Occupied(entry) => {
                self.len -= 1;
                self.next = index;
                Some(entry)
            }
            Entry::Vacant { .. } => None,
        }
    }

    #[inline]
    pub(super) fn get(&self, index: usize) -> Option<&T> {
        self.entries.get(index).and_then(Entry::get)
    }

    #[inline]
    pub(super) fn get_mut(&mut self, index: usize) -> Option<&mut T> {
        self.entries.get_mut(index).and_then(Entry::get_mut)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &T> {
        self.entries.iter().filter_map(Entry::get)
    }

    pub(super) fn into_entries(self) -> impl Iterator<Item = T> {
        self.entries.into_iter().filter_map(|slot| match slot {
            Entry::Occupied(entry) => Some(entry),
            Entry::Vacant { .. } => None,
        })
    }

    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.entries.iter_mut().filter_map(Entry::get_mut)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    /// Against a map, with random insertions and removals.
    #[test]
    fn an_index_names_its_entry_until_it_is_removed() {
        let (mut slots, mut model) = (Slots::new(), BTreeMap::new());
        let mut random = 7u64;
        for value in 0..20_000 {
            random = random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            let index = (random >> 40) as usize % 64;
            if random >> 33 & 1 == 0 && model.len() < 50 {
                let next = slots.vacant_key();
                assert_eq!(slots.insert(value), next);
                assert_eq!(model.insert(next, value), None, "it was free");
                assert!(next < 50, "no more slots than were used at one time");
            } else {
                assert_eq!(slots.remove(index, 1), model.remove(&index));
            }
            assert_eq!(slots.get(index), model.get(&index));
            assert_eq!(slots.get_mut(index).copied(), model.get(&index).copied());
            assert_eq!(
                (slots.len(), slots.is_empty()),
                (model.len(), model.is_empty())
            );
        }
        assert!(slots.iter().eq(model.values()));
        assert!(slots.iter_mut().map(|value| &*value).eq(model.values()));
        assert!(slots.into_entries().eq(model.into_values()));
    }

    #[test]
    fn memory_that_is_not_there_is_refused() {
        let mut slots = Slots::new();
        slots.try_reserve(10).expect("memory");
        assert!(slots.capacity() >= 10 && slots.has_vacant());
        slots
            .try_reserve(usize::MAX)
            .expect_err("more than there is");
        slots
            .try_reserve(usize::MAX / size_of::<u64>())
            .expect_err("more than there is");
        for value in 0..slots.capacity() as u64 {
            slots.insert(value);
        }
        assert!(!slots.has_vacant());
        slots.remove(3, 1);
        assert!(slots.has_vacant());
    }

    #[test]
    fn generations_wrap_without_zero() {
        let mut slots = Slots::new();
        let begin = |slots: &mut Slots<u64>| [(); 2].map(|()| slots.next_generation(7));
        assert_eq!(begin(&mut slots), [1, 2]);
        assert_eq!((slots.insert(5), slots.used()), (0, 1));
        assert_eq!(slots.remove(0, 6), Some(5));
        assert_eq!(begin(&mut slots), [7, 1]);
    }
}
