//! The format of a recording: little-endian words of 64 bits, in blocks with a checksum each.
//!
//! A file is [`FileHeader`], then up to `blocks` blocks of [`BLOCK`] bytes, of which the oldest is
//! overwritten when the file is full. A record is one word and what that word announces; it may go
//! on in the next block. The lowest four bits of the first word are its kind:
//!
//! | kind | rest of the word | what follows |
//! |---|---|---|
//! | [`CLOCK`] | 8 bits repeats, 52 bits nanoseconds | |
//! | [`POLL`] | 1 bit "more", 32 bits (from bit 32) count | as many [`EVENT`]s |
//! | [`EVENT`] | 3 bits readiness, 57 bits token | |
//! | [`READ`], [`WRITE`] | 28 bits stream, 32 bits length | the payload, if it is kept or hashed |
//! | [`FRAME`] | 32 bits (from bit 32) length | the payload, if it is kept or hashed |
//! | [`CALL`] | 28 bits target, 6 bits call, 2 bits [`Form`], 24 bits value | depends on the form |

use std::io;

pub(crate) const WORD: usize = size_of::<u64>();
/// The size of a block with its header, in bytes.
pub(crate) const BLOCK: usize = 64 * 1024;
pub(crate) const HEADER_WORDS: usize = 8;
pub(crate) const HEADER: usize = HEADER_WORDS * WORD;
/// The words of a block behind its header.
pub(crate) const WORDS: usize = BLOCK / WORD - HEADER_WORDS;

/// The first bytes of a recording, with the version of the format.
const MAGIC: u64 = u64::from_le_bytes(*b"PORTREC1");

pub(crate) const CLOCK: u64 = 1;
pub(crate) const POLL: u64 = 2;
pub(crate) const EVENT: u64 = 3;
pub(crate) const READ: u64 = 4;
pub(crate) const WRITE: u64 = 5;
pub(crate) const CALL: u64 = 6;
/// The frame of the [`Call::Send`] before.
pub(crate) const FRAME: u64 = 7;

/// Spans of this length or longer need a record of their own.
pub(crate) const LONG_SPAN: u64 = 1 << 52;
pub(crate) const MAX_REPEATS: u64 = u8::MAX as u64;
const TARGET_MASK: u64 = (1 << 28) - 1;
pub(crate) const VALUE_MASK: u64 = (1 << 24) - 1;

/// The calls that have records of the kind [`CALL`]. `Read` and `Write` only when they fail or take
/// a part, `Poll` only when it fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Call {
    /// Not a call: the end of the recording.
    End,
    /// Not a call: the clock in full, after a leap.
    Clock,
    /// Not a call: a connection ends, with the number of its reason.
    Reason,
    Poll,
    Read,
    Write,
    Shutdown,
    Unsent,
    HasTaken,
    LargeFrame,
    DescriptorLimit,
    Listen,
    AdoptListener,
    ShareListener,
    ListenerAddr,
    RegisterListener,
    DeregisterListener,
    CloseListener,
    Accept,
    HasClient,
    Connect,
    AdoptStream,
    Connected,
    Random,
    RegisterStream,
    Watch,
    Unwatch,
    Peek,
    Release,
    CutOff,
    Close,
    LocalAddr,
    Credentials,
    Descriptor,
    /// Commands of handles: a drain,
    Drain,
    /// a kill,
    Kill,
    /// a frame,
    Send,
    /// and what cannot be written down.
    Job,
    ReregisterStream,
    /// When a connection opens: the number of commands of handles so far, if some are still queued.
    Queued,
    /// While a connection waits for them: the number that are carried out.
    CarriedOut,
}

