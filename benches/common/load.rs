//! The clients: connections that keep a number of messages in flight, and check what comes back.

use std::io::{Error, ErrorKind, Read, Write};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use mio::net::TcpStream;
use mio::{Events, Interest, Poll, Token};

/// The longest that an answer may take.
const PATIENCE: Duration = Duration::from_secs(10);
const SCRATCH: usize = 64 * 1024;
/// Connections that are opened together: a server's backlog has room for them.
const TOGETHER: usize = 100;

/// What is asked of a server. A message is a header with the length, and the payload.
#[derive(Clone, Copy)]
pub struct Work {
    connections: usize,
    window: usize,
    payload: usize,
    header: usize,
}

impl Work {
    pub const fn new(connections: usize, window: usize, payload: usize) -> Self {
        Self {
            connections,
            window,
            payload,
            header: 2,
        }
    }

    /// With four bytes of length instead of two.
    pub const fn packet_4(self) -> Self {
        Self { header: 4, ..self }
    }

    fn message(&self) -> Vec<u8> {
        let length = (self.payload as u32).to_be_bytes();
        let payload = (0..self.payload).map(|at| at as u8);
        length[4 - self.header..]
            .iter()
            .copied()
            .chain(payload)
            .collect()
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
    /// None once the server has ended the connection.
    stream: Option<Box<dyn Stream>>,
    /// Bytes to send, and how far into a message what was sent ends.
    owed: usize,
    sent: usize,
    /// How far into a message what has come ends.
    received: usize,
    in_flight: usize,
    asked: Instant,
}

/// How connections ended that a server may end.
#[derive(Default)]
pub struct Ends {
    pub orderly: usize,
    /// With an error, such as a reset.
    pub otherwise: usize,
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
    /// Set while the server may end connections.
    ends: Option<Ends>,
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
        let message = work.message();
        let mut load = Self {
            poll,
            events: Events::with_capacity(1024),
            clients: Vec::with_capacity(work.connections),
            pattern: message.repeat(SCRATCH / message.len() + 2),
            message: message.len(),
            window: work.window,
            scratch: vec![0; SCRATCH],
            latencies: Vec::new(),
            ends: None,
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
            stream: Some(stream),
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
        self.run_once(span, || {})
    }

    /// As [`Load::run`]. Calls `filled` when the windows are full, as far as the kernel has room.
    pub fn run_once(&mut self, span: Duration, filled: impl FnOnce()) -> u64 {
        let end = Instant::now() + span;
        let mut done = 0;
        self.latencies.clear();
        for at in 0..self.clients.len() {
            self.ask(at, self.window);
        }
        filled();
        while self.clients.iter().any(|client| client.in_flight > 0) {
            done += self.turn(end);
        }
        done
    }

    /// Sends a message on each connection once in `every`, evenly spread, and waits until all has
    /// come back. How many messages did.
    pub fn pace(&mut self, every: Duration, span: Duration) -> u64 {
        let begun = Instant::now();
        let (mut number, mut asked, mut done) = (0, 0, 0);
        self.latencies.clear();
        loop {
            let due = begun + every * number / self.clients.len() as u32;
            let (now, over) = (Instant::now(), begun.elapsed() >= span);
            if over && done == asked {
                return done;
            }
            if !over && now >= due {
                let at = number as usize % self.clients.len();
                // One that has not been answered is left out.
                if self.clients[at].in_flight == 0 {
                    self.ask(at, 1);
                    asked += 1;
                }
                number += 1;
                continue;
            }
            let mut events = std::mem::replace(&mut self.events, Events::with_capacity(0));
            let patience = if over { PATIENCE } else { due - now };
            self.poll.poll(&mut events, Some(patience)).expect("a poll");
            assert!(!over || !events.is_empty(), "the server does not answer");
            for event in &events {
                done += self.hear(event.token().0) as u64;
                self.ask(event.token().0, 0);
            }
            self.events = events;
        }
    }

