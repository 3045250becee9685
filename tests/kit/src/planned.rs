//! Panics that are part of a test.

use std::fmt;

const WORDS: &str = "as planned";

/// Panics as planned: no hook is called, so that nothing is printed, and a fuzzer does not stop.
pub fn blow() -> ! {
    std::panic::resume_unwind(Box::new(WORDS))
}

/// Panics when it is dropped, unless its thread panics already. As an error it says nothing bad before.
#[derive(Debug)]
pub struct PanicOnDrop;

impl Drop for PanicOnDrop {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            blow();
        }
    }
}

impl fmt::Display for PanicOnDrop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a fuse")
    }
}

impl std::error::Error for PanicOnDrop {}
