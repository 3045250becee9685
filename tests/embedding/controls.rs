//! A callback reaches what `Control` offers, whichever callback it is. Calls of other handlers wait until it has returned.

use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use portcullis::sim::{ClientId, ClientState, Sim};
use portcullis::{
    Alarm, CloseReason, Closed, Config, ConnId, Context, Control, Framing, Handler, Listen,
    ListenerState, Message, Outcome, Quota,
};

const LINES: &str = "lines";

type Change = Rc<dyn Fn(&mut Control<'_, App>, ConnId, Option<ConnId>)>;

/// Applies `change` in one callback: that named by `at`.
struct App {
    at: &'static str,
    change: Change,
    /// The callback that runs. No other may begin.
    running: Option<&'static str>,
    seen: Vec<String>,
    members: Vec<ConnId>,
}

struct Member;

impl Member {
    fn call(cx: &mut Context<'_, App>, name: &'static str) {
        assert_eq!(cx.app.running.replace(name), None, "callbacks do not nest");
        let own = cx.conn.id();
        if name == "open" {
            cx.app.members.push(own);
        }
        let place = cx.app.members.iter().position(|&id| id == own);
        cx.app
            .seen
            .push(format!("{} {name}", place.expect("known")));
        // The second of two.
        if name == cx.app.at && place == Some(1) {
            let (change, other) = (Rc::clone(&cx.app.change), cx.app.members.first().copied());
            let mut control = cx.conn.control();
            change(&mut control, own, other);
            assert!(control.conn(own).is_some() || name == "close");
        }
        cx.app.running = None;
    }
}

impl Handler<App> for Member {
    fn on_open(&mut self, cx: &mut Context<'_, App>) -> Outcome {
        cx.conn.set_timer(1, Duration::from_secs(1));
        Self::call(cx, "open");
        Ok(())
    }

    fn on_frame(&mut self, cx: &mut Context<'_, App>, frame: &[u8]) -> Outcome {
        Self::call(cx, "frame");
        cx.conn.send(frame)?;
        Ok(())
    }

    fn on_finish(&mut self, cx: &mut Context<'_, App>) -> Outcome {
        Self::call(cx, "finish");
        cx.conn.close_after_input();
        Ok(())
    }

    fn on_timer(&mut self, cx: &mut Context<'_, App>, _: u8) -> Outcome {
        Self::call(cx, "timer");
        Ok(())
    }

    fn on_message(&mut self, cx: &mut Context<'_, App>, _: Message) -> Outcome {
        Self::call(cx, "message");
        Ok(())
    }

    fn on_drain(&mut self, cx: &mut Context<'_, App>) -> Outcome {
        Self::call(cx, "drain");
        cx.conn.close_after_input();
        Ok(())
    }

    fn on_close(&mut self, cx: &mut Context<'_, App>, closed: &Closed) {
        Self::call(cx, "close");
        cx.app.seen.push(closed.reason.to_string());
    }
}

/// Each callback but the one of a drain, and of `on_close` after it.
const CALLBACKS: [&str; 6] = ["open", "frame", "message", "timer", "finish", "close"];

/// Two clients, of which the second goes through every callback; `change` is made in the callback `at`.
fn world(
    at: &'static str,
    change: impl Fn(&mut Control<'_, App>, ConnId, Option<ConnId>) + 'static,
) -> (Sim<App>, SocketAddr, [ClientId; 2]) {
    let app = App {
        at,
        change: Rc::new(change),
        running: None,
        seen: Vec::new(),
        members: Vec::new(),
    };
    let mut sim = Sim::new(1, Config::new(), app);
    let listen = Listen::tcp("127.0.0.1:0", Framing::Line).name(LINES);
    let addr = sim.listen(listen, |_: &mut App, _| Member);
    let addr = addr.expect("a listener");
    let other = sim.connect(addr).expect("room");
    sim.settle();
    let client = sim.connect(addr).expect("room");
    sim.settle();
    let id = sim.app().members.get(1).copied().expect("it is open");
    sim.send(client, b"hello\n");
    sim.settle();
    if let Some(mut conn) = sim.control().conn(id) {
        let _ = conn.notify("a message");
    }
    sim.settle();
    sim.advance(Duration::from_secs(1));
    sim.finish(client);
    sim.settle();
    (sim, addr, [other, client])
}

fn reached(sim: &Sim<App>, at: &str) -> bool {
    sim.app().seen.contains(&format!("1 {at}"))
}

#[test]
fn every_callback_can_ask() {
    for at in CALLBACKS {
        let (sim, ..) = world(at, |control, own, other| {
            let connections = control.connections().len();
            assert!((1..=2).contains(&connections));
            assert_eq!(control.listener(LINES).expect("there").accepted, 2);
            let drawn = control.tree(9).to_string();
            assert!(drawn.contains(LINES), "{drawn}");
            assert_eq!(control.stats().accepted, 2);
            assert!(control.metrics().to_string().contains("portcullis"));
            assert!(control.config().max_connections > 1);
            let other = other.expect("the first");
            let mut peer = control.conn(other).expect("open");
            peer.send(format!("from {own}\n")).expect("room");
        });
        assert!(reached(&sim, at), "{at}");
        assert_eq!(sim.stats().panics, 0, "{at}");
    }
}

#[test]
fn a_kill_of_another_takes_effect_afterwards() {
    for at in CALLBACKS {
        let (mut sim, _, [other, _]) = world(at, |control, _, other| {
            assert!(control.kill(other.expect("the first")));
        });
        assert_eq!(sim.state(other), ClientState::Reset, "{at}");
        assert_eq!(sim.stats().closed(CloseReason::Killed), 1, "{at}");
        sim.settle();
        assert_eq!(sim.stats().panics, 0, "{at}: {:?}", sim.app().seen);
    }
}

#[test]
fn a_handler_kills_its_own_connection() {
    for at in CALLBACKS {
        let (sim, _, [_, client]) = world(at, |control, own, _| {
            // Once more does no harm.
            let _ = control.kill(own);
            let _ = control.kill(own);
        });
        let is_over = at == "close";
        let killed = sim.stats().closed(CloseReason::Killed);
        assert_eq!(
            (killed, sim.stats().panics),
            (u64::from(!is_over), 0),
            "{at}"
        );
        if !is_over {
            assert_eq!(sim.state(client), ClientState::Reset, "{at}");
        }
        let closes = sim.app().seen.iter().filter(|seen| *seen == "1 close");
        assert_eq!(closes.count(), 1, "{at}");
    }
}

#[test]
fn a_handler_closes_its_own_listener() {
    for at in CALLBACKS {
        let (mut sim, addr, [other, _]) = world(at, |control, _, _| {
            control.close_listener(LINES).expect("open");
            assert!(control.close_listener(LINES).is_err(), "it is closed");
        });
        assert!(sim.connect(addr).is_none(), "{at}: nothing listens");
        // Its connections stay.
        sim.send(other, b"still\n");
        sim.settle();
        assert_eq!(sim.received(other), b"still\n", "{at}");
        assert_eq!(sim.stats().panics, 0, "{at}");
    }
}

#[test]
fn a_handler_suspends_and_resumes_its_listener() {
    for at in CALLBACKS {
        let (mut sim, addr, _) = world(at, |control, _, _| {
            control.suspend(LINES).expect("open");
            let state = control.listener(LINES).expect("there").state;
            assert_eq!(state, ListenerState::Suspended);
        });
        let late = sim.connect(addr).expect("in the backlog");
        sim.settle();
        assert_eq!(sim.stats().accepted, 2, "{at}");
        sim.control().resume(LINES).expect("open");
        sim.send(late, b"hello\n");
        sim.settle();
        assert_eq!(sim.received(late), b"hello\n", "{at}");
    }
}

#[test]
fn a_handler_begins_a_drain() {
    for at in CALLBACKS {
        let (mut sim, addr, [other, _]) =
            world(at, |control, _, _| control.drain(Duration::from_secs(5)));
        sim.finish(other);
        sim.advance(Duration::from_secs(10));
        assert!(sim.connect(addr).is_none(), "{at}");
        let report = sim.drain_report().expect("a drain");
        assert_eq!(report.forced, 0, "{at}");
        let stats = sim.stats();
        assert_eq!(
            (stats.open, stats.panics),
            (0, 0),
            "{at}: {:?}",
            sim.app().seen
        );
    }
}

#[test]
fn a_handler_changes_options_and_alarms() {
    for at in CALLBACKS {
        let (mut sim, addr, _) = world(at, |control, _, _| {
            let lower = |config: &mut Config| config.max_connections = 2;
            control.reconfigure(lower).expect("an option");
            let limit = |listen: &mut Listen| listen.max_connections = Some(1);
            control
                .reconfigure_listener(LINES, limit)
                .expect("an option");
            control
                .ban("10.9.9.9", Duration::from_secs(9))
                .expect("an address");
            let crowd = Alarm::Connections(Quota::Count(1));
            let alarm = control.on_alarm(crowd, Duration::from_secs(1), |app: &mut App, _, _| {
                assert_eq!(app.running, None);
                app.seen.push("alarm".to_owned());
            });
            let gone = control.on_alarm(crowd, Duration::from_secs(1), |_, _, _| panic!("removed"));
            assert!(alarm.is_ok() && control.remove_alarm(gone.expect("an alarm")));
        });
        assert!(sim.app().seen.contains(&"alarm".to_owned()), "{at}");
        // The first one is the only one that the listener may have.
        let late = sim.connect(addr).expect("in the backlog");
        sim.advance(Duration::from_secs(60));
        assert_eq!(sim.received(late), b"", "{at}");
        assert_eq!(sim.stats().panics, 0, "{at}");
    }
}

#[test]
fn a_controls_of_controls_is_the_same() {
    let (sim, ..) = world("frame", |control, own, other| {
        let mut conn = control.conn(own).expect("its own");
        let mut again = conn.control();
        let mut peer = again.conn(other.expect("the first")).expect("open");
        assert!(peer.control().kill(own));
    });
    assert_eq!(sim.stats().closed(CloseReason::Killed), 1);
}

/// The last callback of an evicted connection begins a drain, while the newcomer has no slot yet.
#[test]
fn an_evicted_handler_begins_a_drain() {
    let drain: Change = Rc::new(|control, _, _| control.drain(Duration::from_secs(5)));
    let app = App {
        at: "close",
        change: drain,
        running: None,
        seen: Vec::new(),
        members: Vec::new(),
    };
    let mut sim = Sim::new(1, Config::max_connections(2), app);
    let listen = Listen::tcp("127.0.0.1:0", Framing::Line);
    let addr = sim
        .listen(listen, |_: &mut App, _| Member)
        .expect("a listener");
    let speaks = sim.connect(addr).expect("room");
    sim.send(speaks, b"hello\n");
    sim.settle();
    let _silent = sim.connect(addr).expect("room");
    sim.advance(Duration::from_secs(20));
    let _newcomer = sim.connect(addr).expect("in the backlog");
    sim.settle();
    assert_eq!(sim.stats().closed(CloseReason::Evicted), 1);
    sim.finish(speaks);
    sim.advance(Duration::from_secs(10));
    let report = sim.drain_report().expect("a drain");
    assert_eq!(report.ended + report.failed + report.forced, 3);
    assert_eq!(sim.stats().panics, 0);
}
