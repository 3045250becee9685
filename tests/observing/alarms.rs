//! An alarm speaks at its threshold, after each cooldown while it is reached, and when that is over: in virtual time.

use std::cell::Cell;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use portcullis::sim::{Call, ClientId, Scripted, Sim};
use portcullis::{
    Alarm, AlarmId, AlarmInfo, Config, Context, Control, Error, Framing, Handler, Listen, Outcome,
    Quota,
};

/// What alarms have said, and when.
type Log = Vec<(u64, Said, usize, usize)>;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Said {
    Raised,
    StillRaised,
    Cleared,
}

use Said::{Cleared, Raised, StillRaised};

fn said(notice: &AlarmInfo) -> Said {
    match (notice.raised, notice.since.is_zero()) {
        (true, true) => Raised,
        (true, false) => StillRaised,
        (false, _) => Cleared,
    }
}

const COOLDOWN: Duration = Duration::from_secs(5);

fn connections(count: usize) -> Alarm {
    Alarm::Connections(Quota::Count(count))
}

struct App {
    log: Log,
    epoch: Rc<Cell<u64>>,
}

/// Says nothing and keeps what it gets in its peer's frame.
struct Silent;

impl Handler<App> for Silent {
    fn on_frame(&mut self, _: &mut Context<'_, App>, _: &[u8]) -> Outcome {
        Ok(())
    }
}

struct World {
    sim: Sim<App>,
    addr: SocketAddr,
    clients: Vec<ClientId>,
    clock: Rc<Cell<u64>>,
}

fn note(app: &mut App, _: &mut Control<'_, App>, notice: &AlarmInfo) {
    let when = app.epoch.get();
    app.log
        .push((when, said(notice), notice.value, notice.threshold));
}

impl World {
    fn new(config: Config) -> Self {
        let clock = Rc::new(Cell::new(0));
        let app = App {
            log: Vec::new(),
            epoch: Rc::clone(&clock),
        };
        let mut sim = Sim::new(7, config, app);
        let listen = Listen::tcp("127.0.0.1:0", Framing::Packet4).with(|listen| {
            listen.conn.idle_timeout = Duration::MAX;
            listen.conn.frame_timeout = Duration::MAX;
            listen.conn.max_frame = Some(1 << 20);
        });
        let addr = sim.listen(listen, |_: &mut App, _| Silent).expect("listen");
        Self {
            sim,
            addr,
            clients: Vec::new(),
            clock,
        }
    }

    /// Seconds pass, one by one, so that what is said is noted with the second in which it was.
    fn seconds(&mut self, count: u64) {
        for _ in 0..count {
            self.clock.set(self.clock.get() + 1);
            self.sim.advance(Duration::from_secs(1));
        }
    }

    /// So many are connected from now on.
    fn crowd(&mut self, count: usize) {
        while self.clients.len() > count {
            let client = self.clients.pop().expect("one more");
            self.sim.reset(client);
        }
        while self.clients.len() < count {
            self.clients
                .push(self.sim.connect(self.addr).expect("a listener"));
        }
        self.sim.settle();
        assert_eq!(self.sim.stats().open, count);
    }

    fn alarm(&mut self, alarm: Alarm) -> AlarmId {
        self.sim
            .control()
            .on_alarm(alarm, COOLDOWN, note)
            .expect("a good alarm")
    }

    fn set(&mut self, id: AlarmId, alarm: Alarm, cooldown: Duration) {
        let set = self.sim.control().set_alarm(id, alarm, cooldown);
        set.expect("it is there");
    }

    fn said(&mut self) -> Log {
        std::mem::take(&mut self.sim.app_mut().log)
    }
}

/// ranch: misc_connection_alarms. Silent below, at the threshold at once, then every cooldown (5 s).
#[test]
fn it_speaks_at_the_threshold_and_after_each_cooldown() {
    let mut world = World::new(Config::new());
    world.alarm(connections(3));
    world.crowd(2);
    world.seconds(20);
    assert_eq!(world.said(), []);
    world.crowd(3);
    assert_eq!(world.said(), [(20, Raised, 3, 3)]);
    world.crowd(5);
    world.seconds(12);
    // At 25 and at 30, whatever happens in between.
    assert_eq!(
        world.said(),
        [(25, StillRaised, 5, 3), (30, StillRaised, 5, 3)]
    );
    world.crowd(2);
    assert_eq!(world.said(), [(32, Cleared, 2, 3)]);
    world.seconds(60);
    assert_eq!(world.said(), []);
    // Armed again.
    world.crowd(3);
    assert_eq!(world.said(), [(92, Raised, 3, 3)]);
}

