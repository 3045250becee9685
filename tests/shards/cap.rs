//! One cap over all shards, exact at every instant. No client waits while a slot is free, in
//! whichever shard it is, and whatever delays another one.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use kit::net::{
    connect, current_stats, eventually, held_by_each, hold, local, ping, recv2, send2, tcp,
    ReadSome, PATIENCE,
};
use portcullis::{
    AccessRules, AtCapacity, CloseReason, Closed, Config, Connect, Context, Control, Error,
    Framing, Handler, Listen, ListenerState, Outcome, ProxyProtocol, Server, Shards, Spawned,
};

/// How many are inside, over all shards, and the most that there were.
#[derive(Clone, Default)]
struct Gauge(Arc<(AtomicUsize, AtomicUsize)>);

impl Gauge {
    fn now(&self) -> usize {
        self.0 .0.load(Ordering::SeqCst)
    }

    fn most(&self) -> usize {
        self.0 .1.load(Ordering::SeqCst)
    }
}

/// Sends every frame back, and counts itself.
struct Counted(Gauge);

impl<A> Handler<A> for Counted {
    fn on_open(&mut self, _cx: &mut Context<'_, A>) -> Outcome {
        let now = self.0 .0 .0.fetch_add(1, Ordering::SeqCst) + 1;
        self.0 .0 .1.fetch_max(now, Ordering::SeqCst);
        Ok(())
    }

    fn on_frame(&mut self, cx: &mut Context<'_, A>, frame: &[u8]) -> Outcome {
        cx.conn.send(frame)?;
        Ok(())
    }

    fn on_close(&mut self, _cx: &mut Context<'_, A>, _closed: &Closed) {
        // Its place is free after this, not before.
        self.0 .0 .0.fetch_sub(1, Ordering::SeqCst);
    }
}

fn spawn(config: Config, count: usize, listen: Listen) -> (Spawned<()>, SocketAddr, Gauge) {
    let gauge = Gauge::default();
    let seen = gauge.clone();
    let build = move |_, server: &mut Server<()>| {
        let seen = seen.clone();
        server.listen(listen.clone(), move |_: &mut (), _| Counted(seen.clone()))?;
        Ok(())
    };
    let shards = Shards::new(config)
        .threads(count)
        .spawn(build)
        .expect("shards");
    let addr = tcp(&shards.listeners[0].addr);
    (shards, addr, gauge)
}

fn finish(shards: Spawned<()>) {
    shards
        .handle
        .drain(Duration::from_secs(10))
        .expect("they run");
    eventually("the shards end", || shards.is_finished());
    let stats = shards.handle.stats();
    assert_eq!((stats.open, stats.accepted), (0, stats.closed_total()));
    shards.join().expect("no error");
}

/// The shard that the only connection is in.
fn home(shards: &Spawned<()>) -> usize {
    let answers = shards
        .handle
        .call_each(PATIENCE, |_, (), control| control.connections().len());
    let found = answers
        .expect("answers")
        .into_iter()
        .find(|&(_, held)| held > 0);
    found.expect("one has it").0
}

#[test]
fn a_storm_never_exceeds_the_cap_and_every_client_is_served() {
    const CLIENTS: usize = 16;
    const ROUNDS: usize = 40;
    for (cap, reuse_port) in [(1, false), (3, false), (3, true)] {
        let (shards, addr, gauge) = spawn(
            Config::max_connections(cap),
            4,
            local().with(|listen| listen.socket.reuse_port = reuse_port),
        );
        let clients: Vec<_> = (0..CLIENTS)
            .map(|_| {
                thread::spawn(move || {
                    for _ in 0..ROUNDS {
                        ping(&mut connect(addr), b"hello");
                    }
                })
            })
            .collect();
        for client in clients {
            client.join().expect("served every time");
        }
        assert!(
            (1..=cap).contains(&gauge.most()),
            "{} of {cap}",
            gauge.most()
        );
        let stats = current_stats(&shards.handle);
        assert_eq!(stats.accepted, (CLIENTS * ROUNDS) as u64);
        assert_eq!(
            stats.closed(CloseReason::AtCapacity),
            0,
            "nobody is sent away"
        );
        finish(shards);
    }
}

