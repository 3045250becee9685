//! Several servers on several threads that act as one.

use std::any::Any;
use std::fmt;
use std::num::NonZeroUsize;
use std::sync::{mpsc, Arc};
use std::thread::{self, JoinHandle};

use crate::config::Config;
use crate::control::ListenerInfo;
use crate::error::{Error, Result};
use crate::handle::{add_listeners, CommonCap, Handle};
use crate::reactor::shared_cap::SharedCap;
use crate::reactor::shared_listen_sockets::SharedListenSockets;
use crate::server::{warn_of_descriptors, Common, Server};
use crate::stats::DrainReport;

/// More cores: servers on threads of their own, with the same listening sockets, one cap and one handle.
///
/// Each shard is a [`Server`] as any other: its connections, handlers and application state stay on its thread, and nothing in them
/// is locked or `Send`. A connection stays in the shard that accepted it.
///
/// ```
/// # use portcullis::{Config, Context, Handler, Listen, Outcome, Shards};
/// # struct Echo;
/// # impl Handler for Echo {
/// #     fn on_frame(&mut self, cx: &mut Context<'_>, frame: &[u8]) -> Outcome { cx.conn.send(frame)?; Ok(()) }
/// # }
/// # fn main() -> portcullis::Result<()> {
/// let shards = Shards::new(Config::new().max_connections(10_000)).spawn(|_shard, server| {
///     server.listen(Listen::tcp("127.0.0.1:0"), |_app, _peer| Echo)?;
///     Ok(())
/// })?;
/// println!("listening on {}", shards.listeners[0].addr);
/// shards.handle.drain(std::time::Duration::from_secs(5)).expect("they run");
/// let report = shards.join()?.expect("they were drained");
/// # assert_eq!(report.forced, 0);
/// # Ok(()) }
/// ```
///
/// # What is shared
///
/// | | |
/// |---|---|
/// | [`Config::max_connections`] | one cap over all shards, exact at every instant, also while it changes; a change in one shard is one for all |
/// | [`Config::pending_limits`] | over all shards: each has its part of it |
/// | listening sockets | the first shard that listens on an address opens it, port 0 included, and [`Server::listen`] with the same address in another has the same socket; what only one listens on is its own; a Unix socket's file goes with the last |
/// | [`Handle`] | reaches all |
/// | every other limit, rate, budget, alarm and count | each shard's own: for so many connections *of one source* in all, give each shard its part |
///
/// Make a TLS configuration once, outside of `build`, and clone its `Arc`: with one for each shard, a client's session is resumed only
/// where it began. The cap is not divided, because a divided one refuses clients while there are places: see below.
///
/// # Who takes a client
///
/// By default all shards wait at one queue, and a client is taken by any that has time and room. A shard that has clearly more connections
/// than the average (an eighth, and 4) leaves the client to the others for a millisecond. When the cap is reached all shards leave the
/// queue, and a place that comes free in one of them wakes the others, unless it takes the next client itself. So a client waits
/// only if every shard is kept from it:
///
/// | a shard | its clients, with one queue | with a queue each |
/// |---|---|---|
/// | is blocked by a handler | the others take them | those that the kernel gave to it wait until it goes on |
/// | is suspended, or full by its listener's own limit | the others take them | wait until it is resumed or somebody leaves |
/// | ran out of descriptors | whichever tries first when there are some again | wait for its own next try, [`Config::emfile_backoff`] at most |
/// | closes its listener, drains alone, or has ended | the others take them | those in its queue are reset (Linux: unless `net.ipv4.tcp_migrate_req` is set) |
/// | is at the common cap | first come, first served | a free place is for the queue of the shard in which it came free, if somebody waits there |
///
/// With [`SocketOptions::reuse_port`](crate::SocketOptions::reuse_port) each shard has a socket and a queue of its own, and Linux chooses
/// among them by a hash of the addresses, whatever the shards are doing. Connections are spread evenly and an accept wakes one shard only: worth it where very many short connections
/// come and no handler blocks. Other systems may give all clients to one of the sockets. Unix sockets have one queue in any case.
///
/// Measured on Linux 6.18 with two cores, one queue against a queue for each (clients on the same two cores):
///
/// | | one queue | a queue each |
/// |---|---|---|
/// | 50 clients come while one of 2 shards blocks for 1 s: served late | 0 | 26 |
/// | 50 clients come while one of 2 shards is suspended: not served | 0 | 17 to 21 |
/// | 100 clients for 100 places in 2, 4, 8 shards, each with its part of the cap: not served at the worst | 0, 0, 0 (with the common cap) | 11, 11, 17 |
/// | 256 clients that come one by one and stay, on 2 shards | 115 and 141 | 129 and 127 |
/// | CPU for a connect, an echo and a close, both ends, with 1, 4, 16 shards | 80, 119, 206 µs | 79, 112, 108 µs |
///
/// The last row is the price: the kernel wakes every idle shard for each client that comes. Two shards whose handlers take 50 µs for a
/// message answer twice as many as one server (30 100 to 15 200 messages per second at 64 connections); a bare echo costs the
/// same 6 to 8 µs of CPU in both.
#[derive(Clone, Debug)]
#[must_use]
pub struct Shards {
    config: Config,
    threads: Option<usize>,
}

