//! The connection's turn, as `reactor/turn.rs` gives it, and the handler in it.

use std::io;
use std::time::Duration;

use super::socket::Silence;
use super::{violation, Checked, ConnModel};
use crate::proto::{Event, NextStep, SendError, Staged, State};
use crate::reason::{Close, CloseReason, Closed};
use crate::sim::input::{Action, End, Told};
use crate::sim::Violation;

/// What one read can bring at most, as in the reactor.
const READ_SIZE: usize = 64 * 1024;
/// Rounds of one turn that no connection needs.
pub(super) const SPIN: usize = 100_000;

impl ConnModel {
    /// At most so many rounds. [`SPIN`] is a whole turn.
    pub(super) fn run_turn(&mut self, rounds: usize) -> Checked {
        for round in 0..rounds {
            let progress = self.read()?;
            self.flush()?;
            self.next_step()?;
            self.machine.slim(&mut self.pool);
            let comes_back = progress || self.machine.has_events() || self.can_read() || self.can_write();
            if self.oracle.end.is_some() || !comes_back {
                return self.check();
            }
            if round + 1 == SPIN {
                return Err(violation("a turn does not end"));
            }
        }
        Ok(())
    }

    /// A turn, then what is due by now.
    pub(super) fn judge(&mut self) -> Checked {
        self.run_turn(SPIN)?;
        if self.oracle.end.is_some() {
            return Ok(());
        }
        if self.machine.is_unsent_since(self.now) && !self.socket.writable {
            self.socket.writable = true;
            self.flush()?;
        }
        if self.machine.deadline() <= self.now {
            // RST, whatever reason was known before.
            self.oracle.forced |= self.machine.is_unsent_since(self.now);
            self.machine.handle_timeout(self.now, self.now, &mut self.pool);
        }
        self.run_turn(SPIN)
    }

    fn can_read(&self) -> bool {
        let ready = self.socket.readable || self.machine.wants_fresh_blocked() || self.machine.has_set_aside();
        ready && self.machine.wants_read()
    }

    fn can_write(&self) -> bool {
        self.socket.writable && self.machine.sendable() > 0
    }

    fn read(&mut self) -> Result<bool, Violation> {
        if self.socket.readable && self.machine.wants_error() {
            self.socket.readable = false;
            if let Some(errno) = self.socket.write_error() {
                let error = io::Error::from_raw_os_error(errno);
                self.machine.handle_write_error(error, &mut self.pool);
                return Ok(false);
            }
        }
        let mut plain = std::mem::take(&mut self.plain);
        let outcome = self.read_into(&mut plain);
        self.plain = plain;
        outcome
    }

    fn read_into(&mut self, plain: &mut Vec<u8>) -> Result<bool, Violation> {
        if self.machine.has_events() {
            let staged = self.machine.stage_held();
            self.deliver(staged)?;
            return Ok(true);
        }
        if !self.can_read() {
            return Ok(false);
        }
        if self.machine.has_set_aside() {
            let staged = self.machine.handle_set_aside(self.now, plain, &mut self.pool);
            self.deliver(staged)?;
            return Ok(true);
        }
        let room = self.machine.read_allowance(self.now).min(READ_SIZE);
        if room == 0 {
            return Ok(false);
        }
        let mut wire = std::mem::take(&mut self.socket.inbox);
        let staged = if !wire.is_empty() {
            let rest = wire.split_off(wire.len().min(room));
            self.socket.inbox = rest;
            if wire.len() < room && !self.socket.hang_up && !self.machine.wants_fresh_blocked() {
                self.socket.readable = false;
            }
            self.machine.handle_input(self.now, &mut wire, plain, &mut self.pool)
        } else {
            self.socket.readable = false;
            match self.socket.silence() {
                Silence::Blocked => self.machine.handle_blocked(&mut self.pool),
                Silence::End => self.machine.handle_eof(self.now, &mut self.pool),
                Silence::Error(errno) => {
                    let error = io::Error::from_raw_os_error(errno);
                    self.machine.handle_read_error(error, &mut self.pool);
                }
            }
            Staged::nothing()
        };
        self.deliver(staged)?;
        Ok(true)
    }

    fn deliver(&mut self, mut staged: Staged<'_>) -> Checked {
        self.note_state()?;
        while let Some(event) = self.machine.next_event(&mut staged, self.now, &mut self.pool) {
            let Some(told) = told(event) else {
                self.machine.handle_admitted(self.now, &mut self.pool);
                continue;
            };
            self.oracle.sees_event(&told)?;
            match &told {
                Told::Frame(frame) if self.upgrades_at(frame) => {}
                Told::Frame(frame) => {
                    for action in self.script.on_frame.clone() {
                        if !self.perform(action, frame)? {
                            break;
                        }
                    }
                }
                Told::Finished | Told::Drain => {
                    for action in self.script.on_end.clone() {
                        if !self.perform(action, &[])? {
                            break;
                        }
                    }
                }
                Told::Timer(_) => {
                    self.perform(Action::Resume, &[])?;
                }
                Told::Opened | Told::Secured | Told::Writable => {}
            }
            self.told.push(told);
        }
        self.machine.settle(staged, self.now, &mut self.pool);
        self.note_state()
    }

