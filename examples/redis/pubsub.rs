//! Channels and patterns, and the clients that subscribe to them.

use std::collections::{BTreeMap, BTreeSet};

use portcullis::{ConnId, Context, SendError};

use crate::commands::OOM;
use crate::db::Failure;
use crate::glob;
use crate::protocol::Reply;
use crate::{App, Client};

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    Channel,
    Pattern,
}

/// A channel or a pattern.
pub type Topic = (Kind, Vec<u8>);

/// The subscribers of each topic that has any.
pub type Topics = BTreeMap<Topic, BTreeSet<ConnId>>;

/// Estimated overhead in bytes of a topic, and of each of its subscribers.
const TOPIC_OVERHEAD: usize = 288;
const SUBSCRIBER_OVERHEAD: usize = 112;

fn topic_size(topic: &[u8]) -> usize {
    topic.len() + TOPIC_OVERHEAD
}

fn subscriber_size(topic: &[u8]) -> usize {
    topic.len() + SUBSCRIBER_OVERHEAD
}

/// Returns the counted size of a subscription to a new topic, which is kept twice.
pub fn subscription_size(topic: &[u8]) -> usize {
    topic_size(topic) + subscriber_size(topic)
}

/// In [`Topics`], the channels end here and the patterns begin.
const PATTERNS: Topic = (Kind::Pattern, Vec::new());

/// Runs a command of this module. Returns false if the name or the arguments do not fit.
pub fn run(
    client: &mut Client,
    cx: &mut Context<'_, App>,
    name: &'static str,
    args: &[&[u8]],
    reply: &mut Reply,
) -> Result<bool, Failure> {
    let kind = if name.starts_with('p') {
        Kind::Pattern
    } else {
        Kind::Channel
    };
    match (name, args) {
        ("subscribe" | "psubscribe", topics @ [_, ..]) => {
            if kind == Kind::Pattern {
                glob::check(topics)?;
            }
            for topic in topics {
                subscribe(client, cx, (kind, topic.to_vec()));
                confirm(client, name, Some(topic), reply);
            }
            limit_output(client, cx)?;
        }
        ("unsubscribe" | "punsubscribe", topics) => {
            let all = client.topics.iter().filter(|topic| topic.0 == kind);
            let topics: Vec<Topic> = match topics {
                [] => all.cloned().collect(),
                topics => topics.iter().map(|topic| (kind, topic.to_vec())).collect(),
            };
            if topics.is_empty() {
                confirm(client, name, None, reply);
            }
            for topic in topics {
                unsubscribe(client, cx, &topic);
                confirm(client, name, Some(&topic.1), reply);
            }
            limit_output(client, cx)?;
        }
        ("publish", [channel, message]) => reply.integer(publish(cx, channel, message)?),
        ("pubsub", [word, rest @ ..]) => {
            let topics = &cx.app.topics;
            match (word.to_ascii_uppercase().as_slice(), rest) {
                (b"CHANNELS", [] | [_]) => {
                    glob::check(rest)?;
                    let pattern = rest.first().copied().unwrap_or(b"*");
                    let channels = topics.range(..PATTERNS).map(|((_, channel), _)| channel);
                    reply.bulks(channels.filter(|channel| glob::matches(pattern, channel)));
                }
                (b"NUMSUB", channels) => {
                    reply.array(channels.len() * 2);
                    for channel in channels {
                        let subscribers = topics.get(&(Kind::Channel, channel.to_vec()));
                        reply.bulk(channel);
                        reply.integer(subscribers.map_or(0, BTreeSet::len));
                    }
                }
                (b"NUMPAT", []) => reply.integer(topics.range(PATTERNS..).count()),
                _ => return Ok(false),
            }
        }
        _ => return Ok(false),
    }
    Ok(true)
}

/// A topic counts for `--maxmemory`, and so does each of its subscribers.
fn subscribe(client: &mut Client, cx: &mut Context<'_, App>, topic: Topic) {
    if !client.topics.insert(topic.clone()) {
        return;
    }
    let used = &mut cx.app.db.used;
    *used += subscriber_size(&topic.1);
    let subscribers = cx.app.topics.entry(topic).or_insert_with_key(|topic| {
        *used += topic_size(&topic.1);
        BTreeSet::new()
    });
    subscribers.insert(cx.conn.id());
}

fn unsubscribe(client: &mut Client, cx: &mut Context<'_, App>, topic: &Topic) {
    if !client.topics.remove(topic) {
        return;
    }
    cx.app.db.used -= subscriber_size(&topic.1);
    if let Some(subscribers) = cx.app.topics.get_mut(topic) {
        subscribers.remove(&cx.conn.id());
        if subscribers.is_empty() {
            cx.app.db.used -= topic_size(&topic.1);
            cx.app.topics.remove(topic);
        }
    }
}

/// Ends all subscriptions of a client.
pub fn unsubscribe_all(client: &mut Client, cx: &mut Context<'_, App>) {
    while let Some(topic) = client.topics.first().cloned() {
        unsubscribe(client, cx, &topic);
    }
}

fn confirm(client: &Client, command: &str, topic: Option<&[u8]>, reply: &mut Reply) {
    reply.array(3);
    reply.bulk(command);
    reply.bulk_or_null(topic);
    reply.integer(client.topics.len());
}

/// Sets the output limit: a subscriber has one of its own.
pub fn limit_output(client: &Client, cx: &mut Context<'_, App>) -> Result<(), Failure> {
    let options = &cx.app.options;
    let limit = if client.topics.is_empty() {
        options.output_limit
    } else {
        options.subscriber_limit
    };
    let changed = cx.conn.reconfigure(|config| config.output_limit = limit);
    changed.map_err(|error| format!("ERR {error}").into())
}

/// Sends a message to all subscribers of `channel`; returns their number.
fn publish(cx: &mut Context<'_, App>, channel: &[u8], message: &[u8]) -> Result<usize, Failure> {
    let topics = &cx.app.topics;
    let of_channel = topics.get_key_value(&(Kind::Channel, channel.to_vec()));
    let of_patterns = topics.range(PATTERNS..);
    let matching = of_patterns.filter(|((_, pattern), _)| glob::matches(pattern, channel));
    let matching: Vec<_> = of_channel.into_iter().chain(matching).collect();

    let receivers = matching.iter().map(|(_, ids)| ids.len()).sum();
    // `--buffer-limit` is applied only when this callback has returned.
    if message.len().saturating_mul(matching.len()) > cx.app.options.buffer_limit / 2 {
        return Err(OOM.into());
    }
    let mut evicted = 0;
    for ((kind, topic), subscribers) in matching {
        let mut push = Reply::new(usize::MAX, Vec::new());
        match kind {
            Kind::Channel => push.bulks([b"message", channel, message]),
            Kind::Pattern => push.bulks([b"pmessage", &topic[..], channel, message]),
        }
        let sent = cx
            .conn
            .broadcast(subscribers.iter().copied(), push.into_bytes());
        for (id, error) in sent.refused {
            // At its output limit a subscriber is closed.
            if let (SendError::Full { .. }, Some(mut slow)) = (error, cx.conn.peer(id)) {
                slow.abort(); // at once, with all that is pending
                evicted += 1;
            }
        }
    }
    cx.app.evicted += evicted;
    Ok(receivers)
}
