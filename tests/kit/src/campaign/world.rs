//! A world in play: clients and a server in the simulator, and the oracle.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::time::Duration;

use portcullis::sim::{
    Answer, Call, ClientId, ClientState, Faults, Op, Random, Scripted, Sim, Violation,
};
use portcullis::{CloseReason, ConnId, ConnInfo, ListenerId, ProxyProtocol, Retry, State};

use super::app::{is_orderly, tcp, App, Order, Slow, Talk};
use super::descriptors;
use super::header::{self, Opening};
use super::logger::PanickingLogger;
use super::pace::{Limits, Pace};
use super::plan::{Act, Action, Door, Plan};
use super::rates::Meter;
use super::rules::{bad_config, bad_listen, source, House, Rules, NETWORKS};
use super::sim_client::SimClient;
use super::subject::{draw_order, HandlerKind, Live, Subject, TestService};
use crate::script::ScriptedHandler;

/// Clients that something happens to.
const RECENT: usize = 8;

/// Steps of the search for a path that verifying a chain may cost: ten common chains.
#[cfg(feature = "tls")]
const MAX_STEPS: usize = 10;

pub struct World {
    pub sim: Sim<App>,
    doors: Vec<Entrance>,
    house: House,
    /// Of the whole server.
    meter: Meter,
    /// `None` in a world whose clock leaps: what was late then is late for the server alone.
    pace: Option<Pace>,
    /// A callback has blocked the loop, which has not caught up yet: its budgets may be small.
    is_late: bool,
    sim_clients: Vec<SimClient>,
    /// Targets of outgoing connections that are not connected yet.
    dialed: Vec<(SocketAddr, Rc<Door>)>,
    dials: u16,
    queue: (usize, usize),
    heavy: bool,
    /// A connection may be reset on purpose, also while it closes in order; or a call fails for a
    /// connection whose kernel was not asked yet what it has sent.
    aborts: bool,
    logger: Option<PanickingLogger>,
}

/// A listener.
#[derive(Clone)]
struct Entrance {
    door: Rc<Door>,
    live: Rc<RefCell<Live>>,
    addr: SocketAddr,
    /// Since when: another listener may follow at the same address.
    listener: ListenerId,
    meter: Rc<RefCell<Meter>>,
    /// Its limit on sources has been what it is since it listens.
    limits_all: bool,
}

impl World {
    pub fn new(plan: &Plan) -> Result<Self, String> {
        let mut sim = Sim::new(plan.seed, plan.setup.config(), App::new());
        if plan.kqueue {
            sim.use_kqueue();
        }
        sim.app_mut().handle = Some(sim.handle());
        // Small frames take the way of large ones too. Where frames are large, half of the worlds
        // have the real size.
        if !plan.setup.heavy || plan.seed % 2 == 0 {
            sim.set_large_frame(128);
        }
        if plan.seed % 8 == 5 {
            sim.app_mut().slow = Some(Slow {
                work: Box::new(sim.work()),
                // A stream of its own: all else in the world is the same.
                random: Random::new(plan.seed ^ 0x510E),
                has_worked: false,
                now: Duration::ZERO,
                fired: None,
            });
        }
        sim.keep_coverage();
        let logger = (plan.seed % 8 == 3).then(|| PanickingLogger::new(plan.seed ^ 0x1066));
        let mut world = Self {
            sim,
            doors: Vec::new(),
            house: plan.setup.house.clone(),
            meter: Meter::default(),
            pace: (plan.faults.clock_leaps == 0).then(Pace::default),
            is_late: false,
            sim_clients: Vec::new(),
            dialed: Vec::new(),
            dials: 0,
            queue: plan.setup.queue,
            heavy: plan.setup.heavy,
            aborts: plan.faults.errors > 0
                || plan.setup.doors.iter().any(|door| {
                    let kind = door.handler_kind;
                    matches!(kind, HandlerKind::Meddling | HandlerKind::Suicidal)
                }),
            logger,
        };
        world.meter.set(world.house.accept_rate);
        let mut random = Random::new(plan.seed ^ 0xC0FF_EE00);
        for door in &plan.setup.doors {
            let door = Rc::new(door.clone());
            let live = Rc::new(RefCell::new(Live {
                rules: door.rules.clone(),
                epoch: 0,
            }));
            let test_service = TestService::new(&door, &live, Random::new(random.bits()));
            let addr = world
                .sim
                .listen_with(door.listen(0), test_service)
                .map_err(|error| error.to_string())?;
            let info = world.sim.control().listener(addr.port());
            let listener = info.map_err(|error| error.to_string())?.id;
            let mut meter = Meter::default();
            meter.set(door.rules.accept_rate);
            world.doors.push(Entrance {
                door,
                live,
                addr,
                listener,
                meter: Rc::new(RefCell::new(meter)),
                limits_all: true,
            });
        }
        Ok(world)
    }

    /// With faults, then without. At the end every connection must be gone, and nothing buffered.
    pub fn play(&mut self, plan: &Plan) -> Result<(), String> {
        self.sim.set_faults(plan.faults.clone());
        for action in &plan.script {
            self.perform(action)?;
        }
        let mut random = Random::new(plan.seed ^ 0x0DD5);
        self.come_to_rest(&mut random)?;
        self.serve_newcomers(&mut random)?;
        self.end(&mut random)
    }

