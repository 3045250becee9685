//! The limit on the memory of all buffers: which connections are not read, and which are closed.
//!
//! While memory is tight, a connection that holds more than its share is not read. One of them at
//! a time has a read grant, so that large frames finish one after the other. Above the limit the
//! largest holders are closed.

use std::collections::BTreeSet;
use std::ops::Bound;
use std::time::Duration;

use super::connections::Connections;
use super::memory_usage::MemoryUsage;
use crate::id::ConnId;
use crate::proto::{State, Time};
use crate::reason::{CloseReason, Closed};

/// How long one connection may read beyond its share while others are paused.
const GRANT: Duration = Duration::from_secs(1);

#[derive(Debug)]
pub(super) struct MemoryBudget {
    usage: MemoryUsage,
    /// Connections that are not read because memory is tight.
    paused: BTreeSet<ConnId>,
    /// The connection that is read all the same, and since when.
    grant: Option<(ConnId, Time)>,
}

impl MemoryBudget {
    pub(super) fn new(limit: usize) -> Self {
        Self {
            usage: MemoryUsage::new(limit),
            paused: BTreeSet::new(),
            grant: None,
        }
    }

    pub(super) fn total(&self) -> usize {
        self.usage.total()
    }

    #[inline]
    pub(super) fn is_limited(&self) -> bool {
        self.usage.is_limited()
    }

    #[inline]
    pub(super) fn is_tight(&self) -> bool {
        self.usage.is_tight()
    }

    #[cfg(feature = "sim")]
    pub(super) fn is_over(&self) -> bool {
        self.usage.is_over()
    }

    pub(super) fn paused(&self) -> usize {
        self.paused.len()
    }

    #[cfg(feature = "sim")]
    pub(super) fn is_paused(&self, id: ConnId) -> bool {
        self.paused.contains(&id)
    }

    /// When the read grant passes to the next connection: its time is long enough for a good part
    /// of a frame.
    pub(super) fn grant_until(&self) -> Time {
        match self.grant {
            Some((_, since)) if !self.paused.is_empty() => since.after(GRANT),
            _ => Time::NEVER,
        }
    }

    /// The maximum size of one read of this connection.
    #[inline]
    pub(super) fn max_read(&self, id: ConnId) -> usize {
        self.usage
            .max_read(self.grant.is_some_and(|(granted, _)| granted == id))
    }

    /// Sets how many bytes a connection's buffers hold.
    #[inline]
    pub(super) fn account<S>(&mut self, conns: &mut Connections<S>, id: ConnId, bytes: usize) {
        let at_rest = self.grant.is_none() && self.paused.is_empty() && !self.usage.is_over();
        if !at_rest || self.usage.of(id.index()) != bytes {
            self.rebalance(conns, id, bytes);
        }
    }

    fn rebalance<S>(&mut self, conns: &mut Connections<S>, id: ConnId, bytes: usize) {
        self.set(conns, id.index(), bytes);
        self.shed(conns);
        // It may have written its output, and other connections hold the rest.
        if self.usage.of(id.index()) <= self.usage.share() {
            self.resume(conns, id);
            self.end_grant(conns, id);
        }
    }

    /// The connection ends or leaves: it holds nothing from here on.
    #[inline]
    pub(super) fn forget<S>(&mut self, conns: &mut Connections<S>, id: ConnId) {
        if self.usage.of(id.index()) > 0 || self.grant.is_some() || !self.paused.is_empty() {
            self.release(conns, id);
        }
    }

    fn release<S>(&mut self, conns: &mut Connections<S>, id: ConnId) {
        self.set(conns, id.index(), 0);
        self.paused.remove(&id);
        if let Some(conn) = conns.get_mut(id) {
            conn.paused_for_memory = false;
        }
        self.end_grant(conns, id);
    }

    /// Before a read: accounts for what the last read of the same turn left, and pauses the
    /// connection if it holds more than its share.
    pub(super) fn before_read<S>(&mut self, conns: &mut Connections<S>, id: ConnId, now: Time) {
        let Some(conn) = conns.get(id) else {
            return;
        };
        if self.usage.is_limited() {
            let bytes = conn.machine.memory();
            self.set(conns, id.index(), bytes);
        }
        if !self.usage.is_tight() || self.usage.of(id.index()) <= self.usage.share() {
            return;
        }
        let would_read = conns.get(id).is_some_and(|conn| {
            !conn.machine.has_events() && conn.can_read() && conn.machine.state() == State::Open
        });
        if would_read && self.grant.get_or_insert((id, now)).0 != id {
            if let Some(conn) = conns.get_mut(id) {
                conn.paused_for_memory = true;
                self.paused.insert(id);
            }
        }
    }

    pub(super) fn set_limit<S>(&mut self, conns: &mut Connections<S>, limit: usize) {
        self.usage.set_limit(limit);
        self.shed(conns);
        if !self.usage.is_tight() {
            self.resume_reads(conns);
        }
    }

    pub(super) fn expire<S>(&mut self, conns: &mut Connections<S>, due: Time) {
        if self.grant_until() <= due {
            self.pass_grant(conns);
        }
    }

    /// Closes the largest holders until the rest is within the limit.
    fn shed<S>(&mut self, conns: &mut Connections<S>) {
        while self.usage.is_over() {
            let Some(index) = self.usage.largest() else {
                break;
            };
            self.set(conns, index, 0);
            let Some(id) = conns.by_index(index).map(|conn| conn.id) else {
                continue;
            };
            if let Some((conn, pool)) = conns.parts(id) {
                conn.machine
                    .reset(Closed::new(CloseReason::OverMemory), pool);
            }
            conns.wake(id);
        }
    }

    fn end_grant<S>(&mut self, conns: &mut Connections<S>, id: ConnId) {
        if self.grant.is_some_and(|(granted, _)| granted == id) {
            self.pass_grant(conns);
        }
    }

    /// The next paused connection may read.
    fn pass_grant<S>(&mut self, conns: &mut Connections<S>) {
        let Some((last, _)) = self.grant.take() else {
            return;
        };
        let mut behind = self.paused.range((Bound::Excluded(last), Bound::Unbounded));
        if let Some(&next) = behind.next().or_else(|| self.paused.first()) {
            self.resume(conns, next);
        }
    }

    fn resume<S>(&mut self, conns: &mut Connections<S>, id: ConnId) {
        if self.paused.remove(&id) {
            if let Some(conn) = conns.get_mut(id) {
                conn.paused_for_memory = false;
            }
            conns.wake(id);
        }
    }

    /// Sets the account of a slot. Where memory is no longer tight, reading resumes.
    fn set<S>(&mut self, conns: &mut Connections<S>, index: u32, bytes: usize) {
        let was_tight = self.usage.is_tight();
        self.usage.set(index, bytes);
        if was_tight && !self.usage.is_tight() {
            self.resume_reads(conns);
        }
    }

    fn resume_reads<S>(&mut self, conns: &mut Connections<S>) {
        self.grant = None;
        while let Some(&id) = self.paused.first() {
            self.resume(conns, id);
        }
    }
}
