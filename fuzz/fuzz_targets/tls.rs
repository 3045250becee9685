//! One connection behind TLS, or in the clear until its handler upgrades it: a real client in memory, whose records are cut, changed, lost and repeated on their way; or
//! nothing but noise.
//!
//! For any input the handler gets only frames that the client sent, in order. Without tampering the
//! client gets the replies of an honest echo.
#![no_main]

mod input;

use std::time::Duration;

use kit::sim_tls;
use libfuzzer_sys::arbitrary::{self, Arbitrary, Unstructured};
use libfuzzer_sys::fuzz_target;
use portcullis::sim::{Action, Callback, ConnModel, Input};
use portcullis::{Framing, Listen};

#[derive(Debug)]
enum Op {
    /// The client sends a frame; over packet-1.
    Say(Vec<u8>),
    /// The client says goodbye.
    Goodbye,
    /// So many bytes of what is under way arrive.
    Arrive(u8),
    /// All of it does.
    ArriveAll,
    /// A byte under way is changed.
    Change { at: u16, by: u8 },
    /// Bytes under way are lost.
    Lose { at: u16, count: u8 },
    /// Bytes under way come twice.
    Repeat { at: u16, count: u8 },
    /// Bytes come from an attacker.
    Noise { at: u16, bytes: Vec<u8> },
    /// The client reads what the server has sent, and answers.
    Listen,
    /// Something else happens to the connection.
    Happen(Input),
}

#[derive(Debug)]
struct Case {
    /// Bit 0: no client at all. Bit 1: the connection is in the clear until the first frame.
    start: u8,
    watermarks: [u8; 3],
    timeouts: [u8; 4],
    ops: Vec<Op>,
}

impl<'a> Arbitrary<'a> for Op {
    /// One byte for the operation, and its operands.
    fn arbitrary(input: &mut Unstructured<'a>) -> arbitrary::Result<Self> {
        Ok(match input.arbitrary::<u8>()? % 32 {
            0..=3 => Self::Say(input::bytes(input)?),
            4 => Self::Goodbye,
            5..=7 => Self::Arrive(input.arbitrary()?),
            8..=10 => Self::ArriveAll,
            11..=13 => Self::Change {
                at: input.arbitrary()?,
                by: input.arbitrary()?,
            },
            14 => Self::Lose {
                at: input.arbitrary()?,
                count: input.arbitrary()?,
            },
            15 => Self::Repeat {
                at: input.arbitrary()?,
                count: input.arbitrary()?,
            },
            16..=17 => Self::Noise {
                at: input.arbitrary()?,
                bytes: input::bytes(input)?,
            },
            18..=20 => Self::Listen,
            _ => Self::Happen(input::one(input)?),
        })
    }
}

impl<'a> Arbitrary<'a> for Case {
    fn arbitrary(input: &mut Unstructured<'a>) -> arbitrary::Result<Self> {
        let mut case = Self {
            start: input.arbitrary()?,
            watermarks: input.arbitrary()?,
            timeouts: input.arbitrary()?,
            ops: Vec::new(),
        };
        while !input.is_empty() {
            case.ops.push(input.arbitrary()?);
        }
        Ok(case)
    }
}

/// What the handler upgrades at.
const COMMAND: &[u8] = b"starttls";

struct World {
    model: ConnModel,
    client: Option<sim_tls::Client>,
    underway: Vec<u8>,
    /// What the client has sent as frames, and how many the handler was told.
    said: Vec<Vec<u8>>,
    told: usize,
    heard: Vec<u8>,
    /// What reaches the server is no longer what the client sent, or what the handler does is no longer an echo.
    meddled: bool,
    /// The handler cuts frames by another rule.
    shifted: bool,
}

fuzz_target!(init: pass_over_the_second_alert(), |case: Case| {
    let [low, more, most] = case.watermarks.map(usize::from);
    let [handshake, idle, write, linger] = case
        .timeouts
        .map(|ms| Duration::from_millis(u64::from(ms) + 1));
    let (noise_only, upgrade) = (case.start & 1 != 0, case.start & 2 != 0);
    let listen = Listen::tcp("127.0.0.1:0", Framing::Packet1).with(|listen| {
            let conn = &mut listen.conn;
            conn.low_watermark = low;
            conn.high_watermark = low + more + 1;
            conn.output_limit = low + more + 1 + most;
            conn.handshake_timeout = handshake;
            conn.idle_timeout = idle;
            conn.frame_timeout = idle;
            conn.write_timeout = write;
            conn.linger_timeout = linger;
            conn.linger_bytes = 1000;
        });
    let listen = if upgrade {
        listen
    } else {
        listen.tls(sim_tls::server_config())
    };
    let mut world = World {
        model: ConnModel::new(&listen).expect("settings that work"),
        client: (!noise_only).then(sim_tls::Client::new),
        underway: Vec::new(),
        said: Vec::new(),
        told: 0,
        heard: Vec::new(),
        meddled: noise_only,
        shifted: false,
    };
    if let Some(client) = &mut world.client {
        world.underway = client.encrypt(b"");
    }
    if upgrade {
        world.model.upgrade_at(COMMAND, sim_tls::server_config());
        // What is under way may come with it, in one read.
        let together = world
            .underway
            .drain(..world.underway.len().min(usize::from(case.start >> 2)));
        let bytes = [&[COMMAND.len() as u8], COMMAND]
            .concat()
            .into_iter()
            .chain(together)
            .collect();
        world.apply(&Input::Bytes(bytes));
        world.apply(&Input::Turn);
        assert!(world
            .model
            .take_callbacks()
            .contains(&Callback::Frame(COMMAND.to_vec())));
    }
    for op in &case.ops {
        world.play(op);
        world.compare();
    }
    world.come_to_rest();
});

