//! From the handler to the socket: what is queued, when it is encrypted, what the kernel took of it.

use std::error::Error as StdError;
use std::io;

use super::closing::closed_by;
use super::framing::EncodeError;
use super::state::{ClosePhase, Flags, SendError, State};
use super::{Machine, Pool, Time};
use crate::reason::{CloseReason, Closed};

impl EncodeError {
    /// What the sender of `payload` is told.
    #[cold]
    fn of(self, payload: &[u8]) -> SendError {
        match self {
            Self::TooLarge { max } => SendError::FrameTooLarge {
                length: payload.len(),
                max,
            },
            Self::Refused(error) => SendError::Refused(error),
        }
    }
}

impl Machine {
    /// A write failed for good. Reading goes on to the end first: the peer's last words may be there already.
    pub(crate) fn handle_write_error(&mut self, error: io::Error, pool: &mut Pool) {
        let all_read = self.flags.has(Flags::EOF) || self.flags.has(Flags::FINISH_REPORTED);
        if self.state != State::Open || self.flags.has(Flags::PAUSED) || all_read {
            return self.end(closed_by(error), pool);
        }
        self.send_buf.clear(pool);
        if let Some(session) = &mut self.tls {
            session.silence(pool);
        }
        self.deadlines.write = Time::NEVER;
        self.flags.set(Flags::WRITE_FAILED);
        self.flags.clear(Flags::CONGESTED);
        if self.closed.is_none() {
            self.closed = Some(closed_by(error));
        }
    }

    /// The kernel took `count` bytes of what [`Machine::transmit`] showed.
    #[inline(always)]
    pub(crate) fn handle_sent(&mut self, count: usize, now: Time, pool: &mut Pool) {
        self.traffic.bytes_out += count as u64;
        pool.traffic.bytes_out += count as u64;
        match (&mut self.tls, &mut self.active) {
            (Some(session), _) => session.advance(count),
            (None, Some(active)) => active.send_buf.advance(count),
            (None, None) => {}
        }
        if !self.only_frames() || self.queued() > 0 {
            self.note_sent(count, now);
        } else if let Some(active) = &mut self.active {
            active.deadlines.write = Time::NEVER;
        }
    }

    /// The write timeout begins anew, or ends; and who had too much waiting may go on.
    #[inline(never)]
    fn note_sent(&mut self, count: usize, now: Time) {
        if self.sendable() > 0 {
            if count > 0 {
                self.deadlines.write = now.after(self.limits.write_timeout);
            }
        } else if let Some(active) = &mut self.active {
            active.deadlines.write = Time::NEVER;
        }
        if self.flags.has(Flags::CONGESTED) && self.unsent_app_bytes() <= self.limits.low_watermark {
            self.flags.clear(Flags::CONGESTED);
            if self.is_established() {
                self.flags.set(Flags::WRITABLE_PENDING);
                self.restart_input_clocks(now);
            }
        }
    }

    /// The write timeout is over, as far as the kernel has told.
    #[inline]
    pub(crate) fn is_write_overdue(&self, due: Time) -> bool {
        self.deadlines.write <= due
    }

    /// The kernel takes no more for now: the clock of the peer that does not read starts.
    pub(crate) fn handle_unsent(&mut self, now: Time) {
        if self.sendable() > 0 && !self.deadlines.write.is_armed() {
            self.deadlines.write = now.after(self.limits.write_timeout);
        }
    }

    /// Queues one frame.
    #[inline]
    pub(crate) fn send(&mut self, payload: &[u8], now: Time, pool: &mut Pool) -> Result<(), SendError> {
        if !self.only_frames() && !self.may_send() {
            return Err(SendError::Closed);
        }
        let Self {
            codec,
            active,
            limits,
            tls,
            ..
        } = self;
        let send_buf = &mut active.get_or_insert_with(|| pool.take_active()).send_buf;
        // What TLS has encrypted already, but not what it says by itself.
        let encrypted = tls.as_ref().map_or(0, |session| {
            session.waiting().len().saturating_sub(session.tls_overhead())
        });
        let queued = send_buf.len() + encrypted;
        if queued >= limits.output_limit {
            return Err(self.refuse_to_send(queued, now));
        }
        if let Err(error) = codec.encode(payload, send_buf.tail(pool)) {
            return Err(error.of(payload));
        }
        let queued = send_buf.len() + encrypted;
        let much = queued >= limits.high_watermark;
        self.count_sent(payload.len(), pool);
        if much {
            self.congest(now);
        }
        Ok(())
    }

    #[inline]
    fn count_sent(&mut self, length: usize, pool: &mut Pool) {
        self.traffic.frames_out += 1;
        pool.traffic.frames_out += 1;
        pool.sizes_out.record(length as u64);
    }

    /// Whether a frame may go to the kernel without waiting here: nothing is in front of it, and nothing is to be made of it but
    /// to put a header in front, which is put into `header`.
    pub(crate) fn can_write_through(&self, payload: &[u8], header: &mut Vec<u8>) -> bool {
        let free = self.only_frames() && self.tls.is_none() && self.send_buf.is_empty();
        free && self.codec.put_header(payload.len(), header)
    }

