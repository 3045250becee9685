//! The atomics and locks of the parts that threads share.
//!
//! Those of the standard library. The models (`models.rs`, with `--cfg loom`) run the same parts on
//! those of loom, in every order that the memory model allows.

#[cfg(all(test, loom))]
pub(crate) mod models;

#[cfg(not(all(test, loom)))]
pub(crate) use std::{
    sync::{atomic, Condvar, Mutex, MutexGuard},
    thread::{current, ThreadId},
};

#[cfg(all(test, loom))]
pub(crate) use models::{atomic, current, Condvar, Mutex, MutexGuard, ThreadId};
