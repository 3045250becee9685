//! Scripts as bytes, for fuzzers and their corpora.

use super::script::{Op, Script};

// An op is the lowest of its tags. The others, up to the next op's, mean the same: the more tags,
// the more often random bytes are that op.
const STEP: u8 = 0;
const SEND: u8 = 8;
const SEND_RUN: u8 = 20;
const SEND_LONG: u8 = 23;
const FINISH: u8 = 24;
const CONNECT: u8 = 28;
const ADVANCE: u8 = 36;
const READ_OFF: u8 = 42;
const READ_ON: u8 = 44;
const SEND_BUFFER: u8 = 46;
const FAIL: u8 = 48;
const RESET: u8 = 53;
const DESCRIPTORS: u8 = 54;
const KILL: u8 = 55;
const PUSH: u8 = 56;
const PUSH_RUN: u8 = 57;
const PUSH_LONG: u8 = 58;
const NOTIFY: u8 = 59;
const CAP: u8 = 60;
const SUSPEND: u8 = 61;
const RESUME: u8 = 62;
const DRAIN: u8 = 63;
/// Number of tags.
const TAGS: u8 = 64;

/// Shorter runs take no less space than the bytes themselves.
const MIN_RUN: usize = 4;
/// Number of lengths of a run: a few mutations must not make megabytes.
const RUN_LENGTHS: u16 = 4096;

/// How bytes to send stand in the input.
#[derive(Clone, Copy)]
enum Form {
    /// A length of one byte, and the bytes.
    Short,
    /// A length of two bytes, and the byte that is repeated.
    Run,
    /// A length of four bytes, and the bytes.
    Long,
}

impl Script {
    /// Returns the script that a fuzzer's input means. Every input means one.
    ///
    /// An op is one byte modulo 64 and its operands, little-endian and of fixed size. Operands
    /// behind the end of the input are 0, and bytes to send end there. So most changes of a byte
    /// change one op.
    ///
    /// ```
    /// use portcullis::sim::{Op, Script};
    ///
    /// assert_eq!(Script::from_bytes(&[28, 0]).ops, [Op::Connect, Op::Step]);
    /// ```
    pub fn from_bytes(bytes: &[u8]) -> Self {
        let mut input = Input(bytes);
        let mut ops = Vec::new();
        while !input.0.is_empty() {
            ops.push(input.op());
        }
        Self { ops }
    }

    /// Returns an input that [`Script::from_bytes`] makes this script of: a seed for the corpus of
    /// a fuzz target.
    ///
    /// Another version of this crate may make another script of the same bytes. A test that is to
    /// stay has the ops themselves: see [`Script::to_test`]. Of bytes to send, the first 4 GiB are
    /// kept.
    ///
    /// ```
    /// use portcullis::sim::{Op, Script};
    ///
    /// let send = Op::Send { client: 0, bytes: b"12\n30\n".to_vec() };
    /// let seed = Script { ops: vec![Op::Connect, send, Op::Step] };
    /// // std::fs::write("fuzz/corpus/my_handler/two_lines", seed.to_bytes())?;
    /// assert_eq!(Script::from_bytes(&seed.to_bytes()), seed);
    /// ```
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = Vec::new();
        for op in &self.ops {
            write(op, &mut out);
        }
        out
    }
}

