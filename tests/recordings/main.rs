//! Recordings: what a server recorded replays exactly, differs where the handler does, and becomes a test.

mod damage;
mod end_to_end;
mod files;
mod handles;
mod outgoing;
mod real;
mod replays;
mod scripts;

use std::net::SocketAddr;
use std::time::Duration;

use portcullis::sim::{Ending, Op, Replay, Script, Sim, Tape};
use portcullis::{Closed, Config, Context, Framing, Handler, Listen, Outcome, Recording, Stats};

/// What a server has told its handlers, in order.
type Journal = Vec<String>;

/// Writes down every callback. Answers each line, says something after a while, closes on `bye`.
#[derive(Default)]
struct Talker {
    lines: u64,
    /// Answers this line otherwise.
    changed: Option<u64>,
}

impl Talker {
    fn note(cx: &mut Context<'_, Journal>, what: &str) {
        let id = cx.conn.id();
        cx.app.push(format!("{id} {what}"));
    }
}

impl Handler<Journal> for Talker {
    fn on_open(&mut self, cx: &mut Context<'_, Journal>) -> Outcome {
        let addr = cx.conn.local_addr()?;
        Self::note(cx, &format!("opens at {addr}"));
        cx.conn.set_timer(0, Duration::from_millis(700));
        Ok(())
    }

    fn on_frame(&mut self, cx: &mut Context<'_, Journal>, line: &[u8]) -> Outcome {
        Self::note(cx, &format!("line {}", line.escape_ascii()));
        self.lines += 1;
        if line.starts_with(b"bye") {
            cx.conn.close();
        } else if self.changed == Some(self.lines) {
            cx.conn.send("something else\n")?;
        } else if line.starts_with(b"much") {
            cx.conn.send(vec![b'x'; 200_000])?;
        } else {
            cx.conn.send(line)?;
        }
        Ok(())
    }

    fn on_timer(&mut self, cx: &mut Context<'_, Journal>, _: u8) -> Outcome {
        Self::note(cx, "timer");
        cx.conn.set_timer(0, Duration::from_secs(7));
        cx.conn.send("still there?\n")?;
        Ok(())
    }

    fn on_finish(&mut self, cx: &mut Context<'_, Journal>) -> Outcome {
        Self::note(cx, "finish");
        cx.conn.close();
        Ok(())
    }

    fn on_writable(&mut self, cx: &mut Context<'_, Journal>) -> Outcome {
        Self::note(cx, "writable");
        Ok(())
    }

    fn on_close(&mut self, cx: &mut Context<'_, Journal>, closed: &Closed) {
        Self::note(cx, &format!("closes: {closed}"));
    }
}

fn config() -> Config {
    Config::max_connections(6)
}

fn listen() -> Listen {
    Listen::tcp("127.0.0.1:0", Framing::Line)
}

/// A recorded world with one listener.
#[track_caller]
fn recorded_world(recording: Recording) -> (Sim<Journal>, SocketAddr) {
    let mut sim = Sim::recorded(1, config(), Journal::new(), recording).expect("a recording");
    let addr = sim.listen(listen(), |_, _| Talker::default());
    (sim, addr.expect("a port"))
}

/// Everything that a server can be asked about what happened.
fn outcome(stats: &Stats, journal: &Journal) -> String {
    format!("{stats:?}\n{journal:#?}")
}

/// A script that touches most calls: `seed` chooses.
fn script(seed: u64, length: usize) -> Script {
    let mut random = portcullis::sim::Random::new(seed);
    let mut ops = vec![Op::Connect];
    while ops.len() < length {
        let client = random.below(8) as u16;
        ops.push(match random.below(24) {
            0..=2 => Op::Connect,
            3..=9 => Op::Send {
                client,
                bytes: random
                    .pick(&[
                        "one\n",
                        "two and",
                        " a half\nthree\n",
                        "much\n",
                        "bye\n",
                        "\n",
                    ])
                    .map_or_else(Vec::new, |text| text.as_bytes().to_vec()),
            },
            10 => Op::Finish { client },
            11 => Op::Reset { client },
            12 => Op::Read {
                client,
                on: random.chance(500),
            },
            13 => Op::SendBuffer {
                client,
                bytes: random.between(1, 3000) as u16,
            },
            14..=15 => Op::Fail {
                call: random.below(250) as u8,
                after: random.below(3) as u8,
                error: random.below(250) as u8,
            },
            16 => Op::Descriptors {
                more: *random.pick(&[0, 1, 2, 255]).expect("some"),
            },
            17..=20 => Op::Advance {
                millis: random.between(1, 3000) as u16,
            },
            _ => Op::Step,
        });
    }
    Script { ops }
}

/// Plays a script in a world, and returns what happened.
fn perform(sim: &mut Sim<Journal>, script: &Script) -> String {
    let addr = sim
        .listen(listen(), |_, _| Talker::default())
        .expect("a port");
    sim.try_play(addr, script, |_, _| Ok(()))
        .expect("no violation");
    sim.try_advance(Duration::from_secs(100))
        .expect("no violation");
    outcome(&sim.stats(), sim.app())
}

/// Replays a whole recording of a server with one listener, and returns what happened.
#[track_caller]
fn replay(tape: Tape, config: Config, listen: Listen) -> String {
    let mut replay = Replay::new(tape, config, Journal::new()).expect("a whole tape");
    replay
        .listen(listen, |_, _| Talker::default())
        .expect("it listens");
    match replay.run() {
        Ok(ending) => assert_eq!(ending, Ending::Complete),
        Err(divergence) => panic!("{divergence}"),
    }
    outcome(&replay.stats(), replay.app())
}
