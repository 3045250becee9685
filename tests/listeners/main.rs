//! Listeners, and what decides who gets in.

mod accepting;
mod access;
mod capacity;
mod enumeration;
mod fairness;
mod listening;
mod not_open_yet;
mod proxy_protocol;
mod rates;
mod reconfigure;
mod stampede;
mod fd_exhaustion;
mod unix_sockets;
mod failed_accepts;
