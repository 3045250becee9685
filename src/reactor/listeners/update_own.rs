//! When each listener at its own cap can evict a connection.

use std::time::Duration;

use super::Listeners;
use crate::id::ListenerId;
use crate::proto::Time;
use crate::reactor::connections::Connections;
use crate::reactor::listener::Listener;

impl<L> Listeners<L> {
    /// A listener has reached its own cap.
    #[inline]
    pub(in crate::reactor) fn has_own_caps(&self) -> bool {
        !self.own_caps.is_empty()
    }

    /// A connection of this listener has had a turn: it may be a candidate for eviction no more.
    #[cold]
    pub(in crate::reactor) fn note_turn(&mut self, listener: Option<ListenerId>) {
        if let Some(id) = listener {
            self.own_caps.note(id);
        }
    }

    /// Updates when each listener at its own limit can evict a connection. Others are not visited,
    /// nor those that have not changed under the same `rule`: whether too many connections are
    /// pending, and the grace of each.
    #[inline]
    pub(in crate::reactor) fn update_own<S>(
        &mut self,
        conns: &mut Connections<S>,
        rule: (bool, Duration),
        evicts_at: impl Fn(&Connections<S>, &Listener<L>) -> Time,
    ) {
        if self.own_caps.is_empty() {
            return;
        }
        for id in self.own_caps.take_changed(rule) {
            self.visits.note(1);
            if !self.update_one(id, conns, &evicts_at) {
                self.own_caps.remove(id);
            }
        }
    }

    /// False if the listener is not at its own limit any more.
    fn update_one<S>(
        &mut self,
        id: ListenerId,
        conns: &mut Connections<S>,
        evicts_at: impl Fn(&Connections<S>, &Listener<L>) -> Time,
    ) -> bool {
        let Some(at) = self.position(id) else {
            return false;
        };
        let Some(listener) = self.all.get_mut(at) else {
            return false;
        };
        listener.trim(conns);
        let until = evicts_at(conns, listener);
        let changed = std::mem::replace(&mut listener.evicts_own_at, until) != until;
        let stays = listener.is_open() && listener.reached_cap().is_some();
        if changed {
            self.change(at);
        }
        stays
    }
}
