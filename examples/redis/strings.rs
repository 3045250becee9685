//! Strings and counters.

use crate::commands::{NOT_INTEGER, SYNTAX};
use crate::db::{Db, Failure, Value};
use crate::keys::future_deadline;
use crate::protocol::{integer, Reply};

/// Runs a command of this module. Returns false if the name or the arguments do not fit.
pub fn run(db: &mut Db, name: &str, args: &[&[u8]], reply: &mut Reply) -> Result<bool, Failure> {
    match (name, args) {
        ("get", [key]) => match db.get(key) {
            Some(Value::Shared(string)) => reply.shared(string),
            Some(value) => reply.bulk(value.string()?),
            None => reply.null(),
        },
        ("set", [key, value]) => {
            db.set(key, value, None);
            reply.ok();
        }
        ("set", [key, value, options @ ..]) => set(db, key, value, options, reply)?,
        ("setnx", [key, value]) => {
            let is_new = db.get(key).is_none();
            if is_new {
                db.set(key, value, None);
            }
            reply.integer(u8::from(is_new));
        }
        ("setex", [key, seconds, value]) => {
            let deadline = future_deadline(db, b"EX", seconds, name)?;
            db.set(key, value, Some(deadline));
            reply.ok();
        }
        ("getset", [key, value]) => {
            reply.bulk_or_null(db.string(key)?);
            db.set(key, value, None);
        }
        ("mget", keys @ [_, ..]) => {
            reply.array(keys.len());
            for key in keys {
                // A list counts as missing.
                reply.bulk_or_null(db.string(key).unwrap_or_default());
            }
        }
        ("mset", pairs @ [_, ..]) if pairs.len() % 2 == 0 => {
            for pair in pairs.chunks_exact(2) {
                if let [key, value] = pair {
                    db.set(key, value, None);
                }
            }
            reply.ok();
        }
        ("append", [key, more]) => {
            let length = db.update(key, Value::new(b""), |value| {
                let text = value.string_mut()?;
                text.extend_from_slice(more);
                Ok(text.len())
            })?;
            reply.integer(length);
        }
        ("strlen", [key]) => reply.integer(db.string(key)?.map_or(0, <[u8]>::len)),
        ("incr", [key]) => add(db, key, 1, reply)?,
        ("decr", [key]) => add(db, key, -1, reply)?,
        ("incrby", [key, by]) => add(db, key, integer(by).ok_or(NOT_INTEGER)?, reply)?,
        ("decrby", [key, by]) => {
            let by = integer(by).ok_or(NOT_INTEGER)?.checked_neg();
            add(db, key, by.ok_or("ERR decrement would overflow")?, reply)?;
        }
        _ => return Ok(false),
    }
    Ok(true)
}

fn set(
    db: &mut Db,
    key: &[u8],
    value: &[u8],
    mut options: &[&[u8]],
    reply: &mut Reply,
) -> Result<(), Failure> {
    let (mut must_exist, mut returns_old, mut keeps_deadline) = (None, false, false);
    let mut new_deadline = None;
    while let [option, rest @ ..] = options {
        options = rest;
        match (option.to_ascii_uppercase().as_slice(), rest) {
            (b"NX", _) if must_exist != Some(true) => must_exist = Some(false),
            (b"XX", _) if must_exist != Some(false) => must_exist = Some(true),
            (b"GET", _) => returns_old = true,
            (b"KEEPTTL", _) if new_deadline.is_none() => keeps_deadline = true,
            (unit @ (b"EX" | b"PX"), [time, rest @ ..])
                if new_deadline.is_none() && !keeps_deadline =>
            {
                new_deadline = Some(future_deadline(db, unit, time, "set")?);
                options = rest;
            }
            _ => return Err(SYNTAX.into()),
        }
    }
    let sets = must_exist.is_none_or(|must_exist| must_exist == db.get(key).is_some());
    if returns_old {
        reply.bulk_or_null(db.string(key)?);
    } else if sets {
        reply.ok();
    } else {
        reply.null();
    }
    if keeps_deadline {
        new_deadline = db.deadline(key).flatten();
    }
    if sets {
        db.set(key, value, new_deadline);
    }
    Ok(())
}

fn add(db: &mut Db, key: &[u8], by: i64, reply: &mut Reply) -> Result<(), Failure> {
    let sum = db.update(key, Value::new(b"0"), |value| {
        let text = value.string_mut()?;
        let sum = integer(text).ok_or(NOT_INTEGER)?.checked_add(by);
        let sum = sum.ok_or("ERR increment or decrement would overflow")?;
        *text = sum.to_string().into_bytes();
        Ok(sum)
    })?;
    reply.integer(sum);
    Ok(())
}
