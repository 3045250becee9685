//! One connection's turn: read, decode, call the handler, write once, see what the socket needs, come back when.

use std::io;
use std::ops::ControlFlow;
use std::panic::{catch_unwind, AssertUnwindSafe};

use super::connections::Connection;
use super::os::Os;
use super::{Reactor, Scratch};
use crate::id::ConnId;
use crate::proto::{Pool, Staged, State};
use crate::reason::{CloseReason, Closed};

/// What a frame counts against the read budget besides its bytes.
pub(super) const FRAME_COST: usize = 64;
/// When to try again after the kernel had no memory for a socket's read or write.
const RETRY_AFTER: std::time::Duration = std::time::Duration::from_millis(10);

/// What a connection may still take up in its turn.
pub(super) struct Budget {
    /// To be read, less what frames and other events count against it.
    pub(super) bytes: usize,
    /// To be told: what one read brings may be many thousands.
    pub(super) frames: usize,
}

impl Budget {
    /// So many frames, or other events, were told.
    #[inline]
    pub(super) fn charge(&mut self, frames: usize) {
        self.bytes = self.bytes.saturating_sub(frames.saturating_mul(FRAME_COST));
        self.frames = self.frames.saturating_sub(frames);
    }
}

/// What a read brought.
enum Read<'a> {
    Staged(Staged<'a>),
    /// What has been delivered already.
    Delivered,
    /// Not now: no budget, or something went wrong.
    Nothing,
    /// No readiness or no wish, and nothing to tell: everything is as it was.
    Idle,
}

impl<A, O: Os> Reactor<A, O> {
    /// Gives a connection its turn. Never called from inside a callback.
    pub(super) fn turn(&mut self, app: &mut A, id: ConnId) {
        debug_assert!(self.current.is_none(), "turns do not nest");
        let Some(conn) = self.connections.get(id).filter(|conn| !conn.machine.is_detached()) else {
            return;
        };
        // Of a turn of the loop long ago it is no more than a late budget, which the next turn sets right.
        let bytes = if conn.budget_iteration == self.stats.iterations as u16 {
            usize::from(conn.budget) * FRAME_COST
        } else {
            self.config.read_budget
        };
        let mut budget = Budget {
            bytes,
            frames: (bytes / FRAME_COST).max(1),
        };
        let at_rest = conn.is_at_rest() && !self.memory.is_tight() && bytes > 0;
        self.current = Some(id);
        self.catch_up();
        // Lent to this turn: frames point into it while the handler has the server.
        let mut scratch = self.scratch.take().unwrap_or_default();
        let answered = at_rest && self.answer(app, id, &mut scratch, &mut budget);
        if !answered && (at_rest || !self.open(app, id)) {
            self.attend(app, id, &mut scratch, &mut budget, at_rest);
        }
        self.scratch = Some(scratch);
        self.current = None;
        if let Some(conn) = self.connections.get_mut(id) {
            conn.budget_iteration = self.stats.iterations as u16;
            conn.budget = u16::try_from(budget.bytes / FRAME_COST).unwrap_or(u16::MAX);
            if conn.machine.is_detaching() {
                self.hand_over(app, id);
            }
        }
    }

    /// The turn of a connection at rest, as most are: one read, its frames, one write. True if it is at rest again; else what was
    /// read is delivered, and the rest is for [`Reactor::attend`].
    ///
    /// No book is kept of it: such a connection holds nothing, before and after, and its deadline has only moved later, unless a
    /// callback has set a timer.
    fn answer(&mut self, app: &mut A, id: ConnId, scratch: &mut Scratch, budget: &mut Budget) -> bool {
        let Read::Staged(mut staged) = self.read_socket(id, scratch, budget, usize::MAX) else {
            return false;
        };
        if !staged.is_used_up() {
            self.deliver_frames(app, id, &mut staged, budget);
        }
        match self.connections.get(id) {
            Some(conn) if conn.machine.is_quiet() && staged.is_used_up() => {}
            _ => {
                self.deliver(app, id, staged, budget);
                return false;
            }
        }
        if self.finish_turn(id, false) {
            return true;
        }
        if let Some(conn) = self.connections.get_mut(id) {
            // Part of a TLS record may have come, and be all that has.
            conn.machine.settle(staged, self.now, &mut self.pool);
        }
        false
    }

    /// What comes before frames, if that is all there is for now: a connection that is open as soon as it is accepted, or one that
    /// is still to be made. False if there may be more to do.
    #[inline(never)]
    fn open(&mut self, app: &mut A, id: ConnId) -> bool {
        let tight = self.memory.is_tight();
        let Some(conn) = self.connections.get_mut(id) else {
            return true;
        };
        if conn.machine.is_connecting() {
            return !self.check_connect(id);
        }
        if tight || !conn.machine.is_just_open() {
            return false;
        }
        conn.machine.note_opened();
        self.handle_opened(app, id);
        self.finish_turn(id, true)
    }

