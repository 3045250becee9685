//! The world of the model: one listener, its clients, the kernel, the owner, and the time.

use stateright::Model;

use crate::connection::{Conn, Deadline, Fate, Life, Reaction, Reason, Step, Wire};
use crate::listener::{Listener, State};
use crate::{Fault, Flaw, Setting};

/// Clients of the largest world.
pub const MAX_CLIENTS: usize = 4;

/// One client. Clients connect in the order of their numbers: that is no loss, since nothing else
/// tells them apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Client {
    Absent,
    /// In the backlog.
    Waiting,
    Connected(Conn),
    /// Why, if the setting asks for it.
    Gone(Option<Reason>),
}

/// Whether the server drains.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Drain {
    No,
    Running,
    /// Its deadline has passed, or the server was stopped.
    Over,
}

/// A state of the world.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct World {
    pub listener: Listener,
    pub clients: [Client; MAX_CLIENTS],
    pub drain: Drain,
    /// Descriptors that the process uses elsewhere.
    pub foreign_fds: u8,
    // What follows is counted for the properties; nothing else reads it.
    /// Descriptors that the server has open for connections.
    pub fds: u8,
    /// Connections accepted, less the sum of the counters of all reasons.
    pub balance: i8,
    /// Calls of `on_open` without a call of `on_close`.
    pub handlers: i8,
    pub flaw: Option<Flaw>,
}

/// What may happen next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Action {
    // The peers. A silent one does nothing of this any more.
    Connect,
    /// A client in the backlog gives up.
    GiveUp(usize),
    SendPart(usize),
    SendWhole(usize),
    HalfClose(usize),
    Reset(usize),
    /// The peer takes pending output.
    TakeOutput(usize),
    // The kernel.
    TakeFd,
    FreeFd,
    // The loop.
    Accept,
    /// The listener accepts a client whom the access rules deny.
    AcceptDenied,
    Turn(usize, Reaction),
    // Handlers, outside their connection's turn.
    Local(usize, Reaction),
    // The time.
    Expire(usize, Deadline),
    RetryAccept,
    DrainOver,
    // The owner.
    Suspend,
    Resume,
    CloseListener,
    Drain,
    Stop,
}

impl World {
    /// The backlog, in order.
    pub fn waiting(&self) -> impl Iterator<Item = usize> {
        let clients = self.clients.iter().enumerate();
        clients
            .filter(|(_, client)| **client == Client::Waiting)
            .map(|(number, _)| number)
    }

    fn first_waiting(&self) -> Option<usize> {
        self.waiting().next()
    }

    pub fn connections(&self) -> impl Iterator<Item = (usize, &Conn)> {
        self.clients
            .iter()
            .enumerate()
            .filter_map(|(number, client)| match client {
                Client::Connected(conn) => Some((number, conn)),
                _ => None,
            })
    }

    pub fn open(&self) -> usize {
        self.connections().count()
    }

    /// Whether a connection more would have a slot and a descriptor.
    pub fn has_room(&self, setting: &Setting) -> bool {
        self.open() < setting.cap && self.has_fd(setting)
    }

    fn has_fd(&self, setting: &Setting) -> bool {
        self.fds + self.foreign_fds < setting.fds
    }

    fn draining(&self) -> bool {
        self.drain == Drain::Running
    }

    fn flawed(&mut self, flaw: Flaw) {
        self.flaw.get_or_insert(flaw);
    }

    /// Accepts the first client in the backlog.
    fn admit(&mut self, setting: &Setting, number: usize) {
        if self.listener.state == State::Closed {
            self.flawed(Flaw::AcceptedWhenClosed);
        }
        self.balance += 1;
        self.fds += 1;
        let conn = Conn::accepted(setting);
        self.handlers += i8::from(conn.opened());
        self.clients[number] = Client::Connected(conn);
    }

    /// Accepts the first client in the backlog and closes it at once: counted, but no connection is
    /// made of it.
    fn turn_away(&mut self, setting: &Setting, number: usize, reason: Reason) {
        self.clients[number] = Client::Gone(setting.reasons.then_some(reason));
    }

    /// Carries out a step of connection `number`.
    fn settle(&mut self, setting: &Setting, number: usize, step: Step) {
        let Client::Connected(before) = self.clients[number] else {
            return;
        };
        if let Some(flaw) = step.flaw {
            self.flawed(flaw);
        }
        match step.fate {
            Fate::Lives(conn) => {
                self.handlers += i8::from(conn.opened()) - i8::from(before.opened());
                self.clients[number] = Client::Connected(conn);
            }
            Fate::Ended(reason) => {
                let twice = setting.has(Fault::CountsTwice) && reason == Reason::Reset;
                let forgets = setting.has(Fault::ForgetsOnClose) && reason == Reason::Aborted;
                let leaks = setting.has(Fault::LeaksDescriptor) && reason == Reason::ClosedEarly;
                self.balance -= if twice { 2 } else { 1 };
                self.handlers -= i8::from(before.opened() && !forgets);
                self.fds -= u8::from(!leaks);
                self.clients[number] = Client::Gone(setting.reasons.then_some(reason));
                self.listener.end_pause(setting);
            }
        }
    }

