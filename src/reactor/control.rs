//! What callbacks and the server's owner can ask of a server and change.

use std::collections::HashMap;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::Duration;

use super::close::remove_detached;
use super::connections::Returning;
use super::core::Core;
use super::detached_conns::Receiver;
use super::inner::Inner;
use super::listener::Listener;
use super::os::Os;
use super::user_code::drop_handler;
use crate::access::Prefix;
use crate::addr::{Addr, Credentials};
use crate::alarm::{Alarm, AlarmInfo};
use crate::catch::catch;
use crate::config::Config;
use crate::config::Connect;
use crate::config::Listen;
use crate::detached::Detached;
use crate::error::{Error, Result};
use crate::handle::HandleError;
use crate::handler::{AlarmCallback, ControlOps, Interest, Watched};
use crate::handler::{ConnInfo, ConnOps, Handler, LocalJob, Message, WriteFrame};
use crate::histogram::Histograms;
use crate::id::{AlarmId, TimerId, WatchId};
use crate::id::{ConnId, ListenerId, ListenerRef};
use crate::listener_info::ListenerInfo;
use crate::logs;
use crate::metrics::Metrics;
use crate::proto::{Chunk, DetachedIo, Machine, Pool, SendError, Time};
use crate::reason::{Close, CloseReason, Closed};
use crate::recent::RecentClose;
use crate::stats::{DrainReport, Stats};
use crate::tree::Tree;

/// Slots that a tree visits in any case, and for each connection that it may show.
const TREE_SLOTS: usize = 4096;
const SLOTS_PER_LEAF: usize = 16;

impl<A, O: Os> ConnOps<A> for Inner<A, O> {
    fn machine(&mut self, id: ConnId) -> Option<(&mut Machine, &mut Pool)> {
        let (conn, pool) = self.core.conns.parts(id)?;
        Some((&mut conn.machine, pool))
    }

    fn machine_ref(&self, id: ConnId) -> Option<&Machine> {
        Some(&self.core.conns.get(id)?.machine)
    }

    fn send(&mut self, id: ConnId, frame: &[u8]) -> std::result::Result<(), Box<SendError>> {
        self.send_by(id, |conn, os, pool, now, until| {
            conn.send(os, pool, now, frame, until)
        })
    }

    fn send_chunks(
        &mut self,
        id: ConnId,
        payload: &mut [Chunk<'_>],
    ) -> std::result::Result<(), Box<SendError>> {
        self.send_by(id, |conn, os, pool, now, until| {
            conn.send_chunks(os, pool, now, payload, until)
        })
    }

    fn send_with(
        &mut self,
        id: ConnId,
        write: &mut WriteFrame<'_>,
    ) -> std::result::Result<(), Box<SendError>> {
        self.send_by(id, |conn, os, pool, now, until| {
            conn.send_with(os, pool, now, write, until)
                .map_err(Box::new)
        })
    }

    fn touch(&mut self, id: ConnId) {
        self.core.touch(id);
    }

    fn info(&self, id: ConnId) -> Option<ConnInfo> {
        Some(self.core.conns.get(id)?.info(self.core.os.now()))
    }

    fn local_addr(&self, id: ConnId) -> io::Result<Addr> {
        self.core.os.local_addr(self.core.stream(id)?)
    }

    fn credentials(&self, id: ConnId) -> io::Result<Credentials> {
        self.core.os.credentials(self.core.stream(id)?)
    }

    fn fd(&self, id: ConnId) -> io::Result<BorrowedFd<'_>> {
        self.core.os.fd(self.core.stream(id)?)
    }

    fn close_as(&mut self, id: ConnId, close: Close) {
        if let Some(close) = self.close_behind(id, close) {
            self.core.close_as(id, close);
            self.core.touch(id);
        }
    }

    fn notify(&mut self, id: ConnId, message: Message) -> std::result::Result<(), HandleError> {
        let Core {
            deferred,
            conns,
            config,
            guard,
            ..
        } = &mut self.core;
        let queued = deferred.notify(conns, id, message, config.queue_limits);
        queued.map_err(|(error, message)| {
            guard.drop("a message's destructor", message);
            error
        })
    }

    fn replace_handler(&mut self, id: ConnId, handler: Box<dyn Handler<A>>) {
        // A connection that is not admitted yet has no handler, and gets the service's. One that
        // has left the loop needs none.
        let conn = self.core.conns.get(id);
        let is_handled =
            conn.is_some_and(|conn| conn.machine.was_admitted() && !conn.machine.is_detached());
        let replaced = if is_handled {
            self.user.replace_handler(id, handler)
        } else {
            Some(handler)
        };
        if let Some(replaced) = replaced {
            drop_handler(&mut self.core.guard, replaced);
        }
    }

