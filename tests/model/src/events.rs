//! The model between two waits of its loop: an event from outside, and all that the loop makes of
//! it.
//!
//! A simulated server can be compared with the model only while it waits. These steps are few, so
//! that each is played.

use std::collections::{BTreeSet, HashMap, VecDeque};

use stateright::Model;

use crate::connection::{Conn, Deadline, Life, Reaction, Reason, Wire};
use crate::listener::State;
use crate::world::{Action, Client, Drain, World, MAX_CLIENTS};
use crate::Setting;

/// Which deadlines are short. The others do not pass in the same world: in the simulator time
/// passes for all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Timer {
    Handshake,
    FirstFrame,
    Frame,
    Idle,
    /// Of an open or a closing connection with output.
    Write,
    /// Of a closing connection without.
    Linger,
    /// Of the listener out of descriptors.
    Retry,
    Drain,
}

impl Timer {
    pub const ALL: [Timer; 8] = [
        Timer::Handshake,
        Timer::FirstFrame,
        Timer::Frame,
        Timer::Idle,
        Timer::Write,
        Timer::Linger,
        Timer::Retry,
        Timer::Drain,
    ];
}

/// An event from outside. Clients have numbers; a reaction is the handler's, or what the bytes are
/// worth.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Event {
    Connect {
        denied: bool,
    },
    SendPart(usize),
    SendWhole(usize, Reaction),
    HalfClose(usize, Reaction),
    Reset(usize),
    TakeOutput(usize),
    Local(usize, Reaction),
    TakeFd,
    FreeFd,
    TimePasses,
    Suspend,
    Resume,
    CloseListener,
    /// With what handlers make of the notice.
    Drain(Reaction),
}

/// A world whose loop waits.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Quiet {
    pub world: World,
    /// Clients that the access rules deny.
    denied: [bool; MAX_CLIENTS],
    /// What handlers make of the drain's notice.
    on_drain: Reaction,
}

/// The state of one client, as the server shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Stage {
    Absent,
    Waiting,
    Accepting,
    Handshaking,
    Open,
    Closing,
    Gone(Option<Reason>),
}

impl Stage {
    pub fn of(client: &Client) -> Stage {
        match client {
            Client::Absent => Stage::Absent,
            Client::Waiting => Stage::Waiting,
            Client::Gone(reason) => Stage::Gone(*reason),
            Client::Connected(conn) => match conn.life {
                Life::Accepting => Stage::Accepting,
                Life::Handshaking => Stage::Handshaking,
                Life::Open(_) => Stage::Open,
                Life::Closing(_) => Stage::Closing,
            },
        }
    }
}

/// A change that the model permits: of the listener, or of a client, by the event. `Event` names
/// client 0 for the client
/// itself, and client 1 for another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Change {
    Listener(State, Event, Timer, State),
    Client(Stage, Event, Timer, Stage),
}

impl Event {
    fn client(&self) -> Option<usize> {
        match self {
            Event::SendPart(client)
            | Event::SendWhole(client, _)
            | Event::HalfClose(client, _)
            | Event::Reset(client)
            | Event::TakeOutput(client)
            | Event::Local(client, _) => Some(*client),
            _ => None,
        }
    }

    /// The model's action, unless it is time that passes.
    fn action(self) -> Option<Action> {
        Some(match self {
            Event::Connect { .. } => Action::Connect,
            Event::SendPart(client) => Action::SendPart(client),
            Event::SendWhole(client, _) => Action::SendWhole(client),
            Event::HalfClose(client, _) => Action::HalfClose(client),
            Event::Reset(client) => Action::Reset(client),
            Event::TakeOutput(client) => Action::TakeOutput(client),
            Event::Local(client, reaction) => Action::Local(client, reaction),
            Event::TakeFd => Action::TakeFd,
            Event::FreeFd => Action::FreeFd,
            Event::Suspend => Action::Suspend,
            Event::Resume => Action::Resume,
            Event::CloseListener => Action::CloseListener,
            Event::Drain(_) => Action::Drain,
            Event::TimePasses => return None,
        })
    }

    /// As seen from this client.
    fn seen_by(mut self, number: usize) -> Event {
        match &mut self {
            Event::SendPart(client)
            | Event::SendWhole(client, _)
            | Event::HalfClose(client, _)
            | Event::Reset(client)
            | Event::TakeOutput(client)
            | Event::Local(client, _) => *client = usize::from(*client != number),
            _ => {}
        }
        self
    }

