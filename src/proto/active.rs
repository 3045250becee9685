//! The large half of every part of a connection: an idle connection in the clear has none.

use std::rc::Rc;
use std::time::Duration;

use super::buffers::Buffers;
use super::close::{Delivery, Ending};
use super::deadlines::{Deadlines, Pace};
use super::proxy::{ProxyHeader, ProxyTlvs};
use super::rates::Throttle;
use super::recv::RecvBuffer;
use super::send_queue::{Held, SendQueue};
use super::time::Time;

/// A larger send buffer is not kept with spare [`Active`] parts: 64 × 16 KiB in all.
const MAX_KEPT: usize = 16 * 1024;
/// The shortest time between two looks at the kernel's unsent bytes.
const MIN_POLL: Duration = Duration::from_millis(10);

/// Parts that come from the pool with input or output and go back at the end of the turn.
pub(super) struct Active {
    pub(super) recv_buf: RecvBuffer,
    /// Frames from the handler; over TLS still to be encrypted.
    pub(super) send_buf: SendQueue,
    pub(super) deadlines: Deadlines,
    pub(super) ending: Ending,
    /// The addresses and facts that a proxy reported.
    pub(super) proxy: Option<Rc<ProxyHeader>>,
    pub(super) throttle: Option<Box<Throttle>>,
}

impl Active {
    const NONE: Self = Self {
        recv_buf: RecvBuffer::new(),
        send_buf: SendQueue::new(),
        deadlines: Deadlines::none(),
        ending: Ending::none(),
        proxy: None,
        throttle: None,
    };
    /// The parts of an idle connection.
    pub(super) const IDLE: &'static Self = &Self::NONE;

    /// True if no byte is buffered and no clock runs, but for a few timers of the handler's.
    #[inline]
    pub(super) fn is_idle(&self) -> bool {
        self.recv_buf.is_empty() && self.send_buf.is_empty() && self.deadlines.is_idle()
    }

    /// True if an idle connection needs none of it.
    #[inline]
    pub(super) fn is_over(&self) -> bool {
        self.is_idle()
            && self.deadlines.is_over()
            && self.throttle.is_none()
            && self.proxy.is_none()
            && self.ending.is_none()
    }

    /// Prepares for another connection, once [`Active::is_over`].
    #[inline]
    pub(super) fn reset(&mut self, buffers: &mut Buffers) {
        self.recv_buf.reset();
        self.deadlines.reset();
        if self.send_buf.capacity() > MAX_KEPT {
            self.send_buf.clear(buffers);
        }
    }

    /// Forgets everything, once the connection is over.
    pub(super) fn clear(&mut self, buffers: &mut Buffers) {
        self.recv_buf.clear(buffers);
        if !self.send_buf.is_empty() {
            self.send_buf.clear(buffers);
        }
        self.deadlines = Deadlines::none();
        self.ending = Ending::none();
        self.proxy = None;
        self.throttle = None;
    }

    /// Sets the clocks of the linger. True if the peer's system has all output.
    ///
    /// While it takes output, the write timeout goes on, which `taken` bytes extend, and the linger
    /// timeout is only the time of the next look. Where the system cannot tell, the peer's input is
    /// the proof that it lives, within the write timeout.
    pub(super) fn begin_linger(
        &mut self,
        taken: usize,
        pace: Pace,
        timeout: Duration,
        now: Time,
    ) -> bool {
        let deadlines = &mut self.deadlines;
        match self.ending.delivery {
            Delivery::Unsent(_) => {
                deadlines.arm_phase(now.after(timeout.max(MIN_POLL)));
                deadlines.begin_write(pace, now);
                deadlines.extend_write(taken, pace, now);
                false
            }
            Delivery::Unsupported => {
                let total = Pace {
                    timeout: pace.timeout.max(timeout),
                    ..pace
                };
                deadlines.arm_phase(now.after(timeout));
                deadlines.clear_write();
                deadlines.begin_write(total, now);
                false
            }
            Delivery::Unknown | Delivery::Done => {
                deadlines.arm_phase(now.after(timeout));
                deadlines.clear_write();
                true
            }
        }
    }

    /// Handles input while lingering: where the system cannot tell, it prolongs the linger. False
    /// if the linger is over.
    pub(super) fn handle_linger_input(&mut self, until: Time, may_discard: bool) -> bool {
        match self.ending.delivery {
            // Not read any more, and the peer's system may still take output.
            Delivery::Unsent(_) => true,
            Delivery::Unsupported if may_discard => {
                self.deadlines.arm_phase(until);
                true
            }
            Delivery::Unsupported | Delivery::Unknown | Delivery::Done => may_discard,
        }
    }

    /// Drops the TLVs of the PROXY header, unless the header is kept elsewhere too.
    pub(super) fn drop_unshared_tlvs(&mut self) {
        if let Some(header) = self.proxy.as_mut().and_then(Rc::get_mut) {
            header.tlvs = ProxyTlvs::default();
        }
    }

    /// Returns the memory that its buffers and timers take beyond the turn.
    #[inline]
    pub(super) fn memory(&self) -> Held {
        let own = self.recv_buf.memory() + self.deadlines.memory();
        self.send_buf.memory().plus(own)
    }

    #[inline]
    pub(super) fn shrink(&mut self, buffers: &mut Buffers) {
        self.recv_buf.shrink(buffers);
        self.send_buf.shrink(buffers);
    }

    /// A copy, without the throttle and the error behind the end.
    #[cfg(feature = "sim")]
    pub(super) fn fork(&self) -> Self {
        Self {
            recv_buf: self.recv_buf.clone(),
            send_buf: self.send_buf.clone(),
            deadlines: self.deadlines.clone(),
            ending: self.ending.fork(),
            proxy: self.proxy.clone(),
            throttle: None,
        }
    }
}

impl Default for Active {
    fn default() -> Self {
        Self::NONE
    }
}
