//! The session of one client, which may outlive its connection (section 3.1.2.4 of the standard).

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use portcullis::{Conn, ConnId};

use crate::broker::Broker;
use crate::message::{Charge, Delivery, Message};
use crate::packet::Qos;

/// Messages for which an empty queue keeps room.
const MIN_ROOM: usize = 64;

#[derive(Default)]
pub struct Session {
    /// The client's connection, unless the client is away.
    pub conn: Option<ConnId>,
    /// When the last connection ended.
    pub away_since: Option<Instant>,
    /// The session ends with its connection.
    pub clean: bool,
    /// The will, and whether it is to be retained.
    pub will: Option<(Rc<Message>, bool)>,
    /// The filters of the client's subscriptions.
    pub filters: BTreeMap<Box<str>, Charge>,
    /// Identifiers of QoS 2 messages of the client that are published and not released.
    pub unreleased: BTreeSet<u16>,
    /// Messages with QoS 0 that are not sent yet: retained ones that wait for a congested output.
    at_most_once: VecDeque<Delivery>,
    /// Messages with QoS 1 that are not sent yet on this connection.
    at_least_once: VecDeque<Delivery>,
    /// Messages that are sent and not acknowledged, in the order in which they were sent.
    in_flight: VecDeque<Delivery>,
    last_id: u16,
}

impl Session {
    /// Number of messages that are not sent yet.
    pub fn queued(&self) -> usize {
        self.at_most_once.len() + self.at_least_once.len()
    }

    /// Returns true if no message is queued or in flight.
    pub fn is_idle(&self) -> bool {
        self.queued() == 0 && self.in_flight.is_empty()
    }

    pub fn push(&mut self, delivery: Delivery) {
        match delivery.qos {
            Qos::AtMostOnce => self.at_most_once.push_back(delivery),
            _ => self.at_least_once.push_back(delivery),
        }
    }

    /// Sends queued messages until the connection is congested. Up to `window` messages with QoS 1
    /// are in flight.
    ///
    /// Errors are ignored. Below the high watermark the only one is that the connection closes:
    /// then messages in flight wait for the next connection.
    pub fn flush(&mut self, conn: &mut Conn<'_, Broker>, window: usize) {
        while !conn.is_congested() {
            if let Some(delivery) = self.at_most_once.pop_front() {
                let _ = conn.send(delivery.write(0));
            } else if let Some(packet) = self.next_in_flight(window) {
                let _ = conn.send(packet);
            } else {
                break;
            }
        }
        self.shrink();
    }

    /// Gives back the room of messages that have left: it is not counted.
    fn shrink(&mut self) {
        let queues = [
            &mut self.at_most_once,
            &mut self.at_least_once,
            &mut self.in_flight,
        ];
        for queue in queues {
            if queue.capacity() > 4 * queue.len() + MIN_ROOM {
                queue.shrink_to(2 * queue.len());
            }
        }
    }

    fn next_in_flight(&mut self, window: usize) -> Option<(Vec<u8>, Arc<[u8]>)> {
        if self.in_flight.len() >= window {
            return None;
        }
        let mut delivery = self.at_least_once.pop_front()?;
        let id = delivery.id.unwrap_or_else(|| self.free_id());
        let packet = delivery.write(id);
        delivery.id = Some(id);
        self.in_flight.push_back(delivery);
        self.last_id = id;
        Some(packet)
    }

    /// Returns an identifier that no message in flight has. There is one: the window is smaller.
    fn free_id(&self) -> u16 {
        let mut id = self.last_id;
        loop {
            id = id % u16::MAX + 1;
            if self.in_flight.iter().all(|sent| sent.id != Some(id)) {
                return id;
            }
        }
    }

    /// Handles PUBACK. An unknown identifier is ignored, as by other brokers.
    pub fn acknowledge(&mut self, id: u16) {
        let place = self.in_flight.iter().position(|sent| sent.id == Some(id));
        if let Some(place) = place {
            self.in_flight.remove(place);
            self.shrink();
        }
    }

    /// Handles the end of the connection. Messages in flight are sent again on the next one, first
    /// and in the same order (section 4.6). Messages with QoS 0 are not kept.
    pub fn suspend(&mut self) {
        self.conn = None;
        self.away_since = Some(Instant::now());
        self.at_most_once.clear();
        self.in_flight.append(&mut self.at_least_once);
        std::mem::swap(&mut self.in_flight, &mut self.at_least_once);
        self.shrink();
    }
}
