//! One cap over several servers: how many places are free, exactly, and who waits for one.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicIsize, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use crate::handle::Wake;
use crate::logs;

/// The places that several servers share.
///
/// A server takes a place before it accepts, so that no two of them take the last one. Who finds none says that it waits
/// and then looks once more; who gives one back looks for those who wait afterwards. In that order one of the two sees
/// the other (all of it is sequentially consistent), so that nobody sleeps beside a free place.
pub(crate) struct SharedCap {
    /// Negative while the cap is lower than what was taken before it was lowered.
    free: AtomicIsize,
    cap: AtomicUsize,
    /// Held while the cap changes: two changes at once must not add up.
    changing: Mutex<()>,
    sharers: Box<[Sharer]>,
    /// Those of them that have not gone.
    present: AtomicUsize,
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
        }
    }

    pub(crate) fn cap(&self) -> usize {
        self.cap.load(Ordering::Relaxed)
    }

    /// From when this returns, no place is taken beyond the new cap.
    pub(crate) fn set_cap(&self, cap: usize) {
        {
            let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
            let before = self.cap.swap(cap, Ordering::SeqCst);
            self.free
                .fetch_add(signed(cap) - signed(before), Ordering::SeqCst);
        }
        // All of them, whether they wait or not: the cap is in what they report.
        for sharer in &self.sharers {
            sharer.waits.store(false, Ordering::SeqCst);
            sharer.wake();
        }
    }

    fn free(&self) -> isize {
        self.free.load(Ordering::SeqCst)
    }

    /// What each of those present has on average.
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

    /// Wakes those who wait, if there is a place for them.
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

/// So many connections more than the others have are no imbalance.
const SLACK: usize = 4;

/// No more than [`MAX_CONNECTIONS`](crate::config::MAX_CONNECTIONS).
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

/// What one server has of them. Given back when it is dropped.
pub(super) struct CapShare {
    shared_cap: Arc<SharedCap>,
    index: usize,
    /// Of its connections, and of one that is to come.
    held: usize,
    /// One of those held is for the next connection.
    reserved: bool,
    /// Some were given back since this was last offered.
    gave: bool,
}

impl CapShare {
    /// `wake` is how others wake the server when there is a place again.
    pub(super) fn new(shared_cap: Arc<SharedCap>, index: usize, wake: Box<dyn Wake>) -> Self {
        if let Some(sharer) = shared_cap.sharers.get(index) {
            // Once for each server.
            let _ = sharer.wake.set(wake);
        }
        shared_cap.present.fetch_add(1, Ordering::Relaxed);
        Self {
            shared_cap,
            index,
            held: 0,
            reserved: false,
            gave: false,
        }
    }

    pub(super) fn cap(&self) -> usize {
        self.shared_cap.cap()
    }

    pub(super) fn set_cap(&self, cap: usize) {
        self.shared_cap.set_cap(cap);
    }

    /// Its part of a limit that holds for all.
    pub(super) fn part_of(&self, limit: usize) -> usize {
        limit.div_ceil(self.shared_cap.sharers.len().max(1))
    }

    pub(super) fn has_room(&self) -> bool {
        self.reserved || self.shared_cap.free() > 0
    }

    /// It has clearly more connections than the others.
    pub(super) fn is_ahead(&self) -> bool {
        // Few are never many more, and looking costs a cache line that all of them write.
        if self.held <= SLACK {
            return false;
        }
        let average = self.shared_cap.average();
        self.held > average + average / 8 + SLACK
    }

    /// None is free, and the cap is not passed.
    pub(super) fn is_exhausted(&self) -> bool {
        !self.reserved && self.shared_cap.free() == 0
    }

    /// Takes a place for the next connection, if it is not taken already.
    pub(super) fn reserve(&mut self) -> bool {
        if !self.reserved && self.shared_cap.take() {
            self.reserved = true;
            self.held += 1;
        }
        self.reserved
    }

    /// Nobody came for it.
    pub(super) fn unreserve(&mut self) {
        if std::mem::take(&mut self.reserved) {
            self.give_back();
        }
    }

    /// A connection moves in, on the place that was reserved.
    pub(super) fn fill(&mut self) {
        if !std::mem::take(&mut self.reserved) {
            // Not asked for: the count is right all the same.
            self.shared_cap.free.fetch_sub(1, Ordering::SeqCst);
            self.held += 1;
        }
    }

    /// A connection moves out, for the next one or for anybody.
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

    /// The last look for room in a turn. Who finds none will be woken when there is some. Who finds some is not: a later look
    /// must not be what it goes to sleep on.
    pub(super) fn await_room(&self) -> bool {
        if self.has_room() {
            return true;
        }
        if let Some(sharer) = self.shared_cap.sharers.get(self.index) {
            sharer.waits.store(true, Ordering::SeqCst);
        }
        self.has_room()
    }

    /// At the end of a turn: what it gave back and has not taken again is for the others.
    pub(super) fn offer(&mut self) {
        if std::mem::take(&mut self.gave) {
            self.shared_cap.offer();
        }
    }
}

impl Drop for CapShare {
    fn drop(&mut self) {
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
            // One that waits already is enough.
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
    fn a_place_is_kept_for_who_comes_next() {
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
    fn a_lowered_cap_lets_nobody_in_and_takes_nothing_away() {
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
    fn who_has_more_than_the_others_is_ahead() {
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
    fn who_goes_leaves_its_places_to_the_others() {
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

    /// Threads that come, wait and go as servers do: never more than the cap inside, and nobody sleeps beside a free place.
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
