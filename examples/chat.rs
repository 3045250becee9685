//! A chat: every line goes to every client. A client that reads too slowly is evicted, and delays
//! no other.
//!
//!     cargo run --release --example chat -- 127.0.0.1:2323      (then: nc 127.0.0.1 2323, several times)

use std::collections::BTreeSet;

use portcullis::{
    Closed, Config, ConnId, Context, Framing, Handler, Listen, Outcome, Payload, SendError, Server,
};

#[path = "support/terminal.rs"]
mod terminal;

/// What all connections share. The server lends it to each callback: no lock, no `Rc`.
#[derive(Default)]
struct Room {
    members: BTreeSet<ConnId>,
    evicted: u64,
}

/// One member.
struct Member {
    name: String,
}

impl Handler<Room> for Member {
    fn on_open(&mut self, cx: &mut Context<'_, Room>) -> Outcome {
        let line = format!(
            "* {} has come, {} are here\n",
            self.name,
            cx.app.members.len() + 1
        );
        cx.app.members.insert(cx.conn.id());
        tell_all(cx, line);
        Ok(())
    }

    fn on_frame(&mut self, cx: &mut Context<'_, Room>, line: &[u8]) -> Outcome {
        tell_all(cx, (&self.name, ": ", line));
        Ok(())
    }

    fn on_close(&mut self, cx: &mut Context<'_, Room>, closed: &Closed) {
        cx.app.members.remove(&cx.conn.id());
        let line = format!("* {} has gone ({closed})\n", self.name);
        tell_all(cx, line);
    }
}

/// Sends a line to every member. What one of them does not take is no reason to close this connection, so there is no `?`.
fn tell_all(cx: &mut Context<'_, Room>, line: impl Payload) {
    let said = cx.conn.broadcast(cx.app.members.iter().copied(), line);
    for (id, error) in said.refused {
        // Its output limit is reached: it would hold the lines of a whole day.
        if let (SendError::Full { .. }, Some(mut slow)) = (error, cx.conn.peer(id)) {
            slow.abort();
            cx.app.members.remove(&id);
            cx.app.evicted += 1;
        }
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    terminal::log_to_stderr();
    let addr = std::env::args()
        .nth(1)
        .unwrap_or_else(|| "127.0.0.1:2323".to_owned());
    let mut server = Server::new(Config::max_connections(10_000))?;
    let mut listen = Listen::tcp(addr.as_str(), Framing::Line);
    // Members may only listen, for a day. So one that has said nothing makes no room for a newcomer at the cap.
    listen.conn.idle_timeout = std::time::Duration::from_secs(24 * 60 * 60);
    listen.evict_silent = false;
    listen.conn.max_frame = Some(1024);
    listen.conn.low_watermark = 32 * 1024;
    listen.conn.high_watermark = 64 * 1024;
    listen.conn.output_limit = 64 * 1024;
    let mut guests = 0;
    let id = server.listen(listen, move |_app, _peer| {
        guests += 1;
        Member {
            name: format!("guest{guests}"),
        }
    })?;
    // Before the address is printed: its reader may send a signal at once.
    terminal::drain_on_signal(server.handle(), std::time::Duration::from_secs(5))?;
    terminal::say(&format!(
        "listening on {} (line)",
        server.control().listener(id)?.addr
    ));

    let mut room = Room::default();
    server.run(&mut room)?;
    terminal::say(&format!("{} evicted", room.evicted));
    Ok(())
}
