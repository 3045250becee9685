//! The beginning of an outgoing connection: from the first attempt until it is there.

use std::rc::Rc;

use super::framing::Framing;
use super::state::{Flags, Limits, State};
use super::{tls, Machine, Pool, Throttle, Time};
use crate::reason::{CloseReason, Closed};

impl Machine {
    /// One that the server makes. It has a handler from the beginning.
    pub(crate) fn connecting(framing: &Framing, limits: Rc<Limits>, now: Time) -> Self {
        let mut machine = Self::blank(State::Connecting, framing, limits, now);
        machine.flags.set(Flags::OUTGOING);
        machine.flags.set(Flags::ADMITTED);
        machine.set_throttle(Throttle::new(&machine.limits, &Default::default()));
        machine
    }

    /// The server has made it, or is to.
    pub(crate) fn is_outgoing(&self) -> bool {
        self.flags.has(Flags::OUTGOING)
    }

    pub(crate) fn is_connecting(&self) -> bool {
        self.state == State::Connecting
    }

    /// When the attempt that is under way has taken too long, or the next one begins.
    pub(crate) fn set_connect_deadline(&mut self, when: Time) {
        if self.is_connecting() {
            self.deadlines.stage = when;
        }
    }

    /// It is connected: TLS begins, if there is to be any, else it is open.
    pub(crate) fn handle_connected(&mut self, tls: Option<&tls::ClientTls>, now: Time, pool: &mut Pool) {
        if !self.is_connecting() {
            return;
        }
        self.last_input = now;
        let Some(config) = tls else {
            return self.open(now);
        };
        match tls::Session::client(config, Default::default(), pool) {
            Ok(session) => {
                self.tls = Some(Box::new(session));
                self.enter(State::Handshaking);
                self.deadlines.stage = now.after(self.limits.handshake_timeout);
            }
            Err(error) => {
                let error: Box<dyn std::error::Error> = error;
                self.end(Closed::with(CloseReason::TlsHandshake, error), pool);
            }
        }
    }

    /// The handler may send: it is open, or will be and keeps what it is sent until then.
    pub(super) fn takes_output(&self) -> bool {
        match self.state {
            State::Connecting => true,
            State::Handshaking => self.was_open() || self.is_outgoing(),
            State::Open => true,
            State::Accepting | State::Closing => false,
        }
    }
}
