//! Out of descriptors or socket memory (EMFILE, ENFILE, ENOBUFS, ENOMEM).
//!
//! All listeners leave the poll for [`Config::emfile_backoff`](crate::Config::emfile_backoff), or
//! until one of the server's descriptors closes. Each episode has one warning and one count.

use std::io;

use crate::logs;
use crate::proto::Time;

#[derive(Debug, Default)]
pub(super) struct FdExhaustion {
    /// All listeners are out of the poll until then.
    until: Option<Time>,
    /// From the first failure until the backlog was empty and no accept failed for an interval.
    episode: bool,
    /// When the episode ends: the backlog was empty an interval before. At the limit each new
    /// client makes accept fail again, and other listeners may have clients left.
    over_at: Option<Time>,
    /// Failed accepts of this episode.
    failures: u64,
}

impl FdExhaustion {
    pub(super) fn is_on(&self) -> bool {
        self.until.is_some()
    }

    pub(super) fn until(&self) -> Time {
        self.until.unwrap_or(Time::NEVER)
    }

    /// Failed accepts of the current episode.
    pub(super) fn failures(&self) -> usize {
        if self.episode {
            usize::try_from(self.failures).unwrap_or(usize::MAX)
        } else {
            0
        }
    }

    /// When the episode ends, if no accept fails before.
    pub(super) fn over_at(&self) -> Time {
        self.over_at.unwrap_or(Time::NEVER)
    }

    /// An accept failed; the listeners pause until `until`. True if an episode begins.
    pub(super) fn begin(
        &mut self,
        until: Time,
        error: &io::Error,
        open: usize,
        cap: usize,
    ) -> bool {
        self.until = Some(until);
        self.over_at = None;
        self.failures += 1;
        if self.episode {
            return false;
        }
        self.episode = true;
        self.failures = 1;
        logs::warning!(
            target: logs::FD_EXHAUSTION,
            "no new connections for now: {error}; {open} are served, new clients wait in the backlog; \
             raise the limit of open files (ulimit -n; fs.file-max for the system) or lower \
             max_connections ({cap})"
        );
        true
    }

    /// A backlog was found empty.
    pub(super) fn handle_drained(&mut self, over_at: Time) {
        if self.episode && self.over_at.is_none() {
            self.over_at = Some(over_at);
        }
    }

    /// A descriptor was freed, or the interval has passed.
    pub(super) fn end_pause(&mut self) {
        self.until = None;
    }

    pub(super) fn expire(&mut self, due: Time) {
        if self.until() <= due {
            self.end_pause();
        }
        if self.over_at() <= due {
            self.episode = false;
            self.over_at = None;
            logs::info!(
                target: logs::FD_EXHAUSTION,
                "accepting again; {} attempts failed for lack of descriptors or memory",
                self.failures
            );
        }
    }
}
