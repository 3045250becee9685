//! One connection of the model: its states, its deadlines, and what its turn does.

use crate::{Fault, Flaw, Setting};

/// Unread bytes of one connection. Only what they are worth counts: the rest of the bytes is below
/// the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Wire {
    #[default]
    Nothing,
    /// Bytes that complete nothing.
    Part,
    /// Bytes that complete what the connection waits for: its header, its handshake, its frame.
    Whole,
    /// The peer has reset the connection.
    Reset,
}

/// One connection, from accept to the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Conn {
    pub life: Life,
    pub wire: Wire,
    /// The peer sends no more.
    pub half_closed: bool,
    /// The grace for connections that have not sent a frame is over: this one may be evicted.
    pub evictable: bool,
}

/// The states of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Life {
    /// Waits for its PROXY header.
    Accepting,
    /// Waits for TLS.
    Handshaking,
    Open(Open),
    Closing(Closing),
}

/// What an open connection remembers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct Open {
    /// It has sent a frame.
    pub proven: bool,
    /// A frame has begun.
    pub inside_frame: bool,
    /// Output that the kernel has not accepted.
    pub output: bool,
    /// The idle deadline lies behind the time at which its timer fires.
    pub idle_moved: bool,
    /// The frame deadline does. Never, without a fault.
    pub frame_moved: bool,
    /// The handler knows that the peer sends no more, and has kept the connection.
    pub finished: bool,
    /// The handler knows of the drain, and has kept the connection.
    pub notified: bool,
}

impl Open {
    /// Why the connection ends if its handler closes it now.
    fn close_reason(&self, draining: bool) -> Reason {
        match (self.finished, draining) {
            (true, _) => Reason::Finished,
            (false, true) => Reason::Drained,
            (false, false) => Reason::Closed,
        }
    }

    /// Whether the handler has yet to hear of the drain.
    fn asked_to_drain(&self, draining: bool) -> bool {
        draining && !self.notified
    }
}

/// What a closing connection remembers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Closing {
    pub reason: Reason,
    /// Output that the kernel has not accepted.
    pub output: bool,
    /// The write side is shut down.
    pub fin: bool,
    /// It was open before: `on_close` is owed.
    pub opened: bool,
}

/// Why a connection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Reason {
    /// EOF between frames.
    Finished,
    /// EOF inside a frame.
    Truncated,
    /// EOF before it was open.
    ClosedEarly,
    /// The peer reset it.
    Reset,
    /// Bytes that are no header or no frame.
    Malformed,
    /// Bytes that are no TLS, or EOF inside the handshake.
    HandshakeFailed,
    /// Access rules denied it.
    Denied,
    /// The service refused it.
    Refused,
    /// The cap was reached, and the listener refuses.
    AtCapacity,
    /// The handler closed it.
    Closed,
    /// The handler aborted it.
    Aborted,
    /// The handler panicked.
    Panicked,
    HandshakeTimeout,
    FrameTimeout,
    IdleTimeout,
    WriteTimeout,
    /// It made room for another client.
    Evicted,
    /// The server drains, and it ended in order.
    Drained,
    /// It did not end within the drain's time.
    DrainTimeout,
    /// The server stopped.
    Stopped,
}

impl Reason {
    pub const ALL: [Reason; 20] = [
        Reason::Finished,
        Reason::Truncated,
        Reason::ClosedEarly,
        Reason::Reset,
        Reason::Malformed,
        Reason::HandshakeFailed,
        Reason::Denied,
        Reason::Refused,
        Reason::AtCapacity,
        Reason::Closed,
        Reason::Aborted,
        Reason::Panicked,
        Reason::HandshakeTimeout,
        Reason::FrameTimeout,
        Reason::IdleTimeout,
        Reason::WriteTimeout,
        Reason::Evicted,
        Reason::Drained,
        Reason::DrainTimeout,
        Reason::Stopped,
    ];

    /// Whether a connection that ends so promises that nothing was lost.
    fn loses_nothing(self) -> bool {
        matches!(self, Reason::Finished | Reason::Closed | Reason::Drained)
    }
}

