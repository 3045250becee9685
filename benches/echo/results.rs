//! Results, and their tables.

use crate::common::median;
use crate::servers::Kind;

/// Median and range of a figure over the rounds.
#[derive(Clone, Copy)]
pub struct Spread {
    pub median: f64,
    pub least: f64,
    pub most: f64,
}

impl Spread {
    pub fn of(values: impl IntoIterator<Item = f64>) -> Self {
        let values: Vec<f64> = values.into_iter().collect();
        Self {
            median: median(values.iter().copied()),
            least: values.iter().copied().fold(f64::INFINITY, f64::min),
            most: values.iter().copied().fold(f64::NEG_INFINITY, f64::max),
        }
    }
}

/// Cost of a message with one kind of server.
pub struct Cost {
    pub kind: Kind,
    /// The reference's processor time per message over this server's, round by round.
    pub ratio: Spread,
    /// Processor time per message, the median.
    pub microseconds: f64,
    /// Messages per second, the median.
    pub rate: f64,
}

/// The same work with each kind of server; the first is the reference.
pub struct Row {
    pub name: &'static str,
    pub tls: bool,
    pub costs: Vec<Cost>,
}

impl Row {
    pub fn print(&self) {
        let over = if self.tls { ", TLS 1.3" } else { "" };
        println!("\n{}{over}\n", self.name);
        println!(
            "| server | processor time per message | messages per second | as cheap as {} | least and most of the rounds |",
            self.costs[0].kind.name()
        );
        println!("|---|---|---|---|---|");
        for cost in &self.costs {
            let Spread {
                median,
                least,
                most,
            } = cost.ratio;
            println!(
                "| {} | {:.2} µs | {:.0} | {median:.2} | {least:.2} to {most:.2} |",
                cost.kind.name(),
                cost.microseconds,
                cost.rate,
            );
        }
    }

    /// The ratio of one kind.
    pub fn ratio(&self, kind: Kind) -> Option<f64> {
        let cost = self.costs.iter().find(|cost| cost.kind == kind)?;
        Some(cost.ratio.median)
    }
}

/// Bytes of memory for each idle connection.
pub struct Memory {
    pub tls: bool,
    pub connections: usize,
    pub bytes: Vec<(Kind, Spread)>,
}

impl Memory {
    pub fn print(&self) {
        let over = if self.tls { ", TLS 1.3" } else { "" };
        println!(
            "\n{} idle connections{over}\n",
            grouped(self.connections as f64)
        );
        println!("| server | bytes per connection | least and most of the rounds |");
        println!("|---|---|---|");
        for (kind, spread) in &self.bytes {
            let Spread {
                median,
                least,
                most,
            } = spread;
            println!(
                "| {} | {median:.0} | {least:.0} to {most:.0} |",
                kind.name()
            );
        }
    }
}

/// A whole number with its thousands separated.
pub fn grouped(number: f64) -> String {
    let digits = format!("{number:.0}");
    let parts: Vec<&str> = digits
        .as_bytes()
        .rchunks(3)
        .rev()
        .map(|part| std::str::from_utf8(part).unwrap_or_default())
        .collect();
    parts.join(",")
}
