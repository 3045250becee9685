//! One plain connection, as a list of things that happen to it.
//!
//! `Single` checks its invariants after each. Here: the handler gets what a naive decoder makes of the same bytes, and
//! whatever has happened, time leads to the end.
#![no_main]

use std::time::Duration;

use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use portcullis::sim::{Deed, Single, Stimulus, Told};
use portcullis::Listen;

#[path = "../../examples/support/naive.rs"]
mod naive;

#[derive(Arbitrary, Debug)]
struct Case {
    framing: u8,
    max_frame: u8,
    watermarks: [u8; 3],
    /// In milliseconds: frame, idle, write, linger.
    timeouts: [u8; 4],
    linger_bytes: u8,
    stimuli: Vec<Stimulus>,
}

impl Case {
    fn listen(&self) -> Listen {
        let [low, more, most] = self.watermarks.map(usize::from);
        let [frame, idle, write, linger] = self.timeouts.map(|ms| Duration::from_millis(u64::from(ms) + 1));
        Listen::tcp("127.0.0.1:0")
            .framing(Deed::framing(self.framing))
            .max_frame(usize::from(self.max_frame) + 1)
            .watermarks(low, low + more + 1)
            .output_limit(low + more + 1 + most)
            .frame_timeout(frame)
            .idle_timeout(idle)
            .write_timeout(write)
            .linger(linger, usize::from(self.linger_bytes))
    }

    /// Nobody changes the framing on the way.
    fn is_tame(&self) -> bool {
        let shifts = |deed: &Deed| matches!(deed, Deed::Framing(_) | Deed::MaxFrame(_));
        !self.stimuli.iter().any(|stimulus| match stimulus {
            Stimulus::Act(deed) => shifts(deed),
            Stimulus::OnFrame(deeds) | Stimulus::OnEnd(deeds) => deeds.iter().any(shifts),
            _ => false,
        })
    }
}

fuzz_target!(|case: Case| {
    let mut single = Single::new(&case.listen()).expect("settings that work");
    let tame = case.is_tame();
    let max = usize::from(case.max_frame) + 1;
    let mut underway = Vec::new();
    let mut arrived = 0;
    for stimulus in &case.stimuli {
        let unread = single.unread();
        single.apply(stimulus).expect("it holds");
        if let Stimulus::Input(bytes) = stimulus {
            if single.unread() > unread {
                underway.extend_from_slice(bytes);
                arrived += bytes.len();
            }
        }
        for told in single.take_told() {
            if let (Told::Frame(frame), true) = (told, tame) {
                let taken = naive::taken_by(&frame, case.framing, max, &underway).expect("as a naive decoder has it");
                underway.drain(..taken);
            }
        }
    }
    // Every turn of this loop brings a deadline, or a frame that the handler paused after.
    single.apply(&Stimulus::Turn).expect("it holds");
    for _ in 0..arrived + 100 {
        if single.end().is_some() {
            return;
        }
        let onwards = if single.has_deadline() {
            [Stimulus::Expire, Stimulus::Turn]
        } else {
            assert!(single.is_at_rest(), "no deadline is armed: {single:?}");
            [Stimulus::Act(Deed::Resume), Stimulus::Turn]
        };
        for stimulus in &onwards {
            single.apply(stimulus).expect("it holds");
        }
    }
    panic!("no end in sight: {single:?}");
});
