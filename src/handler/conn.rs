//! The connection that a callback is lent, and its operations.

use std::any::Any;
use std::fmt;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::time::Duration;

use super::{into_message, Control, ControlOps, Handler, Message};
use crate::addr::{Addr, Credentials};
use crate::config::Connect;
use crate::detached::Detached;
use crate::error::{Error, Result as ServerResult};
use crate::id::{ConnId, ListenerId};
use crate::proto::{
    Chunk, ConnConfig, FrameBuf, FrameError, Framer, Framing, Machine, Pool, ProxyHeader,
    SendError, State, Time, TimeLeft, Traffic,
};
use crate::reason::{Close, Closed};

/// The argument of each callback: the application's state and the connection. They are two fields,
/// so that both can be borrowed at once.
#[non_exhaustive]
pub struct Context<'a, A = ()> {
    /// The application's state, owned by the caller of [`Server::run`](crate::Server::run).
    pub app: &'a mut A,
    /// The connection of this callback.
    pub conn: Conn<'a, A>,
}

impl<'a, A> Context<'a, A> {
    pub(crate) fn new(app: &'a mut A, ops: &'a mut (dyn ControlOps<A> + 'a), id: ConnId) -> Self {
        Self {
            app,
            conn: Conn { ops, id },
        }
    }
}

impl<A> fmt::Debug for Context<'_, A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Context")
            .field("conn", &self.conn)
            .finish_non_exhaustive()
    }
}

/// Appends the payload of a frame.
pub(crate) type WriteFrame<'a> = dyn FnMut(&mut FrameBuf<'_>) -> Result<(), FrameError> + 'a;

/// The server's side of a [`Conn`]. Effects on sockets wait for the end of the connection's turn,
/// so that no callback is entered from inside another.
pub(crate) trait ConnOps<A> {
    fn machine(&mut self, id: ConnId) -> Option<(&mut Machine, &mut Pool)>;
    fn send(&mut self, id: ConnId, frame: &[u8]) -> Result<(), Box<SendError>>;
    fn send_chunks(&mut self, id: ConnId, payload: &mut [Chunk<'_>]) -> Result<(), Box<SendError>>;
    fn send_with(&mut self, id: ConnId, write: &mut WriteFrame<'_>) -> Result<(), Box<SendError>>;
    fn machine_ref(&self, id: ConnId) -> Option<&Machine>;
    /// Schedules a turn of the connection after an operation on it.
    fn touch(&mut self, id: ConnId);
    fn info(&self, id: ConnId) -> Option<ConnInfo>;
    fn local_addr(&self, id: ConnId) -> io::Result<Addr>;
    fn credentials(&self, id: ConnId) -> io::Result<Credentials>;
    fn fd(&self, id: ConnId) -> io::Result<BorrowedFd<'_>>;
    fn close_as(&mut self, id: ConnId, close: Close);
    fn notify(&mut self, id: ConnId, message: Message) -> Result<(), crate::HandleError>;
    fn replace_handler(&mut self, id: ConnId, handler: Box<dyn Handler<A>>);
    fn detach(&mut self, id: ConnId, receiver: Box<dyn FnOnce(Detached)>) -> crate::Result<()>;
    fn connect(
        &mut self,
        addr: Addr,
        options: Connect,
        handler: Box<dyn Handler<A>>,
    ) -> ServerResult<ConnId>;
    fn adopt(
        &mut self,
        socket: OwnedFd,
        options: Connect,
        handler: Box<dyn Handler<A>>,
    ) -> ServerResult<ConnId>;
    fn attach(
        &mut self,
        detached: Detached,
        options: Connect,
        handler: Box<dyn Handler<A>>,
    ) -> ServerResult<ConnId>;
    /// Reads the clock: durations that a callback passes count from the call, not from its turn.
    fn now(&mut self) -> Time;
}

/// One connection, as seen by its handler or another connection's.
///
/// No method blocks. [`Conn::send`] queues, and one write at the end of the turn flushes the queue.
pub struct Conn<'a, A = ()> {
    pub(super) ops: &'a mut (dyn ControlOps<A> + 'a),
    pub(super) id: ConnId,
}

impl<'a, A> Conn<'a, A> {
    pub(crate) fn find(ops: &'a mut (dyn ControlOps<A> + 'a), id: ConnId) -> Option<Self> {
        ops.machine_ref(id)?;
        Some(Self { ops, id })
    }

