//! The options of a server, each with its unit and default. Those of a listener are in `listen`.

use std::time::Duration;

use crate::error::{Error, Result};
use crate::proto::Rate;

/// Options of a whole server. All have defaults that are safe on the open internet, and all are *live*:
/// [`Control::reconfigure`](crate::Control::reconfigure) changes them at once.
///
/// ```
/// use portcullis::Config;
/// let config = Config::new().max_connections(10_000).accept_budget(32);
/// # let _ = config;
/// ```
#[derive(Clone, Debug)]
#[must_use]
pub struct Config {
    pub(crate) max_connections: usize,
    pub(crate) emfile_backoff: Duration,
    pub(crate) accept_budget: usize,
    pub(crate) handshake_budget: usize,
    pub(crate) read_budget: usize,
    pub(crate) job_budget: usize,
    pub(crate) queue_limit: usize,
    pub(crate) queue_bytes: usize,
    pub(crate) accept_rate: Option<Rate>,
    pub(crate) max_pending: Quota,
    pub(crate) pending_grace: Duration,
    pub(crate) memory_limit: usize,
    pub(crate) recent_closes: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            max_connections: 1024,
            emfile_backoff: Duration::from_millis(500),
            accept_budget: 64,
            handshake_budget: 16,
            read_budget: 64 * 1024,
            job_budget: 1024,
            queue_limit: 65_536,
            queue_bytes: 64 * 1024 * 1024,
            accept_rate: None,
            max_pending: Quota::Percent(50),
            pending_grace: Duration::from_secs(1),
            memory_limit: usize::MAX,
            recent_closes: 256,
        }
    }
}

impl Config {
    /// The defaults.
    pub fn new() -> Self {
        Self::default()
    }

    /// The cap: the most connections at one time, over all listeners, in every state. Exact, and checked
    /// before `accept`. 0 admits nobody. Defaults to 1024. In [`Shards`](crate::Shards) it is one cap over all of them.
    ///
    /// Each takes a descriptor, so RLIMIT_NOFILE should be larger than this by what the rest of the program
    /// needs; [`Server::new`](crate::Server::new) warns if it is not. Some 200 bytes of address space are reserved for each from the
    /// start, if the system grants so much; they are memory only once they are used.
    pub fn max_connections(mut self, connections: usize) -> Self {
        self.max_connections = connections;
        self
    }

    /// How long all listeners stay out of the poll when descriptors or socket memory run out (EMFILE, ENFILE,
    /// ENOBUFS, ENOMEM; `accept(2)`), unless one of our own descriptors closes before. Defaults to 500 ms, at least 1 ms, at most a day.
    pub fn emfile_backoff(mut self, interval: Duration) -> Self {
        self.emfile_backoff = interval;
        self
    }

    /// Connections accepted per turn and listener, so that a flood of connects leaves the open ones alive.
    /// Defaults to 64, at least 1.
    pub fn accept_budget(mut self, connections: usize) -> Self {
        self.accept_budget = connections;
        self
    }

    /// Connections whose TLS handshake is worked on per turn: handshakes are the dearest thing a turn does.
    /// Defaults to 16, at least 1.
    pub fn handshake_budget(mut self, connections: usize) -> Self {
        self.handshake_budget = connections;
        self
    }

    /// What one connection may take up in a turn. A read (up to 64 KiB) begins while any of it is left; each byte read counts 1, each
    /// frame told 64 more. As many frames are told as 64 bytes go into it, at least one; the rest of what was read waits for the next
    /// turn. Below 64 KiB it bounds the frames, not the bytes of a read.
    /// Defaults to 64 KiB, which is 1,024 frames; at least 1.
    pub fn read_budget(mut self, bytes: usize) -> Self {
        self.read_budget = bytes;
        self
    }

    /// Commands from [`Handle`](crate::Handle)s carried out per turn. Defaults to 1024, at least 1.
    pub fn job_budget(mut self, commands: usize) -> Self {
        self.job_budget = commands;
        self
    }

    /// Commands from [`Handle`](crate::Handle)s that may wait; over it they are refused. Defaults to 65 536, at least 1.
    pub fn queue_limit(mut self, commands: usize) -> Self {
        self.queue_limit = commands;
        self
    }

    /// Bytes in [`Handle::send`](crate::Handle::send) commands that may wait; over it they are refused.
    /// One command more than fits is taken when the queue holds none. Defaults to 64 MiB.
    pub fn queue_bytes(mut self, bytes: usize) -> Self {
        self.queue_bytes = bytes;
        self
    }

    /// The most connections accepted per second, over all listeners; `None` is no limit. Over it each listener's
    /// [`Listen::at_capacity`](crate::Listen::at_capacity) decides. Defaults to no limit.
    pub fn accept_rate(mut self, rate: impl Into<Option<Rate>>) -> Self {
        self.accept_rate = rate.into();
        self
    }

    /// The most connections at one time that are not open yet: in a TLS handshake, or before their PROXY header. A number, or
    /// a [`Quota`] of the cap. Defaults to half the cap, at least 16 (and never more than the cap).
    ///
    /// When there are so many and another client comes, the oldest of them gives way to it, if it has been pending for
    /// [`Config::pending_grace`] and it is the peer that we wait for: it is closed as
    /// [`Evicted`](crate::CloseReason::Evicted). Else the newcomer waits as at the cap
    /// ([`Listen::at_capacity`](crate::Listen::at_capacity)). So peers that connect and say nothing (slow loris) cannot keep others out,
    /// and a crowd of honest ones is only slowed down.
    pub fn max_pending(mut self, connections: impl Into<Quota>) -> Self {
        self.max_pending = connections.into();
        self
    }

