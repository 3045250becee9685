//! The client's side of a handshake: the server's name, and the configuration.

use std::error::Error as StdError;
use std::fmt;
use std::sync::Arc;

use rustls::client::UnbufferedClientConnection;
use rustls::pki_types::ServerName;
use rustls::ClientConfig;

use crate::escape::Escaped;

/// The TLS of an outgoing connection.
#[derive(Clone)]
pub(crate) struct ClientTls {
    pub(super) config: Arc<ClientConfig>,
    name: Result<ServerName<'static>, String>,
}

impl ClientTls {
    /// Disables early data, which can be replayed.
    pub(crate) fn new(config: Arc<ClientConfig>, name: &str) -> Self {
        Self {
            config: without_early_data(config),
            name: ServerName::try_from(name.to_owned()).map_err(|_| name.to_owned()),
        }
    }

    /// Returns the fault of a name that no certificate can be for.
    pub(crate) fn problem(&self) -> Option<String> {
        let name = self.name.as_ref().err()?;
        Some(format!(
            "{name:?} is no name that a certificate can be for: give a DNS name \
             (in its xn-- form, without a port) or an IP address"
        ))
    }

    pub(super) fn connection(
        &self,
    ) -> Result<UnbufferedClientConnection, Box<dyn StdError + Send + Sync>> {
        let name = self
            .name
            .clone()
            .map_err(|_| self.problem().unwrap_or_default())?;
        Ok(UnbufferedClientConnection::new(
            Arc::clone(&self.config),
            name,
        )?)
    }

    pub(super) fn server(&self) -> Box<str> {
        match &self.name {
            Ok(name) => name.to_str().into(),
            Err(name) => name.as_str().into(),
        }
    }
}

impl fmt::Debug for ClientTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "for {}", self.server())
    }
}

fn without_early_data(config: Arc<ClientConfig>) -> Arc<ClientConfig> {
    if !config.enable_early_data {
        return config;
    }
    let mut config = ClientConfig::clone(&config);
    config.enable_early_data = false;
    Arc::new(config)
}

/// A failed handshake with a server, and the server's name.
#[derive(Debug)]
pub(super) struct WithServer {
    pub(super) wanted: Box<str>,
    pub(super) source: Box<dyn StdError + Send + Sync>,
}

impl fmt::Display for WithServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The source may quote the certificate.
        let source = Escaped::new(&self.source);
        write!(f, "{source} (the server wanted was {})", self.wanted)
    }
}

impl StdError for WithServer {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        Some(&*self.source)
    }
}

#[cfg(all(test, feature = "sim", any(feature = "ring", feature = "aws-lc-rs")))]
mod tests {
    use rustls::version::TLS13;

    use super::*;
    use crate::proto::tests::tls::Identity;

    /// Early data can be replayed. The user's configuration may be shared, and does not change.
    #[test]
    fn early_data_is_never_sent() {
        let mut config = Identity::new().client(&TLS13);
        config.enable_early_data = true;
        config.alpn_protocols = vec![b"mqtt".to_vec()];
        let config = Arc::new(config);
        let tls = ClientTls::new(Arc::clone(&config), "localhost");
        assert!(!tls.config.enable_early_data && config.enable_early_data);
        assert_eq!(tls.config.alpn_protocols, config.alpn_protocols);
    }
}
