//! Requests and responses over packet-4: four bytes of number, then the payload; the answer bears the same number.
//!
//!     cargo run --release --example rpc -- 127.0.0.1:2626
//!
//! Clients may have many requests under way. A request that the server does not understand is answered with an error; bytes
//! that are no request end the connection with a reason.

use std::collections::BTreeMap;
use std::error::Error;
use std::fmt;
use std::time::Duration;

use portcullis::{Config, Context, Framing, Handler, Listen, Outcome, Server};

#[path = "support/terminal.rs"]
mod terminal;

/// What all connections share: a table of words.
type Words = BTreeMap<String, String>;

struct Session {
    requests: u32,
}

/// Bytes that are no request. As an error it closes the connection through `?`, and is the cause in its report.
#[derive(Debug)]
struct Malformed(&'static str);

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "malformed request: {}", self.0)
    }
}

impl Error for Malformed {}

impl Handler<Words> for Session {
    fn on_frame(&mut self, cx: &mut Context<'_, Words>, frame: &[u8]) -> Outcome {
        let (number, request) = frame
            .split_first_chunk::<4>()
            .ok_or(Malformed("no number"))?;
        let request = std::str::from_utf8(request).map_err(|_| Malformed("not text"))?;
        self.requests += 1;
        let answer = match request.split(' ').collect::<Vec<_>>()[..] {
            ["get", key] => cx.app.get(key).cloned().ok_or("no such key"),
            ["set", key, value] => {
                cx.app.insert(key.to_owned(), value.to_owned());
                Ok("done".to_owned())
            }
            ["count"] => Ok(self.requests.to_string()),
            _ => Err("unknown request"),
        };
        let answer = answer.unwrap_or_else(|error| format!("error: {error}"));
        cx.conn.send([&number[..], answer.as_bytes()].concat())?;
        Ok(())
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    terminal::log_to_stderr();
    let addr = std::env::args()
        .nth(1)
        .unwrap_or_else(|| "127.0.0.1:2626".to_owned());
    let mut server = Server::new(Config::new())?;
    let mut listen = Listen::tcp(addr.as_str(), Framing::Packet4);
    listen.conn.max_frame = Some(64 * 1024);
    listen.conn.idle_timeout = Duration::from_secs(60);
    let id = server.listen(listen, |_app, _peer| Session { requests: 0 })?;
    // Before the address is printed: its reader may send a signal at once.
    terminal::drain_on_signal(server.handle(), Duration::from_secs(5))?;
    terminal::say(&format!(
        "listening on {} (packet-4)",
        server.control().listener(id)?.addr
    ));
    server.run(&mut Words::new())?;
    Ok(())
}
