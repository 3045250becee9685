//! A line echo over TLS that reads its certificate anew on SIGHUP, as after a renewal. Clients that are connected do not notice.
//!
//!     cargo run --release --example tls_reload -- --tls-cert chain.pem --tls-key key.pem

use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use portcullis::{tls, Config, Context, Framing, Handle, Handler, Listen, Outcome, Server};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

#[path = "support/terminal.rs"]
mod terminal;

/// A line echo over TLS. SIGHUP reads certificate and key anew, SIGTERM and SIGINT drain; a second one aborts.
#[derive(Debug, Parser)]
#[command(version, name = "tls_reload")]
struct Options {
    /// Where to listen; port 0 lets the system choose
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:2222")]
    listen: String,

    /// The certificate chain, the server's own first
    #[arg(long, value_name = "PEM")]
    tls_cert: PathBuf,

    /// Its private key
    #[arg(long, value_name = "PEM")]
    tls_key: PathBuf,
}

const LISTENER: &str = "echo";

struct Echo;

impl Handler for Echo {
    fn on_frame(&mut self, cx: &mut Context<'_>, line: &[u8]) -> Outcome {
        cx.conn.send(line)?;
        Ok(())
    }
}

fn main() -> ExitCode {
    let options = Options::parse();
    terminal::log_to_stderr();
    terminal::exit_code("tls_reload", serve(options))
}

fn serve(options: Options) -> Result<(), Box<dyn Error>> {
    let config = tls::server_config(&options.tls_cert, &options.tls_key)?;
    let listen = Listen::tcp(options.listen.as_str(), Framing::Line)
        .name(LISTENER)
        .tls(config);
    let mut server = Server::new(Config::new())?;
    server.listen(listen, |_app, _peer| Echo)?;
    let addr = server.control().listener(LISTENER)?.addr;
    // Before the address is printed: its reader may send a signal at once.
    obey_signals(server.handle(), options)?;
    terminal::say(&format!("listening on {addr} (line, TLS)"));
    server.run(&mut ())?;
    Ok(())
}

/// On a thread of its own: reading files would keep the loop from its clients.
fn obey_signals(handle: Handle, options: Options) -> std::io::Result<()> {
    let mut signals = Signals::new([SIGHUP, SIGTERM, SIGINT])?;
    std::thread::spawn(move || {
        let mut draining = false;
        for signal in signals.forever() {
            if signal == SIGHUP {
                match reload(&handle, &options) {
                    Ok(()) => log::info!(
                        "new connections get the certificate that {} holds now",
                        options.tls_cert.display()
                    ),
                    // The error names the file. Nothing has changed.
                    Err(error) => log::error!("the certificate stays as it was: {error}"),
                }
            } else if std::mem::replace(&mut draining, true) {
                std::process::exit(1);
            } else {
                // It fails only if the server is gone already.
                let _ = handle.drain(Duration::from_secs(10));
            }
        }
    });
    Ok(())
}

/// All or nothing: a file that cannot be used is found before the server is asked for anything.
fn reload(handle: &Handle, options: &Options) -> Result<(), Box<dyn Error>> {
    let config = tls::server_config(&options.tls_cert, &options.tls_key)?;
    handle.change(Duration::from_secs(5), move |control| {
        control.set_tls(LISTENER, config.clone())
    })?;
    Ok(())
}
