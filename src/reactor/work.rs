//! The work of one iteration: what each step costs, and how much is left.
//!
//! Work is counted and not timed: the clock is not read for each step, and the same seed gives the
//! same trace. The unit is that of [`Budgets::work`](crate::Budgets::work): the work of one byte.
//! That is 0.2 ns on a processor of 2024, and the constants here are what the other steps took
//! there. Traffic is counted where it happens, in the totals of the server.

use crate::proto::Traffic;

/// One frame, in or out, beside its bytes.
const FRAME: u64 = 64;
/// A small step: a command, a timer that has fired, an accept that finds no client.
pub(super) const STEP: u64 = 1024;
/// A connection's turn: its system calls.
pub(super) const TURN: u64 = 24 * 1024;
/// The end of a connection: its socket and its last callback.
pub(super) const CLOSE: u64 = 24 * 1024;
/// A client: the system calls for its socket, its service and its handler.
pub(super) const ACCEPT: u64 = 24 * 1024;
/// An attempt to connect: a socket, and this side of TCP's handshake.
pub(super) const CONNECT: u64 = 64 * 1024;
/// One flight of a TLS handshake: asymmetric cryptography.
pub(super) const HANDSHAKE: u64 = 512 * 1024;

/// Each stage of an iteration has at least this part of the budget, so that none starves.
const SHARE: u64 = 16;

/// The work of the running iteration. All numbers are totals since the server began.
#[derive(Debug, Default)]
pub(super) struct Work {
    budget: u64,
    /// The cost of all steps, traffic excluded.
    steps: u64,
    /// No step begins once this much was done.
    until: u64,
}

impl Work {
    /// Begins an iteration with the whole budget.
    pub(super) fn begin(&mut self, budget: usize, traffic: &Traffic) {
        self.budget = budget as u64;
        self.until = self.done(traffic).saturating_add(self.budget);
    }

    /// Begins another kind of work: at least one step of it is done.
    pub(super) fn begin_stage(&mut self, traffic: &Traffic) {
        let share = (self.budget / SHARE).max(1);
        let until = self.done(traffic).saturating_add(share);
        self.until = self.until.max(until);
    }

    #[inline]
    pub(super) fn charge(&mut self, cost: u64) {
        self.steps = self.steps.wrapping_add(cost);
    }

    /// Another step may begin.
    #[inline]
    pub(super) fn is_left(&self, traffic: &Traffic) -> bool {
        self.done(traffic) < self.until
    }

    #[inline]
    fn done(&self, traffic: &Traffic) -> u64 {
        let bytes = traffic.bytes_in.wrapping_add(traffic.bytes_out);
        let frames = traffic.frames_in.wrapping_add(traffic.frames_out);
        bytes
            .wrapping_add(frames.wrapping_mul(FRAME))
            .wrapping_add(self.steps)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spent_budget_leaves_each_stage_its_share() {
        let (mut work, mut traffic) = (Work::default(), Traffic::default());
        work.begin(16_000, &traffic);
        traffic.bytes_in += 7_000;
        traffic.frames_out += 100;
        work.charge(2_599);
        assert!(work.is_left(&traffic));
        work.charge(1);
        assert!(!work.is_left(&traffic));
        work.begin_stage(&traffic);
        work.charge(999);
        assert!(work.is_left(&traffic));
        work.charge(1);
        assert!(!work.is_left(&traffic));
    }

    #[test]
    fn the_smallest_budget_allows_one_step_of_each_stage() {
        let (mut work, traffic) = (Work::default(), Traffic::default());
        work.begin(1, &traffic);
        for _ in 0..3 {
            work.begin_stage(&traffic);
            assert!(work.is_left(&traffic));
            work.charge(TURN);
            assert!(!work.is_left(&traffic));
        }
    }
}
