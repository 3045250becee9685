//! The options of a server, each with its unit and default.

use std::time::Duration;

use crate::error::{Error, Result};
use crate::proto::{check_rates, Rate};

/// Options of a whole server. The defaults suit the open internet, except for
/// [`Config::memory_limit`]: set that where peers are not trusted. All options are *live*:
/// [`Control::reconfigure`](crate::Control::reconfigure) changes them at once.
///
/// ```
/// use portcullis::Config;
/// let mut config = Config::max_connections(10_000);
/// config.budgets.accepts = 32;
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default, deny_unknown_fields))]
#[must_use]
#[non_exhaustive]
pub struct Config {
    /// The cap: maximum number of concurrent connections, over all listeners, in every state.
    /// Exact, and checked before `accept`. 0 admits none; at most 16,000,000. Lowering it closes no
    /// connection. Defaults to 1024. In [`Shards`](crate::Shards) it is one cap over all of them.
    ///
    /// Each connection takes a descriptor. So RLIMIT_NOFILE should be larger than the cap by the
    /// number that the rest of the program needs. [`Server::new`](crate::Server::new) warns if the
    /// difference is below 32. Some 200 bytes of address space are reserved for each connection,
    /// for at most 65,536 of them from the start. They become memory at their first use. Memory for
    /// more is requested when it is needed. If the system refuses it, the present number of
    /// connections acts as the cap until one has ended.
    #[doc(alias = "connection limit")]
    pub max_connections: usize,
    /// Limits of connections that are not open yet.
    pub pending_limits: PendingLimits,
    /// Maximum number of connections accepted per second, over all listeners; `None` is no limit.
    /// Above it each listener's [`Listen::at_capacity`](crate::Listen::at_capacity) decides.
    /// Defaults to no limit.
    #[doc(alias = "rate limit")]
    pub accept_rate: Option<Rate>,
    /// Maximum number of bytes in the buffers of all connections together, in both directions:
    /// incomplete frames and records, and pending output. PROXY headers count too, because they
    /// live as long as their connections, most often without TLVs
    /// ([`Peer::proxy`](crate::Peer::proxy)). At least 256 KiB. `None` leaves only the limits of
    /// each connection, and an allocation that fails aborts the process. Defaults to none, for the
    /// reasons in [`limits`](crate::manual::limits#without-a-memory-limit).
    ///
    /// From three quarters of the limit on, connections that hold more than their share are not
    /// read. One at a time is excepted: until its frame is complete, until there is nothing to
    /// read, or for a second if others wait. So large frames are finished one after the other. The
    /// timeouts of input are paused while a connection is not read. That time counts later, once
    /// everything that the peer sent meanwhile has been read and the frame is still incomplete.
    ///
    /// If connections wait to be read and seven eighths are in use, stalled ones are closed as
    /// [`OverMemory`](crate::CloseReason::OverMemory). The stall is 50 ms to 1 s: the more wait,
    /// the shorter. The greatest product of size and stall goes first. It counts a sixteenth for a
    /// connection that has sent a whole frame before, or much when it was read.
    ///
    /// Above the limit connections are closed in the same order, stalled or not, until the others
    /// fit. Timers count where a connection has more than four, and so does the certificate chain
    /// of a TLS peer. Memory of handlers is not counted, nor the state of each connection itself. A
    /// quarter of the limit should hold the longest frame.
    pub memory_limit: Option<usize>,
    /// Limits of the work in one iteration of the loop.
    pub budgets: Budgets,
    /// Limits of the queue of commands from other threads.
    pub queue_limits: QueueLimits,
    /// Time for which all listeners leave the poll when descriptors or socket memory run out
    /// (EMFILE, ENFILE, ENOBUFS, ENOMEM; `accept(2)`). They return earlier when the server closes a
    /// descriptor of its own. It is also the delay before a listener with another error is tried
    /// again. Defaults to 500 ms; at least 1 ms, at most a day.
    #[cfg_attr(feature = "serde", serde(with = "crate::seconds"))]
    pub emfile_backoff: Duration,
    /// Number of last closes kept for [`Control::recent_closes`](crate::Control::recent_closes), at
    /// most 65,536; 0 keeps none. Each takes about 200 bytes, and up to 256 for the text of its
    /// error. Defaults to 256.
    pub recent_closes: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            max_connections: 1024,
            pending_limits: PendingLimits::default(),
            accept_rate: None,
            memory_limit: None,
            budgets: Budgets::default(),
            queue_limits: QueueLimits::default(),
            emfile_backoff: Duration::from_millis(500),
            recent_closes: 256,
        }
    }
}

