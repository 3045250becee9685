//! [`Os`] that records what another one returns.

use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::ops::Deref;
use std::os::fd::{BorrowedFd, OwnedFd, RawFd};
use std::time::Duration;

use super::format::{event_word, poll_word, stream_bits, stream_number, Call, FRAME, READ, WRITE};
use super::note::{note, note_bytes, note_number, note_token, nothing, optional};
use super::recorder::{Recorder, Value, SAVE_AFTER};
use super::values::{put_addr, put_credentials};
use super::Recording;
use crate::addr::{Addr, Credentials};
use crate::config::SocketOptions;
use crate::detached::{self, SystemCalls};
use crate::error::Result;
use crate::handle::Wake;
use crate::handler::Interest;
use crate::proto::Time;
use crate::reactor::os::{Connected, End, Event, Noted, Os, Socket, StreamOps, Token};
use crate::reason::CloseReason;

/// Another [`Os`], and where its results are recorded, if they are.
pub(crate) struct RecordingOs<O> {
    os: O,
    recorder: Option<Box<Recorder>>,
    /// Whether a poll may be interrupted in order to write the file.
    wakes: bool,
}

/// A stream or a listener with its number in the file.
pub(crate) struct Recorded<T> {
    inner: T,
    /// The number as records of reads and writes have it: see [`stream_bits`].
    bits: u32,
}

impl<T> Recorded<T> {
    fn number(&self) -> u32 {
        stream_number(self.bits)
    }
}

impl<T> Deref for Recorded<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.inner
    }
}

impl<O> Deref for RecordingOs<O> {
    type Target = O;

    fn deref(&self) -> &O {
        &self.os
    }
}

impl<O: StreamOps> RecordingOs<O> {
    /// Without a recording.
    pub(crate) fn idle(os: O) -> Self {
        Self {
            os,
            recorder: None,
            wakes: false,
        }
    }

    /// With a recording, from the first call on.
    pub(crate) fn new(os: O, recording: Recording) -> Result<Self> {
        let recorder = Recorder::create(recording, os.large_frame())?;
        Ok(Self {
            recorder: Some(Box::new(recorder)),
            wakes: true,
            os,
        })
    }

    /// The same on a clock that does not move by itself.
    #[cfg(feature = "sim")]
    pub(crate) fn simulated(os: O, recording: Recording) -> Result<Self> {
        let wakes = false;
        Ok(Self {
            wakes,
            ..Self::new(os, recording)?
        })
    }

    fn stream(&self, inner: O::Stream) -> Recorded<O::Stream> {
        Recorded {
            inner,
            bits: stream_bits(self.recorder.as_ref().map_or(0, |to| to.new_stream())),
        }
    }
}

impl<O: Os> RecordingOs<O> {
    fn listener(&self, inner: O::Listener) -> Recorded<O::Listener> {
        Recorded {
            inner,
            bits: stream_bits(self.recorder.as_ref().map_or(0, |to| to.new_listener())),
        }
    }
}

impl<S: Socket> Socket for Recorded<S> {
    fn local_addr(&self) -> io::Result<Addr> {
        self.inner.local_addr()
    }

    fn credentials(&self) -> io::Result<Credentials> {
        self.inner.credentials()
    }

    fn fd(&self) -> io::Result<BorrowedFd<'_>> {
        self.inner.fd()
    }
}

impl<O: StreamOps> StreamOps for RecordingOs<O> {
    type Stream = Recorded<O::Stream>;

    #[inline]
    fn large_frame(&self) -> usize {
        self.os.large_frame()
    }

    #[inline(always)]
    fn now(&self) -> Time {
        let now = self.os.now();
        if let Some(recorder) = &self.recorder {
            recorder.clock(now);
        }
        now
    }

    #[inline(always)]
    fn read(&mut self, stream: &mut Self::Stream, buffer: &mut [u8]) -> io::Result<usize> {
        match self.os.read(&mut stream.inner, buffer) {
            Ok(count) => {
                if let Some(recorder) = &self.recorder {
                    let read = || buffer.get(..count).unwrap_or_default();
                    recorder.io(READ | u64::from(stream.bits), count, read);
                }
                Ok(count)
            }
            Err(error) => {
                if let Some(recorder) = &self.recorder {
                    recorder.failed(Call::Read, stream.number(), &error);
                }
                Err(error)
            }
        }
    }

