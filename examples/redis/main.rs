//! A small Redis server: strings, counters, lists, expiry, PUB/SUB, pipelines; RESP2 and inline
//! commands. See `README.md` for its limits.
//!
//!     cargo run --release --example redis -- --listen 127.0.0.1:6379      (then: redis-cli)

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;
use portcullis::{
    AtCapacity, Close, Closed, Config, ConnId, Context, Framing, Handler, Keepalive, Listen,
    Outcome, SendError, Server, Turn,
};

mod commands;
mod connection;
mod db;
mod glob;
mod keys;
mod lists;
mod protocol;
mod pubsub;
mod strings;
#[path = "../support/terminal.rs"]
mod terminal;

use db::Db;
use protocol::{Batch, Commands, Reply};
use pubsub::{Topic, Topics};

const MIB: usize = 1024 * 1024;

/// Serves the protocol of Redis (RESP2) from memory.
#[derive(Debug, Parser)]
#[command(version, name = "redis")]
struct Options {
    /// Where to listen; port 0 lets the system choose
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:6379")]
    listen: String,

    /// The most clients at one time
    #[arg(long, value_name = "N", default_value_t = 1000)]
    max_clients: usize,

    /// The most bytes of keys, values and subscriptions; a write above it is answered with OOM
    #[arg(long, value_name = "BYTES", default_value_t = 1024 * MIB)]
    maxmemory: usize,

    /// The longest command with all its arguments
    #[arg(long, value_name = "BYTES", default_value_t = 256 * MIB, value_parser = command_limit)]
    max_command: usize,

    /// The most bytes of replies that wait for one client, and one reply more
    #[arg(long, value_name = "BYTES", default_value_t = 256 * MIB, value_parser = output_limit)]
    output_limit: usize,

    /// As --output-limit, for a client that has subscribed
    #[arg(long, value_name = "BYTES", default_value_t = 32 * MIB, value_parser = output_limit)]
    subscriber_limit: usize,

    /// The most bytes that all clients together may make the server buffer
    #[arg(long, value_name = "BYTES", default_value_t = 1024 * MIB)]
    buffer_limit: usize,
}

fn command_limit(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(bytes @ ..=protocol::MAX_COMMAND) => Ok(bytes),
        Ok(_) => Err(format!("use at most {}", protocol::MAX_COMMAND)),
        Err(error) => Err(format!("not a number of bytes: {error}")),
    }
}

fn output_limit(text: &str) -> Result<usize, String> {
    const MIN: usize = 128 * 1024; // the high watermark
    match text.parse() {
        Ok(bytes @ MIN..) => Ok(bytes),
        Ok(_) => Err(format!("use at least {MIN}")),
        Err(error) => Err(format!("not a number of bytes: {error}")),
    }
}

/// The state that all connections share.
struct App {
    db: Db,
    /// The subscribers of channels and patterns.
    topics: Topics,
    /// The buffer of the last replies.
    spare: Vec<u8>,
    /// The number and the name of each client.
    clients: BTreeMap<ConnId, (u64, String)>,
    options: Options,
    started: Instant,
    connections: u64,
    commands: u64,
    /// Number of clients that were closed at their output limit.
    evicted: u64,
}

/// One connection.
#[derive(Default)]
struct Client {
    number: u64,
    /// Channels and patterns of the client.
    topics: BTreeSet<Topic>,
    has_quit: bool,
}

impl Handler<App> for Client {
    fn on_open(&mut self, cx: &mut Context<'_, App>) -> Outcome {
        cx.app.connections += 1;
        self.number = cx.app.connections;
        let client = (self.number, String::new());
        cx.app.clients.insert(cx.conn.id(), client);
        Ok(())
    }

    fn on_frame(&mut self, cx: &mut Context<'_, App>, commands: &[u8]) -> Outcome {
        // The framer has just parsed them.
        let Some(batch) = cx.conn.framer().map(Commands::take_batch) else {
            return Ok(());
        };
        let spare = std::mem::take(&mut cx.app.spare);
        let mut reply = Reply::new(cx.app.options.output_limit, spare);
        if !self.run(cx, &batch, commands, &mut reply) {
            cx.app.evicted += 1;
            return Err(Close::abort()); // at once, with all that is pending
        }
        cx.app.spare = reply.into_bytes();
        if self.has_quit {
            cx.conn.close();
        }
        if let Some(framer) = cx.conn.framer::<Commands>() {
            framer.reuse(batch);
        }
        Ok(())
    }

