//! Episodes of what an operator should know: one warning when one begins, and one line with the
//! count when it is over. Peers can cause them, so each cause has at most one such pair of lines in
//! [`QUIET`].

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use crate::addr::Addr;
use crate::id::ListenerId;
use crate::logs;
use crate::proto::Time;

/// An episode is over when its cause was gone for this long.
pub(super) const QUIET: Duration = Duration::from_secs(60);
/// Number of backends with an episode of their own; the others share one.
const MAX_BACKENDS: usize = 64;

/// One episode.
#[derive(Debug, Default)]
pub(super) struct Episode {
    /// Occurrences; zero outside of an episode.
    count: u64,
    over_at: Option<Time>,
}

impl Episode {
    pub(super) fn is_on(&self) -> bool {
        self.count > 0
    }

    /// Occurrences in this episode.
    pub(super) fn count(&self) -> u64 {
        self.count
    }

    /// When the episode is over, if nothing occurs before.
    pub(super) fn over_at(&self) -> Time {
        self.over_at.unwrap_or(Time::NEVER)
    }

    /// Counts an occurrence. True if an episode begins.
    pub(super) fn note(&mut self) -> bool {
        self.over_at = None;
        self.count += 1;
        self.count == 1
    }

    /// The cause is gone: the episode is over at `at`, unless it is noted again.
    pub(super) fn calm(&mut self, at: Time) {
        if self.is_on() && self.over_at.is_none() {
            self.over_at = Some(at);
        }
    }

    /// Ends the episode if that is due. Returns the number of occurrences.
    pub(super) fn expire(&mut self, due: Time) -> Option<u64> {
        if self.over_at() > due {
            return None;
        }
        self.over_at = None;
        Some(std::mem::take(&mut self.count))
    }
}

/// What an episode is about.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Cause {
    /// The cap of the server, or of all servers that share it, is reached.
    Cap,
    /// A listener's own cap is reached.
    ListenerCap(ListenerId),
    /// An address cannot be connected to.
    Backend(Addr),
    /// Further addresses.
    OtherBackends,
}

/// The episodes of one server. Only those that are on take memory.
#[derive(Debug, Default)]
pub(super) struct Episodes {
    on: BTreeMap<Cause, Episode>,
    backends: usize,
    /// No episode is over before.
    next_over: Option<Time>,
}

impl Episodes {
    pub(super) fn is_on(&self, cause: &Cause) -> bool {
        !self.on.is_empty() && self.on.contains_key(cause)
    }

    /// When the next episode may be over.
    pub(super) fn next_over(&self) -> Time {
        self.next_over.unwrap_or(Time::NEVER)
    }

    /// Counts an occurrence. True if an episode begins: the caller logs the warning.
    pub(super) fn note(&mut self, cause: Cause) -> bool {
        self.on.entry(cause).or_default().note()
    }

    /// As [`Episodes::note`], for a failed attempt to connect.
    pub(super) fn note_backend(&mut self, addr: &Addr, error: &dyn fmt::Display) {
        let mut cause = Cause::Backend(addr.clone());
        if !self.on.contains_key(&cause) {
            if self.backends < MAX_BACKENDS {
                self.backends += 1;
            } else {
                cause = Cause::OtherBackends;
            }
        }
        if self.note(cause) {
            logs::warning!(target: logs::CONNECTION, "cannot connect to {addr}: {error}");
        }
    }

    /// The cause is gone: its episode is over after [`QUIET`].
    pub(super) fn calm(&mut self, cause: &Cause, now: Time) {
        if self.on.is_empty() {
            return;
        }
        if let Some(episode) = self.on.get_mut(cause) {
            episode.calm(now.after(QUIET));
            let over_at = episode.over_at();
            self.next_over = Some(self.next_over().min(over_at));
        }
    }

