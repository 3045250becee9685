//! The targets under which the library logs. The crate's documentation lists the messages of each.

pub(crate) const SERVER: &str = "portcullis::server";
pub(crate) const LISTENER: &str = "portcullis::listener";
pub(crate) const FD_EXHAUSTION: &str = "portcullis::fd_exhaustion";
pub(crate) const CONNECTION: &str = "portcullis::connection";
pub(crate) const PANIC: &str = "portcullis::panic";
