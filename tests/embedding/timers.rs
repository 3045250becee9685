//! The application's own timers: under `run`, `spawn`, `poll_once` and in shards, in order, never early, and each once.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::mpsc;
use std::time::Duration;

use kit::net::{local, Echo, PATIENCE};
use portcullis::sim::Sim;
use portcullis::{
    Config, Context, Control, Framing, Handler, Listen, Outcome, Server, Shards, TimerId,
};

const SECOND: Duration = Duration::from_secs(1);

/// What ran, and when.
type Ran = Vec<(&'static str, Duration)>;

fn world() -> Sim<Ran> {
    Sim::new(1, Config::new(), Ran::new())
}

/// Sets a timer that notes its name; the time is the simulation's.
fn set(sim: &mut Sim<Ran>, name: &'static str, seconds: u64) -> TimerId {
    let after = SECOND * u32::try_from(seconds).expect("few");
    let due = sim.now() + after;
    let note = move |ran: &mut Ran, _: &mut Control<'_, Ran>| ran.push((name, due));
    sim.control().set_timer(after, note)
}

fn names(sim: &Sim<Ran>) -> Vec<&'static str> {
    sim.app().iter().map(|&(name, _)| name).collect()
}

#[test]
fn timers_run_in_the_order_of_their_times_and_once() {
    let mut sim = world();
    for (name, seconds) in [("c", 3), ("a", 1), ("b", 1), ("never", 99), ("now", 0)] {
        set(&mut sim, name, seconds);
    }
    let cancelled = set(&mut sim, "cancelled", 2);
    sim.settle();
    assert_eq!(names(&sim), ["now"]);
    assert_eq!(sim.next_timeout(), Some(SECOND));
    sim.advance(SECOND - Duration::from_nanos(1));
    assert_eq!(names(&sim), ["now"], "not early");
    sim.advance(Duration::from_nanos(1));
    assert_eq!(names(&sim), ["now", "a", "b"]);
    assert!(sim.control().cancel_timer(cancelled));
    assert!(!sim.control().cancel_timer(cancelled));
    sim.advance(SECOND * 3);
    assert_eq!(names(&sim), ["now", "a", "b", "c"]);
}

/// A step of a game: repeats, and is not early after long work.
#[test]
fn a_duration_counts_from_the_call() {
    let mut sim = world();
    let work = sim.work();
    let clock = Rc::new(Cell::new(Duration::ZERO));
    let seen = Rc::clone(&clock);
    sim.control().set_timer(SECOND, move |_, control| {
        work(SECOND * 10);
        control.set_timer(SECOND, move |ran: &mut Ran, _| {
            ran.push(("later", seen.get()))
        });
    });
    sim.advance(SECOND);
    assert_eq!(sim.next_timeout(), Some(SECOND), "from the end of the work");
    sim.advance(SECOND - Duration::from_nanos(1));
    assert!(names(&sim).is_empty());
    sim.advance(Duration::from_nanos(1));
    assert_eq!(names(&sim), ["later"]);
}

fn every(ran: &mut Ran, control: &mut Control<'_, Ran>) {
    ran.push(("step", Duration::ZERO));
    control.set_timer(Duration::ZERO, every);
}

/// One that is due again at once takes turns with everything else.
#[test]
fn a_timer_without_a_delay_starves_nobody() {
    let mut sim = world();
    let addr = sim.listen(
        Listen::tcp("127.0.0.1:0", Framing::Packet2),
        |_: &mut _, _| Echo,
    );
    let client = sim.connect(addr.expect("a listener")).expect("room");
    sim.control().set_timer(Duration::ZERO, every);
    sim.send(client, b"\0\x02hi");
    for _ in 0..5 {
        sim.step();
    }
    assert_eq!(sim.received(client), b"\0\x02hi");
    assert_eq!(names(&sim).len(), 5, "one in each iteration");
}

