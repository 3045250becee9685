//! An embeddable, single-threaded TCP/TLS server for code that is not async.
//!
//! You give it listeners and handlers; it gives you framed messages, a hard connection cap, and a promise: whatever the
//! peers, the kernel or the handlers do, the loop goes on, memory stays bounded, and every connection ends with exactly
//! one named reason.
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
//!     let mut server = Server::new(Config::new().max_connections(1024))?;
//!     server.listen(Listen::tcp("127.0.0.1:2222").framing(Framing::Packet2), |_app, _peer| Echo)?;
//!     server.run(&mut ())
//! }
//! ```
//!
//! # Where to look
//!
//! - [`Server`]: listen, run, or [`Server::poll_once`] in a loop of your own.
//! - [`Handler`] and [`Service`]: what you write. [`Context`] and [`Conn`]: what you are lent.
//! - [`Control::connect`] and [`Conn::connect`]: connections that the server makes.
//! - [`Config`], [`Listen`], [`Connect`], [`ConnConfig`] and [`SocketOptions`]: every option, with
//!   unit and default.
//! - [`Handle`]: the one thing that crosses threads. [`Control`]: the running server between two turns.
//! - [`Shards`]: the same on several cores.
//! - [`CloseReason`]: every way a connection can end.
//! - [`manual`]: the handbook. Limits, what the operating system does, every kind of loop, TLS, testing, operating, and what is
//!   different from tokio, mio, message-io, esockd and ranch.
//!
//! # The house
//!
//! Imports run one way, from the top of this list to its end.
//!
//! | room | what is in it |
//! |---|---|
//! | `shards` | several servers as one, on as many threads |
//! | `server` | what the user owns |
//! | `reactor/` | many connections and the operating system; never looks at a payload byte |
//! | `handle`, `control`, `handler/`, `detached`, `tree`, `metrics` | what the user holds, asks, writes and sees |
//! | `proto/` | one connection, sans-IO: bytes and time are arguments; no fd, no clock |
//! | `access`, `addr`, `alarm`, `config/`, `error`, `histogram`, `id`, `reason`, `recent`, `stats` | the vocabulary |
//! | `manual/` | the handbook: no code |
//!
//! # What is promised
//!
//! - The number of connections never passes the cap, in any state, for any number of listeners, and of shards.
//! - `accepted + outgoing == open + closed`, one [`CloseReason`] each; `on_close` once for each `on_open`.
//! - Frames are what a naive decoder makes of the same bytes, however they are cut.
//! - What `send` took is delivered in order, or the reason tells why not.
//! - Output held for a connection is at most the output limit and one frame; input at most one frame, one TLS record and one read.
//! - A turn's work is bounded by its budgets, and an idle server does not wake up.
//! - No stale event, timer, job or id reaches a slot's next connection.
//!
//! # What is logged
//!
//! Through the `log` crate, under these targets. What a peer does or suffers is never above debug: nobody who can connect
//! can fill the log of a server that logs what concerns its owner.
//!
//! | target | error | warn | info | debug |
//! |---|---|---|---|---|
//! | `portcullis::server` | | cap above the descriptor limit, a waker that fails | a drain, its end | |
//! | `portcullis::listener` | a listening socket that was lost | a socket that cannot be accepted from or registered, once until it works again | opened, changed, closed | clients lost by the kernel |
//! | `portcullis::fd_exhaustion` | | descriptors or memory ran out, once per episode | the end of the episode | |
//! | `portcullis::connection` | | killed | | the end of each, with its reason; a frame from another thread that was not sent; an attempt to connect that failed and is made again |
//! | `portcullis::panic` | the user's code panicked | | | |
//!
//! # Features
//!
//! `tls` (default): TLS through rustls. `aws-lc-rs` (default) or `ring`: its cryptography, for `tls::server_config`; with
//! neither, bring your own provider. `sim`: the simulator. `arbitrary`: scripts for the simulator from a fuzzer.

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
mod config;
mod control;
mod detached;
mod error;
mod handle;
mod handler;
mod histogram;
mod id;
mod logs;
pub mod manual;
mod metrics;
mod proto;
mod reactor;
mod reason;
mod recent;
mod server;
mod shards;
#[cfg(feature = "sim")]
pub mod sim;
mod stats;
mod tree;

pub use access::{Access, AccessRule, AccessRules};
pub use addr::{Addr, AddrError, Credentials, UnixAddr};
pub use alarm::{Alarm, AlarmId, AlarmInfo, AlarmKind, AlarmNotice, AlarmState};
pub use config::{
    AtCapacity, Budgets, Config, ConnConfig, Connect, Keepalive, Listen, PendingLimits,
    ProxyProtocol, QueueLimits, Quota, Retry, SocketOptions, SourceLimits,
};
pub use control::{Control, ListenerInfo, ListenerState};
pub use detached::{DetachError, Detached, Place};
pub use error::{Error, Result};
pub use handle::{Handle, HandleError};
pub use handler::{try_accept, Conn, ConnInfo, Context, Handler, Message, Peer, Refuse, Service};
pub use histogram::{Histogram, Histograms};
pub use id::{ConnId, ListenerId, ListenerRef};
pub use metrics::Metrics;
#[cfg(feature = "tls")]
pub use proto::StartTlsError;
pub use proto::{
    Decoded, FrameBuf, FrameError, Framer, FramerFactory, Framing, ProxyError, ProxyHeader,
    ProxyOrigin, ProxySsl, ProxyTlvs, Rate, SendError, State, TimeLeft, Traffic,
};
pub use reason::{Close, CloseReason, Closed, Outcome};
pub use recent::RecentClose;
pub use server::{Server, Spawned, Turn};
pub use shards::Shards;
pub use stats::{DrainReport, Stats};
pub use tree::{Branch, Cursor, Page, Tree};

/// TLS: configurations, what a handshake agreed on, and rustls itself in the version used here.
#[cfg(feature = "tls")]
pub mod tls {
    pub use crate::proto::tls::{
        client_config, server_config, server_config_with_clients, ClientAuth, NameError, PemError,
        ServerNames, TlsConfig, TlsInfo,
    };
    pub use rustls;
    pub use rustls::{ClientConfig, ServerConfig};
}

/// The programs in the README compile.
#[cfg(all(doctest, feature = "tls"))]
#[doc = include_str!("../README.md")]
struct Readme;
