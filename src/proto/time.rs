//! Time as an argument: nothing in this folder reads a clock.

use std::fmt;
use std::time::Duration;

/// The longest timeout of a clock that tells how far a peer is behind, expired or not: 272 years.
pub(super) const FOREVER: Duration = Duration::from_secs(1 << 33);

/// A point in time: nanoseconds since the server's clock started.
///
/// Saturates everywhere, so that `Duration::MAX` means never and a clock that leaps backwards
/// means now.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Time(u64);

impl Time {
    pub(crate) const ZERO: Self = Self(0);
    /// Later than every other time: an unarmed deadline.
    pub(crate) const NEVER: Self = Self(u64::MAX);

    /// Returns the time `elapsed` after the clock started.
    #[cfg(any(test, feature = "sim"))]
    pub(crate) fn from_start(elapsed: Duration) -> Self {
        Self::ZERO.after(elapsed)
    }

    /// Returns the time `nanos` nanoseconds after the clock started.
    #[inline]
    pub(crate) fn from_nanos(nanos: u64) -> Self {
        Self(nanos)
    }

    /// Returns the number of nanoseconds since the clock started.
    #[cfg(feature = "record")]
    #[inline]
    pub(crate) fn nanos(self) -> u64 {
        self.0
    }

    /// Returns `self` plus `span`; [`Time::NEVER`] past the end of the clock (584 years).
    #[inline]
    pub(crate) fn after(self, span: Duration) -> Self {
        let nanos = span
            .as_secs()
            .saturating_mul(1_000_000_000)
            .saturating_add(u64::from(span.subsec_nanos()));
        Self(self.0.saturating_add(nanos))
    }

    /// Returns the span since `earlier`; zero if `earlier` is in the future.
    #[inline]
    pub(crate) fn since(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }

    /// Returns the number of microseconds since `earlier`; 0 if `earlier` is in the future.
    #[inline]
    pub(crate) fn micros_since(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0) / 1000
    }

    /// Returns `self`, or [`Time::NEVER`] if it is the deadline of a timeout of [`FOREVER`].
    #[inline]
    pub(super) fn or_never(self) -> Self {
        match self < Self::ZERO.after(FOREVER) {
            true => self,
            false => Self::NEVER,
        }
    }

    #[inline]
    pub(crate) fn is_armed(self) -> bool {
        self != Self::NEVER
    }

    /// Returns the distance from `now` as a time, so that two states can be compared.
    #[cfg(feature = "sim")]
    pub(super) fn ahead_of(self, now: Self) -> Self {
        if self.is_armed() {
            Self::from_start(self.since(now))
        } else {
            self
        }
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
