//! The only place that catches panics: every call into foreign code goes through it.
//!
//! Foreign code is what the library's user supplies: handlers, services, framers, jobs, alarm
//! callbacks, TLS callbacks, the texts of errors, the logger, and the destructors of these.

use std::any::Any;
use std::cell::Cell;
use std::fmt;
use std::panic::{catch_unwind, AssertUnwindSafe};

use crate::escape::Escaped;

thread_local! {
    /// Panics of the logger on this thread.
    static LOGGER_PANICS: Cell<u64> = const { Cell::new(0) };
}

/// A caught panic. Counted when it is reported.
#[derive(Clone, Debug)]
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

/// Number of panics of the logger on this thread.
pub(crate) fn logger_panics() -> u64 {
    LOGGER_PANICS.get()
}

/// Runs the logger, which cannot report its own panic: it is counted. `None` if it panics.
pub(crate) fn catch_logger<R>(code: impl FnOnce() -> R) -> Option<R> {
    let result = catch(code);
    if result.is_err() {
        LOGGER_PANICS.set(LOGGER_PANICS.get() + 1);
    }
    result.ok()
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
        // The code may have printed what a peer sent.
        Escaped::new(&self.text).fmt(f)
    }
}

impl std::error::Error for Panic {}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) struct PanicOnDrop;

    impl Drop for PanicOnDrop {
        fn drop(&mut self) {
            panic!("in a destructor");
        }
    }

    #[test]
    fn a_panic_keeps_its_text() {
        let text = |code: fn()| catch(code).expect_err("it panics").to_string();
        assert_eq!(text(|| panic!("literal")), "literal");
        assert_eq!(text(|| panic!("{}", 1)), "1");
        assert_eq!(text(|| panic!("a\nb\u{1b}")), r"a\nb\u{1b}");
        assert_eq!(text(|| std::panic::panic_any(PanicOnDrop)), "(not text)");
    }

    #[test]
    fn a_panic_of_the_logger_is_counted() {
        let before = logger_panics();
        assert_eq!(catch_logger(|| 1), Some(1));
        assert_eq!(catch_logger(|| panic!("no")), None::<()>);
        assert_eq!(logger_panics(), before + 1);
    }
}
