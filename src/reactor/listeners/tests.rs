use std::sync::Arc;
use std::time::Duration;

use super::*;
use crate::alarm::Alarm;
use crate::config::{AtCapacity, Config, Quota};
use crate::handler::{Context, Handler};
use crate::proto::Rate;
use crate::reactor::shared_cap::SharedCap;
use crate::reason::Outcome;
use crate::sim::{ClientId, Sim};
use crate::Framing;

fn listener(id: ListenerId) -> Listener<()> {
    let listen = Listen::tcp("127.0.0.1:0", Framing::Packet2);
    let (name, addr) = (String::new(), Addr::unspecified());
    let mut listener = Listener::new(id, name, addr, 0, listen, Time::ZERO);
    listener.readable = false;
    listener
}

#[test]
fn an_event_finds_its_listener() {
    let mut listeners = Listeners::<()>::default();
    let mut find = |number: u32| {
        let id = ListenerId::new(ServerNumber::NONE, number);
        listeners.all.push(listener(id));
        listeners.next_id = number + 1;
        for listener in &mut listeners.all {
            listener.readable = false;
        }
        listeners.handle_event(Token::of_listener(id));
        let found = listeners.iter().filter(|listener| listener.readable);
        found
            .map(|listener| listener.id.number())
            .collect::<Vec<_>>()
    };
    for number in [0, 1, 7, Token::LISTENERS - 1] {
        assert_eq!(find(number), [number]);
    }
    assert_eq!(find(Token::LISTENERS), [0, Token::LISTENERS]);
    assert_eq!(find(Token::LISTENERS + 3), [Token::LISTENERS + 3]);
}

#[test]
fn an_id_names_one_listener_when_the_numbers_repeat() {
    let mut listeners = Listeners::<()>::default();
    let mut add = |next_id| {
        listeners.next_id = next_id;
        let id = listeners.vacant_id(ServerNumber::NONE);
        listeners.all.push(listener(id));
        id.number()
    };
    let repeat = 1 << 22;
    let numbers = [0, 1, repeat - 2, repeat - 1, repeat - 1].map(&mut add);
    assert_eq!(numbers, [0, 1, repeat - 2, 2, 3]);
    for listener in listeners.iter() {
        let same = listeners.iter().filter(|other| other.id == listener.id);
        assert_eq!(same.count(), 1);
    }
}

struct Echo;

impl Handler for Echo {
    fn on_frame(&mut self, cx: &mut Context<'_>, frame: &[u8]) -> Outcome {
        cx.conn.send(frame)?;
        Ok(())
    }
}

/// Opens `count` listeners, and returns the address of one.
fn listen(sim: &mut Sim, listen: &Listen, count: usize) -> std::net::SocketAddr {
    let mut open = || {
        sim.listen(listen.clone(), |(), _| Echo)
            .expect("a listener")
    };
    let addrs: Vec<_> = (0..count).map(|_| open()).collect();
    addrs[count / 2]
}

fn local() -> Listen {
    Listen::tcp("127.0.0.1:0", Framing::Packet2)
}

/// The number of visits to listeners while `work` is done.
fn visits(sim: &mut Sim, work: impl FnOnce(&mut Sim)) -> usize {
    let before = sim.listener_visits();
    work(sim);
    sim.listener_visits() - before
}

fn ping(sim: &mut Sim, client: ClientId) {
    sim.send(client, b"\0\x01x");
    sim.settle();
    assert_eq!(sim.received(client), b"\0\x01x");
}

/// An iteration that changes no listener visits none, whatever it asks about them.
#[test]
fn a_message_visits_no_listener() {
    let plain = Config::new();
    let limited = Config::new().with(|config| config.accept_rate = Some(Rate::per_second(10)));
    let refusing = local().with(|listen| {
        listen.at_capacity = AtCapacity::Refuse {
            farewell: Vec::new(),
        }
    });
    for (config, options, servers, has_alarm) in [
        (&plain, local(), 1, false),
        (&plain, local(), 1, true),
        (&limited, local(), 1, false),
        (&limited, refusing.clone(), 1, false),
        (&plain, local(), 2, true),
        (&limited, refusing, 2, true),
    ] {
        let mut sim = Sim::new(1, config.clone(), ());
        if servers > 1 {
            let cap = Arc::new(SharedCap::new(config.max_connections, servers));
            sim.share_cap(cap, 0);
        }
        let addr = listen(&mut sim, &options, 100);
        if has_alarm {
            let alarm = Alarm::Descriptors(Quota::Count(1000));
            let added = sim.control().on_alarm(alarm, Duration::MAX, |_, _, _| {});
            added.expect("an alarm");
        }
        let client = sim.connect(addr).expect("a listener");
        ping(&mut sim, client);
        let visits = visits(&mut sim, |sim| (0..10).for_each(|_| ping(sim, client)));
        assert_eq!(
            visits, 0,
            "{servers} servers, alarm: {has_alarm}, {options:?}"
        );
    }
}

