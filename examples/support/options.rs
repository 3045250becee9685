//! The options of the echo server.

use std::error::Error;
use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgMatches, CommandFactory, FromArgMatches, Parser};
use portcullis::{AccessRules, Addr, Listen, Observer, ProxyProtocol};

#[path = "framing.rs"]
pub mod framing;
use framing::FramingName;

/// An echo server in Erlang-style framing, over TCP or TLS.
///
/// SIGTERM and SIGINT drain it; a second signal aborts at once.
#[derive(Debug, Parser)]
#[command(version, name = "echo")]
pub struct Options {
    /// Where to listen; port 0 lets the system choose
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:2222")]
    pub listen: String,

    /// How the stream is cut into messages
    #[arg(long, value_enum, default_value_t = FramingName::Packet2)]
    pub framing: FramingName,

    /// The most connections at one time; more wait in the backlog
    #[arg(
        long,
        value_name = "N",
        default_value_t = 1024,
        allow_negative_numbers = true
    )]
    pub max_connections: usize,

    /// The longest message accepted [default: the framing's: 8 MiB for packet-4, 64 KiB for line]
    #[arg(long, value_name = "BYTES", value_parser = at_least_one, allow_negative_numbers = true)]
    pub max_packet: Option<usize>,

    /// Speak TLS with this certificate chain
    #[arg(long, value_name = "PEM", requires = "tls_key")]
    pub tls_cert: Option<PathBuf>,

    /// The private key of --tls-cert
    #[arg(long, value_name = "PEM", requires = "tls_cert")]
    pub tls_key: Option<PathBuf>,

    /// Speak TLS with a certificate for localhost, made up at every start
    #[arg(long, conflicts_with = "tls_cert")]
    pub tls_self_signed: bool,

    /// Close a client that is silent for so long; 0 is never
    #[arg(long, value_name = "SECS", default_value = "120", value_parser = seconds, allow_negative_numbers = true)]
    pub idle_timeout: Duration,

    /// A client must be through its TLS handshake by then; 0 is never
    #[arg(long, value_name = "SECS", default_value = "10", value_parser = seconds, allow_negative_numbers = true)]
    pub handshake_timeout: Duration,

    /// Serve clients of this address or network; may be given often, with --deny in between: the first that matches decides
    #[arg(long, value_name = "CIDR")]
    pub allow: Vec<String>,

    /// Refuse clients of this address or network. Clients that nothing matches are served, unless
    /// there are only --allow
    #[arg(long, value_name = "CIDR")]
    pub deny: Vec<String>,

    /// --allow and --deny, in the order in which they were given.
    #[arg(skip)]
    pub access: AccessRules,

    /// Each connection begins with a PROXY protocol header (version 1 or 2) that names the client.
    /// --allow and --deny hold for the proxy and for that client
    #[arg(long)]
    pub proxy_protocol: bool,

    /// Take --proxy-protocol headers from proxies of this address or network only; may be given
    /// often. Default: from every peer
    #[arg(long, value_name = "CIDR", requires = "proxy_protocol", value_parser = network)]
    pub trusted_proxy: Vec<String>,

    /// Whose headers are believed.
    #[arg(skip)]
    pub trusted: AccessRules,

    /// The most bytes that all clients together may make the server buffer; no limit but each client's own by default
    #[arg(long, value_name = "BYTES", value_parser = at_least_one, allow_negative_numbers = true)]
    pub memory_limit: Option<usize>,

    /// Show the server on a page at this address, for a browser on this host
    #[arg(long, value_name = "HOST:PORT")]
    pub observer: Option<String>,

    /// Let the page kill connections, for those who have this token of at least 16 bytes
    #[arg(long, value_name = "TOKEN", requires = "observer")]
    pub kill_token: Option<String>,

    /// How long a drain waits for clients to finish
    #[arg(long, value_name = "SECS", default_value = "10", value_parser = seconds, allow_negative_numbers = true)]
    pub grace: Duration,
}

/// The options of this process; ends it with status 2 and a message if they are no good.
pub fn parse() -> Options {
    parse_from(std::env::args_os()).unwrap_or_else(|error| error.exit())
}

/// The options in these words, the first of which is the program's name.
pub fn parse_from<W>(words: impl IntoIterator<Item = W>) -> Result<Options, clap::Error>
where
    W: Into<OsString> + Clone,
{
    let matches = Options::command().try_get_matches_from(words)?;
    let mut options = Options::from_arg_matches(&matches)?;
    let bad_value =
        |error| Options::command().error(clap::error::ErrorKind::ValueValidation, error);
    options.access = access(&matches).map_err(bad_value)?;
    options.trusted = trusted(&options.trusted_proxy).map_err(bad_value)?;
    Ok(options)
}