    /// The end of a turn in which nothing but frames was thought of: one write. True if the connection is at rest. Its deadline
    /// has only moved later since it was armed, if it was, unless a callback has set a timer.
    #[inline(always)]
    fn finish_turn(&mut self, id: ConnId, first: bool) -> bool {
        self.write_out(id);
        let Some(conn) = self.connections.get_mut(id) else {
            return false;
        };
        conn.machine.slim(&mut self.pool);
        if !conn.machine.is_at_rest() || conn.readable || conn.retry {
            return false;
        }
        if first || conn.machine.is_timed() {
            self.timers.arm(id.index, conn.machine.deadline());
        }
        true
    }

    /// The turn of a connection to which anything may happen. `begun`: what a read has brought is delivered already.
    #[inline(never)]
    fn attend(&mut self, app: &mut A, id: ConnId, scratch: &mut Scratch, budget: &mut Budget, begun: bool) {
        let (mut begun, mut flushed, mut idle) = (begun, false, false);
        loop {
            let read = if std::mem::take(&mut begun) {
                Read::Delivered
            } else {
                self.read(id, scratch, budget)
            };
            let progress = match read {
                Read::Staged(staged) => {
                    self.deliver(app, id, staged, budget);
                    budget.bytes = budget.bytes.saturating_sub(FRAME_COST);
                    true
                }
                Read::Delivered => true,
                Read::Nothing => false,
                Read::Idle => {
                    idle = true;
                    if flushed {
                        break;
                    }
                    false
                }
            };
            self.flush(id);
            match self.connections.get(id) {
                // Nothing else is to be done with it, and nothing to be read.
                Some(conn) if conn.machine.is_quiet() && !conn.can_read() => {
                    idle = progress;
                    break;
                }
                Some(_) => {}
                None => return,
            }
            if let Some(reset) = self.next_step(id) {
                return self.finish_close(app, id, reset);
            }
            if !progress {
                break;
            }
            flushed = true;
        }
        let Some(conn) = self.connections.get_mut(id) else {
            return;
        };
        if conn.machine.is_detaching() {
            return;
        }
        conn.machine.slim(&mut self.pool);
        let holds = conn.machine.memory();
        self.account_for(id, holds);
        self.come_back(id, idle);
    }

    /// Sees to it that the connection gets another turn: at once if it left work over that no event will announce, which one
    /// that was `idle` at the end did not, else at its next deadline.
    fn come_back(&mut self, id: ConnId, idle: bool) {
        let Some(conn) = self.connections.get_mut(id) else {
            return;
        };
        let mut when = conn.machine.deadline();
        if conn.retry {
            when = when.min(self.now.after(RETRY_AFTER));
        }
        self.timers.arm(id.index, when);
        if idle && conn.machine.is_quiet() && conn.machine.queued() == 0 {
            return;
        }
        if conn.machine.has_events() || conn.can_read() || (conn.writable && conn.machine.sendable() > 0) {
            if conn.machine.state() == State::Handshaking {
                self.handshake_queue.push(id, &mut conn.queued);
            } else {
                self.ready.push(id, &mut conn.queued);
            }
        }
    }

