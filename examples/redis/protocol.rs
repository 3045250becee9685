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
const MAX_ARGUMENTS: usize = 1024 * 1024;
/// A header line is shorter: a mark, a sign, 19 digits, CR LF.
const MAX_HEADER: usize = 32;
/// With one more digit, a larger number is above every limit.
const MAX_FRONT: usize = MAX_COMMAND / 10;

/// A longer reply is given away, and so not copied again.
const MAX_SPARE: usize = 4096;
/// The places of more words are not kept: they take more memory than a command of short ones.
const MAX_KEPT: usize = 1024;

/// A batch is cut in one step. It has at most so many commands, and commands behind the first have
/// at most so many words, and end before this length of the batch.
const MAX_BATCH: usize = 64;
const MAX_SHORT: usize = 8;
const MAX_LENGTH: usize = 16 * 1024;

/// Cuts the stream into batches of whole commands: those of a pipeline that were read together, or
/// one alone if it is long or inline. Remembers the words of the last batch.
pub struct Commands {
    /// Maximum length of a command, inline commands included.
    limit: usize,
    /// Length of the scanned part of an incomplete command: no byte of it is scanned twice.
    at: usize,
    /// Number of arguments behind `at`.
    missing: usize,
    batch: Batch,
}

/// Where the words of a batch are. A batch is shorter than 4 GiB.
#[derive(Default)]
pub struct Batch {
    /// Begin and end of each word; of a long command the first ones.
    words: Vec<(u32, u32)>,
    /// The number of words up to the end of each command.
    ends: Vec<u32>,
}

impl Batch {
    /// Returns the number of commands.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Returns the name and the arguments of a command, in `few` if it has room for them, else in
    /// `many`. An empty command has neither. Inline commands are split at blanks; quotes mean
    /// nothing.
    pub fn words<'a, 'w>(
        &self,
        number: usize,
        commands: &'a [u8],
        few: &'w mut [&'a [u8]],
        many: &'w mut Vec<&'a [u8]>,
    ) -> &'w [&'a [u8]] {
        let end_of = |number| self.ends.get(number).map_or(0, |&end| end as usize);
        let begin = number.checked_sub(1).map_or(0, end_of);
        let places = self.words.get(begin..end_of(number)).unwrap_or_default();
        let word = |&(begin, end): &(u32, u32)| commands.get(begin as usize..end as usize);
        let words = places.iter().map(word).map(Option::unwrap_or_default);
        let Some(few) = few.get_mut(..places.len()) else {
            many.extend(words.chain(self.further_words(commands)));
            return many;
        };
        for (place, word) in few.iter_mut().zip(words) {
            *place = word;
        }
        few
    }

    /// Returns the words behind those whose places are kept. Such a command is alone.
    fn further_words<'a>(&self, command: &'a [u8]) -> impl Iterator<Item = &'a [u8]> + use<'a> {
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

    fn clear(&mut self) {
        self.words.clear();
        self.ends.clear();
    }

    #[inline]
    fn push(&mut self, word: Range<usize>) {
        if self.words.len() < MAX_KEPT {
            self.words.push((word.start as u32, word.end as u32));
        }
    }

    fn end(&mut self) {
        self.ends.push(self.words.len() as u32);
    }

    /// Appends the command at `at` if it is complete and short. Returns where it ends. The front of
    /// anything else is scanned once more when it is the first.
    fn push_short(&mut self, input: &[u8], at: usize, limit: usize) -> Option<usize> {
        let max = MAX_LENGTH.min(at.saturating_add(limit));
        let (count, mut end) = header(input, at, b'*').ok()??;
        if count > MAX_SHORT {
            return None;
        }
        let kept = self.words.len();
        for _ in 0..count {
            match bulk(input, end, max) {
                Ok(Some(word)) if word.end + 2 <= input.len() => {
                    end = word.end + 2;
                    self.words.push((word.start as u32, word.end as u32));
                }
                _ => {
                    self.words.truncate(kept);
                    return None;
                }
            }
        }
        self.end();
        Some(end)
    }
}

impl Commands {
    /// `limit` is at most [`MAX_COMMAND`].
    pub fn new(limit: usize) -> Self {
        Self {
            limit,
            at: 0,
            missing: 0,
            batch: Batch::default(),
        }
    }

    /// Takes the places of the words of the batch that was cut last.
    pub fn take_batch(&mut self) -> Batch {
        std::mem::take(&mut self.batch)
    }