    fn all(clients: usize) -> Vec<Event> {
        use Reaction::{Abort, Close, Malformed, Panic, Proceed, Refuse, Send};
        let mut all = vec![
            Event::Connect { denied: false },
            Event::Connect { denied: true },
            Event::TakeFd,
            Event::FreeFd,
            Event::TimePasses,
            Event::Suspend,
            Event::Resume,
            Event::CloseListener,
        ];
        all.extend([Proceed, Close, Abort, Panic].map(Event::Drain));
        for client in 0..clients {
            let worth = [Proceed, Send, Malformed, Refuse, Close, Abort, Panic];
            all.extend(worth.map(|reaction| Event::SendWhole(client, reaction)));
            all.extend(
                [Proceed, Close, Abort, Panic].map(|reaction| Event::HalfClose(client, reaction)),
            );
            all.extend([Send, Close, Abort].map(|reaction| Event::Local(client, reaction)));
            all.extend([
                Event::SendPart(client),
                Event::Reset(client),
                Event::TakeOutput(client),
            ]);
        }
        all
    }
}

impl Quiet {
    /// The beginning.
    pub fn new(setting: &Setting) -> Option<Quiet> {
        let world = setting.init_states().pop()?;
        Some(Quiet {
            world,
            denied: [false; MAX_CLIENTS],
            on_drain: Reaction::Proceed,
        })
    }

    fn take(&mut self, setting: &Setting, action: Action) -> bool {
        let mut actions = Vec::new();
        setting.actions(&self.world, &mut actions);
        let next = actions
            .contains(&action)
            .then(|| setting.next_state(&self.world, action))
            .flatten();
        next.map(|world| self.world = world).is_some()
    }

    /// What happens at this event. `None` if it cannot happen now.
    pub fn after(&self, setting: &Setting, timer: Timer, event: Event) -> Option<Quiet> {
        let mut next = self.clone();
        match event {
            Event::Connect { denied } => {
                let clients = &self.world.clients;
                let number = clients
                    .iter()
                    .position(|client| *client == Client::Absent)?;
                *next.denied.get_mut(number)? = denied;
                if denied && !setting.denies {
                    return None;
                }
            }
            Event::Drain(reaction) => next.on_drain = reaction,
            _ => {}
        }
        let Some(action) = event.action() else {
            let passes = next.let_time_pass(setting, timer);
            return (passes && next.run(setting, None)).then_some(next);
        };
        let reaction = match event {
            Event::SendWhole(client, reaction) | Event::HalfClose(client, reaction) => {
                Some((client, reaction))
            }
            _ => None,
        };
        (next.take(setting, action) && next.run(setting, reaction)).then_some(next)
    }

    /// Lets the short deadlines pass. False if none is in force.
    fn let_time_pass(&mut self, setting: &Setting, timer: Timer) -> bool {
        let draining = self.world.drain == Drain::Running;
        // The code gives up a drain earlier if no connection is left whose end would make room.
        let waits = draining && self.world.listener.state != State::Closed;
        if waits && self.world.open() == 0 {
            return false;
        }
        let mut passed = false;
        let before = self.world.clone();
        for (number, conn) in before.connections() {
            let deadline = match (timer, conn.life) {
                (Timer::Handshake, _) => Deadline::Handshake,
                // A drain leaves less time to a handshake than to the rest.
                (Timer::Drain, Life::Accepting | Life::Handshaking) if draining => {
                    Deadline::Handshake
                }
                (Timer::FirstFrame, _) => Deadline::FirstFrame,
                (Timer::Frame, _) => Deadline::Frame,
                (Timer::Idle, _) => Deadline::Idle,
                (Timer::Write, Life::Closing(closing)) if closing.output => Deadline::Closing,
                (Timer::Write, Life::Open(_)) => Deadline::Write,
                (Timer::Linger, Life::Closing(closing)) if !closing.output => Deadline::Closing,
                _ => continue,
            };
            passed |= self.take(setting, Action::Expire(number, deadline));
            // The timer has found that the deadline had moved: it passes, too.
            let had_moved = matches!(conn.life, Life::Open(open) if open.idle_moved);
            if had_moved && deadline == Deadline::Idle {
                self.take(setting, Action::Expire(number, deadline));
            }
        }
        if timer == Timer::Retry {
            passed |= self.take(setting, Action::RetryAccept);
        }
        if timer == Timer::Drain && draining {
            if passed {
                // The next clients come, and have the same time for their handshakes.
                self.run(setting, None);
                self.let_time_pass(setting, timer);
            }
            passed |= self.take(setting, Action::DrainOver);
        }
        passed
    }

