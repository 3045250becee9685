//! Errors, framers and jobs whose destructors panic, or call back: the user's code runs in
//! unexpected places.

use std::sync::mpsc;
use std::time::Duration;

use portcullis::sim::{Call, ClientId, ClientState, Scripted, Sim};
use portcullis::CloseReason::{Failed, Killed, Reset, Unregistered, WriteTimeout};
use portcullis::{
    AccessRules, CloseReason, Config, Context, Decoded, FrameBuf, FrameError, Framer, Framing,
    Handle, HandleError, Handler, Listen, Outcome, ProxyProtocol, Server,
};

use kit::planned::PanicOnDrop;

/// Raw, with a bomb in it or in its errors.
struct Loaded {
    _bomb: Option<PanicOnDrop>,
    refuses: bool,
}

impl Framer for Loaded {
    fn decode(&mut self, input: &[u8]) -> Result<Decoded, FrameError> {
        Ok(Decoded::Frame {
            payload: 0..input.len(),
            consumed: input.len(),
        })
    }

    fn header(&mut self, _: usize, _: &mut FrameBuf<'_>) -> Result<(), FrameError> {
        match self.refuses {
            true => Err(FrameError::new(PanicOnDrop)),
            false => Ok(()),
        }
    }
}

fn loaded(bomb: bool, refuses: bool) -> Framing {
    Framing::custom(move || Loaded {
        _bomb: bomb.then(|| PanicOnDrop),
        refuses,
    })
}

/// Answers, and fails on "fail".
struct Fails;

impl Handler for Fails {
    fn on_frame(&mut self, cx: &mut Context<'_>, frame: &[u8]) -> Outcome {
        cx.conn.send(frame)?;
        if frame == b"fail\n" {
            Err(PanicOnDrop)?;
        }
        Ok(())
    }
}

fn world(framing: Framing) -> (Sim, ClientId, std::net::SocketAddr) {
    let mut sim = Sim::new(1, Config::new(), ());
    let listen = Listen::tcp("127.0.0.1:0", framing);
    let addr = sim.listen(listen, |_: &mut (), _| Fails).expect("listen");
    let client = sim.connect(addr).expect("connected");
    (sim, client, addr)
}

/// The loop goes on, and serves the next client.
fn goes_on(sim: &mut Sim, addr: std::net::SocketAddr) {
    let client = sim.connect(addr).expect("connected");
    sim.send(client, b"still there\n");
    sim.settle();
    assert_eq!(sim.received(client), b"still there\n");
}

/// What was sent is lost after the handler has failed: the loss is the reason, and the handler's error is dropped last.
#[test]
fn an_error_is_dropped_whatever_overtakes_it() {
    type Overtake = fn(&mut Sim, ClientId);
    let cases: [(CloseReason, Overtake); 3] = [
        (Reset, |sim, client| sim.reset(client)),
        (WriteTimeout, |sim, _| {
            sim.advance(Duration::from_secs(3600))
        }),
        (Killed, |sim, _| {
            let id = sim.control().connections()[0].id;
            assert!(sim.control().kill(id));
        }),
    ];
    for (reason, overtake) in cases {
        let (mut sim, client, addr) = world(Framing::Line);
        sim.set_send_buffer(client, 1);
        sim.set_reading(client, false);
        sim.send(client, b"fail\n");
        sim.settle();
        overtake(&mut sim, client);
        sim.settle();
        assert_eq!(sim.stats().closed(reason), 1);
        assert_eq!(sim.stats().panics, 1);
        goes_on(&mut sim, addr);
    }
}

#[test]
fn a_framer_is_dropped_when_its_socket_cannot_be_registered() {
    let (mut sim, _, _) = world(loaded(true, false));
    sim.add_fault(Scripted {
        call: Call::Register,
        after: 0,
        errno: libc::ENOMEM,
    });
    sim.settle();
    assert_eq!(
        (sim.stats().closed(Unregistered), sim.stats().panics),
        (1, 1)
    );
}

#[test]
fn a_framer_is_dropped_with_its_connection() {
    let (mut sim, client, _) = world(loaded(true, false));
    sim.send(client, b"hello");
    sim.finish(client);
    sim.settle();
    assert_eq!(
        (sim.received(client), sim.state(client)),
        (b"hello".to_vec(), ClientState::Finished)
    );
    assert_eq!((sim.stats().open, sim.stats().panics), (0, 1));
}

/// The framer's error for a frame from another thread ends the connection, and is dropped with it.
#[test]
fn a_frame_that_the_framer_refuses_from_outside() {
    let (mut sim, client, addr) = world(loaded(false, true));
    sim.settle();
    let id = sim.control().connections()[0].id;
    sim.handle().send(id, *b"x").expect("alive");
    sim.settle();
    assert_eq!(sim.state(client), ClientState::Finished);
    sim.finish(client);
    sim.settle();
    let stats = sim.stats();
    assert_eq!(
        (stats.undeliverable, stats.closed(Failed), stats.panics),
        (1, 1, 1)
    );
    assert!(sim.connect(addr).is_some());
}

