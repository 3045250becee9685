//! Descriptors of the application that the loop watches, each with its callback.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, RawFd};

use super::os::Token;
use super::slots::Slots;
use crate::catch::catch;
use crate::handler::Watched;
use crate::id::{ServerNumber, WatchId};

type Boxed<A> = Box<dyn Watched<A>>;

struct Watch<A> {
    id: WatchId,
    /// `None` once the callback has replaced it: another's may have its number.
    descriptor: Option<RawFd>,
    /// `None` while it runs.
    watched: Option<Boxed<A>>,
    /// It waits for its callback.
    is_ready: bool,
}

/// All descriptors that one server watches.
pub(super) struct Watches<A> {
    all: Slots<Watch<A>>,
    /// Events that wait for their callbacks, at most one for each descriptor.
    ready: VecDeque<usize>,
    /// The watch that its own running callback has ended, with its descriptor.
    ended: Option<(WatchId, RawFd)>,
    /// Number of descriptors that were ever watched.
    count: u64,
}

impl<A> Default for Watches<A> {
    fn default() -> Self {
        Self {
            all: Slots::new(),
            ready: VecDeque::new(),
            ended: None,
            count: 0,
        }
    }
}

impl<A> Watches<A> {
    /// Returns the id of the next one, and the token under which it is registered; `None` if there
    /// are too many.
    pub(super) fn next_id(&self, server: ServerNumber) -> Option<(WatchId, Token)> {
        let (slot, number) = (self.all.vacant_key(), self.count);
        let token = Token::of_watch(slot, number)?;
        let id = WatchId {
            slot,
            number,
            server,
        };
        Some((id, token))
    }

    /// Adds the one with that id.
    pub(super) fn add(&mut self, id: WatchId, watched: Boxed<A>) {
        self.count += 1;
        self.all.insert(Watch {
            id,
            descriptor: Some(watched.fd().as_raw_fd()),
            watched: Some(watched),
            is_ready: false,
        });
    }

    /// Returns the descriptor that is not watched any more, and its callback unless that runs.
    #[must_use = "a callback's destructor is foreign code"]
    pub(super) fn remove(&mut self, id: WatchId) -> Option<(Option<RawFd>, Option<Boxed<A>>)> {
        self.all.get(id.slot).filter(|watch| watch.id == id)?;
        let watch = self.all.remove(id.slot, 0)?;
        Some((watch.descriptor, watch.watched))
    }

    /// Queues the callback of the descriptor with this token, if it is still watched.
    pub(super) fn handle_event(&mut self, slot: usize, token: Token) {
        let watch = self.all.get_mut(slot);
        let watch = watch.filter(|watch| Token::of_watch(slot, watch.id.number) == Some(token));
        if let Some(watch) = watch.filter(|watch| !watch.is_ready) {
            watch.is_ready = true;
            self.ready.push_back(slot);
        }
    }

    pub(super) fn has_ready(&self) -> bool {
        !self.ready.is_empty()
    }

    pub(super) fn ready_len(&self) -> usize {
        self.ready.len()
    }

    /// Takes the next callback that is due, in the order of the events.
    pub(super) fn take_ready(&mut self) -> Option<(WatchId, Boxed<A>)> {
        while let Some(slot) = self.ready.pop_front() {
            // Another may have the slot since.
            let watch = self.all.get_mut(slot).filter(|watch| watch.is_ready);
            if let Some(watch) = watch {
                watch.is_ready = false;
                return Some((watch.id, watch.watched.take()?));
            }
        }
        None
    }

    /// Puts a callback back that has run. Returned if its descriptor is not watched any more.
    #[must_use = "a callback's destructor is foreign code"]
    pub(super) fn restore(&mut self, id: WatchId, watched: Boxed<A>) -> Option<Boxed<A>> {
        match self.all.get_mut(id.slot).filter(|watch| watch.id == id) {
            Some(watch) => {
                // Foreign code, which may panic.
                let now = catch(|| watched.fd().as_raw_fd()).ok();
                watch.descriptor = watch.descriptor.filter(|_| watch.descriptor == now);
                watch.watched = Some(watched);
                None
            }
            None => Some(watched),
        }
    }

