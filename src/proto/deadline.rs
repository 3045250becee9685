//! Time as an argument, and the fixed table of one connection's deadlines.

use std::fmt;
use std::time::Duration;

/// A point in time: nanoseconds since the server's clock started. Saturating everywhere, so that
/// `Duration::MAX` means never and a clock that leaps backwards means now.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Time(u64);

impl Time {
    pub(crate) const ZERO: Self = Self(0);
    /// Later than every other time: an unarmed deadline.
    pub(crate) const NEVER: Self = Self(u64::MAX);

    /// `elapsed` after the clock started.
    #[cfg(any(test, feature = "sim"))]
    pub(crate) fn from_start(elapsed: Duration) -> Self {
        Self::ZERO.after(elapsed)
    }

    /// So many nanoseconds after the clock started.
    #[inline]
    pub(crate) fn from_nanos(nanos: u64) -> Self {
        Self(nanos)
    }

    /// This long after `self`; [`Time::NEVER`] if that is past the end of the clock (584 years).
    #[inline]
    pub(crate) fn after(self, span: Duration) -> Self {
        let nanos = span
            .as_secs()
            .saturating_mul(1_000_000_000)
            .saturating_add(u64::from(span.subsec_nanos()));
        Self(self.0.saturating_add(nanos))
    }

    /// How long ago `earlier` was; zero if it is in the future.
    #[inline]
    pub(crate) fn since(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }

    #[inline]
    pub(crate) fn is_armed(self) -> bool {
        self != Self::NEVER
    }
}

impl fmt::Debug for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::NEVER => f.write_str("never"),
            Self(nanos) => Duration::from_nanos(nanos).fmt(f),
        }
    }
}

/// One field per deadline but the idle timeout's. Nothing is scheduled here: the reactor asks for [`Deadlines::next`] and comes back then.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Deadlines {
    /// Handshake (Accepting, Handshaking) or linger (Closing): a connection is never in both.
    pub(super) stage: Time,
    /// An incomplete frame must be complete by then.
    pub(super) frame: Time,
    /// The peer must have taken a byte of what waits by then.
    pub(super) write: Time,
}

impl Deadlines {
    pub(super) const fn none() -> Self {
        Self {
            stage: Time::NEVER,
            frame: Time::NEVER,
            write: Time::NEVER,
        }
    }

    #[inline]
    pub(super) fn next(&self) -> Time {
        self.stage.min(self.frame).min(self.write)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_saturates_instead_of_wrapping() {
        let now = Time::from_start(Duration::from_secs(5));
        assert_eq!(now.after(Duration::MAX), Time::NEVER);
        assert_eq!(Time::NEVER.after(Duration::from_secs(1)), Time::NEVER);
        assert_eq!(now.since(now.after(Duration::from_secs(1))), Duration::ZERO);
        assert_eq!(now.after(Duration::ZERO), now);
        assert!(!now.after(Duration::MAX).is_armed());
    }
}
