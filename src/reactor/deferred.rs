//! Frames and messages for connections that are not open yet, and messages from other callbacks.
//! They are delivered in order once the connection is open, and before a close behind them.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::connections::Connections;
use crate::config::QueueLimits;
use crate::handle::HandleError;
use crate::handler::Message;
use crate::id::ConnId;
use crate::proto::{Chunk, Time};
use crate::reason::Close;

/// A command for one connection.
pub(super) enum ForConn {
    Send(Chunk<'static>),
    Notify(Message),
    /// The last one.
    Close(Close),
}

impl ForConn {
    fn bytes(&self) -> usize {
        let owned = match self {
            Self::Send(frame) => frame.memory(),
            Self::Notify(message) => size_of_val(&**message),
            Self::Close(_) => 0,
        };
        size_of::<Self>() + owned
    }

    /// If it is not delivered, it counts as undeliverable.
    pub(super) fn is_counted(&self) -> bool {
        !matches!(self, Self::Close(_))
    }
}

#[derive(Default)]
pub(super) struct Deferred {
    waiting: BTreeMap<ConnId, VecDeque<ForConn>>,
    /// Open connections with commands, in the order in which they began to have some. Some have
    /// ended.
    opened: VecDeque<ConnId>,
    /// Connections that have opened and do not close by themselves yet, in that order, each with
    /// the number of commands from handles that were queued until then. Some have ended.
    held: VecDeque<(u64, ConnId)>,
    /// Connections that do not close by themselves before the last of their own commands.
    held_by_own: BTreeSet<ConnId>,
    commands: usize,
    bytes: usize,
    /// Number of closes among the commands.
    closes: usize,
    /// The connection whose message is being delivered: until its close it may send.
    delivering: Option<ConnId>,
}

impl Deferred {
    /// Whether commands are due, or the end of a hold.
    pub(super) fn is_due(&self) -> bool {
        !self.opened.is_empty() || self.holds_some()
    }

    /// Whether a connection may be held until the commands that were queued are carried out.
    pub(super) fn holds_some(&self) -> bool {
        !self.held.is_empty()
    }

    pub(super) fn has(&self, id: ConnId) -> bool {
        self.waiting.contains_key(&id)
    }

    /// A close of the connection is asked for: if its handler is receiving a message, that handler
    /// sends no more.
    pub(super) fn begin_close(&mut self, id: ConnId) {
        if self.delivering == Some(id) {
            self.delivering = None;
        }
    }

    /// The connection closes behind its messages: only their deliveries may still send to it.
    #[inline]
    pub(super) fn refuses_output(&self, id: ConnId) -> bool {
        self.closes > 0 && self.is_closing(id)
    }

    #[cold]
    fn is_closing(&self, id: ConnId) -> bool {
        self.delivering != Some(id) && self.will_close(id)
    }

    /// A message is delivered to this connection, or (`None`) was delivered.
    pub(super) fn set_delivering(&mut self, id: Option<ConnId>) {
        self.delivering = id;
    }

    /// A close is the connection's last command.
    pub(super) fn will_close(&self, id: ConnId) -> bool {
        let last = self.waiting.get(&id).and_then(VecDeque::back);
        matches!(last, Some(ForConn::Close(_)))
    }

    /// Number of commands, closes included.
    pub(super) fn count(&self) -> usize {
        self.commands + self.closes
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
        self.add(id, command);
        Ok(())
    }

    /// Gives an open connection a message, with its next commands; one that is not open yet once
    /// it is.
    pub(super) fn notify<S>(
        &mut self,
        conns: &mut Connections<S>,
        id: ConnId,
        message: Message,
        limits: QueueLimits,
    ) -> Result<(), (HandleError, Message)> {
        let machine = conns
            .parts(id)
            .map(|(conn, pool)| (&mut conn.machine, pool));
        let Some((machine, pool)) = machine
            .filter(|(machine, _)| machine.takes_messages() || machine.will_open())
            .filter(|_| !self.will_close(id))
        else {
            return Err((HandleError::NoConnection(id), message));
        };
        let begins = machine.takes_messages() && !self.has(id);
        match self.push(id, ForConn::Notify(message), limits) {
            Err(ForConn::Notify(message)) => return Err((HandleError::QueueFull, message)),
            // It returns what it was given.
            Err(_) => return Ok(()),
            Ok(()) => {}
        }
        if begins {
            self.opened.push_back(id);
            // The defaults of `on_finish` and `on_drain` wait.
            if !machine.awaits_commands() {
                machine.await_commands(pool);
                self.held_by_own.insert(id);
            }
        }
        Ok(())
    }

