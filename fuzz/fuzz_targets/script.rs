//! Scripts at the end of an input, and their text.

use std::fmt;

use libfuzzer_sys::arbitrary::{Result, Unstructured};
use portcullis::sim::{Op, Script};

/// What is left of the input, as a script.
pub fn script(input: &mut Unstructured<'_>) -> Result<Script> {
    let mut script = Script::from_bytes(input.bytes(input.len())?);
    for op in &mut script.ops {
        match op {
            // With less room an answer takes as many writes as it has bytes.
            Op::SendBuffer { bytes, .. } => *bytes = (*bytes).max(4),
            // Most calls are few in a world.
            Op::Fail { after, .. } => *after %= 4,
            _ => {}
        }
    }
    Ok(script)
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