    fn detach(&mut self, id: ConnId, receiver: Receiver) -> Result<()> {
        let core = &mut self.core;
        if !core
            .conns
            .get_mut(id)
            .is_some_and(|conn| conn.machine.begin_detach())
        {
            return Err(Error::ConnState(
                "the connection is detached already, closing, or not open yet",
            ));
        }
        core.detached.begin(id, receiver);
        core.touch(id);
        Ok(())
    }

    fn connect(
        &mut self,
        addr: Addr,
        options: Connect,
        handler: Box<dyn Handler<A>>,
    ) -> Result<ConnId> {
        self.begin(options, handler, |core, options| {
            core.start_connect(addr, options)
        })
    }

    fn adopt(
        &mut self,
        socket: OwnedFd,
        options: Connect,
        handler: Box<dyn Handler<A>>,
    ) -> Result<ConnId> {
        self.begin(options, handler, |core, options| {
            core.adopt(socket, &mut None, None, options)
        })
    }

    fn attach(
        &mut self,
        detached: Detached,
        options: Connect,
        handler: Box<dyn Handler<A>>,
    ) -> Result<ConnId> {
        let id = detached.id();
        let parts = detached.into_parts().map_err(Error::ConnState);
        let (socket, mut remains, returning) = match parts {
            Ok((socket, remains, place)) => {
                let returning = Returning {
                    had_slot: self.core.is_detached(id),
                    permit: place.into_permit(),
                };
                remove_detached(self, id, CloseReason::Detached);
                (Ok(socket), Some(remains), Some(returning))
            }
            Err(error) => (Err(error), None, None),
        };
        let is_tls = remains.as_ref().is_some_and(DetachedIo::is_tls);
        let attached = self.begin(options, handler, |core, options| {
            if is_tls && options.tls.is_some() {
                return Err(Error::option("tls", "the connection speaks TLS already"));
            }
            core.adopt(socket?, &mut remains, returning, options)
        });
        let guard = &mut self.core.guard;
        guard.drop("a TLS configuration's destructor", remains);
        attached
    }

    fn now(&mut self) -> Time {
        self.core.refresh()
    }
}

impl<A, O: Os> Inner<A, O> {
    /// Begins a connection and gives it its handler. After an error that is dropped, as the options
    /// always are.
    fn begin(
        &mut self,
        options: Connect,
        handler: Box<dyn Handler<A>>,
        begin: impl FnOnce(&mut Core<O>, &Connect) -> Result<ConnId>,
    ) -> Result<ConnId> {
        // Destructors would run while a panic unwinds, and another panic would abort.
        let begun = catch(|| begin(&mut self.core, &options)).unwrap_or_else(|panic| {
            self.core.guard.report("a framing's maker", panic, None);
            Err(Error::ConnState("the maker of its framing panicked"))
        });
        self.core.guard.drop("a connection's options", options);
        match begun {
            Ok(id) => self.user.set_handler(id, Some(handler)),
            Err(_) => drop_handler(&mut self.core.guard, handler),
        }
        begun
    }
}

impl<A, O: Os> ControlOps<A> for Inner<A, O> {
    fn listeners(&self) -> Vec<ListenerInfo> {
        let capacity = self.core.capacity_at(self.core.os.now());
        let open = self
            .core
            .listeners
            .iter()
            .filter(|listener| listener.is_open());
        open.map(|listener| listener.info(&capacity, self.core.traffic_of(listener)))
            .collect()
    }

    fn listener(&self, which: &ListenerRef) -> Result<ListenerInfo> {
        let capacity = self.core.capacity_at(self.core.os.now());
        let listener = self.core.listeners.find(which)?;
        Ok(listener.info(&capacity, self.core.traffic_of(listener)))
    }

    fn connections(&self) -> Vec<ConnInfo> {
        // A callback may have worked before it asks.
        let now = self.core.os.now();
        self.core.conns.iter().map(|conn| conn.info(now)).collect()
    }

    fn connections_page(&self, from: usize, limit: usize) -> (Vec<ConnInfo>, Option<usize>) {
        let conns = &self.core.conns;
        let slots = conns.slots();
        let up_to_u32 = |number| u32::try_from(number).unwrap_or(u32::MAX);
        let from = up_to_u32(from);
        let end = from.saturating_add(up_to_u32(limit.max(1))).min(slots);
        let visited = (from..end).filter_map(|index| conns.by_index(index));
        let max = (end.saturating_sub(from) as usize).min(conns.len());
        let (mut connections, now) = (Vec::with_capacity(max), self.core.os.now());
        connections.extend(visited.map(|conn| conn.info(now)));
        (connections, (end < slots).then_some(end as usize))
    }

