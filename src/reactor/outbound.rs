//! The outgoing connections that are not established yet, with the options of their attempts.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use crate::addr::Addr;
use crate::config::{Connect, Retry, SocketOptions};
use crate::id::ConnId;
use crate::proto::tls::ClientTls;

/// The outgoing connections that are not established yet.
#[derive(Debug, Default)]
pub(super) struct Outbound {
    attempts: BTreeMap<ConnId, Attempt>,
    /// Number of attempts without a socket: they wait for the next try, or end.
    without_socket: usize,
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
    /// An attempt is under way.
    pub(super) has_socket: bool,
}

impl Attempt {
    pub(super) fn new(addr: Addr, options: &Connect) -> Self {
        Self {
            addr,
            bind: options.bind,
            socket: options.socket.clone(),
            tls: options.tls.clone(),
            timeout: options.connect_timeout,
            retry: options.retry.clone(),
            failed: 0,
            has_socket: false,
        }
    }
}

impl Outbound {
    pub(super) fn insert(&mut self, id: ConnId, attempt: Attempt) {
        self.without_socket += usize::from(!attempt.has_socket);
        self.attempts.insert(id, attempt);
    }

    /// Number of connections that have no socket: between two attempts, or closed just now.
    pub(super) fn without_socket(&self) -> usize {
        self.without_socket
    }

    /// The socket of the connection's attempt is closed.
    pub(super) fn lose_socket(&mut self, id: ConnId) {
        if let Some(attempt) = self.attempts.get_mut(&id) {
            let had_socket = std::mem::replace(&mut attempt.has_socket, false);
            self.without_socket += usize::from(had_socket);
        }
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
        let attempt = self.attempts.remove(&id)?;
        self.without_socket -= usize::from(!attempt.has_socket);
        Some(attempt)
    }

    /// All attempts, once the server ends.
    #[must_use = "their TLS configurations' destructors are foreign code"]
    pub(super) fn take_all(&mut self) -> Vec<Attempt> {
        self.without_socket = 0;
        std::mem::take(&mut self.attempts).into_values().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::ServerNumber;

    #[test]
    fn attempts_without_a_socket_are_counted_and_not_searched() {
        let id = |index| ConnId::new(ServerNumber::NONE, index, 1);
        let mut outbound = Outbound::default();
        for (index, has_socket) in [(0, true), (1, false), (2, true)] {
            let attempt = Attempt {
                addr: Addr::unspecified(),
                bind: None,
                socket: SocketOptions::default(),
                tls: None,
                timeout: Duration::ZERO,
                retry: None,
                failed: 0,
                has_socket,
            };
            outbound.insert(id(index), attempt);
        }
        assert_eq!(outbound.without_socket(), 1);
        outbound.lose_socket(id(0));
        outbound.lose_socket(id(0));
        assert_eq!(outbound.without_socket(), 2);
        assert!(outbound.remove(id(0)).is_some() && outbound.remove(id(0)).is_none());
        assert_eq!(outbound.without_socket(), 1);
        assert_eq!(outbound.take_all().len(), 2);
        assert_eq!(outbound.without_socket(), 0);
    }
}
