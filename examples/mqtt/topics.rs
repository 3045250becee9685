//! Topic names and filters (section 4.7 of the standard), and the tree of all subscriptions.

use std::collections::BTreeMap;
use std::rc::Rc;

use crate::packet::Qos;

/// Returns true if messages can be published to `topic`.
pub fn is_name(topic: &str) -> bool {
    !topic.is_empty() && !topic.contains(['+', '#'])
}

/// Returns true if `filter` can be subscribed to: a wildcard is a whole level, and `#` the last.
pub fn is_filter(filter: &str) -> bool {
    let mut levels = filter.split('/').peekable();
    while let Some(level) = levels.next() {
        let is_last = levels.peek().is_none();
        if level.contains(['+', '#']) && level != "+" && !(level == "#" && is_last) {
            return false;
        }
    }
    !filter.is_empty()
}

/// Number of levels of a topic or filter.
pub fn levels(topic: &str) -> usize {
    topic.split('/').count()
}

/// Splits the first level off.
fn split(topic: &str) -> (&str, Option<&str>) {
    match topic.split_once('/') {
        Some((level, rest)) => (level, Some(rest)),
        None => (topic, None),
    }
}

/// Returns true if a wildcard as the first level matches `topic` (section 4.7.2).
fn is_in_reach_of_wildcards(topic: &str) -> bool {
    !topic.starts_with('$')
}

/// Returns text with which all topics begin that `filter` matches.
pub fn prefix(filter: &str) -> &str {
    let levels = filter.split(['+', '#']).next().unwrap_or_default();
    // `a/#` matches `a`.
    levels.trim_end_matches('/')
}

/// Returns true if `filter` matches `topic`.
pub fn matches(filter: &str, topic: &str) -> bool {
    if filter.starts_with(['+', '#']) && !is_in_reach_of_wildcards(topic) {
        return false;
    }
    let (mut levels, mut names) = (filter.split('/'), topic.split('/'));
    loop {
        match (levels.next(), names.next()) {
            (Some("#"), _) | (None, None) => return true,
            (Some("+"), Some(_)) => {}
            (Some(level), Some(name)) if level == name => {}
            _ => return false,
        }
    }
}

/// All subscriptions, as a tree of levels, in which `+` and `#` are levels too. So the work for a
/// message depends on the filters that begin like its topic, not on their number.
#[derive(Default)]
pub struct Subscriptions {
    below: BTreeMap<Box<str>, Subscriptions>,
    /// The clients whose filter ends here.
    clients: BTreeMap<Rc<str>, Qos>,
}

impl Subscriptions {
    /// Bytes that one level takes, about: a node of each of its maps.
    pub const LEVEL: usize = 1024;

    /// Adds a subscription, or changes its QoS.
    pub fn insert(&mut self, filter: &str, client: &Rc<str>, qos: Qos) {
        let node = filter.split('/').fold(self, |node, level| {
            node.below.entry(level.into()).or_default()
        });
        node.clients.insert(Rc::clone(client), qos);
    }

    /// Removes a subscription, and the levels that no other one needs.
    pub fn remove(&mut self, filter: &str, client: &str) {
        let (level, rest) = split(filter);
        let Some(node) = self.below.get_mut(level) else {
            return;
        };
        match rest {
            Some(rest) => node.remove(rest, client),
            None => drop(node.clients.remove(client)),
        }
        if node.below.is_empty() && node.clients.is_empty() {
            self.below.remove(level);
        }
    }

    /// Returns the clients with a filter that matches `topic`, and the work of the search.
    pub fn matching(&self, topic: &str) -> Matching {
        let mut found = Matching::default();
        self.collect(Some(topic), is_in_reach_of_wildcards(topic), &mut found);
        found
    }

    /// Recurses as deep as the longest filter, whose levels have a limit.
    fn collect(&self, topic: Option<&str>, wildcards: bool, found: &mut Matching) {
        found.work += 1;
        let wildcard = |level| self.below.get(level).filter(|_| wildcards);
        // `#` matches the level above too.
        if let Some(all) = wildcard("#") {
            all.add_clients(found);
        }
        let Some((level, rest)) = topic.map(split) else {
            return self.add_clients(found);
        };
        for node in self.below.get(level).into_iter().chain(wildcard("+")) {
            node.collect(rest, true, found);
        }
    }

    fn add_clients(&self, found: &mut Matching) {
        found.work += self.clients.len();
        for (client, &qos) in &self.clients {
            let highest = found.clients.entry(Rc::clone(client)).or_insert(qos);
            *highest = qos.max(*highest);
        }
    }
}

/// The clients that get a message.
#[derive(Default)]
pub struct Matching {
    /// Each with the highest QoS of its filters.
    pub clients: BTreeMap<Rc<str>, Qos>,
    /// Number of levels and of subscriptions that were visited.
    pub work: usize,
}
