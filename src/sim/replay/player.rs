//! Plays a tape: gives each call its recorded result, up to the first call that differs.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::time::Duration;

use super::records::{bytes_of, error, Answer, Io, Kept, Record, Shown, What};
use super::tape::{Tape, MAX_MADE};
use crate::proto::Time;
use crate::reactor::os::{Event, Token};
use crate::record::format::{event_parts, payload_hash, Call};

/// Where a replay differs from its recording: the server made another call than the recorded one,
/// or wrote other bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Divergence {
    /// The number of the record, as in [`Tape::lines`].
    pub record: u64,
    /// Its place in the file, in bytes.
    pub offset: u64,
    /// The time since the recorded server was made.
    pub at: Duration,
    /// The connection that the record is about: see [`Tape::connections`].
    pub connection: Option<u32>,
    /// The recorded call.
    pub recorded: String,
    /// What the server did in the replay.
    pub replayed: String,
    /// A cause that is likely here.
    pub hint: Option<&'static str>,
}

impl fmt::Display for Divergence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            record, offset, at, ..
        } = self;
        write!(
            f,
            "the replay differs at record {record} (byte {offset} of the file, {:.6} s",
            at.as_secs_f64()
        )?;
        if let Some(connection) = self.connection {
            write!(f, ", connection {connection}")?;
        }
        write!(
            f,
            "): recorded: {}; replayed: {}",
            self.recorded, self.replayed
        )?;
        match self.hint {
            Some(hint) => write!(f, " ({hint})"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Divergence {}

const TLS: &str = "a TLS session has random keys and cannot be replayed: record in front of it";
const JOBS: &str = "jobs and messages of handles are not recorded, and there were some before";
const DETACHED: &str = "what a detached connection's thread does is not recorded";

/// A command of a handle, as it was recorded.
pub(super) enum Recorded {
    Drain(Duration),
    Kill(Token),
    Send(Token, Vec<u8>),
}

/// Whether the replay goes on.
#[derive(Debug)]
enum Stop {
    Diverged(Divergence),
    /// The tape has no further record.
    Ended,
}

pub(super) struct Player {
    tape: Tape,
    at: usize,
    record: u64,
    time: u64,
    /// Readings of the clock before the next change of it.
    repeats: u64,
    large_frame: usize,
    descriptor_limit: Option<usize>,
    /// Number of bytes that each connection has sent, where input is made.
    sent: BTreeMap<u32, u64>,
    /// A handle's job or message was carried out.
    had_jobs: bool,
    stop: Option<Stop>,
}

/// The result of a call as it was recorded. `None` once the replay has stopped.
pub(super) type Result<T> = Option<io::Result<T>>;

impl Player {
    pub(super) fn new(tape: Tape) -> Self {
        Self {
            at: 0,
            record: 0,
            time: tape.start_time(),
            repeats: 0,
            large_frame: crate::reactor::os::LARGE_FRAME,
            descriptor_limit: None,
            sent: BTreeMap::new(),
            had_jobs: false,
            stop: None,
            tape,
        }
    }

    pub(super) fn tape(&self) -> &Tape {
        &self.tape
    }

    pub(super) fn divergence(&self) -> Option<&Divergence> {
        match &self.stop {
            Some(Stop::Diverged(divergence)) => Some(divergence),
            _ => None,
        }
    }

    pub(super) fn end(&mut self) {
        self.stop.get_or_insert(Stop::Ended);
    }

    /// True once no iteration is left, or the replay has stopped.
    pub(super) fn is_over(&self) -> bool {
        self.stop.is_some() || self.tape.is_past_last_poll(self.at)
    }

    /// The number of records so far.
    pub(super) fn played(&self) -> u64 {
        self.record
    }

    pub(super) fn time(&self) -> Time {
        Time::from_nanos(self.time)
    }

    fn step(&mut self, end: usize) {
        self.at = end;
        self.record += 1;
        self.repeats = 0;
    }

    /// A reading of the clock. One more than recorded gives the time before.
    pub(super) fn now(&mut self) -> Time {
        if self.stop.is_none() {
            if let Some(Record {
                end,
                what: What::Clock(repeats, clock),
            }) = self.tape.record(self.at)
            {
                if self.repeats < repeats {
                    self.repeats += 1;
                } else {
                    self.time = clock.from(self.time);
                    self.step(end);
                }
            }
        }
        self.time()
    }

    /// The commands of handles in the iteration that begins with the next record.
    pub(super) fn commands(&self) -> Vec<Recorded> {
        let mut commands = Vec::new();
        let (mut at, mut begun, mut room) = (self.at, false, MAX_MADE);
        while let Some(record) = self.tape.record(at) {
            at = record.end;
            match record.what {
                What::Poll(..) | What::Call(Call::Poll, ..) if begun => break,
                What::Poll(..) | What::Call(Call::Poll, ..) => begun = true,
                What::Call(Call::Drain, _, Ok(answer)) => {
                    commands.push(Recorded::Drain(Duration::from_nanos(answer.long())));
                }
                What::Call(Call::Kill, _, Ok(answer)) => {
                    commands.push(Recorded::Kill(Token(answer.long() as usize)));
                }
                What::Call(Call::Send, _, Ok(answer)) => {
                    let token = Token(answer.long() as usize);
                    commands.push(Recorded::Send(token, Vec::new()));
                }
                What::Frame(length, kept) => {
                    if let Some(Recorded::Send(_, frame)) = commands.last_mut() {
                        *frame = match kept {
                            Kept::Bytes(words) => bytes_of(words, length),
                            // As long, at least.
                            Kept::Hash(_) | Kept::Nothing => {
                                let length = length.min(room);
                                room -= length;
                                vec![0; length]
                            }
                        };
                    }
                }
                _ => {}
            }
        }
        commands
    }

    /// Goes to the next record that is no mere query, and keeps the answers on the way.
    pub(super) fn skip_queries(&mut self) {
        while let Some(record) = self.tape.record(self.at) {
            match record.what {
                What::Clock(_, clock) => self.time = clock.from(self.time),
                What::Call(Call::LargeFrame, _, Ok(answer)) => {
                    self.large_frame = answer.long() as usize;
                }
                What::Call(Call::DescriptorLimit, _, Ok(answer)) => {
                    self.descriptor_limit = limit(answer);
                }
                // The iteration has got them at its start.
                What::Call(Call::Drain | Call::Kill | Call::Send, ..) | What::Frame(..) => {}
                What::Call(Call::Job, ..) => self.had_jobs = true,
                _ => return,
            }
            let end = record.end;
            self.step(end);
        }
    }

    pub(super) fn large_frame(&self) -> usize {
        self.large_frame
    }

    pub(super) fn descriptor_limit(&mut self) -> Option<usize> {
        if let Some(Record {
            end,
            what: What::Call(Call::DescriptorLimit, _, Ok(answer)),
        }) = self.tape.record(self.at)
        {
            self.descriptor_limit = limit(answer);
            self.step(end);
        }
        self.descriptor_limit
    }

    /// A connection opens: the number of commands of handles so far, if some were still queued.
    pub(super) fn queued(&mut self) -> Option<u64> {
        let Some(Record {
            end,
            what: What::Call(Call::Queued, _, Ok(answer)),
        }) = self.tape.record(self.at)
        else {
            return None;
        };
        let queued = answer.long();
        self.step(end);
        Some(queued)
    }

    /// Goes to the record of the call that the server makes. False at the end of the tape.
    fn advance(&mut self) -> bool {
        if self.stop.is_some() {
            return false;
        }
        self.skip_queries();
        let is_end = match self.tape.record(self.at) {
            None => true,
            Some(record) => matches!(record.what, What::Call(Call::End, ..)),
        };
        if is_end {
            self.end();
        }
        !is_end
    }

    /// Stops: the record here is not what the server does.
    fn diverge(&mut self, replayed: String) {
        let Some(record) = self.tape.record(self.at) else {
            return;
        };
        let hint = match &record.what {
            What::Io(io) if io.is_write && is_tls(io) => Some(TLS),
            _ if self.had_jobs => Some(JOBS),
            _ => None,
        };
        let divergence = Divergence {
            record: self.record,
            offset: self.tape.offset(self.at),
            at: Duration::from_nanos(self.time),
            connection: record.connection(),
            recorded: record.to_string(),
            replayed,
            hint,
        };
        self.stop = Some(Stop::Diverged(divergence));
    }

    /// The result of a call about a stream or listener.
    pub(super) fn call(&mut self, call: Call, target: u32) -> Result<Owned> {
        self.call_with(call, target, |_| true, || describe(call, target))
    }

    /// As [`Player::call`], if the recorded result `fits`.
    pub(super) fn call_with(
        &mut self,
        call: Call,
        target: u32,
        fits: impl FnOnce(Answer<'_>) -> bool,
        describe: impl FnOnce() -> String,
    ) -> Result<Owned> {
        if !self.advance() {
            return None;
        }
        let found = match self.tape.record(self.at) {
            Some(Record {
                end,
                what: What::Call(made, of, answer),
            }) if made == call && of == target => match answer {
                Ok(answer) => fits(answer).then(|| (end, Ok(Owned::from(answer)))),
                Err(code) => Some((end, Err(error(code)))),
            },
            _ => None,
        };
        match found {
            Some((end, answer)) => {
                self.step(end);
                Some(answer)
            }
            None => {
                self.diverge(describe());
                None
            }
        }
    }

    pub(super) fn poll(&mut self, events: &mut Vec<Event>) -> Result<bool> {
        if !self.advance() {
            return None;
        }
        let (end, answer) = match self
            .tape
            .record(self.at)
            .map(|record| (record.end, record.what))
        {
            Some((end, What::Poll(more, words))) => {
                events.extend(words.iter().map(|word| {
                    let (token, [readable, writable, closed]) = event_parts(*word);
                    Event {
                        token: Token(token),
                        readable,
                        writable,
                        closed,
                    }
                }));
                (end, Ok(more))
            }
            Some((end, What::Call(Call::Poll, _, Err(code)))) => (end, Err(error(code))),
            _ => {
                self.diverge("poll: the iteration is over".to_owned());
                return None;
            }
        };
        self.step(end);
        Some(answer)
    }

    pub(super) fn read(&mut self, stream: u32, buffer: &mut [u8]) -> Result<usize> {
        if !self.advance() {
            return None;
        }
        let room = buffer.len();
        let record = self.tape.record(self.at);
        let (end, io) = match record.map(|record| (record.end, record.what)) {
            Some((end, What::Io(io)))
                if !io.is_write && io.stream == stream && io.taken <= room =>
            {
                (end, io)
            }
            Some((end, What::Call(Call::Read, of, Err(code)))) if of == stream => {
                self.step(end);
                return Some(Err(error(code)));
            }
            _ => {
                self.diverge(format!("read of at most {room} bytes, connection {stream}"));
                return None;
            }
        };
        let count = io.taken;
        let hash = match io.payload {
            Kept::Bytes(words) => {
                let bytes = bytes_of(words, count);
                if let Some(place) = buffer.get_mut(..count) {
                    place.copy_from_slice(&bytes);
                }
                self.step(end);
                return Some(Ok(count));
            }
            Kept::Hash(hash) => Some(hash),
            Kept::Nothing => None,
        };
        let input = buffer.get_mut(..count).unwrap_or_default();
        let before = self.sent.entry(stream).or_default();
        if count > 0 {
            self.tape.fill(stream, *before, input);
        }
        *before += count as u64;
        let input = buffer.get(..count).unwrap_or_default();
        if hash.is_some_and(|hash| hash != payload_hash([input])) {
            let shown = Shown(input, count).to_string();
            self.diverge(format!("input that is not the recorded one: {shown}"));
            return None;
        }
        self.step(end);
        Some(Ok(count))
    }

    pub(super) fn write(&mut self, stream: u32, pieces: &[&[u8]]) -> Result<usize> {
        if !self.advance() {
            return None;
        }
        let length: usize = pieces.iter().map(|piece| piece.len()).sum();
        let record = self.tape.record(self.at);
        let (end, io) = match record.map(|record| (record.end, record.what)) {
            Some((end, What::Io(io))) if io.is_write && io.stream == stream => (end, io),
            Some((end, What::Call(Call::Write, of, Err(code)))) if of == stream => {
                self.step(end);
                return Some(Err(error(code)));
            }
            _ => {
                let bytes = pieces.concat();
                let shown = Shown(&bytes, length);
                self.diverge(format!(
                    "write of {length} bytes, connection {stream}: {shown}"
                ));
                return None;
            }
        };
        let taken = io.taken;
        if io.asked != length.min(u32::MAX as usize) || taken > length {
            let bytes = pieces.concat();
            let shown = Shown(&bytes, length);
            self.diverge(format!("write of {length} bytes: {shown}"));
            return None;
        }
        if let Some(difference) = difference(&io, pieces) {
            self.diverge(difference);
            return None;
        }
        self.step(end);
        Some(Ok(taken))
    }

    /// A connection has ended for this reason.
    pub(super) fn reason(&mut self, number: u64, name: &str) {
        self.call_with(
            Call::Reason,
            0,
            |answer| answer.small() == number,
            || format!("end of a connection: {name}"),
        );
    }

    /// A handle's command is carried out: readings of the clock from now on are those behind it.
    pub(super) fn pass_command(&mut self) {
        let Some(record) = self.tape.record(self.at) else {
            return;
        };
        match record.what {
            What::Call(Call::Drain | Call::Kill | Call::Send, ..) => {}
            What::Call(Call::Job, ..) => self.had_jobs = true,
            _ => return,
        }
        let end = record.end;
        self.step(end);
        if let Some(Record {
            end,
            what: What::Frame(..),
        }) = self.tape.record(self.at)
        {
            self.step(end);
        }
    }

    /// A connection leaves the loop: the recording has nothing more of it.
    pub(super) fn detach(&mut self, stream: u32) {
        if self.advance() {
            self.diverge(format!("detach, connection {stream}"));
            if let Some(Stop::Diverged(divergence)) = &mut self.stop {
                divergence.hint = Some(DETACHED);
            }
        }
    }
}

/// An answer with its bytes.
pub(super) struct Owned {
    pub(super) small: u64,
    pub(super) long: u64,
    pub(super) bytes: Vec<u8>,
}

impl From<Answer<'_>> for Owned {
    fn from(answer: Answer<'_>) -> Self {
        Self {
            small: answer.small(),
            long: answer.long(),
            bytes: answer.bytes(),
        }
    }
}

fn limit(answer: Answer<'_>) -> Option<usize> {
    (answer.small() > 0).then(|| answer.long() as usize)
}

fn describe(call: Call, target: u32) -> String {
    let what = What::Call(call, target, Ok(Answer::Small(0)));
    Record { end: 0, what }.to_string()
}

/// Where written bytes differ from the recorded ones, if they do.
fn difference(io: &Io<'_>, pieces: &[&[u8]]) -> Option<String> {
    match io.payload {
        Kept::Nothing => None,
        Kept::Hash(hash) => {
            let mut bytes = pieces.concat();
            bytes.truncate(io.taken);
            let differs = payload_hash([&bytes[..]]) != hash;
            differs.then(|| format!("other bytes: {}", Shown(&bytes, io.asked)))
        }
        Kept::Bytes(words) => {
            let recorded = bytes_of(words, io.taken);
            let mut bytes = pieces.concat();
            bytes.truncate(io.taken);
            let at = recorded
                .iter()
                .zip(&bytes)
                .position(|(was, is)| was != is)?;
            let from = at.saturating_sub(16);
            let (is, was) = (bytes.get(from..)?, recorded.get(from..)?);
            Some(format!(
                "other bytes, from byte {at} on: {} instead of {} (from byte {from})",
                Shown(is, is.len()),
                Shown(was, was.len())
            ))
        }
    }
}

/// Whether written bytes look like a TLS record.
fn is_tls(io: &Io<'_>) -> bool {
    let Kept::Bytes([first, ..]) = io.payload else {
        return false;
    };
    matches!(first.to_le_bytes(), [20..=23, 3, 0..=4, ..])
}
