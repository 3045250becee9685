//! Results, and their tables.

use crate::common::chart::{Bar, Group, Section};
use crate::common::spread::{grouped, Spread};
use crate::servers::Kind;

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

/// Returns the panels of the chart.
pub fn panels(rows: &[Row], memory: &[Memory]) -> [Section; 3] {
    [costs(rows, false), costs(rows, true), bytes(memory)]
}

/// Ratios of the rows with or without TLS. All rows have one scale, so that bars compare.
fn costs(rows: &[Row], tls: bool) -> Section {
    let all = rows.iter().flat_map(|row| &row.costs);
    let most = all.map(|cost| cost.ratio.most).fold(1.0, f64::max);
    let rows: Vec<&Row> = rows.iter().filter(|row| row.tls == tls).collect();
    let reference = rows.first().map_or("", |row| row.costs[0].kind.name());
    let over = if tls { "TLS 1.3" } else { "Plain TCP" };
    let bar = |cost: &Cost| Bar {
        name: cost.kind.name(),
        ours: cost.kind.is_portcullis(),
        value: cost.ratio,
        median: format!("{:.2}", cost.ratio.median),
        range: format!("{:.2}–{:.2}", cost.ratio.least, cost.ratio.most),
        cost: format!("{:.2} µs", cost.microseconds),
    };
    let group = |row: &Row| Group {
        title: row.name.to_owned(),
        cost: "per message",
        bars: row.costs.iter().map(bar).collect(),
        most,
        reference: Some(1.0),
    };
    Section {
        heading: format!("{over}: messages per processor time, {reference} = 1; longer is better"),
        groups: rows.into_iter().map(group).collect(),
    }
}

fn bytes(memory: &[Memory]) -> Section {
    let bar = |&(kind, value): &(Kind, Spread)| Bar {
        name: kind.name(),
        ours: kind.is_portcullis(),
        value,
        median: grouped(value.median),
        range: format!("{}–{}", grouped(value.least), grouped(value.most)),
        cost: String::new(),
    };
    let group = |memory: &Memory| {
        let most = memory.bytes.iter().map(|(_, bytes)| bytes.most);
        let over = if memory.tls { "TLS 1.3" } else { "Plain TCP" };
        Group {
            title: format!("{over}, {} connections", grouped(memory.connections as f64)),
            cost: "",
            most: most.fold(1.0, f64::max),
            bars: memory.bytes.iter().map(bar).collect(),
            reference: None,
        }
    };
    Section {
        heading: "Bytes of memory for each idle connection; shorter is better".to_owned(),
        groups: memory.iter().map(group).collect(),
    }
}
