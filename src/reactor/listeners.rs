//! All listeners of one server: opened, found, registered and closed.

mod checks;
mod update_own;

use std::collections::BTreeSet;

use super::capacity::Capacity;
use super::listener::Listener;
use super::os::{Os, Token};
use super::own_caps::OwnCaps;
use super::timers::Timers;
use super::visits::{Noted, Sums, VisitCount, Visited};
use crate::addr::Addr;
use crate::config::Listen;
use crate::error::{Error, Result};
use crate::id::{ListenerId, ListenerRef, ServerNumber};
use crate::logs;
use crate::proto::{Time, Traffic};

pub(super) struct Listeners<L> {
    all: Vec<Listener<L>>,
    next_id: u32,
    /// The position of the listener that has admitted a client last.
    served: usize,
    /// The running accept round: positions of the listeners that may have a client.
    round: Vec<usize>,
    /// `None` if all listeners have to be visited.
    visited: Option<Visited>,
    /// While nothing of the server's holds back a client: no listener needs a visit before then.
    /// `ZERO` if one does, or if a limit has to be looked at.
    rests_until: Time,
    /// Positions of the listeners that have changed since they were visited. An iteration visits
    /// these alone.
    changed: Vec<usize>,
    /// Positions of the listeners to which an event has come since the last accept round.
    ready: Vec<usize>,
    /// When each listener that was visited has to be visited again, by its position.
    wakes: Timers,
    /// The sums of what was noted of each listener.
    sums: Sums,
    /// A visit has found a closed listener without connections.
    has_over: bool,
    own_caps: OwnCaps,
    /// Those that have reserved slots, or are to have some.
    pub(super) reserves: BTreeSet<ListenerId>,
    visits: VisitCount,
}

impl<L> Default for Listeners<L> {
    fn default() -> Self {
        Self {
            all: Vec::new(),
            next_id: 0,
            served: 0,
            round: Vec::new(),
            visited: None,
            rests_until: Time::ZERO,
            changed: Vec::new(),
            ready: Vec::new(),
            wakes: Timers::default(),
            sums: Sums::default(),
            has_over: false,
            own_caps: OwnCaps::default(),
            reserves: BTreeSet::new(),
            visits: VisitCount::default(),
        }
    }
}

impl<L> Listeners<L> {
    pub(super) fn iter(&self) -> impl Iterator<Item = &Listener<L>> {
        self.all.iter()
    }

    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Listener<L>> {
        self.visit_all();
        self.all.iter_mut()
    }

    pub(super) fn into_all(self) -> Vec<Listener<L>> {
        self.all
    }

    pub(super) fn get(&self, at: usize) -> Option<&Listener<L>> {
        self.all.get(at)
    }

    /// Returns a listener for the sake of a client: no change of a listener that is in the poll and
    /// has no limit of its own.
    #[inline]
    pub(super) fn get_mut(&mut self, at: usize) -> Option<&mut Listener<L>> {
        match self.all.get(at)?.noted.is_indifferent {
            true => self.all.get_mut(at),
            false => self.change(at),
        }
    }

    /// Returns a listener whose state changes: it is visited at the end of the iteration.
    pub(super) fn change(&mut self, at: usize) -> Option<&mut Listener<L>> {
        let listener = self.all.get_mut(at)?;
        self.own_caps.note(listener.id);
        if self.visited.is_some() && listener.noted.change() {
            self.changed.push(at);
            self.rests_until = Time::ZERO;
        }
        Some(listener)
    }

    pub(super) fn by_id(&self, id: ListenerId) -> Option<&Listener<L>> {
        self.all.get(self.position(id)?)
    }

    /// The name of a connection's listener, empty for an outgoing connection.
    pub(super) fn name_of(&self, id: Option<ListenerId>) -> &str {
        let listener = id.and_then(|id| self.by_id(id));
        listener.map_or("", |listener| &listener.name)
    }

    /// As [`Listeners::get_mut`], for the sake of a connection.
    pub(super) fn by_id_mut(&mut self, id: ListenerId) -> Option<&mut Listener<L>> {
        self.get_mut(self.position(id)?)
    }

