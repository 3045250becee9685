//! An embeddable, single-threaded TCP/TLS server for code that is not async.
//!
//! You give it listeners and handlers. It gives you framed messages, a hard connection cap, and a
//! promise. Whatever peers send, whatever error the kernel returns, and even if a handler panics:
//! the loop goes on, buffers stay bounded, and every connection ends with exactly one named reason.
//!
//! ```no_run
//! use portcullis::{Config, Context, Framing, Handler, Listen, Outcome, Server};
//!
//! struct Echo;
//! impl Handler for Echo {
//!     fn on_frame(&mut self, cx: &mut Context<'_>, frame: &[u8]) -> Outcome {
//!         cx.conn.send(frame)?;
//!         Ok(())
//!     }
//! }
//!
//! fn main() -> portcullis::Result<()> {
//!     let mut server = Server::new(Config::max_connections(1024))?;
//!     let listen = Listen::tcp("127.0.0.1:2222", Framing::Packet2);
//!     server.listen(listen, |_app: &mut (), _peer| Echo)?;
//!     server.run(&mut ())
//! }
//! ```
//!
//! # Where to look
//!
//! What you own:
//!
//! - [`Server`]: listeners and connections; [`Server::run`], or [`Server::poll_once`] in your loop.
//! - [`Shards`]: several servers on several threads, with one port and one cap.
//! - [`Control`]: queries and changes, on the server's thread: between iterations, in jobs and in
//!   alarms.
//! - [`Handle`]: the same from other threads.
//!
//! What you write, and what each callback gets:
//!
//! - [`Handler`]: the callbacks of a connection. [`Service`]: makes a handler for each peer.
//! - [`Context`]: your application's state and the connection, [`Conn`]. [`Peer`]: the other end.
//! - [`Outcome`] and [`Close`]: what a callback returns.
//! - [`CloseReason`] and [`Closed`]: every way in which a connection can end.
//!
//! What you choose:
//!
//! - [`Config`], [`Listen`] and [`Connect`]: the options of a server, a listener and an outgoing
//!   connection, with unit and default. [`ConnConfig`] and [`SocketOptions`] are parts of both
//!   [`Listen`] and [`Connect`].
//! - [`Framing`] and [`Framer`]: how bytes become frames.
//! - [`AccessRules`], [`ProxyProtocol`] and [`Rate`]: access control, the addresses behind a proxy,
//!   and rate limits.
//! - [`Control::connect`] and [`Retry`]: outgoing connections.
//! - [`Conn::detach`] and [`Detached`]: a connection handed to code that blocks.
#![cfg_attr(
    feature = "tls",
    doc = "- [`mod@tls`]: certificates, configurations, the parameters that a handshake agreed on."
)]
//!
//! What you observe: [`Stats`], [`Metrics`] with [`Histograms`], [`Tree`], [`RecentClose`] and
//! [`Alarm`].
#![cfg_attr(feature = "observer", doc = "In a browser: [`Observer`].")]
//!
//! What you read: [`manual`], the handbook on limits, the operating system, loops, TLS,
//! testing, operating, and comparisons with other libraries.
//!
//! # What is promised
//!
//! - The number of connections never exceeds the cap: in any state, over all listeners and shards.
//!   A lowered cap closes no connection.
//! - `accepted + outgoing == open + closed`, with one [`CloseReason`] each. [`Handler::on_close`]
//!   runs once for each [`Handler::on_open`], unless the server is dropped before.
//! - Delivered frames do not depend on how the network splits the input (except raw bytes).
//! - Bytes that [`Conn::send`] accepted are delivered in order, or the close reason shows the loss.
//! - Queued output of a connection is at most the output limit plus one frame. Buffered input is at
//!   most one frame plus one TLS record plus one read. If [`Conn::set_framing`] lowers the longest
//!   frame, bytes that were read before are kept, and nothing more is read until they are decoded.
//! - The work of one [`Server::poll_once`] is bounded by budgets. An idle server wakes up once a
//!   day at most.
//! - An event, timer, message or id of a connection that has ended does not reach the next
//!   connection in its slot. For the reuse of ids see [`ConnId`].
//!
//! # What is logged
//!
//! Messages go to the `log` crate, under the targets below. Events of a single connection are
//! logged at debug level, so peers cannot fill the log. Some conditions that peers can cause are
//! logged above that level: a reached cap, for example. Each such episode has two lines: a warning
//! at its start, and a line with a count at its end. A panic in a handler is logged as an error
//! each time.
//!
//! - `portcullis::server`. Error: a shard that failed or panicked. Warn: a cap above the descriptor
//!   limit, a waker that fails, no memory for more connections, a recording that cannot be written;
//!   the cap is reached, once per episode. Info: end of the episode; begin and end of a drain.
//! - `portcullis::listener`. Error: a lost listening socket. Warn: a listener that cannot accept or
//!   be registered, once until it works again; a socket file that cannot be removed; a reached cap
//!   of a listener, once per episode. Info: opened, changed, closed; a stale socket file was
//!   removed; another process keeps its folder locked; end of the episode. Debug: a listener's
//!   changed options; clients that were gone before they could be accepted.
//! - `portcullis::fd_exhaustion`. Warn: descriptors or memory ran out, once per episode. Info: end
//!   of the episode.
//! - `portcullis::connection`. Warn: a killed connection; an address that cannot be connected to,
//!   once per episode. Info: end of the episode. Debug: each end of a connection with its
//!   reason; a failed attempt to connect that is retried.
//! - `portcullis::panic`. Error: a panic of the user's code.
//!
//! With the feature `kv`, records about one connection have these key-values (`log::kv`), whose
//! names are stable: `conn`, the id, unless a client was turned away; `listener`, the name, empty
//! for an outgoing connection; `peer`, the address; and `reason` ([`CloseReason::name`]), unless
//! the connection goes on.
//!
//! # Features
//!
//! - `tls` (default): TLS through rustls. Without `aws-lc-rs` or `ring`, bring your own provider.
//! - `aws-lc-rs` (default) or `ring`: the cryptography for `tls::server_config`.
//! - `kv`: key-values in the records of the log.
//! - `observer`: a page that shows a running server in a browser.
//! - `serde`: what you observe as data ([`manual`], `observer`); options to and from a file
//!   (`operating`).
//! - `sim`: the simulator, for tests of your handlers.
//! - `record`: `Server::recorded`, which records what the system calls return. With `sim`, replays.