/// A value that oscillates around a threshold causes at most two calls in a cooldown.
#[test]
fn it_does_not_flap() {
    let mut world = World::new(Config::new());
    world.alarm(connections(3));
    for _ in 0..50 {
        world.crowd(3);
        world.crowd(2);
    }
    assert_eq!(world.said(), [(0, Raised, 3, 3), (0, Cleared, 2, 3)]);
    // Above it within the cooldown: told at the cooldown's end.
    world.seconds(2);
    world.crowd(4);
    world.seconds(2);
    assert_eq!(world.said(), []);
    world.seconds(1);
    assert_eq!(world.said(), [(5, Raised, 4, 3)]);
    // And not if it has gone by then.
    world.crowd(0);
    world.crowd(4);
    world.crowd(0);
    world.seconds(60);
    assert_eq!(world.said(), [(5, Cleared, 0, 3)]);
    // The cooldown counts from when it was raised, not from when it was over.
    world.crowd(3);
    world.seconds(4);
    world.crowd(2);
    world.crowd(3);
    world.seconds(1);
    assert_eq!(
        world.said(),
        [(65, Raised, 3, 3), (69, Cleared, 2, 3), (70, Raised, 3, 3)]
    );
}

/// An alarm that has nothing to say does not wake the server.
#[test]
fn a_server_with_alarms_sleeps() {
    let mut world = World::new(Config::new());
    world.alarm(connections(3));
    world.alarm(Alarm::FdExhaustion);
    world.crowd(2);
    let iterations = world.sim.stats().iterations;
    world.sim.advance(Duration::from_secs(3600));
    assert!(world.sim.stats().iterations - iterations <= 2);
    world.crowd(3);
    let iterations = world.sim.stats().iterations;
    world.sim.advance(Duration::from_secs(3600));
    let woken = world.sim.stats().iterations - iterations;
    assert!(
        (720..730).contains(&woken),
        "one turn for each cooldown, not {woken}"
    );
}

/// ranch: "changing the cooldown keeps the time already elapsed".
#[test]
fn a_change_keeps_the_time_that_has_passed() {
    let mut world = World::new(Config::new());
    let id = world.alarm(connections(1));
    world.set(id, connections(1), Duration::from_secs(100));
    world.crowd(1);
    world.seconds(30);
    assert_eq!(world.said(), [(0, Raised, 1, 1)]);
    // 30 of 40 seconds are over.
    world.set(id, connections(1), Duration::from_secs(40));
    world.seconds(9);
    assert_eq!(world.said(), []);
    world.seconds(1);
    assert_eq!(world.said(), [(40, StillRaised, 1, 1)]);
    // All of them are over: at once, though nothing else happens.
    world.seconds(10);
    world.set(id, connections(1), Duration::from_secs(5));
    world.sim.settle();
    assert_eq!(world.said(), [(50, StillRaised, 1, 1)]);
    // Another threshold is another truth.
    world.set(id, connections(2), COOLDOWN);
    world.sim.settle();
    assert_eq!(world.said(), [(50, Cleared, 1, 2)]);
    // What watches something else starts anew.
    world.crowd(2);
    world.seconds(5);
    assert_eq!(world.said(), [(55, Raised, 2, 2)]);
    world.set(id, Alarm::Descriptors(Quota::Count(1)), COOLDOWN);
    world.sim.settle();
    assert_eq!(world.said(), [(55, Raised, 3, 1)]);
}

/// A percentage follows the cap, and a number never stays above it.
#[test]
fn thresholds_follow_the_cap() {
    let mut world = World::new(Config::max_connections(100));
    let percent = world.alarm(Alarm::Connections(Quota::Percent(90)));
    world.crowd(20);
    assert_eq!(world.said(), []);
    world
        .sim
        .control()
        .reconfigure(|config| config.max_connections = 22)
        .expect("a cap");
    world.sim.settle();
    assert_eq!(world.said(), [(0, Raised, 20, 20)], "19.8 connections");
    assert!(world.sim.control().remove_alarm(percent));
    let number = world.alarm(connections(22));
    world.sim.settle();
    assert_eq!(world.said(), []);
    world
        .sim
        .control()
        .reconfigure(|config| config.max_connections = 10)
        .expect("a cap");
    world.sim.settle();
    assert_eq!(world.said(), [(0, Raised, 20, 10)]);
    let infos = world.sim.control().alarms();
    assert_eq!(infos.len(), 1);
    assert_eq!(
        (
            infos[0].id,
            infos[0].raised,
            infos[0].value,
            infos[0].threshold
        ),
        (number, true, 20, 10)
    );
}

