//! What callbacks and the server's owner can ask of the reactor.

use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Duration;

use super::detached_conns::Receiver;
use super::os::{Os, Socket};
use super::Reactor;
use crate::addr::{Addr, Credentials};
use crate::alarm::{Alarm, AlarmId, AlarmInfo};
use crate::config::Config;
use crate::connect::Connect;
use crate::control::{AlarmCallback, ControlOps, ListenerInfo};
use crate::detached::DetachError;
use crate::error::{Error, Result};
use crate::handler::{ConnInfo, ConnOps, Handler};
use crate::histogram::Histograms;
use crate::id::{ConnId, ListenerId, ListenerRef};
use crate::listen::Listen;
use crate::logs;
use crate::metrics::Metrics;
use crate::proto::{Machine, Pool, SendError, Time};
use crate::reason::{CloseReason, Closed};
use crate::recent::RecentClose;
use crate::stats::{DrainReport, Stats};
use crate::tree::{Cursor, Page, Tree};

impl<A, O: Os> ConnOps<A> for Reactor<A, O> {
    fn machine(&mut self, id: ConnId) -> Option<(&mut Machine, &mut Pool)> {
        let conn = self.connections.get_mut(id)?;
        Some((&mut conn.machine, &mut self.pool))
    }

    fn machine_ref(&self, id: ConnId) -> Option<&Machine> {
        Some(&self.connections.get(id)?.machine)
    }

    // Boxed, because an error is rare, and what is rare is not to be copied each time.
    fn send(&mut self, id: ConnId, frame: &[u8]) -> std::result::Result<(), Box<SendError>> {
        let passed = frame.len() >= O::LARGE_FRAME && self.pass(id, frame);
        let Some(conn) = self.connections.get_mut(id) else {
            return Err(Box::new(SendError::Closed));
        };
        let mut failed = None;
        if !passed {
            if let Err(error) = conn.machine.send(frame, self.now, &mut self.pool) {
                failed = Some(Box::new(error));
            }
        }
        // Whoever has the turn is looked after at its end.
        if self.current != Some(id) {
            self.touch(id);
        }
        failed.map_or(Ok(()), Err)
    }

    fn touch(&mut self, id: ConnId) {
        // Whoever has the turn is looked after at its end.
        if self.current == Some(id) {
            return;
        }
        if let Some(conn) = self.connections.get_mut(id) {
            self.ready.push(id, &mut conn.queued);
        }
        self.account(id);
    }

    fn info(&self, id: ConnId) -> Option<ConnInfo> {
        Some(self.connections.get(id)?.info(self.now))
    }

    fn local_addr(&self, id: ConnId) -> io::Result<Addr> {
        self.stream(id)?.local_addr()
    }

    fn credentials(&self, id: ConnId) -> io::Result<Credentials> {
        self.stream(id)?.credentials()
    }

    fn listener_name(&self, id: ListenerId) -> Rc<str> {
        let listener = self.listeners.iter().find(|listener| listener.id == id);
        listener.map_or_else(|| Rc::from(""), |listener| Rc::clone(&listener.name))
    }

    fn replace_handler(&mut self, id: ConnId, handler: Box<dyn Handler<A>>) {
        // Who is not admitted yet has none, and gets the service's.
        let stays = self.connections.get(id).is_some_and(|conn| conn.machine.was_admitted());
        let place = self.handlers.get_mut(id.index as usize).filter(|_| stays);
        let former = match place {
            // The running handler is out of its place, and will find it taken.
            Some(place) => place.replace(handler),
            None => Some(handler),
        };
        if let Some(former) = former {
            self.drop_handler(former);
        }
    }

    fn detach(&mut self, id: ConnId, receiver: Receiver) -> std::result::Result<(), DetachError> {
        if !self.os.can_release() {
            return Err(DetachError::Simulated);
        }
        let begun = self
            .connections
            .get_mut(id)
            .is_some_and(|conn| conn.machine.begin_detach());
        if !begun {
            return Err(DetachError::NotOpen);
        }
        self.detached_conns.leaving.insert(id, receiver);
        self.touch(id);
        Ok(())
    }

    fn connect(&mut self, addr: Addr, options: Connect, handler: Box<dyn Handler<A>>) -> Result<ConnId> {
        self.begin_connection(addr, options, handler)
    }

    fn now(&self) -> Time {
        self.now
    }

    #[cfg(feature = "tls")]
    fn catch_up(&mut self) {
        Self::catch_up(self);
    }
}

impl<A, O: Os> ControlOps<A> for Reactor<A, O> {
    fn listeners(&self) -> Vec<ListenerInfo> {
        let room = self.room();
        self.listeners
            .iter()
            .filter(|listener| listener.socket.is_some())
            .map(|listener| listener.info(&room))
            .collect()
    }

    fn listener(&self, which: &ListenerRef) -> Result<ListenerInfo> {
        let at = self.position(which)?;
        let listener = self.listeners.get(at).ok_or_else(|| no_listener(which))?;
        Ok(listener.info(&self.room()))
    }

    fn connections(&self) -> Vec<ConnInfo> {
        self.connections.iter().map(|conn| conn.info(self.now)).collect()
    }

    fn connections_page(&self, from: Cursor, limit: usize) -> Page {
        self.page(from, limit)
    }

    fn tree(&self, limit: usize) -> Tree {
        Self::tree(self, limit)
    }

    fn recent_closes(&self) -> Vec<RecentClose> {
        self.closes()
    }

    fn histograms(&self) -> Histograms {
        Histograms {
            connection_age: self.ages.clone(),
            handshake_time: self.handshake_times.clone(),
            frame_size_in: self.pool.sizes_in.clone(),
            frame_size_out: self.pool.sizes_out.clone(),
        }
    }

