//! The control packets: cut out of the stream, parsed and written (sections 2 and 3 of the
//! standard).

use std::error::Error;
use std::fmt;

use portcullis::{Decoded, FrameError, Framer};

use crate::topics;

/// What the standard forbids: the connection is closed (section 4.8).
#[derive(Debug)]
pub struct Violation(pub &'static str);

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

impl Error for Violation {}

type Result<T> = std::result::Result<T, Violation>;

#[allow(clippy::enum_variant_names)] // the names of the standard
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Qos {
    AtMostOnce = 0,
    AtLeastOnce = 1,
    ExactlyOnce = 2,
}

impl TryFrom<u8> for Qos {
    type Error = Violation;

    fn try_from(bits: u8) -> Result<Self> {
        match bits {
            0 => Ok(Self::AtMostOnce),
            1 => Ok(Self::AtLeastOnce),
            2 => Ok(Self::ExactlyOnce),
            _ => Err(Violation("not a QoS")),
        }
    }
}

// The types of packets, with their flags.
const CONNECT: u8 = 0x10;
const PUBLISH: u8 = 0x30;
pub const PUBACK: u8 = 0x40;
pub const PUBREC: u8 = 0x50;
const PUBREL: u8 = 0x62;
pub const PUBCOMP: u8 = 0x70;
const SUBSCRIBE: u8 = 0x82;
const UNSUBSCRIBE: u8 = 0xA2;
pub const UNSUBACK: u8 = 0xB0;
const PINGREQ: u8 = 0xC0;
const DISCONNECT: u8 = 0xE0;

// The flags of PUBLISH.
const DUP: u8 = 8;
const RETAIN: u8 = 1;

/// Bytes of the longest fixed header: the type, and four of the remaining length.
const MAX_HEADER: usize = 5;

/// Cuts the stream into whole control packets, each with its fixed header.
pub struct ControlPackets;

impl Framer for ControlPackets {
    fn decode(&mut self, input: &[u8]) -> std::result::Result<Decoded, FrameError> {
        // Before the packet is complete, so that another protocol is noticed at once.
        if !input.first().is_some_and(|&first| is_from_client(first)) {
            return Err(FrameError::new("not a packet that a client may send"));
        }
        let Some((header, length)) = remaining_length(input).map_err(FrameError::new)? else {
            return Ok(Decoded::More);
        };
        let total = header + length;
        if input.len() < total {
            return Ok(Decoded::Need(total));
        }
        Ok(Decoded::Frame {
            payload: 0..total,
            consumed: total,
        })
    }
}

/// Returns true if `first` is a type that a client sends, with its flags.
fn is_from_client(first: u8) -> bool {
    const PUBLISH_WITH_ANY_FLAGS: u8 = PUBLISH | 0x0F;
    matches!(
        first,
        CONNECT | PUBLISH
            ..=PUBLISH_WITH_ANY_FLAGS
                | PUBACK
                | PUBREL
                | SUBSCRIBE
                | UNSUBSCRIBE
                | PINGREQ
                | DISCONNECT
    )
}

/// Reads the fixed header at the front of `input`: its length, and the remaining length.
fn remaining_length(input: &[u8]) -> Result<Option<(usize, usize)>> {
    let mut length = 0;
    for (at, &byte) in input.iter().enumerate().take(MAX_HEADER).skip(1) {
        length |= usize::from(byte & 0x7F) << (7 * (at - 1));
        if byte & 0x80 == 0 {
            return Ok(Some((at + 1, length)));
        }
    }
    if input.len() < MAX_HEADER {
        return Ok(None);
    }
    Err(Violation("the remaining length is too long"))
}

/// A packet of a client.
pub enum Packet<'a> {
    Connect(Connect<'a>),
    /// CONNECT of another version of the protocol.
    OtherVersion,
    Publish(Publish<'a>),
    PubAck(u16),
    PubRel(u16),
    Subscribe(u16, Vec<(&'a str, Qos)>),
    Unsubscribe(u16, Vec<&'a str>),
    PingReq,
    Disconnect,
}

pub struct Connect<'a> {
    pub client: &'a str,
    pub clean: bool,
    /// Seconds; 0 is none.
    pub keep_alive: u16,
    pub will: Option<Publish<'a>>,
    pub user: Option<&'a str>,
    pub password: Option<&'a [u8]>,
}

/// A message as a client has sent it, in PUBLISH or as its will.
pub struct Publish<'a> {
    pub topic: &'a str,
    pub payload: &'a [u8],
    pub qos: Qos,
    pub retain: bool,
    /// 0 for QoS 0 and a will.
    pub id: u16,
}

impl<'a> Packet<'a> {
    pub fn parse(frame: &'a [u8]) -> Result<Self> {
        let mut body = Reader(frame);
        let first = body.u8()?;
        while body.u8()? & 0x80 != 0 {}
        let packet = match first {
            CONNECT => {
                let (name, level) = (body.string()?, body.u8()?);
                match (name, level) {
                    ("MQTT", 4) => Self::Connect(Connect::parse(&mut body)?),
                    ("MQTT" | "MQIsdp", _) => return Ok(Self::OtherVersion),
                    _ => return Err(Violation("another protocol")),
                }
            }
            PUBACK => Self::PubAck(body.id()?),
            PUBREL => Self::PubRel(body.id()?),
            SUBSCRIBE => Self::Subscribe(
                body.id()?,
                body.list(|body| Ok((body.filter()?, body.u8()?.try_into()?)))?,
            ),
            UNSUBSCRIBE => Self::Unsubscribe(body.id()?, body.list(Reader::filter)?),
            PINGREQ => Self::PingReq,
            DISCONNECT => Self::Disconnect,
            _ => Self::Publish(Publish::parse(first, &mut body)?),
        };
        if body.0.is_empty() {
            Ok(packet)
        } else {
            Err(Violation("bytes behind the end of a packet"))
        }
    }
}

impl<'a> Connect<'a> {
    fn parse(body: &mut Reader<'a>) -> Result<Self> {
        let flags = body.u8()?;
        let has = |flag: u8| flags & flag != 0;
        let (user, password, will) = (has(0x80), has(0x40), has(0x04));
        if has(0x01) || (password && !user) || (!will && has(0x38)) {
            return Err(Violation("flags of CONNECT that exclude each other"));
        }
        let keep_alive = body.u16()?;
        let client = body.string()?;
        let will = if will {
            Some(Publish {
                topic: body.topic()?,
                payload: body.field()?,
                qos: (flags >> 3 & 3).try_into()?,
                retain: has(0x20),
                id: 0,
            })
        } else {
            None
        };
        Ok(Self {
            client,
            clean: has(0x02),
            keep_alive,
            will,
            user: user.then(|| body.string()).transpose()?,
            password: password.then(|| body.field()).transpose()?,
        })
    }
}

impl<'a> Publish<'a> {
    fn parse(first: u8, body: &mut Reader<'a>) -> Result<Self> {
        let qos = (first >> 1 & 3).try_into()?;
        if qos == Qos::AtMostOnce && first & DUP != 0 {
            return Err(Violation("DUP of a message with QoS 0"));
        }
        Ok(Self {
            topic: body.topic()?,
            id: if qos == Qos::AtMostOnce {
                0
            } else {
                body.id()?
            },
            payload: std::mem::take(&mut body.0),
            qos,
            retain: first & RETAIN != 0,
        })
    }
}

const ENDS_EARLY: Violation = Violation("a packet that ends early");

/// The remainder of a packet.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn bytes(&mut self, length: usize) -> Result<&'a [u8]> {
        let (bytes, rest) = self.0.split_at_checked(length).ok_or(ENDS_EARLY)?;
        self.0 = rest;
        Ok(bytes)
    }

    fn u8(&mut self) -> Result<u8> {
        let (&byte, rest) = self.0.split_first().ok_or(ENDS_EARLY)?;
        self.0 = rest;
        Ok(byte)
    }

    fn u16(&mut self) -> Result<u16> {
        Ok(u16::from(self.u8()?) << 8 | u16::from(self.u8()?))
    }

    /// A packet's number, which is never 0.
    fn id(&mut self) -> Result<u16> {
        match self.u16()? {
            0 => Err(Violation("packet identifier 0")),
            id => Ok(id),
        }
    }

    /// Bytes behind their length.
    fn field(&mut self) -> Result<&'a [u8]> {
        let length = self.u16()?;
        self.bytes(length.into())
    }

    /// Text, without U+0000 (section 1.5.3).
    fn string(&mut self) -> Result<&'a str> {
        std::str::from_utf8(self.field()?)
            .ok()
            .filter(|text| !text.contains('\0'))
            .ok_or(Violation("text that is not UTF-8, or has U+0000"))
    }

    fn topic(&mut self) -> Result<&'a str> {
        let topic = self.string()?;
        topics::is_name(topic)
            .then_some(topic)
            .ok_or(Violation("a topic that is empty, or has wildcards"))
    }

    fn filter(&mut self) -> Result<&'a str> {
        let filter = self.string()?;
        topics::is_filter(filter).then_some(filter).ok_or(Violation(
            "a filter that is empty, or has a wildcard inside a level",
        ))
    }

    /// Entries up to the end, at least one.
    fn list<T>(&mut self, entry: impl Fn(&mut Self) -> Result<T>) -> Result<Vec<T>> {
        let mut entries = vec![entry(self)?];
        while !self.0.is_empty() {
            entries.push(entry(self)?);
        }
        Ok(entries)
    }
}

