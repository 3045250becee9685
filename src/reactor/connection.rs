//! One connection with its socket: readiness, and what the socket's calls mean for the machine.

use std::io::{self, IoSlice};
use std::ops::ControlFlow;

use super::os::{is_short_of_memory, StreamOps, Token};
use super::standing::Standing;
use crate::addr::{Addr, PackedAddr};
use crate::handler::ConnInfo;
use crate::id::{ConnId, ListenerId};
use crate::proto::{length, Chunk, Frame, FrameBuf, FrameError, FRAME_PIECES, PIECES};
use crate::proto::{Machine, NextStep, Pool, SendError, State, Time};

/// Of a large frame, this part is worth keeping as it is.
const KEPT_PART: usize = 8;

/// Whether an end of stream, an error or urgent data was announced.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum HangUp {
    /// A short read is the last one.
    None,
    /// A short read is not the last one, from now on.
    Known,
    /// The same, and the peer may be gone for good: a connection that will not read asks the
    /// socket.
    New,
}

/// One connection and what the reactor knows of its socket.
pub(crate) struct Connection<S> {
    pub(crate) id: ConnId,
    pub(crate) machine: Machine,
    /// `None` between two attempts to connect, and once the socket has left the loop.
    pub(crate) stream: Option<S>,
    /// `None` for an outgoing connection.
    pub(crate) listener: Option<ListenerId>,
    pub(crate) peer: PackedAddr,
    pub(crate) accepted_at: Time,
    /// The kernel may have input.
    pub(crate) readable: bool,
    /// The kernel may accept output.
    pub(crate) writable: bool,
    /// The socket is registered for writing too: from the first write on that the kernel has not
    /// taken whole, or from birth if it was not connected yet.
    pub(crate) write_interest: bool,
    pub(crate) hang_up: HangUp,
    /// In a run queue.
    pub(crate) queued: bool,
    /// A call failed for now, and nothing will announce another chance: retry when the timer fires.
    pub(crate) retry: bool,
    /// Not read because memory is tight.
    pub(crate) paused_for_memory: bool,
    /// What admission notes of it.
    pub(crate) standing: Standing,
    /// Remaining read budget of the iteration `budget_iteration`, in units of a frame's cost: a
    /// connection may have several iterations in one iteration.
    pub(crate) budget: u16,
    /// The low bits of the iteration's number.
    pub(crate) budget_iteration: u16,
}

impl<S> Connection<S> {
    /// A connection that begins now, in the loop's iteration number `iteration`, with a whole
    /// budget and nothing known of its socket.
    #[inline(always)]
    pub(crate) fn new(
        id: ConnId,
        listener: Option<ListenerId>,
        peer: Addr,
        machine: Machine,
        now: Time,
        iteration: u64,
    ) -> Self {
        Self {
            id,
            stream: None,
            machine,
            listener,
            peer: peer.into(),
            accepted_at: now,
            readable: false,
            writable: false,
            write_interest: false,
            hang_up: HangUp::None,
            queued: false,
            retry: false,
            paused_for_memory: false,
            standing: Standing::default(),
            budget: 0,
            budget_iteration: (iteration as u16).wrapping_sub(1),
        }
    }

    /// Gives it a new socket, which may be connected already. One that is not is registered for
    /// room too: that tells when it is.
    pub(super) fn set_socket(&mut self, stream: S, connected: bool) {
        self.stream = Some(stream);
        (self.writable, self.write_interest) = (connected, !connected);
    }

    /// A read is wanted and may return something. A connection that waits for a fresh "would
    /// block" reads in any case: an edge that was consumed before announces nothing more.
    #[inline]
    pub(crate) fn can_read(&self) -> bool {
        if self.machine.only_frames() {
            return self.readable && !self.paused_for_memory;
        }
        let asks = self.machine.wants_fresh_blocked() && !self.retry;
        (self.readable || asks || self.machine.has_stash())
            && !self.is_paused_for_memory()
            && self.machine.wants_read()
    }

