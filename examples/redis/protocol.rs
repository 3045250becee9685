//! RESP2, the protocol of Redis: where a command ends, what its arguments are, and replies.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use portcullis::{Conn, Decoded, FrameError, Framer, SendError};

/// Maximum length of an inline command, as in Redis.
pub const MAX_INLINE: usize = 64 * 1024;
/// Maximum length of any command.
pub const MAX_COMMAND: usize = 2 * 1024 * 1024 * 1024;
/// Maximum number of arguments of one command.
const MAX_ARGUMENTS: i64 = 1024 * 1024;
/// A header line is shorter: a mark, a sign, 19 digits, CR LF.
const MAX_HEADER: usize = 32;

/// A longer reply is given away, and so not copied again.
const MAX_SPARE: usize = 4096;
/// The places of more words are not kept: they take more memory than a command of short ones.
const MAX_KEPT: usize = 1024;

/// Cuts the stream into whole commands of at most `limit` bytes, inline commands included, and
/// remembers the words of the last one.
pub struct Commands {
    limit: usize,
    /// Length of the scanned part of an incomplete command: no byte is scanned twice.
    at: usize,
    /// Number of arguments behind `at`.
    missing: i64,
    /// Where the first words of the command begin and end. A command is shorter than 4 GiB.
    words: Vec<(u32, u32)>,
}

impl Commands {
    /// `limit` is at most [`MAX_COMMAND`].
    pub fn new(limit: usize) -> Self {
        Self {
            limit,
            at: 0,
            missing: 0,
            words: Vec::new(),
        }
    }

    /// Returns the name and the arguments of the command that was cut last. An empty command has
    /// neither. Inline commands are split at blanks; quotes mean nothing.
    pub fn words<'a>(&self, command: &'a [u8]) -> Vec<&'a [u8]> {
        let word = |&(begin, end): &(u32, u32)| command.get(begin as usize..end as usize);
        let words = self.words.iter().filter_map(word);
        words.chain(self.further_words(command)).collect()
    }

    /// Returns the words behind those whose places are kept.
    fn further_words<'a>(&self, command: &'a [u8]) -> impl Iterator<Item = &'a [u8]> {
        let is_inline = !command.starts_with(b"*");
        let mut at = match self.words.last() {
            Some(&(_, end)) if self.words.len() == MAX_KEPT => end as usize,
            _ => command.len(),
        };
        std::iter::from_fn(move || {
            let word = match is_inline {
                true => inline_word(command, at),
                false => bulk(command, at + 2, usize::MAX).ok().flatten(),
            }?;
            at = word.end;
            command.get(word)
        })
    }

    fn push(&mut self, word: Range<usize>) {
        if self.words.len() < MAX_KEPT {
            self.words.push((word.start as u32, word.end as u32));
        }
    }

    fn scan(&mut self, input: &[u8]) -> Result<Decoded, FrameError> {
        if self.at == 0 {
            self.words.clear();
        }
        if !input.starts_with(b"*") {
            return self.scan_inline(input);
        }
        if self.at == 0 {
            let Some((count, end)) = argument_count(input)? else {
                return Ok(Decoded::More);
            };
            (self.missing, self.at) = (count, end);
        }
        while self.missing > 0 {
            let Some(argument) = bulk(input, self.at, self.limit)? else {
                return Ok(Decoded::More);
            };
            let end = argument.end + 2;
            if input.len() < end {
                return Ok(Decoded::Need(end));
            }
            (self.missing, self.at) = (self.missing - 1, end);
            self.push(argument);
        }
        Ok(frame(self.at))
    }

    fn scan_inline(&mut self, input: &[u8]) -> Result<Decoded, FrameError> {
        let new = input.get(self.at..).unwrap_or_default();
        match new.iter().position(|&byte| byte == b'\n') {
            Some(end) if self.at + end < MAX_INLINE => {
                let end = self.at + end + 1;
                let (line, mut at) = (input.get(..end).unwrap_or_default(), 0);
                while let Some(word) = inline_word(line, at) {
                    at = word.end;
                    self.push(word);
                }
                return Ok(frame(end));
            }
            None if input.len() < MAX_INLINE => self.at = input.len(),
            _ => return Err(FrameError::new("too big inline request")),
        }
        Ok(Decoded::More)
    }
}

fn frame(end: usize) -> Decoded {
    Decoded::Frame {
        payload: 0..end,
        consumed: end,
    }
}

impl Framer for Commands {
    fn decode(&mut self, input: &[u8]) -> Result<Decoded, FrameError> {
        let decoded = self.scan(input)?;
        if let Decoded::Frame { .. } = decoded {
            (self.at, self.missing) = (0, 0);
        }
        Ok(decoded)
    }
}

/// Returns where the next word of an inline command is, from `at` on.
fn inline_word(line: &[u8], at: usize) -> Option<Range<usize>> {
    let rest = line.get(at..)?;
    let blanks = rest.iter().position(|byte| !byte.is_ascii_whitespace())?;
    let word = rest.get(blanks..)?.iter().position(u8::is_ascii_whitespace);
    let begin = at + blanks;
    Some(begin..word.map_or(line.len(), |length| begin + length))
}

/// Reads `*3` at the front of a command: the number of arguments, and where the first one begins.
fn argument_count(input: &[u8]) -> Result<Option<(i64, usize)>, FrameError> {
    match header(input, 0, b'*')? {
        Some((Some(count), end)) if count <= MAX_ARGUMENTS => Ok(Some((count, end))),
        Some(_) => Err(FrameError::new("invalid multibulk length")),
        None => Ok(None),
    }
}

