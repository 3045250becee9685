//! How many bytes each connection's buffers hold, and which connections hold the most.
//!
//! A payload that connections share counts once. Each of them weighs it in full when one is to be
//! paused or closed.

use std::rc::Rc;

use crate::proto::{lower, Held, SharedPayloads};

/// Connections that hold less than this have no share: limiting them would free nothing.
const MIN_HOLDER: usize = 1024;
/// A connection that holds less may always read this much while the limit is not reached.
const SMALL_FRAME: usize = 8 * 1024;
const CLASSES: usize = usize::BITS as usize;
const NONE: u32 = u32::MAX;
/// The largest holders are those within this power of two of the largest. A stall weighs 16,000 times
/// as much as none at most, so that no smaller one can be the heaviest.
const LARGE_CLASSES: usize = 15;
/// How many holders of each class are compared.
const SAMPLE: usize = 64;
/// When memory has fallen by this, and by a quarter of its maximum, a storm has passed and spare
/// memory is released. What a busy server has under way changes by less.
const STORM_BYTES: usize = 8 * 1024 * 1024;
const STORM_PART: usize = 4;
/// Least capacities: an allocator caches smaller lists when they have grown.
const MIN_CLASS: usize = 512;
const MIN_CHUNKS: usize = 256;
/// Slots whose accounts are allocated together.
const CHUNK: usize = 1024;

/// Bytes per slot, by powers of two: the largest holder is found at once, within a factor of two.
#[derive(Debug)]
pub(super) struct MemoryUsage {
    /// What each connection holds alone.
    own: usize,
    /// What they share.
    shared: Rc<SharedPayloads>,
    limit: usize,
    /// Over three quarters of the limit, and not back under five eighths of it.
    tight: bool,
    /// In chunks, allocated when a slot first holds something: most never do.
    held: Vec<Option<Box<Chunk>>>,
    /// The maximum of `own` since the last storm ended.
    most: usize,
    /// After a storm: when fewer slots hold something, spare memory is to be released once more.
    fewer_than: Option<usize>,
    /// The slots of each class.
    classes: Vec<Vec<u32>>,
    /// Number of slots that hold something.
    holding: usize,
    /// Number of slots with at least [`MIN_HOLDER`] bytes.
    holders: usize,
    /// Where the next sample of a class begins.
    sample_at: usize,
}

#[derive(Debug)]
struct Chunk {
    accounts: [Account; CHUNK],
    /// Number of slots that hold something.
    holding: usize,
}

#[derive(Clone, Copy, Debug)]
struct Account {
    held: Held,
    /// Position in its class.
    at: u32,
}

impl Account {
    const NOTHING: Self = Self {
        held: Held::NOTHING,
        at: NONE,
    };
}

impl MemoryUsage {
    pub(super) fn new(limit: usize, shared: Rc<SharedPayloads>) -> Self {
        Self {
            own: 0,
            shared,
            limit,
            tight: false,
            held: Vec::with_capacity(MIN_CHUNKS),
            most: 0,
            fewer_than: None,
            classes: vec![Vec::new(); CLASSES],
            holding: 0,
            holders: 0,
            sample_at: 0,
        }
    }

    pub(super) fn set_limit(&mut self, limit: usize) {
        self.limit = limit;
        self.update_tight();
    }

    #[inline]
    pub(super) fn is_limited(&self) -> bool {
        self.limit < usize::MAX
    }

    #[inline]
    pub(super) fn total(&self) -> usize {
        self.own + self.shared.bytes()
    }

    /// Connections that hold more than [`MemoryUsage::share`] are not read.
    #[inline]
    pub(super) fn is_tight(&self) -> bool {
        self.tight
    }

    #[inline]
    pub(super) fn is_over(&self) -> bool {
        self.total() > self.limit
    }

    /// Half of the limit, divided by the number of holders.
    pub(super) fn share(&self) -> usize {
        let share = self.limit / 2 / self.holders.max(1);
        if self.total() > self.reserve_mark() {
            share.min(SMALL_FRAME)
        } else {
            share
        }
    }

    /// The maximum size of one read while memory is tight: a part of the remainder, so that input
    /// does not exceed the limit. The last eighth is for the granted connection and small frames.
    #[inline]
    pub(super) fn max_read(&self, granted: bool) -> usize {
        if !self.tight {
            return usize::MAX;
        }
        let most = if granted {
            self.limit
        } else {
            self.reserve_mark()
        };
        (most.saturating_sub(self.total()) / 4).max(SMALL_FRAME)
    }

    /// Whether all memory that is kept for the granted connection is free.
    pub(super) fn has_reserve(&self) -> bool {
        self.total() <= self.reserve_mark()
    }

    fn reserve_mark(&self) -> usize {
        self.limit / 8 * 7
    }