    /// Output is left, and neither an event nor a timer leads to the next write.
    #[cfg(feature = "sim")]
    pub(crate) fn is_stuck(&self) -> bool {
        let is_awaited = self.writable || self.write_interest || self.retry;
        self.stream.is_some() && self.machine.sendable() > 0 && !is_awaited
    }

    /// A hang-up was announced to a connection that its handler has paused: one read is allowed to
    /// find the end, as long as nothing that it returns has to wait.
    pub(crate) fn looks_for_end(&self) -> bool {
        self.hang_up == HangUp::New
            && self.readable
            && !self.retry
            && !self.is_paused_for_memory()
            && self.machine.may_look_for_end()
    }

    /// Input has arrived for a connection that only has to answer it, and a short read is the last.
    #[inline]
    pub(crate) fn is_at_rest(&self) -> bool {
        // One branch for all of them.
        let is_ready = self.readable & self.writable;
        let is_barred = self.paused_for_memory | self.retry | (self.hang_up != HangUp::None);
        is_ready && !is_barred && self.machine.is_idle()
    }

    /// Not read because memory is tight.
    #[inline]
    pub(crate) fn is_paused_for_memory(&self) -> bool {
        self.paused_for_memory && self.machine.state() == State::Open
    }

    pub(crate) fn peer(&self) -> Addr {
        self.peer.unpacked()
    }

    /// The client's address: the one behind a proxy if its header names one, else the peer's.
    pub(super) fn source(&self) -> Addr {
        let source = self.machine.proxy().and_then(|header| header.tcp_source());
        source.map_or_else(|| self.peer(), Addr::from)
    }

    pub(super) fn info(&self, now: Time) -> ConnInfo {
        ConnInfo {
            id: self.id,
            listener: self.listener,
            peer: self.peer(),
            source: self.source(),
            state: self.machine.state(),
            age: now.since(self.accepted_at),
            idle: now.since(self.machine.last_input()),
            traffic: self.machine.traffic(),
            queued: self.machine.queued(),
            buffered: self.machine.buffered(),
            paused: self.machine.is_paused_by_handler(),
            congested: self.machine.is_congested(),
            throttled: self.machine.is_throttled(),
            paused_for_memory: self.is_paused_for_memory(),
            time_left: self.machine.time_left(now),
        }
    }
}

/// What a connection does with its own socket.
impl<S> Connection<S> {
    /// Writes pending output until the kernel accepts no more.
    #[inline(always)]
    pub(super) fn write_out<I>(&mut self, os: &mut I, pool: &mut Pool, now: &mut Time)
    where
        I: StreamOps<Stream = S>,
    {
        let Some(stream) = &mut self.stream else {
            return;
        };
        loop {
            let (length, written) = match self.machine.transmit(*now, pool) {
                Some(&[]) => return,
                _ if !self.writable => break,
                Some(bytes) => (bytes.len(), os.write(stream, bytes)),
                None => write_pieces(os, stream, &self.machine),
            };
            match written {
                Ok(count) => {
                    if count < length {
                        // A callback may have blocked: its output could not be written before.
                        *now = os.now();
                    }
                    let is_done = self.machine.handle_sent(count, *now, pool);
                    // A short write means full: the next edge says when there is room.
                    self.writable = count == length;
                    if is_done {
                        return;
                    }
                }
                Err(error) => match self.write_failed(error, false, *now, pool) {
                    ControlFlow::Continue(()) => break,
                    ControlFlow::Break(()) => return,
                },
            }
        }
        self.await_room(os, now);
    }

    /// Output is left. If nothing else leads to another write, the poll announces room from now on.
    #[cold]
    fn await_room<I>(&mut self, os: &mut I, now: &mut Time)
    where
        I: StreamOps<Stream = S>,
    {
        *now = os.now();
        self.machine.handle_unsent(*now);
        let is_awaited = self.writable || self.write_interest || self.retry;
        let registered = match &mut self.stream {
            Some(stream) if !is_awaited => os.reregister_stream(stream, Token::of_conn(self.id)),
            _ => return,
        };
        self.write_interest = registered.is_ok();
        // A timer leads to the next write, and to the next try.
        self.retry = registered.is_err();
    }

