//! Worlds drawn from seeds: a server, clients, and everything that can go wrong between them.
//!
//! Each seed draws its own configuration, handler temper, script and faults. The script is played with faults, then
//! faults end and everything must come to rest. After every turn the simulator checks the server's invariants; here
//! the clients check what they get: a prefix of what an honest echo would say, and all of it if the end was graceful.
#![allow(dead_code)] // the example and the test each use their part

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::SocketAddr;
use std::time::Duration;

use portcullis::sim::{Call, ClientId, ClientState, Faults, Op, Random, Script, Sim};
use portcullis::{
    AtCapacity, CloseReason, Closed, Config, Context, Framing, Handler, Listen, Message, Outcome, Peer, State,
};

#[cfg(feature = "tls")]
#[path = "sim_tls.rs"]
pub mod sim_tls;

/// A world before it begins.
#[derive(Clone, Debug)]
pub struct Plan {
    pub seed: u64,
    setup: Setup,
    faults: Faults,
    script: Script,
}

#[derive(Clone, Debug)]
struct Setup {
    framing: Framing,
    tls: bool,
    temper: Temper,
    cap: usize,
    refuse: bool,
    watermarks: (usize, usize, usize),
    budgets: (usize, usize, usize),
    timeouts: [u64; 5],
    max_frame: usize,
}

/// What kind of handler there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Temper {
    /// Sends every frame back.
    Echo,
    /// Pauses after each frame, and goes on by timer.
    Pausing,
    /// Closes after a few frames.
    Brief,
    /// Sends to its neighbours, kills and closes them, from every callback.
    Meddling,
    /// Panics now and then, in every callback.
    Panicking,
    /// Changes its framing in the middle.
    Shifting,
    /// Pauses, changes framing while paused, resumes by timer.
    Starttls,
}

const TEMPERS: [Temper; 7] = [
    Temper::Echo,
    Temper::Pausing,
    Temper::Brief,
    Temper::Meddling,
    Temper::Panicking,
    Temper::Shifting,
    Temper::Starttls,
];

/// What a world was like.
#[derive(Debug, Default)]
pub struct Report {
    pub events: u64,
    pub turns: u64,
    pub hash: u64,
    pub connections: u64,
    pub reasons: BTreeMap<CloseReason, u64>,
    /// Which errors hit which calls in which state.
    pub cells: BTreeSet<(String, Call, i32)>,
    pub trace: Vec<String>,
}

/// A world that broke.
#[derive(Debug)]
pub struct Failure {
    pub what: String,
    pub trace: Vec<String>,
}

/// What the handlers of one world leave behind.
#[derive(Debug, Default)]
struct App {
    open: HashMap<SocketAddr, usize>,
    reasons: HashMap<SocketAddr, Vec<CloseReason>>,
    unopened: usize,
    members: Vec<portcullis::ConnId>,
    busy: bool,
    fault: Option<String>,
}

struct Subject {
    temper: Temper,
    peer: SocketAddr,
    frames: usize,
    random: Random,
    closed: bool,
}

impl Subject {
    /// Every callback begins with this: none is entered from inside another, none comes after the end.
    fn enter(&mut self, cx: &mut Context<'_, App>) {
        if std::mem::replace(&mut cx.app.busy, true) {
            cx.app.fault = Some("a callback was entered from inside another".to_owned());
        }
        if self.closed {
            cx.app.fault = Some("a callback came after on_close".to_owned());
        }
        if self.temper == Temper::Meddling && self.random.chance(100) {
            self.meddle(cx);
        }
        // Before the panic: what a crash leaves behind must not look like a callback that still runs.
        cx.app.busy = false;
        if self.temper == Temper::Panicking && self.random.chance(30) {
            std::panic::panic_any("as planned");
        }
    }