    /// Runs the loop until it waits. False if the reaction is not possible.
    fn run(&mut self, setting: &Setting, mut reaction: Option<(usize, Reaction)>) -> bool {
        loop {
            let denied = self
                .world
                .waiting()
                .next()
                .is_some_and(|number| self.denied[number]);
            let accept = if denied {
                Action::AcceptDenied
            } else {
                Action::Accept
            };
            // A drain accepts the backlog first.
            if self.world.listener.draining && self.take(setting, accept) {
                continue;
            }
            let Some((number, action)) = self.next_turn(setting, reaction) else {
                if self.take(setting, accept) {
                    continue;
                }
                return true;
            };
            if !self.is_asked_to_drain(number)
                && reaction.is_some_and(|(client, _)| client == number)
            {
                reaction = None;
            }
            if !self.take(setting, action) {
                return false;
            }
        }
    }

    /// The handler is asked because of the drain.
    fn is_asked_to_drain(&self, number: usize) -> bool {
        let draining = self.world.drain == Drain::Running;
        match &self.world.clients[number] {
            Client::Connected(Conn {
                life: Life::Open(open),
                wire: Wire::Nothing,
                ..
            }) => draining && !open.notified,
            _ => false,
        }
    }

    fn next_turn(
        &self,
        setting: &Setting,
        reaction: Option<(usize, Reaction)>,
    ) -> Option<(usize, Action)> {
        let mut actions = Vec::new();
        setting.actions(&self.world, &mut actions);
        let number = actions.iter().find_map(|action| match action {
            Action::Turn(number, _) => Some(*number),
            _ => None,
        })?;
        let chosen = match reaction {
            _ if self.is_asked_to_drain(number) => self.on_drain,
            Some((client, reaction)) if client == number => reaction,
            _ => Reaction::Proceed,
        };
        Some((number, Action::Turn(number, chosen)))
    }

    /// The changes between two worlds that wait.
    fn changes<'a>(
        &'a self,
        next: &'a Quiet,
        timer: Timer,
        event: Event,
    ) -> impl Iterator<Item = Change> + 'a {
        let timer = if event == Event::TimePasses {
            timer
        } else {
            Timer::Handshake
        };
        let (from, to) = (self.world.listener.state, next.world.listener.state);
        let listener = Change::Listener(from, event.seen_by(usize::MAX), timer, to);
        let pairs = self
            .world
            .clients
            .iter()
            .zip(&next.world.clients)
            .enumerate();
        let clients = pairs.filter_map(move |(number, (before, after))| {
            let (from, to) = (Stage::of(before), Stage::of(after));
            let concerned = from != to || event.client() == Some(number);
            concerned.then(|| Change::Client(from, event.seen_by(number), timer, to))
        });
        std::iter::once(listener).chain(clients)
    }
}

/// The model's worlds that wait, with the shortest events to each.
pub struct Waits {
    pub ways: Vec<Vec<Event>>,
    pub changes: BTreeSet<Change>,
}

/// Visits all worlds that wait. `ways` lead over each step between two of them, or once over each
/// change only.
pub fn visit(setting: &Setting, timer: Timer, each_step: bool) -> Waits {
    let mut waits = Waits {
        ways: Vec::new(),
        changes: BTreeSet::new(),
    };
    let Some(start) = Quiet::new(setting) else {
        return waits;
    };
    let events = Event::all(setting.clients);
    let mut ways = HashMap::from([(start.clone(), Vec::new())]);
    let mut queue = VecDeque::from([start]);
    while let Some(quiet) = queue.pop_front() {
        let mut enabled = Vec::new();
        setting.actions(&quiet.world, &mut enabled);
        for event in &events {
            let event = *event;
            if event
                .action()
                .is_some_and(|action| !enabled.contains(&action))
            {
                continue;
            }
            let Some(next) = quiet.after(setting, timer, event) else {
                continue;
            };
            let mut way = ways[&quiet].clone();
            way.push(event);
            let mut fresh = each_step;
            for change in quiet.changes(&next, timer, event) {
                fresh |= waits.changes.insert(change);
            }
            if fresh {
                waits.ways.push(way.clone());
            }
            if !ways.contains_key(&next) {
                ways.insert(next.clone(), way);
                queue.push_back(next);
            }
        }
    }
    waits
}