/// The deadlines of section 3.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Deadline {
    Handshake,
    /// The grace, at the cap, of a connection that has not sent a frame.
    FirstFrame,
    Frame,
    Idle,
    Write,
    Closing,
}

impl Deadline {
    pub const ALL: [Deadline; 6] = [
        Deadline::Handshake,
        Deadline::FirstFrame,
        Deadline::Frame,
        Deadline::Idle,
        Deadline::Write,
        Deadline::Closing,
    ];
}

/// What the connection's turn makes of the bytes: the part that depends on their content and on the
/// handler.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Reaction {
    /// Goes on. With no input: flushes, shuts down, or ends.
    Proceed,
    /// Sends, and the kernel does not accept all of it.
    Send,
    /// The bytes are malformed.
    Malformed,
    /// Access rules or the service refuse the client.
    Refuse,
    /// The handler closes in order.
    Close,
    /// The handler aborts.
    Abort,
    /// The handler panics.
    Panic,
}

/// What became of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    Lives(Conn),
    Ended(Reason),
}

/// A step of a connection: what became of it, and what must not have happened.
pub struct Step {
    pub fate: Fate,
    pub flaw: Option<Flaw>,
}

impl From<Fate> for Step {
    fn from(fate: Fate) -> Self {
        Step { fate, flaw: None }
    }
}

impl Conn {
    /// A connection that was accepted just now.
    pub fn accepted(setting: &Setting) -> Conn {
        let life = if setting.proxy {
            Life::Accepting
        } else {
            Life::beyond_header(setting)
        };
        Conn {
            life,
            wire: Wire::Nothing,
            half_closed: false,
            evictable: false,
        }
    }

    /// Whether `on_open` has run.
    pub fn opened(&self) -> bool {
        match self.life {
            Life::Accepting | Life::Handshaking => false,
            Life::Open(_) => true,
            Life::Closing(closing) => closing.opened,
        }
    }

    /// Whether it may be evicted: it has not sent a frame yet, and has not begun to end in order.
    pub fn pending(&self) -> bool {
        match self.life {
            Life::Accepting | Life::Handshaking => true,
            Life::Open(open) => !open.proven,
            Life::Closing(closing) => !closing.opened,
        }
    }

    /// Output that would be lost.
    fn output(&self) -> bool {
        match self.life {
            Life::Accepting | Life::Handshaking => false,
            Life::Open(open) => open.output,
            Life::Closing(closing) => closing.output,
        }
    }

    /// The deadlines in force.
    pub fn deadlines(&self, setting: &Setting) -> impl Iterator<Item = Deadline> {
        let Conn {
            life, evictable, ..
        } = *self;
        let grace = setting.evicts && self.pending() && !evictable;
        let faulty = setting.has(Fault::ClosingWithoutDeadline);
        Deadline::ALL
            .into_iter()
            .filter(move |deadline| match (life, deadline) {
                (_, Deadline::FirstFrame) => grace,
                (Life::Accepting | Life::Handshaking, Deadline::Handshake) => true,
                (Life::Open(_), Deadline::Idle) => true,
                (Life::Open(open), Deadline::Frame) => open.inside_frame,
                (Life::Open(open), Deadline::Write) => open.output,
                (Life::Closing(_), Deadline::Closing) => !faulty,
                _ => false,
            })
    }

    /// Whether there is something to do without waiting.
    pub fn has_turn(&self, draining: bool) -> bool {
        if self.wire != Wire::Nothing {
            return true;
        }
        match self.life {
            Life::Accepting | Life::Handshaking => self.half_closed,
            Life::Open(open) => {
                (self.half_closed && !open.finished) || open.asked_to_drain(draining)
            }
            Life::Closing(closing) => !closing.output && (!closing.fin || self.half_closed),
        }
    }

