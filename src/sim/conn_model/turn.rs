//! The connection's turn and the handler in it: a host of the reactor's engine.

use std::time::Duration;

use super::oracle::{violation, Checked};
use super::ConnModel;
use crate::catch::Panic;
use crate::proto::{Chunk, Event, FrameBuf, InputCursor, SendError, State};
use crate::reactor::drive::{drive, Budget, Host, Parts, Scratch, READ_SIZE};
use crate::reason::{Close, CloseReason, Closed};
use crate::sim::input::{Action, Callback, End};
use crate::sim::Violation;

use super::socket::ModelOs;

/// Turns in a row that no connection needs.
const SPIN: usize = 100_000;

impl ConnModel {
    /// Turns until nothing is left to do.
    pub(super) fn run_turns(&mut self) -> Checked {
        for _ in 0..SPIN {
            self.run_turn(&mut Budget::new(READ_SIZE))?;
            if self.oracle.end.is_some() || !self.again {
                return self.check();
            }
        }
        Err(violation("a turn does not end"))
    }

    /// One turn with a budget.
    pub(super) fn run_turn(&mut self, budget: &mut Budget) -> Checked {
        self.again = false;
        // Longer than the input by one: a full buffer is not the end of the input.
        let unread = self
            .conn
            .stream
            .as_ref()
            .map_or(0, |socket| socket.inbox.len());
        let mut scratch = Scratch {
            wire: vec![0; (unread + 1).min(READ_SIZE)],
            plain: std::mem::take(&mut self.plain),
        };
        drive(self, &mut scratch, budget);
        self.plain = scratch.plain;
        if std::mem::take(&mut self.kernel.rearmed) {
            (self.conn.writable, self.again) = (true, true);
        }
        self.observe();
        self.take_fault()
    }

    /// A turn, then what is due by now, then a turn.
    pub(super) fn expire_due(&mut self) -> Checked {
        self.run_turns()?;
        if self.oracle.end.is_some() {
            return Ok(());
        }
        let now = self.kernel.now;
        // A write timeout is a reason for RST.
        self.oracle.forced |= self.conn.machine.is_write_overdue(now);
        let Self {
            conn,
            kernel,
            pool,
            now: turn_now,
            ..
        } = self;
        conn.expire(kernel, pool, turn_now, now);
        self.run_turns()
    }

    /// Records what has changed since the last look.
    fn observe(&mut self) {
        let noted = self.note_state();
        self.keep_fault(noted);
        if let Some(fault) = self.kernel.fault.take() {
            self.keep_fault(Err(violation(fault)));
        }
        let accepted = std::mem::take(&mut self.kernel.accepted);
        if !accepted.is_empty() {
            let seen = self.oracle.sees_sent(&accepted);
            self.keep_fault(seen);
            self.sent.extend_from_slice(&accepted);
            let (unsent, open) = (
                self.conn.machine.unsent_app_bytes(),
                self.conn.machine.is_established(),
            );
            self.oracle.sees_room(&self.limits, unsent, open);
        }
        if std::mem::take(&mut self.kernel.write_failed) {
            self.oracle.sees_dead();
        }
    }

    fn keep_fault(&mut self, checked: Checked) {
        if let Err(fault) = checked {
            self.fault.get_or_insert(fault);
        }
    }

    fn take_fault(&mut self) -> Checked {
        self.fault.take().map_or(Ok(()), Err)
    }

    /// Calls the handler. False if the callback ends with an error or a panic.
    fn call(&mut self, callback: Callback) -> bool {
        if self.conn.machine.write_closed() {
            self.oracle.sees_write_closed();
        }
        let seen = self.oracle.sees_event(&callback);
        self.keep_fault(seen);
        let no_frame = Vec::new();
        let (actions, frame) = match &callback {
            Callback::Frame(frame) if self.upgrades_at(frame) => (Vec::new(), &no_frame),
            Callback::Frame(frame) => (self.script.on_frame.clone(), frame),
            Callback::Finished | Callback::Drain | Callback::BadInput(_) => {
                (self.script.on_end.clone(), &no_frame)
            }
            Callback::Timer(_) => (vec![Action::Resume], &no_frame),
            Callback::Opened | Callback::Secured | Callback::Writable | Callback::Flushed => {
                (Vec::new(), &no_frame)
            }
        };
        let mut goes_on = true;
        for action in actions {
            match self.perform(action, frame) {
                Ok(true) => {}
                Ok(false) => {
                    goes_on = false;
                    break;
                }
                Err(fault) => self.keep_fault(Err(fault)),
            }
        }
        self.callbacks.push(callback);
        goes_on
    }

