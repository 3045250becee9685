//! One connection's turn: read, decode, call the handler, write, see what the socket needs.
//!
//! [`drive`] is the only engine. The reactor hosts it for real and simulated sockets, and the model
//! checker hosts it for a socket of a few fields.

use std::io;

use super::connection::{Connection, HangUp};
use super::os::{is_short_of_memory, StreamOps};
use crate::catch::{catch, Panic};
use crate::proto::{Event, InputCursor, Pool, State, Time};
use crate::reason::{CloseReason, Closed};

/// The size of one read. A connection's input is at most its maximum frame and one read.
pub(crate) const READ_SIZE: usize = 64 * 1024;
/// What a frame costs of the read budget beside its bytes: four full reads are as much as 1,024
/// small frames.
pub(crate) const FRAME_COST: usize = 256;

/// The buffers that all connections of a server read into.
pub(crate) struct Scratch {
    pub(crate) wire: Vec<u8>,
    /// What TLS decrypts from `wire`.
    pub(crate) plain: Vec<u8>,
}

impl Scratch {
    pub(crate) fn new() -> Self {
        Self {
            wire: vec![0; READ_SIZE],
            plain: Vec::new(),
        }
    }
}

/// What a connection may still use up in this iteration.
#[derive(Debug)]
pub(crate) struct Budget {
    /// Bytes to read, less what frames and other events cost.
    pub(crate) bytes: usize,
    /// Frames and other events to deliver: one read may bring many thousands.
    pub(crate) frames: usize,
}

impl Budget {
    pub(crate) fn new(bytes: usize) -> Self {
        Self {
            bytes,
            frames: (bytes / FRAME_COST).max(1),
        }
    }

    /// `frames` frames, or other events, were delivered.
    #[inline]
    pub(crate) fn charge(&mut self, frames: usize) {
        self.bytes = self.bytes.saturating_sub(frames.saturating_mul(FRAME_COST));
        self.frames = self.frames.saturating_sub(frames);
    }
}

/// The connection of a turn with everything that its I/O needs.
pub(crate) struct Parts<'a, I: StreamOps> {
    pub(crate) conn: &'a mut Connection<I::Stream>,
    pub(crate) pool: &'a mut Pool,
    pub(crate) os: &'a mut I,
    pub(crate) now: &'a mut Time,
}

impl<I: StreamOps> Parts<'_, I> {
    /// The end of a turn that delivered nothing but frames: one write. True if the connection is at
    /// rest.
    #[inline(always)]
    fn finish(&mut self) -> bool {
        let Parts {
            conn,
            pool,
            os,
            now,
        } = self;
        conn.write_out(*os, pool, now);
        conn.machine.shrink(pool);
        conn.machine.is_idle() && !conn.readable && !conn.retry
    }
}

/// Where a turn takes place: the reactor, or the model checker's world.
pub(crate) trait Host {
    type Os: StreamOps;

    /// The connection; `None` once it has been removed.
    fn parts(&mut self) -> Option<Parts<'_, Self::Os>>;

