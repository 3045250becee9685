//! The listener of the model.

use crate::{Fault, Setting};

/// The states of section 4.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum State {
    Listening,
    Full,
    OutOfFds,
    Suspended,
    Closed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Listener {
    pub state: State,
    /// The poll reports its clients.
    pub registered: bool,
    /// Accept is due: it takes no event from the poll.
    pub ready: bool,
    /// The wait for descriptors has not passed, whether or not the listener is suspended as well.
    pub deadline: bool,
    /// It accepts the backlog, and closes.
    pub draining: bool,
    /// It was closed before. Nothing but a property reads it.
    pub was_closed: bool,
}

impl Listener {
    pub fn new() -> Listener {
        Listener {
            state: State::Listening,
            registered: true,
            ready: false,
            deadline: false,
            draining: false,
            was_closed: false,
        }
    }

    /// A client has connected: an edge, if the poll reports it.
    pub fn client(&mut self) {
        self.ready |= self.registered;
    }

    /// Leaves the poll.
    pub fn leave(&mut self, setting: &Setting, state: State) {
        self.state = state;
        self.registered = setting.has(Fault::WaitsRegistered);
        self.ready = setting.has(Fault::SpinsWhenFull) && state == State::Full;
        self.was_closed |= state == State::Closed;
    }

    /// Accept found no descriptor.
    pub fn pause(&mut self, setting: &Setting) {
        self.leave(setting, State::OutOfFds);
        self.deadline = !setting.has(Fault::PauseWithoutTimer);
    }

    /// Registers, and tries accept at once.
    pub fn listen(&mut self, setting: &Setting) {
        self.state = State::Listening;
        self.registered = true;
        self.ready = !setting.has(Fault::ReliesOnEdge);
    }

    pub fn resume(&mut self, setting: &Setting) {
        if self.deadline {
            self.state = State::OutOfFds;
        } else {
            self.listen(setting);
        }
    }

    /// The interval is over, or a descriptor of ours is free again.
    pub fn end_pause(&mut self, setting: &Setting) {
        self.deadline = false;
        if self.state == State::OutOfFds {
            self.listen(setting);
        }
    }

    /// The cap is reached, or is not any more. `full` if a client more has neither a slot nor a
    /// connection that can be
    /// evicted for it.
    pub fn follow_cap(&mut self, setting: &Setting, full: bool) {
        match self.state {
            State::Listening if full => self.leave(setting, State::Full),
            State::Full if !full && !setting.has(Fault::SlotDoesNotWake) => self.listen(setting),
            _ => {}
        }
    }

    pub fn close(&mut self, setting: &Setting) {
        self.leave(setting, State::Closed);
        self.deadline = false;
    }
}

impl Default for Listener {
    fn default() -> Self {
        Listener::new()
    }
}
