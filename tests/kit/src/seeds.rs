//! Seeds and dictionaries for the fuzzers, made in code as for a target of your own.
//!
//! A seed is a [`Script`] as bytes, behind the bytes that the target reads before it.

use std::fmt::Write as _;

use portcullis::sim::{Action, Call, Op, Script};

/// A file in `fuzz/`: its path there, and its content.
pub type File = (String, Vec<u8>);

/// What stands before the script in an input of a target.
struct Target {
    name: &'static str,
    /// A server as most are.
    prefix: &'static [u8],
    /// Where in the prefix the framings are.
    framings: &'static [usize],
}

/// No options but that bytes are sent as they are, not each in a frame. No actions of handlers.
const REACTOR: Target = Target {
    name: "reactor",
    prefix: &[
        0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    ],
    framings: &[2, 3],
};
/// A recorded world with all payloads, a framing and a cap, and no damage to the file.
const RECORDING: Target = Target {
    name: "recording",
    prefix: &[128, 2, 0, 8, 0, 0, 0, 0, 0],
    framings: &[2],
};
const HANDLER_EXAMPLE: Target = Target {
    name: "handler_example",
    prefix: &[],
    framings: &[],
};

impl Target {
    fn seed(&self, name: &str, framing: u8, script: &Script) -> File {
        let mut bytes = self.prefix.to_vec();
        for &at in self.framings {
            bytes[at] = framing;
        }
        bytes.extend(script.to_bytes());
        (format!("corpus/{}/{name}", self.name), bytes)
    }
}

/// The line framing, which the recording and reactor targets both have under this number.
const LINE: u8 = 4;
/// The framing of the reactor target whose framer fails in every way.
const BRITTLE: u8 = 8;

fn send(client: u16, bytes: &[u8]) -> Op {
    Op::Send {
        client,
        bytes: bytes.to_vec(),
    }
}

fn script(ops: impl IntoIterator<Item = Op>) -> Script {
    Script {
        ops: ops.into_iter().collect(),
    }
}

/// Lives of clients that speak in lines.
fn lines() -> Vec<(&'static str, Script)> {
    let (finish, step) = (Op::Finish { client: 0 }, Op::Step);
    let second = Op::Advance { millis: 1000 };
    vec![
        (
            "conversation",
            script([
                Op::Connect,
                send(0, b"1\n2\n"),
                step.clone(),
                finish.clone(),
            ]),
        ),
        (
            "two_clients",
            script([
                Op::Connect,
                Op::Connect,
                send(0, b"10\n"),
                send(1, b"20\n"),
                step.clone(),
                Op::Reset { client: 1 },
                send(0, b"30\n"),
            ]),
        ),
        (
            "half_a_line",
            script([Op::Connect, send(0, b"4"), second.clone(), send(0, b"2\n")]),
        ),
        (
            "largest_numbers",
            script([Op::Connect, send(0, b"4294967295\n4294967296\n-1\n")]),
        ),
        (
            "slow_reader",
            script([
                Op::Connect,
                Op::Read {
                    client: 0,
                    on: false,
                },
                Op::SendBuffer {
                    client: 0,
                    bytes: 4,
                },
                send(0, &b"1\n".repeat(100)),
                second.clone(),
                Op::Read {
                    client: 0,
                    on: true,
                },
                finish.clone(),
            ]),
        ),
        (
            "drain",
            script([
                Op::Connect,
                send(0, b"5\n6"),
                Op::Drain { millis: 1000 },
                second,
                finish,
            ]),
        ),
        (
            "at_the_cap",
            script([Op::Cap { connections: 1 }, Op::Connect, Op::Connect, step]),
        ),
    ]
}

/// Clients that send frames of the brittle framing: each kind of first byte once, in one piece and in bytes.
fn brittle() -> Vec<(String, Script)> {
    let kinds = [0, 0xF9, 0xFA, 0xFB, 0xFC, 0xFD, 0xFE, 0xFF];
    let in_one = kinds.map(|kind| {
        let whole = script([Op::Connect, send(0, &[kind, 1, 2]), Op::Step]);
        (format!("custom_{kind:02x}"), whole)
    });
    let in_bytes = kinds.map(|kind| {
        let frame = [0, 1, 2, kind, 1, 2];
        let bytes = frame.iter().flat_map(|byte| [send(0, &[*byte]), Op::Step]);
        let ops = std::iter::once(Op::Connect).chain(bytes);
        (format!("custom_{kind:02x}_in_bytes"), script(ops))
    });
    in_one.into_iter().chain(in_bytes).collect()
}

