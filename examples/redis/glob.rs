//! Patterns of KEYS, PSUBSCRIBE and CONFIG GET: `*`, `?`, `[a-z]`, `[^a]`, `\*`.

use crate::db::Failure;

const MAX_PATTERN: usize = 1024;

/// Returns whether the whole `text` matches `pattern`.
///
/// Only the last star is tried again with more text, which is enough. So the work is bounded by the
/// product of both lengths, where recursion at each star would be exponential.
pub fn matches(mut pattern: &[u8], mut text: &[u8]) -> bool {
    let mut last_star: Option<(&[u8], &[u8])> = None;
    loop {
        if let [b'*', rest @ ..] = pattern {
            last_star = Some((rest, text));
            pattern = rest;
        } else if pattern.is_empty() && text.is_empty() {
            return true;
        } else if let Some(behind) = match_byte(pattern, text) {
            (pattern, text) = behind;
        } else if let Some((rest, [_, more @ ..])) = last_star {
            last_star = Some((rest, more));
            (pattern, text) = (rest, more);
        } else {
            return false;
        }
    }
}

/// Matches the first byte of `text`; returns what is behind it in both.
fn match_byte<'p, 't>(pattern: &'p [u8], text: &'t [u8]) -> Option<(&'p [u8], &'t [u8])> {
    let (&byte, text) = text.split_first()?;
    let (matches, rest) = match pattern {
        [b'?', rest @ ..] => (true, rest),
        [b'[', class @ ..] => match_class(class, byte),
        [b'\\', literal, rest @ ..] | [literal, rest @ ..] => (*literal == byte, rest),
        [] => return None,
    };
    matches.then_some((rest, text))
}

/// Matches a class behind its bracket. A class that is not closed ends with the pattern.
fn match_class(mut class: &[u8], byte: u8) -> (bool, &[u8]) {
    let negated = class.strip_prefix(b"^");
    class = negated.unwrap_or(class);
    let mut found = false;
    loop {
        class = match class {
            [b'\\', literal, rest @ ..] => {
                found |= *literal == byte;
                rest
            }
            [] => return (found != negated.is_some(), &[]),
            [b']', rest @ ..] => return (found != negated.is_some(), rest),
            [from, b'-', to, rest @ ..] => {
                found |= (*from.min(to)..=*from.max(to)).contains(&byte);
                rest
            }
            [literal, rest @ ..] => {
                found |= *literal == byte;
                rest
            }
        };
    }
}

/// Bounds the work of [`matches`].
pub fn check(patterns: &[&[u8]]) -> Result<(), Failure> {
    if patterns.iter().all(|pattern| pattern.len() <= MAX_PATTERN) {
        Ok(())
    } else {
        Err(format!("ERR a pattern has at most {MAX_PATTERN} bytes").into())
    }
}
