//! A duration counts from the call that passes it, however long a callback, a job, an alarm or a
//! service has worked before. In virtual time.

use std::cell::RefCell;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use kit::net::local;
use portcullis::sim::{Answer, ClientId, ClientState, Sim};
use portcullis::{
    Alarm, AtCapacity, CloseReason, Closed, Config, Connect, Context, Framing, Handler, Listen,
    Outcome, Quota, Rate, Retry,
};

/// How long each callback works before it asks for [`SPAN`].
const WORK: Duration = Duration::from_secs(3);
const SPAN: Duration = Duration::from_secs(1);

type Work = Rc<dyn Fn(Duration)>;
/// The times at which something was asked for and happened.
type Times = Rc<RefCell<Vec<Duration>>>;

/// What a handler asks for after its work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wish {
    Timer,
    Close,
    Fail,
    Panic,
    Connect,
    Nothing,
}

#[derive(Clone)]
struct Works {
    work: Work,
    wish: Wish,
    times: Times,
}

impl Works {
    fn ask(&self, cx: &mut Context<'_>) -> Outcome {
        (self.work)(WORK);
        match self.wish {
            Wish::Nothing => {}
            Wish::Timer => cx.conn.set_timer(0, SPAN),
            Wish::Close => cx.conn.close(),
            Wish::Fail => return Err(portcullis::Close::because("as planned")),
            Wish::Panic => kit::planned::blow(),
            Wish::Connect => {
                let connect =
                    Connect::new(Framing::Packet2).with(|connect| connect.connect_timeout = SPAN);
                cx.conn.control().connect(silent(), connect, self.clone())?;
            }
        }
        Ok(())
    }
}

impl Handler for Works {
    fn on_frame(&mut self, cx: &mut Context<'_>, _: &[u8]) -> Outcome {
        self.ask(cx)
    }
    fn on_message(&mut self, cx: &mut Context<'_>, _: portcullis::Message) -> Outcome {
        self.ask(cx)
    }
    fn on_timer(&mut self, _: &mut Context<'_>, _: u8) -> Outcome {
        self.times.borrow_mut().push(Duration::ZERO);
        Ok(())
    }
    fn on_connect_failed(&mut self, _: &mut Context<'_>, _: &Closed) {
        self.times.borrow_mut().push(Duration::ZERO);
    }
}

fn silent() -> SocketAddr {
    "192.0.2.9:80".parse().expect("an address")
}

/// A world with one client whose handler works, and the times that its handler notes.
fn world(wish: Wish, mut listen: Listen) -> (Sim, ClientId, Times) {
    let mut sim = Sim::new(1, Config::new(), ());
    sim.remote(silent(), Answer::Silence);
    let works = Works {
        work: Rc::new(sim.work()),
        wish,
        times: Times::default(),
    };
    let times = Rc::clone(&works.times);
    listen.framing = Framing::Line;
    let addr = sim.listen(listen, move |_: &mut (), _| works.clone());
    let client = sim.connect(addr.expect("listens")).expect("a listener");
    sim.settle();
    (sim, client, times)
}

/// Happens [`SPAN`] after the work, and not before.
#[track_caller]
fn after_the_span(sim: &mut Sim, happened: impl Fn(&mut Sim) -> bool) {
    assert_eq!(sim.now(), WORK, "the work is done");
    sim.advance(SPAN - Duration::from_millis(1));
    assert!(!happened(sim), "early");
    sim.advance(Duration::from_millis(2));
    assert!(happened(sim), "late");
}

#[test]
fn a_timer_counts_from_the_call() {
    let (mut sim, client, times) = world(Wish::Timer, local());
    sim.send(client, b"go\n");
    sim.settle();
    after_the_span(&mut sim, |_| !times.borrow().is_empty());

    // From a message of another thread.
    let (mut sim, _, times) = world(Wish::Timer, local());
    let id = sim.control().connections()[0].id;
    sim.handle().notify(id, ()).expect("open");
    sim.settle();
    after_the_span(&mut sim, |_| !times.borrow().is_empty());
}

/// However the handler ends the connection.
#[test]
fn the_linger_timeout_counts_from_the_close() {
    for wish in [Wish::Close, Wish::Fail, Wish::Panic] {
        let listen = local().with(|listen| {
            listen.conn.linger_timeout = SPAN;
            listen.conn.linger_bytes = usize::MAX;
        });
        let (mut sim, client, _) = world(wish, listen);
        sim.send(client, b"go\n");
        sim.settle();
        assert_eq!(sim.state(client), ClientState::Finished, "{wish:?}");
        after_the_span(&mut sim, |sim| sim.stats().open == 0);
    }
}

