//! What a connection tells of itself: which clocks run, and what keeps it from reading.

use std::time::Duration;

use super::state::{Flags, State};
use super::{Machine, Time};

/// When a connection's deadlines fall due: the time that is left, zero for what is expired_through in the next turn. `None` for a clock
/// that does not run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct TimeLeft {
    /// For the attempt to connect that is under way ([`Connect::connect_timeout`](crate::Connect::connect_timeout)), or until
    /// the next one ([`Connect::retry`](crate::Connect::retry)).
    pub connect: Option<Duration>,
    /// To be open ([`Listen::handshake_timeout`](crate::Listen::handshake_timeout)).
    pub handshake: Option<Duration>,
    /// To complete the frame that has begun ([`Listen::frame_timeout`](crate::Listen::frame_timeout)).
    pub frame: Option<Duration>,
    /// For the peer to say something ([`Listen::idle_timeout`](crate::Listen::idle_timeout)).
    pub idle: Option<Duration>,
    /// For the peer to take a byte of what waits for it ([`Listen::write_timeout`](crate::Listen::write_timeout)).
    pub write: Option<Duration>,
    /// For the peer's FIN after ours ([`Listen::linger`](crate::Listen::linger)).
    pub linger: Option<Duration>,
    /// Until reading goes on after it came too fast ([`Listen::read_rate`](crate::Listen::read_rate) and its like).
    pub throttle: Option<Duration>,
    /// Until the first of the handler's timers ([`Conn::set_timer`](crate::Conn::set_timer)).
    pub timer: Option<Duration>,
}

impl Machine {
    pub(crate) fn time_left(&self, now: Time) -> TimeLeft {
        let left = |deadline: Time| deadline.is_armed().then(|| deadline.since(now));
        let deadlines = &self.deadlines;
        let (mut connect, mut handshake, mut linger) = (None, None, None);
        match self.state {
            State::Connecting => connect = left(deadlines.stage),
            State::Closing => linger = left(deadlines.stage),
            State::Accepting | State::Handshaking | State::Open => handshake = left(deadlines.stage),
        }
        let timer = self.timers.iter().map(|timer| timer.at).fold(Time::NEVER, Time::min);
        TimeLeft {
            connect,
            handshake,
            frame: left(deadlines.frame),
            idle: left(self.idle()),
            write: left(deadlines.write),
            linger,
            throttle: left(self.throttled_until()),
            timer: left(timer),
        }
    }

    /// Its handler has paused it.
    pub(crate) fn is_paused_by_handler(&self) -> bool {
        self.is_stopped_by(Flags::PAUSED)
    }

    /// Too much waits for its peer.
    pub(crate) fn is_congested(&self) -> bool {
        self.is_stopped_by(Flags::CONGESTED)
    }

    /// The same, in every state.
    pub(crate) fn has_much_to_send(&self) -> bool {
        self.flags.has(Flags::CONGESTED)
    }

    /// It came too fast.
    pub(crate) fn is_throttled(&self) -> bool {
        self.is_stopped_by(Flags::THROTTLED)
    }

    /// Nothing is read for this reason: a connection that closes reads and drops, whatever stood before.
    fn is_stopped_by(&self, flag: Flags) -> bool {
        self.state == State::Open && self.flags.has(flag)
    }
}
