//! One exact cap over several servers: the taken permits, and the servers that wait for one.

use std::any::Any;
use std::fmt;
use std::sync::{Arc, OnceLock, PoisonError};

use crate::detached::Permit;
use crate::handle::Wake;
use crate::logs;
use crate::sync::atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering};
use crate::sync::{Mutex, MutexGuard};

/// The permits that several servers share.
///
/// A server looks for a client and takes the permit for it under one lock, so that no permit is
/// taken without a connection. No foreign code runs under the lock.
///
/// A server that finds no free permit marks itself as waiting, checks once more, and sleeps. A
/// server that sees a free permit wakes one waiting server before it runs foreign code, unless one
/// is ready. So a client waits beside a free permit only while every server runs foreign code. All
/// of it is sequentially consistent: of a server that gives a permit back and then looks for
/// waiting ones, and a server that waits and then looks for permits, one sees the other.
pub(crate) struct SharedCap {
    /// Number of taken permits: above the cap while that is lower than it was.
    taken: AtomicUsize,
    cap: AtomicUsize,
    /// Held while a server looks for a client and takes a permit for it, and while the cap
    /// changes.
    changing: Mutex<()>,
    sharers: Box<[Sharer]>,
    /// Number of servers that are still there.
    present: AtomicUsize,
    /// One of the servers reports that the cap is reached.
    is_reported: AtomicBool,
    /// Number of servers that are [`WAITING`].
    waiting: AtomicUsize,
    /// Number of servers that are [`READY`].
    ready: AtomicUsize,
    /// The server after the one that was woken last.
    next: AtomicUsize,
    /// The servers listen on the same sockets: a client of one is a client of all.
    one_backlog: AtomicBool,
    /// Number of descriptors of all servers, at the ends of their last iterations.
    descriptors: AtomicUsize,
    /// Number of servers with bounds: see [`Sharer::bounds`].
    watching: AtomicUsize,
}

/// The server runs, and looks for permits and for waiting servers itself.
const AWAKE: u8 = 0;
/// The server sleeps until a permit is free.
const WAITING: u8 = 1;
/// The server was woken for a permit, or sleeps until a client comes to any of the sockets.
const READY: u8 = 2;

/// Ranges of the numbers that alarms watch. Each begins at the first number, and ends before the
/// second.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    /// Of connections under the cap.
    pub(super) connections: (usize, usize),
    pub(super) descriptors: (usize, usize),
}

#[derive(Default)]
struct Sharer {
    /// [`AWAKE`], [`WAITING`] or [`READY`].
    state: AtomicU8,
    /// The server is to be woken once a number is out of bounds.
    bounds: Mutex<Option<Bounds>>,
    /// The server may have a connection that it can evict for a client.
    may_evict: AtomicBool,
    wake: OnceLock<Box<dyn Wake>>,
}

impl SharedCap {
    pub(crate) fn new(cap: usize, sharers: usize) -> Self {
        Self {
            taken: AtomicUsize::new(0),
            cap: AtomicUsize::new(cap),
            changing: Mutex::new(()),
            sharers: (0..sharers).map(|_| Sharer::default()).collect(),
            present: AtomicUsize::new(0),
            is_reported: AtomicBool::new(false),
            waiting: AtomicUsize::new(0),
            ready: AtomicUsize::new(0),
            next: AtomicUsize::new(0),
            one_backlog: AtomicBool::new(false),
            descriptors: AtomicUsize::new(0),
            watching: AtomicUsize::new(0),
        }
    }

    pub(crate) fn cap(&self) -> usize {
        self.cap.load(Ordering::Relaxed)
    }

    /// Sets the cap. When this returns, no permit beyond the new cap is taken any more.
    pub(crate) fn set_cap(&self, cap: usize) {
        {
            let _locked = self.lock();
            self.cap.store(cap, Ordering::SeqCst);
        }
        // All servers, waiting or not: each reports the cap.
        for sharer in &self.sharers {
            sharer.wake();
        }
    }

    /// All servers listen on the same sockets, each on all of them.
    pub(crate) fn set_one_backlog(&self) {
        self.one_backlog.store(true, Ordering::Relaxed);
    }

