//! Socket activation: an echo server for lines on the sockets that its starter passes on (`sd_listen_fds(3)`), TCP and Unix,
//! and on a port of its own if there are none. Names of sockets become names of listeners, which
//! `Peer::listener_name` and `Control::listener` know. SIGTERM and SIGINT drain.
//!
//!     cargo build --example activation
//!     systemd-socket-activate -l 127.0.0.1:2222 -l [::1]:2222 -l /tmp/echo.sock --fdname=v4:v6:local target/debug/examples/activation
//!     target/debug/examples/activation 127.0.0.1:2222

use std::error::Error;
use std::process::ExitCode;
use std::time::Duration;

use portcullis::{Config, Context, Framing, Handler, Listen, Outcome, Peer, Server};

#[path = "support/passed.rs"]
mod passed;
#[path = "support/terminal.rs"]
mod terminal;

struct Echo;

impl Handler for Echo {
    fn on_frame(&mut self, cx: &mut Context<'_>, line: &[u8]) -> Outcome {
        cx.conn.send(line)?;
        Ok(())
    }
}

fn main() -> ExitCode {
    terminal::log_to_stderr();
    terminal::exit_code("activation", serve())
}

fn serve() -> Result<(), Box<dyn Error>> {
    let mut server = Server::new(Config::new())?;
    let echo = |_app: &mut (), _peer: Peer| Echo;
    let passed = passed::sockets(Framing::Line)?;
    if passed.is_empty() {
        let addr = std::env::args()
            .nth(1)
            .unwrap_or_else(|| "127.0.0.1:0".to_owned());
        server.listen(Listen::tcp(addr, Framing::Line), echo)?;
    }
    for listen in passed {
        server.listen(listen, echo)?;
    }
    // Before the addresses are printed: their reader may send a signal at once.
    terminal::drain_on_signal(server.handle(), Duration::from_secs(10))?;
    for listener in server.control().listeners() {
        terminal::say(&format!("listening on {}", listener.addr));
    }
    server.run(&mut ())?;
    Ok(())
}
