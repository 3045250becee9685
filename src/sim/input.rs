//! Inputs of one connection, and their visible results: the vocabulary of
//! [`ConnModel`](super::ConnModel).

use crate::proto::Framing;
use crate::reason::CloseReason;

/// One input of one connection. Inputs from outside are noticed at the next [`Input::Turn`] or
/// [`Input::Step`], in any combination.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Input {
    /// The service admits the peer, once. An outgoing connection gets connected.
    Admit,
    /// Bytes arrive from the peer, unless it has finished or is gone.
    Bytes(Vec<u8>),
    /// The peer's FIN arrives.
    Finish,
    /// The peer's RST arrives: received bytes can be read, then reads and writes fail (ECONNRESET).
    Reset,
    /// Writes fail from now on (EPIPE), and nothing announces it.
    BreakPipe,
    /// The next read or write finds no memory (ENOBUFS).
    OutOfMemory,
    /// The kernel's send buffer has room for this number of bytes, `u16::MAX` for any number.
    /// Unless it is 0, an event announces it.
    Room(u16),
    /// A spurious event.
    Spurious,
    /// The connection's turn: it reads, calls its handler, and writes, until nothing is left to do.
    Turn,
    /// A turn with a budget of one frame.
    Step,
    /// The clock advances, without a turn.
    Pass {
        /// The time.
        millis: u16,
    },
    /// A turn, after which deadlines that are due expire.
    ExpireDue,
    /// The clock advances to the next deadline, if one is armed, and that expires.
    Expire,
    /// The handler's actions for each frame from now on, in this order.
    OnFrame(Vec<Action>),
    /// The handler's actions from now on when the peer has finished, and when the server drains.
    OnEnd(Vec<Action>),
    /// An action from outside, between two turns: another connection's callback, or a command of
    /// another thread.
    Act(Action),
    /// The server drains.
    Drain,
    /// The drain's deadline has passed.
    CutShort,
}

/// An action of a handler on its connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Action {
    /// Sends the frame back. Outside [`Input::OnFrame`], an empty one.
    Echo,
    /// Sends a frame of this number of bytes.
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
    /// [`Conn::reconfigure`](crate::Conn::reconfigure): the maximum frame, at least 1.
    MaxFrame(u8),
    /// [`Conn::notify_flushed`](crate::Conn::notify_flushed).
    NotifyFlushed,
}

impl Action {
    /// Number of framings in [`Action::framing`].
    pub const FRAMINGS: u8 = 9;

    /// Returns the framing with this number in [`Action::Framing`], counted modulo
    /// [`Action::FRAMINGS`].
    pub fn framing(number: u8) -> Framing {
        match number % Self::FRAMINGS {
            0 => Framing::Raw,
            1 => Framing::Packet1,
            2 => Framing::Packet2,
            3 => Framing::Packet4,
            4 => Framing::Line,
            5 => Framing::Delimited(0),
            6 => Framing::Fixed(2),
            // The length counts all but the byte in front of it.
            7 => Framing::LengthField {
                offset: 1,
                width: 2,
                little_endian: false,
                adjustment: -2,
            },
            // The length counts neither itself nor the byte behind it.
            _ => Framing::LengthField {
                offset: 0,
                width: 3,
                little_endian: true,
                adjustment: 1,
            },
        }
    }
}

/// A call of the handler.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Callback {
    /// [`Handler::on_open`](crate::Handler::on_open)
    Opened,
    /// [`Handler::on_secured`](crate::Handler::on_secured)
    Secured,
    /// [`Handler::on_frame`](crate::Handler::on_frame)
    Frame(Vec<u8>),
    /// [`Handler::on_bad_input`](crate::Handler::on_bad_input), with the reason of the close. The
    /// handler does as when the peer has finished.
    BadInput(CloseReason),
    /// [`Handler::on_finish`](crate::Handler::on_finish)
    Finished,
    /// [`Handler::on_writable`](crate::Handler::on_writable)
    Writable,
    /// [`Handler::on_flushed`](crate::Handler::on_flushed)
    Flushed,
    /// [`Handler::on_timer`](crate::Handler::on_timer)
    Timer(u8),
    /// [`Handler::on_drain`](crate::Handler::on_drain)
    Drain,
}

/// The connection's end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct End {
    /// The one reason.
    pub reason: CloseReason,
    /// Whether the connection ended by RST.
    pub reset: bool,
}
