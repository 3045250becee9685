//! The file of a recording: a block in memory, written when it is full or a second old.

use std::cell::{Cell, RefCell};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::PathBuf;
use std::time::Duration;

use super::format::{
    self, call_word, clock_word, io_word, payload_hash, word_of, words_for, BlockHeader, Call,
    Checksum, FileHeader, Form, BLOCK, HEADER, LONG_SPAN, MAX_REPEATS, NO_RECORD, WORD, WORDS,
};
use super::{Payloads, Recording};
use crate::error::{Error, Result};
use crate::logs;
use crate::proto::Time;

/// For how long records may be in memory alone.
pub(super) const SAVE_AFTER: Duration = Duration::from_secs(1);

/// Not a time: the next reading may need a record with a count of readings before.
const REPEATED: u64 = u64::MAX >> 1;

/// What a record of a call says beside the call.
pub(super) enum Value<'a> {
    /// At most 24 bits.
    Small(u64),
    Long(u64, u64),
    Bytes(&'a [u8]),
}

/// Appends records. Fields of the hot path are cells, so that reading the clock needs no borrow.
pub(super) struct Recorder {
    block: [Cell<u64>; WORDS],
    /// The next free word of the block.
    at: Cell<usize>,
    /// The last reading of the clock; [`REPEATED`] if it was the same as the one before.
    time: Cell<u64>,
    /// The last reading in that case.
    repeated: Cell<u64>,
    /// Where the block ended at the last reading with the same result.
    repeats_at: Cell<usize>,
    /// The number of such readings there.
    repeats: Cell<u64>,
    large_frame: Cell<usize>,
    payloads: Payloads,
    streams: Cell<u32>,
    listeners: Cell<u32>,
    /// Up to where the block has been written.
    saved: Cell<usize>,
    saved_at: Cell<u64>,
    ring: RefCell<Ring>,
}

/// The part that is used once in a block.
struct Ring {
    /// `None` once writing has failed.
    file: Option<File>,
    path: PathBuf,
    /// The process that created the file: a forked child must not write to it.
    process: u32,
    blocks: u64,
    /// The number of the block in memory.
    number: u64,
    /// See [`BlockHeader::first`] and [`BlockHeader::time`].
    first: u64,
    time: u64,
    /// The block as it is written.
    bytes: Box<[u8]>,
}

