use std::io;
use std::net::SocketAddr;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use super::*;
use crate::alarm::Alarm;
use crate::config::{AtCapacity, Config, Listen, Quota};
use crate::handler::{Context, Handler};
use crate::reason::{CloseReason, Outcome};
use crate::sim::{ClientState, Sim};
use crate::Framing;

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
fn the_last_permit_is_taken_once() {
    let shared_cap = Arc::new(SharedCap::new(1, 2));
    let ((mut first, _), (mut second, rings)) = (share(&shared_cap, 0), share(&shared_cap, 1));
    assert!(first.take() && !first.take() && first.is_exhausted());
    assert!(!second.has_room() && !second.take());
    assert!(!second.await_room());
    first.offer();
    assert!(rings.try_recv().is_err(), "none is free");
    first.give_back();
    assert!(rings.try_recv().is_err(), "this server may still use it");
    first.offer();
    assert!(rings.try_recv().is_ok());
    first.offer();
    assert!(rings.try_recv().is_err(), "once");
    second.wake_up();
    assert!(second.take() && !first.take());
}

#[test]
fn one_server_is_woken_for_one_permit() {
    let shared_cap = Arc::new(SharedCap::new(1, 3));
    let (mut first, _) = share(&shared_cap, 0);
    let others = [share(&shared_cap, 1), share(&shared_cap, 2)];
    let woken = || (0..2).find(|&at| others[at].1.try_recv().is_ok());
    assert!(first.take());
    assert!(others.iter().all(|(other, _)| !other.await_room()));
    first.give_back();
    first.offer();
    let one = woken().expect("one of them");
    first.offer();
    assert_eq!(woken(), None, "one is ready");
    others[one].0.wake_up();
    // It passes the permit on before it runs foreign code.
    others[one].0.offer();
    assert_eq!(woken(), Some(1 - one));
    others[1 - one].0.wake_up();
    others[1 - one].0.offer();
    assert_eq!(woken(), None, "none waits any more");
}

#[test]
fn a_server_that_listens_where_all_do_wakes_none() {
    let shared_cap = Arc::new(SharedCap::new(1, 3));
    let ((mut first, _), (second, rings)) = (share(&shared_cap, 0), share(&shared_cap, 1));
    let (third, _) = share(&shared_cap, 2);
    for (one_backlog, listens, wakes) in [
        (false, true, true),
        (true, false, true),
        (true, true, false),
    ] {
        if one_backlog {
            shared_cap.set_one_backlog();
        }
        assert!(first.take() && !second.await_room());
        first.give_back();
        first.rest(listens);
        // Nor does another one, as long as it sleeps.
        third.offer();
        assert_eq!(rings.try_recv().is_ok(), wakes);
        first.wake_up();
        first.offer();
        assert_eq!(rings.try_recv().is_ok(), !wakes);
        second.wake_up();
    }
}

#[test]
fn a_server_that_is_awake_is_not_woken() {
    let shared_cap = Arc::new(SharedCap::new(1, 2));
    let ((mut first, _), (second, rings)) = (share(&shared_cap, 0), share(&shared_cap, 1));
    assert!(first.take() && !second.await_room());
    second.wake_up();
    first.give_back();
    first.offer();
    assert!(rings.try_recv().is_err());
    assert!(second.await_room(), "it finds the permit before it sleeps");
    let sleeping = |count: &AtomicUsize| count.load(Ordering::SeqCst);
    assert_eq!(sleeping(&shared_cap.waiting), 0);
    assert_eq!(sleeping(&shared_cap.ready), 0);
}

#[test]
fn a_lowered_cap_admits_no_client_and_ends_none() {
    let shared_cap = Arc::new(SharedCap::new(4, 1));
    let (mut one, rings) = share(&shared_cap, 0);
    assert!((0..4).all(|_| one.take()));
    shared_cap.set_cap(2);
    assert!(rings.try_recv().is_ok(), "it is told");
    for _ in 0..2 {
        one.give_back();
        assert!(!one.take() && !one.has_room());
    }
    assert!(one.is_exhausted());
    one.give_back();
    assert!(one.take());
    one.give_back();
    shared_cap.set_cap(0);
    assert!(!one.take());
    shared_cap.set_cap(3);
    assert!(one.take());
    assert_eq!((shared_cap.cap(), shared_cap.taken()), (3, 2));
}