    fn tree(&self, limit: usize) -> Tree {
        let core = &self.core;
        let now = core.os.now();
        let capacity = core.capacity_at(now);
        let branch = |listener: &Listener<O::Listener>| {
            let info = listener.info(&capacity, core.traffic_of(listener));
            (info, Vec::<ConnInfo>::new())
        };
        let mut listeners: Vec<_> = core.listeners.iter().map(branch).collect();
        let ids = core.listeners.iter().map(|listener| listener.id);
        let positions: HashMap<ListenerId, usize> = ids.zip(0..).collect();
        let outgoing = core.outgoing();
        let mut outgoing_left = outgoing.min(limit);
        let mut outgoing_connections = Vec::new();
        let mut missing: usize = outgoing_left;
        for (listener, _) in &listeners {
            missing = missing.saturating_add(listener.connections.min(limit));
        }
        let max = missing
            .saturating_mul(SLOTS_PER_LEAF)
            .saturating_add(TREE_SLOTS);
        let slots = (0..core.conns.slots()).take(max);
        for conn in slots.filter_map(|index| core.conns.by_index(index)) {
            if missing == 0 {
                break;
            }
            let Some(listener) = conn.listener else {
                if outgoing_left > 0 {
                    outgoing_connections.push(conn.info(now));
                    outgoing_left -= 1;
                    missing -= 1;
                }
                continue;
            };
            let branch = positions
                .get(&listener)
                .and_then(|&at| listeners.get_mut(at));
            if let Some((_, shown)) = branch.filter(|(_, shown)| shown.len() < limit) {
                shown.push(conn.info(now));
                missing -= 1;
            }
        }
        Tree {
            stats: self.stats(),
            descriptors: core.open_descriptors(),
            draining: core.drain.is_on(),
            listeners,
            outgoing,
            outgoing_connections,
        }
    }

    fn recent_closes(&self, limit: usize) -> Vec<RecentClose> {
        let (history, now) = (&self.core.history, self.core.os.now());
        history.recent_closes(now, limit)
    }

    #[cfg(feature = "observer")]
    fn descriptor_limit(&self) -> Option<usize> {
        self.core.os.descriptor_limit()
    }

    #[cfg(feature = "observer")]
    fn shard(&self) -> Option<(usize, usize)> {
        self.core.conns.shard()
    }

    fn histograms(&self) -> Histograms {
        let (history, pool) = (&self.core.history, &self.core.conns.pool);
        Histograms {
            connection_age: history.ages.clone(),
            handshake_time: history.handshake_times.clone(),
            frame_size_in: pool.sizes_in.clone(),
            frame_size_out: pool.sizes_out.clone(),
            iteration_time: self.core.busy.iteration_times.clone(),
        }
    }

    fn metrics(&self) -> Metrics {
        Metrics {
            stats: self.stats(),
            histograms: self.histograms(),
            listeners: self.listeners(),
            alarms: self.alarms(),
            descriptors: self.core.open_descriptors(),
            memory_limit: self.core.config.memory_limit,
        }
    }

    fn add_alarm(
        &mut self,
        alarm: Alarm,
        cooldown: Duration,
        callback: AlarmCallback<A>,
    ) -> Result<AlarmId> {
        let alarms = &mut self.user.alarms;
        alarms.add(&self.core, alarm, cooldown, callback)
    }

    fn set_alarm(&mut self, id: AlarmId, alarm: Alarm, cooldown: Duration) -> Result<()> {
        self.user.alarms.set(&self.core, id, alarm, cooldown)
    }

    fn remove_alarm(&mut self, id: AlarmId) -> bool {
        self.user.alarms.remove(&mut self.core.guard, id)
    }

    fn alarms(&self) -> Vec<AlarmInfo> {
        self.user.alarms.infos(&self.core)
    }

    fn set_timer(&mut self, after: Duration, job: LocalJob<A>) -> TimerId {
        let at = self.core.refresh().after(after);
        self.user.timers.set(self.core.conns.server(), at, job)
    }

    fn cancel_timer(&mut self, id: TimerId) -> bool {
        let job = self.user.timers.cancel(self.core.conns.server(), id);
        let was_set = job.is_some();
        self.core.guard.drop("a job's destructor", job);
        was_set
    }

