//! The load of the figures for MQTT: one publisher and many subscribers, QoS 0.
//!
//! Usage: `figures_mqtt ADDRESS SUBSCRIBERS BYTES WINDOW MESSAGES`. After a warm-up with a tenth of
//! the messages, the program prints `ready` and waits for a line; after MESSAGES more it prints
//! `done`. Up to WINDOW messages are on their way at any time. Every subscriber has to get every
//! message: a lost one ends the program with an error.

use std::error::Error;
use std::io::{self, ErrorKind, Read, Write};
use std::time::{Duration, Instant};

use mio::net::TcpStream;
use mio::{Events, Interest, Poll, Token};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// The longest time without any progress.
const PATIENCE: Duration = Duration::from_secs(10);
const TOPIC: &[u8] = b"figures/fan-out";

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [addr, numbers @ ..] = &arguments[..] else {
        return Err("no address".into());
    };
    let numbers: Vec<usize> = numbers
        .iter()
        .map(|number| number.parse())
        .collect::<std::result::Result<_, _>>()?;
    let &[subscribers, bytes, window, messages] = &numbers[..] else {
        return Err("SUBSCRIBERS BYTES WINDOW MESSAGES".into());
    };
    let mut load = Load::connect(addr, subscribers, bytes)?;
    load.run(messages / 10, window)?;
    println!("ready");
    io::stdin().read_line(&mut String::new())?;
    load.run(messages, window)?;
    println!("done");
    Ok(())
}

struct Load {
    poll: Poll,
    publisher: TcpStream,
    subscribers: Vec<TcpStream>,
    /// Bytes that each subscriber has received.
    received: Vec<usize>,
    /// The PUBLISH that is sent. It is received as it is.
    packet: Vec<u8>,
    /// Bytes that the publisher has sent.
    sent: usize,
    scratch: Vec<u8>,
}

impl Load {
    fn connect(addr: &str, subscribers: usize, bytes: usize) -> Result<Self> {
        let poll = Poll::new()?;
        let mut streams = Vec::new();
        for number in 0..=subscribers {
            let mut stream = connect(addr, number)?;
            if number > 0 {
                // SUBSCRIBE with packet identifier 1, QoS 0; SUBACK.
                let filter = [&[0, 1, 0, TOPIC.len() as u8], TOPIC, &[0]].concat();
                stream.write_all(&packet(0x82, &filter))?;
                expect(&mut stream, &[0x90, 3, 0, 1, 0])?;
            }
            stream.set_nonblocking(true)?;
            let mut stream = TcpStream::from_std(stream);
            poll.registry().register(
                &mut stream,
                Token(number),
                Interest::READABLE | Interest::WRITABLE,
            )?;
            streams.push(stream);
        }
        let publisher = streams.remove(0);
        let body = [&[0, TOPIC.len() as u8], TOPIC, &vec![b'm'; bytes]].concat();
        Ok(Self {
            poll,
            publisher,
            received: vec![0; subscribers],
            subscribers: streams,
            packet: packet(0x30, &body),
            sent: 0,
            scratch: vec![0; 256 * 1024],
        })
    }

    /// Publishes `messages`, and waits until all subscribers have them.
    fn run(&mut self, messages: usize, window: usize) -> Result<()> {
        let mut events = Events::with_capacity(1024);
        let end = self.sent + messages * self.packet.len();
        let mut progress = Instant::now();
        loop {
            let slowest = self.received.iter().copied().min().unwrap_or_default();
            if slowest >= end {
                return Ok(());
            }
            // Whole messages: the next one is sent when all subscribers have an earlier one.
            let complete = slowest - slowest % self.packet.len();
            self.publish(end.min(complete + window * self.packet.len()))?;
            self.poll.poll(&mut events, Some(PATIENCE))?;
            for event in events.iter() {
                if let Some(number) = event.token().0.checked_sub(1) {
                    if self.receive(number)? {
                        progress = Instant::now();
                    }
                }
            }
            if progress.elapsed() > PATIENCE {
                let lost = (end - slowest).div_ceil(self.packet.len());
                return Err(format!("{lost} messages did not arrive").into());
            }
        }
    }

    fn publish(&mut self, end: usize) -> Result<()> {
        while self.sent < end {
            let at = self.sent % self.packet.len();
            let most = self.packet.len().min(at + (end - self.sent));
            match self.publisher.write(&self.packet[at..most]) {
                Ok(written) => self.sent += written,
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Returns whether anything has come.
    fn receive(&mut self, number: usize) -> Result<bool> {
        let mut any = false;
        loop {
            match self.subscribers[number].read(&mut self.scratch) {
                Ok(0) => return Err("the server has closed a connection".into()),
                Ok(length) => {
                    self.received[number] += length;
                    any = true;
                    if length < self.scratch.len() {
                        return Ok(any); // an edge follows
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(any),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// A connection whose CONNECT was accepted.
fn connect(addr: &str, number: usize) -> Result<std::net::TcpStream> {
    let mut stream = std::net::TcpStream::connect(addr)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let client = format!("figures-{number}");
    // MQTT 3.1.1, a clean session, no keep alive.
    let head = b"\0\x04MQTT\x04\x02\0\0\0";
    let body = [&head[..], &[client.len() as u8], client.as_bytes()].concat();
    stream.write_all(&packet(0x10, &body))?;
    expect(&mut stream, &[0x20, 2, 0, 0])?;
    Ok(stream)
}

fn expect(stream: &mut std::net::TcpStream, wanted: &[u8]) -> Result<()> {
    let mut answer = vec![0; wanted.len()];
    stream.read_exact(&mut answer)?;
    if answer == wanted {
        Ok(())
    } else {
        Err(format!("{answer:02x?} instead of {wanted:02x?}").into())
    }
}

/// A control packet with this body.
fn packet(first: u8, body: &[u8]) -> Vec<u8> {
    let mut packet = vec![first];
    let mut length = body.len();
    loop {
        let more = if length > 0x7F { 0x80 } else { 0 };
        packet.push((length & 0x7F) as u8 | more);
        length >>= 7;
        if length == 0 {
            break;
        }
    }
    packet.extend_from_slice(body);
    packet
}
