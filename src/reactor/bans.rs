//! Networks that are banned for a time.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;

use crate::access::Prefix;
use crate::proto::Time;

/// Bans in force. The documentation of `Control::ban` names it.
const MAX_BANS: usize = 65_536;
/// Bans that are over, removed for each new one: more than one, so that they do not pile up.
const REMOVED: usize = 8;

/// The bans of one server. No timer: a ban that is over decides nothing, and is removed later.
#[derive(Debug, Default)]
pub(super) struct Bans {
    ends: HashMap<Prefix, Time>,
    order: BTreeSet<(Time, Prefix)>,
    /// Number of bans for each length of a prefix, of IPv4 and of IPv6.
    lengths: [BTreeMap<u8, usize>; 2],
}

impl Bans {
    /// Bans until `until`, instead of until the former end if there is one.
    pub(super) fn ban(&mut self, network: Prefix, until: Time, now: Time) {
        self.remove(network);
        for _ in 0..REMOVED {
            self.remove_first_if(|end| end <= now);
        }
        if self.ends.len() >= MAX_BANS {
            self.remove_first_if(|_| true);
        }
        self.ends.insert(network, until);
        self.order.insert((until, network));
        *self.lengths_of(network).entry(network.len()).or_default() += 1;
    }

    /// Returns whether the network was banned.
    pub(super) fn unban(&mut self, network: Prefix, now: Time) -> bool {
        self.remove(network).is_some_and(|end| end > now)
    }

    /// Whether the peer at this address is banned. Peers of a Unix socket have none.
    #[inline]
    pub(super) fn contains(&self, address: Option<IpAddr>, now: Time) -> bool {
        !self.ends.is_empty() && address.is_some_and(|address| self.matches(address, now))
    }

    fn matches(&self, address: IpAddr, now: Time) -> bool {
        let address = Prefix::of_address(address);
        let [v4, v6] = &self.lengths;
        let lengths = if address.is_v6() { v6 } else { v4 };
        lengths.keys().any(|&len| {
            let end = self.ends.get(&address.truncated(len));
            end.is_some_and(|&end| end > now)
        })
    }

    fn lengths_of(&mut self, network: Prefix) -> &mut BTreeMap<u8, usize> {
        let [v4, v6] = &mut self.lengths;
        if network.is_v6() {
            v6
        } else {
            v4
        }
    }

    fn remove_first_if(&mut self, is_over: impl Fn(Time) -> bool) {
        if let Some(&(end, network)) = self.order.first() {
            if is_over(end) {
                self.remove(network);
            }
        }
    }

    fn remove(&mut self, network: Prefix) -> Option<Time> {
        let end = self.ends.remove(&network)?;
        self.order.remove(&(end, network));
        let lengths = self.lengths_of(network);
        if let Some(count) = lengths.get_mut(&network.len()) {
            *count -= 1;
            if *count == 0 {
                lengths.remove(&network.len());
            }
        }
        Some(end)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn at(seconds: u64) -> Time {
        Time::from_start(Duration::from_secs(seconds))
    }

    fn network(text: &str) -> Prefix {
        Prefix::of_network(text.parse().expect("a network"))
    }

    fn is_banned(bans: &Bans, address: &str, seconds: u64) -> bool {
        bans.contains(Some(address.parse().expect("an address")), at(seconds))
    }

    #[test]
    fn a_ban_ends_at_its_time() {
        let mut bans = Bans::default();
        assert!(!is_banned(&bans, "192.0.2.1", 0));
        bans.ban(network("192.0.2.0/24"), at(10), at(0));
        bans.ban(network("192.0.2.7/32"), at(20), at(0));
        bans.ban(network("2001:db8::/32"), at(5), at(0));
        assert!(is_banned(&bans, "::ffff:192.0.2.1", 9) && is_banned(&bans, "192.0.2.7", 9));
        assert!(!is_banned(&bans, "192.0.3.1", 9));
        assert!(is_banned(&bans, "2001:db8::1", 4) && !is_banned(&bans, "2001:db8::1", 5));
        assert!(!is_banned(&bans, "192.0.2.1", 10) && is_banned(&bans, "192.0.2.7", 10));
        assert!(bans.unban(network("192.0.2.7/32"), at(10)));
        assert!(!bans.unban(network("192.0.2.7/32"), at(10)));
        assert!(!bans.unban(network("192.0.2.0/24"), at(10)), "it is over");
        assert!(!is_banned(&bans, "192.0.2.7", 10));
        // A second ban of a network has the end that counts, earlier or later.
        bans.ban(network("192.0.2.1/32"), Time::NEVER, at(10));
        bans.ban(network("192.0.2.1/32"), at(11), at(10));
        assert!(is_banned(&bans, "192.0.2.1", 10) && !is_banned(&bans, "192.0.2.1", 11));
    }

    /// What is over is removed for the new, and what ends first when there is no room.
    #[test]
    fn their_number_is_bounded() {
        let mut bans = Bans::default();
        let host = |n: usize| network(&format!("10.{}.{}.{}/32", n >> 16, n >> 8 & 255, n & 255));
        for n in 0..MAX_BANS + 10 {
            bans.ban(host(n), at(1000 + n as u64), at(0));
        }
        assert_eq!((bans.ends.len(), bans.order.len()), (MAX_BANS, MAX_BANS));
        assert!(!is_banned(&bans, "10.0.0.9", 0) && is_banned(&bans, "10.0.0.10", 0));
        let later = at(1000 + 2 * MAX_BANS as u64);
        for n in 0..MAX_BANS / 4 {
            bans.ban(host(n), Time::NEVER, later);
        }
        assert_eq!(bans.ends.len(), MAX_BANS / 4, "only those that are new");
        for n in 0..MAX_BANS / 4 {
            bans.unban(host(n), later);
        }
        assert!(bans.order.is_empty() && bans.lengths.iter().all(BTreeMap::is_empty));
    }
}