    /// Closes in order: flushes pending output, then sends close_notify over TLS, then FIN. No more
    /// frames are delivered, and input is discarded. The reason is
    /// [`Closed`](crate::CloseReason::Closed); after [`Handler::on_finish`]
    /// [`Finished`](crate::CloseReason::Finished), or else in a drain
    /// [`Drained`](crate::CloseReason::Drained).
    pub fn close(&mut self) {
        self.end(Close::new());
    }

    /// Closes as [`Conn::close`] once received bytes, those in the kernel's buffer too, are
    /// delivered and answered. Waits for [`Conn::release`] after each [`Conn::hold`], and for
    /// [`Handler::on_flushed`] after [`Conn::notify_flushed`].
    pub fn close_after_input(&mut self) {
        self.change(|machine, _, _| machine.close_after_input());
    }

    /// Announces a later answer, from another thread or on a timer. [`Conn::close_after_input`] and
    /// the defaults of [`Handler::on_finish`] and [`Handler::on_drain`] wait until
    /// [`Conn::release`] was called once for each hold. The idle timeout and a drain's deadline do
    /// not wait.
    ///
    /// ```
    /// # use std::sync::mpsc::Sender;
    /// # use portcullis::{ConnId, Context, Handler, Message, Outcome};
    /// struct Query { jobs: Sender<(ConnId, Vec<u8>)> }
    /// impl Handler for Query {
    ///     fn on_frame(&mut self, cx: &mut Context<'_>, frame: &[u8]) -> Outcome {
    ///         cx.conn.hold();
    ///         // A worker calls handle.notify(id, answer).
    ///         self.jobs.send((cx.conn.id(), frame.to_vec()))?;
    ///         Ok(())
    ///     }
    ///     fn on_message(&mut self, cx: &mut Context<'_>, answer: Message) -> Outcome {
    ///         if let Ok(answer) = answer.downcast::<String>() {
    ///             cx.conn.send(*answer)?;
    ///         }
    ///         cx.conn.release();
    ///         Ok(())
    ///     }
    /// }
    /// ```
    pub fn hold(&mut self) {
        self.change(|machine, _, _| machine.await_reply());
    }

    /// Ends one [`Conn::hold`], with or without an answer. Extra calls are ignored.
    pub fn release(&mut self) {
        self.change(|machine, _, _| machine.end_reply());
    }

    /// Gives this connection's handler a message, which needs no `Send`:
    /// [`Handler::on_message`]. It is delivered in the next iteration, in order, before a close
    /// that is asked for later; if the connection is not open yet, once it is. [`Conn::abort`],
    /// [`Conn::detach`], a kill, a panic or the peer's failure may come first. An undelivered
    /// message is dropped and counted in [`Stats::undeliverable`](crate::Stats::undeliverable).
    ///
    /// A [`Message`] that `on_message` passes on arrives as it is, not in another box.
    ///
    /// ```
    /// # use std::rc::Rc;
    /// # use portcullis::{ConnId, Context, Handler, Message, Outcome};
    /// struct Player { rival: ConnId }
    /// struct Moved(Rc<str>);
    /// impl Handler for Player {
    ///     fn on_frame(&mut self, cx: &mut Context<'_>, frame: &[u8]) -> Outcome {
    ///         let moved = Moved(String::from_utf8_lossy(frame).into());
    ///         if let Some(mut rival) = cx.conn.peer(self.rival) {
    ///             let _ = rival.notify(moved); // it may be leaving
    ///         }
    ///         Ok(())
    ///     }
    ///     fn on_message(&mut self, cx: &mut Context<'_>, message: Message) -> Outcome {
    ///         if let Ok(moved) = message.downcast::<Moved>() {
    ///             cx.conn.send(&*moved.0)?;
    ///         }
    ///         Ok(())
    ///     }
    /// }
    /// ```
    ///
    /// # Errors
    ///
    /// [`HandleError::NoConnection`](crate::HandleError::NoConnection) if the connection closes,
    /// leaves the loop or has gone.
    /// [`HandleError::QueueFull`](crate::HandleError::QueueFull) at the limits of
    /// [`Config::queue_limits`](crate::Config::queue_limits), which the undelivered messages of all
    /// connections share. The message is dropped.
    pub fn notify(&mut self, message: impl Any) -> Result<(), crate::HandleError> {
        self.ops.notify(self.id, into_message(message))
    }

