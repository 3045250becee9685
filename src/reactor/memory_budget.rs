//! The limit on the memory of all buffers: which connections are not read, and which are closed.
//!
//! While memory is tight, a connection that holds more than its share is not read. One of them at
//! a time has a read grant, so that large frames finish one after the other. The grant passes on
//! once there is nothing to read. Then connections whose peers stall are closed, if memory is not
//! free for the next one. Above the limit holders are closed in any case.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::rc::Rc;
use std::time::Duration;

use super::connections::Connections;
use super::memory_usage::MemoryUsage;
use crate::id::ConnId;
use crate::proto::{Held, SharedPayloads, State, Time, Traffic};
use crate::reason::{CloseReason, Closed};

/// How long one connection may read beyond its share while others are paused.
const GRANT: Duration = Duration::from_secs(1);
/// The shortest stall for which a connection is closed, to let others read.
const MIN_PATIENCE: Duration = Duration::from_millis(50);
/// A longer stall weighs no more: the size decides.
const MAX_STALL: Duration = Duration::from_secs(10);
/// What a connection weighs by its size alone.
const BASE_STALL: Duration = Duration::from_millis(10);
/// The first pause counts as a stall to this part: it is the server that does not read, but one
/// unread byte must not protect what a connection holds. A pause behind a grant counts in full.
const UNREAD_PART: u32 = 16;
/// A connection that has sent a whole frame weighs this part, and one that has used its last grant:
/// its peer is likely to finish another.
const PROVEN_PART: u128 = 16;
/// A grant is of use if it reads this part of what the connection holds.
const USEFUL_PART: usize = 8;
/// Connections closed at once for their stalls.
const BATCH: usize = 64;
/// How long spare memory stays after a storm. Meanwhile other connections are likely to give back
/// theirs, and a release costs up to some milliseconds.
const RELEASE_DELAY: Duration = Duration::from_millis(100);

#[derive(Debug)]
pub(super) struct MemoryBudget {
    usage: MemoryUsage,
    /// Connections that are not read because memory is tight.
    paused: Queue,
    /// The same, but each had the grant before, until its socket was dry.
    paused_again: Queue,
    /// Connections whose grant ended because their sockets were dry, and whether it was of use.
    had_grant: BTreeMap<ConnId, bool>,
    /// The next grant is for [`MemoryBudget::paused_again`].
    again: bool,
    /// The connection that is read all the same.
    grant: Option<Grant>,
    /// When spare memory is released.
    release_at: Time,
}

#[derive(Clone, Copy, Debug)]
struct Grant {
    id: ConnId,
    since: Time,
    /// There is nothing to read: when stalled connections are searched again.
    dry: Option<Time>,
    /// The pause that this grant ended, until the socket is dry.
    ended: Option<EndedPause>,
    /// Once dry: a good part of what the connection holds was read.
    useful: bool,
}

/// A pause whose time counts for the peer's stall, once everything that it sent meanwhile is read.
#[derive(Clone, Copy, Debug)]
struct EndedPause {
    span: Duration,
    /// The connection's traffic at that time.
    before: Traffic,
}

/// Connections that take turns, in the order of their ids.
#[derive(Debug, Default)]
struct Queue {
    ids: BTreeMap<ConnId, Pause>,
    last: Option<ConnId>,
}

#[derive(Clone, Copy, Debug)]
struct Pause {
    since: Time,
    /// For how long the peer had stalled by then.
    stall: Duration,
}

impl Queue {
    fn next(&mut self) -> Option<ConnId> {
        let behind = self.last.map_or(Bound::Unbounded, Bound::Excluded);
        let mut behind = self.ids.range((behind, Bound::Unbounded));
        let next = behind.next().or_else(|| self.ids.first_key_value());
        self.last = next.map(|(&id, _)| id);
        self.last
    }
}

