//! Messages, and the memory that they and all else take that is kept.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;

use crate::packet::{Publish, Qos};

/// Number of bytes that are kept for clients.
#[derive(Clone, Default)]
pub struct Memory(Rc<Cell<usize>>);

impl Memory {
    pub fn used(&self) -> usize {
        self.0.get()
    }

    pub fn charge(&self, bytes: usize) -> Charge {
        self.0.set(self.used() + bytes);
        Charge {
            memory: self.clone(),
            bytes,
        }
    }
}

/// Part of the memory, until it is dropped.
pub struct Charge {
    memory: Memory,
    bytes: usize,
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.memory.0.set(self.memory.used() - self.bytes);
    }
}

/// A message, shared by all places that keep it.
pub struct Message {
    pub topic: Rc<str>,
    pub payload: Arc<[u8]>,
    pub qos: Qos,
    charge: Charge,
}

impl Message {
    pub fn new(publish: &Publish<'_>, memory: &Memory) -> Rc<Self> {
        let bytes = size_of::<Self>() + publish.topic.len() + publish.payload.len();
        Rc::new(Self {
            topic: publish.topic.into(),
            payload: publish.payload.into(),
            qos: publish.qos,
            charge: memory.charge(bytes),
        })
    }
}

/// A message on its way to one client.
pub struct Delivery {
    pub message: Rc<Message>,
    /// The QoS of the message or of the subscription, whichever is lower.
    pub qos: Qos,
    /// It was retained when the client subscribed.
    pub retain: bool,
    /// The packet identifier under which it was sent.
    pub id: Option<u16>,
    _charge: Charge,
}

impl Delivery {
    pub fn new(message: &Rc<Message>, granted: Qos, retain: bool) -> Self {
        Self {
            message: Rc::clone(message),
            qos: message.qos.min(granted),
            retain,
            id: None,
            _charge: message.charge.memory.charge(size_of::<Self>()),
        }
    }

    /// PUBLISH with this identifier; a duplicate if it was sent before. Its second part is the
    /// payload, which all subscribers share.
    pub fn write(&self, id: u16) -> (Vec<u8>, Arc<[u8]>) {
        let publish = Publish {
            topic: &self.message.topic,
            payload: &self.message.payload,
            qos: self.qos,
            retain: self.retain,
            id,
        };
        let head = publish.head(self.id.is_some());
        (head, Arc::clone(&self.message.payload))
    }
}
