//! A recording, read from its file as far as it is sound.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::records::{is_record, record_at, Record, What};
use crate::error::{Error, Result};
use crate::record::format::{
    BlockHeader, Call, Checksum, FileHeader, BLOCK, HEADER, HEADER_WORDS, NO_RECORD, WORD, WORDS,
};
use crate::record::Payloads;

/// Maximum number of bytes made for a script, or for the frames of an iteration, where the file has
/// only their number.
pub(super) const MAX_MADE: usize = 256 << 20;

/// Makes the input of a connection that the file does not hold.
type Fill = Box<dyn FnMut(u32, u64, &mut [u8])>;

/// A recording in memory, for [`Replay`](super::Replay) and for scripts. Feature `record`.
///
/// ```
/// # use portcullis::{Config, Context, Framing, Handler, Listen, Outcome, Payloads, Recording};
/// use portcullis::sim::{Ending, Replay, Sim, Tape};
///
/// struct Echo;
/// impl Handler for Echo {
///     fn on_frame(&mut self, cx: &mut Context<'_>, frame: &[u8]) -> Outcome {
///         cx.conn.send(frame)?;
///         Ok(())
///     }
/// }
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let path = std::env::temp_dir().join(format!("tape-{}", std::process::id()));
///
/// // In place of `Server::recorded`:
/// let recording = Recording::new(&path).with(|recording| recording.payloads = Payloads::Kept);
/// let mut sim = Sim::recorded(1, Config::new(), (), recording)?;
/// let addr = sim.listen(Listen::tcp("127.0.0.1:0", Framing::Line), |_: &mut (), _| Echo)?;
/// let client = sim.connect(addr).unwrap();
/// sim.send(client, b"hello\n");
/// sim.settle();
/// drop(sim);
///
/// let tape = Tape::read(&path)?;
/// assert_eq!((tape.connections(), tape.ending()), (1, Ending::Complete));
/// assert!(tape.lines().any(|line| line.contains("read of 6 bytes, connection 0")));
/// let mut replay = Replay::new(tape, Config::new(), ())?;
/// replay.listen(Listen::tcp("127.0.0.1:0", Framing::Line), |_: &mut (), _| Echo)?;
/// assert_eq!(replay.run()?, Ending::Complete);
/// assert_eq!(replay.stats().traffic.frames_in, 1);
/// # std::fs::remove_file(&path)?;
/// # Ok(()) }
/// ```
pub struct Tape {
    path: PathBuf,
    words: Vec<u64>,
    /// The first word of each block, and the block's place in the file.
    blocks: Vec<(usize, u64)>,
    payloads: Payloads,
    is_whole: bool,
    ending: Ending,
    start_time: u64,
    end_time: u64,
    connections: u32,
    skipped: u32,
    /// The last poll, behind which the recorded server was dropped or its file ends.
    last_poll: usize,
    fill: Option<Fill>,
}

/// Where a recording ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Ending {
    /// Where the recorded server was dropped.
    Complete,
    /// Without the mark of an orderly end: the process was killed or still runs, the disk was full,
    /// or the file is truncated.
    Unfinished,
    /// At damage: what is behind this byte of the file cannot be read.
    Damaged {
        /// Offset of the damaged block or record.
        offset: u64,
    },
}

impl fmt::Display for Ending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Complete => f.write_str("the recording is complete"),
            Self::Unfinished => f.write_str(
                "the recording has no end mark: its process was killed or still runs, the disk \
                 was full, or the file is truncated",
            ),
            Self::Damaged { offset } => {
                write!(f, "the recording is damaged at byte {offset} of the file")
            }
        }
    }
}

/// A block that was read.
struct Block {
    offset: u64,
    header: BlockHeader,
    words: Vec<u64>,
}

