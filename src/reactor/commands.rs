//! What comes from other threads through a handle.

use std::panic::{catch_unwind, AssertUnwindSafe};

use super::os::Os;
use super::{report_panic, Reactor};
use crate::control::{Control, ControlOps};
use crate::handle::Command;
use crate::handler::Conn;
use crate::logs;

impl<A, O: Os> Reactor<A, O> {
    pub(super) fn run_commands(&mut self, app: &mut A) {
        if !self.shared.take_pending() && !self.commands_left {
            return;
        }
        self.commands_left = false;
        for _ in 0..self.config.job_budget {
            match self.shared.take() {
                Some(command) => {
                    self.catch_up();
                    self.carry_out(app, command);
                }
                None => return,
            }
        }
        self.commands_left = true;
    }

    fn carry_out(&mut self, app: &mut A, command: Command<A>) {
        match command {
            Command::Send(id, frame) => {
                // A connection's framer is the user's code too, and so is its error.
                let sent = catch_unwind(AssertUnwindSafe(|| {
                    let outcome = Conn::find(self, id).map(|mut conn| conn.send(&frame));
                    if let Some(Err(error)) = &outcome {
                        log::debug!(target: logs::CONNECTION, "a frame for connection {id} was not sent: {error}");
                    }
                    matches!(outcome, Some(Ok(())))
                }));
                match sent {
                    Ok(true) => {}
                    Ok(false) => self.stats.undeliverable += 1,
                    Err(panic) => {
                        self.stats.undeliverable += 1;
                        self.end_in_panic(id, "a framer", panic);
                        self.turn(app, id);
                    }
                }
            }
            Command::Notify(id, message) => {
                let open = self
                    .connections
                    .get(id)
                    .is_some_and(|conn| conn.machine.is_established() && conn.machine.was_open());
                if open {
                    self.current = Some(id);
                    self.call(app, id, |handler, cx| handler.on_message(cx, message));
                    self.current = None;
                    self.turn(app, id);
                } else {
                    self.stats.undeliverable += 1;
                    self.discard("a message's destructor", message);
                }
            }
            Command::Kill(id) => {
                if !self.kill(id) {
                    self.stats.undeliverable += 1;
                }
            }
            Command::Post(job) => {
                let done = catch_unwind(AssertUnwindSafe(|| job(app, &mut Control::new(self))));
                if let Err(panic) = done {
                    self.stats.panics += 1;
                    report_panic("a posted job", panic);
                }
            }
            Command::Drain(grace) => self.begin_drain(grace),
            Command::Stop => self.stopped = true,
        }
    }
}
