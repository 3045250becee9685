//! [`Os`] that answers from a recording.

use std::cell::{RefCell, RefMut};
use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::os::fd::{BorrowedFd, OwnedFd, RawFd};
use std::rc::Rc;
use std::time::Duration;

use super::player::{Owned, Player, Result};
use crate::addr::{Addr, Credentials};
use crate::config::SocketOptions;
use crate::detached::{self, SystemCalls};
use crate::handle::Wake;
use crate::handler::Interest;
use crate::proto::Time;
use crate::reactor::os::{Connected, End, Event, Noted, Os, Socket, StreamOps, Token};
use crate::reason::CloseReason;
use crate::record::format::Call;
use crate::record::values::Values;

pub(super) struct ReplayOs(pub(super) Rc<RefCell<Player>>);

/// A connection by its number in the file.
pub(super) struct ReplayStream {
    number: u32,
}

/// A listener by its number in the file.
pub(super) struct ReplayListener(u32);

/// Nothing has to be woken: an iteration begins when the file says so.
struct NoWake;

impl Wake for NoWake {
    fn wake(&self) -> io::Result<()> {
        Ok(())
    }
}

/// The result of a call after the end of the replay: nothing happens any more.
fn over<T>() -> io::Result<T> {
    Err(io::ErrorKind::WouldBlock.into())
}

/// A value that the file should have here.
fn missing() -> io::Error {
    io::ErrorKind::InvalidData.into()
}

fn number(bytes: &[u8]) -> io::Result<(u32, Values<'_>)> {
    let mut values = Values(bytes);
    let number = values.number().ok_or_else(missing)?;
    Ok((number, values))
}

/// [`ReplayOs`] answers.
impl Socket for ReplayStream {
    fn local_addr(&self) -> io::Result<Addr> {
        Err(missing())
    }

    fn credentials(&self) -> io::Result<Credentials> {
        Err(missing())
    }

    fn fd(&self) -> io::Result<BorrowedFd<'_>> {
        Err(missing())
    }
}

impl ReplayOs {
    fn player(&self) -> RefMut<'_, Player> {
        self.0.borrow_mut()
    }

    fn call(&self, call: Call, target: u32) -> io::Result<Owned> {
        self.player().call(call, target).unwrap_or_else(over)
    }

    /// A registration, which has to be under the recorded token.
    fn register(&self, call: Call, target: u32, token: Token) -> io::Result<()> {
        let answer: Result<Owned> = self.player().call_with(
            call,
            target,
            |answer| answer.long() == token.0 as u64,
            || format!("{} as {:#x}, connection {target}", call.words(), token.0),
        );
        answer.unwrap_or_else(over).map(drop)
    }
}

impl StreamOps for ReplayOs {
    type Stream = ReplayStream;

    fn large_frame(&self) -> usize {
        self.player().large_frame()
    }

    fn now(&self) -> Time {
        self.player().now()
    }

    fn read(&mut self, stream: &mut ReplayStream, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.player().read(stream.number, buffer);
        read.unwrap_or_else(over)
    }

    fn write(&mut self, stream: &mut ReplayStream, bytes: &[u8]) -> io::Result<usize> {
        let written = self.player().write(stream.number, &[bytes]);
        written.unwrap_or_else(over)
    }

    fn write_pieces(
        &mut self,
        stream: &mut ReplayStream,
        pieces: &[IoSlice<'_>],
    ) -> io::Result<usize> {
        let pieces: Vec<&[u8]> = pieces.iter().map(|piece| &**piece).collect();
        let written = self.player().write(stream.number, &pieces);
        written.unwrap_or_else(over)
    }

    fn unsent(&mut self, stream: &mut ReplayStream) -> Option<usize> {
        let answer = self.call(Call::Unsent, stream.number).ok()?;
        (answer.small > 0).then_some(answer.long as usize)
    }

    fn has_taken(&mut self, stream: &mut ReplayStream, _: u64) -> Option<bool> {
        match self.call(Call::HasTaken, stream.number).ok()?.small {
            0 => Some(false),
            1 => Some(true),
            _ => None,
        }
    }

    fn reregister_stream(&mut self, stream: &mut ReplayStream, token: Token) -> io::Result<()> {
        self.register(Call::ReregisterStream, stream.number, token)
    }

    fn shutdown(&mut self, stream: &mut ReplayStream) -> io::Result<()> {
        self.call(Call::Shutdown, stream.number).map(drop)
    }
}

impl Os for ReplayOs {
    type Listener = ReplayListener;

    fn descriptor_limit(&self) -> Option<usize> {
        self.player().descriptor_limit()
    }

    fn poll(&mut self, events: &mut Vec<Event>, _: Option<Duration>) -> io::Result<bool> {
        let polled = self.player().poll(events);
        polled.unwrap_or_else(over)
    }

    fn waker(&self) -> Box<dyn Wake> {
        Box::new(NoWake)
    }

    fn listen(
        &mut self,
        _: &Addr,
        _: Option<&str>,
        _: &SocketOptions,
    ) -> io::Result<ReplayListener> {
        let number = self.call(Call::Listen, 0)?.small;
        Ok(ReplayListener(number as u32))
    }

    fn adopt_listener(&mut self, _: OwnedFd) -> io::Result<ReplayListener> {
        let number = self.call(Call::AdoptListener, 0)?.small;
        Ok(ReplayListener(number as u32))
    }

