//! The options of a socket.

use std::time::Duration;

use crate::error::{Error, Result};

/// TCP keepalive (`tcp(7)`): finds peers that vanished without a FIN.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
#[non_exhaustive]
pub struct Keepalive {
    /// Idle time before the first probe (TCP_KEEPIDLE). Whole seconds, 1 to 32767.
    pub time: Duration,
    /// Time between probes (TCP_KEEPINTVL). Whole seconds, 1 to 32767.
    pub interval: Duration,
    /// Unanswered probes before the connection is given up (TCP_KEEPCNT), 1 to 127.
    pub retries: u32,
}

impl Keepalive {
    /// Probes after `time`, then every `interval`, and gives up after `retries` of them.
    pub fn new(time: Duration, interval: Duration, retries: u32) -> Self {
        Self {
            time,
            interval,
            retries,
        }
    }
}

/// What is set on the listening socket; accepted sockets inherit what concerns them (`tcp(7)`, `socket(7)`). Of an outgoing one:
/// what concerns any connection.
#[derive(Clone, Debug)]
pub(crate) struct SocketOptions {
    pub(crate) backlog: u32,
    pub(crate) nodelay: bool,
    pub(crate) only_v6: bool,
    pub(crate) reuse_address: bool,
    pub(crate) reuse_port: bool,
    pub(crate) keepalive: Option<Keepalive>,
    pub(crate) recv_buffer: Option<usize>,
    pub(crate) send_buffer: Option<usize>,
    /// Of a Unix socket's file.
    pub(crate) mode: Option<u32>,
}

impl Default for SocketOptions {
    fn default() -> Self {
        Self {
            backlog: 1024,
            nodelay: true,
            only_v6: true,
            reuse_address: true,
            reuse_port: false,
            keepalive: None,
            recv_buffer: None,
            send_buffer: None,
            mode: None,
        }
    }
}

impl SocketOptions {
    /// What the kernel would refuse without saying which option it means, or cut without a word.
    pub(crate) fn check(&self) -> Result<()> {
        if let Some(keepalive) = &self.keepalive {
            // The limits of Linux (`tcp(7)`, MAX_TCP_KEEPIDLE and its like).
            let seconds = 1..=32_767;
            let in_range = |time: Duration| seconds.contains(&time.as_secs());
            let whole = |time: Duration| time.subsec_nanos() == 0;
            if !whole(keepalive.time) || !whole(keepalive.interval) {
                return Err(Error::option(
                    "keepalive",
                    "time and interval are whole seconds: the kernel takes nothing else",
                ));
            }
            if !in_range(keepalive.time)
                || !in_range(keepalive.interval)
                || !(1..=127).contains(&keepalive.retries)
            {
                return Err(Error::option(
                    "keepalive",
                    format!(
                        "time ({:?}) and interval ({:?}) go from 1 s to 32767 s, retries ({}) from 1 to 127",
                        keepalive.time, keepalive.interval, keepalive.retries
                    ),
                ));
            }
        }
        for (option, bytes) in [
            ("recv_buffer", self.recv_buffer),
            ("send_buffer", self.send_buffer),
        ] {
            if bytes.is_some_and(|bytes| i32::try_from(bytes).is_err()) {
                return Err(Error::option(
                    option,
                    "a socket's buffer is smaller than 2 GiB",
                ));
            }
        }
        Ok(())
    }
}
