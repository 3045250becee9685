//! A world in play: clients and a server in the simulator, and who judges them.

use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use portcullis::sim::{ClientId, ClientState, Faults, Op, Random, Sim, Violation};
use portcullis::{ConnId, State};

use super::app::{is_orderly, tcp, App, Order, Talk};
use super::plan::{Act, Deed, Door, Plan};
use super::speaker::Speaker;
use super::subject::{draw_order, Doorkeeper, Temper};

/// Clients that something happens to.
const RECENT: usize = 8;

pub struct World {
    pub sim: Sim<App>,
    doors: Vec<(Rc<Door>, SocketAddr)>,
    speakers: Vec<Speaker>,
    queue: (usize, usize),
}

impl World {
    pub fn new(plan: &Plan) -> Result<Self, String> {
        let mut sim = Sim::new(plan.seed, plan.setup.config(), App::new());
        sim.app_mut().handle = Some(sim.handle());
        sim.keep_coverage();
        let mut world = Self {
            sim,
            doors: Vec::new(),
            speakers: Vec::new(),
            queue: plan.setup.queue,
        };
        let mut random = Random::new(plan.seed ^ 0xC0FF_EE00);
        for door in &plan.setup.doors {
            let door = Rc::new(door.clone());
            let doorkeeper = Doorkeeper::new(&door, Random::new(random.bits()));
            let addr = world
                .sim
                .listen(door.listen(0), doorkeeper)
                .map_err(|error| error.to_string())?;
            world.doors.push((door, addr));
        }
        Ok(world)
    }

    /// With faults, then without; then everybody must be gone, and nothing held.
    pub fn play(&mut self, plan: &Plan) -> Result<(), String> {
        self.sim.set_faults(plan.faults.clone());
        for deed in &plan.script {
            self.perform(deed)?;
        }
        let mut random = Random::new(plan.seed ^ 0x0DD5);
        self.come_to_rest(&mut random)?;
        self.serve_newcomers(&mut random)?;
        self.end(&mut random)
    }

    fn perform(&mut self, deed: &Deed) -> Result<(), String> {
        let mut random = Random::new(deed.seed);
        match deed.act {
            Act::Connect { door, odd } => {
                let door = usize::from(door) % self.doors.len();
                if let Some(at) = self.connect(door, odd) {
                    let (door, id) = (&self.doors[door].0, self.speakers[at].id);
                    self.sim.set_send_buffer(id, door.send_buffer);
                    self.sim.set_reading(id, !random.chance(door.clogged));
                }
            }
            Act::Say { client, frames } => self.speak(client, |speaker, talk| {
                Some(speaker.say(talk, &mut random, usize::from(frames)))
            }),
            Act::Rubbish { client, record } => {
                self.speak(client, |speaker, talk| Some(speaker.rave(talk, &mut random, record)));
            }
            Act::Finish { client, notify, fin } => {
                self.speak(client, |speaker, _| {
                    speaker.finished = true;
                    notify.then(|| speaker.goodbye())
                });
                if let (Some(speaker), true) = (self.speaker(client), fin) {
                    let id = speaker.id;
                    self.sim.finish(id);
                }
            }
            Act::Clog { client } => {
                if let Some(id) = self.speaker(client).map(|speaker| speaker.id) {
                    self.sim.set_reading(id, false);
                    self.sim.set_send_buffer(id, random.between(1, 64));
                }
            }
            Act::Sip { client } => {
                if let Some(id) = self.speaker(client).map(|speaker| speaker.id) {
                    self.sim.read(id, random.between(1, 100));
                }
            }
            Act::Flood { orders } => self.flood(usize::from(orders), &mut random)?,
            Act::DrainByHandle { millis } => {
                let asked = self.sim.handle().drain(Duration::from_millis(u64::from(millis)));
                asked.map_err(|error| format!("a drain is refused: {error}"))?;
            }
            Act::StopByHandle => {
                let asked = self.sim.handle().stop();
                asked.map_err(|error| format!("a stop is refused: {error}"))?;
            }
            Act::Suspend { door, on } => self.suspend(door, on),
            Act::CloseDoor { door } => {
                let port = self.door(door).1.port();
                // It may be closed already.
                let _ = self.sim.control().close_listener(port);
            }
            Act::OpenDoor { door } => self.open(usize::from(door) % self.doors.len(), &mut random),
            Act::World(ref op) => self.let_happen(op)?,
        }
        // Nothing may depend on how many turns lie between two things that happen.
        if random.chance(500) {
            checked(self.sim.try_step())?;
        }
        self.listen_to_all()
    }

    /// What the simulator can do by itself.
    fn let_happen(&mut self, op: &Op) -> Result<(), String> {
        let clients: Vec<ClientId> = self
            .speakers
            .iter()
            .rev()
            .take(RECENT)
            .map(|speaker| speaker.id)
            .collect();
        let addr = self.doors[0].1;
        checked(self.sim.try_perform(addr, &clients, op))
    }