impl Recorder {
    /// Creates the file, which must not exist.
    pub(super) fn create(recording: Recording, large_frame: usize) -> Result<Self> {
        recording.check()?;
        let Recording {
            path,
            max_bytes,
            payloads,
        } = recording;
        let blocks = (max_bytes.saturating_sub(HEADER as u64) / BLOCK as u64).max(1);
        let header = FileHeader {
            payloads: payloads as u64,
            blocks,
        };
        let created = || {
            // Nothing that is there is overwritten: it may be the recording of the last crash.
            let mut options = OpenOptions::new();
            let file = options
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&path)?;
            let words = header.words().map(u64::to_le_bytes);
            file.write_all_at(words.as_flattened(), 0)?;
            Ok(file)
        };
        let file = match created() {
            Ok(file) => file,
            Err(source) => return Err(Error::Recording { path, source }),
        };
        Ok(Self {
            block: [const { Cell::new(0) }; WORDS],
            at: Cell::new(0),
            time: Cell::new(0),
            repeated: Cell::new(0),
            repeats_at: Cell::new(usize::MAX),
            repeats: Cell::new(0),
            large_frame: Cell::new(large_frame),
            payloads,
            streams: Cell::new(0),
            listeners: Cell::new(0),
            saved: Cell::new(0),
            saved_at: Cell::new(0),
            ring: RefCell::new(Ring {
                file: Some(file),
                path,
                process: std::process::id(),
                blocks,
                number: 0,
                first: 0,
                time: 0,
                bytes: vec![0; BLOCK].into(),
            }),
        })
    }

    /// The number of the next stream.
    pub(super) fn new_stream(&self) -> u32 {
        self.streams.replace(self.streams.get().wrapping_add(1))
    }

    /// The number of the next listener.
    pub(super) fn new_listener(&self) -> u32 {
        self.listeners.replace(self.listeners.get().wrapping_add(1))
    }

    /// Appends a record of one word.
    #[inline(always)]
    pub(super) fn push(&self, word: u64) {
        let at = self.at.get();
        match self.block.get(at) {
            Some(free) => {
                free.set(word);
                self.at.set(at + 1);
            }
            None => self.push_behind(word),
        }
    }

    /// Appends a record of a word and further words.
    #[inline]
    pub(super) fn push_all(&self, first: u64, rest: impl ExactSizeIterator<Item = u64>) {
        let (at, count) = (self.at.get(), rest.len());
        let room = self.block.get(at + 1..).and_then(|free| free.get(..count));
        match (self.block.get(at), room) {
            (Some(head), Some(free)) => {
                head.set(first);
                free.iter()
                    .zip(rest)
                    .for_each(|(place, word)| place.set(word));
                self.at.set(at + 1 + count);
            }
            _ => {
                self.push(first);
                rest.for_each(|word| self.push_rest(word));
                self.end_record();
            }
        }
    }

    #[cold]
    #[inline(never)]
    fn push_behind(&self, word: u64) {
        self.end_block(false);
        self.push(word);
    }

    /// Appends a word of a record that began before.
    fn push_rest(&self, word: u64) {
        if self.at.get() >= WORDS {
            self.end_block(true);
        }
        self.push(word);
    }

    /// The record is complete: the next one is the first of a block that the record goes on in.
    fn end_record(&self) {
        let mut ring = self.ring.borrow_mut();
        if ring.first == NO_RECORD {
            ring.first = self.at.get() as u64;
            ring.time = self.time();
        }
    }

    /// A reading of the clock.
    #[inline(always)]
    pub(super) fn clock(&self, now: Time) {
        let nanos = now.nanos();
        let span = nanos.wrapping_sub(self.time.get());
        // A clock that stands or leaps, and `REPEATED`.
        if span.wrapping_sub(1) >= LONG_SPAN - 1 {
            return self.unusual_clock(nanos);
        }
        self.push(clock_word(0, span));
        self.time.set(nanos);
    }

    /// The last reading of the clock.
    fn time(&self) -> u64 {
        match self.time.get() {
            REPEATED => self.repeated.get(),
            time => time,
        }
    }

    /// The clock has stood, as it does in simulations, or it has leapt.
    #[cold]
    #[inline(never)]
    fn unusual_clock(&self, nanos: u64) {
        let time = self.time();
        let repeats = match self.repeats_at.get() == self.at.get() {
            true => self.repeats.get(),
            false => 0,
        };
        if nanos == time && repeats < MAX_REPEATS {
            self.repeats_at.set(self.at.get());
            self.repeats.set(repeats + 1);
            self.repeated.set(time);
            return self.time.set(REPEATED);
        }
        let span = nanos.wrapping_sub(time);
        if span < LONG_SPAN {
            self.push(clock_word(repeats, span));
        } else {
            self.call(Call::Clock, 0, Value::Long(repeats, nanos));
        }
        self.repeats_at.set(usize::MAX);
        self.time.set(nanos);
    }

    /// A call with its successful result.
    #[inline(never)]
    pub(super) fn call(&self, call: Call, target: u32, value: Value<'_>) {
        match value {
            Value::Small(value) => self.push(call_word(call, target, Form::Value, value)),
            Value::Long(value, word) => {
                self.push(call_word(call, target, Form::Long, value));
                self.push_rest(word);
                self.end_record();
            }
            Value::Bytes(bytes) => {
                self.push(call_word(call, target, Form::Bytes, bytes.len() as u64));
                self.push_bytes([bytes], bytes.len());
                self.end_record();
            }
        }
    }

    /// A call that failed.
    #[cold]
    #[inline(never)]
    pub(super) fn failed(&self, call: Call, target: u32, error: &io::Error) {
        self.push(call_word(
            call,
            target,
            Form::Error,
            format::error_code(error),
        ));
    }

    /// A read or a write of all of `bytes`. `place`: see [`stream_bits`](format::stream_bits).
    #[inline(always)]
    pub(super) fn io<'a>(&self, place: u64, length: usize, bytes: impl FnOnce() -> &'a [u8]) {
        self.push(io_word(place, length));
        if self.payloads != Payloads::Dropped {
            self.keep(bytes());
        }
    }

    #[inline(never)]
    fn keep(&self, bytes: &[u8]) {
        self.payload([bytes], bytes.len());
    }

    /// A write of which the kernel took `taken` bytes.
    #[inline(never)]
    pub(super) fn write<'a>(
        &self,
        stream: u32,
        pieces: impl Iterator<Item = &'a [u8]> + Clone,
        taken: usize,
    ) {
        let length: usize = pieces.clone().map(<[u8]>::len).sum();
        if taken == length {
            self.push(io_word(
                format::WRITE | u64::from(format::stream_bits(stream)),
                length,
            ));
        } else {
            self.push(call_word(Call::Write, stream, Form::Long, 0));
            // A write of 4 GiB is one that takes a part.
            let asked = length.min(u32::MAX as usize) as u64;
            self.push_rest(asked << 32 | taken as u64);
        }
        if self.payloads != Payloads::Dropped {
            self.payload(pieces, taken);
        }
        self.end_record();
    }

    /// The first `length` bytes of a payload, as they are to be kept.
    fn payload<'a>(&self, pieces: impl IntoIterator<Item = &'a [u8]>, length: usize) {
        if self.payloads == Payloads::Hashed {
            self.push_rest(payload_hash(cut(pieces, length)));
        } else {
            self.push_bytes(pieces, length);
        }
        self.end_record();
    }

    fn push_bytes<'a>(&self, pieces: impl IntoIterator<Item = &'a [u8]>, length: usize) {
        let (mut word, mut filled) = ([0; WORD], 0);
        for mut piece in cut(pieces, length) {
            while !piece.is_empty() {
                let count = piece.len().min(WORD - filled);
                let (now, later) = piece.split_at(count);
                if let Some(place) = word.get_mut(filled..filled + count) {
                    place.copy_from_slice(now);
                }
                (piece, filled) = (later, filled + count);
                if filled == WORD {
                    self.push_rest(u64::from_le_bytes(word));
                    (word, filled) = ([0; WORD], 0);
                }
            }
        }
        if filled > 0 {
            self.push_rest(word_of(word.get(..filled).unwrap_or_default()));
        }
        debug_assert_eq!(words_for(length).min(1), length.min(1));
    }

    /// The block is full. `within`: a record goes on in the next one.
    #[inline(never)]
    fn end_block(&self, within: bool) {
        self.save();
        let mut ring = self.ring.borrow_mut();
        ring.number += 1;
        ring.first = if within { NO_RECORD } else { 0 };
        ring.time = self.time();
        self.at.set(0);
        self.saved.set(0);
        self.repeats_at.set(usize::MAX);
    }

    /// Before a poll: the size of large frames, which only simulations change.
    #[inline]
    pub(super) fn large_frame(&self, size: usize) {
        if self.large_frame.replace(size) != size {
            self.call(Call::LargeFrame, 0, Value::Long(0, size as u64));
        }
    }

    /// Whether records are in memory alone.
    #[inline]
    pub(super) fn is_unsaved(&self) -> bool {
        self.at.get() > self.saved.get()
    }

    /// Writes the block if it was not written for some time.
    #[inline]
    pub(super) fn save_in_time(&self) {
        let age = self.time().wrapping_sub(self.saved_at.get());
        if age >= SAVE_AFTER.as_nanos() as u64 {
            self.save();
        }
    }

    /// Writes the block as far as it goes. An error ends the recording.
    #[cold]
    pub(super) fn save(&self) {
        let at = self.at.get();
        self.saved_at.set(self.time());
        if at == self.saved.replace(at) {
            return;
        }
        let words = self.block.get(..at).unwrap_or_default();
        self.ring.borrow_mut().write(words);
    }
}

