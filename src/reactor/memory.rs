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
const MIN_HOLDER: usize = 1024;
/// What may be read of anybody who does not hold as much, as long as the limit is not reached.
const SMALL_FRAME: usize = 8 * 1024;
const CLASSES: usize = usize::BITS as usize;
/// How long one connection is read from beyond its share while others wait.
const READ_GRANT: Duration = Duration::from_secs(1);
const NONE: u32 = u32::MAX;
/// Slots whose books are made at once.
const CHUNK: usize = 1024;

/// What each slot holds, sorted by powers of two: the largest is found at once, as far as a factor of two goes.
#[derive(Debug)]
pub(super) struct MemoryUsage {
    total: usize,
    limit: usize,
    /// Over three quarters of the limit, and not back under five eighths of it.
    tight: bool,
    /// In chunks, made for those who hold something: most never do.
    held: Vec<Option<Box<[Held; CHUNK]>>>,
    /// The slots of each class.
    classes: Vec<Vec<u32>>,
    /// Slots with at least [`MIN_HOLDER`] bytes.
    holders: usize,
}

#[derive(Clone, Copy, Debug)]
struct Held {
    bytes: usize,
    /// Place in its class.
    place: u32,
}

impl Held {
    const NOTHING: Self = Self { bytes: 0, place: NONE };
}

impl MemoryUsage {
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

    /// No more is read from those who hold more than [`MemoryUsage::share`].
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
    /// goes over the limit. The last eighth is for the connection with the read grant, and for small frames.
    #[inline]
    pub(super) fn one_read(&self, granted: bool) -> usize {
        if !self.tight {
            return usize::MAX;
        }
        let most = if granted { self.limit } else { self.nearly_all() };
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
        self.holders += usize::from(bytes >= MIN_HOLDER);
        self.holders -= usize::from(before >= MIN_HOLDER);
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
        let threshold = if self.tight { 5 } else { 6 };
        self.tight = self.total > self.limit / 8 * threshold;
    }

