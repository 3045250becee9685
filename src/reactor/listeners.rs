//! All listeners of one server: opened, found, registered and closed.

use super::capacity::Capacity;
use super::connections::Connections;
use super::fd_exhaustion::FdExhaustion;
use super::listener::Listener;
use super::os::{Os, Token};
use crate::addr::Addr;
use crate::config::Listen;
use crate::error::{Error, Result};
use crate::id::{ListenerId, ListenerRef, ServerNumber};
use crate::listener_info::ListenerState;
use crate::logs;
use crate::proto::Time;
use std::collections::BTreeSet;

pub(super) struct Listeners<L> {
    all: Vec<Listener<L>>,
    next_id: u32,
    /// The listener that accepts first in the next round.
    first: usize,
    /// Set while no listener has changed since all were visited. An iteration without events for
    /// listeners visits none then.
    settled: Option<Settled>,
    /// An event has come for one of them since the last accept round.
    may_have_client: bool,
    /// A connection or a descriptor was freed: the next visit tries all that are out of the poll.
    retries: bool,
    /// Listeners that have reached their own caps since the last [`Listeners::update_own`].
    at_own_cap: BTreeSet<ListenerId>,
    /// How often one was looked at that no caller named.
    #[cfg(test)]
    visits: std::cell::Cell<usize>,
}

/// The results of a visit to all listeners, valid until one changes.
struct Settled {
    /// The capacity for which they were visited.
    capacity: Capacity,
    /// When one of them has to be visited again.
    wake: Time,
    /// Nothing of the server's held back a client.
    rests: bool,
    /// Every listener was in the poll and had no limit of its own: connections that begin and end
    /// change none.
    all_accept: bool,
    facts: Facts,
}

/// Sums over all listeners.
#[derive(Clone, Copy)]
struct Facts {
    open: usize,
    let_wait: bool,
    all_registered: bool,
}

impl<L> Default for Listeners<L> {
    fn default() -> Self {
        Self {
            all: Vec::new(),
            next_id: 0,
            first: 0,
            settled: None,
            may_have_client: false,
            retries: false,
            at_own_cap: BTreeSet::new(),
            #[cfg(test)]
            visits: std::cell::Cell::default(),
        }
    }
}

impl<L> Listeners<L> {
    /// Counts a visit to each listener.
    #[inline(always)]
    fn note_visits(&self) {
        #[cfg(test)]
        self.visits.set(self.visits.get() + self.all.len());
    }

    #[cfg(test)]
    pub(super) fn visits(&self) -> usize {
        self.visits.get()
    }