/// Streams for the two custom framings of the target `framing`: frames behind one byte with their length.
fn streams() -> Vec<File> {
    let frame = |length: u8| {
        let mut frame = vec![length];
        frame.extend((0..length).map(|byte| byte % 251));
        frame
    };
    let frames = [0, 1, 3, 255].map(frame).concat();
    let streams: [(&str, &[u8]); 3] = [
        ("frames", &frames),
        ("cut_short", &frames[..frames.len() - 1]),
        ("empty_frames", &[0; 40]),
    ];
    let mut files = Vec::new();
    for (kind, framing) in [
        ("frame", Action::FRAMINGS),
        ("packed", Action::FRAMINGS + 1),
    ] {
        for (cuts, cut) in [("in_bytes", 0), ("in_pieces", 100), ("whole", 255)] {
            for (name, stream) in streams {
                let mut bytes = vec![framing, 0];
                bytes.extend([cut; 12]);
                bytes.extend(stream);
                files.push((format!("corpus/framing/custom_{kind}_{name}_{cuts}"), bytes));
            }
        }
    }
    files
}

/// All seeds.
pub fn seeds() -> Vec<File> {
    let mut files = streams();
    for (name, script) in lines() {
        for target in [REACTOR, RECORDING, HANDLER_EXAMPLE] {
            files.push(target.seed(name, LINE, &script));
        }
    }
    for (name, script) in brittle() {
        files.push(REACTOR.seed(&name, BRITTLE, &script));
    }
    files
}

/// Ops with the operands that decide something.
fn ops() -> Vec<(String, Op)> {
    let client = 0;
    let mut ops = vec![
        ("connect".to_owned(), Op::Connect),
        ("step".to_owned(), Op::Step),
        ("finish".to_owned(), Op::Finish { client }),
        ("reset".to_owned(), Op::Reset { client }),
        ("stop_reading".to_owned(), Op::Read { client, on: false }),
        ("read_on".to_owned(), Op::Read { client, on: true }),
        ("no_room".to_owned(), Op::SendBuffer { client, bytes: 0 }),
        ("send_a_kilobyte".to_owned(), send(client, &[b'a'; 1024])),
        ("kill".to_owned(), Op::Kill { connection: 0 }),
        ("notify".to_owned(), Op::Notify { connection: 0 }),
        ("suspend".to_owned(), Op::Suspend { on: true }),
        ("resume".to_owned(), Op::Suspend { on: false }),
    ];
    for millis in [1, 1000, 60_000] {
        ops.push((format!("advance_{millis}"), Op::Advance { millis }));
        ops.push((format!("drain_{millis}"), Op::Drain { millis }));
    }
    for more in [0, 1, 255] {
        ops.push((format!("descriptors_{more}"), Op::Descriptors { more }));
    }
    for connections in [0, 1, 8] {
        ops.push((format!("cap_{connections}"), Op::Cap { connections }));
    }
    for (call, name) in (0..).zip(Call::ALL) {
        let op = Op::Fail {
            call,
            after: 0,
            error: 0,
        };
        ops.push((format!("fail_{name:?}"), op));
    }
    for bytes in [b"\n".as_slice(), b"a\n", b"\0\x01a"] {
        let name = bytes.iter().map(|byte| format!("{byte:02x}"));
        let name: String = name.collect();
        let frame = bytes.to_vec();
        ops.push((format!("send_{name}"), send(client, bytes)));
        ops.push((
            format!("push_{name}"),
            Op::Push {
                connection: 0,
                frame,
            },
        ));
    }
    ops
}

/// The dictionaries of the targets whose input is a script.
pub fn dictionaries() -> Vec<File> {
    let mut script = "# Made by `cargo run --bin seeds`: the ops of a script.\n".to_owned();
    for (name, op) in ops() {
        // Writing to a string does not fail.
        let _ = write!(script, "{name}=\"");
        for byte in (Script { ops: vec![op] }).to_bytes() {
            let _ = write!(script, "\\x{byte:02x}");
        }
        script.push_str("\"\n");
    }
    let numbers = "# Lines of the example.\n\"0\\x0a\"\n\"1\\x0a\"\n\"4294967295\\x0a\"\n\"4294967296\\x0a\"\n\"-1\\x0a\"\n\" +1 \\x0a\"\n";
    // First bytes that decide, see `fuzz_targets/reactor/framing.rs`.
    let brittle = "# Frames of the custom framing.\n\"\\x00\\x01\\x02\"\n\"\\xf9\\x01\\x00\"\n\"\\xf9\\x01\\x01\"\n\"\\xfa\\x01\\x02\"\n\"\\xfb\\x01\\x02\"\n\"\\xfc\\x01\\x02\"\n\"\\xfd\\x01\\x02\"\n\"\\xfe\\x01\\x02\"\n\"\\xff\\x01\\x02\"\n";
    [
        (HANDLER_EXAMPLE, numbers),
        (REACTOR, brittle),
        (RECORDING, ""),
    ]
    .into_iter()
    .map(|(target, more)| {
        let content = format!("{script}{more}");
        let path = format!("dictionaries/{}.dict", target.name);
        (path, content.into_bytes())
    })
    .collect()
}
