//! Alarms: the watched value, the threshold, the cooldown.

use std::fmt;
use std::time::Duration;

use crate::config::{Config, Quota};
use crate::error::{Error, Result};
use crate::id::AlarmId;

/// What an alarm watches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum AlarmKind {
    /// Connections in a slot, in any state; a part of [`Config::max_connections`].
    Connections,
    /// Descriptors that this server has open: its listeners and connections. A part of the
    /// process's RLIMIT_NOFILE.
    Descriptors,
    /// Bytes that all connections together hold in buffers; a part of [`Config::memory_limit`].
    Memory,
    /// Accepts that failed for lack of descriptors or socket memory (EMFILE, ENFILE, ENOBUFS,
    /// ENOMEM), in an episode that is not over.
    FdExhaustion,
}

impl AlarmKind {
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Connections => "connections",
            Self::Descriptors => "descriptors",
            Self::Memory => "memory",
            Self::FdExhaustion => "fd_exhaustion",
        }
    }
}

/// In logs and metrics.
impl fmt::Display for AlarmKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// An alarm: its value, its threshold, and the minimum time between two calls. Set with [`Control::on_alarm`](crate::Control::on_alarm).
///
/// ```
/// use std::time::Duration;
/// use portcullis::{Alarm, Quota};
/// let crowd = Alarm::connections(Quota::Percent(90)).cooldown(Duration::from_secs(60));
/// # let _ = crowd;
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub struct Alarm {
    /// The kind of the watched value.
    pub kind: AlarmKind,
    pub(crate) threshold: Quota,
    pub(crate) cooldown: Duration,
}

impl Alarm {
    /// Raised at *n* connections or more: a number, or a [`Quota::Percent`] of the cap, which
    /// follows a change of the cap. In one of several [`Shards`](crate::Shards) the connections of all shards
    /// count, as the cap is on all of them.
    pub fn connections(threshold: impl Into<Quota>) -> Self {
        Self::new(AlarmKind::Connections, threshold.into())
    }

    /// Raised at *n* descriptors or more that this server has open: a number, or a
    /// [`Quota::Percent`] of RLIMIT_NOFILE as it is when the alarm is set (known on Linux).
    /// Descriptors of the rest of the program are not counted.
    pub fn descriptors(threshold: impl Into<Quota>) -> Self {
        Self::new(AlarmKind::Descriptors, threshold.into())
    }

    /// Raised at *n* bytes in buffers or more: a number, or a [`Quota::Percent`] of
    /// [`Config::memory_limit`], which follows a change of it.
    pub fn memory(threshold: impl Into<Quota>) -> Self {
        Self::new(AlarmKind::Memory, threshold.into())
    }

    /// Raised while no client can be accepted, because descriptors or socket memory have run out.
    pub fn fd_exhaustion() -> Self {
        Self::new(AlarmKind::FdExhaustion, Quota::Count(1))
    }

    fn new(kind: AlarmKind, threshold: Quota) -> Self {
        Self {
            kind,
            threshold,
            cooldown: Duration::from_secs(5),
        }
    }

    /// Minimum time between two calls while raised. At its end the callback is called again if the
    /// value is still, or again, at or above the threshold. Defaults to 5 s; at least 1 ms.
    /// `Duration::MAX`: one call.
    pub fn cooldown(mut self, cooldown: Duration) -> Self {
        self.cooldown = cooldown;
        self
    }

    /// Returns the whole of which a percentage is a part; `None` if it is unknown. `descriptors` is
    /// RLIMIT_NOFILE.
    pub(crate) fn limit(&self, config: &Config, descriptors: Option<usize>) -> Option<usize> {
        match self.kind {
            AlarmKind::Connections => Some(config.max_connections),
            AlarmKind::Descriptors => descriptors,
            AlarmKind::Memory => config.memory_limit,
            AlarmKind::FdExhaustion => None,
        }
    }

