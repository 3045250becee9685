//! Every schedule of a connection behind TLS, up to a length: rustls on both sides in memory.
//!
//! TLS sessions cannot be copied, so each schedule is played from its beginning. After each move the invariants hold, the
//! handler has been told what the client said and nothing else, and the client has heard what an honest handler says; and
//! however a schedule ends, time leads from there to the end.

use std::collections::BTreeSet;
use std::time::Duration;

use portcullis::sim::{Action, Callback, ConnModel, End, Input};
use portcullis::{CloseReason, Framing, Listen, State};

use crate::sim_tls;

/// What the client speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    Tls12,
    Tls13,
}

/// Where schedules begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// With the TCP connection.
    Connected,
    /// With an open plain connection, when its handler has begun to upgrade it.
    Upgrade,
    /// When the handshake is over.
    Open,
}

/// What schedules are made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Move {
    /// A byte of what the client has sent arrives.
    Byte,
    /// All of it does.
    Arrive,
    /// All of it does, and FIN with it.
    ArriveFinish,
    /// A byte of it is changed on the way.
    Forge,
    /// The client sends a frame.
    Say,
    /// The client says goodbye.
    Goodbye,
    /// The client reads, and answers.
    Hear,
    Finish,
    Reset,
    /// The kernel takes so many bytes.
    Room(u16),
    Expire,
    Act(Action),
    Drain,
}

const MOVES: [Move; 16] = [
    Move::Byte,
    Move::Arrive,
    Move::ArriveFinish,
    Move::Forge,
    Move::Say,
    Move::Goodbye,
    Move::Hear,
    Move::Finish,
    Move::Reset,
    Move::Room(0),
    Move::Room(u16::MAX),
    Move::Expire,
    Move::Act(Action::Pause),
    Move::Act(Action::Resume),
    Move::Act(Action::Close),
    Move::Drain,
];

/// What was found.
#[derive(Debug, Default)]
pub struct Findings {
    pub schedules: u64,
    /// All of that length.
    pub all: bool,
    pub changes: BTreeSet<(State, State)>,
    pub reasons: BTreeSet<CloseReason>,
}

/// Plays every schedule of this length until `enough` says that it is.
///
/// # Errors
///
/// The schedule that breaks a promise, and the promise.
pub fn play(
    version: Version,
    start: Start,
    length: usize,
    mut enough: impl FnMut() -> bool,
) -> Result<Findings, String> {
    let mut findings = Findings::default();
    let mut schedule = vec![0; length];
    loop {
        let moves: Vec<Move> = schedule.iter().map(|&number| MOVES[number]).collect();
        run(version, start, &moves, &mut findings)
            .map_err(|what| format!("{version:?} {start:?} {moves:?}: {what}"))?;
        // Counts up, the last digit first.
        let Some(place) = schedule
            .iter()
            .rposition(|&number| number + 1 < MOVES.len())
        else {
            findings.all = true;
            return Ok(findings);
        };
        schedule[place] += 1;
        schedule[place + 1..].fill(0);
        if enough() {
            return Ok(findings);
        }
    }
}

struct World {
    model: ConnModel,
    client: Option<sim_tls::Client>,
    underway: Vec<u8>,
    said: usize,
    told: usize,
    heard: Vec<u8>,
    /// Bytes in flight, or the handler, were tampered with.
    meddled: bool,
}

/// The frame that is said, over packet-1.
const FRAME: &[u8] = b"\x02hi";

fn run(
    version: Version,
    start: Start,
    moves: &[Move],
    findings: &mut Findings,
) -> Result<(), String> {
    let tick = Duration::from_millis(1);
    let listen = Listen::tcp("127.0.0.1:0", Framing::Packet1).with(|listen| {
        listen.conn.handshake_timeout = 2 * tick;
        listen.conn.idle_timeout = 3 * tick;
        listen.conn.frame_timeout = 2 * tick;
        listen.conn.write_timeout = 2 * tick;
        listen.conn.linger_timeout = tick;
        listen.conn.linger_bytes = 100;
        listen.conn.low_watermark = 1;
        listen.conn.high_watermark = 3;
        listen.conn.output_limit = 6;
    });
    let listen = match start {
        Start::Connected | Start::Open => listen.tls(sim_tls::server_config()),
        Start::Upgrade => listen,
    };
    let model = ConnModel::new(&listen).map_err(|error| error.to_string())?;
    let mut client = match version {
        Version::Tls12 => sim_tls::Client::tls12(),
        Version::Tls13 => sim_tls::Client::new(),
    };
    let mut world = World {
        model,
        underway: client.encrypt(b""),
        client: Some(client),
        said: 0,
        told: 0,
        heard: Vec::new(),
        meddled: false,
    };
    if start == Start::Upgrade {
        world.upgrade()?;
    }
    if start == Start::Open {
        for step in [Move::Arrive, Move::Hear, Move::Arrive, Move::Hear] {
            world.make(step)?;
        }
        if world.model.state() != State::Open {
            return Err("a handshake is over".to_owned());
        }
    }
    for &step in moves {
        world.make(step)?;
    }
    world.come_to_rest()?;
    findings.schedules += 1;
    findings.changes.extend(world.model.take_transitions());
    findings
        .reasons
        .extend(world.model.end().map(|end| end.reason));
    Ok(())
}

