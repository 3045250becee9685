//! Names of connections and listeners, never reused by a later connection.

use std::fmt;
use std::num::NonZeroU32;

/// Names one connection of one server, for ever.
///
/// Slots are reused, ids are not: a late kill, message or timer for a closed connection has no
/// effect, and never reaches the slot's next connection. (The generation wraps after 2³²
/// connections of one slot.)
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ConnId {
    pub(crate) index: u32,
    pub(crate) generation: u32,
}

impl fmt::Display for ConnId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.index, self.generation)
    }
}

/// Names one listener of one server. Never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ListenerId(NonZeroU32);

impl ListenerId {
    pub(crate) fn nth(number: u32) -> Self {
        Self(NonZeroU32::MIN.saturating_add(number))
    }

    pub(crate) fn number(self) -> u32 {
        self.0.get() - 1
    }
}

impl fmt::Display for ListenerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "L{}", self.number())
    }
}

/// How a query or command names a listener: by id, by port, or by name.
///
/// ```
/// use portcullis::ListenerRef;
/// let by_port: ListenerRef = 2222.into();
/// let by_name: ListenerRef = "portcullis_2222".into();
/// assert_ne!(by_port, by_name);
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ListenerRef {
    /// The id that `listen` returned.
    Id(ListenerId),
    /// The real local port. With several listeners on one port (IPv4 and IPv6), the first.
    Port(u16),
    /// The listener's name.
    Name(String),
}

impl fmt::Display for ListenerRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Id(id) => id.fmt(f),
            Self::Port(port) => write!(f, "port {port}"),
            Self::Name(name) => write!(f, "{name:?}"),
        }
    }
}

impl From<ListenerId> for ListenerRef {
    fn from(id: ListenerId) -> Self {
        Self::Id(id)
    }
}

impl From<u16> for ListenerRef {
    fn from(port: u16) -> Self {
        Self::Port(port)
    }
}

impl From<&str> for ListenerRef {
    fn from(name: &str) -> Self {
        Self::Name(name.to_owned())
    }
}

impl From<&String> for ListenerRef {
    fn from(name: &String) -> Self {
        Self::Name(name.clone())
    }
}

impl From<String> for ListenerRef {
    fn from(name: String) -> Self {
        Self::Name(name)
    }
}

/// Names one alarm of one server. Never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct AlarmId(pub(crate) u32);

impl fmt::Display for AlarmId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "A{}", self.0)
    }
}
