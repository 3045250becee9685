//! All counters and measurements, and their text for Prometheus.

use std::fmt::{self, Write};

use crate::alarm::AlarmInfo;
use crate::escape::{is_escaped, Escaped};
use crate::histogram::{Histogram, Histograms};
use crate::listener_info::{ListenerInfo, ListenerState};
use crate::reason::CloseReason;
use crate::stats::Stats;

/// All counters and measurements at one moment: [`Control::metrics`](crate::Control::metrics).
///
/// `Display` is the text exposition format of Prometheus, version 0.0.4
/// ([`Metrics::CONTENT_TYPE`]). Names begin with `portcullis_`, units are bytes and seconds,
/// counters end in `_total`. The size of the text depends on the number of listeners and alarms,
/// not of connections.
///
/// ```
/// # use portcullis::{Config, Server};
/// # fn main() -> portcullis::Result<()> {
/// let mut server: Server = Server::new(Config::new())?;
/// let text = server.control().metrics().to_string();
/// assert!(text.contains("portcullis_max_connections 1024\n"));
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Metrics {
    /// The counters.
    pub stats: Stats,
    /// The histograms.
    pub histograms: Histograms,
    /// The listeners that have not been closed.
    pub listeners: Vec<ListenerInfo>,
    /// The alarms.
    pub alarms: Vec<AlarmInfo>,
    /// Descriptors that the server has open: listeners and connections.
    pub descriptors: usize,
    /// [`Config::memory_limit`](crate::Config::memory_limit) in bytes, if there is one; of several
    /// shards the sum.
    pub memory_limit: Option<usize>,
}

impl Metrics {
    /// The media type of the text.
    pub const CONTENT_TYPE: &'static str = "text/plain; version=0.0.4; charset=utf-8";
}

impl fmt::Display for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = Exposition(f);
        self.gauges(&mut text)?;
        self.counters(&mut text)?;
        self.of_listeners(&mut text)?;
        self.of_alarms(&mut text)?;
        self.spreads(&mut text)
    }
}

impl Metrics {
    fn gauges(&self, text: &mut Exposition<'_, '_>) -> fmt::Result {
        let stats = &self.stats;
        let gauges = [
            (
                "connections",
                "Connections in a slot, in any state.",
                stats.open,
            ),
            (
                "connections_peak",
                "Peak of concurrent connections.",
                stats.peak,
            ),
            (
                "connections_pending",
                "Connections that are not open yet.",
                stats.pending,
            ),
            (
                "connections_connecting",
                "Outgoing connections that are not there yet.",
                stats.connecting,
            ),
            (
                "max_connections",
                "The cap on connections.",
                stats.max_connections,
            ),
            (
                "memory_bytes",
                "Bytes that connections hold in buffers.",
                stats.memory,
            ),
            (
                "connections_paused_for_memory",
                "Connections that are not read from because memory is tight.",
                stats.paused_for_memory,
            ),
            (
                "descriptors",
                "Descriptors of listeners and connections.",
                self.descriptors,
            ),
        ];
        for (name, help, value) in gauges {
            text.family(name, "gauge", help)?;
            text.sample(name, &[], value)?;
        }
        if let Some(limit) = self.memory_limit {
            text.family(
                "memory_limit_bytes",
                "gauge",
                "The most that connections may hold in buffers.",
            )?;
            text.sample("memory_limit_bytes", &[], limit)?;
        }
        Ok(())
    }

