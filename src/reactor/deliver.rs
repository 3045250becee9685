//! What the handler is told: events and frames, each callback behind a wall against panics.

use std::any::Any;
use std::panic::{catch_unwind, AssertUnwindSafe};

use super::os::Os;
use super::turn::Budget;
use super::{last_words, report_panic, Reactor};
use crate::handler::{Context, Handler};
use crate::id::ConnId;
use crate::logs;
use crate::proto::{Event, Staged};
use crate::reason::{CloseReason, Closed, Outcome};

impl<A, O: Os> Reactor<A, O> {
    /// Tells the handler what there is to tell, as far as the budget goes.
    pub(super) fn deliver(&mut self, app: &mut A, id: ConnId, mut staged: Staged<'_>, budget: &mut Budget) {
        let mut spent = false;
        loop {
            let Some(conn) = self.connections.get_mut(id) else {
                return;
            };
            if conn.machine.is_quiet() {
                self.deliver_frames(app, id, &mut staged, budget);
            }
            let Some(conn) = self.connections.get_mut(id) else {
                return;
            };
            if conn.machine.is_quiet() && staged.is_used_up() {
                break;
            }
            spent = budget.frames == 0;
            if spent {
                break;
            }
            let (machine, rest) = (&mut conn.machine, &mut staged);
            let next = if machine.has_framer() {
                // A connection's framer is the user's code too.
                catch_unwind(AssertUnwindSafe(|| {
                    let rest = rest;
                    machine.next_event(rest, self.now, &mut self.pool)
                }))
            } else {
                Ok(machine.next_event(rest, self.now, &mut self.pool))
            };
            let event = match next {
                Ok(Some(event)) => event,
                Ok(None) => break,
                Err(panic) => {
                    self.end_in_panic(id, "a framer", panic);
                    break;
                }
            };
            budget.charge(1);
            match event {
                Event::Header => self.ask_service(app, id),
                Event::Frame(frame) => self.call(app, id, |handler, cx| handler.on_frame(cx, frame)),
                Event::Opened => self.handle_opened(app, id),
                Event::Secured => self.call(app, id, |handler, cx| handler.on_secured(cx)),
                Event::Finished => self.call(app, id, |handler, cx| handler.on_finish(cx)),
                Event::Writable => self.call(app, id, |handler, cx| handler.on_writable(cx)),
                Event::Timer(key) => self.call(app, id, |handler, cx| handler.on_timer(cx, key)),
                Event::Drain => self.call(app, id, |handler, cx| handler.on_drain(cx)),
            }
        }
        if let Some(conn) = self.connections.get_mut(id) {
            conn.machine.settle(staged, self.now, &mut self.pool);
            if spent {
                conn.machine.postpone(self.now);
            }
        }
    }

    /// Tells the handler one frame after the other, as long as there is nothing else to think of.
    #[inline(always)]
    pub(super) fn deliver_frames(&mut self, app: &mut A, id: ConnId, staged: &mut Staged<'_>, budget: &mut Budget) {
        let all = staged.rest();
        let (mut rest, mut left) = (all, budget.frames);
        self.lend(app, id, |app, reactor, handler| {
            while !rest.is_empty() && left > 0 {
                let conn = reactor.connections.get_mut(id);
                let Some((frame, behind)) = conn.and_then(|conn| conn.machine.next_frame(rest, &mut reactor.pool))
                else {
                    break;
                };
                rest = behind;
                left -= 1;
                handler.on_frame(&mut Context::new(app, reactor, id), frame)?;
                if reactor.has_successor(id) {
                    break;
                }
            }
            Ok(())
        });
        budget.charge(budget.frames - left);
        let delivered = all.len() - rest.len();
        staged.advance(delivered);
    }

    /// The handler that runs has been replaced.
    #[inline]
    fn has_successor(&self, id: ConnId) -> bool {
        self.handlers.get(id.index as usize).is_some_and(Option::is_some)
    }

    /// It has opened, which is counted, and timed if it was to take time.
    pub(super) fn handle_opened(&mut self, app: &mut A, id: ConnId) {
        self.stats.opened += 1;
        if let Some(conn) = self.connections.get(id).filter(|conn| conn.pending) {
            self.handshake_times.record_time(self.now.since(conn.accepted_at));
            self.leave_pending(id);
        }
        self.call(app, id, |handler, cx| handler.on_open(cx));
    }

    /// Calls the handler of `id`, and closes the connection if it says so or panics.
    pub(super) fn call(
        &mut self,
        app: &mut A,
        id: ConnId,
        callback: impl FnOnce(&mut dyn Handler<A>, &mut Context<'_, A>) -> Outcome,
    ) {
        self.lend(app, id, |app, reactor, handler| {
            callback(handler, &mut Context::new(app, reactor, id))
        });
    }

    /// Lends the server to the handler of `id`.
    #[inline]
    fn lend(
        &mut self,
        app: &mut A,
        id: ConnId,
        callbacks: impl FnOnce(&mut A, &mut Self, &mut dyn Handler<A>) -> Outcome,
    ) {
        let index = id.index as usize;
        // Out of its place while it runs, so that the callback can have the server; a successor may take the place.
        let Some(mut handler) = self.handlers.get_mut(index).and_then(Option::take) else {
            return;
        };
        let outcome = catch_unwind(AssertUnwindSafe(|| callbacks(app, self, handler.as_mut())));
        match self.handlers.get_mut(index) {
            Some(place @ None) => *place = Some(handler),
            _ => self.drop_handler(handler),
        }
        match outcome {
            Ok(Ok(())) => {}
            other => self.conclude(id, other),
        }
    }

    /// A callback has ended in a panic, or closes the connection.
    #[cold]
    fn conclude(&mut self, id: ConnId, outcome: std::thread::Result<Outcome>) {
        match outcome {
            Ok(Ok(())) => {}
            Ok(Err(close)) => {
                let Some(conn) = self.connections.get_mut(id) else {
                    return self.discard("an error's destructor", close);
                };
                // One that comes too late is dropped, and an error's destructor is the user's code.
                let closed = catch_unwind(AssertUnwindSafe(|| {
                    conn.machine.close_as(close, self.now, &mut self.pool);
                }));
                if let Err(panic) = closed {
                    self.end_in_panic(id, "an error's destructor", panic);
                }
            }
            Err(panic) => self.end_in_panic(id, "a handler", panic),
        }
    }

    /// Closes a connection whose own code panicked.
    pub(super) fn end_in_panic(&mut self, id: ConnId, whose: &str, panic: Box<dyn Any + Send>) {
        self.report_conn_panic(id, whose, panic);
        if let Some(conn) = self.connections.get_mut(id) {
            conn.machine
                .close(Closed::new(CloseReason::Panicked), self.now, &mut self.pool);
        }
    }

    pub(super) fn report_conn_panic(&self, id: ConnId, whose: &str, panic: Box<dyn Any + Send>) {
        let words = last_words(panic);
        log::error!(target: logs::PANIC, "{whose} panicked: {words}; {}", self.describe(id));
    }

    /// Drops a handler.
    pub(super) fn drop_handler(&mut self, handler: Box<dyn Handler<A>>) {
        self.discard("a handler's destructor", handler);
    }

    /// Drops something whose destructor is the user's code.
    pub(super) fn discard<T>(&mut self, whose: &str, thing: T) {
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| drop(thing))) {
            self.stats.panics += 1;
            report_panic(whose, panic);
        }
    }
}