    fn cut_short(&mut self, setting: &Setting, number: usize, reason: Reason) {
        if let Client::Connected(conn) = self.clients[number] {
            self.settle(setting, number, conn.cut_short(reason));
        }
    }

    fn end_all(&mut self, setting: &Setting, reason: Reason) {
        for number in 0..MAX_CLIENTS {
            self.cut_short(setting, number, reason);
        }
    }

    /// The oldest connection that may be evicted.
    fn evictable(&self) -> Option<usize> {
        self.connections()
            .find(|(_, conn)| conn.evictable && conn.pending())
            .map(|(number, _)| number)
    }

    /// A client more has neither a slot nor a connection that can be evicted for it.
    fn is_full(&self, setting: &Setting) -> bool {
        let cap = setting.cap + usize::from(setting.has(Fault::CapOffByOne));
        self.open() >= cap && self.evictable().is_none()
    }

    /// One try of accept.
    fn accept(&mut self, setting: &Setting, denied: bool) {
        // Both are checked before the kernel looks for a client.
        if self.is_full(setting) && !setting.refuses {
            return;
        }
        if !self.has_fd(setting) {
            return self.listener.pause(setting);
        }
        let Some(number) = self.first_waiting() else {
            self.listener.ready = false;
            return;
        };
        // Denied clients cost no slot, and refused ones neither.
        if denied {
            return self.turn_away(setting, number, Reason::Denied);
        }
        if self.is_full(setting) {
            return self.turn_away(setting, number, Reason::AtCapacity);
        }
        if self.open() >= setting.cap && !setting.has(Fault::CapOffByOne) {
            self.evict(setting);
        }
        self.admit(setting, number);
    }

    fn evict(&mut self, setting: &Setting) {
        if let Some(number) = self.evictable() {
            self.cut_short(setting, number, Reason::Evicted);
        }
    }

    /// What follows from the new state without waiting for anything.
    fn follow(&mut self, setting: &Setting) {
        let full = self.is_full(setting) && !setting.refuses;
        self.listener.follow_cap(setting, full);
        // The drain has accepted the backlog.
        if self.listener.draining
            && self.listener.state != State::Closed
            && self.first_waiting().is_none()
        {
            self.close_listener(setting);
        }
    }

    /// The port is closed: the kernel resets the backlog.
    fn close_listener(&mut self, setting: &Setting) {
        self.listener.close(setting);
        if setting.has(Fault::AcceptsWhenClosed) {
            self.listener.ready = true;
            return;
        }
        for client in self
            .clients
            .iter_mut()
            .filter(|client| **client == Client::Waiting)
        {
            *client = Client::Gone(None);
        }
    }

    /// Accepts the backlog, a suspended listener's as well.
    fn drain(&mut self, setting: &Setting) {
        self.drain = Drain::Running;
        self.listener.draining = true;
        if self.listener.state == State::Suspended {
            self.listener.resume(setting);
        }
        if setting.has(Fault::DrainForgetsBacklog) {
            if self.first_waiting().is_some() && self.has_room(setting) {
                self.flawed(Flaw::AbandonedBacklog);
            }
            self.close_listener(setting);
        }
    }

    fn push_peers(&self, setting: &Setting, actions: &mut Vec<Action>) {
        for (number, client) in self.clients.iter().enumerate().take(setting.clients) {
            match client {
                Client::Absent if self.listener.state != State::Closed => {
                    actions.push(Action::Connect);
                    return;
                }
                Client::Absent => return,
                Client::Waiting => actions.push(Action::GiveUp(number)),
                Client::Connected(conn) => self.push_peer(number, conn, actions),
                Client::Gone(_) => {}
            }
        }
    }

    fn push_peer(&self, number: usize, conn: &Conn, actions: &mut Vec<Action>) {
        if conn.wire != Wire::Reset {
            actions.push(Action::Reset(number));
            if conn.take_output().is_some() {
                actions.push(Action::TakeOutput(number));
            }
        }
        if !conn.half_closed && conn.wire != Wire::Reset {
            actions.push(Action::HalfClose(number));
            if conn.wire == Wire::Nothing {
                actions.push(Action::SendPart(number));
                if !matches!(conn.life, Life::Closing(_)) {
                    actions.push(Action::SendWhole(number));
                }
            }
        }
    }

    fn push_server(&self, setting: &Setting, actions: &mut Vec<Action>) {
        let listening =
            self.listener.state == State::Listening || setting.has(Fault::AcceptsWhenClosed);
        if self.listener.ready && (listening || setting.has(Fault::SpinsWhenFull)) {
            actions.push(Action::Accept);
            if setting.denies && self.first_waiting().is_some() {
                actions.push(Action::AcceptDenied);
            }
        }
        if self.listener.deadline {
            actions.push(Action::RetryAccept);
        }
        for (number, conn) in self.connections() {
            if conn.has_turn(self.draining()) {
                let reactions = conn.reactions(setting, self.draining());
                actions.extend(
                    reactions
                        .iter()
                        .map(|reaction| Action::Turn(number, *reaction)),
                );
            }
            actions.extend(
                conn.deadlines(setting)
                    .map(|deadline| Action::Expire(number, deadline)),
            );
            if setting.local && matches!(conn.life, Life::Open(_)) {
                for reaction in [
                    Reaction::Send,
                    Reaction::Close,
                    Reaction::Abort,
                    Reaction::Panic,
                ] {
                    actions.push(Action::Local(number, reaction));
                }
            }
        }
        if self.draining() && !setting.has(Fault::DrainHasNoDeadline) {
            actions.push(Action::DrainOver);
        }
    }

