//! Several servers on several threads that act as one.

use std::any::Any;
use std::num::NonZeroUsize;
use std::sync::{mpsc, Arc};
use std::thread;

use crate::config::Config;
use crate::error::{Error, Result};
use crate::handle::{add_listeners, CommonCap, Handle};
use crate::listener_info::ListenerInfo;
use crate::logs;
use crate::reactor::os_mio::SharedListenSockets;
use crate::reactor::shared_cap::SharedCap;
use crate::server::{warn_of_descriptors, Common, Server, Spawned, Thread};

/// Several servers on threads of their own, for several cores, with the same listening sockets, one
/// cap and one handle.
///
/// Each shard is a [`Server`] like any other. Its connections, handlers and application state stay
/// on its thread, so they need neither locks nor `Send`. A connection stays in the shard that
/// accepted it.
///
/// ```
/// # use portcullis::{Config, Context, Framing, Handler, Listen, Outcome, Shards};
/// # struct Echo;
/// # impl Handler for Echo {
/// #     fn on_frame(&mut self, cx: &mut Context<'_>, frame: &[u8]) -> Outcome {
/// #         cx.conn.send(frame)?;
/// #         Ok(())
/// #     }
/// # }
/// # fn main() -> portcullis::Result<()> {
/// let shards = Shards::new(Config::max_connections(10_000)).spawn(|_shard, server| {
///     server.listen(Listen::tcp("127.0.0.1:0", Framing::Line), |_app, _peer| Echo)?;
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
/// | [`Config::max_connections`] | one exact cap over all shards; changed in one, changed in all |
/// | [`Config::pending_limits`] | over all shards: each has its part |
/// | listening sockets | see below |
/// | [`Handle`] | reaches all shards |
/// | [`Alarm::Connections`](crate::Alarm::Connections) | each shard's own alarm, on the connections of all shards |
/// | [`Alarm::Descriptors`](crate::Alarm::Descriptors) | each shard's own alarm, on the descriptors of all shards |
/// | every other limit, rate, budget, alarm and count | each shard's own |
///
/// The first shard that listens on an address opens the socket; [`Server::listen`] with the same
/// address in another shard shares it. With port 0, listeners of one name share a port, and those
/// without a name share ports in the order of their calls. A Unix socket's file is removed with the
/// last listener.
///
/// Make a TLS configuration once, outside of `build`, and clone its `Arc`. With one for each shard,
/// a client's session is resumed only where it began. The cap is not divided, because a divided cap
/// refuses clients while slots are free (see below). A limit of connections per source is each
/// shard's own, so give each shard its part.
///
/// # Which shard accepts a client
///
/// By default all shards share one backlog, and a client is accepted by any shard with time and a
/// free slot. A shard with clearly more connections than the average (an eighth, and 4) defers to
/// the others for a millisecond.
///
/// At the cap all shards leave the poll. The shard that frees a slot accepts the next client, or
/// wakes one of the others before it calls a handler. A slot is taken only while a connection has
/// it; that of a detached connection even after its shard has ended. So a client waits only if no
/// shard can accept it:
///
/// | a shard | its clients, with one backlog | with a backlog each |
/// |---|---|---|
/// | is blocked by a handler | are accepted by others | wait until it goes on |
/// | is suspended, or at its listener's limit | are accepted by others | wait for it |
/// | ran out of descriptors | are accepted by the next to try | wait for its next try |
/// | closes its listener, drains, ended or failed | are accepted by others | are reset |
/// | is at the common cap | first come, first served | go to the shard with the free slot |
///
/// A shard evicts its own connections only. With one backlog it leaves a client that it would
/// refuse ([`AtCapacity::Refuse`](crate::AtCapacity::Refuse)) to a shard that may have one to evict.
/// After 100 ms it refuses the client. At its listener's own limit it refuses a client at once,
/// although another shard may have room.
///
/// With [`SocketOptions::reuse_port`](crate::SocketOptions::reuse_port) each shard has a socket and
/// a backlog of its own. Linux chooses among them by a hash of the addresses, even while a shard is
/// blocked. With `net.ipv4.tcp_migrate_req` Linux does not reset the clients of a closed socket.
///
/// The hash spreads connections evenly, and a client wakes one shard only. This is useful for very
/// many short connections and handlers that never block. Other systems may give all clients to one
/// of the sockets. Unix sockets have one backlog in any case.
///
/// Measured on Linux 6.18 with two cores, one backlog against a backlog each (clients on the
/// same two cores):
///
/// | | one backlog | a backlog each |
/// |---|---|---|
/// | 50 clients while one of 2 shards blocks for 1 s: served late | 0 | 26 |
/// | 50 clients while one of 2 shards is suspended: not served | 0 | 17 to 21 |
/// | 100 clients for 100 slots in 2, 4, 8 shards: not served | 0, 0, 0 | 11, 11, 17 (cap divided) |
/// | 256 clients, one by one, on 2 shards | 115 and 141 | 129 and 127 |
/// | CPU per connect, echo, close; 1, 4, 16 shards | 80, 119, 206 µs | 79, 112, 108 µs |
///
/// The last row is the price: the kernel wakes every idle shard for each new client. Two shards
/// with handlers of 50 µs answer twice as many messages as one server: 30,100 to 15,200 per second
/// at 64 connections. A bare echo costs the same 6 to 8 µs of CPU in both.
#[derive(Clone, Debug)]
#[must_use]
pub struct Shards {
    config: Config,
    threads: Option<usize>,
}