    /// Performs one action. False if the callback ends with it.
    pub(super) fn perform(&mut self, action: Action, frame: &[u8]) -> Result<bool, Violation> {
        let (now, machine, pool) = (self.kernel.now, &mut self.conn.machine, &mut self.pool);
        match action {
            Action::Echo => self.send(frame)?,
            Action::Send(length) => self.send(&vec![b's'; usize::from(length)])?,
            Action::Pause => {
                machine.pause(now);
                // A connection without a handler to call is read to its end, whatever it wishes.
                self.oracle.paused = machine.has_paused();
            }
            Action::Resume => {
                machine.resume(now);
                self.oracle.paused = false;
            }
            Action::Close => machine.close_by_handler(now, pool),
            Action::CloseAfterInput => machine.close_after_input(),
            Action::Finish => {
                if machine.is_established() || machine.is_connecting() {
                    self.oracle.sees_goodbye();
                }
                machine.finish();
            }
            Action::Abort => {
                self.oracle.forced = true;
                machine.reset(Closed::new(CloseReason::Aborted), pool);
            }
            Action::Fail => {
                machine.close_as(Close::because("as planned"), now, pool);
                return Ok(false);
            }
            Action::Panic => {
                machine.close(Closed::new(CloseReason::Panicked), now, pool);
                return Ok(false);
            }
            Action::Timer(millis) => {
                let at = now.after(Duration::from_millis(u64::from(millis)));
                machine.set_timer(0, at);
            }
            Action::Framing(number) => {
                machine.set_framing(&Action::framing(number));
                self.oracle.framing = self.oracle.framing.map(|_| number % Action::FRAMINGS);
            }
            Action::NotifyFlushed => {
                machine.notify_flushed();
                if machine.awaits_flush() {
                    self.oracle.sees_flush_request();
                }
            }
            Action::MaxFrame(bytes) => {
                let max = Some(usize::from(bytes.max(1)));
                // It is refused where the connection is not open.
                let _ = machine.reconfigure(|limits| limits.max_frame = max, now);
            }
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
        let now = self.kernel.now;
        if self
            .conn
            .machine
            .start_tls(&config, now, &mut self.pool)
            .is_ok()
        {
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
        // The send itself is to write no pending output. A first write may lack memory.
        for _ in 0..2 {
            self.make_room(payload.len());
        }
        let Parts {
            conn,
            pool,
            os,
            now,
        } = self.lend();
        let before = conn.machine.unsent_app_bytes();
        let (front, back) = payload.split_at(payload.len() / 3);
        let until = u64::MAX;
        // Each length is sent in one way.
        let mut chunks = match payload.len() % 5 {
            0 => vec![Chunk::Owned(payload.to_vec())],
            1 => vec![Chunk::Shared(payload.into())],
            2 => vec![Chunk::Borrowed(front), Chunk::Shared(back.into())],
            _ => vec![],
        };
        let sent = match payload.len() % 5 {
            3 => conn.send(os, pool, now, payload, until),
            4 => {
                let write = |out: &mut FrameBuf<'_>| {
                    out.put(payload);
                    Ok(())
                };
                let sent = conn.send_with(os, pool, now, write, until);
                sent.map_err(Box::new)
            }
            _ => conn.send_chunks(os, pool, now, &mut chunks, until),
        };
        let taken = match sent {
            Ok(()) => true,
            Err(error) if matches!(*error, SendError::Full { .. }) => false,
            Err(_) => return Ok(()),
        };
        let queued = self.conn.machine.unsent_app_bytes();
        let sent = self
            .oracle
            .sees_send(&self.limits, payload, taken, before, queued);
        self.observe();
        sent
    }

    /// Writes pending output as before each send, and records what the kernel has taken.
    fn make_room(&mut self, length: usize) {
        let Parts {
            conn,
            pool,
            os,
            now,
        } = self.lend();
        conn.make_room(os, pool, now, length);
        self.observe();
    }

    fn lend(&mut self) -> Parts<'_, ModelOs> {
        Parts {
            conn: &mut self.conn,
            pool: &mut self.pool,
            os: &mut self.kernel,
            now: &mut self.now,
        }
    }

