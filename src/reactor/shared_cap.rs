//! One exact cap over several servers: the free permits, and the servers that wait for one.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicIsize, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use crate::handle::Wake;
use crate::logs;

/// The permits that several servers share.
///
/// A server takes a permit before it accepts, so that no two of them take the last one. A server
/// that finds none marks itself as waiting and checks once more. A server that gives one back
/// checks for waiting ones afterwards. All of it is sequentially consistent, so in that order one
/// of the two sees the other. So no server sleeps while a permit is free.
pub(crate) struct SharedCap {
    /// Negative while the cap is lower than the number of permits taken before.
    free: AtomicIsize,
    cap: AtomicUsize,
    /// Held while the cap changes: concurrent changes must not add up.
    changing: Mutex<()>,
    sharers: Box<[Sharer]>,
    /// Number of servers that are still there.
    present: AtomicUsize,
    /// One of the servers reports that the cap is reached.
    is_reported: AtomicBool,
}

#[derive(Default)]
struct Sharer {
    waits: AtomicBool,
    wake: OnceLock<Box<dyn Wake>>,
}

impl SharedCap {
    pub(crate) fn new(cap: usize, sharers: usize) -> Self {
        Self {
            free: AtomicIsize::new(signed(cap)),
            cap: AtomicUsize::new(cap),
            changing: Mutex::new(()),
            sharers: (0..sharers).map(|_| Sharer::default()).collect(),
            present: AtomicUsize::new(0),
            is_reported: AtomicBool::new(false),
        }
    }

    pub(crate) fn cap(&self) -> usize {
        self.cap.load(Ordering::Relaxed)
    }

    /// Sets the cap. When this returns, no permit beyond the new cap is taken any more.
    pub(crate) fn set_cap(&self, cap: usize) {
        {
            let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
            let before = self.cap.swap(cap, Ordering::SeqCst);
            self.free
                .fetch_add(signed(cap) - signed(before), Ordering::SeqCst);
        }
        // All servers, waiting or not: each reports the cap.
        for sharer in &self.sharers {
            sharer.waits.store(false, Ordering::SeqCst);
            sharer.wake();
        }
    }

    fn free(&self) -> isize {
        self.free.load(Ordering::SeqCst)
    }

    /// The average number of permits per present server.
    fn average(&self) -> usize {
        let taken = usize::try_from(signed(self.cap()) - self.free()).unwrap_or(0);
        taken / self.present.load(Ordering::Relaxed).max(1)
    }

    fn take(&self) -> bool {
        let one_less = |free: isize| (free > 0).then(|| free - 1);
        self.free
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, one_less)
            .is_ok()
    }

    fn give_back(&self, permits: usize) {
        self.free.fetch_add(signed(permits), Ordering::SeqCst);
    }

    /// Wakes the waiting servers if a permit is free.
    fn offer(&self) {
        if self.free() <= 0 {
            return;
        }
        for sharer in &self.sharers {
            if sharer.waits.load(Ordering::SeqCst) && sharer.waits.swap(false, Ordering::SeqCst) {
                sharer.wake();
            }
        }
    }
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

/// At most [`MAX_CONNECTIONS`](crate::config::MAX_CONNECTIONS).
fn signed(permits: usize) -> isize {
    isize::try_from(permits).unwrap_or(isize::MAX / 4)
}

impl fmt::Debug for SharedCap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SharedCap")
            .field("cap", &self.cap())
            .field("free", &self.free())
            .finish_non_exhaustive()
    }
}

/// One server's permits. Given back on drop.
pub(super) struct CapShare {
    shared_cap: Arc<SharedCap>,
    index: usize,
    /// Permits of its connections, and of one to come.
    held: usize,
    /// One of the permits is reserved for the next connection.
    reserved: bool,
    /// Some were given back since the other servers were last notified.
    gave: bool,
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
            reserved: false,
            gave: false,
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

    pub(super) fn cap(&self) -> usize {
        self.shared_cap.cap()
    }

    pub(super) fn set_cap(&self, cap: usize) {
        self.shared_cap.set_cap(cap);
    }

