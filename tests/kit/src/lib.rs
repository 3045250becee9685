//! Tools for testing the server, shared by its tests, by the programs `simulate` and `exhaust`, and by the fuzzers.
//!
//! | on the simulated kernel | |
//! |---|---|
//! | [`campaign`] | worlds drawn from seeds, with everything that can go wrong |
//! | [`failing`] | fixed scenarios, with each call and each two calls failing |
//! | [`closure`], [`strings`] | every state of a connection, every short string in every cut |
//! | `schedules` | every schedule of a connection behind TLS |
//! | [`recorded`] | a service with a bug, whose recordings are replayed and reduced |
//! | [`forged`] | recordings with any content |
//! | [`naive`], `sim_tls` | what the others compare with: a naive decoder, a TLS client in memory |
//!
//! | on real sockets | |
//! |---|---|
//! | [`net`] | a server on a thread of its own, clients whose every wait is bounded, examples as child processes |
//! | [`script`] | handlers that are closures, and a journal of all callbacks |
//! | [`outgoing`], `tls` | servers to connect to, certificates and TLS clients |
//! | [`unlinked`] | a file without a name |
//! | [`exposition`] | a reader of Prometheus's text format |

pub mod campaign;
pub mod closure;
pub mod exposition;
pub mod failing;
pub mod forged;
pub mod naive;
pub mod net;
pub mod outgoing;
pub mod planned;
pub mod planted_bugs;
pub mod recorded;
#[cfg(feature = "tls")]
pub mod schedules;
pub mod script;
pub mod seeds;
#[cfg(feature = "tls")]
pub mod sim_tls;
pub mod strings;
pub mod terminal;
#[cfg(feature = "tls")]
pub mod tls;
pub mod unlinked;

/// The repository.
pub const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");

/// The pages of the handbook whose programs need other crates: they are compiled here, so that the library and its examples do
/// without those crates.
#[cfg(doctest)]
mod handbook {
    #[doc = include_str!("../../../src/manual/embedding.md")]
    mod embedding {}
    #[doc = include_str!("../../../src/manual/from_message_io.md")]
    mod from_message_io {}
    #[doc = include_str!("../../../src/manual/from_tokio.md")]
    mod from_tokio {}
}

/// The reasons that have occurred, with their counts, of a server or of a listener.
pub fn reasons(
    closed: impl Fn(portcullis::CloseReason) -> u64,
) -> Vec<(portcullis::CloseReason, u64)> {
    let all = portcullis::CloseReason::ALL.iter();
    all.map(|&reason| (reason, closed(reason)))
        .filter(|&(_, count)| count > 0)
        .collect()
}