/// A refused client is refused for want of a slot, and gets one later.
#[test]
fn a_storm_of_refusals_never_passes_the_cap() {
    const CLIENTS: usize = 8;
    let listen = local().with(|listen| {
        listen.at_capacity = AtCapacity::Refuse {
            farewell: Vec::new(),
        }
    });
    let (shards, addr, gauge) = spawn(Config::max_connections(2), 2, listen);
    let clients: Vec<_> = (0..CLIENTS)
        .map(|_| {
            thread::spawn(move || {
                let mut served = 0;
                while served < 20 {
                    let mut client = connect(addr);
                    let mut answer = [0; 4];
                    // A reset is a refusal too.
                    if client.write_all(b"\0\x02hi").is_ok()
                        && client.read_exact(&mut answer).is_ok()
                    {
                        served += 1;
                    }
                }
            })
        })
        .collect();
    for client in clients {
        client.join().expect("served in the end");
    }
    assert!((1..=2).contains(&gauge.most()), "{}", gauge.most());
    finish(shards);
}

/// A slot that is free in one shard is for waiting clients of others, although that shard admits
/// none.
#[test]
fn a_free_place_is_found_by_another_shard() {
    for _ in 0..50 {
        let (shards, addr, _) = spawn(Config::max_connections(1), 2, local().name("door"));
        let mut first = connect(addr);
        ping(&mut first, b"first");
        let home = shards.handle.shards().nth(home(&shards)).expect("a shard");
        home.call(PATIENCE, |(), control| control.suspend("door"))
            .expect("answered")
            .expect("suspended");
        let mut second = connect(addr);
        send2(&mut second, b"second");
        let full = || {
            let states = shards
                .handle
                .call_each(PATIENCE, |_, (), control| control.listeners()[0].state);
            states
                .expect("answers")
                .iter()
                .any(|&(_, state)| state == ListenerState::Full)
        };
        eventually("the other shard is full", full);
        assert_eq!(current_stats(&shards.handle).open, 1);
        drop(first);
        assert_eq!(recv2(&mut second), b"second");
        drop(second);
        finish(shards);
    }
}

/// A shard whose handler blocks delays its own clients alone.
#[test]
fn a_busy_shard_strands_no_client() {
    let (shards, addr, _) = spawn(Config::new(), 2, local());
    for shard in [0, 1] {
        let busy = hold(&shards.handle.shards().nth(shard).expect("a shard"));
        let mut clients: Vec<_> = (0..100).map(|_| connect(addr)).collect();
        for client in &mut clients {
            ping(client, b"served meanwhile");
        }
        drop((busy, clients));
    }
    finish(shards);
}

#[test]
fn a_suspended_shard_strands_no_client() {
    let (shards, addr, _) = spawn(Config::new(), 2, local().name("door"));
    let suspend = |(): &mut (), control: &mut portcullis::Control<'_, ()>| control.suspend("door");
    let one = shards.handle.shards().next().expect("a shard");
    one.call(PATIENCE, suspend)
        .expect("answered")
        .expect("there");
    let mut clients: Vec<_> = (0..100).map(|_| connect(addr)).collect();
    for client in &mut clients {
        ping(client, b"served by the other");
    }
    assert_eq!(current_stats(&one).accepted, 0);
    drop(clients);
    finish(shards);
}

#[test]
fn a_listeners_own_limit_in_one_shard_strands_no_client() {
    let (shards, addr, gauge) = spawn(
        Config::new(),
        2,
        local().with(|listen| listen.max_connections = Some(5)),
    );
    let mut clients: Vec<_> = (0..10).map(|_| connect(addr)).collect();
    for client in &mut clients {
        ping(client, b"inside");
    }
    let held = held_by_each(&shards);
    assert_eq!((held, gauge.most()), (vec![5, 5], 10));
    drop(clients);
    finish(shards);
}