    /// Closes an open connection behind the commands that wait for it, and delivers no more frames
    /// until then. Returns `close` if there are none, or if it is to abort.
    pub(super) fn close_behind<S>(
        &mut self,
        conns: &mut Connections<S>,
        id: ConnId,
        close: Close,
        now: Time,
    ) -> Option<Close> {
        if self.waiting.is_empty() {
            return Some(close);
        }
        let parts = conns
            .parts(id)
            .filter(|(conn, _)| conn.machine.takes_messages());
        let Some((conn, pool)) = parts.filter(|_| self.has(id) && !close.abort) else {
            return Some(close);
        };
        conn.machine.stop_frames(now, pool);
        self.add(id, ForConn::Close(close));
        None
    }

    fn add(&mut self, id: ConnId, command: ForConn) {
        self.commands += usize::from(command.is_counted());
        self.closes += usize::from(!command.is_counted());
        self.bytes += command.bytes();
        self.waiting.entry(id).or_default().push_back(command);
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

    /// The next connection that is held no more, once the first `done` commands are carried out. A
    /// connection that has commands of its own is held until the last of them.
    pub(super) fn next_released(&mut self, done: u64) -> Option<ConnId> {
        while let Some(&(queued, id)) = self.held.front() {
            if queued > done {
                return None;
            }
            self.held.pop_front();
            if !self.has(id) {
                return Some(id);
            }
            self.held_by_own.insert(id);
        }
        None
    }

    /// Whether a connection is held no more, now that one of its commands is carried out.
    pub(super) fn is_released(&mut self, id: ConnId) -> bool {
        !self.held_by_own.is_empty() && !self.has(id) && self.held_by_own.remove(&id)
    }

    #[cfg(feature = "sim")]
    pub(super) fn holds(&self, id: ConnId) -> bool {
        self.held_by_own.contains(&id) || self.held.iter().any(|&(_, held)| held == id)
    }

    /// The next command that is due.
    pub(super) fn next_due(&mut self) -> Option<(ConnId, ForConn)> {
        while let Some(&id) = self.opened.front() {
            let command = self.pop(id);
            if !self.has(id) {
                // Its next commands queue behind those of others.
                self.opened.pop_front();
            }
            if let Some(command) = command {
                return Some((id, command));
            }
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
        self.held_by_own.remove(&id);
        let removed = self.waiting.remove(&id).unwrap_or_default();
        for command in &removed {
            self.forget(Some(command));
        }
        removed
    }

    /// All commands, once the server ends.
    #[must_use = "destructors of messages are foreign code"]
    pub(super) fn take_all(&mut self) -> impl Iterator<Item = ForConn> + use<> {
        std::mem::take(self).waiting.into_values().flatten()
    }

    fn forget(&mut self, command: Option<&ForConn>) {
        let Some(command) = command else {
            return;
        };
        self.commands -= usize::from(command.is_counted());
        self.closes -= usize::from(!command.is_counted());
        self.bytes -= command.bytes();
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
            (id, ForConn::Notify(_) | ForConn::Close(_)) => Some((id, 0)),
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
        assert!(deferred.is_released(id(1)) && !deferred.is_released(id(1)));
        assert_eq!(deferred.next_released(4), None);
        assert_eq!(deferred.next_released(5), Some(id(2)));
        assert!(due(&mut deferred).is_none() && !deferred.is_due());
    }

    /// It takes no room from commands, and refuses output while it is the last.
    #[test]
    fn a_close_is_counted_apart() {
        let mut deferred = Deferred::default();
        let pushed = deferred.push(id(1), frame(1), QueueLimits::default());
        assert!(pushed.is_ok());
        assert!(!deferred.refuses_output(id(1)));
        deferred.add(id(1), ForConn::Close(Close::abort()));
        assert_eq!((deferred.len(), deferred.count()), (1, 2));
        assert!(deferred.refuses_output(id(1)) && !deferred.refuses_output(id(2)));
        assert!(deferred.open(id(1), None));
        assert_eq!(due(&mut deferred), Some((id(1), 1)));
        assert_eq!((deferred.len(), deferred.count()), (0, 1));
        assert_eq!(due(&mut deferred), Some((id(1), 0)));
        assert_eq!(deferred.count(), 0);
        assert!(!deferred.refuses_output(id(1)));
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
