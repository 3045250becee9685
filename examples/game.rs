//! A game server: the world moves sixty times a second, and the network gets what is left of each frame.
//!
//!     cargo run --release --example game -- 127.0.0.1:2424 [FRAMES]
//!
//! Players send packet-2 frames of one byte, a direction; after each step of the world every player gets all positions.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use portcullis::{Closed, Config, ConnId, Context, Handler, Listen, Outcome, Server, Turn};

#[path = "support/terminal.rs"]
mod terminal;

const FRAME: Duration = Duration::from_nanos(1_000_000_000 / 60);

#[derive(Default)]
struct World {
    players: BTreeMap<ConnId, (i32, i32)>,
}

struct Player;

impl Handler<World> for Player {
    fn on_open(&mut self, cx: &mut Context<'_, World>) -> Outcome {
        cx.app.players.insert(cx.conn.id(), (0, 0));
        Ok(())
    }

    fn on_frame(&mut self, cx: &mut Context<'_, World>, frame: &[u8]) -> Outcome {
        let Some((x, y)) = cx.app.players.get_mut(&cx.conn.id()) else {
            return Ok(());
        };
        match frame {
            b"n" => *y += 1,
            b"s" => *y -= 1,
            b"e" => *x += 1,
            b"w" => *x -= 1,
            _ => cx.conn.send(b"?")?,
        }
        Ok(())
    }

    fn on_close(&mut self, cx: &mut Context<'_, World>, _: &Closed) {
        cx.app.players.remove(&cx.conn.id());
    }
}

fn main() -> portcullis::Result<()> {
    terminal::log_to_stderr();
    let mut arguments = std::env::args().skip(1);
    let addr = arguments.next().unwrap_or_else(|| "127.0.0.1:2424".to_owned());
    let frames = arguments
        .next()
        .and_then(|count| count.parse().ok())
        .unwrap_or(u64::MAX);

    // Small budgets: a turn of the server is a small part of a frame, whatever the players do.
    let config = Config::new().accept_budget(4).read_budget(16 * 1024);
    let mut server = Server::new(config)?;
    let id = server.listen(Listen::tcp(addr.as_str()), |_: &mut World, _peer| Player)?;
    terminal::say(&format!("listening on {} (packet-2)", server.listener(id)?.addr));

    let mut world = World::default();
    let (mut next, mut worst) = (Instant::now(), Duration::ZERO);
    for _ in 0..frames {
        next += FRAME;
        // What players have said since the last frame, and until it is time for the next.
        loop {
            let left = next.saturating_duration_since(Instant::now());
            if server.poll_once(&mut world, Some(left))? != Turn::Continue {
                return Ok(());
            }
            if left.is_zero() {
                break;
            }
        }
        worst = worst.max(next.elapsed());
        // The world has moved: everybody sees it. Sent from outside a callback, so it goes out in the next turn.
        let positions: Vec<_> = world.players.values().map(|(x, y)| format!("{x},{y}")).collect();
        let positions = positions.join(" ");
        let mut control = server.control();
        for &id in world.players.keys() {
            if let Some(mut player) = control.conn(id) {
                // Who does not keep up misses a frame, and sees the next.
                let _ = player.send(&positions);
            }
        }
    }
    terminal::say(&format!("{frames} frames, the latest was {worst:.1?} late"));
    Ok(())
}
