//! Faults of the simulated kernel, and their rates.

use std::collections::VecDeque;
use std::fmt;

use super::random::Random;

/// The system calls that can be made to fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Call {
    /// Waiting for events.
    Poll,
    /// Accepting a connection.
    Accept,
    /// Registering a connected socket, or a descriptor to watch.
    Register,
    /// Registering a connected socket for writing too.
    Reregister,
    /// Registering a listener.
    RegisterListener,
    /// Deregistering a listener.
    DeregisterListener,
    /// Reading from a connection.
    Read,
    /// Writing to a connection.
    Write,
    /// Shutting down the write side.
    Shutdown,
    /// Connecting: the immediate result, and the end of the attempt.
    Connect,
}

impl Call {
    /// All calls.
    pub const ALL: &'static [Self] = &[
        Self::Poll,
        Self::Accept,
        Self::Register,
        Self::Reregister,
        Self::RegisterListener,
        Self::DeregisterListener,
        Self::Read,
        Self::Write,
        Self::Shutdown,
        Self::Connect,
    ];

    /// Returns the errors that this call may give (`accept(2)`, `recv(2)`, `send(2)`,
    /// `epoll_ctl(2)`, `shutdown(2)`, `connect(2)`).
    pub const fn errors(self) -> &'static [i32] {
        use libc::*;
        match self {
            Self::Poll => &[EINTR],
            Self::Accept => &[
                ECONNABORTED,
                EINTR,
                EPROTO,
                ENETDOWN,
                EHOSTUNREACH,
                ENOPROTOOPT,
                EOPNOTSUPP,
                ETIMEDOUT,
                EPERM,
                EMFILE,
                ENFILE,
                ENOBUFS,
                ENOMEM,
                EAGAIN,
                // Shut down elsewhere, by another owner of the socket.
                EINVAL,
            ],
            Self::Register | Self::Reregister | Self::RegisterListener => &[ENOMEM, ENOSPC],
            Self::DeregisterListener => &[ENOMEM],
            Self::Read => &[
                EINTR,
                EAGAIN,
                ECONNRESET,
                ETIMEDOUT,
                EHOSTUNREACH,
                ENOMEM,
                EIO,
            ],
            Self::Write => &[
                EINTR, EAGAIN, ECONNRESET, EPIPE, ETIMEDOUT, ENOBUFS, ENOMEM, EIO,
            ],
            Self::Shutdown => &[ENOTCONN],
            Self::Connect => &[
                ECONNREFUSED,
                ETIMEDOUT,
                ECONNRESET,
                EHOSTUNREACH,
                ENETUNREACH,
                EADDRNOTAVAIL,
                EMFILE,
                ENFILE,
                ENOBUFS,
                ENOMEM,
            ],
        }
    }
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// One fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Fault {
    /// A call gave this error.
    Error(Call, i32),
    /// A read returned less than was there.
    ShortRead,
    /// A write took less than fitted.
    ShortWrite,
    /// An event came that must not be relied on.
    SpuriousEvent,
    /// An event came a poll later than it could.
    LateEvent,
    /// The events of a poll came in another order.
    Reordered,
    /// An event came twice.
    Duplicated,
    /// The clock jumped.
    ClockLeap,
    /// A poll said that there were more events than it returned.
    FullBatch,
    /// Descriptors ran out for a while.
    Famine,
}

impl Fault {
    /// Returns every kind of fault, each error of each call included.
    pub fn all() -> impl Iterator<Item = Self> {
        let errors = Call::ALL.iter().flat_map(|&call| {
            call.errors()
                .iter()
                .map(move |&errno| Self::Error(call, errno))
        });
        errors.chain([
            Self::ShortRead,
            Self::ShortWrite,
            Self::SpuriousEvent,
            Self::LateEvent,
            Self::Reordered,
            Self::Duplicated,
            Self::ClockLeap,
            Self::FullBatch,
            Self::Famine,
        ])
    }
}

