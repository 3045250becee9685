//! Connecting: attempts, their results, and the delays between.
//!
//! A connection keeps its slot and id from attempt to attempt; each attempt has its own socket. An
//! event is only a reason to ask that socket for its result, so that one for an earlier socket is
//! harmless.

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;

use super::connection::{Connection, HangUp};
use super::connections::Returning;
use super::core::Core;
use super::os::{Connected, End, Os, StreamOps, Token};
use super::outbound::Attempt;
use super::standing::Standing;
use super::work;
use crate::addr::Addr;
use crate::catch::catch;
use crate::config::Connect;
use crate::error::{Error, Result};
use crate::handler::Interest;
use crate::id::ConnId;
use crate::logs;
use crate::proto::{DetachedIo, Machine, Time};
use crate::reason::{CloseReason, Closed};

/// The socket of an attempt, and whether it is connected already.
type Opened<O> = io::Result<(<O as StreamOps>::Stream, bool)>;

impl<O: Os> Core<O> {
    /// Takes a slot and makes the first attempt.
    pub(super) fn start_connect(&mut self, addr: Addr, options: &Connect) -> Result<ConnId> {
        // The timeout counts from now: the callback that asks may have blocked.
        self.refresh();
        let conn = self.first_attempt(addr, options)?;
        Ok(self.insert_outgoing(conn))
    }

    fn insert_outgoing(&mut self, conn: Connection<O::Stream>) -> ConnId {
        let (id, connected) = (conn.id, conn.writable);
        self.stats.outgoing += 1;
        self.insert(conn);
        self.conns.show(id);
        self.conns.arm_deadline(id);
        if connected {
            self.conns.wake(id);
        }
        id
    }

    /// Takes over a connected socket; and `remains`, the parts of a detached connection that is
    /// `returning`.
    pub(super) fn adopt(
        &mut self,
        socket: OwnedFd,
        remains: &mut Option<DetachedIo>,
        returning: Option<Returning>,
        options: &Connect,
    ) -> Result<ConnId> {
        self.refresh();
        let adopted = self.adopt_stream(socket, returning, options);
        let (conn, attempt) = match adopted {
            Ok(adopted) => adopted,
            Err(error) => {
                // The socket is closed.
                self.free_descriptor();
                return Err(error);
            }
        };
        let id = conn.id;
        self.outbound.insert(id, attempt);
        self.insert_outgoing(conn);
        match (remains.take(), self.conns.parts(id)) {
            (Some(remains), Some((conn, pool))) => {
                conn.machine.handle_attached(remains, self.now, pool);
                conn.machine.congest_if_high(self.now);
                self.memory.measure(&mut self.conns, id, self.now);
                let attempt = self.outbound.remove(id);
                self.guard.drop("a TLS configuration's destructor", attempt);
            }
            _ => self.on_connected(id),
        }
        self.conns.arm_deadline(id);
        Ok(id)
    }

    fn adopt_stream(
        &mut self,
        socket: OwnedFd,
        returning: Option<Returning>,
        options: &Connect,
    ) -> Result<(Connection<O::Stream>, Attempt)> {
        if self.drain.is_on() {
            return Err(Error::Draining);
        }
        options.check_connected()?;
        let adopted = self.os.adopt_stream(socket, &options.socket);
        let (stream, addr) = adopted.map_err(Error::os("adopting a connected socket"))?;
        let conn = Rc::new(options.conn.clone());
        let machine = Machine::connecting(&options.framing, conn, self.now);
        // The framing's maker may have blocked.
        let now = self.refresh();
        let claimed = self.claim_with(returning, |core, id| {
            core.register(id, stream, Interest::Readable)
        });
        let (id, stream) = match claimed {
            Some((id, Ok(stream))) => (id, stream),
            Some((_, Err(error))) => {
                self.conns.unclaim();
                self.guard.drop("a framer's destructor", machine);
                return Err(Error::os("registering an adopted socket")(error));
            }
            None => {
                self.guard.drop("a framer's destructor", machine);
                return Err(Error::AtCapacity {
                    max_connections: self.conns.cap(),
                });
            }
        };
        let attempt = Attempt {
            has_socket: true,
            ..Attempt::new(addr.clone(), options)
        };
        let conn = Connection {
            stream: Some(stream),
            writable: true,
            standing: Standing::adopted(),
            ..Connection::new(id, None, addr, machine, now, self.stats.iterations)
        };
        Ok((conn, attempt))
    }

