//! A TCP/TLS proxy: each client is connected to a server behind it, and bytes go both ways.
//!
//!     cargo run --release --example proxy -- --listen 127.0.0.1:2222 --to 127.0.0.1:7
//!     cargo run --release --example proxy -- --to 10.0.0.7:443 --tls-to backend.example.org --ca ca.pem
//!
//! Nothing is lost and nothing piles up: a side that is fast waits for the one that is slow. An end is passed on in the direction in
//! which it came, and so is a reset.

use std::error::Error;
use std::time::Duration;

use clap::Parser;
use portcullis::{
    tls, Addr, Close, CloseReason, Closed, Config, Conn, ConnConfig, ConnId, Connect, Context,
    Framing, Handler, Keepalive, Listen, Outcome, Server,
};

#[path = "support/proxy_options.rs"]
mod options;
#[path = "support/terminal.rs"]
mod terminal;
use options::Options;

/// How each client's connection to the server behind is made.
type Behind = (Addr, Connect);
type Cx<'a> = Context<'a, Behind>;

/// One side of a pair. A client's has no other before it is open.
struct Side(Option<ConnId>);

impl Handler<Behind> for Side {
    fn on_open(&mut self, cx: &mut Cx<'_>) -> Outcome {
        if self.0.is_none() {
            let (to, connect) = cx.app.clone();
            let back = Self(Some(cx.conn.id()));
            self.0 = Some(
                cx.conn
                    .control()
                    .connect(to, connect, back)
                    .map_err(|_| Close::abort())?,
            );
        }
        Ok(())
    }

    fn on_frame(&mut self, cx: &mut Cx<'_>, bytes: &[u8]) -> Outcome {
        let Some(mut other) = self.0.and_then(|id| cx.conn.peer(id)) else {
            return Err(Close::abort());
        };
        other.send(bytes)?;
        if other.is_congested() {
            cx.conn.pause();
        }
        Ok(())
    }

    fn on_writable(&mut self, cx: &mut Cx<'_>) -> Outcome {
        self.with_other(cx, |other| other.resume())
    }

    fn on_finish(&mut self, cx: &mut Cx<'_>) -> Outcome {
        self.with_other(cx, |other| other.finish())
    }

    /// Both sides have until the end of the grace period.
    fn on_drain(&mut self, _: &mut Cx<'_>) -> Outcome {
        Ok(())
    }

    fn on_close(&mut self, cx: &mut Cx<'_>, closed: &Closed) {
        let _ = self.with_other(cx, |other| match closed.reason {
            CloseReason::Finished => other.close(),
            _ => other.abort(),
        });
    }

    fn on_connect_failed(&mut self, cx: &mut Cx<'_>, _: &Closed) {
        let _ = self.with_other(cx, |other| other.abort());
    }
}

impl Side {
    fn with_other(&self, cx: &mut Cx<'_>, act: impl FnOnce(&mut Conn<'_, Behind>)) -> Outcome {
        if let Some(mut other) = self.0.and_then(|id| cx.conn.peer(id)) {
            act(&mut other);
        }
        Ok(())
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let options = Options::parse();
    terminal::log_to_stderr();
    let keepalive = Keepalive {
        time: Duration::from_secs(60),
        interval: Duration::from_secs(10),
        retries: 6,
    };
    // Each direction waits for its own reader only, and may be silent while the other speaks.
    let relay = |conn: &mut ConnConfig| {
        conn.full_duplex = true;
        conn.idle_timeout = Duration::MAX;
    };
    let mut front = Listen::tcp(&options.listen, Framing::Raw);
    relay(&mut front.conn);
    front.socket.keepalive = Some(keepalive);
    front.max_connections = Some(options.max_clients);
    // Where the server behind speaks first, a client may think before it does.
    front.evict_silent = false;
    if let (Some(chain), Some(key)) = (&options.tls_cert, &options.tls_key) {
        front = front.tls(tls::server_config(chain, key)?);
    }
    let mut back = Connect::new(Framing::Raw);
    relay(&mut back.conn);
    back.socket.keepalive = Some(keepalive);
    if let (Some(name), Some(roots)) = (&options.tls_to, &options.ca) {
        back = back.tls(tls::client_config(roots)?, name);
    }
    let mut server = Server::new(Config::max_connections(2 * options.max_clients))?;
    let id = server.listen(front, |_app, _peer| Side(None))?;
    // Before the address is printed: its reader may send a signal at once.
    terminal::drain_on_signal(server.handle(), Duration::from_secs(5))?;
    terminal::say(&format!(
        "listening on {} (to {})",
        server.control().listener(id)?.addr,
        options.to
    ));
    server.run(&mut (options.to.clone(), back))?;
    Ok(())
}
