//! Logging: the targets, and macros that survive a logger that panics.
//!
//! The logger is foreign code: a `println!` to a closed pipe panics in it. What goes where is in
//! the crate's documentation.

use crate::catch::catch_logger;

pub(crate) const SERVER: &str = "portcullis::server";
pub(crate) const LISTENER: &str = "portcullis::listener";
pub(crate) const FD_EXHAUSTION: &str = "portcullis::fd_exhaustion";
pub(crate) const CONNECTION: &str = "portcullis::connection";
pub(crate) const PANIC: &str = "portcullis::panic";

/// True if the logger wants records of this level and target.
pub(crate) fn is_enabled(target: &str, level: log::Level) -> bool {
    level <= log::max_level()
        && catch_logger(|| log::log_enabled!(target: target, level)).unwrap_or(false)
}

/// As [`log::log!`]. A panic in the logger is counted and has no other effect. Fields in braces are
/// key-values of the record, with the feature `kv`.
macro_rules! record {
    (@ $level:ident, $write:block) => {
        if log::Level::$level <= log::max_level() {
            let _ = $crate::catch::catch_logger(|| $write);
        }
    };
    ($level:ident, target: $target:expr, { $($key:ident: $value:expr),+ }, $($arg:tt)+) => {
        $crate::logs::record!(@ $level, {
            #[cfg(feature = "kv")]
            log::log!(target: $target, log::Level::$level, $($key:% = $value),+; $($arg)+);
            #[cfg(not(feature = "kv"))]
            {
                let _ = ($(&$value),+);
                log::log!(target: $target, log::Level::$level, $($arg)+);
            }
        })
    };
    ($level:ident, target: $target:expr, $($arg:tt)+) => {
        $crate::logs::record!(@ $level, {
            log::log!(target: $target, log::Level::$level, $($arg)+)
        })
    };
}

macro_rules! error {
    ($($arg:tt)+) => { $crate::logs::record!(Error, $($arg)+) };
}

macro_rules! warning {
    ($($arg:tt)+) => { $crate::logs::record!(Warn, $($arg)+) };
}

macro_rules! info {
    ($($arg:tt)+) => { $crate::logs::record!(Info, $($arg)+) };
}

macro_rules! debug {
    ($($arg:tt)+) => { $crate::logs::record!(Debug, $($arg)+) };
}

pub(crate) use {debug, error, info, record, warning};