    fn first_attempt(&mut self, addr: Addr, options: &Connect) -> Result<Connection<O::Stream>> {
        if self.drain.is_on() {
            return Err(Error::Draining);
        }
        options.check(&addr)?;
        let now = self.now;
        // The framing's maker is foreign code: nothing has been done yet if it panics.
        let mut machine = Machine::connecting(&options.framing, Rc::new(options.conn.clone()), now);
        // The maker may have blocked.
        let now = self.refresh();
        let mut attempt = Attempt::new(addr.clone(), options);
        let opened = self.claim_with(None, |core, id| core.open_socket(id, &attempt));
        let Some((id, opened)) = opened else {
            self.guard.drop("a framer's destructor", machine);
            return Err(Error::AtCapacity {
                max_connections: self.conns.cap(),
            });
        };
        let (stream, connected) = match opened {
            Ok((stream, connected)) => {
                machine.set_connect_deadline(now.after(attempt.timeout));
                (Some(stream), connected)
            }
            Err(error) => match self.plan_retry(id, &mut attempt, &error) {
                Some(at) => {
                    machine.set_connect_deadline(at);
                    (None, false)
                }
                None => {
                    self.conns.unclaim();
                    self.episodes.calm_backend(&attempt.addr, now);
                    self.guard.drop("a framer's destructor", machine);
                    return Err(Error::Connect {
                        addr,
                        source: error,
                    });
                }
            },
        };
        attempt.has_socket = stream.is_some();
        self.outbound.insert(id, attempt);
        let mut conn = Connection::new(id, None, addr, machine, now, self.stats.iterations);
        if let Some(stream) = stream {
            conn.set_socket(stream, connected);
        }
        Ok(conn)
    }

    /// Claims a slot, and then calls `open` for its socket. `None` if no slot is free.
    fn claim_with<R>(
        &mut self,
        mut returning: Option<Returning>,
        open: impl FnOnce(&mut Self, ConnId) -> R,
    ) -> Option<(ConnId, R)> {
        if returning.is_none() {
            self.listeners.refill_reserves(&mut self.conns);
            self.conns.prepare();
        } else if !self.conns.has_memory() {
            return None;
        }
        let gate = self.conns.gate();
        let _locked = gate.as_ref().map(|shared_cap| shared_cap.lock());
        let claimed = match &mut returning {
            Some(returning) => self.conns.claim_again(returning),
            None => self.conns.claim(),
        };
        if !claimed {
            return None;
        }
        let id = self.conns.next_id();
        Some((id, open(self, id)))
    }

    /// Opens and registers the socket of one attempt. True if it is connected already.
    fn open_socket(&mut self, id: ConnId, attempt: &Attempt) -> Opened<O> {
        self.work.charge(work::CONNECT);
        let (stream, connected) = self
            .os
            .connect(&attempt.addr, attempt.bind, &attempt.socket)?;
        let interest = match connected {
            true => Interest::Readable,
            false => Interest::Both,
        };
        Ok((self.register(id, stream, interest)?, connected))
    }

    /// Registers a new socket, which is closed if that fails.
    fn register(
        &mut self,
        id: ConnId,
        mut stream: O::Stream,
        interest: Interest,
    ) -> io::Result<O::Stream> {
        let token = Token::of_conn(id);
        match self.os.register_stream(&mut stream, interest, token) {
            Ok(()) => Ok(stream),
            Err(error) => {
                self.os.close(stream, End::Close);
                Err(error)
            }
        }
    }

    /// An attempt has failed. Released when the next one begins, if there is one.
    fn plan_retry(
        &mut self,
        id: ConnId,
        attempt: &mut Attempt,
        error: &dyn fmt::Display,
    ) -> Option<Time> {
        attempt.failed = attempt.failed.saturating_add(1);
        self.episodes.note_backend(&attempt.addr, error);
        let delay = match &attempt.retry {
            Some(retry) if !self.drain.is_on() => retry.delay(attempt.failed, self.os.random())?,
            _ => return None,
        };
        logs::debug!(
            target: logs::CONNECTION,
            { conn: id, listener: "", peer: attempt.addr },
            "{id}: attempt {} to connect to {} failed: {error}; the next in {delay:?}",
            attempt.failed,
            attempt.addr
        );
        Some(self.now.after(delay))
    }