impl Ring {
    fn write(&mut self, words: &[Cell<u64>]) {
        let Some(file) = &self.file else {
            return;
        };
        if std::process::id() != self.process {
            self.file = None;
            return;
        }
        let Some((head, content)) = self.bytes.split_first_chunk_mut::<HEADER>() else {
            return;
        };
        let mut sum = Checksum::new();
        for (place, word) in content.chunks_exact_mut(WORD).zip(words) {
            sum.add(word.get());
            place.copy_from_slice(&word.get().to_le_bytes());
        }
        let header = BlockHeader {
            number: self.number,
            used: words.len() as u64,
            first: self.first,
            time: self.time,
        };
        let header = header.words(sum).map(u64::to_le_bytes);
        head.copy_from_slice(header.as_flattened());
        let used = HEADER + words.len() * WORD;
        let bytes = self.bytes.get(..used).unwrap_or_default();
        let place = HEADER as u64 + self.number % self.blocks * BLOCK as u64;
        if let Err(error) = file.write_all_at(bytes, place) {
            logs::warning!(
                target: logs::SERVER,
                "the recording {} ends here, and the server goes on: {error}",
                crate::escape::Escaped::new(self.path.display())
            );
            self.file = None;
        }
    }
}

/// An orderly end, which tells a whole file from a truncated one.
impl Drop for Recorder {
    fn drop(&mut self) {
        self.call(Call::End, 0, Value::Small(0));
        self.save();
    }
}

