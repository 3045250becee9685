//! Frames and messages from handles for connections that have not opened yet: they are delivered
//! in order once the connection is open.

use std::collections::{BTreeMap, VecDeque};

use crate::config::QueueLimits;
use crate::handler::Message;
use crate::id::ConnId;
use crate::proto::Chunk;

/// A command for one connection.
pub(super) enum ForConn {
    Send(Chunk<'static>),
    Notify(Message),
}

impl ForConn {
    fn bytes(&self) -> usize {
        let owned = match self {
            Self::Send(frame) => frame.memory(),
            Self::Notify(message) => size_of_val(&**message),
        };
        size_of::<Self>() + owned
    }
}

#[derive(Default)]
pub(super) struct Deferred {
    waiting: BTreeMap<ConnId, VecDeque<ForConn>>,
    /// Connections that have opened since, in that order. Some have nothing left, or have ended.
    opened: VecDeque<ConnId>,
    /// Connections that have opened and do not close by themselves yet, in that order, each with
    /// the number of commands from handles that were queued until then. Some have ended.
    held: VecDeque<(u64, ConnId)>,
    commands: usize,
    bytes: usize,
}

impl Deferred {
    /// Whether commands are due, or the end of a hold.
    pub(super) fn is_due(&self) -> bool {
        !self.opened.is_empty() || !self.held.is_empty()
    }

    pub(super) fn has(&self, id: ConnId) -> bool {
        self.waiting.contains_key(&id)
    }

    /// Number of commands.
    pub(super) fn len(&self) -> usize {
        self.commands
    }

    /// Returns the command if there is no room: together they take no more than a queue of
    /// commands.
    pub(super) fn push(
        &mut self,
        id: ConnId,
        command: ForConn,
        limits: QueueLimits,
    ) -> Result<(), ForConn> {
        // The command of the same broadcast that was charged may be carried out before.
        let command = match command {
            ForConn::Send(frame) => ForConn::Send(frame.count()),
            command => command,
        };
        let bytes = command.bytes();
        let fits = self.bytes == 0 || self.bytes.saturating_add(bytes) <= limits.bytes;
        if self.commands >= limits.commands || !fits {
            return Err(command);
        }
        self.commands += 1;
        self.bytes += bytes;
        self.waiting.entry(id).or_default().push_back(command);
        Ok(())
    }

    /// The connection has opened. `queued`: the number of commands from handles so far, if some of
    /// them are not carried out. True if the connection is held: its commands come first, those
    /// that are still queued too.
    pub(super) fn open(&mut self, id: ConnId, queued: Option<u64>) -> bool {
        let is_due = self.has(id);
        if is_due {
            self.opened.push_back(id);
        }
        let is_held = is_due || queued.is_some();
        if is_held {
            self.held.push_back((queued.unwrap_or(0), id));
        }
        is_held
    }

    /// The next connection that is held no more, once the first `done` commands are carried out.
    pub(super) fn next_released(&mut self, done: u64) -> Option<ConnId> {
        let &(queued, id) = self.held.front()?;
        if queued > done || self.has(id) {
            return None;
        }
        self.held.pop_front();
        Some(id)
    }

    #[cfg(feature = "sim")]
    pub(super) fn holds(&self, id: ConnId) -> bool {
        self.held.iter().any(|&(_, held)| held == id)
    }

    /// The next command that is due.
    pub(super) fn next_due(&mut self) -> Option<(ConnId, ForConn)> {
        while let Some(&id) = self.opened.front() {
            if let Some(command) = self.pop(id) {
                return Some((id, command));
            }
            self.opened.pop_front();
        }
        None
    }

    fn pop(&mut self, id: ConnId) -> Option<ForConn> {
        let waiting = self.waiting.get_mut(&id)?;
        let command = waiting.pop_front();
        if waiting.is_empty() {
            self.waiting.remove(&id);
        }
        self.forget(command.as_ref());
        command
    }

    /// The connection has ended: returns what was not delivered.
    #[must_use = "destructors of messages are foreign code"]
    pub(super) fn remove(&mut self, id: ConnId) -> VecDeque<ForConn> {
        let removed = self.waiting.remove(&id).unwrap_or_default();
        for command in &removed {
            self.forget(Some(command));
        }
        removed
    }

    /// All commands, once the server ends.
    #[must_use = "destructors of messages are foreign code"]
    pub(super) fn take_all(&mut self) -> impl Iterator<Item = ForConn> {
        std::mem::take(self).waiting.into_values().flatten()
    }

    fn forget(&mut self, command: Option<&ForConn>) {
        self.commands -= usize::from(command.is_some());
        self.bytes -= command.map_or(0, ForConn::bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::ServerNumber;

    fn id(index: u32) -> ConnId {
        ConnId::new(ServerNumber::NONE, index, 1)
    }

    fn frame(byte: u8) -> ForConn {
        ForConn::Send(Chunk::Owned(vec![byte]))
    }

    fn due(deferred: &mut Deferred) -> Option<(ConnId, u8)> {
        match deferred.next_due()? {
            (id, ForConn::Send(frame)) => Some((id, frame.bytes()[0])),
            (id, ForConn::Notify(_)) => Some((id, 0)),
        }
    }

    #[test]
    fn commands_are_due_in_order_once_their_connection_opens() {
        let (mut deferred, limits) = (Deferred::default(), QueueLimits::default());
        for (index, byte) in [(1, 1), (2, 2), (1, 3)] {
            let pushed = deferred.push(id(index), frame(byte), limits);
            assert!(pushed.is_ok());
        }
        assert!(due(&mut deferred).is_none() && !deferred.is_due());
        assert!(!deferred.open(id(3), None) && deferred.open(id(1), None));
        assert_eq!(due(&mut deferred), Some((id(1), 1)));
        assert_eq!(due(&mut deferred), Some((id(1), 3)));
        assert!(due(&mut deferred).is_none() && !deferred.has(id(1)));
        assert_eq!(deferred.remove(id(2)).len(), 1);
        assert_eq!((deferred.len(), deferred.bytes), (0, 0));
        assert!(deferred.waiting.is_empty());
    }

    #[test]
    fn a_connection_is_held_until_its_commands_are_carried_out() {
        let mut deferred = Deferred::default();
        let pushed = deferred.push(id(1), frame(1), QueueLimits::default());
        assert!(pushed.is_ok());
        assert!(deferred.open(id(1), Some(4)) && deferred.open(id(2), Some(5)));
        assert_eq!(deferred.next_released(4), None);
        assert_eq!(due(&mut deferred), Some((id(1), 1)));
        assert_eq!(deferred.next_released(3), None);
        assert_eq!(deferred.next_released(4), Some(id(1)));
        assert_eq!(deferred.next_released(4), None);
        assert_eq!(deferred.next_released(5), Some(id(2)));
        assert!(due(&mut deferred).is_none() && !deferred.is_due());
    }

    #[test]
    fn they_are_bounded() {
        let mut deferred = Deferred::default();
        let limits = QueueLimits {
            commands: 2,
            ..QueueLimits::default()
        };
        for expected in [true, true, false] {
            let pushed = deferred.push(id(1), frame(1), limits);
            assert_eq!(pushed.is_ok(), expected);
        }
        let limits = QueueLimits {
            bytes: 1,
            ..QueueLimits::default()
        };
        let mut deferred = Deferred::default();
        for expected in [true, false] {
            let pushed = deferred.push(id(1), frame(1), limits);
            assert_eq!(pushed.is_ok(), expected, "one of any size");
        }
    }
}
