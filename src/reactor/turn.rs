//! One connection's turn: read, decode, call the handler, write once, see what the socket needs, come back when.

use std::any::Any;
use std::io;
use std::net::IpAddr;
use std::panic::{catch_unwind, AssertUnwindSafe};

use super::accept::Caller;
use super::os::{Os, Socket};
use super::sources::Counted;
use super::view::Ended;
use super::{last_words, report_panic, Reactor, Scratch};
use crate::handler::{Context, Handler};
use crate::id::{ConnId, ListenerId};
use crate::logs;
use crate::proto::{Event, NextStep, Staged, State};
use crate::reason::{CloseReason, Closed, Outcome};

/// What a frame counts against the read budget besides its bytes.
const FRAME_COST: usize = 64;
/// When to try again after the kernel had no memory for a socket's read or write.
const RETRY_AFTER: std::time::Duration = std::time::Duration::from_millis(10);

/// What a read brought.
enum Read<'a> {
    Staged(Staged<'a>),
    /// Not now: no budget, or something went wrong.
    Nothing,
    /// No readiness or no wish, and nothing to tell: everything is as it was.
    Idle,
}

impl<A, O: Os> Reactor<A, O> {
    /// Gives a connection its turn. Never called from inside a callback.
    pub(super) fn turn(&mut self, app: &mut A, id: ConnId) {
        debug_assert!(self.current.is_none(), "turns do not nest");
        let Some(slot) = self.roster.get(id).filter(|slot| !slot.machine.is_detached()) else {
            return;
        };
        // Of a turn of the loop long ago it is no more than a late budget, which the next turn sets right.
        let mut budget = if slot.budget_turn == self.stats.turns as u16 {
            usize::from(slot.budget) * FRAME_COST
        } else {
            self.config.read_budget
        };
        self.current = Some(id);
        self.catch_up();
        if self.is_connecting(id) && !self.pursue(id) {
            self.current = None;
            return;
        }
        // Lent to this turn: frames point into it while the handler has the server.
        let mut scratch = self.scratch.take().unwrap_or_default();
        let (mut flushed, mut idle) = (false, false);
        let gone = loop {
            let progress = match self.read(id, &mut scratch, &mut budget) {
                Read::Staged(staged) => {
                    self.deliver(app, id, staged, &mut budget);
                    budget = budget.saturating_sub(FRAME_COST);
                    true
                }
                Read::Nothing => false,
                Read::Idle => {
                    idle = true;
                    if flushed {
                        break false;
                    }
                    false
                }
            };
            self.flush(id);
            match self.roster.get(id) {
                // Nothing else is to be done with it, and nothing to be read.
                Some(slot) if slot.machine.is_quiet() && !slot.can_read() => {
                    idle = progress;
                    break false;
                }
                Some(_) => {}
                None => break true,
            }
            if let Some(reset) = self.next_step(id) {
                self.reap(app, id, reset);
                break true;
            }
            if !progress {
                break false;
            }
            flushed = true;
        };
        self.scratch = Some(scratch);
        self.current = None;
        if gone {
            return;
        }
        let Some(slot) = self.roster.get_mut(id) else {
            return;
        };
        if slot.machine.is_detaching() {
            return self.hand_over(app, id);
        }
        slot.budget_turn = self.stats.turns as u16;
        slot.budget = u16::try_from(budget / FRAME_COST).unwrap_or(u16::MAX);
        slot.machine.slim(&mut self.pool);
        let holds = slot.machine.memory();
        self.account_for(id, holds);
        self.come_back(id, idle);
    }

    /// Sees to it that the connection gets another turn: at once if it left work over that no event will announce, which one
    /// that was `idle` at the end did not, else at its next deadline.
    fn come_back(&mut self, id: ConnId, idle: bool) {
        let Some(slot) = self.roster.get_mut(id) else {
            return;
        };
        let mut when = slot.machine.deadline();
        if slot.retry {
            when = when.min(self.now.after(RETRY_AFTER));
        }
        self.timers.arm(id.index, when);
        if idle && slot.machine.is_quiet() && slot.machine.queued() == 0 {
            return;
        }
        if slot.machine.has_events() || slot.can_read() || (slot.writable && slot.machine.sendable() > 0) {
            if slot.machine.state() == State::Handshaking {
                self.shaking.push(id, &mut slot.queued);
            } else {
                self.ready.push(id, &mut slot.queued);
            }
        }
    }