    fn meddle(&mut self, cx: &mut Context<'_, App>) {
        let Some(&other) = self.random.pick(&cx.app.members) else {
            return;
        };
        let action = self.random.below(8);
        if let Some(mut neighbour) = cx.conn.peer(other) {
            match action {
                0 => neighbour.close(),
                1 => neighbour.abort(),
                2 => neighbour.pause(),
                3 => neighbour.resume(),
                4 => neighbour.set_timer(9, Duration::from_millis(5)),
                5 => neighbour.close_after_input(),
                // It may be closing, or full: both are results.
                _ => drop(neighbour.send(b"meddling")),
            }
        }
    }
}

impl Handler<App> for Subject {
    fn on_open(&mut self, cx: &mut Context<'_, App>) -> Outcome {
        *cx.app.open.entry(self.peer).or_default() += 1;
        cx.app.members.push(cx.conn.id());
        self.enter(cx);
        Ok(())
    }

    fn on_frame(&mut self, cx: &mut Context<'_, App>, frame: &[u8]) -> Outcome {
        self.enter(cx);
        self.frames += 1;
        cx.conn.send(frame)?;
        match self.temper {
            Temper::Pausing => {
                cx.conn.pause();
                cx.conn
                    .set_timer(1, Duration::from_millis(self.random.below(20) as u64));
            }
            Temper::Starttls if self.frames == 1 => {
                cx.conn.pause();
                cx.conn.set_timer(1, Duration::from_millis(3));
            }
            Temper::Brief if self.frames >= 3 => cx.conn.close(),
            Temper::Shifting if self.frames == 2 => cx.conn.set_framing(&Framing::Raw),
            _ => {}
        }
        Ok(())
    }

    fn on_finish(&mut self, cx: &mut Context<'_, App>) -> Outcome {
        self.enter(cx);
        cx.conn.close();
        Ok(())
    }

    fn on_writable(&mut self, cx: &mut Context<'_, App>) -> Outcome {
        self.enter(cx);
        Ok(())
    }

    fn on_timer(&mut self, cx: &mut Context<'_, App>, _key: u8) -> Outcome {
        self.enter(cx);
        if self.temper == Temper::Starttls {
            let framings = [
                Framing::Raw,
                Framing::Packet1,
                Framing::Line,
                Framing::Packet4,
                Framing::custom(|| Five),
            ];
            cx.conn.set_framing(&framings[self.random.below(5)]);
            if self.random.chance(500) {
                let _ = cx.conn.send(b"x");
            }
        }
        cx.conn.resume();
        Ok(())
    }

    fn on_message(&mut self, cx: &mut Context<'_, App>, _message: Message) -> Outcome {
        self.enter(cx);
        Ok(())
    }

    fn on_drain(&mut self, cx: &mut Context<'_, App>) -> Outcome {
        self.enter(cx);
        cx.conn.close_after_input();
        Ok(())
    }

    fn on_close(&mut self, cx: &mut Context<'_, App>, closed: &Closed) {
        let id = cx.conn.id();
        cx.app.members.retain(|&member| member != id);
        cx.app.reasons.entry(self.peer).or_default().push(closed.reason);
        self.enter(cx);
        self.closed = true;
    }
}

struct Doorkeeper {
    temper: Temper,
    random: Random,
}

impl portcullis::Service<App> for Doorkeeper {
    fn accept(&mut self, _: &mut App, peer: Peer) -> Result<Box<dyn Handler<App>>, portcullis::Refuse> {
        Ok(Box::new(Subject {
            temper: self.temper,
            peer: peer.addr,
            frames: 0,
            random: Random::new(self.random.bits()),
            closed: false,
        }))
    }

    fn on_unopened(&mut self, app: &mut App, _: &Peer, _: &Closed) {
        app.unopened += 1;
    }
}

/// A client, honest but for what the script makes it do.
struct Speaker {
    id: ClientId,
    /// What an honest echo answers to all that this client has sent.
    expected: Vec<u8>,
    received: Vec<u8>,
    finished: bool,
    honest: bool,
    #[cfg(feature = "tls")]
    tls: Option<sim_tls::Client>,
}