    /// A timer has fired: expires the deadlines that were due at `due`.
    pub(crate) fn expire<I>(&mut self, os: &mut I, pool: &mut Pool, now: &mut Time, due: Time)
    where
        I: StreamOps<Stream = S>,
    {
        if self.machine.is_write_overdue(due) && !self.writable {
            // The kernel announces room only when a good part of its buffer is free: a slow reader
            // may have taken bytes all the time. A write shows whether it has.
            self.writable = true;
            *now = os.now();
            self.write_out(os, pool, now);
        }
        self.end_retry();
        if self.machine.is_delivery_due(due) {
            self.ask_delivery(os, *now);
        }
        if self.is_paused_for_memory() {
            // What is late may be in the kernel, unread.
            self.machine.extend_late_input(due, *now);
        }
        if self.machine.deadline() <= due {
            self.machine.handle_timeout(due, *now, pool);
        }
    }

    /// The time of a retry has come: the next turn tries again.
    pub(super) fn end_retry(&mut self) {
        if std::mem::take(&mut self.retry) {
            self.readable = true;
            self.writable = true;
        }
    }

    /// Sends one frame: writes it past the queue if it is large, else queues it. An error is boxed:
    /// it is rare, and a large result would be copied each time. Nothing is written once
    /// `early_until` bytes were written in all.
    #[inline(always)]
    pub(crate) fn send<I>(
        &mut self,
        os: &mut I,
        pool: &mut Pool,
        now: &mut Time,
        payload: &[u8],
        early_until: u64,
    ) -> Result<(), Box<SendError>>
    where
        I: StreamOps<Stream = S>,
    {
        if payload.len() < os.large_frame() {
            match self.machine.send_below_watermark(payload, *now, pool) {
                Ok(true) => return Ok(()),
                Ok(false) => {}
                Err(error) => return Err(Box::new(error)),
            }
        }
        self.send_to_full(os, pool, now, payload, early_until)
            .map_err(Box::new)
    }

    /// Sends a frame that is large or would reach the high watermark.
    #[cold]
    fn send_to_full<I>(
        &mut self,
        os: &mut I,
        pool: &mut Pool,
        now: &mut Time,
        payload: &[u8],
        early_until: u64,
    ) -> Result<(), SendError>
    where
        I: StreamOps<Stream = S>,
    {
        if payload.len() >= os.large_frame() && pool.traffic.bytes_out < early_until {
            let payload = &mut [Chunk::Borrowed(payload)];
            return self.send_frame(os, pool, now, payload, early_until);
        }
        if pool.traffic.bytes_out < early_until {
            self.make_room(os, pool, now, payload.len());
        }
        self.machine.send(payload, *now, pool)
    }

