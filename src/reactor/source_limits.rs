//! Limits on connections per source: number and rate.

use std::collections::hash_map::Entry;
use std::collections::HashMap;
use std::net::IpAddr;
use std::time::Duration;

use ipnet::IpNet;

use crate::config::SourceLimits;
use crate::proto::{Bucket, Time};

/// Number of sources with a count of their own.
const MAX_SOURCES: usize = 65_536;
/// Interval at which a full table is searched for entries that can be removed.
const SWEEP_INTERVAL: Duration = Duration::from_secs(1);

/// The sources of one listener's connections.
#[derive(Debug)]
pub(super) struct Sources {
    apart: HashMap<IpAddr, Source>,
    /// Shared by all sources that found the table full.
    together: Source,
    most: usize,
    next_sweep: Time,
}

#[derive(Debug, Default)]
struct Source {
    connections: usize,
    bucket: Bucket,
}

/// Where a connection is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Counted {
    /// Nowhere.
    No,
    /// Under its source.
    Apart,
    /// With all sources that found the table full.
    Together,
}

impl Default for Sources {
    fn default() -> Self {
        Self::with_room_for(MAX_SOURCES)
    }
}

impl Sources {
    fn with_room_for(most: usize) -> Self {
        Self {
            apart: HashMap::new(),
            together: Source::default(),
            most,
            next_sweep: Time::ZERO,
        }
    }

    /// Counts a connection, unless its source has too many or connects too fast.
    pub(super) fn admit(
        &mut self,
        peer: IpAddr,
        limits: &SourceLimits,
        now: Time,
    ) -> Option<Counted> {
        if limits.rate.is_none() && limits.connections.is_none() {
            return Some(Counted::No);
        }
        let source = source_of(peer, limits.prefixes);
        if self.apart.len() >= self.most && !self.apart.contains_key(&source) {
            self.sweep(now);
        }
        let has_room = self.apart.len() < self.most;
        let (entry, counted) = match self.apart.entry(source) {
            Entry::Occupied(entry) => (entry.into_mut(), Counted::Apart),
            Entry::Vacant(place) if has_room => (place.insert(Source::default()), Counted::Apart),
            Entry::Vacant(_) => (&mut self.together, Counted::Together),
        };
        if limits
            .connections
            .is_some_and(|most| entry.connections >= most)
        {
            return None;
        }
        if limits
            .rate
            .is_some_and(|rate| !entry.bucket.take(&rate, now))
        {
            return None;
        }
        entry.connections += 1;
        Some(counted)
    }

    /// Uncounts a connection that was counted like this.
    pub(super) fn leave(
        &mut self,
        peer: IpAddr,
        limits: &SourceLimits,
        counted: Counted,
        now: Time,
    ) {
        let source = source_of(peer, limits.prefixes);
        let entry = match counted {
            Counted::No => return,
            Counted::Apart => self.apart.get_mut(&source),
            Counted::Together => Some(&mut self.together),
        };
        let Some(entry) = entry else {
            return;
        };
        entry.connections = entry.connections.saturating_sub(1);
        if counted == Counted::Apart && entry.is_idle(now) {
            self.apart.remove(&source);
        }
    }

    /// Adapts to a rate that may have changed.
    pub(super) fn follow(&mut self, limits: &SourceLimits, now: Time) {
        if let Some(rate) = limits.rate {
            for source in self.apart.values_mut().chain([&mut self.together]) {
                source.bucket.follow(&rate, now);
            }
        }
    }

    /// The fault in the counts, if these are the connections that they should count.
    #[cfg(feature = "sim")]
    pub(super) fn miscount(
        &self,
        connections: impl Iterator<Item = (IpAddr, Counted)>,
        limits: &SourceLimits,
    ) -> Option<String> {
        let (mut apart, mut together) = (HashMap::new(), 0);
        for (peer, counted) in connections {
            match counted {
                Counted::No => {}
                Counted::Apart => *apart.entry(source_of(peer, limits.prefixes)).or_insert(0) += 1,
                Counted::Together => together += 1,
            }
        }
        let (known, all) = (self.apart.len(), self.together.connections);
        if known > self.most || all != together {
            return Some(format!(
                "{known} sources, {all} connections beside them for {together}"
            ));
        }
        let gone = apart.keys().find(|source| !self.apart.contains_key(source));
        let wrong = self.apart.iter().find_map(|(source, entry)| {
            let true_count = apart.get(source).copied().unwrap_or(0);
            (entry.connections != true_count).then_some(source)
        });
        gone.or(wrong)
            .map(|source| format!("{source} is miscounted"))
    }

    fn sweep(&mut self, now: Time) {
        if self.next_sweep <= now {
            self.next_sweep = now.after(SWEEP_INTERVAL);
            self.apart.retain(|_, entry| !entry.is_idle(now));
        }
    }
}

impl Source {
    /// Whether the entry equals that of an unknown source.
    fn is_idle(&self, now: Time) -> bool {
        self.connections == 0 && self.bucket.is_full(now)
    }
}

