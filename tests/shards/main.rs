//! Several servers that act as one.

mod cap;
mod ending;
mod free_slots;
mod out_of_fds;
mod places;
mod tls;
mod together;
