//! A game server: the world moves sixty times a second, and the network gets what is left of each frame.
//!
//!     cargo run --release --example game -- 127.0.0.1:2424 [FRAMES]
//!
//! Players send packet-2 frames of one byte, a direction; after each step of the world every player gets all positions. At the
//! end, after so many frames or on SIGTERM, it reports its jitter and the busiest turn of the network.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use portcullis::{
    Closed, Config, ConnId, Context, Framing, Handler, Listen, Outcome, Rate, Server, Turn,
};

#[path = "support/terminal.rs"]
mod terminal;

const FRAME: Duration = Duration::from_nanos(1_000_000_000 / 60);
/// Frames whose lateness is remembered: a minute of them.
const REMEMBERED: usize = 3600;
/// The most that one player may have done in one turn of the network.
const BURST: u64 = 8;

#[derive(Default)]
struct World {
    players: BTreeMap<ConnId, (i32, i32)>,
    /// What players have asked for, ever.
    moves: u64,
}

struct Player;

impl Handler<World> for Player {
    fn on_open(&mut self, cx: &mut Context<'_, World>) -> Outcome {
        cx.app.players.insert(cx.conn.id(), (0, 0));
        Ok(())
    }

    fn on_frame(&mut self, cx: &mut Context<'_, World>, frame: &[u8]) -> Outcome {
        cx.app.moves += 1;
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

fn main() -> Result<(), Box<dyn std::error::Error>> {
    terminal::log_to_stderr();
    let mut arguments = std::env::args().skip(1);
    let addr = arguments
        .next()
        .unwrap_or_else(|| "127.0.0.1:2424".to_owned());
    let frames = arguments
        .next()
        .and_then(|count| count.parse().ok())
        .unwrap_or(u64::MAX);

    // Small budgets, few players and a rate for each: an iteration of the server is a small part of a frame, whatever players do.
    let mut config = Config::max_connections(64);
    config.budgets.accepts = 4;
    config.budgets.read_bytes = 16 * 1024;
    let mut listen = Listen::tcp(addr.as_str(), Framing::Packet2);
    listen.conn.frame_rate = Some(Rate::per_second(120).burst(BURST));
    let mut server = Server::new(config)?;
    let id = server.listen(listen, |_app, _peer| Player)?;
    // Before the address is printed: its reader may send a signal at once.
    terminal::drain_on_signal(server.handle(), Duration::ZERO)?;
    terminal::say(&format!(
        "listening on {} (packet-2)",
        server.control().listener(id)?.addr
    ));

    let mut world = World::default();
    let (mut next, mut late) = (Instant::now(), Vec::new());
    let (mut frame, mut busiest) = (0, 0);
    'game: while frame < frames {
        next += FRAME;
        // What players have said since the last frame, and until it is time for the next.
        loop {
            let (left, before) = (next.saturating_duration_since(Instant::now()), world.moves);
            if server.poll_once(&mut world, Some(left))? != Turn::Continue {
                break 'game;
            }
            busiest = busiest.max(world.moves - before);
            if left.is_zero() {
                break;
            }
        }
        if late.len() < REMEMBERED {
            late.push(Duration::ZERO);
        }
        late[frame as usize % REMEMBERED] = next.elapsed();
        frame += 1;
        show_all(&mut server, &world);
    }
    late.sort();
    let share =
        |percent: usize| late.get((late.len() * percent / 100).min(late.len().saturating_sub(1)));
    let [half, most, all] =
        [50, 99, 100].map(|percent| share(percent).copied().unwrap_or_default());
    terminal::say(&format!("{frame} frames, the latest was {all:.1?} late"));
    terminal::say(&format!(
        "jitter: half within {half:.1?}, 99 % within {most:.1?}"
    ));
    terminal::say(&format!(
        "{} moves, {busiest} in the busiest turn",
        world.moves
    ));
    Ok(())
}

/// The world has moved. Sent from outside a callback, so it goes out in the next turn.
fn show_all(server: &mut Server<World>, world: &World) {
    let positions: Vec<_> = world
        .players
        .values()
        .map(|(x, y)| format!("{x},{y}"))
        .collect();
    let positions = positions.join(" ");
    let mut control = server.control();
    for &id in world.players.keys() {
        if let Some(mut player) = control.conn(id) {
            // A player that does not keep up misses a frame, and sees the next.
            let _ = player.send(&positions);
        }
    }
}
