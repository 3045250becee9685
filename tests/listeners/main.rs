//! Listeners and admission.

mod accepting;
mod access;
mod capacity;
mod drain_backlog;
mod enumeration;
mod fairness;
mod fd_exhaustion;
mod foreign_sockets;
mod gone_clients;
mod listening;
mod not_open_yet;
mod pending;
mod proxy_protocol;
mod rates;
mod reconfigure;
mod reserved;
mod stampede;
mod unix_sockets;