impl Call {
    /// In the order of their numbers.
    #[cfg(any(test, feature = "sim"))]
    pub(crate) const ALL: &'static [Self] = &[
        Self::End,
        Self::Clock,
        Self::Reason,
        Self::Poll,
        Self::Read,
        Self::Write,
        Self::Shutdown,
        Self::Unsent,
        Self::HasTaken,
        Self::LargeFrame,
        Self::DescriptorLimit,
        Self::Listen,
        Self::AdoptListener,
        Self::ShareListener,
        Self::ListenerAddr,
        Self::RegisterListener,
        Self::DeregisterListener,
        Self::CloseListener,
        Self::Accept,
        Self::HasClient,
        Self::Connect,
        Self::AdoptStream,
        Self::Connected,
        Self::Random,
        Self::RegisterStream,
        Self::Watch,
        Self::Unwatch,
        Self::Peek,
        Self::Release,
        Self::CutOff,
        Self::Close,
        Self::LocalAddr,
        Self::Credentials,
        Self::Descriptor,
        Self::Drain,
        Self::Kill,
        Self::Send,
        Self::Job,
        Self::ReregisterStream,
        Self::Queued,
        Self::CarriedOut,
    ];
}

/// What a record of the kind [`CALL`] says beside the call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    /// The value is all.
    Value,
    /// The call failed, and the value is the error: see [`error_code`].
    Error,
    /// A word follows.
    Long,
    /// As many bytes as the value says follow, in whole words.
    Bytes,
}

#[inline]
pub(crate) fn clock_word(repeats: u64, span: u64) -> u64 {
    CLOCK | repeats << 4 | span << 12
}

/// The place of a stream's number in a word.
#[inline]
pub(crate) fn stream_bits(stream: u32) -> u32 {
    stream << 4
}

/// The number of which these are the [`stream_bits`].
pub(crate) fn stream_number(bits: u32) -> u32 {
    bits >> 4
}

/// `place`: the kind, and the [`stream_bits`].
#[inline]
pub(crate) fn io_word(place: u64, length: usize) -> u64 {
    place | (length as u64) << 32
}

#[inline]
pub(crate) fn event_word(token: usize, [readable, writable, closed]: [bool; 3]) -> u64 {
    let bits = u64::from(readable) | u64::from(writable) << 1 | u64::from(closed) << 2;
    EVENT | bits << 4 | (token as isize as u64) << 7
}

#[inline]
pub(crate) fn poll_word(more: bool, events: usize) -> u64 {
    POLL | u64::from(more) << 4 | (events as u64) << 32
}

pub(crate) fn call_word(call: Call, target: u32, form: Form, value: u64) -> u64 {
    let target = u64::from(target) & TARGET_MASK;
    CALL | target << 4 | (call as u64) << 32 | (form as u64) << 38 | (value & VALUE_MASK) << 40
}

/// Number of words that hold these bytes.
#[inline]
pub(crate) fn words_for(bytes: usize) -> usize {
    bytes.div_ceil(WORD)
}

/// Up to eight bytes as a word.
#[inline]
pub(crate) fn word_of(bytes: &[u8]) -> u64 {
    let mut word = [0; WORD];
    if let Some(first) = word.get_mut(..bytes.len().min(WORD)) {
        first.copy_from_slice(bytes.get(..first.len()).unwrap_or_default());
    }
    u64::from_le_bytes(word)
}

/// FNV-1a over words, each followed by a rotation: a change of one word always changes the sum.
#[derive(Clone, Copy)]
pub(crate) struct Checksum(u64);

impl Checksum {
    pub(crate) fn new() -> Self {
        Self(0xCBF2_9CE4_8422_2325)
    }

    #[inline]
    pub(crate) fn add(&mut self, word: u64) {
        self.0 = (self.0 ^ word)
            .wrapping_mul(0x0000_0100_0000_01B3)
            .rotate_left(17);
    }

    pub(crate) fn of(words: impl IntoIterator<Item = u64>) -> Self {
        let mut sum = Self::new();
        words.into_iter().for_each(|word| sum.add(word));
        sum
    }

    pub(crate) fn value(self) -> u64 {
        self.0
    }
}

/// The hash of a payload in pieces.
pub(crate) fn payload_hash<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> u64 {
    let (mut sum, mut length) = (Checksum::new(), 0);
    let (mut word, mut filled) = ([0; WORD], 0);
    for piece in pieces {
        length += piece.len() as u64;
        for &byte in piece {
            if let Some(place) = word.get_mut(filled) {
                *place = byte;
            }
            filled += 1;
            if filled == WORD {
                sum.add(u64::from_le_bytes(word));
                (word, filled) = ([0; WORD], 0);
            }
        }
    }
    sum.add(u64::from_le_bytes(word));
    sum.add(length);
    sum.value()
}