    /// The next command has no known beginning.
    fn on_bad_input(&mut self, cx: &mut Context<'_, App>, closed: &Closed) -> Outcome {
        if let Some(error) = &closed.error {
            cx.conn.send(format!("-ERR Protocol error: {error}\r\n"))?;
        }
        Ok(())
    }

    fn on_close(&mut self, cx: &mut Context<'_, App>, _: &Closed) {
        cx.app.clients.remove(&cx.conn.id());
        pubsub::unsubscribe_all(self, cx);
    }
}

impl Client {
    /// Runs a batch of commands, and queues the replies. False if a reply, or all that are pending,
    /// are longer than the output limit.
    fn run(
        &mut self,
        cx: &mut Context<'_, App>,
        batch: &Batch,
        commands: &[u8],
        reply: &mut Reply,
    ) -> bool {
        for number in 0..batch.len() {
            let (mut few, mut many) = ([&[][..]; 4], Vec::new());
            let words = batch.words(number, commands, &mut few, &mut many);
            let [name, args @ ..] = words else {
                continue; // `*0`, or an empty line
            };
            cx.app.db.update_clock();
            reply.begin();
            if let Err(failure) = commands::run(self, cx, name, args, reply) {
                reply.error(&failure);
            }
            if reply.is_cut() || reply.is_due() && is_full(reply.send(&mut cx.conn)) {
                return false;
            }
            if self.has_quit {
                break;
            }
        }
        !is_full(reply.send(&mut cx.conn))
    }
}

fn is_full(sent: Result<(), SendError>) -> bool {
    matches!(sent, Err(SendError::Full { .. }))
}

fn main() -> ExitCode {
    let options = Options::parse();
    terminal::log_to_stderr();
    terminal::exit_code("redis", serve(options))
}

fn serve(options: Options) -> Result<(), Box<dyn Error>> {
    let mut config = Config::max_connections(options.max_clients);
    config.memory_limit = Some(options.buffer_limit);
    let mut server = Server::new(config)?;
    let id = server.listen(listen(&options), |_app, _peer| Client::default())?;
    let addr = server.control().listener(id)?.addr;
    // Before the address is printed: its reader may send a signal at once.
    terminal::drain_on_signal(server.handle(), Duration::from_secs(5))?;
    terminal::say(&format!("listening on {addr} (redis)"));

    let mut app = App {
        db: Db::new(options.maxmemory),
        topics: Topics::new(),
        spare: Vec::new(),
        clients: BTreeMap::new(),
        options,
        started: Instant::now(),
        connections: 0,
        commands: 0,
        evicted: 0,
    };
    // A step of the expiry between two iterations. The loop sleeps until the next key expires.
    loop {
        let next = app.db.expire();
        if server.poll_once(&mut app, next)? != Turn::Continue {
            return Ok(());
        }
    }
}

fn listen(options: &Options) -> Listen {
    let limit = options.max_command;
    let framing = Framing::custom(move || Commands::new(limit));
    let mut listen = Listen::tcp(options.listen.as_str(), framing);
    listen.at_capacity = AtCapacity::Refuse {
        farewell: b"-ERR max number of clients reached\r\n".to_vec(),
    };
    listen.socket.keepalive = Some(Keepalive {
        time: Duration::from_secs(300),
        interval: Duration::from_secs(60),
        retries: 5,
    });
    // The framer has the exact limit, with an error that is answered. Inline commands have their own.
    listen.conn.max_frame = Some(limit.saturating_add(2 * protocol::MAX_INLINE));
    listen.conn.output_limit = options.output_limit;
    // Clients may write a whole pipeline before they read the first reply.
    listen.conn.full_duplex = true;
    listen.conn.write_timeout = Duration::from_secs(60);
    // Pools and subscribers are silent for days. Keepalive finds the clients that have vanished.
    listen.conn.idle_timeout = Duration::MAX;
    listen
}
