use std::num::NonZeroU64;
use std::rc::Rc;

use super::*;
use crate::addr::Addr;
use crate::config::Listen;
use crate::config::MAX_CONNECTIONS;
use crate::proto::Machine;

fn connection(id: ConnId) -> Connection<NonZeroU64> {
    let listen = Listen::tcp("127.0.0.1:0", crate::Framing::Packet2);
    let limits = Rc::new(listen.conn.clone());
    let machine = Machine::new(
        &listen.framing,
        limits,
        None,
        Time::ZERO,
        &mut Pool::default(),
    );
    let listener = Some(ListenerId::new(ServerNumber::NONE, 0));
    Connection::new(id, listener, Addr::unspecified(), machine, Time::ZERO, 0)
}

fn table(cap: usize) -> Connections<NonZeroU64> {
    Connections::new(cap, Arc::default())
}

struct NoWake;

impl crate::handle::Wake for NoWake {
    fn wake(&self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Two servers that share a cap of one connection.
fn sharing_one() -> [Connections<NonZeroU64>; 2] {
    let shared_cap = Arc::new(SharedCap::new(1, 2));
    [0, 1].map(|index| {
        let mut conns = table(1);
        let wake = Box::new(NoWake);
        conns.share(CapShare::new(Arc::clone(&shared_cap), index, wake));
        conns
    })
}

/// A connection that begins in the last callback of another one has its permit: no other
/// server can take it in between, and the cap holds.
#[test]
fn the_permit_of_an_ended_connection_passes_to_the_next() {
    let [mut ours, mut theirs] = sharing_one();
    for _ in 0..3 {
        let id = ours.next_id();
        assert!(ours.has_claim() || ours.claim());
        ours.insert(connection(id));
        ours.begin_leaving(id);
        assert_eq!(ours.len(), 0);
        assert!(ours.is_leaving(id) && ours.has_room());
        assert!(!theirs.has_room() && !theirs.claim());
        assert!(ours.claim() && !ours.has_room() && !ours.claim());
        // The attempt fails at once, and another one begins.
        ours.unclaim();
        assert!(!theirs.claim() && ours.claim());
        ours.remove(id);
        ours.free();
        assert!(!ours.has_room() && !theirs.claim());
        assert_eq!(ours.under_cap(), 1);
    }
    ours.unclaim();
    assert!(theirs.claim());
}

/// No other server can have the permit of a detached connection before that comes back, here or
/// there.
#[test]
fn a_detached_connection_comes_back_with_its_permit() {
    let [mut ours, mut theirs] = sharing_one();
    assert!(ours.claim());
    let mut id = ours.next_id();
    ours.insert(connection(id));
    for lowered in [false, true] {
        if lowered {
            ours.set_cap(0);
        }
        let permit = ours.detach_permit();
        assert!(permit.is_some() && ours.remove(id).is_some());
        assert!(!ours.claim() && !theirs.claim());
        let had_slot = true;
        assert!(ours.claim_again(&mut Returning { had_slot, permit }));
        assert!(!ours.claim() && !theirs.claim());
        id = ours.next_id();
        ours.insert(connection(id));
        assert_eq!((ours.len(), ours.under_cap()), (1, 1));
    }
    // To the other server, and away from there.
    let permit = ours.detach_permit();
    ours.remove(id);
    let had_slot = false;
    assert!(theirs.claim_again(&mut Returning { had_slot, permit }));
    let id = theirs.next_id();
    theirs.insert(connection(id));
    assert_eq!((theirs.len(), ours.under_cap()), (1, 1));
    // To a server with another cap: that permit is given back.
    let permit = theirs.detach_permit();
    theirs.remove(id);
    let other_cap = Arc::new(SharedCap::new(1, 1));
    let mut other = table(1);
    other.share(CapShare::new(Arc::clone(&other_cap), 0, Box::new(NoWake)));
    assert!(other.claim());
    assert!(!other.claim_again(&mut Returning { had_slot, permit }));
    assert_eq!((ours.under_cap(), other.under_cap()), (0, 1));
}

/// In the last callback of a connection that is evicted for a client, at the cap.
#[test]
fn a_detached_connection_comes_back_while_another_one_is_evicted() {
    let mut conns = table(2);
    let [evicted, detached] = [0; 2].map(|_| {
        let id = conns.next_id();
        conns.insert(connection(id));
        id
    });
    conns.keep_next();
    conns.begin_leaving(evicted);
    conns.remove(detached);
    let mut returning = Returning {
        had_slot: true,
        permit: None,
    };
    assert!(conns.claim_again(&mut returning) && !conns.claim());
    let id = conns.next_id();
    conns.insert(connection(id));
    conns.remove(evicted);
    conns.free();
    assert!(!conns.has_room() && conns.has_claim() && conns.len() == 1);
}

/// The slot of an evicted connection is the newcomer's, also while the last callback runs.
#[test]
fn the_slot_of_an_evicted_connection_is_taken() {
    let mut conns = table(1);
    let id = conns.next_id();
    conns.insert(connection(id));
    conns.keep_next();
    conns.begin_leaving(id);
    assert!(!conns.has_room() && !conns.claim() && conns.has_claim());
    conns.remove(id);
    conns.free();
    assert!(!conns.has_room() && conns.has_claim());
    conns.unclaim();
    assert!(conns.has_room());
}

/// A slot that is kept for a client that has not come is free again.
#[test]
fn a_claim_ends_with_the_iteration() {
    let mut conns = table(1);
    let id = conns.next_id();
    conns.insert(connection(id));
    conns.keep_next();
    conns.drop_claims();
    conns.begin_leaving(id);
    conns.remove(id);
    conns.free();
    assert!(conns.has_room() && !conns.has_claim());
}

/// A panic while a client is admitted costs the servers no permit.
#[test]
fn a_claim_that_is_left_over_is_offered_to_other_servers() {
    let [mut ours, mut theirs] = sharing_one();
    assert!(ours.claim() && !theirs.claim());
    ours.drop_claims();
    assert!(!ours.has_claim() && ours.under_cap() == 0);
    assert!(theirs.claim() && !ours.claim());
}

/// As the slot of an evicted connection, where no last callback runs.
#[test]
fn the_slot_of_a_connection_that_was_removed_alone_is_taken_too() {
    let [mut ours, mut theirs] = sharing_one();
    assert!(ours.claim());
    let id = ours.next_id();
    ours.insert(connection(id));
    ours.keep_next();
    ours.remove(id);
    ours.free();
    assert!(ours.has_claim() && !ours.has_room());
    assert!(!theirs.claim(), "the permit stays with the slot");
    ours.unclaim();
    assert!(theirs.claim());
}

/// Each connection is under the shared cap, also one that was inserted without a claim.
#[test]
fn a_connection_without_a_claim_counts_for_other_servers() {
    let [mut ours, mut theirs] = sharing_one();
    let id = ours.next_id();
    ours.insert(connection(id));
    assert_eq!((ours.under_cap(), theirs.under_cap()), (1, 1));
    assert!(!theirs.has_room() && !theirs.claim());
    ours.remove(id);
    ours.free();
    assert_eq!(theirs.under_cap(), 0);
    assert!(theirs.claim());
}

#[test]
fn one_server_reports_the_shared_cap_until_its_report_is_over() {
    let [mut ours, mut theirs] = sharing_one();
    assert!(ours.claim_cap_report() && !theirs.claim_cap_report());
    theirs.release_cap_report();
    assert!(!theirs.claim_cap_report(), "the report is not theirs");
    ours.release_cap_report();
    assert!(theirs.claim_cap_report() && !ours.claim_cap_report());
}

#[test]
fn a_stale_id_finds_nothing() {
    let mut conns = table(1);
    let first = conns.next_id();
    conns.insert(connection(first));
    assert!(!conns.has_room());
    assert!(conns
        .by_token(first.index(), Token::of_conn(first))
        .is_some());
    conns.remove(first).expect("it is there");
    let second = conns.next_id();
    conns.insert(connection(second));
    assert_eq!(
        (second.index(), conns.len()),
        (first.index(), 1),
        "the slot is reused"
    );
    assert_ne!(second, first);
    assert!(conns
        .by_token(first.index(), Token::of_conn(first))
        .is_none());
    assert!(conns.get(first).is_none() && conns.get_mut(first).is_none());
    assert!(conns.parts(first).is_none() && conns.remove(first).is_none());
    assert!(conns
        .by_token(second.index(), Token::of_conn(second))
        .is_some());
}

#[test]
fn a_connection_is_queued_once_and_a_stale_id_never() {
    let mut conns = table(1);
    let first = conns.next_id();
    conns.insert(connection(first));
    conns.wake(first);
    conns.wake(first);
    assert_eq!(
        (conns.next_ready(), conns.next_ready()),
        (Some(first), None)
    );
    conns.remove(first);
    conns.wake(first);
    assert!(!conns.has_work());
}

#[test]
fn a_removed_connection_has_no_timer() {
    let mut conns = table(1);
    let id = conns.next_id();
    conns.insert(connection(id));
    conns.arm(id, Time::ZERO);
    conns.remove(id);
    assert_eq!(conns.pop_due(Time::ZERO), None);
}

/// A cap beyond all memory reserves little, also where the optimiser is at work.
#[test]
fn a_cap_beyond_all_memory_reserves_little() {
    for (cap, slots) in [
        (0, 0),
        (1, 1),
        (RESERVED, RESERVED),
        (MAX_CONNECTIONS, RESERVED),
        (1 << 50, RESERVED),
        (usize::MAX, RESERVED),
    ] {
        let conns = table(cap);
        let reserved = conns.slots.capacity();
        assert!((slots..=2 * slots).contains(&reserved), "{cap}: {reserved}");
    }
}

/// Where the system grants no more memory, there is no room, until a slot is free.
#[test]
fn without_memory_there_is_no_room() {
    let mut conns = table(1 << 20);
    conns.slots = Slots::new();
    conns.slots.granted = 100;
    let add = |conns: &mut Connections<NonZeroU64>| {
        let granted = conns.has_room() && conns.claim();
        if granted {
            let id = conns.next_id();
            conns.insert(connection(id));
        }
        granted
    };
    let count = (0..1000).filter(|_| add(&mut conns)).count();
    assert!((64..=128).contains(&count), "{count}");
    assert_eq!(conns.len(), count);
    assert!(!conns.has_room() && !conns.await_room() && conns.is_exhausted());
    let id = conns.iter().next().expect("a connection").id;
    conns.remove(id);
    assert!(conns.has_room() && !conns.is_exhausted());
    assert!(add(&mut conns) && !add(&mut conns) && !add(&mut conns));
    // Memory is there again.
    conns.slots.granted = usize::MAX;
    let id = conns.iter().next().expect("a connection").id;
    conns.remove(id);
    let count = (0..1000).filter(|_| add(&mut conns)).count();
    assert_eq!(count, 1000);
}

/// A permit of the shared cap would wake it in vain.
#[test]
fn without_memory_no_permit_is_awaited() {
    let shared_cap = Arc::new(SharedCap::new(2, 2));
    let mut conns = table(2);
    conns.share(CapShare::new(shared_cap, 0, Box::new(NoWake)));
    conns.granted = 1;
    assert!(conns.await_room() && conns.claim());
    let id = conns.next_id();
    conns.insert(connection(id));
    assert!(!conns.await_room());
}

/// The size that every idle connection costs, with a socket of 8 bytes.
#[test]
#[cfg(target_pointer_width = "64")]
fn a_connection_is_small() {
    let size = size_of::<Connection<NonZeroU64>>();
    assert_eq!(
        Slots::<Connection<NonZeroU64>>::SLOT_SIZE,
        size,
        "a slot needs no more"
    );
    assert!(size <= 152, "{size}");
}
