//! The choice of a handshake's configuration: one for all clients, or one by the ClientHello.

use std::collections::HashMap;
use std::error::Error as StdError;
use std::fmt;
use std::sync::Arc;

use rustls::pki_types::{DnsName, IpAddr};
use rustls::server::ClientHello;
use rustls::ServerConfig;

use crate::error::Error;

/// The TLS of a listener, or of a connection that is to be upgraded.
///
/// One [`ServerConfig`], or a choice made for each client by its ClientHello. An
/// `Arc<ServerConfig>` and [`ServerNames`] convert by `into`, so that
/// [`Listen::tls`](crate::Listen::tls) accepts both; [`TlsConfig::choose`] takes a closure.
#[derive(Clone)]
pub struct TlsConfig(Choice);

#[derive(Clone)]
enum Choice {
    One(Arc<ServerConfig>),
    Names(Arc<ServerNames>),
    Closure(Arc<Chooser>),
}

type Chooser = dyn Fn(&ClientHello<'_>) -> Option<Arc<ServerConfig>> + Send + Sync;

impl TlsConfig {
    /// Calls `choose` for each handshake. `None` refuses the client, with the alerts of
    /// [`ServerNames::only`].
    ///
    /// `choose` runs on the loop's thread and must not block: keep the configurations in memory. A
    /// panic ends that connection alone, as [`Panicked`](crate::CloseReason::Panicked).
    ///
    /// ```
    /// use std::sync::Arc;
    /// use portcullis::tls::{rustls::ServerConfig, TlsConfig};
    ///
    /// /// Clients that can speak HTTP/2 get another configuration.
    /// fn by_protocol(old: Arc<ServerConfig>, new: Arc<ServerConfig>) -> TlsConfig {
    ///     TlsConfig::choose(move |hello| {
    ///         let mut protocols = hello.alpn().into_iter().flatten();
    ///         let can = protocols.any(|name| name == b"h2");
    ///         Some(Arc::clone(if can { &new } else { &old }))
    ///     })
    /// }
    /// ```
    ///
    /// Each configuration keeps sessions of its own, so that none is resumed under another. If you
    /// share a storage or a ticketer between two of them, see
    /// [`server_config`](super::server_config).
    pub fn choose<F>(choose: F) -> Self
    where
        F: Fn(&ClientHello<'_>) -> Option<Arc<ServerConfig>> + Send + Sync + 'static,
    {
        Self(Choice::Closure(Arc::new(choose)))
    }

    /// Returns the configuration for the client; `None` if it is refused.
    pub(super) fn for_client(&self, hello: &ClientHello<'_>) -> Option<Arc<ServerConfig>> {
        match &self.0 {
            Choice::One(config) => Some(Arc::clone(config)),
            Choice::Names(names) => names.find(hello.server_name()).map(Arc::clone),
            Choice::Closure(choose) => choose(hello).map(without_early_data),
        }
    }
}

impl From<Arc<ServerConfig>> for TlsConfig {
    fn from(config: Arc<ServerConfig>) -> Self {
        Self(Choice::One(without_early_data(config)))
    }
}

impl From<ServerConfig> for TlsConfig {
    fn from(config: ServerConfig) -> Self {
        Arc::new(config).into()
    }
}

impl From<ServerNames> for TlsConfig {
    fn from(names: ServerNames) -> Self {
        Self(Choice::Names(Arc::new(names)))
    }
}

impl fmt::Debug for TlsConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Choice::One(_) => f.write_str("one configuration"),
            Choice::Names(names) => names.fmt(f),
            Choice::Closure(_) => f.write_str("chosen by a closure"),
        }
    }
}

/// Disables early data: it precedes the handshake's proof of the client, and can be replayed.
fn without_early_data(config: Arc<ServerConfig>) -> Arc<ServerConfig> {
    if config.max_early_data_size == 0 {
        return config;
    }
    let mut config = ServerConfig::clone(&config);
    config.max_early_data_size = 0;
    Arc::new(config)
}