    /// Takes what waits in the machine, else reads from the socket.
    fn read<'s>(&mut self, id: ConnId, scratch: &'s mut Scratch, budget: &mut usize) -> Read<'s> {
        let Some(slot) = self.roster.get_mut(id) else {
            return Read::Idle;
        };
        let ordinary = slot.machine.is_quiet() && !slot.squeezed && !self.memory.is_limited();
        if !ordinary && self.is_hindered(id) {
            return Read::Nothing;
        }
        let Some(slot) = self.roster.get_mut(id) else {
            return Read::Nothing;
        };
        if *budget == 0 {
            return Read::Nothing;
        }
        if slot.machine.has_events() {
            return Read::Staged(slot.machine.stage_held());
        }
        if !slot.can_read() {
            return Read::Idle;
        }
        let machine = &mut slot.machine;
        if machine.state() == State::Handshaking {
            if self.handshakes_left == 0 {
                return Read::Nothing;
            }
            self.handshakes_left -= 1;
        }
        let favoured = self.favoured.is_some_and(|(favoured, _)| favoured == id);
        let allowance = machine.read_allowance(self.now).min(self.memory.one_read(favoured));
        if allowance == 0 {
            return Read::Nothing;
        }
        let Some(Some(stream)) = self.streams.get_mut(id.index as usize) else {
            return Read::Nothing;
        };
        let (now, pool) = (self.now, &mut self.pool);
        if machine.has_set_aside() {
            let plain = &mut scratch.plain;
            let staged = catch_unwind(AssertUnwindSafe(|| {
                let plain = plain;
                machine.handle_set_aside(now, plain, pool)
            }));
            return self.handled(id, staged);
        }
        let room = allowance.min(scratch.wire.len());
        let buffer = scratch.wire.get_mut(..room).unwrap_or_default();
        match self.os.read(stream, buffer) {
            Ok(0) => {
                slot.readable = false;
                machine.handle_eof(self.now, &mut self.pool);
            }
            Ok(count) => {
                *budget = budget.saturating_sub(count);
                // Edge-triggered epoll and kqueue: a short read means empty, unless the end is behind it.
                if count < room && !slot.hang_up && !machine.wants_fresh_blocked() {
                    slot.readable = false;
                }
                let Scratch { wire, plain } = scratch;
                let wire = wire.get_mut(..count).unwrap_or_default();
                if !machine.has_tls() {
                    return Read::Staged(machine.handle_input(now, wire, plain, pool));
                }
                let staged = catch_unwind(AssertUnwindSafe(|| {
                    let (wire, plain) = (wire, plain);
                    machine.handle_input(now, wire, plain, pool)
                }));
                return self.handled(id, staged);
            }
            Err(error) => match error.kind() {
                io::ErrorKind::WouldBlock => {
                    slot.readable = false;
                    machine.handle_blocked(&mut self.pool);
                }
                io::ErrorKind::Interrupted => return Read::Nothing,
                _ if is_short_of_memory(&error) => {
                    slot.readable = false;
                    slot.retry = true;
                    return Read::Nothing;
                }
                _ => {
                    slot.readable = false;
                    machine.handle_read_error(error, &mut self.pool);
                }
            },
        }
        Read::Staged(Staged::nothing())
    }

    /// What input has led to. A TLS configuration may hold the user's code: what chooses it, a certificate resolver, a verifier.
    fn handled<'s>(&mut self, id: ConnId, outcome: std::thread::Result<Staged<'s>>) -> Read<'s> {
        match outcome {
            Ok(staged) => Read::Staged(staged),
            Err(panic) => {
                self.report_conn_panic(id, "a TLS configuration", panic);
                if let Some(slot) = self.roster.get_mut(id) {
                    // At once: rustls was left in the middle of something.
                    slot.machine.end(Closed::new(CloseReason::Panicked), &mut self.pool);
                }
                Read::Nothing
            }
        }
    }

    /// Tells the handler everything there is to tell.
    fn deliver(&mut self, app: &mut A, id: ConnId, mut staged: Staged<'_>, budget: &mut usize) {
        loop {
            let Some(slot) = self.roster.get_mut(id) else {
                return;
            };
            if slot.machine.is_quiet() {
                self.deliver_frames(app, id, &mut staged, budget);
            }
            let Some(slot) = self.roster.get_mut(id) else {
                return;
            };
            if slot.machine.is_quiet() && staged.is_used_up() {
                break;
            }
            let (machine, rest) = (&mut slot.machine, &mut staged);
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
            *budget = budget.saturating_sub(FRAME_COST);
            match event {
                Event::Header => self.welcome(app, id),
                Event::Frame(frame) => self.call(app, id, |handler, cx| handler.on_frame(cx, frame)),
                Event::Opened => {
                    self.stats.opened += 1;
                    self.note_handshake(id);
                    self.leave_unopened(id);
                    self.call(app, id, |handler, cx| handler.on_open(cx));
                }
                Event::Secured => self.call(app, id, |handler, cx| handler.on_secured(cx)),
                Event::Finished => self.call(app, id, |handler, cx| handler.on_finish(cx)),
                Event::Writable => self.call(app, id, |handler, cx| handler.on_writable(cx)),
                Event::Timer(key) => self.call(app, id, |handler, cx| handler.on_timer(cx, key)),
                Event::Drain => self.call(app, id, |handler, cx| handler.on_drain(cx)),
            }
        }
        if let Some(slot) = self.roster.get_mut(id) {
            slot.machine.settle(staged, self.now, &mut self.pool);
        }
    }

    /// Tells the handler one frame after the other, as long as there is nothing else to think of.
    fn deliver_frames(&mut self, app: &mut A, id: ConnId, staged: &mut Staged<'_>, budget: &mut usize) {
        self.lend(app, id, |app, reactor, handler| loop {
            let slot = reactor.roster.get_mut(id);
            let Some(frame) = slot.and_then(|slot| slot.machine.next_frame(staged, &mut reactor.pool)) else {
                return Ok(());
            };
            *budget = budget.saturating_sub(FRAME_COST);
            handler.on_frame(&mut Context::new(app, reactor, id), frame)?;
            if reactor.has_successor(id) {
                return Ok(());
            }
        });
    }

    /// The handler that runs has been replaced.
    #[inline]
    fn has_successor(&self, id: ConnId) -> bool {
        self.handlers.get(id.index as usize).is_some_and(Option::is_some)
    }

    /// It has opened: how long that took, if it was to take time.
    fn note_handshake(&mut self, id: ConnId) {
        if let Some(slot) = self.roster.get(id).filter(|slot| slot.unopened) {
            self.handshake_times.record_time(self.now.since(slot.accepted_at));
        }
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
            Ok(Err(close)) => {
                let Some(slot) = self.roster.get_mut(id) else {
                    return self.discard("an error's destructor", close);
                };
                // One that comes too late is dropped, and an error's destructor is the user's code.
                let closed = catch_unwind(AssertUnwindSafe(|| {
                    slot.machine.close_as(close, self.now, &mut self.pool);
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
        if let Some(slot) = self.roster.get_mut(id) {
            slot.machine
                .close(Closed::new(CloseReason::Panicked), self.now, &mut self.pool);
        }
    }

    pub(super) fn report_conn_panic(&self, id: ConnId, whose: &str, panic: Box<dyn Any + Send>) {
        let words = last_words(panic);
        log::error!(target: logs::PANIC, "{whose} panicked: {words}; {}", self.particulars(id));
    }

    /// Writes what waits, until the kernel takes no more.
    pub(super) fn flush(&mut self, id: ConnId) {
        let Some(slot) = self.roster.get_mut(id) else {
            return;
        };
        let Some(Some(stream)) = self.streams.get_mut(id.index as usize) else {
            return;
        };
        loop {
            let bytes = slot.machine.transmit(&mut self.pool);
            if bytes.is_empty() {
                return;
            }
            if !slot.writable {
                break;
            }
            let length = bytes.len();
            match self.os.write(stream, bytes) {
                Ok(count) => {
                    if count < length {
                        // A callback may have blocked: what it has sent could not be taken before.
                        self.now = self.os.now();
                    }
                    slot.machine.handle_sent(count, self.now, &mut self.pool);
                    // A short write means full: the next edge says when there is room.
                    slot.writable = count == length;
                }
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock => slot.writable = false,
                    io::ErrorKind::Interrupted => break,
                    _ if is_short_of_memory(&error) => {
                        slot.writable = false;
                        slot.retry = true;
                    }
                    _ => {
                        slot.machine.handle_write_error(error, &mut self.pool);
                        // Its last words may be in the kernel already.
                        slot.readable = true;
                        return;
                    }
                },
            }
        }
        self.now = self.os.now();
        slot.machine.handle_unsent(self.now);
    }

    /// Shuts down or tells to close: `Some(reset)` when the connection is over.
    fn next_step(&mut self, id: ConnId) -> Option<bool> {
        let slot = self.roster.get_mut(id)?;
        if slot.machine.next_step() == NextStep::Shutdown {
            let stream = self.streams.get_mut(id.index as usize)?.as_mut()?;
            let sent = self.os.shutdown(stream).is_ok();
            slot.machine.handle_shutdown(self.now, sent);
        }
        match slot.machine.next_step() {
            NextStep::Gone { reset } => Some(reset),
            NextStep::Wait | NextStep::Shutdown => None,
        }
    }

    /// Ends a connection: the socket first, then the last callback, then the slot.
    fn reap(&mut self, app: &mut A, id: ConnId, reset: bool) {
        let index = id.index as usize;
        let was_open = self.roster.get(id).is_some_and(|slot| slot.machine.was_open());
        let mut credentials = None;
        if let Some(stream) = self.streams.get_mut(index).and_then(Option::take) {
            if !was_open {
                // For the service, which hears of it.
                credentials = stream.credentials().ok();
            }
            self.os.close(stream, reset);
        }
        self.shared.set_live(id, false);
        self.stay(id);
        let Some(slot) = self.roster.get_mut(id) else {
            return;
        };
        let closed = slot.machine.take_closed();
        let (listener, is_outgoing) = (slot.listener, slot.machine.is_outgoing());
        if log::log_enabled!(target: logs::CONNECTION, log::Level::Debug) {
            // The words of a user's error are the user's code.
            let words = catch_unwind(AssertUnwindSafe(|| closed.to_string()));
            let words = words.unwrap_or_else(last_words);
            log::debug!(target: logs::CONNECTION, "{}: {words}", slot.info(self.now));
        }
        let caller = Caller {
            addr: slot.peer(),
            credentials,
            proxy: slot.machine.proxy().cloned(),
        };
        self.leave_unopened(id);
        if was_open {
            self.call(app, id, |handler, cx| {
                handler.on_close(cx, &closed);
                Ok(())
            });
        } else if is_outgoing {
            self.call(app, id, |handler, cx| {
                handler.on_connect_failed(cx, &closed);
                Ok(())
            });
        }
        if let Some(handler) = self.handlers.get_mut(index).and_then(Option::take) {
            self.drop_handler(handler);
        }
        self.vacate(id, &closed);
        if let (false, Some(listener)) = (was_open, listener) {
            self.tell_unopened(app, listener, id, caller, &closed);
        }
        self.discard("an error's destructor", closed);
    }

    /// The last of a connection: it is counted, remembered, and its slot is free.
    pub(super) fn vacate(&mut self, id: ConnId, closed: &Closed) {
        self.timers.disarm(id.index);
        self.note_memory(id.index, 0);
        self.squeezed.remove(&id);
        self.end_favour(id);
        if let Some(attempt) = self.attempts.remove(&id) {
            self.discard("a TLS configuration's destructor", attempt);
        }
        let Some(slot) = self.roster.remove(id) else {
            return;
        };
        let who = Ended {
            id: Some(id),
            listener: slot.listener,
            peer: slot.peer(),
            source: slot.source(),
            age: self.now.since(slot.accepted_at),
            traffic: slot.machine.traffic(),
        };
        let (source, counted) = (who.source.ip(), slot.counted);
        let listener = slot.listener;
        self.discard("a framer's destructor", slot);
        self.stats.count_closed(closed.reason);
        self.ages.record_time(who.age);
        self.note_close(who, closed);
        self.make_room(listener, source, counted);
    }

    /// Tells the service about a connection that had a slot and never opened.
    fn tell_unopened(&mut self, app: &mut A, listener: ListenerId, id: ConnId, caller: Caller, closed: &Closed) {
        let Some(listener) = self.listeners.iter_mut().find(|found| found.id == listener) else {
            return;
        };
        let peer = caller.at(listener, Some(id));
        let told = catch_unwind(AssertUnwindSafe(|| {
            listener.service.on_unopened(app, &peer, closed);
        }));
        if let Err(panic) = told {
            self.stats.panics += 1;
            report_panic("a service's on_unopened", panic);
        }
    }

    /// A slot and a descriptor are free: whoever waited for either may come.
    fn make_room(&mut self, freed: Option<ListenerId>, source: Option<IpAddr>, counted: Counted) {
        if let Some(at) = self.listeners.iter().position(|listener| Some(listener.id) == freed) {
            self.uncount(at, source, counted);
            if let Some(listener) = self.listeners.get_mut(at) {
                listener.connections = listener.connections.saturating_sub(1);
            }
        }
        self.free_descriptor();
    }

    /// A descriptor is free: who waits for one may come.
    pub(super) fn free_descriptor(&mut self) {
        self.starvation.end_pause();
        self.look_for_clients();
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

/// The kernel lacks memory for this call, for the moment.
pub(super) fn is_short_of_memory(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOBUFS | libc::ENOMEM))
}