    fn door(&self, number: u8) -> &(Rc<Door>, SocketAddr) {
        &self.doors[usize::from(number) % self.doors.len()]
    }

    fn speaker(&self, number: u8) -> Option<&Speaker> {
        self.speakers.get(self.recent(number))
    }

    /// Which client is meant: one of the latest, since most of the others are gone.
    fn recent(&self, number: u8) -> usize {
        let count = self.speakers.len();
        count.saturating_sub(1 + usize::from(number) % count.clamp(1, RECENT))
    }

    /// A client says something, unless it has said that it would not.
    fn speak(&mut self, number: u8, say: impl FnOnce(&mut Speaker, &mut Talk) -> Option<Vec<u8>>) {
        let at = self.recent(number);
        let Some(speaker) = self.speakers.get_mut(at).filter(|speaker| !speaker.finished) else {
            return;
        };
        let wire = say(speaker, self.sim.app_mut().talk(speaker.addr));
        self.sim.send(speaker.id, &wire.unwrap_or_default());
    }

    fn connect(&mut self, door: usize, odd: bool) -> Option<usize> {
        let (door, addr) = &self.doors[door];
        let id = self.sim.connect(*addr)?;
        let peer = self.sim.client_addr(id)?;
        let talk = Talk::new(door.wire, door.max_frame, door.tls);
        self.sim.app_mut().talks.insert(peer, talk);
        let mut speaker = Speaker::new(id, peer, door.tls, odd);
        if odd && !door.tls {
            // Nothing else is said there, and what it says is judged as any other rubbish.
            speaker.odd = false;
            let hello = speaker.utter(self.sim.app_mut().talk(peer), &Speaker::hello());
            self.sim.send(id, &hello);
        }
        self.speakers.push(speaker);
        Some(self.speakers.len() - 1)
    }

    fn suspend(&mut self, door: u8, on: bool) {
        let port = self.door(door).1.port();
        let mut control = self.sim.control();
        // It may be closed.
        let _ = if on {
            control.suspend(port)
        } else {
            control.resume(port)
        };
    }

    fn open(&mut self, at: usize, random: &mut Random) {
        let (door, addr) = &self.doors[at];
        let doorkeeper = Doorkeeper::new(door, Random::new(random.bits()));
        // It may be open still, or the server drains, or a call fails: the rest is as it was.
        let _ = self.sim.listen(door.listen(addr.port()), doorkeeper);
    }

    /// Everybody of whom a thread may know.
    fn connections(&mut self) -> Vec<(ConnId, SocketAddr)> {
        let connections = self.sim.control().connections();
        connections.iter().map(|info| (info.id, tcp(&info.peer))).collect()
    }

    /// Many orders at once: no more are taken than the queue has room for.
    fn flood(&mut self, orders: usize, random: &mut Random) -> Result<(), String> {
        let ids = self.connections();
        let before = self.sim.app().commands.taken();
        let mut bytes = 0;
        for _ in 0..orders {
            let order = match random.pick(&ids) {
                Some(&id) => draw_order(random, id),
                None => Order::Idle,
            };
            let sends = self.sim.app().commands.sends;
            self.sim.app_mut().order(order);
            if self.sim.app().commands.sends > sends {
                bytes += App::FOREIGN.len();
            }
        }
        let taken = self.sim.app().commands.taken() - before;
        let (limit, limit_bytes) = self.queue;
        if taken > limit as u64 || bytes > limit_bytes.max(App::FOREIGN.len()) {
            return Err(format!("a queue of {limit} took {taken} orders with {bytes} bytes"));
        }
        Ok(())
    }

    /// Faults end, clients read, time passes.
    fn come_to_rest(&mut self, random: &mut Random) -> Result<(), String> {
        self.sim.set_faults(Faults::none());
        self.sim.set_descriptor_limit(usize::MAX);
        for at in 0..self.speakers.len() {
            let id = self.speakers[at].id;
            self.sim.set_reading(id, true);
        }
        for _ in 0..4 {
            self.pass(Duration::from_millis(100))?;
        }
        self.miss_nothing()?;
        self.pass(Duration::from_secs(120))?;
        self.miss_nothing()?;
        if random.chance(300) {
            // Somebody must end those who sleep: here, or the drain.
            for (id, _) in self.connections() {
                self.sim.control().kill(id);
            }
            self.pass(Duration::ZERO)?;
        }
        Ok(())
    }

    /// At rest: whoever may hear has heard all there is.
    fn miss_nothing(&mut self) -> Result<(), String> {
        for info in self.sim.control().connections() {
            let talk = self.sim.app_mut().talk(tcp(&info.peer));
            let idle = info.state == State::Open && info.queued == 0 && !talk.paused;
            if idle && talk.has_more() {
                return Err(format!("{info} is not told a frame that has come"));
            }
        }
        Ok(())
    }

