//! The data of observation for serde: names, numbers and texts, all in one place. Feature `serde`.
//!
//! A field has its Rust name. A time is a number of seconds. A reason is its
//! [`CloseReason::name`](crate::CloseReason::name); ids, addresses, states and kinds are texts. The
//! handbook lists them all: `src/manual/observer.md`.

use std::time::Duration;

use serde::ser::{Serialize, SerializeMap, SerializeStruct, Serializer};

use crate::addr::Addr;
use crate::alarm::{Alarm, AlarmInfo};
use crate::handler::ConnInfo;
use crate::histogram::{Histogram, Histograms};
use crate::id::{AlarmId, ConnId, ListenerId};
use crate::listener_info::{ListenerInfo, ListenerState};
use crate::metrics::Metrics;
use crate::proto::{State, TimeLeft, Traffic};
use crate::reason::{CloseReason, Closed};
use crate::recent::{bounded_text, RecentClose};
use crate::stats::{ClosedCounts, DrainReport, Stats};
use crate::tree::Tree;

/// A time as a number of seconds, in whole microseconds.
pub(crate) struct Seconds(pub(crate) Duration);

impl Serialize for Seconds {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_f64(self.0.as_micros() as f64 / 1e6)
    }
}

/// Serialises a struct, with each field under its name. A forgotten field is a compile error.
macro_rules! fields {
    ($type:ident { $($field:ident),* $(,)? } $(seconds { $($time:ident),* })?) => {
        impl serde::ser::Serialize for $type {
            fn serialize<S: serde::ser::Serializer>(
                &self,
                serializer: S,
            ) -> Result<S::Ok, S::Error> {
                use serde::ser::SerializeStruct as _;
                let Self { $($field,)* $($($time,)*)? } = self;
                let count = [$(stringify!($field),)* $($(stringify!($time),)*)?].len();
                let mut fields = serializer.serialize_struct(stringify!($type), count)?;
                $(fields.serialize_field(stringify!($field), $field)?;)*
                $($(fields.serialize_field(
                    stringify!($time),
                    &$crate::serialize::Seconds(*$time),
                )?;)*)?
                fields.end()
            }
        }
    };
}
#[cfg(feature = "observer")]
pub(crate) use fields;

/// Serialises a value as the text that it displays.
macro_rules! texts {
    ($($type:ty)*) => {$(
        impl Serialize for $type {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }
    )*};
}

texts! { Addr Alarm AlarmId ListenerId ListenerState State }

/// The whole id, as in `7.3.1`: [`ConnId`] reads it.
impl Serialize for ConnId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{self:#}"))
    }
}

/// The stable name.
impl Serialize for CloseReason {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

fields!(Traffic {
    bytes_in,
    bytes_out,
    frames_in,
    frames_out
});
fields!(DrainReport { ended, failed, forced, unserved } seconds { took });
fields!(AlarmInfo { id, alarm, raised, value, threshold } seconds { cooldown, since });
fields!(RecentClose {
    id, listener, peer, source, reason, error, label, traffic,
} seconds { age, ago });
fields!(ConnInfo {
    id, listener, peer, source, state, traffic, queued, buffered, paused, congested, throttled,
    paused_for_memory, time_left,
} seconds { age, idle });
fields!(Histograms {
    connection_age,
    handshake_time,
    frame_size_in,
    frame_size_out,
    iteration_time,
});
fields!(Metrics {
    stats,
    histograms,
    listeners,
    alarms,
    descriptors,
    memory_limit
});

impl Serialize for Stats {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Self {
            accepted,
            outgoing,
            connecting,
            open,
            peak,
            pending,
            memory,
            paused_for_memory,
            max_connections,
            opened,
            traffic,
            out_of_fds,
            accept_errors,
            undeliverable,
            panics,
            iterations,
            closed,
        } = self;
        let mut fields = serializer.serialize_struct("Stats", 18)?;
        fields.serialize_field("accepted", accepted)?;
        fields.serialize_field("outgoing", outgoing)?;
        fields.serialize_field("connecting", connecting)?;
        fields.serialize_field("open", open)?;
        fields.serialize_field("peak", peak)?;
        fields.serialize_field("pending", pending)?;
        fields.serialize_field("memory", memory)?;
        fields.serialize_field("paused_for_memory", paused_for_memory)?;
        fields.serialize_field("max_connections", max_connections)?;
        fields.serialize_field("opened", opened)?;
        fields.serialize_field("traffic", traffic)?;
        fields.serialize_field("out_of_fds", out_of_fds)?;
        fields.serialize_field("accept_errors", accept_errors)?;
        fields.serialize_field("undeliverable", undeliverable)?;
        fields.serialize_field("panics", panics)?;
        fields.serialize_field("iterations", iterations)?;
        fields.serialize_field("closed", &ByReason(closed))?;
        fields.serialize_field("closed_labels", &Labels(closed))?;
        fields.end()
    }
}