/// Everything of the user's goes with the server, and its panics stay inside: the owner of the server may be unwinding.
#[test]
fn a_server_that_is_dropped_takes_all_with_it() {
    struct Holds(Vec<PanicOnDrop>);
    impl Handler for Holds {
        fn on_frame(&mut self, _: &mut Context<'_>, _: &[u8]) -> Outcome {
            self.0.clear();
            Ok(())
        }
    }
    let (mut sim, _, _) = world(loaded(true, false));
    let bomb = PanicOnDrop;
    let listen = Listen::tcp("127.0.0.1:0", Framing::Packet2);
    let service = move |_: &mut (), _| {
        let _ = &bomb;
        Holds(vec![PanicOnDrop])
    };
    let addr = sim.listen(listen, service).expect("listen");
    sim.connect(addr).expect("connected");
    sim.settle();
    assert_eq!(sim.stats().open, 2);
    let handle = sim.handle();
    let bomb = PanicOnDrop;
    handle.post(move |(), _| drop(bomb)).expect("there is room");
    drop(sim);
    assert_eq!(handle.post(|(), _| {}), Err(HandleError::ServerGone));
}

/// Calls a handle when it goes.
struct Caller(Handle, mpsc::Sender<()>);

impl Drop for Caller {
    fn drop(&mut self) {
        let _ = self.0.post(|(), _| {});
        let _ = self.0.drain(Duration::ZERO);
        let _ = self.1.send(());
    }
}

/// A job that is refused is dropped where it may use the handle that refused it.
#[test]
fn a_refused_job_may_use_its_handle() {
    let (done, told) = mpsc::channel();
    let thread = std::thread::spawn(move || {
        let server: Server<()> =
            Server::new(Config::new().with(|config| config.queue_limits.commands = 1))
                .expect("server");
        let handle = server.handle();
        handle.post(|(), _| {}).expect("there is room");
        let caller = Caller(handle.clone(), done);
        let refused = handle.post(move |(), _| drop(caller));
        assert_eq!(refused, Err(HandleError::QueueFull));
    });
    told.recv_timeout(Duration::from_secs(20))
        .expect("no deadlock");
    thread.join().expect("no panic");
}

/// Messages that wait for their connections to open are dropped one by one when the server ends.
#[test]
fn messages_that_were_never_delivered_are_dropped_with_the_server() {
    let mut sim = Sim::new(1, Config::new(), ());
    let listen = Listen::tcp("127.0.0.1:0", Framing::Packet2).with(|listen| {
        listen.proxy_protocol = ProxyProtocol::Required;
        listen.trusted_proxies = Some(AccessRules::allow_all());
    });
    let addr = sim.listen(listen, |_: &mut (), _| Fails).expect("listen");
    for _ in 0..2 {
        sim.connect(addr).expect("connected");
    }
    sim.settle();
    let handle = sim.handle();
    for info in sim.control().connections() {
        handle.notify(info.id, PanicOnDrop).expect("alive");
        handle.notify(info.id, PanicOnDrop).expect("alive");
    }
    sim.settle();
    assert_eq!(sim.stats().undeliverable, 0, "they wait");
    drop(sim);
    assert_eq!(handle.stats().undeliverable, 4);
}

/// The options of before go last, when the change is complete, within the loop and outside of it.
#[test]
fn a_change_is_complete_though_the_options_of_before_panic() {
    for from_job in [false, true] {
        let mut sim = Sim::new(1, Config::new(), ());
        let bomb = std::sync::Arc::new(PanicOnDrop);
        let framing = Framing::custom(move || {
            let _ = &bomb;
            loaded_framer()
        });
        let listen = Listen::tcp("127.0.0.1:0", framing).name("it");
        let addr = sim.listen(listen, |_: &mut (), _| Fails).expect("listen");
        let change = |control: &mut portcullis::Control<'_>| {
            let change = |listen: &mut Listen| {
                listen.framing = Framing::Line;
                listen.max_connections = Some(1);
            };
            control.reconfigure_listener("it", change).expect("valid");
        };
        if from_job {
            let posted = sim.handle().post(move |(), control| change(control));
            posted.expect("there is room");
        } else {
            change(&mut sim.control());
        }
        sim.settle();
        assert_eq!(sim.stats().panics, 1);
        // The limit has its candidates: a silent connection makes room.
        let silent = sim.connect(addr).expect("connected");
        sim.advance(Duration::from_secs(2));
        let next = sim.connect(addr).expect("connected");
        sim.send(next, b"hello\n");
        sim.settle();
        assert_eq!(sim.received(next), b"hello\n");
        assert_ne!(sim.state(silent), ClientState::Connected);
    }
}

fn loaded_framer() -> Loaded {
    Loaded {
        _bomb: None,
        refuses: false,
    }
}
