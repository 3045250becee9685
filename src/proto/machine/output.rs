//! From the handler to the peer's system: frames are queued, encrypted late, and written; the kernel
//! tells what it has not sent. And the options, which apply to both directions.

use std::error::Error as StdError;
use std::io::{self, IoSlice};
use std::rc::Rc;

use super::Machine;
use crate::catch::Panic;
use crate::error::Error;
use crate::proto::close::closed_by;
use crate::proto::framing::{Codec, FrameBuf, FrameError, Framing};
use crate::proto::life::Phase;
use crate::proto::payload::Chunk;
use crate::proto::pool::Pool;
use crate::proto::rates::SharedMeters;
use crate::proto::send::Frame;
use crate::proto::state::SendError;
use crate::proto::status::Events;
use crate::proto::time::Time;
use crate::proto::tls::Session;
use crate::proto::ConnConfig;
use crate::reason::{CloseReason, Closed};

impl Machine {
    // From the handler.

    /// Queues one frame.
    #[inline(never)]
    pub(crate) fn send(
        &mut self,
        payload: &[u8],
        now: Time,
        pool: &mut Pool,
    ) -> Result<(), SendError> {
        self.queue::<true>(payload, now, pool).map(|_| ())
    }

    /// As [`Machine::send`]. `false`, with nothing queued, if the frame would reach the high
    /// watermark.
    #[inline]
    pub(crate) fn send_below_watermark(
        &mut self,
        payload: &[u8],
        now: Time,
        pool: &mut Pool,
    ) -> Result<bool, SendError> {
        self.queue::<false>(payload, now, pool)
    }

    #[inline(always)]
    fn queue<const MAY_CONGEST: bool>(
        &mut self,
        payload: &[u8],
        now: Time,
        pool: &mut Pool,
    ) -> Result<bool, SendError> {
        if !self.only_frames() && !self.can_queue() {
            return Err(self.refuse_for_good());
        }
        let Self {
            codec,
            active,
            limits,
            tls,
            ..
        } = self;
        let send_buf = &mut active.get_or_insert_with(|| pool.take_active()).send_buf;
        let encrypted = tls.as_deref().map_or(0, Session::pending_app_bytes);
        let elsewhere = send_buf.kept_len() + encrypted;
        let queued = send_buf.copied_len() + elsewhere;
        if !MAY_CONGEST && queued + payload.len() >= limits.high_watermark {
            return Ok(false);
        }
        if MAY_CONGEST && queued >= limits.output_limit {
            return Err(self.refuse_to_send(queued, now));
        }
        codec.encode(payload, send_buf.tail(&mut pool.buffers))?;
        let is_high = send_buf.copied_len() + elsewhere >= limits.high_watermark;
        self.count_sent(payload.len(), pool);
        if is_high {
            self.congest(now);
        }
        Ok(true)
    }

    /// True if a frame with `length` bytes of payload would reach the high watermark.
    #[inline]
    pub(crate) fn would_congest(&self, length: usize) -> bool {
        self.queued() + length >= self.limits.high_watermark
    }

    /// True if the next frame is refused unless pending output is written before.
    pub(crate) fn is_at_output_limit(&self) -> bool {
        self.sendable() > 0 && self.unsent_app_bytes() >= self.limits.output_limit
    }

    #[cold]
    fn refuse_for_good(&mut self) -> SendError {
        if self.status.life.is_open() && self.status.send.has_failed() {
            // Whatever the handler makes of it: its output is lost.
            let (closed, ending) = (Closed::new(CloseReason::Reset), self.status.is_ending());
            self.wake_unpooled().ending.lose(closed, ending);
        }
        SendError::Closed
    }

    #[cold]
    fn refuse_to_send(&mut self, queued: usize, now: Time) -> SendError {
        self.congest(now);
        SendError::Full {
            queued,
            limit: self.limits.output_limit,
        }
    }

    #[inline]
    fn count_sent(&mut self, length: usize, pool: &mut Pool) {
        self.traffic.frames_out += 1;
        pool.traffic.frames_out += 1;
        pool.sizes_out.record(length as u64);
    }

    /// Checks whether a frame can be queued. Ciphertext counts, but for the bytes of TLS itself.
    fn check_queue(&mut self, now: Time) -> Result<(), SendError> {
        if !self.can_queue() {
            return Err(self.refuse_for_good());
        }
        match self.unsent_app_bytes() {
            queued if queued >= self.limits.output_limit => Err(self.refuse_to_send(queued, now)),
            _ => Ok(()),
        }
    }

