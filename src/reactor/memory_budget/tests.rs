use std::rc::Rc;

use super::*;
use crate::addr::Addr;
use crate::config::Listen;
use crate::proto::{Machine, Pool};
use crate::reactor::connection::Connection;

const LIMIT: usize = 1 << 20;

fn add(conns: &mut Connections<()>) -> ConnId {
    let (listen, mut pool) = (
        Listen::tcp("127.0.0.1:0", crate::Framing::Packet2),
        Pool::default(),
    );
    let limits = Rc::new(listen.conn.clone());
    let machine = Machine::new(&listen.framing, limits, None, Time::ZERO, &mut pool);
    let id = conns.next_id();
    conns.insert(Connection::new(
        id,
        None,
        Addr::unspecified(),
        machine,
        Time::ZERO,
        0,
    ));
    id
}

fn own(own: usize) -> Held {
    Held { own, shared: 0 }
}

/// A connection that waits for the grant of another one, whose socket is dry; a third one holds half
/// of the memory.
struct World {
    conns: Connections<()>,
    memory: MemoryBudget,
    granted: ConnId,
    other: ConnId,
}

fn world() -> World {
    let mut conns = Connections::new(8, std::sync::Arc::default());
    let [granted, other] = [(); 2].map(|()| add(&mut conns));
    let mut memory = MemoryBudget::new(Some(LIMIT), &Rc::default());
    memory.account(&mut conns, other, own(LIMIT / 2), Time::ZERO);
    memory.give_grant(granted, None, Time::ZERO);
    let pause = Pause {
        since: Time::ZERO,
        stall: Duration::ZERO,
    };
    for _ in 0..2 {
        memory.paused.ids.insert(add(&mut conns), pause);
    }
    memory.account(&mut conns, granted, own(LIMIT / 2 - 100), Time::ZERO);
    World {
        conns,
        memory,
        granted,
        other,
    }
}

#[test]
fn stalled_connections_are_searched_when_that_is_due() {
    let World {
        mut conns,
        mut memory,
        granted,
        ..
    } = world();
    let searched = memory.usage.sample_at();
    assert_ne!(searched, 0, "once, when the socket is dry");
    let mut now = Time::ZERO;
    for packet in 0..100 {
        now = now.after(Duration::from_millis(1));
        memory.account(&mut conns, granted, own(LIMIT / 2 - packet), now);
        assert_eq!(memory.usage.sample_at(), searched);
    }
    now = memory.grant_until();
    memory.expire(&mut conns, now, now);
    assert_ne!(memory.usage.sample_at(), searched);
}

#[test]
fn memory_that_is_free_passes_the_grant_at_once() {
    let World {
        mut conns,
        mut memory,
        granted,
        other,
    } = world();
    let now = Time::ZERO.after(Duration::from_millis(1));
    memory.account(&mut conns, other, own(LIMIT / 4), now);
    assert!(memory.grant.is_some_and(|grant| grant.id == granted));
    memory.account(&mut conns, granted, own(LIMIT / 2), now);
    assert!(memory.grant.is_some_and(|grant| grant.id != granted));
}

/// Another connection may have ended it, with memory still tight and no connection paused.
#[test]
fn a_connection_that_has_ended_is_forgotten() {
    let World {
        mut conns,
        mut memory,
        granted,
        other,
    } = world();
    let now = Time::ZERO.after(Duration::from_millis(1));
    let third = add(&mut conns);
    memory.account(&mut conns, other, own(LIMIT / 2 - 4096), now);
    memory.account(&mut conns, third, own(2048), now);
    memory.account(&mut conns, granted, own(LIMIT / 5), now);
    memory.account(&mut conns, other, own(LIMIT / 3 * 2 - 4096), now);
    memory.account(&mut conns, granted, own(LIMIT / 5 + 1), now);
    assert!(memory.had_grant.contains_key(&granted));
    let waiting: Vec<_> = conns.iter().map(|conn| conn.id).collect();
    for id in waiting {
        if ![granted, other, third].contains(&id) {
            memory.forget(&mut conns, id, now);
        }
    }
    assert!(memory.grant.is_none() && memory.paused() == 0);
    memory.close(&mut conns, granted.index(), now);
    assert!(memory.is_tight());
    memory.forget(&mut conns, granted, now);
    assert!(memory.had_grant.is_empty());
}

/// One more release follows for those that hold nothing any more since the delay began.
#[test]
fn spare_memory_is_released_a_while_after_the_last_fall() {
    const BYTES: usize = 8 << 20;
    let mut conns = Connections::new(8, std::sync::Arc::default());
    let ids = [(); 3].map(|()| add(&mut conns));
    let mut memory = MemoryBudget::new(None, &Rc::default());
    let at = |millis| Time::ZERO.after(Duration::from_millis(millis));
    let mut step = |slots: &[ConnId], bytes, now| {
        for &id in slots {
            memory.account(&mut conns, id, own(bytes), now);
        }
        memory.release_spare(&mut conns, now);
        memory.wake_at()
    };
    assert_eq!(step(&ids, BYTES, at(0)), Time::NEVER);
    assert_eq!(step(&ids[..1], 0, at(1)), at(101));
    assert_eq!(step(&ids[1..2], 0, at(90)), at(101), "not put off");
    assert_eq!(step(&[], 0, at(105)), at(205), "for the second one");
    assert_eq!(step(&[], 0, at(205)), Time::NEVER, "one may hold for ever");
    assert_eq!(step(&ids[2..], 0, at(300)), at(400));
    assert_eq!(step(&[], 0, at(400)), Time::NEVER);
}