    /// Takes what waits in the machine, else reads from the socket.
    fn read<'s>(&mut self, id: ConnId, scratch: &'s mut Scratch, budget: &mut Budget) -> Read<'s> {
        let Some(conn) = self.connections.get_mut(id) else {
            return Read::Idle;
        };
        let ordinary = conn.machine.is_quiet() && !conn.paused_for_memory && !self.memory.is_limited();
        if !ordinary && self.is_hindered(id) {
            return Read::Nothing;
        }
        let Some(conn) = self.connections.get_mut(id) else {
            return Read::Nothing;
        };
        if budget.bytes == 0 || budget.frames == 0 {
            return Read::Nothing;
        }
        if conn.machine.has_events() {
            return Read::Staged(conn.machine.stage_held());
        }
        if !conn.can_read() {
            return Read::Idle;
        }
        let machine = &mut conn.machine;
        if machine.state() == State::Handshaking {
            if self.handshakes_left == 0 {
                return Read::Nothing;
            }
            self.handshakes_left -= 1;
        }
        let granted = self.read_grant.is_some_and(|(holder, _)| holder == id);
        let allowance = machine.read_allowance(self.now).min(self.memory.one_read(granted));
        if allowance == 0 {
            return Read::Nothing;
        }
        if machine.has_set_aside() {
            let (now, pool, plain) = (self.now, &mut self.pool, &mut scratch.plain);
            let staged = catch_unwind(AssertUnwindSafe(|| {
                let plain = plain;
                machine.handle_set_aside(now, plain, pool)
            }));
            return self.handled(id, staged);
        }
        self.read_socket(id, scratch, budget, allowance)
    }

    /// Reads from the socket, at most `allowance` bytes.
    #[inline(always)]
    fn read_socket<'s>(
        &mut self,
        id: ConnId,
        scratch: &'s mut Scratch,
        budget: &mut Budget,
        allowance: usize,
    ) -> Read<'s> {
        let Some(conn) = self.connections.get_mut(id) else {
            return Read::Nothing;
        };
        let Some(Some(stream)) = self.streams.get_mut(id.index as usize) else {
            return Read::Nothing;
        };
        let (machine, now, pool) = (&mut conn.machine, self.now, &mut self.pool);
        let room = allowance.min(scratch.wire.len());
        let buffer = scratch.wire.get_mut(..room).unwrap_or_default();
        match self.os.read(stream, buffer) {
            Ok(0) => {
                conn.readable = false;
                machine.handle_eof(now, pool);
            }
            Ok(count) => {
                budget.bytes = budget.bytes.saturating_sub(count);
                // Edge-triggered epoll and kqueue: a short read means empty, unless the end is behind it.
                if count < room && !conn.hang_up && !machine.wants_fresh_blocked() {
                    conn.readable = false;
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
            Err(error) => {
                if !conn.read_failed(error, pool) {
                    return Read::Nothing;
                }
            }
        }
        Read::Staged(Staged::nothing())
    }

    /// What input has led to. A TLS configuration may hold the user's code: what chooses it, a certificate resolver, a verifier.
    fn handled<'s>(&mut self, id: ConnId, outcome: std::thread::Result<Staged<'s>>) -> Read<'s> {
        match outcome {
            Ok(staged) => Read::Staged(staged),
            Err(panic) => {
                self.report_conn_panic(id, "a TLS configuration", panic);
                if let Some(conn) = self.connections.get_mut(id) {
                    // At once: rustls was left in the middle of something.
                    conn.machine.end(Closed::new(CloseReason::Panicked), &mut self.pool);
                }
                Read::Nothing
            }
        }
    }

    /// Writes what waits, until the kernel takes no more.
    #[inline(never)]
    pub(super) fn flush(&mut self, id: ConnId) {
        self.write_out(id);
    }

    /// As [`Reactor::flush`], inside of its caller.
    #[inline(always)]
    fn write_out(&mut self, id: ConnId) {
        let Some(conn) = self.connections.get_mut(id) else {
            return;
        };
        let Some(Some(stream)) = self.streams.get_mut(id.index as usize) else {
            return;
        };
        loop {
            let bytes = conn.machine.transmit(&mut self.pool);
            if bytes.is_empty() {
                return;
            }
            if !conn.writable {
                break;
            }
            let length = bytes.len();
            match self.os.write(stream, bytes) {
                Ok(count) => {
                    if count < length {
                        // A callback may have blocked: what it has sent could not be taken before.
                        self.now = self.os.now();
                    }
                    conn.machine.handle_sent(count, self.now, &mut self.pool);
                    // A short write means full: the next edge says when there is room.
                    conn.writable = count == length;
                }
                Err(error) => match conn.write_failed(error, &mut self.pool) {
                    ControlFlow::Continue(()) => break,
                    ControlFlow::Break(()) => return,
                },
            }
        }
        self.now = self.os.now();
        conn.machine.handle_unsent(self.now);
    }
}

impl<A, O: Os> Reactor<A, O> {
    /// Sends a frame that is worth a write of its own, if nothing is in front of it: only what the kernel does not take is copied.
    /// False if something is.
    #[cold]
    pub(super) fn pass(&mut self, id: ConnId, payload: &[u8]) -> bool {
        let stream = self.streams.get_mut(id.index as usize).and_then(Option::as_mut);
        let (Some(conn), Some(stream)) = (self.connections.get_mut(id), stream) else {
            return false;
        };
        let mut header = self.pool.take();
        let passes = conn.writable && conn.machine.may_pass(payload, &mut header);
        if passes {
            let count = match self.os.write_both(stream, &header, payload) {
                Ok(count) => {
                    conn.writable = count == header.len() + payload.len();
                    count
                }
                Err(error) => {
                    // If it is for good, the handler is told at the end of the connection, as after every other write.
                    let _ = conn.write_failed(error, &mut self.pool);
                    0
                }
            };
            conn.machine
                .handle_passed(&header, payload, count, self.now, &mut self.pool);
        }
        self.pool.give(header);
        passes
    }
}

impl Connection {
    /// A read failed, for now or for good. False if there is nothing to make of that.
    #[cold]
    fn read_failed(&mut self, error: io::Error, pool: &mut Pool) -> bool {
        if error.kind() == io::ErrorKind::Interrupted {
            return false;
        }
        self.readable = false;
        if error.kind() == io::ErrorKind::WouldBlock {
            self.machine.handle_blocked(pool);
        } else if is_short_of_memory(&error) {
            self.retry = true;
            return false;
        } else {
            self.machine.handle_read_error(error, pool);
        }
        true
    }

    /// A write failed: for now, or for good.
    #[cold]
    fn write_failed(&mut self, error: io::Error, pool: &mut Pool) -> ControlFlow<()> {
        match error.kind() {
            io::ErrorKind::WouldBlock => self.writable = false,
            io::ErrorKind::Interrupted => {}
            _ if is_short_of_memory(&error) => {
                self.writable = false;
                self.retry = true;
            }
            _ => {
                self.machine.handle_write_error(error, pool);
                // Its last words may be in the kernel already.
                self.readable = true;
                return ControlFlow::Break(());
            }
        }
        ControlFlow::Continue(())
    }
}

/// The kernel lacks memory for this call, for the moment.
pub(super) fn is_short_of_memory(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOBUFS | libc::ENOMEM))
}
