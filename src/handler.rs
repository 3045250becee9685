//! What the user writes, [`Handler`] and [`Service`], and what each call is lent: [`Context`],
//! [`Conn`], [`Peer`].

mod conn;
mod control;
mod outgoing;
mod own_events;
mod sending;

use std::any::Any;
use std::io;
use std::rc::Rc;

use crate::addr::{Addr, Credentials};
use crate::id::{ConnId, ListenerId};
use crate::proto::ProxyHeader;
use crate::reason::{Closed, Outcome};
pub use conn::{Conn, ConnInfo, Context};
pub(crate) use conn::{ConnOps, WriteFrame};
pub use control::Control;
pub(crate) use control::{AlarmCallback, ControlOps, LocalJob};
pub use own_events::Interest;
pub(crate) use own_events::Watched;
pub(crate) use sending::broadcast;
pub use sending::Broadcast;

/// A message of [`Handle::notify`](crate::Handle::notify) or [`Conn::notify`] to a connection's
/// handler: see [`Handler::on_message`].
pub type Message = Box<dyn Any>;

/// Makes a message, unless it is one already, which is passed on as it is.
fn into_message(message: impl Any) -> Message {
    let message: Message = Box::new(message);
    match message.downcast::<Message>() {
        Ok(passed_on) => *passed_on,
        Err(message) => message,
    }
}

/// One connection's protocol: the reactions to its frames and events.
///
/// `A` is the application's state, owned by the caller of [`Server::run`](crate::Server::run) and
/// lent to every callback. All callbacks run on the loop's thread, one at a time; none is ever
/// called from inside another. A callback that blocks makes every connection wait.
///
/// A panic in a callback ends its connection alone. The panic is caught and reported, and the
/// connection closes as [`Panicked`](crate::CloseReason::Panicked). Built with `panic = "abort"`, a
/// panic ends the process.
///
/// ```
/// use portcullis::{Context, Handler, Outcome};
///
/// /// Counts the frames of all connections, and answers each with the count.
/// struct Counter;
/// impl Handler<u64> for Counter {
///     fn on_frame(&mut self, cx: &mut Context<'_, u64>, _frame: &[u8]) -> Outcome {
///         *cx.app += 1;
///         cx.conn.send(cx.app.to_string().as_bytes())?;
///         Ok(())
///     }
/// }
/// ```
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a handler for an application of type `{A}`",
    label = "not a handler",
    note = "implement `Handler<{A}>` for it; a closure that may refuse, and returns \
            `Result<_, Refuse>`, goes through `try_accept`"
)]
pub trait Handler<A = ()> {
    /// Called once the connection is open (over TLS after the handshake), before every other
    /// callback.
    #[allow(unused_variables)]
    fn on_open(&mut self, cx: &mut Context<'_, A>) -> Outcome {
        Ok(())
    }

    /// Called after the handshake of `Conn::start_tls`, before any frame that came through TLS.
    /// `Conn::tls` has the result. A handshake that fails closes the connection instead.
    ///
    /// Forget everything that was received in the clear. An attacker may have sent or changed it
    /// (RFC 3207 section 4.2).
    #[allow(unused_variables)]
    fn on_secured(&mut self, cx: &mut Context<'_, A>) -> Outcome {
        Ok(())
    }

