//! What can happen to one connection, and what can be seen of it: the words of [`ConnModel`](super::ConnModel).

use crate::proto::Framing;
use crate::reason::CloseReason;

/// One thing that happens to one connection. Those from outside are noticed at the next [`Input::Turn`] or
/// [`Input::Step`], in any combination.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[cfg_attr(feature = "arbitrary", derive(arbitrary::Arbitrary))]
#[non_exhaustive]
pub enum Input {
    /// The service admits the peer, once. An outgoing connection comes about.
    Admit,
    /// Bytes arrive from the peer, unless it has finished or is gone.
    Bytes(Vec<u8>),
    /// The peer's FIN arrives.
    Finish,
    /// The peer's RST arrives: what is there can be read, then reads and writes fail (ECONNRESET).
    Reset,
    /// Writes fail from now on (EPIPE), and nothing announces it.
    BreakPipe,
    /// The kernel's send buffer has room for so many bytes, `u16::MAX` for any number, and says so unless it is 0.
    Room(u16),
    /// An event that means nothing.
    Spurious,
    /// The connection's turn: it reads, calls its handler, and writes, until there is nothing left to do.
    Turn,
    /// One round of a turn: the budget is used up after it.
    Step,
    /// The clock goes on and nobody looks at it.
    Pass {
        /// By how much.
        millis: u16,
    },
    /// A turn, and then what is due by now is judged.
    Judge,
    /// The clock goes on to the next deadline, if one is armed, and it is judged.
    Expire,
    /// What the handler does with each frame from now on, in this order.
    OnFrame(Vec<Action>),
    /// What the handler does from now on when the peer has finished, and when the server drains.
    OnEnd(Vec<Action>),
    /// Somebody outside does this now, between two turns: a neighbour's callback, or a command of another thread.
    Act(Action),
    /// The server drains.
    Drain,
    /// The drain's deadline is over.
    CutShort,
}

/// What a handler does with its connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[cfg_attr(feature = "arbitrary", derive(arbitrary::Arbitrary))]
#[non_exhaustive]
pub enum Action {
    /// Sends the frame back. Outside [`Input::OnFrame`], an empty one.
    Echo,
    /// Sends a frame of so many bytes.
    Send(u8),
    /// [`Conn::pause`](crate::Conn::pause).
    Pause,
    /// [`Conn::resume`](crate::Conn::resume).
    Resume,
    /// [`Conn::close`](crate::Conn::close).
    Close,
    /// [`Conn::close_after_input`](crate::Conn::close_after_input).
    CloseAfterInput,
    /// [`Conn::finish`](crate::Conn::finish).
    Finish,
    /// [`Conn::abort`](crate::Conn::abort).
    Abort,
    /// Returns an error.
    Fail,
    /// Panics.
    Panic,
    /// [`Conn::set_timer`](crate::Conn::set_timer), in milliseconds.
    Timer(u8),
    /// [`Conn::set_framing`](crate::Conn::set_framing), to the framing of this number.
    Framing(u8),
    /// [`Conn::set_max_frame`](crate::Conn::set_max_frame).
    MaxFrame(u8),
}

impl Action {
    /// The framing that [`Action::Framing`] means by this number.
    pub fn framing(number: u8) -> Framing {
        match number % 6 {
            0 => Framing::Raw,
            1 => Framing::Packet1,
            2 => Framing::Packet2,
            3 => Framing::Packet4,
            4 => Framing::Line,
            _ => Framing::Delimited(0),
        }
    }
}

/// What the handler was told.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Told {
    /// [`Handler::on_open`](crate::Handler::on_open)
    Opened,
    /// [`Handler::on_secured`](crate::Handler::on_secured)
    Secured,
    /// [`Handler::on_frame`](crate::Handler::on_frame)
    Frame(Vec<u8>),
    /// [`Handler::on_finish`](crate::Handler::on_finish)
    Finished,
    /// [`Handler::on_writable`](crate::Handler::on_writable)
    Writable,
    /// [`Handler::on_timer`](crate::Handler::on_timer)
    Timer(u8),
    /// [`Handler::on_drain`](crate::Handler::on_drain)
    Drain,
}

/// How it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct End {
    /// The one reason.
    pub reason: CloseReason,
    /// With RST.
    pub reset: bool,
}
