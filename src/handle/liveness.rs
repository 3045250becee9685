//! Which connections are alive, for threads that do not ask the loop.

use std::collections::TryReserveError;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::OnceLock;

use crate::config::MAX_CONNECTIONS;
use crate::id::{ConnId, ServerNumber};

/// The live ids of one server, readable by every thread: the generation of each slot, zero when it
/// is free.
///
/// Kept in chunks, so that it grows without moving slots that other threads read: of `FIRST` slots,
/// of twice as many, and so on up to `LARGEST`, which is filled in microseconds.
pub(crate) struct Liveness {
    server: ServerNumber,
    chunks: [OnceLock<Box<[AtomicU32]>>; CHUNKS],
}

const FIRST: usize = 64;
const LARGEST: usize = 1 << 16;
/// Chunks that are smaller than the next one.
const GROWING: usize = (LARGEST / FIRST).ilog2() as usize + 1;
const CHUNKS: usize = GROWING + MAX_CONNECTIONS / LARGEST;

impl Default for Liveness {
    fn default() -> Self {
        Self {
            server: ServerNumber::next(),
            chunks: [const { OnceLock::new() }; CHUNKS],
        }
    }
}

impl Liveness {
    /// Returns the chunk of a slot, the chunk's size, and the position in it.
    fn place(index: u32) -> (usize, usize, usize) {
        let shifted = index as usize + FIRST;
        if let Some(beyond) = shifted.checked_sub(2 * LARGEST) {
            return (GROWING + beyond / LARGEST, LARGEST, beyond % LARGEST);
        }
        let chunk = (shifted / FIRST).ilog2() as usize;
        let size = FIRST << chunk;
        (chunk, size, shifted - size)
    }

    /// The server whose ids these are.
    pub(crate) fn server(&self) -> ServerNumber {
        self.server
    }

    /// Requests memory for a slot.
    pub(crate) fn try_reserve(&self, index: u32) -> Result<(), TryReserveError> {
        let (chunk, size, _) = Self::place(index);
        if let Some(cell) = self.chunks.get(chunk).filter(|cell| cell.get().is_none()) {
            let mut slots = Vec::new();
            slots.try_reserve_exact(size)?;
            slots.resize_with(size, AtomicU32::default);
            cell.get_or_init(|| slots.into());
        }
        Ok(())
    }

    pub(crate) fn set(&self, id: ConnId, live: bool) {
        let index = id.index();
        // Memory was requested before, unless a callback has filled the slots that were free then.
        let slot = self.slot(index).or_else(|| {
            self.try_reserve(index).ok()?;
            self.slot(index)
        });
        if let Some(slot) = slot {
            slot.store(if live { id.generation() } else { 0 }, Ordering::Release);
        }
    }

    #[inline]
    fn slot(&self, index: u32) -> Option<&AtomicU32> {
        let (chunk, _, at) = Self::place(index);
        self.chunks.get(chunk)?.get()?.get(at)
    }

    pub(super) fn is_live(&self, id: ConnId) -> bool {
        self.server == id.server() && self.of(id.index()) == Some(id.generation())
    }

    /// Returns the live generation of a slot; 0 for none. `None` if the slot has no memory.
    pub(crate) fn of(&self, index: u32) -> Option<u32> {
        Some(self.slot(index)?.load(Ordering::Acquire))
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn each_slot_has_its_own_place() {
        let mut seen = std::collections::HashSet::new();
        for index in 0..crate::testing::rounds(5 * LARGEST) as u32 {
            let (chunk, size, at) = Liveness::place(index);
            assert!(chunk < CHUNKS && at < size && size == (FIRST << chunk.min(32)).min(LARGEST));
            assert!(seen.insert((chunk, at)), "slot {index} shares a place");
        }
        let (chunk, size, at) = Liveness::place(MAX_CONNECTIONS as u32 - 1);
        assert!(chunk < CHUNKS && at < size, "the last id has a place");
    }

    /// Threads read without asking the loop. In Miri they read stale values too.
    #[test]
    fn no_thread_sees_an_earlier_connection_after_a_later_one() {
        const LAST: u32 = 100;
        let live = Liveness::default();
        let id = |generation| ConnId::new(live.server(), 7, generation);
        thread::scope(|scope| {
            scope.spawn(|| {
                let mut latest = 0;
                while latest < LAST {
                    let seen = live.of(7).unwrap_or(0);
                    assert!(seen == 0 || seen >= latest, "{seen} after {latest}");
                    latest = latest.max(seen);
                    thread::yield_now();
                }
            });
            for generation in 1..LAST {
                live.set(id(generation), true);
                live.set(id(generation), false);
            }
            live.set(id(LAST), true);
        });
    }

    #[test]
    fn an_id_is_live_until_its_slot_has_another_connection() {
        let live = Liveness::default();
        let first = ConnId::new(live.server(), 77, 1);
        let second = ConnId::new(live.server(), 77, 2);
        let foreign = ConnId::new(Liveness::default().server(), 77, 1);
        assert!(!live.is_live(first));
        live.set(first, true);
        assert!(live.is_live(first) && !live.is_live(second) && !live.is_live(foreign));
        live.set(first, false);
        assert!(!live.is_live(first));
        live.set(second, true);
        assert!(!live.is_live(first) && live.is_live(second));
    }
}