/// rustls asserts, in debug builds alone, that no alert follows close_notify. A bad record behind our close_notify fails
/// that, and the server catches it; libFuzzer's hook would end the process before.
fn pass_over_the_second_alert() {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        let text = info.payload().downcast_ref::<&str>();
        if text != Some(&"assertion failed: !self.sent_fatal_alert") {
            report(info);
        }
    }));
}

impl World {
    fn play(&mut self, op: &Op) {
        let length = self.underway.len();
        let place = |at: &u16| usize::from(*at) % length.max(1);
        match op {
            Op::Say(payload) => {
                if let Some(client) = &mut self.client {
                    let payload = &payload[..payload.len().min(255)];
                    let frame = [&[payload.len() as u8], payload].concat();
                    self.said.push(payload.to_vec());
                    self.underway.extend(client.encrypt(&frame));
                }
            }
            Op::Goodbye => {
                if let Some(client) = &mut self.client {
                    self.underway.extend(client.close_notify());
                }
            }
            Op::Arrive(count) => self.arrive(usize::from(*count)),
            Op::ArriveAll => self.arrive(length),
            Op::Change { at, by } => {
                if let (Some(byte), 1..) = (self.underway.get_mut(place(at)), *by) {
                    *byte ^= by;
                    self.meddled = true;
                }
            }
            Op::Lose { at, count } => {
                let at = place(at);
                self.underway
                    .drain(at..length.min(at + usize::from(*count)));
                self.meddled = true;
            }
            Op::Repeat { at, count } => {
                let at = place(at);
                let again =
                    self.underway[at.min(length)..length.min(at + usize::from(*count))].to_vec();
                self.underway.splice(at.min(length)..at.min(length), again);
                self.meddled = true;
            }
            Op::Noise { at, bytes } => {
                let at = place(at).min(length);
                self.underway.splice(at..at, bytes.iter().copied());
                self.meddled = true;
            }
            Op::Listen => self.listen(),
            Op::Happen(input) => {
                self.shifted |= shifts(input);
                self.meddled |= !matches!(
                    input,
                    Input::Turn | Input::Step | Input::Spurious | Input::Room(_)
                );
                self.apply(input);
            }
        }
    }

    fn apply(&mut self, input: &Input) {
        self.model.apply(input).expect("it holds");
    }

    fn arrive(&mut self, count: usize) {
        let bytes = self
            .underway
            .drain(..count.min(self.underway.len()))
            .collect();
        self.apply(&Input::Bytes(bytes));
        self.apply(&Input::Turn);
    }

    fn listen(&mut self) {
        let sent = self.model.take_sent();
        if let Some(client) = &mut self.client {
            let heard = client.hear(&sent, &mut self.heard, self.meddled);
            match heard.expect("no tampering") {
                Some(answer) => self.underway.extend(answer),
                None => self.client = None,
            }
        }
    }

    /// The handler was told what the client said, and the client heard what the handler said.
    fn compare(&mut self) {
        for callback in self.model.take_callbacks() {
            if let (Callback::Frame(frame), false) = (callback, self.shifted) {
                assert_eq!(
                    Some(&frame),
                    self.said.get(self.told),
                    "a frame that was not sent"
                );
                self.told += 1;
            }
        }
        if !self.meddled {
            let echo: Vec<u8> = self
                .said
                .iter()
                .flat_map(|payload| [&[payload.len() as u8], &payload[..]].concat())
                .collect();
            assert!(
                echo.starts_with(&self.heard),
                "the client hears {:?} where it said {echo:?}",
                self.heard
            );
        }
    }

    fn come_to_rest(&mut self) {
        self.apply(&Input::Room(u16::MAX));
        self.apply(&Input::Turn);
        for _ in 0..2000 {
            if self.model.end().is_some() {
                return;
            }
            if self.model.has_deadline() {
                self.apply(&Input::Expire);
            } else {
                assert!(
                    self.model.is_at_rest(),
                    "no deadline is armed: {:?}",
                    self.model
                );
                self.apply(&Input::Act(Action::Resume));
            }
            self.apply(&Input::Turn);
            self.compare();
        }
        panic!("no end in sight: {:?}", self.model);
    }
}

/// The handler cuts frames by another rule from now on.
fn shifts(input: &Input) -> bool {
    let shifts = |action: &Action| matches!(action, Action::Framing(_) | Action::MaxFrame(_));
    match input {
        Input::Act(action) => shifts(action),
        Input::OnFrame(actions) | Input::OnEnd(actions) => actions.iter().any(shifts),
        _ => false,
    }
}