    /// Called for each whole frame with its payload, without header. Raw connections get bytes in
    /// pieces of any size.
    fn on_frame(&mut self, cx: &mut Context<'_, A>, frame: &[u8]) -> Outcome;

    /// Called when no frame can be made of the input, for last words before the close: a protocol's
    /// error reply. `closed.reason` is [`FrameTooLarge`](crate::CloseReason::FrameTooLarge) for a
    /// frame or line above the maximum, or [`BadFrame`](crate::CloseReason::BadFrame) with the
    /// framer's error in [`Closed::error`]. The default sends nothing.
    ///
    /// Frames before the bad input are delivered first, and no frame follows. Then the connection
    /// closes in order, behind what is sent here. It keeps that reason, whatever this callback does
    /// or returns; only a reset that loses output becomes the reason. Not called for a TLS
    /// ClientHello on a plain port ([`UnexpectedTls`](crate::CloseReason::UnexpectedTls)).
    ///
    /// ```
    /// use portcullis::{Closed, CloseReason, Context, Framing, Handler, Listen, Outcome};
    ///
    /// /// RFC 5321 section 4.5.3.1: a command line has at most 512 octets.
    /// struct Smtp;
    /// impl Handler for Smtp {
    ///     fn on_frame(&mut self, cx: &mut Context<'_>, _line: &[u8]) -> Outcome {
    ///         cx.conn.send("250 OK\r\n")?;
    ///         Ok(())
    ///     }
    ///     fn on_bad_input(&mut self, cx: &mut Context<'_>, closed: &Closed) -> Outcome {
    ///         if closed.reason == CloseReason::FrameTooLarge {
    ///             cx.conn.send("500 Line too long.\r\n")?;
    ///         }
    ///         Ok(())
    ///     }
    /// }
    /// let mut listen = Listen::tcp("127.0.0.1:0", Framing::Line);
    /// listen.conn.max_frame = Some(512);
    /// ```
    #[doc(alias = "last words")]
    #[doc(alias = "protocol error")]
    #[allow(unused_variables)]
    fn on_bad_input(&mut self, cx: &mut Context<'_, A>, closed: &Closed) -> Outcome {
        Ok(())
    }

    /// Called when the peer finished sending (FIN, or close_notify over TLS) at the end of a frame.
    /// The peer may still read. The default closes once received frames are answered and pending
    /// output is flushed. Not called for a peer that finishes inside a frame.
    ///
    /// **If you answer later** (from another thread, on a timer), call [`Conn::hold`], or override
    /// this. Otherwise the default closes before your answer. A handler that does not close may go
    /// on sending, until the idle timeout at the latest. Over TLS 1.2 the connection closes after
    /// this call in any case (RFC 5246 section 7.2.1), once messages from before it was open have
    /// been delivered.
    fn on_finish(&mut self, cx: &mut Context<'_, A>) -> Outcome {
        cx.conn.close_after_input();
        Ok(())
    }

    /// Called when pending output has fallen to the low watermark, after it had reached the high
    /// one.
    #[doc(alias = "backpressure")]
    #[allow(unused_variables)]
    fn on_writable(&mut self, cx: &mut Context<'_, A>) -> Outcome {
        Ok(())
    }

    /// Called once, after [`Conn::notify_flushed`], when all that was sent before the call has left
    /// to the kernel.
    #[allow(unused_variables)]
    fn on_flushed(&mut self, cx: &mut Context<'_, A>) -> Outcome {
        Ok(())
    }

    /// Called when a timer of [`Conn::set_timer`] is due.
    #[allow(unused_variables)]
    fn on_timer(&mut self, cx: &mut Context<'_, A>, key: u8) -> Outcome {
        Ok(())
    }

    /// Called with each message of [`Handle::notify`](crate::Handle::notify) and [`Conn::notify`].
    /// The default ignores it.
    ///
    /// ```
    /// # use portcullis::{Context, Handler, Message, Outcome};
    /// # struct Worker;
    /// # impl Handler for Worker {
    /// #     fn on_frame(&mut self, _: &mut Context<'_>, _: &[u8]) -> Outcome { Ok(()) }
    /// fn on_message(&mut self, cx: &mut Context<'_>, message: Message) -> Outcome {
    ///     // The other thread said: handle.notify(id, String::from("done"))
    ///     if let Ok(answer) = message.downcast::<String>() {
    ///         cx.conn.send(*answer)?;
    ///     }
    ///     Ok(())
    /// }
    /// # }
    /// ```
    #[allow(unused_variables)]
    fn on_message(&mut self, cx: &mut Context<'_, A>, message: Message) -> Outcome {
        Ok(())
    }

    /// Called when the server drains, to say goodbye. The default answers received frames and
    /// closes in order ([`Conn::close_after_input`]). A handler that does not close is served until
    /// the drain's deadline, then its connection is reset. If you answer later, use [`Conn::hold`],
    /// or override this and close after the last answer.
    #[doc(alias = "graceful shutdown")]
    fn on_drain(&mut self, cx: &mut Context<'_, A>) -> Outcome {
        cx.conn.close_after_input();
        Ok(())
    }

    /// Called once the connection is gone: exactly once for each `on_open`, after every other
    /// callback. A server that is dropped calls nothing.
    ///
    /// An orderly close may take a while, up to the bound in
    /// [`ConnConfig::write_timeout`](crate::ConnConfig::write_timeout). If you need to know at once
    /// that a client has left, note it where you close.
    ///
    /// The slot of the connection is free already. At the cap, [`Control::connect`] may begin one
    /// connection here, before a client of the backlog gets the slot. The exception is an evicted
    /// connection ([`CloseReason::Evicted`](crate::CloseReason::Evicted)), whose slot is the
    /// newcomer's.
    #[allow(unused_variables)]
    fn on_close(&mut self, cx: &mut Context<'_, A>, closed: &Closed) {}

    /// Called once an outgoing connection ([`Control::connect`]) has ended before it was open,
    /// instead of `on_open` and `on_close`. It could not connect, with all attempts of a
    /// [`Connect::retry`](crate::Connect::retry), or its TLS handshake failed, or it was closed or
    /// killed, or the server drains. Frames sent to it are lost. An accepted connection is reported
    /// to [`Service::on_failed_accept`] instead.
    ///
    /// [`CloseReason::ConnectFailed`](crate::CloseReason::ConnectFailed) has the kernel's error in
    /// [`Closed::error`](crate::Closed::error). Reconnect by hand only after a delay, as from a
    /// timer of another connection: an address that refuses would keep the loop busy.
    #[allow(unused_variables)]
    fn on_connect_failed(&mut self, cx: &mut Context<'_, A>, closed: &Closed) {}
}

impl<A, H: Handler<A> + ?Sized> Handler<A> for Box<H> {
    fn on_open(&mut self, cx: &mut Context<'_, A>) -> Outcome {
        (**self).on_open(cx)
    }

    fn on_secured(&mut self, cx: &mut Context<'_, A>) -> Outcome {
        (**self).on_secured(cx)
    }

    fn on_frame(&mut self, cx: &mut Context<'_, A>, frame: &[u8]) -> Outcome {
        (**self).on_frame(cx, frame)
    }

    fn on_bad_input(&mut self, cx: &mut Context<'_, A>, closed: &Closed) -> Outcome {
        (**self).on_bad_input(cx, closed)
    }

    fn on_finish(&mut self, cx: &mut Context<'_, A>) -> Outcome {
        (**self).on_finish(cx)
    }

    fn on_writable(&mut self, cx: &mut Context<'_, A>) -> Outcome {
        (**self).on_writable(cx)
    }

    fn on_flushed(&mut self, cx: &mut Context<'_, A>) -> Outcome {
        (**self).on_flushed(cx)
    }

    fn on_timer(&mut self, cx: &mut Context<'_, A>, key: u8) -> Outcome {
        (**self).on_timer(cx, key)
    }

    fn on_message(&mut self, cx: &mut Context<'_, A>, message: Message) -> Outcome {
        (**self).on_message(cx, message)
    }

    fn on_drain(&mut self, cx: &mut Context<'_, A>) -> Outcome {
        (**self).on_drain(cx)
    }

    fn on_close(&mut self, cx: &mut Context<'_, A>, closed: &Closed) {
        (**self).on_close(cx, closed);
    }

    fn on_connect_failed(&mut self, cx: &mut Context<'_, A>, closed: &Closed) {
        (**self).on_connect_failed(cx, closed);
    }
}

/// Makes a [`Handler`] for each peer of one listener, or refuses the peer.
///
/// A closure `FnMut(&mut A, Peer) -> impl Handler<A>` is a service that refuses no peer;
/// [`try_accept`] makes a service of a closure that may refuse.
#[diagnostic::on_unimplemented(
    message = "`{Self}` does not make handlers for an application of type `{A}`",
    label = "not a service",
    note = "pass a closure that makes a handler, with the type of its first parameter written: \
            `|_app: &mut {A}, _peer| MyHandler`"
)]
pub trait Service<A = ()> {
    /// Called for each peer that no rule or limit refuses: before TLS, so that a refusal is cheap,
    /// and after a PROXY header.
    ///
    /// # Errors
    ///
    /// [`Refuse`] closes the connection as [`Refused`](crate::CloseReason::Refused).
    fn accept(&mut self, app: &mut A, peer: Peer) -> Result<Box<dyn Handler<A>>, Refuse>;

