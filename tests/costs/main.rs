//! What a message and a connection cost.

mod allocations;
mod memory_comes_back;
mod memory_rss;
mod system_calls;
