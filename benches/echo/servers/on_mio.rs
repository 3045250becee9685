//! A loop on mio, for this one job: plain, and with rustls.

use std::io::{ErrorKind, Read, Write};
use std::net::SocketAddr;
use std::sync::Arc;

use mio::event::Event;
use mio::net::{TcpListener, TcpStream};
use mio::{Events, Interest, Poll, Token};
use portcullis::tls::rustls::ServerConnection;

use super::{print_addr, whole};
use crate::common::site::Site;

const LISTENER: Token = Token(usize::MAX);
const SCRATCH: usize = 64 * 1024;

/// Reads, answers and writes: false when the connection is over.
pub trait Drive {
    fn drive(&mut self, stream: &mut TcpStream, event: &Event, scratch: &mut [u8]) -> bool;
}

/// Echoes on connections whose state `connect` makes. Calls `turned` after each iteration.
pub fn run<C: Drive>(site: Option<&Site>, connect: impl Fn() -> C, mut turned: impl FnMut()) {
    let mut poll = Poll::new().expect("a poll");
    let mut events = Events::with_capacity(1024);
    let mut listener = TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0))).expect("a port");
    print_addr(listener.local_addr().expect("bound"), site);
    poll.registry()
        .register(&mut listener, LISTENER, Interest::READABLE)
        .expect("a poll");
    let mut connections: slab::Slab<(TcpStream, C)> = slab::Slab::new();
    let mut scratch = vec![0; SCRATCH];
    loop {
        match poll.poll(&mut events, None) {
            // As when the process was stopped.
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            polled => polled.expect("a poll"),
        }
        for event in &events {
            if event.token() == LISTENER {
                while let Ok((mut stream, _)) = listener.accept() {
                    let _ = stream.set_nodelay(true);
                    let both = Interest::READABLE | Interest::WRITABLE;
                    let entry = connections.vacant_entry();
                    poll.registry()
                        .register(&mut stream, Token(entry.key()), both)
                        .expect("a poll");
                    entry.insert((stream, connect()));
                }
                continue;
            }
            let Some((stream, state)) = connections.get_mut(event.token().0) else {
                continue;
            };
            if !state.drive(stream, event, &mut scratch) {
                connections.remove(event.token().0);
            }
        }
        turned();
    }
}

pub fn plain() {
    run(None, Plain::default, || {});
}

/// Start of an incomplete frame, and output that the kernel has not taken yet.
#[derive(Default)]
pub struct Plain {
    partial: Vec<u8>,
    unsent: Vec<u8>,
}

impl Drive for Plain {
    fn drive(&mut self, stream: &mut TcpStream, event: &Event, scratch: &mut [u8]) -> bool {
        let Self { partial, unsent } = self;
        if !unsent.is_empty() && event.is_writable() {
            let count = stream.write(unsent).unwrap_or(0);
            unsent.drain(..count);
        }
        while event.is_readable() {
            let count = match stream.read(scratch) {
                Ok(0) => return false,
                Ok(count) => count,
                Err(error) => return error.kind() == ErrorKind::WouldBlock,
            };
            let mut bytes = &scratch[..count];
            if !partial.is_empty() {
                partial.extend_from_slice(bytes);
                bytes = partial;
            }
            let (frames, rest) = bytes.split_at(whole(bytes));
            if unsent.is_empty() {
                let taken = if frames.is_empty() {
                    0
                } else {
                    stream.write(frames).unwrap_or(0)
                };
                unsent.extend_from_slice(&frames[taken..]);
            } else {
                unsent.extend_from_slice(frames);
            }
            *partial = rest.to_vec();
            if count < scratch.len() {
                break;
            }
        }
        true
    }
}

pub fn tls(site: Site) {
    let connect = || Tls {
        tls: ServerConnection::new(Arc::clone(&site.server)).expect("a session"),
        partial: Vec::new(),
    };
    run(Some(&site), connect, || {});
}

/// The session, which buffers output, and the start of an incomplete frame.
struct Tls {
    tls: ServerConnection,
    partial: Vec<u8>,
}

impl Tls {
    /// False when the connection is over.
    fn flush(&mut self, stream: &mut TcpStream) -> bool {
        while self.tls.wants_write() {
            if let Err(error) = self.tls.write_tls(stream) {
                return error.kind() == ErrorKind::WouldBlock;
            }
        }
        true
    }

    /// Answers the frames among the decrypted bytes. False when the connection is over.
    fn answer(&mut self, clear: &mut [u8]) -> bool {
        loop {
            let count = match self.tls.reader().read(clear) {
                Ok(0) => return false,
                Ok(count) => count,
                Err(error) => return error.kind() == ErrorKind::WouldBlock,
            };
            let mut bytes = &clear[..count];
            if !self.partial.is_empty() {
                self.partial.extend_from_slice(bytes);
                bytes = &self.partial;
            }
            let (frames, rest) = bytes.split_at(whole(bytes));
            if self.tls.writer().write_all(frames).is_err() {
                return false;
            }
            self.partial = rest.to_vec();
        }
    }
}

impl Drive for Tls {
    fn drive(&mut self, stream: &mut TcpStream, event: &Event, scratch: &mut [u8]) -> bool {
        if event.is_writable() && !self.flush(stream) {
            return false;
        }
        let (input, clear) = scratch.split_at_mut(SCRATCH / 2);
        while event.is_readable() {
            let count = match stream.read(input) {
                Ok(0) => return false,
                Ok(count) => count,
                Err(error) => return error.kind() == ErrorKind::WouldBlock,
            };
            let mut bytes = &input[..count];
            while !bytes.is_empty() {
                if self.tls.read_tls(&mut bytes).is_err()
                    || self.tls.process_new_packets().is_err()
                    || !self.answer(clear)
                {
                    return false;
                }
            }
            if !self.flush(stream) {
                return false;
            }
            if count < input.len() {
                break;
            }
        }
        true
    }
}
