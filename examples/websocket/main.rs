//! A WebSocket server (RFC 6455): an echo at `/`, and a chat room at `/chat`.
//!
//!     cargo run --release --example websocket        (then open http://127.0.0.1:8080/ in a browser)
//!
//! It shows a framing that transforms (clients mask what they send), two protocols on one
//! connection (HTTP, then WebSocket), and last words to a client that breaks either.

mod frames;
mod handshake;
mod session;
#[path = "../support/terminal.rs"]
mod terminal;

use std::collections::BTreeSet;
use std::error::Error;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use portcullis::{Config, ConnId, Framing, Listen, Server};

use handshake::{Head, Upgrade};

/// A WebSocket server: an echo at /, a chat room at /chat.
#[derive(Debug, Parser)]
#[command(version, name = "websocket")]
struct Options {
    /// Where to listen; port 0 lets the system choose
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:8080")]
    listen: String,

    /// Connections; more wait in the backlog
    #[arg(long, value_name = "N", default_value_t = 1024)]
    max_connections: usize,

    /// Bytes of a message, with all its fragments
    #[arg(long, value_name = "BYTES", default_value_t = 64 * 1024)]
    max_message: usize,
}

/// Bytes in all buffers: above it the members that have stalled longest are closed.
const MEMORY_LIMIT: usize = 64 * 1024 * 1024;

/// The state that all connections share.
struct App {
    /// The members of the chat room.
    room: BTreeSet<ConnId>,
    max_message: usize,
}

fn main() -> ExitCode {
    let options = Options::parse();
    terminal::log_to_stderr();
    terminal::exit_code("websocket", serve(options))
}

fn serve(options: Options) -> Result<(), Box<dyn Error>> {
    let mut listen = Listen::tcp(options.listen.as_str(), Framing::custom(Head::default));
    // Of a request's head; a session has its own.
    listen.conn.max_frame = Some(handshake::MAX_HEAD);
    listen.conn.idle_timeout = Duration::from_secs(10);
    let mut config = Config::max_connections(options.max_connections);
    config.memory_limit = Some(MEMORY_LIMIT);
    let mut server = Server::new(config)?;
    let id = server.listen(listen, |_app: &mut App, _peer| Upgrade)?;
    let addr = server.control().listener(id)?.addr;
    terminal::drain_on_signal(server.handle(), Duration::from_secs(5))?;
    terminal::say(&format!("listening on {addr} (websocket)"));
    let mut app = App {
        room: BTreeSet::new(),
        max_message: options.max_message,
    };
    Ok(server.run(&mut app)?)
}
