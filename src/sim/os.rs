//! [`Os`] on the simulated kernel.

use std::cell::RefCell;
use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::os::fd::{BorrowedFd, OwnedFd, RawFd};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::time::Duration;

use super::faults::Call;
use super::kernel::Kernel;
use crate::addr::{Addr, Credentials, UnixAddr};
use crate::config::SocketOptions;
use crate::detached::SystemCalls;
use crate::handle::Wake;
use crate::handler::Interest;
use crate::proto::Time;
use crate::reactor::os::{Connected, End, Event, Os, Socket, StreamOps, Token};
use crate::reactor::os_mio::BLOCKING_CALLS;

/// The simulated kernel as the reactor sees it; the [`Sim`](super::Sim) has the other end.
pub(super) struct SimOs(pub(super) Rc<RefCell<Kernel>>);

/// A listening socket's number. Closes on drop, as the real one does.
pub(super) struct ListenerFd {
    pub(super) index: usize,
    kernel: Rc<RefCell<Kernel>>,
}

impl Drop for ListenerFd {
    fn drop(&mut self) {
        self.kernel.borrow_mut().close_listener(self.index);
    }
}

/// A connected socket's number, and its local address. Closes on drop, as the real one does.
pub(super) struct StreamFd {
    pub(super) index: usize,
    local: Addr,
    kernel: Rc<RefCell<Kernel>>,
}

impl Drop for StreamFd {
    fn drop(&mut self) {
        self.kernel.borrow_mut().close(self.index, false);
    }
}

impl Socket for StreamFd {
    fn local_addr(&self) -> io::Result<Addr> {
        Ok(self.local.clone())
    }

    fn credentials(&self) -> io::Result<Credentials> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn fd(&self) -> io::Result<BorrowedFd<'_>> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

impl SimOs {
    fn stream(&self, index: usize, local: Addr) -> StreamFd {
        let kernel = Rc::clone(&self.0);
        StreamFd {
            index,
            local,
            kernel,
        }
    }
}

/// Ends the sleep of the next poll, from any thread.
struct SimWake {
    woken: Arc<AtomicBool>,
    #[cfg(all(test, loom))]
    bell: Arc<crate::sync::models::Bell>,
}

impl Wake for SimWake {
    fn wake(&self) -> io::Result<()> {
        self.woken.store(true, Ordering::SeqCst);
        #[cfg(all(test, loom))]
        self.bell.ring();
        Ok(())
    }
}

impl StreamOps for SimOs {
    type Stream = StreamFd;

    fn large_frame(&self) -> usize {
        self.0.borrow().large_frame
    }

    fn now(&self) -> Time {
        self.0.borrow_mut().clock()
    }

    fn read(&mut self, stream: &mut StreamFd, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.borrow_mut().read(stream.index, buffer)
    }

    fn write(&mut self, stream: &mut StreamFd, bytes: &[u8]) -> io::Result<usize> {
        self.write_pieces(stream, &[IoSlice::new(bytes)])
    }

    fn write_pieces(&mut self, stream: &mut StreamFd, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        self.0.borrow_mut().write(stream.index, pieces)
    }

    fn unsent(&mut self, stream: &mut StreamFd) -> Option<usize> {
        self.0.borrow().unsent(stream.index)
    }

    fn has_taken(&mut self, stream: &mut StreamFd, _: u64) -> Option<bool> {
        self.0.borrow().has_taken(stream.index)
    }

    fn reregister_stream(&mut self, stream: &mut StreamFd, token: Token) -> io::Result<()> {
        self.0.borrow_mut().reregister(stream.index, token)
    }

    fn shutdown(&mut self, stream: &mut StreamFd) -> io::Result<()> {
        self.0.borrow_mut().shutdown(stream.index)
    }
}

impl Os for SimOs {
    type Listener = ListenerFd;

    fn descriptor_limit(&self) -> Option<usize> {
        Some(self.0.borrow().fd_limit).filter(|&limit| limit < usize::MAX)
    }

    fn poll(&mut self, events: &mut Vec<Event>, timeout: Option<Duration>) -> io::Result<bool> {
        self.0.borrow_mut().poll(events, timeout)
    }

    fn waker(&self) -> Box<dyn Wake> {
        let kernel = self.0.borrow();
        Box::new(SimWake {
            woken: Arc::clone(&kernel.woken),
            #[cfg(all(test, loom))]
            bell: Arc::clone(&kernel.bell),
        })
    }

