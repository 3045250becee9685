//! What a connection can do beyond answering: connect to others, end one direction, and keep the pace of somebody else.

use super::conn::{Conn, ConnOps};
use super::Handler;
use crate::addr::{Addr, AddrError};
use crate::config::Connect;
use crate::error::{Error, Result as ServerResult};
use crate::id::ConnId;
use crate::proto::Machine;

/// Connects through whatever can.
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
    /// Says that nothing more will be sent, and goes on reading: what was sent is flushed, then close_notify over TLS, then FIN
    /// (half-close). [`Conn::send`] fails from here on. Once the peer has finished too, and its handler was told
    /// ([`Handler::on_finish`]), the connection closes.
    ///
    /// A peer that speaks TLS 1.2 may answer close_notify with its own at once, and drop what it had to say (RFC 5246 section 7.2.1).
    pub fn finish(&mut self) {
        self.change(|machine, _, _| machine.finish());
    }

    /// As [`Conn::start_tls`], but as the client of the handshake: with the server that has a certificate for `server_name`
    /// ([`Connect::tls`]). Send the command first, and call this when the peer has agreed.
    ///
    /// What the peer has sent behind its answer is taken for the beginning of its handshake, never for frames: somebody on the way
    /// may have put it there (CVE-2011-0411).
    ///
    /// # Errors
    ///
    /// [`StartTlsError`](crate::StartTlsError): it speaks TLS already, or no handshake can come any more. Nothing has changed. A
    /// `server_name` that is none ends the connection as [`TlsHandshake`](crate::CloseReason::TlsHandshake).
    #[cfg(feature = "tls")]
    pub fn start_tls_client(
        &mut self,
        config: impl Into<std::sync::Arc<crate::tls::ClientConfig>>,
        server_name: impl AsRef<str>,
    ) -> Result<(), crate::StartTlsError> {
        let now = self.ops.now();
        let Some((machine, pool)) = self.ops.machine(self.id) else {
            return Err(crate::StartTlsError::Closed);
        };
        let config = crate::proto::tls::ClientTls::new(config.into(), server_name.as_ref());
        let started = machine.start_tls_client(&config, now, pool);
        self.ops.touch(self.id);
        started
    }

    /// Connects to another server: see [`Control::connect`](crate::Control::connect). The new connection can be reached at once, with
    /// [`Conn::peer`]; its handler is not called before this callback has returned.
    ///
    /// ```
    /// # use portcullis::{Close, Closed, Connect, ConnId, Context, Framing, Handler, Outcome};
    /// /// Asks a server behind this one, and passes its answers on.
    /// struct Asks;
    /// impl Handler for Asks {
    ///     fn on_frame(&mut self, cx: &mut Context<'_>, question: &[u8]) -> Outcome {
    ///         let asker = cx.conn.id();
    ///         let behind = cx.conn.connect("10.0.0.7:2222", Connect::new(), Answers(asker))?;
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
    /// Those of [`Control::connect`](crate::Control::connect). The handler is dropped.
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

    /// So much waits for the peer that the high watermark was reached, and the low one was not since
    /// ([`ConnConfig::watermarks`](crate::ConnConfig::watermarks)): [`Handler::on_writable`] will be called. Who sends to a connection what
    /// comes from elsewhere stops there until then.
    pub fn is_congested(&self) -> bool {
        self.ops
            .machine_ref(self.id)
            .is_some_and(Machine::is_above_watermark)
    }
}
