//! A service as systemd and haproxy run it: an echo for lines, on sockets that are passed on,
//! behind proxies that send the client's address. It is stopped and started without a lost request.
//! Its units and haproxy's configuration are in `deploy/`.
//!
//!     cargo run --release --example service -- --listen 127.0.0.1:2222

use std::error::Error;
use std::time::Duration;

use clap::Parser;
use portcullis::{
    AccessRules, Config, Context, Framing, Handle, Handler, Listen, Outcome, ProxyProtocol, Server,
};

#[path = "support/passed.rs"]
mod passed;
#[path = "support/terminal.rs"]
mod terminal;

/// An echo for lines: "whoami" is answered with the client's address.
#[derive(Debug, Parser)]
#[command(version, name = "service")]
struct Options {
    /// Where to listen if no socket is passed on (LISTEN_FDS)
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:2222")]
    listen: String,

    /// Every connection comes from such a proxy and begins with a PROXY header; may be given often
    #[arg(long, value_name = "CIDR")]
    trusted_proxy: Vec<String>,

    /// The most connections at one time; more wait in the backlog
    #[arg(long, value_name = "N", default_value_t = 1024)]
    max_connections: usize,

    /// The most bytes that all clients together may make the server buffer
    #[arg(long, value_name = "BYTES", default_value_t = 64 * 1024 * 1024)]
    memory_limit: usize,

    /// How long SIGTERM waits for clients to finish
    #[arg(long, value_name = "SECS", default_value_t = 20)]
    grace: u64,
}

/// How long a client that has connected and not asked yet is waited for at the end.
const FIRST_WORD: Duration = Duration::from_secs(2);

#[derive(Default)]
struct Echo {
    asked: bool,
}

impl Handler for Echo {
    fn on_frame(&mut self, cx: &mut Context<'_>, line: &[u8]) -> Outcome {
        self.asked = true;
        if line == b"whoami\n" {
            cx.conn.send(format!("{}\n", cx.conn.source()))?;
        } else {
            cx.conn.send(line)?;
        }
        if cx.conn.is_draining() {
            cx.conn.close_after_input();
        }
        Ok(())
    }

    /// A client that has just connected is still owed an answer; all others have had theirs, or get
    /// it behind this.
    fn on_drain(&mut self, cx: &mut Context<'_>) -> Outcome {
        if self.asked {
            cx.conn.close_after_input();
        } else {
            cx.conn.set_timer(0, FIRST_WORD);
        }
        Ok(())
    }

    fn on_timer(&mut self, cx: &mut Context<'_>, _key: u8) -> Outcome {
        cx.conn.close_after_input();
        Ok(())
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let options = Options::parse();
    terminal::log_to_stderr();
    let mut config = Config::max_connections(options.max_connections);
    config.memory_limit = Some(options.memory_limit);
    let mut server = Server::new(config)?;
    let sockets = passed::sockets(Framing::Line)?;
    let are_passed = !sockets.is_empty();
    if are_passed {
        for listen in sockets {
            server.listen(behind(listen, &options)?, |_app, _peer| Echo::default())?;
        }
    } else {
        let listen = behind(
            Listen::tcp(options.listen.as_str(), Framing::Line),
            &options,
        )?;
        server.listen(listen, |_app, _peer| Echo::default())?;
    }
    let grace = Duration::from_secs(options.grace);
    end_on_sigterm(server.handle(), are_passed, grace)?;
    for listener in server.control().listeners() {
        terminal::say(&format!("listening on {} (line)", listener.addr));
    }
    server.run(&mut ())?;
    if let Some(report) = server.control().drain_report() {
        terminal::say(&format!(
            "drained: {} ended in order, {} otherwise, {} were forced",
            report.ended, report.failed, report.forced
        ));
    }
    Ok(())
}

fn behind(mut listen: Listen, options: &Options) -> portcullis::Result<Listen> {
    listen.conn.max_frame = Some(4096);
    if options.trusted_proxy.is_empty() {
        return Ok(listen);
    }
    let mut proxies = options.trusted_proxy.iter();
    let trusted = proxies.try_fold(AccessRules::deny_all(), |rules, proxy| rules.allow(proxy))?;
    listen.proxy_protocol = ProxyProtocol::Required;
    listen.trusted_proxies = Some(trusted);
    Ok(listen)
}

fn end_on_sigterm(handle: Handle, are_passed: bool, grace: Duration) -> std::io::Result<()> {
    use signal_hook::consts::{SIGINT, SIGTERM};
    let mut signals = signal_hook::iterator::Signals::new([SIGTERM, SIGINT])?;
    std::thread::spawn(move || {
        signals.forever().next();
        // It fails only if the server is gone already.
        let _ = handle.post(move |_, control| {
            // A socket that was passed on is systemd's too: clients in its queue are left to the
            // next process.
            for listener in control.listeners().iter().filter(|_| are_passed) {
                let _ = control.close_listener(listener.id);
            }
            control.drain(grace);
        });
    });
    Ok(())
}
