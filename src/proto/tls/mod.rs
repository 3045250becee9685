//! TLS on one connection, sans-IO. The only folder that names rustls.
//!
//! The machine asks a [`Session`] and nothing else.

mod chain;
mod client;
mod config;
mod drive;
mod info;
mod pem;
mod pem_sections;
mod session;
mod sessions;

pub use chain::BoundedVerifier;
pub(crate) use client::ClientTls;
pub use config::{ServerNames, TlsConfig};
pub use info::TlsInfo;
pub use pem::{client_config, server_config, server_config_with_clients, ClientAuth};
pub(crate) use rustls::ClientConfig;
pub(super) use session::Session;