    #[inline(always)]
    fn write(&mut self, stream: &mut Self::Stream, bytes: &[u8]) -> io::Result<usize> {
        match self.os.write(&mut stream.inner, bytes) {
            Ok(count) => {
                match &self.recorder {
                    Some(recorder) if count == bytes.len() => {
                        recorder.io(WRITE | u64::from(stream.bits), count, || bytes);
                    }
                    Some(recorder) => recorder.write(stream.number(), [bytes].into_iter(), count),
                    None => {}
                }
                Ok(count)
            }
            Err(error) => {
                if let Some(recorder) = &self.recorder {
                    recorder.failed(Call::Write, stream.number(), &error);
                }
                Err(error)
            }
        }
    }

    fn write_pieces(
        &mut self,
        stream: &mut Self::Stream,
        pieces: &[IoSlice<'_>],
    ) -> io::Result<usize> {
        let result = self.os.write_pieces(&mut stream.inner, pieces);
        if let Some(recorder) = &self.recorder {
            let pieces = pieces.iter().map(|piece| &**piece);
            match &result {
                Ok(count) => recorder.write(stream.number(), pieces, *count),
                Err(error) => recorder.failed(Call::Write, stream.number(), error),
            }
        }
        result
    }

    fn unsent(&mut self, stream: &mut Self::Stream) -> Option<usize> {
        let unsent = self.os.unsent(&mut stream.inner);
        if let Some(recorder) = &self.recorder {
            recorder.call(Call::Unsent, stream.number(), optional(unsent));
        }
        unsent
    }

    fn has_taken(&mut self, stream: &mut Self::Stream, written: u64) -> Option<bool> {
        let taken = self.os.has_taken(&mut stream.inner, written);
        if let Some(recorder) = &self.recorder {
            let taken = taken.map_or(2, u64::from);
            recorder.call(Call::HasTaken, stream.number(), Value::Small(taken));
        }
        taken
    }

    fn reregister_stream(&mut self, stream: &mut Self::Stream, token: Token) -> io::Result<()> {
        let result = self.os.reregister_stream(&mut stream.inner, token);
        let (recorder, number) = (&self.recorder, stream.number());
        note_token(recorder, Call::ReregisterStream, number, &result, token);
        result
    }

    fn shutdown(&mut self, stream: &mut Self::Stream) -> io::Result<()> {
        let result = self.os.shutdown(&mut stream.inner);
        note(
            &self.recorder,
            Call::Shutdown,
            stream.number(),
            &result,
            nothing,
        );
        result
    }
}

impl<O: Os> Os for RecordingOs<O> {
    type Listener = Recorded<O::Listener>;

    fn descriptor_limit(&self) -> Option<usize> {
        let limit = self.os.descriptor_limit();
        if let Some(recorder) = &self.recorder {
            recorder.call(Call::DescriptorLimit, 0, optional(limit));
        }
        limit
    }

    fn poll(&mut self, events: &mut Vec<Event>, timeout: Option<Duration>) -> io::Result<bool> {
        let Some(recorder) = &self.recorder else {
            return self.os.poll(events, timeout);
        };
        recorder.save_in_time();
        recorder.large_frame(self.os.large_frame());
        let before = events.len();
        let sleeps_long = timeout.is_none_or(|timeout| timeout > SAVE_AFTER);
        let mut result = if self.wakes && sleeps_long && recorder.is_unsaved() {
            let first = self.os.poll(events, Some(SAVE_AFTER));
            if matches!(first, Ok(false)) && events.len() == before {
                // Nothing happens, and nothing may ever happen.
                recorder.save();
                let left = timeout.map(|timeout| timeout.saturating_sub(SAVE_AFTER));
                self.os.poll(events, left)
            } else {
                first
            }
        } else {
            self.os.poll(events, timeout)
        };
        let new = events.get(before..).unwrap_or_default();
        match &mut result {
            Ok(more) => {
                let words = new.iter().map(|event| {
                    let ready = [event.readable, event.writable, event.closed];
                    event_word(event.token.0, ready)
                });
                recorder.push_all(poll_word(*more, new.len()), words);
            }
            Err(error) => recorder.failed(Call::Poll, 0, error),
        }
        result
    }

    fn waker(&self) -> Box<dyn Wake> {
        self.os.waker()
    }

    fn listen(
        &mut self,
        addr: &Addr,
        name: Option<&str>,
        options: &SocketOptions,
    ) -> io::Result<Self::Listener> {
        let listener = self.os.listen(addr, name, options);
        let listener = listener.map(|listener| self.listener(listener));
        note(&self.recorder, Call::Listen, 0, &listener, |new| {
            new.number().into()
        });
        listener
    }

