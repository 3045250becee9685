//! The connections that a browser sees: the first of an order, among those that match a filter.

use std::cmp::{Ordering, Reverse};
use std::collections::{BinaryHeap, HashMap};
use std::fmt::Write as _;

use super::http::parameters;
use crate::addr::Addr;
use crate::handler::ConnInfo;
use crate::id::{ConnId, ListenerId};

/// Number of connections that are shown.
pub(super) const SHOWN: usize = 100;
/// Limits on a filter: each connection is compared with all of it.
const MAX_FILTER: usize = 256;
const MAX_WORDS: usize = 4;

/// By what connections are sorted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Sort {
    /// Bytes of pending output.
    #[default]
    Queue,
    /// Bytes in both directions.
    Traffic,
    Age,
    /// The client's address.
    Address,
}

impl Sort {
    const ALL: [Self; 4] = [Self::Queue, Self::Traffic, Self::Age, Self::Address];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Queue => "queue",
            Self::Traffic => "traffic",
            Self::Age => "age",
            Self::Address => "address",
        }
    }
}

/// What one browser asks for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Query {
    pub(super) sort: Sort,
    /// Smallest first.
    pub(super) ascending: bool,
    /// Words in small letters, all of which a connection's text must contain.
    pub(super) filter: String,
}

impl Query {
    /// Reads `sort`, `order` and `filter`; other parameters are ignored. `None` for a value that
    /// none of them has.
    pub(super) fn parse(query: &str) -> Option<Self> {
        let mut parsed = Self::default();
        for (name, value) in parameters(query) {
            match name.as_str() {
                "sort" => {
                    let mut all = Sort::ALL.into_iter();
                    parsed.sort = all.find(|sort| sort.name() == value)?;
                }
                "order" => match value.as_str() {
                    "asc" => parsed.ascending = true,
                    "desc" => parsed.ascending = false,
                    _ => return None,
                },
                "filter" => {
                    let words: Vec<_> = value.split_whitespace().collect();
                    if value.len() > MAX_FILTER || words.len() > MAX_WORDS {
                        return None;
                    }
                    parsed.filter = words.join(" ").to_ascii_lowercase();
                }
                _ => {}
            }
        }
        Some(parsed)
    }
}

/// The text in which a filter's words are looked for: id, addresses, state, listener, and what
/// holds the connection back.
pub(super) fn write_text(info: &ConnInfo, names: &HashMap<ListenerId, String>, out: &mut String) {
    out.clear();
    let _ = write!(out, "{} {} {} ", info.id, info.peer, info.state);
    if info.source != info.peer {
        let _ = write!(out, "{} ", info.source);
    }
    out.push_str(match info.listener {
        Some(listener) => names.get(&listener).map_or("", String::as_str),
        None => "outgoing",
    });
    for (stands, word) in [
        (info.paused, " paused"),
        (info.congested, " congested"),
        (info.throttled, " throttled"),
        (info.paused_for_memory, " paused_for_memory"),
    ] {
        if stands {
            out.push_str(word);
        }
    }
    out.make_ascii_lowercase();
}

/// A place in the order. Each query has one kind.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Key {
    Number(u128),
    Address(Addr),
}

impl Key {
    fn of(info: &ConnInfo, sort: Sort) -> Self {
        match sort {
            Sort::Queue => Self::Number(info.queued as u128),
            Sort::Traffic => {
                Self::Number(u128::from(info.traffic.bytes_in) + u128::from(info.traffic.bytes_out))
            }
            Sort::Age => Self::Number(info.age.as_nanos()),
            Sort::Address => Self::Address(info.source.clone()),
        }
    }
}

/// A connection in the order: the greater, the later. Equal ones are in the order of their slots.
#[derive(Debug)]
struct Entry {
    rank: Rank,
    info: ConnInfo,
}

#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Rank {
    Ascending(Key, ConnId),
    Descending(Reverse<Key>, ConnId),
}

impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        self.rank == other.rank
    }
}

impl Eq for Entry {}

impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Entry {
    fn cmp(&self, other: &Self) -> Ordering {
        self.rank.cmp(&other.rank)
    }
}

/// The first connections of a query's order, as far as they have been visited.
#[derive(Debug)]
pub(super) struct Ranking {
    pub(super) query: Query,
    /// The last of those that are kept is the greatest.
    first: BinaryHeap<Entry>,
    /// Number of connections that match.
    pub(super) matching: usize,
}

impl Ranking {
    pub(super) fn new(query: Query) -> Self {
        Self {
            query,
            first: BinaryHeap::new(),
            matching: 0,
        }
    }

    /// Visits a connection; `text` is that of [`write_text`].
    pub(super) fn visit(&mut self, info: &ConnInfo, text: &str) {
        if !self.query.filter.split(' ').all(|word| text.contains(word)) {
            return;
        }
        self.matching += 1;
        let key = Key::of(info, self.query.sort);
        let rank = match self.query.ascending {
            true => Rank::Ascending(key, info.id),
            false => Rank::Descending(Reverse(key), info.id),
        };
        if self.first.len() >= SHOWN {
            match self.first.peek() {
                Some(last) if rank < last.rank => drop(self.first.pop()),
                _ => return,
            }
        }
        let info = info.clone();
        self.first.push(Entry { rank, info });
    }

    /// Takes the first connections, in order.
    pub(super) fn take(&mut self) -> Vec<ConnInfo> {
        let sorted = std::mem::take(&mut self.first).into_sorted_vec();
        sorted.into_iter().map(|entry| entry.info).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;
    use std::time::Duration;

    use super::*;
    use crate::proto::{Machine, Pool, State, Time, Traffic};
    use crate::{ConnConfig, Framing};

    fn entry(id: &str, queued: usize) -> Entry {
        let id = id.parse().expect("an id");
        let (framing, options) = (Framing::Raw, Rc::new(ConnConfig::default()));
        let machine = Machine::new(&framing, options, None, Time::ZERO, &mut Pool::default());
        let info = ConnInfo {
            id,
            listener: None,
            peer: Addr::unspecified(),
            source: Addr::unspecified(),
            state: State::Open,
            age: Duration::ZERO,
            idle: Duration::ZERO,
            traffic: Traffic::default(),
            queued,
            buffered: queued,
            paused: false,
            congested: false,
            throttled: false,
            paused_for_memory: false,
            time_left: machine.time_left(Time::ZERO),
        };
        let rank = Rank::Ascending(Key::of(&info, Sort::Queue), id);
        Entry { rank, info }
    }

    /// As the order of a heap has to be.
    #[test]
    fn entries_are_equal_where_neither_comes_first() {
        let all = [("1.1.0", 5), ("1.1.0", 5), ("2.1.0", 5), ("1.1.0", 6)];
        let all = all.map(|(id, queued)| entry(id, queued));
        for one in &all {
            for other in &all {
                assert_eq!(one == other, one.cmp(other) == Ordering::Equal);
            }
        }
        assert!(all[0] == all[1] && all[0] != all[2] && all[0] != all[3]);
    }
}
