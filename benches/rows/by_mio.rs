//! Servers on mio, each for its one job.

use std::io::{ErrorKind, Read, Write};
use std::net::SocketAddr;

use mio::event::Event;
use mio::net::{TcpListener, TcpStream};
use mio::{Events, Interest, Poll, Token};
use slab::Slab;

use crate::common::fan_out::SUBSCRIBE;
use crate::servers::on_mio::{run, Drive, Plain};
use crate::servers::print_addr;
use crate::turns::{processor_time, Turns};

const LISTENER: Token = Token(usize::MAX);

/// Echoes packet-2, and notes the processor time of each iteration.
pub fn iteration(turns: &Turns) {
    let mut last = processor_time();
    run(None, Plain::default, || {
        let now = processor_time();
        turns.note(now - last);
        last = now;
    });
}

/// Output that the kernel has not taken yet.
#[derive(Default)]
struct Raw(Vec<u8>);

impl Drive for Raw {
    fn drive(&mut self, stream: &mut TcpStream, _: &Event, scratch: &mut [u8]) -> bool {
        loop {
            if !self.0.is_empty() {
                let count = stream.write(&self.0).unwrap_or(0);
                self.0.drain(..count);
                if !self.0.is_empty() {
                    return true;
                }
            }
            let count = match stream.read(scratch) {
                Ok(0) => return false,
                Ok(count) => count,
                Err(error) => return error.kind() == ErrorKind::WouldBlock,
            };
            let taken = stream.write(&scratch[..count]).unwrap_or(0);
            self.0.extend_from_slice(&scratch[taken..count]);
            if count < scratch.len() && self.0.is_empty() {
                return true;
            }
        }
    }
}

pub fn raw() {
    run(None, Raw::default, || {});
}

struct Client {
    stream: TcpStream,
    /// Start of an incomplete packet.
    input: Vec<u8>,
    unsent: Vec<u8>,
}

impl Client {
    fn send(&mut self, bytes: &[u8]) {
        let taken = match self.unsent.is_empty() && !bytes.is_empty() {
            true => self.stream.write(bytes).unwrap_or(0),
            false => 0,
        };
        self.unsent.extend_from_slice(&bytes[taken..]);
    }
}

/// Writes the packets of a publisher to all subscribers.
pub fn fan_out() {
    let mut poll = Poll::new().expect("a poll");
    let mut events = Events::with_capacity(1024);
    let mut listener = TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0))).expect("a port");
    print_addr(listener.local_addr().expect("bound"), None);
    let registry = poll.registry();
    registry
        .register(&mut listener, LISTENER, Interest::READABLE)
        .expect("a poll");
    let mut clients: Slab<Client> = Slab::new();
    let mut subscribers = Vec::new();
    let mut scratch = vec![0; 256 * 1024];
    loop {
        poll.poll(&mut events, None).expect("a poll");
        for event in &events {
            if event.token() == LISTENER {
                while let Ok((mut stream, _)) = listener.accept() {
                    let _ = stream.set_nodelay(true);
                    let both = Interest::READABLE | Interest::WRITABLE;
                    let entry = clients.vacant_entry();
                    let registry = poll.registry();
                    registry
                        .register(&mut stream, Token(entry.key()), both)
                        .expect("a poll");
                    entry.insert(Client {
                        stream,
                        input: Vec::new(),
                        unsent: Vec::new(),
                    });
                }
                continue;
            }
            let at = event.token().0;
            let Some(client) = clients.get_mut(at) else {
                continue;
            };
            if !client.unsent.is_empty() && event.is_writable() {
                let count = client.stream.write(&client.unsent).unwrap_or(0);
                client.unsent.drain(..count);
            }
            while event.is_readable() {
                match clients[at].stream.read(&mut scratch) {
                    Ok(count) if count > 0 => {
                        clients[at].input.extend_from_slice(&scratch[..count]);
                        answer(&mut clients, &mut subscribers, at);
                        if count < scratch.len() {
                            break;
                        }
                    }
                    Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                    _ => {
                        clients.remove(at);
                        subscribers.retain(|&subscriber| subscriber != at);
                        break;
                    }
                }
            }
        }
    }
}

/// All packets of a read go to a subscriber in one write.
fn answer(clients: &mut Slab<Client>, subscribers: &mut Vec<usize>, at: usize) {
    let mut input = std::mem::take(&mut clients[at].input);
    let mut done = 0;
    while let Some(header) = input[done..].first_chunk::<4>() {
        let end = done + 4 + u32::from_be_bytes(*header) as usize;
        match input.get(done + 4..end) {
            Some(SUBSCRIBE) => {
                // A client that subscribes sends nothing else.
                clients[at].send(&input[done..end]);
                subscribers.push(at);
                return;
            }
            Some(_) => done = end,
            None => break,
        }
    }
    for &subscriber in &*subscribers {
        clients[subscriber].send(&input[..done]);
    }
    input.drain(..done);
    clients[at].input = input;
}
