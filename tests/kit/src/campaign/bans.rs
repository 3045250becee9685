//! A second account of the bans: no banned peer is served, and no other peer is denied for a ban.

use std::net::IpAddr;
use std::time::Duration;

use super::rules::contains;

/// A ban as it was made. One that was lifted or replaced is kept with its real end.
#[derive(Clone, Debug)]
struct Ban {
    network: &'static str,
    until: Duration,
}

/// Every ban of one world.
#[derive(Clone, Debug, Default)]
pub struct Bans {
    all: Vec<Ban>,
    now: Duration,
}

impl Bans {
    /// The time outside of the server, between two things that happen.
    pub fn set_now(&mut self, now: Duration) {
        self.now = now;
    }

    /// A network is banned now, for so long and not for what a former ban has left.
    pub fn ban(&mut self, network: &'static str, duration: Duration) {
        self.lift(network);
        self.all.push(Ban {
            network,
            until: self.now.saturating_add(duration),
        });
    }

    /// Ends a ban. Returns whether there was one; `None` at the moment of its end.
    pub fn lift(&mut self, network: &str) -> Option<bool> {
        let now = self.now;
        let mut bans = self.all.iter_mut();
        let Some(ban) = bans.rfind(|ban| ban.network == network) else {
            return Some(false);
        };
        let was_in_force = ban.until > now;
        let is_close = ban.until.abs_diff(now) < TICKS;
        ban.until = ban.until.min(now);
        (!is_close).then_some(was_in_force)
    }

    /// Networks that may be banned.
    pub fn networks(&self) -> Vec<&'static str> {
        self.all.iter().map(|ban| ban.network).collect()
    }

    /// Whether a ban of this address may have been in force at any time since `since`.
    pub fn may_deny(&self, address: IpAddr, since: Duration) -> bool {
        let mut bans = self.all.iter();
        bans.any(|ban| {
            let until = ban.until.saturating_add(TICKS);
            contains(ban.network, address) && until > since
        })
    }

    /// Number of bans so far.
    pub fn count(&self) -> usize {
        self.all.len()
    }

    /// Whether one of the first `count` bans is of this address and still in force.
    pub fn must_deny(&self, address: IpAddr, count: usize) -> bool {
        let mut bans = self.all.iter().take(count);
        bans.any(|ban| contains(ban.network, address) && ban.until > self.now)
    }
}

/// The most by which the clock outside and the server's differ.
const TICKS: Duration = Duration::from_millis(1);