    fn perform(&mut self, action: &Action) -> Result<(), String> {
        let mut random = Random::new(action.seed);
        let now = self.sim.now();
        self.sim.app_mut().set_now(now);
        match action.act {
            Act::Connect { door, odd } => {
                let door = usize::from(door) % self.doors.len();
                let from = random.chance(500).then(|| header::host(&mut random));
                let opening = match self.doors[door].live.borrow().rules.proxy {
                    ProxyProtocol::Off if random.chance(950) => Opening::default(),
                    ProxyProtocol::Optional if random.chance(300) => Opening::default(),
                    _ if random.chance(50) => Opening::default(),
                    _ => Opening::draw(&mut random),
                };
                if let Some(at) = self.connect(door, odd, from, opening, &mut random) {
                    let (door, id) = (&self.doors[door].door, self.sim_clients[at].id);
                    #[cfg(feature = "tls")]
                    if door.asks {
                        self.sim_clients[at].show(&mut random);
                    }
                    self.sim.set_send_buffer(id, door.send_buffer);
                    self.sim.set_reading(id, !random.chance(door.clogged));
                    if random.chance(40) {
                        // It goes before it says anything more.
                        self.sim_clients[at].finished = true;
                        self.sim.finish(id);
                    }
                }
            }
            Act::Dial { door } => self.dial(usize::from(door) % self.doors.len(), &mut random),
            Act::Adopt { door } => {
                let door = Rc::clone(&self.door(door).door);
                descriptors::adopt(&mut self.sim, &door, &mut random);
            }
            Act::Say { client, frames } => {
                let frames = usize::from(if self.heavy { frames.min(2) } else { frames });
                self.speak(client, |sim_client, talk| {
                    Some(sim_client.say(talk, &mut random, frames))
                });
            }
            Act::Rubbish { client, record } => {
                self.speak(client, |sim_client, talk| {
                    Some(sim_client.rave(talk, &mut random, record))
                });
            }
            Act::Finish {
                client,
                notify,
                fin,
            } => {
                self.speak(client, |sim_client, _| {
                    sim_client.finished = true;
                    notify.then(|| sim_client.goodbye())
                });
                if let (Some(sim_client), true) = (self.sim_client(client), fin) {
                    let id = sim_client.id;
                    self.sim.finish(id);
                }
            }
            Act::Clog { client } => {
                if let Some(id) = self.sim_client(client).map(|sim_client| sim_client.id) {
                    self.sim.set_reading(id, false);
                    self.sim.set_send_buffer(id, random.between(1, 64));
                }
            }
            Act::Sip { client } => {
                if let Some(id) = self.sim_client(client).map(|sim_client| sim_client.id) {
                    self.sim.read(id, random.between(1, 100));
                }
            }
            Act::Trickle { client, rounds } => self.trickle(client, rounds, &mut random)?,
            Act::Strike { error } => self.strike(error, &mut random),
            Act::Flood { orders } => self.flood(usize::from(orders), &mut random)?,
            Act::DrainByHandle { millis } => {
                let asked = self
                    .sim
                    .handle()
                    .drain(Duration::from_millis(u64::from(millis)));
                asked.map_err(|error| format!("a drain is refused: {error}"))?;
            }
            Act::StopByHandle => {
                let asked = self.sim.handle().stop();
                asked.map_err(|error| format!("a stop is refused: {error}"))?;
            }
            Act::Suspend { door, on } => self.suspend(door, on),
            Act::CloseDoor { door } => {
                let port = self.door(door).addr.port();
                // It may be closed already.
                let _ = self.sim.control().close_listener(port);
            }
            Act::OpenDoor { door } => self.open(usize::from(door) % self.doors.len(), &mut random),
            Act::ChangeRules { door, good } => {
                let door = usize::from(door) % self.doors.len();
                if good {
                    let mut rules = self.doors[door].live.borrow().rules.clone();
                    rules.redraw(&mut random);
                    self.change_rules(door, rules)?;
                } else {
                    self.try_bad_rules(door, &mut random)?;
                }
            }
            Act::ChangeHouse { good: true } => {
                let house = House::draw(&mut random, self.heavy);
                self.change_house(house)?;
            }
            Act::ChangeHouse { good: false } => self.try_bad_house(&mut random)?,
            Act::Ban { network } => self.ban(network, &mut random)?,
            Act::Unban { network } => {
                self.unban(NETWORKS[usize::from(network) % NETWORKS.len()])?
            }
            Act::World(ref op) => self.let_happen(op)?,
        }
        if random.chance(200) {
            descriptors::tend(&mut self.sim, &mut random, self.heavy);
        }
        // Nothing may depend on how many turns lie between two things that happen.
        if random.chance(500) {
            checked(self.sim.try_step())?;
        }
        self.listen_to_all()
    }

    fn ban(&mut self, network: u8, random: &mut Random) -> Result<(), String> {
        let network = NETWORKS[usize::from(network) % NETWORKS.len()];
        let duration = match random.below(4) {
            0 => Duration::MAX,
            1 => Duration::from_secs(3600),
            _ => Duration::from_millis(random.between(1, 10_000) as u64),
        };
        let banned = self.sim.control().ban(network, duration);
        banned.map_err(|error| format!("the ban of {network} is refused: {error}"))?;
        self.sim.app_mut().bans.ban(network, duration);
        Ok(())
    }