impl Tape {
    /// Reads a file, up to its first damage: see [`Tape::ending`]. It takes as much memory as the
    /// file has bytes.
    ///
    /// # Errors
    ///
    /// [`Error::Recording`] if the file cannot be read, or does not begin as a recording.
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        Self::from_file(path).map_err(|source| Error::Recording {
            path: path.to_owned(),
            source,
        })
    }

    fn from_file(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let length = file.metadata()?.len();
        let invalid = |problem| io::Error::new(io::ErrorKind::InvalidData, problem);
        let mut head = [0; HEADER];
        if length < HEADER as u64 {
            return Err(invalid("the file is too short for a recording"));
        }
        file.read_exact_at(&mut head, 0)?;
        let header = FileHeader::from_words(header_words(&head))
            .ok_or_else(|| invalid("the file is not a recording, or its header is damaged"))?;
        let payloads = match header.payloads {
            0 => Payloads::Dropped,
            1 => Payloads::Hashed,
            2 => Payloads::Kept,
            _ => return Err(invalid("the recording is of a later version")),
        };
        let slots = (length - HEADER as u64)
            .div_ceil(BLOCK as u64)
            .min(header.blocks);
        let mut found = Vec::new();
        for slot in 0..slots {
            let offset = HEADER as u64 + slot * BLOCK as u64;
            let block = read_block(&file, offset, length)?;
            found.push(block.filter(|block| block.header.number % header.blocks == slot));
        }
        Ok(Self::join(path, found, header.blocks, payloads))
    }

    /// Puts the blocks in order, from the oldest up to the first that is missing.
    fn join(path: &Path, found: Vec<Option<Block>>, slots: u64, payloads: Payloads) -> Self {
        let numbers = found.iter().flatten().map(|block| block.header.number);
        let newest = numbers.max().unwrap_or(0);
        let oldest = newest.saturating_add(1).saturating_sub(slots);
        let count = found.len() as u64;
        // Until the oldest blocks are overwritten, each block has the place of its number. Where
        // the first one of a full file is damaged, it may be the newest.
        let is_first_unclear = count == slots && found.first().is_some_and(Option::is_none);
        let is_whole = oldest == 0 && !is_first_unclear;
        // The place behind the newest sound block: the newest one of all, or the oldest.
        let next = usize::try_from(newest.saturating_add(1) % slots);
        let next = next.ok().and_then(|next| found.get(next));
        let is_next_damaged = next.is_some_and(Option::is_none);
        let mut sound: Vec<Block> = found.into_iter().flatten().collect();
        sound.retain(|block| block.header.number >= oldest);
        sound.sort_by_key(|block| block.header.number);
        let first = sound.first().map_or(0, |block| block.header.number);
        let mut expected = if is_whole { 0 } else { first };
        let due = if is_whole {
            count
        } else {
            newest.saturating_add(1 + u64::from(is_next_damaged))
        };
        let (mut blocks, mut words) = (Vec::new(), Vec::new());
        let (mut start_time, mut begun) = (0, is_whole);
        for mut block in sound {
            if block.header.number != expected {
                break;
            }
            expected = expected.saturating_add(1);
            let mut offset = block.offset + HEADER as u64;
            if !begun {
                let first = block.header.first;
                if first == NO_RECORD || first >= block.words.len() as u64 {
                    continue;
                }
                let first = usize::try_from(first).unwrap_or(usize::MAX);
                block.words.drain(..first.min(block.words.len()));
                offset += (first * WORD) as u64;
                start_time = block.header.time;
                begun = true;
            }
            blocks.push((words.len(), offset));
            words.append(&mut block.words);
        }
        let offset = HEADER as u64 + expected % slots * BLOCK as u64;
        let ending = match expected < due {
            true => Ending::Damaged { offset },
            false => Ending::Unfinished,
        };
        let mut tape = Self {
            path: path.to_owned(),
            words,
            blocks,
            payloads,
            is_whole,
            ending,
            start_time,
            end_time: start_time,
            connections: 0,
            skipped: 0,
            last_poll: 0,
            fill: None,
        };
        tape.scan();
        tape
    }

    /// Reads all records once, and forgets what is behind the last one that is sound.
    fn scan(&mut self) {
        let (mut at, mut time, mut ended) = (0, self.start_time, false);
        let (mut born, mut unborn) = (StreamSet::default(), StreamSet::default());
        let mut connections = 0;
        let words = std::mem::take(&mut self.words);
        while let Some(record) = record_at(&words, at, self.payloads) {
            ended = matches!(record.what, What::Call(Call::End, ..));
            match &record.what {
                What::Clock(_, clock) => time = clock.from(time),
                What::Poll(..) | What::Call(Call::Poll, ..) => self.last_poll = at,
                What::Call(Call::Accept | Call::Connect | Call::AdoptStream, _, Ok(_)) => {
                    connections = u32::saturating_add(connections, 1);
                    born.extend(record.connection());
                }
                _ => {
                    let stream = record.connection();
                    unborn.extend(stream.filter(|stream| !born.contains(stream)));
                }
            }
            at = record.end;
        }
        self.words = words;
        if at < self.words.len() {
            // A record that goes on in a block that is missing; or the file was made to mislead.
            let is_cut = self.words.get(at).is_some_and(|word| is_record(*word));
            if !is_cut && self.ending == Ending::Unfinished {
                let offset = self.offset(at);
                self.ending = Ending::Damaged { offset };
            }
            self.words.truncate(at);
        } else if ended {
            self.ending = Ending::Complete;
        }
        self.end_time = time;
        self.connections = connections;
        self.skipped = u32::try_from(unborn.len()).unwrap_or(u32::MAX);
    }

    /// Provides the input of a file without payloads ([`Payloads::Hashed`], [`Payloads::Dropped`]).
    /// `fill` gets the number of the connection, the number of bytes that it has sent before, and
    /// the bytes to fill in. Those of a hashed file are compared with the hash.
    #[must_use]
    pub fn filled(mut self, fill: impl FnMut(u32, u64, &mut [u8]) + 'static) -> Self {
        self.fill = Some(Box::new(fill));
        self
    }

    /// Returns what the file keeps of payloads.
    pub fn payloads(&self) -> Payloads {
        self.payloads
    }

    /// Returns whether the file goes back to the start of its server. Otherwise its oldest part was
    /// overwritten: connections that began there are missing, and no exact replay is possible.
    pub fn is_whole(&self) -> bool {
        self.is_whole
    }

    /// Returns where the recording ends.
    pub fn ending(&self) -> Ending {
        self.ending
    }

    /// Returns the number of connections that begin in the file. They are numbered in the order in
    /// which the server got them, outgoing and adopted ones included.
    pub fn connections(&self) -> u32 {
        self.connections
    }

    /// Returns the number of connections that began before the part that is left. They are in no
    /// script.
    pub fn skipped(&self) -> u32 {
        self.skipped
    }

    /// Returns the time from the first record that is left to the last one.
    pub fn span(&self) -> Duration {
        Duration::from_nanos(self.end_time.saturating_sub(self.start_time))
    }

    /// Returns each record but readings of the clock as a line, with its number and its time.
    pub fn lines(&self) -> impl Iterator<Item = String> + '_ {
        let mut time = self.start_time;
        let records = (0_u64..).zip(self.records());
        records.filter_map(move |(number, (_, record))| {
            if let What::Clock(_, clock) = record.what {
                time = clock.from(time);
                return None;
            }
            let at = Duration::from_nanos(time);
            Some(format!("{number} {:.6} {record}", at.as_secs_f64()))
        })
    }

    /// All records, with their first words.
    pub(super) fn records(&self) -> impl Iterator<Item = (usize, Record<'_>)> {
        let mut at = 0;
        std::iter::from_fn(move || {
            let record = self.record(at)?;
            Some((std::mem::replace(&mut at, record.end), record))
        })
    }

    pub(super) fn record(&self, at: usize) -> Option<Record<'_>> {
        record_at(&self.words, at, self.payloads)
    }

    pub(super) fn start_time(&self) -> u64 {
        self.start_time
    }

    /// The last poll is before this word.
    pub(super) fn is_past_last_poll(&self, at: usize) -> bool {
        at > self.last_poll || self.words.is_empty()
    }

    /// The place of a word in the file.
    pub(super) fn offset(&self, at: usize) -> u64 {
        let block = self.blocks.partition_point(|(first, _)| *first <= at);
        let block = block
            .checked_sub(1)
            .and_then(|block| self.blocks.get(block));
        block.map_or(HEADER as u64, |(first, offset)| {
            offset + ((at - first) * WORD) as u64
        })
    }

    /// Refuses a file without input.
    pub(super) fn check_input(&self) -> Result<()> {
        match self.payloads == Payloads::Kept || self.fill.is_some() {
            true => Ok(()),
            false => {
                Err(self.refused("the payloads are not in the file: provide them (Tape::filled)"))
            }
        }
    }

    /// The error for a request that this recording does not permit.
    pub(super) fn refused(&self, problem: &'static str) -> Error {
        self.error(io::Error::new(io::ErrorKind::Unsupported, problem))
    }

    pub(super) fn error(&self, source: io::Error) -> Error {
        let path = self.path.clone();
        Error::Recording { path, source }
    }

    /// Makes input for a connection that has sent `before` bytes. False if nothing makes it.
    pub(super) fn fill(&mut self, connection: u32, before: u64, buffer: &mut [u8]) -> bool {
        match &mut self.fill {
            Some(fill) => {
                fill(connection, before, buffer);
                true
            }
            None => false,
        }
    }
}

