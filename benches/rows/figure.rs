//! What a row measures, its table and its part of the chart.

use crate::common::chart::{Bar, Group};
use crate::common::spread::{grouped, Spread};

/// How a figure is compared with that of the first server.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Sense {
    /// A cost: the ratio is the first server's over this one's.
    Cost,
    /// A rate: the ratio is this server's over the first one's.
    Rate,
    /// An amount of which less is better. The chart shows it, and not the ratio.
    Amount,
}

/// A figure of a row.
pub struct Head {
    pub title: String,
    pub unit: &'static str,
    pub sense: Sense,
}

impl Head {
    pub fn new(title: impl Into<String>, unit: &'static str, sense: Sense) -> Self {
        let title = title.into();
        Self { title, unit, sense }
    }
}

/// Values of a server, one for each round.
pub struct Values {
    pub name: &'static str,
    pub values: Vec<f64>,
}

/// A figure of all servers of a row; the first is the reference.
pub struct Figure {
    pub head: Head,
    pub servers: Vec<Values>,
}

impl Figure {
    /// The ratios of all rounds in which there is one. Greater is better, but for amounts.
    fn ratio(&self, server: &Values) -> Spread {
        let first = self.servers.first().map_or(&[][..], |first| &first.values);
        let pairs = first.iter().zip(&server.values);
        let ratios = pairs.map(|(first, value)| match self.head.sense {
            Sense::Cost => first / value,
            Sense::Rate | Sense::Amount => value / first,
        });
        Spread::of(ratios.filter(|ratio| ratio.is_finite()))
    }

    pub fn print(&self) {
        let Head { title, unit, sense } = &self.head;
        let first = self.servers.first().map_or("", |first| first.name);
        println!("\n{title}\n");
        let ratio = match sense {
            Sense::Cost => format!("as cheap as {first}"),
            Sense::Rate => format!("as fast as {first}"),
            Sense::Amount => format!("times that of {first}"),
        };
        println!("| server | {unit} | least and most | {ratio} | least and most of the rounds |");
        println!("|---|--:|--:|--:|--:|");
        for server in &self.servers {
            let of = Spread::of(server.values.iter().copied());
            let Spread {
                median,
                least,
                most,
            } = self.ratio(server);
            let ratio = match median.is_finite() {
                true => format!("{median:.2} | {least:.2} to {most:.2}"),
                false => "– | –".to_owned(),
            };
            println!(
                "| {} | {} | {} to {} | {ratio} |",
                server.name,
                digits(of.median),
                digits(of.least),
                digits(of.most),
            );
        }
    }

    pub fn group(&self) -> Group {
        let is_amount = self.head.sense == Sense::Amount;
        let write = |value| match is_amount {
            true => digits(value),
            false => format!("{value:.2}"),
        };
        let bar = |server: &Values| {
            let own = Spread::of(server.values.iter().copied());
            let value = if is_amount { own } else { self.ratio(server) };
            Bar {
                name: server.name,
                ours: server.name.starts_with("portcullis"),
                value,
                median: write(value.median),
                range: format!("{}–{}", write(value.least), write(value.most)),
                cost: match is_amount {
                    true => String::new(),
                    false => digits(own.median),
                },
            }
        };
        let bars: Vec<Bar> = self.servers.iter().map(bar).collect();
        let most = bars.iter().map(|bar| bar.value.most).fold(0.0, f64::max);
        let Head { title, unit, .. } = &self.head;
        let title = match is_amount {
            true => format!("{title}, {unit}: shorter is better"),
            false => format!("{title}: longer is better"),
        };
        Group {
            title,
            cost: unit,
            most: if most > 0.0 { most } else { 1.0 },
            reference: (!is_amount).then_some(1.0),
            bars,
        }
    }
}

/// Three digits or more.
fn digits(value: f64) -> String {
    match value.abs() {
        100.0.. => grouped(value),
        10.0.. => format!("{value:.1}"),
        0.0005.. => format!("{value:.2}"),
        _ => "0".to_owned(),
    }
}
