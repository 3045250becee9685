//! A logger that panics now and then, in the worlds that want it.

use std::cell::RefCell;

use portcullis::sim::Random;

use crate::planned::blow;

/// Calls that panic, of a thousand.
const CHANCE: u16 = 200;

thread_local! {
    /// The logger's chance and its panics so far, while a world of this thread wants it.
    static ARMED: RefCell<Option<(Random, u64)>> = const { RefCell::new(None) };
}

/// The process's logger. For all other worlds it wants nothing.
struct Logger;

impl Logger {
    /// Whether this thread's world wants the logger; panics instead now and then.
    fn is_armed(&self) -> bool {
        let armed = ARMED.with_borrow_mut(|armed| {
            let (random, panics) = armed.as_mut()?;
            let is_due = random.chance(CHANCE);
            *panics += u64::from(is_due);
            Some(is_due)
        });
        if armed == Some(true) {
            blow();
        }
        armed.is_some()
    }
}

impl log::Log for Logger {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        self.is_armed()
    }

    fn log(&self, record: &log::Record<'_>) {
        if self.is_armed() {
            // As a logger does, and so do the texts of errors.
            let _ = record.args().to_string();
        }
    }

    fn flush(&self) {}
}

/// Lets the logger panic in this thread, until it is dropped.
#[derive(Debug)]
pub struct PanickingLogger(());

impl PanickingLogger {
    pub fn new(seed: u64) -> Self {
        // Another world may have done so, or a test has a logger of its own.
        if log::set_logger(&Logger).is_ok() {
            log::set_max_level(log::LevelFilter::Trace);
        }
        ARMED.set(Some((Random::new(seed), 0)));
        Self(())
    }

    /// Panics so far.
    pub fn panics(&self) -> u64 {
        ARMED.with_borrow(|armed| armed.as_ref().map_or(0, |(_, panics)| *panics))
    }
}

impl Drop for PanickingLogger {
    fn drop(&mut self) {
        ARMED.set(None);
    }
}
