//! The last closes: which connections, when and why.

use std::fmt::{self, Write};
use std::time::Duration;

use crate::addr::Addr;
use crate::id::{ConnId, ListenerId};
use crate::proto::Traffic;
use crate::reason::CloseReason;

/// The most bytes of an error's words that are kept.
const MAX_WORDS: usize = 256;

/// A connection that has ended, or a client that was not let in. The last of them are kept:
/// [`Config::recent_closes`](crate::Config::recent_closes).
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct RecentClose {
    /// Its id; `None` if it was turned away before it got one.
    pub id: Option<ConnId>,
    /// The listener it came through; `None` for one that the server made.
    pub listener: Option<ListenerId>,
    /// The peer's address.
    pub peer: Addr,
    /// The address behind a trusted proxy, if one was told, else the peer's.
    pub source: Addr,
    /// Why it ended.
    pub reason: CloseReason,
    /// What the error behind it says, if there is one; at most 256 bytes.
    pub error: Option<Box<str>>,
    /// From accept to its end; zero for whoever was turned away.
    pub age: Duration,
    /// Bytes and frames it carried.
    pub traffic: Traffic,
    /// How long ago that was.
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

/// What `words` says, as far as it is kept. Stops the writing there: an error may say anything.
pub(crate) fn bounded_words(words: &dyn fmt::Display) -> Box<str> {
    let mut bounded = Bounded(String::new());
    // It fails when there is enough.
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

    /// Says something for ever, as long as it is let.
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