    /// Called for an accepted connection that ended before it was open: denied, refused, a failed
    /// or late handshake, a reset. Its handler, if it had one, was dropped without a call.
    #[allow(unused_variables)]
    fn on_failed_accept(&mut self, app: &mut A, peer: &Peer, closed: &Closed) {}

    /// Called when the server has closed a listener because another process shut its socket down.
    /// Its connections stay open.
    #[allow(unused_variables)]
    fn on_listener_lost(&mut self, app: &mut A, listener: ListenerId, error: &io::Error) {}
}

impl<A, H, F> Service<A> for F
where
    F: FnMut(&mut A, Peer) -> H,
    H: Handler<A> + 'static,
{
    fn accept(&mut self, app: &mut A, peer: Peer) -> Result<Box<dyn Handler<A>>, Refuse> {
        Ok(Box::new(self(app, peer)))
    }
}

/// A service that is chosen at run time.
impl<A> Service<A> for Box<dyn Service<A>> {
    fn accept(&mut self, app: &mut A, peer: Peer) -> Result<Box<dyn Handler<A>>, Refuse> {
        (**self).accept(app, peer)
    }

    fn on_failed_accept(&mut self, app: &mut A, peer: &Peer, closed: &Closed) {
        (**self).on_failed_accept(app, peer, closed);
    }