/// The input that is left.
struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn byte(&mut self) -> u8 {
        match self.0.split_first() {
            Some((&first, rest)) => {
                self.0 = rest;
                first
            }
            None => 0,
        }
    }

    fn word(&mut self) -> u16 {
        u16::from_le_bytes([self.byte(), self.byte()])
    }

    fn bytes(&mut self, length: usize) -> Vec<u8> {
        let (bytes, rest) = self.0.split_at(length.min(self.0.len()));
        self.0 = rest;
        bytes.to_vec()
    }

    fn payload(&mut self, form: Form) -> Vec<u8> {
        match form {
            Form::Short => {
                let length = self.byte();
                self.bytes(usize::from(length))
            }
            Form::Run => {
                let length = self.word() % RUN_LENGTHS;
                vec![self.byte(); usize::from(length)]
            }
            Form::Long => {
                let length = [self.byte(), self.byte(), self.byte(), self.byte()];
                let length = u32::from_le_bytes(length);
                self.bytes(usize::try_from(length).unwrap_or(usize::MAX))
            }
        }
    }

    fn send(&mut self, form: Form) -> Op {
        Op::Send {
            client: self.word(),
            bytes: self.payload(form),
        }
    }

    fn push(&mut self, form: Form) -> Op {
        Op::Push {
            connection: self.byte(),
            frame: self.payload(form),
        }
    }

    fn op(&mut self) -> Op {
        match self.byte() % TAGS {
            STEP..SEND => Op::Step,
            SEND..SEND_RUN => self.send(Form::Short),
            SEND_RUN..SEND_LONG => self.send(Form::Run),
            SEND_LONG..FINISH => self.send(Form::Long),
            FINISH..CONNECT => Op::Finish {
                client: self.word(),
            },
            CONNECT..ADVANCE => Op::Connect,
            ADVANCE..READ_OFF => Op::Advance {
                millis: self.word(),
            },
            tag @ READ_OFF..SEND_BUFFER => Op::Read {
                client: self.word(),
                on: tag >= READ_ON,
            },
            SEND_BUFFER..FAIL => Op::SendBuffer {
                client: self.word(),
                bytes: self.word(),
            },
            FAIL..RESET => Op::Fail {
                call: self.byte(),
                after: self.byte(),
                error: self.byte(),
            },
            RESET => Op::Reset {
                client: self.word(),
            },
            DESCRIPTORS => Op::Descriptors { more: self.byte() },
            KILL => Op::Kill {
                connection: self.byte(),
            },
            PUSH..PUSH_RUN => self.push(Form::Short),
            PUSH_RUN..PUSH_LONG => self.push(Form::Run),
            PUSH_LONG..NOTIFY => self.push(Form::Long),
            NOTIFY => Op::Notify {
                connection: self.byte(),
            },
            CAP => Op::Cap {
                connections: self.byte(),
            },
            tag @ (SUSPEND | RESUME) => Op::Suspend { on: tag == SUSPEND },
            DRAIN.. => Op::Drain {
                millis: self.word(),
            },
        }
    }
}

fn write(op: &Op, out: &mut Vec<u8>) {
    match op {
        Op::Step => out.push(STEP),
        Op::Connect => out.push(CONNECT),
        Op::Send { client, bytes } => write_payload(
            [SEND, SEND_RUN, SEND_LONG],
            &client.to_le_bytes(),
            bytes,
            out,
        ),
        Op::Finish { client } => write_word(FINISH, *client, out),
        Op::Reset { client } => write_word(RESET, *client, out),
        Op::Read { client, on } => {
            write_word(if *on { READ_ON } else { READ_OFF }, *client, out);
        }
        Op::SendBuffer { client, bytes } => {
            write_word(SEND_BUFFER, *client, out);
            out.extend(bytes.to_le_bytes());
        }
        Op::Advance { millis } => write_word(ADVANCE, *millis, out),
        Op::Fail { call, after, error } => out.extend([FAIL, *call, *after, *error]),
        Op::Descriptors { more } => out.extend([DESCRIPTORS, *more]),
        Op::Kill { connection } => out.extend([KILL, *connection]),
        Op::Push { connection, frame } => {
            write_payload([PUSH, PUSH_RUN, PUSH_LONG], &[*connection], frame, out)
        }
        Op::Notify { connection } => out.extend([NOTIFY, *connection]),
        Op::Cap { connections } => out.extend([CAP, *connections]),
        Op::Suspend { on } => out.push(if *on { SUSPEND } else { RESUME }),
        Op::Drain { millis } => write_word(DRAIN, *millis, out),
    }
}

fn write_word(tag: u8, word: u16, out: &mut Vec<u8>) {
    out.push(tag);
    out.extend(word.to_le_bytes());
}