    /// Sends payloads of this length from now on. All messages before have come back.
    pub fn set_payload(&mut self, work: Work) {
        let message = work.message();
        self.message = message.len();
        self.pattern = message.repeat(SCRATCH / message.len() + 2);
    }

    /// Sends all but the last byte of a message on each connection, and returns when the kernel has
    /// them. Then [`Load::end_each`] sends that byte.
    pub fn begin_each(&mut self) {
        for at in 0..self.clients.len() {
            self.clients[at].in_flight += 1;
            self.clients[at].owed += self.message - 1;
            self.ask(at, 0);
        }
        while self.clients.iter().any(|client| client.owed > 0) {
            self.turn(Instant::now());
        }
    }

    /// Waits for all answers.
    pub fn end_each(&mut self) {
        for at in 0..self.clients.len() {
            self.clients[at].owed += 1;
            self.ask(at, 0);
        }
        while self.clients.iter().any(|client| client.in_flight > 0) {
            self.turn(Instant::now());
        }
    }

    /// Keeps the windows full, calls `end` after `span`, and returns when the server has ended all
    /// connections.
    pub fn run_to_end(&mut self, span: Duration, end: impl FnOnce()) -> Ends {
        let (begun, mut end) = (Instant::now(), Some(end));
        self.ends = Some(Ends::default());
        for at in 0..self.clients.len() {
            self.ask(at, self.window);
        }
        while self.clients.iter().any(|client| client.stream.is_some()) {
            if begun.elapsed() >= span {
                if let Some(end) = end.take() {
                    end();
                }
            }
            self.turn(Instant::now() + PATIENCE);
        }
        self.ends.take().unwrap_or_default()
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
        let Some(stream) = &mut client.stream else {
            return;
        };
        if messages > 0 {
            client.asked = Instant::now();
        }
        client.in_flight += messages;
        client.owed += messages * self.message;
        while client.owed > 0 {
            let until = (client.sent + client.owed).min(self.pattern.len());
            match stream.write(&self.pattern[client.sent..until]) {
                Ok(count) => {
                    client.owed -= count;
                    client.sent = (client.sent + count) % self.message;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => return self.end(at, Some(error)),
            }
        }
        match stream.flush() {
            Err(error) if error.kind() != ErrorKind::WouldBlock => self.end(at, Some(error)),
            _ => {}
        }
    }

    /// The server has ended a connection.
    fn end(&mut self, at: usize, error: Option<Error>) {
        let client = &mut self.clients[at];
        let Some(ends) = &mut self.ends else {
            panic!("a server let a client go: {error:?}");
        };
        match error {
            None => ends.orderly += 1,
            Some(_) => ends.otherwise += 1,
        }
        (client.stream, client.in_flight, client.owed) = (None, 0, 0);
    }

    /// Reads what has come; how many messages are whole by it.
    fn hear(&mut self, at: usize) -> usize {
        let client = &mut self.clients[at];
        let Some(stream) = &mut client.stream else {
            return 0;
        };
        let (mut whole, mut end) = (0, None);
        loop {
            match stream.read(&mut self.scratch) {
                Ok(0) => {
                    end = Some(None);
                    break;
                }
                Ok(count) => {
                    let expected = &self.pattern[client.received..client.received + count];
                    assert!(
                        self.scratch[..count] == *expected,
                        "what comes back is what was sent"
                    );
                    let end = client.received + count;
                    whole += end / self.message;
                    client.received = end % self.message;
                    // An end may have come with it.
                    if count < SCRATCH && self.ends.is_none() {
                        break;
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => {
                    end = Some(Some(error));
                    break;
                }
            }
        }
        client.in_flight -= whole;
        if whole > 0 && self.window == 1 {
            self.latencies.push(client.asked.elapsed());
        }
        if let Some(error) = end {
            self.end(at, error);
        }
        whole
    }
}