#[test]
fn a_connect_timeout_counts_from_the_call() {
    let (mut sim, client, times) = world(Wish::Connect, local());
    sim.send(client, b"go\n");
    sim.settle();
    after_the_span(&mut sim, |_| !times.borrow().is_empty());
}

#[test]
fn a_retry_counts_from_the_call() {
    let (mut sim, _, times) = world(Wish::Timer, local());
    let (work, notes) = (sim.work(), Rc::clone(&times));
    sim.remote(silent(), Answer::Refuse);
    let works = Works {
        work: Rc::new(|_| ()),
        wish: Wish::Timer,
        times: notes,
    };
    work(WORK);
    let retry = Retry::new(2).first_delay(SPAN).jitter(0);
    let connect = Connect::new(Framing::Packet2).with(|connect| connect.retry = Some(retry));
    sim.control()
        .connect(silent(), connect, works)
        .expect("begun");
    after_the_span(&mut sim, |_| !times.borrow().is_empty());
}

/// From a job, an alarm's callback and a callback of a handler alike.
#[test]
fn a_drains_grace_counts_from_the_call() {
    struct Stays;
    impl Handler for Stays {
        fn on_frame(&mut self, _: &mut Context<'_>, _: &[u8]) -> Outcome {
            Ok(())
        }
        fn on_drain(&mut self, _: &mut Context<'_>) -> Outcome {
            Ok(())
        }
    }
    for from_alarm in [false, true] {
        let mut sim = Sim::new(1, Config::new(), ());
        let addr = sim.listen(local(), |_: &mut (), _| Stays).expect("listens");
        let work = sim.work();
        let drain = move |control: &mut portcullis::Control<'_>| {
            work(WORK);
            control.drain(SPAN);
        };
        if from_alarm {
            let alarm = Alarm::Connections(Quota::Count(1));
            let added = sim.control().on_alarm(
                alarm,
                Duration::from_secs(5),
                move |_: &mut (), control, _| drain(control),
            );
            added.expect("added");
        } else {
            sim.connect(addr).expect("a listener");
            sim.settle();
            let posted = sim.handle().post(move |_, control| drain(control));
            posted.expect("it runs");
        }
        if from_alarm {
            sim.connect(addr).expect("a listener");
        }
        sim.settle();
        after_the_span(&mut sim, |sim| sim.drain_report().is_some());
        assert_eq!(sim.drain_report().map(|report| report.forced), Some(1));
    }
}

/// A service that works takes nothing of its clients' time.
#[test]
fn a_connections_timeouts_count_from_its_services_answer() {
    let mut sim = Sim::new(1, Config::new(), ());
    let work = sim.work();
    let listen = local().with(|listen| listen.conn.idle_timeout = SPAN);
    let addr = sim.listen(listen, move |_: &mut (), _| {
        work(WORK);
        kit::net::Echo
    });
    sim.connect(addr.expect("listens")).expect("a listener");
    sim.settle();
    after_the_span(&mut sim, |sim| {
        sim.stats().closed(CloseReason::IdleTimeout)
            + sim
                .control()
                .connections()
                .iter()
                .filter(|info| info.state == portcullis::State::Closing)
                .count() as u64
            > 0
    });
}

/// A connection counts as idle, or is closed as such.
fn is_idle_over(sim: &mut Sim) -> bool {
    let conns = sim.control().connections();
    sim.stats().closed(CloseReason::IdleTimeout) > 0
        || conns
            .iter()
            .any(|info| info.state == portcullis::State::Closing)
}

/// The peer may have waited for the answer.
#[test]
fn the_idle_timeout_counts_from_a_callbacks_end() {
    let listen = local().with(|listen| listen.conn.idle_timeout = SPAN);
    let (mut sim, client, _) = world(Wish::Nothing, listen.clone());
    sim.send(client, b"go\n");
    sim.settle();
    after_the_span(&mut sim, is_idle_over);

    // Another connection's turn comes after it.
    let (mut sim, client, _) = world(Wish::Nothing, listen.clone());
    let port = sim.control().listeners()[0].addr.port().expect("a port");
    let addr = SocketAddr::from(([127, 0, 0, 1], port));
    sim.advance(SPAN / 2);
    sim.connect(addr).expect("a listener");
    sim.send(client, b"go\n");
    sim.settle();
    assert_eq!(sim.now(), SPAN / 2 + WORK);
    sim.advance(SPAN - Duration::from_millis(1));
    let conns = sim.control().connections();
    assert_eq!(conns.len(), 2, "{conns:?}");

    struct Greets(Work);
    impl Handler for Greets {
        fn on_open(&mut self, cx: &mut Context<'_>) -> Outcome {
            (self.0)(WORK);
            cx.conn.send(b"ready\n")?;
            Ok(())
        }
        fn on_frame(&mut self, _: &mut Context<'_>, _: &[u8]) -> Outcome {
            Ok(())
        }
    }
    let mut sim = Sim::new(1, Config::new(), ());
    let work: Work = Rc::new(sim.work());
    let addr = sim.listen(listen, move |_: &mut (), _| Greets(Rc::clone(&work)));
    sim.connect(addr.expect("listens")).expect("a listener");
    sim.settle();
    after_the_span(&mut sim, is_idle_over);
}