    fn unban(&mut self, network: &'static str) -> Result<(), String> {
        let lifted = self.sim.control().unban(network);
        let lifted = lifted.map_err(|error| format!("{network} cannot be unbanned: {error}"))?;
        let was_banned = self.sim.app_mut().bans.lift(network);
        if was_banned.is_some_and(|was_banned| was_banned != lifted) {
            return Err(format!(
                "unban of {network}: {lifted}, it was banned: {was_banned:?}"
            ));
        }
        Ok(())
    }

    /// A peer that was banned when it came and still is must not have been served.
    fn keep_out_the_banned(&mut self, now: Duration) -> Result<(), String> {
        let app = self.sim.app_mut();
        app.set_now(now);
        let fired = app.slow.as_mut().and_then(|slow| slow.fired.take());
        if let Some(due) = fired.filter(|&due| due > now) {
            return Err(format!("a timer of {due:?} has fired by {now:?}"));
        }
        for (peer, talk) in &mut app.talks {
            let Some(source) = talk.asked.take() else {
                continue;
            };
            let mut addresses = [peer.ip(), source].into_iter();
            if let Some(banned) = addresses.find(|&address| app.bans.must_deny(address, talk.bans))
            {
                return Err(format!("{peer} is served, and {banned} is banned"));
            }
        }
        Ok(())
    }

    /// A frame that arrives byte by byte, from a client that reads byte by byte.
    fn trickle(&mut self, client: u8, rounds: u8, random: &mut Random) -> Result<(), String> {
        let Some((id, addr)) = self.sim_client(client).map(|found| (found.id, found.addr)) else {
            return Ok(());
        };
        self.sim.set_reading(id, false);
        let talk = self.sim.app_mut().talk(addr);
        let frame = talk.wire.utter(&vec![b'a'; talk.max.min(255)]);
        let at = self.recent(client);
        let pause = Duration::from_millis([1, 10, 100, 1000][random.below(4)]);
        for piece in frame.chunks(random.between(1, 3)).take(rounds.into()) {
            let Some(sim_client) = self.sim_clients.get_mut(at) else {
                break;
            };
            if !sim_client.finished {
                let wire = sim_client.utter(self.sim.app_mut().talk(addr), piece);
                self.sim.send(id, &wire);
            }
            self.sim.read(id, random.between(1, 3));
            self.pass(pause)?;
        }
        Ok(())
    }

    /// What the simulator can do by itself.
    fn let_happen(&mut self, op: &Op) -> Result<(), String> {
        let clients: Vec<ClientId> = self
            .sim_clients
            .iter()
            .rev()
            .take(RECENT)
            .map(|sim_client| sim_client.id)
            .collect();
        let addr = self.doors[0].addr;
        self.aborts |= matches!(op, Op::Kill { .. } | Op::Fail { .. });
        if let Op::Reset { client } = op {
            let at = clients.get(usize::from(*client) % clients.len().max(1));
            let mut sim_clients = self.sim_clients.iter_mut();
            if let Some(client) = sim_clients.find(|client| Some(&client.id) == at) {
                client.reset = true;
            }
        }
        checked(self.sim.try_perform(addr, &clients, op))?;
        self.note_work(matches!(op, Op::Advance { .. }));
        Ok(())
    }

    /// Notes whether a callback has blocked the loop, which was `settled` since.
    fn note_work(&mut self, settled: bool) {
        let slow = self.sim.app_mut().slow.as_mut();
        if slow.is_some_and(|slow| std::mem::take(&mut slow.has_worked)) {
            self.is_late = true;
        } else if settled {
            self.is_late = false;
        }
    }

    fn door(&self, number: u8) -> &Entrance {
        &self.doors[usize::from(number) % self.doors.len()]
    }

    fn sim_client(&self, number: u8) -> Option<&SimClient> {
        self.sim_clients.get(self.recent(number))
    }

    /// Which client is meant: one of the latest, since most of the others are gone.
    fn recent(&self, number: u8) -> usize {
        let count = self.sim_clients.len();
        count.saturating_sub(1 + usize::from(number) % count.clamp(1, RECENT))
    }

    /// A client says something, unless it has said that it would not.
    fn speak(
        &mut self,
        number: u8,
        say: impl FnOnce(&mut SimClient, &mut Talk) -> Option<Vec<u8>>,
    ) {
        let at = self.recent(number);
        let Some(sim_client) = self
            .sim_clients
            .get_mut(at)
            .filter(|sim_client| !sim_client.finished)
        else {
            return;
        };
        let wire = say(sim_client, self.sim.app_mut().talk(sim_client.addr));
        self.sim.send(sim_client.id, &wire.unwrap_or_default());
    }

