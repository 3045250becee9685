//! The last closes: which connections, when and why.

use std::fmt::{self, Write};
use std::time::Duration;

use crate::addr::Addr;
use crate::id::{ConnId, ListenerId};
use crate::proto::Traffic;
use crate::reason::CloseReason;

/// Limit on the remembered bytes of an error's text.
const MAX_WORDS: usize = 256;

/// A connection that has ended, or a client that was not admitted. The server remembers the last of
/// them: [`Config::recent_closes`](crate::Config::recent_closes).
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct RecentClose {
    /// Its id; `None` if it was refused before it got one.
    pub id: Option<ConnId>,
    /// Its listener; `None` for an outgoing connection.
    pub listener: Option<ListenerId>,
    /// The peer's address.
    pub peer: Addr,
    /// The address behind a trusted proxy if its header named one, else the peer's.
    pub source: Addr,
    /// Why it ended.
    pub reason: CloseReason,
    /// The text of the error behind it, if there is one; at most 256 bytes.
    pub error: Option<Box<str>>,
    /// Time from accept to its end; zero for a client that was refused.
    pub age: Duration,
    /// Its bytes and frames.
    pub traffic: Traffic,
    /// Time since then.
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
            " after {:.1?}, {} bytes and {} frames in, {} bytes and {} frames out: {}",
            self.age,
            self.traffic.bytes_in,
            self.traffic.frames_in,
            self.traffic.bytes_out,
            self.traffic.frames_out,
            self.reason
        )?;
        match &self.error {
            Some(error) => write!(f, ": {error}"),
            None => Ok(()),
        }
    }
}

/// Formats `words` up to the limit, and stops there: the text of an error may be endless.
pub(crate) fn bounded_words(words: &dyn fmt::Display) -> Box<str> {
    let mut bounded = Bounded(String::new());
    // The writer fails when the limit is reached.
    let _ = write!(bounded, "{words}");
    bounded.0.into_boxed_str()
}

struct Bounded(String);

impl Write for Bounded {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let room = MAX_WORDS - self.0.len().min(MAX_WORDS);
        if text.len() <= room {
            self.0.push_str(text);
            return Ok(());
        }
        let end = (0..=room).rev().find(|&end| text.is_char_boundary(end));
        self.0
            .push_str(text.get(..end.unwrap_or(0)).unwrap_or_default());
        Err(fmt::Error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An endless text.
    struct Endless(&'static str);

    impl fmt::Display for Endless {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            loop {
                f.write_str(self.0)?;
            }
        }
    }

    #[test]
    fn words_are_cut_between_characters() {
        assert_eq!(&*bounded_words(&"short"), "short");
        assert_eq!(bounded_words(&Endless("ab")).len(), 256);
        assert_eq!(bounded_words(&Endless("€")).len(), 255, "three bytes each");
    }
}