/// A framing whose maker works.
fn slow_framing(sim: &Sim) -> Framing {
    struct Lines;
    impl portcullis::Framer for Lines {
        fn decode(&mut self, _: &[u8]) -> Result<portcullis::Decoded, portcullis::FrameError> {
            Ok(portcullis::Decoded::More)
        }
    }
    let work = std::sync::Mutex::new(sim.work());
    Framing::custom(move || {
        work.lock().expect("no panic")(WORK);
        Lines
    })
}

#[test]
fn a_connections_timeouts_count_from_the_making_of_its_framer() {
    let mut sim = Sim::new(1, Config::new(), ());
    let listen = local().with(|listen| {
        listen.conn.idle_timeout = SPAN;
        listen.framing = slow_framing(&sim);
    });
    let addr = sim.listen(listen, |_: &mut (), _| kit::net::Echo);
    sim.connect(addr.expect("listens")).expect("a listener");
    sim.settle();
    after_the_span(&mut sim, is_idle_over);

    let (mut sim, _, times) = world(Wish::Timer, local());
    let works = Works {
        work: Rc::new(|_| ()),
        wish: Wish::Timer,
        times: Rc::clone(&times),
    };
    let connect = Connect::new(slow_framing(&sim)).with(|connect| connect.connect_timeout = SPAN);
    sim.control()
        .connect(silent(), connect, works)
        .expect("begun");
    after_the_span(&mut sim, |_| !times.borrow().is_empty());
}

/// A peer whose answer came while another connection's handler worked is not late; one that says
/// nothing has what was left of its time.
#[cfg(feature = "tls")]
#[test]
fn a_handshake_is_not_charged_for_work_beyond_its_deadline() {
    for speaks in [true, false] {
        let (mut sim, busy, _) = world(Wish::Nothing, local());
        let tls = local().with(|listen| {
            listen.conn.handshake_timeout = SPAN;
        });
        let tls = tls.tls(kit::sim_tls::server_config());
        let addr = sim
            .listen(tls, |_: &mut (), _| kit::net::Echo)
            .expect("listens");
        let client = sim.connect(addr).expect("a listener");
        sim.settle();
        sim.advance(SPAN / 4);
        sim.send(busy, b"go\n");
        sim.settle();
        assert_eq!(sim.now(), SPAN / 4 + WORK);
        let failed = |sim: &Sim| sim.stats().closed(CloseReason::HandshakeTimeout);
        assert_eq!(failed(&sim), 0, "its answer may be on its way");
        if speaks {
            kit::sim_tls::Client::new().shake(&mut sim, client);
            assert_eq!((sim.stats().pending, failed(&sim)), (0, 0));
        } else {
            sim.advance(SPAN * 3 / 4 - Duration::from_millis(1));
            assert_eq!(failed(&sim), 0, "early");
            sim.advance(Duration::from_millis(2));
            assert_eq!(failed(&sim), 1, "late");
        }
    }
}

/// Only input, or the opening, begins work for which the peer waits: the handler's own timer keeps no silent peer.
#[test]
fn work_in_a_timer_does_not_keep_an_idle_peer() {
    struct Ticks(Work);
    impl Handler for Ticks {
        fn on_open(&mut self, cx: &mut Context<'_>) -> Outcome {
            cx.conn.set_timer(0, SPAN);
            Ok(())
        }
        fn on_frame(&mut self, _: &mut Context<'_>, _: &[u8]) -> Outcome {
            Ok(())
        }
        fn on_timer(&mut self, cx: &mut Context<'_>, _: u8) -> Outcome {
            (self.0)(SPAN / 10);
            cx.conn.set_timer(0, SPAN);
            Ok(())
        }
    }

    let mut sim = Sim::new(1, Config::new(), ());
    let work: Work = Rc::new(sim.work());
    let listen = local().with(|listen| listen.conn.idle_timeout = 10 * SPAN);
    let addr = sim.listen(listen, move |_: &mut (), _| Ticks(Rc::clone(&work)));
    sim.connect(addr.expect("listens")).expect("a listener");
    sim.settle();
    sim.advance(12 * SPAN);
    assert!(is_idle_over(&mut sim));
}