const MAX_THREADS: usize = 1024;

impl Shards {
    /// Shards with these options, one for each core. [`Config::max_connections`] is the cap on all of them together;
    /// every other limit, rate and budget is each shard's own.
    pub fn new(config: Config) -> Self {
        Self {
            config,
            threads: None,
        }
    }

    /// How many. Defaults to [`std::thread::available_parallelism`]; at least 1, at most 1,024.
    pub fn threads(mut self, threads: usize) -> Self {
        self.threads = Some(threads.max(1));
        self
    }

    /// Makes the shards, one after the other, and runs them once all are there. `build` is called on each shard's own thread
    /// with its number, from 0, and its server; it opens the listeners and returns the shard's application state, which need not
    /// be `Send`.
    ///
    /// # Errors
    ///
    /// The first error of `build`, with [`Error::Option`] for the config and [`Error::Os`] if the system gives no thread or poll.
    /// Nobody was served: the shards that were made already have ended when this returns.
    ///
    /// # Panics
    ///
    /// If `build` does, with the same panic; likewise.
    pub fn spawn<A, F>(self, build: F) -> Result<SpawnedShards<A>>
    where
        F: Fn(usize, &mut Server<A>) -> Result<A> + Send + Sync + 'static,
        A: 'static,
    {
        let count = self.threads.unwrap_or_else(cores);
        if count > MAX_THREADS {
            let problem = format!("{count} is more than the {MAX_THREADS} that make sense");
            return Err(Error::option("threads", problem));
        }
        let common = Arc::new(Common {
            shared_cap: Arc::new(SharedCap::new(self.config.max_connections, count)),
            listen_sockets: Arc::new(SharedListenSockets::default()),
        });
        warn_of_descriptors(self.config.max_connections);
        let build = Arc::new(build);
        let mut shards: Vec<Waiting<A>> = Vec::with_capacity(count);
        for shard in 0..count {
            match start(shard, &self.config, &common, &build) {
                Ok(waiting) => shards.push(waiting),
                Err(failure) => {
                    // Without a word to start they end.
                    for Waiting { thread, go, .. } in shards {
                        drop(go);
                        let _ = thread.join();
                    }
                    return match failure {
                        Failure::Error(error) => Err(error),
                        Failure::Panic(panic) => std::panic::resume_unwind(panic),
                    };
                }
            }
        }
        common.listen_sockets.forget();
        let mut handles = Vec::with_capacity(count);
        let mut listeners = Vec::new();
        let mut threads = Vec::with_capacity(count);
        for shard in shards {
            handles.push(shard.handle);
            add_listeners(&mut listeners, shard.listeners, self.config.max_connections);
            threads.push(shard.thread);
            // It waits for this.
            let _ = shard.go.send(());
        }
        Ok(SpawnedShards {
            handle: Handle::of_shards(
                handles,
                Arc::clone(&common.shared_cap) as Arc<dyn CommonCap>,
            ),
            listeners,
            threads,
        })
    }
}

impl CommonCap for SharedCap {
    fn get(&self) -> usize {
        self.cap()
    }

    fn set(&self, connections: usize) {
        self.set_cap(connections);
    }
}

fn cores() -> usize {
    thread::available_parallelism().map_or(1, NonZeroUsize::get)
}

