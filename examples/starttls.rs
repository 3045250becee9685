//! A mail server's first words: lines in the clear until the client says STARTTLS, TLS from there (RFC 3207).
//!
//!     cargo run --release --example starttls -- --tls-cert chain.pem --tls-key key.pem
//!     openssl s_client -connect 127.0.0.1:2525 -starttls smtp

use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use portcullis::tls::{self, rustls::ServerConfig};
use portcullis::{Config, Context, Framing, Handler, Listen, Outcome, Server};

#[path = "support/terminal.rs"]
mod terminal;

/// Greets as SMTP does, and upgrades to TLS on STARTTLS. It takes no mail.
#[derive(Debug, Parser)]
#[command(version, name = "starttls")]
struct Options {
    /// Where to listen; port 0 lets the system choose
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:2525")]
    listen: String,

    /// The certificate chain, the server's own first
    #[arg(long, value_name = "PEM")]
    tls_cert: PathBuf,

    /// Its private key
    #[arg(long, value_name = "PEM")]
    tls_key: PathBuf,
}

/// The state that all connections share. A new `tls` counts from the next STARTTLS on.
struct App {
    tls: Arc<ServerConfig>,
}

#[derive(Default)]
struct Session {
    /// As the client has named itself.
    client: Option<String>,
}

impl Handler<App> for Session {
    fn on_open(&mut self, cx: &mut Context<'_, App>) -> Outcome {
        cx.conn.send("220 localhost ESMTP\r\n")?;
        Ok(())
    }

    fn on_frame(&mut self, cx: &mut Context<'_, App>, line: &[u8]) -> Outcome {
        let line = String::from_utf8_lossy(line);
        let (verb, rest) = line
            .trim_end()
            .split_once(' ')
            .unwrap_or((line.trim_end(), ""));
        let secure = cx.conn.tls().is_some();
        match (verb.to_ascii_uppercase().as_str(), rest) {
            ("EHLO", name) => {
                self.client = Some(name.to_owned());
                let offer = if secure { "" } else { "250-STARTTLS\r\n" };
                cx.conn
                    .send(format!("250-localhost\r\n{offer}250 HELP\r\n"))?;
            }
            ("STARTTLS", "") if !secure => {
                // In the clear; everything behind it is not.
                cx.conn.send("220 Go ahead\r\n")?;
                cx.conn.start_tls(Arc::clone(&cx.app.tls))?;
            }
            ("STARTTLS", "") => cx.conn.send("503 TLS is on already\r\n")?,
            ("STARTTLS", _) => cx.conn.send("501 No parameters allowed\r\n")?,
            ("HELP", _) => {
                let name = self.client.as_deref().unwrap_or("stranger");
                let how = if secure { "behind TLS" } else { "in the clear" };
                cx.conn
                    .send(format!("214 Hello {name}, we talk {how}\r\n"))?;
            }
            ("QUIT", _) => {
                cx.conn.send("221 Bye\r\n")?;
                cx.conn.close();
            }
            _ => cx.conn.send("502 Not here\r\n")?,
        }
        Ok(())
    }

    fn on_secured(&mut self, _cx: &mut Context<'_, App>) -> Outcome {
        // RFC 3207 section 4.2: what was said in the clear is forgotten.
        *self = Self::default();
        Ok(())
    }
}

fn main() -> ExitCode {
    let options = Options::parse();
    terminal::log_to_stderr();
    terminal::exit_code("starttls", serve(&options))
}

fn serve(options: &Options) -> Result<(), Box<dyn Error>> {
    let tls = tls::server_config(&options.tls_cert, &options.tls_key)?;
    let mut listen = Listen::tcp(options.listen.as_str(), Framing::Line).name("mail");
    listen.conn.max_frame = Some(512);
    // `evict_silent` stays on: at the cap a client that has sent no command for so long makes room.
    listen.conn.idle_timeout = Duration::from_secs(300);
    let mut server = Server::new(Config::new())?;
    server.listen(listen, |_app, _peer| Session::default())?;
    let addr = server.control().listener("mail")?.addr;
    // Before the address is printed: its reader may send a signal at once.
    terminal::drain_on_signal(server.handle(), Duration::from_secs(5))?;
    terminal::say(&format!("listening on {addr} (lines, STARTTLS)"));
    server.run(&mut App { tls })?;
    Ok(())
}