/// The first words of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FileHeader {
    /// What becomes of payloads: the number of a `Payloads`.
    pub(crate) payloads: u64,
    /// Maximum number of blocks.
    pub(crate) blocks: u64,
}

impl FileHeader {
    pub(crate) fn words(self) -> [u64; HEADER_WORDS] {
        let known = [MAGIC, self.payloads, BLOCK as u64, self.blocks, 0, 0, 0];
        let sum = Checksum::of(known).value();
        let [a, b, c, d, e, f, g] = known;
        [a, b, c, d, e, f, g, sum]
    }

    /// `None` for another file, or one that is damaged here.
    #[cfg(any(test, feature = "sim"))]
    pub(crate) fn from_words(words: [u64; HEADER_WORDS]) -> Option<Self> {
        let [_, payloads, _, blocks, ..] = words;
        let header = Self { payloads, blocks };
        (header.words() == words && blocks > 0).then_some(header)
    }
}

/// The first words of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BlockHeader {
    /// How many blocks were written before.
    pub(crate) number: u64,
    /// Number of words behind the header.
    pub(crate) used: u64,
    /// Where the first record of this block begins, in words behind the header; [`NO_RECORD`] if
    /// all of it belongs to a record that began before.
    pub(crate) first: u64,
    /// The clock before that record, in nanoseconds.
    pub(crate) time: u64,
}

pub(crate) const NO_RECORD: u64 = u64::MAX;

impl BlockHeader {
    /// The header with the checksum over itself and the words behind it.
    pub(crate) fn words(self, content: Checksum) -> [u64; HEADER_WORDS] {
        let known = [self.number, self.used, self.first, self.time];
        let [a, b, c, d] = known;
        [Self::sum(known, content.value()), a, b, c, d, 0, 0, 0]
    }

    fn sum(known: [u64; 4], content: u64) -> u64 {
        Checksum::of(known.into_iter().chain([content])).value()
    }

    #[cfg(any(test, feature = "sim"))]
    pub(crate) fn from_words(words: [u64; HEADER_WORDS]) -> Self {
        let [_, number, used, first, time, ..] = words;
        Self {
            number,
            used,
            first,
            time,
        }
    }
}

/// Errors without a number, in the order of their codes.
const KINDS: &[io::ErrorKind] = &[
    io::ErrorKind::Other,
    io::ErrorKind::WouldBlock,
    io::ErrorKind::Unsupported,
    io::ErrorKind::NotFound,
    io::ErrorKind::InvalidInput,
    io::ErrorKind::NotConnected,
    io::ErrorKind::AddrInUse,
    io::ErrorKind::Interrupted,
    io::ErrorKind::UnexpectedEof,
    io::ErrorKind::BrokenPipe,
    io::ErrorKind::PermissionDenied,
    io::ErrorKind::AlreadyExists,
    io::ErrorKind::InvalidData,
    io::ErrorKind::TimedOut,
    io::ErrorKind::WriteZero,
    io::ErrorKind::OutOfMemory,
];
const IS_KIND: u64 = 1 << 23;

/// An error as 24 bits: its errno, or its kind. Its text is lost.
pub(crate) fn error_code(error: &io::Error) -> u64 {
    match error.raw_os_error() {
        Some(errno) => u64::from(errno.unsigned_abs()) & (IS_KIND - 1),
        None => {
            let kind = KINDS.iter().position(|kind| *kind == error.kind());
            IS_KIND | kind.unwrap_or(0) as u64
        }
    }
}

/// The other half: what decodes.
#[cfg(any(test, feature = "sim"))]
mod decode {
    use super::*;

    const TOKEN_MASK: u64 = (1 << 57) - 1;

    pub(crate) fn error_of(code: u64) -> io::Error {
        if code & IS_KIND == 0 {
            return io::Error::from_raw_os_error(code as i32);
        }
        let kind = KINDS.get((code & !IS_KIND) as usize);
        kind.copied().unwrap_or(io::ErrorKind::Other).into()
    }

