//! Operations beyond answering: close one direction, be the client of a TLS handshake, follow the
//! pace of another connection.

use super::Conn;
use crate::proto::Machine;

impl<A> Conn<'_, A> {
    /// Ends the sending direction, and goes on reading (half-close). Pending output is flushed,
    /// then close_notify over TLS and FIN are sent. [`Conn::send`] fails from here on. The
    /// connection closes once the peer has finished too and
    /// [`Handler::on_finish`](crate::Handler::on_finish) was called.
    ///
    /// A peer that speaks TLS 1.2 may answer close_notify with its own at once, and drop its
    /// pending output (RFC 5246 section 7.2.1).
    pub fn finish(&mut self) {
        self.change(|machine, _, _| machine.finish());
    }

    /// Upgrades as [`Conn::start_tls`], as the client of the handshake. The server must have a
    /// certificate for `server_name` ([`Connect::tls`](crate::Connect::tls)). Send the command
    /// first, and call this when the peer has agreed.
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
    ) -> crate::Result<()> {
        let now = self.ops.now();
        let Some((machine, pool)) = self.ops.machine(self.id) else {
            return Err(crate::Error::no_handshake());
        };
        let config = crate::proto::tls::ClientTls::new(config.into(), server_name.as_ref());
        let started = machine.start_tls_client(&config, now, pool);
        self.ops.touch(self.id);
        // The last step: the destructor of a framer is foreign code.
        started.map(drop)
    }

    /// Returns whether pending output has reached the high watermark, and not fallen to the low one
    /// since ([`ConnConfig::high_watermark`](crate::ConnConfig::high_watermark)).
    /// [`Handler::on_writable`](crate::Handler::on_writable) will be called. A handler that
    /// forwards data to this connection should stop until then.
    pub fn is_congested(&self) -> bool {
        self.ops
            .machine_ref(self.id)
            .is_some_and(Machine::is_above_watermark)
    }
}