    fn adopt_listener(&mut self, socket: OwnedFd) -> io::Result<Self::Listener> {
        let listener = self.os.adopt_listener(socket);
        let listener = listener.map(|listener| self.listener(listener));
        note(&self.recorder, Call::AdoptListener, 0, &listener, |new| {
            new.number().into()
        });
        listener
    }

    fn share_listener(&mut self, listener: &mut Self::Listener) -> io::Result<OwnedFd> {
        let shared = self.os.share_listener(&mut listener.inner);
        note(
            &self.recorder,
            Call::ShareListener,
            listener.number(),
            &shared,
            nothing,
        );
        shared
    }

    fn listener_addr(&self, listener: &Self::Listener) -> io::Result<Addr> {
        let addr = self.os.listener_addr(&listener.inner);
        let put = |addr: &Addr, bytes: &mut Vec<u8>| put_addr(bytes, addr);
        note_bytes(
            &self.recorder,
            Call::ListenerAddr,
            listener.number(),
            &addr,
            put,
        );
        addr
    }

    fn register_listener(&mut self, listener: &mut Self::Listener, token: Token) -> io::Result<()> {
        let result = self.os.register_listener(&mut listener.inner, token);
        note(
            &self.recorder,
            Call::RegisterListener,
            listener.number(),
            &result,
            nothing,
        );
        result
    }

    fn deregister_listener(&mut self, listener: &mut Self::Listener) -> io::Result<()> {
        let result = self.os.deregister_listener(&mut listener.inner);
        note(
            &self.recorder,
            Call::DeregisterListener,
            listener.number(),
            &result,
            nothing,
        );
        result
    }

    fn close_listener(&mut self, listener: Self::Listener) {
        note(
            &self.recorder,
            Call::CloseListener,
            listener.number(),
            &Ok(()),
            nothing,
        );
        self.os.close_listener(listener.inner);
    }

    fn accept(&mut self, listener: &mut Self::Listener) -> io::Result<(Self::Stream, Addr)> {
        let accepted = self.os.accept(&mut listener.inner);
        let accepted = accepted.map(|(stream, addr)| (self.stream(stream), addr));
        let put = |(stream, addr): &(Self::Stream, Addr), bytes: &mut Vec<u8>| {
            bytes.extend(stream.number().to_le_bytes());
            put_addr(bytes, addr);
        };
        note_bytes(
            &self.recorder,
            Call::Accept,
            listener.number(),
            &accepted,
            put,
        );
        accepted
    }

    fn has_client(&mut self, listener: &mut Self::Listener) -> bool {
        let has_client = self.os.has_client(&mut listener.inner);
        let number = listener.number();
        note(
            &self.recorder,
            Call::HasClient,
            number,
            &Ok(has_client),
            |has| u64::from(*has),
        );
        has_client
    }

    fn connect(
        &mut self,
        addr: &Addr,
        bind: Option<SocketAddr>,
        options: &SocketOptions,
    ) -> io::Result<(Self::Stream, bool)> {
        let begun = self.os.connect(addr, bind, options);
        let begun = begun.map(|(stream, connected)| (self.stream(stream), connected));
        let put = |(stream, connected): &(Self::Stream, bool), bytes: &mut Vec<u8>| {
            bytes.extend(stream.number().to_le_bytes());
            bytes.push(u8::from(*connected));
            put_addr(bytes, addr);
        };
        note_bytes(&self.recorder, Call::Connect, 0, &begun, put);
        begun
    }

    fn adopt_stream(
        &mut self,
        socket: OwnedFd,
        options: &SocketOptions,
    ) -> io::Result<(Self::Stream, Addr)> {
        let adopted = self.os.adopt_stream(socket, options);
        let adopted = adopted.map(|(stream, addr)| (self.stream(stream), addr));
        let put = |(stream, addr): &(Self::Stream, Addr), bytes: &mut Vec<u8>| {
            bytes.extend(stream.number().to_le_bytes());
            put_addr(bytes, addr);
        };
        note_bytes(&self.recorder, Call::AdoptStream, 0, &adopted, put);
        adopted
    }

    fn connected(&mut self, stream: &mut Self::Stream) -> io::Result<Connected> {
        let state = self.os.connected(&mut stream.inner);
        note(
            &self.recorder,
            Call::Connected,
            stream.number(),
            &state,
            |state| match state {
                Connected::NotYet => 0,
                Connected::Yes => 1,
                Connected::Reset => 2,
            },
        );
        state
    }

