//! The clients: connections that keep a number of messages in flight, and check what comes back.

use std::io::{ErrorKind, Read, Write};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use mio::net::TcpStream;
use mio::{Events, Interest, Poll, Token};

/// The longest that an answer may take.
const PATIENCE: Duration = Duration::from_secs(10);
const SCRATCH: usize = 64 * 1024;
/// Connections that are opened together: a server's backlog has room for them.
const TOGETHER: usize = 100;

/// What is asked of a server. A message is two bytes of length and the payload.
#[derive(Clone, Copy)]
pub struct Work {
    connections: usize,
    window: usize,
    payload: usize,
}

impl Work {
    pub const fn new(connections: usize, window: usize, payload: usize) -> Self {
        Self {
            connections,
            window,
            payload,
        }
    }
}

/// A client's end of a connection, nonblocking. `flush` sends what `write` took. A read that does
/// not fill its buffer has emptied the socket.
pub trait Stream: Read + Write {
    fn socket(&mut self) -> &mut TcpStream;
}

impl Stream for TcpStream {
    fn socket(&mut self) -> &mut TcpStream {
        self
    }
}

struct Client {
    stream: Box<dyn Stream>,
    /// Bytes to send, and how far into a message what was sent ends.
    owed: usize,
    sent: usize,
    /// How far into a message what has come ends.
    received: usize,
    in_flight: usize,
    asked: Instant,
}

/// All of a server's clients.
pub struct Load {
    poll: Poll,
    events: Events,
    clients: Vec<Client>,
    /// The message over and over.
    pattern: Vec<u8>,
    message: usize,
    window: usize,
    scratch: Vec<u8>,
    latencies: Vec<Duration>,
}

impl Load {
    /// Connects, and hears one echo on each connection.
    pub fn connect(addr: SocketAddr, work: Work) -> Self {
        Self::over(work, || {
            let stream = std::net::TcpStream::connect(addr).expect("it listens");
            stream.set_nodelay(true).expect("a socket");
            stream.set_nonblocking(true).expect("a socket");
            Box::new(TcpStream::from_std(stream))
        })
    }

    /// As [`Load::connect`], over connections that `connect` makes.
    pub fn over(work: Work, connect: impl Fn() -> Box<dyn Stream>) -> Self {
        let poll = Poll::new().expect("a poll");
        let payload = (0..work.payload).map(|at| at as u8);
        let message: Vec<u8> = (work.payload as u16)
            .to_be_bytes()
            .into_iter()
            .chain(payload)
            .collect();
        let mut load = Self {
            poll,
            events: Events::with_capacity(1024),
            clients: Vec::with_capacity(work.connections),
            pattern: message.repeat(SCRATCH / message.len() + 2),
            message: message.len(),
            window: work.window,
            scratch: vec![0; SCRATCH],
            latencies: Vec::new(),
        };
        let mut open = 0;
        while open < work.connections {
            let more = TOGETHER.min(work.connections - open);
            for at in open..open + more {
                load.add(connect());
                load.ask(at, 1);
            }
            while load.clients[open..]
                .iter()
                .any(|client| client.in_flight > 0)
            {
                load.turn(Instant::now());
            }
            open += more;
        }
        load
    }

    fn add(&mut self, mut stream: Box<dyn Stream>) {
        let both = Interest::READABLE | Interest::WRITABLE;
        self.poll
            .registry()
            .register(stream.socket(), Token(self.clients.len()), both)
            .expect("a poll");
        self.clients.push(Client {
            stream,
            owed: 0,
            sent: 0,
            received: 0,
            in_flight: 0,
            asked: Instant::now(),
        });
    }

    /// Keeps the windows full for so long, then waits until everything has come back. How many
    /// messages did.
    pub fn run(&mut self, span: Duration) -> u64 {
        let end = Instant::now() + span;
        let mut done = 0;
        self.latencies.clear();
        for at in 0..self.clients.len() {
            self.ask(at, self.window);
        }
        while self.clients.iter().any(|client| client.in_flight > 0) {
            done += self.turn(end);
        }
        done
    }

    /// Waits for answers, and sends as many messages again until `end`. Returns the number of
    /// answers.
    fn turn(&mut self, end: Instant) -> u64 {
        let mut done = 0;
        let mut events = std::mem::replace(&mut self.events, Events::with_capacity(0));
        self.poll.poll(&mut events, Some(PATIENCE)).expect("a poll");
        assert!(!events.is_empty(), "the server does not answer");
        let open = Instant::now() < end;
        for event in &events {
            let at = event.token().0;
            let came = self.hear(at);
            done += came as u64;
            self.ask(at, if open { came } else { 0 });
        }
        self.events = events;
        done
    }

    /// Of the last run, with one message in flight on each connection: how long an answer took, the
    /// median and the 99th percentile.
    pub fn latencies(&mut self) -> (Duration, Duration) {
        self.latencies.sort_unstable();
        let at = |per_cent: usize| self.latencies.get(self.latencies.len() * per_cent / 100);
        (
            at(50).copied().unwrap_or_default(),
            at(99).copied().unwrap_or_default(),
        )
    }

    /// Sends so many messages more, as far as the kernel takes them.
    fn ask(&mut self, at: usize, messages: usize) {
        let client = &mut self.clients[at];
        if messages > 0 {
            client.asked = Instant::now();
        }
        client.in_flight += messages;
        client.owed += messages * self.message;
        while client.owed > 0 {
            let until = (client.sent + client.owed).min(self.pattern.len());
            match client.stream.write(&self.pattern[client.sent..until]) {
                Ok(count) => {
                    client.owed -= count;
                    client.sent = (client.sent + count) % self.message;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => panic!("a server let a client go: {error}"),
            }
        }
        match client.stream.flush() {
            Err(error) if error.kind() != ErrorKind::WouldBlock => {
                panic!("a server let a client go: {error}")
            }
            _ => {}
        }
    }

    /// Reads what has come; how many messages are whole by it.
    fn hear(&mut self, at: usize) -> usize {
        let client = &mut self.clients[at];
        let mut whole = 0;
        loop {
            match client.stream.read(&mut self.scratch) {
                Ok(0) => panic!("a server let a client go"),
                Ok(count) => {
                    let expected = &self.pattern[client.received..client.received + count];
                    assert!(
                        self.scratch[..count] == *expected,
                        "what comes back is what was sent"
                    );
                    let end = client.received + count;
                    whole += end / self.message;
                    client.received = end % self.message;
                    if count < SCRATCH {
                        break;
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => panic!("a server let a client go: {error}"),
            }
        }
        client.in_flight -= whole;
        if whole > 0 && self.window == 1 {
            self.latencies.push(client.asked.elapsed());
        }
        whole
    }
}