    fn connect(
        &mut self,
        door: usize,
        odd: bool,
        from: Option<IpAddr>,
        opening: Opening,
        random: &mut Random,
    ) -> Option<usize> {
        let Entrance {
            door, live, addr, ..
        } = &self.doors[door];
        let id = match from {
            Some(host) => self.sim.connect_from(*addr, host)?,
            None => self.sim.connect(*addr)?,
        };
        let peer = self.sim.client_addr(id)?;
        let mut talk = Talk::new(door.wire, door.max_frame, door.tls);
        talk.epoch = live.borrow().epoch;
        talk.came = self.sim.now();
        talk.bans = self.sim.app().bans.count();
        talk.evictable = door.evict_silent;
        let mut sim_client = SimClient::new(id, peer, door.tls, odd);
        let beginning = sim_client.begin(&mut talk, opening, random);
        self.sim.app_mut().talks.insert(peer, talk);
        self.sim.send(id, &beginning);
        if odd && !door.tls {
            // Nothing else is said there, and what it says is judged as any other rubbish.
            sim_client.odd = false;
            let hello = sim_client.utter(self.sim.app_mut().talk(peer), &SimClient::hello());
            self.sim.send(id, &hello);
        }
        self.sim_clients.push(sim_client);
        Some(self.sim_clients.len() - 1)
    }

    /// The server connects, from a job.
    fn dial(&mut self, door: usize, random: &mut Random) {
        self.dials += 1;
        let addr = SocketAddr::from(([203, 0, 113, 1], self.dials));
        let after = Duration::from_millis(random.below(3_000) as u64);
        let answer = match random.below(10) {
            0..=3 => Answer::Accept,
            4..=6 => Answer::AcceptAfter(after),
            7 => Answer::FailAfter(
                after,
                *random
                    .pick(Call::Connect.errors())
                    .unwrap_or(&libc::ECONNREFUSED),
            ),
            8 => Answer::Silence,
            _ => Answer::Refuse,
        };
        self.sim.remote(addr, answer);
        let retry = random.chance(500).then(|| {
            let attempts = [1, 2, 5, u32::MAX][random.below(4)];
            Retry::new(attempts).jitter(random.below(101) as u8)
        });
        let timeout = [
            Duration::from_millis(20),
            Duration::from_secs(5),
            Duration::MAX,
        ][random.below(3)];
        let door = &self.doors[door].door;
        let talk = Talk::new(door.wire, door.max_frame, false);
        self.sim.app_mut().talks.insert(addr, talk);
        self.dialed.push((addr, Rc::clone(door)));
        let (door, seed) = (Door::clone(door), random.bits());
        let posted = self.sim.handle().post(move |app, control| {
            app.commands.jobs += 1;
            let door = Rc::new(door);
            let subject = Subject::new(&door, app, Random::new(seed));
            // At the cap, without a descriptor or in a drain it is refused.
            let _ = control.connect(
                addr,
                door.connect(timeout, retry),
                ScriptedHandler::new(subject),
            );
        });
        let commands = &mut self.sim.app_mut().commands;
        match posted {
            Ok(()) => commands.posts += 1,
            Err(_) => commands.refused += 1,
        }
    }

    /// A remote server sends as a client does, once the server knows of the connection. Before, the
    /// attempt may be given up and repeated.
    fn meet(&mut self) -> Result<(), String> {
        if std::mem::take(&mut self.sim.app_mut().descriptors.is_new) {
            self.meet_adopted()?;
        }
        if self.dialed.is_empty() {
            return Ok(());
        }
        let infos = self.sim.control().connections().into_iter();
        let trying = infos.filter(|info| info.state == State::Connecting);
        let trying: Vec<_> = trying.map(|info| tcp(&info.peer)).collect();
        let (sim, sim_clients) = (&mut self.sim, &mut self.sim_clients);
        self.dialed.retain(|(addr, door)| {
            // The attempts before the last one have failed.
            let met = sim.dialed(*addr).last().copied();
            let Some(id) = met.filter(|_| !trying.contains(addr)) else {
                return true;
            };
            sim.set_send_buffer(id, door.send_buffer);
            sim_clients.push(SimClient::new(id, *addr, false, false));
            false
        });
        Ok(())
    }

    /// The peers of adopted sockets are clients as others are. One that was refused is closed.
    fn meet_adopted(&mut self) -> Result<(), String> {
        let adopted = std::mem::take(&mut self.sim.app_mut().descriptors.adopted);
        for id in self.sim.adopted() {
            let Some(addr) = self.sim.client_addr(id) else {
                continue;
            };
            if let Some(&(_, send_buffer)) = adopted.iter().find(|(peer, _)| *peer == addr) {
                self.sim.set_send_buffer(id, send_buffer);
                self.sim_clients
                    .push(SimClient::new(id, addr, false, false));
            } else if !self.sim.app().talks.contains_key(&addr)
                && self.sim.state(id) == ClientState::Connected
            {
                return Err(format!("the refused socket of {addr} is open"));
            }
        }
        Ok(())
    }

