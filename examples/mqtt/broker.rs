//! The state that all connections share: sessions, subscriptions and retained messages.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Bound;
use std::rc::Rc;
use std::time::Duration;

use clap::Args;
use portcullis::{Close, Conn};

use crate::message::{Delivery, Memory, Message};
use crate::packet::{Connect, ConnectCode, Publish, Qos, Violation};
use crate::session::Session;
use crate::topics::{self, Matching, Subscriptions};

/// Bytes of the longest client identifier and the longest filter that are kept.
const MAX_TEXT: usize = 1024;

/// What clients can make the broker keep.
#[derive(Debug, Args)]
pub struct Limits {
    /// Seconds that a client has for CONNECT
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    pub connect_timeout: u64,

    /// Sessions; for one more, the session whose client has been away for longest is dropped
    #[arg(long, value_name = "N", default_value_t = 4096, value_parser = at_least_one)]
    pub max_sessions: usize,

    /// Subscriptions of each client; one more is refused
    #[arg(long, value_name = "N", default_value_t = 100)]
    pub max_subscriptions: usize,

    /// Levels of a filter; a longer one is refused
    #[arg(long, value_name = "N", default_value_t = 32)]
    pub max_levels: u8,

    /// Retained messages; one more is not retained
    #[arg(long, value_name = "N", default_value_t = 10_000)]
    pub max_retained: usize,

    /// Queued messages of each session; one more is dropped
    #[arg(long, value_name = "N", default_value_t = 10_000)]
    pub max_queued: usize,

    /// Unacknowledged messages of each session; more are queued
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub max_in_flight: u16,

    /// QoS 2 messages of each client that are not released; one more ends the connection
    #[arg(long, value_name = "N", default_value_t = 1000)]
    pub max_unreleased: usize,

    /// Bytes of all messages and subscriptions together; above, none is added
    #[arg(long, value_name = "BYTES", default_value_t = 256 * 1024 * 1024)]
    pub max_stored: usize,
}

fn at_least_one(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("use at least 1".to_owned()),
        Ok(number) => Ok(number),
        Err(error) => Err(format!("not a number: {error}")),
    }
}

/// Messages since the start.
#[derive(Default)]
pub struct Counters {
    pub published: u64,
    /// With QoS 0, to a subscriber whose output was congested.
    pub congested: u64,
    /// To a subscriber whose queue was full.
    pub overflowed: u64,
    /// Not retained, because there were too many.
    pub unretained: u64,
}

impl fmt::Display for Counters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} published, {} congested, {} overflowed, {} unretained",
            self.published, self.congested, self.overflowed, self.unretained
        )
    }
}

pub struct Broker {
    limits: Limits,
    /// Passwords by user; without them every client is served.
    users: Option<BTreeMap<String, String>>,
    sessions: BTreeMap<Rc<str>, Session>,
    subscriptions: Subscriptions,
    retained: BTreeMap<Rc<str>, Rc<Message>>,
    memory: Memory,
    pub counters: Counters,
}

// Methods that send get the connection of the running callback, which leads to all others.
impl Broker {
    pub fn new(limits: Limits, users: Option<BTreeMap<String, String>>) -> Self {
        Self {
            limits,
            users,
            sessions: BTreeMap::new(),
            subscriptions: Subscriptions::default(),
            retained: BTreeMap::new(),
            memory: Memory::default(),
            counters: Counters::default(),
        }
    }

    pub fn connect_timeout(&self) -> Duration {
        Duration::from_secs(self.limits.connect_timeout)
    }

    // Sessions.

    /// Begins or resumes the session of a client on `conn`. Returns the client's identifier, and
    /// whether there was a session.
    pub fn connect(
        &mut self,
        conn: &mut Conn<'_, Self>,
        connect: &Connect<'_>,
    ) -> Result<(Rc<str>, bool), ConnectCode> {
        self.authenticate(connect)?;
        let client: Rc<str> = match connect.client {
            "" if connect.clean => format!("portcullis-{}", conn.id()).into(),
            client if (1..=MAX_TEXT).contains(&client.len()) => client.into(),
            _ => return Err(ConnectCode::IdentifierRejected),
        };
        self.end_connection(conn, &client);
        if connect.clean {
            self.remove(&client);
        }
        let is_present = self.sessions.contains_key(&client);
        if !is_present && self.sessions.len() >= self.limits.max_sessions {
            self.remove_longest_away()?;
        }
        let will = connect.will.as_ref();
        let will = will.map(|will| (Message::new(will, &self.memory), will.retain));
        let session = self.sessions.entry(Rc::clone(&client)).or_default();
        session.conn = Some(conn.id());
        session.clean = connect.clean;
        session.will = will;
        Ok((client, is_present))
    }

