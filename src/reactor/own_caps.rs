//! The listeners that have all of their own connections, and which of them have changed.

use std::collections::BTreeSet;
use std::time::Duration;

use crate::id::ListenerId;

/// Listeners that have reached their own caps.
#[derive(Default)]
pub(super) struct OwnCaps {
    reached: BTreeSet<ListenerId>,
    /// Those that have changed, or whose connections have, since the last update.
    changed: BTreeSet<ListenerId>,
    /// The rule of the last update.
    rule: (bool, Duration),
}

impl OwnCaps {
    #[inline]
    pub(super) fn is_empty(&self) -> bool {
        self.reached.is_empty()
    }

    pub(super) fn insert(&mut self, id: ListenerId) {
        self.reached.insert(id);
        self.changed.insert(id);
    }

    pub(super) fn remove(&mut self, id: ListenerId) {
        self.reached.remove(&id);
        self.changed.remove(&id);
    }

    /// The listener, or one of its connections, has changed.
    #[inline]
    pub(super) fn note(&mut self, id: ListenerId) {
        if !self.reached.is_empty() && self.reached.contains(&id) {
            self.changed.insert(id);
        }
    }

    /// Takes the listeners to be updated: all, if the rule is another one.
    pub(super) fn take_changed(&mut self, rule: (bool, Duration)) -> BTreeSet<ListenerId> {
        if std::mem::replace(&mut self.rule, rule) != rule {
            self.changed.clone_from(&self.reached);
        }
        std::mem::take(&mut self.changed)
    }
}