#![forbid(unsafe_code)]
#![warn(
    missing_docs,
    missing_debug_implementations,
    unreachable_pub,
    unused_qualifications,
    elided_lifetimes_in_paths,
    clippy::use_self,
    clippy::manual_let_else,
    clippy::redundant_closure_for_method_calls
)]
#![cfg_attr(docsrs, feature(doc_cfg))]

#[cfg(not(unix))]
compile_error!("portcullis needs epoll or kqueue: it builds on Unix only");

mod access;
mod addr;
mod alarm;
mod catch;
mod config;
mod detached;
mod error;
mod escape;
mod handle;
mod handler;
mod histogram;
mod id;
mod listener_info;
mod logs;
pub mod manual;
mod metrics;
#[cfg(feature = "observer")]
mod observer;
mod proto;
mod reactor;
mod reason;
mod recent;
#[cfg(feature = "record")]
mod record;
#[cfg(feature = "serde")]
mod seconds;
#[cfg(feature = "serde")]
mod serialize;
mod server;
mod shards;
#[cfg(feature = "sim")]
pub mod sim;
mod stats;
mod sync;
#[cfg(test)]
mod testing;
mod tree;

pub use access::{AccessRule, AccessRules};
pub use addr::{Addr, AddrError, Credentials, UnixAddr};
pub use alarm::{Alarm, AlarmInfo};
pub use config::{
    AtCapacity, Budgets, Config, ConnConfig, Connect, Keepalive, Listen, PendingLimits,
    ProxyProtocol, QueueLimits, Quota, Retry, SocketOptions, SourceLimits,
};
pub use detached::{Detached, Place};
pub use error::{Error, Result};
pub use handle::{Answer, Handle, HandleError};
pub use handler::{
    try_accept, Broadcast, Conn, ConnInfo, Context, Control, Handler, Interest, Message, Peer,
    Refuse, Service,
};
pub use histogram::{Histogram, Histograms};
pub use id::{AlarmId, ConnId, ListenerId, ListenerRef, TimerId, WatchId};
pub use listener_info::{ListenerInfo, ListenerState};
pub use metrics::Metrics;
#[cfg(feature = "observer")]
pub use observer::Observer;
pub use proto::{
    Decoded, FrameBuf, FrameError, Framer, Framing, Payload, ProxyError, ProxyHeader, ProxySsl,
    ProxyTlvs, Rate, SendError, State, Traffic,
};
pub use reason::{Close, CloseReason, Closed, Outcome};
pub use recent::RecentClose;
#[cfg(feature = "record")]
pub use record::{Payloads, Recording};
pub use server::{Server, Spawned, Turn};
pub use shards::Shards;
pub use stats::{DrainReport, Stats};
pub use tree::Tree;

/// TLS: configurations, what a handshake agreed on, and rustls itself in the version used here.
#[cfg(feature = "tls")]
pub mod tls {
    pub use crate::proto::tls::{
        client_config, server_config, server_config_with_clients, BoundedVerifier, ClientAuth,
        ServerNames, TlsConfig, TlsInfo,
    };
    pub use rustls;
}

/// The programs in the README compile.
#[cfg(all(doctest, feature = "tls"))]
#[doc = include_str!("../README.md")]
struct Readme;