    /// An attempt to connect is over: it succeeded, or is not repeated.
    pub(super) fn calm_backend(&mut self, addr: &Addr, now: Time) {
        if self.on.is_empty() {
            return;
        }
        let cause = Cause::Backend(addr.clone());
        if self.is_on(&cause) {
            self.calm(&cause, now);
        } else {
            self.calm(&Cause::OtherBackends, now);
        }
    }

    /// Ends the episodes that are over, with one line each. `listener` names a listener.
    pub(super) fn expire(&mut self, due: Time, listener: impl Fn(ListenerId) -> String) {
        if self.next_over() > due {
            return;
        }
        let (mut backends, mut next) = (self.backends, Time::NEVER);
        self.on.retain(|cause, episode| {
            let Some(count) = episode.expire(due) else {
                next = next.min(episode.over_at());
                return true;
            };
            match cause {
                Cause::Cap => logs::info!(
                    target: logs::SERVER,
                    "slots have been free for {QUIET:?}; the cap was reached {count} times"
                ),
                Cause::ListenerCap(id) => logs::info!(
                    target: logs::LISTENER,
                    "{} has been below its max_connections for {QUIET:?}, which was reached \
                     {count} times",
                    listener(*id)
                ),
                Cause::Backend(addr) => {
                    backends -= 1;
                    logs::info!(
                        target: logs::CONNECTION,
                        "no connect to {addr} has failed for {QUIET:?}; {count} attempts failed"
                    );
                }
                Cause::OtherBackends => logs::info!(
                    target: logs::CONNECTION,
                    "no connect to other addresses has failed for {QUIET:?}; {count} attempts \
                     failed"
                ),
            }
            false
        });
        self.backends = backends;
        self.next_over = next.is_armed().then_some(next);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addr(port: u16) -> Addr {
        std::net::SocketAddr::from(([192, 0, 2, 1], port)).into()
    }

    #[test]
    fn an_episode_that_is_noted_again_goes_on() {
        let mut episode = Episode::default();
        let at = |seconds| Time::ZERO.after(Duration::from_secs(seconds));
        assert!(episode.note());
        episode.calm(at(60));
        assert!(!episode.note());
        assert_eq!(episode.expire(at(60)), None);
        episode.calm(at(90));
        episode.calm(at(100));
        assert_eq!(
            (episode.expire(at(89)), episode.expire(at(90))),
            (None, Some(2))
        );
        assert_eq!(episode.expire(Time::ZERO), None);
        assert!(episode.note());
    }

    #[test]
    fn no_episode_is_over_before_its_time() {
        let (mut episodes, over_at) = (Episodes::default(), Time::ZERO.after(QUIET));
        assert!(episodes.note(Cause::Cap));
        episodes.expire(over_at, |_| String::new());
        assert!(episodes.is_on(&Cause::Cap), "its cause is not gone");
        episodes.calm(&Cause::Cap, Time::ZERO);
        let just_before = Time::ZERO.after(QUIET - Duration::from_nanos(1));
        episodes.expire(just_before, |_| String::new());
        assert!(episodes.is_on(&Cause::Cap));
        assert_eq!(episodes.next_over(), over_at);
        episodes.expire(over_at, |_| String::new());
        assert!(!episodes.is_on(&Cause::Cap));
    }

    /// Whatever the number of addresses: their peers may choose them.
    #[test]
    fn backends_are_bounded() {
        let mut episodes = Episodes::default();
        for port in 0..1000 {
            episodes.note_backend(&addr(port), &"refused");
        }
        assert_eq!(episodes.on.len(), MAX_BACKENDS + 1);
        for port in 0..1000 {
            episodes.calm_backend(&addr(port), Time::ZERO);
        }
        assert_eq!(episodes.next_over(), Time::ZERO.after(QUIET));
        episodes.expire(Time::ZERO.after(QUIET), |_| String::new());
        assert_eq!((episodes.on.len(), episodes.backends), (0, 0));
        assert!(!episodes.next_over().is_armed());
    }
}
