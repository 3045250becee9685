//! Records as the words of a recording spell them.

use std::fmt;
use std::io;

use crate::reactor::os::Token;
use crate::reason::CloseReason;
use crate::record::format::{
    call_parts, clock_parts, error_of, event_parts, has_more, kind, length, target, words_for,
    Call, Form, CALL, CLOCK, EVENT, FRAME, POLL, READ, WORD, WRITE,
};
use crate::record::values::Values;
use crate::record::Payloads;

/// Bytes of a payload that a description shows.
const SHOWN: usize = 64;

/// One record.
#[derive(Debug)]
pub(super) struct Record<'a> {
    /// The word behind it.
    pub(super) end: usize,
    pub(super) what: What<'a>,
}

#[derive(Debug)]
pub(super) enum What<'a> {
    /// So many further readings of the clock gave the time before, then one gave this.
    Clock(u64, Clock),
    /// Whether more events may be pending, and the words of these.
    Poll(bool, &'a [u64]),
    Io(Io<'a>),
    /// The frame of a handle's command: its length.
    Frame(usize, Kept<'a>),
    Call(Call, u32, Result<Answer<'a>, u64>),
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Clock {
    After(u64),
    At(u64),
}

impl Clock {
    pub(super) fn from(self, time: u64) -> u64 {
        match self {
            Self::After(span) => time.saturating_add(span),
            Self::At(time) => time,
        }
    }
}

/// A read or a write that did not fail.
#[derive(Clone, Copy, Debug)]
pub(super) struct Io<'a> {
    pub(super) is_write: bool,
    pub(super) stream: u32,
    /// Of a write: the length that it was to have.
    pub(super) asked: usize,
    pub(super) taken: usize,
    pub(super) payload: Kept<'a>,
}

/// What is kept of a payload.
#[derive(Clone, Copy, Debug)]
pub(super) enum Kept<'a> {
    Nothing,
    Hash(u64),
    Bytes(&'a [u64]),
}

/// The result of a call.
#[derive(Clone, Copy, Debug)]
pub(super) enum Answer<'a> {
    Small(u64),
    Long(u64, u64),
    Bytes(&'a [u64], usize),
}

impl Answer<'_> {
    pub(super) fn small(self) -> u64 {
        match self {
            Self::Small(value) | Self::Long(value, _) => value,
            Self::Bytes(..) => 0,
        }
    }

    pub(super) fn long(self) -> u64 {
        match self {
            Self::Long(_, word) => word,
            Self::Small(_) | Self::Bytes(..) => 0,
        }
    }

    pub(super) fn bytes(self) -> Vec<u8> {
        match self {
            Self::Bytes(words, length) => bytes_of(words, length),
            Self::Small(_) | Self::Long(..) => Vec::new(),
        }
    }
}

pub(super) fn bytes_of(words: &[u64], length: usize) -> Vec<u8> {
    let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    bytes.truncate(length);
    bytes
}

/// The record that begins with this word; `None` if it is none, or not complete.
pub(super) fn record_at(words: &[u64], at: usize, payloads: Payloads) -> Option<Record<'_>> {
    let word = *words.get(at)?;
    let rest = words.get(at + 1..)?;
    let (used, what) = match kind(word) {
        CLOCK => {
            let (repeats, span) = clock_parts(word);
            (0, What::Clock(repeats, Clock::After(span)))
        }
        POLL => {
            let events = rest.get(..length(word))?;
            if events.iter().any(|event| kind(*event) != EVENT) {
                return None;
            }
            (events.len(), What::Poll(has_more(word), events))
        }
        READ | WRITE => {
            let length = length(word);
            let (used, payload) = payload(rest, length, payloads)?;
            let io = Io {
                is_write: kind(word) == WRITE,
                stream: target(word),
                asked: length,
                taken: length,
                payload,
            };
            (used, What::Io(io))
        }
        FRAME => {
            let (used, payload) = payload(rest, length(word), payloads)?;
            (used, What::Frame(length(word), payload))
        }
        CALL => call(word, rest, payloads)?,
        _ => return None,
    };
    let end = at + 1 + used;
    Some(Record { end, what })
}

/// Whether a record may begin with this word.
pub(super) fn is_record(word: u64) -> bool {
    matches!(kind(word), CLOCK | POLL | READ | WRITE | CALL | FRAME)
}

fn payload(rest: &[u64], length: usize, payloads: Payloads) -> Option<(usize, Kept<'_>)> {
    Some(match payloads {
        Payloads::Dropped => (0, Kept::Nothing),
        Payloads::Hashed => (1, Kept::Hash(*rest.first()?)),
        Payloads::Kept => {
            let words = rest.get(..words_for(length))?;
            (words.len(), Kept::Bytes(words))
        }
    })
}

fn call(word: u64, rest: &[u64], payloads: Payloads) -> Option<(usize, What<'_>)> {
    let (call, form, value) = call_parts(word)?;
    let (used, answer) = match form {
        Form::Value => (0, Ok(Answer::Small(value))),
        Form::Error => (0, Err(value)),
        Form::Long => (1, Ok(Answer::Long(value, *rest.first()?))),
        Form::Bytes => {
            let length = value as usize;
            let words = rest.get(..words_for(length))?;
            (words.len(), Ok(Answer::Bytes(words, length)))
        }
    };
    let stream = target(word);
    match (call, answer) {
        (Call::Write, Ok(Answer::Long(_, lengths))) => {
            let (asked, taken) = ((lengths >> 32) as usize, lengths as u32 as usize);
            let (kept, payload) = payload(rest.get(1..)?, taken, payloads)?;
            let io = Io {
                is_write: true,
                stream,
                asked,
                taken,
                payload,
            };
            Some((used + kept, What::Io(io)))
        }
        (Call::Clock, Ok(answer)) => {
            let (repeats, time) = (answer.small(), answer.long());
            Some((used, What::Clock(repeats, Clock::At(time))))
        }
        (call, answer) => Some((used, What::Call(call, stream, answer))),
    }
}

impl Record<'_> {
    /// The connection that it is about.
    pub(super) fn connection(&self) -> Option<u32> {
        match &self.what {
            What::Clock(..) | What::Poll(..) | What::Frame(..) => None,
            What::Io(io) => Some(io.stream),
            What::Call(call, target, answer) => match call {
                Call::Accept | Call::Connect | Call::AdoptStream => {
                    Values(&answer.ok()?.bytes()).number()
                }
                call => call.is_about_a_stream().then_some(*target),
            },
        }
    }
}

