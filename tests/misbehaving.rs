//! A handler that misbehaves ends as documented, and nobody else notices.
#![cfg(feature = "sim")]

#[path = "misbehaving/destructors.rs"]
mod destructors;
#[path = "misbehaving/endless.rs"]
mod endless;
#[path = "misbehaving/ends.rs"]
mod ends;
#[path = "misbehaving/framing.rs"]
mod framing;
#[path = "misbehaving/harness.rs"]
mod harness;
#[path = "misbehaving/neighbours.rs"]
mod neighbours;
#[path = "misbehaving/panics.rs"]
mod panics;
#[path = "common/planned.rs"]
mod planned;
