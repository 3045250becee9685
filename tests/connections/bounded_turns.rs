//! However many connections come due, drain or end at once, one turn of the loop sees to a bounded number of them.

use std::collections::HashMap;
use std::time::Duration;

use portcullis::sim::{Call, ClientId, Scripted, Sim};
use portcullis::{
    Budgets, CloseReason, Config, ConnId, Context, Framing, Handler, Listen, Outcome, Quota,
};

const CROWD: usize = 5_000;
/// Of due timers, of told connections, of forced ends; each turn may also give as many turns from the ready list.
const BATCH: usize = 1_024;

#[derive(Default)]
struct Counts {
    drained: usize,
    closed: usize,
    timers: usize,
    /// The connections that had a frame, in order.
    turns: Vec<ConnId>,
}

/// Has something to say when the server drains, and so stays.
struct Member;

impl Handler<Counts> for Member {
    fn on_frame(&mut self, _: &mut Context<'_, Counts>, _: &[u8]) -> Outcome {
        Ok(())
    }

    fn on_drain(&mut self, cx: &mut Context<'_, Counts>) -> Outcome {
        cx.app.drained += 1;
        cx.conn.hold();
        Ok(())
    }

    fn on_close(&mut self, cx: &mut Context<'_, Counts>, _: &portcullis::Closed) {
        cx.app.closed += 1;
    }
}

fn crowd(listen: Listen) -> (Sim<Counts>, Vec<ClientId>) {
    let config = Config::max_connections(CROWD).with(|config| {
        // Until they are there.
        config.budgets.accepts = CROWD;
        config.budgets.work = usize::MAX;
        config.pending_limits.connections = Quota::Count(CROWD);
    });
    let mut sim = Sim::new(1, config, Counts::default());
    let addr = sim.listen(
        listen.with(|listen| listen.socket.backlog = CROWD as u32),
        |_: &mut Counts, _| Member,
    );
    let addr = addr.expect("a listener");
    let clients = (0..CROWD)
        .map(|_| sim.connect(addr).expect("room"))
        .collect();
    // Else all of them are looked at after each batch of events.
    sim.set_checks(false);
    sim.settle();
    sim.set_checks(true);
    assert_eq!(sim.stats().open, CROWD);
    let budgets = |config: &mut Config| config.budgets = Budgets::default();
    sim.control().reconfigure(budgets).expect("good");
    (sim, clients)
}

/// Steps until `done`; the most that `count` grew in one step.
#[track_caller]
fn steepest(sim: &mut Sim<Counts>, count: impl Fn(&Counts) -> usize) -> usize {
    let mut most = 0;
    for _ in 0..CROWD {
        let before = count(sim.app());
        if before == CROWD {
            return most;
        }
        sim.step();
        most = most.max(count(sim.app()) - before);
    }
    panic!("it has an end");
}

/// Answers each frame, and notes whose it was.
struct Noted;

impl Handler<Counts> for Noted {
    fn on_open(&mut self, cx: &mut Context<'_, Counts>) -> Outcome {
        cx.conn.set_timer(0, Duration::from_secs(5));
        Ok(())
    }

    fn on_frame(&mut self, cx: &mut Context<'_, Counts>, frame: &[u8]) -> Outcome {
        let id = cx.conn.id();
        cx.app.turns.push(id);
        cx.conn.send(frame)?;
        Ok(())
    }

    fn on_timer(&mut self, cx: &mut Context<'_, Counts>, _: u8) -> Outcome {
        cx.app.timers += 1;
        Ok(())
    }
}

const PEERS: usize = 1_000;
const EMPTY: [u8; 2] = [0; 2];
/// In one turn of a connection.
const FRAMES: usize = 64;
/// The work of a whole iteration, with what is kept for each kind of work.
const WORK: usize = 1 << 20;
const MOST: usize = WORK + 6 * WORK / 16;
/// Of a connection's turn beside its frames.
const TURN: usize = 24 << 10;

/// A server with a small budget for a whole iteration, and its peers.
fn busy(idle: Duration) -> (Sim<Counts>, Vec<ClientId>) {
    let config = Config::max_connections(PEERS + 1).with(|config| {
        config.budgets.work = WORK;
        config.budgets.read_bytes = 256 * FRAMES;
    });
    let mut sim = Sim::new(1, config, Counts::default());
    let listen = Listen::tcp("127.0.0.1:0", Framing::Packet2).with(|listen| {
        listen.conn.idle_timeout = idle;
        listen.conn.frame_timeout = idle;
        listen.socket.backlog = PEERS as u32 + 1;
    });
    let addr = sim
        .listen(listen, |_: &mut Counts, _| Noted)
        .expect("a listener");
    let clients = (0..PEERS)
        .map(|_| sim.connect(addr).expect("room"))
        .collect();
    sim.settle();
    (sim, clients)
}

