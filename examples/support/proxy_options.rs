//! The options of the proxy.

use std::path::PathBuf;

use clap::Parser;
use portcullis::Addr;

/// Forwards TCP and TLS connections to a server behind it.
#[derive(Debug, Parser)]
#[command(version, name = "proxy")]
pub struct Options {
    /// Where to listen; port 0 lets the system choose
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:2222")]
    pub listen: String,

    /// The server behind: an address, not a name, or unix:PATH
    #[arg(long, value_name = "IP:PORT")]
    pub to: Addr,

    /// The most clients at one time; each takes two descriptors
    #[arg(long, value_name = "N", default_value_t = 500)]
    pub max_clients: usize,

    /// Speak TLS with clients, with this certificate chain
    #[arg(long, value_name = "PEM", requires = "tls_key")]
    pub tls_cert: Option<PathBuf>,

    /// The private key of --tls-cert
    #[arg(long, value_name = "PEM", requires = "tls_cert")]
    pub tls_key: Option<PathBuf>,

    /// Speak TLS with the server behind, which has a certificate for this name
    #[arg(long, value_name = "NAME", requires = "ca")]
    pub tls_to: Option<String>,

    /// The issuer of that certificate
    #[arg(long, value_name = "PEM", requires = "tls_to")]
    pub ca: Option<PathBuf>,
}