    /// While the result lives no other server looks for a client, and the cap does not change.
    pub(super) fn lock(&self) -> MutexGuard<'_, ()> {
        lock(&self.changing)
    }

    fn taken(&self) -> usize {
        self.taken.load(Ordering::SeqCst)
    }

    fn has_free(&self) -> bool {
        self.taken() < self.cap.load(Ordering::SeqCst)
    }

    /// The average number of permits per present server.
    fn average(&self) -> usize {
        self.taken() / self.present.load(Ordering::Relaxed).max(1)
    }

    fn take(&self) -> bool {
        let cap = self.cap.load(Ordering::SeqCst);
        let one_more = |taken: usize| (taken < cap).then_some(taken + 1);
        let taken = self
            .taken
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, one_more)
            .is_ok();
        if taken {
            self.notify_watching();
        }
        taken
    }

    fn give_back(&self, permits: usize) {
        let before = self.taken.fetch_sub(permits, Ordering::SeqCst);
        self.notify_watching();
        if before > self.cap.load(Ordering::SeqCst) {
            self.end_excess();
        }
    }

    /// The cap had been exceeded. Once it is not any more, a server that sleeps may have a connection
    /// that it can evict.
    #[cold]
    fn end_excess(&self) {
        if self.taken() <= self.cap.load(Ordering::SeqCst) {
            for sharer in &self.sharers {
                sharer.wake();
            }
        }
    }

    /// Wakes a waiting server if a permit is free and none is ready for it.
    #[inline]
    fn offer(&self) {
        let waits = self.waiting.load(Ordering::SeqCst) > 0;
        if waits && self.ready.load(Ordering::SeqCst) == 0 && self.has_free() {
            self.wake_one();
        }
    }

    #[cold]
    fn wake_one(&self) {
        let count = self.sharers.len().max(1);
        let first = self.next.fetch_add(1, Ordering::Relaxed);
        for offset in 0..count {
            let sharer = self.sharers.get(first.wrapping_add(offset) % count);
            if let Some(sharer) = sharer.filter(|sharer| self.make_ready(sharer)) {
                return sharer.wake();
            }
        }
    }

    /// True if the server was waiting.
    fn make_ready(&self, sharer: &Sharer) -> bool {
        // Before the server can end it.
        self.ready.fetch_add(1, Ordering::SeqCst);
        let (seq, waited) = (Ordering::SeqCst, WAITING);
        let changed = sharer.state.compare_exchange(waited, READY, seq, seq);
        let counter = match changed {
            Ok(_) => &self.waiting,
            Err(_) => &self.ready,
        };
        counter.fetch_sub(1, Ordering::SeqCst);
        changed.is_ok()
    }

    fn set_state(&self, sharer: &Sharer, state: u8) {
        let counter = |state| match state {
            WAITING => Some(&self.waiting),
            READY => Some(&self.ready),
            _ => None,
        };
        if let Some(counter) = counter(state) {
            counter.fetch_add(1, Ordering::SeqCst);
        }
        let before = sharer.state.swap(state, Ordering::SeqCst);
        if let Some(counter) = counter(before) {
            counter.fetch_sub(1, Ordering::SeqCst);
        }
    }

    /// Wakes the servers whose bounds a number has passed.
    #[inline]
    fn notify_watching(&self) {
        if self.watching.load(Ordering::SeqCst) > 0 {
            self.check_bounds();
        }
    }

    #[cold]
    fn check_bounds(&self) {
        for sharer in &self.sharers {
            let is_out = |value, (least, most)| value < least || value >= most;
            let is_passed = |bounds: &mut Bounds| {
                is_out(self.taken(), bounds.connections)
                    || is_out(self.descriptors.load(Ordering::SeqCst), bounds.descriptors)
            };
            let passed = lock(&sharer.bounds).take_if(is_passed);
            if passed.is_some() {
                self.watching.fetch_sub(1, Ordering::SeqCst);
                sharer.wake();
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Sharer {
    fn wake(&self) {
        if let Some(Err(error)) = self.wake.get().map(|wake| wake.wake()) {
            logs::warning!(target: logs::SERVER, "cannot wake the loop: {error}");
        }
    }
}

/// A smaller excess over the other servers is no imbalance.
const SLACK: usize = 4;

impl fmt::Debug for SharedCap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SharedCap")
            .field("cap", &self.cap())
            .field("free", &self.cap().saturating_sub(self.taken()))
            .finish_non_exhaustive()
    }
}

/// The permit of a connection that has left its server. `None` once another one has it.
#[derive(Debug)]
struct DetachedPermit(Option<Arc<SharedCap>>);

impl Permit for DetachedPermit {
    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

impl Drop for DetachedPermit {
    fn drop(&mut self) {
        if let Some(shared_cap) = &self.0 {
            shared_cap.give_back(1);
            shared_cap.offer();
        }
    }
}

/// One server's permits. Given back on drop.
pub(super) struct CapShare {
    shared_cap: Arc<SharedCap>,
    index: usize,
    /// Permits of its connections, and of the client that is being admitted.
    held: usize,
    /// Its part of the sum of descriptors.
    descriptors: usize,
    /// It reports that the cap is reached.
    reports: bool,
}

impl CapShare {
    /// `wake` lets other servers wake this one when a permit is free again.
    pub(super) fn new(shared_cap: Arc<SharedCap>, index: usize, wake: Box<dyn Wake>) -> Self {
        if let Some(sharer) = shared_cap.sharers.get(index) {
            // Called once for each server.
            let _ = sharer.wake.set(wake);
        }
        shared_cap.present.fetch_add(1, Ordering::Relaxed);
        Self {
            shared_cap,
            index,
            held: 0,
            descriptors: 0,
            reports: false,
        }
    }

    /// True if this server reports that the cap is reached, and no other one.
    pub(super) fn claim_report(&mut self) -> bool {
        self.reports = self.reports || !self.shared_cap.is_reported.swap(true, Ordering::Relaxed);
        self.reports
    }

    pub(super) fn release_report(&mut self) {
        if std::mem::take(&mut self.reports) {
            self.shared_cap.is_reported.store(false, Ordering::Relaxed);
        }
    }

    pub(super) fn shared_cap(&self) -> &Arc<SharedCap> {
        &self.shared_cap
    }

    pub(super) fn cap(&self) -> usize {
        self.shared_cap.cap()
    }

    pub(super) fn set_cap(&self, cap: usize) {
        self.shared_cap.set_cap(cap);
    }

    /// Number of connections of all servers.
    pub(super) fn taken(&self) -> usize {
        self.shared_cap.taken()
    }

    /// The number of this server, and that of all servers.
    #[cfg(feature = "observer")]
    pub(super) fn number(&self) -> (usize, usize) {
        (self.index, self.shared_cap.sharers.len())
    }

    /// This server's part of a limit on all servers.
    pub(super) fn part_of(&self, limit: usize) -> usize {
        limit.div_ceil(self.shared_cap.sharers.len().max(1))
    }

    pub(super) fn has_room(&self) -> bool {
        self.shared_cap.has_free()
    }

    /// Whether this server has clearly more connections than the others.
    pub(super) fn is_ahead(&self) -> bool {
        // A small number is never an excess, and the comparison costs a cache line that all servers
        // write.
        if self.held <= SLACK {
            return false;
        }
        let average = self.shared_cap.average();
        self.held > average + average / 8 + SLACK
    }

    /// Whether no permit is free, and the cap is not exceeded.
    pub(super) fn is_exhausted(&self) -> bool {
        self.shared_cap.taken() == self.shared_cap.cap()
    }

    /// Publishes to the other servers whether this one may have a connection that it can evict.
    pub(super) fn set_may_evict(&self, may_evict: bool) {
        if let Some(sharer) = self.shared_cap.sharers.get(self.index) {
            sharer.may_evict.store(may_evict, Ordering::SeqCst);
        }
    }

    /// Another server may evict a connection for a client that is in the backlog of this one too.
    pub(super) fn may_others_evict(&self) -> bool {
        let mut sharers = self.shared_cap.sharers.iter().enumerate();
        self.shared_cap.one_backlog.load(Ordering::Relaxed)
            && sharers
                .any(|(at, sharer)| at != self.index && sharer.may_evict.load(Ordering::SeqCst))
    }

    /// Takes a permit.
    pub(super) fn take(&mut self) -> bool {
        let taken = self.shared_cap.take();
        self.held += usize::from(taken);
        taken
    }

    /// Takes a permit whether one is free or not: the count is right all the same.
    pub(super) fn take_anyway(&mut self) {
        self.shared_cap.taken.fetch_add(1, Ordering::SeqCst);
        self.held += 1;
    }

    /// Gives one permit back. [`CapShare::offer`] is due before foreign code runs.
    pub(super) fn give_back(&mut self) {
        self.held = self.held.saturating_sub(1);
        self.shared_cap.give_back(1);
    }

    /// One permit leaves the server with its connection.
    pub(super) fn detach(&mut self) -> Box<dyn Permit> {
        self.held = self.held.saturating_sub(1);
        Box::new(DetachedPermit(Some(Arc::clone(&self.shared_cap))))
    }

    /// A detached connection comes back with its permit. False if it has none, or that of another
    /// cap, which stays.
    pub(super) fn attach(&mut self, permit: &mut Option<Box<dyn Permit>>) -> bool {
        let taken = permit.take().map(|permit| permit.into_any().downcast());
        let Some(Ok::<Box<DetachedPermit>, _>(mut taken)) = taken else {
            return false;
        };
        let is_own = |cap: &mut Arc<SharedCap>| Arc::ptr_eq(cap, &self.shared_cap);
        let attached = taken.0.take_if(is_own).is_some();
        self.held += usize::from(attached);
        *permit = Some(taken);
        attached
    }

    /// Wakes one waiting server if a permit is free: this server is about to run foreign code.
    #[inline]
    pub(super) fn offer(&self) {
        self.shared_cap.offer();
    }

    /// At the end of an iteration that has found room. A server that `listens` on all sockets that
    /// the others listen on finds every client; otherwise a waiting server looks too.
    pub(super) fn rest(&self, listens: bool) {
        if listens && self.shared_cap.one_backlog.load(Ordering::Relaxed) {
            self.set_state(READY);
        } else {
            self.offer();
        }
    }

    /// The last check for a permit in an iteration. If none is free, the server will be woken when
    /// one is. No foreign code may run between this check and the poll.
    pub(super) fn await_room(&self) -> bool {
        if self.has_room() {
            return true;
        }
        self.set_state(WAITING);
        let has_room = self.has_room();
        if has_room {
            self.set_state(AWAKE);
        }
        has_room
    }

    /// The poll has returned.
    pub(super) fn wake_up(&self) {
        self.set_state(AWAKE);
    }

    fn set_state(&self, state: u8) {
        if let Some(sharer) = self.shared_cap.sharers.get(self.index) {
            self.shared_cap.set_state(sharer, state);
        }
    }

    /// Number of descriptors of all servers. This one has `own` of them now.
    pub(super) fn descriptors(&self, own: usize) -> usize {
        let all = self.shared_cap.descriptors.load(Ordering::SeqCst);
        all.saturating_sub(self.descriptors).saturating_add(own)
    }

    /// Other servers find that this one has `own` descriptors.
    pub(super) fn publish_descriptors(&mut self, own: usize) {
        let before = std::mem::replace(&mut self.descriptors, own);
        if before != own {
            let sum = &self.shared_cap.descriptors;
            // It wraps, and so does the difference.
            sum.fetch_add(own.wrapping_sub(before), Ordering::SeqCst);
            self.shared_cap.notify_watching();
        }
    }

    /// The server is to be woken once a number is out of `bounds`. It may be already when this
    /// returns.
    pub(super) fn watch(&self, bounds: Option<Bounds>) {
        let Some(sharer) = self.shared_cap.sharers.get(self.index) else {
            return;
        };
        // Before the bounds are taken away again, it is counted.
        if bounds.is_some() {
            self.shared_cap.watching.fetch_add(1, Ordering::SeqCst);
        }
        if std::mem::replace(&mut *lock(&sharer.bounds), bounds).is_some() {
            self.shared_cap.watching.fetch_sub(1, Ordering::SeqCst);
        }
    }
}

impl Drop for CapShare {
    fn drop(&mut self) {
        self.release_report();
        self.wake_up();
        self.watch(None);
        self.set_may_evict(false);
        self.publish_descriptors(0);
        self.shared_cap.present.fetch_sub(1, Ordering::Relaxed);
        self.shared_cap.give_back(std::mem::take(&mut self.held));
        // Clients may wait for this server's permits in any backlog.
        for _ in &self.shared_cap.sharers {
            self.shared_cap.offer();
        }
    }
}

#[cfg(all(test, loom))]
mod models;
#[cfg(all(test, feature = "sim"))]
mod tests;
