//! Counts and reports the panics of one server's foreign code.

use crate::catch::{catch, logger_panics, Panic};
use crate::logs;

/// Counts the panics of one server's foreign code.
#[derive(Debug)]
pub(crate) struct PanicGuard {
    count: u64,
    /// Panics of the logger before this server.
    logger_before: u64,
}

impl Default for PanicGuard {
    fn default() -> Self {
        Self {
            count: 0,
            logger_before: logger_panics(),
        }
    }
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
            Some(conn) => logs::error!(target: logs::PANIC, "{source} panicked: {panic}; {conn}"),
            None => logs::error!(target: logs::PANIC, "{source} panicked: {panic}"),
        }
    }

    /// Number of panics since the server was created, those of the logger included.
    pub(crate) fn count(&self) -> u64 {
        self.count + logger_panics() - self.logger_before
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catch::tests::PanicOnDrop;

    #[test]
    fn every_reported_panic_is_counted() {
        let mut guard = PanicGuard::default();
        assert_eq!(guard.call("a job", || 7), Some(7));
        assert_eq!(guard.call("a job", || panic!("no")), None::<()>);
        guard.drop("a destructor", PanicOnDrop);
        assert_eq!(guard.count(), 2);
    }
}