/// Reads `$5` at `at`: where the argument is, whether or not it has arrived.
fn bulk(input: &[u8], at: usize, limit: usize) -> Result<Option<Range<usize>>, FrameError> {
    let Some((length, begin)) = header(input, at, b'$')? else {
        return Ok(None);
    };
    let length = length.and_then(|length| usize::try_from(length).ok());
    match length.filter(|&length| length <= limit.saturating_sub(begin)) {
        Some(length) => Ok(Some(begin..begin + length)),
        None => Err(FrameError::new("invalid bulk length")),
    }
}

/// Reads the header line at `at`: its number, if it is one, and where the line ends.
fn header(input: &[u8], at: usize, mark: u8) -> Result<Option<(Option<i64>, usize)>, FrameError> {
    let Some((&first, rest)) = input.get(at..).and_then(<[u8]>::split_first) else {
        return Ok(None);
    };
    if first != mark {
        let (mark, first) = (char::from(mark), first.escape_ascii());
        return Err(FrameError::new(format!("expected '{mark}', got '{first}'")));
    }
    match rest.iter().take(MAX_HEADER).position(|&byte| byte == b'\r') {
        Some(end) if rest.len() < end + 2 => Ok(None),
        Some(end) => Ok(Some((rest.get(..end).and_then(integer), at + end + 3))),
        None if rest.len() < MAX_HEADER => Ok(None),
        None if mark == b'*' => Err(FrameError::new("too big mbulk count string")),
        None => Err(FrameError::new("too big bulk count string")),
    }
}

/// Reads an integer in its one canonical form, as Redis does: no `+1`, no `01`.
pub fn integer(text: &[u8]) -> Option<i64> {
    let (sign, digits) = match text {
        [b'-', digits @ ..] => (-1, digits),
        digits => (1, digits),
    };
    if !matches!(digits, [b'1'..=b'9', ..]) {
        return (text == b"0").then_some(0);
    }
    digits.iter().try_fold(0_i64, |number, digit| match digit {
        b'0'..=b'9' => number
            .checked_mul(10)?
            .checked_add(sign * i64::from(digit - b'0')),
        _ => None,
    })
}

/// One reply under construction. Beyond its limit it takes no more, so that a command that asks for
/// the same large value a million times takes no memory for it.
pub struct Reply {
    bytes: Vec<u8>,
    /// The string of a reply that is one shared bulk string; `bytes` is its header.
    shared: Option<Arc<[u8]>>,
    limit: usize,
    is_cut: bool,
}

impl Reply {
    /// `spare` is the buffer of an earlier reply.
    pub fn new(limit: usize, spare: Vec<u8>) -> Self {
        Self {
            bytes: spare,
            shared: None,
            limit,
            is_cut: false,
        }
    }

    pub fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }

    /// Sends the reply as one frame. Returns a spare buffer, unless the reply was long.
    pub fn send<A>(mut self, conn: &mut Conn<'_, A>) -> (Result<(), SendError>, Vec<u8>) {
        let sent = match self.shared {
            Some(string) => conn.send((&self.bytes, string, "\r\n")),
            None if self.bytes.len() < MAX_SPARE => conn.send(&self.bytes),
            None => conn.send(std::mem::take(&mut self.bytes)),
        };
        self.bytes.clear();
        (sent, self.bytes)
    }

    /// Whether the reply is incomplete because of its limit.
    pub fn is_cut(&self) -> bool {
        self.is_cut
    }

    pub fn simple(&mut self, text: &str) {
        self.line(b'+', text);
    }

    /// Replaces the reply with an error. Its text may quote the client: control characters become
    /// blanks.
    pub fn error(&mut self, text: &str) {
        self.bytes.clear();
        self.shared = None;
        self.is_cut = false;
        let text = text.replace(|character: char| character.is_control(), " ");
        self.line(b'-', &text);
    }

    pub fn integer(&mut self, number: impl fmt::Display) {
        self.line(b':', &number.to_string());
    }

    pub fn bulk(&mut self, bytes: impl AsRef<[u8]>) {
        let bytes = bytes.as_ref();
        self.line(b'$', &bytes.len().to_string());
        self.put(bytes);
        self.put(b"\r\n");
    }

    /// Makes the reply a bulk string, without a copy of it.
    pub fn shared(&mut self, string: &Arc<[u8]>) {
        self.line(b'$', &string.len().to_string());
        self.shared = Some(Arc::clone(string));
    }

    /// Appends a bulk string, or the null bulk string.
    pub fn bulk_or_null(&mut self, bytes: Option<impl AsRef<[u8]>>) {
        match bytes {
            Some(bytes) => self.bulk(bytes),
            None => self.null(),
        }
    }

    pub fn null(&mut self) {
        self.line(b'$', "-1");
    }

    /// Appends an array of bulk strings.
    pub fn bulks<T: AsRef<[u8]>>(&mut self, items: impl IntoIterator<Item = T>) {
        let items: Vec<T> = items.into_iter().collect();
        self.array(items.len());
        items.iter().for_each(|item| self.bulk(item));
    }

    /// Appends the header of an array; its elements follow.
    pub fn array(&mut self, length: usize) {
        self.line(b'*', &length.to_string());
    }

    pub fn null_array(&mut self) {
        self.line(b'*', "-1");
    }

    fn line(&mut self, mark: u8, text: &str) {
        if self.bytes.len() >= self.limit {
            self.is_cut = true;
        } else {
            self.bytes.push(mark);
            self.bytes.extend_from_slice(text.as_bytes());
            self.bytes.extend_from_slice(b"\r\n");
        }
    }

    fn put(&mut self, bytes: &[u8]) {
        if !self.is_cut {
            self.bytes.extend_from_slice(bytes);
        }
    }
}