/// A configuration for each name that clients may ask for (SNI, RFC 6066 section 3).
///
/// Each has its own certificates, protocols and rule for client certificates. A name is looked up
/// as it is, then with its first label replaced by `*`. `*.example.org` matches `a.example.org`,
/// but not `example.org` and not `a.b.example.org` (RFC 6125 section 6.4.3). Upper and lower case
/// are the same.
///
/// ```
/// use std::sync::Arc;
/// use portcullis::tls::{rustls::ServerConfig, ServerNames};
/// use portcullis::{Framing, Listen};
///
/// fn listen(site: Arc<ServerConfig>, api: Arc<ServerConfig>) -> portcullis::Result<Listen> {
///     let names = ServerNames::only()
///         .name("example.org", Arc::clone(&site))?
///         .name("*.example.org", site)?
///         .name("api.example.org", api)?;
///     Ok(Listen::tcp("0.0.0.0:8883", Framing::Line).tls(names))
/// }
/// ```
///
/// rustls resumes a session only under its first name, and each configuration keeps sessions of its
/// own. So a session of another name does not bypass the demand for a client certificate.
#[derive(Clone)]
#[must_use]
pub struct ServerNames {
    exact: HashMap<Box<str>, Arc<ServerConfig>>,
    /// Keyed by the name behind `*.`.
    wildcards: HashMap<Box<str>, Arc<ServerConfig>>,
    otherwise: Option<Arc<ServerConfig>>,
}

impl ServerNames {
    /// Refuses clients that ask for an unknown name, or for none.
    ///
    /// The alert is unrecognized_name (RFC 6066 section 3), or missing_extension (RFC 8446 section
    /// 9.2) without a name. Clients that connect to an address ask for none.
    pub fn only() -> Self {
        Self {
            exact: HashMap::new(),
            wildcards: HashMap::new(),
            otherwise: None,
        }
    }

    /// Serves clients that ask for an unknown name, or for none, with `config`.
    pub fn or(config: Arc<ServerConfig>) -> Self {
        Self {
            otherwise: Some(without_early_data(config)),
            ..Self::only()
        }
    }

    /// Adds a name, or with a leading `*.` all names with one more label.
    ///
    /// # Errors
    ///
    /// [`Error::Other`] for a name that no client can ask for, and for a repeated name.
    pub fn name(mut self, name: &str, config: Arc<ServerConfig>) -> Result<Self, Error> {
        let lower = name.to_ascii_lowercase();
        let (names, bare) = match lower.strip_prefix("*.") {
            Some(rest) => (&mut self.wildcards, rest),
            None => (&mut self.exact, &*lower),
        };
        let bare = bare.strip_suffix('.').unwrap_or(bare);
        if let Some(problem) = fault(bare) {
            return Err(Error::other(NameError {
                name: name.to_owned(),
                problem,
            }));
        }
        if names.contains_key(bare) {
            return Err(Error::other(NameError {
                name: name.to_owned(),
                problem: "is given twice: leave one of them out",
            }));
        }
        names.insert(bare.into(), without_early_data(config));
        Ok(self)
    }

    fn find(&self, name: Option<&str>) -> Option<&Arc<ServerConfig>> {
        name.and_then(|name| {
            let name = name.strip_suffix('.').unwrap_or(name);
            let lower = name.to_ascii_lowercase();
            self.exact
                .get(&*lower)
                .or_else(|| self.wildcards.get(lower.split_once('.')?.1))
        })
        .or(self.otherwise.as_ref())
    }
}

impl fmt::Debug for ServerNames {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rest = if self.otherwise.is_some() {
            "a default"
        } else {
            "no default"
        };
        let count = self.exact.len() + self.wildcards.len();
        write!(f, "{count} names and {rest}")
    }
}

/// Returns the fault of a name without its wildcard.
fn fault(name: &str) -> Option<&'static str> {
    if IpAddr::try_from(name).is_ok() {
        Some(
            "is an address: clients that connect to one ask for no name, \
             and get the default of ServerNames::or",
        )
    } else if !name.is_ascii() {
        Some("has letters beyond ASCII: give it as clients send it, in its xn-- form (RFC 5890)")
    } else if name.contains('*') {
        Some(
            "has a wildcard in a place where none can be: \
             only the first label may be one, and only all of it",
        )
    } else if DnsName::try_from(name).is_err() {
        Some(
            "is no DNS name: labels of letters, digits and inner hyphens, \
             with dots between them (RFC 1035 section 2.3.1)",
        )
    } else {
        None
    }
}

/// Why a name cannot be in [`ServerNames`].
#[derive(Clone, Debug, PartialEq, Eq)]
struct NameError {
    name: String,
    problem: &'static str,
}

impl fmt::Display for NameError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the server name {:?} {}", self.name, self.problem)
    }
}

impl StdError for NameError {}
