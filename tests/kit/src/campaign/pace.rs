//! A second account of how fast peers take output and send frames: whoever is too slow must be gone.

use std::collections::BTreeMap;
use std::time::Duration;

use portcullis::{ConnId, ConnInfo, State};

/// Timeout and bytes per second.
pub type Limit = (Duration, u32);

/// What one connection is held to.
pub struct Limits {
    pub write: Limit,
    pub frame: Limit,
    /// With so many bytes of pending output it is not read.
    pub congested_from: usize,
    /// Number of pauses so far: one may begin and end between two looks, and its time does not
    /// count for a frame.
    pub pauses: u64,
}

/// A peer that has something to do, and since when.
#[derive(Clone, Copy)]
struct Task {
    /// Under another limit it is another task.
    limit: Limit,
    /// Behind another pause, an incomplete frame is another task.
    pauses: u64,
    since: Duration,
    /// Bytes that had passed by then.
    passed: u64,
    /// It may be done once so many more have.
    left: u64,
    /// Frames that had been delivered by then.
    frames: u64,
    /// The last look, and the bytes written until then.
    seen: Duration,
    written: u64,
}

/// What every connection has to do.
#[derive(Default)]
pub struct Pace {
    output: BTreeMap<ConnId, Task>,
    frames: BTreeMap<ConnId, Task>,
}

impl Pace {
    /// Looks at all connections.
    pub fn check(
        &mut self,
        now: Duration,
        infos: &[ConnInfo],
        mut limits: impl FnMut(&ConnInfo) -> Option<Limits>,
    ) -> Result<(), String> {
        let (mut output, mut frames) = (BTreeMap::new(), BTreeMap::new());
        for info in infos {
            let Some(limits) = limits(info) else {
                continue;
            };
            let out = info.traffic.bytes_out;
            if info.queued > 0 && matches!(info.state, State::Open | State::Closing) {
                let begun = Task {
                    limit: limits.write,
                    pauses: 0,
                    since: now,
                    passed: out,
                    left: info.queued as u64,
                    frames: 0,
                    seen: now,
                    written: out,
                };
                let known = self.output.get(&info.id).copied();
                let task =
                    known.filter(|task| task.limit == begun.limit && out - task.passed < task.left);
                let task = task.unwrap_or(begun);
                task.is_in_time(now, out)
                    .map_err(|late| format!("pending output {late}: {info}"))?;
                output.insert(info.id, task);
            }
            let is_read =
                !(info.paused || info.congested || info.throttled || info.paused_for_memory);
            let inside = info.buffered > info.queued;
            if inside && is_read && info.state == State::Open {
                let (passed, delivered) = (info.traffic.bytes_in, info.traffic.frames_in);
                let begun = Task {
                    limit: limits.frame,
                    pauses: limits.pauses,
                    since: now,
                    passed,
                    left: 0,
                    frames: delivered,
                    seen: now,
                    written: out,
                };
                let known = self.frames.get(&info.id).copied();
                let of = |task: &Task| (task.limit, task.pauses, task.frames);
                let task = known.filter(|task| of(task) == of(&begun));
                let mut task = task.unwrap_or(begun);
                // Between two looks no more was pending at once. If that is enough, the connection
                // may not have been read meanwhile.
                let most = out + info.queued as u64 - task.written;
                if most >= limits.congested_from as u64 {
                    task.since += now - task.seen;
                }
                (task.seen, task.written) = (now, out);
                task.is_in_time(now, passed)
                    .map_err(|late| format!("an incomplete frame {late}: {info}"))?;
                frames.insert(info.id, task);
            }
        }
        (self.output, self.frames) = (output, frames);
        Ok(())
    }
}

impl Task {
    /// Each byte is worth its time at the minimum rate, and the peer may be behind by the timeout.
    fn is_in_time(&self, now: Duration, passed: u64) -> Result<(), String> {
        let (timeout, rate) = self.limit;
        let (took, bytes) = (now - self.since, passed - self.passed);
        let worth = Duration::from_secs_f64(bytes as f64 / f64::from(rate));
        // The simulator's clock ticks between calls.
        let may = timeout
            .saturating_add(worth)
            .saturating_add(Duration::from_millis(1));
        if took <= may {
            return Ok(());
        }
        Err(format!(
            "moved by {bytes} bytes in {took:?}, {may:?} is the most"
        ))
    }
}
