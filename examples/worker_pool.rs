//! Slow work elsewhere: each request goes to a pool of threads, and the answer comes back through the handle.
//!
//!     cargo run --release --example worker_pool -- 127.0.0.1:2727      (then: nc 127.0.0.1 2727, and say numbers)
//!
//! Each line is a number; the answer is how many primes are below it. While a request is at work its connection is paused: its
//! answers come in order, and it has one place in the queue at most. The queue is as long as the cap; it is full only if clients leave
//! their work behind and others come, and then a request ends its connection.

use std::sync::mpsc::{sync_channel, Receiver, SyncSender};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use portcullis::{
    Config, ConnId, Context, Framing, Handle, Handler, Listen, Message, Outcome, Server,
};

#[path = "support/terminal.rs"]
mod terminal;

const CONNECTIONS: usize = 256;
const WORKERS: usize = 4;

/// A request at work, and the connection that wants the answer.
type Job = (ConnId, u64);

/// What all connections share.
struct Pool {
    jobs: SyncSender<Job>,
}

struct Session;

impl Handler<Pool> for Session {
    fn on_frame(&mut self, cx: &mut Context<'_, Pool>, line: &[u8]) -> Outcome {
        let number: u64 = std::str::from_utf8(line)?.trim().parse()?;
        cx.app.jobs.try_send((cx.conn.id(), number))?;
        // No other request of this peer until then, and no close before its answer.
        cx.conn.pause();
        cx.conn.hold();
        Ok(())
    }

    fn on_message(&mut self, cx: &mut Context<'_, Pool>, answer: Message) -> Outcome {
        if let Ok(primes) = answer.downcast::<u64>() {
            cx.conn.send(format!("{primes}\n"))?;
        }
        cx.conn.release();
        cx.conn.resume();
        Ok(())
    }
}

fn work(jobs: &Mutex<Receiver<Job>>, handle: &Handle<Pool>) {
    loop {
        // One worker waits for a job, the others for the lock.
        let job = jobs.lock().map(|jobs| jobs.recv());
        let Ok(Ok((client, number))) = job else {
            return; // the server is gone
        };
        let primes = (2..number)
            .filter(|n| (2..).take_while(|d| d * d <= *n).all(|d| n % d != 0))
            .count() as u64;
        // The peer may have gone meanwhile: then the answer is dropped.
        let _ = handle.notify(client, primes);
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    terminal::log_to_stderr();
    let addr = std::env::args()
        .nth(1)
        .unwrap_or_else(|| "127.0.0.1:2727".to_owned());
    let mut server = Server::new(Config::max_connections(CONNECTIONS))?;
    let mut listen = Listen::tcp(addr.as_str(), Framing::Line);
    listen.conn.max_frame = Some(32);
    let id = server.listen(listen, |_app, _peer| Session)?;
    // Before the address is printed: its reader may send a signal at once.
    terminal::drain_on_signal(server.handle(), Duration::from_secs(10))?;
    terminal::say(&format!(
        "listening on {} (line)",
        server.control().listener(id)?.addr
    ));

    let (jobs, queue) = sync_channel(CONNECTIONS);
    let queue = Arc::new(Mutex::new(queue));
    for _ in 0..WORKERS {
        let (queue, handle) = (Arc::clone(&queue), server.handle());
        std::thread::spawn(move || work(&queue, &handle));
    }
    server.run(&mut Pool { jobs })?;
    Ok(())
}