impl Plan {
    /// The world of this seed.
    pub fn draw(seed: u64, tls: bool) -> Self {
        let mut random = Random::new(seed);
        let framing = [
            Framing::Raw,
            Framing::Packet1,
            Framing::Packet2,
            Framing::Packet4,
            Framing::Line,
            Framing::custom(|| Five),
            Framing::Delimited(b'e'),
        ][random.below(7)]
        .clone();
        let high = [1, 2, 3, 17, random.between(2, 4000)][random.below(5)];
        let setup = Setup {
            framing,
            tls: tls && random.chance(400),
            temper: if random.chance(250) {
                Temper::Echo
            } else {
                TEMPERS[random.below(TEMPERS.len())]
            },
            cap: random.between(0, 8),
            refuse: random.chance(300),
            watermarks: (
                random.below(high),
                high,
                high + [0, 1, random.below(4000)][random.below(3)],
            ),
            budgets: (
                random.between(1, 3),
                random.between(1, 2),
                [1, 64, random.between(1, 4000)][random.below(3)],
            ),
            timeouts: [(); 5].map(|()| [1, 2, 10, random.between(1, 5_000) as u64, u64::MAX][random.below(5)]),
            max_frame: random.between(8, 255),
        };
        let faults = if random.chance(200) {
            Faults::none()
        } else {
            Faults::swarm(&mut random)
        };
        let length = random.between(5, 150);
        let ops = (0..length).map(|_| draw_op(&mut random)).collect();
        Self {
            seed,
            setup,
            faults,
            script: Script { ops },
        }
    }

    /// Plays it.
    pub fn run(&self, keep_trace: bool) -> Result<Report, Failure> {
        let mut world = World::new(self);
        if keep_trace {
            world.sim.keep_trace();
        }
        let outcome = world.play(self);
        let trace = world.sim.take_trace();
        match outcome {
            Err(what) => Err(Failure { what, trace }),
            Ok(()) => {
                let stats = world.sim.stats();
                Ok(Report {
                    events: world.sim.events(),
                    turns: stats.turns,
                    hash: world.sim.trace_hash(),
                    connections: stats.accepted,
                    reasons: stats.closed_by_reason().collect(),
                    cells: world.cells,
                    trace,
                })
            }
        }
    }

    /// The smallest world that can be found that still breaks: fewer ops, then fewer kinds of faults.
    pub fn shrink(&self) -> Self {
        let mut smallest = self.clone();
        let fails = |plan: &Self| plan.run(false).is_err();
        let quiet: [fn(&mut Faults); 10] = [
            |faults| faults.errors = 0,
            |faults| faults.short_reads = 0,
            |faults| faults.short_writes = 0,
            |faults| faults.spurious_events = 0,
            |faults| faults.late_events = 0,
            |faults| faults.reordered = 0,
            |faults| faults.duplicated = 0,
            |faults| faults.clock_leaps = 0,
            |faults| faults.full_batches = 0,
            |faults| faults.famines = 0,
        ];
        for silence in quiet {
            let mut quieter = smallest.clone();
            silence(&mut quieter.faults);
            if fails(&quieter) {
                smallest = quieter;
            }
        }
        smallest.script = smallest.script.clone().shrink(|script| {
            let shorter = Self {
                script: script.clone(),
                ..smallest.clone()
            };
            fails(&shorter)
        });
        smallest
    }
}

fn draw_op(random: &mut Random) -> Op {
    let client = random.below(256) as u8;
    let connection = client;
    match random.below(100) {
        0..=14 => Op::Connect,
        // The bytes are a number of frames; the world makes them.
        15..=54 => Op::Send {
            client,
            bytes: vec![0; random.between(1, 12)],
        },
        55..=59 => Op::Finish { client },
        60..=61 => Op::Reset { client },
        62..=65 => Op::Read {
            client,
            on: random.chance(500),
        },
        66..=67 => Op::SendBuffer {
            client,
            bytes: random.between(1, 2000) as u16,
        },
        68..=79 => Op::Step,
        80..=87 => Op::Advance {
            millis: [1, 10, 100, 1000, 6000][random.below(5)],
        },
        88..=89 => Op::Fail {
            call: random.below(256) as u8,
            after: random.below(4) as u8,
            error: random.below(256) as u8,
        },
        90..=91 => Op::Descriptors {
            more: [0, 1, 2, 255][random.below(4)],
        },
        92 => Op::Kill { connection },
        93..=94 => Op::Push {
            connection,
            frame: Vec::new(),
        },
        95 => Op::Notify { connection },
        96..=97 => Op::Cap {
            connections: random.below(10) as u8,
        },
        98 => Op::Suspend { on: random.chance(500) },
        _ => Op::Drain {
            millis: random.between(1, 3000) as u16,
        },
    }
}

