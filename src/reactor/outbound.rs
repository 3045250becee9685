//! The outgoing connections that are not established yet, with the options of their attempts.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use crate::addr::Addr;
use crate::config::{Retry, SocketOptions};
use crate::id::ConnId;
use crate::proto::tls::ClientTls;

/// The outgoing connections that are not established yet.
#[derive(Debug, Default)]
pub(super) struct Outbound {
    attempts: BTreeMap<ConnId, Attempt>,
}

/// The options of an attempt and of its retries.
#[derive(Debug)]
pub(super) struct Attempt {
    pub(super) addr: Addr,
    pub(super) bind: Option<SocketAddr>,
    pub(super) socket: SocketOptions,
    pub(super) tls: Option<ClientTls>,
    pub(super) timeout: Duration,
    pub(super) retry: Option<Retry>,
    /// Attempts that have failed.
    pub(super) failed: u32,
}

impl Outbound {
    pub(super) fn insert(&mut self, id: ConnId, attempt: Attempt) {
        self.attempts.insert(id, attempt);
    }

    pub(super) fn len(&self) -> usize {
        self.attempts.len()
    }

    pub(super) fn ids(&self) -> impl Iterator<Item = ConnId> + '_ {
        self.attempts.keys().copied()
    }

    #[cfg(feature = "sim")]
    pub(super) fn contains(&self, id: ConnId) -> bool {
        self.attempts.contains_key(&id)
    }

    /// The connection ends.
    #[must_use = "its TLS configuration's destructor is foreign code"]
    pub(super) fn remove(&mut self, id: ConnId) -> Option<Attempt> {
        self.attempts.remove(&id)
    }

    /// All attempts, once the server ends.
    #[must_use = "their TLS configurations' destructors are foreign code"]
    pub(super) fn take_all(&mut self) -> Vec<Attempt> {
        std::mem::take(&mut self.attempts).into_values().collect()
    }
}