    fn strike(&mut self, error: u8, random: &mut Random) {
        let closing = self.sim.control().connections().into_iter();
        let mut closing = closing.filter(|info| info.state == State::Closing && info.queued > 0);
        let flushed = closing.next().map(|info| tcp(&info.peer));
        let sim_clients = self.sim_clients.iter_mut();
        let mut rare = sim_clients
            .filter(|sim_client| sim_client.has_to_begin() || Some(sim_client.addr) == flushed);
        let Some(sim_client) = rare.next() else {
            return;
        };
        let (call, errors) = (Call::Write, Call::Write.errors());
        let errno = errors[usize::from(error) % errors.len()];
        self.sim.add_fault(Scripted {
            call,
            after: 0,
            errno,
        });
        if sim_client.has_to_begin() {
            sim_client.speak_up();
            let wire = sim_client.say(self.sim.app_mut().talk(sim_client.addr), random, 1);
            self.sim.send(sim_client.id, &wire);
        } else {
            self.sim.read(sim_client.id, usize::MAX);
        }
    }

    fn suspend(&mut self, door: u8, on: bool) {
        let port = self.door(door).addr.port();
        let mut control = self.sim.control();
        // It may be closed.
        let _ = if on {
            control.suspend(port)
        } else {
            control.resume(port)
        };
    }

    fn open(&mut self, at: usize, random: &mut Random) {
        let Entrance {
            door, live, addr, ..
        } = &self.doors[at];
        // What is still connected through a closed listener stays under its rules.
        let live = Rc::new(RefCell::new(live.borrow().clone()));
        let test_service = TestService::new(door, &live, Random::new(random.bits()));
        let rules = live.borrow().rules.clone();
        let listen = door.listen(addr.port()).with(|listen| rules.apply(listen));
        // It may be open still, or the server drains, or a call fails: the rest is as it was.
        if self.sim.listen_with(listen, test_service).is_err() {
            return;
        }
        if let Ok(info) = self.sim.control().listener(addr.port()) {
            let entrance = &mut self.doors[at];
            entrance.listener = info.id;
            entrance.live = live;
            entrance.limits_all = true;
            let mut meter = Meter::default();
            meter.set(rules.accept_rate);
            entrance.meter = Rc::new(RefCell::new(meter));
        }
    }

    /// Other rules for a listener. It takes them, if it is open.
    fn change_rules(&mut self, at: usize, rules: Rules) -> Result<(), String> {
        let entrance = &mut self.doors[at];
        let port = entrance.addr.port();
        let mut control = self.sim.control();
        if control.listener(port).is_err() {
            return Ok(());
        }
        let changed = control.reconfigure_listener(port, |listen| rules.apply(listen));
        changed.map_err(|error| format!("{rules:?} are refused: {error}"))?;
        let mut live = entrance.live.borrow_mut();
        if live.rules.accept_rate != rules.accept_rate {
            entrance.meter.borrow_mut().set(rules.accept_rate);
        }
        entrance.limits_all &= live.rules.source_connections == rules.source_connections;
        live.rules = rules;
        live.epoch += 1;
        Ok(())
    }

    fn change_house(&mut self, house: House) -> Result<(), String> {
        let changed = self.sim.control().reconfigure(|config| house.apply(config));
        changed.map_err(|error| format!("{house:?} is refused: {error}"))?;
        if house.accept_rate != self.house.accept_rate {
            self.meter.set(house.accept_rate);
        }
        self.house = house;
        Ok(())
    }

    /// Rules that cannot work are refused as a whole.
    fn try_bad_rules(&mut self, at: usize, random: &mut Random) -> Result<(), String> {
        let port = self.doors[at].addr.port();
        let mut control = self.sim.control();
        if control.listener(port).is_err() {
            return Ok(());
        }
        let (mut before, mut after) = (String::new(), String::new());
        let refused = control.reconfigure_listener(port, |listen| {
            before = format!("{listen:?}");
            bad_listen(listen, random);
        });
        let same = control.reconfigure_listener(port, |listen| {
            after = format!("{listen:?}");
        });
        match (refused, same) {
            (Err(_), Ok(())) if before == after => Ok(()),
            (refused, same) => Err(format!("{refused:?}, {same:?}: {before} became {after}")),
        }
    }

    fn try_bad_house(&mut self, random: &mut Random) -> Result<(), String> {
        let (mut before, mut after) = (String::new(), String::new());
        let mut control = self.sim.control();
        let refused = control.reconfigure(|config| {
            before = format!("{config:?}");
            bad_config(config, random);
        });
        let same = control.reconfigure(|config| {
            after = format!("{config:?}");
        });
        match (refused, same) {
            (Err(_), Ok(())) if before == after => Ok(()),
            (refused, same) => Err(format!("{refused:?}, {same:?}: {before} became {after}")),
        }
    }

    /// All connections that a thread may know.
    fn connections(&mut self) -> Vec<(ConnId, SocketAddr)> {
        let connections = self.sim.control().connections();
        connections
            .iter()
            .map(|info| (info.id, tcp(&info.peer)))
            .collect()
    }

    /// Many orders at once: no more are taken than the queue has room for.
    fn flood(&mut self, orders: usize, random: &mut Random) -> Result<(), String> {
        let ids = self.connections();
        let before = self.sim.app().commands.taken();
        let kills_before = self.sim.app().commands.kills;
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
        // A kill has room where the others have none.
        let kills = self.sim.app().commands.kills - kills_before;
        let taken = self.sim.app().commands.taken() - before;
        let (limit, limit_bytes) = self.queue;
        let too_many = taken - kills > limit as u64 || taken > 2 * limit as u64;
        if too_many || bytes > limit_bytes.max(App::FOREIGN.len()) {
            return Err(format!(
                "a queue of {limit} took {taken} orders with {bytes} bytes"
            ));
        }
        Ok(())
    }