    /// Asks the socket of an attempt for its result, if an event came for it. True if the
    /// connection is not connecting any more.
    pub(super) fn check_connect(&mut self, id: ConnId) -> bool {
        let Some(conn) = self.conns.get_mut(id) else {
            return true;
        };
        let hang_up = conn.hang_up;
        let announced = conn.readable || conn.writable || hang_up != HangUp::None;
        (conn.readable, conn.writable, conn.hang_up) = (false, false, HangUp::None);
        if let (true, Some(stream)) = (announced, &mut conn.stream) {
            match self.os.connected(stream) {
                Ok(Connected::NotYet) => {}
                Ok(connected) => {
                    // These edges are used up, and an end that came with them is reported once.
                    (conn.readable, conn.writable, conn.hang_up) = (true, true, hang_up);
                    if connected == Connected::Reset {
                        conn.machine.expect_reset();
                    }
                    self.on_connected(id);
                }
                Err(error) => self.fail_attempt(id, CloseReason::ConnectFailed, Some(error)),
            }
        }
        if !self.is_connecting(id) {
            return true;
        }
        self.conns.arm_deadline(id);
        false
    }

    pub(crate) fn is_connecting(&self, id: ConnId) -> bool {
        self.conns
            .get(id)
            .is_some_and(|conn| conn.machine.is_connecting())
    }

    fn on_connected(&mut self, id: ConnId) {
        let attempt = self.outbound.remove(id);
        let now = self.now;
        if let Some(attempt) = &attempt {
            self.episodes.calm_backend(&attempt.addr, now);
        }
        let Some((conn, pool)) = self.conns.parts(id) else {
            return;
        };
        let tls = attempt.as_ref().and_then(|attempt| attempt.tls.as_ref());
        // A TLS configuration may hold foreign code, such as a session store.
        let begun = catch(|| conn.machine.handle_connected(tls, now, pool));
        if let Err(panic) = begun {
            self.report_panic(id, "a TLS configuration", panic);
            self.end(id, CloseReason::Panicked);
        }
        self.guard.drop("a TLS configuration's destructor", attempt);
    }

    /// The deadline of a connection that is not established: its attempt has timed out, or the next
    /// one begins.
    pub(super) fn expire_attempt(&mut self, id: ConnId, due: Time) {
        let Some(conn) = self.conns.get(id) else {
            return;
        };
        if conn.machine.deadline() > due {
            return;
        }
        let has_socket = conn.stream.is_some();
        self.refresh();
        if has_socket {
            return self.fail_attempt(id, CloseReason::ConnectTimeout, None);
        }
        let Some(mut attempt) = self.outbound.remove(id) else {
            return;
        };
        let opened = self.open_socket(id, &attempt);
        let until = self.now.after(attempt.timeout);
        attempt.has_socket = opened.is_ok();
        self.outbound.insert(id, attempt);
        match opened {
            Ok((stream, connected)) => {
                if let Some(conn) = self.conns.get_mut(id) {
                    conn.machine.set_connect_deadline(until);
                    conn.set_socket(stream, connected);
                }
            }
            Err(error) => self.fail_attempt(id, CloseReason::ConnectFailed, Some(error)),
        }
    }

    /// Closes the attempt's socket, and plans the next attempt or ends the connection.
    fn fail_attempt(&mut self, id: ConnId, reason: CloseReason, error: Option<io::Error>) {
        if let Some(stream) = self.conns.get_mut(id).and_then(|conn| conn.stream.take()) {
            // Without an error the attempt goes on in the kernel.
            let end = if error.is_some() {
                End::Close
            } else {
                End::Fin
            };
            self.os.close(stream, end);
            self.outbound.lose_socket(id);
            self.free_descriptor();
        }
        let text = error
            .as_ref()
            .map_or_else(|| reason.to_string(), ToString::to_string);
        let next = self.outbound.remove(id).and_then(|mut attempt| {
            let next = self.plan_retry(id, &mut attempt, &text);
            self.outbound.insert(id, attempt);
            next
        });
        let Some((conn, pool)) = self.conns.parts(id) else {
            return;
        };
        match (next, error) {
            (Some(at), _) => conn.machine.set_connect_deadline(at),
            (None, Some(error)) => conn.machine.end(Closed::with(reason, error), pool),
            (None, None) => conn.machine.end(Closed::new(reason), pool),
        }
    }

    /// The server drains: no attempt is awaited.
    pub(super) fn give_up_attempts(&mut self) {
        let ids: Vec<ConnId> = self.outbound.ids().collect();
        for id in ids {
            self.end(id, CloseReason::Drained);
            self.conns.wake(id);
        }
    }
}
