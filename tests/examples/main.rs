//! The examples, as programs.

mod activation;
mod deploy;
mod each;
mod echo;
mod game;
mod handover;
mod login;
mod metrics;
mod proxy;
mod starttls;
mod tls_reload;
