//! What remains of a connection whose socket leaves the loop: unread and unsent bytes, and the TLS
//! session.

use std::error::Error as StdError;
use std::time::Duration;

use super::buffers::Buffers;
use super::conn_config::ConnConfig;
use super::tls::Session;
#[cfg(feature = "tls")]
use super::tls::TlsInfo;

/// The bytes and the TLS session of a detached connection. Still sans-IO.
pub(crate) struct DetachedIo {
    limits: EndLimits,
    tls: Option<Box<Session>>,
    /// Received bytes that no handler got; over TLS decrypted.
    unread: Vec<u8>,
    /// How many of `unread` are read since.
    read: usize,
    /// Bytes to be sent; over TLS to be encrypted.
    unsent: Vec<u8>,
    has_lost_output: bool,
    /// Why TLS has failed, and the error itself until it is taken.
    failure: Option<(String, Option<Failure>)>,
    /// Spare buffers: a pool stays on its thread.
    buffers: Vec<Vec<u8>>,
}

/// The options that bound the end of a connection.
#[derive(Clone, Copy, Debug)]
pub(crate) struct EndLimits {
    pub(crate) write_timeout: Duration,
    pub(crate) linger_timeout: Duration,
    pub(crate) linger_bytes: usize,
}

impl EndLimits {
    pub(super) fn of(config: &ConnConfig) -> Self {
        Self {
            write_timeout: config.write_timeout,
            linger_timeout: config.linger_timeout,
            linger_bytes: config.linger_bytes,
        }
    }
}

type Failure = Box<dyn StdError + Send + Sync>;

impl DetachedIo {
    pub(super) fn new(
        limits: EndLimits,
        tls: Option<Box<Session>>,
        unread: &[u8],
        unsent: Vec<u8>,
    ) -> Self {
        let mut detached_io = Self {
            limits,
            tls,
            unread: unread.to_vec(),
            read: 0,
            unsent,
            has_lost_output: false,
            failure: None,
            buffers: Vec::new(),
        };
        detached_io.keep_failure();
        detached_io
    }

    /// Returns the session, the bytes to be read, and those to be sent.
    pub(super) fn into_parts(mut self) -> (Option<Box<Session>>, Vec<u8>, Vec<u8>) {
        let unread = self.unread.split_off(self.read.min(self.unread.len()));
        (self.tls, unread, self.unsent)
    }

    fn keep_failure(&mut self) {
        let failure = self.tls.as_mut().and_then(|session| session.take_failure());
        if let Some(failure) = failure {
            self.failure = Some((failure.to_string(), Some(failure)));
        }
    }

    pub(crate) fn end_limits(&self) -> EndLimits {
        self.limits
    }

    pub(crate) fn is_tls(&self) -> bool {
        self.tls.is_some()
    }

    #[cfg(feature = "tls")]
    pub(crate) fn tls(&self) -> Option<TlsInfo<'_>> {
        self.tls.as_deref().and_then(TlsInfo::of)
    }

    /// Returns the bytes to be read.
    pub(crate) fn unread(&self) -> &[u8] {
        self.unread.get(self.read..).unwrap_or_default()
    }

    /// Removes the first `count` unread bytes.
    pub(crate) fn consume(&mut self, count: usize) {
        self.read = (self.read + count).min(self.unread.len());
        if self.read == self.unread.len() {
            self.unread.clear();
            self.read = 0;
        }
    }

    /// Handles bytes that were read from the socket.
    pub(crate) fn receive(&mut self, wire: &mut [u8]) {
        let Some(session) = &mut self.tls else {
            return self.unread.extend_from_slice(wire);
        };
        let mut buffers = Buffers::of(std::mem::take(&mut self.buffers));
        let mut plain = buffers.take();
        session.receive(wire, &mut plain, &mut buffers);
        self.unread.extend_from_slice(&plain);
        buffers.give(plain);
        self.buffers = buffers.into_large();
        self.keep_failure();
    }

    /// Takes the failure of TLS, once. Bytes from before it are unread first.
    pub(crate) fn take_failure(&mut self) -> Option<Failure> {
        self.failure.as_mut()?.1.take()
    }

    /// Returns why TLS has failed, each time.
    pub(crate) fn cause_of_failure(&self) -> Option<&str> {
        self.failure.as_ref().map(|(cause, _)| cause.as_str())
    }

    /// True if the peer's close_notify has come: nothing follows.
    pub(crate) fn is_over(&self) -> bool {
        self.tls
            .as_ref()
            .is_some_and(|session| session.peer_closed())
    }

    pub(crate) fn send(&mut self, bytes: &[u8]) {
        self.unsent.extend_from_slice(bytes);
    }

    /// Returns the bytes to write now.
    pub(crate) fn transmit(&mut self) -> &[u8] {
        let Some(session) = &mut self.tls else {
            return &self.unsent;
        };
        if session.pending().is_empty() && !self.unsent.is_empty() {
            let mut buffers = Buffers::of(std::mem::take(&mut self.buffers));
            let encrypted = session.encrypt([&self.unsent, &[]], &mut buffers);
            self.buffers = buffers.into_large();
            if let Ok(taken @ 1..) = encrypted {
                drop(self.unsent.drain(..taken));
            } else {
                // The keys are worn out, and close_notify is pending or was sent.
                self.unsent.clear();
                self.has_lost_output = true;
            }
        }
        session.pending()
    }

    /// True if TLS could not encrypt all output: nothing more can be sent.
    pub(crate) fn has_lost_output(&self) -> bool {
        self.has_lost_output
    }

    /// Removes the first `count` bytes of [`DetachedIo::transmit`], which were written.
    pub(crate) fn sent(&mut self, count: usize) {
        match &mut self.tls {
            Some(session) => {
                session.advance(count);
                session.shrink(&mut Buffers::default());
            }
            None => drop(self.unsent.drain(..count.min(self.unsent.len()))),
        }
    }

    /// Sends close_notify: nothing follows.
    pub(crate) fn finish(&mut self) {
        if let Some(session) = &mut self.tls {
            // FIN follows in any case, also if close_notify cannot be sent.
            let _ = session.close_notify(&mut Buffers::default());
        }
    }
}
