//! Stop and drain of shards in every order of their steps: every shard ends, its permits go to the
//! others, and each accepted command is carried out or counted.
//!
//! The shards are whole servers on simulated kernels, with the real handle, queues and cap. Instead
//! of `Server::run` they have `Sim::run_in_model`, and their threads are started and joined here.
//! `tests/shards/ending.rs` has the real ones.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Mutex;
use std::time::Duration;

use super::*;
use crate::config::Listen;
use crate::handle::HandleError;
use crate::handler::{Context, Control, Handler};
use crate::reason::Outcome;
use crate::sim::Sim;
use crate::stats::DrainReport;
use crate::sync::models::{check_within, spawn, Bell, JoinHandle};
use crate::Framing;

struct Ignores;

impl Handler for Ignores {
    fn on_frame(&mut self, _: &mut Context<'_>, _: &[u8]) -> Outcome {
        Ok(())
    }
}

/// What a shard's thread returns.
struct Ended {
    report: Option<DrainReport>,
    open: usize,
}

/// Starts one of two shards, with a backlog of its own and a client in it. Returns once it is made.
/// Beside a stop and the end of a drain it ends with `until` connections.
fn start(
    shared_cap: &Arc<SharedCap>,
    index: usize,
    until: Option<usize>,
) -> (Handle, JoinHandle<Ended>) {
    let made = Arc::new((Bell::default(), Mutex::new(None)));
    let (shared_cap, makes) = (Arc::clone(shared_cap), Arc::clone(&made));
    let thread = spawn(move || {
        let config = Config::max_connections(shared_cap.cap());
        let mut sim = Sim::new(1, config, ());
        // They compare this shard with the cap, which others change meanwhile.
        sim.set_checks(false);
        sim.share_cap(shared_cap, index);
        let listen = Listen::tcp("127.0.0.1:0", Framing::Packet2);
        let addr = sim.listen(listen, |(), _| Ignores).expect("it listens");
        sim.connect(addr).expect("it listens");
        sim.settle();
        *makes.1.lock().expect("no panic") = Some(sim.handle());
        makes.0.ring();
        sim.run_in_model(|sim| until == Some(sim.stats().open));
        Ended {
            report: sim.drain_report(),
            open: sim.stats().open,
        }
    });
    made.0.wait();
    let handle = made.1.lock().expect("no panic").take();
    (handle.expect("it was made"), thread)
}

/// Two shards, and the handle of both.
fn two(cap: usize) -> (Arc<SharedCap>, Handle, [JoinHandle<Ended>; 2]) {
    let shared_cap = Arc::new(SharedCap::new(cap, 2));
    let (first, first_thread) = start(&shared_cap, 0, None);
    let (second, second_thread) = start(&shared_cap, 1, None);
    let common_cap = Arc::clone(&shared_cap) as Arc<dyn CommonCap>;
    let handle = Handle::of_shards([first, second], common_cap);
    (shared_cap, handle, [first_thread, second_thread])
}

#[test]
fn a_stop_ends_every_shard() {
    check_within(2, "shards, stop", || {
        let (_, handle, threads) = two(2);
        assert_eq!(handle.stop(), Ok(()));
        for thread in threads {
            let Ended { report, open } = thread.join().expect("no panic");
            assert_eq!((report, open), (None, 1), "it was not drained");
        }
        assert_eq!(handle.stop(), Err(HandleError::ServerGone));
    });
}

#[test]
fn a_drain_ends_every_shard_and_frees_the_cap() {
    check_within(2, "shards, drain", || {
        let (shared_cap, handle, threads) = two(2);
        assert_eq!(handle.drain(Duration::ZERO), Ok(()));
        for thread in threads {
            let ended = thread.join().expect("no panic");
            let report = ended.report.expect("it was drained");
            assert_eq!((report.forced, report.ended + report.failed), (1, 0));
        }
        assert_eq!(handle.drain(Duration::ZERO), Err(HandleError::ServerGone));
        let words = format!("{shared_cap:?}");
        assert!(words.contains("cap: 2, free: 2"), "{words}");
    });
}

/// Two threads end the shards, each in its way. Whichever comes first: both calls return, and both
/// shards end.
#[test]
fn a_stop_and_a_drain_at_the_same_time_end_every_shard() {
    check_within(2, "shards, stop and drain", || {
        let (_, handle, threads) = two(2);
        let other = handle.clone();
        let drains = spawn(move || other.drain(Duration::ZERO));
        let stopped = handle.stop();
        let drained = drains.join().expect("no panic");
        for answer in [stopped, drained] {
            assert!(matches!(answer, Ok(()) | Err(HandleError::ServerGone)));
        }
        for thread in threads {
            thread.join().expect("no panic");
        }
        assert_eq!(handle.wake(), Err(HandleError::ServerGone));
    });
}

/// The cap is one connection, and the shard that has it ends. A client waits in the backlog of the
/// other shard, which sleeps until a permit is free.
fn a_permit_is_left(end: fn(&Handle) -> std::result::Result<(), HandleError>) {
    let shared_cap = Arc::new(SharedCap::new(1, 2));
    let (first, ends) = start(&shared_cap, 0, None);
    let (_second, waits) = start(&shared_cap, 1, Some(1));
    assert_eq!(end(&first), Ok(()));
    ends.join().expect("no panic");
    assert_eq!(waits.join().expect("no panic").open, 1);
}

#[test]
fn a_shard_that_is_stopped_leaves_its_permit_to_the_others() {
    check_within(2, "shards, a permit after a stop", || {
        a_permit_is_left(Handle::stop);
    });
}

#[test]
fn a_shard_that_is_drained_leaves_its_permit_to_the_others() {
    check_within(2, "shards, a permit after a drain", || {
        a_permit_is_left(|handle| handle.drain(Duration::ZERO));
    });
}

/// A job that was accepted while its shard ends has run, or is counted as left behind.
#[test]
fn a_job_that_was_accepted_has_run_or_is_counted() {
    check_within(2, "shards, jobs", || {
        let shared_cap = Arc::new(SharedCap::new(1, 1));
        let (handle, ends) = start(&shared_cap, 0, None);
        let ran = Arc::new(AtomicUsize::new(0));
        let (counts, posts) = (Arc::clone(&ran), handle.clone());
        let worker = spawn(move || {
            let mut accepted = 0;
            for _ in 0..2 {
                let counts = Arc::clone(&counts);
                let job = move |(): &mut (), _: &mut Control<'_>| {
                    counts.fetch_add(1, Ordering::Relaxed);
                };
                accepted += usize::from(posts.post(job).is_ok());
            }
            accepted
        });
        assert_eq!(handle.stop(), Ok(()));
        let accepted = worker.join().expect("no panic");
        ends.join().expect("no panic");
        let left = handle.stats().undeliverable as usize;
        assert_eq!(ran.load(Ordering::Relaxed) + left, accepted);
    });
}
