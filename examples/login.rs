//! Lines with a login and STARTTLS, then a session in packets: handler and framing are replaced on the open connection.
//!
//!     cargo run --release --example login -- 127.0.0.1:2929 chain.pem key.pem
//!     openssl s_client -connect 127.0.0.1:2929 -starttls smtp -quiet      (EHLO is understood; then: LOGIN ada secret)
//!
//! Passwords are accepted over TLS alone. After the login a client speaks packet-2: each frame
//! comes back with the user's name and a number.

use std::sync::Arc;
use std::time::Duration;

use portcullis::tls::rustls::ServerConfig;
use portcullis::tls::server_config;
use portcullis::{Close, Config, Context, Framing, Handler, Listen, Outcome, Server};

#[path = "support/terminal.rs"]
mod terminal;

/// The timer of the login.
const LOGIN: u8 = 0;

struct App {
    tls: Arc<ServerConfig>,
    sessions: u64,
}

/// Before the login: a stranger, in lines.
#[derive(Default)]
struct Stranger {
    failures: u8,
}

/// After the login: a user, in packets. The stranger's state is carried over.
struct Session {
    user: String,
    number: u64,
    frames: u64,
}

impl Handler<App> for Stranger {
    fn on_open(&mut self, cx: &mut Context<'_, App>) -> Outcome {
        cx.conn.set_timer(LOGIN, Duration::from_secs(30));
        cx.conn.send("220 hello\r\n")?;
        Ok(())
    }

    fn on_frame(&mut self, cx: &mut Context<'_, App>, line: &[u8]) -> Outcome {
        let line = std::str::from_utf8(line)?;
        let words: Vec<_> = line.split_whitespace().collect();
        let verb = words
            .first()
            .map(|verb| verb.to_ascii_uppercase())
            .unwrap_or_default();
        let secure = cx.conn.tls().is_some();
        match (verb.as_str(), &words[words.len().min(1)..]) {
            ("EHLO", _) if secure => cx.conn.send("250 LOGIN\r\n")?,
            ("EHLO", _) => cx.conn.send("250 STARTTLS\r\n")?,
            ("STARTTLS", []) if !secure => {
                cx.conn.send("220 go ahead\r\n")?;
                cx.conn.start_tls(Arc::clone(&cx.app.tls))?;
            }
            ("LOGIN", _) if !secure => cx.conn.send("530 STARTTLS first\r\n")?,
            ("LOGIN", [user, "secret"]) => {
                cx.app.sessions += 1;
                let session = Session {
                    user: (*user).to_owned(),
                    number: cx.app.sessions,
                    frames: 0,
                };
                // The answer is the last line; what the client has sent behind its own is cut as packets already.
                cx.conn
                    .send(format!("230 session {}\r\n", session.number))?;
                cx.conn.cancel_timer(LOGIN);
                cx.conn.set_framing(&Framing::Packet2);
                cx.conn.replace_handler(session);
            }
            ("LOGIN", _) => {
                cx.conn.send("535 no\r\n")?;
                self.failures += 1;
                if self.failures == 3 {
                    return Err(Close::because("three wrong passwords"));
                }
            }
            _ => cx.conn.send("500 EHLO, STARTTLS or LOGIN\r\n")?,
        }
        Ok(())
    }

    fn on_secured(&mut self, _cx: &mut Context<'_, App>) -> Outcome {
        // RFC 3207 section 4.2: an attacker may have sent anything in the clear.
        *self = Self::default();
        Ok(())
    }

    fn on_timer(&mut self, cx: &mut Context<'_, App>, _key: u8) -> Outcome {
        cx.conn.send("421 too slow\r\n")?;
        Err(Close::because("no login"))
    }
}

impl Handler<App> for Session {
    fn on_frame(&mut self, cx: &mut Context<'_, App>, frame: &[u8]) -> Outcome {
        self.frames += 1;
        let head = format!(
            "{}, session {}, frame {}: ",
            self.user, self.number, self.frames
        );
        cx.conn.send([head.as_bytes(), frame].concat())?;
        Ok(())
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    terminal::log_to_stderr();
    let mut arguments = std::env::args().skip(1);
    let (Some(addr), Some(chain), Some(key)) =
        (arguments.next(), arguments.next(), arguments.next())
    else {
        return Err("usage: login HOST:PORT CHAIN.PEM KEY.PEM".into());
    };
    let tls = server_config(chain, key)?;
    let mut server = Server::new(Config::new())?;
    // `evict_silent` stays on: at the cap a stranger that has sent nothing makes room.
    let mut listen = Listen::tcp(addr.as_str(), Framing::Line);
    listen.conn.max_frame = Some(512);
    let id = server.listen(listen, |_app, _peer| Stranger::default())?;
    // Before the address is printed: its reader may send a signal at once.
    terminal::drain_on_signal(server.handle(), Duration::from_secs(5))?;
    terminal::say(&format!(
        "listening on {} (lines, then packet-2)",
        server.control().listener(id)?.addr
    ));
    server.run(&mut App { tls, sessions: 0 })?;
    Ok(())
}