    /// What the slot holds.
    #[inline]
    pub(super) fn held(&self, slot: u32) -> Held {
        self.account(slot)
            .map_or(Held::NOTHING, |account| account.held)
    }

    /// What the slot weighs.
    #[inline]
    pub(super) fn of(&self, slot: u32) -> usize {
        self.held(slot).weight()
    }

    #[inline]
    fn account(&self, slot: u32) -> Option<&Account> {
        self.held
            .get(slot as usize / CHUNK)?
            .as_ref()?
            .accounts
            .get(slot as usize % CHUNK)
    }

    fn account_mut(&mut self, slot: u32) -> Option<&mut Account> {
        let chunk = self.held.get_mut(slot as usize / CHUNK)?.as_mut()?;
        chunk.accounts.get_mut(slot as usize % CHUNK)
    }

    /// Sets what the slot holds.
    pub(super) fn set(&mut self, slot: u32, held: Held) {
        if self.held(slot) == held {
            return;
        }
        let chunk = slot as usize / CHUNK;
        if self.held.len() <= chunk {
            self.held.resize_with(chunk + 1, || None);
        }
        let Some(chunk) = self.held.get_mut(chunk) else {
            return;
        };
        let chunk = chunk.get_or_insert_with(|| {
            Box::new(Chunk {
                accounts: [Account::NOTHING; CHUNK],
                holding: 0,
            })
        });
        let Some(account) = chunk.accounts.get_mut(slot as usize % CHUNK) else {
            return;
        };
        let before = std::mem::replace(&mut account.held, held);
        for holding in [&mut chunk.holding, &mut self.holding] {
            *holding += usize::from(held != Held::NOTHING);
            *holding -= usize::from(before != Held::NOTHING);
        }
        self.own = self.own - before.own + held.own;
        self.most = self.most.max(self.own);
        if self.most - self.own >= STORM_BYTES.max(self.most / STORM_PART) {
            self.most = self.own;
            self.fewer_than = Some(usize::MAX);
        }
        let (before, bytes) = (before.weight(), held.weight());
        self.holders += usize::from(bytes >= MIN_HOLDER);
        self.holders -= usize::from(before >= MIN_HOLDER);
        if class(before) != class(bytes) {
            self.take_out(slot, before);
            self.put_in(slot, bytes);
        }
        self.update_tight();
    }

    /// True once after what all connections hold has fallen as it does after a storm, and then each
    /// time that fewer hold something than the last time, until none does.
    #[inline]
    pub(super) fn take_fall(&mut self) -> bool {
        let fell = self.fewer_than.is_some_and(|slots| self.holding < slots);
        if fell {
            self.fewer_than = (self.holding > 0).then_some(self.holding);
        }
        fell
    }

    /// Drops accounts, and moves or drops lists, that have grown in a storm.
    ///
    /// Bounded: up to [`MIN_CLASS`] slots of each class move, to one of several places, and each
    /// chunk that is dropped was allocated since the last time.
    pub(super) fn release(&mut self) {
        for chunk in &mut self.held {
            chunk.take_if(|chunk| chunk.holding == 0);
        }
        for class in &mut self.classes {
            match class.len() {
                0 => *class = Vec::new(),
                _ => lower(class, MIN_CLASS),
            }
        }
    }

    /// A slot that holds at least half as much as the largest.
    pub(super) fn largest(&self) -> Option<u32> {
        self.classes
            .iter()
            .rev()
            .find_map(|class| class.first().copied())
    }

    /// The next sample of large holders is another one.
    pub(super) fn move_sample(&mut self) {
        self.sample_at = self.sample_at.wrapping_add(SAMPLE);
    }

    #[cfg(test)]
    pub(super) fn sample_at(&self) -> usize {
        self.sample_at
    }

    /// Large holders with their bytes: a sample of each class.
    pub(super) fn large_holders(&self) -> impl Iterator<Item = (u32, usize)> + '_ {
        let usage = self;
        let has_members = |class: &Vec<u32>| !class.is_empty();
        let largest = usage.classes.iter().rposition(has_members).unwrap_or(0);
        let first = (largest + 1).saturating_sub(LARGE_CLASSES);
        let classes = usage.classes.get(first..=largest).unwrap_or_default();
        let sample = classes.iter().flat_map(move |class| {
            let (begin, count) = (usage.sample_at, class.len().min(SAMPLE));
            (0..count).filter_map(move |at| class.get(begin.wrapping_add(at) % class.len()))
        });
        let sized = sample.map(|&slot| (slot, usage.of(slot)));
        sized.filter(|&(_, bytes)| bytes >= MIN_HOLDER)
    }

    fn update_tight(&mut self) {
        let eighths = if self.tight { 5 } else { 6 };
        self.tight = self.total() > self.limit / 8 * eighths;
    }

    fn take_out(&mut self, slot: u32, bytes: usize) {
        let at = self.account(slot).map_or(NONE, |account| account.at);
        let Some(members) = class(bytes).and_then(|class| self.classes.get_mut(class)) else {
            return;
        };
        if (at as usize) < members.len() {
            members.swap_remove(at as usize);
            let moved = members.get(at as usize).copied();
            if let Some(moved) = moved.and_then(|moved| self.account_mut(moved)) {
                moved.at = at;
            }
        }
    }

    fn put_in(&mut self, slot: u32, bytes: usize) {
        let members = class(bytes).and_then(|class| self.classes.get_mut(class));
        let at = members.map_or(NONE, |members| {
            if members.capacity() == 0 {
                members.reserve(MIN_CLASS);
            }
            members.push(slot);
            members.len() as u32 - 1
        });
        if let Some(account) = self.account_mut(slot) {
            account.at = at;
        }
    }
}

