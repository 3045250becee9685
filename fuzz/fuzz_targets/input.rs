//! Inputs of one connection in few bytes, so that one byte changed changes one thing.

use libfuzzer_sys::arbitrary::{Result, Unstructured};
use portcullis::sim::{Action, Input};

/// One byte for the input, and its operands.
pub fn one(input: &mut Unstructured<'_>) -> Result<Input> {
    Ok(match input.arbitrary::<u8>()? % 64 {
        0..=15 => Input::Bytes(bytes(input)?),
        16..=27 => Input::Turn,
        28..=29 => Input::Step,
        30..=33 => Input::Room(input.arbitrary()?),
        34..=37 => Input::OnFrame(actions(input)?),
        38..=39 => Input::OnEnd(actions(input)?),
        40..=47 => Input::Act(action(input)?),
        48..=50 => Input::Pass {
            millis: input.arbitrary()?,
        },
        51..=53 => Input::Expire,
        54..=55 => Input::ExpireDue,
        56 => Input::Finish,
        57 => Input::Admit,
        58 => Input::Reset,
        59 => Input::BreakPipe,
        60 => Input::OutOfMemory,
        61 => Input::Spurious,
        62 => Input::Drain,
        _ => Input::CutShort,
    })
}

/// A length of one byte, and so many bytes or all that are left.
pub fn bytes(input: &mut Unstructured<'_>) -> Result<Vec<u8>> {
    let length = usize::from(input.arbitrary::<u8>()?);
    Ok(input.bytes(length.min(input.len()))?.to_vec())
}

fn actions(input: &mut Unstructured<'_>) -> Result<Vec<Action>> {
    let length = usize::from(input.arbitrary::<u8>()?);
    let length = length.min(input.len().div_ceil(2));
    (0..length).map(|_| action(input)).collect()
}

/// Two bytes each.
fn action(input: &mut Unstructured<'_>) -> Result<Action> {
    let [what, how] = input.arbitrary::<[u8; 2]>()?;
    Ok(match what % 14 {
        0 => Action::Echo,
        1 => Action::Send(how),
        2 => Action::Pause,
        3 => Action::Resume,
        4 => Action::Close,
        5 => Action::CloseAfterInput,
        6 => Action::Finish,
        7 => Action::Abort,
        8 => Action::Fail,
        9 => Action::Panic,
        10 => Action::Timer(how),
        11 => Action::Framing(how),
        12 => Action::MaxFrame(how),
        _ => Action::NotifyFlushed,
    })
}