    fn push_kernel_and_owner(&self, setting: &Setting, actions: &mut Vec<Action>) {
        if setting.foreign && self.foreign_fds == 0 && self.has_fd(setting) {
            actions.push(Action::TakeFd);
        }
        if self.foreign_fds > 0 {
            actions.push(Action::FreeFd);
        }
        if !setting.owner {
            return;
        }
        match self.listener.state {
            State::Suspended => actions.push(Action::Resume),
            // A drain accepts the backlog of a suspended listener, too.
            State::Listening | State::Full | State::OutOfFds if self.listener.draining => {}
            State::Listening | State::Full | State::OutOfFds => actions.push(Action::Suspend),
            State::Closed if setting.has(Fault::ResumesWhenClosed) => actions.push(Action::Resume),
            State::Closed => {}
        }
        if self.listener.state != State::Closed {
            actions.push(Action::CloseListener);
        }
        if self.drain == Drain::No {
            actions.push(Action::Drain);
        }
        if self.drain != Drain::Over {
            actions.push(Action::Stop);
        }
    }

    fn apply(&mut self, setting: &Setting, action: Action) {
        let (Action::SendPart(number)
        | Action::SendWhole(number)
        | Action::HalfClose(number)
        | Action::Reset(number)
        | Action::TakeOutput(number)
        | Action::Turn(number, _)
        | Action::Local(number, _)
        | Action::Expire(number, _)) = action
        else {
            return self.apply_elsewhere(setting, action);
        };
        let Client::Connected(mut conn) = self.clients[number] else {
            return;
        };
        let draining = self.draining();
        let step = match action {
            Action::Turn(_, reaction) => conn.turn(setting, reaction, draining),
            Action::Local(_, reaction) => conn.local(setting, reaction, draining),
            Action::Expire(_, deadline) => conn.expire(setting, deadline),
            Action::TakeOutput(_) => Fate::Lives(conn.take_output().unwrap_or(conn)).into(),
            _ => {
                match action {
                    Action::SendPart(_) => conn.wire = Wire::Part,
                    Action::SendWhole(_) => conn.wire = Wire::Whole,
                    Action::Reset(_) => conn.wire = Wire::Reset,
                    _ => conn.half_closed = true,
                }
                Fate::Lives(conn).into()
            }
        };
        self.settle(setting, number, step);
    }

    fn apply_elsewhere(&mut self, setting: &Setting, action: Action) {
        match action {
            Action::Connect => {
                let next = self
                    .clients
                    .iter()
                    .position(|client| *client == Client::Absent);
                if let Some(client) = next.and_then(|next| self.clients.get_mut(next)) {
                    *client = Client::Waiting;
                    self.listener.client();
                }
            }
            Action::GiveUp(number) => self.clients[number] = Client::Gone(None),
            Action::TakeFd => self.foreign_fds += 1,
            Action::FreeFd => self.foreign_fds -= 1,
            Action::Accept => self.accept(setting, false),
            Action::AcceptDenied => self.accept(setting, true),
            Action::RetryAccept => self.listener.end_pause(setting),
            Action::Resume => self.listener.resume(setting),
            Action::Suspend => self.listener.leave(setting, State::Suspended),
            Action::CloseListener => self.close_listener(setting),
            Action::Drain => self.drain(setting),
            Action::DrainOver => {
                self.drain = Drain::Over;
                self.close_listener(setting);
                self.end_all(setting, Reason::DrainTimeout);
            }
            Action::Stop => {
                self.drain = Drain::Over;
                self.close_listener(setting);
                self.end_all(setting, Reason::Stopped);
            }
            _ => {}
        }
    }
}

impl Model for Setting {
    type State = World;
    type Action = Action;

    fn init_states(&self) -> Vec<World> {
        vec![World {
            listener: Listener::new(),
            clients: [Client::Absent; MAX_CLIENTS],
            drain: Drain::No,
            foreign_fds: 0,
            fds: 0,
            balance: 0,
            handlers: 0,
            flaw: None,
        }]
    }

    fn actions(&self, world: &World, actions: &mut Vec<Action>) {
        // What comes after a flaw says nothing more.
        if world.flaw.is_none() {
            world.push_peers(self, actions);
            world.push_server(self, actions);
            world.push_kernel_and_owner(self, actions);
        }
    }

    fn next_state(&self, world: &World, action: Action) -> Option<World> {
        let mut next = world.clone();
        next.apply(self, action);
        next.follow(self);
        Some(next)
    }

    fn properties(&self) -> Vec<stateright::Property<Self>> {
        crate::safety::properties()
    }
}
