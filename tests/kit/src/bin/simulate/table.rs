//! What a campaign has reached, and what it has not.

use std::collections::BTreeMap;
use std::fmt::Write;

use portcullis::sim::{Call, Coverage, Fault, Stage};
use portcullis::CloseReason;

const STAGES: [Stage; 7] = [
    Stage::NoConnection,
    Stage::New,
    Stage::Accepting,
    Stage::Connecting,
    Stage::Handshaking,
    Stage::Open,
    Stage::Closing,
];

/// Why no campaign reaches a cell, for those that none can.
fn unreachable(fault: Fault, stage: Stage, tls: bool) -> Option<&'static str> {
    let of_a_connection = matches!(
        fault,
        Fault::Error(
            Call::Register | Call::Reregister | Call::Read | Call::Write | Call::Shutdown,
            _
        ) | Fault::ShortRead
            | Fault::ShortWrite
    );
    match (fault, stage) {
        (_, Stage::Handshaking) if !tls => Some("without TLS nobody is in a handshake"),
        // Of a watched descriptor.
        (Fault::Error(Call::Register, _), Stage::NoConnection) => None,
        (Fault::Error(Call::Register, _), stage) if stage != Stage::New => {
            Some("a socket is registered once, in the turn that accepts it or begins to connect")
        }
        (Fault::Error(Call::Reregister, _), Stage::Connecting) => {
            Some("until it is connected it is registered for both")
        }
        (_, Stage::NoConnection) if of_a_connection => Some("it happens to a connection"),
        (
            Fault::Error(Call::Poll | Call::RegisterListener | Call::DeregisterListener, _),
            stage,
        ) if stage != Stage::NoConnection => Some("it concerns no connection"),
        (Fault::Error(Call::Accept | Call::Connect, _), stage) if stage != Stage::NoConnection => {
            Some("there is no connection yet")
        }
        _ => None,
    }
}

/// Cells that only a large campaign reaches. A remote server sends an iteration after the connect,
/// unless a full batch has held back the event that reports the connect. The first write that finds
/// no room is seldom one of the last.
fn is_rare(fault: Fault, stage: Stage) -> bool {
    match stage {
        Stage::Connecting => fault == Fault::ShortRead,
        Stage::Closing => matches!(fault, Fault::Error(Call::Reregister, _)),
        _ => false,
    }
}

fn is_reachable(reason: CloseReason, tls: bool) -> bool {
    tls || !matches!(
        reason,
        CloseReason::TlsHandshake
            | CloseReason::Tls
            | CloseReason::TlsTruncated
            | CloseReason::NotTls
    )
}

fn symbol(errno: i32) -> String {
    macro_rules! symbols {
        ($($name:ident)*) => {
            match errno {
                $(libc::$name => stringify!($name).to_owned(),)*
                other => format!("errno {other}"),
            }
        };
    }
    symbols!(EINTR EAGAIN ECONNABORTED EPROTO ENETDOWN EHOSTUNREACH ENOPROTOOPT EOPNOTSUPP ETIMEDOUT EPERM EMFILE ENFILE
        ENOBUFS ENOMEM EINVAL ENOSPC ECONNREFUSED ENETUNREACH EADDRNOTAVAIL ECONNRESET EIO EPIPE ENOTCONN)
}

/// Faults × stages, changes of stage, and reasons; with the gaps at the end.
pub fn render(coverage: &Coverage, reasons: &BTreeMap<CloseReason, u64>, tls: bool) -> String {
    let mut text = String::new();
    let mut gaps = Vec::new();
    let mut excuses: BTreeMap<&str, usize> = BTreeMap::new();
    let _ = write!(
        text,
        "how often which fault met a connection at which stage:\n{:32}",
        ""
    );
    for stage in STAGES {
        let _ = write!(text, "{:>12}", stage.to_string());
    }
    for fault in Fault::all() {
        let name = match fault {
            Fault::Error(call, errno) => format!("{call} {}", symbol(errno)),
            fault => format!("{fault:?}"),
        };
        let _ = write!(text, "\n  {name:30}");
        for stage in STAGES {
            let count = coverage.faults.get(&(fault, stage)).copied().unwrap_or(0);
            let cell = match (count, unreachable(fault, stage, tls)) {
                (0, Some(excuse)) => {
                    *excuses.entry(excuse).or_default() += 1;
                    "-".to_owned()
                }
                (0, None) if is_rare(fault, stage) => "rare".to_owned(),
                (0, None) => {
                    gaps.push(format!("{name} at {stage}"));
                    "GAP".to_owned()
                }
                (count, None) => count.to_string(),
                (count, Some(excuse)) => {
                    gaps.push(format!("{name} at {stage} was reached, although {excuse}"));
                    count.to_string()
                }
            };
            let _ = write!(text, "{cell:>12}");
        }
    }
    text.push_str("\n  -: out of reach by construction:\n");
    for (excuse, cells) in excuses {
        let _ = writeln!(text, "{cells:>6} cells: {excuse}");
    }
    text.push_str("from stage to stage between two turns:\n");
    for &(before, after) in Stage::MOVES {
        let count = coverage.moves.get(&(before, after)).copied().unwrap_or(0);
        let name = format!("{before} to {after}");
        if !tls && [before, after].contains(&Stage::Handshaking) {
            continue;
        }
        if (before, after) == (Stage::Connecting, Stage::Handshaking) {
            // No world connects over TLS; `tests/connections/connect_tls.rs` does.
            continue;
        }
        if count == 0 {
            gaps.push(name.clone());
        }
        let _ = writeln!(text, "{count:>12}  {name}");
    }
    text.push_str("how connections ended:\n");
    for &reason in CloseReason::ALL {
        let count = reasons.get(&reason).copied().unwrap_or(0);
        match (count, is_reachable(reason, tls)) {
            (0, false) => {
                let _ = writeln!(text, "{:>12}  {reason} (without TLS, never)", "-");
                continue;
            }
            (0, true) => gaps.push(reason.to_string()),
            _ => {}
        }
        let _ = writeln!(text, "{count:>12}  {reason}");
    }
    if gaps.is_empty() {
        text.push_str("no gaps\n");
    } else {
        let _ = writeln!(text, "{} gaps:\n  {}", gaps.len(), gaps.join("\n  "));
    }
    text
}
