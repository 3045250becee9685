//! What is left of a connection whose socket goes elsewhere: what was not read and sent yet, and the TLS session.

use std::error::Error as StdError;

use super::pool::Pool;
use super::state::{Flags, State};
use super::{tls, Machine};
use crate::reason::{CloseReason, Closed};

/// Still sans-IO: bytes go in and out.
pub(crate) struct DetachedIo {
    tls: Option<Box<tls::Session>>,
    /// What has come and no handler was told; over TLS what it says.
    unread: Vec<u8>,
    /// How much of it is read since.
    read: usize,
    /// What is to be sent; over TLS what is to be encrypted.
    unsent: Vec<u8>,
    /// Of a pool, which stays on its thread.
    buffers: Vec<Vec<u8>>,
}

impl Machine {
    /// Nothing more is told to the handler, and nothing more is taken from it: the connection goes elsewhere at the end of
    /// its turn. False if it cannot: it is not open, or goes already.
    pub(crate) fn begin_detach(&mut self) -> bool {
        let possible = self.state == State::Open && self.was_open() && !self.is_deaf() && !self.is_detaching();
        let possible = possible && !self.flags.has(Flags::FINISHING);
        if possible {
            self.flags.set(Flags::DETACHING);
        }
        possible
    }

    /// It is to go elsewhere now.
    #[inline]
    pub(crate) fn is_detaching(&self) -> bool {
        self.flags.has(Flags::DETACHING) && self.state == State::Open
    }

    /// It has gone elsewhere, and its place is kept for it.
    #[inline]
    pub(crate) fn is_detached(&self) -> bool {
        self.flags.has(Flags::DETACHED)
    }

    /// Ends this machine's part.
    pub(crate) fn detach(&mut self, pool: &mut Pool) -> DetachedIo {
        let detached_io = DetachedIo {
            tls: self.tls.take(),
            unread: self.held.get(self.held_at..).unwrap_or_default().to_vec(),
            read: 0,
            unsent: self.outbox.waiting().to_vec(),
            buffers: Vec::new(),
        };
        self.outbox.clear(pool);
        self.enter_closing(pool);
        self.deadlines = super::Deadlines::none();
        self.note_closed(Closed::new(CloseReason::Detached));
        self.flags.set(Flags::DETACHED);
        detached_io
    }
}

type Failure = Box<dyn StdError + Send + Sync>;

impl DetachedIo {
    pub(crate) fn is_tls(&self) -> bool {
        self.tls.is_some()
    }

    #[cfg(feature = "tls")]
    pub(crate) fn tls(&self) -> Option<tls::TlsInfo<'_>> {
        self.tls.as_ref().map(|session| session.info())
    }

    /// What waits to be read.
    pub(crate) fn unread(&self) -> &[u8] {
        self.unread.get(self.read..).unwrap_or_default()
    }

    /// So much of it has been read.
    pub(crate) fn consume(&mut self, count: usize) {
        self.read = (self.read + count).min(self.unread.len());
        if self.read == self.unread.len() {
            self.unread.clear();
            self.read = 0;
        }
    }

    /// Ciphertext has come.
    pub(crate) fn receive(&mut self, wire: &mut [u8]) {
        let Some(session) = &mut self.tls else {
            return self.unread.extend_from_slice(wire);
        };
        let mut pool = Pool::of(std::mem::take(&mut self.buffers));
        let mut plain = pool.take();
        session.receive(wire, &mut plain, &mut pool);
        self.unread.extend_from_slice(&plain);
        pool.give(plain);
        self.buffers = pool.into_buffers();
    }

    /// What ended it, once. What came before that is unread first.
    pub(crate) fn take_failure(&mut self) -> Option<Failure> {
        self.tls.as_mut().and_then(|session| session.take_failure())
    }

    /// The peer has said that nothing more will come: only TLS says so.
    pub(crate) fn is_over(&self) -> bool {
        self.tls.as_ref().is_some_and(|session| session.peer_closed())
    }

    pub(crate) fn send(&mut self, bytes: &[u8]) {
        self.unsent.extend_from_slice(bytes);
    }

    /// What is to be written now.
    pub(crate) fn transmit(&mut self) -> Result<&[u8], Failure> {
        let Some(session) = &mut self.tls else {
            return Ok(&self.unsent);
        };
        if session.waiting().is_empty() && !self.unsent.is_empty() {
            let mut pool = Pool::of(std::mem::take(&mut self.buffers));
            let taken = session.encrypt(&self.unsent, &mut pool)?;
            self.buffers = pool.into_buffers();
            self.unsent.drain(..taken);
        }
        Ok(session.waiting())
    }

    /// So much of it was.
    pub(crate) fn sent(&mut self, count: usize) {
        match &mut self.tls {
            Some(session) => {
                session.advance(count);
                session.slim(&mut Pool::default());
            }
            None => drop(self.unsent.drain(..count.min(self.unsent.len()))),
        }
    }

    /// Nothing more is to be sent.
    pub(crate) fn finish(&mut self) {
        if let Some(session) = &mut self.tls {
            // Nothing can be done about a goodbye that cannot be said.
            let _ = session.close_notify(&mut Pool::default());
        }
    }
}