type StreamSet = std::collections::BTreeSet<u32>;

fn header_words(bytes: &[u8; HEADER]) -> [u64; HEADER_WORDS] {
    let mut words = bytes.chunks_exact(WORD).map(word);
    [(); HEADER_WORDS].map(|()| words.next().unwrap_or(0))
}

fn word(bytes: &[u8]) -> u64 {
    crate::record::format::word_of(bytes)
}

/// The block at this place; `None` if it is damaged or not all there.
fn read_block(file: &File, offset: u64, length: u64) -> io::Result<Option<Block>> {
    let available = length.saturating_sub(offset).min(BLOCK as u64);
    let mut bytes = vec![0; usize::try_from(available).unwrap_or(BLOCK)];
    file.read_exact_at(&mut bytes, offset)?;
    let Some((head, content)) = bytes.split_first_chunk::<HEADER>() else {
        return Ok(None);
    };
    let head = header_words(head);
    let header = BlockHeader::from_words(head);
    let used = usize::try_from(header.used).unwrap_or(usize::MAX);
    if used > WORDS {
        return Ok(None);
    }
    let Some(content) = content.get(..used * WORD) else {
        return Ok(None);
    };
    let words: Vec<u64> = content.chunks_exact(WORD).map(word).collect();
    let is_sound = header.words(Checksum::of(words.iter().copied())) == head;
    Ok(is_sound.then_some(Block {
        offset,
        header,
        words,
    }))
}

impl fmt::Debug for Tape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tape")
            .field("payloads", &self.payloads)
            .field("is_whole", &self.is_whole)
            .field("ending", &self.ending)
            .field("connections", &self.connections)
            .field("skipped", &self.skipped)
            .field("span", &self.span())
            .finish_non_exhaustive()
    }
}