#[test]
fn the_cap_is_lowered_and_raised_for_all_at_once() {
    let (shards, addr, gauge) = spawn(Config::max_connections(10), 3, local());
    let mut inside: Vec<_> = (0..10).map(|_| connect(addr)).collect();
    for client in &mut inside {
        ping(client, b"inside");
    }
    let mut waiting: Vec<_> = (0..12).map(|_| connect(addr)).collect();
    for client in &mut waiting {
        send2(client, b"waiting");
        client.set_nonblocking(true).expect("non-blocking");
    }
    shards.handle.set_max_connections(4).expect("lowered");
    for left in (4..10).rev() {
        inside.pop();
        eventually("it has gone", || gauge.now() == left);
        // An iteration of each shard, in which a client could be admitted.
        assert_eq!(current_stats(&shards.handle).accepted, 10);
    }
    inside.pop();
    eventually("one of those who wait is in", || {
        shards.handle.stats().accepted == 11
    });
    assert_eq!(gauge.now(), 4);
    shards.handle.set_max_connections(9).expect("raised");
    eventually("five more are in", || shards.handle.stats().accepted == 16);
    let stats = current_stats(&shards.handle);
    assert_eq!(
        (gauge.now(), gauge.most(), stats.open, stats.accepted),
        (9, 10, 9, 16)
    );
    let answered = |client: &mut TcpStream| match client.read_some(&mut [0; 9]) {
        Ok(count) => count == 9,
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::WouldBlock);
            false
        }
    };
    let mut served = 0;
    eventually("six of those who waited are answered", || {
        served += waiting
            .iter_mut()
            .filter_map(|client| answered(client).then_some(()))
            .count();
        served == 6
    });
    shards.handle.set_max_connections(0).expect("lowered");
    drop((inside, waiting));
    eventually("all have gone", || gauge.now() == 0);
    shards.handle.set_max_connections(1).expect("raised");
    // The waiting clients have gone too, and are served as far as possible.
    ping(&mut connect(addr), b"hello");
    finish(shards);
}

/// The cap goes up and down under a storm: no client is admitted beyond it.
#[test]
fn the_cap_holds_while_it_changes() {
    let (shards, addr, gauge) = spawn(Config::max_connections(6), 3, local());
    let clients: Vec<_> = (0..12)
        .map(|_| {
            thread::spawn(move || {
                for _ in 0..40 {
                    ping(&mut connect(addr), b"hello");
                }
            })
        })
        .collect();
    let mut round = 0;
    while !clients.iter().all(thread::JoinHandle::is_finished) {
        round += 1;
        let cap = [1, 6, 2, 4][round % 4];
        shards.handle.set_max_connections(cap).expect("changed");
        // A client that had a slot before that is admitted after this.
        shards
            .handle
            .call_each(PATIENCE, |_, (), _| ())
            .expect("answers");
        eventually("the others have gone", || gauge.now() <= cap);
        for _ in 0..100 {
            assert!(gauge.now() <= cap, "{} of {cap}", gauge.now());
        }
    }
    for client in clients {
        client.join().expect("served every time");
    }
    assert!(gauge.most() <= 6);
    finish(shards);
}

/// Silent peers in every shard do not keep others out: the quota of those that are not open yet is over all.
#[test]
fn the_oldest_gives_way_in_whichever_shard_it_is() {
    let listen = local().with(|listen| {
        listen.proxy_protocol = ProxyProtocol::Required;
        listen.trusted_proxies = Some(AccessRules::allow_all());
    });
    let config = Config::max_connections(6)
        .with(|config| config.pending_limits.grace = Duration::from_millis(1));
    let (shards, addr, gauge) = spawn(config, 3, listen);
    let silent: Vec<_> = (0..12).map(|_| connect(addr)).collect();
    for _ in 0..12 {
        let mut client = connect(addr);
        client.write_all(b"PROXY UNKNOWN\r\n").expect("sent");
        ping(&mut client, b"hello");
    }
    assert!(gauge.most() <= 6);
    let stats = current_stats(&shards.handle);
    assert!(stats.closed(CloseReason::Evicted) > 0);
    assert_eq!(stats.closed(CloseReason::AtCapacity), 0);
    drop(silent);
    finish(shards);
}