/// Each peer sends many small frames: one budget holds for all of them.
#[test]
fn frames_of_all_peers_together() {
    let (mut sim, clients) = busy(Duration::from_secs(3600));
    let frames = 300;
    for &client in &clients {
        sim.send(client, &EMPTY.repeat(frames));
    }
    let (mut rounds, mut steps) = (HashMap::new(), 0);
    while sim.app().turns.len() < PEERS * frames {
        let before = sim.app().turns.len();
        sim.step();
        steps += 1;
        let served = sim.app().turns.get(before..).expect("no fewer").to_vec();
        // A frame and its answer; the last turn begins within the budget.
        let work = served.len() * 2 * (EMPTY.len() + 64);
        let turn = FRAMES * 2 * (EMPTY.len() + 64);
        assert!(work <= MOST + turn, "{work} in one iteration");
        // In turns: none has a second one before each has had its first.
        let mut last = None;
        for id in served {
            if last.replace(id) != Some(id) {
                *rounds.entry(id).or_insert(0) += 1;
            }
        }
        let most = rounds.values().max().copied().unwrap_or(0);
        let least = rounds.values().min().filter(|_| rounds.len() == PEERS);
        assert!(most <= least.map_or(1, |least| least + 1), "{rounds:?}");
        if sim.app().turns.len() < PEERS * frames {
            assert_eq!(sim.next_timeout(), Some(Duration::ZERO), "work is left");
        }
    }
    assert!(steps > 100, "{steps}");
    sim.settle();
    for client in clients {
        assert_eq!(sim.received(client), EMPTY.repeat(frames));
    }
}

/// Peers whose input waits for this server run into no timeout, and their timers fire in their turns.
#[test]
fn input_that_waits_for_the_budget_is_not_late() {
    let (mut sim, clients) = busy(Duration::from_secs(10));
    sim.leap(Duration::from_secs(9));
    for &client in &clients {
        sim.send(client, &EMPTY);
    }
    for _ in 0..PEERS {
        // The turns of most come after their deadlines.
        sim.leap_after_poll(Duration::from_millis(300));
        sim.step();
        if sim.app().turns.len() == PEERS {
            break;
        }
    }
    assert_eq!((sim.app().turns.len(), sim.stats().open), (PEERS, PEERS));
    sim.settle();
    assert_eq!(sim.app().timers, PEERS);
    // Silence ends them all the same.
    sim.advance(Duration::from_secs(21));
    assert_eq!(sim.stats().closed(CloseReason::IdleTimeout), PEERS as u64);
}

/// While peers flood it, the server accepts, runs commands and fires timers.
#[test]
fn a_flood_starves_no_other_work() {
    let (mut sim, clients) = busy(Duration::from_secs(3600));
    for &client in &clients {
        sim.send(client, &EMPTY.repeat(20_000));
    }
    sim.step();
    let addr = sim.control().listeners()[0].addr.as_tcp().expect("TCP");
    sim.connect(addr).expect("room");
    sim.handle()
        .post(|counts: &mut Counts, _| counts.drained += 1)
        .expect("room in the queue");
    sim.leap(Duration::from_secs(6));
    for _ in 0..3 {
        sim.step();
    }
    assert_eq!(sim.stats().accepted, PEERS as u64 + 1);
    assert_eq!(sim.app().drained, 1);
    // Of two rounds each: one for its input, one for its timer.
    for _ in 0..PEERS / 8 {
        sim.step();
    }
    assert_eq!(sim.app().timers, PEERS);
    assert_eq!(
        sim.next_timeout(),
        Some(Duration::ZERO),
        "the flood goes on"
    );
}