/// A client that comes and goes changes its own listener, and no other one is visited.
#[test]
fn a_client_visits_its_own_listener() {
    let own = |max| local().with(|listen| listen.max_connections = Some(max));
    let rate = Rate::per_second(10);
    for (name, options) in [
        ("no limit", local()),
        ("a limit", own(10)),
        ("a limit that is reached", own(1)),
        (
            "a rate",
            local().with(|listen| listen.accept_rate = Some(rate)),
        ),
    ] {
        let [few, many] = [2, 200].map(|count| {
            let mut sim = Sim::new(1, Config::new(), ());
            let addr = listen(&mut sim, &options, count);
            let visit = |sim: &mut Sim| {
                let client = sim.connect(addr).expect("a listener");
                ping(sim, client);
                sim.finish(client);
                sim.advance(Duration::from_secs(1));
                assert_eq!(sim.stats().open, 0);
            };
            visit(&mut sim);
            visits(&mut sim, visit)
        });
        assert_eq!(few, many, "{name}");
        assert!(many < 40, "{name}: {many}");
    }
}

/// A time from which clients are admitted moves with each of them. Once it is past, that concerns
/// no other listener.
#[test]
fn a_client_visits_its_own_listener_under_limits_of_the_server() {
    let limited = Config::new().with(|config| config.accept_rate = Some(Rate::per_second(10)));
    let evicting =
        Config::max_connections(3).with(|config| config.pending_limits.grace = Duration::ZERO);
    for (name, config) in [("a rate", limited), ("evictions", evicting)] {
        let [few, many] = [2, 200].map(|count| {
            let mut sim = Sim::new(1, config.clone(), ());
            let addr = listen(&mut sim, &local(), count);
            let visit = |sim: &mut Sim| {
                sim.connect(addr).expect("a listener");
                sim.advance(Duration::from_secs(1));
            };
            (0..5).for_each(|_| visit(&mut sim));
            let visits = visits(&mut sim, visit);
            assert_eq!(sim.stats().accepted, 6, "{name}");
            visits
        });
        assert_eq!(few, many, "{name}");
    }
}

/// A frame of one client visits none of the listeners that have all of their own connections.
#[test]
fn a_frame_visits_no_other_listener_at_its_own_cap() {
    let [few, many] = [2, 200].map(|count| {
        let mut sim = Sim::new(1, Config::new(), ());
        let own = local().with(|listen| listen.max_connections = Some(1));
        listen(&mut sim, &own, count);
        let mut clients = Vec::new();
        for info in sim.control().listeners() {
            let port = info.addr.port().expect("an address with a port");
            let client = sim.connect(([127, 0, 0, 1], port).into());
            clients.push(client.expect("it listens"));
        }
        for &client in &clients {
            ping(&mut sim, client);
        }
        sim.advance(Duration::from_secs(5));
        visits(&mut sim, |sim| ping(sim, clients[0]))
    });
    assert_eq!(few, many);
}

/// So does a listener that is suspended or closed by itself.
#[test]
fn a_change_visits_its_own_listener() {
    let [few, many] = [2, 200].map(|count| {
        let mut sim = Sim::new(1, Config::new(), ());
        let addr = listen(&mut sim, &local(), count);
        sim.settle();
        visits(&mut sim, |sim| {
            for suspended in [true, false] {
                let set = match suspended {
                    true => crate::Control::suspend,
                    false => crate::Control::resume,
                };
                set(&mut sim.control(), addr.port()).expect("open");
                sim.settle();
            }
            let client = sim.connect(addr).expect("a listener");
            ping(sim, client);
        })
    });
    assert_eq!(few, many);
}

/// Many listeners that close at once are removed at once.
#[test]
fn listeners_that_close_together_are_removed_together() {
    let [few, many] = [10, 200].map(|count| {
        let mut sim = Sim::new(1, Config::new(), ());
        listen(&mut sim, &local(), count);
        sim.settle();
        let closed = visits(&mut sim, |sim| {
            for info in sim.control().listeners() {
                sim.control().close_listener(info.id).expect("open");
            }
            sim.settle();
        });
        assert!(sim.control().listeners().is_empty());
        closed
    });
    assert!(many <= few * 20, "{many} for 200, {few} for 10");
}

/// A turn in a drain visits no listener that is closed.
#[test]
fn a_drain_visits_no_closed_listener() {
    let mut sim = Sim::new(1, Config::new(), ());
    let addr = listen(&mut sim, &local(), 100);
    for info in sim.control().listeners() {
        let port = info.addr.port().expect("an address with a port");
        sim.connect(([127, 0, 0, 1], port).into())
            .expect("it listens");
    }
    let client = sim.connect(addr).expect("it listens");
    sim.settle();
    // Each owes a reply, so that the drain ends none.
    for info in sim.control().connections() {
        sim.control().conn(info.id).expect("open").hold();
    }
    sim.control().drain(Duration::from_secs(100));
    sim.settle();
    let visits = visits(&mut sim, |sim| ping(sim, client));
    assert_eq!(visits, 0);
}
