//! The result of a call as a record.

use std::io;

use super::format::Call;
use super::recorder::{Recorder, Value};
use crate::reactor::os::Token;

/// Records the result of a call about `target`. `value` says what is kept of success.
#[inline]
pub(super) fn note<T>(
    recorder: &Option<Box<Recorder>>,
    call: Call,
    target: u32,
    result: &io::Result<T>,
    value: impl FnOnce(&T) -> u64,
) {
    if let Some(recorder) = recorder {
        match result {
            Ok(result) => recorder.call(call, target, Value::Small(value(result))),
            Err(error) => recorder.failed(call, target, error),
        }
    }
}

/// As [`note`], for values that are bytes.
pub(super) fn note_bytes<T>(
    recorder: &Option<Box<Recorder>>,
    call: Call,
    target: u32,
    result: &io::Result<T>,
    put: impl FnOnce(&T, &mut Vec<u8>),
) {
    if let Some(recorder) = recorder {
        match result {
            Ok(result) => {
                let mut bytes = Vec::new();
                put(result, &mut bytes);
                recorder.call(call, target, Value::Bytes(&bytes));
            }
            Err(error) => recorder.failed(call, target, error),
        }
    }
}

/// Records a number, and returns it.
pub(super) fn note_number(recorder: &Option<Box<Recorder>>, call: Call, number: u64) -> u64 {
    if let Some(recorder) = recorder {
        recorder.call(call, 0, Value::Long(0, number));
    }
    number
}

/// A small number, or none.
pub(super) fn optional(number: Option<usize>) -> Value<'static> {
    match number {
        Some(number) => Value::Long(1, number as u64),
        None => Value::Small(0),
    }
}

pub(super) fn nothing<T>(_: &T) -> u64 {
    0
}

/// As [`note`], with the token under which the poll knows the descriptor.
pub(super) fn note_token(
    recorder: &Option<Box<Recorder>>,
    call: Call,
    target: u32,
    result: &io::Result<()>,
    token: Token,
) {
    if let Some(recorder) = recorder {
        match result {
            Ok(()) => recorder.call(call, target, Value::Long(0, token.0 as u64)),
            Err(error) => recorder.failed(call, target, error),
        }
    }
}