fn write_payload(tags: [u8; 3], target: &[u8], bytes: &[u8], out: &mut Vec<u8>) {
    let [short, run, long] = tags;
    let first = bytes.first().copied().unwrap_or_default();
    let is_run = bytes.len() >= MIN_RUN && bytes.iter().all(|byte| *byte == first);
    let mut write = |tag: u8, length: &[u8], bytes: &[u8]| {
        for part in [&[tag], target, length, bytes] {
            out.extend(part);
        }
    };
    match (u8::try_from(bytes.len()), u16::try_from(bytes.len())) {
        (_, Ok(length)) if is_run && length < RUN_LENGTHS => {
            write(run, &length.to_le_bytes(), &[first]);
        }
        (Ok(length), _) => write(short, &[length], bytes),
        (Err(_), _) => {
            let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
            write(long, &length.to_le_bytes(), bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::mem::discriminant;

    use super::*;
    use crate::sim::Random;

    fn random_bytes(random: &mut Random, max: usize) -> Vec<u8> {
        let length = random.below(max);
        (0..length).map(|_| random.bits() as u8).collect()
    }

    fn random_payload(random: &mut Random) -> Vec<u8> {
        match random.below(4) {
            0 => vec![random.bits() as u8; random.below(5000)],
            1 => random_bytes(random, 5000),
            _ => random_bytes(random, 10),
        }
    }

    fn random_op(random: &mut Random) -> Op {
        let (number, byte, on) = (
            random.bits() as u16,
            random.bits() as u8,
            random.chance(500),
        );
        match random.below(16) {
            0 => Op::Connect,
            1 => Op::Send {
                client: number,
                bytes: random_payload(random),
            },
            2 => Op::Finish { client: number },
            3 => Op::Reset { client: number },
            4 => Op::Read { client: number, on },
            5 => Op::SendBuffer {
                client: number,
                bytes: random.bits() as u16,
            },
            6 => Op::Step,
            7 => Op::Advance { millis: number },
            8 => Op::Fail {
                call: byte,
                after: random.bits() as u8,
                error: random.bits() as u8,
            },
            9 => Op::Descriptors { more: byte },
            10 => Op::Kill { connection: byte },
            11 => Op::Push {
                connection: byte,
                frame: random_payload(random),
            },
            12 => Op::Notify { connection: byte },
            13 => Op::Cap { connections: byte },
            14 => Op::Suspend { on },
            _ => Op::Drain { millis: number },
        }
    }

    #[test]
    fn every_script_comes_back_from_its_bytes() {
        let mut random = Random::new(1);
        for _ in 0..2000 {
            let length = random.below(20);
            let ops = (0..length).map(|_| random_op(&mut random)).collect();
            let script = Script { ops };
            assert_eq!(Script::from_bytes(&script.to_bytes()), script);
        }
    }

    /// Lengths at which the form changes.
    #[test]
    fn bytes_of_every_length_come_back() {
        for length in (0..10)
            .chain(250..260)
            .chain(4090..4100)
            .chain(65_530..65_540)
        {
            for fill in [b"x".as_slice(), b"ab"] {
                let bytes: Vec<u8> = fill.iter().copied().cycle().take(length).collect();
                let send = Op::Send {
                    client: 258,
                    bytes: bytes.clone(),
                };
                let push = Op::Push {
                    connection: 7,
                    frame: bytes,
                };
                let script = Script {
                    ops: vec![send, push, Op::Step],
                };
                assert_eq!(Script::from_bytes(&script.to_bytes()), script);
            }
        }
    }

    #[test]
    fn every_input_is_a_script_and_no_op_needs_luck() {
        let mut random = Random::new(2);
        let mut kinds = HashSet::new();
        for _ in 0..2000 {
            let script = Script::from_bytes(&random_bytes(&mut random, 100));
            assert_eq!(Script::from_bytes(&script.to_bytes()), script);
            kinds.extend(script.ops.iter().map(discriminant));
        }
        assert_eq!(kinds.len(), 16);
    }

    #[test]
    fn an_input_that_ends_early_has_its_last_op() {
        let ops = |bytes: &[u8]| Script::from_bytes(bytes).ops;
        assert_eq!(ops(&[ADVANCE, 5]), [Op::Advance { millis: 5 }]);
        assert_eq!(ops(&[FAIL]), ops(&[FAIL, 0, 0, 0]));
        let send = |bytes: &[u8]| Op::Send {
            client: 1,
            bytes: bytes.to_vec(),
        };
        let rest = [1, 0, 0xFF, 0xFF, 0xFF, 0xFF];
        assert_eq!(ops(&[&[SEND], &rest[..]].concat()), [send(&[0xFF; 3])]);
        assert_eq!(ops(&[&[SEND_LONG], &rest[..]].concat()), [send(&[])]);
    }
}
