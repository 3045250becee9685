//! Operations beyond answering: connect to other servers, close one direction, follow the pace of
//! another connection.

use super::conn::{Conn, ConnOps};
use super::Handler;
use crate::addr::{Addr, AddrError};
use crate::config::Connect;
use crate::error::{Error, Result as ServerResult};
use crate::id::ConnId;
use crate::proto::Machine;

/// Connects through any of the types that can.
pub(crate) fn connect<A, T>(
    ops: &mut dyn ConnOps<A>,
    addr: T,
    options: Connect,
    handler: impl Handler<A> + 'static,
) -> ServerResult<ConnId>
where
    T: TryInto<Addr>,
    AddrError: From<T::Error>,
{
    let addr = addr
        .try_into()
        .map_err(|error| Error::ConnectAddress(AddrError::from(error)))?;
    ops.connect(addr, options, Box::new(handler))
}

impl<A> Conn<'_, A> {
    /// Ends the sending direction, and goes on reading (half-close). Pending output is flushed,
    /// then close_notify over TLS and FIN are sent. [`Conn::send`] fails from here on. The
    /// connection closes once the peer has finished too and [`Handler::on_finish`] was called.
    ///
    /// A peer that speaks TLS 1.2 may answer close_notify with its own at once, and drop its
    /// pending output (RFC 5246 section 7.2.1).
    pub fn finish(&mut self) {
        self.change(|machine, _, _| machine.finish());
    }

    /// Upgrades as [`Conn::start_tls`], as the client of the handshake. The server must have a
    /// certificate for `server_name` ([`Connect::tls`]). Send the command first, and call this when
    /// the peer has agreed.
    ///
    /// Bytes behind the peer's answer count as the beginning of its handshake, never as frames: an
    /// attacker may have inserted them (CVE-2011-0411).
    ///
    /// # Errors
    ///
    /// [`Error::ConnState`](crate::Error::ConnState): the connection speaks TLS already, or no
    /// handshake is possible any more. Nothing has changed. An invalid `server_name` ends the
    /// connection as [`TlsHandshake`](crate::CloseReason::TlsHandshake).
    #[cfg(feature = "tls")]
    pub fn start_tls_client(
        &mut self,
        config: impl Into<std::sync::Arc<crate::proto::tls::ClientConfig>>,
        server_name: impl AsRef<str>,
    ) -> ServerResult<()> {
        let now = self.ops.now();
        let Some((machine, pool)) = self.ops.machine(self.id) else {
            return Err(Error::no_handshake());
        };
        let config = crate::proto::tls::ClientTls::new(config.into(), server_name.as_ref());
        let started = machine.start_tls_client(&config, now, pool);
        self.ops.touch(self.id);
        started
    }

    /// Begins a connection to another server: see [`Control::connect`](crate::Control::connect).
    /// [`Conn::peer`] reaches the new connection at once. Its handler is not called before this
    /// callback has returned.
    ///
    /// ```
    /// # use portcullis::{Close, Closed, Connect, ConnId, Context, Framing, Handler, Outcome};
    /// /// Asks a server behind this one, and passes its answers on.
    /// struct Asks;
    /// impl Handler for Asks {
    ///     fn on_frame(&mut self, cx: &mut Context<'_>, question: &[u8]) -> Outcome {
    ///         let asker = cx.conn.id();
    ///         let behind = cx.conn.connect("10.0.0.7:2222", Connect::new(Framing::Line), Answers(asker))?;
    ///         if let Some(mut behind) = cx.conn.peer(behind) {
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
    ///
    /// # Errors
    ///
    /// The errors of [`Control::connect`](crate::Control::connect). The handler is dropped.
    pub fn connect<T>(
        &mut self,
        addr: T,
        options: Connect,
        handler: impl Handler<A> + 'static,
    ) -> ServerResult<ConnId>
    where
        T: TryInto<Addr>,
        AddrError: From<T::Error>,
    {
        connect(&mut *self.ops, addr, options, handler)
    }

    /// Returns whether pending output has reached the high watermark, and not fallen to the low one
    /// since ([`ConnConfig::high_watermark`](crate::ConnConfig::high_watermark)).
    /// [`Handler::on_writable`] will be called. A handler that forwards data to this connection
    /// should stop until then.
    pub fn is_congested(&self) -> bool {
        self.ops
            .machine_ref(self.id)
            .is_some_and(Machine::is_above_watermark)
    }
}
