//! One listener: when it is registered, and what each accept error means.
//!
//! ```text
//! Listening --cap reached--> Full --slot freed--> Listening
//! Listening --EMFILE ENFILE ENOBUFS ENOMEM--> OutOfFds --interval over, or one of our fds closed--> Listening
//! Listening <--suspend/resume--> Suspended          any --close/drain--> Closed
//! ```
//!
//! In Full, OutOfFds and Suspended it is deregistered. [`Listener::registered`] is what the kernel was told
//! successfully, never what we wish; the reactor makes one follow the other, and tries again by timer.

use std::io;
use std::rc::Rc;

use super::admission::{OptionalBucket, Room};
use super::sources::Sources;
use crate::addr::Addr;
use crate::config::AtCapacity;
use crate::control::{ListenerInfo, ListenerState};
use crate::handler::Service;
use crate::id::{ListenerId, ListenerRef};
use crate::listen::Listen;
use crate::proto::{Limits, Machine, Pool, SharedMeters, Time};

/// A listener of one server.
pub(super) struct Listener<A, L> {
    pub(super) id: ListenerId,
    pub(super) name: Rc<str>,
    pub(super) addr: Addr,
    /// `None` once the port is closed.
    pub(super) socket: Option<L>,
    pub(super) service: Box<dyn Service<A>>,
    /// As they were given to `listen`, and changed since.
    pub(super) options: Listen,
    /// Those of the options that its connections share.
    pub(super) limits: Rc<Limits>,
    /// What they share of its rates.
    pub(super) meters: SharedMeters,
    /// Of its accept rate.
    pub(super) bucket: OptionalBucket,
    pub(super) sources: Sources,
    pub(super) connections: usize,
    pub(super) accepted: u64,
    pub(super) suspended: bool,
    /// The kernel reports events of this socket.
    pub(super) registered: bool,
    /// Accept may find somebody: an event came, the budget ended, or the listener was out of the poll.
    pub(super) readable: bool,
    /// Something failed; no accept and no registration before.
    pub(super) retry_at: Time,
    /// It has left who waits to other servers for a moment, and takes now whoever is still there.
    pub(super) deferred: bool,
    /// The failure was logged: not again before it is over.
    pub(super) warned: bool,
    /// The last accept said that this is no listening socket.
    pub(super) broken: bool,
}

impl<A, L> Listener<A, L> {
    /// Its own limit.
    fn max_connections(&self) -> usize {
        self.options.max_connections.unwrap_or(usize::MAX)
    }

    /// Who finds it full waits in the backlog.
    pub(super) fn lets_wait(&self) -> bool {
        self.options.at_capacity == AtCapacity::Wait
    }

    /// No more may be accepted: the cap of the server or of this listener is reached.
    pub(super) fn is_full(&self, room: &Room) -> bool {
        let has_slot = room.has_slot || (room.may_swap && self.options.opens_later());
        !has_slot || self.connections >= self.max_connections()
    }

    /// Too many of the server's connections are not open yet to add one of these.
    pub(super) fn is_crowded(&self, room: &Room) -> bool {
        self.options.opens_later() && room.crowded_until.is_some_and(|until| until > room.now)
    }

    /// From when on its rate and the server's admit somebody.
    pub(super) fn limited_until(&self, room: &Room) -> Time {
        self.bucket.ready_at(self.options.accept_rate).max(room.limited_until)
    }

    /// When somebody may come in, if nobody else has to go first: now, later, or not by waiting.
    pub(super) fn admits_at(&self, room: &Room) -> Time {
        if !self.lets_wait() {
            return room.now;
        }
        if self.is_full(room) {
            return Time::NEVER;
        }
        let crowded_until = room.crowded_until.filter(|_| self.options.opens_later());
        self.limited_until(room).max(crowded_until.unwrap_or(Time::ZERO))
    }