/// A shard that is made and does not run yet.
struct Waiting<A> {
    handle: Handle<A>,
    listeners: Vec<ListenerInfo>,
    thread: Thread,
    go: mpsc::SyncSender<()>,
}

type Thread = JoinHandle<Result<Option<DrainReport>>>;

/// Why a shard was not made.
enum Failure {
    Error(Error),
    Panic(Box<dyn Any + Send>),
}

fn start<A, F>(
    shard: usize,
    config: &Config,
    common: &Arc<Common>,
    build: &Arc<F>,
) -> std::result::Result<Waiting<A>, Failure>
where
    F: Fn(usize, &mut Server<A>) -> Result<A> + Send + Sync + 'static,
    A: 'static,
{
    let (tell, told) = mpsc::sync_channel(1);
    let (go, may_go) = mpsc::sync_channel(1);
    let (config, common, build) = (config.clone(), Arc::clone(common), Arc::clone(build));
    let run = move || {
        let built = Server::sharing(config, &common, shard).and_then(|mut server| {
            let app = build(shard, &mut server)?;
            Ok((server, app))
        });
        drop((common, build));
        let (mut server, mut app) = match built {
            Ok(built) => built,
            Err(error) => {
                // Who spawned it waits for this.
                let _ = tell.send(Err(error));
                return Ok(None);
            }
        };
        let _ = tell.send(Ok((server.handle(), server.control().listeners())));
        if may_go.recv().is_err() {
            return Ok(None);
        }
        server.run(&mut app)?;
        Ok(server.control().drain_report())
    };
    let thread = thread::Builder::new()
        .name(format!("portcullis-{shard}"))
        .spawn(run)
        .map_err(|error| Failure::Error(Error::os("starting a thread")(error)))?;
    match told.recv() {
        Ok(Ok((handle, listeners))) => Ok(Waiting {
            handle,
            listeners,
            thread,
            go,
        }),
        Ok(Err(error)) => {
            // What it has opened is closed when this returns.
            let _ = thread.join();
            Err(Failure::Error(error))
        }
        // Nothing was told: `build` has panicked.
        Err(_) => Err(match thread.join() {
            Err(panic) => Failure::Panic(panic),
            Ok(outcome) => Failure::Error(outcome.err().unwrap_or(Error::Draining)),
        }),
    }
}

/// Shards that run: see [`Shards::spawn`].
#[must_use]
#[non_exhaustive]
pub struct SpawnedShards<A = ()> {
    /// Reaches all of them.
    pub handle: Handle<A>,
    /// Their listeners when they began to run, with their real ports; those of one name are one.
    pub listeners: Vec<ListenerInfo>,
    threads: Vec<Thread>,
}

impl<A> SpawnedShards<A> {
    /// Waits until every shard has ended: drained or stopped. How the drain went, all together, if all of them were drained.
    ///
    /// # Errors
    ///
    /// The first of those of [`Server::run`]. A shard that fails leaves its clients to the others, which go on.
    ///
    /// # Panics
    ///
    /// If a shard's thread did, which no handler can bring about; after all have ended.
    pub fn join(self) -> Result<Option<DrainReport>> {
        let mut outcome: Result<Option<DrainReport>> = Ok(None);
        let mut panicked = None;
        let mut undrained = false;
        for thread in self.threads {
            match thread.join() {
                Err(panic) => panicked = panicked.or(Some(panic)),
                Ok(Err(error)) => outcome = outcome.and(Err(error)),
                Ok(Ok(None)) => undrained = true,
                Ok(Ok(Some(report))) => {
                    if let Ok(so_far) = &mut outcome {
                        *so_far = Some(so_far.map_or(report, |so_far| so_far.and(report)));
                    }
                }
            }
        }
        if let Some(panic) = panicked {
            std::panic::resume_unwind(panic);
        }
        outcome.map(|report| report.filter(|_| !undrained))
    }

    /// All their threads have ended.
    pub fn is_finished(&self) -> bool {
        self.threads.iter().all(JoinHandle::is_finished)
    }
}

impl<A> fmt::Debug for SpawnedShards<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SpawnedShards")
            .field("handle", &self.handle)
            .field("listeners", &self.listeners)
            .finish_non_exhaustive()
    }
}