    fn share_listener(&mut self, listener: &mut ReplayListener) -> io::Result<OwnedFd> {
        self.call(Call::ShareListener, listener.0)?;
        Err(io::ErrorKind::Unsupported.into())
    }

    fn listener_addr(&self, listener: &ReplayListener) -> io::Result<Addr> {
        let bytes = self.call(Call::ListenerAddr, listener.0)?.bytes;
        Values(&bytes).addr().ok_or_else(missing)
    }

    fn register_listener(&mut self, listener: &mut ReplayListener, _: Token) -> io::Result<()> {
        self.call(Call::RegisterListener, listener.0).map(drop)
    }

    fn deregister_listener(&mut self, listener: &mut ReplayListener) -> io::Result<()> {
        self.call(Call::DeregisterListener, listener.0).map(drop)
    }

    fn close_listener(&mut self, listener: ReplayListener) {
        let _ = self.call(Call::CloseListener, listener.0);
    }

    fn accept(&mut self, listener: &mut ReplayListener) -> io::Result<(ReplayStream, Addr)> {
        let bytes = self.call(Call::Accept, listener.0)?.bytes;
        let (number, mut values) = number(&bytes)?;
        let addr = values.addr().ok_or_else(missing)?;
        Ok((ReplayStream { number }, addr))
    }

    fn has_client(&mut self, listener: &mut ReplayListener) -> bool {
        let answer = self.call(Call::HasClient, listener.0);
        answer.is_ok_and(|answer| answer.small > 0)
    }

    fn connect(
        &mut self,
        addr: &Addr,
        _: Option<SocketAddr>,
        _: &SocketOptions,
    ) -> io::Result<(ReplayStream, bool)> {
        let bytes = self.call(Call::Connect, 0)?.bytes;
        let (number, mut values) = number(&bytes)?;
        let connected = values.byte().ok_or_else(missing)? > 0;
        // Another address is no divergence: a test's peers may live elsewhere.
        let _ = addr;
        Ok((ReplayStream { number }, connected))
    }

    fn adopt_stream(&mut self, _: OwnedFd, _: &SocketOptions) -> io::Result<(ReplayStream, Addr)> {
        let bytes = self.call(Call::AdoptStream, 0)?.bytes;
        let (number, mut values) = number(&bytes)?;
        let addr = values.addr().ok_or_else(missing)?;
        Ok((ReplayStream { number }, addr))
    }

    fn connected(&mut self, stream: &mut ReplayStream) -> io::Result<Connected> {
        Ok(match self.call(Call::Connected, stream.number)?.small {
            0 => Connected::NotYet,
            1 => Connected::Yes,
            _ => Connected::Reset,
        })
    }

    fn random(&mut self) -> u64 {
        self.call(Call::Random, 0).map_or(0, |answer| answer.long)
    }

    fn register_stream(
        &mut self,
        stream: &mut ReplayStream,
        _: Interest,
        token: Token,
    ) -> io::Result<()> {
        self.register(Call::RegisterStream, stream.number, token)
    }

    fn watch(&mut self, _: BorrowedFd<'_>, _: Interest, token: Token) -> io::Result<()> {
        self.register(Call::Watch, 0, token)
    }

    fn unwatch(&mut self, _: RawFd) {
        let _ = self.call(Call::Unwatch, 0);
    }

    fn peek(&mut self, stream: &mut ReplayStream) -> io::Result<usize> {
        let count = self.call(Call::Peek, stream.number)?.small;
        Ok(count as usize)
    }

    fn release(&mut self, stream: ReplayStream) -> io::Result<(OwnedFd, SystemCalls)> {
        self.player().detach(stream.number);
        Err(io::ErrorKind::Unsupported.into())
    }

    fn cut_off(&self, _: &detached::Socket) {}

    fn local_addr(&self, stream: &ReplayStream) -> io::Result<Addr> {
        let bytes = self.call(Call::LocalAddr, stream.number)?.bytes;
        Values(&bytes).addr().ok_or_else(missing)
    }

    fn credentials(&self, stream: &ReplayStream) -> io::Result<Credentials> {
        let bytes = self.call(Call::Credentials, stream.number)?.bytes;
        Values(&bytes).credentials().ok_or_else(missing)
    }

    /// There is none, even if there was one.
    fn fd<'a>(&self, stream: &'a ReplayStream) -> io::Result<BorrowedFd<'a>> {
        self.call(Call::Descriptor, stream.number)?;
        Err(io::ErrorKind::Unsupported.into())
    }

    fn close(&mut self, stream: ReplayStream, end: End) {
        let _ = self.player().call_with(
            Call::Close,
            stream.number,
            |answer| answer.small() == end as u64,
            || format!("close as {end:?}, connection {}", stream.number),
        );
    }

    fn note_end(&mut self, reason: CloseReason) {
        self.player().reason(reason as u64, reason.name());
    }

    fn queued(&mut self, _: Option<u64>) -> Option<u64> {
        self.player().queued()
    }

    fn carried_out(&mut self, done: u64) -> u64 {
        let recorded = self.call(Call::CarriedOut, 0);
        recorded.map_or(done, |answer| answer.long)
    }

    fn note_command(&mut self, _: Noted<'_>) {
        self.player().pass_command();
    }
}
