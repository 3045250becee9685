//! Copies of a connection, and what tells two of them apart: for the exhaustive search of the simulator.

use super::active::Active;
use super::deadline::Deadlines;
use super::state::{Farewell, Flags};
use super::{Machine, State, Stopped, Time, Timer};
use crate::reason::{CloseReason, Closed};

/// Everything that the future of a plain connection depends on, with times as distances from now.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Fingerprint {
    state: State,
    farewell: Farewell,
    flags: Flags,
    max: usize,
    seen: usize,
    held: Vec<u8>,
    queued: Vec<u8>,
    deadlines: Deadlines,
    idle: Time,
    /// Where the frame's clock and the idle clock stand.
    stopped: Option<(Time, Time)>,
    timers: Vec<Timer>,
    judged: Time,
    discarded: usize,
    holds: u32,
    closed: Option<CloseReason>,
    /// Whether a frame has come: a stream that never made one may be TLS.
    made_frames: bool,
}

impl Active {
    /// A copy, but for the throttle and the error behind its end.
    fn fork(&self) -> Self {
        Self {
            held: self.held.clone(),
            held_at: self.held_at,
            outbox: self.outbox.clone(),
            deadlines: self.deadlines.clone(),
            stood: self.stood,
            stopped: self.stopped.clone(),
            timers: self.timers.clone(),
            judged: self.judged,
            discarded: self.discarded,
            proxy: self.proxy.clone(),
            throttle: None,
            holds: self.holds,
            closed: self.closed.as_ref().map(|closed| Closed::new(closed.reason)),
        }
    }
}

impl Machine {
    /// The handler has paused it.
    pub(crate) fn has_paused(&self) -> bool {
        self.flags.has(Flags::PAUSED)
    }

    /// A copy, but for the error behind its end. `None` over TLS, with a framer of the user's and with a throttle: those
    /// cannot be copied.
    pub(crate) fn fork(&self) -> Option<Self> {
        if self.tls.is_some() || self.throttle.is_some() {
            return None;
        }
        Some(Self {
            state: self.state,
            farewell: self.farewell,
            flags: self.flags,
            limits: std::rc::Rc::clone(&self.limits),
            codec: self.codec.fork()?,
            tls: None,
            last_input: self.last_input,
            traffic: self.traffic,
            active: self.active.as_ref().map(|active| Box::new(active.fork())),
        })
    }

    /// The same for two plain connections whose futures are the same.
    pub(crate) fn fingerprint(&self, now: Time) -> Fingerprint {
        let ahead = |time: Time| {
            if time.is_armed() {
                Time::from_start(time.since(now))
            } else {
                time
            }
        };
        let deadlines = |from: &Deadlines| Deadlines {
            stage: ahead(from.stage),
            frame: ahead(from.frame),
            write: ahead(from.write),
        };
        // Clocks that stand move with the present: what counts is how far from their end they stood.
        let stood = |stopped: &Stopped, time: Time| {
            if time.is_armed() {
                Time::from_start(time.since(stopped.at))
            } else {
                time
            }
        };
        let (max, seen) = self.codec.memory();
        Fingerprint {
            state: self.state,
            farewell: self.farewell,
            flags: self.flags,
            max,
            seen,
            held: self.held.get(self.held_at..).unwrap_or_default().to_vec(),
            queued: self.outbox.waiting().to_vec(),
            deadlines: deadlines(&self.deadlines),
            idle: ahead(self.idle()),
            // Nothing starts them again once it closes.
            stopped: self
                .stopped
                .as_ref()
                .filter(|_| self.state == State::Open)
                .map(|stopped| (stood(stopped, stopped.frame), stood(stopped, self.idle_end()))),
            timers: self
                .timers
                .iter()
                .map(|timer| Timer {
                    key: timer.key,
                    at: ahead(timer.at),
                })
                .collect(),
            // Only whether a timer that is due has been judged matters, and nothing due in the past stays unjudged.
            judged: ahead(self.judged),
            discarded: self.discarded,
            holds: self.holds,
            closed: self.closed.as_ref().map(|closed| closed.reason),
            made_frames: self.traffic.frames_in > 0,
        }
    }
}
