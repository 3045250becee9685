//! What can be asked of a running server between two callbacks.

use std::fmt;
use std::net::SocketAddr;
use std::time::Duration;

use crate::error::Result;
use crate::handler::{Conn, ConnInfo, Link};
use crate::id::{ConnId, ListenerId, ListenerRef};
use crate::stats::{DrainReport, Stats};

/// Why a listener takes clients, or takes none, now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ListenerState {
    /// It is in the poll and accepts.
    Listening,
    /// The cap is reached; it is out of the poll until a place is free.
    Full,
    /// Descriptors or socket memory ran out; it is out of the poll for the interval, or until one of ours closes.
    Starved,
    /// It was suspended; clients wait in its backlog.
    Suspended,
    /// Its port is closed.
    Closed,
}

/// One listener at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ListenerInfo {
    /// Its id.
    pub id: ListenerId,
    /// Its name.
    pub name: String,
    /// Where it listens, with the real port.
    pub addr: SocketAddr,
    /// Whether it takes clients.
    pub state: ListenerState,
    /// Its connections now, in any state.
    pub connections: usize,
    /// The most it may have: its own limit or the server's cap, whichever is smaller.
    pub max_connections: usize,
    /// Connections it has accepted.
    pub accepted: u64,
}

/// What the reactor lets be asked of it.
pub(crate) trait Desk<A>: Link<A> {
    fn listeners(&self) -> Vec<ListenerInfo>;
    fn listener(&self, which: &ListenerRef) -> Result<ListenerInfo>;
    fn connections(&self) -> Vec<ConnInfo>;
    fn kill(&mut self, id: ConnId) -> bool;
    fn set_max_connections(&mut self, connections: usize) -> Result<()>;
    fn set_suspended(&mut self, which: &ListenerRef, suspended: bool) -> Result<()>;
    fn close_listener(&mut self, which: &ListenerRef) -> Result<()>;
    fn stats(&self) -> Stats;
    fn drain(&mut self, grace: Duration);
    fn drain_report(&self) -> Option<DrainReport>;
    fn stop(&mut self);
}

/// A server between two turns: from [`Server::control`](crate::Server::control), or lent to a job that was sent with
/// [`Handle::post`](crate::Handle::post).
pub struct Control<'a, A = ()> {
    desk: &'a mut (dyn Desk<A> + 'a),
}

impl<'a, A> Control<'a, A> {
    pub(crate) fn new(desk: &'a mut (dyn Desk<A> + 'a)) -> Self {
        Self { desk }
    }

    /// One connection, to send to it, change it or close it; `None` if it has gone.
    pub fn conn(&mut self, id: ConnId) -> Option<Conn<'_, A>>
    where
        A: 'a,
    {
        let link: &mut dyn Link<A> = &mut *self.desk;
        Conn::find(link, id)
    }

    /// All listeners that have not been closed, oldest first.
    pub fn listeners(&self) -> Vec<ListenerInfo> {
        self.desk.listeners()
    }

    /// One listener, by id, port or name.
    ///
    /// # Errors
    ///
    /// [`Error::NoListener`](crate::Error::NoListener).
    pub fn listener(&self, which: impl Into<ListenerRef>) -> Result<ListenerInfo> {
        self.desk.listener(&which.into())
    }

    /// All connections, in the order of their slots.
    pub fn connections(&self) -> Vec<ConnInfo> {
        self.desk.connections()
    }

    /// Ends one connection at once with RST, and logs a report. [`CloseReason::Killed`](crate::CloseReason::Killed).
    /// False if it has gone already.
    pub fn kill(&mut self, id: ConnId) -> bool {
        self.desk.kill(id)
    }

    /// Changes the cap. Lowered below what is open, the open ones stay and no new ones come; raised, waiting
    /// clients are accepted at once. 0 admits nobody.
    ///
    /// # Errors
    ///
    /// [`Error::Option`](crate::Error::Option) for more than 16 million; the cap is as it was.
    pub fn set_max_connections(&mut self, connections: usize) -> Result<()> {
        self.desk.set_max_connections(connections)
    }

    /// Takes a listener out of the poll. Its connections live on, new clients wait in its backlog. Again is no error.
    ///
    /// # Errors
    ///
    /// [`Error::NoListener`](crate::Error::NoListener).
    pub fn suspend(&mut self, which: impl Into<ListenerRef>) -> Result<()> {
        self.desk.set_suspended(&which.into(), true)
    }

    /// Accepts again after [`Control::suspend`], those who waited first. Again is no error.
    ///
    /// # Errors
    ///
    /// [`Error::NoListener`](crate::Error::NoListener).
    pub fn resume(&mut self, which: impl Into<ListenerRef>) -> Result<()> {
        self.desk.set_suspended(&which.into(), false)
    }

    /// Closes a listener's port. Clients that wait in its backlog are reset by the kernel, its connections live on.
    ///
    /// # Errors
    ///
    /// [`Error::NoListener`](crate::Error::NoListener).
    pub fn close_listener(&mut self, which: impl Into<ListenerRef>) -> Result<()> {
        self.desk.close_listener(&which.into())
    }

    /// The counters.
    pub fn stats(&self) -> Stats {
        self.desk.stats()
    }

    /// Ends in order: accepts who waits already, closes the ports, tells each handler
    /// ([`Handler::on_drain`](crate::Handler::on_drain)), and resets whoever is left after `grace`. One deadline for all;
    /// a second call can only bring it forward.
    pub fn drain(&mut self, grace: Duration) {
        self.desk.drain(grace);
    }

    /// How the drain went, once it is over.
    pub fn drain_report(&self) -> Option<DrainReport> {
        self.desk.drain_report()
    }

    /// Ends [`Server::run`](crate::Server::run) after this turn and leaves everything as it is.
    pub fn stop(&mut self) {
        self.desk.stop();
    }
}

impl<A> fmt::Debug for Control<'_, A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Control").finish_non_exhaustive()
    }
}