    /// This server's part of a limit on all servers.
    pub(super) fn part_of(&self, limit: usize) -> usize {
        limit.div_ceil(self.shared_cap.sharers.len().max(1))
    }

    pub(super) fn has_room(&self) -> bool {
        self.reserved || self.shared_cap.free() > 0
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
        !self.reserved && self.shared_cap.free() == 0
    }

    /// Reserves a permit for the next connection, unless one is reserved already.
    pub(super) fn reserve(&mut self) -> bool {
        if !self.reserved && self.shared_cap.take() {
            self.reserved = true;
            self.held += 1;
        }
        self.reserved
    }

    /// Gives back an unused reservation.
    pub(super) fn unreserve(&mut self) {
        if std::mem::take(&mut self.reserved) {
            self.give_back();
        }
    }

    /// A connection takes the reserved permit.
    pub(super) fn fill(&mut self) {
        if !std::mem::take(&mut self.reserved) {
            // Without a reservation: the count is right all the same.
            self.shared_cap.free.fetch_sub(1, Ordering::SeqCst);
            self.held += 1;
        }
    }

    /// A connection has ended: its permit goes to the next one or to another server.
    pub(super) fn vacate(&mut self, keep: bool) {
        if keep && !self.reserved {
            self.reserved = true;
        } else {
            self.give_back();
        }
    }

    fn give_back(&mut self) {
        self.held = self.held.saturating_sub(1);
        self.shared_cap.give_back(1);
        self.gave = true;
    }

    /// The last check for a permit in an iteration. If none is free, the server will be woken when
    /// one is. If one is free it is not woken, so this check must be the last one before it sleeps.
    pub(super) fn await_room(&self) -> bool {
        if self.has_room() {
            return true;
        }
        if let Some(sharer) = self.shared_cap.sharers.get(self.index) {
            sharer.waits.store(true, Ordering::SeqCst);
        }
        self.has_room()
    }

    /// Called at the end of an iteration: offers returned permits to the other servers.
    pub(super) fn offer(&mut self) {
        if std::mem::take(&mut self.gave) {
            self.shared_cap.offer();
        }
    }
}

