//! The place of a detached connection in every order of its steps: its slot comes back to the
//! server, which may sleep, and its permit at once.
//!
//! The server's side is `collect_released` of an iteration; `tests/connections/detach.rs` and
//! `tests/shards/places.rs` have it whole.

use super::*;
use crate::sync::models::{check_deadlock, check_weakly, spawn, Bell};

fn place(released: &Arc<Released>, index: u32, permit: Option<Box<dyn Permit>>) -> Place {
    Place {
        id: ConnId::new(crate::id::ServerNumber::NONE, index, 1),
        released: Arc::clone(released),
        permit,
    }
}

fn released() -> (Arc<Released>, Arc<Bell>) {
    let bell = Arc::new(Bell::default());
    (Arc::new(Released::new(Box::new(Arc::clone(&bell)))), bell)
}

/// A permit that is counted when it comes back.
#[derive(Debug)]
struct Counted(Arc<crate::sync::atomic::AtomicUsize>);

impl Permit for Counted {
    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::Release);
    }
}

#[test]
fn every_slot_comes_back_to_a_server_that_sleeps() {
    check_weakly("places, two threads", || {
        let (released, bell) = released();
        let places = [place(&released, 1, None), place(&released, 2, None)];
        let threads = places.map(|place| spawn(move || drop(place)));
        let mut freed = Vec::new();
        while freed.len() < 2 {
            bell.wait();
            freed.extend(released.take().iter().map(|id| id.index()));
        }
        freed.sort_unstable();
        assert_eq!(freed, [1, 2]);
        for thread in threads {
            thread.join().expect("no panic");
        }
        assert!(released.take().is_empty());
    });
}

/// Two of one thread: the second may find the server on its way to the first.
#[test]
fn slots_that_come_back_one_after_the_other_are_both_found() {
    check_weakly("places, one thread", || {
        let (released, bell) = released();
        let places = [place(&released, 1, None), place(&released, 2, None)];
        let drops = spawn(move || drop(places));
        let mut freed = 0;
        while freed < 2 {
            bell.wait();
            freed += released.take().len();
        }
        drops.join().expect("no panic");
    });
}

/// A server that finds the slot finds the permit given back: it may be needed for the next client.
#[test]
fn a_permit_is_given_back_before_the_server_is_woken() {
    check_weakly("places, a permit", || {
        let (released, bell) = released();
        let returned = Arc::new(crate::sync::atomic::AtomicUsize::new(0));
        let permit = Counted(Arc::clone(&returned));
        let place = place(&released, 1, Some(Box::new(permit)));
        let drops = spawn(move || drop(place));
        while released.take().is_empty() {
            bell.wait();
        }
        assert_eq!(returned.load(Ordering::Acquire), 1);
        drops.join().expect("no panic");
    });
}

/// The server that had the connection has ended: nothing collects the slot.
#[test]
fn a_place_outlives_its_server() {
    check_weakly("places, a server that ends", || {
        let (released, _bell) = released();
        let place = place(&released, 1, None);
        let drops = spawn(move || drop(place));
        let taken = released.take().len();
        drop(released);
        drops.join().expect("no panic");
        assert!(taken <= 1);
    });
}

/// The control: a server that clears the mark behind the list sleeps beside a slot.
#[test]
fn a_server_that_clears_the_mark_last_sleeps_beside_a_slot() {
    let test = concat!(
        module_path!(),
        "::a_server_that_clears_the_mark_last_sleeps_beside_a_slot"
    );
    check_deadlock(test, || {
        let (released, bell) = released();
        let places = [place(&released, 1, None), place(&released, 2, None)];
        let threads = places.map(|place| spawn(move || drop(place)));
        let mut freed = 0;
        while freed < 2 {
            bell.wait();
            let ids = std::mem::take(&mut *released.ids.lock().expect("no panic"));
            freed += ids.len();
            released.pending.swap(false, Ordering::SeqCst);
        }
        for thread in threads {
            thread.join().expect("no panic");
        }
    });
}