struct World {
    sim: Sim<App>,
    addr: SocketAddr,
    speakers: Vec<Speaker>,
    random: Random,
    cells: BTreeSet<(String, Call, i32)>,
    /// Other handlers or threads send to connections too, so that what clients get cannot be foretold.
    crowded: bool,
}

impl World {
    fn new(plan: &Plan) -> Self {
        let setup = &plan.setup;
        let [handshake, frame, idle, write, linger] = setup.timeouts.map(|ms| {
            if ms == u64::MAX {
                Duration::MAX
            } else {
                Duration::from_millis(ms)
            }
        });
        let linger = linger.min(Duration::from_secs(20));
        let (low, high, limit) = setup.watermarks;
        let (accept, handshakes, read) = setup.budgets;
        let config = Config::new()
            .max_connections(setup.cap)
            .accept_budget(accept)
            .handshake_budget(handshakes)
            .read_budget(read);
        let mut sim = Sim::new(plan.seed, config, App::default());
        let mut listen = Listen::tcp("127.0.0.1:0")
            .framing(setup.framing.clone())
            .max_frame(setup.max_frame)
            .handshake_timeout(handshake)
            .frame_timeout(frame)
            .idle_timeout(idle)
            .write_timeout(write)
            .linger(linger, 10_000)
            .watermarks(low, high)
            .output_limit(limit)
            .backlog(16);
        if setup.refuse {
            listen = listen.at_capacity(AtCapacity::Refuse { farewell: Vec::new() });
        }
        #[cfg(feature = "tls")]
        if setup.tls {
            listen = listen.tls(sim_tls::server_config());
        }
        let mut random = Random::new(plan.seed ^ 0xC0FF_EE00);
        let doorkeeper = Doorkeeper {
            temper: setup.temper,
            random: Random::new(random.bits()),
        };
        let addr = sim.listen(listen, doorkeeper).expect("a listener in an empty world");
        Self {
            sim,
            addr,
            speakers: Vec::new(),
            random,
            cells: BTreeSet::new(),
            crowded: setup.temper == Temper::Meddling,
        }
    }

    fn play(&mut self, plan: &Plan) -> Result<(), String> {
        self.sim.set_faults(plan.faults.clone());
        for op in &plan.script.ops {
            self.perform(plan, op)?;
        }
        self.come_to_rest(plan)
    }

    fn perform(&mut self, plan: &Plan, op: &Op) -> Result<(), String> {
        let chosen = |client: u8, speakers: &[Speaker]| usize::from(client) % speakers.len().max(1);
        match op {
            Op::Connect => {
                if let Some(id) = self.sim.connect(self.addr) {
                    self.speakers.push(Speaker {
                        id,
                        expected: Vec::new(),
                        received: Vec::new(),
                        finished: false,
                        honest: true,
                        #[cfg(feature = "tls")]
                        tls: plan.setup.tls.then(sim_tls::Client::new),
                    });
                }
            }
            Op::Send { client, bytes } => {
                let at = chosen(*client, &self.speakers);
                let frames = bytes.len();
                let random = &mut self.random;
                if let Some(speaker) = self.speakers.get_mut(at) {
                    if !speaker.finished {
                        let wire = speaker.say(random, &plan.setup, frames);
                        self.sim.send(speaker.id, &wire);
                    }
                }
            }
            Op::Finish { client } => {
                let at = chosen(*client, &self.speakers);
                if let Some(speaker) = self.speakers.get_mut(at) {
                    let wire = speaker.goodbye();
                    self.sim.send(speaker.id, &wire);
                    speaker.finished = true;
                    self.sim.finish(speaker.id);
                }
            }
            // What concerns no client's bookkeeping is played as it is, against the clients' own numbers.
            op => {
                self.crowded |= matches!(op, Op::Push { .. });
                let ids: Vec<ClientId> = self.speakers.iter().map(|speaker| speaker.id).collect();
                self.note_strikes_during(|sim, addr| sim.try_perform(addr, &ids, op))?;
            }
        }
        // Nothing may depend on how many turns lie between two things that happen.
        if self.random.chance(500) {
            self.note_strikes_during(|sim, _| sim.try_step())?;
        }
        self.listen_to_all(plan)
    }

