//! What a world has shown: which faults met connections at which stage of their lives, and how those lives went on.

use std::collections::BTreeMap;
use std::fmt;

use super::faults::Fault;
use crate::proto::State;

/// Where a connection is in its life, as the simulator sees it between two turns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Stage {
    /// No connection is concerned: a poll, a listener, an event for nobody.
    Nobody,
    /// Accepted in this very turn, or an attempt to connect that was begun in it.
    New,
    /// [`State::Accepting`], since an earlier turn: its PROXY header has not come.
    Accepting,
    /// [`State::Connecting`].
    Connecting,
    /// [`State::Handshaking`].
    Handshaking,
    /// [`State::Open`].
    Open,
    /// [`State::Closing`].
    Closing,
    /// Gone.
    Gone,
}

impl Stage {
    /// Every change that a turn may bring. One that goes through several states in a turn is seen in the last.
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

/// How often what happened to whom. From [`Sim::take_coverage`](super::Sim::take_coverage).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Coverage {
    /// Faults, by the stage at which the turn met the connection that they hit.
    pub faults: BTreeMap<(Fault, Stage), u64>,
    /// Changes from one stage to another.
    pub moves: BTreeMap<(Stage, Stage), u64>,
}

impl Coverage {
    /// Adds what another world has shown.
    pub fn add(&mut self, other: &Self) {
        for (&cell, &count) in &other.faults {
            *self.faults.entry(cell).or_default() += count;
        }
        for (&change, &count) in &other.moves {
            *self.moves.entry(change).or_default() += count;
        }
    }
}

/// What the kernel notes in a turn, if somebody wants to know. Clients by number.
#[derive(Debug, Default)]
pub(super) struct Notes {
    pub(super) struck: Vec<(Fault, Option<usize>)>,
    pub(super) begun: Vec<usize>,
}

/// Follows each connection from turn to turn.
#[derive(Debug, Default)]
pub(super) struct Recorder {
    pub(super) coverage: Coverage,
    /// After the last turn.
    stages: BTreeMap<usize, Stage>,
}

impl Recorder {
    /// Takes down one turn: what the kernel has noted, and who is where after it. A change that no connection may make.
    pub(super) fn record(&mut self, notes: Notes, now: BTreeMap<usize, Stage>) -> Option<String> {
        let mut illegal = None;
        let Notes { struck, begun } = notes;
        self.stages
            .extend(begun.into_iter().map(|client| (client, Stage::New)));
        for (fault, client) in struck {
            let stage = client.map_or(Stage::Nobody, |client| {
                self.stages.get(&client).copied().unwrap_or(Stage::Nobody)
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
