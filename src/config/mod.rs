//! The options: of a server, a listener, an outgoing connection; of each connection and socket.
//!
//! `ConnConfig` is defined in `proto`, whose connections read it and which imports nothing above.

mod check;
mod connect;
#[cfg(feature = "serde")]
mod data;
mod listen;
mod server;
mod socket;

pub use crate::proto::ConnConfig;
pub use connect::{Connect, Retry};
pub use listen::{AtCapacity, Listen, ProxyProtocol, SourceLimits};
pub(crate) use server::MAX_CONNECTIONS;
pub use server::{Budgets, Config, PendingLimits, QueueLimits, Quota};
pub use socket::{Keepalive, SocketOptions};
