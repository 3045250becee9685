//! The simplest decoder that can be right: everything is there, and nothing is remembered.

use portcullis::sim::Action;
use portcullis::{CloseReason, Framing};

/// What is at the front of the input.
#[derive(Debug, PartialEq, Eq)]
pub enum Front<'a> {
    /// A frame, and how many bytes it takes.
    Frame(&'a [u8], usize),
    /// Not a whole frame.
    Rest,
    TooLarge,
    /// A length that no frame can have.
    Bad,
}

/// The maximum payload next to `max` that the framing with this number accepts as an option.
pub fn accepted_max(framing: u8, max: usize) -> usize {
    match Action::framing(framing) {
        Framing::Fixed(length) => max.max(length as usize),
        _ => max,
    }
}

/// What the framing with this number (see `Action::framing`) finds at the front of `bytes`.
pub fn front(framing: u8, max: usize, bytes: &[u8]) -> Front<'_> {
    let width = match framing % Action::FRAMINGS {
        0 if bytes.is_empty() => return Front::Rest,
        0 => return Front::Frame(bytes, bytes.len()),
        1 => 1,
        2 => 2,
        3 => 4,
        6 if bytes.is_empty() => return Front::Rest,
        6 if max < 2 => return Front::TooLarge,
        6 => {
            return bytes
                .get(..2)
                .map_or(Front::Rest, |frame| Front::Frame(frame, 2))
        }
        7 => return with_length_behind_a_byte(max, bytes),
        8 => return with_little_length(max, bytes),
        number => {
            let delimiter = if number == 4 { b'\n' } else { 0 };
            return match bytes.iter().position(|&byte| byte == delimiter) {
                Some(at) if at < max => Front::Frame(&bytes[..=at], at + 1),
                _ if bytes.len() > max => Front::TooLarge,
                _ => Front::Rest,
            };
        }
    };
    let Some(header) = bytes.get(..width) else {
        return Front::Rest;
    };
    let length = header
        .iter()
        .fold(0, |sum, &byte| sum << 8 | usize::from(byte));
    if length > max {
        return Front::TooLarge;
    }
    match bytes.get(width..width + length) {
        Some(payload) => Front::Frame(payload, width + length),
        None => Front::Rest,
    }
}

/// A byte, then a length of two bytes that counts itself and what follows.
fn with_length_behind_a_byte(max: usize, bytes: &[u8]) -> Front<'_> {
    let &[_, high, low, ..] = bytes else {
        return Front::Rest;
    };
    let length = 1 + usize::from(high) * 256 + usize::from(low);
    match bytes.get(..length) {
        _ if length < 3 => Front::Bad,
        _ if length > max => Front::TooLarge,
        Some(frame) => Front::Frame(frame, length),
        None => Front::Rest,
    }
}

/// A length of three bytes, the least first, that counts all but itself and one byte.
fn with_little_length(max: usize, bytes: &[u8]) -> Front<'_> {
    let &[low, middle, high, ref behind @ ..] = bytes else {
        return Front::Rest;
    };
    let length = 1 + usize::from(high) * 65_536 + usize::from(middle) * 256 + usize::from(low);
    match behind.get(..length) {
        _ if length > max => Front::TooLarge,
        Some(frame) => Front::Frame(frame, 3 + length),
        None => Front::Rest,
    }
}

/// A whole stream with its end: the frames, and how a connection that says this ends.
pub fn whole(framing: u8, max: usize, mut bytes: &[u8]) -> (Vec<Vec<u8>>, CloseReason) {
    let mut frames = Vec::new();
    loop {
        match front(framing, max, bytes) {
            Front::Frame(frame, taken) => {
                frames.push(frame.to_vec());
                bytes = &bytes[taken..];
            }
            Front::Rest if bytes.is_empty() => return (frames, CloseReason::Finished),
            Front::Rest => return (frames, CloseReason::Truncated),
            Front::TooLarge => return (frames, CloseReason::FrameTooLarge),
            Front::Bad => return (frames, CloseReason::BadFrame),
        }
    }
}

/// How many bytes this frame takes at the front of `bytes`. Raw frames are pieces of any size.
///
/// # Errors
///
/// What is there instead.
pub fn taken_by(frame: &[u8], framing: u8, max: usize, bytes: &[u8]) -> Result<usize, String> {
    if framing % Action::FRAMINGS == 0 && !frame.is_empty() && bytes.starts_with(frame) {
        return Ok(frame.len());
    }
    match front(framing, max, bytes) {
        Front::Frame(expected, taken) if expected == frame => Ok(taken),
        other => Err(format!("a frame {frame:?} where there is {other:?}")),
    }
}

/// The name of a Unix socket as in `sun_path`.
pub fn sun_path(addr: &portcullis::Addr) -> Vec<u8> {
    let portcullis::Addr::Unix(name) = addr else {
        return Vec::new();
    };
    match (name.as_pathname(), name.as_abstract_name()) {
        (Some(path), _) => path.as_os_str().as_encoded_bytes().to_vec(),
        (None, Some(name)) => [&[0], name].concat(),
        (None, None) => Vec::new(),
    }
}
