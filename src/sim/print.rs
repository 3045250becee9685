//! Scripts as Rust.

use std::fmt::Write as _;

use super::script::{Op, Script};

impl Script {
    /// Returns the text of a Rust test that makes this script as `script`, and then runs the
    /// statements in `play`. It is laid out as rustfmt does.
    ///
    /// ```
    /// use portcullis::sim::{Op, Script};
    ///
    /// let script = Script { ops: vec![Op::Connect, Op::Reset { client: 0 }] };
    /// let expected = "\
    /// #[test]
    /// fn survives_a_reset() {
    ///     use portcullis::sim::{Op, Script};
    ///
    ///     let script = Script {
    ///         ops: vec![
    ///             Op::Connect,
    ///             Op::Reset { client: 0 },
    ///         ],
    ///     };
    ///     play(&script);
    /// }
    /// ";
    /// assert_eq!(script.to_test("survives_a_reset", "play(&script);"), expected);
    /// ```
    pub fn to_test(&self, name: &str, play: &str) -> String {
        let mut text = format!(
            "#[test]\nfn {name}() {{\n    use portcullis::sim::{{Op, Script}};\n\n    \
             let script = Script {{\n        ops: vec![\n"
        );
        for op in &self.ops {
            // Writing to a string does not fail.
            let _ = match op {
                Op::Send { client, bytes } => {
                    write_bytes(&mut text, "Send", "client", *client, "bytes", bytes)
                }
                Op::Push { connection, frame } => {
                    let connection = u16::from(*connection);
                    write_bytes(&mut text, "Push", "connection", connection, "frame", frame)
                }
                Op::Read { .. } | Op::SendBuffer { .. } | Op::Fail { .. } => {
                    write_fields(&mut text, op)
                }
                op => writeln!(text, "            Op::{op:?},"),
            };
        }
        text.push_str("        ],\n    };\n");
        for line in play.lines() {
            let _ = writeln!(text, "    {line}");
        }
        text.push_str("}\n");
        text
    }
}

fn write_bytes(
    text: &mut String,
    op: &str,
    target: &str,
    number: u16,
    what: &str,
    bytes: &[u8],
) -> std::fmt::Result {
    let bytes = bytes.escape_ascii();
    writeln!(
        text,
        "            Op::{op} {{\n                {target}: {number},\n                \
         {what}: b\"{bytes}\".to_vec(),\n            }},"
    )
}

/// Several fields: each on a line.
fn write_fields(text: &mut String, op: &Op) -> std::fmt::Result {
    for line in format!("Op::{op:#?},").lines() {
        writeln!(text, "            {line}")?;
    }
    Ok(())
}
