//! How much all connections hold in buffers, and who holds the most.

use std::io;
use std::ops::Bound;
use std::time::Duration;

use super::os::Os;
use super::turn::is_short_of_memory;
use super::Reactor;
use crate::id::ConnId;
use crate::proto::{State, Time};
use crate::reason::{CloseReason, Closed};

/// Connections that hold less than this have no share to keep to: they are too small to gain anything by it.
const LEAST_HOLDER: usize = 1024;
/// What may be read of anybody who does not hold as much, as long as the limit is not reached.
const SMALL_FRAME: usize = 8 * 1024;
const CLASSES: usize = usize::BITS as usize;
/// How long one connection is read from beyond its share while others wait.
const FAVOUR: Duration = Duration::from_secs(1);
const NOWHERE: u32 = u32::MAX;
/// Slots whose books are made at once.
const CHUNK: usize = 1024;

/// What each slot holds, sorted by powers of two: the largest is found at once, as far as a factor of two goes.
#[derive(Debug)]
pub(super) struct Ledger {
    total: usize,
    limit: usize,
    /// Over three quarters of the limit, and not back under five eighths of it.
    tight: bool,
    /// In chunks, made for those who hold something: most never do.
    held: Vec<Option<Box<[Held; CHUNK]>>>,
    /// The slots of each class.
    classes: Vec<Vec<u32>>,
    /// Slots with at least [`LEAST_HOLDER`] bytes.
    holders: usize,
}

#[derive(Clone, Copy, Debug)]
struct Held {
    bytes: usize,
    /// Place in its class.
    place: u32,
}

impl Held {
    const NOTHING: Self = Self {
        bytes: 0,
        place: NOWHERE,
    };
}

impl Ledger {
    pub(super) fn new(limit: usize) -> Self {
        Self {
            total: 0,
            limit,
            tight: false,
            held: Vec::new(),
            classes: vec![Vec::new(); CLASSES],
            holders: 0,
        }
    }

    pub(super) fn set_limit(&mut self, limit: usize) {
        self.limit = limit;
        self.judge();
    }

    #[inline]
    pub(super) fn is_limited(&self) -> bool {
        self.limit < usize::MAX
    }

    pub(super) fn total(&self) -> usize {
        self.total
    }

    /// No more is read from those who hold more than [`Ledger::share`].
    #[inline]
    pub(super) fn is_tight(&self) -> bool {
        self.tight
    }

    #[inline]
    pub(super) fn is_over(&self) -> bool {
        self.total > self.limit
    }

    /// Half of the limit, divided among those who hold something worth mentioning.
    pub(super) fn share(&self) -> usize {
        let share = self.limit / 2 / self.holders.max(1);
        if self.total > self.nearly_all() {
            share.min(SMALL_FRAME)
        } else {
            share
        }
    }

    /// The most that one read may bring while memory is tight: a part of the room that is left, so that it is not input that
    /// goes over the limit. The last eighth is for the favoured one, and for small frames.
    #[inline]
    pub(super) fn one_read(&self, favoured: bool) -> usize {
        if !self.tight {
            return usize::MAX;
        }
        let most = if favoured { self.limit } else { self.nearly_all() };
        (most.saturating_sub(self.total) / 4).max(SMALL_FRAME)
    }

    fn nearly_all(&self) -> usize {
        self.limit / 8 * 7
    }

    #[inline]
    pub(super) fn of(&self, slot: u32) -> usize {
        self.held(slot).map_or(0, |held| held.bytes)
    }

    #[inline]
    fn held(&self, slot: u32) -> Option<&Held> {
        self.held
            .get(slot as usize / CHUNK)?
            .as_ref()?
            .get(slot as usize % CHUNK)
    }

    fn held_mut(&mut self, slot: u32) -> Option<&mut Held> {
        let chunk = self.held.get_mut(slot as usize / CHUNK)?.as_mut()?;
        chunk.get_mut(slot as usize % CHUNK)
    }

    /// The slot holds so much now.
    pub(super) fn note(&mut self, slot: u32, bytes: usize) {
        if self.of(slot) == bytes {
            return;
        }
        let chunk = slot as usize / CHUNK;
        if self.held.len() <= chunk {
            self.held.resize_with(chunk + 1, || None);
        }
        if let Some(unused @ None) = self.held.get_mut(chunk) {
            *unused = Some(Box::new([Held::NOTHING; CHUNK]));
        }
        let Some(held) = self.held_mut(slot) else {
            return;
        };
        let before = std::mem::replace(&mut held.bytes, bytes);
        self.total = self.total - before + bytes;
        self.holders += usize::from(bytes >= LEAST_HOLDER);
        self.holders -= usize::from(before >= LEAST_HOLDER);
        if class(before) != class(bytes) {
            self.take_out(slot, before);
            self.put_in(slot, bytes);
        }
        self.judge();
    }