    fn counters(&self, text: &mut Exposition<'_, '_>) -> fmt::Result {
        let stats = &self.stats;
        let counters = [
            ("accepted_total", "Sockets accepted.", stats.accepted),
            (
                "outgoing_total",
                "Outgoing connections begun.",
                stats.outgoing,
            ),
            (
                "opened_total",
                "Connections that have opened.",
                stats.opened,
            ),
            (
                "bytes_in_total",
                "Bytes read, as on the wire.",
                stats.traffic.bytes_in,
            ),
            (
                "bytes_out_total",
                "Bytes written, as on the wire.",
                stats.traffic.bytes_out,
            ),
            (
                "frames_in_total",
                "Frames given to handlers.",
                stats.traffic.frames_in,
            ),
            (
                "frames_out_total",
                "Frames sent by handlers.",
                stats.traffic.frames_out,
            ),
            (
                "out_of_fds_total",
                "Times that descriptors or socket memory ran out.",
                stats.out_of_fds,
            ),
            (
                "accept_errors_total",
                "Passing errors of accept.",
                stats.accept_errors,
            ),
            (
                "undeliverable_total",
                "Commands from other threads that came to nothing.",
                stats.undeliverable,
            ),
            (
                "panics_total",
                "Panics of the user's code, handlers included.",
                stats.panics,
            ),
            (
                "iterations_total",
                "Iterations of the loop.",
                stats.iterations,
            ),
        ];
        for (name, help, value) in counters {
            text.family(name, "counter", help)?;
            text.sample(name, &[], value)?;
        }
        text.family(
            "closed_total",
            "counter",
            "Connections that have ended, by reason, and by the label of the close if it has one.",
        )?;
        for &reason in CloseReason::ALL {
            let labels = [("reason", reason.name())];
            text.sample("closed_total", &labels, stats.closed_unlabelled(reason))?;
            for (cause, count) in stats.closed_labels(reason) {
                let labels = [("reason", reason.name()), ("cause", cause)];
                text.sample("closed_total", &labels, count)?;
            }
        }
        Ok(())
    }

    fn of_listeners(&self, text: &mut Exposition<'_, '_>) -> fmt::Result {
        type Value = fn(&ListenerInfo) -> u64;
        let families: [(&str, &str, &str, Value); 7] = [
            (
                "listener_connections",
                "gauge",
                "Connections of a listener.",
                |listener| listener.connections as u64,
            ),
            (
                "listener_max_connections",
                "gauge",
                "The most connections that a listener may have.",
                |listener| listener.max_connections as u64,
            ),
            (
                "listener_accepted_total",
                "counter",
                "Sockets accepted by a listener.",
                |listener| listener.accepted,
            ),
            (
                "listener_bytes_in_total",
                "counter",
                "Bytes read from connections of a listener, as on the wire.",
                |listener| listener.traffic.bytes_in,
            ),
            (
                "listener_bytes_out_total",
                "counter",
                "Bytes written to connections of a listener, as on the wire.",
                |listener| listener.traffic.bytes_out,
            ),
            (
                "listener_frames_in_total",
                "counter",
                "Frames given to handlers of a listener's connections.",
                |listener| listener.traffic.frames_in,
            ),
            (
                "listener_frames_out_total",
                "counter",
                "Frames sent to connections of a listener.",
                |listener| listener.traffic.frames_out,
            ),
        ];
        for (name, kind, help, value) in families {
            text.family(name, kind, help)?;
            for listener in &self.listeners {
                text.sample(name, &[("listener", &listener.name)], value(listener))?;
            }
        }
        text.family(
            "listener_closed_total",
            "counter",
            "Connections of a listener that have ended, by the reasons and labels that occurred.",
        )?;
        for listener in &self.listeners {
            for &reason in CloseReason::ALL {
                let [of_listener, of_reason] = [
                    ("listener", listener.name.as_str()),
                    ("reason", reason.name()),
                ];
                let unlabelled = listener.closed.unlabelled(reason);
                if unlabelled > 0 {
                    text.sample(
                        "listener_closed_total",
                        &[of_listener, of_reason],
                        unlabelled,
                    )?;
                }
                for (cause, count) in listener.closed.labels(reason) {
                    let labels = [of_listener, of_reason, ("cause", cause)];
                    text.sample("listener_closed_total", &labels, count)?;
                }
            }
        }
        text.family(
            "listener_state",
            "gauge",
            "1 for the state that a listener is in, 0 for the others.",
        )?;
        for listener in &self.listeners {
            for &state in ListenerState::ALL {
                let labels = [
                    ("listener", listener.name.as_str()),
                    ("state", state.as_str()),
                ];
                text.sample("listener_state", &labels, u8::from(listener.state == state))?;
            }
        }
        Ok(())
    }

    fn of_alarms(&self, text: &mut Exposition<'_, '_>) -> fmt::Result {
        type Value = fn(&AlarmInfo) -> usize;
        let families: [(&str, &str, Value); 3] = [
            ("alarm_raised", "1 while an alarm is raised.", |alarm| {
                usize::from(alarm.raised)
            }),
            ("alarm_value", "The value that an alarm watches.", |alarm| {
                alarm.value
            }),
            (
                "alarm_threshold",
                "The value from which on an alarm is raised.",
                |alarm| alarm.threshold,
            ),
        ];
        for (name, help, value) in families {
            text.family(name, "gauge", help)?;
            for alarm in &self.alarms {
                let id = alarm.id.to_string();
                let kind = alarm.alarm.to_string();
                let labels = [("alarm", id.as_str()), ("kind", kind.as_str())];
                text.sample(name, &labels, value(alarm))?;
            }
        }
        Ok(())
    }