/// The access rules in the order of the command line.
fn access(matches: &ArgMatches) -> portcullis::Result<AccessRules> {
    let given = |option: &str| -> Vec<(usize, String)> {
        let places = matches.indices_of(option).into_iter().flatten();
        let words = matches.get_many::<String>(option).into_iter().flatten();
        places.zip(words.cloned()).collect()
    };
    let (allow, deny) = (given("allow"), given("deny"));
    let mut rules = if deny.is_empty() && !allow.is_empty() {
        AccessRules::deny_all()
    } else {
        AccessRules::allow_all()
    };
    let allow = allow.into_iter().map(|(place, word)| (place, true, word));
    let mut all: Vec<_> = allow
        .chain(deny.into_iter().map(|(place, word)| (place, false, word)))
        .collect();
    all.sort();
    for (_, allowed, word) in all {
        rules = if allowed {
            rules.allow(&word)?
        } else {
            rules.deny(&word)?
        };
    }
    Ok(rules)
}

fn trusted(proxies: &[String]) -> portcullis::Result<AccessRules> {
    let first = if proxies.is_empty() {
        AccessRules::allow_all()
    } else {
        AccessRules::deny_all()
    };
    proxies
        .iter()
        .try_fold(first, |rules, proxy| rules.allow(proxy))
}

/// 0 on the command line is never.
pub fn or_never(timeout: Duration) -> Duration {
    if timeout.is_zero() {
        Duration::MAX
    } else {
        timeout
    }
}

fn at_least_one(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("no message fits into 0 bytes".to_owned()),
        Ok(bytes) => Ok(bytes),
        Err(error) => Err(format!("not a number of bytes: {error}")),
    }
}

fn network(text: &str) -> Result<String, String> {
    match AccessRules::deny_all().allow(text) {
        Ok(_) => Ok(text.to_owned()),
        Err(_) => Err("not an address, a network (as in 10.0.0.0/8), or \"all\"".to_owned()),
    }
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text
        .parse()
        .map_err(|_| "not a number of seconds".to_owned())?;
    Duration::try_from_secs_f64(seconds).map_err(|error| error.to_string())
}

impl Options {
    /// Makes the listener look for PROXY headers if the options say so.
    pub fn add_proxy(&self, mut listen: Listen) -> Listen {
        if !self.proxy_protocol {
            return listen;
        }
        if self.trusted_proxy.is_empty() {
            log::warn!(
                "--proxy-protocol without --trusted-proxy: any peer can claim any source address"
            );
        }
        listen.proxy_protocol = ProxyProtocol::Required;
        listen.trusted_proxies = Some(self.trusted.clone());
        listen
    }

    /// The observer and its listener, if the options say so.
    pub fn observer(&self) -> portcullis::Result<Option<(Listen, Observer)>> {
        let Some(addr) = &self.observer else {
            return Ok(None);
        };
        let mut observer = Observer::new();
        if let Some(token) = &self.kill_token {
            observer = observer.allow_kill(token.as_str());
        }
        let listen = observer.listen(addr.as_str())?.name("observer");
        Ok(Some((listen, observer)))
    }

    /// Makes the listener speak TLS if the options say so.
    pub fn add_tls(&self, listen: Listen) -> Result<Listen, Box<dyn Error>> {
        #[cfg(feature = "tls")]
        {
            if let (Some(chain), Some(key)) = (&self.tls_cert, &self.tls_key) {
                return Ok(listen.tls(portcullis::tls::server_config(chain, key)?));
            }
            if self.tls_self_signed {
                return Ok(listen.tls(self_signed()?));
            }
        }
        #[cfg(not(feature = "tls"))]
        if self.tls_cert.is_some() || self.tls_key.is_some() || self.tls_self_signed {
            return Err("built without the feature `tls`".into());
        }
        Ok(listen)
    }

    /// A command line for a client of this server.
    pub fn try_it(&self, addr: &Addr) -> String {
        let tls = if self.tls_self_signed || self.tls_cert.is_some() {
            " --tls --insecure"
        } else {
            ""
        };
        let framing = self.framing.name();
        format!("cargo run --release --example echo_client -- --connect {addr} --framing {framing}{tls} hello world")
    }
}

#[cfg(feature = "tls")]
fn self_signed() -> Result<std::sync::Arc<portcullis::tls::rustls::ServerConfig>, Box<dyn Error>> {
    use portcullis::tls::rustls::{self, pki_types::PrivatePkcs8KeyDer};
    let names = [
        "localhost".to_owned(),
        "127.0.0.1".to_owned(),
        "::1".to_owned(),
    ];
    let made = rcgen::generate_simple_self_signed(names)?;
    let key = PrivatePkcs8KeyDer::from(made.signing_key.serialize_der());
    let config = rustls::ServerConfig::builder_with_provider(framing::provider())
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key.into())?;
    Ok(std::sync::Arc::new(config))
}