    fn listen(
        &mut self,
        addr: &Addr,
        _name: Option<&str>,
        options: &SocketOptions,
    ) -> io::Result<ListenerFd> {
        let addr = addr.as_tcp().ok_or(io::ErrorKind::Unsupported)?;
        let index = self.0.borrow_mut().listen(addr, options.backlog as usize)?;
        let kernel = Rc::clone(&self.0);
        Ok(ListenerFd { index, kernel })
    }

    fn adopt_listener(&mut self, _socket: OwnedFd) -> io::Result<ListenerFd> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn watch(
        &mut self,
        descriptor: BorrowedFd<'_>,
        interest: Interest,
        token: Token,
    ) -> io::Result<()> {
        let mut kernel = self.0.borrow_mut();
        if let Some(errno) = kernel.strike(Call::Register, None) {
            return Err(io::Error::from_raw_os_error(errno));
        }
        kernel.descriptors.watch(descriptor, interest, token)
    }

    fn unwatch(&mut self, descriptor: RawFd) {
        self.0.borrow_mut().descriptors.unwatch(descriptor);
    }

    fn adopt_stream(
        &mut self,
        socket: OwnedFd,
        options: &SocketOptions,
    ) -> io::Result<(StreamFd, Addr)> {
        let mut kernel = self.0.borrow_mut();
        let index = kernel.adopt(socket, options)?;
        let socket = kernel.sockets.get(index).ok_or(io::ErrorKind::NotFound)?;
        let peer = socket.to.clone().unwrap_or(socket.peer.into());
        let local = match peer.as_unix() {
            Some(_) => UnixAddr::unnamed().into(),
            None => socket.local.into(),
        };
        Ok((self.stream(index, local), peer))
    }

    fn share_listener(&mut self, _listener: &mut ListenerFd) -> io::Result<OwnedFd> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn listener_addr(&self, listener: &ListenerFd) -> io::Result<Addr> {
        let kernel = self.0.borrow();
        let found = kernel.listeners.get(listener.index);
        Ok(found.ok_or(io::ErrorKind::NotFound)?.addr.into())
    }

    fn register_listener(&mut self, listener: &mut ListenerFd, token: Token) -> io::Result<()> {
        self.0.borrow_mut().register_listener(listener.index, token)
    }

    fn deregister_listener(&mut self, listener: &mut ListenerFd) -> io::Result<()> {
        self.0.borrow_mut().deregister_listener(listener.index)
    }

    fn close_listener(&mut self, listener: ListenerFd) {
        drop(listener);
    }

    fn accept(&mut self, listener: &mut ListenerFd) -> io::Result<(StreamFd, Addr)> {
        let mut kernel = self.0.borrow_mut();
        let (index, peer) = kernel.accept(listener.index)?;
        let local = kernel
            .sockets
            .get(index)
            .map_or(peer, |socket| socket.local);
        Ok((self.stream(index, local.into()), peer.into()))
    }

    fn has_client(&mut self, listener: &mut ListenerFd) -> bool {
        let kernel = self.0.borrow();
        let listening = kernel.listeners.get(listener.index);
        listening.is_some_and(|listening| !listening.queue.is_empty())
    }

    fn connect(
        &mut self,
        addr: &Addr,
        bind: Option<SocketAddr>,
        _options: &SocketOptions,
    ) -> io::Result<(StreamFd, bool)> {
        let (index, local, connected) = self.0.borrow_mut().dial(addr, bind)?;
        Ok((self.stream(index, local.into()), connected))
    }

    fn connected(&mut self, stream: &mut StreamFd) -> io::Result<Connected> {
        self.0.borrow_mut().connected(stream.index)
    }

    fn random(&mut self) -> u64 {
        self.0.borrow_mut().random.bits()
    }

    fn register_stream(
        &mut self,
        stream: &mut StreamFd,
        interest: Interest,
        token: Token,
    ) -> io::Result<()> {
        self.0.borrow_mut().register(stream.index, interest, token)
    }

    fn peek(&mut self, stream: &mut StreamFd) -> io::Result<usize> {
        self.0.borrow_mut().peek(stream.index)
    }

    fn release(&mut self, stream: StreamFd) -> io::Result<(OwnedFd, SystemCalls)> {
        let socket = self.0.borrow_mut().release(stream.index)?;
        Ok((socket, BLOCKING_CALLS))
    }

    fn close(&mut self, stream: StreamFd, end: End) {
        self.0.borrow_mut().close(stream.index, end == End::Reset);
    }
}
