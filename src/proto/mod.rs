//! One connection, sans-IO: bytes and `now` go in, events and bytes come out.
//!
//! Nothing here knows a descriptor, a clock or a system call. For each turn of a connection the
//! reactor calls, in this order:
//!
//! 1. [`Machine::handle_input`], [`Machine::handle_eof`], [`Machine::handle_blocked`] or
//!    [`Machine::handle_read_error`] with the result of a read; without a read
//!    [`Machine::handle_stash`] or [`Machine::begin_buffered`] for bytes that are buffered;
//! 2. [`Machine::next_event`] until it is `None`, calling the handler for each; then
//!    [`Machine::end_input`];
//! 3. [`Machine::transmit`] and [`Machine::handle_sent`] until nothing is pending, or the kernel
//!    takes no more ([`Machine::handle_unsent`]);
//! 4. [`Machine::next_step`] for what else the socket needs, and [`Machine::deadline`] for the time
//!    of the next turn ([`Machine::handle_timeout`]).
//!
//! [`Machine`] is composed of parts, each with private data and a small and a large half. The small
//! halves of all parts are one word in every connection ([`status`]), the large ones exist while
//! something goes on ([`active`]):
//!
//! | part | small half | large half |
//! |---|---|---|
//! | receiving | [`recv::Recv`] | [`recv::RecvBuffer`], [`rates::Throttle`] |
//! | sending | [`send::Send`] | [`send_queue::SendQueue`] |
//! | clocks | | [`deadlines::Deadlines`] |
//! | closing | [`close::CloseAfterInput`] | [`close::Ending`] |
//! | TLS | | [`tls::Session`] |

mod active;
mod allows;
mod buffers;
mod close;
mod conn_config;
mod deadlines;
mod detached_io;
mod framing;
mod hello;
#[cfg(feature = "sim")]
mod invariants;
mod life;
mod machine;
mod payload;
mod pool;
mod proxy;
mod rates;
mod recv;
mod send;
mod send_queue;
#[cfg(feature = "sim")]
mod snapshot;
mod state;
mod status;
mod time;
#[cfg_attr(not(feature = "tls"), path = "tls/none.rs")]
pub(crate) mod tls;

pub(crate) use buffers::lower;
pub(crate) use conn_config::check_rates;
pub use conn_config::ConnConfig;
pub(crate) use deadlines::TimeLeft;
pub(crate) use detached_io::{DetachedIo, EndLimits};
pub use framing::{Decoded, FrameBuf, FrameError, Framer, Framing};
pub(crate) use machine::Machine;
pub use payload::Payload;
pub(crate) use payload::{kept, length, shared, Chunk};
pub(crate) use pool::Pool;
pub use proxy::{ProxyError, ProxyHeader, ProxySsl, ProxyTlvs};
pub use rates::Rate;
pub(crate) use rates::{Bucket, SharedMeters};
pub(crate) use recv::InputCursor;
pub(crate) use send::{Frame, FRAME_PIECES};
pub(crate) use send_queue::{Held, SharedPayloads, PIECES};
pub(crate) use state::{Event, NextStep};
pub use state::{SendError, State, Traffic};
pub(crate) use time::Time;
pub(crate) use tls::TlsConfig;

#[cfg(all(test, feature = "sim"))]
mod tests;
