//! Several servers on several threads that act as one.

mod handle;

use std::any::Any;
use std::fmt;
use std::num::NonZeroUsize;
use std::sync::{mpsc, Arc};
use std::thread::{self, JoinHandle};

pub use handle::ShardsHandle;

use crate::config::Config;
use crate::control::ListenerInfo;
use crate::error::{Error, Result};
use crate::handle::Handle;
use crate::reactor::doors::Doors;
use crate::reactor::places::Places;
use crate::server::{warn_of_descriptors, Common, Server};
use crate::stats::DrainReport;

/// More cores: servers on threads of their own, with the same listening sockets, one cap and one handle.
#[derive(Clone, Debug)]
#[must_use]
pub struct Shards {
    config: Config,
    threads: Option<usize>,
}

impl Shards {
    /// Shards with these options, one for each core. [`Config::max_connections`] is the cap on all of them together;
    /// every other limit, rate and budget is each shard's own.
    pub fn new(config: Config) -> Self {
        Self { config, threads: None }
    }

    /// How many. Defaults to [`std::thread::available_parallelism`]; at least 1.
    pub fn threads(mut self, threads: usize) -> Self {
        self.threads = Some(threads.max(1));
        self
    }

    /// Makes the shards, one after the other, and runs them once all are there. `build` is called on each shard's own thread
    /// with its number, from 0, and its server; it opens the listeners and returns the shard's own application state, which need not be
    /// `Send`.
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
        let common = Arc::new(Common {
            places: Arc::new(Places::new(self.config.max_connections, count)),
            doors: Arc::new(Doors::default()),
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
        common.doors.forget();
        let mut handles = Vec::with_capacity(count);
        let mut listeners = Vec::new();
        let mut threads = Vec::with_capacity(count);
        for shard in shards {
            handles.push(shard.handle);
            handle::add_listeners(&mut listeners, shard.listeners, self.config.max_connections);
            threads.push(shard.thread);
            // It waits for this.
            let _ = shard.go.send(());
        }
        Ok(SpawnedShards {
            handle: ShardsHandle::new(handles, Arc::clone(&common.places)),
            listeners,
            threads,
        })
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
        let _ = tell.send(Ok((server.handle(), server.listeners())));
        if may_go.recv().is_err() {
            return Ok(None);
        }
        server.run(&mut app)?;
        Ok(server.drain_report())
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
    pub handle: ShardsHandle<A>,
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