    fn flush(&mut self) -> Checked {
        loop {
            let bytes = self.machine.transmit(&mut self.pool);
            if bytes.is_empty() {
                break;
            }
            if !self.socket.writable {
                self.machine.handle_unsent(self.now);
                break;
            }
            if self.socket.fin_sent {
                return Err(violation("it writes behind its FIN"));
            }
            if let Some(errno) = self.socket.write_error() {
                let error = io::Error::from_raw_os_error(errno);
                self.machine.handle_write_error(error, &mut self.pool);
                self.socket.readable = true;
                self.oracle.sees_dead();
                break;
            }
            let count = self.socket.take(bytes.len());
            if count == 0 {
                continue;
            }
            let taken = bytes.get(..count).unwrap_or_default();
            self.oracle.sees_sent(taken)?;
            self.sent.extend_from_slice(taken);
            self.machine.handle_sent(count, self.now, &mut self.pool);
            let open = self.machine.is_established();
            self.oracle.sees_room(&self.limits, self.machine.owed(), open);
        }
        self.note_state()
    }

    fn next_step(&mut self) -> Checked {
        if self.machine.next_step() == NextStep::Shutdown {
            if self.socket.fin_sent {
                return Err(violation("a second FIN"));
            }
            let sent = self.socket.shutdown();
            self.machine.handle_shutdown(self.now, sent);
        }
        if let NextStep::Gone { reset } = self.machine.next_step() {
            let reason = self.machine.take_closed().reason;
            self.oracle.sees_end(End { reason, reset })?;
        }
        self.note_state()
    }

    /// Does one action. False if the callback ends with it.
    pub(super) fn perform(&mut self, action: Action, frame: &[u8]) -> Result<bool, Violation> {
        let (now, pool) = (self.now, &mut self.pool);
        match action {
            Action::Echo => self.send(frame)?,
            Action::Send(length) => self.send(&vec![b's'; usize::from(length)])?,
            Action::Pause => {
                self.machine.pause(now);
                // Who can be told nothing more is read to its end, whatever the handler wishes.
                self.oracle.paused = self.machine.has_paused();
            }
            Action::Resume => {
                self.machine.resume(now);
                self.oracle.paused = false;
            }
            Action::Close => self.machine.close_by_handler(now, pool),
            Action::CloseAfterInput => self.machine.close_after_input(),
            Action::Finish => {
                if self.machine.is_established() || self.machine.is_connecting() {
                    self.oracle.sees_goodbye();
                }
                self.machine.finish();
            }
            Action::Abort => {
                self.oracle.forced = true;
                self.machine.reset(Closed::new(CloseReason::Aborted), pool);
            }
            Action::Fail => {
                self.machine.close_as(Close::because("as planned"), now, pool);
                return Ok(false);
            }
            Action::Panic => {
                self.machine.close(Closed::new(CloseReason::Panicked), now, pool);
                return Ok(false);
            }
            Action::Timer(millis) => {
                let at = now.after(Duration::from_millis(u64::from(millis)));
                self.machine.set_timer(0, at);
            }
            Action::Framing(number) => {
                self.machine.set_framing(&Action::framing(number));
                self.oracle.framing = self.oracle.framing.map(|_| number % 6);
            }
            Action::MaxFrame(bytes) => self.machine.set_max_frame(usize::from(bytes)),
        }
        self.note_state()?;
        Ok(true)
    }

    /// Whether this frame is the command to upgrade.
    #[cfg(feature = "tls")]
    fn upgrades_at(&mut self, frame: &[u8]) -> bool {
        let Some((_, config)) = self.upgrade.take_if(|(payload, _)| payload == frame) else {
            return false;
        };
        if self.machine.start_tls(&config, self.now, &mut self.pool).is_ok() {
            self.oracle.sees_upgrade();
        }
        true
    }

    #[cfg(not(feature = "tls"))]
    fn upgrades_at(&mut self, _: &[u8]) -> bool {
        debug_assert!(self.upgrade.is_none(), "there is nothing to upgrade to");
        false
    }

    fn send(&mut self, payload: &[u8]) -> Checked {
        let before = self.machine.owed();
        let taken = match self.machine.send(payload, self.now, &mut self.pool) {
            Ok(()) => true,
            Err(SendError::Full { .. }) => false,
            Err(_) => return Ok(()),
        };
        let queued = self.machine.owed();
        self.oracle.sees_send(&self.limits, payload, taken, before, queued)
    }

    /// At the end of a whole turn.
    fn check(&self) -> Checked {
        if self.oracle.end.is_some() {
            return Ok(());
        }
        if let Some(fault) = self.machine.broken_invariant(READ_SIZE, false) {
            return Err(Violation(fault));
        }
        let flushed = self.machine.state() == State::Open && self.machine.queued() == 0;
        let alive = self.socket.write_error().is_none();
        if self.oracle.has_said_goodbye() && flushed && alive && !self.socket.fin_sent {
            return Err(violation("FIN is due"));
        }
        Ok(())
    }

    pub(super) fn note_state(&mut self) -> Checked {
        let (from, to) = (self.last_state, self.machine.state());
        if from == to {
            return Ok(());
        }
        self.transitions.push((from, to));
        self.last_state = to;
        if from.may_become(to) {
            Ok(())
        } else {
            Err(Violation(format!("{from} became {to}")))
        }
    }
}

/// `None`: the service is asked.
fn told(event: Event<'_>) -> Option<Told> {
    Some(match event {
        Event::Header => return None,
        Event::Opened => Told::Opened,
        Event::Secured => Told::Secured,
        Event::Frame(frame) => Told::Frame(frame.to_vec()),
        Event::Finished => Told::Finished,
        Event::Writable => Told::Writable,
        Event::Timer(key) => Told::Timer(key),
        Event::Drain => Told::Drain,
    })
}