/// A shard that has nothing to evict leaves a client to one that has, before it refuses it.
#[test]
fn no_shard_refuses_a_client_for_which_another_can_evict() {
    let refuses = local().name("door").with(|listen| {
        listen.at_capacity = AtCapacity::Refuse {
            farewell: Vec::new(),
        };
    });
    let config =
        Config::max_connections(12).with(|config| config.pending_limits.grace = Duration::ZERO);
    let (shards, addr, gauge) = spawn(config, 2, refuses);
    let one = shards.handle.shards().next().expect("a shard");
    let suspend = |(): &mut (), control: &mut Control<'_, ()>| control.suspend("door");
    one.call(PATIENCE, suspend)
        .expect("answered")
        .expect("there");
    let silent: Vec<_> = (0..12).map(|_| connect(addr)).collect();
    eventually("all are in the other shard", || gauge.now() == 12);
    assert_eq!(held_by_each(&shards), [0, 12]);
    let resume = |(): &mut (), control: &mut Control<'_, ()>| control.resume("door");
    one.call(PATIENCE, resume)
        .expect("answered")
        .expect("there");
    let mut served = Vec::new();
    let mut refused = 0;
    while served.len() < 12 {
        let mut client = connect(addr);
        let sent = client.write_all(b"\0\x01x");
        match sent.and_then(|()| client.read_exact(&mut [0; 3])) {
            Ok(()) => served.push(client),
            // On a busy machine the other shard may not run in time.
            Err(_) => refused += 1,
        }
        assert!(refused <= 3, "as if no shard waited for the other");
    }
    let counts = |stats: &portcullis::Stats| {
        [CloseReason::Evicted, CloseReason::AtCapacity].map(|reason| stats.closed(reason))
    };
    let stats = current_stats(&shards.handle);
    assert_eq!(counts(&stats), [12, refused]);
    // Once all have spoken, there is nothing to evict.
    let late = connect(addr).read_some(&mut [0]);
    assert!(matches!(late, Ok(0)) || late.is_err(), "{late:?}");
    let stats = current_stats(&shards.handle);
    assert_eq!(counts(&stats), [12, refused + 1]);
    assert!(gauge.most() <= 12);
    drop((silent, served));
    finish(shards);
}

/// A cap that is lowered is reached again when connections end: the shard that can evict learns of it.
#[test]
fn a_lowered_cap_that_is_reached_again_wakes_the_shard_that_can_evict() {
    let config = Config::max_connections(6)
        .with(|config| config.pending_limits.grace = Duration::from_millis(1));
    let (shards, addr, gauge) = spawn(config, 2, local().name("door"));
    let doors: Vec<_> = shards.handle.shards().collect();
    let suspend = |(): &mut (), control: &mut Control<'_, ()>| control.suspend("door");
    let resume = |(): &mut (), control: &mut Control<'_, ()>| control.resume("door");
    let fill = |shard: usize, count: usize, sum: usize| {
        let other = &doors[1 - shard];
        let set = other.call(PATIENCE, suspend).expect("answered");
        set.expect("there");
        let clients: Vec<_> = (0..count).map(|_| connect(addr)).collect();
        eventually("they are in", || gauge.now() == sum);
        let set = other.call(PATIENCE, resume).expect("answered");
        set.expect("there");
        clients
    };
    let silent = fill(1, 3, 3);
    let mut spoken = fill(0, 3, 6);
    for client in &mut spoken {
        ping(client, b"hello");
    }
    assert_eq!(held_by_each(&shards), [3, 3]);
    shards.handle.set_max_connections(5).expect("they run");
    eventually("the cap is lowered", || {
        shards
            .handle
            .call_each(PATIENCE, |_, (), control| control.config().max_connections)
            .expect("answers")
            .iter()
            .all(|&(_, cap)| cap == 5)
    });
    drop(spoken.pop());
    eventually("one has ended", || gauge.now() == 5);
    let mut client = connect(addr);
    ping(&mut client, b"served");
    assert_eq!(
        current_stats(&shards.handle).closed(CloseReason::Evicted),
        1
    );
    drop((silent, spoken, client));
    finish(shards);
}