    /// Delivers frames from `input` while there is nothing else to do than to call the handler.
    fn deliver_frames(&mut self, input: &mut InputCursor<'_>, budget: &mut Budget);

    /// Delivers an event other than such frames.
    fn handle_event(&mut self, event: Event<'_>);

    /// The connection has just opened: calls the handler.
    fn handle_opened(&mut self);

    /// Reports a panic in the connection's own code.
    fn report_panic(&mut self, source: &str, panic: Panic);

    /// Some limit on memory applies, or could.
    fn is_memory_limited(&self) -> bool;

    /// Nothing may be read without a look at the memory of all connections.
    fn is_memory_tight(&self) -> bool;

    /// Before a read: accounts for the connection's memory, and pauses it if it holds too much.
    fn before_read(&mut self);

    /// The maximum size of the next read.
    fn max_read(&mut self) -> usize;

    /// Takes one of the iteration's handshakes. False if there is none left.
    fn take_handshake(&mut self) -> bool;

    /// An outgoing connection that is not established: looks for the attempt's result. True once
    /// the connection is not connecting any more.
    fn check_connect(&mut self) -> bool;

    /// The turn is over: accounts for memory, and sets the timer that a callback may have moved.
    /// `again` queues another turn, because work is left that no event will announce.
    fn settle(&mut self, again: bool);

    /// The turn is over, and nothing but a timer can have changed.
    fn settle_timer(&mut self);

    /// The connection is over: closes the socket and frees the slot.
    fn finish_close(&mut self, reset: bool);
}

/// The result of a read.
enum Read<'a> {
    Input(InputCursor<'a>),
    /// The input has been delivered already.
    Delivered,
    /// Not now: no budget, paused, or something went wrong.
    Nothing,
    /// Nothing to read and nothing to deliver: everything is as it was.
    Idle,
}

/// Runs one turn of the connection.
///
/// Most turns take one of two shortcuts, which hold only while the machine's table of predicates
/// says that nothing else can be due: [`answer`] for input to an idle connection, and [`open`] for
/// a connection that opens at once. [`serve`] does everything.
pub(crate) fn drive<H: Host>(host: &mut H, scratch: &mut Scratch, budget: &mut Budget) {
    let tight = host.is_memory_tight();
    let Some(parts) = host.parts() else {
        return;
    };
    if !tight && budget.bytes > 0 && parts.conn.is_at_rest() {
        let at_rest = match parts.read(scratch, budget, usize::MAX) {
            Ok(Read::Input(input)) => answer(host, input, budget),
            Ok(_) => false,
            Err(panic) => {
                end_in_panic(host, panic);
                false
            }
        };
        if !at_rest {
            serve(host, scratch, budget, true);
        }
    } else if !open(host, tight) {
        serve(host, scratch, budget, false);
    }
}

/// The turn of a connection at rest: one read, its frames, one write. True if the connection is at
/// rest again; otherwise the input is delivered, and the remainder is for [`serve`].
///
/// Memory accounting is skipped: an idle connection owns no buffer before or after. Its deadline
/// only moves later, unless a callback has set a timer.
#[inline(always)]
fn answer<H: Host>(host: &mut H, mut input: InputCursor<'_>, budget: &mut Budget) -> bool {
    if !input.is_used_up() {
        host.deliver_frames(&mut input, budget);
    }
    match host.parts() {
        Some(mut parts) if parts.conn.machine.only_frames() && input.is_used_up() => {
            if parts.finish() {
                // Its deadline has only moved later since the timer was armed, unless a callback
                // has set one.
                if parts.conn.machine.is_timed() {
                    host.settle_timer();
                }
                return true;
            }
            // Part of a TLS record may have come, and nothing else.
            let Parts {
                conn, pool, now, ..
            } = parts;
            conn.machine.end_input(input, *now, pool);
        }
        _ => deliver(host, input, budget),
    }
    false
}

/// What comes before frames, if nothing else can be due: a connection that opens as soon as it is
/// accepted, or one that is not established. False if there may be more to do.
#[inline(never)]
fn open<H: Host>(host: &mut H, tight: bool) -> bool {
    let Some(Parts { conn, .. }) = host.parts() else {
        return true;
    };
    if conn.machine.is_connecting() {
        return !host.check_connect();
    }
    if tight || !conn.machine.is_newly_open() {
        return false;
    }
    conn.machine.mark_opened();
    host.handle_opened();
    let at_rest = host.parts().is_some_and(|mut parts| parts.finish());
    if at_rest {
        host.settle_timer();
    }
    at_rest
}

/// The turn of a connection to which anything may happen. `begun`: one read has been delivered.
#[inline(never)]
fn serve<H: Host>(host: &mut H, scratch: &mut Scratch, budget: &mut Budget, begun: bool) {
    let (mut begun, mut flushed, mut idle) = (begun, false, false);
    loop {
        let read = if std::mem::take(&mut begun) {
            Read::Delivered
        } else {
            read(host, scratch, budget)
        };
        let progress = match read {
            Read::Input(input) => {
                deliver(host, input, budget);
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
        flush(host);
        match host.parts() {
            // Nothing else is due, and there is nothing to read.
            Some(Parts { conn, .. }) if conn.machine.only_frames() && !conn.can_read() => {
                idle = progress;
                break;
            }
            Some(_) => {}
            None => return,
        }
        if let Some(reset) = next_step(host) {
            return host.finish_close(reset);
        }
        if !progress {
            break;
        }
        flushed = true;
    }
    let Some(Parts { conn, pool, .. }) = host.parts() else {
        return;
    };
    if conn.machine.is_detaching() {
        return;
    }
    conn.machine.shrink(pool);
    let done = idle && conn.machine.only_frames() && conn.machine.queued() == 0;
    let left = conn.machine.has_events()
        || conn.can_read()
        || conn.looks_for_end()
        || (conn.writable && conn.machine.sendable() > 0);
    host.settle(!done && left);
}

/// Returns input that the machine holds, or else reads from the socket.
fn read<'s, H: Host>(host: &mut H, scratch: &'s mut Scratch, budget: &mut Budget) -> Read<'s> {
    let limited = host.is_memory_limited();
    let Some(Parts { conn, .. }) = host.parts() else {
        return Read::Idle;
    };
    let ordinary = conn.machine.only_frames() && !conn.paused_for_memory && !limited;
    if !ordinary {
        host.before_read();
        if probe(host) {
            return Read::Nothing;
        }
    }
    let Some(Parts { conn, now, .. }) = host.parts() else {
        return Read::Nothing;
    };
    if budget.bytes == 0 || budget.frames == 0 {
        return Read::Nothing;
    }
    let has_events = conn.machine.has_events();
    if has_events && !(conn.machine.reports_only_output() && conn.can_read()) {
        return Read::Input(conn.machine.begin_buffered());
    }
    if !conn.can_read() && !conn.looks_for_end() {
        return Read::Idle;
    }
    let is_handshake = conn.machine.state() == State::Handshaking;
    let allowance = conn.machine.read_allowance(*now);
    if is_handshake && !host.take_handshake() {
        return Read::Nothing;
    }
    let allowance = allowance.min(host.max_read());
    let Some(parts) = host.parts() else {
        return Read::Nothing;
    };
    if allowance == 0 {
        return match has_events {
            true => Read::Input(parts.conn.machine.begin_buffered()),
            false => Read::Nothing,
        };
    }
    if parts.conn.machine.has_stash() {
        let Parts {
            conn, pool, now, ..
        } = parts;
        let input = catch(|| conn.machine.handle_stash(*now, &mut scratch.plain, pool));
        return input.map_or_else(|panic| end_in_panic(host, panic), Read::Input);
    }
    match parts.read(scratch, budget, allowance) {
        Ok(read) => read,
        Err(panic) => end_in_panic(host, panic),
    }
}

/// Looks for an error of a socket that is not read, because it is paused or input is over. True if
/// there is one.
fn probe<H: Host>(host: &mut H) -> bool {
    let Some(Parts {
        conn,
        pool,
        os,
        now,
    }) = host.parts()
    else {
        return true;
    };
    let is_new = conn.hang_up == HangUp::New && conn.machine.wants_error();
    if !(is_new || conn.readable && conn.paused_for_memory) {
        return false;
    }
    if is_new {
        conn.hang_up = HangUp::Known;
    }
    // Reads say "end" for ever; a write of nothing says whether there was a reset.
    let Some(Err(error)) = conn.stream.as_mut().map(|stream| os.write(stream, &[])) else {
        return false;
    };
    let passing = match error.kind() {
        io::ErrorKind::WouldBlock => true,
        // What every write says after our own FIN.
        io::ErrorKind::BrokenPipe => conn.machine.has_sent_fin(),
        _ => false,
    };
    if error.kind() == io::ErrorKind::Interrupted || is_short_of_memory(&error) {
        // The hang-up is announced once: another try must find what it was.
        if is_new {
            conn.hang_up = HangUp::New;
            conn.retry = true;
        }
        return false;
    }
    if passing {
        return false;
    }
    conn.handle_failure(os, error, *now, pool);
    true
}

impl<I: StreamOps> Parts<'_, I> {
    /// Reads from the socket, at most `allowance` bytes. A TLS configuration may panic.
    #[inline(always)]
    fn read<'s>(
        self,
        scratch: &'s mut Scratch,
        budget: &mut Budget,
        allowance: usize,
    ) -> Result<Read<'s>, Panic> {
        let Parts {
            conn,
            pool,
            os,
            now,
        } = self;
        let Some(stream) = &mut conn.stream else {
            return Ok(Read::Nothing);
        };
        let (machine, now) = (&mut conn.machine, *now);
        let room = allowance.min(scratch.wire.len());
        let buffer = scratch.wire.get_mut(..room).unwrap_or_default();
        match os.read(stream, buffer) {
            Ok(0) => {
                conn.readable = false;
                machine.handle_eof(now, pool);
            }
            Ok(count) => {
                budget.bytes = budget.bytes.saturating_sub(count);
                // With edge triggers a short read means empty, unless the end is behind it.
                if count < room && conn.hang_up == HangUp::None && !machine.wants_fresh_blocked() {
                    conn.readable = false;
                }
                let Scratch { wire, plain } = scratch;
                let wire = wire.get_mut(..count).unwrap_or_default();
                if !machine.has_tls() {
                    return Ok(Read::Input(machine.handle_input(now, wire, plain, pool)));
                }
                let input = catch(|| machine.handle_input(now, wire, plain, pool));
                return input.map(Read::Input);
            }
            Err(error) => {
                if !conn.read_failed(os, error, now, pool) {
                    return Ok(Read::Nothing);
                }
            }
        }
        Ok(Read::Input(InputCursor::nothing()))
    }
}