    /// Faults end, clients read, time passes.
    fn come_to_rest(&mut self, random: &mut Random) -> Result<(), String> {
        self.sim.set_faults(Faults::none());
        self.sim.set_descriptor_limit(usize::MAX);
        for at in 0..self.sim_clients.len() {
            let id = self.sim_clients[at].id;
            self.sim.set_reading(id, true);
        }
        for _ in 0..4 {
            self.pass(Duration::from_millis(100))?;
        }
        while !self.sim.app().descriptors.detached.borrow().is_empty() {
            descriptors::tend(&mut self.sim, random, self.heavy);
            self.pass(Duration::from_millis(100))?;
        }
        self.miss_nothing(false)?;
        let waiting = self.waiting_for_memory();
        self.pass(Duration::from_secs(120))?;
        self.pass_on_memory(&waiting)?;
        // What comes slowly comes all the same.
        while self.house.memory.is_none()
            && self.sim.app().talks.values().any(|talk| talk.throttled)
        {
            let heard = |world: &Self| -> usize {
                world.sim.app().talks.values().map(|talk| talk.heard).sum()
            };
            let before = heard(self);
            self.pass(Duration::from_secs(120))?;
            if heard(self) == before {
                break;
            }
        }
        self.miss_nothing(true)?;
        if random.chance(300) {
            // Paused connections must be ended: here, or by the drain.
            self.aborts = true;
            for (id, _) in self.connections() {
                self.sim.control().kill(id);
            }
            self.pass(Duration::ZERO)?;
        }
        Ok(())
    }

    /// The connections that are not read because memory is tight, and what they have received.
    fn waiting_for_memory(&mut self) -> BTreeMap<ConnId, u64> {
        let connections = self.sim.control().connections();
        let waiting = connections.iter().filter(|info| info.paused_for_memory);
        waiting
            .map(|info| (info.id, info.traffic.bytes_in))
            .collect()
    }

    /// After two minutes: of a few connections that waited for memory, each has been read since. The
    /// right to read is passed on each second at the latest, every other time to one that had it.
    fn pass_on_memory(&mut self, waiting: &BTreeMap<ConnId, u64>) -> Result<(), String> {
        let still = self.waiting_for_memory();
        if waiting.len().max(still.len()) > 20 || self.sim.app().slow.is_some() {
            return Ok(());
        }
        match still
            .iter()
            .find(|(id, bytes)| waiting.get(id) == Some(bytes))
        {
            Some((id, _)) => Err(format!("{id} waits for memory, and is never read")),
            None => Ok(()),
        }
    }

    /// At rest: every client that reads has received all output.
    fn miss_nothing(&mut self, at_last: bool) -> Result<(), String> {
        if self.house.memory.is_some() {
            // A connection may be paused until others use less memory.
            return Ok(());
        }
        for info in self.sim.control().connections() {
            let talk = self.sim.app_mut().talk(tcp(&info.peer));
            let idle = info.state == State::Open
                && info.queued == 0
                && !talk.paused
                && (at_last || !talk.throttled);
            if idle && talk.has_more() {
                return Err(format!("{info} is not told a frame that has come"));
            }
            let mut clients = self.sim_clients.iter();
            let client = clients.find(|client| client.addr == tcp(&info.peer));
            let is_gone =
                client.is_some_and(|client| self.sim.state(client.id) == ClientState::Reset);
            // Frames that a pause keeps from the handler come before the end.
            if at_last && is_gone && info.state == State::Open && info.buffered == 0 {
                return Err(format!("{info} keeps its slot, and its peer is gone"));
            }
        }
        Ok(())
    }

    /// Connections that nothing moves at once, because of their handlers, rates or peers, have left
    /// too little memory for a PROXY header and a read, of 64 KiB each.
    fn is_memory_held(&mut self) -> bool {
        let connections = self.sim.control().connections();
        let is_held = |conn: &&ConnInfo| conn.paused || conn.throttled || conn.congested;
        let held = connections.iter().filter(is_held);
        let held: usize = held.map(|conn| conn.buffered + conn.queued).sum();
        self.house
            .memory
            .is_some_and(|limit| limit.saturating_sub(held) < 128 * 1024)
    }

