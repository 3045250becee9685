//! What a connection's turn asks of the reactor.

use std::time::Duration;

use super::admit;
use super::close;
use super::core::Core;
use super::drive::{Budget, Host, Parts};
use super::inner::Inner;
use super::os::Os;
use super::work;
use crate::catch::Panic;
use crate::handle::Shared;
use crate::id::ConnId;
use crate::proto::{Event as ConnEvent, InputCursor};

/// When to retry after the kernel had no memory for a socket's read or write.
const RETRY_AFTER: Duration = Duration::from_millis(10);

/// One connection's turn in the reactor.
pub(super) struct Turn<'a, A, O: Os> {
    pub(super) inner: &'a mut Inner<A, O>,
    pub(super) app: &'a mut A,
    /// The queue of commands.
    pub(super) shared: &'a Shared<A>,
    pub(super) id: ConnId,
}

impl<A, O: Os> Host for Turn<'_, A, O> {
    type Os = O;

    #[inline]
    fn parts(&mut self) -> Option<Parts<'_, O>> {
        let Core { conns, os, now, .. } = &mut self.inner.core;
        let (conn, pool) = conns.parts(self.id)?;
        Some(Parts {
            conn,
            pool,
            os,
            now,
        })
    }

    #[inline(always)]
    fn deliver_frames(&mut self, input: &mut InputCursor<'_>, budget: &mut Budget) {
        let (bytes, frames) = self
            .inner
            .call_for_frames(self.app, self.id, input, budget.frames);
        budget.charge(frames);
        input.advance(bytes);
    }

    fn handle_event(&mut self, event: ConnEvent<'_>) {
        let Self { inner, app, id, .. } = self;
        match event {
            ConnEvent::Header => admit::ask_service(inner, app, *id),
            ConnEvent::Frame(frame) => {
                inner.call(app, *id, |handler, cx| handler.on_frame(cx, frame));
            }
            ConnEvent::Unpacked(frame) => {
                inner.call(app, *id, |handler, cx| handler.on_frame(cx, &frame));
                inner.core.conns.pool.give(frame);
            }
            ConnEvent::BadInput(closed) => inner.call_for_bad_input(app, *id, closed),
            ConnEvent::Opened => self.handle_opened(),
            ConnEvent::Secured => {
                inner.core.end_pending(*id);
                inner.call(app, *id, |handler, cx| handler.on_secured(cx));
            }
            ConnEvent::Finished => inner.call(app, *id, |handler, cx| handler.on_finish(cx)),
            ConnEvent::Writable => inner.call(app, *id, |handler, cx| handler.on_writable(cx)),
            ConnEvent::Flushed => inner.call(app, *id, |handler, cx| handler.on_flushed(cx)),
            ConnEvent::Timer(key) => inner.call(app, *id, |handler, cx| handler.on_timer(cx, key)),
            ConnEvent::Drain => inner.call(app, *id, |handler, cx| handler.on_drain(cx)),
        }
    }

    fn handle_opened(&mut self) {
        let Self { inner, app, id, .. } = self;
        let queued = inner.core.os.queued(self.shared.queued());
        inner.core.handle_opened(*id, queued);
        inner.call(app, *id, |handler, cx| handler.on_open(cx));
    }

    fn report_panic(&mut self, source: &str, panic: Panic) {
        self.inner.core.report_panic(self.id, source, panic);
    }

    #[inline]
    fn is_memory_limited(&self) -> bool {
        self.inner.core.memory.is_limited()
    }

    #[inline]
    fn is_memory_tight(&self) -> bool {
        self.inner.core.memory.is_tight()
    }

    fn before_read(&mut self) {
        let Core {
            memory, conns, now, ..
        } = &mut self.inner.core;
        memory.before_read(conns, self.id, *now);
    }

    fn max_read(&mut self) -> usize {
        self.inner.core.memory.max_read(self.id)
    }

    fn take_handshake(&mut self) -> bool {
        let core = &mut self.inner.core;
        let some = core.handshakes_left > 0;
        if some {
            core.handshakes_left -= 1;
            core.work.charge(work::HANDSHAKE);
        }
        some
    }

    fn check_connect(&mut self) -> bool {
        self.inner.core.check_connect(self.id)
    }

    fn settle(&mut self, again: bool) {
        let core = &mut self.inner.core;
        core.account(self.id);
        let Some(conn) = core.conns.get(self.id) else {
            return;
        };
        if conn.machine.is_upgrading() && !conn.standing.is_pending() && conn.listener.is_some() {
            core.begin_pending(self.id);
        }
        let Some(conn) = core.conns.get(self.id) else {
            return;
        };
        let mut at = conn.machine.deadline();
        if conn.retry {
            at = at.min(core.now.after(RETRY_AFTER));
        }
        core.conns.arm(self.id, at);
        if again {
            core.conns.wake_in_order(self.id);
        }
    }

    #[inline]
    fn settle_timer(&mut self) {
        self.inner.core.conns.arm_deadline(self.id);
    }

    fn finish_close(&mut self, reset: bool) {
        close::finish_close(self.inner, self.app, self.id, reset);
    }
}
