//! The observer in a terminal: limits, rates, listeners and the first connections of a server.
//!
//!     cargo run --release --example echo -- --observer 127.0.0.1:9222
//!     cargo run --release --example top -- 127.0.0.1:9222 [FILTER]
//!
//! q and c quit; u, t, a and d sort by queue, traffic, age and address; r reverses.

use std::error::Error;
use std::io::{self, BufRead, BufReader, IsTerminal, Write};
use std::net::TcpStream;
use std::process::ExitCode;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use crossterm::event::{self, KeyCode};
use crossterm::terminal::{self as screen, EnterAlternateScreen, LeaveAlternateScreen};
use crossterm::{cursor::Hide, cursor::Show, execute, style::Print};
use serde_json::Value;

#[path = "support/terminal.rs"]
mod terminal;

struct Query {
    addr: String,
    filter: String,
    sort: &'static str,
    order: &'static str,
}

/// Reads the events on a thread, which ends with the receiver.
fn follow(query: &Query) -> io::Result<Receiver<(String, Value)>> {
    let mut stream = TcpStream::connect(query.addr.as_str())?;
    let filter = query.filter.bytes().map(|byte| format!("%{byte:02x}"));
    let (filter, sort, order) = (filter.collect::<String>(), query.sort, query.order);
    let target = format!("/events?sort={sort}&order={order}&filter={filter}");
    let request = format!("GET {target} HTTP/1.1\r\nHost: {}\r\n\r\n", query.addr);
    stream.write_all(request.as_bytes())?;
    let mut lines = BufReader::new(stream).lines();
    let status = lines.next().unwrap_or(Ok(String::new()))?;
    if !status.contains(" 200 ") {
        return Err(io::Error::other(format!("the answer is {status:?}")));
    }
    let (tell, told) = mpsc::channel();
    thread::spawn(move || {
        let mut name = String::new();
        for line in lines.map_while(Result::ok) {
            match line.split_once(": ") {
                Some(("event", text)) => name = text.to_owned(),
                Some(("data", data)) => {
                    let data = serde_json::from_str(data).unwrap_or_default();
                    if tell.send((name.clone(), data)).is_err() {
                        return;
                    }
                }
                _ => {}
            }
        }
    });
    Ok(told)
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_default()
}