    /// What the content of the bytes and the handler may make of the turn.
    pub fn reactions(&self, setting: &Setting, draining: bool) -> &'static [Reaction] {
        use Reaction::{Abort, Close, Malformed, Panic, Proceed, Refuse, Send};
        match (self.life, self.wire) {
            (Life::Accepting, Wire::Whole) => &[Proceed, Malformed, Refuse],
            // The service is asked before TLS begins.
            (Life::Handshaking, Wire::Whole) => &[Proceed, Malformed],
            (Life::Open(_), Wire::Whole) if !setting.reactions => &[Proceed, Close],
            (Life::Open(_), Wire::Whole) => &[Proceed, Send, Malformed, Close, Abort, Panic],
            // The peer has half-closed, or the server drains: the handler is asked.
            (Life::Open(open), Wire::Nothing)
                if !open.inside_frame || open.asked_to_drain(draining) =>
            {
                if setting.reactions {
                    &[Proceed, Close, Abort, Panic]
                } else {
                    &[Close]
                }
            }
            _ => &[Proceed],
        }
    }

    /// Runs the connection's turn.
    pub fn turn(mut self, setting: &Setting, reaction: Reaction, draining: bool) -> Step {
        let wire = std::mem::take(&mut self.wire);
        if wire == Wire::Reset {
            return self.cut_short(Reason::Reset);
        }
        match self.life {
            Life::Accepting | Life::Handshaking => self.turn_before_open(setting, wire, reaction),
            Life::Open(open) => self.turn_open(setting, wire, open, reaction, draining),
            Life::Closing(closing) => self.turn_closing(setting, wire, closing),
        }
    }

    fn turn_before_open(mut self, setting: &Setting, wire: Wire, reaction: Reaction) -> Step {
        match (wire, reaction) {
            (Wire::Whole, Reaction::Proceed) => {
                self.life = match self.life {
                    Life::Accepting => Life::beyond_header(setting),
                    _ => Life::Open(Open::default()),
                };
                Fate::Lives(self).into()
            }
            (Wire::Whole, Reaction::Refuse) => self.closes(Reason::Refused),
            (Wire::Whole, _) if self.life == Life::Handshaking => {
                self.closes(Reason::HandshakeFailed)
            }
            (Wire::Whole, _) => self.closes(Reason::Malformed),
            (Wire::Nothing, _) if self.half_closed && self.life == Life::Handshaking => {
                self.ended(Reason::HandshakeFailed)
            }
            (Wire::Nothing, _) if self.half_closed => self.ended(Reason::ClosedEarly),
            _ => Fate::Lives(self).into(),
        }
    }

    fn turn_open(
        mut self,
        setting: &Setting,
        wire: Wire,
        mut open: Open,
        reaction: Reaction,
        draining: bool,
    ) -> Step {
        // Only bytes of the peer move the idle deadline.
        open.idle_moved |= wire != Wire::Nothing;
        match wire {
            Wire::Part => {
                let moves = setting.has(Fault::TrickleMovesFrameDeadline);
                open.frame_moved |= open.inside_frame && moves;
                open.inside_frame = true;
                self.life = Life::Open(open);
                return Fate::Lives(self).into();
            }
            Wire::Whole => {
                open.inside_frame = false;
                open.frame_moved = false;
                open.proven = true;
                self.evictable = false;
            }
            _ if open.asked_to_drain(draining) => open.notified = true,
            _ if open.inside_frame => return self.closes(Reason::Truncated),
            _ => open.finished = true,
        }
        open.output |= reaction == Reaction::Send;
        self.life = Life::Open(open);
        match reaction {
            Reaction::Proceed | Reaction::Send | Reaction::Refuse => Fate::Lives(self).into(),
            Reaction::Malformed => self.closes(Reason::Malformed),
            Reaction::Close => self.closes(open.close_reason(draining)),
            Reaction::Abort => self.ended(Reason::Aborted),
            Reaction::Panic => self.closes(Reason::Panicked),
        }
    }

    /// Discards input, flushes, shuts down, and ends when the peer has.
    fn turn_closing(mut self, setting: &Setting, wire: Wire, mut closing: Closing) -> Step {
        if wire != Wire::Nothing {
            let flaw = setting
                .has(Fault::ClosingDelivers)
                .then_some(Flaw::DeliveredAfterClose);
            return Step {
                fate: Fate::Lives(self),
                flaw,
            };
        }
        if closing.fin && self.half_closed {
            return self.ended(closing.reason);
        }
        closing.fin = true;
        self.life = Life::Closing(closing);
        if self.half_closed {
            self.ended(closing.reason)
        } else {
            Fate::Lives(self).into()
        }
    }

    /// A timer fires: it compares, and re-arms if the deadline has moved.
    pub fn expire(mut self, setting: &Setting, deadline: Deadline) -> Step {
        match (self.life, deadline) {
            (_, Deadline::FirstFrame) => {
                self.evictable = true;
                Fate::Lives(self).into()
            }
            // There is nothing to flush yet.
            (_, Deadline::Handshake) => self.ended(Reason::HandshakeTimeout),
            (Life::Open(open), Deadline::Idle) if open.idle_moved => {
                self.life = Life::Open(Open {
                    idle_moved: false,
                    ..open
                });
                Fate::Lives(self).into()
            }
            (_, Deadline::Idle) => self.closes(Reason::IdleTimeout),
            (Life::Open(open), Deadline::Frame) if open.frame_moved => {
                self.life = Life::Open(Open {
                    frame_moved: false,
                    ..open
                });
                Fate::Lives(self).into()
            }
            (_, Deadline::Frame) => self.closes(Reason::FrameTimeout),
            // What the peer does not take is not flushed either.
            (_, Deadline::Write) => self.ended(Reason::WriteTimeout),
            (Life::Closing(closing), Deadline::Closing) if setting.has(Fault::SilentLoss) => {
                self.ended(closing.reason)
            }
            (Life::Closing(_), Deadline::Closing) => self.cut_short(Reason::WriteTimeout),
            (_, Deadline::Closing) => Fate::Lives(self).into(),
        }
    }

    /// The handler acts outside its turn: in a timer, or for a message.
    pub fn local(mut self, setting: &Setting, reaction: Reaction, draining: bool) -> Step {
        let Life::Open(open) = self.life else {
            return Fate::Lives(self).into();
        };
        match reaction {
            Reaction::Close => self.closes(open.close_reason(draining)),
            Reaction::Abort => self.ended(Reason::Aborted),
            Reaction::Panic => self.closes(Reason::Panicked),
            _ => {
                let idle_moved = open.idle_moved || setting.has(Fault::OwnSendsMoveIdle);
                self.life = Life::Open(Open {
                    output: true,
                    idle_moved,
                    ..open
                });
                Fate::Lives(self).into()
            }
        }
    }

    /// The peer takes pending output.
    pub fn take_output(mut self) -> Option<Conn> {
        match &mut self.life {
            Life::Open(Open { output, .. }) | Life::Closing(Closing { output, .. }) if *output => {
                *output = false;
                Some(self)
            }
            _ => None,
        }
    }

    /// Closes in order: the end comes later.
    fn closes(mut self, reason: Reason) -> Step {
        let (output, opened) = (self.output(), self.opened());
        self.life = Life::Closing(Closing {
            reason,
            output,
            fin: false,
            opened,
        });
        self.evictable &= !opened;
        // Nothing of it will be delivered, so that it does not matter any more what it is worth.
        if self.wire == Wire::Whole {
            self.wire = Wire::Part;
        }
        Fate::Lives(self).into()
    }

    /// Ends at once. The reason is that of the close, if it has lost nothing.
    pub fn cut_short(self, reason: Reason) -> Step {
        match self.life {
            Life::Closing(closing) if !closing.output => self.ended(closing.reason),
            _ => self.ended(reason),
        }
    }

    /// Ends at once.
    pub fn ended(self, reason: Reason) -> Step {
        let lost = self.output() && reason.loses_nothing();
        Step {
            fate: Fate::Ended(reason),
            flaw: lost.then_some(Flaw::SilentLoss),
        }
    }
}

impl Life {
    fn beyond_header(setting: &Setting) -> Life {
        if setting.tls {
            Life::Handshaking
        } else {
            Life::Open(Open::default())
        }
    }
}