    pub(super) fn len(&self) -> usize {
        self.all.len()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Listener<L>> {
        self.all.iter()
    }

    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Listener<L>> {
        self.unsettle();
        self.apply_retries();
        self.all.iter_mut()
    }

    pub(super) fn into_all(self) -> Vec<Listener<L>> {
        self.all
    }

    pub(super) fn get(&self, at: usize) -> Option<&Listener<L>> {
        self.all.get(at)
    }

    /// For what concerns one of its clients.
    pub(super) fn get_mut(&mut self, at: usize) -> Option<&mut Listener<L>> {
        self.unsettle_for_client();
        self.all.get_mut(at)
    }

    /// For what changes its state.
    pub(super) fn change(&mut self, at: usize) -> Option<&mut Listener<L>> {
        self.unsettle();
        self.all.get_mut(at)
    }

    pub(super) fn by_id(&self, id: ListenerId) -> Option<&Listener<L>> {
        self.all.get(self.position(id)?)
    }

    /// For what concerns one of its connections.
    pub(super) fn by_id_mut(&mut self, id: ListenerId) -> Option<&mut Listener<L>> {
        let at = self.position(id)?;
        self.unsettle_for_client();
        self.all.get_mut(at)
    }

    fn position(&self, id: ListenerId) -> Option<usize> {
        let number = |listener: &Listener<L>| listener.id.number();
        match self.all.binary_search_by_key(&id.number(), number) {
            Ok(at) => Some(at),
            // They are in order until the numbers wrap.
            Err(_) => self.all.iter().position(|listener| listener.id == id),
        }
    }

    /// The open listener that `which` names.
    pub(super) fn find(&self, which: &ListenerRef) -> Result<&Listener<L>> {
        let found = self
            .all
            .iter()
            .find(|listener| listener.is_open() && listener.matches(which));
        found.ok_or_else(|| no_listener(which))
    }

    pub(super) fn find_mut(&mut self, which: &ListenerRef) -> Result<&mut Listener<L>> {
        self.unsettle();
        let mut open = self.all.iter_mut().filter(|listener| listener.is_open());
        let found = open.find(|listener| listener.matches(which));
        found.ok_or_else(|| no_listener(which))
    }

    /// Number of listening sockets.
    pub(super) fn open(&self) -> usize {
        self.facts().open
    }

    /// Clients of some listener wait in its backlog while no slot is free.
    pub(super) fn let_wait(&self) -> bool {
        self.facts().let_wait
    }

    /// Every listener that was ever opened is in the poll.
    pub(super) fn are_all_registered(&self) -> bool {
        self.facts().all_registered
    }

    fn facts(&self) -> Facts {
        match &self.settled {
            Some(settled) => settled.facts,
            None => self.count_facts(),
        }
    }

    fn count_facts(&self) -> Facts {
        self.note_visits();
        let lets_wait = |listener: &Listener<L>| !listener.suspended && listener.lets_wait();
        let open = || self.all.iter().filter(|listener| listener.is_open());
        Facts {
            open: open().count(),
            let_wait: open().any(lets_wait),
            all_registered: self.all.len() == self.next_id as usize
                && self.all.iter().all(|listener| listener.registered),
        }
    }

    pub(super) fn check_name(&self, name: &str) -> Result<()> {
        let taken = |listener: &Listener<L>| listener.is_open() && *listener.name == *name;
        if self.all.iter().any(taken) {
            return Err(Error::NameTaken {
                name: name.to_owned(),
            });
        }
        Ok(())
    }

    /// Checks the name that a listener on `addr` would have by default, before the port is open.
    /// The name of port 0 is not known before.
    pub(super) fn check_default_name(&self, addr: &Addr, shares_port: bool) -> Result<()> {
        if addr.port() == Some(0) {
            return Ok(());
        }
        let same = |listener: &Listener<L>| listener.is_open() && listener.addr == *addr;
        if !shares_port && self.all.iter().any(same) {
            return Err(Error::AddressInUse { addr: addr.clone() });
        }
        self.check_name(&addr.to_string())
    }

    /// No listener needs a visit because a connection has begun or ended.
    #[inline]
    fn is_indifferent(&self) -> bool {
        self.settled
            .as_ref()
            .is_some_and(|settled| settled.all_accept)
    }

    /// A connection of a listener has begun or ended.
    #[inline]
    fn unsettle_for_client(&mut self) {
        if !self.is_indifferent() {
            self.unsettle();
        }
    }

    /// A listener has changed.
    #[inline]
    fn unsettle(&mut self) {
        self.settled = None;
    }

    /// As [`Listeners::settled_until`], for a capacity without restrictions.
    #[inline]
    pub(super) fn rests_until(&self) -> Option<Time> {
        let settled = self.settled.as_ref().filter(|_| !self.may_have_client);
        settled
            .filter(|settled| settled.rests)
            .map(|settled| settled.wake)
    }

    /// No listener needs a visit before the result, if the capacity is still the same.
    #[inline]
    fn settled_until(&self, capacity: impl Fn() -> Capacity) -> Option<Time> {
        let settled = self.settled.as_ref().filter(|_| !self.may_have_client);
        let Settled {
            capacity: then,
            wake,
            ..
        } = settled?;
        then.is_same(&capacity()).then_some(*wake)
    }

    /// No listener has changed since all were visited, for this capacity.
    #[cfg(feature = "sim")]
    pub(super) fn were_visited(&self, capacity: &Capacity) -> bool {
        self.settled_until(|| *capacity).is_some()
    }

    #[inline]
    pub(super) fn is_settled(&self, now: Time, capacity: impl Fn() -> Capacity) -> bool {
        self.settled_until(capacity).is_some_and(|wake| wake > now)
    }

    /// A listener has all of its own connections.
    pub(super) fn reach_own_cap(&mut self, id: ListenerId) {
        self.unsettle();
        self.at_own_cap.insert(id);
    }

    /// Updates when each listener at its own limit can evict a connection. Others are not visited.
    pub(super) fn update_own<S>(
        &mut self,
        conns: &Connections<S>,
        evicts_at: impl Fn(&Listener<L>) -> Time,
    ) {
        if self.at_own_cap.is_empty() {
            return;
        }
        let mut at_own_cap = std::mem::take(&mut self.at_own_cap);
        let mut changed = false;
        at_own_cap.retain(|&id| {
            let Some(at) = self.position(id) else {
                return false;
            };
            let Some(listener) = self.all.get_mut(at) else {
                return false;
            };
            if let Some(unproven) = &mut listener.unproven {
                unproven.silent.trim(conns);
            }
            let until = evicts_at(listener);
            changed |= std::mem::replace(&mut listener.evicts_own_at, until) != until;
            listener.is_open() && listener.reached_cap().is_some()
        });
        self.at_own_cap = at_own_cap;
        if changed {
            self.unsettle();
        }
    }

    /// Begins an accept round: each round starts with another listener. `None` if none can have a
    /// client.
    #[inline]
    pub(super) fn begin_round(
        &mut self,
        now: Time,
        capacity: impl Fn() -> Capacity,
    ) -> Option<usize> {
        if self.is_settled(now, capacity) {
            return None;
        }
        self.next_round()
    }

    #[inline(never)]
    fn next_round(&mut self) -> Option<usize> {
        self.note_visits();
        self.apply_retries();
        if !self.all.iter().any(|listener| listener.readable) {
            // The event was stale.
            self.may_have_client = false;
            return None;
        }
        self.first = (self.first + 1) % self.all.len().max(1);
        Some(self.first)
    }

    /// The round is over. If it has emptied every backlog, the listeners are settled as before.
    pub(super) fn end_round(&mut self) {
        self.note_visits();
        self.may_have_client = false;
        if self.all.iter().any(|listener| listener.readable) {
            self.unsettle();
        }
    }

    /// A connection or a descriptor was freed: tries every listener that is out of the poll,
    /// without waiting for an event.
    #[inline]
    pub(super) fn retry_unregistered(&mut self) {
        if self.is_indifferent() {
            return;
        }
        self.unsettle();
        self.retries = true;
    }

    fn apply_retries(&mut self) {
        if std::mem::take(&mut self.retries) {
            self.note_visits();
            for listener in &mut self.all {
                listener.readable |= !listener.registered && listener.is_open();
            }
        }
    }

    /// Marks every listener: accept without waiting for an event.
    pub(super) fn mark_all_readable(&mut self) {
        self.unsettle();
        for listener in &mut self.all {
            listener.readable = true;
        }
    }

    /// The loop was busy for a while: clients of any listener may have waited.
    #[cold]
    pub(super) fn mark_waited(&mut self) {
        for listener in &mut self.all {
            listener.has_waited = true;
        }
    }

    /// An event for a listener. Tokens repeat after many listens: then all that have this one are
    /// searched, and an accept that finds no client is cheap.
    pub(super) fn handle_event(&mut self, token: Token) {
        self.may_have_client = true;
        let token_of = |listener: &Listener<L>| Token::of_listener(listener.id);
        let found = match self.next_id <= Token::LISTENERS {
            true => self.all.binary_search_by_key(&token, token_of).ok(),
            false => None,
        };
        if let Some(listener) = found.and_then(|at| self.all.get_mut(at)) {
            listener.readable = true;
            return;
        }
        for listener in &mut self.all {
            listener.readable |= token_of(listener) == token;
        }
    }

    /// Ends the waiting of listeners whose retry time has come.
    pub(super) fn expire(&mut self, due: Time) {
        if self
            .settled
            .as_ref()
            .is_some_and(|settled| settled.wake > due)
        {
            return;
        }
        self.unsettle();
        self.note_visits();
        for listener in &mut self.all {
            if listener.retry_at <= due {
                listener.retry_at = Time::NEVER;
                listener.readable = true;
            }
        }
    }

    /// When a listener has to be looked at without an event. `capacity` is computed only if a
    /// client may be waiting.
    #[inline]
    pub(super) fn wake_at(&self, capacity: impl Fn() -> Capacity) -> Time {
        if let Some(wake) = self.settled_until(&capacity) {
            return wake;
        }
        if self.retries {
            return Time::ZERO;
        }
        self.visit_at(capacity)
    }

    #[inline(never)]
    fn visit_at(&self, capacity: impl Fn() -> Capacity) -> Time {
        let mut wake = Time::NEVER;
        self.note_visits();
        for listener in &self.all {
            wake = wake.min(listener.retry_at);
            if listener.is_open() && listener.may_accept() {
                wake = wake.min(listener.accepts_at(&capacity()));
            }
        }
        wake
    }

    /// Leaves a listener alone until `retry_at`.
    pub(super) fn back_off(&mut self, at: usize, retry_at: Time) {
        self.unsettle();
        if let Some(listener) = self.all.get_mut(at) {
            listener.retry_at = retry_at;
            listener.has_waited = true;
        }
    }

    /// As [`Listeners::back_off`], with one line in the log until the listener works again.
    pub(super) fn fail(&mut self, at: usize, retry_at: Time, what: &str, error: &std::io::Error) {
        self.back_off(at, retry_at);
        if let Some(listener) = self.all.get_mut(at) {
            if !std::mem::replace(&mut listener.failing, true) {
                logs::warning!(
                    target: logs::LISTENER,
                    "{what} listener {} on {}: {error}; trying again",
                    listener.name,
                    listener.addr
                );
            }
        }
    }

    /// Adds a listener whose socket is `socket`, and registers it if it may accept now.
    pub(super) fn add<O: Os<Listener = L>>(
        &mut self,
        os: &mut O,
        server: ServerNumber,
        listen: Listen,
        mut socket: L,
        service: usize,
        capacity: &Capacity,
    ) -> Result<ListenerId> {
        let addr = os
            .listener_addr(&socket)
            .map_err(Error::os("reading the address of a listening socket"))?;
        let name = listen.name.clone().unwrap_or_else(|| addr.to_string());
        self.check_name(&name)?;
        let id = self.vacant_id(server);
        let mut listener = Listener::new(id, name, addr, service, listen, capacity.now);
        if listener.admits_at(capacity) <= capacity.now {
            os.register_listener(&mut socket, Token::of_listener(id))
                .map_err(Error::os("registering a listening socket"))?;
            listener.registered = true;
        }
        listener.socket = Some(socket);
        logs::info!(target: logs::LISTENER, "listener {} on {}", listener.name, listener.addr);
        self.next_id = self.next_id.wrapping_add(1);
        self.unsettle();
        self.all.push(listener);
        Ok(id)
    }

    /// The id for the next listener: no other one has it, although the numbers repeat.
    fn vacant_id(&mut self, server: ServerNumber) -> ListenerId {
        let id = |number| ListenerId::new(server, number);
        while self.by_id(id(self.next_id)).is_some() {
            self.next_id = self.next_id.wrapping_add(1);
        }
        id(self.next_id)
    }

    /// Makes each listener's registration follow its state, unless they are settled. A failure is
    /// retried at `retry_at`.
    #[inline(never)]
    pub(super) fn reconcile<O: Os<Listener = L>>(
        &mut self,
        os: &mut O,
        capacity: &Capacity,
        retry_at: Time,
    ) {
        self.apply_retries();
        self.note_visits();
        for at in 0..self.all.len() {
            let Some(listener) = self.all.get_mut(at) else {
                break;
            };
            let wanted = listener.state(capacity) == ListenerState::Listening;
            // No event announces the clients that come while it is out of the poll.
            listener.readable |= !wanted && listener.is_open();
            listener.has_waited |= !wanted;
            if wanted == listener.registered || listener.retry_at.is_armed() {
                continue;
            }
            let Some(socket) = &mut listener.socket else {
                continue;
            };
            let outcome = if wanted {
                os.register_listener(socket, Token::of_listener(listener.id))
            } else {
                os.deregister_listener(socket)
            };
            match outcome {
                Ok(()) => {
                    listener.registered = wanted;
                    // A client may have come since the last accept: do not rely on the edge.
                    listener.readable |= wanted;
                }
                Err(error) => {
                    let what = if wanted {
                        "cannot register"
                    } else {
                        "cannot deregister"
                    };
                    self.fail(at, retry_at, what, &error);
                }
            }
        }
        let accepts = |listener: &Listener<L>| listener.registered && !listener.has_limits();
        self.settled = Some(Settled {
            capacity: *capacity,
            wake: self.visit_at(|| *capacity),
            rests: capacity.is_unrestricted() && self.at_own_cap.is_empty(),
            all_accept: self.all.iter().all(accepts),
            facts: self.count_facts(),
        });
    }

    /// Removes a closed listener that has no connections left. Released the key of its service.
    pub(super) fn remove_closed(&mut self) -> Option<(Listener<L>, usize)> {
        if self.settled.is_some() {
            return None;
        }
        self.note_visits();
        let over = |listener: &Listener<L>| !listener.is_open() && listener.connections == 0;
        // From the end: there the removal moves the fewest.
        let at = self.all.iter().rposition(over)?;
        let listener = self.all.remove(at);
        let service = listener.service;
        Some((listener, service))
    }
}

/// Closes a listening socket, which frees a descriptor. Its connections live on.
pub(super) fn close<O: Os>(
    os: &mut O,
    fds: &mut FdExhaustion,
    listener: &mut Listener<O::Listener>,
) {
    let Some(mut socket) = listener.socket.take() else {
        return;
    };
    if std::mem::take(&mut listener.registered) {
        // Closing removes it from the poll too, unless another process holds the socket.
        if let Err(error) = os.deregister_listener(&mut socket) {
            logs::debug!(target: logs::LISTENER, "cannot deregister listener {}: {error}", listener.name);
        }
    }
    os.close_listener(socket);
    fds.end_pause();
    listener.readable = false;
    listener.retry_at = Time::NEVER;
    logs::info!(target: logs::LISTENER, "listener {} on {} is closed", listener.name, listener.addr);
}

fn no_listener(which: &ListenerRef) -> Error {
    Error::NoListener {
        listener: which.clone(),
    }
}

#[cfg(test)]
mod tests;
