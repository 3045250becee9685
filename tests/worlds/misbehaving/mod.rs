//! A handler that misbehaves ends as documented, and nobody else notices.

mod destructors;
mod endless;
mod ends;
mod framing;
mod harness;
mod neighbours;
mod panics;
