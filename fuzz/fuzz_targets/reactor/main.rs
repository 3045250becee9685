//! The whole reactor on the simulated kernel: a configuration, handlers that do all that handlers can, and a script.
//!
//! After every turn the simulator checks the server's invariants. Here the handlers check how they are called, the
//! clients what they get, and at the end everything must be at rest.
#![no_main]

mod framing;
#[path = "../script.rs"]
mod script;
mod setup;
mod subject;

use std::fmt;
use std::net::SocketAddr;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::time::Duration;

use libfuzzer_sys::arbitrary::{self, Arbitrary, Unstructured};
use libfuzzer_sys::fuzz_target;
use portcullis::sim::{ClientId, ClientState, Faults, Op, Script, Sim};
use portcullis::{CloseReason, HandleError, ListenerState, State};

use script::Lines;
use setup::Setup;
use subject::{Action, App};

/// The most that handlers do of themselves in one world: a timer that sets itself again must end some time.
const ACTIONS: usize = 256;

/// The most reads that clients cause with what they send in one world: more take seconds.
const READS: usize = 10_000;

struct Plan {
    setup: Setup,
    actions: Vec<Action>,
    script: Script,
}

impl<'a> Arbitrary<'a> for Plan {
    fn arbitrary(input: &mut Unstructured<'a>) -> arbitrary::Result<Self> {
        Ok(Self {
            setup: input.arbitrary()?,
            actions: input.arbitrary()?,
            script: script::script(input)?,
        })
    }
}

impl fmt::Debug for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            setup,
            actions,
            script,
        } = self;
        write!(f, "{setup:#?}\n{actions:?}\n{:?}", Lines(script))
    }
}

struct Client {
    /// What is still to come before anything else.
    header: &'static [u8],
    sent: Vec<u8>,
    received: Vec<u8>,
    finished: bool,
    /// What it gets back is what it sent, or the beginning of it.
    echoed: bool,
}

struct World<'a> {
    plan: &'a Plan,
    sim: Sim<App>,
    addrs: [SocketAddr; 2],
    clients: Vec<Client>,
    ids: Vec<ClientId>,
    /// How many bytes the clients may still send.
    room: usize,
}

fuzz_target!(init: subject::log_without_a_reader(), |plan: Plan| {
    let mut world = World::new(&plan);
    world.play();
    if !plan.setup.is_abrupt() {
        world.come_to_rest();
        world.check_books();
        world.check_clients();
    }
    let handle = world.sim.handle();
    // A handler's destructor may panic as planned; what panics otherwise does not come back.
    let _ = catch_unwind(AssertUnwindSafe(|| drop(world)));
    assert_eq!(handle.drain(Duration::ZERO), Err(HandleError::ServerGone));
});

impl<'a> World<'a> {
    fn new(plan: &'a Plan) -> Self {
        let app = App::new(plan.actions.clone(), ACTIONS);
        let config = plan.setup.config();
        let room = config.budgets.read_bytes.saturating_mul(READS);
        let mut sim = Sim::new(u64::from(plan.setup.seed), config, app);
        // Small frames take the way of large ones too.
        sim.set_large_frame(128);
        let handle = sim.handle();
        sim.app_mut().handle = Some(handle);
        let work = sim.work();
        sim.app_mut().work = Some(Box::new(work));
        let addrs = [0, 1].map(|which| {
            let test_service = plan.setup.test_service();
            sim.listen_with(plan.setup.listen(which), test_service)
                .expect("a listener in an empty world")
        });
        sim.set_faults(plan.setup.faults());
        Self {
            plan,
            sim,
            addrs,
            clients: Vec::new(),
            ids: Vec::new(),
            room,
        }
    }

    fn play(&mut self) {
        // One for each listener: without clients there is nothing to see.
        self.connect();
        self.connect();
        for op in &self.plan.script.ops {
            match op {
                Op::Connect => self.connect(),
                Op::Send { client, bytes } => self.send(*client, bytes),
                op => {
                    match op {
                        Op::Finish { client } => {
                            self.with(*client, |client| client.finished = true)
                        }
                        // The server decides which connection it reaches.
                        Op::Push { .. } => self
                            .clients
                            .iter_mut()
                            .for_each(|client| client.echoed = false),
                        _ => {}
                    }
                    let played = self.sim.try_perform(self.addrs[0], &self.ids, op);
                    played.unwrap_or_else(|violation| panic!("{violation}"));
                }
            }
        }
    }

