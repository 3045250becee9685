//! Alarms: the watched value, the threshold, the cooldown.

use std::fmt;
use std::time::Duration;

use crate::config::{Config, Quota};
use crate::error::{Error, Result};
use crate::id::AlarmId;

/// What an alarm watches, and the threshold at which it is raised: a number, or a
/// [`Quota::Percent`] of the limit. Set with [`Control::on_alarm`](crate::Control::on_alarm).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Alarm {
    /// Connections in a slot, in any state. A percentage is of the cap
    /// ([`Config::max_connections`]), and follows a change of it. In [`Shards`](crate::Shards) the
    /// connections of all shards count.
    Connections(Quota),
    /// Descriptors that this server has open: its listeners and connections. A percentage is of the
    /// process's RLIMIT_NOFILE when the alarm is set (known on Linux). In
    /// [`Shards`](crate::Shards) the descriptors of all shards count. Those of the rest of the
    /// program do not.
    Descriptors(Quota),
    /// Bytes that all connections together hold in buffers. A percentage is of
    /// [`Config::memory_limit`], and follows a change of it.
    Memory(Quota),
    /// Accepts that failed for lack of descriptors or socket memory (EMFILE, ENFILE, ENOBUFS,
    /// ENOMEM), in the current episode. The alarm is raised at the first failure.
    FdExhaustion,
}

/// Prints what is watched, in logs and metrics: `connections`, `descriptors`, `memory`,
/// `fd_exhaustion`.
impl fmt::Display for Alarm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Connections(_) => "connections",
            Self::Descriptors(_) => "descriptors",
            Self::Memory(_) => "memory",
            Self::FdExhaustion => "fd_exhaustion",
        })
    }
}

impl Alarm {
    const fn quota(self) -> Quota {
        match self {
            Self::Connections(quota) | Self::Descriptors(quota) | Self::Memory(quota) => quota,
            Self::FdExhaustion => Quota::Count(1),
        }
    }

    /// Returns the whole of which a percentage is a part; `None` if it is unknown. `descriptors` is
    /// RLIMIT_NOFILE.
    pub(crate) fn limit(&self, config: &Config, descriptors: Option<usize>) -> Option<usize> {
        match self {
            Self::Connections(_) => Some(config.max_connections),
            Self::Descriptors(_) => descriptors,
            Self::Memory(_) => config.memory_limit,
            Self::FdExhaustion => None,
        }
    }

    /// The value from which on it is raised: never more than the limit, so that one which is
    /// lowered later is still reported, and at least 1.
    pub(crate) fn threshold(&self, limit: Option<usize>) -> usize {
        let threshold = match (self.quota(), limit) {
            (Quota::Count(count), limit) => count.min(limit.unwrap_or(usize::MAX)),
            (Quota::Percent(percent), Some(limit)) => part(limit, percent),
            (Quota::Percent(_), None) => usize::MAX,
        };
        threshold.max(1)
    }

    pub(crate) fn check(&self, limit: Option<usize>, cooldown: Duration) -> Result<()> {
        let what = match self {
            Self::Connections(_) => "connections",
            Self::Descriptors(_) => "descriptors",
            Self::Memory(_) => "bytes in buffers",
            Self::FdExhaustion => "failed accepts",
        };
        let problem = match (self.quota(), limit) {
            (Quota::Count(0), _) => format!("0 {what} would always be reached; use at least 1"),
            (Quota::Percent(0), _) => {
                format!("0 percent of all {what} would always be reached; use at least 1")
            }
            (Quota::Percent(percent @ 101..), _) => {
                format!("{percent} percent of all {what} would never be reached; use at most 100")
            }
            (Quota::Percent(_), None) if matches!(self, Self::Memory(_)) => {
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
            _ if cooldown < Duration::from_millis(1) => {
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

/// One alarm at one moment; the argument of its callback.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct AlarmInfo {
    /// The alarm's id.
    pub id: AlarmId,
    /// What the alarm watches.
    pub alarm: Alarm,
    /// Minimum time between two calls of the callback while the threshold is reached.
    pub cooldown: Duration,
    /// Whether the threshold is reached.
    pub raised: bool,
    /// The watched value: now, or for a callback at the end of the iteration.
    pub value: usize,
    /// The threshold as a number, also where a percentage was set.
    pub threshold: usize,
    /// Time since the alarm was raised: zero in the call that raises it, and for a quiet alarm. In
    /// the call at its end: the time for which it was raised.
    pub since: Duration,
}

impl fmt::Display for AlarmInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let over = if self.raised { "" } else { " over" };
        let Self {
            alarm,
            value,
            threshold,
            since,
            ..
        } = self;
        write!(f, "alarm{over}: {alarm} {value}, threshold {threshold}")?;
        match (self.raised, since.is_zero()) {
            (true, true) => Ok(()),
            (true, false) => write!(f, ", for {since:.1?}"),
            (false, _) => write!(f, ", after {since:.1?}"),
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
        let alarm = Alarm::Connections(Quota::Count(500));
        assert_eq!(
            (
                alarm.threshold(Some(1000)),
                alarm.threshold(Some(100)),
                alarm.threshold(Some(0))
            ),
            (500, 100, 1)
        );
        assert_eq!(Alarm::Memory(Quota::Percent(1)).threshold(None), usize::MAX);
    }

    #[test]
    fn an_alarm_is_one_line() {
        let line = |raised, since| {
            let alarm = Alarm::FdExhaustion;
            let info = AlarmInfo {
                id: AlarmId(1, crate::id::ServerNumber::NONE),
                alarm,
                cooldown: Duration::ZERO,
                raised,
                value: 4,
                threshold: alarm.threshold(None),
                since: Duration::from_millis(since),
            };
            info.to_string()
        };
        let said = [line(true, 0), line(true, 1500), line(false, 1500)];
        assert_eq!(
            said,
            [
                "alarm: fd_exhaustion 4, threshold 1",
                "alarm: fd_exhaustion 4, threshold 1, for 1.5s",
                "alarm over: fd_exhaustion 4, threshold 1, after 1.5s",
            ]
        );
        let names = [
            Alarm::Connections(Quota::Count(1)),
            Alarm::Descriptors(Quota::Percent(1)),
            Alarm::Memory(Quota::Count(1)),
        ];
        let names = names.map(|alarm| alarm.to_string());
        assert_eq!(names, ["connections", "descriptors", "memory"]);
    }
}
