//! The program's own events in the loop: timers, descriptors, and sockets that it has connected.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

#[cfg(doc)]
use super::Conn;
use super::{Control, Handler};
use crate::config::Connect;
use crate::detached::Detached;
use crate::error::Result;
use crate::id::{ConnId, TimerId, WatchId};

/// For what [`Control::watch`] watches a descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Interest {
    /// Input, or the end of input.
    Readable,
    /// Room for output.
    Writable,
    /// Both.
    Both,
}

/// A watched descriptor and its callback.
pub(crate) trait Watched<A> {
    fn fd(&self) -> BorrowedFd<'_>;
    fn call(&mut self, app: &mut A, control: &mut Control<'_, A>);
}

struct Watching<D, F> {
    descriptor: D,
    callback: F,
}

impl<A, D, F> Watched<A> for Watching<D, F>
where
    D: AsFd,
    F: FnMut(&mut A, &mut Control<'_, A>, &mut D),
{
    fn fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }

    fn call(&mut self, app: &mut A, control: &mut Control<'_, A>) {
        (self.callback)(app, control, &mut self.descriptor);
    }
}

impl<A> Control<'_, A> {
    /// Runs `job` once on the loop, `after` this time: a timer of the application, as distinct from
    /// a connection's ([`Conn::set_timer`]). With `Duration::MAX` it never runs.
    ///
    /// A job that sets its own timer again repeats; in a drain too, until the server ends. Timers
    /// that are set when the server ends are dropped. A panic in a job is caught, logged and
    /// counted.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use portcullis::{Config, Control, Server};
    /// struct Game { tick: u64 }
    ///
    /// /// Up to 60 steps a second: the next begins a frame after this one has ended.
    /// fn step(game: &mut Game, control: &mut Control<'_, Game>) {
    ///     game.tick += 1;
    ///     control.set_timer(Duration::from_secs(1) / 60, step);
    /// }
    ///
    /// # fn main() -> portcullis::Result<()> {
    /// let mut server = Server::new(Config::new())?;
    /// server.control().set_timer(Duration::ZERO, step);
    /// # server.control().stop();
    /// server.run(&mut Game { tick: 0 })?;
    /// # Ok(()) }
    /// ```
    pub fn set_timer(
        &mut self,
        after: Duration,
        job: impl FnOnce(&mut A, &mut Control<'_, A>) + 'static,
    ) -> TimerId {
        self.ops.set_timer(after, Box::new(job))
    }

    /// Cancels a timer, and drops its job. False if the job has run, or `id` names none.
    pub fn cancel_timer(&mut self, id: TimerId) -> bool {
        self.ops.cancel_timer(id)
    }

    /// Watches a descriptor of the application: a UDP socket, a pipe, a serial line, a `signalfd`,
    /// the descriptor of another library's loop. `callback` is called in the loop when it may have
    /// become ready, with the value that was given here.
    ///
    /// **Events are edges**: the next one comes only after more has happened. So make the
    /// descriptor non-blocking, and go on until it returns `WouldBlock`. To divide the work, watch
    /// an `Rc` of the descriptor, and give a clone to a timer that does the remainder. A call may
    /// be for nothing. To end the watch from `callback`, keep its id in the application's state. A
    /// panic of `callback` is caught, logged and counted; the descriptor is watched on. One that
    /// `callback` puts in its place is not watched: end this watch, and begin another.
    ///
    /// ```
    /// # use std::io;
    /// # use std::net::UdpSocket;
    /// # use portcullis::{Config, Interest, Server};
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// struct Game { datagrams: u64 }
    ///
    /// let mut server: Server<Game> = Server::new(Config::new())?;
    /// let udp = UdpSocket::bind("127.0.0.1:0")?;
    /// udp.set_nonblocking(true)?;
    /// server.control().watch(udp, Interest::Readable, |game, _control, udp| {
    ///     let mut datagram = [0; 1500];
    ///     while let Ok((_length, _from)) = udp.recv_from(&mut datagram) {
    ///         game.datagrams += 1;
    ///     }
    /// })?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::Os`](crate::Error::Os): the kernel cannot watch it (a regular file), or it is
    /// watched already. [`Error::Option`](crate::Error::Option) for more than 4,096 descriptors. It
    /// is dropped then.
    pub fn watch<D: AsFd + 'static>(
        &mut self,
        descriptor: D,
        interest: Interest,
        callback: impl FnMut(&mut A, &mut Control<'_, A>, &mut D) + 'static,
    ) -> Result<WatchId> {
        let watching = Watching {
            descriptor,
            callback,
        };
        self.ops.watch(interest, Box::new(watching))
    }

    /// Ends [`Control::watch`], and drops the descriptor. False if `id` names none any more.
    pub fn unwatch(&mut self, id: WatchId) -> bool {
        self.ops.unwatch(id)
    }

    /// Takes over a connected stream socket, TCP or Unix: one end of a `socketpair`, standard input
    /// under inetd, a descriptor that another process has sent (SCM_RIGHTS). From here on it is as
    /// an outgoing connection that has connected: under the cap, with the options of `options` that
    /// are not about connecting. [`Handler::on_open`] is called, with `Connect::tls` after the
    /// handshake as a client. To be the server of a handshake, call `Conn::start_tls` in `on_open`.
    ///
    /// The server makes the socket non-blocking. O_NONBLOCK belongs to the socket, and so to other
    /// processes that have it (`fcntl(2)`); if these clear it, the server does not block all the
    /// same.
    ///
    /// ```
    /// # use std::os::unix::net::UnixStream;
    /// # use portcullis::{Config, Connect, Context, Framing, Handler, Outcome, Server};
    /// # struct Echo;
    /// # impl Handler for Echo {
    /// #     fn on_frame(&mut self, cx: &mut Context<'_>, frame: &[u8]) -> Outcome {
    /// #         cx.conn.send(frame)?;
    /// #         Ok(())
    /// #     }
    /// # }
    /// # fn main() -> portcullis::Result<()> {
    /// # let mut server: Server = Server::new(Config::new())?;
    /// let (ours, theirs) = UnixStream::pair().map_err(portcullis::Error::other)?;
    /// let id = server.control().adopt(ours, Connect::new(Framing::Line), Echo)?;
    /// # let _ = (id, theirs); Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// - [`Error::Os`](crate::Error::Os): the descriptor is no connected stream socket of TCP or
    ///   Unix, or the kernel refuses an option.
    /// - [`Error::Option`](crate::Error::Option), [`Error::AtCapacity`](crate::Error::AtCapacity),
    ///   [`Error::Draining`](crate::Error::Draining).
    /// - [`Error::ConnState`](crate::Error::ConnState) if the maker of the framing panicked.
    ///
    /// After an error the socket is closed and the handler dropped.
    pub fn adopt(
        &mut self,
        socket: impl Into<OwnedFd>,
        options: Connect,
        handler: impl Handler<A> + 'static,
    ) -> Result<ConnId> {
        self.ops.adopt(socket.into(), options, Box::new(handler))
    }

    /// Takes a detached connection back into the loop, this server's or another's, TLS included: as
    /// [`Control::adopt`]. Bytes that were received and not read come first, and output that was
    /// not written goes out first. It has a new id. It counts for no limit of its former listener,
    /// and does not get that listener's options ([`Control::options`] returns them).
    ///
    /// The cap of its own server never refuses it, not even a cap that was lowered: it counts as
    /// before. The shards of [`Shards`](crate::Shards) have one cap, which refuses it in none of
    /// them.
    ///
    /// ```
    /// # use std::thread;
    /// # use portcullis::{Close, Connect, Context, Detached, Framing, Handle, Handler, Outcome};
    /// # struct App { handle: Handle<App> }
    /// # struct Session;
    /// # impl Handler<App> for Session {
    /// #     fn on_frame(&mut self, _: &mut Context<'_, App>, _: &[u8]) -> Outcome { Ok(()) }
    /// # }
    /// # fn check_password(_: &mut Detached) -> bool { true }
    /// /// The password is checked by code that blocks.
    /// struct Login;
    /// impl Handler<App> for Login {
    ///     fn on_open(&mut self, cx: &mut Context<'_, App>) -> Outcome {
    ///         let handle = cx.app.handle.clone();
    ///         cx.conn.detach(|mut client| drop(thread::spawn(move || {
    ///             if check_password(&mut client) {
    ///                 let _ = handle.post(|_, control| {
    ///                     let _ = control.attach(client, Connect::new(Framing::Line), Session);
    ///                 });
    ///             }
    ///         })))?;
    ///         Ok(())
    ///     }
    /// #   fn on_frame(&mut self, _: &mut Context<'_, App>, _: &[u8]) -> Outcome { Ok(()) }
    /// }
    /// ```
    ///
    /// # Errors
    ///
    /// Those of [`Control::adopt`]; [`Error::AtCapacity`](crate::Error::AtCapacity) in another
    /// server, or if the system grants no memory for a slot.
    /// [`Error::ConnState`](crate::Error::ConnState) if the connection was killed, its TLS session
    /// is over, or no descriptor is free. After an error the connection is closed, as after
    /// [`Control::adopt`].
    pub fn attach(
        &mut self,
        detached: Detached,
        options: Connect,
        handler: impl Handler<A> + 'static,
    ) -> Result<ConnId> {
        self.ops.attach(detached, options, Box::new(handler))
    }
}