    fn authenticate(&self, connect: &Connect<'_>) -> Result<(), ConnectCode> {
        let Some(users) = &self.users else {
            return Ok(());
        };
        let user = connect.user.ok_or(ConnectCode::NotAuthorized)?;
        match (users.get(user), connect.password) {
            (Some(known), Some(given)) if known.as_bytes() == given => Ok(()),
            _ => Err(ConnectCode::BadUserOrPassword),
        }
    }

    /// Ends an earlier connection of the client (section 3.1.4).
    fn end_connection(&mut self, conn: &mut Conn<'_, Self>, client: &str) {
        let session = self.sessions.get(client);
        if let Some(earlier) = session.and_then(|session| session.conn) {
            if let Some(mut earlier) = conn.peer(earlier) {
                let cause = Close::because("another connection took over the session");
                earlier.end(cause.labelled("taken_over"));
            }
            self.suspend(conn, client);
        }
    }

    /// Handles the end of `conn`, unless another connection has taken over its session.
    pub fn leave(&mut self, conn: &mut Conn<'_, Self>, client: &str) {
        let session = self.sessions.get(client);
        if session.is_some_and(|session| session.conn == Some(conn.id())) {
            self.suspend(conn, client);
        }
    }

    /// Publishes the will of a client whose connection ends, and drops a clean session.
    fn suspend(&mut self, conn: &mut Conn<'_, Self>, client: &str) {
        let Some(session) = self.sessions.get_mut(client) else {
            return;
        };
        session.suspend();
        let will = session.will.take();
        if session.clean {
            self.remove(client);
        }
        if let Some((message, retain)) = will {
            self.distribute(conn, &message, retain);
        }
    }

    /// Returns the session of a connected client.
    pub fn session(&mut self, client: &str) -> Option<&mut Session> {
        self.sessions.get_mut(client)
    }

    fn remove(&mut self, client: &str) {
        let session = self.sessions.remove(client).unwrap_or_default();
        for filter in session.filters.keys() {
            self.subscriptions.remove(filter, client);
        }
    }

    fn remove_longest_away(&mut self) -> Result<(), ConnectCode> {
        let sessions = self.sessions.iter();
        let longest = sessions
            .filter(|(_, session)| session.conn.is_none())
            .min_by_key(|(_, session)| session.away_since)
            .map(|(client, _)| Rc::clone(client));
        let client = longest.ok_or(ConnectCode::ServerUnavailable)?;
        log::debug!("dropping the session of {client:?} for a new one");
        self.remove(&client);
        Ok(())
    }

    // Subscriptions.

    /// Returns the QoS that is granted, at most 1; `None` if a limit is exceeded.
    pub fn subscribe(&mut self, client: &Rc<str>, filter: &str, qos: Qos) -> Option<Qos> {
        let is_memory_full = self.is_memory_full();
        let session = self.sessions.get_mut(client)?;
        if !session.filters.contains_key(filter) {
            let levels = topics::levels(filter);
            if session.filters.len() >= self.limits.max_subscriptions
                || levels > self.limits.max_levels.into()
                || filter.len() > MAX_TEXT
                || is_memory_full
            {
                return None;
            }
            let charge = self
                .memory
                .charge(levels * Subscriptions::LEVEL + filter.len());
            session.filters.insert(filter.into(), charge);
        }
        let granted = qos.min(Qos::AtLeastOnce);
        self.subscriptions.insert(filter, client, granted);
        Some(granted)
    }

    pub fn unsubscribe(&mut self, client: &str, filter: &str) {
        if let Some(session) = self.sessions.get_mut(client) {
            session.filters.remove(filter);
            self.subscriptions.remove(filter, client);
        }
    }