impl Call {
    fn is_about_a_stream(self) -> bool {
        matches!(
            self,
            Self::Read
                | Self::Write
                | Self::Shutdown
                | Self::Unsent
                | Self::HasTaken
                | Self::Connected
                | Self::RegisterStream
                | Self::ReregisterStream
                | Self::Peek
                | Self::Release
                | Self::Close
                | Self::LocalAddr
                | Self::Credentials
                | Self::Descriptor
        )
    }

    /// What it does, for descriptions.
    pub(super) fn words(self) -> &'static str {
        match self {
            Self::End => "the end of the recording",
            Self::Clock => "a reading of the clock",
            Self::Reason => "the end of a connection",
            Self::Poll => "poll",
            Self::Read => "read",
            Self::Write => "write",
            Self::Shutdown => "shutdown",
            Self::Unsent => "query of unsent bytes",
            Self::HasTaken => "query of acknowledged bytes",
            Self::LargeFrame => "another size of large frames",
            Self::DescriptorLimit => "query of the descriptor limit",
            Self::Listen => "listen",
            Self::AdoptListener => "adoption of a listener",
            Self::ShareListener => "copy of a listener",
            Self::ListenerAddr => "query of a listener's address",
            Self::RegisterListener => "registration of a listener",
            Self::DeregisterListener => "deregistration of a listener",
            Self::CloseListener => "close of a listener",
            Self::Accept => "accept",
            Self::HasClient => "query of a backlog",
            Self::Connect => "connect",
            Self::AdoptStream => "adoption of a socket",
            Self::Connected => "query of a connect",
            Self::Random => "a random number",
            Self::RegisterStream => "registration",
            Self::ReregisterStream => "registration for writing too",
            Self::Watch => "watch of a descriptor",
            Self::Unwatch => "end of a watch",
            Self::Peek => "peek",
            Self::Release => "detach",
            Self::CutOff => "end of a detached stream",
            Self::Close => "close",
            Self::LocalAddr => "query of the local address",
            Self::Credentials => "query of credentials",
            Self::Descriptor => "query of the descriptor",
            Self::Drain => "drain by a handle",
            Self::Kill => "kill by a handle",
            Self::Send => "frame from a handle",
            Self::Job => "job or message of a handle",
            Self::Queued => "number of commands queued",
            Self::CarriedOut => "number of commands carried out",
        }
    }
}