/// The exponent of the power of two at or below `bytes`; `None` for 0.
fn class(bytes: usize) -> Option<usize> {
    Some(bytes.checked_ilog2()? as usize)
}

#[cfg(all(test, feature = "sim"))]
mod tests {
    use super::*;
    use crate::sim::Random;

    fn limited(limit: usize) -> MemoryUsage {
        MemoryUsage::new(limit, Rc::default())
    }

    fn own(own: usize) -> Held {
        Held { own, shared: 0 }
    }

    #[test]
    fn it_is_tight_from_three_quarters_to_five_eighths() {
        let mut usage = limited(8000);
        for (bytes, tight) in [
            (6000, false),
            (6001, true),
            (5001, true),
            (5000, false),
            (5500, false),
        ] {
            usage.set(0, own(bytes));
            assert_eq!(usage.is_tight(), tight, "{bytes}");
        }
        usage.set(1, own(2501));
        assert!(usage.is_over());
        usage.set(0, own(0));
        assert!(!usage.is_over() && !usage.is_tight());
    }

    #[test]
    fn without_a_limit_it_is_never_tight() {
        let mut usage = limited(usize::MAX);
        usage.set(7, own(usize::MAX / 2));
        assert!(!usage.is_tight() && !usage.is_over());
    }

    #[test]
    fn after_a_storm_each_fall_is_told_once() {
        let mut usage = limited(usize::MAX);
        let mut falls = |slots: std::ops::Range<u32>, bytes| {
            for slot in slots {
                usage.set(slot, own(bytes));
            }
            let fell = usage.take_fall();
            assert!(!usage.take_fall(), "once");
            fell
        };
        assert!(!falls(0..3000, STORM_BYTES / 2000 + 1));
        assert!(!falls(2000..3000, 0), "not yet");
        assert!(falls(1000..2000, 0));
        assert!(falls(5..1000, 0), "fewer");
        assert!(!falls(1..5, 1), "as many");
        assert!(falls(4..5, 0));
        assert!(!falls(4..5, 1), "more");
        assert!(!falls(4..5, 0), "as many as the last time");
        assert!(falls(0..4, 0), "none");
        assert!(!falls(0..1, STORM_BYTES - 1));
        assert!(!falls(0..1, 0), "a smaller storm");
        assert!(!falls(0..1, STORM_BYTES));
        assert!(falls(0..1, 0), "another storm");
        assert!(!falls(0..10, STORM_BYTES));
        assert!(!falls(8..10, 0), "a smaller part");
        assert!(falls(7..8, 0), "a quarter");
        assert!(falls(0..7, 0), "none");
        usage.release();
        assert_eq!(usage.total(), 0);
        assert!(usage.held.iter().all(Option::is_none));
        assert!(usage.classes.iter().all(|class| class.capacity() == 0));
    }

    #[test]
    fn the_accounts_are_right() {
        for seed in 0..256 {
            let mut random = Random::new(seed);
            let mut usage = limited(usize::MAX);
            let mut truth = [0_usize; 20];
            for _ in 0..random.between(1, 299) {
                let (slot, bytes) = (random.below(20), random.below(100_000));
                usage.set(slot as u32, own(bytes));
                truth[slot] = bytes;
                if random.below(8) == 0 {
                    usage.release();
                }
                assert_eq!(usage.total(), truth.iter().sum::<usize>(), "seed {seed}");
                let max = truth.iter().copied().max().unwrap_or(0);
                match usage.largest() {
                    Some(found) => assert!(truth[found as usize] > max / 2, "seed {seed}"),
                    None => assert_eq!(max, 0, "seed {seed}"),
                }
                let holders = truth.iter().filter(|&&bytes| bytes >= MIN_HOLDER).count();
                assert_eq!(usage.holders, holders, "seed {seed}");
                let holding = truth.iter().filter(|&&bytes| bytes > 0).count();
                assert_eq!(usage.holding, holding, "seed {seed}");
            }
        }
    }
}
