//! Outgoing connections until they are there: attempts, what the kernel says of them, and the time in between.
//!
//! A connection has its slot and its id from the beginning, and keeps them from attempt to attempt; the socket is another each time.
//! An event is only a reason to ask: whether an attempt has come about is what its own socket says, so that one that was meant for the
//! socket before costs a question.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::rc::Rc;
use std::time::Duration;

use super::connections::Connection;
use super::os::{Os, Token};
use super::Reactor;
use crate::addr::Addr;
use crate::connect::{Connect, Retry};
use crate::error::{Error, Result};
use crate::handler::Handler;
use crate::id::ConnId;
use crate::listen::SocketOptions;
use crate::logs;
use crate::proto::tls::ClientTls;
use crate::proto::{Machine, Time};
use crate::reason::{CloseReason, Closed};

/// The outgoing connections that are not there yet.
pub(super) type Attempts = BTreeMap<ConnId, Attempt>;

/// What is needed to try, and to try again.
#[derive(Debug)]
pub(super) struct Attempt {
    addr: Addr,
    bind: Option<SocketAddr>,
    socket: SocketOptions,
    tls: Option<ClientTls>,
    timeout: Duration,
    retry: Option<Retry>,
    /// Attempts that have failed.
    failed: u32,
}

impl<A, O: Os> Reactor<A, O> {
    /// Takes a slot and makes the first attempt. Never calls the handler.
    pub(crate) fn begin_connection(
        &mut self,
        addr: Addr,
        options: Connect,
        handler: Box<dyn Handler<A>>,
    ) -> Result<ConnId> {
        // The handler that asks for it may have blocked for longer than an attempt may take.
        self.catch_up();
        let begun = self.first_attempt(addr, options);
        match begun {
            Ok((conn, stream)) => {
                let id = conn.id;
                self.stats.outgoing += 1;
                self.timers.arm(id.index, conn.machine.deadline());
                let connected = conn.writable;
                self.move_in(conn, stream, Some(handler));
                if let (true, Some(conn)) = (connected, self.connections.get_mut(id)) {
                    self.ready.push(id, &mut conn.queued);
                }
                Ok(id)
            }
            Err(error) => {
                self.connections.unreserve();
                self.drop_handler(handler);
                Err(error)
            }
        }
    }

    fn first_attempt(&mut self, addr: Addr, options: Connect) -> Result<(Connection, Option<O::Stream>)> {
        if self.drain.is_on() {
            return Err(Error::Draining);
        }
        options.check(&addr)?;
        let now = self.now;
        // The framing's maker is the user's code: nothing has been done yet if it panics.
        let mut machine = Machine::connecting(&options.framing, Rc::new(options.limits.clone()), now);
        if !self.connections.reserve() {
            return Err(Error::AtCapacity {
                max_connections: self.connections.cap(),
            });
        }
        let mut attempt = Attempt {
            addr: addr.clone(),
            bind: options.bind,
            socket: options.socket,
            tls: options.tls,
            timeout: options.connect_timeout,
            retry: options.retry,
            failed: 0,
        };
        let id = self.connections.next_id();
        let (stream, connected) = match self.start_connect(id, &attempt) {
            Ok((stream, connected)) => {
                machine.connects_until(now.after(attempt.timeout));
                (Some(stream), connected)
            }
            Err(error) => match self.again(id, &mut attempt, &error) {
                Some(when) => {
                    machine.connects_until(when);
                    (None, false)
                }
                None => {
                    self.discard("a TLS configuration's destructor", attempt);
                    return Err(Error::Connect { addr, source: error });
                }
            },
        };
        self.attempts.insert(id, attempt);
        let conn = Connection {
            writable: connected,
            ..Connection::new(id, None, addr, machine, now, self.stats.iterations)
        };
        Ok((conn, stream))
    }

    /// One attempt: a new socket, in the poll. True if it is connected already.
    fn start_connect(&mut self, id: ConnId, attempt: &Attempt) -> io::Result<(O::Stream, bool)> {
        let (mut stream, connected) = self.os.connect(&attempt.addr, attempt.bind, &attempt.socket)?;
        match self.os.register_stream(&mut stream, Token::of_conn(id)) {
            Ok(()) => Ok((stream, connected)),
            Err(error) => {
                self.os.close(stream, false);
                Err(error)
            }
        }
    }

    /// An attempt has failed. When the next one begins, if there is to be one.
    fn again(&mut self, id: ConnId, attempt: &mut Attempt, error: &dyn std::fmt::Display) -> Option<Time> {
        attempt.failed = attempt.failed.saturating_add(1);
        let delay = match &attempt.retry {
            Some(retry) if !self.drain.is_on() => retry.delay(attempt.failed, self.os.random())?,
            _ => return None,
        };
        log::debug!(
            target: logs::CONNECTION,
            "{id}: attempt {} to connect to {} failed: {error}; the next in {delay:?}",
            attempt.failed,
            attempt.addr
        );
        Some(self.now.after(delay))
    }