    fn spreads(&self, text: &mut Exposition<'_, '_>) -> fmt::Result {
        const MICROSECONDS: f64 = 1e6;
        let histograms = &self.histograms;
        // The first and last bucket, around the values of interest.
        let spreads = [
            (
                "connection_age_seconds",
                "From accept to the end, of connections that had a slot.",
                &histograms.connection_age,
                (9, 39),
                Some(MICROSECONDS),
            ),
            (
                "handshake_seconds",
                "From accept to open, with TLS or a PROXY header.",
                &histograms.handshake_time,
                (6, 25),
                Some(MICROSECONDS),
            ),
            (
                "frame_in_bytes",
                "Payloads given to handlers.",
                &histograms.frame_size_in,
                (0, 24),
                None,
            ),
            (
                "frame_out_bytes",
                "Payloads sent by handlers.",
                &histograms.frame_size_out,
                (0, 24),
                None,
            ),
            (
                "iteration_seconds",
                "Durations of the loop's iterations, without their polls.",
                &histograms.iteration_time,
                (0, 23),
                Some(MICROSECONDS),
            ),
        ];
        for (name, help, histogram, range, per_unit) in spreads {
            text.histogram(name, help, histogram, range, per_unit)?;
        }
        Ok(())
    }
}

/// Writes the format: <https://prometheus.io/docs/instrumenting/exposition_formats/>.
struct Exposition<'a, 'b>(&'a mut fmt::Formatter<'b>);

impl Exposition<'_, '_> {
    fn family(&mut self, name: &str, kind: &str, help: &str) -> fmt::Result {
        writeln!(
            self.0,
            "# HELP portcullis_{name} {help}\n# TYPE portcullis_{name} {kind}"
        )
    }

    fn sample(
        &mut self,
        name: &str,
        labels: &[(&str, &str)],
        value: impl fmt::Display,
    ) -> fmt::Result {
        write!(self.0, "portcullis_{name}")?;
        for (at, (label, text)) in labels.iter().enumerate() {
            self.0.write_char(if at == 0 { '{' } else { ',' })?;
            write!(self.0, "{label}=\"{}\"", LabelValue(text))?;
        }
        writeln!(
            self.0,
            "{} {value}",
            if labels.is_empty() { "" } else { "}" }
        )
    }

    /// The buckets `first` to `last`, cumulative as the format requires. `per_unit` of the values
    /// make one of the displayed unit; `None` shows them unchanged.
    fn histogram(
        &mut self,
        name: &str,
        help: &str,
        histogram: &Histogram,
        (first, last): (usize, usize),
        per_unit: Option<f64>,
    ) -> fmt::Result {
        let scaled = |value: u64| match per_unit {
            Some(per_unit) => (value as f64 / per_unit).to_string(),
            None => value.to_string(),
        };
        self.family(name, "histogram", help)?;
        let bucket = format!("{name}_bucket");
        let mut below = 0;
        for (at, (bound, count)) in histogram.buckets().enumerate() {
            below += count;
            if let (true, Some(bound)) = ((first..=last).contains(&at), bound) {
                self.sample(&bucket, &[("le", &scaled(bound))], below)?;
            }
        }
        self.sample(&bucket, &[("le", "+Inf")], below)?;
        self.sample(&format!("{name}_sum"), &[], scaled(histogram.sum()))?;
        self.sample(&format!("{name}_count"), &[], below)
    }
}

/// A label's value: a backslash, a quote and a line feed are written with a backslash. The format
/// has no escape for other control characters, so their escapes are text.
struct LabelValue<'a>(&'a str);

impl fmt::Display for LabelValue<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for character in self.0.chars() {
            match character {
                '\\' => f.write_str("\\\\")?,
                '"' => f.write_str("\\\"")?,
                '\n' => f.write_str("\\n")?,
                other if is_escaped(other) => write!(f, "\\{}", Escaped::new(other))?,
                other => f.write_char(other)?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_escaped() {
        assert_eq!(LabelValue("a\\b\"c\nd€").to_string(), r#"a\\b\"c\nd€"#);
        assert_eq!(
            LabelValue("\u{1b}\u{202e}\r").to_string(),
            r"\\u{1b}\\u{202e}\\r"
        );
    }
}
