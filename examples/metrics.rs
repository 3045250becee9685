//! An echo server that can be watched: a second listener answers GET /metrics (for Prometheus), /tree and /closes, from the
//! same loop. Its places are its own: it answers when the echo is full.
//!
//!     cargo run --release --example metrics
//!     curl http://127.0.0.1:9222/metrics

use std::error::Error;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use portcullis::{
    Alarm, AlarmInfo, Close, Config, Context, Control, Framing, Handle, Handler, Listen, Metrics,
    Outcome, Quota, Server,
};

#[path = "support/terminal.rs"]
mod terminal;

/// The number of concurrent observers. They come on top of the served clients.
const WATCHERS: usize = 4;

/// Echoes frames, and shows what it does.
#[derive(Parser)]
struct Options {
    /// Where frames are echoed.
    #[arg(long, default_value = "127.0.0.1:2222")]
    listen: String,
    /// Address for observers. There is no authentication: keep it on loopback.
    #[arg(long, default_value = "127.0.0.1:9222")]
    metrics: String,
    /// The most connections that are served.
    #[arg(long, default_value_t = 1024)]
    max_connections: usize,
}

struct Echo;

impl Handler for Echo {
    fn on_frame(&mut self, cx: &mut Context<'_>, frame: &[u8]) -> Outcome {
        cx.conn.send(frame)?;
        Ok(())
    }
}

/// One HTTP request, by the line.
struct Page {
    handle: Handle,
    request: String,
    lines: usize,
}

impl Handler for Page {
    fn on_open(&mut self, cx: &mut Context<'_>) -> Outcome {
        cx.conn.set_timer(0, Duration::from_secs(10));
        Ok(())
    }

    fn on_timer(&mut self, _: &mut Context<'_>, _: u8) -> Outcome {
        Err(Close::because("a slow request"))
    }

    fn on_frame(&mut self, cx: &mut Context<'_>, line: &[u8]) -> Outcome {
        self.lines += 1;
        match (self.lines, line.trim_ascii_end()) {
            (1, line) => self.request = String::from_utf8_lossy(line).into_owned(),
            (_, []) => {
                // What follows is not read. The answer needs the whole server, which a job has, between two callbacks.
                cx.conn.pause();
                let (id, request) = (cx.conn.id(), std::mem::take(&mut self.request));
                self.handle.post(move |(), control| {
                    let answer = answer(&request, control);
                    if let Some(mut conn) = control.conn(id) {
                        let _ = conn.send(answer);
                        conn.close();
                    }
                })?;
            }
            (100.., _) => return Err(Close::because("too many headers")),
            _ => {}
        }
        Ok(())
    }
}

fn answer(request: &str, control: &Control<'_>) -> String {
    let (status, body) = match request.split(' ').collect::<Vec<_>>()[..] {
        ["GET", "/metrics", _] => ("200 OK", control.metrics().to_string()),
        ["GET", "/tree", _] => ("200 OK", format!("{}\n", control.tree(100))),
        ["GET", "/closes", _] => {
            let closes = control.recent_closes();
            (
                "200 OK",
                closes.iter().map(|close| format!("{close}\n")).collect(),
            )
        }
        _ => (
            "404 Not Found",
            "GET /metrics, /tree or /closes\n".to_owned(),
        ),
    };
    let (kind, length) = (Metrics::CONTENT_TYPE, body.len());
    format!("HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}")
}

fn main() -> ExitCode {
    let options = Options::parse();
    terminal::log_to_stderr();
    terminal::exit_code("metrics", serve(&options))
}

fn serve(options: &Options) -> Result<(), Box<dyn Error>> {
    let most = options.max_connections;
    let mut server = Server::new(Config::max_connections(most.saturating_add(WATCHERS)))?;
    let echo = Listen::tcp(options.listen.as_str(), Framing::Packet2).name("echo");
    let echo = server.listen(echo, |_app, _peer| Echo)?;
    let mut watch = Listen::tcp(options.metrics.as_str(), Framing::Line).name("metrics");
    watch.conn.max_frame = Some(8192);
    watch.max_connections = Some(WATCHERS);
    watch.reserved = WATCHERS;
    watch.evict_silent = false;
    let handle = server.handle();
    let watch = server.listen(watch, move |_app, _peer| Page {
        handle: handle.clone(),
        request: String::new(),
        lines: 0,
    })?;
    server.control().on_alarm(
        Alarm::Connections(Quota::Percent(90)),
        Duration::from_secs(60),
        |_, _, notice: &AlarmInfo| {
            terminal::complain(&notice.to_string());
        },
    )?;
    // Before the addresses are printed: their reader may send a signal at once.
    terminal::drain_on_signal(server.handle(), Duration::from_secs(5))?;
    terminal::say(&format!(
        "listening on {} (echo)",
        server.control().listener(echo)?.addr
    ));
    terminal::say(&format!(
        "listening on {} (metrics)",
        server.control().listener(watch)?.addr
    ));
    server.run(&mut ())?;
    Ok(())
}
