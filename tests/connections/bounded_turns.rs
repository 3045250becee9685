//! However many connections come due, drain or end at once, one turn of the loop sees to a bounded number of them.

use std::time::Duration;

use portcullis::sim::{ClientId, Sim};
use portcullis::{CloseReason, Config, Context, Handler, Listen, Outcome, Quota};

const CROWD: usize = 5_000;
/// Of due timers, of told connections, of forced ends; each turn may also give as many turns from the ready list.
const BATCH: usize = 1_024;

#[derive(Default)]
struct Counts {
    drained: usize,
    closed: usize,
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
    let config = Config::new()
        .max_connections(CROWD)
        .pending_limits(|pending| pending.connections = Quota::Count(CROWD));
    let mut sim = Sim::new(1, config, Counts::default());
    let addr = sim.listen(
        listen.socket(|socket| socket.backlog = CROWD as u32),
        |_: &mut Counts, _| Member,
    );
    let addr = addr.expect("a listener");
    let clients = (0..CROWD)
        .map(|_| sim.connect(addr).expect("room"))
        .collect();
    sim.settle();
    assert_eq!(sim.stats().open, CROWD);
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

#[test]
fn timers_that_are_due_together() {
    let (mut sim, _) = crowd(Listen::tcp("127.0.0.1:0").conn(|conn| {
        conn.idle_timeout = Duration::from_secs(10);
        conn.linger_timeout = Duration::ZERO;
        conn.linger_bytes = 0;
    }));
    sim.leap(Duration::from_secs(11));
    let most = steepest(&mut sim, |counts| counts.closed);
    assert!((1..=BATCH).contains(&most), "{most} in one turn");
    assert_eq!(sim.stats().closed(CloseReason::IdleTimeout), CROWD as u64);
}

#[test]
fn a_drain_and_its_deadline() {
    let (mut sim, _) = crowd(Listen::tcp("127.0.0.1:0"));
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
    let (mut sim, clients) = crowd(Listen::tcp("127.0.0.1:0"));
    for client in clients {
        sim.reset(client);
    }
    let most = steepest(&mut sim, |counts| counts.closed);
    assert!((1..=BATCH).contains(&most), "{most} in one turn");
    assert_eq!(sim.stats().closed(CloseReason::Reset), CROWD as u64);
}