    /// A connection of this listener, before its life begins.
    pub(super) fn machine(&self, now: Time, pool: &mut Pool) -> Machine {
        let (framing, tls) = (&self.options.framing, self.options.tls.as_ref());
        let mut machine = Machine::new(framing, Rc::clone(&self.limits), tls, now, pool);
        machine.throttle(&self.meters);
        machine
    }

    pub(super) fn state(&self, room: &Room) -> ListenerState {
        if self.socket.is_none() {
            ListenerState::Closed
        } else if self.suspended {
            ListenerState::Suspended
        } else if room.out_of_fds {
            ListenerState::OutOfFds
        } else if self.lets_wait() && (self.is_full(room) || self.is_crowded(room)) {
            ListenerState::Full
        } else if self.lets_wait() && self.limited_until(room) > room.now {
            ListenerState::RateLimited
        } else {
            ListenerState::Listening
        }
    }

    pub(super) fn info(&self, room: &Room) -> ListenerInfo {
        ListenerInfo {
            id: self.id,
            name: self.name.to_string(),
            addr: self.addr.clone(),
            state: self.state(room),
            connections: self.connections,
            max_connections: self.max_connections().min(room.cap),
            accepted: self.accepted,
        }
    }

    pub(super) fn is_called(&self, which: &ListenerRef) -> bool {
        match which {
            ListenerRef::Id(id) => self.id == *id,
            ListenerRef::Port(port) => self.addr.port() == Some(*port),
            ListenerRef::Name(name) => *self.name == **name,
        }
    }
}

/// What an accept error means. Total: an errno that nobody thought of is [`AcceptError::Yield`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum AcceptError {
    /// Nobody waits.
    Drained,
    /// This one client is lost; go on with the next (`accept(2)`: "treat them like EAGAIN by retrying").
    Retry,
    /// Out of descriptors or socket memory: every listener of the process is concerned.
    OutOfFds,
    /// The listening socket is none (any more): it was shut down elsewhere.
    Broken,
    /// Anything else: end this turn's accepting, keep the listener.
    Yield,
}

impl AcceptError {
    pub(super) fn of(error: &io::Error) -> Self {
        match error.raw_os_error() {
            // Not the kernel's: an address family we cannot read.
            None if error.kind() == io::ErrorKind::WouldBlock => Self::Drained,
            None => Self::Retry,
            Some(libc::EAGAIN) => Self::Drained,
            Some(
                libc::ECONNABORTED
                | libc::EINTR
                | libc::ECONNRESET
                | libc::EPROTO
                | libc::ETIMEDOUT
                | libc::ENETDOWN
                | libc::ENOPROTOOPT
                | libc::EHOSTDOWN
                | libc::EHOSTUNREACH
                | libc::EOPNOTSUPP
                | libc::ENETUNREACH,
            ) => Self::Retry,
            #[cfg(any(target_os = "linux", target_os = "android"))]
            Some(libc::ENONET) => Self::Retry,
            Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM) => Self::OutOfFds,
            Some(libc::EINVAL | libc::EBADF | libc::ENOTSOCK) => Self::Broken,
            Some(_) => Self::Yield,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_errno_has_a_class() {
        let class = |errno| AcceptError::of(&io::Error::from_raw_os_error(errno));
        for errno in 0..4096 {
            let _ = class(errno);
        }
        assert_eq!(class(libc::EAGAIN), AcceptError::Drained);
        for errno in [
            libc::ECONNABORTED,
            libc::EINTR,
            libc::EPROTO,
            libc::ENETDOWN,
            libc::EHOSTUNREACH,
        ] {
            assert_eq!(class(errno), AcceptError::Retry);
        }
        for errno in [libc::EMFILE, libc::ENFILE, libc::ENOBUFS, libc::ENOMEM] {
            assert_eq!(class(errno), AcceptError::OutOfFds);
        }
        for errno in [libc::EINVAL, libc::EBADF, libc::ENOTSOCK] {
            assert_eq!(class(errno), AcceptError::Broken);
        }
        for errno in [libc::EPERM, libc::EIO, 4000] {
            assert_eq!(class(errno), AcceptError::Yield);
        }
    }
}