    pub(super) fn is_connecting(&self, id: ConnId) -> bool {
        self.connections
            .get(id)
            .is_some_and(|conn| conn.machine.is_connecting())
    }

    /// In its turn: asks what has become of the attempt, if something was said of it. True if it connects no more, in the one way or
    /// the other.
    pub(super) fn check_connect(&mut self, id: ConnId) -> bool {
        let Some(conn) = self.connections.get_mut(id) else {
            return true;
        };
        let told = conn.readable || conn.writable || conn.hang_up;
        let hang_up = conn.hang_up;
        (conn.readable, conn.writable, conn.hang_up) = (false, false, false);
        let stream = self.streams.get_mut(id.index as usize).and_then(Option::as_mut);
        if let (true, Some(stream)) = (told, stream) {
            match self.os.connected(stream) {
                Ok(true) => {
                    // The edges that came with it are used up, and an end that came with it is told once.
                    (conn.readable, conn.writable, conn.hang_up) = (true, true, hang_up);
                    self.on_connected(id);
                }
                Ok(false) => {}
                Err(error) => self.fail_attempt(id, CloseReason::ConnectFailed, Some(error)),
            }
        }
        let Some(conn) = self.connections.get(id).filter(|conn| conn.machine.is_connecting()) else {
            return true;
        };
        self.timers.arm(id.index, conn.machine.deadline());
        false
    }

    /// It is connected.
    fn on_connected(&mut self, id: ConnId) {
        let attempt = self.attempts.remove(&id);
        let Some(conn) = self.connections.get_mut(id) else {
            return;
        };
        let tls = attempt.as_ref().and_then(|attempt| attempt.tls.as_ref());
        let (machine, now, pool) = (&mut conn.machine, self.now, &mut self.pool);
        // A TLS configuration may hold the user's code, a store of sessions for instance.
        let begun = catch_unwind(AssertUnwindSafe(|| {
            let machine = machine;
            machine.handle_connected(tls, now, pool);
        }));
        if let Err(panic) = begun {
            self.report_conn_panic(id, "a TLS configuration", panic);
            if let Some(conn) = self.connections.get_mut(id) {
                conn.machine.end(Closed::new(CloseReason::Panicked), &mut self.pool);
            }
        }
        self.discard("a TLS configuration's destructor", attempt);
    }

    /// What is due of a connection that is not there: its attempt has taken too long, or the next one begins.
    pub(super) fn expire_attempt(&mut self, id: ConnId, due: Time) {
        let late = self
            .connections
            .get(id)
            .is_some_and(|conn| conn.machine.deadline() <= due);
        if !late {
            return;
        }
        self.catch_up();
        if self.streams.get(id.index as usize).is_some_and(Option::is_some) {
            return self.fail_attempt(id, CloseReason::ConnectTimeout, None);
        }
        let Some(attempt) = self.attempts.remove(&id) else {
            return;
        };
        let dialed = self.start_connect(id, &attempt);
        let until = self.now.after(attempt.timeout);
        self.attempts.insert(id, attempt);
        match dialed {
            Ok((stream, connected)) => {
                if let Some(place) = self.streams.get_mut(id.index as usize) {
                    *place = Some(stream);
                }
                if let Some(conn) = self.connections.get_mut(id) {
                    conn.machine.connects_until(until);
                    conn.writable = connected;
                }
            }
            Err(error) => self.fail_attempt(id, CloseReason::ConnectFailed, Some(error)),
        }
    }

    /// Gives the attempt's socket back, and plans the next one or ends the connection.
    fn fail_attempt(&mut self, id: ConnId, reason: CloseReason, error: Option<io::Error>) {
        if let Some(stream) = self.streams.get_mut(id.index as usize).and_then(Option::take) {
            self.os.close(stream, false);
            self.free_descriptor();
        }
        let words = error.as_ref().map_or_else(|| reason.to_string(), ToString::to_string);
        let when = self.attempts.remove(&id).and_then(|mut attempt| {
            let when = self.again(id, &mut attempt, &words);
            self.attempts.insert(id, attempt);
            when
        });
        let Some(conn) = self.connections.get_mut(id) else {
            return;
        };
        match (when, error) {
            (Some(when), _) => conn.machine.connects_until(when),
            (None, Some(error)) => conn.machine.end(Closed::with(reason, error), &mut self.pool),
            (None, None) => conn.machine.end(Closed::new(reason), &mut self.pool),
        }
    }

    /// The server drains: no connection comes about any more.
    pub(super) fn give_up_attempts(&mut self) {
        for &id in self.attempts.keys() {
            if let Some(conn) = self.connections.get_mut(id) {
                conn.machine.end(Closed::new(CloseReason::Drained), &mut self.pool);
                self.ready.push(id, &mut conn.queued);
            }
        }
    }

    /// Those without a socket: they wait for their next attempt.
    pub(super) fn without_socket(&self) -> usize {
        let waits = |id: &&ConnId| self.streams.get(id.index as usize).is_none_or(Option::is_none);
        self.attempts.keys().filter(waits).count()
    }
}
