//! Connections that live for one message.

use std::io::{ErrorKind, Read, Write};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use mio::net::TcpStream;
use mio::{Events, Interest, Poll, Token};

const TOGETHER: usize = 64;
const PATIENCE: Duration = Duration::from_secs(10);
const MESSAGE: &[u8] = b"\0\x05hello";

struct Client {
    stream: TcpStream,
    has_asked: bool,
    heard: usize,
}

/// Keeps 64 connections on their way: connect, one echo, close. Returns their number.
pub fn run(addr: SocketAddr, span: Duration) -> u64 {
    let mut poll = Poll::new().expect("a poll");
    let mut events = Events::with_capacity(TOGETHER);
    let end = Instant::now() + span;
    let connect = |poll: &Poll, at| {
        let mut stream = TcpStream::connect(addr).expect("a socket");
        let both = Interest::READABLE | Interest::WRITABLE;
        let registry = poll.registry();
        registry
            .register(&mut stream, Token(at), both)
            .expect("a poll");
        Client {
            stream,
            has_asked: false,
            heard: 0,
        }
    };
    let mut clients: Vec<Option<Client>> =
        (0..TOGETHER).map(|at| Some(connect(&poll, at))).collect();
    let (mut open, mut done) = (TOGETHER, 0);
    while open > 0 {
        poll.poll(&mut events, Some(PATIENCE)).expect("a poll");
        assert!(!events.is_empty(), "the server does not answer");
        for event in &events {
            let at = event.token().0;
            let Some(client) = &mut clients[at] else {
                continue;
            };
            if !client.is_served() {
                continue;
            }
            done += 1;
            let is_over = Instant::now() >= end;
            open -= usize::from(is_over);
            clients[at] = None;
            if !is_over {
                clients[at] = Some(connect(&poll, at));
            }
        }
    }
    done
}

impl Client {
    /// Asks once it is connected, and reads. Returns whether the echo is complete.
    fn is_served(&mut self) -> bool {
        if !self.has_asked {
            match self.stream.write(MESSAGE) {
                Ok(count) => assert_eq!(count, MESSAGE.len(), "an empty socket has room"),
                Err(error) if is_early(error.kind()) => return false,
                Err(error) => panic!("a client could not ask: {error}"),
            }
            self.has_asked = true;
        }
        let mut echo = [0; MESSAGE.len()];
        match self.stream.read(&mut echo[self.heard..]) {
            Ok(count) => {
                assert!(count > 0, "the server let a client go");
                assert_eq!(echo[self.heard..][..count], MESSAGE[self.heard..][..count]);
                self.heard += count;
            }
            Err(error) if is_early(error.kind()) => {}
            Err(error) => panic!("a client got no echo: {error}"),
        }
        self.heard == MESSAGE.len()
    }
}

fn is_early(kind: ErrorKind) -> bool {
    matches!(kind, ErrorKind::WouldBlock | ErrorKind::NotConnected)
}