    /// After any faults, a new client is served.
    fn serve_newcomers(&mut self, random: &mut Random) -> Result<(), String> {
        // A slow service uses up the time for the handshake.
        self.sim.app_mut().slow = None;
        if random.chance(500) {
            let now = self.sim.now();
            self.sim.app_mut().bans.set_now(now);
            for network in self.sim.app().bans.networks() {
                self.unban(network)?;
            }
        }
        for at in 0..self.doors.len() {
            self.suspend(at as u8, false);
            if random.chance(500) {
                let proxy = self.doors[at].live.borrow().rules.proxy;
                self.change_rules(at, Rules::none(proxy))?;
            }
            self.let_in()?;
            let Entrance {
                door, live, addr, ..
            } = self.doors[at].clone();
            let rules = live.borrow().rules.clone();
            let reliable = door.handler_kind == HandlerKind::Echo
                && door.refusals == 0
                && !rules.limits_sources();
            let bans = &self.sim.app().bans;
            let now = self.sim.now();
            let someone = rules.someone(|address| bans.may_deny(address, now));
            let (true, Some((peer, speaks_for))) = (reliable, someone) else {
                continue;
            };
            // For the rates, and for the grace of pending connections. One that has waited in a
            // backlog may come in meanwhile, and is charged.
            for _ in 0..100 {
                self.raise_cap();
                let accepted = self.sim.stats().accepted;
                self.pass(Duration::from_secs(2))?;
                if self.sim.stats().accepted == accepted {
                    break;
                }
            }
            match self.sim.control().listener(addr.port()) {
                Ok(info) if info.connections < info.max_connections => {}
                // Full, or closed.
                _ => continue,
            }
            let mut opening = Opening::default();
            if let Some(source) = speaks_for {
                opening = Opening::of(source, random);
            }
            let Some(newcomer) = self.connect(at, false, Some(peer), opening, random) else {
                return Err(format!("the backlog of {addr} is full for ever"));
            };
            self.sim_clients[newcomer].speak_up();
            let sim_client = &mut self.sim_clients[newcomer];
            let wire = sim_client.say(self.sim.app_mut().talk(sim_client.addr), random, 1);
            self.sim.send(sim_client.id, &wire);
            // A handshake takes three.
            for _ in 0..4 {
                // Handlers may have lowered the cap.
                self.raise_cap();
                self.pass(Duration::ZERO)?;
            }
            let sim_client = &self.sim_clients[newcomer];
            let talk = self.sim.app_mut().talk(sim_client.addr);
            if talk.failed_accept == Some(CloseReason::Evicted) && self.house.is_impatient() {
                continue;
            }
            if talk.failed_accept == Some(CloseReason::OverMemory) && self.is_memory_held() {
                continue;
            }
            let talk = self.sim.app_mut().talk(self.sim_clients[newcomer].addr);
            let deaf = !talk.throttled && self.house.memory.is_none() && talk.has_more();
            if !talk.opened || (deaf && talk.closed.is_none()) {
                return Err(format!("a newcomer at {addr} is not served"));
            }
        }
        Ok(())
    }

    /// Every waiting client is admitted. Handlers may lower the cap meanwhile.
    fn let_in(&mut self) -> Result<(), String> {
        loop {
            let accepted = self.sim.stats().accepted;
            self.raise_cap();
            self.pass(Duration::from_secs(if self.has_rates() { 2 } else { 0 }))?;
            self.raise_cap();
            if self.sim.stats().accepted == accepted {
                return Ok(());
            }
        }
    }

    /// A thousand connections are not too many.
    fn raise_cap(&mut self) {
        let _ = self
            .sim
            .control()
            .reconfigure(|config| config.max_connections = 1000);
    }

    /// A client may have to wait for its turn.
    fn has_rates(&self) -> bool {
        let limited = |entrance: &Entrance| entrance.live.borrow().rules.accept_rate.is_some();
        self.house.accept_rate.is_some()
            || self.house.is_crowded()
            || self.doors.iter().any(limited)
    }

    fn end(&mut self, random: &mut Random) -> Result<(), String> {
        let grace = Duration::from_secs(10);
        descriptors::tend(&mut self.sim, random, self.heavy);
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
        self.note_work(true);
        self.listen_to_all()
    }

    fn check_books(&self) -> Result<(), String> {
        let (app, stats) = (self.sim.app(), self.sim.stats());
        let orders = &app.commands;
        let logged = self.logger.as_ref().map_or(0, PanickingLogger::panics);
        let opened = app.talks.values().filter(|talk| talk.opened).count() as u64;
        let closed = app
            .talks
            .values()
            .filter(|talk| talk.closed.is_some())
            .count() as u64;
        let descriptors = &app.descriptors;
        // Each that came back had opened and closed before.
        let (opened, closed) = (opened + descriptors.attached, closed + descriptors.attached);
        let balances = [
            ("opened and on_open", stats.opened, opened),
            ("on_open and on_close", opened, closed),
            (
                "accepted or made, and opened or not",
                stats.accepted + stats.outgoing,
                opened + app.failed_accepts,
            ),
            (
                "panics, planned and counted",
                app.panics + app.blown.get() + logged,
                stats.panics,
            ),
            ("jobs, taken and done", orders.posts, orders.jobs),
            (
                "bytes of watched descriptors, written and read",
                descriptors.written,
                descriptors.read,
            ),
        ];
        for (what, one, other) in balances {
            if one != other {
                return Err(format!("{what}: {one} and {other}"));
            }
        }
        // Frames that were sent through the handle and taken by their connections.
        let foreign = stats.traffic.frames_out - app.frames;
        if orders.messages > orders.notifies || foreign > orders.sends {
            return Err(format!(
                "{} messages of {} were delivered, {foreign} frames of {}",
                orders.messages, orders.notifies, orders.sends
            ));
        }
        let lost = orders.notifies - orders.messages + orders.sends - foreign;
        if !(lost..=lost + orders.kills).contains(&stats.undeliverable) {
            return Err(format!(
                "{lost} messages and frames were not delivered, {} are told, with some of {} kills",
                stats.undeliverable, orders.kills
            ));
        }
        Ok(())
    }