    fn metrics(&self) -> Metrics {
        self.measure()
    }

    fn add_alarm(&mut self, alarm: Alarm, callback: AlarmCallback<A>) -> Result<AlarmId> {
        Self::add_alarm(self, alarm, callback)
    }

    fn set_alarm(&mut self, id: AlarmId, alarm: Alarm) -> Result<()> {
        Self::set_alarm(self, id, alarm)
    }

    fn remove_alarm(&mut self, id: AlarmId) -> bool {
        Self::remove_alarm(self, id)
    }

    fn alarms(&self) -> Vec<AlarmInfo> {
        Self::alarms(self)
    }

    fn kill(&mut self, id: ConnId) -> bool {
        if self.connections.get(id).is_none() {
            return false;
        }
        if self.is_detached(id) {
            return self.cut_off(id);
        }
        log::warn!(target: logs::CONNECTION, "killed; {}", self.describe(id));
        if let Some(conn) = self.connections.get_mut(id) {
            conn.machine.reset(Closed::new(CloseReason::Killed), &mut self.pool);
        }
        self.touch(id);
        true
    }

    fn config(&self) -> &Config {
        &self.config
    }

    fn set_config(&mut self, config: Config) -> Result<()> {
        config.check()?;
        self.shared.set_limits(config.queue_limit, config.queue_bytes);
        if config.max_connections != self.config.max_connections {
            self.connections.set_cap(config.max_connections);
        }
        self.memory.set_limit(config.memory_limit);
        self.shed();
        self.closes.set_most(config.recent_closes);
        self.bucket.follow(config.accept_rate, self.now);
        if !self.memory.is_tight() {
            self.resume_reads();
        }
        self.config = config;
        #[cfg(feature = "sim")]
        {
            self.shrunk_from = self.connections.len();
            self.crowded_from = self.pending.len();
        }
        self.look_for_clients();
        Ok(())
    }

    fn options(&self, which: &ListenerRef) -> Result<&Listen> {
        let listener = self.listeners.get(self.position(which)?);
        Ok(&listener.ok_or_else(|| no_listener(which))?.options)
    }

    fn set_options(&mut self, which: &ListenerRef, mut options: Listen) -> Result<()> {
        let at = self.position(which)?;
        let listener = self.listeners.get_mut(at).ok_or_else(|| no_listener(which))?;
        let checked = options.check().and_then(|()| listener.options.check_change(&options));
        checked.map_err(|error| error.of_listener(&listener.name))?;
        options.access = options.access.counting_on(&listener.options.access);
        listener.limits = Rc::new(options.limits.clone());
        listener.bucket.follow(options.accept_rate, self.now);
        listener.sources.follow(&options.sources, self.now);
        if listener.meters.follow(&options.limits, self.now) {
            for conn in self
                .connections
                .iter_mut()
                .filter(|conn| conn.listener == Some(listener.id))
            {
                conn.machine.ask_again(self.now);
                self.timers.arm(conn.id.index, conn.machine.deadline());
            }
        }
        log::info!(target: logs::LISTENER, "listener {}: its options have changed", listener.name);
        log::debug!(target: logs::LISTENER, "listener {}: {options:?}", listener.name);
        listener.options = options;
        self.look_for_clients();
        Ok(())
    }

    fn set_suspended(&mut self, which: &ListenerRef, suspended: bool) -> Result<()> {
        let at = self.position(which)?;
        if let Some(listener) = self.listeners.get_mut(at) {
            listener.suspended = suspended;
            listener.readable |= !suspended;
        }
        // At once, so that it holds when this returns.
        self.reconcile();
        Ok(())
    }

    fn close_listener(&mut self, which: &ListenerRef) -> Result<()> {
        let at = self.position(which)?;
        self.close_port(at);
        Ok(())
    }

    fn listener_socket(&mut self, which: &ListenerRef) -> Result<OwnedFd> {
        let at = self.position(which)?;
        let socket = self.listeners.get_mut(at).and_then(|listener| listener.socket.as_mut());
        let shared = self.os.share_listener(socket.ok_or_else(|| no_listener(which))?);
        shared.map_err(Error::os("sharing a listening socket"))
    }

    fn stats(&self) -> Stats {
        let mut stats = self.stats.clone();
        self.complete(&mut stats);
        stats
    }

    fn drain(&mut self, grace: Duration) {
        self.begin_drain(grace);
    }

    fn drain_report(&self) -> Option<DrainReport> {
        self.drain.report()
    }

    fn stop(&mut self) {
        self.stopped = true;
    }
}

impl<A, O: Os> Reactor<A, O> {
    /// What a report says of a connection: its listener, itself, its peer, its state, its age, what it carried.
    pub(super) fn describe(&self, id: ConnId) -> String {
        match self.info(id) {
            Some(info) => match info.listener {
                Some(listener) => format!("listener {}, {info}", self.listener_name(listener)),
                None => info.to_string(),
            },
            None => format!("connection {id}"),
        }
    }

    fn stream(&self, id: ConnId) -> io::Result<&O::Stream> {
        let stream = self
            .connections
            .get(id)
            .and_then(|_| self.streams.get(id.index as usize)?.as_ref());
        Ok(stream.ok_or(io::ErrorKind::NotConnected)?)
    }

    /// Where an open listener is.
    fn position(&self, which: &ListenerRef) -> Result<usize> {
        self.listeners
            .iter()
            .position(|listener| listener.socket.is_some() && listener.is_called(which))
            .ok_or_else(|| no_listener(which))
    }
}

fn no_listener(which: &ListenerRef) -> Error {
    Error::NoListener {
        listener: which.clone(),
    }
}