const MAX_THREADS: usize = 1024;

impl Shards {
    /// Makes a set of shards with these options, one for each core. [`Config::max_connections`] is
    /// the cap on all of them together; every other limit, rate and budget is each shard's own.
    pub fn new(config: Config) -> Self {
        Self {
            config,
            threads: None,
        }
    }

    /// Sets the number of shards. Defaults to [`std::thread::available_parallelism`]. 0 counts as
    /// 1; more than 1,024 are an error of [`Shards::spawn`].
    pub fn threads(mut self, threads: usize) -> Self {
        self.threads = Some(threads.max(1));
        self
    }

    /// Makes the shards, one after the other, and runs them once all are made. `build` is called on
    /// each shard's own thread with its number, from 0, and its server. It opens the listeners and
    /// returns the shard's application state, which need not be `Send`.
    ///
    /// # Errors
    ///
    /// The first error of `build`; [`Error::Option`] for the config or the number of shards;
    /// [`Error::Os`] if the system gives no thread or poll. No client was served: the shards made
    /// before have ended when this returns.
    ///
    /// # Panics
    ///
    /// If `build` does, with the same panic, after the shards made before have ended.
    pub fn spawn<A, F>(self, build: F) -> Result<Spawned<A>>
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
                    // Without a signal to start they end.
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
        if common.listen_sockets.forget(count) {
            common.shared_cap.set_one_backlog();
        }
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
        Ok(Spawned {
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

/// A shard that was made and does not run yet.
struct Waiting<A> {
    handle: Handle<A>,
    listeners: Vec<ListenerInfo>,
    thread: Thread,
    go: mpsc::SyncSender<()>,
}

/// Reports a shard that ends otherwise than drained or stopped, at once: the others go on.
struct Unexpected(Option<usize>);

impl Unexpected {
    /// The shard has returned from its loop.
    fn is(mut self, ran: Result<()>) -> Result<()> {
        if let (Some(shard), Err(error)) = (self.0.take(), &ran) {
            logs::error!(target: logs::SERVER, "shard {shard} has failed and is closed: {error}");
        }
        ran
    }
}

impl Drop for Unexpected {
    fn drop(&mut self) {
        if let Some(shard) = self.0 {
            logs::error!(target: logs::SERVER, "shard {shard} has panicked and is closed");
        }
    }
}

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
            Ok((app, server))
        });
        drop((common, build));
        // Dropped in reverse: clients, slots and callers of handles do not wait for the state's
        // destructor.
        let (mut app, mut server) = match built {
            Ok(built) => built,
            Err(error) => {
                // The spawning thread waits for this.
                let _ = tell.send(Err(error));
                return Ok(None);
            }
        };
        let _ = tell.send(Ok((server.handle(), server.control().listeners())));
        if may_go.recv().is_err() {
            return Ok(None);
        }
        let end = Unexpected(Some(shard));
        let ran = end.is(server.run(&mut app));
        ran.map(|()| server.control().drain_report())
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
            // Its listeners are closed when this returns.
            let _ = thread.join();
            Err(Failure::Error(error))
        }
        // Nothing was sent: `build` has panicked.
        Err(_) => Err(match thread.join() {
            Err(panic) => Failure::Panic(panic),
            Ok(outcome) => Failure::Error(outcome.err().unwrap_or(Error::Draining)),
        }),
    }
}

#[cfg(all(test, loom, feature = "sim"))]
mod models;