/// What is asked after work is told as of then: ages, the time left, the time since an end or an alarm.
#[test]
fn ages_count_until_the_question() {
    struct Asks(Work, Times);
    impl Handler for Asks {
        fn on_frame(&mut self, cx: &mut Context<'_>, _: &[u8]) -> Outcome {
            (self.0)(WORK);
            let info = cx.conn.info();
            self.1.borrow_mut().extend(info.map(|info| info.age));
            Ok(())
        }
    }

    let mut sim = Sim::new(1, Config::new(), ());
    let (work, times): (Work, _) = (Rc::new(sim.work()), Times::default());
    let seen = Rc::clone(&times);
    let listen = local().with(|listen| listen.framing = Framing::Line);
    let addr = sim
        .listen(listen, move |_: &mut (), _| {
            Asks(Rc::clone(&work), Rc::clone(&seen))
        })
        .expect("listens");
    let (asks, ends) = (
        sim.connect(addr).expect("it listens"),
        sim.connect(addr).expect("it listens"),
    );
    let alarm = Alarm::Connections(Quota::Count(1));
    sim.control()
        .on_alarm(alarm, SPAN, |_, _, _| {})
        .expect("added");
    sim.settle();
    sim.send(asks, b"go\n");
    sim.settle();
    assert_eq!(*times.borrow(), [WORK]);
    sim.reset(ends);
    sim.settle();

    let work = sim.work();
    let (tell, told) = std::sync::mpsc::channel();
    let job = move |(): &mut (), control: &mut portcullis::Control<'_>| {
        work(WORK);
        let info = control.connections().remove(0);
        let spans = [
            info.age,
            info.idle,
            control.recent_closes().remove(0).ago,
            control.alarms().remove(0).since,
        ];
        let _ = tell.send(spans);
    };
    sim.handle().post(job).expect("there is room");
    sim.settle();
    let [age, idle, ago, since] = told.try_recv().expect("it ran");
    assert_eq!((age, ago, since), (2 * WORK, WORK, 2 * WORK));
    assert!(idle >= WORK, "{idle:?}");
}

/// Works when its connection opens, unless it is the first.
struct Opens(Work, bool);

impl Handler for Opens {
    fn on_open(&mut self, _: &mut Context<'_>) -> Outcome {
        if self.1 {
            (self.0)(WORK);
        }
        Ok(())
    }
    fn on_frame(&mut self, cx: &mut Context<'_>, frame: &[u8]) -> Outcome {
        cx.conn.send(frame)?;
        Ok(())
    }
}

/// Whether the client of two that connect together is served which is accepted behind the other's
/// work. `rests`: a silent client was accepted half a span before.
fn is_second_served(config: Config, listen: Listen, rests: bool) -> bool {
    let mut sim = Sim::new(1, config, ());
    let work: Work = Rc::new(sim.work());
    let mut is_first = rests;
    let service = move |_: &mut (), _| {
        let works = !std::mem::take(&mut is_first);
        Opens(Rc::clone(&work), works)
    };
    let addr = sim.listen(listen, service).expect("listens");
    if rests {
        sim.connect(addr).expect("it listens");
        sim.settle();
        sim.advance(SPAN / 2);
    }
    let clients = [(); 2].map(|()| sim.connect(addr).expect("it listens"));
    for client in clients {
        sim.send(client, b"\0\x02hi");
    }
    sim.settle();
    assert_eq!(sim.received(clients[0]), b"\0\x02hi");
    sim.received(clients[1]) == b"\0\x02hi"
}

/// Rates and the grace before an eviction.
#[test]
fn a_client_is_admitted_as_of_its_accept() {
    let rated = local().with(|listen| {
        listen.source_limits.rate = Some(Rate::per_second(1).burst(1));
    });
    assert!(is_second_served(Config::new(), rated, false), "a source");

    let refuses = AtCapacity::Refuse { farewell: vec![] };
    let crowded = local().with(|listen| listen.at_capacity = refuses.clone());
    let config = Config::max_connections(2).with(|config| config.pending_limits.grace = SPAN);
    assert!(is_second_served(config, crowded, true), "an eviction");

    let rated = local().with(|listen| {
        listen.accept_rate = Some(Rate::per_second(1).burst(1));
        listen.at_capacity = refuses;
    });
    assert!(is_second_served(Config::new(), rated, false), "a listener");
}