#[test]
fn descriptors_are_those_of_listeners_and_connections() {
    let mut world = World::new(Config::new());
    world.sim.set_descriptor_limit(40);
    world.alarm(Alarm::Descriptors(Quota::Percent(50)));
    world.crowd(18);
    assert_eq!((world.said(), world.sim.descriptors()), (vec![], 19));
    world.crowd(19);
    assert_eq!(
        (world.said(), world.sim.descriptors()),
        (vec![(0, Raised, 20, 20)], 20)
    );
}

#[test]
fn memory_is_what_buffers_hold() {
    let mut world = World::new(Config::new().with(|config| config.memory_limit = Some(1 << 20)));
    world.alarm(Alarm::Memory(Quota::Percent(25)));
    world.crowd(2);
    let client = world.clients[0];
    // A frame that is begun and not finished.
    world.sim.send(client, &300_000_u32.to_be_bytes());
    world.sim.send(client, &[7; 299_999]);
    world.sim.settle();
    let said = world.said();
    assert!(
        matches!(said[..], [(0, Raised, value, 262_144)] if value >= 262_144),
        "{said:?}"
    );
    assert_eq!(
        world.sim.stats().memory,
        world.sim.control().alarms()[0].value
    );
    world.sim.send(client, &[7]);
    world.sim.settle();
    assert_eq!(world.said(), [(0, Cleared, 0, 262_144)]);
}

/// EMFILE: raised with the first that fails, over with the episode.
#[test]
fn fd_exhaustion_is_told_as_an_episode() {
    let mut world = World::new(Config::new());
    world.alarm(Alarm::FdExhaustion);
    world.crowd(3);
    world.sim.set_descriptor_limit(4);
    let waits = world.sim.connect(world.addr).expect("the backlog has room");
    world.sim.settle();
    assert_eq!(world.said(), [(0, Raised, 1, 1)]);
    world.seconds(6);
    let said = world.said();
    // An attempt each half second.
    assert!(
        matches!(said[..], [(5, StillRaised, 10..=12, 1)]),
        "{said:?}"
    );
    assert_eq!(world.sim.stats().out_of_fds, 1);
    world.sim.set_descriptor_limit(usize::MAX);
    world.seconds(2);
    let said = world.said();
    assert!(matches!(said[..], [(7..=8, Cleared, 0, 1)]), "{said:?}");
    world.clients.push(waits);
    world.crowd(4);
    // And by a fault, without any limit.
    world.seconds(60);
    world.sim.add_fault(Scripted {
        call: Call::Accept,
        after: 0,
        errno: libc::ENFILE,
    });
    world
        .clients
        .push(world.sim.connect(world.addr).expect("the backlog has room"));
    world.sim.settle();
    assert_eq!(world.said(), [(68, Raised, 1, 1)]);
}

/// It is the user's code: it has the server, may change alarms and itself, and a panic ends nothing.
#[test]
fn a_callback_has_the_server_and_may_panic() {
    let mut world = World::new(Config::new());
    let kept = Rc::new(());
    let held = Rc::clone(&kept);
    let sheds = move |app: &mut App, control: &mut Control<'_, App>, notice: &AlarmInfo| {
        let _ = &held;
        note(app, control, notice);
        if notice.raised {
            let (page, _) = control.connections_page(0, 1);
            assert!(control.kill(page[0].id));
        } else {
            assert!(control.remove_alarm(notice.id));
            assert!(!control.remove_alarm(notice.id));
            control
                .on_alarm(connections(3), COOLDOWN, |_, _, _| kit::planned::blow())
                .expect("another");
        }
    };
    world
        .sim
        .control()
        .on_alarm(connections(4), COOLDOWN, sheds)
        .expect("a good alarm");
    for _ in 0..4 {
        world
            .clients
            .push(world.sim.connect(world.addr).expect("a listener"));
    }
    world.sim.settle();
    assert_eq!(world.said(), [(0, Raised, 4, 4), (0, Cleared, 3, 4)]);
    assert_eq!((Rc::strong_count(&kept), world.sim.stats().open), (1, 3));
    // The new one has panicked, and will again.
    assert_eq!(world.sim.stats().panics, 1);
    world.seconds(5);
    assert_eq!(
        (world.sim.stats().panics, world.sim.control().alarms().len()),
        (2, 1)
    );
}