    /// Clients come to the two listeners in turn.
    fn connect(&mut self) {
        let which = self.ids.len() % 2;
        if let Some(id) = self.sim.connect(self.addrs[which]) {
            self.ids.push(id);
            let [now, header] = self.plan.setup.header(which);
            self.sim.send(id, now);
            self.clients.push(Client {
                header,
                sent: Vec::new(),
                received: Vec::new(),
                finished: false,
                echoed: self.plan.setup.is_wire_its_own_echo(which)
                    && !self.plan.actions.iter().any(Action::talks),
            });
        }
    }

    fn send(&mut self, client: u16, bytes: &[u8]) {
        let Some(at) = usize::from(client).checked_rem(self.ids.len()) else {
            return;
        };
        let wire = self.plan.setup.wire(at % 2, bytes);
        if wire.len() > self.room {
            return;
        }
        self.room -= wire.len();
        let client = &mut self.clients[at];
        self.sim
            .send(self.ids[at], std::mem::take(&mut client.header));
        self.sim.send(self.ids[at], &wire);
        if !client.finished {
            client.sent.extend_from_slice(&wire);
        }
    }

    fn with(&mut self, client: u16, change: impl FnOnce(&mut Client)) {
        if let Some(at) = usize::from(client).checked_rem(self.ids.len()) {
            change(&mut self.clients[at]);
        }
    }

    /// Faults end, clients read, time passes, the server drains: every connection must be gone, and
    /// nothing buffered.
    fn come_to_rest(&mut self) {
        self.sim.set_faults(Faults::none());
        self.sim.set_descriptor_limit(usize::MAX);
        for &id in &self.ids {
            self.sim.set_reading(id, true);
        }
        self.sim.advance(Duration::from_secs(120));
        self.check_awake();
        self.check_answered();
        self.sim.control().drain(Duration::from_secs(10));
        self.sim.advance(Duration::from_secs(60));
    }

    /// Descriptors are free again, and the server has noticed.
    fn check_awake(&mut self) {
        for listener in self.sim.control().listeners() {
            assert_ne!(listener.state, ListenerState::OutOfFds, "{}", listener.name);
        }
    }

    /// An echo that does nothing else has no pending output for long.
    fn check_answered(&mut self) {
        self.listen();
        if !self.plan.actions.is_empty() || self.plan.setup.limits_memory() {
            return;
        }
        for connection in self.sim.control().connections() {
            let at = self
                .ids
                .iter()
                .position(|&id| self.sim.client_addr(id) == connection.peer.as_tcp());
            let at = at.expect("a client of ours");
            let client = &self.clients[at];
            if client.echoed
                && connection.state == State::Open
                && self.plan.setup.sends_whole_frames(at % 2)
            {
                assert_eq!(
                    client.sent, client.received,
                    "{connection} has not answered"
                );
            }
        }
    }

    fn check_books(&mut self) {
        let left = self.sim.control().connections();
        assert!(left.is_empty(), "left: {left:?}");
        assert!(self.sim.drain_report().is_some(), "the drain does not end");
        assert_eq!(self.sim.descriptors(), 0, "descriptors are left");
        let (stats, app) = (self.sim.stats(), self.sim.app());
        let came = stats.accepted + stats.outgoing;
        assert_eq!((stats.open, came), (0, stats.closed_total()));
        assert_eq!(
            (stats.opened, stats.opened),
            (app.opened, app.reasons.len() as u64)
        );
        assert_eq!(
            came,
            stats.opened + app.failed_accepts.len() as u64 + app.failed_connects
        );
        assert!(app.live.is_empty(), "never closed: {:?}", app.live);
    }

    fn listen(&mut self) {
        for (&id, client) in self.ids.iter().zip(&mut self.clients) {
            client.received.extend(self.sim.received(id));
        }
    }

    fn check_clients(&mut self) {
        self.listen();
        for (at, (&id, client)) in self.ids.iter().zip(&self.clients).enumerate() {
            let received = &client.received;
            let addr = self.sim.client_addr(id).expect("it connected");
            let app = self.sim.app();
            if let Some(reason) = app.failed_accepts.get(&addr) {
                let farewell = setup::farewell(*reason);
                assert!(
                    farewell.starts_with(received),
                    "client {at}, {reason}: {received:?}"
                );
            } else if client.echoed {
                assert!(
                    client.sent.starts_with(received),
                    "client {at} sent {:?}, got {received:?}",
                    client.sent
                );
                let finished = app.reasons.get(&addr) == Some(&CloseReason::Finished);
                if finished && self.sim.state(id) == ClientState::Finished {
                    assert_eq!(client.sent, *received, "client {at} ended gracefully");
                }
            }
        }
    }
}
