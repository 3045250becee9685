//! Coverage of a world: which faults hit connections at which stage, and the changes of stage.

use std::collections::BTreeMap;
use std::fmt;

use super::faults::Fault;
use crate::proto::State;

/// A connection's stage, as the simulator sees it between two iterations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Stage {
    /// No connection is concerned: a poll, a listener, an event without an owner.
    NoConnection,
    /// Accepted in this very iteration, or an attempt to connect that was started in it.
    New,
    /// [`State::Accepting`], since an earlier iteration: its PROXY header is incomplete.
    Accepting,
    /// [`State::Connecting`].
    Connecting,
    /// [`State::Handshaking`].
    Handshaking,
    /// [`State::Open`].
    Open,
    /// [`State::Closing`].
    Closing,
    /// Ended.
    Gone,
}

impl Stage {
    /// All changes that an iteration may cause. Of several changes in one iteration the last is
    /// seen.
    pub const MOVES: &'static [(Self, Self)] = &[
        (Self::New, Self::Accepting),
        (Self::New, Self::Connecting),
        (Self::New, Self::Handshaking),
        (Self::New, Self::Open),
        (Self::New, Self::Closing),
        (Self::New, Self::Gone),
        (Self::Accepting, Self::Handshaking),
        (Self::Accepting, Self::Open),
        (Self::Accepting, Self::Closing),
        (Self::Accepting, Self::Gone),
        (Self::Connecting, Self::Handshaking),
        (Self::Connecting, Self::Open),
        (Self::Connecting, Self::Closing),
        (Self::Connecting, Self::Gone),
        (Self::Handshaking, Self::Open),
        (Self::Handshaking, Self::Closing),
        (Self::Handshaking, Self::Gone),
        (Self::Open, Self::Handshaking),
        (Self::Open, Self::Closing),
        (Self::Open, Self::Gone),
        (Self::Closing, Self::Gone),
    ];

    pub(super) fn of(state: State) -> Self {
        match state {
            State::Accepting => Self::Accepting,
            State::Connecting => Self::Connecting,
            State::Handshaking => Self::Handshaking,
            State::Open => Self::Open,
            State::Closing => Self::Closing,
        }
    }
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// Counts of faults and changes, from [`Sim::take_coverage`](super::Sim::take_coverage).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Coverage {
    /// Faults, by the stage of the connection that they hit.
    pub faults: BTreeMap<(Fault, Stage), u64>,
    /// Changes from one stage to another.
    pub moves: BTreeMap<(Stage, Stage), u64>,
}

impl Coverage {
    /// Adds the coverage of another world.
    pub fn add(&mut self, other: &Self) {
        for (&cell, &count) in &other.faults {
            *self.faults.entry(cell).or_default() += count;
        }
        for (&change, &count) in &other.moves {
            *self.moves.entry(change).or_default() += count;
        }
    }
}

/// The kernel's notes of one iteration, if coverage is kept. Clients by number.
#[derive(Debug, Default)]
pub(super) struct Notes {
    pub(super) struck: Vec<(Fault, Option<usize>)>,
    pub(super) begun: Vec<usize>,
}

/// Follows each connection from iteration to iteration.
#[derive(Debug, Default)]
pub(super) struct Recorder {
    pub(super) coverage: Coverage,
    /// The stages after the last iteration.
    stages: BTreeMap<usize, Stage>,
}

impl Recorder {
    /// Records one iteration: the kernel's notes, and the stages after it. Returns a change that is
    /// not permitted.
    pub(super) fn record(&mut self, notes: Notes, now: BTreeMap<usize, Stage>) -> Option<String> {
        let mut illegal = None;
        let Notes { struck, begun } = notes;
        self.stages
            .extend(begun.into_iter().map(|client| (client, Stage::New)));
        for (fault, client) in struck {
            let stage = client.map_or(Stage::NoConnection, |client| {
                self.stages
                    .get(&client)
                    .copied()
                    .unwrap_or(Stage::NoConnection)
            });
            *self.coverage.faults.entry((fault, stage)).or_default() += 1;
        }
        for (client, &before) in &self.stages {
            let after = now.get(client).copied().unwrap_or(Stage::Gone);
            if before == after {
                continue;
            }
            *self.coverage.moves.entry((before, after)).or_default() += 1;
            if !Stage::MOVES.contains(&(before, after)) {
                illegal = Some(format!("client {client} went from {before} to {after}"));
            }
        }
        self.stages = now;
        illegal
    }
}
