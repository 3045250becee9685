//! What the user writes: [`Handler`], [`Service`]; and what they are given: [`Context`], [`Conn`], [`Peer`].

mod conn;
mod outgoing;

use std::any::Any;
use std::io;
use std::rc::Rc;

use crate::addr::{Addr, Credentials};
use crate::id::{ConnId, ListenerId};
use crate::proto::ProxyHeader;
use crate::reason::{Closed, Outcome};
pub(crate) use conn::ConnOps;
pub use conn::{Conn, ConnInfo, Context};
pub(crate) use outgoing::connect;

/// What a [`Handle`](crate::Handle) sends to a connection: see [`Handler::on_message`].
pub type Message = Box<dyn Any + Send>;

/// One connection's protocol: what to do with its frames.
///
/// `A` is the application's state, owned by the caller of [`Server::run`](crate::Server::run) and lent to every callback.
/// All callbacks run on the loop's thread, one at a time; none is ever called from inside another.
/// One that blocks makes every connection wait.
///
/// A panic in a callback is a crash of its connection alone: it is caught, reported, and the connection closes as
/// [`Panicked`](crate::CloseReason::Panicked). (Built with `panic = "abort"` there is nothing to catch.)
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
    note = "implement `Handler<{A}>` for it; a closure that may refuse, and returns `Result<_, Refuse>`, goes through `try_accept`"
)]
pub trait Handler<A = ()> {
    /// The connection is open; over TLS the handshake is done. Called once, before everything else.
    #[allow(unused_variables)]
    fn on_open(&mut self, cx: &mut Context<'_, A>) -> Outcome {
        Ok(())
    }

    /// The handshake that `Conn::start_tls` began is over: `Conn::tls` tells what it agreed on. Called once, before any frame
    /// that came through it. A handshake that fails closes the connection instead.
    ///
    /// What the peer has said in the clear, anybody on the way may have said or changed: forget it (RFC 3207 section 4.2).
    #[allow(unused_variables)]
    fn on_secured(&mut self, cx: &mut Context<'_, A>) -> Outcome {
        Ok(())
    }

