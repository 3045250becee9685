//! Keys of any type, and their expiry.

use crate::commands::NOT_INTEGER;
use crate::db::{Db, Failure, Value};
use crate::glob;
use crate::protocol::{integer, Reply};

/// Runs a command of this module. Returns false if the name or the arguments do not fit.
pub fn run(db: &mut Db, name: &str, args: &[&[u8]], reply: &mut Reply) -> Result<bool, Failure> {
    match (name, args) {
        ("del" | "unlink", keys @ [_, ..]) => {
            reply.integer(keys.iter().filter(|key| db.remove(key)).count());
        }
        ("exists", keys @ [_, ..]) => {
            reply.integer(keys.iter().filter(|key| db.get(key).is_some()).count());
        }
        ("type", [key]) => reply.simple(match db.get(key) {
            Some(Value::String(_) | Value::Shared(_)) => "string",
            Some(Value::List(_)) => "list",
            None => "none",
        }),
        ("keys", [pattern]) => {
            glob::check(args)?;
            reply.bulks(db.keys().filter(|key| glob::matches(pattern, key)));
        }
        ("dbsize", []) => reply.integer(db.len()),
        ("flushall" | "flushdb", [] | [_]) => {
            db.clear(); // SYNC or ASYNC makes no difference
            reply.ok();
        }
        ("expire", [key, time]) => expire(db, key, deadline(db, b"EX", time, name)?, reply),
        ("pexpire", [key, time]) => expire(db, key, deadline(db, b"PX", time, name)?, reply),
        ("expireat", [key, time]) => expire(db, key, deadline(db, b"EXAT", time, name)?, reply),
        ("ttl", [key]) => reply.integer(match time_left(db, key) {
            left @ ..0 => left,
            left => left.saturating_add(500) / 1000,
        }),
        ("pttl", [key]) => reply.integer(time_left(db, key)),
        ("persist", [key]) => {
            let has_deadline = db.deadline(key).flatten().is_some();
            db.set_deadline(key, None);
            reply.integer(u8::from(has_deadline));
        }
        _ => return Ok(false),
    }
    Ok(true)
}

/// Sets a deadline, or removes the key if the deadline has passed already.
fn expire(db: &mut Db, key: &[u8], deadline: i64, reply: &mut Reply) {
    let exists = db.get(key).is_some();
    if deadline > db.now() {
        db.set_deadline(key, Some(deadline));
    } else {
        db.remove(key);
    }
    reply.integer(u8::from(exists));
}

/// Returns the milliseconds until a key expires: -1 without a deadline, -2 without a key.
fn time_left(db: &mut Db, key: &[u8]) -> i64 {
    match db.deadline(key) {
        None => -2,
        Some(None) => -1,
        Some(Some(deadline)) => deadline - db.now(),
    }
}

/// Reads a time in the unit of an option of SET: EX and PX from now on, EXAT since 1970.
fn deadline(db: &Db, unit: &[u8], time: &[u8], command: &str) -> Result<i64, Failure> {
    let (scale, since) = match unit {
        b"PX" => (1, db.now()),
        b"EXAT" => (1000, 0),
        _ => (1000, db.now()),
    };
    let millis = integer(time).ok_or(NOT_INTEGER)?.checked_mul(scale);
    let deadline = millis.and_then(|millis| millis.checked_add(since));
    deadline.ok_or_else(|| invalid(command))
}

/// As [`deadline`], for commands that refuse a time that has passed.
pub fn future_deadline(db: &Db, unit: &[u8], time: &[u8], command: &str) -> Result<i64, Failure> {
    let deadline = deadline(db, unit, time, command)?;
    if deadline > db.now() {
        Ok(deadline)
    } else {
        Err(invalid(command))
    }
}

fn invalid(command: &str) -> Failure {
    format!("ERR invalid expire time in '{command}' command").into()
}