    fn watch(&mut self, interest: Interest, watched: Box<dyn Watched<A>>) -> Result<WatchId> {
        let Self { core, user } = self;
        let begun = match user.watches.next_id(core.conns.server()) {
            Some((id, token)) => {
                let begun = core.os.watch(watched.fd(), interest, token);
                begun
                    .map(|()| id)
                    .map_err(Error::os("watching a descriptor"))
            }
            None => Err(Error::option(
                "watch",
                "a server watches at most 4096 descriptors",
            )),
        };
        match &begun {
            Ok(id) => user.watches.add(*id, watched),
            Err(_) => core.guard.drop("a descriptor's callback", watched),
        }
        begun
    }

    fn unwatch(&mut self, id: WatchId) -> bool {
        let Self { core, user } = self;
        let Some((descriptor, watched)) = user.watches.remove(id) else {
            return false;
        };
        // While its callback runs, it is not known whether that has replaced the descriptor.
        match (descriptor, &watched) {
            (Some(descriptor), Some(_)) => core.os.unwatch(descriptor),
            (Some(descriptor), None) => user.watches.end_later(id, descriptor),
            (None, _) => {}
        }
        core.guard.drop("a descriptor's callback", watched);
        true
    }

    fn kill(&mut self, id: ConnId) -> bool {
        let core = &mut self.core;
        if core.is_detached(id) {
            return core.detached.cut_off(id, &core.os);
        }
        let Some(conn) = core.conns.get(id) else {
            return false;
        };
        let (listener, peer) = (core.listeners.name_of(conn.listener), conn.peer());
        logs::warning!(
            target: logs::CONNECTION,
            { conn: id, listener: listener, peer: peer, reason: CloseReason::Killed.name() },
            "killed; {}",
            core.describe(id)
        );
        core.begin_aside(id);
        if let Some((conn, pool)) = core.conns.parts(id) {
            // What was sent before has been accepted: as far as the kernel takes it now.
            conn.write_out(&mut core.os, pool, &mut core.now);
            if conn.machine.has_unsent_in_kernel() {
                // Its last answer may be old, and what it says is lost changes the reason.
                conn.ask_delivery(&mut core.os, core.now);
            }
            conn.machine.reset(Closed::new(CloseReason::Killed), pool);
        }
        core.end_aside();
        core.touch(id);
        true
    }

    fn config(&self) -> &Config {
        &self.core.config
    }

    fn set_config(&mut self, config: Config) -> Result<()> {
        self.core.set_config(config)
    }

    fn options(&self, which: &ListenerRef) -> Result<&Listen> {
        Ok(&self.core.listeners.find(which)?.options)
    }

    fn set_options(&mut self, which: &ListenerRef, options: Listen) -> Result<()> {
        self.core.set_options(which, options)
    }

    fn ban(&mut self, network: Prefix, duration: Duration) {
        let now = self.core.refresh();
        self.core
            .admission
            .bans
            .ban(network, now.after(duration), now);
    }

    fn unban(&mut self, network: Prefix) -> bool {
        let now = self.core.refresh();
        self.core.admission.bans.unban(network, now)
    }

    fn set_suspended(&mut self, which: &ListenerRef, suspended: bool) -> Result<()> {
        let listener = self.core.listeners.find_mut(which)?;
        listener.set_suspended(suspended);
        // At once, so that it holds when this returns.
        self.core.reconcile();
        Ok(())
    }

    fn close_listener(&mut self, which: &ListenerRef) -> Result<()> {
        let Core {
            os,
            admission,
            listeners,
            ..
        } = &mut self.core;
        listeners.find_mut(which)?.close(os, &mut admission.fds);
        Ok(())
    }

    fn listener_socket(&mut self, which: &ListenerRef) -> Result<OwnedFd> {
        let listener = self.core.listeners.find_mut(which)?;
        let missing = || Error::NoListener {
            listener: which.clone(),
        };
        let socket = listener.socket.as_mut().ok_or_else(missing)?;
        let shared = self.core.os.share_listener(socket);
        shared.map_err(Error::os("sharing a listening socket"))
    }

    fn stats(&self) -> Stats {
        self.core.stats()
    }

    fn drain(&mut self, grace: Duration) {
        if self.core.begin_drain(grace) {
            self.core.give_up_attempts();
        }
    }

    fn drain_report(&self) -> Option<DrainReport> {
        self.core.drain.report()
    }

    fn stop(&mut self) {
        self.core.stopped = true;
    }
}
