//! The broker as a program, and a client that sends the bytes it is given.

use std::cell::RefCell;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::process::Command;
use std::sync::{Arc, Weak};
use std::time::Duration;

use kit::net::{connect, example, ChildProcess, ReadSome};

pub const CLEAN: u8 = 2;
pub const KEPT: u8 = 0;

pub struct Broker {
    child: ChildProcess,
    addr: SocketAddr,
    /// The sockets of all clients.
    clients: RefCell<Vec<Weak<TcpStream>>>,
}

impl Broker {
    #[track_caller]
    pub fn start(options: &[&str]) -> Self {
        let mut command = Command::new(example("mqtt"));
        let child = ChildProcess::start(command.args(["--listen", "127.0.0.1:0"]).args(options));
        let addr = child.address();
        Self {
            child,
            addr,
            clients: RefCell::default(),
        }
    }

    pub fn port(&self) -> String {
        self.addr.port().to_string()
    }

    /// A client with a clean session and no keep alive.
    #[track_caller]
    pub fn client(&self, id: &str) -> Raw {
        let mut client = self.open();
        client.send(&connect_packet(id, CLEAN, 0, &[]));
        client.expect(&[0x20, 2, 0, 0]);
        client
    }

    /// A client whose session is kept, and whether it was.
    #[track_caller]
    pub fn kept_client(&self, id: &str) -> (Raw, bool) {
        let mut client = self.open();
        client.send(&connect_packet(id, KEPT, 0, &[]));
        let (first, body) = client.packet();
        assert_eq!((first, body[1]), (0x20, 0));
        (client, body[0] == 1)
    }

    /// A connection without CONNECT.
    #[track_caller]
    pub fn open(&self) -> Raw {
        let client = Arc::new(connect(self.addr));
        self.clients.borrow_mut().push(Arc::downgrade(&client));
        Raw(client)
    }

    pub fn peak_memory(&self) -> usize {
        self.child.peak_memory()
    }

    /// Lets the broker find all that `act` sends at once.
    pub fn stopped(&self, act: impl FnOnce()) {
        self.child.signal("STOP");
        act();
        self.child.signal("CONT");
    }

    /// Ends the broker in order, and returns one of its counters.
    #[track_caller]
    pub fn finish(self, counter: &str) -> u64 {
        for client in self.clients.take().iter().filter_map(Weak::upgrade) {
            // The broker would wait for it to finish, unless it has.
            let _ = client.shutdown(Shutdown::Both);
        }
        self.child.signal("TERM");
        let (status, words, log) = self.child.finish();
        assert!(status.success() && !log.contains("panicked"), "{log}");
        let (before, _) = words
            .split_once(&format!(" {counter}"))
            .unwrap_or_else(|| panic!("no {counter} in {words:?}"));
        let number = before.rsplit(' ').next();
        number
            .and_then(|number| number.trim().parse().ok())
            .unwrap_or_else(|| panic!("no number of {counter} in {words:?}"))
    }
}

/// A control packet with this body.
pub fn packet(first: u8, body: &[u8]) -> Vec<u8> {
    let (mut packet, mut length) = (vec![first], body.len());
    while length > 127 {
        packet.push((length % 128) as u8 | 128);
        length /= 128;
    }
    packet.push(length as u8);
    [&packet, body].concat()
}

/// Bytes behind their length.
pub fn field(bytes: impl AsRef<[u8]>) -> Vec<u8> {
    let bytes = bytes.as_ref();
    [&(bytes.len() as u16).to_be_bytes(), bytes].concat()
}

/// CONNECT, with what the flags announce behind the client identifier.
pub fn connect_packet(id: &str, flags: u8, keep_alive: u16, more: &[Vec<u8>]) -> Vec<u8> {
    let head = [&field("MQTT")[..], &[4, flags], &keep_alive.to_be_bytes()].concat();
    packet(0x10, &[head, field(id), more.concat()].concat())
}

pub fn publish_packet(flags: u8, topic: &str, id: u16, payload: &[u8]) -> Vec<u8> {
    let id = id.to_be_bytes();
    let id = if flags & 6 == 0 { &[][..] } else { &id[..] };
    packet(0x30 | flags, &[&field(topic), id, payload].concat())
}

pub fn subscribe_packet(id: u16, filters: &[(&str, u8)]) -> Vec<u8> {
    let mut body = id.to_be_bytes().to_vec();
    for (filter, qos) in filters {
        body.extend(field(filter));
        body.push(*qos);
    }
    packet(0x82, &body)
}

