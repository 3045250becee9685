//! The handbook: what one needs to know around the API.
//!
//! | page | for whoever asks |
//! |---|---|
//! | [`limits`] | which limits to set, what each costs in memory, and how long each wait may be |
//! | [`os`] | what the kernel does: readiness, descriptors, backlog, FIN, RST, TIME_WAIT, clocks |
//! | [`kernel`] | which settings of the kernel and of the process matter, and how to look at them |
//! | [`embedding`] | how a server lives in a thread, a game's tick, and every other kind of loop; what one can get wrong |
#![cfg_attr(
    feature = "tls",
    doc = "| [`tls`] | where certificates come from, names, client certificates, reload, resumption, memory |"
)]
#![cfg_attr(
    not(feature = "tls"),
    doc = "| `tls` (with the feature) | where certificates come from, names, client certificates, reload, resumption, memory |"
)]
#![cfg_attr(
    feature = "sim",
    doc = "| [`testing`] | how to test a handler: the simulator, faults, a fuzz target |"
)]
#![cfg_attr(
    not(feature = "sim"),
    doc = "| `testing` (with the feature `sim`) | how to test a handler: the simulator, faults, a fuzz target |"
)]
//! | [`operating`] | what runs in production: logs, metrics, alarms, draining, restarts; what each reason for a close means |
//! | [`performance`] | what a message costs and where it goes; what each feature costs; what to set for latency, throughput or memory |
//! | [`from_tokio`], [`from_mio`], [`from_message_io`], [`from_erlang`] | what is different here: the same program on both sides |
//!
//! Sources are named where a fact is not the crate's own: manual pages as `listen(2)` (of Linux, where nothing else is said), RFCs
//! by number. *Measured* means: on Linux, x86-64, with this crate.

#[doc = include_str!("limits.md")]
pub mod limits {}

#[doc = include_str!("os.md")]
pub mod os {}

#[doc = include_str!("kernel.md")]
pub mod kernel {}

// The programs of these pages need other crates: `tests/kit` compiles them.
#[cfg_attr(not(doctest), doc = include_str!("embedding.md"))]
pub mod embedding {}

#[cfg(feature = "tls")]
#[doc = include_str!("tls.md")]
pub mod tls {}

#[cfg(feature = "sim")]
#[doc = include_str!("testing.md")]
pub mod testing {}

#[doc = include_str!("operating.md")]
pub mod operating {}

#[doc = include_str!("performance.md")]
pub mod performance {}

#[cfg_attr(not(doctest), doc = include_str!("from_tokio.md"))]
pub mod from_tokio {}

#[doc = include_str!("from_mio.md")]
pub mod from_mio {}

#[cfg_attr(not(doctest), doc = include_str!("from_message_io.md"))]
pub mod from_message_io {}

#[doc = include_str!("from_erlang.md")]
pub mod from_erlang {}