    /// At the end of a whole turn.
    fn check(&self) -> Checked {
        if self.oracle.end.is_some() {
            return Ok(());
        }
        let machine = &self.conn.machine;
        if let Some(fault) = machine.broken_invariant(READ_SIZE, self.conn.retry) {
            return Err(Violation(fault));
        }
        if self.conn.is_stuck() && !self.again {
            return Err(violation("nothing leads to the next write"));
        }
        let Some(socket) = &self.conn.stream else {
            return Ok(());
        };
        let flushed = machine.state() == State::Open && machine.queued() == 0;
        let alive = socket.write_error().is_none() && !machine.write_closed() && !self.conn.retry;
        if self.oracle.is_flushed() && alive && machine.state() == State::Open {
            return Err(violation(
                "all that was sent has left, and the handler is not notified",
            ));
        }
        if self.oracle.has_said_goodbye() && flushed && alive && !socket.fin_sent {
            return Err(violation("FIN is due"));
        }
        Ok(())
    }

    pub(super) fn note_state(&mut self) -> Checked {
        let (from, to) = (self.last_state, self.conn.machine.state());
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

impl Host for ConnModel {
    type Os = ModelOs;

    fn parts(&mut self) -> Option<Parts<'_, ModelOs>> {
        if self.oracle.end.is_some() {
            return None;
        }
        self.observe();
        Some(self.lend())
    }

    fn deliver_frames(&mut self, input: &mut InputCursor<'_>, budget: &mut Budget) {
        let (mut delivered, mut bytes) = (0, 0);
        while delivered < budget.frames {
            let rest = input.rest().get(bytes..).unwrap_or_default();
            if rest.is_empty() {
                break;
            }
            let machine = &mut self.conn.machine;
            let Some((frame, behind)) = machine.next_frame(rest, &mut self.pool) else {
                break;
            };
            bytes += rest.len() - behind.len();
            delivered += 1;
            if !self.call(Callback::Frame(frame.to_vec())) {
                break;
            }
        }
        budget.charge(delivered);
        input.advance(bytes);
    }

    fn handle_event(&mut self, event: Event<'_>) {
        let callback = match event {
            // The service is asked, and admits.
            Event::Header => return self.conn.machine.handle_admitted(self.kernel.now),
            Event::BadInput(closed) => {
                self.call(Callback::BadInput(closed.reason));
                let (now, machine) = (self.kernel.now, &mut self.conn.machine);
                return machine.end_bad_input(closed, now, &mut self.pool);
            }
            Event::Opened => Callback::Opened,
            Event::Secured => Callback::Secured,
            Event::Frame(frame) => Callback::Frame(frame.to_vec()),
            Event::Unpacked(frame) => Callback::Frame(frame),
            Event::Finished => Callback::Finished,
            Event::Writable => Callback::Writable,
            Event::Flushed => Callback::Flushed,
            Event::Timer(key) => Callback::Timer(key),
            Event::Drain => Callback::Drain,
        };
        self.call(callback);
    }

    fn handle_opened(&mut self) {
        self.call(Callback::Opened);
    }

    fn report_panic(&mut self, source: &str, panic: Panic) {
        self.keep_fault(Err(Violation(format!("{source} panicked: {panic}"))));
    }

    fn is_memory_limited(&self) -> bool {
        false
    }

    fn is_memory_tight(&self) -> bool {
        false
    }

    fn before_read(&mut self) {}

    fn max_read(&mut self) -> usize {
        usize::MAX
    }

    fn take_handshake(&mut self) -> bool {
        true
    }

    /// The result of an attempt to connect is an input: [`Input::Admit`](crate::sim::Input::Admit).
    fn check_connect(&mut self) -> bool {
        !self.conn.machine.is_connecting()
    }

    fn settle(&mut self, again: bool) {
        self.again = again;
    }

    fn settle_timer(&mut self) {}

    fn finish_close(&mut self, reset: bool) {
        self.observe();
        let reason = self.conn.machine.take_closed().reason;
        let ended = self.oracle.sees_end(End { reason, reset });
        self.keep_fault(ended);
    }
}