    /// Returns the buffers of a batch that has run. An idle client keeps at most 640 bytes.
    pub fn reuse(&mut self, mut batch: Batch) {
        batch.clear();
        batch.words.shrink_to(64);
        batch.ends.shrink_to(32);
        self.batch = batch;
    }

    fn scan_inline(&mut self, input: &[u8]) -> Result<Decoded, FrameError> {
        let new = input.get(self.at..).unwrap_or_default();
        match new.iter().position(|&byte| byte == b'\n') {
            Some(end) if self.at + end < MAX_INLINE => {
                let end = self.at + end + 1;
                let (line, mut at) = (input.get(..end).unwrap_or_default(), 0);
                while let Some(word) = inline_word(line, at) {
                    at = word.end;
                    self.batch.push(word);
                }
                self.batch.end();
                return Ok(self.end(end));
            }
            None if input.len() < MAX_INLINE => self.at = input.len(),
            _ => return Err(FrameError::new("too big inline request")),
        }
        Ok(Decoded::More)
    }

    /// Ends the batch, and begins the next.
    fn end(&mut self, end: usize) -> Decoded {
        (self.at, self.missing) = (0, 0);
        Decoded::Frame {
            payload: 0..end,
            consumed: end,
        }
    }
}

impl Framer for Commands {
    fn decode(&mut self, input: &[u8]) -> Result<Decoded, FrameError> {
        if self.at == 0 {
            self.batch.clear();
        }
        if !input.starts_with(b"*") {
            return self.scan_inline(input);
        }
        if self.at == 0 {
            match header(input, 0, b'*')? {
                Some((count, end)) if count <= MAX_ARGUMENTS => {
                    (self.missing, self.at) = (count, end);
                }
                // As Redis does with a null array.
                Some((_, end)) if is_negative(input.get(1..end - 2)) => {
                    self.batch.end();
                    return Ok(self.end(end));
                }
                Some(_) => return Err(FrameError::new("invalid multibulk length")),
                None => return Ok(Decoded::More),
            }
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
            self.batch.push(argument);
        }
        self.batch.end();
        let mut end = self.at;
        if self.batch.words.len() <= MAX_SHORT {
            while self.batch.len() < MAX_BATCH && end < input.len() {
                match self.batch.push_short(input, end, self.limit) {
                    Some(next) => end = next,
                    None => break,
                }
            }
        }
        Ok(self.end(end))
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

/// Reads `$5` at `at`: where the argument is, whether or not it has arrived.
#[inline(always)] // as `header`
fn bulk(input: &[u8], at: usize, limit: usize) -> Result<Option<Range<usize>>, FrameError> {
    match header(input, at, b'$')? {
        Some((length, begin)) if length <= limit.saturating_sub(begin) => {
            Ok(Some(begin..begin + length))
        }
        Some(_) => Err(FrameError::new("invalid bulk length")),
        None => Ok(None),
    }
}

/// Reads the header line `*3` or `$5` at `at`: its number, and where the line ends. Text that is no
/// canonical number counts as too large.
#[inline(always)] // the result stays in registers
fn header(input: &[u8], at: usize, mark: u8) -> Result<Option<(usize, usize)>, FrameError> {
    // Most numbers have one digit or two.
    match input.get(at..) {
        Some(&[first, ones @ b'0'..=b'9', b'\r', _, ..]) if first == mark => {
            Ok(Some((digit(ones), at + 4)))
        }
        Some(&[first, tens @ b'1'..=b'9', ones @ b'0'..=b'9', b'\r', _, ..]) if first == mark => {
            Ok(Some((10 * digit(tens) + digit(ones), at + 5)))
        }
        Some([first, line @ ..]) if *first == mark => long_header(line, at, mark),
        Some([first, ..]) => Err(unexpected(mark, *first)),
        _ => Ok(None),
    }
}

/// Reads the number of any header line.
#[inline(never)]
fn long_header(line: &[u8], at: usize, mark: u8) -> Result<Option<(usize, usize)>, FrameError> {
    let mut number = usize::MAX;
    for (length, &byte) in line.iter().enumerate().take(MAX_HEADER) {
        number = match (byte, number) {
            (b'\r', _) => return Ok(line.get(length + 1).map(|_| (number, at + length + 3))),
            (b'0'..=b'9', _) if length == 0 => digit(byte),
            (b'0'..=b'9', 1..=MAX_FRONT) => number * 10 + digit(byte),
            _ => usize::MAX,
        };
    }
    match mark {
        _ if line.len() < MAX_HEADER => Ok(None),
        b'*' => Err(FrameError::new("too big mbulk count string")),
        _ => Err(FrameError::new("too big bulk count string")),
    }
}

fn digit(byte: u8) -> usize {
    usize::from(byte - b'0')
}

#[cold]
fn is_negative(text: Option<&[u8]>) -> bool {
    text.and_then(integer).is_some_and(|number| number < 0)
}

#[cold]
fn unexpected(mark: u8, first: u8) -> FrameError {
    let (mark, first) = (char::from(mark), first.escape_ascii());
    FrameError::new(format!("expected '{mark}', got '{first}'"))
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

/// The replies to the commands of a batch, the last one under construction. Beyond its limit it
/// takes no more, so that a command that asks for the same large value a million times takes no
/// memory for it.
pub struct Reply {
    bytes: Vec<u8>,
    /// Where the reply to the running command begins.
    begin: usize,
    /// The string of a reply that is one shared bulk string; `bytes` ends with its header.
    shared: Option<Arc<[u8]>>,
    limit: usize,
    is_cut: bool,
}

impl Reply {
    /// `spare` is the buffer of earlier replies.
    pub fn new(limit: usize, spare: Vec<u8>) -> Self {
        Self {
            bytes: spare,
            begin: 0,
            shared: None,
            limit,
            is_cut: false,
        }
    }

    /// Begins the reply to the next command.
    pub fn begin(&mut self) {
        self.begin = self.bytes.len();
    }

    pub fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }

    /// Whether the replies are to be sent before the next one is begun.
    pub fn is_due(&self) -> bool {
        self.shared.is_some() || self.bytes.len() >= MAX_SPARE
    }

    /// Sends the replies as one frame. The buffer is kept, unless they were long.
    pub fn send<A>(&mut self, conn: &mut Conn<'_, A>) -> Result<(), SendError> {
        let sent = match self.shared.take() {
            None if self.bytes.is_empty() => return Ok(()),
            Some(string) => conn.send((&self.bytes, string, "\r\n")),
            None if self.bytes.len() < MAX_SPARE => conn.send(&self.bytes),
            None => conn.send(std::mem::take(&mut self.bytes)),
        };
        self.bytes.clear();
        self.begin = 0;
        sent
    }

    /// Whether the reply is incomplete because of its limit.
    pub fn is_cut(&self) -> bool {
        self.is_cut
    }

    pub fn ok(&mut self) {
        self.start();
        self.put(b"+OK\r\n");
    }

    pub fn simple(&mut self, text: &str) {
        self.line(b'+', text);
    }

    /// Replaces the reply with an error. Its text may quote the client: control characters become
    /// blanks.
    pub fn error(&mut self, text: &str) {
        self.bytes.truncate(self.begin);
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
        self.header(b'$', bytes.len());
        self.put(bytes);
        self.put(b"\r\n");
    }

    /// Makes the reply a bulk string, without a copy of it.
    pub fn shared(&mut self, string: &Arc<[u8]>) {
        self.header(b'$', string.len());
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
        self.header(b'*', length);
    }

    pub fn null_array(&mut self) {
        self.line(b'*', "-1");
    }

    #[inline]
    fn header(&mut self, mark: u8, length: usize) {
        self.start();
        // Copies of a known length take few instructions.
        if let digit @ 0..=9 = length {
            return self.put(&[mark, b'0' + digit as u8, b'\r', b'\n']);
        }
        self.put(&[mark]);
        self.digits(length);
        self.put(b"\r\n");
    }

    fn line(&mut self, mark: u8, text: &str) {
        self.start();
        self.put(&[mark]);
        self.put(text.as_bytes());
        self.put(b"\r\n");
    }

    /// Begins a line, unless the reply has reached its limit.
    fn start(&mut self) {
        self.is_cut |= self.bytes.len() - self.begin >= self.limit;
    }

    fn digits(&mut self, number: usize) {
        if number >= 10 {
            self.digits(number / 10);
        }
        self.put(&[b'0' + (number % 10) as u8]);
    }

    #[inline]
    fn put(&mut self, bytes: &[u8]) {
        if !self.is_cut {
            self.bytes.extend_from_slice(bytes);
        }
    }
}