/// Return codes of CONNACK (section 3.2.2.3).
#[derive(Clone, Copy, Debug)]
pub enum ConnectCode {
    Accepted = 0,
    UnacceptableVersion = 1,
    IdentifierRejected = 2,
    ServerUnavailable = 3,
    BadUserOrPassword = 4,
    NotAuthorized = 5,
}

pub fn connack(session_present: bool, code: ConnectCode) -> [u8; 4] {
    [0x20, 2, session_present.into(), code as u8]
}

/// PUBACK, PUBREC, PUBCOMP or UNSUBACK.
pub fn ack(kind: u8, id: u16) -> [u8; 4] {
    let [high, low] = id.to_be_bytes();
    [kind, 2, high, low]
}

/// SUBACK; `None` is a filter that was refused.
pub fn suback(id: u16, granted: &[Option<Qos>]) -> Vec<u8> {
    let codes = granted.iter().map(|qos| qos.map_or(0x80, |qos| qos as u8));
    let body: Vec<u8> = id.to_be_bytes().into_iter().chain(codes).collect();
    packet(0x90, &[&body])
}

pub fn pingresp() -> [u8; 2] {
    [0xD0, 0]
}

impl Publish<'_> {
    /// PUBLISH of this message, without the payload, which follows.
    pub fn head(&self, dup: bool) -> Vec<u8> {
        let dup = if dup { DUP } else { 0 };
        let first = PUBLISH | dup | (self.qos as u8) << 1 | u8::from(self.retain);
        // A topic comes from a packet, where its length had two bytes.
        let length = (self.topic.len() as u16).to_be_bytes();
        let id = self.id.to_be_bytes();
        let id: &[u8] = if self.qos == Qos::AtMostOnce {
            &[]
        } else {
            &id
        };
        head(
            first,
            &[&length, self.topic.as_bytes(), id],
            self.payload.len(),
        )
    }
}

/// A packet with this body.
fn packet(first: u8, body: &[&[u8]]) -> Vec<u8> {
    head(first, body, 0)
}

/// A packet with this body, behind which `more` bytes of it follow.
fn head(first: u8, body: &[&[u8]], more: usize) -> Vec<u8> {
    let mut length: usize = body.iter().map(|part| part.len()).sum();
    length += more;
    let mut packet = Vec::with_capacity(MAX_HEADER + length);
    packet.push(first);
    loop {
        let more = if length > 0x7F { 0x80 } else { 0 };
        packet.push((length & 0x7F) as u8 | more);
        length >>= 7;
        if length == 0 {
            break;
        }
    }
    for part in body {
        packet.extend_from_slice(part);
    }
    packet
}
