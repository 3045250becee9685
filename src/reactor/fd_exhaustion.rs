//! Out of descriptors or socket memory (EMFILE, ENFILE, ENOBUFS, ENOMEM).
//!
//! All listeners leave the poll for [`Config::emfile_backoff`](crate::Config::emfile_backoff), or
//! until one of the server's descriptors closes. Each episode has one warning and one count.

use std::io;

use super::episodes::Episode;
use crate::logs;
use crate::proto::Time;

#[derive(Debug, Default)]
pub(super) struct FdExhaustion {
    /// All listeners are out of the poll until then.
    until: Option<Time>,
    /// The failed accepts, until the backlog was empty and none failed for an interval. At the
    /// limit each new client makes accept fail again, and other listeners may have clients left.
    episode: Episode,
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
        usize::try_from(self.episode.count()).unwrap_or(usize::MAX)
    }

    /// When the episode ends, if no accept fails before.
    pub(super) fn over_at(&self) -> Time {
        self.episode.over_at()
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
        if !self.episode.note() {
            return false;
        }
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
        self.episode.calm(over_at);
    }

    /// A descriptor was freed, or the interval has passed.
    pub(super) fn end_pause(&mut self) {
        self.until = None;
    }

    pub(super) fn expire(&mut self, due: Time) {
        if self.until() <= due {
            self.end_pause();
        }
        if let Some(failures) = self.episode.expire(due) {
            logs::info!(
                target: logs::FD_EXHAUSTION,
                "accepting again; {} attempts failed for lack of descriptors or memory",
                failures
            );
        }
    }
}
