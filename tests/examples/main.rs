//! The examples, as programs.

mod activation;
mod browser;
mod deploy;
mod each;
mod echo;
mod game;
mod handover;
mod login;
mod metrics;
mod mqtt;
mod observer;
mod proxy;
mod redis;
mod starttls;
mod tls_reload;
mod websocket;