    /// Its traffic, which changes nothing else of it.
    pub(super) fn traffic_of(&mut self, id: ListenerId) -> Option<&mut Traffic> {
        let at = self.position(id)?;
        self.all.get_mut(at).map(|listener| &mut listener.traffic)
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
        let is_it = |listener: &Listener<L>| listener.is_open() && listener.matches(which);
        let at = self.all.iter().position(is_it);
        at.and_then(|at| self.change(at))
            .ok_or_else(|| no_listener(which))
    }

    /// Number of listening sockets.
    pub(super) fn open(&self) -> usize {
        self.sums().open
    }

    /// Clients of some listener wait in its backlog while no slot is free.
    pub(super) fn let_wait(&self) -> bool {
        self.sums().let_wait > 0
    }

    /// Every listener that was ever opened is in the poll.
    pub(super) fn are_all_registered(&self) -> bool {
        self.all.len() == self.next_id as usize && self.sums().registered == self.all.len()
    }

    /// The sums over all listeners, as they are now.
    fn sums(&self) -> Sums {
        if self.visited.is_none() {
            self.visits.note(self.all.len());
            let mut sums = Sums::default();
            self.all.iter().for_each(|one| sums += one.sums());
            return sums;
        }
        let mut sums = self.sums;
        self.visits.note(self.changed.len());
        for listener in self.changed.iter().filter_map(|&at| self.all.get(at)) {
            sums -= listener.noted.sums;
            sums += listener.sums();
        }
        sums
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

    /// No listener has changed or had an event since all were visited.
    #[inline]
    fn is_unchanged(&self) -> bool {
        self.changed.is_empty() && self.ready.is_empty()
    }

    /// As [`Listeners::settled_until`], for a capacity without restrictions.
    #[inline]
    pub(super) fn rests_until(&self) -> Option<Time> {
        (self.rests_until > Time::ZERO).then_some(self.rests_until)
    }

    /// All listeners have to be visited.
    fn visit_all(&mut self) {
        self.visited = None;
        self.rests_until = Time::ZERO;
    }

    /// Keeps [`Listeners::rests_until`], after listeners were visited or had their round.
    fn note_rest(&mut self) {
        let visited = self.visited.as_ref();
        let rested = visited.filter(|visited| visited.rests && self.is_unchanged());
        self.rests_until = rested.map_or(Time::ZERO, |visited| visited.wake);
    }

    /// Returns the last visit if the capacity is still the same: then listeners that have not
    /// changed need no other.
    #[inline]
    fn visited_for(&self, capacity: impl Fn() -> Capacity) -> Option<&Visited> {
        let visited = self.visited.as_ref()?;
        visited.capacity.is_same(&capacity()).then_some(visited)
    }

    /// Returns until when no listener needs a visit, if none has changed and the capacity is still
    /// the same.
    #[inline]
    fn settled_until(&self, capacity: impl Fn() -> Capacity) -> Option<Time> {
        if !self.is_unchanged() {
            return None;
        }
        self.visited_for(capacity).map(|visited| visited.wake)
    }

    #[inline]
    pub(super) fn is_settled(&self, now: Time, capacity: impl Fn() -> Capacity) -> bool {
        self.settled_until(capacity).is_some_and(|wake| wake > now)
    }

    /// A listener has all of its own connections.
    pub(super) fn reach_own_cap(&mut self, id: ListenerId) {
        if let Some(at) = self.position(id) {
            self.change(at);
        }
        self.own_caps.insert(id);
    }

    /// Begins an accept round, behind the listener that has admitted a client last. False if none can
    /// have a client. Nothing of the server's holds back a client if it `rests`.
    #[inline]
    pub(super) fn begin_round(
        &mut self,
        now: Time,
        rests: bool,
        capacity: impl Fn() -> Capacity,
    ) -> bool {
        if self.is_settled(now, &capacity) {
            return false;
        }
        let visited = self.visited.as_ref();
        let rested = visited.is_some_and(|visited| visited.rests && visited.wake > now);
        match *self.ready.as_slice() {
            // Most often one client has come, and nothing else has happened.
            [at] if rested && rests && self.changed.is_empty() => self.begin_round_of(at),
            _ => self.next_round(now, capacity),
        }
    }

    fn begin_round_of(&mut self, at: usize) -> bool {
        self.visits.note(1);
        self.round.clear();
        let is_readable = self.get(at).is_some_and(|listener| listener.readable);
        if is_readable {
            self.round.push(at);
        } else {
            self.clear_ready();
        }
        is_readable
    }

    #[inline(never)]
    fn next_round(&mut self, now: Time, capacity: impl Fn() -> Capacity) -> bool {
        self.round.clear();
        if self.visited_for(capacity).is_some() {
            self.mark_due(now);
            self.round.extend_from_slice(&self.changed);
            let Self {
                all, ready, round, ..
            } = self;
            let is_unchanged = |at: usize| all.get(at).is_some_and(|one| !one.noted.is_changed);
            round.extend(ready.iter().filter(|&&at| is_unchanged(at)));
            round.sort_unstable();
        } else {
            self.round.extend(0..self.all.len());
        }
        self.visits.note(self.round.len());
        let all = &self.all;
        let is_readable = |at: usize| all.get(at).is_some_and(|listener| listener.readable);
        self.round.retain(|&at| is_readable(at));
        if self.round.is_empty() {
            // The event was stale.
            self.clear_ready();
            return false;
        }
        let behind = self.round.partition_point(|&at| at <= self.served);
        self.round.rotate_left(behind);
        true
    }

    /// A client of this listener was admitted: the others go first in the next round.
    #[inline]
    pub(super) fn note_admitted(&mut self, at: usize) {
        self.served = at;
    }

    fn clear_ready(&mut self) {
        for at in self.ready.drain(..) {
            if let Some(listener) = self.all.get_mut(at) {
                listener.noted.is_ready = false;
            }
        }
        self.note_rest();
    }

    /// The position of a listener of the round.
    #[inline]
    pub(super) fn in_round(&self, nth: usize) -> Option<usize> {
        self.round.get(nth).copied()
    }

    /// The round is over. A listener whose backlog it has not emptied has changed.
    pub(super) fn end_round(&mut self) {
        self.clear_ready();
        self.visits.note(self.round.len());
        for nth in 0..self.round.len() {
            let Some(&at) = self.round.get(nth) else {
                return;
            };
            if self.get(at).is_some_and(|listener| listener.readable) {
                self.change(at);
            }
        }
    }

    /// Marks the listeners that have to be visited by `now` as changed.
    fn mark_due(&mut self, now: Time) {
        while let Some(at) = self.wakes.pop(now) {
            self.change(at as usize);
        }
    }

    /// Marks every listener: accept without waiting for an event.
    pub(super) fn mark_all_readable(&mut self) {
        self.visit_all();
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
        let token_of = |listener: &Listener<L>| Token::of_listener(listener.id);
        let found = match self.next_id <= Token::LISTENERS {
            true => self.all.binary_search_by_key(&token, token_of).ok(),
            false => None,
        };
        if let Some(at) = found {
            return self.make_ready(at);
        }
        for at in 0..self.all.len() {
            if self.get(at).is_some_and(|one| token_of(one) == token) {
                self.make_ready(at);
            }
        }
    }

    #[inline]
    fn make_ready(&mut self, at: usize) {
        if let Some(listener) = self.all.get_mut(at) {
            listener.readable = true;
            if !std::mem::replace(&mut listener.noted.is_ready, true) {
                self.ready.push(at);
                self.rests_until = Time::ZERO;
            }
        }
    }

    /// Ends the waiting of listeners whose retry time has come.
    pub(super) fn expire(&mut self, due: Time) {
        if self.rests_until > due {
            return;
        }
        let Some(visited) = &self.visited else {
            self.visits.note(self.all.len());
            self.all.iter_mut().for_each(|one| one.expire(due));
            return;
        };
        if visited.wake > due && self.changed.is_empty() {
            return;
        }
        self.mark_due(due);
        self.visits.note(self.changed.len());
        for &at in &self.changed {
            if let Some(listener) = self.all.get_mut(at) {
                listener.expire(due);
            }
        }
    }

    /// When a listener has to be looked at without an event. `capacity` is computed only if a
    /// client may be waiting.
    #[inline]
    pub(super) fn wake_at(&self, capacity: impl Fn() -> Capacity) -> Time {
        match self.visited_for(&capacity) {
            Some(visited) if self.is_unchanged() => visited.wake,
            visited => self.visit_at(visited.is_some(), &capacity()),
        }
    }

    /// As [`Listeners::wake_at`]. `is_visited`: listeners that have not changed need no visit.
    #[inline(never)]
    fn visit_at(&self, is_visited: bool, capacity: &Capacity) -> Time {
        if !is_visited {
            self.visits.note(self.all.len());
            let wakes = self.all.iter().map(|listener| listener.wake_at(capacity));
            return wakes.fold(Time::NEVER, Time::min);
        }
        self.visits.note(self.changed.len() + self.ready.len());
        let named = self.changed.iter().chain(&self.ready);
        let wakes = named
            .filter_map(|&at| self.all.get(at))
            .map(|listener| listener.wake_at(capacity));
        wakes.fold(self.wakes.next(), Time::min)
    }

    /// Leaves a listener alone until `retry_at`.
    pub(super) fn back_off(&mut self, at: usize, retry_at: Time) {
        if let Some(listener) = self.change(at) {
            listener.back_off(retry_at);
        }
    }

    /// As [`Listeners::back_off`], with one line in the log until the listener works again.
    pub(super) fn fail(&mut self, at: usize, retry_at: Time, what: &str, error: &std::io::Error) {
        if let Some(listener) = self.change(at) {
            listener.fail(retry_at, what, error);
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
        self.all.push(listener);
        self.change(self.all.len() - 1);
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

    /// Makes the registration of each listener that has changed follow its state. A failure is
    /// retried at `retry_at`.
    #[inline(never)]
    pub(super) fn reconcile<O: Os<Listener = L>>(
        &mut self,
        os: &mut O,
        capacity: &Capacity,
        retry_at: Time,
    ) {
        if self.visited_for(|| *capacity).is_some() {
            self.mark_due(capacity.now);
        } else {
            self.changed.clear();
            self.changed.extend(0..self.all.len());
        }
        self.visits.note(self.changed.len());
        for &at in &self.changed {
            let Some(listener) = self.all.get_mut(at) else {
                continue;
            };
            listener.reconcile(os, capacity, retry_at);
            self.has_over |= listener.is_over();
            let sums = listener.sums();
            self.sums -= listener.noted.sums;
            self.sums += sums;
            listener.noted = Noted {
                sums,
                is_indifferent: listener.registered && !listener.has_limits(),
                is_changed: false,
                is_ready: listener.noted.is_ready,
            };
            self.wakes.disarm(at as u32);
            self.wakes.arm(at as u32, listener.wake_at(capacity));
        }
        self.changed.clear();
        self.visited = Some(Visited {
            capacity: *capacity,
            wake: self.wakes.next(),
            rests: capacity.is_unrestricted() && self.own_caps.is_empty(),
        });
        self.note_rest();
    }

    /// A closed listener may have no connections left.
    #[inline]
    pub(super) fn may_be_over(&self) -> bool {
        self.has_over || self.rests_until == Time::ZERO
    }

    /// Removes the closed listeners that have no connections left.
    pub(super) fn take_closed(&mut self) -> Vec<Listener<L>> {
        let is_over = |&at: &usize| self.all.get(at).is_some_and(Listener::is_over);
        let may_be_over =
            self.visited.is_none() || self.has_over || self.changed.iter().any(is_over);
        if !may_be_over {
            self.visits.note(self.changed.len());
            return Vec::new();
        }
        self.has_over = false;
        self.visits.note(self.all.len());
        if !self.all.iter().any(Listener::is_over) {
            return Vec::new();
        }
        self.clear_ready();
        let (over, left) = std::mem::take(&mut self.all)
            .into_iter()
            .partition(Listener::is_over);
        self.all = left;
        for listener in &over {
            self.sums -= listener.noted.sums;
            self.own_caps.remove(listener.id);
        }
        // Those behind them have other positions.
        self.visit_all();
        self.wakes = Timers::default();
        over
    }
}

fn no_listener(which: &ListenerRef) -> Error {
    Error::NoListener {
        listener: which.clone(),
    }
}

#[cfg(all(test, feature = "sim"))]
mod tests;