    /// Every client reads what there is, and judges it.
    fn listen_to_all(&mut self) -> Result<(), String> {
        self.meet()?;
        self.aborts |= self.sim.app().commands.kills > 0;
        for sim_client in &mut self.sim_clients {
            let bytes = self.sim.received(sim_client.id);
            let talk = self.sim.app_mut().talk(sim_client.addr);
            let reply = sim_client.hear(&bytes, talk)?;
            let (closed, rest) = (
                talk.closed,
                talk.promised.len().saturating_sub(sim_client.received),
            );
            let murky = talk.murky;
            self.sim.send(sim_client.id, &reply);
            let is_over = match self.sim.state(sim_client.id) {
                ClientState::Finished => true,
                // By the server, which may do so only once the client has everything.
                ClientState::Reset => !self.aborts && !sim_client.reset,
                _ => false,
            };
            if murky || sim_client.deaf || !is_over {
                continue;
            }
            if closed.is_some_and(is_orderly) && rest > 0 {
                return Err(format!(
                    "client {:?} ended in order ({closed:?}) without the last {rest} bytes",
                    sim_client.id
                ));
            }
        }
        let now = self.sim.now();
        self.keep_out_the_banned(now)?;
        self.bound_the_chains()?;
        self.audit()?;
        self.sim.app_mut().fault.take().map_or(Ok(()), Err)
    }

    /// No chain of certificates has been verified that costs more than the bound.
    fn bound_the_chains(&self) -> Result<(), String> {
        #[cfg(feature = "tls")]
        match crate::sim_tls::take_most_steps() {
            0..=MAX_STEPS => {}
            steps => return Err(format!("a chain was verified in {steps} steps")),
        }
        Ok(())
    }

    /// No peer is slower than the minimum rate allows. A callback that blocks the loop may do so
    /// while its connection is congested, and not read: the time does not count. Nor is a
    /// connection read while a rate is used up, which may be so between two looks.
    fn keep_pace(&mut self, now: Duration, infos: &[ConnInfo]) -> Result<(), String> {
        self.note_work(false);
        let Some(pace) = self.pace.as_mut().filter(|_| !self.is_late) else {
            return Ok(());
        };
        let unblocked = now - self.sim.app().blocked;
        let talks = &self.sim.app().talks;
        let is_throttled = |info: &&ConnInfo| {
            let talk = talks.get(&tcp(&info.peer));
            talk.is_some_and(|talk| talk.throttled)
        };
        let throttled = infos.iter().filter(is_throttled).map(|info| info.id);
        let throttled: BTreeSet<_> = throttled.collect();
        let pauses = infos.iter().filter_map(|info| {
            let talk = talks.get(&tcp(&info.peer))?;
            Some((info.id, talk.pauses))
        });
        let pauses: BTreeMap<_, _> = pauses.collect();
        let mut control = self.sim.control();
        pace.check(unblocked, infos, |info| {
            info.listener?;
            let conn = control.conn(info.id)?;
            let options = conn.config()?;
            let frame_timeout = match throttled.contains(&info.id) {
                true => Duration::MAX,
                false => options.frame_timeout,
            };
            Some(Limits {
                write: (options.write_timeout, options.min_rate),
                frame: (frame_timeout, options.min_rate),
                congested_from: options.high_watermark.min(options.output_limit),
                pauses: pauses.get(&info.id).copied().unwrap_or(0),
            })
        })
    }

    /// No more have come in than rates and limits on sources allow. A drain ignores rates.
    fn audit(&mut self) -> Result<(), String> {
        let (now, accepted) = (self.sim.now(), self.sim.stats().accepted);
        let drains = self.sim.control().tree(0).draining;
        let (away, aways) = &self.sim.app().turned_away;
        if !drains {
            self.meter.check(now, accepted - away)?;
        }
        let aways = aways.clone();
        let infos = self.sim.control().connections();
        self.keep_pace(now, &infos)?;
        let mut crowds: BTreeMap<(ListenerId, u128), usize> = BTreeMap::new();
        for info in infos {
            let Some(listener) = info.listener else {
                continue;
            };
            if info.state == State::Open {
                *crowds
                    .entry((listener, source(tcp(&info.source).ip())))
                    .or_default() += 1;
            }
        }
        for entrance in &self.doors {
            let Ok(info) = self.sim.control().listener(entrance.addr.port()) else {
                continue;
            };
            let away = aways.get(&info.id).copied().unwrap_or(0);
            if !drains {
                let mut meter = entrance.meter.borrow_mut();
                meter
                    .check(now, info.accepted - away)
                    .map_err(|fault| format!("listener {}: {fault}", info.name))?;
            }
            let limit = entrance.live.borrow().rules.source_connections;
            if let (Some(most), true) = (limit, entrance.limits_all) {
                let crowd = crowds
                    .iter()
                    .find(|&((listener, _), &count)| *listener == info.id && count > most);
                if let Some(((_, source), count)) = crowd {
                    return Err(format!(
                        "{count} connections of source {source:x}, {most} may be"
                    ));
                }
            }
        }
        Ok(())
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
