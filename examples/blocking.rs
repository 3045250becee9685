//! Code that blocks: connections are accepted and limited by the loop, then served by a pool of threads with plain reads and
//! writes.
//!
//!     cargo run --release --example blocking -- 127.0.0.1:2828      (then: nc 127.0.0.1 2828)
//!
//! The first line says what the client wants. "upper" and "count" go to a thread; anything else is answered by the loop. Those
//! at a thread count for the cap until the thread is done with them.

use std::io::{self, BufRead, BufReader, Write};
use std::sync::mpsc::{sync_channel, Receiver, SyncSender};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use portcullis::{Config, Context, Detached, Framing, Handler, Listen, Outcome, Server};

#[path = "support/terminal.rs"]
mod terminal;

const THREADS: usize = 4;
const MAX_LINE: usize = 64 * 1024;
const LINE_TIME: Duration = Duration::from_secs(60);

type Work = (String, Detached);

struct Pool {
    work: SyncSender<Work>,
}

/// The part in the loop: hears the first line.
struct Reception;

impl Handler<Pool> for Reception {
    fn on_frame(&mut self, cx: &mut Context<'_, Pool>, line: &[u8]) -> Outcome {
        let wanted = String::from_utf8_lossy(line).trim().to_owned();
        if wanted != "upper" && wanted != "count" {
            cx.conn.send("upper or count?\n")?;
            return Ok(());
        }
        cx.conn.send("go on\n")?;
        let work = cx.app.work.clone();
        cx.conn.detach(move |stream| {
            // The queue is as long as the cap. If the threads were gone, the stream would be dropped, and closed.
            let _ = work.try_send((wanted, stream));
        })?;
        Ok(())
    }
}

/// The part at a thread: as if there were no loop.
fn serve(wanted: &str, stream: Detached) -> io::Result<()> {
    stream.set_read_timeout(Some(LINE_TIME))?;
    stream.set_write_timeout(Some(Duration::from_secs(10)))?;
    let mut stream = BufReader::new(stream);
    let mut lines = 0;
    while let Some(line) = read_line(&mut stream)? {
        lines += 1;
        let answer = match wanted {
            "upper" => line.to_uppercase(),
            _ => format!("{lines}\n"),
        };
        stream.get_mut().write_all(answer.as_bytes())?;
    }
    stream.into_inner().finish()
}

/// Reads the next line, within limits of length and time: a thread is worth more than a slot, and a client that sends a byte
/// now and then must not keep it. `None` at the end.
fn read_line(stream: &mut impl BufRead) -> io::Result<Option<String>> {
    let late = Instant::now() + LINE_TIME;
    let mut line = Vec::new();
    loop {
        let part = stream.fill_buf()?;
        if part.is_empty() && line.is_empty() {
            return Ok(None);
        }
        let end = part.iter().position(|&byte| byte == b'\n');
        let count = end.map_or(part.len(), |end| end + 1);
        line.extend_from_slice(&part[..count]);
        stream.consume(count);
        if line.len() > MAX_LINE {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "a line is too long",
            ));
        }
        if count == 0 || end.is_some() {
            return Ok(Some(String::from_utf8_lossy(&line).into_owned()));
        }
        if Instant::now() > late {
            return Err(io::ErrorKind::TimedOut.into());
        }
    }
}

fn work(queue: &Mutex<Receiver<Work>>) {
    loop {
        // One thread waits for work, the others for the lock.
        let Ok(Ok((wanted, stream))) = queue.lock().map(|queue| queue.recv()) else {
            return; // the server is gone
        };
        if let Err(error) = serve(&wanted, stream) {
            terminal::complain(&format!("a client was lost: {error}"));
        }
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    terminal::log_to_stderr();
    let addr = std::env::args()
        .nth(1)
        .unwrap_or_else(|| "127.0.0.1:2828".to_owned());
    let connections = 256;
    let mut server = Server::new(Config::max_connections(connections))?;
    let listen = Listen::tcp(addr.as_str(), Framing::Line);
    let id = server.listen(listen, |_app, _peer| Reception)?;
    // Before the address is printed: its reader may send a signal at once.
    terminal::drain_on_signal(server.handle(), Duration::from_secs(5))?;
    terminal::say(&format!(
        "listening on {} (line)",
        server.control().listener(id)?.addr
    ));

    let (sender, queue) = sync_channel(connections);
    let queue = Arc::new(Mutex::new(queue));
    for _ in 0..THREADS {
        let queue = Arc::clone(&queue);
        std::thread::spawn(move || work(&queue));
    }
    server.run(&mut Pool { work: sender })?;
    Ok(())
}