    /// Ends this connection as if a callback of its own had returned `close`: with a cause, for its
    /// [`Handler::on_close`], the log and the recent closes, and with a label for the metrics
    /// ([`Close::labelled`]). Without effect once it closes.
    ///
    /// Messages of [`Conn::notify`] from before are delivered first, and their handler may answer
    /// them. No more frames are delivered, and [`Conn::send`] fails elsewhere.
    ///
    /// An orderly `close` flushes pending output first. A peer that does not read keeps its slot
    /// and output until the write timeout
    /// ([`ConnConfig::write_timeout`](crate::ConnConfig::write_timeout)). To end it sooner, lower
    /// that by [`Conn::reconfigure`] before this call.
    ///
    /// ```
    /// # use portcullis::{Close, ConnId, Context};
    /// /// An MQTT client has connected again: its older connection ends.
    /// fn take_over(cx: &mut Context<'_>, older: ConnId) {
    ///     if older == cx.conn.id() {
    ///         return; // it has logged in twice
    ///     }
    ///     if let Some(mut older) = cx.conn.peer(older) {
    ///         older.end(Close::because("the session was taken over").labelled("taken_over"));
    ///     }
    /// }
    /// ```
    pub fn end(&mut self, close: Close) {
        self.ops.close_as(self.id, close);
    }

    /// Closes at once with RST, as [`Aborted`](crate::CloseReason::Aborted). Pending output is
    /// lost. A Unix socket has no RST: its peer sees the end.
    pub fn abort(&mut self) {
        self.change(|machine, _, pool| {
            machine.reset(Closed::new(crate::CloseReason::Aborted), pool)
        });
    }

    /// Stops delivering frames, from the very next one on, and stops reading. The peer's idle and
    /// frame timeouts are paused.
    ///
    /// A peer that is gone is noticed all the same, unless input from before waits for the handler.
    /// After a reset, and after a Unix peer's close, the connection ends as
    /// [`Reset`](crate::CloseReason::Reset). A peer that has only finished may still read, so
    /// [`Handler::on_finish`](crate::Handler::on_finish) waits for [`Conn::resume`]; the idle
    /// timeout runs from there on.
    #[doc(alias = "backpressure")]
    pub fn pause(&mut self) {
        self.change(|machine, now, _| machine.pause(now));
    }

    /// Ends [`Conn::pause`]. Buffered frames are delivered without another read.
    pub fn resume(&mut self) {
        self.change(|machine, now, _| machine.resume(now));
    }

    /// Schedules one call of [`Handler::on_timer`] with `key`, `after` this time. Setting a key
    /// again moves its timer. Without effect before the connection is open and once it closes.
    pub fn set_timer(&mut self, key: u8, after: Duration) {
        self.change(|machine, now, _| machine.set_timer(key, now.after(after)));
    }

    /// Cancels the timer of `key`, if there is one.
    pub fn cancel_timer(&mut self, key: u8) {
        self.change(|machine, _, _| machine.set_timer(key, Time::NEVER));
    }

    /// Changes the framing, both ways, from the next frame on. Received bytes that are not
    /// delivered yet are cut in the new framing.
    ///
    /// The maximum frame stays, unless [`Conn::reconfigure`] changes it:
    /// [`ConnConfig::max_frame`](crate::ConnConfig::max_frame), or where that is `None`, the former
    /// framing's default. A maximum that is only the form of the former frames (raw, packet-1,
    /// packet-2, fixed) gives way to the new framing's default.
    ///
    /// A framing with parameters that [`Server::listen`](crate::Server::listen) would refuse closes
    /// the connection as [`BadFrame`](crate::CloseReason::BadFrame) at the next input. With a fixed
    /// length above the maximum frame, the reason is
    /// [`FrameTooLarge`](crate::CloseReason::FrameTooLarge).
    pub fn set_framing(&mut self, framing: &Framing) {
        let mut before = None;
        self.change(|machine, _, _| before = Some(machine.set_framing(framing)));
        // The last step: the destructor of a framer is foreign code.
        drop(before);
    }