#[test]
fn a_panic_in_a_job_ends_nothing_else() {
    let mut sim = world();
    sim.control().set_timer(SECOND, |_, _| {
        std::panic::resume_unwind(Box::new("planned"))
    });
    set(&mut sim, "next", 1);
    sim.advance(SECOND);
    assert_eq!((names(&sim), sim.stats().panics), (vec!["next"], 1));
}

/// Runs its jobs from a callback.
struct SetsTimers;

impl Handler<Ran> for SetsTimers {
    fn on_frame(&mut self, cx: &mut Context<'_, Ran>, _: &[u8]) -> Outcome {
        let id = cx.conn.id();
        cx.conn.control().set_timer(SECOND, move |_, control| {
            if let Some(mut conn) = control.conn(id) {
                let _ = conn.send("late\n");
            }
        });
        Ok(())
    }
}

#[test]
fn a_callback_sets_a_timer_that_reaches_connections() {
    let mut sim = world();
    let addr = sim.listen(Listen::tcp("127.0.0.1:0", Framing::Line), |_: &mut _, _| {
        SetsTimers
    });
    let addr = addr.expect("a listener");
    let (stays, leaves) = (
        sim.connect(addr).expect("room"),
        sim.connect(addr).expect("room"),
    );
    sim.send(stays, b"x\n");
    sim.send(leaves, b"x\n");
    sim.settle();
    sim.reset(leaves);
    sim.advance(SECOND);
    assert_eq!(sim.received(stays), b"late\n");
    assert_eq!(sim.stats().panics, 0);
}

/// An application that can be told what has run.
struct App(mpsc::Sender<usize>);

#[test]
fn they_run_under_spawn_and_in_shards() {
    let (tell, told) = mpsc::channel();
    let single = tell.clone();
    let spawned = Server::spawn(move || {
        let mut server = Server::new(Config::new())?;
        server
            .control()
            .set_timer(Duration::from_millis(1), |app: &mut App, control| {
                let _ = app.0.send(100);
                control.stop();
            });
        Ok((server, App(single)))
    });
    spawned.expect("a server").join().expect("it stopped");
    assert_eq!(told.recv_timeout(PATIENCE), Ok(100));

    let shards = Shards::new(Config::new())
        .threads(2)
        .spawn(move |shard, server| {
            server.listen(local().name("echo"), |_: &mut App, _| Echo)?;
            server
                .control()
                .set_timer(Duration::from_millis(1), move |app: &mut App, _| {
                    let _ = app.0.send(shard);
                });
            Ok(App(tell.clone()))
        });
    let shards = shards.expect("two shards");
    let mut ran = [told.recv_timeout(PATIENCE), told.recv_timeout(PATIENCE)];
    ran.sort_by_key(|shard| shard.unwrap_or(usize::MAX));
    assert_eq!(ran, [Ok(0), Ok(1)]);
    let handle = shards.handle.clone();
    handle.stop().expect("it runs");
    shards.join().expect("it stopped");
}

/// Counts its drops.
struct Counted(Rc<Cell<u32>>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.set(self.0.get() + 1);
    }
}

#[test]
fn a_server_that_is_dropped_drops_its_jobs() {
    let dropped = Rc::new(Cell::new(0));
    let mut server: Server = Server::new(Config::new()).expect("a server");
    let mut ids = Vec::new();
    for _ in 0..3 {
        let counted = Counted(Rc::clone(&dropped));
        let job = move |_: &mut (), _: &mut Control<'_>| drop(counted);
        ids.push(server.control().set_timer(SECOND, job));
    }
    let mut other: Server = Server::new(Config::new()).expect("a server");
    assert!(
        !other.control().cancel_timer(ids[0]),
        "the timer of another server"
    );
    assert!(server.control().cancel_timer(ids[0]));
    assert_eq!(dropped.get(), 1);
    drop(server);
    assert_eq!(dropped.get(), 3);
}