/// The first `length` bytes.
fn cut<'a>(
    pieces: impl IntoIterator<Item = &'a [u8]>,
    length: usize,
) -> impl Iterator<Item = &'a [u8]> {
    pieces.into_iter().scan(length, |left, piece| {
        let piece = piece.get(..piece.len().min(*left)).unwrap_or(piece);
        *left -= piece.len().min(*left);
        Some(piece)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two readings of the clock, `span` nanoseconds apart: the words of the second.
    fn words_of_span(name: &str, span: u64) -> Vec<u64> {
        let file = format!("portcullis-{name}-{}", std::process::id());
        let path = std::env::temp_dir().join(file);
        let recorder = Recorder::create(Recording::new(&path), 1).expect("a file");
        std::fs::remove_file(&path).expect("removed");
        recorder.clock(Time::from_nanos(7));
        recorder.clock(Time::from_nanos(7 + span));
        let words = recorder.block[1..recorder.at.get()].iter();
        words.map(Cell::get).collect()
    }

    #[test]
    fn a_span_that_fits_no_word_is_a_time_in_full() {
        let longest = LONG_SPAN - 1;
        let fits = words_of_span("fits", longest);
        assert_eq!(fits, [clock_word(0, longest)]);
        let long = words_of_span("long", LONG_SPAN);
        assert_eq!(
            long,
            [call_word(Call::Clock, 0, Form::Long, 0), 7 + LONG_SPAN]
        );
    }

    /// `/dev/full` is a disk without room.
    #[cfg(target_os = "linux")]
    #[test]
    fn an_error_of_the_disk_ends_the_recording_and_nothing_else() {
        let folder = std::env::temp_dir();
        let path = folder.join(format!("portcullis-full-{}", std::process::id()));
        let recorder = Recorder::create(Recording::new(&path), 1).expect("a file");
        let full = OpenOptions::new().write(true).open("/dev/full");
        recorder.ring.borrow_mut().file = Some(full.expect("it is there"));
        for word in 0..3 * WORDS as u64 {
            recorder.push(word);
        }
        assert!(recorder.ring.borrow().file.is_none());
        recorder.call(Call::Accept, 0, Value::Bytes(&[1; 100]));
        drop(recorder);
        let written = std::fs::metadata(&path).expect("it is there").len();
        std::fs::remove_file(&path).expect("removed");
        assert_eq!(written, HEADER as u64);
    }
}