/// A TLS configuration may hold foreign code: a certificate resolver, a verifier.
#[cold]
fn end_in_panic<'s, H: Host>(host: &mut H, panic: Panic) -> Read<'s> {
    host.report_panic("a TLS configuration", panic);
    if let Some(Parts { conn, pool, .. }) = host.parts() {
        // At once: the TLS session was left in an unknown state.
        conn.machine.end(Closed::new(CloseReason::Panicked), pool);
    }
    Read::Nothing
}

/// Delivers events and frames to the handler, as far as the budget goes.
fn deliver<H: Host>(host: &mut H, mut input: InputCursor<'_>, budget: &mut Budget) {
    let mut spent = false;
    loop {
        let Some(Parts { conn, .. }) = host.parts() else {
            return;
        };
        if conn.machine.only_frames() {
            host.deliver_frames(&mut input, budget);
        }
        let Some(Parts {
            conn, pool, now, ..
        }) = host.parts()
        else {
            return;
        };
        if conn.machine.only_frames() && input.is_used_up() {
            break;
        }
        spent = budget.frames == 0;
        if spent {
            break;
        }
        let machine = &mut conn.machine;
        let next = if machine.has_framer() {
            // A framer is foreign code too.
            catch(|| machine.next_event(&mut input, *now, pool))
        } else {
            Ok(machine.next_event(&mut input, *now, pool))
        };
        match next {
            Ok(Some(event)) => {
                budget.charge(1);
                host.handle_event(event);
            }
            Ok(None) => break,
            Err(panic) => {
                host.report_panic("a framer", panic);
                if let Some(Parts {
                    conn, pool, now, ..
                }) = host.parts()
                {
                    conn.machine
                        .close(Closed::new(CloseReason::Panicked), *now, pool);
                }
                break;
            }
        }
    }
    if let Some(Parts {
        conn, pool, now, ..
    }) = host.parts()
    {
        let advanced = input.has_advanced();
        conn.machine.end_input(input, *now, pool);
        if spent {
            conn.machine.postpone(advanced, *now);
        }
    }
}

/// Shuts down the write side if that is due. `Some(reset)` once the connection is over.
fn next_step<H: Host>(host: &mut H) -> Option<bool> {
    let Parts { conn, os, now, .. } = host.parts()?;
    conn.next_step(os, now)
}

/// Writes pending output until the kernel accepts no more.
#[inline(never)]
pub(crate) fn flush<H: Host>(host: &mut H) {
    if let Some(Parts {
        conn,
        pool,
        os,
        now,
    }) = host.parts()
    {
        conn.note_delivery(os, *now);
        conn.write_out(os, pool, now);
    }
}
