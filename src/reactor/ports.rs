//! Ports: opened, taken over, and closed.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::rc::Rc;

use super::admission::OptionalBucket;
use super::listener::Listener;
use super::os::{Os, Token};
use super::sources::Sources;
use super::Reactor;
use crate::addr::Addr;
use crate::error::{Error, Result};
use crate::handler::Service;
use crate::id::ListenerId;
use crate::listen::Listen;
use crate::logs;
use crate::proto::{SharedMeters, Time};

impl<A, O: Os> Reactor<A, O> {
    /// Binds and listens; the first address that works.
    pub(crate) fn listen(&mut self, listen: Listen, service: Box<dyn Service<A>>) -> Result<ListenerId> {
        self.check_listen(&listen)?;
        let mut failure = None;
        for addr in listen.resolved()? {
            match self.os.listen(addr, &listen.socket) {
                Ok(socket) => return self.enlist(listen, socket, service),
                Err(error) => failure = failure.or(Some(Error::listen(addr.clone(), error))),
            }
        }
        // `resolved` has at least one address.
        Err(failure.unwrap_or(Error::Draining))
    }

    /// Takes over a socket that is listening already.
    pub(crate) fn adopt(
        &mut self,
        socket: OwnedFd,
        listen: Listen,
        service: Box<dyn Service<A>>,
    ) -> Result<ListenerId> {
        self.check_listen(&listen)?;
        let socket = self
            .os
            .adopt(socket)
            .map_err(Error::os("adopting a listening socket"))?;
        self.enlist(listen, socket, service)
    }

    fn check_listen(&self, listen: &Listen) -> Result<()> {
        if self.drain.is_on() {
            return Err(Error::Draining);
        }
        let name = listen.name.as_deref().filter(|name| !name.is_empty());
        listen.check().map_err(|error| match name {
            Some(name) => error.of_listener(name),
            None => error,
        })?;
        match &listen.name {
            Some(name) => self.check_name(name),
            None => Ok(()),
        }
    }

    fn check_name(&self, name: &str) -> Result<()> {
        if self
            .listeners
            .iter()
            .any(|listener| listener.socket.is_some() && *listener.name == *name)
        {
            return Err(Error::NameTaken { name: name.to_owned() });
        }
        Ok(())
    }

    fn enlist(&mut self, listen: Listen, mut socket: O::Listener, service: Box<dyn Service<A>>) -> Result<ListenerId> {
        let addr = self
            .os
            .listener_addr(&socket)
            .map_err(Error::os("reading the address of a listening socket"))?;
        let name = listen.name.clone().unwrap_or_else(|| default_name(&addr));
        self.check_name(&name)?;
        let id = ListenerId::nth(self.next_listener);
        let room = self.room();
        let mut meters = SharedMeters::default();
        meters.follow(&listen.limits, self.now);
        let mut listener = Listener {
            id,
            name: Rc::from(name),
            addr,
            socket: None,
            service,
            limits: Rc::new(listen.limits.clone()),
            options: listen,
            meters,
            bucket: OptionalBucket::default(),
            sources: Sources::default(),
            connections: 0,
            accepted: 0,
            suspended: false,
            registered: false,
            readable: true,
            retry_at: Time::NEVER,
            deferred: false,
            warned: false,
            broken: false,
        };
        if listener.admits_at(&room) <= room.now {
            self.os
                .register_listener(&mut socket, Token::of_listener(id))
                .map_err(Error::os("registering a listening socket"))?;
            listener.registered = true;
        }
        listener.socket = Some(socket);
        log::info!(target: logs::LISTENER, "listener {} on {}", listener.name, listener.addr);
        self.next_listener = self.next_listener.wrapping_add(1);
        self.listeners.push(listener);
        Ok(id)
    }

    /// Closes a port. Its connections live on; the listener is forgotten with the last of them.
    pub(super) fn close_port(&mut self, at: usize) {
        let Some(listener) = self.listeners.get_mut(at) else {
            return;
        };
        let Some(mut socket) = listener.socket.take() else {
            return;
        };
        if std::mem::take(&mut listener.registered) {
            // Closing takes it out of the poll too, unless another process holds it.
            if let Err(error) = self.os.deregister_listener(&mut socket) {
                log::debug!(target: logs::LISTENER, "cannot deregister listener {}: {error}", listener.name);
            }
        }
        self.os.close_listener(socket);
        listener.readable = false;
        listener.retry_at = Time::NEVER;
        log::info!(target: logs::LISTENER, "listener {} on {} is closed", listener.name, listener.addr);
    }

    /// Forgets closed listeners that have no connections left, unless their service is still to hear of some.
    pub(super) fn forget_closed_listeners(&mut self) {
        while let Some(at) = self
            .listeners
            .iter()
            .position(|listener| listener.socket.is_none() && listener.connections == 0)
        {
            let listener = self.listeners.remove(at);
            self.discard("a service's destructor", listener);
        }
    }
}

/// What a listener is called that was given no name.
fn default_name(addr: &Addr) -> String {
    match addr {
        Addr::Tcp(addr) => format!("portcullis_{}", addr.port()),
        Addr::Unix(name) => match (name.as_pathname().and_then(Path::file_name), name.as_abstract_name()) {
            (Some(file), _) => format!("portcullis_{}", file.to_string_lossy()),
            (None, Some(name)) => format!("portcullis_{}", String::from_utf8_lossy(name)),
            (None, None) => "portcullis_unix".to_owned(),
        },
    }
}
