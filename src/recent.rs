//! The last closes: which connections, when and why.

use std::fmt;
use std::time::Duration;

use crate::addr::Addr;
use crate::escape::Escaped;
use crate::id::{ConnId, ListenerId};
use crate::proto::Traffic;
use crate::reason::{write_reason, CloseReason};

/// Limit on the remembered bytes of an error's text.
const MAX_TEXT: usize = 256;

/// A connection that has ended, or a client that was not admitted. The server keeps the last
/// [`Config::recent_closes`](crate::Config::recent_closes).
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct RecentClose {
    /// The connection's id; `None` for a client that was refused before it got one.
    pub id: Option<ConnId>,
    /// Its listener; `None` for an outgoing connection.
    pub listener: Option<ListenerId>,
    /// The peer's address.
    pub peer: Addr,
    /// The address behind a trusted proxy if its header named an internet address, else the peer's.
    pub source: Addr,
    /// The reason for the end.
    pub reason: CloseReason,
    /// The text of the error behind it, if there is one: on one line, with control characters
    /// escaped, at most 256 bytes.
    pub error: Option<Box<str>>,
    /// The label of the close, if it has one ([`Close::labelled`](crate::Close::labelled)).
    pub label: Option<&'static str>,
    /// Time from accept to the end, or from the request of an outgoing connection; zero for a
    /// client that was refused.
    pub age: Duration,
    /// Its bytes and frames.
    pub traffic: Traffic,
    /// Time since the end.
    pub ago: Duration,
}

impl fmt::Display for RecentClose {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.1?} ago: ", self.ago)?;
        match (self.id, self.listener) {
            (Some(id), Some(listener)) => write!(f, "{id} of {listener} from {}", self.source)?,
            (Some(id), None) => write!(f, "{id} to {}", self.source)?,
            (None, Some(listener)) => write!(f, "{listener} from {}", self.source)?,
            (None, None) => write!(f, "{}", self.source)?,
        }
        write!(
            f,
            " after {:.1?}, {} bytes and {} frames in, {} bytes and {} frames out: ",
            self.age,
            self.traffic.bytes_in,
            self.traffic.frames_in,
            self.traffic.bytes_out,
            self.traffic.frames_out
        )?;
        write_reason(f, self.reason, self.label)?;
        match &self.error {
            Some(error) => write!(f, ": {error}"),
            None => Ok(()),
        }
    }
}

/// Formats the text of an error on one line, up to the limit: it may be endless, or a peer's.
pub(crate) fn bounded_text(text: &dyn fmt::Display) -> Box<str> {
    Escaped::with_max(text, MAX_TEXT)
        .to_string()
        .into_boxed_str()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::ServerNumber;

    /// A client that was turned away has no id, an outgoing connection no listener.
    #[test]
    fn a_close_says_what_it_was_and_where() {
        let addr = Addr::Tcp(([192, 0, 2, 1], 80).into());
        let (id, listener) = (
            ConnId::new(ServerNumber::NONE, 7, 3),
            ListenerId::new(ServerNumber::NONE, 2),
        );
        for (id, listener, words) in [
            (Some(id), Some(listener), "7.3 of L2 from 192.0.2.1:80"),
            (Some(id), None, "7.3 to 192.0.2.1:80"),
            (None, Some(listener), "L2 from 192.0.2.1:80"),
            (None, None, "192.0.2.1:80"),
        ] {
            let close = RecentClose {
                id,
                listener,
                peer: addr.clone(),
                source: addr.clone(),
                reason: CloseReason::Denied,
                error: None,
                label: None,
                age: Duration::ZERO,
                traffic: Traffic::default(),
                ago: Duration::from_secs(2),
            };
            let text = close.to_string();
            let start = format!("2.0s ago: {words} after 0.0ns, 0 bytes");
            assert!(text.starts_with(&start), "{text}");
        }
    }
}