    /// Somebody who holds at least half as much as anybody.
    pub(super) fn largest(&self) -> Option<u32> {
        self.classes.iter().rev().find_map(|class| class.first().copied())
    }

    fn judge(&mut self) {
        let mark = if self.tight { 5 } else { 6 };
        self.tight = self.total > self.limit / 8 * mark;
    }

    fn take_out(&mut self, slot: u32, bytes: usize) {
        let place = self.held(slot).map_or(NOWHERE, |held| held.place);
        let Some(members) = class(bytes).and_then(|class| self.classes.get_mut(class)) else {
            return;
        };
        if (place as usize) < members.len() {
            members.swap_remove(place as usize);
            let moved = members.get(place as usize).copied();
            if let Some(moved) = moved.and_then(|moved| self.held_mut(moved)) {
                moved.place = place;
            }
        }
    }

    fn put_in(&mut self, slot: u32, bytes: usize) {
        let members = class(bytes).and_then(|class| self.classes.get_mut(class));
        let place = members.map_or(NOWHERE, |members| {
            members.push(slot);
            members.len() as u32 - 1
        });
        if let Some(held) = self.held_mut(slot) {
            held.place = place;
        }
    }
}

impl<A, O: Os> Reactor<A, O> {
    /// What a connection holds has changed, perhaps.
    pub(super) fn account(&mut self, id: ConnId) {
        if let Some(slot) = self.roster.get(id) {
            self.account_for(id, slot.machine.memory());
        }
    }

    /// What a connection holds is so much now.
    #[inline]
    pub(super) fn account_for(&mut self, id: ConnId, holds: usize) {
        let at_rest = self.favoured.is_none() && self.squeezed.is_empty() && !self.memory.is_over();
        if !at_rest || self.memory.of(id.index) != holds {
            self.rebalance(id, holds);
        }
    }

    fn rebalance(&mut self, id: ConnId, holds: usize) {
        self.note_memory(id.index, holds);
        self.shed();
        // It may have written what it held, and the others hold the rest.
        if self.memory.of(id.index) <= self.memory.share() {
            self.release(id);
            self.end_favour(id);
        }
    }

    /// The books are looked at, and what has ended is not read. True if that is all there is to do with it.
    pub(super) fn is_hindered(&mut self, id: ConnId) -> bool {
        let Some(slot) = self.roster.get_mut(id) else {
            return true;
        };
        if self.memory.is_limited() {
            // A turn has several reads, and what the last one brought counts for the next.
            let held = slot.machine.memory();
            self.note_memory(id.index, held);
        }
        let Some(slot) = self.roster.get_mut(id) else {
            return true;
        };
        let tight = self.memory.is_tight() && self.memory.of(id.index) > self.memory.share();
        let would_read = !slot.machine.has_events() && slot.can_read() && slot.machine.state() == State::Open;
        if tight && would_read && !self.is_favoured(id) {
            self.squeeze(id);
        }
        let Some(slot) = self.roster.get_mut(id) else {
            return true;
        };
        if slot.readable && (slot.squeezed || slot.machine.wants_error()) {
            // What is there will be read when there is memory for it.
            slot.readable = slot.squeezed;
            // Reads say "end" for ever, and a write of nothing says whether there was a reset.
            let asked = self.streams.get_mut(id.index as usize).and_then(Option::as_mut);
            if let Some(Err(error)) = asked.map(|stream| self.os.write(stream, &[])) {
                let passing = match error.kind() {
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => true,
                    // After our own FIN it is what every write says.
                    io::ErrorKind::BrokenPipe => slot.machine.has_sent_fin(),
                    _ => false,
                };
                if !passing && !is_short_of_memory(&error) {
                    slot.machine.handle_read_error(error, &mut self.pool);
                    return true;
                }
            }
        }
        false
    }

    /// Whether this connection, which holds more than its share, may be read from although memory is tight: one at a time may,
    /// so that large frames are finished one after the other instead of all waiting for each other.
    pub(super) fn is_favoured(&mut self, id: ConnId) -> bool {
        let favoured = self.favoured.get_or_insert((id, self.now));
        favoured.0 == id
    }

