//! From an open connection in the clear to one behind TLS (STARTTLS), and the handshake in between.
//!
//! What was sent before goes out in the clear, in front of the handshake. What the peer has sent behind the last frame is
//! the beginning of its handshake or a failure, never a frame: somebody in the middle may have put it there (CVE-2011-0411).

#[cfg(feature = "tls")]
use std::error::Error as StdError;
#[cfg(feature = "tls")]
use std::fmt;

use super::input::InputCursor;
use super::state::{Flags, State};
#[cfg(feature = "tls")]
use super::tls::{ClientTls, Session};
#[cfg(feature = "tls")]
use super::TlsConfig;
use super::{Machine, Pool, Time};
#[cfg(feature = "tls")]
use crate::reason::{CloseReason, Closed};

impl Machine {
    /// Goes on behind TLS. Takes effect on what is sent from now on, and on input once the running callback has returned.
    #[cfg(feature = "tls")]
    pub(crate) fn start_tls(&mut self, config: &TlsConfig, now: Time, pool: &mut Pool) -> Result<(), StartTlsError> {
        self.check_upgrade()?;
        let session = Session::behind(config, std::mem::take(&mut self.send_buf));
        self.upgrade(session, now, pool);
        Ok(())
    }

    /// As [`Machine::start_tls`], as the client of the handshake.
    #[cfg(feature = "tls")]
    pub(crate) fn start_tls_client(
        &mut self,
        config: &ClientTls,
        now: Time,
        pool: &mut Pool,
    ) -> Result<(), StartTlsError> {
        self.check_upgrade()?;
        match Session::client(config, std::mem::take(&mut self.send_buf), pool) {
            Ok(session) => self.upgrade(session, now, pool),
            Err(error) => {
                let error: Box<dyn StdError> = error;
                self.end(Closed::with(CloseReason::TlsHandshake, error), pool);
            }
        }
        Ok(())
    }

    #[cfg(feature = "tls")]
    fn check_upgrade(&self) -> Result<(), StartTlsError> {
        const FINISHED: u32 = Flags::EOF.0 | Flags::FINISH_REPORTED.0 | Flags::FINISHING.0;
        if self.tls.is_some() {
            return Err(StartTlsError::AlreadyTls);
        }
        let finished = self.flags.0 & FINISHED != 0;
        if self.state != State::Open || !self.was_open() || finished || self.write_closed() {
            return Err(StartTlsError::Closed);
        }
        Ok(())
    }

    #[cfg(feature = "tls")]
    fn upgrade(&mut self, mut session: Session, now: Time, pool: &mut Pool) {
        if let Some(undecoded @ [_, ..]) = self.recv_buf.get(self.recv_pos..) {
            session.stash(undecoded, pool);
        }
        self.recv_pos = 0;
        pool.give(std::mem::take(&mut self.recv_buf));
        self.flags.clear(Flags::FRAMES_BUFFERED);
        self.tls = Some(Box::new(session));
        self.enter(State::Handshaking);
        self.stopped = None;
        self.deadlines.frame = Time::NEVER;
        self.deadlines.stage = now.after(self.limits.handshake_timeout);
    }

    /// The handshake of an upgrade is over: frames flow again.
    pub(super) fn secured(&mut self, now: Time) {
        self.enter(State::Open);
        self.deadlines.stage = Time::NEVER;
        if self.is_paused() {
            self.stop_input_clocks(now);
        }
        self.flags.set(Flags::SECURED_PENDING);
        // What "nothing left to read" meant before the handshake says nothing of what comes behind it.
        self.flags.clear(Flags::READ_DRAINED);
    }

    /// Its handler was told that it is open and can be told more: frames flow, or an upgrade to TLS is under way.
    pub(crate) fn is_established(&self) -> bool {
        match self.state {
            State::Open => true,
            State::Handshaking => self.was_open(),
            State::Accepting | State::Connecting | State::Closing => false,
        }
    }

    /// What came behind the last frame before an upgrade waits to be handled: before any read.
    pub(crate) fn has_stash(&self) -> bool {
        self.tls.as_ref().is_some_and(|session| session.has_stash())
    }

    /// Handles it as if it had been read now.
    pub(crate) fn handle_stash<'a>(&mut self, now: Time, plain: &'a mut Vec<u8>, pool: &mut Pool) -> InputCursor<'a> {
        let session = self.tls.as_mut();
        let mut wire = session.map(|session| session.take_stash()).unwrap_or_default();
        self.decrypt(now, &mut wire, plain, pool);
        pool.give(wire);
        self.begin_input(plain)
    }
}

/// Why [`Conn::start_tls`](crate::Conn::start_tls) did nothing.
#[cfg(feature = "tls")]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum StartTlsError {
    /// The connection speaks TLS, or is in the handshake of another `start_tls`. RFC 3207 section 4.2: do not offer it then.
    AlreadyTls,
    /// No handshake can come: the connection is closing, one of its ends has finished, or it is not open yet.
    Closed,
}

#[cfg(feature = "tls")]
impl fmt::Display for StartTlsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::AlreadyTls => "the connection speaks TLS already",
            Self::Closed => "the connection is closing or not open, or its peer has finished: no handshake can come",
        })
    }
}

#[cfg(feature = "tls")]
impl StdError for StartTlsError {}