impl World {
    /// An empty frame in the clear is the command.
    fn upgrade(&mut self) -> Result<(), String> {
        self.model.upgrade_at(b"", sim_tls::server_config());
        self.apply(Input::Bytes(vec![0]))?;
        self.apply(Input::Turn)?;
        if self.model.state() != State::Handshaking || self.model.take_callbacks().len() != 2 {
            return Err("an upgrade has begun".to_owned());
        }
        Ok(())
    }

    fn make(&mut self, step: Move) -> Result<(), String> {
        match step {
            Move::Byte => self.arrive(1)?,
            Move::Arrive => self.arrive(usize::MAX)?,
            Move::ArriveFinish => {
                let bytes = std::mem::take(&mut self.underway);
                self.apply(Input::Bytes(bytes))?;
                self.apply(Input::Finish)?;
            }
            Move::Forge => {
                let last = self.underway.len().wrapping_sub(1);
                if let Some(byte) = self.underway.get_mut(last) {
                    *byte ^= 1;
                    self.meddled = true;
                }
            }
            Move::Say => {
                if let Some(client) = &mut self.client {
                    self.underway.extend(client.encrypt(FRAME));
                    self.said += 1;
                }
            }
            Move::Goodbye => {
                if let Some(client) = &mut self.client {
                    self.underway.extend(client.close_notify());
                }
            }
            Move::Hear => {
                let sent = self.model.take_sent();
                if let Some(client) = &mut self.client {
                    match client.hear(&sent, &mut self.heard, self.meddled)? {
                        Some(answer) => self.underway.extend(answer),
                        None => self.client = None,
                    }
                }
            }
            Move::Finish => self.apply(Input::Finish)?,
            Move::Reset => self.apply(Input::Reset)?,
            Move::Room(bytes) => self.apply(Input::Room(bytes))?,
            Move::Expire => self.apply(Input::Expire)?,
            Move::Act(action) => self.apply(Input::Act(action))?,
            Move::Drain => self.apply(Input::Drain)?,
        }
        self.apply(Input::Turn)?;
        self.compare()
    }

    fn apply(&mut self, input: Input) -> Result<(), String> {
        self.model
            .apply(&input)
            .map_err(|violation| violation.to_string())
    }

    fn arrive(&mut self, count: usize) -> Result<(), String> {
        let bytes = self
            .underway
            .drain(..count.min(self.underway.len()))
            .collect();
        self.apply(Input::Bytes(bytes))
    }

    fn compare(&mut self) -> Result<(), String> {
        for callback in self.model.take_callbacks() {
            if let Callback::Frame(frame) = callback {
                self.told += 1;
                if frame != FRAME[1..] || self.told > self.said {
                    return Err(format!("a frame that nobody sent: {frame:?}"));
                }
            }
        }
        if self.heard.len() > self.told * FRAME.len()
            || self
                .heard
                .chunks(FRAME.len())
                .any(|echo| !FRAME.starts_with(echo))
        {
            return Err(format!(
                "the client hears what nobody said: {:?}",
                self.heard
            ));
        }
        Ok(())
    }

    fn come_to_rest(&mut self) -> Result<(), String> {
        for _ in 0..50 {
            if let Some(end) = self.model.end() {
                return self.take_leave(end);
            }
            if self.model.has_deadline() {
                self.apply(Input::Expire)?;
            } else if self.model.is_at_rest() {
                self.apply(Input::Act(Action::Resume))?;
            } else {
                return Err("no deadline is armed".to_owned());
            }
            self.apply(Input::Turn)?;
            self.compare()?;
        }
        Err("no end in sight".to_owned())
    }

    /// An end in order owes the client nothing.
    fn take_leave(&mut self, end: End) -> Result<(), String> {
        self.make(Move::Hear)?;
        let in_order = matches!(
            end.reason,
            CloseReason::Finished
                | CloseReason::Closed
                | CloseReason::Drained
                | CloseReason::TlsTruncated
        );
        let owed = self.told * FRAME.len() - self.heard.len();
        if in_order && !end.reset && self.client.is_some() && owed > 0 {
            return Err(format!("it ended as {} and owes {owed} bytes", end.reason));
        }
        Ok(())
    }
}
