//! Every short string, in every cut: whatever comes in whatever pieces, it is the same frames and the same end.

use std::time::Duration;

use portcullis::sim::{Action, Callback, ConnModel, End, Input};
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
    let listen = Listen::tcp("127.0.0.1:0", Action::framing(framing)).with(|listen| {
        listen.conn.max_frame = Some(MAX_FRAME);
        listen.conn.idle_timeout = Duration::MAX;
        listen.conn.frame_timeout = Duration::MAX;
    });
    let mut model = ConnModel::new(&listen).map_err(|error| error.to_string())?;
    apply(&mut model, Input::OnFrame(Vec::new()))?;
    model.take_callbacks();
    let mut search = Search {
        framing,
        string: Vec::new(),
        pieces: 0,
        played: 0,
    };
    search.go_on(&model, Vec::new(), length)?;
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
    /// `model` has read the string so far, up to the last cut; `frames` is what came of it.
    fn go_on(
        &mut self,
        model: &ConnModel,
        frames: Vec<Vec<u8>>,
        left: usize,
    ) -> Result<(), String> {
        self.finish(model, frames.clone())?;
        if left == 0 {
            return Ok(());
        }
        for byte in BYTES {
            self.string.push(byte);
            let mut with_more = fork(model)?;
            apply(&mut with_more, Input::Bytes(vec![byte]))?;
            let mut cut = fork(&with_more)?;
            apply(&mut cut, Input::Turn)?;
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

    fn finish(&mut self, model: &ConnModel, mut frames: Vec<Vec<u8>>) -> Result<(), String> {
        self.played += 1;
        let mut model = fork(model)?;
        for input in [Input::Turn, Input::Finish, Input::Turn] {
            apply(&mut model, input)?;
        }
        collect(&mut model, &mut frames);
        let end = model.end().map(|end| end.reason);
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
            Action::framing(self.framing),
            self.string,
            self.pieces >> 1
        ))
    }
}

fn fork(model: &ConnModel) -> Result<ConnModel, String> {
    model
        .fork()
        .ok_or_else(|| "a plain connection cannot be copied".to_owned())
}

/// Lets the peer finish. Returns the frames that were delivered, and how the connection ended.
///
/// # Panics
///
/// If it breaks a promise, or does not end.
pub fn finish(model: &mut ConnModel) -> (Vec<Vec<u8>>, End) {
    for input in [Input::Finish, Input::Turn] {
        model.apply(&input).expect("it holds");
    }
    if model.end().is_none() {
        // It lingers for the peer's FIN, or has read it and still has to say goodbye.
        model.apply(&Input::Expire).expect("it holds");
    }
    let mut frames = Vec::new();
    collect(model, &mut frames);
    (frames, model.end().expect("a connection that has ended"))
}

fn apply(model: &mut ConnModel, input: Input) -> Result<(), String> {
    model
        .apply(&input)
        .map_err(|violation| violation.to_string())
}

fn collect(model: &mut ConnModel, frames: &mut Vec<Vec<u8>>) {
    frames.extend(
        model
            .take_callbacks()
            .into_iter()
            .filter_map(|callback| match callback {
                Callback::Frame(frame) => Some(frame),
                _ => None,
            }),
    );
}