    /// Runs the world and notes what hit whom in which state.
    fn note_strikes_during(
        &mut self,
        run: impl FnOnce(&mut Sim<App>, SocketAddr) -> Result<(), portcullis::sim::Violation>,
    ) -> Result<(), String> {
        let before: HashMap<SocketAddr, State> = self
            .sim
            .control()
            .connections()
            .iter()
            .map(|info| (info.peer, info.state))
            .collect();
        let outcome = run(&mut self.sim, self.addr).map_err(|violation| violation.to_string());
        for (call, errno, client) in self.sim.take_struck() {
            let peer = client.and_then(|client| self.sim.client_addr(client));
            let state = match peer {
                None => "-".to_owned(),
                Some(peer) => before.get(&peer).map_or("new".to_owned(), ToString::to_string),
            };
            self.cells.insert((state, call, errno));
        }
        outcome
    }

    /// Faults end, clients read, time passes: everybody must be gone, and nothing held.
    fn come_to_rest(&mut self, plan: &Plan) -> Result<(), String> {
        self.sim.set_faults(Faults::none());
        self.sim.set_descriptor_limit(usize::MAX);
        for at in 0..self.speakers.len() {
            let id = self.speakers[at].id;
            self.sim.set_reading(id, true);
        }
        for _ in 0..4 {
            self.note_strikes_during(|sim, _| sim.try_advance(Duration::from_millis(100)))?;
            self.listen_to_all(plan)?;
        }
        self.note_strikes_during(|sim, _| sim.try_advance(Duration::from_secs(120)))?;
        self.listen_to_all(plan)?;
        self.sim.control().drain(Duration::from_secs(10));
        self.note_strikes_during(|sim, _| sim.try_advance(Duration::from_secs(60)))?;
        self.listen_to_all(plan)?;
        if self.sim.drain_report().is_none() {
            return Err(format!(
                "the drain does not end: {:?}",
                self.sim.control().connections()
            ));
        }
        if self.sim.descriptors() != 0 {
            return Err(format!("{} descriptors are left", self.sim.descriptors()));
        }
        self.check_books()
    }

    fn check_books(&self) -> Result<(), String> {
        let (app, stats) = (self.sim.app(), self.sim.stats());
        let opened: usize = app.open.values().sum();
        let closed: usize = app.reasons.values().map(Vec::len).sum();
        if opened as u64 != stats.opened || opened != closed {
            return Err(format!("{} opened, {opened} on_open, {closed} on_close", stats.opened));
        }
        if app.unopened as u64 + stats.opened != stats.accepted {
            return Err(format!(
                "{} accepted, {} opened, {} reported as unopened",
                stats.accepted, stats.opened, app.unopened
            ));
        }
        Ok(())
    }

