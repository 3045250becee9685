//! The model's table of transitions, and what the code has beyond it.

use std::collections::BTreeSet;

use portcullis::{CloseReason, State};

use crate::connection::Life;
use crate::fairness::Reachable;
use crate::world::Client;
use crate::Setting;

/// Transitions of the code that are not in the model, and why.
pub const UNKNOWN_TRANSITIONS: [((State, State), &str); 4] = [
    ((State::Connecting, State::Handshaking), OUTGOING),
    ((State::Connecting, State::Open), OUTGOING),
    ((State::Connecting, State::Closing), OUTGOING),
    (
        (State::Open, State::Handshaking),
        "an upgrade by `start_tls`: the model knows no protocols",
    ),
];

/// Reasons of the code that are not in the model, and why.
pub const UNKNOWN_REASONS: [(CloseReason, &str); 17] = [
    (CloseReason::Failed, "as Closed, with an error"),
    (
        CloseReason::SlowConsumer,
        "as Closed: the handler returned the error of `send`",
    ),
    (CloseReason::Killed, "as Aborted, by the owner"),
    (CloseReason::Detached, "the socket leaves the loop"),
    (CloseReason::TimedOut, SOCKET),
    (CloseReason::Unreachable, SOCKET),
    (CloseReason::Io, SOCKET),
    (CloseReason::Unregistered, SOCKET),
    (CloseReason::BadFrame, "as FrameTooLarge, by a framer"),
    (CloseReason::Tls, TLS),
    (CloseReason::TlsTruncated, TLS),
    (CloseReason::UnexpectedTls, TLS),
    (CloseReason::RateLimited, RATES),
    (CloseReason::SourceLimited, RATES),
    (CloseReason::OverMemory, "the model knows no sizes"),
    (CloseReason::ConnectFailed, OUTGOING),
    (CloseReason::ConnectTimeout, OUTGOING),
];

const OUTGOING: &str = "outgoing connections have no listener";
const SOCKET: &str = "as Reset: another error of the socket";
const TLS: &str = "as Malformed or Truncated, in an open TLS connection, or of TLS in the clear";
const RATES: &str = "the model knows no durations, and so no rates";

/// The transitions between the states of a connection that the model makes. In the model a
/// connection may end at once. In
/// the code it closes first, in no time.
pub fn transitions(setting: &Setting) -> BTreeSet<(State, State)> {
    let state = |client: &Client| match client {
        Client::Absent | Client::Waiting => None,
        Client::Gone(_) => Some(State::Closing),
        Client::Connected(conn) => Some(match conn.life {
            Life::Accepting => State::Accepting,
            Life::Handshaking => State::Handshaking,
            Life::Open(_) => State::Open,
            Life::Closing(_) => State::Closing,
        }),
    };
    let reachable = Reachable::explore(setting, |_, _| {});
    let mut transitions = BTreeSet::new();
    for edge in reachable.graph.edge_indices() {
        let Some((from, to)) = reachable.graph.edge_endpoints(edge) else {
            continue;
        };
        let (from, to) = (&reachable.graph[from], &reachable.graph[to]);
        for (before, after) in from.clients.iter().zip(&to.clients) {
            if let (Some(before), Some(after)) = (state(before), state(after)) {
                transitions.insert((before, after));
            }
        }
    }
    transitions.retain(|(from, to)| from != to);
    transitions
}