    /// Of such a frame the kernel took `count` bytes. What is left waits, unless the kernel will take no more for good.
    pub(crate) fn handle_written_through(
        &mut self,
        header: &[u8],
        payload: &[u8],
        count: usize,
        now: Time,
        pool: &mut Pool,
    ) {
        self.traffic.bytes_out += count as u64;
        pool.traffic.bytes_out += count as u64;
        self.count_sent(payload.len(), pool);
        let left = payload.get(count.saturating_sub(header.len())..).unwrap_or_default();
        if left.is_empty() || self.write_closed() {
            return;
        }
        let send_buf = &mut self.wake(pool).send_buf;
        let tail = send_buf.tail(pool);
        tail.extend_from_slice(header.get(count..).unwrap_or_default());
        tail.extend_from_slice(left);
        if send_buf.len() >= self.limits.high_watermark {
            self.congest(now);
        }
    }

    #[inline(never)]
    fn may_send(&self) -> bool {
        const NO_MORE: u32 = Flags::DETACHING.0 | Flags::FINISHING.0;
        self.takes_output() && !self.write_closed() && self.flags.0 & NO_MORE == 0
    }

    #[cold]
    fn refuse_to_send(&mut self, queued: usize, now: Time) -> SendError {
        self.congest(now);
        SendError::Full {
            queued,
            limit: self.limits.output_limit,
        }
    }

    /// Stops reading until the peer has taken enough. Its own clocks stand meanwhile, all but the write timeout.
    pub(super) fn congest(&mut self, now: Time) {
        self.flags.set(Flags::CONGESTED);
        if self.is_paused() {
            self.stop_input_clocks(now);
        }
    }

    /// Bytes to write now, encrypting as late as this.
    #[inline]
    pub(crate) fn transmit(&mut self, pool: &mut Pool) -> &[u8] {
        if self.only_frames() && self.tls.is_none() {
            self.send_buf.waiting()
        } else {
            self.prepare(pool)
        }
    }

    /// What TLS makes of it, and what is said at the end.
    #[inline(never)]
    fn prepare(&mut self, pool: &mut Pool) -> &[u8] {
        if self.is_connecting() {
            return &[];
        }
        if self.only_frames() {
            self.seal(pool);
        } else {
            self.prepare_end(pool);
        }
        match &self.tls {
            Some(session) => session.waiting(),
            None => self.send_buf.waiting(),
        }
    }

    /// Encrypts what waits.
    #[inline]
    fn seal(&mut self, pool: &mut Pool) {
        if let (Some(session), Some(active)) = (&mut self.tls, &mut self.active) {
            match session.encrypt(active.send_buf.waiting(), pool) {
                Ok(taken) => active.send_buf.advance(taken),
                Err(error) => self.end(Closed::with(CloseReason::Tls, error as Box<dyn StdError>), pool),
            }
        }
    }

    /// Encrypts what waits, unless nobody can hear it, and says goodbye behind it, if it is time.
    fn prepare_end(&mut self, pool: &mut Pool) {
        if let (true, Some(session)) = (self.flags.has(Flags::FIN_SENT), &mut self.tls) {
            // What TLS would still say by itself, nobody can hear.
            session.silence(pool);
        }
        let finished = matches!(self.close_phase, ClosePhase::Gone { .. }) || self.write_closed();
        if !finished {
            self.seal(pool);
        }
        let finishes = self.state == State::Open && self.flags.has(Flags::FINISHING) && !self.write_closed();
        if finishes && self.send_buf.is_empty() {
            if let Some(session) = &mut self.tls {
                // As below.
                let _ = session.close_notify(pool);
            }
        }
        if let (ClosePhase::Flush, true) = (self.close_phase, self.send_buf.is_empty()) {
            if let Some(session) = &mut self.tls {
                // Nothing can be done about a goodbye that cannot be said: FIN follows.
                let _ = session.close_notify(pool);
            }
            if self.queued() == 0 {
                self.deadlines.write = Time::NEVER;
                self.close_phase = if self.flags.has(Flags::EOF) {
                    ClosePhase::Gone { reset: false }
                } else {
                    ClosePhase::Shutdown
                };
            }
        }
    }

    /// Bytes that wait for the peer.
    #[inline]
    pub(crate) fn queued(&self) -> usize {
        self.send_buf.len() + self.tls.as_ref().map_or(0, |session| session.waiting().len())
    }

    /// Of those, what the kernel can be given: until a handshake is over, not what it is to encrypt.
    #[inline]
    pub(crate) fn sendable(&self) -> usize {
        match &self.tls {
            _ if self.is_connecting() => 0,
            Some(session) if session.is_handshaking() => session.waiting().len(),
            _ => self.queued(),
        }
    }

    /// Of those, what the handler has sent: what TLS says by itself is not held against it.
    #[inline]
    pub(crate) fn unsent_app_bytes(&self) -> usize {
        self.queued() - self.tls.as_ref().map_or(0, |session| session.tls_overhead())
    }

    /// The peer can be told nothing more.
    pub(super) fn write_closed(&self) -> bool {
        self.flags.has(Flags::WRITE_FAILED) || self.has_failed()
    }
}