/// A callback whose destructor panics prevents no end, and is counted.
#[test]
fn a_destructor_may_panic() {
    struct Bomb;
    impl Drop for Bomb {
        fn drop(&mut self) {
            kit::planned::blow();
        }
    }
    let mut world = World::new(Config::new());
    let arm = |world: &mut World| {
        let bomb = Bomb;
        let callback = move |_: &mut App, _: &mut Control<'_, App>, _: &AlarmInfo| {
            let _ = &bomb;
        };
        let armed = world
            .sim
            .control()
            .on_alarm(connections(1), COOLDOWN, callback);
        armed.expect("a good alarm")
    };
    let id = arm(&mut world);
    assert!(world.sim.control().remove_alarm(id));
    assert_eq!(world.sim.stats().panics, 1);
    arm(&mut world);
    arm(&mut world);
    drop(world);
}

#[test]
fn what_can_never_or_always_be_reached_is_refused_in_words() {
    let mut world =
        World::new(Config::max_connections(100).with(|config| config.memory_limit = Some(1 << 20)));
    world.sim.set_descriptor_limit(64);
    let mut refusal = |alarm: Alarm, cooldown: Duration| {
        let error = world
            .sim
            .control()
            .on_alarm(alarm, cooldown, note)
            .expect_err("a bad alarm");
        assert!(matches!(error, Error::Option { .. }));
        error.to_string()
    };
    for (alarm, words) in [
        (
            connections(0),
            "option alarm: 0 connections would always be reached; use at least 1",
        ),
        (
            connections(101),
            "option alarm: 101 connections would never be reached, the limit is 100; use at most that",
        ),
        (
            Alarm::Connections(Quota::Percent(0)),
            "option alarm: 0 percent of all connections would always be reached; use at least 1",
        ),
        (
            Alarm::Memory(Quota::Percent(101)),
            "option alarm: 101 percent of all bytes in buffers would never be reached; use at most 100",
        ),
        (
            Alarm::Memory(Quota::Count((1 << 20) + 1)),
            "option alarm: 1048577 bytes in buffers would never be reached, the limit is 1048576; use at most that",
        ),
        (
            Alarm::Descriptors(Quota::Count(65)),
            "option alarm: 65 descriptors would never be reached, the limit is 64; use at most that",
        ),
    ] {
        assert_eq!(refusal(alarm, COOLDOWN), words);
    }
    assert_eq!(
        refusal(Alarm::FdExhaustion, Duration::from_micros(999)),
        "option cooldown: an alarm that is raised would keep the server awake; use at least 1 ms"
    );
    // Parts of what has no limit, or none that is known.
    let mut world = World::new(Config::new());
    let unlimited = world
        .sim
        .control()
        .on_alarm(Alarm::Memory(Quota::Percent(50)), COOLDOWN, note);
    assert_eq!(
        unlimited.expect_err("no limit").to_string(),
        "option alarm: a part of no limit would never be reached; set memory_limit, or give bytes"
    );
    let unknown =
        world
            .sim
            .control()
            .on_alarm(Alarm::Descriptors(Quota::Percent(50)), COOLDOWN, note);
    assert_eq!(
        unknown.expect_err("no limit").to_string(),
        "option alarm: the limit of descriptors is not known on this system; give a number"
    );
    // A change that is refused changes nothing, and there must be one to change.
    let id = world.alarm(connections(1));
    world
        .sim
        .control()
        .set_alarm(id, connections(0), COOLDOWN)
        .expect_err("always reached");
    let kept = &world.sim.control().alarms()[0];
    assert_eq!((kept.alarm, kept.cooldown), (connections(1), COOLDOWN));
    assert!(world.sim.control().remove_alarm(id));
    let gone = world.sim.control().set_alarm(id, connections(1), COOLDOWN);
    assert_eq!(
        gone.expect_err("it has gone").to_string(),
        format!("there is no alarm {id}")
    );
}
