//! The caption: method, machine, date, rounds, versions, and the reason for the most striking bar.

use crate::common::machine::{machine, programs};
use crate::common::spread::grouped;
use crate::foreign::Foreign;
use crate::results::Row;
use crate::servers::{Kind, TASK_BUFFER};
use crate::Options;

/// Crates whose versions the caption names.
const CRATES: [&str; 6] = [
    "mio",
    "tokio",
    "tokio-util",
    "message-io",
    "rustls",
    "tokio-rustls",
];

/// Least gain from fewer flushes that proves them the reason.
const MUCH: f64 = 1.5;

/// The paragraphs below the chart.
pub fn caption(options: &Options, rows: &[Row], foreign: &Foreign) -> Vec<String> {
    let mut paragraphs = vec![
        format!(
            "Each server is a process of its own on one processor. The clients run on another. A \
             bar is the reference's processor time per message, user and system, divided by this \
             server's in the same round: the median of {} rounds of {} s, in which the servers \
             take turns. The whisker spans all rounds. TCP_NODELAY is set everywhere, and every \
             echoed byte is checked.",
            options.rounds, options.seconds
        ),
        format!(
            "Memory: private dirty pages of the server after each connection has exchanged one \
             message. The kernel's sockets are not included. Median of {} processes. A connection \
             of tokio by hand owns a buffer of {} bytes.",
            options.memory_rounds(),
            grouped(TASK_BUFFER as f64)
        ),
    ];
    paragraphs.extend(why_codec(rows));
    let compilers: Vec<String> = foreign
        .present
        .iter()
        .map(|(_, name)| name.clone())
        .collect();
    paragraphs.push(format!("{}. {}.", machine(), programs(&CRATES, &compilers)));
    if !foreign.absent.is_empty() {
        let absent = foreign.absent.iter();
        let absent = absent.map(|(kind, reason)| format!("{} ({reason})", kind.name()));
        let absent: Vec<String> = absent.collect();
        paragraphs.push(format!("Left out here: {}.", absent.join("; ")));
    }
    paragraphs
}

/// The row in which flushes make the codec of tokio-util most expensive, and its ratio without
/// them.
fn why_codec(rows: &[Row]) -> Option<String> {
    let gain = |row: &Row| {
        let (send, feed) = (row.ratio(Kind::TokioCodec)?, row.ratio(Kind::TokioFeed)?);
        let erlang = row.ratio(Kind::Erlang).map(|ratio| {
            format!(" gen_tcp:send of Erlang writes each frame by itself, too: {ratio:.2}.")
        });
        Some((row.name, send, feed, erlang.unwrap_or_default()))
    };
    let gains = rows.iter().filter_map(gain);
    let most = gains.max_by(|one, other| (one.2 / one.1).total_cmp(&(other.2 / other.1)));
    let (name, send, feed, erlang) = most.filter(|(_, send, feed, _)| feed / send > MUCH)?;
    Some(format!(
        "Why tokio's codec reaches only {send:.2} with {name}: `send` flushes after each frame. So \
         each message costs a system call to write it, and loopback delivers each write by itself. \
         The servers by hand and portcullis answer all frames of a read in one write. So does the \
         same codec with `feed` for each frame and one `flush`: {feed:.2}.{erlang}"
    ))
}
