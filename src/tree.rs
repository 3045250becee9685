//! The supervision tree: server, listeners, connections. In parts, or as a text of bounded length.

use std::fmt;

use crate::handler::ConnInfo;
use crate::listener_info::ListenerInfo;
use crate::stats::Stats;

/// A server with its listeners and some of their connections, at one moment:
/// [`Control::tree`](crate::Control::tree). `Display` draws the tree, with a line for each.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Tree {
    /// The counters of the server.
    pub stats: Stats,
    /// Descriptors that the server has open: listeners and connections.
    pub descriptors: usize,
    /// Whether the server drains, or has drained.
    pub draining: bool,
    /// The listeners, oldest first, including closed ones that still have connections. Each has
    /// some of its connections, in the order of their slots; [`ListenerInfo::connections`] is the
    /// number of all.
    pub listeners: Vec<(ListenerInfo, Vec<ConnInfo>)>,
    /// Number of outgoing connections, in any state.
    pub outgoing: usize,
    /// Some of the outgoing connections, in the order of their slots.
    pub outgoing_connections: Vec<ConnInfo>,
}

impl fmt::Display for Tree {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "server{}: {} of {} connections, {} of them not open yet, {} bytes buffered, {} \
             descriptors",
            if self.draining { " (draining)" } else { "" },
            Grouped(self.stats.open),
            Grouped(self.stats.max_connections),
            Grouped(self.stats.pending),
            Grouped(self.stats.memory),
            Grouped(self.descriptors)
        )?;
        for (listener, connections) in &self.listeners {
            write!(
                f,
                "\n  {} {:?} on {}: {:?}, {} of {} connections, {} accepted",
                listener.id,
                listener.name,
                listener.addr,
                listener.state,
                Grouped(listener.connections),
                Grouped(listener.max_connections),
                listener.accepted
            )?;
            leaves(f, connections, listener.connections)?;
        }
        if self.outgoing > 0 {
            write!(f, "\n  outgoing: {} connections", Grouped(self.outgoing))?;
            leaves(f, &self.outgoing_connections, self.outgoing)?;
        }
        Ok(())
    }
}

/// Some connections out of a number.
fn leaves(f: &mut fmt::Formatter<'_>, connections: &[ConnInfo], all: usize) -> fmt::Result {
    for connection in connections {
        write!(f, "\n    {}", Leaf(connection))?;
    }
    match all.saturating_sub(connections.len()) {
        0 => Ok(()),
        more => write!(f, "\n    ... and {} more", Grouped(more)),
    }
}

/// One connection's line.
struct Leaf<'a>(&'a ConnInfo);

impl fmt::Display for Leaf<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let info = self.0;
        let way = if info.listener.is_some() {
            "from"
        } else {
            "to"
        };
        write!(f, "{} {way} {}", info.id, info.peer)?;
        if info.source != info.peer {
            write!(f, " for {}", info.source)?;
        }
        write!(f, ": {}", info.state)?;
        let stands = [
            (info.paused, "paused"),
            (info.congested, "congested"),
            (info.throttled, "throttled"),
            (info.paused_for_memory, "paused for memory"),
        ];
        for (_, word) in stands.iter().filter(|(stands, _)| *stands) {
            write!(f, " {word}")?;
        }
        write!(
            f,
            ", age {:.1?}, silent for {:.1?}, {} bytes and {} frames in, {} bytes and {} frames \
             out",
            info.age,
            info.idle,
            info.traffic.bytes_in,
            info.traffic.frames_in,
            info.traffic.bytes_out,
            info.traffic.frames_out
        )?;
        if info.buffered > 0 {
            write!(f, ", {} queued of {} buffered", info.queued, info.buffered)?;
        }
        for (name, left) in info.time_left() {
            write!(f, ", {name} in {left:.1?}")?;
        }
        Ok(())
    }
}

/// 100000 as 100,000.
struct Grouped(usize);

impl fmt::Display for Grouped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digits = self.0.to_string();
        for (at, digit) in digits.chars().enumerate() {
            if at > 0 && (digits.len() - at) % 3 == 0 {
                f.write_str(",")?;
            }
            write!(f, "{digit}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thousands_are_grouped() {
        for (number, text) in [
            (0, "0"),
            (999, "999"),
            (1000, "1,000"),
            (99_900, "99,900"),
            (1_234_567, "1,234,567"),
        ] {
            assert_eq!(Grouped(number).to_string(), text);
        }
    }
}