fn bytes(value: &Value) -> String {
    let number = number(value);
    let units = [(1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")];
    match units.into_iter().find(|(size, _)| number >= *size) {
        Some((size, unit)) => format!("{:.1} {unit}B", number / size),
        None => format!("{number:.0} B"),
    }
}

/// A text of the server, without what could command the terminal.
fn text(value: &Value) -> String {
    let text = value.as_str().unwrap_or_default();
    text.replace(char::is_control, "?")
}

/// A limit as a bar of twenty.
fn bar(title: &str, now: &Value, most: &Value, shown: fn(&Value) -> String) -> String {
    let part = number(now) / most.as_f64().unwrap_or(f64::MAX).max(1.0);
    let full = "|".repeat((part.clamp(0.0, 1.0) * 20.0).round() as usize);
    let limit = most.as_f64().map_or("no limit".to_owned(), |_| shown(most));
    format!("{title:<12}[{full:<20}] {} of {limit}", shown(now))
}

fn row(cells: &str) -> String {
    let widths = [11, 9, 22, 12, 9, 9, 9, 9, 9, 0];
    let cells = cells.split('\t').zip(widths).enumerate();
    let padded = cells.map(|(at, (cell, width))| match at {
        0..4 => format!("{cell:<width$} "),
        _ => format!("{cell:>width$} "),
    });
    padded.collect()
}

fn connection(info: &Value) -> String {
    let texts = ["id", "listener", "source", "state"].map(|name| text(&info[name]));
    let times = ["age", "idle"].map(|name| format!("{:.1} s", number(&info[name])));
    let traffic = ["bytes_in", "bytes_out"].map(|name| bytes(&info["traffic"][name]));
    let held = ["paused", "congested", "throttled", "paused_for_memory"];
    let held = held.map(|name| if info[name] == true { name } else { "" });
    let sizes = [traffic.join("\t"), bytes(&info["queued"]), held.concat()];
    row(&[texts.join("\t"), times.join("\t"), sizes.join("\t")].join("\t"))
}

/// The lines of a screen.
fn lines(snapshot: &Value, found: &Value) -> Vec<String> {
    let (stats, rates) = (&snapshot["stats"], &snapshot["rates"]);
    let (fds, fd_limit) = (&snapshot["descriptors"], &snapshot["descriptor_limit"]);
    let (most, memory) = (&stats["max_connections"], &snapshot["memory_limit"]);
    let mut lines = vec![
        bar("connections", &stats["open"], most, Value::to_string),
        bar("descriptors", fds, fd_limit, Value::to_string),
        bar("buffers", &stats["memory"], memory, bytes),
    ];
    let rate = |name: &str| format!("{:.0} {name}", number(&rates[name]));
    let names = "accepted closed frames_in frames_out bytes_in bytes_out".split(' ');
    let all: Vec<String> = names.map(rate).collect();
    lines.push(format!("per second  {}", all.join(", ")));
    for listener in snapshot["listeners"].as_array().into_iter().flatten() {
        let [id, name, state] = ["id", "name", "state"].map(|field| text(&listener[field]));
        let (now, most) = (&listener["connections"], &listener["max_connections"]);
        let closed = &listener["closed"];
        let line = format!("{id:<12}{name}: {state}, {now} of {most}; {closed}");
        lines.push(line);
    }
    let titles = "ID\tLISTENER\tADDRESS\tSTATE\tAGE\tSILENT\tIN\tOUT\tQUEUE\tHELD BY";
    lines.push(row(titles));
    let connections = found["connections"].as_array().into_iter().flatten();
    lines.extend(connections.map(connection));
    let [sort, order] = ["sort", "order"].map(|field| text(&found[field]));
    lines.push(format!("{} match, by {sort} {order}", found["matching"]));
    lines
}

fn draw(lines: Vec<String>) -> io::Result<()> {
    let (width, height) = screen::size()?;
    let mut out = String::new();
    let rows = usize::from(height).saturating_sub(1);
    for line in lines.into_iter().take(rows) {
        out.extend(line.chars().take(usize::from(width)));
        out.push_str("\x1b[K\r\n");
    }
    execute!(io::stdout(), Print(format!("\x1b[H{out}\x1b[J")))
}

fn watch(mut query: Query, once: bool) -> Result<(), Box<dyn Error>> {
    let (mut events, mut snapshot) = (follow(&query)?, Value::Null);
    loop {
        match events.recv_timeout(Duration::from_millis(50)) {
            Ok((name, data)) if name == "snapshot" => snapshot = data,
            Ok((name, found)) if name == "connections" && once => {
                terminal::say(&lines(&snapshot, &found).join("\n"));
                return Ok(());
            }
            Ok((name, found)) if name == "connections" => draw(lines(&snapshot, &found))?,
            Ok(_) | Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return Err("the server has closed".into()),
        }
        while !once && event::poll(Duration::ZERO)? {
            let key = event::read()?.as_key_press_event();
            match key.map(|key| key.code) {
                Some(KeyCode::Char('q' | 'c')) => return Ok(()),
                Some(KeyCode::Char('r')) if query.order == "asc" => query.order = "desc",
                Some(KeyCode::Char('r')) => query.order = "asc",
                Some(KeyCode::Char('u')) => query.sort = "queue",
                Some(KeyCode::Char('t')) => query.sort = "traffic",
                Some(KeyCode::Char('a')) => query.sort = "age",
                Some(KeyCode::Char('d')) => query.sort = "address",
                _ => continue,
            }
            events = follow(&query)?;
        }
    }
}

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let addr = arguments.next().unwrap_or("127.0.0.1:9222".to_owned());
    let query = Query {
        addr,
        filter: arguments.collect::<Vec<_>>().join(" "),
        sort: "queue",
        order: "desc",
    };
    if !io::stdout().is_terminal() || !io::stdin().is_terminal() {
        return terminal::exit_code("top", watch(query, true));
    }
    let _ = screen::enable_raw_mode();
    let _ = execute!(io::stdout(), EnterAlternateScreen, Hide);
    let result = watch(query, false);
    let _ = execute!(io::stdout(), Show, LeaveAlternateScreen);
    let _ = screen::disable_raw_mode();
    terminal::exit_code("top", result)
}
