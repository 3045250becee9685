//! Every short string, in every cut: whatever comes in whatever pieces, it is the same frames and the same end.

use std::time::Duration;

use portcullis::sim::{Deed, Single, Stimulus, Told};
use portcullis::Listen;

use crate::naive;

/// Headers, delimiters, and lengths that are too long.
const BYTES: [u8; 4] = [0, 1, 2, 255];
const MAX_FRAME: usize = 2;

/// Plays every string of up to `length` bytes over four that matter, in every cut, through a connection with the framing
/// of this number. Returns how many of string and cut there were.
///
/// # Errors
///
/// The string and the cuts that are not decoded as by a naive decoder.
pub fn play(framing: u8, length: usize) -> Result<u64, String> {
    let listen = Listen::tcp("127.0.0.1:0")
        .framing(Deed::framing(framing))
        .max_frame(MAX_FRAME)
        .idle_timeout(Duration::MAX)
        .frame_timeout(Duration::MAX);
    let mut single = Single::new(&listen).map_err(|error| error.to_string())?;
    apply(&mut single, Stimulus::OnFrame(Vec::new()))?;
    single.take_told();
    let mut search = Search {
        framing,
        string: Vec::new(),
        pieces: 0,
        played: 0,
    };
    search.go_on(&single, Vec::new(), length)?;
    Ok(search.played)
}

struct Search {
    framing: u8,
    string: Vec<u8>,
    /// A bit for each place behind which there is a cut.
    pieces: u32,
    played: u64,
}

impl Search {
    /// `single` has read the string so far, up to the last cut; `frames` is what came of it.
    fn go_on(&mut self, single: &Single, frames: Vec<Vec<u8>>, left: usize) -> Result<(), String> {
        self.finish(single, frames.clone())?;
        if left == 0 {
            return Ok(());
        }
        for byte in BYTES {
            self.string.push(byte);
            let mut with_more = fork(single)?;
            apply(&mut with_more, Stimulus::Input(vec![byte]))?;
            let mut cut = fork(&with_more)?;
            apply(&mut cut, Stimulus::Turn)?;
            let mut more = frames.clone();
            collect(&mut cut, &mut more);
            let place = 1 << self.string.len();
            self.pieces |= place;
            self.go_on(&cut, more, left - 1)?;
            self.pieces &= !place;
            self.go_on(&with_more, frames.clone(), left - 1)?;
            self.string.pop();
        }
        Ok(())
    }

    fn finish(&mut self, single: &Single, mut frames: Vec<Vec<u8>>) -> Result<(), String> {
        self.played += 1;
        let mut single = fork(single)?;
        for stimulus in [Stimulus::Turn, Stimulus::Finish, Stimulus::Turn] {
            apply(&mut single, stimulus)?;
        }
        collect(&mut single, &mut frames);
        let end = single.end().map(|end| end.reason);
        let (expected, reason) = naive::whole(self.framing, MAX_FRAME, &self.string);
        let same = if self.framing == 0 {
            frames.concat() == expected.concat()
        } else {
            frames == expected
        };
        if same && end == Some(reason) {
            return Ok(());
        }
        Err(format!(
            "{:?} in {:?}, cut behind {:#b}: {frames:?} and {end:?}, not {expected:?} and {reason}",
            Deed::framing(self.framing),
            self.string,
            self.pieces >> 1
        ))
    }
}

fn fork(single: &Single) -> Result<Single, String> {
    single
        .fork()
        .ok_or_else(|| "a plain connection cannot be copied".to_owned())
}

fn apply(single: &mut Single, stimulus: Stimulus) -> Result<(), String> {
    single.apply(&stimulus).map_err(|violation| violation.to_string())
}

fn collect(single: &mut Single, frames: &mut Vec<Vec<u8>>) {
    frames.extend(single.take_told().into_iter().filter_map(|told| match told {
        Told::Frame(frame) => Some(frame),
        _ => None,
    }));
}