    fn on_listener_lost(&mut self, app: &mut A, listener: ListenerId, error: &io::Error) {
        (**self).on_listener_lost(app, listener, error);
    }
}

/// Makes a [`Service`] of a closure that may refuse.
///
/// ```
/// use portcullis::{try_accept, Context, Handler, Outcome, Peer, Refuse};
/// # struct Echo;
/// # impl Handler for Echo {
/// #     fn on_frame(&mut self, cx: &mut Context<'_>, frame: &[u8]) -> Outcome {
/// #         cx.conn.send(frame)?;
/// #         Ok(())
/// #     }
/// # }
/// let loopback_only = try_accept(|_app: &mut (), peer: Peer| {
///     // Canonical: on a dual-stack listener IPv4 peers show as ::ffff:a.b.c.d.
///     match peer.addr.ip() {
///         Some(ip) if ip.to_canonical().is_loopback() => Ok(Echo),
///         _ => Err(Refuse::silently()),
///     }
/// });
/// # let _ = loopback_only;
/// ```
#[must_use]
pub fn try_accept<A, H, F>(accept: F) -> impl Service<A>
where
    F: FnMut(&mut A, Peer) -> Result<H, Refuse>,
    H: Handler<A> + 'static,
{
    TryAccept(accept)
}

struct TryAccept<F>(F);

impl<A, H, F> Service<A> for TryAccept<F>
where
    F: FnMut(&mut A, Peer) -> Result<H, Refuse>,
    H: Handler<A> + 'static,
{
    fn accept(&mut self, app: &mut A, peer: Peer) -> Result<Box<dyn Handler<A>>, Refuse> {
        Ok(Box::new((self.0)(app, peer)?))
    }
}

/// A service's refusal of a peer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[must_use]
pub struct Refuse {
    pub(crate) farewell: Vec<u8>,
}

impl Refuse {
    /// Closes without a farewell.
    pub fn silently() -> Self {
        Self::default()
    }

    /// Sends these bytes, unframed and in the clear, then closes. Without a PROXY header, bytes
    /// that the socket does not take at once are lost.
    pub fn with_farewell(farewell: impl Into<Vec<u8>>) -> Self {
        Self {
            farewell: farewell.into(),
        }
    }
}

/// A peer that has connected, and its listener.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Peer {
    /// The connection's id; `None` if the peer was denied, over a cap or an accept rate, or gone
    /// early. In [`Service::accept`] a [`Handle`](crate::Handle) knows the id already: frames and
    /// messages wait until the connection is open.
    pub id: Option<ConnId>,
    /// The peer's address.
    pub addr: Addr,
    /// On a Unix socket, the peer's process, user and group, if the system reports them.
    pub credentials: Option<Credentials>,
    /// The listener that accepted the peer.
    pub listener: ListenerId,
    /// That listener's name.
    pub listener_name: Rc<str>,
    /// A trusted proxy's header about the client
    /// ([`Listen::proxy_protocol`](crate::Listen::proxy_protocol)).
    ///
    /// The header is complete in [`Service::accept`]. Afterwards the connection keeps its
    /// addresses. The TLVs, up to 16 KiB, are dropped unless the service keeps a clone of this
    /// `Rc`, for example in the handler.
    pub proxy: Option<Rc<ProxyHeader>>,
}

impl Peer {
    /// Returns the client's address: the one behind the proxy if its header named an internet
    /// address, else the peer's.
    pub fn source(&self) -> Addr {
        let told = self.proxy.as_ref().and_then(|header| header.tcp_source());
        told.map_or_else(|| self.addr.clone(), Addr::from)
    }
}

#[cfg(all(test, feature = "sim"))]
mod tests;
