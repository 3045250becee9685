//! The core and the user's code together: what a callback is lent.

use super::connection::Connection;
use super::core::Core;
use super::os::Os;
use super::user_code::{drop_handler, UserCode};
use super::work;
use crate::catch::catch;
use crate::config::Listen;
use crate::error::{Error, Result};
use crate::handler::{Context, Control, Handler, Service};
use crate::id::{ConnId, ListenerId};
use crate::proto::{InputCursor, Pool, SendError, Time};
use crate::reason::{Close, Closed, Outcome};
use std::sync::Arc;

pub(crate) struct Inner<A, O: Os> {
    pub(super) core: Core<O>,
    pub(super) user: UserCode<A>,
}

impl<A, O: Os> Inner<A, O> {
    /// Calls the handler of `id`, and closes the connection if the callback says so or panics.
    pub(super) fn call(
        &mut self,
        app: &mut A,
        id: ConnId,
        callback: impl FnOnce(&mut dyn Handler<A>, &mut Context<'_, A>) -> Outcome,
    ) {
        self.lend(app, id, |app, inner, handler| {
            callback(handler, &mut Context::new(app, inner, id))
        });
    }

    /// Calls the handler for one frame after the other, up to `max`, while nothing else is due.
    /// Returns how many bytes of `input` were consumed, and the number of frames.
    #[inline(always)]
    pub(super) fn call_for_frames(
        &mut self,
        app: &mut A,
        id: ConnId,
        input: &InputCursor<'_>,
        max: usize,
    ) -> (usize, usize) {
        let all = input.rest();
        let (mut rest, mut left) = (all, max);
        self.lend(app, id, |app, inner, handler| {
            while !rest.is_empty() && left > 0 {
                let parts = inner.core.conns.parts(id);
                let Some((frame, behind)) =
                    parts.and_then(|(conn, pool)| conn.machine.next_frame(rest, pool))
                else {
                    break;
                };
                rest = behind;
                left -= 1;
                handler.on_frame(&mut Context::new(app, inner, id), frame)?;
                if inner.user.is_replaced(id) {
                    break;
                }
            }
            Ok(())
        });
        (all.len() - rest.len(), max - left)
    }

    /// Calls the handler of `id` for input of which no frame can be made, and closes the
    /// connection.
    pub(super) fn call_for_bad_input(&mut self, app: &mut A, id: ConnId, closed: Closed) {
        self.call(app, id, |handler, cx| handler.on_bad_input(cx, &closed));
        let now = self.core.refresh();
        let Some((conn, pool)) = self.core.conns.parts(id) else {
            return self.core.guard.drop("an error's destructor", closed);
        };
        // An error that comes too late is dropped, and its destructor is foreign code.
        if let Err(panic) = catch(|| conn.machine.end_bad_input(closed, now, pool)) {
            self.core.close_in_panic(id, "an error's destructor", panic);
        }
    }

    /// Lends the server to the handler of `id`. The handler is out of its place while it runs, so
    /// that its callbacks can reach all connections; a successor may take the place.
    #[inline]
    fn lend(
        &mut self,
        app: &mut A,
        id: ConnId,
        callbacks: impl FnOnce(&mut A, &mut Self, &mut dyn Handler<A>) -> Outcome,
    ) {
        let Some(mut handler) = self.user.take_handler(id) else {
            return;
        };
        let outcome = catch(|| callbacks(app, self, handler.as_mut()));
        if let Some(replaced) = self.user.restore_handler(id, handler) {
            drop_handler(&mut self.core.guard, replaced);
        }
        match outcome {
            Ok(Ok(())) => {}
            Ok(Err(close)) => {
                if let Some(close) = self.close_behind(id, close) {
                    self.core.close_as(id, close);
                }
            }
            Err(panic) => {
                self.touch_last_sent();
                let conn = self.core.conns.get(id);
                let source = match conn.is_some_and(|conn| conn.machine.has_framer_panicked()) {
                    true => "a framer",
                    false => "a handler",
                };
                self.core.close_in_panic(id, source, panic);
            }
        }
    }

    /// Returns `close` if it takes effect now, and not behind messages for the connection.
    pub(super) fn close_behind(&mut self, id: ConnId, close: Close) -> Option<Close> {
        let Core {
            deferred,
            conns,
            guard,
            now,
            ..
        } = &mut self.core;
        deferred.begin_close(id);
        if !close.abort && deferred.will_close(id) {
            guard.drop("an error's destructor", close);
            return None;
        }
        deferred.close_behind(conns, id, close, *now)
    }

    /// Runs a job of the application, which may have waited for long.
    pub(super) fn run_job(
        &mut self,
        app: &mut A,
        source: &str,
        job: impl FnOnce(&mut A, &mut Control<'_, A>),
    ) {
        self.core.refresh();
        self.core.work.charge(work::STEP);
        self.core.conns.offer_room();
        if let Err(panic) = catch(|| job(app, &mut Control::new(self))) {
            self.core.guard.report(source, panic, None);
            self.touch_last_sent();
        }
    }

    /// After a panic, perhaps of a framer while a frame was being made: the connection has a turn,
    /// and accounts for its memory.
    pub(super) fn touch_last_sent(&mut self) {
        self.core.end_aside();
        if let Some(id) = self.core.conns.take_last_sent() {
            self.core.touch(id);
        }
    }

    /// Binds and listens: the first address that works.
    pub(super) fn listen(
        &mut self,
        mut listen: Listen,
        service: Box<dyn Service<A>>,
    ) -> Result<ListenerId> {
        self.core.check_listen(&listen)?;
        if let Some(socket) = listen.adopted.take() {
            let socket = Arc::try_unwrap(socket).or_else(|socket| socket.try_clone());
            let adopted = socket.and_then(|socket| self.core.os.adopt_listener(socket));
            let added = adopted
                .map_err(Error::os("adopting a listening socket"))
                .and_then(|socket| self.add_listener(listen, socket, service));
            if added.is_err() {
                // The socket is closed.
                self.core.free_descriptor();
            }
            return added;
        }
        let mut failure = None;
        for addr in listen.resolved()? {
            let Core { os, listeners, .. } = &mut self.core;
            let checked = match listen.name {
                Some(_) => Ok(()),
                None => listeners.check_default_name(addr, listen.socket.reuse_port),
            };
            let opened = checked.and_then(|()| {
                let opened = os.listen(addr, listen.name.as_deref(), &listen.socket);
                opened.map_err(|error| Error::listen(addr.clone(), error))
            });
            match opened {
                Ok(socket) => return self.add_listener(listen, socket, service),
                Err(error) => failure = failure.or(Some(error)),
            }
        }
        // `resolved` has at least one address.
        Err(failure.unwrap_or(Error::Draining))
    }

    fn add_listener(
        &mut self,
        listen: Listen,
        socket: O::Listener,
        service: Box<dyn Service<A>>,
    ) -> Result<ListenerId> {
        let service = self.user.add_service(service);
        let capacity = self.core.capacity();
        let server = self.core.conns.server();
        let Core {
            os,
            listeners,
            conns,
            ..
        } = &mut self.core;
        // A destructor among the options may panic, and comes last.
        let options = listen.clone();
        let added = listeners.add(os, server, listen, socket, service, &capacity);
        match &added {
            Ok(id) => listeners.note_reserve(*id, conns),
            Err(_) => self.user.remove_service(&mut self.core.guard, service),
        }
        self.core.guard.drop("a listener's options", options);
        added
    }

    /// Sends to a connection, unless it closes behind its messages. The last argument of `send` is
    /// the number of bytes after which nothing is written before the turn ends.
    #[inline(always)]
    pub(super) fn send_by(
        &mut self,
        id: ConnId,
        send: impl FnOnce(
            &mut Connection<O::Stream>,
            &mut O,
            &mut Pool,
            &mut Time,
            u64,
        ) -> std::result::Result<(), Box<SendError>>,
    ) -> std::result::Result<(), Box<SendError>> {
        let core = &mut self.core;
        if core.deferred.refuses_output(id) {
            return Err(Box::new(SendError::Closed));
        }
        if !core.is_running(id) {
            core.begin_aside(id);
        }
        let Core {
            conns,
            os,
            now,
            early_output_until,
            ..
        } = core;
        let Some((conn, pool)) = conns.parts_to_send(id) else {
            return Err(Box::new(SendError::Closed));
        };
        let sent = send(conn, os, pool, now, *early_output_until);
        if !core.is_running(id) {
            core.end_aside();
            core.touch(id);
        }
        sent
    }

    /// Removes closed listeners that have no connections left, unless their service is still to
    /// hear of some.
    pub(super) fn remove_closed_listeners(&mut self) {
        let Self { core, user } = self;
        if !core.listeners.may_be_over() {
            return;
        }
        core.listeners.refill_reserves(&mut core.conns);
        for listener in core.listeners.take_closed() {
            user.remove_service(&mut core.guard, listener.service);
            core.guard.drop("a listener's options", listener);
        }
    }
}