    /// Every client reads what there is, and judges it.
    fn listen_to_all(&mut self, plan: &Plan) -> Result<(), String> {
        if let Some(fault) = self.sim.app_mut().fault.take() {
            return Err(fault);
        }
        for speaker in &mut self.speakers {
            let bytes = self.sim.received(speaker.id);
            let reply = speaker.hear(&bytes)?;
            self.sim.send(speaker.id, &reply);
            if self.crowded || !speaker.honest {
                continue;
            }
            if !speaker.expected.starts_with(&speaker.received) {
                return Err(format!(
                    "client {:?} got what nobody sent: {:?}, expected {:?}",
                    speaker.id, speaker.received, speaker.expected
                ));
            }
            let peer = self.sim.client_addr(speaker.id);
            let reasons = peer.and_then(|peer| self.sim.app().reasons.get(&peer));
            let graceful = reasons.is_some_and(|reasons| reasons.contains(&CloseReason::Finished));
            let state = self.sim.state(speaker.id);
            if graceful && state == ClientState::Finished && speaker.received != speaker.expected {
                return Err(format!(
                    "client {:?} ended gracefully ({:?}) with {} of {} bytes",
                    speaker.id,
                    plan.setup.temper,
                    speaker.received.len(),
                    speaker.expected.len()
                ));
            }
        }
        Ok(())
    }
}

impl Speaker {
    /// Some frames, on the wire; now and then rubbish.
    fn say(&mut self, random: &mut Random, setup: &Setup, frames: usize) -> Vec<u8> {
        let mut plain = Vec::new();
        for _ in 0..frames {
            let start = plain.len();
            // Up to the maximum: a line counts its delimiter.
            let length = if random.chance(100) {
                0
            } else {
                random.below(setup.max_frame)
            };
            let payload: Vec<u8> = (0..length).map(|_| b'a' + random.below(26) as u8).collect();
            match setup.framing {
                Framing::Packet1 => plain.push(length as u8),
                Framing::Packet2 => plain.extend_from_slice(&(length as u16).to_be_bytes()),
                Framing::Packet4 => plain.extend_from_slice(&(length as u32).to_be_bytes()),
                _ => {}
            }
            plain.extend_from_slice(&payload);
            // What these frame is not what they were sent.
            if matches!(setup.framing, Framing::Custom(_) | Framing::Delimited(_)) {
                self.honest = false;
                plain.push(b'e');
            }
            if matches!(setup.framing, Framing::Line) {
                plain.push(b'\n');
            }
            // After two frames a shifting handler takes the headers for content, and frames what it sends no more.
            if matches!(setup.temper, Temper::Shifting | Temper::Starttls) {
                self.honest = false;
            }
            if self.honest {
                self.expected.extend_from_slice(&plain[start..]);
            }
        }
        if random.chance(20) {
            self.honest = false;
            plain.extend((0..random.below(40)).map(|_| random.below(256) as u8));
        }
        #[cfg(feature = "tls")]
        if let Some(tls) = &mut self.tls {
            return tls.encrypt(&plain);
        }
        plain
    }

    fn goodbye(&mut self) -> Vec<u8> {
        #[cfg(feature = "tls")]
        if let Some(tls) = &mut self.tls {
            return tls.close_notify();
        }
        Vec::new()
    }

    /// Takes what came; returns what the client must say to that (TLS handshakes).
    fn hear(&mut self, bytes: &[u8]) -> Result<Vec<u8>, String> {
        #[cfg(feature = "tls")]
        if let Some(tls) = &mut self.tls {
            return tls.decrypt(bytes, &mut self.received);
        }
        self.received.extend_from_slice(bytes);
        Ok(Vec::new())
    }
}

/// Five bytes a frame, asked for in every way.
struct Five;
impl portcullis::Framer for Five {
    fn decode(&mut self, input: &[u8]) -> Result<portcullis::Decoded, portcullis::FrameError> {
        Ok(match input.len() {
            0..=2 => portcullis::Decoded::More,
            3..=4 => portcullis::Decoded::Need(5),
            _ => portcullis::Decoded::Frame {
                payload: 1..3,
                consumed: 5,
            },
        })
    }
    fn encode(&mut self, payload: &[u8], out: &mut portcullis::FrameBuf<'_>) -> Result<(), portcullis::FrameError> {
        if payload.is_empty() {
            return Err(portcullis::FrameError::new("empty"));
        }
        out.put(payload);
        Ok(())
    }
}