    /// The watch has ended while its callback runs.
    pub(super) fn end_later(&mut self, id: WatchId, descriptor: RawFd) {
        self.ended = Some((id, descriptor));
    }

    /// The descriptor of a watch that has ended while its callback ran, if the callback has not
    /// replaced it.
    pub(super) fn take_ended(&mut self, id: WatchId, watched: &Boxed<A>) -> Option<RawFd> {
        let (_, descriptor) = self.ended.take().filter(|(ended, _)| *ended == id)?;
        // Foreign code, which may panic.
        let now = catch(|| watched.fd().as_raw_fd()).ok()?;
        (now == descriptor).then_some(descriptor)
    }

    /// All callbacks, once the server ends.
    #[must_use = "a callback's destructor is foreign code"]
    pub(super) fn take_all(&mut self) -> impl Iterator<Item = Boxed<A>> + use<A> {
        let all = std::mem::replace(&mut self.all, Slots::new());
        all.into_entries().filter_map(|watch| watch.watched)
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsFd, BorrowedFd};

    use super::*;
    use crate::handler::Control;

    struct Input(std::io::Stdin);

    impl Watched<()> for Input {
        fn fd(&self) -> BorrowedFd<'_> {
            self.0.as_fd()
        }

        fn call(&mut self, (): &mut (), _: &mut Control<'_>) {}
    }

    fn add(watches: &mut Watches<()>) -> (WatchId, Token) {
        let next = watches.next_id(ServerNumber::NONE);
        let (id, token) = next.expect("room");
        watches.add(id, Box::new(Input(std::io::stdin())));
        (id, token)
    }

    fn ready(watches: &mut Watches<()>) -> Option<WatchId> {
        let (id, callback) = watches.take_ready()?;
        assert!(watches.restore(id, callback).is_none());
        Some(id)
    }

    #[test]
    fn events_are_queued_once_and_in_order() {
        let mut watches = Watches::default();
        let (one, first) = add(&mut watches);
        let (two, second) = add(&mut watches);
        for token in [second, first, second] {
            let slot = if token == first { one.slot } else { two.slot };
            watches.handle_event(slot, token);
        }
        assert_eq!(watches.ready_len(), 2);
        assert_eq!(ready(&mut watches), Some(two));
        assert_eq!(ready(&mut watches), Some(one));
        assert_eq!(ready(&mut watches), None);
    }

    #[test]
    fn a_late_event_reaches_no_successor_in_the_slot() {
        let mut watches = Watches::default();
        let (one, first) = add(&mut watches);
        watches.handle_event(one.slot, first);
        assert!(watches.remove(one).is_some() && watches.remove(one).is_none());
        let (two, second) = add(&mut watches);
        assert_eq!(one.slot, two.slot);
        watches.handle_event(two.slot, first);
        assert_eq!(ready(&mut watches), None);
        watches.handle_event(two.slot, second);
        assert_eq!(ready(&mut watches), Some(two));
    }

    #[test]
    fn a_callback_that_runs_can_be_removed() {
        let mut watches = Watches::default();
        let (id, token) = add(&mut watches);
        watches.handle_event(id.slot, token);
        let (id, callback) = watches.take_ready().expect("due");
        assert!(watches
            .remove(id)
            .is_some_and(|(_, running)| running.is_none()));
        assert!(watches.restore(id, callback).is_some(), "to be dropped");
    }

    #[test]
    fn they_are_bounded() {
        let mut watches = Watches::default();
        let mut count = 0;
        while watches.next_id(ServerNumber::NONE).is_some() {
            add(&mut watches);
            count += 1;
        }
        assert_eq!(count, Token::WATCHES);
    }
}