/// Limits of the work in one iteration of the loop. Each is at least 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default, deny_unknown_fields))]
#[non_exhaustive]
pub struct Budgets {
    /// Number of connections accepted per listener. A flood of connects then does not stop the open
    /// connections. Defaults to 64.
    pub accepts: usize,
    /// Number of connections whose TLS handshake is advanced: handshakes are the most expensive
    /// step. Defaults to 16.
    pub handshakes: usize,
    /// Work for one connection: each byte read counts 1, each delivered frame 256 more. Defaults to
    /// 256 KiB, which is 1,024 frames.
    ///
    /// A read (up to 64 KiB) begins while any of the budget is left. At least one frame is
    /// delivered; further input waits for the next iteration. A budget below 64 KiB bounds the
    /// frames, not the bytes of a read.
    pub read_bytes: usize,
    /// Number of commands from [`Handle`](crate::Handle)s. Defaults to 1024.
    pub commands: usize,
    /// Work of the whole iteration, whatever the number of connections. Each byte read or written
    /// counts 1, each frame in or out 64 more. A connection's turn, a close and an accepted client
    /// count 24 KiB each. An attempt to connect counts 64 KiB, a step of a TLS handshake 512 KiB, a
    /// command or timer 1 KiB. Defaults to 8 MiB, which takes 2 to 4 ms.
    ///
    /// No step begins once the budget is spent. The remainder waits for the next iteration, in
    /// which connections that had no turn come first. Their timeouts wait for their turns, and
    /// [`Server::next_timeout`](crate::Server::next_timeout) is zero until then. A sixteenth of the
    /// budget is kept for each kind of work, so that none of them starves. The time that callbacks
    /// take is not counted.
    pub work: usize,
}

impl Default for Budgets {
    fn default() -> Self {
        Self {
            accepts: 64,
            handshakes: 16,
            read_bytes: 256 * 1024,
            commands: 1024,
            work: 8 * 1024 * 1024,
        }
    }
}

/// Limits of the queue of commands from [`Handle`](crate::Handle)s. Commands above a limit are
/// refused. Frames and messages for connections that are not open yet, and messages of
/// [`Conn::notify`](crate::Conn::notify), have the same limits once more, together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default, deny_unknown_fields))]
#[non_exhaustive]
pub struct QueueLimits {
    /// Maximum number of queued frames, messages and posted jobs. Kills, and methods that wait for
    /// an answer, are refused at twice this number. Defaults to 65,536, at least 1.
    pub commands: usize,
    /// Maximum number of bytes that queued frames, messages and posted jobs occupy, with their
    /// entries in the queue; the payload of a broadcast once. Methods that wait for an answer are
    /// refused at twice this number: a job occupies the queue until it runs, also after its caller's
    /// timeout. Memory that a message or job owns elsewhere is not counted. An empty queue takes one
    /// command of any size. Defaults to 64 MiB.
    pub bytes: usize,
}

impl Default for QueueLimits {
    fn default() -> Self {
        Self {
            commands: 65_536,
            bytes: 64 * 1024 * 1024,
        }
    }
}

