//! Scripts in few bytes, so that one byte changed changes one thing, and what is frequent in a server's life is
//! frequent here.

use std::fmt;

use libfuzzer_sys::arbitrary::{Result, Unstructured};
use portcullis::sim::{Op, Script};

/// What is left of the input, as a script.
pub fn script(input: &mut Unstructured<'_>) -> Result<Script> {
    let mut ops = Vec::new();
    while !input.is_empty() {
        ops.push(op(input)?);
    }
    Ok(Script { ops })
}

fn op(input: &mut Unstructured<'_>) -> Result<Op> {
    let [what, target] = input.arbitrary()?;
    let (client, connection) = (u16::from(target), target);
    Ok(match what % 64 {
        0..=7 => Op::Step,
        8..=23 => Op::Send {
            client,
            bytes: bytes(input)?,
        },
        24..=27 => Op::Finish { client },
        28..=35 => Op::Connect,
        36..=41 => Op::Advance {
            millis: span(input)?,
        },
        42..=45 => Op::Read {
            client,
            on: what % 2 == 0,
        },
        46..=47 => Op::SendBuffer {
            client,
            bytes: span(input)?.max(4),
        },
        48..=52 => {
            let [after, error] = input.arbitrary()?;
            Op::Fail {
                call: target,
                after: after % 4,
                error,
            }
        }
        53 => Op::Reset { client },
        54 => Op::Descriptors { more: target },
        55 => Op::Kill { connection },
        56..=57 => Op::Push {
            connection,
            frame: bytes(input)?,
        },
        58 => Op::Notify { connection },
        59 => Op::Cap {
            connections: target,
        },
        60..=62 => Op::Suspend {
            on: target % 2 == 0,
        },
        _ => Op::Drain {
            millis: span(input)?,
        },
    })
}

/// Some of the input, or one byte over and over.
fn bytes(input: &mut Unstructured<'_>) -> Result<Vec<u8>> {
    match input.arbitrary::<u8>()? {
        count @ 0..=63 => Ok(input.bytes(input.len().min(count.into()))?.to_vec()),
        size => Ok(vec![input.arbitrary()?; amount(size / 2)]),
    }
}

/// 0 to 60,000.
fn span(input: &mut Unstructured<'_>) -> Result<u16> {
    let byte: u8 = input.arbitrary()?;
    Ok(u16::try_from(amount(byte / 4 * 3)).unwrap_or(u16::MAX))
}

/// 0 to a million, close together at first and ever further apart.
pub fn amount(byte: u8) -> usize {
    let (steps, size) = (usize::from(byte % 16), byte / 16);
    ((16 + steps) << size) - 16
}

/// A readable script: a line for each op, for any number of bytes.
pub struct Lines<'a>(pub &'a Script);

impl fmt::Debug for Lines<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for op in &self.0.ops {
            match op {
                Op::Send { client, bytes } => {
                    writeln!(f, "Send {{ client: {client}, bytes: {} }}", text(bytes))?
                }
                Op::Push { connection, frame } => {
                    writeln!(
                        f,
                        "Push {{ connection: {connection}, frame: {} }}",
                        text(frame)
                    )?;
                }
                op => writeln!(f, "{op:?}")?,
            }
        }
        Ok(())
    }
}

fn text(bytes: &[u8]) -> String {
    match bytes {
        [first, rest @ ..] if rest.len() > 8 && rest.iter().all(|byte| byte == first) => {
            format!("[{first}; {}]", bytes.len())
        }
        bytes => format!("b\"{}\"", bytes.escape_ascii()),
    }
}
