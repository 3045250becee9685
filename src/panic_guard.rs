//! The only place that catches panics: every call into foreign code goes through it.
//!
//! Foreign code is what the library's user supplies: handlers, services, framers, jobs, alarm
//! callbacks, TLS callbacks, the texts of errors, and the destructors of all of these.

use std::any::Any;
use std::fmt;
use std::panic::{catch_unwind, AssertUnwindSafe};

use crate::logs;

/// Counts the panics of one server's foreign code.
#[derive(Debug, Default)]
pub(crate) struct PanicGuard {
    count: u64,
}

/// A caught panic. Counted when it is reported.
#[derive(Debug)]
#[must_use = "a panic is reported to the guard, which counts it"]
pub(crate) struct Panic {
    text: String,
}

/// Runs foreign code.
///
/// # Errors
///
/// The panic, if the code panics.
#[inline]
pub(crate) fn catch<R>(code: impl FnOnce() -> R) -> Result<R, Panic> {
    catch_unwind(AssertUnwindSafe(code)).map_err(Panic::new)
}

impl PanicGuard {
    /// Runs foreign code; a panic is reported and makes the result `None`.
    pub(crate) fn call<R>(&mut self, source: &str, code: impl FnOnce() -> R) -> Option<R> {
        catch(code)
            .map_err(|panic| self.report(source, panic, None))
            .ok()
    }

    /// Drops a value whose destructor is foreign code.
    #[inline]
    pub(crate) fn drop<T>(&mut self, source: &str, value: T) {
        if std::mem::needs_drop::<T>() {
            self.call(source, || drop(value));
        }
    }

    /// Counts a panic and logs it, with the description of the connection that it belongs to.
    #[cold]
    pub(crate) fn report(&mut self, source: &str, panic: Panic, conn: Option<&str>) {
        self.count += 1;
        match conn {
            Some(conn) => log::error!(target: logs::PANIC, "{source} panicked: {panic}; {conn}"),
            None => log::error!(target: logs::PANIC, "{source} panicked: {panic}"),
        }
    }

    /// Number of panics since the server was created.
    pub(crate) fn count(&self) -> u64 {
        self.count
    }
}

impl Panic {
    #[cold]
    fn new(payload: Box<dyn Any + Send>) -> Self {
        let text = payload
            .downcast_ref::<&str>()
            .copied()
            .or_else(|| payload.downcast_ref::<String>().map(String::as_str))
            .unwrap_or("(not text)")
            .to_owned();
        // The payload's destructor is foreign code too, and a second panic would abort.
        if let Err(again) = catch_unwind(AssertUnwindSafe(|| drop(payload))) {
            std::mem::forget(again);
        }
        Self { text }
    }
}

impl fmt::Display for Panic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct PanicOnDrop;

    impl Drop for PanicOnDrop {
        fn drop(&mut self) {
            panic!("in a destructor");
        }
    }

    #[test]
    fn every_reported_panic_is_counted() {
        let mut guard = PanicGuard::default();
        assert_eq!(guard.call("a job", || 7), Some(7));
        assert_eq!(guard.call("a job", || panic!("no")), None::<()>);
        guard.drop("a destructor", PanicOnDrop);
        assert_eq!(guard.count(), 2);
    }

    #[test]
    fn a_panic_keeps_its_text() {
        let text = |code: fn()| catch(code).expect_err("it panics").to_string();
        assert_eq!(text(|| panic!("literal")), "literal");
        assert_eq!(text(|| panic!("{}", 1)), "1");
        assert_eq!(text(|| std::panic::panic_any(PanicOnDrop)), "(not text)");
    }
}