    /// Sends one frame of any kind of payload, as [`Connection::send`].
    pub(crate) fn send_chunks<I>(
        &mut self,
        os: &mut I,
        pool: &mut Pool,
        now: &mut Time,
        payload: &mut [Chunk<'_>],
        early_until: u64,
    ) -> Result<(), Box<SendError>>
    where
        I: StreamOps<Stream = S>,
    {
        match payload {
            [small] if small.len() < os.large_frame() / KEPT_PART => {
                self.send(os, pool, now, small.bytes(), early_until)
            }
            payload => self
                .send_frame(os, pool, now, payload, early_until)
                .map_err(Box::new),
        }
    }

    fn send_frame<I>(
        &mut self,
        os: &mut I,
        pool: &mut Pool,
        now: &mut Time,
        payload: &mut [Chunk<'_>],
        early_until: u64,
    ) -> Result<(), SendError>
    where
        I: StreamOps<Stream = S>,
    {
        let (length, large) = (length(payload), os.large_frame());
        let is_early = pool.traffic.bytes_out < early_until;
        if is_early {
            self.make_room(os, pool, now, length);
        }
        let min_kept = large / KEPT_PART;
        let mut frame = self.machine.frame(payload, min_kept, *now, pool)?;
        if is_early && length >= large {
            self.write_through(os, pool, *now, &mut frame);
            self.encrypt_through(os, pool, now, &mut frame, early_until);
        }
        self.machine.queue_frame(frame, *now, pool);
        Ok(())
    }

    /// Sends one frame whose payload `write` appends to pending output.
    pub(crate) fn send_with<I>(
        &mut self,
        os: &mut I,
        pool: &mut Pool,
        now: &mut Time,
        write: impl FnOnce(&mut FrameBuf<'_>) -> Result<(), FrameError>,
        early_until: u64,
    ) -> Result<(), SendError>
    where
        I: StreamOps<Stream = S>,
    {
        let is_early = pool.traffic.bytes_out < early_until;
        if is_early {
            self.make_room(os, pool, now, 0);
        }
        let length = self.machine.send_with(write, *now, pool)?;
        if is_early {
            self.make_room(os, pool, now, length);
        }
        self.machine.congest_if_high(*now);
        Ok(())
    }

    /// Writes pending output if a frame with `length` bytes of payload would reach the high
    /// watermark, or is large: a peer whose socket has room is never treated as slow. That is one
    /// more write for each high watermark's worth of output, and one for each frame at the output
    /// limit.
    pub(crate) fn make_room<I>(
        &mut self,
        os: &mut I,
        pool: &mut Pool,
        now: &mut Time,
        length: usize,
    ) where
        I: StreamOps<Stream = S>,
    {
        let is_large = length >= os.large_frame();
        // The frame is about to be refused, and the peer may have read since the last write.
        self.writable |= self.machine.is_at_output_limit();
        if self.writable && (is_large || self.machine.would_congest(length)) {
            self.write_out(os, pool, now);
        }
    }

    /// Writes a large frame past the queue, if the queue is empty: at most what the kernel does not
    /// accept is copied.
    #[cold]
    fn write_through<I>(
        &mut self,
        os: &mut I,
        pool: &mut Pool,
        now: Time,
        frame: &mut Frame<'_, '_>,
    ) where
        I: StreamOps<Stream = S>,
    {
        let Some(stream) = &mut self.stream else {
            return;
        };
        if !self.writable || !self.machine.can_write_through() {
            return;
        }
        let mut pieces = [IoSlice::new(&[]); FRAME_PIECES];
        let (mut count, mut length) = (0, 0);
        for (place, piece) in pieces.iter_mut().zip(frame.pieces()) {
            *place = IoSlice::new(piece);
            (count, length) = (count + 1, length + piece.len());
        }
        match os.write_pieces(stream, pieces.get(..count).unwrap_or_default()) {
            Ok(count) => {
                self.writable = count == length;
                self.machine.count_written(count, pool);
                frame.taken += count;
            }
            Err(error) => {
                // A final error ends the connection in its own turn, as after any other write.
                let _ = self.write_failed(error, true, now, pool);
            }
        }
    }

    /// As [`Connection::write_through`] over TLS: encrypts from where the payload is.
    #[cold]
    fn encrypt_through<I>(
        &mut self,
        os: &mut I,
        pool: &mut Pool,
        now: &mut Time,
        frame: &mut Frame<'_, '_>,
        early_until: u64,
    ) where
        I: StreamOps<Stream = S>,
    {
        while self.writable && pool.traffic.bytes_out < early_until {
            match self.machine.encrypt_frame(frame, *now, pool) {
                0 => return,
                count => frame.taken += count,
            }
            self.write_out(os, pool, now);
        }
    }

    /// Asks how many bytes the kernel has not sent, if the end of the connection depends on them.
    pub(super) fn note_delivery<I>(&mut self, os: &mut I, now: Time)
    where
        I: StreamOps<Stream = S>,
    {
        if self.machine.wants_delivery() {
            self.ask_delivery(os, now);
        }
    }

    #[cold]
    pub(super) fn ask_delivery<I>(&mut self, os: &mut I, now: Time)
    where
        I: StreamOps<Stream = S>,
    {
        if let Some(stream) = &mut self.stream {
            let unsent = os.unsent(stream);
            self.machine.handle_delivery(unsent, now);
        }
    }

    /// Shuts down the write side if that is due. `Some(reset)` once the connection is over.
    pub(crate) fn next_step<I>(&mut self, os: &mut I, now: &mut Time) -> Option<bool>
    where
        I: StreamOps<Stream = S>,
    {
        if self.machine.next_step() == NextStep::Shutdown {
            self.note_delivery(os, *now);
            let sent = os.shutdown(self.stream.as_mut()?).is_ok();
            // The linger timeout counts from now: a callback may have blocked.
            *now = os.now();
            self.machine.handle_shutdown(*now, sent);
        }
        match self.machine.next_step() {
            NextStep::Gone { reset } => Some(reset),
            NextStep::Wait | NextStep::Shutdown => None,
        }
    }

    /// A read failed, for now or for good. False if the machine need not be asked for events.
    #[cold]
    pub(super) fn read_failed<I>(
        &mut self,
        os: &mut I,
        error: io::Error,
        now: Time,
        pool: &mut Pool,
    ) -> bool
    where
        I: StreamOps<Stream = S>,
    {
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
            self.handle_failure(os, error, now, pool);
        }
        true
    }

    /// The socket has failed for good. A reset after the peer's system took all output loses none:
    /// the last answer may be older.
    #[cold]
    pub(super) fn handle_failure<I>(
        &mut self,
        os: &mut I,
        error: io::Error,
        now: Time,
        pool: &mut Pool,
    ) where
        I: StreamOps<Stream = S>,
    {
        let Self {
            machine,
            stream,
            standing,
            ..
        } = self;
        // The kernel counts what others have written too.
        let is_known = machine.has_unsent_in_kernel() && !standing.is_adopted();
        if let (true, Some(stream)) = (is_known, stream) {
            // An outgoing connection's SYN counts as acknowledged too.
            let written = machine.traffic().bytes_out + u64::from(machine.is_outgoing());
            if machine.queued() == 0 && os.has_taken(stream, written) == Some(true) {
                machine.handle_delivery(Some(0), now);
            }
        }
        machine.handle_read_error(error, pool);
    }

    /// A write failed: for now, or for good.
    #[cold]
    fn write_failed(
        &mut self,
        error: io::Error,
        past_queue: bool,
        now: Time,
        pool: &mut Pool,
    ) -> ControlFlow<()> {
        match error.kind() {
            io::ErrorKind::WouldBlock => self.writable = false,
            io::ErrorKind::Interrupted => {}
            _ if is_short_of_memory(&error) => {
                self.writable = false;
                self.retry = true;
            }
            _ => {
                self.machine
                    .handle_write_error(error, past_queue, now, pool);
                // The peer's last bytes may be in the kernel already.
                self.readable = true;
                return ControlFlow::Break(());
            }
        }
        ControlFlow::Continue(())
    }
}

/// Writes the first pieces of pending output. Returns their length too.
#[cold]
fn write_pieces<I: StreamOps>(
    os: &mut I,
    stream: &mut I::Stream,
    machine: &Machine,
) -> (usize, io::Result<usize>) {
    let mut pieces = [IoSlice::new(&[]); PIECES];
    let count = machine.pieces(&mut pieces);
    let pieces = pieces.get(..count).unwrap_or_default();
    let length = pieces.iter().map(|piece| piece.len()).sum();
    (length, os.write_pieces(stream, pieces))
}
