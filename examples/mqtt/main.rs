//! An MQTT 3.1.1 broker: a whole protocol, in the size that it needs.
//!
//!     cargo run --release --example mqtt
//!     mosquitto_sub -t 'hello/#' -v
//!     mosquitto_pub -t hello/you -m hi
//!
//! README.md says what it does, and what clients can make it keep.

mod broker;
mod client;
mod message;
mod packet;
mod session;
#[path = "../support/terminal.rs"]
mod terminal;
mod topics;

use std::collections::BTreeMap;
use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use portcullis::{Config, Framing, Listen, Server};

use broker::{Broker, Limits};
use client::Client;
use packet::ControlPackets;

/// An MQTT 3.1.1 broker.
///
/// SIGTERM and SIGINT drain it; a second signal ends it at once.
#[derive(Debug, Parser)]
#[command(version, name = "mqtt")]
struct Options {
    /// Where to listen; port 0 lets the system choose
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:1883")]
    listen: String,

    /// Connections; more wait in the backlog
    #[arg(long, value_name = "N", default_value_t = 1024)]
    max_connections: usize,

    /// Bytes of a control packet; a longer one ends the connection
    #[arg(long, value_name = "BYTES", default_value_t = 256 * 1024)]
    max_packet: usize,

    /// Bytes in the buffers of all connections together
    #[arg(long, value_name = "BYTES", default_value_t = 256 * 1024 * 1024)]
    memory_limit: usize,

    /// Serve these users alone: a line NAME:PASSWORD for each
    #[arg(long, value_name = "FILE")]
    users: Option<PathBuf>,

    /// Speak TLS with this certificate chain
    #[arg(long, value_name = "PEM", requires = "tls_key")]
    tls_cert: Option<PathBuf>,

    /// The private key of --tls-cert
    #[arg(long, value_name = "PEM", requires = "tls_cert")]
    tls_key: Option<PathBuf>,

    #[command(flatten)]
    limits: Limits,
}

fn main() -> ExitCode {
    let options = Options::parse();
    terminal::log_to_stderr();
    terminal::exit_code("mqtt", serve(options))
}

fn serve(options: Options) -> Result<(), Box<dyn Error>> {
    let users = options.users.as_deref().map(read_users).transpose()?;
    let mut config = Config::max_connections(options.max_connections);
    config.memory_limit = Some(options.memory_limit);
    let mut server = Server::new(config)?;
    server.listen(add_tls(listen(&options), &options)?, |_app, _peer| {
        Client::default()
    })?;
    let addr = server.control().listener("mqtt")?.addr;
    // Before the address is printed: its reader may send a signal at once.
    terminal::drain_on_signal(server.handle(), Duration::from_secs(5))?;
    terminal::say(&format!("listening on {addr} (MQTT 3.1.1)"));
    let mut broker = Broker::new(options.limits, users);
    server.run(&mut broker)?;
    terminal::say(&broker.counters.to_string());
    Ok(())
}

fn listen(options: &Options) -> Listen {
    let framing = Framing::custom(|| ControlPackets);
    let mut listen = Listen::tcp(options.listen.as_str(), framing).name("mqtt");
    let conn = &mut listen.conn;
    conn.max_frame = Some(options.max_packet);
    // Until CONNECT the handler's timer counts; then the client's own keep alive.
    conn.idle_timeout = Duration::MAX;
    // What a subscriber gets is no answer to what it sends, and its acknowledgements must be read
    // while it is slow. Messages stop at the high watermark: what is above is for answers.
    conn.full_duplex = true;
    conn.low_watermark = 256 * 1024;
    conn.high_watermark = 1024 * 1024;
    conn.output_limit = 2 * 1024 * 1024;
    listen
}

fn add_tls(listen: Listen, options: &Options) -> Result<Listen, Box<dyn Error>> {
    let (Some(chain), Some(key)) = (&options.tls_cert, &options.tls_key) else {
        return Ok(listen);
    };
    #[cfg(feature = "tls")]
    return Ok(listen.tls(portcullis::tls::server_config(chain, key)?));
    #[cfg(not(feature = "tls"))]
    Err(format!("built without TLS: cannot use {chain:?} and {key:?}").into())
}

fn read_users(path: &Path) -> Result<BTreeMap<String, String>, Box<dyn Error>> {
    let text = std::fs::read_to_string(path).map_err(|error| format!("{path:?}: {error}"))?;
    let mut users = BTreeMap::new();
    for (number, line) in (1..).zip(text.lines()) {
        let (user, password) = line
            .split_once(':')
            .ok_or_else(|| format!("{path:?}, line {number}: not NAME:PASSWORD"))?;
        users.insert(user.to_owned(), password.to_owned());
    }
    Ok(users)
}