    fn random(&mut self) -> u64 {
        let random = self.os.random();
        note_number(&self.recorder, Call::Random, random)
    }

    fn register_stream(
        &mut self,
        stream: &mut Self::Stream,
        interest: Interest,
        token: Token,
    ) -> io::Result<()> {
        let result = self.os.register_stream(&mut stream.inner, interest, token);
        let (recorder, number) = (&self.recorder, stream.number());
        note_token(recorder, Call::RegisterStream, number, &result, token);
        result
    }

    fn watch(
        &mut self,
        descriptor: BorrowedFd<'_>,
        interest: Interest,
        token: Token,
    ) -> io::Result<()> {
        let result = self.os.watch(descriptor, interest, token);
        note_token(&self.recorder, Call::Watch, 0, &result, token);
        result
    }

    fn unwatch(&mut self, descriptor: RawFd) {
        note(&self.recorder, Call::Unwatch, 0, &Ok(()), nothing);
        self.os.unwatch(descriptor);
    }

    fn peek(&mut self, stream: &mut Self::Stream) -> io::Result<usize> {
        let count = self.os.peek(&mut stream.inner);
        note(
            &self.recorder,
            Call::Peek,
            stream.number(),
            &count,
            |count| *count as u64,
        );
        count
    }

    fn release(&mut self, stream: Self::Stream) -> io::Result<(OwnedFd, SystemCalls)> {
        let number = stream.number();
        let released = self.os.release(stream.inner);
        note(&self.recorder, Call::Release, number, &released, nothing);
        released
    }

    fn cut_off(&self, socket: &detached::Socket) {
        note(&self.recorder, Call::CutOff, 0, &Ok(()), nothing);
        self.os.cut_off(socket);
    }

    fn local_addr(&self, stream: &Self::Stream) -> io::Result<Addr> {
        let addr = self.os.local_addr(&stream.inner);
        let put = |addr: &Addr, bytes: &mut Vec<u8>| put_addr(bytes, addr);
        let (recorder, number) = (&self.recorder, stream.number());
        note_bytes(recorder, Call::LocalAddr, number, &addr, put);
        addr
    }

    fn credentials(&self, stream: &Self::Stream) -> io::Result<Credentials> {
        let known = self.os.credentials(&stream.inner);
        let put = |known: &Credentials, bytes: &mut Vec<u8>| put_credentials(bytes, known);
        let (recorder, number) = (&self.recorder, stream.number());
        note_bytes(recorder, Call::Credentials, number, &known, put);
        known
    }

    fn fd<'a>(&self, stream: &'a Self::Stream) -> io::Result<BorrowedFd<'a>> {
        let fd = self.os.fd(&stream.inner);
        let number = stream.number();
        note(&self.recorder, Call::Descriptor, number, &fd, nothing);
        fd
    }

    fn close(&mut self, stream: Self::Stream, end: End) {
        let number = stream.number();
        note(&self.recorder, Call::Close, number, &Ok(end), |end| {
            *end as u64
        });
        self.os.close(stream.inner, end);
    }

    fn note_end(&mut self, reason: CloseReason) {
        note(&self.recorder, Call::Reason, 0, &Ok(reason), |reason| {
            *reason as u64
        });
    }

    fn queued(&mut self, queued: Option<u64>) -> Option<u64> {
        queued.map(|queued| note_number(&self.recorder, Call::Queued, queued))
    }

    fn carried_out(&mut self, done: u64) -> u64 {
        note_number(&self.recorder, Call::CarriedOut, done)
    }

    fn note_command(&mut self, command: Noted<'_>) {
        let Some(recorder) = &self.recorder else {
            return;
        };
        let token = |id| Value::Long(0, Token::of_conn(id).0 as u64);
        match command {
            Noted::Drain(grace) => {
                let nanos = u64::try_from(grace.as_nanos()).unwrap_or(u64::MAX);
                recorder.call(Call::Drain, 0, Value::Long(0, nanos));
            }
            Noted::Kill(id) => recorder.call(Call::Kill, 0, token(id)),
            Noted::Send(id, frame) => {
                recorder.call(Call::Send, 0, token(id));
                recorder.io(FRAME, frame.len(), || frame);
            }
            Noted::Opaque => recorder.call(Call::Job, 0, Value::Small(0)),
        }
    }
}