impl MemoryBudget {
    pub(super) fn new(limit: Option<usize>, shared: &Rc<SharedPayloads>) -> Self {
        let limit = limit.unwrap_or(usize::MAX);
        Self {
            usage: MemoryUsage::new(limit, Rc::clone(shared)),
            paused: Queue::default(),
            paused_again: Queue::default(),
            had_grant: BTreeMap::new(),
            again: false,
            grant: None,
            release_at: Time::NEVER,
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

    /// Releases spare memory after a storm. Called between two turns: a connection in its turn has
    /// not returned its buffers yet.
    #[inline]
    pub(super) fn release_spare<S>(&mut self, conns: &mut Connections<S>, now: Time) {
        if self.release_at <= now {
            self.end_storm(conns);
        }
        // A fall meanwhile counts for the next one: what these connections gave back may lie behind
        // the rest.
        if self.release_at == Time::NEVER && self.usage.take_fall() {
            self.release_at = now.after(RELEASE_DELAY);
        }
    }

    #[cold]
    fn end_storm<S>(&mut self, conns: &mut Connections<S>) {
        self.release_at = Time::NEVER;
        self.usage.release();
        conns.release_spare();
    }

    /// When the grant may pass on, or spare memory is released.
    pub(super) fn wake_at(&self) -> Time {
        self.grant_until().min(self.release_at)
    }

    pub(super) fn paused(&self) -> usize {
        self.paused.ids.len() + self.paused_again.ids.len()
    }

    #[cfg(feature = "sim")]
    pub(super) fn is_paused(&self, id: ConnId) -> bool {
        self.pause(id).is_some()
    }

    /// When the read grant may pass to the next connection.
    ///
    /// A whole grant is long enough for a good part of a frame.
    fn grant_until(&self) -> Time {
        match self.grant {
            Some(grant) if self.paused() > 0 => {
                let all = grant.since.after(GRANT);
                grant.dry.map_or(all, |at| at.min(all))
            }
            _ => Time::NEVER,
        }
    }

    /// The maximum size of one read of this connection.
    #[inline]
    pub(super) fn max_read(&self, id: ConnId) -> usize {
        self.usage
            .max_read(self.grant.is_some_and(|grant| grant.id == id))
    }

    /// Accounts for what a connection's buffers hold now.
    #[inline]
    pub(super) fn measure<S>(&mut self, conns: &mut Connections<S>, id: ConnId, now: Time) {
        if let Some(held) = conns.get(id).map(|conn| conn.machine.memory()) {
            self.account(conns, id, held, now);
        }
    }

    /// Sets how many bytes a connection's buffers hold, at the end of its turn.
    #[inline]
    pub(super) fn account<S>(
        &mut self,
        conns: &mut Connections<S>,
        id: ConnId,
        held: Held,
        now: Time,
    ) {
        let at_rest = self.grant.is_none() && self.paused() == 0 && !self.usage.is_over();
        if !at_rest || self.usage.held(id.index()) != held {
            self.rebalance(conns, id, held, now);
        }
    }

    fn rebalance<S>(&mut self, conns: &mut Connections<S>, id: ConnId, held: Held, now: Time) {
        self.set(conns, id.index(), held, now);
        self.shed(conns, now);
        // It may have written its output, and other connections hold the rest.
        if self.usage.of(id.index()) <= self.usage.share() {
            self.had_grant.remove(&id);
            self.resume(conns, id, now);
            self.end_grant(conns, id, now);
        } else if let Some(grant) = self.grant.as_mut().filter(|grant| grant.id == id) {
            let is_dry = conns.get(id).is_none_or(|conn| !conn.can_read());
            grant.dry = is_dry.then(|| grant.dry.unwrap_or(now));
            if let Some(pause) = grant.ended.take_if(|_| is_dry) {
                if let Some(conn) = conns.get_mut(id) {
                    let count = conn.machine.count_pause(pause.span, pause.before, now);
                    grant.useful = count >= held.weight() / USEFUL_PART;
                }
            }
            self.pass_dry_grant(conns, now);
        }
    }

    /// The connection ends or leaves: it holds nothing from here on.
    #[inline]
    pub(super) fn forget<S>(&mut self, conns: &mut Connections<S>, id: ConnId, now: Time) {
        // Grants and pauses end when memory is not tight any more.
        if self.usage.of(id.index()) > 0 || self.usage.is_tight() {
            self.release(conns, id, now);
        }
    }

    fn release<S>(&mut self, conns: &mut Connections<S>, id: ConnId, now: Time) {
        self.set(conns, id.index(), Held::NOTHING, now);
        self.had_grant.remove(&id);
        self.unpause(conns, id, now);
        self.end_grant(conns, id, now);
    }

    /// Before a read: accounts for what the last read of the same turn left, and pauses the
    /// connection if it holds more than its share.
    pub(super) fn before_read<S>(&mut self, conns: &mut Connections<S>, id: ConnId, now: Time) {
        let Some(conn) = conns.get(id) else {
            return;
        };
        if self.usage.is_limited() {
            let held = conn.machine.memory();
            self.set(conns, id.index(), held, now);
        }
        if !self.usage.is_tight() || self.usage.of(id.index()) <= self.usage.share() {
            return;
        }
        let would_read = conns.get(id).is_some_and(|conn| {
            !conn.machine.has_events() && conn.can_read() && conn.machine.state() == State::Open
        });
        if !would_read || self.takes_grant(id, now) {
            return;
        }
        if let Some(conn) = conns.get_mut(id) {
            conn.paused_for_memory = true;
            let pause = Pause {
                since: now,
                stall: conn.machine.stalled_for(now),
            };
            let queue = match self.had_grant.contains_key(&id) {
                true => &mut self.paused_again,
                false => &mut self.paused,
            };
            queue.ids.insert(id, pause);
            self.pass_dry_grant(conns, now);
        }
    }

    /// True if the connection has the grant, or can have it.
    fn takes_grant(&mut self, id: ConnId, now: Time) -> bool {
        match &mut self.grant {
            Some(grant) => grant.id == id,
            None => {
                self.give_grant(id, None, now);
                true
            }
        }
    }

    fn give_grant(&mut self, id: ConnId, ended: Option<EndedPause>, now: Time) {
        self.grant = Some(Grant {
            id,
            since: now,
            dry: None,
            ended,
            useful: true,
        });
    }

    pub(super) fn set_limit<S>(&mut self, conns: &mut Connections<S>, limit: usize, now: Time) {
        self.usage.set_limit(limit);
        self.shed(conns, now);
        if !self.usage.is_tight() {
            self.resume_reads(conns, now);
        }
    }

    pub(super) fn expire<S>(&mut self, conns: &mut Connections<S>, due: Time, now: Time) {
        if self.grant_until() > due {
            return;
        }
        if self
            .grant
            .is_some_and(|grant| grant.since.after(GRANT) <= due)
        {
            self.pass_grant(conns, now);
        } else {
            self.pass_dry_grant(conns, now);
        }
    }

    /// Closes holders until the rest is within the limit: the largest, and those whose peers have
    /// stalled for long.
    fn shed<S>(&mut self, conns: &mut Connections<S>, now: Time) {
        while self.usage.is_over() {
            self.usage.move_sample();
            let heaviest = self.heaviest(conns, Duration::ZERO, now);
            let Some(index) = heaviest.or_else(|| self.usage.largest()) else {
                break;
            };
            self.close(conns, index, now);
        }
    }

    /// Closes connections whose peers have stalled, until the reserve is free for the next grant.
    fn close_stalled<S>(&mut self, conns: &mut Connections<S>, now: Time) {
        for _ in 0..BATCH {
            if self.usage.has_reserve() {
                return;
            }
            self.usage.move_sample();
            let Some(index) = self.heaviest(conns, self.patience(), now) else {
                return;
            };
            self.close(conns, index, now);
        }
    }

    /// How long a peer may stall while others wait for the memory that it holds: all who wait have
    /// about a grant's time together.
    fn patience(&self) -> Duration {
        let waiting = u32::try_from(self.paused().max(1)).unwrap_or(u32::MAX);
        (GRANT / waiting).max(MIN_PATIENCE)
    }

    /// Of the large holders that have stalled for `least`: the one with the greatest product of
    /// size and stall. A pause counts in part, where no other stall is as long.
    fn heaviest<S>(&self, conns: &Connections<S>, least: Duration, now: Time) -> Option<u32> {
        let weight = |(index, bytes): (u32, usize)| {
            let conn = conns.by_index(index)?;
            let grant = self.had_grant.get(&conn.id);
            let (stall, paused_for) = match self.pause(conn.id) {
                Some(pause) => (pause.stall, now.since(pause.since)),
                None => (conn.machine.stalled_for(now), Duration::ZERO),
            };
            let whole = stall
                + match grant {
                    Some(_) => paused_for,
                    None => paused_for / UNREAD_PART,
                };
            let stalled = BASE_STALL + whole.min(MAX_STALL);
            let is_proven = conn.machine.traffic().frames_in > 0 || grant == Some(&true);
            let part = if is_proven { PROVEN_PART } else { 1 };
            let product = bytes as u128 * stalled.as_micros() / part;
            (whole >= least).then_some((stall >= least, product, index))
        };
        let holders = self.usage.large_holders();
        let heaviest = holders.filter_map(weight).max()?;
        Some(heaviest.2)
    }

    fn close<S>(&mut self, conns: &mut Connections<S>, index: u32, now: Time) {
        if let Some(id) = conns.by_index(index).map(|conn| conn.id) {
            if let Some((conn, pool)) = conns.parts(id) {
                conn.machine
                    .reset(Closed::new(CloseReason::OverMemory), pool);
            }
            conns.wake(id);
        }
        // Behind the reset, with which a shared payload may go.
        self.set(conns, index, Held::NOTHING, now);
    }

    fn end_grant<S>(&mut self, conns: &mut Connections<S>, id: ConnId, now: Time) {
        if self.grant.is_some_and(|grant| grant.id == id) {
            self.pass_grant(conns, now);
        }
    }

    /// Passes on the grant if there is nothing to read and another connection is paused.
    ///
    /// Unless the reserve is free for the next one, the grant stays: else the beginnings of all
    /// frames would fill the memory, and none could be finished. The search for stalled connections
    /// visits many: it is due at [`Grant::dry`], not with each packet.
    fn pass_dry_grant<S>(&mut self, conns: &mut Connections<S>, now: Time) {
        let Some(dry) = self.grant.and_then(|grant| grant.dry) else {
            return;
        };
        if self.paused() == 0 {
            return;
        }
        let is_due = dry <= now;
        if is_due {
            self.close_stalled(conns, now);
        }
        let (has_reserve, next) = (self.usage.has_reserve(), now.after(self.patience()));
        let Some(grant) = &mut self.grant else {
            return;
        };
        if has_reserve {
            self.had_grant.insert(grant.id, grant.useful);
            self.pass_grant(conns, now);
        } else {
            // With more connections that wait, a stall is shorter.
            grant.dry = Some(if is_due { next } else { dry.min(next) });
        }
    }

    /// Ends the grant: the next paused connection may read. Those that have made progress before
    /// have every other grant.
    fn pass_grant<S>(&mut self, conns: &mut Connections<S>, now: Time) {
        self.grant = None;
        self.again = !self.again;
        let next = match self.again {
            true => self.paused_again.next().or_else(|| self.paused.next()),
            false => self.paused.next().or_else(|| self.paused_again.next()),
        };
        if let Some(next) = next {
            let ended = self.resume(conns, next, now);
            self.give_grant(next, ended, now);
        }
    }

    fn pause(&self, id: ConnId) -> Option<Pause> {
        let (paused, again) = (&self.paused.ids, &self.paused_again.ids);
        paused.get(&id).or_else(|| again.get(&id)).copied()
    }

    /// Ends the connection's pause, if there is one. Its time does not count for the peer's timeouts.
    fn unpause<S>(
        &mut self,
        conns: &mut Connections<S>,
        id: ConnId,
        now: Time,
    ) -> Option<EndedPause> {
        let (paused, again) = (&mut self.paused.ids, &mut self.paused_again.ids);
        let pause = paused.remove(&id).or_else(|| again.remove(&id));
        let (pause, conn) = (pause?, conns.get_mut(id)?);
        conn.paused_for_memory = false;
        let (span, before) = (now.since(pause.since), conn.machine.traffic());
        conn.machine.extend_input_deadlines(span, now);
        Some(EndedPause { span, before })
    }

    fn resume<S>(
        &mut self,
        conns: &mut Connections<S>,
        id: ConnId,
        now: Time,
    ) -> Option<EndedPause> {
        let ended = self.unpause(conns, id, now)?;
        conns.wake(id);
        Some(ended)
    }

    /// Sets the account of a slot. Where memory is no longer tight, reading resumes.
    fn set<S>(&mut self, conns: &mut Connections<S>, index: u32, held: Held, now: Time) {
        let was_tight = self.usage.is_tight();
        self.usage.set(index, held);
        if was_tight && !self.usage.is_tight() {
            self.resume_reads(conns, now);
        }
    }

    fn resume_reads<S>(&mut self, conns: &mut Connections<S>, now: Time) {
        self.grant = None;
        self.had_grant.clear();
        let (paused, again) = (&self.paused.ids, &self.paused_again.ids);
        let ids: Vec<_> = paused.keys().chain(again.keys()).copied().collect();
        for id in ids {
            self.resume(conns, id, now);
        }
    }
}

#[cfg(test)]
mod tests;