    /// How long a connection may be pending before it gives way to a newcomer. Defaults to 1 s.
    pub fn pending_grace(mut self, grace: Duration) -> Self {
        self.pending_grace = grace;
        self
    }

    /// The most bytes that all connections together may hold in buffers, in both directions: incomplete frames and records,
    /// and what waits for peers; `None` is no limit but those of each connection. Defaults to none.
    ///
    /// From three quarters of it on, no more is read from connections that hold more than their share, but from one of them at a
    /// time, for a second or until its frame is whole: large frames are finished one after the other. Clocks run meanwhile, and
    /// whose frame is late because it was not read is closed as [`OverMemory`](crate::CloseReason::OverMemory). Above the limit
    /// those that hold the most are closed for the same reason, until the rest fits. What handlers hold is not counted, nor is the
    /// state of each connection itself. A quarter of it should hold the longest frame.
    pub fn memory_limit(mut self, bytes: impl Into<Option<usize>>) -> Self {
        self.memory_limit = bytes.into().unwrap_or(usize::MAX);
        self
    }

    /// How many of the last closes are kept for [`Control::recent_closes`](crate::Control::recent_closes), at most 65 536; 0 keeps none.
    /// One takes about 200 bytes, and the words of its error. Defaults to 256. *Live.*
    pub fn recent_closes(mut self, closes: usize) -> Self {
        self.recent_closes = closes;
        self
    }

    /// `max_pending` in connections.
    pub(crate) fn pending_limit(&self) -> usize {
        const FLOOR: usize = 16;
        let most = match self.max_pending {
            Quota::Count(connections) => connections,
            Quota::Percent(percent) => (self.max_connections / 100 * usize::from(percent)
                + self.max_connections % 100 * usize::from(percent) / 100)
                .max(FLOOR),
        };
        most.min(self.max_connections)
    }

    pub(crate) fn check(&self) -> Result<()> {
        let counts = [
            ("accept_budget", self.accept_budget),
            ("handshake_budget", self.handshake_budget),
            ("read_budget", self.read_budget),
            ("job_budget", self.job_budget),
            ("queue_limit", self.queue_limit),
        ];
        for (option, count) in counts {
            if count == 0 {
                return Err(Error::option(
                    option,
                    "0 would stop the server; use at least 1",
                ));
            }
        }
        if let Some(problem) = self.accept_rate.and_then(|rate| rate.problem()) {
            return Err(Error::option("accept_rate", problem));
        }
        match self.max_pending {
            Quota::Count(0) | Quota::Percent(0) => {
                return Err(Error::option(
                    "max_pending",
                    "0 would let no TLS handshake begin; use at least 1",
                ));
            }
            Quota::Percent(101..) => {
                return Err(Error::option(
                    "max_pending",
                    "more than 100 percent of the cap",
                ));
            }
            Quota::Count(_) | Quota::Percent(_) => {}
        }
        if self.memory_limit < MIN_MEMORY {
            return Err(Error::option(
                "memory_limit",
                format!(
                    "{} is less than one read takes; use at least {MIN_MEMORY}",
                    self.memory_limit
                ),
            ));
        }
        if self.max_connections > MAX_CONNECTIONS {
            return Err(Error::option(
                "max_connections",
                format!(
                    "{} is more than the {MAX_CONNECTIONS} that one server can hold",
                    self.max_connections
                ),
            ));
        }
        if self.recent_closes > MAX_RECENT {
            return Err(Error::option(
                "recent_closes",
                format!(
                    "{} is more than the {MAX_RECENT} that are kept at most",
                    self.recent_closes
                ),
            ));
        }
        if self.emfile_backoff < Duration::from_millis(1) {
            return Err(Error::option(
                "emfile_backoff",
                "less than a millisecond would spin; use at least 1 ms",
            ));
        }
        if self.emfile_backoff > MAX_EMFILE_BACKOFF {
            return Err(Error::option(
                "emfile_backoff",
                "more than a day would leave the ports deaf; use at most 24 h",
            ));
        }
        Ok(())
    }
}

/// A few reads.
const MIN_MEMORY: usize = 256 * 1024;
const MAX_RECENT: usize = 65_536;
const MAX_EMFILE_BACKOFF: Duration = Duration::from_secs(24 * 60 * 60);

/// The most slots a poll token can name beside the listeners' (`reactor::os`).
pub(crate) const MAX_CONNECTIONS: usize = 16_000_000;

/// A number, or a part of a limit: of the cap on connections, where nothing else is said.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Quota {
    /// So many.
    Count(usize),
    /// So many percent of the limit, 1 to 100. As [`Config::max_pending`] at least 16 connections.
    Percent(u8),
}

impl From<usize> for Quota {
    fn from(connections: usize) -> Self {
        Self::Count(connections)
    }
}

/// What becomes of a client that comes when the cap is reached.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum AtCapacity {
    /// It waits in the kernel's accept queue (the backlog) until a place is free. The listener leaves the poll meanwhile.
    #[default]
    Wait,
    /// It is accepted, sent `farewell`, and closed at once ([`CloseReason::AtCapacity`](crate::CloseReason::AtCapacity)).
    /// Takes one descriptor for that moment. The farewell is sent as it is, unframed and in the clear, over TLS listeners too.
    Refuse {
        /// Last words, at most 4 KiB; none if empty.
        farewell: Vec<u8>,
    },
}

impl AtCapacity {
    /// Refuses without a word.
    pub fn refuse() -> Self {
        Self::Refuse {
            farewell: Vec::new(),
        }
    }
}
