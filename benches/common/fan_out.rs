//! The load of a fan-out: one publisher, many subscribers, and the check that each receives all.

use std::error::Error;
use std::io::{ErrorKind, Read, Write};
use std::time::{Duration, Instant};

use mio::net::TcpStream;
use mio::{Events, Interest, Poll, Token};

pub type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// The longest time without any progress.
const PATIENCE: Duration = Duration::from_secs(10);
const TOPIC: &[u8] = b"figures/fan-out";
/// In packet-4: subscribes, and is the answer. Each other packet is for all subscribers.
pub const SUBSCRIBE: &[u8] = b"s";

#[derive(Clone, Copy)]
pub enum Protocol {
    /// MQTT 3.1.1, QoS 0.
    Mqtt,
    /// Four bytes of length and the payload.
    Packet4,
}

impl Protocol {
    /// Returns what is sent for a payload of `bytes`, and received by each subscriber.
    fn publish(self, bytes: usize) -> Vec<u8> {
        let payload = vec![b'm'; bytes];
        match self {
            Self::Mqtt => packet(
                0x30,
                &[&[0, TOPIC.len() as u8], TOPIC, &payload[..]].concat(),
            ),
            Self::Packet4 => packet_4(&payload),
        }
    }
}

pub struct Load {
    poll: Poll,
    protocol: Protocol,
    publisher: TcpStream,
    subscribers: Vec<TcpStream>,
    /// Bytes that each subscriber has received.
    received: Vec<usize>,
    /// What is published. It is received as it is.
    packet: Vec<u8>,
    /// Bytes that the publisher has sent.
    sent: usize,
    scratch: Vec<u8>,
}

impl Load {
    pub fn connect(
        addr: &str,
        subscribers: usize,
        bytes: usize,
        protocol: Protocol,
    ) -> Result<Self> {
        let poll = Poll::new()?;
        let mut streams = Vec::new();
        for number in 0..=subscribers {
            let stream = connect(addr, number, protocol)?;
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
        Ok(Self {
            poll,
            protocol,
            publisher,
            received: vec![0; subscribers],
            subscribers: streams,
            packet: protocol.publish(bytes),
            sent: 0,
            scratch: vec![0; 256 * 1024],
        })
    }

    /// Publishes payloads of this length from now on. All messages before have been received.
    pub fn set_bytes(&mut self, bytes: usize) {
        self.packet = self.protocol.publish(bytes);
        self.received.fill(0);
        self.sent = 0;
    }

    /// Publishes `messages`, and waits until all subscribers have them.
    pub fn run(&mut self, messages: usize, window: usize) -> Result<()> {
        self.run_while(window, |begun| begun < messages)?;
        Ok(())
    }

    /// Publishes for this time, at least one message, and waits until all subscribers have them.
    /// Returns their number.
    pub fn run_for(&mut self, span: Duration, window: usize) -> Result<usize> {
        let end = Instant::now() + span;
        self.run_while(window, |begun| begun == 0 || Instant::now() < end)
    }

    /// Begins another message while `more` of the number of those begun, and up to `window` are on
    /// their way.
    fn run_while(&mut self, window: usize, mut more: impl FnMut(usize) -> bool) -> Result<usize> {
        let mut events = Events::with_capacity(1024);
        let (length, before) = (self.packet.len(), self.sent);
        let mut end = self.sent;
        let mut progress = Instant::now();
        loop {
            let slowest = self.received.iter().copied().min().unwrap_or_default();
            // Whole messages: the next one is sent when all subscribers have an earlier one.
            let complete = slowest - slowest % length;
            while end < complete + window * length && more((end - before) / length) {
                end += length;
            }
            if slowest >= end {
                return Ok((end - before) / length);
            }
            self.publish(end)?;
            self.poll.poll(&mut events, Some(PATIENCE))?;
            for event in events.iter() {
                if let Some(number) = event.token().0.checked_sub(1) {
                    if self.receive(number)? {
                        progress = Instant::now();
                    }
                }
            }
            if progress.elapsed() > PATIENCE {
                let lost = (end - slowest).div_ceil(length);
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

/// Connects client `number`. All but the first subscribe.
fn connect(addr: &str, number: usize, protocol: Protocol) -> Result<std::net::TcpStream> {
    let mut stream = std::net::TcpStream::connect(addr)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    match protocol {
        Protocol::Mqtt => {
            let client = format!("figures-{number}");
            // A clean session, no keep alive.
            let head = b"\0\x04MQTT\x04\x02\0\0\0";
            let body = [&head[..], &[client.len() as u8], client.as_bytes()].concat();
            stream.write_all(&packet(0x10, &body))?;
            expect(&mut stream, &[0x20, 2, 0, 0])?;
            if number > 0 {
                // SUBSCRIBE with packet identifier 1, QoS 0; SUBACK.
                let filter = [&[0, 1, 0, TOPIC.len() as u8], TOPIC, &[0]].concat();
                stream.write_all(&packet(0x82, &filter))?;
                expect(&mut stream, &[0x90, 3, 0, 1, 0])?;
            }
        }
        Protocol::Packet4 if number > 0 => {
            let subscribe = packet_4(SUBSCRIBE);
            stream.write_all(&subscribe)?;
            expect(&mut stream, &subscribe)?;
        }
        Protocol::Packet4 => {}
    }
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

fn packet_4(payload: &[u8]) -> Vec<u8> {
    [&(payload.len() as u32).to_be_bytes(), payload].concat()
}

/// A control packet of MQTT with this body.
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