/// A shard that ends gives its places to the others.
#[test]
fn the_places_of_a_shard_that_ends_are_free() {
    let (shards, addr, _) = spawn(Config::max_connections(2), 2, local());
    let mut clients: Vec<_> = (0..2).map(|_| connect(addr)).collect();
    for client in &mut clients {
        ping(client, b"inside");
    }
    let mut waiting: Vec<_> = (0..2).map(|_| connect(addr)).collect();
    for client in &mut waiting {
        send2(client, b"waiting");
    }
    let going = home(&shards);
    let held = held_by_each(&shards)[going];
    let going = shards.handle.shards().nth(going).expect("a shard");
    going.stop().expect("it runs");
    for client in waiting.iter_mut().take(held) {
        assert_eq!(recv2(client), b"waiting");
    }
    drop(clients);
    for client in waiting.iter_mut().skip(held) {
        assert_eq!(recv2(client), b"waiting");
    }
    drop(waiting);
    shards.handle.stop().expect("the other runs");
    eventually("the shards end", || shards.is_finished());
    shards.join().expect("no error");
}

/// What a shard connects to takes a place under the same cap.
#[test]
fn outgoing_connections_share_it() {
    let elsewhere = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let to = elsewhere.local_addr().expect("bound");
    let (shards, addr, _) = spawn(Config::max_connections(3), 2, local());
    let handle = shards.handle.clone();
    let dial = move |shard: usize| {
        let shard = handle.shards().nth(shard).expect("there are two");
        let dial = move |(): &mut (), control: &mut Control<'_, ()>| {
            control.connect(
                to,
                Connect::new(Framing::Packet2),
                Counted(Gauge::default()),
            )
        };
        shard.call(PATIENCE, dial).expect("an answer")
    };
    let mut inside = connect(addr);
    ping(&mut inside, b"hello");
    let first = dial(0).expect("a place");
    dial(1).expect("a place");
    for shard in [0, 1] {
        let full = dial(shard).expect_err("there are three");
        assert!(
            matches!(
                full,
                Error::AtCapacity {
                    max_connections: 3,
                    ..
                }
            ),
            "{full}"
        );
    }
    shards
        .handle
        .shards()
        .next()
        .expect("there")
        .kill(first)
        .expect("it runs");
    // Its place is the other shard's to take once the turn in which it ended is over.
    eventually("the place of the other shard's", || dial(1).is_ok());
    drop(elsewhere);
    shards.handle.drain(Duration::ZERO).expect("they run");
    eventually("the shards end", || shards.is_finished());
    let stats = shards.handle.stats();
    assert_eq!(
        (stats.accepted, stats.outgoing, stats.closed_total()),
        (1, 3, 4)
    );
    shards.join().expect("no error");
}

/// Each shard keeps its own, and clients come in wherever one is.
#[test]
fn reserved_slots_are_kept_in_every_shard() {
    let gauge = Gauge::default();
    let build = move |_, server: &mut Server<()>| {
        for (name, reserved) in [("public", 0), ("operator", 2)] {
            let (listen, gauge) = (local().name(name), gauge.clone());
            let listen = listen.with(|listen| listen.reserved = reserved);
            server.listen(listen, move |_: &mut (), _| Counted(gauge.clone()))?;
        }
        Ok(())
    };
    let shards = Shards::new(Config::max_connections(6)).threads(2);
    let shards = shards.spawn(build).expect("shards");
    let [public, operator] = [0, 1].map(|at: usize| tcp(&shards.listeners[at].addr));
    let mut inside = [(); 2].map(|()| connect(public));
    for client in &mut inside {
        ping(client, b"in");
    }
    let mut waiting = connect(public);
    send2(&mut waiting, b"later");
    let mut reports = [(); 4].map(|()| connect(operator));
    for client in &mut reports {
        ping(client, b"report");
    }
    assert_eq!(current_stats(&shards.handle).open, 6);
    drop(inside);
    assert_eq!(recv2(&mut waiting), b"later");
    drop((waiting, reports));
    finish(shards);
}