    /// Returns the connection's own [`Framer`](crate::Framer), if it is an `F`. `None` for another
    /// framing.
    ///
    /// In [`Handler::on_frame`], the framer has just decoded this frame and nothing behind it. So
    /// what it has noted while parsing (a command's arguments, a message's type) need not be parsed
    /// again. Elsewhere its last input may have been an incomplete frame, of which its answer is kept:
    /// change there nothing that decides where the frame ends.
    ///
    /// ```
    /// use portcullis::{Context, Decoded, FrameBuf, FrameError, Framer, Handler, Outcome};
    ///
    /// /// A length of one byte, then a kind of one byte.
    /// struct Tagged { kind: u8 }
    /// impl Framer for Tagged {
    ///     fn decode(&mut self, input: &[u8]) -> Result<Decoded, FrameError> {
    ///         let [length, kind, ..] = *input else { return Ok(Decoded::More) };
    ///         let end = 2 + usize::from(length);
    ///         if input.len() < end {
    ///             return Ok(Decoded::Need(end));
    ///         }
    ///         self.kind = kind;
    ///         Ok(Decoded::Frame { payload: 2..end, consumed: end })
    ///     }
    ///     fn header(&mut self, length: usize, out: &mut FrameBuf<'_>) -> Result<(), FrameError> {
    ///         out.put(&[u8::try_from(length).map_err(FrameError::new)?, self.kind]);
    ///         Ok(())
    ///     }
    /// }
    /// struct Session;
    /// impl Handler for Session {
    ///     fn on_frame(&mut self, cx: &mut Context<'_>, frame: &[u8]) -> Outcome {
    ///         let kind = cx.conn.framer::<Tagged>().map(|framer| framer.kind);
    ///         if kind == Some(1) {
    ///             cx.conn.send(frame)?;
    ///         }
    ///         Ok(())
    ///     }
    /// }
    /// ```
    pub fn framer<F: Framer + 'static>(&mut self) -> Option<&mut F> {
        let (machine, _) = self.ops.machine(self.id)?;
        machine.framer()
    }

    /// Changes the options of this connection alone, while it is open. Examples: the keepalive time
    /// that an MQTT client has chosen, limits that depend on a login.
    ///
    /// The change applies at once, and takes about 200 bytes. A running timeout keeps its elapsed
    /// time, and a rate its used units. The timeouts of a handshake and of a linger apply to the
    /// next one.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use portcullis::{Context, Outcome};
    /// fn on_connect(cx: &mut Context<'_>, keepalive: u16) -> Outcome {
    ///     cx.conn.reconfigure(|conn| {
    ///         conn.idle_timeout = Duration::from_secs(u64::from(keepalive.max(1)) * 3 / 2);
    ///         conn.max_frame = Some(256 * 1024);
    ///     })?;
    ///     Ok(())
    /// }
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::Option`](crate::Error::Option) for values that no connection can work with, and
    /// [`Error::ConnState`](crate::Error::ConnState) if the connection is not open. Nothing has
    /// changed.
    #[doc(alias = "keepalive")]
    pub fn reconfigure(&mut self, change: impl FnOnce(&mut ConnConfig)) -> ServerResult<()> {
        let now = self.ops.now();
        let Some((machine, _)) = self.ops.machine(self.id) else {
            return Err(Error::ConnState("the connection has gone"));
        };
        let changed = machine.reconfigure(change, now);
        self.ops.touch(self.id);
        changed
    }

    /// Upgrades an open plain connection to TLS, as STARTTLS does (RFC 3207). Send the answer to
    /// the peer's command, then call this.
    ///
    /// Earlier output goes out in the clear, in front of the handshake. Later output is encrypted
    /// after the handshake, and never goes out in the clear. Bytes that the peer has sent behind
    /// its command count as the beginning of its handshake, undelivered frames of a paused
    /// connection included. Anything but a handshake fails it.
    ///
    /// During the handshake the connection is [`State::Handshaking`] and delivers no frame. A new
    /// [`ConnConfig::handshake_timeout`](crate::ConnConfig::handshake_timeout) replaces the idle
    /// and frame timeouts. Timers, messages, `on_writable` and `on_drain` go on, and a pause holds
    /// for the later frames. Then comes [`Handler::on_secured`], and the framing begins anew with
    /// the first byte: a [`Framer`](crate::Framer) is replaced by a new one. A failure closes the
    /// connection, with `on_close`, as [`TlsHandshake`](crate::CloseReason::TlsHandshake),
    /// [`NotTls`](crate::CloseReason::NotTls) or
    /// [`HandshakeTimeout`](crate::CloseReason::HandshakeTimeout). [`Conn::close`] does not wait
    /// for the handshake. Output that it should encrypt is lost then, and the reason is
    /// `TlsHandshake`; without such output the close keeps its own reason.
    ///
    /// Keep the configuration in the application's state, where a reload can replace it.
    ///
    /// ```
    /// use std::sync::Arc;
    /// use portcullis::tls::rustls::ServerConfig;
    /// use portcullis::{Context, Handler, Outcome};
    ///
    /// struct App { tls: Arc<ServerConfig> }
    /// struct Mail;
    /// impl Handler<App> for Mail {
    ///     fn on_frame(&mut self, cx: &mut Context<'_, App>, line: &[u8]) -> Outcome {
    ///         if line.eq_ignore_ascii_case(b"starttls\r\n") {
    ///             cx.conn.send("220 go ahead\r\n")?;
    ///             cx.conn.start_tls(Arc::clone(&cx.app.tls))?;
    ///         }
    ///         Ok(())
    ///     }
    /// }
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::ConnState`](crate::Error::ConnState): the connection speaks TLS already, or no
    /// handshake is possible any more. Nothing has changed.
    #[cfg(feature = "tls")]
    pub fn start_tls(&mut self, config: impl Into<crate::tls::TlsConfig>) -> crate::Result<()> {
        let now = self.ops.now();
        let Some((machine, pool)) = self.ops.machine(self.id) else {
            return Err(Error::no_handshake());
        };
        let started = machine.start_tls(&config.into(), now, pool);
        self.ops.touch(self.id);
        // The last step: the destructor of a framer is foreign code.
        started.map(drop)
    }

    /// Replaces the handler once the running callback has returned. The old one is dropped without
    /// `on_close`, and the new one gets no `on_open`: hand over what it needs. Timers and a pause
    /// stay, and later events reach the new handler. Of several calls in one callback the last
    /// counts. If that callback also ends the connection, by an error or a panic too, the new
    /// handler gets `on_close`. Without effect before the service has admitted the peer, and once
    /// the connection is detached.
    ///
    /// ```
    /// # use portcullis::{Context, Framing, Handler, Outcome};
    /// # struct Session { user: String }
    /// # impl Handler for Session {
    /// #     fn on_frame(&mut self, _: &mut Context<'_>, _: &[u8]) -> Outcome { Ok(()) }
    /// # }
    /// struct Login;
    /// impl Handler for Login {
    ///     fn on_frame(&mut self, cx: &mut Context<'_>, line: &[u8]) -> Outcome {
    ///         let user = std::str::from_utf8(line)?.trim().to_owned();
    ///         cx.conn.cancel_timer(0); // the login's
    ///         cx.conn.set_framing(&Framing::Packet4);
    ///         cx.conn.replace_handler(Session { user });
    ///         Ok(())
    ///     }
    /// }
    /// ```
    pub fn replace_handler(&mut self, handler: impl Handler<A> + 'static) {
        self.ops.replace_handler(self.id, Box::new(handler));
    }

    /// Takes the connection out of the loop, as a blocking stream for code that blocks. `to` gets
    /// the stream once the running callback has returned, and most often sends it to a thread.
    /// Pending output is written first; received bytes that were not delivered are read first.
    /// [`Handler::on_close`] is called with [`Detached`](crate::CloseReason::Detached). The
    /// connection keeps its slot until the stream is dropped: it counts for every limit on
    /// connections, and a drain waits for it until its deadline. Its buffers are the stream's, and
    /// not in [`Config::memory_limit`](crate::Config::memory_limit).
    ///
    /// ```
    /// # use std::io::{Read, Write};
    /// # use portcullis::{Context, Handler, Outcome};
    /// struct Upload;
    /// impl Handler for Upload {
    ///     fn on_frame(&mut self, cx: &mut Context<'_>, _name: &[u8]) -> Outcome {
    ///         cx.conn.detach(|mut stream| {
    ///             std::thread::spawn(move || -> std::io::Result<()> {
    ///                 let mut file = Vec::new();
    ///                 stream.read_to_end(&mut file)?; // blocks this thread alone
    ///                 stream.write_all(b"thanks")?;
    ///                 stream.finish()
    ///             });
    ///         })?;
    ///         Ok(())
    ///     }
    /// }
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::ConnState`](crate::Error::ConnState): the connection is detached already, closing
    /// or not open.
    pub fn detach(&mut self, to: impl FnOnce(Detached) + 'static) -> ServerResult<()> {
        self.ops.detach(self.id, Box::new(to))
    }

    /// Returns another connection of the same server, or this one; `None` if `id` names none any
    /// more.
    ///
    /// Mind the `?`: a slow peer of another connection ([`SendError::Full`]) is seldom a reason to
    /// close this one.
    #[doc(alias = "broadcast")]
    pub fn peer(&mut self, id: ConnId) -> Option<Conn<'_, A>> {
        Conn::find(&mut *self.ops, id)
    }

    /// Returns the controls of the server: list, connect, kill, change, drain. Effects on sockets
    /// and calls of other handlers wait until this callback has returned.
    ///
    /// ```
    /// # use portcullis::{Close, Closed, Connect, ConnId, Context, Framing, Handler, Outcome};
    /// /// Asks a server behind this one, and passes its answers on.
    /// struct Asks;
    /// impl Handler for Asks {
    ///     fn on_frame(&mut self, cx: &mut Context<'_>, question: &[u8]) -> Outcome {
    ///         let (asker, options) = (cx.conn.id(), Connect::new(Framing::Line));
    ///         let mut control = cx.conn.control();
    ///         let behind = control.connect("10.0.0.7:2222", options, Answers(asker))?;
    ///         if let Some(mut behind) = control.conn(behind) {
    ///             behind.send(question)?; // goes out when it is open
    ///         }
    ///         Ok(())
    ///     }
    /// }
    ///
    /// struct Answers(ConnId);
    /// impl Handler for Answers {
    ///     fn on_frame(&mut self, cx: &mut Context<'_>, answer: &[u8]) -> Outcome {
    ///         if let Some(mut asker) = cx.conn.peer(self.0) {
    ///             asker.send(answer)?;
    ///         }
    ///         Err(Close::new())
    ///     }
    ///     fn on_connect_failed(&mut self, cx: &mut Context<'_>, closed: &Closed) {
    ///         if let Some(mut asker) = cx.conn.peer(self.0) {
    ///             let _ = asker.send(format!("no answer: {closed}"));
    ///         }
    ///     }
    /// }
    /// ```
    pub fn control(&mut self) -> Control<'_, A> {
        Control::new(&mut *self.ops)
    }

    /// Returns this connection's id. For its reuse see [`ConnId`].
    pub fn id(&self) -> ConnId {
        self.id
    }

    /// Returns the client's address: the one behind a trusted proxy if its header named an internet
    /// address, else the peer's.
    pub fn source(&self) -> Addr {
        self.ops
            .info(self.id)
            .map_or_else(Addr::unspecified, |info| info.source)
    }

    /// Returns a trusted proxy's header about the client
    /// ([`Listen::proxy_protocol`](crate::Listen::proxy_protocol)). It has no TLVs, unless the
    /// service has kept [`Peer::proxy`](crate::Peer::proxy).
    pub fn proxy(&self) -> Option<&ProxyHeader> {
        self.ops.machine_ref(self.id)?.proxy().map(Rc::as_ref)
    }

    /// Returns state, addresses, age and traffic; `None` if the connection has gone. A handler's
    /// own connection is there in every callback.
    pub fn info(&self) -> Option<ConnInfo> {
        self.ops.info(self.id)
    }

    /// Returns the local address.
    ///
    /// # Errors
    ///
    /// `NotConnected` without a socket: in `on_close`, and between two attempts to connect.
    /// Otherwise the kernel's error, if the connection has been reset already.
    pub fn local_addr(&self) -> io::Result<Addr> {
        self.ops.local_addr(self.id)
    }

    /// Returns the process, user and group of a Unix socket's peer. A service gets them as
    /// [`Peer::credentials`](crate::Peer::credentials), and can refuse by them.
    ///
    /// ```
    /// # use portcullis::{try_accept, Context, Handler, Outcome, Peer, Refuse};
    /// # struct Echo;
    /// # impl Handler for Echo {
    /// #     fn on_frame(&mut self, cx: &mut Context<'_>, frame: &[u8]) -> Outcome {
    /// #         cx.conn.send(frame)?;
    /// #         Ok(())
    /// #     }
    /// # }
    /// let root_only = try_accept(|_app: &mut (), peer: Peer| match peer.credentials {
    ///     Some(credentials) if credentials.uid == 0 => Ok(Echo),
    ///     _ => Err(Refuse::silently()),
    /// });
    /// # let _ = root_only;
    /// ```
    ///
    /// # Errors
    ///
    /// `Unsupported` over TCP, and on systems other than Linux, Android, FreeBSD, DragonFly and
    /// Apple's. `NotConnected` without a socket. Otherwise the kernel's error.
    pub fn credentials(&self) -> io::Result<Credentials> {
        self.ops.credentials(self.id)
    }

    /// Returns the socket's descriptor, for options that [`SocketOptions`](crate::SocketOptions)
    /// does not have.
    ///
    /// Only set and read options. Bytes that are read or written here are missing in the stream,
    /// and a blocking socket stops the server.
    ///
    /// # Errors
    ///
    /// `Unsupported` in the simulator, `NotConnected` without a socket.
    #[doc(alias = "setsockopt")]
    pub fn fd(&self) -> io::Result<BorrowedFd<'_>> {
        self.ops.fd(self.id)
    }

    /// Returns the connection's state.
    pub fn state(&self) -> State {
        self.ops
            .machine_ref(self.id)
            .map_or(State::Closing, Machine::state)
    }

    /// Number of bytes of pending output.
    pub fn queued(&self) -> usize {
        self.ops.machine_ref(self.id).map_or(0, Machine::queued)
    }

    /// Returns the options of this connection: those of its [`Listen`](crate::Listen) or
    /// [`Connect`], with the changes of [`Conn::reconfigure`]. `None` once the connection has gone.
    pub fn config(&self) -> Option<&ConnConfig> {
        self.ops.machine_ref(self.id).map(Machine::config)
    }

    /// Returns the maximum length of a received payload, in bytes. Without meaning for
    /// [`Framing::Raw`].
    pub fn max_frame(&self) -> usize {
        self.ops.machine_ref(self.id).map_or(0, Machine::max_frame)
    }

    /// Returns whether the server drains.
    pub fn is_draining(&self) -> bool {
        self.ops
            .machine_ref(self.id)
            .is_some_and(Machine::is_draining)
    }

    /// Returns the result of the TLS handshake: SNI, ALPN, client certificates. `None` on a plain
    /// connection, and during the handshake.
    #[cfg(feature = "tls")]
    pub fn tls(&self) -> Option<crate::tls::TlsInfo<'_>> {
        self.ops.machine_ref(self.id)?.tls()
    }

    pub(super) fn change(&mut self, change: impl FnOnce(&mut Machine, Time, &mut Pool)) {
        let now = self.ops.now();
        if let Some((machine, pool)) = self.ops.machine(self.id) {
            change(machine, now, pool);
            self.ops.touch(self.id);
        }
    }
}