impl Drop for CapShare {
    fn drop(&mut self) {
        self.release_report();
        self.shared_cap.present.fetch_sub(1, Ordering::Relaxed);
        self.shared_cap.give_back(std::mem::take(&mut self.held));
        self.shared_cap.offer();
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::mpsc;
    use std::thread;

    use super::*;

    /// Wakes by a message.
    struct Bell(mpsc::SyncSender<()>);

    impl Wake for Bell {
        fn wake(&self) -> io::Result<()> {
            // One pending message is enough.
            let _ = self.0.try_send(());
            Ok(())
        }
    }

    fn share(shared_cap: &Arc<SharedCap>, index: usize) -> (CapShare, mpsc::Receiver<()>) {
        let (bell, rings) = mpsc::sync_channel(1);
        (
            CapShare::new(Arc::clone(shared_cap), index, Box::new(Bell(bell))),
            rings,
        )
    }

    #[test]
    fn the_last_place_is_taken_once() {
        let shared_cap = Arc::new(SharedCap::new(1, 2));
        let ((mut first, _), (mut second, rings)) = (share(&shared_cap, 0), share(&shared_cap, 1));
        assert!(first.reserve() && first.reserve() && first.has_room());
        assert!(!second.has_room() && !second.reserve());
        first.fill();
        assert!(!first.has_room() && !first.reserve() && first.is_exhausted());
        second.await_room();
        first.vacate(false);
        assert!(rings.try_recv().is_err(), "the end of the turn comes first");
        first.offer();
        assert!(rings.try_recv().is_ok() && second.reserve() && !first.reserve());
        first.offer();
        assert!(rings.try_recv().is_err(), "once");
    }

    #[test]
    fn a_slot_is_kept_for_the_next_client() {
        let shared_cap = Arc::new(SharedCap::new(1, 2));
        let ((mut first, _), (mut second, _)) = (share(&shared_cap, 0), share(&shared_cap, 1));
        assert!(first.reserve());
        first.fill();
        first.vacate(true);
        assert!(!second.reserve(), "never free between the two");
        assert!(first.reserve());
        first.fill();
        first.vacate(false);
        assert!(second.reserve());
        second.unreserve();
        assert!(first.reserve());
    }

    #[test]
    fn a_lowered_cap_admits_no_client_and_ends_none() {
        let shared_cap = Arc::new(SharedCap::new(4, 1));
        let (mut one, rings) = share(&shared_cap, 0);
        for _ in 0..4 {
            assert!(one.reserve());
            one.fill();
        }
        shared_cap.set_cap(2);
        assert!(rings.try_recv().is_ok(), "it is told");
        for _ in 0..2 {
            one.vacate(false);
            assert!(!one.reserve() && !one.has_room());
        }
        assert!(one.is_exhausted());
        one.vacate(false);
        assert!(one.reserve());
        one.unreserve();
        shared_cap.set_cap(0);
        assert!(!one.reserve());
        shared_cap.set_cap(3);
        assert!(one.reserve());
        assert_eq!((shared_cap.cap(), shared_cap.free()), (3, 1));
    }

    #[test]
    fn a_server_with_more_than_the_others_is_ahead() {
        let shared_cap = Arc::new(SharedCap::new(100, 2));
        let ((mut first, _), (mut second, _)) = (share(&shared_cap, 0), share(&shared_cap, 1));
        let come = |share: &mut CapShare, count| {
            for _ in 0..count {
                assert!(share.reserve());
                share.fill();
            }
        };
        come(&mut first, 2 * SLACK);
        assert!(!first.is_ahead());
        come(&mut first, SLACK);
        assert!(first.is_ahead() && !second.is_ahead());
        come(&mut second, 2 * SLACK);
        assert!(!first.is_ahead() && !second.is_ahead());
        come(&mut first, 30);
        assert!(first.is_ahead());
        drop(second);
        assert!(!first.is_ahead(), "it is alone");
    }

    #[test]
    fn a_server_that_ends_leaves_its_permits_to_the_others() {
        let shared_cap = Arc::new(SharedCap::new(2, 2));
        let ((mut first, _), (mut second, rings)) = (share(&shared_cap, 0), share(&shared_cap, 1));
        assert!(first.reserve());
        first.fill();
        assert!(first.reserve());
        second.await_room();
        assert!(!second.reserve());
        drop(first);
        assert!(rings.try_recv().is_ok() && second.reserve());
        assert_eq!(shared_cap.free(), 1);
    }

    /// Threads that take permits, wait and give them back as servers do. The cap is never exceeded,
    /// and no thread sleeps while a permit is free.
    #[test]
    fn no_wake_up_is_lost_and_the_cap_holds() {
        const SHARERS: usize = 4;
        const ROUNDS: usize = 2000;
        for cap in [1, 2, 3] {
            let shared_cap = Arc::new(SharedCap::new(cap, SHARERS));
            let inside = Arc::new(AtomicUsize::new(0));
            let threads: Vec<_> = (0..SHARERS)
                .map(|index| {
                    let (shared_cap, inside) = (Arc::clone(&shared_cap), Arc::clone(&inside));
                    thread::spawn(move || {
                        let (mut share, rings) = share(&shared_cap, index);
                        for _ in 0..ROUNDS {
                            while !share.reserve() {
                                if !share.await_room() {
                                    rings
                                        .recv_timeout(std::time::Duration::from_secs(20))
                                        .expect("woken");
                                }
                            }
                            share.fill();
                            let now = inside.fetch_add(1, Ordering::SeqCst) + 1;
                            assert!(now <= cap, "{now} inside");
                            thread::yield_now();
                            inside.fetch_sub(1, Ordering::SeqCst);
                            share.vacate(false);
                            share.offer();
                        }
                    })
                })
                .collect();
            for thread in threads {
                thread.join().expect("no panic");
            }
            assert_eq!(shared_cap.free(), signed(cap));
        }
    }
}