/// As a line of a listing.
impl fmt::Display for Record<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.what {
            What::Clock(..) => f.write_str("clock"),
            What::Poll(more, events) => {
                write!(f, "poll: {} events", events.len())?;
                for event in *events {
                    let (token, ready) = event_parts(*event);
                    match Token(token) {
                        Token::WAKER => f.write_str(", waker")?,
                        Token(token) => write!(f, ", {token:#x}")?,
                    }
                    for (is, name) in ready.into_iter().zip(["r", "w", "c"]) {
                        f.write_str(if is { name } else { "" })?;
                    }
                }
                f.write_str(if *more { ", perhaps more" } else { "" })
            }
            What::Io(io) => write_io(f, io),
            What::Frame(length, _) => write!(f, "frame of {length} bytes"),
            What::Call(Call::Reason, _, Ok(answer)) => {
                let reason = CloseReason::ALL.get(answer.small() as usize);
                let reason = reason.map_or("unknown", |reason| reason.name());
                write!(f, "end of a connection: {reason}")
            }
            What::Call(call, target, answer) => {
                f.write_str(call.words())?;
                match call {
                    Call::RegisterListener | Call::DeregisterListener | Call::CloseListener => {
                        write!(f, " {target}")?;
                    }
                    call if call.is_about_a_stream() => write!(f, ", connection {target}")?,
                    Call::Accept | Call::Connect | Call::AdoptStream => {
                        let bytes = answer.map(Answer::bytes).unwrap_or_default();
                        let mut values = Values(&bytes);
                        if let Some(number) = values.number() {
                            write!(f, ", connection {number}")?;
                        }
                        if *call == Call::Connect {
                            values.byte();
                        }
                        if let Some(addr) = values.addr() {
                            write!(f, ", peer {addr}")?;
                        }
                    }
                    _ => {}
                }
                match answer {
                    Ok(_) => Ok(()),
                    Err(code) => write!(f, ": {}", error_of(*code)),
                }
            }
        }
    }
}

fn write_io(f: &mut fmt::Formatter<'_>, io: &Io<'_>) -> fmt::Result {
    let Io { stream, taken, .. } = io;
    match io.is_write {
        true if *taken < io.asked => {
            write!(
                f,
                "write of {} bytes, of which {taken} were taken",
                io.asked
            )?;
        }
        true => write!(f, "write of {taken} bytes")?,
        false if *taken == 0 => f.write_str("read: end of input")?,
        false => write!(f, "read of {taken} bytes")?,
    }
    write!(f, ", connection {stream}")?;
    if let Kept::Bytes(words) = io.payload {
        let first = words.get(..words.len().min(SHOWN.div_ceil(WORD)));
        let bytes = bytes_of(first.unwrap_or_default(), *taken);
        write!(f, ": {}", Shown(&bytes, *taken))?;
    }
    Ok(())
}

/// The beginning of a payload as a byte string.
pub(super) struct Shown<'a>(pub(super) &'a [u8], pub(super) usize);

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(bytes, length) = self;
        let first = bytes.get(..SHOWN).unwrap_or(bytes);
        let more = if *length > first.len() { "..." } else { "" };
        write!(f, "b\"{}\"{more}", first.escape_ascii())
    }
}

/// The error as the recorded call returned it.
pub(super) fn error(code: u64) -> io::Error {
    error_of(code)
}
