//! Commands about the connection and the server.

use std::fmt::Write;

use portcullis::Context;

use crate::commands::{COMMANDS, NOT_INTEGER, SYNTAX};
use crate::db::Failure;
use crate::glob;
use crate::protocol::{integer, Reply};
use crate::pubsub;
use crate::{App, Client};

/// The version of Redis whose error texts these are.
const VERSION: &str = "7.0.15";
const MAX_NAME: usize = 256;

/// Runs a command of this module. Returns false if the name or the arguments do not fit.
pub fn run(
    client: &mut Client,
    cx: &mut Context<'_, App>,
    name: &str,
    args: &[&[u8]],
    reply: &mut Reply,
) -> Result<bool, Failure> {
    match (name, args) {
        ("ping", [] | [_]) if !client.topics.is_empty() => {
            reply.bulks([b"pong", args.first().copied().unwrap_or_default()]);
        }
        ("ping", []) => reply.simple("PONG"),
        ("ping" | "echo", [text]) => reply.bulk(text),
        ("quit", _) => {
            client.has_quit = true;
            reply.ok();
        }
        ("reset", []) => {
            pubsub::unsubscribe_all(client, cx);
            pubsub::limit_output(client, cx)?;
            set_name(cx, b"")?;
            reply.simple("RESET");
        }
        ("select", [index]) => match integer(index) {
            Some(0) => reply.ok(),
            Some(_) => return Err("ERR DB index is out of range".into()),
            None => return Err(NOT_INTEGER.into()),
        },
        ("hello", []) => hello(client, reply),
        ("hello", [version, options @ ..]) => {
            match integer(version) {
                Some(2) => {}
                Some(_) => return Err("NOPROTO unsupported protocol version".into()),
                None => return Err("ERR Protocol version is not an integer or out of range".into()),
            }
            match options {
                [] => {}
                [word, name] if word.eq_ignore_ascii_case(b"SETNAME") => set_name(cx, name)?,
                _ => return Err(SYNTAX.into()),
            }
            hello(client, reply);
        }
        ("client", [word, rest @ ..]) => match (word.to_ascii_uppercase().as_slice(), rest) {
            (b"SETNAME", [name]) => {
                set_name(cx, name)?;
                reply.ok();
            }
            (b"SETINFO", [_, _]) => reply.ok(), // of the client's library: not kept
            (b"GETNAME", []) => {
                let name = cx.app.clients.get(&cx.conn.id()).map(|(_, name)| name);
                reply.bulk_or_null(name.filter(|name| !name.is_empty()));
            }
            (b"ID", []) => reply.integer(client.number),
            (b"LIST", []) => reply.bulk(list(cx)),
            _ => return Ok(false),
        },
        // redis-cli asks for COMMAND DOCS first. Where that is missing it shows its own help.
        ("command", []) => {
            reply.array(COMMANDS.len());
            for (name, _) in COMMANDS {
                // At least its name; no flags, and no positions of keys.
                reply.array(6);
                reply.bulk(name);
                reply.integer(-1);
                reply.array(0);
                (0..3).for_each(|_| reply.integer(0));
            }
        }
        ("command", [word]) if word.eq_ignore_ascii_case(b"COUNT") => {
            reply.integer(COMMANDS.len());
        }
        ("config", [word, patterns @ ..]) if word.eq_ignore_ascii_case(b"GET") => {
            config(cx.app, patterns, reply)?;
        }
        ("info", _) => reply.bulk(info(cx.app)),
        ("time", []) => {
            let now = cx.app.db.now();
            reply.bulks([now / 1000, now % 1000 * 1000].map(|part| part.to_string()));
        }
        _ => return Ok(false),
    }
    Ok(true)
}

fn hello(client: &Client, reply: &mut Reply) {
    reply.array(14);
    for text in ["server", "redis", "version", VERSION, "proto"] {
        reply.bulk(text);
    }
    reply.integer(2);
    reply.bulk("id");
    reply.integer(client.number);
    for text in ["mode", "standalone", "role", "master", "modules"] {
        reply.bulk(text);
    }
    reply.array(0);
}

fn set_name(cx: &mut Context<'_, App>, name: &[u8]) -> Result<(), Failure> {
    if name.len() > MAX_NAME || !name.iter().all(u8::is_ascii_graphic) {
        let text = "ERR Client names cannot contain spaces, newlines or special characters.";
        return Err(text.into());
    }
    if let Some((_, old)) = cx.app.clients.get_mut(&cx.conn.id()) {
        *old = String::from_utf8_lossy(name).into_owned();
    }
    Ok(())
}

/// One line for each client.
fn list(cx: &mut Context<'_, App>) -> String {
    let mut lines = String::new();
    for (&id, (number, name)) in &cx.app.clients {
        if let Some(info) = cx.conn.peer(id).and_then(|conn| conn.info()) {
            let (addr, age, idle) = (info.peer, info.age.as_secs(), info.idle.as_secs());
            // Writing to memory does not fail.
            let _ = writeln!(
                lines,
                "id={number} addr={addr} name={name} age={age} idle={idle} db=0"
            );
        }
    }
    lines
}

fn config(app: &App, patterns: &[&[u8]], reply: &mut Reply) -> Result<(), Failure> {
    glob::check(patterns)?;
    let parameters = [
        ("appendonly", "no".to_owned()),
        ("databases", "1".to_owned()),
        ("maxclients", app.options.max_clients.to_string()),
        ("maxmemory", app.options.maxmemory.to_string()),
        ("save", String::new()),
    ];
    let found = parameters.into_iter().filter(|(name, _)| {
        let matches = |pattern: &&[u8]| glob::matches(pattern, name.as_bytes());
        patterns.iter().any(matches)
    });
    reply.bulks(found.flat_map(|(name, value)| [name.to_owned(), value]));
    Ok(())
}

fn info(app: &App) -> String {
    format!(
        "# Server\r\nredis_version:{VERSION}\r\nredis_mode:standalone\r\nuptime_in_seconds:{}\r\n\
         # Clients\r\nconnected_clients:{}\r\n\
         # Memory\r\nused_memory:{}\r\nmaxmemory:{}\r\nmaxmemory_policy:noeviction\r\n\
         # Stats\r\ntotal_connections_received:{}\r\ntotal_commands_processed:{}\r\n\
         expired_keys:{}\r\nclient_output_buffer_limit_disconnections:{}\r\n\
         # Keyspace\r\ndb0:keys={},expires={},avg_ttl=0\r\n",
        app.started.elapsed().as_secs(),
        app.clients.len(),
        app.db.used,
        app.options.maxmemory,
        app.connections,
        app.commands,
        app.db.expired,
        app.evicted,
        app.db.len(),
        app.db.deadline_count(),
    )
}
