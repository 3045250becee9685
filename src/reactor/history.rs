//! What is remembered of connections that have ended: the last closes, ages and handshake times.

use std::collections::VecDeque;
use std::time::Duration;

use super::panic_guard::PanicGuard;
use crate::addr::Addr;
use crate::catch::catch;
use crate::histogram::Histogram;
use crate::id::{ConnId, ListenerId};
use crate::proto::{Time, Traffic};
use crate::reason::Closed;
use crate::recent::{bounded_text, RecentClose};

/// An ended connection.
pub(super) struct CloseRecord {
    /// `None` for one that was refused because the cap was reached.
    pub(super) id: Option<ConnId>,
    pub(super) listener: Option<ListenerId>,
    pub(super) peer: Addr,
    pub(super) source: Addr,
    pub(super) age: Duration,
    pub(super) traffic: Traffic,
}

#[derive(Debug, Default)]
pub(super) struct History {
    closes: RecentCloses,
    pub(super) ages: Histogram,
    pub(super) handshake_times: Histogram,
}

impl History {
    pub(super) fn new(limit: usize) -> Self {
        let mut history = Self::default();
        history.set_limit(limit);
        history
    }

    /// Changes the number of closes that are kept.
    pub(super) fn set_limit(&mut self, limit: usize) {
        self.closes.set_limit(limit);
    }

    #[cfg(feature = "sim")]
    pub(super) fn closes_len(&self) -> usize {
        self.closes.ring.len()
    }

    /// Remembers a close. Once the limit is reached, nothing but an error's text is allocated.
    pub(super) fn record_close(
        &mut self,
        guard: &mut PanicGuard,
        record: CloseRecord,
        closed: &Closed,
        now: Time,
    ) {
        if self.closes.limit == 0 {
            return;
        }
        // The text of an error is foreign code.
        let error = closed.error.as_ref().map(|error| {
            catch(|| bounded_text(error)).unwrap_or_else(|panic| {
                let text = bounded_text(&panic);
                guard.report("an error's text", panic, None);
                text
            })
        });
        let close = RecentClose {
            id: record.id,
            listener: record.listener,
            peer: record.peer,
            source: record.source,
            reason: closed.reason,
            error,
            label: closed.label,
            age: record.age,
            traffic: record.traffic,
            ago: Duration::ZERO,
        };
        self.closes.push(now, close);
    }

    /// The last closes, up to `limit`, the latest first.
    pub(super) fn recent_closes(&self, now: Time, limit: usize) -> Vec<RecentClose> {
        let latest_first = self.closes.ring.iter().rev().take(limit);
        latest_first
            .map(|(at, close)| RecentClose {
                ago: now.since(*at),
                ..close.clone()
            })
            .collect()
    }
}

/// The last closes, oldest first.
#[derive(Debug, Default)]
struct RecentCloses {
    ring: VecDeque<(Time, RecentClose)>,
    limit: usize,
}

impl RecentCloses {
    fn set_limit(&mut self, limit: usize) {
        if limit < self.limit {
            self.ring.drain(..self.ring.len().saturating_sub(limit));
            self.ring.shrink_to(limit);
        }
        self.limit = limit;
    }

    fn push(&mut self, at: Time, close: RecentClose) {
        if self.ring.len() >= self.limit {
            self.ring.pop_front();
        }
        self.ring.push_back((at, close));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::ServerNumber;
    use crate::reason::CloseReason;

    fn close(ago: u64) -> RecentClose {
        let peer = Addr::from(std::net::SocketAddr::from(([127, 0, 0, 1], 1)));
        RecentClose {
            id: None,
            listener: Some(ListenerId::new(ServerNumber::NONE, 0)),
            peer: peer.clone(),
            source: peer,
            reason: CloseReason::Reset,
            error: None,
            label: None,
            age: Duration::from_secs(ago),
            traffic: Traffic::default(),
            ago: Duration::ZERO,
        }
    }

    /// It is bounded, and allocates nothing once it is full.
    #[test]
    fn the_ring_keeps_its_memory() {
        let mut closes = RecentCloses::default();
        closes.set_limit(100);
        for at in 0..100 {
            closes.push(Time::ZERO, close(at));
        }
        let capacity = closes.ring.capacity();
        for at in 100..100_000 {
            closes.push(Time::ZERO, close(at));
        }
        assert_eq!((closes.ring.len(), closes.ring.capacity()), (100, capacity));
        // The latest stay when it shrinks.
        closes.set_limit(3);
        assert!(closes.ring.capacity() < 100);
        let kept: Vec<_> = closes
            .ring
            .iter()
            .map(|(_, close)| close.age.as_secs())
            .collect();
        assert_eq!(kept, [99_997, 99_998, 99_999]);
    }
}
