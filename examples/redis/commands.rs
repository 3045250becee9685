//! The names of all commands, and what the commands have in common.

use std::iter::zip;

use portcullis::Context;

use crate::db::{self, Failure};
use crate::protocol::Reply;
use crate::{connection, keys, lists, pubsub, strings, App, Client};

pub const NOT_INTEGER: &str = "ERR value is not an integer or out of range";
pub const OOM: &str = "OOM command not allowed when used memory > 'maxmemory'.";
pub const SYNTAX: &str = "ERR syntax error";

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Class {
    Plain,
    /// Refused when memory is short.
    Grows,
    /// Allowed for clients that have subscribed.
    Subscriber,
    /// Refused when memory is short, and allowed for clients that have subscribed.
    Subscribes,
}

use Class::{Grows, Plain, Subscriber, Subscribes};

#[rustfmt::skip]
pub static COMMANDS: &[(&str, Class)] = &[
    ("get", Plain), ("set", Grows), ("setnx", Grows), ("setex", Grows), ("getset", Grows),
    ("mget", Plain), ("mset", Grows), ("append", Grows), ("strlen", Plain),
    ("incr", Grows), ("decr", Grows), ("incrby", Grows), ("decrby", Grows),
    ("del", Plain), ("unlink", Plain), ("exists", Plain), ("type", Plain), ("keys", Plain),
    ("dbsize", Plain), ("flushall", Plain), ("flushdb", Plain),
    ("expire", Plain), ("pexpire", Plain), ("expireat", Plain), ("persist", Plain),
    ("ttl", Plain), ("pttl", Plain),
    ("lpush", Grows), ("rpush", Grows), ("lpop", Plain), ("rpop", Plain), ("llen", Plain),
    ("lrange", Plain), ("lindex", Plain), ("ltrim", Plain), ("lrem", Plain),
    ("subscribe", Subscribes), ("psubscribe", Subscribes),
    ("unsubscribe", Subscriber), ("punsubscribe", Subscriber),
    ("publish", Plain), ("pubsub", Plain),
    ("ping", Subscriber), ("quit", Subscriber), ("reset", Subscriber),
    ("echo", Plain), ("select", Plain), ("hello", Plain), ("client", Plain),
    ("command", Plain), ("config", Plain), ("info", Plain), ("time", Plain),
];

/// Commands with subcommands.
const CONTAINERS: &[&str] = &["client", "command", "config", "pubsub"];

/// Runs one command. The module of a command matches the arguments too, and returns false if they
/// do not fit.
pub fn run(
    client: &mut Client,
    cx: &mut Context<'_, App>,
    name: &[u8],
    args: &[&[u8]],
    reply: &mut Reply,
) -> Result<(), Failure> {
    // The names are letters: the bit makes a capital small.
    let is_letter = |(sent, letter): (&u8, u8)| sent | 0x20 == letter;
    let is_named = |(command, _): &&(&str, Class)| {
        name.len() == command.len() && zip(name, command.bytes()).all(is_letter)
    };
    let Some(&(name, class)) = COMMANDS.iter().find(is_named) else {
        return Err(unknown_command(name, args));
    };
    if !client.topics.is_empty() && !matches!(class, Subscriber | Subscribes) {
        let allowed = "(P|S)SUBSCRIBE / (P|S)UNSUBSCRIBE / PING / QUIT / RESET";
        let error =
            format!("ERR Can't execute '{name}': only {allowed} are allowed in this context");
        return Err(error.into());
    }
    let has_room = match class {
        Plain | Subscriber => true,
        Grows => cx.app.db.has_room(args, db::key_size),
        Subscribes => cx.app.db.has_room(args, pubsub::subscription_size),
    };
    if !has_room {
        return Err(OOM.into());
    }
    cx.app.commands += 1;
    let db = &mut cx.app.db;
    let has_run = strings::run(db, name, args, reply)?
        || keys::run(db, name, args, reply)?
        || lists::run(db, name, args, reply)?
        || pubsub::run(client, cx, name, args, reply)?
        || connection::run(client, cx, name, args, reply)?;
    match args {
        _ if has_run => Ok(()),
        [word, ..] if CONTAINERS.contains(&name) => {
            let (word, name) = (quote(word), name.to_ascii_uppercase());
            Err(format!("ERR unknown subcommand '{word}'. Try {name} HELP.").into())
        }
        _ => Err(format!("ERR wrong number of arguments for '{name}' command").into()),
    }
}

fn unknown_command(name: &[u8], args: &[&[u8]]) -> Failure {
    let args: Vec<_> = args
        .iter()
        .take(8)
        .map(|word| format!("'{}' ", quote(word)))
        .collect();
    let (name, args) = (quote(name), args.concat());
    format!("ERR unknown command '{name}', with args beginning with: {args}").into()
}

/// The beginning of a word that a client has sent.
fn quote(word: &[u8]) -> String {
    String::from_utf8_lossy(word.get(..128).unwrap_or(word)).into_owned()
}
