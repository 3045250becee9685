//! A handler that misbehaves ends as documented, and nobody else notices.

mod destructors;
mod endless;
mod ends;
mod framing;
mod neighbours;
mod panics;
mod theatre;