#[test]
fn a_server_with_more_than_the_others_is_ahead() {
    let shared_cap = Arc::new(SharedCap::new(100, 2));
    let ((mut first, _), (mut second, _)) = (share(&shared_cap, 0), share(&shared_cap, 1));
    let come = |share: &mut CapShare, count| assert!((0..count).all(|_| share.take()));
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
    let shared_cap = Arc::new(SharedCap::new(3, 2));
    let ((mut first, _), (mut second, rings)) = (share(&shared_cap, 0), share(&shared_cap, 1));
    assert!(first.take() && first.take() && first.take());
    let detached = first.detach();
    assert!(!second.await_room() && !second.take());
    drop(first);
    assert!(rings.try_recv().is_ok() && second.take());
    second.wake_up();
    assert_eq!(shared_cap.taken(), 2, "a connection has left it");
    assert!(second.take() && !second.await_room());
    drop(detached);
    assert!(rings.try_recv().is_ok() && second.take());
}

fn connections(least: usize, most: usize) -> Option<Bounds> {
    Some(Bounds {
        connections: (least, most),
        descriptors: (0, usize::MAX),
    })
}

#[test]
fn a_server_is_woken_at_its_bounds() {
    let shared_cap = Arc::new(SharedCap::new(10, 2));
    let ((mut first, _), (second, rings)) = (share(&shared_cap, 0), share(&shared_cap, 1));
    second.watch(connections(0, 3));
    assert!(first.take() && first.take());
    assert!(rings.try_recv().is_err());
    assert!(first.take() && rings.try_recv().is_ok());
    assert!(first.take() && rings.try_recv().is_err(), "once");
    second.watch(connections(3, usize::MAX));
    first.give_back();
    assert!(rings.try_recv().is_err());
    first.give_back();
    assert!(rings.try_recv().is_ok());
    second.watch(connections(0, 3));
    second.watch(None);
    assert!(first.take() && rings.try_recv().is_err());
    assert_eq!(shared_cap.watching.load(Ordering::SeqCst), 0);
}

/// A number counts once, and ends with its server.
#[test]
fn the_descriptors_of_all_servers_are_added_up() {
    let shared_cap = Arc::new(SharedCap::new(10, 2));
    let ((mut first, _), (mut second, rings)) = (share(&shared_cap, 0), share(&shared_cap, 1));
    let descriptors = |least, most| {
        Some(Bounds {
            connections: (0, usize::MAX),
            descriptors: (least, most),
        })
    };
    second.publish_descriptors(3);
    second.watch(descriptors(0, 8));
    first.publish_descriptors(4);
    first.publish_descriptors(4);
    assert!(rings.try_recv().is_err());
    assert_eq!((first.descriptors(5), second.descriptors(1)), (8, 5));
    first.publish_descriptors(5);
    assert!(rings.try_recv().is_ok());
    second.watch(descriptors(4, usize::MAX));
    first.publish_descriptors(1);
    assert!(rings.try_recv().is_err());
    drop(first);
    assert!(rings.try_recv().is_ok());
    assert_eq!(second.descriptors(3), 3);
}

struct Ignores;

impl Handler for Ignores {
    fn on_frame(&mut self, _: &mut Context<'_>, _: &[u8]) -> Outcome {
        Ok(())
    }
}

/// The first of two servers with one cap and one backlog. It refuses clients at the cap.
fn server(shared_cap: &Arc<SharedCap>) -> (Sim, SocketAddr) {
    shared_cap.set_one_backlog();
    let config = Config::max_connections(shared_cap.cap())
        .with(|config| config.pending_limits.grace = Duration::ZERO);
    let mut sim = Sim::new(1, config, ());
    sim.share_cap(Arc::clone(shared_cap), 0);
    let listen = Listen::tcp("127.0.0.1:0", Framing::Packet2).with(|listen| {
        listen.at_capacity = AtCapacity::Refuse {
            farewell: Vec::new(),
        };
    });
    let addr = sim.listen(listen, |(), _| Ignores).expect("it listens");
    (sim, addr)
}