impl<A> fmt::Debug for Conn<'_, A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Conn")
            .field("id", &self.id)
            .field("state", &self.state())
            .finish_non_exhaustive()
    }
}

/// One connection at one moment.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ConnInfo {
    /// The connection's id.
    pub id: ConnId,
    /// Its listener; `None` for an outgoing connection
    /// ([`Control::connect`](crate::Control::connect)).
    pub listener: Option<ListenerId>,
    /// The peer's address.
    pub peer: Addr,
    /// The address behind a trusted proxy if its header named an internet address, else the peer's.
    pub source: Addr,
    /// Its state.
    pub state: State,
    /// Time since accept; for an outgoing connection since it was requested.
    pub age: Duration,
    /// Time since the last byte from the peer, or since accept; for an outgoing connection since it
    /// was connected. If input began callbacks that worked for 5 ms or longer, since their end.
    pub idle: Duration,
    /// Its bytes and frames.
    pub traffic: Traffic,
    /// Number of bytes of pending output.
    pub queued: usize,
    /// Bytes in its buffers in both directions, [`ConnInfo::queued`] included.
    pub buffered: usize,
    /// Its handler has paused it ([`Conn::pause`]).
    pub paused: bool,
    /// Pending output has reached the high watermark, and not fallen to the low one since. The
    /// connection is not read meanwhile, except with
    /// [`ConnConfig::full_duplex`](crate::ConnConfig::full_duplex).
    pub congested: bool,
    /// It is not read because a rate is used up
    /// ([`ConnConfig::read_rate`](crate::ConnConfig::read_rate) and its like).
    pub throttled: bool,
    /// It is not read because memory is tight and its buffers exceed its share
    /// ([`Config::memory_limit`](crate::Config::memory_limit)).
    pub paused_for_memory: bool,
    pub(crate) time_left: TimeLeft,
}

