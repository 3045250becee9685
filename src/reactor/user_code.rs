//! The user's code: handlers by slot, services by listener, alarms, timers, watched descriptors.

use super::alarms::Alarms;
use super::app_timers::AppTimers;
use super::panic_guard::PanicGuard;
use super::slots::Slots;
use super::watches::Watches;
use crate::catch::{catch, Panic};
use crate::handler::{Handler, Peer, Refuse, Service};
use crate::id::{ConnId, ListenerId};
use crate::reason::Closed;

/// Handlers, services, alarms, timers and watched descriptors.
pub(super) struct UserCode<A> {
    /// By slot. `None` while the handler runs, and before the service is asked.
    handlers: Vec<Option<Box<dyn Handler<A>>>>,
    /// A handler was replaced in this iteration.
    has_replaced: bool,
    services: Slots<Box<dyn Service<A>>>,
    pub(super) alarms: Alarms<A>,
    pub(super) timers: AppTimers<A>,
    pub(super) watches: Watches<A>,
}

impl<A> UserCode<A> {
    pub(super) fn new() -> Self {
        Self {
            handlers: Vec::new(),
            has_replaced: false,
            services: Slots::new(),
            alarms: Alarms::default(),
            timers: AppTimers::default(),
            watches: Watches::default(),
        }
    }

    pub(super) fn set_handler(&mut self, id: ConnId, handler: Option<Box<dyn Handler<A>>>) {
        let index = id.index() as usize;
        if self.handlers.len() <= index {
            self.handlers.resize_with(index + 1, || None);
        }
        if let Some(entry) = self.handlers.get_mut(index) {
            *entry = handler;
        }
    }

    /// Puts `handler` in the place of the present one, which is returned unless it is running.
    pub(super) fn replace_handler(
        &mut self,
        id: ConnId,
        handler: Box<dyn Handler<A>>,
    ) -> Option<Box<dyn Handler<A>>> {
        self.has_replaced = true;
        match self.handlers.get_mut(id.index() as usize) {
            Some(entry) => entry.replace(handler),
            None => Some(handler),
        }
    }

    #[inline]
    pub(super) fn take_handler(&mut self, id: ConnId) -> Option<Box<dyn Handler<A>>> {
        self.handlers.get_mut(id.index() as usize)?.take()
    }

    /// The running handler has been replaced.
    #[inline]
    pub(super) fn is_replaced(&self, id: ConnId) -> bool {
        // Most often none was: that costs each frame one test.
        self.has_replaced
            && self
                .handlers
                .get(id.index() as usize)
                .is_some_and(Option::is_some)
    }

    /// No handler runs.
    pub(super) fn begin_iteration(&mut self) {
        self.has_replaced = false;
    }

    /// Puts a handler back after its callback. Returned if a successor has its place.
    #[inline]
    pub(super) fn restore_handler(
        &mut self,
        id: ConnId,
        handler: Box<dyn Handler<A>>,
    ) -> Option<Box<dyn Handler<A>>> {
        match self.handlers.get_mut(id.index() as usize) {
            Some(entry @ None) => {
                *entry = Some(handler);
                None
            }
            _ => Some(handler),
        }
    }

    #[cfg(feature = "sim")]
    pub(super) fn handlers_len(&self) -> usize {
        self.handlers.iter().flatten().count()
    }

    pub(super) fn add_service(&mut self, service: Box<dyn Service<A>>) -> usize {
        self.services.insert(service)
    }

    /// Asks a listener's service for a handler.
    ///
    /// # Errors
    ///
    /// The panic, if the service panics; the refusal.
    pub(super) fn accept(
        &mut self,
        service: usize,
        app: &mut A,
        peer: Peer,
    ) -> Result<Result<Box<dyn Handler<A>>, Refuse>, Panic> {
        match self.services.get_mut(service) {
            Some(service) => catch(|| service.accept(app, peer)),
            None => Ok(Err(Refuse::silently())),
        }
    }

    /// Tells a service of a connection that never opened.
    pub(super) fn failed_accept(
        &mut self,
        guard: &mut PanicGuard,
        service: usize,
        app: &mut A,
        peer: &Peer,
        closed: &Closed,
    ) {
        if let Some(service) = self.services.get_mut(service) {
            guard.call("a service's on_failed_accept", || {
                service.on_failed_accept(app, peer, closed)
            });
        }
    }

    /// Tells a service that its listener was closed from outside.
    pub(super) fn listener_lost(
        &mut self,
        guard: &mut PanicGuard,
        service: usize,
        app: &mut A,
        listener: ListenerId,
        error: &std::io::Error,
    ) {
        if let Some(service) = self.services.get_mut(service) {
            guard.call("a service's on_listener_lost", || {
                service.on_listener_lost(app, listener, error);
            });
        }
    }

    pub(super) fn remove_service(&mut self, guard: &mut PanicGuard, service: usize) {
        let service = self.services.remove(service, 0);
        guard.drop("a service's destructor", service);
    }

    pub(super) fn drop_handler(&mut self, guard: &mut PanicGuard, id: ConnId) {
        if let Some(handler) = self.take_handler(id) {
            drop_handler(guard, handler);
        }
    }

    /// Drops everything, once the server ends. A panic in one destructor does not stop the others.
    pub(super) fn clear(&mut self, guard: &mut PanicGuard) {
        for handler in std::mem::take(&mut self.handlers).into_iter().flatten() {
            drop_handler(guard, handler);
        }
        for service in std::mem::replace(&mut self.services, Slots::new()).into_entries() {
            guard.drop("a service's destructor", service);
        }
        self.alarms.clear(guard);
        for job in self.timers.take_all() {
            guard.drop("a job's destructor", job);
        }
        for callback in self.watches.take_all() {
            guard.drop("a descriptor's callback", callback);
        }
    }
}

/// Drops a handler.
pub(super) fn drop_handler<A>(guard: &mut PanicGuard, handler: Box<dyn Handler<A>>) {
    guard.drop("a handler's destructor", handler);
}