    fn take_out(&mut self, slot: u32, bytes: usize) {
        let place = self.held(slot).map_or(NONE, |held| held.place);
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
        let place = members.map_or(NONE, |members| {
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
        if let Some(conn) = self.connections.get(id) {
            self.account_for(id, conn.machine.memory());
        }
    }

    /// What a connection holds is so much now.
    #[inline]
    pub(super) fn account_for(&mut self, id: ConnId, holds: usize) {
        let at_rest = self.read_grant.is_none() && self.paused_for_memory.is_empty() && !self.memory.is_over();
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
            self.end_read_grant(id);
        }
    }

    /// The books are looked at, and what has ended is not read. True if that is all there is to do with it.
    pub(super) fn is_hindered(&mut self, id: ConnId) -> bool {
        let Some(conn) = self.connections.get_mut(id) else {
            return true;
        };
        if self.memory.is_limited() {
            // A turn has several reads, and what the last one brought counts for the next.
            let held = conn.machine.memory();
            self.note_memory(id.index, held);
        }
        let Some(conn) = self.connections.get_mut(id) else {
            return true;
        };
        let tight = self.memory.is_tight() && self.memory.of(id.index) > self.memory.share();
        let would_read = !conn.machine.has_events() && conn.can_read() && conn.machine.state() == State::Open;
        if tight && would_read && !self.has_read_grant(id) {
            self.pause_for_memory(id);
        }
        let Some(conn) = self.connections.get_mut(id) else {
            return true;
        };
        if conn.readable && (conn.paused_for_memory || conn.machine.wants_error()) {
            // What is there will be read when there is memory for it.
            conn.readable = conn.paused_for_memory;
            // Reads say "end" for ever, and a write of nothing says whether there was a reset.
            let asked = self.streams.get_mut(id.index as usize).and_then(Option::as_mut);
            if let Some(Err(error)) = asked.map(|stream| self.os.write(stream, &[])) {
                let passing = match error.kind() {
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => true,
                    // After our own FIN it is what every write says.
                    io::ErrorKind::BrokenPipe => conn.machine.has_sent_fin(),
                    _ => false,
                };
                if !passing && !is_short_of_memory(&error) {
                    conn.machine.handle_read_error(error, &mut self.pool);
                    return true;
                }
            }
        }
        false
    }

    /// Whether this connection, which holds more than its share, may be read from although memory is tight: one at a time may,
    /// so that large frames are finished one after the other instead of all waiting for each other.
    pub(super) fn has_read_grant(&mut self, id: ConnId) -> bool {
        let grant = self.read_grant.get_or_insert((id, self.now));
        grant.0 == id
    }

    /// It needs no favour any more: the next one's turn.
    pub(super) fn end_read_grant(&mut self, id: ConnId) {
        if self.read_grant.is_some_and(|(holder, _)| holder == id) {
            self.grant_next();
        }
    }

    /// When the connection with the read grant has had its time, in which it could have sent a good part of a frame.
    pub(super) fn read_grant_until(&self) -> Time {
        match self.read_grant {
            Some((_, since)) if !self.paused_for_memory.is_empty() => since.after(READ_GRANT),
            _ => Time::NEVER,
        }
    }

    pub(super) fn grant_next(&mut self) {
        let Some((last, _)) = self.read_grant.take() else {
            return;
        };
        let mut behind = self.paused_for_memory.range((Bound::Excluded(last), Bound::Unbounded));
        if let Some(&next) = behind.next().or_else(|| self.paused_for_memory.first()) {
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
            let Some(victim) = self.connections.by_index(index).map(|conn| conn.id) else {
                continue;
            };
            if let Some(conn) = self.connections.get_mut(victim) {
                conn.machine.reset(Closed::new(CloseReason::OverMemory), &mut self.pool);
                // It is looked after in a turn of its own.
                self.ready.push(victim, &mut conn.queued);
            }
        }
    }

    /// Nothing is read from this connection while memory is tight.
    pub(super) fn pause_for_memory(&mut self, id: ConnId) {
        if let Some(conn) = self.connections.get_mut(id) {
            conn.paused_for_memory = true;
            self.paused_for_memory.insert(id);
        }
    }

    fn release(&mut self, id: ConnId) {
        if self.paused_for_memory.remove(&id) {
            if let Some(conn) = self.connections.get_mut(id) {
                conn.paused_for_memory = false;
                self.ready.push(id, &mut conn.queued);
            }
        }
    }

    /// A slot holds so much. Where that ends the tightness, reading goes on where it stood.
    pub(super) fn note_memory(&mut self, index: u32, bytes: usize) {
        let was_tight = self.memory.is_tight();
        self.memory.note(index, bytes);
        if was_tight && !self.memory.is_tight() {
            self.resume_reads();
        }
    }

    pub(super) fn resume_reads(&mut self) {
        self.read_grant = None;
        while let Some(&id) = self.paused_for_memory.first() {
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
        let mut usage = MemoryUsage::new(8000);
        for (bytes, tight) in [(6000, false), (6001, true), (5001, true), (5000, false), (5500, false)] {
            usage.note(0, bytes);
            assert_eq!(usage.is_tight(), tight, "{bytes}");
        }
        usage.note(1, 2501);
        assert!(usage.is_over());
        usage.note(0, 0);
        assert!(!usage.is_over() && !usage.is_tight());
    }

    #[test]
    fn without_a_limit_it_is_never_tight() {
        let mut usage = MemoryUsage::new(usize::MAX);
        usage.note(7, usize::MAX / 2);
        assert!(!usage.is_tight() && !usage.is_over());
    }

    #[test]
    fn the_accounting_is_right() {
        for seed in 0..256 {
            let mut random = Random::new(seed);
            let mut usage = MemoryUsage::new(usize::MAX);
            let mut truth = [0_usize; 20];
            for _ in 0..random.between(1, 299) {
                let (slot, bytes) = (random.below(20), random.below(100_000));
                usage.note(slot as u32, bytes);
                truth[slot] = bytes;
                assert_eq!(usage.total(), truth.iter().sum::<usize>(), "seed {seed}");
                let most = truth.iter().copied().max().unwrap_or(0);
                match usage.largest() {
                    Some(found) => assert!(truth[found as usize] > most / 2, "seed {seed}"),
                    None => assert_eq!(most, 0, "seed {seed}"),
                }
                let holders = truth.iter().filter(|&&bytes| bytes >= MIN_HOLDER).count();
                assert_eq!(usage.holders, holders, "seed {seed}");
            }
        }
    }
}