impl ConnInfo {
    /// Returns the deadlines that run, and the time left until each; zero if it expires in the next
    /// turn.
    ///
    /// - `connect timeout`: until the attempt to connect fails ([`Connect::connect_timeout`]), or
    ///   until the next one begins ([`Connect::retry`]).
    /// - `handshake timeout`: until it must be open
    ///   ([`ConnConfig::handshake_timeout`](crate::ConnConfig::handshake_timeout)).
    /// - `frame timeout`: until more of the incomplete frame must have arrived
    ///   ([`ConnConfig::frame_timeout`](crate::ConnConfig::frame_timeout)).
    /// - `idle timeout`: until the peer must have sent a byte
    ///   ([`ConnConfig::idle_timeout`](crate::ConnConfig::idle_timeout)).
    /// - `write timeout`: until the peer must have taken more of the pending output
    ///   ([`ConnConfig::write_timeout`](crate::ConnConfig::write_timeout)).
    /// - `linger timeout`: until the socket is closed without the peer's FIN
    ///   ([`ConnConfig::linger_timeout`](crate::ConnConfig::linger_timeout)).
    /// - `reading again`: until reading resumes after a pause by a rate
    ///   ([`ConnConfig::read_rate`](crate::ConnConfig::read_rate) and the other rates).
    /// - `timer`: until the first of the handler's timers ([`Conn::set_timer`]).
    pub fn time_left(&self) -> impl Iterator<Item = (&'static str, Duration)> + use<> {
        self.time_left.iter()
    }
}

impl fmt::Display for ConnInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "connection {} ", self.id)?;
        match self.listener {
            Some(listener) => write!(f, "of {listener} from {}", self.peer)?,
            None => write!(f, "to {}", self.peer)?,
        }
        write!(
            f,
            ": {}, age {:.1?}, idle {:.1?}, {} bytes and {} frames in, {} bytes and {} frames \
             out, {} queued",
            self.state,
            self.age,
            self.idle,
            self.traffic.bytes_in,
            self.traffic.frames_in,
            self.traffic.bytes_out,
            self.traffic.frames_out,
            self.queued
        )
    }
}