/// A message that was received.
#[derive(Debug, PartialEq, Eq)]
pub struct Received {
    /// DUP, QoS and RETAIN.
    pub flags: u8,
    pub topic: String,
    pub id: u16,
    pub payload: Vec<u8>,
}

pub struct Raw(Arc<TcpStream>);

impl Raw {
    #[track_caller]
    pub fn send(&mut self, bytes: &[u8]) {
        (&*self.0).write_all(bytes).expect("sent");
    }

    #[track_caller]
    pub fn expect(&mut self, bytes: &[u8]) {
        let mut received = vec![0; bytes.len()];
        (&*self.0).read_exact(&mut received).expect("an answer");
        assert_eq!(received, bytes);
    }

    #[track_caller]
    pub fn packet(&mut self) -> (u8, Vec<u8>) {
        let byte = || {
            let mut byte = [0];
            (&*self.0).read_exact(&mut byte).expect("a packet");
            byte[0]
        };
        let (first, mut length) = (byte(), 0);
        for place in 0.. {
            let next = byte();
            length |= usize::from(next & 127) << (7 * place);
            if next < 128 {
                break;
            }
        }
        let mut body = vec![0; length];
        (&*self.0).read_exact(&mut body).expect("a packet");
        (first, body)
    }

    #[track_caller]
    pub fn subscribe(&mut self, filter: &str, qos: u8) {
        self.send(&subscribe_packet(9, &[(filter, qos)]));
        self.expect(&[0x90, 3, 0, 9, qos.min(1)]);
    }

    /// Publishes with QoS 1, and waits for the acknowledgement.
    #[track_caller]
    pub fn publish(&mut self, topic: &str, payload: &str, retain: bool) {
        self.send(&publish_packet(
            2 | u8::from(retain),
            topic,
            7,
            payload.as_bytes(),
        ));
        self.expect(&[0x40, 2, 0, 7]);
    }

    #[track_caller]
    pub fn message(&mut self) -> Received {
        let (first, body) = self.packet();
        assert_eq!(first & 0xF0, 0x30, "PUBLISH: {body:?}");
        let (length, rest) = body.split_at(2);
        let (topic, rest) = rest.split_at(usize::from(length[0]) * 256 + usize::from(length[1]));
        let (id, payload) = rest.split_at(if first & 6 == 0 { 0 } else { 2 });
        Received {
            flags: first & 0x0F,
            topic: String::from_utf8_lossy(topic).into_owned(),
            id: id.iter().fold(0, |id, &byte| id << 8 | u16::from(byte)),
            payload: payload.to_vec(),
        }
    }

    #[track_caller]
    pub fn acknowledge(&mut self, id: u16) {
        let [high, low] = id.to_be_bytes();
        self.send(&[0x40, 2, high, low]);
    }

    /// Waits for the next message, acknowledges it, and returns its payload.
    #[track_caller]
    pub fn payload(&mut self) -> String {
        let message = self.message();
        if message.flags & 6 != 0 {
            self.acknowledge(message.id);
        }
        String::from_utf8_lossy(&message.payload).into_owned()
    }

    /// Everything that was sent before has been handled, and nothing else has come.
    #[track_caller]
    pub fn ping(&mut self) {
        self.send(&[0xC0, 0]);
        self.expect(&[0xD0, 0]);
    }

    #[track_caller]
    pub fn disconnect(self) {
        (&*self.0).write_all(&[0xE0, 0]).expect("sent");
        self.await_end();
    }

    /// Finishes, and the broker sends nothing more.
    #[track_caller]
    pub fn finish(self) {
        self.0.shutdown(Shutdown::Write).expect("FIN");
        self.await_end();
    }

    /// The broker ends the connection, and sends nothing before.
    #[track_caller]
    pub fn await_end(self) {
        let mut rest = Vec::new();
        (&*self.0).read_to_end(&mut rest).expect("an end");
        assert_eq!(rest, b"");
    }

    /// Sends a byte every 20 ms, until the broker ends the connection. Returns their number.
    #[track_caller]
    pub fn trickle(self, bytes: &[u8]) -> usize {
        let wait = Some(Duration::from_millis(20));
        self.0.set_read_timeout(wait).expect("a timeout");
        let lives = |byte: &[u8]| {
            let sent = (&*self.0).write_all(byte);
            let is_silent = |error: std::io::Error| error.kind() == ErrorKind::WouldBlock;
            sent.is_ok() && (&*self.0).read_some(&mut [0]).is_err_and(is_silent)
        };
        bytes.chunks(1).take_while(|byte| lives(byte)).count()
    }

    #[track_caller]
    pub fn reset(self) {
        kit::net::reset(Arc::into_inner(self.0).expect("the only one"));
    }
}
