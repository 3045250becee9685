//! The poll of the simulated kernel: time passes, bytes arrive, edges become events.

use std::io;
use std::ops::ControlFlow;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::faults::{Call, Fault};
use super::kernel::{note, Kernel};
use super::socket::Filter;
use crate::proto::Time;
use crate::reactor::os::{Event, Token};

/// Maximum number of events that one poll reports, as on the real system.
const BATCH: usize = 1024;

impl Kernel {
    pub(super) fn poll(
        &mut self,
        events: &mut Vec<Event>,
        timeout: Option<Duration>,
    ) -> io::Result<bool> {
        self.was_idle = false;
        self.clock();
        if self.random.chance(self.faults.clock_leaps) {
            let leap = Duration::from_millis(self.random.below(60_000) as u64);
            self.now = self.now.after(leap);
            self.trace.line([1, leap.as_millis() as u64, 0, 0], || {
                format!("the clock leaps by {leap:?}")
            });
            self.note_all(Fault::ClockLeap);
        }
        if self.random.chance(self.faults.famines) {
            self.famine_until = self
                .now
                .after(Duration::from_millis(self.random.below(3_000) as u64));
            self.note_all(Fault::Famine);
        }
        if let Some(errno) = self.strike(Call::Poll, None) {
            return Err(io::Error::from_raw_os_error(errno));
        }
        self.move_bytes();
        self.collect(events);
        if events.is_empty() {
            self.sleep(timeout);
            self.move_bytes();
            self.collect(events);
        }
        self.spoil(events);
        self.was_idle = events.is_empty();
        self.delivered += events.len() as u64;
        let crowded = events.len() >= BATCH;
        let full = self.random.chance(self.faults.full_batches) || crowded;
        if full && !crowded {
            self.note_all(Fault::FullBatch);
        }
        self.now = self.now.after(std::mem::take(&mut self.leap_after_poll));
        let (count, now) = (events.len(), self.now);
        self.trace.line([2, count as u64, u64::from(full), 0], || {
            format!("{now:?} poll: {count} events")
        });
        Ok(full)
    }

    fn sleep(&mut self, timeout: Option<Duration>) {
        let until = timeout.map_or(Time::NEVER, |timeout| self.now.after(timeout));
        let until = until.min(self.next_answer());
        self.now = self.now.max(until.min(self.horizon));
    }

    /// The network: attempts are answered, and what is under way arrives as far as there is room.
    fn move_bytes(&mut self) {
        self.answer_dials();
        self.carry();
        self.descriptors.relay(&mut self.sockets);
        self.sockets.move_bytes();
        self.descriptors.ask_watcher();
    }

    /// After what is under way has arrived: the next poll has something to report.
    pub(super) fn has_news(&mut self) -> bool {
        self.move_bytes();
        let listening = self
            .listeners
            .iter()
            .any(|listener| listener.edge && listener.token.is_some());
        listening
            || self.sockets.has_news()
            || !self.descriptors.events.is_empty()
            || self.woken.load(Ordering::SeqCst)
    }

    fn collect(&mut self, events: &mut Vec<Event>) {
        if self.woken.swap(false, Ordering::SeqCst) {
            events.push(Event {
                token: Token::WAKER,
                readable: true,
                writable: false,
                closed: false,
            });
        }
        for event in std::mem::take(&mut self.descriptors.events) {
            if self.random.chance(self.faults.late_events) {
                note(&mut self.notes, Fault::LateEvent, None);
                self.descriptors.events.push(event);
            } else {
                events.push(event);
            }
        }
        for listener in &mut self.listeners {
            let (Some(token), true) = (listener.token, listener.edge) else {
                continue;
            };
            if self.random.chance(self.faults.late_events) {
                note(&mut self.notes, Fault::LateEvent, None);
                continue;
            }
            listener.edge = false;
            events.push(Event {
                token,
                readable: true,
                writable: false,
                closed: false,
            });
        }
        let (faults, random, notes) = (&self.faults, &mut self.random, &mut self.notes);
        self.sockets.for_announcing(|index, socket, token| {
            // epoll has one event for both directions, kqueue one for each, in any order.
            let filters: &[_] = match socket.kqueue {
                false => &[None],
                true if random.chance(500) => &[Some(Filter::Read), Some(Filter::Write)],
                true => &[Some(Filter::Write), Some(Filter::Read)],
            };
            for &filter in filters {
                if events.len() >= BATCH {
                    return ControlFlow::Break(());
                }
                if random.chance(faults.late_events) {
                    note(notes, Fault::LateEvent, Some(index));
                    continue;
                }
                match filter {
                    None => events.push(socket.event(token)),
                    Some(filter) => events.extend(socket.filter_event(filter, token)),
                }
            }
            ControlFlow::Continue(())
        });
    }

    /// Adds late, spurious and unordered events.
    fn spoil(&mut self, events: &mut Vec<Event>) {
        if self.random.chance(self.faults.spurious_events) {
            let socket = self.random.below(self.sockets.len());
            let registered = self.sockets.get(socket);
            let known = registered.and_then(|socket| socket.token);
            // Never of room that no registration asks for.
            let ignores_room =
                registered.is_some_and(|one| one.token.is_some() && !one.write_interest);
            note(&mut self.notes, Fault::SpuriousEvent, known.map(|_| socket));
            let token = known.unwrap_or_else(|| Token(self.random.below(1 << 26)));
            let bits = self.random.bits();
            events.push(Event {
                token,
                readable: bits & 1 != 0,
                writable: bits & 2 != 0 && !ignores_room,
                closed: bits & 4 != 0,
            });
        }
        if self.random.chance(self.faults.duplicated) {
            self.note_events(Fault::Duplicated, events);
            let again = events.clone();
            events.extend(again);
        }
        if self.random.chance(self.faults.reordered) && events.len() > 1 {
            self.note_events(Fault::Reordered, events);
            for at in (1..events.len()).rev() {
                let other = self.random.below(at + 1);
                events.swap(at, other);
            }
        }
    }

    /// Every socket that the server holds has lived through this.
    fn note_all(&mut self, fault: Fault) {
        let Some(notes) = &mut self.notes else { return };
        let before = notes.struck.len();
        let held = self
            .sockets
            .iter()
            .enumerate()
            .filter(|(_, socket)| socket.held);
        notes
            .struck
            .extend(held.map(|(index, _)| (fault, Some(index))));
        if notes.struck.len() == before {
            notes.struck.push((fault, None));
        }
    }

    fn note_events(&mut self, fault: Fault, events: &[Event]) {
        let Some(notes) = &mut self.notes else { return };
        for event in events {
            let socket = self
                .sockets
                .iter()
                .position(|socket| socket.token == Some(event.token));
            notes.struck.push((fault, socket));
        }
    }
}
