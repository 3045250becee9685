//! The keys: strings and lists, their deadlines, and the memory that they take.

use std::borrow::Cow;
use std::cell::Cell;
use std::collections::{BTreeSet, HashMap, VecDeque};
use std::hash::{BuildHasher, DefaultHasher, Hasher, RandomState};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The text of an error reply.
pub type Failure = Cow<'static, str>;

const WRONG_TYPE: &str = "WRONGTYPE Operation against a key holding the wrong kind of value";

/// Estimated overhead of a key in bytes: table entries, a deadline, and the allocator's share.
const KEY_OVERHEAD: usize = 256;
/// The table keeps room for this number of keys, and for four times as many as there are.
const MIN_KEYS: usize = 1024;
/// Estimated overhead of a list element in bytes.
const ITEM_OVERHEAD: usize = 64;
/// A list keeps this much room for elements, and as much again as it has.
const MIN_ROOM: usize = 64;
/// Minimum length of a string that replies share; a shorter one is copied.
const MIN_SHARED: usize = 64 * 1024;
/// Maximum number of keys that one step of the active expiry removes.
const EXPIRE_STEP: usize = 256;

pub enum Value {
    String(Vec<u8>),
    /// A long string, which replies share.
    Shared(Arc<[u8]>),
    List(List),
}

impl Value {
    pub fn new(string: &[u8]) -> Self {
        if string.len() < MIN_SHARED {
            Self::String(string.to_vec())
        } else {
            Self::Shared(string.into())
        }
    }

    /// Replaces the value. A buffer of fitting size is kept.
    fn set(&mut self, string: &[u8]) {
        let fits = string.len()..=2 * string.len();
        match self {
            Self::String(old) if fits.contains(&old.capacity()) => {
                old.clear();
                old.extend_from_slice(string);
            }
            value => *value = Self::new(string),
        }
    }

    pub fn string(&self) -> Result<&[u8], Failure> {
        match self {
            Self::String(string) => Ok(string),
            Self::Shared(string) => Ok(string),
            Self::List(_) => Err(WRONG_TYPE.into()),
        }
    }

    /// Returns a string that can grow: a shared one is copied.
    pub fn string_mut(&mut self) -> Result<&mut Vec<u8>, Failure> {
        if let Self::Shared(string) = self {
            *self = Self::String(string.to_vec());
        }
        match self {
            Self::String(string) => Ok(string),
            Self::Shared(_) | Self::List(_) => Err(WRONG_TYPE.into()),
        }
    }

    pub fn list(&self) -> Result<&VecDeque<Vec<u8>>, Failure> {
        match self {
            Self::List(list) => Ok(&list.items),
            Self::String(_) | Self::Shared(_) => Err(WRONG_TYPE.into()),
        }
    }

    pub fn list_mut(&mut self) -> Result<&mut List, Failure> {
        match self {
            Self::List(list) => Ok(list),
            Self::String(_) | Self::Shared(_) => Err(WRONG_TYPE.into()),
        }
    }

    fn size(&self) -> usize {
        match self {
            Self::String(string) => string.len(),
            Self::Shared(string) => string.len(),
            Self::List(list) => list.size,
        }
    }
}

/// A list and the counted size of its elements.
#[derive(Default)]
pub struct List {
    items: VecDeque<Vec<u8>>,
    size: usize,
}

#[derive(Clone, Copy)]
pub enum End {
    Left,
    Right,
}

impl List {
    pub fn len(&self) -> usize {
        self.items.len()
    }

    pub fn push(&mut self, end: End, item: &[u8]) {
        self.size += item_size(item);
        match end {
            End::Left => self.items.push_front(item.to_vec()),
            End::Right => self.items.push_back(item.to_vec()),
        }
    }

    pub fn pop(&mut self, end: End) -> Option<Vec<u8>> {
        let item = match end {
            End::Left => self.items.pop_front(),
            End::Right => self.items.pop_back(),
        }?;
        self.size -= item_size(&item);
        self.shrink();
        Some(item)
    }

    /// Changes the elements in any way, and counts them anew in linear time.
    pub fn rebuild(&mut self, change: impl FnOnce(&mut VecDeque<Vec<u8>>)) {
        change(&mut self.items);
        self.size = self.items.iter().map(|item| item_size(item)).sum();
        self.shrink();
    }