    /// Whatever happened, who comes now is served.
    fn serve_newcomers(&mut self, random: &mut Random) -> Result<(), String> {
        for at in 0..self.doors.len() {
            self.suspend(at as u8, false);
            self.let_in()?;
            let (door, addr) = self.doors[at].clone();
            let full = match self.sim.control().listener(addr.port()) {
                Ok(info) => info.connections >= info.max_connections,
                // It was closed.
                Err(_) => true,
            };
            let reliable = door.temper == Temper::Echo && door.refusals == 0;
            if full || !reliable {
                continue;
            }
            let Some(newcomer) = self.connect(at, false) else {
                return Err(format!("the backlog of {addr} is full for ever"));
            };
            let speaker = &mut self.speakers[newcomer];
            let wire = speaker.say(self.sim.app_mut().talk(speaker.addr), random, 1);
            self.sim.send(speaker.id, &wire);
            // A handshake takes three.
            for _ in 0..4 {
                self.pass(Duration::ZERO)?;
            }
            let speaker = &self.speakers[newcomer];
            let talk = self.sim.app_mut().talk(speaker.addr);
            if !talk.opened || (talk.heard == 0 && !talk.said.is_empty()) {
                return Err(format!("a newcomer at {addr} is not served"));
            }
        }
        Ok(())
    }

    /// Everybody who waits comes in. Handlers may lower the cap meanwhile.
    fn let_in(&mut self) -> Result<(), String> {
        loop {
            let accepted = self.sim.stats().accepted;
            // A thousand is not too many.
            let _ = self.sim.control().set_max_connections(1000);
            self.pass(Duration::ZERO)?;
            let _ = self.sim.control().set_max_connections(1000);
            if self.sim.stats().accepted == accepted {
                return Ok(());
            }
        }
    }

    fn end(&mut self, random: &mut Random) -> Result<(), String> {
        let grace = Duration::from_secs(10);
        if random.chance(500) {
            self.sim.control().drain(grace);
        } else {
            let asked = self.sim.handle().drain(grace);
            asked.map_err(|error| format!("the drain is refused: {error}"))?;
        }
        self.pass(Duration::from_secs(60))?;
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

    fn pass(&mut self, span: Duration) -> Result<(), String> {
        checked(self.sim.try_advance(span))?;
        self.listen_to_all()
    }

    fn check_books(&self) -> Result<(), String> {
        let (app, stats) = (self.sim.app(), self.sim.stats());
        let orders = &app.commands;
        let opened = app.talks.values().filter(|talk| talk.opened).count() as u64;
        let closed = app.talks.values().filter(|talk| talk.closed.is_some()).count() as u64;
        let balances = [
            ("opened and on_open", stats.opened, opened),
            ("on_open and on_close", opened, closed),
            ("accepted and opened or not", stats.accepted, opened + app.unopened),
            (
                "panics, planned and counted",
                app.panics + app.blown.get(),
                stats.panics,
            ),
            ("jobs, taken and done", orders.posts, orders.jobs),
        ];
        for (what, one, other) in balances {
            if one != other {
                return Err(format!("{what}: {one} and {other}"));
            }
        }
        if orders.messages > orders.notifies || orders.notifies - orders.messages > stats.undeliverable {
            return Err(format!(
                "{} messages were taken and {} delivered, {} orders came to nothing",
                orders.notifies, orders.messages, stats.undeliverable
            ));
        }
        Ok(())
    }

    /// Every client reads what there is, and judges it.
    fn listen_to_all(&mut self) -> Result<(), String> {
        for speaker in &mut self.speakers {
            let bytes = self.sim.received(speaker.id);
            let talk = self.sim.app_mut().talk(speaker.addr);
            let reply = speaker.hear(&bytes, talk)?;
            let (closed, rest) = (talk.closed, talk.promised.len().saturating_sub(speaker.received));
            let murky = talk.murky;
            self.sim.send(speaker.id, &reply);
            if murky || speaker.deaf || self.sim.state(speaker.id) != ClientState::Finished {
                continue;
            }
            if closed.is_some_and(is_orderly) && rest > 0 {
                return Err(format!(
                    "client {:?} ended in order ({closed:?}) without the last {rest} bytes",
                    speaker.id
                ));
            }
        }
        self.sim.app_mut().fault.take().map_or(Ok(()), Err)
    }
}

fn checked(outcome: Result<(), Violation>) -> Result<(), String> {
    outcome.map_err(|violation| violation.to_string())
}

impl Drop for World {
    fn drop(&mut self) {
        self.sim.app_mut().armed.set(false);
    }
}
