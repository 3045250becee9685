//! The shared cap in every order of its steps: no client waits beside a free permit, and no server
//! sleeps for ever.
//!
//! Each thread makes the calls of one server's iteration in their order. `tests.rs` makes the same
//! calls on threads of the system; `tests/shards/` has whole servers.

use super::*;
use crate::sync::models::{check, check_deadlock, spawn, Bell, JoinHandle};

fn share(shared_cap: &Arc<SharedCap>, index: usize) -> (CapShare, Arc<Bell>) {
    let bell = Arc::new(Bell::default());
    let wake = Box::new(Arc::clone(&bell));
    (CapShare::new(Arc::clone(shared_cap), index, wake), bell)
}

/// Looks for a client, and takes a permit for it.
fn take(share: &mut CapShare) -> bool {
    let shared_cap = Arc::clone(share.shared_cap());
    let _locked = shared_cap.lock();
    share.take()
}

/// Takes the permit for a client that waits in this server's own backlog.
fn serve(share: &mut CapShare, bell: &Bell) {
    while !take(share) {
        if !share.await_room() {
            bell.wait();
            share.wake_up();
        }
    }
    // Before its handler runs.
    share.offer();
}

/// A server that waits for a permit. Its share lives on: the end of one wakes others.
fn waiting(mut share: CapShare, bell: Arc<Bell>) -> JoinHandle<CapShare> {
    spawn(move || {
        serve(&mut share, &bell);
        share
    })
}

/// The connection ends, and its handler runs once more.
fn end(share: &mut CapShare) {
    share.give_back();
    share.offer();
}

/// Servers that each serve one client, under a cap of one. The shares live on until all have done:
/// the end of one wakes others.
fn one_client_each(servers: usize) {
    let shared_cap = Arc::new(SharedCap::new(1, servers));
    let threads: Vec<_> = (0..servers)
        .map(|index| {
            let (mut share, bell) = share(&shared_cap, index);
            spawn(move || {
                serve(&mut share, &bell);
                end(&mut share);
                share
            })
        })
        .collect();
    let shares: Vec<_> = threads.into_iter().map(|one| one.join()).collect();
    assert_eq!(shared_cap.taken(), 0);
    let count = |count: &AtomicUsize| count.load(Ordering::SeqCst);
    assert_eq!(count(&shared_cap.waiting), 0);
    drop(shares);
    assert_eq!(count(&shared_cap.ready), 0);
}

#[test]
fn no_wake_up_is_lost() {
    check("shared cap, two servers", || one_client_each(2));
}

#[test]
fn a_permit_is_passed_on_from_server_to_server() {
    check("shared cap, three servers", || one_client_each(3));
}

/// The control: two servers that each write and then read may both miss the other's write.
#[test]
fn without_sequential_consistency_a_wake_up_is_lost() {
    let test = concat!(
        module_path!(),
        "::without_sequential_consistency_a_wake_up_is_lost"
    );
    check_deadlock(test, || one_client_each(2));
}

/// One server frees its permit and sleeps at its listeners; another waits for a permit for a client
/// that is in its backlog alone.
#[test]
fn a_server_that_goes_to_rest_wakes_one_that_waits() {
    check("shared cap, rest", || {
        let shared_cap = Arc::new(SharedCap::new(1, 2));
        let (mut first, _) = share(&shared_cap, 0);
        let (second, bell) = share(&shared_cap, 1);
        assert!(first.take());
        let waits = waiting(second, bell);
        // Its connection ends within an iteration that runs no more foreign code.
        first.give_back();
        first.rest(true);
        let second = waits.join();
        first.wake_up();
        drop((first, second));
    });
}

/// The end of an iteration, as `Core::reconcile_last` has it. True if the server listens then.
fn end_iteration(share: &CapShare) -> bool {
    let has_room = share.await_room();
    if has_room {
        share.rest(true);
    } else {
        share.offer();
    }
    has_room
}