    /// Gives back the room of removed elements: it is not counted.
    fn shrink(&mut self) {
        let length = self.items.len();
        if self.items.capacity() > 2 * length + MIN_ROOM {
            self.items.shrink_to(length + length / 2);
        }
    }
}

fn item_size(item: &[u8]) -> usize {
    item.len() + ITEM_OVERHEAD
}

/// Returns the counted size of a key without its value. No other argument of a command that stores
/// takes more.
pub fn key_size(key: &[u8]) -> usize {
    key.len() + KEY_OVERHEAD
}

struct Entry {
    value: Value,
    /// In milliseconds since 1970, as all times here.
    deadline: Option<i64>,
}

impl Entry {
    fn size(&self, key: &[u8]) -> usize {
        key_size(key) + self.value.size()
    }
}

/// Hashes the bytes of a key alone. The hash of a slice includes the length, which only keys of several
/// parts need.
#[derive(Default)]
struct ByteHash(RandomState);

impl BuildHasher for ByteHash {
    type Hasher = ByteHasher;

    fn build_hasher(&self) -> ByteHasher {
        ByteHasher(self.0.build_hasher())
    }
}

struct ByteHasher(DefaultHasher);

impl Hasher for ByteHasher {
    fn write(&mut self, bytes: &[u8]) {
        self.0.write(bytes);
    }

    /// Ignores the length of the slice.
    fn write_usize(&mut self, _: usize) {}

    fn finish(&self) -> u64 {
        self.0.finish()
    }
}

pub struct Db {
    entries: HashMap<Rc<[u8]>, Entry, ByteHash>,
    /// The entries with a deadline, the first to expire first.
    deadlines: BTreeSet<(i64, Rc<[u8]>)>,
    /// The time of the running command, once it is needed.
    now: Cell<Option<i64>>,
    /// Number of counted bytes, at most `max`. Subscriptions are counted here too.
    pub used: usize,
    pub max: usize,
    /// Number of keys that have expired.
    pub expired: u64,
}

impl Db {
    /// Returns an empty database for up to `max` bytes.
    pub fn new(max: usize) -> Self {
        Self {
            entries: HashMap::default(),
            deadlines: BTreeSet::new(),
            now: Cell::default(),
            used: 0,
            max,
            expired: 0,
        }
    }

    /// Begins a command or a step of the expiry. A key expires between commands, never within one.
    pub fn update_clock(&mut self) {
        self.now.set(None);
    }

    pub fn now(&self) -> i64 {
        let now = self.now.get().unwrap_or_else(now);
        self.now.set(Some(now));
        now
    }

    pub fn len(&self) -> usize {
        self.entries.len()
    }

    pub fn deadline_count(&self) -> usize {
        self.deadlines.len()
    }

    /// Returns whether a command may store these arguments, each of this size.
    pub fn has_room(&self, arguments: &[&[u8]], size: impl Fn(&[u8]) -> usize) -> bool {
        let sizes = arguments.iter().map(|argument| size(argument));
        self.used + sizes.sum::<usize>() <= self.max
    }

    /// Returns the value of a key.
    pub fn get(&mut self, key: &[u8]) -> Option<&Value> {
        self.drop_expired(key);
        self.entries.get(key).map(|entry| &entry.value)
    }

    pub fn string(&mut self, key: &[u8]) -> Result<Option<&[u8]>, Failure> {
        self.get(key).map(Value::string).transpose()
    }

    pub fn list(&mut self, key: &[u8]) -> Result<Option<&VecDeque<Vec<u8>>>, Failure> {
        self.get(key).map(Value::list).transpose()
    }

    /// Returns the deadline of a key, if there are such a key and a deadline.
    pub fn deadline(&mut self, key: &[u8]) -> Option<Option<i64>> {
        self.drop_expired(key);
        self.entries.get(key).map(|entry| entry.deadline)
    }