/// The network of an address. An IPv4 peer of an IPv6 socket counts as IPv4.
fn source_of(peer: IpAddr, (ipv4, ipv6): (u8, u8)) -> IpAddr {
    let peer = peer.to_canonical();
    let prefix = if peer.is_ipv4() { ipv4 } else { ipv6 };
    IpNet::new(peer, prefix).map_or(peer, |network| network.network())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::Rate;

    fn at(millis: u64) -> Time {
        Time::from_start(Duration::from_millis(millis))
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    fn most(connections: usize) -> SourceLimits {
        SourceLimits {
            connections: Some(connections),
            ..SourceLimits::default()
        }
    }

    #[test]
    fn a_source_is_a_prefix() {
        for (one, other, same) in [
            ("192.0.2.1", "192.0.2.1", true),
            ("192.0.2.1", "192.0.2.2", false),
            ("192.0.2.1", "::ffff:192.0.2.1", true),
            ("2001:db8::1", "2001:db8::ffff:0:0:1", true),
            ("2001:db8::1", "2001:db8:0:1::1", false),
        ] {
            let prefixes = SourceLimits::default().prefixes;
            assert_eq!(
                source_of(ip(one), prefixes) == source_of(ip(other), prefixes),
                same,
                "{one} {other}"
            );
        }
    }

    #[test]
    fn each_source_has_so_many_at_one_time() {
        let (mut sources, limits) = (Sources::default(), most(2));
        let (one, other) = (ip("192.0.2.1"), ip("192.0.2.2"));
        assert_eq!(sources.admit(one, &limits, at(0)), Some(Counted::Apart));
        assert_eq!(sources.admit(one, &limits, at(0)), Some(Counted::Apart));
        assert_eq!(sources.admit(one, &limits, at(0)), None);
        assert_eq!(sources.admit(other, &limits, at(0)), Some(Counted::Apart));
        sources.leave(one, &limits, Counted::Apart, at(1));
        assert_eq!(sources.admit(one, &limits, at(1)), Some(Counted::Apart));
        for peer in [one, one, other] {
            sources.leave(peer, &limits, Counted::Apart, at(2));
        }
        assert!(sources.apart.is_empty(), "nothing is left behind");
    }

    #[test]
    fn each_source_comes_so_fast() {
        let limits = SourceLimits {
            rate: Some(Rate::per_second(1).burst(3)),
            ..SourceLimits::default()
        };
        let mut sources = Sources::default();
        let peer = ip("192.0.2.1");
        let admitted = |sources: &mut Sources, now| {
            (0..9)
                .filter(|_| {
                    let counted = sources.admit(peer, &limits, now);
                    counted
                        .inspect(|&counted| sources.leave(peer, &limits, counted, now))
                        .is_some()
                })
                .count()
        };
        assert_eq!(admitted(&mut sources, at(0)), 3);
        assert_eq!(
            admitted(&mut sources, at(999)),
            0,
            "leaving does not make it forgotten"
        );
        assert_eq!(admitted(&mut sources, at(1000)), 1);
        assert_eq!(admitted(&mut sources, at(60_000)), 3);
    }

    /// The table is bounded: sources that find it full share one limit, and those in it keep
    /// theirs.
    #[test]
    fn a_full_table_is_shared() {
        let (mut sources, limits) = (Sources::with_room_for(2), most(1));
        let peers: Vec<_> = (1..=4).map(|last| ip(&format!("192.0.2.{last}"))).collect();
        let counted: Vec<_> = peers
            .iter()
            .map(|&peer| sources.admit(peer, &limits, at(0)))
            .collect();
        assert_eq!(
            counted,
            [
                Some(Counted::Apart),
                Some(Counted::Apart),
                Some(Counted::Together),
                None
            ]
        );
        sources.leave(peers[0], &limits, Counted::Apart, at(1));
        assert_eq!(
            sources.admit(peers[3], &limits, at(1)),
            Some(Counted::Apart)
        );
        sources.leave(peers[2], &limits, Counted::Together, at(2));
        assert_eq!(sources.together.connections, 0);
    }

    /// Old entries are removed for new sources.
    #[test]
    fn a_full_table_is_swept() {
        let limits = SourceLimits {
            rate: Some(Rate::per_second(1).burst(1)),
            ..SourceLimits::default()
        };
        let mut sources = Sources::with_room_for(1);
        let (one, other) = (ip("192.0.2.1"), ip("192.0.2.2"));
        assert_eq!(sources.admit(one, &limits, at(0)), Some(Counted::Apart));
        sources.leave(one, &limits, Counted::Apart, at(0));
        assert_eq!(
            sources.admit(other, &limits, at(500)),
            Some(Counted::Together)
        );
        assert_eq!(
            sources.admit(other, &limits, at(5000)),
            Some(Counted::Apart)
        );
        assert_eq!(sources.apart.len(), 1);
    }

    #[test]
    fn without_limits_no_source_is_counted() {
        let mut sources = Sources::default();
        let limits = SourceLimits::default();
        assert_eq!(
            sources.admit(ip("192.0.2.1"), &limits, at(0)),
            Some(Counted::No)
        );
        assert!(sources.apart.is_empty());
    }
}
