//! Where a connection is in its life.

use super::state::State;

/// A connection's state in full: [`State`], and how far it is in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub(super) enum Phase {
    /// Frames are exchanged. Zero: see [`Status::only_frames`](super::status::Status::only_frames).
    Open = 0,

    // Accepting:
    /// A PROXY header must come first.
    HeaderRequired,
    /// A PROXY header may come first.
    HeaderOptional,
    /// The header is complete, or there is none: the service is to be asked.
    HeaderDone,
    /// The service decides.
    Admitting,

    Connecting,
    Handshaking,

    // Closing:
    /// Output is pending.
    Flush,
    /// FIN is due.
    Shutdown,
    /// FIN is sent; input is discarded until the peer's.
    Linger,
    /// The socket is to be closed.
    Gone,
    /// The socket is to be closed with RST.
    Reset,
    /// The socket has left the loop, with its pending bytes.
    Detached,
}

impl Phase {
    pub(super) fn state(self) -> State {
        match self {
            Self::Open => State::Open,
            Self::HeaderRequired | Self::HeaderOptional | Self::HeaderDone | Self::Admitting => {
                State::Accepting
            }
            Self::Connecting => State::Connecting,
            Self::Handshaking => State::Handshaking,
            Self::Flush
            | Self::Shutdown
            | Self::Linger
            | Self::Gone
            | Self::Reset
            | Self::Detached => State::Closing,
        }
    }
}

/// The phase of a connection and its past.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub(super) struct Life {
    flags: u8,
    phase: Phase,
}

impl Life {
    /// The service has accepted the peer, so there is a handler.
    const ADMITTED: u8 = 1;
    /// `on_open` was called, so `on_close` is due.
    const WAS_OPEN: u8 = 2;
    /// The server made this connection.
    const OUTGOING: u8 = 4;
    /// The flags above: an open connection that has only these exchanges frames and nothing else.
    pub(super) const ORDINARY: u8 = Self::ADMITTED | Self::WAS_OPEN | Self::OUTGOING;
    /// The server drains.
    const DRAINING: u8 = 8;
    /// The connection leaves the loop at the end of its turn.
    const DETACHING: u8 = 16;

    pub(super) fn accepted() -> Self {
        Self {
            flags: 0,
            phase: Phase::Admitting,
        }
    }

    pub(super) fn connecting() -> Self {
        Self {
            flags: Self::OUTGOING | Self::ADMITTED,
            phase: Phase::Connecting,
        }
    }

    #[inline]
    pub(super) fn bits(self) -> [u8; 2] {
        [self.flags, self.phase as u8]
    }

    #[inline]
    pub(super) fn phase(self) -> Phase {
        self.phase
    }

    #[inline]
    pub(super) fn state(self) -> State {
        self.phase.state()
    }

    pub(super) fn enter(&mut self, next: Phase) {
        let (from, to) = (self.state(), next.state());
        debug_assert!(from == to || from.leads_to(to), "{from} cannot become {to}");
        self.phase = next;
    }

    #[inline]
    pub(super) fn is_open(self) -> bool {
        self.phase == Phase::Open
    }

    pub(super) fn is_closing(self) -> bool {
        self.state() == State::Closing
    }

    /// True once the socket is to be closed.
    pub(super) fn is_gone(self) -> bool {
        matches!(self.phase, Phase::Gone | Phase::Reset)
    }

    /// True while the handler can be notified of more than the end: frames are exchanged, or an
    /// upgrade to TLS is under way.
    pub(super) fn is_established(self) -> bool {
        match self.state() {
            State::Open => true,
            State::Handshaking => self.was_open(),
            State::Accepting | State::Connecting | State::Closing => false,
        }
    }

    /// True while the handler decides: the connection is open and stays so, or will be and queues
    /// until then.
    pub(super) fn is_served(self) -> bool {
        match self.state() {
            State::Connecting => true,
            State::Open => !self.is_detaching(),
            State::Handshaking => self.was_open() || self.is_outgoing(),
            State::Accepting | State::Closing => false,
        }
    }

    pub(super) fn admit(&mut self) {
        self.flags |= Self::ADMITTED;
    }

    pub(super) fn was_admitted(self) -> bool {
        self.flags & Self::ADMITTED != 0
    }

    pub(super) fn set_opened(&mut self) {
        self.flags |= Self::WAS_OPEN;
    }

    #[inline]
    pub(super) fn was_open(self) -> bool {
        self.flags & Self::WAS_OPEN != 0
    }

    /// True once the handler was notified of an open connection, which does not leave the loop.
    pub(super) fn stays_open(self) -> bool {
        self.is_open() && self.was_open() && !self.is_detaching()
    }

    pub(super) fn is_outgoing(self) -> bool {
        self.flags & Self::OUTGOING != 0
    }

    pub(super) fn drain(&mut self) {
        self.flags |= Self::DRAINING;
    }

    pub(super) fn is_draining(self) -> bool {
        self.flags & Self::DRAINING != 0
    }

    pub(super) fn detach(&mut self) {
        self.flags |= Self::DETACHING;
    }

    #[inline]
    pub(super) fn is_detaching(self) -> bool {
        self.flags & Self::DETACHING != 0 && self.is_open()
    }
}
