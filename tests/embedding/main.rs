//! A server inside a program: its loop, its threads, its types.

mod adopted;
mod awaited;
mod controls;
mod deferred;
mod foreign_loops;
mod handle;
mod loops;
mod misuse;
mod spawn;
mod stored;
mod timers;
mod watched;