impl Serialize for ListenerInfo {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Self {
            id,
            name,
            addr,
            state,
            connections,
            max_connections,
            accepted,
            traffic,
            closed,
        } = self;
        let mut fields = serializer.serialize_struct("ListenerInfo", 10)?;
        fields.serialize_field("id", id)?;
        fields.serialize_field("name", name)?;
        fields.serialize_field("addr", addr)?;
        fields.serialize_field("state", state)?;
        fields.serialize_field("connections", connections)?;
        fields.serialize_field("max_connections", max_connections)?;
        fields.serialize_field("accepted", accepted)?;
        fields.serialize_field("traffic", traffic)?;
        fields.serialize_field("closed", &ByReason(closed))?;
        fields.serialize_field("closed_labels", &Labels(closed))?;
        fields.end()
    }
}

/// The reasons that have occurred, each with its count.
struct ByReason<'a>(&'a ClosedCounts);

impl Serialize for ByReason<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let all = CloseReason::ALL.iter();
        let counts = all.map(|reason| (reason, self.0.of(*reason)));
        serializer.collect_map(counts.filter(|&(_, count)| count > 0))
    }
}

/// The reasons with labels, each with its labels and their counts.
struct Labels<'a>(&'a ClosedCounts);

impl Serialize for Labels<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        for &reason in CloseReason::ALL {
            if self.0.labels(reason).next().is_some() {
                map.serialize_entry(&reason, &LabelsOf(self.0, reason))?;
            }
        }
        map.end()
    }
}

struct LabelsOf<'a>(&'a ClosedCounts, CloseReason);

impl Serialize for LabelsOf<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.labels(self.1))
    }
}

/// The deadlines that run, each with the seconds until it expires.
impl Serialize for TimeLeft {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.iter().map(|(name, left)| (name, Seconds(left))))
    }
}

/// The values' number and sum, and the buckets that have values: pairs of the upper bound (`None`
/// for the last bucket) and the number.
impl Serialize for Histogram {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let buckets: Vec<_> = self.buckets().filter(|&(_, count)| count > 0).collect();
        let mut fields = serializer.serialize_struct("Histogram", 3)?;
        fields.serialize_field("count", &self.count())?;
        fields.serialize_field("sum", &self.sum())?;
        fields.serialize_field("buckets", &buckets)?;
        fields.end()
    }
}

/// The error as its text: escaped and of bounded length.
impl Serialize for Closed {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let error = self.error.as_ref().map(|error| bounded_text(error));
        let mut fields = serializer.serialize_struct("Closed", 3)?;
        fields.serialize_field("reason", &self.reason)?;
        fields.serialize_field("error", &error)?;
        fields.serialize_field("label", &self.label)?;
        fields.end()
    }
}

impl Serialize for Tree {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Self {
            stats,
            descriptors,
            draining,
            listeners,
            outgoing,
            outgoing_connections,
        } = self;
        let branches = listeners.iter();
        let branches: Vec<_> = branches
            .map(|(listener, connections)| Branch {
                listener,
                connections,
            })
            .collect();
        let mut fields = serializer.serialize_struct("Tree", 6)?;
        fields.serialize_field("stats", stats)?;
        fields.serialize_field("descriptors", descriptors)?;
        fields.serialize_field("draining", draining)?;
        fields.serialize_field("listeners", &branches)?;
        fields.serialize_field("outgoing", outgoing)?;
        fields.serialize_field("outgoing_connections", outgoing_connections)?;
        fields.end()
    }
}

/// A listener and some of its connections.
struct Branch<'a> {
    listener: &'a ListenerInfo,
    connections: &'a [ConnInfo],
}

impl Serialize for Branch<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut fields = serializer.serialize_struct("Branch", 2)?;
        fields.serialize_field("listener", self.listener)?;
        fields.serialize_field("connections", self.connections)?;
        fields.end()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_error_of_a_close_is_its_text() {
        let mut closed = Closed::new(CloseReason::BadFrame);
        closed.error = Some("a\nb".into());
        closed.label = Some("version");
        let text = serde_json::to_string(&closed).expect("text");
        let wanted = r#"{"reason":"bad_frame","error":"a\\nb","label":"version"}"#;
        assert_eq!(text, wanted);
    }
}