    /// Sends the retained messages that match a subscription, or queues them.
    pub fn send_retained(
        &mut self,
        conn: &mut Conn<'_, Self>,
        client: &str,
        filter: &str,
        granted: Qos,
    ) {
        let Some(session) = self.sessions.get_mut(client) else {
            return;
        };
        let Some(mut conn) = session.conn.and_then(|id| conn.peer(id)) else {
            return;
        };
        // All of them find room, even if the queue is full of other messages.
        let max_queued = self
            .limits
            .max_queued
            .saturating_add(self.limits.max_retained);
        let window = self.limits.max_in_flight.into();
        let prefix = topics::prefix(filter);
        let range = (Bound::Included(prefix), Bound::Unbounded);
        let candidates = self.retained.range::<str, _>(range);
        let matching = candidates
            .take_while(|(topic, _)| topic.starts_with(prefix))
            .filter(|(topic, _)| topics::matches(filter, topic));
        for (_, message) in matching {
            let is_memory_full = self.memory.used() > self.limits.max_stored;
            if is_memory_full {
                // Messages that are sent at once take no memory.
                session.flush(&mut conn, window);
            }
            if session.queued() >= max_queued || is_memory_full && !session.is_idle() {
                self.counters.overflowed += 1;
                break;
            }
            session.push(Delivery::new(message, granted, true));
        }
        session.flush(&mut conn, window);
    }

    // Messages.

    /// Handles a message of a client. Returns the work of it, in visited levels and subscriptions.
    pub fn publish(&mut self, conn: &mut Conn<'_, Self>, publish: &Publish<'_>) -> usize {
        let message = Message::new(publish, &self.memory);
        self.distribute(conn, &message, publish.retain)
    }

    /// As [`Broker::publish`], for QoS 2: a message that was sent again is published once.
    pub fn publish_once(
        &mut self,
        conn: &mut Conn<'_, Self>,
        client: &str,
        publish: &Publish<'_>,
    ) -> Result<usize, Violation> {
        let Some(session) = self.sessions.get_mut(client) else {
            return Ok(0);
        };
        if session.unreleased.contains(&publish.id) {
            return Ok(0);
        }
        if session.unreleased.len() >= self.limits.max_unreleased {
            return Err(Violation("too many messages that are not released"));
        }
        session.unreleased.insert(publish.id);
        Ok(self.publish(conn, publish))
    }

    fn distribute(
        &mut self,
        conn: &mut Conn<'_, Self>,
        message: &Rc<Message>,
        retain: bool,
    ) -> usize {
        self.counters.published += 1;
        if retain {
            self.retain(message);
        }
        let Matching { clients, work } = self.subscriptions.matching(&message.topic);
        for (client, granted) in clients {
            self.deliver(conn, &client, Delivery::new(message, granted, false));
        }
        work
    }

    /// Keeps a message for later subscribers, in place of the topic's last one. A message without
    /// a payload only removes that.
    fn retain(&mut self, message: &Rc<Message>) {
        self.retained.remove(&message.topic);
        if message.payload.is_empty() {
            return;
        }
        if self.retained.len() >= self.limits.max_retained || self.is_memory_full() {
            self.counters.unretained += 1;
            return;
        }
        let topic = Rc::clone(&message.topic);
        self.retained.insert(topic, Rc::clone(message));
    }

    fn is_memory_full(&self) -> bool {
        self.memory.used() > self.limits.max_stored
    }

    /// Sends a message to a client. With QoS 1 it is queued if it cannot be sent at once.
    fn deliver(&mut self, conn: &mut Conn<'_, Self>, client: &str, delivery: Delivery) {
        let is_memory_full = self.is_memory_full();
        let Some(session) = self.sessions.get_mut(client) else {
            return;
        };
        let mut conn = session.conn.and_then(|id| conn.peer(id));
        if delivery.qos == Qos::AtMostOnce {
            match &conn {
                Some(conn) if conn.is_congested() => return self.counters.congested += 1,
                Some(_) => {}
                None => return,
            }
        }
        // However little memory there is, a client gets messages while it acknowledges them.
        let is_kept = conn.is_none() || !session.is_idle();
        if session.queued() >= self.limits.max_queued || is_kept && is_memory_full {
            self.counters.overflowed += 1;
            return;
        }
        session.push(delivery);
        if let Some(conn) = &mut conn {
            session.flush(conn, self.limits.max_in_flight.into());
        }
    }

    /// Sends queued messages of a client, as far as possible now.
    pub fn flush(&mut self, conn: &mut Conn<'_, Self>, client: &str) {
        let Some(session) = self.sessions.get_mut(client) else {
            return;
        };
        if let Some(mut conn) = session.conn.and_then(|id| conn.peer(id)) {
            session.flush(&mut conn, self.limits.max_in_flight.into());
        }
    }
}