    /// It needs no favour any more: the next one's turn.
    pub(super) fn end_favour(&mut self, id: ConnId) {
        if self.favoured.is_some_and(|(favoured, _)| favoured == id) {
            self.favour_next();
        }
    }

    /// When the favoured one has had its time, in which it could have sent a good part of a frame.
    pub(super) fn favour_until(&self) -> Time {
        match self.favoured {
            Some((_, since)) if !self.squeezed.is_empty() => since.after(FAVOUR),
            _ => Time::NEVER,
        }
    }

    pub(super) fn favour_next(&mut self) {
        let Some((last, _)) = self.favoured.take() else {
            return;
        };
        let mut behind = self.squeezed.range((Bound::Excluded(last), Bound::Unbounded));
        if let Some(&next) = behind.next().or_else(|| self.squeezed.first()) {
            self.release(next);
        }
    }

    /// Ends those who hold the most until the rest fits.
    pub(super) fn shed(&mut self) {
        while self.memory.is_over() {
            let Some(index) = self.memory.largest() else {
                break;
            };
            self.note_memory(index, 0);
            let Some(victim) = self.roster.tenant(index).map(|slot| slot.id) else {
                continue;
            };
            if let Some(slot) = self.roster.get_mut(victim) {
                slot.machine.reset(Closed::new(CloseReason::OverMemory), &mut self.pool);
                // It is looked after in a turn of its own.
                self.ready.push(victim, &mut slot.queued);
            }
        }
    }

    /// Nothing is read from this connection while memory is tight.
    pub(super) fn squeeze(&mut self, id: ConnId) {
        if let Some(slot) = self.roster.get_mut(id) {
            slot.squeezed = true;
            self.squeezed.insert(id);
        }
    }

    fn release(&mut self, id: ConnId) {
        if self.squeezed.remove(&id) {
            if let Some(slot) = self.roster.get_mut(id) {
                slot.squeezed = false;
                self.ready.push(id, &mut slot.queued);
            }
        }
    }

    /// A slot holds so much. Where that ends the tightness, reading goes on where it stood.
    pub(super) fn note_memory(&mut self, index: u32, bytes: usize) {
        let was_tight = self.memory.is_tight();
        self.memory.note(index, bytes);
        if was_tight && !self.memory.is_tight() {
            self.relax();
        }
    }

    pub(super) fn relax(&mut self) {
        self.favoured = None;
        while let Some(&id) = self.squeezed.first() {
            self.release(id);
        }
    }
}

/// The power of two below `bytes`, if it is any.
fn class(bytes: usize) -> Option<usize> {
    Some(bytes.checked_ilog2()? as usize)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sim::Random;

    #[test]
    fn it_is_tight_from_three_quarters_to_five_eighths() {
        let mut ledger = Ledger::new(8000);
        for (bytes, tight) in [(6000, false), (6001, true), (5001, true), (5000, false), (5500, false)] {
            ledger.note(0, bytes);
            assert_eq!(ledger.is_tight(), tight, "{bytes}");
        }
        ledger.note(1, 2501);
        assert!(ledger.is_over());
        ledger.note(0, 0);
        assert!(!ledger.is_over() && !ledger.is_tight());
    }

    #[test]
    fn without_a_limit_it_is_never_tight() {
        let mut ledger = Ledger::new(usize::MAX);
        ledger.note(7, usize::MAX / 2);
        assert!(!ledger.is_tight() && !ledger.is_over());
    }

    #[test]
    fn the_books_are_right() {
        for seed in 0..256 {
            let mut random = Random::new(seed);
            let mut ledger = Ledger::new(usize::MAX);
            let mut truth = [0_usize; 20];
            for _ in 0..random.between(1, 299) {
                let (slot, bytes) = (random.below(20), random.below(100_000));
                ledger.note(slot as u32, bytes);
                truth[slot] = bytes;
                assert_eq!(ledger.total(), truth.iter().sum::<usize>(), "seed {seed}");
                let most = truth.iter().copied().max().unwrap_or(0);
                match ledger.largest() {
                    Some(found) => assert!(truth[found as usize] > most / 2, "seed {seed}"),
                    None => assert_eq!(most, 0, "seed {seed}"),
                }
                let holders = truth.iter().filter(|&&bytes| bytes >= LEAST_HOLDER).count();
                assert_eq!(ledger.holders, holders, "seed {seed}");
            }
        }
    }
}
