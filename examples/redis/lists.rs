//! Lists.

use std::collections::VecDeque;
use std::ops::Range;

use crate::commands::NOT_INTEGER;
use crate::db::{Db, End, Failure, List, Value};
use crate::protocol::{integer, Reply};

/// Runs a command of this module. Returns false if the name or the arguments do not fit.
pub fn run(db: &mut Db, name: &str, args: &[&[u8]], reply: &mut Reply) -> Result<bool, Failure> {
    let end = if name.starts_with('l') {
        End::Left
    } else {
        End::Right
    };
    match (name, args) {
        ("lpush" | "rpush", [key, items @ ..]) if !items.is_empty() => {
            let length = update(db, key, |list| {
                items.iter().for_each(|item| list.push(end, item));
                list.len()
            })?;
            reply.integer(length);
        }
        ("lpop" | "rpop", [key]) => reply.bulk_or_null(update(db, key, |list| list.pop(end))?),
        ("lpop" | "rpop", [key, count]) => {
            let count = integer(count).and_then(|count| usize::try_from(count).ok());
            let count = count.ok_or("ERR value is out of range, must be positive")?;
            if db.list(key)?.is_none() {
                reply.null_array();
            } else {
                let pop = |list: &mut List| (0..count).map_while(|_| list.pop(end)).collect();
                reply.bulks::<Vec<u8>>(update::<Vec<_>>(db, key, pop)?);
            }
        }
        ("llen", [key]) => reply.integer(db.list(key)?.map_or(0, VecDeque::len)),
        ("lrange", [key, start, stop]) => {
            let bounds = bounds(start, stop)?;
            match db.list(key)? {
                Some(list) => reply.bulks(list.range(range(bounds, list.len()))),
                None => reply.array(0),
            }
        }
        ("lindex", [key, index]) => {
            let index = integer(index).ok_or(NOT_INTEGER)?;
            let list = db.list(key)?;
            let at = |list: &VecDeque<_>| usize::try_from(from_start(index, list.len())).ok();
            reply.bulk_or_null(list.and_then(|list| list.get(at(list)?)));
        }
        ("ltrim", [key, start, stop]) => {
            let bounds = bounds(start, stop)?;
            update(db, key, |list| {
                let range = range(bounds, list.len());
                (range.end..list.len()).for_each(|_| drop(list.pop(End::Right)));
                (0..range.start).for_each(|_| drop(list.pop(End::Left)));
            })?;
            reply.ok();
        }
        ("lrem", [key, count, item]) => {
            let count = integer(count).ok_or(NOT_INTEGER)?;
            reply.integer(update(db, key, |list| remove(list, count, item))?);
        }
        _ => return Ok(false),
    }
    Ok(true)
}

/// Changes a list, or a new list.
fn update<T>(db: &mut Db, key: &[u8], change: impl FnOnce(&mut List) -> T) -> Result<T, Failure> {
    db.update(key, Value::List(List::default()), |value| {
        Ok(change(value.list_mut()?))
    })
}

/// Removes up to `count` elements equal to `item`: from the end if negative, all if 0.
fn remove(list: &mut List, count: i64, item: &[u8]) -> usize {
    let mut left = match count {
        0 => u64::MAX,
        _ => count.unsigned_abs(),
    };
    let before = list.len();
    let mut keeps = |other: &Vec<u8>| {
        let removes = left > 0 && other == item;
        left -= u64::from(removes);
        !removes
    };
    list.rebuild(|items| {
        if count < 0 {
            items.make_contiguous().reverse();
        }
        items.retain(&mut keeps);
        if count < 0 {
            items.make_contiguous().reverse();
        }
    });
    before - list.len()
}

fn bounds(start: &[u8], stop: &[u8]) -> Result<(i64, i64), Failure> {
    let (start, stop) = (integer(start), integer(stop));
    Ok((start.ok_or(NOT_INTEGER)?, stop.ok_or(NOT_INTEGER)?))
}

/// Returns the positions from `start` to `stop` inclusive, within a list of this length.
fn range((start, stop): (i64, i64), length: usize) -> Range<usize> {
    let start = usize::try_from(from_start(start, length)).unwrap_or(0);
    let stop = from_start(stop, length).saturating_add(1);
    let stop = usize::try_from(stop).unwrap_or(0).min(length);
    start.min(stop)..stop
}

/// Converts an index of a command: a negative index counts from the end of the list.
fn from_start(index: i64, length: usize) -> i64 {
    if index < 0 {
        index.saturating_add_unsigned(length as u64)
    } else {
        index
    }
}