/// Accepts, timers and closes count too.
#[test]
fn every_kind_of_step_is_in_the_budget() {
    let config = Config::max_connections(PEERS).with(|config| {
        config.budgets.accepts = PEERS;
        config.budgets.work = WORK;
    });
    let mut sim = Sim::new(1, config, Counts::default());
    sim.set_descriptor_limit(2 * PEERS);
    for _ in 0..4 {
        let listen = Listen::tcp("127.0.0.1:0", Framing::Packet2)
            .with(|listen| listen.socket.backlog = PEERS as u32);
        let addr = sim.listen(listen, |_: &mut Counts, _| Noted).expect("room");
        for _ in 0..PEERS / 4 {
            sim.connect(addr).expect("room");
        }
    }
    let mut most = 0;
    for _ in 0..PEERS {
        let before = sim.stats().open;
        sim.step();
        most = most.max(sim.stats().open - before);
    }
    assert_eq!(sim.stats().open, PEERS);
    assert!(most <= MOST / TURN, "{most} accepted in one iteration");
    sim.leap(Duration::from_secs(6));
    let mut most = 0;
    while sim.app().timers < PEERS {
        let before = sim.app().timers;
        sim.step();
        most = most.max(sim.app().timers - before);
        assert!(sim.app().timers > before, "each iteration fires some");
    }
    assert!(most <= MOST / TURN, "{most} timers in one iteration");
    sim.control().drain(Duration::ZERO);
    let mut most = 0;
    for _ in 0..PEERS {
        let before = sim.stats().open;
        sim.step();
        most = most.max(before - sim.stats().open);
    }
    assert_eq!(sim.stats().open, 0);
    assert!(most <= MOST / TURN, "{most} closed in one iteration");
}

/// Kills pass a queue that is too long, some in each iteration.
#[test]
fn kills_that_are_queued_together() {
    let (mut sim, _) = crowd(Listen::tcp("127.0.0.1:0", Framing::Packet2));
    let handle = sim.handle();
    for info in sim.control().connections() {
        handle.kill(info.id).expect("room");
    }
    let most = steepest(&mut sim, |counts| counts.closed);
    assert!((1..=BATCH).contains(&most), "{most} in one iteration");
    assert_eq!(sim.stats().closed(CloseReason::Killed), CROWD as u64);
}

#[test]
fn timers_that_are_due_together() {
    let (mut sim, _) = crowd(Listen::tcp("127.0.0.1:0", Framing::Packet2).with(|listen| {
        listen.conn.idle_timeout = Duration::from_secs(10);
        listen.conn.linger_timeout = Duration::ZERO;
        listen.conn.linger_bytes = 0;
    }));
    sim.leap(Duration::from_secs(11));
    let most = steepest(&mut sim, |counts| counts.closed);
    assert!((1..=BATCH).contains(&most), "{most} in one turn");
    assert_eq!(sim.stats().closed(CloseReason::IdleTimeout), CROWD as u64);
}

#[test]
fn a_drain_and_its_deadline() {
    let (mut sim, _) = crowd(Listen::tcp("127.0.0.1:0", Framing::Packet2));
    sim.control().drain(Duration::from_secs(60));
    let most = steepest(&mut sim, |counts| counts.drained);
    assert!((1..=BATCH).contains(&most), "{most} in one turn");
    assert_eq!(sim.app().closed, 0);
    sim.leap(Duration::from_secs(61));
    let most = steepest(&mut sim, |counts| counts.closed);
    assert!((1..=2 * BATCH).contains(&most), "{most} in one turn");
    sim.settle();
    let report = sim.drain_report().expect("it is over");
    assert_eq!((report.forced, report.ended), (CROWD, 0));
}

#[test]
fn clients_that_go_together() {
    let (mut sim, clients) = crowd(Listen::tcp("127.0.0.1:0", Framing::Packet2));
    for client in clients {
        sim.reset(client);
    }
    let most = steepest(&mut sim, |counts| counts.closed);
    assert!((1..=BATCH).contains(&most), "{most} in one turn");
    assert_eq!(sim.stats().closed(CloseReason::Reset), CROWD as u64);
}

/// The kernel had no memory for a write: it is repeated soon, however often the connection waits for
/// its turn at that time.
#[test]
fn a_retry_comes_due_while_its_connection_is_queued() {
    let config = Config::new().with(|config| {
        config.budgets.work = 1;
        config.budgets.read_bytes = 1;
    });
    let mut sim = Sim::new(1, config, Counts::default());
    let listen = Listen::tcp("127.0.0.1:0", Framing::Packet2);
    let addr = sim
        .listen(listen, |_: &mut Counts, _| Member)
        .expect("a listener");
    let [busy, other] = [(); 2].map(|()| sim.connect(addr).expect("room"));
    sim.settle();
    let id = sim.control().connections()[1].id;
    let handle = sim.handle();
    sim.add_fault(Scripted {
        call: Call::Write,
        after: 0,
        errno: libc::ENOBUFS,
    });
    handle.send(id, *b"first").expect("room");
    sim.step();
    sim.step();
    sim.send(busy, &EMPTY.repeat(10_000));
    for _ in 0..100 {
        handle.send(id, *b"more").expect("room");
        sim.leap(Duration::from_millis(20));
        sim.step();
    }
    assert_eq!(sim.next_timeout(), Some(Duration::ZERO), "one is busy");
    assert!(!sim.received(other).is_empty());
}