    pub fn keys(&self) -> impl Iterator<Item = &[u8]> {
        let is_due = |entry: &Entry| {
            entry
                .deadline
                .is_some_and(|deadline| deadline <= self.now())
        };
        let live = self.entries.iter().filter(move |(_, entry)| !is_due(entry));
        live.map(|(key, _)| &**key)
    }

    pub fn set(&mut self, key: &[u8], string: &[u8], deadline: Option<i64>) {
        match self.entries.get_mut(key) {
            Some(entry) if entry.deadline.is_none() && deadline.is_none() => {
                self.used -= entry.value.size();
                self.used += string.len();
                entry.value.set(string);
            }
            _ => {
                let value = Value::new(string);
                self.remove(key);
                self.insert(key.into(), Entry { value, deadline });
            }
        }
    }

    /// Sets or removes the deadline of a key, if there is such a key.
    pub fn set_deadline(&mut self, key: &[u8], deadline: Option<i64>) {
        if let Some((key, mut entry)) = self.take(key) {
            entry.deadline = deadline;
            self.insert(key, entry);
        }
    }

    /// Changes a value, or `default` if there is no such key. The deadline stays. An empty list is
    /// not kept.
    pub fn update<T>(
        &mut self,
        key: &[u8],
        default: Value,
        change: impl FnOnce(&mut Value) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        let found = self.take(key);
        let is_new = found.is_none();
        let (value, deadline) = (default, None);
        let (key, mut entry) = found.unwrap_or_else(|| (key.into(), Entry { value, deadline }));
        let result = change(&mut entry.value);
        let is_empty = matches!(&entry.value, Value::List(list) if list.items.is_empty());
        let is_dropped = is_empty || (is_new && result.is_err());
        if !is_dropped {
            self.insert(key, entry);
        }
        result
    }

    /// Removes a key. Returns false if there is no such key.
    pub fn remove(&mut self, key: &[u8]) -> bool {
        self.take(key).is_some()
    }

    pub fn clear(&mut self) {
        for (key, entry) in std::mem::take(&mut self.entries) {
            self.used -= entry.size(&key);
        }
        self.deadlines.clear();
    }

    /// Removes a bounded number of expired keys. Returns the time until the next deadline: zero if
    /// more keys have expired, `None` if no key has one.
    pub fn expire(&mut self) -> Option<Duration> {
        self.update_clock();
        for _ in 0..EXPIRE_STEP {
            let (deadline, key) = self.deadlines.first()?.clone();
            if let Ok(left @ 1..) = u64::try_from(deadline.saturating_sub(self.now())) {
                return Some(Duration::from_millis(left));
            }
            self.drop_expired(&key);
        }
        Some(Duration::ZERO)
    }

    fn drop_expired(&mut self, key: &[u8]) {
        if self.deadlines.is_empty() {
            return;
        }
        let deadline = self.entries.get(key).and_then(|entry| entry.deadline);
        if deadline.is_some_and(|deadline| deadline <= self.now()) {
            self.unlink(key);
            self.expired += 1;
        }
    }

    fn take(&mut self, key: &[u8]) -> Option<(Rc<[u8]>, Entry)> {
        self.drop_expired(key);
        self.unlink(key)
    }

    // Every key comes and goes through these two functions: deadlines and memory stay exact.
    // [`Db::set`] replaces a value in its place.

    fn insert(&mut self, key: Rc<[u8]>, entry: Entry) {
        self.used += entry.size(&key);
        if let Some(deadline) = entry.deadline {
            self.deadlines.insert((deadline, Rc::clone(&key)));
        }
        self.entries.insert(key, entry);
    }

    fn unlink(&mut self, key: &[u8]) -> Option<(Rc<[u8]>, Entry)> {
        let (key, entry) = self.entries.remove_entry(key)?;
        self.used -= entry.size(&key);
        if let Some(deadline) = entry.deadline {
            self.deadlines.remove(&(deadline, Rc::clone(&key)));
        }
        // The room of removed keys is not counted.
        let length = self.entries.len();
        if self.entries.capacity() > 4 * length + MIN_KEYS {
            self.entries.shrink_to(2 * length);
        }
        Some((key, entry))
    }
}

/// Returns the milliseconds since 1970.
fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    i64::try_from(since.unwrap_or_default().as_millis()).unwrap_or(i64::MAX)
}