/// With one backlog no server need be woken for a permit: one that listens finds every client.
#[test]
fn with_one_backlog_a_free_permit_has_a_server_that_listens() {
    check("shared cap, one backlog", || {
        let shared_cap = Arc::new(SharedCap::new(1, 2));
        shared_cap.set_one_backlog();
        let (mut first, first_bell) = share(&shared_cap, 0);
        let (mut second, second_bell) = share(&shared_cap, 1);
        assert!(first.take());
        let other = spawn(move || {
            if take(&mut second) {
                end(&mut second);
            }
            (end_iteration(&second), second)
        });
        first.give_back();
        let first_listens = end_iteration(&first);
        let (second_listens, second) = other.join().expect("no panic");
        assert_eq!(shared_cap.taken(), 0);
        let is_woken = first_bell.has_rung() || second_bell.has_rung();
        assert!(first_listens || second_listens || is_woken);
        drop((first, second));
    });
}

/// A stop, a drain or a panic ends a server at any point of another's iteration.
#[test]
fn a_server_that_ends_leaves_its_permits_to_the_others() {
    check("shared cap, an end", || {
        let shared_cap = Arc::new(SharedCap::new(1, 2));
        let (mut first, _) = share(&shared_cap, 0);
        let (second, bell) = share(&shared_cap, 1);
        assert!(first.take());
        let waits = waiting(second, bell);
        drop(first);
        let second = waits.join();
        assert_eq!(shared_cap.taken(), 1);
        drop(second);
        assert_eq!(shared_cap.taken(), 0);
    });
}

/// The permit of a detached connection comes back on a thread that belongs to no server.
#[test]
fn the_permit_of_a_detached_connection_wakes_a_server() {
    check("shared cap, a detached permit", || {
        let shared_cap = Arc::new(SharedCap::new(1, 2));
        let (mut first, _) = share(&shared_cap, 0);
        let (second, bell) = share(&shared_cap, 1);
        assert!(first.take());
        let permit = first.detach();
        let waits = waiting(second, bell);
        let drops = spawn(move || drop(permit));
        // It may end meanwhile: the permit is not its own any more.
        drop(first);
        let second = waits.join();
        drops.join().expect("no panic");
        assert_eq!(shared_cap.taken(), 1);
        drop(second);
    });
}

#[test]
fn a_raised_cap_wakes_a_server_that_waits() {
    check("shared cap, raised", || {
        let shared_cap = Arc::new(SharedCap::new(0, 1));
        let (one, bell) = share(&shared_cap, 0);
        let waits = waiting(one, bell);
        shared_cap.set_cap(1);
        drop(waits.join());
    });
}

#[test]
fn a_lowered_cap_holds_once_it_is_set() {
    check("shared cap, lowered", || {
        let shared_cap = Arc::new(SharedCap::new(2, 2));
        let threads = [0, 1].map(|index| {
            let (mut share, _) = share(&shared_cap, index);
            spawn(move || {
                take(&mut share);
                share
            })
        });
        shared_cap.set_cap(1);
        let before = shared_cap.taken();
        let shares = threads.map(|one| one.join());
        assert!(shared_cap.taken() <= before.max(1));
        drop(shares);
        assert_eq!(shared_cap.taken(), 0);
    });
}

/// A server with an alarm at two connections sleeps while others take them.
#[test]
fn a_server_is_woken_at_its_bounds() {
    check("shared cap, bounds", || {
        let shared_cap = Arc::new(SharedCap::new(4, 2));
        let (mut first, _) = share(&shared_cap, 0);
        let (second, bell) = share(&shared_cap, 1);
        let bounds = Bounds {
            connections: (0, 2),
            descriptors: (0, usize::MAX),
        };
        let watches = spawn(move || {
            second.watch(Some(bounds));
            // An iteration that publishes bounds has read the number before: the server looks again
            // once it is woken.
            while second.taken() < 2 {
                bell.wait();
            }
            second
        });
        assert!(first.take() && first.take());
        let second = watches.join().expect("no panic");
        drop((first, second));
        assert_eq!(shared_cap.watching.load(Ordering::SeqCst), 0);
    });
}
