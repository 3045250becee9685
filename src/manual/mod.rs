//! The handbook: everything around the API.
//!
//! | page | topics |
//! |---|---|
//! | [`limits`] | limits to set, their cost in memory, timeouts |
//! | [`os`] | the operating system: readiness, descriptors, backlog, FIN, RST, TIME_WAIT, clocks |
//! | [`kernel`] | settings of the kernel and of the process, and commands that show them |
//! | [`embedding`] | a server in a thread, a game's tick and other loops; common mistakes |
#![cfg_attr(
    feature = "tls",
    doc = "| [`tls`] | certificates, names, client certificates, reload, resumption, memory |"
)]
#![cfg_attr(
    not(feature = "tls"),
    doc = "| `tls` (feature `tls`) | certificates, names, reload, resumption, memory |"
)]
#![cfg_attr(
    feature = "sim",
    doc = "| [`testing`] | tests of a handler: faults, fuzzing, recordings |"
)]
#![cfg_attr(
    not(feature = "sim"),
    doc = "| `testing` (feature `sim`) | tests of a handler: faults, fuzzing, recordings |"
)]
//! | [`brokers`], [`games`], [`databases`], [`gateways`] | a page for each kind of program: pattern, options, limits, figures |
#![cfg_attr(
    feature = "serde",
    doc = "| [`observer`] | the page in a browser: paths, access, cost, names of the data |"
)]
#![cfg_attr(
    not(feature = "serde"),
    doc = "| `observer` (feature `observer`) | the page in a browser: paths, access, names |"
)]
//! | [`operating`] | logs, metrics, alarms, draining, restarts; each close reason |
//! | [`performance`] | cost of a message and of each feature; settings for each goal |
//! | [`comparisons`] | tokio, mio, message-io and Erlang: the same program on both sides |
//!
//! Facts about other software come with their source: a manual page such as `listen(2)` (of Linux,
//! unless stated otherwise) or an RFC. *Measured* means: on Linux, x86-64, with this crate.

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
#[cfg_attr(feature = "record", doc = include_str!("recordings.md"))]
pub mod testing {}

#[doc = include_str!("brokers.md")]
pub mod brokers {}

#[doc = include_str!("games.md")]
pub mod games {}

#[doc = include_str!("databases.md")]
pub mod databases {}

#[doc = include_str!("gateways.md")]
pub mod gateways {}

#[cfg(feature = "serde")]
#[doc = include_str!("observer.md")]
pub mod observer {}

#[doc = include_str!("operating.md")]
pub mod operating {}

#[doc = include_str!("performance.md")]
pub mod performance {}

/// The same servers elsewhere and here, with the differences: tokio, mio, message-io, Erlang.
///
/// # tokio
///
#[cfg_attr(not(doctest), doc = include_str!("from_tokio.md"))]
///
/// # mio
///
#[doc = include_str!("from_mio.md")]
///
/// # message-io
///
#[cfg_attr(not(doctest), doc = include_str!("from_message_io.md"))]
///
/// # Erlang
///
#[doc = include_str!("from_erlang.md")]
pub mod comparisons {}