/// For as long as it takes a busy server to evict one, and no longer.
#[test]
fn a_server_leaves_a_client_to_one_that_can_evict() {
    let shared_cap = Arc::new(SharedCap::new(1, 2));
    let (mut other, _rings) = share(&shared_cap, 1);
    let (mut sim, addr) = server(&shared_cap);
    let refused = |sim: &Sim| sim.stats().closed(CloseReason::AtCapacity);
    assert!(other.take());
    other.set_may_evict(true);
    let client = sim.connect(addr).expect("it listens");
    sim.advance(Duration::from_millis(99));
    assert_eq!(sim.stats().accepted, 0);
    sim.advance(Duration::from_millis(2));
    assert_eq!(refused(&sim), 1);
    assert_eq!(sim.state(client), ClientState::Finished);

    let client = sim.connect(addr).expect("it listens");
    sim.advance(Duration::from_millis(99));
    other.give_back();
    sim.advance(Duration::from_millis(1));
    assert_eq!((sim.stats().open, refused(&sim)), (1, 1));
    sim.reset(client);
    sim.settle();

    assert!(other.take());
    other.set_may_evict(false);
    sim.connect(addr).expect("it listens");
    sim.settle();
    assert_eq!(refused(&sim), 2, "at once");
}

/// Memory is each server's own: no other server can change it.
#[test]
fn an_alarm_on_memory_watches_no_other_server() {
    let shared_cap = Arc::new(SharedCap::new(4, 2));
    let (_other, _rings) = share(&shared_cap, 1);
    let (mut sim, _addr) = server(&shared_cap);
    let watching = || shared_cap.watching.load(Ordering::SeqCst);
    let mut add = |alarm| {
        let added = sim
            .control()
            .on_alarm(alarm, Duration::from_secs(1), |(), _, _| ());
        added.expect("a good alarm");
        sim.settle();
        watching()
    };
    assert_eq!(add(Alarm::Memory(Quota::Count(1 << 20))), 0);
    assert_eq!(add(Alarm::Connections(Quota::Count(3))), 1);
}

/// No other server waits for it.
#[test]
fn a_server_evicts_none_under_a_lowered_cap() {
    let shared_cap = Arc::new(SharedCap::new(2, 2));
    let (other, _rings) = share(&shared_cap, 1);
    let (mut sim, addr) = server(&shared_cap);
    for _ in 0..2 {
        sim.connect(addr).expect("it listens");
    }
    sim.settle();
    assert!(other.may_others_evict());
    let lowered = sim
        .control()
        .reconfigure(|config| config.max_connections = 1);
    lowered.expect("a valid cap");
    sim.settle();
    assert!(!other.may_others_evict());
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
                        while !share.take() {
                            if !share.await_room() {
                                let patience = Duration::from_secs(30);
                                rings.recv_timeout(patience).expect("a permit is free");
                                share.wake_up();
                            }
                        }
                        share.offer();
                        let now = inside.fetch_add(1, Ordering::SeqCst) + 1;
                        assert!(now <= cap, "{now} inside");
                        thread::yield_now();
                        inside.fetch_sub(1, Ordering::SeqCst);
                        share.give_back();
                        share.offer();
                    }
                })
            })
            .collect();
        for thread in threads {
            thread.join().expect("no panic");
        }
        assert_eq!(shared_cap.taken(), 0);
    }
}

/// Another server may look while the cap changes.
#[test]
fn a_change_of_the_cap_takes_no_permit() {
    let shared_cap = Arc::new(SharedCap::new(8, 1));
    let (mut share, _rings) = share(&shared_cap, 0);
    assert!(share.take());
    thread::scope(|scope| {
        let changes = scope.spawn(|| {
            for round in 0..200_000 {
                shared_cap.set_cap(if round % 2 == 0 { 1000 } else { 8 });
            }
        });
        while !changes.is_finished() {
            assert_eq!(shared_cap.taken(), 1);
        }
    });
}