    /// A whole frame came: the payload, without header. Raw connections get bytes in pieces of any size.
    fn on_frame(&mut self, cx: &mut Context<'_, A>, frame: &[u8]) -> Outcome;

    /// The peer finished sending (FIN, or close_notify over TLS) at the end of a frame. It may still read.
    /// The default closes once everything sent so far is flushed. Not called for a peer that finishes inside a frame.
    ///
    /// **If you answer later** (from another thread, on a timer), say so with [`Conn::hold`], or override this: else the default
    /// closes before your answer comes. A handler that does not close may go on sending, until the idle timeout at the latest;
    /// over TLS 1.2 the connection closes after this call in any case (RFC 5246 section 7.2.1).
    fn on_finish(&mut self, cx: &mut Context<'_, A>) -> Outcome {
        cx.conn.close_after_input();
        Ok(())
    }

    /// What waits for the peer has fallen to the low watermark, after it had reached the high one.
    #[allow(unused_variables)]
    fn on_writable(&mut self, cx: &mut Context<'_, A>) -> Outcome {
        Ok(())
    }

    /// A timer set with [`Conn::set_timer`] is due.
    #[allow(unused_variables)]
    fn on_timer(&mut self, cx: &mut Context<'_, A>, key: u8) -> Outcome {
        Ok(())
    }

    /// Something was sent with [`Handle::notify`](crate::Handle::notify). The default ignores it.
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

    /// The server drains: the moment to say goodbye. The default answers what has arrived already and closes in order
    /// ([`Conn::close_after_input`]). A handler that does not close is served until the drain's deadline, then reset:
    /// if you answer later use [`Conn::hold`], or override this and close when the last answer is sent.
    fn on_drain(&mut self, cx: &mut Context<'_, A>) -> Outcome {
        cx.conn.close_after_input();
        Ok(())
    }

    /// The connection is gone. Called exactly once for each `on_open`, after everything else.
    ///
    /// An orderly close takes as long as the peer takes: up to the write timeout and the linger timeout after
    /// [`Conn::close`]. Whoever must know at once who takes part no longer notes it where it closes.
    #[allow(unused_variables)]
    fn on_close(&mut self, cx: &mut Context<'_, A>, closed: &Closed) {}

    /// An outgoing connection ([`Conn::connect`]) has ended before it was open: it could not connect, all attempts of a
    /// [`Connect::retry`](crate::Connect::retry) included, its TLS handshake failed, or somebody closed or killed it. Called exactly
    /// once, instead of `on_open` and `on_close`, and only here: what was accepted is told to
    /// [`Service::on_failed_accept`]. What was sent to it is lost.
    ///
    /// [`CloseReason::ConnectFailed`](crate::CloseReason::ConnectFailed) has the kernel's error in
    /// [`Closed::error`](crate::Closed::error).
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

    fn on_finish(&mut self, cx: &mut Context<'_, A>) -> Outcome {
        (**self).on_finish(cx)
    }

    fn on_writable(&mut self, cx: &mut Context<'_, A>) -> Outcome {
        (**self).on_writable(cx)
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
/// A closure `FnMut(&mut A, Peer) -> impl Handler<A>` is a service that refuses nobody;
/// [`try_accept`] makes one of a closure that may. Any other goes through
/// [`Server::listen_with`](crate::Server::listen_with).
#[diagnostic::on_unimplemented(
    message = "`{Self}` does not make handlers for an application of type `{A}`",
    label = "not a service",
    note = "pass a closure that makes a handler, `|app: &mut {A}, peer: Peer| MyHandler`, or implement `Service<{A}>`"
)]
pub trait Service<A = ()> {
    /// A peer has connected. Called before TLS, so that a refusal costs nothing.
    ///
    /// # Errors
    ///
    /// [`Refuse`] closes the connection, which is counted as [`Refused`](crate::CloseReason::Refused).
    fn accept(&mut self, app: &mut A, peer: Peer) -> Result<Box<dyn Handler<A>>, Refuse>;

    /// A connection ended before it was open: refused, a failed or late handshake, a reset. Its handler, if it had one,
    /// was dropped without a call.
    #[allow(unused_variables)]
    fn on_failed_accept(&mut self, app: &mut A, peer: &Peer, closed: &Closed) {}

    /// The listener is gone although nobody asked for it: its socket was shut down elsewhere. Its connections live on.
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

/// A service that is chosen while the program runs.
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

/// A [`Service`] of a closure that may refuse.
///
/// ```
/// use portcullis::{try_accept, Context, Handler, Outcome, Peer, Refuse};
/// # struct Echo;
/// # impl Handler for Echo {
/// #     fn on_frame(&mut self, cx: &mut Context<'_>, frame: &[u8]) -> Outcome { cx.conn.send(frame)?; Ok(()) }
/// # }
/// let loopback_only = try_accept(|_app: &mut (), peer: Peer| {
///     // Canonical: on a dual-stack listener IPv4 peers show as ::ffff:a.b.c.d.
///     if peer.addr.ip().is_some_and(|ip| ip.to_canonical().is_loopback()) { Ok(Echo) } else { Err(Refuse::silently()) }
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

/// A service's refusal.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[must_use]
pub struct Refuse {
    pub(crate) farewell: Vec<u8>,
}

impl Refuse {
    /// Closes without a word.
    pub fn silently() -> Self {
        Self::default()
    }

    /// Sends these bytes, as they are and in the clear, then closes. What the socket does not take at once is lost.
    pub fn with_farewell(farewell: impl Into<Vec<u8>>) -> Self {
        Self {
            farewell: farewell.into(),
        }
    }
}

/// Who has connected, and where.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Peer {
    /// The connection's id; `None` for one that was refused because the cap was reached.
    pub id: Option<ConnId>,
    /// The peer's address.
    pub addr: Addr,
    /// On a Unix socket, who the peer is, if the system says it.
    pub credentials: Option<Credentials>,
    /// The listener it came through.
    pub listener: ListenerId,
    /// That listener's name.
    pub listener_name: Rc<str>,
    /// What a trusted proxy has said about whom it speaks for ([`Listen::proxy_protocol`](crate::Listen::proxy_protocol)).
    pub proxy: Option<Rc<ProxyHeader>>,
}

impl Peer {
    /// Where the client is: the address behind the proxy, if one was told, else the peer's.
    pub fn source(&self) -> Addr {
        let told = self.proxy.as_ref().and_then(|header| header.source());
        told.map_or_else(|| self.addr.clone(), Addr::from)
    }
}
