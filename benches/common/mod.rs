//! What the benches on real sockets share.
#![allow(dead_code)] // each uses its part

pub mod chart;
pub mod fan_out;
pub mod load;
pub mod machine;
pub mod process;
#[cfg(feature = "record")]
pub mod recorded;
#[cfg(feature = "aws-lc-rs")]
pub mod site;
pub mod spread;
#[cfg(feature = "aws-lc-rs")]
pub mod tls_stream;

use indicatif::{ProgressBar, ProgressStyle};
use nix::sys::resource::{getrlimit, setrlimit, Resource};
use portcullis::{Context, Handler, Outcome};

/// Sends every frame back.
pub struct Echo;

impl Handler for Echo {
    fn on_frame(&mut self, cx: &mut Context<'_>, frame: &[u8]) -> Outcome {
        cx.conn.send(frame)?;
        Ok(())
    }
}

/// As many descriptors as the system allows; how many those are.
pub fn raise_descriptor_limit() -> u64 {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("a limit");
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).map_or(soft, |()| hard)
}

/// The progress of `total` rounds, in place on a terminal: n of N, the rate, the time left.
pub fn progress(total: usize) -> ProgressBar {
    progress_of(total, "rounds")
}

/// As [`progress`], of other things than rounds.
pub fn progress_of(total: usize, things: &str) -> ProgressBar {
    let line = format!("{{pos}} of {{len}} {things}, {{per_sec}}, {{eta}} left");
    let style = ProgressStyle::with_template(&line).expect("a template");
    ProgressBar::new(total as u64).with_style(style)
}

pub fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