/// Rates of faults, in times per thousand calls. All zero by default: a kernel that behaves as its
/// manual says.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct Faults {
    /// Calls that fail, with any error that they may give.
    pub errors: u16,
    /// If set, only this call fails, with this error alone.
    pub only: Option<(Call, i32)>,
    /// Reads that return less than is there.
    pub short_reads: u16,
    /// Writes that take less than fits.
    pub short_writes: u16,
    /// Events without an owner, for sockets that are not ready, or for a slot's former connection.
    pub spurious_events: u16,
    /// Events that come one poll later than they could.
    pub late_events: u16,
    /// Polls whose events come in another order.
    pub reordered: u16,
    /// Events that come twice.
    pub duplicated: u16,
    /// Polls after which the clock jumps by up to a minute.
    pub clock_leaps: u16,
    /// Polls that say there are more events than they return.
    pub full_batches: u16,
    /// Polls from which on descriptors have run out, for a while.
    pub famines: u16,
    /// Failures by script: this call, counted from now on, gives this error.
    pub script: VecDeque<Scripted>,
}

/// One failure by script.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scripted {
    /// The call that fails.
    pub call: Call,
    /// Number of such calls before it; 0 is the next.
    pub after: usize,
    /// The errno.
    pub errno: i32,
}

impl Faults {
    /// Returns no faults: the default.
    pub fn none() -> Self {
        Self::default()
    }

    /// Returns all faults, each `per_mille` times in a thousand; clock leaps and famines a tenth as
    /// often.
    pub fn everything(per_mille: u16) -> Self {
        Self {
            errors: per_mille,
            only: None,
            short_reads: per_mille,
            short_writes: per_mille,
            spurious_events: per_mille,
            late_events: per_mille,
            reordered: per_mille,
            duplicated: per_mille,
            clock_leaps: per_mille / 10,
            full_batches: per_mille,
            famines: per_mille / 10,
            script: VecDeque::new(),
        }
    }

    /// Makes a call fail: the `after`th from now, where 0 is the next.
    #[must_use]
    pub fn with(mut self, call: Call, after: usize, errno: i32) -> Self {
        self.script.push_back(Scripted { call, after, errno });
        self
    }

    /// Draws a swarm member (Groce et al. 2012): each kind of fault is on or off for this seed, at
    /// a rate of its own. Half of the members have a single error, at a higher rate.
    pub fn swarm(random: &mut Random) -> Self {
        let rate = |random: &mut Random| {
            if random.chance(500) {
                [1, 5, 20, 100, 300][random.below(5)]
            } else {
                0
            }
        };
        let only = if random.chance(500) {
            random
                .pick(Call::ALL)
                .and_then(|&call| Some((call, *random.pick(call.errors())?)))
        } else {
            None
        };
        Self {
            errors: if only.is_some() {
                rate(random)
            } else {
                rate(random) / 4
            },
            only,
            short_reads: rate(random),
            short_writes: rate(random),
            spurious_events: rate(random),
            late_events: rate(random),
            reordered: rate(random),
            duplicated: rate(random),
            clock_leaps: rate(random) / 20,
            full_batches: rate(random),
            famines: rate(random) / 20,
            script: VecDeque::new(),
        }
    }

    /// The error that this call must give, if any.
    pub(super) fn strike(&mut self, call: Call, random: &mut Random) -> Option<i32> {
        let mut struck = None;
        self.script.retain_mut(|scripted| {
            if scripted.call != call {
                return true;
            }
            if scripted.after == 0 && struck.is_none() {
                struck = Some(scripted.errno);
                return false;
            }
            scripted.after = scripted.after.saturating_sub(1);
            true
        });
        if struck.is_none()
            && self.only.is_none_or(|(only, _)| only == call)
            && random.chance(self.errors)
        {
            struck = match self.only {
                Some((_, errno)) => Some(errno),
                None => random.pick(call.errors()).copied(),
            };
        }
        struck
    }
}
