//! A handler that misbehaves ends as documented, and no other connection notices.

mod destructors;
mod endless;
mod ends;
mod framers;
mod framing;
mod harness;
mod neighbours;
mod panics;