/// Limits of pending connections: accepted ones in a TLS handshake, or before their PROXY header. A
/// connection in an upgrade by `Conn::start_tls` is pending again.
///
/// When [`PendingLimits::connections`] are pending and another client connects, the oldest of them
/// is evicted: closed as [`Evicted`](crate::CloseReason::Evicted). It must have been pending for
/// [`PendingLimits::grace`], and its peer must be the side that keeps the server waiting. Otherwise
/// [`Listen::at_capacity`](crate::Listen::at_capacity) decides about the new client, as at the cap.
///
/// At the server's cap the oldest pending connection may be evicted whatever their number, on the
/// same two conditions. Or an open one that has not sent a frame: see
/// [`Listen::evict_silent`](crate::Listen::evict_silent).
///
/// So peers that connect and send nothing (slow loris) cannot keep others out, and a crowd of
/// honest clients is only slowed down.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default, deny_unknown_fields))]
#[non_exhaustive]
pub struct PendingLimits {
    /// Maximum number of concurrent pending connections: a number, or a part of the cap. Not zero.
    /// An upgrade by `Conn::start_tls` is not refused and may exceed it. Defaults to half the cap,
    /// at least 16 (and never more than the cap).
    pub connections: Quota,
    /// Time for which a connection cannot be evicted: from the beginning of its handshake, or from
    /// accept. Defaults to 1 s.
    #[cfg_attr(feature = "serde", serde(with = "crate::seconds"))]
    pub grace: Duration,
}

impl Default for PendingLimits {
    fn default() -> Self {
        Self {
            connections: Quota::Percent(50),
            grace: Duration::from_secs(1),
        }
    }
}

/// A number, or a part of a limit: of the cap on connections, if the docs name no other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(
    feature = "serde",
    serde(rename_all = "snake_case", deny_unknown_fields)
)]
#[non_exhaustive]
pub enum Quota {
    /// A number.
    Count(usize),
    /// A percentage of the limit, 1 to 100. In [`PendingLimits`] at least 16 connections.
    Percent(u8),
}

impl From<usize> for Quota {
    fn from(connections: usize) -> Self {
        Self::Count(connections)
    }
}

impl Config {
    /// Returns the defaults.
    pub fn new() -> Self {
        Self::default()
    }

    /// Returns the defaults, with this cap.
    pub fn max_connections(cap: usize) -> Self {
        Self::new().with(|config| config.max_connections = cap)
    }

    /// Changes options, within an expression.
    pub fn with(mut self, set: impl FnOnce(&mut Self)) -> Self {
        set(&mut self);
        self
    }

    /// Returns the limit of pending connections as a number.
    pub(crate) fn max_pending(&self) -> usize {
        const FLOOR: usize = 16;
        let max = match self.pending_limits.connections {
            Quota::Count(connections) => connections,
            Quota::Percent(percent) => (self.max_connections / 100 * usize::from(percent)
                + self.max_connections % 100 * usize::from(percent) / 100)
                .max(FLOOR),
        };
        max.min(self.max_connections)
    }

    pub(crate) fn check(&self) -> Result<()> {
        let counts = [
            ("budgets.accepts", self.budgets.accepts),
            ("budgets.handshakes", self.budgets.handshakes),
            ("budgets.read_bytes", self.budgets.read_bytes),
            ("budgets.commands", self.budgets.commands),
            ("budgets.work", self.budgets.work),
            ("queue_limits.commands", self.queue_limits.commands),
        ];
        for (option, count) in counts {
            if count == 0 {
                return Err(Error::option(
                    option,
                    "0 would stop the server; use at least 1",
                ));
            }
        }
        check_rates(&[("accept_rate", self.accept_rate)])?;
        match self.pending_limits.connections {
            Quota::Count(0) | Quota::Percent(0) => {
                return Err(Error::option(
                    "pending_limits.connections",
                    "0 would let no TLS handshake begin; use at least 1",
                ));
            }
            Quota::Percent(101..) => {
                return Err(Error::option(
                    "pending_limits.connections",
                    "more than 100 percent of the cap",
                ));
            }
            Quota::Count(_) | Quota::Percent(_) => {}
        }
        if let Some(bytes) = self.memory_limit.filter(|&bytes| bytes < MIN_MEMORY) {
            return Err(Error::option(
                "memory_limit",
                format!("{bytes} is less than one read takes; use at least {MIN_MEMORY}"),
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

/// Maximum number of slots that a poll token can name beside the listeners' (`reactor::os`).
pub(crate) const MAX_CONNECTIONS: usize = 16_000_000;
