//! Recordings on the simulator: exact replays, and scripts of what clients sent. Features `sim` and
//! `record`.
//!
//! | part | owns |
//! |---|---|
//! | `records` | one record |
//! | `tape` | a file, as far as it is sound |
//! | `player` | which record is next, and where the server differs |
//! | `os` | the calls |
//! | `to_script` | what clients sent, as a script |

mod os;
mod player;
mod records;
mod tape;
mod to_script;

use std::cell::RefCell;
use std::fmt;
use std::io;
use std::rc::Rc;
use std::time::Duration;

use os::ReplayOs;
use player::{Player, Recorded};

pub use player::Divergence;
pub use tape::{Ending, Tape};

use crate::config::{Config, Listen};
use crate::error::Result;
use crate::handle::{Command, Handle};
use crate::handler::{Control, ControlOps as _, Handler, Peer, Service};
use crate::id::ListenerId;
use crate::proto::{Chunk, Time};
use crate::reactor::Reactor;
use crate::stats::Stats;

/// A server that gets the recorded result of each system call, in place of a kernel.
///
/// Make it as the recorded server was made: with the same configuration, the same listeners in the
/// same order, and the same application state. Then [`Replay::run`] repeats the recording: the same
/// events, in the same order, at the same times, with the same close reasons. It stops at the first
/// call that is not the recorded one, and describes both in a [`Divergence`].
///
/// What is no system call is not in the file, and must be repeated by the program: changes through
/// [`Server::control`](crate::Server::control) between two iterations (see [`Replay::step`]). Or it
/// makes the replay differ: jobs and messages of handles, clocks and random numbers of the
/// application, TLS, detached connections.
///
/// An example is at [`Tape`].
pub struct Replay<A = ()> {
    reactor: Reactor<A, ReplayOs>,
    player: Rc<RefCell<Player>>,
    app: A,
}

impl<A> Replay<A> {
    /// Makes a server without listeners.
    ///
    /// # Errors
    ///
    /// Those of [`Server::new`](crate::Server::new).
    /// [`Error::Recording`](crate::Error::Recording) if the oldest part of the file is overwritten
    /// ([`Tape::is_whole`]), or its payloads are not there ([`Tape::filled`] provides them).
    pub fn new(tape: Tape, config: Config, app: A) -> Result<Self> {
        if !tape.is_whole() {
            return Err(tape.refused(
                "the oldest part was overwritten: only a script can be made of the remainder \
                 (Tape::script)",
            ));
        }
        tape.check_input()?;
        let player = Rc::new(RefCell::new(Player::new(tape)));
        let reactor = Reactor::new(ReplayOs(Rc::clone(&player)), config)?;
        reactor.handle().set_replay();
        Ok(Self {
            reactor,
            player,
            app,
        })
    }

    /// Opens a listener, as [`Server::listen`](crate::Server::listen). Its address is the recorded
    /// one.
    ///
    /// # Errors
    ///
    /// Those of [`Server::listen`](crate::Server::listen).
    /// [`Error::Recording`](crate::Error::Recording) for a listener with TLS, whose sessions have
    /// random keys; with the divergence if the recorded server did not listen here.
    pub fn listen<F, H>(&mut self, options: Listen, accept: F) -> Result<ListenerId>
    where
        F: FnMut(&mut A, Peer) -> H + 'static,
        H: Handler<A> + 'static,
    {
        self.listen_with(options, accept)
    }

    /// Opens a listener with a [`Service`]. Otherwise like [`Replay::listen`].
    ///
    /// # Errors
    ///
    /// Those of [`Replay::listen`].
    pub fn listen_with(
        &mut self,
        options: Listen,
        service: impl Service<A> + 'static,
    ) -> Result<ListenerId> {
        #[cfg(feature = "tls")]
        if options.tls.is_some() {
            let player = self.player.borrow();
            return Err(player
                .tape()
                .refused("TLS sessions have random keys and cannot be replayed"));
        }
        let id = self.reactor.listen(options, Box::new(service));
        let player = self.player.borrow();
        match player.divergence() {
            Some(divergence) => Err(player.tape().error(io::Error::other(divergence.clone()))),
            None => id,
        }
    }

    /// Runs one iteration. False once the recording is over: see [`Replay::ending`].
    ///
    /// Between two iterations the program repeats what the recorded one did there.
    ///
    /// # Errors
    ///
    /// The first call of the server that is not the recorded one. From then on nothing happens.
    pub fn step(&mut self) -> std::result::Result<bool, Divergence> {
        let due = {
            let mut player = self.player.borrow_mut();
            if player.divergence().is_none() {
                if player.is_over() {
                    return Ok(false);
                }
                // The reading of the clock before the poll.
                player.skip_queries();
            }
            player.time()
        };
        self.repeat_commands();
        // A recorded poll that failed ended the program, or its next iteration follows.
        let _ = self.reactor.iterate(&mut self.app, due, None);
        let player = self.player.borrow();
        match player.divergence() {
            Some(divergence) => Err(divergence.clone()),
            None => Ok(!player.is_over()),
        }
    }

    /// Queues the commands of handles that the recorded server carried out.
    fn repeat_commands(&self) {
        let commands = self.player.borrow().commands();
        if commands.is_empty() {
            return;
        }
        let handle = self.reactor.handle();
        for command in commands {
            handle.repeat(match command {
                Recorded::Drain(grace) => Command::Drain(grace),
                Recorded::Kill(token) => Command::Kill(self.reactor.id_of(token)),
                Recorded::Send(token, frame) => {
                    Command::Send(self.reactor.id_of(token), Chunk::Owned(frame))
                }
            });
        }
    }

    /// Runs all iterations. Returns where the recording ends, which is damage if the file is
    /// damaged.
    ///
    /// # Errors
    ///
    /// As [`Replay::step`].
    pub fn run(&mut self) -> std::result::Result<Ending, Divergence> {
        while self.step()? {}
        Ok(self.ending())
    }

    /// Returns where the recording ends.
    pub fn ending(&self) -> Ending {
        self.player.borrow().tape().ending()
    }

    /// Returns the number of records so far.
    pub fn records(&self) -> u64 {
        self.player.borrow().played()
    }

    /// Returns the recorded time since the server was made.
    pub fn now(&self) -> Duration {
        self.player.borrow().time().since(Time::ZERO)
    }

    /// Returns the server's queries and changes between two iterations.
    pub fn control(&mut self) -> Control<'_, A> {
        Control::new(self.reactor.ops_mut())
    }

    /// Returns a handle for the application's state and its threads. Its frames, kills and drains
    /// are accepted and have no effect: the recorded ones are repeated.
    pub fn handle(&self) -> Handle<A> {
        self.reactor.handle()
    }

    /// Returns the counters.
    pub fn stats(&self) -> Stats {
        self.reactor.ops().stats()
    }

    /// Returns the application's state.
    pub fn app(&self) -> &A {
        &self.app
    }

    /// Returns the application's state, to change it.
    pub fn app_mut(&mut self) -> &mut A {
        &mut self.app
    }
}

/// What is closed now is not compared.
impl<A> Drop for Replay<A> {
    fn drop(&mut self) {
        self.player.borrow_mut().end();
    }
}

impl<A: fmt::Debug> fmt::Debug for Replay<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Replay")
            .field("now", &self.now())
            .field("records", &self.records())
            .field("stats", &self.stats())
            .field("app", &self.app)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