    /// The value from which on it is raised: never more than the limit, so that one which is
    /// lowered later is still reported, and at least 1.
    pub(crate) fn threshold(&self, limit: Option<usize>) -> usize {
        let threshold = match (self.threshold, limit) {
            (Quota::Count(count), limit) => count.min(limit.unwrap_or(usize::MAX)),
            (Quota::Percent(percent), Some(limit)) => part(limit, percent),
            (Quota::Percent(_), None) => usize::MAX,
        };
        threshold.max(1)
    }

    pub(crate) fn check(&self, limit: Option<usize>) -> Result<()> {
        let what = match self.kind {
            AlarmKind::Connections => "connections",
            AlarmKind::Descriptors => "descriptors",
            AlarmKind::Memory => "bytes in buffers",
            AlarmKind::FdExhaustion => "failed accepts",
        };
        let problem = match (self.threshold, limit) {
            (Quota::Count(0), _) => format!("0 {what} would always be reached; use at least 1"),
            (Quota::Percent(0), _) => {
                format!("0 percent of all {what} would always be reached; use at least 1")
            }
            (Quota::Percent(percent @ 101..), _) => {
                format!("{percent} percent of all {what} would never be reached; use at most 100")
            }
            (Quota::Percent(_), None) if self.kind == AlarmKind::Memory => {
                "a part of no limit would never be reached; set memory_limit, or give bytes"
                    .to_owned()
            }
            (Quota::Percent(_), None) => {
                format!("the limit of {what} is not known on this system; give a number")
            }
            (Quota::Count(count), Some(limit)) if count > limit => {
                format!(
                    "{count} {what} would never be reached, the limit is {limit}; use at most that"
                )
            }
            _ if self.cooldown < Duration::from_millis(1) => {
                return Err(Error::option(
                    "cooldown",
                    "an alarm that is raised would keep the server awake; use at least 1 ms",
                ));
            }
            _ => return Ok(()),
        };
        Err(Error::option("alarm", problem))
    }
}

/// Returns `percent` percent of `whole`, rounded up.
fn part(whole: usize, percent: u8) -> usize {
    let percent = usize::from(percent);
    whole / 100 * percent + (whole % 100 * percent).div_ceil(100)
}

/// The state of an alarm.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum AlarmState {
    /// The threshold is reached; no cooldown has passed since.
    Raised,
    /// It was raised at least one cooldown ago, and the callback was called again.
    StillRaised,
    /// The value is below the threshold, or never reached it. Notified at once, and once for each
    /// [`AlarmState::Raised`].
    Cleared,
}

/// One alarm at one moment; the argument of its callback.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct AlarmInfo {
    /// Its id.
    pub id: AlarmId,
    /// What it was set to.
    pub alarm: Alarm,
    /// Its state.
    pub state: AlarmState,
    /// The value: at the end of this iteration, in a callback.
    pub value: usize,
    /// The threshold: percentages as numbers.
    pub threshold: usize,
    /// Time since it was raised; zero if it is not.
    pub since: Duration,
}

impl fmt::Display for AlarmInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            alarm: Alarm { kind, .. },
            value,
            threshold,
            since,
            ..
        } = self;
        match self.state {
            AlarmState::Raised => write!(f, "alarm: {kind} {value}, threshold {threshold}"),
            AlarmState::StillRaised => write!(
                f,
                "alarm: {kind} {value}, threshold {threshold}, for {since:.1?}"
            ),
            AlarmState::Cleared => write!(
                f,
                "alarm over: {kind} {value}, threshold {threshold}, after {since:.1?}"
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_is_rounded_up_and_never_overflows() {
        for (whole, percent, result) in [
            (0, 50, 0),
            (1, 1, 1),
            (10, 90, 9),
            (10, 91, 10),
            (1024, 90, 922),
            (usize::MAX, 100, usize::MAX),
        ] {
            assert_eq!(part(whole, percent), result, "{percent} % of {whole}");
        }
    }

    #[test]
    fn a_limit_that_is_lowered_lowers_the_mark() {
        let alarm = Alarm::connections(500);
        assert_eq!(
            (
                alarm.threshold(Some(1000)),
                alarm.threshold(Some(100)),
                alarm.threshold(Some(0))
            ),
            (500, 100, 1)
        );
        assert_eq!(Alarm::memory(Quota::Percent(1)).threshold(None), usize::MAX);
    }
}