    pub(crate) fn kind(word: u64) -> u64 {
        word & 15
    }

    pub(crate) fn clock_parts(word: u64) -> (u64, u64) {
        (word >> 4 & MAX_REPEATS, word >> 12)
    }

    /// Of a read, a write or a call: the stream or listener.
    pub(crate) fn target(word: u64) -> u32 {
        (word >> 4 & TARGET_MASK) as u32
    }

    /// Of a read or a write: the length; of a poll: the number of events.
    pub(crate) fn length(word: u64) -> usize {
        (word >> 32) as usize
    }

    pub(crate) fn has_more(word: u64) -> bool {
        word & 16 != 0
    }

    pub(crate) fn event_parts(word: u64) -> (usize, [bool; 3]) {
        let token = match word >> 7 {
            // The waker's.
            TOKEN_MASK => usize::MAX,
            token => token as usize,
        };
        (token, [16, 32, 64].map(|bit| word & bit != 0))
    }

    pub(crate) fn call_parts(word: u64) -> Option<(Call, Form, u64)> {
        let call = Call::ALL.get((word >> 32 & 63) as usize)?;
        let form = match word >> 38 & 3 {
            0 => Form::Value,
            1 => Form::Error,
            2 => Form::Long,
            _ => Form::Bytes,
        };
        Some((*call, form, word >> 40))
    }
}

#[cfg(any(test, feature = "sim"))]
pub(crate) use decode::*;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_numbers_of_calls_are_their_places() {
        for (at, call) in Call::ALL.iter().enumerate() {
            assert_eq!(*call as usize, at);
            for form in [Form::Value, Form::Error, Form::Long, Form::Bytes] {
                let word = call_word(*call, 7, form, VALUE_MASK - 1);
                assert_eq!(call_parts(word), Some((*call, form, VALUE_MASK - 1)));
                assert_eq!((kind(word), target(word)), (CALL, 7));
            }
        }
        assert!(Call::ALL.len() < 64);
    }

    #[test]
    fn words_say_what_was_put_in() {
        assert_eq!(
            clock_parts(clock_word(255, LONG_SPAN - 1)),
            (255, LONG_SPAN - 1)
        );
        let word = io_word(READ | u64::from(stream_bits(3)), 65_536);
        assert_eq!((kind(word), target(word), length(word)), (READ, 3, 65_536));
        for token in [0, 1 << 54, usize::MAX] {
            let ready = [true, false, true];
            assert_eq!(event_parts(event_word(token, ready)), (token, ready));
        }
        let word = poll_word(true, 1024);
        assert_eq!(
            (kind(word), has_more(word), length(word)),
            (POLL, true, 1024)
        );
    }

    /// Computed by a program of a few lines in another language.
    #[test]
    fn the_checksum_is_the_known_one() {
        assert_eq!(Checksum::of([]).value(), 0xCBF2_9CE4_8422_2325);
        assert_eq!(Checksum::of([0]).value(), 0x7A99_0C03_6FBF_5EC7);
        assert_eq!(
            Checksum::of([1, 2, u64::MAX]).value(),
            0xEA74_8BF4_14F2_CDA0
        );
    }

    #[test]
    fn a_payloads_hash_does_not_depend_on_its_pieces() {
        let whole = payload_hash([&b"hello, world"[..]]);
        assert_eq!(payload_hash([&b"hel"[..], b"", b"lo, world"]), whole);
        assert_ne!(payload_hash([&b"hello, world\0"[..]]), whole);
    }

    #[test]
    fn errors_keep_their_number_or_their_kind() {
        let known = io::Error::from_raw_os_error(libc::ECONNRESET);
        assert_eq!(
            error_of(error_code(&known)).raw_os_error(),
            Some(libc::ECONNRESET)
        );
        for kind in KINDS {
            let error = error_of(error_code(&(*kind).into()));
            assert_eq!((error.kind(), error.raw_os_error()), (*kind, None));
        }
    }
}
