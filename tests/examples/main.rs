//! The examples, as programs.

mod activation;
mod deploy;
mod each;
mod echo;
mod game;
mod handover;
mod login;
mod metrics;
mod mqtt;
mod proxy;
mod redis;
mod starttls;
mod tls_reload;
mod websocket;