/// Connections that are open come before handshakes, which have their share all the same.
#[cfg(feature = "tls")]
#[test]
fn a_flood_of_handshakes_leaves_most_of_the_work_to_open_connections() {
    const FLOOD: usize = 50;
    let (mut sim, clients) = busy(Duration::from_secs(3600));
    let tls = Listen::tcp("127.0.0.1:0", Framing::Packet2).tls(kit::sim_tls::server_config());
    let addr = sim.listen(tls, |_: &mut Counts, _| Noted).expect("room");
    sim.control()
        .reconfigure(|config| config.max_connections = PEERS + FLOOD)
        .expect("changed");
    let flood: Vec<_> = (0..FLOOD)
        .map(|_| sim.connect(addr).expect("room"))
        .collect();
    sim.settle();
    for &client in &clients {
        sim.send(client, &EMPTY.repeat(1000));
    }
    for &client in &flood {
        // The head of a long record that never ends.
        sim.send(client, &[0x16, 3, 1, 0x3F, 0xFF]);
    }
    sim.step();
    for _ in 0..20 {
        let before = (sim.app().turns.len(), sim.stats().traffic.bytes_in);
        for &client in &flood {
            sim.send(client, b"\x01");
        }
        sim.step();
        let frames = sim.app().turns.len() - before.0;
        assert!(frames / FRAMES > WORK / TURN / 2, "{frames}");
        let frame_bytes = (frames * EMPTY.len()) as u64;
        assert!(
            sim.stats().traffic.bytes_in - before.1 > frame_bytes,
            "a handshake"
        );
    }
}

/// Frames that were sent before the end of the server pass a queue that is too long with it, some in
/// each iteration.
#[test]
fn frames_that_pass_with_the_end() {
    let (mut sim, clients) = crowd(Listen::tcp("127.0.0.1:0", Framing::Packet2));
    let handle = sim.handle();
    for info in sim.control().connections() {
        handle.post(|_, _| ()).expect("room");
        handle.send(info.id, *b"x").expect("room");
    }
    handle.drain(Duration::ZERO).expect("room");
    let (mut sent, mut most, mut steps) = (0, 0, 0);
    while sim.stats().open > 0 {
        sim.step();
        steps += 1;
        let frames = sim.stats().traffic.frames_out as usize;
        most = most.max(frames - sent);
        sent = frames;
        assert!(steps < CROWD, "it has an end");
    }
    assert_eq!((sent, clients.len()), (CROWD, CROWD));
    assert!((1..=2 * BATCH).contains(&most), "{most} in one iteration");
}

/// Kills, and frames before a stop, pass other commands: a bounded number, whatever the work may be.
#[test]
fn commands_that_pass_others_are_counted() {
    const COMMANDS: usize = 64;
    const PASSING: usize = 1_024;
    let config = Config::new().with(|config| {
        config.budgets.work = usize::MAX;
        config.budgets.commands = COMMANDS;
    });
    let mut sim = Sim::new(1, config, Counts::default());
    let listen = Listen::tcp("127.0.0.1:0", Framing::Packet2);
    let addr = sim.listen(listen, |_: &mut Counts, _| Member);
    sim.connect(addr.expect("a listener")).expect("room");
    sim.settle();
    let (id, handle) = (sim.control().connections()[0].id, sim.handle());
    for number in 0..3 * CROWD {
        let queued = match number / CROWD {
            0 => handle.kill(id),
            1 => handle.send(id, *b"too late"),
            _ => handle.notify(id, ()),
        };
        queued.expect("room");
    }
    handle.stop().expect("it lives");
    let mut done = 0;
    while done + 1 < 3 * CROWD {
        sim.step();
        let undelivered = sim.stats().undeliverable as usize;
        assert!(undelivered > done, "it goes on");
        assert!(undelivered - done <= COMMANDS + PASSING, "{undelivered}");
        done = undelivered;
    }
}
