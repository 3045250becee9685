//! Which listener the traffic belongs to.
//!
//! Connections count their own traffic and the server's. Turns of one listener's connections follow
//! each other, so the sum of a listener is brought up to date when another one's turn comes, and
//! not for each message.

use super::listener::Listener;
use super::listeners::Listeners;
use crate::id::ListenerId;
use crate::proto::Traffic;

/// The listener whose connections have the traffic that is being counted.
#[derive(Debug, Default)]
pub(super) struct Attribution {
    /// `None` for outgoing connections.
    listener: Option<ListenerId>,
    /// The one of before, while something is sent to a connection of another.
    aside: Option<Option<ListenerId>>,
    /// The server's traffic when `listener` became this one.
    begun_at: Traffic,
}

impl Attribution {
    #[inline(always)]
    pub(super) fn is_to(&self, listener: Option<ListenerId>) -> bool {
        self.listener == listener
    }

    /// From here on the traffic is that of a connection of `listener`. `traffic` is the server's.
    pub(super) fn set<L>(
        &mut self,
        listener: Option<ListenerId>,
        listeners: &mut Listeners<L>,
        traffic: &Traffic,
    ) {
        let before = std::mem::replace(&mut self.listener, listener);
        if let Some(sum) = before.and_then(|id| listeners.traffic_of(id)) {
            sum.add(&traffic.since(&self.begun_at));
        }
        self.begun_at = *traffic;
    }

    /// Remembers the listener of the running connection.
    pub(super) fn note_aside(&mut self) {
        self.aside = Some(self.listener);
    }

    pub(super) fn take_aside(&mut self) -> Option<Option<ListenerId>> {
        self.aside.take()
    }

    /// The traffic of all connections that this listener has and has had, out of the server's
    /// `traffic`.
    pub(super) fn of<L>(&self, listener: &Listener<L>, traffic: &Traffic) -> Traffic {
        let mut sum = listener.traffic;
        if self.listener == Some(listener.id) {
            sum.add(&traffic.since(&self.begun_at));
        }
        sum
    }
}