    /// Makes one frame of `payload`, for [`Machine::queue_frame`]. It keeps longer chunks than
    /// `min_kept` as they are.
    pub(crate) fn frame<'a, 'c>(
        &mut self,
        payload: &'a mut [Chunk<'c>],
        min_kept: usize,
        now: Time,
        pool: &mut Pool,
    ) -> Result<Frame<'a, 'c>, SendError> {
        self.check_queue(now)?;
        Frame::new(&mut self.codec, payload, min_kept, &mut pool.buffers)
    }

    /// True if no output is pending that a frame would have to wait for.
    pub(crate) fn can_write_through(&self) -> bool {
        self.only_frames() && self.tls.is_none() && self.parts().send_buf.is_empty()
    }

    /// Counts bytes that the kernel took.
    #[inline(always)]
    pub(crate) fn count_written(&mut self, count: usize, pool: &mut Pool) {
        self.traffic.bytes_out += count as u64;
        pool.traffic.bytes_out += count as u64;
    }

    /// Encrypts the front of a frame, unless output is pending. Returns how many bytes it was.
    pub(crate) fn encrypt_frame(
        &mut self,
        frame: &Frame<'_, '_>,
        now: Time,
        pool: &mut Pool,
    ) -> usize {
        let is_next = self.only_frames() && self.parts().send_buf.is_empty();
        let encrypted = match &mut self.tls {
            Some(session) if is_next => session.encrypt_pieces(frame.pieces(), &mut pool.buffers),
            _ => Ok(0),
        };
        encrypted.unwrap_or_else(|error| {
            self.end_worn_out(error, now, pool);
            0
        })
    }

    /// Queues the remainder of a frame.
    ///
    /// Drops it if the kernel takes no more for good, or TLS has ended.
    pub(crate) fn queue_frame(&mut self, frame: Frame<'_, '_>, now: Time, pool: &mut Pool) {
        self.count_sent(frame.length, pool);
        if !self.can_queue() {
            return;
        }
        let active = self.active.get_or_insert_with(|| pool.take_active());
        let Pool {
            buffers, shared, ..
        } = pool;
        frame.queue(&mut active.send_buf, buffers, shared);
        self.congest_if_high(now);
    }

    /// Queues one frame whose payload `write` appends. Returns the payload's length.
    /// [`Machine::congest_if_high`] is to be called next.
    pub(crate) fn send_with(
        &mut self,
        write: impl FnOnce(&mut FrameBuf<'_>) -> Result<(), FrameError>,
        now: Time,
        pool: &mut Pool,
    ) -> Result<usize, SendError> {
        self.check_queue(now)?;
        let active = self.active.get_or_insert_with(|| pool.take_active());
        let tail = active.send_buf.tail(&mut pool.buffers);
        let length = self.codec.encode_with(write, tail, &mut pool.buffers)?;
        self.count_sent(length, pool);
        Ok(length)
    }

    /// Pauses reading if pending output has reached the high watermark.
    pub(crate) fn congest_if_high(&mut self, now: Time) {
        if self.unsent_app_bytes() >= self.limits.high_watermark {
            self.congest(now);
        }
    }

    /// Callbacks have worked until `now`: the idle timeout starts anew, if input came, or the
    /// connection opened, in the turn that `began` then.
    pub(crate) fn note_work(&mut self, began: Time, now: Time) {
        if self.status.life.is_open() && began <= self.last_input {
            self.last_input = now;
            if let Some(active) = &mut self.active {
                active.deadlines.note_input();
            }
        }
    }

    /// Calls `see` for each shared payload that is pending.
    #[cfg(feature = "sim")]
    pub(crate) fn each_shared(&self, see: impl FnMut(&std::sync::Arc<[u8]>)) {
        self.parts().send_buf.each_shared(see);
    }

    // To the socket.

    /// Returns how many pending bytes the kernel can be given now: during a handshake TLS's own.
    #[inline]
    pub(crate) fn sendable(&self) -> usize {
        if self.only_frames() {
            return self.queued();
        }
        match &self.tls {
            _ if !self.allows().write => 0,
            Some(session) if session.is_handshaking() => session.pending().len(),
            _ => self.queued(),
        }
    }

    /// Returns the bytes to write now; encrypts as late as this. `None` if they are in several
    /// pieces: see [`Machine::pieces`].
    #[inline]
    pub(crate) fn transmit(&mut self, now: Time, pool: &mut Pool) -> Option<&[u8]> {
        if self.only_frames() && self.tls.is_none() {
            self.parts().send_buf.whole()
        } else {
            self.prepare(now, pool)
        }
    }

    /// Fills `pieces` with the first ones to write now; returns how many.
    pub(crate) fn pieces<'a>(&'a self, pieces: &mut [IoSlice<'a>]) -> usize {
        self.parts().send_buf.pieces(pieces)
    }

    #[inline(never)]
    fn prepare(&mut self, now: Time, pool: &mut Pool) -> Option<&[u8]> {
        if self.only_frames() {
            self.encrypt(now, pool);
        } else if !self.allows().write {
            // TLS may answer by itself behind our FIN, where nothing can be written.
            if let (true, Some(session)) = (self.status.send.has_sent_fin(), &mut self.tls) {
                session.silence(&mut pool.buffers);
            }
            return Some(&[]);
        } else {
            if !self.write_closed() {
                self.encrypt(now, pool);
            }
            self.prepare_end(pool);
        }
        match &self.tls {
            Some(session) => Some(session.pending()),
            None => self.parts().send_buf.whole(),
        }
    }

    /// Encrypts pending output.
    #[inline]
    fn encrypt(&mut self, now: Time, pool: &mut Pool) {
        if let (Some(session), Some(active)) = (&mut self.tls, &mut self.active) {
            let encrypted = match active.send_buf.whole() {
                Some(plain) => session.encrypt([plain, &[]], &mut pool.buffers),
                None => session.encrypt_pieces(active.send_buf.all_pieces(), &mut pool.buffers),
            };
            match encrypted {
                Ok(taken) => active.send_buf.advance(taken),
                Err(error) => self.end_worn_out(error, now, pool),
            }
        }
    }

    /// The keys of TLS 1.2 are worn out, or a cipher panicked: closes in order behind what was
    /// encrypted. The remainder is lost, which the reason says.
    #[cold]
    fn end_worn_out(&mut self, error: Box<dyn StdError + Send + Sync>, now: Time, pool: &mut Pool) {
        let reason = match error.is::<Panic>() {
            true => CloseReason::Panicked,
            false => CloseReason::Tls,
        };
        let closed = Closed::with(reason, error);
        self.status.tls_ended = true;
        self.status.send.relieve();
        self.resume_clocks(now);
        self.drop_output(pool);
        if self.status.is_ending() {
            self.wake(pool).0.ending.set_loss(closed);
            self.close(Closed::new(reason), now, pool);
        } else {
            self.close(closed, now, pool);
        }
    }

    /// Appends close_notify behind the last frame, and goes on to FIN once all is written.
    fn prepare_end(&mut self, pool: &mut Pool) {
        let is_flushing = self.status.life.phase() == Phase::Flush;
        let finishes =
            self.status.life.is_open() && self.status.send.is_finishing() && !self.write_closed();
        if !(is_flushing || finishes) || !self.parts().send_buf.is_empty() {
            return;
        }
        if let Some(session) = &mut self.tls {
            // FIN follows in any case, also if close_notify cannot be sent.
            let said = session.close_notify(&mut pool.buffers);
            self.status.tls_ended |= session.has_failed();
            if let Some(panic) = said.err().filter(|error| error.is::<Panic>()) {
                let closed = Closed::with(CloseReason::Panicked, panic);
                self.wake(pool).0.ending.set_loss(closed);
            }
        }
        if is_flushing && self.queued() == 0 {
            self.status.life.enter(if self.status.recv.is_eof() {
                Phase::Gone
            } else {
                Phase::Shutdown
            });
        }
    }

    /// Removes the first `count` bytes of [`Machine::transmit`], which the kernel took. True if
    /// nothing can be left to transmit.
    #[inline(always)]
    pub(crate) fn handle_sent(&mut self, count: usize, now: Time, pool: &mut Pool) -> bool {
        self.count_written(count, pool);
        let all_sent = match (&mut self.tls, &mut self.active) {
            (Some(session), _) => {
                session.advance(count);
                self.queued() == 0
            }
            (None, Some(active)) => {
                active.send_buf.advance(count);
                active.send_buf.is_empty()
            }
            (None, None) => true,
        };
        if !all_sent || !self.only_frames() {
            self.note_sent(count, now);
            return false;
        }
        if let Some(active) = &mut self.active {
            active.deadlines.clear_write();
        }
        true
    }

    /// Extends the write timeout, or ends it; relieves the congestion at the low watermark.
    #[inline(never)]
    fn note_sent(&mut self, count: usize, now: Time) {
        if self.sendable() > 0 {
            let pace = self.limits.write_pace();
            let deadlines = &mut self.wake_unpooled().deadlines;
            deadlines.begin_write(pace, now);
            deadlines.extend_write(count, pace, now);
        } else if self.status.life.phase() != Phase::Flush {
            // Behind what is flushed the kernel's part follows, in the same time.
            if let Some(active) = &mut self.active {
                active.deadlines.clear_write();
            }
        }
        self.relieve_if_low(now);
        self.note_flushed();
    }

    /// Notifies the handler once all output that is pending now has left.
    pub(crate) fn notify_flushed(&mut self) {
        if self.status.life.is_served() {
            self.status.send.await_flush();
            self.status.events.clear(Events::FLUSHED);
            if let Some(active) = &mut self.active {
                active.send_buf.mark();
            }
            self.note_flushed();
        }
    }

    /// True if the handler is to be notified, or is about to be.
    #[cfg(feature = "sim")]
    pub(crate) fn awaits_flush(&self) -> bool {
        self.status.is_held_for_flush()
    }

    fn note_flushed(&mut self) {
        if !self.status.send.awaits_flush() || self.write_closed() {
            return;
        }
        let send_buf = &self.parts().send_buf;
        let encrypted = self.unsent_app_bytes() - send_buf.len();
        if send_buf.marked() == 0 && encrypted == 0 {
            self.status.send.end_flush();
            self.status.events.set(Events::FLUSHED);
        }
    }

    /// Ends the congestion once the peer has taken enough.
    fn relieve_if_low(&mut self, now: Time) {
        let is_low = || self.unsent_app_bytes() <= self.limits.low_watermark;
        if self.status.send.is_congested() && is_low() {
            self.status.send.relieve();
            if self.is_established() {
                self.status.events.set(Events::WRITABLE);
                self.resume_clocks(now);
            }
        }
    }

    /// Starts the write timeout: the kernel takes no more for now.
    pub(crate) fn handle_unsent(&mut self, now: Time) {
        if self.sendable() > 0 {
            let pace = self.limits.write_pace();
            self.wake_unpooled().deadlines.begin_write(pace, now);
        }
    }

    /// True if our FIN was sent while the handler goes on reading: a write fails in any case.
    pub(crate) fn has_sent_fin(&self) -> bool {
        self.status.send.has_sent_fin()
    }

    /// True if the peer has finished: no input follows that RST would answer, and either it has our
    /// FIN, or it has finished first and nearly always closed.
    pub(crate) fn needs_no_end(&self) -> bool {
        self.status.recv.is_eof()
    }

    /// Handles a write that failed for good.
    ///
    /// Reading goes on to the end first: the peer's last bytes may have arrived, and over TLS its
    /// close_notify. With that, a peer that took no session tickets has missed nothing.
    ///
    /// `past_queue`: it was a write of output that is not queued.
    pub(crate) fn handle_write_error(
        &mut self,
        error: io::Error,
        past_queue: bool,
        now: Time,
        pool: &mut Pool,
    ) {
        let loses_output = past_queue || self.unsent_app_bytes() > 0;
        let recv = self.status.recv;
        let all_read = recv.is_eof() || recv.is_end_reported() || recv.is_paused_by_handler();
        if !self.status.life.is_open() || all_read {
            return self.fail(closed_by(error), pool);
        }
        self.status.send.fail();
        if let Some(session) = &mut self.tls {
            session.silence(&mut pool.buffers);
        }
        let ending = self.status.is_ending();
        let (active, buffers) = self.wake(pool);
        active.send_buf.clear(buffers);
        active.deadlines.clear_write();
        if loses_output {
            active.ending.lose(closed_by(error), ending);
        }
        // Output keeps the peer waiting no more.
        self.resume_clocks(now);
    }

    // The kernel's part of the end: its unsent bytes.

    /// True if the kernel must be asked now how many bytes it has not sent yet.
    ///
    /// Before close_notify is written, and again before FIN: neither is output that can be lost.
    /// Behind the peer's FIN nothing depends on it once all is written: the end comes at once.
    pub(crate) fn wants_delivery(&self) -> bool {
        let delivery = self.parts().ending.delivery;
        let wants = delivery.is_wanted(self.status.life.phase());
        let is_last = self.status.recv.is_eof() && self.tls.is_none() && self.queued() == 0;
        wants && !is_last && self.was_open() && !self.limits.linger_timeout.is_zero()
    }

    /// True if a deadline is due that depends on the kernel's unsent bytes.
    pub(crate) fn is_delivery_due(&self, due: Time) -> bool {
        self.status.life.phase() == Phase::Linger
            && self.has_unsent_in_kernel()
            && self.parts().deadlines.first() <= due
    }

    /// Handles the kernel's answer: the linger begins once the peer's system has everything.
    pub(crate) fn handle_delivery(&mut self, unsent: Option<usize>, now: Time) {
        let queued = self.unsent_app_bytes() > 0;
        let taken = self.wake_unpooled().ending.delivery.note(unsent, queued);
        if self.status.life.phase() == Phase::Linger {
            self.begin_linger(now, taken);
        }
    }

    // The options of both directions.

    /// Changes the options of an open connection. Clocks that run keep what the peer is behind.
    pub(crate) fn reconfigure(
        &mut self,
        change: impl FnOnce(&mut ConnConfig),
        now: Time,
    ) -> Result<(), Error> {
        if !self.status.life.is_open() {
            return Err(Error::ConnState(
                "the connection is not open: its options cannot be changed",
            ));
        }
        let (before, mut limits) = (Rc::clone(&self.limits), ConnConfig::clone(&self.limits));
        change(&mut limits);
        limits.check().and(self.codec.check_max(limits.max_frame))?;
        self.limits = Rc::new(limits);
        if before.max_frame != self.limits.max_frame {
            self.codec.set_max(self.limits.max_frame);
            self.decode_again();
        }
        self.follow_rates(&before, now);
        self.follow_watermarks(&before, now);
        self.follow_timeouts(&before, now);
        Ok(())
    }

    pub(crate) fn pause(&mut self, now: Time) {
        if self.status.life.is_served() && !self.write_closed() {
            self.status.recv.pause();
            self.pause_clocks(now);
        }
    }

    /// A close comes behind commands: no more frames are delivered, whatever the handler asks.
    pub(crate) fn stop_frames(&mut self, now: Time, pool: &mut Pool) {
        // Also where nothing can be sent any more, and a handler's pause has no effect.
        self.status.recv.pause();
        self.pause_clocks(now);
        self.wake(pool).0.ending.set_closes_behind();
    }

    pub(crate) fn resume(&mut self, now: Time) {
        if !self.parts().ending.closes_behind() && self.status.recv.resume() {
            self.resume_clocks(now);
        }
    }

    /// Decodes the buffered bytes, and all that follow, by another rule.
    ///
    /// Returns the rule before, which may be a framer of the user's.
    pub(crate) fn set_framing(&mut self, framing: &Framing) -> impl Sized + use<> {
        // A fixed length is a maximum of its own.
        let inherited = match framing {
            Framing::Fixed(_) => None,
            _ => self.codec.chosen_max(),
        };
        let max = self.limits.max_frame.or(inherited);
        let before = std::mem::replace(&mut self.codec, Codec::new(framing, max));
        self.decode_again();
        before
    }

    /// Returns the framer, if it is of this type.
    pub(crate) fn framer<F: 'static>(&mut self) -> Option<&mut F> {
        self.codec.framer()
    }

    /// Decodes the buffered bytes again: they may be whole frames now.
    ///
    /// Before the connection is open they are the beginning of a PROXY header, and no frame.
    fn decode_again(&mut self) {
        if self.status.life.is_open() {
            let Self { status, active, .. } = self;
            if let Some(active) = active {
                status.recv.decode_buffered(&active.recv_buf);
            }
        }
    }

    fn follow_rates(&mut self, before: &ConnConfig, now: Time) {
        let (bytes, frames) = (self.limits.read_rate, self.limits.frame_rate);
        if (bytes, frames) == (before.read_rate, before.frame_rate) {
            return;
        }
        match self.throttle() {
            Some(throttle) => throttle.follow(bytes, frames, now),
            // Without a rate before, its listener shares none.
            None => self.set_rates(&SharedMeters::default()),
        }
    }

    fn follow_watermarks(&mut self, before: &ConnConfig, now: Time) {
        self.relieve_if_low(now);
        // Under the same watermark, only the bytes that encryption has added since the last send
        // can have reached it.
        if before.high_watermark != self.limits.high_watermark {
            self.congest_if_high(now);
        }
        // Of a full-duplex connection, congestion is no pause.
        self.pause_clocks(now);
        self.resume_clocks(now);
    }

    fn follow_timeouts(&mut self, before: &ConnConfig, now: Time) {
        let (frame, write) = (self.limits.frame_pace(), self.limits.write_pace());
        if let Some(active) = &mut self.active {
            let deadlines = &mut active.deadlines;
            deadlines.follow_frame(before.frame_pace(), frame, now);
            deadlines.follow_write(before.write_pace(), write, now);
        }
        // The first deadline may have come nearer.
        self.status.deadlines_moved = true;
    }
}
