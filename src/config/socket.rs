//! The options of a socket, each with its unit and default.

use std::time::Duration;

use crate::error::{Error, Result};

/// TCP keepalive (`tcp(7)`): finds peers that vanished without a FIN.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
pub struct Keepalive {
    /// Idle time before the first probe (TCP_KEEPIDLE). Whole seconds, 1 to 32767.
    #[cfg_attr(feature = "serde", serde(with = "crate::seconds"))]
    pub time: Duration,
    /// Time between probes (TCP_KEEPINTVL). Whole seconds, 1 to 32767.
    #[cfg_attr(feature = "serde", serde(with = "crate::seconds"))]
    pub interval: Duration,
    /// Number of unanswered probes after which the connection ends (TCP_KEEPCNT), 1 to 127.
    pub retries: u32,
}

/// Options of a listening socket and of the sockets accepted from it
/// ([`Listen::socket`](crate::Listen::socket)), or of an outgoing one
/// ([`Connect::socket`](crate::Connect::socket)).
///
/// An open port cannot change them (*next listen*). Accepted sockets inherit them, as far as they
/// concern connections (`tcp(7)`, `socket(7)`).
///
/// ```
/// use portcullis::{Framing, Listen};
/// let mut listen = Listen::tcp("127.0.0.1:0", Framing::Line);
/// listen.socket.backlog = 4096;
/// assert!(listen.socket.nodelay, "the default");
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default, deny_unknown_fields))]
#[non_exhaustive]
pub struct SocketOptions {
    /// TCP_NODELAY: sends small frames at once. Defaults to true.
    pub nodelay: bool,
    /// SO_KEEPALIVE with these times; `None` is off. Defaults to off.
    pub keepalive: Option<Keepalive>,
    /// SO_RCVBUF of each connection, in bytes; `None` is the system's automatic size. Not for Unix
    /// sockets: there the sender's buffer holds the bytes. Defaults to `None`.
    pub recv_buffer: Option<usize>,
    /// SO_SNDBUF of each connection, in bytes; `None` is the system's automatic size. Defaults to
    /// `None`.
    pub send_buffer: Option<usize>,
    /// Maximum number of connections that the kernel queues for accept; for listeners. Defaults to
    /// 1024. The kernel caps it silently (`net.core.somaxconn` on Linux, 4096 since 5.4), see
    /// `listen(2)`.
    pub backlog: u32,
    /// Permissions of a Unix listener's file, as in `0o660`: on Linux, write permission lets a
    /// process connect. They are set before the first client can connect. Defaults to `None`: the
    /// permissions that the process's umask leaves.
    pub mode: Option<u32>,
    /// IPV6_V6ONLY: an IPv6 listener takes no IPv4 clients. Defaults to true, whatever the system's
    /// default; with false, IPv4 peers show as `::ffff:a.b.c.d`.
    pub only_v6: bool,
    /// SO_REUSEADDR of a listener: a restarted server binds although old connections are in
    /// TIME_WAIT. Defaults to true.
    pub reuse_address: bool,
    /// SO_REUSEPORT: several listening sockets share the port. Linux spreads clients over them by a
    /// hash of their addresses, also over sockets that accept nothing at the moment. In
    /// [`Shards`](crate::Shards) each shard then has its own backlog. Defaults to false.
    pub reuse_port: bool,
}

impl Default for SocketOptions {
    fn default() -> Self {
        Self {
            nodelay: true,
            keepalive: None,
            recv_buffer: None,
            send_buffer: None,
            backlog: 1024,
            mode: None,
            only_v6: true,
            reuse_address: true,
            reuse_port: false,
        }
    }
}

impl SocketOptions {
    /// Finds values that the kernel would refuse without naming the option, or cut silently.
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
                        "time ({:?}) and interval ({:?}) go from 1 s to 32767 s, retries ({}) \
                         from 1 to 127",
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
