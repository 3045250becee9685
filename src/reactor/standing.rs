//! What admission notes in each connection.

use super::source_limits::Counted;
use crate::proto::State;

/// Whether a connection is pending, skipped by the search for one to evict, or excused, and where
/// it is counted: one byte.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Standing(u8);

/// Whose queue of silent connections: the server's, or that of a listener with a limit of its own.
#[derive(Clone, Copy)]
pub(super) enum Queue {
    Server,
    Listener,
}

impl Standing {
    const PENDING: u8 = 1;
    /// It has left the server's queue of silent connections because its peer waited for this
    /// server, and joins the queue again after its next turn.
    const SKIPPED_BY_SERVER: u8 = 2;
    /// The same of its listener's queue.
    const SKIPPED_BY_LISTENER: u8 = 4;
    /// Its handshake timeout was extended by time in which the server was busy. Not twice: a
    /// handshake ends however busy the server is.
    const EXCUSED: u8 = 8;
    /// Its socket comes from elsewhere: other code may have written to it.
    const ADOPTED: u8 = 16;
    /// Counted under its source: apart, or with others.
    const COUNTED_APART: u8 = 32;
    const COUNTED_TOGETHER: u8 = 64;

    pub(super) fn of(state: State, counted: Counted) -> Self {
        let mut standing = Self::default();
        standing.set_pending(state != State::Open);
        standing.set_counted(counted);
        standing
    }

    /// Of a connection whose socket comes from elsewhere.
    pub(super) fn adopted() -> Self {
        Self(Self::ADOPTED)
    }

    pub(super) fn is_adopted(self) -> bool {
        self.0 & Self::ADOPTED != 0
    }

    /// True if it counts among the pending connections.
    #[inline]
    pub(super) fn is_pending(self) -> bool {
        self.0 & Self::PENDING != 0
    }

    pub(super) fn set_pending(&mut self, pending: bool) {
        self.0 = (self.0 & !Self::PENDING) | (u8::from(pending) * Self::PENDING);
    }

    /// True if it has left a queue.
    #[inline]
    pub(super) fn is_skipped(self) -> bool {
        self.0 & (Self::SKIPPED_BY_SERVER | Self::SKIPPED_BY_LISTENER) != 0
    }

    pub(super) fn is_skipped_by(self, queue: Queue) -> bool {
        self.0 & Self::skipped_by(queue) != 0
    }

    pub(super) fn skip(&mut self, queue: Queue) {
        self.0 |= Self::skipped_by(queue);
    }

    pub(super) fn end_skip(&mut self) {
        self.0 &= !(Self::SKIPPED_BY_SERVER | Self::SKIPPED_BY_LISTENER);
    }

    /// Notes that its handshake timeout is extended. True the first time.
    pub(super) fn excuse(&mut self) -> bool {
        let is_first = self.0 & Self::EXCUSED == 0;
        self.0 |= Self::EXCUSED;
        is_first
    }

    /// Where it is counted under its source.
    pub(super) fn counted(self) -> Counted {
        match self.0 & (Self::COUNTED_APART | Self::COUNTED_TOGETHER) {
            Self::COUNTED_APART => Counted::Apart,
            Self::COUNTED_TOGETHER => Counted::Together,
            _ => Counted::No,
        }
    }

    pub(super) fn set_counted(&mut self, counted: Counted) {
        self.0 &= !(Self::COUNTED_APART | Self::COUNTED_TOGETHER);
        self.0 |= match counted {
            Counted::No => 0,
            Counted::Apart => Self::COUNTED_APART,
            Counted::Together => Self::COUNTED_TOGETHER,
        };
    }

    fn skipped_by(queue: Queue) -> u8 {
        match queue {
            Queue::Server => Self::SKIPPED_BY_SERVER,
            Queue::Listener => Self::SKIPPED_BY_LISTENER,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The count that a connection leaves is the one that it has joined.
    #[test]
    fn a_connection_is_counted_where_it_was_counted_last() {
        let mut standing = Standing::adopted();
        for counted in [
            Counted::Together,
            Counted::Apart,
            Counted::No,
            Counted::Together,
        ] {
            standing.set_counted(counted);
            assert_eq!(standing.counted(), counted);
        }
        assert!(
            standing.is_adopted() && !standing.is_pending(),
            "all else stays"
        );
    }
}
